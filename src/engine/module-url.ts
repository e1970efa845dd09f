import { existsSync } from 'node:fs'
import { fileURLToPath } from 'node:url'

/** A module beside another one: TypeScript in a checkout, JavaScript in the built package. */
export function moduleUrl(url: URL): URL {
  if (url.pathname.endsWith('.ts') && !existsSync(fileURLToPath(url))) return new URL(url.href.replace(/\.ts$/, '.js'))
  return url
}

/**
 * Errors of device modules in words: where in the module's own files one was thrown, and what it
 * says.
 */

import { isAbsolute, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import { inspect } from 'node:util'

/** The checkout, or dist/ of the package. */
const root = fileURLToPath(new URL('../../', import.meta.url))

/** `device.ts:12`, the innermost frame of a stack that is not Node's or virtiod's; a file in node_modules only if no other is there. */
export function placeOf(error: unknown): string | undefined {
  const stack = error instanceof Error ? error.stack : undefined
  let library: string | undefined
  for (const line of stack?.split('\n') ?? []) {
    const match = /^\s+at (?:.*[( ])?((?:file:\/\/|\/)[^()]*?):(\d+):\d+\)?$/.exec(line)
    if (match === null) continue
    const file = pathOf(match[1]!)
    if (isOurs(file)) continue
    const place = `${shownPath(file)}:${match[2]}`
    if (!file.includes('/node_modules/')) return place
    library ??= place
  }
  return library
}

/** `device.ts:12: queue 0: TypeError: x is not a function`. @param what was being done @param file named when the stack has no place */
export function failureText(error: unknown, what: string, file: string): string {
  return `${placeOf(error) ?? file}: ${what === '' ? '' : `${what}: `}${errorText(error)}`
}

/** `TypeError: x is not a function`. */
export function errorText(error: unknown): string {
  if (!(error instanceof Error)) return `not an Error was thrown: ${inspect(error)}`
  return error.name === 'Error' || error.name === 'DeviceError' ? error.message : `${error.name}: ${error.message}`
}

/** Relative when it is below the working directory. */
export function shownPath(file: string): string {
  const path = relative(process.cwd(), file)
  return path === '' || path.startsWith('..') || isAbsolute(path) ? file : path
}

export function pathOf(fileOrUrl: string): string {
  return fileOrUrl.startsWith('file:') ? fileURLToPath(fileOrUrl.replace(/\?.*$/, '')) : fileOrUrl
}

/** A file of virtiod's own. */
export function isOurs(file: string): boolean {
  return file.startsWith(`${root}src/`) || file.startsWith(`${root}devices/`)
}

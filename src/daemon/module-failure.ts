/**
 * Errors of device modules in words: where in the module's own files one was thrown, and what it
 * says.
 */

import { isAbsolute, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import { inspect } from 'node:util'
import { ConfigError } from '../device/errors.ts'

/** The checkout, or dist/ of the package. */
const root = fileURLToPath(new URL('../../', import.meta.url))

/** `device.ts:12`, the innermost frame of a stack that is not Node's or virtiod's; a file in node_modules only if no other is there. */
export function placeOf(error: unknown): string | undefined {
  return error instanceof Error ? placeIn(error.stack) : undefined
}

/** As {@link placeOf}, of its stack. */
export function placeIn(stack: string | undefined): string | undefined {
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

/**
 * `TypeError: fetch failed: connect ECONNREFUSED 127.0.0.1:80`: with what it was caused by, where it doesn't say so.
 * @param depth of causes that are told: they may go in a circle
 */
export function errorText(error: unknown, depth = 4): string {
  if (!(error instanceof Error)) return `not an Error was thrown: ${inspect(error)}`
  const { name, message, cause } = error
  const { code } = error as { code?: unknown }
  const said = message === '' && typeof code === 'string' ? code : message
  const plain = name === 'Error' || name === 'DeviceError' || name === 'AggregateError'
  const text = plain ? said : `${name}: ${said}`
  if (!(cause instanceof Error) || error instanceof ConfigError || depth === 0) return text
  const why = errorText(cause, depth - 1)
  return why === '' || (cause.message !== '' && text.includes(cause.message)) ? text : `${text}: ${why}`
}

/**
 * What was wrong with a request: `chain 3 of queue 0: no`. Errors of chains say which one it is, but not of which
 * queue.
 * @param chain its head; undefined: of no chain in particular
 */
export function requestText(queue: number, chain: number | undefined, problem: string): string {
  if (chain === undefined) return problem.startsWith(`queue ${queue}`) ? problem : `queue ${queue}: ${problem}`
  const own = `chain ${chain} `
  const full = `${own}of queue ${queue}`
  if (problem.startsWith(full)) return problem
  return problem.startsWith(own) ? `${full} ${problem.slice(own.length)}` : `${full}: ${problem}`
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

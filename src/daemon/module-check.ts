/**
 * What a device module hands to virtiod, field by field: its definition, and the device that it opened. Problems are told
 * all at once, with what was expected and what was found. Types are no promise: modules may be JavaScript.
 */
import { inspect } from 'node:util'
import * as v from 'valibot'
import type { DeviceDefinition } from '../device/index.ts'
import { VIRTQ_MAX_SIZE } from '../virtio/constants.ts'

const MAX_QUEUES = 256
const MAX_CONFIG = 256
const MAX_OPERATIONS = 8
const MAX_ERRORS = 16

/** @param expected in words */
function field(expected: string, test: (value: unknown) => boolean) {
  return v.custom<unknown>(test, expected)
}

const isFunction = (value: unknown): boolean => typeof value === 'function'
const isUnset = (value: unknown): boolean => value === undefined
const isInteger = (value: unknown, min: number, max: number): boolean =>
  Number.isInteger(value) && (value as number) >= min && (value as number) <= max

function isNames(value: unknown, most: number): boolean {
  return Array.isArray(value) && value.length <= most && value.every((name) => typeof name === 'string' && name !== '')
}

function isMetric(value: unknown): boolean {
  const { name, type, labels, help } = (value ?? {}) as Record<string, unknown>
  const named = typeof name === 'string' && /^[a-z][a-z0-9_]*$/.test(name) && typeof help === 'string'
  return named && (type === 'counter' || type === 'gauge') && isNames(labels, 16)
}

const definition = v.object({
  apiVersion: field('1', (value) => value === 1),
  name: field(
    'lower-case letters and digits, a letter first',
    (value) => typeof value === 'string' && /^[a-z][a-z0-9]{0,31}$/.test(value)
  ),
  virtioId: field('a device id, 1 to 65535', (value) => isInteger(value, 1, 65535)),
  options: field(
    'a strictObject of valibot',
    (value) => typeof value === 'object' && value !== null && 'entries' in value && '~run' in value
  ),
  operations: field(
    `1 to ${MAX_OPERATIONS} names`,
    (value) => isNames(value, MAX_OPERATIONS) && (value as []).length > 0
  ),
  errors: field(`at most ${MAX_ERRORS} names`, (value) => isNames(value, MAX_ERRORS)),
  queueModule: field('a URL', (value) => isUnset(value) || value instanceof URL),
  createQueueHandler: field('a function', (value) => isUnset(value) || isFunction(value)),
  eventLoop: field('true or false', (value) => isUnset(value) || typeof value === 'boolean'),
  timeoutMs: field('milliseconds, 0 = never', (value) => isUnset(value) || isInteger(value, 0, 2 ** 31 - 1)),
  metrics: field(
    'a list of { name, type: counter or gauge, labels, help }',
    (value) => isUnset(value) || (Array.isArray(value) && value.every(isMetric))
  ),
  qemu: field('a function', (value) => isUnset(value) || isFunction(value)),
  open: field('a function', isFunction),
})

const optionalFunction = field('a function', (value) => isUnset(value) || isFunction(value))

const device = v.object({
  features: field('a bigint', (value) => typeof value === 'bigint' && value >= 0n && value < 1n << 64n),
  numQueues: field(`an integer from 1 to ${MAX_QUEUES}`, (value) => isInteger(value, 1, MAX_QUEUES)),
  maxQueueSize: field(
    `a power of two, 2 to ${VIRTQ_MAX_SIZE}`,
    (value) => isUnset(value) || (isInteger(value, 2, VIRTQ_MAX_SIZE) && Number.isInteger(Math.log2(value as number)))
  ),
  queueData: field('what structuredClone can copy', isCloneable),
  config: field('a function', isFunction),
  writeConfig: field('a function', isFunction),
  close: field('a function', isFunction),
  negotiated: optionalFunction,
  reset: optionalFunction,
  saveState: optionalFunction,
  loadState: optionalFunction,
  letGo: optionalFunction,
  takeBack: optionalFunction,
  takeOver: optionalFunction,
  ringActive: optionalFunction,
  reported: optionalFunction,
  samples: optionalFunction,
  refresh: optionalFunction,
  qemu: optionalFunction,
})

/** Empty: it is a definition. */
export function definitionProblems(value: unknown): string[] {
  if (!isObject(value)) return [`expected an object, found ${shown(value)}`]
  const found = problems(definition, value)
  const { queueModule, createQueueHandler } = value as Partial<DeviceDefinition>
  if (queueModule !== undefined || createQueueHandler !== undefined) return found
  return [...found, 'createQueueHandler: expected a function, or queueModule beside it, found nothing']
}

/** Empty: it is a device. */
export function deviceProblems(value: unknown): string[] {
  return isObject(value) ? problems(device, value) : [`expected an object, found ${shown(value)}`]
}

/** Empty: it is a config space. */
export function configProblems(value: unknown): string[] {
  if (value instanceof Uint8Array && value.length <= MAX_CONFIG) return []
  const found = value instanceof Uint8Array ? `${value.length} bytes` : shown(value)
  return [`config(): expected a Uint8Array of at most ${MAX_CONFIG} bytes, found ${found}`]
}

function problems(schema: typeof definition | typeof device, value: Readonly<Record<string, unknown>>): string[] {
  // Fields may be inherited, and one that is missing is judged as one that is undefined.
  const fields = Object.fromEntries(Object.keys(schema.entries).map((name) => [name, value[name]]))
  const result = v.safeParse(schema as v.GenericSchema, fields)
  if (result.success) return []
  return result.issues.map(({ path, message }) => {
    const name = String(path?.[0]?.key)
    return `${name}: expected ${message}, found ${shown(fields[name])}`
  })
}

function isObject(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === 'object' && value !== null
}

function isCloneable(value: unknown): boolean {
  try {
    structuredClone(value)
    return true
  } catch {
    return false
  }
}

function shown(value: unknown): string {
  if (value === undefined) return 'nothing'
  if (typeof value === 'function') return 'a function'
  const text = inspect(value, { depth: 1, breakLength: Number.POSITIVE_INFINITY })
  return text.length <= 60 ? text : `${text.slice(0, 57)}…`
}

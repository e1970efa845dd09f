/**
 * The checks of what a module describes itself with. TypeScript sees most mistakes before, but modules are JavaScript
 * as well, and what a function returns at start depends on options.
 */
import { inspect } from 'node:util'
import type { DeviceHandlers, QueueDescription } from './define.ts'
import { DeviceError } from './errors.ts'
import type { DeviceMetric, QemuDevice } from './index.ts'

/** Feature bits that belong to rings and transport, not to devices: 24 … 49 (virtio 1.3 §2.2). */
const RESERVED_FEATURES = ((1n << 26n) - 1n) << 24n

/** A description whose functions were asked and whose defaults were filled in. */
export interface DeviceShape {
  readonly name: string
  readonly queues: readonly QueueDescription[]
  readonly features: bigint
  readonly config: Uint8Array
  readonly maxQueueSize: number
  readonly operations: readonly string[]
  readonly errors: readonly string[]
  readonly metrics: readonly DeviceMetric[]
  readonly timeoutMs: number
  readonly qemu: QemuDevice | undefined
}

/** What a field has to be: the check, and the same in words. */
interface Rule {
  readonly expected: string
  readonly required?: true
  /** It may be a function of the options, which returns what is meant. */
  readonly byOptions?: true
  accepts(value: unknown): boolean
}

const NAME = /^[a-z][a-z0-9]*$/
const METRIC_NAME = /^[a-z][a-z0-9_]*$/

const RULES: Readonly<Record<string, Rule>> = {
  apiVersion: { expected: '1', required: true, accepts: (value) => value === 1 },
  name: {
    expected: 'lower-case letters and digits that begin with a letter',
    required: true,
    accepts: (value) => typeof value === 'string' && NAME.test(value),
  },
  virtioId: {
    expected: 'a device id, 1 to 65535',
    required: true,
    accepts: (value) => isInteger(value, 1, 65535),
  },
  options: {
    expected: 'a valibot strictObject',
    accepts: (value) => isObject(value) && isObject(value['entries']),
  },
  queues: {
    expected: "an array of 1 to 256 queues, each { name, kind?: 'requests' | 'buffers' }",
    required: true,
    byOptions: true,
    accepts: (value) => Array.isArray(value) && isInteger(value.length, 1, 256) && value.every(isQueue),
  },
  features: {
    expected: 'a bigint of device-specific feature bits (0 to 23 and 50 to 63), see featureSet',
    byOptions: true,
    accepts: (value) =>
      typeof value === 'bigint' && BigInt.asUintN(64, value) === value && (value & RESERVED_FEATURES) === 0n,
  },
  config: {
    expected: 'a Uint8Array of at most 256 bytes',
    byOptions: true,
    accepts: (value) => value instanceof Uint8Array && value.length <= 256,
  },
  maxQueueSize: {
    expected: 'a power of two, 2 to 32768',
    accepts: (value) => isInteger(value, 2, 32768) && Number.isInteger(Math.log2(value as number)),
  },
  operations: {
    expected: 'an array of 1 to 8 different names',
    accepts: (value) => isNames(value) && isInteger(value.length, 1, 8),
  },
  errors: {
    expected: 'an array of at most 16 different names',
    accepts: (value) => isNames(value) && value.length <= 16,
  },
  metrics: {
    expected: "an array of different metrics, each { name, type: 'counter' | 'gauge', labels: […], help }",
    accepts: (value) => Array.isArray(value) && value.every(isMetric) && isNames(value.map(({ name }) => name)),
  },
  timeoutMs: {
    expected: 'milliseconds, 0 or more',
    accepts: (value) => isInteger(value, 0, 2 ** 31 - 1),
  },
  qemu: {
    expected: '{ driver, properties }',
    byOptions: true,
    accepts: (value) => isObject(value) && typeof value['driver'] === 'string' && isObject(value['properties']),
  },
  create: {
    expected: 'a function (context) => handlers',
    required: true,
    accepts: (value) => typeof value === 'function',
  },
}

/**
 * @throws TypeError naming the field, what was expected and what was found
 * @throws DeviceError ERR_DEVICE_API_VERSION, before all else: another version may have other fields
 */
export function checkDescription(description: unknown): void {
  if (!isObject(description)) throw new TypeError(`defineDevice: expected a description, found ${shown(description)}`)
  const { apiVersion, name } = description
  if (Number.isInteger(apiVersion) && apiVersion !== 1) {
    const message = `the device ${String(name)} is written for version ${apiVersion} of the contract, this is version 1`
    throw new DeviceError('ERR_DEVICE_API_VERSION', message)
  }
  for (const field of Object.keys(description)) {
    if (RULES[field] !== undefined) continue
    throw new TypeError(`defineDevice: there is no field '${field}', the fields are ${Object.keys(RULES).join(', ')}`)
  }
  for (const [field, rule] of Object.entries(RULES)) {
    const value = description[field]
    if (value === undefined && rule.required !== true) continue
    if (typeof value === 'function' && rule.byOptions === true) continue
    if (!rule.accepts(value)) throw misfit('defineDevice', field, rule, value)
  }
}

/**
 * The value of a field for these options, undefined when it is not there. @throws TypeError when it is not what it has
 * to be
 */
export function resolveField<Value>(
  device: string,
  field: string,
  value: Value | ((options: never) => Value) | undefined,
  options: unknown
): Value | undefined {
  if (typeof value !== 'function') return value
  const resolved: unknown = (value as (options: unknown) => unknown)(options)
  const rule = RULES[field]!
  if (rule.accepts(resolved)) return resolved as Value
  throw misfit(device, `${field}(options)`, rule, resolved)
}

const METHODS: readonly (keyof DeviceHandlers)[] = [
  'handle',
  'discard',
  'writeConfig',
  'negotiated',
  'queueActive',
  'reset',
  'saveState',
  'loadState',
  'refresh',
  'close',
]

/** What `create` returned. @throws TypeError */
export function checkHandlers(shape: DeviceShape, handlers: unknown): asserts handlers is DeviceHandlers {
  const { name } = shape
  if (!isObject(handlers))
    throw new TypeError(`${name}: create: expected an object of handlers, found ${shown(handlers)}`)
  for (const method of METHODS) {
    const value = handlers[method]
    if (value !== undefined && typeof value !== 'function')
      throw new TypeError(`${name}: create: ${method}: expected a function, found ${shown(value)}`)
  }
  const requests = shape.queues.find(({ kind }) => kind !== 'buffers')
  if (requests !== undefined && handlers['handle'] === undefined)
    throw new TypeError(`${name}: create: handle: expected a function, since queue '${requests.name}' has requests`)
  const [missing, other] = handlers['saveState'] === undefined ? ['saveState', 'loadState'] : ['loadState', 'saveState']
  if (handlers[other!] !== undefined && handlers[missing!] === undefined)
    throw new TypeError(`${name}: create: ${missing}: expected a function, since there is ${other}`)
}

function misfit(owner: string, field: string, { expected }: Rule, value: unknown): TypeError {
  return new TypeError(`${owner}: ${field}: expected ${expected}, found ${shown(value)}`)
}

function shown(value: unknown): string {
  return inspect(value, { depth: 1, breakLength: Number.POSITIVE_INFINITY, maxArrayLength: 4, maxStringLength: 80 })
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null
}

function isInteger(value: unknown, least: number, most: number): boolean {
  return Number.isInteger(value) && (value as number) >= least && (value as number) <= most
}

function isNames(value: unknown): value is string[] {
  if (!Array.isArray(value)) return false
  return value.every((name) => typeof name === 'string' && name !== '') && new Set(value).size === value.length
}

function isQueue(value: unknown): boolean {
  if (!isObject(value) || typeof value['name'] !== 'string' || value['name'] === '') return false
  const { kind } = value
  return kind === undefined || kind === 'requests' || kind === 'buffers'
}

function isMetric(value: unknown): boolean {
  if (!isObject(value)) return false
  const { name, type, labels, help } = value
  if (typeof name !== 'string' || !METRIC_NAME.test(name) || typeof help !== 'string' || help === '') return false
  return (type === 'counter' || type === 'gauge') && isNames(labels)
}

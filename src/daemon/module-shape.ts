/**
 * What must stay as it is when a device gets another version of its module, or its module again after a failure: a driver, metrics
 * and sockets are attached to it.
 */
import { DEFAULT_TIMEOUT_MS } from '../device/define.ts'
import type { DeviceDefinition, DeviceMetric } from '../device/index.ts'
import type { OptionInfo } from './option-table.ts'

/** A definition, without its functions. */
export interface ModuleShape {
  readonly name: string
  readonly virtioId: number
  readonly operations: readonly string[]
  readonly errors: readonly string[]
  readonly metrics: readonly DeviceMetric[]
  readonly eventLoop: boolean
  /** Milliseconds, 0 = never. */
  readonly timeoutMs: number
  /** URL of the module with the queue half. */
  readonly queueModule: string
  readonly options: readonly OptionInfo[]
}

/** An open device. */
export interface OpenShape {
  readonly features: bigint
  readonly numQueues: number
  readonly maxQueueSize: number | undefined
  readonly configLength: number
}

export function shapeOf(definition: DeviceDefinition, url: string, options: readonly OptionInfo[]): ModuleShape {
  const { name, virtioId, operations, errors, metrics, eventLoop, timeoutMs, queueModule } = definition
  return {
    name,
    virtioId,
    operations: [...operations],
    errors: [...errors],
    metrics: (metrics ?? []).map((metric) => ({ ...metric, labels: [...metric.labels] })),
    eventLoop: eventLoop === true,
    timeoutMs: timeoutMs ?? DEFAULT_TIMEOUT_MS,
    queueModule: queueModule?.href ?? url,
    options,
  }
}

/** Where two versions of a module differ in what must not change, in words; undefined: nowhere. */
export function shapeDifference(old: ModuleShape & OpenShape, now: ModuleShape & OpenShape): string | undefined {
  const hex = (features: bigint): string => `0x${features.toString(16)}`
  const names = (metrics: readonly DeviceMetric[]): string =>
    metrics.map(({ name, type, labels }) => `${type} ${name}(${labels.join(', ')})`).join(', ')
  const rows: readonly [what: string, old: unknown, now: unknown][] = [
    ['name', old.name, now.name],
    ['virtioId', old.virtioId, now.virtioId],
    ['number of queues', old.numQueues, now.numQueues],
    ['features', hex(old.features), hex(now.features)],
    ['maxQueueSize', old.maxQueueSize, now.maxQueueSize],
    ['length of the config space', old.configLength, now.configLength],
    ['operations', old.operations.join(', '), now.operations.join(', ')],
    ['errors', old.errors.join(', '), now.errors.join(', ')],
    ['metrics', names(old.metrics), names(now.metrics)],
    ['eventLoop', old.eventLoop, now.eventLoop],
  ]
  const changed = rows.filter(([, before, after]) => before !== after)
  if (changed.length === 0) return undefined
  return changed.map(([what, before, after]) => `${what} was ${shown(before)} and is ${shown(after)}`).join('; ')
}

function shown(value: unknown): string {
  return value === undefined ? 'unset' : value === '' ? 'none' : String(value)
}

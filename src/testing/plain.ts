/**
 * `testDevice`: a device module alone, driven on plain buffers. There is no socket, thread or addon, so a test takes
 * milliseconds, and what the module throws is the test's own. It is the same contract in both styles: real chains,
 * pooled; handlers that are called later; a session that ends when the module is at fault.
 */
import { setImmediate as turn } from 'node:timers/promises'
import { asOptionTable, checkNames, checkValues } from '../daemon/option-table.ts'
import {
  API_VERSION,
  type CreateQueueHandler,
  type Device,
  type DeviceDefinition,
  DeviceError,
  featureSet,
  VIRTIO_F_VERSION_1,
} from '../device/index.ts'
import { VIRTQ_MAX_SIZE } from '../virtio/constants.ts'
import { type LogLine, PlainHost } from './plain-host.ts'
import { type PlainOwner, PlainQueue } from './plain-queue.ts'
import type { Reply } from './reply.ts'

const DEFAULT_QUEUE_SIZE = 256
const DEFAULT_TIMEOUT_MS = 30_000

export interface TestDeviceOptions {
  /** The device's options by name, as a configuration file has them; checked by its schema. The default: none. */
  readonly options?: Readonly<Record<string, unknown>>
  /**
   * What the driver negotiates, without VIRTIO_F_VERSION_1, which is always there. The default: all that is offered.
   */
  readonly features?: bigint
  /** The default: the definition's name and 0. */
  readonly name?: string
  /** Entries of each ring; the default is 256, or less if the device takes less. */
  readonly queueSize?: number
  /**
   * Awkward framing: every buffer is cut into odd pieces over two memory regions. A device must not care, so run each
   * test with and without.
   */
  readonly split?: boolean
  /** In place of the definition's `timeoutMs`. */
  readonly timeoutMs?: number
}

/** A device under test, with a driver that has negotiated and started all queues. */
export class TestDevice implements AsyncDisposable {
  /** The control half, for what has no method here. */
  readonly device: Device
  readonly #definition: DeviceDefinition
  readonly #host: PlainHost
  readonly #abort: AbortController
  readonly #settings: TestDeviceOptions
  readonly #create: CreateQueueHandler
  readonly #counts: Record<'operations' | 'errors', Record<string, number>> = { operations: {}, errors: {} }
  #queues: PlainQueue[] = []
  #failure: unknown
  #closed = false

  private constructor(parts: TestDeviceParts) {
    this.device = parts.device
    this.#definition = parts.definition
    this.#host = parts.host
    this.#abort = parts.abort
    this.#settings = parts.settings
    this.#create = parts.create
    for (const name of this.#definition.operations) this.#counts.operations[name] = 0
    for (const name of this.#definition.errors) this.#counts.errors[name] = 0
  }

  /** As {@link testDevice}. */
  static async open<Options, QueueData>(
    tested: DeviceDefinition<Options, QueueData>,
    settings: TestDeviceOptions
  ): Promise<TestDevice> {
    // The daemon too uses it as one of unknown options and queue data: only the definition itself looks inside.
    const definition = tested as unknown as DeviceDefinition
    checkVersion(definition)
    const options = checkOptions(definition, settings.options ?? {})
    const create = await queueHalf(definition)
    const abort = new AbortController()
    let opened: TestDevice | undefined
    const send = (queue: number, message: unknown): void => {
      setImmediate(() => {
        if (opened !== undefined) opened.#queues[queue]?.message(message)
      })
    }
    const host = new PlainHost(settings.name ?? `${definition.name}0`, abort.signal, send)
    const device = await definition.open(options, host)
    opened = new TestDevice({ definition, device, host, abort, settings, create })
    try {
      opened.#start(settings.features)
    } catch (error) {
      await opened.close()
      throw error
    }
    return opened
  }

  // ---- what the driver does

  /**
   * Does a request. Several may be under way at once; those that don't fit the ring wait in line.
   * @param readable what the device reads; several arrays are several descriptors
   * @param writableLength bytes that the device may write, one descriptor
   * @returns what the device made of it; it rejects with what the handler threw, and when the session ends
   */
  request(queue: number, readable: Uint8Array | readonly Uint8Array[], writableLength = 0): Promise<Reply> {
    const buffers = readable instanceof Uint8Array ? [readable] : readable
    const given = buffers.filter((bytes) => bytes.length > 0)
    if (given.length === 0 && writableLength === 0) throw new RangeError('request: a chain has at least one byte')
    return this.#queue(queue).submit(given, writableLength)
  }

  /**
   * Gives the device a buffer of `length` bytes to put something into, on a queue of kind `buffers`. Resolves, when it
   * has done so, to what it put there. Rejects when the session ends before that, which a test may leave unheard.
   */
  give(queue: number, length: number): Promise<Uint8Array> {
    const given = this.request(queue, [], length).then(({ bytes, written }) => bytes.subarray(0, written))
    given.catch(() => {})
    return given
  }

  /** A copy of the config space. */
  get config(): Uint8Array {
    return this.device.config().slice()
  }

  /** The driver writes to the config space. Resolves to whether the device took it. @throws RangeError outside of it */
  async writeConfig(offset: number, bytes: Uint8Array): Promise<boolean> {
    const { length } = this.device.config()
    if (offset < 0 || offset + bytes.length > length)
      throw new RangeError(`writeConfig: [${offset}, +${bytes.length}) in a config space of ${length} bytes`)
    return await this.device.writeConfig(offset, bytes.slice())
  }

  /** Enables or disables a ring, as QEMU does with the queues of a network card. */
  enableQueue(queue: number, enabled: boolean): void {
    if (enabled) this.device.ringActive?.(queue, true)
    this.#queue(queue).setEnabled(enabled)
    if (!enabled) this.device.ringActive?.(queue, false)
  }

  /**
   * The driver goes, whatever is under way (that is rejected), and another one takes the device over. @param features
   * as in {@link TestDeviceOptions}
   */
  async reset(features?: bigint): Promise<void> {
    await this.#stop(new Error('the driver reset the device'))
    this.device.reset?.()
    this.#failure = undefined
    this.#start(features ?? this.#settings.features)
  }

  // ---- what the daemon does

  /**
   * What a migration, a handover or a reload carries over, empty when the device has no state. First what is under way
   * is waited for, as the daemon does.
   */
  async saveState(): Promise<Uint8Array> {
    await Promise.all(this.#queues.map((queue) => queue.pause()))
    try {
      return (await this.device.saveState?.()) ?? new Uint8Array(0)
    } finally {
      for (const queue of this.#queues) queue.resume()
    }
  }

  /** @throws what the device throws; an Error when it has no state */
  async loadState(state: Uint8Array): Promise<void> {
    if (this.device.loadState === undefined) throw new Error(`${this.#definition.name} has no state to load`)
    await this.device.loadState(state)
  }

  /** SIGHUP. */
  async refresh(): Promise<void> {
    if ((await this.device.refresh?.()) === true) this.#host.configChanged()
  }

  /** Ends the session and closes the device. */
  async close(): Promise<void> {
    if (this.#closed) return
    this.#closed = true
    this.#abort.abort(new Error('the device was closed'))
    await this.#stop(new Error('the device was closed'))
    this.device.reset?.()
    await this.device.close()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close()
  }

  // ---- what the device said

  /** Requests completed, by operation. */
  get operations(): Readonly<Record<string, number>> {
    return { ...this.#counts.operations }
  }

  /** Errors counted, by kind. */
  get errors(): Readonly<Record<string, number>> {
    return { ...this.#counts.errors }
  }

  /** The values of the device's own metrics, as Prometheus names them: `dropped_total{rule="loss"}`. */
  metrics(): Readonly<Record<string, number>> {
    const values: Record<string, number> = {}
    for (const { metric, labels, value } of this.device.samples?.() ?? []) {
      const pairs = Object.entries(labels).map(([label, text]) => `${label}=${JSON.stringify(String(text))}`)
      values[pairs.length === 0 ? metric : `${metric}{${pairs.join(',')}}`] = value
    }
    return values
  }

  /** What it logged. */
  get log(): readonly LogLine[] {
    return this.#host.lines
  }

  /** Configuration change notifications. */
  get configChanges(): number {
    return this.#host.configChanges
  }

  /**
   * What ended the session; undefined = it goes on. In the daemon it is logged and the front-end's connection closed.
   */
  get failure(): unknown {
    return this.#failure
  }

  // ---- inside

  #start(features: bigint | undefined): void {
    const { device } = this
    const offered = device.features
    const negotiated = features ?? offered
    const version1 = featureSet(VIRTIO_F_VERSION_1)
    if ((negotiated & ~(offered | version1)) !== 0n) {
      const bits = (negotiated & ~offered).toString(16)
      throw new RangeError(`testDevice: features: the device does not offer 0x${bits}`)
    }
    const owner: PlainOwner = {
      features: negotiated | version1,
      timeoutMs: this.#settings.timeoutMs ?? this.#definition.timeoutMs ?? DEFAULT_TIMEOUT_MS,
      split: this.#settings.split === true,
      operations: this.#definition.operations,
      errors: this.#definition.errors,
      counted: (kind, name) => {
        this.#counts[kind][name] = this.#counts[kind][name]! + 1
      },
      reported: (queue, message) => device.reported?.(queue, message),
      failed: (error) => this.#failed(error),
    }
    device.negotiated?.(owner.features)
    const most = device.maxQueueSize ?? VIRTQ_MAX_SIZE
    const size = this.#settings.queueSize ?? Math.min(DEFAULT_QUEUE_SIZE, most)
    if (size > most)
      throw new RangeError(`testDevice: queueSize: the device takes at most ${most} entries, not ${size}`)
    this.#queues = Array.from({ length: device.numQueues }, (_, index) => new PlainQueue(owner, index, size))
    for (const [index, queue] of this.#queues.entries()) {
      device.ringActive?.(index, true)
      queue.begin(this.#create(queue, structuredClone(device.queueData)))
    }
  }

  async #stop(reason: unknown): Promise<void> {
    const queues = this.#queues
    this.#queues = []
    for (const [index, queue] of queues.entries()) {
      await queue.end(reason)
      this.device.ringActive?.(index, false)
    }
    // What was about to be said to a ring is said to nobody.
    await turn()
  }

  #failed(error: unknown): void {
    this.#failure ??= error
    const ended = new Error('the session ended: the device failed', { cause: error })
    for (const queue of this.#queues) queue.fault(ended)
  }

  #queue(index: number): PlainQueue {
    if (this.#closed) throw new Error('the device was closed')
    const queue = this.#queues[index]
    if (queue === undefined) throw new RangeError(`there is no queue ${index}: the device has ${this.device.numQueues}`)
    return queue
  }
}

interface TestDeviceParts {
  readonly definition: DeviceDefinition
  readonly device: Device
  readonly host: PlainHost
  readonly abort: AbortController
  readonly settings: TestDeviceOptions
  readonly create: CreateQueueHandler
}

/**
 * Opens a device on plain buffers and lets a driver start all its queues.
 *
 * ```ts
 * await using device = await testDevice(definition, { options: { rate: 100 } })
 * const { bytes, written } = await device.request(0, Uint8Array.of(1, 2, 3), 16)
 * ```
 * @param definition the default export of the module
 * @throws ConfigError as the daemon does: of options that the schema refuses, and of those that `open` or `create`
 * refuses; whatever else `open` throws
 */
export function testDevice<Options, QueueData>(
  definition: DeviceDefinition<Options, QueueData>,
  settings: TestDeviceOptions = {}
): Promise<TestDevice> {
  return TestDevice.open(definition, settings)
}

function checkVersion({ name, apiVersion }: DeviceDefinition): void {
  if (apiVersion === API_VERSION) return
  const message = `the device ${name} is written for version ${apiVersion} of the contract, this is version ${API_VERSION}`
  throw new DeviceError('ERR_DEVICE_API_VERSION', message)
}

function checkOptions({ name, options }: DeviceDefinition, given: Readonly<Record<string, unknown>>): unknown {
  const table = asOptionTable(options, name)
  const label = (option: string): string => `--${option}`
  const known = Object.keys(table.entries)
  checkNames(Object.keys(given), known, label, 'option', `The options of ${name} are: ${known.join(', ') || 'none'}`)
  return checkValues(table, given, label)
}

async function queueHalf({ name, createQueueHandler, queueModule }: DeviceDefinition): Promise<CreateQueueHandler> {
  if (createQueueHandler !== undefined) return createQueueHandler
  if (queueModule === undefined)
    throw new TypeError(`the device ${name} has neither createQueueHandler nor a queueModule`)
  const loaded = (await import(queueModule.href)) as { createQueueHandler?: CreateQueueHandler }
  if (typeof loaded.createQueueHandler === 'function') return loaded.createQueueHandler
  throw new TypeError(`${queueModule.href} does not export the function createQueueHandler`)
}

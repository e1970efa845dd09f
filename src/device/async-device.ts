/**
 * The control half of async devices: {@link Device} over what a module's `create` returned, and the {@link
 * DeviceContext} that it was made with. Both halves live on one thread, so the queue half finds its device by a number.
 */
import { checkHandlers, type DeviceShape } from './async-description.ts'
import { AsyncMetrics } from './async-metrics.ts'
import { AsyncQueue } from './async-queue.ts'
import {
  BufferRing,
  DiscardingRing,
  Latecomers,
  LateFailures,
  RequestRing,
  type RingEnvironment,
} from './async-rings.ts'
import type { ConfigSpace, DeviceContext, DeviceHandlers, DeviceQueue, Metric } from './define.ts'
import { DeviceError } from './errors.ts'
import type {
  Device,
  DeviceHost,
  DeviceLogger,
  DeviceSample,
  QemuDevice,
  QueueContext,
  QueueHandler,
  ReceiveHandler,
} from './index.ts'

/** What the queue half gets. */
export interface AsyncQueueData {
  readonly device: number
}

/** The async devices of this thread. */
const devices = new Map<number, AsyncDevice>()
let lastId = 0

class AsyncConfigSpace implements ConfigSpace {
  readonly bytes: Uint8Array
  readonly view: DataView
  readonly #host: DeviceHost

  constructor(bytes: Uint8Array, host: DeviceHost) {
    this.bytes = Uint8Array.from(bytes)
    this.view = new DataView(this.bytes.buffer)
    this.#host = host
  }

  changed(): void {
    this.#host.configChanged()
  }
}

class AsyncContext<Options> implements DeviceContext<Options> {
  readonly name: string
  readonly options: Options
  readonly log: DeviceLogger
  readonly signal: AbortSignal
  readonly config: ConfigSpace
  readonly queues: readonly DeviceQueue[]
  readonly host: DeviceHost
  features = 0n
  readonly #metrics: AsyncMetrics

  constructor(
    options: Options,
    host: DeviceHost,
    shape: DeviceShape,
    queues: readonly DeviceQueue[],
    metrics: AsyncMetrics
  ) {
    this.name = host.name
    this.options = options
    this.log = host.log
    this.signal = host.signal
    this.config = new AsyncConfigSpace(shape.config, host)
    this.queues = queues
    this.host = host
    this.#metrics = metrics
  }

  /** A property: `create({ metric })` takes the context apart. */
  readonly metric = (name: string, labels: Readonly<Record<string, string | number>> = {}): Metric =>
    this.#metrics.metric(name, labels)
}

export class AsyncDevice implements Device<AsyncQueueData> {
  readonly features: bigint
  readonly numQueues: number
  readonly maxQueueSize: number
  readonly queueData: AsyncQueueData
  readonly qemu?: () => QemuDevice
  readonly saveState?: () => Promise<Uint8Array>
  readonly loadState?: (state: Uint8Array) => Promise<void>
  readonly #shape: DeviceShape
  readonly #context: AsyncContext<unknown>
  readonly #queues: readonly AsyncQueue[]
  readonly #metrics: AsyncMetrics
  readonly #handlers: DeviceHandlers
  readonly #environment: RingEnvironment

  private constructor(
    shape: DeviceShape,
    context: AsyncContext<unknown>,
    queues: readonly AsyncQueue[],
    metrics: AsyncMetrics,
    handlers: DeviceHandlers
  ) {
    this.#shape = shape
    this.#context = context
    this.#queues = queues
    this.#metrics = metrics
    this.#handlers = handlers
    this.#environment = {
      handlers,
      names: shape,
      latecomers: new Latecomers(shape.timeoutMs),
      lateFailures: new LateFailures(context.log),
    }
    this.features = shape.features
    this.numQueues = queues.length
    this.maxQueueSize = shape.maxQueueSize
    const { qemu } = shape
    if (qemu !== undefined) this.qemu = () => qemu
    // A device without them has no state, and the daemon wants to know that.
    if (handlers.saveState !== undefined) {
      this.saveState = () => this.#saveState()
      this.loadState = (state) => this.#loadState(state)
    }
    this.queueData = { device: ++lastId }
    devices.set(lastId, this)
  }

  /** Makes the device. @throws what the module's `create` throws, or TypeError when it returns no handlers */
  static async create<Options>(
    shape: DeviceShape,
    options: Options,
    host: DeviceHost,
    create: (context: DeviceContext<Options>) => DeviceHandlers | Promise<DeviceHandlers>
  ): Promise<AsyncDevice> {
    const queues = shape.queues.map(
      ({ name, kind }, index) => new AsyncQueue(index, name, kind === 'buffers', host.signal)
    )
    const metrics = new AsyncMetrics(shape.metrics)
    const context = new AsyncContext(options, host, shape, queues, metrics)
    const handlers = await create(context)
    checkHandlers(shape, handlers)
    return new AsyncDevice(shape, context, queues, metrics, handlers)
  }

  /** @throws DeviceError when the device with that number is not on this thread */
  static of({ device: id }: AsyncQueueData): AsyncDevice {
    const device = devices.get(id)
    if (device !== undefined) return device
    const message = `there is no device ${id} on this thread: both halves of an async device belong on one`
    throw new DeviceError('ERR_DEVICE_THREAD', message)
  }

  ring(context: QueueContext): QueueHandler | ReceiveHandler {
    const queue = this.#queues[context.queueIndex]!
    if (queue.buffers) return new BufferRing(context, queue, this.#environment)
    const Ring = this.#handlers.discard === undefined ? RequestRing : DiscardingRing
    return new Ring(context, queue, this.#environment)
  }

  config(): Uint8Array {
    return this.#context.config.bytes.slice()
  }

  writeConfig(offset: number, bytes: Uint8Array): boolean | Promise<boolean> {
    return this.#handlers.writeConfig?.(offset, bytes) ?? false
  }

  negotiated(features: bigint): void {
    this.#context.features = features
    this.#handlers.negotiated?.(features)
  }

  reset(): void {
    this.#context.features = 0n
    this.#handlers.reset?.()
  }

  ringActive(queueIndex: number, active: boolean): void {
    const queue = this.#queues[queueIndex]!
    queue.active = active
    this.#handlers.queueActive?.(queue, active)
  }

  samples(): DeviceSample[] {
    return this.#metrics.samples()
  }

  /** The module tells the driver itself (`config.changed`) when there is something to tell. */
  async refresh(): Promise<boolean> {
    await this.#handlers.refresh?.()
    return false
  }

  async close(): Promise<void> {
    devices.delete(this.queueData.device)
    await this.#handlers.close?.()
  }

  async #saveState(): Promise<Uint8Array> {
    const state = await this.#handlers.saveState!()
    const text = JSON.stringify(state) as string | undefined
    if (text === undefined)
      throw new TypeError(`saveState of ${this.#shape.name} returned ${typeof state}, which JSON does not have`)
    return new TextEncoder().encode(text)
  }

  async #loadState(bytes: Uint8Array): Promise<void> {
    // The other side was a version that had no state.
    if (bytes.length === 0) return
    let state: unknown
    try {
      state = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes))
    } catch (cause) {
      throw new Error(`${bytes.length} bytes that are no state of ${this.#shape.name}: they are not JSON`, { cause })
    }
    await this.#handlers.loadState!(state)
  }
}

/**
 * The short way to write a device: one object with async handlers. It is a {@link DeviceDefinition} like any other, in
 * event-loop mode; both halves run on the same thread and share what `create` returned. Here is nothing that a stranger
 * could not write on the contract himself.
 */
import type { GenericSchema, InferOutput } from 'valibot'
import type { DeviceDefinition, DeviceHost, DeviceLogger, DeviceMetric, QemuDevice } from './index.ts'

/** What a device module passes to {@link defineDevice}. */
export interface DeviceDescription<Options = unknown> {
  /** The version of the contract that the module is written for: 1. */
  readonly apiVersion: 1
  /** Lower-case letters and digits: the default of the device's name, and the prefix of its metrics (`virtiod_<name>_…`). */
  readonly name: string
  /** The device id of virtio 1.3 §5: 1 net, 2 block, 4 entropy, 8 SCSI, 18 input, 19 vsock, … 1 … 65535. */
  readonly virtioId: number
  /** A valibot `strictObject`; its keys are the names for `--option`. Unset: the device has no options. */
  readonly options?: GenericSchema<unknown, Options>
  /** The virtqueues in the order of the specification, 1 … 256. */
  readonly queues: readonly QueueDescription[] | ((options: Options) => readonly QueueDescription[])
  /** Device-specific feature bits, see {@link featureSet}. Unset: none. */
  readonly features?: bigint | ((options: Options) => bigint)
  /** The config space at the start, at most 256 bytes; its length is fixed. Unset: there is none. */
  readonly config?: Uint8Array | ((options: Options) => Uint8Array)
  /** The largest ring that a driver may set up: a power of two, 2 … 32768 (the default). */
  readonly maxQueueSize?: number
  /** What a request can be, for counters and latency histograms; see {@link DeviceChain.operation}. The default: `request`. */
  readonly operations?: readonly string[]
  /** What can go wrong with a request, for counters; see {@link DeviceChain.error}. The default: `error`. */
  readonly errors?: readonly string[]
  /** Metrics beside those that every device has; see {@link DeviceContext.metric}. */
  readonly metrics?: readonly DeviceMetric[]
  /** How long a chain may be in work, in milliseconds; 0 = for ever. The default is 30 000. */
  readonly timeoutMs?: number
  /** How to attach it to QEMU, for `virtiod qemu-args`. */
  readonly qemu?: QemuDevice | ((options: Options) => QemuDevice)
  /**
   * Makes the device, once: it stays over any number of drivers. @throws ConfigError naming the option and the fix;
   * anything else is the module's own failure. Either keeps the daemon from starting.
   */
  create(context: DeviceContext<Options>): DeviceHandlers | Promise<DeviceHandlers>
}

export interface QueueDescription {
  readonly name: string
  /**
   * `requests` (the default): each chain goes to {@link DeviceHandlers.handle}. `buffers`: chains wait in the ring until
   * the device has something to put into them and takes one ({@link DeviceQueue.take}): received packets, events.
   */
  readonly kind?: 'requests' | 'buffers'
}

/** What `create` returns. A method that throws or rejects ends the session of the present driver, and names file and line. */
export interface DeviceHandlers {
  /**
   * A chain of a `requests` queue. It goes back to the driver when the promise resolves (or the function returns),
   * with what was written by then. Many may be in work at once, as many as the ring holds.
   */
  handle?(chain: DeviceChain, queue: DeviceQueue): void | Promise<void>
  /** A chain of a `requests` queue whose ring is disabled, as {@link QueueHandler.discard} has it; a network card needs it. */
  discard?(chain: DeviceChain, queue: DeviceQueue): void
  /**
   * The driver writes to the config space. Returns false to refuse it; otherwise it changes {@link DeviceContext.config} itself,
   * before the driver's next look. Without it every write is refused.
   */
  writeConfig?(offset: number, bytes: Uint8Array): boolean | Promise<boolean>
  /** A driver took the device over with these features. May come again with the same. */
  negotiated?(features: bigint): void
  /** A ring was started and enabled, or is so no longer. */
  queueActive?(queue: DeviceQueue, active: boolean): void
  /** The driver is gone, or resets the device. All queues are stopped. */
  reset?(): void
  /** For migration, handover and reload: what a successor needs to go on, as something that JSON can hold. No chain is in work. */
  saveState?(): unknown
  /** Takes over what `saveState` returned, of this or another version: check it. @throws an Error to refuse it */
  loadState?(state: unknown): void | Promise<void>
  /** SIGHUP: look at the backing store again. */
  refresh?(): void | Promise<void>
  /** The end: release files and sockets. `context.signal` is aborted already; all queues are stopped. */
  close?(): void | Promise<void>
}

/** What a device gets when it is made. */
export interface DeviceContext<Options = unknown> {
  /** The device's name in the configuration, unique in the daemon. */
  readonly name: string
  readonly options: Options
  readonly log: DeviceLogger
  /** Aborted when the device is about to be closed. Timers and fetch take it. */
  readonly signal: AbortSignal
  readonly config: ConfigSpace
  /** In the order of {@link DeviceDescription.queues}. */
  readonly queues: readonly DeviceQueue[]
  /** The negotiated features; 0n without a driver. */
  readonly features: bigint
  /** One of {@link DeviceDescription.metrics}. @throws TypeError when there is none of that name */
  metric(name: string, labels?: Readonly<Record<string, string | number>>): Metric
  /** The rest of what the daemon offers: files, taps, handover. */
  readonly host: DeviceHost
}

/** A counter or a gauge. */
export interface Metric {
  readonly value: number
  add(amount?: number): void
  set(value: number): void
}

/** The device's config space (virtio 1.3 §2.5), little-endian. */
export interface ConfigSpace {
  /** The driver sees changes at once; tell it of them by {@link changed}. */
  readonly bytes: Uint8Array
  readonly view: DataView
  /** Sends the configuration change notification. */
  changed(): void
}

/** One virtqueue as a device sees it. */
export interface DeviceQueue {
  readonly index: number
  readonly name: string
  /** A driver has started it. */
  readonly active: boolean
  /** For `buffers`: the next chain, undefined when the driver has none ready or the ring is not active. Fill it, then {@link DeviceChain.complete} it. */
  take(): DeviceChain | undefined
  /**
   * For `buffers`: the next chain, as soon as there is one, in the order of the calls. It waits over the end of a driver and the
   * beginning of another. Rejects with `signal.reason` when `context.signal` (or `signal`) is aborted.
   */
  next(signal?: AbortSignal): Promise<DeviceChain>
}

/** A chain in work. After it was completed every use of it throws. */
export interface DeviceChain {
  /** Its head, unique among the chains in work of its queue. */
  readonly head: number
  /** The device-readable part, from its start. */
  readonly reader: ChainReader
  /** The device-writable part, from its start. */
  readonly writer: ChainWriter
  /** Which of {@link DeviceDescription.operations} it is counted as, and its payload in bytes. The first one and 0 otherwise. */
  operation(name: string, bytes?: number): void
  /** Counts a failed request. @param kind one of {@link DeviceDescription.errors} */
  error(kind: string): void
  /**
   * Gives it back to the driver now: for `buffers`, or before a handler is through. @param written bytes from the start of
   * the device-writable part that the driver may look at; what {@link ChainWriter.written} says if unset
   */
  complete(written?: number): void
}

/**
 * Reads the device-readable part of a chain, front to back; numbers are little-endian. Whatever it returns is a copy: the guest may
 * change its memory at any time, so read each field once. Reading beyond the end is the guest's fault (its request is too
 * short): it throws a ChainError, and a handler that lets it through breaks that ring, not the session.
 */
export interface ChainReader {
  /** Bytes of the whole part. */
  readonly length: number
  /** Where the next read begins, from 0. */
  readonly position: number
  readonly remaining: number
  /** @throws RangeError when it is not in 0 … length */
  seek(position: number): this
  skip(count: number): this
  u8(): number
  u16(): number
  u32(): number
  u64(): bigint
  /** A copy. Unset: all that remains. */
  bytes(count?: number): Uint8Array<ArrayBuffer>
  /** Copies as much as remains and fits. Returns how many bytes. */
  into(target: Uint8Array): number
}

/**
 * Writes the device-writable part of a chain, front to back; numbers are little-endian. Writing beyond the end throws a
 * RangeError that names the chain; nothing of that write is done.
 */
export interface ChainWriter {
  /** Bytes of the whole part. */
  readonly length: number
  /** Where the next write begins, from 0. */
  readonly position: number
  readonly remaining: number
  /** The end of the farthest write: what the driver is told, unless `complete` says otherwise. */
  readonly written: number
  /** @throws RangeError when it is not in 0 … length */
  seek(position: number): this
  u8(value: number): this
  u16(value: number): this
  u32(value: number): this
  u64(value: bigint): this
  bytes(source: Uint8Array): this
  /** `count` times `value` (0). */
  fill(count: number, value?: number): this
}

/**
 * Makes the default export of a device module out of a description.
 * @throws TypeError naming the field that is wrong and what was expected
 */
export function defineDevice<Schema extends GenericSchema = GenericSchema<unknown, Record<string, never>>>(
  description: DeviceDescription<InferOutput<Schema>> & { readonly options?: Schema }
): DeviceDefinition {
  throw new Error(`${description.name}: not written yet`)
}

/**
 * The short way to write a device: one object with async handlers. It is a {@link DeviceDefinition} like any other, in
 * event-loop mode; both halves run on the same thread and share what `create` returned. Here is nothing that a stranger
 * could not write on the contract himself.
 *
 * ```ts
 * import { defineDevice } from 'virtiod/device'
 *
 * export default defineDevice({
 *   apiVersion: 1,
 *   name: 'dice',
 *   virtioId: 4,
 *   queues: [{ name: 'requests' }],
 *   create: () => ({
 *     async handle(chain) {
 *       const response = await fetch('http://dice.example/roll')
 *       const bytes = await response.bytes()
 *       chain.writer.bytes(bytes.subarray(0, chain.writer.remaining))
 *     },
 *   }),
 * })
 * ```
 */
import { type GenericSchema, type InferOutput, strictObject } from 'valibot'
import { VIRTQ_MAX_SIZE } from '../virtio/constants.ts'
import { checkDescription, type DeviceShape, resolveField } from './async-description.ts'
import { AsyncDevice, type AsyncQueueData } from './async-device.ts'
import type { DeviceDefinition, DeviceHost, DeviceLogger, DeviceMetric, QemuDevice } from './index.ts'

/** Of `timeoutMs`, in both styles. */
export const DEFAULT_TIMEOUT_MS = 30_000

/**
 * What a device module passes to {@link defineDevice}. `queues`, `features`, `config` and `qemu` may be functions of
 * the options, which are asked when the device is opened.
 */
export interface DeviceDescription<Options = unknown> {
  /** The version of the contract that the module is written for: 1. */
  readonly apiVersion: 1
  /**
   * Lower-case letters and digits: the default of the device's name, and the prefix of its metrics
   * (`virtiod_<name>_…`).
   */
  readonly name: string
  /** The device id of virtio 1.3 §5: 1 net, 2 block, 4 entropy, 8 SCSI, 18 input, 19 vsock, … 1 … 65535. */
  readonly virtioId: number
  /** A valibot `strictObject`; its keys are the names for `--option`. Unset: the device has no options. */
  readonly options?: GenericSchema<unknown, Options>
  /** The virtqueues in the order of the specification, 1 … 256. */
  readonly queues: readonly QueueDescription[] | ((options: Options) => readonly QueueDescription[])
  /**
   * Device-specific feature bits, 0 … 23 and 50 … 63, see {@link featureSet}. Those of rings and transport are the
   * engine's. Unset: none.
   */
  readonly features?: bigint | ((options: Options) => bigint)
  /** The config space at the start, at most 256 bytes; its length is fixed. Unset: there is none. */
  readonly config?: Uint8Array | ((options: Options) => Uint8Array)
  /** The largest ring that a driver may set up: a power of two, 2 … 32768 (the default). */
  readonly maxQueueSize?: number
  /**
   * What a request can be, 1 … 8 names for counters and latency histograms; see {@link DeviceChain.operation}. The
   * default: `request`.
   */
  readonly operations?: readonly string[]
  /**
   * What can go wrong with a request, at most 16 names for counters; see {@link DeviceChain.error}. The default:
   * `error`.
   */
  readonly errors?: readonly string[]
  /** Metrics beside those that every device has; see {@link DeviceContext.metric}. */
  readonly metrics?: readonly DeviceMetric[]
  /**
   * How long a chain may be in work, in milliseconds; 0 = for ever. The default is 30 000. One that takes longer ends
   * the session (ERR_DEVICE_STUCK). Chains of `buffers` queues that nobody has taken are not in work.
   */
  readonly timeoutMs?: number
  /** How to attach it to QEMU, for `virtiod qemu-args`. Unset: that command has no lines for it. */
  readonly qemu?: QemuDevice | ((options: Options) => QemuDevice)
  /**
   * Makes the device: it stays over any number of drivers. @throws ConfigError naming the option and the fix; anything
   * else is the module's own failure. Either keeps the daemon from starting.
   */
  create(context: DeviceContext<Options>): DeviceHandlers | Promise<DeviceHandlers>
}

/** One virtqueue of a {@link DeviceDescription}. */
export interface QueueDescription {
  /** For messages, and as {@link DeviceQueue.name}. */
  readonly name: string
  /**
   * `requests` (the default): each chain goes to {@link DeviceHandlers.handle}. `buffers`: chains wait in the ring
   * until the device has something to put into them and takes one ({@link DeviceQueue.take}): received packets, events.
   */
  readonly kind?: 'requests' | 'buffers'
}

/**
 * What `create` returns: an object of these methods, which are called on it. One that throws or rejects ends the
 * session of the present driver, and the log names file and line; after a {@link ChainError} only the ring of that
 * request is broken.
 */
export interface DeviceHandlers {
  /**
   * A chain of a `requests` queue. It goes back to the driver when the promise resolves (or the function returns), with
   * what was written by then. Many may be in work at once, as many as the ring holds, and they may end in any order.
   * Needed when there is such a queue.
   *
   * A driver may go in the middle. Then the handler runs to its end, without effect on anybody's memory (see {@link
   * DeviceChain}), and requests of the next driver wait for that, at most `timeoutMs`: otherwise an old write could
   * overtake a newer one.
   */
  handle?(chain: DeviceChain, queue: DeviceQueue): void | Promise<void>
  /**
   * A chain of a `requests` queue whose ring is disabled, which is given back when this returns; a network card needs
   * it (vhost-user.rst "Ring states"). Without it the chains wait until the ring is enabled.
   */
  discard?(chain: DeviceChain, queue: DeviceQueue): void
  /**
   * The driver writes to the config space, inside of it. Returns false to refuse it; otherwise it changes {@link
   * DeviceContext.config} itself, before the driver's next look. It may take as long as a chain. Without it every write
   * is refused.
   */
  writeConfig?(offset: number, bytes: Uint8Array): boolean | Promise<boolean>
  /**
   * A driver took the device over with these features, VIRTIO_F_VERSION_1 and those of rings among them. May come
   * again.
   */
  negotiated?(features: bigint): void
  /** {@link DeviceQueue.active} of one of the queues has changed. */
  queueActive?(queue: DeviceQueue, active: boolean): void
  /** The driver is gone, or resets the device. All queues are stopped. */
  reset?(): void
  /**
   * For migration, handover and reload: what a successor needs to go on, as something that JSON can hold, or a promise
   * of it. No chain is in work. Together with `loadState`.
   */
  saveState?(): unknown
  /**
   * Takes over what `saveState` returned, of this or another version: check it. Not called when the other version had
   * no state. @throws an Error to refuse it
   */
  loadState?(state: unknown): void | Promise<void>
  /** SIGHUP: look at the backing store again; say {@link ConfigSpace.changed} when the driver is to look again too. */
  refresh?(): void | Promise<void>
  /** The end: release files and sockets. `context.signal` is aborted already; all queues are stopped. */
  close?(): void | Promise<void>
}

/** What a device gets when it is made. */
export interface DeviceContext<Options = unknown> {
  /** The device's name in the configuration, unique in the daemon. */
  readonly name: string
  /** As the schema has them: checked, defaults filled in. */
  readonly options: Options
  /** The daemon's log. A guest must not be able to cause a line per request. */
  readonly log: DeviceLogger
  /** Aborted when the device is about to be closed. Timers and fetch take it. */
  readonly signal: AbortSignal
  /** Empty when the description has none. */
  readonly config: ConfigSpace
  /** In the order of {@link DeviceDescription.queues}. */
  readonly queues: readonly DeviceQueue[]
  /** The negotiated features; 0n without a driver. */
  readonly features: bigint
  /**
   * The value of one of {@link DeviceDescription.metrics} for these labels, 0 at first. Always the same object for the
   * same labels: ask once, not per request. @throws TypeError when there is no metric of that name, or it has other
   * labels
   */
  metric(name: string, labels?: Readonly<Record<string, string | number>>): Metric
  /** The rest of what the daemon offers: what kind of file an fd is, locks, taps, handover. */
  readonly host: DeviceHost
}

/**
 * A counter or a gauge. Both methods throw a RangeError for what is no finite number, and when a counter would go down.
 */
export interface Metric {
  readonly value: number
  /** By 1 unless told otherwise. */
  add(amount?: number): void
  set(value: number): void
}

/** The device's config space (virtio 1.3 §2.5), little-endian. */
export interface ConfigSpace {
  /** Of fixed length. A driver that looks sees changes at once; tell it to look by {@link changed}. */
  readonly bytes: Uint8Array
  /** Of the same bytes; methods take `true` for little-endian. */
  readonly view: DataView
  /** Sends the configuration change notification. Nothing happens without a driver that can hear it. */
  changed(): void
}

/** One virtqueue as a device sees it, as long as the device lives. */
export interface DeviceQueue {
  /** From 0. */
  readonly index: number
  readonly name: string
  /** A driver has started and enabled its ring. */
  readonly active: boolean
  /**
   * For `buffers`: the next chain, undefined when the driver has none ready or the ring is not active. Fill it, then
   * {@link DeviceChain.complete} it: until then the ring can't be stopped in good order. @throws TypeError for another
   * kind of queue
   */
  take(): DeviceChain | undefined
  /**
   * For `buffers`: the next chain, as soon as there is one, in the order of the calls. It waits over the end of a
   * driver and the beginning of another, and holds no chain while it waits. Rejects with `signal.reason` when
   * `context.signal` (or `signal`) is aborted, and with a TypeError for another kind of queue.
   */
  next(signal?: AbortSignal): Promise<DeviceChain>
}

/**
 * A chain in work. After it was completed every use of it and of its reader and writer throws
 * ERR_DEVICE_COMPLETED_TWICE.
 *
 * It may be taken away: the session ends while a handler is at work on it. From then on what is written to it, counted
 * or completed has no effect, and reading throws ERR_DEVICE_CHAIN_GONE. A handler that lets that through is just over.
 */
export interface DeviceChain {
  /** Its head, unique among the chains in work of its queue. */
  readonly head: number
  /** The device-readable part, from its start. */
  readonly reader: ChainReader
  /** The device-writable part, from its start. */
  readonly writer: ChainWriter
  /**
   * Which of {@link DeviceDescription.operations} it is counted as when it is completed, and its payload in bytes.
   * Without it a request counts as the first one with 0 bytes, and a chain of a `buffers` queue does not count.
   * @throws TypeError when there is no operation of that name; RangeError for what is no number of bytes
   */
  operation(name: string, bytes?: number): void
  /**
   * Counts a failed request. @param kind one of {@link DeviceDescription.errors}
   * @throws TypeError when there is none of that name
   */
  error(kind: string): void
  /**
   * Gives it back to the driver now: for `buffers`, or before a handler is through. @param written bytes from the start
   * of the device-writable part that the driver may look at; what {@link ChainWriter.written} says if unset
   * @throws DeviceError ERR_DEVICE_COMPLETED_TWICE; ERR_DEVICE_OVERRUN when the part has fewer bytes
   */
  complete(written?: number): void
}

/**
 * Reads the device-readable part of a chain, front to back; numbers are little-endian and have no sign. Descriptors
 * don't matter: the part is one run of bytes. Whatever is returned is a copy: the guest may change its memory at any
 * time, so read each field once. Reading beyond the end is the guest's fault (its request is too short): it throws a
 * {@link ChainError}, and a handler that lets it through breaks that ring, not the session. The position stays as it
 * was then.
 */
export interface ChainReader {
  /** Bytes of the whole part. */
  readonly length: number
  /** Where the next read begins, from 0. */
  readonly position: number
  readonly remaining: number
  /** @throws RangeError when it is not in 0 … length */
  seek(position: number): this
  /** @throws ChainError when less remains */
  skip(count: number): this
  /** @throws ChainError when less remains, as all that follow */
  u8(): number
  u16(): number
  u32(): number
  u64(): bigint
  /**
   * A copy. Unset: all that remains, if that is at most 16 MiB; more is the guest's fault. With a count it may be up to 4 GiB, if
   * the guest wants it so: look at `remaining` before.
   */
  bytes(count?: number): Uint8Array<ArrayBuffer>
  /** Copies as much as remains and fits. Returns how many bytes. Never throws for the end. */
  into(target: Uint8Array): number
}

/**
 * Writes the device-writable part of a chain, front to back; numbers are little-endian. Writing beyond the end throws a
 * {@link DeviceError} ERR_DEVICE_OVERRUN that names the chain: how much room there is is the driver's choice, so look
 * at `remaining`. A number that does not fit its field is a RangeError. Nothing of a write that throws is done.
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
  /** 0 … 255. */
  u8(value: number): this
  /** 0 … 65535. */
  u16(value: number): this
  /** 0 … 2^32 - 1. */
  u32(value: number): this
  /** 0n … 2n ** 64n - 1n. */
  u64(value: bigint): this
  bytes(source: Uint8Array): this
  /** `count` times the byte `value` (0). */
  fill(count: number, value?: number): this
}

/**
 * Makes the default export of a device module out of a {@link DeviceDescription}.
 * @throws TypeError naming the field that is wrong, what was expected and what was found
 * @throws DeviceError ERR_DEVICE_API_VERSION when the module is written for another version of the contract
 */
export function defineDevice<Schema extends GenericSchema = GenericSchema<unknown, Record<string, never>>>(
  description: DeviceDescription<InferOutput<Schema>> & { readonly options?: Schema }
): DeviceDefinition<InferOutput<Schema>> {
  checkDescription(description)
  const { name, timeoutMs = DEFAULT_TIMEOUT_MS, metrics = [] } = description
  const { operations = ['request'], errors = ['error'], maxQueueSize = VIRTQ_MAX_SIZE } = description
  return {
    apiVersion: description.apiVersion,
    name,
    virtioId: description.virtioId,
    options: description.options ?? strictObject({}),
    operations,
    errors,
    metrics,
    timeoutMs,
    eventLoop: true,
    ...(description.qemu !== undefined && {
      qemu: (options) => resolveField(name, 'qemu', description.qemu, options)!,
    }),
    async open(options, host) {
      const shape: DeviceShape = {
        name,
        queues: resolveField(name, 'queues', description.queues, options)!,
        features: resolveField(name, 'features', description.features, options) ?? 0n,
        config: resolveField(name, 'config', description.config, options) ?? new Uint8Array(0),
        maxQueueSize,
        operations,
        errors,
        metrics,
        timeoutMs,
        qemu: resolveField(name, 'qemu', description.qemu, options),
      }
      return await AsyncDevice.create(shape, options, host, (context) => description.create(context))
    },
    createQueueHandler: (context, data) => AsyncDevice.of(data as AsyncQueueData).ring(context),
  }
}

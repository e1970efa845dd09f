/**
 * The device contract: all that a device module imports, in-tree or a stranger's. There are two styles on one engine.
 *
 * The short one is {@link defineDevice}: one object with async handlers on a thread of its own, where promises, timers
 * and any npm library work. The fast one is what it is made of, and what blk and net are. There a device has two
 * halves.
 *
 * - The *control half* ({@link DeviceDefinition}, {@link Device}): options, features, config space, opening of files.
 * That of a device of virtiod's own lives on the control thread, that of a module on the first thread of its own.
 * - The *queue half* ({@link QueueHandler}) lives on an iothread, one handler per virtqueue: it takes chains and
 * completes them. The two share no objects, only what `queueData` carries (numbers, SharedArrayBuffers).
 *
 * The engine owns what surrounds a request: popping, notification suppression, publishing, calls, in-flight accounting,
 * broken rings. A handler sees a valid chain and answers it with {@link QueueContext.complete}.
 */
import type { GenericSchema } from 'valibot'
import type { Chain } from '../virtio/chain.ts'
import type { NetworkHost } from './network.ts'
import type { CopyBatch, PacketReceiver, PacketSender } from './packets.ts'

export type { Chain } from '../virtio/chain.ts'
export { VIRTIO_F_VERSION_1 } from '../virtio/constants.ts'
export { featureSet, hasFeature } from '../virtio/features.ts'
export {
  type ChainReader,
  type ChainWriter,
  type ConfigSpace,
  type DeviceChain,
  type DeviceContext,
  type DeviceDescription,
  type DeviceHandlers,
  type DeviceQueue,
  defineDevice,
  type Metric,
  type QueueDescription,
} from './define.ts'
export { ChainError, ConfigError, DeviceError } from './errors.ts'
export type { LinkInfo, NetworkHost, TapInfo } from './network.ts'
export type { CopyBatch, PacketReceiver, PacketSender } from './packets.ts'

/** The version of this contract. A module that was written for another one is refused when it is loaded. */
export const API_VERSION = 1

/** The part of pino's logger that a device may use. A guest must not be able to trigger one per request. */
export interface DeviceLogger {
  debug(details: object, message: string): void
  info(details: object, message: string): void
  warn(details: object, message: string): void
  error(details: object, message: string): void
}

/** What the default export of a device module is. */
export interface DeviceDefinition<Options = unknown, QueueData = unknown> {
  readonly apiVersion: typeof API_VERSION
  /**
   * The `type` in configuration files and the `virtiod_<name>_…` prefix of its metrics: lower-case letters and
   * digits.
   */
  readonly name: string
  /** The device id of virtio 1.3 §5. */
  readonly virtioId: number
  /** A valibot `strictObject`; its keys are the option names of the command line and of the configuration file. */
  readonly options: GenericSchema<unknown, Options>
  /**
   * What a request can be, for counters and latency histograms: `complete` takes an index into this list. At most 8.
   */
  readonly operations: readonly string[]
  /** What can go wrong with a request: `countError` takes an index into this list. At most 16. */
  readonly errors: readonly string[]
  /**
   * The module of the queue half: `new URL('./queue.ts', import.meta.url)`. Its export `createQueueHandler` is a
   * {@link CreateQueueHandler}. Unset: the queue half is in this file, as {@link createQueueHandler}.
   */
  readonly queueModule?: URL
  /** The queue half, when it has no module of its own. */
  readonly createQueueHandler?: CreateQueueHandler<QueueData>
  /**
   * Its handlers need promises, timers or npm libraries: the device gets one iothread of its own, in event-loop mode,
   * for both halves, which then may share objects. Otherwise the thread sleeps in the kernel between batches, and
   * nothing but completions and messages wakes it.
   */
  readonly eventLoop?: boolean
  /**
   * For a device on threads of its own: a chain that is in flight for longer than this ends the session
   * (ERR_DEVICE_STUCK). In milliseconds, 0 = never; the default is 30 000.
   */
  readonly timeoutMs?: number
  /** Metrics beside those that every device has, see {@link Device.samples}. */
  readonly metrics?: readonly DeviceMetric[]
  /**
   * As {@link Device.qemu}, when it can be told without opening anything: `virtiod qemu-args` works beside a running
   * daemon, which has the device's files, sockets and ports already.
   */
  qemu?(options: Options): QemuDevice
  /**
   * Opens what the options name. Nothing is served yet.
   * @throws ConfigError naming the option and the fix: the daemon exits with 2 before it binds a socket.
   */
  open(options: Options, host: DeviceHost): Promise<Device<QueueData>> | Device<QueueData>
}

/** A metric of one kind of device; its full name is `virtiod_<device name>_<name>`. */
export interface DeviceMetric {
  readonly name: string
  readonly type: 'counter' | 'gauge'
  /** Beside `device`, which every sample has. */
  readonly labels: readonly string[]
  readonly help: string
}

/** The value of a {@link DeviceMetric} now. */
export interface DeviceSample {
  /** `DeviceMetric.name` */
  readonly metric: string
  /** One for each of `DeviceMetric.labels`. */
  readonly labels: Readonly<Record<string, string | number>>
  readonly value: number
}

/**
 * The control half of one device of a running daemon. It lives from start to shutdown, over any number of sessions.
 * What a method throws or rejects with ends the session, or the step (a migration, a handover, the start) that it was
 * called for.
 */
export interface Device<QueueData = unknown> {
  /** Device-specific feature bits (virtio 1.3 §5); the engine adds those of rings and transport. */
  readonly features: bigint
  /** How many virtqueues it can serve (1 … 256). */
  readonly numQueues: number
  /** The largest ring that a driver may set up: a power of two, 2 … 32768 (the default). */
  readonly maxQueueSize?: number
  /**
   * Structured-cloneable; read when a ring starts and handed to `createQueueHandler` on the iothread. Fds in it stay
   * owned by the device.
   */
  readonly queueData: QueueData
  /**
   * Queues of all devices of the daemon that give the same group are served by one iothread, so that their handlers can
   * share objects. Unset: the queues are spread over the iothreads.
   */
  readonly iothreadGroup?: string
  /** What vhost-user has for network cards only; the protocol features are offered when it is there. */
  readonly network?: NetworkRequests
  /** The whole config space (at most 256 bytes), little-endian as virtio 1.3 §2.5.3 says. Read at every GET_CONFIG. */
  config(): Uint8Array
  /** SET_CONFIG. Returns false to refuse the write (the front-end gets a NACK); nothing may have changed then. */
  writeConfig(offset: number, bytes: Uint8Array): boolean | Promise<boolean>
  /**
   * A driver took the device over with these features (all virtio and device bits). Called again at each
   * SET_FEATURES.
   */
  negotiated?(features: bigint): void
  /** The session ended or RESET_DEVICE came: back to the state after `open`. All queues are stopped. */
  reset?(): void
  /**
   * What a migration or a handover to a new version carries over, beside memory and rings. All queues are stopped.
   * Without it the device has no state. Together with `loadState`.
   */
  saveState?(): Uint8Array | Promise<Uint8Array>
  /**
   * Takes over what `saveState` of the same device elsewhere returned. @throws an Error when it can't: the migration
   * fails
   */
  loadState?(state: Uint8Array): void | Promise<void>
  /**
   * Handover, in the process that is replaced: all queues are stopped; whatever the successor will write (a capture
   * file) is finished. Either `takeBack` comes next, or nothing but the end of the process: not even `close`.
   */
  letGo?(): void | Promise<void>
  /** The handover failed: the device goes on. Queues start after it. */
  takeBack?(): void | Promise<void>
  /**
   * Handover, in the new process: the predecessor has let go for good. Until then nothing that was kept for this
   * device (`DeviceHost.handover`) may be changed: the predecessor serves with it, and may have to go on.
   */
  takeOver?(): void | Promise<void>
  /** A ring was started and enabled, or is so no longer. */
  ringActive?(queueIndex: number, active: boolean): void
  /** A handler said something, by `QueueContext.report`. */
  reported?(queueIndex: number, message: unknown): void
  /** Values for `DeviceDefinition.metrics`, when somebody asks for metrics. */
  samples?(): Iterable<DeviceSample>
  /** SIGHUP: look at the backing store again. Returns true when the config space changed, and the driver is told. */
  refresh?(): boolean | Promise<boolean>
  /**
   * Lines of QEMU's command line beside chardev and memory, e.g. `vhost-user-blk-pci,num-queues=4`; see {@link
   * QemuDevice}.
   */
  qemu?(): QemuDevice
  /** Releases files. All queues are stopped. */
  close(): void | Promise<void>
}

/** vhost-user.rst "SEND_RARP" and "NET_SET_MTU". */
export interface NetworkRequests {
  /** NET_SET_MTU. Returns false to refuse it. */
  setMtu(mtu: number): boolean | Promise<boolean>
  /** SEND_RARP: the guest with this MAC (6 bytes) has moved here and can't announce itself. */
  announce(mac: Uint8Array): void
}

/** How to attach the device to QEMU. */
export interface QemuDevice {
  /** `vhost-user-blk-pci` */
  readonly driver: string
  /** Further properties of `-device`, in order. */
  readonly properties: Readonly<Record<string, string | number>>
  /** A network card hangs on a `-netdev vhost-user` with these properties, and that on the chardev. */
  readonly netdev?: Readonly<Record<string, string | number>>
}

/** What the daemon offers to a device's control half, from `open` on. */
export interface DeviceHost {
  readonly log: DeviceLogger
  /** The device's name in the configuration, unique in the daemon: `net0`. */
  readonly name: string
  /** Aborted when the device is about to be closed: what waits for something should stop to. */
  readonly signal: AbortSignal
  /**
   * Devices of one daemon have the same: a key for what they share. A device on a thread of its own shares with nobody.
   */
  readonly daemon: object
  readonly network: NetworkHost
  /** Hands a structured-cloneable message to the queue's handler (`message`); lost when its ring is not started. */
  send(queueIndex: number, message: unknown): void
  /** What kind of file an fd is, and its geometry. @throws a system error */
  fileInfo(fd: number): FileInfo
  /**
   * Takes an open-file-description lock on the whole file. Returns false when another process holds a conflicting
   * one.
   */
  lockFile(fd: number, exclusive: boolean): boolean
  /** fallocate(2): 0 or -errno. It blocks: for probing at start only. */
  fallocate(fd: number, mode: number, offset: number, length: number): number
  /** The config space changed by itself: tell the driver (VHOST_USER_BACKEND_CONFIG_CHANGE_MSG). */
  configChanged(): void
  readonly handover: HandoverFiles
}

/** Open files that outlive the process, when a new one takes over the guests of this one. */
export interface HandoverFiles {
  /**
   * Promises open files to a successor. Locks of open file descriptions and attached taps go along with them.
   * @param key unique in the daemon; the same in the successor
   * @param fds stay the caller's, open until `forget`
   * @param facts what the successor can't find out, as JSON
   */
  keep(key: string, fds: readonly number[], facts: unknown): void
  /** Before the fds are closed. */
  forget(key: string): void
  /**
   * What the predecessor kept under `key`, once; the fds are the caller's now. Undefined: there is no predecessor, or
   * it kept nothing of that key.
   */
  take(key: string): InheritedFiles | undefined
}

export interface InheritedFiles {
  readonly fds: readonly number[]
  /** Written by this or another version: to be checked. */
  readonly facts: unknown
}

export interface FileInfo {
  readonly kind: 'file' | 'block' | 'other'
  /** Bytes. */
  readonly size: number
  /** Logical block size in bytes (512 for a file). */
  readonly blockSize: number
  /** What O_DIRECT demands of buffer addresses and of offsets and lengths, in bytes; 0 = unknown or not possible. */
  readonly directMemoryAlign: number
  readonly directOffsetAlign: number
}

// ------------------------------------------------------------------------------------------------ the queue half

/** Makes the handler of one virtqueue when its ring starts. */
export type CreateQueueHandler<QueueData = unknown> = (
  context: QueueContext,
  data: QueueData
) => QueueHandler | ReceiveHandler

/** What both kinds of handlers may have. */
interface CommonHandler {
  /** A message from the control half, by `DeviceHost.send`. */
  message?(message: unknown): void
  /** An fd that `DeviceIo.watch` watches became readable. Edge-triggered: read until it is empty. */
  readable?(fd: number): void
  /** The ring stopped; nothing is in flight. Frees what `createQueueHandler` took. */
  close?(): void
}

/**
 * One virtqueue whose chains are requests: it has `handle` or `handleBatch`. Methods must not throw (that ends the
 * session), block or allocate per request.
 */
export interface QueueHandler extends CommonHandler {
  /**
   * Takes a chain that the driver made available. The handler must `complete` it exactly once, now or later. The
   * chain's structure is checked; its contents are the guest's and may change while they are read: read each field
   * once.
   */
  handle?(chain: Chain): void
  /**
   * Takes `count` chains at once instead of one by `handle`, so that one native call can serve them all. The array is
   * used again after it returns.
   */
  handleBatch?(chains: readonly Chain[], count: number): void
  /**
   * The I/O operation that this handler submitted for `chain` ended: `result` bytes, or -errno. -EAGAIN and -EINTR
   * say that nothing was done: submit it again.
   */
  completed?(chain: Chain, result: number): void
  /**
   * Takes the chains instead of `handle` while the ring is disabled: a network card's transmit queue has to discard
   * them (vhost-user.rst "Ring states"). Without it the chains wait.
   */
  discard?(chain: Chain): void
}

/**
 * One virtqueue whose chains are buffers for what comes in from outside: it takes chains when it needs them
 * (`QueueContext.take`) instead of getting them. Same rules.
 */
export interface ReceiveHandler extends CommonHandler {
  /**
   * Moves what came in into chains. Called in each round of the iothread while the ring is active; it has to return at
   * once when there is nothing. Returns how much it did, 0 = nothing: when all do nothing, the thread may sleep.
   */
  receive(): number
  /** Something is here for the driver, which has no chain for it: the engine asks to be kicked. */
  readonly waiting: boolean
  /**
   * Gives all chains back that it holds (`QueueContext.untake`): the ring stops, was disabled, or its memory changes; or
   * they are in flight for longer than `DeviceDefinition.timeoutMs`, and what is not given back then is overdue.
   */
  release(): void
}

/** What the engine offers to a handler. It belongs to one virtqueue on one iothread. */
export interface QueueContext {
  readonly queueIndex: number
  readonly queueSize: number
  /** The negotiated features. */
  readonly features: bigint
  readonly io: DeviceIo
  /** The ring is started, enabled, whole and not paused: chains can be taken. */
  readonly active: boolean
  /**
   * For a {@link ReceiveHandler}: the next chain, undefined when there is none. It is in flight until it is completed.
   */
  take(): Chain | undefined
  /** Puts back the chain that was taken last, unused. Chains go back in reverse order. */
  untake(chain: Chain): void
  /**
   * Gives the chain back to the driver without counting it as a request: a {@link complete} of its own accounting.
   * @param written as in `complete`
   */
  give(chain: Chain, written: number): void
  /** Tells the control half (`Device.reported`) a structured-cloneable message. Not on the hot path. */
  report(message: unknown): void
  /**
   * Gives the chain back to the driver.
   * @param written bytes written to the device-writable part, counted from its start (virtio 1.3 §2.7.8.2)
   * @param operation index into `DeviceDefinition.operations`
   * @param bytes payload bytes, for the counters
   */
  complete(chain: Chain, written: number, operation: number, bytes: number): void
  /** Counts a failed request. @param kind index into `DeviceDefinition.errors` */
  countError(kind: number): void
  /**
   * The handler failed outside of a call by the engine: a promise was rejected. As if it had thrown: the session ends,
   * or for a {@link ChainError} the ring is broken. @param chain what it was at work on, if that is known
   */
  fail(error: unknown, chain?: Chain): void
}

/** A file that a handler does I/O on. */
export interface IoFile {
  readonly fd: number
  /** Slot in the ring's fixed-file table, -1 = none. */
  readonly slot: number
  /** It goes through the host's page cache. */
  readonly buffered: boolean
}

/** Memory of the iothread at a fixed address, for bounce buffers and constants. */
export interface IoBuffer {
  readonly bytes: Uint8Array
  readonly address: number
}

/**
 * Asynchronous I/O, batched: operations are submitted with the next io_uring_enter. At most one operation per chain
 * is in flight; its end is reported to `QueueHandler.completed`. A read or write may be short: continue it from
 * there.
 */
export interface DeviceIo {
  /** Registers a file for I/O on this iothread. Equal fds share a registration. */
  openFile(fd: number): IoFile
  closeFile(file: IoFile): void
  /**
   * Watches an fd that can be read: its handler is told of by `readable`. The device keeps it open until `unwatch`
   * or `close` of the handler.
   */
  watch(fd: number): void
  unwatch(fd: number): void
  /** For packets out of chains into an fd that takes one per write (tap). @param capacity packets per batch */
  packetSender(fd: number, capacity: number): PacketSender
  /** For packets from such an fd into chains. @param capacity chains that it holds at most */
  packetReceiver(fd: number, capacity: number): PacketReceiver
  /** For copies between chains and buffers, many per native call. @param capacity pieces per batch */
  copyBatch(capacity: number): CopyBatch
  /**
   * `length` zeroed bytes, page-aligned: allocate at start, not per request. They are there as long as somebody refers
   * to the buffer, so keep it while its address is in use.
   */
  allocate(length: number): IoBuffer
  /** Reads the file from `offset` into bytes [start, start + length) of the chain's device-writable part. */
  read(chain: Chain, file: IoFile, offset: number, start: number, length: number): void
  /**
   * Writes bytes [start, start + length) of the chain's device-readable part to the file. @param dsync RWF_DSYNC:
   * durable when it completes
   */
  write(chain: Chain, file: IoFile, offset: number, start: number, length: number, dsync: boolean): void
  /** Reads into [start, start + length) of a buffer. */
  readBuffer(chain: Chain, file: IoFile, offset: number, buffer: IoBuffer, start: number, length: number): void
  /** Writes [start, start + length) of a buffer. */
  writeBuffer(
    chain: Chain,
    file: IoFile,
    offset: number,
    buffer: IoBuffer,
    start: number,
    length: number,
    dsync: boolean
  ): void
  /** fdatasync. */
  fdatasync(chain: Chain, file: IoFile): void
  /** fallocate(2) with FALLOC_FL_* `mode`. */
  fallocate(chain: Chain, file: IoFile, mode: number, offset: number, length: number): void
}

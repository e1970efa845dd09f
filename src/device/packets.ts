/**
 * Packets and copies, many per native call: what a device asks for by {@link DeviceIo}. Addresses stay in the engine;
 * a device says chains, buffers and byte positions.
 */
import type { Chain } from '../virtio/chain.ts'
import type { IoBuffer } from './index.ts'

/** Packets on their way out to an fd that takes one per write. Used like this: `add` until full, `send`, read the results. */
export interface PacketSender {
  /** Packets added since the last `send`. */
  readonly count: number
  /**
   * Adds a packet: `headerLength` bytes at `headerAt` of a buffer, then the chain's device-readable bytes from `start` to
   * their end. Returns false when it has to be sent first, or (with `count` 0) when the packet is in too many pieces.
   */
  add(header: IoBuffer, headerAt: number, headerLength: number, chain: Chain, start: number): boolean
  /** Adds a packet that lies in a buffer. */
  addBuffer(buffer: IoBuffer, at: number, length: number): boolean
  /** Sends them all in one native call. Returns how many the fd took; `result` has each one's. */
  send(): number
  /** Of packet i of the last `send`: bytes, or -errno. */
  result(index: number): number
}

/**
 * Packets on their way in, straight into chains' device-writable parts. It holds chains, oldest first; a packet takes as
 * many as it needs from the oldest on.
 */
export interface PacketReceiver {
  /** Chains that it holds, and the bytes that they have room for. */
  readonly held: number
  readonly room: number
  /** Adds a chain as the newest. Returns false when it has no place for it. */
  add(chain: Chain): boolean
  /**
   * Reads packets in one native call, each into the next chains, until the fd is empty, the chains hold less than
   * `largest` bytes, or there are `most`. Returns how many. For each of them in turn the caller takes its chains out by
   * `shift`.
   * @param largest bytes that a packet may have; one that is longer would be cut
   * @param mergeable a packet may use several chains; if not, it uses one
   */
  receive(largest: number, mergeable: boolean, most: number): number
  /** Bytes of packet i of the last `receive`. */
  length(index: number): number
  /** Reads one packet into a buffer. Returns its bytes, or -errno. */
  receiveBuffer(buffer: IoBuffer, at: number, length: number): number
  /** Why the last `receive` ended: -errno of the fd (-EAGAIN -11 = it is empty), 0 = chains or `most`. */
  readonly ended: number
  /** Takes the oldest chain out. */
  shift(): Chain
  /** Takes the newest chain out, to be given back to the ring; undefined when there is none. */
  pop(): Chain | undefined
}

/** Copies that run together in one native call: added first, done by `run`. They must not overlap one another. */
export interface CopyBatch {
  /** Bytes [fromStart, fromStart + length) of a chain's device-readable part → [toStart, …) of another's device-writable part. */
  chainToChain(from: Chain, fromStart: number, to: Chain, toStart: number, length: number): void
  chainToBuffer(from: Chain, fromStart: number, to: IoBuffer, at: number, length: number): void
  bufferToChain(from: IoBuffer, at: number, to: Chain, toStart: number, length: number): void
  /** Does them. Nothing that was added is seen before. Adding more than fits runs what is there by itself. */
  run(): void
}

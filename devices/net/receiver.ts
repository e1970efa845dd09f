/**
 * The guest's side of a receive ring: finds chains for a packet whose length is known, writes the virtio-net header and has
 * the frame copied behind it (virtio 1.3 §5.1.6.4). It must not know where packets come from.
 */
import { type Chain, type CopyBatch, hasFeature, type IoBuffer, type QueueContext } from '../../src/device/index.ts'
import * as net from '../../src/device/virtio-net.ts'
import type { CaptureWriter } from './capture.ts'
import { headerSize, type PacketHeader } from './header.ts'
import {
  DROP_BAD_BUFFER,
  DROP_DISABLED,
  DROP_TOO_BIG,
  type NetCounters,
  PARTIAL_CHECKSUMS,
  SEGMENTED,
} from './shared.ts'

/** Chains that one packet may use. Linux' smallest buffers are 1.5 KiB, 43 for the largest packet. */
const MAX_CHAINS = 1024
/** Chains that go back unused for one packet, before others get their turn: a driver can make each one long to look at. */
const MAX_UNUSED = 16

/** What became of a packet: the guest gets it; */
export const DELIVERED = 0
/** the guest has not offered enough chains yet; */
export const NO_CHAINS = 1
/** it was dropped, and counted. */
export const DROPPED = 2

export class Receiver {
  readonly context: QueueContext
  readonly mergeable: boolean
  readonly headerSize: number
  readonly #counters: NetCounters
  readonly #copies: CopyBatch
  readonly #capture: CaptureWriter | undefined
  /** Chains taken and not used yet, the oldest at `#first`; the first `#used` of them wait for `flush`. */
  readonly #chains: (Chain | undefined)[]
  readonly #written: Uint32Array
  readonly #mask: number
  #first = 0
  #used = 0
  #held = 0
  /** Of those: packets and their bytes. */
  #packets = 0
  #bytes = 0

  /** @param copies run by the caller before `flush` */
  constructor(context: QueueContext, counters: NetCounters, copies: CopyBatch, capture: CaptureWriter | undefined) {
    this.context = context
    this.mergeable = hasFeature(context.features, net.VIRTIO_NET_F_MRG_RXBUF)
    this.headerSize = headerSize(context.features)
    this.#counters = counters
    this.#copies = copies
    this.#capture = capture
    // A power of two; more than the ring has can't be taken.
    const size = Math.min(context.queueSize, 2 * MAX_CHAINS)
    this.#chains = new Array<Chain | undefined>(size).fill(undefined)
    this.#written = new Uint32Array(size)
    this.#mask = size - 1
  }

  /** Packets wait for `flush`. */
  get dirty(): boolean {
    return this.#used > 0
  }

  /**
   * Gives the guest the frame at `start` of a chain's device-readable part.
   * @param header what the guest is told about it
   */
  deliverChain(header: PacketHeader, from: Chain, start: number, length: number): number {
    const { headerSize } = this
    // The usual case first: the next chain of the ring is all that it needs.
    if (this.#used === this.#held && this.#held <= this.#mask) {
      const chain = this.context.take()
      if (chain !== undefined) {
        const slot = (this.#first + this.#held++) & this.#mask
        this.#chains[slot] = chain
        if (chain.writable >= headerSize + length) {
          this.#copies.chainToChain(from, start, chain, headerSize, length)
          this.#written[slot] = headerSize + length
          this.#finish(header, chain, 1, length)
          this.#capture?.fromReadable(from, start, length, false)
          return DELIVERED
        }
      }
    }
    const count = this.#gather(length)
    if (count <= 0) return count < 0 ? DROPPED : NO_CHAINS
    this.#spread(from, start, length, count)
    this.#finish(header, this.#chains[(this.#first + this.#used) & this.#mask]!, count, length)
    this.#capture?.fromReadable(from, start, length, false)
    return DELIVERED
  }

  /** Copies into several chains, each of them filled but the last (virtio 1.3 §5.1.6.4.1). */
  #spread(from: Chain, start: number, length: number, count: number): void {
    let at = start
    const end = start + length
    for (let i = 0; i < count; i++) {
      const slot = (this.#first + this.#used + i) & this.#mask
      const chain = this.#chains[slot]!
      const skip = i === 0 ? this.headerSize : 0
      const size = Math.min(chain.writable - skip, end - at)
      this.#copies.chainToChain(from, at, chain, skip, size)
      this.#written[slot] = skip + size
      at += size
    }
  }

  /** Gives the guest the frame at `start` of a buffer, which has to stay as it is until the copies ran. */
  deliverBuffer(header: PacketHeader, from: IoBuffer, start: number, length: number): number {
    const count = this.#gather(length)
    if (count <= 0) return count < 0 ? DROPPED : NO_CHAINS
    let at = start
    const end = start + length
    for (let i = 0; i < count; i++) {
      const slot = (this.#first + this.#used + i) & this.#mask
      const chain = this.#chains[slot]!
      const skip = i === 0 ? this.headerSize : 0
      const size = Math.min(chain.writable - skip, end - at)
      this.#copies.bufferToChain(from, at, chain, skip, size)
      this.#written[slot] = skip + size
      at += size
    }
    this.#finish(header, this.#chains[(this.#first + this.#used) & this.#mask]!, count, length)
    this.#capture?.fromBytes(from.bytes, start, length, false)
    return DELIVERED
  }

  /** After the copies ran: the driver gets the chains, at the next publish. */
  flush(): void {
    const { context } = this
    const chains = this.#chains
    const written = this.#written
    const mask = this.#mask
    const used = this.#used
    let slot = this.#first
    for (let i = 0; i < used; i++) {
      context.give(chains[slot]!, written[slot]!)
      slot = (slot + 1) & mask
    }
    this.#first = slot
    this.#held -= used
    this.#used = 0
    this.#counters.packets(this.#packets, this.#bytes)
    this.#packets = 0
    this.#bytes = 0
  }

  /** Puts back what is not used. After `flush`. */
  release(): void {
    for (; this.#held > 0; this.#held--) {
      const slot = (this.#first + this.#held - 1) & this.#mask
      this.context.untake(this.#chains[slot]!)
      this.#chains[slot] = undefined
    }
  }

  /**
   * Holds chains for a frame. Returns how many, 0 when they are not there yet, -1 when the packet was dropped.
   */
  #gather(length: number): number {
    const total = this.headerSize + length
    let room = 0
    let count = 0
    let unused = 0
    for (;;) {
      if (this.#used + count === this.#held) {
        const full = this.#held > this.#mask
        const chain = full ? undefined : this.context.take()
        if (chain === undefined) {
          if (!this.context.active) return this.#drop(DROP_DISABLED)
          return full && this.#used === 0 ? this.#drop(DROP_TOO_BIG) : 0
        }
        this.#chains[(this.#first + this.#held) & this.#mask] = chain
        this.#held++
      }
      const { writable } = this.#chains[(this.#first + this.#used + count) & this.#mask]!
      count++
      // The first takes the header as well; one without room is no buffer at all (virtio 1.3 §5.1.6.3.1).
      if (writable <= (count === 1 ? this.headerSize : 0)) {
        this.#giveUnused(count)
        unused += count
        if (unused >= MAX_UNUSED) return 0
        count = 0
        room = 0
        continue
      }
      room += writable
      if (room >= total) return count
      if (!this.mergeable || count === MAX_CHAINS) return this.#drop(DROP_TOO_BIG)
    }
  }

  /** The next chains go back to the driver as they are, in their turn: the ring can only be wound back at its end. */
  #giveUnused(count: number): void {
    for (let i = 0; i < count; i++) this.#written[(this.#first + this.#used + i) & this.#mask] = 0
    this.#used += count
    this.#counters.drop(DROP_BAD_BUFFER)
  }

  #drop(reason: number): number {
    this.#counters.drop(reason)
    return -1
  }

  /** @param first of the `count` chains that the frame goes into */
  #finish(header: PacketHeader, first: Chain, count: number, length: number): void {
    writeHeader(first, header, count, this.headerSize)
    this.#used += count
    this.#packets++
    this.#bytes += length
    if ((header.flags | header.gsoType) !== 0)
      this.#counters.add(header.gsoType !== 0 ? SEGMENTED : PARTIAL_CHECKSUMS, 1)
  }
}

/** Writes the header at the start of a chain's device-writable part. */
function writeHeader(chain: Chain, header: PacketHeader, buffers: number, size: number): void {
  let word0 = 0
  let word1 = 0
  let word2 = buffers << 16
  if ((header.flags | header.gsoType) !== 0) {
    const gsoType = header.gsoType | (header.ecn !== 0 ? net.VIRTIO_NET_HDR_GSO_ECN : 0)
    word0 = header.flags | (gsoType << 8) | (header.hdrLen << 16)
    word1 = header.gsoSize | (header.csumStart << 16)
    word2 |= header.csumOffset
  }
  const offset = chain.offset[0]!
  if (chain.readableCount === 0 && chain.length[0]! >= size && (offset & 3) === 0 && size === net.VIRTIO_NET_HDR_SIZE) {
    const { words } = chain.first
    const at = offset / 4
    words[at] = word0
    words[at + 1] = word1
    words[at + 2] = word2
    return
  }
  for (let i = 0; i < size; i++) {
    const word = i < 4 ? word0 : i < 8 ? word1 : word2
    chain.writeU8(i, (word >>> ((i & 3) * 8)) & 0xff)
  }
}

/**
 * Packets between chains and an fd that carries one per read or write (a tap): a batch per native call, straight out of
 * and into guest memory.
 */
import { type Chain, DeviceError, type IoBuffer, type PacketReceiver, type PacketSender } from '../device/index.ts'
import { native, systemError } from '../native.ts'

/** Bytes and words of an iovec. */
const IOVEC_SIZE = 16
const IOVEC_WORDS = 4
/** The most vectors that one readv or writev takes (IOV_MAX). */
const MAX_VECTORS = 1024
/** Vectors of a batch: room for the most that one packet may have, and for some usual ones. */
const VECTORS = 4096

/**
 * An iovec array at a fixed address. SAFETY: whoever uses `address` keeps this object: the collector unmaps the buffer.
 */
class Vectors {
  readonly address: number
  readonly #words: Uint32Array
  count = 0

  constructor(capacity: number) {
    const mapping = native.allocate(capacity * IOVEC_SIZE)
    if (typeof mapping === 'number') throw systemError(mapping, 'mmap', 'cannot allocate I/O vectors')
    this.address = mapping.address
    this.#words = new Uint32Array(mapping.buffer)
  }

  add(address: number, length: number): void {
    const words = this.#words
    const at = this.count++ * IOVEC_WORDS
    words[at] = address >>> 0
    words[at + 1] = (address / 0x1_0000_0000) >>> 0
    words[at + 2] = length
    words[at + 3] = 0
  }

  /** Adds the part of a chain's segments [first, end) that starts at byte `start`. Returns its bytes. */
  addSegments(chain: Chain, first: number, end: number, start: number): number {
    let skip = start
    let bytes = 0
    for (let segment = first; segment < end; segment++) {
      const length = chain.length[segment]! - skip
      if (length <= 0) {
        skip = -length
        continue
      }
      // SAFETY: a segment lies inside a region that stays mapped while its chain is in flight.
      this.add(chain.regions[chain.region[segment]!]!.hva + chain.offset[segment]! + skip, length)
      bytes += length
      skip = 0
    }
    return bytes
  }

  /** Drops the first `count` vectors. */
  shift(count: number): void {
    this.#words.copyWithin(0, count * IOVEC_WORDS, this.count * IOVEC_WORDS)
    this.count -= count
  }
}

export class FdPacketSender implements PacketSender {
  count = 0
  readonly #fd: number
  readonly #vectors = new Vectors(VECTORS)
  /** Vectors of each packet; `send` puts its result there. */
  readonly #packets: Int32Array

  constructor(fd: number, capacity: number) {
    this.#fd = fd
    this.#packets = new Int32Array(capacity)
  }

  add(header: IoBuffer, headerAt: number, headerLength: number, chain: Chain, start: number): boolean {
    const vectors = this.#vectors
    const most = 1 + chain.readableCount
    if (this.count === this.#packets.length || most > MAX_VECTORS || vectors.count + most > VECTORS) return false
    const before = vectors.count
    vectors.add(header.address + headerAt, headerLength)
    // The usual packet lies in one piece.
    if (chain.readableCount === 1 && start < chain.length[0]!) {
      // SAFETY: as in `addSegments`.
      vectors.add(chain.first.hva + chain.offset[0]! + start, chain.length[0]! - start)
      this.#packets[this.count++] = 2
      return true
    }
    vectors.addSegments(chain, 0, chain.readableCount, start)
    this.#packets[this.count++] = vectors.count - before
    return true
  }

  addBuffer(buffer: IoBuffer, at: number, length: number): boolean {
    if (this.count === this.#packets.length || this.#vectors.count === VECTORS) return false
    this.#vectors.add(buffer.address + at, length)
    this.#packets[this.count++] = 1
    return true
  }

  send(): number {
    const { count } = this
    if (count === 0) return 0
    this.count = 0
    this.#vectors.count = 0
    return native.sendPackets(this.#fd, this.#vectors.address, this.#packets, count)
  }

  result(index: number): number {
    return this.#packets[index]!
  }
}

export class FdPacketReceiver implements PacketReceiver {
  held = 0
  room = 0
  ended = 0
  readonly #fd: number
  readonly #capacity: number
  readonly #vectors = new Vectors(VECTORS)
  /** The chains held, a ring from `#first` on, and the vectors of each, from 0 on. */
  readonly #chains: (Chain | undefined)[]
  #first = 0
  readonly #counts: Int32Array
  /** Chains and vectors that `shift` took out, which are still in `#counts` and `#vectors`. */
  #gone = 0
  #goneVectors = 0
  readonly #results: Int32Array
  // For packets that go to a buffer: one vector, one "chain".
  readonly #single = new Vectors(1)
  readonly #singleCount = Int32Array.of(1)
  readonly #singleResult = new Int32Array(2)

  constructor(fd: number, capacity: number) {
    this.#fd = fd
    this.#capacity = capacity
    this.#chains = new Array<Chain | undefined>(capacity).fill(undefined)
    this.#counts = new Int32Array(capacity)
    this.#results = new Int32Array(capacity + 1)
  }

  add(chain: Chain): boolean {
    this.#compact()
    const vectors = this.#vectors
    const count = chain.count - chain.readableCount
    if (this.held === this.#capacity || vectors.count + count > VECTORS) return false
    vectors.addSegments(chain, chain.readableCount, chain.count, 0)
    this.#counts[this.held] = count
    this.#chains[(this.#first + this.held) % this.#capacity] = chain
    this.held++
    this.room += chain.writable
    return true
  }

  receive(largest: number, mergeable: boolean, most: number): number {
    this.#compact()
    const results = this.#results
    const packets = native.receivePackets(
      this.#fd,
      this.#vectors.address,
      this.#counts,
      this.held,
      largest,
      mergeable,
      results,
      Math.min(most, this.#capacity)
    )
    this.ended = results[packets]!
    return packets
  }

  receiveBuffer(buffer: IoBuffer, at: number, length: number): number {
    if (at + length > buffer.bytes.length) throw new RangeError(`[${at}, +${length}) is outside the buffer`)
    const single = this.#single
    single.count = 0
    single.add(buffer.address + at, length)
    const result = this.#singleResult
    native.receivePackets(this.#fd, single.address, this.#singleCount, 1, length, false, result, 1)
    // Without a packet the first result is why.
    return result[0]!
  }

  length(index: number): number {
    return this.#results[index]!
  }

  shift(): Chain {
    const chain = this.#chains[this.#first]
    if (chain === undefined || this.held === 0) throw new DeviceError('ERR_DEVICE_RECEIVER', 'no chain is held')
    this.#chains[this.#first] = undefined
    this.#first = (this.#first + 1) % this.#capacity
    this.#goneVectors += this.#counts[this.#gone++]!
    this.held--
    this.room -= chain.writable
    return chain
  }

  pop(): Chain | undefined {
    if (this.held === 0) return undefined
    this.#compact()
    this.held--
    const at = (this.#first + this.held) % this.#capacity
    const chain = this.#chains[at]!
    this.#chains[at] = undefined
    this.#vectors.count -= this.#counts[this.held]!
    this.room -= chain.writable
    return chain
  }

  /** The kernel reads counts and vectors from their start. */
  #compact(): void {
    if (this.#gone === 0) return
    this.#counts.copyWithin(0, this.#gone, this.#gone + this.held)
    this.#vectors.shift(this.#goneVectors)
    this.#gone = 0
    this.#goneVectors = 0
  }
}

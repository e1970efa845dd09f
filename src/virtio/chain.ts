/**
 * A descriptor chain after validation: numbers, no views. Chains are pooled by head index (packed rings: buffer id), so
 * one in flight is found again by its head, and popping allocates nothing. Pure; it must not know rings or devices.
 *
 * Segments [0, readableCount) are device-readable, the rest device-writable; each lies inside one memory region.
 * Positions in the accessors are byte positions in the readable or the writable part: framing is the driver's
 * business (virtio 1.3 §2.7.4.1).
 */
import { type GuestMemory, IOTLB_READ, IOTLB_WRITE, MemoryRegion } from './memory.ts'

/** Segments that a chain has room for before its arrays grow. */
const INITIAL_SEGMENTS = 4

const NO_REGION = new MemoryRegion({ gpa: 0, size: 0, hva: 0, buffer: new ArrayBuffer(0) })

export class Chain {
  /** Index of the first descriptor, or of a packed ring the buffer id; identifies the chain while it is in flight. */
  readonly head: number
  /** Segments in all, and how many of them are device-readable. */
  count = 0
  readableCount = 0
  /** Bytes in the device-readable and in the device-writable part. */
  readable = 0
  writable = 0
  /** Popped and not yet used. */
  inFlight = false
  /** When it was popped, in the engine's microseconds. */
  poppedAt = 0
  /** What the segments refer to: all of the memory, or after `detach` the regions of this chain. */
  regions: readonly MemoryRegion[]
  #own: MemoryRegion[] | undefined
  /** The region of segment 0, whatever it was before while there is none. Most chains of packets have no other. */
  first: MemoryRegion
  /** Per segment: index of its region, offset in that region, length in bytes. */
  region: Uint16Array
  offset: Float64Array
  length: Uint32Array

  constructor(head: number) {
    this.head = head
    this.regions = []
    this.first = NO_REGION
    this.region = new Uint16Array(INITIAL_SEGMENTS)
    this.offset = new Float64Array(INITIAL_SEGMENTS)
    this.length = new Uint32Array(INITIAL_SEGMENTS)
  }

  /** Empties the chain for a new walk over `memory`. @internal */
  begin(memory: GuestMemory): void {
    this.count = 0
    this.readableCount = 0
    this.readable = 0
    this.writable = 0
    this.regions = memory.regions
  }

  /**
   * Makes it a chain of one buffer. Returns false, having changed nothing, when that is not in one region of `memory`:
   * the usual case of `begin` and `append` in fewer steps.
   * @internal
   */
  single(memory: GuestMemory, gpa: number, length: number, writable: boolean): boolean {
    const index = memory.find(gpa)
    if (index < 0) return false
    const region = memory.regions[index]!
    if (length === 0 || length > region.end - gpa) return false
    if ((region.access & (writable ? IOTLB_WRITE : IOTLB_READ)) === 0) return false
    this.regions = memory.regions
    this.first = region
    this.region[0] = index
    this.offset[0] = gpa - region.gpa
    this.length[0] = length
    this.count = 1
    this.readableCount = writable ? 0 : 1
    this.readable = writable ? 0 : length
    this.writable = writable ? length : 0
    return true
  }

  /**
   * Adds the buffer of one descriptor; one that straddles adjacent regions becomes a segment in each. Returns false
   * when part of it is outside `memory` or may not be used in that direction. The caller adds readable buffers before
   * writable ones.
   * @internal
   */
  append(memory: GuestMemory, gpa: number, length: number, writable: boolean): boolean {
    const access = writable ? IOTLB_WRITE : IOTLB_READ
    let at = gpa
    let left = length
    while (left > 0) {
      const index = memory.find(at)
      if (index < 0) return false
      const region = memory.regions[index]!
      if ((region.access & access) === 0) return false
      const take = Math.min(left, region.end - at)
      const segment = this.count
      if (segment === 0) this.first = region
      else if (segment === this.length.length) this.#grow()
      this.region[segment] = index
      this.offset[segment] = at - region.gpa
      this.length[segment] = take
      this.count = segment + 1
      at += take
      left -= take
    }
    if (writable) this.writable += length
    else {
      this.readable += length
      this.readableCount = this.count
    }
    return true
  }

  /**
   * Refers to the regions that it uses alone. For chains behind a vIOMMU, where the list of all regions has thousands
   * of entries and is another one after every change: each chain would keep one, also while it waits in the pool.
   * @internal
   */
  detach(): void {
    this.#own ??= []
    const own = this.#own
    own.length = this.count
    for (let segment = 0; segment < this.count; segment++) {
      own[segment] = this.regions[this.region[segment]!]!
      this.region[segment] = segment
    }
    this.regions = own
  }

  #grow(): void {
    const room = this.length.length * 2
    const region = new Uint16Array(room)
    const offset = new Float64Array(room)
    const length = new Uint32Array(room)
    region.set(this.region)
    offset.set(this.offset)
    length.set(this.length)
    this.region = region
    this.offset = offset
    this.length = length
  }

  /** Byte `at` of the device-readable part. @throws RangeError beyond it */
  readU8(at: number): number {
    let position = at
    for (let segment = 0; segment < this.readableCount; segment++) {
      const length = this.length[segment]!
      if (position < length) return this.regions[this.region[segment]!]!.bytes[this.offset[segment]! + position]!
      position -= length
    }
    throw new RangeError(`read of byte ${at}, the chain has ${this.readable} device-readable bytes`)
  }

  /** Little-endian u16 at `at` of the device-readable part. @throws RangeError beyond it */
  readU16(at: number): number {
    return this.readU8(at) | (this.readU8(at + 1) << 8)
  }

  /** Little-endian u32 at `at` of the device-readable part. @throws RangeError beyond it */
  readU32(at: number): number {
    // The usual case, a header in one descriptor, is one load, or four: network packets are not aligned.
    if (this.readableCount > 0 && at + 4 <= this.length[0]!) {
      const offset = this.offset[0]! + at
      const region = this.first
      if (offset % 4 === 0) return region.words[offset / 4]!
      const { bytes } = region
      return (
        (bytes[offset]! | (bytes[offset + 1]! << 8) | (bytes[offset + 2]! << 16) | (bytes[offset + 3]! << 24)) >>> 0
      )
    }
    return (this.readU16(at) | (this.readU16(at + 2) << 16)) >>> 0
  }

  /**
   * Little-endian u64 at `at` as a number. Beyond 2^53 it is rounded, but never to something below 2^53. @throws
   * RangeError
   */
  readU64(at: number): number {
    return this.readU32(at) + this.readU32(at + 4) * 0x1_0000_0000
  }

  /** Sets byte `at` of the device-writable part. @throws RangeError beyond it */
  writeU8(at: number, value: number): void {
    // From the end: a status byte is the last one.
    let end = this.writable
    for (let segment = this.count - 1; segment >= this.readableCount; segment--) {
      const start = end - this.length[segment]!
      if (at >= start && at < end) {
        this.regions[this.region[segment]!]!.bytes[this.offset[segment]! + at - start] = value
        return
      }
      end = start
    }
    throw new RangeError(`write of byte ${at}, the chain has ${this.writable} device-writable bytes`)
  }

  /** Sets the little-endian u32 at `at` of the device-writable part. @throws RangeError beyond it */
  writeU32(at: number, value: number): void {
    // The usual case, a header in one descriptor, is one store.
    const segment = this.readableCount
    if (at >= 0 && segment < this.count && at + 4 <= this.length[segment]!) {
      const offset = this.offset[segment]! + at
      if (offset % 4 === 0) {
        this.regions[this.region[segment]!]!.words[offset / 4] = value
        return
      }
    }
    for (let i = 0; i < 4; i++) this.writeU8(at + i, (value >>> (8 * i)) & 0xff)
  }

  /**
   * Copies up to `length` bytes from `at` of the device-readable part into `target`. Returns how many there were.
   * Allocates: not for the hot path.
   */
  copyFrom(at: number, target: Uint8Array, targetAt: number, length: number): number {
    return this.#copy(0, this.readableCount, at, target, targetAt, length, false)
  }

  /**
   * Copies up to `length` bytes of `source` to `at` of the device-writable part. Returns how many fitted. Allocates:
   * not for the hot path.
   */
  copyTo(at: number, source: Uint8Array, sourceAt: number, length: number): number {
    return this.#copy(this.readableCount, this.count, at, source, sourceAt, length, true)
  }

  /**
   * Whether bytes [start, start + length) of the readable or writable part sit in memory such that every piece has an
   * address that is a multiple of `addressAlign` and a length that is one of `lengthAlign` (powers of two): what
   * O_DIRECT demands.
   */
  aligned(writable: boolean, start: number, length: number, addressAlign: number, lengthAlign: number): boolean {
    const end = writable ? this.count : this.readableCount
    let skip = start
    let left = length
    for (let segment = writable ? this.readableCount : 0; segment < end && left > 0; segment++) {
      const size = this.length[segment]! - skip
      if (size <= 0) {
        skip -= this.length[segment]!
        continue
      }
      const take = Math.min(size, left)
      const address = this.regions[this.region[segment]!]!.hva + this.offset[segment]! + skip
      if (address % addressAlign !== 0 || take % lengthAlign !== 0) return false
      left -= take
      skip = 0
    }
    return true
  }

  #copy(
    first: number,
    end: number,
    at: number,
    other: Uint8Array,
    otherAt: number,
    length: number,
    toGuest: boolean
  ): number {
    let skip = at
    let done = 0
    for (let segment = first; segment < end && done < length; segment++) {
      const size = this.length[segment]!
      if (skip >= size) {
        skip -= size
        continue
      }
      const take = Math.min(size - skip, length - done)
      const start = this.offset[segment]! + skip
      const guest = this.regions[this.region[segment]!]!.bytes.subarray(start, start + take)
      if (toGuest) guest.set(other.subarray(otherAt + done, otherAt + done + take))
      else other.set(guest, otherAt + done)
      done += take
      skip = 0
    }
    return done
  }
}

/**
 * The way of captured packets from the queue half to the control half: one ring per virtqueue in a SharedArrayBuffer,
 * with one producer ({@link CaptureWriter}, on the queue's iothread) and one consumer ({@link CaptureReader}, on the
 * control thread). A full ring never makes the producer wait: the packet is not captured, and counted as lost. It must
 * not know files or their format.
 *
 * A record: u32 captured bytes (bit 31: the guest sent the packet), u32 bytes that the packet had, u32 and u32 high and
 * low half of nanoseconds since 1970, the bytes, padding to 8. A record is contiguous; where it would straddle the end
 * of the ring, {@link SKIP} says that it starts at the ring's beginning. Positions count bytes and wrap at 2^32; the
 * ring's size is a power of two.
 */
import type { Chain } from '../../src/device/index.ts'

// 32-bit words before the data, each side's on a cache line of its own.
/** Where the next record goes: the producer's. */
const HEAD = 0
/** Packets that found the ring full: the producer's. */
const LOST = 1
/** Where the oldest record is: the consumer's. */
const TAIL = 16
/** Bytes of a packet to keep; 0 = capture nothing: the consumer's. */
const SNAPLEN = 17
const CONTROL_BYTES = 128

const RECORD_HEADER = 16
const SENT = 0x8000_0000
const SKIP = 0xffff_ffff

/** Holds some 20 ms of 1.5 Gbit/s. Pages of it that no packet was ever in take no memory. */
const RING_BYTES = 4 * 1024 * 1024

/** The ring of one queue, for the two classes below. @param bytes of packets: a power of two, 4 KiB or more */
export function allocateCapture(bytes: number = RING_BYTES): SharedArrayBuffer {
  return new SharedArrayBuffer(CONTROL_BYTES + bytes)
}

/**
 * The producer's side. A packet in one piece is one call of a `from…`. One that is in several: `begin`, its pieces in
 * order by `addReadable`, `addWritable` and `addBytes`, `commit`. Made anew when a queue starts again.
 */
export class CaptureWriter {
  /** The ring's bytes: a packet may also be put straight where `begin` says. */
  readonly bytes: Uint8Array
  readonly #control: Int32Array
  readonly #words: Uint32Array
  readonly #size: number
  // Nanoseconds since 1970 at which this thread's performance.now() was 0.
  readonly #originHigh: number
  readonly #originLow: number
  #head: number
  /** As last read: the consumer may be further. */
  #tail: number
  /** Of the packet under way: where its next bytes go, where they end, and where the next record goes. */
  #at = 0
  #end = 0
  #next = 0

  /** @param buffer of {@link allocateCapture} */
  constructor(buffer: SharedArrayBuffer) {
    this.#control = new Int32Array(buffer, 0, CONTROL_BYTES / 4)
    this.#words = new Uint32Array(buffer, CONTROL_BYTES)
    this.bytes = new Uint8Array(buffer, CONTROL_BYTES)
    this.#size = this.bytes.length
    const origin = BigInt(Math.round(performance.timeOrigin * 1000)) * 1000n
    this.#originHigh = Number(origin >> 32n)
    this.#originLow = Number(origin & 0xffff_ffffn)
    // ORDER: pairs with `commit` of the writer before this one, which may have been on another thread.
    this.#head = Atomics.load(this.#control, HEAD)
    // ORDER: pairs with CaptureReader.next.
    this.#tail = Atomics.load(this.#control, TAIL)
  }

  /** Bytes of a packet that are kept; 0 while nothing is captured (the capture has ended). */
  get snaplen(): number {
    // ORDER: no other memory hangs on it; it is atomic so that a change is seen at all.
    return Atomics.load(this.#control, SNAPLEN)
  }

  /** Captures a packet: bytes [start, start + length) of a chain's device-readable part. @param outbound as in `begin` */
  fromReadable(chain: Chain, start: number, length: number, outbound: boolean): void {
    if (this.begin(length, length, outbound, performance.now()) < 0) return
    this.addReadable(chain, start, length)
    this.commit()
  }

  /** Captures a packet: bytes [start, start + length) of a buffer. */
  fromBytes(bytes: Uint8Array, start: number, length: number, outbound: boolean): void {
    if (this.begin(length, length, outbound, performance.now()) < 0) return
    this.addBytes(bytes, start, length)
    this.commit()
  }

  /**
   * Starts the record of a packet. Returns where its first byte goes in {@link bytes}, -1 when it is not captured:
   * nothing may be added or committed then. One that is begun and not committed leaves nothing behind.
   * @param length bytes of it that will be added; what exceeds {@link snaplen} is not kept
   * @param originalLength bytes of the frame, without the virtio-net header
   * @param outbound the guest sent it
   * @param timestamp performance.now() of this thread; may be the same for a batch
   */
  begin(length: number, originalLength: number, outbound: boolean, timestamp: number): number {
    const snaplen = this.snaplen
    if (snaplen === 0) return -1
    const kept = length < snaplen ? length : snaplen
    const need = (RECORD_HEADER + kept + 7) & ~7
    let at = this.#head & (this.#size - 1)
    const skip = this.#size - at < need ? this.#size - at : 0
    if (this.#room() < skip + need) {
      // ORDER: pairs with CaptureReader.next: what it read is free only now.
      this.#tail = Atomics.load(this.#control, TAIL)
      if (this.#room() < skip + need) {
        // ORDER: one writer; pairs with CaptureReader.lost.
        Atomics.store(this.#control, LOST, this.#control[LOST]! + 1)
        return -1
      }
    }
    const words = this.#words
    if (skip > 0) {
      words[at >>> 2] = SKIP
      at = 0
    }
    const since = timestamp * 1e6
    const sinceHigh = Math.floor(since / 0x1_0000_0000)
    const low = this.#originLow + Math.floor(since - sinceHigh * 0x1_0000_0000)
    const word = at >>> 2
    words[word] = outbound ? (kept | SENT) >>> 0 : kept
    words[word + 1] = originalLength
    words[word + 2] = this.#originHigh + sinceHigh + (low >= 0x1_0000_0000 ? 1 : 0)
    words[word + 3] = low
    this.#at = at + RECORD_HEADER
    this.#end = this.#at + kept
    this.#next = (this.#head + skip + need) | 0
    return this.#at
  }

  /** Adds bytes [at, at + length) of a buffer. */
  addBytes(bytes: Uint8Array, at: number, length: number): void {
    const take = Math.min(length, this.#end - this.#at)
    this.bytes.set(bytes.subarray(at, at + take), this.#at)
    this.#at += take
  }

  /** Adds bytes [at, at + length) of a chain's device-readable part. */
  addReadable(chain: Chain, at: number, length: number): void {
    this.#at += chain.copyFrom(at, this.bytes, this.#at, Math.min(length, this.#end - this.#at))
  }

  /** Adds bytes [at, at + length) of a chain's device-writable part. */
  addWritable(chain: Chain, at: number, length: number): void {
    let skip = at
    let left = Math.min(length, this.#end - this.#at)
    for (let segment = chain.readableCount; segment < chain.count && left > 0; segment++) {
      const size = chain.length[segment]!
      if (skip >= size) {
        skip -= size
        continue
      }
      const take = Math.min(size - skip, left)
      const start = chain.offset[segment]! + skip
      this.addBytes(chain.regions[chain.region[segment]!]!.bytes, start, take)
      left -= take
      skip = 0
    }
  }

  /** The record is whole: the other side may read it. */
  commit(): void {
    this.#head = this.#next
    // ORDER: pairs with CaptureReader.refresh: all bytes of the record are there before it is.
    Atomics.store(this.#control, HEAD, this.#head)
  }

  #room(): number {
    return this.#size - ((this.#head - this.#tail) >>> 0)
  }
}

/** The consumer's side: `refresh`, then while `peek()` says so, look at the fields and go on by `next`. */
export class CaptureReader {
  /** Of the oldest record, after `peek`: where its bytes are in {@link bytes}, and what the record says. */
  readonly bytes: Uint8Array
  at = 0
  length = 0
  originalLength = 0
  /** The guest sent the packet. */
  outbound = false
  /** Nanoseconds since 1970, in two halves of 32 bits. */
  timeHigh = 0
  timeLow = 0
  readonly #control: Int32Array
  readonly #words: Uint32Array
  readonly #size: number
  #head: number
  #tail: number

  /** @param buffer of {@link allocateCapture} */
  constructor(buffer: SharedArrayBuffer) {
    this.#control = new Int32Array(buffer, 0, CONTROL_BYTES / 4)
    this.#words = new Uint32Array(buffer, CONTROL_BYTES)
    this.bytes = new Uint8Array(buffer, CONTROL_BYTES)
    this.#size = this.bytes.length
    if (this.#size < 4096 || (this.#size & (this.#size - 1)) !== 0) {
      throw new RangeError(`a ring of ${this.#size} bytes: it has to be a power of two, 4096 or more`)
    }
    // ORDER: written by this side only, perhaps by a reader before this one.
    this.#tail = Atomics.load(this.#control, TAIL)
    this.#head = this.#tail
  }

  /** Lets the producer capture, with this many bytes of a packet at most; 0 = no longer. What is there stays. */
  enable(snaplen: number): void {
    // A record that nearly fills the ring might never find room in it, because of the skip before it.
    const most = this.#size / 2 - RECORD_HEADER
    // ORDER: pairs with CaptureWriter.snaplen; no other memory hangs on it.
    Atomics.store(this.#control, SNAPLEN, Math.min(snaplen, most))
  }

  /** Packets that found the ring full: a count modulo 2^32. */
  get lost(): number {
    // ORDER: pairs with CaptureWriter.begin; no other memory hangs on it.
    return Atomics.load(this.#control, LOST) >>> 0
  }

  /** Bytes of the ring that are taken by what `refresh` saw. */
  get used(): number {
    return (this.#head - this.#tail) >>> 0
  }

  /** Looks for new records. */
  refresh(): void {
    // ORDER: pairs with CaptureWriter.commit: the records up to here are whole.
    this.#head = Atomics.load(this.#control, HEAD)
  }

  /** Reads the oldest record. Returns false when there is none of those that `refresh` saw. */
  peek(): boolean {
    if (this.#tail === this.#head) return false
    let at = this.#tail & (this.#size - 1)
    if (this.#words[at >>> 2] === SKIP) {
      this.#tail = (this.#tail + this.#size - at) | 0
      at = 0
    }
    const word = at >>> 2
    const length = this.#words[word]!
    this.length = length & ~SENT
    this.outbound = length >= SENT
    this.originalLength = this.#words[word + 1]!
    this.timeHigh = this.#words[word + 2]!
    this.timeLow = this.#words[word + 3]!
    this.at = at + RECORD_HEADER
    return true
  }

  /** Gives the record that `peek` read back to the producer. */
  next(): void {
    this.#tail = (this.#tail + ((RECORD_HEADER + this.length + 7) & ~7)) | 0
    // ORDER: pairs with CaptureWriter.begin: the record was read before it is free.
    Atomics.store(this.#control, TAIL, this.#tail)
  }
}

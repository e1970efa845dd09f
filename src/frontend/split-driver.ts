/**
 * The driver half of the split virtqueue (virtio 1.3 §2.7): descriptors, available ring, used ring, notification
 * suppression by flags or by EVENT_IDX. Pure: it works on any buffers and kicks through a function. It must not know
 * eventfds or requests.
 *
 * Every index of the ring is a u16 that wraps; each is masked with 0xffff before it is compared.
 */
import {
  VIRTQ_AVAIL_F_NO_INTERRUPT,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
  VIRTQ_DESC_SIZE,
  VIRTQ_MAX_SIZE,
  VIRTQ_USED_F_NO_NOTIFY,
} from '../virtio/constants.ts'
import { ChainStore, IssueOrder, type TableFormat } from './chains.ts'
import type { DriverCounters, RingArea, Segment, TableMemory, Translate, VirtqueueDriver } from './driver.ts'

/** The three parts (virtio 1.3 §2.7: alignment 16, 2 and 4). They may lie in different regions. */
export interface SplitRingAreas {
  readonly descriptors: RingArea
  readonly available: RingArea
  readonly used: RingArea
}

export interface SplitDriverOptions {
  /** Entries, a power of two, 1 … 32768. */
  readonly size: number
  readonly areas: SplitRingAreas
  /** VIRTIO_F_EVENT_IDX was negotiated. */
  readonly eventIdx: boolean
  /** VIRTIO_F_IN_ORDER was negotiated; default false. */
  readonly inOrder?: boolean
  /** Notifies the device. */
  readonly kick: () => void
  /** Where both rings start; default 0. Not 0 after SET_VRING_BASE. */
  readonly base?: number
  /** Behind a vIOMMU. */
  readonly translate?: Translate
}

/** Bytes of the three parts, with the event fields that EVENT_IDX adds at the end (virtio 1.3 §2.7.2). */
export function splitRingBytes(size: number): { descriptors: number; available: number; used: number } {
  return { descriptors: VIRTQ_DESC_SIZE * size, available: 6 + 2 * size, used: 6 + 8 * size }
}

/** virtio 1.3 §2.7.10 vring_need_event: did the index pass `event` on its way from `previous` to `next`? All u16. */
export function needEvent(event: number, next: number, previous: number): boolean {
  return ((next - event - 1) & 0xffff) < ((next - previous) & 0xffff)
}

export class SplitDriver implements VirtqueueDriver {
  readonly size: number
  readonly counters: DriverCounters = { issued: 0, completed: 0, kicks: 0, suppressedKicks: 0 }
  written = 0
  inFlight = 0

  readonly #mask: number
  readonly #eventIdx: boolean
  readonly #kick: () => void
  // Descriptor table, in u16 and u32 words.
  readonly #desc16: Uint16Array
  readonly #desc32: Uint32Array
  readonly #desc16At: number
  readonly #desc32At: number
  // Available ring: flags, idx, ring[size], used_event.
  readonly #avail: Uint16Array
  readonly #availAt: number
  // Used ring: u16 flags, idx; {u32 id, u32 len}[size] from u32 word 1; avail_event.
  readonly #used16: Uint16Array
  readonly #used32: Uint32Array
  readonly #used16At: number
  readonly #used32At: number

  readonly #chains: ChainStore
  readonly #flying: Uint8Array
  readonly #base: number
  #availIdx = 0
  #published = 0
  #lastUsed = 0
  #seenUsed = 0
  #usedEvent = 0
  #callsOff = false

  // With IN_ORDER a chain lies in the table where its turn puts it (virtio 1.3 §2.7.5): it is written when it is
  // issued.
  readonly #order: IssueOrder | undefined
  /** The next place in the table; the chain whose head is at a place. */
  #place = 0
  readonly #chainAt: Uint16Array
  /** Chains that a used element covers which `pop` has read, and that chain's length in its turn. */
  #batch = 0
  #batchWritten = 0

  /** @throws RangeError for a size that no split ring has */
  constructor(options: SplitDriverOptions) {
    const { size, areas } = options
    if (!(size >= 1 && size <= VIRTQ_MAX_SIZE && (size & (size - 1)) === 0)) {
      throw new RangeError(`a split ring has a power of two of entries up to ${VIRTQ_MAX_SIZE}, not ${size}`)
    }
    this.size = size
    this.#mask = size - 1
    this.#eventIdx = options.eventIdx
    this.#kick = options.kick
    this.#desc16 = new Uint16Array(areas.descriptors.buffer)
    this.#desc32 = new Uint32Array(areas.descriptors.buffer)
    this.#desc16At = areas.descriptors.offset / 2
    this.#desc32At = areas.descriptors.offset / 4
    this.#avail = new Uint16Array(areas.available.buffer)
    this.#availAt = areas.available.offset / 2
    this.#used16 = new Uint16Array(areas.used.buffer)
    this.#used32 = new Uint32Array(areas.used.buffer)
    this.#used16At = areas.used.offset / 2
    this.#used32At = areas.used.offset / 4
    this.#chains = new ChainStore(size, SPLIT_TABLE, options.translate)
    this.#flying = this.#chains.flying
    this.#order = options.inOrder === true ? new IssueOrder(size) : undefined
    this.#chainAt = new Uint16Array(size)
    this.#base = (options.base ?? 0) & 0xffff
    this.reset()
  }

  get base(): number {
    return this.#lastUsed
  }

  get freeDescriptors(): number {
    return this.#chains.free
  }

  reset(at = this.#base): void {
    const base = at & 0xffff
    this.#chains.reset()
    this.#order?.clear()
    this.#place = this.#batch = this.inFlight = 0
    this.#availIdx = this.#published = this.#lastUsed = this.#seenUsed = base
    this.#avail[this.#availAt] = this.#callsOff && !this.#eventIdx ? VIRTQ_AVAIL_F_NO_INTERRUPT : 0
    this.#avail[this.#availAt + 1] = base
    this.#usedEventStore(this.#callsOff ? (base - 1) & 0xffff : base)
    this.#used16[this.#used16At] = 0
    this.#used16[this.#used16At + 1] = base
    this.#used16[this.#used16At + 2 + 4 * this.size] = base
  }

  build(segments: readonly Segment[], table?: TableMemory): number {
    const chain = this.#chains.build(segments, table)
    if (chain >= 0 && this.#order === undefined) this.#write(chain, chain, false)
    return chain
  }

  setWritable(chain: number, segment: number, writable: boolean): void {
    const index = this.#chains.setWritable(chain, segment, writable)
    if (index < 0 || this.#order !== undefined) return
    this.#desc16[this.#desc16At + index * 8 + 6] = this.#chains.flags[index] as number
  }

  issue(chain: number): void {
    this.#avail[this.#availAt + 2 + (this.#availIdx & this.#mask)] =
      this.#order === undefined ? chain : this.#turn(chain)
    this.#availIdx = (this.#availIdx + 1) & 0xffff
    this.#flying[chain] = 1
    this.inFlight++
  }

  publish(): boolean {
    const previous = this.#published
    const next = this.#availIdx
    if (next === previous) return false
    this.#published = next
    this.counters.issued += (next - previous) & 0xffff
    // ORDER: sequentially consistent store of idx: ring entries and descriptors before it, the read of the device's
    // wish for kicks after it. Pairs with the device's store of avail_event (or flags) before its last look at idx.
    Atomics.store(this.#avail, this.#availAt + 1, next)
    const wanted = this.#eventIdx
      ? needEvent(Atomics.load(this.#used16, this.#used16At + 2 + 4 * this.size), next, previous)
      : (Atomics.load(this.#used16, this.#used16At) & VIRTQ_USED_F_NO_NOTIFY) === 0
    if (!wanted) {
      this.counters.suppressedKicks++
      return false
    }
    this.counters.kicks++
    this.#kick()
    return true
  }

  pop(): number {
    if (this.#lastUsed === this.#seenUsed) {
      // ORDER: load of the device's idx before its used elements; pairs with the device's release store of idx.
      this.#seenUsed = Atomics.load(this.#used16, this.#used16At + 1)
      if (this.#lastUsed === this.#seenUsed) return -1
      if (((this.#seenUsed - this.#lastUsed) & 0xffff) > this.inFlight) {
        throw new Error(
          `the device's used index ran from ${this.#lastUsed} to ${this.#seenUsed} with ${this.inFlight} in flight`
        )
      }
      // An event index that stays behind would be passed again after 65536 chains, so it is moved along now and then.
      if (this.#callsOff && this.#eventIdx && ((this.#lastUsed - this.#usedEvent) & 0xffff) > 0x4000) {
        this.#usedEventStore((this.#lastUsed - 1) & 0xffff)
      }
    }
    if (this.#order !== undefined) return this.#popInOrder(this.#order)
    const at = this.#used32At + 1 + 2 * (this.#lastUsed & this.#mask)
    const head = this.#used32[at] ?? 0
    this.written = this.#used32[at + 1] ?? 0
    if (head >= this.size || this.#flying[head] !== 1) this.#notThere(head)
    return this.#took(head)
  }

  release(chain: number): void {
    this.#chains.release(chain)
  }

  hasUsed(): boolean {
    return this.#lastUsed !== this.#seenUsed || this.usedIndex !== this.#lastUsed
  }

  pending(): number {
    return (this.usedIndex - this.#lastUsed) & 0xffff
  }

  enableCalls(): boolean {
    this.#callsOff = false
    // ORDER: the wish for calls before the last look at the used index (the load below). Pairs with the device's
    // store of idx before its read of used_event or of the flags: one of the two sees the other.
    if (this.#eventIdx) this.#usedEventStore(this.#lastUsed)
    else Atomics.store(this.#avail, this.#availAt, 0)
    return Atomics.load(this.#used16, this.#used16At + 1) !== this.#lastUsed
  }

  disableCalls(): void {
    this.#callsOff = true
    if (this.#eventIdx) this.#usedEventStore((this.#lastUsed - 1) & 0xffff)
    // ORDER: a hint, ordered with nothing; atomic so that the store isn't torn or delayed for good.
    else Atomics.store(this.#avail, this.#availAt, VIRTQ_AVAIL_F_NO_INTERRUPT)
  }

  // ---- raw access: for rings that no honest driver makes

  /** Writes one descriptor as given. @param address up to 2^64 − 1 */
  writeDescriptor(index: number, address: number | bigint, length: number, flags: number, next: number): void {
    const at32 = this.#desc32At + index * 4
    if (typeof address === 'bigint') {
      this.#desc32[at32] = Number(address & 0xffff_ffffn)
      this.#desc32[at32 + 1] = Number(address >> 32n)
    } else {
      this.#desc32[at32] = address % 0x1_0000_0000
      this.#desc32[at32 + 1] = Math.floor(address / 0x1_0000_0000)
    }
    this.#desc32[at32 + 2] = length
    const at16 = this.#desc16At + index * 8
    this.#desc16[at16 + 6] = flags
    this.#desc16[at16 + 7] = next
  }

  /**
   * Puts any head into the next place of the available ring; counts as in flight when it is in range. Not for IN_ORDER:
   * nothing is in its order that this puts there.
   */
  issueRaw(head: number): void {
    this.#avail[this.#availAt + 2 + (this.#availIdx & this.#mask)] = head
    this.#availIdx = (this.#availIdx + 1) & 0xffff
    if (head < this.size) this.#flying[head] = 1
    this.inFlight++
  }

  /** Stores any value into the available ring's idx, and kicks. */
  publishRaw(index: number): void {
    // ORDER: as in publish.
    Atomics.store(this.#avail, this.#availAt + 1, index & 0xffff)
    this.counters.kicks++
    this.#kick()
  }

  /** Kicks, whatever the device wants. */
  kickRaw(): void {
    this.counters.kicks++
    this.#kick()
  }

  /** Where the next available entry goes (u16). */
  get availableIndex(): number {
    return this.#availIdx
  }

  /** The device's idx as it stands in memory (u16). */
  get usedIndex(): number {
    // ORDER: an observation only.
    return Atomics.load(this.#used16, this.#used16At + 1)
  }

  /** The device's flags, and its avail_event, as they stand in memory. */
  get usedFlags(): number {
    return Atomics.load(this.#used16, this.#used16At)
  }

  get availEvent(): number {
    return Atomics.load(this.#used16, this.#used16At + 2 + 4 * this.size)
  }

  /** Sets used_event to any value: a call is wanted when the used index passes it. */
  setUsedEvent(value: number): void {
    this.#callsOff = false
    this.#usedEventStore(value & 0xffff)
  }

  /** Puts the chain into the table at its turn, and returns the place of its first descriptor. */
  #turn(chain: number): number {
    const head = this.#place
    this.#write(chain, head, true)
    this.#place = (head + (this.#chains.count[chain] as number)) & this.#mask
    this.#chainAt[head] = chain
    this.#order?.push(chain)
    return head
  }

  /**
   * Writes a chain into the table from `place` on.
   * @param sequential one behind the other, else where its own descriptors are
   */
  #write(chain: number, place: number, sequential: boolean): void {
    const { low, high, length, flags, next, count } = this.#chains
    let index = chain
    let at = place
    for (let left = count[chain] as number; left > 0; left--) {
      const following = sequential ? (at + 1) & this.#mask : (next[index] as number)
      const at32 = this.#desc32At + at * 4
      this.#desc32[at32] = low[index] as number
      this.#desc32[at32 + 1] = high[index] as number
      this.#desc32[at32 + 2] = length[index] as number
      const at16 = this.#desc16At + at * 8
      this.#desc16[at16 + 6] = flags[index] as number
      this.#desc16[at16 + 7] = left > 1 ? following : 0
      index = next[index] as number
      at = following
    }
  }

  /** One used element may stand for several chains: the last of them is named (virtio 1.3 §2.7.9). */
  #popInOrder(order: IssueOrder): number {
    if (this.#batch === 0) {
      const at = this.#used32At + 1 + 2 * (this.#lastUsed & this.#mask)
      const head = this.#used32[at] ?? 0
      this.#batchWritten = this.#used32[at + 1] ?? 0
      const chain = head < this.size ? (this.#chainAt[head] as number) : 0
      if (head >= this.size || this.#flying[chain] !== 1) this.#notThere(head)
      const before = order.before(chain)
      if (before < 0) this.#notThere(head)
      if (before >= ((this.#seenUsed - this.#lastUsed) & 0xffff)) {
        throw new Error(
          `the device used chain ${head} out of order: ${before} before it are in flight, and its used index covers ` +
            `${(this.#seenUsed - this.#lastUsed) & 0xffff}`
        )
      }
      this.#batch = before + 1
    }
    this.#batch--
    const chain = order.shift()
    // The ones that have no element of their own were used completely.
    this.written = this.#batch === 0 ? this.#batchWritten : (this.#chains.writable[chain] as number)
    return this.#took(chain)
  }

  #took(chain: number): number {
    this.#flying[chain] = 0
    this.#lastUsed = (this.#lastUsed + 1) & 0xffff
    this.inFlight--
    this.counters.completed++
    return chain
  }

  #notThere(head: number): never {
    throw new Error(`the device used chain ${head}, which it doesn't have (used index ${this.#lastUsed})`)
  }

  #usedEventStore(value: number): void {
    this.#usedEvent = value
    // ORDER: see enableCalls.
    Atomics.store(this.#avail, this.#availAt + 2 + this.size, value)
  }
}

/** Writes an indirect table (virtio 1.3 §2.7.5.3): entries in sequence, as IN_ORDER demands it. */
export function writeTable(table: TableMemory, segments: readonly Segment[]): void {
  const view = new DataView(table.bytes.buffer, table.bytes.byteOffset, table.bytes.byteLength)
  for (const [i, segment] of segments.entries()) {
    const at = i * VIRTQ_DESC_SIZE
    const more = i + 1 < segments.length
    view.setBigUint64(at, BigInt(segment.address), true)
    view.setUint32(at + 8, segment.length, true)
    view.setUint16(at + 12, (segment.writable ? VIRTQ_DESC_F_WRITE : 0) | (more ? VIRTQ_DESC_F_NEXT : 0), true)
    view.setUint16(at + 14, more ? i + 1 : 0, true)
  }
}

const SPLIT_TABLE: TableFormat = { write: writeTable, flagsOffset: 12 }

/**
 * The driver half of the packed virtqueue (virtio 1.3 §2.8): one ring of descriptors that both sides write, wrap
 * counters, notification suppression by two event structures. Pure: it works on any buffers and kicks through a
 * function. It must not know eventfds or requests.
 *
 * A chain's descriptors are written into the ring when it is issued, for the device overwrites them. Of a batch
 * everything is written but the flags of its first descriptor, which `publish` stores: the device looks at the ring in
 * order, so that one store shows the whole batch.
 */
import {
  RING_EVENT_FLAGS_DESC,
  RING_EVENT_FLAGS_DISABLE,
  RING_EVENT_FLAGS_ENABLE,
  VIRTQ_DESC_F_AVAIL,
  VIRTQ_DESC_F_USED,
  VIRTQ_DESC_F_WRITE,
  VIRTQ_DESC_SIZE,
  VIRTQ_MAX_SIZE,
} from '../virtio/constants.ts'
import { ChainStore, IssueOrder, type TableFormat } from './chains.ts'
import type { DriverCounters, RingArea, Segment, TableMemory, Translate, VirtqueueDriver } from './driver.ts'
import { needEvent } from './split-driver.ts'

/** The three parts (virtio 1.3 §2.8.10.1: alignment 16, 4 and 4). They may lie in different regions. */
export interface PackedRingAreas {
  readonly descriptors: RingArea
  /** Driver event suppression: the driver writes it. */
  readonly driverEvent: RingArea
  /** Device event suppression: the device writes it. */
  readonly deviceEvent: RingArea
}

export interface PackedDriverOptions {
  /** Entries, 1 … 32768; not necessarily a power of two. */
  readonly size: number
  readonly areas: PackedRingAreas
  /** VIRTIO_F_EVENT_IDX was negotiated. */
  readonly eventIdx: boolean
  /** VIRTIO_F_IN_ORDER was negotiated; default false. */
  readonly inOrder?: boolean
  /** Notifies the device. */
  readonly kick: () => void
  /** Where the ring starts, as SET_VRING_BASE says it; default {@link PACKED_BASE}. Nothing is in flight there. */
  readonly base?: number
  /** Behind a vIOMMU. */
  readonly translate?: Translate
}

/** One descriptor for {@link PackedDriver.issueRaw}. */
export interface RawDescriptor {
  /** Up to 2^64 − 1. */
  readonly address: number | bigint
  readonly length: number
  readonly id: number
  /** NEXT, WRITE, INDIRECT and any other; AVAIL and USED here turn round what would make it available. */
  readonly flags: number
}

/**
 * Both indices 0, both wrap counters 1 (virtio 1.3 §2.8.1; vhost-user.rst "Vring descriptor indices for packed
 * virtqueues").
 */
export const PACKED_BASE = 0x8000_8000

/** Bytes of the three parts. */
export function packedRingBytes(size: number): { descriptors: number; driverEvent: number; deviceEvent: number } {
  return { descriptors: VIRTQ_DESC_SIZE * size, driverEvent: 4, deviceEvent: 4 }
}

const STATE = VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED

export class PackedDriver implements VirtqueueDriver {
  readonly size: number
  readonly counters: DriverCounters = { issued: 0, completed: 0, kicks: 0, suppressedKicks: 0 }
  written = 0
  inFlight = 0

  readonly #eventIdx: boolean
  readonly #kick: () => void
  readonly #base: number
  // The descriptor ring, in u16 and u32 words: low, high, length, id | flags << 16.
  readonly #ring16: Uint16Array
  readonly #ring32: Uint32Array
  readonly #ring16At: number
  readonly #ring32At: number
  // The event structures as one word each, so that neither side sees half of one: offset, wrap << 15, flags << 16.
  readonly #driverEvent: Uint32Array
  readonly #driverEventAt: number
  readonly #deviceEvent: Uint32Array
  readonly #deviceEventAt: number

  readonly #chains: ChainStore
  readonly #flying: Uint8Array
  /** Places in the ring of the chain in flight under a buffer id. */
  readonly #slots: Uint16Array
  #availSlot = 0
  #availWrap = 1
  #usedSlot = 0
  #usedWrap = 1
  /** Descriptors and chains that were issued and not published, where the first one's flags go, and these flags. */
  #added = 0
  #addedChains = 0
  #firstAt = 0
  #firstFlags = 0
  #callsOff = false

  readonly #order: IssueOrder | undefined
  /** Chains that a used descriptor covers which `pop` has read, and that descriptor's length in its turn. */
  #batch = 0
  #batchWritten = 0

  /** @throws RangeError for a size that no packed ring has, or a base at which something would be in flight */
  constructor(options: PackedDriverOptions) {
    const { size, areas } = options
    if (!(Number.isInteger(size) && size >= 1 && size <= VIRTQ_MAX_SIZE)) {
      throw new RangeError(`a packed ring has 1 … ${VIRTQ_MAX_SIZE} entries, not ${size}`)
    }
    this.size = size
    this.#eventIdx = options.eventIdx
    this.#kick = options.kick
    this.#ring16 = new Uint16Array(areas.descriptors.buffer)
    this.#ring32 = new Uint32Array(areas.descriptors.buffer)
    this.#ring16At = areas.descriptors.offset / 2
    this.#ring32At = areas.descriptors.offset / 4
    this.#driverEvent = new Uint32Array(areas.driverEvent.buffer)
    this.#driverEventAt = areas.driverEvent.offset / 4
    this.#deviceEvent = new Uint32Array(areas.deviceEvent.buffer)
    this.#deviceEventAt = areas.deviceEvent.offset / 4
    this.#chains = new ChainStore(size, PACKED_TABLE, options.translate)
    this.#flying = this.#chains.flying
    this.#slots = new Uint16Array(size)
    this.#order = options.inOrder === true ? new IssueOrder(size) : undefined
    this.#base = options.base ?? PACKED_BASE
    this.reset()
  }

  get base(): number {
    const half = this.#usedSlot | (this.#usedWrap << 15)
    return (half | (half << 16)) >>> 0
  }

  get freeDescriptors(): number {
    return this.#chains.free
  }

  reset(base = this.#base): void {
    const half = base & 0xffff
    if (base >>> 16 !== half || (half & 0x7fff) >= this.size) {
      throw new RangeError(
        `a packed ring of ${this.size} without anything in flight can't start at 0x${base.toString(16)}`
      )
    }
    this.#chains.reset()
    this.#order?.clear()
    this.#batch = this.inFlight = this.#added = this.#addedChains = 0
    this.#availSlot = this.#usedSlot = half & 0x7fff
    this.#availWrap = this.#usedWrap = half >> 15
    // As if everything before the base had been used in this round and the rest in the one before; at the usual base
    // that is a ring of zeroes, as it has to be (virtio 1.3 §2.8.13).
    for (let slot = 0; slot < this.size; slot++) {
      const used = slot < this.#usedSlot ? this.#usedWrap : 1 - this.#usedWrap
      this.writeDescriptor(slot, 0, 0, 0, used === 1 ? STATE : 0)
    }
    const calls = this.#callsOff ? RING_EVENT_FLAGS_DISABLE : RING_EVENT_FLAGS_ENABLE
    this.#driverEvent[this.#driverEventAt] = calls << 16
    this.#deviceEvent[this.#deviceEventAt] = 0
  }

  build(segments: readonly Segment[], table?: TableMemory): number {
    return this.#chains.build(segments, table)
  }

  setWritable(chain: number, segment: number, writable: boolean): void {
    this.#chains.setWritable(chain, segment, writable)
  }

  release(chain: number): void {
    this.#chains.release(chain)
  }

  issue(chain: number): void {
    const chains = this.#chains
    const count = chains.count[chain] as number
    const ring16 = this.#ring16
    const ring32 = this.#ring32
    let index = chain
    for (let left = count; left > 0; left--) {
      const slot = this.#availSlot
      const at32 = this.#ring32At + slot * 4
      ring32[at32] = chains.low[index] as number
      ring32[at32 + 1] = chains.high[index] as number
      ring32[at32 + 2] = chains.length[index] as number
      const at16 = this.#ring16At + slot * 8
      // The device goes by the id of the last one; all have it, as in most drivers.
      ring16[at16 + 6] = chain
      this.#put(at16 + 7, chains.flags[index] as number)
      index = chains.next[index] as number
    }
    this.#issued(chain, count)
  }

  publish(): boolean {
    const added = this.#added
    if (added === 0) return false
    this.#show()
    // ORDER: seq_cst, after the store in #show; pairs with the device's store of its event structure before its last
    // look at the ring: one of the two sees the other.
    const event = Atomics.load(this.#deviceEvent, this.#deviceEventAt)
    if (!wantsKick(event, this.#eventIdx, this.#availSlot, this.#availWrap, this.size, added)) {
      this.counters.suppressedKicks++
      return false
    }
    this.kickRaw()
    return true
  }

  pop(): number {
    if (this.#batch > 0) return this.#popBatch()
    const at = this.#ring16At + this.#usedSlot * 8
    // ORDER: load of the flags before id and length; pairs with the device's release store of the flags.
    const flags = Atomics.load(this.#ring16, at + 7)
    if ((flags & STATE) !== (this.#usedWrap === 1 ? STATE : 0)) return -1
    const id = this.#ring16[at + 6] as number
    // Without WRITE the length is reserved (virtio 1.3 §2.8.4).
    const written =
      (flags & VIRTQ_DESC_F_WRITE) === 0 ? 0 : (this.#ring32[this.#ring32At + this.#usedSlot * 4 + 2] as number)
    if (id >= this.size || this.#flying[id] !== 1) {
      throw new Error(`the device used buffer ${id}, which it doesn't have (at ${this.#usedSlot} of the ring)`)
    }
    if (this.#order !== undefined) return this.#startBatch(this.#order, id, written)
    this.written = written
    this.#skip(this.#slots[id] as number)
    return this.#took(id)
  }

  hasUsed(): boolean {
    if (this.#batch > 0) return true
    // ORDER: an observation; `pop` looks again.
    const flags = Atomics.load(this.#ring16, this.#ring16At + this.#usedSlot * 8 + 7)
    return (flags & STATE) === (this.#usedWrap === 1 ? STATE : 0)
  }

  pending(): number {
    let chains = this.#batch
    let slot = this.#usedSlot
    let wrap = this.#usedWrap
    while (chains < this.inFlight) {
      // ORDER: as in `pop`.
      const flags = Atomics.load(this.#ring16, this.#ring16At + slot * 8 + 7)
      const id = this.#ring16[this.#ring16At + slot * 8 + 6] as number
      if ((flags & STATE) !== (wrap === 1 ? STATE : 0) || id >= this.size || this.#flying[id] !== 1) break
      const first = chains
      chains = this.#order === undefined ? chains + 1 : this.#order.before(id) + 1
      if (chains <= first) break
      for (let i = first; i < chains; i++) slot += this.#slots[this.#order?.at(i) ?? id] as number
      if (slot >= this.size) {
        slot -= this.size
        wrap = 1 - wrap
      }
    }
    return chains
  }

  enableCalls(): boolean {
    this.#callsOff = false
    const event = this.#eventIdx
      ? this.#usedSlot | (this.#usedWrap << 15) | (RING_EVENT_FLAGS_DESC << 16)
      : RING_EVENT_FLAGS_ENABLE << 16
    // ORDER: the wish for calls before the last look at the ring. Pairs with the device's store of used flags before
    // its read of this structure: one of the two sees the other.
    Atomics.store(this.#driverEvent, this.#driverEventAt, event)
    return this.hasUsed()
  }

  disableCalls(): void {
    this.#callsOff = true
    // ORDER: a hint, ordered with nothing; atomic so that the store isn't torn or delayed for good.
    Atomics.store(this.#driverEvent, this.#driverEventAt, RING_EVENT_FLAGS_DISABLE << 16)
  }

  kickRaw(): void {
    this.counters.kicks++
    this.#kick()
  }

  // ---- raw access: for rings that no honest driver makes

  /**
   * Writes the descriptor at a place of the ring, whatever is there.
   * @param address up to 2^64 − 1
   * @param flags all 16 bits
   */
  writeDescriptor(slot: number, address: number | bigint, length: number, id: number, flags: number): void {
    const at32 = this.#ring32At + slot * 4
    if (typeof address === 'bigint') {
      this.#ring32[at32] = Number(address & 0xffff_ffffn)
      this.#ring32[at32 + 1] = Number(address >> 32n)
    } else {
      this.#ring32[at32] = address % 0x1_0000_0000
      this.#ring32[at32 + 1] = Math.floor(address / 0x1_0000_0000)
    }
    this.#ring32[at32 + 2] = length
    const at16 = this.#ring16At + slot * 8
    this.#ring16[at16 + 6] = id
    // ORDER: the flags after the rest.
    Atomics.store(this.#ring16, at16 + 7, flags & 0xffff)
  }

  /** What stands at a place of the ring. */
  readDescriptor(slot: number): { address: bigint; length: number; id: number; flags: number } {
    const at32 = this.#ring32At + slot * 4
    const at16 = this.#ring16At + slot * 8
    // ORDER: an observation only.
    const flags = Atomics.load(this.#ring16, at16 + 7)
    const address = BigInt(this.#ring32[at32] as number) | (BigInt(this.#ring32[at32 + 1] as number) << 32n)
    return { address, length: this.#ring32[at32 + 2] as number, id: this.#ring16[at16 + 6] as number, flags }
  }

  /**
   * Puts any descriptors into the next places of the ring; `publishRaw` shows them. They count as one chain in flight
   * under the last one's id, when that is in range and free.
   */
  issueRaw(descriptors: readonly RawDescriptor[]): void {
    for (const { address, length, id, flags } of descriptors) {
      const slot = this.#availSlot
      const at16 = this.#ring16At + slot * 8
      const before = this.#ring16[at16 + 7] as number
      this.writeDescriptor(slot, address, length, id, before)
      this.#put(at16 + 7, flags)
    }
    const id = descriptors.at(-1)?.id ?? this.size
    if (id < this.size && this.#flying[id] !== 1) this.#issued(id, descriptors.length)
  }

  /** Shows what was issued, and kicks, whatever the device wants. */
  publishRaw(): void {
    if (this.#added > 0) this.#show()
    this.kickRaw()
  }

  /** AVAIL and USED as they make a descriptor available in the round of `wrap`. */
  availFlags(wrap = this.#availWrap): number {
    return wrap === 1 ? VIRTQ_DESC_F_AVAIL : VIRTQ_DESC_F_USED
  }

  /** Where the next descriptor goes, and in what round. */
  get availableSlot(): number {
    return this.#availSlot
  }

  get availableWrap(): number {
    return this.#availWrap
  }

  /** Where the device puts the next used descriptor, and in what round. */
  get usedSlot(): number {
    return this.#usedSlot
  }

  get usedWrap(): number {
    return this.#usedWrap
  }

  /** What the device wrote about the kicks that it wants. */
  get deviceEvent(): { slot: number; wrap: number; flags: number } {
    return eventOf(Atomics.load(this.#deviceEvent, this.#deviceEventAt))
  }

  /** What it was told about calls. */
  get driverEvent(): { slot: number; wrap: number; flags: number } {
    return eventOf(Atomics.load(this.#driverEvent, this.#driverEventAt))
  }

  /**
   * Asks for calls in any way.
   * @param slot 15 bits
   * @param wrap 0 or 1
   * @param flags 16 bits, RING_EVENT_FLAGS_* are the lowest two
   */
  setEvent(slot: number, wrap: number, flags: number): void {
    this.#callsOff = false
    // ORDER: see enableCalls.
    Atomics.store(this.#driverEvent, this.#driverEventAt, (slot & 0x7fff) | ((wrap & 1) << 15) | (flags << 16))
  }

  // ---- inside

  /**
   * Writes the flags of the descriptor at the next place, or keeps them when it is the first of its batch; moves on.
   */
  #put(flagsAt: number, flags: number): void {
    const all = flags ^ (this.#availWrap === 1 ? VIRTQ_DESC_F_AVAIL : VIRTQ_DESC_F_USED)
    if (this.#added === 0) {
      this.#firstAt = flagsAt
      this.#firstFlags = all
    } else this.#ring16[flagsAt] = all
    this.#added++
    if (++this.#availSlot < this.size) return
    this.#availSlot = 0
    this.#availWrap ^= 1
  }

  #issued(id: number, slots: number): void {
    this.#slots[id] = slots
    this.#flying[id] = 1
    this.#addedChains++
    this.inFlight++
    this.#order?.push(id)
  }

  #show(): void {
    this.counters.issued += this.#addedChains
    this.#added = this.#addedChains = 0
    // ORDER: sequentially consistent store of the batch's first flags: all its descriptors before it, the read of the
    // device's wish for kicks after it. Pairs with the device's load of these flags.
    Atomics.store(this.#ring16, this.#firstAt, this.#firstFlags)
  }

  /** One used descriptor may stand for several buffers: the last of them is named (virtio 1.3 §2.8.8). */
  #startBatch(order: IssueOrder, id: number, written: number): number {
    const before = order.before(id)
    if (before < 0) throw new Error(`the device used buffer ${id}, which isn't in its order`)
    let slots = 0
    for (let i = 0; i <= before; i++) slots += this.#slots[order.at(i)] as number
    this.#skip(slots)
    this.#batch = before + 1
    this.#batchWritten = written
    return this.#popBatch()
  }

  #popBatch(): number {
    const order = this.#order as IssueOrder
    const chain = order.shift()
    this.#batch--
    // The ones that have no descriptor of their own were used completely.
    this.written = this.#batch === 0 ? this.#batchWritten : (this.#chains.writable[chain] as number)
    return this.#took(chain)
  }

  #skip(slots: number): void {
    this.#usedSlot += slots
    if (this.#usedSlot < this.size) return
    this.#usedSlot -= this.size
    this.#usedWrap ^= 1
  }

  #took(chain: number): number {
    this.#flying[chain] = 0
    this.inFlight--
    this.counters.completed++
    return chain
  }
}

/**
 * Whether the device wants a kick (virtio 1.3 §2.8.10).
 * @param event its event structure as one word @param slot where the driver stands after `added` descriptors, in round
 * `wrap`
 */
export function wantsKick(
  event: number,
  eventIdx: boolean,
  slot: number,
  wrap: number,
  size: number,
  added: number
): boolean {
  const flags = (event >>> 16) & 3
  if (!eventIdx || flags !== RING_EVENT_FLAGS_DESC) return flags !== RING_EVENT_FLAGS_DISABLE
  // A place of the other round lies one ring before this one's.
  const place = (event & 0x7fff) - (((event >>> 15) & 1) === wrap ? 0 : size)
  return needEvent(place, slot, slot - added)
}

/** Writes an indirect table (virtio 1.3 §2.8.7): entries in sequence, WRITE is their only flag. */
export function writePackedTable(table: TableMemory, segments: readonly Segment[]): void {
  const view = new DataView(table.bytes.buffer, table.bytes.byteOffset, table.bytes.byteLength)
  for (const [i, segment] of segments.entries()) {
    const at = i * VIRTQ_DESC_SIZE
    view.setBigUint64(at, BigInt(segment.address), true)
    view.setUint32(at + 8, segment.length, true)
    view.setUint16(at + 12, 0, true)
    view.setUint16(at + 14, segment.writable ? VIRTQ_DESC_F_WRITE : 0, true)
  }
}

const PACKED_TABLE: TableFormat = { write: writePackedTable, flagsOffset: 14 }

function eventOf(word: number): { slot: number; wrap: number; flags: number } {
  return { slot: word & 0x7fff, wrap: (word >>> 15) & 1, flags: word >>> 16 }
}

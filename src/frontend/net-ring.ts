/**
 * The driver half of a split ring for loads of packets (virtio 1.3 §2.7): chains of one length that go round and round,
 * taken and given back in batches. {@link SplitDriver} can do anything and costs some 30 ns per chain; here a chain costs
 * a few. It owns the ring's indices and the count of what is in flight. It must not know packets, sockets or eventfds.
 *
 * Two passes per batch: `take` copies the used elements out, the owner looks at them, `giveBack` makes the same chains
 * available again. A chain is in flight or taken, never both, so a device that uses one twice is found out.
 */
import {
  VIRTQ_AVAIL_F_NO_INTERRUPT,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
  VIRTQ_USED_F_NO_NOTIFY,
} from '../virtio/constants.ts'
import type { DriverCounters } from './driver.ts'
import { FrontendError } from './errors.ts'
import { needEvent, type SplitRingAreas } from './split-driver.ts'

export interface LoadRingOptions {
  readonly size: number
  /** VIRTIO_F_EVENT_IDX was negotiated. */
  readonly eventIdx: boolean
  /** Notifies the device. */
  readonly kick: () => void
  /** For messages. */
  readonly name: string
}

export interface PacketRingOptions extends LoadRingOptions {
  readonly areas: SplitRingAreas
}

/** A ring of either format as a load of packets uses it: {@link PacketRing}, {@link PackedPacketRing}. */
export interface LoadRing {
  readonly size: number
  readonly counters: DriverCounters
  /** What `take` took: the chain, and the bytes that the device says it wrote. */
  readonly heads: Uint16Array
  readonly lengths: Uint32Array
  readonly inFlight: number
  /** Describes a descriptor. @param next index of the chain's next one, or -1 */
  describe(index: number, address: number, length: number, writable: boolean, next: number): void
  /** Puts the chain that starts at `head` into the ring, to be published. */
  issue(head: number): void
  /** Shows what was issued to the device; kicks it unless it asked not to be. */
  publish(): void
  /**
   * Takes everything that the device has used into `heads` and `lengths`, in the device's order.
   * @param least fewer than that are left there
   * @returns how many, 0 when there are fewer than `least`
   * @throws FrontendError reply when the device uses what it doesn't have
   */
  take(least: number): number
  /** Makes the first `count` chains of `heads` available again and publishes them. */
  giveBack(count: number): void
  /**
   * Asks for a call once `chains` more have been used (exact with EVENT_IDX, else at the next one). Returns true when
   * they are there already (then no call may come for them).
   */
  enableCalls(chains: number): boolean
  /** Asks for no calls. It is a hint: one may still come. */
  disableCalls(): void
}

export class PacketRing implements LoadRing {
  readonly size: number
  readonly counters: DriverCounters = { issued: 0, completed: 0, kicks: 0, suppressedKicks: 0 }
  readonly heads: Uint16Array
  readonly lengths: Uint32Array
  inFlight = 0

  readonly #name: string
  readonly #mask: number
  readonly #eventIdx: boolean
  readonly #kick: () => void
  readonly #desc16: Uint16Array
  readonly #desc32: Uint32Array
  readonly #desc16At: number
  readonly #desc32At: number
  readonly #avail: Uint16Array
  readonly #availAt: number
  readonly #used16: Uint16Array
  readonly #used32: Uint32Array
  readonly #used16At: number
  readonly #used32At: number
  /** Private copy of the available ring's entries: it is not read back from shared memory. */
  readonly #entries: Uint16Array
  readonly #flying: Uint8Array
  #availIdx = 0
  #published = 0
  #lastUsed = 0
  #usedEvent = 0
  #callsOff = false

  /** The ring's memory is zeroed, and both its indices start at 0. */
  constructor(options: PacketRingOptions) {
    const { size, areas } = options
    this.size = size
    this.#name = options.name
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
    this.#entries = new Uint16Array(size)
    this.#flying = new Uint8Array(size)
    this.heads = new Uint16Array(size)
    this.lengths = new Uint32Array(size)
  }

  describe(index: number, address: number, length: number, writable: boolean, next: number): void {
    const at32 = this.#desc32At + index * 4
    this.#desc32[at32] = address % 0x1_0000_0000
    this.#desc32[at32 + 1] = Math.floor(address / 0x1_0000_0000)
    this.#desc32[at32 + 2] = length
    const at16 = this.#desc16At + index * 8
    this.#desc16[at16 + 6] = (writable ? VIRTQ_DESC_F_WRITE : 0) | (next < 0 ? 0 : VIRTQ_DESC_F_NEXT)
    this.#desc16[at16 + 7] = next < 0 ? 0 : next
  }

  issue(head: number): void {
    const at = this.#availIdx & this.#mask
    this.#availIdx = (this.#availIdx + 1) & 0xffff
    this.#entries[at] = head
    this.#avail[this.#availAt + 2 + at] = head
    this.#flying[head] = 1
    this.inFlight++
  }

  publish(): void {
    const previous = this.#published
    const next = this.#availIdx
    if (next === previous) return
    this.#published = next
    const { counters } = this
    counters.issued += (next - previous) & 0xffff
    // ORDER: sequentially consistent store of idx: ring entries and descriptors before it, the read of the device's
    // wish for kicks after it. Pairs with the device's store of avail_event (or flags) before its last look at idx.
    Atomics.store(this.#avail, this.#availAt + 1, next)
    const wanted = this.#eventIdx
      ? needEvent(Atomics.load(this.#used16, this.#used16At + 2 + 4 * this.size), next, previous)
      : (Atomics.load(this.#used16, this.#used16At) & VIRTQ_USED_F_NO_NOTIFY) === 0
    if (wanted) {
      counters.kicks++
      this.#kick()
    } else counters.suppressedKicks++
  }

  take(least: number): number {
    // ORDER: load of the device's idx before its used elements; pairs with the device's release store of idx.
    const count = (Atomics.load(this.#used16, this.#used16At + 1) - this.#lastUsed) & 0xffff
    if (count < least) return 0
    if (count > this.inFlight) this.#lie(`its used index shows ${count} more chains with ${this.inFlight} in flight`)
    const used = this.#used32
    const at = this.#used32At + 1
    const mask = this.#mask
    const size = this.size
    const heads = this.heads
    const lengths = this.lengths
    const flying = this.#flying
    const last = this.#lastUsed
    for (let i = 0; i < count; i++) {
      const element = at + 2 * ((last + i) & mask)
      const head = used[element] as number
      if (head >= size || flying[head] !== 1) this.#lie(`it used chain ${head}, which it doesn't have`)
      flying[head] = 0
      heads[i] = head
      lengths[i] = used[element + 1] as number
    }
    this.#lastUsed = (last + count) & 0xffff
    this.inFlight -= count
    this.counters.completed += count
    // An event index that stays behind would be passed again after 65536 chains, so it is moved along now and then.
    if (this.#callsOff && this.#eventIdx && ((this.#lastUsed - this.#usedEvent) & 0xffff) > 0x4000) this.disableCalls()
    return count
  }

  giveBack(count: number): void {
    const heads = this.heads
    const entries = this.#entries
    const avail = this.#avail
    const availAt = this.#availAt + 2
    const flying = this.#flying
    const mask = this.#mask
    const first = this.#availIdx
    for (let i = 0; i < count; i++) {
      const head = heads[i] as number
      const at = (first + i) & mask
      // A chain that comes back in its order finds its old entry: not writing it leaves the line with the device's processor.
      if (entries[at] !== head) {
        entries[at] = head
        avail[availAt + at] = head
      }
      flying[head] = 1
    }
    this.#availIdx = (first + count) & 0xffff
    this.inFlight += count
    this.publish()
  }

  enableCalls(chains: number): boolean {
    this.#callsOff = false
    // ORDER: the wish for calls before the last look at the used index (the load below). Pairs with the device's
    // store of idx before its read of used_event or of the flags: one of the two sees the other.
    if (this.#eventIdx) this.#usedEventStore((this.#lastUsed + chains - 1) & 0xffff)
    else Atomics.store(this.#avail, this.#availAt, 0)
    return ((Atomics.load(this.#used16, this.#used16At + 1) - this.#lastUsed) & 0xffff) >= chains
  }

  disableCalls(): void {
    this.#callsOff = true
    if (this.#eventIdx) this.#usedEventStore((this.#lastUsed - 1) & 0xffff)
    // ORDER: a hint, ordered with nothing; atomic so that the store isn't torn or delayed for good.
    else Atomics.store(this.#avail, this.#availAt, VIRTQ_AVAIL_F_NO_INTERRUPT)
  }

  #usedEventStore(value: number): void {
    this.#usedEvent = value
    // ORDER: see enableCalls.
    Atomics.store(this.#avail, this.#availAt + 2 + this.size, value)
  }

  #lie(what: string): never {
    throw new FrontendError(this.#name, 'reply', `the device breaks the ring: ${what}`)
  }
}

/**
 * The driver half of a packed ring for loads of packets (virtio 1.3 §2.8): what {@link PacketRing} is for split rings,
 * with the same two passes per batch. {@link PackedDriver} can do anything and costs more. It owns the ring's places
 * and the count of what is in flight. It must not know packets, sockets or eventfds.
 *
 * All chains have one length, so the places that the device will use are known beforehand.
 */
import {
  RING_EVENT_FLAGS_DESC,
  RING_EVENT_FLAGS_DISABLE,
  RING_EVENT_FLAGS_ENABLE,
  VIRTQ_DESC_F_AVAIL,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_USED,
  VIRTQ_DESC_F_WRITE,
} from '../virtio/constants.ts'
import type { DriverCounters } from './driver.ts'
import { FrontendError } from './errors.ts'
import type { LoadRing, LoadRingOptions } from './net-ring.ts'
import { type PackedRingAreas, wantsKick } from './packed-driver.ts'

export interface PackedPacketRingOptions extends LoadRingOptions {
  readonly areas: PackedRingAreas
}

const STATE = VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED

export class PackedPacketRing implements LoadRing {
  readonly size: number
  readonly counters: DriverCounters = { issued: 0, completed: 0, kicks: 0, suppressedKicks: 0 }
  readonly heads: Uint16Array
  readonly lengths: Uint32Array
  inFlight = 0

  readonly #name: string
  readonly #eventIdx: boolean
  readonly #kick: () => void
  readonly #ring16: Uint16Array
  readonly #ring32: Uint32Array
  readonly #ring16At: number
  readonly #ring32At: number
  readonly #driverEvent: Uint32Array
  readonly #driverEventAt: number
  readonly #deviceEvent: Uint32Array
  readonly #deviceEventAt: number
  // The chains, private: the ring's descriptors are overwritten by the device.
  readonly #low: Uint32Array
  readonly #high: Uint32Array
  readonly #length: Uint32Array
  readonly #flags: Uint16Array
  readonly #flying: Uint8Array
  /** Descriptors of every chain, 1 or 2; a chain's lie one behind the other. */
  #chain = 1
  #availSlot = 0
  #availWrap = 1
  #usedSlot = 0
  #usedWrap = 1
  #added = 0
  #addedChains = 0
  #firstAt = 0
  #firstFlags = 0

  /** The ring's memory is zeroed, and it starts at place 0 in round 1. */
  constructor(options: PackedPacketRingOptions) {
    const { size, areas } = options
    this.size = size
    this.#name = options.name
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
    this.#low = new Uint32Array(size)
    this.#high = new Uint32Array(size)
    this.#length = new Uint32Array(size)
    this.#flags = new Uint16Array(size)
    this.#flying = new Uint8Array(size)
    this.heads = new Uint16Array(size)
    this.lengths = new Uint32Array(size)
  }

  describe(index: number, address: number, length: number, writable: boolean, next: number): void {
    this.#low[index] = address % 0x1_0000_0000
    this.#high[index] = Math.floor(address / 0x1_0000_0000)
    this.#length[index] = length
    this.#flags[index] = (writable ? VIRTQ_DESC_F_WRITE : 0) | (next < 0 ? 0 : VIRTQ_DESC_F_NEXT)
    if (next < 0) return
    // 2k and 2k + 1 belong together, as they do for a source whose headers lie apart.
    if (next !== index + 1 || index % 2 !== 0) throw new RangeError(`no chain goes from ${index} to ${next} here`)
    this.#chain = 2
  }

  issue(head: number): void {
    this.#place(head)
    this.#flying[head] = 1
    this.inFlight++
  }

  publish(): void {
    const added = this.#added
    if (added === 0) return
    const { counters } = this
    counters.issued += this.#addedChains
    this.#added = this.#addedChains = 0
    // ORDER: sequentially consistent store of the batch's first flags: all its descriptors before it, the read of the
    // device's wish for kicks after it. Pairs with the device's load of these flags and its store of that wish.
    Atomics.store(this.#ring16, this.#firstAt, this.#firstFlags)
    const event = Atomics.load(this.#deviceEvent, this.#deviceEventAt)
    if (wantsKick(event, this.#eventIdx, this.#availSlot, this.#availWrap, this.size, added)) {
      counters.kicks++
      this.#kick()
    } else counters.suppressedKicks++
  }

  take(least: number): number {
    if (!this.#isUsed(least)) return 0
    const ring16 = this.#ring16
    const flying = this.#flying
    const size = this.size
    const chain = this.#chain
    const most = this.inFlight
    let slot = this.#usedSlot
    let wrap = this.#usedWrap
    let count = 0
    while (count < most) {
      const at = this.#ring16At + slot * 8
      // ORDER: load of the flags before id and length; pairs with the device's release store of the flags.
      const flags = Atomics.load(ring16, at + 7)
      if ((flags & STATE) !== (wrap === 1 ? STATE : 0)) break
      const head = ring16[at + 6] as number
      if (head >= size || flying[head] !== 1) this.#lie(`it used buffer ${head}, which it doesn't have`)
      flying[head] = 0
      this.heads[count] = head
      const written = (flags & VIRTQ_DESC_F_WRITE) === 0 ? 0 : (this.#ring32[this.#ring32At + slot * 4 + 2] as number)
      this.lengths[count] = written
      count++
      slot += chain
      if (slot >= size) {
        slot -= size
        wrap ^= 1
      }
    }
    this.#usedSlot = slot
    this.#usedWrap = wrap
    this.inFlight -= count
    this.counters.completed += count
    return count
  }

  giveBack(count: number): void {
    const heads = this.heads
    const flying = this.#flying
    for (let i = 0; i < count; i++) {
      const head = heads[i] as number
      this.#place(head)
      flying[head] = 1
    }
    this.inFlight += count
    this.publish()
  }

  enableCalls(chains: number): boolean {
    const ahead = this.#usedSlot + (chains - 1) * this.#chain
    const slot = ahead % this.size
    const wrap = this.#usedWrap ^ (ahead >= this.size ? 1 : 0)
    const event = this.#eventIdx ? slot | (wrap << 15) | (RING_EVENT_FLAGS_DESC << 16) : RING_EVENT_FLAGS_ENABLE << 16
    // ORDER: the wish for calls before the last look at the ring. Pairs with the device's store of used flags before
    // its read of this structure: one of the two sees the other.
    Atomics.store(this.#driverEvent, this.#driverEventAt, event)
    return this.#isUsed(chains)
  }

  disableCalls(): void {
    // ORDER: a hint, ordered with nothing; atomic so that the store isn't torn or delayed for good.
    Atomics.store(this.#driverEvent, this.#driverEventAt, RING_EVENT_FLAGS_DISABLE << 16)
  }

  /** Whether the device has used `chains` chains: it uses places in order, so the last of them tells. */
  #isUsed(chains: number): boolean {
    if (chains > this.inFlight) return false
    let slot = this.#usedSlot + (chains - 1) * this.#chain
    let wrap = this.#usedWrap
    if (slot >= this.size) {
      slot -= this.size
      wrap ^= 1
    }
    // ORDER: an observation; `take` looks at each.
    return (Atomics.load(this.#ring16, this.#ring16At + slot * 8 + 7) & STATE) === (wrap === 1 ? STATE : 0)
  }

  #place(head: number): void {
    const ring16 = this.#ring16
    const ring32 = this.#ring32
    for (let index = head; index < head + this.#chain; index++) {
      const slot = this.#availSlot
      const at32 = this.#ring32At + slot * 4
      const at16 = this.#ring16At + slot * 8
      ring32[at32] = this.#low[index] as number
      ring32[at32 + 1] = this.#high[index] as number
      ring32[at32 + 2] = this.#length[index] as number
      ring16[at16 + 6] = head
      const flags = (this.#flags[index] as number) | (this.#availWrap === 1 ? VIRTQ_DESC_F_AVAIL : VIRTQ_DESC_F_USED)
      if (this.#added++ === 0) {
        this.#firstAt = at16 + 7
        this.#firstFlags = flags
      } else ring16[at16 + 7] = flags
      if (++this.#availSlot === this.size) {
        this.#availSlot = 0
        this.#availWrap ^= 1
      }
    }
    this.#addedChains++
  }

  #lie(what: string): never {
    throw new FrontendError(this.#name, 'reply', `the device breaks the ring: ${what}`)
  }
}

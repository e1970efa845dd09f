/**
 * The device side of a split virtqueue (virtio 1.3 §2.7) over guest memory. Everything the driver wrote is read once
 * into a local and then checked. A violated rule sets `error` and ends this ring; it never throws and never touches
 * memory outside the regions.
 */
import { Chain } from './chain.ts'
import {
  VIRTQ_AVAIL_F_NO_INTERRUPT,
  VIRTQ_DESC_F_INDIRECT,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
  VIRTQ_DESC_SIZE,
  VIRTQ_MAX_SIZE,
  VIRTQ_USED_F_NO_NOTIFY,
} from './constants.ts'
import { RING_ERRORS, RingError, type RingErrorCode } from './errors.ts'
import type { GuestMemory, MemoryRegion } from './memory.ts'
import type { Vring, VringConfig } from './vring.ts'

/**
 * Bytes of the three parts, with the event words when EVENT_IDX was negotiated (virtio 1.3 §2.7, "Queue Size" table).
 */
export function splitRingSizes(
  size: number,
  eventIdx: boolean
): { descriptor: number; driver: number; device: number } {
  const event = eventIdx ? 2 : 0
  return { descriptor: VIRTQ_DESC_SIZE * size, driver: 4 + 2 * size + event, device: 4 + 8 * size + event }
}

export class SplitRing implements Vring {
  readonly size: number
  error: RingError | undefined
  readonly #config: VringConfig
  readonly #mask: number
  readonly #eventIdx: boolean
  readonly #indirect: boolean
  readonly #chains: (Chain | undefined)[]
  #memory: GuestMemory
  // The descriptor table as words: 4 per descriptor: addr low, addr high, len, flags | next << 16.
  #descriptors: Uint32Array
  // The avail ring: [0] flags, [1] idx, [2 + i] ring, [2 + size] used_event.
  #avail: Uint16Array
  // The used ring: as u16 [0] flags, [1] idx, [2 + 4 * size] avail_event; as u32 [1 + 2 * i] id, [2 + 2 * i] len.
  #used16: Uint16Array
  #used32: Uint32Array
  /** The next avail entry that we will pop, free-running u16. */
  #lastAvail: number
  /** avail.idx when we last read it. */
  #seenAvail: number
  /** The next used entry that we will write, and the used.idx that the driver can see, free-running u16. */
  #usedIdx = 0
  #publishedIdx = 0
  /**
   * Whether a call decision was made since the start: the first one is never suppressed, since used_event may be
   * stale.
   */
  #signalled = false

  constructor(memory: GuestMemory, config: VringConfig) {
    this.#config = config
    this.size = config.size
    this.#mask = config.size - 1
    this.#eventIdx = config.eventIdx
    this.#indirect = config.indirect
    // Filled with undefined, not holes: the elements stay PACKED.
    this.#chains = new Array<Chain | undefined>(config.size).fill(undefined)
    this.#lastAvail = config.base & 0xffff
    this.#seenAvail = this.#lastAvail
    this.#memory = memory
    this.#descriptors = new Uint32Array(0)
    this.#avail = new Uint16Array(0)
    this.#used16 = new Uint16Array(0)
    this.#used32 = new Uint32Array(0)
    this.setMemory(memory)
    if (this.error === undefined) {
      this.#usedIdx = this.#used16[1]!
      this.#publishedIdx = this.#usedIdx
    }
  }

  get base(): number {
    return this.#lastAvail
  }

  setMemory(memory: GuestMemory): void {
    const { size, descriptor, driver, device } = this.#config
    const bytes = splitRingSizes(size, this.#eventIdx)
    const descriptorRegion = memory.contiguous(descriptor, bytes.descriptor)
    const driverRegion = memory.contiguous(driver, bytes.driver)
    const deviceRegion = memory.contiguous(device, bytes.device)
    this.#memory = memory
    if (descriptorRegion === undefined || driverRegion === undefined || deviceRegion === undefined) {
      this.#fail('ERR_RING_MEMORY')
      return
    }
    const at = (region: MemoryRegion, gpa: number) => gpa - region.gpa
    this.#descriptors = new Uint32Array(descriptorRegion.buffer, at(descriptorRegion, descriptor), size * 4)
    this.#avail = new Uint16Array(driverRegion.buffer, at(driverRegion, driver), bytes.driver / 2)
    this.#used16 = new Uint16Array(deviceRegion.buffer, at(deviceRegion, device), bytes.device / 2)
    this.#used32 = new Uint32Array(deviceRegion.buffer, at(deviceRegion, device), 1 + size * 2)
  }

  hasAvail(): boolean {
    if (this.error !== undefined) return false
    // ORDER: acquire, pairs with the driver's release of avail.idx (virtio 1.3 §2.7.13.3).
    return this.#lastAvail !== this.#seenAvail || Atomics.load(this.#avail, 1) !== this.#lastAvail
  }

  chain(head: number): Chain {
    const chain = this.#chains[head]
    if (chain !== undefined) return chain
    const created = new Chain(head)
    this.#chains[head] = created
    return created
  }

  pop(): Chain | undefined {
    if (this.error !== undefined) return undefined
    if (this.#lastAvail === this.#seenAvail) {
      // ORDER: acquire, pairs with the driver's release of avail.idx: entries and descriptors up to it are written.
      const seen = Atomics.load(this.#avail, 1)
      if (seen === this.#lastAvail) return undefined
      // Both are free-running u16: a comparison with `>` would lose chains at the wrap.
      if (((seen - this.#lastAvail) & 0xffff) > this.size) {
        this.#fail('ERR_RING_INDEX')
        return undefined
      }
      this.#seenAvail = seen
    }
    const chain = this.#take(this.#avail[2 + (this.#lastAvail & this.#mask)]!)
    if (chain !== undefined) this.#lastAvail = (this.#lastAvail + 1) & 0xffff
    return chain
  }

  unpop(chain: Chain): void {
    chain.inFlight = false
    this.#lastAvail = (this.#lastAvail - 1) & 0xffff
  }

  #take(head: number): Chain | undefined {
    if (head >= this.size) {
      this.#fail('ERR_RING_HEAD')
      return undefined
    }
    const chain = this.chain(head)
    if (chain.inFlight) {
      this.#fail('ERR_RING_HEAD_BUSY')
      return undefined
    }
    if (!this.#takeSingle(chain, head)) {
      chain.begin(this.#memory)
      if (!this.#walk(chain, head)) return undefined
    }
    chain.inFlight = true
    return chain
  }

  /** A chain of one descriptor, as those of network cards are. Of any other nothing that was read here is used. */
  #takeSingle(chain: Chain, head: number): boolean {
    const table = this.#descriptors
    const word = head * 4
    const flags = table[word + 3]! & 0xffff
    if ((flags & (VIRTQ_DESC_F_NEXT | VIRTQ_DESC_F_INDIRECT)) !== 0) return false
    const gpa = table[word]! + table[word + 1]! * 0x1_0000_0000
    return chain.single(this.#memory, gpa, table[word + 2]!, (flags & VIRTQ_DESC_F_WRITE) !== 0)
  }

  push(chain: Chain, written: number): void {
    chain.inFlight = false
    const slot = 1 + (this.#usedIdx & this.#mask) * 2
    this.#used32[slot] = chain.head
    this.#used32[slot + 1] = written
    this.#usedIdx = (this.#usedIdx + 1) & 0xffff
  }

  publish(): boolean {
    const before = this.#publishedIdx
    const now = this.#usedIdx
    if (before === now) return false
    this.#publishedIdx = now
    // ORDER: release for the used elements above it, and (seq_cst) before the load of used_event or flags below: the
    // driver writes used_event and then reads used.idx, so one of us sees the other (virtio 1.3 §2.7.8.2).
    Atomics.store(this.#used16, 1, now)
    const first = !this.#signalled
    this.#signalled = true
    if (this.#eventIdx) {
      const event = Atomics.load(this.#avail, 2 + this.size)
      // vring_need_event: the driver asked for a call when used.idx passes used_event, in [before, now).
      return first || ((now - event - 1) & 0xffff) < ((now - before) & 0xffff)
    }
    return (Atomics.load(this.#avail, 0) & VIRTQ_AVAIL_F_NO_INTERRUPT) === 0
  }

  suppress(): void {
    // With EVENT_IDX a stale avail_event suppresses by itself: it is passed once in 65536 chains.
    if (!this.#eventIdx && this.error === undefined) this.#used16[0] = VIRTQ_USED_F_NO_NOTIFY
  }

  rearm(): boolean {
    if (this.error !== undefined) return false
    // ORDER: seq_cst store, then the load of avail.idx: the driver stores avail.idx and then loads avail_event or
    // flags.
    if (this.#eventIdx) Atomics.store(this.#used16, 2 + 4 * this.size, this.#lastAvail)
    else Atomics.store(this.#used16, 0, 0)
    return this.hasAvail()
  }

  #fail(code: RingErrorCode): false {
    this.error = new RingError(code, RING_ERRORS[code])
    return false
  }

  /**
   * Follows the chain from `head`, copying each descriptor once, into `chain`. Returns false when the ring is broken.
   */
  #walk(chain: Chain, head: number): boolean {
    const table = this.#descriptors
    let index = head
    // Every descriptor of a chain is another one, so more of them than the table has is a loop.
    for (let walked = 0; walked < this.size; walked++) {
      const word = index * 4
      const low = table[word]!
      const high = table[word + 1]!
      const length = table[word + 2]!
      const flagsAndNext = table[word + 3]!
      const flags = flagsAndNext & 0xffff
      const gpa = low + high * 0x1_0000_0000
      if ((flags & VIRTQ_DESC_F_INDIRECT) !== 0) {
        // Zero or more plain descriptors and then one indirect; WRITE on it is ignored (virtio 1.3 §2.7.5.3.2).
        if (!this.#indirect || (flags & VIRTQ_DESC_F_NEXT) !== 0) return this.#fail('ERR_RING_INDIRECT')
        return this.#walkIndirect(chain, gpa, length)
      }
      if (!this.#add(chain, gpa, length, flags)) return false
      if ((flags & VIRTQ_DESC_F_NEXT) === 0) return true
      index = flagsAndNext >>> 16
      if (index >= this.size) return this.#fail('ERR_RING_NEXT')
    }
    return this.#fail('ERR_RING_LOOP')
  }

  #walkIndirect(chain: Chain, table: number, length: number): boolean {
    const entries = length / VIRTQ_DESC_SIZE
    if (length === 0 || length % VIRTQ_DESC_SIZE !== 0 || entries > VIRTQ_MAX_SIZE)
      return this.#fail('ERR_RING_INDIRECT')
    let index = 0
    for (let walked = 0; walked < entries; walked++) {
      const at = table + index * VIRTQ_DESC_SIZE
      // One look-up per entry: a table may lie across adjacent regions.
      const region = this.#memory.contiguous(at, VIRTQ_DESC_SIZE)
      // Aligned entries are what drivers make; the spec demands 16 bytes of the main table only, so 4 is what we need.
      if (region === undefined || at % 4 !== 0) return this.#fail('ERR_RING_INDIRECT')
      const words = region.words
      const word = (at - region.gpa) / 4
      const low = words[word]!
      const high = words[word + 1]!
      const flagsAndNext = words[word + 3]!
      const flags = flagsAndNext & 0xffff
      if ((flags & VIRTQ_DESC_F_INDIRECT) !== 0) return this.#fail('ERR_RING_INDIRECT')
      if (!this.#add(chain, low + high * 0x1_0000_0000, words[word + 2]!, flags)) return false
      if ((flags & VIRTQ_DESC_F_NEXT) === 0) return true
      index = flagsAndNext >>> 16
      if (index >= entries) return this.#fail('ERR_RING_NEXT')
    }
    return this.#fail('ERR_RING_LOOP')
  }

  #add(chain: Chain, gpa: number, length: number, flags: number): boolean {
    const writable = (flags & VIRTQ_DESC_F_WRITE) !== 0
    if (!writable && chain.count > chain.readableCount) return this.#fail('ERR_RING_ORDER')
    if (chain.readable + chain.writable + length > 0xffff_ffff) return this.#fail('ERR_RING_LENGTH')
    if (!chain.append(this.#memory, gpa, length, writable)) return this.#fail('ERR_RING_ADDRESS')
    return true
  }
}

/**
 * The device side of a split virtqueue (virtio 1.3 §2.7) over guest memory. Everything the driver wrote is read once
 * into a local and then checked. A violated rule sets `error` and ends this ring; it never throws and never touches
 * memory outside the regions.
 */
import type { Chain } from './chain.ts'
import {
  VIRTQ_AVAIL_F_NO_INTERRUPT,
  VIRTQ_DESC_F_INDIRECT,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
  VIRTQ_DESC_SIZE,
  VIRTQ_USED_F_NO_NOTIFY,
} from './constants.ts'
import { InflightError, type SplitInflight } from './inflight.ts'
import { type GuestMemory, IOTLB_READ, IOTLB_WRITE } from './memory.ts'
import { RecoveredChains } from './recovered.ts'
import { RingBase } from './ring-base.ts'
import type { VringConfig } from './vring.ts'

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

export class SplitRing extends RingBase {
  readonly #mask: number
  readonly #eventIdx: boolean
  readonly #indirect: boolean
  readonly #inflight: SplitInflight | undefined
  // The descriptor table as words: 4 per descriptor: addr low, addr high, len, flags | next << 16.
  #descriptors: Uint32Array = new Uint32Array(0)
  // The avail ring: [0] flags, [1] idx, [2 + i] ring, [2 + size] used_event.
  #avail: Uint16Array = new Uint16Array(0)
  // The used ring: as u16 [0] flags, [1] idx, [2 + 4 * size] avail_event; as u32 [1 + 2 * i] id, [2 + 2 * i] len.
  #used16: Uint16Array = new Uint16Array(0)
  #used32: Uint32Array = new Uint32Array(0)
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
  #heads: readonly number[] = []

  constructor(memory: GuestMemory, config: VringConfig, inflight?: SplitInflight) {
    super(memory, config)
    this.#mask = config.size - 1
    this.#eventIdx = config.eventIdx
    this.#indirect = config.indirect
    this.#inflight = inflight
    this.#lastAvail = config.base & 0xffff
    this.#seenAvail = this.#lastAvail
    this.setMemory(memory)
  }

  get base(): number {
    return this.#lastAvail
  }

  protected locate(): boolean {
    const { descriptor, driver, device } = this.config
    const { size } = this
    const bytes = splitRingSizes(size, this.#eventIdx)
    const table = this.area(descriptor, bytes.descriptor, IOTLB_READ)
    if (table === undefined) return false
    const avail = this.area(driver, bytes.driver, IOTLB_READ)
    if (avail === undefined) return false
    // used.idx is read when the ring starts.
    const used = this.area(device, bytes.device, IOTLB_READ | IOTLB_WRITE)
    if (used === undefined) return false
    const usedAt = used.start + device - used.gpa
    this.#descriptors = new Uint32Array(table.buffer, table.start + descriptor - table.gpa, size * 4)
    this.#avail = new Uint16Array(avail.buffer, avail.start + driver - avail.gpa, bytes.driver / 2)
    this.#used16 = new Uint16Array(used.buffer, usedAt, bytes.device / 2)
    this.#used32 = new Uint32Array(used.buffer, usedAt, 1 + size * 2)
    return true
  }

  protected start(): void {
    this.#usedIdx = this.#used16[1]!
    this.#publishedIdx = this.#usedIdx
    if (this.#inflight === undefined) return
    this.#heads = this.#inflight.recover(this.#usedIdx)
    if (this.#inflight.fresh) return
    // More than the driver has made available: the marks are of a ring in another life.
    if (this.#heads.length > ((this.#avail[1]! - this.#usedIdx) & 0xffff))
      throw new InflightError('more chains are in flight than the driver made available')
    // What was popped and not used: a base that was told after a crash is that of the last orderly stop.
    this.#lastAvail = (this.#usedIdx + this.#heads.length) & 0xffff
    this.#seenAvail = this.#lastAvail
    if (this.#heads.length > 0) this.recovered = new RecoveredChains(this.#heads)
  }

  hasAvail(): boolean {
    if (this.blocked) return false
    if (this.recovered?.waiting === true) return true
    // ORDER: acquire, pairs with the driver's release of avail.idx (virtio 1.3 §2.7.13.3).
    return this.#lastAvail !== this.#seenAvail || Atomics.load(this.#avail, 1) !== this.#lastAvail
  }

  pop(): Chain | undefined {
    if (!this.simple) return this.#popGeneral()
    if (this.#lastAvail === this.#seenAvail && !this.#look()) return undefined
    const head = this.#avail[2 + (this.#lastAvail & this.#mask)]!
    const chain = this.chains[head]
    // Whatever is not the usual case, `#takeAny` finds out again: of this nothing is used.
    if (chain === undefined || chain.inFlight || !this.#takeSingle(chain, head))
      return this.#popped(this.#takeAny(head))
    chain.inFlight = true
    return this.#popped(chain)
  }

  /** Not in `pop`: a small one is inlined. */
  #popGeneral(): Chain | undefined {
    if (this.blocked) return undefined
    if (this.recovered?.waiting === true) return this.#popRecovered(this.recovered)
    if (this.#lastAvail === this.#seenAvail && !this.#look()) return undefined
    return this.#popped(this.#take(this.#avail[2 + (this.#lastAvail & this.#mask)]!))
  }

  /** The next avail entry was this chain, if it was one. */
  #popped(chain: Chain | undefined): Chain | undefined {
    if (chain === undefined) return undefined
    this.#lastAvail = (this.#lastAvail + 1) & 0xffff
    if (this.#inflight !== undefined) this.#inflight.popped(chain.head)
    return chain
  }

  /** Reads avail.idx. Returns false when nothing is new, or the ring broke. Not in `pop`: a small one is inlined. */
  #look(): boolean {
    // ORDER: acquire, pairs with the driver's release of avail.idx: entries and descriptors up to it are written.
    const seen = Atomics.load(this.#avail, 1)
    if (seen === this.#lastAvail) return false
    // Both are free-running u16: a comparison with `>` would lose chains at the wrap.
    if (((seen - this.#lastAvail) & 0xffff) > this.size) return this.fail('ERR_RING_INDEX')
    this.#seenAvail = seen
    return true
  }

  /** One that is marked as in flight already, and whose place in the avail ring is passed. */
  #popRecovered(recovered: RecoveredChains): Chain | undefined {
    const chain = this.#take(this.#heads[recovered.position]!)
    if (chain !== undefined) recovered.take()
    return chain
  }

  unpop(chain: Chain): void {
    this.disclaim(chain)
    if (this.recovered?.putBack(chain.head) === true) return
    if (this.#inflight !== undefined) this.#inflight.unpopped(chain.head)
    this.#lastAvail = (this.#lastAvail - 1) & 0xffff
  }

  #take(head: number): Chain | undefined {
    const chain = this.claim(head)
    if (chain === undefined) return undefined
    if (!this.#takeSingle(chain, head)) return this.#takeAny(head)
    this.claimed(chain)
    return chain
  }

  /** A chain of any number of descriptors. */
  #takeAny(head: number): Chain | undefined {
    const chain = this.claim(head)
    if (chain === undefined) return undefined
    chain.begin(this.memory)
    if (!this.#walk(chain, head)) return undefined
    this.claimed(chain)
    return chain
  }

  /** A chain of one descriptor, as those of network cards are. Of any other nothing that was read here is used. */
  #takeSingle(chain: Chain, head: number): boolean {
    const table = this.#descriptors
    const word = head * 4
    const flags = table[word + 3]! & 0xffff
    if ((flags & (VIRTQ_DESC_F_NEXT | VIRTQ_DESC_F_INDIRECT)) !== 0) return false
    const gpa = table[word]! + table[word + 1]! * 0x1_0000_0000
    return chain.single(this.memory, gpa, table[word + 2]!, (flags & VIRTQ_DESC_F_WRITE) !== 0)
  }

  protected use(head: number, written: number): void {
    const entry = this.#usedIdx & this.#mask
    const slot = 1 + entry * 2
    this.#used32[slot] = head
    this.#used32[slot + 1] = written
    if (this.log !== undefined) this.#mark(4 + entry * 8, 8)
    if (this.#inflight !== undefined) this.#inflight.used(head)
    this.#usedIdx = (this.#usedIdx + 1) & 0xffff
  }

  publish(): boolean {
    const before = this.#publishedIdx
    const now = this.#usedIdx
    if (before === now || !this.mapped) return false
    this.#publishedIdx = now
    // ORDER: release for the used elements above it, and (seq_cst) before the load of used_event or flags below: the
    // driver writes used_event and then reads used.idx, so one of us sees the other (virtio 1.3 §2.7.8.2).
    Atomics.store(this.#used16, 1, now)
    if (this.log !== undefined) this.#mark(2, 2)
    if (this.#inflight !== undefined) this.#inflight.published(now)
    const first = !this.#signalled
    this.#signalled = true
    if (this.#eventIdx) {
      const event = Atomics.load(this.#avail, 2 + this.size)
      // vring_need_event: the driver asked for a call when used.idx passes used_event, in [before, now).
      return first || ((now - event - 1) & 0xffff) < ((now - before) & 0xffff)
    }
    return (Atomics.load(this.#avail, 0) & VIRTQ_AVAIL_F_NO_INTERRUPT) === 0
  }

  protected writeSuppress(): void {
    // With EVENT_IDX a stale avail_event suppresses by itself: it is passed once in 65536 chains.
    if (this.#eventIdx) return
    this.#used16[0] = VIRTQ_USED_F_NO_NOTIFY
    if (this.log !== undefined) this.#mark(0, 2)
  }

  protected writeRearm(): void {
    // ORDER: seq_cst store, then the load of avail.idx: the driver stores avail.idx and then loads avail_event or
    // flags.
    if (this.#eventIdx) Atomics.store(this.#used16, 2 + 4 * this.size, this.#lastAvail)
    else Atomics.store(this.#used16, 0, 0)
    if (this.log !== undefined) this.#mark(this.#eventIdx ? 4 + 8 * this.size : 0, 2)
  }

  /** Marks what was written to the used ring. */
  #mark(offset: number, length: number): void {
    if (this.logAddress >= 0) this.log!.mark(this.logAddress + offset, length)
  }

  /**
   * Follows the chain from `head`, copying each descriptor once, into `chain`. Returns false when the ring is broken or
   * a translation is missing.
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
        if (!this.#indirect || (flags & VIRTQ_DESC_F_NEXT) !== 0) return this.fail('ERR_RING_INDIRECT')
        return this.addTable(chain, gpa, length, true)
      }
      if (!this.add(chain, gpa, length, flags)) return false
      if ((flags & VIRTQ_DESC_F_NEXT) === 0) return true
      index = flagsAndNext >>> 16
      if (index >= this.size) return this.fail('ERR_RING_NEXT')
    }
    return this.fail('ERR_RING_LOOP')
  }
}

/**
 * The device side of a packed virtqueue (virtio 1.3 §2.8) over guest memory. Everything the driver wrote is read once
 * into a local and then checked. A violated rule sets `error` and ends this ring; it never throws and never touches
 * memory outside the regions.
 *
 * Positions are an index below the ring's size, which need not be a power of two, and a wrap counter. The device owns
 * the descriptors from the used position up to the avail one; a used descriptor is written at the former, whatever
 * chain it is of.
 */
import type { Chain } from './chain.ts'
import {
  RING_EVENT_FLAGS_DESC,
  RING_EVENT_FLAGS_DISABLE,
  RING_EVENT_FLAGS_ENABLE,
  VIRTQ_DESC_F_INDIRECT,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
  VIRTQ_DESC_SIZE,
  VIRTQ_EVENT_SUPPRESS_SIZE,
} from './constants.ts'
import type { DirtyLog } from './dirty-log.ts'
import { InflightError, type PackedInflight, type RecoveredChain } from './inflight.ts'
import { type GuestMemory, IOTLB_READ, IOTLB_WRITE } from './memory.ts'
import {
  available,
  formatPackedBase,
  OWNER,
  type PackedBase,
  packedDistance,
  packedRingSizes,
  parsePackedBase,
  used,
  wantsCall,
} from './packed-format.ts'
import { RecoveredChains } from './recovered.ts'
import { RingBase } from './ring-base.ts'
import type { VringConfig } from './vring.ts'

export { packedRingSizes } from './packed-format.ts'

/** How many descriptors are looked at for the price of one ordered load. */
const LOOK_AHEAD = 64

/** Descriptors of a chain that there is room for before the scratch array grows. */
const INITIAL_SCRATCH = 16

export class PackedRing extends RingBase {
  readonly #eventIdx: boolean
  readonly #indirect: boolean
  readonly #inflight: PackedInflight | undefined
  // The descriptor ring. As words, 4 per descriptor: addr low, addr high, len, id | flags << 16. As halves, 8 per
  // descriptor: [6] id, [7] flags.
  #words: Uint32Array = new Uint32Array(0)
  #halves: Uint16Array = new Uint16Array(0)
  // Event suppression structures: bits 0–14 offset, 15 wrap counter, 16–17 flags. Signed: no value of them is boxed
  // then.
  #driverEvent: Int32Array = new Int32Array(0)
  #deviceEvent: Int32Array = new Int32Array(0)
  /** For the dirty log: the guest-physical addresses of the descriptor ring and of the device's structure. */
  #ringPhysical = 0
  #eventPhysical = 0
  /** The next descriptor that we will pop. */
  #avail = 0
  #availWrap = 1
  /** Where the next used descriptor is written, and up to where the driver can see them. */
  #used = 0
  #usedWrap = 1
  #published = 0
  #publishedWrap = 1
  /** Descriptors that the driver may have made available: all but those that were popped and not published. */
  #free: number
  /** That many from the avail position on were seen to be available; the last of them is the first one of its chain. */
  #seen = 0
  /**
   * Descriptors that the used ones written since the last publish stand for, and the flags of the first, still to be
   * written.
   */
  #batch = 0
  #firstFlags = 0
  /**
   * Whether a call decision was made since the start: the first one is not suppressed by an offset, which may be stale.
   */
  #signalled = false
  /** By buffer id, of chains in flight: descriptors that they take up, and their entry in the in-flight region. */
  readonly #slots: Uint16Array
  readonly #entries: Int32Array
  /**
   * The descriptors of a chain, copied before its id is known, which is in the last one. 4 words each, as in the ring.
   */
  #scratch = new Uint32Array(INITIAL_SCRATCH * 4)
  #recoveredChains: readonly RecoveredChain[] = []
  /** Recovery wrote to the ring before there was a log: it is marked in the first one. */
  #unmarked = false

  constructor(memory: GuestMemory, config: VringConfig, inflight?: PackedInflight) {
    super(memory, config)
    this.#eventIdx = config.eventIdx
    this.#indirect = config.indirect
    this.#inflight = inflight
    this.#free = config.size
    this.#slots = new Uint16Array(config.size)
    this.#entries = new Int32Array(inflight === undefined ? 0 : config.size)
    this.#place(parsePackedBase(config.base))
    this.setMemory(memory)
  }

  get base(): number {
    return formatPackedBase({
      avail: this.#avail,
      availWrap: this.#availWrap,
      used: this.#used,
      usedWrap: this.#usedWrap,
    })
  }

  protected locate(): boolean {
    const { descriptor, driver, device } = this.config
    const { size } = this
    const bytes = packedRingSizes(size)
    const ring = this.area(descriptor, bytes.descriptor, IOTLB_READ | IOTLB_WRITE)
    if (ring === undefined) return false
    const driverRegion = this.area(driver, bytes.driver, IOTLB_READ)
    if (driverRegion === undefined) return false
    const deviceRegion = this.area(device, bytes.device, IOTLB_WRITE)
    if (deviceRegion === undefined) return false
    const ringAt = ring.start + descriptor - ring.gpa
    this.#words = new Uint32Array(ring.buffer, ringAt, size * 4)
    this.#halves = new Uint16Array(ring.buffer, ringAt, size * 8)
    this.#driverEvent = new Int32Array(driverRegion.buffer, driverRegion.start + driver - driverRegion.gpa, 1)
    this.#deviceEvent = new Int32Array(deviceRegion.buffer, deviceRegion.start + device - deviceRegion.gpa, 1)
    this.#ringPhysical = ring.physical + descriptor - ring.gpa
    this.#eventPhysical = deviceRegion.physical + device - deviceRegion.gpa
    this.#seen = 0
    return true
  }

  override setLog(log: DirtyLog | undefined, ring: number): void {
    super.setLog(log, ring)
    if (!this.#unmarked || log === undefined || ring < 0) return
    this.#unmarked = false
    // All of it: this happens once, after a crash.
    for (let index = 0; index < this.size; index++) this.#markDescriptor(index)
  }

  protected start(): void {
    if (this.#inflight !== undefined) return this.#recover(this.#inflight)
    const owned = packedDistance(parsePackedBase(this.config.base), this.size)
    if (owned < 0 || owned > this.size) this.fail('ERR_RING_BASE')
    // Those are of chains that nobody knows any more. The driver waits for them, so it can't have reused them.
    else this.#free = this.size - owned
  }

  #place({ avail, availWrap, used, usedWrap }: PackedBase): void {
    this.#avail = avail
    this.#availWrap = availWrap
    this.#used = used
    this.#usedWrap = usedWrap
    this.#published = used
    this.#publishedWrap = usedWrap
  }

  /** @throws InflightError */
  #recover(inflight: PackedInflight): void {
    const { size } = this
    const halves = this.#halves
    // Spelled out, since of a base without an upper half the region would begin at used index 0.
    const base = formatPackedBase(parsePackedBase(this.config.base))
    // ORDER: acquire, like `hasAvail`: a former back-end may have been killed just now.
    const { usedIndex, usedWrap, chains } = inflight.recover(base, (index) => Atomics.load(halves, index * 8 + 7))
    const ids = chains.map((chain) => chain.id)
    if (ids.some((id) => id >= size) || new Set(ids).size !== ids.length)
      throw new InflightError('two chains have the same buffer id, or one that the ring has not')
    let index = usedIndex
    let wrap = usedWrap
    for (const { slots } of chains) {
      for (let i = 0; i < slots; i++) {
        // What was written of a batch that was not published. The driver does not see it until the descriptor before it
        // is used, but then it would take it for used by us.
        if ((halves[index * 8 + 7]! & OWNER) === used(wrap)) {
          halves[index * 8 + 7] = available(wrap)
          if (this.log !== undefined) this.#markDescriptor(index)
          else this.#unmarked = true
        }
        if (++index === size) {
          index = 0
          wrap ^= 1
        }
        this.#free--
      }
    }
    this.#place({ avail: index, availWrap: wrap, used: usedIndex, usedWrap })
    if (chains.length === 0) return
    this.#recoveredChains = chains
    this.recovered = new RecoveredChains(ids)
  }

  hasAvail(): boolean {
    if (this.blocked) return false
    if (this.#seen > 0 || this.recovered?.waiting === true) return true
    // ORDER: acquire, pairs with the driver's release of the flags of a chain's first descriptor (virtio 1.3 §2.8.13).
    return (Atomics.load(this.#halves, this.#avail * 8 + 7) & OWNER) === available(this.#availWrap)
  }

  pop(): Chain | undefined {
    if (this.blocked) return undefined
    if (this.recovered?.waiting === true) return this.#popRecovered(this.recovered)
    if (this.#seen === 0 && !this.#look()) return undefined
    const words = this.#words
    const word = this.#avail * 4
    const last = words[word + 3]!
    const flags = last >>> 16
    if ((flags & (VIRTQ_DESC_F_NEXT | VIRTQ_DESC_F_INDIRECT)) !== 0) return this.#popSeveral()
    const chain = this.claim(last & 0xffff)
    if (chain === undefined) return undefined
    const low = words[word]!
    const high = words[word + 1]!
    const length = words[word + 2]!
    const gpa = low + high * 0x1_0000_0000
    if (!chain.single(this.memory, gpa, length, (flags & VIRTQ_DESC_F_WRITE) !== 0)) {
      chain.begin(this.memory)
      if (!this.add(chain, gpa, length, flags)) return undefined
    }
    if (this.#inflight !== undefined) this.#inflight.descriptor(low, high, length, flags, chain.head)
    this.#popped(chain, 1)
    return chain
  }

  /** A chain of several descriptors, or one that is a table. */
  #popSeveral(): Chain | undefined {
    const count = this.#copy()
    if (count === 0) return undefined
    const chain = this.claim(this.#scratch[count * 4 - 1]! & 0xffff)
    if (chain === undefined || !this.#build(chain, count)) return undefined
    if (this.#inflight !== undefined) this.#record(this.#inflight, count)
    this.#popped(chain, count)
    return chain
  }

  /**
   * It is in flight from here on. Its descriptors were given to the in-flight region, none of a chain that is bad or
   * missed.
   */
  #popped(chain: Chain, slots: number): void {
    if (this.#inflight !== undefined) this.#entries[chain.head] = this.#inflight.popped()
    this.#slots[chain.head] = slots
    this.#avail += slots
    if (this.#avail >= this.size) {
      this.#avail -= this.size
      this.#availWrap ^= 1
    }
    this.#free -= slots
    this.#seen = slots < this.#seen ? this.#seen - slots : 0
    this.claimed(chain)
  }

  /** One that is marked as in flight already, and whose descriptors in the ring may have been overwritten. */
  #popRecovered(recovered: RecoveredChains): Chain | undefined {
    const { id, entry, slots, descriptors } = this.#recoveredChains[recovered.position]!
    const chain = this.claim(id)
    if (chain === undefined) return undefined
    while (this.#scratch.length < descriptors.length * 4) this.#grow()
    for (let i = 0; i < descriptors.length; i++) {
      const { low, high, length, flags } = descriptors[i]!
      this.#scratch[i * 4] = low
      this.#scratch[i * 4 + 1] = high
      this.#scratch[i * 4 + 2] = length
      this.#scratch[i * 4 + 3] = id | (flags << 16)
    }
    if (!this.#build(chain, descriptors.length)) return undefined
    recovered.take()
    this.#slots[id] = slots
    this.#entries[id] = entry
    this.claimed(chain)
    return chain
  }

  unpop(chain: Chain): void {
    this.disclaim(chain)
    if (this.recovered?.putBack(chain.head) === true) return
    const slots = this.#slots[chain.head]!
    if (this.#inflight !== undefined) this.#inflight.unpopped(this.#entries[chain.head]!)
    this.#avail -= slots
    if (this.#avail < 0) {
      this.#avail += this.size
      this.#availWrap ^= 1
    }
    this.#free += slots
    this.#seen += slots
  }

  /**
   * Looks how many descriptors are available. An ordered load per chain would cost more than all else here together:
   * plain loads find the last chain that seems to be available, and one ordered load confirms it. The driver makes
   * chains available in order, so that load orders those before it as well. Returns false when there are none, or the
   * ring broke.
   */
  #look(): boolean {
    const { size } = this
    const halves = this.#halves
    const most = this.#free < LOOK_AHEAD ? this.#free : LOOK_AHEAD
    let index = this.#avail
    let wrap = this.#availWrap
    let head = -1
    let headWrap = 0
    let seen = 0
    // Only first descriptors count: the others of a chain may be written, and seen, before it is available.
    let first = true
    for (let i = 0; i < most; i++) {
      const flags = halves[index * 8 + 7]!
      if ((flags & OWNER) !== available(wrap)) break
      if (first) {
        head = index
        headWrap = wrap
        seen = i + 1
      }
      first = (flags & VIRTQ_DESC_F_NEXT) === 0
      if (++index === size) {
        index = 0
        wrap ^= 1
      }
    }
    if (head < 0) {
      // The whole ring is ours, and the driver goes round a second time.
      if (most === 0 && this.hasAvail()) this.fail('ERR_RING_INDEX')
      return false
    }
    // ORDER: acquire, pairs with the driver's release of the flags of a chain's first descriptor: that chain is written
    // whole, and so are all before it (virtio 1.3 §2.8.13).
    if ((Atomics.load(halves, head * 8 + 7) & OWNER) !== available(headWrap)) return false
    this.#seen = seen
    return true
  }

  /**
   * Copies the chain at the avail position into `#scratch`. Returns how many descriptors it has, 0 when the ring broke.
   */
  #copy(): number {
    const { size } = this
    const words = this.#words
    let index = this.#avail
    for (let count = 0; count < this.#free; ) {
      if (this.#scratch.length === count * 4) this.#grow()
      const scratch = this.#scratch
      const from = index * 4
      const to = count * 4
      const last = words[from + 3]!
      scratch[to] = words[from]!
      scratch[to + 1] = words[from + 1]!
      scratch[to + 2] = words[from + 2]!
      scratch[to + 3] = last
      count++
      if (((last >>> 16) & VIRTQ_DESC_F_NEXT) === 0) return count
      index = index + 1 === size ? 0 : index + 1
    }
    // Into descriptors that are in flight, or once round the ring.
    this.fail(this.#free < size ? 'ERR_RING_INDEX' : 'ERR_RING_LOOP')
    return 0
  }

  #grow(): void {
    const scratch = new Uint32Array(this.#scratch.length * 2)
    scratch.set(this.#scratch)
    this.#scratch = scratch
  }

  /**
   * Makes `chain` of the first `count` descriptors in `#scratch`. Returns false when the ring broke or a translation is
   * missing.
   */
  #build(chain: Chain, count: number): boolean {
    const scratch = this.#scratch
    chain.begin(this.memory)
    for (let at = 0; at < count * 4; at += 4) {
      const flags = scratch[at + 3]! >>> 16
      const gpa = scratch[at]! + scratch[at + 1]! * 0x1_0000_0000
      const length = scratch[at + 2]!
      if ((flags & VIRTQ_DESC_F_INDIRECT) !== 0) {
        // A table stands alone (virtio 1.3 §2.8.19); WRITE on it is ignored (§2.8.7).
        if (!this.#indirect || count !== 1) return this.fail('ERR_RING_INDIRECT')
        return this.addTable(chain, gpa, length, false)
      }
      if (!this.add(chain, gpa, length, flags)) return false
    }
    return true
  }

  #record(inflight: PackedInflight, count: number): void {
    const scratch = this.#scratch
    for (let at = 0; at < count * 4; at += 4) {
      const last = scratch[at + 3]!
      inflight.descriptor(scratch[at]!, scratch[at + 1]!, scratch[at + 2]!, last >>> 16, last & 0xffff)
    }
  }

  protected use(id: number, written: number): void {
    const at = this.#used
    const slots = this.#slots[id]!
    const flags = used(this.#usedWrap) | (written > 0 ? VIRTQ_DESC_F_WRITE : 0)
    if (this.#inflight !== undefined) this.#inflight.used(this.#entries[id]!, slots)
    this.#words[at * 4 + 2] = written
    if (this.#batch === 0) {
      this.#halves[at * 8 + 6] = id
      this.#firstFlags = flags
    } else {
      // The driver looks at this one when it has seen the one before it, and so at none before `publish`.
      this.#words[at * 4 + 3] = id | (flags << 16)
      if (this.log !== undefined) this.#markDescriptor(at)
    }
    this.#batch += slots
    this.#used += slots
    if (this.#used >= this.size) {
      this.#used -= this.size
      this.#usedWrap ^= 1
    }
  }

  publish(): boolean {
    const slots = this.#batch
    if (slots === 0 || !this.mapped) return false
    const at = this.#published
    // ORDER: release for the used descriptors of the batch, and (seq_cst) before the load of the driver's structure
    // below: the driver writes that and then reads the flags, so one of us sees the other (virtio 1.3 §2.8.14).
    Atomics.store(this.#halves, at * 8 + 7, this.#firstFlags)
    if (this.log !== undefined) this.#markDescriptor(at)
    if (this.#inflight !== undefined) this.#inflight.published()
    const wrap = this.#publishedWrap
    this.#batch = 0
    this.#free += slots
    this.#published = this.#used
    this.#publishedWrap = this.#usedWrap
    const first = !this.#signalled
    this.#signalled = true
    return wantsCall(Atomics.load(this.#driverEvent, 0), this.#eventIdx, first, this.size, at, wrap, slots)
  }

  protected writeSuppress(): void {
    // With EVENT_IDX too: a stale offset is passed every two laps, which a small ring makes often.
    this.#deviceEvent[0] = RING_EVENT_FLAGS_DISABLE << 16
    if (this.log !== undefined) this.#markEvent()
  }

  protected writeRearm(): void {
    const position = this.#avail | (this.#availWrap << 15)
    const event = this.#eventIdx ? position | (RING_EVENT_FLAGS_DESC << 16) : RING_EVENT_FLAGS_ENABLE << 16
    // ORDER: seq_cst store, then the load of flags in `hasAvail`: the driver stores flags and then loads this. Both
    // fields in one store, or it might see the new flags with an old offset.
    Atomics.store(this.#deviceEvent, 0, event)
    if (this.log !== undefined) this.#markEvent()
  }

  /** Where it lies: the front-end's address in the log is not the one of this structure. */
  #markEvent(): void {
    if (this.logAddress >= 0) this.log!.mark(this.#eventPhysical, VIRTQ_EVENT_SUPPRESS_SIZE)
  }

  #markDescriptor(index: number): void {
    if (this.logAddress < 0) return
    const offset = index * VIRTQ_DESC_SIZE
    // Where it lies as well: QEMU's address for the log is that of what a split ring would have as its used ring, and
    // so of the device's event suppression structure.
    this.log!.mark(this.#ringPhysical + offset, VIRTQ_DESC_SIZE)
    if (this.logAddress !== this.#ringPhysical) this.log!.mark(this.logAddress + offset, VIRTQ_DESC_SIZE)
  }
}

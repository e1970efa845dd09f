/**
 * What split and packed rings have in common: the pool of chains, reading descriptors and indirect tables into them,
 * where the ring lies (and what is missing behind a vIOMMU), completions that have to wait, and the ways to break.
 * Pure. A ring's own file knows its layout, its indices and its notifications.
 */
import { Chain } from './chain.ts'
import {
  VIRTQ_DESC_F_INDIRECT,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
  VIRTQ_DESC_SIZE,
  VIRTQ_MAX_SIZE,
} from './constants.ts'
import type { DirtyLog } from './dirty-log.ts'
import { RING_ERRORS, RingError, type RingErrorCode } from './errors.ts'
import { CompletionOrder } from './in-order.ts'
import { InflightError } from './inflight.ts'
import { type GuestMemory, IOTLB_READ, IOTLB_WRITE, isOneMapping, type MemoryRegion } from './memory.ts'
import type { RecoveredChains } from './recovered.ts'
import type { Vring, VringConfig } from './vring.ts'

/**
 * Buffers that a table may have where the ring has fewer entries. Drivers must keep to those (virtio 1.3 §2.7.5.3.1), not all do;
 * QEMU allows 1024. Without a bound the pooled chains of 1024 tables of 32768 keep 470 MB, with this one 58.
 */
const MAX_TABLE = 4096

export abstract class RingBase implements Vring {
  readonly size: number
  error: RingError | undefined
  missAddress = -1
  missAccess = 0
  protected readonly config: VringConfig
  protected readonly inOrder: boolean
  protected memory: GuestMemory
  /** Nothing can be popped: the ring is broken, or waits for a translation. */
  protected blocked = true
  /**
   * The views of the ring's parts are those of memory that is there. False: before the first start behind a vIOMMU, and
   * after an invalidation.
   */
  protected mapped = false
  protected log: DirtyLog | undefined
  /** Where writes to the ring are marked, -1 = nowhere. */
  protected logAddress = -1
  /** In order of `pop` with IN_ORDER, else of `push` for those that could not be written. */
  protected order: CompletionOrder | undefined
  /** Chains of the in-flight buffer that were not used since; undefined when there are none any more. */
  protected recovered: RecoveredChains | undefined
  /** `pop` has nothing to look at but the ring: not blocked, nothing recovered, no order to keep. */
  protected simple = false
  /** A completion can be written at once. */
  #direct = false
  /** And there is nothing else to do for it. */
  #plain = false
  /** `start` was called. */
  #started = false
  /** What the driver was asked last. */
  #kicksWanted = false
  /** By head; undefined before its first use. */
  protected readonly chains: (Chain | undefined)[]

  /** The subclass calls `setMemory(memory)` at its end: that finds the ring and starts it. */
  constructor(memory: GuestMemory, config: VringConfig) {
    this.config = config
    this.size = config.size
    this.memory = memory
    this.inOrder = config.inOrder
    // Filled with undefined, not holes: the elements stay PACKED.
    this.chains = new Array<Chain | undefined>(config.size).fill(undefined)
    if (config.inOrder) this.order = new CompletionOrder(config.size)
  }

  abstract get base(): number
  abstract pop(): Chain | undefined
  abstract unpop(chain: Chain): void
  abstract publish(): boolean
  abstract hasAvail(): boolean
  /**
   * Makes the views of the ring's parts, by `area`. Returns false when one is not there; the views are as before then.
   */
  protected abstract locate(): boolean
  /**
   * Takes indices and what is in flight from the configuration, from the memory that was located for the first time,
   * and from the in-flight buffer. @throws InflightError, which breaks the ring
   */
  protected abstract start(): void
  /** Writes a used element, which the driver sees after `publish`. */
  protected abstract use(head: number, written: number): void
  protected abstract writeSuppress(): void
  protected abstract writeRearm(): void

  /** Chains of the in-flight buffer wait that `pop` has not returned: a ring that is to be drained must pop them. */
  get recovering(): boolean {
    return this.recovered?.waiting === true
  }

  setMemory(memory: GuestMemory): void {
    const waited = !this.mapped
    this.memory = memory
    this.missAddress = -1
    this.missAccess = 0
    // A ring that breaks here goes on in the old memory: what is in flight still has to go somewhere, and nobody sees
    // it there.
    if (this.locate()) this.mapped = true
    else if (memory.translated) this.mapped = false
    if (this.mapped && waited) this.#back()
    if (memory.translated) this.order ??= new CompletionOrder(this.size)
    if (this.mapped) this.#flush()
    this.#direct = this.mapped && !this.inOrder
    this.blocked = this.error !== undefined || this.missAddress >= 0 || !this.mapped
    this.#settle()
  }

  setLog(log: DirtyLog | undefined, ring: number): void {
    this.log = log
    this.logAddress = ring
    this.#settle()
  }

  chain(head: number): Chain {
    const chain = this.chains[head]
    if (chain !== undefined) return chain
    const created = new Chain(head)
    this.chains[head] = created
    return created
  }

  push(chain: Chain, written: number, touched: number): void {
    chain.inFlight = false
    if (this.#plain) this.use(chain.head, written)
    else this.#push(chain, written, touched)
  }

  #push(chain: Chain, written: number, touched: number): void {
    // Now and not when the driver sees it: whoever copies the page next must find the mark, and IN_ORDER may hold the
    // chain long.
    if (this.log !== undefined) this.log.markChain(chain, touched)
    if (this.recovered !== undefined) this.#recoveredUsed(chain.head)
    if (this.#direct) this.use(chain.head, written)
    else this.#hold(chain.head, written)
  }

  /** After `blocked`, `order`, `#direct`, `log` or `recovered` changed: one flag in place of their checks per chain. */
  #settle(): void {
    this.simple = !this.blocked && this.order === undefined && this.recovered === undefined
    this.#plain = this.#direct && this.log === undefined && this.recovered === undefined
  }

  suppress(): void {
    this.#kicksWanted = false
    if (this.mapped && this.error === undefined) this.writeSuppress()
  }

  rearm(): boolean {
    this.#kicksWanted = true
    if (!this.mapped || this.error !== undefined) return false
    this.writeRearm()
    return this.hasAvail()
  }

  /** The ring's parts are there, for the first time or again. */
  #back(): void {
    const first = !this.#started
    this.#started = true
    if (first) this.#start()
    if (this.error !== undefined) return
    // What was asked while the ring was away is not asked again: a stale avail_event would lose the next kick.
    if (this.#kicksWanted) this.writeRearm()
    else if (!first) this.writeSuppress()
  }

  #start(): void {
    if (this.error !== undefined) return
    try {
      this.start()
    } catch (error) {
      if (!(error instanceof InflightError)) throw error
      this.error = new RingError('ERR_RING_INFLIGHT', `${RING_ERRORS.ERR_RING_INFLIGHT}: ${error.message}`)
    }
  }

  #hold(head: number, written: number): void {
    const order = this.order!
    if (!this.inOrder) order.enter(head)
    order.complete(head, written)
    if (this.mapped) this.#flush()
  }

  /**
   * Writes the completions whose turn it is, each of them. With IN_ORDER one element for a batch would do, but the
   * driver then takes all the others for written completely (virtio 1.3 §2.7.9): a read that failed, or a packet in a
   * larger buffer, would be lost. Drivers with IN_ORDER know batches by their last element, and a batch of one is a
   * batch.
   */
  #flush(): void {
    const order = this.order
    if (order === undefined) return
    for (let head = order.next(); head >= 0; head = order.next()) {
      this.use(head, order.written(head))
      order.shift()
    }
  }

  #recoveredUsed(head: number): void {
    this.recovered!.used(head)
    if (!this.recovered!.over) return
    this.recovered = undefined
    this.#settle()
  }

  /** Breaks the ring. */
  protected fail(code: RingErrorCode): false {
    this.error ??= new RingError(code, RING_ERRORS[code])
    this.blocked = true
    this.simple = false
    return false
  }

  /** The chain for a head or buffer id that the driver offers; undefined, and the ring broken, when it must not be. */
  protected claim(head: number): Chain | undefined {
    if (head >= this.size) {
      this.fail('ERR_RING_HEAD')
      return undefined
    }
    const chain = this.chain(head)
    // A completion that is held is no longer in flight for the device, but the driver has not seen it either.
    if (chain.inFlight || this.order?.has(head) === true) {
      this.fail('ERR_RING_HEAD_BUSY')
      return undefined
    }
    return chain
  }

  /** A chain is in flight from now on. */
  protected claimed(chain: Chain): void {
    chain.inFlight = true
    if (this.memory.translated) chain.detach()
    if (this.inOrder) this.order!.enter(chain.head)
  }

  /** Takes `claimed` back, in reverse order. */
  protected disclaim(chain: Chain): void {
    chain.inFlight = false
    if (this.inOrder) this.order!.leave()
  }

  /**
   * The region where a part of the ring begins, which goes on in the region's buffer. Undefined when the ring can't use
   * it, and either broke or waits.
   */
  protected area(address: number, length: number, access: number): MemoryRegion | undefined {
    const { memory } = this
    const region = memory.contiguous(address, length)
    if (region !== undefined && (region.access & access) === access) return region
    if (!memory.translated) this.fail('ERR_RING_MEMORY')
    else if (!this.miss(address, length, access)) {
      const first = memory.regions[memory.find(address)]
      if (first !== undefined && isOnePiece(memory, first, address + length)) return first
      this.fail('ERR_RING_SCATTERED')
    }
    return undefined
  }

  /** Adds the buffer of a descriptor to `chain`. Returns false when the ring broke or a translation is missing. */
  protected add(chain: Chain, gpa: number, length: number, flags: number): boolean {
    const writable = (flags & VIRTQ_DESC_F_WRITE) !== 0
    if (!writable && chain.count > chain.readableCount) return this.fail('ERR_RING_ORDER')
    if (chain.readable + chain.writable + length > 0xffff_ffff) return this.fail('ERR_RING_LENGTH')
    return chain.append(this.memory, gpa, length, writable) || this.#absent(gpa, length, writable)
  }

  /** Not in `add`: a small one is inlined. */
  #absent(gpa: number, length: number, writable: boolean): false {
    if (this.memory.translated && this.miss(gpa, length, writable ? IOTLB_WRITE : IOTLB_READ)) return false
    return this.fail('ERR_RING_ADDRESS')
  }

  /**
   * Adds the buffers of an indirect table. @param linked split: entries are followed by their `next`. Packed: they are
   * taken as they come, and of their flags WRITE alone has a meaning (virtio 1.3 §2.8.7).
   */
  protected addTable(chain: Chain, table: number, length: number, linked: boolean): boolean {
    const entries = length / VIRTQ_DESC_SIZE
    if (length === 0 || length % VIRTQ_DESC_SIZE !== 0 || entries > VIRTQ_MAX_SIZE)
      return this.fail('ERR_RING_INDIRECT')
    const most = Math.max(this.size, MAX_TABLE)
    let index = 0
    for (let walked = 0; walked < entries; walked++) {
      if (walked === most) return this.fail('ERR_RING_INDIRECT')
      const at = table + index * VIRTQ_DESC_SIZE
      // One look-up per entry: a table may lie across adjacent regions.
      const region = this.memory.contiguous(at, VIRTQ_DESC_SIZE)
      if (region === undefined || (region.access & IOTLB_READ) === 0) {
        if (this.memory.translated && this.miss(at, VIRTQ_DESC_SIZE, IOTLB_READ)) return false
        return this.fail('ERR_RING_INDIRECT')
      }
      // Aligned entries are what drivers make; the spec demands 16 bytes of the main table only, so 4 is what we need.
      if (at % 4 !== 0) return this.fail('ERR_RING_INDIRECT')
      const words = region.words
      const word = (at - region.gpa) / 4
      const low = words[word]!
      const high = words[word + 1]!
      const size = words[word + 2]!
      const last = words[word + 3]!
      const flags = linked ? last & 0xffff : last >>> 16
      if (linked && (flags & VIRTQ_DESC_F_INDIRECT) !== 0) return this.fail('ERR_RING_INDIRECT')
      if (!this.add(chain, low + high * 0x1_0000_0000, size, flags)) return false
      if (!linked) index++
      else if ((flags & VIRTQ_DESC_F_NEXT) === 0) return true
      else {
        index = last >>> 16
        if (index >= entries) return this.fail('ERR_RING_NEXT')
      }
    }
    return linked ? this.fail('ERR_RING_LOOP') : true
  }

  /**
   * Finds what is missing of translated memory and blocks the ring for it. Returns false when nothing is, or nothing
   * could be.
   */
  protected miss(address: number, length: number, access: number): boolean {
    const end = address + length
    // No IOMMU has addresses of that size; as numbers they would not even be exact.
    if (end > Number.MAX_SAFE_INTEGER) return false
    for (let at = address; at < end; ) {
      const index = this.memory.find(at)
      const region = index < 0 ? undefined : this.memory.regions[index]!
      if (region === undefined || (region.access & access) !== access) {
        this.missAddress = at
        // All that is needed, not only what is lacking: the answer replaces the entry.
        this.missAccess = access
        this.blocked = true
        this.simple = false
        return true
      }
      at = region.end
    }
    return false
  }
}

/** Whether memory goes on from `first` up to the address, in as many entries as it likes. All of it is translated. */
function isOnePiece(memory: GuestMemory, first: MemoryRegion, end: number): boolean {
  for (let at = first.end; at < end; ) {
    const region = memory.regions[memory.find(at)]!
    const distance = at - first.gpa
    if (!isOneMapping(first, region) || region.start !== first.start + distance) return false
    // Marks in the dirty log are made from the first one's address.
    if (region.physical !== first.physical + distance) return false
    at = region.end
  }
  return true
}

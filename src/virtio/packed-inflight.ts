/**
 * The in-flight region of a packed ring (vhost-user.rst "Inflight I/O tracking", QueueRegionPacked). The device
 * overwrites descriptors of the ring with used ones, so the region keeps a copy of those in flight, in entries that it
 * takes from a free list.
 *
 * The region describes two states. The list from old_free_head and the old used position are what holds when the batch
 * of used descriptors was not published, those from free_head and the used position when it was. The flags in the ring
 * tell which: see {@link PackedInflight.recover}. The spec's steps assume that nothing is popped between `used` and
 * `published`. Here that is allowed: while a batch is open, a chain is taken from the old list, and the last entry of
 * the batch is linked to the rest, so that it is gone from both lists.
 *
 * What is read from the region is read by `recover` alone; from then on it is only written.
 */
import { VIRTQ_DESC_F_AVAIL, VIRTQ_DESC_F_USED } from './constants.ts'
import {
  beginInitialisation,
  checkRegion,
  endInitialisation,
  InflightError,
  inflightSize,
  isInitialised,
  PACKED_ENTRY,
  PACKED_HEADER,
} from './inflight-region.ts'

/** One descriptor of the ring as it was when it was popped. */
export interface RecoveredDescriptor {
  /** Address, low and high word. */
  readonly low: number
  readonly high: number
  readonly length: number
  readonly flags: number
}

/** A chain that was in flight. */
export interface RecoveredChain {
  /** For `used`. */
  readonly entry: number
  /** The buffer id as recorded, any u16: that it is one of the ring's, and that no two have it, is to be checked. */
  readonly id: number
  /** Descriptors that it takes up in the ring, the length of `descriptors`. */
  readonly slots: number
  readonly descriptors: readonly RecoveredDescriptor[]
}

/**
 * Where the ring goes on. The next avail position is the used one plus all slots. The process that died may have
 * written used descriptors behind the first of its batch without publishing that: before the ring goes on, it must give
 * the descriptors from the used position up to the avail one flags that are not used ones, or the driver takes stale
 * used descriptors as soon as the one before them is used. The positions are the device's, so it may.
 */
export interface PackedRecovery {
  readonly usedIndex: number
  readonly usedWrap: number
  /** In the order in which they were popped. */
  readonly chains: readonly RecoveredChain[]
}

// QueueRegionPacked, as u16: u64 features, version, desc_num, then these; used_wrap_counter and the old one are bytes.
const FREE_HEAD = 6
const OLD_FREE_HEAD = 7
const USED_IDX = 8
const OLD_USED_IDX = 9
const USED_WRAP_BYTE = 20
const OLD_USED_WRAP_BYTE = 21
// As u32: both free heads. As u64: both positions with their wrap counters, and padding.
const FREE_HEADS = 3
const POSITIONS = 2
// DescStatePacked: u8 inflight, u16 next at byte 2, last, num, u64 counter at 8, u16 id at 16, flags, u32 len, u64 addr.
const HALVES = PACKED_HEADER / 2
const ENTRY_HALVES = PACKED_ENTRY / 2
const WORDS = PACKED_HEADER / 4
const ENTRY_WORDS = PACKED_ENTRY / 4

// Whose an entry is, while `recover` sorts them.
const NOBODY = 0
const FREE_LIST = 1
const CHAIN = 2

export class PackedInflight {
  readonly #region: Uint8Array
  readonly #bytes: Uint8Array
  readonly #halves: Uint16Array
  readonly #words: Uint32Array
  readonly #doubles: Float64Array
  // The used positions on their way into the region, as one double; its exponent is in the padding, so it is no NaN.
  readonly #position = new Uint16Array(4)
  readonly #positionDouble = new Float64Array(this.#position.buffer)
  // An index of `size` or above is the end of a list.
  readonly #size: number
  readonly #counter = new Uint32Array(2)
  // Per entry: the next one of its list; per first entry of a chain: the last one.
  readonly #next: Uint16Array
  readonly #last: Uint16Array
  /** old_free_head: the first entry that a chain can have. */
  #free = 0
  /** free_head: the same, or the first entry of the last used chain of the batch. */
  #head = 0
  // The chain being popped: the entry for its next descriptor, that of its last one, how many it has.
  #cursor = 0
  #current = 0
  #taken = 0
  #exhausted = false
  // The first entries of the chains that were used since the last publish, and the last entry of the first of them.
  readonly #batch: Uint16Array
  #batched = 0
  #batchTail = 0
  #usedIndex = 0
  #usedWrap = 0

  /**
   * @param bytes the region, at a multiple of 8 bytes and at least `inflightSize` long @param size entries of the ring
   * @throws InflightError when it is not
   */
  constructor(bytes: Uint8Array, size: number) {
    checkRegion(bytes, size, true)
    const length = PACKED_HEADER + PACKED_ENTRY * size
    this.#region = bytes.subarray(0, inflightSize(size, true))
    this.#bytes = new Uint8Array(bytes.buffer, bytes.byteOffset, length)
    this.#halves = new Uint16Array(bytes.buffer, bytes.byteOffset, length / 2)
    this.#words = new Uint32Array(bytes.buffer, bytes.byteOffset, length / 4)
    this.#doubles = new Float64Array(bytes.buffer, bytes.byteOffset, PACKED_HEADER / 8)
    this.#size = size
    this.#next = new Uint16Array(size)
    this.#last = new Uint16Array(size)
    this.#batch = new Uint16Array(size)
  }

  /**
   * What a process left in flight when it died, and where it left the ring. The chains stay marked. Initialises a region
   * that nobody used yet. Can be interrupted and done again.
   * @param base as SET_VRING_BASE: its used half (bits 16–31) counts for a region that nobody used yet, and only for it:
   * after a crash a front-end has no newer one than the ring was started with
   * @param flags the flags of a descriptor of the ring, by index
   * @throws InflightError when the region is of another ring or version, or says that the ring is where it can't be
   */
  recover(base: number, flags: (index: number) => number): PackedRecovery {
    if (!isInitialised(this.#region, this.#size, true)) {
      this.#initialise((base >>> 16) & 0x7fff, base >>> 31)
      return { usedIndex: this.#usedIndex, usedWrap: this.#usedWrap, chains: [] }
    }
    const free = this.#settle(flags)
    const owner = new Uint8Array(this.#size)
    this.#walkFree(free, owner)
    const chains = this.#collect(owner)
    if (owner.includes(NOBODY)) this.#relink(owner)
    this.#free = this.#head
    this.#cursor = this.#head
    return { usedIndex: this.#usedIndex, usedWrap: this.#usedWrap, chains }
  }

  /** One descriptor of the ring that belongs to the chain being popped. */
  descriptor(low: number, high: number, length: number, flags: number, id: number): void {
    const entry = this.#cursor
    if (entry >= this.#size) {
      this.#exhausted = true
      return
    }
    // The entry is free: nothing here counts until `popped`.
    const word = WORDS + entry * ENTRY_WORDS
    this.#words[word + 4] = id | (flags << 16)
    this.#words[word + 5] = length
    this.#words[word + 6] = low
    this.#words[word + 7] = high
    this.#current = entry
    this.#cursor = this.#next[entry]!
    this.#taken++
  }

  /**
   * The chain is complete. Returns its entry, or -1 when the driver has more descriptors in flight than the ring has: then
   * it is not tracked, and the ring is broken.
   */
  popped(): number {
    if (this.#exhausted || this.#taken === 0) {
      this.abandon()
      return -1
    }
    const entry = this.#free
    const next = this.#cursor
    const word = WORDS + entry * ENTRY_WORDS
    const counter = this.#counter
    this.#words[word + 2] = counter[0]!
    this.#words[word + 3] = counter[1]!
    this.#count(counter[0]!, counter[1]!)
    // last and num.
    this.#words[word + 1] = this.#current | (this.#taken << 16)
    // The entry is still in the free list, where `recover` clears the mark.
    this.#bytes[PACKED_HEADER + entry * PACKED_ENTRY] = 1
    this.#last[entry] = this.#current
    this.#taken = 0
    // From here on a process that dies has the chain in flight. It must be before anything is done for the chain.
    this.#setFree(next)
    return entry
  }

  /** The chain being popped was bad, or its memory is missing: it was not popped. */
  abandon(): void {
    this.#cursor = this.#free
    this.#taken = 0
    this.#exhausted = false
  }

  /**
   * The last chain that was popped goes back to the ring. Not for one that `recover` returned: the ring may have another
   * one at that place, so it stays marked.
   */
  unpopped(entry: number): void {
    if (entry < 0) return
    this.#link(this.#last[entry]!, this.#free)
    // The entry is in the free list, where `recover` clears a mark: both stores together would not be more.
    this.#setFree(entry)
    this.#bytes[PACKED_HEADER + entry * PACKED_ENTRY] = 0
  }

  /** The chain joins the batch whose used descriptors are published next. @param slots as in {@link RecoveredChain} */
  used(entry: number, slots: number): void {
    if (entry < 0) return
    const last = this.#last[entry]!
    // All this is of the state that counts when the batch is published, in the ring, and until then it is not looked at.
    this.#link(last, this.#head)
    this.#halves[FREE_HEAD] = entry
    this.#head = entry
    if (this.#batched === 0) this.#batchTail = last
    this.#batch[this.#batched++] = entry
    this.#usedIndex += slots
    if (this.#usedIndex >= this.#size) {
      this.#usedIndex -= this.#size
      this.#usedWrap ^= 1
      this.#bytes[USED_WRAP_BYTE] = this.#usedWrap
    }
    this.#halves[USED_IDX] = this.#usedIndex
  }

  /** The used descriptors of the batch are published, the first one's flags last. */
  published(): void {
    if (this.#batched === 0) return
    for (let i = 0; i < this.#batched; i++) this.#bytes[PACKED_HEADER + this.#batch[i]! * PACKED_ENTRY] = 0
    this.#batched = 0
    this.#free = this.#head
    this.#cursor = this.#head
    // Until the positions are equal, `recover` does the same again.
    this.#halves[OLD_FREE_HEAD] = this.#head
    this.#setPositions()
  }

  /** A chain begins and ends at `free`. */
  #setFree(free: number): void {
    if (this.#batched === 0) {
      this.#setBothHeads(free)
    } else {
      // The open batch first: it counts only when it is published, and that is after this.
      this.#link(this.#batchTail, free)
      this.#halves[OLD_FREE_HEAD] = free
    }
    this.#free = free
    this.#cursor = free
  }

  #setBothHeads(free: number): void {
    // One store: of two, the one of free_head has to be first.
    this.#words[FREE_HEADS] = free | (free << 16)
    this.#head = free
  }

  /**
   * One store of both positions. With one for each field, a process that dies between old_used_idx and
   * old_used_wrap_counter leaves a wrap counter of the last lap, and in the other order a position of it: the flags there
   * can look available again, and the published batch would be rolled back.
   */
  #setPositions(): void {
    const position = this.#position
    position[0] = this.#usedIndex
    position[1] = this.#usedIndex
    position[2] = this.#usedWrap | (this.#usedWrap << 8)
    this.#doubles[POSITIONS] = this.#positionDouble[0]!
  }

  #link(entry: number, next: number): void {
    this.#halves[HALVES + entry * ENTRY_HALVES + 1] = next
    this.#next[entry] = next
  }

  /** The counter behind this one. */
  #count(low: number, high: number): void {
    this.#counter[0] = low + 1
    if (low === 0xffff_ffff) this.#counter[1] = high + 1
    else this.#counter[1] = high
  }

  #initialise(usedIndex: number, usedWrap: number): void {
    if (usedIndex >= this.#size) throw new InflightError(`used index ${usedIndex} is beyond a ring of ${this.#size}`)
    this.#usedIndex = usedIndex
    this.#usedWrap = usedWrap
    beginInitialisation(this.#region)
    for (let entry = 0; entry < this.#size; entry++) this.#link(entry, entry + 1)
    this.#setBothHeads(0)
    this.#setPositions()
    endInitialisation(this.#region, this.#size)
    this.#free = 0
    this.#cursor = 0
  }

  /** Decides which of the two states holds, and makes it the only one. Returns the first free entry. */
  #settle(flags: (index: number) => number): number {
    const oldFree = this.#halves[OLD_FREE_HEAD]!
    const free = this.#halves[FREE_HEAD]!
    const oldIndex = this.#halves[OLD_USED_IDX]!
    const index = this.#halves[USED_IDX]!
    const oldWrap = this.#bytes[OLD_USED_WRAP_BYTE]!
    const wrap = this.#bytes[USED_WRAP_BYTE]!
    if (oldIndex >= this.#size || index >= this.#size || oldWrap > 1 || wrap > 1) {
      throw new InflightError(`the used position ${oldIndex} or ${index} of the region is none of its ring`)
    }
    // The wrap counters too: a batch can be as long as the ring, and then the index is the same again.
    const open = oldIndex !== index || oldWrap !== wrap
    // While the batch is not published, the descriptor is one that the driver made available in this lap: the device has
    // not passed it, and the driver can't have. (virtio 1.3 §2.8.1)
    const available = oldWrap === 1 ? VIRTQ_DESC_F_AVAIL : VIRTQ_DESC_F_USED
    const published = open && (flags(oldIndex) & (VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED)) !== available
    const head = published ? free : oldFree
    this.#usedIndex = published ? index : oldIndex
    this.#usedWrap = published ? wrap : oldWrap
    // The heads first: until the positions are equal the decision is made again, and comes out the same.
    this.#setBothHeads(head)
    this.#setPositions()
    return head
  }

  /** Clears the marks in the free list and copies its links. */
  #walkFree(free: number, owner: Uint8Array): void {
    let entry = free
    while (entry < this.#size && owner[entry] === NOBODY) {
      owner[entry] = FREE_LIST
      this.#bytes[PACKED_HEADER + entry * PACKED_ENTRY] = 0
      const next = this.#halves[HALVES + entry * ENTRY_HALVES + 1]!
      this.#next[entry] = next
      entry = next
    }
    // A list in a knot: the entries of it are nobody's, so that it is made anew.
    if (entry < this.#size) owner.fill(NOBODY)
  }

  /** The chains that are marked, by their counters. Marks of impossible ones are cleared. */
  #collect(owner: Uint8Array): RecoveredChain[] {
    const found: { entry: number; low: number; high: number }[] = []
    for (let entry = 0; entry < this.#size; entry++) {
      if (this.#bytes[PACKED_HEADER + entry * PACKED_ENTRY] !== 1) continue
      const word = WORDS + entry * ENTRY_WORDS
      found.push({ entry, low: this.#words[word + 2]!, high: this.#words[word + 3]! })
    }
    found.sort((a, b) => a.high - b.high || a.low - b.low)
    const newest = found.at(-1)
    if (newest !== undefined) this.#count(newest.low, newest.high)
    const chains: RecoveredChain[] = []
    for (const { entry } of found) {
      const chain = this.#chain(entry, owner)
      if (chain === undefined) this.#bytes[PACKED_HEADER + entry * PACKED_ENTRY] = 0
      else chains.push(chain)
    }
    return chains
  }

  /** The chain from `first` on, or undefined when its list is not one of entries that are nobody else's. */
  #chain(first: number, owner: Uint8Array): RecoveredChain | undefined {
    const lastAndNum = this.#words[WORDS + first * ENTRY_WORDS + 1]!
    const last = lastAndNum & 0xffff
    const slots = lastAndNum >>> 16
    if (slots === 0 || slots > this.#size) return undefined
    const entries: number[] = []
    let entry = first
    for (let i = 0; i < slots; i++) {
      if (entry >= this.#size || owner[entry] !== NOBODY) break
      owner[entry] = CHAIN
      entries.push(entry)
      const next = this.#halves[HALVES + entry * ENTRY_HALVES + 1]!
      // For when the chain is used: its entries are free then, and are taken one after the other.
      this.#next[entry] = next
      entry = next
    }
    if (entries.length !== slots || entries.at(-1) !== last) {
      for (const mine of entries) owner[mine] = NOBODY
      return undefined
    }
    let id = 0
    const descriptors = entries.map((mine) => {
      const word = WORDS + mine * ENTRY_WORDS
      const idAndFlags = this.#words[word + 4]!
      // Of the last one: the others' mean nothing (virtio 1.3 §2.8.6).
      id = idAndFlags & 0xffff
      const length = this.#words[word + 5]!
      return { low: this.#words[word + 6]!, high: this.#words[word + 7]!, length, flags: idAndFlags >>> 16 }
    })
    this.#last[first] = last
    return { entry: first, id, slots, descriptors }
  }

  /** Of a region that lost entries, or has a list in a knot: the free list is made anew of all that no chain has. */
  #relink(owner: Uint8Array): void {
    let free = this.#size
    for (let entry = this.#size - 1; entry >= 0; entry--) {
      if (owner[entry] === CHAIN) continue
      this.#link(entry, free)
      free = entry
    }
    this.#setBothHeads(free)
  }
}

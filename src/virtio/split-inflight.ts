/**
 * The in-flight region of a split ring (vhost-user.rst "Inflight I/O tracking", QueueRegionSplit). A chain is in flight
 * from `popped` until the used.idx that covers it is published. At every moment the next avail index is used.idx plus
 * the number of chains in flight, which is how it is found again.
 *
 * What is read from the region is read by `recover` alone; from then on it is only written.
 */
import {
  beginInitialisation,
  checkRegion,
  endInitialisation,
  inflightSize,
  isInitialised,
  SPLIT_ENTRY,
  SPLIT_HEADER,
} from './inflight-region.ts'

// QueueRegionSplit, as u16: u64 features, version, desc_num, last_batch_head, used_idx.
const LAST_BATCH_HEAD = 6
const USED_IDX = 7
// DescStateSplit: u8 inflight, u16 next at byte 6, u64 counter at byte 8.
const ENTRY_HALVES = SPLIT_ENTRY / 2
const NEXT = SPLIT_HEADER / 2 + 3
const ENTRY_WORDS = SPLIT_ENTRY / 4
const COUNTER = SPLIT_HEADER / 4 + 2

export class SplitInflight {
  readonly #region: Uint8Array
  readonly #bytes: Uint8Array
  readonly #halves: Uint16Array
  readonly #words: Uint32Array
  readonly #size: number
  #fresh = true
  // The next counter, low and high word: as a number it would change its representation on the way up.
  readonly #counter = new Uint32Array(2)
  // The heads that were used since the last publish. A driver that offers a head twice can overfill it: the rest is lost,
  // as is the ring.
  readonly #batch: Uint16Array
  #batched = 0
  #lastBatchHead = 0

  /**
   * @param bytes the region, at a multiple of 8 bytes and at least `inflightSize` long @param size entries of the ring
   * @throws InflightError when it is not
   */
  constructor(bytes: Uint8Array, size: number) {
    checkRegion(bytes, size, false)
    const length = SPLIT_HEADER + SPLIT_ENTRY * size
    this.#region = bytes.subarray(0, inflightSize(size, false))
    this.#bytes = new Uint8Array(bytes.buffer, bytes.byteOffset, length)
    this.#halves = new Uint16Array(bytes.buffer, bytes.byteOffset, length / 2)
    this.#words = new Uint32Array(bytes.buffer, bytes.byteOffset, length / 4)
    this.#size = size
    this.#batch = new Uint16Array(size)
  }

  /**
   * Nobody used the region before `recover`: where the ring goes on is not known from it, but from SET_VRING_BASE. Else
   * the next avail index is used.idx plus the number of heads recovered, also when there are none.
   */
  get fresh(): boolean {
    return this.#fresh
  }

  /**
   * What a process left in flight when it died: the heads in the order in which they were popped. They stay marked.
   * Initialises a region that nobody used yet. Can be interrupted and done again.
   * @param usedIdx used.idx in guest memory @throws InflightError when the region is of another ring or version
   */
  recover(usedIdx: number): readonly number[] {
    if (!isInitialised(this.#region, this.#size, false)) {
      beginInitialisation(this.#region)
      this.#halves[USED_IDX] = usedIdx
      endInitialisation(this.#region, this.#size)
      return []
    }
    this.#fresh = false
    this.#endBatch(usedIdx)
    const heads: number[] = []
    for (let head = 0; head < this.#size; head++) {
      if (this.#bytes[SPLIT_HEADER + head * SPLIT_ENTRY] === 1) heads.push(head)
    }
    // Read once: the front-end may write them while they are sorted.
    const low = heads.map((head) => this.#words[COUNTER + head * ENTRY_WORDS]!)
    const high = heads.map((head) => this.#words[COUNTER + head * ENTRY_WORDS + 1]!)
    const order = heads.map((_, i) => i).sort((a, b) => high[a]! - high[b]! || low[a]! - low[b]!)
    const newest = order.at(-1)
    if (newest !== undefined) this.#count(low[newest]!, high[newest]!)
    return order.map((i) => heads[i]!)
  }

  /** The chain was taken from the avail ring. Not for one that `recover` returned: it is marked already. */
  popped(head: number): void {
    const counter = this.#counter
    const word = COUNTER + head * ENTRY_WORDS
    // Nobody looks at the counter until the mark below is there.
    this.#words[word] = counter[0]!
    this.#words[word + 1] = counter[1]!
    this.#count(counter[0]!, counter[1]!)
    // From here on a process that dies has the chain in flight. It must be before anything is done for the chain.
    this.#bytes[SPLIT_HEADER + head * SPLIT_ENTRY] = 1
  }

  /**
   * The last chain that was popped goes back to the avail ring. Not for one that `recover` returned: the avail ring may
   * have another one at that place, so it stays marked.
   */
  unpopped(head: number): void {
    this.#bytes[SPLIT_HEADER + head * SPLIT_ENTRY] = 0
  }

  /** The used element of the chain was written; used.idx does not cover it yet. */
  used(head: number): void {
    // The list begins at last_batch_head and has as many heads as used.idx is ahead of used_idx: none of this counts
    // until used.idx is published, and an end mark is not needed. (Head 0 as the end loses head 0: spdk#3766.)
    this.#halves[NEXT + head * ENTRY_HALVES] = this.#lastBatchHead
    this.#halves[LAST_BATCH_HEAD] = head
    this.#lastBatchHead = head
    this.#batch[this.#batched++] = head
  }

  /** The used elements are published up to `usedIdx`. */
  published(usedIdx: number): void {
    const batched = Math.min(this.#batched, this.#size)
    for (let i = 0; i < batched; i++) this.#bytes[SPLIT_HEADER + this.#batch[i]! * SPLIT_ENTRY] = 0
    // Last: until it is there, a process that finds used.idx ahead clears the same marks from the list.
    this.#halves[USED_IDX] = usedIdx
    this.#batched = 0
  }

  /** Clears the marks that `published` of the dead process did not reach. */
  #endBatch(usedIdx: number): void {
    const batch = (usedIdx - this.#halves[USED_IDX]!) & 0xffff
    if (batch > this.#size) {
      // No batch is that long: the driver began anew with this region, and what was in flight before it did is void.
      for (let head = 0; head < this.#size; head++) this.#bytes[SPLIT_HEADER + head * SPLIT_ENTRY] = 0
    } else {
      let head = this.#halves[LAST_BATCH_HEAD]!
      for (let i = 0; i < batch && head < this.#size; i++) {
        this.#bytes[SPLIT_HEADER + head * SPLIT_ENTRY] = 0
        head = this.#halves[NEXT + head * ENTRY_HALVES]!
      }
    }
    this.#halves[USED_IDX] = usedIdx
  }

  /** The counter behind this one. */
  #count(low: number, high: number): void {
    this.#counter[0] = low + 1
    if (low === 0xffff_ffff) this.#counter[1] = high + 1
    else this.#counter[1] = high
  }
}

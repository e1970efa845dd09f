/**
 * Completions that can't be written to the ring yet, in the order in which they have to be. Two rings need it: one with
 * VIRTIO_F_IN_ORDER, where a chain waits for those before it (virtio 1.3 §2.7.9, §2.8.8), and one behind a vIOMMU whose
 * used ring has no translation at the moment. Pure; it knows heads, not chains or rings.
 */

const FREE = 0
const ENTERED = 1
const COMPLETE = 2

export class CompletionOrder {
  /**
   * A queue: `#count` heads from `#first` on. As a head is in it once, it never holds more than the ring has entries.
   */
  readonly #heads: Uint16Array
  #first = 0
  #count = 0
  /** By head. */
  readonly #state: Uint8Array
  readonly #written: Uint32Array

  /** @param size entries of the ring; heads are below it */
  constructor(size: number) {
    this.#heads = new Uint16Array(size)
    this.#state = new Uint8Array(size)
    this.#written = new Uint32Array(size)
  }

  get empty(): boolean {
    return this.#count === 0
  }

  /** Whether the head is in here, complete or not: the driver may not offer it again. */
  has(head: number): boolean {
    return this.#state[head] !== FREE
  }

  /** Puts a head that is not in here behind all others. */
  enter(head: number): void {
    this.#heads[this.#at(this.#count)] = head
    this.#count++
    this.#state[head] = ENTERED
  }

  /** Takes back the last `enter`, of a head that is not complete. */
  leave(): void {
    this.#count--
    this.#state[this.#heads[this.#at(this.#count)]!] = FREE
  }

  complete(head: number, written: number): void {
    this.#state[head] = COMPLETE
    this.#written[head] = written
  }

  /** The head that is to be written next, -1 when the first one is not complete. */
  next(): number {
    if (this.#count === 0) return -1
    const head = this.#heads[this.#first]!
    return this.#state[head] === COMPLETE ? head : -1
  }

  /** The bytes that `complete` said. */
  written(head: number): number {
    return this.#written[head]!
  }

  /** Takes out what `next` returned. */
  shift(): void {
    this.#state[this.#heads[this.#first]!] = FREE
    this.#first = this.#at(1)
    this.#count--
  }

  /** The place of the entry `index` behind the first. Packed rings are of any size, so it can't be masked. */
  #at(index: number): number {
    const place = this.#first + index
    return place < this.#heads.length ? place : place - this.#heads.length
  }
}

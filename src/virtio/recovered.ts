/**
 * The chains that a former back-end left in flight, on their way through `pop` a second time. Pure; it knows their
 * order, the ring knows what they are.
 */
export class RecoveredChains {
  /** In the order in which the driver made them available; no head twice. */
  readonly #heads: readonly number[]
  /** Those that `pop` returned and nobody used yet. */
  readonly #taken = new Set<number>()
  #next = 0

  constructor(heads: readonly number[]) {
    this.#heads = heads
  }

  /** Some have to be popped before anything of the ring. */
  get waiting(): boolean {
    return this.#next < this.#heads.length
  }

  /** Nothing is left to remember. */
  get over(): boolean {
    return !this.waiting && this.#taken.size === 0
  }

  /** Where the next one is in the list of the constructor. */
  get position(): number {
    return this.#next
  }

  /** The next one was popped. */
  take(): void {
    this.#taken.add(this.#heads[this.#next]!)
    this.#next++
  }

  /** Puts the one back that was popped last. Returns false when this head is one of the ring. */
  putBack(head: number): boolean {
    // Not by its place alone: a driver may offer the head of a chain that was recovered and used again.
    if (!this.#taken.delete(head)) return false
    this.#next--
    return true
  }

  used(head: number): void {
    this.#taken.delete(head)
  }
}

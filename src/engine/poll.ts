/**
 * How long to poll before sleeping, after QEMU's `poll-max-ns` (util/aio-posix.c): the time grows while sleeps turn
 * out to be short enough that polling would have caught the event, and drops to nothing when they don't. Pure.
 */

/** First step up from nothing, in microseconds (QEMU's own). */
const GROW_START = 4
const GROW_FACTOR = 2

export class AdaptivePoll {
  /** How long to poll now, in microseconds: 0 … max. */
  current = 0
  readonly #max: number

  /** @param max microseconds; 0 turns polling off */
  constructor(max: number) {
    this.#max = max
  }

  /** An event came after `waited` microseconds, of polling and of sleeping together. */
  adjust(waited: number): void {
    if (waited <= this.current) return
    if (waited > this.#max) this.current = 0
    else
      this.current =
        this.current === 0 ? Math.min(GROW_START, this.#max) : Math.min(this.current * GROW_FACTOR, this.#max)
  }
}

/** Keeps whoever is on the other end of a socket from filling the disk with log lines. Pure. */

/** Lines at once, and how long each takes to be earned again. */
const BURST = 20
const EARN_MS = 5000

export class LineLimit {
  #credit = BURST
  #earnedAt: number
  #leftOut = 0
  readonly #now: () => number

  /** @param now milliseconds of a clock that never goes back */
  constructor(now: () => number = () => performance.now()) {
    this.#now = now
    this.#earnedAt = now()
  }

  /** Undefined when a line has to be left out; else what to add to it: how many were, since the last one. */
  take(): { leftOut?: number } | undefined {
    const earned = Math.floor((this.#now() - this.#earnedAt) / EARN_MS)
    if (earned > 0) {
      this.#credit = Math.min(BURST, this.#credit + earned)
      this.#earnedAt += earned * EARN_MS
    }
    if (this.#credit === 0) {
      this.#leftOut++
      return undefined
    }
    this.#credit--
    const leftOut = this.#leftOut
    this.#leftOut = 0
    return leftOut === 0 ? {} : { leftOut }
  }
}

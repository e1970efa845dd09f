/**
 * A latency histogram on a typed array: log-linear buckets (64 per power of two, so at most 1.6 % wide), no
 * allocation when recording. Pure arithmetic; the unit is the caller's.
 */

const SUB_BITS = 6
const SUB = 1 << SUB_BITS
/** Values at and above 2^40 (18 minutes in nanoseconds) fall into the last bucket. */
const MAX_BITS = 40
const BUCKETS = (MAX_BITS - SUB_BITS + 1) * SUB

export class Histogram {
  readonly #buckets = new Float64Array(BUCKETS)
  count = 0
  sum = 0
  min = Number.POSITIVE_INFINITY
  max = 0

  /** Records a value ≥ 0. */
  record(value: number): void {
    this.count++
    this.sum += value
    if (value > this.max) this.max = value
    if (value < this.min) this.min = value
    const index = bucketOf(value)
    this.#buckets[index] = (this.#buckets[index] ?? 0) + 1
  }

  get mean(): number {
    return this.count === 0 ? 0 : this.sum / this.count
  }

  /**
   * The value that `fraction` (0 … 1) of all records don't exceed: the upper end of its bucket, at most `max`. 0 when
   * empty.
   */
  percentile(fraction: number): number {
    if (this.count === 0) return 0
    const rank = Math.max(1, Math.ceil(fraction * this.count))
    let seen = 0
    for (let i = 0; i < BUCKETS; i++) {
      seen += this.#buckets[i] ?? 0
      if (seen >= rank) return Math.min(this.max, bucketEnd(i))
    }
    return this.max
  }

  reset(): void {
    this.#buckets.fill(0)
    this.count = this.sum = this.max = 0
    this.min = Number.POSITIVE_INFINITY
  }
}

/** Below 64 one bucket per value; above, 64 buckets per power of two. */
function bucketOf(value: number): number {
  if (value < SUB) return value < 0 ? 0 : value | 0
  if (value < 0x4000_0000) {
    const whole = value | 0
    const shift = 31 - Math.clz32(whole) - SUB_BITS
    return shift * SUB + (whole >> shift)
  }
  const high = Math.floor(value / 0x1000_0000) // 28 bits are far more than the 6 that count
  const shift = 31 - Math.clz32(Math.min(high, 0x7fff_ffff)) + 28 - SUB_BITS
  return Math.min(BUCKETS - 1, shift * SUB + Math.floor(value / 2 ** shift))
}

/** The largest value of a bucket. */
function bucketEnd(index: number): number {
  if (index < 2 * SUB) return index
  const shift = Math.floor(index / SUB) - 1
  return (index - shift * SUB + 1) * 2 ** shift - 1
}

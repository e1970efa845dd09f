/** Seeded random numbers for the fuzzers: the same seed plays the same game. */

/** Numbers at the borders of what fields hold. */
const BORDERS = [0, 1, 2, 3, 4, 7, 8, 15, 16, 255, 256, 4095, 4096, 4097, 32767, 32768, 65535, 65536, 0x7fff_ffff]
const HIGH_BORDERS = [0x8000_0000, 0xffff_f000, 0xffff_ffff]

export class Random {
  #state: number

  constructor(seed: number) {
    this.#state = seed | 0
  }

  /** A u32 (mulberry32). */
  next(): number {
    this.#state = (this.#state + 0x6d2b79f5) | 0
    let t = Math.imul(this.#state ^ (this.#state >>> 15), 1 | this.#state)
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t
    return (t ^ (t >>> 14)) >>> 0
  }

  /** 0 … limit − 1. */
  below(limit: number): number {
    return this.next() % limit
  }

  /** True once in `every` times. */
  one(every: number): boolean {
    return this.next() % every === 0
  }

  pick<T>(list: readonly T[]): T {
    return list[this.next() % list.length] as T
  }

  /** Two different ones. */
  two<T>(list: readonly T[]): [T, T] {
    const first = this.below(list.length)
    const second = (first + 1 + this.below(list.length - 1)) % list.length
    return [list[first] as T, list[second] as T]
  }

  /** A u32, small or at a border more often than anywhere else. */
  odd32(): number {
    switch (this.below(4)) {
      case 0:
        return this.below(16)
      case 1:
        return this.pick(BORDERS)
      case 2:
        return this.one(2) ? this.pick(HIGH_BORDERS) : (1 << this.below(32)) >>> 0
      default:
        return this.next()
    }
  }

  /** A u64 of that kind. */
  odd64(): bigint {
    const high = this.one(2) ? 0 : this.one(2) ? this.odd32() : this.below(0x8000)
    const value = (BigInt(high) << 32n) | BigInt(this.odd32())
    return this.one(8) ? BigInt.asUintN(64, -value) : value
  }

  fill(bytes: Uint8Array): Uint8Array {
    for (let i = 0; i < bytes.length; i++) bytes[i] = this.next()
    return bytes
  }

  /** A seed for a part of the game, so that the part can be played alone. */
  fork(): number {
    return this.next()
  }
}

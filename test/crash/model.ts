/**
 * What a disk must hold while a load with many requests in flight writes to it: the acknowledged version of every
 * sector, and which sectors are in flight. Pure: it knows neither requests nor daemons.
 *
 * A sector's bytes follow from seed, sector and version, so a stale, torn or misplaced one tells what it is. A sector
 * under a write in flight belongs to that write: nothing else touches it, so what is acknowledged is what must be
 * read, and no allowance for races is needed.
 */

export const SECTOR = 512
const WORDS = SECTOR / 4

export class DiskModel {
  readonly sectors: number
  readonly #seed: number
  /** Version of the last acknowledged write; 0 = the fresh image's zeroes. */
  readonly #versions: Uint32Array
  /** 1 = the last acknowledged write was WRITE_ZEROES. */
  readonly #zeroed: Uint8Array
  /** -1 = a write is in flight, n = so many reads are. */
  readonly #users: Int16Array
  readonly #expected = new Uint32Array(WORDS)

  constructor(seed: number, sectors: number) {
    this.#seed = seed
    this.sectors = sectors
    this.#versions = new Uint32Array(sectors)
    this.#zeroed = new Uint8Array(sectors)
    this.#users = new Int16Array(sectors)
  }

  /** Takes sectors for a request. False, and nothing taken, when one of them is in flight in a way that excludes it. */
  claim(first: number, count: number, write: boolean): boolean {
    for (let sector = first; sector < first + count; sector++) {
      const users = this.#users[sector] ?? -1
      if (write ? users !== 0 : users < 0) return false
    }
    for (let sector = first; sector < first + count; sector++) {
      this.#users[sector] = write ? -1 : (this.#users[sector] ?? 0) + 1
    }
    return true
  }

  /** The bytes that a claimed write brings. */
  fill(words: Uint32Array, first: number, count: number): void {
    for (let i = 0; i < count; i++) {
      const version = (this.#versions[first + i] ?? 0) + 1
      this.#content(words, i * WORDS, first + i, version)
    }
  }

  /** A write was acknowledged. */
  written(first: number, count: number, zeroes: boolean): void {
    for (let sector = first; sector < first + count; sector++) {
      this.#versions[sector] = (this.#versions[sector] ?? 0) + 1
      this.#zeroed[sector] = zeroes ? 1 : 0
      this.#users[sector] = 0
    }
  }

  /** A read has ended. */
  read(first: number, count: number): void {
    for (let sector = first; sector < first + count; sector++) this.#users[sector] = (this.#users[sector] ?? 1) - 1
  }

  /** Compares what was read with what was acknowledged. @throws Error that says what is there instead */
  check(words: Uint32Array, first: number, count: number, what: string): void {
    const expected = this.#expected
    for (let i = 0; i < count; i++) {
      this.#expect(expected, first + i)
      const at = i * WORDS
      for (let word = 0; word < WORDS; word++) {
        if (words[at + word] === expected[word]) continue
        throw new Error(`${what}: ${this.#explain(words.subarray(at, at + WORDS), first + i)}`)
      }
    }
  }

  /** Write version of a sector, for messages. */
  version(sector: number): number {
    return this.#versions[sector] ?? 0
  }

  #expect(into: Uint32Array, sector: number): void {
    if (this.#zeroed[sector] === 1) into.fill(0)
    else this.#content(into, 0, sector, this.#versions[sector] ?? 0)
  }

  #content(into: Uint32Array, at: number, sector: number, version: number): void {
    if (version === 0) {
      into.fill(0, at, at + WORDS)
      return
    }
    into[at] = sector
    into[at + 1] = version
    into[at + 2] = this.#seed
    let x = (Math.imul(sector + 1, 0x9e3779b1) ^ Math.imul(version, 0x85ebca6b) ^ this.#seed) | 0 || 1
    for (let word = 3; word < WORDS; word++) {
      x ^= x << 13
      x ^= x >>> 17
      x ^= x << 5
      into[at + word] = x
    }
  }

  #explain(found: Uint32Array, sector: number): string {
    const version = this.#versions[sector] ?? 0
    const wanted = this.#zeroed[sector] === 1 ? `zeroes (version ${version})` : `version ${version}`
    const [foundSector = 0, foundVersion = 0, foundSeed = 0] = found
    const parts: string[] = []
    const other = new Uint32Array(WORDS)
    let whole = ''
    const compare = (candidate: string): void => {
      let first = -1
      let count = 0
      for (let word = 0; word < WORDS; word++) {
        if (found[word] !== other[word]) continue
        if (first < 0) first = word
        count++
      }
      if (count === WORDS) whole ||= candidate
      // Every label has its sector and the seed in common.
      else if (count > 3) parts.push(`${count} of its ${WORDS} words (from ${first}) ${candidate}`)
    }
    for (let back = 0; back <= Math.min(version, 4); back++) {
      this.#content(other, 0, sector, version - back)
      compare(`version ${version - back}`)
    }
    this.#content(other, 0, sector, version + 1)
    compare(`version ${version + 1}, which was never acknowledged`)
    other.fill(0)
    compare('zeroes')
    if (whole !== '') parts.splice(0, parts.length, whole)
    if (foundSeed === this.#seed && (foundSector !== sector || foundVersion + 4 < version)) {
      parts.push(`labelled as version ${foundVersion} of sector ${foundSector}`)
    }
    const words = [...found.subarray(0, 4)].map((word) => word.toString(16)).join(' ')
    return `sector ${sector} must be ${wanted} and is ${parts.join('; ') || `none of its versions: ${words} …`}`
  }
}

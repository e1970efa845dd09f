/**
 * Guest memory for the ring programs: four regions in one buffer with guard pages between them, and a copy of it all, by
 * which every byte is found that changed.
 */
import { GuestMemory, type RegionDescription } from '../../src/virtio/memory.ts'
import { promise } from './pure-input.ts'

/** Small, since all of it is compared after every step. */
export const PAGE = 1024
/** Two regions that touch at PAGE, and two that touch at 4 GiB, where the high word of addresses begins. */
const PLACES = [0, PAGE, 2 ** 32 - PAGE, 2 ** 32]
const GUARD = 0xc5

export interface Range {
  /** In the buffer. */
  readonly start: number
  readonly end: number
}

export class ProgramMemory {
  readonly buffer = new SharedArrayBuffer((2 * PLACES.length + 1) * PAGE)
  readonly view = new DataView(this.buffer)
  readonly regions: readonly RegionDescription[] = PLACES.map((gpa, i) => ({
    gpa,
    size: PAGE,
    hva: 2 ** 40 + (2 * i + 1) * PAGE,
    buffer: this.buffer,
    offset: (2 * i + 1) * PAGE,
  }))
  readonly memory = new GuestMemory(this.regions)
  readonly #bytes = Buffer.from(this.buffer)
  readonly #copy = Buffer.alloc(this.buffer.byteLength)

  /** Everything zero, guards as they must stay. */
  clear(): void {
    this.#bytes.fill(0)
    for (let page = 0; page <= 2 * PLACES.length; page += 2) this.#bytes.fill(GUARD, page * PAGE, (page + 1) * PAGE)
    this.#bytes.copy(this.#copy)
  }

  /** Where [gpa, gpa + length) is in the buffer, for an address that is in one region. */
  at(gpa: number): number {
    const region = this.regions.find((one) => gpa >= one.gpa && gpa < one.gpa + one.size)
    if (region === undefined) throw new RangeError(`${gpa} is in no region`)
    return (region.offset ?? 0) + gpa - region.gpa
  }

  /** What the driver wrote is its own business. */
  accept(): void {
    this.#bytes.copy(this.#copy)
  }

  /** @throws Violation when anything outside of `allowed` differs from what it was at the last `accept` */
  check(allowed: readonly Range[], what: string): void {
    if (this.#bytes.compare(this.#copy) === 0) return
    const { length } = this.#bytes
    for (let at = 0; at < length; at++) {
      if (this.#bytes[at] === this.#copy[at]) continue
      const page = Math.floor(at / PAGE)
      promise(page % 2 === 1, `${what} wrote to a guard page, at ${at}`)
      promise(
        allowed.some(({ start, end }) => at >= start && at < end),
        `${what} wrote to guest memory that is not its own, at ${at}`
      )
    }
    this.accept()
  }
}

/**
 * Guest memory as the data plane sees it: regions of guest-physical addresses (GPA, a checked number) over
 * SharedArrayBuffers. Pure: runs on any buffer. It must not know who mapped the memory or who releases it.
 */

/** One region, in a form that can be posted to an iothread. */
export interface RegionDescription {
  /** Guest-physical address of byte 0, a multiple of 4096; gpa + size ≤ 2^53. */
  readonly gpa: number
  /** Bytes, a multiple of 4096. */
  readonly size: number
  /** Address of byte 0 in this process, for entries that the kernel reads. */
  readonly hva: number
  readonly buffer: SharedArrayBuffer | ArrayBuffer
}

export class MemoryRegion {
  readonly gpa: number
  /** First GPA behind the region. */
  readonly end: number
  readonly size: number
  readonly hva: number
  readonly buffer: SharedArrayBuffer | ArrayBuffer
  readonly bytes: Uint8Array
  /** The same bytes as little-endian words; regions start and end on pages, so the word index is offset / 4. */
  readonly words: Uint32Array

  constructor(description: RegionDescription) {
    this.gpa = description.gpa
    this.end = description.gpa + description.size
    this.size = description.size
    this.hva = description.hva
    this.buffer = description.buffer
    this.bytes = new Uint8Array(description.buffer, 0, description.size)
    this.words = new Uint32Array(description.buffer, 0, Math.floor(description.size / 4))
  }
}

/** An immutable set of regions that don't overlap. A change of the memory table makes a new one. */
export class GuestMemory {
  /** Ascending by GPA. */
  readonly regions: readonly MemoryRegion[]
  // Drivers touch one region for long stretches, so the last hit is tried before the search.
  #last = 0

  constructor(regions: readonly RegionDescription[]) {
    this.regions = regions.map((region) => new MemoryRegion(region)).sort((a, b) => a.gpa - b.gpa)
  }

  /** The index of the region that contains `gpa`, or -1. */
  find(gpa: number): number {
    const regions = this.regions
    const last = regions[this.#last]
    if (last !== undefined && gpa >= last.gpa && gpa < last.end) return this.#last
    let low = 0
    let high = regions.length - 1
    while (low <= high) {
      const middle = (low + high) >>> 1
      const region = regions[middle]!
      if (gpa < region.gpa) high = middle - 1
      else if (gpa >= region.end) low = middle + 1
      else {
        this.#last = middle
        return middle
      }
    }
    return -1
  }

  /** The region that holds all of [gpa, gpa + length), or undefined. */
  contiguous(gpa: number, length: number): MemoryRegion | undefined {
    const index = this.find(gpa)
    if (index < 0) return undefined
    const region = this.regions[index]!
    return length <= region.end - gpa ? region : undefined
  }
}

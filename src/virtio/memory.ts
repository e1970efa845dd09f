/**
 * Guest memory as the data plane sees it: regions of guest-physical addresses (GPA, a checked number) over
 * SharedArrayBuffers. Pure: runs on any buffer. It must not know who mapped the memory or who releases it.
 */

// What an IOTLB entry allows the device (vhost-user.rst "An IOTLB message").
export const IOTLB_READ = 1
export const IOTLB_WRITE = 2

/** One region, in a form that can be posted to an iothread. */
export interface RegionDescription {
  /**
   * The address of byte 0 in descriptors, a multiple of 4096; gpa + size ≤ 2^53. Guest-physical, or behind a vIOMMU an IOVA.
   */
  readonly gpa: number
  /** Bytes, a multiple of 4096. */
  readonly size: number
  /** Address of byte 0 in this process, for entries that the kernel reads. */
  readonly hva: number
  readonly buffer: SharedArrayBuffer | ArrayBuffer
  /** Where byte 0 is in `buffer`, a multiple of 4; default 0. */
  readonly offset?: number
  /** Guest-physical address of byte 0, for the dirty log; default `gpa`. */
  readonly physical?: number
  /** IOTLB_READ, IOTLB_WRITE or both, the default. */
  readonly access?: number
}

export class MemoryRegion {
  readonly gpa: number
  /** First address behind the region. */
  readonly end: number
  readonly size: number
  readonly hva: number
  readonly buffer: SharedArrayBuffer | ArrayBuffer
  /** Where the region starts in `buffer`. */
  readonly start: number
  readonly physical: number
  readonly access: number
  readonly bytes: Uint8Array
  /** The same bytes as little-endian words; regions start and end on pages, so the word index is offset / 4. */
  readonly words: Uint32Array

  constructor(description: RegionDescription) {
    this.gpa = description.gpa
    this.end = description.gpa + description.size
    this.size = description.size
    this.hva = description.hva
    this.buffer = description.buffer
    this.start = description.offset ?? 0
    this.physical = description.physical ?? description.gpa
    this.access = description.access ?? IOTLB_READ | IOTLB_WRITE
    this.bytes = new Uint8Array(description.buffer, this.start, description.size)
    this.words = new Uint32Array(description.buffer, this.start, Math.floor(description.size / 4))
  }
}

/**
 * Whether offsets in the buffers of both mean the same bytes. The buffers may be two objects: every message to an
 * iothread makes new ones of the same memory.
 */
export function isOneMapping(a: MemoryRegion, b: MemoryRegion): boolean {
  if (a.buffer === b.buffer) return true
  return a.hva - a.start === b.hva - b.start && a.buffer.byteLength === b.buffer.byteLength
}

/** An immutable set of regions that don't overlap. A change of the memory table makes a new one. */
export class GuestMemory {
  /** Ascending by GPA. */
  readonly regions: readonly MemoryRegion[]
  /**
   * The addresses are IOVAs, the regions what the IOTLB has of them: an address without a region is a miss to ask the front-end
   * about, not an error of the driver, and a region may allow only one direction.
   */
  readonly translated: boolean
  // Drivers touch one region for long stretches, so the last hit is tried before the search.
  #last = 0

  /** @param regions a {@link MemoryRegion} is taken as it is: an IOTLB with thousands of entries changes one of them at a time */
  constructor(regions: readonly (RegionDescription | MemoryRegion)[], translated = false) {
    this.translated = translated
    this.regions = regions
      .map((region) => (region instanceof MemoryRegion ? region : new MemoryRegion(region)))
      .sort((a, b) => a.gpa - b.gpa)
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

/**
 * The control thread's copy of the IOTLB (vhost-user.rst "IOMMU support"): what the front-end said about which IOVA, in
 * its own addresses. The iothreads have their own, made of it; this one knows what an entry becomes when the memory
 * table changes. It must not know the iothreads.
 */
import type { RegionDescription } from '../virtio/memory.ts'
import type { MemoryTable } from './memory-table.ts'

export interface Translation {
  readonly iova: number
  /** Bytes. */
  readonly size: number
  readonly uva: number
  /** IOTLB_READ, IOTLB_WRITE or both. */
  readonly access: number
}

/**
 * A front-end that answers misses never gets there: a whole guest in pages of 4 KiB is as many entries as it has pages
 * mapped. Beyond it an old entry goes; a miss brings it back when the iothreads lose it too.
 */
export const MAX_TRANSLATIONS = 65536

export class Translations {
  /** Ascending, without overlaps. */
  #entries: Translation[] = []

  get entries(): readonly Translation[] {
    return this.#entries
  }

  /** Puts `entries`, which follow each other without gaps, in place of what there is in their range. */
  update(...entries: readonly Translation[]): void {
    const start = entries[0]!.iova
    const last = entries.at(-1)!
    this.invalidate(start, last.iova + last.size - start)
    const over = this.#entries.length + entries.length - MAX_TRANSLATIONS
    if (over > 0) this.#entries.splice(0, over)
    this.#entries.splice(this.#after(start), 0, ...entries)
  }

  /** Removes what there is of [iova, iova + size); entries that reach beyond it are cut. */
  invalidate(iova: number, size: number): void {
    const end = iova + size
    const first = this.#after(iova)
    let last = first
    const left: Translation[] = []
    while (last < this.#entries.length && this.#entries[last]!.iova < end) {
      const entry = this.#entries[last++]!
      if (entry.iova < iova) left.push({ ...entry, size: iova - entry.iova })
      const over = entry.iova + entry.size - end
      if (over > 0) left.push({ ...entry, iova: end, uva: entry.uva + entry.size - over, size: over })
    }
    this.#entries.splice(first, last - first, ...left)
  }

  clear(): void {
    this.#entries = []
  }

  /** Forgets the entries that don't lie in `memory`. */
  keep(memory: MemoryTable): void {
    this.#entries = this.#entries.filter(({ uva, size }) => memory.pieces(uva, size) !== undefined)
  }

  /** All entries, for the iothreads. All lie in `memory`. */
  describe(memory: MemoryTable): RegionDescription[] {
    return this.#entries.flatMap((entry) => describeTranslation(entry, memory) ?? [])
  }

  /**
   * The guest-physical address of `length` bytes at `iova`; undefined when they are not, or not yet, mapped to one
   * piece of guest memory.
   */
  physical(iova: number, length: number, memory: MemoryTable): number | undefined {
    let start: number | undefined
    for (let done = 0, i = this.#after(iova); done < length; i++) {
      const entry = this.#entries[i]
      if (entry === undefined || entry.iova > iova + done) return undefined
      const skip = iova + done - entry.iova
      const size = Math.min(length - done, entry.size - skip)
      for (const piece of memory.pieces(entry.uva + skip, size) ?? []) {
        const gpa = piece.region.gpa + piece.offset
        start ??= gpa
        if (gpa !== start + done) return undefined
        done += piece.size
      }
    }
    return start
  }

  /** The index of the first entry that ends behind `iova`. */
  #after(iova: number): number {
    let low = 0
    let high = this.#entries.length
    while (low < high) {
      const middle = (low + high) >>> 1
      const entry = this.#entries[middle]!
      if (entry.iova + entry.size <= iova) low = middle + 1
      else high = middle
    }
    return low
  }
}

/** What an entry is to the iothreads: one region for each region of the memory table that it lies in. */
export function describeTranslation(
  { iova, size, uva, access }: Translation,
  memory: MemoryTable
): RegionDescription[] | undefined {
  const pieces = memory.pieces(uva, size)
  if (pieces === undefined) return undefined
  let done = 0
  return pieces.map(({ region, offset, size: length }) => {
    const piece = {
      gpa: iova + done,
      size: length,
      hva: region.hva + offset,
      buffer: region.buffer,
      offset,
      physical: region.gpa + offset,
      access,
    }
    done += length
    return piece
  })
}

/**
 * What the front-end told of the vIOMMU's translations (vhost-user.rst "IOMMU support"): entries by IOVA, each over a
 * piece of guest memory. Pure; every iothread has its own for every session. It must not know how misses are asked for,
 * nor that the memory under its entries is still mapped: who unmaps it invalidates first.
 */
import { GuestMemory, isOneMapping, MemoryRegion, type RegionDescription } from './memory.ts'

/**
 * More entries than this make the oldest ones go: if they are needed again, there is a miss. Chains number their
 * regions with 16 bits. Pieces that are contiguous are one entry, so a guest needs that many only when its buffers are
 * scattered page by page over 256 MiB.
 */
export const IOTLB_ENTRIES = 65536

export class Iotlb {
  readonly #limit: number
  /** Ascending by IOVA, without overlap. */
  readonly #entries: MemoryRegion[] = []
  /** The same ones, oldest first. */
  readonly #ages = new Set<MemoryRegion>()
  #memory: GuestMemory | undefined

  /** @param limit entries that it holds, 2 … 65536 */
  constructor(limit = IOTLB_ENTRIES) {
    this.#limit = limit
  }

  /**
   * An entry in place of all that its range had. It and the ones beside it become one when IOVA, memory, physical
   * address and access continue: a ring lies in one region, and has more bytes than an entry of 4 KiB.
   * @param region the caller checked it: whole pages, inside its buffer
   */
  update(region: RegionDescription): void {
    if (region.size <= 0) return
    this.invalidate(region.gpa, region.size)
    let entry = new MemoryRegion(region)
    // The place that invalidate has left.
    const at = this.#firstEndingAfter(entry.gpa)
    const before = this.#entries[at - 1]
    const after = this.#entries[at]
    let start = at
    let end = at
    if (before !== undefined && continues(before, entry)) {
      entry = part(before, 0, before.size + entry.size)
      start = at - 1
    }
    if (after !== undefined && continues(entry, after)) {
      entry = part(entry, 0, entry.size + after.size)
      end = at + 1
    }
    this.#replace(start, end, [entry])
    if (this.#entries.length > this.#limit) this.#dropOldest()
  }

  /** Forgets [address, address + size). Entries at its borders keep what is outside. */
  invalidate(address: number, size: number): void {
    if (size <= 0) return
    const end = address + size
    const first = this.#firstEndingAfter(address)
    let behind = first
    while (behind < this.#entries.length && this.#entries[behind]!.gpa < end) behind++
    if (behind === first) return
    const left: MemoryRegion[] = []
    const low = this.#entries[first]!
    if (low.gpa < address) left.push(part(low, 0, address - low.gpa))
    const high = this.#entries[behind - 1]!
    if (high.end > end) left.push(part(high, end - high.gpa, high.end - end))
    this.#replace(first, behind, left)
    if (this.#entries.length > this.#limit) this.#dropOldest()
  }

  /** All entries, as they are now. The same object until the next change. */
  memory(): GuestMemory {
    this.#memory ??= new GuestMemory(this.#entries, true)
    return this.#memory
  }

  #replace(start: number, end: number, entries: readonly MemoryRegion[]): void {
    for (let i = start; i < end; i++) this.#ages.delete(this.#entries[i]!)
    this.#entries.splice(start, end - start, ...entries)
    for (const entry of entries) this.#ages.add(entry)
    this.#memory = undefined
  }

  /**
   * Many at a time: taking one out of the middle moves all behind it, and one message of a front-end with hundreds of
   * regions did that hundreds of times, for half a second in which nobody else was served.
   */
  #dropOldest(): void {
    const gone = new Set<MemoryRegion>()
    const count = Math.max(1, this.#limit >>> 4)
    for (const oldest of this.#ages) {
      gone.add(oldest)
      if (gone.size === count) break
    }
    for (const oldest of gone) this.#ages.delete(oldest)
    const entries = this.#entries
    let kept = 0
    for (const entry of entries) if (!gone.has(entry)) entries[kept++] = entry
    entries.length = kept
    this.#memory = undefined
  }

  /** Index of the first entry whose end is above `address`; the number of entries when there is none. */
  #firstEndingAfter(address: number): number {
    let low = 0
    let high = this.#entries.length
    while (low < high) {
      const middle = (low + high) >>> 1
      if (this.#entries[middle]!.end <= address) low = middle + 1
      else high = middle
    }
    return low
  }
}

function continues(a: MemoryRegion, b: MemoryRegion): boolean {
  return (
    a.end === b.gpa &&
    isOneMapping(a, b) &&
    a.start + a.size === b.start &&
    a.physical + a.size === b.physical &&
    a.access === b.access
  )
}

/** `size` bytes from `from` on, which may be more than the entry has: its buffer does. */
function part(entry: MemoryRegion, from: number, size: number): MemoryRegion {
  return new MemoryRegion({
    gpa: entry.gpa + from,
    size,
    hva: entry.hva + from,
    buffer: entry.buffer,
    offset: entry.start + from,
    physical: entry.physical + from,
    access: entry.access,
  })
}

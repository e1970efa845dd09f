/**
 * The front-end's memory regions: checked, mapped, translated. It owns the mappings until `release`; who may still
 * use them is the session's business.
 */
import { fstatSync } from 'node:fs'
import { native } from '../native.ts'
import type { RegionDescription } from '../virtio/memory.ts'
import { ProtocolError } from './errors.ts'
import { MAX_MEM_SLOTS, type MemoryRegionDescription } from './wire.ts'

/** Addresses must survive as a double, and user addresses are below it anyway. */
const ADDRESS_LIMIT = 1n << 53n
const PAGE = 4096n
const S_IFMT = 0o170000
const S_IFREG = 0o100000

/** One mapped region. */
export class MappedRegion {
  readonly gpa: number
  readonly size: number
  /** The front-end's own address of it: ring addresses come as these. */
  readonly uva: number
  readonly hva: number
  readonly buffer: SharedArrayBuffer
  /** Which file, and from which offset: tells a region that is added again from another one. */
  readonly source: string

  constructor(gpa: number, size: number, uva: number, hva: number, buffer: SharedArrayBuffer, source: string) {
    this.gpa = gpa
    this.size = size
    this.uva = uva
    this.hva = hva
    this.buffer = buffer
    this.source = source
  }

  /** The front-end truncated the file: the SIGBUS guard laid empty memory over the mapping. */
  get faulted(): boolean {
    return native.faults(this.hva) > 0
  }

  /** Gives the pages back at once. Nothing may use the region any more; a stale view reads zeroes. */
  release(): void {
    native.release(this.hva)
  }
}

export class MemoryTable {
  regions: MappedRegion[] = []
  /** How often a region was added again, by its addresses. */
  readonly #again = new Map<string, number>()

  /** Bytes mapped. */
  get size(): number {
    return this.regions.reduce((sum, region) => sum + region.size, 0)
  }

  describe(): RegionDescription[] {
    return this.regions.map(({ gpa, size, hva, buffer }) => ({ gpa, size, hva, buffer }))
  }

  /**
   * Maps `description` from `fd`, which stays the caller's, beside `others`. @throws ProtocolError
   */
  static map(description: MemoryRegionDescription, fd: number, others: readonly MappedRegion[]): MappedRegion {
    const { guestAddress, size, userAddress, mmapOffset } = description
    if (others.length >= MAX_MEM_SLOTS) throw memoryError(`more than ${MAX_MEM_SLOTS} regions`)
    if (size === 0n) throw memoryError('a region of 0 bytes')
    for (const [name, value] of Object.entries(description)) {
      if (value % PAGE !== 0n)
        throw memoryError(`${name} 0x${(value as bigint).toString(16)} is not a multiple of 4096`)
    }
    if (
      guestAddress + size > ADDRESS_LIMIT ||
      userAddress + size > ADDRESS_LIMIT ||
      mmapOffset + size > ADDRESS_LIMIT
    ) {
      throw memoryError('a region reaches beyond 2^53')
    }
    const gpa = Number(guestAddress)
    const uva = Number(userAddress)
    const length = Number(size)
    for (const other of others) {
      if (gpa < other.gpa + other.size && other.gpa < gpa + length)
        throw memoryError('two regions overlap in guest memory')
      if (uva < other.uva + other.size && other.uva < uva + length)
        throw memoryError("two regions overlap in the front-end's memory")
    }
    const mapping = mapRegion(fd, Number(mmapOffset), length)
    return new MappedRegion(gpa, length, uva, mapping.address, mapping.buffer, sourceOf(fd, mmapOffset))
  }

  /**
   * Whether exactly this region is there already. QEMU adds and removes each region once per queue pair of a network card, over
   * one connection, and one pair's removal may come before the next one's addition: so each further addition excuses one
   * further removal (`excuses`), and the first removal takes the region away.
   */
  hasAlready({ guestAddress, size, userAddress, mmapOffset }: MemoryRegionDescription, fd: number): boolean {
    const same = this.find(guestAddress, userAddress, size)
    if (same === undefined || same.source !== sourceOf(fd, mmapOffset)) return false
    const key = keyOf(guestAddress, userAddress, size)
    if (!this.#again.has(key) && this.#again.size >= MAX_MEM_SLOTS) return false
    this.#again.set(key, (this.#again.get(key) ?? 0) + 1)
    return true
  }

  /** Whether a region that is not there may be removed: it was there, and added more than once. */
  excuses(guestAddress: bigint, userAddress: bigint, size: bigint): boolean {
    const key = keyOf(guestAddress, userAddress, size)
    const left = this.#again.get(key)
    if (left === undefined) return false
    if (left === 1) this.#again.delete(key)
    else this.#again.set(key, left - 1)
    return true
  }

  find(guestAddress: bigint, userAddress: bigint, size: bigint): MappedRegion | undefined {
    return this.regions.find(
      ({ gpa, uva, size: length }) =>
        BigInt(gpa) === guestAddress && BigInt(uva) === userAddress && BigInt(length) === size
    )
  }

  /** The GPA of `length` bytes at a front-end address, or undefined when they are not inside one region. */
  translate(uva: bigint, length: number): number | undefined {
    if (uva >= ADDRESS_LIMIT) return undefined
    const address = Number(uva)
    const region = this.regions.find(
      (candidate) => address >= candidate.uva && address < candidate.uva + candidate.size
    )
    if (region === undefined || length > region.uva + region.size - address) return undefined
    return region.gpa + (address - region.uva)
  }
}

function keyOf(guestAddress: bigint, userAddress: bigint, size: bigint): string {
  return `${guestAddress} ${userAddress} ${size}`
}

/** @throws ProtocolError */
function sourceOf(fd: number, offset: bigint): string {
  try {
    const { dev, ino } = fstatSync(fd, { bigint: true })
    return `${dev} ${ino} ${offset}`
  } catch (cause) {
    throw new ProtocolError('ERR_PROTOCOL_MEMORY', 'the fd of a region cannot be examined', { cause })
  }
}

function mapRegion(fd: number, offset: number, length: number): { address: number; buffer: SharedArrayBuffer } {
  const info = new Float64Array(8)
  const result = native.fdInfo(fd, info)
  if (result < 0 || (info[0]! & S_IFMT) !== S_IFREG) throw memoryError('the fd of a region is no shared-memory file')
  // The peer may shrink the file later, which the SIGBUS guard handles; now it must be whole.
  if (offset + length > info[1]!) throw memoryError(`a region ends at ${offset + length}, its file at ${info[1]}`)
  // Only hugetlbfs has pages that mmap insists on; for others the block size is harmless to round to.
  const page = Math.max(4096, info[2]!)
  const mapOffset = Math.floor(offset / page) * page
  const mapLength = Math.ceil((offset + length) / page) * page - mapOffset
  const mapping = native.mapFile(fd, mapOffset, mapLength, offset - mapOffset, length, true)
  if (typeof mapping === 'number') throw memoryError(`a region cannot be mapped (errno ${-mapping})`)
  return mapping
}

function memoryError(message: string): ProtocolError {
  return new ProtocolError('ERR_PROTOCOL_MEMORY', message)
}

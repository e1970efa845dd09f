/**
 * The front-end's memory regions: checked, mapped, translated. It owns the mappings until `release`; who may still
 * use them is the session's business.
 */
import { fstatSync } from 'node:fs'
import { native } from '../native.ts'
import type { RegionDescription } from '../virtio/memory.ts'
import { ProtocolError } from './errors.ts'
import { ADDRESS_LIMIT, duplicate, mapSharedFile } from './mapping.ts'
import { MAX_MEM_SLOTS, type MemoryRegionDescription } from './wire.ts'

const PAGE = 4096n

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
  /** Our own fd of the file, and where the region begins in it: for a handover. */
  readonly fd: number
  readonly fileOffset: number

  /**
   * Maps a region of which everything but its file was checked. @param fd stays the caller's
   * @throws ProtocolError
   */
  constructor(description: MemoryRegionDescription, fd: number) {
    this.gpa = Number(description.guestAddress)
    this.size = Number(description.size)
    this.uva = Number(description.userAddress)
    this.fileOffset = Number(description.mmapOffset)
    this.source = sourceOf(fd, description.mmapOffset)
    const mapping = mapSharedFile(fd, this.fileOffset, this.size, 'a region', 'ERR_PROTOCOL_MEMORY')
    this.hva = mapping.address
    this.buffer = mapping.buffer
    try {
      this.fd = duplicate(fd, 'a region', 'ERR_PROTOCOL_MEMORY')
    } catch (error) {
      native.release(this.hva)
      throw error
    }
  }

  /** The front-end truncated the file: the SIGBUS guard laid empty memory over the mapping. */
  get faulted(): boolean {
    return native.faults(this.hva) > 0
  }

  /** Gives the pages back at once. Nothing may use the region any more; a stale view reads zeroes. */
  release(): void {
    native.release(this.hva)
    native.close(this.fd)
  }
}

/** Bytes of one region at a front-end address. */
export interface RegionPiece {
  readonly region: MappedRegion
  /** Where they are in the region. */
  readonly offset: number
  readonly size: number
}

export class MemoryTable {
  regions: MappedRegion[] = []
  /** How often a region was added again, by its addresses. */
  readonly again = new Map<string, number>()

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
    return new MappedRegion(description, fd)
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
    if (!this.again.has(key) && this.again.size >= MAX_MEM_SLOTS) return false
    this.again.set(key, (this.again.get(key) ?? 0) + 1)
    return true
  }

  /** Whether a region that is not there may be removed: it was there, and added more than once. */
  excuses(guestAddress: bigint, userAddress: bigint, size: bigint): boolean {
    const key = keyOf(guestAddress, userAddress, size)
    const left = this.again.get(key)
    if (left === undefined) return false
    if (left === 1) this.again.delete(key)
    else this.again.set(key, left - 1)
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
    const region = this.#at(address)
    if (region === undefined || length > region.uva + region.size - address) return undefined
    return region.gpa + (address - region.uva)
  }

  /** What [uva, uva + size) is made of; undefined when not all of it is in regions. */
  pieces(uva: number, size: number): RegionPiece[] | undefined {
    const pieces: RegionPiece[] = []
    for (let done = 0; done < size; ) {
      const region = this.#at(uva + done)
      if (region === undefined) return undefined
      const offset = uva + done - region.uva
      const length = Math.min(size - done, region.size - offset)
      pieces.push({ region, offset, size: length })
      done += length
    }
    return pieces
  }

  #at(uva: number): MappedRegion | undefined {
    return this.regions.find((region) => uva >= region.uva && uva < region.uva + region.size)
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

function memoryError(message: string): ProtocolError {
  return new ProtocolError('ERR_PROTOCOL_MEMORY', message)
}

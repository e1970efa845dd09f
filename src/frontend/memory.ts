/**
 * The memory of a pretended guest: one or several regions of guest-physical addresses, each backed by its own memfd,
 * and a bump allocator over them. It owns the memfds and mappings. It must not know rings, requests or the
 * connection.
 *
 * A layout chooses guest-physical (GPA) and front-end user addresses (UVA) freely: the back-end must translate by the
 * table it was given, so an offset in the file, a GPA and a UVA are all different here by default, with a hole in
 * between.
 */
import { native, systemError } from '../native.ts'
import { FrontendError } from './errors.ts'

/** Where one region lies. All in bytes; multiples of 4096. */
export interface RegionLayout {
  readonly gpa: number
  readonly uva: number
  readonly size: number
  /** Bytes of the file before the region (the mmap offset on the wire). */
  readonly offset?: number
}

export interface GuestRegion extends RegionLayout {
  readonly offset: number
  /** The memfd, owned by the {@link GuestMemory}. */
  readonly fd: number
  /** The region's bytes; index 0 is `gpa`. */
  readonly buffer: SharedArrayBuffer
  readonly bytes: Uint8Array
  /** First byte that the bump allocator has not given out. */
  next: number
}

/** A piece of guest memory that lies in one region. */
export interface GuestBuffer {
  readonly gpa: number
  readonly length: number
  readonly bytes: Uint8Array
  readonly region: GuestRegion
  /** Offset in the region. */
  readonly offset: number
}

const GIB = 2 ** 30
const MIB = 2 ** 20

/** Layouts worth testing with. `size` is the bytes of each region. */
export const layouts = {
  /** One region; GPA, UVA and file offset all differ. */
  single: (size: number): RegionLayout[] => [{ gpa: 2 * MIB, uva: 0x7f10_0000_0000, size, offset: 65536 }],
  /** Like a PC: memory below the hole under 4 GiB, and memory above it. */
  hole: (size: number): RegionLayout[] => [
    { gpa: 0, uva: 0x7f20_0000_0000, size },
    { gpa: 4 * GIB, uva: 0x7f28_0000_0000, size, offset: 4096 },
  ],
  /**
   * Two regions that touch in guest-physical space and lie apart (in reverse order) in user space: buffers can
   * straddle them.
   */
  adjacent: (size: number): RegionLayout[] => [
    { gpa: GIB, uva: 0x7f38_0000_0000, size },
    { gpa: GIB + size, uva: 0x7f30_0000_0000, size, offset: 8192 },
  ],
  /** `count` regions with holes between them. */
  many: (size: number, count: number): RegionLayout[] =>
    Array.from({ length: count }, (_, i) => ({
      gpa: GIB + i * 2 * size,
      uva: 0x7f40_0000_0000 + i * 4 * size,
      size,
      offset: (i % 4) * 4096,
    })),
}

export class GuestMemory {
  readonly regions: GuestRegion[] = []
  readonly #addresses: number[] = []
  #closed = false

  /** @throws a system error when there is no memory */
  constructor(layout: readonly RegionLayout[]) {
    for (const region of layout) this.addRegion(region)
  }

  /** Makes one more region; the caller tells the back-end. */
  addRegion(layout: RegionLayout): GuestRegion {
    const offset = layout.offset ?? 0
    const fd = native.memfd('virtiod-frontend', offset + layout.size, 0)
    if (fd < 0) throw systemError(fd, 'memfd_create', 'guest memory')
    const mapping = native.mapFile(fd, 0, offset + layout.size, offset, layout.size, true)
    if (typeof mapping === 'number') {
      native.close(fd)
      throw systemError(mapping, 'mmap', `guest memory of ${layout.size} bytes`)
    }
    this.#addresses.push(mapping.address)
    const bytes = new Uint8Array(mapping.buffer)
    const region: GuestRegion = { ...layout, offset, fd, buffer: mapping.buffer, bytes, next: 0 }
    this.regions.push(region)
    return region
  }

  /**
   * Takes `length` bytes from a region. There is no free: memory goes with the session, or with `reset`.
   * @param align power of two; @param skew bytes to move off that alignment
   * @throws RangeError when the region is full
   */
  allocate(length: number, align = 16, regionIndex = 0, skew = 0): GuestBuffer {
    const region = this.region(regionIndex)
    const start = Math.ceil(region.next / align) * align + skew
    if (start + length > region.size) {
      throw new RangeError(`guest memory: no room for ${length} bytes in region ${regionIndex} of ${region.size}`)
    }
    region.next = start + length
    return this.#buffer(region, start, length)
  }

  /** The bump allocator's position, for `reset`. */
  mark(): number[] {
    return this.regions.map((region) => region.next)
  }

  /** Gives back everything allocated since `mark`. The caller knows that nothing is in flight there. */
  reset(mark: readonly number[]): void {
    for (const [i, region] of this.regions.entries()) region.next = mark[i] ?? 0
  }

  region(index: number): GuestRegion {
    const region = this.regions[index]
    if (region === undefined) throw new RangeError(`guest memory: no region ${index}`)
    return region
  }

  /** The region that holds `gpa`, or undefined. */
  find(gpa: number): GuestRegion | undefined {
    return this.regions.find((region) => gpa >= region.gpa && gpa < region.gpa + region.size)
  }

  /** A view of [gpa, gpa + length), which must lie in one region. @throws RangeError */
  at(gpa: number, length: number): Uint8Array {
    const region = this.find(gpa)
    if (region === undefined || gpa - region.gpa + length > region.size) {
      throw new RangeError(`guest memory: 0x${gpa.toString(16)} + ${length} is not in one region`)
    }
    return region.bytes.subarray(gpa - region.gpa, gpa - region.gpa + length)
  }

  /** Copies bytes out; the range may straddle regions. @throws RangeError */
  read(gpa: number, length: number): Uint8Array {
    const out = new Uint8Array(length)
    this.#pieces(gpa, length, (bytes, done) => out.set(bytes, done))
    return out
  }

  /** Copies bytes in; the range may straddle regions. @throws RangeError */
  write(gpa: number, data: Uint8Array): void {
    this.#pieces(gpa, data.length, (bytes, done) => bytes.set(data.subarray(done, done + bytes.length)))
  }

  /** The front-end user address of a guest-physical one, as SET_VRING_ADDR wants it. @throws RangeError */
  uva(gpa: number): bigint {
    const region = this.find(gpa)
    if (region === undefined) throw new RangeError(`guest memory: 0x${gpa.toString(16)} is in no region`)
    return BigInt(region.uva + (gpa - region.gpa))
  }

  /** Closes memfds and mappings; what a back-end mapped stays its own. Idempotent. */
  close(): void {
    if (this.#closed) return
    this.#closed = true
    for (const region of this.regions) native.close(region.fd)
    for (const address of this.#addresses) native.release(address)
  }

  #buffer(region: GuestRegion, offset: number, length: number): GuestBuffer {
    return { gpa: region.gpa + offset, length, offset, region, bytes: region.bytes.subarray(offset, offset + length) }
  }

  #pieces(gpa: number, length: number, take: (bytes: Uint8Array, done: number) => void): void {
    let done = 0
    while (done < length) {
      const region = this.find(gpa + done)
      if (region === undefined)
        throw new FrontendError('guest memory', 'system', `no region at 0x${(gpa + done).toString(16)}`)
      const offset = gpa + done - region.gpa
      const count = Math.min(length - done, region.size - offset)
      take(region.bytes.subarray(offset, offset + count), done)
      done += count
    }
  }
}

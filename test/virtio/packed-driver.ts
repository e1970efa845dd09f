/**
 * The driver side of a packed virtqueue for tests, on the same buffer as the ring under test. `offer` and `takeUsed`
 * are a driver that obeys; everything else writes what a test says. Independent of src/frontend, so that one bug cannot
 * hide in both ends.
 */
import type { PackedInflight } from '../../src/virtio/inflight.ts'
import { GuestMemory, type RegionDescription } from '../../src/virtio/memory.ts'
import { PackedRing } from '../../src/virtio/packed-ring.ts'
import type { VringConfig } from '../../src/virtio/vring.ts'

export const NEXT = 1
export const WRITE = 2
export const INDIRECT = 4
export const AVAIL = 0x80
export const USED = 0x8000
export const NEW_RING = 0x8000_8000

export interface PackedDescriptor {
  readonly gpa: number | bigint
  readonly length: number
  readonly flags?: number
  readonly id?: number
}

export interface UsedDescriptor {
  readonly id: number
  readonly length: number
  /** Without AVAIL and USED. */
  readonly flags: number
}

export interface PackedLayout {
  readonly size: number
  readonly descriptor: number
  readonly driver: number
  readonly device: number
}

const page = (length: number): number => Math.ceil(length / 4096) * 4096

/** The descriptor ring from byte 0, the event suppression structures on pages of their own behind it. */
export function packedLayout(size: number): PackedLayout & { end: number } {
  const driver = page(16 * size)
  return { size, descriptor: 0, driver, device: driver + 4096, end: driver + 8192 }
}

export class PackedDriver {
  readonly size: number
  readonly view: DataView
  readonly #layout: PackedLayout
  readonly #halves: Uint16Array
  /** The next descriptor to make available. */
  next: number
  wrap: number
  /** The next descriptor that the device uses. */
  usedNext: number
  usedWrap: number
  /** Descriptors of the chains in flight, by id. */
  readonly slots = new Map<number, number>()

  constructor(buffer: SharedArrayBuffer | ArrayBuffer, layout: PackedLayout, base = NEW_RING) {
    this.size = layout.size
    this.view = new DataView(buffer)
    this.#layout = layout
    this.#halves = new Uint16Array(buffer, layout.descriptor, 8 * layout.size)
    this.next = base & 0x7fff
    this.wrap = (base >>> 15) & 1
    this.usedNext = (base >>> 16) & 0x7fff
    this.usedWrap = base >>> 31
    // As the laps before left the ring: used by the device in this lap's first part, in the one before it behind that.
    for (let i = 0; i < this.size; i++) this.setFlags(i, used(i < this.next ? this.wrap : this.wrap ^ 1))
    // A new ring is all zero.
    if (base === NEW_RING) this.#halves.fill(0)
  }

  // ---- descriptors, of the ring or of a table at a byte offset

  writeDescriptor(at: number, { gpa, length, flags = 0, id = 0 }: PackedDescriptor): void {
    this.view.setBigUint64(at, BigInt(gpa), true)
    this.view.setUint32(at + 8, length, true)
    this.view.setUint16(at + 12, id, true)
    this.view.setUint16(at + 14, flags, true)
  }

  descriptor(index: number, descriptor: PackedDescriptor): void {
    this.writeDescriptor(this.#layout.descriptor + index * 16, descriptor)
  }

  flags(index: number): number {
    return Atomics.load(this.#halves, index * 8 + 7)
  }

  setFlags(index: number, flags: number): void {
    Atomics.store(this.#halves, index * 8 + 7, flags)
  }

  /** Writes a table at byte `at` of the buffer. Returns its length in bytes. */
  table(at: number, descriptors: readonly PackedDescriptor[]): number {
    descriptors.forEach((descriptor, i) => {
      this.writeDescriptor(at + i * 16, descriptor)
    })
    return descriptors.length * 16
  }

  /** The id goes into the last descriptor; the others get one that no ring has. Returns the index of the first one. */
  offer(id: number, ...descriptors: PackedDescriptor[]): number {
    const show = this.prepare(id, ...descriptors)
    return show()
  }

  /** As `offer`, but available only when the function is called that it returns. */
  prepare(id: number, ...descriptors: PackedDescriptor[]): () => number {
    const first = this.next
    let firstFlags = 0
    descriptors.forEach((descriptor, i) => {
      const last = i === descriptors.length - 1
      const flags = (descriptor.flags ?? 0) | (last ? 0 : NEXT) | available(this.wrap)
      if (i === 0) firstFlags = flags
      const shown = i === 0 ? this.flags(this.next) : flags
      this.descriptor(this.next, { ...descriptor, id: descriptor.id ?? (last ? id : 0xfffe), flags: shown })
      this.next++
      if (this.next === this.size) {
        this.next = 0
        this.wrap ^= 1
      }
    })
    this.slots.set(id, descriptors.length)
    return () => {
      this.setFlags(first, firstFlags)
      return first
    }
  }

  /** The used descriptors that were published since the last time. */
  takeUsed(): UsedDescriptor[] {
    const taken: UsedDescriptor[] = []
    for (;;) {
      const flags = this.flags(this.usedNext)
      if (this.slots.size === 0 || (flags & (AVAIL | USED)) !== used(this.usedWrap)) return taken
      const at = this.#layout.descriptor + this.usedNext * 16
      const id = this.view.getUint16(at + 12, true)
      const slots = this.slots.get(id)
      if (slots === undefined) throw new Error(`used id ${id} is not in flight`)
      this.slots.delete(id)
      taken.push({ id, length: this.view.getUint32(at + 8, true), flags: flags & ~(AVAIL | USED) })
      this.usedNext += slots
      if (this.usedNext >= this.size) {
        this.usedNext -= this.size
        this.usedWrap ^= 1
      }
    }
  }

  // ---- event suppression

  /** What the driver wants: an offset, its wrap counter, and the flags. */
  wantCalls(flags: number, offset = 0, wrap = 0): void {
    const at = this.#layout.driver
    this.view.setUint16(at, offset | (wrap << 15), true)
    this.view.setUint16(at + 2, flags, true)
  }

  get deviceEvent(): { offset: number; wrap: number; flags: number } {
    const at = this.#layout.device
    const offset = this.view.getUint16(at, true)
    return { offset: offset & 0x7fff, wrap: offset >>> 15, flags: this.view.getUint16(at + 2, true) }
  }
}

export function available(wrap: number): number {
  return wrap === 1 ? AVAIL : USED
}

export function used(wrap: number): number {
  return wrap === 1 ? AVAIL | USED : 0
}

export interface PackedSetup {
  readonly size?: number
  readonly eventIdx?: boolean
  readonly indirect?: boolean
  readonly inOrder?: boolean
  readonly inflight?: PackedInflight
  /** As SET_VRING_BASE. */
  readonly base?: number
  /** Bytes for buffers behind the ring, in the same region. */
  readonly data?: number
  /** Regions beside the ring's own, which starts at GPA 0. */
  readonly regions?: readonly RegionDescription[]
}

/** A ring with its driver, over one buffer that starts at GPA 0; `data` is the GPA of the bytes behind the ring. */
export function packed(options: PackedSetup = {}) {
  const { size = 8, eventIdx = false, indirect = true, inOrder = false, base = NEW_RING, data = 65536 } = options
  const { regions = [], inflight } = options
  const layout = packedLayout(size)
  const buffer = new SharedArrayBuffer(layout.end + data)
  const driver = new PackedDriver(buffer, layout, base)
  const memory = new GuestMemory([{ gpa: 0, size: buffer.byteLength, hva: 0, buffer }, ...regions])
  const config: VringConfig = { ...layout, base, eventIdx, indirect, packed: true, inOrder }
  const ring = new PackedRing(memory, config, inflight)
  const bytes = new Uint8Array(buffer)
  return { driver, memory, config, ring, layout, buffer, bytes, data: layout.end }
}

/** A base whose avail and used position is the same. */
export function baseAt(index: number, wrap: number): number {
  const half = index | (wrap << 15)
  return (half | (half << 16)) >>> 0
}

/** mulberry32 */
export function random(seed: number): (below: number) => number {
  let state = seed
  return (below) => {
    state = (state + 0x6d2b79f5) | 0
    let t = Math.imul(state ^ (state >>> 15), 1 | state)
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t
    return Math.floor((((t ^ (t >>> 14)) >>> 0) / 2 ** 32) * below)
  }
}

/**
 * The driver side of a split virtqueue for tests, on the same buffer as the ring under test. It obeys no rule by
 * itself: it writes what a test says, right or wrong. Independent of src/frontend, so that one bug cannot hide in both
 * ends.
 */
import type { SplitInflight } from '../../src/virtio/inflight.ts'
import { GuestMemory, type RegionDescription } from '../../src/virtio/memory.ts'
import { SplitRing } from '../../src/virtio/split-ring.ts'
import type { VringConfig } from '../../src/virtio/vring.ts'

export const NEXT = 1
export const WRITE = 2
export const INDIRECT = 4

export interface Descriptor {
  readonly gpa: number | bigint
  readonly length: number
  readonly flags?: number
  readonly next?: number
}

export interface UsedElement {
  readonly id: number
  readonly length: number
}

/** Where the parts of a ring are: offsets in the buffer. */
export interface RingLayout {
  readonly size: number
  readonly descriptor: number
  readonly driver: number
  readonly device: number
}

const page = (length: number): number => Math.ceil(length / 4096) * 4096

/**
 * A ring of `size` entries from byte 0 of a buffer, each part on pages of its own; `end` is the first byte behind it.
 */
export function ringLayout(size: number): RingLayout & { end: number } {
  const driver = page(16 * size)
  const device = driver + page(6 + 2 * size)
  return { size, descriptor: 0, driver, device, end: device + page(6 + 8 * size) }
}

export class MockDriver {
  readonly size: number
  readonly view: DataView
  readonly #layout: RingLayout
  readonly #avail: Uint16Array
  readonly #used: Uint16Array
  /** The next used entry to look at, free-running u16. */
  #seen: number

  constructor(buffer: SharedArrayBuffer | ArrayBuffer, layout: RingLayout, base = 0, usedBase = base) {
    this.size = layout.size
    this.view = new DataView(buffer)
    this.#layout = layout
    this.#avail = new Uint16Array(buffer, layout.driver, 3 + layout.size)
    this.#used = new Uint16Array(buffer, layout.device, 3 + 4 * layout.size)
    this.#avail[1] = base
    this.#used[1] = usedBase
    this.#seen = usedBase
  }

  // ---- the descriptor table, or any other table at a byte offset

  writeDescriptor(at: number, { gpa, length, flags = 0, next = 0 }: Descriptor): void {
    this.view.setBigUint64(at, BigInt(gpa), true)
    this.view.setUint32(at + 8, length, true)
    this.view.setUint16(at + 12, flags, true)
    this.view.setUint16(at + 14, next, true)
  }

  descriptor(index: number, descriptor: Descriptor): void {
    this.writeDescriptor(this.#layout.descriptor + index * 16, descriptor)
  }

  /** Links descriptors in the order of `indices` (0, 1, 2, … when left out). The flags get NEXT but for the last. */
  chain(descriptors: readonly Descriptor[], indices: readonly number[] = descriptors.map((_, i) => i)): number {
    descriptors.forEach((descriptor, i) => {
      const last = i === descriptors.length - 1
      const flags = (descriptor.flags ?? 0) | (last ? 0 : NEXT)
      this.descriptor(indices[i]!, { ...descriptor, flags, next: last ? 0 : indices[i + 1]! })
    })
    return indices[0]!
  }

  /** Writes a table of linked descriptors at byte `at` of the buffer. Returns its length in bytes. */
  table(at: number, descriptors: readonly Descriptor[]): number {
    descriptors.forEach((descriptor, i) => {
      const last = i === descriptors.length - 1
      const flags = (descriptor.flags ?? 0) | (last ? 0 : NEXT)
      this.writeDescriptor(at + i * 16, { ...descriptor, flags, next: last ? 0 : i + 1 })
    })
    return descriptors.length * 16
  }

  // ---- the avail ring

  /** Makes heads available, with one store of avail.idx behind them. */
  offer(...heads: number[]): void {
    let index = this.availIdx
    for (const head of heads) {
      this.availEntry(index, head)
      index = (index + 1) & 0xffff
    }
    Atomics.store(this.#avail, 1, index)
  }

  availEntry(index: number, head: number): void {
    this.#avail[2 + (index % this.size)] = head
  }

  get availIdx(): number {
    return Atomics.load(this.#avail, 1)
  }

  set availIdx(value: number) {
    Atomics.store(this.#avail, 1, value)
  }

  set availFlags(value: number) {
    Atomics.store(this.#avail, 0, value)
  }

  set usedEvent(value: number) {
    Atomics.store(this.#avail, 2 + this.size, value & 0xffff)
  }

  // ---- the used ring

  get usedIdx(): number {
    return Atomics.load(this.#used, 1)
  }

  get usedFlags(): number {
    return Atomics.load(this.#used, 0)
  }

  set usedFlags(value: number) {
    Atomics.store(this.#used, 0, value)
  }

  get availEvent(): number {
    return Atomics.load(this.#used, 2 + 4 * this.size)
  }

  set availEvent(value: number) {
    Atomics.store(this.#used, 2 + 4 * this.size, value)
  }

  usedElement(index: number): UsedElement {
    const at = this.#layout.device + 4 + (index % this.size) * 8
    return { id: this.view.getUint32(at, true), length: this.view.getUint32(at + 4, true) }
  }

  /** The used elements that were published since the last time. */
  takeUsed(): UsedElement[] {
    const taken: UsedElement[] = []
    for (const end = this.usedIdx; this.#seen !== end; this.#seen = (this.#seen + 1) & 0xffff) {
      taken.push(this.usedElement(this.#seen))
    }
    return taken
  }
}

export interface RingSetup {
  readonly size?: number
  readonly eventIdx?: boolean
  readonly indirect?: boolean
  readonly inOrder?: boolean
  readonly inflight?: SplitInflight
  /** Where avail starts, and where used starts when it is not the same. */
  readonly base?: number
  readonly usedBase?: number
  /** Bytes for buffers behind the ring, in the same region. */
  readonly data?: number
  /** Regions beside the ring's own, which starts at GPA 0. */
  readonly regions?: readonly RegionDescription[]
}

/** A ring with its driver, over one buffer that starts at GPA 0; `data` is the GPA of the bytes behind the ring. */
export function setup(options: RingSetup = {}) {
  const { size = 8, eventIdx = false, indirect = true, inOrder = false } = options
  const { base = 0, usedBase = base, data = 65536, regions = [], inflight } = options
  const layout = ringLayout(size)
  const buffer = new SharedArrayBuffer(layout.end + data)
  const driver = new MockDriver(buffer, layout, base, usedBase)
  const memory = new GuestMemory([{ gpa: 0, size: buffer.byteLength, hva: 0, buffer }, ...regions])
  const config: VringConfig = { ...layout, base, eventIdx, indirect, packed: false, inOrder }
  const ring = new SplitRing(memory, config, inflight)
  const bytes = new Uint8Array(buffer)
  return { driver, memory, config, ring, layout, buffer, bytes, data: layout.end }
}

/** Segments of a chain as [gpa, length] pairs. */
export function segments(chain: {
  readonly count: number
  readonly regions: readonly { readonly gpa: number }[]
  readonly region: ArrayLike<number>
  readonly offset: ArrayLike<number>
  readonly length: ArrayLike<number>
}): [gpa: number, length: number][] {
  return Array.from({ length: chain.count }, (_, i) => [
    chain.regions[chain.region[i]!]!.gpa + chain.offset[i]!,
    chain.length[i]!,
  ])
}

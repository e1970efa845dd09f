/** A ring of either format with a driver that obeys, for tests of what does not depend on the format. */
import type { PackedInflight, SplitInflight } from '../../src/virtio/inflight.ts'
import type { GuestMemory } from '../../src/virtio/memory.ts'
import { PackedRing } from '../../src/virtio/packed-ring.ts'
import { SplitRing } from '../../src/virtio/split-ring.ts'
import type { Vring, VringConfig } from '../../src/virtio/vring.ts'
import { MockDriver, type RingLayout, ringLayout, setup } from './mock-driver.ts'
import { NEW_RING, PackedDriver, packed, packedLayout } from './packed-driver.ts'

export type Format = 'split' | 'packed'
export const FORMATS: readonly Format[] = ['split', 'packed']

export interface Part {
  readonly gpa: number
  readonly length: number
  readonly flags?: number
}

export interface Driver {
  /** Makes a chain available under a head, packed: buffer id; the head's own descriptor is free. */
  offer(head: number, ...parts: Part[]): void
  /** What the device published since the last time. */
  takeUsed(): { id: number; length: number }[]
}

/** Descriptors behind the head come from the top of the table: heads are low. */
export class SplitDriver implements Driver {
  readonly mock: MockDriver
  readonly #free: number[]
  readonly #chains = new Map<number, number[]>()

  constructor(mock: MockDriver) {
    this.mock = mock
    this.#free = Array.from({ length: mock.size }, (_, i) => i)
  }

  offer(head: number, ...parts: Part[]): void {
    this.#free.splice(this.#free.indexOf(head), 1)
    const indices = parts.map((_, i) => (i === 0 ? head : this.#free.pop()!))
    this.#chains.set(head, indices)
    this.mock.chain(parts, indices)
    this.mock.offer(head)
  }

  takeUsed(): { id: number; length: number }[] {
    const taken = this.mock.takeUsed()
    for (const { id } of taken) {
      this.#free.push(...(this.#chains.get(id) ?? []))
      this.#free.sort((a, b) => a - b)
    }
    return taken
  }
}

/** Where the parts of a ring are in a buffer. */
export function layoutOf(format: Format, size: number): RingLayout & { end: number } {
  return format === 'split' ? ringLayout(size) : packedLayout(size)
}

/** A driver of a new ring; the ring may be one that is not there yet. */
export function driverOf(format: Format, buffer: SharedArrayBuffer, layout: RingLayout): Driver {
  if (format === 'split') return new SplitDriver(new MockDriver(buffer, layout))
  const driver = new PackedDriver(buffer, layout)
  return {
    offer: (head, ...parts) => {
      driver.offer(head, ...parts)
    },
    takeUsed: () => driver.takeUsed().map(({ id, length }) => ({ id, length })),
  }
}

/** The base of a new ring. */
export const newBase = (format: Format): number => (format === 'split' ? 0 : NEW_RING)

export function makeRing(memory: GuestMemory, config: VringConfig, inflight?: SplitInflight | PackedInflight) {
  if (config.packed) return new PackedRing(memory, config, inflight as PackedInflight | undefined)
  return new SplitRing(memory, config, inflight as SplitInflight | undefined)
}

export interface BothSetup {
  readonly size?: number
  readonly eventIdx?: boolean
  readonly inOrder?: boolean
  readonly inflight?: SplitInflight | PackedInflight
}

/** A ring and its driver over one buffer; `data` is the GPA of the bytes behind the ring. */
export function both(format: Format, options: BothSetup = {}) {
  const { inflight, ...rest } = options
  const made =
    format === 'split'
      ? setup({ ...rest, ...(inflight && { inflight: inflight as SplitInflight }) })
      : packed({ ...rest, ...(inflight && { inflight: inflight as PackedInflight }) })
  const { memory, config, layout, buffer, bytes, data } = made
  const ring: Vring = made.ring
  const driver = driverOf(format, buffer, layout)
  return { ring, driver, memory, config, layout, buffer, bytes, data }
}

/**
 * The rings with their in-flight regions, killed at any store to the ring or the region: what the next back-end pops is
 * exactly what the driver waits for, in its order, and the driver sees nothing as used that was not.
 */
import { describe, expect, test } from 'vitest'
import type { Chain } from '../../src/virtio/chain.ts'
import { inflightSize, PackedInflight, SplitInflight } from '../../src/virtio/inflight.ts'
import { GuestMemory } from '../../src/virtio/memory.ts'
import { PackedRing } from '../../src/virtio/packed-ring.ts'
import { SplitRing } from '../../src/virtio/split-ring.ts'
import type { Vring } from '../../src/virtio/vring.ts'
import { MockDriver, ringLayout, segments } from './mock-driver.ts'
import { PackedDriver, packedLayout } from './packed-driver.ts'
import { Killed, random, StoreTrap } from './store-trap.ts'

type Pick = (below: number) => number

interface Waiting {
  readonly id: number
  /** Of its buffers. */
  readonly segments: [gpa: number, length: number][]
  readonly slots: number
  /** Bytes that a back-end gave it back with; 0 = none did. */
  written: number
}

/** The driver with its memory, and a new back-end's ring over it. */
abstract class World {
  readonly size: number
  readonly inOrder: boolean
  readonly waiting: Waiting[] = []
  readonly freeIds: number[]
  abstract readonly trap: StoreTrap

  constructor(size: number, inOrder: boolean) {
    this.size = size
    this.inOrder = inOrder
    this.freeIds = Array.from({ length: size }, (_, i) => i)
  }

  abstract start(): Vring
  protected abstract show(chain: Waiting): void
  protected abstract takeUsed(): { id: number; length: number }[]
  /** Places that a chain can have, and takes one more chain's. */
  protected abstract room(): number

  offer(pick: Pick): void {
    const room = this.room()
    if (room === 0) return
    const slots = pick(6) === 0 ? room : 1 + pick(Math.min(room, 3))
    const id = this.freeIds.splice(pick(this.freeIds.length), 1)[0]!
    const chain: Waiting = {
      id,
      slots,
      segments: Array.from({ length: slots }, () => [pick(4096), 1 + pick(4096)]),
      written: 0,
    }
    this.waiting.push(chain)
    this.show(chain)
  }

  take(): void {
    for (const { id, length } of this.takeUsed()) {
      const index = this.waiting.findIndex((chain) => chain.id === id)
      expect(index).toBeGreaterThanOrEqual(0)
      if (this.inOrder) expect(index).toBe(0)
      const [chain] = this.waiting.splice(index, 1)
      expect(length).toBe(chain!.written)
      expect(length).toBeGreaterThan(0)
      this.freeIds.push(id)
    }
  }
}

/** A data page behind the ring, at GPA 0 for both formats. */
const DATA = 8192

class SplitWorld extends World {
  readonly trap: StoreTrap
  readonly #layout
  readonly #ring: SharedArrayBuffer
  readonly #region: SharedArrayBuffer
  readonly #driver: MockDriver
  readonly #data = new SharedArrayBuffer(DATA)
  readonly #base: number
  /** Descriptors: chains begin at the one of their id, so what is free for the others is counted. */
  readonly #indices = new Map<number, number[]>()

  constructor(size: number, inOrder: boolean, base: number) {
    super(size, inOrder)
    this.#layout = ringLayout(size)
    this.#ring = new SharedArrayBuffer(this.#layout.end)
    this.#region = new SharedArrayBuffer(inflightSize(size, false))
    this.#driver = new MockDriver(this.#ring, this.#layout, base)
    this.#base = base
    this.trap = new StoreTrap(this.#ring, this.#region)
  }

  start(): Vring {
    const { size, inOrder } = this
    const { descriptor, driver, device } = this.#layout
    const at = DATA
    const memory = new GuestMemory([
      { gpa: 0, size: DATA, hva: 0, buffer: this.#data },
      { gpa: at, size: this.#ring.byteLength, hva: 2 ** 30, buffer: this.#ring },
    ])
    const inflight = new SplitInflight(new Uint8Array(this.#region), size)
    return new SplitRing(
      memory,
      {
        size,
        descriptor: at + descriptor,
        driver: at + driver,
        device: at + device,
        // What QEMU says after a crash.
        base: new DataView(this.#region).getUint16(8, true) === 0 ? this.#base : this.#driver.usedIdx,
        eventIdx: false,
        indirect: false,
        packed: false,
        inOrder,
      },
      inflight
    )
  }

  protected room(): number {
    return this.freeIds.length
  }

  protected show({ id, segments }: Waiting): void {
    const others = this.freeIds.splice(0, segments.length - 1)
    const indices = [id, ...others]
    this.#indices.set(id, indices)
    const descriptors = segments.map(([gpa, length]) => ({ gpa, length, flags: 2 }))
    this.#driver.offer(this.#driver.chain(descriptors, indices))
  }

  protected takeUsed(): { id: number; length: number }[] {
    const used = this.#driver.takeUsed()
    for (const { id } of used) this.freeIds.push(...this.#indices.get(id)!.slice(1))
    return used
  }
}

class PackedWorld extends World {
  readonly trap: StoreTrap
  readonly #layout
  readonly #ring: SharedArrayBuffer
  readonly #region: SharedArrayBuffer
  readonly #driver: PackedDriver
  readonly #data = new SharedArrayBuffer(DATA)
  readonly #base: number

  constructor(size: number, inOrder: boolean, base: number) {
    super(size, inOrder)
    this.#layout = packedLayout(size)
    this.#ring = new SharedArrayBuffer(this.#layout.end)
    this.#region = new SharedArrayBuffer(inflightSize(size, true))
    this.#base = base
    this.#driver = new PackedDriver(this.#ring, this.#layout, base)
    this.trap = new StoreTrap(this.#ring, this.#region)
  }

  start(): Vring {
    const { size, inOrder } = this
    const { descriptor, driver, device } = this.#layout
    const at = DATA
    const memory = new GuestMemory([
      { gpa: 0, size: DATA, hva: 0, buffer: this.#data },
      { gpa: at, size: this.#ring.byteLength, hva: 2 ** 30, buffer: this.#ring },
    ])
    const inflight = new PackedInflight(new Uint8Array(this.#region), size)
    return new PackedRing(
      memory,
      {
        size,
        descriptor: at + descriptor,
        driver: at + driver,
        device: at + device,
        // QEMU has no newer one after a crash.
        base: this.#base,
        eventIdx: false,
        indirect: false,
        packed: true,
        inOrder,
      },
      inflight
    )
  }

  protected room(): number {
    let left = this.size
    for (const slots of this.#driver.slots.values()) left -= slots
    return left
  }

  protected show({ id, segments }: Waiting): void {
    this.#driver.offer(id, ...segments.map(([gpa, length]) => ({ gpa, length, flags: 2 })))
  }

  protected takeUsed(): { id: number; length: number }[] {
    return this.#driver.takeUsed()
  }
}

class Device {
  readonly world: World
  readonly ring: Vring
  readonly flying: Chain[] = []
  /** Those that can go back, the last one first: nothing that was popped after them was given back. */
  undoable: Chain[] = []

  constructor(world: World) {
    this.world = world
    world.take()
    this.ring = world.start()
    this.popAll()
    expect(this.ring.error).toBeUndefined()
    expect(this.flying.map((chain) => ({ id: chain.head, segments: segments(chain) }))).toEqual(
      world.waiting.map(({ id, segments }) => ({ id, segments }))
    )
  }

  popAll(): void {
    while (this.pop());
  }

  pop(): boolean {
    const chain = this.ring.pop()
    if (chain === undefined) return false
    this.flying.push(chain)
    this.undoable.push(chain)
    return true
  }

  unpop(): void {
    const chain = this.undoable.pop()
    if (chain === undefined) return
    this.ring.unpop(chain)
    this.flying.splice(this.flying.indexOf(chain), 1)
  }

  step(pick: Pick): void {
    const { world, ring } = this
    const choice = pick(12)
    if (choice < 3) world.offer(pick)
    else if (choice < 4) world.take()
    else if (choice < 6) this.pop()
    else if (choice < 7) for (let some = pick(4); some > 0; some--) this.unpop()
    else if (choice < 10) this.complete(pick)
    else if (choice < 11) ring.publish()
    else if (pick(2) === 0) ring.suppress()
    else ring.rearm()
  }

  complete(pick: Pick): void {
    if (this.flying.length === 0) return
    const chain = this.flying.splice(pick(this.flying.length), 1)[0]!
    const written = 1 + pick(100)
    this.world.waiting.find(({ id }) => id === chain.head)!.written = written
    this.ring.push(chain, written, written)
    this.undoable = this.undoable.slice(this.undoable.indexOf(chain) + 1)
  }
}

function live(world: World, work: () => void): boolean {
  try {
    world.trap.trapped(work)
    return true
  } catch (error) {
    if (error instanceof Killed) return false
    throw error
  }
}

const SIZES = { split: [1, 2, 4, 16], packed: [1, 2, 3, 4, 7, 16] }

function makeWorld(format: 'split' | 'packed', size: number, inOrder: boolean, pick: Pick): World {
  if (format === 'split') return new SplitWorld(size, inOrder, [0, 65535, 65530][pick(3)]!)
  const index = pick(size)
  const half = index | (pick(2) << 15)
  return new PackedWorld(size, inOrder, (half | (half << 16)) >>> 0)
}

describe.each([
  ['split', false],
  ['split', true],
  ['packed', false],
  ['packed', true],
] as const)('a %s ring, IN_ORDER %s', (format, inOrder) => {
  test.each(SIZES[format])('of %i entries loses nothing, whenever back-ends die', (size) => {
    let deaths = 0
    for (let seed = 1; seed <= 6; seed++) {
      const pick = random(seed * 100 + size)
      const world = makeWorld(format, size, inOrder, pick)
      for (let life = 0; life < 80; life++) {
        world.trap.left = pick(pick(4) === 0 ? 12 : 200)
        const survived = live(world, () => {
          const device = new Device(world)
          for (let steps = 300; steps > 0; steps--) device.step(pick)
        })
        if (!survived) deaths++
        for (let steps = pick(4); steps > 0; steps--) {
          if (pick(2) === 0) world.offer(pick)
          else world.take()
        }
      }
      // And the last one finishes all of it.
      world.trap.left = Number.POSITIVE_INFINITY
      live(world, () => {
        const device = new Device(world)
        device.popAll()
        while (device.flying.length > 0) device.complete(pick)
        device.ring.publish()
      })
      world.take()
      expect(world.waiting).toEqual([])
    }
    expect(deaths).toBeGreaterThan(100)
  })
})

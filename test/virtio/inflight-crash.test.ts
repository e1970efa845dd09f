/**
 * In-flight regions of back-ends that are killed: at every store of random work, the next one must find exactly the
 * chains that were taken and not given back, in order, and the place where the ring goes on. The rings are models here:
 * an avail and a used position, and for a packed ring the flags that the driver sees. A second reader of the regions,
 * which does what vhost-user.rst says to the letter, has to find the same: a region is understood by others as well.
 */
import { describe, expect, test } from 'vitest'
import { inflightSize, PackedInflight, type PackedRecovery, SplitInflight } from '../../src/virtio/inflight.ts'
import { Killed, random, StoreTrap } from './store-trap.ts'

const SEEDS = Array.from({ length: 12 }, (_, i) => i + 1)
/** Back-ends per seed. */
const LIVES = 120

/** Runs `work` until it was killed or was done. Returns whether it was done. */
function live(work: () => void): boolean {
  try {
    work()
    return true
  } catch (error) {
    if (error instanceof Killed) return false
    throw error
  }
}

describe('SplitInflight', () => {
  /** The driver, guest memory and the region: what outlives a back-end. */
  class World {
    readonly size: number
    readonly buffer: SharedArrayBuffer
    readonly trap: StoreTrap
    /** Heads in the order in which they were made available, all that there ever were; and which of them are used. */
    readonly avail: number[] = []
    readonly used = new Set<number>()
    readonly start: number
    /** What the driver may offer. */
    readonly free: number[]
    /** used.idx, not wrapped. */
    usedCount: number
    /** The driver offers nothing more. */
    closing = false

    constructor(size: number, usedIdx: number) {
      this.size = size
      this.buffer = new SharedArrayBuffer(inflightSize(size, false))
      this.trap = new StoreTrap(this.buffer)
      this.free = Array.from({ length: size }, (_, i) => i)
      // As if that many chains had been used before anybody tracked them.
      this.usedCount = usedIdx
      this.start = usedIdx
      for (let i = 0; i < usedIdx; i++) {
        this.avail.push(-1)
        this.used.add(i)
      }
    }

    offer(pick: (below: number) => number): void {
      if (!this.closing && this.free.length > 0) this.avail.push(this.free.splice(pick(this.free.length), 1)[0]!)
    }
  }

  class Device {
    readonly world: World
    readonly inflight: SplitInflight
    /** Avail positions: next to pop, in flight, and given back but not published. */
    next: number
    flying: number[]
    batch: number[] = []
    readonly recovered: ReadonlySet<number>

    constructor(world: World) {
      this.world = world
      const bytes = new Uint8Array(world.buffer)
      this.inflight = world.trap.trapped(() => new SplitInflight(bytes, world.size))
      const heads = world.trap.trapped(() => this.inflight.recover(world.usedCount & 0xffff))
      this.flying = heads.map((head) => world.avail.lastIndexOf(head))
      this.recovered = new Set(this.flying)
      this.next = world.usedCount + heads.length
    }

    step(pick: (below: number) => number): void {
      const { world } = this
      const choice = pick(10)
      if (choice < 3) world.offer(pick)
      else if (choice < 6) {
        if (this.next === world.avail.length) return
        this.inflight.popped(world.avail[this.next]!)
        this.flying.push(this.next++)
      } else if (choice < 7) {
        const last = this.flying.at(-1)
        if (last !== this.next - 1 || this.recovered.has(last)) return
        this.inflight.unpopped(world.avail[last]!)
        this.flying.pop()
        this.next--
      } else if (choice < 9) {
        if (this.flying.length === 0) return
        const position = this.flying.splice(pick(this.flying.length), 1)[0]!
        this.inflight.used(world.avail[position]!)
        this.batch.push(position)
      } else this.publish()
    }

    publish(): void {
      const { world } = this
      if (this.batch.length === 0) return
      world.trap.store()
      world.usedCount += this.batch.length
      for (const position of this.batch.splice(0)) {
        world.used.add(position)
        world.free.push(world.avail[position]!)
      }
      this.inflight.published(world.usedCount & 0xffff)
    }
  }

  function check(world: World, device: Device): void {
    const expected: number[] = []
    for (let i = world.start; i < device.next; i++) if (!world.used.has(i)) expected.push(i)
    expect(device.flying).toEqual(expected)
    expect(device.next).toBeLessThanOrEqual(world.avail.length)
  }

  /** vhost-user.rst "Inflight I/O tracking", split virtqueue, "When reconnecting". */
  function bySpec(buffer: SharedArrayBuffer, usedIdx: number): number[] {
    const view = new DataView(buffer.slice(0))
    const size = view.getUint16(10, true)
    let left = (usedIdx - view.getUint16(14, true)) & 0xffff
    for (let head = view.getUint16(12, true); left > 0; left--) {
      view.setUint8(16 + head * 16, 0)
      head = view.getUint16(16 + head * 16 + 6, true)
    }
    return Array.from({ length: size }, (_, i) => i)
      .filter((i) => view.getUint8(16 + i * 16) === 1)
      .sort((a, b) => Number(view.getBigUint64(16 + a * 16 + 8, true) - view.getBigUint64(16 + b * 16 + 8, true)))
  }

  test.each(SEEDS)('nothing is lost and nothing comes twice, whenever back-ends die (seed %i)', (seed) => {
    const pick = random(seed)
    const world = new World([1, 2, 4, 8, 64][pick(5)]!, [0, 65535, 65530][pick(3)]!)
    let device: Device | undefined
    let deaths = 0
    for (let life = 0; life < LIVES; life++) {
      world.trap.left = 1 + pick(pick(4) === 0 ? 8 : 120)
      const survived = live(() => {
        const initialised = new DataView(world.buffer).getUint16(8, true) === 1
        const oracle = initialised ? bySpec(world.buffer, world.usedCount & 0xffff) : []
        device = new Device(world)
        check(world, device)
        expect(device.flying.map((position) => world.avail[position])).toEqual(oracle)
        for (let steps = 200; steps > 0; steps--) device.step(pick)
      })
      if (!survived) deaths++
      // The driver goes on alone.
      for (let steps = pick(4); steps > 0; steps--) world.offer(pick)
    }
    // And the last one finishes all of it.
    world.trap.left = Number.POSITIVE_INFINITY
    world.closing = true
    const last = new Device(world)
    check(world, last)
    while (last.next < world.avail.length || last.flying.length > 0) last.step(pick)
    last.publish()
    expect(world.used.size).toBe(world.avail.length)
    expect(deaths).toBeGreaterThan(LIVES / 4)
  })

  test('whichever store of a fixed piece of work is the last', () => {
    for (let stores = 0; ; stores++) {
      const world = new World(4, 65534)
      world.trap.left = stores
      const finished = live(() => {
        const device = new Device(world)
        const pick = random(5)
        for (let steps = 0; steps < 120; steps++) device.step(pick)
      })
      if (finished) {
        expect(stores).toBeGreaterThan(100)
        return
      }
      world.trap.left = Number.POSITIVE_INFINITY
      check(world, new Device(world))
    }
  })
})

describe('PackedInflight', () => {
  interface Offer {
    readonly id: number
    /** Absolute position of the first descriptor, counted from index 0 of lap 0. */
    readonly at: number
    readonly slots: number
    readonly descriptors: { low: number; high: number; length: number; flags: number }[]
    used: boolean
  }

  const AVAIL = 1 << 7
  const USED = 1 << 15

  class World {
    readonly size: number
    readonly buffer: SharedArrayBuffer
    readonly trap: StoreTrap
    /** The ring: flags and buffer id, and the offer that the driver wrote there last. */
    readonly flags: number[]
    readonly ids: number[]
    readonly offers: Offer[] = []
    readonly freeIds: number[]
    /** Absolute: where the driver offers next, looks for used descriptors next; and how far the device published. */
    offered: number
    taken: number
    published: number
    /** The driver offers nothing more. */
    closing = false

    constructor(size: number, start: number) {
      this.size = size
      this.buffer = new SharedArrayBuffer(inflightSize(size, true))
      this.trap = new StoreTrap(this.buffer)
      this.flags = new Array(size).fill(0)
      this.ids = new Array(size).fill(0)
      this.freeIds = Array.from({ length: size }, (_, i) => i)
      this.offered = start
      this.taken = start
      this.published = start
      // What the laps before left: used descriptors.
      for (let at = Math.max(0, start - size); at < start; at++) this.flags[at % size] = this.usedFlags(at)
    }

    /** The wrap counter is 1 in lap 0. */
    wrap(at: number): number {
      return (Math.floor(at / this.size) + 1) & 1
    }

    availFlags(at: number): number {
      return this.wrap(at) === 1 ? AVAIL : USED
    }

    usedFlags(at: number): number {
      return this.wrap(at) === 1 ? AVAIL | USED : 0
    }

    base(): number {
      const half = (at: number) => (at % this.size) | (this.wrap(at) << 15)
      return (half(this.published) | (half(this.published) << 16)) >>> 0
    }

    offer(pick: (below: number) => number): void {
      const room = this.size - (this.offered - this.taken)
      if (this.closing || room === 0) return
      const slots = pick(8) === 0 ? room : 1 + pick(Math.min(room, 3))
      const id = this.freeIds.splice(pick(this.freeIds.length), 1)[0]!
      const descriptors = Array.from({ length: slots }, (_, i) => {
        const flags = this.availFlags(this.offered + i) | (i < slots - 1 ? 1 : 0) | (pick(2) * 2)
        this.flags[(this.offered + i) % this.size] = flags
        this.ids[(this.offered + i) % this.size] = id
        return { low: pick(2 ** 32), high: pick(2 ** 21), length: pick(2 ** 32), flags }
      })
      this.offers.push({ id, at: this.offered, slots, descriptors, used: false })
      this.offered += slots
    }

    /** The driver goes on alone. */
    drive(pick: (below: number) => number): void {
      for (let steps = pick(8); steps > 0; steps--) {
        if (pick(2) === 0) this.offer(pick)
        else this.take()
      }
    }

    /** The driver takes what the ring says is used. */
    take(): void {
      for (;;) {
        const index = this.taken % this.size
        const wanted = this.usedFlags(this.taken)
        if (this.taken === this.offered || (this.flags[index]! & (AVAIL | USED)) !== wanted) return
        const offer = this.offers.findLast(({ id }) => id === this.ids[index])!
        // Or the driver took a used descriptor that nobody had published.
        expect(offer.used).toBe(true)
        this.taken += offer.slots
        this.freeIds.push(offer.id)
        expect(this.taken).toBeLessThanOrEqual(this.published)
      }
    }
  }

  class Device {
    readonly world: World
    readonly inflight: PackedInflight
    readonly recovery: PackedRecovery
    /** Absolute. */
    next: number
    flying: { offer: Offer; entry: number }[]
    batch: { offer: Offer; entry: number }[] = []
    readonly recovered: ReadonlySet<Offer>

    constructor(world: World) {
      this.world = world
      const { trap, size } = world
      const bytes = new Uint8Array(world.buffer)
      this.inflight = trap.trapped(() => new PackedInflight(bytes, size))
      const recovery = trap.trapped(() => this.inflight.recover(world.base(), (index) => world.flags[index]!))
      this.recovery = recovery
      this.flying = recovery.chains.map(({ entry, id }) => {
        return { entry, offer: world.offers.findLast((offer) => offer.id === id)! }
      })
      this.recovered = new Set(this.flying.map(({ offer }) => offer))
      this.next = world.published
      for (const { slots } of recovery.chains) this.next += slots
      // What PackedRecovery demands of the ring.
      for (let at = world.published; at < this.next; at++) {
        trap.store()
        const index = at % size
        world.flags[index] = (world.flags[index]! & ~(AVAIL | USED)) | world.availFlags(at)
      }
    }

    step(pick: (below: number) => number): void {
      const { world, inflight } = this
      const choice = pick(12)
      if (choice < 3) world.offer(pick)
      else if (choice < 4) world.take()
      else if (choice < 7) {
        const offer = world.offers.find(({ at }) => at === this.next)
        if (offer === undefined) return
        for (const { low, high, length, flags } of offer.descriptors) {
          inflight.descriptor(low, high, length, flags, offer.id)
          if (pick(30) > 0) continue
          inflight.abandon()
          return
        }
        const entry = inflight.popped()
        expect(entry).toBeGreaterThanOrEqual(0)
        this.flying.push({ offer, entry })
        this.next += offer.slots
      } else if (choice < 8) {
        const last = this.flying.at(-1)
        if (last === undefined || last.offer.at + last.offer.slots !== this.next || this.recovered.has(last.offer))
          return
        inflight.unpopped(last.entry)
        this.flying.pop()
        this.next -= last.offer.slots
      } else if (choice < 11) {
        if (this.flying.length === 0) return
        const chain = this.flying.splice(pick(this.flying.length), 1)[0]!
        inflight.used(chain.entry, chain.offer.slots)
        this.batch.push(chain)
      } else this.publish()
    }

    /** All used descriptors, and the flags of the first one last. */
    publish(): void {
      const { world } = this
      let at = world.published
      const places = this.batch.map(({ offer }) => {
        at += offer.slots
        return { at: at - offer.slots, offer }
      })
      const [first, ...others] = places
      if (first === undefined) return
      for (const { at, offer } of others) {
        world.trap.store()
        world.ids[at % world.size] = offer.id
        world.trap.store()
        world.flags[at % world.size] = world.usedFlags(at)
      }
      world.trap.store()
      world.ids[first.at % world.size] = first.offer.id
      world.trap.store()
      world.flags[first.at % world.size] = world.usedFlags(first.at)
      world.published = at
      for (const { offer } of this.batch.splice(0)) offer.used = true
      this.inflight.published()
    }
  }

  function check(world: World, device: Device): void {
    const { size } = world
    const { usedIndex, usedWrap, chains } = device.recovery
    expect([usedIndex, usedWrap]).toEqual([world.published % size, world.wrap(world.published)])
    const expected = world.offers.filter(({ at, used }) => at < device.next && !used)
    expect(chains.map(({ id, slots, descriptors }) => ({ id, slots, descriptors }))).toEqual(
      expected.map(({ id, slots, descriptors }) => ({ id, slots, descriptors }))
    )
    expect(device.next).toBeLessThanOrEqual(world.offered)
  }

  /** vhost-user.rst "Inflight I/O tracking", packed virtqueue, "When reconnecting": ids in order, and the used position. */
  function bySpec(world: World): { ids: number[]; usedIndex: number; usedWrap: number } {
    const view = new DataView(world.buffer.slice(0))
    const u16 = (at: number) => view.getUint16(at, true)
    if (u16(16) !== u16(18)) {
      const flags = view.getUint8(21) === 1 ? AVAIL : USED
      if ((world.flags[u16(18)]! & (AVAIL | USED)) !== flags) {
        view.setUint16(14, u16(12), true)
        view.setUint16(18, u16(16), true)
        view.setUint8(21, view.getUint8(20))
      }
    }
    for (let entry = u16(14); entry < world.size; entry = u16(32 + entry * 32 + 2)) view.setUint8(32 + entry * 32, 0)
    const heads = Array.from({ length: world.size }, (_, i) => i)
      .filter((i) => view.getUint8(32 + i * 32) === 1)
      .sort((a, b) => Number(view.getBigUint64(32 + a * 32 + 8, true) - view.getBigUint64(32 + b * 32 + 8, true)))
    const ids = heads.map((head) => u16(32 + u16(32 + head * 32 + 4) * 32 + 16))
    return { ids, usedIndex: u16(18), usedWrap: view.getUint8(21) }
  }

  test.each(SEEDS)('nothing is lost and nothing comes twice, whenever back-ends die (seed %i)', (seed) => {
    const pick = random(seed)
    const size = [1, 2, 3, 5, 8, 64][pick(6)]!
    const world = new World(size, [0, size, 2 * size - 1][pick(3)]!)
    let deaths = 0
    for (let life = 0; life < LIVES; life++) {
      world.trap.left = 1 + pick(pick(4) === 0 ? 12 : 400)
      const survived = live(() => {
        const view = new DataView(world.buffer)
        const wholeRing =
          view.getUint16(16, true) === view.getUint16(18, true) && view.getUint8(20) !== view.getUint8(21)
        const oracle = view.getUint16(8, true) === 1 && !wholeRing ? bySpec(world) : undefined
        const device = new Device(world)
        check(world, device)
        if (oracle !== undefined) {
          const { usedIndex, usedWrap, chains } = device.recovery
          expect({ usedIndex, usedWrap, ids: chains.map(({ id }) => id) }).toEqual(oracle)
        }
        for (let steps = 200; steps > 0; steps--) device.step(pick)
      })
      if (!survived) deaths++
      world.drive(pick)
    }
    world.trap.left = Number.POSITIVE_INFINITY
    world.closing = true
    const last = new Device(world)
    check(world, last)
    while (last.next < world.offered || last.flying.length > 0) last.step(pick)
    last.publish()
    world.take()
    expect(world.taken).toBe(world.offered)
    expect(world.offers.every(({ used }) => used)).toBe(true)
    expect(deaths).toBeGreaterThan(LIVES / 4)
  })

  test.each([1, 2, 4, 7])('whichever store of a piece of work is the last, ring of %i', (size) => {
    for (let seed = 1; seed <= 8; seed++) everyStore(size, seed)
  })

  function everyStore(size: number, seed: number): void {
    for (let stores = 0; ; stores++) {
      const world = new World(size, size - 1)
      const pick = random(seed)
      world.trap.left = stores
      const finished = live(() => {
        const device = new Device(world)
        for (let steps = 0; steps < 150; steps++) device.step(pick)
      })
      if (finished) {
        expect(stores).toBeGreaterThan(50)
        return
      }
      // Its successor dies at every store of the recovery, too.
      world.drive(pick)
      for (let more = 0; ; more++) {
        world.trap.left = more
        if (live(() => check(world, new Device(world)))) break
        world.drive(pick)
      }
      world.trap.left = Number.POSITIVE_INFINITY
      const device = new Device(world)
      check(world, device)
      for (let steps = 0; steps < 60; steps++) device.step(pick)
    }
  }
})

/**
 * Rings with an in-flight region: what they tell it and when, what they pop first after a crash, and, for both
 * together, a back-end that is killed at any store to the ring or to the region.
 */
import { types } from 'node:util'
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest'
import { DirtyLog } from '../../src/virtio/dirty-log.ts'
import { inflightSize, PackedInflight, SplitInflight } from '../../src/virtio/inflight.ts'
import { GuestMemory } from '../../src/virtio/memory.ts'
import type { VringConfig } from '../../src/virtio/vring.ts'
import { both, type Driver, driverOf, FORMATS, type Format, layoutOf, makeRing, newBase } from './both-rings.ts'
import { segments } from './mock-driver.ts'
import { AVAIL, baseAt, INDIRECT, packed, USED, WRITE } from './packed-driver.ts'
import { Killed, random, StoreTrap } from './store-trap.ts'

/** Of Atomics what the rings use. */
interface Plain {
  load(view: Uint16Array, index: number): number
  store(view: Uint16Array, index: number, value: number): number
}

type Call = readonly [name: string, ...args: number[]]

/** The real ones, writing down what they are told. */
class SplitRecorder extends SplitInflight {
  calls: Call[] = []
  override popped(head: number) {
    this.calls.push(['popped', head])
    super.popped(head)
  }
  override unpopped(head: number) {
    this.calls.push(['unpopped', head])
    super.unpopped(head)
  }
  override used(head: number) {
    this.calls.push(['used', head])
    super.used(head)
  }
  override published(usedIdx: number) {
    this.calls.push(['published', usedIdx])
    super.published(usedIdx)
  }
}

class PackedRecorder extends PackedInflight {
  calls: Call[] = []
  override descriptor(low: number, high: number, length: number, flags: number, id: number) {
    this.calls.push(['descriptor', low + high * 2 ** 32, length, flags & ~(AVAIL | USED), id])
    super.descriptor(low, high, length, flags, id)
  }
  override popped() {
    this.calls.push(['popped'])
    return super.popped()
  }
  override unpopped(entry: number) {
    this.calls.push(['unpopped', entry])
    super.unpopped(entry)
  }
  override used(entry: number, slots: number) {
    this.calls.push(['used', entry, slots])
    super.used(entry, slots)
  }
  override published() {
    this.calls.push(['published'])
    super.published()
  }
}

const SEEDS = Array.from({ length: 10 }, (_, i) => i + 1)

const newRegion = (format: Format, size = 8) =>
  new Uint8Array(new SharedArrayBuffer(inflightSize(size, format === 'packed')))
const attach = (format: Format, bytes: Uint8Array, size = 8) =>
  format === 'packed' ? new PackedInflight(bytes, size) : new SplitInflight(bytes, size)

/**
 * As QEMU starts a ring after a crash of the back-end: a split one at used.idx, a packed one at the base of the last
 * start.
 */
const afterCrash = (config: VringConfig, buffer: SharedArrayBuffer): VringConfig =>
  config.packed ? config : { ...config, base: new DataView(buffer).getUint16(config.device + 2, true) }

describe('what a split ring tells its region', () => {
  test('pop, unpop, push and publish, in that order', () => {
    const inflight = new SplitRecorder(newRegion('split'), 8)
    const { ring, driver, data } = both('split', { inflight })
    for (const head of [3, 1, 2]) driver.offer(head, { gpa: data, length: 1 })
    const [first, second, third] = [ring.pop()!, ring.pop()!, ring.pop()!]
    ring.unpop(third)
    ring.push(second, 0, 0)
    expect(inflight.calls.at(-1)).toEqual(['used', 1])
    ring.push(first, 0, 0)
    ring.publish()
    ring.publish()
    expect(inflight.calls).toEqual([
      ['popped', 3],
      ['popped', 1],
      ['popped', 2],
      ['unpopped', 2],
      ['used', 1],
      ['used', 3],
      ['published', 2],
    ])
  })

  test('used.idx is published before the region hears of it', () => {
    const inflight = new SplitRecorder(newRegion('split'), 8)
    const { ring, driver, data } = both('split', { inflight })
    driver.offer(3, { gpa: data, length: 1 })
    ring.push(ring.pop()!, 0, 0)
    const published = vi.spyOn(inflight, 'published').mockImplementation(() => {
      expect(driver.takeUsed()).toHaveLength(1)
    })
    ring.publish()
    expect(published).toHaveBeenCalledOnce()
  })

  test('nothing of a chain that is bad, and with IN_ORDER a completion when it is written', () => {
    const inflight = new SplitRecorder(newRegion('split'), 8)
    const { ring, driver, data } = both('split', { inflight, inOrder: true })
    driver.offer(0, { gpa: data, length: 1 })
    driver.offer(1, { gpa: data, length: 1 })
    driver.offer(2, { gpa: 2 ** 50, length: 1 })
    const [first, second] = [ring.pop()!, ring.pop()!]
    expect(ring.pop()).toBeUndefined()
    ring.push(second, 0, 0)
    ring.publish()
    expect(inflight.calls).toEqual([
      ['popped', 0],
      ['popped', 1],
    ])
    ring.push(first, 0, 0)
    ring.publish()
    expect(inflight.calls.slice(2)).toEqual([
      ['used', 0],
      ['used', 1],
      ['published', 2],
    ])
  })
})

describe('what a packed ring tells its region', () => {
  test('each descriptor of a chain, pop, unpop, push and publish', () => {
    const inflight = new PackedRecorder(newRegion('packed'), 8)
    const { ring, driver, data } = both('packed', { inflight })
    driver.offer(5, { gpa: data, length: 1 })
    driver.offer(6, { gpa: data + 10, length: 2 }, { gpa: data + 20, length: 3, flags: WRITE })
    driver.offer(7, { gpa: data, length: 16, flags: INDIRECT })
    const [first, second, third] = [ring.pop()!, ring.pop()!, ring.pop()!]
    ring.unpop(third)
    ring.push(second, 0, 0)
    ring.push(first, 0, 0)
    ring.publish()
    ring.publish()
    expect(inflight.calls).toEqual([
      ['descriptor', data, 1, 0, 5],
      ['popped'],
      ['descriptor', data + 10, 2, 1, 0xfffe],
      ['descriptor', data + 20, 3, WRITE, 6],
      ['popped'],
      ['descriptor', data, 16, INDIRECT, 7],
      ['popped'],
      ['unpopped', 3],
      ['used', 1, 2],
      ['used', 0, 1],
      ['published'],
    ])
  })

  test('nothing of a chain that is bad; the batch is visible before the region hears of it', () => {
    const inflight = new PackedRecorder(newRegion('packed'), 8)
    const { ring, driver, data } = both('packed', { inflight })
    driver.offer(0, { gpa: data, length: 1 })
    driver.offer(1, { gpa: data, length: 1 }, { gpa: 2 ** 50, length: 1 })
    const chain = ring.pop()!
    expect([ring.pop(), inflight.calls.length]).toEqual([undefined, 2])
    ring.push(chain, 0, 0)
    const published = vi.spyOn(inflight, 'published').mockImplementation(() => {
      expect(driver.takeUsed()).toHaveLength(1)
    })
    ring.publish()
    expect(published).toHaveBeenCalledOnce()
  })
})

describe.each(FORMATS)('a %s ring that starts with chains in flight', (format) => {
  /** Pops `heads`, uses those of `used`, and leaves the rest to the next one. */
  function crash(heads: readonly number[], used: readonly number[], options: { inOrder?: boolean } = {}) {
    const bytes = newRegion(format)
    const old = both(format, { inflight: attach(format, bytes), ...options })
    const { driver, data, memory, config } = old
    for (const head of heads)
      driver.offer(head, { gpa: data + head, length: 1 + head }, { gpa: data, length: 1, flags: WRITE })
    for (const _ of heads) old.ring.pop()
    for (const head of used) old.ring.push(old.ring.chain(head), head, head)
    old.ring.publish()
    const ring = makeRing(memory, afterCrash(config, old.buffer), attach(format, bytes))
    return { ...old, old: old.ring, ring, driver, bytes }
  }

  test('pops them first, in their order, and then what is new', () => {
    const { ring, old, driver, data } = crash([3, 0, 2], [0])
    driver.offer(1, { gpa: data, length: 7 })
    expect([ring.hasAvail(), ring.recovering, ring.base]).toEqual([true, true, old.base])
    expect(segments(ring.pop()!)[0]).toEqual([data + 3, 4])
    expect([ring.pop()!.head, ring.recovering, ring.hasAvail()]).toEqual([2, false, true])
    expect([ring.pop()!.readable, ring.pop(), ring.hasAvail()]).toEqual([7, undefined, false])
    for (const head of [2, 1, 3]) ring.push(ring.chain(head), head, head)
    ring.publish()
    expect(driver.takeUsed().map(({ id }) => id)).toEqual([0, 2, 1, 3])
    expect([ring.error, ring.pop()]).toEqual([undefined, undefined])
  })

  test('puts one back by unpop, in front of what is new, and it stays marked', () => {
    const { ring, driver, data, bytes, memory, config } = crash([0, 1], [])
    driver.offer(2, { gpa: data, length: 1 })
    const base = ring.base
    const chains = [ring.pop()!, ring.pop()!, ring.pop()!]
    for (const chain of chains.toReversed()) ring.unpop(chain)
    expect([ring.base, ring.recovering, ring.hasAvail()]).toEqual([base, true, true])
    expect([ring.pop()!.head, ring.pop()!.head]).toEqual([0, 1])
    const next = makeRing(memory, config, attach(format, bytes))
    expect([next.pop()!.head, next.pop()!.head, next.pop()!.head, next.pop()]).toEqual([0, 1, 2, undefined])
  })

  test('a head that was recovered, used and offered again is one of the ring', () => {
    const { ring, driver, data } = crash([0, 1], [])
    const first = ring.pop()!
    const second = ring.pop()!
    ring.push(second, 0, 0)
    ring.publish()
    driver.takeUsed()
    driver.offer(1, { gpa: data, length: 99 })
    ring.unpop(ring.pop()!)
    expect([ring.recovering, ring.hasAvail()]).toEqual([false, true])
    expect([ring.pop()!.readable, ring.pop(), first.inFlight]).toEqual([99, undefined, true])
  })

  test('with all used, with none, and with all in flight', () => {
    const heads = [3, 2, 1, 0]
    for (const used of [[], [3], [1], heads]) {
      const { ring, old } = crash(heads, used)
      expect(ring.base).toBe(old.base)
      const popped: number[] = []
      for (let chain = ring.pop(); chain !== undefined; chain = ring.pop()) popped.push(chain.head)
      expect(popped).toEqual(heads.filter((head) => !used.includes(head)))
    }
  })

  test('IN_ORDER: a completion that was held is in flight still', () => {
    const { ring, driver } = crash([2, 3, 1], [1, 3], { inOrder: true })
    expect(driver.takeUsed()).toEqual([])
    expect([ring.pop()!.head, ring.pop()!.head, ring.pop()!.head]).toEqual([2, 3, 1])
    for (const head of [1, 2, 3]) ring.push(ring.chain(head), head, head)
    ring.publish()
    expect(driver.takeUsed().map(({ id }) => id)).toEqual([2, 3, 1])
  })

  test('what the driver does wrong with a recovered chain breaks the ring', () => {
    const bytes = newRegion(format)
    const old = both(format, { inflight: attach(format, bytes) })
    old.driver.offer(0, { gpa: old.data, length: 1 })
    old.ring.pop()
    const memory = new GuestMemory([{ gpa: 0, size: old.layout.end, hva: 0, buffer: old.buffer }])
    const ring = makeRing(memory, old.config, attach(format, bytes))
    expect([ring.hasAvail(), ring.pop(), ring.error?.code, ring.hasAvail()]).toEqual([
      true,
      undefined,
      'ERR_RING_ADDRESS',
      false,
    ])
  })

  test('a region of another ring breaks it', () => {
    const bytes = newRegion(format, 16)
    const { memory, config, driver, data, ring } = both(format, { size: 16, inflight: attach(format, bytes, 16) })
    driver.offer(0, { gpa: data, length: 1 })
    ring.pop()
    const other = makeRing(memory, { ...config, size: 8 }, attach(format, bytes, 8))
    expect([other.error?.code, other.pop(), other.hasAvail()]).toEqual(['ERR_RING_INFLIGHT', undefined, false])
    expect(other.error?.message).toContain('16')
  })

  test('an indirect table is read again', () => {
    const bytes = newRegion(format)
    const old = both(format, { inflight: attach(format, bytes) })
    const view = new DataView(old.buffer)
    view.setBigUint64(old.data, BigInt(old.data + 500), true)
    view.setUint32(old.data + 8, 44, true)
    old.driver.offer(4, { gpa: old.data, length: 16, flags: INDIRECT })
    old.ring.pop()
    const ring = makeRing(old.memory, old.config, attach(format, bytes))
    expect(segments(ring.pop()!)).toEqual([[old.data + 500, 44]])
  })
})

describe('a packed ring and its region', () => {
  test('a region is believed over the base, a new one begins at its used half', () => {
    for (const base of [baseAt(5, 0), 0x8005, 0x0005]) {
      const bytes = newRegion('packed')
      const { ring, driver, data, config, memory } = packed({ base, inflight: new PackedInflight(bytes, 8) })
      expect(ring.base).toBe(base === 0x8005 ? baseAt(5, 1) : baseAt(5, 0))
      driver.offer(0, { gpa: data, length: 1 }, { gpa: data, length: 1 })
      ring.push(ring.pop()!, 0, 0)
      ring.publish()
      const next = makeRing(memory, config, new PackedInflight(bytes, 8))
      expect(next.base).toBe(ring.base)
    }
  })

  test('a base beyond the ring breaks it also with a new region', () => {
    const { ring } = packed({ base: baseAt(8, 1), inflight: new PackedInflight(newRegion('packed'), 8) })
    expect(ring.error?.code).toBe('ERR_RING_INFLIGHT')
  })

  test.each([8, 1])('a recorded id that is not one of the ring’s, or twice there, breaks it: %d', (id) => {
    const bytes = newRegion('packed')
    const old = packed({ inflight: new PackedInflight(bytes, 8) })
    for (const head of [1, 2]) old.driver.offer(head, { gpa: old.data, length: 1 })
    old.ring.pop()
    old.ring.pop()
    // DescStatePacked 1: its id.
    new DataView(bytes.buffer).setUint16(32 + 32 + 16, id, true)
    const ring = makeRing(old.memory, old.config, new PackedInflight(bytes, 8))
    expect([ring.error?.code, ring.pop()]).toEqual(['ERR_RING_INFLIGHT', undefined])
  })

  test('used descriptors that were written and not published are not seen later', () => {
    const bytes = newRegion('packed')
    const old = packed({ inflight: new PackedInflight(bytes, 8) })
    for (const id of [0, 1, 2]) old.driver.offer(id, { gpa: old.data, length: 1 })
    for (const _ of [0, 1, 2]) old.ring.pop()
    for (const id of [0, 1, 2]) old.ring.push(old.ring.chain(id), 0, 0)
    // It dies here: the second and third have their used flags, the first has not.
    const ring = makeRing(old.memory, old.config, new PackedInflight(bytes, 8))
    for (const _ of [0, 1, 2]) ring.pop()
    ring.push(ring.chain(2), 0, 0)
    ring.publish()
    expect(old.driver.takeUsed().map(({ id }) => id)).toEqual([2])
    ring.push(ring.chain(0), 0, 0)
    ring.push(ring.chain(1), 0, 0)
    ring.publish()
    expect(old.driver.takeUsed().map(({ id }) => id)).toEqual([0, 1])
  })

  test('what recovery writes to the ring is marked in the first log that it gets', () => {
    const bytes = newRegion('packed')
    const old = packed({ inflight: new PackedInflight(bytes, 8) })
    for (const id of [0, 1]) old.driver.offer(id, { gpa: old.data, length: 1 })
    for (const _ of [0, 1]) old.ring.pop()
    for (const id of [0, 1]) old.ring.push(old.ring.chain(id), 0, 0)
    const bits = new Uint8Array(1024)
    const log = new DirtyLog(bits)
    const marked = (address: number) => (bits[address >> 15]! & (1 << ((address >> 12) & 7))) !== 0
    const ring = makeRing(old.memory, old.config, new PackedInflight(bytes, 8))
    // A front-end may give the log when the ring runs.
    ring.setLog(undefined, -1)
    ring.setLog(log, 0x10_0000)
    expect([marked(old.config.descriptor), marked(0x10_0000)]).toEqual([true, true])
    bits.fill(0)
    ring.setLog(log, 0x10_0000)
    expect(bits.some((byte) => byte !== 0)).toBe(false)
    // Nothing was written in place of what was published.
    const clean = packed({ inflight: new PackedInflight(newRegion('packed'), 8) })
    clean.ring.setLog(log, 0x10_0000)
    expect(bits.some((byte) => byte !== 0)).toBe(false)
  })
})

describe.each(FORMATS)('a back-end of a %s ring that is killed', (format) => {
  // Atomics take no proxies, and inside of `trapped` every array made is one.
  const { load, store } = Atomics as unknown as Plain
  const Halves = Uint16Array
  const behind = (view: Uint16Array) =>
    types.isProxy(view) ? new Halves(view.buffer, view.byteOffset, view.length) : view

  let trap: StoreTrap | undefined
  beforeEach(() => {
    const atomics = Atomics as unknown as Plain
    vi.spyOn(atomics, 'load').mockImplementation((view, index) => load(behind(view), index))
    vi.spyOn(atomics, 'store').mockImplementation((view, index, value) => {
      if (types.isProxy(view)) trap?.store()
      return store(behind(view), index, value)
    })
  })
  afterEach(() => {
    vi.restoreAllMocks()
  })

  test.each(SEEDS)('at any store: nothing is lost, none seen twice, seed %d', (seed) => {
    const rnd = random(seed)
    const inOrder = seed % 2 === 0
    const size = format === 'split' ? 1 << (1 + (seed % 3)) : 1 + seed
    const layout = layoutOf(format, size)
    // One buffer, so that one trap sees the ring and the region.
    const bytes = inflightSize(size, format === 'packed')
    const data = layout.end + bytes
    const buffer = new SharedArrayBuffer(Math.ceil(data / 4096) * 4096 + 4096)
    const world: Driver = driverOf(format, buffer, layout)
    const memory = new GuestMemory([{ gpa: 0, size: buffer.byteLength, hva: 0, buffer }])
    const stored = new StoreTrap(buffer)
    trap = stored
    const features = { eventIdx: false, indirect: true, packed: format === 'packed', inOrder }
    const config = { ...layout, base: newBase(format), ...features }

    const free = Array.from({ length: size }, (_, i) => i)
    /** Offered and not used, in the order of the driver. */
    const open: number[] = []
    const slots = new Map<number, number>()
    let room = size
    /** What back-ends, of whatever life, said of the chains that they were through with. */
    const done = new Map<number, number>()
    let serial = 0
    let usedInAll = 0

    const take = () => {
      for (const { id, length } of world.takeUsed()) {
        // Of the last one that was through with it: an older one did not publish that.
        expect(done.get(id)).toBe(length)
        expect(open).toContain(id)
        if (inOrder) expect(open[0]).toBe(id)
        open.splice(open.indexOf(id), 1)
        done.delete(id)
        free.push(id)
        room += slots.get(id)!
        usedInAll++
      }
    }
    const offer = (): number[] => {
      if (room === 0) return []
      const id = free.splice(rnd(free.length), 1)[0]!
      const count = 1 + rnd(Math.min(room, 3))
      slots.set(id, count)
      room -= count
      world.offer(id, ...Array.from({ length: count }, () => ({ gpa: data, length: 8, flags: WRITE })))
      open.push(id)
      return [id]
    }

    const live = (kill: boolean) => {
      stored.left = kill ? rnd(rnd(4) === 0 ? 10 : 120) : Number.POSITIVE_INFINITY
      const ring = stored.trapped(() => {
        const region = new Uint8Array(buffer, layout.end, bytes)
        const inflight = format === 'packed' ? new PackedInflight(region, size) : new SplitInflight(region, size)
        return makeRing(memory, afterCrash(config, buffer), inflight)
      })
      expect(ring.error).toBeUndefined()
      // The driver may see only now what the last back-end has published.
      take()
      // What was in flight comes first, and so the order is that of the driver.
      const order = open.slice()
      const flying: number[] = []
      // What can be unpopped: the last ones, as long as none of them was used.
      let last: number[] = []
      for (let step = 0; kill ? step < 200 : open.length > 0; step++) {
        const choice = rnd(kill ? 9 : 6)
        if (choice < 2) {
          const chain = ring.pop()
          expect(chain?.head).toBe(order.shift())
          if (chain !== undefined) for (const list of [flying, last]) list.push(chain.head)
        } else if (choice < 4) {
          if (flying.length === 0) continue
          const head = flying.splice(rnd(flying.length), 1)[0]!
          last = last.slice(last.indexOf(head) + 1)
          done.set(head, ++serial)
          ring.push(ring.chain(head), serial, 0)
        } else if (choice === 4) ring.publish()
        else if (choice === 5) take()
        else if (choice < 8) order.push(...offer())
        else if (last.length > 0) {
          const head = last.pop()!
          flying.splice(flying.indexOf(head), 1)
          order.unshift(head)
          ring.unpop(ring.chain(head))
        }
        expect(ring.error).toBeUndefined()
      }
    }

    for (let life = 0; life < 250; life++) {
      try {
        live(true)
      } catch (error) {
        if (!(error instanceof Killed)) throw error
      }
      // The driver sees what there is, also while there is no back-end.
      if (rnd(2) === 0) take()
    }
    live(false)
    take()
    expect([open, free.toSorted((a, b) => a - b)]).toEqual([[], Array.from({ length: size }, (_, i) => i)])
    expect(usedInAll).toBeGreaterThan(200)
  })
})

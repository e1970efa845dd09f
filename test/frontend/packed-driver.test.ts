/** The driver half of the packed ring against a device of a few lines, on plain buffers. */
import { describe, expect, test } from 'vitest'
import type { Segment } from '../../src/frontend/driver.ts'
import { PACKED_BASE, PackedDriver, packedRingBytes, writePackedTable } from '../../src/frontend/packed-driver.ts'

const [NEXT, WRITE, INDIRECT, AVAIL, USED] = [1, 2, 4, 1 << 7, 1 << 15]

interface Popped {
  readonly id: number
  /** Places in the ring. */
  readonly slots: number
  readonly chain: readonly { address: number; length: number; flags: number }[]
}

/** The other half: reads the ring in order, and uses buffers in any. Written from virtio 1.3 §2.8 alone. */
class TinyDevice {
  readonly view: DataView
  readonly #size: number
  #avail: number
  #availWrap: boolean
  used: number
  usedWrap: boolean

  constructor(buffer: SharedArrayBuffer, size: number, base: number) {
    this.view = new DataView(buffer)
    this.#size = size
    this.#avail = base & 0x7fff
    this.#availWrap = (base & 0x8000) !== 0
    this.used = (base >>> 16) & 0x7fff
    this.usedWrap = base >>> 31 === 1
  }

  pop(): Popped[] {
    const out: Popped[] = []
    for (;;) {
      const flags = this.view.getUint16(16 * this.#avail + 14, true)
      if (((flags & AVAIL) !== 0) !== this.#availWrap || ((flags & USED) !== 0) === this.#availWrap) return out
      const chain: Popped['chain'][number][] = []
      for (;;) {
        const at = 16 * this.#avail
        const one = this.view.getUint16(at + 14, true)
        // Every descriptor of a chain has to be available, not only the first (§2.8.6).
        if (((one & AVAIL) !== 0) !== this.#availWrap || ((one & USED) !== 0) === this.#availWrap)
          throw new Error('half a chain')
        const address = Number(this.view.getBigUint64(at, true))
        chain.push({ address, length: this.view.getUint32(at + 8, true), flags: one & ~(AVAIL | USED) })
        const id = this.view.getUint16(at + 12, true)
        if (++this.#avail === this.#size) {
          this.#avail = 0
          this.#availWrap = !this.#availWrap
        }
        if ((one & NEXT) !== 0) continue
        out.push({ id, slots: chain.length, chain })
        break
      }
    }
  }

  /** @param slots places to skip: those of the buffer, or of the whole batch with IN_ORDER */
  use({ id, slots }: Pick<Popped, 'id' | 'slots'>, written: number): void {
    const at = 16 * this.used
    this.view.setUint32(at + 8, written, true)
    this.view.setUint16(at + 12, id, true)
    this.view.setUint16(at + 14, (this.usedWrap ? AVAIL | USED : 0) | (written > 0 ? WRITE : 0), true)
    this.used += slots
    if (this.used < this.#size) return
    this.used -= this.#size
    this.usedWrap = !this.usedWrap
  }

  /** Its wish for kicks: flags, and the place and round of the event. */
  wish(flags: number, slot = 0, wrap = false): void {
    this.view.setUint16(16 * this.#size + 4, slot | (wrap ? 0x8000 : 0), true)
    this.view.setUint16(16 * this.#size + 6, flags, true)
  }

  get driverWish(): { slot: number; wrap: boolean; flags: number } {
    const word = this.view.getUint16(16 * this.#size, true)
    return { slot: word & 0x7fff, wrap: word >> 15 === 1, flags: this.view.getUint16(16 * this.#size + 2, true) }
  }
}

function make(
  size: number,
  options: { eventIdx?: boolean; inOrder?: boolean; base?: number; translate?: (gpa: number) => number } = {}
): { driver: PackedDriver; device: TinyDevice; kicks: () => number } {
  const buffer = new SharedArrayBuffer(packedRingBytes(size).descriptors + 8)
  let kicks = 0
  const driver = new PackedDriver({
    size,
    areas: {
      descriptors: { buffer, offset: 0 },
      driverEvent: { buffer, offset: 16 * size },
      deviceEvent: { buffer, offset: 16 * size + 4 },
    },
    eventIdx: options.eventIdx ?? false,
    kick: () => kicks++,
    ...options,
  })
  return { driver, device: new TinyDevice(buffer, size, options.base ?? PACKED_BASE), kicks: () => kicks }
}

const segments: Segment[] = [
  { address: 0x1_2345_6780, length: 16, writable: false },
  { address: 2 ** 40 + 4096, length: 4096, writable: true },
  { address: 77, length: 1, writable: true },
]
const one = segments.slice(2)

/** `slot | wrap << 15` in both halves. */
const base = (slot: number, wrap: 0 | 1): number => ((slot | (wrap << 15)) * 0x1_0001) >>> 0

describe('chains', () => {
  test('reach the device as they were built, above 4 GiB too', () => {
    const { driver, device } = make(8)
    const chain = driver.build(segments)
    driver.issue(chain)
    expect(device.pop()).toEqual([])
    driver.publish()
    expect(device.pop()).toEqual([
      {
        id: chain,
        slots: 3,
        chain: [
          { address: 0x1_2345_6780, length: 16, flags: NEXT },
          { address: 2 ** 40 + 4096, length: 4096, flags: NEXT | WRITE },
          { address: 77, length: 1, flags: WRITE },
        ],
      },
    ])
  })

  test.each([1, 2, 3, 4, 5, 7, 8, 9, 16, 17])(
    'on a ring of %i, in any order of completion, over many rounds',
    (size) => {
      const { driver, device } = make(size)
      let seed = 7
      const draw = (limit: number): number => {
        seed = (seed * 1103515245 + 12345) & 0x7fff_ffff
        return (seed >> 8) % limit
      }
      const held: Popped[] = []
      const flying = new Map<number, number>()
      let completed = 0
      for (let round = 0; round < 3000; round++) {
        const length = 1 + draw(Math.min(3, size))
        const chain = driver.build(segments.slice(0, length))
        if (chain >= 0) {
          flying.set(chain, length)
          driver.issue(chain)
        } else expect(driver.freeDescriptors).toBeLessThan(length)
        if (draw(2) === 0) driver.publish()
        const popped = device.pop()
        for (const { id, slots } of popped) expect(slots).toBe(flying.get(id))
        held.push(...popped)
        const use = draw(held.length + 1)
        for (let i = 0; i < use; i++) device.use(held.splice(draw(held.length), 1)[0] as Popped, round)
        expect([driver.pending(), driver.hasUsed()]).toEqual([use, use > 0])
        for (let id = driver.pop(); id >= 0; id = driver.pop()) {
          expect(driver.written).toBe(round)
          expect(flying.delete(id)).toBe(true)
          driver.release(id)
          completed++
        }
        expect(driver.inFlight).toBe(flying.size)
      }
      expect(driver.counters.completed).toBe(completed)
      expect(completed).toBeGreaterThan(size === 1 ? 500 : 1000)
    }
  )

  test('a chain as long as the ring', () => {
    const { driver, device } = make(3)
    const chain = driver.build(segments)
    expect(driver.build(one)).toBe(-1)
    for (let i = 0; i < 10; i++) {
      driver.issue(chain)
      driver.publish()
      device.use(device.pop()[0] as Popped, i + 1)
      expect([driver.pop(), driver.written]).toEqual([chain, i + 1])
    }
    driver.release(chain)
    expect(driver.freeDescriptors).toBe(3)
  })

  test('an indirect table takes one descriptor, and has no flags but WRITE', () => {
    const { driver, device } = make(4)
    const bytes = new Uint8Array(48)
    const chain = driver.build(segments, { gpa: 0x9000, bytes })
    driver.issue(chain)
    driver.publish()
    expect(device.pop()).toEqual([{ id: chain, slots: 1, chain: [{ address: 0x9000, length: 48, flags: INDIRECT }] }])
    const view = new DataView(bytes.buffer)
    expect([0, 1, 2].map((i) => view.getUint16(16 * i + 14, true))).toEqual([0, WRITE, WRITE])
    expect([0, 1, 2].map((i) => view.getBigUint64(16 * i, true))).toEqual(
      segments.map(({ address }) => BigInt(address))
    )
    const expected = new Uint8Array(48)
    writePackedTable({ gpa: 0, bytes: expected }, segments)
    expect(bytes).toEqual(expected)
    driver.setWritable(chain, 1, false)
    expect(view.getUint16(16 + 14, true)).toBe(0)
  })

  test('a direction that changes is seen when the chain is issued again', () => {
    const { driver, device } = make(8)
    const chain = driver.build(segments)
    for (const writable of [false, true, false]) {
      driver.setWritable(chain, 1, writable)
      driver.issue(chain)
      driver.publish()
      const [popped] = device.pop() as [Popped]
      expect(popped.chain[1]?.flags).toBe(NEXT | (writable ? WRITE : 0))
      device.use(popped, 1)
      driver.pop()
    }
  })

  test('behind a vIOMMU the device is told other addresses, of tables and of what is in them', () => {
    const { driver, device } = make(8, { translate: (gpa) => gpa + 0x10_0000 })
    const bytes = new Uint8Array(32)
    driver.issue(
      driver.build([segments[2] as Segment, { ...(segments[2] as Segment), untranslated: true }], { gpa: 64, bytes })
    )
    driver.issue(driver.build(one))
    driver.publish()
    expect(device.pop().map(({ chain }) => chain[0]?.address)).toEqual([64 + 0x10_0000, 77 + 0x10_0000])
    const view = new DataView(bytes.buffer)
    expect([view.getBigUint64(0, true), view.getBigUint64(16, true)]).toEqual([77n + 0x10_0000n, 77n])
  })

  test('what the device did not write has no length', () => {
    const { driver, device } = make(2)
    const chain = driver.build(one)
    driver.issue(chain)
    driver.publish()
    const [popped] = device.pop() as [Popped]
    device.view.setUint32(8, 4711, true)
    device.use(popped, 0)
    device.view.setUint32(8, 4711, true)
    expect([driver.pop(), driver.written]).toEqual([chain, 0])
  })
})

describe('where a ring starts', () => {
  test.each([
    [0, 1],
    [0, 0],
    [3, 1],
    [3, 0],
    [6, 0],
  ] as const)('at %i in the round of %i, nothing seems used or available', (slot, wrap) => {
    const { driver, device } = make(7, { base: base(slot, wrap) })
    expect([driver.base, driver.pop(), driver.hasUsed(), driver.pending()]).toEqual([base(slot, wrap), -1, false, 0])
    expect(device.pop()).toEqual([])
    const chain = driver.build(segments)
    for (let i = 1; i <= 20; i++) {
      driver.issue(chain)
      driver.publish()
      device.use(device.pop()[0] as Popped, 1)
      expect(driver.pop()).toBe(chain)
      const at = slot + 3 * i
      expect(driver.base).toBe(base(at % 7, ((wrap + Math.floor(at / 7)) & 1) as 0 | 1))
    }
  })

  test('again, after a reset', () => {
    const { driver } = make(7)
    driver.issue(driver.build(segments))
    driver.issue(driver.build(segments))
    driver.publish()
    driver.reset(base(5, 0))
    expect([driver.base, driver.inFlight, driver.freeDescriptors]).toEqual([base(5, 0), 0, 7])
    expect([0, 4, 5, 6].map((slot) => driver.readDescriptor(slot).flags)).toEqual([0, 0, AVAIL | USED, AVAIL | USED])
  })

  test.each([0, 32769, 1.5])('a ring of %d is refused', (size) => {
    expect(() => make(size)).toThrow(RangeError)
  })

  test.each([base(7, 1), 0x8000_8001, 0x8000])('a ring of 7 at 0x%x is refused', (at) => {
    expect(() => make(7, { base: at })).toThrow(RangeError)
  })
})

describe('IN_ORDER', () => {
  const six: readonly Segment[][] = [1, 2, 3, 1, 2, 1].map((count) => segments.slice(3 - count))

  test('one used descriptor may stand for several buffers', () => {
    const { driver, device } = make(10, { inOrder: true })
    for (let round = 0; round < 40; round++) {
      const chains = six.map((chain) => driver.build(chain))
      for (const chain of chains) driver.issue(chain)
      driver.publish()
      const popped = device.pop()
      expect(popped.map(({ id }) => id)).toEqual(chains)
      // 0 alone, 1 … 3 with one descriptor, 4 and 5 with one.
      const slots = (from: number, to: number): number =>
        popped.slice(from, to + 1).reduce((sum, chain) => sum + chain.slots, 0)
      device.use(popped[0] as Popped, 9)
      device.use({ id: chains[3] as number, slots: slots(1, 3) }, 5)
      expect(driver.pending()).toBe(4)
      device.use({ id: chains[5] as number, slots: slots(4, 5) }, 7)
      expect(driver.pending()).toBe(6)
      const got: number[][] = []
      for (let chain = driver.pop(); chain >= 0; chain = driver.pop()) got.push([chain, driver.written])
      // Those without a descriptor of their own were used completely.
      const written = [9, 4097, 4097, 5, 4097, 7]
      expect(got).toEqual(chains.map((chain, i) => [chain, written[i]]))
      for (const chain of chains) driver.release(chain)
      expect(driver.hasUsed()).toBe(false)
    }
  })

  test('a device that goes back is found out', () => {
    const { driver, device } = make(8, { inOrder: true })
    for (let i = 0; i < 3; i++) driver.issue(driver.build(one))
    driver.publish()
    const popped = device.pop()
    device.use(popped[1] as Popped, 1)
    device.use(popped[0] as Popped, 1)
    // The first one stands for both, so what follows is one too many.
    expect([driver.pop(), driver.pop()]).toEqual([popped[0]?.id, popped[1]?.id])
    expect(driver.pop()).toBe(-1)
    device.use(popped[0] as Popped, 1)
    expect(() => driver.pop()).toThrow(/doesn't have/)
  })
})

describe('a device that lies', () => {
  test.each([5, 8, 65535])('buffer %i, which it does not have', (id) => {
    const { driver, device } = make(8)
    driver.issue(driver.build(segments))
    driver.publish()
    device.use({ id, slots: 1 }, 0)
    expect(() => driver.pop()).toThrow(`buffer ${id}`)
  })

  test('a buffer used twice', () => {
    const { driver, device } = make(8)
    driver.issue(driver.build(one))
    driver.publish()
    const [popped] = device.pop() as [Popped]
    device.use(popped, 0)
    device.use(popped, 0)
    expect(driver.pop()).toBe(popped.id)
    expect(() => driver.pop()).toThrow(/doesn't have/)
  })
})

describe('notifications', () => {
  test('flags: both sides turn the other off', () => {
    const { driver, device, kicks } = make(8)
    const chain = driver.build(segments)
    const turn = (): boolean => {
      driver.issue(chain)
      const kicked = driver.publish()
      device.use(device.pop()[0] as Popped, 0)
      expect(driver.pop()).toBe(chain)
      return kicked
    }
    expect(turn()).toBe(true)
    device.wish(1)
    expect(turn()).toBe(false)
    device.wish(0)
    expect(turn()).toBe(true)
    // DESC means nothing without EVENT_IDX: better a kick too many.
    device.wish(2, 5, false)
    expect(turn()).toBe(true)
    expect([kicks(), driver.counters.kicks, driver.counters.suppressedKicks]).toEqual([3, 3, 1])
    driver.disableCalls()
    expect(device.driverWish.flags).toBe(1)
    expect(driver.enableCalls()).toBe(false)
    expect(device.driverWish.flags).toBe(0)
    driver.issue(chain)
    driver.publish()
    device.use(device.pop()[0] as Popped, 0)
    expect(driver.enableCalls()).toBe(true)
  })

  test.each([1, 2, 5, 8])(
    'EVENT_IDX on a ring of %i: a kick exactly when the place is passed, wherever that is',
    (size) => {
      for (let start = 0; start < 3 * size; start++) {
        for (let count = 1; count <= size; count++) {
          // A device asks for a place that was not reached, and none further ahead than a ring.
          for (let ahead = 0; ahead < size; ahead++) {
            const { driver, device } = make(size, { eventIdx: true })
            const chains = Array.from({ length: size }, () => driver.build(one))
            const turn = (many: number): boolean => {
              for (const chain of chains.slice(0, many)) driver.issue(chain)
              const kicked = driver.publish()
              for (const popped of device.pop()) device.use(popped, 0)
              for (let i = 0; i < many; i++) driver.pop()
              return kicked
            }
            for (let i = 0; i < start; i++) turn(1)
            const event = start + ahead
            device.wish(2, event % size, Math.floor(event / size) % 2 === 0)
            expect([start, count, ahead, turn(count)]).toEqual([start, count, ahead, ahead < count])
          }
        }
      }
    }
  )

  test('EVENT_IDX: a sleeping driver names the place that it has not read', () => {
    const { driver, device } = make(5, { eventIdx: true })
    const chain = driver.build(segments)
    for (let i = 0; i < 7; i++) {
      expect(driver.enableCalls()).toBe(false)
      expect(device.driverWish).toEqual({ slot: (3 * i) % 5, wrap: Math.floor((3 * i) / 5) % 2 === 0, flags: 2 })
      driver.disableCalls()
      expect(device.driverWish.flags).toBe(1)
      driver.issue(chain)
      driver.publish()
      device.use(device.pop()[0] as Popped, 0)
      driver.pop()
    }
    driver.setEvent(4, 1, 2)
    expect(device.driverWish).toEqual({ slot: 4, wrap: true, flags: 2 })
    device.wish(2, 3, true)
    expect(driver.deviceEvent).toEqual({ slot: 3, wrap: 1, flags: 2 })
  })
})

describe('raw access', () => {
  test('descriptors as no driver writes them', () => {
    const { driver, device, kicks } = make(8)
    device.wish(1)
    driver.issueRaw([
      { address: 2n ** 64n - 1n, length: 0xffff_ffff, id: 7, flags: NEXT | WRITE | 0x38 },
      { address: 1, length: 0, id: 5, flags: 0 },
    ])
    expect(device.pop()).toEqual([])
    driver.publishRaw()
    expect(kicks()).toBe(1)
    expect(driver.readDescriptor(0)).toEqual({
      address: 2n ** 64n - 1n,
      length: 0xffff_ffff,
      id: 7,
      flags: NEXT | WRITE | 0x38 | AVAIL,
    })
    const [popped] = device.pop() as [Popped]
    expect([popped.id, popped.slots, driver.inFlight]).toEqual([5, 2, 1])
    device.use(popped, 0)
    expect(driver.pop()).toBe(5)
    expect([driver.availableSlot, driver.usedSlot]).toEqual([2, 2])
  })

  test('AVAIL in the flags turns its meaning round', () => {
    const { driver, device } = make(8)
    driver.issueRaw([{ address: 0, length: 1, id: 0, flags: AVAIL }])
    driver.publishRaw()
    expect(device.pop()).toEqual([])
    expect(driver.readDescriptor(0).flags).toBe(0)
    driver.writeDescriptor(0, 0, 1, 3, driver.availFlags(1))
    expect(device.pop()).toMatchObject([{ id: 3 }])
  })
})

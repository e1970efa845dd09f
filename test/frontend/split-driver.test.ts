/** The driver half of the split ring against a device of a few lines, on plain buffers. */
import { describe, expect, test } from 'vitest'
import type { Segment } from '../../src/frontend/driver.ts'
import { needEvent, SplitDriver, splitRingBytes, writeTable } from '../../src/frontend/split-driver.ts'

/** The other half: pops everything that is available and uses it, in the order asked for. */
class TinyDevice {
  readonly view: DataView
  readonly #size: number
  readonly #avail: number
  readonly #used: number
  seen: number
  used: number

  constructor(buffer: SharedArrayBuffer, size: number, base: number) {
    this.view = new DataView(buffer)
    this.#size = size
    this.#avail = 16 * size
    this.#used = usedOffset(size)
    this.seen = this.used = base
  }

  /** Chains (as lists of descriptors) that the driver made available. */
  pop(): { head: number; chain: { address: number; length: number; flags: number }[] }[] {
    const out: { head: number; chain: { address: number; length: number; flags: number }[] }[] = []
    while (this.seen !== this.view.getUint16(this.#avail + 2, true)) {
      const head = this.view.getUint16(this.#avail + 4 + 2 * (this.seen % this.#size), true)
      const chain: { address: number; length: number; flags: number }[] = []
      for (let index = head; ; index = this.view.getUint16(16 * index + 14, true)) {
        const flags = this.view.getUint16(16 * index + 12, true)
        chain.push({
          address: Number(this.view.getBigUint64(16 * index, true)),
          length: this.view.getUint32(16 * index + 8, true),
          flags,
        })
        if ((flags & 1) === 0) break
      }
      out.push({ head, chain })
      this.seen = (this.seen + 1) & 0xffff
    }
    return out
  }

  use(head: number, written: number): void {
    const at = this.#used + 4 + 8 * (this.used % this.#size)
    this.view.setUint32(at, head, true)
    this.view.setUint32(at + 4, written, true)
    this.used = (this.used + 1) & 0xffff
    this.view.setUint16(this.#used + 2, this.used, true)
  }

  set flags(value: number) {
    this.view.setUint16(this.#used, value, true)
  }
  set availEvent(value: number) {
    this.view.setUint16(this.#used + 4 + 8 * this.#size, value, true)
  }
  get driverFlags(): number {
    return this.view.getUint16(this.#avail, true)
  }
  get usedEvent(): number {
    return this.view.getUint16(this.#avail + 4 + 2 * this.#size, true)
  }
}

function usedOffset(size: number): number {
  return Math.ceil((16 * size + splitRingBytes(size).available) / 4) * 4
}

function make(
  size: number,
  options: { eventIdx?: boolean; base?: number; inOrder?: boolean } = {}
): { driver: SplitDriver; device: TinyDevice; kicks: () => number } {
  const buffer = new SharedArrayBuffer(Math.ceil((usedOffset(size) + splitRingBytes(size).used) / 8) * 8)
  let kicks = 0
  const driver = new SplitDriver({
    size,
    areas: {
      descriptors: { buffer, offset: 0 },
      available: { buffer, offset: 16 * size },
      used: { buffer, offset: usedOffset(size) },
    },
    eventIdx: options.eventIdx ?? false,
    inOrder: options.inOrder ?? false,
    kick: () => kicks++,
    base: options.base ?? 0,
  })
  return { driver, device: new TinyDevice(buffer, size, options.base ?? 0), kicks: () => kicks }
}

const segments: Segment[] = [
  { address: 0x1_2345_6780, length: 16, writable: false },
  { address: 2 ** 40 + 4096, length: 4096, writable: true },
  { address: 77, length: 1, writable: true },
]

describe('chains', () => {
  test('reach the device as they were built, above 4 GiB too', () => {
    const { driver, device } = make(8)
    const head = driver.build(segments)
    driver.issue(head)
    driver.publish()
    expect(device.pop()).toEqual([
      {
        head,
        chain: [
          { address: 0x1_2345_6780, length: 16, flags: 1 },
          { address: 2 ** 40 + 4096, length: 4096, flags: 3 },
          { address: 77, length: 1, flags: 2 },
        ],
      },
    ])
  })

  test('descriptors run out and come back, whatever the order of completion', () => {
    const { driver, device } = make(16)
    for (let round = 0; round < 50; round++) {
      const heads: number[] = []
      for (let head = driver.build(segments); head >= 0; head = driver.build(segments)) {
        heads.push(head)
        driver.issue(head)
      }
      expect(heads).toHaveLength(5)
      expect(driver.freeDescriptors).toBe(1)
      driver.publish()
      const popped = device.pop()
      expect(popped.map((one) => one.head)).toEqual(heads)
      expect(popped.every((one) => one.chain.length === 3)).toBe(true)
      for (const one of round % 2 === 0 ? popped.reverse() : popped) device.use(one.head, one.head + 1)
      for (let head = driver.pop(); head >= 0; head = driver.pop()) {
        expect(driver.written).toBe(head + 1)
        driver.release(head)
      }
      expect(driver.freeDescriptors).toBe(16)
    }
  })

  test('an indirect table takes one descriptor', () => {
    const { driver, device } = make(4)
    const bytes = new Uint8Array(48)
    const head = driver.build(segments, { gpa: 0x9000, bytes })
    driver.issue(head)
    driver.publish()
    expect(device.pop()[0]?.chain).toEqual([{ address: 0x9000, length: 48, flags: 4 }])
    const expected = new Uint8Array(48)
    writeTable({ gpa: 0, bytes: expected }, segments)
    expect(bytes).toEqual(expected)
    expect(driver.freeDescriptors).toBe(3)
    driver.setWritable(head, 1, false)
    expect(new DataView(bytes.buffer).getUint16(16 + 12, true)).toBe(1)
  })

  test('an address of 64 bits is written whole', () => {
    const { driver, device } = make(2)
    driver.writeDescriptor(1, 2n ** 64n - 1n, 5, 2, 0)
    expect(device.view.getBigUint64(16, true)).toBe(2n ** 64n - 1n)
  })
})

describe('indices', () => {
  test.each([0, 65530, 65535])('from %i over the wrap, nothing is lost', (base) => {
    const { driver, device } = make(4, { base })
    const head = driver.build(segments.slice(0, 1))
    for (let i = 0; i < 70_000; i++) {
      driver.issue(head)
      driver.publish()
      for (const one of device.pop()) device.use(one.head, 1)
      expect(driver.pop() === head || i).toBe(true)
    }
    expect(driver.base).toBe((base + 70_000) & 0xffff)
    expect(driver.counters).toMatchObject({ issued: 70_000, completed: 70_000 })
  })

  test('a ring of 32768 can be full', () => {
    const { driver, device } = make(32768)
    for (let i = 0; i < 32768; i++) driver.issue(driver.build(segments.slice(2)))
    expect(driver.build(segments.slice(2))).toBe(-1)
    driver.publish()
    for (const one of device.pop()) device.use(one.head, 1)
    let count = 0
    while (driver.pop() >= 0) count++
    expect(count).toBe(32768)
  })

  test.each([0, 3, 65536])('size %i is refused', (size) => {
    expect(() => make(size)).toThrow(RangeError)
  })
})

describe('IN_ORDER', () => {
  const shapes = [1, 2, 3, 1, 2, 1].map((count) => segments.slice(3 - count))

  /** The device uses chains up to and including this one by one element (virtio 1.3 §2.7.9). */
  const useBatch = (device: TinyDevice, head: number, chains: number, written: number): void => {
    device.use(head, written)
    device.used = (device.used + chains - 1) & 0xffff
    device.view.setUint16(usedOffset(16) + 2, device.used, true)
  }

  test('descriptors lie in the order of the table, and chains go over its end', () => {
    const { driver, device } = make(16, { inOrder: true })
    let place = 0
    for (let round = 0; round < 40; round++) {
      const chains = shapes.map((shape) => driver.build(shape))
      for (const chain of chains.toReversed()) driver.issue(chain)
      driver.publish()
      for (const { head, chain } of device.pop()) {
        expect(head).toBe(place)
        for (let i = 0; i < chain.length; i++) {
          const at = (place + i) % 16
          if (i + 1 < chain.length) expect(device.view.getUint16(16 * at + 14, true)).toBe((at + 1) % 16)
        }
        place = (place + chain.length) % 16
        device.use(head, 3)
      }
      for (const chain of chains.toReversed()) {
        expect([driver.pop(), driver.written]).toEqual([chain, 3])
        driver.release(chain)
      }
    }
    expect(driver.freeDescriptors).toBe(16)
  })

  test('one used element may stand for several chains', () => {
    const { driver, device } = make(16, { inOrder: true, base: 65530 })
    for (let round = 0; round < 10; round++) {
      const chains = shapes.map((shape) => driver.build(shape))
      for (const chain of chains) driver.issue(chain)
      driver.publish()
      const heads = device.pop().map(({ head }) => head)
      useBatch(device, heads[0] as number, 1, 9)
      useBatch(device, heads[3] as number, 3, 5)
      expect(driver.pending()).toBe(4)
      const got: number[][] = []
      for (let chain = driver.pop(); chain >= 0; chain = driver.pop()) got.push([chain, driver.written])
      useBatch(device, heads[5] as number, 2, 7)
      for (let chain = driver.pop(); chain >= 0; chain = driver.pop()) got.push([chain, driver.written])
      // Those without an element of their own were used completely.
      const written = [9, 4097, 4097, 5, 4097, 7]
      expect(got).toEqual(chains.map((chain, i) => [chain, written[i]]))
      for (const chain of chains) driver.release(chain)
    }
  })

  test('a device that uses the second chain first is found out', () => {
    const { driver, device } = make(16, { inOrder: true })
    for (let i = 0; i < 3; i++) driver.issue(driver.build(segments))
    driver.publish()
    const [, second] = device.pop()
    device.use(second?.head as number, 1)
    expect(() => driver.pop()).toThrow(/out of order: 1 before it/)
  })

  test('directions and indirect tables', () => {
    const { driver, device } = make(16, { inOrder: true })
    const chain = driver.build(segments)
    const bytes = new Uint8Array(48)
    const indirect = driver.build(segments, { gpa: 0x9000, bytes })
    driver.setWritable(chain, 1, false)
    for (const one of [chain, indirect]) driver.issue(one)
    driver.publish()
    const popped = device.pop()
    expect(popped[0]?.chain.map(({ flags }) => flags)).toEqual([1, 1, 2])
    expect(popped[1]?.chain).toEqual([{ address: 0x9000, length: 48, flags: 4 }])
  })
})

describe('a reset', () => {
  test.each([false, true])('forgets everything (in order: %s)', (inOrder) => {
    const { driver, device } = make(8, { inOrder })
    for (let i = 0; i < 2; i++) driver.issue(driver.build(segments))
    driver.publish()
    driver.reset(65534)
    device.seen = device.used = 65534
    expect([driver.base, driver.inFlight, driver.freeDescriptors, driver.usedIndex]).toEqual([65534, 0, 8, 65534])
    const chain = driver.build(segments)
    for (let i = 0; i < 4; i++) {
      driver.issue(chain)
      driver.publish()
      const popped = device.pop()
      expect(popped).toHaveLength(1)
      device.use(popped[0]?.head as number, 1)
      expect(driver.pop()).toBe(chain)
    }
  })
})

describe('a device that lies', () => {
  test('a chain that it does not have', () => {
    const { driver, device } = make(8)
    driver.issue(driver.build(segments))
    driver.publish()
    device.use(5, 0)
    expect(() => driver.pop()).toThrow(/chain 5/)
  })

  test('a chain used twice', () => {
    const { driver, device } = make(8)
    const [a, b] = [driver.build(segments), driver.build(segments)]
    driver.issue(a)
    driver.issue(b)
    driver.publish()
    device.use(a, 0)
    device.use(a, 0)
    expect(driver.pop()).toBe(a)
    expect(() => driver.pop()).toThrow(/doesn't have/)
  })

  test('a used index that jumps', () => {
    const { driver, device } = make(8)
    const head = driver.build(segments)
    driver.issue(head)
    driver.publish()
    for (let i = 0; i < 2; i++) device.use(head, 0)
    expect(() => driver.pop()).toThrow(/used index ran/)
  })
})

describe('notifications', () => {
  test('flags: the device turns kicks off, the driver turns calls off', () => {
    const { driver, device, kicks } = make(8)
    const head = driver.build(segments)
    driver.issue(head)
    expect(driver.publish()).toBe(true)
    device.flags = 1
    device.use(head, 0)
    driver.pop()
    driver.issue(head)
    expect(driver.publish()).toBe(false)
    expect(kicks()).toBe(1)
    driver.disableCalls()
    expect(device.driverFlags).toBe(1)
    expect(driver.enableCalls()).toBe(false)
    expect(device.driverFlags).toBe(0)
    device.use(head, 0)
    expect(driver.enableCalls()).toBe(true)
  })

  test('EVENT_IDX: kicks go by avail_event, calls by used_event', () => {
    const { driver, device, kicks } = make(8, { eventIdx: true, base: 65534 })
    const heads = [0, 1, 2, 3].map(() => driver.build(segments.slice(0, 1)))
    device.availEvent = 0 // wants a kick when index 0 (the third chain) is passed
    for (const [i, head] of heads.entries()) {
      driver.issue(head)
      expect(driver.publish()).toBe(i === 2)
    }
    expect(kicks()).toBe(1)
    driver.enableCalls()
    expect(device.usedEvent).toBe(65534)
    driver.disableCalls()
    expect(needEvent(device.usedEvent, 65535, 65534)).toBe(false)
  })

  test('EVENT_IDX: a polling driver is never called, over many wraps', () => {
    const { driver, device } = make(8, { eventIdx: true })
    driver.disableCalls()
    const head = driver.build(segments)
    let calls = 0
    for (let i = 0; i < 200_000; i++) {
      driver.issue(head)
      driver.publish()
      device.pop()
      const before = device.used
      device.use(head, 0)
      if (needEvent(device.usedEvent, device.used, before)) calls++
      driver.pop()
    }
    expect(calls).toBe(0)
  })

  test.each([
    [5, 6, 5, true],
    [5, 5, 4, false],
    [5, 10, 6, false],
    [65535, 0, 65535, true],
    [0, 1, 65530, true],
    [10, 5, 65530, false],
  ])('needEvent(%i, %i, %i) is %s', (event, next, previous, wanted) => {
    expect(needEvent(event, next, previous)).toBe(wanted)
  })
})

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
  options: { eventIdx?: boolean; base?: number } = {}
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

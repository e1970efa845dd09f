/** The dirty log: which pages `push`, `publish`, `suppress` and `rearm` mark, and when. */
import { describe, expect, test } from 'vitest'
import { DirtyLog } from '../../src/virtio/dirty-log.ts'
import { both, FORMATS, type Format } from './both-rings.ts'
import { WRITE } from './packed-driver.ts'

const PAGE = 4096
/** A page of the log for writes to the ring that no page of memory has. */
const RING = 1000 * PAGE

function logged(format: Format, options: { ring?: number; eventIdx?: boolean; inOrder?: boolean; size?: number } = {}) {
  const { ring = -1, ...rest } = options
  const made = both(format, rest)
  const bits = new Uint8Array(1024)
  const log = new DirtyLog(bits)
  made.ring.setLog(log, ring)
  /** The pages that were marked since the last time. */
  const marks = () => {
    const pages: number[] = []
    for (let page = 0; page < bits.length * 8; page++)
      if ((bits[page >> 3]! & (1 << (page & 7))) !== 0) pages.push(page)
    bits.fill(0)
    return pages
  }
  return { ...made, log, marks, page: made.data / PAGE }
}

describe.each(FORMATS)('data on a %s ring', (format) => {
  test('is marked at push, the writable part up to what was touched', () => {
    const { ring, driver, data, marks, page } = logged(format)
    const parts = [
      { gpa: data, length: 2 * PAGE },
      { gpa: data + 3 * PAGE - 1, length: 2, flags: WRITE },
      { gpa: data + 5 * PAGE, length: PAGE, flags: WRITE },
      { gpa: data + 7 * PAGE, length: 1, flags: WRITE },
    ]
    const cases: [touched: number, pages: number[]][] = [
      [0, []],
      [1, [2]],
      [2, [2, 3]],
      [3, [2, 3, 5]],
      [2 + PAGE, [2, 3, 5]],
      [3 + PAGE, [2, 3, 5, 7]],
      [0xffff_ffff, [2, 3, 5, 7]],
    ]
    for (const [touched, pages] of cases) {
      driver.offer(0, ...parts)
      const chain = ring.pop()!
      expect(marks()).toEqual([])
      // How much was written is the driver's business: a status byte at the end is touched and not counted.
      ring.push(chain, 0, touched)
      expect(marks(), `${touched} bytes`).toEqual(pages.map((n) => page + n))
      ring.publish()
      expect(marks()).toEqual([])
      driver.takeUsed()
    }
  })

  test('is marked at push also when IN_ORDER holds the completion', () => {
    const { ring, driver, data, marks, page } = logged(format, { inOrder: true, ring: RING })
    driver.offer(0, { gpa: data, length: 1, flags: WRITE })
    driver.offer(1, { gpa: data + PAGE, length: 1, flags: WRITE })
    const first = ring.pop()!
    ring.push(ring.pop()!, 1, 1)
    expect(marks()).toEqual([page + 1])
    ring.publish()
    expect(marks()).toEqual([])
    ring.push(first, 1, 1)
    ring.publish()
    const all = marks()
    expect(all).toContain(page)
    expect(all).toContain(RING / PAGE)
  })

  test('without a log nothing, and no more after it was taken away', () => {
    const { ring, driver, data, marks } = logged(format, { ring: RING })
    ring.setLog(undefined, -1)
    driver.offer(0, { gpa: data, length: 1, flags: WRITE })
    ring.push(ring.pop()!, 1, 1)
    ring.publish()
    ring.suppress()
    ring.rearm()
    expect(marks()).toEqual([])
  })

  test('the log that is there at the time of push counts', () => {
    const { ring, driver, data, marks, log, page } = logged(format)
    ring.setLog(undefined, -1)
    driver.offer(0, { gpa: data, length: 1, flags: WRITE })
    const chain = ring.pop()!
    ring.setLog(log, -1)
    ring.push(chain, 1, 1)
    expect(marks()).toEqual([page])
  })

  test('without a ring address writes to the ring are not marked', () => {
    for (const eventIdx of [false, true]) {
      const { ring, driver, data, marks } = logged(format, { eventIdx })
      driver.offer(0, { gpa: data, length: 1 })
      ring.suppress()
      ring.push(ring.pop()!, 0, 0)
      ring.publish()
      ring.rearm()
      expect(marks()).toEqual([])
    }
  })
})

describe('the used ring of a split ring', () => {
  // 4 + 8 * 1024 bytes: element i is on the page of its byte 4 + 8 * i.
  const size = 1024

  test('element and idx are marked when they are written, relative to the address in the log', () => {
    const { ring, driver, data, marks } = logged('split', { ring: RING, size })
    const serve = () => {
      driver.offer(0, { gpa: data, length: 1 })
      ring.push(ring.pop()!, 0, 0)
      const element = marks()
      ring.publish()
      driver.takeUsed()
      return [element, marks()]
    }
    const base = RING / PAGE
    for (let i = 0; i < size; i++) {
      const first = Math.floor((4 + 8 * i) / PAGE)
      const last = Math.floor((4 + 8 * i + 7) / PAGE)
      expect(serve(), `element ${i}`).toEqual([first === last ? [base + first] : [base + first, base + last], [base]])
    }
  })

  test('flags, and avail_event at its end', () => {
    const plain = logged('split', { ring: RING, size })
    plain.ring.suppress()
    expect(plain.marks()).toEqual([RING / PAGE])
    plain.ring.rearm()
    expect(plain.marks()).toEqual([RING / PAGE])
    const event = logged('split', { ring: RING, size, eventIdx: true })
    event.ring.suppress()
    expect(event.marks()).toEqual([])
    event.ring.rearm()
    expect(event.marks()).toEqual([RING / PAGE + 2])
  })
})

describe('a packed ring', () => {
  const size = 1024

  test('used descriptors are marked where they lie and where the front-end says, when they are complete', () => {
    const { ring, driver, data, marks, layout } = logged('packed', { ring: RING, size })
    const both = (index: number) => {
      const page = Math.floor((16 * index) / PAGE)
      return [layout.descriptor / PAGE + page, RING / PAGE + page]
    }
    for (let at = 0; at < 2 * size; at += 3) {
      driver.offer(0, { gpa: data, length: 1 })
      driver.offer(1, { gpa: data, length: 1 }, { gpa: data, length: 1 })
      const [first, second] = [ring.pop()!, ring.pop()!]
      ring.push(first, 0, 0)
      expect(marks()).toEqual([])
      ring.push(second, 0, 0)
      expect(marks()).toEqual(both((at + 1) % size))
      ring.publish()
      expect(marks()).toEqual(both(at % size))
      driver.takeUsed()
    }
  })

  test('only once when that is the same', () => {
    const { ring, driver, data, marks } = logged('packed', { ring: 0, size })
    driver.offer(0, { gpa: data, length: 1 })
    ring.push(ring.pop()!, 0, 0)
    ring.publish()
    expect(marks()).toEqual([0])
  })

  test('the device’s event suppression structure is marked where it lies', () => {
    for (const eventIdx of [false, true]) {
      const { ring, marks, layout } = logged('packed', { ring: RING, eventIdx })
      ring.suppress()
      expect(marks()).toEqual([layout.device / PAGE])
      ring.rearm()
      expect(marks()).toEqual([layout.device / PAGE])
    }
  })
})

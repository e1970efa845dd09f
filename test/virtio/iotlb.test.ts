import { describe, expect, test } from 'vitest'
import { Iotlb } from '../../src/virtio/iotlb.ts'
import { type GuestMemory, IOTLB_READ, IOTLB_WRITE, type RegionDescription } from '../../src/virtio/memory.ts'
import { random } from './store-trap.ts'

const PAGE = 4096
const PAGES = 64
/** Two mappings of guest memory: at 1 and 2 GiB in this process, at GPA 4 and 8 GiB. */
const BUFFERS = [new SharedArrayBuffer(PAGES * PAGE), new SharedArrayBuffer(PAGES * PAGE)]
const HVA = [2 ** 30, 2 ** 31]
const GPA = [2 ** 32, 2 ** 33]

/** IOVA pages from `iova` on, over the pages from `page` on of a mapping. */
function entry(
  iova: number,
  page: number,
  pages = 1,
  mapping = 0,
  access = IOTLB_READ | IOTLB_WRITE
): RegionDescription {
  return {
    gpa: iova * PAGE,
    size: pages * PAGE,
    hva: HVA[mapping]! + page * PAGE,
    buffer: BUFFERS[mapping]!,
    offset: page * PAGE,
    physical: GPA[mapping]! + page * PAGE,
    access,
  }
}

/** Regions as [iova, pages, first page of its mapping]. */
function shape(memory: GuestMemory): number[][] {
  return memory.regions.map(({ gpa, size, start }) => [gpa / PAGE, size / PAGE, start / PAGE])
}

describe('Iotlb', () => {
  test('knows nothing at first', () => {
    const memory = new Iotlb().memory()
    expect([memory.translated, memory.regions]).toEqual([true, []])
  })

  test('an entry says where the address is in this process, in the buffer and in the guest', () => {
    const iotlb = new Iotlb()
    iotlb.update(entry(100, 5, 2, 1, IOTLB_READ))
    const [region] = iotlb.memory().regions
    expect(region).toMatchObject({
      gpa: 100 * PAGE,
      end: 102 * PAGE,
      hva: HVA[1]! + 5 * PAGE,
      start: 5 * PAGE,
      physical: GPA[1]! + 5 * PAGE,
      access: IOTLB_READ,
    })
    region!.bytes[0] = 77
    expect(new Uint8Array(BUFFERS[1]!)[5 * PAGE]).toBe(77)
    expect(iotlb.memory().find(100 * PAGE)).toBe(0)
    expect(iotlb.memory().find(102 * PAGE)).toBe(-1)
  })

  test('entries that continue each other are one, in whatever order they come', () => {
    for (const order of [
      [0, 1, 2, 3],
      [3, 2, 1, 0],
      [0, 2, 3, 1],
      [1, 3, 0, 2],
    ]) {
      const iotlb = new Iotlb()
      for (const page of order) iotlb.update(entry(10 + page, 20 + page))
      expect(shape(iotlb.memory())).toEqual([[10, 4, 20]])
      expect(iotlb.memory().contiguous(10 * PAGE, 4 * PAGE)).toBe(iotlb.memory().regions[0])
    }
  })

  test('also when the buffers are two objects of one memory, as they are after two messages', () => {
    const iotlb = new Iotlb()
    iotlb.update(entry(10, 20))
    iotlb.update(structuredClone(entry(11, 21)))
    expect(iotlb.memory().regions[0]!.buffer).not.toBe(structuredClone(BUFFERS[0]))
    expect(shape(iotlb.memory())).toEqual([[10, 2, 20]])
  })

  test.each([
    ['address', entry(12, 21)],
    ['page', entry(11, 22)],
    ['mapping', entry(11, 21, 1, 1)],
    ['access', entry(11, 21, 1, 0, IOTLB_READ)],
    ['physical address', { ...entry(11, 21), physical: 0 }],
  ])('but not when they differ in %s', (_, other) => {
    const iotlb = new Iotlb()
    iotlb.update(entry(10, 20))
    iotlb.update(other)
    expect(iotlb.memory().regions.length).toBe(2)
  })

  test('an update replaces what its range had, and leaves what is beside it', () => {
    const iotlb = new Iotlb()
    iotlb.update(entry(10, 0, 10))
    iotlb.update(entry(13, 40, 2))
    expect(shape(iotlb.memory())).toEqual([
      [10, 3, 0],
      [13, 2, 40],
      [15, 5, 5],
    ])
    iotlb.update(entry(12, 50, 4, 1))
    expect(shape(iotlb.memory())).toEqual([
      [10, 2, 0],
      [12, 4, 50],
      [16, 4, 6],
    ])
    iotlb.update(entry(0, 30, 30))
    expect(shape(iotlb.memory())).toEqual([[0, 30, 30]])
  })

  test('the same entry again changes nothing, with another access it does', () => {
    const iotlb = new Iotlb()
    iotlb.update(entry(10, 0, 4))
    iotlb.update(entry(11, 1))
    expect(shape(iotlb.memory())).toEqual([[10, 4, 0]])
    iotlb.update(entry(11, 1, 1, 0, IOTLB_WRITE))
    expect(iotlb.memory().regions.map(({ access }) => access)).toEqual([3, 2, 3])
  })

  test.each([
    ['all', 0, 2 ** 53, []],
    ['all that can be said', 0, 2 ** 64, []],
    [
      'the middle',
      12,
      2,
      [
        [10, 2, 0],
        [14, 6, 4],
      ],
    ],
    ['the beginning', 8, 4, [[12, 8, 2]]],
    ['the end', 18, 8, [[10, 8, 0]]],
    ['exactly it', 10, 10, []],
    ['what is before it', 0, 10, [[10, 10, 0]]],
    ['what is behind it', 20, 10, [[10, 10, 0]]],
    ['nothing inside it', 15, 0, [[10, 10, 0]]],
  ])('invalidate of %s', (_, iova, pages, left) => {
    const iotlb = new Iotlb()
    iotlb.update(entry(10, 0, 10))
    iotlb.invalidate(iova * PAGE, pages * PAGE)
    expect(shape(iotlb.memory())).toEqual(left)
  })

  test('a snapshot stays as it is, and is the same until something changes', () => {
    const iotlb = new Iotlb()
    iotlb.update(entry(10, 0, 10))
    const before = iotlb.memory()
    expect(iotlb.memory()).toBe(before)
    iotlb.invalidate(0, PAGE)
    expect(iotlb.memory()).toBe(before)
    iotlb.update(entry(30, 30))
    const after = iotlb.memory()
    expect(after).not.toBe(before)
    expect(after.regions[0]).toBe(before.regions[0])
    iotlb.invalidate(0, 100 * PAGE)
    expect(shape(before)).toEqual([[10, 10, 0]])
    expect(shape(after)).toEqual([
      [10, 10, 0],
      [30, 1, 30],
    ])
  })

  test('the oldest goes when there are too many, also for a split', () => {
    const iotlb = new Iotlb(3)
    for (const iova of [40, 20, 10]) iotlb.update(entry(iova, iova, 3))
    iotlb.update(entry(30, 30))
    expect(iotlb.memory().regions.map(({ gpa }) => gpa / PAGE)).toEqual([10, 20, 30])
    iotlb.invalidate(21 * PAGE, PAGE)
    expect(shape(iotlb.memory())).toEqual([
      [20, 1, 20],
      [22, 1, 22],
      [30, 1, 30],
    ])
    for (let i = 0; i < 20; i++) {
      // Renewed, so it is young.
      iotlb.update(entry(5, 5))
      iotlb.update(entry(50 - 2 * i, 0))
      expect(iotlb.memory().regions.length).toBe(3)
      expect(iotlb.memory().find(5 * PAGE)).toBe(0)
    }
  })

  // A front-end with 509 regions does this with a few hundred messages. One by one it took half a minute.
  test('more than there is room for, in the middle: the old ones go many at a time', { timeout: 10_000 }, () => {
    const iotlb = new Iotlb(65536)
    for (let i = 0; i < 65536; i++) iotlb.update(entry(4 * i, i % PAGES))
    for (let i = 0; i < 60_000; i++) {
      iotlb.update(entry(4 * 65536 + 4 * i, i % PAGES))
      if (i % 500 === 0) iotlb.memory()
    }
    const { regions } = iotlb.memory()
    expect(regions.length).toBeLessThanOrEqual(65536)
    expect(regions.length).toBeGreaterThan(65536 - 4097)
    expect(regions.at(-1)?.gpa).toBe((4 * 65536 + 4 * 59_999) * PAGE)
    // The youngest are all there.
    expect(regions[0]?.gpa).toBe((4 * 65536 + 4 * (60_000 - regions.length)) * PAGE)
  })

  test('thousands of scattered pages', () => {
    const iotlb = new Iotlb()
    for (let i = 0; i < 20_000; i++) iotlb.update(entry(((i * 7919) % 20_000) * 2, i % PAGES))
    const memory = iotlb.memory()
    expect(memory.regions.length).toBe(20_000)
    for (let i = 0; i < 20_000; i++) {
      const region = memory.regions[memory.find(((i * 7919) % 20_000) * 2 * PAGE)]!
      expect(region.start).toBe((i % PAGES) * PAGE)
    }
  })

  test.each([1, 2, 3, 4, 5, 6])('random updates and invalidations, page by page (seed %i)', (seed) => {
    const pick = random(seed)
    const iotlb = new Iotlb()
    /** Per IOVA page: what it is translated to. */
    const pages = new Map<number, { hva: number; access: number }>()
    for (let round = 0; round < 400; round++) {
      const iova = pick(60)
      const count = 1 + pick(8)
      if (pick(3) === 0) {
        iotlb.invalidate(iova * PAGE, count * PAGE)
        for (let i = 0; i < count; i++) pages.delete(iova + i)
      } else {
        const access = 1 + pick(3)
        const mapping = pick(2)
        // Often the page that continues its neighbours.
        const page = pick(2) === 0 ? Math.min(iova, PAGES - count) : pick(PAGES - count)
        iotlb.update(entry(iova, page, count, mapping, access))
        for (let i = 0; i < count; i++) pages.set(iova + i, { hva: HVA[mapping]! + (page + i) * PAGE, access })
      }
      const memory = iotlb.memory()
      for (let page = 0; page < 70; page++) {
        const region = memory.regions[memory.find(page * PAGE)]
        const found = region && { hva: region.hva + page * PAGE - region.gpa, access: region.access }
        expect(found).toEqual(pages.get(page))
        if (region === undefined) continue
        // The other ways to say where it is agree.
        const mapping = HVA.findLastIndex((hva) => hva <= region.hva)
        expect([region.start, region.physical]).toEqual([
          region.hva - HVA[mapping]!,
          region.hva - HVA[mapping]! + GPA[mapping]!,
        ])
      }
      memory.regions.forEach((region, i) => {
        const before = memory.regions[i - 1]
        if (before === undefined) return
        expect(before.end).toBeLessThanOrEqual(region.gpa)
        // No two that could be one.
        const touches = before.end === region.gpa && before.hva + before.size === region.hva
        expect(touches && before.access === region.access).toBe(false)
      })
    }
  })
})

/** Rings behind a vIOMMU: addresses are IOVAs, what the IOTLB doesn't have is a miss, and nothing is lost meanwhile. */
import { describe, expect, test } from 'vitest'
import { DirtyLog } from '../../src/virtio/dirty-log.ts'
import { inflightSize, PackedInflight, SplitInflight } from '../../src/virtio/inflight.ts'
import { GuestMemory, IOTLB_READ, IOTLB_WRITE } from '../../src/virtio/memory.ts'
import { type BothSetup, driverOf, FORMATS, type Format, layoutOf, makeRing, newBase } from './both-rings.ts'
import { segments } from './mock-driver.ts'
import { INDIRECT, random, WRITE } from './packed-driver.ts'

const PAGE = 4096
/**
 * The IOVA of byte 0 of the buffer; its guest-physical address. Neither is the other, so that they can't be confused.
 */
const IOVA = 0x7_0000_0000
const PHYSICAL = 0x100_0000
const BOTH = IOTLB_READ | IOTLB_WRITE

const PARTS = ['descriptor', 'driver', 'device'] as const

/** What each part is used for. */
const NEEDS: Record<Format, Record<(typeof PARTS)[number], number>> = {
  split: { descriptor: IOTLB_READ, driver: IOTLB_READ, device: BOTH },
  packed: { descriptor: BOTH, driver: IOTLB_READ, device: IOTLB_WRITE },
}

function iommu(format: Format, options: BothSetup & { mapped?: boolean; pages?: number } = {}) {
  const { size = 8, eventIdx = false, inOrder = false, inflight, mapped = true, pages = 16 } = options
  const layout = layoutOf(format, size)
  const buffer = new SharedArrayBuffer(layout.end + pages * PAGE)
  const driver = driverOf(format, buffer, layout)
  /** By page of the buffer. */
  const entries = new Map<number, number>()
  const memory = () =>
    new GuestMemory(
      [...entries].map(([page, access]) => ({
        gpa: IOVA + page * PAGE,
        size: PAGE,
        hva: 0,
        buffer,
        offset: page * PAGE,
        physical: PHYSICAL + page * PAGE,
        access,
      })),
      true
    )
  const all = buffer.byteLength / PAGE
  if (mapped) for (let page = 0; page < all; page++) entries.set(page, BOTH)
  const config = {
    size,
    descriptor: IOVA + layout.descriptor,
    driver: IOVA + layout.driver,
    device: IOVA + layout.device,
    base: newBase(format),
    eventIdx,
    indirect: true,
    packed: format === 'packed',
    inOrder,
  }
  const ring = makeRing(memory(), config, inflight)
  const map = (address: number, access = BOTH) => {
    entries.set(Math.floor((address - IOVA) / PAGE), access)
    ring.setMemory(memory())
  }
  const unmap = (address: number) => {
    entries.delete(Math.floor((address - IOVA) / PAGE))
    ring.setMemory(memory())
  }
  const miss = () => [ring.missAddress, ring.missAccess]
  const view = new DataView(buffer)
  return { ring, driver, config, layout, buffer, view, entries, memory, map, unmap, miss, data: IOVA + layout.end }
}

const NONE = [-1, 0]

describe.each(FORMATS)('buffers of a %s ring', (format) => {
  test('a missing page is a miss, not an error; the chain comes when it is there', () => {
    const { ring, driver, data, map, unmap, miss } = iommu(format)
    unmap(data + PAGE)
    driver.offer(0, { gpa: data + PAGE + 100, length: 10 })
    expect(ring.hasAvail()).toBe(true)
    const base = ring.base
    expect([ring.pop(), ring.error, ...miss()]).toEqual([undefined, undefined, data + PAGE + 100, IOTLB_READ])
    expect([ring.hasAvail(), ring.pop(), ring.rearm(), ring.base]).toEqual([false, undefined, false, base])
    map(data + PAGE)
    expect([...miss(), ring.hasAvail()]).toEqual([...NONE, true])
    const chain = ring.pop()!
    expect(segments(chain)).toEqual([[data + PAGE + 100, 10]])
    ring.push(chain, 0, 0)
    ring.publish()
    expect(driver.takeUsed()).toEqual([{ id: 0, length: 0 }])
  })

  test('a buffer over several entries is told page by page and becomes as many segments', () => {
    const { ring, driver, data, map, unmap, miss } = iommu(format)
    for (const page of [1, 2, 3]) unmap(data + page * PAGE)
    driver.offer(0, { gpa: data, length: 1 }, { gpa: data + 10, length: 3 * PAGE, flags: WRITE })
    for (const page of [1, 2, 3]) {
      expect([ring.pop(), ...miss()]).toEqual([undefined, data + page * PAGE, IOTLB_WRITE])
      map(data + page * PAGE)
    }
    expect(segments(ring.pop()!)).toEqual([
      [data, 1],
      [data + 10, PAGE - 10],
      [data + PAGE, PAGE],
      [data + 2 * PAGE, PAGE],
      [data + 3 * PAGE, 10],
    ])
  })

  test.each([
    ['reading', 0, IOTLB_WRITE, IOTLB_READ],
    ['writing', WRITE, IOTLB_READ, IOTLB_WRITE],
  ])('an entry that does not allow %s misses it, one that allows only that is enough', (_, flags, has, needs) => {
    for (const length of [10, PAGE + 10]) {
      const { ring, driver, data, map, miss } = iommu(format)
      map(data + PAGE, has)
      driver.offer(0, { gpa: data + PAGE, length, flags })
      expect([ring.pop(), ring.error, ...miss()]).toEqual([undefined, undefined, data + PAGE, needs])
      map(data + PAGE, needs)
      expect(ring.pop()!.readable + ring.chain(0).writable).toBe(length)
    }
  })

  test('the miss is found again when something else was mapped', () => {
    const { ring, driver, data, map, unmap, miss } = iommu(format)
    unmap(data)
    unmap(data + PAGE)
    driver.offer(0, { gpa: data, length: 1 })
    ring.pop()
    map(data + PAGE)
    expect([...miss(), ring.hasAvail(), ring.pop(), ...miss()]).toEqual([...NONE, true, undefined, data, IOTLB_READ])
  })

  test.each([2 ** 53, 2 ** 60, 2 ** 53 - 4])('addresses that no IOMMU has are errors: %d', (gpa) => {
    const { ring, driver } = iommu(format)
    driver.offer(0, { gpa, length: 8 })
    expect([ring.pop(), ring.missAddress, ring.error?.code]).toEqual([undefined, -1, 'ERR_RING_ADDRESS'])
  })

  test('a bad chain is one, with or without translations', () => {
    const { ring, driver, data, unmap } = iommu(format)
    unmap(data)
    driver.offer(0, { gpa: data + PAGE, length: 1, flags: WRITE }, { gpa: data, length: 1 })
    expect([ring.pop(), ring.error?.code]).toEqual([undefined, 'ERR_RING_ORDER'])
  })

  test('what was in flight when its page went is given back as before', () => {
    const { ring, driver, data, unmap } = iommu(format)
    driver.offer(0, { gpa: data, length: 8, flags: WRITE })
    const chain = ring.pop()!
    unmap(data)
    const log = new DirtyLog(new Uint8Array(4096))
    ring.setLog(log, -1)
    ring.push(chain, 8, 8)
    ring.publish()
    expect([log.marked, driver.takeUsed()]).toEqual([true, [{ id: 0, length: 8 }]])
  })

  test('a chain keeps its own regions alone: a table of all per chain would be gigabytes', () => {
    const { ring, driver, data, memory, entries } = iommu(format)
    entries.delete((data - IOVA) / PAGE + 2)
    ring.setMemory(memory())
    for (const head of [0, 1, 0]) {
      driver.offer(
        head,
        { gpa: data + 8, length: 8 },
        { gpa: data + 5 * PAGE - 8, length: 16, flags: WRITE },
        { gpa: data, length: 4, flags: WRITE }
      )
      const chain = ring.pop()!
      expect(segments(chain)).toEqual([
        [data + 8, 8],
        [data + 5 * PAGE - 8, 8],
        [data + 5 * PAGE, 8],
        [data, 4],
      ])
      expect(chain.first).toBe(chain.regions[chain.region[0]!])
      expect(chain.regions.length).toBeLessThanOrEqual(4)
      ring.push(chain, 0, 0)
      ring.publish()
      driver.takeUsed()
      driver.offer(head, { gpa: data + PAGE, length: 8 })
      const single = ring.pop()!
      expect(single).toBe(chain)
      expect(segments(single)).toEqual([[data + PAGE, 8]])
      expect(single.regions.length).toBe(1)
      ring.push(single, 0, 0)
      ring.publish()
      driver.takeUsed()
    }
  })

  test('marks are those of guest-physical pages', () => {
    const { ring, driver, data, layout } = iommu(format)
    const bits = new Uint8Array(8192)
    ring.setLog(new DirtyLog(bits), PHYSICAL + (format === 'split' ? layout.device : layout.descriptor))
    driver.offer(0, { gpa: data + 2 * PAGE, length: 2, flags: WRITE })
    ring.push(ring.pop()!, 1, 1)
    ring.publish()
    ring.rearm()
    const pages: number[] = []
    for (let page = 0; page < bits.length * 8; page++)
      if ((bits[page >> 3]! & (1 << (page & 7))) !== 0) pages.push(page)
    const page = (offset: number) => (PHYSICAL + offset) / PAGE
    const own = format === 'split' ? [page(layout.device)] : [page(layout.descriptor), page(layout.device)]
    expect(pages).toEqual([...own, page(layout.end + 2 * PAGE)])
  })
})

describe.each(FORMATS)('indirect tables of a %s ring', (format) => {
  const table = (made: ReturnType<typeof iommu>, at: number, buffers: readonly number[]) => {
    buffers.forEach((gpa, i) => {
      const offset = at - IOVA + 16 * i
      const last = i === buffers.length - 1
      made.view.setBigUint64(offset, BigInt(gpa), true)
      made.view.setUint32(offset + 8, 4, true)
      if (format === 'split') made.view.setUint32(offset + 12, last ? 0 : 1 | ((i + 1) << 16), true)
    })
    return { gpa: at, length: 16 * buffers.length, flags: INDIRECT }
  }

  test('each page of a table, and each buffer in it, may be missing', () => {
    const made = iommu(format)
    const { ring, driver, data, map, unmap, miss } = made
    const at = data + PAGE - 16
    driver.offer(0, table(made, at, [data + 3 * PAGE, data + 4 * PAGE]))
    for (const page of [0, 1, 3, 4]) unmap(data + page * PAGE)
    const misses = [at, data + 3 * PAGE, data + PAGE, data + 4 * PAGE]
    for (const address of misses) {
      expect([ring.pop(), ring.error, ...miss()]).toEqual([undefined, undefined, address, IOTLB_READ])
      map(address)
    }
    expect(segments(ring.pop()!)).toEqual([
      [data + 3 * PAGE, 4],
      [data + 4 * PAGE, 4],
    ])
  })

  test('a table is read: an entry for writing is not enough', () => {
    const made = iommu(format)
    const { ring, driver, data, map, miss } = made
    driver.offer(0, table(made, data, [data + PAGE]))
    map(data, IOTLB_WRITE)
    expect([ring.pop(), ...miss()]).toEqual([undefined, data, IOTLB_READ])
    map(data, IOTLB_READ)
    expect(ring.pop()!.readable).toBe(4)
  })

  test('an entry of a table across two pages that are not contiguous is no miss', () => {
    const made = iommu(format)
    const { ring, driver, data } = made
    driver.offer(0, table(made, data + PAGE - 8, [data]))
    expect([ring.pop(), ring.error?.code]).toEqual([undefined, 'ERR_RING_INDIRECT'])
  })
})

describe.each(FORMATS)('the parts of a %s ring', (format) => {
  test('are asked for one after the other when none is there at the start', () => {
    const { ring, driver, map, miss, config, layout, data } = iommu(format, { mapped: false })
    for (const part of PARTS) {
      expect([ring.error, ring.hasAvail(), ring.pop()]).toEqual([undefined, false, undefined])
      expect(miss()).toEqual([IOVA + layout[part], NEEDS[format][part]])
      expect([ring.publish(), ring.rearm(), ring.base]).toEqual([false, false, config.base])
      map(IOVA + layout[part])
    }
    map(data)
    expect(miss()).toEqual(NONE)
    driver.offer(0, { gpa: data, length: 1 })
    ring.push(ring.pop()!, 0, 0)
    expect(ring.publish()).toBe(true)
    expect(driver.takeUsed()).toHaveLength(1)
  })

  test.each(PARTS)('%s: needs no more access than it has use for, and all of that', (part) => {
    const { map, miss, layout } = iommu(format)
    const address = IOVA + layout[part]
    const needs = NEEDS[format][part]
    for (const access of [IOTLB_READ, IOTLB_WRITE, BOTH]) {
      map(address, access)
      expect(miss()).toEqual((access & needs) === needs ? NONE : [address, needs])
    }
  })

  test.each(PARTS)('%s gone: completions wait, are written when it is back, and then call', (part) => {
    for (const inOrder of [false, true]) {
      const { ring, driver, map, unmap, miss, layout, data } = iommu(format, { inOrder })
      for (let head = 0; head < 4; head++) driver.offer(head, { gpa: data, length: 8, flags: WRITE })
      const chains = [0, 1, 2, 3].map(() => ring.pop()!)
      // One is written and not published when it goes.
      ring.push(chains[0]!, 1, 1)
      unmap(IOVA + layout[part])
      expect(miss()).toEqual([IOVA + layout[part], NEEDS[format][part]])
      ring.push(chains[2]!, 3, 3)
      ring.push(chains[1]!, 2, 2)
      expect([ring.publish(), ring.hasAvail(), ring.pop(), driver.takeUsed()]).toEqual([false, false, undefined, []])
      expect(miss()).toEqual([IOVA + layout[part], NEEDS[format][part]])
      map(IOVA + layout[part])
      expect(ring.publish()).toBe(true)
      const later = [
        { id: 2, length: 3 },
        { id: 1, length: 2 },
      ]
      expect(driver.takeUsed()).toEqual([{ id: 0, length: 1 }, ...(inOrder ? later.toReversed() : later)])
      ring.push(chains[3]!, 4, 4)
      ring.publish()
      expect(driver.takeUsed()).toEqual([{ id: 3, length: 4 }])
    }
  })

  test('as many completions wait as the ring has entries', () => {
    const { ring, driver, map, unmap, layout, data } = iommu(format, { size: 8 })
    for (let round = 0; round < 3; round++) {
      for (let head = 0; head < 8; head++) driver.offer(head, { gpa: data, length: 8, flags: WRITE })
      for (let head = 0; head < 8; head++) ring.pop()
      unmap(IOVA + layout.device)
      for (let head = 7; head >= 0; head--) ring.push(ring.chain(head), head, 0)
      map(IOVA + layout.device)
      expect(ring.publish()).toBe(true)
      expect(driver.takeUsed()).toEqual([7, 6, 5, 4, 3, 2, 1, 0].map((id) => ({ id, length: id })))
    }
  })

  test.each([false, true])('what the driver was asked last holds when the ring is back, EVENT_IDX %s', (eventIdx) => {
    const { ring, driver, map, unmap, layout, data, view } = iommu(format, { eventIdx })
    const event = () =>
      format === 'packed'
        ? view.getUint32(layout.device, true)
        : [view.getUint16(layout.device, true), view.getUint16(layout.device + 4 + 8 * 8, true)]
    driver.offer(0, { gpa: data, length: 1 })
    ring.push(ring.pop()!, 0, 0)
    ring.publish()
    ring.suppress()
    const suppressed = event()
    unmap(IOVA + layout.device)
    expect(ring.rearm()).toBe(false)
    expect(event()).toEqual(suppressed)
    map(IOVA + layout.device)
    const armed = event()
    expect(armed).not.toEqual(suppressed)
    ring.rearm()
    expect(event()).toEqual(armed)
    unmap(IOVA + layout.device)
    ring.suppress()
    map(IOVA + layout.device)
    // With EVENT_IDX a split ring suppresses by leaving things as they are.
    expect(event()).toEqual(format === 'split' && eventIdx ? armed : suppressed)
  })

  test('a ring that asked for kicks before it was there for the first time gets them', () => {
    const { ring, map, layout, view } = iommu(format, { mapped: false, eventIdx: true })
    const at = format === 'packed' ? layout.device : layout.device + 4 + 8 * 8
    // What a former back-end has left.
    view.setUint32(at, 0x1_1234, true)
    expect(ring.rearm()).toBe(false)
    for (const part of PARTS) map(IOVA + layout[part])
    expect(view.getUint32(at, true)).toBe(format === 'packed' ? 0x2_8000 : 0x1_0000)
  })

  test.each([
    ['in another buffer', { buffer: new SharedArrayBuffer(PAGE), offset: 0 }],
    ['elsewhere in the buffer', { offset: 0 }],
    ['at another guest-physical address', { physical: PHYSICAL }],
  ])('with one page %s: the ring breaks instead of asking for ever', (_, other) => {
    const { ring, layout, buffer } = iommu(format, { size: 512, mapped: false })
    const pages = Array.from({ length: layout.end / PAGE }, (_, n) => ({
      gpa: IOVA + n * PAGE,
      size: PAGE,
      hva: 0,
      buffer,
      offset: n * PAGE,
      physical: PHYSICAL + n * PAGE,
      ...(n === 1 && other),
    }))
    ring.setMemory(new GuestMemory(pages, true))
    expect([ring.error?.code, ring.missAddress]).toEqual(['ERR_RING_SCATTERED', -1])
  })

  test('over several entries that are contiguous and allow different things', () => {
    const { ring, driver, entries, data, layout, memory } = iommu(format, { size: 512 })
    if (format === 'split') entries.set((layout.descriptor + PAGE) / PAGE, IOTLB_READ)
    ring.setMemory(memory())
    expect([ring.error, ring.missAddress]).toEqual([undefined, -1])
    for (let head = 0; head < 512; head++) driver.offer(head, { gpa: data, length: 8, flags: WRITE })
    for (let head = 0; head < 512; head++) ring.push(ring.pop()!, head, head)
    ring.publish()
    expect(driver.takeUsed()).toHaveLength(512)
  })

  test('over entries of several messages, whose buffers are objects of their own', () => {
    const { ring, entries, layout, memory, buffer } = iommu(format, { size: 512 })
    if (format === 'split') entries.set((layout.descriptor + PAGE) / PAGE, IOTLB_READ)
    const other = structuredClone(buffer)
    const regions = memory().regions.map(({ gpa, size, start, physical, access }, i) => ({
      gpa,
      size,
      hva: 0x4000_0000 + start,
      buffer: i % 2 === 0 ? buffer : other,
      offset: start,
      physical,
      access,
    }))
    ring.setMemory(new GuestMemory(regions, true))
    expect([ring.error, ring.missAddress]).toEqual([undefined, -1])
    // Another mapping, though, is another piece.
    ring.setMemory(
      new GuestMemory(
        regions.map((region, i) => (i === 1 ? { ...region, hva: region.hva + PAGE } : region)),
        true
      )
    )
    expect(ring.error?.code).toBe('ERR_RING_SCATTERED')
  })

  test('over several pages: the first one that is missing is told', () => {
    const { ring, buffer } = iommu(format, { size: 512, mapped: false })
    const region = { gpa: IOVA, size: PAGE, hva: 0, buffer }
    ring.setMemory(new GuestMemory([region], true))
    expect([ring.missAddress, ring.missAccess]).toEqual([IOVA + PAGE, NEEDS[format].descriptor])
  })
})

describe.each(FORMATS)('a %s ring with an in-flight buffer', (format) => {
  test('recovers when its memory is there, and keeps a recovered chain whose buffer is missing', () => {
    const bytes = new Uint8Array(new SharedArrayBuffer(inflightSize(8, format === 'packed')))
    const region = () => (format === 'packed' ? new PackedInflight(bytes, 8) : new SplitInflight(bytes, 8))
    const old = iommu(format, { inflight: region() })
    for (let head = 0; head < 3; head++)
      old.driver.offer(head, { gpa: old.data + head * PAGE, length: 8, flags: WRITE })
    const [first] = [old.ring.pop()!, old.ring.pop()!, old.ring.pop()!]
    old.ring.push(first, 1, 1)
    old.ring.publish()
    const base = old.ring.base

    const ring = makeRing(new GuestMemory([], true), old.config, region())
    expect([ring.recovering, ring.hasAvail(), ring.pop()]).toEqual([false, false, undefined])
    old.entries.delete((old.layout.end + 2 * PAGE) / PAGE)
    ring.setMemory(old.memory())
    expect([ring.recovering, ring.hasAvail(), ring.base]).toEqual([true, true, base])
    expect(ring.pop()!.head).toBe(1)
    expect([ring.pop(), ring.missAddress, ring.recovering]).toEqual([undefined, old.data + 2 * PAGE, true])
    old.entries.set((old.layout.end + 2 * PAGE) / PAGE, BOTH)
    ring.setMemory(old.memory())
    expect([ring.pop()!.head, ring.recovering, ring.hasAvail()]).toEqual([2, false, false])
    ring.push(ring.chain(2), 2, 2)
    ring.push(ring.chain(1), 1, 1)
    ring.publish()
    expect(old.driver.takeUsed().map(({ id }) => id)).toEqual([0, 2, 1])
  })
})

describe.each(FORMATS)('entries of a %s ring that come and go', (format) => {
  test.each([1, 2, 3])('nothing is lost, seed %d', (seed) => {
    const rnd = random(seed)
    for (let round = 0; round < 15; round++) {
      const inOrder = rnd(2) === 0
      const made = iommu(format, { inOrder, eventIdx: rnd(2) === 0, pages: 6 })
      const { ring, driver, data, buffer, map, unmap } = made
      const free = [0, 1, 2, 3, 4, 5, 6, 7]
      const offered: number[] = []
      const inFlight: number[] = []
      const used: number[] = []
      const pages = buffer.byteLength / PAGE
      let slots = 8
      const sizes = new Map<number, number>()
      for (let step = 0; step < 1500; step++) {
        const action = rnd(7)
        if (action === 0 && free.length > 0 && slots > 0) {
          const head = free.splice(rnd(free.length), 1)[0]!
          const count = format === 'packed' ? 1 + rnd(Math.min(3, slots)) : 1
          sizes.set(head, count)
          slots -= count
          driver.offer(
            head,
            ...Array.from({ length: count }, () => ({ gpa: data + rnd(4 * PAGE), length: rnd(PAGE), flags: WRITE }))
          )
          offered.push(head)
        } else if (action === 1) {
          const chain = ring.pop()
          if (chain !== undefined) {
            expect(chain.head).toBe(offered.shift())
            inFlight.push(chain.head)
          } else if (offered.length > 0) expect(ring.missAddress).toBeGreaterThanOrEqual(IOVA)
        } else if (action === 2 && inFlight.length > 0) {
          const head = inFlight.splice(rnd(inFlight.length), 1)[0]!
          ring.push(ring.chain(head), head, head)
        } else if (action === 3) ring.publish()
        else if (action === 4) {
          for (const { id, length } of driver.takeUsed()) {
            expect(length).toBe(id)
            used.push(id)
            free.push(id)
            slots += sizes.get(id)!
          }
        } else if (action === 5) {
          if (ring.missAddress >= 0) map(ring.missAddress)
          else if (rnd(3) === 0) ring.rearm()
        } else if (rnd(3) === 0) unmap(IOVA + rnd(pages) * PAGE)
        expect(ring.error).toBeUndefined()
      }
      for (let page = 0; page < pages; page++) map(IOVA + page * PAGE)
      for (let chain = ring.pop(); chain !== undefined; chain = ring.pop()) inFlight.push(chain.head)
      for (const head of inFlight) ring.push(ring.chain(head), head, head)
      ring.publish()
      for (const { id } of driver.takeUsed()) free.push(id)
      expect(free.toSorted()).toEqual([0, 1, 2, 3, 4, 5, 6, 7])
      expect(used.length).toBeGreaterThan(0)
    }
  })
})

import { describe, expect, test } from 'vitest'
import {
  forgetInflight,
  InflightError,
  inflightSize,
  PackedInflight,
  type PackedRecovery,
  SplitInflight,
} from '../../src/virtio/inflight.ts'
import { Killed, random, StoreTrap } from './store-trap.ts'

const AVAIL = 1 << 7
const USED = 1 << 15

describe('inflightSize', () => {
  test.each([
    [1, false, 64],
    [3, false, 64],
    [4, false, 128],
    [128, false, 16 + 128 * 16 + 48],
    [32768, false, 524_352],
    [1, true, 64],
    [2, true, 128],
    [128, true, 32 + 128 * 32 + 32],
    [32768, true, 1_048_640],
  ])('of %i entries, packed %s, is %i', (size, packed, bytes) => {
    expect(inflightSize(size, packed)).toBe(bytes)
  })
})

function makeSplit(size: number) {
  const buffer = new SharedArrayBuffer(inflightSize(size, false))
  const view = new DataView(buffer)
  const start = () => new SplitInflight(new Uint8Array(buffer), size)
  const header = () => ({
    features: view.getBigUint64(0, true),
    version: view.getUint16(8, true),
    num: view.getUint16(10, true),
    lastBatchHead: view.getUint16(12, true),
    usedIdx: view.getUint16(14, true),
  })
  const entry = (head: number) => ({
    inflight: view.getUint8(16 + head * 16),
    next: view.getUint16(16 + head * 16 + 6, true),
    counter: view.getBigUint64(16 + head * 16 + 8, true),
  })
  return { buffer, view, start, header, entry }
}

describe('SplitInflight', () => {
  test('a fresh region gets version, size and used.idx, whatever else was in it', () => {
    const { buffer, view, start, header } = makeSplit(4)
    new Uint8Array(buffer).fill(0xff)
    view.setUint16(8, 0, true)
    const inflight = start()
    expect(inflight.recover(7)).toEqual([])
    expect(inflight.fresh).toBe(true)
    expect(header()).toEqual({ features: 0n, version: 1, num: 4, lastBatchHead: 0, usedIdx: 7 })
    const next = start()
    expect(next.recover(7)).toEqual([])
    expect(next.fresh).toBe(false)
  })

  test('pop, push and publish write what the spec says', () => {
    const { start, header, entry } = makeSplit(4)
    const inflight = start()
    inflight.recover(65535)
    inflight.popped(3)
    inflight.popped(0)
    inflight.popped(2)
    expect([3, 0, 2].map(entry)).toEqual([
      { inflight: 1, next: 0, counter: 0n },
      { inflight: 1, next: 0, counter: 1n },
      { inflight: 1, next: 0, counter: 2n },
    ])
    inflight.unpopped(2)
    expect(entry(2).inflight).toBe(0)
    inflight.used(0)
    inflight.used(3)
    expect(header()).toMatchObject({ lastBatchHead: 3, usedIdx: 65535 })
    expect(entry(3)).toMatchObject({ inflight: 1, next: 0 })
    inflight.published(1)
    expect(header()).toMatchObject({ lastBatchHead: 3, usedIdx: 1 })
    expect([0, 1, 2, 3].map((head) => entry(head).inflight)).toEqual([0, 0, 0, 0])
  })

  test('head 0 in a batch is not taken for its end', () => {
    const { start } = makeSplit(4)
    const inflight = start()
    inflight.recover(0)
    for (const head of [0, 1, 2]) inflight.popped(head)
    for (const head of [1, 0]) inflight.used(head)
    // Killed between used.idx = 2 and `published`.
    expect(start().recover(2)).toEqual([2])
  })

  test('a batch that was not published is in flight, also when a later one is', () => {
    const { start } = makeSplit(4)
    const first = start()
    first.recover(0)
    for (const head of [3, 2, 1, 0]) first.popped(head)
    first.used(2)
    first.used(0)
    const second = start()
    expect(second.recover(0)).toEqual([3, 2, 1, 0])
    second.used(1)
    expect(start().recover(1)).toEqual([3, 2, 0])
  })

  test('the order is that of the counters, beyond 2^32 too, and new ones are behind them', () => {
    const { view, start, entry } = makeSplit(8)
    start().recover(0)
    const counters = [0x1_0000_0000n, 0xffff_fffen, 0x2_0000_0001n, 5n, 0x2_ffff_ffffn]
    counters.forEach((counter, head) => {
      view.setUint8(16 + head * 16, 1)
      view.setBigUint64(16 + head * 16 + 8, counter, true)
    })
    const inflight = start()
    expect(inflight.recover(0)).toEqual([3, 1, 0, 2, 4])
    inflight.popped(7)
    inflight.popped(6)
    expect(entry(7).counter).toBe(0x3_0000_0000n)
    expect(entry(6).counter).toBe(0x3_0000_0001n)
  })

  test('a used.idx that no batch explains is a ring that began anew: nothing is in flight', () => {
    const { start, header } = makeSplit(4)
    const firmware = start()
    firmware.recover(100)
    for (const head of [0, 1, 2]) firmware.popped(head)
    const inflight = start()
    expect(inflight.recover(0)).toEqual([])
    expect(header().usedIdx).toBe(0)
    inflight.popped(1)
    expect(start().recover(0)).toEqual([1])
  })

  test('a stale used_idx with nothing in flight is replaced', () => {
    for (const usedIdx of [0, 3, 9, 65535]) {
      const { start, header } = makeSplit(4)
      start().recover(5)
      expect(start().recover(usedIdx)).toEqual([])
      expect(header().usedIdx).toBe(usedIdx)
    }
  })

  test('a batch list that leads nowhere ends', () => {
    const { view, start } = makeSplit(4)
    const inflight = start()
    inflight.recover(0)
    for (const head of [0, 1, 2, 3]) inflight.popped(head)
    view.setUint16(12, 1, true)
    view.setUint16(16 + 1 * 16 + 6, 1, true)
    expect(start().recover(4)).toEqual([0, 2, 3])
    view.setUint16(12, 2, true)
    view.setUint16(16 + 2 * 16 + 6, 60_000, true)
    expect(start().recover(8)).toEqual([0, 3])
    view.setUint16(12, 65_535, true)
    expect(start().recover(12)).toEqual([0, 3])
  })
})

function makePacked(size: number) {
  const buffer = new SharedArrayBuffer(inflightSize(size, true))
  const view = new DataView(buffer)
  const start = () => new PackedInflight(new Uint8Array(buffer), size)
  const u16 = (at: number) => view.getUint16(at, true)
  const header = () => ({
    features: view.getBigUint64(0, true),
    version: u16(8),
    num: u16(10),
    freeHead: u16(12),
    oldFreeHead: u16(14),
    usedIdx: u16(16),
    oldUsedIdx: u16(18),
    usedWrap: view.getUint8(20),
    oldUsedWrap: view.getUint8(21),
  })
  const entry = (index: number) => {
    const at = 32 + index * 32
    return {
      inflight: view.getUint8(at),
      next: u16(at + 2),
      last: u16(at + 4),
      num: u16(at + 6),
      counter: view.getBigUint64(at + 8, true),
      id: u16(at + 16),
      flags: u16(at + 18),
      length: view.getUint32(at + 20, true),
      address: view.getBigUint64(at + 24, true),
    }
  }
  return { buffer, view, start, header, entry }
}

/** Pops a chain of `slots` descriptors. */
function pop(inflight: PackedInflight, id: number, slots = 1): number {
  for (let i = 0; i < slots; i++) inflight.descriptor(id, i, 100, AVAIL, i === slots - 1 ? id : 0xabcd)
  return inflight.popped()
}

const ids = ({ chains }: PackedRecovery): number[] => chains.map(({ id }) => id)
const noFlags = (): number => {
  throw new Error('the ring was looked at without a batch')
}

describe('PackedInflight', () => {
  test('a fresh region has all entries in its free list, and the used position of the base', () => {
    const { buffer, view, start, header, entry } = makePacked(3)
    new Uint8Array(buffer).fill(0xff)
    view.setUint16(8, 0, true)
    expect(start().recover(0x8002_0001 >>> 0, noFlags)).toEqual({ usedIndex: 2, usedWrap: 1, chains: [] })
    expect(header()).toEqual({
      features: 0n,
      version: 1,
      num: 3,
      freeHead: 0,
      oldFreeHead: 0,
      usedIdx: 2,
      oldUsedIdx: 2,
      usedWrap: 1,
      oldUsedWrap: 1,
    })
    expect([0, 1, 2].map((index) => entry(index).next)).toEqual([1, 2, 3])
    expect([0, 1, 2].map((index) => entry(index).inflight)).toEqual([0, 0, 0])
    // And is believed from then on.
    expect(start().recover(0, noFlags)).toEqual({ usedIndex: 2, usedWrap: 1, chains: [] })
  })

  test('a base beyond the ring is refused', () => {
    expect(() =>
      makePacked(3)
        .start()
        .recover(3 << 16, noFlags)
    ).toThrow(InflightError)
  })

  test('pop, push and publish write what the spec says', () => {
    const { start, header, entry } = makePacked(4)
    const inflight = start()
    inflight.recover(0x8003_8003 >>> 0, noFlags)
    inflight.descriptor(0xffff_fff0, 0x0012_3456, 0xffff_ffff, AVAIL | 1, 9)
    inflight.descriptor(1, 2, 3, AVAIL | 2, 0x1234)
    expect(inflight.popped()).toBe(0)
    expect(entry(0)).toEqual({
      inflight: 1,
      next: 1,
      last: 1,
      num: 2,
      counter: 0n,
      id: 9,
      flags: AVAIL | 1,
      length: 0xffff_ffff,
      address: 0x0012_3456_ffff_fff0n,
    })
    expect(entry(1)).toMatchObject({ inflight: 0, id: 0x1234, flags: AVAIL | 2, length: 3, address: 0x2_0000_0001n })
    expect(pop(inflight, 2)).toBe(2)
    expect(header()).toMatchObject({ freeHead: 3, oldFreeHead: 3, usedIdx: 3, oldUsedIdx: 3 })
    inflight.used(0, 2)
    expect(header()).toMatchObject({
      freeHead: 0,
      oldFreeHead: 3,
      usedIdx: 1,
      oldUsedIdx: 3,
      usedWrap: 0,
      oldUsedWrap: 1,
    })
    expect(entry(1).next).toBe(3)
    inflight.used(2, 1)
    expect(header()).toMatchObject({ freeHead: 2, oldFreeHead: 3, usedIdx: 2, oldUsedIdx: 3 })
    expect(entry(2).next).toBe(0)
    inflight.published()
    expect(header()).toMatchObject({
      freeHead: 2,
      oldFreeHead: 2,
      usedIdx: 2,
      oldUsedIdx: 2,
      usedWrap: 0,
      oldUsedWrap: 0,
    })
    expect([0, 2].map((index) => entry(index).inflight)).toEqual([0, 0])
  })

  test('a chain that was abandoned leaves nothing behind', () => {
    const { start, header } = makePacked(4)
    const inflight = start()
    inflight.recover(0, noFlags)
    const before = header()
    inflight.descriptor(1, 1, 1, 1, 1)
    inflight.descriptor(1, 1, 1, 1, 1)
    inflight.abandon()
    expect(header()).toEqual(before)
    expect(pop(inflight, 3, 4)).toBe(0)
    expect(start().recover(0, noFlags).chains).toMatchObject([{ id: 3, slots: 4 }])
  })

  test('the descriptors come back as they were', () => {
    const { start } = makePacked(4)
    const inflight = start()
    inflight.recover(0, noFlags)
    inflight.descriptor(0xffff_ffff, 0xffff_fffe, 0xffff_fffd, 0xfffc, 7)
    inflight.descriptor(1, 2, 3, 4, 2)
    inflight.popped()
    expect(start().recover(0, noFlags).chains).toEqual([
      {
        entry: 0,
        id: 2,
        slots: 2,
        descriptors: [
          { low: 0xffff_ffff, high: 0xffff_fffe, length: 0xffff_fffd, flags: 0xfffc },
          { low: 1, high: 2, length: 3, flags: 4 },
        ],
      },
    ])
  })

  test('more descriptors than entries: the chain is not tracked, and nothing else is hurt', () => {
    const { start } = makePacked(4)
    const inflight = start()
    inflight.recover(0, noFlags)
    const first = pop(inflight, 0, 3)
    expect(pop(inflight, 1, 2)).toBe(-1)
    inflight.used(-1, 2)
    inflight.unpopped(-1)
    expect(pop(inflight, 2, 1)).toBe(3)
    expect(pop(inflight, 3, 1)).toBe(-1)
    expect(ids(start().recover(0, noFlags))).toEqual([0, 2])
    inflight.used(first, 3)
    inflight.published()
    expect(pop(inflight, 4, 3)).toBe(0)
  })

  test('a batch as long as the ring is a batch', () => {
    const { start } = makePacked(2)
    const inflight = start()
    inflight.recover(0x8000_8000 >>> 0, noFlags)
    const entry = pop(inflight, 1, 2)
    inflight.used(entry, 2)
    // The positions have the same index again.
    expect(start().recover(0, () => AVAIL)).toMatchObject({ usedIndex: 0, usedWrap: 1, chains: [{ id: 1 }] })
    const again = start()
    const { chains } = again.recover(0, noFlags)
    again.used(chains[0]!.entry, 2)
    expect(start().recover(0, () => AVAIL | USED)).toEqual({ usedIndex: 0, usedWrap: 0, chains: [] })
  })

  // A ring of 4. Lap 0 leaves stale flags at index 1, inside a chain; the batch goes from index 3 over the end to 1.
  test.each([
    ['the driver offers nothing', AVAIL | USED],
    ['the driver offered index 3 again', USED],
  ])('publish across the end of the ring, killed at any store: %s', (_, flagsAt3) => {
    for (let stores = 0; ; stores++) {
      const { buffer, start } = makePacked(4)
      const trap = new StoreTrap(buffer)
      const flags = [AVAIL | USED, AVAIL, AVAIL | USED, AVAIL]
      const inflight = trap.trapped(start)
      trap.trapped(() => inflight.recover(0x8000_8000 >>> 0, noFlags))
      for (const [id, slots] of [
        [0, 2],
        [1, 1],
      ] as const) {
        inflight.used(pop(inflight, id, slots), slots)
        inflight.published()
      }
      const entry = pop(inflight, 2, 2)
      inflight.used(entry, 2)
      flags[3] = flagsAt3
      trap.left = stores
      let killed = false
      try {
        inflight.published()
      } catch (error) {
        expect(error).toBeInstanceOf(Killed)
        killed = true
      }
      expect(start().recover(0, (index) => flags[index]!)).toEqual({ usedIndex: 1, usedWrap: 0, chains: [] })
      if (!killed) return expect(stores).toBe(3)
    }
  })

  test('the entries of a chain that was recovered and used are taken again, each once', () => {
    const { start } = makePacked(6)
    const first = start()
    first.recover(0x8000_8000 | 0, noFlags)
    pop(first, 1, 3)
    const next = start()
    const [chain] = next.recover(0, noFlags).chains
    next.used(chain!.entry, 3)
    next.published()
    for (const id of [2, 3, 4]) expect(pop(next, id, 2)).toBeGreaterThanOrEqual(0)
    const { chains } = start().recover(0, noFlags)
    expect(chains.map(({ id, descriptors }) => [id, descriptors.map(({ low, high }) => [low, high])])).toEqual(
      [2, 3, 4].map((id) => [
        id,
        [
          [id, 0],
          [id, 1],
        ],
      ])
    )
  })

  test('a region that lost entries or whose free list is in a knot gets a new one', () => {
    for (const spoil of [
      (view: DataView) => view.setUint16(32 + 3 * 32 + 2, 3, true),
      (view: DataView) => view.setUint16(32 + 3 * 32 + 2, 40_000, true),
      (view: DataView) => view.setUint16(14, 65_535, true),
      (view: DataView) => view.setUint16(32 + 6 * 32 + 2, 2, true),
    ]) {
      const { view, start } = makePacked(8)
      const inflight = start()
      inflight.recover(0, noFlags)
      pop(inflight, 1, 2)
      spoil(view)
      const next = start()
      expect(ids(next.recover(0, noFlags))).toEqual([1])
      expect(pop(next, 2, 6)).toBe(2)
      expect(pop(next, 3, 1)).toBe(-1)
      expect(ids(start().recover(0, noFlags))).toEqual([1, 2])
    }
  })

  test('chains that share entries, lead out of the region or have a wrong length are ignored', () => {
    const at = (index: number) => 32 + index * 32
    for (const spoil of [
      // num 0, num beyond the region, last elsewhere, a link to itself, out of the region, into the other chain.
      (view: DataView) => view.setUint16(at(0) + 6, 0, true),
      (view: DataView) => view.setUint16(at(0) + 6, 9, true),
      (view: DataView) => view.setUint16(at(0) + 4, 5, true),
      (view: DataView) => view.setUint16(at(0) + 2, 0, true),
      (view: DataView) => view.setUint16(at(0) + 2, 9999, true),
      (view: DataView) => {
        view.setUint16(at(0) + 2, 2, true)
        view.setBigUint64(at(0) + 8, 100n, true)
      },
    ]) {
      const { view, start, entry } = makePacked(8)
      const inflight = start()
      inflight.recover(0, noFlags)
      pop(inflight, 4, 2)
      pop(inflight, 5, 2)
      spoil(view)
      expect(ids(start().recover(0, noFlags))).toEqual([5])
      expect(entry(0).inflight).toBe(0)
    }
  })

  test.each([
    ['used_idx', 16, 4],
    ['old_used_idx', 18, 4],
    ['used_wrap_counter', 20, 2],
    ['old_used_wrap_counter', 21, 2],
  ])('a %s that no ring has is refused', (_, at, value) => {
    const { view, start } = makePacked(4)
    start().recover(0, noFlags)
    view.setUint8(at, value)
    expect(() => start().recover(0, () => 0)).toThrow(InflightError)
  })
})

describe.each([
  ['split', false],
  ['packed', true],
] as const)('a %s region', (_, packed) => {
  const start = (bytes: Uint8Array, size: number): PackedInflight | SplitInflight =>
    packed ? new PackedInflight(bytes, size) : new SplitInflight(bytes, size)
  const recover = (inflight: PackedInflight | SplitInflight, flags = 0): number =>
    inflight instanceof SplitInflight ? inflight.recover(0).length : inflight.recover(0, () => flags).chains.length
  const popOne = (inflight: PackedInflight | SplitInflight): void => {
    if (inflight instanceof SplitInflight) inflight.popped(1)
    else pop(inflight, 1)
  }

  test.each([
    ['another version', (view: DataView) => view.setUint16(8, 2, true)],
    ['features', (view: DataView) => view.setUint8(7, 1)],
  ])('with %s is refused', (_, spoil) => {
    const bytes = new Uint8Array(inflightSize(4, packed))
    recover(start(bytes, 4))
    spoil(new DataView(bytes.buffer))
    expect(() => recover(start(bytes, 4))).toThrow(InflightError)
  })

  test('that is too short or misaligned is refused', () => {
    const bytes = new Uint8Array(inflightSize(8, packed) + 64)
    expect(() => start(bytes.subarray(0, inflightSize(8, packed) - 1), 8)).toThrow(InflightError)
    expect(() => start(bytes.subarray(4), 8)).toThrow(InflightError)
    expect(recover(start(bytes.subarray(8), 8))).toBe(0)
  })

  test('of another size is refused with chains in flight, and begins anew without', () => {
    for (const [before, after] of [
      [4, 8],
      [8, 4],
    ] as const) {
      const bytes = new Uint8Array(inflightSize(8, packed))
      const first = start(bytes, before)
      recover(first)
      popOne(first)
      expect(() => recover(start(bytes, after))).toThrow(InflightError)
      if (first instanceof SplitInflight) first.unpopped(1)
      else first.unpopped(0)
      expect(recover(start(bytes, after))).toBe(0)
      expect(new DataView(bytes.buffer).getUint16(10, true)).toBe(after)
      popOne(start(bytes, after))
    }
  })

  test('that is forgotten is a fresh one', () => {
    const bytes = new Uint8Array(inflightSize(4, packed))
    const first = start(bytes, 4)
    recover(first)
    popOne(first)
    forgetInflight(bytes)
    expect(recover(start(bytes, 4))).toBe(0)
    expect(recover(start(bytes, 4))).toBe(0)
  })

  test('nothing is written behind its size', () => {
    const bytes = new Uint8Array(inflightSize(4, packed) + 64).fill(0xee)
    new DataView(bytes.buffer).setUint16(8, 0, true)
    const inflight = start(bytes, 4)
    recover(inflight)
    for (let i = 0; i < 9; i++) popOne(inflight)
    expect([...bytes.subarray(-64)]).toEqual(new Array(64).fill(0xee))
  })

  /** Anything, with a header that lets most of it pass. */
  function scribble(bytes: Uint8Array, size: number, pick: (below: number) => number): void {
    const view = new DataView(bytes.buffer)
    // Small values look like indices and flags.
    for (let i = 0; i < bytes.length; i++) bytes[i] = [0, 0, 1, pick(size), pick(256)][pick(5)]!
    if (pick(8) > 0) {
      view.setBigUint64(0, 0n, true)
      view.setUint16(8, 1, true)
      view.setUint16(10, size, true)
    }
    if (!packed || pick(8) === 0) return
    for (const at of [16, 18]) view.setUint16(at, pick(size), true)
    for (const at of [20, 21]) view.setUint8(at, pick(2))
    for (let i = 0; i < size; i++) for (const at of [3, 5, 7]) view.setUint8(32 + i * 32 + at, 0)
  }

  /** A region in use, with a few fields changed. */
  function spoil(bytes: Uint8Array, size: number, pick: (below: number) => number): void {
    const inflight = start(bytes, size)
    recover(inflight)
    const entries: number[] = []
    for (let i = pick(size + 1); i > 0; i--) {
      if (inflight instanceof SplitInflight) inflight.popped(pick(size))
      else entries.push(pop(inflight, pick(size)))
    }
    if (inflight instanceof PackedInflight && entries.length > 0 && pick(2) === 0) inflight.used(entries[0]!, 1)
    const view = new DataView(bytes.buffer)
    for (let i = pick(5); i > 0; i--) view.setUint16(10 + 2 * pick(bytes.length / 2 - 5), pick(size + 2), true)
  }

  test('of garbage gives something possible or an InflightError, and works from then on', () => {
    const pick = random(packed ? 1 : 2)
    let recovered = 0
    for (let round = 0; round < 4000; round++) {
      const size = 1 + pick(12)
      const bytes = new Uint8Array(inflightSize(size, packed))
      if (pick(2) === 0) scribble(bytes, size, pick)
      else spoil(bytes, size, pick)
      try {
        recovered += packed ? tryPacked(bytes, size, pick) : trySplit(bytes, size, pick)
      } catch (error) {
        if (!(error instanceof InflightError)) throw error
      }
    }
    // It was not all refused.
    expect(recovered).toBeGreaterThan(2000)
  })
})

function trySplit(bytes: Uint8Array, size: number, pick: (below: number) => number): number {
  const usedIdx = pick(3) === 0 ? pick(65536) : new DataView(bytes.buffer).getUint16(14, true) + pick(size)
  const inflight = new SplitInflight(bytes, size)
  const heads = inflight.recover(usedIdx & 0xffff)
  expect(new Set(heads).size).toBe(heads.length)
  for (const head of heads) expect(head).toBeLessThan(size)
  expect(new SplitInflight(bytes, size).recover(usedIdx & 0xffff)).toEqual(heads)
  for (const head of heads) inflight.used(head)
  inflight.published((usedIdx + heads.length) & 0xffff)
  for (let head = 0; head < size; head++) inflight.popped(head)
  const all = new SplitInflight(bytes, size).recover((usedIdx + heads.length) & 0xffff)
  expect([...all].sort((a, b) => a - b)).toEqual(Array.from({ length: size }, (_, i) => i))
  return heads.length
}

function tryPacked(bytes: Uint8Array, size: number, pick: (below: number) => number): number {
  const ring = Array.from({ length: size }, () => [0, AVAIL, USED, AVAIL | USED][pick(4)]!)
  const inflight = new PackedInflight(bytes, size)
  const recovery = inflight.recover(0x8000_8000 >>> 0, (index) => ring[index]!)
  let slots = 0
  for (const chain of recovery.chains) {
    slots += chain.slots
    expect(chain.descriptors.length).toBe(chain.slots)
    expect(chain.entry).toBeLessThan(size)
  }
  expect(slots).toBeLessThanOrEqual(size)
  expect(recovery.usedIndex).toBeLessThan(size)
  expect(new PackedInflight(bytes, size).recover(0, noFlags)).toEqual(recovery)
  // What is left is free, and all of it is when the chains are used.
  const more: number[] = []
  for (let i = slots; i < size; i++) more.push(pop(inflight, 1))
  expect(more).not.toContain(-1)
  expect(pop(inflight, 1)).toBe(-1)
  for (const { entry, slots } of recovery.chains) inflight.used(entry, slots)
  inflight.published()
  for (const entry of more) inflight.used(entry, 1)
  inflight.published()
  expect(pop(inflight, 0, size)).toBeGreaterThanOrEqual(0)
  expect(new PackedInflight(bytes, size).recover(0, noFlags).chains).toMatchObject([{ id: 0, slots: size }])
  return recovery.chains.length
}

import { beforeEach, describe, expect, test } from 'vitest'
import { Chain } from '../../src/virtio/chain.ts'
import { GuestMemory } from '../../src/virtio/memory.ts'
import { segments } from './mock-driver.ts'

const PAGE = 4096
/** Regions A [0, 1 page), B right behind it, a hole, C at 4 GiB; hva differs from gpa by a multiple of a page. */
const HIGH = 2 ** 32
let memory: GuestMemory
let chain: Chain

beforeEach(() => {
  memory = new GuestMemory([
    { gpa: 0, size: PAGE, hva: 0x10_0000, buffer: new SharedArrayBuffer(PAGE) },
    { gpa: PAGE, size: PAGE, hva: 0x70_0000, buffer: new ArrayBuffer(PAGE) },
    { gpa: HIGH, size: PAGE, hva: 0x90_0000, buffer: new SharedArrayBuffer(PAGE) },
  ])
  for (const [index, { bytes }] of memory.regions.entries()) for (let i = 0; i < PAGE; i++) bytes[i] = i * 7 + index
  chain = new Chain(3)
  chain.begin(memory)
})

/** Byte at a guest address, by a look-up of its own. */
const byteAt = (gpa: number): number => {
  const region = memory.regions.find((r) => gpa >= r.gpa && gpa < r.end)!
  return region.bytes[gpa - region.gpa]!
}

describe('Chain.append', () => {
  test('a buffer inside a region is one segment', () => {
    expect(chain.append(memory, 100, 50, false)).toBe(true)
    expect(segments(chain)).toEqual([[100, 50]])
    expect([chain.count, chain.readableCount, chain.readable, chain.writable]).toEqual([1, 1, 50, 0])
  })

  test('a buffer that straddles adjacent regions is a segment in each', () => {
    expect(chain.append(memory, PAGE - 10, 30, true)).toBe(true)
    expect(segments(chain)).toEqual([
      [PAGE - 10, 10],
      [PAGE, 20],
    ])
    expect([...chain.region.subarray(0, 2)]).toEqual([0, 1])
    expect([...chain.offset.subarray(0, 2)]).toEqual([PAGE - 10, 0])
    expect([chain.readableCount, chain.readable, chain.writable]).toEqual([0, 0, 30])
  })

  test.each([
    ['starts in a hole', 2 * PAGE, 1],
    ['runs into a hole', 2 * PAGE - 1, 2],
    ['runs across two regions into a hole', 0, 2 * PAGE + 1],
    ['runs beyond the last region', HIGH + PAGE - 1, 2],
    ['is behind all regions', HIGH + PAGE, 1],
    ['is at 2^64 - 1 (rounded to 2^64)', 2 ** 64, 1],
  ])('refuses a buffer that %s', (_, gpa, length) => {
    expect(chain.append(memory, gpa, length, false)).toBe(false)
  })

  test('serves a buffer above 4 GiB', () => {
    expect(chain.append(memory, HIGH + 8, 16, false)).toBe(true)
    expect(chain.offset[0]).toBe(8)
    expect(chain.readU8(0)).toBe(byteAt(HIGH + 8))
  })

  test('an empty buffer adds no segment, wherever it points', () => {
    expect(chain.append(memory, 3 * PAGE, 0, false)).toBe(true)
    expect(chain.append(memory, 2 ** 64, 0, true)).toBe(true)
    expect([chain.count, chain.readable, chain.writable]).toEqual([0, 0, 0])
  })

  test('grows beyond its first room and keeps what it had', () => {
    const expected: [number, number][] = []
    for (let i = 0; i < 1025; i++) {
      expect(chain.append(memory, i, 1 + (i % 5), i >= 1000)).toBe(true)
      expected.push([i, 1 + (i % 5)])
    }
    expect(segments(chain)).toEqual(expected)
    expect([chain.count, chain.readableCount]).toEqual([1025, 1000])
    expect(chain.readable + chain.writable).toBe(expected.reduce((sum, [, length]) => sum + length, 0))
  })

  test('begin() empties it and takes the regions of the new memory', () => {
    chain.append(memory, 0, 10, false)
    chain.append(memory, 0, 10, true)
    const other = new GuestMemory([{ gpa: 0, size: PAGE, hva: 0, buffer: new ArrayBuffer(PAGE) }])
    chain.begin(other)
    expect([chain.count, chain.readableCount, chain.readable, chain.writable]).toEqual([0, 0, 0, 0])
    expect(chain.regions).toBe(other.regions)
  })
})

/** 24 readable bytes from GPA 64 on, cut into descriptors of the given lengths; then the writable ones. */
function build(readable: readonly number[], writable: readonly number[] = []): void {
  let gpa = 64
  for (const length of readable) {
    chain.append(memory, gpa, length, false)
    gpa += length
  }
  gpa = PAGE + 64
  for (const length of writable) {
    chain.append(memory, gpa, length, true)
    gpa += length
  }
}

/** All ways that matter to cut 24 bytes: whole, at every single position, byte by byte, with empty ones between. */
const cuts: readonly (readonly number[])[] = [
  [24],
  ...Array.from({ length: 23 }, (_, i) => [i + 1, 23 - i]),
  Array.from({ length: 24 }, () => 1),
  [0, 5, 0, 0, 7, 12, 0],
  [3, 3, 3, 3, 3, 3, 3, 3],
]

describe('Chain accessors', () => {
  test.each(cuts.map((cut) => [cut.join('+'), cut] as const))('read the same from readable bytes cut %s', (_, cut) => {
    build(cut, [4])
    const view = new DataView(memory.regions[0]!.buffer, 64, 24)
    for (let at = 0; at < 24; at++) expect(chain.readU8(at)).toBe(view.getUint8(at))
    for (let at = 0; at < 23; at++) expect(chain.readU16(at)).toBe(view.getUint16(at, true))
    for (let at = 0; at < 21; at++) expect(chain.readU32(at)).toBe(view.getUint32(at, true))
    for (let at = 0; at < 17; at++) expect(chain.readU64(at)).toBe(Number(view.getBigUint64(at, true)))
    expect(() => chain.readU8(24)).toThrow(RangeError)
    expect(() => chain.readU16(23)).toThrow(RangeError)
    expect(() => chain.readU32(21)).toThrow(RangeError)
    expect(() => chain.readU64(17)).toThrow(RangeError)
  })

  test('read across adjacent regions', () => {
    chain.append(memory, PAGE - 3, 8, false)
    const bytes = Uint8Array.from({ length: 8 }, (_, i) => byteAt(PAGE - 3 + i))
    const view = new DataView(bytes.buffer)
    expect([chain.readU32(0), chain.readU32(2), chain.readU32(4)]).toEqual([
      view.getUint32(0, true),
      view.getUint32(2, true),
      view.getUint32(4, true),
    ])
  })

  test('readU32 has no sign, in one load and in four', () => {
    memory.regions[0]!.bytes.fill(0xff, 0, 64)
    chain.append(memory, 0, 8, false)
    chain.append(memory, 1, 3, false)
    chain.append(memory, 5, 3, false)
    expect([0, 1, 4, 7, 10].map((at) => chain.readU32(at))).toEqual([
      2 ** 32 - 1,
      2 ** 32 - 1,
      2 ** 32 - 1,
      2 ** 32 - 1,
      2 ** 32 - 1,
    ])
  })

  test.each([
    [0n, 0],
    [2n ** 53n - 1n, 2 ** 53 - 1],
    [2n ** 53n, 2 ** 53],
    [2n ** 53n + 1n, 2 ** 53],
    [2n ** 55n - 1n, 2 ** 55],
    [2n ** 64n - 1n, 2 ** 64],
    [0x8000_0000_8000_0000n, 0x8000_0000_8000_0000],
  ])('readU64 of %d rounds, but never below 2^53', (value, expected) => {
    new DataView(memory.regions[0]!.buffer).setBigUint64(128, value, true)
    chain.append(memory, 128, 8, false)
    expect(chain.readU64(0)).toBe(expected)
  })

  test('reads never see the writable part', () => {
    build([2], [100])
    expect(() => chain.readU8(2)).toThrow(RangeError)
    expect(() => chain.readU32(0)).toThrow(RangeError)
    chain.begin(memory)
    expect(() => chain.readU8(0)).toThrow(RangeError)
    expect(() => chain.readU32(0)).toThrow(RangeError)
  })

  test.each(cuts.map((cut) => [cut.join('+'), cut] as const))('write each byte of a writable part cut %s', (_, cut) => {
    build([16], cut)
    const { bytes } = memory.regions[1]!
    bytes.fill(0)
    for (let at = 0; at < 24; at++) chain.writeU8(at, at + 1)
    expect([...bytes.subarray(63, 89)]).toEqual([0, ...Array.from({ length: 24 }, (_, i) => i + 1), 0])
    expect(() => chain.writeU8(24, 1)).toThrow(RangeError)
    expect(() => chain.writeU8(-1, 1)).toThrow(RangeError)
  })

  test.each(cuts.map((cut) => [cut.join('+'), cut] as const))('write words of a writable part cut %s', (_, cut) => {
    for (let at = 0; at <= 20; at++) {
      chain.begin(memory)
      build([16], cut)
      const { bytes } = memory.regions[1]!
      bytes.fill(0)
      chain.writeU32(at, 0xf1e2_d3c4)
      const expected = new Array<number>(26).fill(0)
      expected.splice(at + 1, 4, 0xc4, 0xd3, 0xe2, 0xf1)
      expect([...bytes.subarray(63, 89)]).toEqual(expected)
    }
    for (const at of [-4, -1, 21, 24]) expect(() => chain.writeU32(at, 1)).toThrow(RangeError)
  })

  test('writes never reach the readable part', () => {
    build([16])
    const before = memory.regions[0]!.bytes.slice()
    expect(() => chain.writeU8(0, 0xee)).toThrow(RangeError)
    expect(() => chain.writeU32(0, 0xee)).toThrow(RangeError)
    expect(chain.copyTo(0, new Uint8Array(16), 0, 16)).toBe(0)
    expect(memory.regions[0]!.bytes).toEqual(before)
  })
})

describe('Chain.copyFrom', () => {
  test.each(cuts.map((cut) => [cut.join('+'), cut] as const))('takes any range of bytes cut %s', (_, cut) => {
    build(cut, [8])
    const source = memory.regions[0]!.bytes.slice(64, 88)
    for (let at = 0; at <= 24; at++) {
      for (const length of [0, 1, 7, 24 - at, 30]) {
        const target = new Uint8Array(40)
        const there = Math.min(length, 24 - at)
        expect(chain.copyFrom(at, target, 2, length)).toBe(there)
        expect(target.subarray(2, 2 + there)).toEqual(source.subarray(at, at + there))
        expect(target.subarray(0, 2)).toEqual(new Uint8Array(2))
        expect(target.subarray(2 + there)).toEqual(new Uint8Array(38 - there))
      }
    }
  })

  test('beyond the end takes nothing', () => {
    build([24])
    expect(chain.copyFrom(25, new Uint8Array(4), 0, 4)).toBe(0)
    expect(chain.copyFrom(2 ** 40, new Uint8Array(4), 0, 4)).toBe(0)
  })
})

describe('Chain.copyTo', () => {
  test.each(cuts.map((cut) => [cut.join('+'), cut] as const))('fills any range of bytes cut %s', (_, cut) => {
    build([4], cut)
    const { bytes } = memory.regions[1]!
    const source = Uint8Array.from({ length: 40 }, (_, i) => 100 + i)
    for (let at = 0; at <= 24; at++) {
      for (const length of [0, 1, 7, 24 - at, 30]) {
        bytes.fill(0)
        const there = Math.min(length, 24 - at)
        expect(chain.copyTo(at, source, 3, length)).toBe(there)
        const expected = new Uint8Array(PAGE)
        expected.set(source.subarray(3, 3 + there), 64 + at)
        expect(Buffer.compare(bytes, expected)).toBe(0)
      }
    }
  })

  test('goes across adjacent regions', () => {
    chain.append(memory, PAGE - 2, 4, true)
    expect(chain.copyTo(0, Uint8Array.of(1, 2, 3, 4), 0, 4)).toBe(4)
    expect([PAGE - 2, PAGE - 1, PAGE, PAGE + 1].map(byteAt)).toEqual([1, 2, 3, 4])
  })
})

describe('Chain.aligned', () => {
  const SECTOR = 512

  test('one aligned buffer', () => {
    chain.append(memory, 512, 1024, true)
    expect(chain.aligned(true, 0, 1024, SECTOR, SECTOR)).toBe(true)
    expect(chain.aligned(true, 512, 512, SECTOR, SECTOR)).toBe(true)
    expect(chain.aligned(true, 4, 512, SECTOR, SECTOR)).toBe(false)
    expect(chain.aligned(true, 4, 512, 4, SECTOR)).toBe(true)
    expect(chain.aligned(true, 0, 1023, SECTOR, SECTOR)).toBe(false)
  })

  test('looks at the address in this process, not at the guest’s', () => {
    const odd = new GuestMemory([{ gpa: 0, size: PAGE, hva: 0x1000_0010, buffer: new ArrayBuffer(PAGE) }])
    chain.begin(odd)
    chain.append(odd, 512, 512, true)
    chain.append(odd, 496, 512, true)
    expect(chain.aligned(true, 0, 512, SECTOR, SECTOR)).toBe(false)
    expect(chain.aligned(true, 512, 512, SECTOR, SECTOR)).toBe(true)
  })

  test('skips the header in a readable part, alone or in the first descriptor', () => {
    chain.append(memory, 1000, 16, false)
    chain.append(memory, 2048, 512, false)
    expect(chain.aligned(false, 16, 512, SECTOR, SECTOR)).toBe(true)
    expect(chain.aligned(false, 0, 528, SECTOR, SECTOR)).toBe(false)
    chain.begin(memory)
    chain.append(memory, 1008, 528, false)
    expect(chain.aligned(false, 16, 512, SECTOR, SECTOR)).toBe(true)
  })

  test('every piece counts', () => {
    chain.append(memory, 0, 512, true)
    chain.append(memory, 1024, 100, true)
    chain.append(memory, 1536, 412, true)
    chain.append(memory, 2048, 512, true)
    expect(chain.aligned(true, 0, 512, SECTOR, SECTOR)).toBe(true)
    expect(chain.aligned(true, 0, 1024, SECTOR, SECTOR)).toBe(false)
    expect(chain.aligned(true, 1024, 512, SECTOR, SECTOR)).toBe(true)
  })

  test('the other part and what is behind the range do not matter', () => {
    chain.append(memory, 3, 5, false)
    chain.append(memory, 512, 512, true)
    chain.append(memory, 1025, 1, true)
    expect(chain.aligned(true, 0, 512, SECTOR, SECTOR)).toBe(true)
    expect(chain.aligned(false, 0, 5, 1, 1)).toBe(true)
  })

  test('empty segments and a range that starts at a border', () => {
    chain.append(memory, 512, 512, true)
    chain.append(memory, 7, 0, true)
    chain.append(memory, 2048, 512, true)
    expect(chain.aligned(true, 0, 1024, SECTOR, SECTOR)).toBe(true)
    expect(chain.aligned(true, 512, 512, SECTOR, SECTOR)).toBe(true)
    expect(chain.aligned(true, 1024, 0, SECTOR, SECTOR)).toBe(true)
  })
})

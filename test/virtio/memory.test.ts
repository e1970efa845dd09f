import { describe, expect, test } from 'vitest'
import { GuestMemory, IOTLB_WRITE, MemoryRegion, type RegionDescription } from '../../src/virtio/memory.ts'

const PAGE = 4096
const region = (gpa: number, size: number, hva = 0): RegionDescription => ({
  gpa,
  size,
  hva,
  buffer: new ArrayBuffer(size),
})

describe('GuestMemory', () => {
  test('without regions finds nothing', () => {
    const memory = new GuestMemory([])
    expect(memory.find(0)).toBe(-1)
    expect(memory.contiguous(0, 0)).toBeUndefined()
  })

  test('finds the first and the last byte of a region, and not the bytes beside it', () => {
    const memory = new GuestMemory([region(PAGE, 2 * PAGE)])
    expect([PAGE - 1, PAGE, 3 * PAGE - 1, 3 * PAGE].map((gpa) => memory.find(gpa))).toEqual([-1, 0, 0, -1])
  })

  test('sorts regions by address', () => {
    const memory = new GuestMemory([region(8 * PAGE, PAGE), region(0, PAGE), region(4 * PAGE, PAGE)])
    expect(memory.regions.map(({ gpa }) => gpa)).toEqual([0, 4 * PAGE, 8 * PAGE])
    expect(memory.regions.map(({ gpa }) => memory.find(gpa))).toEqual([0, 1, 2])
  })

  test('finds no byte of a hole, whichever region was hit last', () => {
    const memory = new GuestMemory([region(0, PAGE), region(2 * PAGE, PAGE), region(4 * PAGE, PAGE)])
    for (const last of [0, 2 * PAGE, 4 * PAGE]) {
      for (const hole of [PAGE, 2 * PAGE - 1, 3 * PAGE, 4 * PAGE - 1, 5 * PAGE]) {
        expect(memory.find(last)).toBe(last / (2 * PAGE))
        expect(memory.find(hole), `${hole} after ${last}`).toBe(-1)
      }
    }
  })

  test('tells adjacent regions apart at their border', () => {
    const memory = new GuestMemory([region(0, PAGE), region(PAGE, PAGE)])
    expect([PAGE - 1, PAGE, PAGE - 1].map((gpa) => memory.find(gpa))).toEqual([0, 1, 0])
  })

  test('takes every region of many in any order of look-ups', () => {
    const memory = new GuestMemory(Array.from({ length: 509 }, (_, i) => region(i * 3 * PAGE, PAGE)))
    for (let i = 0; i < 509; i++) {
      const index = (i * 197) % 509
      expect(memory.find(index * 3 * PAGE)).toBe(index)
      expect(memory.find(index * 3 * PAGE + PAGE - 1)).toBe(index)
      expect(memory.find(index * 3 * PAGE + PAGE)).toBe(-1)
    }
  })

  test.each([
    ['4 GiB', 2 ** 32],
    ['16 TiB', 2 ** 44],
    ['the last page below 2^53', 2 ** 53 - PAGE],
  ])('serves guest addresses at %s', (_, gpa) => {
    const memory = new GuestMemory([region(0, PAGE), region(gpa, PAGE)])
    expect(memory.find(gpa)).toBe(1)
    expect(memory.find(gpa + PAGE - 1)).toBe(1)
    expect(memory.find(gpa - 1)).toBe(-1)
    expect(memory.find(gpa + PAGE)).toBe(-1)
    expect(memory.contiguous(gpa + PAGE - 16, 16)).toBe(memory.regions[1])
    expect(memory.contiguous(gpa + PAGE - 16, 17)).toBeUndefined()
  })

  test.each([2 ** 53, 2 ** 63, 2 ** 64 - 2048, 2 ** 64])('finds nothing at %d', (gpa) => {
    expect(new GuestMemory([region(0, PAGE), region(2 ** 53 - PAGE, PAGE)]).find(gpa)).toBe(-1)
  })
})

describe('GuestMemory of regions that are there', () => {
  test('takes them as they are, sorted, and makes only the others', () => {
    const first = new MemoryRegion(region(4 * PAGE, PAGE))
    const memory = new GuestMemory([first, region(0, PAGE)], true)
    expect(memory.translated).toBe(true)
    expect(memory.regions[1]).toBe(first)
    expect(memory.regions[0]!.gpa).toBe(0)
  })

  test('keeps where they start in their buffer', () => {
    const buffer = new SharedArrayBuffer(4 * PAGE)
    const piece = new MemoryRegion({ gpa: 0, size: PAGE, hva: 0, buffer, offset: 2 * PAGE })
    const [again] = new GuestMemory([piece]).regions
    again!.bytes[3] = 9
    expect(new Uint8Array(buffer)[2 * PAGE + 3]).toBe(9)
  })
})

describe('GuestMemory.contiguous', () => {
  const memory = new GuestMemory([region(0, PAGE), region(PAGE, PAGE), region(3 * PAGE, PAGE)])

  test.each([
    ['a whole region', 0, PAGE, 0],
    ['its last byte', PAGE - 1, 1, 0],
    ['nothing at its last byte', PAGE - 1, 0, 0],
    ['the whole second one', PAGE, PAGE, 1],
  ])('has %s', (_, gpa, length, index) => {
    expect(memory.contiguous(gpa, length)).toBe(memory.regions[index])
  })

  test.each([
    ['a range across adjacent regions', PAGE - 1, 2],
    ['one byte too many', 0, PAGE + 1],
    ['a range into a hole', 2 * PAGE - 1, 2],
    ['a range in a hole', 2 * PAGE, 1],
    ['a range behind all', 4 * PAGE, 1],
    ['2^53 bytes', 0, 2 ** 53],
  ])('refuses %s', (_, gpa, length) => {
    expect(memory.contiguous(gpa, length)).toBeUndefined()
  })
})

describe('MemoryRegion', () => {
  test('is readable and writable, and at its GPA in the log, unless it is said otherwise', () => {
    expect(new MemoryRegion(region(7 * PAGE, PAGE))).toMatchObject({ start: 0, physical: 7 * PAGE, access: 3 })
    const { physical, access } = new MemoryRegion({ ...region(7 * PAGE, PAGE), physical: PAGE, access: IOTLB_WRITE })
    expect([physical, access]).toEqual([PAGE, 2])
  })

  test('has exactly `size` bytes of a larger buffer', () => {
    const buffer = new SharedArrayBuffer(3 * PAGE)
    const { bytes, words, end } = new MemoryRegion({ gpa: 7 * PAGE, size: PAGE, hva: 1, buffer })
    expect([bytes.length, words.length, end]).toEqual([PAGE, PAGE / 4, 8 * PAGE])
  })

  test('words and bytes are the same memory, little-endian', () => {
    const { bytes, words } = new MemoryRegion(region(0, PAGE))
    words[1] = 0x0403_0201
    expect([...bytes.subarray(4, 8)]).toEqual([1, 2, 3, 4])
  })
})

/** The control thread's copy of the IOTLB against a page table that is nothing but an array. */
import { describe, expect, test } from 'vitest'
import type { MappedRegion, MemoryTable, RegionPiece } from '../../src/vhost-user/memory-table.ts'
import { describeTranslation, MAX_TRANSLATIONS, Translations } from '../../src/vhost-user/translations.ts'

const PAGE = 4096
const UVA = 0x10_0000_0000

/** Regions of `pages` pages each, one behind the other in front-end addresses and apart in guest memory. */
function memory(...pages: number[]): MemoryTable {
  let uva = UVA
  const regions = pages.map((count, i) => {
    const region = { uva, gpa: i * 0x100_0000, size: count * PAGE, hva: i, buffer: new SharedArrayBuffer(0) }
    uva += count * PAGE
    return region as MappedRegion
  })
  const pieces = (from: number, size: number): RegionPiece[] | undefined => {
    const found: RegionPiece[] = []
    for (let done = 0; done < size; ) {
      const region = regions.find((one) => from + done >= one.uva && from + done < one.uva + one.size)
      if (region === undefined) return undefined
      const offset = from + done - region.uva
      const length = Math.min(size - done, region.size - offset)
      found.push({ region, offset, size: length })
      done += length
    }
    return found
  }
  return { regions, pieces } as unknown as MemoryTable
}

test('random updates and invalidations are those of a page table', () => {
  let seed = 7
  const random = (below: number): number => {
    seed = (seed * 1103515245 + 12345) & 0x7fff_ffff
    return (seed >>> 8) % below
  }
  const PAGES = 64
  for (let round = 0; round < 50; round++) {
    const translations = new Translations()
    const table: ({ uva: number; access: number } | undefined)[] = new Array(PAGES).fill(undefined)
    for (let step = 0; step < 60; step++) {
      const first = random(PAGES)
      const count = 1 + random(PAGES - first)
      if (random(3) === 0) {
        translations.invalidate(first * PAGE, count * PAGE)
        table.fill(undefined, first, first + count)
      } else {
        const uva = UVA + random(1000) * PAGE
        const access = 1 + random(3)
        translations.update({ iova: first * PAGE, size: count * PAGE, uva, access })
        for (let i = 0; i < count; i++) table[first + i] = { uva: uva + i * PAGE, access }
      }
      const seen: typeof table = new Array(PAGES).fill(undefined)
      let end = 0
      for (const { iova, size, uva, access } of translations.entries) {
        expect(iova).toBeGreaterThanOrEqual(end)
        expect(size).toBeGreaterThan(0)
        end = iova + size
        for (let at = 0; at < size; at += PAGE) seen[(iova + at) / PAGE] = { uva: uva + at, access }
      }
      expect(seen).toEqual(table)
    }
  }
})

describe('a guest-physical address', () => {
  const table = memory(4, 4)

  test('goes over entries and pages that lie one behind the other', () => {
    const translations = new Translations()
    translations.update({ iova: 0x8000, size: PAGE, uva: UVA, access: 3 })
    translations.update({ iova: 0x9000, size: 2 * PAGE, uva: UVA + PAGE, access: 1 })
    expect(translations.physical(0x8010, 3 * PAGE - 16, table)).toBe(16)
    expect(translations.physical(0x9800, PAGE, table)).toBe(0x1800)
    expect(translations.physical(0x8010, 3 * PAGE, table)).toBeUndefined()
    expect(translations.physical(0x7fff, 2, table)).toBeUndefined()
  })

  test('is none where the entries are apart in guest memory', () => {
    const translations = new Translations()
    translations.update({ iova: 0x8000, size: 2 * PAGE, uva: UVA + 3 * PAGE, access: 3 })
    expect(translations.physical(0x8000, PAGE, table)).toBe(3 * PAGE)
    expect(translations.physical(0x9000, PAGE, table)).toBe(0x100_0000)
    expect(translations.physical(0x8000, 2 * PAGE, table)).toBeUndefined()
    translations.update({ iova: 0x8000, size: PAGE, uva: UVA + PAGE, access: 3 })
    translations.update({ iova: 0x9000, size: PAGE, uva: UVA, access: 3 })
    expect(translations.physical(0x8000, 2 * PAGE, table)).toBeUndefined()
  })
})

test('an entry outside of the memory is none', () => {
  const entry = { iova: 0, size: 2 * PAGE, uva: UVA + 3 * PAGE, access: 3 }
  expect(describeTranslation(entry, memory(4))).toBeUndefined()
  expect(describeTranslation(entry, memory(4, 1))?.map(({ gpa, size }) => [gpa, size])).toEqual([
    [0, PAGE],
    [PAGE, PAGE],
  ])
})

test('there is an end to what it remembers', () => {
  const translations = new Translations()
  for (let i = 0; i < MAX_TRANSLATIONS + 10; i++) {
    translations.update({ iova: 2 * i * PAGE, size: PAGE, uva: UVA, access: 3 })
  }
  expect(translations.entries.length).toBe(MAX_TRANSLATIONS)
  expect(translations.entries.at(-1)?.iova).toBe(2 * (MAX_TRANSLATIONS + 9) * PAGE)
  const pieces = Array.from({ length: 100 }, (_, i) => ({ iova: (1 + i) * PAGE, size: PAGE, uva: UVA, access: 3 }))
  translations.update(...pieces)
  expect(translations.entries.length).toBeLessThanOrEqual(MAX_TRANSLATIONS)
  expect(translations.entries.slice(0, 100)).toEqual(pieces)
  // Cutting one makes two of it: still bounded by what comes next.
  translations.update({ iova: 0, size: 2 ** 40, uva: UVA, access: 3 })
  translations.invalidate(PAGE, PAGE)
  expect(translations.entries.length).toBe(2)
})

/** The internet checksum, beside the plainest way to compute it and RFC 1071's own example. */
import { expect, test } from 'vitest'
import { completeChecksum, fold, sum } from '../../devices/net/checksum.ts'
import { slowSum } from './frames.ts'

const viewOf = (bytes: ArrayLike<number>) => new DataView(Uint8Array.from(bytes).buffer)

test('RFC 1071 §3', () => {
  expect(sum(viewOf([0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), 0, 8)).toBe(0xddf2)
})

test('every start and length around the step of the fast loop', () => {
  const bytes = Uint8Array.from({ length: 100 }, (_, i) => (i * 167 + 201) & 0xff)
  const view = new DataView(bytes.buffer)
  for (let start = 0; start < 20; start++) {
    for (let end = start; end <= 100; end++) expect(sum(view, start, end)).toBe(slowSum(bytes, start, end))
  }
})

test('a view of a part of a buffer', () => {
  const bytes = Uint8Array.from({ length: 64 }, (_, i) => i * 3)
  expect(sum(new DataView(bytes.buffer, 7, 40), 2, 39)).toBe(slowSum(bytes, 9, 46))
})

test('carries: nothing but ones, and the largest frame', () => {
  for (const length of [2, 15, 16, 17, 65_557, 96 * 1024]) {
    const bytes = new Uint8Array(length).fill(0xff)
    expect(sum(new DataView(bytes.buffer), 0, length)).toBe(slowSum(bytes))
  }
})

test('fold', () => {
  expect(fold(0)).toBe(0)
  expect(fold(0xffff)).toBe(0xffff)
  expect(fold(0x1_0000)).toBe(1)
  expect(fold(0x1_ffff)).toBe(1)
  expect(fold(0xffff_ffff)).toBe(0xffff)
})

test.each([0, 1])('completeChecksum of a frame at offset %i touches its two bytes only', (at) => {
  const bytes = Uint8Array.from({ length: 80 }, (_, i) => (i * 31 + 5) & 0xff)
  const before = bytes.slice()
  completeChecksum(new DataView(bytes.buffer), at, 71, 34, 16)
  const field = at + 34 + 16
  const expected = ~slowSum(before, at + 34, at + 71) & 0xffff
  expect([bytes[field], bytes[field + 1]]).toEqual([expected >> 8, expected & 255])
  bytes.set(before.subarray(field, field + 2), field)
  expect(bytes).toEqual(before)
})

test('completeChecksum puts 0xffff for 0', () => {
  const bytes = new Uint8Array(60)
  bytes.set([0xff, 0xff], 40)
  completeChecksum(new DataView(bytes.buffer), 0, 60, 34, 6)
  expect([...bytes.subarray(40, 42)]).toEqual([0xff, 0xff])
})

test('completeChecksum at the very end of a frame', () => {
  const bytes = Uint8Array.of(...Array(14).fill(1), 0x12, 0x34)
  completeChecksum(new DataView(bytes.buffer), 0, 16, 14, 0)
  expect([...bytes.subarray(14)]).toEqual([0xed, 0xcb])
})

/** The judge of the kill tests must see what it is there for. */
import { describe, expect, test } from 'vitest'
import { DiskModel, SECTOR } from './model.ts'

const WORDS = SECTOR / 4

/** A disk of 64 sectors, the first 8 of them written `times` times; and what the last write brought. */
function written(times: number): { model: DiskModel; bytes: Uint32Array; before: Uint32Array } {
  const model = new DiskModel(77, 64)
  let bytes = new Uint32Array(8 * WORDS)
  let before = bytes
  for (let i = 0; i < times; i++) {
    before = bytes
    bytes = new Uint32Array(8 * WORDS)
    expect(model.claim(0, 8, true)).toBe(true)
    model.fill(bytes, 0, 8)
    model.written(0, 8, false)
  }
  return { model, bytes, before }
}

describe('the model of a disk', () => {
  test('accepts what was acknowledged last', () => {
    const { model, bytes } = written(3)
    model.check(bytes, 0, 8, 'it')
    model.check(new Uint32Array(8 * WORDS), 8, 8, 'the fresh part')
    expect(model.claim(4, 8, true)).toBe(true)
    model.written(4, 8, true)
    model.check(new Uint32Array(8 * WORDS), 4, 8, 'the zeroed part')
    model.check(bytes.subarray(0, 4 * WORDS), 0, 4, 'what is beside it')
  })

  test('sees a lost write', () => {
    const { model, before } = written(3)
    expect(() => model.check(before, 0, 8, 'it')).toThrow('it: sector 0 must be version 3 and is version 2')
    expect(() => model.check(new Uint32Array(8 * WORDS), 0, 8, 'it')).toThrow('must be version 3 and is version 0')
  })

  test('sees a torn sector', () => {
    const { model, bytes, before } = written(2)
    bytes.set(before.subarray(5 * WORDS + 100, 6 * WORDS), 5 * WORDS + 100)
    expect(() => model.check(bytes, 0, 8, 'it')).toThrow(/sector 5 must be version 2 and is 100 of its 128 words/)
  })

  test('sees a single wrong word', () => {
    const { model, bytes } = written(1)
    bytes[8 * WORDS - 1] = (bytes[8 * WORDS - 1] ?? 0) ^ 1
    expect(() => model.check(bytes, 0, 8, 'it')).toThrow(/sector 7 must be version 1 and is 127 of its 128 words/)
  })

  test('sees a write that was replayed after a later one, and one in the wrong place', () => {
    const { model, bytes } = written(1)
    expect(model.claim(0, 8, true)).toBe(true)
    model.written(0, 8, true)
    expect(() => model.check(bytes, 0, 8, 'it')).toThrow('must be zeroes (version 2) and is version 1')
    expect(() => model.check(bytes, 8, 8, 'it')).toThrow('labelled as version 1 of sector 0')
  })

  test('lets reads share sectors, and gives a write all of its own', () => {
    const model = new DiskModel(1, 64)
    expect(model.claim(0, 8, false)).toBe(true)
    expect(model.claim(4, 8, false)).toBe(true)
    expect(model.claim(11, 4, true)).toBe(false)
    model.read(4, 8)
    expect(model.claim(11, 4, true)).toBe(true)
    expect(model.claim(14, 4, false)).toBe(false)
    expect(model.claim(7, 1, true)).toBe(false)
    expect(model.claim(15, 4, false)).toBe(true)
  })
})

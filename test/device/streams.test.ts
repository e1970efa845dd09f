/** Readers and writers of chains, each in a simple and in the most awkward framing. */
import { describe, expect, test } from 'vitest'
import { type AsyncChain, ChainBook } from '../../src/device/async-chain.ts'
import type { QueueContext } from '../../src/device/index.ts'
import { frame, writableBytes } from '../../src/testing/plain-frame.ts'
import { UNTOUCHED } from '../../src/testing/reply.ts'
import { Chain } from '../../src/virtio/chain.ts'

/** 0, 1, 2, … */
const counting = (length: number): Uint8Array => Uint8Array.from({ length }, (_, i) => i % 251)

interface Given {
  readonly completed: { written: number; operation: number; bytes: number }[]
  readonly errors: number[]
  readonly chain: AsyncChain
  readonly raw: Chain
  readonly book: ChainBook
}

function chainOf(readable: Uint8Array | Uint8Array[], writable: number, split = false): Given {
  const completed: Given['completed'] = []
  const errors: number[] = []
  const context = {
    queueIndex: 2,
    queueSize: 16,
    complete: (_chain: Chain, written: number, operation: number, bytes: number) =>
      completed.push({ written, operation, bytes }),
    countError: (kind: number) => errors.push(kind),
  } as unknown as QueueContext
  const book = new ChainBook(context, { operations: ['first', 'second'], errors: ['bad', 'worse'] }, true)
  const raw = new Chain(5)
  frame(raw, [readable].flat(), writable, split)
  return { chain: book.lend(raw), raw, book, completed, errors }
}

describe.each([false, true])('reader, split: %s', (split) => {
  test('reads little-endian numbers front to back', () => {
    const { reader } = chainOf(counting(20), 0, split).chain
    expect(reader.u8()).toBe(0x00)
    expect(reader.u16()).toBe(0x0201)
    expect(reader.u32()).toBe(0x06050403)
    expect(reader.u64()).toBe(0x0e0d0c0b0a090807n)
    expect(reader.position).toBe(15)
    expect(reader.remaining).toBe(5)
    expect(reader.length).toBe(20)
  })

  test('numbers have no sign', () => {
    const { reader } = chainOf(new Uint8Array(15).fill(0xff), 0, split).chain
    expect([reader.u8(), reader.u16(), reader.u32(), reader.u64()]).toEqual([
      0xff,
      0xffff,
      0xffff_ffff,
      0xffff_ffff_ffff_ffffn,
    ])
  })

  test('copies bytes: some, or all that remain', () => {
    const data = counting(10_000)
    const { reader } = chainOf(data, 0, split).chain
    expect(reader.bytes(3)).toEqual(data.subarray(0, 3))
    expect(reader.bytes(0)).toEqual(new Uint8Array(0))
    expect(reader.bytes()).toEqual(data.subarray(3))
    expect(reader.bytes()).toEqual(new Uint8Array(0))
  })

  test('copies into a target as much as remains and fits', () => {
    const data = counting(100)
    const { reader } = chainOf(data, 0, split).chain
    const target = new Uint8Array(64)
    expect(reader.into(target)).toBe(64)
    expect(target).toEqual(data.subarray(0, 64))
    expect(reader.into(target)).toBe(36)
    expect(target.subarray(0, 36)).toEqual(data.subarray(64))
    expect(reader.into(target)).toBe(0)
  })

  test('goes to any position', () => {
    const { reader } = chainOf(counting(40), 0, split).chain
    expect(reader.seek(30).u8()).toBe(30)
    expect(reader.seek(2).skip(4).u8()).toBe(6)
    expect(reader.seek(40).remaining).toBe(0)
  })
})

describe('reader', () => {
  test('what it returned is a copy: the guest may change its memory', () => {
    const { chain, raw } = chainOf(counting(8), 0)
    const bytes = chain.reader.bytes()
    raw.first.bytes.fill(0xee)
    expect(bytes).toEqual(counting(8))
  })

  test('buffers of the driver follow one another', () => {
    const { reader } = chainOf([Uint8Array.of(1, 2), Uint8Array.of(3), Uint8Array.of(4, 5)], 0).chain
    expect(reader.u32()).toBe(0x04030201)
  })

  test.each([
    ['u8', 3, 1],
    ['u16', 2, 2],
    ['u32', 0, 4],
    ['u64', 0, 8],
  ] as const)('%s beyond the end is a ChainError', (method, at, size) => {
    const { reader } = chainOf(counting(3), 9).chain
    reader.seek(at)
    expect(() => reader[method]()).toThrow(
      expect.objectContaining({
        name: 'ChainError',
        message: `chain 5 has 3 device-readable bytes, the handler reads ${size} at ${at}`,
      })
    )
    expect(reader.position).toBe(at)
  })

  test('bytes and skip beyond the end are too, and nothing is allocated for them', () => {
    const { reader } = chainOf(counting(3), 0).chain
    const message = 'chain 5 has 3 device-readable bytes, the handler reads 16 at 0'
    expect(() => reader.bytes(16)).toThrow(expect.objectContaining({ name: 'ChainError', message }))
    expect(() => reader.bytes(2 ** 50)).toThrow('reads 1125899906842624 at 0')
    expect(() => reader.skip(4)).toThrow('the handler reads 4 at 0')
    expect(reader.position).toBe(0)
  })

  test('all that remains is at most 16 MiB, or is asked for by its number', () => {
    const { reader } = chainOf(new Array<Uint8Array>(17).fill(new Uint8Array(2 ** 20)), 0).chain
    const message =
      'chain 5 has 17825792 more device-readable bytes, the handler reads all of them and expects at most 16777216'
    expect(() => reader.bytes()).toThrow(expect.objectContaining({ name: 'ChainError', message }))
    expect(reader.position).toBe(0)
    expect(reader.skip(2 ** 20).bytes()).toHaveLength(2 ** 24)
    expect(reader.seek(0).bytes(reader.length)).toHaveLength(17 * 2 ** 20)
  })

  test.each([-1, 4, 0.5, Number.NaN])('a seek to %s is a RangeError', (position) => {
    const { reader } = chainOf(counting(3), 0).chain
    expect(() => reader.seek(position)).toThrow(new RangeError(`seek: ${position} is not a position from 0 to 3`))
  })

  test.each([-1, 1.5, Number.NaN])('%s is no number of bytes', (count) => {
    const { reader } = chainOf(counting(3), 0).chain
    expect(() => reader.bytes(count)).toThrow(new RangeError(`bytes: ${count} is not a number of bytes`))
    expect(() => reader.skip(count)).toThrow(new RangeError(`skip: ${count} is not a number of bytes`))
  })

  test('a chain without a device-readable part has nothing to read', () => {
    const { reader } = chainOf([], 4).chain
    expect(reader.length).toBe(0)
    expect(reader.bytes()).toHaveLength(0)
    expect(() => reader.u8()).toThrow('chain 5 has 0 device-readable bytes')
  })
})

describe.each([false, true])('writer, split: %s', (split) => {
  test('writes little-endian numbers front to back', () => {
    const { chain, raw } = chainOf(counting(3), 20, split)
    const { writer } = chain
    writer.u8(0x01).u16(0x0302).u32(0x07060504).u64(0x0f0e0d0c0b0a0908n)
    expect([...writableBytes(raw)]).toEqual([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, ...untouched(5)])
    expect([writer.position, writer.remaining, writer.length, writer.written]).toEqual([15, 5, 20, 15])
  })

  test('writes the largest numbers', () => {
    const { chain, raw } = chainOf([], 15, split)
    chain.writer.u8(0xff).u16(0xffff).u32(0xffff_ffff).u64(0xffff_ffff_ffff_ffffn)
    expect(writableBytes(raw)).toEqual(new Uint8Array(15).fill(0xff))
  })

  test('writes bytes and fills', () => {
    const { chain, raw } = chainOf([], 10_000, split)
    const data = counting(5000)
    chain.writer.bytes(data).fill(4000, 7).fill(999).bytes(Uint8Array.of(9))
    const all = writableBytes(raw)
    expect(all.subarray(0, 5000)).toEqual(data)
    expect(all.subarray(5000, 9000)).toEqual(new Uint8Array(4000).fill(7))
    expect(all.subarray(9000)).toEqual(Uint8Array.of(...new Array(999).fill(0), 9))
  })

  test('fills across pieces from the middle of one, and not a byte more', () => {
    const { chain, raw } = chainOf([], 100, split)
    chain.writer.seek(10).fill(77, 1)
    expect([...writableBytes(raw)]).toEqual([...untouched(10), ...new Array(77).fill(1), ...untouched(13)])
  })

  test('a number across two pieces', () => {
    const { chain, raw } = chainOf([], 40, split)
    for (let at = 0; at < 36; at++) {
      chain.writer.seek(at).u32(0x04030201)
      expect([...writableBytes(raw).subarray(at, at + 4)]).toEqual([1, 2, 3, 4])
    }
  })

  test('written is the end of the farthest write', () => {
    const { writer } = chainOf([], 100, split).chain
    writer.seek(50).u16(1).seek(0).u32(1)
    expect(writer.written).toBe(52)
    expect(writer.position).toBe(4)
  })
})

const untouched = (count: number): number[] => new Array<number>(count).fill(UNTOUCHED)

describe('writer', () => {
  test.each([
    ['u8', (c: AsyncChain) => c.writer.u8(1), 3, 1],
    ['u16', (c: AsyncChain) => c.writer.u16(1), 2, 2],
    ['u32', (c: AsyncChain) => c.writer.u32(1), 0, 4],
    ['u64', (c: AsyncChain) => c.writer.u64(1n), 0, 8],
    ['bytes', (c: AsyncChain) => c.writer.bytes(new Uint8Array(4)), 0, 4],
    ['fill', (c: AsyncChain) => c.writer.fill(4), 0, 4],
  ] as const)('%s beyond the end names the chain, and nothing of it is done', (_, write, at, size) => {
    const { chain, raw } = chainOf([], 3)
    chain.writer.seek(at)
    expect(() => write(chain)).toThrow(
      expect.objectContaining({
        name: 'DeviceError',
        code: 'ERR_DEVICE_OVERRUN',
        message: `chain 5 has 3 device-writable bytes, the handler writes ${size} at ${at}`,
      })
    )
    expect([...writableBytes(raw)]).toEqual(untouched(3))
    expect([chain.writer.position, chain.writer.written]).toEqual([at, 0])
  })

  test.each([
    ['u8', 300, 255],
    ['u8', -1, 255],
    ['u8', 1.5, 255],
    ['u16', 65536, 65535],
    ['u32', 2 ** 32, 2 ** 32 - 1],
    ['u32', Number.NaN, 2 ** 32 - 1],
  ] as const)('%s(%s) is a RangeError', (method, value, max) => {
    const { writer } = chainOf([], 16).chain
    expect(() => writer[method](value)).toThrow(
      new RangeError(`${method}: ${value} is not an integer from 0 to ${max}`)
    )
    expect(writer.position).toBe(0)
  })

  test.each([-1n, 1n << 64n])('u64(%s) is a RangeError', (value) => {
    const { writer } = chainOf([], 16).chain
    expect(() => writer.u64(value)).toThrow(new RangeError(`u64: ${value} is not a bigint from 0 to 2^64 - 1`))
  })

  test('u64 of a number is refused, not rounded', () => {
    const { writer } = chainOf([], 16).chain
    expect(() => writer.u64(5 as unknown as bigint)).toThrow('u64: 5 is not a bigint')
  })

  test('a fill with no byte, or of no number of bytes', () => {
    const { writer } = chainOf([], 16).chain
    expect(() => writer.fill(2, 256)).toThrow(new RangeError('fill: 256 is not an integer from 0 to 255'))
    expect(() => writer.fill(-1)).toThrow(new RangeError('fill: -1 is not a number of bytes'))
  })
})

describe('a chain', () => {
  test('has one reader and one writer, made when they are asked for', () => {
    const { chain } = chainOf(counting(4), 4)
    expect(chain.reader).toBe(chain.reader)
    expect(chain.writer).toBe(chain.writer)
    expect(chain.head).toBe(5)
  })

  test('is completed with what was written, counted as the first operation with 0 bytes', () => {
    const { chain, completed } = chainOf([], 10)
    chain.writer.u32(1)
    chain.complete()
    expect(completed).toEqual([{ written: 4, operation: 0, bytes: 0 }])
  })

  test('without a write that is 0', () => {
    const { chain, completed } = chainOf([], 10)
    chain.complete()
    expect(completed).toEqual([{ written: 0, operation: 0, bytes: 0 }])
  })

  test('or with what it is told, as what it is told', () => {
    const { chain, completed } = chainOf([], 10)
    chain.operation('second', 512)
    chain.complete(10)
    expect(completed).toEqual([{ written: 10, operation: 1, bytes: 512 }])
  })

  test('counts errors by their kind', () => {
    const { chain, errors } = chainOf([], 10)
    chain.error('worse')
    chain.error('bad')
    expect(errors).toEqual([1, 0])
  })

  test('names that the device has not declared', () => {
    const { chain } = chainOf([], 10)
    expect(() => chain.operation('third')).toThrow(
      new TypeError("operation: there is no 'third' in the device's operations: first, second")
    )
    expect(() => chain.error('third')).toThrow(
      new TypeError("error: there is no 'third' in the device's errors: bad, worse")
    )
    expect(() => chain.operation('first', -1)).toThrow(new RangeError('operation: -1 is not a number of bytes'))
  })

  test('cannot be completed with more than it holds, nor with half a byte', () => {
    const { chain, completed } = chainOf([], 10)
    expect(() => chain.complete(11)).toThrow(
      expect.objectContaining({
        code: 'ERR_DEVICE_OVERRUN',
        message: 'chain 5 has 10 device-writable bytes, the handler completes it with 11',
      })
    )
    expect(() => chain.complete(1.5)).toThrow(new RangeError('complete: 1.5 is not a number of bytes'))
    expect(() => chain.complete(-1)).toThrow(RangeError)
    expect(completed).toEqual([])
  })

  test('completed twice', () => {
    const { chain, completed } = chainOf([], 10)
    chain.complete()
    expect(() => chain.complete()).toThrow(
      expect.objectContaining({
        name: 'DeviceError',
        code: 'ERR_DEVICE_COMPLETED_TWICE',
        message: 'chain 5 of queue 2 was completed twice',
      })
    )
    expect(completed).toHaveLength(1)
  })

  test('every use after it was completed throws, also by a reader or writer that was there before', () => {
    const { chain, raw } = chainOf(counting(8), 10)
    const { reader, writer } = chain
    reader.u8()
    writer.u8(1)
    chain.complete()
    const uses = [
      () => reader.u8(),
      () => reader.bytes(),
      () => reader.into(new Uint8Array(1)),
      () => reader.length,
      () => reader.remaining,
      () => reader.seek(0),
      () => writer.u8(2),
      () => writer.u64(2n),
      () => writer.bytes(Uint8Array.of(2)),
      () => writer.fill(1, 2),
      () => writer.length,
      () => writer.seek(0),
      () => chain.operation('first'),
      () => chain.error('bad'),
      () => chain.reader.u8(),
    ]
    const used = { code: 'ERR_DEVICE_COMPLETED_TWICE', message: 'chain 5 of queue 2 was used after it was completed' }
    for (const use of uses) expect(use).toThrow(expect.objectContaining(used))
    expect([...writableBytes(raw)]).toEqual([1, ...untouched(9)])
  })

  test('abandoned: what is written or completed has no effect, reading is refused', () => {
    const { chain, raw, book, completed, errors } = chainOf(counting(8), 10)
    chain.writer.u8(1)
    book.abandon()
    chain.writer.u8(2).u16(2).u32(2).bytes(Uint8Array.of(2)).fill(1, 2).seek(0).u64(2n)
    expect([...writableBytes(raw)]).toEqual([1, ...untouched(9)])
    chain.operation('second', 5)
    chain.error('bad')
    chain.complete()
    chain.complete()
    expect([completed, errors]).toEqual([[], []])
    expect(() => chain.reader.bytes()).toThrow(
      expect.objectContaining({
        name: 'DeviceError',
        code: 'ERR_DEVICE_CHAIN_GONE',
        message: 'chain 5 is gone: its ring ended before it was completed',
      })
    )
  })

  test('abandoned: a write beyond its end is still one', () => {
    const { chain, book } = chainOf([], 4)
    book.abandon()
    expect(() => chain.writer.fill(5)).toThrow('chain 5 has 4 device-writable bytes, the handler writes 5 at 0')
  })
})

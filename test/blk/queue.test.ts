/** The queue half of the block device, request by request, with an engine that the test plays. */
import { beforeEach, describe, expect, test, vi } from 'vitest'
import type * as queueModule from '../../devices/blk/queue.ts'
import * as shared from '../../devices/blk/shared.ts'
import * as blk from '../../src/virtio/blk.ts'
import type { Chain } from '../../src/virtio/chain.ts'
import { Bench, header, range } from './fake-context.ts'

const { VIRTIO_BLK_S_OK: OK, VIRTIO_BLK_S_IOERR: IOERR, VIRTIO_BLK_S_UNSUPP: UNSUPP } = blk
const { VIRTIO_BLK_T_IN: IN, VIRTIO_BLK_T_OUT: OUT, VIRTIO_BLK_T_FLUSH: FLUSH, VIRTIO_BLK_T_GET_ID: GET_ID } = blk
const { VIRTIO_BLK_T_DISCARD: DISCARD, VIRTIO_BLK_T_WRITE_ZEROES: WRITE_ZEROES } = blk
const EIO = -5
const EINTR = -4
const EAGAIN = -11
const EINVAL = -22
const ENOSPC = -28
const EOPNOTSUPP = -95
const EDQUOT = -122
const PUNCH = 3
const ZERO = 17

let create: typeof queueModule.createQueueHandler
beforeEach(async () => {
  // The bounce buffers are a module's state, as an iothread has them.
  vi.resetModules()
  create = (await import('../../devices/blk/queue.ts')).createQueueHandler
})

const bytes = (length: number, seed = 1) => Uint8Array.from({ length }, (_, i) => (i * 7 + seed) & 0xff)

/** Expects that a chain, the only one so far, was answered without any I/O. */
function expectRefused(bench: Bench, chain: Chain, operation: number, error: number, status: number): void {
  expect(bench.operations).toEqual([])
  expect(bench.context.completions).toEqual([{ head: chain.head, written: 1, operation, bytes: 0 }])
  expect(bench.context.errors).toEqual([error])
  expect(bench.status(chain)).toBe(status)
}

function expectDone(bench: Bench, chain: Chain, operation: number, written: number, payload: number): void {
  expect(bench.operations).toEqual([])
  expect(bench.context.completions).toEqual([{ head: chain.head, written, operation, bytes: payload }])
  expect(bench.context.errors).toEqual([])
  expect(bench.status(chain)).toBe(OK)
}

describe('IN', () => {
  test('one read into all but the last byte; used length with the status', () => {
    const bench = new Bench(create)
    const chain = bench.handle(bench.chain([header(IN, 8)], [4096, 1]))
    expect(bench.operations).toMatchObject([{ kind: 'read', offset: 4096, start: 0, length: 4096 }])
    expect(bench.context.completions).toEqual([])
    bench.end()
    expectDone(bench, chain, shared.READ, 4097, 4096)
  })

  test.each([
    ['status in the data’s descriptor', [4097]],
    ['data and status cut anywhere', [1, 511, 3584, 1]],
    ['status cut from the last data', [4000, 97]],
  ])('any framing: %s', (_, writable) => {
    const bench = new Bench(create)
    const chain = bench.handle(bench.chain([header(IN, 1).subarray(0, 5), header(IN, 1).subarray(5)], writable))
    expect(bench.end()).toMatchObject({ kind: 'read', offset: 512, start: 0, length: 4096 })
    expectDone(bench, chain, shared.READ, 4097, 4096)
  })

  test('a short read is continued from there', () => {
    const bench = new Bench(create)
    const chain = bench.handle(bench.chain([header(IN, 2)], [4096, 1]))
    bench.end(1000)
    expect(bench.operations).toMatchObject([{ kind: 'read', offset: 2024, start: 1000, length: 3096 }])
    bench.end(1)
    expect(bench.end()).toMatchObject({ offset: 2025, start: 1001, length: 3095 })
    expectDone(bench, chain, shared.READ, 4097, 4096)
  })

  test('EINTR and EAGAIN are tried again, also behind a short read', () => {
    const bench = new Bench(create)
    const chain = bench.handle(bench.chain([header(IN)], [1024, 1]))
    bench.end(EINTR)
    bench.end(24)
    bench.end(EAGAIN)
    expect(bench.end()).toMatchObject({ offset: 24, start: 24, length: 1000 })
    expectDone(bench, chain, shared.READ, 1025, 1024)
  })

  test('the end of the file inside the capacity is an error, not an endless read', () => {
    const bench = new Bench(create)
    const chain = bench.handle(bench.chain([header(IN)], [1024, 1]))
    bench.end(512)
    bench.end(0)
    expectRefused(bench, chain, shared.READ, shared.END_OF_FILE, IOERR)
  })

  test('no data at all succeeds with the status alone', () => {
    const bench = new Bench(create)
    expectDone(bench, bench.handle(bench.chain([header(IN)], [1])), shared.READ, 1, 0)
  })

  test('of a read-only device', () => {
    const bench = new Bench(create, { readOnly: true })
    const chain = bench.handle(bench.chain([header(IN)], [512, 1]))
    bench.end()
    expectDone(bench, chain, shared.READ, 513, 512)
  })
})

describe('OUT', () => {
  test('one write of what follows the header; used length is the status', () => {
    const bench = new Bench(create)
    const chain = bench.handle(bench.chain([header(OUT, 3), bytes(1024)], [1]))
    const operation = bench.end()
    expect(operation).toMatchObject({ kind: 'write', offset: 1536, start: 16, length: 1024, dsync: false })
    expect(operation.bytes).toEqual(bytes(1024))
    expectDone(bench, chain, shared.WRITE, 1, 1024)
  })

  test('any framing: header, data and status cut anywhere', () => {
    const bench = new Bench(create)
    const all = new Uint8Array([...header(OUT, 1), ...bytes(512)])
    const chain = bench.handle(bench.chain([all.subarray(0, 3), all.subarray(3, 20), all.subarray(20)], [5, 3]))
    const operation = bench.end()
    expect(operation).toMatchObject({ offset: 512, length: 512 })
    expect(operation.bytes).toEqual(bytes(512))
    expectDone(bench, chain, shared.WRITE, 1, 512)
    expect([...bench.writable(chain).subarray(0, 5)]).toEqual([0xee, 0xee, 0xee, 0xee, 0xee])
  })

  test('a short write is continued, EINTR and EAGAIN are tried again', () => {
    const bench = new Bench(create)
    const chain = bench.handle(bench.chain([header(OUT), bytes(1024)], [1]))
    bench.end(100)
    bench.end(EAGAIN)
    bench.end(EINTR)
    const rest = bench.end()
    expect(rest).toMatchObject({ offset: 100, start: 116, length: 924 })
    expect(rest.bytes).toEqual(bytes(1024).subarray(100))
    expectDone(bench, chain, shared.WRITE, 1, 1024)
  })

  test('a write of nothing of what is left ends', () => {
    const bench = new Bench(create)
    const chain = bench.handle(bench.chain([header(OUT), bytes(512)], [1]))
    bench.end(0)
    expectRefused(bench, chain, shared.WRITE, shared.END_OF_FILE, IOERR)
  })

  test('no data at all succeeds', () => {
    const bench = new Bench(create)
    expectDone(bench, bench.handle(bench.chain([header(OUT)], [1])), shared.WRITE, 1, 0)
  })
})

describe('I/O errors', () => {
  test.each([
    ['EIO', EIO, shared.IO],
    ['EINVAL', EINVAL, shared.IO],
    ['ENOSPC', ENOSPC, shared.NO_SPACE],
    ['EDQUOT', EDQUOT, shared.NO_SPACE],
  ])('%s of a write, a read, a flush and a discard', (_, result, error) => {
    for (const [operation, chainOf] of [
      [shared.WRITE, (b: Bench) => b.chain([header(OUT), bytes(512)], [1])],
      [shared.READ, (b: Bench) => b.chain([header(IN)], [512, 1])],
      [shared.FLUSH, (b: Bench) => b.chain([header(FLUSH)], [1])],
      [shared.DISCARD, (b: Bench) => b.chain([header(DISCARD), range(0, 8)], [1])],
      [shared.WRITE_ZEROES, (b: Bench) => b.chain([header(WRITE_ZEROES), range(0, 8)], [1])],
    ] as const) {
      const bench = new Bench(create)
      const chain = bench.handle(chainOf(bench))
      bench.end(result)
      expectRefused(bench, chain, operation, error, IOERR)
    }
  })
})

describe('ranges', () => {
  const capacity = 2048
  const sectors: [name: string, sector: bigint, length: number, blockSize: number, fine: boolean][] = [
    ['the last sector', 2047n, 512, 512, true],
    ['all', 0n, capacity * 512, 512, true],
    ['nothing at the very end', 2048n, 0, 512, true],
    ['one sector beyond', 2048n, 512, 512, false],
    ['nothing beyond the end', 2049n, 0, 512, false],
    ['a range across the end', 2047n, 1024, 512, false],
    ['sector 2^32', 2n ** 32n, 512, 512, false],
    ['sector 2^52', 2n ** 52n, 512, 512, false],
    ['sector 2^53 + 1', 2n ** 53n + 1n, 512, 512, false],
    ['sector 2^55 - 1 (its last byte is 2^64 - 1)', 2n ** 55n - 1n, 512, 512, false],
    ['sector 2^55 (its first byte is 2^64)', 2n ** 55n, 512, 512, false],
    ['sector 2^63', 2n ** 63n, 512, 512, false],
    ['sector 2^64 - 1', 2n ** 64n - 1n, 512, 512, false],
    ['part of a sector', 0n, 511, 512, false],
    ['a byte more than a sector', 0n, 513, 512, false],
    ['a 4096-byte block', 8n, 4096, 4096, true],
    ['half of a 4096-byte block', 8n, 2048, 4096, false],
    ['a 4096-byte block from within one', 4n, 4096, 4096, false],
    ['nothing from within a 4096-byte block', 4n, 0, 4096, false],
    ['the last 4096-byte block', 2040n, 4096, 4096, true],
  ]

  test.each(sectors)('%s', (_, sector, length, blockSize, fine) => {
    for (const operation of [shared.READ, shared.WRITE]) {
      const bench = new Bench(create, { blockSize, capacity })
      const chain =
        operation === shared.READ
          ? bench.chain([header(IN, sector)], length === 0 ? [1] : [length, 1])
          : bench.chain(length === 0 ? [header(OUT, sector)] : [header(OUT, sector), bytes(length)], [1])
      bench.handle(chain)
      if (!fine) expectRefused(bench, chain, operation, shared.RANGE, IOERR)
      else if (length === 0) expectDone(bench, chain, operation, 1, 0)
      else expect(bench.operations).toMatchObject([{ offset: Number(sector) * 512, length }])
    }
    for (const [type, operation] of [
      [DISCARD, shared.DISCARD],
      [WRITE_ZEROES, shared.WRITE_ZEROES],
    ] as const) {
      // A range is counted in sectors: there is no part of one.
      if (length % 512 !== 0) continue
      const bench = new Bench(create, { blockSize, capacity })
      const chain = bench.handle(bench.chain([header(type), range(sector, length / 512)], [1]))
      if (!fine) expectRefused(bench, chain, operation, shared.RANGE, IOERR)
      else if (length === 0) expectDone(bench, chain, operation, 1, 0)
      else expect(bench.operations).toMatchObject([{ kind: 'fallocate', offset: Number(sector) * 512, length }])
    }
  })

  test('follow the capacity when it changes', () => {
    const bench = new Bench(create)
    bench.state.capacity = 8
    const beyond = bench.handle(bench.chain([header(IN, 8)], [512, 1]))
    expect(bench.status(beyond)).toBe(IOERR)
    bench.state.capacity = 2 ** 40
    bench.handle(bench.chain([header(IN, 2 ** 40 - 1)], [512, 1]))
    expect(bench.operations).toMatchObject([{ offset: 2 ** 49 - 512, length: 512 }])
  })
})

describe('a read-only device', () => {
  test.each([
    ['OUT', OUT, shared.WRITE, bytes(512)],
    ['OUT of nothing', OUT, shared.WRITE, bytes(0)],
    ['DISCARD', DISCARD, shared.DISCARD, range(0, 8)],
    ['WRITE_ZEROES', WRITE_ZEROES, shared.WRITE_ZEROES, range(0, 8)],
  ])('refuses %s', (_, type, operation, data) => {
    const bench = new Bench(create, { readOnly: true })
    const chain = bench.handle(bench.chain([header(type), data], [1]))
    expectRefused(bench, chain, operation, shared.READ_ONLY, IOERR)
  })

  test('flushes', () => {
    const bench = new Bench(create, { readOnly: true })
    bench.handle(bench.chain([header(FLUSH)], [1]))
    expect(bench.operations).toMatchObject([{ kind: 'fdatasync' }])
  })
})

describe('FLUSH', () => {
  test('is an fdatasync', () => {
    const bench = new Bench(create)
    const chain = bench.handle(bench.chain([header(FLUSH)], [1]))
    expect(bench.operations).toMatchObject([{ kind: 'fdatasync' }])
    expect(bench.context.completions).toEqual([])
    bench.end(0)
    expectDone(bench, chain, shared.FLUSH, 1, 0)
  })

  test('is ignored when unsafe', () => {
    const bench = new Bench(create, { unsafe: true })
    expectDone(bench, bench.handle(bench.chain([header(FLUSH)], [1])), shared.FLUSH, 1, 0)
  })

  test('the sector of its header does not matter', () => {
    const bench = new Bench(create)
    const chain = bench.handle(bench.chain([header(FLUSH, 2n ** 64n - 1n)], [1]))
    bench.end(0)
    expectDone(bench, chain, shared.FLUSH, 1, 0)
  })
})

describe('GET_ID', () => {
  test.each([
    [[20, 1], 20],
    [[21], 20],
    [[7, 14], 20],
    [[100, 1], 20],
    [[8, 1], 8],
    [[1], 0],
  ])('into buffers of %j bytes', (writable, length) => {
    const bench = new Bench(create)
    const chain = bench.handle(bench.chain([header(GET_ID)], writable))
    expectDone(bench, chain, shared.GET_ID, length + 1, length)
    expect(Buffer.from(bench.writable(chain)).toString('latin1', 0, length)).toBe(
      'serial-of-20-bytes!!'.slice(0, length)
    )
  })
})

describe('DISCARD', () => {
  test('punches each range in order, empty ones left out', () => {
    const bench = new Bench(create)
    const chain = bench.handle(
      bench.chain([header(DISCARD), range(0, 8), range(5, 0), range(100, 1), range(2047, 1)], [1])
    )
    expect(bench.end(0)).toMatchObject({ kind: 'fallocate', mode: PUNCH, offset: 0, length: 4096 })
    expect(bench.end(0)).toMatchObject({ kind: 'fallocate', mode: PUNCH, offset: 51200, length: 512 })
    expect(bench.end(0)).toMatchObject({ kind: 'fallocate', mode: PUNCH, offset: 2047 * 512, length: 512 })
    expectDone(bench, chain, shared.DISCARD, 1, 4096 + 1024)
  })

  test('only empty ranges: nothing to do', () => {
    const bench = new Bench(create)
    expectDone(bench, bench.handle(bench.chain([header(DISCARD), range(1, 0), range(2, 0)], [1])), shared.DISCARD, 1, 0)
  })

  test('where the file cannot, it was advice', () => {
    const bench = new Bench(create)
    const chain = bench.handle(bench.chain([header(DISCARD), range(0, 8), range(16, 8)], [1]))
    bench.end(EOPNOTSUPP)
    bench.end(EINTR)
    bench.end(0)
    expectDone(bench, chain, shared.DISCARD, 1, 8192)
  })

  test('is unsupported when it is not offered', () => {
    const bench = new Bench(create, { discard: false })
    const chain = bench.handle(bench.chain([header(DISCARD), range(0, 8)], [1]))
    expectRefused(bench, chain, shared.DISCARD, shared.UNSUPPORTED, UNSUPP)
  })

  test.each([1, 2, 3, 0x8000_0000, 0xffff_ffff])('flags %d are unsupported', (flags) => {
    const bench = new Bench(create)
    const chain = bench.handle(bench.chain([header(DISCARD), range(0, 8), range(0, 8, flags)], [1]))
    expectRefused(bench, chain, shared.DISCARD, shared.UNSUPPORTED, UNSUPP)
  })

  test('a segment may be cut over descriptors', () => {
    const bench = new Bench(create)
    const one = range(16, 8)
    const chain = bench.handle(
      bench.chain([header(DISCARD), one.subarray(0, 3), one.subarray(3, 9), one.subarray(9)], [1])
    )
    expect(bench.end(0)).toMatchObject({ offset: 8192, length: 4096 })
    expectDone(bench, chain, shared.DISCARD, 1, 4096)
  })
})

describe.each([
  ['DISCARD', DISCARD, shared.DISCARD],
  ['WRITE_ZEROES', WRITE_ZEROES, shared.WRITE_ZEROES],
])('segments of %s', (_, type, operation) => {
  const many = (count: number) => Array.from({ length: count }, (_unused, i) => range(i, 1))

  test('at most 64', () => {
    const fine = new Bench(create)
    const chain = fine.handle(fine.chain([header(type), ...many(64)], [1]))
    for (let i = 0; i < 64; i++) expect(fine.end(0)).toMatchObject({ offset: i * 512, length: 512 })
    expectDone(fine, chain, operation, 1, 64 * 512)
    const bench = new Bench(create)
    expectRefused(
      bench,
      bench.handle(bench.chain([header(type), ...many(65)], [1])),
      operation,
      shared.MALFORMED,
      IOERR
    )
  })

  test.each([0, 1, 15, 17, 31])('%d bytes are no segments', (length) => {
    const bench = new Bench(create)
    const chain = bench.handle(bench.chain([header(type), bytes(length)], [1]))
    expectRefused(bench, chain, operation, shared.MALFORMED, IOERR)
  })

  test('of at most 4 GiB', () => {
    const capacity = 2 ** 30
    const fine = new Bench(create, { capacity })
    fine.handle(fine.chain([header(type), range(0, 0x80_0000)], [1]))
    expect(fine.operations).toMatchObject([{ kind: 'fallocate', length: 2 ** 32 }])
    for (const sectors of [0x80_0001, 0xffff_ffff]) {
      const bench = new Bench(create, { capacity: 2 ** 40 })
      expectRefused(
        bench,
        bench.handle(bench.chain([header(type), range(0, sectors)], [1])),
        operation,
        shared.RANGE,
        IOERR
      )
    }
  })

  test('one that is wrong stops all before the first is touched', () => {
    const bench = new Bench(create)
    const chain = bench.handle(bench.chain([header(type), range(0, 8), range(2048, 1)], [1]))
    expectRefused(bench, chain, operation, shared.RANGE, IOERR)
  })

  test('the guest changes them after they were checked: what was checked is done', () => {
    const bench = new Bench(create)
    const chain = bench.chain([header(type), range(8, 8), range(16, 8)], [1])
    bench.handle(chain)
    const firstRange = chain.offset[1]!
    bench.bytes.fill(0xff, firstRange, firstRange + 16)
    bench.bytes.fill(0xff, chain.offset[2]!, chain.offset[2]! + 16)
    bench.bytes.fill(0xff, chain.offset[0]!, chain.offset[0]! + 16)
    expect(bench.end(EAGAIN)).toMatchObject({ offset: 4096, length: 4096 })
    expect(bench.end(0)).toMatchObject({ offset: 4096, length: 4096 })
    expect(bench.end(0)).toMatchObject({ offset: 8192, length: 4096 })
    expectDone(bench, chain, operation, 1, 8192)
  })
})

describe('WRITE_ZEROES', () => {
  test('zeroes without unmap, punches with it', () => {
    const bench = new Bench(create)
    const chain = bench.handle(bench.chain([header(WRITE_ZEROES), range(0, 8, 0), range(8, 8, 1)], [1]))
    expect(bench.end(0)).toMatchObject({ mode: ZERO, offset: 0 })
    expect(bench.end(0)).toMatchObject({ mode: PUNCH, offset: 4096 })
    expectDone(bench, chain, shared.WRITE_ZEROES, 1, 8192)
  })

  test('never punches when discard is off', () => {
    const bench = new Bench(create, { discard: false })
    bench.handle(bench.chain([header(WRITE_ZEROES), range(0, 8, 1)], [1]))
    expect(bench.operations).toMatchObject([{ mode: ZERO }])
  })

  test('falls back from punching to zeroing to writing, for each range anew', () => {
    const bench = new Bench(create)
    const chain = bench.handle(bench.chain([header(WRITE_ZEROES), range(8, 16, 1), range(64, 1, 1)], [1]))
    expect(bench.end(EOPNOTSUPP)).toMatchObject({ kind: 'fallocate', mode: PUNCH })
    expect(bench.end(EOPNOTSUPP)).toMatchObject({ kind: 'fallocate', mode: ZERO, offset: 4096, length: 8192 })
    const write = bench.end(1000)
    expect(write).toMatchObject({ kind: 'writeBuffer', offset: 4096, start: 0, length: 8192 })
    expect(write.bytes!.every((byte) => byte === 0)).toBe(true)
    expect(bench.end(EINTR)).toMatchObject({ kind: 'writeBuffer', offset: 5096, length: 7192 })
    expect(bench.end()).toMatchObject({ kind: 'writeBuffer', offset: 5096, length: 7192 })
    expect(bench.end(0)).toMatchObject({ kind: 'fallocate', mode: PUNCH, offset: 64 * 512 })
    expectDone(bench, chain, shared.WRITE_ZEROES, 1, 8192 + 512)
  })

  test('writes in pieces what is larger than its zeroes', () => {
    const bench = new Bench(create, { capacity: 2 ** 20, discard: false })
    const chain = bench.handle(bench.chain([header(WRITE_ZEROES), range(1, 5000)], [1]))
    bench.end(EOPNOTSUPP)
    const offsets: number[] = []
    let sum = 0
    while (bench.operations.length > 0) {
      const { offset, length, start } = bench.end()
      offsets.push(offset)
      expect(start).toBe(0)
      sum += length
    }
    expect(offsets).toEqual([512, 512 + 2 ** 20, 512 + 2 ** 21])
    expect(sum).toBe(5000 * 512)
    expectDone(bench, chain, shared.WRITE_ZEROES, 1, 5000 * 512)
  })

  test('a write of nothing is an error', () => {
    const bench = new Bench(create, { discard: false })
    const chain = bench.handle(bench.chain([header(WRITE_ZEROES), range(0, 8)], [1]))
    bench.end(EOPNOTSUPP)
    bench.end(0)
    expectRefused(bench, chain, shared.WRITE_ZEROES, shared.IO, IOERR)
  })

  test.each([2, 3, 0x8000_0001])('flags %d are unsupported', (flags) => {
    const bench = new Bench(create)
    const chain = bench.handle(bench.chain([header(WRITE_ZEROES), range(0, 8, flags)], [1]))
    expectRefused(bench, chain, shared.WRITE_ZEROES, shared.UNSUPPORTED, UNSUPP)
  })
})

describe('durability', () => {
  const write = (bench: Bench) => bench.handle(bench.chain([header(OUT), bytes(512)], [1]))
  const discard = (bench: Bench) => bench.handle(bench.chain([header(DISCARD), range(0, 8)], [1]))

  test('follows the write-cache switch, per request', () => {
    const bench = new Bench(create)
    write(bench)
    bench.state.writeback = false
    write(bench)
    bench.state.writeback = true
    write(bench)
    expect(bench.operations.map(({ dsync }) => dsync)).toEqual([false, true, false])
  })

  test('a short durable write goes on durably, whatever the switch says meanwhile', () => {
    const bench = new Bench(create)
    bench.state.writeback = false
    write(bench)
    bench.state.writeback = true
    bench.end(100)
    expect(bench.operations).toMatchObject([{ dsync: true, length: 412 }])
  })

  test('reads have nothing to do with it', () => {
    const bench = new Bench(create)
    bench.state.writeback = false
    bench.handle(bench.chain([header(IN)], [512, 1]))
    expect(bench.operations).toMatchObject([{ kind: 'read', dsync: false }])
  })

  test('a driver without FLUSH gets every write durable (§5.2.6.2)', () => {
    const bench = new Bench(create, { features: 0n })
    write(bench)
    expect(bench.operations).toMatchObject([{ dsync: true }])
  })

  test('discard and write-zeroes are followed by an fdatasync when written through', () => {
    for (const [type, operation] of [
      [DISCARD, shared.DISCARD],
      [WRITE_ZEROES, shared.WRITE_ZEROES],
    ] as const) {
      const bench = new Bench(create)
      bench.state.writeback = false
      const chain = bench.handle(bench.chain([header(type), range(0, 8), range(8, 8)], [1]))
      bench.end(0)
      bench.end(0)
      expect(bench.context.completions).toEqual([])
      expect(bench.end(0)).toMatchObject({ kind: 'fdatasync' })
      expectDone(bench, chain, operation, 1, 8192)
    }
  })

  test('an fdatasync that fails fails the discard; the next request under the head starts anew', () => {
    const bench = new Bench(create)
    bench.state.writeback = false
    const chain = discard(bench)
    bench.end(0)
    bench.end(EIO)
    expectRefused(bench, chain, shared.DISCARD, shared.IO, IOERR)
    chain.inFlight = true
    bench.handle(chain)
    expect(bench.end(0)).toMatchObject({ kind: 'fallocate' })
    expect(bench.end(0)).toMatchObject({ kind: 'fdatasync' })
    expect(bench.status(chain)).toBe(OK)
  })

  test('unsafe means nothing of all that', () => {
    const bench = new Bench(create, { unsafe: true, features: 0n })
    bench.state.writeback = false
    write(bench)
    const chain = discard(bench)
    expect(bench.end()).toMatchObject({ dsync: false })
    bench.end(0)
    expect(bench.status(chain)).toBe(OK)
    expect(bench.operations).toEqual([])
  })
})

describe('what is no request', () => {
  test('no room for a status: the chain comes back with nothing', () => {
    const bench = new Bench(create)
    for (const readable of [[], [header(IN)], [header(OUT), bytes(512)]]) bench.handle(bench.chain(readable, []))
    expect(bench.context.completions).toEqual(
      [0, 1, 2].map((head) => ({ head, written: 0, operation: shared.OTHER, bytes: 0 }))
    )
    expect(bench.context.errors).toEqual([shared.MALFORMED, shared.MALFORMED, shared.MALFORMED])
    expect(bench.operations).toEqual([])
  })

  test.each([0, 1, 4, 15])('a header of %d bytes', (length) => {
    const bench = new Bench(create)
    const chain = bench.handle(bench.chain([header(IN).subarray(0, length)], [512, 1]))
    expectRefused(bench, chain, shared.OTHER, shared.MALFORMED, IOERR)
  })

  test.each([2, 3, 5, 10, 12, 14, 15, 16, 0x100, 0x8000_0000, 0xffff_ffff])('type %d is unsupported', (type) => {
    const bench = new Bench(create)
    const chain = bench.handle(bench.chain([header(type), bytes(512)], [512, 1]))
    expectRefused(bench, chain, shared.OTHER, shared.UNSUPPORTED, UNSUPP)
  })

  test('the guest changes the header after it was taken: the request stays what it was', () => {
    const bench = new Bench(create)
    const chain = bench.handle(bench.chain([header(OUT, 8), bytes(1024)], [1]))
    bench.bytes.set(header(IN, 2n ** 64n - 1n), chain.offset[0]!)
    bench.end(512)
    expect(bench.end()).toMatchObject({ kind: 'write', offset: 4608, start: 528, length: 512 })
    expectDone(bench, chain, shared.WRITE, 1, 1024)
  })
})

describe('O_DIRECT', () => {
  const direct = { memoryAlign: 512, lengthAlign: 512 }
  const SIZE = 128 * 1024

  test('aligned buffers go straight', () => {
    const bench = new Bench(create, direct)
    bench.handle(bench.chain([header(IN)], [4096, 1]))
    bench.handle(bench.chain([header(OUT), bytes(1024)], [1]))
    expect(bench.operations.map(({ kind }) => kind)).toEqual(['read', 'write'])
  })

  test('an unaligned read goes through a buffer', () => {
    const bench = new Bench(create, direct)
    const chain = bench.handle(bench.chain([header(IN, 4)], [1000, 24, 1], 4))
    expect(bench.operations).toMatchObject([{ kind: 'readBuffer', offset: 2048, start: 0, length: 1024 }])
    bench.operations[0]!.buffer!.bytes.set(bytes(1024))
    bench.end()
    expectDone(bench, chain, shared.READ, 1025, 1024)
    expect(bench.writable(chain)).toEqual(bytes(1024))
  })

  test('an unaligned write takes its data along', () => {
    const bench = new Bench(create, direct)
    const chain = bench.handle(bench.chain([header(OUT, 4), bytes(100), bytes(412, 9)], [1], 4))
    const operation = bench.end()
    expect(operation).toMatchObject({ kind: 'writeBuffer', offset: 2048, length: 512, dsync: false })
    expect(operation.bytes).toEqual(new Uint8Array([...bytes(100), ...bytes(412, 9)]))
    expectDone(bench, chain, shared.WRITE, 1, 512)
  })

  test('a durable one stays durable', () => {
    const bench = new Bench(create, direct)
    bench.state.writeback = false
    bench.handle(bench.chain([header(OUT), bytes(512)], [1], 4))
    expect(bench.operations).toMatchObject([{ kind: 'writeBuffer', dsync: true }])
  })

  test('more than the buffer holds goes in pieces, short ones are continued', () => {
    const bench = new Bench(create, direct)
    const total = 2 * SIZE + 1024
    const chain = bench.handle(bench.chain([header(IN)], [total, 1], 4))
    const content = bytes(total)
    let at = 0
    for (const result of [SIZE, 512, EINTR, SIZE - 512, undefined, undefined]) {
      const operation = bench.operations[0]
      if (operation === undefined) break
      expect(operation).toMatchObject({ kind: 'readBuffer', offset: at, start: 0, length: Math.min(SIZE, total - at) })
      operation.buffer!.bytes.set(content.subarray(at, at + operation.length))
      bench.end(result)
      at += result === undefined ? operation.length : Math.max(result, 0)
    }
    expectDone(bench, chain, shared.READ, total + 1, total)
    expect(Buffer.compare(bench.writable(chain), content)).toBe(0)
  })

  test('more requests than buffers: they wait, in order, and all are served', () => {
    const bench = new Bench(create, direct)
    const chains = Array.from({ length: 40 }, (_, i) =>
      bench.handle(bench.chain([header(OUT, i), bytes(512, i)], [1], 4))
    )
    expect(bench.operations.length).toBe(16)
    expect(bench.context.io.allocated).toBe(16)
    const heads: number[] = []
    for (let i = 0; i < 40; i++) {
      const operation = bench.end(i % 7 === 3 ? EIO : undefined)
      heads.push(operation.chain.head)
      expect(operation.bytes).toEqual(bytes(512, operation.chain.head))
    }
    expect(heads).toEqual(chains.map(({ head }) => head))
    expect(bench.operations).toEqual([])
    expect(bench.context.io.allocated).toBe(16)
    expect(new Set(bench.context.completions.map(({ head }) => head)).size).toBe(40)
  })

  test('two queues share the buffers', () => {
    const one = new Bench(create, direct)
    const two = new Bench(create, direct)
    for (let i = 0; i < 16; i++) one.handle(one.chain([header(IN)], [512, 1], 4))
    const chain = two.handle(two.chain([header(IN)], [512, 1], 4))
    expect(two.operations).toEqual([])
    one.end()
    expect(two.operations).toMatchObject([{ kind: 'readBuffer' }])
    two.end()
    expectDone(two, chain, shared.READ, 513, 512)
    while (one.operations.length > 0) one.end()
  })

  test('a buffer is given back after an error and at the end of the file', () => {
    const bench = new Bench(create, direct)
    for (let i = 0; i < 50; i++) {
      bench.handle(bench.chain([header(IN)], [512, 1], 4))
      bench.end(i % 2 === 0 ? EIO : 0)
    }
    expect(bench.context.io.allocated).toBe(1)
  })

  // The engine closes a queue whose call fd failed, say, when its I/O has ended; the handler heard of none of that.
  test('a queue that is closed with requests in work gives its buffers back', () => {
    const dead = new Bench(create, direct)
    for (let i = 0; i < 16; i++) dead.handle(dead.chain([header(IN)], [512, 1], 4))
    dead.handler.close!()
    const next = new Bench(create, direct)
    next.handle(next.chain([header(IN)], [512, 1], 4))
    expect(next.operations.map(({ kind }) => kind)).toEqual(['readBuffer'])
  })

  test('a queue that is closed with requests waiting for a buffer starts no I/O for them later', () => {
    const alive = new Bench(create, direct)
    for (let i = 0; i < 16; i++) alive.handle(alive.chain([header(IN)], [512, 1], 4))
    const dead = new Bench(create, direct)
    dead.handle(dead.chain([header(OUT), bytes(512)], [1], 4))
    expect(dead.operations).toEqual([])
    dead.handler.close!()
    while (alive.operations.length > 0) alive.end()
    expect(dead.operations.map(({ kind }) => kind)).toEqual([])
  })
})

describe('the handler', () => {
  test('keeps requests of many heads apart', () => {
    const bench = new Bench(create)
    const read = bench.handle(bench.chain([header(IN, 1)], [1024, 1]))
    const write = bench.handle(bench.chain([header(OUT, 2), bytes(1024)], [1]))
    const flush = bench.handle(bench.chain([header(FLUSH)], [1]))
    bench.end(512)
    bench.end(512)
    bench.end(0)
    expect(bench.end()).toMatchObject({ kind: 'read', offset: 1024, start: 512 })
    expect(bench.end()).toMatchObject({ kind: 'write', offset: 1536, start: 528 })
    expect(bench.context.completions).toEqual([
      { head: flush.head, written: 1, operation: shared.FLUSH, bytes: 0 },
      { head: read.head, written: 1025, operation: shared.READ, bytes: 1024 },
      { head: write.head, written: 1, operation: shared.WRITE, bytes: 1024 },
    ])
  })

  test('a head that is used again remembers nothing', () => {
    const bench = new Bench(create)
    const chain = bench.handle(bench.chain([header(IN, 1)], [1024, 1]))
    bench.end(512)
    bench.end(EIO)
    chain.inFlight = true
    bench.bytes.set(header(IN, 5), chain.offset[0]!)
    bench.handle(chain)
    expect(bench.operations).toMatchObject([{ offset: 2560, start: 0, length: 1024 }])
  })

  test('registers its file once and lets it go', () => {
    const bench = new Bench(create)
    expect(bench.context.io.open).toEqual([42])
    bench.handler.close!()
    expect(bench.context.io.open).toEqual([])
  })
})

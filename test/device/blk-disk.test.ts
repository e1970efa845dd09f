/** A disk in the short style: what `handleBlkRequest` does with each request, right and wrong. */

import { type DeviceDefinition, defineDevice, featureSet } from 'virtiod/device'
import * as blk from 'virtiod/device/virtio-blk'
import { testDevice, UNTOUCHED } from 'virtiod/testing'
import { describe, expect, test } from 'vitest'

const CAPACITY = 64
const SIZE = CAPACITY * 512
const NO_SECTOR = 0n

type Call = readonly [method: string, offset?: number, length?: number, more?: unknown]

/** A disk in memory that notes what is asked of it. */
class MemoryDisk implements blk.BlkDisk {
  readonly size: number = SIZE
  readonly serial: string = 'serial-of-20-bytes!!'
  readonly bytes = new Uint8Array(SIZE).map((_, i) => i >> 9)
  readonly calls: Call[] = []
  read(offset: number, length: number): Uint8Array {
    this.calls.push(['read', offset, length])
    return this.bytes.subarray(offset, offset + length)
  }
  async write(offset: number, bytes: Uint8Array): Promise<void> {
    this.calls.push(['write', offset, bytes.length])
    await Promise.resolve()
    this.bytes.set(bytes, offset)
  }
  flush(): void {
    this.calls.push(['flush'])
  }
  discard(offset: number, length: number): void {
    this.calls.push(['discard', offset, length])
  }
  writeZeroes(offset: number, length: number, unmap: boolean): void {
    this.calls.push(['writeZeroes', offset, length, unmap])
  }
}

function definitionOf(disk: blk.BlkDisk): DeviceDefinition<Record<string, never>> {
  return defineDevice({
    apiVersion: 1,
    name: 'test',
    ...blk.blkDevice,
    config: blk.blkConfig(disk.size, disk.blockSize),
    features: blk.blkFeatures({ flush: true, discard: true, writeZeroes: true }),
    create: () => ({ handle: (chain) => blk.handleBlkRequest(chain, disk) }),
  })
}

function header(type: number, sector: bigint = NO_SECTOR): Uint8Array {
  const bytes = new Uint8Array(16)
  const view = new DataView(bytes.buffer)
  view.setUint32(0, type, true)
  view.setBigUint64(8, sector, true)
  return bytes
}

function range(sector: bigint, sectors: number, flags = 0): Uint8Array {
  const bytes = new Uint8Array(16)
  const view = new DataView(bytes.buffer)
  view.setBigUint64(0, sector, true)
  view.setUint32(8, sectors, true)
  view.setUint32(12, flags, true)
  return bytes
}

const OK = blk.VIRTIO_BLK_S_OK
const IOERR = blk.VIRTIO_BLK_S_IOERR
const UNSUPP = blk.VIRTIO_BLK_S_UNSUPP
const FILLED = Uint8Array.from({ length: 1024 }, (_, i) => i * 7)

interface Outcome {
  readonly status: number | undefined
  readonly written: number
  readonly operation: string
  readonly errors: readonly string[]
  /** The device-writable part before the status. */
  readonly data: Uint8Array
}

const counted = (counts: Readonly<Record<string, number>>): string[] =>
  Object.keys(counts).filter((name) => counts[name] !== 0)

/** One request, with whole buffers and with buffers cut into odd pieces: both have to come to the same. */
async function request<Disk extends blk.BlkDisk>(
  makeDisk: () => Disk,
  readable: Uint8Array[],
  writable: number
): Promise<Outcome & { readonly disk: Disk }> {
  const outcomes = []
  for (const split of [false, true]) {
    const disk = makeDisk()
    await using device = await testDevice(definitionOf(disk), { split })
    const { bytes, written } = await device.request(0, readable, writable)
    outcomes.push({
      status: bytes.at(-1),
      written,
      operation: counted(device.operations).join(),
      errors: counted(device.errors),
      data: bytes.slice(0, -1),
      disk,
    })
  }
  expect(outcomes[1]).toEqual(outcomes[0])
  return outcomes[0]!
}

const memory = (): MemoryDisk => new MemoryDisk()
const UNTOUCHED_SECTOR = new Uint8Array(512).fill(UNTOUCHED)

/** What every refused request looks like: nothing but the status was written, and the disk was not asked. */
function refused(status: number, operation: string, error: string) {
  return { status, written: 1, operation, errors: [error], disk: expect.objectContaining({ calls: [] }) }
}

describe('read', () => {
  test('returns what the disk has, and the status behind it', async () => {
    const outcome = await request(memory, [header(blk.VIRTIO_BLK_T_IN, 3n)], 1025)
    expect(outcome).toMatchObject({ status: OK, written: 1025, operation: 'read', errors: [] })
    expect(outcome.data).toEqual(new Uint8Array(1024).fill(3, 0, 512).fill(4, 512))
    expect(outcome.disk.calls).toEqual([['read', 3 * 512, 1024]])
  })

  test('of nothing asks nothing', async () => {
    const outcome = await request(memory, [header(blk.VIRTIO_BLK_T_IN, 3n)], 1)
    expect(outcome).toMatchObject({ status: OK, written: 1, errors: [] })
    expect(outcome.disk.calls).toEqual([])
  })

  test('is done in pieces of 4 MiB', async () => {
    class LargeDisk extends MemoryDisk {
      override readonly size = 16 * 2 ** 20
      override read(offset: number, length: number): Uint8Array {
        this.calls.push(['read', offset, length])
        return new Uint8Array(length).fill(offset / 2 ** 20)
      }
    }
    const disk = new LargeDisk()
    await using device = await testDevice(definitionOf(disk))
    const { bytes, written } = await device.request(0, [header(blk.VIRTIO_BLK_T_IN, 2n)], 2 ** 22 + 513)
    expect(disk.calls).toEqual([
      ['read', 1024, 2 ** 22],
      ['read', 1024 + 2 ** 22, 512],
    ])
    expect([written, bytes.at(0), bytes.at(-2), bytes.at(-1)]).toEqual([2 ** 22 + 513, 0, 4, OK])
  })

  test('a disk that returns another length is at fault', async () => {
    class ShortDisk extends MemoryDisk {
      override read(): Uint8Array {
        return new Uint8Array(100)
      }
    }
    await using device = await testDevice(definitionOf(new ShortDisk()))
    await expect(device.request(0, [header(blk.VIRTIO_BLK_T_IN)], 513)).rejects.toThrow(
      'read(0, 512) of the disk returned 100 bytes'
    )
  })
})

describe('write', () => {
  test('hands over a copy', async () => {
    const outcome = await request(memory, [header(blk.VIRTIO_BLK_T_OUT, 62n), FILLED], 1)
    expect(outcome).toMatchObject({ status: OK, written: 1, operation: 'write', errors: [] })
    expect(outcome.disk.calls).toEqual([['write', 62 * 512, 1024]])
    expect(outcome.disk.bytes.subarray(62 * 512)).toEqual(FILLED)
  })

  test('a disk without it is read-only', async () => {
    const readOnly = () => Object.assign(memory(), { write: undefined })
    expect(await request(readOnly, [header(blk.VIRTIO_BLK_T_OUT), FILLED], 1)).toMatchObject(
      refused(IOERR, 'write', 'read_only')
    )
    for (const [type, operation] of [
      [blk.VIRTIO_BLK_T_DISCARD, 'discard'],
      [blk.VIRTIO_BLK_T_WRITE_ZEROES, 'write_zeroes'],
    ] as const)
      expect(await request(readOnly, [header(type), range(0n, 1)], 1)).toMatchObject(
        refused(IOERR, operation, 'read_only')
      )
  })
})

describe('ranges', () => {
  test.each<[string, bigint, number, number, boolean]>([
    ['the last sector', 63n, 512, 512, true],
    ['all', 0n, SIZE, 512, true],
    ['nothing at the very end', 64n, 0, 512, true],
    ['one beyond', 64n, 512, 512, false],
    ['nothing beyond the end', 65n, 0, 512, false],
    ['across the end', 63n, 1024, 512, false],
    ['sector 2^53 + 1', 2n ** 53n + 1n, 512, 512, false],
    ['the last sector of 64 bits', 2n ** 55n - 1n, 512, 512, false],
    ['sector 2^55, whose first byte is 2^64', 2n ** 55n, 512, 512, false],
    ['sector 2^64 - 1', 2n ** 64n - 1n, 512, 512, false],
    ['part of a sector', 0n, 511, 512, false],
    ['a block of 4096', 8n, 4096, 4096, true],
    ['half a block', 8n, 2048, 4096, false],
    ['a block from within one', 4n, 4096, 4096, false],
  ])('%s', async (_, sector, length, blockSize, fine) => {
    const disk = () => Object.assign(memory(), { blockSize })
    const reads = await request(disk, [header(blk.VIRTIO_BLK_T_IN, sector)], length + 1)
    const writes = await request(disk, [header(blk.VIRTIO_BLK_T_OUT, sector), new Uint8Array(length)], 1)
    if (fine) {
      expect([reads.status, writes.status]).toEqual([OK, OK])
      return
    }
    expect(reads).toMatchObject(refused(IOERR, 'read', 'range'))
    expect(writes).toMatchObject(refused(IOERR, 'write', 'range'))
  })
})

describe('flush and id', () => {
  test('a flush', async () => {
    const outcome = await request(memory, [header(blk.VIRTIO_BLK_T_FLUSH, 2n ** 64n - 1n)], 1)
    expect(outcome).toMatchObject({ status: OK, written: 1, operation: 'flush', errors: [] })
    expect(outcome.disk.calls).toEqual([['flush']])
  })

  test('a disk without flush does not know it', async () => {
    const disk = () => Object.assign(memory(), { flush: undefined })
    expect(await request(disk, [header(blk.VIRTIO_BLK_T_FLUSH)], 1)).toMatchObject(
      refused(UNSUPP, 'flush', 'unsupported')
    )
  })

  test.each([
    [21, 20],
    [9, 8],
    [1, 0],
    [101, 20],
  ])('the id in %d bytes', async (writable, length) => {
    const outcome = await request(memory, [header(blk.VIRTIO_BLK_T_GET_ID)], writable)
    expect(outcome).toMatchObject({ status: OK, operation: 'get_id' })
    expect(Buffer.from(outcome.data.subarray(0, length)).toString()).toBe('serial-of-20-bytes!!'.slice(0, length))
  })

  test('an id that is shorter ends with zeroes, one that is longer is cut', async () => {
    for (const [serial, shown] of [
      ['short', 'short'.padEnd(20, '\0')],
      ['a serial that is too long', 'a serial that is too'],
    ] as const) {
      const disk = () => Object.assign(memory(), { serial })
      const { data } = await request(disk, [header(blk.VIRTIO_BLK_T_GET_ID)], 21)
      expect(Buffer.from(data).toString()).toBe(shown)
    }
  })
})

describe('discard and write_zeroes', () => {
  const { VIRTIO_BLK_T_DISCARD: DISCARD, VIRTIO_BLK_T_WRITE_ZEROES: ZEROES } = blk

  test('each range in order, empty ones left out', async () => {
    const discards = await request(memory, [header(DISCARD), range(0n, 8), range(5n, 0), range(63n, 1)], 1)
    expect(discards).toMatchObject({ status: OK, written: 1, operation: 'discard', errors: [] })
    expect(discards.disk.calls).toEqual([
      ['discard', 0, 4096],
      ['discard', 63 * 512, 512],
    ])
    const zeroes = await request(memory, [header(ZEROES), range(1n, 2), range(4n, 1, 1)], 1)
    expect(zeroes).toMatchObject({ status: OK, operation: 'write_zeroes', errors: [] })
    expect(zeroes.disk.calls).toEqual([
      ['writeZeroes', 512, 1024, false],
      ['writeZeroes', 2048, 512, true],
    ])
  })

  test.each<[string, number, Uint8Array[], number, string]>([
    ['unmap on a discard', DISCARD, [range(0n, 1, 1)], UNSUPP, 'unsupported'],
    ['an unknown flag', ZEROES, [range(0n, 1, 2)], UNSUPP, 'unsupported'],
    ['one behind a right one that is beyond the end', DISCARD, [range(0n, 1), range(64n, 1)], IOERR, 'range'],
    ['more sectors than may be', ZEROES, [range(0n, 0x80_0001)], IOERR, 'range'],
    ['65 ranges', DISCARD, Array.from({ length: 65 }, () => range(0n, 1)), IOERR, 'malformed'],
    ['no ranges', ZEROES, [], IOERR, 'malformed'],
    ['part of a range', DISCARD, [new Uint8Array(17)], IOERR, 'malformed'],
  ])('%s: nothing is done', async (_, type, ranges, status, error) => {
    const outcome = await request(memory, [header(type), ...ranges], 1)
    expect(outcome).toMatchObject(refused(status, type === DISCARD ? 'discard' : 'write_zeroes', error))
  })

  test('a disk without them does not know them', async () => {
    const disk = () => Object.assign(memory(), { discard: undefined, writeZeroes: undefined })
    for (const [type, operation] of [
      [DISCARD, 'discard'],
      [ZEROES, 'write_zeroes'],
    ] as const)
      expect(await request(disk, [header(type), range(0n, 1)], 1)).toMatchObject(
        refused(UNSUPP, operation, 'unsupported')
      )
  })
})

describe('what is no request', () => {
  test('an unknown type', async () => {
    expect(await request(memory, [header(3)], 1)).toMatchObject(refused(UNSUPP, 'other', 'unsupported'))
  })

  test('a header that is cut off', async () => {
    expect(await request(memory, [header(blk.VIRTIO_BLK_T_IN).subarray(0, 15)], 513)).toMatchObject(
      refused(IOERR, 'other', 'malformed')
    )
  })

  test('no room for a status: the chain comes back, and nothing was done', async () => {
    const outcome = await request(memory, [header(blk.VIRTIO_BLK_T_OUT), FILLED], 0)
    expect(outcome).toMatchObject({ status: undefined, written: 0, operation: 'write', errors: ['malformed'] })
    expect(outcome.disk.calls).toEqual([])
  })
})

describe('a disk that fails', () => {
  const failing = (error: Error): (() => blk.BlkDisk) => {
    const fail = () => Promise.reject(error)
    return () => ({ size: SIZE, read: fail, write: fail, flush: fail, discard: fail, writeZeroes: fail })
  }
  const system = (code: string): Error => Object.assign(new Error(code), { code, errno: -1, syscall: 'write' })

  test.each<[string, Error, number, string]>([
    ['a DiskError', new blk.DiskError('x'), IOERR, 'io'],
    ['a DiskError of another kind', new blk.DiskError('x', 'no_space'), IOERR, 'no_space'],
    ['one that says UNSUPP', new blk.DiskError('x', 'unsupported'), UNSUPP, 'unsupported'],
    ['EIO', system('EIO'), IOERR, 'io'],
    ['ENOSPC', system('ENOSPC'), IOERR, 'no_space'],
    ['EDQUOT', system('EDQUOT'), IOERR, 'no_space'],
  ])('%s fails the request', async (_, error, status, kind) => {
    const disk = failing(error)
    for (const [readable, writable] of [
      [[header(blk.VIRTIO_BLK_T_IN)], 513],
      [[header(blk.VIRTIO_BLK_T_OUT), FILLED], 1],
      [[header(blk.VIRTIO_BLK_T_FLUSH)], 1],
      [[header(blk.VIRTIO_BLK_T_DISCARD), range(0n, 1)], 1],
      [[header(blk.VIRTIO_BLK_T_WRITE_ZEROES), range(0n, 1)], 1],
    ] as const) {
      const outcome = await request(disk, [...readable], writable)
      expect(outcome).toMatchObject({ status, written: 1, errors: [kind] })
      if (writable > 1) expect(outcome.data).toEqual(UNTOUCHED_SECTOR)
    }
  })

  test("any other error is the device's", async () => {
    await using device = await testDevice(definitionOf(failing(new TypeError('a mistake'))()))
    await expect(device.request(0, [header(blk.VIRTIO_BLK_T_IN)], 513)).rejects.toThrow('a mistake')
  })
})

describe('what the driver sees', () => {
  test('the config space', () => {
    expect(blk.decodeBlkConfig(blk.blkConfig(2 ** 20, 4096))).toMatchObject({
      capacity: 2048n,
      blkSize: 4096,
      numQueues: 1,
      discard: { sectorAlignment: 8 },
      writeZeroes: { mayUnmap: true },
    })
  })

  test.each([
    [513, 512],
    [4096, 1000],
    [4096, 256],
    [2048, 4096],
    [-512, 512],
    [2 ** 60, 512],
  ])('no disk of %d bytes in blocks of %d', (size, blockSize) => {
    expect(() => blk.blkConfig(size, blockSize)).toThrow(RangeError)
  })

  test('the features', () => {
    const least = featureSet(blk.VIRTIO_BLK_F_SEG_MAX, blk.VIRTIO_BLK_F_BLK_SIZE)
    expect(blk.blkFeatures()).toBe(least)
    expect(blk.blkFeatures({ readOnly: true })).toBe(least | featureSet(blk.VIRTIO_BLK_F_RO))
    expect(blk.blkFeatures({ flush: true, discard: true, writeZeroes: true })).toBe(
      least | featureSet(blk.VIRTIO_BLK_F_FLUSH, blk.VIRTIO_BLK_F_DISCARD, blk.VIRTIO_BLK_F_WRITE_ZEROES)
    )
  })
})

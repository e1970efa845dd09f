/**
 * The device side of virtio-blk for devices of the short style: whoever has bytes to serve says how to read and write
 * them ({@link BlkDisk}), and requests are parsed, checked and answered here (virtio 1.3 §5.2.6). Owns what can be
 * wrong with a request; knows nothing of what is behind a disk.
 */

import * as blk from '../virtio/blk.ts'
import { featureSet } from '../virtio/features.ts'
import { ByteBudget } from './byte-budget.ts'
import type { DeviceChain, QueueDescription } from './define.ts'
import type { QemuDevice } from './index.ts'

/** What a request to a disk can be; see `DeviceDescription.operations`. */
export const BLK_OPERATIONS = ['read', 'write', 'flush', 'discard', 'write_zeroes', 'get_id', 'other'] as const
/** What can go wrong with one; see `DeviceDescription.errors`. */
export const BLK_ERRORS = ['io', 'no_space', 'range', 'read_only', 'unsupported', 'malformed'] as const

export type BlkOperation = (typeof BLK_OPERATIONS)[number]
export type BlkErrorKind = (typeof BLK_ERRORS)[number]

/** Ranges that one DISCARD or WRITE_ZEROES may have, and sectors that each may cover (4 GiB). */
const MAX_RANGES = 64
const MAX_RANGE_SECTORS = 0x80_0000
/** Data segments of one request: header and status added they fit the 128 descriptors of QEMU's default ring. */
const SEG_MAX = 126
/**
 * The most that one call of a disk's method moves. Drivers ask for less (Linux: 1.25 MiB); but a chain may be as long
 * as the guest likes, and each would be a buffer of that length here.
 */
const MAX_TRANSFER = 4 * 2 ** 20
/**
 * Bytes of all requests of a thread that are copied at a time; the others wait in line. A ring has room for 32768 requests,
 * each with its 4 MiB. Linux with a queue of 128 and its largest requests stays below it.
 */
const copies = new ByteBudget(256 * 2 ** 20)
const VIRTIO_ID_BLOCK = 2

/**
 * What is behind a disk. Offsets and lengths are in bytes, inside the disk, and whole blocks; no read or write moves
 * more than 4 MiB. A method that throws a {@link DiskError} or a system error (of `node:fs`, say) fails that request:
 * the driver gets an I/O error. Any other error is the device's own and ends the session.
 */
export interface BlkDisk {
  /** In bytes, a multiple of the block size. It may change; tell the driver by `context.config`. */
  readonly size: number
  /** What was said to {@link blkConfig}: a power of two from 512 on. The default is 512. */
  readonly blockSize?: number
  /** The serial number, at most 20 ASCII characters: /sys/block/vda/serial in a Linux guest. */
  readonly serial?: string
  /** Returns exactly `length` bytes, which are copied before anything else runs. */
  read(offset: number, length: number): Uint8Array | Promise<Uint8Array>
  /** Without it the disk can only be read. @param bytes a copy, the disk's to keep */
  write?(offset: number, bytes: Uint8Array<ArrayBuffer>): void | Promise<void>
  /** Everything that was written before is durable when it returns. Offered with `flush` of {@link blkFeatures}. */
  flush?(): void | Promise<void>
  /** The driver does not need what is there any more. */
  discard?(offset: number, length: number): void | Promise<void>
  /** Makes zeroes. @param unmap the space may be given back, too */
  writeZeroes?(offset: number, length: number, unmap: boolean): void | Promise<void>
}

/** Fails one request: the driver gets VIRTIO_BLK_S_IOERR. */
export class DiskError extends Error {
  override readonly name = 'DiskError'
  readonly kind: BlkErrorKind

  /** @param kind what it is counted as */
  constructor(message: string, kind: BlkErrorKind = 'io', options?: ErrorOptions) {
    super(message, options)
    this.kind = kind
  }
}

/** The fields of a `DeviceDescription` that all disks have in common, to be spread into it. */
export const blkDevice: {
  readonly virtioId: number
  readonly queues: readonly QueueDescription[]
  readonly operations: readonly string[]
  readonly errors: readonly string[]
  readonly qemu: QemuDevice
} = {
  virtioId: VIRTIO_ID_BLOCK,
  queues: [{ name: 'requests' }],
  operations: BLK_OPERATIONS,
  errors: BLK_ERRORS,
  // One thread serves it, so more queues would only cost; left alone QEMU makes one per vCPU.
  qemu: { driver: 'vhost-user-blk-pci', properties: { 'num-queues': 1 } },
}

/** What a disk can do; each needs its method in {@link BlkDisk}. */
export interface BlkCapabilities {
  readonly readOnly?: boolean
  readonly flush?: boolean
  readonly discard?: boolean
  readonly writeZeroes?: boolean
}

/** The feature bits of a disk (virtio 1.3 §5.2.3). */
export function blkFeatures(can: BlkCapabilities = {}): bigint {
  return featureSet(
    blk.VIRTIO_BLK_F_SEG_MAX,
    blk.VIRTIO_BLK_F_BLK_SIZE,
    ...(can.readOnly === true ? [blk.VIRTIO_BLK_F_RO] : []),
    ...(can.flush === true ? [blk.VIRTIO_BLK_F_FLUSH] : []),
    ...(can.discard === true ? [blk.VIRTIO_BLK_F_DISCARD] : []),
    ...(can.writeZeroes === true ? [blk.VIRTIO_BLK_F_WRITE_ZEROES] : [])
  )
}

/**
 * The config space of a disk (virtio 1.3 §5.2.4).
 * @param size of the disk in bytes
 * @param blockSize the logical block size in bytes: no request is for less
 * @throws RangeError when the size is no multiple of the block size, or that no power of two from 512 on
 */
export function blkConfig(size: number, blockSize = blk.VIRTIO_BLK_SECTOR_SIZE): Uint8Array<ArrayBuffer> {
  if (!Number.isInteger(Math.log2(blockSize)) || blockSize < blk.VIRTIO_BLK_SECTOR_SIZE || blockSize > 2 ** 30)
    throw new RangeError(`a block size is a power of two from 512 on, not ${blockSize}`)
  if (!Number.isSafeInteger(size) || size < 0 || size % blockSize !== 0)
    throw new RangeError(`a disk with blocks of ${blockSize} bytes cannot have ${size} bytes`)
  const bytes = new Uint8Array(blk.VIRTIO_BLK_CONFIG_SIZE_BEFORE_ZONED)
  const view = new DataView(bytes.buffer)
  view.setBigUint64(blk.VIRTIO_BLK_CONFIG_CAPACITY, BigInt(size / blk.VIRTIO_BLK_SECTOR_SIZE), true)
  view.setUint32(blk.VIRTIO_BLK_CONFIG_SEG_MAX, SEG_MAX, true)
  view.setUint32(blk.VIRTIO_BLK_CONFIG_BLK_SIZE, blockSize, true)
  view.setUint16(blk.VIRTIO_BLK_CONFIG_NUM_QUEUES, 1, true)
  const alignment = blockSize / blk.VIRTIO_BLK_SECTOR_SIZE
  view.setUint32(blk.VIRTIO_BLK_CONFIG_MAX_DISCARD_SECTORS, MAX_RANGE_SECTORS, true)
  view.setUint32(blk.VIRTIO_BLK_CONFIG_MAX_DISCARD_SEG, MAX_RANGES, true)
  view.setUint32(blk.VIRTIO_BLK_CONFIG_DISCARD_SECTOR_ALIGNMENT, alignment, true)
  view.setUint32(blk.VIRTIO_BLK_CONFIG_MAX_WRITE_ZEROES_SECTORS, MAX_RANGE_SECTORS, true)
  view.setUint32(blk.VIRTIO_BLK_CONFIG_MAX_WRITE_ZEROES_SEG, MAX_RANGES, true)
  view.setUint8(blk.VIRTIO_BLK_CONFIG_WRITE_ZEROES_MAY_UNMAP, 1)
  return bytes
}

const OPERATION_OF: Readonly<Record<number, BlkOperation>> = {
  [blk.VIRTIO_BLK_T_IN]: 'read',
  [blk.VIRTIO_BLK_T_OUT]: 'write',
  [blk.VIRTIO_BLK_T_FLUSH]: 'flush',
  [blk.VIRTIO_BLK_T_GET_ID]: 'get_id',
  [blk.VIRTIO_BLK_T_DISCARD]: 'discard',
  [blk.VIRTIO_BLK_T_WRITE_ZEROES]: 'write_zeroes',
}

/**
 * Answers one request: a `handle` that needs nothing more. Whatever the guest sends gets a status byte.
 * @throws what a method of the disk throws, when it is neither a DiskError nor a system error
 */
export async function handleBlkRequest(chain: DeviceChain, disk: BlkDisk): Promise<void> {
  const { reader, writer } = chain
  const whole = reader.length >= blk.VIRTIO_BLK_HEADER_SIZE
  const type = whole ? reader.u32() : -1
  const operation = OPERATION_OF[type] ?? 'other'
  chain.operation(operation)
  if (writer.length === 0) {
    // No room for a status: all that can be done is to give the chain back.
    chain.error('malformed')
    return
  }
  try {
    if (!whole) throw new DiskError('no header', 'malformed')
    const bytes = await perform(chain, disk, operation)
    chain.operation(operation, bytes)
    writer.seek(writer.length - 1).u8(blk.VIRTIO_BLK_S_OK)
  } catch (error) {
    const kind = kindOf(error)
    if (kind === undefined) throw error
    chain.error(kind)
    const status = kind === 'unsupported' ? blk.VIRTIO_BLK_S_UNSUPP : blk.VIRTIO_BLK_S_IOERR
    writer.seek(writer.length - 1).u8(status)
    // Of the data nothing was written, so the driver is told of none.
    chain.complete(1)
  }
}

/** Returns the bytes of payload. */
async function perform(chain: DeviceChain, disk: BlkDisk, operation: BlkOperation): Promise<number> {
  const { reader, writer } = chain
  const sector = reader.skip(4).u64()
  switch (operation) {
    case 'read': {
      const total = writer.length - 1
      const offset = checkedOffset(disk, sector, total)
      for (let done = 0; done < total; ) {
        const length = Math.min(total - done, MAX_TRANSFER)
        const turn = copies.take(length)
        if (turn !== undefined) await turn
        try {
          const bytes = await disk.read(offset + done, length)
          if (bytes.length !== length)
            throw new TypeError(`read(${offset + done}, ${length}) of the disk returned ${bytes.length} bytes`)
          writer.bytes(bytes)
        } finally {
          copies.give(length)
        }
        done += length
      }
      return total
    }
    case 'write': {
      const total = reader.remaining
      const offset = checkedOffset(disk, sector, total)
      if (disk.write === undefined) throw new DiskError('read-only', 'read_only')
      for (let done = 0; done < total; ) {
        const length = Math.min(total - done, MAX_TRANSFER)
        const turn = copies.take(length)
        if (turn !== undefined) await turn
        try {
          await disk.write(offset + done, reader.bytes(length))
        } finally {
          copies.give(length)
        }
        done += length
      }
      return total
    }
    case 'flush':
      if (disk.flush === undefined) throw new DiskError('no flush', 'unsupported')
      await disk.flush()
      return 0
    case 'get_id': {
      const id = new Uint8Array(blk.VIRTIO_BLK_ID_BYTES)
      new TextEncoder().encodeInto(disk.serial ?? '', id)
      const length = Math.min(id.length, writer.length - 1)
      writer.bytes(id.subarray(0, length))
      return length
    }
    case 'discard': {
      const ranges = readRanges(chain, disk, disk.discard !== undefined, 0)
      for (const { offset, length } of ranges) await disk.discard?.(offset, length)
      return totalLength(ranges)
    }
    case 'write_zeroes': {
      const ranges = readRanges(chain, disk, disk.writeZeroes !== undefined, blk.VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)
      for (const { offset, length, flags } of ranges) await disk.writeZeroes?.(offset, length, flags !== 0)
      return totalLength(ranges)
    }
    case 'other':
      throw new DiskError('unknown type', 'unsupported')
  }
}

interface Range {
  readonly offset: number
  readonly length: number
  readonly flags: number
}

/** The ranges of a DISCARD or WRITE_ZEROES, all checked before the first is touched; empty ones are left out. */
function readRanges(chain: DeviceChain, disk: BlkDisk, offered: boolean, knownFlags: number): Range[] {
  const { reader } = chain
  if (disk.write === undefined) throw new DiskError('read-only', 'read_only')
  if (!offered) throw new DiskError('not offered', 'unsupported')
  const count = reader.remaining / blk.VIRTIO_BLK_DISCARD_SEGMENT_SIZE
  if (count < 1 || count > MAX_RANGES || !Number.isInteger(count)) throw new DiskError('no ranges', 'malformed')
  const ranges: Range[] = []
  for (let i = 0; i < count; i++) {
    const sector = reader.u64()
    const sectors = reader.u32()
    const flags = reader.u32()
    // virtio 1.3 §5.2.6.2: an unknown flag, and unmap on DISCARD, are UNSUPP.
    if ((flags & ~knownFlags) !== 0) throw new DiskError(`flags ${flags}`, 'unsupported')
    if (sectors > MAX_RANGE_SECTORS) throw new DiskError('range too long', 'range')
    const length = sectors * blk.VIRTIO_BLK_SECTOR_SIZE
    const offset = checkedOffset(disk, sector, length)
    if (length > 0) ranges.push({ offset, length, flags })
  }
  return ranges
}

function totalLength(ranges: readonly Range[]): number {
  return ranges.reduce((total, range) => total + range.length, 0)
}

/** Where `length` bytes from `sector` are, in bytes. @throws DiskError when they are not whole blocks of the disk */
function checkedOffset(disk: BlkDisk, sector: bigint, length: number): number {
  const blockSize = disk.blockSize ?? blk.VIRTIO_BLK_SECTOR_SIZE
  // In the bigint's own arithmetic: a sector may be anything below 2^64.
  const offset = sector * BigInt(blk.VIRTIO_BLK_SECTOR_SIZE)
  if (offset + BigInt(length) > BigInt(disk.size)) throw new DiskError('beyond the end', 'range')
  if (Number(offset) % blockSize !== 0 || length % blockSize !== 0) throw new DiskError('not whole blocks', 'range')
  return Number(offset)
}

/** What a failed request is counted as; undefined when it is not the request that failed, but the device. */
function kindOf(error: unknown): BlkErrorKind | undefined {
  if (error instanceof DiskError) return error.kind
  if (!(error instanceof Error) || !('syscall' in error) || !('code' in error)) return undefined
  return error.code === 'ENOSPC' || error.code === 'EDQUOT' ? 'no_space' : 'io'
}

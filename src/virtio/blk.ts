/**
 * virtio-blk as the specification has it (virtio 1.3 §5.2): request types, feature bits, status values, the layout of
 * the config space and of the request structures. Names and values are the spec's own. Pure: no device, no driver.
 */
import { hasFeature } from './features.ts'

/** The unit of sector numbers and of the capacity, whatever the block size (virtio 1.3 §5.2.4). */
export const VIRTIO_BLK_SECTOR_SIZE = 512

// virtio 1.3 §5.2.3 "Feature bits"
export const VIRTIO_BLK_F_SIZE_MAX = 1
export const VIRTIO_BLK_F_SEG_MAX = 2
export const VIRTIO_BLK_F_GEOMETRY = 4
export const VIRTIO_BLK_F_RO = 5
export const VIRTIO_BLK_F_BLK_SIZE = 6
export const VIRTIO_BLK_F_FLUSH = 9
export const VIRTIO_BLK_F_TOPOLOGY = 10
export const VIRTIO_BLK_F_CONFIG_WCE = 11
export const VIRTIO_BLK_F_MQ = 12
export const VIRTIO_BLK_F_DISCARD = 13
export const VIRTIO_BLK_F_WRITE_ZEROES = 14
export const VIRTIO_BLK_F_LIFETIME = 15
export const VIRTIO_BLK_F_SECURE_ERASE = 16
export const VIRTIO_BLK_F_ZONED = 17

// virtio 1.3 §5.2.6 "Device Operation": request types
export const VIRTIO_BLK_T_IN = 0
export const VIRTIO_BLK_T_OUT = 1
export const VIRTIO_BLK_T_FLUSH = 4
export const VIRTIO_BLK_T_GET_ID = 8
export const VIRTIO_BLK_T_GET_LIFETIME = 10
export const VIRTIO_BLK_T_DISCARD = 11
export const VIRTIO_BLK_T_WRITE_ZEROES = 13
export const VIRTIO_BLK_T_SECURE_ERASE = 14

// virtio 1.3 §5.2.6: status values
export const VIRTIO_BLK_S_OK = 0
export const VIRTIO_BLK_S_IOERR = 1
export const VIRTIO_BLK_S_UNSUPP = 2

/** struct virtio_blk_req: le32 type, le32 reserved, le64 sector. */
export const VIRTIO_BLK_HEADER_SIZE = 16
/** The data of GET_ID: a string, zero-padded, without a terminator when it has 20 bytes. */
export const VIRTIO_BLK_ID_BYTES = 20
/** struct virtio_blk_discard_write_zeroes: le64 sector, le32 num_sectors, le32 flags (bit 0 unmap). */
export const VIRTIO_BLK_DISCARD_SEGMENT_SIZE = 16
/** Bit 0 of a WRITE_ZEROES segment's flags: the device may deallocate the range. */
export const VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP = 1

// virtio 1.3 §5.2.4 "Device configuration layout": byte offsets
export const VIRTIO_BLK_CONFIG_CAPACITY = 0
export const VIRTIO_BLK_CONFIG_SIZE_MAX = 8
export const VIRTIO_BLK_CONFIG_SEG_MAX = 12
export const VIRTIO_BLK_CONFIG_GEOMETRY = 16
export const VIRTIO_BLK_CONFIG_BLK_SIZE = 20
export const VIRTIO_BLK_CONFIG_PHYSICAL_BLOCK_EXP = 24
export const VIRTIO_BLK_CONFIG_ALIGNMENT_OFFSET = 25
export const VIRTIO_BLK_CONFIG_MIN_IO_SIZE = 26
export const VIRTIO_BLK_CONFIG_OPT_IO_SIZE = 28
export const VIRTIO_BLK_CONFIG_WCE = 32
export const VIRTIO_BLK_CONFIG_NUM_QUEUES = 34
export const VIRTIO_BLK_CONFIG_MAX_DISCARD_SECTORS = 36
export const VIRTIO_BLK_CONFIG_MAX_DISCARD_SEG = 40
export const VIRTIO_BLK_CONFIG_DISCARD_SECTOR_ALIGNMENT = 44
export const VIRTIO_BLK_CONFIG_MAX_WRITE_ZEROES_SECTORS = 48
export const VIRTIO_BLK_CONFIG_MAX_WRITE_ZEROES_SEG = 52
export const VIRTIO_BLK_CONFIG_WRITE_ZEROES_MAY_UNMAP = 56
export const VIRTIO_BLK_CONFIG_MAX_SECURE_ERASE_SECTORS = 60
export const VIRTIO_BLK_CONFIG_MAX_SECURE_ERASE_SEG = 64
export const VIRTIO_BLK_CONFIG_SECURE_ERASE_SECTOR_ALIGNMENT = 68
export const VIRTIO_BLK_CONFIG_ZONED = 72
/** The whole struct virtio_blk_config. */
export const VIRTIO_BLK_CONFIG_SIZE = 96
/** What QEMU 7.2 reads: up to and including write_zeroes_may_unmap. */
export const VIRTIO_BLK_CONFIG_SIZE_QEMU = 57
/** The structure before the secure-erase and zoned fields were added. */
export const VIRTIO_BLK_CONFIG_SIZE_BEFORE_ZONED = 60

/** The config space in words. A field whose feature bit is not offered is undefined, as its bytes mean nothing then. */
export interface BlkConfig {
  /** In 512-byte sectors. */
  readonly capacity: bigint
  readonly sizeMax?: number
  readonly segMax?: number
  readonly geometry?: { readonly cylinders: number; readonly heads: number; readonly sectors: number }
  /** Logical block size in bytes. */
  readonly blkSize?: number
  readonly topology?: {
    /** Logical blocks per physical block, as a power of two. */
    readonly physicalBlockExp: number
    readonly alignmentOffset: number
    /** In logical blocks. */
    readonly minIoSize: number
    readonly optIoSize: number
  }
  /** 1 = write-back, 0 = write-through. */
  readonly wce?: number
  readonly numQueues?: number
  readonly discard?: { readonly maxSectors: number; readonly maxSegments: number; readonly sectorAlignment: number }
  readonly writeZeroes?: { readonly maxSectors: number; readonly maxSegments: number; readonly mayUnmap: boolean }
  readonly secureErase?: { readonly maxSectors: number; readonly maxSegments: number; readonly sectorAlignment: number }
}

/**
 * Decodes the first bytes of a config space.
 * @param bytes what GET_CONFIG returned; fields beyond its end are undefined. At least 8 bytes.
 * @param features the device's feature bits: they say which fields are valid. All are taken as valid when left out.
 * @throws RangeError when not even the capacity is there
 */
export function decodeBlkConfig(bytes: Uint8Array, features: bigint = ~0n & 0xffff_ffff_ffff_ffffn): BlkConfig {
  if (bytes.length < 8) throw new RangeError(`a virtio-blk config space has at least 8 bytes, not ${bytes.length}`)
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  const has = (bit: number, end: number): boolean => hasFeature(features, bit) && bytes.length >= end
  const u16 = (at: number): number => view.getUint16(at, true)
  const u32 = (at: number): number => view.getUint32(at, true)
  return {
    capacity: view.getBigUint64(VIRTIO_BLK_CONFIG_CAPACITY, true),
    ...(has(VIRTIO_BLK_F_SIZE_MAX, 12) && { sizeMax: u32(VIRTIO_BLK_CONFIG_SIZE_MAX) }),
    ...(has(VIRTIO_BLK_F_SEG_MAX, 16) && { segMax: u32(VIRTIO_BLK_CONFIG_SEG_MAX) }),
    ...(has(VIRTIO_BLK_F_GEOMETRY, 20) && {
      geometry: { cylinders: u16(16), heads: view.getUint8(18), sectors: view.getUint8(19) },
    }),
    ...(has(VIRTIO_BLK_F_BLK_SIZE, 24) && { blkSize: u32(VIRTIO_BLK_CONFIG_BLK_SIZE) }),
    ...(has(VIRTIO_BLK_F_TOPOLOGY, 32) && {
      topology: {
        physicalBlockExp: view.getUint8(VIRTIO_BLK_CONFIG_PHYSICAL_BLOCK_EXP),
        alignmentOffset: view.getUint8(VIRTIO_BLK_CONFIG_ALIGNMENT_OFFSET),
        minIoSize: u16(VIRTIO_BLK_CONFIG_MIN_IO_SIZE),
        optIoSize: u32(VIRTIO_BLK_CONFIG_OPT_IO_SIZE),
      },
    }),
    ...(has(VIRTIO_BLK_F_CONFIG_WCE, 33) && { wce: view.getUint8(VIRTIO_BLK_CONFIG_WCE) }),
    ...(has(VIRTIO_BLK_F_MQ, 36) && { numQueues: u16(VIRTIO_BLK_CONFIG_NUM_QUEUES) }),
    ...(has(VIRTIO_BLK_F_DISCARD, 48) && {
      discard: {
        maxSectors: u32(VIRTIO_BLK_CONFIG_MAX_DISCARD_SECTORS),
        maxSegments: u32(VIRTIO_BLK_CONFIG_MAX_DISCARD_SEG),
        sectorAlignment: u32(VIRTIO_BLK_CONFIG_DISCARD_SECTOR_ALIGNMENT),
      },
    }),
    ...(has(VIRTIO_BLK_F_WRITE_ZEROES, 57) && {
      writeZeroes: {
        maxSectors: u32(VIRTIO_BLK_CONFIG_MAX_WRITE_ZEROES_SECTORS),
        maxSegments: u32(VIRTIO_BLK_CONFIG_MAX_WRITE_ZEROES_SEG),
        mayUnmap: view.getUint8(VIRTIO_BLK_CONFIG_WRITE_ZEROES_MAY_UNMAP) !== 0,
      },
    }),
    ...(has(VIRTIO_BLK_F_SECURE_ERASE, 72) && {
      secureErase: {
        maxSectors: u32(VIRTIO_BLK_CONFIG_MAX_SECURE_ERASE_SECTORS),
        maxSegments: u32(VIRTIO_BLK_CONFIG_MAX_SECURE_ERASE_SEG),
        sectorAlignment: u32(VIRTIO_BLK_CONFIG_SECURE_ERASE_SECTOR_ALIGNMENT),
      },
    }),
  }
}

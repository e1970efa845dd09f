/**
 * virtio-blk on a raw image file or a block device: the control half. It opens and locks the file, and keeps the
 * config space (virtio 1.3 §5.2.4).
 */
import { closeSync } from 'node:fs'
import {
  API_VERSION,
  type Device,
  type DeviceDefinition,
  type DeviceHost,
  featureSet,
  hasFeature,
  type QemuDevice,
} from '../../src/device/index.ts'
import * as blk from '../../src/device/virtio-blk.ts'
import { fileIdentity, type Image, type ImageNames, openImage, PHYSICAL_BLOCK } from '../disk/image.ts'
import { type BlkOptions, blkOptions } from './options.ts'
import { type BlkQueueData, BlkState, ERRORS, MAX_RANGE_SECTORS, MAX_RANGES, OPERATIONS } from './shared.ts'

const VIRTIO_ID_BLOCK = 2

/** Data segments of one request: header and status added they fit the 128 descriptors of QEMU's default ring. */
const SEG_MAX = 126
/** The most that Linux moves in one read or write (MAX_RW_COUNT). */
const SIZE_MAX = 0x7fff_f000
/** QEMU's largest ring. */
const QEMU_MAX_QUEUE_SIZE = 1024
const QEMU_QUEUE_SIZE = 256
const DEFAULT_NUM_QUEUES = 16

class BlkDevice implements Device<BlkQueueData> {
  readonly features: bigint
  readonly numQueues: number
  readonly maxQueueSize?: number
  readonly queueData: BlkQueueData
  readonly #options: BlkOptions
  readonly #host: DeviceHost
  readonly #fd: number
  readonly #blockSize: number
  readonly #state = new BlkState()
  #features = 0n

  constructor(options: BlkOptions, host: DeviceHost, image: Image) {
    const { fd, discard } = image
    this.#options = options
    this.#host = host
    this.#fd = fd
    this.#blockSize = image.blockSize
    this.#state.capacity = image.size / blk.VIRTIO_BLK_SECTOR_SIZE
    this.#state.writeback = options.cache !== 'writethrough'
    this.numQueues = options['num-queues']
    if (options['queue-size'] !== undefined) this.maxQueueSize = options['queue-size']
    this.features = featureSet(
      blk.VIRTIO_BLK_F_SIZE_MAX,
      blk.VIRTIO_BLK_F_SEG_MAX,
      blk.VIRTIO_BLK_F_BLK_SIZE,
      blk.VIRTIO_BLK_F_FLUSH,
      blk.VIRTIO_BLK_F_TOPOLOGY,
      blk.VIRTIO_BLK_F_CONFIG_WCE,
      ...(options['num-queues'] > 1 ? [blk.VIRTIO_BLK_F_MQ] : []),
      ...(options['read-only'] ? [blk.VIRTIO_BLK_F_RO] : [blk.VIRTIO_BLK_F_WRITE_ZEROES]),
      ...(discard ? [blk.VIRTIO_BLK_F_DISCARD] : [])
    )
    this.queueData = {
      fd,
      readOnly: options['read-only'],
      unsafe: options.cache === 'unsafe',
      blockSize: this.#blockSize,
      memoryAlign: image.memoryAlign,
      lengthAlign: image.lengthAlign,
      discard,
      serial: serial(options, fd),
      state: this.#state.buffer,
    }
  }

  config(): Uint8Array {
    const bytes = new Uint8Array(blk.VIRTIO_BLK_CONFIG_SIZE_BEFORE_ZONED)
    const view = new DataView(bytes.buffer)
    const sectorsPerBlock = this.#blockSize / blk.VIRTIO_BLK_SECTOR_SIZE
    const physical = Math.max(PHYSICAL_BLOCK, this.#blockSize) / this.#blockSize
    view.setBigUint64(blk.VIRTIO_BLK_CONFIG_CAPACITY, BigInt(this.#state.capacity), true)
    view.setUint32(blk.VIRTIO_BLK_CONFIG_SIZE_MAX, SIZE_MAX, true)
    view.setUint32(blk.VIRTIO_BLK_CONFIG_SEG_MAX, SEG_MAX, true)
    view.setUint32(blk.VIRTIO_BLK_CONFIG_BLK_SIZE, this.#blockSize, true)
    view.setUint8(blk.VIRTIO_BLK_CONFIG_PHYSICAL_BLOCK_EXP, Math.log2(physical))
    view.setUint16(blk.VIRTIO_BLK_CONFIG_MIN_IO_SIZE, physical, true)
    view.setUint8(blk.VIRTIO_BLK_CONFIG_WCE, this.#state.writeback ? 1 : 0)
    view.setUint16(blk.VIRTIO_BLK_CONFIG_NUM_QUEUES, this.numQueues, true)
    if (hasFeature(this.features, blk.VIRTIO_BLK_F_DISCARD)) {
      view.setUint32(blk.VIRTIO_BLK_CONFIG_MAX_DISCARD_SECTORS, MAX_RANGE_SECTORS, true)
      view.setUint32(blk.VIRTIO_BLK_CONFIG_MAX_DISCARD_SEG, MAX_RANGES, true)
      view.setUint32(blk.VIRTIO_BLK_CONFIG_DISCARD_SECTOR_ALIGNMENT, physical * sectorsPerBlock, true)
    }
    if (hasFeature(this.features, blk.VIRTIO_BLK_F_WRITE_ZEROES)) {
      view.setUint32(blk.VIRTIO_BLK_CONFIG_MAX_WRITE_ZEROES_SECTORS, MAX_RANGE_SECTORS, true)
      view.setUint32(blk.VIRTIO_BLK_CONFIG_MAX_WRITE_ZEROES_SEG, MAX_RANGES, true)
      view.setUint8(blk.VIRTIO_BLK_CONFIG_WRITE_ZEROES_MAY_UNMAP, this.queueData.discard ? 1 : 0)
    }
    return bytes
  }

  /** Only the write-cache switch may be written (virtio 1.3 §5.2.5.2). */
  writeConfig(offset: number, bytes: Uint8Array): boolean {
    const value = bytes[0]
    if (offset !== blk.VIRTIO_BLK_CONFIG_WCE || bytes.length !== 1 || value === undefined || value > 1) return false
    if (!hasFeature(this.#features, blk.VIRTIO_BLK_F_CONFIG_WCE)) return false
    this.#state.writeback = value === 1
    this.#host.log.debug({ writeback: value === 1 }, 'the driver switched the write cache')
    return true
  }

  negotiated(features: bigint): void {
    this.#features = features
  }

  reset(): void {
    this.#features = 0n
    this.#state.writeback = this.#options.cache !== 'writethrough'
  }

  /** What the driver switched, and would not switch again elsewhere. */
  saveState(): Uint8Array {
    return new TextEncoder().encode(JSON.stringify({ writeback: this.#state.writeback }))
  }

  /** @throws Error when it is no state of a disk */
  loadState(bytes: Uint8Array): void {
    const state: unknown = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes))
    const { writeback } = (state ?? {}) as { writeback?: unknown }
    if (typeof writeback !== 'boolean')
      throw new Error('no state of a disk: it does not say whether it has a write cache')
    this.#state.writeback = writeback
  }

  /** The image may have been resized; a part of a block at its end is not used. */
  refresh(): boolean {
    const { size } = this.#host.fileInfo(this.#fd)
    const capacity = (Math.floor(size / this.#blockSize) * this.#blockSize) / blk.VIRTIO_BLK_SECTOR_SIZE
    if (capacity === this.#state.capacity) return false
    this.#host.log.info({ from: this.#state.capacity, to: capacity }, 'the image was resized (512-byte sectors)')
    this.#state.capacity = capacity
    return true
  }

  qemu(): QemuDevice {
    const queues = this.numQueues
    return {
      driver: 'vhost-user-blk-pci',
      properties: {
        // Left alone QEMU makes one queue per vCPU, which is what most want.
        ...(queues === DEFAULT_NUM_QUEUES ? {} : { 'num-queues': queues }),
        'queue-size': Math.min(this.maxQueueSize ?? QEMU_QUEUE_SIZE, QEMU_MAX_QUEUE_SIZE),
      },
    }
  }

  close(): void {
    this.#host.handover.forget(fileKey(this.#host))
    closeSync(this.#fd)
  }
}

/** Under which a successor gets the open file. */
function fileKey(host: DeviceHost): string {
  return `blk:${host.name}`
}

/** How the options and error codes of this device are called. */
const ABOUT: ImageNames = {
  file: '--blk-file',
  readOnly: '--read-only',
  cache: '--cache',
  blockSize: '--block-size',
  discard: '--discard',
  lock: '--lock',
  codes: {
    open: 'ERR_BLK_FILE_OPEN',
    kind: 'ERR_BLK_FILE_KIND',
    locked: 'ERR_BLK_FILE_LOCKED',
    size: 'ERR_BLK_FILE_SIZE',
    blockSize: 'ERR_BLK_BLOCK_SIZE',
    cache: 'ERR_BLK_CACHE',
    discard: 'ERR_BLK_DISCARD',
  },
}

/** Opens, locks and examines the file. @throws ConfigError */
async function open(options: BlkOptions, host: DeviceHost): Promise<BlkDevice> {
  // The predecessor's open file has the lock, which nobody else can take meanwhile; and it stays the guest's disk,
  // whatever the path names by now.
  const [inherited] = host.handover.take(fileKey(host))?.fds ?? []
  const image = await openImage(
    {
      path: options['blk-file'],
      readOnly: options['read-only'],
      direct: options.cache === 'none',
      blockSize: options['block-size'],
      lock: options.lock === 'on',
      discard: options.discard,
    },
    ABOUT,
    host,
    inherited
  )
  host.handover.keep(fileKey(host), [image.fd], {})
  return new BlkDevice(options, host, image)
}

/** What GET_ID answers. Unset, it is made from the file's identity, so that it stays over restarts. */
function serial(options: BlkOptions, fd: number): Uint8Array {
  const text = options.serial ?? fileIdentity(fd).slice(0, blk.VIRTIO_BLK_ID_BYTES)
  const bytes = new Uint8Array(blk.VIRTIO_BLK_ID_BYTES)
  bytes.set(new TextEncoder().encode(text))
  return bytes
}

const definition: DeviceDefinition<BlkOptions, BlkQueueData> = {
  apiVersion: API_VERSION,
  name: 'blk',
  virtioId: VIRTIO_ID_BLOCK,
  options: blkOptions,
  operations: OPERATIONS,
  errors: ERRORS,
  queueModule: new URL('./queue.ts', import.meta.url),
  open,
}

export default definition

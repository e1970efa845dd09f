/**
 * virtio-blk on a raw image file or a block device: the control half. It opens and locks the file, and keeps the
 * config space (virtio 1.3 §5.2.4).
 */
import { closeSync, constants, fstatSync, openSync, statSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import {
  API_VERSION,
  ConfigError,
  type Device,
  type DeviceDefinition,
  type DeviceHost,
  type FileInfo,
  featureSet,
  hasFeature,
  type QemuDevice,
} from '../../src/device/index.ts'
import * as blk from '../../src/device/virtio-blk.ts'
import { type BlkOptions, blkOptions } from './options.ts'
import { type BlkQueueData, BlkState, ERRORS, MAX_RANGE_SECTORS, MAX_RANGES, OPERATIONS } from './shared.ts'

const VIRTIO_ID_BLOCK = 2

/** How long it is tried to lock the file. */
const LOCK_PATIENCE_MS = 2000

/** Data segments of one request: header and status added they fit the 128 descriptors of QEMU's default ring. */
const SEG_MAX = 126
/** The most that Linux moves in one read or write (MAX_RW_COUNT). */
const SIZE_MAX = 0x7fff_f000
/** Physical block that we tell drivers: the page cache's, and that of most disks. Partitions are aligned to it. */
const PHYSICAL_BLOCK = 4096
/** QEMU's largest ring. */
const QEMU_MAX_QUEUE_SIZE = 1024
const QEMU_QUEUE_SIZE = 256
const DEFAULT_NUM_QUEUES = 16

const FALLOC_FL_KEEP_SIZE = 1
const FALLOC_FL_PUNCH_HOLE = 2

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

  constructor(options: BlkOptions, host: DeviceHost, fd: number, info: FileInfo) {
    const direct = options.cache === 'none'
    this.#options = options
    this.#host = host
    this.#fd = fd
    this.#blockSize = blockSize(options, info)
    this.#state.capacity = info.size / blk.VIRTIO_BLK_SECTOR_SIZE
    this.#state.writeback = options.cache !== 'writethrough'
    this.numQueues = options['num-queues']
    if (options['queue-size'] !== undefined) this.maxQueueSize = options['queue-size']
    const discard = !options['read-only'] && canDiscard(options, host, fd, info)
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
      // Where the kernel does not tell, the logical block is what it demands.
      memoryAlign: direct ? info.directMemoryAlign || this.#blockSize : 1,
      lengthAlign: direct ? info.directOffsetAlign || this.#blockSize : 1,
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

/**
 * A process that was killed has its locks until the kernel is through with its last reads, writes and flushes. That is
 * waited for: who starts at once in its place would be refused otherwise, and a write of it must not come after ours.
 * @throws ConfigError when somebody alive has the lock, as far as can be seen in {@link LOCK_PATIENCE_MS}
 */
async function lock(fd: number, options: BlkOptions, host: DeviceHost): Promise<void> {
  const deadline = performance.now() + LOCK_PATIENCE_MS
  while (!host.lockFile(fd, !options['read-only'])) {
    if (performance.now() < deadline) {
      await sleep(10)
      continue
    }
    throw new ConfigError(
      'ERR_BLK_FILE_LOCKED',
      '--blk-file',
      `${options['blk-file']} is locked: another process or another device serves it`,
      'Stop the other one; several may share a file only when all of them have --read-only, or --lock off for a migration.'
    )
  }
}

/** Opens, locks and examines the file. @throws ConfigError */
async function open(options: BlkOptions, host: DeviceHost): Promise<BlkDevice> {
  const path = options['blk-file']
  // The predecessor's open file has the lock, which nobody else can take meanwhile; and it stays the guest's disk,
  // whatever the path names by now.
  const [inherited] = host.handover.take(fileKey(host))?.fds ?? []
  const fd = inherited ?? openFile(path, options)
  try {
    const info = host.fileInfo(fd)
    if (info.kind === 'other') throw kindError(path)
    if (inherited === undefined && options.lock === 'on') await lock(fd, options, host)
    const size = blockSize(options, info)
    if (info.size === 0 || info.size % size !== 0) {
      const fix = `Make its size a multiple, e.g. with: truncate -s %${size} ${path}`
      const problem =
        info.size === 0 ? `${path} is empty` : `${path} has ${info.size} bytes, no multiple of the block size ${size}`
      throw new ConfigError(
        'ERR_BLK_FILE_SIZE',
        '--blk-file',
        problem,
        info.size === 0 ? `Give it a size, e.g. with: truncate -s 1G ${path}` : fix
      )
    }
    const device = new BlkDevice(options, host, fd, info)
    host.handover.keep(fileKey(host), [fd], {})
    return device
  } catch (error) {
    closeSync(fd)
    throw error
  }
}

function kindError(path: string): ConfigError {
  const fix = 'Give a raw image or a disk.'
  return new ConfigError('ERR_BLK_FILE_KIND', '--blk-file', `${path} is neither a regular file nor a block device`, fix)
}

function openFile(path: string, options: BlkOptions): number {
  const direct = options.cache === 'none' ? constants.O_DIRECT : 0
  try {
    // Looked at before it is opened: opening a FIFO waits for its other end.
    const stat = statSync(path)
    if (!stat.isFile() && !stat.isBlockDevice() && !stat.isDirectory()) throw kindError(path)
    return openSync(path, (options['read-only'] ? constants.O_RDONLY : constants.O_RDWR) | direct)
  } catch (cause) {
    if (cause instanceof ConfigError) throw cause
    const { code } = cause as NodeJS.ErrnoException
    if (code === 'EINVAL' && direct !== 0) {
      const fix = 'Use --cache writeback, or keep the file on another file system.'
      throw new ConfigError('ERR_BLK_CACHE', '--cache', `the file system of ${path} cannot do O_DIRECT`, fix, { cause })
    }
    const [problem, fix] = OPEN_ERRORS[code ?? ''] ?? [`cannot be opened (${code})`, 'Give a file that can be opened.']
    throw new ConfigError('ERR_BLK_FILE_OPEN', '--blk-file', `${path} ${problem}`, fix, { cause })
  }
}

const OPEN_ERRORS: Readonly<Record<string, readonly [problem: string, fix: string]>> = {
  ENOENT: ['does not exist', 'Create it, e.g. with: truncate -s 1G FILE'],
  EISDIR: ['is a directory', 'Give a raw image or a block device.'],
  EACCES: ['may not be opened by this user', 'Change its permissions, or serve it with --read-only.'],
  EROFS: ['is on a read-only file system', 'Serve it with --read-only.'],
  EPERM: ['may not be opened by this user', 'Change its permissions, or serve it with --read-only.'],
}

/** @throws ConfigError when the file can't be accessed in blocks of the wanted size */
function blockSize(options: BlkOptions, info: FileInfo): number {
  const least = Math.max(info.blockSize, options.cache === 'none' ? info.directOffsetAlign : 0)
  const wanted = options['block-size']
  if (wanted === undefined) return least
  if (wanted < least) {
    const fix = `Give --block-size ${least}, or leave it away.`
    throw new ConfigError(
      'ERR_BLK_BLOCK_SIZE',
      '--block-size',
      `${options['blk-file']} is accessed in blocks of ${least} bytes`,
      fix
    )
  }
  return wanted
}

/**
 * Whether space can be given back. Asked of the file itself, behind its end, where nothing is changed. @throws
 * ConfigError
 */
function canDiscard(options: BlkOptions, host: DeviceHost, fd: number, info: FileInfo): boolean {
  if (options.discard === 'off') return false
  // A block device takes fallocate only inside its size; those that cannot discard write zeroes instead.
  const result =
    info.kind === 'block'
      ? 0
      : host.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, info.size, PHYSICAL_BLOCK)
  if (result === 0) return true
  if (options.discard === 'on') {
    const fix = 'Leave --discard away, or keep the file on a file system with holes (ext4, xfs, btrfs, tmpfs).'
    throw new ConfigError(
      'ERR_BLK_DISCARD',
      '--discard',
      `the file system of ${options['blk-file']} cannot punch holes`,
      fix
    )
  }
  return false
}

/** What GET_ID answers. Unset, it is made from the file's identity, so that it stays over restarts. */
function serial(options: BlkOptions, fd: number): Uint8Array {
  const stat = fstatSync(fd, { bigint: true })
  const text = options.serial ?? `${stat.dev.toString(16)}-${stat.ino.toString(16)}`.slice(0, blk.VIRTIO_BLK_ID_BYTES)
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

/**
 * What a disk is kept in, a raw image or a block device: opened, locked and examined, for the control halves of all
 * devices that serve disks. It must not know what is served; the caller says how options and error codes are called.
 */
import { closeSync, constants, fstatSync, openSync, statSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { ConfigError, type DeviceHost, type FileInfo } from '../../src/device/index.ts'

/** How long it is tried to lock the file. */
const LOCK_PATIENCE_MS = 2000

/** Physical block that we tell drivers: the page cache's, and that of most disks. Partitions are aligned to it. */
export const PHYSICAL_BLOCK = 4096

// fallocate(2)
export const FALLOC_FL_KEEP_SIZE = 1
export const FALLOC_FL_PUNCH_HOLE = 2
export const FALLOC_FL_ZERO_RANGE = 16

export interface ImageOptions {
  readonly path: string
  readonly readOnly: boolean
  /** O_DIRECT. */
  readonly direct: boolean
  /** Bytes of a logical block; undefined = the file's own. */
  readonly blockSize: number | undefined
  /** Lock it against a second writer. */
  readonly lock: boolean
  /** Whether space can be given back: `on` demands it, undefined finds out. */
  readonly discard: 'on' | 'off' | undefined
}

/** What the options are called in messages, and the codes of what can go wrong. */
export interface ImageNames {
  readonly file: string
  readonly readOnly: string
  readonly cache: string
  readonly blockSize: string
  readonly discard: string
  readonly lock: string
  readonly codes: Readonly<Record<'open' | 'kind' | 'locked' | 'size' | 'blockSize' | 'cache' | 'discard', string>>
}

/** An open image. The fd is the owner's to close. */
export interface Image {
  readonly fd: number
  /** Bytes, a multiple of `blockSize`. */
  readonly size: number
  /** Bytes of a logical block. */
  readonly blockSize: number
  /** What O_DIRECT demands of addresses and lengths; 1 = nothing. */
  readonly memoryAlign: number
  readonly lengthAlign: number
  /** Holes can be punched. */
  readonly discard: boolean
}

/**
 * Opens, locks and examines the file.
 * @param inherited from a predecessor, open and locked: it is used, or closed when it can't be
 * @throws ConfigError
 */
export async function openImage(
  options: ImageOptions,
  names: ImageNames,
  host: DeviceHost,
  inherited?: number
): Promise<Image> {
  const fd = inherited ?? openFile(options, names)
  try {
    const info = host.fileInfo(fd)
    if (info.kind === 'other') throw kindError(options.path, names)
    if (inherited === undefined && options.lock) await lock(fd, options, names, host)
    const blockSize = checkBlockSize(options, names, info)
    checkSize(options.path, names, info, blockSize)
    return {
      fd,
      size: info.size,
      blockSize,
      // Where the kernel does not tell, the logical block is what it demands.
      memoryAlign: options.direct ? info.directMemoryAlign || blockSize : 1,
      lengthAlign: options.direct ? info.directOffsetAlign || blockSize : 1,
      discard: !options.readOnly && canDiscard(options, names, host, fd, info),
    }
  } catch (error) {
    closeSync(fd)
    throw error
  }
}

/** Device and inode in hexadecimal: what a serial number is made of, so that it stays over restarts. */
export function fileIdentity(fd: number): string {
  const stat = fstatSync(fd, { bigint: true })
  return `${stat.dev.toString(16)}-${stat.ino.toString(16)}`
}

/**
 * A process that was killed has its locks until the kernel is through with its last reads, writes and flushes. That is
 * waited for: who starts at once in its place would be refused otherwise, and a write of it must not come after ours.
 * @throws ConfigError when somebody alive has the lock, as far as can be seen in {@link LOCK_PATIENCE_MS}
 */
async function lock(fd: number, options: ImageOptions, names: ImageNames, host: DeviceHost): Promise<void> {
  const deadline = performance.now() + LOCK_PATIENCE_MS
  while (!host.lockFile(fd, !options.readOnly)) {
    if (performance.now() < deadline) {
      await sleep(10)
      continue
    }
    throw new ConfigError(
      names.codes.locked,
      names.file,
      `${options.path} is locked: another process or another device serves it`,
      `Stop the other one; several may share a file only when all of them have ${names.readOnly}, or ${names.lock} off ` +
        'for a migration.'
    )
  }
}

function openFile({ path, readOnly, direct }: ImageOptions, names: ImageNames): number {
  const flags = (readOnly ? constants.O_RDONLY : constants.O_RDWR) | (direct ? constants.O_DIRECT : 0)
  try {
    // Looked at before it is opened: opening a FIFO waits for its other end.
    const stat = statSync(path)
    if (!stat.isFile() && !stat.isBlockDevice() && !stat.isDirectory()) throw kindError(path, names)
    return openSync(path, flags)
  } catch (cause) {
    if (cause instanceof ConfigError) throw cause
    const { code } = cause as NodeJS.ErrnoException
    if (code === 'EINVAL' && direct) {
      const fix = `Use ${names.cache} writeback, or keep the file on another file system.`
      const problem = `the file system of ${path} cannot do O_DIRECT`
      throw new ConfigError(names.codes.cache, names.cache, problem, fix, { cause })
    }
    const serveReadOnly = `serve it with ${names.readOnly}.`
    const [problem, fix] = openProblem(code, serveReadOnly)
    throw new ConfigError(names.codes.open, names.file, `${path} ${problem}`, fix, { cause })
  }
}

function openProblem(code: string | undefined, serveReadOnly: string): readonly [problem: string, fix: string] {
  switch (code) {
    case 'ENOENT':
      return ['does not exist', 'Create it, e.g. with: truncate -s 1G FILE']
    case 'EISDIR':
      return ['is a directory', 'Give a raw image or a block device.']
    case 'EACCES':
    case 'EPERM':
      return ['may not be opened by this user', `Change its permissions, or ${serveReadOnly}`]
    case 'EROFS':
      return ['is on a read-only file system', `S${serveReadOnly.slice(1)}`]
    default:
      return [`cannot be opened (${code})`, 'Give a file that can be opened.']
  }
}

function kindError(path: string, names: ImageNames): ConfigError {
  const problem = `${path} is neither a regular file nor a block device`
  return new ConfigError(names.codes.kind, names.file, problem, 'Give a raw image or a disk.')
}

/** @throws ConfigError when the file is empty, or has a part of a block at its end */
function checkSize(path: string, names: ImageNames, { size }: FileInfo, blockSize: number): void {
  if (size === 0) {
    const fix = `Give it a size, e.g. with: truncate -s 1G ${path}`
    throw new ConfigError(names.codes.size, names.file, `${path} is empty`, fix)
  }
  if (size % blockSize === 0) return
  const problem = `${path} has ${size} bytes, no multiple of the block size ${blockSize}`
  const fix = `Make its size a multiple, e.g. with: truncate -s %${blockSize} ${path}`
  throw new ConfigError(names.codes.size, names.file, problem, fix)
}

/** @throws ConfigError when the file can't be accessed in blocks of the wanted size */
function checkBlockSize({ path, direct, blockSize }: ImageOptions, names: ImageNames, info: FileInfo): number {
  const least = Math.max(info.blockSize, direct ? info.directOffsetAlign : 0)
  if (blockSize === undefined) return least
  if (blockSize >= least) return blockSize
  const problem = `${path} is accessed in blocks of ${least} bytes`
  const fix = `Give ${names.blockSize} ${least}, or leave it away.`
  throw new ConfigError(names.codes.blockSize, names.blockSize, problem, fix)
}

/**
 * Whether space can be given back. Asked of the file itself, behind its end, where nothing is changed. @throws
 * ConfigError
 */
function canDiscard(
  { path, discard }: ImageOptions,
  names: ImageNames,
  host: DeviceHost,
  fd: number,
  info: FileInfo
): boolean {
  if (discard === 'off') return false
  // A block device takes fallocate only inside its size; those that cannot discard write zeroes instead.
  const result =
    info.kind === 'block'
      ? 0
      : host.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, info.size, PHYSICAL_BLOCK)
  if (result === 0) return true
  if (discard !== 'on') return false
  const problem = `the file system of ${path} cannot punch holes`
  const fix = `Leave ${names.discard} away, or keep the file on a file system with holes (ext4, xfs, btrfs, tmpfs).`
  throw new ConfigError(names.codes.discard, names.discard, problem, fix)
}

/** What a device's control half asks about files: geometry, locks, capabilities. */
import type { FileInfo } from '../device/index.ts'
import { native, systemError } from '../native.ts'

const S_IFMT = 0o170000
const S_IFREG = 0o100000
const S_IFBLK = 0o060000

/** @throws a system error */
export function fileInfo(fd: number): FileInfo {
  const info = new Float64Array(8)
  const result = native.fdInfo(fd, info)
  if (result < 0) throw systemError(result, 'fstat', `cannot examine fd ${fd}`)
  const format = info[0]! & S_IFMT
  return {
    kind: format === S_IFREG ? 'file' : format === S_IFBLK ? 'block' : 'other',
    size: info[1]!,
    blockSize: info[3]!,
    directMemoryAlign: info[4]!,
    directOffsetAlign: info[5]!,
  }
}

/** Returns false when another open file description holds a conflicting lock. @throws a system error */
export function lockFile(fd: number, exclusive: boolean): boolean {
  const EAGAIN = -11
  const EACCES = -13
  const result = native.lockFile(fd, exclusive)
  if (result === 0) return true
  if (result === EAGAIN || result === EACCES) return false
  throw systemError(result, 'fcntl', 'cannot lock the file')
}

/** fallocate(2), blocking: 0 or -errno. */
export function probeFallocate(fd: number, mode: number, offset: number, length: number): number {
  return native.fallocate(fd, mode, offset, length)
}

/** A file in memory under a name that shows in /proc/PID/fd. @throws a system error */
export function memoryFile(name: string, size: number): number {
  const fd = native.memfd(name, size, 0)
  if (fd < 0) throw systemError(fd, 'memfd_create', 'cannot create a file in memory')
  return fd
}

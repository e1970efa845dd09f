/** Files that the front-end shares, mapped under the SIGBUS guard: checked first, given back at once by `release`. */
import { type NativeMapping, native } from '../native.ts'
import { ProtocolError, type ProtocolErrorCode } from './errors.ts'
import type { SharedArea } from './ring-host.ts'

/** Addresses and file offsets must survive as a double. */
export const ADDRESS_LIMIT = 1n << 53n

const S_IFMT = 0o170000
const S_IFREG = 0o100000

/**
 * Maps `length` bytes of `fd` from `offset`. @param what it is, for the message
 * @throws ProtocolError when it is no file, or too short, or cannot be mapped
 */
export function mapSharedFile(
  fd: number,
  offset: number,
  length: number,
  what: string,
  code: ProtocolErrorCode
): NativeMapping {
  const info = new Float64Array(8)
  const result = native.fdInfo(fd, info)
  if (result < 0 || (info[0]! & S_IFMT) !== S_IFREG) {
    throw new ProtocolError(code, `the fd of ${what} is no shared-memory file`)
  }
  // The peer may shrink the file later, which the SIGBUS guard handles; now it must be whole.
  if (offset + length > info[1]!) {
    throw new ProtocolError(code, `${what} ends at ${offset + length}, its file at ${info[1]}`)
  }
  // Only hugetlbfs has pages that mmap insists on; for others the block size is harmless to round to.
  const page = Math.max(4096, info[2]!)
  const mapOffset = Math.floor(offset / page) * page
  const mapLength = Math.ceil((offset + length) / page) * page - mapOffset
  const mapping = native.mapFile(fd, mapOffset, mapLength, offset - mapOffset, length, true)
  if (typeof mapping === 'number') throw new ProtocolError(code, `${what} cannot be mapped (errno ${-mapping})`)
  return mapping
}

/** An fd of our own for what `fd` is. @throws ProtocolError when there is none left */
export function duplicate(fd: number, what: string, code: ProtocolErrorCode): number {
  const own = native.dup(fd)
  if (own < 0) throw new ProtocolError(code, `the fd of ${what} cannot be kept (errno ${-own})`)
  return own
}

/** A part of a file that isn't guest memory: the dirty log, the in-flight buffer. It keeps an fd for a handover. */
export class MappedArea implements SharedArea {
  readonly buffer: SharedArrayBuffer
  readonly offset = 0
  readonly size: number
  readonly fileOffset: number
  readonly fd: number
  readonly #address: number

  private constructor({ address, buffer }: NativeMapping, size: number, fileOffset: number, fd: number) {
    this.buffer = buffer
    this.size = size
    this.fileOffset = fileOffset
    this.fd = fd
    this.#address = address
  }

  /** @param fd stays the caller's @throws ProtocolError */
  static map(fd: number, offset: bigint, size: bigint, what: string, code: ProtocolErrorCode): MappedArea {
    if (size === 0n || offset + size > ADDRESS_LIMIT) {
      throw new ProtocolError(code, `${what} has ${size} bytes from ${offset} on`)
    }
    const mapping = mapSharedFile(fd, Number(offset), Number(size), what, code)
    try {
      return new MappedArea(mapping, Number(size), Number(offset), duplicate(fd, what, code))
    } catch (error) {
      native.release(mapping.address)
      throw error
    }
  }

  /** The front-end truncated the file. */
  get faulted(): boolean {
    return native.faults(this.#address) > 0
  }

  /** Gives the pages and the fd back. Nothing may use the area any more. */
  release(): void {
    native.release(this.#address)
    native.close(this.fd)
  }
}

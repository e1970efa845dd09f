/**
 * A file that an iothread does I/O on: its slot in the ring, and a mapping of it where copying out of the page cache
 * is right.
 */
import { constants, statfsSync } from 'node:fs'
import type { IoFile } from '../device/index.ts'
import { type NativeMapping, native } from '../native.ts'

const S_IFMT = 0o170000
const S_IFREG = 0o100000
const PAGE = 4096
/** O_ACCMODE. */
const ACCESS_MODE = constants.O_RDONLY | constants.O_WRONLY | constants.O_RDWR

/**
 * File systems whose files are mapped: linux/magic.h. On tmpfs a copy out of a hole would allocate memory for it, and
 * a page fault on a network or a FUSE file system waits for somebody else.
 */
const EXT4 = 0xef53
const XFS = 0x58465342
const BTRFS = 0x9123683e
const F2FS = 0xf2f52010
const MAPPED_FILE_SYSTEMS = new Set([EXT4, XFS, BTRFS, F2FS])

export class RingFile implements IoFile {
  readonly fd: number
  readonly slot: number
  readonly buffered: boolean
  /** Where the file is mapped, and how much of it; 0 = it isn't. */
  mappedAddress = 0
  mappedLength = 0
  /** The file, and so the mapping, is open for writing. */
  readonly mappedWritable: boolean
  /** SAFETY: holds the mapping at `mappedAddress`: without a reference the garbage collector unmaps it. */
  #mapping: NativeMapping | undefined

  /** The ring's `copyFaults` when the mapping was last found whole. */
  faults: number

  constructor(fd: number, slot: number, faults: number) {
    this.faults = faults
    this.fd = fd
    this.slot = slot
    const info = new Float64Array(8)
    const examined = native.fdInfo(fd, info) === 0
    this.buffered = examined && (info[0]! & S_IFMT) === S_IFREG && (info[6]! & constants.O_DIRECT) === 0
    this.mappedWritable = (info[6]! & ACCESS_MODE) === constants.O_RDWR
    if (this.buffered) this.#map(info[1]!)
  }

  /** After a copy ran into missing pages: gives the mapping up if it was this one, since it reads as zeroes now. */
  check(faults: number): void {
    this.faults = faults
    if (this.#mapping !== undefined && native.faults(this.#mapping.address) !== 0) this.unmap()
  }

  /** Nothing is in flight on the file. */
  unmap(): void {
    if (this.#mapping !== undefined) native.release(this.#mapping.address)
    this.#mapping = undefined
    this.mappedAddress = 0
    this.mappedLength = 0
  }

  /** What the file grows later is read by io_uring. */
  #map(size: number): void {
    const length = Math.floor(size / PAGE) * PAGE
    if (length === 0 || !MAPPED_FILE_SYSTEMS.has(statfsSync(`/proc/self/fd/${this.fd}`).type)) return
    const mapping = native.mapFile(this.fd, 0, length, 0, length, this.mappedWritable)
    if (typeof mapping === 'number') return
    this.#mapping = mapping
    this.mappedAddress = mapping.address
    this.mappedLength = length
  }
}

/**
 * A file that an iothread does I/O on: its slot in the ring, and a mapping of it where copying out of the page cache
 * is right.
 */
import { constants, statfsSync } from 'node:fs'
import type { IoFile } from '../device/index.ts'
import { type NativeMapping, native } from '../native.ts'

const S_IFMT = 0o170000
const S_IFREG = 0o100000
/** A multiple of every processor's page: behind the last whole one a copy would lose what it writes. */
const PAGE = 65536
/**
 * The smallest block of a file system whose files are written through a mapping. Below a page, kernels before Linux
 * 6.14 leave writable mappings of ext4 in place when part of a page is punched out.
 */
const WRITABLE_BLOCK = 4096
/** How long a file whose mapping was given up is left to io_uring before it is mapped again. */
const REMAP_AFTER_MS = 5000
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
  mappedWritable = false
  /** When to try to map it again (performance.now()), 0 = it is mapped, or never will be. */
  remapAt = 0
  /** Handlers that have it open. */
  users = 0
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
    if (this.buffered) this.#map(info)
  }

  /** After a copy ran into missing pages: gives the mapping up if it was this one, since it reads as zeroes now. */
  check(faults: number): void {
    this.faults = faults
    if (this.#mapping === undefined || native.faults(this.#mapping.address) === 0) return
    this.unmap()
    // A full disk is freed some day, and a file that was cut may grow again.
    this.remapAt = performance.now() + REMAP_AFTER_MS
  }

  /** Maps the file as it is now. */
  remap(): void {
    this.remapAt = 0
    const info = new Float64Array(8)
    if (native.fdInfo(this.fd, info) === 0) this.#map(info)
  }

  /** Nothing is in flight on the file. */
  unmap(): void {
    if (this.#mapping !== undefined) native.release(this.#mapping.address)
    this.#mapping = undefined
    this.mappedAddress = 0
    this.mappedLength = 0
  }

  /** What the file grows later is read by io_uring. @param info of the file, see Native.fdInfo */
  #map(info: Float64Array): void {
    const length = Math.floor(info[1]! / PAGE) * PAGE
    const fileSystem = statfsSync(`/proc/self/fd/${this.fd}`)
    if (length === 0 || !MAPPED_FILE_SYSTEMS.has(fileSystem.type)) return
    const writable = (info[6]! & ACCESS_MODE) === constants.O_RDWR && fileSystem.bsize >= WRITABLE_BLOCK
    const mapping = native.mapFile(this.fd, 0, length, 0, length, writable)
    if (typeof mapping === 'number') return
    // A guest that reads here and there must not fill the host's page cache with what lies around.
    native.adviseRandom(mapping.address)
    this.#mapping = mapping
    this.mappedAddress = mapping.address
    this.mappedLength = length
    this.mappedWritable = writable
  }
}

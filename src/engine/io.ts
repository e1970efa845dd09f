/**
 * The device's I/O on one queue: byte ranges of chains become ring entries. This is the one place where a guest's
 * buffer becomes an address for the kernel.
 */
import type { Chain, CopyBatch, DeviceIo, IoBuffer, IoFile, PacketReceiver, PacketSender } from '../device/index.ts'
import { native, systemError } from '../native.ts'
import { PieceBatch } from './copies.ts'
import { FdPacketReceiver, FdPacketSender } from './packets.ts'
import { type IoRing, MAX_VECTORS, WRITE_BUFFERED, WRITE_DSYNC, WRITE_PLAIN } from './ring.ts'
import { RingFile } from './ring-file.ts'

/** Bytes up to which a read is copied: nothing else happens on the iothread meanwhile. */
const COPIED_READ = 256 * 1024

/**
 * Bytes up to which a write is copied into the mapping: 0.8 µs of CPU for 4 KiB into a page that is dirty already,
 * against 2.5 by pwritev; but each clean page costs a fault of its own, which pwritev of many pages does not.
 */
const COPIED_WRITE = 16 * 1024

/** Who polls the fds that a handler watches. */
export interface FdWatcher {
  watch(fd: number): void
  unwatch(fd: number): void
}

/** What it needs of the iothread; see QueueOwner. */
export interface IoOwner {
  readonly ring: IoRing
  readonly serving: boolean
  stir(): void
}

export class Io implements DeviceIo {
  readonly #owner: IoOwner
  readonly #ring: IoRing
  readonly #watcher: FdWatcher
  readonly #queue: number
  readonly #tag: number
  /** Operations with the kernel. */
  outstanding = 0
  /** Nothing is submitted any more. */
  #ended = false
  // The range that #locate found: first segment, offset in it.
  #segment = 0
  #skip = 0

  constructor(owner: IoOwner, queue: number, tag: number, watcher: FdWatcher) {
    this.#owner = owner
    this.#ring = owner.ring
    this.#watcher = watcher
    this.#queue = queue << 16
    this.#tag = tag
  }

  /**
   * From now on operations are asked for in vain: their chains are abandoned, which who asks need not know (a request
   * that waited for a buffer).
   */
  end(): void {
    this.#ended = true
  }

  openFile(fd: number): IoFile {
    const ring = this.#ring
    let file = ring.files.get(fd)
    if (file === undefined) {
      file = new RingFile(fd, ring.openFile(fd), ring.copyFaults)
      ring.files.set(fd, file)
    }
    file.users++
    return file
  }

  closeFile(file: IoFile): void {
    const known = file as RingFile
    if (--known.users > 0) return
    this.#ring.files.delete(known.fd)
    this.#ring.closeFile(known.fd)
    known.unmap()
  }

  watch(fd: number): void {
    if (this.#ended) return
    if (!this.#owner.serving) this.#owner.stir()
    this.#watcher.watch(fd)
  }

  unwatch(fd: number): void {
    if (!this.#owner.serving) this.#owner.stir()
    this.#watcher.unwatch(fd)
  }

  packetSender(fd: number, capacity: number): PacketSender {
    return new FdPacketSender(fd, capacity)
  }

  packetReceiver(fd: number, capacity: number): PacketReceiver {
    return new FdPacketReceiver(fd, capacity)
  }

  copyBatch(capacity: number): CopyBatch {
    return new PieceBatch(capacity)
  }

  allocate(length: number): IoBuffer {
    const mapping = native.allocate(length)
    if (typeof mapping === 'number') throw systemError(mapping, 'mmap', `cannot allocate ${length} bytes`)
    return { bytes: new Uint8Array(mapping.buffer), address: mapping.address }
  }

  read(chain: Chain, file: IoFile, offset: number, start: number, length: number): void {
    if (this.#ended) return
    const count = this.#locate(chain, chain.readableCount, chain.count, start, length)
    const user = this.#user(chain)
    // Before it is decided on a copy: making room may run a batch, and that may find the mapping gone.
    if (count > 1) this.#ring.beginVectors(count)
    if (this.#copies(file as RingFile, offset, length))
      return this.#copy(chain, file, offset, count, length, false, user)
    if (count === 1) this.#ring.read(file.fd, file.slot, offset, this.#address(chain), length, user, this.#tag)
    else {
      this.#vectors(chain, count, length)
      this.#ring.readVector(file.fd, file.slot, offset, count, user, this.#tag)
    }
  }

  write(chain: Chain, file: IoFile, offset: number, start: number, length: number, dsync: boolean): void {
    if (this.#ended) return
    const count = this.#locate(chain, 0, chain.readableCount, start, length)
    const user = this.#user(chain)
    if (count > 1) this.#ring.beginVectors(count)
    if (
      !dsync &&
      length <= COPIED_WRITE &&
      (file as RingFile).mappedWritable &&
      this.#copies(file as RingFile, offset, length)
    )
      return this.#copy(chain, file, offset, count, length, true, user)
    const kind = writeKind(file, dsync)
    if (count === 1) this.#ring.write(file.fd, file.slot, offset, this.#address(chain), length, kind, user, this.#tag)
    else {
      this.#vectors(chain, count, length)
      this.#ring.writeVector(file.fd, file.slot, offset, count, kind, user, this.#tag)
    }
  }

  readBuffer(chain: Chain, file: IoFile, offset: number, buffer: IoBuffer, start: number, length: number): void {
    if (this.#ended) return
    const address = bufferAddress(buffer, start, length)
    this.#ring.read(file.fd, file.slot, offset, address, length, this.#user(chain), this.#tag)
  }

  writeBuffer(
    chain: Chain,
    file: IoFile,
    offset: number,
    buffer: IoBuffer,
    start: number,
    length: number,
    dsync: boolean
  ): void {
    if (this.#ended) return
    const address = bufferAddress(buffer, start, length)
    this.#ring.write(file.fd, file.slot, offset, address, length, writeKind(file, dsync), this.#user(chain), this.#tag)
  }

  fdatasync(chain: Chain, file: IoFile): void {
    if (!this.#ended) this.#ring.fdatasync(file.fd, file.slot, this.#user(chain), this.#tag)
  }

  fallocate(chain: Chain, file: IoFile, mode: number, offset: number, length: number): void {
    if (this.#ended) return
    this.#ring.fallocate(file.fd, file.slot, mode, offset, length, this.#user(chain), this.#tag)
  }

  /** Whether [offset, offset + length) of the file is mapped and copies are taken. */
  #copies(file: RingFile, offset: number, length: number): boolean {
    const ring = this.#ring
    if (file.faults !== ring.copyFaults) file.check(ring.copyFaults)
    if (file.remapAt !== 0 && performance.now() >= file.remapAt) file.remap()
    return length <= COPIED_READ && offset + length <= file.mappedLength && ring.takesCopies()
  }

  #copy(chain: Chain, file: IoFile, offset: number, count: number, length: number, write: boolean, user: number): void {
    const mapped = (file as RingFile).mappedAddress + offset
    if (count === 1) this.#ring.copy(write, mapped, this.#address(chain), length, user, this.#tag)
    else {
      this.#vectors(chain, count, length)
      this.#ring.copyVector(write, mapped, count, user, this.#tag)
    }
  }

  #user(chain: Chain): number {
    if (!this.#owner.serving) this.#owner.stir()
    this.outstanding++
    return this.#queue | chain.head
  }

  /**
   * Finds where byte `start` of segments [first, end) is and how many segments `length` bytes from there touch (at
   * most MAX_VECTORS: the rest is a short transfer).
   */
  #locate(chain: Chain, first: number, end: number, start: number, length: number): number {
    let segment = first
    let skip = start
    while (segment < end && skip >= chain.length[segment]!) {
      skip -= chain.length[segment]!
      segment++
    }
    this.#segment = segment
    this.#skip = skip
    let count = 0
    let left = length + skip
    while (left > 0 && count < MAX_VECTORS) {
      if (segment >= end) throw new RangeError(`${length} bytes from ${start} are more than the chain has`)
      left -= chain.length[segment]!
      segment++
      count++
    }
    return count
  }

  /**
   * SAFETY: inside a segment that `Chain.append` checked against its region, which stays mapped while the chain is in
   * flight.
   */
  #address(chain: Chain): number {
    const segment = this.#segment
    return chain.regions[chain.region[segment]!]!.hva + chain.offset[segment]! + this.#skip
  }

  /** After `beginVectors`. */
  #vectors(chain: Chain, count: number, length: number): void {
    const ring = this.#ring
    let left = length
    let skip = this.#skip
    for (let segment = this.#segment, i = 0; i < count; segment++, i++) {
      const size = Math.min(chain.length[segment]! - skip, left)
      // SAFETY: as in #address; `size` stays inside the segment.
      ring.vector(chain.regions[chain.region[segment]!]!.hva + chain.offset[segment]! + skip, size)
      left -= size
      skip = 0
    }
  }
}

function writeKind(file: IoFile, dsync: boolean): number {
  return dsync ? WRITE_DSYNC : file.buffered ? WRITE_BUFFERED : WRITE_PLAIN
}

function bufferAddress(buffer: IoBuffer, start: number, length: number): number {
  if (start < 0 || length < 0 || start + length > buffer.bytes.length)
    throw new RangeError(`[${start}, +${length}) is outside the buffer`)
  return buffer.address + start
}

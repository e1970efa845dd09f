/**
 * {@link DeviceIo} without a ring: files by node:fs, each operation ending later, as the kernel's do. Bytes go through
 * a copy, so whatever O_DIRECT demands of addresses is not tested here.
 */
import { fdatasync, fstatSync, read, write, writeSync } from 'node:fs'
import type { Chain, CopyBatch, DeviceIo, IoBuffer, IoFile, PacketReceiver, PacketSender } from '../device/index.ts'

const EOPNOTSUPP = -95
const EIO = -5
const FALLOC_FL_KEEP_SIZE = 1
const FALLOC_FL_PUNCH_HOLE = 2
const FALLOC_FL_ZERO_RANGE = 16

const PAGE = 4096

/** Told of the end of each operation: bytes, or -errno. */
export type Completed = (chain: Chain, result: number) => void

type FsCallback = (error: NodeJS.ErrnoException | null, bytes?: number) => void

export class PlainIo implements DeviceIo {
  readonly #completed: Completed
  readonly #busy = new Set<Chain>()
  #idle: (() => void)[] = []
  /** For `allocate`: where nothing is. */
  #address = PAGE

  constructor(completed: Completed) {
    this.#completed = completed
  }

  /** Resolves when no operation is under way. */
  idle(): Promise<void> {
    if (this.#busy.size === 0) return Promise.resolve()
    return new Promise((resolve) => this.#idle.push(resolve))
  }

  openFile(fd: number): IoFile {
    return { fd, slot: -1, buffered: true }
  }

  closeFile(): void {}

  watch(): void {
    throw unavailable('watch: fds')
  }

  unwatch(): void {
    throw unavailable('unwatch: fds')
  }

  packetSender(): PacketSender {
    throw unavailable('packetSender: taps')
  }

  packetReceiver(): PacketReceiver {
    throw unavailable('packetReceiver: taps')
  }

  copyBatch(): CopyBatch {
    throw unavailable('copyBatch: native copies')
  }

  allocate(length: number): IoBuffer {
    const address = this.#address
    this.#address += Math.ceil(length / PAGE) * PAGE
    return { bytes: new Uint8Array(length), address }
  }

  read(chain: Chain, file: IoFile, offset: number, start: number, length: number): void {
    checkRange(`[${start}, +${length}) of the device-writable part`, start, length, chain.writable)
    const bytes = new Uint8Array(length)
    const ended = this.#begin(chain, (result) => {
      if (result > 0) chain.copyTo(start, bytes, 0, result)
    })
    read(file.fd, bytes, 0, length, offset, ended)
  }

  write(chain: Chain, file: IoFile, offset: number, start: number, length: number, dsync: boolean): void {
    checkRange(`[${start}, +${length}) of the device-readable part`, start, length, chain.readable)
    const bytes = new Uint8Array(length)
    chain.copyFrom(start, bytes, 0, length)
    this.#write(chain, file, offset, bytes, dsync)
  }

  readBuffer(chain: Chain, file: IoFile, offset: number, buffer: IoBuffer, start: number, length: number): void {
    checkRange(`[${start}, +${length}) of the buffer`, start, length, buffer.bytes.length)
    read(file.fd, buffer.bytes, start, length, offset, this.#begin(chain))
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
    checkRange(`[${start}, +${length}) of the buffer`, start, length, buffer.bytes.length)
    this.#write(chain, file, offset, buffer.bytes.slice(start, start + length), dsync)
  }

  fdatasync(chain: Chain, file: IoFile): void {
    fdatasync(file.fd, this.#begin(chain))
  }

  fallocate(chain: Chain, file: IoFile, mode: number, offset: number, length: number): void {
    const ended = this.#begin(chain)
    const result = fallocateSync(file.fd, mode, offset, length)
    setImmediate(() => ended(null, result))
  }

  #write(chain: Chain, file: IoFile, offset: number, bytes: Uint8Array, dsync: boolean): void {
    const ended = this.#begin(chain)
    write(file.fd, bytes, 0, bytes.length, offset, (error, count) => {
      if (error === null && dsync) fdatasync(file.fd, (failed) => ended(failed, count))
      else ended(error, count)
    })
  }

  /** @param then called with what an operation that succeeded returned, before the handler is */
  #begin(chain: Chain, then?: (result: number) => void): FsCallback {
    if (!chain.inFlight) throw new Error(`I/O on chain ${chain.head}, which is not in flight`)
    if (this.#busy.has(chain)) throw new Error(`two I/O operations at a time on chain ${chain.head}`)
    this.#busy.add(chain)
    return (error, bytes = 0) => {
      this.#busy.delete(chain)
      if (error === null) then?.(bytes)
      this.#completed(chain, error === null ? bytes : (error.errno ?? EIO))
      if (this.#busy.size > 0) return
      for (const idle of this.#idle.splice(0)) idle()
    }
  }
}

/** Node has no fallocate. What punches a hole or makes zeroes writes zeroes; 0 or -errno. */
export function fallocateSync(fd: number, mode: number, offset: number, length: number): number {
  const kind = mode & ~FALLOC_FL_KEEP_SIZE
  if ((kind !== FALLOC_FL_PUNCH_HOLE && kind !== FALLOC_FL_ZERO_RANGE) || mode === kind) return EOPNOTSUPP
  try {
    const end = Math.min(offset + length, fstatSync(fd).size)
    if (offset < end) writeSync(fd, new Uint8Array(end - offset), 0, end - offset, offset)
    return 0
  } catch (error) {
    return (error as NodeJS.ErrnoException).errno ?? EIO
  }
}

function checkRange(what: string, start: number, length: number, size: number): void {
  if (start < 0 || length <= 0 || start + length > size) throw new RangeError(`${what}, which has ${size} bytes`)
}

export function unavailable(what: string): Error {
  return new Error(`${what} are not there in testDevice. Test this with startVirtiod and connect, or with a guest`)
}

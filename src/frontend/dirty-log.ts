/**
 * The dirty log as a migrating front-end has it (vhost-user.rst "Migration"): one bit per page of guest-physical
 * memory, which the back-end sets and this end takes out. It owns the file, the mapping and the eventfd. It must not
 * know sessions.
 */
import { native, systemError } from '../native.ts'
import type { GuestMemory } from './memory.ts'

/** Bytes of guest memory per bit. */
export const LOG_PAGE = 4096

export class DirtyLogArea {
  /** Bytes of the log, and of the file before it. */
  readonly size: number
  readonly offset: number
  readonly fd: number
  /** For SET_LOG_FD: the back-end signals it when it has marked something. */
  readonly eventFd: number
  /** The log itself; its first bit is that of address 0. */
  readonly bytes: Uint8Array
  readonly #words: Int32Array
  readonly #address: number
  #closed = false

  /**
   * @param covers guest memory, or the bytes of guest-physical address space from 0 on
   * @param offset bytes of the file before the log, a multiple of 4096
   * @throws a system error when there is no memory
   */
  constructor(covers: GuestMemory | number, offset = 0) {
    const end = typeof covers === 'number' ? covers : Math.max(...covers.regions.map(({ gpa, size }) => gpa + size))
    // In whole pages, as QEMU's comes in multiples of 8 bytes and the mapping in pages.
    this.size = Math.ceil(end / LOG_PAGE / 8 / 4096) * 4096
    this.offset = offset
    this.fd = native.memfd('virtiod-log', offset + this.size, 0)
    if (this.fd < 0) throw systemError(this.fd, 'memfd_create', 'a dirty log')
    const mapping = native.mapFile(this.fd, offset, this.size, 0, this.size, true)
    this.eventFd = native.eventfd(0)
    if (typeof mapping === 'number' || this.eventFd < 0) {
      native.close(this.fd)
      throw systemError(
        typeof mapping === 'number' ? mapping : this.eventFd,
        'mmap',
        `a dirty log of ${this.size} bytes`
      )
    }
    this.#words = new Int32Array(mapping.buffer)
    this.bytes = new Uint8Array(mapping.buffer)
    this.#address = mapping.address
  }

  /** Takes out what is marked: the numbers of the pages, ascending. */
  take(): number[] {
    const pages: number[] = []
    for (let i = 0; i < this.#words.length; i++) {
      // Most of the log is empty, and an exchange would take every line of it from the back-end.
      if (this.#words[i] === 0) continue
      // ORDER: seq_cst, before the caller copies the pages; pairs with the back-end's `or` after its write to the page.
      let word = Atomics.exchange(this.#words, i, 0)
      while (word !== 0) {
        const bit = 31 - Math.clz32(word & -word)
        pages.push(i * 32 + bit)
        word &= word - 1
      }
    }
    return pages
  }

  /** Whether the page of a guest-physical address is marked; it stays so. */
  has(gpa: number): boolean {
    const page = Math.floor(gpa / LOG_PAGE)
    // ORDER: an observation only.
    return (Atomics.load(this.bytes, page >>> 3) & (1 << (page & 7))) !== 0
  }

  /** How often the back-end signalled since the last time. */
  takeSignals(): number {
    return Math.max(0, native.eventfdRead(this.eventFd))
  }

  /** Idempotent. */
  close(): void {
    if (this.#closed) return
    this.#closed = true
    native.close(this.fd)
    native.close(this.eventFd)
    native.release(this.#address)
  }

  [Symbol.dispose](): void {
    this.close()
  }
}

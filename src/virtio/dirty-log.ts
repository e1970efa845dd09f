/**
 * The dirty log of a live migration: one bit per page of guest-physical memory, shared with the front-end, which reads
 * and clears it at the same time (vhost-user.rst "Migration"). Pure; every iothread has its own object over the same
 * bytes.
 */
import type { Chain } from './chain.ts'

/** Bytes of guest memory per bit. */
export const VHOST_LOG_PAGE = 4096

export class DirtyLog {
  /** Something was marked since the owner last set it false: for SET_LOG_FD. */
  marked = false
  readonly #bits: Uint8Array
  readonly #pages: number

  /** @param bits the log from the bit of address 0 on. Pages behind it are not marked: the front-end knows no such memory. */
  constructor(bits: Uint8Array) {
    this.#bits = bits
    this.#pages = bits.length * 8
  }

  /** Marks the pages of [address, address + length), guest-physical. After the writes that it stands for. */
  mark(address: number, length: number): void {
    if (length <= 0) return
    const end = Math.min(Math.floor((address + length - 1) / VHOST_LOG_PAGE) + 1, this.#pages)
    let page = Math.floor(address / VHOST_LOG_PAGE)
    while (page < end) {
      // Pages of one byte of the log are marked together.
      const byte = Math.floor(page / 8)
      const first = page % 8
      const behind = Math.min(8, end - byte * 8)
      // ORDER: seq_cst, after the writes to the pages: the front-end takes the bits (an atomic exchange with 0) and then
      // copies the pages, so it has the writes or finds the bit at its next look. Not skipped when the bits are set already:
      // a load of them doesn't wait for the writes, which may still be in this processor's store buffer while the front-end
      // clears the bit and copies the page without them. The exchange is what makes the writes visible first.
      Atomics.or(this.#bits, byte, (0xff << first) & (0xff >>> (8 - behind)))
      this.marked = true
      page = byte * 8 + behind
    }
  }

  /** Marks what the first `length` bytes of the device-writable part lie in. */
  markChain(chain: Chain, length: number): void {
    let left = length
    for (let segment = chain.readableCount; segment < chain.count && left > 0; segment++) {
      const size = Math.min(chain.length[segment]!, left)
      this.mark(chain.regions[chain.region[segment]!]!.physical + chain.offset[segment]!, size)
      left -= size
    }
  }
}

/**
 * Checked headers in memory of ours, for the kernel to read: the one in guest memory could change after it was checked.
 */
import type { IoBuffer } from '../../src/device/index.ts'
import type { PacketHeader } from './header.ts'

/** Bytes between two headers. */
const SLOT = 16

export class HeaderSlots {
  readonly buffer: IoBuffer
  readonly #words: Uint32Array

  /** @param buffer of `bytes(count)` zeroes */
  constructor(buffer: IoBuffer) {
    this.buffer = buffer
    this.#words = new Uint32Array(buffer.bytes.buffer, buffer.bytes.byteOffset, buffer.bytes.length / 4)
  }

  /** Writes a header of twelve bytes, num_buffers 0. Returns where it is in the buffer. @param slot 0 … `count` − 1 */
  put(slot: number, header: PacketHeader): number {
    // One slot is never written: the header of most packets.
    if ((header.flags | header.gsoType) === 0) return 0
    const words = this.#words
    const at = (slot + 1) * SLOT
    words[at >>> 2] = header.flags | (header.gsoType << 8) | (header.ecn << 15) | (header.hdrLen << 16)
    words[(at >>> 2) + 1] = header.gsoSize | (header.csumStart << 16)
    words[(at >>> 2) + 2] = header.csumOffset
    return at
  }

  static bytes(count: number): number {
    return (count + 1) * SLOT
  }
}

/**
 * Packets that wait in our own memory for a guest that offers no chains: what a port of a switch has, bounded in bytes and
 * packets. First in, first out. It must not know where packets come from or go to.
 */
import type { Chain, CopyBatch, IoBuffer } from '../../src/device/index.ts'
import type { PacketHeader } from './header.ts'

/** Some 16 of the largest packets: a millisecond at 8 Gbit/s. */
export const BACKLOG_BYTES = 1024 * 1024
const BACKLOG_PACKETS = 512

export class Backlog {
  readonly #buffer: IoBuffer
  readonly #copies: CopyBatch
  readonly #at = new Uint32Array(BACKLOG_PACKETS)
  readonly #length = new Uint32Array(BACKLOG_PACKETS)
  /** Three words of header per packet. */
  readonly #headers = new Uint32Array(BACKLOG_PACKETS * 3)
  #first = 0
  #count = 0
  /** Where the next packet goes. */
  #end = 0

  /** @param buffer BACKLOG_BYTES @param copies run before a packet is looked at */
  constructor(buffer: IoBuffer, copies: CopyBatch) {
    this.#buffer = buffer
    this.#copies = copies
  }

  get empty(): boolean {
    return this.#count === 0
  }

  get buffer(): IoBuffer {
    return this.#buffer
  }

  /** Adds the frame at `start` of a chain. Returns false when there is no room. */
  addChain(header: PacketHeader, from: Chain, start: number, length: number): boolean {
    const at = this.#place(header, length)
    if (at < 0) return false
    this.#copies.chainToBuffer(from, start, this.#buffer, at, length)
    return true
  }

  addBytes(header: PacketHeader, from: Uint8Array, start: number, length: number): boolean {
    const at = this.#place(header, length)
    if (at < 0) return false
    this.#buffer.bytes.set(from.subarray(start, start + length), at)
    return true
  }

  /** Of the oldest packet: where its frame is in `buffer`, and its bytes; its header goes into `header`. */
  get at(): number {
    return this.#at[this.#first]!
  }

  get length(): number {
    return this.#length[this.#first]!
  }

  loadHeader(header: PacketHeader): void {
    const word = this.#first * 3
    header.load(this.#headers[word]!, this.#headers[word + 1]!, this.#headers[word + 2]!)
  }

  shift(): void {
    this.#first = (this.#first + 1) % BACKLOG_PACKETS
    this.#count--
    if (this.#count === 0) this.#end = 0
  }

  /** Throws everything away. Returns how many packets that were. */
  clear(): number {
    const count = this.#count
    this.#first = 0
    this.#count = 0
    this.#end = 0
    return count
  }

  #place(header: PacketHeader, length: number): number {
    if (this.#count === BACKLOG_PACKETS) return -1
    let at = this.#end
    if (this.#count > 0) {
      const start = this.#at[this.#first]!
      if (at > start) {
        if (at + length > BACKLOG_BYTES) at = 0
        if (at === 0 && length >= start) return -1
      } else if (at + length >= start) return -1
    }
    const slot = (this.#first + this.#count) % BACKLOG_PACKETS
    this.#at[slot] = at
    this.#length[slot] = length
    const word = slot * 3
    this.#headers[word] = header.flags | (header.gsoType << 8) | (header.ecn << 15) | (header.hdrLen << 16)
    this.#headers[word + 1] = header.gsoSize | (header.csumStart << 16)
    this.#headers[word + 2] = header.csumOffset
    this.#end = at + length
    this.#count++
    return at
  }
}

/**
 * The pcapng file format (draft-ietf-opsawg-pcapng), as far as a capture of Ethernet frames needs it: little-endian
 * blocks, nanoseconds. The format only: no files, no clock, no packets. Packets' blocks are written in place around the
 * bytes; what stands once per file is an array of its own.
 */

const SECTION_HEADER = 0x0a0d0d0a
const INTERFACE_DESCRIPTION = 1
const INTERFACE_STATISTICS = 5
const ENHANCED_PACKET = 6
const BYTE_ORDER_MAGIC = 0x1a2b3c4d
const LINKTYPE_ETHERNET = 1

const OPT_ENDOFOPT = 0
const SHB_USERAPPL = 4
const IF_NAME = 2
const IF_TSRESOL = 9
const EPB_FLAGS = 2
const ISB_IFRECV = 4
const ISB_IFDROP = 5
/** Time stamps count 10^-9 seconds. */
const NANOSECONDS = 9

/** Bytes of an enhanced packet block before the packet's, and (padding aside) behind them: flags, end of options, length. */
export const PACKET_HEADER_SIZE = 28
const PACKET_TRAILER_SIZE = 16

// epb_flags, bits 0 and 1
/** From the guest's view, as its own tcpdump would say: what it receives, what it sends. */
export const INBOUND = 1
export const OUTBOUND = 2

/** Nanoseconds since 1970 as two 32-bit halves: too many for one number. Used again for each packet. */
export class Timestamp {
  high = 0
  low = 0

  /** @param seconds since 1970, whole, < 2^34 @param nanoseconds 0 … 999,999,999 */
  set(seconds: number, nanoseconds: number): void {
    // (upper * 2^16 + lower) * 10^9: each product stays below 2^53.
    const upper = Math.floor(seconds / 65536) * 1_000_000_000
    const rest = (upper % 65536) * 65536 + (seconds % 65536) * 1_000_000_000 + nanoseconds
    this.high = Math.floor(upper / 65536) + Math.floor(rest / 0x1_0000_0000)
    this.low = rest % 0x1_0000_0000
  }
}

/** The block that a file begins with. @param application what wrote it, with its version */
export function sectionHeader(application: string): Uint8Array {
  const block = new BlockWriter(SECTION_HEADER, 16)
  block.view.setUint32(8, BYTE_ORDER_MAGIC, true)
  block.view.setUint16(12, 1, true)
  // Section length -1: not said.
  block.view.setInt32(16, -1, true)
  block.view.setInt32(20, -1, true)
  block.option(SHB_USERAPPL, new TextEncoder().encode(application))
  return block.finish()
}

/**
 * An interface; the first one in a file has id 0.
 * @param snapLength bytes that are kept of a packet at most, 0 = all
 */
export function interfaceDescription(name: string, snapLength: number): Uint8Array {
  const block = new BlockWriter(INTERFACE_DESCRIPTION, 8)
  block.view.setUint16(8, LINKTYPE_ETHERNET, true)
  block.view.setUint32(12, snapLength, true)
  block.option(IF_NAME, new TextEncoder().encode(name))
  block.option(IF_TSRESOL, Uint8Array.of(NANOSECONDS))
  return block.finish()
}

/** Packets of an interface so far: what was captured and what got lost on the way into the file. Both below 2^53. */
export function interfaceStatistics(
  interfaceId: number,
  time: Timestamp,
  received: number,
  dropped: number
): Uint8Array {
  const block = new BlockWriter(INTERFACE_STATISTICS, 12)
  block.view.setUint32(8, interfaceId, true)
  block.view.setUint32(12, time.high, true)
  block.view.setUint32(16, time.low, true)
  block.option(ISB_IFRECV, uint64(received))
  block.option(ISB_IFDROP, uint64(dropped))
  return block.finish()
}

/** Bytes of the block of a packet of which `captured` bytes are kept. */
export function packetLength(captured: number): number {
  return PACKET_HEADER_SIZE + padded(captured) + PACKET_TRAILER_SIZE
}

/**
 * Writes the block of a packet at `at`, without its bytes: they belong at `at + PACKET_HEADER_SIZE`, put there before or
 * after.
 * @param captured bytes that are kept, of `original`
 * @param direction INBOUND or OUTBOUND
 * @returns bytes of the block, `packetLength(captured)`
 */
export function enhancedPacket(
  into: DataView,
  at: number,
  interfaceId: number,
  time: Timestamp,
  captured: number,
  original: number,
  direction: number
): number {
  const length = packetLength(captured)
  into.setUint32(at, ENHANCED_PACKET, true)
  into.setUint32(at + 4, length, true)
  into.setUint32(at + 8, interfaceId, true)
  into.setUint32(at + 12, time.high, true)
  into.setUint32(at + 16, time.low, true)
  into.setUint32(at + 20, captured, true)
  into.setUint32(at + 24, original, true)
  const data = at + PACKET_HEADER_SIZE
  const trailer = data + padded(captured)
  for (let i = data + captured; i < trailer; i++) into.setUint8(i, 0)
  into.setUint16(trailer, EPB_FLAGS, true)
  into.setUint16(trailer + 2, 4, true)
  into.setUint32(trailer + 4, direction, true)
  into.setUint32(trailer + 8, OPT_ENDOFOPT, true)
  into.setUint32(trailer + 12, length, true)
  return length
}

function padded(length: number): number {
  return (length + 3) & ~3
}

function uint64(value: number): Uint8Array {
  const bytes = new DataView(new ArrayBuffer(8))
  bytes.setUint32(0, value % 0x1_0000_0000, true)
  bytes.setUint32(4, Math.floor(value / 0x1_0000_0000), true)
  return new Uint8Array(bytes.buffer)
}

/** A block with options: type and length around a body. */
class BlockWriter {
  view: DataView
  #length: number

  /** @param body bytes of the part of fixed size, behind type and length */
  constructor(type: number, body: number) {
    this.#length = 8 + body
    this.view = new DataView(new ArrayBuffer(this.#length))
    this.view.setUint32(0, type, true)
  }

  /** Throws a RangeError when the value has 65,536 bytes or more. */
  option(code: number, value: Uint8Array): void {
    if (value.length > 0xffff) throw new RangeError(`an option of ${value.length} bytes`)
    const at = this.#grow(4 + padded(value.length))
    this.view.setUint16(at, code, true)
    this.view.setUint16(at + 2, value.length, true)
    new Uint8Array(this.view.buffer).set(value, at + 4)
  }

  finish(): Uint8Array {
    // End of options, and the length once more.
    this.#grow(8)
    this.view.setUint32(4, this.#length, true)
    this.view.setUint32(this.#length - 4, this.#length, true)
    return new Uint8Array(this.view.buffer)
  }

  #grow(by: number): number {
    const at = this.#length
    const bytes = new Uint8Array(at + by)
    bytes.set(new Uint8Array(this.view.buffer))
    this.#length += by
    this.view = new DataView(bytes.buffer)
    return at
  }
}

/**
 * Segmentation in software: a frame that its sender left whole, for a receiver that can't take it so. TCP segments (TSO), UDP
 * datagrams (USO) and IP fragments (UFO), byte for byte what Linux makes of the same frame (tcp_gso_segment,
 * __udp_gso_segment, udp4_ufo_fragment). Works on a private copy of the frame, which it only reads: the same copy serves
 * several receivers. Knows nothing of rings.
 */
import { VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_UDP } from '../../src/device/virtio-net.ts'
import { fold, sum } from './checksum.ts'
import { type GsoFrame, MAX_HEADERS } from './frame.ts'
import type { PacketHeader } from './header.ts'

/** Bytes that the headers of one segment have at most: those of the frame, and IPv6's fragment header. */
export const MAX_SEGMENT_HEADERS = MAX_HEADERS + 8

const IPPROTO_FRAGMENT = 44
const FRAGMENT_HEADER_SIZE = 8
const IP_MF = 0x2000
const IP6_MF = 1

const TCP_FIN_PSH = 0x01 | 0x08
const TCP_CWR = 0x80

/**
 * `begin`, then `next` until it returns 0. A segment is the headers that `next` wrote, and behind them bytes
 * [payloadStart, payloadStart + payloadLength) of the frame: whoever sends it copies both to their place, so the payload moves
 * once. Each segment is complete: no header field is left to anybody.
 */
export class Segmenter {
  /** Of the segment that `next` wrote last; the position is one in the frame's DataView. */
  payloadStart = 0
  payloadLength = 0

  // The frame in work. Positions count from #at.
  #frame: DataView
  #at = 0
  #length = 0
  #l3 = 0
  #l4 = 0
  #headerLength = 0
  #protocolAt = 0
  #ipv6 = false
  #udp = false
  #fragments = false
  /** There is nothing to segment, only a checksum to complete. */
  #whole = false
  /** Payload bytes per segment; of a fragment: bytes behind the IP headers. */
  #size = 0
  /** Where the next segment's payload starts, from #at, and how many came before. */
  #position = 0
  #index = 0
  /** Identification of the datagram in IPv6 fragments. */
  #identification: number
  /** UFO: the checksum of the whole datagram. */
  #checksum = 0

  /** @param identification where IPv6 fragment identifications start, 32 bits: something that others don't guess */
  constructor(identification: number) {
    this.#identification = identification >>> 0
    this.#frame = new DataView(new ArrayBuffer(0))
  }

  /**
   * Starts a frame that passed `PacketHeader.check` and `GsoFrame.parse`; it must not change before the last `next`. One
   * that `parse` left without a gsoType is one segment.
   * @param frame the whole frame, from `at`
   * @param length its bytes
   */
  begin(frame: DataView, at: number, length: number, header: PacketHeader, gso: GsoFrame): void {
    this.#frame = frame
    this.#at = at
    this.#length = length
    this.#l3 = gso.l3
    this.#l4 = gso.l4
    this.#headerLength = gso.headerLength
    this.#protocolAt = gso.protocolAt
    this.#ipv6 = gso.ipv6
    this.#udp = gso.udp
    this.#whole = header.gsoType === VIRTIO_NET_HDR_GSO_NONE
    this.#fragments = header.gsoType === VIRTIO_NET_HDR_GSO_UDP
    this.#size = header.gsoSize
    this.#position = this.#fragments ? gso.l4 : gso.headerLength
    this.#index = 0
    if (!this.#fragments) return
    const checksum = ~sum(frame, at + gso.l4, at + length) & 0xffff
    this.#checksum = checksum === 0 ? 0xffff : checksum
    this.#identification = (this.#identification + 1) >>> 0
  }

  /**
   * Writes the next segment's headers at `into` (MAX_SEGMENT_HEADERS bytes of room).
   * @returns their bytes, or 0 when there is no further segment
   */
  next(into: DataView, at: number): number {
    if (this.#whole) return this.#nextWhole(into, at)
    const left = this.#length - this.#position
    if (left <= 0) return 0
    const size = left < this.#size ? left : this.#size
    const last = size === left
    const headers = this.#fragments ? this.#nextFragment(into, at, size, last) : this.#nextSegment(into, at, size, last)
    this.#position += size
    this.#index++
    return headers
  }

  #nextWhole(into: DataView, at: number): number {
    if (this.#index++ > 0) return 0
    const headers = this.#headerLength
    this.#copyHeaders(into, at, headers)
    this.payloadStart = this.#at + headers
    this.payloadLength = this.#length - headers
    const checksum = this.#transportChecksum(into, at)
    into.setUint16(at + this.#l4 + (this.#udp ? 6 : 16), checksum === 0 ? 0xffff : checksum)
    return headers
  }

  #nextSegment(into: DataView, at: number, size: number, last: boolean): number {
    const headers = this.#headerLength
    const l4 = at + this.#l4
    this.#copyHeaders(into, at, headers)
    this.payloadStart = this.#at + this.#position
    this.payloadLength = size
    this.#finishIp(into, at, headers + size, this.#index)
    // The field holds the pseudo header's sum with the whole frame's length in it: that one out, the segment's in.
    const length = headers - this.#l4 + size
    if (this.#udp) {
      const partial = into.getUint16(l4 + 6) + (~into.getUint16(l4 + 4) & 0xffff) + length
      into.setUint16(l4 + 4, length)
      into.setUint16(l4 + 6, fold(partial))
      const checksum = this.#transportChecksum(into, at)
      into.setUint16(l4 + 6, checksum === 0 ? 0xffff : checksum)
      return headers
    }
    const partial = into.getUint16(l4 + 16) + (~(this.#length - this.#l4) & 0xffff) + length
    into.setUint16(l4 + 16, fold(partial))
    into.setInt32(l4 + 4, (into.getInt32(l4 + 4) + (this.#position - headers)) | 0)
    const flags = into.getUint8(l4 + 13)
    into.setUint8(l4 + 13, flags & ~(last ? 0 : TCP_FIN_PSH) & ~(this.#index === 0 ? 0 : TCP_CWR))
    into.setUint16(l4 + 16, this.#transportChecksum(into, at))
    return headers
  }

  #nextFragment(into: DataView, at: number, size: number, last: boolean): number {
    const l4 = this.#l4
    const offset = this.#position - l4
    this.#copyHeaders(into, at, l4)
    let headers = l4
    if (this.#ipv6) {
      into.setUint8(at + l4, into.getUint8(at + this.#protocolAt))
      into.setUint8(at + this.#protocolAt, IPPROTO_FRAGMENT)
      into.setUint8(at + l4 + 1, 0)
      into.setUint16(at + l4 + 2, offset | (last ? 0 : IP6_MF))
      into.setUint32(at + l4 + 4, this.#identification)
      headers += FRAGMENT_HEADER_SIZE
    } else {
      // A fragment's Don't Fragment bit goes: the sender asked for fragments.
      into.setUint16(at + this.#l3 + 6, (offset >>> 3) | (last ? 0 : IP_MF))
    }
    this.#finishIp(into, at, headers + size, 0)
    this.payloadStart = this.#at + this.#position
    this.payloadLength = size
    if (offset !== 0) return headers
    // The first fragment has the UDP header, with the checksum of all of them.
    const frame = this.#frame
    const source = this.#at + l4
    for (let i = 0; i < 6; i += 2) into.setUint16(at + headers + i, frame.getUint16(source + i))
    into.setUint16(at + headers + 6, this.#checksum)
    this.payloadStart += 8
    this.payloadLength -= 8
    return headers + 8
  }

  #copyHeaders(into: DataView, at: number, length: number): void {
    const frame = this.#frame
    const from = this.#at
    let i = 0
    for (; i + 4 <= length; i += 4) into.setInt32(at + i, frame.getInt32(from + i))
    for (; i < length; i++) into.setUint8(at + i, frame.getUint8(from + i))
  }

  /** The IP header of a segment that has `length` bytes with all headers; its IPv4 identification is `index` on. */
  #finishIp(into: DataView, at: number, length: number, index: number): void {
    const l3 = at + this.#l3
    if (this.#ipv6) {
      into.setUint16(l3 + 4, length - this.#l3 - 40)
      return
    }
    into.setUint16(l3 + 2, length - this.#l3)
    into.setUint16(l3 + 4, into.getUint16(l3 + 4) + index)
    into.setUint16(l3 + 10, 0)
    into.setUint16(l3 + 10, ~sum(into, l3, l3 + (into.getUint8(l3) & 0xf) * 4) & 0xffff)
  }

  /** Over transport header and payload, with the pseudo header's sum in the checksum field. */
  #transportChecksum(into: DataView, at: number): number {
    const headers = sum(into, at + this.#l4, at + this.#headerLength)
    const payload = sum(this.#frame, this.payloadStart, this.payloadStart + this.payloadLength)
    return ~fold(headers + payload) & 0xffff
  }
}

/**
 * The headers of a frame that is to be segmented: Ethernet, VLAN tags, IPv4 or IPv6, TCP or UDP. Finds out whether
 * the frame is what its virtio-net header says, so that neither a kernel nor another guest gets one that is not. Reads a
 * private copy of the frame's first bytes; knows nothing of guest memory.
 */
import * as net from '../../src/device/virtio-net.ts'
import type { PacketHeader } from './header.ts'

/** Bytes of headers that are looked at: two VLAN tags, the largest IPv4 and TCP headers have 142. */
export const MAX_HEADERS = 256

const ETH_P_IP = 0x0800
const ETH_P_IPV6 = 0x86dd
const ETH_P_8021Q = 0x8100
const ETH_P_8021AD = 0x88a8
const VLAN_TAG_SIZE = 4
const MAX_VLAN_TAGS = 2

const IPPROTO_HOPOPTS = 0
const IPPROTO_TCP = 6
const IPPROTO_UDP = 17
const IPPROTO_ROUTING = 43
const IPPROTO_DSTOPTS = 60
const IPV6_HEADER_SIZE = 40
/** Each kind once, destination options twice (RFC 8200 §4.1). */
const MAX_EXTENSION_HEADERS = 4
/** IPv4: more fragments, or a fragment's offset. Such a frame has no whole transport header. */
const IP_MF_OR_OFFSET = 0x3fff

const TCP_CHECKSUM_AT = 16
const UDP_CHECKSUM_AT = 6

/** What was found in one frame, used again for the next. Positions count from the frame's start. */
export class GsoFrame {
  ipv6 = false
  udp = false
  /** Where the IP header starts, and the TCP or UDP header. */
  l3 = 0
  l4 = 0
  /** Bytes before the payload. */
  headerLength = 0
  /** Where the byte is that names the transport protocol: in the IP header or in the last extension header. */
  protocolAt = 0

  /**
   * Looks at a frame whose header passed `PacketHeader.check` and has a gsoType, and makes the header one that may be
   * passed on: `hdrLen` is right, a gsoSize of IP fragments is a multiple of eight, and a frame that is small enough
   * already is none to segment any more (gsoType 0; a kernel would drop some of those).
   * @param frame a private copy of at least its first MAX_HEADERS bytes (all, when it is shorter), from `at`
   * @param length bytes of the whole frame
   * @returns bytes of all headers, or -1 when this can't be segmented like this
   */
  parse(frame: DataView, at: number, length: number, header: PacketHeader): number {
    const end = Math.min(length, MAX_HEADERS)
    let etherType = frame.getUint16(at + 12)
    let l3 = net.ETH_HEADER_SIZE
    for (let tags = 0; etherType === ETH_P_8021Q || etherType === ETH_P_8021AD; tags++) {
      if (tags === MAX_VLAN_TAGS || l3 + VLAN_TAG_SIZE > end) return -1
      etherType = frame.getUint16(at + l3 + 2)
      l3 += VLAN_TAG_SIZE
    }
    this.l3 = l3
    if (etherType === ETH_P_IP) this.l4 = this.#ipv4(frame, at, end)
    else if (etherType === ETH_P_IPV6) this.l4 = this.#ipv6(frame, at, end, header.gsoType)
    else return -1
    if (this.l4 < 0) return -1
    return this.#transport(frame, at, length, header)
  }

  /** Returns where the transport header starts, or -1. */
  #ipv4(frame: DataView, at: number, end: number): number {
    const l3 = this.l3
    if (l3 + 20 > end) return -1
    const first = frame.getUint8(at + l3)
    const words = first & 0xf
    if (first >>> 4 !== 4 || words < 5) return -1
    if ((frame.getUint16(at + l3 + 6) & IP_MF_OR_OFFSET) !== 0) return -1
    this.ipv6 = false
    this.protocolAt = l3 + 9
    return l3 + words * 4
  }

  #ipv6(frame: DataView, at: number, end: number, gsoType: number): number {
    const l3 = this.l3
    if (l3 + IPV6_HEADER_SIZE > end || frame.getUint8(at + l3) >>> 4 !== 6) return -1
    let protocolAt = l3 + 6
    let l4 = l3 + IPV6_HEADER_SIZE
    let routed = false
    for (let headers = 0; ; headers++) {
      const next = frame.getUint8(at + protocolAt)
      if (next === IPPROTO_TCP || next === IPPROTO_UDP) break
      if (next === IPPROTO_ROUTING) routed = true
      // Options behind a routing header belong to the part that is fragmented (RFC 8200 §4.5), the others don't.
      else if (next === IPPROTO_DSTOPTS && routed && gsoType === net.VIRTIO_NET_HDR_GSO_UDP) return -1
      else if (next !== IPPROTO_HOPOPTS && next !== IPPROTO_DSTOPTS) return -1
      if (headers === MAX_EXTENSION_HEADERS || l4 + 8 > end) return -1
      protocolAt = l4
      l4 += (frame.getUint8(at + l4 + 1) + 1) * 8
    }
    this.ipv6 = true
    this.protocolAt = protocolAt
    return l4
  }

  #transport(frame: DataView, at: number, length: number, header: PacketHeader): number {
    const end = Math.min(length, MAX_HEADERS)
    const protocol = frame.getUint8(at + this.protocolAt)
    const type = header.gsoType
    const l4 = this.l4
    if (header.csumStart !== l4) return -1
    let headerLength = 0
    if (type === net.VIRTIO_NET_HDR_GSO_TCPV4 || type === net.VIRTIO_NET_HDR_GSO_TCPV6) {
      if (protocol !== IPPROTO_TCP || this.ipv6 !== (type === net.VIRTIO_NET_HDR_GSO_TCPV6)) return -1
      if (header.csumOffset !== TCP_CHECKSUM_AT || l4 + 20 > end) return -1
      const words = frame.getUint8(at + l4 + 12) >>> 4
      if (words < 5) return -1
      this.udp = false
      headerLength = l4 + words * 4
    } else {
      if (protocol !== IPPROTO_UDP || header.csumOffset !== UDP_CHECKSUM_AT) return -1
      this.udp = true
      headerLength = l4 + 8
    }
    if (headerLength > end) return -1
    this.headerLength = headerLength
    let payload = length - headerLength
    if (type === net.VIRTIO_NET_HDR_GSO_UDP) {
      header.gsoSize &= ~7
      payload = length - l4
    }
    if (payload > header.gsoSize) header.hdrLen = headerLength
    else header.clearSegmentation()
    return headerLength
  }
}

/**
 * The header that a driver puts before each packet (struct virtio_net_hdr, virtio 1.3 §5.1.6), and whether its packet may
 * go on to a kernel or another guest. Knows numbers only: neither where header and frame lie, nor what is in the frame
 * (frame.ts).
 */
import { hasFeature, VIRTIO_F_VERSION_1 } from '../../src/device/index.ts'
import * as net from '../../src/device/virtio-net.ts'

// Why a packet is dropped: what `PacketHeader.check` returns, an index into DROP_REASONS.
/** Not dropped. */
export const PASS = 0
/** Shorter than an Ethernet header. */
export const RUNT = 1
/** Longer than any frame that a header describes. */
export const OVERSIZED = 2
/** A flag or segmentation that was not negotiated, that contradict each other or that nobody knows. */
export const HEADER = 3
/** The checksum that is to be completed doesn't lie in the frame. */
export const CHECKSUM = 4
/** The frame is not one that can be segmented like this. */
export const SEGMENTATION = 5

/** Their names, as labels of metrics. */
export const DROP_REASONS = ['', 'runt', 'oversized', 'header', 'checksum', 'segmentation'] as const

/**
 * Segments that one frame may become. A gso_size of 1 would make 65,000 packets of one, which is work for everybody
 * else. Linux sends no MSS below 48 (tcp_min_snd_mss), which is 1366 in the largest frame.
 */
const MAX_SEGMENTS = 2048
/** Linux' GSO_BY_FRAGS: a value with a meaning of its own, so its tap and its driver refuse it. */
const RESERVED_GSO_SIZE = 0xffff

const TCP_HEADER_SIZE = 20
const UDP_HEADER_SIZE = 8
const TCP_TYPES = (1 << net.VIRTIO_NET_HDR_GSO_TCPV4) | (1 << net.VIRTIO_NET_HDR_GSO_TCPV6)

/** Bytes of the header before each packet: a legacy driver without MRG_RXBUF has a shorter one (virtio 1.3 §5.1.6.1). */
export function headerSize(features: bigint): number {
  return hasFeature(features, VIRTIO_F_VERSION_1) || hasFeature(features, net.VIRTIO_NET_F_MRG_RXBUF)
    ? net.VIRTIO_NET_HDR_SIZE
    : net.VIRTIO_NET_HDR_SIZE_LEGACY
}

/** NEEDS_CSUM, and the whole gso_type. */
const PLAIN_MASK = 0xff00 | net.VIRTIO_NET_HDR_F_NEEDS_CSUM

/** One header at a time, used again for each packet of a queue. */
export class PacketHeader {
  /** NEEDS_CSUM or 0. A device ignores all other flags (virtio 1.3 §5.1.6.2.2), so they don't get further than this. */
  flags = 0
  /** GSO_NONE, TCPV4, TCPV6, UDP or UDP_L4, without the ECN bit. Anything else doesn't pass `check`. */
  gsoType = 0
  /** 1 = the ECN bit of gso_type is set. */
  ecn = 0
  /**
   * Bytes of all headers. What a driver says isn't to be relied on (virtio 1.3 §5.1.6.2.2): it is right after
   * `GsoFrame.parse` only. 0 when there is nothing to segment.
   */
  hdrLen = 0
  /** Bytes of payload per segment; 0 when there is nothing to segment. */
  gsoSize = 0
  /** From where to where in the frame, in bytes; 0 without NEEDS_CSUM. The offset counts from the start. */
  csumStart = 0
  csumOffset = 0

  /** The last `load` found nothing to do for anybody: all fields are 0. */
  #plain = false
  readonly #checksum: boolean
  readonly #ecn: boolean
  /** Bit t = gso_type t was negotiated. */
  readonly #gsoTypes: number

  /** @param features the negotiated features, of which the HOST ones matter: what the driver may leave to the device */
  constructor(features: bigint) {
    const bit = (feature: number, type: number): number => (hasFeature(features, feature) ? 1 << type : 0)
    this.#checksum = hasFeature(features, net.VIRTIO_NET_F_CSUM)
    this.#ecn = hasFeature(features, net.VIRTIO_NET_F_HOST_ECN)
    this.#gsoTypes =
      bit(net.VIRTIO_NET_F_HOST_TSO4, net.VIRTIO_NET_HDR_GSO_TCPV4) |
      bit(net.VIRTIO_NET_F_HOST_TSO6, net.VIRTIO_NET_HDR_GSO_TCPV6) |
      bit(net.VIRTIO_NET_F_HOST_UFO, net.VIRTIO_NET_HDR_GSO_UDP) |
      bit(net.VIRTIO_NET_F_HOST_USO, net.VIRTIO_NET_HDR_GSO_UDP_L4)
  }

  /** Takes the first twelve bytes (the last two don't matter) as three little-endian 32-bit words, read once. */
  load(word0: number, word1: number, word2: number): void {
    // Neither a flag that matters nor a type, once more: all fields are 0 already.
    if ((word0 & PLAIN_MASK) === 0 && this.#plain) return
    this.#plain = (word0 & PLAIN_MASK) === 0
    const flags = word0 & net.VIRTIO_NET_HDR_F_NEEDS_CSUM
    const type = (word0 >>> 8) & 0xff
    this.flags = flags
    // A field that the rest of the header says not to use can't leak into what is passed on (virtio 1.3 §5.1.6.2.2).
    this.csumStart = flags === 0 ? 0 : word1 >>> 16
    this.csumOffset = flags === 0 ? 0 : word2 & 0xffff
    this.gsoType = type & ~net.VIRTIO_NET_HDR_GSO_ECN
    this.ecn = type >>> 7
    this.hdrLen = type === 0 ? 0 : word0 >>> 16
    this.gsoSize = type === 0 ? 0 : word1 & 0xffff
  }

  /** Takes the fields of another one. */
  copy(other: PacketHeader): void {
    this.#plain = false
    this.flags = other.flags
    this.gsoType = other.gsoType
    this.ecn = other.ecn
    this.hdrLen = other.hdrLen
    this.gsoSize = other.gsoSize
    this.csumStart = other.csumStart
    this.csumOffset = other.csumOffset
  }

  /**
   * Whether the packet may go on. With a gsoType its headers have to be looked at as well (`GsoFrame.parse`).
   * @param frameLength bytes behind the header
   * @returns PASS, or why not
   */
  check(frameLength: number): number {
    if (frameLength < net.ETH_HEADER_SIZE) return RUNT
    if (frameLength > net.MAX_FRAME_SIZE) return OVERSIZED
    if (this.#plain) return PASS
    if (this.flags !== 0) {
      if (!this.#checksum) return HEADER
      const start = this.csumStart
      if (start < net.ETH_HEADER_SIZE || start + this.csumOffset + 2 > frameLength) return CHECKSUM
    }
    if ((this.gsoType | this.ecn) === 0) return PASS
    return this.#checkSegmentation(frameLength)
  }

  #checkSegmentation(frameLength: number): number {
    const type = this.gsoType
    // A shift counts modulo 32, so the range comes first.
    if (type > net.VIRTIO_NET_HDR_GSO_UDP_L4 || (this.#gsoTypes & (1 << type)) === 0) return HEADER
    const tcp = (TCP_TYPES & (1 << type)) !== 0
    if (this.ecn !== 0 && !(tcp && this.#ecn)) return HEADER
    // Every type needs the flag, UFO too (virtio 1.3 §5.1.6.2.1).
    if (this.flags === 0) return HEADER
    const size = this.gsoSize
    if (size === 0 || size === RESERVED_GSO_SIZE) return HEADER
    // An IP fragment has a multiple of eight bytes, and what is over doesn't make fewer of them.
    const cut = type === net.VIRTIO_NET_HDR_GSO_UDP ? size & ~7 : size
    if (cut === 0 || frameLength > cut * MAX_SEGMENTS) return SEGMENTATION
    if (this.csumStart + (tcp ? TCP_HEADER_SIZE : UDP_HEADER_SIZE) > frameLength) return SEGMENTATION
    return PASS
  }

  /** The frame is not to be segmented after all; its checksum stays to be completed. */
  clearSegmentation(): void {
    this.gsoType = 0
    this.ecn = 0
    this.gsoSize = 0
    this.hdrLen = 0
  }

  /** Writes the first ten bytes of a header, of what is left after `load`. num_buffers is the caller's. */
  store(into: DataView, at: number): void {
    into.setUint8(at + net.VIRTIO_NET_HDR_FLAGS, this.flags)
    into.setUint8(at + net.VIRTIO_NET_HDR_GSO_TYPE, this.gsoType | (this.ecn << 7))
    into.setUint16(at + net.VIRTIO_NET_HDR_HDR_LEN, this.hdrLen, true)
    into.setUint16(at + net.VIRTIO_NET_HDR_GSO_SIZE, this.gsoSize, true)
    into.setUint16(at + net.VIRTIO_NET_HDR_CSUM_START, this.csumStart, true)
    into.setUint16(at + net.VIRTIO_NET_HDR_CSUM_OFFSET, this.csumOffset, true)
  }
}

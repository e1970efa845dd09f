/**
 * Frames for benches and tests: valid Ethernet + IPv4 + UDP, and TCP frames that want segmentation offload. Pure bytes; it
 * must not know rings. Addresses are those of RFC 2544 (198.18.0.0/15), which no network routes.
 */
import {
  VIRTIO_NET_HDR_CSUM_OFFSET,
  VIRTIO_NET_HDR_CSUM_START,
  VIRTIO_NET_HDR_F_NEEDS_CSUM,
  VIRTIO_NET_HDR_FLAGS,
  VIRTIO_NET_HDR_GSO_ECN,
  VIRTIO_NET_HDR_GSO_NONE,
  VIRTIO_NET_HDR_GSO_SIZE,
  VIRTIO_NET_HDR_GSO_TCPV4,
  VIRTIO_NET_HDR_GSO_TYPE,
  VIRTIO_NET_HDR_HDR_LEN,
  VIRTIO_NET_HDR_NUM_BUFFERS,
  VIRTIO_NET_HDR_SIZE,
} from '../virtio/net.ts'

/** The packet header in words (virtio 1.3 §5.1.6). */
export interface NetHeader {
  readonly flags: number
  /** Without the ECN bit. */
  readonly gsoType: number
  readonly ecn: boolean
  readonly hdrLen: number
  readonly gsoSize: number
  readonly csumStart: number
  readonly csumOffset: number
  /** As it stands; 0 when the header has no such field (10 bytes). */
  readonly numBuffers: number
}

const PLAIN: NetHeader = {
  flags: 0,
  gsoType: VIRTIO_NET_HDR_GSO_NONE,
  ecn: false,
  hdrLen: 0,
  gsoSize: 0,
  csumStart: 0,
  csumOffset: 0,
  numBuffers: 0,
}

/** @param size 12, or 10 for a header without num_buffers */
export function encodeNetHeader(header: Partial<NetHeader> = {}, size = VIRTIO_NET_HDR_SIZE): Uint8Array {
  const all = { ...PLAIN, ...header }
  const bytes = new Uint8Array(size)
  const view = new DataView(bytes.buffer)
  bytes[VIRTIO_NET_HDR_FLAGS] = all.flags
  bytes[VIRTIO_NET_HDR_GSO_TYPE] = all.gsoType | (all.ecn ? VIRTIO_NET_HDR_GSO_ECN : 0)
  view.setUint16(VIRTIO_NET_HDR_HDR_LEN, all.hdrLen, true)
  view.setUint16(VIRTIO_NET_HDR_GSO_SIZE, all.gsoSize, true)
  view.setUint16(VIRTIO_NET_HDR_CSUM_START, all.csumStart, true)
  view.setUint16(VIRTIO_NET_HDR_CSUM_OFFSET, all.csumOffset, true)
  if (size >= VIRTIO_NET_HDR_SIZE) view.setUint16(VIRTIO_NET_HDR_NUM_BUFFERS, all.numBuffers, true)
  return bytes
}

/** @param bytes 10 or 12 bytes */
export function decodeNetHeader(bytes: Uint8Array): NetHeader {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  const type = view.getUint8(VIRTIO_NET_HDR_GSO_TYPE)
  return {
    flags: view.getUint8(VIRTIO_NET_HDR_FLAGS),
    gsoType: type & ~VIRTIO_NET_HDR_GSO_ECN,
    ecn: (type & VIRTIO_NET_HDR_GSO_ECN) !== 0,
    hdrLen: view.getUint16(VIRTIO_NET_HDR_HDR_LEN, true),
    gsoSize: view.getUint16(VIRTIO_NET_HDR_GSO_SIZE, true),
    csumStart: view.getUint16(VIRTIO_NET_HDR_CSUM_START, true),
    csumOffset: view.getUint16(VIRTIO_NET_HDR_CSUM_OFFSET, true),
    numBuffers: bytes.length >= VIRTIO_NET_HDR_SIZE ? view.getUint16(VIRTIO_NET_HDR_NUM_BUFFERS, true) : 0,
  }
}

/** `02:00:5e:10:00:01` as 6 bytes, or undefined when it is no MAC address. */
export function parseMac(text: string): Uint8Array | undefined {
  if (!/^[0-9a-f]{2}(:[0-9a-f]{2}){5}$/i.test(text)) return undefined
  return Uint8Array.from(text.split(':'), (byte) => Number.parseInt(byte, 16))
}

export function formatMac(bytes: Uint8Array): string {
  return Array.from(bytes.subarray(0, 6), (byte) => byte.toString(16).padStart(2, '0')).join(':')
}

export interface FrameOptions {
  /** Bytes of the frame, from the destination address to the end of the payload (no frame check sequence). */
  readonly size: number
  readonly source: Uint8Array
  readonly destination: Uint8Array
  /** Last byte of the IPv4 address of either side; default 1 and 2. */
  readonly sourceHost?: number
  readonly destinationHost?: number
  /** Default 1024. Flows differ in it. */
  readonly sourcePort?: number
  /** First byte of the payload's pattern; default 0. */
  readonly seed?: number
}

const ETHERNET = 14
const IPV4 = 20
const UDP = 8
/** With timestamps, as Linux sends it: that is what makes 1500 − 20 − 32 = 1448. */
const TCP = 32
export const TCP_GSO_SIZE = 1448
/** Headers of {@link tcpFrame}. */
export const TCP_HEADER_LENGTH = ETHERNET + IPV4 + TCP
/** The least: the headers of an IPv4/UDP frame. */
export const MIN_UDP_FRAME = ETHERNET + IPV4 + UDP
/** The most: IPv4's total length is a u16. */
export const MAX_TCP_FRAME = ETHERNET + 65535

/**
 * A UDP datagram over IPv4 with right checksums.
 * @throws RangeError when `size` is below {@link MIN_UDP_FRAME} or beyond IPv4
 */
export function udpFrame(options: FrameOptions): Uint8Array {
  const frame = ipFrame(options, 17, MIN_UDP_FRAME)
  const view = new DataView(frame.buffer)
  const at = ETHERNET + IPV4
  view.setUint16(at, options.sourcePort ?? 1024)
  view.setUint16(at + 2, 9) // discard
  view.setUint16(at + 4, frame.length - at)
  fill(frame, at + UDP, options.seed ?? 0)
  view.setUint16(at + 6, pseudoHeader(frame, 17))
  // RFC 768: a checksum of 0 is sent as all ones.
  view.setUint16(at + 6, ~checksum(frame, at, frame.length) & 0xffff || 0xffff)
  return frame
}

/**
 * A TCP segment over IPv4 as a driver with HOST_TSO4 hands it over (virtio 1.3 §5.1.6.2): a right IPv4 header, and in the
 * TCP checksum only the pseudo header's sum. Its packet header is {@link tcpGsoHeader}.
 * @throws RangeError when `size` is below {@link TCP_HEADER_LENGTH} or above {@link MAX_TCP_FRAME}
 */
export function tcpFrame(options: FrameOptions): Uint8Array {
  const frame = ipFrame(options, 6, TCP_HEADER_LENGTH)
  const view = new DataView(frame.buffer)
  const at = ETHERNET + IPV4
  view.setUint16(at, options.sourcePort ?? 1024)
  view.setUint16(at + 2, 9)
  view.setUint32(at + 4, 1) // sequence number
  view.setUint32(at + 8, 1) // acknowledgment number
  view.setUint16(at + 12, ((TCP / 4) << 12) | 0x10) // data offset, ACK
  view.setUint16(at + 14, 0xffff) // window
  frame.set([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 1], at + 20) // two NOPs and a timestamp
  fill(frame, at + TCP, options.seed ?? 0)
  view.setUint16(at + 16, pseudoHeader(frame, 6))
  return frame
}

/** The packet header for a frame of {@link tcpFrame}: to be segmented when it has more than one segment of `gsoSize`. */
export function tcpGsoHeader(size: number, gsoSize = TCP_GSO_SIZE): Partial<NetHeader> {
  const checksum = { flags: VIRTIO_NET_HDR_F_NEEDS_CSUM, csumStart: ETHERNET + IPV4, csumOffset: 16 }
  if (size - TCP_HEADER_LENGTH <= gsoSize) return checksum
  return { ...checksum, gsoType: VIRTIO_NET_HDR_GSO_TCPV4, hdrLen: TCP_HEADER_LENGTH, gsoSize }
}

/** A broadcast by which a switch learns where `source` is: a gratuitous ARP announcement (RFC 5227 §3). */
export function announcement(source: Uint8Array, host: number): Uint8Array {
  const frame = new Uint8Array(60)
  const view = new DataView(frame.buffer)
  frame.fill(0xff, 0, 6)
  frame.set(source, 6)
  view.setUint16(12, 0x0806)
  frame.set([0, 1, 8, 0, 6, 4, 0, 1], ETHERNET) // Ethernet, IPv4, request
  frame.set(source, 22)
  frame.set([198, 18, 0, host], 28)
  frame.set([198, 18, 0, host], 38)
  return frame
}

/** The Internet checksum's sum (RFC 1071), not yet complemented, of [from, to). `from` is even in the packet's sense. */
export function checksum(bytes: Uint8Array, from: number, to: number, initial = 0): number {
  let sum = initial
  for (let at = from; at < to; at += 2) sum += ((bytes[at] ?? 0) << 8) | (at + 1 < to ? (bytes[at + 1] ?? 0) : 0)
  while (sum > 0xffff) sum = (sum & 0xffff) + Math.floor(sum / 0x1_0000)
  return sum
}

function ipFrame(options: FrameOptions, protocol: number, least: number): Uint8Array {
  const { size } = options
  if (!(size >= least && size <= MAX_TCP_FRAME)) {
    throw new RangeError(`a frame of ${size} bytes is not in ${least} … ${MAX_TCP_FRAME}`)
  }
  const frame = new Uint8Array(size)
  const view = new DataView(frame.buffer)
  frame.set(options.destination, 0)
  frame.set(options.source, 6)
  view.setUint16(12, 0x0800)
  frame[ETHERNET] = 0x45
  view.setUint16(ETHERNET + 2, size - ETHERNET)
  view.setUint16(ETHERNET + 6, 0x4000) // don't fragment
  frame[ETHERNET + 8] = 64
  frame[ETHERNET + 9] = protocol
  frame.set([198, 18, 0, options.sourceHost ?? 1], ETHERNET + 12)
  frame.set([198, 18, 0, options.destinationHost ?? 2], ETHERNET + 16)
  view.setUint16(ETHERNET + 10, ~checksum(frame, ETHERNET, ETHERNET + IPV4) & 0xffff)
  return frame
}

/** Sum of the pseudo header: addresses, protocol, L4 length. */
function pseudoHeader(frame: Uint8Array, protocol: number): number {
  return checksum(frame, ETHERNET + 12, ETHERNET + IPV4, protocol + frame.length - ETHERNET - IPV4)
}

function fill(frame: Uint8Array, from: number, seed: number): void {
  for (let at = from; at < frame.length; at++) frame[at] = (seed + at * 7 + (at >> 8)) & 0xff
}

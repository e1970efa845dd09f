/**
 * What a virtio-net device owes its driver with a packet (virtio 1.3 §5.1.6.4.1): lengths, num_buffers, header fields that
 * were negotiated. Pure; it must not know rings.
 */
import { hasFeature } from '../virtio/features.ts'
import * as net from '../virtio/net.ts'
import { FrontendError } from './errors.ts'
import { headerSizeOf } from './net-features.ts'
import { decodeNetHeader, type NetHeader } from './net-frames.ts'

/** A used receive buffer: the bytes that the device wrote, and how many it could have. */
export interface Filled {
  readonly bytes: Uint8Array
  readonly capacity: number
}

export interface Packet {
  readonly header: NetHeader
  /** The bytes behind the header, joined over all buffers. */
  readonly frame: Uint8Array
  /** How many buffers it lay in. */
  readonly buffers: number
}

/** @throws FrontendError reply */
export function broken(what: string): never {
  throw new FrontendError('virtio-net', 'reply', `the device breaks a rule: ${what}`)
}

/**
 * Takes one packet's buffers off the front of those that were used.
 * @param filled all that were used so far, in the device's order; not empty
 * @param lax don't look at num_buffers without MRG_RXBUF: DPDK 22.11 doesn't write it then, though it MUST (§5.1.6.4.1)
 * @throws FrontendError reply when a rule is broken
 */
export function takePacket(filled: Filled[], features: bigint, lax = false): Packet {
  const headerSize = headerSizeOf(features)
  const first = filled[0] as Filled
  if (first.bytes.length < headerSize) broken(`a packet of ${first.bytes.length} bytes has no whole header`)
  const header = decodeNetHeader(first.bytes.subarray(0, headerSize))
  const mergeable = hasFeature(features, net.VIRTIO_NET_F_MRG_RXBUF)
  const counted = headerSize === net.VIRTIO_NET_HDR_SIZE && (mergeable || !lax)
  const buffers = counted ? header.numBuffers : 1
  if (buffers < 1 || (buffers > 1 && !mergeable)) broken(`num_buffers is ${buffers}`)
  // "The device MUST use all buffers used by a single receive packet together."
  if (buffers > filled.length) broken(`num_buffers is ${buffers}, and it used ${filled.length} together`)
  const parts = filled.splice(0, buffers)
  for (const { bytes, capacity } of parts.slice(0, -1)) {
    // "… MUST use all buffers but the last completely."
    if (bytes.length !== capacity) broken(`it left ${capacity - bytes.length} bytes free before the last buffer`)
  }
  const all = new Uint8Array(parts.reduce((sum, { bytes }) => sum + bytes.length, 0))
  let done = 0
  for (const { bytes } of parts) {
    all.set(bytes, done)
    done += bytes.length
  }
  const frame = all.subarray(headerSize)
  checkHeader(header, frame.length, features)
  return { header, frame, buffers }
}

function checkHeader(header: NetHeader, length: number, features: bigint): void {
  const { flags, gsoType, csumStart, csumOffset } = header
  const has = (bit: number): boolean => hasFeature(features, bit)
  const known = net.VIRTIO_NET_HDR_F_NEEDS_CSUM | net.VIRTIO_NET_HDR_F_DATA_VALID
  if (flags !== 0 && !has(net.VIRTIO_NET_F_GUEST_CSUM)) broken(`flags are ${flags} without GUEST_CSUM`)
  if ((flags & ~known) !== 0) broken(`flags are ${flags}`)
  const needsChecksum = (flags & net.VIRTIO_NET_HDR_F_NEEDS_CSUM) !== 0
  if (needsChecksum && csumStart + csumOffset + 2 > length) {
    broken(`a checksum at ${csumStart} + ${csumOffset} in a frame of ${length} bytes`)
  }
  if (gsoType === net.VIRTIO_NET_HDR_GSO_NONE) return
  const allowed = GSO_FEATURES.get(gsoType)
  if (allowed === undefined || !allowed.some(has)) broken(`gso_type is ${gsoType}, which was not negotiated`)
  if (header.ecn && !has(net.VIRTIO_NET_F_GUEST_ECN)) broken('GSO_ECN without GUEST_ECN')
  if (header.gsoSize === 0) broken('gso_size is 0')
  if (!needsChecksum) broken(`gso_type is ${gsoType} without NEEDS_CSUM`)
}

const GSO_FEATURES = new Map<number, readonly number[]>([
  [net.VIRTIO_NET_HDR_GSO_TCPV4, [net.VIRTIO_NET_F_GUEST_TSO4]],
  [net.VIRTIO_NET_HDR_GSO_TCPV6, [net.VIRTIO_NET_F_GUEST_TSO6]],
  [net.VIRTIO_NET_HDR_GSO_UDP, [net.VIRTIO_NET_F_GUEST_UFO]],
  [net.VIRTIO_NET_HDR_GSO_UDP_L4, [net.VIRTIO_NET_F_GUEST_USO4, net.VIRTIO_NET_F_GUEST_USO6]],
])

/**
 * What a virtio-net driver may negotiate together, and the sizes that follow from it (virtio 1.3 §5.1.3.1, §5.1.6). It must
 * not know sessions or rings.
 */
import { VIRTIO_F_VERSION_1 } from '../virtio/constants.ts'
import { hasFeature } from '../virtio/features.ts'
import * as net from '../virtio/net.ts'

/** Feature → those of which it needs one. */
const NEEDS: readonly (readonly [number, readonly number[]])[] = [
  [net.VIRTIO_NET_F_GUEST_TSO4, [net.VIRTIO_NET_F_GUEST_CSUM]],
  [net.VIRTIO_NET_F_GUEST_TSO6, [net.VIRTIO_NET_F_GUEST_CSUM]],
  [net.VIRTIO_NET_F_GUEST_UFO, [net.VIRTIO_NET_F_GUEST_CSUM]],
  [net.VIRTIO_NET_F_GUEST_USO4, [net.VIRTIO_NET_F_GUEST_CSUM]],
  [net.VIRTIO_NET_F_GUEST_USO6, [net.VIRTIO_NET_F_GUEST_CSUM]],
  [net.VIRTIO_NET_F_GUEST_ECN, [net.VIRTIO_NET_F_GUEST_TSO4, net.VIRTIO_NET_F_GUEST_TSO6]],
  [net.VIRTIO_NET_F_HOST_TSO4, [net.VIRTIO_NET_F_CSUM]],
  [net.VIRTIO_NET_F_HOST_TSO6, [net.VIRTIO_NET_F_CSUM]],
  [net.VIRTIO_NET_F_HOST_UFO, [net.VIRTIO_NET_F_CSUM]],
  [net.VIRTIO_NET_F_HOST_USO, [net.VIRTIO_NET_F_CSUM]],
  [net.VIRTIO_NET_F_HOST_ECN, [net.VIRTIO_NET_F_HOST_TSO4, net.VIRTIO_NET_F_HOST_TSO6]],
  [net.VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, [net.VIRTIO_NET_F_CTRL_VQ]],
  [net.VIRTIO_NET_F_CTRL_RX, [net.VIRTIO_NET_F_CTRL_VQ]],
  [net.VIRTIO_NET_F_CTRL_RX_EXTRA, [net.VIRTIO_NET_F_CTRL_VQ]],
  [net.VIRTIO_NET_F_CTRL_VLAN, [net.VIRTIO_NET_F_CTRL_VQ]],
  [net.VIRTIO_NET_F_GUEST_ANNOUNCE, [net.VIRTIO_NET_F_CTRL_VQ]],
  [net.VIRTIO_NET_F_MQ, [net.VIRTIO_NET_F_CTRL_VQ]],
  [net.VIRTIO_NET_F_CTRL_MAC_ADDR, [net.VIRTIO_NET_F_CTRL_VQ]],
]

/** The bits given and all that may not be negotiated without them: for `withoutFeatures` of a session. */
export function withDependents(...bits: number[]): number[] {
  const out = new Set(bits)
  for (let before = -1; before !== out.size; ) {
    before = out.size
    for (const [bit, needs] of NEEDS) if (needs.every((needed) => out.has(needed))) out.add(bit)
  }
  return [...out]
}

/** Offloads in the driver's direction that let packets of 64 KiB come in. */
export const GUEST_GSO_FEATURES: readonly number[] = [
  net.VIRTIO_NET_F_GUEST_TSO4,
  net.VIRTIO_NET_F_GUEST_TSO6,
  net.VIRTIO_NET_F_GUEST_UFO,
  net.VIRTIO_NET_F_GUEST_USO4,
  net.VIRTIO_NET_F_GUEST_USO6,
]

/** Bytes of the packet header: 12 with num_buffers, 10 for a legacy driver without (virtio 1.3 §5.1.6.1). */
export function headerSizeOf(features: bigint): 12 | 10 {
  return hasFeature(features, VIRTIO_F_VERSION_1) || hasFeature(features, net.VIRTIO_NET_F_MRG_RXBUF) ? 12 : 10
}

/** Default bytes of a receive buffer, header included, that may be merged with others. */
export const MERGEABLE_BUFFER = 2048

/** Bytes that a receive buffer has when nothing else is wished (virtio 1.3 §5.1.6.3.1). */
export function receiveBufferSize(features: bigint): number {
  if (hasFeature(features, net.VIRTIO_NET_F_MRG_RXBUF)) return MERGEABLE_BUFFER
  return GUEST_GSO_FEATURES.some((bit) => hasFeature(features, bit)) ? 65562 : 1526
}

/** The config space in words. A field whose feature bit is not offered is undefined, as its bytes mean nothing then. */
export interface NetConfig {
  /** `52:54:00:12:34:56`. */
  readonly mac?: string
  readonly linkUp?: boolean
  readonly announce?: boolean
  readonly maxVirtqueuePairs?: number
  readonly mtu?: number
  /** Mbit/s; undefined when the device doesn't know. */
  readonly speed?: number
  readonly fullDuplex?: boolean
}

/** @param bytes as many as the back-end shows */
export function decodeNetConfig(bytes: Uint8Array, features: bigint): NetConfig {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  const has = (bit: number, end: number): boolean => hasFeature(features, bit) && bytes.length >= end
  const status = has(net.VIRTIO_NET_F_STATUS, 8) ? view.getUint16(net.VIRTIO_NET_CONFIG_STATUS, true) : undefined
  const speed = has(net.VIRTIO_NET_F_SPEED_DUPLEX, 17) ? view.getUint32(net.VIRTIO_NET_CONFIG_SPEED, true) : undefined
  const duplex = speed === undefined ? undefined : view.getUint8(net.VIRTIO_NET_CONFIG_DUPLEX)
  return {
    ...(has(net.VIRTIO_NET_F_MAC, 6) && {
      mac: Array.from(bytes.subarray(0, 6), (byte) => byte.toString(16).padStart(2, '0')).join(':'),
    }),
    ...(status !== undefined && {
      linkUp: (status & net.VIRTIO_NET_S_LINK_UP) !== 0,
      announce: (status & net.VIRTIO_NET_S_ANNOUNCE) !== 0,
    }),
    ...(has(net.VIRTIO_NET_F_MQ, 10) && {
      maxVirtqueuePairs: view.getUint16(net.VIRTIO_NET_CONFIG_MAX_VIRTQUEUE_PAIRS, true),
    }),
    ...(has(net.VIRTIO_NET_F_MTU, 12) && { mtu: view.getUint16(net.VIRTIO_NET_CONFIG_MTU, true) }),
    // virtio 1.3 §5.1.4: 0 … 0x7fffffff are Mbit/s, 0xffffffff is unknown; duplex is 0, 1 or 0xff.
    ...(speed !== undefined && speed <= 0x7fff_ffff && { speed }),
    ...((duplex === 0 || duplex === 1) && { fullDuplex: duplex === 1 }),
  }
}

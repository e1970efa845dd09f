/** Names of feature bits, for people. It must not know sessions. */

import * as wire from '../vhost-user/wire.ts'
import * as blk from '../virtio/blk.ts'
import * as virtio from '../virtio/constants.ts'
import { featureBits, featureSet, hasFeature } from '../virtio/features.ts'
import * as net from '../virtio/net.ts'
import * as scsi from '../virtio/scsi.ts'

/** What is behind a socket, as far as names of bits 0 … 23 and 50 … 63 go. */
export type DeviceKind = 'blk' | 'net' | 'scsi' | 'unknown'

/** Bit number → name, from the constants that begin with `prefix`. */
function namesOf(constants: object, prefix: string): Map<number, string> {
  const names = new Map<number, string>()
  for (const [name, value] of Object.entries(constants)) {
    if (name.startsWith(prefix) && typeof value === 'number') names.set(value, name)
  }
  return names
}

const transport = new Map([
  ...namesOf(virtio, 'VIRTIO_F_'),
  [virtio.VHOST_F_LOG_ALL, 'VHOST_F_LOG_ALL'] as const,
  [virtio.VHOST_USER_F_PROTOCOL_FEATURES, 'VHOST_USER_F_PROTOCOL_FEATURES'] as const,
])
const blkNames = namesOf(blk, 'VIRTIO_BLK_F_')
const scsiNames = namesOf(scsi, 'VIRTIO_SCSI_F_')
const protocolNames = namesOf(wire, 'VHOST_USER_PROTOCOL_F_')

/** virtio 1.3 §5.1.3: those of the constants, and the others that a back-end may offer. */
const netNames = new Map<number, string>([
  ...namesOf(net, 'VIRTIO_NET_F_'),
  // biome-ignore format: bit and name in pairs
  ...([
    [6, 'GSO'], [51, 'HASH_TUNNEL'], [52, 'VQ_NOTF_COAL'], [53, 'NOTF_COAL'], [57, 'HASH_REPORT'], [59, 'GUEST_HDRLEN'],
    [60, 'RSS'], [61, 'RSC_EXT'], [62, 'STANDBY'],
  ] as const).map(([bit, name]) => [bit, `VIRTIO_NET_F_${name}`] as const),
])

/** One bit of a feature set with its name, `bit N` when nobody knows it. */
export interface NamedBit {
  readonly bit: number
  readonly name: string
}

/** The bits of the device and of the transport, named. */
export function nameFeatures(features: bigint, kind: DeviceKind): NamedBit[] {
  const device = { blk: blkNames, net: netNames, scsi: scsiNames, unknown: new Map<number, string>() }[kind]
  return featureBits(features).map((bit) => ({
    bit,
    name: (bit < 24 || bit >= 50 ? device : transport).get(bit) ?? `bit ${bit}`,
  }))
}

export function nameProtocolFeatures(features: bigint): NamedBit[] {
  return featureBits(features).map((bit) => ({ bit, name: protocolNames.get(bit) ?? `bit ${bit}` }))
}

/** Bits that only one of the two kinds of device has; those that the other one has too, however old, are left out. */
const ONLY_BLK = featureSet(blk.VIRTIO_BLK_F_GEOMETRY, blk.VIRTIO_BLK_F_BLK_SIZE)
const ONLY_NET = featureSet(
  net.VIRTIO_NET_F_MTU,
  net.VIRTIO_NET_F_GUEST_TSO6,
  net.VIRTIO_NET_F_CTRL_RX,
  net.VIRTIO_NET_F_CTRL_VLAN,
  net.VIRTIO_NET_F_CTRL_RX_EXTRA,
  net.VIRTIO_NET_F_GUEST_ANNOUNCE,
  net.VIRTIO_NET_F_MQ,
  net.VIRTIO_NET_F_CTRL_MAC_ADDR,
  net.VIRTIO_NET_F_GUEST_USO4,
  net.VIRTIO_NET_F_GUEST_USO6,
  net.VIRTIO_NET_F_HOST_USO
)

const MAYBE_NET: readonly number[] = [
  net.VIRTIO_NET_F_CSUM,
  net.VIRTIO_NET_F_GUEST_CSUM,
  net.VIRTIO_NET_F_MRG_RXBUF,
  net.VIRTIO_NET_F_CTRL_VQ,
]

/** All that a SCSI device has; both of these two, or the first one, are offered by those that are known. */
const SCSI = featureSet(scsi.VIRTIO_SCSI_F_HOTPLUG, scsi.VIRTIO_SCSI_F_CHANGE)
const DEVICE_BITS = 0xff_ffffn

/**
 * Whether bits and config space are those of a SCSI device: it offers events and nothing else (a disk with bits 1 and 2 alone
 * would have no flush, a network device with bit 1 no checksums of its own), and its config space has the size of an event
 * in the place where a disk has heads and sectors.
 * @param config unset: not looked at
 */
export function looksLikeScsi(features: bigint, config?: Uint8Array): boolean {
  const bits = features & DEVICE_BITS
  if ((bits & featureSet(scsi.VIRTIO_SCSI_F_HOTPLUG)) === 0n || (bits & ~SCSI) !== 0n) return false
  if (config === undefined) return true
  if (config.length < scsi.VIRTIO_SCSI_CONFIG_SIZE) return false
  const { eventInfoSize, senseSize, cdbSize } = scsi.decodeScsiConfig(config)
  return eventInfoSize === scsi.VIRTIO_SCSI_EVENT_SIZE && senseSize <= 252 && cdbSize >= 16 && cdbSize <= 260
}

/**
 * Which device offers these bits. The wire does not say (the front-end has to know), so this goes by bits that only one of
 * them has: block disks offer BLK_SIZE or GEOMETRY (6 is a relic in net, with which it has others), network devices a
 * control queue's commands, MTU or an offload that has no twin among the disks' bits. Where there are neither, block disks
 * offer SEG_MAX with FLUSH; network devices checksums, merged buffers, a control queue. For SCSI see {@link looksLikeScsi}.
 */
export function guessDevice(features: bigint, hasConfig: boolean): Exclude<DeviceKind, 'scsi'> {
  const has = (bit: number): boolean => hasFeature(features, bit)
  if ((features & ONLY_NET) !== 0n) return 'net'
  if (looksLikeScsi(features)) return 'unknown'
  const plain = !has(net.VIRTIO_NET_F_CSUM)
  if (hasConfig && (features & ONLY_BLK) !== 0n && plain) return 'blk'
  if (hasConfig && has(blk.VIRTIO_BLK_F_SEG_MAX) && has(blk.VIRTIO_BLK_F_FLUSH) && plain) return 'blk'
  return MAYBE_NET.some(has) ? 'net' : 'unknown'
}

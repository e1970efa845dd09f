/** Names of feature bits, for people. It must not know sessions. */

import * as wire from '../vhost-user/wire.ts'
import * as blk from '../virtio/blk.ts'
import * as virtio from '../virtio/constants.ts'
import { featureBits } from '../virtio/features.ts'

/** What is behind a socket, as far as names of bits 0 … 23 and 50 … 63 go. */
export type DeviceKind = 'blk' | 'net' | 'unknown'

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
const protocolNames = namesOf(wire, 'VHOST_USER_PROTOCOL_F_')

/** virtio 1.3 §5.1.3. */
const netNames = new Map<number, string>(
  // biome-ignore format: bit and name in pairs
  Object.entries({
    0: 'CSUM', 1: 'GUEST_CSUM', 2: 'CTRL_GUEST_OFFLOADS', 3: 'MTU', 5: 'MAC', 7: 'GUEST_TSO4', 8: 'GUEST_TSO6', 9: 'GUEST_ECN',
    10: 'GUEST_UFO', 11: 'HOST_TSO4', 12: 'HOST_TSO6', 13: 'HOST_ECN', 14: 'HOST_UFO', 15: 'MRG_RXBUF', 16: 'STATUS', 17: 'CTRL_VQ',
    18: 'CTRL_RX', 19: 'CTRL_VLAN', 20: 'CTRL_RX_EXTRA', 21: 'GUEST_ANNOUNCE', 22: 'MQ', 23: 'CTRL_MAC_ADDR', 51: 'HASH_TUNNEL',
    52: 'VQ_NOTF_COAL', 53: 'NOTF_COAL', 54: 'GUEST_USO4', 55: 'GUEST_USO6', 56: 'HOST_USO', 57: 'HASH_REPORT', 59: 'GUEST_HDRLEN',
    60: 'RSS', 61: 'RSC_EXT', 62: 'STANDBY', 63: 'SPEED_DUPLEX'
  }).map(([bit, name]) => [Number(bit), `VIRTIO_NET_F_${name}`])
)

/** One bit of a feature set with its name, `bit N` when nobody knows it. */
export interface NamedBit {
  readonly bit: number
  readonly name: string
}

/** The bits of the device and of the transport, named. */
export function nameFeatures(features: bigint, kind: DeviceKind): NamedBit[] {
  const device = kind === 'blk' ? blkNames : kind === 'net' ? netNames : new Map<number, string>()
  return featureBits(features).map((bit) => ({
    bit,
    name: (bit < 24 || bit >= 50 ? device : transport).get(bit) ?? `bit ${bit}`,
  }))
}

export function nameProtocolFeatures(features: bigint): NamedBit[] {
  return featureBits(features).map((bit) => ({ bit, name: protocolNames.get(bit) ?? `bit ${bit}` }))
}

/**
 * Which device offers these bits. The wire does not say (the front-end has to know), so this goes by bits that only
 * one of them has: block disks offer BLK_SIZE (6, unused in net) or SEG_MAX with FLUSH; network devices offer
 * checksum, merged buffers, a control queue.
 */
export function guessDevice(features: bigint, hasConfig: boolean): DeviceKind {
  const has = (bit: number): boolean => ((features >> BigInt(bit)) & 1n) === 1n
  if (hasConfig && has(blk.VIRTIO_BLK_F_BLK_SIZE) && !has(0)) return 'blk'
  if (hasConfig && has(blk.VIRTIO_BLK_F_SEG_MAX) && has(blk.VIRTIO_BLK_F_FLUSH) && !has(0)) return 'blk'
  if (has(0) || has(1) || has(15) || has(17) || has(22)) return 'net'
  return 'unknown'
}

/**
 * `virtiod probe`: what any vhost-user socket offers, without starting a ring. It owns the questions and the text. It
 * must not know the command line.
 */

import {
  VHOST_USER_PROTOCOL_F_CONFIG,
  VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
  VHOST_USER_PROTOCOL_F_MQ,
  VHOST_USER_PROTOCOL_F_REPLY_ACK,
} from '../vhost-user/wire.ts'
import type { BlkConfig } from '../virtio/blk.ts'
import { decodeBlkConfig } from '../virtio/blk.ts'
import { VHOST_USER_F_PROTOCOL_FEATURES } from '../virtio/constants.ts'
import { featureSet, hasFeature } from '../virtio/features.ts'
import { decodeScsiConfig, type ScsiConfig } from '../virtio/scsi.ts'
import { Connection } from './connection.ts'
import { FrontendError } from './errors.ts'
import type { DeviceKind, NamedBit } from './feature-names.ts'
import { guessDevice, looksLikeScsi, nameFeatures, nameProtocolFeatures } from './feature-names.ts'
import { decodeNetConfig, type NetConfig } from './net-features.ts'
import type { Peer } from './peer.ts'
import { describePeer } from './peer.ts'

export interface ProbeOptions {
  /** What the device is, when it can't be guessed right. */
  readonly type?: DeviceKind
  /** Milliseconds per request; default 10 000. */
  readonly timeoutMs?: number
}

/** What a socket offers. */
export interface ProbeResult {
  readonly socket: string
  readonly peer?: Peer
  readonly device: DeviceKind
  /** True when the device was guessed from its bits: the wire does not say. */
  readonly guessed: boolean
  /** As a 0x… text: JSON has no 64-bit numbers. */
  readonly features: string
  readonly featureNames: readonly NamedBit[]
  readonly protocolFeatures?: string
  readonly protocolFeatureNames: readonly NamedBit[]
  /** GET_QUEUE_NUM; undefined when MQ is not offered. */
  readonly queues?: number
  readonly memorySlots?: number
  /** The config space as hexadecimal, as far as the back-end shows it. */
  readonly config?: string
  readonly configBytes?: number
  readonly blk?: BlkConfig
  readonly net?: NetConfig
  readonly scsi?: ScsiConfig
}

/** Sizes of the config space to ask for: whole, with zones, before zones, what QEMU asks, the oldest. */
const CONFIG_SIZES = [256, 96, 60, 57, 36, 24, 12, 8] as const

/** @throws FrontendError when nobody listens or answers */
export function probe(socketPath: string, options: ProbeOptions = {}): ProbeResult {
  const connection = Connection.connect(
    socketPath,
    options.timeoutMs === undefined ? {} : { timeoutMs: options.timeoutMs }
  )
  try {
    return ask(socketPath, connection, options)
  } finally {
    connection.close()
  }
}

/**
 * What is behind a socket, by the features that it offers.
 * @throws FrontendError when nobody listens or answers
 */
export function deviceAt(socketPath: string): DeviceKind {
  const connection = Connection.connect(socketPath)
  try {
    const features = connection.getFeatures()
    if (!hasFeature(features, VHOST_USER_F_PROTOCOL_FEATURES)) return guessDevice(features, false)
    const protocol = connection.getProtocolFeatures()
    const hasConfig = hasFeature(protocol, VHOST_USER_PROTOCOL_F_CONFIG)
    if (!hasConfig || !looksLikeScsi(features)) return guessDevice(features, hasConfig)
    connection.setProtocolFeatures(protocol & featureSet(VHOST_USER_PROTOCOL_F_CONFIG))
    connection.setOwner()
    return looksLikeScsi(features, readConfig(socketPath, connection)) ? 'scsi' : guessDevice(features, true)
  } finally {
    connection.close()
  }
}

function ask(socketPath: string, connection: Connection, options: ProbeOptions): ProbeResult {
  const features = connection.getFeatures()
  const pid = connection.peerPid
  const peer = pid === undefined ? undefined : describePeer(pid)
  let protocol: bigint | undefined
  if (hasFeature(features, VHOST_USER_F_PROTOCOL_FEATURES)) {
    protocol = connection.getProtocolFeatures()
    connection.setProtocolFeatures(
      protocol &
        featureSet(
          VHOST_USER_PROTOCOL_F_MQ,
          VHOST_USER_PROTOCOL_F_REPLY_ACK,
          VHOST_USER_PROTOCOL_F_CONFIG,
          VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS
        )
    )
  }
  const offers = (bit: number): boolean => protocol !== undefined && hasFeature(protocol, bit)
  connection.setOwner()
  const queues = offers(VHOST_USER_PROTOCOL_F_MQ) ? connection.getQueueNum() : undefined
  const memorySlots = offers(VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS) ? connection.getMaxMemSlots() : undefined
  const config = offers(VHOST_USER_PROTOCOL_F_CONFIG) ? readConfig(socketPath, connection) : undefined
  const guess = config !== undefined && looksLikeScsi(features, config) ? 'scsi' : undefined
  const device = options.type ?? guess ?? guessDevice(features, config !== undefined)
  return {
    socket: socketPath,
    ...(peer && { peer }),
    device,
    guessed: options.type === undefined,
    features: `0x${features.toString(16)}`,
    featureNames: nameFeatures(features, device),
    ...(protocol !== undefined && { protocolFeatures: `0x${protocol.toString(16)}` }),
    protocolFeatureNames: protocol === undefined ? [] : nameProtocolFeatures(protocol),
    ...(queues !== undefined && { queues }),
    ...(memorySlots !== undefined && { memorySlots }),
    ...(config && { config: Buffer.from(config).toString('hex'), configBytes: config.length }),
    ...(config && device === 'blk' && config.length >= 8 && { blk: decodeBlkConfig(config, features) }),
    ...(config && device === 'net' && { net: decodeNetConfig(config, features) }),
    ...(config && device === 'scsi' && config.length >= 36 && { scsi: decodeScsiConfig(config) }),
  }
}

/** The most of the config space that the back-end shows. Some end the session when they are asked for too much. */
function readConfig(socketPath: string, first: Connection): Uint8Array | undefined {
  let connection = first
  try {
    for (const size of CONFIG_SIZES) {
      try {
        const bytes = connection.getConfig(0, size)
        if (bytes !== undefined && bytes.length > 0) return bytes
      } catch (error) {
        if (!(error instanceof FrontendError) || error.failure !== 'closed') throw error
        if (connection !== first) connection.close()
        first.close()
        connection = Connection.connect(socketPath, { timeoutMs: first.channel.timeoutMs })
        const features = connection.getFeatures()
        if (!hasFeature(features, VHOST_USER_F_PROTOCOL_FEATURES)) return undefined
        connection.setProtocolFeatures(connection.getProtocolFeatures() & featureSet(VHOST_USER_PROTOCOL_F_CONFIG))
        connection.setOwner()
      }
    }
    return undefined
  } finally {
    if (connection !== first) connection.close()
  }
}

/** The result for people. */
export function formatProbe(result: ProbeResult): string {
  const lines = [`${result.socket}`]
  const row = (name: string, value: string): void => void lines.push(`  ${name.padEnd(18)} ${value}`)
  if (result.peer) row('back-end', `${result.peer.program}, pid ${result.peer.pid}`)
  row(
    'device',
    `${DEVICE_NAMES[result.device]}${result.guessed && result.device !== 'unknown' ? ' (guessed from its features)' : ''}`
  )
  if (result.queues !== undefined) row('queues', String(result.queues))
  if (result.memorySlots !== undefined) row('memory slots', String(result.memorySlots))
  const bits = (title: string, set: string, names: readonly NamedBit[]): void => {
    lines.push(`${title} ${set}`)
    for (const { bit, name } of names) lines.push(`  ${String(bit).padStart(2)}  ${name}`)
  }
  bits('features', result.features, result.featureNames)
  if (result.protocolFeatures !== undefined)
    bits('protocol features', result.protocolFeatures, result.protocolFeatureNames)
  if (result.configBytes !== undefined) lines.push(`config space, ${result.configBytes} bytes`)
  if (result.blk) lines.push(...formatBlkConfig(result.blk))
  else if (result.net) lines.push(...formatNetConfig(result.net))
  else if (result.scsi) lines.push(...formatScsiConfig(result.scsi))
  else if (result.config !== undefined) lines.push(`  ${result.config}`)
  return lines.join('\n')
}

const DEVICE_NAMES: Readonly<Record<DeviceKind, string>> = {
  blk: 'virtio-blk',
  net: 'virtio-net',
  scsi: 'virtio-scsi',
  unknown: 'unknown',
}

function formatNetConfig(config: NetConfig): string[] {
  const lines: string[] = []
  const row = (name: string, value: string): void => void lines.push(`  ${name.padEnd(18)} ${value}`)
  if (config.mac !== undefined) row('MAC', config.mac)
  if (config.linkUp !== undefined)
    row('link', `${config.linkUp ? 'up' : 'down'}${config.announce === true ? ', asks for an announcement' : ''}`)
  if (config.maxVirtqueuePairs !== undefined) row('queue pairs', `≤ ${config.maxVirtqueuePairs}`)
  if (config.mtu !== undefined) row('MTU', `${config.mtu} bytes`)
  if (config.speed !== undefined) row('speed', `${config.speed} Mbit/s`)
  if (config.fullDuplex !== undefined) row('duplex', config.fullDuplex ? 'full' : 'half')
  return lines
}

function formatScsiConfig(config: ScsiConfig): string[] {
  const row = (name: string, value: string): string => `  ${name.padEnd(18)} ${value}`
  return [
    row('request queues', String(config.numQueues)),
    row('segments', `≤ ${config.segMax} of a request`),
    row('sectors', `≤ ${config.maxSectors} of a request`),
    row('commands', `≤ ${config.cmdPerLun} of a unit at once`),
    row('sizes', `event ${config.eventInfoSize}, sense data ${config.senseSize}, CDB ${config.cdbSize} bytes`),
    row('addresses', `channels ≤ ${config.maxChannel}, targets ≤ ${config.maxTarget}, units ≤ ${config.maxLun}`),
  ]
}

function formatBlkConfig(config: BlkConfig): string[] {
  const lines: string[] = []
  const row = (name: string, value: string): void => void lines.push(`  ${name.padEnd(18)} ${value}`)
  row('capacity', `${config.capacity} sectors = ${formatBytes(Number(config.capacity) * 512)}`)
  if (config.blkSize !== undefined) row('block size', `${config.blkSize} bytes`)
  if (config.sizeMax !== undefined)
    row('segment size', config.sizeMax === 0 ? '0 (SIZE_MAX offered without a limit)' : `≤ ${config.sizeMax} bytes`)
  if (config.segMax !== undefined) row('segments', `≤ ${config.segMax} per request`)
  if (config.geometry)
    row(
      'geometry',
      `${config.geometry.cylinders} cylinders, ${config.geometry.heads} heads, ${config.geometry.sectors} sectors`
    )
  if (config.topology) {
    const { physicalBlockExp, alignmentOffset, minIoSize, optIoSize } = config.topology
    row(
      'topology',
      `physical block 2^${physicalBlockExp} blocks, alignment offset ${alignmentOffset}, minimum I/O ${minIoSize}, optimal I/O ${optIoSize} blocks`
    )
  }
  if (config.wce !== undefined) row('write cache', config.wce === 0 ? 'write-through' : 'write-back')
  if (config.numQueues !== undefined) row('num_queues', String(config.numQueues))
  if (config.discard)
    row(
      'discard',
      `≤ ${config.discard.maxSectors} sectors × ${config.discard.maxSegments} ranges, alignment ${config.discard.sectorAlignment}`
    )
  if (config.writeZeroes) {
    row(
      'write zeroes',
      `≤ ${config.writeZeroes.maxSectors} sectors × ${config.writeZeroes.maxSegments} ranges, ${config.writeZeroes.mayUnmap ? 'may unmap' : 'no unmap'}`
    )
  }
  if (config.secureErase)
    row('secure erase', `≤ ${config.secureErase.maxSectors} sectors × ${config.secureErase.maxSegments} ranges`)
  return lines
}

function formatBytes(bytes: number): string {
  const units = ['bytes', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB']
  let unit = 0
  while (bytes >= 1024 && unit + 1 < units.length) {
    bytes /= 1024
    unit++
  }
  return `${Number.isInteger(bytes) ? bytes : bytes.toFixed(1)} ${units[unit]}`
}

/** The result as JSON; 64-bit numbers become decimal texts. */
export function probeJson(result: ProbeResult): string {
  return JSON.stringify(result, (_key, value: unknown) => (typeof value === 'bigint' ? value.toString() : value), 2)
}

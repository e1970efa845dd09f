/**
 * What one look at a back-end tells: what it offers, what its disk or network card is like, which process it is. It
 * owns the first session of a run. It must not know cases.
 */
import { readdirSync } from 'node:fs'
import { VHOST_USER_PROTOCOL_F_CONFIG } from '../../vhost-user/wire.ts'
import { type BlkConfig, decodeBlkConfig, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_RO } from '../../virtio/blk.ts'
import { hasFeature } from '../../virtio/features.ts'
import { VIRTIO_NET_CONFIG_SIZE } from '../../virtio/net.ts'
import { BlkDriver } from '../blk.ts'
import { FrontendError } from '../errors.ts'
import { guessDevice } from '../feature-names.ts'
import { NetDriver } from '../net.ts'
import { decodeNetConfig, type NetConfig } from '../net-features.ts'
import { describePeer } from '../peer.ts'
import { Session } from '../session.ts'
import { testFrame, testFrameNumber } from './operation.ts'

export interface Facts {
  readonly device: 'blk' | 'net'
  readonly features: bigint
  readonly protocolFeatures: bigint
  /** What GET_QUEUE_NUM says; undefined without MQ. */
  readonly queueNum: number | undefined
  /** Rings for requests or packets that are sure to be served: without MQ 1 of a disk, 2 of a network card. */
  readonly rings: number
  readonly memorySlots: number
  readonly pid: number | undefined
  readonly program: string
  /** The back-end's open fds can be counted. */
  readonly fds: boolean
  /** Of a disk. */
  readonly blk?: BlkFacts
  readonly net?: NetFacts
}

export interface BlkFacts {
  readonly config: BlkConfig
  /** Sectors of 512 bytes. */
  readonly capacity: number
  /** Bytes. */
  readonly blockSize: number
  readonly readOnly: boolean
  readonly firstBlock: Uint8Array
}

export interface NetFacts {
  readonly config: NetConfig | undefined
  /** As the config space says, 1 without one. */
  readonly pairs: number
  /** Where frames that come in are sent from: the device itself gives them back, another socket, or nobody. */
  readonly wire: 'loop' | 'peer' | undefined
}

export interface DiscoverOptions {
  readonly type: 'blk' | 'net' | 'auto'
  readonly timeoutMs: number
  /** A socket whose frames come in here. */
  readonly peer?: string
}

/**
 * @throws FrontendError when nobody listens, or not even one session with one request works
 */
export function discover(socketPath: string, options: DiscoverOptions): Facts {
  using session = Session.open(socketPath, { queues: 0, timeoutMs: options.timeoutMs })
  const features = session.offeredFeatures
  const protocolFeatures = session.offeredProtocolFeatures
  const hasConfig = hasFeature(protocolFeatures, VHOST_USER_PROTOCOL_F_CONFIG)
  const guess = options.type === 'auto' ? guessDevice(features, hasConfig) : options.type
  if (guess === 'unknown') {
    throw new FrontendError('conformance', 'unsupported', 'its features do not say what the device is; give --type')
  }
  const pid = session.connection.peerPid
  const queueNum = session.hasProtocol(0) ? session.maxQueues : undefined
  const common = {
    device: guess,
    features,
    protocolFeatures,
    queueNum,
    memorySlots: session.memorySlots,
    pid,
    program: (pid !== undefined && describePeer(pid)?.program) || 'unknown',
    fds: pid !== undefined && openFds(pid) !== undefined,
  }
  if (guess === 'blk') return { ...common, rings: queueNum ?? 1, blk: blkFacts(session) }
  const net = netFacts(session, options)
  return { ...common, rings: 2 * net.pairs, net }
}

/** Open fds of a process, or undefined when /proc doesn't show them. */
export function openFds(pid: number): number | undefined {
  try {
    return readdirSync(`/proc/${pid}/fd`).length
  } catch {
    return undefined
  }
}

function blkFacts(session: Session): BlkFacts {
  const bytes = session.hasProtocol(VHOST_USER_PROTOCOL_F_CONFIG) ? session.connection.getConfig(0, 57) : undefined
  if (bytes === undefined) {
    throw new FrontendError('GET_CONFIG', 'reply', 'the back-end shows no config space; without one there is no disk')
  }
  const config = decodeBlkConfig(bytes, session.features)
  const blockSize = (session.has(VIRTIO_BLK_F_BLK_SIZE) ? config.blkSize : undefined) ?? 512
  const capacity = Number(config.capacity)
  if (capacity * 512 < blockSize) throw new FrontendError('GET_CONFIG', 'reply', `a disk of ${capacity} sectors`)
  const requests = new BlkDriver(session.startQueue(0), session.memory)
  return {
    config,
    capacity,
    blockSize,
    readOnly: session.has(VIRTIO_BLK_F_RO),
    firstBlock: requests.read(0, blockSize),
  }
}

function netFacts(session: Session, options: DiscoverOptions): NetFacts {
  const bytes = session.hasProtocol(VHOST_USER_PROTOCOL_F_CONFIG)
    ? session.connection.getConfig(0, VIRTIO_NET_CONFIG_SIZE)
    : undefined
  const config = bytes === undefined ? undefined : decodeNetConfig(bytes, session.features)
  // GET_QUEUE_NUM may count pairs (DPDK) or rings, and more of them than anybody serves: only the config space tells.
  const pairs = config?.maxVirtqueuePairs ?? 1
  const lax = { laxNumBuffers: true, timeoutMs: options.timeoutMs }
  const driver = new NetDriver(session, { ...lax, control: false })
  driver.sent(driver.send(testFrame(0, 60, true)))
  if (options.peer === undefined) return { config, pairs, wire: comesBack(driver) ? 'loop' : undefined }
  using other = Session.open(options.peer, { queues: 0, timeoutMs: options.timeoutMs })
  const source = new NetDriver(other, { ...lax, control: false })
  // A switch may have to learn first, and a link may take a moment.
  for (let i = 0; i < 20; i++) {
    source.send(testFrame(7, 60, true))
    if (comesBack(driver, 7)) return { config, pairs, wire: 'peer' }
  }
  throw new FrontendError('conformance', 'timeout', `frames sent into ${options.peer} do not come out of this socket`)
}

function comesBack(driver: NetDriver, number = 0): boolean {
  for (const deadline = performance.now() + 150; performance.now() < deadline; ) {
    try {
      const packet = driver.tryReceive(20)
      if (packet !== undefined && testFrameNumber(packet.frame) === number) return true
    } catch (error) {
      // A packet came, and broke a rule: that is for the cases to say.
      if (error instanceof FrontendError && error.failure === 'reply') return true
      throw error
    }
  }
  return false
}

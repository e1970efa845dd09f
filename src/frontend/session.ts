/**
 * A whole front-end session in the order that QEMU uses: connect, negotiate, hand over memory, start rings. It owns the
 * connection, the guest memory and the virtqueues. It must not know which device is behind them.
 */

import {
  VHOST_MEMORY_BASELINE_NREGIONS,
  VHOST_USER_BACKEND_CONFIG_CHANGE_MSG,
  VHOST_USER_BACKEND_IOTLB_MSG,
  VHOST_USER_BACKEND_VRING_CALL,
  VHOST_USER_BACKEND_VRING_ERR,
  VHOST_USER_PROTOCOL_F_BACKEND_REQ,
  VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
  VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT,
  VHOST_USER_PROTOCOL_F_LOG_SHMFD,
  VHOST_USER_PROTOCOL_F_MQ,
} from '../vhost-user/wire.ts'
import {
  VHOST_F_LOG_ALL,
  VHOST_USER_F_PROTOCOL_FEATURES,
  VIRTIO_CONFIG_S_ACKNOWLEDGE,
  VIRTIO_CONFIG_S_DRIVER,
  VIRTIO_CONFIG_S_DRIVER_OK,
  VIRTIO_CONFIG_S_FEATURES_OK,
  VIRTIO_F_ACCESS_PLATFORM,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_IN_ORDER,
  VIRTIO_F_RING_PACKED,
} from '../virtio/constants.ts'
import { featureSet, hasFeature } from '../virtio/features.ts'
import type { Message } from './channel.ts'
import type { RegionWithFd } from './connection.ts'
import { Connection } from './connection.ts'
import type { DirtyLogArea } from './dirty-log.ts'
import { FrontendError } from './errors.ts'
import { InflightArea } from './inflight.ts'
import { Iommu } from './iommu.ts'
import type { GuestRegion } from './memory.ts'
import { GuestMemory, layouts } from './memory.ts'
import {
  askedFeatures,
  askedProtocolFeatures,
  DRIVEN_FEATURES,
  DRIVEN_PROTOCOL_FEATURES,
  offered,
  type SessionOptions,
  tracks,
} from './session-options.ts'
import type { VirtqueueOptions } from './virtqueue.ts'
import { Virtqueue } from './virtqueue.ts'

export { DRIVEN_FEATURES, DRIVEN_PROTOCOL_FEATURES, type SessionOptions } from './session-options.ts'

/** What a session that resumes another one goes on with, besides its rings and memory. */
interface Kept {
  readonly ownsMemory: boolean
  readonly ownsInflight: boolean
  iommu: Iommu | undefined
  log: DirtyLogArea | undefined
  logSignals: boolean
}

function keep(options: SessionOptions): Kept {
  return {
    ownsMemory: !(options.memory instanceof GuestMemory),
    ownsInflight: !(options.inflight instanceof InflightArea),
    iommu: undefined,
    log: undefined,
    logSignals: false,
  }
}

export class Session {
  readonly connection: Connection
  readonly memory: GuestMemory
  /** The area that in-flight tracking was asked for in. */
  readonly inflight: InflightArea | undefined
  /** Config changes that the back-end told of, as far as its requests were looked at (Connection.pump). */
  configChanges = 0
  /** What the back-end offered. */
  readonly offeredFeatures: bigint
  readonly offeredProtocolFeatures: bigint
  /** What was acknowledged. */
  readonly features: bigint
  /** GET_QUEUE_NUM, 1 without MQ. */
  readonly maxQueues: number
  /** Memory regions that the back-end takes. */
  readonly memorySlots: number
  readonly queues: Virtqueue[] = []
  readonly #options: SessionOptions
  readonly #kept: Kept
  /** Everything but the connection belongs to the session that resumed this one. */
  #handedOn = false

  /** @param previous the session to go on from: its memory and areas, and exactly its features */
  private constructor(connection: Connection, options: SessionOptions, previous?: Session) {
    this.connection = connection
    this.#options = options
    this.offeredFeatures = connection.getFeatures()
    const without = featureSet(...(options.withoutFeatures ?? []))
    const asked = askedFeatures(options)
    this.features = previous?.features ?? (this.offeredFeatures & DRIVEN_FEATURES & ~without) | asked
    offered('SET_FEATURES', this.features, this.offeredFeatures)
    let offeredProtocol = 0n
    const askedProtocol = askedProtocolFeatures(options)
    if (hasFeature(this.features, VHOST_USER_F_PROTOCOL_FEATURES)) {
      offeredProtocol = connection.getProtocolFeatures()
      const withoutProtocol = featureSet(...(options.withoutProtocolFeatures ?? []))
      const optional = tracks(options) ? featureSet(VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT) : 0n
      const wanted = (DRIVEN_PROTOCOL_FEATURES | optional) & offeredProtocol & ~withoutProtocol
      const features = previous?.connection.protocolFeatures ?? wanted | askedProtocol
      offered('SET_PROTOCOL_FEATURES', features, offeredProtocol)
      connection.setProtocolFeatures(features)
    } else offered('SET_PROTOCOL_FEATURES', askedProtocol, 0n)
    this.offeredProtocolFeatures = offeredProtocol
    this.maxQueues = this.hasProtocol(VHOST_USER_PROTOCOL_F_MQ) ? connection.getQueueNum() : 1
    this.memorySlots = this.hasProtocol(VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS)
      ? connection.getMaxMemSlots()
      : VHOST_MEMORY_BASELINE_NREGIONS
    connection.onBackendRequest = (message) => this.#answer(message)
    connection.pumping = options.inband === true || this.has(VIRTIO_F_ACCESS_PLATFORM)
    if (this.hasProtocol(VHOST_USER_PROTOCOL_F_BACKEND_REQ)) connection.setBackendRequestFd()
    connection.setOwner()
    const given = options.memory
    this.#kept = previous === undefined ? keep(options) : previous.#kept
    const log = this.#kept.log
    if (options.status === true) connection.setStatus(VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER)
    connection.setFeatures(log === undefined ? this.features : this.features | featureSet(VHOST_F_LOG_ALL))
    if (options.status === true) this.#featuresOk()
    this.memory =
      previous?.memory ??
      (given instanceof GuestMemory ? given : new GuestMemory(given ?? layouts.single(64 * 2 ** 20)))
    try {
      this.inflight = previous?.inflight ?? this.#makeInflight()
      this.inflight?.share(connection)
      if (log !== undefined) this.#shareLog(log)
      if (this.memory.regions.length > 0) this.shareMemory()
    } catch (error) {
      if (previous === undefined) this.#release()
      throw error
    }
  }

  /**
   * Connects, negotiates, shares memory and starts rings.
   * @throws FrontendError naming the request that failed; `unsupported` when the back-end does not offer what was asked
   * for
   */
  static open(socketPath: string, options: SessionOptions = {}): Session {
    const connection = Connection.connect(
      socketPath,
      options.timeoutMs === undefined ? {} : { timeoutMs: options.timeoutMs }
    )
    return Session.over(connection, options)
  }

  /** The same over a connection that exists. It is closed when something fails. */
  static over(connection: Connection, options: SessionOptions = {}): Session {
    let session: Session | undefined
    try {
      session = new Session(connection, options)
      const queueOptions: VirtqueueOptions = {
        size: options.queueSize ?? 256,
        mode: options.mode ?? 'poll',
        ...(options.base !== undefined && { base: options.base }),
        ...(options.ringRegions && { ringRegions: options.ringRegions }),
      }
      const queues = options.queues ?? 1
      for (let i = 0; i < queues; i++) session.startQueue(i, queueOptions)
      if (queues > 0) session.driverOk()
      return session
    } catch (error) {
      if (session !== undefined) session.close(true)
      else connection.close()
      throw error
    }
  }

  /**
   * Goes on with the rings of a session whose back-end died, as QEMU does when it comes back: a new connection over the
   * same memory, rings, drivers, eventfds and in-flight area. The back-end has to complete what the one before it left.
   * When it fails, `previous` can be resumed again; when it succeeds, everything is the new session's.
   * @throws FrontendError connect, `unsupported` when there is no in-flight area or a feature is no longer offered, or
   * what a request failed of
   */
  static resume(socketPath: string, previous: Session): Session {
    if (previous.inflight === undefined) {
      throw new FrontendError('resume', 'unsupported', 'without an in-flight area nobody knows what was in flight')
    }
    if (previous.#handedOn) throw new RangeError('this session was resumed already')
    const { timeoutMs } = previous.connection.channel
    const connection = Connection.connect(socketPath, { timeoutMs })
    previous.connection.close()
    try {
      const session = new Session(connection, previous.#options, previous)
      for (const queue of previous.queues) {
        session.queues.push(queue)
        queue.resume(connection)
      }
      session.driverOk()
      previous.#handedOn = true
      return session
    } catch (error) {
      connection.close()
      throw error
    }
  }

  has(bit: number): boolean {
    return hasFeature(this.features, bit)
  }

  hasProtocol(bit: number): boolean {
    return hasFeature(this.connection.protocolFeatures, bit)
  }

  /** Queue 0, or the one asked for. @throws RangeError when it was not started */
  queue(index = 0): Virtqueue {
    const queue = this.queues.find((candidate) => candidate.index === index)
    if (queue === undefined) throw new RangeError(`virtqueue ${index} was not started`)
    return queue
  }

  /** Makes a ring in guest memory and starts it. @param enable false: started, and left disabled */
  startQueue(index: number, options: VirtqueueOptions = {}, enable = true): Virtqueue {
    const queue = new Virtqueue(this.connection, this.memory, index, this.has(VIRTIO_F_EVENT_IDX), {
      packed: this.has(VIRTIO_F_RING_PACKED),
      inOrder: this.has(VIRTIO_F_IN_ORDER),
      inband: this.#options.inband === true,
      ...(this.#kept.iommu !== undefined && { translate: this.#kept.iommu.translate }),
      ...options,
    })
    this.queues.push(queue)
    // Without protocol features a ring starts enabled and there is no SET_VRING_ENABLE (vhost-user.rst "Ring states").
    queue.start(queue.driver.base, enable && this.has(VHOST_USER_F_PROTOCOL_FEATURES))
    return queue
  }

  /** The vIOMMU. @throws RangeError when none was asked for, or memory wasn't shared yet */
  get iommu(): Iommu {
    if (this.#kept.iommu === undefined) throw new RangeError('this session has no vIOMMU')
    return this.#kept.iommu
  }

  /** Tells the status DRIVER_OK, when the status is told at all. `open` does it itself when it starts rings. */
  driverOk(): void {
    if (this.#options.status === true) this.connection.setStatus(READY | VIRTIO_CONFIG_S_DRIVER_OK)
  }

  /**
   * Has the back-end mark what it writes to: SET_LOG_BASE, LOG_ALL, and VHOST_VRING_F_LOG of every ring, while they
   * run.
   * @param log stays the caller's @param signals have it signal the log's eventfd too (SET_LOG_FD)
   * @throws FrontendError unsupported when LOG_ALL or LOG_SHMFD is not offered
   */
  startLog(log: DirtyLogArea, signals = false): void {
    offered('SET_FEATURES', featureSet(VHOST_F_LOG_ALL), this.offeredFeatures)
    offered('SET_LOG_BASE', featureSet(VHOST_USER_PROTOCOL_F_LOG_SHMFD), this.connection.protocolFeatures)
    this.#kept.log = log
    this.#kept.logSignals = signals
    this.#shareLog(log)
    this.connection.setFeatures(this.features | featureSet(VHOST_F_LOG_ALL))
    for (const queue of this.queues) queue.setLogged(true)
  }

  /** Ends it: VHOST_VRING_F_LOG and LOG_ALL off. */
  stopLog(): void {
    this.#kept.log = undefined
    this.connection.setFeatures(this.features)
    for (const queue of this.queues) queue.setLogged(false)
  }

  /**
   * Tells the back-end about all regions: ADD_MEM_REG each with CONFIGURE_MEM_SLOTS (as QEMU does), else
   * SET_MEM_TABLE.
   */
  shareMemory(): void {
    if (this.has(VIRTIO_F_ACCESS_PLATFORM)) {
      this.#kept.iommu ??= new Iommu(this.memory, typeof this.#options.iommu === 'object' ? this.#options.iommu : {})
    }
    const regions = this.memory.regions.map(wireRegion)
    if (this.hasProtocol(VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS)) {
      for (const region of regions) this.connection.addMemRegion(region)
    } else {
      this.connection.setMemTable(regions)
    }
  }

  /** Stops every ring (GET_VRING_BASE) and returns where each stood. @param keep as Virtqueue.stop */
  stop(keep = false): number[] {
    if (this.#options.status === true) this.connection.setStatus(0)
    return this.queues.map((queue) => queue.stop(keep))
  }

  /**
   * Stops every ring, waits for the back-end's answer, and disconnects. Never throws.
   * @param abrupt just hang up
   */
  close(abrupt = false): void {
    if (!abrupt && !this.#handedOn && !this.connection.channel.closed) {
      try {
        this.stop()
      } catch {
        // It hung up or hangs: nothing left to stop.
      }
    }
    this.connection.close()
    if (this.#handedOn) return
    this.#release()
  }

  [Symbol.dispose](): void {
    this.close()
  }

  #release(): void {
    for (const queue of this.queues) queue.close()
    if (this.#kept.ownsMemory) this.memory.close()
    if (this.#kept.ownsInflight) this.inflight?.close()
  }

  #featuresOk(): void {
    this.connection.setStatus(READY)
    const status = this.connection.getStatus()
    if ((status & VIRTIO_CONFIG_S_FEATURES_OK) === 0) {
      throw new FrontendError('SET_STATUS', 'unsupported', `the back-end refused the features (status ${status})`)
    }
  }

  #makeInflight(): InflightArea | undefined {
    const { inflight, queues, queueSize } = this.#options
    if (inflight === undefined || inflight === false) return undefined
    if (inflight instanceof InflightArea) return inflight
    const wanted = inflight === true ? {} : inflight
    const numQueues = wanted.numQueues ?? (queues || this.maxQueues)
    return InflightArea.get(
      this.connection,
      numQueues,
      wanted.queueSize ?? queueSize ?? 256,
      this.has(VIRTIO_F_RING_PACKED)
    )
  }

  #shareLog(log: DirtyLogArea): void {
    this.connection.setLogBase(BigInt(log.size), BigInt(log.offset), log.fd)
    if (this.#kept.logSignals) this.connection.setLogFd(log.eventFd)
  }

  #answer(message: Message): bigint {
    const { request, payload } = message
    if (request === VHOST_USER_BACKEND_CONFIG_CHANGE_MSG) {
      this.configChanges++
      return 0n
    }
    if (request === VHOST_USER_BACKEND_IOTLB_MSG) return this.#kept.iommu?.handle(this.connection, message) ?? REFUSED
    if (request !== VHOST_USER_BACKEND_VRING_CALL && request !== VHOST_USER_BACKEND_VRING_ERR) return REFUSED
    if (payload.length < 4) return REFUSED
    const index = new DataView(payload.buffer, payload.byteOffset, payload.byteLength).getUint32(0, true)
    const queue = this.queues.find((candidate) => candidate.index === index)
    queue?.noteInband(request === VHOST_USER_BACKEND_VRING_CALL ? 'call' : 'err')
    return queue === undefined ? REFUSED : 0n
  }
}

const REFUSED = 1n
const READY = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK

/** A region as the wire describes it. */
export function wireRegion(region: GuestRegion): RegionWithFd {
  return {
    guestAddress: BigInt(region.gpa),
    size: BigInt(region.size),
    userAddress: BigInt(region.uva),
    mmapOffset: BigInt(region.offset),
    fd: region.fd,
  }
}

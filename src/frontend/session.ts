/**
 * A whole front-end session in the order that QEMU uses: connect, negotiate, hand over memory, start rings. It owns the
 * connection, the guest memory and the virtqueues. It must not know which device is behind them.
 */

import {
  VHOST_MEMORY_BASELINE_NREGIONS,
  VHOST_USER_PROTOCOL_F_BACKEND_REQ,
  VHOST_USER_PROTOCOL_F_CONFIG,
  VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
  VHOST_USER_PROTOCOL_F_MQ,
  VHOST_USER_PROTOCOL_F_REPLY_ACK,
  VHOST_USER_PROTOCOL_F_RESET_DEVICE,
} from '../vhost-user/wire.ts'
import {
  VHOST_USER_F_PROTOCOL_FEATURES,
  VIRTIO_F_ANY_LAYOUT,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_INDIRECT_DESC,
  VIRTIO_F_VERSION_1,
} from '../virtio/constants.ts'
import { featureSet, hasFeature } from '../virtio/features.ts'
import {
  VIRTIO_NET_F_GUEST_USO4,
  VIRTIO_NET_F_GUEST_USO6,
  VIRTIO_NET_F_HOST_USO,
  VIRTIO_NET_F_SPEED_DUPLEX,
} from '../virtio/net.ts'
import type { RegionWithFd } from './connection.ts'
import { Connection } from './connection.ts'
import type { GuestRegion, RegionLayout } from './memory.ts'
import { GuestMemory, layouts } from './memory.ts'
import type { VirtqueueOptions, WaitMode } from './virtqueue.ts'
import { Virtqueue } from './virtqueue.ts'

/**
 * Feature bits that this front-end can drive: the device's own (0 … 23, and of those from 50 on the ones that change
 * no structure), and those of the split ring.
 */
export const DRIVEN_FEATURES =
  0xff_ffffn |
  featureSet(
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_SPEED_DUPLEX,
    VIRTIO_F_ANY_LAYOUT,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_VERSION_1,
    VHOST_USER_F_PROTOCOL_FEATURES
  )

/** Protocol feature bits that this front-end acknowledges. */
export const DRIVEN_PROTOCOL_FEATURES = featureSet(
  VHOST_USER_PROTOCOL_F_MQ,
  VHOST_USER_PROTOCOL_F_REPLY_ACK,
  VHOST_USER_PROTOCOL_F_BACKEND_REQ,
  VHOST_USER_PROTOCOL_F_CONFIG,
  VHOST_USER_PROTOCOL_F_RESET_DEVICE,
  VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS
)

export interface SessionOptions {
  /** Milliseconds per request; default 10 000. */
  readonly timeoutMs?: number
  /** Feature bits not to acknowledge although they are offered. */
  readonly withoutFeatures?: readonly number[]
  readonly withoutProtocolFeatures?: readonly number[]
  /**
   * Guest memory; default one region of 64 MiB. Pass a GuestMemory to keep it over several sessions, and none at all (`[]`)
   * to add and share it when the features are known.
   */
  readonly memory?: readonly RegionLayout[] | GuestMemory
  /** Rings to start; default 1. 0 = only negotiate. */
  readonly queues?: number
  /** Entries per ring; default 256. */
  readonly queueSize?: number
  readonly mode?: WaitMode
  readonly ringRegions?: readonly [number, number, number]
  /** First ring index; default 0. */
  readonly base?: number
}

export class Session {
  readonly connection: Connection
  readonly memory: GuestMemory
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
  readonly #ownsMemory: boolean

  private constructor(connection: Connection, options: SessionOptions) {
    this.connection = connection
    this.offeredFeatures = connection.getFeatures()
    const without = featureSet(...(options.withoutFeatures ?? []))
    this.features = this.offeredFeatures & DRIVEN_FEATURES & ~without
    let offeredProtocol = 0n
    if (hasFeature(this.features, VHOST_USER_F_PROTOCOL_FEATURES)) {
      offeredProtocol = connection.getProtocolFeatures()
      const withoutProtocol = featureSet(...(options.withoutProtocolFeatures ?? []))
      connection.setProtocolFeatures(offeredProtocol & DRIVEN_PROTOCOL_FEATURES & ~withoutProtocol)
    }
    this.offeredProtocolFeatures = offeredProtocol
    this.maxQueues = this.hasProtocol(VHOST_USER_PROTOCOL_F_MQ) ? connection.getQueueNum() : 1
    this.memorySlots = this.hasProtocol(VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS)
      ? connection.getMaxMemSlots()
      : VHOST_MEMORY_BASELINE_NREGIONS
    if (this.hasProtocol(VHOST_USER_PROTOCOL_F_BACKEND_REQ)) connection.setBackendRequestFd()
    connection.setOwner()
    connection.setFeatures(this.features)
    const given = options.memory
    this.#ownsMemory = !(given instanceof GuestMemory)
    this.memory = given instanceof GuestMemory ? given : new GuestMemory(given ?? layouts.single(64 * 2 ** 20))
    if (this.memory.regions.length > 0) this.shareMemory()
  }

  /**
   * Connects, negotiates, shares memory and starts rings.
   * @throws FrontendError naming the request that failed
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
    try {
      const session = new Session(connection, options)
      const queueOptions: VirtqueueOptions = {
        size: options.queueSize ?? 256,
        mode: options.mode ?? 'poll',
        base: options.base ?? 0,
        ...(options.ringRegions && { ringRegions: options.ringRegions }),
      }
      for (let i = 0; i < (options.queues ?? 1); i++) session.startQueue(i, queueOptions)
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
    const queue = new Virtqueue(this.connection, this.memory, index, this.has(VIRTIO_F_EVENT_IDX), options)
    this.queues.push(queue)
    // Without protocol features a ring starts enabled and there is no SET_VRING_ENABLE (vhost-user.rst "Ring states").
    queue.start(options.base ?? 0, enable && this.has(VHOST_USER_F_PROTOCOL_FEATURES))
    return queue
  }

  /**
   * Tells the back-end about all regions: ADD_MEM_REG each with CONFIGURE_MEM_SLOTS (as QEMU does), else
   * SET_MEM_TABLE.
   */
  shareMemory(): void {
    const regions = this.memory.regions.map(wireRegion)
    if (this.hasProtocol(VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS)) {
      for (const region of regions) this.connection.addMemRegion(region)
    } else {
      this.connection.setMemTable(regions)
    }
  }

  /**
   * Stops every ring, waits for the back-end's answer, and disconnects. Never throws.
   * @param abrupt just hang up
   */
  close(abrupt = false): void {
    if (!abrupt) {
      for (const queue of this.queues) {
        try {
          queue.stop()
        } catch {
          break // it hung up or hangs: nothing left to stop
        }
      }
    }
    this.connection.close()
    for (const queue of this.queues) queue.close()
    if (this.#ownsMemory) this.memory.close()
  }

  [Symbol.dispose](): void {
    this.close()
  }
}

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

/**
 * The rings of one device's session on the iothreads: which iothread serves which queue, under which id. It is the
 * session's {@link RingHost}: the place where the protocol meets the engine.
 */
import { DEFAULT_TIMEOUT_MS } from '../device/define.ts'
import type { Device, DeviceDefinition, NetworkRequests } from '../device/index.ts'
import {
  ABANDONED,
  BROKEN,
  CALLS,
  CALLS_SUPPRESSED,
  CHAINS,
  COMPLETED,
  KICKS,
  QueueCounters,
} from '../engine/counters.ts'
import type { Request } from '../engine/messages.ts'
import { type IothreadHandle, moduleUrl } from '../engine/pool.ts'
import type { QueueSnapshot } from '../ops/snapshot.ts'
import type { RingHost, RingStart, SharedArea } from '../vhost-user/ring-host.ts'
import { whenSettled } from '../vhost-user/when-settled.ts'
import {
  VHOST_F_LOG_ALL,
  VHOST_USER_F_PROTOCOL_FEATURES,
  VIRTIO_F_ACCESS_PLATFORM,
  VIRTIO_F_ANY_LAYOUT,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_IN_ORDER,
  VIRTIO_F_INDIRECT_DESC,
  VIRTIO_F_RING_PACKED,
  VIRTIO_F_VERSION_1,
  VIRTQ_MAX_SIZE,
} from '../virtio/constants.ts'
import { featureSet } from '../virtio/features.ts'
import type { RegionDescription } from '../virtio/memory.ts'
import { changedSpan } from './config-space.ts'
import { loadStateOf, saveStateOf } from './device-state.ts'

/**
 * What the rings and the transport offer, whatever the device. Not there: RING_RESET, which front-ends serve by
 * GET_VRING_BASE and a new start and we could do, but QEMU 7.2 takes it for its network cards and then
 * tells only kernel back-ends of a reset: we would go on in a ring that the driver has freed. NOTIFICATION_DATA,
 * for which an eventfd has no room. NOTIFY_ON_EMPTY, which is legacy and no driver asks for.
 */
export const RING_FEATURES = featureSet(
  VHOST_F_LOG_ALL,
  VIRTIO_F_ANY_LAYOUT,
  VIRTIO_F_INDIRECT_DESC,
  VIRTIO_F_EVENT_IDX,
  VHOST_USER_F_PROTOCOL_FEATURES,
  VIRTIO_F_VERSION_1,
  VIRTIO_F_ACCESS_PLATFORM,
  VIRTIO_F_RING_PACKED,
  VIRTIO_F_IN_ORDER
)

/** One virtqueue of a device, over all sessions. */
export class QueueSlot {
  readonly index: number
  thread: IothreadHandle
  readonly counters = new QueueCounters()
  /** Its id on the iothread while the ring is started. */
  ring: number | undefined
  enabled = false
  broken = false
  /** A front-end used it at least once: metrics show it from then on. */
  used = false

  constructor(index: number, thread: IothreadHandle) {
    this.index = index
    this.thread = thread
  }

  snapshot({ operations, errors }: Pick<DeviceDefinition, 'operations' | 'errors'>): QueueSnapshot {
    const { counters } = this
    const { values } = counters
    const started = this.ring !== undefined
    const inFlight = values[CHAINS]! - values[COMPLETED]! - values[ABANDONED]!
    return {
      index: this.index,
      started: started && this.enabled,
      broken: this.broken,
      iothread: this.thread.index,
      kicks: values[KICKS]!,
      calls: values[CALLS]!,
      callsSuppressed: values[CALLS_SUPPRESSED]!,
      chains: values[CHAINS]!,
      inFlight: started ? Math.max(0, inFlight) : 0,
      brokenTotal: values[BROKEN]!,
      operations: counters.operations(operations),
      errors: counters.errors(errors),
    }
  }
}

/** Which iothread a queue of a device is served by: an `IothreadPool`, or a device's own threads. */
export interface RingThreads {
  assign(group?: string): IothreadHandle
  /** They are the device's own, and look for overdue chains. */
  readonly own?: true
}

let nextSession = 1

export class Rings implements RingHost {
  readonly features: bigint
  readonly numQueues: number
  readonly maxQueueSize: number
  readonly queues: readonly QueueSlot[]
  /** Identifies the present session on the iothreads. */
  session = 0
  #device: Device
  #module: string
  #timeoutMs: number
  readonly #own: boolean
  #threads: readonly IothreadHandle[]
  /** Rings to start by `release`. */
  #held: Map<number, RingStart> | undefined
  /** Handover: rings that stop go on, here or in another process, and need what they have. */
  staysActive = false

  constructor(definition: DeviceDefinition, device: Device, threads: RingThreads) {
    this.#device = device
    this.#module = moduleUrl(definition.queueModule!).href
    this.#own = threads.own === true
    this.#timeoutMs = this.#own ? (definition.timeoutMs ?? DEFAULT_TIMEOUT_MS) : 0
    this.features = device.features | RING_FEATURES
    this.numQueues = device.numQueues
    this.maxQueueSize = device.maxQueueSize ?? VIRTQ_MAX_SIZE
    this.queues = Array.from(
      { length: device.numQueues },
      (_, index) => new QueueSlot(index, threads.assign(device.iothreadGroup))
    )
    this.#threads = [...new Set(this.queues.map((queue) => queue.thread))]
  }

  /**
   * Another device of the same shape, or the same on other threads, serves from now on. No ring is started; counters go on, since
   * they are the queues'.
   * @param threads for queue 0, 1, …, and again from the first
   * @param shape what another version of a module may change
   */
  replace(
    device: Device,
    threads: readonly IothreadHandle[],
    shape: { readonly queueModule: string; readonly timeoutMs: number } = {
      queueModule: this.#module,
      timeoutMs: this.#timeoutMs,
    }
  ): void {
    // One that died, or is about to end, has forgotten the session as well.
    for (const thread of this.#threads) thread.request({ kind: 'endSession', session: this.session }).catch(() => {})
    // A thread may serve it again before it is through with that.
    this.session = nextSession++
    this.#device = device
    this.#module = moduleUrl(new URL(shape.queueModule)).href
    this.#timeoutMs = shape.timeoutMs
    for (const queue of this.queues) queue.thread = threads[queue.index % threads.length]!
    this.#threads = [...new Set(this.queues.map((queue) => queue.thread))]
  }

  /** A new front-end: rings and memory of the last one are gone. */
  begin(): void {
    this.session = nextSession++
    for (const queue of this.queues) queue.broken = false
  }

  async end(): Promise<void> {
    const ended = this.#all({ kind: 'endSession', session: this.session })
    // A device's own thread may have died, and the rings with it.
    await (this.#own ? ended.catch(() => {}) : ended)
    for (const queue of this.queues) queue.ring = undefined
  }

  get network(): NetworkRequests | undefined {
    return this.#device.network
  }

  config(): Uint8Array {
    return this.#device.config()
  }

  /**
   * A migrated device gets its whole config space back: what is as it is needs no write, so that only a difference in a
   * read-only field is refused (the device on the other side was another one).
   */
  writeConfig(offset: number, bytes: Uint8Array, migration: boolean): boolean | Promise<boolean> {
    if (!migration) return this.#device.writeConfig(offset, bytes)
    const { start, end } = changedSpan(this.#device.config(), offset, bytes)
    return start === end || this.#device.writeConfig(offset + start, bytes.subarray(start, end))
  }

  negotiated(features: bigint): void {
    this.#device.negotiated?.(features)
  }

  reset(): void {
    this.#device.reset?.()
  }

  /** Rings that are started from now on wait: who serves them is not yet decided. */
  hold(): void {
    this.#held = new Map()
  }

  /** Starts the rings that waited, paused. @throws when one can't be started */
  async release(): Promise<void> {
    const held = [...(this.#held ?? [])]
    this.#held = undefined
    await Promise.all(held.map(([index, start]) => this.#start(index, start, true)))
  }

  async startRing(index: number, start: RingStart): Promise<void> {
    if (this.#held !== undefined) {
      this.#held.set(index, start)
      if (start.enabled) this.#device.ringActive?.(index, true)
    } else await this.#start(index, start, false)
  }

  async #start(index: number, start: RingStart, paused: boolean): Promise<void> {
    const queue = this.queues[index]!
    const ring = queue.thread.takeRing()
    queue.counters.takeCall()
    if (start.enabled) this.#device.ringActive?.(index, true)
    try {
      await queue.thread.request({
        kind: 'startQueue',
        queue: ring,
        session: this.session,
        index,
        paused,
        ...start,
        module: this.#module,
        data: this.#device.queueData,
        counters: queue.counters.buffer,
        timeoutMs: this.#timeoutMs,
      })
    } catch (error) {
      queue.thread.freeRing(ring)
      if (start.enabled) this.#device.ringActive?.(index, false)
      throw error
    }
    queue.ring = ring
    queue.enabled = start.enabled
    queue.broken = false
    queue.used = true
  }

  async stopRing(index: number, keep: boolean): Promise<number> {
    const queue = this.queues[index]!
    const ring = queue.ring!
    const base = await queue.thread.request({ kind: 'stopQueue', queue: ring, keep })
    queue.thread.freeRing(ring)
    queue.ring = undefined
    if (queue.enabled && !this.staysActive) this.#device.ringActive?.(index, false)
    return base
  }

  async enableRing(index: number, enabled: boolean): Promise<void> {
    const queue = this.queues[index]!
    const changed = queue.enabled !== enabled
    queue.enabled = enabled
    // What a ring needs is there before it runs, and stays until it doesn't.
    if (changed && enabled) this.#device.ringActive?.(index, true)
    await queue.thread.request({ kind: 'enableQueue', queue: queue.ring!, enabled })
    if (changed && !enabled) this.#device.ringActive?.(index, false)
  }

  async setKick(index: number, kickFd: number): Promise<void> {
    const queue = this.queues[index]!
    await queue.thread.request({ kind: 'setKick', queue: queue.ring!, kickFd })
  }

  async setCall(index: number, callFd: number): Promise<void> {
    const queue = this.queues[index]!
    await queue.thread.request({ kind: 'setCall', queue: queue.ring!, callFd })
  }

  async kick(index: number): Promise<void> {
    const queue = this.queues[index]!
    await queue.thread.request({ kind: 'kick', queue: queue.ring! })
  }

  async pause(): Promise<void> {
    await this.#all({ kind: 'pause', session: this.session })
  }

  async resume(): Promise<void> {
    await this.#all({ kind: 'resume', session: this.session })
  }

  async setMemory(regions: readonly RegionDescription[], translated: boolean): Promise<void> {
    await this.#all({ kind: 'setMemory', session: this.session, regions, translated })
  }

  async updateIotlb(regions: readonly RegionDescription[]): Promise<void> {
    await this.#all({ kind: 'iotlbUpdate', session: this.session, regions })
  }

  async invalidateIotlb(address: number, size: number): Promise<void> {
    await this.#all({ kind: 'iotlbInvalidate', session: this.session, address, size })
  }

  async setLog(log: SharedArea | undefined, fd: number): Promise<void> {
    await this.#all({ kind: 'setLog', session: this.session, log, fd })
  }

  async setRingLog(index: number, address: number): Promise<void> {
    const queue = this.queues[index]!
    await queue.thread.request({ kind: 'setRingLog', queue: queue.ring!, address })
  }

  async saveState(): Promise<Uint8Array> {
    return saveStateOf(this.#device)
  }

  async loadState(state: Uint8Array): Promise<void> {
    await loadStateOf(this.#device, state)
  }

  /** A message of the control half for the handler of a queue; lost when its ring is not started. */
  send(index: number, message: unknown): void {
    const queue = this.queues[index]
    if (queue?.ring === undefined) return
    // The ring may stop meanwhile: then there is nobody to hear it.
    queue.thread.request({ kind: 'message', queue: queue.ring, message }).catch(() => {})
  }

  async #all(request: Request): Promise<void> {
    await whenSettled(this.#threads.map((thread) => thread.request(request)))
  }
}

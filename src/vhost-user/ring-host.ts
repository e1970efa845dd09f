/** What a session asks of those who serve its rings. The daemon implements it, with iothreads. */
import type { NetworkRequests } from '../device/index.ts'
import type { RegionDescription } from '../virtio/memory.ts'
import type { VringConfig } from '../virtio/vring.ts'

/** A part of shared memory. */
export interface SharedArea {
  readonly buffer: SharedArrayBuffer
  /** Bytes. */
  readonly offset: number
  readonly size: number
}

/** How a ring is started. */
export interface RingStart {
  readonly vring: VringConfig
  readonly features: bigint
  /** -1 = none. Borrowed until `stopRing` or `setKick`/`setCall` came back. */
  readonly kickFd: number
  readonly callFd: number
  readonly enabled: boolean
  /** Kicks come by `kick`, and without a call fd calls go by {@link RingEvents.call}. */
  readonly inband: boolean
  /** The ring's part of the in-flight buffer. */
  readonly inflight?: SharedArea
  /** Where writes to the ring itself are marked in the dirty log, -1 = they aren't. */
  readonly logAddress: number
  /** It ran before, on other threads: its driver is called once, for what those may have left uncalled. */
  readonly resumed?: boolean
}

export interface RingHost {
  /** Feature bits to offer, transport and ring features included. */
  readonly features: bigint
  readonly numQueues: number
  readonly maxQueueSize: number
  /** Requests that only network cards serve. */
  readonly network: NetworkRequests | undefined
  config(): Uint8Array
  /** @param migration the front-end restores the config space of a migrated device: read-only fields may be written */
  writeConfig(offset: number, bytes: Uint8Array, migration: boolean): boolean | Promise<boolean>
  negotiated(features: bigint): void
  reset(): void
  startRing(index: number, start: RingStart): Promise<void>
  /**
   * Drains the ring, or with `keep` leaves what is in flight in the in-flight buffer; nothing of it touches guest memory any more.
   * Resolves to its base.
   */
  stopRing(index: number, keep: boolean): Promise<number>
  enableRing(index: number, enabled: boolean): Promise<void>
  setKick(index: number, fd: number): Promise<void>
  setCall(index: number, fd: number): Promise<void>
  /** VHOST_USER_VRING_KICK of a started ring. */
  kick(index: number): Promise<void>
  /** Stops popping in all rings and waits until nothing is in flight. */
  pause(): Promise<void>
  resume(): Promise<void>
  /** @param translated the regions are entries of the IOTLB: descriptors hold IOVAs */
  setMemory(regions: readonly RegionDescription[], translated: boolean): Promise<void>
  /** Entries of the IOTLB in place of what there is in their ranges. */
  updateIotlb(regions: readonly RegionDescription[]): Promise<void>
  /** Resolves when nothing in flight uses the range. */
  invalidateIotlb(address: number, size: number): Promise<void>
  /** Where written pages are marked, undefined = nowhere. @param fd eventfd that tells of marks, -1 = none; borrowed */
  setLog(log: SharedArea | undefined, fd: number): Promise<void>
  /** Another {@link RingStart.logAddress} for a started ring. */
  setRingLog(index: number, address: number): Promise<void>
  /** What a migration or a handover carries beside memory and rings; empty for most devices. All rings are stopped. */
  saveState(): Promise<Uint8Array>
  /** @throws an Error when the state is not one of this device */
  loadState(state: Uint8Array): Promise<void>
}

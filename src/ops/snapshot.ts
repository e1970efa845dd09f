/**
 * What the daemon tells about itself: plain numbers, read from shared memory when somebody asks. The daemon fills it
 * (`Daemon.snapshot()`); metrics and later pages only read it. It must not know how counters are stored.
 */
import type { DeviceMetric, DeviceSample } from '../device/index.ts'

/** The whole daemon at one moment. All totals count from the start of the process and never go back. */
export interface DaemonSnapshot {
  readonly devices: readonly DeviceSnapshot[]
  readonly iothreads: readonly IothreadSnapshot[]
}

export interface DeviceSnapshot {
  /** The device's name in the configuration, unique, e.g. `blk0`. */
  readonly name: string
  /** `DeviceDefinition.name`, e.g. `blk`: the prefix of its metrics. */
  readonly type: string
  /** A front-end is connected. */
  readonly sessionUp: boolean
  /** Guest memory that is mapped now, in bytes. */
  readonly memoryBytes: number
  /** Guest memory regions that are mapped now. */
  readonly memoryRegions: number
  /** Front-ends that connected so far. */
  readonly sessionsTotal: number
  /** Sessions that ended because the front-end broke the protocol. */
  readonly protocolErrorsTotal: number
  readonly queues: readonly QueueSnapshot[]
  /** `DeviceDefinition.metrics`, the same for all devices of a type; empty without. */
  readonly metrics: readonly DeviceMetric[]
  /** `Device.samples()` now; empty without. */
  readonly samples: readonly DeviceSample[]
  /** For a device on threads of its own: for how long they did not answer so far, in seconds. */
  readonly blockedSeconds?: number
  /** For a device whose module is watched: reloads of it so far. */
  readonly reloads?: { readonly ok: number; readonly failed: number }
}

export interface QueueSnapshot {
  readonly index: number
  /** The ring is started and enabled. */
  readonly started: boolean
  /** The ring was malformed and is stopped until the driver resets it. */
  readonly broken: boolean
  /** Index of the iothread that serves it. */
  readonly iothread: number
  /** Kicks received. */
  readonly kicks: number
  /** Calls sent. */
  readonly calls: number
  /** Publishes after which the driver wanted no call. */
  readonly callsSuppressed: number
  /** Chains popped. */
  readonly chains: number
  /** Chains popped and not yet used, now. */
  readonly inFlight: number
  /** How often the ring broke. */
  readonly brokenTotal: number
  /** In the order of `DeviceDefinition.operations`. */
  readonly operations: readonly OperationSnapshot[]
  /** Failed requests, in the order of `DeviceDefinition.errors`. */
  readonly errors: readonly ErrorSnapshot[]
}

/** The number of latency buckets with an upper bound: bucket i holds requests of at most 2^i µs, i = 0 … 23. */
export const LATENCY_BUCKETS = 24

export interface OperationSnapshot {
  /** E.g. `read`. */
  readonly name: string
  /** Completed requests, failed ones included. */
  readonly requests: number
  /** Payload bytes of these requests. */
  readonly bytes: number
  /**
   * Requests by latency from pop to push, {@link LATENCY_BUCKETS} + 1 counts, not cumulative: [i] = more than 2^(i−1)
   * µs and at most 2^i µs; the last one = more than 2^23 µs.
   */
  readonly latencyBuckets: ArrayLike<number>
  /** Sum of the latencies in seconds. */
  readonly latencySeconds: number
}

export interface ErrorSnapshot {
  /** E.g. `io`. */
  readonly kind: string
  readonly count: number
}

export interface IothreadSnapshot {
  readonly index: number
  /** What its ring is: `io_uring`, or the emulation by plain system calls. */
  readonly backend: 'io_uring' | 'emulated'
  /** Polling phases in which work arrived. */
  readonly pollHits: number
  /** Polling phases that ended in sleep. */
  readonly pollMisses: number
}

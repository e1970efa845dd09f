/**
 * What the control thread says to an iothread and hears from it. Every request is answered by one `done`, in any
 * order.
 */
import type { RingErrorCode } from '../virtio/errors.ts'
import type { RegionDescription } from '../virtio/memory.ts'
import type { VringConfig } from '../virtio/vring.ts'
import type { PortableError } from './portable.ts'

/** `workerData` of an iothread. */
export interface IothreadOptions {
  readonly index: number
  /** Longest polling before a sleep, in microseconds. */
  readonly pollMaxUs: number
  readonly cpus?: readonly number[]
  /** Don't try io_uring. */
  readonly emulate: boolean
  /**
   * Waits in the event loop instead of in the kernel, so that promises, timers and npm libraries work on this thread.
   */
  readonly eventLoop: boolean
  /** Eventfd that tells the iothread to look at its messages. */
  readonly wakeFd: number
  readonly counters: SharedArrayBuffer
  /** Of a thread of a device's own: what it is at work on, for who looks at it from outside ({@link AtWork}). */
  readonly atWork?: SharedArrayBuffer
}

/**
 * A ring to serve. `queue` is the control thread's id for it, unique among the live rings of the iothread: 0 … 4095.
 */
export interface StartQueue {
  readonly kind: 'startQueue'
  readonly queue: number
  readonly session: number
  readonly index: number
  /** Until `resume`. */
  readonly paused: boolean
  readonly vring: VringConfig
  readonly features: bigint
  /**
   * -1: the driver doesn't kick, poll the ring; with `inband` it kicks by messages. The iothread borrows both fds until
   * the ring stopped.
   */
  readonly kickFd: number
  readonly callFd: number
  /**
   * VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS: kicks come as `kick`, and without a call fd calls go as a `call`
   * report.
   */
  readonly inband: boolean
  /** The ring's part of the in-flight buffer; its size is `inflightSize` of virtio/inflight.ts. */
  readonly inflight?: { readonly buffer: SharedArrayBuffer; readonly offset: number }
  /** Where writes to the ring itself are marked in the session's dirty log, -1 = they aren't. */
  readonly logAddress: number
  /** It ran before, on other threads: its driver is called once, for what those may have left uncalled. */
  readonly resumed?: boolean
  readonly enabled: boolean
  readonly module: string
  readonly data: unknown
  readonly counters: SharedArrayBuffer
  /** A chain that is in flight for longer fails the queue, in milliseconds; 0 or unset = never. Looked at by `ping`. */
  readonly timeoutMs?: number
}

export type Request =
  | StartQueue
  /**
   * Stops the ring; answers its base. It is drained first, or with `keep` chains in flight stay marked in the in-flight
   * buffer: only what the kernel has is waited for.
   */
  | { readonly kind: 'stopQueue'; readonly queue: number; readonly keep: boolean }
  | { readonly kind: 'enableQueue'; readonly queue: number; readonly enabled: boolean }
  /** -1: no calls. Answered when nothing uses the old fd any more. */
  | { readonly kind: 'setCall'; readonly queue: number; readonly callFd: number }
  | { readonly kind: 'setKick'; readonly queue: number; readonly kickFd: number }
  /**
   * Stops popping in all rings of the session and waits until nothing is in flight: its memory can be exchanged. Those
   * of all sessions stop at one moment, so that none of them sends to one that has stopped.
   */
  | { readonly kind: 'pause'; readonly session: number | 'all' }
  | { readonly kind: 'resume'; readonly session: number | 'all' }
  /** `translated`: the regions are the IOTLB's, as GuestMemory takes it. */
  | {
      readonly kind: 'setMemory'
      readonly session: number
      readonly regions: readonly RegionDescription[]
      readonly translated: boolean
    }
  /** IOTLB entries to put in place of what there is in their ranges. */
  | { readonly kind: 'iotlbUpdate'; readonly session: number; readonly regions: readonly RegionDescription[] }
  /** Answered when nothing in flight uses the range any more. */
  | { readonly kind: 'iotlbInvalidate'; readonly session: number; readonly address: number; readonly size: number }
  /**
   * Where the session's rings mark what they write; `log` undefined = nowhere. `fd`: eventfd to tell of marks, -1 =
   * none.
   */
  | { readonly kind: 'setLog'; readonly session: number; readonly log: LogArea | undefined; readonly fd: number }
  /** As StartQueue.logAddress. */
  | { readonly kind: 'setRingLog'; readonly queue: number; readonly address: number }
  /** VHOST_USER_VRING_KICK. */
  | { readonly kind: 'kick'; readonly queue: number }
  | { readonly kind: 'endSession'; readonly session: number }
  /** For the handler of the queue, from its device's control half. */
  | { readonly kind: 'message'; readonly queue: number; readonly message: unknown }
  /** Imports a queue module ahead of its first ring, which would have to wait for it. */
  | { readonly kind: 'load'; readonly module: string }
  /** For whom the iothread was started with (`IothreadGuest`); the answer's value is what it resolves to. */
  | { readonly kind: 'guest'; readonly call: unknown }
  /** Answered between two rounds; queues look for chains that are overdue. */
  | { readonly kind: 'ping' }
  | { readonly kind: 'stop' }
  /** Ends at once, whatever is in flight; the process is about to end. Not answered. */
  | { readonly kind: 'abandon' }

/** The mapped log; bit 0 of byte `offset` is the page at address 0. */
export interface LogArea {
  readonly buffer: SharedArrayBuffer
  readonly offset: number
  /** Bytes. */
  readonly size: number
}

/** A request and the number that its answer carries. */
export interface Envelope {
  readonly id: number
  readonly request: Request
}

/** A request that a handler refused, which broke its ring. */
export interface RefusedRequest {
  /** The head of its chain, if that is known. */
  readonly chain: number | undefined
  /** Of the error. */
  readonly stack: string | undefined
}

export type Report =
  /** The iothread runs; `emulated` says on what, `reason` why. */
  | { readonly kind: 'ready'; readonly emulated: boolean; readonly reason?: string }
  | { readonly kind: 'done'; readonly id: number; readonly value: unknown }
  /** From the guest of the iothread, by itself. */
  | { readonly kind: 'guest'; readonly message: unknown }
  | { readonly kind: 'failed'; readonly id: number; readonly error: PortableError }
  | {
      readonly kind: 'ringBroken'
      readonly session: number
      readonly index: number
      readonly code: RingErrorCode
      readonly message: string
      /** For ERR_RING_REQUEST. */
      readonly request?: RefusedRequest
    }
  /** For the device's control half, from the handler of a queue. */
  | { readonly kind: 'reported'; readonly session: number; readonly index: number; readonly message: unknown }
  /** VHOST_USER_BACKEND_VRING_CALL is due. */
  | { readonly kind: 'call'; readonly session: number; readonly index: number }
  /** A ring needs a translation that the IOTLB doesn't have. `access`: IOTLB_READ, IOTLB_WRITE or both. */
  | {
      readonly kind: 'iotlbMiss'
      readonly session: number
      readonly index: number
      readonly address: number
      readonly access: number
    }
  /** `chain`: the head of the chain that its handler was at work on, if that is known. */
  | {
      readonly kind: 'deviceFailed'
      readonly session: number
      readonly index: number
      readonly error: PortableError
      readonly chain?: number
    }

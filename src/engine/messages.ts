/**
 * What the control thread says to an iothread and hears from it. Every request is answered by one `done`, in any
 * order.
 */
import type { RingErrorCode } from '../virtio/errors.ts'
import type { RegionDescription } from '../virtio/memory.ts'
import type { VringConfig } from '../virtio/vring.ts'

/** `workerData` of an iothread. */
export interface IothreadOptions {
  readonly index: number
  /** Longest polling before a sleep, in microseconds. */
  readonly pollMaxUs: number
  readonly cpus?: readonly number[]
  /** Don't try io_uring. */
  readonly emulate: boolean
  /** Eventfd that tells the iothread to look at its messages. */
  readonly wakeFd: number
  readonly counters: SharedArrayBuffer
}

/**
 * A ring to serve. `queue` is the control thread's id for it, unique among the live rings of the iothread: 0 … 4095.
 */
export interface StartQueue {
  readonly kind: 'startQueue'
  readonly queue: number
  readonly session: number
  readonly index: number
  readonly vring: VringConfig
  readonly features: bigint
  /** -1: the driver doesn't kick, poll the ring. The iothread borrows both fds until the ring stopped. */
  readonly kickFd: number
  readonly callFd: number
  readonly enabled: boolean
  readonly module: string
  readonly data: unknown
  readonly counters: SharedArrayBuffer
}

export type Request =
  | StartQueue
  /** Drains the ring; answers its base. */
  | { readonly kind: 'stopQueue'; readonly queue: number }
  | { readonly kind: 'enableQueue'; readonly queue: number; readonly enabled: boolean }
  /** -1: no calls. Answered when nothing uses the old fd any more. */
  | { readonly kind: 'setCall'; readonly queue: number; readonly callFd: number }
  | { readonly kind: 'setKick'; readonly queue: number; readonly kickFd: number }
  /** Stops popping in all rings of the session and waits until nothing is in flight: its memory can be exchanged. */
  | { readonly kind: 'pause'; readonly session: number }
  | { readonly kind: 'resume'; readonly session: number }
  | { readonly kind: 'setMemory'; readonly session: number; readonly regions: readonly RegionDescription[] }
  | { readonly kind: 'endSession'; readonly session: number }
  /** For the handler of the queue, from its device's control half. */
  | { readonly kind: 'message'; readonly queue: number; readonly message: unknown }
  | { readonly kind: 'ping' }
  | { readonly kind: 'stop' }
  /** Ends at once, whatever is in flight; the process is about to end. Not answered. */
  | { readonly kind: 'abandon' }

/** A request and the number that its answer carries. */
export interface Envelope {
  readonly id: number
  readonly request: Request
}

export type Report =
  /** The iothread runs; `emulated` says on what, `reason` why. */
  | { readonly kind: 'ready'; readonly emulated: boolean; readonly reason?: string }
  | { readonly kind: 'done'; readonly id: number; readonly value: number }
  | { readonly kind: 'failed'; readonly id: number; readonly error: unknown }
  | {
      readonly kind: 'ringBroken'
      readonly session: number
      readonly index: number
      readonly code: RingErrorCode
      readonly message: string
    }
  /** For the device's control half, from the handler of a queue. */
  | { readonly kind: 'reported'; readonly session: number; readonly index: number; readonly message: unknown }
  | { readonly kind: 'deviceFailed'; readonly session: number; readonly index: number; readonly error: unknown }

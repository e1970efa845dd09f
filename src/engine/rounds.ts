/** What the two ways to wait, in the kernel and in the event loop, need of an iothread. */
import type { IothreadCounters } from './counters.ts'
import type { AdaptivePoll } from './poll.ts'
import type { IoRing } from './ring.ts'

export interface Rounds {
  readonly ring: IoRing
  readonly poll: AdaptivePoll
  readonly counters: IothreadCounters
  /** The clock of the current round, in microseconds. */
  readonly now: number
  /** See QueueOwner. */
  serving: boolean
  /** A message of the control thread is waiting. */
  readonly controlPending: boolean
  /** The driver of some ring doesn't kick. */
  readonly kickless: boolean
  /**
   * Reaps, publishes, pops and handles once. What was prepared is to be submitted after it. Returns how much it did.
   */
  round(): number
  /** Whether a round would find something, for polling. */
  hasWork(): boolean
  /** Before a sleep: asks all drivers for kicks. Returns true when one of them was faster. */
  rearm(): boolean
}

/** The global is a getter, which costs as much as the clock itself. */
const clock = performance

export function microseconds(): number {
  return clock.now() * 1000
}

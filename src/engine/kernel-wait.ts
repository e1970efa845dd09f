/**
 * Waiting in the kernel: the thread polls adaptively, then sleeps in io_uring_enter until a kick, a completion or a
 * message. The fastest way; promises and timers on this thread don't go on meanwhile.
 */
import { microseconds, type Rounds } from './rounds.ts'

/** Spins between two looks at the clock. */
const SPINS_PER_CLOCK = 8

/** Rounds of work until a control message is waiting. */
export function serveFromKernel(thread: Rounds): void {
  const { ring, poll } = thread
  while (!thread.controlPending) {
    const work = thread.round()
    if (ring.pending > 0) {
      // Without polling the submission is the wait as well.
      if (poll.current === 0 && !thread.kickless && !thread.rearm()) ring.submit(1, -1)
      else ring.submit(0, -1)
    } else if (ring.wantsEnter()) ring.submit(0, -1)
    else if (work === 0) wait(thread)
  }
}

/** Nothing to do: polls for a while, then sleeps. */
function wait(thread: Rounds): void {
  const { ring, poll, now: start } = thread
  if (thread.kickless) {
    // Entered once a millisecond, since nothing else tells the emulation of messages and other rings' kicks.
    if (!spin(thread, start + 1000)) ring.submit(0, -1)
    return
  }
  if (poll.current > 0) {
    if (spin(thread, start + poll.current)) {
      thread.counters.pollHit()
      return
    }
    thread.counters.pollMiss()
  }
  if (thread.rearm()) return
  ring.submit(1, -1)
  poll.adjust(microseconds() - start)
}

/** Looks at rings and completions until `deadline` (microseconds). Returns true when there is something. */
function spin(thread: Rounds, deadline: number): boolean {
  for (let spins = 1; ; spins++) {
    if (thread.hasWork()) return true
    if (spins % SPINS_PER_CLOCK === 0 && microseconds() >= deadline) return false
  }
}

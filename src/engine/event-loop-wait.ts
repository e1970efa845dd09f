/**
 * Waiting in the event loop: each round is a callback of libuv's, so that promises, timers and npm libraries on this
 * thread go on between rounds. While there is work the next round is an immediate; without it the thread polls in the
 * same way for a while, then watches the ring's fd, which tells of kicks, completions and messages alike.
 */
import { type NativeWatcher, native, systemError } from '../native.ts'
import type { Rounds } from './rounds.ts'

/** How long a driver that doesn't kick is polled without a break, in microseconds. */
const KICKLESS_POLL = 2000
/** How often it, or a ring that can't be watched, is looked at after that. */
const PERIOD_MS = 1

export class EventLoopWait {
  readonly #thread: Rounds
  /** Of the ring's fd; a ring that can't be watched is looked at all the time. */
  readonly #watcher: NativeWatcher | undefined
  #immediate: NodeJS.Immediate | undefined
  /** Asleep in the event loop; with a timer when a driver doesn't kick. */
  #asleep = false
  #timer: NodeJS.Timeout | undefined
  /** When there was nothing more to do, in microseconds; -1 = there is. */
  #idleSince = -1
  #slept = false
  #done: (() => boolean) | undefined
  #resolve = () => {}
  #reject: (error: unknown) => void = () => {}

  constructor(thread: Rounds) {
    this.#thread = thread
    if (thread.ring.pollFd < 0) return
    this.#watcher = native.createWatcher(() => this.#wake())
    const result = this.#watcher.add(thread.ring.pollFd, 1)
    if (result < 0) throw systemError(result, 'epoll_ctl', 'cannot watch the ring')
  }

  /** Rounds of work until `done`. @throws a system error when the ring fails */
  serve(done: () => boolean): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#done = done
      this.#resolve = resolve
      this.#reject = reject
      this.#soon()
    })
  }

  /** Something was done outside of a round. */
  stir(): void {
    if (this.#done !== undefined) this.#soon()
  }

  close(): void {
    this.#watcher?.close()
  }

  /** The next round is the next immediate: all that ends in this turn of the event loop is published by it. */
  #soon(): void {
    this.#awake()
    this.#immediate ??= setImmediate(() => this.#turn())
  }

  #awake(): void {
    this.#asleep = false
    clearTimeout(this.#timer)
    this.#timer = undefined
  }

  /** The ring's fd is readable, or a driver that doesn't kick is due. */
  #wake(): void {
    // A report may be late: an immediate was faster.
    if (!this.#asleep) return
    this.#awake()
    this.#turn()
  }

  #turn(): void {
    this.#immediate = undefined
    try {
      if (this.#round()) return this.#end(this.#resolve)
      if (this.#mayPoll()) this.#soon()
      else this.#sleep()
    } catch (error) {
      const reject = this.#reject
      this.#end(() => reject(error))
    }
  }

  #end(settle: () => void): void {
    this.#done = undefined
    settle()
  }

  /** Returns whether it is done. */
  #round(): boolean {
    const thread = this.#thread
    const { ring } = thread
    thread.serving = true
    const work = thread.round()
    thread.serving = false
    if (ring.pending > 0 || ring.wantsEnter()) ring.submit(0, -1)
    if (work > 0) this.#busy()
    else if (this.#idleSince < 0) this.#idleSince = thread.now
    return this.#done!()
  }

  /** There was work: the time without it tells how long to poll the next time. */
  #busy(): void {
    const { now, poll, counters } = this.#thread
    if (this.#idleSince < 0) return
    if (this.#slept) poll.adjust(now - this.#idleSince)
    else if (poll.current > 0) counters.pollHit()
    this.#slept = false
    this.#idleSince = -1
  }

  #mayPoll(): boolean {
    const { poll, kickless, now } = this.#thread
    if (this.#idleSince < 0) return true
    return !this.#slept && now - this.#idleSince < Math.max(poll.current, kickless ? KICKLESS_POLL : 0)
  }

  #sleep(): void {
    const { ring, poll, counters, kickless } = this.#thread
    if (!this.#slept && poll.current > 0) counters.pollMiss()
    this.#slept = true
    if (this.#thread.rearm()) return this.#soon()
    ring.submit(0, -1)
    if (ring.hasCompletions()) return this.#soon()
    this.#asleep = true
    this.#watcher?.arm(ring.pollFd, 1)
    if (kickless || this.#watcher === undefined) this.#timer = setTimeout(() => this.#wake(), PERIOD_MS)
  }
}

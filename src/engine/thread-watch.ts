/**
 * Looks after a thread of a device's own: it is pinged four times a second, which makes its queues look for overdue
 * chains, and the device is told of when no answer comes. The threads that virtiod's own devices share do without.
 */
import type { Work } from './at-work.ts'
import type { IothreadHandle } from './iothread-handle.ts'

/** A thread that doesn't answer. */
export interface Blocked extends Work {
  /** How long it has not answered, in milliseconds. */
  readonly ms: number
  /** How much of that was not told before: what is to be added up. */
  readonly newMs: number
  /** It has just been a second, or ten more: worth a line. */
  readonly notable: boolean
}

/** What a thread of a device's own tells. */
export interface OwnThreadEvents {
  /** By {@link Iothread.say}. */
  message(message: unknown): void
  /**
   * It has ended without having been asked to; nothing of it is in memory any more. All requests have been rejected
   * with the same.
   */
  death(error: unknown): void
  /** It runs, and has not answered for a second or longer: four times a second. */
  blocked(blocked: Blocked): void
  /** It answers again, after `ms` milliseconds. @param newMs as {@link Blocked.newMs} */
  unblocked(ms: number, newMs: number): void
}

const PERIOD_MS = 250
/**
 * In periods, not by the clock: when this thread or the whole process has been held up, the answer is read before the
 * next period ends.
 */
const PATIENCE = 4
const REPEAT = 40

export class ThreadWatch {
  readonly #thread: IothreadHandle
  readonly #events: OwnThreadEvents
  #timer: NodeJS.Timeout | undefined
  /** Of the present ping; -1 = all are answered. */
  #sentAt = -1
  #periods = 0
  /** How much of its age was told, in milliseconds. */
  #told = 0

  constructor(thread: IothreadHandle, events: OwnThreadEvents) {
    this.#thread = thread
    this.#events = events
    thread.ready().then(
      () => this.#begin(),
      () => {}
    )
  }

  #begin(): void {
    this.#timer = setInterval(() => this.#tick(), PERIOD_MS).unref()
    this.#ping()
  }

  end(): void {
    clearInterval(this.#timer)
  }

  #tick(): void {
    if (this.#sentAt < 0) return this.#ping()
    this.#periods++
    if (this.#periods < PATIENCE) return
    const notable = (this.#periods - PATIENCE) % REPEAT === 0
    this.#events.blocked({ ...this.#tell(), notable, ...this.#thread.work })
  }

  #ping(): void {
    this.#sentAt = performance.now()
    this.#periods = 0
    this.#told = 0
    this.#thread.request({ kind: 'ping' }).then(
      () => this.#answered(),
      () => this.end()
    )
  }

  #answered(): void {
    const { ms, newMs } = this.#tell()
    this.#sentAt = -1
    if (this.#periods >= PATIENCE) this.#events.unblocked(ms, newMs)
  }

  #tell(): Pick<Blocked, 'ms' | 'newMs'> {
    const ms = Math.round(performance.now() - this.#sentAt)
    const newMs = ms - this.#told
    this.#told = ms
    return { ms, newMs }
  }
}

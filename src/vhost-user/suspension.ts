/**
 * A session's stop between two messages, for a handover: asked for by `suspend`, reached by the loop that serves, ended
 * by `resume`, `abandon`, or the end of the session. It must not know what is done while it lasts.
 */
import type { Connection } from './connection.ts'

export class Suspension {
  #state: 'none' | 'asked' | 'parked' | 'abandoned' | 'ended' = 'none'
  /** Of the loop: resolves to whether it is parked. */
  #arrival = Promise.withResolvers<boolean>()
  #decision = Promise.withResolvers<void>()
  /** What is done to the session while its loop is parked: one thing after the other. */
  #work: Promise<unknown> = Promise.resolve()

  get abandoned(): boolean {
    return this.#state === 'abandoned'
  }

  /**
   * Parks the loop, then does `work`. Undefined: the session ended before, or `resume` came first.
   * @throws what `work` throws, an Error when it is suspended already
   */
  async run<T>(connection: Connection, work: () => Promise<T>): Promise<T | undefined> {
    if (this.#state === 'ended') return undefined
    if (this.#state !== 'none') throw new Error('the session is suspended already')
    this.#state = 'asked'
    this.#arrival = Promise.withResolvers()
    this.#decision = Promise.withResolvers()
    connection.interrupt()
    if (!(await this.#arrival.promise)) return undefined
    const result = work()
    this.#work = result
    return await result
  }

  /** The loop was interrupted: waits. Returns whether the session is abandoned. */
  async park(connection: Connection): Promise<boolean> {
    if (this.#state !== 'asked') return this.abandoned
    this.#state = 'parked'
    this.#arrival.resolve(true)
    await Promise.race([this.#decision.promise, connection.aborted])
    // Whatever is being done to the rings: nobody else touches them before it is done.
    for (let work: unknown; work !== this.#work; ) {
      work = this.#work
      await this.#work.catch(() => {})
    }
    // Aborted: a `resume` that comes now must not start rings behind the back of the end.
    if (this.#state === 'parked') this.#state = 'ended'
    return this.abandoned
  }

  /** Lets the loop go on after `work`, which undoes what was done. */
  async resume(connection: Connection, work: () => Promise<void>): Promise<void> {
    if (this.#state === 'asked') {
      connection.proceed()
      this.#state = 'none'
      this.#arrival.resolve(false)
      return
    }
    if (this.#state !== 'parked') return
    this.#work = this.#work.catch(() => {}).then(work)
    try {
      await this.#work
    } finally {
      if (this.#state === 'parked') this.#state = 'none'
      this.#decision.resolve()
    }
  }

  /** The loop ends, and returns that it was abandoned. */
  abandon(): void {
    this.#state = 'abandoned'
    this.#arrival.resolve(false)
    this.#decision.resolve()
  }

  /** The loop has ended. */
  end(): void {
    if (!this.abandoned) this.#state = 'ended'
    this.#arrival.resolve(false)
  }
}

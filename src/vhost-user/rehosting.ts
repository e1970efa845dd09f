/**
 * The moment in which the rings of a session come to be served by others, while its front-end stays connected and sees nothing
 * but a pause. It must not know who they are.
 */
import { LOGGING } from './negotiated.ts'
import type { Session } from './session.ts'
import type { Suspension } from './suspension.ts'

/** What it needs of the session. */
type Rehosted = Pick<Session, 'connection' | 'host' | 'negotiated' | 'exchange' | 'log' | 'rings' | 'channel'>

/** What is in flight takes too long. */
export class StillInFlight extends Error {}

export class Rehosting {
  /** The others are in place. */
  moved = false
  readonly #session: Rehosted
  readonly #suspension: Suspension

  constructor(session: Rehosted, suspension: Suspension) {
    this.#session = session
    this.#suspension = suspension
  }

  /**
   * Stops the session between two messages, drains and stops its rings, and calls `swap`; `end` comes next, also when it throws.
   * @throws StillInFlight when that takes longer than `limitMs`, or what `swap` throws
   */
  async run(swap: () => Promise<void>, limitMs: number): Promise<void> {
    const late = Promise.withResolvers<never>()
    late.promise.catch(() => {})
    const error = new StillInFlight(`requests are still in flight after ${limitMs} ms`)
    const timer = setTimeout(() => late.reject(error), limitMs)
    const { connection, channel, host, rings } = this.#session
    const moving = this.#suspension.run(connection, async () => {
      channel.hold()
      // A ring that is being stopped can't go on if the device doesn't complete what it has; one that is paused can.
      const paused = host.pause().then(() => true)
      if (!(await Promise.race([paused, late.promise, connection.aborted]))) return
      clearTimeout(timer)
      await rings.suspend()
      await swap()
      this.moved = true
    })
    // When it comes second.
    moving.catch(() => {})
    try {
      await Promise.race([moving, late.promise])
    } finally {
      clearTimeout(timer)
    }
  }

  /** @param goOn starts the rings @throws what it throws, or what keeps the others from hearing of the session */
  async end(goOn: () => Promise<void>): Promise<void> {
    const { connection, host } = this.#session
    // Not awaited: a thread that doesn't answer holds up nothing else. It is heard before all that follows.
    host.resume().catch(() => {})
    await this.#suspension.resume(connection, async () => {
      if (this.moved) await this.#introduce()
      await goOn()
    })
  }

  /** The others have never heard of the session. */
  async #introduce(): Promise<void> {
    const { host, negotiated, exchange, log } = this.#session
    if (negotiated.features !== undefined) host.negotiated(negotiated.features & ~LOGGING)
    await exchange.share()
    await log.share()
  }
}

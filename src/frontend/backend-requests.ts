/**
 * The back-end channel, seen from the front-end: requests come in, are handled and acknowledged. It owns the channel.
 * It must not know what the requests mean.
 */
import { native } from '../native.ts'
import * as wire from '../vhost-user/wire.ts'
import type { Channel, Message } from './channel.ts'
import { FrontendError } from './errors.ts'
import { payload64 } from './payloads.ts'

/**
 * Answers a request of the back-end: 0 = done, anything else = refused. The fds that come with it are closed behind it.
 */
export type BackendHandler = (message: Message) => bigint

export class BackendRequests {
  readonly channel: Channel
  #inPump = false

  constructor(channel: Channel) {
    this.channel = channel
  }

  /** The next request, handled; the caller owns its fds. @returns undefined when none came in time */
  next(timeoutMs: number, handler: BackendHandler | undefined): Message | undefined {
    const { channel } = this
    if (!channel.readable(timeoutMs)) return undefined
    const message = channel.receive('back-end request')
    const value = handler?.(message) ?? 0n
    if ((message.flags & wire.VHOST_USER_NEED_REPLY_MASK) !== 0) {
      channel.send(message.request, wire.VHOST_USER_VERSION | wire.VHOST_USER_REPLY_MASK, payload64(value))
    }
    return message
  }

  /** Handles what is there, waiting for the first one. Calls of it from within do nothing. */
  pump(timeoutMs: number, handler: BackendHandler | undefined): number {
    if (this.#inPump) return 0
    this.#inPump = true
    let count = 0
    try {
      for (let wait = timeoutMs; ; wait = 0) {
        const message = this.next(wait, handler)
        if (message === undefined) return count
        for (const fd of message.fds) native.close(fd)
        count++
      }
    } catch (error) {
      // Who hung up here hangs up over there, where it is noticed.
      if (!(error instanceof FrontendError) || error.failure !== 'closed') throw error
      this.channel.close()
      return count
    } finally {
      this.#inPump = false
    }
  }

  close(): void {
    this.channel.close()
  }
}

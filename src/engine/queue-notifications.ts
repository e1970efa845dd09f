/**
 * How the driver of a started ring kicks and is called: by eventfds, or by messages of its front-end (vhost-user.rst
 * "VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS"). It counts them; whether one is wanted is the vring's to say.
 */
import { CALLS, KICKS, type QueueCounters } from './counters.ts'
import type { StartQueue } from './messages.ts'
import { CallWriter, KickPoll } from './notifications.ts'
import type { IoRing } from './ring.ts'
import { OP_CALL, OP_CANCEL_CALL, OP_CANCEL_KICK, OP_KICK } from './tags.ts'

/** Who makes the calls that are messages. */
export interface CallMessenger {
  /** A call is due: `takeCall` when this round is done. */
  callDue(notifications: QueueNotifications): void
}

export class QueueNotifications {
  readonly session: number
  readonly queueIndex: number
  /** The driver doesn't kick: the iothread must not sleep while this ring is served. */
  kickless: boolean
  readonly #inband: boolean
  readonly #kick: KickPoll
  readonly #call: CallWriter
  readonly #counters: QueueCounters
  readonly #messenger: CallMessenger
  /** The messenger was told. */
  #callDue = false

  /**
   * @param oneAddress as CallWriter has it
   * @param generation the queue's, shifted to its place in user_data
   */
  constructor(
    ring: IoRing,
    oneAddress: number,
    start: StartQueue,
    generation: number,
    counters: QueueCounters,
    messenger: CallMessenger
  ) {
    const low = start.queue << 16
    this.session = start.session
    this.queueIndex = start.index
    this.#inband = start.inband
    this.kickless = start.kickFd < 0 && !start.inband
    this.#kick = new KickPoll(ring, start.kickFd, {
      low,
      operation: generation | OP_KICK,
      cancellation: generation | OP_CANCEL_KICK,
    })
    this.#call = new CallWriter(ring, start.callFd, oneAddress, {
      low,
      operation: generation | OP_CALL,
      cancellation: generation | OP_CANCEL_CALL,
    })
    this.#counters = counters
    this.#messenger = messenger
  }

  /** Begins to listen for kicks. */
  begin(): void {
    this.#kick.arm()
  }

  /** The kick fd is in use by the kernel. */
  get armed(): boolean {
    return this.#kick.armed
  }

  /** The call fd is in use by the kernel. */
  get calling(): boolean {
    return this.#call.calling
  }

  /** A kick came, as a message or not. */
  kicked(): void {
    this.#counters.add(KICKS, 1)
  }

  /** Wakes the driver, in the next submission, or by a message when the round is done. */
  call(): void {
    if (this.#call.call()) this.#counters.add(CALLS, 1)
    else if (this.#inband && !this.#call.hasFd && !this.#callDue) {
      this.#callDue = true
      this.#messenger.callDue(this)
    }
  }

  /**
   * After `callDue`: whether a message has to be sent. One that the control thread has not seen yet says it as well.
   */
  takeCall(): boolean {
    this.#callDue = false
    if (!this.#counters.raiseCall()) return false
    this.#counters.add(CALLS, 1)
    return true
  }

  /** Listens on another kick fd. */
  setKick(fd: number): void {
    this.kickless = fd < 0 && !this.#inband
    this.#kick.exchange(fd)
  }

  /** Before `setCall`: no more writes to the present call fd, so that it comes to rest. */
  holdCalls(): void {
    this.#call.hold()
  }

  /**
   * Uses another call fd; nothing is `calling`. vhost-user wants one spurious call, since one may have gone to the old
   * fd.
   */
  setCall(fd: number): void {
    this.#call.exchange(fd)
    this.call()
  }

  stop(): void {
    this.#kick.stop()
    this.#call.stop()
  }

  /** A completion of this generation. Returns what is wrong with the fd, or undefined. */
  completion(operation: number, result: number, flags: number): Error | undefined {
    switch (operation) {
      case OP_KICK: {
        const kick = this.#kick.completed(result, flags)
        if (kick > 0) this.kicked()
        if (kick < 0) return new Error(`the kick fd of queue ${this.queueIndex} cannot be polled (${kick})`)
        return undefined
      }
      case OP_CALL: {
        const due = this.#call.completed(result)
        if (due > 0) this.call()
        if (due < 0) return new Error(`the call fd of queue ${this.queueIndex} cannot be written (${due})`)
        return undefined
      }
      case OP_CANCEL_KICK:
        this.#kick.cancelled(result)
        return undefined
      case OP_CANCEL_CALL:
        this.#call.cancelled(result)
        return undefined
    }
    return undefined
  }
}

/**
 * One started virtqueue on an iothread: it pops chains for the device's handler, takes them back, publishes, calls,
 * and stops. Suppression, in-flight accounting, latency and broken rings are here and nowhere else.
 */
import { type Chain, DeviceError, type QueueContext, type QueueHandler, type ReceiveHandler } from '../device/index.ts'
import { VIRTIO_F_RING_PACKED } from '../virtio/constants.ts'
import { hasFeature } from '../virtio/features.ts'
import type { GuestMemory } from '../virtio/memory.ts'
import { SplitRing } from '../virtio/split-ring.ts'
import type { Vring } from '../virtio/vring.ts'
import { BROKEN, CALLS, CALLS_SUPPRESSED, CHAINS, COMPLETED, KICKS, QueueCounters } from './counters.ts'
import { Io } from './io.ts'
import type { StartQueue } from './messages.ts'
import { CallWriter, KickPoll } from './notifications.ts'
import type { IoRing } from './ring.ts'
import { Watches } from './watches.ts'

/** What a completion belongs to: the low byte of user_data's high word. */
export const OP_DEVICE = 0
export const OP_KICK = 1
export const OP_CALL = 2
export const OP_WAKE = 3
export const OP_CANCEL_KICK = 4
export const OP_CANCEL_CALL = 5
export const OP_WATCH = 6
export const OP_CANCEL_WATCH = 7

/**
 * Chains popped before others get their turn; also how much work one native call gets, so that the driver works on the
 * first results while we do the next: with 64 an interrupt-driven one at depth 32 got 490 k IOPS, with 16 it gets 730 k.
 */
const BATCH = 16

/** For handlers that take batches: packets take less time each, and half of what a batch costs is shared. */
const LARGE_BATCH = 32

/** What a queue needs of its iothread. */
export interface QueueOwner {
  readonly ring: IoRing
  /** The clock of the current loop round, in microseconds. */
  readonly now: number
  /** SAFETY: address of eight bytes that hold 1 and live as long as the ring: what a call writes to an eventfd. */
  readonly oneAddress: number
  ringBroke(queue: Queue): void
  deviceFailed(queue: Queue, error: unknown): void
  reported(queue: Queue, message: unknown): void
}

export class Queue implements QueueContext {
  readonly id: number
  readonly session: number
  readonly queueIndex: number
  readonly queueSize: number
  readonly features: bigint
  readonly io: Io
  readonly vring: Vring
  /** Chains popped and not yet pushed. */
  inFlight = 0
  enabled: boolean
  stopping = false
  #paused = false
  /** Enabled and none of paused, stopping and broken: asked for per packet. */
  #active = false
  /** The driver doesn't kick: the iothread must not sleep while this ring is served. */
  kickless: boolean
  readonly #owner: QueueOwner
  readonly #counters: QueueCounters
  readonly #generation: number
  /** One of the two, by the kind of the device's handler. */
  #handler: QueueHandler | undefined
  #receiver: ReceiveHandler | undefined
  readonly #watches: Watches
  readonly #kick: KickPoll
  readonly #call: CallWriter
  /**
   * The driver was asked not to kick. True at first, so that the first sleep writes flags or avail_event, whatever a
   * former back-end left there.
   */
  #suppressed = true
  #broken = false
  /** The handler threw: it is called no more. */
  #failed = false
  /** What `drain` popped. Chains are pooled: what stays in it costs nothing. */
  readonly #batch: Chain[] = []
  /** The handler takes batches. */
  #batches = false
  /** The receiver did something when it was last asked, so it may have more to do without being woken. */
  #received = false
  /** Chains that `take` took and `untake` did not put back, since they were last counted. */
  #taken = 0
  /** Chains completed, and how many of them `publish` has seen. */
  #completed = 0
  #published = 0

  constructor(owner: QueueOwner, start: StartQueue, memory: GuestMemory, generation: number) {
    if (hasFeature(start.features, VIRTIO_F_RING_PACKED)) throw new Error('packed rings are not offered')
    this.#owner = owner
    this.#generation = generation
    this.#counters = new QueueCounters(start.counters)
    this.id = start.queue
    this.session = start.session
    this.queueIndex = start.index
    this.queueSize = start.vring.size
    this.features = start.features
    this.enabled = start.enabled
    this.kickless = start.kickFd < 0
    const low = start.queue << 16
    this.#kick = new KickPoll(owner.ring, start.kickFd, {
      low,
      operation: this.#tag(OP_KICK),
      cancellation: this.#tag(OP_CANCEL_KICK),
    })
    this.#call = new CallWriter(owner.ring, start.callFd, owner.oneAddress, {
      low,
      operation: this.#tag(OP_CALL),
      cancellation: this.#tag(OP_CANCEL_CALL),
    })
    this.vring = new SplitRing(memory, start.vring)
    this.#watches = new Watches(owner.ring, low, this.#tag(OP_WATCH), this.#tag(OP_CANCEL_WATCH))
    this.io = new Io(owner.ring, start.queue, OP_DEVICE, this.#watches)
  }

  /** Attaches the device's handler and begins to listen for kicks. */
  begin(handler: QueueHandler | ReceiveHandler): void {
    this.#settle()
    if ('receive' in handler) {
      this.#receiver = handler
      // Until it waits for chains it needs no kick.
      this.vring.suppress()
    } else {
      this.#handler = handler
      this.#batches = handler.handleBatch !== undefined
    }
    this.#kick.arm()
  }

  /** Chains may be popped for their purpose. */
  get active(): boolean {
    return this.#active
  }

  /** `drain` may be called: as `active`, or a disabled ring's chains are discarded. */
  get served(): boolean {
    return (this.enabled || this.#handler?.discard !== undefined) && !this.#paused && !this.stopping && !this.#broken
  }

  /** Chains are there that somebody would take: one atomic load, for polling. */
  hasWork(): boolean {
    const receiver = this.#receiver
    if (receiver !== undefined) return this.active && receiver.waiting && this.vring.hasAvail()
    return this.served && this.vring.hasAvail()
  }

  /** Nothing of this queue is with the kernel or the device. */
  get atRest(): boolean {
    return this.drained && !this.calling && !(this.stopping && (this.#kick.armed || this.#watches.armed))
  }

  /** No chain is in flight; after a failure of the device, which may have lost chains, no I/O is. */
  get drained(): boolean {
    return this.#failed ? this.io.outstanding === 0 : this.inFlight === 0
  }

  /** The call fd is in use by the kernel. */
  get calling(): boolean {
    return this.#call.calling
  }

  /** Pops and handles up to a batch of chains. Returns how many. */
  drain(): number {
    if (this.#receiver !== undefined) return this.#receive(this.#receiver)
    const { vring, enabled } = this
    const handler = this.#handler!
    const now = this.#owner.now
    const ring = this.#owner.ring
    const batch = this.#batch
    let count = 0
    try {
      const most = this.#batches ? LARGE_BATCH : BATCH
      while (count < most && ring.inFlight < ring.capacity) {
        const chain = vring.pop()
        if (chain === undefined) break
        chain.poppedAt = now
        this.inFlight++
        batch[count++] = chain
      }
      if (!enabled) for (let i = 0; i < count; i++) handler.discard!(batch[i]!)
      else if (this.#batches) {
        if (count > 0) handler.handleBatch!(batch, count)
      } else for (let i = 0; i < count; i++) handler.handle!(batch[i]!)
    } catch (error) {
      this.#fail(error)
    }
    if (count > 0) {
      this.#counters.add(CHAINS, count)
      if (!this.#suppressed) this.#suppress()
    }
    if (vring.error !== undefined && !this.#broken) this.#break()
    return count
  }

  #receive(receiver: ReceiveHandler): number {
    try {
      const count = receiver.receive()
      this.#received = count > 0
      return count
    } catch (error) {
      this.#fail(error)
      return 0
    }
  }

  #suppress(): void {
    this.#suppressed = true
    this.vring.suppress()
  }

  take(): Chain | undefined {
    if (!this.#active) return undefined
    const chain = this.vring.pop()
    if (chain === undefined) {
      if (this.vring.error !== undefined) this.#break()
      return undefined
    }
    this.inFlight++
    this.#taken++
    if (!this.#suppressed) this.#suppress()
    return chain
  }

  untake(chain: Chain): void {
    this.vring.unpop(chain)
    this.inFlight--
    this.#taken--
  }

  give(chain: Chain, written: number): void {
    if (!chain.inFlight) throw completedTwice(chain)
    this.vring.push(chain, written)
    this.inFlight--
    this.#completed++
  }

  report(message: unknown): void {
    this.#owner.reported(this, message)
  }

  complete(chain: Chain, written: number, operation: number, bytes: number): void {
    this.give(chain, written)
    this.#counters.request(operation, bytes, this.#owner.now - chain.poppedAt)
  }

  countError(kind: number): void {
    this.#counters.error(kind)
  }

  /** Shows the driver what was completed and calls it if it wants that. */
  publish(): void {
    const completed = this.#completed
    if (completed === this.#published) return
    this.#counters.add(COMPLETED, completed - this.#published)
    this.#counters.add(CHAINS, this.#taken)
    this.#taken = 0
    this.#published = completed
    if (this.vring.publish()) this.call()
    else this.#counters.add(CALLS_SUPPRESSED, 1)
  }

  /** Wakes the driver, in the next submission. */
  call(): void {
    if (this.#call.call()) this.#counters.add(CALLS, 1)
  }

  /** Before a sleep: asks for kicks. Returns true when chains are waiting already, or a receiver isn't through. */
  rearm(): boolean {
    if (this.#received) return true
    // One that waits for nothing but its fd sleeps without kicks.
    if (this.#receiver !== undefined && !this.#receiver.waiting) return false
    if (!this.#suppressed) return this.vring.hasAvail()
    this.#suppressed = false
    return this.vring.rearm()
  }

  /** A completion of this queue arrived. */
  completion(low: number, high: number, result: number, flags: number): void {
    switch (high & 0xff) {
      case OP_DEVICE:
        this.io.outstanding--
        if (this.#failed) return
        try {
          this.#handler!.completed!(this.vring.chain(low & 0xffff), result)
        } catch (error) {
          this.#fail(error)
        }
        return
      case OP_KICK: {
        if (high >>> 8 !== this.#generation) return
        const kick = this.#kick.completed(result, flags)
        if (kick > 0) this.#counters.add(KICKS, 1)
        else if (kick < 0) this.#fail(new Error(`the kick fd of queue ${this.queueIndex} cannot be polled (${kick})`))
        return
      }
      case OP_CALL: {
        if (high >>> 8 !== this.#generation) return
        const due = this.#call.completed(result)
        if (due > 0) this.call()
        else if (due < 0) this.#fail(new Error(`the call fd of queue ${this.queueIndex} cannot be written (${due})`))
        return
      }
      case OP_CANCEL_KICK:
        if (high >>> 8 === this.#generation) this.#kick.cancelled(result)
        return
      case OP_CANCEL_CALL:
        if (high >>> 8 === this.#generation) this.#call.cancelled(result)
        return
      case OP_WATCH: {
        if (high >>> 8 !== this.#generation) return
        const fd = this.#watches.event(low & 0xffff, result, flags)
        if (fd < 0 || this.#failed) return
        try {
          ;(this.#receiver ?? this.#handler)?.readable?.(fd)
        } catch (error) {
          this.#fail(error)
        }
        return
      }
      case OP_CANCEL_WATCH:
        if (high >>> 8 === this.#generation) this.#watches.cancelled(low & 0xffff, result)
        return
    }
  }

  setMemory(memory: GuestMemory): void {
    this.vring.setMemory(memory)
    if (this.vring.error !== undefined && !this.#broken) this.#break()
  }

  /**
   * Uses another call fd. The caller has seen `atRest`. vhost-user wants one spurious call, since one may have gone
   * to the old fd.
   */
  setCall(fd: number): void {
    this.#call.exchange(fd)
    this.call()
  }

  /** Before `setCall`: no more writes to the present call fd, so that it comes to rest. */
  holdCalls(): void {
    this.#call.hold()
  }

  /** Stops popping for good; `atRest` tells when the rest is done. */
  stop(): void {
    this.#release()
    this.stopping = true
    this.#settle()
    this.#watches.end()
    this.#kick.stop()
    this.#call.stop()
  }

  setEnabled(enabled: boolean): void {
    if (!enabled) this.#release()
    this.enabled = enabled
    this.#settle()
  }

  /** Stops popping for a while, for another memory; `drained` tells when nothing is in flight. */
  pause(): void {
    this.#release()
    this.#paused = true
    this.#settle()
  }

  resume(): void {
    this.#paused = false
    this.#settle()
  }

  /** A message of the device's control half. */
  message(message: unknown): void {
    this.#tell(() => (this.#receiver ?? this.#handler)?.message?.(message))
  }

  /** Listens on another kick fd. */
  setKick(fd: number): void {
    this.kickless = fd < 0
    this.#kick.exchange(fd)
  }

  close(): void {
    ;(this.#receiver ?? this.#handler)?.close?.()
  }

  /** The chains that a receiver holds go back to the ring. */
  #release(): void {
    const receiver = this.#receiver
    if (receiver === undefined || this.#failed) return
    this.#tell(() => receiver.release())
  }

  /** Calls the handler outside of a batch. */
  #tell(call: () => void): void {
    try {
      call()
    } catch (error) {
      this.#fail(error)
    }
  }

  #settle(): void {
    this.#active = this.enabled && !this.#paused && !this.stopping && !this.#broken
  }

  #fail(error: unknown): void {
    this.#broken = true
    this.#failed = true
    this.#settle()
    this.#owner.deviceFailed(this, error)
  }

  #break(): void {
    if (this.#broken) return
    this.#broken = true
    this.#settle()
    this.#counters.add(BROKEN, 1)
    this.#owner.ringBroke(this)
  }

  #tag(operation: number): number {
    return (this.#generation << 8) | operation
  }
}

function completedTwice(chain: Chain): DeviceError {
  return new DeviceError('ERR_DEVICE_COMPLETED_TWICE', `chain ${chain.head} was completed twice`)
}

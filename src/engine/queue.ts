/**
 * One started virtqueue on an iothread: it pops chains for the device's handler, takes them back, publishes, calls,
 * and stops. Suppression, in-flight accounting, latency and broken rings are here and nowhere else.
 */
import { ChainError, DeviceError } from '../device/errors.ts'
import type { Chain, QueueContext, QueueHandler, ReceiveHandler } from '../device/index.ts'
import { RingError } from '../virtio/errors.ts'
import type { Vring } from '../virtio/vring.ts'
import type { AtWork } from './at-work.ts'
import { ABANDONED, BROKEN, CALLS_SUPPRESSED, CHAINS, COMPLETED, QueueCounters } from './counters.ts'
import { createVring } from './create-vring.ts'
import { InFlightChains } from './in-flight-chains.ts'
import { Io } from './io.ts'
import type { RefusedRequest, StartQueue } from './messages.ts'
import { MissReport } from './misses.ts'
import { Overdue } from './overdue.ts'
import { type CallMessenger, QueueNotifications } from './queue-notifications.ts'
import type { IoRing } from './ring.ts'
import type { SessionState } from './session-state.ts'
import { OP_CANCEL_WATCH, OP_DEVICE, OP_KICK, OP_WATCH } from './tags.ts'
import { Watches } from './watches.ts'

/**
 * Chains popped before others get their turn; also how much work one native call gets, so that the driver works on the
 * first results while we do the next: with 64 an interrupt-driven one at depth 32 got 490 k IOPS, with 16 it gets 730
 * k.
 */
const BATCH = 16

/** For handlers that take batches: packets take less time each, and half of what a batch costs is shared. */
const LARGE_BATCH = 32

/** What a queue needs of its iothread. */
export interface QueueOwner extends CallMessenger {
  readonly ring: IoRing
  /** The clock of the current loop round, in microseconds. */
  readonly now: number
  /** SAFETY: address of eight bytes that hold 1 and live as long as the ring: what a call writes to an eventfd. */
  readonly oneAddress: number
  /** A round is going on: what handlers do is seen at its end. Otherwise the owner is to be told, by `stir`. */
  readonly serving: boolean
  /** Of a thread of a device's own: where handlers that are called are noted. */
  readonly atWork: AtWork | undefined
  /** A handler did something outside of a round, which needs one. */
  stir(): void
  /** @param request with ERR_RING_REQUEST */
  ringBroke(queue: Queue, error: RingError, request?: RefusedRequest): void
  /** Its ring has a miss to tell the front-end of. */
  ringMissed(queue: Queue): void
  /** @param chain what its handler was at work on, if that is known */
  deviceFailed(queue: Queue, error: unknown, chain: Chain | undefined): void
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
  readonly notifications: QueueNotifications
  readonly #owner: QueueOwner
  readonly #counters: QueueCounters
  readonly #generation: number
  /** One of the two, by the kind of the device's handler. */
  #handler: QueueHandler | undefined
  #receiver: ReceiveHandler | undefined
  readonly #watches: Watches
  readonly #miss = new MissReport()
  /** There while memory is translated, or chains may be overdue. */
  #chains: InFlightChains | undefined
  readonly #overdue: Overdue | undefined
  readonly #session: SessionState
  #logAddress: number
  /**
   * The driver was asked not to kick. True at first, so that the first sleep writes flags or avail_event, whatever a
   * former back-end left there.
   */
  #suppressed = true
  #broken = false
  /** It stops, and chains that a former back-end took are still to be completed. */
  #finishing = false
  /**
   * A back-end before this one may have published and not called: chains in flight are recorded, so it may have died in
   * the middle of its work, or the ring ran on other threads before.
   */
  readonly #resumed: boolean
  /**
   * Chains in flight are not completed any more, since the handler threw or the ring stopped with them: it hears of
   * nothing, does no I/O, and gives no chain back.
   */
  #abandoned = false
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
  /** The ring could not write all that was published: it lies in memory for which there is no translation. */
  #owed = false
  /** That memory is there perhaps. */
  #republish = false

  /** @throws RingError, or an error of the in-flight buffer */
  constructor(owner: QueueOwner, start: StartQueue, session: SessionState, generation: number) {
    this.#owner = owner
    this.#generation = generation
    this.#counters = new QueueCounters(start.counters)
    this.#session = session
    this.#logAddress = start.logAddress
    this.id = start.queue
    this.session = start.session
    this.queueIndex = start.index
    this.queueSize = start.vring.size
    this.features = start.features
    this.enabled = start.enabled
    this.#resumed = start.inflight !== undefined || start.resumed === true
    const low = start.queue << 16
    const upper = generation << 8
    this.notifications = new QueueNotifications(owner.ring, owner.oneAddress, start, upper, this.#counters, owner)
    this.vring = createVring(session.memory, start)
    if (this.vring.error !== undefined) throw this.vring.error
    const { timeoutMs = 0 } = start
    if (timeoutMs > 0) this.#overdue = new Overdue(timeoutMs)
    if (session.memory.translated || timeoutMs > 0) this.#chains = new InFlightChains(start.vring.size)
    this.logChanged()
    this.#watches = new Watches(owner.ring, low, upper | OP_WATCH, upper | OP_CANCEL_WATCH)
    this.io = new Io(owner, start.queue, OP_DEVICE, this.#watches)
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
    // What the ring misses already is told in the first round: to the control thread it is not started before the
    // answer.
    this.notifications.begin()
    // The driver would sleep on.
    if (this.#resumed) this.notifications.call()
  }

  /** Chains may be popped for their purpose. */
  get active(): boolean {
    return this.#active
  }

  /** `drain` may be called: as `active`, or a disabled ring's chains are discarded. */
  get served(): boolean {
    if (this.#finishing) return true
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
    const { armed, calling } = this.notifications
    return this.drained && !calling && !this.#finishing && !(this.stopping && (armed || this.#watches.armed))
  }

  /** No chain is in flight; when these are abandoned, no I/O is. */
  get drained(): boolean {
    return this.#abandoned ? this.io.outstanding === 0 : this.inFlight === 0
  }

  /** Pops and handles up to a batch of chains. Returns how many. */
  drain(): number {
    if (this.#receiver !== undefined) return this.#receive(this.#receiver)
    const { vring } = this
    const handler = this.#handler!
    const discards = !this.enabled && handler.discard !== undefined
    const now = this.#owner.now
    const ring = this.#owner.ring
    const batch = this.#batch
    const atWork = this.#owner.atWork
    let count = 0
    let at = -1
    try {
      const most = this.#batches ? LARGE_BATCH : BATCH
      while (count < most && ring.inFlight < ring.capacity) {
        if (this.#finishing && !vring.recovering) break
        const chain = vring.pop()
        if (chain === undefined) break
        chain.poppedAt = now
        this.inFlight++
        this.#chains?.popped(chain)
        batch[count++] = chain
      }
      if (discards) while (++at < count) handler.discard!(batch[at]!)
      else if (this.#batches) {
        if (atWork !== undefined) atWork.begin(this.queueIndex, -1)
        if (count > 0) handler.handleBatch!(batch, count)
      } else if (atWork === undefined) while (++at < count) handler.handle!(batch[at]!)
      else
        while (++at < count) {
          atWork.begin(this.queueIndex, batch[at]!.head)
          handler.handle!(batch[at]!)
        }
    } catch (error) {
      this.#fail(error, batch[at])
    }
    if (atWork !== undefined) atWork.end()
    if (count > 0) {
      this.#counters.add(CHAINS, count)
      if (!this.#suppressed) this.#suppress()
    }
    if (vring.error !== undefined && !this.#broken) this.#break()
    this.#lookForMiss()
    if (this.#finishing) this.#finish()
    return count
  }

  #receive(receiver: ReceiveHandler): number {
    const atWork = this.#owner.atWork
    let count = 0
    try {
      if (atWork !== undefined) atWork.begin(this.queueIndex, -1)
      count = receiver.receive()
      this.#received = count > 0
      this.#lookForMiss()
    } catch (error) {
      this.#fail(error)
    }
    if (atWork !== undefined) atWork.end()
    return count
  }

  #suppress(): void {
    this.#suppressed = true
    this.vring.suppress()
  }

  take(): Chain | undefined {
    if (!this.#owner.serving) this.#owner.stir()
    if (!this.#active) return undefined
    const chain = this.vring.pop()
    if (chain === undefined) {
      if (this.vring.error !== undefined) this.#break()
      return undefined
    }
    chain.poppedAt = this.#owner.now
    this.inFlight++
    this.#taken++
    this.#chains?.popped(chain)
    if (!this.#suppressed) this.#suppress()
    return chain
  }

  untake(chain: Chain): void {
    if (this.#abandoned) return
    this.vring.unpop(chain)
    this.inFlight--
    this.#taken--
  }

  give(chain: Chain, written: number): void {
    this.#giveBack(chain, written, written)
  }

  /** @param touched as Vring.push has it */
  #giveBack(chain: Chain, written: number, touched: number): void {
    if (this.#abandoned) return
    if (!this.#owner.serving) this.#owner.stir()
    if (!chain.inFlight) throw completedTwice(chain)
    this.vring.push(chain, written, touched)
    this.inFlight--
    this.#completed++
  }

  report(message: unknown): void {
    this.#owner.reported(this, message)
  }

  complete(chain: Chain, written: number, operation: number, bytes: number): void {
    if (this.#abandoned) return
    // A handler may have written anywhere: a status at the end, or part of what it failed to read.
    this.#giveBack(chain, written, chain.writable)
    this.#counters.request(operation, bytes, this.#owner.now - chain.poppedAt)
  }

  countError(kind: number): void {
    this.#counters.error(kind)
  }

  fail(error: unknown, chain?: Chain): void {
    if (this.#abandoned) return
    if (!this.#owner.serving) this.#owner.stir()
    this.#fail(error, chain)
  }

  /** Fails when a chain has been in flight for too long. @param now microseconds */
  lookForOverdue(now: number): void {
    if (this.#overdue === undefined || this.#abandoned) return
    const chain = this.#overdue.look(this.#chains!, now)
    if (chain === undefined) {
      // A receiver may only hold it for what may come: then it is back in the ring at the next look.
      if (this.#overdue.suspects) this.#release()
      return
    }
    const message = `chain ${chain.head} of queue ${this.queueIndex} has not been completed for ${this.#overdue.text}`
    this.#fail(new DeviceError('ERR_DEVICE_STUCK', message), chain)
  }

  /** Shows the driver what was completed and calls it if it wants that. */
  publish(): void {
    const completed = this.#completed
    if (completed === this.#published && !this.#republish) return
    this.#republish = false
    this.#counters.add(COMPLETED, completed - this.#published)
    this.#counters.add(CHAINS, this.#taken)
    this.#taken = 0
    this.#published = completed
    if (this.vring.publish()) this.notifications.call()
    else this.#counters.add(CALLS_SUPPRESSED, 1)
    if (this.vring.missAddress >= 0) {
      this.#owed = true
      this.#lookForMiss()
    }
  }

  /** A kick that came as a message. The ring is looked at in the next round. */
  kick(): void {
    this.notifications.kicked()
    this.#miss.kicked(this.#owner.now)
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
    const operation = high & 0xff
    if (operation === OP_DEVICE) return this.#ioEnded(this.vring.chain(low & 0xffff), result)
    if (high >>> 8 !== this.#generation) return
    switch (operation) {
      case OP_WATCH:
        return this.#watched(this.#watches.event(low & 0xffff, result, flags))
      case OP_CANCEL_WATCH:
        return this.#watches.cancelled(low & 0xffff, result)
      default: {
        if (operation === OP_KICK) this.#miss.kicked(this.#owner.now)
        const error = this.notifications.completion(operation, result, flags)
        if (error !== undefined) this.#fail(error)
      }
    }
  }

  #ioEnded(chain: Chain, result: number): void {
    this.io.outstanding--
    // The kernel may have read into it; whoever takes the chain over has to know what is there now.
    if (this.#abandoned) return this.#session.log?.markChain(chain, chain.writable)
    const atWork = this.#owner.atWork
    try {
      if (atWork !== undefined) atWork.begin(this.queueIndex, chain.head)
      this.#handler!.completed!(chain, result)
    } catch (error) {
      this.#fail(error, chain)
    }
    if (atWork !== undefined) atWork.end()
  }

  #watched(fd: number): void {
    if (fd < 0 || this.#abandoned) return
    this.#tell(() => (this.#receiver ?? this.#handler)?.readable?.(fd))
  }

  /** The session's memory was exchanged for another one. */
  setMemory(): void {
    this.#miss.forget()
    this.memoryChanged()
  }

  /** The IOTLB has other entries. */
  memoryChanged(): void {
    const { memory } = this.#session
    if (memory.translated) this.#chains ??= new InFlightChains(this.queueSize)
    else if (this.#overdue === undefined) this.#chains = undefined
    this.vring.setMemory(memory)
    if (this.vring.error !== undefined && !this.#broken) this.#break()
    // Not `= this.#owed`: of two updates in a row the second would forget what the first has seen.
    if (this.#owed) this.#republish = true
    this.#owed = false
    // One that is gone may be back at the next look for chains: only then it is over.
    if (this.vring.missAddress >= 0) this.#lookForMiss()
  }

  /** The IOTLB forgot a range. A receiver gives its chains back when one of them lies in it. */
  invalidated(address: number, size: number): void {
    this.#miss.forgetRange(address, size)
    this.memoryChanged()
    if (this.uses(address, size)) this.#release()
  }

  /** Whether something in flight is in that range of translated memory. */
  uses(address: number, size: number): boolean {
    if (this.#abandoned) return this.io.outstanding > 0
    return this.#chains?.use(address, size) === true
  }

  #lookForMiss(): void {
    if (this.#miss.due(this.vring, this.#owner.now)) this.#owner.ringMissed(this)
  }

  /** The session has another log. */
  logChanged(): void {
    this.vring.setLog(this.#session.log, this.#logAddress)
  }

  /** @param address as StartQueue.logAddress */
  setLogAddress(address: number): void {
    this.#logAddress = address
    this.logChanged()
  }

  /**
   * Stops popping for good; `atRest` tells when the rest is done. @param keep chains in flight are left to who starts
   * the ring next
   */
  stop(keep: boolean): void {
    this.#release()
    this.stopping = true
    this.#settle()
    // What is completed already is published in this round, before anybody finds the ring at rest.
    if (keep) this.#abandon()
    else this.#finish()
    this.#watches.end()
    this.notifications.stop()
  }

  /**
   * A ring that is drained leaves nothing in the in-flight buffer, whoever took it. But what a translation is missing
   * for stays there: the front-end may be waiting for this ring and answer nothing before.
   */
  #finish(): void {
    const { vring } = this
    this.#finishing = vring.recovering && vring.missAddress < 0 && !this.#broken
    if (!this.#finishing || this.#receiver === undefined) return
    // A receiver has nothing for them.
    while (vring.recovering) {
      const chain = vring.pop()
      if (chain === undefined) break
      this.inFlight++
      this.#taken++
      this.give(chain, 0)
    }
    this.#finishing = false
    if (vring.error !== undefined) this.#break()
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
    if (this.#abandoned) return
    this.#tell(() => (this.#receiver ?? this.#handler)?.message?.(message))
  }

  close(): void {
    this.#tell(() => (this.#receiver ?? this.#handler)?.close?.())
    this.#counters.add(ABANDONED, this.inFlight)
    // A promise of the handler's may come too late, when the memory is another guest's.
    this.#abandon()
  }

  /** The chains that a receiver holds go back to the ring. */
  #release(): void {
    const receiver = this.#receiver
    if (receiver === undefined || this.#abandoned) return
    this.#tell(() => receiver.release())
  }

  /** Calls the handler outside of a batch. */
  #tell(call: () => void): void {
    const { atWork } = this.#owner
    try {
      atWork?.begin(this.queueIndex, -1)
      call()
    } catch (error) {
      this.#fail(error)
    }
    atWork?.end()
  }

  #settle(): void {
    this.#active = this.enabled && !this.#paused && !this.stopping && !this.#broken
  }

  /**
   * The handler failed. What is in flight stays so: after an error of the guest's as in QEMU, until it resets the ring.
   */
  #fail(error: unknown, chain?: Chain): void {
    const wasBroken = this.#broken
    this.#broken = true
    this.#abandon()
    this.#settle()
    if (!(error instanceof ChainError)) this.#owner.deviceFailed(this, error, chain)
    else if (!wasBroken) {
      this.#counters.add(BROKEN, 1)
      const { message, stack } = error
      this.#owner.ringBroke(this, new RingError('ERR_RING_REQUEST', message), { chain: chain?.head, stack })
    }
  }

  #abandon(): void {
    this.#abandoned = true
    this.#finishing = false
    this.io.end()
  }

  #break(): void {
    if (this.#broken) return
    this.#broken = true
    this.#settle()
    this.#counters.add(BROKEN, 1)
    this.#owner.ringBroke(this, this.vring.error!)
  }
}

function completedTwice(chain: Chain): DeviceError {
  return new DeviceError('ERR_DEVICE_COMPLETED_TWICE', `chain ${chain.head} was completed twice`)
}

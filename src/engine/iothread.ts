/**
 * The loop of one iothread: reap completions, publish, pop, submit, and sleep or poll when there is nothing to do. It
 * serves any number of queues of any number of sessions, and obeys the control thread between rounds. It must not
 * know devices or sockets.
 */
import { inspect } from 'node:util'
import { type MessagePort, receiveMessageOnPort } from 'node:worker_threads'
import type { CreateQueueHandler } from '../device/index.ts'
import { native, systemError } from '../native.ts'
import { RingError } from '../virtio/errors.ts'
import { IothreadCounters } from './counters.ts'
import type { Envelope, IothreadOptions, LogArea, Report, Request, StartQueue } from './messages.ts'
import { AdaptivePoll } from './poll.ts'
import { Queue, type QueueOwner } from './queue.ts'
import type { QueueNotifications } from './queue-notifications.ts'
import { type CompletionSink, IORING_CQE_F_MORE, IoRing } from './ring.ts'
import { SessionState } from './session-state.ts'
import { OP_CANCEL_LOG, OP_LOG, OP_WAKE } from './tags.ts'

/** The global is a getter, which costs as much as the clock itself. */
const clock = performance

/** Spins between two looks at the clock. */
const SPINS_PER_CLOCK = 8

/** An answer that is due when something came to rest. */
interface Waiter {
  readonly id: number
  ready(): boolean
  finish(): number
}

export class Iothread implements CompletionSink, QueueOwner {
  readonly ring: IoRing
  readonly oneAddress: number
  now = 0
  /** SAFETY: keeps the memory at `oneAddress`: without a reference the garbage collector unmaps it. */
  readonly #one: BigUint64Array
  readonly #port: MessagePort
  readonly #wakeFd: number
  readonly #poll: AdaptivePoll
  readonly #counters: IothreadCounters
  /** By id, for completions; and all of them, for the rounds. */
  readonly #byId: (Queue | undefined)[] = []
  readonly #queues: Queue[] = []
  readonly #sessions = new Map<number, SessionState>()
  /** Those of them that log. */
  #logging: SessionState[] = []
  /** Calls to make by messages. */
  readonly #calls: QueueNotifications[] = []
  readonly #modules = new Map<string, CreateQueueHandler>()
  #waiters: Waiter[] = []
  #controlPending = true
  #generation = 0
  #kickless = false
  #stopped = false

  constructor(port: MessagePort, options: IothreadOptions) {
    this.#port = port
    this.#wakeFd = options.wakeFd
    this.#poll = new AdaptivePoll(options.pollMaxUs)
    this.#counters = new IothreadCounters(options.counters)
    native.setThreadName(`iothread${options.index}`)
    if (options.cpus !== undefined) {
      const result = native.setAffinity(Int32Array.from(options.cpus))
      if (result < 0) throw systemError(result, 'sched_setaffinity', `cannot run on CPUs ${options.cpus.join(',')}`)
    }
    const { ring, reason } = openRing(options.emulate)
    this.ring = ring
    const one = native.allocate(8)
    if (typeof one === 'number') throw systemError(one, 'mmap', 'cannot allocate memory')
    this.#one = new BigUint64Array(one.buffer)
    this.#one[0] = 1n
    this.oneAddress = one.address
    this.#listen()
    this.#report({ kind: 'ready', emulated: ring.emulated, ...(reason === undefined ? {} : { reason }) })
  }

  /** Serves until the control thread says stop. */
  async run(): Promise<void> {
    while (!this.#stopped) {
      this.#serve()
      this.#controlPending = false
      native.eventfdRead(this.#wakeFd)
      for (;;) {
        const message = receiveMessageOnPort(this.#port) as { message: Envelope } | undefined
        if (message === undefined) break
        const { id, request } = message.message
        try {
          await this.#obey(id, request)
        } catch (error) {
          const ring = error instanceof RingError ? { ring: error.code } : {}
          this.#report({ kind: 'failed', id, error: portable(error), ...ring })
        }
      }
    }
    this.ring.close()
    this.#port.close()
  }

  completion(low: number, high: number, result: number, flags: number): void {
    if (high === OP_WAKE) {
      this.#controlPending = true
      if ((flags & IORING_CQE_F_MORE) === 0) this.#listen()
      return
    }
    if (high === OP_LOG || high === OP_CANCEL_LOG) return this.#sessions.get(low)?.completion(high, result)
    this.#byId[low >>> 16]?.completion(low, high, result, flags)
  }

  ringBroke(queue: Queue): void {
    const { code, message } = queue.vring.error!
    this.#report({ kind: 'ringBroken', session: queue.session, index: queue.queueIndex, code, message })
  }

  ringMissed(queue: Queue): void {
    const { missAddress: address, missAccess: access } = queue.vring
    this.#report({ kind: 'iotlbMiss', session: queue.session, index: queue.queueIndex, address, access })
  }

  callDue(notifications: QueueNotifications): void {
    this.#calls.push(notifications)
  }

  deviceFailed(queue: Queue, error: unknown): void {
    this.#report({ kind: 'deviceFailed', session: queue.session, index: queue.queueIndex, error: portable(error) })
  }

  reported(queue: Queue, message: unknown): void {
    this.#report({ kind: 'reported', session: queue.session, index: queue.queueIndex, message })
  }

  /** Rounds of work until a control message is waiting. */
  #serve(): void {
    const ring = this.ring
    const queues = this.#queues
    while (!this.#controlPending) {
      this.now = microseconds()
      let work = ring.reap(this)
      // First what is done, so that the driver goes on while we look for more; its call is the first entry of the
      // next submission.
      for (let i = 0; i < queues.length; i++) {
        const queue = queues[i]!
        queue.publish()
        if (queue.served) {
          work += queue.drain()
          queue.publish()
        }
      }
      // A handler may have given chains of another queue: a switch does.
      if (work > 0) for (let i = 0; i < queues.length; i++) queues[i]!.publish()
      this.#tell()
      if (this.#waiters.length > 0) {
        this.#settle()
        this.#tell()
      }
      if (ring.pending > 0) {
        // Without polling the submission is the wait as well.
        if (this.#poll.current === 0 && !this.#kickless && !this.#rearm()) ring.submit(1, -1)
        else ring.submit(0, -1)
      } else if (ring.wantsEnter()) ring.submit(0, -1)
      else if (work === 0) this.#wait()
    }
  }

  /** Nothing to do: polls for a while, then sleeps until a kick, a completion or a message. */
  #wait(): void {
    const start = this.now
    if (this.#kickless) {
      // Entered once a millisecond, since nothing else tells the emulation of messages and other rings' kicks.
      if (!this.#spin(start + 1000)) this.ring.submit(0, -1)
      return
    }
    const poll = this.#poll.current
    if (poll > 0) {
      if (this.#spin(start + poll)) {
        this.#counters.pollHit()
        return
      }
      this.#counters.pollMiss()
    }
    if (this.#rearm()) return
    this.ring.submit(1, -1)
    this.#poll.adjust(microseconds() - start)
  }

  /** Looks at rings and completions until `deadline` (microseconds). Returns true when there is something. */
  #spin(deadline: number): boolean {
    const ring = this.ring
    const queues = this.#queues
    for (let spins = 1; ; spins++) {
      for (let i = 0; i < queues.length; i++) {
        const queue = queues[i]!
        if (queue.hasWork()) return true
      }
      if (ring.hasCompletions()) return true
      if (spins % SPINS_PER_CLOCK === 0 && microseconds() >= deadline) return false
    }
  }

  /** Asks all drivers for kicks. Returns true when one of them was faster. */
  #rearm(): boolean {
    let more = false
    for (const queue of this.#queues) if (queue.served && queue.rearm()) more = true
    // It wrote to the rings.
    for (let i = 0; i < this.#logging.length; i++) this.#logging[i]!.tellMarks()
    return more
  }

  /**
   * What is due when a round has published all: calls by messages (one per ring, however often it published), and the
   * logs' eventfds.
   */
  #tell(): void {
    const calls = this.#calls
    if (calls.length > 0) {
      for (const call of calls)
        if (call.takeCall()) this.#report({ kind: 'call', session: call.session, index: call.queueIndex })
      calls.length = 0
    }
    for (let i = 0; i < this.#logging.length; i++) this.#logging[i]!.tellMarks()
  }

  #settle(): void {
    const waiters = this.#waiters
    this.#waiters = []
    for (const waiter of waiters) {
      if (waiter.ready()) this.#done(waiter.id, waiter.finish())
      else this.#waiters.push(waiter)
    }
  }

  async #obey(id: number, request: Request): Promise<void> {
    switch (request.kind) {
      case 'startQueue':
        await this.#startQueue(request)
        return this.#done(id, 0)
      case 'stopQueue': {
        const queue = this.#queue(request.queue)
        queue.stop(request.keep)
        return this.#when(
          id,
          () => queue.atRest,
          () => this.#removeQueue(queue)
        )
      }
      case 'enableQueue':
        this.#queue(request.queue).setEnabled(request.enabled)
        this.#recountKickless()
        return this.#done(id, 0)
      case 'setCall': {
        const { notifications } = this.#queue(request.queue)
        notifications.holdCalls()
        return this.#when(
          id,
          () => !notifications.calling,
          () => {
            notifications.setCall(request.callFd)
            return 0
          }
        )
      }
      case 'setKick':
        this.#queue(request.queue).notifications.setKick(request.kickFd)
        this.#recountKickless()
        return this.#done(id, 0)
      case 'pause': {
        const queues = this.#queuesOf(request.session)
        for (const queue of queues) queue.pause()
        return this.#when(
          id,
          () => queues.every((queue) => queue.drained),
          () => 0
        )
      }
      case 'resume':
        for (const queue of this.#queuesOf(request.session)) queue.resume()
        return this.#done(id, 0)
      case 'setMemory':
        this.#session(request.session).setMemory(request.regions, request.translated)
        for (const queue of this.#queuesOf(request.session)) queue.setMemory()
        return this.#done(id, 0)
      case 'iotlbUpdate':
        this.#session(request.session).update(request.regions)
        for (const queue of this.#queuesOf(request.session)) queue.memoryChanged()
        return this.#done(id, 0)
      case 'iotlbInvalidate': {
        const { session, address, size } = request
        this.#session(session).invalidate(address, size)
        const queues = this.#queuesOf(session)
        for (const queue of queues) queue.invalidated(address, size)
        return this.#when(
          id,
          () => !queues.some((queue) => queue.uses(address, size)),
          () => 0
        )
      }
      case 'setLog': {
        const session = this.#session(request.session)
        session.holdLog()
        return this.#when(
          id,
          () => !session.signalling,
          () => this.#setLog(session, request.log, request.fd)
        )
      }
      case 'setRingLog':
        this.#queue(request.queue).setLogAddress(request.address)
        return this.#done(id, 0)
      case 'kick':
        // That is all: there is a round after messages.
        this.#queue(request.queue).kick()
        return this.#done(id, 0)
      case 'endSession': {
        // Node runs the finalizers of the addon's functions (`createCopier`) in the event loop, where this thread is
        // never else.
        await new Promise((resolve) => setImmediate(resolve))
        const session = this.#sessions.get(request.session)
        if (session === undefined) return this.#done(id, 0)
        session.holdLog()
        return this.#when(
          id,
          () => !session.signalling,
          () => {
            this.#sessions.delete(request.session)
            return this.#setLog(session, undefined, -1)
          }
        )
      }
      case 'message':
        this.#queue(request.queue).message(request.message)
        return this.#done(id, 0)
      case 'load':
        await this.#load(request.module)
        return this.#done(id, 0)
      case 'ping':
        return this.#done(id, 0)
      case 'stop':
        this.#stopped = true
        return this.#done(id, 0)
      case 'abandon':
        this.#stopped = true
        return
    }
  }

  async #load(url: string): Promise<CreateQueueHandler> {
    const loaded = this.#modules.get(url)
    if (loaded !== undefined) return loaded
    const { createQueueHandler } = (await import(url)) as { createQueueHandler?: CreateQueueHandler }
    if (typeof createQueueHandler !== 'function')
      throw new TypeError(`${url} does not export the function createQueueHandler`)
    this.#modules.set(url, createQueueHandler)
    return createQueueHandler
  }

  async #startQueue(start: StartQueue): Promise<void> {
    const create = await this.#load(start.module)
    this.#generation = (this.#generation + 1) & 0xfff
    const queue = new Queue(this, start, this.#session(start.session), this.#generation)
    queue.begin(create(queue, start.data))
    if (start.paused) queue.pause()
    this.#byId[start.queue] = queue
    this.#queues.push(queue)
    this.#recountKickless()
  }

  #removeQueue(queue: Queue): number {
    queue.close()
    this.#byId[queue.id] = undefined
    this.#queues.splice(this.#queues.indexOf(queue), 1)
    this.#recountKickless()
    return queue.vring.base
  }

  #setLog(session: SessionState, log: LogArea | undefined, fd: number): number {
    session.setLog(log, fd)
    this.#logging = [...this.#sessions.values()].filter((candidate) => candidate.log !== undefined)
    for (const queue of this.#queuesOf(session.session)) queue.logChanged()
    return 0
  }

  #session(id: number): SessionState {
    let session = this.#sessions.get(id)
    if (session === undefined) {
      session = new SessionState(id, this.ring, this.oneAddress)
      this.#sessions.set(id, session)
    }
    return session
  }

  #queuesOf(session: number | 'all'): Queue[] {
    return this.#queues.filter((queue) => session === 'all' || queue.session === session)
  }

  #queue(id: number): Queue {
    const queue = this.#byId[id]
    if (queue === undefined) throw new Error(`no ring ${id} on this iothread`)
    return queue
  }

  #recountKickless(): void {
    this.#kickless = this.#queues.some((queue) => queue.notifications.kickless && queue.enabled)
  }

  #listen(): void {
    this.ring.pollAdd(this.#wakeFd, 0, OP_WAKE)
  }

  #when(id: number, ready: () => boolean, finish: () => number): void {
    this.#waiters.push({ id, ready, finish })
  }

  #done(id: number, value: number): void {
    this.#report({ kind: 'done', id, value })
  }

  #report(report: Report): void {
    this.#port.postMessage(report)
  }
}

/** An error that a message can carry: whatever a device threw, and whatever hangs on it. */
function portable(error: unknown): Error {
  if (!(error instanceof Error)) return new Error(`not an Error was thrown: ${inspect(error)}`)
  const { name, message, stack } = error
  const { code, errno, syscall } = error as NodeJS.ErrnoException
  const plain = new Error(String(message))
  return Object.assign(plain, {
    name: String(name),
    stack: String(stack),
    ...(typeof code === 'string' && { code }),
    ...(typeof errno === 'number' && { errno }),
    ...(typeof syscall === 'string' && { syscall }),
  })
}

function microseconds(): number {
  return clock.now() * 1000
}

/** io_uring if the kernel and the container allow it, else its emulation, and why. */
function openRing(emulate: boolean): { ring: IoRing; reason?: string } {
  if (emulate) return { ring: new IoRing(true), reason: 'it was asked for' }
  try {
    return { ring: new IoRing(false) }
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException
    if (code !== 'ENOSYS' && code !== 'EPERM' && code !== 'EACCES' && code !== 'ENOMEM' && code !== 'EINVAL')
      throw error
    return { ring: new IoRing(true), reason: `io_uring_setup: ${code}` }
  }
}

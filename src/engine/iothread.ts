/**
 * One iothread: rounds of work for any number of queues of any number of sessions (reap completions, publish, pop), and
 * obedience to the control thread between them. How it waits when there is nothing to do is in kernel-wait.ts and
 * event-loop-wait.ts. It must not know devices or sockets.
 */
import { type MessagePort, receiveMessageOnPort } from 'node:worker_threads'
import type { Chain, CreateQueueHandler } from '../device/index.ts'
import { native, systemError } from '../native.ts'
import type { RingError } from '../virtio/errors.ts'
import { AtWork } from './at-work.ts'
import { IothreadCounters } from './counters.ts'
import { EventLoopWait } from './event-loop-wait.ts'
import { serveFromKernel } from './kernel-wait.ts'
import type { Envelope, IothreadOptions, LogArea, RefusedRequest, Report, Request, StartQueue } from './messages.ts'
import { AdaptivePoll } from './poll.ts'
import { portable } from './portable.ts'
import { Queue, type QueueOwner } from './queue.ts'
import type { QueueNotifications } from './queue-notifications.ts'
import { type CompletionSink, IORING_CQE_F_MORE, IoRing } from './ring.ts'
import { microseconds, type Rounds } from './rounds.ts'
import { SessionState } from './session-state.ts'
import { OP_CANCEL_LOG, OP_LOG, OP_WAKE } from './tags.ts'

/** What `import` of a queue module, or of a device in one file, may have. */
interface QueueModule {
  readonly createQueueHandler?: CreateQueueHandler
  readonly default?: { readonly createQueueHandler?: CreateQueueHandler }
}

/** An answer that is due when something came to rest. */
interface Waiter {
  readonly id: number
  ready(): boolean
  finish(): number
}

/** Who lives on an iothread beside its queues: the control half of a device whose thread this is. */
export interface IothreadGuest {
  /**
   * A request of its own from the control thread ({@link IothreadHandle.call}). The answer is what it returns or what
   * the promise resolves to, structured-cloneable; what it throws or rejects with becomes the failure. Queues are
   * served while a promise is pending.
   */
  call(call: unknown): unknown
}

export class Iothread implements CompletionSink, QueueOwner, Rounds {
  readonly ring: IoRing
  readonly oneAddress: number
  readonly poll: AdaptivePoll
  readonly counters: IothreadCounters
  readonly atWork: AtWork | undefined
  now = 0
  serving = true
  controlPending = true
  kickless = false
  /** SAFETY: keeps the memory at `oneAddress`: without a reference the garbage collector unmaps it. */
  readonly #one: BigUint64Array
  readonly #port: MessagePort
  readonly #wakeFd: number
  readonly #eventLoop: boolean
  readonly #guest: IothreadGuest | undefined
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
  #generation = 0
  /** Calls of the guest that are not yet answered. */
  #guestCalls = 0
  /** There once it was needed: it has a helper thread. */
  #loop: EventLoopWait | undefined
  #stopped = false

  /** @param guest makes the guest, before the control thread hears that the iothread is ready */
  constructor(port: MessagePort, options: IothreadOptions, guest?: (thread: Iothread) => IothreadGuest) {
    this.#port = port
    this.#wakeFd = options.wakeFd
    this.#eventLoop = options.eventLoop
    this.poll = new AdaptivePoll(options.pollMaxUs)
    this.counters = new IothreadCounters(options.counters)
    this.atWork = options.atWork && new AtWork(options.atWork)
    native.setThreadName(`iothread${options.index}`)
    if (options.cpus !== undefined) {
      const result = native.setAffinity(Int32Array.from(options.cpus))
      if (result < 0) throw systemError(result, 'sched_setaffinity', `cannot run on CPUs ${options.cpus.join(',')}`)
    }
    const { ring, reason } = openRing(options.emulate, options.eventLoop)
    this.ring = ring
    const one = native.allocate(8)
    if (typeof one === 'number') throw systemError(one, 'mmap', 'cannot allocate memory')
    this.#one = new BigUint64Array(one.buffer)
    this.#one[0] = 1n
    this.oneAddress = one.address
    this.#listen()
    this.#guest = guest?.(this)
    this.#report({ kind: 'ready', emulated: ring.emulated, ...(reason === undefined ? {} : { reason }) })
  }

  /** Serves until the control thread says stop. */
  async run(): Promise<void> {
    while (!this.#stopped) {
      // In the kernel no promise of the guest's would go on.
      if (this.#eventLoop || this.#guestCalls > 0) await this.#waitInLoop()
      else serveFromKernel(this)
      this.controlPending = false
      native.eventfdRead(this.#wakeFd)
      for (;;) {
        const message = receiveMessageOnPort(this.#port) as { message: Envelope } | undefined
        if (message === undefined) break
        const { id, request } = message.message
        try {
          await this.#obey(id, request)
        } catch (error) {
          this.#failed(id, error)
        }
      }
    }
    this.#loop?.close()
    this.ring.close()
    this.#port.close()
  }

  /**
   * Tells the control thread something of the guest's (`OwnThreadEvents.message`). @param message structured-cloneable
   */
  say(message: unknown): void {
    this.#report({ kind: 'guest', message })
  }

  stir(): void {
    this.now = microseconds()
    this.#loop?.stir()
  }

  completion(low: number, high: number, result: number, flags: number): void {
    if (high === OP_WAKE) {
      this.controlPending = true
      if ((flags & IORING_CQE_F_MORE) === 0) this.#listen()
      return
    }
    if (high === OP_LOG || high === OP_CANCEL_LOG) return this.#sessions.get(low)?.completion(high, result)
    this.#byId[low >>> 16]?.completion(low, high, result, flags)
  }

  ringBroke(queue: Queue, { code, message }: RingError, request?: RefusedRequest): void {
    const { session, queueIndex: index } = queue
    this.#report({ kind: 'ringBroken', session, index, code, message, ...(request && { request }) })
  }

  ringMissed(queue: Queue): void {
    const { missAddress: address, missAccess: access } = queue.vring
    this.#report({ kind: 'iotlbMiss', session: queue.session, index: queue.queueIndex, address, access })
  }

  callDue(notifications: QueueNotifications): void {
    this.#calls.push(notifications)
  }

  deviceFailed(queue: Queue, error: unknown, chain: Chain | undefined): void {
    this.#report({
      kind: 'deviceFailed',
      session: queue.session,
      index: queue.queueIndex,
      error: portable(error),
      ...(chain !== undefined && { chain: chain.head }),
    })
  }

  reported(queue: Queue, message: unknown): void {
    this.#report({ kind: 'reported', session: queue.session, index: queue.queueIndex, message })
  }

  round(): number {
    const queues = this.#queues
    this.now = microseconds()
    let work = this.ring.reap(this)
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
    return work
  }

  hasWork(): boolean {
    const queues = this.#queues
    for (let i = 0; i < queues.length; i++) {
      const queue = queues[i]!
      if (queue.hasWork()) return true
    }
    return this.ring.hasCompletions()
  }

  rearm(): boolean {
    let more = false
    for (const queue of this.#queues) if (queue.served && queue.rearm()) more = true
    // It wrote to the rings.
    for (let i = 0; i < this.#logging.length; i++) this.#logging[i]!.tellMarks()
    return more
  }

  /** Rounds in the event loop until a control message is waiting, or the guest needs them no more. */
  async #waitInLoop(): Promise<void> {
    this.#loop ??= new EventLoopWait(this)
    this.serving = false
    await this.#loop.serve(() => this.controlPending || (!this.#eventLoop && this.#guestCalls === 0))
    this.serving = !this.#eventLoop
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

  #callGuest(id: number, call: unknown): void {
    if (this.#guest === undefined) throw new Error('nobody lives on this iothread')
    const answer = this.#guest.call(call)
    if (answer instanceof Promise) void this.#answerLater(id, answer)
    else this.#done(id, answer)
  }

  async #answerLater(id: number, answer: Promise<unknown>): Promise<void> {
    this.#guestCalls++
    try {
      this.#done(id, await answer)
    } catch (error) {
      this.#failed(id, error)
    }
    this.#guestCalls--
    // The event loop may not be needed any more.
    this.#loop?.stir()
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
      case 'guest':
        return this.#callGuest(id, request.call)
      case 'ping': {
        const now = microseconds()
        for (const queue of this.#queues) queue.lookForOverdue(now)
        return this.#done(id, 0)
      }
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
    const module = (await import(url)) as QueueModule
    // A device in one file: its definition is the default export.
    const create = module.createQueueHandler ?? module.default?.createQueueHandler
    if (typeof create !== 'function') throw new TypeError(`${url} does not export the function createQueueHandler`)
    this.#modules.set(url, create)
    return create
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
    this.kickless = this.#queues.some((queue) => queue.notifications.kickless && queue.enabled)
  }

  #listen(): void {
    this.ring.pollAdd(this.#wakeFd, 0, OP_WAKE)
  }

  #when(id: number, ready: () => boolean, finish: () => number): void {
    this.#waiters.push({ id, ready, finish })
  }

  #done(id: number, value: unknown): void {
    this.#report({ kind: 'done', id, value })
  }

  #failed(id: number, error: unknown): void {
    this.#report({ kind: 'failed', id, error: portable(error) })
  }

  #report(report: Report): void {
    this.#port.postMessage(report)
  }
}

/** io_uring if the kernel and the container allow it, else its emulation, and why. */
function openRing(emulate: boolean, pollable: boolean): { ring: IoRing; reason?: string } {
  if (emulate) return { ring: new IoRing(true), reason: 'it was asked for' }
  try {
    return { ring: new IoRing(false, pollable) }
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException
    if (code !== 'ENOSYS' && code !== 'EPERM' && code !== 'EACCES' && code !== 'ENOMEM' && code !== 'EINVAL')
      throw error
    return { ring: new IoRing(true), reason: `io_uring_setup: ${code}` }
  }
}

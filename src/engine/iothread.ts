/**
 * The loop of one iothread: reap completions, publish, pop, submit, and sleep or poll when there is nothing to do. It
 * serves any number of queues of any number of sessions, and obeys the control thread between rounds. It must not
 * know devices or sockets.
 */
import { inspect } from 'node:util'
import { type MessagePort, receiveMessageOnPort } from 'node:worker_threads'
import type { CreateQueueHandler } from '../device/index.ts'
import { native, systemError } from '../native.ts'
import { GuestMemory } from '../virtio/memory.ts'
import { IothreadCounters } from './counters.ts'
import type { Envelope, IothreadOptions, Report, Request, StartQueue } from './messages.ts'
import { AdaptivePoll } from './poll.ts'
import { OP_WAKE, Queue, type QueueOwner } from './queue.ts'
import { type CompletionSink, IORING_CQE_F_MORE, IoRing } from './ring.ts'

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
  readonly #memory = new Map<number, GuestMemory>()
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
          this.#report({ kind: 'failed', id, error: portable(error) })
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
    this.#byId[low >>> 16]?.completion(low, high, result, flags)
  }

  ringBroke(queue: Queue): void {
    const { code, message } = queue.vring.error!
    this.#report({ kind: 'ringBroken', session: queue.session, index: queue.queueIndex, code, message })
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
      if (this.#waiters.length > 0) this.#settle()
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
    return more
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
        queue.stop()
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
        const queue = this.#queue(request.queue)
        queue.holdCalls()
        return this.#when(
          id,
          () => !queue.calling,
          () => {
            queue.setCall(request.callFd)
            return 0
          }
        )
      }
      case 'setKick':
        this.#queue(request.queue).setKick(request.kickFd)
        this.#recountKickless()
        return this.#done(id, 0)
      case 'pause': {
        const queues = this.#queues.filter((queue) => queue.session === request.session)
        for (const queue of queues) queue.pause()
        return this.#when(
          id,
          () => queues.every((queue) => queue.drained),
          () => 0
        )
      }
      case 'resume':
        for (const queue of this.#queues) if (queue.session === request.session) queue.resume()
        return this.#done(id, 0)
      case 'setMemory': {
        const memory = new GuestMemory(request.regions)
        this.#memory.set(request.session, memory)
        for (const queue of this.#queues) if (queue.session === request.session) queue.setMemory(memory)
        return this.#done(id, 0)
      }
      case 'endSession':
        this.#memory.delete(request.session)
        // Node runs the finalizers of the addon's functions (`createCopier`) in the event loop, where this thread is never else.
        await new Promise((resolve) => setImmediate(resolve))
        return this.#done(id, 0)
      case 'message':
        this.#queue(request.queue).message(request.message)
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

  async #startQueue(start: StartQueue): Promise<void> {
    let create = this.#modules.get(start.module)
    if (create === undefined) {
      const module = (await import(start.module)) as { createQueueHandler?: CreateQueueHandler }
      create = module.createQueueHandler
      if (typeof create !== 'function')
        throw new TypeError(`${start.module} does not export the function createQueueHandler`)
      this.#modules.set(start.module, create)
    }
    const memory = this.#memory.get(start.session) ?? new GuestMemory([])
    this.#generation = (this.#generation + 1) & 0xfff
    const queue = new Queue(this, start, memory, this.#generation)
    if (queue.vring.error !== undefined) throw queue.vring.error
    queue.begin(create(queue, start.data))
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

  #queue(id: number): Queue {
    const queue = this.#byId[id]
    if (queue === undefined) throw new Error(`no ring ${id} on this iothread`)
    return queue
  }

  #recountKickless(): void {
    this.#kickless = this.#queues.some((queue) => queue.kickless && queue.enabled)
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

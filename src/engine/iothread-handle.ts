/** One iothread as the control thread sees it: started, asked, listened to, ended. */
import { MessageChannel, type MessagePort, receiveMessageOnPort, Worker } from 'node:worker_threads'
import type { EventEmitter } from 'eventemitter3'
import { DeviceError } from '../device/errors.ts'
import { native, systemError } from '../native.ts'
import type { IothreadSnapshot } from '../ops/snapshot.ts'
import { AtWork, type Work } from './at-work.ts'
import { IothreadCounters } from './counters.ts'
import type { Envelope, IothreadOptions, Report, Request } from './messages.ts'
import { moduleUrl } from './module-url.ts'
import type { PoolEvents } from './pool.ts'
import { revived } from './portable.ts'

/** Ring ids are 12 bits of user_data. */
const MAX_RINGS = 4096

/** Why a thread ended that was not asked to. */
export interface Killed {
  /** What its code threw, or that it called process.exit. */
  readonly error: unknown
}

export interface HandleOptions {
  readonly index: number
  readonly pollMaxUs: number
  readonly emulate: boolean
  readonly cpus?: readonly number[]
  /** The module of its worker. */
  readonly entry: URL
  /** Of a thread of a device's own: `workerData.guest`, and who hears what it says. */
  readonly own?: { readonly data: unknown; message(message: unknown): void }
  /** Hear what is reported of queues. */
  readonly events: EventEmitter<PoolEvents>
  /** The thread has ended: by what killed it, or undefined when it was asked to. All requests have been rejected. */
  ended(killed: Killed | undefined): void
}

export class IothreadHandle {
  readonly index: number
  emulated = false
  /** Why it is emulated. */
  reason: string | undefined
  readonly #options: HandleOptions
  readonly #worker: Worker
  readonly #port: MessagePort
  readonly #wakeFd: number
  readonly #counters = new IothreadCounters()
  readonly #atWork: AtWork | undefined
  readonly #pending = new Map<number, { resolve(value: unknown): void; reject(error: unknown): void }>()
  readonly #freeRings: number[] = []
  readonly #ready = Promise.withResolvers<void>()
  readonly #exited = Promise.withResolvers<void>()
  #nextRing = 0
  #nextId = 1
  /** It was asked to end. */
  #asked = false
  /** What its worker threw. */
  #thrown: Killed | undefined
  /** It has ended; why requests are in vain. */
  #end: Killed | undefined

  constructor(options: HandleOptions) {
    const { index, pollMaxUs, emulate, cpus, entry, own } = options
    this.index = index
    this.#options = options
    this.#wakeFd = native.eventfd(0)
    if (this.#wakeFd < 0) throw systemError(this.#wakeFd, 'eventfd', 'cannot start an iothread')
    const { port1, port2 } = new MessageChannel()
    this.#port = port1
    if (own !== undefined) this.#atWork = new AtWork()
    const iothread: IothreadOptions = {
      index,
      pollMaxUs,
      ...(cpus === undefined ? {} : { cpus }),
      emulate,
      eventLoop: false,
      wakeFd: this.#wakeFd,
      counters: this.#counters.buffer,
      ...(this.#atWork && { atWork: this.#atWork.buffer }),
    }
    this.#worker = new Worker(moduleUrl(entry), {
      workerData: { port: port2, options: iothread, ...(own && { guest: own.data }) },
      transferList: [port2],
    })
    this.#ready.promise.catch(() => {})
    this.#port.on('message', (report: Report) => this.#hear(report))
    this.#worker.on('error', (error) => {
      this.#thrown ??= { error }
    })
    this.#worker.on('exit', (code) => this.#ended(code))
  }

  /** Resolves when it runs. @throws what kept it from starting */
  ready(): Promise<void> {
    return this.#ready.promise
  }

  /** What a thread of a device's own is at work on: can be asked when it doesn't answer. */
  get work(): Work {
    return this.#atWork?.work ?? { queue: -1, chain: -1 }
  }

  /** Asks the iothread; resolves to its answer. @throws what ended the iothread, when it has ended */
  request(request: Request): Promise<number> {
    return this.#ask(request) as Promise<number>
  }

  /**
   * Asks who lives on it ({@link IothreadGuest.call}).
   * @param call structured-cloneable
   * @throws what that threw, what ended the iothread, or a DataCloneError
   */
  call(call: unknown): Promise<unknown> {
    return this.#ask({ kind: 'guest', call })
  }

  /** An id for a ring on this iothread. */
  takeRing(): number {
    const ring = this.#freeRings.pop() ?? this.#nextRing++
    if (ring >= MAX_RINGS) throw new Error(`iothread ${this.index} serves ${MAX_RINGS} rings already`)
    return ring
  }

  freeRing(ring: number): void {
    this.#freeRings.push(ring)
  }

  snapshot(): IothreadSnapshot {
    return this.#counters.snapshot(this.index, this.emulated)
  }

  /**
   * Ends it when it has obeyed what it was asked before. @param limitMs for a thread of a device's own: it is
   * terminated when it has not stopped by then
   */
  async close(limitMs?: number): Promise<void> {
    this.#asked = true
    const late = Promise.withResolvers<void>()
    const timer = limitMs === undefined ? undefined : setTimeout(() => late.resolve(), limitMs)
    const stopped = this.request({ kind: 'stop' }).catch(() => {})
    await Promise.race([stopped, this.#exited.promise, late.promise])
    clearTimeout(timer)
    // What a device leaves behind, a timer or a socket, would keep its thread alive.
    if (this.#options.own !== undefined) await this.terminate()
    await this.#exited.promise
  }

  /**
   * Ends it now, whatever its JavaScript does; requests are rejected. It can't be done while the thread is in a system
   * call of its device's own that does not return.
   */
  async terminate(): Promise<void> {
    this.#asked = true
    if (this.#end !== undefined) return
    void this.#worker.terminate()
    // It may sleep in io_uring_enter.
    native.eventfdWrite(this.#wakeFd, 1)
    await this.#exited.promise
  }

  /**
   * Ends it at once, whatever is in flight. Without this the process could not exit: Node joins its workers, and one
   * that sleeps in the kernel doesn't hear it.
   */
  async abandon(): Promise<void> {
    if (this.#options.own !== undefined) return this.terminate()
    this.#asked = true
    this.request({ kind: 'abandon' }).catch(() => {})
    await this.#exited.promise
  }

  #ask(request: Request): Promise<unknown> {
    if (this.#end !== undefined) return Promise.reject(this.#end.error)
    const id = this.#nextId++
    return new Promise((resolve, reject) => {
      this.#port.postMessage({ id, request } satisfies Envelope)
      this.#pending.set(id, { resolve, reject })
      // It may sleep in io_uring_enter, where only an fd reaches it.
      native.eventfdWrite(this.#wakeFd, 1)
    })
  }

  #hear(report: Report): void {
    const { events, own } = this.#options
    switch (report.kind) {
      case 'ready':
        this.emulated = report.emulated
        this.reason = report.reason
        return this.#ready.resolve()
      case 'done':
        return this.#answer(report.id)?.resolve(report.value)
      case 'failed':
        return this.#answer(report.id)?.reject(revived(report.error))
      case 'guest':
        return own?.message(report.message)
      case 'ringBroken':
        return void events.emit('ringBroken', report)
      case 'deviceFailed':
        return void events.emit('deviceFailed', { ...report, error: revived(report.error) })
      case 'reported':
        return void events.emit('reported', report)
      case 'call':
        return void events.emit('call', report)
      case 'iotlbMiss':
        return void events.emit('iotlbMiss', report)
    }
  }

  #answer(id: number) {
    const pending = this.#pending.get(id)
    this.#pending.delete(id)
    return pending
  }

  /**
   * Only now: at its 'error' the thread still runs, and the kernel may still use memory that a session gives away when
   * it hears of the end.
   */
  #ended(code: number): void {
    // What it said last.
    for (;;) {
      const last = receiveMessageOnPort(this.#port) as { message: Report } | undefined
      if (last === undefined) break
      this.#hear(last.message)
    }
    const killed = this.#thrown ?? (this.#asked ? undefined : { error: this.#exitError(code) })
    this.#end = killed ?? { error: new Error(`iothread ${this.index} was ended`) }
    const { error } = this.#end
    this.#ready.reject(error)
    for (const { reject } of this.#pending.values()) reject(error)
    this.#pending.clear()
    this.#port.close()
    native.close(this.#wakeFd)
    this.#options.ended(killed)
    this.#exited.resolve()
  }

  #exitError(code: number): Error {
    if (this.#options.own === undefined) return new Error(`iothread ${this.index} ended with ${code}`)
    return new DeviceError('ERR_DEVICE_EXIT', `the module ended its thread: process.exit(${code})`)
  }
}

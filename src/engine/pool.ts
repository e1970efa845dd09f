/** The iothreads as the control thread sees them: started, asked, reported on, stopped. */
import { existsSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { MessageChannel, type MessagePort, Worker } from 'node:worker_threads'
import { EventEmitter } from 'eventemitter3'
import { native, systemError } from '../native.ts'
import type { IothreadSnapshot } from '../ops/snapshot.ts'
import { RingError } from '../virtio/errors.ts'
import { IothreadCounters } from './counters.ts'
import type { Envelope, IothreadOptions, Report, Request } from './messages.ts'

export interface PoolOptions {
  /** How many iothreads. */
  readonly count: number
  /** The CPUs of each. */
  readonly cpus?: readonly (readonly number[])[]
  /** Longest polling before a sleep, in microseconds. */
  readonly pollMaxUs: number
  /** Use plain system calls instead of io_uring. */
  readonly emulate: boolean
}

/** What iothreads say by themselves; see messages.ts. */
export interface PoolEvents {
  ringBroken: [Extract<Report, { kind: 'ringBroken' }>]
  deviceFailed: [Extract<Report, { kind: 'deviceFailed' }>]
  reported: [Extract<Report, { kind: 'reported' }>]
  call: [Extract<Report, { kind: 'call' }>]
  iotlbMiss: [Extract<Report, { kind: 'iotlbMiss' }>]
  /** An iothread ended with an error: its queues are served by nobody. */
  death: [unknown]
}

/** Ring ids are 12 bits of user_data. */
const MAX_RINGS = 4096

export class IothreadHandle {
  readonly index: number
  emulated = false
  /** Why it is emulated. */
  reason: string | undefined
  readonly #worker: Worker
  readonly #port: MessagePort
  readonly #wakeFd: number
  readonly #counters = new IothreadCounters()
  readonly #pending = new Map<number, { resolve(value: number): void; reject(error: unknown): void }>()
  readonly #freeRings: number[] = []
  readonly #exited: Promise<void>
  #nextRing = 0
  #nextId = 1
  #ready: Promise<void>
  /** What ended it. */
  #death: { error: unknown } | undefined

  constructor(index: number, options: PoolOptions, events: EventEmitter<PoolEvents>) {
    this.index = index
    this.#wakeFd = native.eventfd(0)
    if (this.#wakeFd < 0) throw systemError(this.#wakeFd, 'eventfd', 'cannot start an iothread')
    const { port1, port2 } = new MessageChannel()
    this.#port = port1
    const cpus = options.cpus?.[index]
    const iothread: IothreadOptions = {
      index,
      pollMaxUs: options.pollMaxUs,
      ...(cpus === undefined ? {} : { cpus }),
      emulate: options.emulate,
      eventLoop: false,
      wakeFd: this.#wakeFd,
      counters: this.#counters.buffer,
    }
    this.#worker = new Worker(moduleUrl(new URL('./iothread-main.ts', import.meta.url)), {
      workerData: { port: port2, options: iothread },
      transferList: [port2],
    })
    const ready = Promise.withResolvers<void>()
    this.#ready = ready.promise
    this.#ready.catch(() => {})
    this.#port.on('message', (report: Report) => {
      switch (report.kind) {
        case 'ready':
          this.emulated = report.emulated
          this.reason = report.reason
          return ready.resolve()
        case 'done':
          return this.#answer(report.id)?.resolve(report.value as number)
        case 'failed':
          return this.#answer(report.id)?.reject(
            report.ring === undefined ? report.error : new RingError(report.ring, (report.error as Error).message)
          )
        case 'ringBroken':
          return void events.emit('ringBroken', report)
        case 'deviceFailed':
          return void events.emit('deviceFailed', report)
        case 'reported':
          return void events.emit('reported', report)
        case 'call':
          return void events.emit('call', report)
        case 'iotlbMiss':
          return void events.emit('iotlbMiss', report)
      }
    })
    const die = (error: unknown) => {
      if (this.#death !== undefined) return
      this.#death = { error }
      ready.reject(error)
      for (const { reject } of this.#pending.values()) reject(error)
      this.#pending.clear()
      events.emit('death', error)
    }
    this.#worker.on('error', die)
    this.#exited = new Promise((resolve) => {
      this.#worker.on('exit', (code) => {
        if (code !== 0) die(new Error(`iothread ${index} ended with ${code}`))
        resolve()
      })
    })
  }

  /** Resolves when it runs. @throws what kept it from starting */
  ready(): Promise<void> {
    return this.#ready
  }

  /** Asks the iothread; resolves to its answer. @throws what ended the iothread, when it has ended */
  request(request: Request): Promise<number> {
    if (this.#death !== undefined) return Promise.reject(this.#death.error)
    const id = this.#nextId++
    return new Promise((resolve, reject) => {
      this.#pending.set(id, { resolve, reject })
      this.#port.postMessage({ id, request } satisfies Envelope)
      // It may sleep in io_uring_enter, where only an fd reaches it.
      native.eventfdWrite(this.#wakeFd, 1)
    })
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

  async close(): Promise<void> {
    // An iothread that died has nobody to answer.
    await Promise.race([this.request({ kind: 'stop' }).catch(() => {}), this.#exited])
    await this.#exited
    this.#port.close()
    native.close(this.#wakeFd)
  }

  /**
   * Ends it at once, whatever is in flight. Without this the process could not exit: Node joins its workers, and one
   * that sleeps in the kernel doesn't hear it.
   */
  async abandon(): Promise<void> {
    this.request({ kind: 'abandon' }).catch(() => {})
    await this.#exited
  }

  #answer(id: number) {
    const pending = this.#pending.get(id)
    this.#pending.delete(id)
    return pending
  }
}

export class IothreadPool extends EventEmitter<PoolEvents> {
  readonly threads: readonly IothreadHandle[]
  readonly #groups = new Map<string, IothreadHandle>()
  #next = 0

  /** Starts the threads; `ready` tells when they run. */
  constructor(options: PoolOptions) {
    super()
    this.threads = Array.from({ length: options.count }, (_, index) => new IothreadHandle(index, options, this))
  }

  /** @throws what kept one of them from starting */
  async ready(): Promise<void> {
    await Promise.all(this.threads.map((thread) => thread.ready()))
  }

  /**
   * The iothread of the next queue: queues go round, so that those of one device spread, but those of one group stay
   * together.
   */
  assign(group?: string): IothreadHandle {
    const together = group === undefined ? undefined : this.#groups.get(group)
    if (together !== undefined) return together
    const thread = this.threads[this.#next % this.threads.length]!
    this.#next++
    if (group !== undefined) this.#groups.set(group, thread)
    return thread
  }

  /** The same request to all. */
  async broadcast(request: Request): Promise<void> {
    await Promise.all(this.threads.map((thread) => thread.request(request)))
  }

  async close(): Promise<void> {
    await Promise.all(this.threads.map((thread) => thread.close()))
  }

  async abandon(): Promise<void> {
    await Promise.all(this.threads.map((thread) => thread.abandon()))
  }
}

/** A module beside another one: TypeScript in a checkout, JavaScript in the built package. */
export function moduleUrl(url: URL): URL {
  if (url.pathname.endsWith('.ts') && !existsSync(fileURLToPath(url))) return new URL(url.href.replace(/\.ts$/, '.js'))
  return url
}

/** The iothreads as the control thread sees them: the ones that devices share, and those of a device's own. */
import { EventEmitter } from 'eventemitter3'
import { type HandleOptions, IothreadHandle } from './iothread-handle.ts'
import type { Report, Request } from './messages.ts'
import { type OwnThreadEvents, ThreadWatch } from './thread-watch.ts'

export type { IothreadHandle } from './iothread-handle.ts'
export type { RefusedRequest } from './messages.ts'
export { moduleUrl } from './module-url.ts'
export type { Blocked, OwnThreadEvents } from './thread-watch.ts'

export interface PoolOptions {
  /** How many iothreads devices share; 0 = all devices have threads of their own. */
  readonly count: number
  /** The CPUs of each. */
  readonly cpus?: readonly (readonly number[])[]
  /** Longest polling before a sleep, in microseconds. */
  readonly pollMaxUs: number
  /** Use plain system calls instead of io_uring. */
  readonly emulate: boolean
}

/** What iothreads say by themselves; see messages.ts. Errors are as the iothread's own, of the same class. */
export interface PoolEvents {
  ringBroken: [Extract<Report, { kind: 'ringBroken' }>]
  deviceFailed: [DeviceFailure]
  reported: [Extract<Report, { kind: 'reported' }>]
  call: [Extract<Report, { kind: 'call' }>]
  iotlbMiss: [Extract<Report, { kind: 'iotlbMiss' }>]
  /** A shared iothread ended with an error: its queues are served by nobody. */
  death: [unknown]
}

/** A device's handler failed: the session is to end. The error is of the class that was thrown. */
export type DeviceFailure = Omit<Extract<Report, { kind: 'deviceFailed' }>, 'error'> & { readonly error: Error }

/** A thread of a device's own. */
export interface OwnThread {
  /**
   * The entry of its worker. `workerData` is `{ port, options, guest }`: the first two are for the constructor of
   * {@link Iothread}, which the entry makes (`options.eventLoop` is its to decide), `guest` is `data`.
   */
  readonly entry: URL
  /** Structured-cloneable. */
  readonly data: unknown
  /** The CPUs that it may run on; unset: all. */
  readonly cpus?: readonly number[]
  readonly events: OwnThreadEvents
}

export class IothreadPool extends EventEmitter<PoolEvents> {
  /** Those that devices share. */
  readonly threads: readonly IothreadHandle[]
  /** Those of a device's own that live, by index. */
  readonly #own = new Map<number, IothreadHandle>()
  readonly #groups = new Map<string, IothreadHandle>()
  readonly #options: PoolOptions
  #next = 0

  /** Starts the threads; `ready` tells when they run. */
  constructor(options: PoolOptions) {
    super()
    this.#options = options
    this.threads = Array.from({ length: options.count }, (_, index) => {
      const cpus = options.cpus?.[index]
      const entry = new URL('./iothread-main.ts', import.meta.url)
      return new IothreadHandle({
        ...this.#basics(index),
        entry,
        ...(cpus && { cpus }),
        ended: (killed) => {
          if (killed !== undefined) this.emit('death', killed.error)
        },
      })
    })
  }

  /** All that live. */
  get all(): readonly IothreadHandle[] {
    return [...this.threads, ...this.#own.values()]
  }

  /** @throws what kept one of the shared ones from starting */
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
    const thread = this.threads[this.#next % this.threads.length]
    if (thread === undefined) throw new Error('there are no shared iothreads')
    this.#next++
    if (group !== undefined) this.#groups.set(group, thread)
    return thread
  }

  /**
   * Starts a thread of a device's own: `assign` never returns it, and its death ends nothing but what was on it. What
   * its queues report comes as the pool's events like that of others. Whoever asked for it closes it.
   */
  spawn({ entry, data, cpus, events }: OwnThread): IothreadHandle {
    let index = this.threads.length
    while (this.#own.has(index)) index++
    let watch: ThreadWatch | undefined
    const thread = new IothreadHandle({
      ...this.#basics(index),
      entry,
      ...(cpus && { cpus }),
      own: { data, message: (message) => events.message(message) },
      ended: (killed) => {
        this.#own.delete(index)
        watch?.end()
        if (killed !== undefined) events.death(killed.error)
      },
    })
    watch = new ThreadWatch(thread, events)
    this.#own.set(index, thread)
    return thread
  }

  /** The same request to all, those of devices' own included. */
  async broadcast(request: Request): Promise<void> {
    await Promise.all(this.all.map((thread) => thread.request(request)))
  }

  /** The same request to the shared ones. */
  async broadcastShared(request: Request): Promise<void> {
    await Promise.all(this.threads.map((thread) => thread.request(request)))
  }

  /** Ends all; those of devices' own at once: their device has been closed. */
  async close(): Promise<void> {
    const own = [...this.#own.values()].map((thread) => thread.terminate())
    await Promise.all([...own, ...this.threads.map((thread) => thread.close())])
  }

  async abandon(): Promise<void> {
    await Promise.all(this.all.map((thread) => thread.abandon()))
  }

  #basics(index: number): Pick<HandleOptions, 'index' | 'pollMaxUs' | 'emulate' | 'events'> {
    const { pollMaxUs, emulate } = this.#options
    return { index, pollMaxUs, emulate, events: this }
  }
}

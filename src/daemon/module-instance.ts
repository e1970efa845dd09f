/**
 * One life of a device module: its threads, from the import of its file to their end. The control thread's side of
 * module-guest.ts. It must not know what comes after: module-device.ts puts one instance in the place of another.
 */
import { ConfigError, DeviceError } from '../device/errors.ts'
import type { DeviceSample, InheritedFiles, QemuDevice } from '../device/index.ts'
import { moduleUrl } from '../engine/module-url.ts'
import type { Blocked, IothreadHandle, IothreadPool } from '../engine/pool.ts'
import { LOAD_LIMIT_MS, loadTimeout } from './module-describe.ts'
import { failureText } from './module-failure.ts'
import type { ModuleAddress } from './module-load.ts'
import type {
  Answer,
  Described,
  Mirror,
  ModuleCall,
  ModuleReport,
  ModuleThreadData,
  Opened,
  Samples,
} from './module-messages.ts'
import type { GivenOptions } from './module-options.ts'
import type { ModuleShape, OpenShape } from './module-shape.ts'
import { within } from './within.ts'

export interface InstanceOptions {
  readonly address: ModuleAddress
  readonly given: GivenOptions
  readonly pool: IothreadPool
  /** How many threads it gets when it isn't in event-loop mode. */
  readonly threads: number
  readonly cpus: readonly number[] | undefined
  readonly events: InstanceEvents
  /** Ends it while it is loaded or opened: nobody needs it any more. */
  readonly signal: AbortSignal
  /** Told of the files that it consists of when they were imported, or could not be. */
  imported?(urls: readonly string[]): void
}

export interface InstanceEvents {
  report(instance: ModuleInstance, report: DeviceReport): void
  /** A thread of it died; the others are being ended. It was open. */
  death(instance: ModuleInstance, error: unknown): void
  blocked(instance: ModuleInstance, blocked: Blocked): void
  unblocked(ms: number, newMs: number): void
}

/** What a device says itself. */
export type DeviceReport = Exclude<ModuleReport, { kind: 'imported' | 'uncaught' }>

export type Shape = ModuleShape & OpenShape

export class ModuleInstance {
  /** Those of the queues; the first has the control half. */
  readonly threads: IothreadHandle[] = []
  readonly #options: InstanceOptions
  #described: Described | undefined
  #files: readonly string[] = []
  #opened: Opened | undefined
  #mirror: Mirror | undefined
  /** What killed it. */
  #death: { readonly error: unknown } | undefined
  /** What killed it was not caught, in words. */
  #uncaught = ''
  #ending = false
  #terminated = false

  private constructor(options: InstanceOptions) {
    this.#options = options
  }

  /**
   * Starts its threads, loads the module and checks the options; the device is not yet opened.
   * @throws ConfigError naming file, line and what was expected; its threads have ended
   */
  static async load(options: InstanceOptions): Promise<ModuleInstance> {
    const instance = new ModuleInstance(options)
    try {
      await instance.#unlessAborted(() => instance.#load())
      return instance
    } catch (error) {
      await instance.terminate()
      throw error
    }
  }

  /** @throws what `open` of the module threw: a ConfigError, or a DeviceError that names file and line */
  async open(
    name: string,
    observer: boolean,
    inherited: readonly (readonly [string, InheritedFiles])[]
  ): Promise<void> {
    try {
      const call: ModuleCall = { kind: 'open', name, observer, inherited }
      const opening = this.#unlessAborted(() => this.#first.call(call))
      // Nobody is served meanwhile, so a device that waits for ever must not keep silent about it.
      this.#opened = (await within(
        opening,
        LOAD_LIMIT_MS,
        `open() has not returned after ${LOAD_LIMIT_MS / 1000} s`
      )) as Opened
      this.#mirror = this.#opened
    } catch (error) {
      if (error instanceof ConfigError) throw error
      throw this.#failure('ERR_DEVICE_OPEN', error, 'it cannot be opened')
    }
  }

  get described(): Described {
    return this.#described!
  }

  /** How long a chain may be in work, in milliseconds; 0 = for ever, and before it is open, which has a limit of its own. */
  get timeoutMs(): number {
    return this.#opened === undefined ? 0 : this.described.shape.timeoutMs
  }

  /** URLs of the files of its own that it consists of. */
  get files(): readonly string[] {
    return this.#files
  }

  /** Of the open device. */
  get shape(): Shape {
    return { ...this.described.shape, ...this.#opened!.shape }
  }

  get network(): boolean {
    return this.#opened!.network
  }

  get qemu(): QemuDevice | undefined {
    return this.#opened!.qemu
  }

  /** As the device had them at its last answer. */
  get mirror(): Mirror {
    return this.#mirror!
  }

  set mirror(mirror: Mirror) {
    this.#mirror = mirror
  }

  /** How what killed it came about, when nobody caught it: `unhandled rejection`; else empty. */
  get uncaught(): string {
    return this.#uncaught
  }

  /** It died, or is being ended. */
  get ended(): boolean {
    return this.#death !== undefined || this.#ending
  }

  /**
   * Calls a method of the open device; resolves to what it returned.
   * @throws DeviceError naming file and line for what it threw, or what ended its thread
   */
  async call(call: Exclude<ModuleCall, { kind: 'describe' | 'open' | 'abort' | 'samples' }>): Promise<unknown> {
    try {
      const { value, ...mirror } = (await this.#first.call(call)) as Answer
      this.#mirror = mirror
      return value
    } catch (error) {
      if (this.#death !== undefined) throw this.#death.error
      // By itself, a device that is being closed can fail.
      if (this.#terminated) throw error
      throw this.#failure('ERR_DEVICE_FAILED', error, call.kind)
    }
  }

  async samples(): Promise<readonly DeviceSample[]> {
    return (await this.#first.call({ kind: 'samples' } satisfies ModuleCall)) as Samples
  }

  /** Aborts `DeviceHost.signal`. */
  abort(): void {
    this.#first.call({ kind: 'abort' } satisfies ModuleCall).catch(() => {})
  }

  /** Closes the device and ends its threads, by force when that takes longer. @throws what `close` of the module threw */
  async close(limitMs: number): Promise<void> {
    this.#ending = true
    const end = performance.now() + limitMs
    try {
      this.abort()
      if (this.#opened !== undefined)
        await within(this.call({ kind: 'close' }), limitMs, `it is not closed after ${limitMs / 1000} s`)
    } finally {
      await Promise.all(this.threads.map((thread) => thread.close(Math.max(0, end - performance.now()))))
    }
  }

  /** Ends its threads at once. */
  async terminate(): Promise<void> {
    this.#ending = true
    this.#terminated = true
    await Promise.all(this.threads.map((thread) => thread.terminate()))
  }

  /** Ends it as if it had died of this. */
  async kill(error: unknown): Promise<void> {
    this.#uncaught = ''
    this.#died(error)
    await this.terminate()
  }

  /** @throws the reason of `signal` when that is aborted before `work` is through: its threads have ended, or are about to */
  async #unlessAborted<T>(work: () => Promise<T>): Promise<T> {
    const { signal } = this.#options
    const stop = (): void => void this.terminate()
    signal.throwIfAborted()
    signal.addEventListener('abort', stop, { once: true })
    try {
      return await work()
    } finally {
      signal.removeEventListener('abort', stop)
      signal.throwIfAborted()
    }
  }

  async #load(): Promise<void> {
    const { given, threads } = this.#options
    const call: ModuleCall = { kind: 'describe', given }
    this.#described = (await this.#loading(this.#spawn().call(call))) as Described
    if (this.#described.shape.eventLoop) return
    const others = Array.from({ length: threads - 1 }, () => this.#spawn())
    await this.#loading(Promise.all(others.map((thread) => thread.call(call))))
  }

  async #loading<T>(work: Promise<T>): Promise<T> {
    const { shown } = this.#options.address
    const late = Promise.withResolvers<never>()
    const timer = setTimeout(() => late.reject(loadTimeout(shown)), LOAD_LIMIT_MS)
    try {
      return await Promise.race([work, late.promise])
    } catch (error) {
      if (this.#death === undefined || error instanceof ConfigError) throw error
      throw this.#failure('ERR_DEVICE_MODULE', error, 'it failed while it was loaded')
    } finally {
      clearTimeout(timer)
    }
  }

  #spawn(): IothreadHandle {
    const { address, pool, cpus, events } = this.#options
    const data: ModuleThreadData = { address }
    const thread = pool.spawn({
      entry: moduleUrl(new URL('./module-main.ts', import.meta.url)),
      data,
      ...(cpus && { cpus }),
      events: {
        message: (message) => this.#hear(message as ModuleReport),
        death: (error) => this.#died(error),
        blocked: (blocked) => events.blocked(this, blocked),
        unblocked: (ms, newMs) => events.unblocked(ms, newMs),
      },
    })
    this.threads.push(thread)
    return thread
  }

  #hear(report: ModuleReport): void {
    if (report.kind === 'uncaught') {
      this.#uncaught = report.origin === 'unhandledRejection' ? 'unhandled rejection' : 'uncaught exception'
      return
    }
    if (report.kind !== 'imported') return this.#options.events.report(this, report)
    this.#files = report.files
    this.#options.imported?.(report.files)
  }

  #died(error: unknown): void {
    if (this.#death !== undefined || this.#ending) return
    this.#death = { error }
    void this.terminate()
    // Before that, who opens it hears of it.
    if (this.#opened !== undefined) this.#options.events.death(this, error)
  }

  get #first(): IothreadHandle {
    return this.threads[0]!
  }

  #failure(code: string, error: unknown, what: string): DeviceError {
    return new DeviceError(code, failureText(error, what, this.#options.address.shown), { cause: error })
  }
}

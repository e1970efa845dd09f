/**
 * A device on threads of its own, as the control thread has it: each method is a message (module-guest.ts), and what has to be
 * answered at once is a copy of what the device said last. When its module fails, blocks for too long or ends its
 * thread, that ends its session and nothing else, and the module starts again. It must not know sockets and rings.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { DeviceError } from '../device/errors.ts'
import type { Device, DeviceHost, DeviceSample, InheritedFiles, NetworkRequests, QemuDevice } from '../device/index.ts'
import type { Blocked, IothreadHandle, IothreadPool } from '../engine/pool.ts'
import { VIRTQ_MAX_SIZE } from '../virtio/constants.ts'
import type { KeptFiles } from './kept-files.ts'
import { failureText } from './module-failure.ts'
import { ModuleFiles } from './module-files.ts'
import { type DeviceReport, ModuleInstance } from './module-instance.ts'
import type { ModuleAddress } from './module-load.ts'
import type { GivenOptions } from './module-options.ts'
import { shapeDifference } from './module-shape.ts'
import type { RingThreads } from './rings.ts'
import { within } from './within.ts'

/** Which module, and how it was asked for. */
export interface ModuleSource {
  readonly address: ModuleAddress
  readonly given: GivenOptions
  /** Reload it when its files change. */
  readonly watch: boolean
  /** What the module said about QEMU without being opened. */
  readonly qemu?: QemuDevice
}

export interface ModuleDeviceOptions {
  readonly source: ModuleSource
  readonly pool: IothreadPool
  /** As of the other devices: for a module that isn't in event-loop mode. */
  readonly iothreads: number
  readonly iothreadCpus: readonly (readonly number[])[] | undefined
  readonly files: KeptFiles
  /** It only looks: no locks, no taps. */
  readonly observer: boolean
}

/** Who serves the device. */
export interface ModuleDeviceUser {
  /** The session is to end. @param text names file, line and cause */
  failed(text: string, error: unknown): void
  /** The device is on other threads, in the state after `open`. Resolves when the session before it has ended. */
  restarted(): Promise<void>
}

/** How long a scrape waits for a device's own metrics, in milliseconds: one that is blocked shows its last ones. */
const SAMPLES_LIMIT_MS = 200
/** How long a device has to end its sessions and to close, in milliseconds. */
const CLOSE_LIMIT_MS = 3000
/** Pauses before a module starts again, in milliseconds: each twice the one before, until it has lived for a while. */
const FIRST_PAUSE_MS = 100
const LONGEST_PAUSE_MS = 10_000
const LONG_LIFE_MS = 30_000

type Call = Parameters<ModuleInstance['call']>[0]

export class ModuleDevice implements Device, RingThreads {
  readonly own = true
  network?: NetworkRequests
  qemu?: () => QemuDevice
  readonly #options: ModuleDeviceOptions
  readonly #host: DeviceHost
  readonly #closing = new AbortController()
  readonly #files: ModuleFiles
  #instance!: ModuleInstance
  #user: ModuleDeviceUser | undefined
  #ready: Promise<void> = Promise.resolve()
  /** While `whileReplaced` runs. */
  #replacing: { death: { readonly instance: ModuleInstance; readonly error: unknown } | undefined } | undefined
  /** While it is to start again: ends the pause before that. */
  #pause: AbortController | undefined
  #stale = false
  #bornAt = 0
  #pauseMs = FIRST_PAUSE_MS
  #assigned = 0
  #samples: readonly DeviceSample[] = []
  #sampling: Promise<void> | undefined
  /** For how long its threads have not answered so far. */
  #blockedMs = 0
  #blockingMs = 0
  #stopTimer: NodeJS.Timeout | undefined

  private constructor(host: DeviceHost, options: ModuleDeviceOptions) {
    this.#host = host
    this.#options = options
    this.#files = new ModuleFiles(options.files, host.name)
  }

  /** @throws ConfigError or DeviceError naming file, line and what was expected */
  static async open(host: DeviceHost, options: ModuleDeviceOptions): Promise<ModuleDevice> {
    const device = new ModuleDevice(host, options)
    device.adopt(await device.#begin(device.#files.waiting))
    const stop = (): void => device.#stopSoon()
    if (host.signal.aborted) stop()
    else host.signal.addEventListener('abort', stop, { once: true })
    return device
  }

  /** Who is told of what happens to the device; once. */
  attach(user: ModuleDeviceUser): void {
    this.#user = user
  }

  /** Resolves when the device is there: at once, but after the death of its thread. It never rejects. */
  get ready(): Promise<void> {
    return this.#ready
  }

  /** Queues go round its threads, whatever their group. */
  assign(): IothreadHandle {
    return this.threads[this.#assigned++ % this.threads.length]!
  }

  /** Those of its queues. */
  get threads(): readonly IothreadHandle[] {
    return this.#instance.threads
  }

  /** Seconds for which its threads did not answer. */
  get blockedSeconds(): number {
    return this.#blockedMs / 1000
  }

  /** For how long one of its threads has not answered now, in milliseconds; 0 = all do, within a second. */
  get blockingMs(): number {
    return this.#blockingMs
  }

  // ---- another version of the module

  /** Its files have changed. One that is to start again does so at once. */
  changed(): void {
    this.#stale = true
    this.#pause?.abort()
  }

  /** `changed` was called since its files were last loaded. */
  get stale(): boolean {
    return this.#stale
  }

  /** Its thread has died, and another one does not yet serve. */
  get restarting(): boolean {
    return this.#pause !== undefined
  }

  get source(): ModuleSource {
    return this.#options.source
  }

  get instance(): ModuleInstance {
    return this.#instance
  }

  /**
   * The module as it is now in its file, loaded and checked on threads of its own, but not opened.
   * @param imported as InstanceOptions has it @throws ConfigError
   */
  load(imported: (urls: readonly string[]) => void = () => {}): Promise<ModuleInstance> {
    const { source, pool, iothreads, iothreadCpus } = this.#options
    const { given, address } = source
    this.#stale = false
    const cpus = iothreadCpus && [...new Set(iothreadCpus.flat())]
    return ModuleInstance.load({
      address,
      given,
      pool,
      threads: iothreads,
      cpus,
      signal: this.#closing.signal,
      imported,
      events: {
        report: (instance, report) => this.#hear(instance, report),
        death: (instance, error) => this.#died(instance, error),
        blocked: (instance, blocked) => this.#blocked(instance, blocked),
        unblocked: (ms, newMs) => this.#unblocked(ms, newMs),
      },
    })
  }

  /** Opens what `load` returned. @throws ConfigError or DeviceError: it is to be ended */
  openInstance(instance: ModuleInstance): Promise<void> {
    return instance.open(this.#host.name, this.#options.observer, [])
  }

  /** From now on this one is the device. Its threads are the ones to use. */
  adopt(instance: ModuleInstance): void {
    this.#instance = instance
    this.#bornAt = performance.now()
    this.#blockingMs = 0
    const { network, qemu } = instance
    if (network) {
      this.network = {
        setMtu: async (mtu) => (await this.#ask({ kind: 'setMtu', mtu })) === true,
        announce: (mac) => this.#post({ kind: 'announce', mac: Uint8Array.from(mac) }),
      }
    }
    if (qemu !== undefined) this.qemu = () => qemu
  }

  /** While `work` runs, which puts another instance in the place of the present one, the death of that is its affair. */
  async whileReplaced<T>(work: () => Promise<T>): Promise<T> {
    this.#replacing = { death: undefined }
    try {
      return await work()
    } finally {
      const { death } = this.#replacing
      this.#replacing = undefined
      // It was not replaced after all.
      if (death !== undefined) this.#died(death.instance, death.error)
    }
  }

  /** The present instance is lost: goes on as if its thread had died. */
  async startOver(error: unknown): Promise<void> {
    const instance = this.#instance
    await instance.terminate()
    if (this.#closing.signal.aborted) return
    if (this.#replacing === undefined) this.#died(instance, error)
    else this.#replacing.death = { instance, error }
  }

  // ---- Device

  get features(): bigint {
    return this.#instance.shape.features
  }

  get numQueues(): number {
    return this.#instance.shape.numQueues
  }

  get maxQueueSize(): number {
    return this.#instance.shape.maxQueueSize ?? VIRTQ_MAX_SIZE
  }

  get queueData(): unknown {
    return this.#instance.mirror.queueData
  }

  config(): Uint8Array {
    return this.#instance.mirror.config
  }

  async writeConfig(offset: number, bytes: Uint8Array): Promise<boolean> {
    return (await this.#ask({ kind: 'writeConfig', offset, bytes: Uint8Array.from(bytes) })) === true
  }

  negotiated(features: bigint): void {
    this.#post({ kind: 'negotiated', features })
  }

  reset(): void {
    this.#post({ kind: 'reset' })
  }

  ringActive(index: number, active: boolean): void {
    this.#post({ kind: 'ringActive', index, active })
  }

  reported(index: number, message: unknown): void {
    this.#post({ kind: 'reported', index, message })
  }

  async saveState(): Promise<Uint8Array> {
    return (await this.#instance.call({ kind: 'saveState' })) as Uint8Array
  }

  async loadState(state: Uint8Array): Promise<void> {
    await this.#instance.call({ kind: 'loadState', state: Uint8Array.from(state) })
  }

  async letGo(): Promise<void> {
    await this.#instance.call({ kind: 'letGo' })
  }

  async takeBack(): Promise<void> {
    await this.#instance.call({ kind: 'takeBack' })
  }

  async takeOver(): Promise<void> {
    await this.#instance.call({ kind: 'takeOver' })
  }

  async refresh(): Promise<boolean> {
    return (await this.#instance.call({ kind: 'refresh' })) === true
  }

  samples(): readonly DeviceSample[] {
    return this.#samples
  }

  /** Has `samples` be up to date, if the device answers soon. */
  async collect(): Promise<void> {
    // A thread that doesn't answer is not asked again.
    this.#sampling ??= this.#sample()
    await within(this.#sampling, SAMPLES_LIMIT_MS, 'late').catch(() => {})
  }

  async #sample(): Promise<void> {
    try {
      this.#samples = await this.#instance.samples()
    } finally {
      this.#sampling = undefined
    }
  }

  /** Ends its threads. All queues are stopped, or their threads are gone. */
  async close(): Promise<void> {
    this.#closing.abort(new Error('the daemon is stopping'))
    this.#files.forgetKept()
    await this.#ready
    try {
      // One that died, or that took too long, has nothing to close.
      if (!this.#instance.ended) await this.#instance.close(CLOSE_LIMIT_MS)
    } catch (error) {
      this.#host.log.error({ err: error }, `the device was not closed as it should: ${(error as Error).message}`)
    } finally {
      clearTimeout(this.#stopTimer)
    }
  }

  // ---- internals

  get #shown(): string {
    return this.#options.source.address.shown
  }

  async #begin(inherited: readonly (readonly [string, InheritedFiles])[]): Promise<ModuleInstance> {
    const instance = await this.load()
    try {
      await instance.open(this.#host.name, this.#options.observer, inherited)
      return instance
    } catch (error) {
      await instance.terminate()
      throw error
    }
  }

  /** A method that the front-end waits for, as for a chain: nothing else of its connection is read meanwhile. */
  async #ask(call: Call): Promise<unknown> {
    const instance = this.#instance
    const { timeoutMs } = instance
    const answer = instance.call(call)
    if (timeoutMs === 0) return await answer
    const late = new DeviceError('ERR_DEVICE_STUCK', `${call.kind}() has not returned after ${timeoutMs / 1000} s`)
    const timer = setTimeout(() => void instance.kill(late), timeoutMs)
    try {
      return await answer
    } finally {
      clearTimeout(timer)
    }
  }

  /** A method of which nobody waits for the end. */
  #post(call: Call): void {
    const instance = this.#instance
    instance.call(call).catch((error: unknown) => {
      if (instance === this.#instance && !instance.ended) this.#user?.failed((error as Error).message, error)
    })
  }

  #hear(instance: ModuleInstance, report: DeviceReport): void {
    switch (report.kind) {
      case 'log':
        return this.#host.log[report.level](report.details, report.message)
      case 'send':
        if (instance === this.#instance) this.#host.send(report.index, report.message)
        return
      case 'configChanged':
        instance.mirror = report
        if (instance === this.#instance) this.#host.configChanged()
        return
      default:
        return this.#files.hear(report)
    }
  }

  #died(instance: ModuleInstance, error: unknown): void {
    if (instance !== this.#instance) return
    if (this.#replacing !== undefined) {
      this.#replacing.death = { instance, error }
      return
    }
    this.#files.forgetKept()
    this.#user?.failed(failureText(error, instance.uncaught, this.#shown), error)
    if (performance.now() - this.#bornAt > LONG_LIFE_MS) this.#pauseMs = FIRST_PAUSE_MS
    this.#pause = new AbortController()
    this.#ready = this.#restart(instance)
  }

  async #restart(dead: ModuleInstance): Promise<void> {
    const { signal } = this.#closing
    await dead.terminate()
    this.#files.closeInherited()
    while (!signal.aborted) {
      await this.#pauseBefore(signal)
      if (signal.aborted) return
      try {
        const instance = await this.#begin([])
        const difference = shapeDifference(dead.shape, instance.shape)
        if (difference !== undefined) {
          await instance.close(CLOSE_LIMIT_MS)
          throw new DeviceError('ERR_DEVICE_SHAPE', `${this.#shown}: it is another device than it was: ${difference}`)
        }
        this.adopt(instance)
        await this.#user?.restarted()
        this.#pause = undefined
        this.#host.log.info({}, `${this.#shown} was started again`)
        return
      } catch (error) {
        if (!signal.aborted)
          this.#host.log.error({ err: error }, `it was not started again: ${(error as Error).message}`)
      }
    }
  }

  /** The pause before it starts again, which a change of its files ends: that may be the correction. */
  async #pauseBefore(closing: AbortSignal): Promise<void> {
    if (!this.#stale) {
      const pauseMs = this.#pauseMs
      this.#pauseMs = Math.min(pauseMs * 2, LONGEST_PAUSE_MS)
      const signal = AbortSignal.any([closing, this.#pause!.signal])
      await sleep(pauseMs, undefined, { signal }).catch(() => {})
    }
    if (this.#stale) this.#pauseMs = FIRST_PAUSE_MS
    this.#pause = new AbortController()
  }

  #blocked(instance: ModuleInstance, { ms, newMs, notable, queue, chain }: Blocked): void {
    this.#blockedMs += newMs
    if (instance === this.#instance) this.#blockingMs = ms
    const { timeoutMs } = instance
    const work = chain >= 0 ? `chain ${chain} of queue ${queue}` : queue >= 0 ? `queue ${queue}` : ''
    const text = `${work === '' ? '' : `${work}: `}it has blocked its thread for ${Math.round(ms / 1000)} s`
    if (notable) this.#host.log.warn({ ms, queue, chain }, `${this.#shown}: ${text}`)
    if (timeoutMs > 0 && ms >= timeoutMs) void instance.kill(new DeviceError('ERR_DEVICE_STUCK', text))
  }

  #unblocked(ms: number, newMs: number): void {
    this.#blockedMs += newMs
    this.#blockingMs = 0
    this.#host.log.warn({ ms }, `${this.#shown}: its thread goes on, after ${ms} ms`)
  }

  /** The daemon is closing: `close` comes when the session has ended, which a device that hangs would keep from ending. */
  #stopSoon(): void {
    this.#closing.abort(new Error('the daemon is stopping'))
    this.#instance.abort()
    const timer = setTimeout(() => {
      this.#host.log.warn({}, `${this.#shown} has not ended after ${CLOSE_LIMIT_MS / 1000} s: its thread is terminated`)
      void this.#instance.terminate()
    }, CLOSE_LIMIT_MS)
    this.#stopTimer = timer
  }
}

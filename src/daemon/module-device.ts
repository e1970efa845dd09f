/**
 * A device on threads of its own, as the control thread has it: each method is a message (module-guest.ts), and what has to be
 * answered at once is a copy of what the device said last. When its module fails, blocks for too long or ends its
 * thread, that ends its session and nothing else, and the module starts again. It must not know sockets and rings.
 */
import { fstatSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { DeviceError } from '../device/errors.ts'
import type { Device, DeviceHost, DeviceSample, InheritedFiles, NetworkRequests, QemuDevice } from '../device/index.ts'
import type { Blocked, IothreadHandle, IothreadPool } from '../engine/pool.ts'
import { closeFds } from '../vhost-user/fd-channel.ts'
import { VIRTQ_MAX_SIZE } from '../virtio/constants.ts'
import type { KeptFiles } from './kept-files.ts'
import { failureText } from './module-failure.ts'
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

export class ModuleDevice implements Device, RingThreads {
  readonly own = true
  network?: NetworkRequests
  qemu?: () => QemuDevice
  readonly #options: ModuleDeviceOptions
  readonly #host: DeviceHost
  readonly #closing = new AbortController()
  readonly #kept = new Set<string>()
  /** Files of a predecessor that the device has. */
  #inherited: { readonly fd: number; readonly file: string | undefined }[] = []
  #instance!: ModuleInstance
  #user: ModuleDeviceUser | undefined
  #ready: Promise<void> = Promise.resolve()
  /** While `whileReplaced` runs. */
  #replacing: { death: { readonly instance: ModuleInstance; readonly error: unknown } | undefined } | undefined
  #bornAt = 0
  #pauseMs = FIRST_PAUSE_MS
  #assigned = 0
  #samples: readonly DeviceSample[] = []
  #sampling: Promise<void> | undefined
  /** Seconds for which its threads have not answered, without the present time. */
  #blockedSeconds = 0
  #blockedNow = 0
  #stopTimer: NodeJS.Timeout | undefined

  private constructor(host: DeviceHost, options: ModuleDeviceOptions) {
    this.#host = host
    this.#options = options
  }

  /** @throws ConfigError or DeviceError naming file, line and what was expected */
  static async open(host: DeviceHost, options: ModuleDeviceOptions): Promise<ModuleDevice> {
    const device = new ModuleDevice(host, options)
    device.adopt(await device.#begin(options.files.waiting(device.#prefix)))
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
    return this.#blockedSeconds + this.#blockedNow
  }

  // ---- another version of the module

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
  async load(imported: (urls: readonly string[]) => void = () => {}): Promise<ModuleInstance> {
    const { source, pool, iothreads, iothreadCpus } = this.#options
    const { given, address } = source
    const cpus = iothreadCpus && [...new Set(iothreadCpus.flat())]
    let loaded: ModuleInstance | undefined
    const instance: ModuleInstance = await ModuleInstance.load({
      address,
      given,
      pool,
      threads: iothreads,
      cpus,
      imported,
      events: {
        // Both come when it was opened, at the earliest.
        report: (report) => this.#hear(instance, report),
        death: (error) => this.#died(instance, error),
        blocked: (blocked) => this.#blocked(loaded, blocked),
        unblocked: (ms) => this.#unblocked(ms),
      },
    })
    loaded = instance
    return instance
  }

  /** Opens what `load` returned. @throws ConfigError or DeviceError: it is to be ended */
  openInstance(instance: ModuleInstance): Promise<void> {
    return instance.open(this.#host.name, this.#options.observer, [])
  }

  /** From now on this one is the device. Its threads are the ones to use. */
  adopt(instance: ModuleInstance): void {
    this.#instance = instance
    this.#bornAt = performance.now()
    const { network, qemu } = instance
    if (network) {
      this.network = {
        setMtu: async (mtu) => (await this.#instance.call({ kind: 'setMtu', mtu })) === true,
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
    return (await this.#instance.call({ kind: 'writeConfig', offset, bytes: Uint8Array.from(bytes) })) === true
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
    this.#closing.abort()
    this.#forget()
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

  /** Of keys of files that are kept for a handover: those of two modules may be the same. */
  get #prefix(): string {
    return `${this.#host.name}:`
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

  /** A method of which nobody waits for the end. */
  #post(call: Parameters<ModuleInstance['call']>[0]): void {
    const instance = this.#instance
    instance.call(call).catch((error: unknown) => {
      if (instance === this.#instance && !instance.ended) this.#user?.failed((error as Error).message, error)
    })
  }

  #hear(instance: ModuleInstance, report: DeviceReport): void {
    const { files } = this.#options
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
      case 'keep':
        this.#kept.add(report.key)
        return this.#host.handover.keep(this.#prefix + report.key, report.fds, report.facts)
      case 'forget':
        this.#kept.delete(report.key)
        return this.#host.handover.forget(this.#prefix + report.key)
      case 'took':
        for (const fd of files.take(this.#prefix + report.key)?.fds ?? [])
          this.#inherited.push({ fd, file: fileOf(fd) })
    }
  }

  /** The fds of a thread are closed when it ends: they can't be handed over any more. */
  #forget(): void {
    for (const key of this.#kept) this.#host.handover.forget(this.#prefix + key)
    this.#kept.clear()
  }

  /** Node closes what a thread opened when it dies, but not what it took over: its lock would keep out the next one. */
  #closeInherited(): void {
    // The device may have closed it itself, and the number be another file's.
    const left = this.#inherited.filter(({ fd, file }) => file !== undefined && fileOf(fd) === file)
    closeFds(left.map(({ fd }) => fd))
    this.#inherited = []
  }

  #died(instance: ModuleInstance, error: unknown): void {
    if (instance !== this.#instance) return
    if (this.#replacing !== undefined) {
      this.#replacing.death = { instance, error }
      return
    }
    this.#forget()
    this.#blockedSeconds += this.#blockedNow
    this.#blockedNow = 0
    this.#user?.failed(failureText(error, '', this.#shown), error)
    if (performance.now() - this.#bornAt > LONG_LIFE_MS) this.#pauseMs = FIRST_PAUSE_MS
    this.#ready = this.#restart(instance)
  }

  async #restart(dead: ModuleInstance): Promise<void> {
    const { signal } = this.#closing
    await dead.terminate()
    this.#closeInherited()
    while (!signal.aborted) {
      const pauseMs = this.#pauseMs
      this.#pauseMs = Math.min(pauseMs * 2, LONGEST_PAUSE_MS)
      await sleep(pauseMs, undefined, { signal }).catch(() => {})
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
        this.#host.log.info({}, `${this.#shown} was started again`)
        return
      } catch (error) {
        if (!signal.aborted)
          this.#host.log.error({ err: error }, `it was not started again: ${(error as Error).message}`)
      }
    }
  }

  /** @param instance undefined while it is loaded, which has a limit of its own */
  #blocked(instance: ModuleInstance | undefined, { ms, queue, chain }: Blocked): void {
    this.#blockedNow = ms / 1000
    const timeoutMs = instance?.described.shape.timeoutMs ?? 0
    const work = chain >= 0 ? `chain ${chain} of queue ${queue}` : queue >= 0 ? `queue ${queue}` : ''
    const text = `${work === '' ? '' : `${work}: `}it has blocked its thread for ${Math.round(ms / 1000)} s`
    this.#host.log.warn({ ms, queue, chain }, `${this.#shown}: ${text}`)
    if (timeoutMs > 0 && ms >= timeoutMs) void instance?.kill(new DeviceError('ERR_DEVICE_STUCK', text))
  }

  #unblocked(ms: number): void {
    this.#blockedSeconds += ms / 1000
    this.#blockedNow = 0
    this.#host.log.warn({ ms }, `${this.#shown}: its thread goes on, after ${ms} ms`)
  }

  /** The daemon is closing: `close` comes when the session has ended, which a device that hangs would keep from ending. */
  #stopSoon(): void {
    this.#closing.abort()
    this.#instance.abort()
    const timer = setTimeout(() => {
      this.#host.log.warn({}, `${this.#shown} has not ended after ${CLOSE_LIMIT_MS / 1000} s: its thread is terminated`)
      void this.#instance.terminate()
    }, CLOSE_LIMIT_MS)
    this.#stopTimer = timer
  }
}

/** Which file an fd is of; undefined: it is not open. */
function fileOf(fd: number): string | undefined {
  try {
    const { dev, ino } = fstatSync(fd)
    return `${dev}:${ino}`
  } catch {
    return undefined
  }
}

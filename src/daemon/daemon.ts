/**
 * The daemon: a configuration becomes devices, iothreads and sockets, and goes away again without a trace. It knows
 * no command line and no signals.
 */
import { EventEmitter } from 'eventemitter3'
import { ConfigError, type Device } from '../device/index.ts'
import { allowedCpus } from '../engine/affinity.ts'
import { IothreadPool, moduleUrl } from '../engine/pool.ts'
import type { DaemonSnapshot } from '../ops/snapshot.ts'
import { closeFds } from '../vhost-user/fd-channel.ts'
import { MemoryFaults } from '../vhost-user/memory-faults.ts'
import type { DaemonConfig, DeviceConfig } from './config.ts'
import { type DaemonEvents, DeviceServer } from './device-server.ts'
import { Handover, type HandoverOptions, LostHandover } from './handover.ts'
import { HandoverError } from './handover-messages.ts'
import { KeptFiles } from './kept-files.ts'
import type { Logger } from './log.ts'
import { ModuleDevice } from './module-device.ts'
import { openDevice } from './open-device.ts'
import type { Predecessor } from './predecessor.ts'

export type { DaemonEvents } from './device-server.ts'

export class Daemon extends EventEmitter<DaemonEvents> {
  readonly #servers: DeviceServer[] = []
  readonly #pool: IothreadPool
  readonly #log: Logger
  readonly #faults: MemoryFaults
  readonly #config: DaemonConfig
  readonly #files: KeptFiles
  #handover: Handover | undefined
  #handedOver: Promise<number> | undefined
  /** For tests, and for hosts whose io_uring is known to be bad. */
  readonly #emulate = process.env['VIRTIOD_IO_URING'] === 'off'
  #ended = Promise.withResolvers<void>()
  #died: unknown
  readonly #closing = new AbortController()
  #closed: Promise<void> | undefined

  private constructor(config: DaemonConfig, log: Logger, files: KeptFiles) {
    super()
    this.#log = log
    this.#config = config
    this.#files = files
    this.#pool = new IothreadPool({
      // Modules have threads of their own.
      count: config.devices.every(({ module }) => module !== undefined) ? 0 : config.iothreads,
      ...(config.iothreadCpus === undefined ? {} : { cpus: config.iothreadCpus }),
      pollMaxUs: config.pollMaxUs,
      emulate: this.#emulate,
    })
    this.#pool.on('ringBroken', ({ session, index, code, message, request }) =>
      this.#serverOf(session)?.ringBroke(index, code, message, request)
    )
    this.#pool.on('deviceFailed', ({ session, index, error, chain }) =>
      this.#serverOf(session)?.deviceFailed(index, error, chain)
    )
    this.#pool.on('reported', ({ session, index, message }) =>
      this.#serverOf(session)?.device.reported?.(index, message)
    )
    this.#pool.on('call', ({ session, index }) => this.#serverOf(session)?.ringCalls(index))
    this.#pool.on('iotlbMiss', ({ session, index, address, access }) =>
      this.#serverOf(session)?.iotlbMiss(index, address, access)
    )
    this.#pool.on('death', (error) => this.#iothreadDied(error))
    this.#faults = new MemoryFaults(() => {
      for (const server of this.#servers) server.checkMemory()
    })
  }

  /**
   * Opens every device, then binds every socket.
   * @throws ConfigError before any socket is bound, or with all of them removed again
   */
  static async start(config: DaemonConfig, log: Logger): Promise<Daemon> {
    checkCpus(config.iothreadCpus)
    const daemon = new Daemon(config, log, new KeptFiles())
    try {
      for (const device of config.devices) await daemon.#open(device)
      // The iothreads are still starting (a worker takes 40 ms): front-ends can connect meanwhile, their rings wait
      // for them.
      for (const server of daemon.#servers) server.listen(() => daemon.#served())
      await daemon.#pool.ready()
      daemon.#logIothreads()
      return daemon
    } catch (error) {
      await daemon.close()
      throw error
    }
  }

  /**
   * Takes the guests over from another process, and resolves when this one serves them; that one waits for it to end
   * without them.
   * @throws ConfigError or HandoverError: the other process goes on, and this one is to end
   */
  static async takeOver(config: DaemonConfig, log: Logger, predecessor: Predecessor): Promise<Daemon> {
    checkCpus(config.iothreadCpus)
    predecessor.check(config.devices)
    const daemon = new Daemon(config, log, predecessor.files)
    try {
      for (const device of config.devices) await daemon.#open(device)
      const old = new Set(predecessor.hello.devices.map(({ name }) => name))
      const added = daemon.#servers.filter(({ name }) => !old.has(name))
      for (const server of added) server.listen(() => daemon.#served(), true)
      await daemon.#pool.ready()
      await daemon.#loadQueueModules()
      daemon.#logIothreads()
      await daemon.#restore(predecessor)
      await predecessor.prepared()
      // ORDER: whoever serves has said so before: the old process takes the guests back if this one dies without a
      // word.
      await predecessor.committed()
    } catch (error) {
      await daemon.close()
      throw error
    }
    await Promise.all(daemon.#servers.map((server) => server.start()))
    await daemon.#pool.broadcastShared({ kind: 'resume', session: 'all' })
    // A module that blocks its thread holds up nobody else.
    for (const { rings, module } of daemon.#servers) if (module !== undefined) rings.resume().catch(() => {})
    for (const server of daemon.#servers) server.begin(() => daemon.#served())
    return daemon
  }

  /** Opens and closes every device, without shared iothreads or sockets. @throws ConfigError */
  static async check(config: DaemonConfig, log: Logger): Promise<void> {
    checkCpus(config.iothreadCpus)
    const devices: Device[] = []
    const pool = new IothreadPool({ count: 0, pollMaxUs: 0, emulate: true })
    try {
      const { signal } = new AbortController()
      const nobody = { daemon: devices, signal, configChanged: () => {}, send: () => {} }
      const place = { pool, files: new KeptFiles(), observer: false }
      for (const device of config.devices) devices.push(await openDevice(device, config, log, nobody, place))
    } finally {
      for (const device of devices) await device.close()
      await pool.close()
    }
  }

  /**
   * Resolves when there is nothing left to serve: every socket was a connection handed down, and all have ended.
   * @throws when an iothread died
   */
  ended(): Promise<void> {
    return this.#ended.promise
  }

  snapshot(): DaemonSnapshot {
    return {
      devices: this.#servers.map((server) => server.snapshot()),
      iothreads: this.#pool.all.map((thread) => thread.snapshot()),
    }
  }

  /** As `snapshot`, after devices on threads of their own were asked for their metrics; it takes a fifth of a second at most. */
  async collect(): Promise<DaemonSnapshot> {
    await Promise.all(this.#servers.map(({ module }) => module?.collect()))
    return this.snapshot()
  }

  /**
   * Resolves with undefined when every iothread answers, else with what is wrong; an iothread that hangs makes it
   * never resolve.
   */
  async health(): Promise<string | undefined> {
    if (this.#died !== undefined) return `an iothread died: ${this.#died}`
    await this.#pool.broadcastShared({ kind: 'ping' })
    return undefined
  }

  /** Every device looks at its backing store again: a resized image reaches its guest. */
  refresh(): void {
    for (const server of this.#servers) void server.refresh()
  }

  /**
   * Hands all guests over to a new process, which serves when this resolves, to its pid. This process has nothing to do
   * any more: `close` leaves everything alone that the new one has.
   * @throws HandoverError when the daemon goes on as before
   */
  async handOver(options: HandoverOptions): Promise<number> {
    if (this.#closed !== undefined) throw new HandoverError('the daemon is stopping')
    if (this.#handover !== undefined) throw new HandoverError('a handover is under way already')
    const pause = () => void this.#pool.broadcast({ kind: 'pause', session: 'all' }).catch(() => {})
    this.#handover = new Handover(this.#servers, this.#log, pause, options)
    try {
      this.#handedOver = this.#handover.run(this.#config.devices, this.#files)
      return await this.#handedOver
    } catch (error) {
      this.#handedOver = undefined
      this.#handover = undefined
      if (error instanceof LostHandover) this.#ended.reject(error)
      throw error
    }
  }

  /**
   * Ends all sessions (what is in flight completes), removes the sockets, stops the iothreads; a handover that is not
   * yet committed fails. Idempotent.
   */
  close(): Promise<void> {
    this.#closed ??= this.#close()
    return this.#closed
  }

  /**
   * Stops the iothreads at once, whatever is in flight: the process has to end right after it. Resolves when they
   * have ended; one that hangs in the kernel never does.
   */
  abandon(): Promise<void> {
    return this.#pool.abandon()
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  async #close(): Promise<void> {
    this.#handover?.cancel('the daemon is stopping')
    const handedOver = await this.#handedOver?.catch(() => undefined)
    if (handedOver === undefined) {
      this.#closing.abort()
      await Promise.all(this.#servers.map((server) => server.close()))
      this.#files[Symbol.dispose]()
    }
    await this.#pool.close()
    this.#faults[Symbol.dispose]()
  }

  async #open(config: DeviceConfig): Promise<void> {
    const log = this.#log.child({ device: config.name })
    let server: DeviceServer | undefined
    const own = {
      daemon: this,
      signal: this.#closing.signal,
      configChanged: () => server?.configChanged(),
      send: (index: number, message: unknown) => server?.rings.send(index, message),
    }
    const place = { pool: this.#pool, files: this.#files, observer: false }
    const device = await openDevice(config, this.#config, log, own, place)
    server = new DeviceServer(config, device, device instanceof ModuleDevice ? device : this.#pool, log, this)
    this.#servers.push(server)
  }

  /** Before the guests wait for it, and while a version that can't be loaded does no harm. */
  async #loadQueueModules(): Promise<void> {
    const shared = this.#config.devices.filter(({ module }) => module === undefined)
    const modules = new Set(shared.map(({ definition }) => moduleUrl(definition.queueModule!).href))
    for (const module of modules) await this.#pool.broadcastShared({ kind: 'load', module })
  }

  async #restore(predecessor: Predecessor): Promise<void> {
    const received = await predecessor.devices()
    const lost: number[] = []
    await Promise.all(
      received.map(async ({ device, fds }) => {
        const server = this.#servers.find(({ name }) => name === device.name)
        if (server === undefined) lost.push(...fds)
        else await server.restore(device, fds)
      })
    )
    closeFds(lost)
    const missing = predecessor.hello.devices.find(({ name }) => !received.some(({ device }) => device.name === name))
    if (missing !== undefined) throw new HandoverError(`the state of the device ${missing.name} did not come`)
    // What no device took: an uplink that two devices name, a device that found its own way.
    predecessor.files[Symbol.dispose]()
  }

  #logIothreads(): void {
    const threads = this.#pool.all
    const emulated = threads.find((thread) => thread.emulated)
    if (emulated === undefined) this.#log.info({ iothreads: threads.length, ring: 'io_uring' }, 'iothreads run')
    else if (this.#emulate)
      this.#log.info({ iothreads: threads.length, ring: 'system calls' }, 'io_uring is switched off (VIRTIOD_IO_URING)')
    else {
      const details = { iothreads: threads.length, ring: 'system calls', reason: emulated.reason }
      this.#log.warn(details, 'io_uring is not to be had: iothreads run on plain system calls, which is slower')
    }
  }

  #serverOf(session: number): DeviceServer | undefined {
    return this.#servers.find((server) => server.rings.session === session)
  }

  #iothreadDied(error: unknown): void {
    this.#died = error
    this.#log.fatal({ err: error }, 'an iothread died')
    this.#ended.reject(error)
    this.#ended.promise.catch(() => {})
  }

  #served(): void {
    if (this.#servers.every((server) => server.handedDownEnded)) this.#ended.resolve()
  }
}

/** @throws ConfigError naming the processors that this process may not use */
function checkCpus(sets: DaemonConfig['iothreadCpus']): void {
  if (sets === undefined) return
  const allowed = allowedCpus()
  const missing = sets.flat().filter((cpu) => !allowed.has(cpu))
  if (missing.length === 0) return
  const problem = `this process may not run on CPU ${[...new Set(missing)].join(', ')}`
  throw new ConfigError('ERR_IOTHREAD_CPUS', '--iothread-cpus', problem, `It may use ${[...allowed].join(', ')}.`)
}

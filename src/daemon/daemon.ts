/**
 * The daemon: a configuration becomes devices, iothreads and sockets, and goes away again without a trace. It knows
 * no command line and no signals.
 */
import { EventEmitter } from 'eventemitter3'
import { API_VERSION, ConfigError, type Device, DeviceError, type DeviceHost } from '../device/index.ts'
import { allowedCpus } from '../engine/affinity.ts'
import { fileInfo, lockFile, probeFallocate } from '../engine/files.ts'
import { networkHost } from '../engine/network.ts'
import { IothreadPool } from '../engine/pool.ts'
import type { DaemonSnapshot } from '../ops/snapshot.ts'
import { MemoryFaults } from '../vhost-user/memory-faults.ts'
import type { DaemonConfig, DeviceConfig } from './config.ts'
import { type DaemonEvents, DeviceServer } from './device-server.ts'
import type { Logger } from './log.ts'

export type { DaemonEvents } from './device-server.ts'

export class Daemon extends EventEmitter<DaemonEvents> {
  readonly #servers: DeviceServer[] = []
  readonly #pool: IothreadPool
  readonly #log: Logger
  readonly #faults: MemoryFaults
  /** For tests, and for hosts whose io_uring is known to be bad. */
  readonly #emulate = process.env['VIRTIOD_IO_URING'] === 'off'
  #ended = Promise.withResolvers<void>()
  #died: unknown
  #closed: Promise<void> | undefined

  private constructor(config: DaemonConfig, log: Logger) {
    super()
    this.#log = log
    this.#pool = new IothreadPool({
      count: config.iothreads,
      ...(config.iothreadCpus === undefined ? {} : { cpus: config.iothreadCpus }),
      pollMaxUs: config.pollMaxUs,
      emulate: this.#emulate,
    })
    this.#pool.on('ringBroken', ({ session, index, code, message }) =>
      this.#serverOf(session)?.ringBroke(index, code, message)
    )
    this.#pool.on('deviceFailed', ({ session, index, error }) => this.#serverOf(session)?.deviceFailed(index, error))
    this.#pool.on('reported', ({ session, index, message }) =>
      this.#serverOf(session)?.device.reported?.(index, message)
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
    const daemon = new Daemon(config, log)
    try {
      for (const device of config.devices) await daemon.#open(device, config)
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

  /** Opens and closes every device, without iothreads or sockets. @throws ConfigError */
  static async check(config: DaemonConfig, log: Logger): Promise<void> {
    checkCpus(config.iothreadCpus)
    const devices: Device[] = []
    try {
      const nobody = { daemon: devices, configChanged: () => {}, send: () => {} }
      for (const device of config.devices) devices.push(await openDevice(device, config, log, nobody))
    } finally {
      for (const device of devices) device.close()
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
      iothreads: this.#pool.threads.map((thread) => thread.snapshot()),
    }
  }

  /**
   * Resolves with undefined when every iothread answers, else with what is wrong; an iothread that hangs makes it
   * never resolve.
   */
  async health(): Promise<string | undefined> {
    if (this.#died !== undefined) return `an iothread died: ${this.#died}`
    await this.#pool.broadcast({ kind: 'ping' })
    return undefined
  }

  /** Every device looks at its backing store again: a resized image reaches its guest. */
  refresh(): void {
    for (const server of this.#servers) server.refresh()
  }

  /** Ends all sessions (what is in flight completes), removes the sockets, stops the iothreads. Idempotent. */
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
    await Promise.all(this.#servers.map((server) => server.close()))
    await this.#pool.close()
    this.#faults[Symbol.dispose]()
  }

  async #open(config: DeviceConfig, whole: DaemonConfig): Promise<void> {
    const log = this.#log.child({ device: config.name })
    let server: DeviceServer | undefined
    const device = await openDevice(config, whole, log, {
      daemon: this,
      configChanged: () => server?.configChanged(),
      send: (index, message) => server?.rings.send(index, message),
    })
    server = new DeviceServer(config, device, this.#pool, log, this)
    this.#servers.push(server)
  }

  #logIothreads(): void {
    const { threads } = this.#pool
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

async function openDevice(
  config: DeviceConfig,
  whole: DaemonConfig,
  log: Logger,
  own: Pick<DeviceHost, 'daemon' | 'configChanged' | 'send'>
): Promise<Device> {
  const { apiVersion, name } = config.definition
  if (apiVersion !== API_VERSION) {
    const message = `the device ${name} is written for version ${apiVersion} of the contract, this is version ${API_VERSION}`
    throw new DeviceError('ERR_DEVICE_API_VERSION', message)
  }
  const host: DeviceHost = {
    ...own,
    log,
    name: config.name,
    network: networkHost,
    fileInfo,
    lockFile,
    fallocate: probeFallocate,
  }
  try {
    return await config.definition.open(config.options, host)
  } catch (error) {
    // Of several devices, which one.
    if (error instanceof ConfigError && whole.devices.length > 1) error.message = `${config.name}: ${error.message}`
    throw error
  }
}

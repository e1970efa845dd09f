/**
 * One device of the daemon: its socket, and the sessions of its front-ends, one after the other; and how both go on on
 * other threads, or in another process (handover.ts; the old process's end is in device-handover.ts).
 */
import { setImmediate } from 'node:timers/promises'
import type { EventEmitter } from 'eventemitter3'
import { type Device, type DeviceDefinition, DeviceError } from '../device/index.ts'
import type { RefusedRequest } from '../engine/pool.ts'
import type { DeviceSnapshot } from '../ops/snapshot.ts'
import { Connection } from '../vhost-user/connection.ts'
import { ProtocolError } from '../vhost-user/errors.ts'
import { closeFds } from '../vhost-user/fd-channel.ts'
import { Listener } from '../vhost-user/listener.ts'
import { StillInFlight } from '../vhost-user/rehosting.ts'
import { Session } from '../vhost-user/session.ts'
import type { DeviceConfig, SocketAddress } from './config.ts'
import { DeviceHandover } from './device-handover.ts'
import { openSocket } from './device-socket.ts'
import type { Handed } from './handover.ts'
import type { HandedDevice } from './handover-messages.ts'
import { LineLimit } from './line-limit.ts'
import type { Logger } from './log.ts'
import { ModuleDevice } from './module-device.ts'
import { errorText, placeIn, placeOf, requestText } from './module-failure.ts'
import { ModuleWatch } from './module-watch.ts'
import { Rings, type RingThreads } from './rings.ts'
import { within } from './within.ts'

/** What a program that runs a {@link Daemon} may listen to. */
export interface DaemonEvents {
  /** A front-end connected. @param device its name in the configuration */
  sessionOpen: [device: string]
  /** The session ended: by itself, or with the error that ended it. Nothing of it is left. */
  sessionClose: [device: string, error: unknown]
  /** The driver broke a ring; see RING_ERRORS. */
  ringBroken: [device: string, queue: number, code: string]
}

export class DeviceServer {
  readonly name: string
  readonly device: Device
  readonly rings: Rings
  /** The device, when it is one of a module. */
  readonly module: ModuleDevice | undefined
  readonly #definition: DeviceDefinition
  readonly #socket: SocketAddress
  readonly #log: Logger
  readonly #events: EventEmitter<DaemonEvents>
  /** The device in messages: the file of a module. */
  readonly #shown: string
  /** Its module is reloaded when its files change. */
  readonly #watched: boolean
  #watch: ModuleWatch | undefined
  /** Why it ended was told already. */
  #told: Session | undefined
  /** For all lines that a guest or a front-end can cause: who comes and goes does not keep an error from being told. */
  readonly #limits = { info: new LineLimit(), warn: new LineLimit(), error: new LineLimit() }
  /** The connection that was handed down has ended. */
  handedDownEnded = false
  #listener: Listener | undefined
  #session: Session | undefined
  /** Of `#session`: resolves when nothing of it is left. */
  #sessionEnd: Promise<void> = Promise.resolve()
  #running: Promise<void> | undefined
  #closing = false
  /** All is another process's. */
  #abandoned = false
  /** From `suspend` to `resume`. */
  #handover: DeviceHandover | undefined
  /** Never rejects. */
  #exchanging: Promise<void> | undefined
  /** `restore` has been called, and `begin` not yet: all is still the old process's. */
  #restored = false
  #configBefore = Buffer.alloc(0)
  #sessions = 0
  #protocolErrors = 0

  constructor(
    config: DeviceConfig,
    device: Device,
    threads: RingThreads,
    log: Logger,
    events: EventEmitter<DaemonEvents>
  ) {
    this.name = config.name
    this.device = device
    this.module = device instanceof ModuleDevice ? device : undefined
    this.#definition = config.definition
    this.#socket = config.socket
    this.#log = log
    this.#events = events
    this.#watched = config.module?.watch === true
    this.#shown = config.module?.address.shown ?? config.definition.name
    this.rings = new Rings(config.definition, device, threads)
    const { module } = this
    module?.attach({
      failed: (text, error) => this.#failed(text, { err: error }),
      restarted: async () => {
        await this.#sessionEnd
        this.replaced(module)
      },
    })
  }

  /** Undefined: its socket was a connection that was handed down. */
  get listener(): Listener | undefined {
    return this.#listener
  }

  get session(): Session | undefined {
    return this.#session
  }

  /**
   * Binds the socket and begins to serve. @param onEnd called when a connection that was handed down has ended:
   * nobody can come any more
   * @param hold front-ends wait in the backlog until `begin`
   * @throws ConfigError when the socket can't be had
   */
  listen(onEnd: () => void, hold = false): void {
    this.#beginWatch()
    const socket = openSocket(this.#socket)
    if (socket instanceof Connection) {
      this.#running = this.#serveOnly(this.#serve(socket), onEnd)
      return
    }
    this.#listener = socket
    if (hold) socket.hold()
    this.#running = this.#acceptAll(socket)
    this.#log.info({ socket: this.#socket }, 'listening')
  }

  // ---- other threads, or another device

  /**
   * Calls `swap` while no ring is started, so that it can put another device or other threads in place
   * ({@link Rings.replace}). The front-end stays connected and is served on after that; those that come meanwhile wait.
   * @param limitMs how long what is in flight may take
   * @throws StillInFlight when it takes longer: `swap` was not called, and all goes on as before; what `swap` throws
   */
  async exchange(swap: () => Promise<void>, limitMs: number): Promise<void> {
    while (this.#handover !== undefined || this.#exchanging !== undefined)
      await (this.#handover?.over ?? this.#exchanging)
    const exchanging = this.#exchange(swap, limitMs)
    this.#exchanging = exchanging.catch(() => {})
    try {
      await exchanging
    } finally {
      this.#exchanging = undefined
    }
  }

  async #exchange(swap: () => Promise<void>, limitMs: number): Promise<void> {
    // One that starts again: front-ends that wait for that are served first.
    await this.module?.ready
    this.#listener?.hold()
    try {
      // A front-end that was accepted just now becomes the session.
      await setImmediate()
      if (await this.#session?.rehost(swap, limitMs)) return
      const late = new StillInFlight(`the last session has not ended after ${limitMs} ms`)
      await within(this.#sessionEnd, limitMs, late)
      if (this.#closing) throw new Error('the daemon is stopping')
      await swap()
    } finally {
      this.#listener?.resume()
    }
  }

  /** Another instance of its module is the device now, on threads of its own. No ring is started. */
  replaced(device: ModuleDevice): void {
    this.rings.replace(device, device.threads, device.instance.described.shape)
  }

  // ---- handover, the old process

  /** Stops serving in a state from which this process or another one goes on. New front-ends wait in the backlog. */
  suspend(): Promise<Handed> {
    this.#handover = new DeviceHandover(this, this.#log)
    return this.#handover.suspend(this.#exchanging)
  }

  /** Goes on after `suspend`, after one that failed, or instead of one that hangs. */
  async resume(): Promise<void> {
    await this.#handover?.resume()
    this.#handover = undefined
  }

  /** Lets go of what another process has now, without a trace on socket, connection or device. */
  abandon(): void {
    this.#abandoned = true
    this.#watch?.[Symbol.dispose]()
    this.#session?.abandon()
    this.#listener?.abandon()
  }

  // ---- handover, the new process

  /**
   * Takes what the old process handed over, without serving yet.
   * @param fds ours now
   * @throws an Error when it can't be used
   */
  async restore(handed: HandedDevice, fds: number[]): Promise<void> {
    this.#restored = true
    try {
      if (handed.listener !== undefined) {
        const [fd = -1] = fds.splice(0, 1)
        this.#listener = Listener.adopt(fd, handed.listener.file)
        this.#listener.hold()
      }
      this.handedDownEnded = handed.ended
      this.#configBefore = Buffer.from(handed.config, 'base64')
      this.rings.begin()
      this.rings.hold()
      await this.rings.loadState(Buffer.from(handed.state, 'base64'))
    } catch (error) {
      closeFds(fds)
      throw error
    }
    if (handed.session !== undefined) this.#adoptSession(await Session.restore(this.rings, handed.session, fds))
    else closeFds(fds)
  }

  /** Starts what was restored; its rings are paused until all devices are here. The old process has let go. */
  async start(): Promise<void> {
    try {
      await this.device.takeOver?.()
    } catch (error) {
      // The old process is gone: whatever is missing, the other guests are served, and this one as far as that goes.
      this.#log.error({ err: error }, 'the device was not taken over whole')
    }
    if (!this.#restored) return
    try {
      await this.rings.release()
    } catch (error) {
      this.#log.error({ err: error }, 'a ring cannot go on in this process, its connection is closed')
      this.#session?.connection.abort()
    }
  }

  /** Serves on, and listens. */
  begin(onEnd: () => void): void {
    const listener = this.#listener
    listener?.resume()
    if (!this.#restored) return
    this.#restored = false
    this.#beginWatch()
    const session = this.#session
    const first = session === undefined ? Promise.resolve() : this.#run(session)
    if (listener !== undefined) this.#running = first.then(() => this.#acceptAll(listener))
    else if (this.handedDownEnded) onEnd()
    else this.#running = this.#serveOnly(first, onEnd)
    // What the new version or the new file says about the device, or an image that was resized.
    if (session !== undefined && !this.#configBefore.equals(this.device.config())) this.configChanged()
  }

  /** Looks at the backing store again; a driver hears of a changed config space. */
  async refresh(): Promise<void> {
    try {
      if ((await this.device.refresh?.()) === true) this.configChanged()
    } catch (error) {
      // That its thread died was told already.
      if (this.module?.instance.ended === true) return
      this.#log.error({ err: error }, `the backing store was not looked at again: ${(error as Error).message}`)
    }
  }

  configChanged(): void {
    if (this.#session === undefined) return
    const told = this.#session.configChanged()
    // A front-end can cause it: SEND_RARP.
    this.#say(
      'info',
      { told },
      told
        ? 'the config space changed, the front-end was told'
        : 'the config space changed, the front-end has no channel to hear it'
    )
  }

  /**
   * An event of an iothread about this device's present session.
   * @param request what was wrong with one: in which chain, and the stack of who says so, which may well be at fault
   */
  ringBroke(index: number, code: string, message: string, request?: RefusedRequest): void {
    this.rings.queues[index]!.broken = true
    this.#session?.ringBroke(index)
    const place = placeIn(request?.stack)
    const problem = request === undefined ? message : requestText(index, request.chain, message)
    const text = place === undefined ? problem : `${place}: ${problem}`
    this.#say('error', { queue: index, code }, `the driver broke its ring: ${text}`)
    this.#events.emit('ringBroken', this.name, index, code)
  }

  /** A ring without a call fd has something for its driver. */
  ringCalls(index: number): void {
    this.rings.queues[index]!.counters.takeCall()
    this.#session?.ringCalls(index)
  }

  /** A ring needs a translation. */
  iotlbMiss(index: number, address: number, access: number): void {
    this.#session?.iotlbMiss(index, address, access)
  }

  /** A handler failed. @param chain the head of what it was at work on, if that is known */
  deviceFailed(index: number, error: unknown, chain: number | undefined): void {
    if (this.module !== undefined && (error as { code?: unknown }).code === 'ERR_DEVICE_STUCK') {
      // What never ends goes on in its thread, and may touch what the next driver is told.
      return void this.module.instance.kill(error)
    }
    const text = `${placeOf(error) ?? this.#shown}: ${requestText(index, chain, errorText(error))}`
    this.#failed(text, { queue: index, chain, err: error })
  }

  #failed(text: string, details: object): void {
    const session = this.#session
    this.#told = session
    const consequence = session === undefined ? 'the device failed' : 'the device failed, its session ends'
    this.#say('error', details, `${consequence}: ${text}`)
    this.#endSession()
  }

  /** One that waits for its fate in a handover ends when that has failed. */
  async #endSession(): Promise<void> {
    const session = this.#session
    if (this.#handover?.lends === true) await this.#handover.over
    session?.connection.abort()
  }

  /** Some mapping lost pages. Ends the session when it was one of its own. */
  checkMemory(): void {
    if (this.#session?.memoryFaulted !== true) return
    this.#say('error', {}, 'the front-end truncated its memory, its session ends')
    this.#endSession()
  }

  snapshot(): DeviceSnapshot {
    const session = this.#session
    return {
      name: this.name,
      type: this.#definition.name,
      sessionUp: session !== undefined,
      memoryBytes: session?.memory.size ?? 0,
      memoryRegions: session?.memory.regions.length ?? 0,
      sessionsTotal: this.#sessions,
      protocolErrorsTotal: this.#protocolErrors,
      metrics: this.#definition.metrics ?? [],
      samples: [...(this.device.samples?.() ?? [])],
      ...(this.module && { blockedSeconds: this.module.blockedSeconds }),
      ...(this.#watch && { reloads: this.#watch.counts }),
      queues: this.rings.queues.filter((queue) => queue.used).map((queue) => queue.snapshot(this.#definition)),
    }
  }

  /** Ends the session (what is in flight completes), removes the socket, closes the device. */
  async close(): Promise<void> {
    this.#closing = true
    this.#watch?.[Symbol.dispose]()
    if (this.#restored) this.abandon()
    this.#listener?.[Symbol.dispose]()
    this.#session?.connection.abort()
    await this.#running
    await this.#exchanging
    await this.device.close()
  }

  #beginWatch(): void {
    if (this.#watched && this.module !== undefined) this.#watch = new ModuleWatch(this.module, this, this.#log)
  }

  /** A line that a guest or a front-end caused. */
  #say(level: 'info' | 'warn' | 'error', details: object, message: string): void {
    const more = this.#limits[level].take()
    if (more !== undefined) this.#log[level]({ ...details, ...more }, message)
  }

  async #acceptAll(listener: Listener): Promise<void> {
    while (!this.#closing) {
      const connection = await listener.accept()
      if (connection === undefined) return
      await this.#serve(connection)
    }
  }

  /** A connection that was handed down: when it ends, nobody comes any more. */
  async #serveOnly(session: Promise<void>, onEnd: () => void): Promise<void> {
    await session
    this.handedDownEnded = true
    onEnd()
  }

  async #serve(connection: Connection): Promise<void> {
    // A module that failed starts again.
    await this.module?.ready
    this.rings.begin()
    const session = new Session(connection, this.rings)
    this.#adoptSession(session)
    this.#say('info', { session: this.rings.session }, 'front-end connected')
    this.#events.emit('sessionOpen', this.name)
    await this.#run(session)
  }

  #adoptSession(session: Session): void {
    const about = { session: this.rings.session }
    session.onRefused = (error) => {
      this.#protocolErrors++
      this.#say('warn', { ...about, code: error.code }, `refused: ${error.message}`)
    }
    this.#session = session
    this.#sessions++
  }

  #run(session: Session): Promise<void> {
    this.#sessionEnd = this.#runSession(session)
    return this.#sessionEnd
  }

  /** Until the front-end leaves. */
  async #runSession(session: Session): Promise<void> {
    const about = { session: this.rings.session }
    if (this.#closing) session.connection.abort()
    let cause: unknown
    try {
      await session.run()
      if (!this.#abandoned) this.#say('info', about, 'front-end left')
    } catch (error) {
      cause = error
      if (error instanceof ProtocolError) {
        this.#protocolErrors++
        const message = `the front-end broke the protocol, its connection is closed: ${error.message}`
        this.#say('error', { ...about, code: error.code }, message)
      } else if (this.#told !== session && !(this.#closing && this.module !== undefined)) {
        // That names file and line.
        const where = error instanceof DeviceError ? `: ${error.message}` : ''
        this.#say('error', { ...about, err: error }, `the session failed, its connection is closed${where}`)
      }
    } finally {
      if (!this.#abandoned) {
        this.#session = undefined
        await this.rings.end()
        this.#events.emit('sessionClose', this.name, cause)
      }
    }
  }
}

/** One device of the daemon: its socket, and the sessions of its front-ends, one after the other. */
import type { EventEmitter } from 'eventemitter3'
import { ConfigError, type Device, type DeviceDefinition } from '../device/index.ts'
import { BROKEN, CALLS, CALLS_SUPPRESSED, CHAINS, COMPLETED, KICKS } from '../engine/counters.ts'
import type { IothreadPool } from '../engine/pool.ts'
import type { DeviceSnapshot } from '../ops/snapshot.ts'
import type { Connection } from '../vhost-user/connection.ts'
import { ProtocolError } from '../vhost-user/errors.ts'
import { connectedSocket, Listener } from '../vhost-user/listener.ts'
import { Session } from '../vhost-user/session.ts'
import type { DeviceConfig, SocketAddress } from './config.ts'
import { LineLimit } from './line-limit.ts'
import type { Logger } from './log.ts'
import { Rings } from './rings.ts'

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
  readonly #definition: DeviceDefinition
  readonly #socket: SocketAddress
  readonly #log: Logger
  readonly #events: EventEmitter<DaemonEvents>
  /** For all lines that a guest or a front-end can cause. */
  readonly #limit = new LineLimit()
  /** The connection that was handed down has ended. */
  handedDownEnded = false
  #listener: Listener | undefined
  #session: Session | undefined
  #running: Promise<void> | undefined
  #closing = false
  #sessions = 0
  #protocolErrors = 0

  constructor(
    config: DeviceConfig,
    device: Device,
    pool: IothreadPool,
    log: Logger,
    events: EventEmitter<DaemonEvents>
  ) {
    this.name = config.name
    this.device = device
    this.#definition = config.definition
    this.#socket = config.socket
    this.#log = log
    this.#events = events
    this.rings = new Rings(config.definition, device, pool)
  }

  /**
   * Binds the socket and begins to serve. @param onEnd called when a connection that was handed down has ended:
   * nobody can come any more
   * @throws ConfigError when the socket can't be had
   */
  listen(onEnd: () => void): void {
    if ('fd' in this.#socket) {
      const connection = adopt(this.#socket.fd)
      if (connection !== undefined) {
        this.#running = this.#serve(connection).then(() => {
          this.handedDownEnded = true
          onEnd()
        })
        return
      }
      this.#listener = Listener.adopt(this.#socket.fd)
    } else this.#listener = bind(this.#socket.path)
    this.#running = this.#acceptAll(this.#listener)
    this.#log.info({ socket: this.#socket }, 'listening')
  }

  /** Looks at the backing store again; a driver hears of a changed config space. */
  refresh(): void {
    if (this.device.refresh?.() === true) this.configChanged()
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

  /** An event of an iothread about this device's present session. */
  ringBroke(index: number, code: string, message: string): void {
    this.rings.queues[index]!.broken = true
    this.#session?.ringBroke(index)
    this.#say('error', { queue: index, code }, `the driver broke its ring: ${message}`)
    this.#events.emit('ringBroken', this.name, index, code)
  }

  deviceFailed(index: number, error: unknown): void {
    this.#say('error', { queue: index, err: error }, 'the device failed, its session ends')
    this.#session?.connection.abort()
  }

  /** Some mapping lost pages. Ends the session when it was one of its own. */
  checkMemory(): void {
    if (this.#session?.memoryFaulted !== true) return
    this.#say('error', {}, 'the front-end truncated its memory, its session ends')
    this.#session.connection.abort()
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
      queues: this.rings.queues
        .filter((queue) => queue.used)
        .map(({ index, thread, counters, ring, enabled, broken }) => ({
          index,
          started: ring !== undefined && enabled,
          broken,
          iothread: thread.index,
          kicks: counters.values[KICKS]!,
          calls: counters.values[CALLS]!,
          callsSuppressed: counters.values[CALLS_SUPPRESSED]!,
          chains: counters.values[CHAINS]!,
          inFlight: ring === undefined ? 0 : Math.max(0, counters.values[CHAINS]! - counters.values[COMPLETED]!),
          brokenTotal: counters.values[BROKEN]!,
          operations: counters.operations(this.#definition.operations),
          errors: counters.errors(this.#definition.errors),
        })),
    }
  }

  /** Ends the session (what is in flight completes), removes the socket, closes the device. */
  async close(): Promise<void> {
    this.#closing = true
    this.#listener?.[Symbol.dispose]()
    this.#session?.connection.abort()
    await this.#running
    this.device.close()
  }

  /** A line that a guest or a front-end caused. */
  #say(level: 'info' | 'warn' | 'error', details: object, message: string): void {
    const more = this.#limit.take()
    if (more !== undefined) this.#log[level]({ ...details, ...more }, message)
  }

  async #acceptAll(listener: Listener): Promise<void> {
    while (!this.#closing) {
      const connection = await listener.accept()
      if (connection === undefined) return
      await this.#serve(connection)
    }
  }

  async #serve(connection: Connection): Promise<void> {
    this.rings.begin()
    const about = { session: this.rings.session }
    const session = new Session(connection, this.rings)
    session.onRefused = (error) => {
      this.#protocolErrors++
      this.#say('warn', { ...about, code: error.code }, `refused: ${error.message}`)
    }
    this.#session = session
    this.#sessions++
    if (this.#closing) connection.abort()
    this.#say('info', about, 'front-end connected')
    this.#events.emit('sessionOpen', this.name)
    let cause: unknown
    try {
      await session.run()
      this.#say('info', about, 'front-end left')
    } catch (error) {
      cause = error
      if (error instanceof ProtocolError) {
        this.#protocolErrors++
        const message = `the front-end broke the protocol, its connection is closed: ${error.message}`
        this.#say('error', { ...about, code: error.code }, message)
      } else this.#say('error', { ...about, err: error }, 'the session failed, its connection is closed')
    } finally {
      this.#session = undefined
      await this.rings.end()
      this.#events.emit('sessionClose', this.name, cause)
    }
  }
}

function adopt(fd: number): Connection | undefined {
  try {
    return connectedSocket(fd)
  } catch (error) {
    const fix = 'Give the number of an inherited unix stream socket, listening or connected.'
    throw new ConfigError('ERR_SOCKET_FD', '--fd', (error as Error).message, fix, { cause: error })
  }
}

function bind(path: string): Listener {
  try {
    return Listener.bind(path)
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException
    const fix =
      code === 'EADDRINUSE'
        ? 'Another process listens there, or it is no socket: stop that process or give another path.'
        : 'Give a path in a directory that exists and that you may write to.'
    throw new ConfigError('ERR_SOCKET_BIND', '--socket-path', `cannot listen on ${path} (${code})`, fix, {
      cause: error,
    })
  }
}

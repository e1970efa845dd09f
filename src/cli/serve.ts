/**
 * Runs a daemon until a signal ends it (signals.ts): SIGTERM and SIGINT close it (drain, remove sockets), SIGHUP looks
 * at the backing files again, SIGUSR2 hands it over to a new process. It also serves /metrics and /healthz when the
 * configuration says so, and tells the service manager what goes on. It must not know where the configuration came
 * from.
 */
import type { DaemonConfig } from '../daemon/config.ts'
import { Daemon } from '../daemon/daemon.ts'
import { OutcomeFile } from '../daemon/handover-outcome.ts'
import type { Logger } from '../daemon/log.ts'
import { Predecessor } from '../daemon/predecessor.ts'
import { monotonicMicroseconds, notifyServiceManager } from '../daemon/service-manager.ts'
import type { OperationsServer } from '../ops/http.ts'
import { EXIT_FAILURE, EXIT_OK } from './exit-codes.ts'
import { listenToSignals } from './signals.ts'
import { launchSuccessor, takeHandoverFd } from './successor.ts'

export interface ServeHooks {
  /**
   * Every socket is bound; not called when the process took over from another one. @param metricsUrl where /metrics is
   * served, if it is
   */
  ready?(metricsUrl: string | undefined): void
}

/** How long iothreads get to end when there is no waiting for their requests. In milliseconds. */
const LEAVE_LIMIT_MS = 1000

/**
 * @returns the exit code, when the daemon has ended
 * @throws ConfigError, before any socket is bound
 */
export async function serve(config: DaemonConfig, log: Logger, hooks: ServeHooks = {}): Promise<number> {
  const service = new Service(config, log)
  const inherited = takeHandoverFd()
  if (inherited === undefined) await service.start(hooks)
  else await service.takeOver(inherited)
  return service.ended()
}

class Service {
  readonly #config: DaemonConfig
  readonly #log: Logger
  readonly #stopped = Promise.withResolvers<number>()
  readonly #outcomes = new OutcomeFile()
  #daemon: Daemon | undefined
  #operations: OperationsServer | undefined
  /** Of the process that has taken over. */
  #successor: number | undefined
  #handingOver = false
  #stopping = false

  constructor(config: DaemonConfig, log: Logger) {
    this.#config = config
    this.#log = log
    listenToSignals(log, {
      stop: () => this.#stop(),
      abandon: () => this.#leave(),
      hangup: () => this.#refresh(),
      handOver: () => void this.#handOver(),
    })
    // A bug in one place must not leave guests with a half-dead disk: say it and end, the supervisor starts us again.
    process.on('uncaughtException', (error) => {
      log.fatal({ err: error }, 'internal error')
      this.#leave()
    })
  }

  async start(hooks: ServeHooks): Promise<void> {
    try {
      // The address is taken before any socket is bound: a taken port ends the start while there is nothing to undo.
      await this.#startOperations()
      this.#daemon = await Daemon.start(this.#config, this.#log)
    } catch (error) {
      await this.#operations?.close()
      throw error
    }
    this.#ready()
    hooks.ready?.(this.#operations?.url)
  }

  /** @param fd to the process that serves until now @throws when that one goes on, and knows why */
  async takeOver(fd: number): Promise<void> {
    using predecessor = await Predecessor.connect(fd)
    const metricsFd = predecessor.takeMetrics(this.#config.metrics)
    try {
      if (metricsFd === undefined) await this.#startOperations()
      this.#daemon = await Daemon.takeOver(this.#config, this.#log, predecessor)
    } catch (error) {
      await predecessor.failed((error as Error).message)
      await this.#operations?.close()
      throw error
    }
    try {
      if (metricsFd !== undefined) await this.#startOperations(metricsFd)
    } catch (error) {
      this.#log.error({ err: error }, 'the metrics server did not come along')
    }
    this.#ready()
  }

  /** Resolves to the exit code. @throws what ended the daemon */
  async ended(): Promise<number> {
    try {
      return await Promise.race([this.#stopped.promise, this.#daemon!.ended().then(() => EXIT_OK)])
    } finally {
      await this.#daemon!.close()
      if (this.#successor === undefined) await this.#operations?.close()
      else this.#operations?.abandon()
    }
  }

  #ready(): void {
    const { devices } = this.#config
    this.#log.info({ devices: devices.length, metrics: this.#operations?.url }, 'ready')
    notifyServiceManager({ READY: 1, STATUS: this.#status })
  }

  get #status(): string {
    const { length } = this.#config.devices
    return `serving ${length} device${length === 1 ? '' : 's'}`
  }

  #stop(): void {
    this.#stopping = true
    if (this.#successor !== undefined) process.kill(this.#successor, 'SIGTERM')
    else notifyServiceManager({ STOPPING: 1, STATUS: 'stopping' })
    this.#stopped.resolve(EXIT_OK)
  }

  #refresh(): void {
    notifyServiceManager({ RELOADING: 1, MONOTONIC_USEC: monotonicMicroseconds(), STATUS: 'looking at the files' })
    this.#daemon?.refresh()
    if (this.#daemon !== undefined) notifyServiceManager({ READY: 1, STATUS: this.#status })
  }

  async #handOver(): Promise<void> {
    if (this.#handingOver) return this.#log.warn({}, 'a handover is under way already')
    if (this.#daemon === undefined) {
      this.#log.warn({}, 'no handover while starting')
      return this.#outcomes.failed('the process has not yet begun to serve')
    }
    this.#handingOver = true
    const { metrics } = this.#config
    const fd = this.#operations?.fd
    try {
      notifyServiceManager({ STATUS: 'handing over to a new process' })
      const pid = await this.#daemon.handOver({
        launch: launchSuccessor,
        metrics: metrics === undefined || fd === undefined ? undefined : { address: metrics, fd },
      })
      this.#successor = pid
      // systemd signals all processes of a unit; others knew the old one only, and it was too late to stop that.
      if (this.#stopping) process.kill(pid, 'SIGTERM')
      // From the main process, so that NotifyAccess=main is enough; from then on the new one is that.
      notifyServiceManager({ MAINPID: pid })
      this.#outcomes.succeeded(pid)
      this.#stopped.resolve(EXIT_OK)
    } catch (error) {
      const problem = (error as Error).message
      this.#log.error({ reason: problem }, 'the handover failed')
      notifyServiceManager({ STATUS: `${this.#status}; the last handover failed: ${problem}` })
      this.#outcomes.failed(problem)
    } finally {
      this.#handingOver = false
    }
  }

  /** @param inherited the listening socket of the process before this one */
  async #startOperations(inherited?: number): Promise<void> {
    const { metrics } = this.#config
    if (metrics === undefined) return
    const { startOperationsServer } = await import('../ops/http.ts')
    const handlers = {
      metrics: async () => {
        const { renderMetrics } = await import('../ops/metrics.ts')
        return renderMetrics((await this.#daemon?.collect()) ?? { devices: [], iothreads: [] })
      },
      health: async () => (this.#daemon === undefined ? 'starting' : this.#daemon.health()),
    }
    this.#operations = await startOperationsServer(metrics, handlers, '--metrics', inherited)
  }

  /**
   * Ends the process with EXIT_FAILURE, whatever is in flight. Node joins its workers when it exits, so the iothreads
   * have to end first; one that hangs in the kernel cannot, and then only SIGKILL helps.
   */
  #leave(): void {
    setTimeout(() => process.kill(process.pid, 'SIGKILL'), LEAVE_LIMIT_MS)
    void Promise.resolve(this.#daemon?.abandon()).then(() => process.exit(EXIT_FAILURE))
  }
}

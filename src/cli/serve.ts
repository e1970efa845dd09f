/**
 * Runs a daemon until a signal ends it: SIGTERM and SIGINT close it (drain, remove sockets; ten seconds at most), a
 * second one leaves at once, SIGHUP looks at the backing files again. It also serves /metrics and /healthz when the
 * configuration says so. It must not know where the configuration came from.
 */
import type { DaemonConfig } from '../daemon/config.ts'
import { Daemon } from '../daemon/daemon.ts'
import type { Logger } from '../daemon/log.ts'
import type { OperationsServer } from '../ops/http.ts'
import { EXIT_FAILURE, EXIT_OK } from './exit-codes.ts'

export interface ServeHooks {
  /** Every socket is bound. @param metricsUrl where /metrics is served, if it is */
  ready?(metricsUrl: string | undefined): void
}

/**
 * A disk that hangs keeps its requests in flight: who asked us to stop does not wait for it for ever. In
 * milliseconds.
 */
const STOP_LIMIT_MS = 10_000

/** How long iothreads get to end when there is no waiting for their requests. In milliseconds. */
const LEAVE_LIMIT_MS = 1000

/** npm, timeout(1) and terminals may deliver one wish twice, to the process and to its group. In milliseconds. */
const SAME_SIGNAL_MS = 300

/**
 * @returns the exit code, when the daemon has ended
 * @throws ConfigError, before any socket is bound
 */
export async function serve(config: DaemonConfig, log: Logger, hooks: ServeHooks = {}): Promise<number> {
  const stopped = Promise.withResolvers<number>()
  let daemon: Daemon | undefined
  const abandon = () => leave(daemon)
  const signals = listenToSignals(log, (code) => stopped.resolve(code), abandon)
  // A bug in one place must not leave guests with a half-dead disk: say it and end, the supervisor starts us again.
  process.on('uncaughtException', (error) => {
    log.fatal({ err: error }, 'internal error')
    abandon()
  })
  let operations: OperationsServer | undefined
  try {
    operations = await startOperations(config, () => daemon)
    daemon = await Daemon.start(config, log)
    signals.onHangup(() => daemon?.refresh())
    log.info({ devices: config.devices.length, metrics: operations?.url }, 'ready')
    hooks.ready?.(operations?.url)
    return await Promise.race([stopped.promise, daemon.ended().then(() => EXIT_OK)])
  } finally {
    await operations?.close()
    await daemon?.close()
  }
}

/**
 * Ends the process with EXIT_FAILURE, whatever is in flight. Node joins its workers when it exits, so the iothreads
 * have to end first; one that hangs in the kernel cannot, and then only SIGKILL helps.
 */
function leave(daemon: Daemon | undefined): void {
  setTimeout(() => process.kill(process.pid, 'SIGKILL'), LEAVE_LIMIT_MS)
  void Promise.resolve(daemon?.abandon()).then(() => process.exit(EXIT_FAILURE))
}

/** The address is taken before any socket is bound: a taken port ends the start while there is nothing to undo. */
async function startOperations(
  config: DaemonConfig,
  daemon: () => Daemon | undefined
): Promise<OperationsServer | undefined> {
  if (config.metrics === undefined) return undefined
  const { startOperationsServer } = await import('../ops/http.ts')
  return startOperationsServer(config.metrics, {
    metrics: async () => {
      const { renderMetrics } = await import('../ops/metrics.ts')
      return renderMetrics(daemon()?.snapshot() ?? { devices: [], iothreads: [] })
    },
    health: async () => {
      const running = daemon()
      return running === undefined ? 'starting' : running.health()
    },
  })
}

function listenToSignals(
  log: Logger,
  stop: (code: number) => void,
  abandon: () => void
): { onHangup(handler: () => void): void } {
  let stoppingSince: number | undefined
  let hangup: (() => void) | undefined
  for (const signal of ['SIGTERM', 'SIGINT'] as const) {
    process.on(signal, () => {
      if (stoppingSince !== undefined) {
        if (performance.now() - stoppingSince < SAME_SIGNAL_MS) return
        log.warn({ signal }, 'second signal: leaving at once')
        abandon()
        return
      }
      stoppingSince = performance.now()
      log.info({ signal }, 'stopping')
      stop(EXIT_OK)
      setTimeout(() => {
        log.fatal({}, `requests are still in flight after ${STOP_LIMIT_MS / 1000} s: leaving without them`)
        abandon()
      }, STOP_LIMIT_MS).unref()
    })
  }
  process.on('SIGHUP', () => hangup?.())
  return {
    onHangup: (handler) => {
      hangup = handler
    },
  }
}

/**
 * Runs a daemon until a signal ends it: SIGTERM and SIGINT close it (drain, remove sockets), a second one leaves at once,
 * SIGHUP looks at the backing files again. It also serves /metrics and /healthz when the configuration says so. It must
 * not know where the configuration came from.
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

/** npm, timeout(1) and terminals may deliver one wish twice, to the process and to its group. In milliseconds. */
const SAME_SIGNAL_MS = 300

/**
 * @returns the exit code, when the daemon has ended
 * @throws ConfigError, before any socket is bound
 */
export async function serve(config: DaemonConfig, log: Logger, hooks: ServeHooks = {}): Promise<number> {
  const stopped = Promise.withResolvers<number>()
  const signals = listenToSignals(log, (code) => stopped.resolve(code))
  // A bug in one place must not leave guests with a half-dead disk: say it and end, the supervisor starts us again.
  process.on('uncaughtException', (error) => {
    log.fatal({ err: error }, 'internal error')
    process.exit(EXIT_FAILURE)
  })
  let daemon: Daemon | undefined
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

function listenToSignals(log: Logger, stop: (code: number) => void): { onHangup(handler: () => void): void } {
  let stoppingSince: number | undefined
  let hangup: (() => void) | undefined
  for (const signal of ['SIGTERM', 'SIGINT'] as const) {
    process.on(signal, () => {
      if (stoppingSince !== undefined) {
        if (performance.now() - stoppingSince < SAME_SIGNAL_MS) return
        log.warn({ signal }, 'second signal: leaving at once')
        process.exit(EXIT_FAILURE)
      }
      stoppingSince = performance.now()
      log.info({ signal }, 'stopping')
      stop(EXIT_OK)
    })
  }
  process.on('SIGHUP', () => hangup?.())
  return {
    onHangup: (handler) => {
      hangup = handler
    },
  }
}

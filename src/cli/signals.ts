/**
 * The signals of a process that serves: SIGTERM and SIGINT stop it (ten seconds at most), a second one makes it leave
 * at once, SIGHUP and SIGUSR2 go to who asked for them. It must not know what they do.
 */
import type { Logger } from '../daemon/log.ts'

/**
 * A disk that hangs keeps its requests in flight: who asked us to stop does not wait for it for ever. In
 * milliseconds.
 */
const STOP_LIMIT_MS = 10_000

/** npm, timeout(1) and terminals may deliver one wish twice, to the process and to its group. In milliseconds. */
const SAME_SIGNAL_MS = 300

export interface SignalHandlers {
  /** SIGTERM, SIGINT: once. */
  stop(): void
  /** End at once, whatever is in flight. */
  abandon(): void
  hangup(): void
  handOver(): void
}

/** From now on, none of these ends the process by itself. */
export function listenToSignals(log: Logger, handlers: SignalHandlers): void {
  let stoppingSince: number | undefined
  for (const signal of ['SIGTERM', 'SIGINT'] as const) {
    process.on(signal, () => {
      if (stoppingSince !== undefined) {
        if (performance.now() - stoppingSince < SAME_SIGNAL_MS) return
        log.warn({ signal }, 'second signal: leaving at once')
        handlers.abandon()
        return
      }
      stoppingSince = performance.now()
      log.info({ signal }, 'stopping')
      handlers.stop()
      setTimeout(() => {
        log.fatal({}, `requests are still in flight after ${STOP_LIMIT_MS / 1000} s: leaving without them`)
        handlers.abandon()
      }, STOP_LIMIT_MS).unref()
    })
  }
  process.on('SIGHUP', () => handlers.hangup())
  process.on('SIGUSR2', () => handlers.handOver())
}

/**
 * The daemon's logger: pino, JSON lines, written at once (a line that is lost in a buffer is the one that explains the
 * crash). Lines that a guest can trigger are rate-limited where they are written.
 */
import { type Logger, pino } from 'pino'
import { ConfigError } from '../device/errors.ts'
import type { LogLevel } from './config.ts'

export type { Logger }

/** @param fd where to: 1 stdout (journald, docker), 2 stderr (when stdout is for people) */
export function createLogger(level: LogLevel, fd: 1 | 2 = 1): Logger {
  return pino(
    {
      level,
      base: { pid: process.pid },
      formatters: { level: (label) => ({ level: label }) },
      serializers: { err: errorFields },
      timestamp: pino.stdTimeFunctions.isoTime,
    },
    pino.destination({ fd, sync: true })
  )
}

/** As pino does it; but an operator's mistake is told in full by its message: neither stack nor causes help. */
function errorFields(error: Error): object {
  const fields = pino.stdSerializers.err(error)
  if (!(error instanceof ConfigError)) return fields
  const { stack: _, raw: __, ...rest } = fields
  return { ...rest, message: error.message }
}

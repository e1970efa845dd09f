/**
 * The daemon's logger: pino, JSON lines, written at once (a line that is lost in a buffer is the one that explains the
 * crash). Lines that a guest can trigger are rate-limited where they are written.
 */
import { type Logger, pino } from 'pino'
import type { LogLevel } from './config.ts'

export type { Logger }

/** @param fd where to: 1 stdout (journald, docker), 2 stderr (when stdout is for people) */
export function createLogger(level: LogLevel, fd: 1 | 2 = 1): Logger {
  return pino(
    {
      level,
      base: { pid: process.pid },
      formatters: { level: (label) => ({ level: label }) },
      timestamp: pino.stdTimeFunctions.isoTime,
    },
    pino.destination({ fd, sync: true })
  )
}

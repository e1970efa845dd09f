/**
 * The options that are not a device's own: those of the daemon, and those of a device's listener; and the parsers of
 * their little languages (processor lists, the address of the metrics server).
 */
import * as v from 'valibot'
import { ConfigError } from '../device/errors.ts'
import type { MetricsAddress } from '../ops/http.ts'

/** The most bytes that a socket path may have: `sun_path` of sockaddr_un without the final NUL. */
export const MAX_SOCKET_PATH = 107

export const LOG_LEVELS = ['fatal', 'error', 'warn', 'info', 'debug', 'trace', 'silent'] as const

/**
 * Twice QEMU's: the round trip to an interrupt-driven driver and back takes 25 µs of waking it, and with 32 a sleep of our
 * own on top (47 µs) makes that look like not worth polling. 64 instead of 32: 62 k IOPS instead of 18 k at depth 1.
 */
export const DEFAULT_POLL_MAX_US = 64

/** Options of the process: flags of every serving command and the top level of a configuration file. */
export const daemonOptions = v.strictObject({
  iothreads: v.optional(
    v.pipe(
      v.number(),
      v.integer(),
      v.minValue(1),
      v.maxValue(64),
      v.description('How many threads serve virtqueues; the queues of all devices are spread over them'),
      v.metadata({ placeholder: 'N' })
    ),
    1
  ),
  'iothread-cpus': v.exactOptional(
    v.pipe(
      v.string(),
      v.regex(
        /^\d{1,4}([-+]\d{1,4})*(,\d{1,4}([-+]\d{1,4})*)*$/,
        'Give one item per iothread, separated by commas, each a processor (2), a range (2-5) or a sum of these (0+4-6)'
      ),
      v.description(
        'The processors of each iothread, one item per iothread: 2,3 or 0-3,4-7 or 0+2; a single item holds for all'
      ),
      v.metadata({ placeholder: 'LIST', unset: 'any' })
    )
  ),
  'poll-max-us': v.optional(
    v.pipe(
      v.number(),
      v.integer(),
      v.minValue(0),
      v.maxValue(1_000_000),
      v.description('The longest that an iothread polls for work before it sleeps, in microseconds; 0 = never polls'),
      v.metadata({ placeholder: 'N' })
    ),
    DEFAULT_POLL_MAX_US
  ),
  metrics: v.exactOptional(
    v.pipe(
      v.string(),
      v.minLength(1),
      v.description('Serve /metrics (Prometheus) and /healthz on HOST:PORT, :PORT (loopback only) or unix:PATH'),
      v.metadata({ placeholder: 'HOST:PORT', unset: 'not served' })
    )
  ),
  'log-level': v.optional(
    v.pipe(
      v.picklist(LOG_LEVELS),
      v.description('The least important log lines to print'),
      v.metadata({ placeholder: 'LEVEL' })
    ),
    'info'
  ),
})

export type DaemonOptions = v.InferOutput<typeof daemonOptions>

/** Where a device listens: one of the two is required. */
export const listenerOptions = v.strictObject({
  'socket-path': v.exactOptional(
    v.pipe(
      v.string(),
      v.minLength(1),
      v.description('The unix socket to listen on; it is created, and a stale one is replaced'),
      v.metadata({ placeholder: 'PATH', path: true })
    )
  ),
  fd: v.exactOptional(
    v.pipe(
      v.number(),
      v.integer(),
      v.minValue(0),
      v.maxValue(2 ** 31 - 1),
      v.description('Instead of --socket-path: an inherited socket, listening or connected'),
      v.metadata({ placeholder: 'N' })
    )
  ),
})

export type ListenerOptions = v.InferOutput<typeof listenerOptions>

/**
 * Parses `--iothread-cpus`.
 * @returns one sorted set of processor numbers per iothread
 * @throws ConfigError when the number of items is neither 1 nor `iothreads`, or a range is reversed
 */
export function parseIothreadCpus(text: string, iothreads: number, option: string): number[][] {
  const items = text.split(',').map((item) => parseCpuSet(item, option))
  if (items.length === 1) return Array.from({ length: iothreads }, () => [...items[0]!])
  if (items.length !== iothreads) {
    throw new ConfigError(
      'ERR_OPTION_VALUE',
      option,
      `${items.length} items for ${iothreads} iothread${iothreads === 1 ? '' : 's'}`,
      `Give one item per iothread, or a single one for all; 0-3 or 0+2 is one item of several processors.`
    )
  }
  return items
}

function parseCpuSet(item: string, option: string): number[] {
  const cpus = new Set<number>()
  for (const part of item.split('+')) {
    const [first = Number.NaN, last = first, ...rest] = part.split('-').map(Number)
    if (!(first <= last) || rest.length > 0) {
      throw new ConfigError('ERR_OPTION_VALUE', option, `${part} is no range of processors`, 'Give it as FIRST-LAST.')
    }
    for (let cpu = first; cpu <= last; cpu++) cpus.add(cpu)
  }
  return [...cpus].sort((a, b) => a - b)
}

/**
 * Parses `--metrics`: `127.0.0.1:9400`, `[::1]:9400`, `localhost:9400`, `:9400` (loopback), `unix:PATH`. Port 0 = any
 * free port.
 * @throws ConfigError
 */
export function parseMetricsAddress(text: string, option: string): MetricsAddress {
  if (text.startsWith('unix:') && text.length > 5) return { path: checkSocketPath(text.slice(5), option) }
  const match = /^(?:\[([0-9a-fA-F:.]+)\]|([^:[\]/]*)):(\d{1,5})$/.exec(text)
  const port = Number(match?.[3])
  if (match === null || port > 65535) {
    throw new ConfigError(
      'ERR_OPTION_VALUE',
      option,
      `${JSON.stringify(text)} is no address`,
      'Give HOST:PORT such as 127.0.0.1:9400 or [::1]:9400, :PORT for loopback only, or unix:PATH.'
    )
  }
  return { host: match[1] ?? (match[2] || '127.0.0.1'), port }
}

/** @throws ConfigError when the kernel could not bind the path: it would be cut off */
export function checkSocketPath(path: string, option: string): string {
  const length = Buffer.byteLength(path)
  if (length > MAX_SOCKET_PATH) {
    throw new ConfigError(
      'ERR_SOCKET_PATH_LENGTH',
      option,
      `the path has ${length} bytes and a unix socket's has at most ${MAX_SOCKET_PATH}`,
      'Give a shorter one, for example below /run.'
    )
  }
  if (path.includes('\0')) {
    throw new ConfigError('ERR_OPTION_VALUE', option, 'the path has a NUL byte', 'Give a path in the file system.')
  }
  return path
}

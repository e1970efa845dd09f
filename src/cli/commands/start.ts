/**
 * `virtiod start`: the first minute with virtiod. Serves a demonstration disk, made on the spot, and prints what to copy:
 * the QEMU line and a look at the metrics. Text for people goes to stdout, logs to stderr.
 */
import { closeSync, ftruncateSync, openSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, relative, resolve } from 'node:path'
import * as v from 'valibot'
import { configFromFlags, type DaemonConfig } from '../../daemon/config.ts'
import { devices } from '../../daemon/devices.ts'
import { checkValues } from '../../daemon/option-table.ts'
import { daemonOptions, MAX_SOCKET_PATH } from '../../daemon/options.ts'
import { formatQemuArguments, qemuArguments, shellQuote } from '../../daemon/qemu-args.ts'
import { ConfigError } from '../../device/errors.ts'
import type { Command } from '../command.ts'
import { attachment } from './qemu-args.ts'

const SOCKET_NAME = 'virtiod-demo.sock'
const MEMORY = '1G'

const demoOptions = v.strictObject({
  'blk-file': v.optional(
    v.pipe(
      v.string(),
      v.minLength(1),
      v.description('The disk image; it is created (sparse) if there is none'),
      v.metadata({ placeholder: 'PATH', path: true })
    ),
    'virtiod-demo.img'
  ),
  size: v.optional(
    v.pipe(
      v.number(),
      v.integer(),
      v.minValue(1024 ** 2),
      v.maxValue(1024 ** 5),
      v.description('The size of an image that is created, in bytes or with a suffix: 512M, 10G'),
      v.metadata({ placeholder: 'SIZE', size: true })
    ),
    1024 ** 3
  ),
  'socket-path': v.exactOptional(
    v.pipe(
      v.string(),
      v.minLength(1),
      v.description('The unix socket to listen on'),
      v.metadata({ placeholder: 'PATH', path: true, unset: `./${SOCKET_NAME}` })
    )
  ),
})

/** The daemon's options, with defaults for somebody who looks on. */
const watchedOptions = v.strictObject({
  ...daemonOptions.entries,
  metrics: v.optional(daemonOptions.entries.metrics.wrapped, '127.0.0.1:9400'),
  'log-level': v.optional(daemonOptions.entries['log-level'].wrapped, 'warn'),
})

export const startCommand: Command = {
  name: 'start',
  description:
    'Serve a demonstration disk until ^C: creates a sparse image if there is none, listens on a socket, serves /metrics on ' +
    'loopback (port 9400), and prints the exact QEMU arguments to copy. Logs go to stderr.',
  usage: ['[options]'],
  positionals: [],
  scopes: [
    { title: 'Demonstration options', table: demoOptions },
    { title: 'Daemon options', table: watchedOptions },
  ],
  run: async ({ values }) => {
    const demo = checkValues(demoOptions, values, (name) => `--${name}`) as v.InferOutput<typeof demoOptions>
    const watched = checkValues(watchedOptions, values, (name) => `--${name}`) as Record<string, unknown>
    const image = resolve(demo['blk-file'])
    const { size: _, ...rest } = values
    const config = configFromFlags(await devices['blk']!.load(), {
      ...rest,
      ...watched,
      'blk-file': image,
      'socket-path': resolve(demo['socket-path'] ?? defaultSocket()),
    })
    const created = createImage(image, demo.size)
    const [{ serve }, { createLogger }] = await Promise.all([import('../serve.ts'), import('../../daemon/log.ts')])
    const qemu = formatQemuArguments(qemuArguments([await attachment(config.devices[0]!)], MEMORY))
    return serve(config, createLogger(config.logLevel, 2), {
      ready: (url) => process.stdout.write(welcome(image, created, config, qemu, url)),
    })
  },
}

/** Here, or where the path is short enough for a socket. */
function defaultSocket(): string {
  const here = resolve(SOCKET_NAME)
  if (Buffer.byteLength(here) <= MAX_SOCKET_PATH) return here
  return join(process.env['XDG_RUNTIME_DIR'] ?? tmpdir(), SOCKET_NAME)
}

/** @returns whether there was none */
function createImage(path: string, size: number): boolean {
  let fd: number
  try {
    fd = openSync(path, 'wx', 0o644)
  } catch (cause) {
    const { code } = cause as NodeJS.ErrnoException
    if (code === 'EEXIST') return false
    const fix = 'Give a path in a directory that exists and that you may write to.'
    throw new ConfigError('ERR_DEMO_IMAGE', '--blk-file', `cannot create ${path} (${code})`, fix, { cause })
  }
  try {
    ftruncateSync(fd, size)
  } finally {
    closeSync(fd)
  }
  return true
}

function welcome(
  image: string,
  created: boolean,
  config: DaemonConfig,
  qemu: string,
  metricsUrl: string | undefined
): string {
  const socket = config.devices[0]!.socket
  const path = 'path' in socket ? socket.path : ''
  const lines = [
    `virtiod serves ${image}${created ? ' (created, sparse)' : ''}`,
    `on the socket ${path}.`,
    '',
    'Attach it to a guest: add your boot disk or kernel to',
    '',
    `qemu-system-${process.arch === 'arm64' ? 'aarch64 -machine virt' : 'x86_64'} -accel kvm -accel tcg \\`,
    qemu,
    'Look at it while it runs:',
    '',
  ]
  if (metricsUrl?.startsWith('http') === true) lines.push(`  curl -s ${metricsUrl}/metrics | grep virtiod_`)
  if (metricsUrl?.startsWith('unix:') === true) {
    lines.push(`  curl -s --unix-socket ${metricsUrl.slice(5)} http://localhost/metrics | grep virtiod_`)
  }
  const here = relative(process.cwd(), path)
  lines.push(`  npx virtiod probe ${shellQuote(here.startsWith('..') ? path : here)}`, '', 'Stop it with ^C.', '')
  return lines.join('\n')
}

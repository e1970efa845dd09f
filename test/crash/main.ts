/**
 * `npm run crash`: the survival tests without bounds. `-- [kill] --kills 1000 --seed 7 --packed` kills virtiod under a
 * verifying load; `-- reconnects --count 10000` lets front-ends come and go; `-- reloads --count 100` changes the module
 * of a disk. It owns the command line.
 */
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { Daemon } from './daemon.ts'
import { killRepeatedly } from './kill-run.ts'
import { describeFootprint, footprint, reconnect, sessionVariants } from './reconnects.ts'
import { reloadRepeatedly } from './reloads.ts'

const USAGE = `Usage: npm run crash -- [kill] [options]
       npm run crash -- reconnects [--count N] [--seed N] [--directory PATH]
       npm run crash -- reloads [--count N] [--inflight] [options but --kills, --cache, --rest-every]

  --kills N          how often virtiod is killed (default 100)
  --seed N           of requests and schedule (default: the time)
  --packed           packed rings
  --in-order         IN_ORDER
  --queues N         default 2
  --depth N          requests in flight per queue (default 24)
  --size MIB         of the disk (default 16)
  --serve-ms N       the longest that a process serves (default 50)
  --cache MODE       none, writethrough, writeback, or mix: another one each time (default mix)
  --engine NAME      io_uring, emulated, or mix (default mix)
  --rest-every N     kills between two complete rests (default 20)
  --directory PATH   where the image lies (default /var/tmp)
`

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    kills: { type: 'string', default: '100' },
    seed: { type: 'string', default: String(Date.now() % 2 ** 31) },
    packed: { type: 'boolean', default: false },
    'in-order': { type: 'boolean', default: false },
    inflight: { type: 'boolean', default: false },
    queues: { type: 'string', default: '2' },
    depth: { type: 'string', default: '24' },
    size: { type: 'string', default: '16' },
    'serve-ms': { type: 'string', default: '50' },
    cache: { type: 'string', default: 'mix' },
    engine: { type: 'string', default: 'mix' },
    'rest-every': { type: 'string', default: '20' },
    count: { type: 'string', default: '10000' },
    directory: { type: 'string', default: '/var/tmp' },
    help: { type: 'boolean', default: false },
  },
})

const say = (text: string): void => void process.stdout.write(`${text}\n`)

function whole(name: 'kills' | 'seed' | 'queues' | 'depth' | 'size' | 'serve-ms' | 'rest-every' | 'count'): number {
  const value = Number(values[name])
  if (!Number.isInteger(value) || value < (name === 'seed' || name === 'serve-ms' ? 0 : 1)) {
    throw new TypeError(`--${name}: ${values[name]} is no number that it can be`)
  }
  return value
}

function oneOf<T extends string>(name: 'cache' | 'engine', words: readonly T[]): T {
  const found = words.find((word) => word === values[name])
  if (found === undefined) throw new TypeError(`--${name}: ${values[name]} is none of ${words.join(', ')}`)
  return found
}

async function kill(): Promise<void> {
  const seed = whole('seed')
  const format = `${values.packed ? 'packed' : 'split'}${values['in-order'] ? ', in order' : ''}`
  say(`seed ${seed}: ${values.kills} kills, ${format}, ${values.queues} queues, depth ${values.depth}`)
  const result = await killRepeatedly({
    kills: whole('kills'),
    seed,
    packed: values.packed,
    inOrder: values['in-order'],
    queues: whole('queues'),
    depth: whole('depth'),
    bytes: whole('size') * 2 ** 20,
    maxServeMs: whole('serve-ms'),
    cache: oneOf('cache', ['none', 'writethrough', 'writeback', 'mix']),
    engine: oneOf('engine', ['io_uring', 'emulated', 'mix']),
    restEvery: whole('rest-every'),
    directory: values.directory,
    say,
  })
  say(
    `${result.starting + result.resuming + result.serving} kills in ${(result.milliseconds / 1000).toFixed(1)} s ` +
      `(${result.starting} while it started, ${result.resuming} while it took the session over, ` +
      `${result.serving} while it served; it starts in ${result.startMs.toFixed(0)} ms), seed ${seed}, ${format}`
  )
  say(
    `${result.requests} requests, each completed once; ${result.survivors} of them were in flight at a kill, ` +
      `one over ${result.longestSurvivor} processes; ${result.sectorsRead} sectors read back, all right`
  )
}

async function reconnects(): Promise<void> {
  const directory = mkdtempSync(join(values.directory, 'virtiod-reconnects-'))
  try {
    const image = join(directory, 'disk.img')
    writeFileSync(image, '')
    truncateSync(image, 4 * 2 ** 20)
    const args = ['blk', '--blk-file', image, '--num-queues', '2', '--log-level', 'fatal']
    const daemon = new Daemon(join(directory, 's'), args, join(directory, 'log'))
    await daemon.listening()
    const count = whole('count')
    const tell = (done: number): void => {
      if (daemon.hasEnded) throw new Error(`virtiod ended:\n${daemon.log}`)
      if (done % Math.ceil(count / 10) === 0) say(`${done} sessions: ${describeFootprint(footprint(daemon.pid))}`)
    }
    tell(0)
    await reconnect(daemon.socket, count, whole('seed'), sessionVariants, tell)
    await new Promise((resolve) => setTimeout(resolve, 1000))
    say(`a second later: ${describeFootprint(footprint(daemon.pid))}`)
    const { code, signal } = await daemon.stop()
    if (code !== 0) throw new Error(`virtiod ended with ${code ?? signal}:\n${daemon.log}`)
  } finally {
    rmSync(directory, { recursive: true, force: true })
  }
}

async function reloads(): Promise<void> {
  const seed = whole('seed')
  const words = [
    values.packed ? 'packed' : 'split',
    values['in-order'] && 'in order',
    values.inflight && 'in-flight buffer',
  ]
  const format = words.filter((word) => word !== false).join(', ')
  say(`seed ${seed}: ${values.count} reloads, ${format}, ${values.queues} queues, depth ${values.depth}`)
  const result = await reloadRepeatedly({
    count: whole('count'),
    seed,
    packed: values.packed,
    inOrder: values['in-order'],
    inflight: values.inflight,
    queues: whole('queues'),
    depth: whole('depth'),
    bytes: whole('size') * 2 ** 20,
    maxServeMs: whole('serve-ms'),
    engine: values.engine === 'emulated' ? 'emulated' : 'io_uring',
    directory: values.directory,
    say,
  })
  say(
    `${values.count} reloads in ${(result.milliseconds / 1000).toFixed(1)} s, seed ${seed}, ${format}; ` +
      `the guest waited ${result.medianPauseMs.toFixed(1)} ms in the median and ${result.longestPauseMs.toFixed(1)} ms at most`
  )
  say(`${result.requests} requests, each completed once; ${result.sectorsRead} sectors read back, all right`)
}

try {
  const [command = 'kill', ...others] = positionals
  const commands = new Map([
    ['kill', kill],
    ['reconnects', reconnects],
    ['reloads', reloads],
  ])
  const run = commands.get(command)
  if (values.help) say(USAGE)
  else if (run === undefined || others.length > 0) throw new TypeError(`${positionals.join(' ')}: no such thing`)
  else await run()
} catch (error) {
  process.stderr.write(`${error instanceof TypeError ? `${error.message}\n${USAGE}` : (error as Error).stack}\n`)
  process.exitCode = error instanceof TypeError ? 2 : 1
}

/**
 * The disks of `npm run bench`: virtiod and qemu-storage-daemon side by side on one page-cached file, in alternating short
 * measurements, virtiod beside itself with and without a feature or as another device, and fio on the file itself. It owns the test file, the
 * order of the rounds and the tables.
 *
 * Placement decides latency, so each back-end is pinned to one processor and the load generator to another. Each case
 * runs both back-ends right after one another, and a ratio is taken within a round: what the machine does meanwhile
 * hits both.
 */
import { execFile } from 'node:child_process'
import { randomFillSync } from 'node:crypto'
import { closeSync, existsSync, fsyncSync, openSync, readSync, rmSync, statfsSync, statSync, writeSync } from 'node:fs'
import { availableParallelism, cpus, loadavg, release, tmpdir } from 'node:os'
import { dirname, extname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import type { BenchOptions, BenchResult } from './bench.ts'
import type { Rival } from './rivals.ts'
import { commandExists, qemuRival, RunningRival, runFio, virtiodRival, virtiodScsiRival } from './rivals.ts'

const run = promisify(execFile)

/** One line of a table. `goal`: the least ratio of IOPS to the other side that virtiod is meant to reach. */
export interface CompareCase {
  readonly name: string
  readonly options: BenchOptions
  /** The other side is virtiod too, with these options, and not qemu-storage-daemon. */
  readonly against?: BenchOptions
  readonly goal?: number
  /** Most CPU per request as a ratio to the other side. */
  readonly cpuGoal?: number
}

const k4 = (rw: BenchOptions['rw'], qd: number, driver: BenchOptions['driver']): BenchOptions => ({
  ...(rw && { rw }),
  bs: 4096,
  qd,
  ...(driver && { driver }),
})

export const CASES: readonly CompareCase[] = [
  { name: 'randread-4k-qd1-poll', options: k4('randread', 1, 'poll'), goal: 1.5 },
  { name: 'randread-4k-qd32-poll', options: k4('randread', 32, 'poll'), goal: 2, cpuGoal: 0.5 },
  { name: 'randread-4k-qd128-poll', options: k4('randread', 128, 'poll'), goal: 2.5 },
  { name: 'randread-4k-qd1-irq', options: k4('randread', 1, 'irq'), goal: 1.5 },
  { name: 'randread-4k-qd32-irq', options: k4('randread', 32, 'irq'), goal: 2, cpuGoal: 0.5 },
  { name: 'randread-4k-qd128-irq', options: k4('randread', 128, 'irq'), goal: 2.5 },
  { name: 'read-128k-qd16-poll', options: { rw: 'read', bs: 131072, qd: 16, driver: 'poll' }, goal: 1 },
  { name: 'randwrite-4k-qd32-poll', options: k4('randwrite', 32, 'poll'), goal: 1.5 },
  { name: 'write-128k-qd16-poll', options: { rw: 'write', bs: 131072, qd: 16, driver: 'poll' }, goal: 1 },
]

/** A feature of virtiod's on beside off, in the same case: what it costs or brings. */
function beside(
  feature: keyof BenchOptions,
  rw: 'randread' | 'randwrite',
  qd: number,
  driver: 'poll' | 'irq'
): CompareCase {
  const off = k4(rw, qd, driver)
  return {
    name: `${feature.toLowerCase()}-${rw}-4k-qd${qd}-${driver}`,
    options: { ...off, [feature]: true },
    against: off,
  }
}

/** The same file as LUN of a SCSI device, beside the block device. */
function scsi(rw: 'randread' | 'randwrite', qd: number, driver: 'poll' | 'irq'): CompareCase {
  const disk = k4(rw, qd, driver)
  return { name: `scsi-${rw}-4k-qd${qd}-${driver}`, options: { ...disk, device: 'scsi' }, against: disk, goal: 0.8 }
}

const packed = { goal: 1 }
const inflight = { goal: 0.95, cpuGoal: 1.05 }

export const OWN_CASES: readonly CompareCase[] = [
  { ...beside('packed', 'randread', 1, 'poll'), ...packed },
  { ...beside('packed', 'randread', 32, 'poll'), ...packed },
  { ...beside('packed', 'randread', 128, 'poll'), ...packed },
  { ...beside('packed', 'randread', 32, 'irq'), ...packed },
  { ...beside('packed', 'randwrite', 32, 'poll'), ...packed },
  beside('inOrder', 'randread', 32, 'poll'),
  beside('inOrder', 'randwrite', 32, 'poll'),
  { ...beside('inflight', 'randread', 32, 'poll'), ...inflight },
  { ...beside('inflight', 'randread', 32, 'irq'), ...inflight },
  { ...beside('inflight', 'randwrite', 32, 'poll'), ...inflight },
  {
    name: 'inflight-packed-randread-4k-qd32-poll',
    options: { ...k4('randread', 32, 'poll'), packed: true, inflight: true },
    against: { ...k4('randread', 32, 'poll'), packed: true },
    ...inflight,
  },
  beside('log', 'randread', 32, 'poll'),
  beside('log', 'randwrite', 32, 'poll'),
  scsi('randread', 1, 'poll'),
  scsi('randread', 32, 'poll'),
  scsi('randwrite', 32, 'poll'),
  scsi('randread', 32, 'irq'),
]

/** fio compares with this case. */
const FIO_CASE = 'randread-4k-qd32-poll'
const FIO_GOAL = 0.9

export interface CompareOptions {
  readonly rounds: number
  readonly seconds: number
  /** Substrings of case names; empty = all. */
  readonly cases: readonly string[]
  readonly file: string
  /** Bytes of the file. */
  readonly size: number
  readonly keep: boolean
  readonly built: boolean
  readonly fio: boolean
  readonly indirect: boolean
  readonly cpu: { readonly backend: number; readonly frontend: number }
  readonly log: (line: string) => void
}

/** Everything that was measured: rounds × cases × back-ends. */
export interface CompareResult {
  readonly names: readonly [string, string]
  readonly cases: readonly {
    readonly case: CompareCase
    readonly rounds: readonly (readonly [BenchResult, BenchResult])[]
  }[]
  readonly fio: readonly { readonly iops: number; readonly cpuPerRequest: number }[]
  /** Per round: milliseconds to the socket, resident bytes when idle. */
  readonly start: readonly (readonly [Started, Started])[]
  /** The machine's load average (1 minute) before the first round. */
  readonly load: number
}

interface Started {
  readonly readyMs: number
  readonly rss: number
}

/** The cases whose name has one of `words` in it; all without words. */
export function chosen<Case extends { readonly name: string }>(
  cases: readonly Case[],
  words: readonly string[]
): readonly Case[] {
  return cases.filter((one) => words.length === 0 || words.some((word) => one.name.includes(word)))
}

/** Runs the rounds of the disks. @throws Error with a sentence when the machine or the file won't do */
export async function compare(options: CompareOptions): Promise<CompareResult> {
  const ours = virtiodRival(options.built)
  const ourScsi = virtiodScsiRival(options.built)
  const theirs = qemuRival()
  const cases = chosen([...CASES, ...OWN_CASES], options.cases)
  await checkMachine(
    options,
    cases.some((one) => one.against === undefined)
  )
  const [load = 0] = loadavg()
  if (load > 0.5)
    options.log(`the machine is busy (load average ${load.toFixed(1)}): trust the ratios less, and the IOPS not at all`)
  const created = prepareFile(options.file, options.size, options.log)
  const results = cases.map((one) => ({ case: one, rounds: [] as [BenchResult, BenchResult][] }))
  const fio: { iops: number; cpuPerRequest: number }[] = []
  const start: [Started, Started][] = []
  try {
    for (let round = 0; round < options.rounds; round++) {
      for (const result of results) {
        const pair: [BenchResult?, BenchResult?] = []
        const began: [Started?, Started?] = []
        for (const which of round % 2 === 0 ? ([0, 1] as const) : ([1, 0] as const)) {
          const { against, options: on } = result.case
          const measured =
            which === 0
              ? await measure(on.device === 'scsi' ? ourScsi : ours, result.case.name, on, options)
              : await measure(against === undefined ? theirs : ours, result.case.name, against ?? on, options)
          pair[which] = measured.result
          began[which] = measured.started
        }
        const [one, other] = pair as [BenchResult, BenchResult]
        result.rounds.push([one, other])
        if (result.case.against === undefined) start.push(began as [Started, Started])
        options.log(
          `round ${round + 1}/${options.rounds}  ${result.case.name.padEnd(24)} ` +
            `${kilo(one.iops)} : ${kilo(other.iops)} k  = ${(one.iops / other.iops).toFixed(2)}`
        )
      }
      if (options.fio) {
        const one = await runFio(options.file, options.cpu.backend, options.seconds)
        fio.push(one)
        options.log(`round ${round + 1}/${options.rounds}  fio on the file itself   ${kilo(one.iops)} k`)
      }
    }
  } finally {
    if (created && !options.keep) rmSync(options.file, { force: true })
  }
  return { names: [ours.name, theirs.name], cases: results, fio, start, load }
}

async function measure(
  rival: Rival,
  name: string,
  settings: BenchOptions,
  options: CompareOptions
): Promise<{ result: BenchResult; started: Started }> {
  const socket = join(tmpdir(), `virtiod-compare-${process.pid}.sock`)
  const backend = await RunningRival.start(rival, options.file, socket, options.cpu.backend)
  try {
    const rss = backend.residentBytes
    if (settings.rw?.endsWith('write') === true) dirtyFile(options.file)
    const child = join(dirname(fileURLToPath(import.meta.url)), `bench-child${extname(fileURLToPath(import.meta.url))}`)
    const bench: BenchOptions = {
      ...settings,
      seconds: options.seconds,
      size: options.size,
      indirect: options.indirect,
    }
    const { stdout } = await run('taskset', [
      '-c',
      String(options.cpu.frontend),
      process.execPath,
      child,
      socket,
      JSON.stringify(bench),
    ])
    const result = JSON.parse(stdout) as BenchResult
    if (result.errors > 0) throw new Error(`${rival.name}: ${result.errors} requests of ${name} failed`)
    return { result, started: { readyMs: backend.readyMs, rss } }
  } finally {
    await backend.stop()
    // Dirty pages of one measurement must not be written back during the next.
    if (settings.rw?.endsWith('write') === true) syncFile(options.file)
  }
}

/** @throws Error with a sentence when a comparison can't be pinned */
export async function checkProcessors({ backend, frontend }: CompareOptions['cpu']): Promise<void> {
  if (!(await commandExists('taskset'))) throw new Error('taskset is missing. Install it: apt-get install util-linux')
  if (backend === frontend || Math.max(backend, frontend) >= cpus().length || availableParallelism() < 2) {
    throw new Error('the comparison needs two processors, one for the back-end and one for the load: see --cpus')
  }
}

async function checkMachine(options: CompareOptions, qemu: boolean): Promise<void> {
  await checkProcessors(options.cpu)
  if (qemu && !(await commandExists('qemu-storage-daemon')))
    throw new Error('qemu-storage-daemon is missing. Install it: apt-get install qemu-system-common')
  if (options.fio && !(await commandExists('fio')))
    throw new Error('fio is missing. Install it (apt-get install fio) or pass --no-fio')
}

const TMPFS_MAGIC = 0x0102_1994
const RAMFS_MAGIC = 0x8584_58f6

/**
 * Makes the file (random contents, fully written) and brings it into the page cache. Returns whether it was created.
 */
function prepareFile(file: string, size: number, log: (line: string) => void): boolean {
  const { type } = statfsSync(dirname(file))
  if (type === TMPFS_MAGIC || type === RAMFS_MAGIC) {
    throw new Error(
      `${file} is on tmpfs, where io_uring hands every read to a worker thread: choose a place on a real file system (--file)`
    )
  }
  const exists = existsSync(file)
  if (exists && statSync(file).size !== size) {
    throw new Error(
      `${file} exists and has ${statSync(file).size} bytes instead of ${size}: remove it, or choose another one (--file, --size)`
    )
  }
  const chunk = Buffer.allocUnsafe(4 * 2 ** 20)
  const fd = openSync(file, exists ? 'r+' : 'wx+')
  try {
    if (!exists) {
      log(`writing ${file}, ${size / 2 ** 20} MiB`)
      // In pieces of 4 KiB, so that the page cache holds single pages. Written in large pieces it holds large folios,
      // and then ext4 needs 39 µs instead of 5 for each 4 KiB write into one (Linux 6.18): the kernel would be
      // measured, not the back-end.
      for (let at = 0; at < size; at += 4096) {
        const from = at % chunk.length
        if (from === 0) randomFillSync(chunk, 0, 65536)
        writeSync(fd, chunk, from, Math.min(4096, size - at), at)
      }
      fsyncSync(fd)
    }
    for (let at = 0; at < size; at += chunk.length) readSync(fd, chunk, 0, chunk.length, at)
  } finally {
    closeSync(fd)
  }
  return !exists
}

/**
 * Rewrites the file with what is in it: every page is dirty afterwards. Otherwise a short write benchmark measures
 * what the file system does at the first write to a clean page, which has nothing to do with the back-end.
 */
function dirtyFile(file: string): void {
  const fd = openSync(file, 'r+')
  const chunk = Buffer.allocUnsafe(4 * 2 ** 20)
  try {
    for (let at = 0; ; at += chunk.length) {
      const count = readSync(fd, chunk, 0, chunk.length, at)
      if (count === 0) return
      writeSync(fd, chunk, 0, count, at)
    }
  } finally {
    closeSync(fd)
  }
}

function syncFile(file: string): void {
  const fd = openSync(file, 'r+')
  fsyncSync(fd)
  closeSync(fd)
}

// ---- the table

/** The middle of the numbers; the mean of the two middle ones when their count is even. */
export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b)
  const middle = sorted.length >> 1
  return sorted.length % 2 === 1
    ? (sorted[middle] ?? Number.NaN)
    : ((sorted[middle - 1] ?? Number.NaN) + (sorted[middle] ?? Number.NaN)) / 2
}

/** `**median** (least–greatest)`. */
export function spread(values: readonly number[]): string {
  return `**${median(values).toFixed(2)}** (${Math.min(...values).toFixed(2)}–${Math.max(...values).toFixed(2)})`
}

/** In thousands. */
export function kilo(value: number): string {
  return (value / 1000).toFixed(value < 100_000 ? 1 : 0)
}

/** The result as a Markdown page. */
export function formatComparison(
  result: CompareResult,
  options: Pick<CompareOptions, 'rounds' | 'seconds' | 'size' | 'cpu' | 'built' | 'indirect'>
): string {
  const [ours, theirs] = result.names
  const rivals = result.cases.filter((one) => one.case.against === undefined)
  const own = result.cases.filter((one) => one.case.against !== undefined)
  const machine =
    `${new Date().toISOString().slice(0, 10)}, ${cpus()[0]?.model ?? 'unknown processor'} × ${cpus().length}, Linux ${release()}, Node ${process.version}. ` +
    `${options.rounds} alternating rounds of ${options.seconds} s per measurement; ${options.size / 2 ** 20} MiB file in the page cache; ` +
    `writes go to pages that are dirty already; back-end on processor ${options.cpu.backend}, load on processor ${options.cpu.frontend}; one queue, one iothread` +
    `${options.indirect ? ', indirect descriptors' : ''}. Medians; ratios are taken within a round, with their least and greatest. Load average before: ${result.load.toFixed(1)}.`
  const lines: string[] = []
  if (rivals.length > 0) {
    lines.push(`# ${ours} and ${theirs} on the same file`, '', machine, '', ...table(rivals, ours, theirs), '')
  }
  lines.push(...formatFio(result), ...formatStart(result))
  if (own.length > 0) {
    lines.push(`# ${ours} with a feature and without`, '')
    if (rivals.length === 0) lines.push(machine, '')
    lines.push(...table(own, 'with', 'without'), '')
  }
  return `${lines.join('\n')}\n`
}

function table(cases: CompareResult['cases'], first: string, second: string): string[] {
  const lines = [
    `| case | ${first} k IOPS | ${second} k IOPS | IOPS ratio | goal | p50 µs | p99 µs | CPU µs/request | CPU ratio |`,
    '|---|---|---|---|---|---|---|---|---|',
  ]
  for (const one of cases) {
    const { goal, cpuGoal } = one.case
    const of = (which: 0 | 1, take: (value: BenchResult) => number): number =>
      median(one.rounds.map((pair) => take(pair[which])))
    const ratios = one.rounds.map(([a, b]) => a.iops / b.iops)
    const cpu = one.rounds.map(([a, b]) => (a.cpuPerRequest ?? Number.NaN) / (b.cpuPerRequest ?? Number.NaN))
    const pair = (take: (value: BenchResult) => number, digits: number): string =>
      `${of(0, take).toFixed(digits)} : ${of(1, take).toFixed(digits)}`
    lines.push(
      `| ${one.case.name} | ${kilo(of(0, (r) => r.iops))} | ${kilo(of(1, (r) => r.iops))} | ${spread(ratios)} ` +
        `| ${goal === undefined ? '' : `≥ ${goal} ${mark(median(ratios) >= goal)}`} ` +
        `| ${pair((r) => r.latency.p50, 1)} | ${pair((r) => r.latency.p99, 1)} | ${pair((r) => r.cpuPerRequest ?? Number.NaN, 2)} ` +
        `| ${spread(cpu)}${cpuGoal === undefined ? '' : ` ≤ ${cpuGoal} ${mark(median(cpu) <= cpuGoal)}`} |`
    )
  }
  return lines
}

function formatFio(result: CompareResult): string[] {
  const base = result.cases.find((one) => one.case.name === FIO_CASE)
  if (result.fio.length === 0) return []
  const iops = median(result.fio.map((one) => one.iops))
  const line = `fio (io_uring, direct=0, 4k random read, iodepth 32) on the file itself, on the back-end's processor: ${kilo(iops)} k IOPS, ${median(result.fio.map((one) => one.cpuPerRequest)).toFixed(2)} µs CPU per request.`
  if (base === undefined) return [line, '']
  const ratios = base.rounds.map(([a], i) => a.iops / (result.fio[i]?.iops ?? Number.NaN))
  return [
    `${line} ${result.names[0]} through its ring to that: ${spread(ratios)}, goal ≥ ${FIO_GOAL} ${mark(median(ratios) >= FIO_GOAL)}.`,
    '',
  ]
}

function formatStart(result: CompareResult): string[] {
  if (result.start.length === 0) return []
  const of = (which: 0 | 1, take: (one: Started) => number): number =>
    median(result.start.map((pair) => take(pair[which])))
  const one = (which: 0 | 1): string =>
    `${result.names[which]} ${of(which, (s) => s.readyMs).toFixed(0)} ms, ${(of(which, (s) => s.rss) / 2 ** 20).toFixed(0)} MiB`
  return [`Start to socket ready (pinned to one processor) and resident memory when idle: ${one(0)}; ${one(1)}.`, '']
}

export function mark(reached: boolean): string {
  return reached ? '✓' : '✗'
}

/**
 * The network devices of `npm run bench`: virtiod beside dpdk-testpmd, as a switch between two of our front-ends and as a
 * tap, in alternating short measurements. It owns the cases, the order of the rounds and the table.
 *
 * As with the disks: a processor for the back-end, another for the load, and ratios within a round. A packet is one as it
 * was sent, also when the kernel or DPDK has cut it into segments on its way (net-bench-link.ts), so that packets/s and
 * Gbit/s have the same ratio.
 */
import { execFile } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { cpus, release, tmpdir } from 'node:os'
import { dirname, extname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import type { CompareOptions } from './compare.ts'
import { chosen, kilo, mark, median, spread } from './compare.ts'
import { Namespace, whyNoNamespace } from './compare-namespace.ts'
import { type NetRival, RunningNet, testpmdRival, virtiodNetRival } from './compare-net-rivals.ts'
import type { NetBenchOptions, NetBenchResult } from './net-bench.ts'
import { MIN_UDP_FRAME, TCP_HEADER_LENGTH } from './net-frames.ts'
import { commandExists } from './rivals.ts'

const run = promisify(execFile)

/** One line of the table. */
export interface NetCase {
  readonly name: string
  readonly link: 'switch' | 'tap'
  readonly options: NetBenchOptions
  /** The least ratio of packets/s to DPDK that virtiod is meant to reach. */
  readonly goal?: number
}

const SMALL: NetBenchOptions = { frameSize: 64 }
const FULL: NetBenchOptions = { frameSize: 1514 }
/**
 * Segments of 1500 bytes with Ethernet header: DPDK's tap wants that length below the MTU. With 256 entries of 2 KiB a ring
 * would hold 8 of these packets.
 */
const TSO: NetBenchOptions = { frameSize: 65_000, gsoSize: 1434, queueSize: 1024 }
/** The same cut before it comes to a tap that takes nothing else, and how many of these have its payload. */
const CUT: NetBenchOptions = { frameSize: 1500, queueSize: 1024, traffic: 'rx' }
const CUT_PARTS = (65_000 - TCP_HEADER_LENGTH) / (1500 - MIN_UDP_FRAME)

const into = (options: NetBenchOptions): NetBenchOptions => ({ ...options, traffic: 'tx' })
const outOf = (options: NetBenchOptions): NetBenchOptions => ({ ...options, traffic: 'rx' })

export const NET_CASES: readonly NetCase[] = [
  { name: 'net-switch-64', link: 'switch', options: SMALL, goal: 0.5 },
  { name: 'net-switch-packed-64', link: 'switch', options: { ...SMALL, packed: true } },
  { name: 'net-switch-1514', link: 'switch', options: FULL },
  { name: 'net-switch-tso', link: 'switch', options: TSO, goal: 1 },
  { name: 'net-tap-tx-64', link: 'tap', options: into(SMALL) },
  { name: 'net-tap-tx-1514', link: 'tap', options: into(FULL), goal: 1 },
  { name: 'net-tap-tx-tso', link: 'tap', options: into(TSO), goal: 1 },
  { name: 'net-tap-rx-64', link: 'tap', options: outOf(SMALL) },
  { name: 'net-tap-rx-1514', link: 'tap', options: outOf(FULL), goal: 1 },
  { name: 'net-tap-rx-tso', link: 'tap', options: outOf(TSO), goal: 1 },
]

/** What one back-end did in one round. */
export interface NetMeasured {
  /** Packets as they were sent first, in one piece. */
  readonly packetsPerSecond: number
  /** Of these packets' frames. */
  readonly gbitPerSecond: number
  /** Fraction. */
  readonly lost: number
  /** Microseconds of the back-end's process. */
  readonly cpuPerPacket: number
  /** Packets/s that the load's thread puts into a tap of this kind; undefined when it sends through a ring. */
  readonly limit?: number
}

/** Everything that was measured: rounds × cases × back-ends. */
export interface NetCompareResult {
  /** The second one is missing when there is no DPDK. */
  readonly names: readonly string[]
  readonly cases: readonly { readonly case: NetCase; readonly rounds: readonly (readonly NetMeasured[])[] }[]
  /** What was left out and why, a line each. */
  readonly skipped: readonly string[]
}

export type NetCompareOptions = Pick<CompareOptions, 'rounds' | 'seconds' | 'cases' | 'built' | 'cpu' | 'log'>

/** The tap's name in its namespace. */
const TAP = 'bench0'

/**
 * Runs the rounds. A missing dpdk-testpmd leaves virtiod alone, and without root there are no taps.
 * @throws Error with a sentence when a back-end doesn't start or passes no packets
 */
export async function compareNet(options: NetCompareOptions): Promise<NetCompareResult> {
  const skipped: string[] = []
  const rivals = [virtiodNetRival(options.built)]
  if (await commandExists('dpdk-testpmd')) rivals.push(testpmdRival())
  else skipped.push('DPDK: dpdk-testpmd is missing. Install it: apt-get install dpdk-dev')
  const wanted = chosen(NET_CASES, options.cases)
  const noTap = wanted.some((one) => one.link === 'tap') ? whyNoNamespace() : undefined
  if (noTap !== undefined) skipped.push(`the cases on a tap: ${noTap}`)
  for (const line of skipped) options.log(`skipped: ${line}`)
  const results = wanted
    .filter((one) => one.link === 'switch' || noTap === undefined)
    .map((one) => ({ case: one, rounds: [] as NetMeasured[][] }))
  for (let round = 0; round < options.rounds; round++) {
    for (const one of results) {
      const measured: NetMeasured[] = []
      const order = [...rivals.keys()]
      for (const which of round % 2 === 0 ? order : order.reverse()) {
        measured[which] = await measure(rivals[which] as NetRival, one.case, options)
      }
      one.rounds.push(measured)
      const rates = measured.map((one) => one.packetsPerSecond)
      const ratio = rates[1] === undefined ? '' : `  = ${((rates[0] ?? Number.NaN) / rates[1]).toFixed(2)}`
      options.log(
        `round ${round + 1}/${options.rounds}  ${one.case.name.padEnd(24)} ${rates.map(kilo).join(' : ')} k${ratio}`
      )
    }
  }
  return { names: rivals.map((rival) => rival.name), cases: results, skipped }
}

async function measure(rival: NetRival, one: NetCase, options: NetCompareOptions): Promise<NetMeasured> {
  const directory = mkdtempSync(join(tmpdir(), 'virtiod-bench-'))
  try {
    await using namespace = one.link === 'tap' ? await Namespace.create() : undefined
    const prefix = namespace?.prefix ?? []
    const tso = one.options.gsoSize !== undefined
    const cut = tso && rival.segments && one.options.traffic === 'rx'
    const tap = one.link === 'tap' ? { tap: TAP } : {}
    const settings = {
      ...(cut ? CUT : one.options),
      seconds: options.seconds,
      ...(one.link === 'tap' && { link: TAP }),
    }
    const load = [...prefix, 'taskset', '-c', String(options.cpu.frontend)]
    let result: NetBenchResult
    {
      await using backend = await RunningNet.start(rival, { directory, tso, prefix, cpu: options.cpu.backend, ...tap })
      result = (await child(load, backend.sockets, settings)) as NetBenchResult
    }
    if (!(result.packetsPerSecond > 0)) throw new Error(`${rival.name}: no packet of ${one.name} came through`)
    const parts = cut ? CUT_PARTS : 1
    return {
      packetsPerSecond: result.packetsPerSecond / parts,
      gbitPerSecond: ((result.packetsPerSecond / parts) * (one.options.frameSize ?? 0) * 8) / 1e9,
      lost: result.lost ?? Number.NaN,
      cpuPerPacket: (result.cpuPerPacket ?? Number.NaN) * parts,
      // With the back-end gone, which would take memory bandwidth away.
      ...(settings.traffic === 'rx' && { limit: ((await child(load, [], settings)) as number) / parts }),
    }
  } finally {
    rmSync(directory, { recursive: true, force: true })
  }
}

/** The load, in a process of its own. */
async function child(prefix: readonly string[], sockets: readonly string[], options: object): Promise<unknown> {
  const self = fileURLToPath(import.meta.url)
  const script = join(dirname(self), `net-bench-child${extname(self)}`)
  const [command = '', ...words] = [
    ...prefix,
    process.execPath,
    script,
    JSON.stringify(sockets),
    JSON.stringify(options),
  ]
  return JSON.parse((await run(command, words)).stdout)
}

/** The result as a chapter in Markdown. */
export function formatNetComparison(
  result: NetCompareResult,
  options: Pick<NetCompareOptions, 'rounds' | 'seconds' | 'cpu'>
): string {
  const names = result.names.join(' : ')
  const lines = [
    `# Network: ${result.names.join(' and ')}`,
    '',
    `${new Date().toISOString().slice(0, 10)}, ${cpus()[0]?.model ?? 'unknown processor'} × ${cpus().length}, Linux ${release()}, Node ${process.version}; ` +
      `back-end on processor ${options.cpu.backend}, load on processor ${options.cpu.frontend}. ` +
      `${options.rounds} alternating rounds of ${options.seconds} s per measurement, one queue pair, a polling driver; rings of 256, ` +
      `with tso of 1024. switch: from one socket to another (testpmd: \`io\` between two net_vhost ports with TSO). tap-tx: ` +
      `from a ring into a tap, counted at the tap; tap-rx: from a packet socket on the tap into a ring (testpmd: net_vhost and ` +
      `net_tap). 64 and 1514 bytes are UDP; tso is TCP of 65000 bytes to be cut into segments of 1434, and a packet counts as one ` +
      `whether it came whole or cut: a tap of virtiod's takes it whole; before DPDK's, testpmd cuts it (tx) or the load (rx). ` +
      `Medians; ratios are taken within a round, with their least and greatest. The load's limit: what its thread puts into a tap ` +
      `that nobody reads; where packets/s come near it, the CPU time tells. testpmd always polls, so that its CPU time per packet ` +
      `is the time between two packets; its tap has the kernel send it a signal for every packet.`,
    '',
    `| case | k packets/s, ${names} | Gbit/s | ratio | goal | lost % | CPU µs/packet | CPU ratio | load's limit, k packets/s |`,
    '|---|---|---|---|---|---|---|---|---|',
  ]
  for (const { case: one, rounds } of result.cases) {
    const all = (take: (value: NetMeasured) => number, show: (value: number) => string): string =>
      result.names.map((_, which) => show(median(rounds.map((round) => take(round[which] as NetMeasured))))).join(' : ')
    const ratios = (take: (value: NetMeasured) => number): number[] =>
      rounds.flatMap(([a, b]) => (a === undefined || b === undefined ? [] : [take(a) / take(b)]))
    const rate = ratios(rateOf)
    const cpu = ratios(cpuOf)
    const goal =
      one.goal === undefined ? '' : `≥ ${one.goal}${rate.length > 0 ? ` ${mark(median(rate) >= one.goal)}` : ''}`
    lines.push(
      `| ${one.name} | ${all(rateOf, kilo)} | ${all(
        (one) => one.gbitPerSecond,
        (gbit) => gbit.toFixed(2)
      )} ` +
        `| ${rate.length > 0 ? spread(rate) : ''} | ${goal} | ${all(
          ({ lost }) => lost * 100,
          (percent) => percent.toFixed(2)
        )} ` +
        `| ${all(cpuOf, (us) => us.toFixed(us < 10 ? 3 : 1))} | ${cpu.length > 0 ? spread(cpu) : ''} ` +
        `| ${rounds[0]?.[0]?.limit === undefined ? '' : all(({ limit }) => limit ?? Number.NaN, kilo)} |`
    )
  }
  if (result.skipped.length > 0) lines.push('', ...result.skipped.map((line) => `Skipped: ${line}.`))
  return `${lines.join('\n')}\n`
}

const rateOf = (one: NetMeasured): number => one.packetsPerSecond
const cpuOf = (one: NetMeasured): number => one.cpuPerPacket

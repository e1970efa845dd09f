/** What `npm run bench` does with network devices: counting, the table, and measurements of a moment. */
import { mkdirSync, mkdtempSync, rmSync, symlinkSync } from 'node:fs'
import { availableParallelism, tmpdir } from 'node:os'
import { join } from 'node:path'
import { describe, expect, onTestFinished, test, vi } from 'vitest'
import { CASES, chosen } from '../../src/frontend/compare.ts'
import { whyNoNamespace } from '../../src/frontend/compare-namespace.ts'
import {
  compareNet,
  formatNetComparison,
  NET_CASES,
  type NetCompareOptions,
  type NetMeasured,
} from '../../src/frontend/compare-net.ts'
import { RunningNet } from '../../src/frontend/compare-net-rivals.ts'
import { FrontendError } from '../../src/frontend/errors.ts'
import { type NetBenchOptions, netBench } from '../../src/frontend/net-bench.ts'
import { frameShape, linkReceived, wholePackets } from '../../src/frontend/net-bench-link.ts'
import { whyNoTestpmd } from '../dpdk.ts'
import { findCommand, isCi } from '../setup/prerequisites.ts'

const options: NetCompareOptions = {
  rounds: 1,
  seconds: 0.2,
  cases: [],
  built: false,
  cpu: { backend: 1, frontend: 0 },
  log: () => undefined,
}

function directory(): string {
  const path = mkdtempSync(join(tmpdir(), 'virtiod-compare-'))
  onTestFinished(() => rmSync(path, { recursive: true, force: true }))
  return path
}

describe('counting', () => {
  test('segments are as many packets as there was payload', () => {
    const shape = frameShape(66 + 10 * 1434, true)
    expect(wholePackets(shape, 1, shape.frame)).toBe(1)
    expect(wholePackets(shape, 30, 30 * 1500)).toBe(3)
    expect(wholePackets(shape, 3 + 20, 3 * shape.frame + 20 * 1500)).toBe(5)
    expect(wholePackets(frameShape(64, false), 7, 7 * 64)).toBe(7)
  })

  test('a link has its counters, and none has none', () => {
    const { packets, bytes } = linkReceived('lo')
    expect(Number.isInteger(packets) && Number.isInteger(bytes)).toBe(true)
    expect(() => linkReceived('l')).toThrow(FrontendError)
    expect(() => linkReceived('l')).toThrow(/no link l in/)
  })

  test.each<[readonly [string] | readonly [string, string], NetBenchOptions, RegExp]>([
    [['/nonexistent', '/nonexistent'], { link: 'lo' }, /^link: /],
    [['/nonexistent'], { link: 'lo', traffic: 'echo' }, /^link: /],
    [['/nonexistent'], { gsoSize: 0 }, /^gsoSize: /],
    [['/nonexistent'], { gsoSize: 65_470 }, /^gsoSize: /],
  ])('refused before a connection is made: %j %j', (sockets, refused, message) => {
    expect(() => netBench(sockets, refused)).toThrow(message)
  })
})

describe('the cases', () => {
  test('are chosen by words', () => {
    expect(chosen(NET_CASES, ['net'])).toEqual(NET_CASES)
    expect(chosen(CASES, ['net'])).toEqual([])
    expect(chosen(NET_CASES, ['tap-rx', 'switch-64']).map((one) => one.name)).toEqual([
      'net-switch-64',
      'net-tap-rx-64',
      'net-tap-rx-1514',
      'net-tap-rx-tso',
    ])
    expect(new Set(NET_CASES.map((one) => one.name)).size).toBe(NET_CASES.length)
  })
})

describe('the table', () => {
  const measured = (packetsPerSecond: number, cpuPerPacket: number, limit?: number): NetMeasured => ({
    packetsPerSecond,
    gbitPerSecond: packetsPerSecond / 1e5,
    lost: 0.0125,
    cpuPerPacket,
    ...(limit !== undefined && { limit }),
  })
  const cells = (page: string, name: string): string[] =>
    (page.split('\n').find((line) => line.startsWith(`| ${name} |`)) ?? '').split('|').map((cell) => cell.trim())
  const find = (name: string) => NET_CASES.find((one) => one.name === name)!

  test('has medians, and ratios of pairs', () => {
    const page = formatNetComparison(
      {
        names: ['virtiod', 'DPDK'],
        cases: [
          {
            case: find('net-tap-rx-1514'),
            rounds: [
              [measured(300_000, 1, 500_000), measured(100_000, 10, 400_000)],
              [measured(100_000, 2, 500_000), measured(200_000, 10, 400_000)],
              [measured(150_000, 4, 500_000), measured(100_000, 10, 400_000)],
            ],
          },
          { case: find('net-switch-64'), rounds: [[measured(40_000, 0.2), measured(100_000, 0.1)]] },
        ],
        skipped: [],
      },
      options
    )
    expect(cells(page, 'net-tap-rx-1514').slice(2, -1)).toEqual([
      '150 : 100',
      '1.50 : 1.00',
      '**1.50** (0.50–3.00)',
      '≥ 1 ✓',
      '1.25 : 1.25',
      '2.000 : 10.0',
      '**0.20** (0.10–0.40)',
      '500 : 400',
    ])
    expect(cells(page, 'net-switch-64')[5]).toBe('≥ 0.5 ✗')
    expect(cells(page, 'net-switch-64')[9]).toBe('')
    expect(page).not.toContain('Skipped')
  })

  test('has virtiod alone, and says what was left out', () => {
    const page = formatNetComparison(
      {
        names: ['virtiod'],
        cases: [{ case: find('net-switch-tso'), rounds: [[measured(40_000, 5)]] }],
        skipped: ['DPDK: it is away'],
      },
      options
    )
    expect(cells(page, 'net-switch-tso').slice(2, -1)).toEqual(['40.0', '0.40', '', '≥ 1', '1.25', '5.000', '', ''])
    expect(page).toContain('\nSkipped: DPDK: it is away.\n')
  })
})

test('a back-end that does not start is told with what it wrote', async () => {
  const rival = {
    name: 'fake',
    ready: 'never',
    segments: false,
    command: () => ['sh', '-c', 'echo what is wrong >&2; exit 3'],
  }
  const setup = { directory: directory(), tso: false, prefix: [], cpu: 0 }
  await expect(RunningNet.start(rival, setup)).rejects.toThrow(/^fake does not start: what is wrong\n/)
})

const reason = availableParallelism() < 2 ? 'there is one processor' : whyNoNamespace()
if (reason !== undefined) {
  if (isCi()) throw new Error(reason)
  process.stderr.write(`\nSKIPPED: the network bench on taps: ${reason}\n\n`)
}

describe.skipIf(reason !== undefined)('a moment of it', () => {
  test('without DPDK virtiod is measured alone', { timeout: 120_000 }, async () => {
    const path = directory()
    mkdirSync(join(path, 'bin'))
    for (const name of ['sh', 'cat', 'unshare', 'nsenter', 'setpriv', 'taskset'])
      symlinkSync(findCommand(name)!, join(path, 'bin', name))
    vi.stubEnv('PATH', join(path, 'bin'))
    onTestFinished(() => void vi.unstubAllEnvs())
    const lines: string[] = []
    const cases = ['net-switch-64', 'net-tap-tx-tso', 'net-tap-rx-tso']
    const result = await compareNet({ ...options, cases, log: (line) => lines.push(line) })
    expect(result.names).toEqual(['virtiod'])
    expect(result.cases.map((one) => one.case.name)).toEqual(cases)
    expect(result.skipped).toEqual([expect.stringMatching(/^DPDK: .*apt-get install dpdk-dev$/)])
    expect(lines[0]).toBe(`skipped: ${result.skipped[0]}`)
    for (const { rounds } of result.cases) {
      expect(rounds).toHaveLength(1)
      expect(rounds[0]).toEqual([expect.objectContaining({ packetsPerSecond: expect.any(Number) })])
      expect(rounds[0]![0]!.packetsPerSecond).toBeGreaterThan(0)
      expect(rounds[0]![0]!.lost).toBeLessThan(1)
    }
    expect(result.cases.map(({ rounds }) => (rounds[0]![0]!.limit ?? 0) > 0)).toEqual([false, false, true])
  })

  test.skipIf(whyNoTestpmd() !== undefined)(
    'DPDK passes what wants to be segmented',
    { timeout: 120_000 },
    async () => {
      const { names, cases } = await compareNet({ ...options, cases: ['tso'] })
      expect(names).toEqual(['virtiod', 'DPDK'])
      expect(cases.map((one) => one.case.name)).toEqual(['net-switch-tso', 'net-tap-tx-tso', 'net-tap-rx-tso'])
      for (const { rounds } of cases) for (const one of rounds[0]!) expect(one.packetsPerSecond).toBeGreaterThan(0)
    }
  )
})

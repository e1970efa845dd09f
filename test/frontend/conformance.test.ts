/** The conformance suite: its table, its runner, its command, and virtiod, for which every rule holds. */
import { existsSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import {
  type ConformanceCase,
  expect as expectHolds,
  NotApplicable,
  Violation,
} from '../../src/frontend/conformance/case.ts'
import {
  CASES,
  conformance,
  formatList,
  formatResult,
  formatSummary,
  GROUPS,
} from '../../src/frontend/conformance/index.ts'
import { virtiod } from '../cli/spawn.ts'
import { serveVirtiod } from './conformance-serve.ts'

describe('the table', () => {
  test('has a name of its own, a rule, a level and a citation in each row', () => {
    expect(new Set(CASES.map(({ id }) => id)).size).toBe(CASES.length)
    for (const { id, rule, cites, level, group } of CASES) {
      expect(id).toMatch(/^[a-z0-9]+(-[a-z0-9]+)+$/)
      expect(rule, id).toMatch(/^[a-z].*[^.]$/)
      expect(cites, id).toMatch(/vhost-user\.rst "|virtio 1\.3 §\d/)
      expect(['MUST', 'SHOULD', 'MAY'], id).toContain(level)
      expect(Object.keys(GROUPS), id).toContain(group)
    }
  })

  test('covers every group', () => {
    expect(Object.keys(GROUPS).filter((group) => !CASES.some((one) => one.group === group))).toEqual([])
    expect(CASES.length).toBeGreaterThan(300)
  })

  test('is listed whole, as Markdown', () => {
    const list = formatList()
    for (const { id } of CASES) expect(list).toContain(`| \`${id}\` |`)
    for (const line of list.split('\n').filter((one) => one.startsWith('|')))
      expect(line.replaceAll('\\|', '').split('|'), line).toHaveLength(7)
    expect(list).toContain('### split: Split virtqueues')
    expect(formatList(CASES.filter(({ group }) => group === 'net'))).not.toContain('### blk')
  })
})

describe('virtiod', () => {
  test('conforms as a disk', { timeout: 240_000 }, async () => {
    const { socket } = await serveVirtiod('blk')
    const result = await conformance(socket, { destructive: true, timeoutMs: 8000 })
    expect(result.results.filter(({ outcome }) => outcome !== 'pass' && outcome !== 'skip').map(formatResult)).toEqual(
      []
    )
    expect(result).toMatchObject({ device: 'blk', conforms: true, aborted: false })
    // A writable file offers all but these.
    const skipped = result.results.filter(({ outcome }) => outcome === 'skip').map(({ id }) => id)
    expect(skipped).toEqual(['blk-read-only-write', 'blk-lifetime'])
    expect(formatSummary(result)).toMatch(/, virtio-blk, .*\n\d+ passed, 0 failed.*: every MUST that applies holds$/)
  })

  test('conforms as a network card', { timeout: 240_000 }, async () => {
    const { socket, peer } = await serveVirtiod('net')
    const result = await conformance(socket, { destructive: true, peer, timeoutMs: 8000 })
    expect(result.results.filter(({ outcome }) => outcome !== 'pass').map(formatResult)).toEqual([])
    expect(result).toMatchObject({ device: 'net', conforms: true })
  })
})

describe('the runner', () => {
  const named = (id: string, run: ConformanceCase['run'], more: Partial<ConformanceCase> = {}): ConformanceCase => ({
    id,
    group: 'features',
    level: 'MUST',
    rule: `does ${id}`,
    cites: 'none',
    run,
    ...more,
  })
  const violates = (): string => {
    throw new Violation('this', 'that')
  }

  test('says of each case what came of it', async () => {
    const { socket } = await serveVirtiod('blk')
    const result = await conformance(socket, {
      timeoutMs: 4000,
      cases: [
        named('must-pass', () => 'well'),
        named('must-fail', violates),
        named('should-fail', violates, { level: 'SHOULD' }),
        named('no-reason', () => {
          throw new NotApplicable('not here')
        }),
        named('suite-broken', () => {
          throw new RangeError('oops')
        }),
        named('drivers-find', () => {
          throw new Error('the device used chain 3, which it does not have')
        }),
        named('holds-not', () => {
          expectHolds(1 + 1 === 3, 'three', 'two')
          return ''
        }),
        named('not-offered', violates, { needs: { features: [58] } }),
        named('not-offered-either', violates, { needs: { protocol: [30] } }),
        named('too-many', violates, { needs: { queues: 1000 } }),
        named('of-a-card', violates, { needs: { device: 'net' } }),
        named('with-consent', violates, { destructive: true }),
        named('session', (context) => {
          context.running().ring.run(2)
          return 'two requests'
        }),
      ],
    })
    expect(result.results.map(({ id, outcome }) => `${id} ${outcome}`)).toEqual([
      'must-pass pass',
      'must-fail fail',
      'should-fail warn',
      'no-reason skip',
      'suite-broken error',
      'drivers-find fail',
      'holds-not fail',
      'not-offered skip',
      'not-offered-either skip',
      'too-many skip',
      'with-consent skip',
      'session pass',
    ])
    expect(result.conforms).toBe(false)
    expect(result.counts).toEqual({ pass: 2, fail: 3, warn: 1, skip: 5, error: 1 })
    const [, fail] = result.results
    expect(fail).toMatchObject({ expected: 'this', seen: 'that' })
    expect(formatResult(fail!)).toMatch(/^FAIL {3}MUST .*\n.*rule: .*does must-fail\n.*expected: this\n.*seen: .*that$/)
    expect(formatSummary(result)).toContain('not every MUST that applies holds')
  })

  test('a death is an error of the case that was running, and the rest is skipped when nobody comes back', async () => {
    const { socket, child } = await serveVirtiod('blk')
    const result = await conformance(socket, {
      timeoutMs: 1500,
      restartMs: 200,
      cases: [
        named('kills', () => {
          child.kill('SIGKILL')
          return 'it was killed'
        }),
        named('after-it', () => 'well'),
      ],
    })
    expect(result.results.map(({ outcome, seen }) => [outcome, seen])).toEqual([
      ['error', expect.stringMatching(/^the back-end died \(process \d+\); before that: it was killed$/)],
      ['skip', 'the back-end is gone'],
    ])
    expect(result.conforms).toBe(false)
  })

  test('stops at a signal', async () => {
    const { socket } = await serveVirtiod('blk')
    const controller = new AbortController()
    const first = named('own-first', () => {
      controller.abort()
      return 'seen'
    })
    const cases = [first, named('own-second', () => 'not seen')]
    const result = await conformance(socket, { cases, signal: controller.signal, timeoutMs: 4000 })
    expect(result).toMatchObject({ aborted: true, counts: { pass: 1 } })
    expect(formatSummary(result)).toContain('stopped early')
  })

  test('nobody listens', async () => {
    await expect(conformance('/nonexistent/socket')).rejects.toMatchObject({ failure: 'connect' })
  })
})

describe('the command', () => {
  test('runs cases and groups, prints a line for each, and exits 0 when all hold', { timeout: 60_000 }, async () => {
    const { socket } = await serveVirtiod('blk')
    const args = ['conformance', socket, '--case', 'blk-flush', '--group', 'migration', '--timeout', '8000']
    const { code, stdout, stderr } = await virtiod(args)
    expect([code, stderr]).toEqual([0, ''])
    expect(stdout).toMatch(/^pass {3}MUST {4}blk-flush +\[virtio 1\.3 §5\.2\.6\] {2}OK$/m)
    const migration = CASES.filter(({ group }) => group === 'migration').length
    expect(stdout.match(/^pass /gm)).toHaveLength(migration + 1)
    const json = await virtiod(['conformance', socket, '--case', 'blk-flush', '--json', '--timeout', '8000'])
    expect(JSON.parse(json.stdout)).toMatchObject({ conforms: true, results: [{ id: 'blk-flush', outcome: 'pass' }] })
  })

  test('exits 1 when a MUST does not hold', { timeout: 60_000 }, async () => {
    const { socket } = await serveVirtiod('blk', 'blk')
    const { code, stdout } = await virtiod(['conformance', socket, '--case', 'blk-flush', '--timeout', '8000'])
    expect(code).toBe(1)
    expect(stdout).toMatch(/^FAIL {3}MUST {4}blk-flush /m)
  })

  test('lists the cases without a socket', async () => {
    const { code, stdout } = await virtiod(['conformance', '--list'])
    expect([code, stdout]).toEqual([0, formatList()])
  })

  test.each([
    [[], 'SOCKET: missing'],
    [['/tmp/none', '--case', 'blk-flsh'], '--case: there is no "blk-flsh". Did you mean blk-flush?'],
    [['/tmp/none', '--group', 'everything'], '--group: there is no "everything"'],
    [['/tmp/none', '--type', 'scsi'], '--type'],
  ])('refuses %j', async (args, message) => {
    const { code, stderr } = await virtiod(['conformance', ...args])
    expect(code).toBe(2)
    expect(stderr).toContain(message)
    expect(existsSync('/tmp/none')).toBe(false)
  })
})

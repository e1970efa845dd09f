/** The verification: it passes on good back-ends, names known faults, fails on each broken one, and leaves the disk as it was. */
import { readFileSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import type { VerifyCase } from '../../src/frontend/verify/case.ts'
import { CASES, formatCase, formatSummary, HOSTILE_CASES, verify } from '../../src/frontend/verify/index.ts'
import { hasQemu, serveFake, serveWithQemu } from './support.ts'

describe('the table', () => {
  test('has unique names, a title and a citation for each case', () => {
    const all = [...CASES, ...HOSTILE_CASES]
    expect(new Set(all.map((one) => one.name)).size).toBe(all.length)
    for (const one of all) {
      expect(one.name).toMatch(/^[a-z0-9-]+\/[a-z0-9-]+$/)
      expect(one.title).not.toBe('')
      expect(one.spec).not.toBe('')
    }
    expect(HOSTILE_CASES.every((one) => one.name.startsWith('hostile/'))).toBe(true)
  })
})

describe.skipIf(!hasQemu)('against qemu-storage-daemon', () => {
  test('finds its known faults and no other, and restores the disk', { timeout: 120_000 }, async () => {
    const { socket, file, image } = await serveWithQemu()
    const result = await verify(socket, { timeoutMs: 3000 })
    expect(result.cases.filter((one) => one.outcome === 'FAIL' && one.knownFault === undefined)).toEqual([])
    const known = result.cases.filter((one) => one.knownFault !== undefined).map((one) => one.name)
    expect(known).toEqual(expect.arrayContaining(['config/offsets', 'framing/no-status', 'data/straddle-indirect']))
    expect(result).toMatchObject({ backend: 'qemu-storage-daemon', failed: 0, restored: true, aborted: false })
    expect(result.passed).toBeGreaterThan(70)
    expect(formatSummary(result)).toContain('known fault of qemu-storage-daemon 7.2: ')
    expect(readFileSync(file).equals(image)).toBe(true)
  })

  test('writes nothing with readOnly', { timeout: 60_000 }, async () => {
    const { socket, file, image } = await serveWithQemu(1)
    const result = await verify(socket, {
      readOnly: true,
      filter: ['data/', 'framing/header', 'request/used', 'config/wce'],
    })
    expect(result.failed).toBe(0)
    expect(result.cases.find((one) => one.name === 'data/sequential')?.outcome).toBe('SKIP')
    expect(readFileSync(file).equals(image)).toBe(true)
  })

  test('a read-only disk refuses writes', async () => {
    const { socket } = await serveWithQemu(1, false)
    const result = await verify(socket, { filter: ['request/read-only-disk', 'data/sequential'] })
    expect(result.cases.map((one) => one.outcome).sort()).toEqual(['PASS', 'SKIP'])
  })

  test('survives hostile rings that qemu-storage-daemon survives', { timeout: 60_000 }, async () => {
    const { socket } = await serveWithQemu()
    const result = await verify(socket, {
      hostile: true,
      filter: ['hostile/zero-length', 'hostile/unknown-flags', 'hostile/loop'],
    })
    expect(result.failed).toBe(0)
    expect(result.cases).toHaveLength(3)
  })
})

describe('against a back-end with a fault', () => {
  test('a sound one passes', { timeout: 60_000 }, async () => {
    const result = await verify(await serveFake('none'), { timeoutMs: 3000, filter: SOUND })
    expect(result.cases.filter((one) => one.outcome === 'FAIL').map(formatCase)).toEqual([])
  })

  test.each([
    ['corrupts-reads', 'data/sequential', /wrong data/],
    ['drops-writes', 'data/sequential', /wrong data/],
    ['wrong-used-length', 'request/used-length', /used length is 0/],
    ['loses-calls', 'notify/event-idx-every-completion', /without a call/],
    ['loses-calls', 'notify/flags-every-completion', /without a call/],
    ['loses-kicks', 'notify/event-idx-every-completion', /kick was lost/],
    ['always-calls', 'notify/flags-no-calls', /calls for 500 requests/],
    ['always-calls', 'notify/event-idx-no-calls', /calls for 500 requests/],
    ['stops-at-wrap', 'ring/base-near-wrap', /not completed/],
    ['stops-at-wrap', 'ring/index-wrap', /no completion/],
    ['fixed-framing', 'framing/header-bytes', /status not written/],
    ['wraps-sectors', 'request/read-outside', /status OK instead of IOERR/],
  ])('%s fails %s', { timeout: 60_000 }, async (fault, name, message) => {
    // A back-end that loses kicks can't even save the disk's end: it is only read from.
    const result = await verify(await serveFake(fault), {
      timeoutMs: 1500,
      filter: [name],
      readOnly: fault === 'loses-kicks',
    })
    expect(result).toMatchObject({ failed: 1, passed: 0 })
    expect(result.cases[0]?.detail).toMatch(message)
  })
})

describe('the runner', () => {
  const named = (name: string, run: VerifyCase['run']): VerifyCase => ({ name, title: name, spec: 'none', run })

  test('stops at a signal and restores the disk', async () => {
    const socket = await serveFake('none')
    const controller = new AbortController()
    const cases = [named('own/first', () => controller.abort()), named('own/second', () => undefined)]
    const result = await verify(socket, { cases, signal: controller.signal })
    expect(result).toMatchObject({ aborted: true, restored: true, passed: 1 })
  })

  test('a case that throws fails with its message', async () => {
    const lines: string[] = []
    const cases = [
      named('own/broken', () => {
        throw new Error('so it goes')
      }),
    ]
    const result = await verify(await serveFake('none'), { cases, progress: (line) => lines.push(line) })
    expect(result.failed).toBe(1)
    expect(lines[0]).toMatch(/^FAIL {2}own\/broken .*so it goes/)
  })

  test('when the end of the disk cannot be saved, that fails and nothing is written', { timeout: 60_000 }, async () => {
    const result = await verify(await serveFake('loses-kicks'), { timeoutMs: 500, filter: ['data/random'] })
    expect(result.cases.map((one) => [one.name, one.outcome])).toEqual([
      ['data/save', 'FAIL'],
      ['data/random', 'SKIP'],
    ])
    expect(result).toMatchObject({ failed: 1, aborted: false, restored: true })
  })

  test('nobody listens', async () => {
    await expect(verify('/nonexistent/socket')).rejects.toMatchObject({ name: 'FrontendError', failure: 'connect' })
  })
})

/** Cases that the fake back-end is made for. */
const SOUND = [
  'negotiation/',
  'config/sizes',
  'config/offsets',
  'data/sequential',
  'data/random',
  'data/segments',
  'data/indirect',
  'data/straddle',
  'data/unaligned',
  'framing/header',
  'framing/status',
  'framing/data',
  'request/used-length',
  'request/unknown-type',
  'request/read-outside',
  'ring/base-near-wrap',
  'ring/index-wrap',
  'ring/size',
  'notify/event-idx',
  'notify/flags',
  'notify/used-event',
]

/**
 * Device modules that fail while they serve. Each failure costs one session and one line in the log, which names file, line
 * and chain; the next front-end is served, and another device of the same daemon never notices.
 */
import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { loadDeviceState, saveDeviceState } from '../../src/frontend/device-state.ts'
import { eventually, mustServe, type Opened, open, wellBehaved } from '../vhost-user/backend.ts'
import { configure, directory, image, Load, Serving, scrape } from './serving.ts'

const faulty = fileURLToPath(new URL('../fixtures/modules/faulty.ts', import.meta.url))
const fast = fileURLToPath(new URL('../fixtures/modules/fast.ts', import.meta.url))
const impatient = fileURLToPath(new URL('../fixtures/modules/impatient.ts', import.meta.url))

/** `…/faulty.ts:12`, the line that ends with this comment. */
function line(comment: string, file = faulty): string {
  const lines = readFileSync(file, 'utf8').split('\n')
  const number = lines.findIndex((code) => code.endsWith(`// ${comment}`)) + 1
  expect(number).toBeGreaterThan(0)
  return `${file}:${number}`
}

let daemon: Serving
let metrics: string
let other: Opened
let otherLoad: Load
/** Lines of the log that belong to tests before. */
let seen = 0

beforeAll(() => {
  const dir = directory()
  image(dir, 'disk')
  const module = (name: string, file: string) => ({ name, type: 'device', module: file, 'socket-path': `${name}.sock` })
  configure(
    dir,
    [
      { name: 'disk', 'blk-file': 'disk' },
      module('faulty', faulty),
      module('impatient', impatient),
      module('fast', fast),
    ],
    { metrics: `unix:${dir}/m.sock` }
  )
  daemon = new Serving(dir)
  metrics = daemon.path('m.sock')
  other = open(daemon.path('disk.sock'))
  otherLoad = new Load(other.blk, 0)
})

afterAll(() => {
  other?.[Symbol.dispose]()
  daemon?.[Symbol.dispose]()
})

/** What was logged since the last call about a device, by level. */
function said(device: string, ...levels: string[]): string[] {
  const lines = daemon.lines
  const news = lines.slice(seen)
  return news.filter((one) => one['device'] === device && levels.includes(String(one['level']))).map(({ msg }) => msg)
}

/** Has the device of an open session fail in this way from now on. */
function arm(opened: Opened, fault: string): void {
  const sector = new Uint8Array(512)
  new TextEncoder().encodeInto(fault, sector)
  opened.blk.write(99, sector)
}

function trigger(opened: Opened): unknown {
  try {
    opened.blk.write(100, new Uint8Array(512))
    return undefined
  } catch (error) {
    return error
  }
}

/** After a failure: exactly these errors, and everybody is served. */
function mustGoOn(device: string, ...errors: string[]): void {
  expect(eventually(() => said(device, 'error').length >= errors.length, 5000)).toBe(true)
  wellBehaved(daemon.path(`${device}.sock`))
  otherLoad.step()
  // A busy machine notices it later.
  const inTime = (msg: string) => msg.replace(/thread for [2-5] s$/, 'thread for 1 s')
  expect(said(device, 'error').map(inTime)).toEqual(errors)
  expect(said('disk', 'error', 'warn')).toEqual([])
  seen = daemon.lines.length
}

const ends = 'the device failed, its session ends: '

describe('a handler', () => {
  test.each<[what: string, fault: string, message: () => string]>([
    ['throws', 'sync', () => `${ends}${line('thrown')}: chain 0 of queue 0: fault: sync`],
    ['rejects', 'async', () => `${ends}${line('thrown')}: chain 0 of queue 0: fault: async`],
    ['completes twice', 'twice', () => `${ends}${line('twice')}: chain 0 of queue 0 was completed twice`],
    [
      'writes more than the chain holds',
      'overrun',
      () => `${ends}${line('overrun')}: chain 0 of queue 0 has 1 device-writable bytes, the handler writes 2 at 0`,
    ],
    ['ends the thread', 'exit', () => `${ends}${faulty}: the module ended its thread: process.exit(3)`],
    [
      'rejects a promise that nobody has',
      'rejection',
      () => `${ends}${line('rejection')}: unhandled rejection: fault: rejection`,
    ],
    [
      'throws in a timer',
      'uncaught',
      () => `${ends}${line('uncaught')}: uncaught exception: TypeError: fault: uncaught: connect ECONNREFUSED`,
    ],
  ])('%s', (_, fault, message) => {
    using opened = open(daemon.path('faulty.sock'))
    arm(opened, fault)
    expect(String(trigger(opened))).toMatch(/closed|not written/)
    expect(eventually(() => opened.session.connection.channel.hungUp())).toBe(true)
    mustGoOn('faulty', message())
  })

  test('reads more than the chain holds: the ring is broken, the session is not', () => {
    using opened = open(daemon.path('faulty.sock'))
    arm(opened, 'overread')
    opened.blk.timeoutMs = 500
    expect(String(trigger(opened))).toMatch(/not completed/)
    expect(opened.session.connection.getFeatures()).toBeGreaterThan(0n)
    const what = `${line('overread')}: chain 0 of queue 0 has 528 device-readable bytes, the handler reads 529 at 0`
    opened.session.close()
    mustGoOn('faulty', `the driver broke its ring: ${what}`)
  })

  test('never completes', () => {
    using opened = open(daemon.path('impatient.sock'))
    arm(opened, 'never')
    expect(String(trigger(opened))).toMatch(/closed/)
    mustGoOn('impatient', `${ends}${impatient}: chain 0 of queue 0 has not been completed for 1 s`)
  })

  test('blocks its thread for a second: the other device goes on meanwhile, and so does the request', async () => {
    using opened = open(daemon.path('faulty.sock'))
    await scrape(metrics)
    arm(opened, 'block')
    const request = opened.blk.submit(1, 100, new Uint8Array(512), 0)
    const before = otherLoad.requests
    const warned = `${faulty}: chain 0 of queue 0: it has blocked its thread for 1 s`
    while (!said('faulty', 'warn').includes(warned)) otherLoad.step()
    expect(request.done).toBe(false)
    expect(otherLoad.requests - before).toBeGreaterThan(100)
    // A scrape does not wait for it: it gets what the module said last.
    expect((await scrape(metrics)).some((text) => text.startsWith('virtiod_faulty_writes_total'))).toBe(true)
    opened.blk.wait()
    expect(request.status).toBe(0)
    const goesOn = (): boolean => said('faulty', 'warn').some((msg) => /its thread goes on, after \d{4,} ms$/.test(msg))
    expect(eventually(goesOn)).toBe(true)
    const blocked = (await scrape(metrics)).find((text) =>
      text.startsWith('virtiod_device_blocked_seconds_total{device="faulty"}')
    )
    expect(Number(blocked?.split(' ')[1])).toBeGreaterThan(1)
    opened.session.close()
    mustGoOn('faulty')
  })

  test('blocks its thread for longer than a chain may take', () => {
    using opened = open(daemon.path('impatient.sock'))
    arm(opened, 'block for ever')
    expect(String(trigger(opened))).toMatch(/closed/)
    const what = `${impatient}: chain 0 of queue 0: it has blocked its thread for 1 s`
    expect(eventually(() => said('impatient', 'info').some((msg) => msg.endsWith('was started again')), 5000)).toBe(
      true
    )
    mustGoOn('impatient', `${ends}${what}`)
  })
})

describe('the fast style, on two threads of its own', () => {
  test.each<[what: string, sector: number, message: () => string]>([
    ['throws', 1, () => `${line('thrown', fast)}: chain 0 of queue 1: TypeError: a fault`],
    ['ends its thread', 2, () => `${fast}: the module ended its thread: process.exit(0)`],
    ['blocks its thread for ever', 3, () => `${fast}: chain 0 of queue 1: it has blocked its thread for 1 s`],
  ])('%s', (_, sector, message) => {
    using opened = open(daemon.path('fast.sock'), { queues: 2 })
    const [first, second] = opened.drivers
    mustServe(first!)
    expect(() => second!.write(2 ** 11 - 100 + sector, new Uint8Array(512))).toThrow(/closed/)
    mustGoOn('fast', `${ends}${message()}`)
  })
})

describe('a method', () => {
  test('writeConfig throws: the session ends', () => {
    using opened = open(daemon.path('faulty.sock'))
    arm(opened, 'writeConfig')
    expect(() => opened.session.connection.setConfig(32, Uint8Array.of(0))).toThrow(/closed/)
    const what = `${line('thrown')}: writeConfig: fault: writeConfig`
    mustGoOn('faulty', `the session failed, its connection is closed: ${what}`)
  })

  test('writeConfig never answers: the front-end does not wait for ever', () => {
    using opened = open(daemon.path('impatient.sock'))
    arm(opened, 'writeConfig never')
    expect(() => opened.session.connection.setConfig(32, Uint8Array.of(0))).toThrow(/closed/)
    mustGoOn('impatient', `${ends}${impatient}: writeConfig() has not returned after 1 s`)
  })

  test('reset throws: the driver that comes next is served', () => {
    using opened = open(daemon.path('faulty.sock'))
    arm(opened, 'reset')
    opened.session.close()
    mustGoOn('faulty', `the device failed: ${line('thrown')}: reset: fault: reset`)
  })

  test('negotiated throws: the session ends', () => {
    {
      using opened = open(daemon.path('faulty.sock'))
      arm(opened, 'negotiated')
    }
    try {
      using opened = open(daemon.path('faulty.sock'))
      opened.blk.read(0, 512)
    } catch (error) {
      expect(String(error)).toMatch(/closed/)
    }
    mustGoOn('faulty', `${ends}${line('thrown')}: negotiated: fault: negotiated`)
  })

  test.each(['saveState', 'loadState'])('%s throws: the migration fails, the session goes on', (method) => {
    using opened = open(daemon.path('faulty.sock'))
    const { connection } = opened.session
    arm(opened, method)
    connection.getVringBase(0)
    const transfer = (): unknown =>
      method === 'saveState' ? saveDeviceState(connection) : loadDeviceState(connection, Buffer.from('"AAAA"'))
    expect(transfer).toThrow(/CHECK_DEVICE_STATE/)
    const refused = `refused: CHECK_DEVICE_STATE: it failed: ${line('thrown')}: ${method}: fault: ${method}`
    expect(eventually(() => said('faulty', 'warn').includes(refused))).toBe(true)
    expect(transfer).not.toThrow()
    opened.session.close()
    mustGoOn('faulty')
  })
})

describe('the end of the daemon', () => {
  test('close throws, and another device blocks for ever: it ends within its limit, with both told', () => {
    const opened = open(daemon.path('faulty.sock'))
    arm(opened, 'block for ever')
    opened.blk.submit(1, 100, new Uint8Array(512), 0)
    {
      using second = open(daemon.path('impatient.sock'))
      arm(second, 'close')
    }
    daemon.stop()
    opened[Symbol.dispose]()
    const why = `${line('thrown')}: close: fault: close`
    expect(said('impatient', 'error')).toEqual([`the device was not closed as it should: ${why}`])
    expect(said('faulty', 'warn')).toContain(`${faulty} has not ended after 3 s: its thread is terminated`)
    expect(said('faulty', 'error')).toEqual([])
  })

  test('create throws: it does not start', () => {
    const dir = directory()
    const device = {
      name: 'faulty',
      type: 'device',
      module: faulty,
      'socket-path': 'f.sock',
      options: { fault: 'create' },
    }
    configure(dir, [device])
    expect(() => new Serving(dir)).toThrow(`virtiod: ${line('thrown')}: it cannot be opened: fault: create\n`)
  })
})

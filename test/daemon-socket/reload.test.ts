/**
 * `virtiod device … --watch`: what changes in a module's files comes to be served under a running driver, and what is wrong with it leaves the old
 * version serving. Reloads under load are in test/crash/reloads.test.ts.
 */
import {
  copyFileSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  utimesSync,
  writeFileSync,
} from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test, vi } from 'vitest'
import type { BlkDriver } from '../../src/frontend/blk.ts'
import type { Session } from '../../src/frontend/session.ts'
import { VIRTIO_BLK_S_OK, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT } from '../../src/virtio/blk.ts'
import { eventually, MIB, mustServe, type Opened, open, pattern, wellBehaved } from '../vhost-user/backend.ts'
import { directory, image, pause, Serving } from './serving.ts'

vi.setConfig({ testTimeout: 60_000 })

const modules = fileURLToPath(new URL('../fixtures/modules/', import.meta.url))
const MODULE = 'reload-disk.ts'
const VERSION = 'reload-version.ts'
const OK = 'the module was reloaded'

const original = (name: string) => readFileSync(join(modules, name), 'utf8')

/** A disk in memory whose module is watched. */
class Watched extends Serving {
  /** Versions that were served, the first among them. */
  version = 1
  #seen = 0

  constructor(...words: string[]) {
    const dir = directory()
    for (const name of [MODULE, VERSION]) copyFileSync(join(modules, name), join(dir, name))
    super(dir, { args: ['device', `./${MODULE}`, '--socket-path', 's', '--watch', '--log-level', 'debug', ...words] })
  }

  get socket(): string {
    return this.path('s')
  }

  /** As an editor does it. */
  write(name: string, text: string): void {
    writeFileSync(this.path(`${name}~`), text)
    renameSync(this.path(`${name}~`), this.path(name))
  }

  /** The module with something in place of something else. */
  edit(before: string, after: string): void {
    const text = original(MODULE)
    if (text.split(before).length !== 2) throw new Error(`"${before}" is not in ${MODULE} once`)
    this.write(MODULE, text.replace(before, after))
  }

  nextVersion(): void {
    this.write(VERSION, `export const VERSION = ${++this.version}\n`)
  }

  /** Waits for the outcome of one more reload: OK, or why it failed. */
  outcome(): string {
    if (!eventually(() => this.#outcomes.length > this.#seen, 15_000)) throw new Error(`no reload:\n${this.text}`)
    return this.#outcomes[this.#seen++]!.replace('the module was not reloaded, the one before serves on: ', '')
  }

  /** Waits until nothing that has changed is still to be reloaded. Returns the outcomes that nobody asked for. */
  settle(): string[] {
    pause(300)
    const over = () => this.#outcomes.length === this.said('the module changed').length
    if (!eventually(over, 15_000)) throw new Error(`no end of the reload:\n${this.text}`)
    const from = this.#seen
    this.#seen = this.#outcomes.length
    return this.#outcomes.slice(from)
  }

  get #outcomes(): string[] {
    return this.lines.map(({ msg }) => msg).filter((msg) => msg === OK || msg.startsWith('the module was not reloaded'))
  }

  get threads(): number {
    return readdirSync(`/proc/${this.pid}/task`).length
  }
}

function serialOf(blk: BlkDriver): string {
  const request = blk.submit(VIRTIO_BLK_T_GET_ID, 0, new Uint8Array(0), 20, {}, false)
  blk.publish()
  blk.wait()
  return Buffer.from(request.data).toString('latin1').replace(/\0+$/, '')
}

function write(blk: BlkDriver, sector: number, data: Uint8Array): void {
  const request = blk.submit(VIRTIO_BLK_T_OUT, sector, data, 0, {}, false)
  blk.publish()
  blk.wait()
  expect(request.status).toBe(VIRTIO_BLK_S_OK)
}

function read(blk: BlkDriver, sector: number, length: number): Uint8Array {
  const request = blk.submit(VIRTIO_BLK_T_IN, sector, new Uint8Array(0), length, {}, false)
  blk.publish()
  blk.wait()
  expect(request.status).toBe(VIRTIO_BLK_S_OK)
  return request.data
}

/** Old versions that are stuck with a driver; the reload's patience with them passes while the other tests run. */
const TROUBLES: readonly [what: string, before: string, after: string, problem: string][] = [
  [
    'does not complete what it has',
    'await handleBlk',
    'if (chain.reader.length > 8192) await new Promise(() => {})\n      await handleBlk',
    'requests are still in flight after 5000 ms',
  ],
  [
    'blocks its thread',
    'await handleBlk',
    'if (chain.reader.length > 8192) for (;;);\n      await handleBlk',
    'it has blocked its thread for 5 s',
  ],
  [
    'does not save its state',
    'saveState: () => ({',
    'saveState: () => new Promise(() => {}) ?? ({',
    'saveState() has not returned after 5 s',
  ],
]
const stuck = new Map<string, { daemon: Watched; opened: Opened }>()
beforeAll(() => {
  for (const [what, before, after] of TROUBLES) {
    const daemon = new Watched()
    const text = original(MODULE).replace('apiVersion: 1,', 'apiVersion: 1,\n  timeoutMs: 0,').replace(before, after)
    daemon.write(MODULE, text)
    expect(daemon.outcome()).toBe(OK)
    const opened = open(daemon.socket)
    stuck.set(what, { daemon, opened })
    mustServe(opened.blk)
    opened.blk.submit(VIRTIO_BLK_T_OUT, 0, pattern(8192), 0, {}, false)
    opened.blk.publish()
    if (what === 'does not save its state') opened.blk.wait()
    daemon.write(MODULE, original(MODULE))
  }
})
afterAll(() => {
  for (const { daemon, opened } of stuck.values()) {
    opened.session.close(true)
    daemon[Symbol.dispose]()
  }
})

describe('with a driver', () => {
  let daemon: Watched
  let opened: Opened
  let session: Session
  let blk: BlkDriver

  beforeAll(() => {
    daemon = new Watched('--metrics', '127.0.0.1:0')
  })
  beforeEach(() => {
    opened = open(daemon.socket, { mode: 'irq' })
    session = opened.session
    blk = opened.blk
  })
  afterEach(() => opened[Symbol.dispose]())
  afterAll(() => daemon[Symbol.dispose]())

  /** How often its state has come along. */
  const reloads = () => Number(/ r(\d+)$/.exec(serialOf(blk))?.[1])

  test('a change is served at once, with the state, and the old thread is gone', () => {
    const data = pattern(4096)
    write(blk, 16, data)
    const { threads, fds } = daemon
    const before = reloads()
    for (let i = 1; i <= 3; i++) {
      daemon.nextVersion()
      expect(daemon.outcome()).toBe(OK)
      expect(serialOf(blk)).toBe(`v${daemon.version} r${before + i}`)
      expect(read(blk, 16, 4096)).toEqual(data)
    }
    mustServe(blk)
    expect(eventually(() => daemon.threads === threads && daemon.fds.length === fds.length)).toBe(true)
    expect(daemon.said(OK).at(-1)?.['pauseMs']).toBeGreaterThan(0)
  })

  test('two changes soon after one another: the last one is served', () => {
    // At once, and while the first is being loaded.
    for (const ms of [0, 80]) {
      daemon.nextVersion()
      pause(ms)
      daemon.nextVersion()
      expect(eventually(() => serialOf(blk).startsWith(`v${daemon.version} `), 15_000)).toBe(true)
      daemon.settle()
    }
  })

  test('a file that is touched, or written as it was, is no change', () => {
    utimesSync(daemon.path(MODULE), new Date(), new Date())
    daemon.write(MODULE, original(MODULE))
    writeFileSync(daemon.path(VERSION), readFileSync(daemon.path(VERSION)))
    daemon.write('other.ts', '')
    expect(daemon.settle()).toEqual([])
  })

  test('the config space changed: the driver is told', () => {
    expect(session.configChanges).toBe(0)
    const sectors = () => new DataView(session.connection.getConfig(0, 8)!.slice().buffer).getBigUint64(0, true)
    expect(sectors()).toBe(2048n)
    daemon.edit('config: ({ size }) => blkConfig(size)', 'config: ({ size }) => blkConfig(size / 2)')
    expect(daemon.outcome()).toBe(OK)
    const told = () => {
      session.connection.pump()
      return session.configChanges > 0
    }
    expect(eventually(told)).toBe(true)
    expect(sectors()).toBe(1024n)
    daemon.write(MODULE, original(MODULE))
    expect(daemon.outcome()).toBe(OK)
    expect(sectors()).toBe(2048n)
  })

  test('a file that the new version imports is watched as well, when that is wrong too', () => {
    mkdirSync(daemon.path('lib'), { recursive: true })
    daemon.write('lib/more.ts', 'export const MORE = [\n')
    daemon.edit(`import { VERSION } from './reload-version.ts'`, `import { MORE as VERSION } from './lib/more.ts'`)
    expect(daemon.outcome()).toMatch(/^lib\/more\.ts:\d+: SyntaxError/)
    daemon.write('lib/more.ts', `export const MORE = 'more'\n`)
    expect(daemon.outcome()).toBe(OK)
    expect(serialOf(blk)).toMatch(/^vmore r/)
    daemon.write('lib/more.ts', `export const MORE = 'less'\n`)
    expect(daemon.outcome()).toBe(OK)
    expect(serialOf(blk)).toMatch(/^vless r/)
    daemon.write(MODULE, original(MODULE))
    expect(daemon.outcome()).toBe(OK)
    // And no longer is.
    daemon.write('lib/more.ts', '')
    expect(daemon.settle()).toEqual([])
  })

  describe('what is wrong with the new version', () => {
    test.each([
      [
        'a syntax error',
        'async handle(chain) {',
        'async handle(chain {',
        /^reload-disk\.ts:\d+:\d+: SyntaxError: .*The line is: async handle\(chain \{$/,
      ],
      ['an import of what is not there', './reload-version.ts', './nowhere.ts', /nowhere\.ts/],
      ['a wrong description', 'apiVersion: 1,', 'apiVersion: 2,', /written for version 2 of the contract/],
      ['an option that is not there any more', 'size: v.optional(', 'bytes: v.optional(', /./],
      [
        'other features',
        'flush: true',
        'flush: true, discard: true',
        "the driver can't be moved to another device: features was 0x244 and is 0x2244",
      ],
      [
        'another number of queues',
        `['a', 'b', 'c', 'd']`,
        `['a', 'b']`,
        "the driver can't be moved to another device: number of queues was 4 and is 2",
      ],
      [
        'a config space of another length',
        'blkConfig(size)',
        'blkConfig(size).subarray(0, 56)',
        "the driver can't be moved to another device: length of the config space was 60 and is 56",
      ],
      [
        'another name',
        `name: 'reloaddisk'`,
        `name: 'otherdisk'`,
        "the driver can't be moved to another device: name was reloaddisk and is otherdisk",
      ],
      [
        'other metrics',
        `type: 'gauge'`,
        `type: 'counter'`,
        "the driver can't be moved to another device: metrics was gauge writes() and is counter writes()",
      ],
      [
        'create that throws',
        'const { file, size } = options',
        `const { file, size } = options\n    if (size > 0) throw new TypeError('no size')`,
        /^reload-disk\.ts:\d+: it cannot be opened: TypeError: no size$/,
      ],
      ['a module that ends its thread', 'const state = v', 'process.exit(1)\nconst state = v', /process\.exit\(1\)/],
      [
        'create that ends its thread',
        'const { file, size } = options',
        'const { file, size } = options\n    if (size > 0) process.exit(2)',
        /process\.exit\(2\)/,
      ],
      [
        'state that it does not take',
        'writes: v.number(), content',
        'writes: v.string(), content',
        /^reload-disk\.ts:\d+: loadState: .*Expected string but received/,
      ],
    ])('%s', (_, before, after, message) => {
      const data = pattern(4096)
      write(blk, 64, data)
      const serial = serialOf(blk)
      const { threads } = daemon
      daemon.edit(before, after)
      const outcome = daemon.outcome()
      // What is the operator's affair says all there is to say.
      const { err, msg } = daemon.lines.findLast(({ level }) => level === 'error') as unknown as {
        err: { type: string; message: string; stack?: string }
        msg: string
      }
      expect(err.stack === undefined).toBe(err.type === 'ConfigError')
      if (err.type === 'ConfigError') expect(msg.endsWith(`: ${err.message}`)).toBe(true)
      if (typeof message === 'string') expect(outcome).toBe(message)
      else expect(outcome).toMatch(message)
      // The old one goes on with what it had; only its own state has gone through a save and a load.
      expect(serialOf(blk).split(' ')[0]).toBe(serial.split(' ')[0])
      expect(read(blk, 64, 4096)).toEqual(data)
      mustServe(blk)
      expect(eventually(() => daemon.threads === threads)).toBe(true)
      daemon.write(MODULE, original(MODULE))
      expect(daemon.outcome()).toBe(OK)
      expect(read(blk, 64, 4096)).toEqual(data)
    })
  })

  test('counters go on, and reloads are counted', async () => {
    const url = daemon.lines.find(({ msg }) => msg === 'ready')!['metrics'] as string
    const metrics = async (name: string) =>
      Object.fromEntries(
        [
          ...(await (await fetch(`${url}/metrics`)).text()).matchAll(new RegExp(`^${name}\\{(.*)\\} (\\d+)$`, 'gm')),
        ].map(([, labels, value]) => [labels!, Number(value)])
      )
    write(blk, 8, pattern(4096))
    const before = await metrics('virtiod_reloaddisk_requests_total')
    const reloadsBefore = await metrics('virtiod_device_reloads_total')
    daemon.nextVersion()
    expect(daemon.outcome()).toBe(OK)
    write(blk, 8, pattern(4096))
    const after = await metrics('virtiod_reloaddisk_requests_total')
    const writes = 'device="reloaddisk0",queue="0",op="write"'
    expect(after[writes]).toBe(before[writes]! + 1)
    const reloadsAfter = await metrics('virtiod_device_reloads_total')
    const [ok, failed] = ['ok', 'failed'].map((result) => `device="reloaddisk0",result="${result}"`)
    expect(reloadsAfter[ok!]).toBe(reloadsBefore[ok!]! + 1)
    expect(reloadsAfter[failed!]).toBe(reloadsBefore[failed!])
  })
})

test('without a driver: the next one meets the new version, with the state of the old one', () => {
  using daemon = new Watched()
  const data = pattern(4096)
  {
    using first = open(daemon.socket)
    write(first.blk, 64, data)
  }
  daemon.nextVersion()
  expect(daemon.outcome()).toBe(OK)
  using second = open(daemon.socket)
  expect(serialOf(second.blk)).toBe('v2 r1')
  expect(read(second.blk, 64, 4096)).toEqual(data)
  mustServe(second.blk)
})

test('a file that it has locked is free for the new version, and for the old one again', () => {
  const dir = directory()
  const file = image(dir, 'disk.img', MIB)
  using daemon = new Watched('--option', `file=${file}`)
  using opened = open(daemon.socket)
  const data = pattern(4096)
  write(opened.blk, 64, data)
  for (const wrong of [true, false, true]) {
    if (wrong) daemon.edit('writes: v.number(), content', 'writes: v.string(), content')
    else daemon.write(MODULE, original(MODULE))
    expect(daemon.outcome() === OK).toBe(!wrong)
    expect(read(opened.blk, 64, 4096)).toEqual(data)
    mustServe(opened.blk)
  }
  rmSync(dir, { recursive: true })
})

describe('the old version', () => {
  test('cannot save its state: it goes on, and it is said what helps', () => {
    using daemon = new Watched()
    daemon.edit('reloads: disk.reloads + 1,', 'reloads: BigInt(disk.reloads + 1),')
    expect(daemon.outcome()).toBe(OK)
    using opened = open(daemon.socket)
    daemon.nextVersion()
    expect(daemon.outcome()).toMatch(
      /saveState: .*BigInt.*\. As long as the version that serves cannot save its state, only a restart loads another$/
    )
    expect(serialOf(opened.blk)).toBe('v1 r1')
    mustServe(opened.blk)
  })

  test('does not close as it should: the new one is served', () => {
    using daemon = new Watched()
    daemon.edit('close: () => handle?.close()', `close() { throw new Error('no') }`)
    expect(daemon.outcome()).toBe(OK)
    using opened = open(daemon.socket)
    daemon.write(MODULE, original(MODULE))
    expect(daemon.outcome()).toBe(OK)
    expect(daemon.lines.find(({ level }) => level === 'warn')?.msg).toMatch(
      /^the old version of the module was not closed as it should: reload-disk\.ts:\d+: close: no$/
    )
    expect(serialOf(opened.blk)).toBe('v1 r2')
    mustServe(opened.blk)
  })

  test.each([
    ['when it is closed', 'close: () => handle?.close()', 'close: () => process.exit(3)', /loadState: /],
    ['when its state is saved', 'saveState: () => ({', 'saveState: () => process.exit(3) ?? ({', /process\.exit\(3\)/],
  ])(
    'is lost as well, %s: the session ends, and the device starts again with what is in its file',
    (_, before, after, message) => {
      using daemon = new Watched()
      daemon.edit(before, after)
      expect(daemon.outcome()).toBe(OK)
      const { session } = open(daemon.socket)
      daemon.edit('writes: v.number(), content', 'writes: v.string(), content')
      const outcome = daemon.outcome()
      expect(outcome).toMatch(/^the module was not reloaded, the one before has to start again: /)
      expect(outcome).toMatch(message)
      expect(eventually(() => daemon.text.includes('was started again'), 10_000)).toBe(true)
      session.close(true)
      wellBehaved(daemon.socket)
      daemon.write(MODULE, original(MODULE))
      expect(daemon.outcome()).toBe(OK)
      wellBehaved(daemon.socket)
    }
  )
})

test('after a handover the new process watches the files', () => {
  using daemon = new Watched()
  using opened = open(daemon.socket)
  const data = pattern(4096)
  write(opened.blk, 64, data)
  daemon.nextVersion()
  expect(daemon.outcome()).toBe(OK)
  daemon.handOverDuring(() => mustServe(opened.blk))
  daemon.nextVersion()
  expect(daemon.outcome()).toBe(OK)
  expect(serialOf(opened.blk)).toBe('v3 r3')
  expect(read(opened.blk, 64, 4096)).toEqual(data)
})

test.each(TROUBLES)('an old version that %s is ended, and the new one starts', (what, _before, _after, problem) => {
  const { daemon, opened } = stuck.get(what)!
  const again = `${MODULE} was started again`
  expect(eventually(() => daemon.has(again), 15_000)).toBe(true)
  const lines = daemon.lines.filter(({ level, msg }) => level === 'error' || msg === again).map(({ msg }) => msg)
  const ended = 'its files have changed: it is ended without its state, and starts again'
  // Of a thread that blocks.
  const told = lines.map((msg) => msg.replace(/thread for \d+ s/, 'thread for 5 s'))
  expect(told).toEqual([`the device failed, its session ends: ${MODULE}: ${problem}, and ${ended}`, again])
  expect(eventually(() => opened.session.connection.channel.hungUp())).toBe(true)
  {
    using next = open(daemon.socket)
    expect(serialOf(next.blk)).toBe('v1 r0')
    mustServe(next.blk)
  }
  // And it is watched as before.
  daemon.nextVersion()
  expect(daemon.outcome()).toBe(OK)
  wellBehaved(daemon.socket)
})

test('a version that dies again and again: its correction is served, and watched', () => {
  using daemon = new Watched()
  const again = () => daemon.said(`${MODULE} was started again`).length
  const first = 'const { file, size } = options'
  daemon.edit(first, `${first}\n    setTimeout(() => process.exit(3), 400)`)
  expect(daemon.outcome()).toBe(OK)
  expect(eventually(() => again() >= 2, 15_000)).toBe(true)
  // One that does not help, in a file that was not there.
  daemon.edit(`import { VERSION } from './reload-version.ts'`, `import { VERSION } from './more.ts'`)
  const refused = () => daemon.lines.some(({ msg }) => /^it was not started again: .*more\.ts/.test(msg))
  expect(eventually(refused, 15_000)).toBe(true)
  const before = again()
  daemon.write('more.ts', 'export const VERSION = 2\n')
  expect(eventually(() => again() > before, 15_000)).toBe(true)
  using opened = open(daemon.socket)
  expect(serialOf(opened.blk)).toMatch(/^v2 /)
  mustServe(opened.blk)
  daemon.write('more.ts', 'export const VERSION = 3\n')
  expect(eventually(() => serialOf(opened.blk).startsWith('v3 '), 15_000)).toBe(true)
})

test('a new version that hangs while it is opened does not keep the daemon from stopping', () => {
  using daemon = new Watched()
  using opened = open(daemon.socket)
  mustServe(opened.blk)
  const first = 'const { file, size } = options'
  daemon.edit(first, `${first}\n    host.log.info({}, 'opening')\n    await new Promise(() => {})`)
  expect(eventually(() => daemon.has('opening'), 10_000)).toBe(true)
  daemon.stop()
  expect(daemon.lines.filter(({ level }) => level === 'error')).toEqual([])
})

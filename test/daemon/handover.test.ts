/**
 * The order of a handover, and every way in which the other process can fail: both sides in this process, over a real
 * socket pair, on devices that only write down what is done to them.
 */
import { closeSync, fstatSync, openSync, readdirSync } from 'node:fs'
import * as v from 'valibot'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import type { DeviceConfig } from '../../src/daemon/config.ts'
import { type HandingDevice, Handover, LostHandover } from '../../src/daemon/handover.ts'
import { HandoverError, type HandoverMessage, parseMessage } from '../../src/daemon/handover-messages.ts'
import { KeptFiles } from '../../src/daemon/kept-files.ts'
import { createLogger } from '../../src/daemon/log.ts'
import { Predecessor } from '../../src/daemon/predecessor.ts'
import type { LaunchedProcess } from '../../src/daemon/successor.ts'
import type { DeviceDefinition } from '../../src/device/index.ts'
import { native } from '../../src/native.ts'
import { closeFds, FdChannel } from '../../src/vhost-user/fd-channel.ts'

const log = createLogger('silent')
const options = v.strictObject({ file: v.string(), size: v.optional(v.number(), 7), mode: v.exactOptional(v.string()) })
const definition = { name: 'fake', options } as unknown as DeviceDefinition
const config = (name: string, change: Partial<DeviceConfig> = {}): DeviceConfig => ({
  name,
  definition,
  options: { file: `${name}.img`, size: 7 },
  socket: { path: `/run/${name}.sock` },
  ...change,
})
const configs = [config('a'), config('b')]

/** What was done to the devices, in order. */
let steps: string[]
let open: number
let file: number

class FakeDevice implements HandingDevice {
  readonly name: string
  /** Resolves or rejects what `suspend` returns. */
  readonly drained = Promise.withResolvers<void>()

  constructor(name: string, drained = true) {
    this.name = name
    if (drained) this.drained.resolve()
  }

  async suspend() {
    steps.push(`suspend ${this.name}`)
    await this.drained.promise
    const device = { kind: 'device', name: this.name, listener: {}, ended: false, state: 'AQI=', config: '' } as const
    return { device, fds: [file] }
  }

  async resume() {
    steps.push(`resume ${this.name}`)
    this.drained.reject(new Error('resumed'))
    this.drained.promise.catch(() => {})
  }

  abandon() {
    steps.push(`abandon ${this.name}`)
  }
}

/** A new process that does what `act` says, and is dead when that ends or it is killed. */
class FakeProcess implements LaunchedProcess {
  readonly pid = 4711
  readonly ended: Promise<string>
  killed = false
  readonly #end = Promise.withResolvers<string>()
  readonly #channel: FdChannel

  constructor(fd: number, act: (peer: FakeProcess) => Promise<void>) {
    this.#channel = new FdChannel(native.dup(fd))
    this.ended = this.#end.promise
    act(this).then(
      () => this.end('exit code 0'),
      (error: Error) => this.end(error.message)
    )
  }

  kill() {
    this.killed = true
    steps.push('kill')
    this.end('killed by SIGKILL')
  }

  end(how: string) {
    this.#channel.close()
    this.#end.resolve(how)
  }

  async say(message: HandoverMessage | object) {
    await this.#channel.send(message)
  }

  /** Its next message; the fds are counted and closed. */
  async hear(): Promise<{ message: HandoverMessage; fds: number }> {
    const received = await this.#channel.receive()
    if (received === undefined) throw new Error('killed')
    closeFds(received.fds)
    return { message: parseMessage(received.body), fds: received.fds.length }
  }

  async hearAll(): Promise<void> {
    while ((await this.hear()).message.kind !== 'end');
  }
}

beforeEach(() => {
  // The watcher of fds stays open once it has been used.
  const first = FdChannel.pair()
  first.channel.close()
  closeFds([first.fd])
  steps = []
  file = openSync('/dev/zero', 'r')
  open = readdirSync('/proc/self/fd').length
})

afterEach(() => {
  expect(readdirSync('/proc/self/fd').length).toBe(open)
  closeSync(file)
})

const devices = () => [new FakeDevice('a'), new FakeDevice('b')]
const RESUMED = ['resume a', 'resume b']
const SUSPENDED = ['suspend a', 'suspend b']

interface Run {
  readonly act: (peer: FakeProcess) => Promise<void>
  readonly over?: readonly FakeDevice[]
  readonly readyLimitMs?: number
  readonly pauseLimitMs?: number
  readonly during?: (handover: Handover) => void
}

async function run({ act, over = devices(), during, ...limits }: Run) {
  let peer: FakeProcess | undefined
  const launch = (fd: number) => {
    peer = new FakeProcess(fd, act)
    return peer
  }
  const files = new KeptFiles()
  files.keep('disk:a', [file, file], { fact: 1 })
  const handover = new Handover(over, log, () => {}, {
    launch,
    ...limits,
    metrics: { address: { path: '/m' }, fd: file },
  })
  const result = handover.run(configs, files)
  during?.(handover)
  const [outcome] = await Promise.allSettled([result])
  await peer?.ended
  await new Promise((resolve) => setImmediate(resolve))
  return { outcome, peer: peer! }
}

const failure = ({ outcome }: Awaited<ReturnType<typeof run>>): Error => {
  expect(outcome.status).toBe('rejected')
  return (outcome as PromiseRejectedResult).reason as Error
}

/** As it should be; `until` is where it stops, or `undefined`. */
const good = (until?: string) => async (peer: FakeProcess) => {
  const done = (stage: string): boolean => {
    if (stage !== until) return false
    throw new Error(`died: ${stage}`)
  }
  await peer.hear()
  done('hello')
  await peer.say({ kind: 'ready' })
  done('ready')
  await peer.hear()
  done('first device')
  await peer.hearAll()
  done('end')
  await peer.say({ kind: 'prepared' })
  await peer.hear()
  done('commit')
  await peer.say({ kind: 'committed' })
  done('committed')
}

describe('the old process', () => {
  test('hands over in order', async () => {
    const heard: unknown[] = []
    const act = async (peer: FakeProcess) => {
      heard.push(await peer.hear())
      expect(steps).toEqual([])
      await peer.say({ kind: 'ready' })
      for (let i = 0; i < 3; i++) heard.push(await peer.hear())
      expect(steps).toEqual(SUSPENDED)
      await peer.say({ kind: 'prepared' })
      heard.push(await peer.hear())
      await peer.say({ kind: 'committed' })
      await peer.hear().catch(() => {})
    }
    const { outcome, peer } = await run({ act })
    expect(outcome).toEqual({ status: 'fulfilled', value: 4711 })
    expect([steps, peer.killed]).toEqual([[...SUSPENDED, 'abandon a', 'abandon b'], false])
    const device = (name: string) => ({ kind: 'device', name, listener: {}, ended: false, state: 'AQI=', config: '' })
    const described = (name: string) => ({
      name,
      type: 'fake',
      socket: { path: `/run/${name}.sock` },
      options: { file: `${name}.img`, size: 7, mode: null },
    })
    expect(heard).toEqual([
      {
        message: {
          kind: 'hello',
          version: 1,
          pid: process.pid,
          devices: [described('a'), described('b')],
          files: [{ key: 'disk:a', fds: 2, facts: { fact: 1 } }],
          metrics: { path: '/m' },
        },
        fds: 3,
      },
      { message: device('a'), fds: 1 },
      { message: device('b'), fds: 1 },
      { message: { kind: 'end' }, fds: 0 },
      { message: { kind: 'commit' }, fds: 0 },
    ])
  })

  test.each(['hello', 'ready', 'first device', 'end', 'commit'])('goes on when the new one dies: %s', async (until) => {
    const result = await run({ act: good(until) })
    expect(failure(result)).toBeInstanceOf(HandoverError)
    expect(failure(result).message).toMatch(/the new process (ended: died|is gone)/)
    expect(steps).toEqual(until === 'hello' ? ['kill'] : [...SUSPENDED, 'kill', ...RESUMED])
  })

  test('leaves a new one alone that dies when it has taken over', async () => {
    const { outcome } = await run({ act: good('committed') })
    expect(outcome.status).toBe('fulfilled')
    expect(steps).toEqual([...SUSPENDED, 'abandon a', 'abandon b'])
  })

  test.each([
    ['a reason', async (peer: FakeProcess) => peer.say({ kind: 'failed', message: 'no such disk' }), /^no such disk$/],
    ['nonsense', async (peer: FakeProcess) => peer.say({ kind: 'what' }), /what it should not/],
    ['nothing', async (peer: FakeProcess) => void (await peer.hear()), /hangs/],
  ])('goes on when the new one says %s before it is ready', async (_, say, message) => {
    const act = async (peer: FakeProcess) => {
      await peer.hear()
      await say(peer)
      await peer.hear()
    }
    const result = await run({ act, readyLimitMs: 100 })
    expect(failure(result).message).toMatch(message)
    expect(steps).toEqual(['kill'])
  })

  test('goes on when the new one hangs with the guests', async () => {
    const act = async (peer: FakeProcess) => {
      await peer.hear()
      await peer.say({ kind: 'ready' })
      await peer.hearAll()
      await peer.hear()
    }
    expect(failure(await run({ act, pauseLimitMs: 100 })).message).toContain('did not say "prepared" in time')
    expect(steps).toEqual([...SUSPENDED, 'kill', ...RESUMED])
  })

  test('goes on when the new one reports a failure with the guests', async () => {
    const act = async (peer: FakeProcess) => {
      await peer.hear()
      await peer.say({ kind: 'ready' })
      await peer.hearAll()
      await peer.say({ kind: 'failed', message: 'a state that it does not know' })
      await peer.hear()
    }
    expect(failure(await run({ act })).message).toBe('a state that it does not know')
    expect(steps).toEqual([...SUSPENDED, 'kill', ...RESUMED])
  })

  test('goes on when a device cannot be suspended in time, without waiting for it', async () => {
    const over = [new FakeDevice('a', false), new FakeDevice('b')]
    const act = async (peer: FakeProcess) => {
      await peer.hear()
      await peer.say({ kind: 'ready' })
      await peer.hear()
    }
    expect(failure(await run({ act, over, pauseLimitMs: 100 })).message).toBe('requests of guests are still in flight')
    expect(steps).toEqual([...SUSPENDED, 'kill', ...RESUMED])
  })

  test('says so when both are lost: the new one commits as it is ended', async () => {
    const act = async (peer: FakeProcess) => {
      await peer.hear()
      await peer.say({ kind: 'ready' })
      await peer.hearAll()
      await peer.say({ kind: 'prepared' })
      await peer.hear()
      await new Promise((resolve) => setTimeout(resolve, 1000))
    }
    const late = (fd: number) => {
      const peer = new FakeProcess(fd, act)
      const kill = peer.kill.bind(peer)
      peer.kill = () => void peer.say({ kind: 'committed' }).then(kill)
      return peer
    }
    const run = new Handover(devices(), log, () => {}, { launch: late, pauseLimitMs: 100 }).run(
      configs,
      new KeptFiles()
    )
    await expect(run).rejects.toThrow(LostHandover)
    expect(steps).toEqual([...SUSPENDED, 'kill'])
    await new Promise((resolve) => setTimeout(resolve, 1000))
  })

  test.each([
    ['at once', 0],
    ['while the new one starts', 50],
  ])('can be told to stop it: %s', async (_, delay) => {
    const act = async (peer: FakeProcess) => {
      await peer.hear()
      await peer.hear()
    }
    const during = (handover: Handover) => void setTimeout(() => handover.cancel('stopping'), delay)
    expect(failure(await run({ act, during })).message).toBe('stopping')
    expect(steps).toEqual(['kill'])
  })

  test('can be told to stop it while guests wait', async () => {
    let handover: Handover | undefined
    const act = async (peer: FakeProcess) => {
      await peer.hear()
      await peer.say({ kind: 'ready' })
      await peer.hearAll()
      handover!.cancel('stopping')
      await peer.hear()
    }
    expect(failure(await run({ act, during: (started) => (handover = started) })).message).toBe('stopping')
    expect(steps).toEqual([...SUSPENDED, 'kill', ...RESUMED])
  })

  test('does not go back once it said "commit"', async () => {
    let handover: Handover | undefined
    const act = async (peer: FakeProcess) => {
      await peer.hear()
      await peer.say({ kind: 'ready' })
      await peer.hearAll()
      await peer.say({ kind: 'prepared' })
      await peer.hear()
      handover!.cancel('stopping')
      await new Promise((resolve) => setTimeout(resolve, 50))
      await peer.say({ kind: 'committed' })
    }
    const { outcome } = await run({ act, during: (started) => (handover = started) })
    expect(outcome.status).toBe('fulfilled')
    expect(steps).toEqual([...SUSPENDED, 'abandon a', 'abandon b'])
  })

  test('goes on when no process can be started', async () => {
    const launch = () => {
      throw new HandoverError('no more processes')
    }
    const started = new Handover(devices(), log, () => {}, { launch }).run(configs, new KeptFiles())
    await expect(started).rejects.toThrow('no more processes')
    expect(steps).toEqual([])
  })
})

describe('the new process', () => {
  /** The old one's end, and what `connect` returns. */
  async function connected(hello: object, fds: number[] = []) {
    const { channel, fd } = FdChannel.pair()
    await channel.send({ kind: 'hello', version: 1, pid: 1, devices: [], files: [], ...hello }, fds)
    return { old: channel, connecting: Predecessor.connect(fd) }
  }
  const described = (name: string, change: object = {}) => {
    const options = { file: `${name}.img`, size: 7, mode: null }
    return { name, type: 'fake', socket: { path: `/run/${name}.sock` }, options, ...change }
  }
  const said = async (old: FdChannel) => (await old.receive())?.body

  test('takes the files by their keys, once, and closes those that nobody takes', async () => {
    const files = [
      { key: 'x', fds: 1, facts: { a: 1 } },
      { key: 'y', fds: 2, facts: null },
      { key: 'none', fds: 0, facts: {} },
    ]
    const { old, connecting } = await connected({ files, metrics: { path: '/m' } }, [file, file, file, file])
    const predecessor = await connecting
    const taken = predecessor.files.take('x')!
    expect([taken.facts, taken.fds.map((fd) => fstatSync(fd).rdev)]).toEqual([{ a: 1 }, [fstatSync(file).rdev]])
    expect(predecessor.files.take('x')).toBeUndefined()
    expect(predecessor.files.take('none')).toEqual({ fds: [], facts: {} })
    expect(predecessor.takeMetrics({ path: '/other' })).toBeUndefined()
    const metrics = predecessor.takeMetrics({ path: '/m' })!
    expect(fstatSync(metrics).rdev).toBe(fstatSync(file).rdev)
    expect(predecessor.takeMetrics({ path: '/m' })).toBeUndefined()
    closeFds([...taken.fds, metrics])
    predecessor[Symbol.dispose]()
    old.close()
  })

  test.each([
    ['is not there', [described('c')], 'the device c is not there any more'],
    ['is of another type', [described('a', { type: 'other' })], 'the device a is a fake now, and was a other'],
    ['has another socket', [described('a', { socket: { fd: 3 } })], 'has the socket /run/a.sock now, and had fd 3'],
    ['has another option', [described('a', { options: { size: 8 } })], 'has another size (7, and had 8)'],
    ['lost an option', [described('a', { options: { mode: 'x' } })], 'has another mode (unset, and had "x")'],
  ])('refuses when a device %s', async (_, old, message) => {
    const { old: channel, connecting } = await connected({ devices: old })
    using predecessor = await connecting
    expect(() => predecessor.check(configs)).toThrow(message)
    channel.close()
  })

  test('takes the same devices, new ones, and options that only one version knows', async () => {
    const { old, connecting } = await connected({ devices: [described('a', { options: { size: 7, retired: true } })] })
    using predecessor = await connecting
    expect(() => predecessor.check(configs)).not.toThrow()
    old.close()
  })

  test('refuses a newer protocol, and says so', async () => {
    const { old, connecting } = await connected({ version: 2 })
    await expect(connecting).rejects.toThrow('hands over in version 2, this one knows 1 at most')
    expect(await said(old)).toMatchObject({ kind: 'failed', message: expect.stringContaining('version 2') })
    old.close()
  })

  test('receives the devices and goes on when told to', async () => {
    const { old, connecting } = await connected({ devices: [described('a')] })
    using predecessor = await connecting
    const receiving = predecessor.devices()
    expect(await said(old)).toEqual({ kind: 'ready' })
    await old.send({ kind: 'device', name: 'a', ended: false, state: '', config: '' }, [file])
    await old.send({ kind: 'end' })
    const [received] = await receiving
    expect(received!.device.name).toBe('a')
    closeFds(received!.fds)
    const prepared = predecessor.prepared()
    expect(await said(old)).toEqual({ kind: 'prepared' })
    await old.send({ kind: 'commit' })
    await prepared
    await predecessor.committed()
    expect(await said(old)).toEqual({ kind: 'committed' })
    old.close()
  })

  test('goes on when the old one dies after it had everything', async () => {
    const { old, connecting } = await connected({})
    using predecessor = await connecting
    const receiving = predecessor.devices()
    await said(old)
    await old.send({ kind: 'end' })
    await receiving
    const prepared = predecessor.prepared()
    await said(old)
    old.close()
    await prepared
    await predecessor.committed()
  })

  test('does not when the old one dies before that', async () => {
    const { old, connecting } = await connected({ devices: [described('a'), described('b')] })
    using predecessor = await connecting
    const receiving = predecessor.devices()
    await said(old)
    await old.send({ kind: 'device', name: 'a', ended: false, state: '', config: '' }, [file])
    old.close()
    await expect(receiving).rejects.toThrow('gave it up, or ended')
  })

  test.each([
    ['something else', { kind: 'prepared' }],
    ['no device', { kind: 'device', name: 7 }],
    ['a bad state', { kind: 'device', name: 'a', ended: false, state: '!', config: '' }],
  ])('refuses %s in the place of a device', async (_, message) => {
    const { old, connecting } = await connected({})
    using predecessor = await connecting
    const receiving = predecessor.devices()
    await said(old)
    await old.send(message, [file])
    await expect(receiving).rejects.toThrow(HandoverError)
    old.close()
  })
})

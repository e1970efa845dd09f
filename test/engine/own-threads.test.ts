/** Threads of a device's own: who lives on them, and what becomes of them when that blocks, throws or exits. */
import { afterAll, describe, expect, test } from 'vitest'
import { ChainError, ConfigError, DeviceError } from '../../src/device/errors.ts'
import { AtWork } from '../../src/engine/at-work.ts'
import { IothreadPool } from '../../src/engine/pool.ts'
import { portable, revived } from '../../src/engine/portable.ts'
import { RingError } from '../../src/virtio/errors.ts'
import * as device from './fixtures/async-device.ts'
import * as plain from './fixtures/device.ts'
import type { GuestCall } from './fixtures/own-entry.ts'
import { ASYNC_DEVICE, closeEngines, Engine, hasUring, type OwnThreadLog, TestSession, until } from './harness.ts'

afterAll(closeEngines)

const call = ({ thread }: OwnThreadLog, order: GuestCall) => thread.call(order)

describe.each([
  ['in the event loop', true],
  ['in the kernel', false],
])('a thread of a device’s own that waits %s', (_, eventLoop) => {
  const emulate = !hasUring

  test('answers calls and says things by itself', async () => {
    await using engine = await Engine.start(emulate)
    const own = await engine.spawnOwn({ eventLoop })
    expect(await call(own, { echo: { a: [1n, new Uint8Array(2)] } })).toEqual({ a: [1n, new Uint8Array(2)] })
    expect(await call(own, { sleep: 5 })).toBe('slept')
    expect(await call(own, { say: { hello: 1 } })).toBe(undefined)
    await until('what it says', () => own.messages.length > 0)
    expect(own.messages).toEqual([{ hello: 1 }])
    await expect(own.thread.call(() => {})).rejects.toThrow('could not be cloned')
    await expect(engine.threads[0]!.call({})).rejects.toThrow('nobody lives on this iothread')
  })

  test.each([false, true])('fails a call as who lives there fails (by a promise: %s)', async (later) => {
    await using engine = await Engine.start(emulate)
    const own = await engine.spawnOwn({ eventLoop })
    const refusal = await call(own, { fail: 'ConfigError', later }).catch((error: unknown) => error)
    expect(refusal).toBeInstanceOf(ConfigError)
    expect(refusal).toMatchObject({
      name: 'ConfigError',
      code: 'ERR_TEST',
      option: '--file',
      message: '--file: it is not there. Make it.',
      cause: { message: 'no such file', code: 'ENOENT' },
    })
    await expect(call(own, { fail: 'TypeError', later })).rejects.toMatchObject({
      name: 'TypeError',
      stack: expect.stringContaining('own-entry.ts'),
    })
    await expect(call(own, { fail: 'oddity', later })).rejects.toThrow('not an Error was thrown: [Function')
    expect(await call(own, { echo: 1 })).toBe(1)
  })

  test('serves queues and obeys while a call is pending', async () => {
    await using engine = await Engine.start(emulate)
    const own = await engine.spawnOwn({ eventLoop })
    const slow = call(own, { sleep: 300 })
    let answered = false
    void slow.then(() => {
      answered = true
    })
    const { ring } = await TestSession.start(engine, { thread: own.thread })
    for (let i = 0; i < 5; i++) {
      ring.offer(ring.prepare(0, plain.READ), ring.prepare(1, plain.NULL))
      await ring.used(2)
    }
    expect(await call(own, { echo: 2 })).toBe(2)
    await ring.round()
    expect(await slow).toBe('slept')
    expect(answered).toBe(true)
    ring.offer(ring.prepare(0, plain.READ))
    await ring.used(1)
    await ring.stop()
    // One that never ends keeps nothing from ending.
    void call(own, { never: true }).catch(() => {})
    await own.thread.close()
  })

  test('is in the pool while it lives, under the next free index, and gets no queue that is not its own', async () => {
    await using engine = await Engine.start(emulate, { count: 2 })
    const { pool } = engine
    const first = await engine.spawnOwn({ eventLoop })
    const second = await engine.spawnOwn({ eventLoop })
    expect(pool.all.map((thread) => thread.snapshot().index)).toEqual([0, 1, 2, 3])
    expect([0, 1, 2].map(() => pool.assign().index)).not.toContain(2)
    await first.thread.close(1000)
    expect(pool.all.map(({ index }) => index)).toEqual([0, 1, 3])
    const third = await engine.spawnOwn({ eventLoop })
    expect([second.thread.index, third.thread.index]).toEqual([3, 2])
    await pool.broadcast({ kind: 'ping' })
    expect([first.deaths, engine.deaths]).toEqual([[], []])
    await expect(call(first, { echo: 1 })).rejects.toThrow('iothread 2 was ended')
    // Idempotent.
    await first.thread.close(1000)
    await first.thread.terminate()
  })

  test.each([
    ['exits', { exit: 0 }, { code: 'ERR_DEVICE_EXIT', message: 'the module ended its thread: process.exit(0)' }],
    ['exits with 7', { exit: 7 }, { code: 'ERR_DEVICE_EXIT', message: expect.stringContaining('process.exit(7)') }],
    ['leaves a promise rejected', { reject: 'forgotten' }, { name: 'Error', message: 'forgotten' }],
  ] as const)('dies when who lives there %s, and nobody with it', async (_name, order, error) => {
    await using engine = await Engine.start(emulate)
    const own = await engine.spawnOwn({ eventLoop })
    const session = await TestSession.start(engine, { thread: own.thread })
    const pending = call(own, { never: true })
    pending.catch(() => {})
    // Which of them is answered before the end is open.
    call(own, order).catch(() => {})
    await expect(pending).rejects.toMatchObject(error)
    await expect(session.ring.stop()).rejects.toMatchObject(error)
    await expect(own.thread.request({ kind: 'ping' })).rejects.toMatchObject(error)
    expect(own.deaths).toMatchObject([error])
    await own.thread.close(1000)
    engine.started.clear()
    const { ring } = await TestSession.start(engine)
    ring.offer(ring.prepare(0, plain.NULL))
    await ring.used(1)
    expect(engine.deaths).toEqual([])
  })

  test('does not start when its module throws, or hangs', async () => {
    await using engine = await Engine.start(emulate)
    const refused = engine.spawn({ eventLoop, refuse: 'not today' })
    await expect(refused.thread.ready()).rejects.toThrow('not today')
    await expect(call(refused, { echo: 1 })).rejects.toThrow('not today')
    const hangs = engine.spawn({ eventLoop, hang: true })
    const waits = call(hangs, { echo: 1 })
    await Promise.all([
      expect(waits).rejects.toThrow('was ended'),
      expect(hangs.thread.ready()).rejects.toThrow('was ended'),
      hangs.thread.close(100),
    ])
    expect([refused.deaths.length, hangs.deaths.length]).toEqual([1, 0])
  })

  test('is told of when it is blocked, and when it goes on', async () => {
    await using engine = await Engine.start(emulate)
    const own = await engine.spawnOwn({ eventLoop })
    const other = await engine.spawnOwn({ eventLoop })
    const { ring } = await TestSession.start(engine, { thread: own.thread, module: ASYNC_DEVICE })
    const free = await TestSession.start(engine)
    const head = ring.prepare(3, device.BLOCK)
    ring.offer(ring.prepare(0, device.NOW), head)
    // Others serve meanwhile.
    free.ring.offer(free.ring.prepare(0, plain.NULL))
    await free.ring.used(1)
    await until('it is blocked, and still is', () => own.blocked.length > 1)
    const [first, ...more] = own.blocked
    expect(first).toEqual({ ms: first!.newMs, newMs: expect.any(Number), notable: true, queue: 0, chain: head })
    expect(first!.ms).toBeGreaterThan(500)
    for (const one of more) expect(one).toMatchObject({ notable: false, queue: 0, chain: head })
    ring.release()
    await ring.used(2)
    await until('it goes on', () => own.unblocked.length > 0)
    // Each millisecond was told once.
    const [{ ms, newMs }] = own.unblocked as [{ ms: number; newMs: number }]
    expect(own.blocked.reduce((sum, one) => sum + one.newMs, newMs)).toBe(ms)
    expect(own.thread.work).toEqual({ queue: -1, chain: -1 })
    expect([other.blocked, own.deaths]).toEqual([[], []])
  })

  test('can be terminated while it is blocked for ever', async () => {
    await using engine = await Engine.start(emulate)
    const own = await engine.spawnOwn({ eventLoop })
    const { ring } = await TestSession.start(engine, { thread: own.thread, module: ASYNC_DEVICE })
    const head = ring.prepare(1, device.BLOCK)
    ring.offer(head)
    await until('it is blocked', () => own.thread.work.chain === head)
    const stopped = ring.stop()
    const refused = expect(stopped).rejects.toThrow('was ended')
    await own.thread.close(50)
    await refused
    engine.started.clear()
    expect(own.deaths).toEqual([])
    await engine.pool.broadcast({ kind: 'ping' })
  })

  test('a handler that exits ends it', async () => {
    await using engine = await Engine.start(emulate)
    const own = await engine.spawnOwn({ eventLoop })
    const { ring } = await TestSession.start(engine, { thread: own.thread, module: ASYNC_DEVICE })
    ring.offer(ring.prepare(1, device.EXIT, 3))
    await until('its death', () => own.deaths.length > 0)
    expect(own.deaths).toMatchObject([{ code: 'ERR_DEVICE_EXIT' }])
    engine.started.clear()
  })
})

test('a pool without shared iothreads serves devices that have their own', async () => {
  const pool = new IothreadPool({ count: 0, emulate: true, pollMaxUs: 0 })
  await pool.ready()
  expect(pool.all).toEqual([])
  expect(() => pool.assign()).toThrow('there are no shared iothreads')
  await pool.broadcast({ kind: 'ping' })
  await pool.close()
})

test.each([
  ['close', 'close'],
  ['abandon', 'abandon'],
] as const)('%s of a pool ends threads of devices’ own, whatever they do', async (_, end) => {
  const engine = await Engine.start(true, { count: 1, pollMaxUs: 1 })
  const asleep = engine.spawn({ eventLoop: true })
  const kernel = engine.spawn({ eventLoop: false })
  const blocked = engine.spawn({ eventLoop: true })
  await Promise.all([asleep, kernel, blocked].map(({ thread }) => thread.ready()))
  call(blocked, { block: 0 }).catch(() => {})
  await engine[end]()
  expect(engine.pool.all.length).toBe(1)
  expect([asleep, kernel, blocked].flatMap(({ deaths }) => deaths)).toEqual([])
})

describe('an error on its way to another thread', () => {
  const over = (error: unknown): Error => revived(structuredClone(portable(error)))

  test.each([
    new ConfigError('ERR_X', '--x', 'no', 'Yes.'),
    new DeviceError('ERR_Y', 'no'),
    new ChainError('short'),
    new RingError('ERR_RING_LOOP', 'round'),
    Object.assign(new RangeError('far'), { code: 'ERR_Z', errno: -2, big: 1n }),
  ])('is the same there: $name', (error) => {
    const there = over(error)
    expect(there.name).toBe(error.name)
    expect(there.message).toBe(error.message)
    expect(there.stack).toBe(error.stack)
    expect({ ...there }).toEqual({ ...error })
    if (!(error instanceof RangeError)) expect(there).toBeInstanceOf(error.constructor)
  })

  test('takes its causes along, to a certain depth', () => {
    const circular = new Error('a')
    circular.cause = circular
    let depth = 0
    for (let error: unknown = over(circular); error instanceof Error; error = error.cause) depth++
    expect(depth).toBe(9)
  })

  test('never fails, whatever was thrown', () => {
    const evil = new Proxy(new Error('x'), {
      get() {
        throw new Error('no')
      },
    })
    expect(over(evil)).toBeInstanceOf(Error)
    expect(over(undefined).message).toBe('not an Error was thrown: undefined')
    expect(over({ a: 1 }).message).toBe('not an Error was thrown: { a: 1 }')
    expect(over(Object.assign(new Error('x'), { f() {} })).message).toBe('x')
  })
})

test('what a thread is at work on', () => {
  const there = new AtWork()
  const here = new AtWork(there.buffer)
  expect(here.work).toEqual({ queue: -1, chain: -1 })
  for (const [queue, chain] of [
    [0, 0],
    [255, 32767],
    [3, -1],
  ] as const) {
    there.begin(queue, chain)
    expect(here.work).toEqual({ queue, chain })
  }
  there.end()
  expect(here.work).toEqual({ queue: -1, chain: -1 })
})

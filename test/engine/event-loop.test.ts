/** Devices whose handlers need the event loop: promises, timers and npm libraries, on threads of their own. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { BROKEN, COMPLETED } from '../../src/engine/counters.ts'
import { InFlightChains } from '../../src/engine/in-flight-chains.ts'
import { Overdue } from '../../src/engine/overdue.ts'
import { Chain } from '../../src/virtio/chain.ts'
import * as device from './fixtures/async-device.ts'
import type { CardMessage } from './fixtures/card.ts'
import {
  ASYNC_DEVICE,
  asleep,
  closeEngines,
  Engine,
  hasUring,
  type SessionOptions,
  TestSession,
  until,
} from './harness.ts'

const CARD = new URL('./fixtures/card.ts', import.meta.url).href

let directory: string
let path: string

beforeAll(() => {
  directory = mkdtempSync(join(tmpdir(), 'virtiod-engine-'))
  path = join(directory, 'content')
  writeFileSync(path, 'forty-two')
})

afterAll(async () => {
  await closeEngines()
  rmSync(directory, { recursive: true })
})

describe.each([
  ['io_uring', false],
  ['the emulation', true],
])('in the event loop, on %s', (_, emulate) => {
  const it = test.skipIf(!emulate && !hasUring)

  /** A session on an event-loop thread that others use as well. */
  async function started(engine: Engine, options: SessionOptions = {}): Promise<TestSession> {
    return TestSession.start(engine, { module: ASYNC_DEVICE, ...options, data: { path } })
  }

  describe.each([
    ['that kicks', true, false],
    ['that kicks, with EVENT_IDX', true, true],
    ['that does not kick', false, false],
  ])('a driver %s', (__, kick, eventIdx) => {
    it.each([
      ['promises', device.PROMISE, 0],
      ['timers', device.TIMER, 1],
      ['fs.promises', device.FILE, 9],
      ['I/O that began in a timer', device.IO, 64],
    ])('gets what is completed by %s', async (_name, operation, length) => {
      await using engine = await Engine.start(emulate, { eventLoop: true })
      const { ring, mapping } = await started(engine, { kick, eventIdx })
      const heads = Array.from({ length: 20 }, (_, slot) => ring.prepare(slot, operation, slot % 3))
      for (let round = 0; round < 3; round++) {
        ring.driver.usedEvent = ring.driver.usedIdx
        ring.offer(...heads)
        const used = await ring.used(20)
        expect(used.map(({ id }) => id).sort((a, b) => a - b)).toEqual(heads)
        if (operation === device.FILE) {
          const content = Buffer.from(new Uint8Array(mapping.buffer, ring.buffer(7), length))
          expect([used[0]!.length, content.toString()]).toEqual([length, 'forty-two'])
        }
        await ring.called()
      }
      expect(await ring.stop()).toBe(60)
      expect(engine.events).toEqual([])
    })
  })

  it('one that waits holds up neither its ring nor others', async () => {
    await using engine = await Engine.start(emulate, { eventLoop: true })
    const one = await started(engine)
    const other = await started(engine)
    const never = one.ring.prepare(0, device.NEVER)
    one.ring.offer(never, one.ring.prepare(1, device.TIMER, 5), one.ring.prepare(2, device.PROMISE))
    // In the order in which they end.
    expect((await one.ring.used(2)).map(({ id }) => id)).toEqual([4, 2])
    for (let i = 0; i < 10; i++) {
      other.ring.offer(other.ring.prepare(0, device.PROMISE))
      await other.ring.used(1)
    }
    await one.ring.send({ complete: never })
    expect(await one.ring.used(1)).toEqual([{ id: never, length: 0 }])
  })

  it('a ring stops, and a session pauses, when the promises under way have ended', async () => {
    await using engine = await Engine.start(emulate, { eventLoop: true })
    const session = await started(engine)
    const { ring } = session
    ring.offer(ring.prepare(0, device.TIMER, 50), ring.prepare(1, device.FILE), ring.prepare(2, device.NOW))
    // Else it may pause before it has looked.
    expect(await ring.used(1)).toContainEqual({ id: 4, length: 64 })
    await session.pause()
    expect(ring.counters.values[COMPLETED]).toBe(3)
    ring.driver.takeUsed()
    ring.offer(ring.prepare(2, device.PROMISE))
    await session.resume()
    await ring.used(1)
    ring.offer(ring.prepare(0, device.TIMER, 50), ring.prepare(1, device.NOW))
    await ring.used(1)
    expect(await ring.stop()).toBe(6)
    expect(ring.counters.values[COMPLETED]).toBe(6)
  })

  it('a completion that comes after the ring has stopped without it changes nothing', async () => {
    await using engine = await Engine.start(emulate, { eventLoop: true })
    const { ring } = await started(engine, { inflight: true })
    const head = ring.prepare(0, device.NEVER)
    ring.offer(head, ring.prepare(1, device.NOW))
    await ring.used(1)
    await ring.send({ completeClosed: head })
    expect(await ring.stop(true)).toBe(2)
    const { values } = ring.counters
    const before = [...values]
    await ring.thread.call({ sleep: 20 })
    expect(ring.driver.takeUsed()).toEqual([])
    expect(ring.inFlight(head)).toBe(true)
    expect([...values]).toEqual(before)
  })

  it('buffers are taken outside of rounds, and asked for when there are none', async () => {
    await using engine = await Engine.start(emulate, { eventLoop: true })
    const { rings, mapping } = await started(engine, { rings: 2 })
    const ring = rings[1]!
    const heads = [0, 1, 2].map((slot) => ring.prepare(slot, 0))
    ring.offer(...heads.slice(0, 1))
    await ring.send({ put: [11] })
    expect(await ring.used(1)).toEqual([{ id: 0, length: 1 }])
    // There is none now: it waits for a kick, which the driver gives only when it was asked to.
    await asleep()
    await ring.send({ put: [22, 33] })
    await until('it asks for a kick', () => ring.driver.usedFlags === 0)
    await asleep()
    ring.offer(...heads.slice(1))
    expect((await ring.used(2)).length).toBe(2)
    const values = [0, 1, 2].map((slot) => new Uint8Array(mapping.buffer)[ring.buffer(slot)])
    expect(values).toEqual([11, 22, 33])
  })

  it('it sleeps when there is nothing to do, and looks now and then for a driver that does not kick', async () => {
    await using engine = await Engine.start(emulate, { eventLoop: true, pollMaxUs: 100 })
    const { ring } = await started(engine)
    for (let i = 0; i < 5; i++) {
      await asleep()
      ring.offer(ring.prepare(0, device.PROMISE))
      await ring.used(1)
    }
    const polled = await started(engine, { kick: false, call: false })
    for (let i = 0; i < 5; i++) {
      await polled.ring.thread.call({ sleep: 10 })
      polled.ring.offer(polled.ring.prepare(0, device.PROMISE))
      await polled.ring.used(1)
    }
  })

  describe('a handler that fails', () => {
    it('by a promise: it is reported with the chain, its ring stops, the others go on', async () => {
      await using engine = await Engine.start(emulate, { eventLoop: true })
      const bad = await started(engine)
      const good = await started(engine)
      const head = bad.ring.prepare(3, device.REJECT)
      bad.ring.offer(bad.ring.prepare(0, device.TIMER, 20), head)
      await until('the report', () => engine.events.length > 0)
      expect(engine.events).toEqual([
        { kind: 'deviceFailed', session: bad.id, index: 0, chain: head, error: expect.any(Error) },
      ])
      expect(engine.events[0]).toMatchObject({ error: { name: 'TypeError', message: 'the promise was rejected' } })
      good.ring.offer(good.ring.prepare(0, device.PROMISE))
      await good.ring.used(1)
      await bad.ring.stop()
      expect(bad.ring.driver.takeUsed()).toEqual([])
    })

    it('after its ring has stopped: nobody hears of it', async () => {
      await using engine = await Engine.start(emulate, { eventLoop: true })
      const { ring } = await started(engine)
      const head = ring.prepare(0, device.NEVER)
      ring.offer(head)
      await ring.send({ failLate: head })
      await ring.send({ complete: head })
      await ring.stop()
      await ring.thread.call({ sleep: 20 })
      expect(engine.events).toEqual([])
    })

    it('when its ring has stopped: it is reported, and the ring has stopped', async () => {
      await using engine = await Engine.start(emulate, { eventLoop: true })
      const { ring } = await started(engine)
      await ring.send({ failClose: 'not so fast' })
      expect(await ring.stop()).toBe(0)
      await until('the report', () => engine.events.length > 0)
      expect(engine.events).toMatchObject([{ kind: 'deviceFailed', error: { message: 'not so fast' } }])
      await ring.start()
      ring.offer(ring.prepare(0, device.PROMISE))
      await ring.used(1)
    })

    it.each([
      ['at once', device.BAD_REQUEST, '2 bytes of 8'],
      ['when its I/O has ended', device.BAD_REQUEST_LATER, '3 bytes of 8'],
      ['by a promise', device.REJECT_REQUEST, '4 bytes of 8'],
    ])('%s because of its request: that ring is broken, and no other', async (_name, operation, message) => {
      await using engine = await Engine.start(emulate, { eventLoop: true })
      const { id: session, rings } = await started(engine, { rings: 3 })
      const bad = rings[0]!
      const buffers = rings[1]!
      const head = bad.prepare(1, operation)
      bad.offer(bad.prepare(0, device.NOW), head, bad.prepare(2, device.NOW))
      await until('the report', () => engine.events.length > 0)
      expect(engine.events).toEqual([
        {
          kind: 'ringBroken',
          session,
          index: 0,
          code: 'ERR_RING_REQUEST',
          message,
          request: { chain: head, stack: expect.stringContaining(message) },
        },
      ])
      // What was completed before is the driver's.
      expect((await bad.used(1))[0]).toEqual({ id: 0, length: 64 })
      expect(bad.counters.values[BROKEN]).toBe(1)
      buffers.offer(buffers.prepare(0, 0))
      await buffers.send({ put: [1] })
      await buffers.used(1)
      // It can be stopped, and started again.
      const base = await bad.stop()
      expect(base).toBeGreaterThanOrEqual(2)
    })
  })

  describe('a chain that is in flight for too long', () => {
    it('fails its queue, also when the ring is to stop', async () => {
      await using engine = await Engine.start(emulate, { eventLoop: true })
      const own = await engine.spawnOwn()
      const { ring, id: session } = await started(engine, { thread: own.thread, timeoutMs: 300 })
      const head = ring.prepare(2, device.NEVER)
      // What ends in time is none.
      ring.offer(ring.prepare(0, device.TIMER, 20), head)
      await ring.used(1)
      const stopped = ring.stop()
      await until('the report', () => engine.events.length > 0)
      expect(engine.events).toMatchObject([
        {
          kind: 'deviceFailed',
          session,
          index: 0,
          chain: head,
          error: {
            name: 'DeviceError',
            code: 'ERR_DEVICE_STUCK',
            message: `chain ${head} of queue 0 has not been completed for 300 ms`,
          },
        },
      ])
      expect(await stopped).toBe(2)
    })

    it('does not when there is no limit, and buffers that wait in the ring are not in flight', async () => {
      await using engine = await Engine.start(emulate, { eventLoop: true })
      const own = await engine.spawnOwn()
      const { rings } = await started(engine, { thread: own.thread, timeoutMs: 50, rings: 2 })
      const patient = await started(engine, { thread: own.thread })
      const buffers = rings[1]!
      buffers.offer(buffers.prepare(0, 0))
      const head = patient.ring.prepare(0, device.NEVER)
      patient.ring.offer(head)
      await own.thread.call({ sleep: 800 })
      await patient.ring.send({ complete: head })
      await patient.ring.used(1)
      await buffers.send({ put: [1] })
      await buffers.used(1)
      expect(engine.events).toEqual([])
    })

    it('does not when a receiver only holds it for what may come', async () => {
      await using engine = await Engine.start(emulate, { eventLoop: true })
      const own = await engine.spawnOwn()
      const { ring } = await TestSession.start(engine, { thread: own.thread, timeoutMs: 50, module: CARD })
      const held = new Promise((resolve) => engine.pool.once('reported', resolve))
      ring.offer(ring.prepare(0, 0), ring.prepare(1, 0))
      const tell = (message: CardMessage) => own.thread.request({ kind: 'message', queue: ring.id, message })
      await tell({ hold: 2 })
      await held
      await own.thread.call({ sleep: 800 })
      expect(engine.events).toEqual([])
      await tell({ values: [1, 2] })
      await ring.used(2)
    })
  })
})

test('a chain is overdue when it was so at two looks: after a pause of the process it gets its turn first', () => {
  const chains = new InFlightChains(8)
  const overdue = new Overdue(1500)
  expect(overdue.text).toBe('1.5 s')
  const popped = (head: number, at: number): Chain => {
    const chain = Object.assign(new Chain(head), { inFlight: true, poppedAt: at })
    chains.popped(chain)
    return chain
  }
  const first = popped(3, 1_000_000)
  const second = popped(1, 1_400_000)
  expect(overdue.look(chains, 2_500_000)).toBe(undefined)
  // 9 s later, and the oldest is completed just then.
  expect(overdue.look(chains, 11_000_000)).toBe(undefined)
  first.inFlight = false
  expect(overdue.look(chains, 11_250_000)).toBe(undefined)
  // The same chain again is another request.
  second.poppedAt = 11_300_000
  expect(overdue.look(chains, 11_500_000)).toBe(undefined)
  expect(overdue.look(chains, 12_900_000)).toBe(undefined)
  expect(overdue.look(chains, 13_150_000)).toBe(second)
})

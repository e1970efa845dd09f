/**
 * The iothread's loop with real threads, eventfds and files; the drivers live in the test. All of it also without
 * io_uring.
 */
import { writeSync } from 'node:fs'
import { afterAll, describe, expect, test } from 'vitest'
import { BROKEN, CALLS, CALLS_SUPPRESSED, CHAINS, COMPLETED, KICKS } from '../../src/engine/counters.ts'
import { MAX_VECTORS } from '../../src/engine/ring.ts'
import { native } from '../../src/native.ts'
import * as device from './fixtures/device.ts'
import { check, closeEngines, Engine, hasUring, type TestRing, TestSession, until } from './harness.ts'

afterAll(closeEngines)

const { CLOSED, GATE, HANDLED, IO_ENDED } = device

describe.each([
  ['io_uring', false, false],
  ['the emulation', true, false],
  ['io_uring, in the event loop', false, true],
  ['the emulation, in the event loop', true, true],
])('an iothread on %s', (_, emulate, eventLoop) => {
  const it = test.skipIf(!emulate && !hasUring)

  it('says what it runs on, and ends', async () => {
    await using engine = await Engine.start(emulate, { eventLoop, count: 2 })
    for (const thread of engine.threads) {
      expect(thread.emulated).toBe(emulate)
      expect(thread.reason).toBe(emulate ? 'it was asked for' : undefined)
      expect(await thread.request({ kind: 'ping' })).toBe(0)
    }
    expect(engine.deaths).toEqual([])
  })

  describe.each([
    ['flags', false],
    ['EVENT_IDX', true],
  ])('with %s', (__, eventIdx) => {
    it('serves requests in order and calls', async () => {
      await using engine = await Engine.start(emulate, { eventLoop })
      const { ring, control } = await TestSession.start(engine, { eventIdx })
      const heads = Array.from({ length: 32 }, (_, i) => ring.prepare(i, device.NULL, 0, i + 1))
      ring.offer(...heads)
      expect(await ring.used(32)).toEqual(heads.map((id, i) => ({ id, length: i + 1 })))
      await ring.called()
      expect(control[HANDLED]).toBe(32)
      expect(await ring.stop()).toBe(32)
      expect(control[CLOSED]).toBe(1)
      const { values } = ring.counters
      expect([values[CHAINS], values[COMPLETED], values[BROKEN]]).toEqual([32, 32, 0])
      expect(values[KICKS]).toBeGreaterThan(0)
      expect(values[CALLS]! + values[CALLS_SUPPRESSED]!).toBeGreaterThan(0)
    })

    it('loses no kick and no call in a ping-pong of single requests, over the wrap of the indices', async () => {
      await using engine = await Engine.start(emulate, { eventLoop })
      const { ring } = await TestSession.start(engine, { eventIdx, size: 2, base: 65000 })
      const { driver } = ring
      let kicks = 0
      for (let i = 0; i < 1500; i++) {
        const head = ring.prepare(0, i % 3 === 0 ? device.READ : device.NULL, 0, 8)
        driver.usedEvent = driver.usedIdx
        const before = driver.availIdx
        driver.offer(head)
        // As a driver does: only if it was asked for.
        if (eventIdx ? driver.availEvent === before : driver.usedFlags === 0) {
          ring.kick()
          kicks++
        }
        await ring.called()
        expect(driver.takeUsed()).toEqual([{ id: head, length: 8 }])
      }
      expect(kicks).toBeGreaterThan(0)
      expect(await ring.stop()).toBe((65000 + 1500) & 0xffff)
    })

    it('does not call a driver that polls', async () => {
      await using engine = await Engine.start(emulate, { eventLoop })
      const { ring } = await TestSession.start(engine, { eventIdx })
      ring.offer(ring.prepare(0, device.NULL))
      await ring.used(1)
      // Under EVENT_IDX the first call is never suppressed, and it may be on its way.
      await ring.called()
      ring.driver.availFlags = 1
      ring.driver.usedEvent = 30_000
      for (let i = 0; i < 50; i++) {
        ring.offer(ring.prepare(0, device.NULL))
        await ring.used(1)
      }
      await ring.stop()
      expect(native.eventfdRead(ring.callFd)).toBeLessThan(0)
      expect(ring.counters.values[CALLS]).toBe(1)
      expect(ring.counters.values[CALLS_SUPPRESSED]).toBe(50)
    })
  })

  it('moves data from and to a file', async () => {
    await using engine = await Engine.start(emulate, { eventLoop })
    const { ring, fd, mapping } = await TestSession.start(engine)
    const content = Uint8Array.from({ length: 4096 }, (_, i) => (i * 3) & 0xff)
    writeSync(fd, content, 0, 4096, 0)
    const heads = Array.from({ length: 30 }, (_, i) => ring.prepare(i, device.READ, 100 * i, 64))
    ring.offer(...heads)
    const used = await ring.used(30)
    expect(used.map(({ id }) => id).sort((a, b) => a - b)).toEqual(heads)
    for (let i = 0; i < 30; i++) {
      const bytes = new Uint8Array(mapping.buffer, ring.buffer(i), 64)
      expect(Buffer.compare(bytes, content.subarray(100 * i, 100 * i + 64))).toBe(0)
    }
  })

  it('a request of more than IOV_MAX segments is continued by the device', async () => {
    await using engine = await Engine.start(emulate, { eventLoop })
    const session = await TestSession.start(engine)
    const { ring, fd, mapping, free, control } = session
    const count = MAX_VECTORS * 2 + 10
    writeSync(
      fd,
      Uint8Array.from({ length: 2 * count }, (_, i) => (i * 7) & 0xff),
      0,
      2 * count,
      0
    )
    const request = free
    const data = free + 64
    const table = free + 65536
    ring.driver.view.setUint32(request, device.READ, true)
    ring.driver.view.setUint32(request + 4, 0, true)
    const bytes = ring.driver.table(table, [
      { gpa: request, length: 8 },
      // Backwards, so that no two are one.
      ...Array.from({ length: count }, (_, i) => ({ gpa: data + 4 * (count - i), length: 2, flags: 2 })),
    ])
    ring.offer(ring.prepareIndirect(0, table, bytes))
    expect(await ring.used(1)).toEqual([{ id: 0, length: 2 * count }])
    expect(control[IO_ENDED]).toBe(3)
    const memory = new Uint8Array(mapping.buffer)
    for (let i = 0; i < 2 * count; i++) expect(memory[data + 4 * (count - (i >> 1)) + (i & 1)]).toBe((i * 7) & 0xff)
    await ring.stop()
  })

  it('a stopped ring has nothing in flight, and answers its base', async () => {
    await using engine = await Engine.start(emulate, { eventLoop })
    const { ring, control } = await TestSession.start(engine)
    const heads = Array.from({ length: 10 }, (_, i) => ring.prepare(i, device.HOLD))
    ring.offer(...heads)
    await until('all handled', () => control[HANDLED] === 10)
    let stopped = false
    const base = ring.stop().then((value) => {
      stopped = true
      return value
    })
    // It waits for them, and takes no more once the request arrived.
    await ring.thread.request({ kind: 'ping' })
    ring.offer(ring.prepare(20, device.NULL))
    await ring.thread.request({ kind: 'ping' })
    expect(stopped).toBe(false)
    Atomics.store(control, GATE, 1)
    expect(await base).toBe(10)
    expect(ring.driver.takeUsed().length).toBe(10)
    expect([control[HANDLED], control[CLOSED]]).toEqual([10, 1])
    await expect(ring.stop()).rejects.toThrow('no ring')
    expect(engine.deaths).toEqual([])
  })

  it('a ring that starts with chains waiting needs no kick', async () => {
    await using engine = await Engine.start(emulate, { eventLoop })
    const session = await TestSession.prepare(engine)
    session.ring.driver.offer(session.ring.prepare(0, device.NULL))
    await session.ring.start()
    expect(await session.ring.used(1)).toEqual([{ id: 0, length: 64 }])
  })

  it('a disabled ring pops nothing until it is enabled', async () => {
    await using engine = await Engine.start(emulate, { eventLoop })
    const { ring, control } = await TestSession.start(engine, { enabled: false })
    ring.offer(ring.prepare(0, device.NULL))
    await ring.thread.request({ kind: 'ping' })
    await ring.thread.request({ kind: 'ping' })
    expect(control[HANDLED]).toBe(0)
    await ring.thread.request({ kind: 'enableQueue', queue: ring.id, enabled: true })
    await ring.used(1)
    await ring.thread.request({ kind: 'enableQueue', queue: ring.id, enabled: false })
    ring.offer(ring.prepare(0, device.NULL))
    await ring.thread.request({ kind: 'ping' })
    await ring.thread.request({ kind: 'ping' })
    expect(control[HANDLED]).toBe(1)
    await ring.thread.request({ kind: 'enableQueue', queue: ring.id, enabled: true })
    await ring.used(1)
  })

  it('pause waits for what is in flight and pops no more; resume goes on, in other memory', async () => {
    await using engine = await Engine.start(emulate, { eventLoop })
    const session = await TestSession.start(engine, { rings: 2 })
    const { control } = session
    const [held, idle] = session.rings as [TestRing, TestRing]
    held.offer(held.prepare(0, device.HOLD))
    await until('it is handled', () => control[HANDLED] === 1)
    let paused = false
    const pause = session.pause().then(() => {
      paused = true
    })
    await idle.thread.request({ kind: 'ping' })
    idle.offer(idle.prepare(0, device.NULL))
    await idle.thread.request({ kind: 'ping' })
    expect(paused).toBe(false)
    Atomics.store(control, GATE, 1)
    await pause
    expect(await held.used(1)).toEqual([{ id: 0, length: 0 }])
    expect(control[HANDLED]).toBe(1)
    await session.setMemory([session.region])
    await session.resume()
    expect(await idle.used(1)).toEqual([{ id: 0, length: 64 }])
  })

  it('a session that is paused does not stop another one', async () => {
    await using engine = await Engine.start(emulate, { eventLoop })
    const one = await TestSession.start(engine)
    const two = await TestSession.start(engine)
    await one.pause()
    one.ring.offer(one.ring.prepare(0, device.NULL))
    two.ring.offer(two.ring.prepare(0, device.NULL))
    await two.ring.used(1)
    expect(one.control[HANDLED]).toBe(0)
    await one.resume()
    await one.ring.used(1)
  })

  it('a paused ring can be stopped', async () => {
    await using engine = await Engine.start(emulate, { eventLoop })
    const session = await TestSession.start(engine)
    await session.pause()
    session.ring.offer(session.ring.prepare(0, device.NULL))
    expect(await session.ring.stop()).toBe(0)
  })

  it('setCall: the new fd is called at once and from then on, the old one no more', async () => {
    await using engine = await Engine.start(emulate, { eventLoop })
    const { ring } = await TestSession.start(engine)
    ring.offer(ring.prepare(0, device.NULL))
    await ring.called()
    await ring.used(1)
    const old = ring.callFd
    ring.callFd = engine.eventfd()
    await ring.thread.request({ kind: 'setCall', queue: ring.id, callFd: ring.callFd })
    await ring.called()
    ring.offer(ring.prepare(0, device.NULL))
    await ring.used(1)
    await ring.called()
    expect(native.eventfdRead(old)).toBeLessThan(0)
    await ring.thread.request({ kind: 'setCall', queue: ring.id, callFd: -1 })
    ring.offer(ring.prepare(0, device.NULL))
    await ring.used(1)
    await ring.stop()
    expect(native.eventfdRead(ring.callFd)).toBeLessThan(0)
  })

  it('setCall under load loses no call', async () => {
    await using engine = await Engine.start(emulate, { eventLoop })
    const { ring } = await TestSession.start(engine)
    const depth = 8
    let done = 0
    let offered = 0
    const heads = Array.from({ length: depth }, (_, i) => ring.prepare(i, i % 2 === 0 ? device.NULL : device.READ))
    ring.offer(...heads)
    offered += depth
    for (let round = 0; done < offered; round++) {
      // The driver sleeps until it is called: a lost call would be the end.
      await ring.called()
      const again = ring.driver.takeUsed().map(({ id }) => id)
      done += again.length
      if (offered < 3000 && again.length > 0) {
        ring.offer(...again)
        offered += again.length
      }
      if (round % 25 === 24) {
        const callFd = engine.eventfd()
        await ring.thread.request({ kind: 'setCall', queue: ring.id, callFd })
        ring.callFd = callFd
      }
    }
    expect(done).toBe(offered)
    expect(done).toBeGreaterThanOrEqual(3000)
  })

  it('setKick: the new fd wakes it, the old one no more, also when it was signalled in between', async () => {
    await using engine = await Engine.start(emulate, { eventLoop })
    const { ring, control } = await TestSession.start(engine)
    ring.offer(ring.prepare(0, device.NULL))
    await ring.used(1)
    for (let i = 0; i < 20; i++) {
      const old = ring.kickFd
      const kickFd = engine.eventfd()
      const changed = ring.thread.request({ kind: 'setKick', queue: ring.id, kickFd })
      if (i % 2 === 0) ring.kick()
      await changed
      ring.kickFd = kickFd
      ring.offer(ring.prepare(0, device.NULL))
      await ring.used(1)
      check(native.eventfdWrite(old, 1), 'the old fd is still open')
    }
    await ring.thread.request({ kind: 'ping' })
    expect(control[HANDLED]).toBe(21)
    await ring.stop()
  })

  it('setKick with the same fd, twice in a row, and to none and back', async () => {
    await using engine = await Engine.start(emulate, { eventLoop })
    const { ring } = await TestSession.start(engine)
    const { thread, id, kickFd } = ring
    await Promise.all([1, 2, 3].map(() => thread.request({ kind: 'setKick', queue: id, kickFd })))
    ring.offer(ring.prepare(0, device.NULL))
    await ring.used(1)
    await thread.request({ kind: 'setKick', queue: id, kickFd: -1 })
    ring.driver.offer(ring.prepare(0, device.NULL))
    await ring.used(1)
    await thread.request({ kind: 'setKick', queue: id, kickFd })
    ring.offer(ring.prepare(0, device.NULL))
    await ring.used(1)
    expect(await ring.stop()).toBe(3)
    expect(engine.events).toEqual([])
  })

  it('a ring without a kick fd is polled, and messages and other rings get through', async () => {
    await using engine = await Engine.start(emulate, { eventLoop })
    const polled = await TestSession.start(engine, { kick: false, call: false })
    const other = await TestSession.start(engine)
    for (let i = 0; i < 20; i++) {
      polled.ring.offer(polled.ring.prepare(0, device.READ))
      expect((await polled.ring.used(1)).length).toBe(1)
      other.ring.offer(other.ring.prepare(0, device.READ))
      await other.ring.used(1)
    }
    await polled.ring.thread.request({ kind: 'ping' })
    expect(await polled.ring.stop()).toBe(20)
    expect(await other.ring.stop()).toBe(20)
  })

  it('polling before a sleep serves the same', async () => {
    await using engine = await Engine.start(emulate, { eventLoop, pollMaxUs: 200 })
    const { ring } = await TestSession.start(engine, { eventIdx: true })
    for (let i = 0; i < 500; i++) {
      ring.driver.usedEvent = ring.driver.usedIdx
      ring.offer(ring.prepare(0, i % 2 === 0 ? device.NULL : device.READ))
      await ring.called()
      expect(ring.driver.takeUsed().length).toBe(1)
    }
    const { pollHits, pollMisses } = engine.threads[0]!.snapshot()
    expect(pollHits + pollMisses).toBeGreaterThan(0)
  })

  it('several queues on one iothread, several on several', async () => {
    await using engine = await Engine.start(emulate, { eventLoop, count: 3 })
    for (const spread of [false, true]) {
      const session = await TestSession.start(engine, { rings: 6, spread })
      expect(new Set(session.rings.map(({ thread }) => thread.index)).size).toBe(spread ? 3 : 1)
      for (let round = 0; round < 20; round++) {
        for (const ring of session.rings) {
          ring.offer(...[0, 1, 2, 3].map((slot) => ring.prepare(slot, slot % 2 === 0 ? device.NULL : device.READ)))
        }
        for (const ring of session.rings) expect((await ring.used(4)).length).toBe(4)
      }
      expect(session.control[HANDLED]).toBe(6 * 20 * 4)
      expect(await Promise.all(session.rings.map((ring) => ring.stop()))).toEqual([80, 80, 80, 80, 80, 80])
      expect(session.control[CLOSED]).toBe(6)
    }
    expect(engine.events).toEqual([])
  })

  it.each([
    ['calls', 0],
    ['polls', 1],
  ])(
    'a ring that is never empty, of a driver that %s, keeps neither others nor messages from their turn',
    async (_name, flags) => {
      await using engine = await Engine.start(emulate, { eventLoop })
      const busy = await TestSession.start(engine)
      busy.ring.driver.availFlags = flags
      const other = await TestSession.start(engine)
      busy.ring.offer(...[0, 1, 2, 3].map((slot) => busy.ring.prepare(slot, device.ENDLESS)))
      await until('it is busy', () => busy.control[HANDLED]! > 1000)
      for (let i = 0; i < 10; i++) {
        other.ring.offer(other.ring.prepare(0, device.READ))
        await other.ring.used(1)
        await other.ring.thread.request({ kind: 'ping' })
      }
      await busy.pause()
      const handled = busy.control[HANDLED]!
      await busy.ring.thread.request({ kind: 'ping' })
      expect(busy.control[HANDLED]).toBe(handled)
      await busy.resume()
      await until('it goes on', () => busy.control[HANDLED]! > handled + 1000)
      await busy.ring.stop()
      expect(engine.deaths).toEqual([])
    }
  )

  it('setCall is answered while a ring calls all the time', async () => {
    await using engine = await Engine.start(emulate, { eventLoop })
    const { ring, control } = await TestSession.start(engine)
    ring.offer(...[0, 1, 2, 3].map((slot) => ring.prepare(slot, device.ENDLESS)))
    await until('it is busy', () => control[HANDLED]! > 1000)
    let answered = false
    const callFd = engine.eventfd()
    const set = ring.thread.request({ kind: 'setCall', queue: ring.id, callFd }).then(() => {
      answered = true
    })
    const start = control[HANDLED]!
    await until('the answer, or 200 000 requests without it', () => answered || control[HANDLED]! - start > 200_000)
    const inTime = answered
    Atomics.store(control, GATE, 1)
    await set
    expect(inTime).toBe(true)
    ring.callFd = callFd
    await ring.called()
  })

  describe('a device that fails', () => {
    it.each([
      ['in handle', device.THROW, 'the handler failed'],
      ['in completed', device.THROW_LATER, 'the handler failed later'],
      ['by completing a chain twice', device.COMPLETE_TWICE, 'chain 0 was completed twice'],
    ])('%s: it is reported, its ring stops, the thread lives on', async (_name, operation, message) => {
      await using engine = await Engine.start(emulate, { eventLoop })
      const bad = await TestSession.start(engine)
      const good = await TestSession.start(engine)
      bad.ring.offer(bad.ring.prepare(0, operation), bad.ring.prepare(1, device.NULL))
      await until('the report', () => engine.events.length > 0)
      const failure = { kind: 'deviceFailed', session: bad.id, index: 0, chain: 0, error: expect.any(Error) }
      expect(engine.events).toEqual([failure])
      const [event] = engine.events
      expect(event).toMatchObject({ error: { message } })
      good.ring.offer(good.ring.prepare(0, device.READ))
      await good.ring.used(1)
      // It takes no more, and does not keep the session from ending.
      const handled = bad.control[HANDLED]
      bad.ring.offer(bad.ring.prepare(2, device.NULL))
      await bad.ring.thread.request({ kind: 'ping' })
      await bad.pause()
      await bad.ring.stop()
      expect(bad.control[HANDLED]).toBe(handled)
      expect(bad.control[CLOSED]).toBe(1)
      expect(engine.deaths).toEqual([])
      expect(engine.events.length).toBe(1)
    })

    it('with chains in flight: the ring stops when their I/O has ended', async () => {
      await using engine = await Engine.start(emulate, { eventLoop })
      const { ring, control } = await TestSession.start(engine)
      ring.offer(...[0, 1, 2, 3].map((slot) => ring.prepare(slot, device.HOLD)), ring.prepare(4, device.THROW))
      await until('the report', () => engine.events.length > 0)
      await ring.stop()
      expect(control[CLOSED]).toBe(1)
    })

    it('by throwing what no message can carry: it is reported nevertheless', async () => {
      await using engine = await Engine.start(emulate, { eventLoop })
      const bad = await TestSession.start(engine)
      bad.ring.offer(bad.ring.prepare(0, device.THROW_ODDITY))
      await until('a report or a death', () => engine.events.length + engine.deaths.length > 0)
      expect(engine.deaths).toEqual([])
      expect(engine.events).toMatchObject([{ kind: 'deviceFailed', session: bad.id, index: 0 }])
      await bad.ring.stop()
    })

    it.each(['error', 'oddity'] as const)('by throwing an %s instead of a handler: the start fails', async (refuse) => {
      await using engine = await Engine.start(emulate, { eventLoop })
      await expect(TestSession.start(engine, { data: { refuse } })).rejects.toBeDefined()
      expect(engine.deaths).toEqual([])
      expect(await engine.threads[0]!.request({ kind: 'ping' })).toBe(0)
    })

    it('by not being a device: the start fails', async () => {
      await using engine = await Engine.start(emulate, { eventLoop })
      const module = new URL('./fixtures/no-handler.ts', import.meta.url).href
      await expect(TestSession.start(engine, { module })).rejects.toThrow(
        'does not export the function createQueueHandler'
      )
      await expect(TestSession.start(engine, { module: 'file:///no/such/module.ts' })).rejects.toThrow()
      expect(await engine.threads[0]!.request({ kind: 'ping' })).toBe(0)
    })
  })

  it('a broken ring is reported, the others go on, it can be stopped', async () => {
    await using engine = await Engine.start(emulate, { eventLoop })
    const session = await TestSession.start(engine, { rings: 2 })
    const [bad, good] = session.rings as [TestRing, TestRing]
    bad.offer(bad.prepare(0, device.NULL), 1000)
    await until('the report', () => engine.events.length > 0)
    expect(engine.events).toEqual([
      { kind: 'ringBroken', session: session.id, index: 0, code: 'ERR_RING_HEAD', message: expect.any(String) },
    ])
    // What came before it was served.
    expect(await bad.used(1)).toEqual([{ id: 0, length: 64 }])
    expect(bad.counters.values[BROKEN]).toBe(1)
    good.offer(good.prepare(0, device.NULL))
    await good.used(1)
    bad.offer(bad.prepare(1, device.NULL))
    await bad.thread.request({ kind: 'ping' })
    expect(bad.driver.takeUsed()).toEqual([])
    expect(await bad.stop()).toBe(1)
    expect(engine.events.length).toBe(1)
  })

  it('a ring outside memory does not start, and breaks when its memory goes', async () => {
    await using engine = await Engine.start(emulate, { eventLoop })
    const session = await TestSession.prepare(engine)
    await session.setMemory([])
    const start = session.ring.start()
    await expect(start).rejects.toThrow('the memory that the ring lives in')
    // Not a failure of ours: its code arrives.
    await expect(start).rejects.toMatchObject({ name: 'RingError', code: 'ERR_RING_MEMORY' })
    await session.setMemory([session.region])
    await session.ring.start()
    await session.setMemory([])
    await until('the report', () => engine.events.length > 0)
    expect(engine.events).toMatchObject([{ kind: 'ringBroken', code: 'ERR_RING_MEMORY' }])
    await session.ring.stop()
  })

  it('a kick fd that cannot be polled ends the session, not the thread', async () => {
    await using engine = await Engine.start(emulate, { eventLoop })
    const session = await TestSession.prepare(engine)
    session.ring.kickFd = 99_999
    await session.ring.start()
    await until('the report', () => engine.events.length > 0)
    expect(engine.events).toMatchObject([{ kind: 'deviceFailed', session: session.id, index: 0 }])
    await session.ring.stop()
    expect(engine.deaths).toEqual([])
  })

  it('a call fd that cannot be written ends the session, not the thread', async () => {
    await using engine = await Engine.start(emulate, { eventLoop })
    const { ring, id } = await TestSession.prepare(engine)
    ring.callFd = 99_999
    await ring.start()
    ring.offer(ring.prepare(0, device.NULL))
    await until('the report', () => engine.events.length > 0)
    expect(engine.events).toMatchObject([{ kind: 'deviceFailed', session: id, index: 0 }])
    await ring.stop()
    expect(engine.deaths).toEqual([])
  })

  describe('a call fd whose counter is full', () => {
    const fill = (fd: number) => {
      for (let i = 0; i < 2048; i++) check(native.eventfdWrite(fd, 2 ** 53 - 1), 'fill')
      // 2^64 - 2048 by now, and the limit is 2^64 - 2.
      check(native.eventfdWrite(fd, 2046), 'fill')
      expect(native.eventfdWrite(fd, 1)).toBe(-11)
    }

    it('is as good as called: the ring goes on, and stops', async () => {
      await using engine = await Engine.start(emulate, { eventLoop })
      const { ring } = await TestSession.start(engine)
      fill(ring.callFd)
      for (let i = 0; i < 3; i++) {
        ring.offer(ring.prepare(0, device.NULL))
        await ring.used(1)
      }
      let base: number | undefined
      void ring.stop().then(
        (value) => {
          base = value
        },
        () => {}
      )
      await until('the ring has stopped', () => base === 3, 3)
      expect(engine.events).toEqual([])
    })

    // Without io_uring O_NONBLOCK is all that there is.
    test.skipIf(emulate || !hasUring)(
      'and that blocks, does not keep a ring that is drained from stopping',
      async () => {
        await using engine = await Engine.start(emulate, { eventLoop })
        const { ring, control } = await TestSession.start(engine)
        fill(ring.callFd)
        check(native.setNonblock(ring.callFd, false), 'setNonblock')
        ring.offer(ring.prepare(0, device.PARK), ring.prepare(1, device.PARK))
        await until('they are handled', () => control[HANDLED] === 2)
        let base: number | undefined
        void ring.stop().then(
          (value) => {
            base = value
          },
          () => {}
        )
        await ring.send({ complete: [0] })
        await ring.send({ complete: [2] })
        await until('the ring has stopped', () => base === 2, 3)
        expect((await ring.used(2)).length).toBe(2)
      }
    )

    it('can be exchanged', async () => {
      await using engine = await Engine.start(emulate, { eventLoop })
      const { ring } = await TestSession.start(engine)
      fill(ring.callFd)
      ring.offer(ring.prepare(0, device.NULL))
      await ring.used(1)
      const callFd = engine.eventfd()
      let set = false
      void ring.thread.request({ kind: 'setCall', queue: ring.id, callFd }).then(
        () => {
          set = true
        },
        () => {}
      )
      await until('setCall is answered', () => set, 3)
      ring.callFd = callFd
      await ring.called()
    })
  })

  it('requests for rings that are not there are refused', async () => {
    await using engine = await Engine.start(emulate, { eventLoop })
    const [thread] = engine.threads
    await expect(thread!.request({ kind: 'stopQueue', queue: 7, keep: false })).rejects.toThrow('no ring 7')
    await expect(thread!.request({ kind: 'enableQueue', queue: 7, enabled: true })).rejects.toThrow('no ring 7')
    await expect(thread!.request({ kind: 'setCall', queue: 7, callFd: -1 })).rejects.toThrow('no ring 7')
    await expect(thread!.request({ kind: 'setKick', queue: 7, kickFd: -1 })).rejects.toThrow('no ring 7')
    expect(await thread!.request({ kind: 'pause', session: 1 })).toBe(0)
    expect(await thread!.request({ kind: 'endSession', session: 1 })).toBe(0)
  })

  it('rings start and stop many times under one id, none inherits from the last', async () => {
    await using engine = await Engine.start(emulate, { eventLoop })
    const session = await TestSession.prepare(engine)
    const { ring } = session
    for (let i = 0; i < 50; i++) {
      // Avail goes on where it was: a new start at the driver's index.
      Object.assign(session.options, { base: i & 0xffff })
      await ring.start()
      // A kick may be on its way while it stops.
      ring.offer(ring.prepare(0, i % 2 === 0 ? device.READ : device.NULL))
      await ring.used(1)
      ring.kick()
      expect(await ring.thread.request({ kind: 'stopQueue', queue: ring.id, keep: false })).toBe(i + 1)
      engine.started.delete(ring)
    }
    expect(session.control[CLOSED]).toBe(50)
    expect(engine.events).toEqual([])
  })

  it('a pool closes with rings running, and abandons with requests in flight', async () => {
    await using closed = await Engine.start(emulate, { eventLoop, count: 2 })
    const session = await TestSession.start(closed, { rings: 2, spread: true })
    await closed.close()
    expect(session.control[CLOSED]).toBe(0)
    await using abandoned = await Engine.start(emulate, { eventLoop })
    const { ring, control } = await TestSession.start(abandoned)
    ring.offer(ring.prepare(0, device.HOLD))
    await until('it is handled', () => control[HANDLED] === 1)
    await abandoned.abandon()
    expect([...closed.deaths, ...abandoned.deaths]).toEqual([])
  })

  // In the event loop each round is an object of Node's.
  test.skipIf(eventLoop || (!emulate && !hasUring)).each([
    ['without I/O', device.ENDLESS],
    ['with I/O', device.ENDLESS_IO],
  ])(
    'the hot path allocates nothing worth a collection: less than 8 bytes per request, %s',
    async (_name, operation) => {
      await using engine = await Engine.start(emulate, { eventLoop })
      const { ring, control, heap } = await TestSession.start(engine)
      ring.offer(...Array.from({ length: 32 }, (_, slot) => ring.prepare(slot, operation)))
      await until('all samples', () => control[device.SAMPLES] === device.MAX_SAMPLES, 20)
      Atomics.store(control, GATE, 1)
      await ring.stop()
      // A collection shows as a negative step; the median step is free of it, and of the optimizing compiler's moments.
      const steps = Array.from({ length: device.MAX_SAMPLES / 2 }, (_, i) => {
        const at = device.MAX_SAMPLES / 2 + i
        return (heap[at]! - heap[at - 1]!) / device.SAMPLE_EVERY
      })
      const median = steps.sort((a, b) => a - b)[steps.length / 2]!
      if (process.env['VIRTIOD_TEST_PRINT'] !== undefined) console.log(`${median} bytes per request`, steps)
      expect(median).toBeLessThan(8)
    }
  )
})

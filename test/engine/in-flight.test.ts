/** In-flight tracking through an iothread, and rings that stop with chains in flight. */
import { writeSync } from 'node:fs'
import { afterAll, describe, expect, test } from 'vitest'
import { ABANDONED, CHAINS, COMPLETED } from '../../src/engine/counters.ts'
import { native } from '../../src/native.ts'
import type { CardReport } from './fixtures/card.ts'
import * as device from './fixtures/device.ts'
import { check, closeEngines, Engine, hasUring, PACKED_BASE, TestSession, until } from './harness.ts'

afterAll(closeEngines)

const { CLOSED, HANDLED, IO_ENDED, PARK } = device
const CARD = new URL('./fixtures/card.ts', import.meta.url).href

describe.each([
  ['io_uring', false],
  ['the emulation', true],
])('on %s', (_, emulate) => {
  const it = test.skipIf(!emulate && !hasUring)

  describe.each([
    { packed: false, inOrder: false },
    { packed: true, inOrder: false },
    { packed: false, inOrder: true },
    { packed: true, inOrder: true },
  ])('a ring with %o', (format) => {
    const options = { ...format, inflight: true }
    const start = format.packed ? PACKED_BASE : 0

    it('has its chains in the buffer as long as they are in flight', async () => {
      await using engine = await Engine.start(emulate)
      const { ring, control } = await TestSession.start(engine, options)
      const heads = [0, 1, 2].map((slot) => ring.prepare(slot, PARK))
      ring.offer(...heads)
      await until('they are handled', () => control[HANDLED] === 3)
      expect(ring.marks).toBe(3)
      await ring.send({ complete: [heads[0]!] })
      await ring.used(1)
      await ring.round()
      expect(ring.marks).toBe(2)
      if (!format.packed) expect([0, 2, 4].map((head) => ring.inFlight(head))).toEqual([false, true, true])
      await ring.send({ complete: [heads[1]!, heads[2]!] })
      await ring.used(2)
      // And many more, each with two descriptors in rings of 64.
      for (let i = 0; i < 200; i++) {
        ring.offer(ring.prepare(i % 7, i % 2 === 0 ? device.NULL : device.READ))
        await ring.used(1)
      }
      await ring.stop()
      expect(ring.marks).toBe(0)
      expect(engine.events).toEqual([])
    })

    it('stopped with them it answers at once, and whoever starts it next does them again, in order', async () => {
      await using engine = await Engine.start(emulate)
      const session = await TestSession.start(engine, options)
      const { ring, control } = session
      const heads = [3, 1, 2].map((slot) => ring.prepare(slot, PARK, 0, slot))
      ring.offer(ring.prepare(0, device.NULL), ...heads)
      expect(await ring.used(1)).toEqual([{ id: 0, length: 64 }])
      await until('they are handled', () => control[HANDLED] === 4)
      const base = await ring.stop(true)
      // All are taken.
      if (format.packed) expect(base & 0xffff).toBe(0x8000 | 8)
      else expect(base).toBe(4)
      expect(control[CLOSED]).toBe(1)
      expect(ring.marks).toBe(3)
      expect(ring.driver.takeUsed()).toEqual([])
      const { values } = ring.counters
      expect([values[CHAINS], values[COMPLETED], values[ABANDONED]]).toEqual([4, 1, 3])
      // A front-end after a crash has no newer base than this.
      Object.assign(session.options, { base: start })
      ring.driver.offer(ring.prepare(4, device.NULL))
      await ring.start()
      await until('they are handled again', () => control[HANDLED] === 8)
      expect(ring.marks).toBeGreaterThanOrEqual(3)
      await ring.send({ complete: heads })
      const used = await ring.used(4)
      const order = used.map(({ id }) => id)
      // The one that is not parked overtakes them, if it may.
      expect(order).toEqual(format.inOrder ? [6, 2, 4, 8] : [8, 6, 2, 4])
      for (const { id, length } of used) expect(length).toBe(id === 8 ? 64 : id / 2)
      const end = await ring.stop()
      if (format.packed) expect(end).toBe(ring.driver.base)
      else expect(end).toBe(5)
      expect(ring.marks).toBe(0)
      expect(engine.events).toEqual([])
    })
  })

  it.each([false, true])('a ring that stops completes what it has not even looked at (packed %s)', async (packed) => {
    await using engine = await Engine.start(emulate)
    const session = await TestSession.start(engine, { packed, inflight: true })
    const { ring, control } = session
    ring.offer(...[0, 1, 2].map((slot) => ring.prepare(slot, PARK, 0, slot + 1)))
    await until('they are handled', () => control[HANDLED] === 3)
    await ring.stop(true)
    // A new back-end, whose ring is not enabled.
    for (const slot of [0, 1, 2]) ring.prepare(slot, slot === 1 ? device.READ : device.NULL, 0, slot + 1)
    Object.assign(session.options, { enabled: false })
    await ring.start()
    await ring.round()
    expect([control[HANDLED], ring.marks]).toEqual([3, 3])
    ring.driver.offer(ring.prepare(3, device.NULL))
    const base = await ring.stop()
    expect([control[HANDLED], ring.marks]).toEqual([6, 0])
    expect(packed ? base & 0x7fff : base).toBe(packed ? 6 : 3)
    const used = ring.driver.takeUsed()
    expect(used.sort((a, b) => a.id - b.id)).toEqual([0, 1, 2].map((slot) => ({ id: slot * 2, length: slot + 1 })))
    expect(engine.events).toEqual([])
  })

  it('a receive ring that stops gives such chains back empty', async () => {
    await using engine = await Engine.start(emulate)
    const session = await TestSession.start(engine, { inflight: true })
    const { ring, control } = session
    ring.offer(...[0, 1].map((slot) => ring.prepare(slot, PARK)))
    await until('they are handled', () => control[HANDLED] === 2)
    await ring.stop(true)
    Object.assign(session.options, { module: CARD })
    await ring.start()
    await ring.round()
    expect(await ring.stop()).toBe(2)
    expect(ring.driver.takeUsed()).toEqual([0, 2].map((id) => ({ id, length: 0 })))
    expect(ring.marks).toBe(0)
    const { values } = ring.counters
    expect(values[CHAINS]! - values[COMPLETED]! - values[ABANDONED]!).toBe(0)
  })

  it('a ring that stops does not wait for a translation', async () => {
    await using engine = await Engine.start(emulate)
    const session = await TestSession.start(engine, { inflight: true, iova: 0x1_0000_0000 })
    const { ring, control } = session
    await session.update(session.entry(0, session.free))
    ring.offer(ring.prepare(0, PARK))
    await until('it is handled', () => control[HANDLED] === 1)
    await ring.stop(true)
    const page = Math.floor(ring.request(0) / 4096) * 4096
    await session.invalidate(page, 4096)
    await ring.start()
    await until('the miss', () => engine.misses.some(({ address }) => address === 0x1_0000_0000 + ring.request(0)))
    expect(await ring.stop()).toBe(1)
    expect([control[HANDLED], ring.marks]).toEqual([1, 1])
    expect(engine.events).toEqual([])
  })

  it('a buffer of another version keeps the ring from starting', async () => {
    await using engine = await Engine.start(emulate)
    const session = await TestSession.prepare(engine, { inflight: true })
    new Uint16Array(session.ring.inflight!.buffer)[4] = 77
    await expect(session.ring.start()).rejects.toThrow('version 77')
    new Uint16Array(session.ring.inflight!.buffer)[4] = 0
    await session.ring.start()
  })

  it('a receiver puts its chains back before its ring stops, whatever is kept', async () => {
    await using engine = await Engine.start(emulate)
    const session = await TestSession.prepare(engine, { module: CARD, inflight: true })
    const reports: CardReport[] = []
    engine.pool.on('reported', ({ session: id, message }) => {
      if (id === session.id) reports.push(message as CardReport)
    })
    const { ring } = session
    await ring.start()
    ring.offer(...[0, 1, 2].map((slot) => ring.prepare(slot, 0)))
    await ring.thread.request({ kind: 'message', queue: ring.id, message: { hold: 2 } })
    await until('it holds chains', () => reports.length > 0)
    expect(ring.marks).toBe(2)
    expect(await ring.stop(true)).toBe(0)
    expect(ring.marks).toBe(0)
    expect(ring.counters.values[ABANDONED]).toBe(0)
  })

  it('what was completed before the ring stopped is the driver’s', async () => {
    await using engine = await Engine.start(emulate)
    const { ring, control } = await TestSession.start(engine, { inflight: true })
    ring.offer(ring.prepare(0, PARK), ring.prepare(1, PARK))
    await until('they are handled', () => control[HANDLED] === 2)
    const sent = ring.send({ complete: [0] })
    const stopped = ring.stop(true)
    await sent
    expect(await stopped).toBe(2)
    expect(ring.driver.takeUsed()).toEqual([{ id: 0, length: 64 }])
    expect([ring.inFlight(0), ring.inFlight(2)]).toEqual([false, true])
  })

  it('messages find no abandoned chain', async () => {
    await using engine = await Engine.start(emulate)
    const { ring, control } = await TestSession.start(engine, { inflight: true })
    ring.offer(ring.prepare(0, PARK))
    await until('it is handled', () => control[HANDLED] === 1)
    const stopped = ring.stop(true)
    // It may have stopped by then, or not.
    await ring.send({ complete: [0] }).catch((error) => expect(String(error)).toContain('no ring'))
    expect(await stopped).toBe(1)
    expect(ring.driver.takeUsed()).toEqual([])
    expect(ring.marks).toBe(1)
    expect(engine.events).toEqual([])
  })

  // Only a read that the kernel can't do yet shows it, and without io_uring that would hold the thread.
  test.skipIf(emulate || !hasUring)(
    'only what the kernel has is waited for; its end is ignored, but logged, and what waits for its turn gets none',
    async () => {
      await using engine = await Engine.start(emulate)
      const pair = new Int32Array(2)
      check(native.socketpair(pair), 'socketpair')
      const [fd, peer] = [engine.own(pair[0]!), engine.own(pair[1]!)]
      const session = await TestSession.start(engine, { inflight: true, fd })
      const other = await TestSession.start(engine)
      const log = new SharedArrayBuffer(4096)
      await session.setLog({ buffer: log, offset: 0, size: 4096 })
      const { ring, control } = session
      ring.offer(ring.prepare(0, device.READ), ring.prepare(1, PARK))
      await until('they are handled', () => control[HANDLED] === 2)
      let base: number | undefined
      const stopped = ring.stop(true).then((value) => {
        base = value
      })
      await other.ring.round()
      await other.ring.send({ readAll: true })
      await other.ring.send({ giveAll: true })
      // Its handler hears nothing: it would say that it has no such chain.
      await ring.send({ complete: [99] })
      await other.ring.round()
      expect(engine.events).toEqual([])
      expect(base).toBeUndefined()
      expect(control[CLOSED]).toBe(0)
      writeSync(peer, new Uint8Array(64).fill(7))
      await stopped
      expect(base).toBe(2)
      expect([control[IO_ENDED], control[CLOSED], ring.marks]).toEqual([0, 1, 2])
      expect(ring.counters.values[COMPLETED]).toBe(0)
      expect(ring.driver.takeUsed()).toEqual([])
      // The kernel has written there.
      expect(ring.driver.view.getUint8(ring.buffer(0))).toBe(7)
      const page = Math.floor(ring.buffer(0) / 4096)
      expect(new Uint8Array(log)[page >> 3]! & (1 << (page & 7))).not.toBe(0)
    }
  )

  it('a ring that has stopped calls no more', async () => {
    await using engine = await Engine.start(emulate)
    for (const keep of [false, true]) {
      const { ring } = await TestSession.start(engine, { inflight: true })
      ring.offer(...[0, 1, 2].map((slot) => ring.prepare(slot, slot === 1 ? device.READ : device.NULL)))
      await ring.stop(keep)
      native.eventfdRead(ring.callFd)
      await ring.round()
      await ring.round()
      expect(native.eventfdRead(ring.callFd)).toBeLessThan(0)
    }
  })
})

/** Rings behind a vIOMMU: they wait for translations, ask for each once, and let go of those that are taken away. */
import { afterAll, describe, expect, test } from 'vitest'
import { IOTLB_READ, IOTLB_WRITE } from '../../src/virtio/memory.ts'
import type { CardReport } from './fixtures/card.ts'
import * as device from './fixtures/device.ts'
import { asleep, closeEngines, Engine, hasUring, type TestRing, TestSession, until } from './harness.ts'

afterAll(closeEngines)

const { HANDLED, PARK } = device
const CARD = new URL('./fixtures/card.ts', import.meta.url).href
const IOVA = 0x7_0000_0000
const PAGE = 4096
/** 64 slots of 128 bytes: the first 32 of them are on one page, the last ones on the next. */
const SIZE = 128
const lastSlot = 63

const pageOf = (at: number) => Math.floor(at / PAGE) * PAGE

/** Answers every miss with its page, as a front-end does, until `done`. Returns the misses. */
async function answer(engine: Engine, session: TestSession, done: () => boolean) {
  let answered = 0
  const misses: string[] = []
  await until(
    'the answers suffice',
    () => {
      for (; answered < engine.misses.length; answered++) {
        const { address, access } = engine.misses[answered]!
        misses.push(`${address} ${access}`)
        void session.update(session.entry(pageOf(address - IOVA), PAGE))
      }
      return done()
    },
    20
  )
  return misses
}

/** All of its ring and requests, but nothing of `except`. */
async function mapAll(session: TestSession, except: number): Promise<void> {
  for (let at = 0; at < session.free; at += PAGE) if (at !== except) await session.update(session.entry(at, PAGE))
}

describe.each([
  ['io_uring', false],
  ['the emulation', true],
])('on %s', (_, emulate) => {
  const it = test.skipIf(!emulate && !hasUring)

  describe.each([
    { packed: false, inflight: false },
    { packed: true, inflight: false },
    { packed: true, inflight: true },
    { packed: false, inflight: true },
  ])('a ring with %o', (format) => {
    const options = { ...format, iova: IOVA, size: SIZE }
    const pageOfSlot = (ring: TestRing, slot: number) => pageOf(ring.request(slot))

    it('starts without any translation, and asks for each page once', async () => {
      await using engine = await Engine.start(emulate)
      const session = await TestSession.start(engine, options)
      const { ring } = session
      // Behind the answer to the start: a session knows no ring that misses something before it is started.
      expect(engine.misses).toEqual([])
      await until('the first miss', () => engine.misses.length > 0)
      expect(engine.misses[0]).toMatchObject({ session: session.id, index: 0 })
      // No kick: a late one would make it ask again.
      ring.driver.offer(...[0, 10, lastSlot].map((slot) => ring.prepare(slot, device.READ)))
      const used: number[] = []
      const misses = await answer(engine, session, () => {
        used.push(...ring.driver.takeUsed().map(({ id }) => id))
        return used.length === 3
      })
      expect(used.sort((a, b) => a - b)).toEqual([0, 20, lastSlot * 2])
      // The ring's parts and the requests' pages; no page was asked for twice.
      expect(new Set(misses).size).toBe(misses.length)
      expect(misses.length).toBeLessThanOrEqual(session.free / PAGE)
      await ring.called()
      await ring.stop()
      expect(engine.events).toEqual([])
    })

    it('sleeps while it waits, is asked once however often it is woken, and stops', async () => {
      await using engine = await Engine.start(emulate, { pollMaxUs: 50 })
      const session = await TestSession.start(engine, options)
      const { ring, control } = session
      const missing = pageOfSlot(ring, lastSlot)
      await mapAll(session, missing)
      engine.misses.length = 0
      // No kick: a late one would make it ask again.
      ring.driver.offer(ring.prepare(0, device.NULL), ring.prepare(lastSlot, device.NULL))
      await ring.round()
      await ring.used(1)
      await until('the miss', () => engine.misses.length > 0)
      expect(engine.misses).toMatchObject([{ address: IOVA + ring.request(lastSlot) }])
      expect(engine.misses[0]!.access & IOTLB_READ).not.toBe(0)
      // Other updates wake it, and change nothing.
      for (let i = 0; i < 5; i++) await session.update(session.entry(0, PAGE))
      await ring.round()
      expect(engine.misses.length).toBe(1)
      // One that finds work in its ring all the time would not.
      await asleep()
      // A kick says that something may have changed, but not while the answer may be on its way.
      ring.kick()
      await ring.round()
      expect(engine.misses.length).toBe(1)
      await until('the miss again', () => {
        ring.kick()
        return engine.misses.length > 1
      })
      expect(engine.misses[1]).toEqual(engine.misses[0])
      expect(control[HANDLED]).toBe(1)
      await ring.stop()
      expect(ring.driver.takeUsed()).toEqual([])
      expect(engine.events).toEqual([])
    })

    it('does not ask again for what it got with less access', async () => {
      await using engine = await Engine.start(emulate)
      const session = await TestSession.start(engine, options)
      const { ring } = session
      const missing = pageOfSlot(ring, lastSlot)
      await mapAll(session, missing)
      engine.misses.length = 0
      ring.driver.offer(ring.prepare(lastSlot, device.NULL))
      await ring.round()
      await until('the miss', () => engine.misses.length === 1)
      await session.update(session.entry(missing, PAGE, IOTLB_READ))
      // The request can be read now, its buffer not be written.
      await until('the miss of write access', () => engine.misses.length === 2)
      expect(engine.misses[1]).toMatchObject({ address: IOVA + ring.buffer(lastSlot) })
      expect(engine.misses[1]!.access & IOTLB_WRITE).not.toBe(0)
      for (let i = 0; i < 5; i++) await session.update(session.entry(missing, PAGE, IOTLB_READ))
      await ring.round()
      expect(engine.misses.length).toBe(2)
      await session.update(session.entry(missing, PAGE))
      await ring.used(1)
      expect(engine.events).toEqual([])
    })

    it('asks for more access to what it could read', async () => {
      await using engine = await Engine.start(emulate)
      const session = await TestSession.start(engine, options)
      const { ring } = session
      const missing = pageOfSlot(ring, lastSlot)
      await mapAll(session, missing)
      engine.misses.length = 0
      // The request of the one is where the other's buffer is.
      const [reader, writer] = [ring.prepare(lastSlot, device.NULL), ring.prepare(0, device.NULL)]
      ring.driver.descriptor(reader + 1, { gpa: ring.buffer(1) + IOVA, length: 1, flags: 2 })
      ring.driver.descriptor(writer + 1, { gpa: ring.request(lastSlot) + IOVA, length: 1, flags: 2 })
      ring.driver.offer(reader, writer)
      await ring.round()
      await until('the first miss', () => engine.misses.length === 1)
      await session.update(session.entry(missing, PAGE, IOTLB_READ))
      await until('the second one', () => engine.misses.length === 2)
      const address = ring.request(lastSlot) + IOVA
      expect(engine.misses.map((miss) => [miss.address, miss.access])).toEqual([
        [address, IOTLB_READ],
        [address, IOTLB_WRITE],
      ])
      await session.update(session.entry(missing, PAGE))
      await ring.used(2)
      expect(engine.events).toEqual([])
    })

    it('invalidate waits for what is in flight there, and for nothing else', async () => {
      await using engine = await Engine.start(emulate)
      const session = await TestSession.start(engine, options)
      const { ring, control } = session
      await mapAll(session, -1)
      const [near, far] = [ring.prepare(0, PARK), ring.prepare(lastSlot, PARK)]
      ring.offer(near, far)
      await until('they are handled', () => control[HANDLED] === 2)
      const page = pageOfSlot(ring, lastSlot)
      expect(page).not.toBe(pageOfSlot(ring, 0))
      // Behind all buffers.
      await session.invalidate(session.free + PAGE, 1 << 20)
      let invalidated = false
      const invalidation = session.invalidate(page, PAGE).then(() => {
        invalidated = true
      })
      await ring.round()
      // Others are served meanwhile.
      ring.offer(ring.prepare(1, device.NULL))
      await ring.used(1)
      await ring.send({ complete: [near] })
      await ring.used(1)
      await ring.round()
      expect(invalidated).toBe(false)
      await ring.send({ complete: [far] })
      await invalidation
      expect((await ring.used(1)).map(({ id }) => id)).toEqual([far])
      // It is gone, and is asked for again; and again when it came and went before it could be used.
      engine.misses.length = 0
      ring.driver.offer(ring.prepare(lastSlot, device.NULL))
      await ring.round()
      await until('the miss', () => engine.misses.length === 1)
      // The iothread finds both messages at once.
      const blocked = ring.send({ block: true })
      const changed = Promise.all([session.update(session.entry(page, PAGE)), session.invalidate(page, PAGE)])
      Atomics.store(control, device.GATE, 1)
      Atomics.notify(control, device.GATE)
      await Promise.all([blocked, changed])
      await until('the miss again', () => engine.misses.length === 2)
      expect(ring.driver.takeUsed()).toEqual([])
      // An invalidation elsewhere is no reason to ask.
      await session.invalidate(session.free + PAGE, PAGE)
      await ring.round()
      await ring.round()
      expect(engine.misses.length).toBe(2)
      await session.update(session.entry(page, PAGE))
      await ring.used(1)
      expect(engine.events).toEqual([])
    })

    it('what was completed while the ring itself had no translation is published when it has one', async () => {
      await using engine = await Engine.start(emulate)
      const session = await TestSession.start(engine, options)
      const { ring, control } = session
      await mapAll(session, -1)
      const heads = [0, 1].map((slot) => ring.prepare(slot, PARK))
      ring.offer(...heads)
      await until('they are handled', () => control[HANDLED] === 2)
      engine.misses.length = 0
      const part = format.packed ? ring.layout.descriptor : ring.layout.device
      await session.invalidate(part, PAGE)
      await ring.send({ complete: heads })
      await until('the miss', () => engine.misses.length > 0)
      await ring.round()
      expect(ring.driver.takeUsed()).toEqual([])
      const { address } = engine.misses[0]!
      expect(pageOf(address - IOVA)).toBe(part)
      await session.update(session.entry(part, PAGE))
      expect((await ring.used(2)).map(({ id }) => id)).toEqual(heads)
      await ring.called()
      ring.offer(ring.prepare(2, device.NULL))
      await ring.used(1)
      await ring.stop()
      if (format.inflight) expect(ring.marks).toBe(0)
      expect(engine.events).toEqual([])
    })

    it('also when other translations come with it', async () => {
      await using engine = await Engine.start(emulate)
      const session = await TestSession.start(engine, options)
      const { ring, control } = session
      await mapAll(session, -1)
      const heads = [0, 1].map((slot) => ring.prepare(slot, PARK))
      ring.offer(...heads)
      await until('they are handled', () => control[HANDLED] === 2)
      const part = format.packed ? ring.layout.descriptor : ring.layout.device
      await session.invalidate(part, PAGE)
      await ring.send({ complete: heads })
      await ring.round()
      // The iothread finds both messages at once.
      const blocked = ring.send({ block: true })
      const changed = [part, session.free + PAGE].map((at) => session.update(session.entry(at, PAGE)))
      Atomics.store(control, device.GATE, 1)
      Atomics.notify(control, device.GATE)
      await Promise.all([blocked, ...changed])
      expect((await ring.used(2)).map(({ id }) => id)).toEqual(heads)
      await ring.called()
      expect(engine.events).toEqual([])
    })
  })

  it('a receiver gives chains back whose buffers go away', async () => {
    await using engine = await Engine.start(emulate)
    const session = await TestSession.prepare(engine, { module: CARD, iova: IOVA, size: SIZE })
    const reports: CardReport[] = []
    engine.pool.on('reported', ({ session: id, message }) => {
      if (id === session.id) reports.push(message as CardReport)
    })
    const { ring } = session
    await ring.start()
    await mapAll(session, -1)
    const send = (message: unknown) => ring.thread.request({ kind: 'message', queue: ring.id, message })
    ring.offer(ring.prepare(0, 0), ring.prepare(lastSlot, 0))
    await send({ hold: 2 })
    await until('it holds them', () => reports.length === 1)
    engine.misses.length = 0
    const page = pageOf(ring.request(lastSlot))
    await session.invalidate(page, PAGE)
    // Both went back, the first can be taken again.
    await send({ values: [5, 6] })
    expect((await ring.used(1)).map(({ id }) => id)).toEqual([0])
    await until('the miss', () => engine.misses.length > 0)
    await session.update(session.entry(page, PAGE))
    expect((await ring.used(1)).map(({ id }) => id)).toEqual([lastSlot * 2])
    expect(engine.events).toEqual([])
  })

  it('a session without an IOTLB takes no updates, and gets one again with its memory', async () => {
    await using engine = await Engine.start(emulate)
    const session = await TestSession.start(engine)
    await expect(session.update(session.entry(0, PAGE))).rejects.toThrow('no IOTLB')
    await expect(session.invalidate(0, PAGE)).rejects.toThrow('no IOTLB')
    session.ring.offer(session.ring.prepare(0, device.NULL))
    await session.ring.used(1)
    await session.pause()
    await session.setMemory([session.entry(0, session.free)], true)
    await session.resume()
    session.ring.offer(session.ring.prepare(0, device.NULL))
    await session.ring.used(1)
    await session.invalidate(0, session.free)
    await session.pause()
    await session.setMemory([session.region])
    await session.resume()
    session.ring.offer(session.ring.prepare(0, device.NULL))
    await session.ring.used(1)
    expect(engine.events).toEqual([])
  })
})

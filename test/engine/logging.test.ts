/** The dirty log of a session: what its rings mark, where, since when, and who is told. */
import { afterAll, describe, expect, test } from 'vitest'
import { native } from '../../src/native.ts'
import * as device from './fixtures/device.ts'
import { check, closeEngines, Engine, hasUring, type TestRing, TestSession, until } from './harness.ts'

afterAll(closeEngines)

/** Behind all that a test session has. */
const RING_LOG = 0x40_0000
const SIZE = 4096

function pages(log: SharedArrayBuffer, offset = 0): number[] {
  const bytes = new Uint8Array(log, offset, SIZE)
  return Array.from({ length: SIZE * 8 }, (_, page) => page).filter((page) => (bytes[page >> 3]! >> (page & 7)) & 1)
}

const pageOf = (address: number) => Math.floor(address / 4096)

describe.each([
  ['io_uring', false],
  ['the emulation', true],
])('on %s', (_, emulate) => {
  const it = test.skipIf(!emulate && !hasUring)

  describe.each([
    ['split', false],
    ['packed', true],
  ])('a %s ring', (__, packed) => {
    const serve = async (ring: TestRing, slot: number, operation = device.NULL) => {
      ring.offer(ring.prepare(slot, operation))
      await ring.used(1)
      await ring.round()
    }

    it('marks the pages that it wrote, and its own where that is asked for', async () => {
      await using engine = await Engine.start(emulate)
      // Slots of 128 bytes: 32 to the page.
      const session = await TestSession.start(engine, { packed, logAddress: RING_LOG })
      const { ring } = session
      const log = new SharedArrayBuffer(SIZE + 4096)
      await serve(ring, 0)
      await session.setLog({ buffer: log, offset: 4096, size: SIZE })
      expect(pages(log, 4096)).toEqual([])
      await serve(ring, 31, device.READ)
      const [data, next] = [pageOf(ring.buffer(0)), pageOf(ring.buffer(31))]
      expect(pages(log, 4096)).toContain(next)
      expect(pages(log, 4096).filter((page) => page < pageOf(RING_LOG))).not.toContain(data === next ? -1 : data)
      expect(pages(log, 4096)).toContain(pageOf(RING_LOG))
      expect(new Uint8Array(log, 0, 4096).every((byte) => byte === 0)).toBe(true)
      // Without its own.
      new Uint8Array(log).fill(0)
      await ring.thread.request({ kind: 'setRingLog', queue: ring.id, address: -1 })
      await serve(ring, 1)
      expect(pages(log, 4096)).toEqual([data])
      new Uint8Array(log).fill(0)
      await ring.thread.request({ kind: 'setRingLog', queue: ring.id, address: RING_LOG })
      await serve(ring, 1)
      expect(pages(log, 4096)).toEqual(expect.arrayContaining([data, pageOf(RING_LOG)]))
      await session.setLog(undefined)
      new Uint8Array(log).fill(0)
      await serve(ring, 1)
      expect(pages(log, 4096)).toEqual([])
    })

    it('marks all that a request may have written, whatever it says', async () => {
      await using engine = await Engine.start(emulate)
      const session = await TestSession.start(engine, { packed })
      const { ring } = session
      const log = new SharedArrayBuffer(SIZE)
      await session.setLog({ buffer: log, offset: 0, size: SIZE })
      // Two pages and a byte; its length says that nothing was written.
      const head = ring.prepare(0, device.SAMPLED)
      ring.driver.descriptor(head + 1, { gpa: session.free, length: 2 * 4096 + 1, flags: 2 })
      ring.offer(head)
      expect(await ring.used(1)).toEqual([{ id: head, length: 0 }])
      const first = pageOf(session.free)
      expect(pages(log)).toEqual([first, first + 1, first + 2])
    })

    it('that starts later logs as well, and another log takes over', async () => {
      await using engine = await Engine.start(emulate)
      const session = await TestSession.prepare(engine, { packed })
      const { ring } = session
      const [one, two] = [new SharedArrayBuffer(SIZE), new SharedArrayBuffer(SIZE)]
      await session.setLog({ buffer: one, offset: 0, size: SIZE })
      await ring.start()
      await serve(ring, 0)
      expect(pages(one)).toEqual([pageOf(ring.buffer(0))])
      await session.setLog({ buffer: two, offset: 0, size: SIZE })
      new Uint8Array(one).fill(0)
      await serve(ring, 0)
      expect([pages(one), pages(two)]).toEqual([[], [pageOf(ring.buffer(0))]])
    })

    it('tells the eventfd of marks, and not without', async () => {
      await using engine = await Engine.start(emulate)
      const session = await TestSession.start(engine, { packed })
      const { ring } = session
      const log = new SharedArrayBuffer(SIZE)
      const fd = engine.eventfd()
      await session.setLog({ buffer: log, offset: 0, size: SIZE }, fd)
      expect(native.eventfdRead(fd)).toBeLessThan(0)
      for (let i = 0; i < 3; i++) {
        ring.offer(...[0, 1, 2, 3].map((slot) => ring.prepare(slot, device.NULL)))
        await ring.used(4)
        let told = 0
        await until('it is told', () => {
          told = native.eventfdRead(fd)
          return told > 0
        })
        // Once per batch: the four may have come in as many.
        expect(told).toBeLessThanOrEqual(4)
      }
      await ring.round()
      // The write of the last one.
      await ring.round()
      native.eventfdRead(fd)
      await ring.round()
      expect(native.eventfdRead(fd)).toBeLessThan(0)
      await session.setLog(undefined)
      await serve(ring, 0)
      expect(native.eventfdRead(fd)).toBeLessThan(0)
    })
  })

  it('an eventfd that comes later hears of marks that were made before it', async () => {
    await using engine = await Engine.start(emulate)
    const session = await TestSession.start(engine)
    const { ring } = session
    const log = { buffer: new SharedArrayBuffer(SIZE), offset: 0, size: SIZE }
    await session.setLog(log)
    ring.offer(ring.prepare(0, device.NULL))
    await ring.used(1)
    await ring.round()
    const fd = engine.eventfd()
    await session.setLog(log, fd)
    await until('it is told', () => native.eventfdRead(fd) > 0)
  })

  it('an eventfd that is full, and blocks, holds nobody', async () => {
    await using engine = await Engine.start(emulate)
    const session = await TestSession.start(engine)
    const { ring } = session
    const fd = engine.eventfd()
    for (let i = 0; i < 2048; i++) check(native.eventfdWrite(fd, 2 ** 53 - 1), 'fill')
    check(native.eventfdWrite(fd, 2046), 'fill')
    // Without io_uring the session's O_NONBLOCK is all that there is.
    if (!emulate) check(native.setNonblock(fd, false), 'setNonblock')
    await session.setLog({ buffer: new SharedArrayBuffer(SIZE), offset: 0, size: SIZE }, fd)
    for (let i = 0; i < 10; i++) {
      ring.offer(ring.prepare(0, device.NULL))
      await ring.used(1)
    }
    let done = false
    void session.setLog(undefined).then(() => {
      done = true
    })
    await until('setLog is answered', () => done, 3)
    // The same at the end of the session.
    await session.setLog({ buffer: new SharedArrayBuffer(SIZE), offset: 0, size: SIZE }, fd)
    ring.offer(ring.prepare(0, device.NULL))
    await ring.used(1)
    await ring.stop()
    let ended = false
    void ring.thread.request({ kind: 'endSession', session: session.id }).then(() => {
      ended = true
    })
    await until('endSession is answered', () => ended, 3)
    expect(engine.events).toEqual([])
  })
})

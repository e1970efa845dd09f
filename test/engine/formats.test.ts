/**
 * Both ring formats, with and without IN_ORDER, under a real iothread: what iothread.test.ts shows for plain split
 * rings holds for all.
 */
import { writeSync } from 'node:fs'
import { afterAll, describe, expect, test } from 'vitest'
import { CHAINS, COMPLETED } from '../../src/engine/counters.ts'
import * as device from './fixtures/device.ts'
import { closeEngines, Engine, hasUring, PACKED_BASE, type TestRing, TestSession, until } from './harness.ts'

afterAll(closeEngines)

const { HANDLED, PARK } = device

/** What a ring's base is after `chains` chains of two descriptors. */
function baseAfter(packed: boolean, size: number, chains: number): number {
  if (!packed) return chains & 0xffff
  const slots = chains * 2
  const position = (slots % size) | (Math.floor(slots / size) % 2 === 0 ? 0x8000 : 0)
  return (position | (position << 16)) >>> 0
}

describe.each([
  ['io_uring', false],
  ['the emulation', true],
])('on %s', (_, emulate) => {
  const it = test.skipIf(!emulate && !hasUring)

  describe.each([
    { packed: false, inOrder: false, eventIdx: false },
    { packed: false, inOrder: true, eventIdx: true },
    { packed: true, inOrder: false, eventIdx: false },
    { packed: true, inOrder: false, eventIdx: true },
    { packed: true, inOrder: true, eventIdx: true },
  ])('a ring with %o', (format) => {
    const { packed, inOrder } = format

    it('serves requests and calls, over many wraps, and answers its base', async () => {
      await using engine = await Engine.start(emulate)
      // No divisor of the ring's size, so that chains lie across its end.
      const size = packed ? 10 : 8
      const { ring } = await TestSession.start(engine, { ...format, size })
      for (let round = 0; round < 100; round++) {
        const heads = [0, 1, 2].map((slot) => ring.prepare(slot, device.NULL, 0, slot + 1))
        if (!packed) ring.driver.usedEvent = ring.driver.usedIdx
        ring.offer(...heads)
        await ring.called()
        expect(await ring.used(3)).toEqual(heads.map((id, i) => ({ id, length: i + 1 })))
      }
      const base = await ring.stop()
      expect(base).toBe(baseAfter(packed, size, 300))
      if (packed) expect(base).toBe(ring.driver.base)
      expect([ring.counters.values[CHAINS], ring.counters.values[COMPLETED]]).toEqual([300, 300])
      expect(engine.events).toEqual([])
    })

    it('moves data from a file', async () => {
      await using engine = await Engine.start(emulate)
      const { ring, fd, mapping } = await TestSession.start(engine, format)
      const content = Uint8Array.from({ length: 4096 }, (_, i) => (i * 3) & 0xff)
      writeSync(fd, content, 0, 4096, 0)
      const heads = Array.from({ length: 30 }, (_, i) => ring.prepare(i, device.READ, 100 * i, 64))
      ring.offer(...heads)
      const ids = (await ring.used(30)).map(({ id }) => id)
      expect(inOrder ? ids : ids.sort((a, b) => a - b)).toEqual(heads)
      for (let i = 0; i < 30; i++) {
        const bytes = new Uint8Array(mapping.buffer, ring.buffer(i), 64)
        expect(Buffer.compare(bytes, content.subarray(100 * i, 100 * i + 64))).toBe(0)
      }
    })

    it(inOrder ? 'gives chains back in the order of the ring' : 'gives chains back as they end', async () => {
      await using engine = await Engine.start(emulate)
      const { ring, control } = await TestSession.start(engine, format)
      const heads = [0, 1, 2, 3].map((slot) => ring.prepare(slot, PARK, 0, slot + 1))
      ring.offer(...heads)
      await until('all are handled', () => control[HANDLED] === 4)
      const seen: number[][] = []
      for (const slot of [2, 0, 3, 1]) {
        await ring.send({ complete: [heads[slot]!] })
        await ring.round()
        const used = ring.driver.takeUsed()
        for (const { id, length } of used) expect(length).toBe(id / 2 + 1)
        seen.push(used.map(({ id }) => id / 2))
      }
      expect(seen).toEqual(inOrder ? [[], [0], [], [1, 2, 3]] : [[2], [0], [3], [1]])
      expect(await ring.stop()).toBe(baseAfter(packed, 64, 4))
    })

    it('goes on from its base, and in other memory', async () => {
      await using engine = await Engine.start(emulate)
      const session = await TestSession.start(engine, format)
      const { ring } = session
      ring.offer(ring.prepare(0, device.NULL), ring.prepare(1, device.READ))
      await ring.used(2)
      await session.pause()
      ring.offer(ring.prepare(2, device.NULL))
      await session.setMemory([session.region])
      await session.resume()
      await ring.used(1)
      const base = await ring.stop()
      Object.assign(session.options, { base })
      ring.offer(ring.prepare(3, device.NULL))
      await ring.start()
      expect((await ring.used(1)).map(({ id }) => id)).toEqual([6])
    })
  })

  it('a packed ring with a broken rule ends, and the thread lives on', async () => {
    await using engine = await Engine.start(emulate)
    const session = await TestSession.start(engine, { packed: true })
    // An INDIRECT table of no bytes.
    session.ring.offer(session.ring.prepareIndirect(0, session.free, 0))
    await until('the report', () => engine.events.length > 0)
    expect(engine.events).toMatchObject([{ kind: 'ringBroken', session: session.id, index: 0 }])
    expect(await session.ring.stop()).toBe(PACKED_BASE)
  })

  it('a split and a packed ring share an iothread', async () => {
    await using engine = await Engine.start(emulate)
    const rings: TestRing[] = []
    for (const packed of [false, true]) rings.push((await TestSession.start(engine, { packed })).ring)
    for (let round = 0; round < 50; round++) {
      for (const ring of rings) ring.offer(...[0, 1].map((slot) => ring.prepare(slot, slot === 0 ? 0 : device.READ)))
      for (const ring of rings) expect((await ring.used(2)).length).toBe(2)
    }
  })

  it('the hot path of a packed ring allocates nothing worth a collection: less than 8 bytes per request', async () => {
    await using engine = await Engine.start(emulate)
    const { ring, control, heap } = await TestSession.start(engine, { packed: true })
    const heads = Array.from({ length: 32 }, (_, slot) => ring.prepare(slot, device.SAMPLED))
    ring.offer(...heads)
    await until(
      'all samples',
      () => {
        const used = ring.driver.takeUsed()
        if (used.length > 0) ring.offer(...used.map(({ id }) => id))
        return control[device.SAMPLES] === device.MAX_SAMPLES
      },
      60
    )
    await ring.stop()
    const steps = Array.from({ length: device.MAX_SAMPLES / 2 }, (_, i) => {
      const at = device.MAX_SAMPLES / 2 + i
      return (heap[at]! - heap[at - 1]!) / device.SAMPLE_EVERY
    })
    const median = steps.sort((a, b) => a - b)[steps.length / 2]!
    if (process.env['VIRTIOD_TEST_PRINT'] !== undefined) console.log(`${median} bytes per request`, steps)
    expect(median).toBeLessThan(8)
  }, 90_000)
})

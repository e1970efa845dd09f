/** Rings whose driver kicks and is called by messages of the front-end (VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS). */
import { afterAll, describe, expect, test } from 'vitest'
import { CALLS, KICKS } from '../../src/engine/counters.ts'
import * as device from './fixtures/device.ts'
import { asleep, closeEngines, Engine, hasUring, TestSession, until } from './harness.ts'

afterAll(closeEngines)

describe.each([
  ['io_uring', false],
  ['the emulation', true],
])('on %s', (_, emulate) => {
  const it = test.skipIf(!emulate && !hasUring)
  const options = { inband: true, kick: false, call: false }

  it.each([
    [false, false],
    [true, false],
    [false, true],
    [true, true],
  ])('kicks and calls are messages (packed %s, EVENT_IDX %s)', async (packed, eventIdx) => {
    await using engine = await Engine.start(emulate)
    const { ring, id } = await TestSession.start(engine, { ...options, packed, eventIdx })
    for (let i = 0; i < 50; i++) {
      engine.calls.length = 0
      ring.counters.takeCall()
      if (!packed) ring.driver.usedEvent = ring.driver.usedIdx
      ring.driver.offer(ring.prepare(0, i % 2 === 0 ? device.NULL : device.READ))
      await ring.thread.request({ kind: 'kick', queue: ring.id })
      await until('the call', () => engine.calls.length > 0)
      expect(engine.calls).toEqual([id])
      expect(ring.driver.takeUsed().length).toBe(1)
    }
    expect(ring.counters.values[KICKS]).toBe(50)
    expect(ring.counters.values[CALLS]).toBe(50)
    await ring.stop()
  })

  it('a ring without a kick fd is not polled', async () => {
    await using engine = await Engine.start(emulate)
    const { ring, control } = await TestSession.start(engine, options)
    await asleep()
    ring.driver.offer(ring.prepare(0, device.NULL))
    await asleep()
    expect(control[device.HANDLED]).toBe(0)
    await ring.thread.request({ kind: 'kick', queue: ring.id })
    await ring.used(1)
    await ring.thread.request({ kind: 'setKick', queue: ring.id, kickFd: -1 })
    await asleep()
    ring.driver.offer(ring.prepare(0, device.NULL))
    await asleep()
    expect(control[device.HANDLED]).toBe(1)
    await ring.thread.request({ kind: 'kick', queue: ring.id })
    await ring.used(1)
  })

  it('one call is outstanding at most, and one that was taken is followed by another', async () => {
    await using engine = await Engine.start(emulate)
    const { ring, id } = await TestSession.start(engine, options)
    const serve = async () => {
      ring.driver.offer(ring.prepare(0, device.NULL))
      await ring.thread.request({ kind: 'kick', queue: ring.id })
      await ring.used(1)
      await ring.round()
    }
    for (let i = 0; i < 10; i++) await serve()
    expect(engine.calls).toEqual([id])
    ring.counters.takeCall()
    await serve()
    expect(engine.calls).toEqual([id, id])
  })

  it('a call fd takes over, and back', async () => {
    await using engine = await Engine.start(emulate)
    const { ring, id } = await TestSession.start(engine, options)
    const serve = async () => {
      ring.driver.offer(ring.prepare(0, device.NULL))
      await ring.thread.request({ kind: 'kick', queue: ring.id })
      await ring.used(1)
      await ring.round()
    }
    ring.callFd = engine.eventfd()
    await ring.thread.request({ kind: 'setCall', queue: ring.id, callFd: ring.callFd })
    await ring.called()
    await serve()
    await ring.called()
    expect(engine.calls).toEqual([])
    await ring.thread.request({ kind: 'setCall', queue: ring.id, callFd: -1 })
    // One may have gone to the old fd. Nothing else wakes the thread.
    await until('the call', () => engine.calls.length > 0)
    expect(engine.calls).toEqual([id])
    ring.counters.takeCall()
    await serve()
    expect(engine.calls).toEqual([id, id])
    await ring.stop()
  })

  it('the calls of a ring that stops come before the answer', async () => {
    await using engine = await Engine.start(emulate)
    const { ring, control, id } = await TestSession.start(engine, options)
    ring.driver.offer(ring.prepare(0, device.PARK))
    await ring.thread.request({ kind: 'kick', queue: ring.id })
    await until('it is handled', () => control[device.HANDLED] === 1)
    const stopped = ring.stop()
    await ring.send({ complete: [0] })
    await stopped
    expect(engine.calls).toEqual([id])
    await ring.round()
    expect(engine.calls).toEqual([id])
  })

  it('a message for a ring that is not there is refused', async () => {
    await using engine = await Engine.start(emulate)
    const [thread] = engine.threads
    await expect(thread!.request({ kind: 'kick', queue: 9 })).rejects.toThrow('no ring 9')
    await expect(thread!.request({ kind: 'setRingLog', queue: 9, address: 0 })).rejects.toThrow('no ring 9')
  })
})

/**
 * What a network card asks of an iothread: chains on demand, fds to watch, batches, disabled rings, messages both ways.
 */
import { afterAll, describe, expect, test } from 'vitest'
import { CHAINS, COMPLETED } from '../../src/engine/counters.ts'
import { IothreadPool } from '../../src/engine/pool.ts'
import { native } from '../../src/native.ts'
import { VIRTQ_USED_F_NO_NOTIFY } from '../../src/virtio/constants.ts'
import type { CardMessage, CardReport } from './fixtures/card.ts'
import { check, closeEngines, Engine, hasUring, type TestRing, TestSession, until } from './harness.ts'

afterAll(closeEngines)

const CARD = new URL('./fixtures/card.ts', import.meta.url).href

/** A session of that device, and what its handlers report. */
class Card {
  readonly session: TestSession
  readonly reports: CardReport[] = []

  private constructor(engine: Engine, session: TestSession) {
    this.session = session
    engine.pool.on('reported', (event) => {
      if (event.session === session.id) this.reports.push(event.message as CardReport)
    })
  }

  static async start(engine: Engine, options: { eventIdx?: boolean; enabled?: boolean; base?: number } = {}) {
    const session = await TestSession.prepare(engine, { rings: 2, module: CARD, ...options })
    const card = new Card(engine, session)
    for (const ring of session.rings) await ring.start()
    return card
  }

  get rx(): TestRing {
    return this.session.rings[0]!
  }

  get tx(): TestRing {
    return this.session.rings[1]!
  }

  async send(message: CardMessage): Promise<void> {
    await this.rx.thread.request({ kind: 'message', queue: this.rx.id, message })
  }

  /** Buffers of one descriptor each. */
  post(...slots: number[]): void {
    this.rx.offer(...slots.map((slot) => this.rx.prepare(slot, 0)))
  }

  byte(slot: number): number {
    return this.rx.driver.view.getUint8(this.rx.buffer(slot))
  }

  async reported(...reports: CardReport[]): Promise<void> {
    await until(`reports ${JSON.stringify(reports)}`, () => this.reports.length >= reports.length)
    expect(this.reports.splice(0)).toEqual(reports)
  }

  async enable(ring: TestRing, enabled: boolean): Promise<void> {
    await ring.thread.request({ kind: 'enableQueue', queue: ring.id, enabled })
  }
}

describe.each([
  ['io_uring', false],
  ['the emulation', true],
])('on %s', (_, emulate) => {
  const it = test.skipIf(!emulate && !hasUring)

  it.each([false, true])(
    'chains wait in the ring until there is something for them (EVENT_IDX %s)',
    async (eventIdx) => {
      await using engine = await Engine.start(emulate)
      const card = await Card.start(engine, { eventIdx })
      card.post(0, 1, 2)
      await card.send({ values: [7, 8] })
      expect(await card.rx.used(2)).toEqual([
        { id: 0, length: 1 },
        { id: 2, length: 1 },
      ])
      await card.rx.called()
      expect([card.byte(0), card.byte(1)]).toEqual([7, 8])
      expect([card.rx.counters.values[CHAINS], card.rx.counters.values[COMPLETED]]).toEqual([2, 2])
      expect(await card.rx.stop()).toBe(2)
    }
  )

  it.each([false, true])('what waits for chains gets them by a kick (EVENT_IDX %s)', async (eventIdx) => {
    await using engine = await Engine.start(emulate)
    const card = await Card.start(engine, { eventIdx })
    await card.send({ values: [1, 2, 3] })
    for (let i = 0; i < 3; i++) {
      // The iothread sleeps between two of them, and only the kick wakes it.
      const { driver } = card.rx
      const before = driver.availIdx
      await until('the wish to be kicked', () =>
        eventIdx ? driver.availEvent === before : (driver.usedFlags & VIRTQ_USED_F_NO_NOTIFY) === 0
      )
      driver.offer(card.rx.prepare(i, 0))
      card.rx.kick()
      expect(await card.rx.used(1)).toEqual([{ id: i * 2, length: 1 }])
      expect(card.byte(i)).toBe(i + 1)
    }
  })

  it('chains that are held go back to the ring when it stops, and none is lost', async () => {
    await using engine = await Engine.start(emulate)
    const card = await Card.start(engine)
    card.post(0, 1, 2, 3)
    await card.send({ hold: 3 })
    await card.reported({ held: 3 })
    expect(await card.rx.stop()).toBe(0)
    await card.reported({ closed: true })
    expect(card.rx.driver.takeUsed()).toEqual([])
    expect([card.rx.counters.values[CHAINS], card.rx.counters.values[COMPLETED]]).toEqual([0, 0])
    await card.rx.start()
    await card.send({ values: [1, 2, 3, 4] })
    expect((await card.rx.used(4)).map(({ id }) => id)).toEqual([0, 2, 4, 6])
  })

  it('chains that are held go back before the memory is exchanged', async () => {
    await using engine = await Engine.start(emulate)
    const card = await Card.start(engine)
    card.post(0, 1)
    await card.send({ hold: 2 })
    await card.reported({ held: 2 })
    await card.session.pause()
    await card.session.setMemory([card.session.region])
    await card.send({ values: [5] })
    expect(card.rx.driver.takeUsed()).toEqual([])
    await card.session.resume()
    expect(await card.rx.used(1)).toEqual([{ id: 0, length: 1 }])
  })

  it('a disabled ring gets nothing, and one that is enabled again does', async () => {
    await using engine = await Engine.start(emulate)
    const card = await Card.start(engine)
    card.post(0, 1)
    await card.send({ hold: 1 })
    await card.reported({ held: 1 })
    await card.enable(card.rx, false)
    await card.send({ values: [1] })
    await card.rx.thread.request({ kind: 'ping' })
    expect(card.rx.driver.takeUsed()).toEqual([])
    await card.enable(card.rx, true)
    expect(await card.rx.used(1)).toEqual([{ id: 0, length: 1 }])
  })

  it('the chains of a disabled ring are discarded where the device wants that', async () => {
    await using engine = await Engine.start(emulate)
    const card = await Card.start(engine, { enabled: false })
    card.tx.offer(card.tx.prepare(0, 42), card.tx.prepare(1, 43))
    expect(await card.tx.used(2)).toEqual([
      { id: 0, length: 0 },
      { id: 2, length: 0 },
    ])
    await card.reported({ discarded: 42 }, { discarded: 43 })
    await card.enable(card.tx, true)
    card.tx.offer(card.tx.prepare(2, 44))
    await card.tx.used(1)
    await card.reported({ batch: 1 })
  })

  it('a handler of batches gets its chains together', async () => {
    await using engine = await Engine.start(emulate)
    const card = await Card.start(engine)
    card.tx.offer(...Array.from({ length: 32 }, (_, slot) => card.tx.prepare(slot, slot)))
    await card.tx.used(32)
    await card.reported({ batch: 32 })
  })

  it('an fd that is watched is told of each time, until it is not watched any more', async () => {
    await using engine = await Engine.start(emulate)
    const card = await Card.start(engine)
    const fd = engine.eventfd()
    await card.send({ watch: fd })
    for (let i = 0; i < 3; i++) {
      check(native.eventfdWrite(fd, 1), 'write')
      await card.reported({ readable: fd })
      native.eventfdRead(fd)
    }
    await card.send({ unwatch: fd })
    check(native.eventfdWrite(fd, 1), 'write')
    await card.rx.thread.request({ kind: 'ping' })
    await card.rx.thread.request({ kind: 'ping' })
    expect(card.reports).toEqual([])
    native.eventfdRead(fd)
    await card.send({ watch: fd })
    check(native.eventfdWrite(fd, 1), 'write')
    await card.reported({ readable: fd })
    // It stops although it watches.
    await card.rx.stop()
    await card.reported({ closed: true })
  })

  it('an fd that cannot be polled is told of once', async () => {
    await using engine = await Engine.start(emulate)
    const card = await Card.start(engine)
    await card.send({ watch: 999_999 })
    await card.reported({ readable: 999_999 })
    await card.rx.thread.request({ kind: 'ping' })
    expect(card.reports).toEqual([])
  })

  it('a handler that throws at a message ends its session', async () => {
    await using engine = await Engine.start(emulate)
    const card = await Card.start(engine)
    await card.send({ fail: 'on purpose' })
    await until('the report', () => engine.events.length > 0)
    expect(engine.events).toMatchObject([{ kind: 'deviceFailed', index: 0, error: { message: 'on purpose' } }])
  })
})

test('queues of a group are served by one iothread, others go round', async () => {
  const pool = new IothreadPool({ count: 2, emulate: false, pollMaxUs: 0 })
  await pool.ready()
  const group = pool.assign('a')
  expect([pool.assign('a'), pool.assign('a')]).toEqual([group, group])
  expect(pool.assign('b')).not.toBe(group)
  expect(new Set([pool.assign(), pool.assign()]).size).toBe(2)
  await pool.close()
})

/** Rings of a card that are disabled, stopped, started again and moved, with traffic on them. */
import { describe, expect, test } from 'vitest'
import { Connection } from '../../src/frontend/connection.ts'
import { layouts } from '../../src/frontend/memory.ts'
import { NetDriver } from '../../src/frontend/net.ts'
import { Session, wireRegion } from '../../src/frontend/session.ts'
import { Virtqueue } from '../../src/frontend/virtqueue.ts'
import * as wire from '../../src/vhost-user/wire.ts'
import { eventually } from '../vhost-user/backend.ts'
import {
  frame,
  type Guest,
  guestsOn,
  introduce,
  KINDS,
  type NetBackend,
  netBackend,
  passes,
  passesAtLast,
} from './support.ts'

const RX = 0
const TX = 1
const NO_SLOTS = { withoutProtocol: [wire.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS] }

for (const kind of KINDS) {
  describe(kind, () => {
    const current = netBackend({ kind })
    disabled(current)
    stopped(current)
    moved(current)
  })
}

function enable(guest: Guest, queue: number, on: boolean): void {
  guest.session.connection.setVringEnable(queue, on)
}

function disabled(current: () => NetBackend): void {
  test('what is sent on a disabled ring is discarded and counted', () => {
    using guests = guestsOn(current(), {}, {})
    const [a, b] = guests
    introduce(guests)
    for (let round = 0; round < 3; round++) {
      enable(a, TX, false)
      const drops = current().dropsDuring(0, 1, () => {
        for (let i = 0; i < 10; i++) a.send(frame({ from: 1, to: 2, size: 100 }))
      })
      expect(drops).toEqual({ disabled: 10 })
      enable(a, TX, true)
      passes(a, b)
      passes(b, a)
    }
  })

  test('a disabled ring receives nothing, and its buffers stay', () => {
    using guests = guestsOn(current(), {}, { rxBuffers: 8 }, {})
    const [a, b, c] = guests
    introduce(guests)
    for (let round = 0; round < 3; round++) {
      enable(b, RX, false)
      const used = b.net.rx().split.usedIndex
      for (let i = 0; i < 20; i++) {
        const bytes = frame({ from: 1, size: 100 })
        a.send(bytes)
        c.gets(bytes)
      }
      expect(b.net.rx().split.usedIndex).toBe(used)
      // It sends all the same.
      passes(b, c)
      enable(b, RX, true)
      for (let i = 0; i < 20; i++) passes(a, b, 9014)
    }
  })

  test('a ring that was never enabled', () => {
    using guests = guestsOn(current(), {}, { enable: false }, {})
    const [a, b, c] = guests
    const bytes = frame({ from: 1, size: 100 })
    a.send(bytes)
    c.gets(bytes)
    b.send(frame({ from: 2, size: 100 }))
    passes(a, c)
    expect(b.net.rx().split.usedIndex).toBe(0)
    for (const queue of [RX, TX]) enable(b, queue, true)
    passes(a, b)
    passes(b, a)
  })

  test('enabled before SET_FEATURES, and KICK before CALL, as QEMU does it', () => {
    using guests = guestsOn(current(), {})
    const [a] = guests
    const connection = Connection.connect(current().sockets[1]!, { timeoutMs: 5000 })
    for (const queue of [RX, TX]) connection.setVringEnable(queue, true)
    const session = Session.over(connection, { queues: 0, memory: layouts.single(8 * 2 ** 20) })
    try {
      for (const queue of [RX, TX]) connection.setVringEnable(queue, true)
      const driver = new NetDriver(
        new Proxy(session, {
          get: (target, name) =>
            name === 'startQueue' ? kickFirst.bind(undefined, target) : Reflect.get(target, name, target),
        }),
        { mode: 'irq', control: false }
      )
      const bytes = frame({ from: 2, to: 1, size: 100 })
      driver.sent(driver.send(bytes))
      a.gets(bytes)
      const answer = frame({ from: 1, to: 2, size: 100 })
      a.send(answer)
      expect(driver.receive().frame).toEqual(answer)
    } finally {
      session.close()
    }
  })
}

/** Session.startQueue in another order. */
function kickFirst(session: Session, index: number, options: { size?: number }): Virtqueue {
  const { connection, memory } = session
  const queue = new Virtqueue(connection, memory, index, true, { ...options, mode: 'irq' })
  session.queues.push(queue)
  const [descriptor, available, used] = queue.ring.map(({ gpa }) => memory.uva(gpa)) as [bigint, bigint, bigint]
  connection.setVringNum(index, queue.size)
  connection.setVringBase(index, 0)
  connection.setVringAddr({ index, flags: 0, log: 0n, descriptor, available, used })
  connection.setVringKick(index, queue.kickFd)
  connection.setVringCall(index, queue.callFd)
  return queue
}

function stopped(current: () => NetBackend): void {
  test.each([
    ['with many buffers', 64, 60],
    ['with few', 4, 60],
    ['with small ones', 200, 9014],
  ])('a receive ring stops and goes on, %s: none is lost or used twice', (_, rxBuffers, size) => {
    using guests = guestsOn(current(), {}, { rxBuffers, rxBufferSize: rxBuffers === 200 ? 100 : 2048 }, {})
    const [a, b] = guests
    introduce(guests)
    for (let round = 0; round < 10; round++) {
      for (let i = 0; i < 3; i++) passes(a, b, size)
      const queue = b.net.rx()
      const base = queue.stop()
      // What it has used is what it counts; all others are still to come.
      expect(base).toBe(queue.split.usedIndex)
      expect(queue.driver.inFlight).toBe(rxBuffers)
      queue.start(base)
      b.announce(guests.filter((guest) => guest !== b))
    }
    expect(b.net.rx().driver.inFlight).toBe(rxBuffers)
  })

  test('it stops at once while packets wait for it', () => {
    using guests = guestsOn(current(), {}, { rxBuffers: 2, rxBufferSize: 600 }, {})
    const [a, b, c] = guests
    for (let round = 0; round < 5; round++) {
      // It holds both buffers for this one, and they don't suffice.
      const bytes = frame({ from: 1, size: 1514 })
      a.send(bytes)
      c.gets(bytes)
      const queue = b.net.rx()
      const base = queue.stop()
      expect(base).toBe(queue.split.usedIndex)
      queue.start(base)
      // What waited went with the ring.
      const small = frame({ from: 1, size: 100 })
      a.send(small)
      c.gets(small)
      b.gets(small)
    }
  })

  test('a transmit ring stops and goes on where it was', () => {
    using guests = guestsOn(current(), {}, {})
    const [a, b] = guests
    introduce(guests)
    for (let round = 0; round < 10; round++) {
      for (let i = 0; i < 5; i++) passes(a, b)
      const queue = a.net.tx()
      const base = queue.stop()
      expect(base).toBe(queue.driver.base)
      const waiting = frame({ from: 1, to: 2, size: 100 })
      a.net.send(waiting)
      queue.start(base)
      a.announce([])
      b.gets(waiting)
      b.net.receive()
    }
  })

  test('all rings stop and start under the traffic of the others', () => {
    using guests = guestsOn(current(), {}, {}, {})
    const [a, b, c] = guests
    introduce(guests)
    for (let round = 0; round < 20; round++) {
      for (let i = 0; i < 20; i++) a.net.send(frame({ from: 1, to: 2, size: 1514 }), { publish: false })
      a.net.publish()
      const bases = b.session.queues.map((queue) => queue.stop())
      for (const [i, queue] of b.session.queues.entries()) queue.start(bases[i]!)
      a.net.sent()
      // To all, while it was unknown.
      const bytes = frame({ from: 2, size: 60 })
      b.send(bytes)
      for (const guest of [a, c]) guest.getsAtLast(bytes)
      passesAtLast(a, b)
    }
  })

  test('RESET_DEVICE, and everything again', () => {
    using guests = guestsOn(current(), {}, {})
    const [a, b] = guests
    introduce(guests)
    for (let round = 0; round < 5; round++) {
      b.session.connection.resetDevice()
      const used = b.net.rx().split.usedIndex
      a.send(frame({ from: 1, to: 2, size: 100 }))
      expect(b.net.rx().split.usedIndex).toBe(used)
      b.session.connection.setFeatures(b.session.features)
      for (const queue of b.session.queues) queue.start(queue.split.usedIndex)
      b.announce([a])
      passes(a, b)
    }
  })
}

function moved(current: () => NetBackend): void {
  test('SET_MEM_TABLE while packets flow', () => {
    using guests = guestsOn(current(), NO_SLOTS, NO_SLOTS, {})
    const [a, b, c] = guests
    introduce(guests)
    for (let round = 0; round < 20; round++) {
      for (let i = 0; i < 20; i++) {
        a.net.send(frame({ from: 1, to: 2, size: 9014 }), { publish: false })
        b.net.send(frame({ from: 2, to: 1, size: 9014 }), { publish: false })
      }
      a.net.publish()
      b.session.shareMemory()
      b.net.publish()
      a.session.shareMemory()
      for (const guest of [a, b]) guest.net.sent()
      passesAtLast(a, b)
      passesAtLast(b, a)
      passes(b, c)
      passes(c, a)
    }
  })

  test('memory is added and removed while packets flow, and buffers in it', () => {
    using guests = guestsOn(current(), {}, { rxBuffers: 4 }, {})
    const [a, b, c] = guests
    introduce(guests)
    for (let round = 0; round < 5; round++) {
      const { connection, memory } = b.session
      const region = memory.addRegion({
        gpa: (1 + round) * 2 ** 32,
        uva: 0x7e00_0000_0000 + round * 2 ** 32,
        size: 2 ** 20,
      })
      for (let i = 0; i < 10; i++) a.net.send(frame({ from: 1, to: 2, size: 100 }), { publish: false })
      a.net.publish()
      connection.addMemRegion(wireRegion(region))
      a.net.sent()
      // The other buffers first.
      const marker = frame({ from: 1, to: 2, size: 101 })
      const { gpa } = memory.allocate(2000, 64, memory.regions.length - 1)
      a.send(marker)
      b.getsAtLast(marker)
      b.net.post([{ address: gpa, length: 2000, writable: true }])
      for (let i = 0; i < 5; i++) passes(a, b, 1000)
      expect(memory.read(gpa, 2000).some((byte) => byte !== 0xa5)).toBe(true)
      connection.removeMemRegion(wireRegion(region))
      passes(a, b)
      passes(a, c)
    }
  })

  test('memory with buffers that it still has is taken away: only that ring ends', () => {
    using guests = guestsOn(current(), {}, { rxBuffers: 0 }, {})
    const [a, b, c] = guests
    const { connection, memory } = b.session
    const region = memory.addRegion({ gpa: 2 ** 33, uva: 0x7e00_0000_0000, size: 2 ** 20 })
    connection.addMemRegion(wireRegion(region))
    for (let i = 0; i < 8; i++) b.net.post([{ address: region.gpa + i * 4096, length: 500, writable: true }])
    // It holds some of them.
    const bytes = frame({ from: 1, size: 1000 })
    a.send(bytes)
    c.gets(bytes)
    b.gets(bytes)
    connection.removeMemRegion(wireRegion(region))
    for (let i = 0; i < 5; i++) {
      const next = frame({ from: 1, size: 1000 })
      a.send(next)
      c.gets(next)
    }
    expect(eventually(() => b.net.rx().broken())).toBe(true)
    const last = frame({ from: 2, size: 100 })
    b.send(last)
    a.gets(last)
  })
}

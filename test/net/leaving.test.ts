/** Guests that vanish, truncate their memory, come and go: the others go on, and nothing of them stays. */
import { ftruncateSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { layouts } from '../../src/frontend/memory.ts'
import { native } from '../../src/native.ts'
import * as net from '../../src/virtio/net.ts'
import { eventually } from '../vhost-user/backend.ts'
import {
  frame,
  Guest,
  guestsOn,
  introduce,
  KINDS,
  type NetBackend,
  netBackend,
  passes,
  passesAtLast,
} from './support.ts'

const MIB = 2 ** 20

for (const kind of KINDS) {
  describe(kind, () => leaving(netBackend({ kind })))
}

function leaving(current: () => NetBackend): void {
  test('a guest that vanishes while others send to it', () => {
    using guests = guestsOn(current(), {}, {})
    const [a, c] = guests
    for (let round = 0; round < 10; round++) {
      const b = new Guest(current().sockets[2]!, 3, { rxBuffers: round % 2 === 0 ? 64 : 0 })
      b.send(frame({ from: 3, to: 1, size: 60 }))
      a.net.receive()
      while (c.net.tryReceive() !== undefined);
      for (let i = 0; i < 40; i++) a.net.send(frame({ from: 1, to: 3, size: 9014 }), { publish: false })
      a.net.publish()
      b.close(true)
      a.net.sent()
      passesAtLast(a, c)
      passesAtLast(c, a)
    }
  })

  test('a guest that truncates its memory while others send to it', () => {
    using guests = guestsOn(current(), {}, {})
    const [a, c] = guests
    introduce(guests)
    for (let round = 0; round < 3; round++) {
      const b = new Guest(current().sockets[2]!, 3, { memory: layouts.single(4 * MIB) })
      try {
        b.send(frame({ from: 3, to: 1, size: 60 }))
        a.net.receive()
        const pending = Array.from({ length: 20 }, () => frame({ from: 1, to: 3, size: 1514 }))
        for (const bytes of pending) a.net.send(bytes, { publish: false })
        ftruncateSync(b.session.memory.region(0).fd, 0)
        a.net.publish()
        a.net.sent()
        expect(eventually(() => b.session.connection.channel.hungUp())).toBe(true)
      } finally {
        b.close(true)
      }
      passesAtLast(a, c)
      passesAtLast(c, a)
    }
  })

  test('a guest that truncates its memory while it sends', () => {
    using guests = guestsOn(current(), {}, {})
    const [a, c] = guests
    introduce(guests)
    const b = new Guest(current().sockets[2]!, 3, { memory: layouts.single(4 * MIB) })
    try {
      for (let i = 0; i < 5; i++) b.net.send(frame({ from: 3, to: 1, size: 65549 }), { publish: false })
      b.net.publish()
      ftruncateSync(b.session.memory.region(0).fd, 0)
      // Whoever looks at the ring now finds no page.
      native.eventfdWrite(b.net.tx().kickFd, 1)
      expect(eventually(() => b.session.connection.channel.hungUp())).toBe(true)
    } finally {
      b.close(true)
    }
    // What came of its last packets is anything but the end of the others.
    for (const [from, to] of [
      [a, c],
      [c, a],
    ] as const) {
      passesAtLast(from, to)
    }
  })

  test('fifty sessions that come, talk and go', () => {
    using guests = guestsOn(current(), {})
    const [a] = guests
    for (let round = 0; round < 50; round++) {
      const b = new Guest(current().sockets[1 + (round % 2)]!, 2, { memory: layouts.single(4 * MIB) })
      passes(b, a)
      passes(a, b)
      b.close(round % 3 === 0)
    }
    expect(current().ofSwitch('table_entries')).toBeLessThanOrEqual(2)
  })

  // What the switch has for all of them was made for the first one that came.
  test('the first guest leaves, and the others go on', () => {
    const a = new Guest(current().sockets[0]!, 1)
    using b = new Guest(current().sockets[1]!, 2)
    using c = new Guest(current().sockets[2]!, 3, { without: [net.VIRTIO_NET_F_GUEST_CSUM, 7, 8, 9, 10, 54, 55] })
    introduce([a, b, c])
    a.close()
    for (let i = 0; i < 50; i++) {
      passes(b, c, 9014)
      passes(c, b, 65549)
    }
  })
}

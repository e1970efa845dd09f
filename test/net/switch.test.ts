/** The switch between guests that behave: who gets which packet, byte for byte, however it is cut and whatever takes it. */
import { describe, expect, test } from 'vitest'
import { withDependents } from '../../src/frontend/net-features.ts'
import { VIRTIO_F_VERSION_1 } from '../../src/virtio/constants.ts'
import * as net from '../../src/virtio/net.ts'
import {
  frame,
  type Guest,
  guestsOn,
  introduce,
  KINDS,
  mac,
  type NetBackend,
  netBackend,
  passes,
  plain,
} from './support.ts'

/** The size classes: shortest, common, full, jumbo, and the most that IP has. */
const SIZES = [14, 60, 64, 65, 1514, 1518, 9014, 65549, 65557]
const NOT_MERGEABLE = [net.VIRTIO_NET_F_MRG_RXBUF]
/** Whole packets of 64 KiB, in one buffer each. */
const ONE_LARGE = { without: NOT_MERGEABLE, rxBufferSize: 65600, rxBuffers: 4 }

for (const kind of KINDS) {
  describe(kind, () => {
    const current = netBackend({ kind })
    forwarding(current)
    cutting(current)
  })
}

function forwarding(current: () => NetBackend): void {
  test.each([
    ['broadcast', new Uint8Array(6).fill(0xff)],
    ['multicast', Uint8Array.of(1, 0, 0x5e, 0, 0, 1)],
    ['an unknown address', mac(77)],
  ])('%s goes to all others and not back', (_, to) => {
    using guests = guestsOn(current(), {}, {}, {})
    introduce(guests)
    const floods = current().ofSwitch('floods_total')
    for (const from of guests) {
      const bytes = frame({ from: from.number, to, size: 80 })
      from.send(bytes)
      for (const other of guests) if (other !== from) plain(other.gets(bytes))
    }
    expect(current().ofSwitch('floods_total') - floods).toBe(3)
    // None has anything else.
    for (const guest of guests) expect(guest.net.tryReceive()).toBeUndefined()
  })

  test('a known address goes to its port only', () => {
    using guests = guestsOn(current(), {}, {}, {})
    const [a, b, c] = guests
    introduce(guests)
    const floods = current().ofSwitch('floods_total')
    for (let i = 0; i < 5; i++) {
      passes(a, b)
      passes(b, a)
    }
    // It would have come before this one.
    passes(a, c)
    passes(b, c)
    expect(current().ofSwitch('floods_total')).toBe(floods)
    expect(current().ofSwitch('table_entries')).toBe(3)
  })

  test('a packet to the sender itself goes nowhere', () => {
    using guests = guestsOn(current(), {}, {}, {})
    const [a, b, c] = guests
    introduce(guests)
    a.send(frame({ from: 1, to: 1, size: 60 }))
    passes(a, b)
    passes(b, c)
    passes(c, a)
  })

  test('an address moves, and at once back again', () => {
    using guests = guestsOn(current(), {}, {}, {})
    const [a, b, c] = guests
    introduce(guests)
    const to = (holder: Guest): void => {
      const bytes = frame({ from: 3, to: 50, size: 60 })
      c.send(bytes)
      holder.gets(bytes)
    }
    for (const holder of [a, b, a, b]) {
      const bytes = frame({ from: 50, to: 3, size: 60 })
      holder.send(bytes)
      c.gets(bytes)
      to(holder)
    }
    // Nothing went to the other one.
    passes(c, a)
    passes(c, b)
  })

  test('a guest that left is forgotten, and its packets are counted against nobody', () => {
    using guests = guestsOn(current(), {}, {}, {})
    const [a, b, c] = guests
    introduce(guests)
    c.close()
    const bytes = frame({ from: 1, to: 3, size: 60 })
    a.send(bytes)
    // Unknown again: all get it.
    b.gets(bytes)
    expect(current().ofSwitch('table_entries')).toBe(2)
  })

  test('in order, a thousand in flight', () => {
    using guests = guestsOn(current(), {}, {})
    const [a, b] = guests
    introduce(guests)
    for (let round = 0; round < 20; round++) {
      const sent = Array.from({ length: 50 }, (_, i) => frame({ from: 1, to: 2, size: 60 + i * 7 }))
      for (const bytes of sent) a.net.send(bytes, { publish: false })
      a.net.publish()
      for (const bytes of sent) b.gets(bytes)
      a.net.sent()
    }
  })

  test('it counts packets and bytes of both', () => {
    using guests = guestsOn(current(), {}, {})
    const [a, b] = guests
    introduce(guests)
    const read = (): number[] => [
      current().counter('packets_total', 0, 1),
      current().counter('bytes_total', 0, 1),
      current().counter('packets_total', 1, 0),
      current().counter('bytes_total', 1, 0),
    ]
    const before = read()
    passes(a, b, 100)
    passes(a, b, 1000)
    expect(read().map((value, i) => value - before[i]!)).toEqual([2, 1100, 2, 1100])
  })

  test('it works asleep, and wakes', () => {
    using guests = guestsOn(current(), { mode: 'irq' }, { mode: 'irq' })
    const [a, b] = guests
    introduce(guests)
    for (let i = 0; i < 100; i++) {
      passes(a, b)
      passes(b, a)
    }
  })
}

function cutting(current: () => NetBackend): void {
  test('every size, byte for byte', () => {
    using guests = guestsOn(current(), {}, {}, ONE_LARGE)
    const [a, b, c] = guests
    introduce(guests)
    for (const size of SIZES) {
      plain(passes(a, b, size))
      expect(passes(a, c, size).buffers).toBe(1)
    }
  })

  test('any cut of what is sent', () => {
    using guests = guestsOn(current(), { queueSize: 1024 }, {})
    const [a, b] = guests
    introduce(guests)
    for (const indirect of [false, true]) {
      for (const size of [60, 64, 1514, 9014]) {
        const total = 12 + size
        const even = (count: number): number[] =>
          Array.from(
            { length: count },
            (_, i) => Math.floor((total * (i + 1)) / count) - Math.floor((total * i) / count)
          )
        const cuts = [
          [12, size],
          [5, 7, size],
          [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, size],
          [11, total - 11],
          [12, 3, size - 3],
          [10, 6, total - 16],
          [26, total - 26],
          even(Math.min(total, 100)),
          // Descriptors of no bytes in between.
          [0, 12, 0, 20, 0, size - 20, 0],
        ]
        for (const cut of cuts) passes(a, b, size, { cuts: cut, indirect })
      }
      passes(a, b, 60, { cuts: new Array<number>(72).fill(1), indirect })
      passes(a, b, 65549, { cuts: [12, ...new Array<number>(99).fill(655), 65549 - 99 * 655], indirect })
    }
  })

  test.each([
    [13, 1024, 1514],
    [100, 1024, 65549],
    [1526, 256, 65549],
    [4096, 256, 65549],
    [65562, 16, 65549],
    // What is exactly full, and one byte more.
    [1526, 256, 1514],
    [1526, 256, 1515],
  ])('merged buffers of %i bytes', (rxBufferSize, buffers, size) => {
    using guests = guestsOn(current(), {}, { rxBufferSize, rxBuffers: buffers, queueSize: Math.max(256, buffers) })
    const [a, b] = guests
    introduce(guests)
    for (const length of [60, size, 61, size, 1514]) {
      const { buffers: used, header } = passes(a, b, length)
      expect(used).toBe(Math.ceil((12 + length) / rxBufferSize))
      expect(header.numBuffers).toBe(used)
    }
  })

  test.each([
    ['mergeable', {}],
    ['not mergeable', { without: NOT_MERGEABLE }],
    ['a legacy header', { without: [...NOT_MERGEABLE, VIRTIO_F_VERSION_1] }],
  ])('receive buffers in several pieces, %s', (_, options) => {
    using guests = guestsOn(current(), {}, { ...options, rxBuffers: 0 })
    const [a, b] = guests
    const { gpa } = b.session.memory.allocate(262144, 64)
    const shapes = [
      [12, 2000],
      [10, 2000],
      [1, 2, 3, 4, 5, 6, 7, 2000],
      new Array<number>(60).fill(30),
      [2000, 1],
      [0, 12, 0, 1600],
    ]
    for (const size of [60, 1514]) {
      for (const lengths of shapes) {
        // An address that is not aligned.
        let at = gpa + 1
        b.net.post(
          lengths.map((length) => {
            const segment = { address: at, length, writable: true }
            at += length + 3
            return segment
          })
        )
        const bytes = frame({ from: 1, size })
        a.send(bytes)
        plain(b.gets(bytes))
      }
    }
  })

  test('headers of ten bytes, both ways', () => {
    const legacy = { without: [...NOT_MERGEABLE, VIRTIO_F_VERSION_1], rxBufferSize: 65600, rxBuffers: 4 }
    using guests = guestsOn(current(), legacy, {}, legacy)
    const [a, b, c] = guests
    expect(a.net.headerSize).toBe(10)
    introduce(guests)
    for (const size of SIZES) {
      passes(a, b, size)
      passes(b, a, size)
      passes(a, c, size, size > 40 ? { cuts: [3, 9, size - 2] } : {})
    }
  })

  test('a legacy driver without VERSION_1 has twelve bytes when its buffers are merged', () => {
    using guests = guestsOn(current(), { without: [VIRTIO_F_VERSION_1] }, {})
    const [a, b] = guests
    expect(a.net.headerSize).toBe(12)
    introduce(guests)
    expect(passes(b, a, 9014).buffers).toBe(5)
    passes(a, b, 9014)
  })

  test('rings that wrap, from any index', () => {
    using guests = guestsOn(current(), { base: 65530, queueSize: 4 }, { base: 65500, queueSize: 8, rxBuffers: 8 })
    const [a, b] = guests
    for (let i = 0; i < 200; i++) {
      const bytes = frame({ from: 1, size: i % 3 === 0 ? 9014 : 60 })
      a.send(bytes)
      b.gets(bytes)
    }
  })

  test('a driver that negotiates nothing', () => {
    const bare = { without: withDependents(...Array.from({ length: 24 }, (_, i) => i), 54, 55, 56) }
    using guests = guestsOn(current(), bare, bare, {})
    introduce(guests)
    const [a, b, c] = guests
    passes(a, b, 1514)
    passes(b, c, 1514)
    passes(c, a, 1514)
  })
}

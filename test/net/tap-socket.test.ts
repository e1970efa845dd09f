/** A card on a tap, between a driver and a packet socket on the other side of it. */
import { describe, expect, test } from 'vitest'
import { payload64 } from '../../src/frontend/connection.ts'
import { withDependents } from '../../src/frontend/net-features.ts'
import { decodeNetHeader } from '../../src/frontend/net-frames.ts'
import * as wire from '../../src/vhost-user/wire.ts'
import { VIRTIO_F_VERSION_1 } from '../../src/virtio/constants.ts'
import { featureSet } from '../../src/virtio/features.ts'
import * as net from '../../src/virtio/net.ts'
import { whyNoNamespace } from '../native/network.ts'
import { eventually } from '../vhost-user/backend.ts'
import { message, outcome } from '../vhost-user/messages.ts'
import { BAD } from './bad-packets.ts'
import { expectFinished } from './finished.ts'
import { build, TCPV4, TCPV6 } from './frames.ts'
import { frame, Guest, type GuestOptions, guestsOn, KINDS, mac, plain } from './support.ts'
import { inward, OUTSIDE, onTap, type Setup } from './wire.ts'

const NOT_MERGEABLE = [net.VIRTIO_NET_F_MRG_RXBUF]
const NOTHING = withDependents(net.VIRTIO_NET_F_GUEST_CSUM)
const TSO = { ...TCPV4, gsoSize: 1448, payload: 64_000 }

describe.skipIf(whyNoNamespace() !== undefined)('a tap', () => {
  for (const kind of KINDS) {
    describe(kind, () => {
      const setup = onTap({ kind, cards: 1, link: ['--tap', 'tap0'] })
      transmitting(setup)
      receiving(setup)
      links(setup)
    })
  }
})

function transmitting({ backend, wire: on }: Setup): void {
  test.each([
    ['everything', []],
    ['headers of ten bytes', [...NOT_MERGEABLE, VIRTIO_F_VERSION_1]],
    ['nothing', NOTHING],
  ])('plain packets of all sizes, cut anywhere, with %s', (_, without) => {
    using guests = guestsOn(backend(), { without, queueSize: 256 })
    const [a] = guests
    const { headerSize } = a.net
    for (const size of [14, 60, 64, 1000, 1514]) {
      const total = headerSize + size
      for (const cuts of [
        [total],
        [headerSize, size],
        [5, total - 5],
        [headerSize + 6, size - 6],
        [...new Array<number>(20).fill(1), total - 20],
      ]) {
        for (const indirect of [false, true]) {
          const bytes = frame({ from: 1, to: OUTSIDE, size: Math.max(size, 18) }).slice(0, size)
          a.send(bytes, { cuts, indirect })
          expect(on().gets(bytes).header).toEqual(new Uint8Array(10))
        }
      }
    }
  })

  test('what is left to do comes out with its header', () => {
    using guests = guestsOn(backend(), {})
    const [a] = guests
    for (const options of [TSO, { ...TCPV6, gsoSize: 1428, payload: 64_000 }, { gsoType: 0, payload: 1000 }]) {
      const built = build(options)
      a.send(built.bytes, { header: built.header, cuts: [12, 100, built.bytes.length - 100] })
      const header = decodeNetHeader(on().gets(built.bytes).header)
      expect(header).toMatchObject({ flags: 1, gsoType: options.gsoType, csumStart: built.l4, csumOffset: 16 })
      expect(header.gsoSize).toBe('gsoSize' in options ? options.gsoSize : 0)
    }
  })

  test('nothing that is broken reaches the kernel', () => {
    using guests = guestsOn(backend(), { arenaBytes: 2 ** 21 })
    const [a] = guests
    for (const [name, { why, bytes, header, without }] of Object.entries(BAD)) {
      if (without !== undefined) continue
      expect(
        backend().dropsDuring(0, 1, () => a.send(bytes, { header: header! })),
        name
      ).toEqual({ [why]: 1 })
    }
    const good = frame({ from: 1, size: 100 })
    a.send(good)
    on().gets(good)
  })

  test('a packet in more pieces than the kernel takes is dropped, and those beside it go out', () => {
    using guests = guestsOn(backend(), { queueSize: 256 })
    const [a] = guests
    const many = frame({ from: 1, size: 1512 })
    const [before, after] = [frame({ from: 1, size: 60 }), frame({ from: 1, size: 60 })]
    const drops = backend().dropsDuring(0, 1, () => {
      a.net.send(before, { publish: false })
      a.net.send(many, { cuts: new Array<number>(1524).fill(1), indirect: true, publish: false })
      a.net.send(after)
      a.net.sent()
    })
    expect(drops).toEqual({ too_big: 1 })
    on().gets(before)
    on().gets(after)
  })

  test('five hundred in a row, in order', () => {
    using guests = guestsOn(backend(), { queueSize: 1024, arenaBytes: 2 ** 21 })
    const [a] = guests
    const sent = Array.from({ length: 100 }, (_, i) => frame({ from: 1, size: 60 + i * 10 }))
    for (let round = 0; round < 5; round++) {
      for (const bytes of sent) a.net.send(bytes, { publish: false })
      a.net.publish()
      for (const bytes of sent) on().gets(bytes)
      a.net.sent()
    }
  })
}

function receiving({ backend, wire: on, bridged }: Setup): void {
  const shapes: [string, GuestOptions][] = [
    ['merged buffers', {}],
    ['few of them', { rxBuffers: 3 }],
    ['one at a time', { rxBuffers: 1 }],
    ['small merged buffers', { rxBufferSize: 100, rxBuffers: 256 }],
    ['tiny ones', { rxBufferSize: 13, rxBuffers: 256 }],
    ['large ones', { rxBufferSize: 65562, rxBuffers: 2 }],
    ['not mergeable', { without: NOT_MERGEABLE, rxBuffers: 16 }],
    ['not mergeable, no segmentation', { without: [...NOT_MERGEABLE, ...NOTHING], rxBuffers: 16 }],
    ['headers of ten bytes', { without: [...NOT_MERGEABLE, ...NOTHING, VIRTIO_F_VERSION_1], rxBuffers: 16 }],
    ['asleep', { mode: 'irq' }],
  ]
  test.each(shapes)('plain packets: %s', (_, options) => {
    using guests = guestsOn(backend(), options)
    const [a] = guests
    for (const size of [14, 60, 61, 1000, 1514]) {
      if (options.rxBuffers === 1 && size > 1500 && options.rxBufferSize !== undefined) continue
      for (let i = 0; i < 4; i++) {
        const bytes = inward(Math.max(size, 18)).slice(0, size)
        on().send(bytes)
        const packet = a.gets(bytes)
        plain(packet)
        expect(packet.buffers).toBe(Math.ceil((a.net.headerSize + size) / a.net.rxBufferSize))
      }
    }
    // More than there are buffers for: the rest waits in the tap.
    const sent = Array.from({ length: 40 }, (_, i) => inward(60 + i))
    for (const bytes of sent) on().send(bytes)
    for (const bytes of sent) a.gets(bytes)
  })

  test.each([
    ['merged buffers', {}, 64],
    ['merged buffers of 1526 bytes', { rxBufferSize: 1526 }, 64],
    ['just enough of them', { rxBufferSize: 2048 }, 32],
    ['one byte each beside the header', { rxBufferSize: 600 }, 256],
    ['not mergeable', { without: NOT_MERGEABLE }, 4],
  ])('a segmented packet of 64 KiB: %s', (_, options, rxBuffers) => {
    using guests = guestsOn(backend(), { ...options, rxBuffers })
    const [a] = guests
    for (const row of [TSO, { ...TCPV6, gsoSize: 1428, payload: 64_000 }]) {
      const built = build(row)
      built.bytes.set(mac(1))
      on().send(built.bytes, built.header)
      const { header, buffers } = a.gets(built.bytes)
      expect(header).toMatchObject({ flags: 1, gsoType: row.gsoType, gsoSize: row.gsoSize, csumStart: built.l4 })
      expect(buffers).toBe(Math.ceil((12 + built.bytes.length) / a.net.rxBufferSize))
      const small = inward(60)
      on().send(small)
      a.gets(small)
    }
  })

  test('large and small ones by turns, with few buffers', () => {
    using guests = guestsOn(backend(), { rxBuffers: 34 })
    const [a] = guests
    const built = build(TSO)
    for (let round = 0; round < 5; round++) {
      const small = inward(60)
      on().send(small)
      on().send(built.bytes, built.header)
      on().send(small)
      a.gets(small)
      a.gets(built.bytes)
      a.gets(small)
    }
  })

  test('for a driver that takes nothing the kernel finishes them', async () => {
    using guests = guestsOn(backend(), { without: NOTHING, rxBuffers: 128 })
    const [a] = guests
    const built = build(TSO)
    using behind = await bridged()
    behind.send(built.bytes, built.header)
    const packets: Uint8Array[] = []
    while (packets.length < Math.ceil(64_000 / 1448)) {
      const packet = a.net.receive()
      plain(packet)
      // The bridge has something to say, too.
      if (Buffer.compare(packet.frame.subarray(0, 12), built.bytes.subarray(0, 12)) === 0) packets.push(packet.frame)
    }
    expectFinished(packets, built, TSO)
  })

  test('offloads are switched while it runs', async () => {
    using guests = guestsOn(backend(), { rxBuffers: 128 })
    const [a] = guests
    const built = build({ ...TSO, payload: 20_000 })
    built.bytes.set(mac(OUTSIDE), 6)
    using behind = await bridged()
    const pieces = (): number => {
      behind.send(built.bytes, built.header)
      behind.send(inward(60))
      for (let count = 0; ; ) {
        const { frame: bytes } = a.net.receive()
        if (bytes.length === 60) return count
        if (Buffer.compare(bytes.subarray(0, 12), built.bytes.subarray(0, 12)) === 0) count++
      }
    }
    const offloads = (bits: bigint): number => a.net.control(net.VIRTIO_NET_CTRL_GUEST_OFFLOADS, 0, payload64(bits))
    expect(pieces()).toBe(1)
    expect(offloads(0n)).toBe(net.VIRTIO_NET_OK)
    // The kernel is told by another thread than that which acknowledged it.
    expect(eventually(() => pieces() === 14)).toBe(true)
    expect(pieces()).toBe(14)
    expect(offloads(featureSet(net.VIRTIO_NET_F_GUEST_CSUM, net.VIRTIO_NET_F_GUEST_TSO4))).toBe(net.VIRTIO_NET_OK)
    expect(eventually(() => pieces() === 1)).toBe(true)
  })

  test.each([
    ['of no bytes', 0, true],
    ['of a header and no more', 12, true],
    ['that is not writable', 2000, false],
  ])('a buffer %s comes back empty, and the next one is used', (_, length, writable) => {
    for (const without of [[], [...NOT_MERGEABLE, ...NOTHING]]) {
      using guests = guestsOn(backend(), { without, rxBuffers: 0 })
      const [{ net: driver, session }] = guests
      const queue = driver.rx()
      const { gpa } = session.memory.allocate(8192, 64)
      const good = { address: gpa + 4096, length: 2000, writable: true }
      const heads = [good, { address: gpa, length, writable }, good].map((segment) => {
        const head = queue.driver.build([segment])
        queue.driver.issue(head)
        return head
      })
      queue.driver.publish()
      const used = (): [number, number] => {
        expect(queue.wait(5000)).toBe(true)
        return [queue.driver.pop(), queue.driver.written]
      }
      const drops = backend().dropsDuring(0, 0, () => {
        on().send(inward(100))
        expect(used()).toEqual([heads[0], 112])
        on().send(inward(200))
        expect([used(), used()]).toEqual([
          [heads[1], 0],
          [heads[2], 212],
        ])
      })
      expect(drops).toEqual({ bad_buffer: 1 })
    }
  })

  test('buffers in several pieces, the header among them', () => {
    for (const without of [[], NOT_MERGEABLE, [...NOT_MERGEABLE, ...NOTHING, VIRTIO_F_VERSION_1]]) {
      using guests = guestsOn(backend(), { without, rxBuffers: 0 })
      const [a] = guests
      const { gpa } = a.session.memory.allocate(4 * 65536, 64)
      for (const lengths of [
        [12, 2000],
        [10, 2, 2000],
        [1, 2, 3, 4, 5, 6, 2000],
        [7, 1600],
        [2000, 1, 1],
        [12, 66000],
        new Array<number>(60).fill(30),
      ]) {
        let at = gpa + 1
        a.net.post(
          lengths.map((length) => {
            const segment = { address: at, length, writable: true }
            at += length + 3
            return segment
          })
        )
        const bytes = inward(1514)
        on().send(bytes)
        plain(a.gets(bytes))
      }
    }
  })

  test('a receive ring stops and goes on: no buffer is lost, and no packet', () => {
    using guests = guestsOn(backend(), { rxBuffers: 40 })
    const [a] = guests
    const queue = a.net.rx()
    for (let round = 0; round < 10; round++) {
      const bytes = inward(100)
      on().send(bytes)
      a.gets(bytes)
      const base = queue.stop()
      expect(base).toBe(queue.split.usedIndex)
      expect(queue.driver.inFlight).toBe(40)
      queue.start(base)
    }
  })
}

function links({ backend, wire: on, sh }: Setup): void {
  test('while the link is down packets are dropped and counted, and then it goes on', async () => {
    using guests = guestsOn(backend(), {})
    const [a] = guests
    for (let round = 0; round < 3; round++) {
      await sh('ip link set tap0 down')
      expect(
        backend().dropsDuring(0, 1, () => {
          for (let i = 0; i < 5; i++) a.send(frame({ from: 1, size: 100 }))
        })
      ).toEqual({ link_down: 5 })
      await sh('ip link set tap0 up')
      const bytes = frame({ from: 1, size: 100 })
      a.send(bytes)
      on().gets(bytes)
      const back = inward(100)
      on().send(back)
      a.gets(back)
    }
  })

  test('a disabled card sends and receives nothing', () => {
    using guests = guestsOn(backend(), {})
    const [a] = guests
    const { connection } = a.session
    for (const queue of [0, 1]) connection.setVringEnable(queue, false)
    expect(backend().dropsDuring(0, 1, () => a.send(frame({ from: 1, size: 100 })))).toEqual({ disabled: 1 })
    for (const queue of [0, 1]) connection.setVringEnable(queue, true)
    const bytes = frame({ from: 1, size: 100 })
    a.send(bytes)
    on().gets(bytes)
    const back = inward(100)
    on().send(back)
    a.gets(back)
  })

  test('SEND_RARP comes out, and NET_SET_MTU is the MTU of the tap', async () => {
    using guests = guestsOn(backend(), { without: [net.VIRTIO_NET_F_GUEST_ANNOUNCE] })
    const { connection } = guests[0].session
    connection.setProtocolFeatures(
      connection.protocolFeatures | featureSet(wire.VHOST_USER_PROTOCOL_F_RARP, wire.VHOST_USER_PROTOCOL_F_MTU)
    )
    const payload = new Uint8Array(8)
    payload.set(mac(60))
    expect(outcome(connection, wire.VHOST_USER_SEND_RARP, payload)).toBe('ok')
    expect(on().receive()!.frame.slice(6, 14)).toEqual(Uint8Array.of(...mac(60), 0x80, 0x35))
    connection.send(message(wire.VHOST_USER_NET_SET_MTU, payload64(1400n)))
    connection.barrier()
    expect(await sh('cat /sys/class/net/tap0/mtu 2>/dev/null || ip link show tap0')).toMatch(/1400/)
    expect(outcome(connection, wire.VHOST_USER_NET_SET_MTU, payload64(1500n))).toBe('ok')
  })

  test('twenty sessions, some of which end in the middle', () => {
    for (let round = 0; round < 20; round++) {
      using a = new Guest(
        backend().sockets[0]!,
        1,
        round % 2 === 0 ? {} : { without: [...NOT_MERGEABLE, ...NOTHING], rxBuffers: 8 }
      )
      const bytes = frame({ from: 1, size: 100 })
      a.send(bytes)
      on().gets(bytes)
      const back = inward(1000)
      on().send(back)
      // The tap may still have what was for the one before.
      a.getsAtLast(back)
      for (let i = 0; i < 20; i++) on().send(back)
      a.close(round % 3 === 0)
    }
  })
}

/** The control queue over a socket: its commands, nonsense on it, and queue pairs that are switched on and off. */
import { describe, expect, test } from 'vitest'
import { UNTOUCHED } from '../../src/frontend/net.ts'
import { decodeNetConfig, withDependents } from '../../src/frontend/net-features.ts'
import * as net from '../../src/virtio/net.ts'
import { eventually } from '../vhost-user/backend.ts'
import { frame, Guest, guestsOn, introduce, KINDS, type NetBackend, netBackend, passes } from './support.ts'

const { VIRTIO_NET_OK: OK, VIRTIO_NET_ERR: ERR } = net
const PAIRS = 4
const four = { pairs: PAIRS, rxBuffers: 32 }
/** As with QEMU, which keeps the control queue. */
const KEPT = { without: withDependents(net.VIRTIO_NET_F_CTRL_VQ).filter((bit) => bit !== net.VIRTIO_NET_F_MQ) }

for (const kind of KINDS) {
  describe(`${kind}, four pairs`, () => {
    const current = netBackend({ kind, cards: 2, extra: ['--queue-pairs', String(PAIRS)] })
    pairs(current)
  })
  describe(kind, () => {
    const current = netBackend({ kind, cards: 2 })
    commands(current)
  })
}

function configOf({ session }: Guest): ReturnType<typeof decodeNetConfig> & { bytes: Uint8Array } {
  const bytes = session.connection.getConfig(0, net.VIRTIO_NET_CONFIG_SIZE)!
  return { ...decodeNetConfig(bytes, session.features), bytes }
}

function pairs(current: () => NetBackend): void {
  test('a driver starts with one, and says how many it uses', () => {
    using guests = guestsOn(current(), four, four)
    const [a, b] = guests
    introduce(guests)
    expect(configOf(b).maxVirtqueuePairs).toBe(PAIRS)
    const lands = (used: number): void => {
      for (let queue = 0; queue < PAIRS; queue++) {
        // Twice: a flow stays where it is.
        for (let i = 0; i < 2; i++) expect(passes(a, b, 100, { queue }).queue).toBe(queue % used)
      }
    }
    lands(1)
    for (const used of [4, 2, 3, 1, 4]) {
      expect(b.net.usePairs(used)).toBe(OK)
      lands(used)
    }
    for (const wrong of [0, PAIRS + 1, 0x8000, 0xffff]) expect(b.net.usePairs(wrong)).toBe(ERR)
    lands(4)
  })

  test('all pairs send, whatever number receives', () => {
    using guests = guestsOn(current(), four, four)
    const [a, b] = guests
    introduce(guests)
    expect(a.net.usePairs(2)).toBe(OK)
    for (let round = 0; round < 10; round++) {
      const sent = Array.from({ length: PAIRS }, (_, queue) => {
        const bytes = frame({ from: 1, to: 2, size: 200 })
        a.net.send(bytes, { queue, publish: false })
        return bytes
      })
      for (let queue = 0; queue < PAIRS; queue++) a.net.publish(queue)
      a.net.sent()
      const got = sent.map(() => Buffer.from(b.net.receive().frame).toString('hex')).sort()
      expect(got).toEqual(sent.map((bytes) => Buffer.from(bytes).toString('hex')).sort())
    }
  })

  test('nothing more comes on a pair that the driver has given up', () => {
    using guests = guestsOn(current(), four, { ...four, rxBuffers: 0 })
    const [a, b] = guests
    expect(b.net.usePairs(4)).toBe(OK)
    // They wait for buffers on pair 3, and pair 3 is given up.
    for (let i = 0; i < 5; i++) a.send(frame({ from: 1, size: 100 }), { queue: 3 })
    expect(b.net.usePairs(1)).toBe(OK)
    for (const queue of [0, 3]) {
      for (let i = 0; i < 20; i++) {
        const { gpa } = b.session.memory.allocate(2000, 64)
        b.net.post([{ address: gpa, length: 2000, writable: true }], queue)
      }
    }
    const last = frame({ from: 1, size: 100 })
    a.send(last, { queue: 3 })
    // virtio 1.3 §5.1.6.5.5.1: none on queues beyond the number once the command is acknowledged.
    while (Buffer.compare(b.net.receive(undefined, 0).frame, last) !== 0);
    expect(b.net.tryReceive(0, 3)).toBeUndefined()
  })

  test('a front-end that keeps the control queue enables the rings that are used', () => {
    using guests = guestsOn(current(), { ...four, ...KEPT }, { ...four, ...KEPT })
    const [a, b] = guests
    introduce(guests)
    for (let queue = 0; queue < PAIRS; queue++) expect(passes(a, b, 100, { queue }).queue).toBe(queue)
    for (const pair of [2, 3]) for (const ring of [0, 1]) b.session.connection.setVringEnable(2 * pair + ring, false)
    for (let queue = 0; queue < PAIRS; queue++) expect(passes(a, b, 100, { queue }).queue).toBeLessThan(2)
    for (let i = 0; i < 3; i++) expect(passes(a, b, 100, { queue: 1 }).queue).toBe(1)
    for (const pair of [2, 3]) for (const ring of [0, 1]) b.session.connection.setVringEnable(2 * pair + ring, true)
    for (let queue = 0; queue < PAIRS; queue++) expect(passes(a, b, 100, { queue }).queue).toBe(queue)
  })

  test('a driver without MQ uses the first pair, and the control queue behind it', () => {
    using guests = guestsOn(current(), four, { without: [net.VIRTIO_NET_F_MQ] })
    const [a, b] = guests
    introduce(guests)
    expect(b.net.controlQueue!.index).toBe(2)
    for (let queue = 0; queue < PAIRS; queue++) expect(passes(a, b, 100, { queue }).queue).toBe(0)
    expect(b.net.control(net.VIRTIO_NET_CTRL_RX, net.VIRTIO_NET_CTRL_RX_PROMISC, Uint8Array.of(1))).toBe(OK)
    expect(b.net.usePairs(1)).toBe(ERR)
    passes(b, a)
  })

  test('pairs come and go under traffic', () => {
    using guests = guestsOn(current(), four, four)
    const [a, b] = guests
    introduce(guests)
    for (let round = 0; round < 30; round++) {
      for (let queue = 0; queue < PAIRS; queue++) {
        for (let i = 0; i < 5; i++) a.net.send(frame({ from: 1, to: 2, size: 300 }), { queue, publish: false })
        a.net.publish(queue)
      }
      expect(b.net.usePairs(1 + (round % PAIRS))).toBe(OK)
      a.net.sent()
      for (let i = 0; i < 5 * PAIRS; i++) b.net.receive()
    }
    expect(b.net.tryReceive()).toBeUndefined()
  })
}

function table(...addresses: number[][]): Uint8Array {
  return Uint8Array.from(addresses.flatMap((of) => [of.length / 6, 0, 0, 0, ...of]))
}

function commands(current: () => NetBackend): void {
  const M1 = [2, 0, 0, 0, 0, 9]
  const rows: [string, number, number, number, Uint8Array][] = [
    ['promiscuous', OK, 0, 0, Uint8Array.of(1)],
    ['not promiscuous', OK, 0, 0, Uint8Array.of(0)],
    ['all multicast', OK, 0, 1, Uint8Array.of(1)],
    ['promiscuous 2', ERR, 0, 0, Uint8Array.of(2)],
    ['promiscuous, nothing said', ERR, 0, 0, new Uint8Array(0)],
    ['promiscuous, too much said', ERR, 0, 0, Uint8Array.of(1, 0)],
    ['a command of CTRL_RX_EXTRA', ERR, 0, 3, Uint8Array.of(1)],
    ['empty tables', OK, 1, 0, table([], [])],
    ['tables', OK, 1, 0, table(M1, [...M1, ...M1])],
    ['one table', ERR, 1, 0, table(M1)],
    ['a table that is cut', ERR, 1, 0, table(M1, M1).subarray(0, 19)],
    ['tables, and a byte more', ERR, 1, 0, Uint8Array.of(...table(M1, M1), 0)],
    ['a table that says it has 2^32 - 1 entries', ERR, 1, 0, new Uint8Array(8).fill(0xff)],
    ['a MAC', OK, 1, 1, Uint8Array.from(M1)],
    ['a MAC of five bytes', ERR, 1, 1, Uint8Array.from(M1).subarray(1)],
    ['a MAC of seven bytes', ERR, 1, 1, Uint8Array.of(...M1, 0)],
    ['a group address', ERR, 1, 1, Uint8Array.of(1, 0, 0, 0, 0, 9)],
    ['no address', ERR, 1, 1, new Uint8Array(6)],
    ['another MAC command', ERR, 1, 2, Uint8Array.from(M1)],
    ['a VLAN', ERR, 2, 0, Uint8Array.of(1, 0)],
    ['the announcement was made', OK, 3, 0, new Uint8Array(0)],
    ['another announcement', ERR, 3, 1, new Uint8Array(0)],
    ['pairs without MQ', ERR, 4, 0, Uint8Array.of(1, 0)],
    ['offloads in four bytes', ERR, 5, 0, new Uint8Array(4)],
    ['offloads in nine bytes', ERR, 5, 0, new Uint8Array(9)],
    ['another offload command', ERR, 5, 1, new Uint8Array(8)],
    ['another class', ERR, 6, 0, new Uint8Array(8)],
    ['class 255', ERR, 255, 255, new Uint8Array(200)],
  ]
  test.each(rows)('%s', (_, expected, classId, command, data) => {
    using guests = guestsOn(current(), {}, {})
    const [a, b] = guests
    expect(b.net.control(classId, command, data)).toBe(expected)
    // However it is cut.
    const bytes = Uint8Array.of(classId, command, ...data)
    const pieces = Array.from(bytes.subarray(0, 40), (byte) => Uint8Array.of(byte))
    expect(
      b.net.controlRaw(
        [...pieces, bytes.slice(40)].filter((p) => p.length > 0),
        [1]
      )
    ).toEqual({
      data: Uint8Array.of(expected),
      written: 1,
    })
    passes(a, b)
  })

  test('what was not negotiated is refused', () => {
    const only = {
      without: [net.VIRTIO_NET_F_CTRL_RX, net.VIRTIO_NET_F_CTRL_MAC_ADDR, 2, net.VIRTIO_NET_F_GUEST_ANNOUNCE],
    }
    using guests = guestsOn(current(), {}, only)
    for (const [name, , classId, command, data] of rows)
      expect(guests[1].net.control(classId, command, data), name).toBe(ERR)
  })

  test('the MAC is in the config space from then on, until the session ends', () => {
    using guests = guestsOn(current(), {}, {})
    const [, b] = guests
    const first = configOf(b).bytes.slice(0, 6)
    expect(b.net.control(net.VIRTIO_NET_CTRL_MAC, net.VIRTIO_NET_CTRL_MAC_ADDR_SET, Uint8Array.from(M1))).toBe(OK)
    expect(eventually(() => configOf(b).bytes.subarray(0, 6).join() === M1.join())).toBe(true)
    b.close()
    using again = new Guest(current().sockets[1]!, 3)
    expect(configOf(again).bytes.slice(0, 6)).toEqual(first)
  })

  test('commands without room for an answer, and answers with more room', () => {
    using guests = guestsOn(current(), {}, {})
    const [a, b] = guests
    const command = Uint8Array.of(0, 0, 1)
    expect(b.net.controlRaw([command], []).written).toBe(0)
    expect(b.net.controlRaw([command], [5])).toEqual({
      data: Uint8Array.of(OK, ...new Array(4).fill(UNTOUCHED)),
      written: 1,
    })
    expect(b.net.controlRaw([], [1])).toEqual({ data: Uint8Array.of(ERR), written: 1 })
    expect(b.net.controlRaw([Uint8Array.of(0)], [1])).toEqual({ data: Uint8Array.of(ERR), written: 1 })
    expect(b.net.controlRaw([new Uint8Array(4000)], [1])).toEqual({ data: Uint8Array.of(ERR), written: 1 })
    passes(a, b)
  })

  test('a thousand commands of nonsense', () => {
    using guests = guestsOn(current(), {}, {})
    const [a, b] = guests
    let state = 7
    const random = (below: number): number => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0
      return Math.floor((state / 2 ** 32) * below)
    }
    for (let i = 0; i < 1000; i++) {
      const data = Uint8Array.from({ length: random(24) }, () => (random(2) === 0 ? random(3) : random(256)))
      expect([OK, ERR]).toContain(b.net.control(random(8), random(4), data))
    }
    // Whatever it has said about offloads, plain packets pass.
    passes(a, b)
    passes(b, a)
  })

  test('a control queue that is full of commands', () => {
    using guests = guestsOn(current(), {}, {})
    const [a, b] = guests
    const { split: driver } = b.net.controlQueue!
    const { gpa } = b.session.memory.allocate(128, 64)
    b.session.memory.write(gpa, Uint8Array.of(0, 0, 1))
    for (let i = 0; i < 32; i++) {
      driver.issue(
        driver.build([
          { address: gpa, length: 3, writable: false },
          { address: gpa + 16 + i, length: 1, writable: true },
        ])
      )
    }
    driver.publish()
    expect(eventually(() => driver.usedIndex === 32)).toBe(true)
    expect(b.session.memory.read(gpa + 16, 32)).toEqual(new Uint8Array(32))
    passes(a, b)
  })
}

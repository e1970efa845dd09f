/**
 * Checksum and segmentation left to the receiver: passed on as they are to a guest that takes them, finished for one that
 * doesn't, switched while it runs.
 */
import { describe, expect, test } from 'vitest'
import { withDependents } from '../../src/frontend/net-features.ts'
import { decodeNetHeader } from '../../src/frontend/net-frames.ts'
import { VIRTIO_F_VERSION_1 } from '../../src/virtio/constants.ts'
import { featureSet } from '../../src/virtio/features.ts'
import * as net from '../../src/virtio/net.ts'
import { expectFinished } from './finished.ts'
import { build, type FrameOptions, TCPV4, TCPV6, UFO4, UFO6, USO4, USO6 } from './frames.ts'
import { cases, pass } from './segment-cases.ts'
import { type Guest, guestsOn, introduce, KINDS, type NetBackend, netBackend, passes, plain } from './support.ts'

const NOTHING = { without: withDependents(net.VIRTIO_NET_F_GUEST_CSUM) }
/** Buffers for all segments of a frame. */
const MANY = { rxBuffers: 256 }
const GUEST_CSUM = featureSet(net.VIRTIO_NET_F_GUEST_CSUM)

for (const kind of KINDS) {
  describe(kind, () => {
    const current = netBackend({ kind })
    passing(current)
    finishing(current)
    switching(current)
  })
}

/** The frame at its address, or to all. */
function built(options: FrameOptions, all = false): ReturnType<typeof build> {
  const frame = build(options)
  if (all) frame.bytes.fill(0xff, 0, 6)
  return frame
}

/** Sends a frame, and then one that says where its packets end. */
function exchange(a: Guest, b: Guest, frame: ReturnType<typeof build>, marker = a): Uint8Array[] {
  a.send(frame.bytes, { header: frame.header.subarray(0, a.net.headerSize) })
  return until(marker, b)
}

/** What came before a packet of `marker`: nothing of it is left to do. */
function until(marker: Guest, b: Guest): Uint8Array[] {
  const end = new Uint8Array(60)
  end.set(b.mac)
  end.set(marker.mac, 6)
  end.fill(0xe5, 12)
  marker.send(end)
  const packets: Uint8Array[] = []
  for (;;) {
    const packet = b.net.receive()
    plain(packet)
    if (Buffer.compare(packet.frame, end) === 0) return packets
    packets.push(packet.frame)
  }
}

function passing(current: () => NetBackend): void {
  test('to a guest that takes all, everything as it is', () => {
    using guests = guestsOn(current(), {}, {})
    const [a, b] = guests
    introduce(guests)
    const before = offloaded(current())
    let segmented = 0
    let partial = 0
    for (const options of cases) {
      const frame = build(options)
      const expected = decodeNetHeader(pass('', build(options))!.header)
      a.send(frame.bytes, { header: frame.header })
      const packet = b.gets(frame.bytes)
      expect({ ...packet.header, numBuffers: 0 }, options.name).toEqual({ ...expected, numBuffers: 0 })
      if (expected.gsoType !== 0) segmented++
      else partial++
    }
    expect(offloaded(current()).map((value, i) => value - before[i]!)).toEqual([segmented, segmented, partial, partial])
  })

  test('what waits for buffers keeps its header', () => {
    using guests = guestsOn(current(), {}, { rxBuffers: 0 })
    const [a, b] = guests
    for (const options of cases) {
      const frame = built(options, true)
      const expected = decodeNetHeader(pass('', build(options))!.header)
      a.send(frame.bytes, { header: frame.header })
      const mark = b.session.memory.mark()
      const { gpa } = b.session.memory.allocate(66_000, 64)
      b.net.post([{ address: gpa, length: 66_000, writable: true }])
      expect({ ...b.gets(frame.bytes).header, numBuffers: 0 }, options.name).toEqual({ ...expected, numBuffers: 0 })
      b.session.memory.reset(mark)
    }
  })

  test('cut anywhere, headers and all', () => {
    using guests = guestsOn(current(), {}, {})
    const [a, b] = guests
    introduce(guests)
    const frame = build({ ...TCPV4, gsoSize: 1448, payload: 5000 })
    const total = 12 + frame.bytes.length
    for (const cuts of [
      [12, 14, 20, 32, total - 78],
      [...new Array<number>(90).fill(1), total - 90],
      [40, 13, total - 53],
    ]) {
      for (const indirect of [false, true]) {
        a.send(frame.bytes, { header: frame.header, cuts, indirect })
        expect(b.gets(frame.bytes).header).toMatchObject({ gsoType: 1, gsoSize: 1448, hdrLen: frame.headerLength })
      }
    }
  })
}

/** Segmented packets at the sender and the receiver, and those with a partial checksum only. */
function offloaded(backend: NetBackend): number[] {
  return ['segmentation', 'checksum'].flatMap((offload) => [
    backend.counter('offloaded_packets_total', 0, 1, `,offload="${offload}"`),
    backend.counter('offloaded_packets_total', 1, 0, `,offload="${offload}"`),
  ])
}

function finishing(current: () => NetBackend): void {
  const separate = [...NOTHING.without, net.VIRTIO_NET_F_MRG_RXBUF]
  test.each([
    ['merged buffers', { ...NOTHING, ...MANY }],
    ['buffers of one packet', { without: separate, ...MANY, rxBufferSize: 1600 }],
    ['headers of ten bytes', { without: [...separate, VIRTIO_F_VERSION_1], ...MANY, rxBufferSize: 1600 }],
  ])('for a guest that takes nothing, %s', (_, options) => {
    using guests = guestsOn(current(), {}, options)
    const [a, b] = guests
    introduce(guests)
    for (const row of cases) {
      const frame = build(row)
      expectFinished(exchange(a, b, frame), frame, row)
    }
  })

  const types: [string, number[], FrameOptions][] = [
    ['GUEST_TSO4', [net.VIRTIO_NET_F_GUEST_TSO4], { ...TCPV4, gsoSize: 1448, payload: 9000 }],
    ['GUEST_TSO6', [net.VIRTIO_NET_F_GUEST_TSO6], { ...TCPV6, gsoSize: 1428, payload: 9000 }],
    ['GUEST_UFO', [net.VIRTIO_NET_F_GUEST_UFO], { ...UFO4, gsoSize: 1480, payload: 9000, fragment: 0 }],
    ['GUEST_UFO', [net.VIRTIO_NET_F_GUEST_UFO], { ...UFO6, gsoSize: 1448, payload: 9000 }],
    ['GUEST_USO4', [net.VIRTIO_NET_F_GUEST_USO4], { ...USO4, gsoSize: 1472, payload: 9000 }],
    ['GUEST_USO6', [net.VIRTIO_NET_F_GUEST_USO6], { ...USO6, gsoSize: 1452, payload: 9000 }],
    ['GUEST_ECN', [net.VIRTIO_NET_F_GUEST_ECN], { ...TCPV4, gsoSize: 1448, payload: 9000, ecn: true, tcpFlags: 0xd8 }],
  ]
  test.each(types)('without %s that is segmented, and the other types pass', (_, without, options) => {
    using guests = guestsOn(current(), {}, { without, ...MANY })
    const [a, b] = guests
    introduce(guests)
    const frame = build(options)
    expectFinished(exchange(a, b, frame), frame, options)
    for (const [name, others, other] of types) {
      // USO is taken for both IP versions or for none.
      const group = (bits: readonly number[]): string => bits.map((bit) => (bit === 55 ? 54 : bit)).join()
      if (group(others) === group(without) || name === 'GUEST_ECN') continue
      const passed = build(other)
      a.send(passed.bytes, { header: passed.header })
      expect(b.gets(passed.bytes).header.gsoSize, name).toBe(other.gsoSize)
    }
  })

  test('one frame for all of them: each gets what it takes', () => {
    // In both orders, since the first one's packet must not spoil the second one's.
    for (const options of [
      [NOTHING, {}],
      [{}, NOTHING],
    ]) {
      using guests = guestsOn(current(), {}, { ...options[0]!, ...MANY }, { ...options[1]!, ...MANY })
      const [a, b, c] = guests
      introduce(guests)
      const [takes, bare] = options[0] === NOTHING ? [c, b] : [b, c]
      for (const row of cases) {
        const frame = built(row, true)
        const expected = decodeNetHeader(pass('', build(row))!.header)
        const packets = exchange(a, bare, frame)
        expectFinished(packets, frame, row)
        expect({ ...takes.gets(frame.bytes).header, numBuffers: 0 }, row.name).toEqual({ ...expected, numBuffers: 0 })
      }
    }
  })

  test('segments wait for buffers as packets do', () => {
    using guests = guestsOn(current(), {}, { ...NOTHING, rxBuffers: 0 })
    const [a, b] = guests
    const options = { ...TCPV4, gsoSize: 1448, payload: 60_000 }
    const frame = built(options, true)
    a.send(frame.bytes, { header: frame.header })
    const packets: Uint8Array[] = []
    for (let i = 0; i < Math.ceil(60_000 / 1448); i++) {
      const { gpa } = b.session.memory.allocate(2000, 64)
      b.net.post([{ address: gpa, length: 2000, writable: true }])
      packets.push(b.net.receive().frame)
    }
    expectFinished(packets, frame, options)
  })

  test('a UDP checksum that comes to 0 is sent as all ones', () => {
    using guests = guestsOn(current(), {}, NOTHING)
    const [a, b] = guests
    introduce(guests)
    const options = { gsoType: 0, payload: 100, udp: true }
    const frame = build(options)
    const view = new DataView(frame.bytes.buffer)
    // The payload makes up for what the sum lacks.
    view.setUint16(frame.headerLength, 0)
    const [packet] = exchange(a, b, frame)
    const checksum = new DataView(packet!.buffer, packet!.byteOffset).getUint16(frame.l4 + 6)
    view.setUint16(frame.headerLength, checksum)
    const [second] = exchange(a, b, frame)
    expect(new DataView(second!.buffer, second!.byteOffset).getUint16(frame.l4 + 6)).toBe(0xffff)
    expectFinished([second!], frame, options)
  })
}

function switching(current: () => NetBackend): void {
  const options = { ...TCPV4, gsoSize: 1448, payload: 20_000 }

  test('CTRL_GUEST_OFFLOADS takes effect at once', () => {
    using guests = guestsOn(current(), {}, MANY)
    const [a, b] = guests
    introduce(guests)
    const frame = build(options)
    const whole = (): void => {
      a.send(frame.bytes, { header: frame.header })
      expect(b.gets(frame.bytes).header).toMatchObject({ flags: 1, gsoType: 1, gsoSize: 1448 })
    }
    whole()
    for (let i = 0; i < 3; i++) {
      expect(offloads(b, 0n)).toBe(net.VIRTIO_NET_OK)
      expectFinished(exchange(a, b, frame), frame, options)
      expect(offloads(b, GUEST_CSUM)).toBe(net.VIRTIO_NET_OK)
      expectFinished(exchange(a, b, frame), frame, options)
      expect(offloads(b, GUEST_CSUM | featureSet(net.VIRTIO_NET_F_GUEST_TSO4))).toBe(net.VIRTIO_NET_OK)
      whole()
    }
  })

  test('offloads without the checksum are none', () => {
    using guests = guestsOn(current(), {}, MANY)
    const [a, b] = guests
    introduce(guests)
    const frame = build(options)
    expect(offloads(b, featureSet(net.VIRTIO_NET_F_GUEST_TSO4))).toBe(net.VIRTIO_NET_OK)
    expectFinished(exchange(a, b, frame), frame, options)
  })

  test('offloads that were not negotiated are refused, and change nothing', () => {
    using guests = guestsOn(
      current(),
      {},
      { without: [net.VIRTIO_NET_F_GUEST_TSO4, net.VIRTIO_NET_F_GUEST_ECN], ...MANY }
    )
    const [a, b] = guests
    introduce(guests)
    for (const bit of [net.VIRTIO_NET_F_GUEST_TSO4, net.VIRTIO_NET_F_GUEST_ECN, net.VIRTIO_NET_F_CSUM, 32, 63]) {
      expect(offloads(b, featureSet(bit) | GUEST_CSUM)).toBe(net.VIRTIO_NET_ERR)
    }
    const passed = build({ ...TCPV6, gsoSize: 1428, payload: 9000 })
    a.send(passed.bytes, { header: passed.header })
    expect(b.gets(passed.bytes).header.gsoSize).toBe(1428)
  })

  test('what waits for buffers when offloads are switched off is finished, too', () => {
    using guests = guestsOn(current(), {}, { rxBuffers: 0 })
    const [a, b] = guests
    const frame = built(options, true)
    a.send(frame.bytes, { header: frame.header })
    expect(offloads(b, 0n)).toBe(net.VIRTIO_NET_OK)
    const packets: Uint8Array[] = []
    for (let i = 0; i < Math.ceil(20_000 / 1448); i++) {
      for (let n = 0; n < 2; n++) {
        const { gpa } = b.session.memory.allocate(2000, 64)
        b.net.post([{ address: gpa, length: 2000, writable: true }])
      }
      const packet = b.net.receive()
      plain(packet)
      packets.push(packet.frame)
    }
    expectFinished(packets, frame, options)
  })

  test('they stay as they are when rings stop and start again', () => {
    using guests = guestsOn(current(), {}, MANY)
    const [a, b] = guests
    introduce(guests)
    expect(offloads(b, 0n)).toBe(net.VIRTIO_NET_OK)
    // As when the machine pauses: all of them, and then all again.
    const bases = b.session.queues.map((queue) => queue.stop())
    for (const [i, queue] of b.session.queues.entries()) queue.start(bases[i]!)
    b.announce([a])
    const frame = build(options)
    expectFinished(exchange(a, b, frame), frame, options)
    passes(a, b)
  })
}

/** GUEST_OFFLOADS_SET. @returns the acknowledgement */
function offloads(guest: Guest, bits: bigint): number {
  const data = new Uint8Array(8)
  new DataView(data.buffer).setBigUint64(0, bits, true)
  return guest.net.control(net.VIRTIO_NET_CTRL_GUEST_OFFLOADS, net.VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, data)
}

/** virtio-net at the front-end's side without a peer: frames, feature rules, packet rules, the load's ring, names and config. */
import { describe, expect, onTestFinished, test } from 'vitest'
import { guessDevice, nameFeatures } from '../../src/frontend/feature-names.ts'
import { GuestMemory, layouts } from '../../src/frontend/memory.ts'
import { decodeNetConfig, headerSizeOf, receiveBufferSize, withDependents } from '../../src/frontend/net-features.ts'
import * as frames from '../../src/frontend/net-frames.ts'
import { PacketSink, PacketSource } from '../../src/frontend/net-load.ts'
import { PacketRing } from '../../src/frontend/net-ring.ts'
import { takePacket } from '../../src/frontend/net-rules.ts'
import { formatProbe } from '../../src/frontend/probe.ts'
import { needEvent, splitRingBytes } from '../../src/frontend/split-driver.ts'
import { featureSet } from '../../src/virtio/features.ts'
import * as net from '../../src/virtio/net.ts'

const A = Uint8Array.of(2, 0, 0, 0, 0, 1)
const B = Uint8Array.of(2, 0, 0, 0, 0, 2)

describe('frames', () => {
  /** Sums all 16-bit words the slow way; a right checksum makes it 0xffff. */
  function ones(bytes: Uint8Array): number {
    let sum = 0
    for (let i = 0; i < bytes.length; i += 2) {
      sum += (bytes[i] ?? 0) * 256 + (bytes[i + 1] ?? 0)
      if (sum > 0xffff) sum -= 0xffff
    }
    return sum
  }
  const pseudo = (frame: Uint8Array): Uint8Array => {
    const length = frame.length - 34
    return Uint8Array.of(...frame.subarray(26, 34), 0, frame[23] ?? 0, length >> 8, length & 0xff)
  }

  test.each([42, 60, 64, 65, 1514, 1518])('UDP of %i bytes', (size) => {
    const frame = frames.udpFrame({ size, source: A, destination: B, sourcePort: 5000, seed: 3 })
    expect(frame).toHaveLength(size)
    expect(frame.subarray(0, 14)).toEqual(Uint8Array.of(...B, ...A, 8, 0))
    const view = new DataView(frame.buffer)
    expect([view.getUint16(16), view.getUint16(34), view.getUint16(38)]).toEqual([size - 14, 5000, size - 34])
    expect(ones(frame.subarray(14, 34))).toBe(0xffff)
    expect(ones(Buffer.concat([pseudo(frame), frame.subarray(34)]))).toBe(0xffff)
  })

  test.each([66, 67, 1514, 4000, 65549])('TCP of %i bytes has the pseudo header in its checksum', (size) => {
    const frame = frames.tcpFrame({ size, source: A, destination: B })
    expect(ones(frame.subarray(14, 34))).toBe(0xffff)
    expect(new DataView(frame.buffer).getUint16(50)).toBe(ones(pseudo(frame)))
    const header = frames.tcpGsoHeader(size)
    expect(header).toMatchObject({ flags: 1, csumStart: 34, csumOffset: 16 })
    expect(header.gsoType ?? 0).toBe(size - 66 > 1448 ? net.VIRTIO_NET_HDR_GSO_TCPV4 : 0)
  })

  test('a checksum of UDP is never 0, which would mean that there is none', () => {
    const seen = new Set<number>()
    for (let sourcePort = 0; sourcePort < 65536; sourcePort++) {
      const frame = frames.udpFrame({ size: 42, source: A, destination: B, sourcePort })
      seen.add((frame[40] ?? 0) * 256 + (frame[41] ?? 0))
    }
    expect([seen.has(0), seen.has(0xffff)]).toEqual([false, true])
  })

  test('beyond IPv4 there is none', () => {
    expect(() => frames.tcpFrame({ size: 65550, source: A, destination: B })).toThrow(RangeError)
    expect(() => frames.udpFrame({ size: 41, source: A, destination: B })).toThrow(RangeError)
  })

  test('flows differ in their port alone', () => {
    const [a, b] = [1, 2].map((sourcePort) => frames.udpFrame({ size: 64, source: A, destination: B, sourcePort }))
    const differ = Array.from(a!.keys()).filter((i) => a![i] !== b![i])
    expect(differ).toEqual([35, 41]) // the port, and the checksum
  })

  test('packet headers there and back, with 12 and 10 bytes', () => {
    // biome-ignore format: fields of one header
    const header = { flags: 3, gsoType: 4, ecn: true, hdrLen: 0x1234, gsoSize: 0x5678, csumStart: 0x9abc, csumOffset: 0xdef0, numBuffers: 0x1122 }
    expect(Buffer.from(frames.encodeNetHeader(header)).toString('hex')).toBe(
      '0384341278 56bc9af0de2211'.replace(' ', '')
    )
    expect(frames.decodeNetHeader(frames.encodeNetHeader(header))).toEqual(header)
    expect(frames.decodeNetHeader(frames.encodeNetHeader(header, 10))).toEqual({ ...header, numBuffers: 0 })
  })

  test.each(['', '02:00:5e:12:00', '02:00:5e:12:00:0g', '02-00-5e-12-00-01', '02:00:5e:12:00:01:00'])(
    '"%s" is no MAC address',
    (text) => expect(frames.parseMac(text)).toBeUndefined()
  )

  test('MAC addresses there and back', () => {
    expect(frames.formatMac(frames.parseMac('02:00:5E:aa:00:ff')!)).toBe('02:00:5e:aa:00:ff')
  })
})

describe('features', () => {
  test.each([
    [[net.VIRTIO_NET_F_CSUM], [0, 11, 12, 13, 14, 56]],
    [[net.VIRTIO_NET_F_GUEST_CSUM], [1, 7, 8, 9, 10, 54, 55]],
    [[net.VIRTIO_NET_F_HOST_TSO4], [11]],
    [
      [net.VIRTIO_NET_F_HOST_TSO4, net.VIRTIO_NET_F_HOST_TSO6],
      [11, 12, 13],
    ],
    [[net.VIRTIO_NET_F_CTRL_VQ], [2, 17, 18, 19, 20, 21, 22, 23]],
    [[net.VIRTIO_NET_F_MRG_RXBUF], [15]],
  ])('without %j: %j', (bits, all) => {
    expect(withDependents(...bits).sort((a, b) => a - b)).toEqual(all)
  })

  test.each([
    [[32, 15], 12, 2048],
    [[32], 12, 1526],
    [[15], 12, 2048],
    [[], 10, 1526],
    [[32, 0, 1, 8], 12, 65562],
    [[32, 54], 12, 65562],
    [[32, 11, 12], 12, 1526],
  ])('%j: a header of %i bytes, buffers of %i', (bits, header, buffer) => {
    expect([headerSizeOf(featureSet(...bits)), receiveBufferSize(featureSet(...bits))]).toEqual([header, buffer])
  })

  test.each([
    ['QEMU 7.2, blk', 0x1_7500_7e46n, true, 'blk'],
    ['one disk with LIFETIME, SECURE_ERASE and ZONED', featureSet(6, 9, 15, 16, 17, 32), true, 'blk'],
    ['DPDK, net', 0xd_7c66_e7cbn, false, 'net'],
    ['DPDK with an old GSO bit and config', 0xd_7c66_e7cbn, true, 'net'],
    ['a net device of MRG_RXBUF alone', featureSet(15, 32), true, 'net'],
    ['a net device with a GSO bit 6', featureSet(0, 6, 32), true, 'net'],
    ['MTU alone', featureSet(3, 32), true, 'net'],
    ['nothing of its own', featureSet(28, 29, 32), true, 'unknown'],
  ] as const)('%s', (_name, features, hasConfig, device) => {
    expect(guessDevice(features, hasConfig)).toBe(device)
  })

  test('names', () => {
    expect(nameFeatures(featureSet(0, 22, 32, 56, 60), 'net').map(({ name }) => name)).toEqual([
      'VIRTIO_NET_F_CSUM',
      'VIRTIO_NET_F_MQ',
      'VIRTIO_F_VERSION_1',
      'VIRTIO_NET_F_HOST_USO',
      'VIRTIO_NET_F_RSS',
    ])
  })

  test('the config space, as far as features and bytes go', () => {
    const bytes = Uint8Array.of(2, 0, 0x5e, 0x12, 0, 1, 3, 0, 4, 0, 0x28, 0x23, 0x10, 0x27, 0, 0, 1)
    const all = featureSet(3, 5, 16, 22, 63)
    const whole = {
      mac: '02:00:5e:12:00:01',
      linkUp: true,
      announce: true,
      maxVirtqueuePairs: 4,
      mtu: 9000,
      speed: 10_000,
      fullDuplex: true,
    }
    expect(decodeNetConfig(bytes, all)).toEqual(whole)
    expect(decodeNetConfig(bytes, featureSet(16))).toEqual({ linkUp: true, announce: true })
    const { speed: _speed, fullDuplex: _duplex, mtu: _mtu, ...short } = whole
    expect(decodeNetConfig(bytes.subarray(0, 11), all)).toEqual(short)
    expect(decodeNetConfig(new Uint8Array(17).fill(0xff), featureSet(63))).toEqual({})
    const text = formatProbe({
      socket: '/s',
      device: 'net',
      guessed: true,
      features: '0x0',
      featureNames: [],
      protocolFeatureNames: [],
      config: '00',
      configBytes: 17,
      net: whole,
    })
    expect(text).toMatch(
      /MAC +02:00:5e:12:00:01\n +link +up, asks for an announcement\n +queue pairs +≤ 4\n +MTU +9000/
    )
  })
})

describe('what a packet has to be', () => {
  const features = featureSet(0, 1, 7, 15, 32)
  const buffer = (header: Partial<frames.NetHeader>, payload: number, capacity = 12 + payload) => ({
    bytes: Buffer.concat([frames.encodeNetHeader({ numBuffers: 1, ...header }), new Uint8Array(payload).fill(7)]),
    capacity,
  })
  const more = (length: number, capacity = length) => ({ bytes: new Uint8Array(length).fill(9), capacity })
  const gso = { flags: 1, gsoType: 1, gsoSize: 1448, csumStart: 34, csumOffset: 16 }

  test('buffers are joined, and the next packet stays', () => {
    const filled = [buffer({ numBuffers: 3 }, 20), more(10), more(3, 10), buffer({}, 60)]
    const packet = takePacket(filled, features)
    expect(packet).toMatchObject({ buffers: 3, header: { numBuffers: 3 } })
    expect(packet.frame).toEqual(Uint8Array.from([...new Array(20).fill(7), ...new Array(13).fill(9)]))
    expect(filled).toHaveLength(1)
    expect(takePacket([buffer(gso, 100)], features).header).toMatchObject(gso)
  })

  test.each([
    ['no whole header', [{ bytes: new Uint8Array(11), capacity: 2048 }], features, /no whole header/],
    ['num_buffers 0', [buffer({ numBuffers: 0 }, 60)], features, /num_buffers is 0/],
    ['buffers that are not there', [buffer({ numBuffers: 2 }, 60)], features, /it used 1 together/],
    ['a buffer not filled', [buffer({ numBuffers: 2 }, 60, 100), more(10)], features, /28 bytes free/],
    ['merged without MRG_RXBUF', [buffer({ numBuffers: 2 }, 60), more(10)], featureSet(32), /num_buffers is 2/],
    ['num_buffers 0 without MRG_RXBUF', [buffer({ numBuffers: 0 }, 60)], featureSet(32), /num_buffers is 0/],
    ['flags without GUEST_CSUM', [buffer({ flags: 1, csumOffset: 6 }, 60)], featureSet(15, 32), /without GUEST_CSUM/],
    ['unknown flags', [buffer({ flags: 4 }, 60)], features, /flags are 4/],
    ['a checksum beyond', [buffer({ flags: 1, csumStart: 50, csumOffset: 9 }, 60)], features, /checksum at 50/],
    ['another gso_type', [buffer({ ...gso, gsoType: 4 }, 100)], features, /gso_type is 4/],
    ['an unknown gso_type', [buffer({ ...gso, gsoType: 9 }, 100)], features, /gso_type is 9/],
    ['gso_size 0', [buffer({ ...gso, gsoSize: 0 }, 100)], features, /gso_size is 0/],
    ['ECN', [buffer({ ...gso, ecn: true }, 100)], features, /GSO_ECN/],
    ['gso without checksum', [buffer({ ...gso, flags: 0 }, 100)], features, /without NEEDS_CSUM/],
  ])('%s', (_name, filled, negotiated, message) => {
    expect(() => takePacket(filled, negotiated)).toThrow(message)
  })

  test('DPDK leaves num_buffers alone without MRG_RXBUF, and may be forgiven', () => {
    expect(takePacket([buffer({ numBuffers: 0xa5a5 }, 60)], featureSet(32), true).buffers).toBe(1)
    expect(() => takePacket([buffer({ numBuffers: 0 }, 60)], featureSet(15, 32), true)).toThrow(/num_buffers is 0/)
  })
})

/** A ring of the load, and the device's side of it byte by byte. */
function makeRing(size: number, eventIdx = false) {
  const memory = new GuestMemory(layouts.single(2 ** 21))
  onTestFinished(() => memory.close())
  const bytes = splitRingBytes(size)
  const parts = [bytes.descriptors, bytes.available, bytes.used].map((length) => memory.allocate(length, 64))
  const [descriptors, available, used] = parts.map(({ region, offset }) => ({ buffer: region.buffer, offset }))
  let kicks = 0
  const ring = new PacketRing({
    size,
    areas: { descriptors: descriptors!, available: available!, used: used! },
    eventIdx,
    kick: () => kicks++,
    name: 'virtqueue 0',
  })
  const view = (part: number): DataView =>
    new DataView(parts[part]!.region.buffer, parts[part]!.offset, parts[part]!.length)
  const [desc, avail, usedRing] = [view(0), view(1), view(2)]
  let seen = 0
  let done = 0
  return {
    memory,
    ring,
    kicks: () => kicks,
    desc,
    avail,
    usedRing,
    availIndex: () => avail.getUint16(2, true),
    /** The next available chain. */
    pop(): number {
      if (seen === avail.getUint16(2, true)) return -1
      const head = avail.getUint16(4 + 2 * (seen % size), true)
      seen = (seen + 1) & 0xffff
      return head
    },
    use(head: number, length: number): void {
      usedRing.setUint32(4 + 8 * (done % size), head, true)
      usedRing.setUint32(8 + 8 * (done % size), length, true)
      done = (done + 1) & 0xffff
      usedRing.setUint16(2, done, true)
    },
    address: (head: number): number => Number(desc.getBigUint64(16 * head, true)),
  }
}

describe('the source', () => {
  const header = frames.encodeNetHeader({ flags: 1, csumStart: 34, csumOffset: 6 })
  const two = [0, 1].map((seed) => frames.udpFrame({ size: 70, source: A, destination: B, seed }))

  test.each([false, true])('sends its frames in turn, header in a descriptor of its own: %s', (splitHeader) => {
    const device = makeRing(8)
    const source = new PacketSource(device.ring, device.memory, { header, frames: two, splitHeader })
    expect(source.depth).toBe(splitHeader ? 4 : 8)
    source.start()
    for (let slot = 0; slot < source.depth; slot++) {
      const head = device.pop()
      const parts: Uint8Array[] = []
      for (let index = head, more = true; more; ) {
        const flags = device.desc.getUint16(16 * index + 12, true)
        expect(flags & 2).toBe(0)
        parts.push(device.memory.read(device.address(index), device.desc.getUint32(16 * index + 8, true)))
        more = (flags & 1) === 1
        index = device.desc.getUint16(16 * index + 14, true)
      }
      expect(parts).toHaveLength(splitHeader ? 2 : 1)
      expect(Buffer.concat(parts)).toEqual(Buffer.concat([header, two[slot % 2]!]))
    }
    expect(device.pop()).toBe(-1)
  })

  test('sends again what comes back, in any order, over the wrap of the indices', () => {
    const device = makeRing(4)
    const source = new PacketSource(device.ring, device.memory, { header, frames: two })
    source.start()
    const held = [device.pop(), device.pop(), device.pop(), device.pop()]
    let random = 1
    let sent = 0
    for (let round = 0; round < 60_000; round++) {
      random = (random * 1103515245 + 12345) & 0x7fff_ffff
      const used: number[] = []
      for (let count = 1 + ((random >> 16) & 3); used.length < count; ) {
        const [head = -1] = held.splice((random >> (8 + used.length)) % held.length, 1)
        device.use(head, 0)
        used.push(head)
      }
      if (source.step(used.length + 1, true) !== 0) throw new Error('it took fewer than it was told to wait for')
      sent += source.step(used.length, true)
      const again = used.map(() => device.pop())
      if (again.join() !== used.join()) throw new Error(`${used.join()} came back, ${again.join()} went out`)
      held.push(...again)
    }
    expect(source.sent).toBe(sent)
    expect(sent).toBeGreaterThan(2 * 65536)
    expect(device.kicks()).toBe(60_001)
  })

  test('sends no more when it drains', () => {
    const device = makeRing(4)
    const source = new PacketSource(device.ring, device.memory, { header, frames: two })
    source.start()
    device.use(device.pop(), 0)
    expect(source.step(1, false)).toBe(1)
    expect([device.availIndex(), device.ring.inFlight]).toEqual([4, 3])
  })

  test('an announcement goes out alone and leaves the first frame as it was', () => {
    const device = makeRing(4)
    const source = new PacketSource(device.ring, device.memory, { header, frames: two })
    const plain = frames.encodeNetHeader()
    source.announce(plain, frames.announcement(A, 1))
    const head = device.pop()
    expect(device.pop()).toBe(-1)
    const sent = device.memory.read(device.address(head), device.desc.getUint32(16 * head + 8, true))
    expect(sent).toEqual(new Uint8Array(Buffer.concat([plain, frames.announcement(A, 1)])))
    device.use(head, 0)
    expect(source.step(1, false)).toBe(1)
    source.announced()
    source.start()
    const again = device.pop()
    expect(device.memory.read(device.address(again), device.desc.getUint32(16 * again + 8, true))).toEqual(
      new Uint8Array(Buffer.concat([header, two[0]!]))
    )
  })

  test.each([
    ['a chain that it does not have', (device: ReturnType<typeof makeRing>) => device.use(9, 0), /chain 9/],
    [
      'a chain twice in one batch',
      (device: ReturnType<typeof makeRing>) => {
        device.use(1, 0)
        device.use(1, 0)
      },
      /chain 1,/,
    ],
    [
      'a used index that jumps',
      (device: ReturnType<typeof makeRing>) => device.usedRing.setUint16(2, 5, true),
      /5 more chains with 4/,
    ],
  ])('a device that lies: %s', (_name, lie, message) => {
    const device = makeRing(4)
    const source = new PacketSource(device.ring, device.memory, { header, frames: two })
    source.start()
    lie(device)
    expect(() => source.step(1, true)).toThrow(message)
  })

  test('a ring too small for the depth is refused', () => {
    const device = makeRing(4)
    expect(() => new PacketSource(device.ring, device.memory, { header, frames: two, depth: 5 })).toThrow(/too small/)
  })
})

describe('the sink', () => {
  function make(mergeable: boolean, size = 8) {
    const device = makeRing(size)
    const sink = new PacketSink(device.ring, device.memory, { headerSize: 12, bufferSize: 100, mergeable })
    sink.start()
    /** Uses the next buffers for one packet. */
    const packet = (length: number, buffers = Math.ceil(length / 100)): void => {
      for (let i = 0; i < buffers; i++) {
        const head = device.pop()
        if (i === 0) device.memory.write(device.address(head), frames.encodeNetHeader({ numBuffers: buffers }))
        device.use(head, Math.min(100, length - 100 * i))
      }
    }
    return { device, sink, packet }
  }

  test('counts merged packets, also when a batch ends inside one', () => {
    const { device, sink, packet } = make(true)
    packet(12 + 60)
    packet(12 + 300)
    const head = device.pop()
    device.memory.write(device.address(head), frames.encodeNetHeader({ numBuffers: 2 }))
    device.use(head, 100)
    expect(sink.step(1)).toBe(6)
    expect([sink.packets, sink.bytes, sink.merged]).toEqual([2, 60 + 300 + 88, 2])
    device.use(device.pop(), 5)
    packet(12 + 64)
    expect(sink.step(1)).toBe(2)
    expect([sink.packets, sink.bytes]).toEqual([4, 60 + 300 + 88 + 5 + 64])
  })

  test('posts every buffer again', () => {
    const { device, sink, packet } = make(true, 4)
    for (let round = 0; round < 1000; round++) {
      for (let i = 0; i < 4; i++) packet(12 + 60)
      sink.step(1)
    }
    expect([sink.packets, device.ring.inFlight]).toEqual([4000, 4])
  })

  test('without MRG_RXBUF num_buffers means nothing', () => {
    const { sink, packet } = make(false)
    packet(12 + 60, 1)
    sink.step(1)
    expect(sink.packets).toBe(1)
  })

  test.each([
    ['less than a header', 11, 1, /less than a packet header/],
    ['more than the buffer', 101, 1, /101 bytes into a buffer of 100/],
    ['num_buffers 0', 72, 0, /num_buffers is 0/],
  ])('%s', (_name, length, buffers, message) => {
    const { device, sink } = make(true)
    const head = device.pop()
    device.memory.write(device.address(head), frames.encodeNetHeader({ numBuffers: buffers }))
    device.use(head, length)
    expect(() => sink.step(1)).toThrow(message)
  })
})

describe('calls of the load', () => {
  const start = (eventIdx: boolean) => {
    const device = makeRing(8, eventIdx)
    const sink = new PacketSink(device.ring, device.memory, { headerSize: 12, bufferSize: 100, mergeable: false })
    sink.start()
    return { device, ring: device.ring, usedEvent: () => device.avail.getUint16(4 + 2 * 8, true), sink }
  }

  test('EVENT_IDX: one after as many chains as asked for', () => {
    const { device, ring, usedEvent } = start(true)
    expect(ring.enableCalls(3)).toBe(false)
    expect([1, 2, 3, 4].map((used) => needEvent(usedEvent(), used, used - 1))).toEqual([false, false, true, false])
    for (let i = 0; i < 3; i++) device.use(device.pop(), 12)
    expect(ring.enableCalls(3)).toBe(true)
    ring.disableCalls()
    expect(needEvent(usedEvent(), 4, 3)).toBe(false)
  })

  test('EVENT_IDX: a polling driver is never called, over many wraps', () => {
    const { device, ring, usedEvent, sink } = start(true)
    ring.disableCalls()
    let calls = 0
    for (let used = 0; used < 200_000; used++) {
      if (needEvent(usedEvent(), (used + 1) & 0xffff, used & 0xffff)) calls++
      device.use(device.pop(), 12)
      sink.step(1)
    }
    expect([calls, sink.packets]).toEqual([0, 200_000])
  })

  test('flags', () => {
    const { device, ring } = start(false)
    ring.disableCalls()
    expect(device.avail.getUint16(0, true)).toBe(1)
    expect(ring.enableCalls(1)).toBe(false)
    expect(device.avail.getUint16(0, true)).toBe(0)
    device.use(device.pop(), 12)
    expect(ring.enableCalls(1)).toBe(true)
  })

  test('kicks go by avail_event, or by the flag', () => {
    const event = makeRing(8, true)
    event.usedRing.setUint16(4 + 8 * 8, 2, true)
    for (let head = 0; head < 4; head++) {
      event.ring.issue(head)
      event.ring.publish()
    }
    expect([event.kicks(), event.ring.counters.suppressedKicks]).toEqual([1, 3])
    const flags = makeRing(8)
    flags.ring.issue(0)
    flags.ring.publish()
    flags.usedRing.setUint16(0, 1, true)
    flags.ring.issue(1)
    flags.ring.publish()
    expect(flags.kicks()).toBe(1)
  })
})

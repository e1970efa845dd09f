/** What a guest may put before its packets, and which frames it may call segmentable. */
import { describe, expect, test } from 'vitest'
import { GsoFrame } from '../../devices/net/frame.ts'
import * as reasons from '../../devices/net/header.ts'
import { DROP_REASONS, PacketHeader } from '../../devices/net/header.ts'
import { featureSet } from '../../src/virtio/features.ts'
import * as net from '../../src/virtio/net.ts'
import { build, type FrameOptions, TCPV4, TCPV6, UFO4, UFO6, USO4, USO6 } from './frames.ts'

const ALL = featureSet(
  net.VIRTIO_NET_F_CSUM,
  net.VIRTIO_NET_F_HOST_TSO4,
  net.VIRTIO_NET_F_HOST_TSO6,
  net.VIRTIO_NET_F_HOST_ECN,
  net.VIRTIO_NET_F_HOST_UFO,
  net.VIRTIO_NET_F_HOST_USO
)
const without = (...features: number[]) => ALL & ~featureSet(...features)

interface Fields {
  flags?: number
  type?: number
  hdrLen?: number
  gsoSize?: number
  start?: number
  offset?: number
}
function load(header: PacketHeader, { flags = 0, type = 0, hdrLen = 0, gsoSize = 0, start = 0, offset = 0 }: Fields) {
  // As a DataView reads them, and as the `|` of bytes would: signed.
  header.load((flags | (type << 8) | (hdrLen << 16)) >>> 0, gsoSize | (start << 16), offset)
  return header
}
const check = (fields: Fields, length: number, features = ALL) =>
  DROP_REASONS[load(new PacketHeader(features), fields).check(length)]
const TSO = { flags: 1, type: 1, gsoSize: 1448, start: 34, offset: 16 }

describe('check', () => {
  test('names fit their numbers', () => {
    expect(DROP_REASONS).toEqual(['', 'runt', 'oversized', 'header', 'checksum', 'segmentation'])
    const { PASS, RUNT, OVERSIZED, HEADER, CHECKSUM, SEGMENTATION } = reasons
    expect([PASS, RUNT, OVERSIZED, HEADER, CHECKSUM, SEGMENTATION]).toEqual([0, 1, 2, 3, 4, 5])
  })

  test.each([
    ['an empty frame', {}, 0, 'runt'],
    ['13 bytes', {}, 13, 'runt'],
    ['14 bytes', {}, 14, ''],
    ['the largest frame', {}, 65_557, ''],
    ['one byte more', {}, 65_558, 'oversized'],
    ['a checksum', { flags: 1, start: 34, offset: 16 }, 60, ''],
    ['a checksum at the very end', { flags: 1, start: 34, offset: 16 }, 52, ''],
    ['a checksum half out of the frame', { flags: 1, start: 34, offset: 16 }, 51, 'checksum'],
    ['a checksum that starts behind the frame', { flags: 1, start: 65_535, offset: 0 }, 60, 'checksum'],
    ['a checksum whose sum of offsets wraps in 16 bits', { flags: 1, start: 34, offset: 65_534 }, 60, 'checksum'],
    ['a checksum from behind the Ethernet header', { flags: 1, start: 14, offset: 0 }, 60, ''],
    ['a checksum over the Ethernet header', { flags: 1, start: 13, offset: 0 }, 60, 'checksum'],
    ['offsets without NEEDS_CSUM', { start: 65_535, offset: 65_535 }, 60, ''],
    ['flags that a driver must not set', { flags: 0xfe, start: 65_535 }, 60, ''],
    ['TSO4', TSO, 3000, ''],
    ['TSO4 with ECN', { ...TSO, type: 0x81 }, 3000, ''],
    ['TSO6', { ...TSO, type: 4, start: 54 }, 3000, ''],
    ['UFO', { ...TSO, type: 3, offset: 6 }, 3000, ''],
    ['USO', { ...TSO, type: 5, offset: 6 }, 3000, ''],
    ['TSO without NEEDS_CSUM', { ...TSO, flags: 0 }, 3000, 'header'],
    ['UFO without NEEDS_CSUM', { ...TSO, type: 3, offset: 6, flags: 0 }, 3000, 'header'],
    ['a gso_size of 0', { ...TSO, gsoSize: 0 }, 3000, 'header'],
    ['Linux’ reserved gso_size', { ...TSO, gsoSize: 65_535 }, 3000, 'header'],
    ['gso_type 2', { ...TSO, type: 2 }, 3000, 'header'],
    ['gso_type 6', { ...TSO, type: 6 }, 3000, 'header'],
    ['gso_type 33, which a shift takes for 1', { ...TSO, type: 33 }, 3000, 'header'],
    ['gso_type 127', { ...TSO, type: 127 }, 3000, 'header'],
    ['ECN without segmentation', { flags: 0, type: 0x80 }, 3000, 'header'],
    ['ECN with UFO', { ...TSO, type: 0x83, offset: 6 }, 3000, 'header'],
    ['ECN with USO', { ...TSO, type: 0x85, offset: 6 }, 3000, 'header'],
    ['a segmented frame without room for TCP', TSO, 53, 'segmentation'],
    ['a segmented frame with room for nothing but TCP', TSO, 54, ''],
    ['a segmented frame without room for UDP', { ...TSO, type: 5, offset: 6 }, 41, 'checksum'],
    ['a checksum within, but no room for UDP', { ...TSO, type: 5, offset: 0 }, 41, 'segmentation'],
    ['fragments of less than eight bytes', { ...TSO, type: 3, offset: 6, gsoSize: 7 }, 3000, 'segmentation'],
    ['2048 segments', { ...TSO, gsoSize: 32 }, 65_536, ''],
    ['more', { ...TSO, gsoSize: 32 }, 65_537, 'segmentation'],
    ['gso_size without a type', { gsoSize: 1448 }, 60, ''],
  ] as [string, Fields, number, string][])('%s: %o', (_, fields, length, reason) => {
    expect(check(fields, length)).toBe(reason)
  })

  test.each([
    ['CSUM', net.VIRTIO_NET_F_CSUM, { flags: 1, start: 34, offset: 16 }],
    ['HOST_TSO4', net.VIRTIO_NET_F_HOST_TSO4, TSO],
    ['HOST_TSO6', net.VIRTIO_NET_F_HOST_TSO6, { ...TSO, type: 4 }],
    ['HOST_ECN', net.VIRTIO_NET_F_HOST_ECN, { ...TSO, type: 0x81 }],
    ['HOST_UFO', net.VIRTIO_NET_F_HOST_UFO, { ...TSO, type: 3, offset: 6 }],
    ['HOST_USO', net.VIRTIO_NET_F_HOST_USO, { ...TSO, type: 5, offset: 6 }],
  ])('what needs %s is refused without it, and all else passes', (_, feature, fields) => {
    expect(check(fields, 3000)).toBe('')
    expect(check(fields, 3000, without(feature))).toBe('header')
    expect(check(fields, 3000, featureSet(feature, net.VIRTIO_NET_F_CSUM, net.VIRTIO_NET_F_HOST_TSO4))).toBe('')
    expect(check({}, 3000, without(feature))).toBe('')
  })
})

describe('load and store', () => {
  const stored = (header: PacketHeader) => {
    const bytes = new Uint8Array(14).fill(0xee)
    header.store(new DataView(bytes.buffer), 1)
    expect([bytes[0], ...bytes.subarray(11)]).toEqual([0xee, 0xee, 0xee, 0xee])
    return [...bytes.subarray(1, 11)]
  }

  test('every field where the specification has it', () => {
    const header = new PacketHeader(ALL)
    header.load(0x1234_8101, 0x4567_89ab, 0xeeee_cdef)
    const { flags, gsoType, ecn, hdrLen, gsoSize, csumStart, csumOffset } = header
    expect({ flags, gsoType, ecn, hdrLen, gsoSize, csumStart, csumOffset }).toEqual({
      flags: 1,
      gsoType: 1,
      ecn: 1,
      hdrLen: 0x1234,
      gsoSize: 0x89ab,
      csumStart: 0x4567,
      csumOffset: 0xcdef,
    })
    expect(stored(header)).toEqual([1, 0x81, 0x34, 0x12, 0xab, 0x89, 0x67, 0x45, 0xef, 0xcd])
  })

  test('what is not to be used does not get any further', () => {
    const header = new PacketHeader(ALL)
    header.load(0xffff_00fe, -1, -1)
    expect(stored(header)).toEqual(Array(10).fill(0))
    header.load(0xffff_00ff, -1, -1)
    expect(stored(header)).toEqual([1, 0, 0, 0, 0, 0, 255, 255, 255, 255])
  })

  test('nothing of the packet before is left', () => {
    const header = load(new PacketHeader(ALL), { ...TSO, type: 0x81, hdrLen: 66 })
    expect(stored(load(header, {}))).toEqual(Array(10).fill(0))
  })
})

describe('GsoFrame', () => {
  type Change = (frame: ReturnType<typeof build>) => void
  function parse(options: FrameOptions, change: Change = () => {}, length?: number, gso = new GsoFrame()) {
    const frame = build({ gsoSize: 500, ...options })
    change(frame)
    const words = new DataView(frame.header.buffer)
    const header = new PacketHeader(ALL)
    header.load(words.getUint32(0, true), words.getUint32(4, true), words.getUint32(8, true))
    // Only the first 256 bytes are there, and something else around them.
    const copy = new Uint8Array(300).fill(0x60)
    copy.set(frame.bytes.subarray(0, 256), 7)
    const result = gso.parse(new DataView(copy.buffer), 7, length ?? frame.bytes.length, header)
    return { result, gso, header, frame }
  }
  const tcp4 = { ...TCPV4, payload: 3000 }
  const tcp6 = { ...TCPV6, payload: 3000 }
  const udp4 = { ...USO4, payload: 3000 }
  const ufo6 = { ...UFO6, payload: 3000 }

  test.each([
    ['TCP over IPv4', tcp4],
    ['with options of IP and TCP', { ...tcp4, ipOptions: 40, tcpOptions: 40 }],
    ['in a VLAN', { ...tcp4, vlan: [0x8100] }],
    ['in two, with all options: 142 bytes', { ...tcp4, vlan: [0x88a8, 0x8100], ipOptions: 40, tcpOptions: 40 }],
    ['TCP over IPv6', tcp6],
    ['with hop-by-hop options, options, routing and options', { ...tcp6, extensions: [0, 60, 43, 60] }],
    ['UDP datagrams over IPv4', udp4],
    ['UDP datagrams over IPv6', { ...USO6, payload: 3000 }],
    ['UDP fragments over IPv4', { ...UFO4, payload: 3000 }],
    ['UDP fragments over IPv6', ufo6],
    ['UDP fragments over IPv6 with options and routing', { ...ufo6, extensions: [0, 60, 43] }],
  ])('%s', (_, options: FrameOptions) => {
    const { result, gso, header, frame } = parse(options)
    expect(result).toBe(frame.headerLength)
    const { l3, l4, ipv6, udp, headerLength } = gso
    expect({ l3, l4, ipv6, udp, headerLength }).toEqual({
      l3: frame.l3,
      l4: frame.l4,
      ipv6: options.ipv6 ?? false,
      udp: options.udp ?? false,
      headerLength: frame.headerLength,
    })
    expect(frame.bytes[gso.protocolAt]).toBe(options.udp ? 17 : 6)
    expect(header.hdrLen).toBe(frame.headerLength)
  })

  const set =
    (at: (frame: ReturnType<typeof build>) => number, ...values: number[]): Change =>
    (frame) =>
      frame.bytes.set(values, at(frame))
  /** Of the virtio-net header. */
  const field =
    (at: number, value: number): Change =>
    ({ header }) =>
      header.set([value], at)
  const l3 = (add: number) => (frame: { l3: number }) => frame.l3 + add
  const l4 = (add: number) => (frame: { l4: number }) => frame.l4 + add

  test.each([
    ['another EtherType', tcp4, set(() => 12, 0x88, 0xb5)],
    ['IPv6 in an IPv4 frame', tcp4, set(() => 12, 0x86, 0xdd)],
    ['IPv4 in an IPv6 frame', tcp6, set(() => 12, 0x08, 0x00)],
    ['three VLAN tags', { ...tcp4, vlan: [0x8100, 0x8100, 0x8100] }, () => {}],
    ['IP version 5', tcp4, set(l3(0), 0x55)],
    ['an IPv4 header of four words', tcp4, set(l3(0), 0x44)],
    [
      'an IPv4 header of four words with TCP behind them',
      tcp4,
      (frame) => {
        frame.bytes[14] = 0x44
        frame.bytes[30 + 12] = 0x50
        frame.header[6] = 30
      },
    ],
    ['a longer IPv4 header than csum_start says', tcp4, set(l3(0), 0x46)],
    ['a fragment with more to come', tcp4, set(l3(6), 0x20, 0)],
    ['a fragment with an offset', tcp4, set(l3(6), 0, 1)],
    ['UDP where TCP is said', tcp4, set(l3(9), 17)],
    ['TCP where UDP is said', udp4, set(l3(9), 6)],
    ['ICMP', tcp4, set(l3(9), 1)],
    ['ICMPv6', tcp6, set(l3(6), 58)],
    ['an IPv6 fragment', { ...tcp6, extensions: [44] }, () => {}],
    ['an unknown extension header', { ...tcp6, extensions: [135] }, () => {}],
    ['five extension headers', { ...tcp6, extensions: [60, 60, 60, 60, 60] }, () => {}],
    ['an extension header out of the frame', { ...tcp6, extensions: [60] }, set(l3(41), 255)],
    ['fragments of options behind a routing header', { ...ufo6, extensions: [43, 60] }, () => {}],
    ['TSO4 over IPv6', tcp6, field(1, 1)],
    ['TSO6 over IPv4', tcp4, field(1, 4)],
    ['USO of TCP', tcp4, field(1, 5)],
    ['UFO of TCP', tcp4, field(1, 3)],
    ['TSO of UDP', udp4, field(1, 1)],
    ['a TCP header of four words', tcp4, set(l4(12), 0x40)],
    ['csum_start before the transport header', tcp4, field(6, 33)],
    ['csum_start behind it', tcp4, field(6, 35)],
    ['csum_offset of UDP in TCP', tcp4, field(8, 6)],
    ['csum_offset of TCP in UDP', udp4, field(8, 16)],
  ] as [string, FrameOptions, Change][])('refuses %s', (_, options, change) => {
    // It is what is changed that is refused.
    if (change.length > 0 || options.extensions === undefined) {
      const { extensions, vlan, ...plain } = options
      expect(parse(vlan?.length === 3 ? plain : options).result).toBeGreaterThan(0)
    }
    expect(parse(options, change).result).toBe(-1)
  })

  test.each([tcp4, tcp6, udp4, { ...tcp4, vlan: [0x8100, 0x8100] }, { ...tcp6, extensions: [0, 60] }, ufo6])(
    'a frame that ends before its headers do: %o',
    (options: FrameOptions) => {
      const { headerLength } = build(options)
      const { bytes, header: raw } = build({ gsoSize: 500, ...options })
      const words = new DataView(raw.buffer)
      const header = new PacketHeader(ALL)
      for (let length = 14; length < headerLength; length++) {
        header.load(words.getUint32(0, true), words.getUint32(4, true), words.getUint32(8, true))
        // A DataView of no more than the frame: a byte behind it throws.
        expect(new GsoFrame().parse(new DataView(bytes.buffer, 0, length), 0, length, header)).toBe(-1)
        expect(parse(options, undefined, length).result).toBe(-1)
      }
      expect(parse(options, undefined, headerLength).result).toBe(headerLength)
    }
  )

  test('headers beyond what is looked at', () => {
    // An extension header of 8 + 20 * 8 bytes: TCP would start at 222 and end behind 256.
    const long: Change = ({ bytes, header, l3 }) => {
      bytes[l3 + 41] = 20
      bytes[l3 + 40 + 168 + 12] = 0xf0
      header[6] = l3 + 40 + 168
    }
    expect(parse({ ...tcp6, extensions: [60] }, long).result).toBe(-1)
    const short: Change = (frame) => {
      long(frame)
      frame.bytes[frame.l3 + 40 + 168 + 12] = 0x50
    }
    expect(parse({ ...tcp6, extensions: [60] }, short).result).toBe(14 + 40 + 168 + 20)
  })

  test('what the frame before left does not count', () => {
    const gso = new GsoFrame()
    expect(parse({ ...ufo6, vlan: [0x8100] }, undefined, undefined, gso).result).toBe(66)
    expect(parse(tcp4, undefined, undefined, gso).result).toBe(66)
    expect([gso.ipv6, gso.udp, gso.l3, gso.l4, gso.protocolAt]).toEqual([false, false, 14, 34, 23])
  })

  test('a header that may be passed on: what the driver said of lengths is put right', () => {
    const lie: Change = ({ header }) => header.set([1, 0], 2)
    expect(parse(tcp4, lie).header.hdrLen).toBe(66)
    expect(parse({ ...UFO4, payload: 3000, gsoSize: 1003 }).header.gsoSize).toBe(1000)
    const small = parse({ ...TCPV4, payload: 500, gsoSize: 500, ecn: true }).header
    expect([small.flags, small.gsoType, small.ecn, small.gsoSize, small.hdrLen]).toEqual([1, 0, 0, 0, 0])
    expect(parse({ ...TCPV4, payload: 501, gsoSize: 500, ecn: true }).header.ecn).toBe(1)
  })

  test('random bytes never lead out of the frame', () => {
    let state = 7
    const random = () => {
      state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0
      return state >>> 24
    }
    const gso = new GsoFrame()
    const header = new PacketHeader(ALL)
    let parsed = 0
    for (let i = 0; i < 50_000; i++) {
      const { bytes, headerLength, l4 } = build({ ...(i % 2 ? tcp4 : tcp6), payload: 0, ipOptions: i % 2 ? 8 : 0 })
      for (let n = random() % 4; n > 0; n--) bytes[12 + (random() % (headerLength - 12))] = random()
      const length = random() < 128 ? headerLength : 14 + (random() % (headerLength - 14))
      load(header, { flags: 1, type: i % 2 ? 1 : 4, gsoSize: 100, start: l4, offset: 16 })
      // A DataView of exactly the frame: a byte behind it throws.
      const result = gso.parse(new DataView(bytes.buffer, 0, length), 0, length, header)
      if (result !== -1) parsed++
      expect(result).toBeLessThanOrEqual(length)
    }
    expect(parsed).toBeGreaterThan(5000)
  })
})

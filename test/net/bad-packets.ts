/** Packets that no device may pass on, each with the reason by which it is counted. */
import { withDependents } from '../../src/frontend/net-features.ts'
import { encodeNetHeader } from '../../src/frontend/net-frames.ts'
import * as net from '../../src/virtio/net.ts'
import { type BuiltFrame, build, type FrameOptions, TCPV4, TCPV6, UFO4, UFO6, USO4 } from './frames.ts'
import { frame } from './support.ts'

const { VIRTIO_NET_HDR_F_NEEDS_CSUM: NEEDS_CSUM } = net

/** A packet, why it is dropped, and which features have to be left out for that. */
export interface Bad {
  readonly why: string
  readonly header?: Uint8Array
  readonly bytes: Uint8Array
  readonly without?: readonly number[]
}

/** A plain frame of some size behind a header that says something. */
function plainFrame(why: string, size: number, header: Parameters<typeof encodeNetHeader>[0], without?: number): Bad {
  return {
    why,
    bytes: frame({ from: 1, to: 2, size: Math.max(size, 18) }).slice(0, size),
    header: encodeNetHeader(header),
    ...(without !== undefined && { without: withDependents(without) }),
  }
}

/** A frame that is to be segmented, and what is wrong with it. */
function segmented(why: string, options: FrameOptions, spoil: (built: BuiltFrame) => void, without?: number): Bad {
  const built = build(options)
  spoil(built)
  return { why, ...built, ...(without !== undefined && { without: withDependents(without) }) }
}

/** Writes a field of the header. */
export const set =
  (field: number, value: number) =>
  ({ header }: BuiltFrame): void =>
    new DataView(header.buffer).setUint16(field, value, true)
export const TSO = { ...TCPV4, gsoSize: 1448, payload: 5000 }
export const TSO6 = { ...TCPV6, gsoSize: 1448, payload: 5000 }
const GSO_SIZE = net.VIRTIO_NET_HDR_GSO_SIZE
const CSUM_START = net.VIRTIO_NET_HDR_CSUM_START
const CSUM_OFFSET = net.VIRTIO_NET_HDR_CSUM_OFFSET
const type =
  (value: number) =>
  ({ header }: BuiltFrame): void =>
    void header.fill(value, 1, 2)

export const BAD: Readonly<Record<string, Bad>> = {
  'a header and no frame': plainFrame('runt', 0, {}),
  'a byte less than an Ethernet header': plainFrame('runt', 13, {}),
  'half a header': { why: 'runt', header: new Uint8Array(6), bytes: new Uint8Array(0) },
  'a byte less than a header': { why: 'runt', header: new Uint8Array(11), bytes: new Uint8Array(0) },
  'a byte more than the largest': plainFrame('oversized', 65558, {}),
  'a quarter of a MiB': plainFrame('oversized', 262144, {}),
  'GSO and a quarter of a MiB': plainFrame('oversized', 262144, {
    flags: 1,
    gsoType: 1,
    gsoSize: 1448,
    csumStart: 34,
    csumOffset: 16,
  }),

  'a checksum, and no CSUM': plainFrame(
    'header',
    100,
    { flags: 1, csumStart: 14, csumOffset: 0 },
    net.VIRTIO_NET_F_CSUM
  ),
  'the ECN bit alone': plainFrame('header', 100, { ecn: true }),
  'the ECN bit, a checksum and no type': plainFrame('header', 100, { ecn: true, flags: 1, csumStart: 14 }),
  ...Object.fromEntries(
    [2, 6, 7, 8, 33, 36, 64, 127].map((value) => [`gso_type ${value}`, segmented('header', TSO, type(value))])
  ),
  'gso_size 0': segmented('header', TSO, set(GSO_SIZE, 0)),
  'gso_size 0xffff': segmented('header', TSO, set(GSO_SIZE, 0xffff)),
  'GSO without a checksum': segmented('header', TSO, ({ header }) => void header.fill(0, 0, 0 + 1)),
  'GSO with DATA_VALID instead': segmented('header', TSO, ({ header }) => void header.fill(2, 0, 0 + 1)),
  'TSO4, not negotiated': segmented('header', TSO, () => {}, net.VIRTIO_NET_F_HOST_TSO4),
  'TSO6, not negotiated': segmented('header', TSO6, () => {}, net.VIRTIO_NET_F_HOST_TSO6),
  'UFO, not negotiated': segmented(
    'header',
    { ...UFO4, gsoSize: 1480, payload: 5000 },
    () => {},
    net.VIRTIO_NET_F_HOST_UFO
  ),
  'USO, not negotiated': segmented(
    'header',
    { ...USO4, gsoSize: 1000, payload: 5000 },
    () => {},
    net.VIRTIO_NET_F_HOST_USO
  ),
  'ECN, not negotiated': segmented('header', { ...TSO, ecn: true }, () => {}, net.VIRTIO_NET_F_HOST_ECN),
  'ECN of UDP': segmented('header', { ...USO4, gsoSize: 1000, payload: 5000, ecn: true }, () => {}),

  'csum_start behind the end': plainFrame('checksum', 100, { flags: NEEDS_CSUM, csumStart: 101, csumOffset: 0 }),
  'csum_start at the end': plainFrame('checksum', 100, { flags: NEEDS_CSUM, csumStart: 100, csumOffset: 0 }),
  'csum_start 0xffff': plainFrame('checksum', 100, { flags: NEEDS_CSUM, csumStart: 0xffff, csumOffset: 0 }),
  'csum_offset 0xffff': plainFrame('checksum', 100, { flags: NEEDS_CSUM, csumStart: 34, csumOffset: 0xffff }),
  'both 0xffff': plainFrame('checksum', 60000, { flags: NEEDS_CSUM, csumStart: 0xffff, csumOffset: 0xffff }),
  'a checksum half in the frame': plainFrame('checksum', 100, { flags: NEEDS_CSUM, csumStart: 34, csumOffset: 65 }),
  'a checksum in the addresses': plainFrame('checksum', 100, { flags: NEEDS_CSUM, csumStart: 0, csumOffset: 0 }),
  'a checksum in the type': plainFrame('checksum', 100, { flags: NEEDS_CSUM, csumStart: 13, csumOffset: 16 }),

  'TSO4 of ARP': segmented('segmentation', TSO, ({ bytes }) => bytes.set([0x08, 0x06], 12)),
  'TSO4 of IPv6': segmented('segmentation', TSO6, type(net.VIRTIO_NET_HDR_GSO_TCPV4)),
  'TSO6 of IPv4': segmented('segmentation', TSO, type(net.VIRTIO_NET_HDR_GSO_TCPV6)),
  'TSO of UDP': segmented(
    'segmentation',
    { ...USO4, gsoSize: 1448, payload: 5000 },
    type(net.VIRTIO_NET_HDR_GSO_TCPV4)
  ),
  'USO of TCP': segmented('segmentation', TSO, type(net.VIRTIO_NET_HDR_GSO_UDP_L4)),
  'UFO of TCP': segmented('segmentation', TSO, type(net.VIRTIO_NET_HDR_GSO_UDP)),
  'TSO of a fragment': segmented('segmentation', { ...TSO, fragment: 0x2000 }, () => {}),
  'TSO of a later fragment': segmented('segmentation', { ...TSO, fragment: 5 }, () => {}),
  'IP of version 5': segmented('segmentation', TSO, ({ bytes, l3 }) => void bytes.fill(0x55, l3, l3 + 1)),
  'an IP header of 16 bytes': segmented('segmentation', TSO, ({ bytes, l3 }) => void bytes.fill(0x44, l3, l3 + 1)),
  'another IP header length': segmented('segmentation', TSO, ({ bytes, l3 }) => void bytes.fill(0x4f, l3, l3 + 1)),
  'a TCP header of 16 bytes': segmented(
    'segmentation',
    TSO,
    ({ bytes, l4 }) => void bytes.fill(0x40, l4 + 12, l4 + 12 + 1)
  ),
  'a TCP header that is cut': segmented(
    'segmentation',
    { ...TCPV4, gsoSize: 8, payload: 0, tcpOptions: 0 },
    (built) => {
      built.bytes[built.l4 + 12] = 0xf0
    }
  ),
  'TSO6 behind a header that nobody knows': segmented(
    'segmentation',
    TSO6,
    ({ bytes, l3 }) => void bytes.fill(50, l3 + 6, l3 + 6 + 1)
  ),
  'TSO6 behind a fragment header': segmented('segmentation', { ...TSO6, extensions: [44] }, () => {}),
  'TSO6 behind too many headers': segmented('segmentation', { ...TSO6, extensions: [0, 60, 60, 60, 60] }, () => {}),
  'a checksum elsewhere': segmented('segmentation', TSO, set(CSUM_START, 38)),
  'a checksum of another protocol': segmented('segmentation', TSO, set(CSUM_OFFSET, 6)),
  'three VLAN tags': segmented('segmentation', { ...TSO, vlan: [0x88a8, 0x8100, 0x8100] }, () => {}),
  'segments of one byte': segmented('segmentation', TSO, set(GSO_SIZE, 1)),
  'fragments of seven bytes': segmented('segmentation', { ...UFO4, gsoSize: 7, payload: 1000 }, () => {}),
}

/** UFO over IPv6 with a hop-by-hop header of 184 bytes: all headers together have 246. */
export function longHeaders(payload: number, gsoSize: number): BuiltFrame {
  const short = build({ ...UFO6, gsoSize, payload, extensions: [0] })
  const more = 176
  const bytes = new Uint8Array(short.bytes.length + more)
  bytes.set(short.bytes.subarray(0, 62))
  // PadN to the end.
  bytes[55] = 22
  bytes[57] = 180
  bytes.set(short.bytes.subarray(62), 62 + more)
  const view = new DataView(bytes.buffer)
  view.setUint16(18, bytes.length - 54)
  const header = short.header.slice()
  new DataView(header.buffer).setUint16(CSUM_START, short.l4 + more, true)
  return { ...short, bytes, header, l4: short.l4 + more, headerLength: short.headerLength + more }
}

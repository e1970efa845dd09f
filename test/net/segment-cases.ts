/** The frames that test/net/segment.test.ts has segmented, by us and by the kernel. */
import { GsoFrame } from '../../devices/net/frame.ts'
import { PacketHeader } from '../../devices/net/header.ts'
import { type BuiltFrame, build, type FrameOptions, TCPV4, TCPV6, UFO4, UFO6, USO4, USO6 } from './frames.ts'

const FIN_PSH_ACK_CWR_ECE = 0xd9

export const cases: readonly (FrameOptions & { readonly name: string })[] = [
  { name: 'TSO4', ...TCPV4, gsoSize: 1448, payload: 64_000 },
  { name: 'TSO4 of a whole number of segments', ...TCPV4, gsoSize: 1000, payload: 8000 },
  { name: 'TSO4 with an odd MSS', ...TCPV4, gsoSize: 537, payload: 5001 },
  { name: 'TSO4 of the largest frame', ...TCPV4, gsoSize: 1448, payload: 65_535 - 52 },
  {
    name: 'TSO4 with FIN, PSH, ECE and CWR',
    ...TCPV4,
    gsoSize: 700,
    payload: 3000,
    tcpFlags: FIN_PSH_ACK_CWR_ECE,
    ecn: true,
  },
  {
    name: 'TSO4 whose numbers wrap',
    ...TCPV4,
    gsoSize: 700,
    payload: 3000,
    sequence: 0xffff_ff00,
    identification: 0xfffe,
  },
  { name: 'TSO4 with IP options', ...TCPV4, gsoSize: 700, payload: 3000, ipOptions: 40, tcpOptions: 40 },
  { name: 'TSO4 without TCP options', ...TCPV4, gsoSize: 700, payload: 3000, tcpOptions: 0 },
  { name: 'TSO4 without Don’t Fragment', ...TCPV4, gsoSize: 700, payload: 3000, fragment: 0 },
  { name: 'TSO4 of one byte more than a segment', ...TCPV4, gsoSize: 1448, payload: 1449 },
  { name: 'TSO4 of exactly a segment', ...TCPV4, gsoSize: 1448, payload: 1448 },
  { name: 'TSO4 of less than a segment', ...TCPV4, gsoSize: 1448, payload: 9 },
  { name: 'TSO4 without payload', ...TCPV4, gsoSize: 1448, payload: 0 },
  { name: 'TSO4 in a VLAN', ...TCPV4, gsoSize: 1448, payload: 5000, vlan: [0x8100] },
  { name: 'TSO4 in two VLANs', ...TCPV4, gsoSize: 1448, payload: 5000, vlan: [0x88a8, 0x8100] },
  { name: 'TSO6', ...TCPV6, gsoSize: 1428, payload: 64_000 },
  {
    name: 'TSO6 with FIN, PSH, ECE and CWR',
    ...TCPV6,
    gsoSize: 700,
    payload: 3001,
    tcpFlags: FIN_PSH_ACK_CWR_ECE,
    ecn: true,
  },
  { name: 'TSO6 in a VLAN', ...TCPV6, gsoSize: 1428, payload: 5000, vlan: [0x8100] },
  { name: 'TSO6 with destination options', ...TCPV6, gsoSize: 1428, payload: 5000, extensions: [60] },
  { name: 'TSO6 with options and a routing header', ...TCPV6, gsoSize: 1428, payload: 5000, extensions: [60, 43] },
  { name: 'USO4', ...USO4, gsoSize: 1472, payload: 30_000 },
  { name: 'USO4 with an odd size', ...USO4, gsoSize: 333, payload: 2000 },
  { name: 'USO4 of less than a segment', ...USO4, gsoSize: 333, payload: 20 },
  { name: 'USO6', ...USO6, gsoSize: 1452, payload: 30_000 },
  { name: 'UFO4', ...UFO4, gsoSize: 1480, payload: 20_000, fragment: 0 },
  { name: 'UFO4 with Don’t Fragment', ...UFO4, gsoSize: 1480, payload: 20_000 },
  { name: 'UFO4 of a whole number of fragments', ...UFO4, gsoSize: 1000, payload: 4992, fragment: 0 },
  { name: 'UFO4 of less than a fragment', ...UFO4, gsoSize: 1480, payload: 100, fragment: 0 },
  {
    name: 'UFO4 in a VLAN, with IP options',
    ...UFO4,
    gsoSize: 1480,
    payload: 9000,
    vlan: [0x8100],
    ipOptions: 8,
    fragment: 0,
  },
  { name: 'UFO6', ...UFO6, gsoSize: 1448, payload: 20_000 },
  { name: 'UFO6 in a VLAN', ...UFO6, gsoSize: 1448, payload: 20_000, vlan: [0x8100] },
  { name: 'UFO6 with hop-by-hop options', ...UFO6, gsoSize: 1448, payload: 20_000, extensions: [0] },
  // Nothing to segment, only to complete.
  { name: 'TCP over IPv4', gsoType: 0, payload: 1000 },
  { name: 'TCP over IPv6', gsoType: 0, payload: 1001, ipv6: true },
  { name: 'UDP over IPv4', gsoType: 0, payload: 77, udp: true },
  { name: 'UDP over IPv6', gsoType: 0, payload: 78, udp: true, ipv6: true },
]

/** A frame as virtiod passes it on: looked at, with the header that is left. */
export interface PassedFrame extends BuiltFrame {
  readonly name: string
  /** The headers were mutated, so a checksum in them may mean nothing. */
  readonly mutated: boolean
}

const EVERYTHING = 2n ** 64n - 1n

/** The same frame as it may go on to a kernel, or undefined when it may not. */
export function pass(name: string, frame: BuiltFrame, mutated = false): PassedFrame | undefined {
  const header = new PacketHeader(EVERYTHING)
  const words = new DataView(frame.header.slice().buffer)
  header.load(words.getUint32(0, true), words.getUint32(4, true), words.getUint32(8, true))
  if (header.check(frame.bytes.length) !== 0) return undefined
  const view = new DataView(frame.bytes.buffer)
  if (header.gsoType !== 0 && new GsoFrame().parse(view, 0, frame.bytes.length, header) < 0) return undefined
  header.store(words, 0)
  return { ...frame, name, header: new Uint8Array(words.buffer), mutated }
}

/** All cases; each is one that may go on. */
export function caseFrames(): PassedFrame[] {
  return cases.map((options) => {
    const frame = pass(options.name, build(options))
    if (frame === undefined) throw new Error(`${options.name} was refused`)
    return frame
  })
}

/** Frames with some bytes of their headers changed: those that still may go on. The same ones each time. */
export function mutatedFrames(): PassedFrame[] {
  let state = 1
  const random = (below: number): number => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0
    return Math.floor((state / 2 ** 32) * below)
  }
  const likely = [0, 1, 4, 6, 17, 43, 44, 60, 0x45, 0x60, 0xff]
  const frames: PassedFrame[] = []
  while (frames.length < 1000) {
    const options = cases[random(cases.length)]!
    const gsoSize = options.gsoType === 0 ? 0 : 40 + random(1400)
    const frame = build({ ...options, payload: random(random(2) === 0 ? 60 : 6000), gsoSize, tcpFlags: random(256) })
    for (let i = random(4); i > 0; i--) {
      const value = random(3) === 0 ? likely[random(likely.length)]! : random(256)
      // The addresses stay, by which the bridge knows where to.
      frame.bytes[12 + random(frame.headerLength - 12)] = value
    }
    if (random(2) === 0) frame.header[random(10)] = random(2) === 0 ? random(8) : random(256)
    const passed = pass(options.name, frame, true)
    if (passed === undefined) continue
    const size = new DataView(passed.header.buffer).getUint16(4, true)
    // Not more segments than a tap's queue holds.
    if (size === 0 || size >= 16) frames.push(passed)
  }
  return frames
}

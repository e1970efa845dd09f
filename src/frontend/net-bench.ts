/**
 * `virtiod bench` on network devices: packets into a vhost-user-net socket, out of it, both, or in at one and out at
 * another, and what came of it. It owns the options, the frames and the result; the loop is in `net-run.ts`. It must not
 * know the command line.
 */
import { VIRTIO_F_EVENT_IDX, VIRTIO_F_RING_PACKED, VIRTQ_MAX_SIZE } from '../virtio/constants.ts'
import { VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_MRG_RXBUF } from '../virtio/net.ts'
import { frameShape, LinkSource, linkReceived, linkSourceLimit, wholePackets } from './net-bench-link.ts'
import { withDependents } from './net-features.ts'
import {
  announcement,
  MAX_TCP_FRAME,
  parseMac,
  TCP_GSO_SIZE,
  TCP_HEADER_LENGTH,
  tcpFrame,
  tcpGsoHeader,
  udpFrame,
} from './net-frames.ts'
import { Port, type Traffic } from './net-port.ts'
import { NetRun } from './net-run.ts'
import { describePeer } from './peer.ts'
import type { WaitMode } from './virtqueue.ts'

/** What happens on one socket: `tx` sends, `rx` counts what comes, `echo` sends and counts what comes back. */
export type NetTraffic = 'tx' | 'rx' | 'echo'

export interface NetBenchOptions {
  /** With one socket; default `tx`. */
  readonly traffic?: NetTraffic
  /** With two sockets: send both ways, not only from the first to the second. */
  readonly both?: boolean
  /**
   * Bytes of a frame, 64 … 65549 (without frame check sequence), default 64. Up to 1518 they are IPv4/UDP; above, TCP that
   * wants to be segmented into `gsoSize` bytes each (HOST_TSO4).
   */
  readonly frameSize?: number
  /** Bytes of payload per segment of frames above 1518 bytes, default 1448; TCP's headers are another 66. */
  readonly gsoSize?: number
  /**
   * With one socket: the tap behind it, in the network namespace of this process. With `tx` what comes out of it counts as
   * received; with `rx` packets are put into it. Needs CAP_NET_RAW for `rx`. A packet counts as one also when somebody on
   * the way has segmented it.
   */
  readonly link?: string
  /** Different source ports; default 1. */
  readonly flows?: number
  /** MAC addresses of the first side and of the other one. */
  readonly macs?: readonly [string, string]
  /** Queue pairs, all driven from this one thread; default 1. */
  readonly queues?: number
  /** Entries per ring; default 256. */
  readonly queueSize?: number
  /** `poll` (default) watches the used rings; `irq` sleeps until it is called, as a guest does. */
  readonly driver?: WaitMode
  /** Seconds of measurement; default 5. */
  readonly seconds?: number
  /** Seconds before it that don't count; default 0.5. */
  readonly warmup?: number
  /** Don't acknowledge EVENT_IDX. */
  readonly noEventIdx?: boolean
  /** Packed rings, in-flight tracking: a FrontendError when the back-end does not offer it; default false. */
  readonly packed?: boolean
  readonly inflight?: boolean
  /** Don't acknowledge MRG_RXBUF: each packet has to fit in one receive buffer. */
  readonly noMergeable?: boolean
  /** The packet header in a descriptor of its own; default false. */
  readonly splitHeader?: boolean
  /** Called once a second while measuring. */
  readonly progress?: (line: string) => void
  readonly timeoutMs?: number
}

/** What a bench measured. A packet is what one packet header stands before, however many segments it becomes. */
export interface NetBenchResult {
  readonly device: 'net'
  readonly sockets: readonly string[]
  readonly backend: string
  /** `forward` and `both` are with two sockets. */
  readonly traffic: NetTraffic | 'forward' | 'both'
  readonly frameSize: number
  /** TCP with segmentation offload instead of UDP. */
  readonly gso: boolean
  readonly flows: number
  readonly queues: number
  readonly queueSize: number
  readonly driver: WaitMode
  readonly eventIdx: boolean
  readonly mergeable: boolean
  readonly packed: boolean
  readonly inflight: boolean
  readonly seconds: number
  /** Packets that the back-end took and that came out, in the measured time; undefined when that is not looked at. */
  readonly sent?: number
  readonly received?: number
  /** What counts: received, or sent when nothing is expected back. */
  readonly packetsPerSecond: number
  /** Of frames, without packet headers, preamble and check sequence. */
  readonly gbitPerSecond: number
  /** Fraction of what was sent in the whole run that didn't arrive; undefined unless it was to arrive here. */
  readonly lost?: number
  readonly kicksPerPacket: number
  readonly callsPerPacket: number
  /** CPU time of the back-end's process(es) per packet, microseconds; undefined when /proc doesn't show it. */
  readonly cpuPerPacket?: number
}

export const MIN_FRAME = 64
/** Frames up to here are sent as they are: 1500 bytes of IP, Ethernet, a VLAN tag. */
export const MAX_PLAIN_FRAME = 1518
export const MAX_FRAME = MAX_TCP_FRAME
/** Locally administered, of the first side and of the other one. */
export const MACS: readonly [string, string] = ['02:00:5e:12:00:01', '02:00:5e:12:00:02']

/**
 * Runs the load. It blocks this thread until the end.
 * @param sockets one, or two between which a back-end forwards
 * @throws FrontendError when a back-end can't be reached, breaks a rule of virtio, or stops taking packets
 * @throws RangeError `frame-size: …` and the like for options that don't fit the back-end
 */
export function netBench(
  sockets: readonly [string] | readonly [string, string],
  options: NetBenchOptions = {}
): NetBenchResult {
  const frameSize = options.frameSize ?? MIN_FRAME
  const queues = options.queues ?? 1
  const queueSize = options.queueSize ?? 256
  const driver = options.driver ?? 'poll'
  const flows = options.flows ?? 1
  const [first, second] = sockets
  const traffic = second === undefined ? (options.traffic ?? 'tx') : options.both === true ? 'both' : 'forward'
  check(
    frameSize >= MIN_FRAME && frameSize <= MAX_FRAME,
    `frame-size: ${frameSize} is not in ${MIN_FRAME} … ${MAX_FRAME}`
  )
  check(
    // Packed rings need no power of two, and nobody needs another one here.
    queueSize >= 4 && queueSize <= VIRTQ_MAX_SIZE && (queueSize & (queueSize - 1)) === 0,
    `queue-size: ${queueSize} is not a power of two from 4 to ${VIRTQ_MAX_SIZE}`
  )
  const gsoSize = options.gsoSize ?? TCP_GSO_SIZE
  check(gsoSize >= 1 && gsoSize <= 65_535 - TCP_HEADER_LENGTH, `gsoSize: ${gsoSize} is not in 1 … 65469`)
  const { link } = options
  check(
    link === undefined || (second === undefined && traffic !== 'echo'),
    'link: there is one behind a single socket, with tx or rx'
  )
  check(flows >= 1, `flows: ${flows} is not at least 1`)
  const [ours, theirs] = options.macs ?? MACS
  const macs = [macOf('mac', ours), macOf('peer-mac', theirs)] as const
  const portOptions = {
    pairs: queues,
    queueSize,
    mode: driver,
    frameSize,
    packed: options.packed === true,
    inflight: options.inflight === true,
    withoutFeatures: withDependents(
      ...(options.noEventIdx === true ? [VIRTIO_F_EVENT_IDX] : []),
      ...(options.noMergeable === true ? [VIRTIO_NET_F_MRG_RXBUF] : [])
    ),
    ...(options.timeoutMs !== undefined && { timeoutMs: options.timeoutMs }),
  }
  using a = new Port(first, portOptions)
  const callFd = a.queues[0]?.callFd
  using b =
    second === undefined ? undefined : new Port(second, { ...portOptions, ...(callFd !== undefined && { callFd }) })
  const send = (port: Port, from: 0 | 1): void => {
    if (frameSize > MAX_PLAIN_FRAME && !port.session.has(VIRTIO_NET_F_HOST_TSO4)) {
      throw new RangeError(
        `frame-size: frames above ${MAX_PLAIN_FRAME} bytes need HOST_TSO4, which the back-end does not offer`
      )
    }
    port.load(makeTraffic(frameSize, gsoSize, flows, macs, from, options.splitHeader === true))
  }
  const senders: Port[] = []
  const receivers: Port[] = []
  const announce: (readonly [Port, Uint8Array])[] = []
  if (traffic !== 'rx') {
    send(a, 0)
    senders.push(a)
  }
  if (b === undefined) {
    if (traffic !== 'tx') receivers.push(a)
  } else {
    receivers.push(b)
    announce.push([b, macs[1]])
    if (traffic === 'both') {
      send(b, 1)
      senders.push(b)
      receivers.push(a)
      announce.push([a, macs[0]])
    } else b.load({ header: {}, frames: [announcement(macs[1], 2)], depth: 1 })
  }
  const pids = [...new Set([a, b].map((port) => port?.session.connection.peerPid).filter((pid) => pid !== undefined))]
  const shape = frameShape(frameSize, frameSize > MAX_PLAIN_FRAME)
  using outside =
    link === undefined || traffic !== 'rx'
      ? undefined
      : new LinkSource(link, {
          traffic: makeTraffic(frameSize, gsoSize, flows, macs, 1, false),
          shape,
          sinks: a.sinks,
        })
  const sending = senders.length > 0 || outside !== undefined
  const counted = receivers.length > 0 || link !== undefined
  const run = new NetRun({
    ports: b === undefined ? [a] : [a, b],
    senders,
    receivers,
    announce,
    ...(outside !== undefined && { outside }),
    ...(link !== undefined && outside === undefined && { outlet: () => linkReceived(link) }),
    mode: driver,
    pids,
    ...(options.progress !== undefined && { progress: options.progress }),
  })
  const measured = run.measure((options.warmup ?? 0.5) * 1000, (options.seconds ?? 5) * 1000)
  // What a tap segments on the way counts as what was sent.
  const whole = (packets: number, bytes: number): number =>
    link === undefined ? packets : wholePackets(shape, packets, bytes)
  const received = whole(measured.received, measured.receivedBytes)
  const packets = counted ? received : measured.sent
  const bytes = counted && link === undefined ? measured.receivedBytes : packets * frameSize
  const per = Math.max(1, packets)
  return {
    device: 'net',
    sockets,
    backend: pids.map((pid) => describePeer(pid)?.program ?? 'unknown').join(' and ') || 'unknown',
    traffic,
    frameSize,
    gso: frameSize > MAX_PLAIN_FRAME,
    flows,
    queues,
    queueSize,
    driver,
    eventIdx: a.session.has(VIRTIO_F_EVENT_IDX),
    mergeable: (b ?? a).mergeable,
    packed: a.session.has(VIRTIO_F_RING_PACKED),
    inflight: a.session.inflight !== undefined,
    seconds: measured.ms / 1000,
    ...(sending && { sent: measured.sent }),
    ...(counted && { received }),
    packetsPerSecond: (packets * 1000) / measured.ms,
    gbitPerSecond: (bytes * 8) / measured.ms / 1e6,
    ...(sending &&
      counted && {
        lost: Math.max(0, 1 - whole(measured.allReceived, measured.allReceivedBytes) / Math.max(1, measured.allSent)),
      }),
    kicksPerPacket: measured.kicks / per,
    callsPerPacket: measured.calls / per,
    ...(measured.cpuNs !== undefined && { cpuPerPacket: measured.cpuNs / 1000 / per }),
  }
}

/** How many packets per second this thread puts into a tap of its own that nobody reads: what bounds `rx` with a link. */
export function netSourceLimit(options: Pick<NetBenchOptions, 'frameSize' | 'gsoSize' | 'seconds'>): number {
  const frameSize = options.frameSize ?? MIN_FRAME
  const macs = [macOf('mac', MACS[0]), macOf('peer-mac', MACS[1])] as const
  const traffic = makeTraffic(frameSize, options.gsoSize ?? TCP_GSO_SIZE, 1, macs, 1, false)
  return linkSourceLimit(traffic, frameShape(frameSize, frameSize > MAX_PLAIN_FRAME), options.seconds ?? 1)
}

/** The result as a few lines for people. */
export function formatNetBench(result: NetBenchResult): string {
  const plural = (count: number, noun: string): string => `${count} ${noun}${count === 1 ? '' : 's'}`
  const whole = (value: number): string => Math.round(value).toLocaleString('en-US')
  const counts = [
    ...(result.sent === undefined ? [] : [`sent ${whole(result.sent)}`]),
    ...(result.received === undefined ? [] : [`received ${whole(result.received)}`]),
    ...(result.lost === undefined ? [] : [`lost ${(result.lost * 100).toFixed(3)} %`]),
  ]
  return [
    `${TRAFFIC_NAMES[result.traffic]}, ${result.frameSize} bytes ${result.gso ? 'TCP, segmentation offload' : 'UDP'}, ` +
      `${plural(result.flows, 'flow')}, ${plural(result.queues, 'queue pair')} × ${result.queueSize}, ` +
      `${result.driver} driver, ${result.packed ? 'packed, ' : ''}${result.eventIdx ? 'EVENT_IDX' : 'flags'}, ` +
      `${result.mergeable ? 'merged buffers, ' : ''}${result.inflight ? 'in-flight tracking, ' : ''}` +
      `${result.seconds.toFixed(1)} s, back-end ${result.backend}`,
    `  packets/s  ${whole(result.packetsPerSecond)}   ${result.gbitPerSecond.toFixed(2)} Gbit/s`,
    `  packets    ${counts.join('  ')}`,
    // Without a packet there is nothing to divide by.
    (result.received ?? result.sent) === 0
      ? '  nothing came through: are both ends connected, and does something send or send back?'
      : `  per packet  ${result.kicksPerPacket.toFixed(3)} kicks  ${result.callsPerPacket.toFixed(3)} calls` +
        (result.cpuPerPacket === undefined ? '' : `  ${result.cpuPerPacket.toFixed(3)} µs back-end CPU`),
  ].join('\n')
}

const TRAFFIC_NAMES: Readonly<Record<NetBenchResult['traffic'], string>> = {
  tx: 'sending',
  rx: 'receiving',
  echo: 'echo',
  forward: 'first socket to second',
  both: 'both ways between two sockets',
}

/** The packets of side `from`. */
function makeTraffic(
  size: number,
  gsoSize: number,
  flows: number,
  macs: readonly [Uint8Array, Uint8Array],
  from: 0 | 1,
  splitHeader: boolean
): Traffic {
  const gso = size > MAX_PLAIN_FRAME
  const frames = Array.from({ length: flows }, (_, flow) =>
    (gso ? tcpFrame : udpFrame)({
      size,
      source: macs[from],
      destination: macs[1 - from] as Uint8Array,
      sourceHost: 1 + from,
      destinationHost: 2 - from,
      sourcePort: 1024 + flow,
      seed: flow,
    })
  )
  return { header: gso ? tcpGsoHeader(size, gsoSize) : {}, frames, splitHeader }
}

function macOf(option: string, text: string): Uint8Array {
  const bytes = parseMac(text)
  if (bytes === undefined || ((bytes[0] ?? 1) & 1) === 1) {
    throw new RangeError(`${option}: ${text} is no unicast MAC address`)
  }
  return bytes
}

function check(ok: boolean, problem: string): void {
  if (!ok) throw new RangeError(problem)
}

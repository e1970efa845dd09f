/**
 * One end of a packet bench: a session on a vhost-user-net socket, its queue pairs started, a source on each transmit queue
 * and a sink on each receive queue. It owns the session. It must not know time or what the traffic is for.
 *
 * As with QEMU the control queue stays at this end: pairs are switched on by SET_VRING_ENABLE alone (field.md §1c).
 */
import { native } from '../native.ts'
import { VIRTIO_F_EVENT_IDX } from '../virtio/constants.ts'
import { VIRTIO_NET_F_MRG_RXBUF } from '../virtio/net.ts'
import type { RingArea } from './driver.ts'
import type { GuestBuffer } from './memory.ts'
import { layouts } from './memory.ts'
import { maxPairs } from './net.ts'
import { headerSizeOf, receiveBufferSize } from './net-features.ts'
import { encodeNetHeader, type NetHeader } from './net-frames.ts'
import { PacketSink, PacketSource, sinkBytes, sourceBytes } from './net-load.ts'
import { PackedPacketRing } from './net-packed-ring.ts'
import { type LoadRing, PacketRing } from './net-ring.ts'
import { PackedDriver, packedRingBytes } from './packed-driver.ts'
import { Session } from './session.ts'
import { splitRingBytes } from './split-driver.ts'
import type { Virtqueue, WaitMode } from './virtqueue.ts'

export interface PortOptions {
  readonly pairs: number
  /** Entries per ring. */
  readonly queueSize: number
  readonly mode: WaitMode
  /** Bits not to negotiate. */
  readonly withoutFeatures: readonly number[]
  /** Packed rings; in-flight tracking. */
  readonly packed: boolean
  readonly inflight: boolean
  /** Bytes of the largest frame to be received. */
  readonly frameSize: number
  /** The call eventfd of another port's rings, to sleep on both at once. */
  readonly callFd?: number
  readonly timeoutMs?: number
}

/** What a port sends. */
export interface Traffic {
  readonly header: Partial<NetHeader>
  readonly frames: readonly Uint8Array[]
  /** Packets in flight per queue; default as many as the ring holds. */
  readonly depth?: number
  readonly splitHeader?: boolean
}

export class Port implements Disposable {
  readonly session: Session
  readonly headerSize: 12 | 10
  /** Transmit queues, one per pair; made by `load`. */
  readonly sources: PacketSource[] = []
  readonly sinks: PacketSink[] = []
  /** Every ring: receive, transmit, receive, … */
  readonly queues: Virtqueue[] = []
  readonly rings: LoadRing[] = []

  /**
   * Connects, starts all rings and posts the receive buffers.
   * @throws FrontendError when the back-end can't be reached or refuses
   * @throws RangeError `queues: …` when it has fewer pairs
   */
  constructor(socketPath: string, options: PortOptions) {
    const { queueSize, pairs, frameSize } = options
    this.session = Session.open(socketPath, {
      mode: options.mode,
      queues: 0,
      memory: [],
      withoutFeatures: options.withoutFeatures,
      packed: options.packed,
      inflight: options.inflight && { numQueues: 2 * pairs, queueSize },
      ...(options.timeoutMs !== undefined && { timeoutMs: options.timeoutMs }),
    })
    try {
      const { session } = this
      this.headerSize = headerSizeOf(session.features)
      const most = maxPairs(session)
      if (pairs > most) throw new RangeError(`queues: the back-end has ${most} queue pair${most === 1 ? '' : 's'}`)
      const bufferSize = Math.max(receiveBufferSize(session.features), this.mergeable ? 0 : frameSize + this.headerSize)
      const ring = Object.values(options.packed ? packedRingBytes(queueSize) : splitRingBytes(queueSize))
      const perPair =
        2 * ring.reduce((sum, bytes) => sum + bytes, 256) +
        sourceBytes(queueSize, frameSize + this.headerSize) +
        sinkBytes(queueSize, bufferSize)
      // No more than is needed: some back-ends touch every page of it.
      const [layout] = layouts.single(Math.ceil((pairs * perPair + 65536) / 2 ** 21) * 2 ** 21)
      if (layout !== undefined) session.memory.addRegion(layout)
      session.shareMemory()
      for (let i = 0; i < 2 * pairs; i++) {
        const callFd = options.callFd ?? this.queues[0]?.callFd
        const queue = session.startQueue(i, {
          size: queueSize,
          mode: options.mode,
          ...(callFd !== undefined && { callFd }),
        })
        this.queues.push(queue)
        this.rings.push(packetRing(queue, session.has(VIRTIO_F_EVENT_IDX), options.mode))
        if (i % 2 === 1) continue
        const sink = new PacketSink(this.rings[i] as LoadRing, session.memory, {
          headerSize: this.headerSize,
          bufferSize,
          mergeable: this.mergeable,
        })
        this.sinks.push(sink)
        sink.start()
      }
    } catch (error) {
      this.session.close()
      throw error
    }
  }

  get mergeable(): boolean {
    return this.session.has(VIRTIO_NET_F_MRG_RXBUF)
  }

  /**
   * Builds the packets of all transmit queues; nothing is sent yet. Frame i goes to queue i modulo the pairs.
   * @throws RangeError `flows: …` when there are more frames than packets in flight
   */
  load(traffic: Traffic): void {
    const { sinks, session } = this
    for (let pair = 0; pair < sinks.length; pair++) {
      const mine = traffic.frames.filter((_, i) => i % sinks.length === pair)
      const frames = mine.length > 0 ? mine : traffic.frames
      const source = new PacketSource(this.rings[2 * pair + 1] as LoadRing, session.memory, {
        header: encodeNetHeader(traffic.header, this.headerSize),
        frames,
        ...(traffic.depth !== undefined && { depth: traffic.depth }),
        ...(traffic.splitHeader !== undefined && { splitHeader: traffic.splitHeader }),
      })
      if (frames.length > source.depth) {
        throw new RangeError(`flows: only ${source.depth * sinks.length} packets of this size are in flight`)
      }
      this.sources.push(source)
    }
  }

  get received(): number {
    let packets = 0
    for (const sink of this.sinks) packets += sink.packets
    return packets
  }

  get receivedBytes(): number {
    let bytes = 0
    for (const sink of this.sinks) bytes += sink.bytes
    return bytes
  }

  get sent(): number {
    let packets = 0
    for (const source of this.sources) packets += source.sent
    return packets
  }

  close(): void {
    this.session.close()
  }

  [Symbol.dispose](): void {
    this.close()
  }
}

/** A ring for loads on the memory of a queue that was just started and that nothing was put into. */
export function packetRing(queue: Virtqueue, eventIdx: boolean, mode: WaitMode): LoadRing {
  const area = (part: GuestBuffer): RingArea => ({ buffer: part.region.buffer, offset: part.offset })
  const [one, two, three] = queue.ring
  const common = {
    size: queue.size,
    eventIdx,
    kick: () => void native.eventfdWrite(queue.kickFd, 1),
    name: `virtqueue ${queue.index}`,
  }
  const ring =
    queue.driver instanceof PackedDriver
      ? new PackedPacketRing({
          ...common,
          areas: { descriptors: area(one), driverEvent: area(two), deviceEvent: area(three) },
        })
      : new PacketRing({ ...common, areas: { descriptors: area(one), available: area(two), used: area(three) } })
  if (mode === 'poll') ring.disableCalls()
  return ring
}

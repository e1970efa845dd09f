/**
 * One receive ring as an output of the switch: what the guest has no chains for waits in a bounded backlog, what doesn't fit
 * there is dropped and counted, and nobody else waits. What this guest can't take unfinished is finished for it.
 */
import type { Chain, IoBuffer, QueueContext, ReceiveHandler } from '../../src/device/index.ts'
import { hasFeature } from '../../src/device/index.ts'
import * as net from '../../src/device/virtio-net.ts'
import { BACKLOG_BYTES, Backlog } from './backlog.ts'
import type { CaptureWriter } from './capture.ts'
import { PacketHeader } from './header.ts'
import { DELIVERED, NO_CHAINS, Receiver } from './receiver.ts'
import {
  DROP_DISABLED,
  DROP_NO_BUFFERS,
  DROP_NO_OFFLOAD,
  type NetCounters,
  STARVED,
  type SwitchPlace,
} from './shared.ts'
import { Switch, type SwitchPort } from './switch.ts'

/** Packets from the backlog per round of the iothread. */
const BATCH = 64

export class SwitchReceive implements ReceiveHandler {
  waiting = false
  readonly #context: QueueContext
  readonly #hub: Switch
  readonly #port: SwitchPort
  readonly #pair: number
  readonly #counters: NetCounters
  readonly #receiver: Receiver
  readonly #backlog: Backlog
  readonly #header = new PacketHeader(0n)
  /** In the switch's list of those that wait for the copies. */
  #dirty = false
  /** What the driver takes: partial checksums, and bit t for segmentation of gso_type t. */
  #checksum = false
  #gsoTypes = 0
  #ecn = false

  /** @param offloads as in `setOffloads` */
  constructor(
    context: QueueContext,
    place: SwitchPlace,
    pairs: number,
    pair: number,
    offloads: bigint,
    counters: NetCounters,
    capture: CaptureWriter | undefined
  ) {
    const { hub, port } = Switch.join(context, place, pairs)
    this.#context = context
    this.#hub = hub
    this.#port = port
    this.#pair = pair
    this.#counters = counters
    this.#receiver = new Receiver(context, counters, hub.copies, capture)
    this.#backlog = new Backlog(context.io.allocate(BACKLOG_BYTES), hub.copies)
    this.setOffloads(offloads)
    port.receivers[pair] = this
  }

  get active(): boolean {
    return this.#context.active
  }

  /** @param features of which those of GUEST offloads count */
  setOffloads(features: bigint): void {
    const has = (bit: number): boolean => hasFeature(features, bit)
    // None of the others is to be used without it (virtio 1.3 §5.1.3.1).
    this.#checksum = has(net.VIRTIO_NET_F_GUEST_CSUM)
    this.#ecn = has(net.VIRTIO_NET_F_GUEST_ECN)
    const type = (bit: number, gsoType: number): number => (this.#checksum && has(bit) ? 1 << gsoType : 0)
    this.#gsoTypes =
      type(net.VIRTIO_NET_F_GUEST_TSO4, net.VIRTIO_NET_HDR_GSO_TCPV4) |
      type(net.VIRTIO_NET_F_GUEST_TSO6, net.VIRTIO_NET_HDR_GSO_TCPV6) |
      type(net.VIRTIO_NET_F_GUEST_UFO, net.VIRTIO_NET_HDR_GSO_UDP) |
      // One type for both, and whether a datagram is IPv4 or IPv6 is not worth a look: both or none.
      (has(net.VIRTIO_NET_F_GUEST_USO6) ? type(net.VIRTIO_NET_F_GUEST_USO4, net.VIRTIO_NET_HDR_GSO_UDP_L4) : 0)
    if (!this.#backlog.empty) this.#queueAnew()
  }

  /** The driver no longer receives on this ring: what waits for it is dropped. */
  giveUp(): void {
    for (let left = this.#backlog.clear(); left > 0; left--) this.#counters.drop(DROP_DISABLED)
    this.waiting = false
  }

  /** A frame in a chain of its sender, which stays until the flush. Returns false when it was dropped. */
  sendChain(header: PacketHeader, chain: Chain, start: number, length: number): boolean {
    if (!this.#takes(header)) return this.#convert(header, this.#hub.converter.chain(chain, start, length), 0, length)
    if (this.#backlog.empty) {
      const result = this.#receiver.deliverChain(header, chain, start, length)
      if (!this.#dirty) this.#touch()
      if (result !== NO_CHAINS) return result === DELIVERED
    }
    return this.#queued(this.#backlog.addChain(header, chain, start, length))
  }

  /** A frame in a buffer, which stays until the flush. */
  sendBuffer(header: PacketHeader, buffer: IoBuffer, start: number, length: number): boolean {
    if (!this.#takes(header)) return this.#convert(header, buffer, start, length)
    return this.#deliver(header, buffer, start, length)
  }

  /** Its packets' copies ran. */
  flush(): void {
    this.#dirty = false
    this.#receiver.flush()
  }

  receive(): number {
    let count = this.#hub.uplink?.poll(this.#context) ?? 0
    const backlog = this.#backlog
    let delivered = 0
    while (!backlog.empty && delivered < BATCH) {
      backlog.loadHeader(this.#header)
      const result = this.#receiver.deliverBuffer(this.#header, backlog.buffer, backlog.at, backlog.length)
      if (result === NO_CHAINS) break
      delivered++
      // Its place is used again by `add` at the earliest, which is not before the copies ran.
      backlog.shift()
    }
    if (delivered > 0 || this.#receiver.dirty) {
      this.#hub.copies.run()
      this.#receiver.flush()
    }
    this.waiting = !backlog.empty
    count += delivered
    return count
  }

  readable(): void {
    this.#hub.uplink?.readable()
  }

  release(): void {
    this.#hub.uplink?.unwatch(this.#context)
    this.#receiver.release()
  }

  close(): void {
    // A ring that failed was not released.
    this.#hub.uplink?.unwatch(this.#context)
    this.#port.receivers[this.#pair] = undefined
    this.#hub.leave(this.#port)
  }

  /** What waits was for a driver that took other offloads: it is finished now for this one. */
  #queueAnew(): void {
    const backlog = this.#backlog
    const packets: { header: PacketHeader; frame: Uint8Array }[] = []
    for (; !backlog.empty; backlog.shift()) {
      const header = new PacketHeader(0n)
      backlog.loadHeader(header)
      packets.push({ header, frame: backlog.buffer.bytes.slice(backlog.at, backlog.at + backlog.length) })
    }
    for (const { header, frame } of packets) {
      if (this.#takes(header)) this.#queued(backlog.addBytes(header, frame, 0, frame.length))
      else this.#convertBytes(header, frame)
    }
  }

  #convertBytes(header: PacketHeader, frame: Uint8Array): void {
    const { converter } = this.#hub
    if (!converter.begin(header, frame, 0, frame.length)) return this.#counters.drop(DROP_NO_OFFLOAD)
    while (converter.next())
      this.#queued(this.#backlog.addBytes(converter.header, converter.buffer.bytes, converter.start, converter.length))
  }

  #takes(header: PacketHeader): boolean {
    if ((header.flags | header.gsoType) === 0) return true
    if (header.gsoType === 0) return this.#checksum
    return (this.#gsoTypes & (1 << header.gsoType)) !== 0 && (header.ecn === 0 || this.#ecn)
  }

  /** Finishes checksum and segmentation, and delivers what comes out. */
  #convert(header: PacketHeader, buffer: IoBuffer, start: number, length: number): boolean {
    // A guest that isn't there must not cost the work.
    if (!this.active) {
      this.#counters.drop(DROP_DISABLED)
      return false
    }
    const { converter } = this.#hub
    if (!converter.begin(header, buffer.bytes, start, length)) {
      this.#counters.drop(DROP_NO_OFFLOAD)
      return false
    }
    let all = true
    // What doesn't fit ends it: 2000 segments for a guest that takes none are work that the others would wait for.
    while (all && converter.next())
      all = this.#deliver(converter.header, converter.buffer, converter.start, converter.length)
    // The converter's buffer is used again for the next packet.
    this.#hub.copies.run()
    return all
  }

  #deliver(header: PacketHeader, buffer: IoBuffer, start: number, length: number): boolean {
    if (this.#backlog.empty) {
      const result = this.#receiver.deliverBuffer(header, buffer, start, length)
      if (!this.#dirty) this.#touch()
      if (result !== NO_CHAINS) return result === DELIVERED
    }
    return this.#queued(this.#backlog.addBytes(header, buffer.bytes, start, length))
  }

  #queued(added: boolean): boolean {
    if (!added) this.#counters.drop(DROP_NO_BUFFERS)
    else if (!this.waiting) {
      this.waiting = true
      this.#counters.add(STARVED, 1)
    }
    return added
  }

  #touch(): void {
    if (!this.#receiver.dirty) return
    this.#dirty = true
    this.#hub.dirty(this)
  }
}

/**
 * A tap as one more port of a switch. Packets from it go through a buffer of ours, since the receiver shows only in the packet;
 * packets to it are gathered from the sender's memory. Whichever receive queue is active watches it.
 */
import type { Chain, IoBuffer, PacketReceiver, PacketSender, QueueContext } from '../../src/device/index.ts'
import * as net from '../../src/device/virtio-net.ts'
import { PacketHeader } from './header.ts'
import { HeaderSlots } from './header-slots.ts'
import type { Switch } from './switch.ts'

/** Packets per batch, each way. */
const BATCH = 16
/** Room for the largest packet and its header, whatever the kernel's GSO limit is. */
const SLOT_BYTES = 128 * 1024

export class Uplink {
  readonly #hub: Switch
  readonly #fd: number
  readonly #uso: boolean
  readonly #receiver: PacketReceiver
  readonly #sender: PacketSender
  readonly #slots: HeaderSlots
  readonly #buffer: IoBuffer
  readonly #words: Uint32Array
  readonly #header = new PacketHeader(0n)
  /** For single packets of our own. */
  readonly #single: IoBuffer
  #watcher: QueueContext | undefined
  #readable = false

  /**
   * @param fd of a tap with headers of twelve bytes
   * @param uso it takes UDP segmentation (Linux 6.2); all else every tap takes
   */
  constructor(hub: Switch, context: QueueContext, fd: number, uso: boolean) {
    this.#hub = hub
    this.#uso = uso
    this.#fd = fd
    this.#receiver = context.io.packetReceiver(fd, 1)
    this.#sender = context.io.packetSender(fd, BATCH)
    this.#slots = new HeaderSlots(context.io.allocate(HeaderSlots.bytes(BATCH)))
    this.#buffer = context.io.allocate(BATCH * SLOT_BYTES)
    this.#words = new Uint32Array(this.#buffer.bytes.buffer, this.#buffer.bytes.byteOffset, (BATCH * SLOT_BYTES) / 4)
    this.#single = context.io.allocate(SLOT_BYTES)
  }

  readable(): void {
    this.#readable = true
  }

  /** Forwards what came in. Returns how many packets. @param context of an active queue */
  poll(context: QueueContext): number {
    if (this.#watcher === undefined) {
      this.#watcher = context
      context.io.watch(this.#fd)
      this.#readable = true
    }
    if (!this.#readable) return 0
    let count = 0
    for (; count < BATCH; count++) {
      const at = count * SLOT_BYTES
      const size = this.#receiver.receiveBuffer(this.#buffer, at, SLOT_BYTES)
      if (size < 0) {
        this.#readable = false
        break
      }
      if (size < net.VIRTIO_NET_HDR_SIZE + net.ETH_HEADER_SIZE) continue
      // A host whose GSO limit was raised (BIG TCP): no virtio-net header describes such a packet.
      if (size > net.VIRTIO_NET_HDR_SIZE + net.MAX_FRAME_SIZE) {
        this.#hub.uplinkDropped()
        continue
      }
      const word = at / 4
      this.#header.load(this.#words[word]!, this.#words[word + 1]!, this.#words[word + 2]!)
      const start = at + net.VIRTIO_NET_HDR_SIZE
      this.#hub.forwardBuffer(undefined, 0, this.#header, this.#buffer, start, size - net.VIRTIO_NET_HDR_SIZE)
    }
    if (count > 0) this.#hub.flush()
    return count
  }

  /** The queue's ring is no longer active: another one has to watch. */
  unwatch(context: QueueContext): void {
    if (this.#watcher !== context) return
    context.io.unwatch(this.#fd)
    this.#watcher = undefined
  }

  sendChain(header: PacketHeader, chain: Chain, start: number, length: number): void {
    if (header.gsoType === net.VIRTIO_NET_HDR_GSO_UDP_L4 && !this.#uso)
      return this.#sendSegments(header, chain, start, length)
    const sender = this.#sender
    if (sender.count === BATCH) this.flush()
    if (this.#add(header, chain, start)) return
    this.flush()
    if (!this.#add(header, chain, start)) this.#hub.uplinkDropped()
  }

  sendBuffer(header: PacketHeader, buffer: IoBuffer, start: number, length: number): void {
    this.flush()
    const view = new DataView(this.#single.bytes.buffer, this.#single.bytes.byteOffset)
    header.store(view, 0)
    this.#single.bytes.set(buffer.bytes.subarray(start, start + length), net.VIRTIO_NET_HDR_SIZE)
    this.#sender.addBuffer(this.#single, 0, net.VIRTIO_NET_HDR_SIZE + length)
    this.flush()
  }

  #sendSegments(header: PacketHeader, chain: Chain, start: number, length: number): void {
    const { converter } = this.#hub
    if (!converter.begin(header, converter.chain(chain, start, length).bytes, 0, length))
      return this.#hub.uplinkDropped()
    while (converter.next()) this.sendBuffer(converter.header, converter.buffer, converter.start, converter.length)
  }

  flush(): void {
    const { count } = this.#sender
    if (count === 0) return
    for (let lost = count - this.#sender.send(); lost > 0; lost--) this.#hub.uplinkDropped()
  }

  #add(header: PacketHeader, chain: Chain, start: number): boolean {
    const at = this.#slots.put(this.#sender.count, header)
    return this.#sender.add(this.#slots.buffer, at, net.VIRTIO_NET_HDR_SIZE, chain, start)
  }
}

/**
 * From a tap to the guest: the kernel reads packets straight into the guest's chains, header included. Where the chains
 * don't suffice for the largest packet that may come, one packet at a time goes through a buffer of ours, so that none
 * is cut and none is lost while the guest is slow: the rest waits in the tap. (One that is larger than the tap's MTU
 * was when the ring started is cut, for a driver that takes neither merged buffers nor segmentation.)
 */
import { type Chain, hasFeature, type QueueContext, type ReceiveHandler } from '../../src/device/index.ts'
import * as net from '../../src/device/virtio-net.ts'
import type { CaptureWriter } from './capture.ts'
import { PacketHeader } from './header.ts'
import { NO_CHAINS, Receiver } from './receiver.ts'
import { type NetCounters, type NetReport, PARTIAL_CHECKSUMS, SEGMENTED, STARVED } from './shared.ts'

/** Packets per native call, and chains held for them: for one of the largest and a batch of small ones. */
const BATCH = 32
const HELD_CHAINS = 96
/** Bytes of chains to hold: chains of 64 KiB are held by the dozen, not by the hundred. */
const HELD_BYTES = 1024 * 1024
/** The largest packet of a driver that takes segmented ones: 64 KiB and the Ethernet header (virtio 1.3 §5.1.6.3.1). */
const LARGEST_SEGMENTED = 65550
/** Jumbo frames, for an MTU that is raised while the guest runs; mergeable buffers can take them. */
const JUMBO = 9216
const VLAN_TAG_SIZE = 4
/** A buffer for one packet, whatever it is. */
const BUFFER_SIZE = 128 * 1024
const COPY_PIECES = 256

const EAGAIN = -11

export class TapReceive implements ReceiveHandler {
  waiting = false
  readonly #context: QueueContext
  readonly #fd: number
  readonly #counters: NetCounters
  readonly #capture: CaptureWriter | undefined
  readonly #receiver: Receiver
  readonly #packets
  readonly #copies
  readonly #buffer
  readonly #words: Uint32Array
  readonly #header = new PacketHeader(0n)
  /** Bytes that a packet may have, its header included. */
  readonly #largest: number
  /** The driver takes flags (GUEST_CSUM). */
  readonly #flags: boolean
  /** The chains of the packet at hand. They are pooled: what stays in it costs nothing. */
  readonly #filled: Chain[] = []
  /** Bytes of the packet in the buffer that waits for chains, 0 = none. */
  #pending = 0
  #watching = false
  /** Reading failed the last time. */
  #failed = false
  /** The packet at hand is being recorded. */
  #capturing = false
  /** The tap may have packets. */
  #readable = false

  constructor(
    context: QueueContext,
    fd: number,
    mtu: number,
    counters: NetCounters,
    capture: CaptureWriter | undefined
  ) {
    this.#context = context
    this.#fd = fd
    this.#counters = counters
    this.#capture = capture
    this.#packets = context.io.packetReceiver(fd, HELD_CHAINS)
    this.#copies = context.io.copyBatch(COPY_PIECES)
    this.#buffer = context.io.allocate(BUFFER_SIZE)
    this.#words = new Uint32Array(this.#buffer.bytes.buffer, this.#buffer.bytes.byteOffset, 3)
    this.#receiver = new Receiver(context, counters, this.#copies, capture)
    this.#flags = hasFeature(context.features, net.VIRTIO_NET_F_GUEST_CSUM)
    const plain = mtu + net.ETH_HEADER_SIZE + VLAN_TAG_SIZE
    const segmented = [
      net.VIRTIO_NET_F_GUEST_TSO4,
      net.VIRTIO_NET_F_GUEST_TSO6,
      net.VIRTIO_NET_F_GUEST_UFO,
      net.VIRTIO_NET_F_GUEST_USO4,
      net.VIRTIO_NET_F_GUEST_USO6,
    ].some((bit) => hasFeature(context.features, bit))
    this.#largest =
      this.#receiver.headerSize +
      (segmented ? LARGEST_SEGMENTED : this.#receiver.mergeable ? Math.max(plain, JUMBO) : plain)
  }

  receive(): number {
    if (!this.#watching) this.#watch()
    if (this.#pending > 0 && !this.#deliverPending()) return 0
    if (!this.#readable) return 0
    this.#hold()
    const count = this.#packets.receive(this.#largest, this.#receiver.mergeable, BATCH)
    for (let i = 0; i < count; i++) this.#give(this.#packets.length(i))
    if (this.#packets.ended < 0) this.#ended(this.#packets.ended)
    else if (count === 0) return this.#receiveOne()
    return count
  }

  readable(): void {
    this.#readable = true
  }

  release(): void {
    this.#untake()
    this.#receiver.release()
    // The tap's queue is detached while the ring is not active, and a detached one can't be watched.
    if (this.#watching) this.#context.io.unwatch(this.#fd)
    this.#watching = false
  }

  /** The tap has nothing more, until it becomes readable: it is empty, or (said once) down or gone. */
  #ended(result: number): void {
    this.#readable = false
    if (result === EAGAIN) this.#failed = false
    else if (!this.#failed) {
      this.#failed = true
      this.#context.report({ kind: 'linkFailed', result } satisfies NetReport)
    }
  }

  #watch(): void {
    this.#context.io.watch(this.#fd)
    this.#watching = true
    this.#readable = true
  }

  #hold(): void {
    const packets = this.#packets
    while (packets.held < HELD_CHAINS && packets.room < HELD_BYTES) {
      const chain = this.#context.take()
      if (chain === undefined) return
      if (chain.writable > this.#receiver.headerSize && packets.add(chain)) continue
      // One that can't be used: #receiveOne deals with it when it is the next one.
      this.#context.untake(chain)
      return
    }
  }

  #untake(): void {
    for (let chain = this.#packets.pop(); chain !== undefined; chain = this.#packets.pop()) this.#context.untake(chain)
  }

  /** The kernel has filled the oldest chains with a packet of `size` bytes. */
  #give(size: number): void {
    const { headerSize, mergeable } = this.#receiver
    const filled = this.#filled
    const first = this.#packets.shift()
    filled[0] = first
    let count = 1
    for (let left = size - first.writable; left > 0 && mergeable; count++) {
      const chain = this.#packets.shift()
      filled[count] = chain
      left -= chain.writable
    }
    // Before the chain is given back: what is written to it later is in no dirty log.
    this.#finishHeader(first, count)
    if (this.#capture !== undefined) this.#beginCapture(first, size)
    let left = size
    for (let i = 0; i < count; i++) {
      const chain = filled[i]!
      const written = Math.min(left, chain.writable)
      if (this.#capturing && i > 0) this.#capture!.addWritable(chain, 0, written)
      this.#context.give(chain, written)
      left -= written
    }
    if (this.#capturing) this.#capture!.commit()
    this.#counters.packets(1, size - headerSize)
  }

  /** What the kernel leaves to us in the header of a packet in `count` chains. */
  #finishHeader(first: Chain, count: number): void {
    const { headerSize } = this.#receiver
    // The kernel says DATA_VALID of what a card of the host has checked, to any driver (virtio 1.3 §5.1.6.4.1).
    if (!this.#flags) first.writeU8(net.VIRTIO_NET_HDR_FLAGS, 0)
    const offset = first.offset[first.readableCount]!
    const { bytes } = first.regions[first.region[first.readableCount]!]!
    if (first.length[first.readableCount]! >= net.VIRTIO_NET_HDR_SIZE) {
      if (bytes[offset + 1] !== 0) this.#counters.add(SEGMENTED, 1)
      else if ((bytes[offset]! & net.VIRTIO_NET_HDR_F_NEEDS_CSUM) !== 0) this.#counters.add(PARTIAL_CHECKSUMS, 1)
      if (headerSize === net.VIRTIO_NET_HDR_SIZE) {
        // The kernel leaves num_buffers to us (virtio 1.3 §5.1.6.4.1). Not published yet, so the guest doesn't look.
        bytes[offset + net.VIRTIO_NET_HDR_NUM_BUFFERS] = count & 0xff
        bytes[offset + net.VIRTIO_NET_HDR_NUM_BUFFERS + 1] = count >>> 8
      }
    } else if (headerSize === net.VIRTIO_NET_HDR_SIZE) {
      first.writeU8(net.VIRTIO_NET_HDR_NUM_BUFFERS, count & 0xff)
      first.writeU8(net.VIRTIO_NET_HDR_NUM_BUFFERS + 1, count >>> 8)
    }
  }

  #beginCapture(first: Chain, size: number): void {
    const capture = this.#capture!
    const { headerSize } = this.#receiver
    const length = size - headerSize
    this.#capturing = capture.begin(length, length, false, performance.now()) >= 0
    if (this.#capturing) capture.addWritable(first, headerSize, Math.min(size, first.writable) - headerSize)
  }

  /** Reads a packet into the buffer: then it is known how many chains it needs. */
  #receiveOne(): number {
    this.#untake()
    const size = this.#packets.receiveBuffer(this.#buffer, 0, BUFFER_SIZE)
    if (size < 0) {
      this.#ended(size)
      return 0
    }
    if (size < this.#receiver.headerSize) return 1
    this.#pending = size
    this.#deliverPending()
    return 1
  }

  /** Returns false while the guest has no chains for the packet in the buffer. */
  #deliverPending(): boolean {
    const { headerSize } = this.#receiver
    this.#header.load(this.#words[0]!, this.#words[1]!, this.#words[2]!)
    const result = this.#receiver.deliverBuffer(this.#header, this.#buffer, headerSize, this.#pending - headerSize)
    this.#copies.run()
    this.#receiver.flush()
    if (result === NO_CHAINS) {
      if (!this.waiting) this.#counters.add(STARVED, 1)
      this.waiting = true
      return false
    }
    this.waiting = false
    this.#pending = 0
    // What it holds was for one packet: the next ones go into chains of the other kind of holding.
    this.#receiver.release()
    return true
  }
}

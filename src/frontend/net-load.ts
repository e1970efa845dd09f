/**
 * The packet load's hot path for one virtqueue each way: a source whose packets are built once and sent again as soon as
 * they come back, and a sink that counts packets and posts their buffers again at once. Nothing is allocated per packet.
 * It must not know sockets, time or printing.
 */
import { VIRTIO_NET_HDR_NUM_BUFFERS } from '../virtio/net.ts'
import { FrontendError } from './errors.ts'
import type { GuestBuffer, GuestMemory } from './memory.ts'
import type { LoadRing } from './net-ring.ts'

/**
 * Bytes of memory that the packets of one source have altogether: deep rings of large ones are cut short. A guest's sockets
 * hold no more either, and a load that walks through more than the caches hold measures memory.
 */
const SOURCE_BYTES = 2 ** 22
/** The same for the buffers of a sink. A packet lands in the next one, so here only the memory counts. */
const SINK_BYTES = 2 ** 26
/** Fewer than this a ring doesn't have, however large they are. */
const LEAST = 16

/**
 * Bytes from one packet or buffer to the next: whole cache lines, and an odd number of them. Strides of 2048 or 4096 would
 * put all headers into the same few sets of the cache.
 */
function stride(bytes: number): number {
  return (Math.ceil(bytes / 64) | 1) * 64
}

/** How many of `bytes` each a ring of `entries` is filled with. */
function howMany(entries: number, bytes: number, most: number): number {
  return Math.min(entries, Math.max(LEAST, Math.floor(most / stride(bytes))))
}

/** Guest memory that a source's packets take, in bytes. */
export function sourceBytes(ringSize: number, packet: number): number {
  return howMany(ringSize, packet, SOURCE_BYTES) * stride(packet) + 64
}

/** Guest memory that a sink's buffers take, in bytes. */
export function sinkBytes(ringSize: number, buffer: number): number {
  return howMany(ringSize, buffer, SINK_BYTES) * stride(buffer) + 64
}

export interface SourceOptions {
  /** The packet header of every frame, 12 or 10 bytes. */
  readonly header: Uint8Array
  /** Frames of one size; slot i sends number i modulo their count. */
  readonly frames: readonly Uint8Array[]
  /** Packets at the device at most; default as many as the ring holds. */
  readonly depth?: number
  /** A descriptor of its own for the header, as drivers without headroom in the packet's buffer do it; default false. */
  readonly splitHeader?: boolean
}

/** Sends as fast as the device takes. */
export class PacketSource {
  readonly ring: LoadRing
  /** Packets that the device has used. */
  sent = 0
  readonly depth: number
  /** Bytes of each frame. */
  readonly frameSize: number
  readonly #descriptors: 1 | 2
  readonly #buffer: GuestBuffer
  readonly #stride: number
  readonly #header: number
  #started = false

  /** @throws RangeError when there is no memory, or the ring is too small for `depth` */
  constructor(ring: LoadRing, memory: GuestMemory, options: SourceOptions) {
    const { header, frames } = options
    this.ring = ring
    this.#descriptors = options.splitHeader === true ? 2 : 1
    this.frameSize = frames[0]?.length ?? 0
    const bytes = header.length + this.frameSize
    this.depth = options.depth ?? Math.max(1, howMany(Math.floor(ring.size / this.#descriptors), bytes, SOURCE_BYTES))
    if (this.depth * this.#descriptors > ring.size) {
      throw new RangeError(`a ring of ${ring.size} entries is too small for ${this.depth} packets in flight`)
    }
    this.#stride = stride(bytes)
    this.#header = header.length
    this.#buffer = memory.allocate(this.depth * this.#stride, 64)
    for (let slot = 0; slot < this.depth; slot++) {
      const frame = frames[slot % frames.length] as Uint8Array
      this.#buffer.bytes.set(header, slot * this.#stride)
      this.#buffer.bytes.set(frame, slot * this.#stride + header.length)
      this.#describe(slot, frame.length)
    }
  }

  /** Puts all packets in flight. */
  start(): void {
    this.#started = true
    for (let slot = 0; slot < this.depth; slot++) this.ring.issue(slot * this.#descriptors)
    this.ring.publish()
  }

  /**
   * Sends again what has come back.
   * @param least fewer than that are left for later: a batch costs the device's processor less than many single ones
   * @param more false: send nothing again
   * @returns how many had come back
   */
  step(least: number, more: boolean): number {
    const ring = this.ring
    const count = ring.take(least)
    if (count === 0) return 0
    this.sent += count
    if (more) ring.giveBack(count)
    return count
  }

  /**
   * Sends one other frame in the first slot's place, before `start` or when everything has come back; it counts as sent.
   * Call `announced` when it has come back. @param frame not larger than the frames
   */
  announce(header: Uint8Array, frame: Uint8Array): void {
    this.#saved = this.#buffer.bytes.slice(0, this.#stride)
    this.#buffer.bytes.set(header, 0)
    this.#buffer.bytes.set(frame, header.length)
    this.#describe(0, frame.length)
    this.ring.issue(0)
    this.ring.publish()
  }

  /** Puts the first slot's own frame back. */
  announced(): void {
    if (this.#saved === undefined) return
    this.#buffer.bytes.set(this.#saved, 0)
    this.#saved = undefined
    this.#describe(0, this.frameSize)
  }

  /** Packets are being sent. */
  get started(): boolean {
    return this.#started
  }

  #saved: Uint8Array | undefined

  #describe(slot: number, frame: number): void {
    const at = this.#buffer.gpa + slot * this.#stride
    if (this.#descriptors === 1) {
      this.ring.describe(slot, at, this.#header + frame, false, -1)
    } else {
      this.ring.describe(2 * slot, at, this.#header, false, 2 * slot + 1)
      this.ring.describe(2 * slot + 1, at + this.#header, frame, false, -1)
    }
  }
}

export interface SinkOptions {
  /** Bytes of the packet header: 12 or 10. */
  readonly headerSize: number
  /** Bytes of each buffer, header included. */
  readonly bufferSize: number
  /** MRG_RXBUF was negotiated: a packet may lie in several buffers. */
  readonly mergeable: boolean
}

/** Takes everything that comes. */
export class PacketSink {
  readonly ring: LoadRing
  packets = 0
  /** Bytes of the frames, without packet headers. */
  bytes = 0
  /** Packets in more than one buffer. */
  merged = 0
  readonly #headerSize: number
  readonly #bufferSize: number
  readonly #mergeable: boolean
  readonly #depth: number
  /** num_buffers of chain h is word `#first + h * #step` of the region. */
  readonly #words: Uint16Array
  readonly #first: number
  readonly #step: number
  /** Buffers of the current packet that are still to come. */
  #left = 0

  /** @throws RangeError when there is no memory */
  constructor(ring: LoadRing, memory: GuestMemory, options: SinkOptions) {
    this.ring = ring
    this.#headerSize = options.headerSize
    this.#bufferSize = options.bufferSize
    this.#mergeable = options.mergeable
    this.#depth = howMany(ring.size, options.bufferSize, SINK_BYTES)
    const step = stride(options.bufferSize)
    const buffer = memory.allocate(this.#depth * step, 64)
    this.#words = new Uint16Array(buffer.region.buffer)
    this.#first = (buffer.offset + VIRTIO_NET_HDR_NUM_BUFFERS) / 2
    this.#step = step / 2
    for (let i = 0; i < this.#depth; i++) ring.describe(i, buffer.gpa + i * step, options.bufferSize, true, -1)
  }

  /** Posts all buffers. */
  start(): void {
    for (let i = 0; i < this.#depth; i++) this.ring.issue(i)
    this.ring.publish()
  }

  /**
   * Counts what has come and posts the buffers again.
   * @param least fewer buffers than that are left for later
   * @returns how many buffers had been used
   * @throws FrontendError reply when lengths or num_buffers can't be
   */
  step(least: number): number {
    const ring = this.ring
    const count = ring.take(least)
    if (count === 0) return 0
    const { heads, lengths } = ring
    const headerSize = this.#headerSize
    const bufferSize = this.#bufferSize
    let left = this.#left
    let packets = 0
    let bytes = 0
    for (let i = 0; i < count; i++) {
      const length = lengths[i] as number
      if (length > bufferSize) this.#broken(`it wrote ${length} bytes into a buffer of ${bufferSize}`)
      if (left === 0) {
        if (length < headerSize) this.#broken(`it wrote ${length} bytes, less than a packet header`)
        bytes += length - headerSize
        if (this.#mergeable) {
          left = (this.#words[this.#first + (heads[i] as number) * this.#step] as number) - 1
          if (left !== 0) {
            if (left < 0) this.#broken('num_buffers is 0')
            this.merged++
            continue
          }
        }
        packets++
      } else {
        bytes += length
        if (--left === 0) packets++
      }
    }
    this.#left = left
    this.packets += packets
    this.bytes += bytes
    ring.giveBack(count)
    return count
  }

  #broken(what: string): never {
    throw new FrontendError('receive queue', 'reply', `the device breaks a packet: ${what}`)
  }
}

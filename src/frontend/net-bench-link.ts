/**
 * The kernel's side of a packet bench on a tap: how much has come out of the tap, and packets put into it, which its reader
 * gets. It owns the packet socket. It must not know who is behind the tap; the tap is in this process's network namespace.
 */
import { readFileSync } from 'node:fs'
import { constants } from 'node:os'
import { native, systemError } from '../native.ts'
import { VIRTIO_NET_HDR_SIZE } from '../virtio/net.ts'
import { FrontendError } from './errors.ts'
import { encodeNetHeader, MIN_UDP_FRAME, TCP_HEADER_LENGTH } from './net-frames.ts'
import type { PacketSink } from './net-load.ts'
import type { Traffic } from './net-port.ts'

/** Packets and bytes of frames, Ethernet header included. */
export interface LinkCount {
  readonly packets: number
  readonly bytes: number
}

/** What a link has received so far; with a tap that is what its back-end wrote. @throws Error when there is no such link */
export function linkReceived(name: string): LinkCount {
  // /sys/class/net shows the network namespace of its mount, /proc that of the process.
  const line = readFileSync('/proc/self/net/dev', 'utf8')
    .split('\n')
    .find((one) => one.trimStart().startsWith(`${name}:`))
  if (line === undefined)
    throw new FrontendError('bench', 'system', `there is no link ${name} in this network namespace`)
  const [bytes, packets] = line
    .slice(line.indexOf(':') + 1)
    .trim()
    .split(/\s+/)
    .map(Number)
  return { packets: packets ?? 0, bytes: bytes ?? 0 }
}

/** Of the packets of one bench: the bytes of each, and those that each of its segments repeats. */
export interface FrameShape {
  readonly frame: number
  readonly headers: number
}

export function frameShape(frameSize: number, tcp: boolean): FrameShape {
  return { frame: frameSize, headers: tcp ? TCP_HEADER_LENGTH : MIN_UDP_FRAME }
}

/** How many packets as they were sent these are, whether they came whole or in segments: it goes by their payload. */
export function wholePackets(shape: FrameShape, packets: number, bytes: number): number {
  return (bytes - packets * shape.headers) / (shape.frame - shape.headers)
}

const { ENOBUFS, EAGAIN } = constants.errno
/** The header of a packet socket: without num_buffers. */
const HEADER = VIRTIO_NET_HDR_SIZE - 2
const IOVEC = 16
/** DPDK's bursts have as many. Of packets to be segmented fewer: their bytes are to stay in the caches. */
const BATCH = 32
const GSO_BATCH = 4
const BATCHES_ON_THE_WAY = 8
const GSO_BATCHES_ON_THE_WAY = 2
/** Packets that have not come within this time don't come any more. */
const LOST_MS = 2

export interface LinkSourceOptions {
  readonly traffic: Traffic
  readonly shape: FrameShape
  /** Where they are to come out; none: send without looking. */
  readonly sinks: readonly PacketSink[]
}

/** Puts packets into a link, not more than are looked after: what piles up in its queue is cold when it is read. */
export class LinkSource implements Disposable {
  /** Packets that the kernel took. */
  sent = 0
  /** Packets that the kernel didn't take: the link's queue was full. */
  refused = 0
  readonly #fd: number
  readonly #name: string
  readonly #vectors: number
  readonly #memory: { readonly address: number; readonly buffer: SharedArrayBuffer }[] = []
  readonly #results: Int32Array
  readonly #batch: number
  readonly #window: number
  readonly #shape: FrameShape
  readonly #sinks: readonly PacketSink[]
  /** Of those sent, not waited for any longer. */
  #writtenOff = 0
  #lastOut = -1
  #since = 0

  /** @throws Error with `code` when there is no such link, or no permission for a packet socket */
  constructor(name: string, options: LinkSourceOptions) {
    const { traffic, shape, sinks } = options
    const gso = (traffic.header.gsoType ?? 0) !== 0
    this.#name = name
    this.#shape = shape
    this.#sinks = sinks
    this.#batch = gso ? GSO_BATCH : BATCH
    this.#window = this.#batch * (gso ? GSO_BATCHES_ON_THE_WAY : BATCHES_ON_THE_WAY)
    this.#results = new Int32Array(this.#batch)
    this.#fd = native.packetSocket(name, true)
    if (this.#fd < 0) throw systemError(this.#fd, 'socket', `packets can't be put into ${name}`)
    try {
      this.#vectors = this.#build(traffic)
    } catch (error) {
      this.close()
      throw error
    }
  }

  /** Sends a batch when there is room for it on the way. @returns how many packets went in */
  step(): number {
    if (this.#sinks.length > 0 && this.sent - this.#writtenOff - this.#out() > this.#window - this.#batch) return 0
    const results = this.#results
    results.fill(1)
    const sent = native.sendPackets(this.#fd, this.#vectors, results, this.#batch)
    this.sent += sent
    if (sent < this.#batch) this.#refusals()
    return sent
  }

  /** To be called every now and then while nothing moves: gives up what is lost, for it would block the way for ever. */
  lookAfter(now: number): void {
    const out = this.#out()
    if (out !== this.#lastOut) {
      this.#lastOut = out
      this.#since = now
    } else if (now - this.#since > LOST_MS) this.#writtenOff = this.sent - out
  }

  close(): void {
    native.close(this.#fd)
    for (const one of this.#memory) native.release(one.address)
    this.#memory.length = 0
  }

  [Symbol.dispose](): void {
    this.close()
  }

  #out(): number {
    let packets = 0
    let bytes = 0
    for (let i = 0; i < this.#sinks.length; i++) {
      packets += (this.#sinks[i] as PacketSink).packets
      bytes += (this.#sinks[i] as PacketSink).bytes
    }
    return (bytes - packets * this.#shape.headers) / (this.#shape.frame - this.#shape.headers)
  }

  #refusals(): void {
    for (let i = 0; i < this.#batch; i++) {
      const result = this.#results[i] as number
      if (result >= 0) continue
      // The link's queue is full, or the socket's.
      if (result !== -ENOBUFS && result !== -EAGAIN) throw systemError(result, 'writev', `a packet for ${this.#name}`)
      this.refused++
    }
  }

  /** @returns the address of one iovec per packet of a batch */
  #build(traffic: Traffic): number {
    const header = encodeNetHeader(traffic.header, HEADER)
    const bytes = HEADER + this.#shape.frame
    const packets = this.#allocate(this.#batch * bytes)
    const vectors = this.#allocate(this.#batch * IOVEC)
    const out = new Uint8Array(packets.buffer)
    const view = new DataView(vectors.buffer)
    for (let i = 0; i < this.#batch; i++) {
      out.set(header, i * bytes)
      out.set(traffic.frames[i % traffic.frames.length] as Uint8Array, i * bytes + HEADER)
      view.setBigUint64(i * IOVEC, BigInt(packets.address + i * bytes), true)
      view.setBigUint64(i * IOVEC + 8, BigInt(bytes), true)
    }
    return vectors.address
  }

  #allocate(bytes: number): { address: number; buffer: SharedArrayBuffer } {
    const mapping = native.allocate(bytes)
    if (typeof mapping === 'number') throw systemError(mapping, 'mmap', 'memory for packets')
    this.#memory.push(mapping)
    return mapping
  }
}

/** TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6. */
const OFFLOADS = 7

/**
 * How fast this thread puts packets into a tap that nobody reads: its queue is full, and the kernel drops them at its end.
 * @returns packets per second
 */
export function linkSourceLimit(traffic: Traffic, shape: FrameShape, seconds: number): number {
  const name = 'bench-limit'
  const fd = native.tapOpen(name, false)
  if (fd < 0) throw systemError(fd, 'open', `a tap can't be made`)
  try {
    const error = Math.min(native.tapSetOffload(fd, OFFLOADS), native.linkSetUp(name, true))
    if (error < 0) throw systemError(error, 'ioctl', `the tap ${name} can't be set up`)
    using source = new LinkSource(name, { traffic, shape, sinks: [] })
    for (const end = performance.now() + 200; performance.now() < end; ) source.step()
    const before = source.sent + source.refused
    const from = performance.now()
    let now = from
    for (const end = from + seconds * 1000; now < end; now = performance.now())
      for (let i = 0; i < 16; i++) source.step()
    return ((source.sent + source.refused - before) * 1000) / (now - from)
  } finally {
    native.close(fd)
  }
}

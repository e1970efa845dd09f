/**
 * From the guest to a link: checks the header of each packet and hands it on, in batches (virtio 1.3 §5.1.6.2). It must not
 * know what the link is.
 */
import type { Chain, QueueContext, QueueHandler } from '../../src/device/index.ts'
import * as net from '../../src/device/virtio-net.ts'
import type { CaptureWriter } from './capture.ts'
import { GsoFrame, MAX_HEADERS } from './frame.ts'
import { headerSize, PASS, PacketHeader, RUNT, SEGMENTATION } from './header.ts'
import { DROP_DISABLED, type NetCounters, type NetMessage, PARTIAL_CHECKSUMS, SEGMENTED } from './shared.ts'

/** Where packets go. */
export interface Link {
  /**
   * Takes the frame in bytes [start, start + length) of a chain's device-readable part; the chain stays as it is until
   * `flush`. Drops are the link's to count.
   */
  send(header: PacketHeader, chain: Chain, start: number, length: number): void
  /** Sends what was put off. */
  flush(): void
  message(message: NetMessage): void
  close(): void
}

export class Transmitter implements QueueHandler {
  readonly #context: QueueContext
  readonly #link: Link
  readonly #counters: NetCounters
  readonly #capture: CaptureWriter | undefined
  readonly #headerSize: number
  readonly #header: PacketHeader
  readonly #gso = new GsoFrame()
  /** The first bytes of a frame that is to be segmented. */
  readonly #start = new Uint8Array(MAX_HEADERS)
  readonly #view = new DataView(this.#start.buffer)
  /** Sent since the last flush. */
  #packets = 0
  #bytes = 0

  constructor(context: QueueContext, link: Link, counters: NetCounters, capture: CaptureWriter | undefined) {
    this.#context = context
    this.#link = link
    this.#counters = counters
    this.#capture = capture
    this.#headerSize = headerSize(context.features)
    this.#header = new PacketHeader(context.features)
  }

  handleBatch(chains: readonly Chain[], count: number): void {
    try {
      for (let i = 0; i < count; i++) this.#transmit(chains[i]!)
    } finally {
      // Also when one of them failed: what the link has put off names these chains' memory.
      this.#link.flush()
    }
    // Nothing reads the chains any more. A device writes nothing to them (virtio 1.3 §5.1.6.2.2).
    const context = this.#context
    for (let i = 0; i < count; i++) context.give(chains[i]!, 0)
    this.#counters.packets(this.#packets, this.#bytes)
    this.#packets = 0
    this.#bytes = 0
  }

  #transmit(chain: Chain): void {
    const reason = this.#check(chain)
    if (reason !== PASS) return this.#counters.drop(reason - 1)
    const header = this.#header
    const start = this.#headerSize
    const length = chain.readable - start
    this.#packets++
    this.#bytes += length
    if ((header.flags | header.gsoType) !== 0)
      this.#counters.add(header.gsoType !== 0 ? SEGMENTED : PARTIAL_CHECKSUMS, 1)
    this.#capture?.fromReadable(chain, start, length, true)
    this.#link.send(header, chain, start, length)
  }

  discard(chain: Chain): void {
    this.#counters.drop(DROP_DISABLED)
    this.#context.give(chain, 0)
  }

  message(message: unknown): void {
    this.#link.message(message as NetMessage)
  }

  close(): void {
    this.#link.close()
  }

  /** Reads the header, once, and says whether the packet may go on. */
  #check(chain: Chain): number {
    const size = this.#headerSize
    if (chain.readable < size) return RUNT
    const header = this.#header
    loadHeader(header, chain, size)
    const length = chain.readable - size
    const reason = header.check(length)
    if (reason !== PASS || header.gsoType === net.VIRTIO_NET_HDR_GSO_NONE) return reason
    copyStart(chain, size, this.#start, Math.min(length, MAX_HEADERS))
    return this.#gso.parse(this.#view, 0, length, header) < 0 ? SEGMENTATION : PASS
  }
}

/** Reads each byte of the header once. The usual one lies in one piece, and not always on a word. */
function loadHeader(header: PacketHeader, chain: Chain, size: number): void {
  if (chain.length[0]! < size) {
    header.load(chain.readU32(0), chain.readU32(4), chain.readU16(8))
    return
  }
  const region = chain.first
  const at = chain.offset[0]!
  if ((at & 3) === 0) {
    const { words } = region
    const word = at / 4
    // The last two bytes of the third one don't matter, and where they are not the driver's they are still in its memory.
    header.load(words[word]!, words[word + 1]!, words[word + 2]!)
    return
  }
  const { bytes } = region
  header.load(
    bytes[at]! | (bytes[at + 1]! << 8) | (bytes[at + 2]! << 16) | (bytes[at + 3]! << 24),
    bytes[at + 4]! | (bytes[at + 5]! << 8) | (bytes[at + 6]! << 16) | (bytes[at + 7]! << 24),
    bytes[at + 8]! | (bytes[at + 9]! << 8)
  )
}

/** Copies `length` bytes from `at` of the device-readable part; unlike `Chain.copyFrom` it allocates nothing. */
function copyStart(chain: Chain, at: number, target: Uint8Array, length: number): void {
  let skip = at
  let done = 0
  for (let segment = 0; segment < chain.readableCount && done < length; segment++) {
    const size = chain.length[segment]! - skip
    if (size <= 0) {
      skip = -size
      continue
    }
    const { bytes } = chain.regions[chain.region[segment]!]!
    const from = chain.offset[segment]! + skip
    const take = Math.min(size, length - done)
    for (let i = 0; i < take; i++) target[done + i] = bytes[from + i]!
    done += take
    skip = 0
  }
}

/**
 * Finishes in software what a sender left to its receiver, for one that doesn't take it: completes the checksum, cuts the
 * frame into segments. Not a hot path: guests negotiate these offloads, and a packet that needs this costs ten times as
 * much.
 */
import type { Chain, CopyBatch, IoBuffer, QueueContext } from '../../src/device/index.ts'
import * as net from '../../src/device/virtio-net.ts'
import { completeChecksum } from './checksum.ts'
import { GsoFrame } from './frame.ts'
import { PacketHeader } from './header.ts'
import { MAX_SEGMENT_HEADERS, Segmenter } from './segment.ts'

const FRAME_BYTES = 80 * 1024
/** All segments of one frame: `PacketHeader.check` allows 2048. */
const SEGMENT_BYTES = FRAME_BYTES + 2048 * MAX_SEGMENT_HEADERS

/** `begin`, then `next` while it is true; each time `buffer`, `start` and `length` say where a finished frame is. */
export class Converter {
  /** Of a finished frame: asks for nothing. */
  readonly header = new PacketHeader(0n)
  buffer: IoBuffer
  start = 0
  length = 0
  readonly #copies: CopyBatch
  readonly #frame: IoBuffer
  readonly #frameView: DataView
  readonly #segments: IoBuffer
  readonly #segmentsView: DataView
  readonly #gso = new GsoFrame()
  readonly #asked = new PacketHeader(0n)
  readonly #segmenter = new Segmenter(crypto.getRandomValues(new Uint32Array(1))[0]!)
  #segmenting = false
  #left = 0
  /** Where the next segment goes. */
  #end = 0

  constructor(context: QueueContext, copies: CopyBatch) {
    this.#copies = copies
    this.#frame = context.io.allocate(FRAME_BYTES)
    this.#segments = context.io.allocate(SEGMENT_BYTES)
    this.#frameView = viewOf(this.#frame)
    this.#segmentsView = viewOf(this.#segments)
    this.buffer = this.#frame
  }

  /** Copies the frame at `start` of a chain to the start of a buffer, which it returns. */
  chain(chain: Chain, start: number, length: number): IoBuffer {
    this.#copies.chainToBuffer(chain, start, this.#frame, 0, length)
    this.#copies.run()
    return this.#frame
  }

  /**
   * Starts a frame. @returns false when it can't be finished
   */
  begin(header: PacketHeader, bytes: Uint8Array, start: number, length: number): boolean {
    // A private copy: a buffer may be for other receivers as well.
    if (bytes !== this.#frame.bytes || start !== 0) this.#frame.bytes.set(bytes.subarray(start, start + length))
    // And a header of our own: `parse` corrects it, and in a frame that its sender changed meanwhile differently.
    const asked = this.#asked
    asked.copy(header)
    this.#segmenting = asked.gsoType !== net.VIRTIO_NET_HDR_GSO_NONE
    this.#end = 0
    if (!this.#segmenting) {
      completeChecksum(this.#frameView, 0, length, asked.csumStart, asked.csumOffset)
      this.buffer = this.#frame
      this.start = 0
      this.length = length
      this.#left = 1
      return true
    }
    if (this.#gso.parse(this.#frameView, 0, length, asked) < 0) return false
    this.#segmenter.begin(this.#frameView, 0, length, asked, this.#gso)
    this.buffer = this.#segments
    return true
  }

  next(): boolean {
    if (!this.#segmenting) return this.#left-- > 0
    const headers = this.#segmenter.next(this.#segmentsView, this.#end)
    if (headers === 0) return false
    const { payloadStart, payloadLength } = this.#segmenter
    this.#segments.bytes.set(
      this.#frame.bytes.subarray(payloadStart, payloadStart + payloadLength),
      this.#end + headers
    )
    this.start = this.#end
    this.length = headers + payloadLength
    this.#end += this.length
    return true
  }
}

function viewOf(buffer: IoBuffer): DataView {
  return new DataView(buffer.bytes.buffer, buffer.bytes.byteOffset, buffer.bytes.length)
}

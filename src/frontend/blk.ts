/**
 * virtio-blk requests over a virtqueue (virtio 1.3 §5.2.6): any type, any framing, one at a time or many in flight.
 * It owns an arena of guest memory per region for headers, data and status bytes. It must not know the connection.
 *
 * A request is two byte streams, header + data for the device to read, data + status for it to write, and each stream
 * may be cut into descriptors anywhere (§2.7.4 "Message Framing"): that is how odd framings are made here.
 */
import {
  VIRTIO_BLK_DISCARD_SEGMENT_SIZE,
  VIRTIO_BLK_HEADER_SIZE,
  VIRTIO_BLK_ID_BYTES,
  VIRTIO_BLK_S_OK,
  VIRTIO_BLK_SECTOR_SIZE,
  VIRTIO_BLK_T_DISCARD,
  VIRTIO_BLK_T_FLUSH,
  VIRTIO_BLK_T_GET_ID,
  VIRTIO_BLK_T_IN,
  VIRTIO_BLK_T_OUT,
  VIRTIO_BLK_T_WRITE_ZEROES,
} from '../virtio/blk.ts'
import { VIRTQ_DESC_SIZE } from '../virtio/constants.ts'
import type { Segment, TableMemory } from './driver.ts'
import { FrontendError } from './errors.ts'
import type { GuestBuffer, GuestMemory } from './memory.ts'
import type { Virtqueue } from './virtqueue.ts'

/** Value of a status byte that the device has not written. */
export const STATUS_UNTOUCHED = 0xa5

/** How a request is cut into descriptors and where they lie. */
export interface Framing {
  /** Lengths of the device-readable descriptors; their sum is 16 + the data to be written. Default: header, data. */
  readonly readable?: readonly number[]
  /** Lengths of the device-writable descriptors; their sum is the data to be read + 1. Default: data, status. */
  readonly writable?: readonly number[]
  /** Use an indirect table. */
  readonly indirect?: boolean
  /** Alignment of each piece in bytes (power of two, default 16), and bytes to move it off that alignment. */
  readonly align?: number
  readonly skew?: number
  /** Region of the pieces; default 0. */
  readonly region?: number
  /**
   * Where a piece lies, when the arena won't do (straddling regions): a guest-physical address, or undefined for the
   * arena.
   */
  readonly place?: (length: number, writable: boolean, index: number) => number | undefined
}

/** One request under way, and its result when `done`. */
export interface BlkRequest {
  readonly type: number
  done: boolean
  /** The status byte, {@link STATUS_UNTOUCHED} when the device did not write it. */
  status: number
  /** The used element's length. */
  written: number
  /** The device-writable bytes before the status, when `done`. */
  data: Uint8Array
}

interface Flight {
  readonly request: BlkRequest
  readonly writable: readonly { gpa: number; length: number }[]
}

/** A segment of DISCARD or WRITE_ZEROES. */
export interface BlkRange {
  readonly sector: number | bigint
  readonly sectors: number
  readonly flags?: number
}

export class BlkDriver {
  readonly queue: Virtqueue
  readonly memory: GuestMemory
  /** Milliseconds that a request may take. */
  timeoutMs = 10_000
  readonly #arenas: { buffer: GuestBuffer; next: number }[]
  readonly #flights: (Flight | undefined)[]
  #outstanding = 0

  /** @param arenaBytes per region; it bounds the bytes in flight */
  constructor(queue: Virtqueue, memory: GuestMemory, arenaBytes = 8 * 2 ** 20) {
    this.queue = queue
    this.memory = memory
    this.#arenas = memory.regions.map((region, i) => {
      const room = Math.max(0, Math.min(arenaBytes, region.size - region.next - 8192))
      return { buffer: memory.allocate(room, 4096, i), next: 0 }
    })
    this.#flights = new Array<Flight | undefined>(queue.size).fill(undefined)
  }

  get outstanding(): number {
    return this.#outstanding
  }

  /**
   * Puts a request into the ring and publishes it.
   * @param out data for the device to read @param inLength bytes of data for it to write
   * @throws RangeError when descriptors or arena are short
   */
  submit(
    type: number,
    sector: number | bigint,
    out: Uint8Array,
    inLength: number,
    framing: Framing = {},
    publish = true
  ): BlkRequest {
    const readable = new Uint8Array(VIRTIO_BLK_HEADER_SIZE + out.length)
    writeHeader(readable, type, sector)
    readable.set(out, VIRTIO_BLK_HEADER_SIZE)
    return this.submitRaw(
      type,
      readable,
      framing.readable ?? (out.length > 0 ? [VIRTIO_BLK_HEADER_SIZE, out.length] : [VIRTIO_BLK_HEADER_SIZE]),
      framing.writable ?? (inLength > 0 ? [inLength, 1] : [1]),
      framing,
      publish
    )
  }

  /** The same from the raw streams: `readable` may be no valid request, `writable` may have no room for a status. */
  submitRaw(
    type: number,
    readable: Uint8Array,
    readableCuts: readonly number[],
    writableCuts: readonly number[],
    framing: Framing = {},
    publish = true
  ): BlkRequest {
    if (this.#outstanding === 0) for (const arena of this.#arenas) arena.next = 0
    const segments: Segment[] = []
    let done = 0
    for (const [i, length] of readableCuts.entries()) {
      const address = this.#place(length, false, i, framing)
      this.memory.write(address, readable.subarray(done, done + length))
      segments.push({ address, length, writable: false })
      done += length
    }
    const writable: { gpa: number; length: number }[] = []
    for (const [i, length] of writableCuts.entries()) {
      const gpa = this.#place(length, true, i, framing)
      this.memory.write(gpa, new Uint8Array(length).fill(STATUS_UNTOUCHED))
      segments.push({ address: gpa, length, writable: true })
      writable.push({ gpa, length })
    }
    const table =
      framing.indirect === true ? this.#take(segments.length * VIRTQ_DESC_SIZE, 16, 0, framing.region ?? 0) : undefined
    return this.#launch(type, segments, writable, table, publish)
  }

  /** A request whose data lies in memory that this driver doesn't know: the data isn't filled in or read out. */
  submitForeign(type: number, sector: number | bigint, data: readonly Segment[]): BlkRequest {
    if (this.#outstanding === 0) for (const arena of this.#arenas) arena.next = 0
    const header = this.#take(VIRTIO_BLK_HEADER_SIZE, 16, 0, 0)
    writeHeader(header.bytes, type, sector)
    const status = this.#take(1, 1, 0, 0)
    status.bytes[0] = STATUS_UNTOUCHED
    return this.#launch(
      type,
      [
        { address: header.gpa, length: VIRTIO_BLK_HEADER_SIZE, writable: false },
        ...data,
        { address: status.gpa, length: 1, writable: true },
      ],
      [{ gpa: status.gpa, length: 1 }],
      undefined,
      true
    )
  }

  /** Publishes what was submitted with `publish` = false. */
  publish(): void {
    this.queue.driver.publish()
  }

  /** Collects completions without waiting. Returns how many there were. */
  poll(): number {
    const { driver } = this.queue
    let count = 0
    for (let head = driver.pop(); head >= 0; head = driver.pop()) {
      const flight = this.#flights[head]
      if (flight === undefined) continue
      this.#flights[head] = undefined
      this.#outstanding--
      count++
      this.#finish(flight, driver.written)
      driver.release(head)
    }
    return count
  }

  /**
   * Waits until `request` (or everything, when left out) is done.
   * @throws FrontendError timeout or closed
   */
  wait(request?: BlkRequest, timeoutMs = this.timeoutMs): void {
    const deadline = performance.now() + timeoutMs
    while (request === undefined ? this.#outstanding > 0 : !request.done) {
      if (this.poll() > 0) continue
      const left = deadline - performance.now()
      if (left <= 0 || !this.queue.wait(left)) {
        const what = request === undefined ? `${this.#outstanding} requests` : `request of type ${request.type}`
        throw new FrontendError(`virtqueue ${this.queue.index}`, 'timeout', `${what} not completed in ${timeoutMs} ms`)
      }
    }
  }

  /** Submits and waits. */
  run(type: number, sector: number | bigint, out: Uint8Array, inLength: number, framing: Framing = {}): BlkRequest {
    const request = this.submit(type, sector, out, inLength, framing)
    this.wait(request)
    return request
  }

  // ---- helpers that expect success: @throws FrontendError with the status otherwise

  /** Reads `length` bytes (a multiple of 512) from `sector`. */
  read(sector: number, length: number, framing: Framing = {}): Uint8Array {
    return expectOk(this.run(VIRTIO_BLK_T_IN, sector, NOTHING, length, framing), `read of sector ${sector}`).data
  }

  write(sector: number, data: Uint8Array, framing: Framing = {}): void {
    expectOk(this.run(VIRTIO_BLK_T_OUT, sector, data, 0, framing), `write of sector ${sector}`)
  }

  flush(): void {
    expectOk(this.run(VIRTIO_BLK_T_FLUSH, 0, NOTHING, 0), 'flush')
  }

  /** The serial: at most 20 bytes, up to the first zero. */
  getId(): string {
    const { data } = expectOk(this.run(VIRTIO_BLK_T_GET_ID, 0, NOTHING, VIRTIO_BLK_ID_BYTES), 'get id')
    const end = data.indexOf(0)
    return Buffer.from(end < 0 ? data : data.subarray(0, end)).toString('latin1')
  }

  discard(ranges: readonly BlkRange[]): void {
    expectOk(this.run(VIRTIO_BLK_T_DISCARD, 0, rangeBytes(ranges), 0), 'discard')
  }

  writeZeroes(ranges: readonly BlkRange[]): void {
    expectOk(this.run(VIRTIO_BLK_T_WRITE_ZEROES, 0, rangeBytes(ranges), 0), 'write zeroes')
  }

  #launch(
    type: number,
    segments: readonly Segment[],
    writable: Flight['writable'],
    table: TableMemory | undefined,
    publish: boolean
  ): BlkRequest {
    const head = this.queue.driver.build(segments, table)
    if (head < 0) throw new RangeError(`no ${segments.length} free descriptors on virtqueue ${this.queue.index}`)
    const request: BlkRequest = { type, done: false, status: STATUS_UNTOUCHED, written: 0, data: new Uint8Array(0) }
    this.#flights[head] = { request, writable }
    this.#outstanding++
    this.queue.driver.issue(head)
    if (publish) this.queue.driver.publish()
    return request
  }

  #finish(flight: Flight, written: number): void {
    const { request } = flight
    const total = flight.writable.reduce((sum, piece) => sum + piece.length, 0)
    const bytes = new Uint8Array(total)
    let done = 0
    for (const piece of flight.writable) {
      bytes.set(this.memory.read(piece.gpa, piece.length), done)
      done += piece.length
    }
    request.data = bytes.subarray(0, Math.max(0, total - 1))
    request.status = bytes[total - 1] ?? STATUS_UNTOUCHED
    request.written = written
    request.done = true
  }

  #place(length: number, writable: boolean, index: number, framing: Framing): number {
    const chosen = framing.place?.(length, writable, index)
    return chosen ?? this.#take(length, framing.align ?? 16, framing.skew ?? 0, framing.region ?? 0).gpa
  }

  #take(length: number, align: number, skew: number, region: number): { gpa: number; bytes: Uint8Array } {
    const arena = this.#arenas[region]
    if (arena === undefined) throw new RangeError(`no region ${region}`)
    const start = Math.ceil(arena.next / align) * align + skew
    if (start + length > arena.buffer.length) throw new RangeError(`arena full: ${length} bytes asked for at ${start}`)
    // One byte stays free behind each piece, so that neighbours never touch.
    arena.next = start + length + 1
    return { gpa: arena.buffer.gpa + start, bytes: arena.buffer.bytes.subarray(start, start + length) }
  }
}

const NOTHING = new Uint8Array(0)

/** struct virtio_blk_req's first 16 bytes. */
export function writeHeader(bytes: Uint8Array, type: number, sector: number | bigint): void {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  view.setUint32(0, type, true)
  view.setUint32(4, 0, true)
  view.setBigUint64(8, BigInt(sector), true)
}

/** The data of DISCARD and WRITE_ZEROES: 16 bytes per range. */
export function rangeBytes(ranges: readonly BlkRange[]): Uint8Array {
  const bytes = new Uint8Array(ranges.length * VIRTIO_BLK_DISCARD_SEGMENT_SIZE)
  const view = new DataView(bytes.buffer)
  for (const [i, range] of ranges.entries()) {
    const at = i * VIRTIO_BLK_DISCARD_SEGMENT_SIZE
    view.setBigUint64(at, BigInt(range.sector), true)
    view.setUint32(at + 8, range.sectors, true)
    view.setUint32(at + 12, range.flags ?? 0, true)
  }
  return bytes
}

/** @throws FrontendError when the device answered with another status than OK */
export function expectOk(request: BlkRequest, what: string): BlkRequest {
  if (request.status !== VIRTIO_BLK_S_OK) {
    throw new FrontendError(what, 'reply', `status ${statusName(request.status)}`, request.status)
  }
  return request
}

export function statusName(status: number): string {
  if (status === STATUS_UNTOUCHED) return 'not written'
  return ['OK', 'IOERR', 'UNSUPP'][status] ?? String(status)
}

/** Bytes to 512-byte sectors. */
export function sectorsOf(bytes: number): number {
  return bytes / VIRTIO_BLK_SECTOR_SIZE
}

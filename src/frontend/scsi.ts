/**
 * virtio-scsi over virtqueues (virtio 1.3 §5.6.6): commands of any bytes, task management, events. It owns an arena of guest
 * memory for headers and data. It must not know the connection.
 */
import * as scsi from '../virtio/scsi.ts'
import type { Segment } from './driver.ts'
import { FrontendError } from './errors.ts'
import type { GuestBuffer, GuestMemory } from './memory.ts'
import { cdb } from './scsi-cdb.ts'
import type { Virtqueue } from './virtqueue.ts'

/** Value of response bytes that the device has not written. */
export const UNTOUCHED = 0xa5

/** How a request differs from the usual one. */
export interface ScsiOptions {
  /** The unit; default 0. */
  readonly lun?: number
  /** The 8 bytes of the address, in place of what `lun` makes. */
  readonly address?: Uint8Array
  /** The task's tag; default a number of its own. */
  readonly tag?: bigint
  /** The whole device-readable part, and descriptors of other lengths than header and data. */
  readonly readable?: Uint8Array
  readonly readableCuts?: readonly number[]
  readonly writableCuts?: readonly number[]
  /** Bytes to move pieces off their alignment of 16; default 0. */
  readonly skew?: number
}

/** One command under way, and its result when `done`. */
export interface ScsiRequest {
  readonly tag: bigint
  done: boolean
  /** VIRTIO_SCSI_S_*, {@link UNTOUCHED} when the device did not write it. */
  response: number
  /** SAM status. */
  status: number
  residual: number
  sense: Uint8Array
  /** What the device wrote behind the header, as far as the used length goes. */
  data: Uint8Array
  /** The used element's length. */
  written: number
  /** All of the device-writable part. */
  writable: Uint8Array
}

/** Sense data in words; -1 where there is none. */
export interface Sense {
  readonly key: number
  /** Additional sense code × 256 + qualifier. */
  readonly code: number
  readonly information: number
  /** Byte that is wrong, and the bit in it. */
  readonly field: number
  readonly bit: number
  /** The field is in the CDB and not in the parameters. */
  readonly inCdb: boolean
}

interface Flight {
  readonly request: ScsiRequest
  readonly writable: readonly GuestBuffer[]
}

interface Piece {
  readonly bytes: Uint8Array
  readonly buffer: GuestBuffer
}

const NOTHING: Uint8Array = new Uint8Array(0)

/** A request queue. */
export class ScsiDriver {
  readonly queue: Virtqueue
  /** Milliseconds that a command may take. */
  timeoutMs = 10_000
  senseSize = scsi.VIRTIO_SCSI_SENSE_DEFAULT_SIZE
  cdbSize = scsi.VIRTIO_SCSI_CDB_DEFAULT_SIZE
  readonly #arena: Arena
  readonly #flights: (Flight | undefined)[]
  #outstanding = 0
  #nextTag = 1n

  /** @param arenaBytes they bound the bytes in flight */
  constructor(queue: Virtqueue, memory: GuestMemory, arenaBytes = 2 ** 20) {
    this.queue = queue
    this.#arena = new Arena(memory, arenaBytes)
    this.#flights = new Array<Flight | undefined>(queue.size).fill(undefined)
  }

  get outstanding(): number {
    return this.#outstanding
  }

  /**
   * Puts a command into the ring and publishes it.
   * @param out data for the device to read @param inLength bytes of data for it to write
   * @throws RangeError when descriptors or arena are short
   */
  submit(command: Uint8Array, out = NOTHING, inLength = 0, options: ScsiOptions = {}, publish = true): ScsiRequest {
    if (this.#outstanding === 0) this.#arena.reset()
    const tag = options.tag ?? this.#nextTag++
    const header = scsi.VIRTIO_SCSI_REQ_HEADER_SIZE + this.cdbSize
    const readable = options.readable ?? this.#readable(command, out, tag, options)
    const readableCuts =
      options.readableCuts ?? (readable.length > header ? [header, readable.length - header] : [readable.length])
    const response = scsi.VIRTIO_SCSI_RESP_HEADER_SIZE + this.senseSize
    const writableCuts = options.writableCuts ?? (inLength > 0 ? [response, inLength] : [response])
    const segments: Segment[] = []
    let done = 0
    for (const length of readableCuts) {
      const { bytes, buffer } = this.#arena.take(length, options.skew ?? 0)
      bytes.set(readable.subarray(done, done + length))
      segments.push({ address: buffer.gpa, length, writable: false })
      done += length
    }
    const writable = writableCuts.map((length) => this.#arena.take(length, options.skew ?? 0))
    for (const { bytes, buffer } of writable) {
      bytes.fill(UNTOUCHED)
      segments.push({ address: buffer.gpa, length: bytes.length, writable: true })
    }
    const head = this.queue.driver.build(segments)
    if (head < 0) throw new RangeError(`no ${segments.length} free descriptors on virtqueue ${this.queue.index}`)
    const request: ScsiRequest = {
      tag,
      done: false,
      response: UNTOUCHED,
      status: UNTOUCHED,
      residual: -1,
      sense: NOTHING,
      data: NOTHING,
      written: 0,
      writable: NOTHING,
    }
    this.#flights[head] = { request, writable: writable.map(({ buffer }) => buffer) }
    this.#outstanding++
    this.queue.driver.issue(head)
    if (publish) this.queue.driver.publish()
    return request
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
  wait(request?: ScsiRequest): void {
    waitFor(
      this.queue,
      this.timeoutMs,
      () => this.poll(),
      () => (request === undefined ? this.#outstanding === 0 : request.done)
    )
  }

  /** Submits and waits. */
  run(command: Uint8Array, out = NOTHING, inLength = 0, options: ScsiOptions = {}): ScsiRequest {
    const request = this.submit(command, out, inLength, options)
    this.wait(request)
    return request
  }

  // ---- helpers that expect success: @throws FrontendError with response, status and sense otherwise

  /** Runs a command that has data to give, all of what it gave. */
  ask(command: Uint8Array, inLength: number, options: ScsiOptions = {}): Uint8Array {
    return expectGood(this.run(command, NOTHING, inLength, options), commandName(command)).data
  }

  /** Runs a command with or without data to take. */
  tell(command: Uint8Array, out = NOTHING, options: ScsiOptions = {}): void {
    expectGood(this.run(command, out, 0, options), commandName(command))
  }

  /** Has units report what they have to before they do anything else. Returns the codes, in their order. */
  clearAttentions(lun = 0): number[] {
    const codes: number[] = []
    for (let i = 0; i < 16; i++) {
      const request = this.run(cdb.testUnitReady(), NOTHING, 0, { lun })
      const { key, code } = decodeSense(request.sense)
      if (key !== UNIT_ATTENTION) return codes
      codes.push(code)
    }
    throw new FrontendError('TEST UNIT READY', 'reply', 'one unit attention after the other')
  }

  /** Blocks and bytes per block. */
  capacity(lun = 0): { blocks: number; blockSize: number } {
    const bytes = this.ask(cdb.readCapacity16(), 32, { lun })
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
    return { blocks: Number(view.getBigUint64(0)) + 1, blockSize: view.getUint32(8) }
  }

  #readable(command: Uint8Array, out: Uint8Array, tag: bigint, options: ScsiOptions): Uint8Array {
    const readable = new Uint8Array(scsi.VIRTIO_SCSI_REQ_HEADER_SIZE + this.cdbSize + out.length)
    readable.set(options.address ?? unitAddress(options.lun ?? 0))
    new DataView(readable.buffer).setBigUint64(scsi.VIRTIO_SCSI_REQ_ID, tag, true)
    readable.set(command.subarray(0, this.cdbSize), scsi.VIRTIO_SCSI_REQ_CDB)
    readable.set(out, scsi.VIRTIO_SCSI_REQ_HEADER_SIZE + this.cdbSize)
    return readable
  }

  #finish({ request, writable }: Flight, written: number): void {
    const all = new Uint8Array(writable.reduce((sum, { length }) => sum + length, 0))
    let at = 0
    for (const { bytes } of writable) {
      all.set(bytes, at)
      at += bytes.length
    }
    const response = scsi.VIRTIO_SCSI_RESP_HEADER_SIZE + this.senseSize
    request.done = true
    request.written = written
    request.writable = all
    if (all.length < response) return
    const view = new DataView(all.buffer)
    request.response = all[scsi.VIRTIO_SCSI_RESP_RESPONSE]!
    request.status = all[scsi.VIRTIO_SCSI_RESP_STATUS]!
    request.residual = view.getUint32(scsi.VIRTIO_SCSI_RESP_RESIDUAL, true)
    const senseLength = Math.min(this.senseSize, view.getUint32(scsi.VIRTIO_SCSI_RESP_SENSE_LEN, true))
    request.sense = all.subarray(scsi.VIRTIO_SCSI_RESP_SENSE, scsi.VIRTIO_SCSI_RESP_SENSE + senseLength)
    request.data = all.subarray(response, Math.max(response, written))
  }
}

/** The control queue. */
export class ScsiControl {
  readonly queue: Virtqueue
  timeoutMs = 10_000
  readonly #arena: Arena

  constructor(queue: Virtqueue, memory: GuestMemory) {
    this.queue = queue
    this.#arena = new Arena(memory, 4096)
  }

  /** A task management function: waits for its response. */
  manage(subtype: number, lun: number | Uint8Array, tag = 0n): number {
    const bytes = new Uint8Array(scsi.VIRTIO_SCSI_TMF_SIZE)
    const view = new DataView(bytes.buffer)
    view.setUint32(0, scsi.VIRTIO_SCSI_T_TMF, true)
    view.setUint32(scsi.VIRTIO_SCSI_TMF_SUBTYPE, subtype, true)
    bytes.set(typeof lun === 'number' ? unitAddress(lun) : lun, scsi.VIRTIO_SCSI_TMF_LUN)
    view.setBigUint64(scsi.VIRTIO_SCSI_TMF_ID, tag, true)
    return this.run(bytes, 1)[0]!
  }

  /** Any request. Returns the device-writable part, {@link UNTOUCHED} where nothing was written. */
  run(readable: Uint8Array, writableBytes: number): Uint8Array {
    this.#arena.reset()
    const segments: Segment[] = []
    if (readable.length > 0) {
      const { bytes, buffer } = this.#arena.take(readable.length, 0)
      bytes.set(readable)
      segments.push({ address: buffer.gpa, length: readable.length, writable: false })
    }
    const answer = this.#arena.take(Math.max(1, writableBytes), 0)
    answer.bytes.fill(UNTOUCHED)
    if (writableBytes > 0) segments.push({ address: answer.buffer.gpa, length: writableBytes, writable: true })
    const { driver } = this.queue
    const head = driver.build(segments)
    if (head < 0) throw new RangeError('the control queue is full')
    driver.issue(head)
    driver.publish()
    let done = false
    const poll = (): number => {
      done = driver.pop() === head
      return done ? 1 : 0
    }
    waitFor(this.queue, this.timeoutMs, poll, () => done)
    driver.release(head)
    return answer.bytes.slice(0, writableBytes)
  }
}

/** One event. */
export interface ScsiEvent {
  /** Without the flag. */
  readonly event: number
  readonly missed: boolean
  readonly lun: Uint8Array
  readonly reason: number
}

/** The event queue. */
export class ScsiEvents {
  readonly queue: Virtqueue
  readonly #arena: Arena
  readonly #buffers = new Map<number, GuestBuffer>()

  constructor(queue: Virtqueue, memory: GuestMemory) {
    this.queue = queue
    this.#arena = new Arena(memory, 4096)
  }

  /** Gives the device buffers for events. */
  supply(count: number, bytes = scsi.VIRTIO_SCSI_EVENT_SIZE): void {
    const { driver } = this.queue
    for (let i = 0; i < count; i++) {
      const { buffer } = this.#arena.take(bytes, 0)
      const head = driver.build([{ address: buffer.gpa, length: bytes, writable: true }])
      if (head < 0) throw new RangeError('the event queue is full')
      this.#buffers.set(head, buffer)
      driver.issue(head)
    }
    driver.publish()
  }

  /** The next event. @throws FrontendError timeout */
  next(timeoutMs = 5000): ScsiEvent {
    const { driver } = this.queue
    let head = -1
    const poll = (): number => {
      head = driver.pop()
      return head < 0 ? 0 : 1
    }
    waitFor(this.queue, timeoutMs, poll, () => head >= 0)
    const { bytes } = this.#buffers.get(head)!
    driver.release(head)
    if (driver.written < scsi.VIRTIO_SCSI_EVENT_SIZE)
      throw new FrontendError('event', 'reply', `${driver.written} bytes`)
    const copy = bytes.slice()
    const view = new DataView(copy.buffer)
    const word = view.getUint32(scsi.VIRTIO_SCSI_EVENT_EVENT, true)
    return {
      event: word & 0x7fff_ffff,
      missed: word >= scsi.VIRTIO_SCSI_T_EVENTS_MISSED,
      lun: copy.subarray(scsi.VIRTIO_SCSI_EVENT_LUN, scsi.VIRTIO_SCSI_EVENT_LUN + 8),
      reason: view.getUint32(scsi.VIRTIO_SCSI_EVENT_REASON, true),
    }
  }
}

const UNIT_ATTENTION = 6

/** The `lun` field of a unit of target 0. */
export function unitAddress(lun: number): Uint8Array {
  return lun < 256
    ? Uint8Array.of(1, 0, 0, lun, 0, 0, 0, 0)
    : Uint8Array.of(1, 0, 0x40 | (lun >> 8), lun & 0xff, 0, 0, 0, 0)
}

/** Sense data of the fixed format; all -1 when it is none. */
export function decodeSense(bytes: Uint8Array): Sense {
  const none = { key: -1, code: -1, information: -1, field: -1, bit: -1, inCdb: false }
  if (bytes.length < 14 || (bytes[0]! & 0x7f) !== 0x70) return none
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  const pointer = bytes.length >= 18 && (bytes[15]! & 0x80) !== 0
  return {
    key: bytes[2]! & 0xf,
    code: view.getUint16(12),
    information: (bytes[0]! & 0x80) === 0 ? -1 : view.getUint32(3),
    field: pointer ? view.getUint16(16) : -1,
    bit: pointer && (bytes[15]! & 8) !== 0 ? bytes[15]! & 7 : -1,
    inCdb: pointer && (bytes[15]! & 0x40) !== 0,
  }
}

/** @throws FrontendError when the command did not end with GOOD */
export function expectGood(request: ScsiRequest, what: string): ScsiRequest {
  if (request.response === scsi.VIRTIO_SCSI_S_OK && request.status === 0) return request
  const { key, code } = decodeSense(request.sense)
  const text = `response ${request.response}, status ${request.status}, sense ${key}/${code.toString(16)}`
  throw new FrontendError(what, 'reply', text, request.response)
}

function commandName(command: Uint8Array): string {
  return `SCSI command ${command[0]!.toString(16).padStart(2, '0')}h`
}

function waitFor(queue: Virtqueue, timeoutMs: number, poll: () => number, done: () => boolean): void {
  const deadline = performance.now() + timeoutMs
  while (!done()) {
    if (poll() > 0) continue
    const left = deadline - performance.now()
    if (left <= 0 || !queue.wait(left))
      throw new FrontendError(`virtqueue ${queue.index}`, 'timeout', `nothing completed in ${timeoutMs} ms`)
  }
}

/** Memory for requests, given out from its start; empty again when nothing is in flight. */
class Arena {
  readonly #buffer: GuestBuffer
  #next = 0

  constructor(memory: GuestMemory, bytes: number) {
    this.#buffer = memory.allocate(bytes, 4096)
  }

  reset(): void {
    this.#next = 0
  }

  take(length: number, skew: number): Piece {
    const start = Math.ceil(this.#next / 16) * 16 + skew
    if (start + length > this.#buffer.length) throw new RangeError(`arena full: ${length} bytes asked for at ${start}`)
    // One byte stays free behind each piece, so that neighbours never touch.
    this.#next = start + length + 1
    const bytes = this.#buffer.bytes.subarray(start, start + length)
    return { bytes, buffer: { ...this.#buffer, gpa: this.#buffer.gpa + start, length, bytes } }
  }
}

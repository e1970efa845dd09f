/**
 * The other end of a device's socket, for tests: a vhost-user front-end and a virtio driver that does requests on a
 * queue, whatever they mean. Owns the session and the memory of the pretended guest.
 *
 * It blocks its thread while it waits, up to the time limits: the device must be served by another process ({@link
 * startVirtiod}), never by this one.
 */
import { loadDeviceState, saveDeviceState } from '../frontend/device-state.ts'
import type { Segment, TableMemory } from '../frontend/driver.ts'
import { FrontendError } from '../frontend/errors.ts'
import { GuestMemory, layouts } from '../frontend/memory.ts'
import { Session } from '../frontend/session.ts'
import { sleepMs, type Virtqueue } from '../frontend/virtqueue.ts'
import { VIRTIO_F_INDIRECT_DESC, VIRTQ_DESC_SIZE } from '../virtio/constants.ts'
import { type Reply, UNTOUCHED } from './reply.ts'

const MIB = 2 ** 20
const MAX_CONFIG_SIZE = 256

export interface FrontEndOptions {
  /** Rings to start; default 1. */
  readonly queues?: number
  /** Entries per ring, a power of two; default 256. */
  readonly queueSize?: number
  /** Packed rings; default split ones. @throws FrontendError unsupported when they are not offered */
  readonly packed?: boolean
  /** Every chain is one descriptor that points to a table (INDIRECT_DESC); default false. */
  readonly indirect?: boolean
  /**
   * Every buffer is cut into odd pieces that lie in two regions of memory, as drivers are free to do (virtio 1.3 §2.7.4
   * "Message Framing"); default: one descriptor per buffer.
   */
  readonly split?: boolean
  /** Feature bits not to acknowledge although the device offers them. */
  readonly withoutFeatures?: readonly number[]
  /** MiB of memory for what is in flight; default 64. */
  readonly memoryMb?: number
  /** How long an answer may take, in milliseconds; default 10 000. */
  readonly timeoutMs?: number
}

/** A request under way; its `reply` is there when it is done. */
export interface PendingRequest {
  readonly queue: number
  readonly reply: Reply | undefined
}

interface Piece {
  readonly gpa: number
  readonly length: number
  readonly region: number
}

interface Flight {
  reply: Reply | undefined
  readonly queue: number
  readonly pieces: readonly Piece[]
  readonly writable: readonly Piece[]
}

/**
 * Connects to a device's socket and starts its queues, as a guest's driver would. A daemon serves one front-end at a time:
 * `close` this one before the next.
 * @throws FrontendError `connect` when nobody listens there; `timeout` when another front-end is connected
 */
export function connect(socketPath: string, options: FrontEndOptions = {}): FrontEnd {
  return new FrontEnd(socketPath, options)
}

/** A connected front-end; see {@link connect}. */
export class FrontEnd implements Disposable {
  /** What was negotiated: the device's own bits that it offers, and those of the transport that this front-end drives. */
  readonly features: bigint
  /** What was offered. */
  readonly offeredFeatures: bigint
  /** How many queues the device can serve. */
  readonly maxQueues: number
  /** How long a request may take, in milliseconds. */
  timeoutMs: number
  readonly #session: Session
  readonly #memory: Arena
  readonly #split: boolean
  readonly #indirect: boolean
  readonly #flights: (Flight | undefined)[][]
  readonly #broken = new Set<number>()

  /** @internal Use connect. */
  constructor(socketPath: string, options: FrontEndOptions) {
    const { timeoutMs = 10_000, queues = 1, memoryMb = 64, split = false, indirect = false } = options
    // Two regions far from one another: pieces of a buffer may lie in both.
    const memory = new GuestMemory(layouts.hole((memoryMb / 2) * MIB))
    try {
      this.#session = Session.open(socketPath, {
        timeoutMs,
        queues,
        memory,
        packed: options.packed === true,
        ...(options.queueSize !== undefined && { queueSize: options.queueSize }),
        ...(options.withoutFeatures !== undefined && { withoutFeatures: options.withoutFeatures }),
      })
    } catch (error) {
      memory.close()
      throw error
    }
    const { features, offeredFeatures, maxQueues } = this.#session
    this.features = features
    this.offeredFeatures = offeredFeatures
    this.maxQueues = maxQueues
    this.timeoutMs = timeoutMs
    this.#memory = new Arena(memory)
    this.#split = split
    this.#indirect = indirect
    this.#flights = Array.from({ length: queues }, () => [])
    if (indirect && !this.#session.has(VIRTIO_F_INDIRECT_DESC)) {
      this.close()
      throw new FrontendError('SET_FEATURES', 'unsupported', 'the device does not offer INDIRECT_DESC')
    }
  }

  /** Whether a feature bit was negotiated. */
  has(bit: number): boolean {
    return this.#session.has(bit)
  }

  /**
   * Reads the config space. Behind the device's own fields it is zeroes.
   * @param length default: all up to byte 256 @throws FrontendError when the device has none
   */
  config(offset = 0, length = MAX_CONFIG_SIZE - offset): Uint8Array {
    const bytes = this.#session.connection.getConfig(offset, length)
    if (bytes === undefined) throw new FrontendError('GET_CONFIG', 'reply', `no ${length} bytes at ${offset}`)
    return bytes
  }

  /** Writes to the config space. @throws FrontendError nack when the device refuses it */
  writeConfig(offset: number, bytes: Uint8Array): void {
    this.#session.connection.setConfig(offset, bytes)
  }

  /** How often the device has said that its config space changed. */
  get configChanges(): number {
    this.#session.connection.pump()
    return this.#session.configChanges
  }

  /** Waits for the device's next word that its config space changed. Returns whether it came. */
  waitForConfigChange(timeoutMs = this.timeoutMs): boolean {
    const { connection } = this.#session
    const before = this.#session.configChanges
    const deadline = performance.now() + timeoutMs
    for (;;) {
      connection.pump(Math.max(0, Math.min(50, deadline - performance.now())))
      if (this.#session.configChanges > before) return true
      if (performance.now() >= deadline) return false
    }
  }

  /**
   * Does a request: submits it and waits for the reply.
   * @param readable what the device reads; several buffers are several descriptors
   * @param writableLength bytes that the device may write
   * @throws FrontendError timeout, broken or closed
   */
  request(queue: number, readable: Uint8Array | readonly Uint8Array[], writableLength = 0): Reply {
    const request = this.submit(queue, readable, writableLength)
    this.wait(request)
    return request.reply as Reply
  }

  /**
   * Puts a request into the ring and doesn't wait for it: many can be in flight. Chains of a `buffers` queue are requests
   * without a readable part.
   * @throws RangeError when the ring or the memory is full
   */
  submit(queue: number, readable: Uint8Array | readonly Uint8Array[], writableLength = 0): PendingRequest {
    const { driver } = this.#queue(queue)
    const segments: Segment[] = []
    const pieces: Piece[] = []
    const writable: Piece[] = []
    let head = -1
    try {
      for (const buffer of readable instanceof Uint8Array ? [readable] : readable) {
        let done = 0
        for (const { gpa, length } of this.#allocate(buffer.length, pieces)) {
          this.#memory.write(gpa, buffer.subarray(done, done + length))
          segments.push({ address: gpa, length, writable: false })
          done += length
        }
      }
      for (const piece of this.#allocate(writableLength, pieces)) {
        this.#memory.write(piece.gpa, new Uint8Array(piece.length).fill(UNTOUCHED))
        segments.push({ address: piece.gpa, length: piece.length, writable: true })
        writable.push(piece)
      }
      if (segments.length === 0) throw new RangeError('a request has to have bytes to be read or to be written')
      head = driver.build(segments, this.#indirect ? this.#table(segments.length, pieces) : undefined)
      if (head < 0) throw new RangeError(`no ${segments.length} free descriptors on queue ${queue}`)
    } catch (error) {
      for (const piece of pieces) this.#memory.free(piece)
      throw error
    }
    const flight: Flight = { queue, pieces, writable, reply: undefined }
    ;(this.#flights[queue] as (Flight | undefined)[])[head] = flight
    driver.issue(head)
    driver.publish()
    return flight
  }

  /** Collects replies that are there, without waiting. Returns how many there were. */
  poll(): number {
    let count = 0
    for (const { index } of this.#session.queues) count += this.#collect(index)
    return count
  }

  /**
   * Waits until `request` is done, or all that is in flight.
   * @throws FrontendError `timeout`; `broken` when the device stopped the ring because of a bad request; `closed` when it
   * hung up
   */
  wait(request?: PendingRequest, timeoutMs = this.timeoutMs): void {
    const deadline = performance.now() + timeoutMs
    for (;;) {
      this.poll()
      const waiting = request === undefined ? this.#waiting() : request.reply === undefined ? [request.queue] : []
      const [first] = waiting
      if (first === undefined) return
      const left = deadline - performance.now()
      if (left <= 0) {
        throw new FrontendError(`virtqueue ${first}`, 'timeout', `no reply within ${timeoutMs} ms`)
      }
      if (this.#queue(first).wait(Math.min(left, 50))) continue
      const broken = waiting.find((index) => this.isBroken(index))
      if (broken === undefined) continue
      throw new FrontendError(`virtqueue ${broken}`, 'broken', 'the device refuses to go on with this ring')
    }
  }

  /** Chains that the device has. */
  get inFlight(): number {
    return this.#session.queues.reduce((sum, { driver }) => sum + driver.inFlight, 0)
  }

  /** Whether the device has given the ring up (its err eventfd): for it, the driver's request was no valid one. */
  isBroken(queue: number): boolean {
    if (this.#queue(queue).broken()) this.#broken.add(queue)
    return this.#broken.has(queue)
  }

  /** Waits until the device has given the ring up. Returns whether it has. */
  waitUntilBroken(queue: number, timeoutMs = this.timeoutMs): boolean {
    const deadline = performance.now() + timeoutMs
    while (!this.isBroken(queue)) {
      if (performance.now() >= deadline) return false
      sleepMs(2)
    }
    return true
  }

  /** Stops all rings, as a driver that is unbound does; the device answers what is in flight first. */
  stop(): void {
    this.#session.stop()
    this.poll()
  }

  /** The device's state, as a migration reads it; the rings have to be stopped. @throws FrontendError nack */
  saveState(): Uint8Array {
    return saveDeviceState(this.#session.connection)
  }

  /** Gives the device the state of another one; the rings have to be stopped. @throws FrontendError nack */
  loadState(state: Uint8Array): void {
    loadDeviceState(this.#session.connection, state)
  }

  /** Stops the rings and disconnects. Never throws; what is in flight gets no reply. */
  close(): void {
    this.#session.close()
    this.#memory.close()
  }

  [Symbol.dispose](): void {
    this.close()
  }

  #queue(index: number): Virtqueue {
    return this.#session.queue(index)
  }

  /** The queues that have something in flight. */
  #waiting(): number[] {
    return this.#session.queues.filter(({ driver }) => driver.inFlight > 0).map(({ index }) => index)
  }

  #collect(index: number): number {
    const { driver } = this.#queue(index)
    const flights = this.#flights[index] as (Flight | undefined)[]
    let count = 0
    for (let head = driver.pop(); head >= 0; head = driver.pop()) {
      const flight = flights[head]
      const { written } = driver
      driver.release(head)
      if (flight === undefined) continue
      flights[head] = undefined
      flight.reply = { written, bytes: this.#memory.gather(flight.writable) }
      for (const piece of flight.pieces) this.#memory.free(piece)
      count++
    }
    return count
  }

  /** Memory for a buffer; all of it is noted in `taken` too. */
  #allocate(length: number, taken: Piece[]): Piece[] {
    const pieces: Piece[] = []
    for (let done = 0; done < length; ) {
      const count = this.#split ? Math.min(length - done, pieceLength(pieces.length)) : length
      const piece = this.#memory.allocate(count, this.#split ? pieces.length % 2 : 0)
      pieces.push(piece)
      taken.push(piece)
      done += count
    }
    return pieces
  }

  #table(entries: number, taken: Piece[]): TableMemory {
    const piece = this.#memory.allocate(entries * VIRTQ_DESC_SIZE, 0)
    taken.push(piece)
    return { gpa: piece.gpa, bytes: this.#memory.at(piece) }
  }
}

/** 1, 2, 5, 11, 23, … bytes: odd ones, and no more descriptors than a small ring has even for a megabyte. */
function pieceLength(index: number): number {
  return index === 0 ? 1 : 3 * 2 ** (index - 1) - 1
}

/** Guest memory that can be given back: pieces of powers of two, so that what was freed fits again. */
class Arena {
  readonly #memory: GuestMemory
  readonly #free = new Map<string, number[]>()

  constructor(memory: GuestMemory) {
    this.#memory = memory
  }

  /** @throws RangeError when the region is full */
  allocate(length: number, region: number): Piece {
    const gpa = this.#free.get(key(length, region))?.pop() ?? this.#memory.allocate(room(length), 16, region).gpa
    return { gpa, length, region }
  }

  free({ gpa, length, region }: Piece): void {
    const list = this.#free.get(key(length, region))
    if (list === undefined) this.#free.set(key(length, region), [gpa])
    else list.push(gpa)
  }

  write(gpa: number, bytes: Uint8Array): void {
    this.#memory.write(gpa, bytes)
  }

  at({ gpa, length }: Piece): Uint8Array {
    return this.#memory.at(gpa, length)
  }

  gather(pieces: readonly Piece[]): Uint8Array {
    const bytes = new Uint8Array(pieces.reduce((sum, { length }) => sum + length, 0))
    let done = 0
    for (const piece of pieces) {
      bytes.set(this.at(piece), done)
      done += piece.length
    }
    return bytes
  }

  close(): void {
    this.#memory.close()
  }
}

function room(length: number): number {
  return Math.max(64, 2 ** Math.ceil(Math.log2(length)))
}

function key(length: number, region: number): string {
  return `${region} ${room(length)}`
}

/**
 * virtio-blk request processing (virtio 1.3 §5.2.6): the queue half. A chain becomes a request that is found again by
 * its head; each step of it is one I/O operation, and `completed` decides on the next. Whatever a guest sends is
 * answered by a status byte.
 */
import { type Chain, hasFeature, type IoFile, type QueueContext, type QueueHandler } from '../../src/device/index.ts'
import * as blk from '../../src/device/virtio-blk.ts'
import { BouncePool, type BounceUser, ZEROES, zeroBuffer } from '../disk/bounce.ts'
import { FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE } from '../disk/image.ts'
import * as shared from './shared.ts'

const EINTR = -4
const EAGAIN = -11
const ENOSPC = -28
const EOPNOTSUPP = -95
const EDQUOT = -122

/** Bytes that one step of a request moves at most, so that a huge one doesn't keep the iothread from all others. */
const STEP = 1024 * 1024

/** How a range of zeroes is made, from the cheapest: the next is tried when the file system can't. */
const PUNCH = 0
const ZERO_RANGE = 1
const WRITE_ZEROES = 2

/** One request in work. All fields are numbers, so that its shape never changes. */
class Request {
  operation = 0
  /** Where in the file, in bytes; how much of how many bytes is done. */
  offset = 0
  done = 0
  total = 0
  dsync = false
  /** Index of the bounce buffer, -1 = none, and how many bytes it carries now. */
  bounce = -1
  carried = 0
  /** DISCARD and WRITE_ZEROES: (offset, length) pairs in bytes, and the one in work. */
  ranges: Float64Array | undefined
  /** Bit i: range i may be unmapped. */
  rangeCount = 0
  range = 0
  unmap: Uint8Array | undefined
  method = PUNCH
  /** The fdatasync behind a write-through DISCARD or WRITE_ZEROES is under way. */
  syncing = false
}

class BlkQueue implements QueueHandler, BounceUser {
  readonly #context: QueueContext
  readonly #data: shared.BlkQueueData
  readonly #state: shared.BlkState
  readonly #file: IoFile
  readonly #requests: (Request | undefined)[]
  readonly #sectorMask: number
  readonly #direct: boolean
  /** Without FLUSH a driver can't ask for durability, so each write is durable (virtio 1.3 §5.2.6.2). */
  readonly #canFlush: boolean

  constructor(context: QueueContext, data: shared.BlkQueueData) {
    this.#context = context
    this.#data = data
    this.#state = new shared.BlkState(data.state)
    this.#file = context.io.openFile(data.fd)
    this.#sectorMask = data.blockSize - 1
    this.#direct = data.lengthAlign > 1
    this.#canFlush = hasFeature(context.features, blk.VIRTIO_BLK_F_FLUSH)
    this.#requests = new Array<Request | undefined>(context.queueSize).fill(undefined)
  }

  handle(chain: Chain): void {
    if (chain.writable === 0) {
      // No room for a status: all that can be done is to give the chain back.
      this.#context.countError(shared.MALFORMED)
      this.#context.complete(chain, 0, shared.OTHER, 0)
      return
    }
    if (chain.readable < blk.VIRTIO_BLK_HEADER_SIZE)
      return this.#fail(chain, shared.OTHER, shared.MALFORMED, blk.VIRTIO_BLK_S_IOERR)
    switch (chain.readU32(0)) {
      case blk.VIRTIO_BLK_T_IN:
        return this.#transfer(chain, shared.READ, chain.writable - 1)
      case blk.VIRTIO_BLK_T_OUT:
        return this.#transfer(chain, shared.WRITE, chain.readable - blk.VIRTIO_BLK_HEADER_SIZE)
      case blk.VIRTIO_BLK_T_FLUSH:
        return this.#flush(chain)
      case blk.VIRTIO_BLK_T_GET_ID:
        return this.#getId(chain)
      case blk.VIRTIO_BLK_T_DISCARD:
        return this.#zero(chain, shared.DISCARD)
      case blk.VIRTIO_BLK_T_WRITE_ZEROES:
        return this.#zero(chain, shared.WRITE_ZEROES)
      default:
        return this.#fail(chain, shared.OTHER, shared.UNSUPPORTED, blk.VIRTIO_BLK_S_UNSUPP)
    }
  }

  completed(chain: Chain, result: number): void {
    const request = this.#request(chain)
    switch (request.operation) {
      case shared.READ:
      case shared.WRITE:
        return this.#transferred(chain, request, result)
      case shared.FLUSH:
        if (result < 0) return this.#ioError(chain, request, result)
        return this.#succeed(chain, shared.FLUSH, 0, 0)
      default:
        return this.#zeroed(chain, request, result)
    }
  }

  /** A bounce buffer that `chain` waited for is there. */
  bounceReady(chain: Chain, bounce: number): void {
    const request = this.#request(chain)
    request.bounce = bounce
    this.#bounceStep(chain, request)
  }

  close(): void {
    // After a failure requests were abandoned in the middle; their buffers are the whole iothread's.
    BouncePool.leave(this)
    for (const request of this.#requests) if (request !== undefined) this.#release(request)
    this.#context.io.closeFile(this.#file)
  }

  #request(chain: Chain): Request {
    const request = this.#requests[chain.head]
    if (request !== undefined) return request
    const created = new Request()
    this.#requests[chain.head] = created
    return created
  }

  // ---- IN and OUT

  #transfer(chain: Chain, operation: number, length: number): void {
    const sector = chain.readU64(8)
    if (!this.#inRange(sector, length)) return this.#fail(chain, operation, shared.RANGE, blk.VIRTIO_BLK_S_IOERR)
    if (operation === shared.WRITE && this.#data.readOnly)
      return this.#fail(chain, operation, shared.READ_ONLY, blk.VIRTIO_BLK_S_IOERR)
    if (length === 0) return this.#succeed(chain, operation, 0, 0)
    const request = this.#request(chain)
    request.operation = operation
    request.offset = sector * blk.VIRTIO_BLK_SECTOR_SIZE
    request.done = 0
    request.total = length
    request.dsync = operation === shared.WRITE && this.#durable()
    this.#transferStep(chain, request)
  }

  #transferStep(chain: Chain, request: Request): void {
    const { io } = this.#context
    const { done, offset } = request
    const left = Math.min(request.total - done, STEP)
    const write = request.operation === shared.WRITE
    const start = write ? blk.VIRTIO_BLK_HEADER_SIZE + done : done
    if (this.#direct && !chain.aligned(!write, start, left, this.#data.memoryAlign, this.#data.lengthAlign)) {
      BouncePool.take(io, this, chain)
      return
    }
    if (write) io.write(chain, this.#file, offset + done, start, left, request.dsync)
    else io.read(chain, this.#file, offset + done, start, left)
  }

  #bounceStep(chain: Chain, request: Request): void {
    const { io } = this.#context
    const { done, offset } = request
    const buffer = BouncePool.buffer(request.bounce)
    const length = Math.min(request.total - done, buffer.bytes.length)
    request.carried = length
    if (request.operation === shared.WRITE) {
      chain.copyFrom(blk.VIRTIO_BLK_HEADER_SIZE + done, buffer.bytes, 0, length)
      io.writeBuffer(chain, this.#file, offset + done, buffer, 0, length, request.dsync)
    } else io.readBuffer(chain, this.#file, offset + done, buffer, 0, length)
  }

  #transferred(chain: Chain, request: Request, result: number): void {
    if (result < 0 && result !== EINTR && result !== EAGAIN) return this.#ioError(chain, request, result)
    // Nothing more there although it is inside the capacity: somebody cut the file. Without this it would be asked
    // for ever.
    if (result === 0) return this.#abort(chain, request, shared.END_OF_FILE)
    if (result > 0) {
      if (request.bounce >= 0 && request.operation === shared.READ) {
        chain.copyTo(request.done, BouncePool.buffer(request.bounce).bytes, 0, result)
      }
      request.done += result
    }
    if (request.done < request.total) {
      if (request.bounce >= 0) this.#bounceStep(chain, request)
      else this.#transferStep(chain, request)
      return
    }
    this.#release(request)
    const written = request.operation === shared.READ ? request.total : 0
    this.#succeed(chain, request.operation, written, request.total)
  }

  // ---- FLUSH and GET_ID

  #flush(chain: Chain): void {
    if (this.#data.unsafe) return this.#succeed(chain, shared.FLUSH, 0, 0)
    this.#request(chain).operation = shared.FLUSH
    this.#context.io.fdatasync(chain, this.#file)
  }

  #getId(chain: Chain): void {
    const length = Math.min(blk.VIRTIO_BLK_ID_BYTES, chain.writable - 1)
    chain.copyTo(0, this.#data.serial, 0, length)
    this.#succeed(chain, shared.GET_ID, length, length)
  }

  // ---- DISCARD and WRITE_ZEROES

  #zero(chain: Chain, operation: number): void {
    const bytes = chain.readable - blk.VIRTIO_BLK_HEADER_SIZE
    const count = bytes / blk.VIRTIO_BLK_DISCARD_SEGMENT_SIZE
    if (this.#data.readOnly) return this.#fail(chain, operation, shared.READ_ONLY, blk.VIRTIO_BLK_S_IOERR)
    if (operation === shared.DISCARD && !this.#data.discard)
      return this.#fail(chain, operation, shared.UNSUPPORTED, blk.VIRTIO_BLK_S_UNSUPP)
    if (count < 1 || count > shared.MAX_RANGES || !Number.isInteger(count)) {
      return this.#fail(chain, operation, shared.MALFORMED, blk.VIRTIO_BLK_S_IOERR)
    }
    const request = this.#request(chain)
    request.ranges ??= new Float64Array(shared.MAX_RANGES * 2)
    request.unmap ??= new Uint8Array(shared.MAX_RANGES)
    // All ranges are read and checked before the first is touched, and each is read only once: the guest can change
    // them meanwhile.
    for (let i = 0; i < count; i++) {
      const at = blk.VIRTIO_BLK_HEADER_SIZE + i * blk.VIRTIO_BLK_DISCARD_SEGMENT_SIZE
      const sector = chain.readU64(at)
      const sectors = chain.readU32(at + 8)
      const flags = chain.readU32(at + 12)
      // virtio 1.3 §5.2.6.2: an unknown flag, and unmap on DISCARD, are UNSUPP.
      const known = operation === shared.WRITE_ZEROES ? blk.VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP : 0
      if ((flags & ~known) !== 0) return this.#fail(chain, operation, shared.UNSUPPORTED, blk.VIRTIO_BLK_S_UNSUPP)
      const length = sectors * blk.VIRTIO_BLK_SECTOR_SIZE
      if (sectors > shared.MAX_RANGE_SECTORS || !this.#inRange(sector, length)) {
        return this.#fail(chain, operation, shared.RANGE, blk.VIRTIO_BLK_S_IOERR)
      }
      request.ranges[i * 2] = sector * blk.VIRTIO_BLK_SECTOR_SIZE
      request.ranges[i * 2 + 1] = length
      request.unmap[i] = flags & blk.VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
    }
    request.operation = operation
    request.rangeCount = count
    request.total = 0
    request.syncing = false
    this.#rangeBegin(chain, request, 0)
  }

  #rangeBegin(chain: Chain, request: Request, range: number): void {
    let next = range
    while (next < request.rangeCount && request.ranges![next * 2 + 1] === 0) next++
    if (next === request.rangeCount) return this.#rangesDone(chain, request)
    request.range = next
    request.offset = request.ranges![next * 2]!
    request.done = 0
    const unmap = request.operation === shared.DISCARD || request.unmap![next] !== 0
    request.method = unmap && this.#data.discard ? PUNCH : ZERO_RANGE
    this.#rangeStep(chain, request)
  }

  #rangeStep(chain: Chain, request: Request): void {
    const { io } = this.#context
    const offset = request.offset + request.done
    const left = request.ranges![request.range * 2 + 1]! - request.done
    if (request.method === WRITE_ZEROES) {
      const buffer = zeroBuffer(io)
      io.writeBuffer(chain, this.#file, offset, buffer, 0, Math.min(left, ZEROES), false)
    } else {
      const mode = request.method === PUNCH ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE
      io.fallocate(chain, this.#file, mode | FALLOC_FL_KEEP_SIZE, offset, left)
    }
  }

  #zeroed(chain: Chain, request: Request, result: number): void {
    if (request.syncing) {
      if (result < 0) return this.#ioError(chain, request, result)
      return this.#succeed(chain, request.operation, 0, request.total)
    }
    if (result === EINTR || result === EAGAIN) return this.#rangeStep(chain, request)
    if (result === EOPNOTSUPP && request.method !== WRITE_ZEROES) {
      // DISCARD is advice: where the file can't, nothing needs to be written.
      if (request.operation === shared.DISCARD) return this.#rangeEnd(chain, request)
      request.method++
      return this.#rangeStep(chain, request)
    }
    if (result < 0) return this.#ioError(chain, request, result)
    if (request.method === WRITE_ZEROES) {
      if (result === 0) return this.#abort(chain, request, shared.IO)
      request.done += result
      if (request.done < request.ranges![request.range * 2 + 1]!) return this.#rangeStep(chain, request)
    }
    this.#rangeEnd(chain, request)
  }

  #rangeEnd(chain: Chain, request: Request): void {
    request.total += request.ranges![request.range * 2 + 1]!
    this.#rangeBegin(chain, request, request.range + 1)
  }

  #rangesDone(chain: Chain, request: Request): void {
    if (!this.#durable()) return this.#succeed(chain, request.operation, 0, request.total)
    request.syncing = true
    this.#context.io.fdatasync(chain, this.#file)
  }

  // ---- the ends of a request

  /** Whether a write must be on the disk when it completes. */
  #durable(): boolean {
    return !this.#data.unsafe && (!this.#canFlush || !this.#state.writeback)
  }

  /**
   * Whether `length` bytes from `sector` are whole blocks of the disk. `sector` is at most rounded above 2^53, never
   * below it.
   */
  #inRange(sector: number, length: number): boolean {
    if ((length & this.#sectorMask) !== 0) return false
    const { capacity } = this.#state
    if (sector > capacity || length / blk.VIRTIO_BLK_SECTOR_SIZE > capacity - sector) return false
    return (sector * blk.VIRTIO_BLK_SECTOR_SIZE) % this.#data.blockSize === 0
  }

  #succeed(chain: Chain, operation: number, written: number, bytes: number): void {
    chain.writeU8(chain.writable - 1, blk.VIRTIO_BLK_S_OK)
    this.#context.complete(chain, written + 1, operation, bytes)
  }

  #fail(chain: Chain, operation: number, error: number, status: number): void {
    chain.writeU8(chain.writable - 1, status)
    this.#context.countError(error)
    this.#context.complete(chain, 1, operation, 0)
  }

  #ioError(chain: Chain, request: Request, result: number): void {
    this.#abort(chain, request, result === ENOSPC || result === EDQUOT ? shared.NO_SPACE : shared.IO)
  }

  #abort(chain: Chain, request: Request, error: number): void {
    this.#release(request)
    this.#fail(chain, request.operation, error, blk.VIRTIO_BLK_S_IOERR)
  }

  #release(request: Request): void {
    if (request.bounce < 0) return
    const { bounce } = request
    request.bounce = -1
    BouncePool.give(bounce)
  }
}

export function createQueueHandler(context: QueueContext, data: shared.BlkQueueData): QueueHandler {
  return new BlkQueue(context, data)
}

/**
 * What commands do with the medium, step by step: each step is one I/O operation, and its end decides on the next. It
 * must not know CDBs or responses: whoever began a request is told how it ended.
 */
import type { Chain, DeviceIo } from '../../src/device/index.ts'
import { BOUNCE_SIZE, BouncePool, type BounceUser, ZEROES, zeroBuffer } from '../disk/bounce.ts'
import { FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE } from '../disk/image.ts'
import type { Request } from './request.ts'
import * as work from './request.ts'

const EINTR = -4
const EAGAIN = -11
export const ENOSPC = -28
const EOPNOTSUPP = -95
export const EDQUOT = -122

/** Bytes that one step of a request moves at most, so that a huge one doesn't keep the iothread from all others. */
const STEP = 1024 * 1024

/** How a request ended that went wrong, beside -errno. */
export const ENDED_SHORT = -4096
export const DIFFERENT = -4097

/** Who begins requests. `request.done` tells how far one came. */
export interface MediumUser {
  succeeded(chain: Chain, request: Request): void
  /** @param result -errno, {@link ENDED_SHORT} (nothing there inside the capacity) or {@link DIFFERENT} (at byte `request.done`) */
  failed(chain: Chain, request: Request, result: number): void
  cancelled(chain: Chain, request: Request): void
  /** The request that `chain` became. */
  requestOf(chain: Chain): Request
}

// Module state is per iothread: the bytes that a verification compares with.
let compared: Uint8Array | undefined

export class Medium implements BounceUser {
  readonly #user: MediumUser
  readonly #io: DeviceIo
  /** Where data begins in the device-readable and in the device-writable part. */
  readonly #outAt: number
  readonly #inAt: number

  constructor(user: MediumUser, io: DeviceIo, outAt: number, inAt: number) {
    this.#user = user
    this.#io = io
    this.#outAt = outAt
    this.#inAt = inAt
  }

  begin(chain: Chain, request: Request): void {
    request.busy = true
    request.done = 0
    request.syncing = false
    switch (request.work) {
      case work.DO_READ:
        if (request.flushFirst) return this.#io.fdatasync(chain, request.unit!.file!)
        return this.#transfer(chain, request)
      case work.DO_WRITE:
        return this.#transfer(chain, request)
      case work.DO_FLUSH:
        return this.#io.fdatasync(chain, request.unit!.file!)
      case work.DO_ZERO:
        return this.#beginRange(chain, request, 0)
      default:
        return BouncePool.take(this.#io, this, chain)
    }
  }

  /** The operation that was submitted for `chain` has ended. */
  completed(chain: Chain, request: Request, result: number): void {
    if (request.cancel !== 0) {
      this.release(request)
      return this.#user.cancelled(chain, request)
    }
    if (request.syncing || request.flushFirst) return this.#flushed(chain, request, result)
    switch (request.work) {
      case work.DO_READ:
      case work.DO_WRITE:
        return this.#transferred(chain, request, result)
      case work.DO_VERIFY:
        return this.#verified(chain, request, result)
      case work.DO_FLUSH:
        return result < 0 ? this.#fail(chain, request, result) : this.#succeed(chain, request)
      default:
        return this.#zeroed(chain, request, result)
    }
  }

  /** A bounce buffer that `chain` waited for is there. */
  bounceReady(chain: Chain, bounce: number): void {
    const request = this.#user.requestOf(chain)
    request.bounce = bounce
    if (request.cancel !== 0) {
      this.release(request)
      return this.#user.cancelled(chain, request)
    }
    switch (request.work) {
      case work.DO_VERIFY:
        return this.#verify(chain, request)
      case work.DO_PATTERN: {
        const { bytes } = BouncePool.buffer(bounce)
        const { blockSize } = request.unit!
        chain.copyFrom(this.#outAt, bytes, 0, blockSize)
        for (let filled = blockSize; filled < BOUNCE_SIZE; filled *= 2) bytes.copyWithin(filled, 0, filled)
        return this.#beginRange(chain, request, 0)
      }
      default:
        return this.#bounced(chain, request)
    }
  }

  /** Gives the buffer of a request back, if it has one. */
  release(request: Request): void {
    if (request.bounce < 0) return
    const { bounce } = request
    request.bounce = -1
    BouncePool.give(bounce)
  }

  /** The queue is gone: its requests were answered or abandoned. */
  leave(): void {
    BouncePool.leave(this)
  }

  // ---- READ and WRITE

  #transfer(chain: Chain, request: Request): void {
    const { done, offset } = request
    const unit = request.unit!
    const left = Math.min(request.total - done, STEP)
    const write = request.work === work.DO_WRITE
    const start = (write ? this.#outAt : this.#inAt) + done
    if (unit.lengthAlign > 1 && !chain.aligned(!write, start, left, unit.memoryAlign, unit.lengthAlign)) {
      BouncePool.take(this.#io, this, chain)
      return
    }
    if (write) this.#io.write(chain, unit.file!, offset + done, start, left, request.dsync)
    else this.#io.read(chain, unit.file!, offset + done, start, left)
  }

  #bounced(chain: Chain, request: Request): void {
    const { done, offset } = request
    const file = request.unit!.file!
    const buffer = BouncePool.buffer(request.bounce)
    const length = Math.min(request.total - done, BOUNCE_SIZE)
    if (request.work === work.DO_WRITE) {
      chain.copyFrom(this.#outAt + done, buffer.bytes, 0, length)
      this.#io.writeBuffer(chain, file, offset + done, buffer, 0, length, request.dsync)
    } else this.#io.readBuffer(chain, file, offset + done, buffer, 0, length)
  }

  #transferred(chain: Chain, request: Request, result: number): void {
    if (result < 0 && result !== EINTR && result !== EAGAIN) return this.#fail(chain, request, result)
    // Somebody cut the file. Without this it would be asked for ever.
    if (result === 0) return this.#fail(chain, request, ENDED_SHORT)
    if (result > 0) {
      if (request.bounce >= 0 && request.work === work.DO_READ)
        chain.copyTo(this.#inAt + request.done, BouncePool.buffer(request.bounce).bytes, 0, result)
      request.done += result
    }
    if (request.done < request.total) {
      if (request.bounce >= 0) this.#bounced(chain, request)
      else this.#transfer(chain, request)
      return
    }
    if (request.work === work.DO_READ || request.check === work.NO_CHECK) return this.#succeed(chain, request)
    // WRITE AND VERIFY
    request.work = work.DO_VERIFY
    request.done = 0
    if (request.bounce >= 0) this.#verify(chain, request)
    else BouncePool.take(this.#io, this, chain)
  }

  // ---- VERIFY

  #verify(chain: Chain, request: Request): void {
    const length = Math.min(request.total - request.done, BOUNCE_SIZE)
    const buffer = BouncePool.buffer(request.bounce)
    this.#io.readBuffer(chain, request.unit!.file!, request.offset + request.done, buffer, 0, length)
  }

  #verified(chain: Chain, request: Request, result: number): void {
    if (result === EINTR || result === EAGAIN) return this.#verify(chain, request)
    if (result <= 0) return this.#fail(chain, request, result === 0 ? ENDED_SHORT : result)
    if (request.check !== work.CHECK_MEDIUM) {
      const same = this.#compare(chain, request, BouncePool.buffer(request.bounce).bytes, result)
      request.done += same
      if (same < result) return this.#fail(chain, request, DIFFERENT)
    } else request.done += result
    if (request.done < request.total) this.#verify(chain, request)
    else this.#succeed(chain, request)
  }

  /** How many of `length` bytes from the medium are those of the driver. */
  #compare(chain: Chain, request: Request, medium: Uint8Array, length: number): number {
    compared ??= new Uint8Array(BOUNCE_SIZE)
    const { done } = request
    if (request.check === work.CHECK_DATA) chain.copyFrom(this.#outAt + done, compared, 0, length)
    else {
      const { blockSize } = request.unit!
      for (let at = 0; at < length; ) {
        const skip = (done + at) % blockSize
        const take = Math.min(blockSize - skip, length - at)
        chain.copyFrom(this.#outAt + skip, compared, at, take)
        at += take
      }
    }
    for (let i = 0; i < length; i++) if (medium[i] !== compared[i]) return i
    return length
  }

  // ---- UNMAP and WRITE SAME

  #beginRange(chain: Chain, request: Request, first: number): void {
    const ranges = request.ranges!
    let range = first
    while (range < request.rangeCount && ranges[range * 2 + 1] === 0) range++
    if (range === request.rangeCount) return this.#rangesDone(chain, request)
    request.range = range
    request.offset = ranges[range * 2]!
    request.total = ranges[range * 2 + 1]!
    request.done = 0
    request.method = request.unmap ? work.PUNCH : work.ZERO_RANGE
    this.#rangeStep(chain, request)
  }

  #rangeStep(chain: Chain, request: Request): void {
    const io = this.#io
    const file = request.unit!.file!
    const offset = request.offset + request.done
    const left = request.total - request.done
    if (request.work === work.DO_PATTERN) {
      const length = Math.min(left, BOUNCE_SIZE)
      // After a short write the rest begins in the middle of a pattern.
      const skip = request.done % request.unit!.blockSize
      io.writeBuffer(
        chain,
        file,
        offset,
        BouncePool.buffer(request.bounce),
        skip,
        Math.min(length, BOUNCE_SIZE - skip),
        false
      )
    } else if (request.method === work.WRITE_ZEROES) {
      io.writeBuffer(chain, file, offset, zeroBuffer(io), 0, Math.min(left, ZEROES), false)
    } else {
      const mode = request.method === work.PUNCH ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE
      io.fallocate(chain, file, mode | FALLOC_FL_KEEP_SIZE, offset, left)
    }
  }

  #zeroed(chain: Chain, request: Request, result: number): void {
    if (result === EINTR || result === EAGAIN) return this.#rangeStep(chain, request)
    const writes = request.work === work.DO_PATTERN || request.method === work.WRITE_ZEROES
    if (result === EOPNOTSUPP && !writes) {
      if (request.advice) return this.#beginRange(chain, request, request.range + 1)
      request.method++
      return this.#rangeStep(chain, request)
    }
    if (result < 0) return this.#fail(chain, request, result)
    if (writes) {
      if (result === 0) return this.#fail(chain, request, ENDED_SHORT)
      request.done += result
      if (request.done < request.total) return this.#rangeStep(chain, request)
    }
    this.#beginRange(chain, request, request.range + 1)
  }

  #rangesDone(chain: Chain, request: Request): void {
    if (!request.dsync) return this.#succeed(chain, request)
    request.syncing = true
    this.#io.fdatasync(chain, request.unit!.file!)
  }

  // ---- the ends

  #flushed(chain: Chain, request: Request, result: number): void {
    if (result < 0) return this.#fail(chain, request, result)
    if (request.syncing) return this.#succeed(chain, request)
    request.flushFirst = false
    this.#transfer(chain, request)
  }

  #succeed(chain: Chain, request: Request): void {
    this.release(request)
    this.#user.succeeded(chain, request)
  }

  #fail(chain: Chain, request: Request, result: number): void {
    this.release(request)
    this.#user.failed(chain, request, result)
  }
}

/** A command in work on a request queue, and the unit that it is for. */
import type { Chain, DeviceIo, IoFile } from '../../src/device/index.ts'
import { OTHER, type UnitState } from './shared.ts'

/** How a range of zeroes is made, from the cheapest: the next is tried when the file system can't. */
export const PUNCH = 0
export const ZERO_RANGE = 1
export const WRITE_ZEROES = 2

// What a request does with the medium.
export const DO_READ = 0
export const DO_WRITE = 1
export const DO_VERIFY = 2
export const DO_FLUSH = 3
/** Ranges become zeroes, or holes. */
export const DO_ZERO = 4
/** One block is written again and again. */
export const DO_PATTERN = 5

// BYTCHK: what a verification compares with; NO_CHECK = there is none.
export const NO_CHECK = -1
export const CHECK_MEDIUM = 0
export const CHECK_DATA = 1
export const CHECK_ONE_BLOCK = 3

/** One request. All fields keep their types, so that its shape never changes. */
export class Request {
  /** It is with the kernel, or waits for a buffer. */
  busy = false
  unit: Unit | undefined
  /** What it came in, which has its tag. */
  chain: Chain | undefined
  /** The response that it shall end with as soon as it can; 0 = none. */
  cancel = 0
  /** For the counters. */
  operation = OTHER
  work = DO_READ
  /** Where on the medium, in bytes; how much of how many bytes is done. */
  offset = 0
  done = 0
  total = 0
  /** Bytes of the driver's buffers that are used when all is well. */
  transferred = 0
  dsync = false
  /** A cache flush comes first (FUA of a read). */
  flushFirst = false
  /** What a verification compares with; of a write: the verification behind it. */
  check = NO_CHECK
  /** Index of the bounce buffer, -1 = none, and how many bytes it carries now. */
  bounce = -1
  carried = 0
  /** DO_ZERO: (offset, length) pairs in bytes, the one in work, and how it is made. */
  ranges: Float64Array | undefined
  rangeCount = 0
  range = 0
  method = PUNCH
  /** It may punch holes; and holes are all that is wanted, so nothing is written where there can't be one. */
  unmap = false
  advice = false
  /** The fdatasync behind it is under way. */
  syncing = false
}

/** One logical unit, as one queue has it. */
export class Unit {
  readonly lun: number
  readonly state: UnitState
  /** Of the file that is open here; 0 = none. */
  generation = 0
  file: IoFile | undefined
  blockSize = 0
  memoryAlign = 1
  lengthAlign = 1

  constructor(lun: number, state: UnitState) {
    this.lun = lun
    this.state = state
  }

  /** Opens the file that is plugged in now. Returns false when none is. */
  attach(io: DeviceIo): boolean {
    const { state } = this
    const generation = state.current
    if (generation === 0) return false
    if (generation === this.generation) return true
    this.detach(io)
    this.file = io.openFile(state.fd)
    this.blockSize = state.blockSize
    this.memoryAlign = state.memoryAlign
    this.lengthAlign = state.lengthAlign
    this.generation = generation
    return true
  }

  /** Nothing uses the file any more. */
  detach(io: DeviceIo): void {
    if (this.file !== undefined) io.closeFile(this.file)
    this.file = undefined
    this.generation = 0
  }
}

/**
 * The commands of a logical unit, one by one (SPC-4, SBC-3): what is in the CDB becomes an answer, or work for the
 * medium. Bits that have to be zero were checked before.
 */
import type { Chain } from '../../src/device/index.ts'
import * as commands from './commands.ts'
import * as inquiry from './inquiry.ts'
import { modeSelect, modeSense } from './mode.ts'
import type { Request, Unit } from './request.ts'
import * as work from './request.ts'
import type { RequestQueue } from './request-queue.ts'
import * as sense from './sense.ts'
import * as shared from './shared.ts'

const { ILLEGAL_REQUEST, Refusal } = sense

const REQUEST_SENSE = 0x03
const INQUIRY = 0x12
const REPORT_LUNS = 0xa0
const TEST_UNIT_READY = 0x00
const WRITE_SAME_10 = 0x41

/** Bits of byte 1. */
const FUA = 0x08
const UNMAP_BIT = 0x08
const NDOB = 0x01

/** Not an error of the guest's, so not counted as one. */
const NO_ERROR = -1

export class CommandSet {
  readonly #queue: RequestQueue
  readonly #cdb: Uint8Array
  readonly #view: DataView
  /** What the CDB at work says, by {@link CommandSet.extent}. */
  #lba = 0
  #count = 0
  #countAt = 0

  constructor(queue: RequestQueue) {
    this.#queue = queue
    this.#cdb = queue.cdb
    this.#view = new DataView(this.#cdb.buffer)
  }

  run(chain: Chain, unit: Unit, command: commands.Command): void {
    const queue = this.#queue
    switch (command.action) {
      case commands.READ:
        return this.#read(chain, unit)
      case commands.WRITE:
        return this.#write(chain, unit, work.NO_CHECK)
      case commands.SYNCHRONIZE_CACHE:
        return this.#synchronize(chain, unit)
      case commands.UNMAP:
        return this.#unmap(chain, unit)
      case commands.WRITE_SAME:
        return this.#writeSame(chain, unit)
      case commands.VERIFY:
        return this.#verify(chain, unit)
      case commands.WRITE_AND_VERIFY:
        return this.#writeAndVerify(chain, unit)
      case commands.TEST_UNIT_READY:
        if (!unit.state.stopped) return queue.good(chain, shared.OTHER, 0)
        return queue.check(chain, shared.OTHER, NO_ERROR, sense.NOT_READY, sense.INITIALIZING_COMMAND_REQUIRED)
      case commands.REQUEST_SENSE:
        return this.#requestSense(chain, unit)
      case commands.INQUIRY:
        return this.#inquiry(chain, unit)
      case commands.MODE_SENSE:
        return this.#answer(chain, modeSense(this.#cdb, this.#settings(unit)), this.#allocation())
      case commands.MODE_SELECT:
        return this.#modeSelect(chain, unit)
      case commands.START_STOP_UNIT:
        return this.#startStop(chain, unit)
      case commands.PREVENT_ALLOW:
        // The medium can't be removed anyway.
        return queue.good(chain, shared.OTHER, 0)
      case commands.READ_CAPACITY_10:
      case commands.READ_CAPACITY_16:
        return this.#readCapacity(chain, unit)
      case commands.GET_LBA_STATUS:
        return this.#lbaStatus(chain, unit)
      case commands.REPORT_LUNS:
        return this.#reportLuns(chain)
      case commands.REPORT_OPCODES: {
        const offers = ({ action }: commands.Command): boolean => action !== commands.UNMAP || unit.state.discard
        return this.#answer(chain, commands.reportOpcodes(this.#cdb, offers), this.#view.getUint32(6))
      }
      default:
        return this.#answer(chain, commands.reportTmfs(this.#cdb), this.#view.getUint32(6))
    }
  }

  /** A command for a unit that is not there, or for the one that only lists the others (SPC-4 §6.33, SAM-5 §4.7.4). */
  withoutUnit(chain: Chain, wellKnown: boolean): void {
    const queue = this.#queue
    const { cdb } = queue
    switch (cdb[0]) {
      case INQUIRY:
        if ((cdb[1]! & 1) !== 0 || cdb[2] !== 0) {
          if (wellKnown) return queue.invalidField(chain, sense.cdbField(2))
          break
        }
        return this.#answer(chain, inquiry.standardInquiry(wellKnown ? 'well-known' : 'none'), this.#view.getUint16(3))
      case REPORT_LUNS:
        return this.#reportLuns(chain)
      case REQUEST_SENSE:
        return this.#senseData(
          chain,
          wellKnown ? sense.NO_SENSE : ILLEGAL_REQUEST,
          wellKnown ? sense.NO_ADDITIONAL_SENSE : sense.LOGICAL_UNIT_NOT_SUPPORTED
        )
      case TEST_UNIT_READY:
        if (wellKnown) return queue.good(chain, shared.OTHER, 0)
        break
      default:
        if (!wellKnown) break
        return queue.check(
          chain,
          shared.OTHER,
          shared.UNSUPPORTED,
          ILLEGAL_REQUEST,
          sense.INVALID_COMMAND_OPERATION_CODE,
          sense.cdbField(0)
        )
    }
    queue.check(chain, shared.OTHER, shared.NO_UNIT, ILLEGAL_REQUEST, sense.LOGICAL_UNIT_NOT_SUPPORTED)
  }

  /** Answers a command by a pending unit attention condition (SAM-5 §5.14). Returns false when this one goes on. */
  tellAttention(chain: Chain, unit: Unit): boolean {
    const opcode = this.#cdb[0]
    if (opcode === INQUIRY || opcode === REPORT_LUNS || opcode === REQUEST_SENSE) return false
    const code = unit.state.takeAttention()
    if (code === 0) return false
    this.#queue.check(chain, shared.OTHER, NO_ERROR, sense.UNIT_ATTENTION, code)
    return true
  }

  // ---- reads and writes

  /** Takes logical block address and number of blocks out of the CDB at work. */
  #extent(): void {
    const view = this.#view
    switch (this.#cdb[0]! >>> 5) {
      case 0:
        this.#lba = view.getUint32(0) & 0x1f_ffff
        this.#count = this.#cdb[4]!
        this.#countAt = 4
        break
      case 4:
        // Beyond 2^53 it is rounded, never to something below it.
        this.#lba = view.getUint32(2) * 2 ** 32 + view.getUint32(6)
        this.#count = view.getUint32(10)
        this.#countAt = 10
        break
      case 5:
        this.#lba = view.getUint32(2)
        this.#count = view.getUint32(6)
        this.#countAt = 6
        break
      default:
        this.#lba = view.getUint32(2)
        this.#count = view.getUint16(7)
        this.#countAt = 7
    }
  }

  /** Whether the blocks of {@link #extent} exist and are not too many; the command is answered otherwise. */
  #inRange(chain: Chain, unit: Unit, operation: number, most: number): boolean {
    const { blocks } = unit.state
    if (this.#lba > blocks || this.#count > blocks - this.#lba) {
      this.#outOfRange(chain, operation)
      return false
    }
    if (this.#count * unit.blockSize <= most) return true
    this.#queue.invalidField(chain, sense.cdbField(this.#countAt))
    return false
  }

  #outOfRange(chain: Chain, operation: number): void {
    this.#queue.check(chain, operation, shared.RANGE, ILLEGAL_REQUEST, sense.LBA_OUT_OF_RANGE)
  }

  #request(chain: Chain, unit: Unit, what: number, operation: number): Request {
    const request = this.#queue.requestOf(chain)
    request.work = what
    request.operation = operation
    request.offset = this.#lba * unit.blockSize
    request.total = this.#count * unit.blockSize
    request.transferred = request.total
    request.dsync = false
    request.flushFirst = false
    request.check = work.NO_CHECK
    return request
  }

  #read(chain: Chain, unit: Unit): void {
    const queue = this.#queue
    this.#extent()
    const six = this.#countAt === 4
    if (six && this.#count === 0) this.#count = 256
    if (!this.#inRange(chain, unit, shared.READ, shared.MAX_TRANSFER_BYTES)) return
    if (this.#count * unit.blockSize > chain.writable - queue.inAt) return queue.overrun(chain, shared.READ)
    if (this.#count === 0) return queue.good(chain, shared.READ, 0)
    const request = this.#request(chain, unit, work.DO_READ, shared.READ)
    // From the medium: what is only in the cache goes there first.
    request.flushFirst = !six && (this.#cdb[1]! & FUA) !== 0 && !queue.unsafe
    queue.begin(chain, request, unit)
  }

  #write(chain: Chain, unit: Unit, check: number): void {
    const queue = this.#queue
    this.#extent()
    const six = this.#countAt === 4
    if (six && this.#count === 0) this.#count = 256
    if (unit.state.readOnly) return this.#writeProtected(chain, shared.WRITE)
    if (!this.#inRange(chain, unit, shared.WRITE, shared.MAX_TRANSFER_BYTES)) return
    if (this.#count * unit.blockSize > chain.readable - queue.outAt) return queue.overrun(chain, shared.WRITE)
    if (this.#count === 0) return queue.good(chain, shared.WRITE, 0)
    const request = this.#request(chain, unit, work.DO_WRITE, shared.WRITE)
    const force = !six && check === work.NO_CHECK && (this.#cdb[1]! & FUA) !== 0
    request.dsync = !queue.unsafe && (force || check !== work.NO_CHECK || !unit.state.writeback)
    request.check = check
    queue.begin(chain, request, unit)
  }

  /** BYTCHK, or undefined when the command is answered. */
  #byteCheck(chain: Chain, oneBlock: boolean): number | undefined {
    const check = (this.#cdb[1]! >>> 1) & 3
    if (check !== 2 && (check !== work.CHECK_ONE_BLOCK || oneBlock)) return check
    this.#queue.invalidField(chain, sense.cdbField(1, 2))
    return undefined
  }

  #writeAndVerify(chain: Chain, unit: Unit): void {
    const check = this.#byteCheck(chain, false)
    if (check !== undefined) this.#write(chain, unit, check)
  }

  #verify(chain: Chain, unit: Unit): void {
    const queue = this.#queue
    const check = this.#byteCheck(chain, true)
    if (check === undefined) return
    this.#extent()
    if (!this.#inRange(chain, unit, shared.VERIFY, shared.MAX_TRANSFER_BYTES)) return
    const needed =
      this.#count === 0 || check === work.CHECK_MEDIUM
        ? 0
        : check === work.CHECK_ONE_BLOCK
          ? unit.blockSize
          : this.#count * unit.blockSize
    if (needed > chain.readable - queue.outAt) return queue.overrun(chain, shared.VERIFY)
    if (this.#count === 0) return queue.good(chain, shared.VERIFY, 0)
    const request = this.#request(chain, unit, work.DO_VERIFY, shared.VERIFY)
    request.check = check
    request.transferred = needed
    queue.begin(chain, request, unit)
  }

  #synchronize(chain: Chain, unit: Unit): void {
    const queue = this.#queue
    this.#extent()
    // The whole file is flushed, whatever the range; 0 blocks are all that follow.
    if (!this.#inRange(chain, unit, shared.FLUSH, Number.POSITIVE_INFINITY)) return
    if (queue.unsafe) return queue.good(chain, shared.FLUSH, 0)
    const request = this.#request(chain, unit, work.DO_FLUSH, shared.FLUSH)
    request.transferred = 0
    queue.begin(chain, request, unit)
  }

  #writeProtected(chain: Chain, operation: number): void {
    this.#queue.check(chain, operation, shared.READ_ONLY, sense.DATA_PROTECT, sense.WRITE_PROTECTED)
  }

  // ---- UNMAP and WRITE SAME

  #writeSame(chain: Chain, unit: Unit): void {
    const queue = this.#queue
    const cdb = this.#cdb
    this.#extent()
    const unmap = (cdb[1]! & UNMAP_BIT) !== 0
    const withoutData = cdb[0] !== WRITE_SAME_10 && (cdb[1]! & NDOB) !== 0
    if (unmap && !unit.state.discard) return queue.invalidField(chain, sense.cdbField(1, 3))
    if (unit.state.readOnly) return this.#writeProtected(chain, shared.WRITE_SAME)
    // WSNZ of the block limits page: "all that follow" is none.
    if (this.#count === 0) return queue.invalidField(chain, sense.cdbField(this.#countAt))
    if (!this.#inRange(chain, unit, shared.WRITE_SAME, shared.MAX_RANGE_BYTES)) return
    const needed = withoutData ? 0 : unit.blockSize
    if (needed > chain.readable - queue.outAt) return queue.overrun(chain, shared.WRITE_SAME)
    const zero = withoutData || isZero(chain, queue.outAt, unit.blockSize)
    const request = this.#request(chain, unit, zero ? work.DO_ZERO : work.DO_PATTERN, shared.WRITE_SAME)
    request.ranges ??= new Float64Array(shared.MAX_RANGES * 2)
    const { ranges } = request
    ranges[0] = request.offset
    ranges[1] = request.total
    request.rangeCount = 1
    request.unmap = unmap
    request.advice = false
    request.dsync = !queue.unsafe && !unit.state.writeback
    request.transferred = needed
    queue.begin(chain, request, unit)
  }

  #unmap(chain: Chain, unit: Unit): void {
    const queue = this.#queue
    const { state, blockSize } = unit
    if (!state.discard && !state.readOnly)
      return queue.check(
        chain,
        shared.UNMAP,
        shared.UNSUPPORTED,
        ILLEGAL_REQUEST,
        sense.INVALID_COMMAND_OPERATION_CODE,
        sense.cdbField(0)
      )
    if (state.readOnly) return this.#writeProtected(chain, shared.UNMAP)
    const length = this.#view.getUint16(7)
    const list = this.#parameters(chain, length)
    if (list === undefined) return
    if (length === 0) return queue.good(chain, shared.UNMAP, 0)
    const request = this.#request(chain, unit, work.DO_ZERO, shared.UNMAP)
    request.ranges ??= new Float64Array(shared.MAX_RANGES * 2)
    const { ranges } = request
    const problem = unmapRanges(list, state.blocks, blockSize, ranges)
    if (problem instanceof Refusal) return queue.refuse(chain, problem)
    request.rangeCount = problem
    request.unmap = true
    request.advice = true
    request.dsync = !queue.unsafe && !state.writeback
    request.transferred = length
    queue.begin(chain, request, unit)
  }

  // ---- the unit about itself

  #requestSense(chain: Chain, unit: Unit): void {
    const code = unit.state.takeAttention()
    if (code !== 0) return this.#senseData(chain, sense.UNIT_ATTENTION, code)
    if (unit.state.stopped) return this.#senseData(chain, sense.NOT_READY, sense.INITIALIZING_COMMAND_REQUIRED)
    this.#senseData(chain, sense.NO_SENSE, sense.NO_ADDITIONAL_SENSE)
  }

  /** Sense data as data. */
  #senseData(chain: Chain, key: number, code: number): void {
    const bytes = new Uint8Array(sense.SENSE_LENGTH)
    sense.writeSense(bytes, key, code)
    this.#answer(chain, bytes, this.#cdb[4]!)
  }

  #inquiry(chain: Chain, unit: Unit): void {
    const cdb = this.#cdb
    const allocation = this.#view.getUint16(3)
    if ((cdb[1]! & 1) !== 0) return this.#answer(chain, inquiry.vitalProductData(cdb[2]!, unit.state), allocation)
    if (cdb[2] !== 0) return this.#queue.invalidField(chain, sense.cdbField(2))
    this.#answer(chain, inquiry.standardInquiry('disk'), allocation)
  }

  #readCapacity(chain: Chain, unit: Unit): void {
    const long = this.#cdb[0] === 0x9e
    const partial = (this.#cdb[long ? 14 : 8]! & 1) !== 0
    const lba = this.#view.getUint32(2) + (long ? this.#view.getUint32(6) : 0)
    // Without PMI, which is obsolete, an address means nothing.
    if (lba !== 0 && !partial) return this.#queue.invalidField(chain, sense.cdbField(2))
    if (!long) return this.#answer(chain, inquiry.readCapacity10(unit.state), Number.POSITIVE_INFINITY)
    this.#answer(chain, inquiry.readCapacity16(unit.state), this.#view.getUint32(10))
  }

  #lbaStatus(chain: Chain, unit: Unit): void {
    this.#extent()
    if (this.#lba >= unit.state.blocks) return this.#outOfRange(chain, shared.OTHER)
    this.#answer(chain, inquiry.lbaStatus(unit.state, this.#lba), this.#view.getUint32(10))
  }

  #reportLuns(chain: Chain): void {
    const { units } = this.#queue.state
    const luns = units.flatMap((unit, lun) => (unit.generation === 0 ? [] : [lun]))
    const list = inquiry.reportLuns(this.#cdb[2]!, luns)
    // It tells what that condition would only hint at (SPC-4 §6.33).
    if (!(list instanceof Refusal)) for (const unit of units) unit.clear(sense.REPORTED_LUNS_DATA_HAS_CHANGED)
    this.#answer(chain, list, this.#view.getUint32(6))
  }

  #startStop(chain: Chain, unit: Unit): void {
    const queue = this.#queue
    const start = (this.#cdb[4]! & 1) !== 0
    unit.state.stopped = !start
    const noFlush = (this.#cdb[4]! & 4) !== 0
    if (start || noFlush || queue.unsafe) return queue.good(chain, shared.OTHER, 0)
    this.#lba = 0
    this.#count = 0
    queue.begin(chain, this.#request(chain, unit, work.DO_FLUSH, shared.FLUSH), unit)
  }

  #settings({ state }: Unit) {
    const { readOnly, blocks, blockSize, writeback, writebackDefault } = state
    return { readOnly, blocks, blockSize, writeback, writebackDefault }
  }

  #modeSelect(chain: Chain, unit: Unit): void {
    const length = this.#allocation()
    const list = this.#parameters(chain, length)
    if (list === undefined) return
    const writeback = modeSelect(this.#cdb, list, this.#settings(unit))
    if (writeback instanceof Refusal) return this.#queue.refuse(chain, writeback)
    unit.state.writeback = writeback
    this.#queue.good(chain, shared.OTHER, length)
  }

  // ---- parameters in and out

  /** The length field of MODE SENSE and MODE SELECT. */
  #allocation(): number {
    return this.#cdb[0]! < 0x20 ? this.#cdb[4]! : this.#view.getUint16(7)
  }

  /** A copy of the parameter list; undefined when it isn't there and the command is answered. */
  #parameters(chain: Chain, length: number): Uint8Array | undefined {
    const { outAt } = this.#queue
    if (length > chain.readable - outAt) {
      this.#queue.overrun(chain, shared.OTHER)
      return undefined
    }
    const list = new Uint8Array(length)
    chain.copyFrom(outAt, list, 0, length)
    return list
  }

  /** Sends as much of `data` as the allocation length of the CDB allows. */
  #answer(chain: Chain, data: Uint8Array | sense.Refusal, allocation: number): void {
    const queue = this.#queue
    if (data instanceof Refusal) return queue.refuse(chain, data)
    const length = Math.min(data.length, allocation)
    if (length > chain.writable - queue.inAt) return queue.overrun(chain, shared.OTHER)
    chain.copyTo(queue.inAt, data, 0, length)
    queue.good(chain, shared.OTHER, length)
  }
}

/** Whether [start, start + length) of the device-readable part is zero. */
function isZero(chain: Chain, start: number, length: number): boolean {
  for (let at = 0; at < length; at += 4) if (chain.readU32(start + at) !== 0) return false
  return true
}

/**
 * The ranges of an UNMAP parameter list (SBC-3 §5.28), in bytes: how many. All are checked before the first is touched.
 * @param ranges takes (offset, length) pairs
 */
export function unmapRanges(
  list: Uint8Array,
  blocks: number,
  blockSize: number,
  ranges: Float64Array
): number | sense.Refusal {
  const view = new DataView(list.buffer, list.byteOffset, list.byteLength)
  const tooShort = new Refusal(ILLEGAL_REQUEST, sense.PARAMETER_LIST_LENGTH_ERROR)
  if (list.length < 8) return tooShort
  const descriptors = view.getUint16(2)
  // UNMAP DATA LENGTH does not count itself.
  if (view.getUint16(0) + 2 > list.length || descriptors + 8 > list.length || descriptors % 16 !== 0) return tooShort
  const count = descriptors / 16
  if (count > shared.MAX_RANGES)
    return new Refusal(ILLEGAL_REQUEST, sense.INVALID_FIELD_IN_PARAMETER_LIST, sense.parameterField(2))
  let total = 0
  for (let i = 0; i < count; i++) {
    const at = 8 + i * 16
    const lba = view.getUint32(at) * 2 ** 32 + view.getUint32(at + 4)
    const length = view.getUint32(at + 8)
    if (lba > blocks || length > blocks - lba) return new Refusal(ILLEGAL_REQUEST, sense.LBA_OUT_OF_RANGE)
    total += length * blockSize
    if (total > shared.MAX_RANGE_BYTES)
      return new Refusal(ILLEGAL_REQUEST, sense.INVALID_FIELD_IN_PARAMETER_LIST, sense.parameterField(at + 8))
    ranges[i * 2] = lba * blockSize
    ranges[i * 2 + 1] = length * blockSize
  }
  return count
}

/**
 * A request queue (virtio 1.3 §5.6.6.1): who a command is for, whether it can be served now, and its response. What a
 * command does is in command-set.ts and medium.ts. Whatever a guest sends is answered by a response.
 */
import type { Chain, QueueContext, QueueHandler } from '../../src/device/index.ts'
import * as virtio from '../../src/device/virtio-scsi.ts'
import { CommandSet } from './command-set.ts'
import { CDB_LENGTH, commandOf, withServiceAction, wrongBit } from './commands.ts'
import { decodeLun, NO_SUCH_TARGET, WELL_KNOWN } from './luns.ts'
import { DIFFERENT, EDQUOT, ENDED_SHORT, ENOSPC, Medium, type MediumUser } from './medium.ts'
import { DO_READ, DO_VERIFY, Request, Unit } from './request.ts'
import * as sense from './sense.ts'
import * as shared from './shared.ts'

export class RequestQueue implements QueueHandler, MediumUser {
  readonly state: shared.ScsiState
  readonly units: readonly Unit[]
  readonly unsafe: boolean
  /** The CDB at work, zeroes behind it. */
  readonly cdb: Uint8Array
  /** Where data begins in the device-readable and in the device-writable part. */
  readonly outAt: number
  readonly inAt: number
  readonly medium: Medium
  readonly #words: Uint32Array
  readonly #commands: CommandSet
  readonly #context: QueueContext
  readonly #requests: (Request | undefined)[]
  readonly #sense = new Uint8Array(sense.SENSE_LENGTH)
  readonly #senseLength: number
  #taken = 0

  constructor(context: QueueContext, data: shared.ScsiQueueData) {
    this.#context = context
    this.state = new shared.ScsiState(data.units, data.state)
    this.units = this.state.units.map((unit, lun) => new Unit(lun, unit))
    this.unsafe = data.unsafe
    this.#words = new Uint32Array(CDB_LENGTH / 4)
    this.cdb = new Uint8Array(this.#words.buffer)
    // A driver changes them before it starts the rings (§5.6.4).
    this.outAt = virtio.VIRTIO_SCSI_REQ_HEADER_SIZE + this.state.cdbSize
    this.inAt = virtio.VIRTIO_SCSI_RESP_HEADER_SIZE + this.state.senseSize
    this.#senseLength = Math.min(sense.SENSE_LENGTH, this.state.senseSize)
    this.medium = new Medium(this, context.io, this.outAt, this.inAt)
    this.#commands = new CommandSet(this)
    this.#requests = new Array<Request | undefined>(context.queueSize).fill(undefined)
    context.report({ kind: 'alive' } satisfies shared.Presence)
  }

  handle(chain: Chain): void {
    this.#taken++
    const { inAt, outAt } = this
    if (chain.writable < inAt) {
      // No room for a response: all that can be done is to give the chain back.
      this.#context.countError(shared.MALFORMED)
      return this.#context.complete(chain, 0, shared.OTHER, 0)
    }
    // Data both ways is for who negotiated VIRTIO_SCSI_F_INOUT, which no command here needs.
    if (chain.readable < outAt || (chain.readable > outAt && chain.writable > inAt))
      return this.respond(chain, virtio.VIRTIO_SCSI_S_FAILURE, shared.OTHER, shared.MALFORMED)
    const lun = decodeLun(chain.readU32(virtio.VIRTIO_SCSI_REQ_LUN), chain.readU32(virtio.VIRTIO_SCSI_REQ_LUN + 4))
    if (lun === NO_SUCH_TARGET)
      return this.respond(chain, virtio.VIRTIO_SCSI_S_BAD_TARGET, shared.OTHER, shared.NO_UNIT)
    const words = this.#words
    words[0] = chain.readU32(virtio.VIRTIO_SCSI_REQ_CDB)
    words[1] = chain.readU32(virtio.VIRTIO_SCSI_REQ_CDB + 4)
    words[2] = chain.readU32(virtio.VIRTIO_SCSI_REQ_CDB + 8)
    // What follows a CDB of 6 or 10 bytes means nothing.
    words[3] = this.cdb[0]! < 0x80 ? 0 : chain.readU32(virtio.VIRTIO_SCSI_REQ_CDB + 12)
    const unit = lun >= 0 && lun < this.units.length ? this.units[lun]! : undefined
    if (unit === undefined || (unit.generation !== unit.state.generation && !unit.attach(this.#context.io)))
      return this.#commands.withoutUnit(chain, lun === WELL_KNOWN)
    if (unit.generation === 0) return this.#commands.withoutUnit(chain, false)
    this.#command(chain, unit)
  }

  #command(chain: Chain, unit: Unit): void {
    const { cdb } = this
    const words = this.#words
    const { state } = unit
    const first = commandOf(cdb[0]!)
    if (state.attentions !== 0 && this.#commands.tellAttention(chain, unit)) return
    if (first === undefined)
      return this.check(
        chain,
        shared.OTHER,
        shared.UNSUPPORTED,
        sense.ILLEGAL_REQUEST,
        sense.INVALID_COMMAND_OPERATION_CODE,
        sense.cdbField(0)
      )
    const command = first.serviceAction < 0 ? first : withServiceAction(cdb[0]!, cdb[1]! & 0x1f)
    if (command === undefined) return this.invalidField(chain, sense.cdbField(1, 4))
    if (command.medium && state.stopped) {
      const code = sense.INITIALIZING_COMMAND_REQUIRED
      return this.check(chain, shared.OTHER, shared.STOPPED, sense.NOT_READY, code)
    }
    const { reserved } = command
    if (
      ((words[0]! & reserved[0]!) |
        (words[1]! & reserved[1]!) |
        (words[2]! & reserved[2]!) |
        (words[3]! & reserved[3]!)) !==
      0
    )
      return this.invalidField(chain, wrongBit(cdb, command))
    this.#commands.run(chain, unit, command)
  }

  completed(chain: Chain, result: number): void {
    this.medium.completed(chain, this.requestOf(chain), result)
  }

  message(message: unknown): void {
    const settle = message as shared.Settle
    if (settle.kind === 'settle') this.#settle(settle)
  }

  close(): void {
    // After a failure requests were abandoned in the middle; their buffers are the whole iothread's.
    this.medium.leave()
    for (const request of this.#requests) if (request !== undefined) this.medium.release(request)
    for (const unit of this.units) unit.detach(this.#context.io)
    this.#context.report({ kind: 'gone' } satisfies shared.Presence)
  }

  requestOf(chain: Chain): Request {
    const request = this.#requests[chain.head]
    if (request !== undefined) return request
    const created = new Request()
    this.#requests[chain.head] = created
    return created
  }

  /** Begins what `request` says about the medium. */
  begin(chain: Chain, request: Request, unit: Unit): void {
    request.unit = unit
    request.cancel = 0
    request.chain = chain
    this.medium.begin(chain, request)
  }

  succeeded(chain: Chain, request: Request): void {
    request.busy = false
    this.good(chain, request.operation, request.transferred)
  }

  failed(chain: Chain, request: Request, result: number): void {
    request.busy = false
    const { blockSize } = request.unit!
    const { operation } = request
    const reads = request.work === DO_READ || request.work === DO_VERIFY
    const moved = request.work === DO_READ ? request.done : 0
    if (result === DIFFERENT) {
      const code = sense.MISCOMPARE_DURING_VERIFY
      return this.check(chain, operation, shared.MISCOMPARED, sense.MISCOMPARE, code, sense.NO_FIELD, request.done)
    }
    if (result === ENOSPC || result === EDQUOT) {
      const code = sense.SPACE_ALLOCATION_FAILED_WRITE_PROTECT
      return this.check(chain, operation, shared.NO_SPACE, sense.DATA_PROTECT, code)
    }
    const error = result === ENDED_SHORT ? shared.END_OF_FILE : shared.IO
    const code = reads ? sense.UNRECOVERED_READ_ERROR : sense.WRITE_ERROR
    const lba = Math.floor((request.offset + request.done) / blockSize)
    this.check(chain, operation, error, sense.MEDIUM_ERROR, code, sense.NO_FIELD, lba, moved)
  }

  cancelled(chain: Chain, request: Request): void {
    request.busy = false
    this.respond(chain, request.cancel, request.operation, shared.ABORTED)
  }

  // ---- task management

  #settle({ id, lun, tag, cancel, detach }: shared.Settle): void {
    let tasks = 0
    for (const request of this.#requests) {
      if (request === undefined || !request.busy) continue
      if (lun >= 0 && request.unit!.lun !== lun) continue
      if (tag !== undefined && !hasTag(request.chain!, tag)) continue
      tasks++
      if (cancel !== undefined && request.cancel === 0) request.cancel = cancel
    }
    if (detach === true && tasks === 0) this.units[lun]!.detach(this.#context.io)
    this.#context.report({ kind: 'settled', id, tasks, taken: this.#taken } satisfies shared.Settled)
  }

  // ---- responses

  /** Bytes of the driver's buffers, in whichever direction. */
  room(chain: Chain): number {
    return chain.readable - this.outAt + (chain.writable - this.inAt)
  }

  /** GOOD. @param transferred bytes of the driver's buffers that were used */
  good(chain: Chain, operation: number, transferred: number): void {
    const incoming = chain.writable > this.inAt
    chain.writeU32(virtio.VIRTIO_SCSI_RESP_SENSE_LEN, 0)
    chain.writeU32(virtio.VIRTIO_SCSI_RESP_RESIDUAL, this.room(chain) - transferred)
    // Status qualifier, status GOOD and response OK.
    chain.writeU32(virtio.VIRTIO_SCSI_RESP_STATUS_QUALIFIER, 0)
    this.#context.complete(chain, this.inAt + (incoming ? transferred : 0), operation, transferred)
  }

  /** The command was not carried out, which is told by the transport and not by SCSI. */
  respond(chain: Chain, response: number, operation: number, error: number): void {
    chain.writeU32(virtio.VIRTIO_SCSI_RESP_SENSE_LEN, 0)
    chain.writeU32(virtio.VIRTIO_SCSI_RESP_RESIDUAL, this.room(chain))
    chain.writeU32(virtio.VIRTIO_SCSI_RESP_STATUS_QUALIFIER, response << 24)
    this.#context.countError(error)
    this.#context.complete(chain, this.inAt, operation, 0)
  }

  /** CHECK CONDITION. @param moved bytes that were read before it came to that */
  check(
    chain: Chain,
    operation: number,
    error: number,
    key: number,
    code: number,
    field = sense.NO_FIELD,
    information = -1,
    moved = 0
  ): void {
    if (error >= 0) this.#context.countError(error)
    sense.writeSense(this.#sense, key, code, field, information)
    chain.writeU32(virtio.VIRTIO_SCSI_RESP_SENSE_LEN, this.#senseLength)
    chain.writeU32(virtio.VIRTIO_SCSI_RESP_RESIDUAL, this.room(chain) - moved)
    chain.writeU32(virtio.VIRTIO_SCSI_RESP_STATUS_QUALIFIER, sense.CHECK_CONDITION << 16)
    chain.copyTo(virtio.VIRTIO_SCSI_RESP_SENSE, this.#sense, 0, this.#senseLength)
    this.#context.complete(chain, this.inAt + moved, operation, 0)
  }

  invalidField(chain: Chain, field: number): void {
    const { ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB } = sense
    this.check(chain, shared.OTHER, shared.INVALID_FIELD, ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB, field)
  }

  refuse(chain: Chain, { key, code, field }: sense.Refusal): void {
    this.check(chain, shared.OTHER, shared.INVALID_FIELD, key, code, field)
  }

  overrun(chain: Chain, operation: number): void {
    this.respond(chain, virtio.VIRTIO_SCSI_S_OVERRUN, operation, shared.OVERRUN)
  }
}

/** Guests could change it under way, which would hurt none but them. */
function hasTag(chain: Chain, tag: shared.TaskTag): boolean {
  return (
    chain.readU32(virtio.VIRTIO_SCSI_REQ_ID) === tag.low && chain.readU32(virtio.VIRTIO_SCSI_REQ_ID + 4) === tag.high
  )
}

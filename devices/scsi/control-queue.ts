/**
 * The control queue (virtio 1.3 §5.6.6.2): task management functions and asynchronous notification. What takes its time
 * is the control half's: it asks all request queues, wherever they are, and tells when it is done.
 */
import type { Chain, QueueContext, QueueHandler } from '../../src/device/index.ts'
import * as virtio from '../../src/device/virtio-scsi.ts'
import { decodeLun, NO_SUCH_TARGET, WELL_KNOWN } from './luns.ts'
import * as shared from './shared.ts'

export class ControlQueue implements QueueHandler {
  readonly #context: QueueContext
  readonly #state: shared.ScsiState
  /** Functions that are being carried out. */
  readonly #pending = new Map<number, Chain>()
  #nextId = 1

  constructor(context: QueueContext, data: shared.ScsiQueueData) {
    this.#context = context
    this.#state = new shared.ScsiState(data.units, data.state)
    context.report({ kind: 'alive' } satisfies shared.Presence)
  }

  handle(chain: Chain): void {
    const type = chain.readable >= 4 ? chain.readU32(0) : -1
    switch (type) {
      case virtio.VIRTIO_SCSI_T_TMF:
        return this.#function(chain)
      case virtio.VIRTIO_SCSI_T_AN_QUERY:
      case virtio.VIRTIO_SCSI_T_AN_SUBSCRIBE:
        return this.#notification(chain)
      default:
        return this.#malformed(chain)
    }
  }

  message(message: unknown): void {
    const { kind, id, response } = message as shared.TaskAnswer
    const chain = kind === 'answer' ? this.#pending.get(id) : undefined
    if (chain === undefined) return
    this.#pending.delete(id)
    this.#answer(chain, response)
  }

  close(): void {
    this.#context.report({ kind: 'gone' } satisfies shared.Presence)
  }

  #function(chain: Chain): void {
    if (chain.readable < virtio.VIRTIO_SCSI_TMF_SIZE || chain.writable < 1) return this.#malformed(chain)
    const subtype = chain.readU32(virtio.VIRTIO_SCSI_TMF_SUBTYPE)
    const lun = readLun(chain, virtio.VIRTIO_SCSI_TMF_LUN)
    if (lun === NO_SUCH_TARGET) return this.#refuse(chain, virtio.VIRTIO_SCSI_S_BAD_TARGET)
    switch (subtype) {
      case virtio.VIRTIO_SCSI_T_TMF_I_T_NEXUS_RESET:
        // Of the target, whatever the unit.
        break
      case virtio.VIRTIO_SCSI_T_TMF_ABORT_TASK:
      case virtio.VIRTIO_SCSI_T_TMF_ABORT_TASK_SET:
      case virtio.VIRTIO_SCSI_T_TMF_CLEAR_TASK_SET:
      case virtio.VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET:
      case virtio.VIRTIO_SCSI_T_TMF_QUERY_TASK:
      case virtio.VIRTIO_SCSI_T_TMF_QUERY_TASK_SET:
        if (!this.#exists(lun)) return this.#refuse(chain, virtio.VIRTIO_SCSI_S_INCORRECT_LUN)
        break
      default:
        // CLEAR ACA among them: there is no ACA (NORMACA of INQUIRY is zero).
        return this.#refuse(chain, virtio.VIRTIO_SCSI_S_FUNCTION_REJECTED)
    }
    const id = this.#nextId++
    this.#pending.set(id, chain)
    const tag = {
      low: chain.readU32(virtio.VIRTIO_SCSI_TMF_ID),
      high: chain.readU32(virtio.VIRTIO_SCSI_TMF_ID + 4),
    }
    this.#context.report({ kind: 'task', id, subtype, lun, tag } satisfies shared.TaskOrder)
  }

  /** There are no such events: nothing is asked for with success. */
  #notification(chain: Chain): void {
    if (chain.readable < virtio.VIRTIO_SCSI_AN_SIZE || chain.writable < virtio.VIRTIO_SCSI_AN_RESPONSE_SIZE)
      return this.#malformed(chain)
    const lun = readLun(chain, virtio.VIRTIO_SCSI_AN_LUN)
    const response =
      lun === NO_SUCH_TARGET
        ? virtio.VIRTIO_SCSI_S_BAD_TARGET
        : this.#exists(lun)
          ? virtio.VIRTIO_SCSI_S_OK
          : virtio.VIRTIO_SCSI_S_INCORRECT_LUN
    chain.writeU32(0, 0)
    chain.writeU8(4, response)
    if (response !== virtio.VIRTIO_SCSI_S_OK) this.#context.countError(shared.NO_UNIT)
    this.#context.complete(chain, virtio.VIRTIO_SCSI_AN_RESPONSE_SIZE, shared.TASK, 0)
  }

  #exists(lun: number): boolean {
    return lun === WELL_KNOWN || (this.#state.units[lun]?.generation ?? 0) !== 0
  }

  #refuse(chain: Chain, response: number): void {
    this.#context.countError(response === virtio.VIRTIO_SCSI_S_FUNCTION_REJECTED ? shared.UNSUPPORTED : shared.NO_UNIT)
    this.#answer(chain, response)
  }

  /** What it wanted can't be told, so neither for sure where its response is: that of a notification is the fifth byte. */
  #malformed(chain: Chain): void {
    this.#context.countError(shared.MALFORMED)
    if (chain.writable === 0) return this.#context.complete(chain, 0, shared.TASK, 0)
    const at = chain.writable >= virtio.VIRTIO_SCSI_AN_RESPONSE_SIZE ? virtio.VIRTIO_SCSI_AN_RESPONSE_SIZE - 1 : 0
    for (let i = 0; i < at; i++) chain.writeU8(i, 0)
    this.#answer(chain, virtio.VIRTIO_SCSI_S_FAILURE, at)
  }

  #answer(chain: Chain, response: number, at = 0): void {
    chain.writeU8(at, response)
    this.#context.complete(chain, at + 1, shared.TASK, 0)
  }
}

function readLun(chain: Chain, at: number): number {
  return decodeLun(chain.readU32(at), chain.readU32(at + 4))
}

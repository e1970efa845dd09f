/**
 * The event queue (virtio 1.3 §5.6.6.3): buffers of the driver's, one for each event. An event that finds no buffer is lost,
 * and the next buffer says so.
 */
import type { QueueContext, ReceiveHandler } from '../../src/device/index.ts'
import * as virtio from '../../src/device/virtio-scsi.ts'
import { encodeLun } from './luns.ts'
import {
  type EventMessage,
  type Missed,
  type Presence,
  type Received,
  type ScsiQueueData,
  ScsiState,
} from './shared.ts'

export class EventQueue implements ReceiveHandler {
  readonly #context: QueueContext
  readonly #state: ScsiState
  readonly #events: EventMessage[] = []
  readonly #bytes = new Uint8Array(virtio.VIRTIO_SCSI_EVENT_SIZE)
  readonly #view = new DataView(this.#bytes.buffer)
  #lastId = 0

  constructor(context: QueueContext, data: ScsiQueueData) {
    this.#context = context
    this.#state = new ScsiState(data.units, data.state)
    context.report({ kind: 'alive' } satisfies Presence)
  }

  message(message: unknown): void {
    const event = message as EventMessage
    if (event.kind !== 'event') return
    // It comes again when the answer was late.
    if (event.id > this.#lastId) {
      this.#lastId = event.id
      this.#events.push(event)
    }
    this.#context.report({ kind: 'received', id: event.id } satisfies Received)
  }

  /** Events were lost: a buffer to say so is waited for. */
  get waiting(): boolean {
    return this.#state.missed
  }

  receive(): number {
    let count = 0
    while (this.#events.length > 0) {
      const { event, lun, reason } = this.#events.shift()!
      count += this.#send(event, lun, reason)
    }
    // An event that says nothing else: the driver looks for itself then.
    if (this.#state.missed) count += this.#send(virtio.VIRTIO_SCSI_T_NO_EVENT, 0, 0)
    return count
  }

  release(): void {
    // Chains are taken when there is something for them, and given at once.
  }

  close(): void {
    if (this.#events.length > 0) this.#lose()
    this.#context.report({ kind: 'gone' } satisfies Presence)
  }

  #lose(): void {
    this.#state.missed = true
    this.#context.report({ kind: 'missed' } satisfies Missed)
  }

  /** Returns how many buffers were used. One that is too small is given back without an event. */
  #send(event: number, lun: number, reason: number): number {
    const chain = this.#context.take()
    const fits = chain !== undefined && chain.writable >= virtio.VIRTIO_SCSI_EVENT_SIZE
    if (!fits) {
      if (event !== virtio.VIRTIO_SCSI_T_NO_EVENT) this.#lose()
      if (chain === undefined) return 0
      this.#context.give(chain, 0)
      return 1
    }
    const missed = this.#state.takeMissed() ? virtio.VIRTIO_SCSI_T_EVENTS_MISSED : 0
    this.#view.setUint32(virtio.VIRTIO_SCSI_EVENT_EVENT, (event | missed) >>> 0, true)
    if (event === virtio.VIRTIO_SCSI_T_NO_EVENT) this.#bytes.fill(0, virtio.VIRTIO_SCSI_EVENT_LUN)
    else encodeLun(this.#bytes, virtio.VIRTIO_SCSI_EVENT_LUN, lun)
    this.#view.setUint32(virtio.VIRTIO_SCSI_EVENT_REASON, reason, true)
    chain.copyTo(0, this.#bytes, 0, virtio.VIRTIO_SCSI_EVENT_SIZE)
    this.#context.give(chain, virtio.VIRTIO_SCSI_EVENT_SIZE)
    return 1
  }
}

/**
 * The event queue (virtio 1.3 §5.6.6.3): buffers of the driver's, one for each event. An event that finds no buffer is lost,
 * and the next buffer says so.
 */
import type { QueueContext, ReceiveHandler } from '../../src/device/index.ts'
import * as virtio from '../../src/device/virtio-scsi.ts'
import { encodeLun } from './luns.ts'
import type { EventMessage, Missed, Presence } from './shared.ts'

export class EventQueue implements ReceiveHandler {
  readonly #context: QueueContext
  readonly #events: EventMessage[] = []
  readonly #bytes = new Uint8Array(virtio.VIRTIO_SCSI_EVENT_SIZE)
  readonly #view = new DataView(this.#bytes.buffer)
  #missed = false

  constructor(context: QueueContext) {
    this.#context = context
    context.report({ kind: 'alive' } satisfies Presence)
  }

  message(message: unknown): void {
    const event = message as EventMessage | Missed
    if (event.kind === 'event') this.#events.push(event)
    else if (event.kind === 'missed') this.#missed = true
  }

  /** Events were lost: a buffer to say so is waited for. */
  get waiting(): boolean {
    return this.#missed
  }

  receive(): number {
    let count = 0
    while (this.#events.length > 0) {
      const event = this.#events.shift()!
      if (this.#send(event.event, event.lun, event.reason)) count++
      else this.#lose()
    }
    // An event that says nothing else (§5.6.6.3.1: the driver looks for itself then).
    if (this.#missed && this.#send(virtio.VIRTIO_SCSI_T_NO_EVENT, 0, 0)) count++
    return count
  }

  release(): void {
    // Chains are taken when there is something for them, and given at once.
  }

  close(): void {
    this.#context.report({ kind: 'gone' } satisfies Presence)
  }

  #lose(): void {
    this.#missed = true
    this.#context.report({ kind: 'missed' } satisfies Missed)
  }

  /** Returns false when there is no buffer. One that is too small is given back without an event, which is lost. */
  #send(event: number, lun: number, reason: number): boolean {
    const chain = this.#context.take()
    if (chain === undefined) return false
    if (chain.writable < virtio.VIRTIO_SCSI_EVENT_SIZE) {
      this.#context.give(chain, 0)
      if (event !== virtio.VIRTIO_SCSI_T_NO_EVENT) this.#lose()
      return true
    }
    const missed = this.#missed ? virtio.VIRTIO_SCSI_T_EVENTS_MISSED : 0
    this.#view.setUint32(virtio.VIRTIO_SCSI_EVENT_EVENT, (event | missed) >>> 0, true)
    if (event === virtio.VIRTIO_SCSI_T_NO_EVENT) this.#bytes.fill(0, virtio.VIRTIO_SCSI_EVENT_LUN)
    else encodeLun(this.#bytes, virtio.VIRTIO_SCSI_EVENT_LUN, lun)
    this.#view.setUint32(virtio.VIRTIO_SCSI_EVENT_REASON, reason, true)
    chain.copyTo(0, this.#bytes, 0, virtio.VIRTIO_SCSI_EVENT_SIZE)
    this.#context.give(chain, virtio.VIRTIO_SCSI_EVENT_SIZE)
    this.#missed = false
    return true
  }
}

/**
 * What the control half has to be sure of that the queues know, on whatever iothreads they are: an event has come to its
 * queue; there are tasks like these, and they have ended (task management, a unit that was pulled out). It knows no
 * commands.
 *
 * Messages can be lost while a ring starts or stops, so a queue is asked again until it answers or is gone.
 */
import { VIRTIO_SCSI_EVENT_QUEUE, VIRTIO_SCSI_REQUEST_QUEUE } from '../../src/device/virtio-scsi.ts'
import type { EventMessage, Received, Report, Settle, Settled } from './shared.ts'

/** Milliseconds until a queue that does not answer is asked again, and between two questions whether tasks have ended. */
const PATIENCE_MS = 50
const PAUSE_MS = 1

/**
 * A queue that is busy all the time is asked so often at most: with each time it has taken what was in its ring before, or
 * a batch of that.
 */
const MOST_PASSES = 32

/** For {@link Settle.lun}. */
export const ALL_UNITS = -1

export type SettleOrder = Omit<Settle, 'kind' | 'id'>

type Message = Settle | EventMessage
type Answer = Settled | Received

interface Question {
  readonly queue: number
  answer(answer: Answer | undefined): void
}

export class Settlements {
  readonly #send: (queue: number, message: Message) => void
  /** Rings that are enabled, and handlers that have said that they are there. */
  readonly #active = new Set<number>()
  readonly #alive = new Set<number>()
  readonly #questions = new Map<number, Question>()
  #nextId = 1

  /** @param send as DeviceHost.send */
  constructor(send: (queue: number, message: Message) => void) {
    this.#send = send
  }

  /** No ring is enabled. */
  get idle(): boolean {
    return this.#active.size === 0
  }

  ringActive(queue: number, active: boolean): void {
    if (active) this.#active.add(queue)
    else this.#active.delete(queue)
  }

  /** A message of a queue. */
  reported(queue: number, report: Report): void {
    switch (report.kind) {
      case 'alive':
        this.#alive.add(queue)
        return
      case 'gone':
        this.#alive.delete(queue)
        for (const question of [...this.#questions.values()]) if (question.queue === queue) question.answer(undefined)
        return
      case 'settled':
      case 'received':
        this.#questions.get(report.id)?.answer(report)
    }
  }

  /**
   * Resolves when no request queue has a task like that any more: all of them are answered, and the driver can see it. To
   * how many there were. An order that neither cancels nor detaches only counts.
   */
  async settle(order: SettleOrder): Promise<number> {
    const queues = [...new Set([...this.#active, ...this.#alive])].filter((queue) => queue >= VIRTIO_SCSI_REQUEST_QUEUE)
    const counts = await Promise.all(queues.map((queue) => this.#settle(queue, order)))
    return counts.reduce((sum, count) => sum + count, 0)
  }

  async #settle(queue: number, order: SettleOrder): Promise<number> {
    const counts = order.cancel === undefined && order.detach !== true
    let tasks = 0
    let taken = -1
    for (let passes = 0; ; ) {
      const answer = await this.#ask<Settled>(queue, (id) => ({ kind: 'settle', id, ...order }))
      if (answer === undefined) {
        if (!this.#isThere(queue)) return tasks
        continue
      }
      tasks = Math.max(tasks, answer.tasks)
      if (counts && tasks > 0) return tasks
      if (answer.tasks > 0) await new Promise((resolve) => setTimeout(resolve, PAUSE_MS))
      // What is over has been published: messages come between rounds. But requests that were made available before may
      // not have been taken yet at the first answer; at the second one the queue has looked for them.
      else if (answer.taken === taken || ++passes > MOST_PASSES) return tasks
      taken = answer.taken
    }
  }

  /** Takes an event to its queue. Resolves to false when there is none. */
  async deliver(event: Omit<EventMessage, 'kind' | 'id'>): Promise<boolean> {
    const id = this.#nextId++
    while (this.#isThere(VIRTIO_SCSI_EVENT_QUEUE)) {
      const answer = await this.#ask(VIRTIO_SCSI_EVENT_QUEUE, () => ({ kind: 'event', id, ...event }), id)
      if (answer !== undefined) return true
    }
    return false
  }

  #isThere(queue: number): boolean {
    return this.#active.has(queue) || this.#alive.has(queue)
  }

  /** Undefined when there was no answer, or the queue is gone. */
  #ask<A extends Answer>(queue: number, message: (id: number) => Message, id = this.#nextId++): Promise<A | undefined> {
    return new Promise((resolve) => {
      const answer = (given: Answer | undefined): void => {
        clearTimeout(timer)
        this.#questions.delete(id)
        resolve(given as A | undefined)
      }
      const timer = setTimeout(answer, PATIENCE_MS, undefined)
      this.#questions.set(id, { queue, answer })
      this.#send(queue, message(id))
    })
  }
}

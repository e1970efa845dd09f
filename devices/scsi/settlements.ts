/**
 * What has to be asked of all request queues, on whatever iothreads they are: are there tasks like these, and have they
 * ended (task management, a unit that was pulled out). It belongs to the control half and knows no commands.
 *
 * Messages can be lost while a ring starts or stops, so a queue is asked again until it answers or is gone.
 */
import { VIRTIO_SCSI_REQUEST_QUEUE } from '../../src/device/virtio-scsi.ts'
import type { Report, Settle, Settled } from './shared.ts'

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

interface Question {
  readonly queue: number
  answer(settled: Settled | undefined): void
}

export class Settlements {
  readonly #send: (queue: number, message: Settle) => void
  /** Rings that are enabled, and handlers that have said that they are there. */
  readonly #active = new Set<number>()
  readonly #alive = new Set<number>()
  readonly #questions = new Map<number, Question>()
  #nextId = 1

  /** @param send as DeviceHost.send */
  constructor(send: (queue: number, message: Settle) => void) {
    this.#send = send
  }

  /** No ring is enabled. */
  get idle(): boolean {
    return this.#active.size === 0
  }

  isActive(queue: number): boolean {
    return this.#active.has(queue)
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
      const answer = await this.#ask(queue, order)
      if (answer === undefined) {
        if (!this.#active.has(queue) && !this.#alive.has(queue)) return tasks
        continue
      }
      tasks = Math.max(tasks, answer.tasks)
      if (counts && tasks > 0) return tasks
      if (answer.tasks > 0) await new Promise((resolve) => setTimeout(resolve, PAUSE_MS))
      // The second answer comes after what the first one saw was published; and the driver may have made requests
      // available before that the queue had not taken yet.
      else if (answer.taken === taken || ++passes > MOST_PASSES) return tasks
      taken = answer.taken
    }
  }

  /** Undefined when there was no answer, or the queue is gone. */
  #ask(queue: number, order: SettleOrder): Promise<Settled | undefined> {
    const id = this.#nextId++
    return new Promise((resolve) => {
      const answer = (settled: Settled | undefined): void => {
        clearTimeout(timer)
        this.#questions.delete(id)
        resolve(settled)
      }
      const timer = setTimeout(answer, PATIENCE_MS, undefined)
      this.#questions.set(id, { queue, answer })
      this.#send(queue, { kind: 'settle', id, ...order })
    })
  }
}

/**
 * What goes to the driver: groups of events, in order, each as soon as the driver has a buffer for it. Owns which keys are
 * down, and the waiting; it knows no commands.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import type { DeviceQueue } from '../../src/device/index.ts'
import {
  EV_KEY,
  EV_SYN,
  type InputEvent,
  SYN_REPORT,
  VIRTIO_INPUT_EVENT_SIZE,
  writeInputEvent,
} from '../../src/device/virtio-input.ts'

/** Why a command was not carried out; the message is for who gave it. */
export class CommandError extends Error {
  override readonly name = 'CommandError'
}

export class EventSender {
  /** Codes of keys and buttons that are down. */
  readonly pressed = new Set<number>()
  readonly #queue: DeviceQueue
  readonly #keyDelay: number
  readonly #signal: AbortSignal
  /** Aborted when the driver is gone. */
  #driver = new AbortController()

  /** @param keyDelay milliseconds @param signal the end of the device */
  constructor(queue: DeviceQueue, keyDelay: number, signal: AbortSignal) {
    this.#queue = queue
    this.#keyDelay = keyDelay
    this.#signal = signal
  }

  /** The driver is gone: whatever was down is up for the next one, and who waits need not. */
  reset(): void {
    this.pressed.clear()
    this.#driver.abort(new CommandError("the guest's driver is gone"))
    this.#driver = new AbortController()
  }

  /**
   * Sends events that belong together, and the end of the group. A group waits for buffers and is never dropped; who reads it
   * does nothing before its end (SYN_REPORT), so it need not go out at once (virtio 1.3 §5.8.6.2). One caller at a time.
   * @throws CommandError when no driver listens, it goes away meanwhile, or its buffers are none for events
   */
  async group(events: readonly InputEvent[]): Promise<void> {
    if (!this.#queue.active) throw new CommandError('no driver of a guest listens')
    const { signal } = this.#driver
    for (const event of [...events, { type: EV_SYN, code: SYN_REPORT, value: 0 }]) {
      // Only one chain at a time, which is completed at once: one that is kept would keep the ring from stopping.
      const chain = await this.#queue.next(signal)
      if (chain.writer.length < VIRTIO_INPUT_EVENT_SIZE) {
        chain.complete(0)
        throw new CommandError("the guest's driver gave a buffer that is too small for an event")
      }
      chain.operation('event', VIRTIO_INPUT_EVENT_SIZE)
      writeInputEvent(chain.writer, event)
      chain.complete()
      if (event.type === EV_KEY) this.#note(event)
    }
  }

  /** A key goes down or up; does nothing when it is so already. @throws CommandError as `group` */
  async key(code: number, down: boolean): Promise<void> {
    if (this.pressed.has(code) !== down) await this.group([{ type: EV_KEY, code, value: down ? 1 : 0 }])
  }

  /** All of them down one after the other, and up again the other way round. @throws CommandError as `group` */
  async press(codes: readonly number[]): Promise<void> {
    for (const code of codes) await this.key(code, true)
    await this.#pause()
    for (const code of codes.toReversed()) await this.key(code, false)
    await this.#pause()
  }

  #note({ code, value }: InputEvent): void {
    if (value === 0) this.pressed.delete(code)
    else this.pressed.add(code)
  }

  /** A guest that is slower than its keyboard loses keys. */
  async #pause(): Promise<void> {
    if (this.#keyDelay > 0) await sleep(this.#keyDelay, undefined, { signal: this.#signal })
  }
}

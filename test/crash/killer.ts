/**
 * Kills a process from a thread of its own, so that the blow falls whatever this one is doing: in the middle of a
 * message, of a batch, of a resume. The sleeping thread needs no timer of a blocked event loop.
 */
import { once } from 'node:events'
import { isMainThread, parentPort, Worker } from 'node:worker_threads'

interface Order {
  readonly pid: number
  readonly delayMs: number
  readonly done: Int32Array
}

export class Killer {
  readonly #worker: Worker
  /** [0] = 1 when the last order was carried out. */
  readonly #done = new Int32Array(new SharedArrayBuffer(4))

  constructor() {
    this.#worker = new Worker(new URL(import.meta.url))
    this.#worker.unref()
  }

  /**
   * SIGKILL after `delayMs` (fractions count). One order at a time; the process must not be reaped before `done`, or
   * its pid may be another's.
   */
  kill(pid: number, delayMs: number): void {
    Atomics.store(this.#done, 0, 0)
    this.#worker.postMessage({ pid, delayMs, done: this.#done } satisfies Order)
  }

  get done(): boolean {
    return Atomics.load(this.#done, 0) === 1
  }

  /** Blocks until the order is carried out. */
  join(): void {
    Atomics.wait(this.#done, 0, 0)
  }

  async close(): Promise<void> {
    const exit = once(this.#worker, 'exit')
    await this.#worker.terminate()
    await exit
  }
}

if (!isMainThread && parentPort !== null) {
  const pause = new Int32Array(new SharedArrayBuffer(4))
  parentPort.on('message', ({ pid, delayMs, done }: Order) => {
    if (delayMs > 0) Atomics.wait(pause, 0, 0, delayMs)
    try {
      process.kill(pid, 'SIGKILL')
    } catch {
      // It has ended by itself: whoever waits for it sees that.
    }
    Atomics.store(done, 0, 1)
    Atomics.notify(done, 0)
  })
}

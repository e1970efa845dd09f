/**
 * Which chain the handlers of a thread are at work on, in shared memory: a thread that a handler blocks can't be asked.
 * Only threads of a device's own write it.
 */

/** Both halves of the word, when they are unknown; no queue and no head has that number. */
const UNKNOWN = 0xffff

/** What a thread is at work on. */
export interface Work {
  /** Index of the queue whose handler was called, -1 = in none: a promise, a timer, the control half. */
  readonly queue: number
  /** Head of the chain, -1 = none or not known. */
  readonly chain: number
}

export class AtWork {
  readonly buffer: SharedArrayBuffer
  readonly #word: Int32Array

  constructor(buffer: SharedArrayBuffer = new SharedArrayBuffer(4)) {
    this.buffer = buffer
    this.#word = new Int32Array(buffer)
  }

  /** A handler is about to be called. @param chain -1 = it is not for one chain */
  begin(queue: number, chain: number): void {
    // ORDER: seq_cst, so that it is in memory before the handler, which may never come back. Plus 1: 0 is nothing.
    Atomics.store(this.#word, 0, ((queue << 16) | (chain & UNKNOWN)) + 1)
  }

  end(): void {
    // ORDER: as in `begin`.
    Atomics.store(this.#word, 0, 0)
  }

  /** From any thread. */
  get work(): Work {
    // ORDER: pairs with `begin`.
    const word = Atomics.load(this.#word, 0) - 1
    if (word < 0) return { queue: -1, chain: -1 }
    const chain = word & UNKNOWN
    return { queue: word >>> 16, chain: chain === UNKNOWN ? -1 : chain }
  }
}

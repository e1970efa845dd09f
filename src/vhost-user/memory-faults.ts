/** Listens to the SIGBUS guard: a front-end that truncates the memory it shared ends its session, not the daemon. */
import { native } from '../native.ts'
import { Readiness } from './readiness.ts'

export class MemoryFaults implements Disposable {
  readonly #fd = native.faultEventFd()
  readonly #readiness: Readiness
  #closed = false

  /** @param onFault called after one or more mappings lost pages */
  constructor(onFault: () => void) {
    this.#readiness = new Readiness(this.#fd)
    void this.#run(onFault)
  }

  [Symbol.dispose](): void {
    this.#closed = true
    this.#readiness.dispose()
  }

  async #run(onFault: () => void): Promise<void> {
    while (!this.#closed) {
      await this.#readiness.wait()
      if (native.eventfdRead(this.#fd) > 0) onFault()
    }
  }
}

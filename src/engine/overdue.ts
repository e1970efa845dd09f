/** Finds the chain of a queue that its device has forgotten. It must not know threads. */
import type { Chain } from '../device/index.ts'
import type { InFlightChains } from './in-flight-chains.ts'

export class Overdue {
  /** The limit, for messages. */
  readonly text: string
  readonly #limit: number
  /** The chain that was overdue at the last look, and when it was popped. */
  #suspect: Chain | undefined
  #poppedAt = 0

  /** @param timeoutMs how long a chain may be in flight */
  constructor(timeoutMs: number) {
    this.text = timeoutMs >= 1000 ? `${timeoutMs / 1000} s` : `${timeoutMs} ms`
    this.#limit = timeoutMs * 1000
  }

  /** The last look found a chain that is overdue if it still is at the next one. */
  get suspects(): boolean {
    return this.#suspect !== undefined
  }

  /**
   * A chain that is overdue, at two looks in a row: after a pause of the whole process (SIGSTOP, a suspended host) its
   * handler gets its turn first. @param now microseconds
   */
  look(chains: InFlightChains, now: number): Chain | undefined {
    const chain = chains.oldest
    const late = chain !== undefined && now - chain.poppedAt > this.#limit
    const again = late && chain === this.#suspect && chain.poppedAt === this.#poppedAt
    this.#suspect = late ? chain : undefined
    this.#poppedAt = late ? chain.poppedAt : 0
    return again ? chain : undefined
  }
}

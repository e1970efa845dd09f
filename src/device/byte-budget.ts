/** A limit for bytes that many tasks hold together. It must not know what they are for. */

interface Waiter {
  readonly bytes: number
  admit(): void
}

export class ByteBudget {
  #left: number
  /** In the order of their calls: a large one is not overtaken by small ones for ever. */
  readonly #waiters: Waiter[] = []

  constructor(bytes: number) {
    this.#left = bytes
  }

  /** Undefined: they are yours now. Otherwise when the promise resolves. @param bytes at most those of the whole budget */
  take(bytes: number): Promise<void> | undefined {
    if (this.#waiters.length === 0 && bytes <= this.#left) {
      this.#left -= bytes
      return undefined
    }
    return new Promise((admit) => {
      this.#waiters.push({ bytes, admit })
    })
  }

  give(bytes: number): void {
    this.#left += bytes
    for (let first = this.#waiters[0]; first !== undefined && first.bytes <= this.#left; first = this.#waiters[0]) {
      this.#left -= first.bytes
      this.#waiters.shift()
      first.admit()
    }
  }
}

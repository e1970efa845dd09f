/** A byte string as a sequence of decisions: what a fuzzed program reads. At its end every decision is 0. */
export class Input {
  readonly #bytes: Uint8Array
  #at = 0

  constructor(bytes: Uint8Array) {
    this.#bytes = bytes
  }

  get ended(): boolean {
    return this.#at >= this.#bytes.length
  }

  u8(): number {
    return this.#bytes[this.#at++] ?? 0
  }

  u16(): number {
    return this.u8() | (this.u8() << 8)
  }

  u32(): number {
    return (this.u16() | (this.u16() << 16)) >>> 0
  }

  /** 0 … limit − 1, of one byte. */
  below(limit: number): number {
    return this.u8() % limit
  }
}

/** What a program found: the code under test broke one of its promises. */
export class Violation extends Error {
  override readonly name = 'Violation'
}

/** @throws Violation unless `holds` */
export function promise(holds: boolean, what: string): asserts holds {
  if (!holds) throw new Violation(what)
}

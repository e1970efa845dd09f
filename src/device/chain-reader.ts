/**
 * The device-readable part of a chain as a stream: the {@link ChainReader} of a {@link DeviceChain}. It must not know
 * rings; who owns the chain says whether it may still be used.
 */
import type { Chain } from '../virtio/chain.ts'
import type { ChainReader } from './define.ts'
import { ChainError } from './errors.ts'

/**
 * What `bytes()` copies at most: a guest with 16 MiB of memory can make a chain of 4 GiB of it, and handlers that don't look
 * how long it is are the rule.
 */
const MAX_REST = 16 * 2 ** 20

/** Who lends the chain. */
export interface ChainOwner {
  /** @throws DeviceError when the chain is the driver's again */
  use(): Chain
}

export class SegmentReader implements ChainReader {
  readonly #owner: ChainOwner
  #at = 0

  constructor(owner: ChainOwner) {
    this.#owner = owner
  }

  get length(): number {
    return this.#owner.use().readable
  }

  get position(): number {
    return this.#at
  }

  get remaining(): number {
    return this.length - this.#at
  }

  seek(position: number): this {
    this.#at = checkPosition(position, this.length)
    return this
  }

  skip(count: number): this {
    this.#take(checkCount('skip', count))
    return this
  }

  u8(): number {
    const at = this.#at
    return this.#take(1).readU8(at)
  }

  u16(): number {
    const at = this.#at
    return this.#take(2).readU16(at)
  }

  u32(): number {
    const at = this.#at
    return this.#take(4).readU32(at)
  }

  u64(): bigint {
    const at = this.#at
    const chain = this.#take(8)
    return BigInt(chain.readU32(at)) | (BigInt(chain.readU32(at + 4)) << 32n)
  }

  bytes(count = this.#rest()): Uint8Array<ArrayBuffer> {
    const at = this.#at
    // Before anything is allocated: a count that the guest made up must not cost more than its chain has.
    const chain = this.#take(checkCount('bytes', count))
    const copy = new Uint8Array(count)
    chain.copyFrom(at, copy, 0, count)
    return copy
  }

  into(target: Uint8Array): number {
    const chain = this.#owner.use()
    const copied = chain.copyFrom(this.#at, target, 0, target.length)
    this.#at += copied
    return copied
  }

  #rest(): number {
    const { remaining } = this
    if (remaining <= MAX_REST) return remaining
    const has = `chain ${this.#owner.use().head} has ${remaining} more device-readable bytes`
    throw new ChainError(`${has}, the handler reads all of them and expects at most ${MAX_REST}`)
  }

  /** Moves on by `count` bytes. Returns the chain. @throws ChainError when it has fewer */
  #take(count: number): Chain {
    const chain = this.#owner.use()
    const at = this.#at
    if (count > chain.readable - at) {
      const has = `chain ${chain.head} has ${chain.readable} device-readable bytes`
      throw new ChainError(`${has}, the handler reads ${count} at ${at}`)
    }
    this.#at = at + count
    return chain
  }
}

/** @throws RangeError when it is not in 0 … length */
export function checkPosition(position: number, length: number): number {
  if (Number.isInteger(position) && position >= 0 && position <= length) return position
  throw new RangeError(`seek: ${position} is not a position from 0 to ${length}`)
}

/** @throws RangeError when it is no number of bytes */
export function checkCount(method: string, count: number): number {
  if (Number.isSafeInteger(count) && count >= 0) return count
  throw new RangeError(`${method}: ${count} is not a number of bytes`)
}

/**
 * The device-writable part of a chain as a stream: the {@link ChainWriter} of a {@link DeviceChain}. It must not know
 * rings. A chain that was abandoned (its ring stopped in the middle) swallows what is written: its memory may be in use
 * for something else.
 */
import type { Chain } from '../virtio/chain.ts'
import { checkCount, checkPosition } from './chain-reader.ts'
import type { ChainWriter } from './define.ts'
import { DeviceError } from './errors.ts'

/** Who lends the chain. */
export interface WritableOwner {
  readonly head: number
  /** Bytes of the device-writable part. @throws DeviceError when the chain was completed */
  writable(): number
  /** Undefined: it was abandoned. @throws DeviceError when it was completed */
  target(): Chain | undefined
}

export class SegmentWriter implements ChainWriter {
  readonly #owner: WritableOwner
  #at = 0
  #written = 0

  constructor(owner: WritableOwner) {
    this.#owner = owner
  }

  get length(): number {
    return this.#owner.writable()
  }

  get position(): number {
    return this.#at
  }

  get remaining(): number {
    return this.length - this.#at
  }

  get written(): number {
    return this.#written
  }

  seek(position: number): this {
    this.#at = checkPosition(position, this.length)
    return this
  }

  u8(value: number): this {
    checkValue('u8', value, 0xff)
    const at = this.#take(1)
    this.#owner.target()?.writeU8(at, value)
    return this
  }

  u16(value: number): this {
    checkValue('u16', value, 0xffff)
    return this.#little(value, 2)
  }

  u32(value: number): this {
    checkValue('u32', value, 0xffff_ffff)
    return this.#little(value, 4)
  }

  u64(value: bigint): this {
    if (typeof value !== 'bigint' || BigInt.asUintN(64, value) !== value)
      throw new RangeError(`u64: ${String(value)} is not a bigint from 0 to 2^64 - 1`)
    // Both or nothing.
    const at = this.#take(8)
    const chain = this.#owner.target()
    if (chain === undefined) return this
    put(chain, at, Number(BigInt.asUintN(32, value)), 4)
    put(chain, at + 4, Number(value >> 32n), 4)
    return this
  }

  bytes(source: Uint8Array): this {
    const at = this.#take(source.length)
    this.#owner.target()?.copyTo(at, source, 0, source.length)
    return this
  }

  fill(count: number, value = 0): this {
    checkValue('fill', value, 0xff)
    const at = this.#take(checkCount('fill', count))
    const chain = this.#owner.target()
    if (chain !== undefined) fill(chain, at, count, value)
    return this
  }

  #little(value: number, size: number): this {
    const at = this.#take(size)
    const chain = this.#owner.target()
    if (chain !== undefined) put(chain, at, value, size)
    return this
  }

  /** Moves on by `count` bytes. Returns where they begin. @throws DeviceError when the chain has fewer */
  #take(count: number): number {
    const length = this.#owner.writable()
    const at = this.#at
    if (count > length - at) {
      const has = `chain ${this.#owner.head} has ${length} device-writable bytes`
      throw new DeviceError('ERR_DEVICE_OVERRUN', `${has}, the handler writes ${count} at ${at}`)
    }
    this.#at = at + count
    if (this.#at > this.#written) this.#written = this.#at
    return at
  }
}

function checkValue(method: string, value: number, max: number): void {
  if (!Number.isInteger(value) || value < 0 || value > max)
    throw new RangeError(`${method}: ${String(value)} is not an integer from 0 to ${max}`)
}

/** Puts a little-endian number that is known to fit. */
function put(chain: Chain, at: number, value: number, size: number): void {
  const segment = chain.readableCount
  // The usual case: all in the first buffer.
  if (at + size <= chain.length[segment]!) {
    const { bytes } = chain.regions[chain.region[segment]!]!
    const offset = chain.offset[segment]! + at
    for (let i = 0; i < size; i++) bytes[offset + i] = value >>> (8 * i)
    return
  }
  for (let i = 0; i < size; i++) chain.writeU8(at + i, (value >>> (8 * i)) & 0xff)
}

/** Fills bytes that are known to be there, segment by segment. */
function fill(chain: Chain, at: number, count: number, value: number): void {
  let skip = at
  let left = count
  for (let segment = chain.readableCount; left > 0; segment++) {
    const length = chain.length[segment]!
    if (skip < length) {
      const take = Math.min(length - skip, left)
      const start = chain.offset[segment]! + skip
      chain.regions[chain.region[segment]!]!.bytes.fill(value, start, start + take)
      left -= take
      skip = 0
    } else skip -= length
  }
}

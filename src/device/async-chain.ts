/**
 * The {@link DeviceChain} that a module works on, and the book of those that are out. Chains are pooled and their
 * memory goes with their ring, so a module never holds one: a DeviceChain lets go of it when it is completed, or when
 * its ring ends first.
 */
import type { Chain } from '../virtio/chain.ts'
import { SegmentReader } from './chain-reader.ts'
import { SegmentWriter } from './chain-writer.ts'
import type { ChainReader, ChainWriter, DeviceChain } from './define.ts'
import { DeviceError } from './errors.ts'
import type { QueueContext } from './index.ts'

const OUT = 0
const COMPLETED = 1
const ABANDONED = 2

/** The names that a device counts by. */
export interface RequestNames {
  readonly operations: readonly string[]
  readonly errors: readonly string[]
}

export class AsyncChain implements DeviceChain {
  readonly head: number
  readonly chain: Chain
  readonly #book: ChainBook
  readonly #writable: number
  #state = OUT
  #reader: SegmentReader | undefined
  #writer: SegmentWriter | undefined
  #operation = -1
  #bytes = 0

  constructor(chain: Chain, book: ChainBook) {
    this.head = chain.head
    this.chain = chain
    this.#book = book
    this.#writable = chain.writable
  }

  get reader(): ChainReader {
    this.#reader ??= new SegmentReader(this)
    return this.#reader
  }

  get writer(): ChainWriter {
    this.#writer ??= new SegmentWriter(this)
    return this.#writer
  }

  operation(name: string, bytes = 0): void {
    this.#checkOut()
    const index = indexOf(this.#book.names.operations, name, 'operation')
    if (!Number.isSafeInteger(bytes) || bytes < 0) throw new RangeError(`operation: ${bytes} is not a number of bytes`)
    this.#operation = index
    this.#bytes = bytes
  }

  error(kind: string): void {
    this.#checkOut()
    const index = indexOf(this.#book.names.errors, kind, 'error')
    if (this.out) this.#book.context.countError(index)
  }

  complete(written: number = this.#writer?.written ?? 0): void {
    if (this.#state === COMPLETED) throw this.#completed('was completed twice')
    if (this.#state === ABANDONED) return
    if (!Number.isInteger(written) || written < 0)
      throw new RangeError(`complete: ${String(written)} is not a number of bytes`)
    if (written > this.#writable) {
      const has = `chain ${this.head} has ${this.#writable} device-writable bytes`
      throw new DeviceError('ERR_DEVICE_OVERRUN', `${has}, the handler completes it with ${written}`)
    }
    this.#state = COMPLETED
    this.#book.complete(this.chain, written, this.#operation, this.#bytes)
  }

  // ---- for those who lend it

  get out(): boolean {
    return this.#state === OUT
  }

  /** Its ring ended: what the module still does with it has no effect, and it can't read it any more. */
  abandon(): void {
    this.#state = ABANDONED
  }

  /**
   * For the reader. Zeroes in place of what was there would be taken for data, so this is where a late handler ends.
   */
  use(): Chain {
    this.#checkOut()
    if (this.#state === OUT) return this.chain
    throw new DeviceError('ERR_DEVICE_CHAIN_GONE', `chain ${this.head} is gone: its ring ended before it was completed`)
  }

  writable(): number {
    this.#checkOut()
    return this.#writable
  }

  target(): Chain | undefined {
    return this.#state === OUT ? this.chain : undefined
  }

  #checkOut(): void {
    if (this.#state === COMPLETED) throw this.#completed('was used after it was completed')
  }

  #completed(what: string): DeviceError {
    const { queueIndex } = this.#book.context
    return new DeviceError('ERR_DEVICE_COMPLETED_TWICE', `chain ${this.head} of queue ${queueIndex} ${what}`)
  }
}

/** The chains of one started ring that are out. */
export class ChainBook {
  readonly context: QueueContext
  readonly names: RequestNames
  /** A chain whose operation was not named is counted as the first one. */
  readonly #counted: boolean
  readonly #out: (AsyncChain | undefined)[]

  constructor(context: QueueContext, names: RequestNames, counted: boolean) {
    this.context = context
    this.names = names
    this.#counted = counted
    this.#out = new Array<AsyncChain | undefined>(context.queueSize).fill(undefined)
  }

  lend(chain: Chain): AsyncChain {
    const lent = new AsyncChain(chain, this)
    this.#out[chain.head] = lent
    return lent
  }

  /** @param operation -1: not named */
  complete(chain: Chain, written: number, operation: number, bytes: number): void {
    this.#out[chain.head] = undefined
    if (operation >= 0) this.context.complete(chain, written, operation, bytes)
    else if (this.#counted) this.context.complete(chain, written, 0, 0)
    else this.context.give(chain, written)
  }

  /** The ring ended. */
  abandon(): void {
    for (const chain of this.#out) chain?.abandon()
    this.#out.fill(undefined)
  }
}

function indexOf(names: readonly string[], name: string, what: string): number {
  const index = names.indexOf(name)
  if (index < 0) throw new TypeError(`${what}: there is no '${name}' in the device's ${what}s: ${names.join(', ')}`)
  return index
}

/**
 * The engine of one virtqueue without a ring: chains that a test made wait for the device's handler, and what the
 * handler completes is the test's again. As in the real one the handler is called later than the driver submits, and
 * chains are pooled.
 */
import {
  type Chain,
  ChainError,
  DeviceError,
  type QueueContext,
  type QueueHandler,
  type ReceiveHandler,
} from '../device/index.ts'
import { Chain as PooledChain } from '../virtio/chain.ts'
import { frame, writableBytes } from './plain-frame.ts'
import { PlainIo } from './plain-io.ts'
import type { Reply } from './reply.ts'

/** Chains that a handler gets before others get their turn. */
const BATCH = 16

/** What a queue needs of the device that it is one of. */
export interface PlainOwner {
  readonly features: bigint
  readonly timeoutMs: number
  readonly split: boolean
  readonly operations: readonly string[]
  readonly errors: readonly string[]
  counted(kind: 'operations' | 'errors', name: string): void
  reported(queue: number, message: unknown): void
  /** The device is at fault: its session ends. */
  failed(error: unknown): void
}

/** A request, from its submission on. */
interface Flight {
  readonly chain: PooledChain
  readonly answer: PromiseWithResolvers<Reply>
  timer: NodeJS.Timeout | undefined
}

/** One that waits for a free entry of the ring. */
interface Submission {
  readonly readable: readonly Uint8Array[]
  readonly writableLength: number
  readonly answer: PromiseWithResolvers<Reply>
}

export class PlainQueue implements QueueContext {
  readonly queueIndex: number
  readonly queueSize: number
  readonly features: bigint
  readonly io = new PlainIo((chain, result) => this.#ioEnded(chain, result))
  readonly #owner: PlainOwner
  /** Heads that are free; the one that was freed last is used next, as Linux does. */
  readonly #free: PooledChain[]
  readonly #submissions: Submission[] = []
  /** Framed and not yet taken, in order. */
  readonly #available: Flight[] = []
  /** Taken and not yet completed. */
  readonly #taken = new Map<Chain, Flight>()
  #handler: QueueHandler | ReceiveHandler | undefined
  #enabled = true
  #paused = false
  /** Why nothing is served any more. */
  #ended: unknown
  #roundDue = false
  #drained: (() => void)[] = []

  constructor(owner: PlainOwner, index: number, size: number) {
    this.#owner = owner
    this.queueIndex = index
    this.queueSize = size
    this.features = owner.features
    this.#free = Array.from({ length: size }, (_, i) => new PooledChain(size - 1 - i))
  }

  begin(handler: QueueHandler | ReceiveHandler): void {
    this.#handler = handler
    this.#schedule()
  }

  /** Puts a chain into the ring, or into the line for it. */
  submit(readable: readonly Uint8Array[], writableLength: number): Promise<Reply> {
    if (this.#ended !== undefined) return Promise.reject(this.#ended)
    const answer = Promise.withResolvers<Reply>()
    this.#submissions.push({ readable, writableLength, answer })
    this.#fill()
    return answer.promise
  }

  setEnabled(enabled: boolean): void {
    this.#enabled = enabled
    if (!enabled) this.#release()
    this.#schedule()
  }

  /** Takes no more chains; resolves when all that were taken are completed. */
  pause(): Promise<void> {
    this.#paused = true
    this.#release()
    if (this.#taken.size === 0) return Promise.resolve()
    return new Promise((resolve) => this.#drained.push(resolve))
  }

  resume(): void {
    this.#paused = false
    this.#schedule()
  }

  message(message: unknown): void {
    this.#guard(() => this.#handler?.message?.(message))
    this.#schedule()
  }

  /** Ends the ring, whatever is in flight: that is rejected with `reason`. */
  async end(reason: unknown): Promise<void> {
    this.fault(reason)
    await this.io.idle()
    const handler = this.#handler
    this.#handler = undefined
    handler?.close?.()
  }

  // ---- QueueContext

  get active(): boolean {
    return this.#enabled && !this.#paused && this.#ended === undefined
  }

  take(): Chain | undefined {
    return this.active ? this.#take() : undefined
  }

  untake(chain: Chain): void {
    const flight = this.#taken.get(chain)
    if (flight === undefined) throw new Error(`untake: chain ${chain.head} is not taken`)
    this.#leave(flight)
    this.#available.unshift(flight)
  }

  give(chain: Chain, written: number): void {
    if (this.#ended !== undefined) return
    const flight = this.#taken.get(chain)
    if (flight === undefined)
      throw new DeviceError('ERR_DEVICE_COMPLETED_TWICE', `chain ${chain.head} was completed twice`)
    if (written > chain.writable) {
      const has = `chain ${chain.head} has ${chain.writable} device-writable bytes`
      throw new DeviceError('ERR_DEVICE_OVERRUN', `${has}, the handler completes it with ${written}`)
    }
    const reply = { written, bytes: writableBytes(chain) }
    this.#leave(flight)
    this.#free.push(flight.chain)
    flight.answer.resolve(reply)
    this.#fill()
  }

  report(message: unknown): void {
    const { queueIndex } = this
    const copy: unknown = structuredClone(message)
    setImmediate(() => this.#guard(() => this.#owner.reported(queueIndex, copy)))
  }

  complete(chain: Chain, written: number, operation: number, _bytes: number): void {
    if (this.#ended !== undefined) return
    const name = this.#owner.operations[operation]
    if (name === undefined) throw new RangeError(`complete: the device has no operation ${operation}`)
    this.give(chain, written)
    this.#owner.counted('operations', name)
  }

  countError(kind: number): void {
    const name = this.#owner.errors[kind]
    if (name === undefined) throw new RangeError(`countError: the device has no error ${kind}`)
    this.#owner.counted('errors', name)
  }

  fail(error: unknown, chain?: Chain): void {
    if (this.#ended !== undefined) return
    const flight = chain && this.#taken.get(chain)
    if (flight !== undefined) {
      this.#leave(flight)
      flight.answer.reject(error)
    }
    // The guest's fault: its ring is broken, and nothing else.
    if (error instanceof ChainError) this.fault(new Error(`queue ${this.queueIndex} is broken`, { cause: error }))
    else this.#owner.failed(error)
  }

  // ---- rounds

  #schedule(): void {
    if (this.#roundDue) return
    this.#roundDue = true
    setImmediate(() => {
      this.#roundDue = false
      if (this.#round()) this.#schedule()
    })
  }

  /** Returns true when there may be more to do. */
  #round(): boolean {
    const handler = this.#handler
    if (handler === undefined || this.#paused || this.#ended !== undefined) return false
    if ('receive' in handler) return this.#receive(handler)
    const discards = !this.#enabled && handler.discard !== undefined
    if (!this.#enabled && !discards) return false
    const batch: Chain[] = []
    while (batch.length < BATCH) {
      const chain = this.#take()
      if (chain === undefined) break
      batch.push(chain)
    }
    if (handler.handleBatch !== undefined && !discards && batch.length > 0) {
      this.#guard(() => handler.handleBatch!(batch, batch.length), batch[0])
      return batch.length === BATCH
    }
    for (const chain of batch) {
      if (this.#ended !== undefined) return false
      this.#guard(() => (discards ? handler.discard!(chain) : handler.handle!(chain)), chain)
    }
    return batch.length === BATCH
  }

  #receive(handler: ReceiveHandler): boolean {
    if (!this.#enabled) return false
    let count = 0
    this.#guard(() => {
      count = handler.receive()
    })
    return count > 0
  }

  /** Moves what waits in line into the ring. */
  #fill(): void {
    while (this.#submissions.length > 0) {
      const chain = this.#free.pop()
      if (chain === undefined) return
      const { readable, writableLength, answer } = this.#submissions.shift()!
      frame(chain, readable, writableLength, this.#owner.split)
      this.#available.push({ chain, answer, timer: undefined })
      this.#schedule()
    }
  }

  #take(): Chain | undefined {
    const flight = this.#available.shift()
    if (flight === undefined) return undefined
    const { chain } = flight
    chain.inFlight = true
    this.#taken.set(chain, flight)
    const { timeoutMs } = this.#owner
    if (timeoutMs > 0) flight.timer = setTimeout(() => this.#stuck(chain), timeoutMs).unref()
    return chain
  }

  #leave(flight: Flight): void {
    clearTimeout(flight.timer)
    flight.chain.inFlight = false
    this.#taken.delete(flight.chain)
    if (this.#taken.size === 0) for (const drained of this.#drained.splice(0)) drained()
  }

  #stuck(chain: Chain): void {
    const since = `has not been completed for ${this.#owner.timeoutMs / 1000} s`
    this.fail(new DeviceError('ERR_DEVICE_STUCK', `chain ${chain.head} of queue ${this.queueIndex} ${since}`), chain)
  }

  #ioEnded(chain: Chain, result: number): void {
    if (this.#ended !== undefined) return
    const handler = this.#handler as QueueHandler | undefined
    this.#guard(() => handler?.completed?.(chain, result), chain)
  }

  #release(): void {
    const handler = this.#handler
    if (handler !== undefined && 'receive' in handler) this.#guard(() => handler.release())
  }

  /** Calls the device. */
  #guard(call: () => void, chain?: Chain): void {
    try {
      call()
    } catch (error) {
      this.fail(error, chain)
    }
  }

  // ---- the end

  /** Serves nothing any more: all that is there, and all that comes, is rejected with `reason`. */
  fault(reason: unknown): void {
    if (this.#ended !== undefined) return
    this.#ended = reason
    const waiting = [...this.#taken.values(), ...this.#available.splice(0), ...this.#submissions.splice(0)]
    for (const flight of this.#taken.values()) this.#leave(flight)
    for (const { answer } of waiting) {
      // A test need not wait for what it gave away.
      answer.promise.catch(() => {})
      answer.reject(reason)
    }
  }
}

/**
 * The queue half of async devices: one object per started ring, between the engine and the module's handlers. The
 * module may be slower than its driver lives: what it does with a chain of a ring that ended has no effect.
 */
import type { Chain } from '../virtio/chain.ts'
import { type AsyncChain, ChainBook, type RequestNames } from './async-chain.ts'
import type { AsyncQueue, BufferSource } from './async-queue.ts'
import type { DeviceChain, DeviceHandlers } from './define.ts'
import { DeviceError } from './errors.ts'
import type { DeviceLogger, QueueContext, QueueHandler, ReceiveHandler } from './index.ts'

/** Between two lines about late failures. */
const QUIET_MS = 5000

/** What the rings of one device have in common. */
export interface RingEnvironment {
  readonly handlers: DeviceHandlers
  readonly names: RequestNames
  readonly latecomers: Latecomers
  readonly lateFailures: LateFailures
}

/**
 * Handlers that are still at work on chains of rings that ended. A driver that comes back has its requests done again,
 * and newer ones: those must not be overtaken by what an old handler is about to write.
 */
export class Latecomers {
  readonly #timeoutMs: number
  #over: Promise<void> | undefined

  /** @param timeoutMs who takes longer is not waited for; 0 = for ever */
  constructor(timeoutMs: number) {
    this.#timeoutMs = timeoutMs
  }

  /** Undefined: there are none. */
  get over(): Promise<void> | undefined {
    return this.#over
  }

  add(settled: Promise<void>): void {
    const over = this.#both(this.#over, this.#limited(settled)).then(() => {
      if (this.#over === over) this.#over = undefined
    })
    this.#over = over
  }

  async #both(first: Promise<void> | undefined, second: Promise<void>): Promise<void> {
    await first
    await second
  }

  #limited(settled: Promise<void>): Promise<void> {
    if (this.#timeoutMs === 0) return settled
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, this.#timeoutMs)
      settled.then(() => {
        clearTimeout(timer)
        resolve()
      })
    })
  }
}

/**
 * Tells of handlers that fail after their ring ended. A front-end that leaves with a thousand requests in work, and comes back to
 * do so again, must not fill the log: only now and then one is told of.
 */
export class LateFailures {
  readonly #log: DeviceLogger
  #quietUntil = 0
  #leftOut = 0

  constructor(log: DeviceLogger) {
    this.#log = log
  }

  tell(details: object): void {
    const now = performance.now()
    if (now < this.#quietUntil) {
      this.#leftOut++
      return
    }
    this.#quietUntil = now + QUIET_MS
    const more = this.#leftOut > 0 && { leftOut: this.#leftOut }
    this.#leftOut = 0
    this.#log.warn({ ...details, ...more }, 'a handler failed after its ring ended')
  }
}

/** The ring of a `requests` queue. */
export class RequestRing implements QueueHandler {
  readonly #context: QueueContext
  readonly #queue: AsyncQueue
  readonly #environment: RingEnvironment
  readonly #handlers: DeviceHandlers
  readonly #book: ChainBook
  /** Requests wait for latecomers. */
  #before: Promise<void> | undefined
  /** Handlers whose promises are not settled. */
  #running = 0
  #closed = false
  /** After `close`: called when the last of them is. */
  #idle: (() => void) | undefined

  constructor(context: QueueContext, queue: AsyncQueue, environment: RingEnvironment) {
    this.#context = context
    this.#queue = queue
    this.#environment = environment
    this.#handlers = environment.handlers
    this.#book = new ChainBook(context, environment.names, true)
    this.#before = environment.latecomers.over
    this.#before?.then(() => {
      this.#before = undefined
    })
  }

  handle(chain: Chain): void {
    const lent = this.#book.lend(chain)
    if (this.#before === undefined) this.#start(lent)
    else this.#startLater(lent, this.#before)
  }

  close(): void {
    this.#closed = true
    this.#book.abandon()
    if (this.#running === 0) return
    this.#environment.latecomers.add(
      new Promise((resolve) => {
        this.#idle = resolve
      })
    )
  }

  protected discardBy(discard: NonNullable<DeviceHandlers['discard']>, chain: Chain): void {
    const lent = this.#book.lend(chain)
    discard.call(this.#handlers, lent, this.#queue)
    if (lent.out) lent.complete()
  }

  /** What the module throws at once goes to the engine, which knows what it was doing. */
  #start(chain: AsyncChain): void {
    const result: unknown = this.#handlers.handle!(chain, this.#queue)
    if (result !== undefined) this.#settle(chain, result)
    else if (chain.out) chain.complete()
  }

  async #startLater(chain: AsyncChain, before: Promise<void>): Promise<void> {
    await before
    if (this.#closed) return
    try {
      this.#start(chain)
    } catch (error) {
      this.#fail(error, chain)
    }
  }

  async #settle(chain: AsyncChain, result: unknown): Promise<void> {
    this.#running++
    try {
      await result
      if (chain.out) chain.complete()
    } catch (error) {
      this.#fail(error, chain)
    }
    this.#running--
    if (this.#running === 0) this.#idle?.()
  }

  #fail(error: unknown, chain: AsyncChain): void {
    if (!this.#closed) return this.#context.fail(error, chain.chain)
    if (error instanceof DeviceError && error.code === 'ERR_DEVICE_CHAIN_GONE') return
    // There is no session any more that it could end.
    this.#environment.lateFailures.tell({ err: error, queue: this.#queue.index, chain: chain.head })
  }
}

/**
 * One whose chains are discarded while it is disabled. The engine looks for the method, so it is a class of its own.
 */
export class DiscardingRing extends RequestRing {
  readonly #discard: NonNullable<DeviceHandlers['discard']>

  constructor(context: QueueContext, queue: AsyncQueue, environment: RingEnvironment) {
    super(context, queue, environment)
    this.#discard = environment.handlers.discard!
  }

  discard(chain: Chain): void {
    this.discardBy(this.#discard, chain)
  }
}

/** The ring of a `buffers` queue. Chains that the module took keep the ring from draining until they are completed. */
export class BufferRing implements ReceiveHandler, BufferSource {
  readonly #context: QueueContext
  readonly #queue: AsyncQueue
  readonly #book: ChainBook

  constructor(context: QueueContext, queue: AsyncQueue, environment: RingEnvironment) {
    this.#context = context
    this.#queue = queue
    this.#book = new ChainBook(context, environment.names, false)
    queue.begin(this)
  }

  get waiting(): boolean {
    return this.#queue.waiting
  }

  take(): DeviceChain | undefined {
    const chain = this.#context.take()
    return chain && this.#book.lend(chain)
  }

  receive(): number {
    let count = 0
    while (this.#queue.waiting) {
      const chain = this.take()
      if (chain === undefined) break
      this.#queue.serve(chain)
      count++
    }
    return count
  }

  /** Those who wait hold no chain, and what was taken is the module's to complete. */
  release(): void {}

  close(): void {
    this.#queue.end(this)
    this.#book.abandon()
  }
}

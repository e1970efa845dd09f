/**
 * One virtqueue of an async device as the module sees it, as long as the device lives: rings of drivers come and go
 * behind it (async-rings.ts). It keeps the line of those who wait for a chain.
 */
import type { DeviceChain, DeviceQueue } from './define.ts'

/** The ring of a `buffers` queue while a driver has it started. */
export interface BufferSource {
  take(): DeviceChain | undefined
}

/** Somebody in `next`. */
interface Waiter {
  resolve(chain: DeviceChain): void
  /** Called when it is out of the line, one way or the other. */
  left(): void
  reject(reason: unknown): void
}

export class AsyncQueue implements DeviceQueue {
  readonly index: number
  readonly name: string
  readonly buffers: boolean
  active = false
  readonly #signal: AbortSignal
  /** In the order of their calls. */
  readonly #waiters = new Set<Waiter>()
  #ring: BufferSource | undefined

  /** @param signal ends all waiting */
  constructor(index: number, name: string, buffers: boolean, signal: AbortSignal) {
    this.index = index
    this.name = name
    this.buffers = buffers
    this.#signal = signal
    if (buffers) signal.addEventListener('abort', () => this.#abort(), { once: true })
  }

  get waiting(): boolean {
    return this.#waiters.size > 0
  }

  take(): DeviceChain | undefined {
    this.#checkBuffers('take')
    return this.#ring?.take()
  }

  next(signal?: AbortSignal): Promise<DeviceChain> {
    try {
      this.#checkBuffers('next')
      this.#signal.throwIfAborted()
      signal?.throwIfAborted()
    } catch (error) {
      return Promise.reject(error)
    }
    const chain = this.waiting ? undefined : this.#ring?.take()
    if (chain !== undefined) return Promise.resolve(chain)
    return new Promise((resolve, reject) => {
      const aborted = (): void => {
        this.#leave(waiter)
        reject(signal!.reason)
      }
      const left = (): void => signal?.removeEventListener('abort', aborted)
      const waiter: Waiter = { resolve, reject, left }
      signal?.addEventListener('abort', aborted)
      this.#waiters.add(waiter)
    })
  }

  // ---- for the rings

  begin(ring: BufferSource): void {
    this.#ring = ring
  }

  end(ring: BufferSource): void {
    if (this.#ring === ring) this.#ring = undefined
  }

  /** Gives the chain to who has waited longest. */
  serve(chain: DeviceChain): void {
    const [waiter] = this.#waiters
    this.#leave(waiter!)
    waiter!.resolve(chain)
  }

  #leave(waiter: Waiter): void {
    this.#waiters.delete(waiter)
    waiter.left()
  }

  #abort(): void {
    for (const waiter of this.#waiters) {
      this.#leave(waiter)
      waiter.reject(this.#signal.reason)
    }
  }

  #checkBuffers(method: string): void {
    if (this.buffers) return
    const problem = `${method}: queue ${this.index} (${this.name}) is of kind 'requests': its chains go to handle`
    throw new TypeError(`${problem}. Describe it with kind: 'buffers'`)
  }
}

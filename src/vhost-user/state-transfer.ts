/**
 * The device's own state on its way from or to another back-end (vhost-user.rst "Migrating back-end state"): a pipe, as
 * QEMU makes it, or anything that is read to its end. The other end may be slow, so nothing waits for it but
 * CHECK_DEVICE_STATE. It owns the fd until it closed it, which tells the reader that this was all.
 */
import { native } from '../native.ts'
import { ProtocolError } from './errors.ts'
import { openStateEnd, type StateEnd } from './state-end.ts'

/** Far more than any device has: filters and counters. */
export const MAX_STATE_BYTES = 64 * 2 ** 20

const O_RDONLY = 0
const O_WRONLY = 1

export class StateTransfer {
  /** What came of the last one; undefined: there was none, or CHECK_DEVICE_STATE asked for it. */
  #outcome: Promise<unknown> | undefined
  #running: AbortController | undefined

  get running(): boolean {
    return this.#running !== undefined
  }

  /** Writes what `state` returns to `fd`, which it takes over. @throws ProtocolError when that can't begin */
  save(fd: number, state: () => Promise<Uint8Array>): void {
    const end = this.#open(fd, O_WRONLY)
    this.#run(end, async (signal) => end.write(await state(), signal))
  }

  /** Reads `fd`, which it takes over, to its end, and gives all to `take`. @throws ProtocolError when that can't begin */
  load(fd: number, take: (state: Uint8Array) => Promise<void>): void {
    const end = this.#open(fd, O_RDONLY)
    this.#run(end, async (signal) => take(await collect(end.read(signal))))
  }

  /** CHECK_DEVICE_STATE: waits for its end. @throws ProtocolError when it failed, or there was none */
  async check(): Promise<void> {
    const outcome = this.#outcome
    if (outcome === undefined) throw stateError('there was no transfer')
    this.#outcome = undefined
    const error = await outcome
    if (error !== undefined) throw stateError(`it failed: ${error instanceof Error ? error.message : error}`, error)
  }

  /** The session ends, or the device is reset: nothing of it matters any more. */
  abort(): void {
    this.#running?.abort()
    this.#running = undefined
    this.#outcome = undefined
  }

  #open(fd: number, access: number): StateEnd {
    try {
      if (this.running) throw stateError('another transfer is under way')
      return openStateEnd(fd, access)
    } catch (error) {
      native.close(fd)
      throw error
    }
  }

  #run(end: StateEnd, transfer: (signal: AbortSignal) => Promise<void>): void {
    const controller = new AbortController()
    const { promise, resolve } = Promise.withResolvers<unknown>()
    const done = (error?: unknown): void => {
      end.close()
      if (this.#running === controller) this.#running = undefined
      resolve(error)
    }
    // At once, also while the device is still busy with its state.
    controller.signal.addEventListener('abort', () => done(controller.signal.reason), { once: true })
    this.#running = controller
    this.#outcome = promise
    transfer(controller.signal).then(() => done(), done)
  }
}

/** @throws an Error beyond MAX_STATE_BYTES */
async function collect(source: AsyncIterable<Uint8Array>): Promise<Uint8Array> {
  const chunks: Uint8Array[] = []
  let size = 0
  for await (const chunk of source) {
    size += chunk.length
    if (size > MAX_STATE_BYTES) throw new Error(`the state has more than ${MAX_STATE_BYTES} bytes`)
    chunks.push(chunk)
  }
  return Buffer.concat(chunks)
}

function stateError(message: string, cause?: unknown): ProtocolError {
  return new ProtocolError('ERR_PROTOCOL_STATE', message, { cause })
}

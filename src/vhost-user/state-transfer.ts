/**
 * The device's own state on its way from or to another back-end (vhost-user.rst "Migrating back-end state"): a pipe, as
 * QEMU makes it, or anything that is read to its end. The other end may be slow, so nothing waits for it but
 * CHECK_DEVICE_STATE. It owns the fd until it closed it, which tells the reader that this was all.
 */
import { createReadStream, createWriteStream } from 'node:fs'
import { Socket } from 'node:net'
import type { Readable, Writable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { native } from '../native.ts'
import { ProtocolError } from './errors.ts'

/** Far more than any device has: filters and counters. */
export const MAX_STATE_BYTES = 64 * 2 ** 20

const S_IFMT = 0o170000
const S_IFIFO = 0o010000
const S_IFREG = 0o100000
const S_IFSOCK = 0o140000
const O_ACCMODE = 3
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
    const target = this.#open(fd, O_WRONLY, writable)
    // Its end closes the fd, which is the end of file that the reader waits for.
    this.#run(target, async (signal) => pipeline([await state()], target, { signal }))
  }

  /** Reads `fd`, which it takes over, to its end, and gives all to `take`. @throws ProtocolError when that can't begin */
  load(fd: number, take: (state: Uint8Array) => Promise<void>): void {
    const source = this.#open(fd, O_RDONLY, readable)
    this.#run(source, async (signal) => take(await pipeline(source, collect, { signal })))
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

  #open<Stream>(fd: number, access: number, make: (fd: number) => Stream): Stream {
    try {
      if (this.running) throw stateError('another transfer is under way')
      checkFd(fd, access)
      return make(fd)
    } catch (error) {
      native.close(fd)
      throw error
    }
  }

  #run(stream: Readable | Writable, transfer: (signal: AbortSignal) => Promise<void>): void {
    const controller = new AbortController()
    const { promise, resolve } = Promise.withResolvers<unknown>()
    const done = (error?: unknown): void => {
      stream.destroy()
      if (this.#running === controller) this.#running = undefined
      resolve(error)
    }
    // Before and after the pipeline nobody else listens, and an error that nobody hears ends the process.
    stream.on('error', done)
    // At once, also while the device is still busy with its state.
    controller.signal.addEventListener('abort', () => done(controller.signal.reason), { once: true })
    this.#running = controller
    this.#outcome = promise
    transfer(controller.signal).then(() => done(), done)
  }
}

/** @throws ProtocolError for what is no pipe, socket or file, or is open for the other direction only */
function checkFd(fd: number, access: number): void {
  const info = new Float64Array(8)
  const result = native.fdInfo(fd, info)
  const kind = info[0]! & S_IFMT
  if (result < 0 || (kind !== S_IFIFO && kind !== S_IFSOCK && kind !== S_IFREG))
    throw new ProtocolError('ERR_PROTOCOL_FDS', 'the fd is no pipe, socket or file')
  const mode = info[6]! & O_ACCMODE
  if (mode !== access && mode !== 2)
    throw new ProtocolError('ERR_PROTOCOL_FDS', 'the fd is open for the other direction')
}

function isFile(fd: number): boolean {
  const info = new Float64Array(8)
  native.fdInfo(fd, info)
  return (info[0]! & S_IFMT) === S_IFREG
}

// Pipes and sockets go through libuv's poll, without a thread that somebody who doesn't read could hold.

function writable(fd: number): Writable {
  return isFile(fd) ? createWriteStream('', { fd }) : new Socket({ fd, readable: false, writable: true })
}

function readable(fd: number): Readable {
  return isFile(fd) ? createReadStream('', { fd }) : new Socket({ fd, readable: true, writable: false })
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

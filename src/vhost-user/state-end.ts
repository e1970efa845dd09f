/**
 * Our end of what a device's state goes through: a pipe, a socket or a file of the front-end's. It owns the fd. Nothing
 * here waits in the kernel: the front-end has the same open file and can take O_NONBLOCK away from it whenever it
 * likes, so neither libuv's streams nor read(2) are safe.
 */
import { read, write } from 'node:fs'
import { setImmediate, setTimeout } from 'node:timers/promises'
import { promisify } from 'node:util'
import { native, systemError } from '../native.ts'
import { ProtocolError } from './errors.ts'
import { Readiness } from './readiness.ts'

const S_IFMT = 0o170000
const S_IFIFO = 0o010000
const S_IFREG = 0o100000
const S_IFSOCK = 0o140000
const O_ACCMODE = 3
const O_RDWR = 2

const EAGAIN = -11
const NO_FDS = new Int32Array(0)
const PIECE_BYTES = 65536
/** Until the next try when there is no room. In milliseconds. */
const RETRY_MS = 5

export interface StateEnd {
  /** Pieces until its end. @throws a system error, or why `signal` was aborted */
  read(signal: AbortSignal): AsyncIterable<Uint8Array>
  write(bytes: Uint8Array, signal: AbortSignal): Promise<void>
  /** Which the reader at the other end waits for. Idempotent. */
  close(): void
}

/**
 * Takes over `fd`, unless it throws. @param access O_RDONLY or O_WRONLY
 * @throws ProtocolError for what is no pipe, socket or file, or is open for the other direction only
 */
export function openStateEnd(fd: number, access: number): StateEnd {
  const info = new Float64Array(8)
  const result = native.fdInfo(fd, info)
  const kind = info[0]! & S_IFMT
  if (result < 0 || (kind !== S_IFIFO && kind !== S_IFSOCK && kind !== S_IFREG))
    throw new ProtocolError('ERR_PROTOCOL_FDS', 'the fd is no pipe, socket or file')
  const mode = info[6]! & O_ACCMODE
  if (mode !== access && mode !== O_RDWR)
    throw new ProtocolError('ERR_PROTOCOL_FDS', 'the fd is open for the other direction')
  if (kind === S_IFREG) return new FileEnd(fd)
  try {
    return new StreamEnd(fd, kind === S_IFSOCK)
  } catch (cause) {
    throw new ProtocolError('ERR_PROTOCOL_FDS', `the fd cannot be used: ${(cause as Error).message}`, { cause })
  }
}

/** A pipe or a socket. */
class StreamEnd implements StateEnd {
  readonly #fd: number
  readonly #socket: boolean
  readonly #readiness: Readiness
  readonly #control = new Int32Array(2 + 8)
  #closed = false

  constructor(fd: number, socket: boolean) {
    this.#fd = fd
    this.#socket = socket
    this.#readiness = new Readiness(fd)
  }

  async *read(signal: AbortSignal): AsyncIterable<Uint8Array> {
    const buffer = new Uint8Array(PIECE_BYTES)
    for (;;) {
      // `close` ends the wait.
      signal.throwIfAborted()
      const count = this.#socket ? this.#receive(buffer) : native.readPipe(this.#fd, buffer)
      if (count === 0) return
      if (count === EAGAIN) {
        await this.#readiness.wait()
        continue
      }
      if (count < 0) throw systemError(count, 'read', 'the state cannot be read')
      yield buffer.slice(0, count)
      // There may always be more.
      await setImmediate()
    }
  }

  async write(bytes: Uint8Array, signal: AbortSignal): Promise<void> {
    for (let sent = 0; sent < bytes.length; ) {
      signal.throwIfAborted()
      const piece = bytes.subarray(sent, sent + PIECE_BYTES)
      const count = this.#socket
        ? native.sendMessage(this.#fd, piece, 0, piece.length, NO_FDS, 0, false)
        : native.writePipe(this.#fd, piece)
      if (count === EAGAIN) await setTimeout(RETRY_MS, undefined, { signal })
      else if (count < 0) throw systemError(count, 'write', 'the state cannot be written')
      else {
        sent += count
        await setImmediate()
      }
    }
  }

  close(): void {
    if (this.#closed) return
    this.#closed = true
    this.#readiness.dispose()
    native.close(this.#fd)
  }

  #receive(buffer: Uint8Array): number {
    const count = native.recvMessage(this.#fd, buffer, 0, buffer.length, this.#control)
    const fds = this.#control.subarray(2, 2 + (count < 0 ? 0 : this.#control[0]!))
    for (const fd of fds) native.close(fd)
    return count
  }
}

const readFile = promisify(read)
const writeFile = promisify(write)

/** A file, from where it stands. A thread of libuv does the work. */
class FileEnd implements StateEnd {
  readonly #fd: number
  #busy = false
  #closed = false

  constructor(fd: number) {
    this.#fd = fd
  }

  async *read(signal: AbortSignal): AsyncIterable<Uint8Array> {
    for (;;) {
      signal.throwIfAborted()
      const buffer = new Uint8Array(PIECE_BYTES)
      const { bytesRead } = await this.#use(() => readFile(this.#fd, buffer, 0, buffer.length, null))
      if (bytesRead === 0) return
      yield buffer.subarray(0, bytesRead)
    }
  }

  async write(bytes: Uint8Array, signal: AbortSignal): Promise<void> {
    for (let done = 0; done < bytes.length; ) {
      signal.throwIfAborted()
      done += (await this.#use(() => writeFile(this.#fd, bytes, done, bytes.length - done, null))).bytesWritten
    }
  }

  close(): void {
    if (this.#closed) return
    this.#closed = true
    if (!this.#busy) native.close(this.#fd)
  }

  /** The number is not free for others before the thread is through with it. */
  async #use<T>(operation: () => Promise<T>): Promise<T> {
    this.#busy = true
    try {
      return await operation()
    } finally {
      this.#busy = false
      if (this.#closed) native.close(this.#fd)
    }
  }
}

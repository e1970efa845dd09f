/**
 * JSON messages with file descriptors over a unix socket, between two processes that trust each other. It must not know
 * what messages say.
 */
import { native, systemError } from '../native.ts'
import { FLAG_MORE, type Frame, framesOf, HEADER_SIZE, MAX_FRAME_BYTES, MAX_FRAME_FDS } from './fd-frames.ts'
import { Readiness } from './readiness.ts'

/** Of a whole message: far more than the state of all devices. */
const MAX_MESSAGE_BYTES = 2 ** 28
const MAX_MESSAGE_FDS = 65536

const EAGAIN = -11
const EPIPE = -32
const ECONNRESET = -104
/** As many fds are in flight as this user may have open: the other end has to take some first. */
const ETOOMANYREFS = -109
/** Between two tries to write. In milliseconds. */
const RETRY_MS = 1

export interface ChannelMessage {
  readonly body: unknown
  /** The receiver owns them. */
  readonly fds: number[]
}

export class FdChannel implements Disposable {
  readonly #fd: number
  readonly #readiness: Readiness
  readonly #received = new Int32Array(2 + MAX_FRAME_FDS)
  #closed = false

  /** Takes over `fd`, a connected unix stream socket. */
  constructor(fd: number) {
    this.#fd = fd
    native.setNonblock(fd, true)
    this.#readiness = new Readiness(fd)
  }

  /** A channel that takes over `fd`; undefined, with `fd` untouched, when that is no connected unix socket. */
  static over(fd: number): FdChannel | undefined {
    return native.socketKind(fd) === 0 ? new FdChannel(fd) : undefined
  }

  /** A channel, and the fd of its other end, which the caller owns. @throws a system error */
  static pair(): { channel: FdChannel; fd: number } {
    const ends = new Int32Array(2)
    const result = native.socketpair(ends)
    if (result < 0) throw systemError(result, 'socketpair', 'cannot make a socket pair')
    return { channel: new FdChannel(ends[0]!), fd: ends[1]! }
  }

  /**
   * Sends a message, waiting for room if need be. Returns false when the other end is gone, or `close` was called
   * meanwhile.
   * @param fds borrowed until it resolves
   */
  async send(body: unknown, fds: readonly number[] = []): Promise<boolean> {
    for (const frame of framesOf(body, fds)) if (!(await this.#sendFrame(frame))) return false
    return true
  }

  /**
   * The next message; undefined when the other end is gone, or `close` was called. @throws an Error for a broken frame
   */
  async receive(): Promise<ChannelMessage | undefined> {
    const fds: number[] = []
    const pieces: Uint8Array[] = []
    let bytes = 0
    let whole = false
    try {
      for (let more = true; more; ) {
        const header = new Uint8Array(HEADER_SIZE)
        const before = fds.length
        if (!(await this.#fill(header, fds))) return undefined
        const view = new DataView(header.buffer)
        const size = view.getUint32(0, true)
        more = (view.getUint32(4, true) & FLAG_MORE) !== 0
        bytes += size
        if (size > MAX_FRAME_BYTES || bytes > MAX_MESSAGE_BYTES) throw new Error(`a frame of ${size} bytes`)
        const piece = new Uint8Array(size)
        if (!(await this.#fill(piece, fds))) return undefined
        pieces.push(piece)
        const count = view.getUint32(8, true)
        if (fds.length - before !== count || fds.length > MAX_MESSAGE_FDS)
          throw new Error(`a frame with ${fds.length - before} file descriptors instead of ${count}`)
      }
      const body: unknown = JSON.parse(Buffer.concat(pieces).toString())
      whole = true
      return { body, fds }
    } finally {
      if (!whole) closeFds(fds)
    }
  }

  /** Ends pending and later calls; the other end sees the end of the stream. Idempotent. */
  close(): void {
    if (this.#closed) return
    this.#closed = true
    this.#readiness.dispose()
    native.close(this.#fd)
  }

  [Symbol.dispose](): void {
    this.close()
  }

  async #sendFrame({ bytes, fds }: Frame): Promise<boolean> {
    const passed = Int32Array.from(fds)
    let sent = 0
    while (sent < bytes.length) {
      if (this.#closed) return false
      const count = sent === 0 ? passed.length : 0
      const result = native.sendMessage(this.#fd, bytes, sent, bytes.length - sent, passed, count, false)
      if (result === EPIPE || result === ECONNRESET) return false
      if (result === EAGAIN || result === ETOOMANYREFS) await new Promise((resolve) => setTimeout(resolve, RETRY_MS))
      else if (result < 0) throw systemError(result, 'sendmsg', 'cannot send to the other process')
      else sent += result
    }
    return true
  }

  /** Returns whether it is full; not when the stream ended. */
  async #fill(target: Uint8Array, fds: number[]): Promise<boolean> {
    for (let filled = 0; filled < target.length; ) {
      if (this.#closed) return false
      const received = native.recvMessage(this.#fd, target, filled, target.length - filled, this.#received)
      if (received === EAGAIN) {
        await this.#readiness.wait()
        continue
      }
      if (received === ECONNRESET) return false
      if (received < 0) throw systemError(received, 'recvmsg', 'cannot receive from the other process')
      const count = this.#received[0]!
      for (let i = 0; i < count; i++) fds.push(this.#received[2 + i]!)
      if (received === 0) return false
      filled += received
    }
    return true
  }
}

/** Closes fds that came with a message and that nobody wants. */
export function closeFds(fds: readonly number[]): void {
  for (const fd of fds) native.close(fd)
}

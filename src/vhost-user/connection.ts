/**
 * One connected socket: messages in, replies out, and every received fd owned by somebody until it is closed. It
 * checks the framing; what a request means is the session's business.
 */
import { native, systemError } from '../native.ts'
import { ProtocolError } from './errors.ts'
import { Readiness } from './readiness.ts'
import {
  HEADER_SIZE,
  MAX_PAYLOAD_SIZE,
  VHOST_USER_NEED_REPLY_MASK,
  VHOST_USER_REPLY_MASK,
  VHOST_USER_VERSION,
  VHOST_USER_VERSION_MASK,
} from './wire.ts'

const EAGAIN = -11
const ECONNRESET = -104
const MSG_CTRUNC = 8
/** Room for fds of one message: more than any request may carry, so that a request with too many is seen as such. */
const FD_ROOM = 64

/** A received message. The fds that `take` did not hand over are closed by `dispose`. */
export class Message implements Disposable {
  readonly request: number
  readonly needReply: boolean
  readonly payload: DataView
  #fds: number[]

  constructor(request: number, needReply: boolean, payload: DataView, fds: number[]) {
    this.request = request
    this.needReply = needReply
    this.payload = payload
    this.#fds = fds
  }

  get fdCount(): number {
    return this.#fds.length
  }

  /** Borrows the fds: they are closed with the message. */
  get fds(): readonly number[] {
    return this.#fds
  }

  /** Hands the fds over: the caller owns them now. */
  take(): number[] {
    const fds = this.#fds
    this.#fds = []
    return fds
  }

  [Symbol.dispose](): void {
    for (const fd of this.take()) native.close(fd)
  }
}

export class Connection implements Disposable {
  readonly #fd: number
  readonly #readiness: Readiness
  readonly #header = new Uint8Array(HEADER_SIZE)
  readonly #received = new Int32Array(2 + FD_ROOM)
  #closed = false

  /** Takes over `fd`, a connected unix socket. */
  constructor(fd: number) {
    this.#fd = fd
    this.#readiness = new Readiness(fd)
  }

  /**
   * The next message, or undefined when the front-end closed the connection or `abort` was called.
   * @throws ProtocolError for a broken frame; the stream is unusable then
   */
  async read(): Promise<Message | undefined> {
    const fds: number[] = []
    try {
      // Header and payload are read apart: fds come with the first byte of the message that they belong to.
      const first = await this.#fill(this.#header, fds)
      if (first === 'end') return undefined
      const header = new DataView(this.#header.buffer)
      const request = header.getUint32(0, true)
      const flags = header.getUint32(4, true)
      const size = header.getUint32(8, true)
      if ((flags & VHOST_USER_VERSION_MASK) !== VHOST_USER_VERSION) {
        throw new ProtocolError(
          'ERR_PROTOCOL_HEADER',
          `protocol version ${flags & VHOST_USER_VERSION_MASK}, this is version 1`
        )
      }
      if ((flags & VHOST_USER_REPLY_MASK) !== 0)
        throw new ProtocolError('ERR_PROTOCOL_HEADER', 'a request with the reply flag')
      if (size > MAX_PAYLOAD_SIZE) throw new ProtocolError('ERR_PROTOCOL_HEADER', `a payload of ${size} bytes`)
      const payload = new Uint8Array(size)
      if (size > 0 && (await this.#fill(payload, fds)) === 'end') {
        throw new ProtocolError('ERR_PROTOCOL_PEER', 'the connection ended inside a message')
      }
      const message = new Message(
        request,
        (flags & VHOST_USER_NEED_REPLY_MASK) !== 0,
        new DataView(payload.buffer),
        fds.slice()
      )
      fds.length = 0
      return message
    } finally {
      for (const fd of fds) native.close(fd)
    }
  }

  /** Answers `request`. @throws ProtocolError when the front-end doesn't read */
  reply(request: number, payload: Uint8Array): void {
    const bytes = new Uint8Array(HEADER_SIZE + payload.length)
    const view = new DataView(bytes.buffer)
    view.setUint32(0, request, true)
    view.setUint32(4, VHOST_USER_VERSION | VHOST_USER_REPLY_MASK, true)
    view.setUint32(8, payload.length, true)
    bytes.set(payload, HEADER_SIZE)
    const sent = native.sendMessage(this.#fd, bytes, 0, bytes.length, this.#received, 0, false)
    // Replies are small: a socket that has no room for one belongs to a front-end that doesn't read.
    if (sent !== bytes.length && !this.#closed)
      throw new ProtocolError('ERR_PROTOCOL_PEER', 'the front-end does not read its replies')
  }

  /** Makes the pending and all later reads return undefined. */
  abort(): void {
    this.#closed = true
    this.#readiness.wake()
  }

  [Symbol.dispose](): void {
    this.#closed = true
    this.#readiness.dispose()
    native.close(this.#fd)
  }

  async #fill(target: Uint8Array, fds: number[]): Promise<'full' | 'end'> {
    let filled = 0
    while (filled < target.length) {
      if (this.#closed) return 'end'
      const received = native.recvMessage(this.#fd, target, filled, target.length - filled, this.#received)
      if (received === EAGAIN) {
        await this.#readiness.wait()
        continue
      }
      if (received < 0 && received !== ECONNRESET)
        throw systemError(received, 'recvmsg', 'cannot read from the front-end')
      const count = this.#received[0]!
      for (let i = 0; i < count; i++) fds.push(this.#received[2 + i]!)
      // Of the whole message: it may come byte by byte, with fds on each.
      if ((this.#received[1]! & MSG_CTRUNC) !== 0 || fds.length > FD_ROOM)
        throw new ProtocolError('ERR_PROTOCOL_FDS', 'more file descriptors than a message can carry')
      if (received <= 0) {
        if (filled > 0 || fds.length > 0)
          throw new ProtocolError('ERR_PROTOCOL_PEER', 'the connection ended inside a message')
        return 'end'
      }
      filled += received
    }
    return 'full'
  }
}

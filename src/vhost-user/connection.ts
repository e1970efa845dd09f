/**
 * One connected socket: messages in, replies out, and every received fd owned by somebody until it is closed. It
 * checks the framing; what a request means is the session's business.
 */
import { setImmediate } from 'node:timers/promises'
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
const EPIPE = -32
const ECONNRESET = -104
const MSG_CTRUNC = 8
const NO_FDS = new Int32Array(0)
/** Room for fds of one message: more than any request may carry, so that a request with too many is seen as such. */
const FD_ROOM = 64
/** Messages in a row without waiting for one, until everybody else has a turn: a flood holds up nobody. */
const MESSAGES_PER_TURN = 16

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

/** What was read of a message that is not whole yet. */
export interface PartialMessage {
  readonly bytes: Uint8Array
  readonly fds: readonly number[]
}

export class Connection implements Disposable {
  /** Borrowed by a handover. */
  readonly fd: number
  readonly #readiness: Readiness
  readonly #received = new Int32Array(2 + FD_ROOM)
  /** The message that is being read: its header, and its payload once the header is whole. */
  #bytes = new Uint8Array(HEADER_SIZE)
  #filled = 0
  #fds: number[] = []
  #turn = 0
  #closed = false
  #interrupted = false
  readonly #aborted = Promise.withResolvers<void>()

  /**
   * Takes over `fd`, a connected unix socket, and the fds of `partial`: where another process stopped reading.
   * @throws ProtocolError, without having taken anything, when `partial` begins no message
   */
  constructor(fd: number, partial?: PartialMessage) {
    this.fd = fd
    if (partial !== undefined) {
      const { bytes } = partial
      this.#bytes = new Uint8Array(bytes.length < HEADER_SIZE ? HEADER_SIZE : HEADER_SIZE + checkHeader(bytes))
      this.#bytes.set(bytes)
      this.#filled = bytes.length
      this.#fds = [...partial.fds]
    }
    this.#readiness = new Readiness(fd)
  }

  /**
   * The next message; undefined when the front-end closed the connection or `abort` was called; 'interrupted' after
   * `interrupt`, once.
   * @throws ProtocolError for a broken frame; the stream is unusable then
   */
  async read(): Promise<Message | undefined | 'interrupted'> {
    if (++this.#turn > MESSAGES_PER_TURN) {
      this.#turn = 0
      await setImmediate()
    }
    // Header and payload are read apart: fds come with the first byte of the message that they belong to.
    for (;;) {
      const result = await this.#fill()
      if (result === 'interrupted') return result
      if (result === 'end') {
        if (this.#filled === 0 && this.#fds.length === 0) return undefined
        // Given up by us, not broken off by the front-end.
        if (this.#closed) return undefined
        throw new ProtocolError('ERR_PROTOCOL_PEER', 'the connection ended inside a message')
      }
      if (this.#bytes.length === HEADER_SIZE) {
        const size = checkHeader(this.#bytes)
        if (size > 0) {
          const header = this.#bytes
          this.#bytes = new Uint8Array(HEADER_SIZE + size)
          this.#bytes.set(header)
          continue
        }
      }
      return this.#take()
    }
  }

  /**
   * Answers `request`. @param fds go with it, borrowed
   * @throws ProtocolError when the front-end doesn't read
   */
  reply(request: number, payload: Uint8Array, fds: readonly number[] = []): void {
    const bytes = new Uint8Array(HEADER_SIZE + payload.length)
    const view = new DataView(bytes.buffer)
    view.setUint32(0, request, true)
    view.setUint32(4, VHOST_USER_VERSION | VHOST_USER_REPLY_MASK, true)
    view.setUint32(8, payload.length, true)
    bytes.set(payload, HEADER_SIZE)
    const sent = native.sendMessage(this.fd, bytes, 0, bytes.length, Int32Array.from(fds), fds.length, false)
    // Replies are small: a socket that has no room for one belongs to a front-end that doesn't read.
    if (sent !== bytes.length && !this.#closed)
      throw new ProtocolError('ERR_PROTOCOL_PEER', 'the front-end does not read its replies')
  }

  /** The front-end has closed its end; what it sent before may still be to be read. */
  get hungUp(): boolean {
    return native.sendMessage(this.fd, this.#bytes, 0, 0, NO_FDS, 0, false) === EPIPE
  }

  /** Makes the pending and all later reads return undefined. */
  abort(): void {
    this.#closed = true
    this.#aborted.resolve()
    this.#readiness.wake()
  }

  get isAborted(): boolean {
    return this.#closed
  }

  /** Resolves after `abort`. */
  get aborted(): Promise<void> {
    return this.#aborted.promise
  }

  /** Makes the pending or the next read return 'interrupted'; what it has of a message stays for the one after it. */
  interrupt(): void {
    this.#interrupted = true
    this.#readiness.wake()
  }

  /** Takes an `interrupt` back that no read has seen. */
  proceed(): void {
    this.#interrupted = false
  }

  /** What was read of the next message. The fds stay the connection's. */
  get partial(): PartialMessage {
    return { bytes: this.#bytes.subarray(0, this.#filled), fds: this.#fds }
  }

  [Symbol.dispose](): void {
    this.abort()
    this.#readiness.dispose()
    for (const fd of this.#fds) native.close(fd)
    this.#fds = []
    native.close(this.fd)
  }

  #take(): Message {
    const header = new DataView(this.#bytes.buffer)
    const request = header.getUint32(0, true)
    const needReply = (header.getUint32(4, true) & VHOST_USER_NEED_REPLY_MASK) !== 0
    const message = new Message(request, needReply, new DataView(this.#bytes.buffer, HEADER_SIZE), this.#fds)
    this.#bytes = new Uint8Array(HEADER_SIZE)
    this.#filled = 0
    this.#fds = []
    return message
  }

  async #fill(): Promise<'full' | 'end' | 'interrupted'> {
    while (this.#filled < this.#bytes.length) {
      if (this.#closed) return 'end'
      if (this.#interrupted) {
        this.#interrupted = false
        return 'interrupted'
      }
      const room = this.#bytes.length - this.#filled
      const received = native.recvMessage(this.fd, this.#bytes, this.#filled, room, this.#received)
      if (received === EAGAIN) {
        this.#turn = 0
        await this.#readiness.wait()
        continue
      }
      if (received < 0 && received !== ECONNRESET)
        throw systemError(received, 'recvmsg', 'cannot read from the front-end')
      const count = this.#received[0]!
      for (let i = 0; i < count; i++) this.#fds.push(this.#received[2 + i]!)
      // Of the whole message: it may come byte by byte, with fds on each.
      if ((this.#received[1]! & MSG_CTRUNC) !== 0 || this.#fds.length > FD_ROOM)
        throw new ProtocolError('ERR_PROTOCOL_FDS', 'more file descriptors than a message can carry')
      if (received <= 0) return 'end'
      this.#filled += received
    }
    return 'full'
  }
}

/** The size of the payload. @throws ProtocolError */
function checkHeader(bytes: Uint8Array): number {
  const flags = new DataView(bytes.buffer, bytes.byteOffset).getUint32(4, true)
  const version = flags & VHOST_USER_VERSION_MASK
  if (version !== VHOST_USER_VERSION)
    throw new ProtocolError('ERR_PROTOCOL_HEADER', `protocol version ${version}, this is version 1`)
  if ((flags & VHOST_USER_REPLY_MASK) !== 0)
    throw new ProtocolError('ERR_PROTOCOL_HEADER', 'a request with the reply flag')
  const size = new DataView(bytes.buffer, bytes.byteOffset).getUint32(8, true)
  if (size > MAX_PAYLOAD_SIZE) throw new ProtocolError('ERR_PROTOCOL_HEADER', `a payload of ${size} bytes`)
  return size
}

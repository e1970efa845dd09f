/**
 * One vhost-user socket, seen from the front-end: whole messages out and in, blocking, with a time limit. It owns the
 * fd and the framing. It must not know what the messages mean.
 */
import { native, systemError } from '../native.ts'
import { HEADER_SIZE, requestName } from '../vhost-user/wire.ts'
import { FrontendError } from './errors.ts'

/** A message as it came off the socket. The receiver owns the fds. */
export interface Message {
  readonly request: number
  readonly flags: number
  readonly payload: Uint8Array
  readonly fds: readonly number[]
}

const NO_FDS = new Int32Array(1)

export class Channel {
  readonly fd: number
  /** Milliseconds that one message may take, either way. */
  timeoutMs: number
  readonly #fdBuffer = new Int32Array(2 + 16)
  #closed = false

  /** @param fd a connected blocking stream socket; owned from here on */
  constructor(fd: number, timeoutMs: number) {
    this.fd = fd
    this.timeoutMs = timeoutMs
  }

  get closed(): boolean {
    return this.#closed
  }

  /** Sends one message. @throws FrontendError closed when the peer hung up */
  send(request: number, flags: number, payload: Uint8Array, fds: readonly number[] = []): void {
    const message = new Uint8Array(HEADER_SIZE + payload.length)
    const view = new DataView(message.buffer)
    view.setUint32(0, request, true)
    view.setUint32(4, flags, true)
    view.setUint32(8, payload.length, true)
    message.set(payload, HEADER_SIZE)
    this.sendBytes(message, fds, requestName(request))
  }

  /** Sends bytes as they are, with fds attached to the first of them: for messages that no honest front-end sends. */
  sendBytes(bytes: Uint8Array, fds: readonly number[] = [], what = 'raw bytes'): void {
    if (this.#closed) throw new FrontendError(what, 'closed', 'the connection is closed')
    const fdArray = fds.length === 0 ? NO_FDS : Int32Array.from(fds)
    let done = 0
    while (done < bytes.length) {
      const sent = native.sendMessage(
        this.fd,
        bytes,
        done,
        bytes.length - done,
        fdArray,
        done === 0 ? fds.length : 0,
        true
      )
      if (sent <= 0) {
        throw new FrontendError(
          what,
          'closed',
          'the back-end closed the connection',
          sent,
          systemError(sent, 'sendmsg', what)
        )
      }
      done += sent
    }
  }

  /**
   * Waits for a whole message.
   * @param what the request that is being answered, for the error
   * @throws FrontendError timeout or closed
   */
  receive(what: string, timeoutMs = this.timeoutMs): Message {
    const deadline = performance.now() + timeoutMs
    const header = new Uint8Array(HEADER_SIZE)
    const fds: number[] = []
    try {
      this.#fill(header, fds, deadline, what)
      const view = new DataView(header.buffer)
      const size = view.getUint32(8, true)
      if (size > 65536) throw new FrontendError(what, 'reply', `the back-end announced a payload of ${size} bytes`)
      const payload = new Uint8Array(size)
      this.#fill(payload, fds, deadline, what)
      return { request: view.getUint32(0, true), flags: view.getUint32(4, true), payload, fds }
    } catch (error) {
      for (const fd of fds) native.close(fd)
      throw error
    }
  }

  /** Whether bytes (or the end of the stream) wait to be read. */
  readable(timeoutMs = 0): boolean {
    return !this.#closed && native.pollIn(this.fd, Math.ceil(timeoutMs)) === 1
  }

  /**
   * Whether the peer hung up. Bytes that nobody asked for count as alive.
   * It reads nothing unless the stream has ended or a stray message waits, which is dropped.
   */
  hungUp(): boolean {
    if (this.#closed) return true
    if (native.pollIn(this.fd, 0) !== 1) return false
    const scratch = new Uint8Array(4096)
    const count = native.recvMessage(this.fd, scratch, 0, scratch.length, this.#fdBuffer)
    if (count > 0) for (let i = 0; i < (this.#fdBuffer[0] ?? 0); i++) native.close(this.#fdBuffer[2 + i] ?? -1)
    return count === 0 || (count < 0 && count !== -11)
  }

  /** Idempotent. */
  close(): void {
    if (this.#closed) return
    this.#closed = true
    native.close(this.fd)
  }

  #fill(into: Uint8Array, fds: number[], deadline: number, what: string): void {
    if (this.#closed) throw new FrontendError(what, 'closed', 'the connection is closed')
    let done = 0
    while (done < into.length) {
      const left = deadline - performance.now()
      const ready = left > 0 ? native.pollIn(this.fd, Math.ceil(left)) : 0
      if (ready === 0) throw new FrontendError(what, 'timeout', 'no answer from the back-end in time')
      const count = native.recvMessage(this.fd, into, done, into.length - done, this.#fdBuffer)
      if (count === -11 || count === -4) continue
      if (count <= 0) throw new FrontendError(what, 'closed', 'the back-end closed the connection', count)
      for (let i = 0; i < (this.#fdBuffer[0] ?? 0); i++) fds.push(this.#fdBuffer[2 + i] ?? -1)
      done += count
    }
  }
}

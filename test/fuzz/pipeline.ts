/** Many vhost-user requests in one go: all are sent, then all replies are read. It owns nothing. */
import { native } from '../../src/native.ts'
import { HEADER_SIZE, VHOST_USER_NEED_REPLY_MASK, VHOST_USER_VERSION } from '../../src/vhost-user/wire.ts'
import { Misbehaviour } from './target.ts'

const EAGAIN = -11
const EPIPE = -32
const ECONNRESET = -104
/** Longer than any load makes an answer take. */
const PATIENCE_MS = 20_000
const NO_FDS = new Int32Array(1)

export class Pipeline {
  readonly #fd: number
  #requests: number[] = []
  #waiting: Buffer[] = []
  readonly #chunk = new Uint8Array(65_536)
  readonly #control = new Int32Array(2 + 16)
  /** The connection was closed by virtiod. */
  ended = false

  /** @param fd a connected socket with nothing under way, borrowed; REPLY_ACK is negotiated */
  constructor(fd: number) {
    this.#fd = fd
  }

  /** With NEED_REPLY, so that each request is answered. */
  add(request: number, payload: Uint8Array, fd?: number): void {
    const message = Buffer.alloc(HEADER_SIZE + payload.length)
    message.writeUInt32LE(request, 0)
    message.writeUInt32LE(VHOST_USER_VERSION | VHOST_USER_NEED_REPLY_MASK, 4)
    message.writeUInt32LE(payload.length, 8)
    message.set(payload, HEADER_SIZE)
    this.#requests.push(request)
    if (fd === undefined) {
      this.#waiting.push(message)
      return
    }
    this.#flush()
    this.#write(message, Int32Array.of(fd), 1)
  }

  /** Sends what is left of it. */
  send(): void {
    this.#flush()
  }

  /**
   * Waits for all answers. @returns the payloads in order, fewer when virtiod closed the connection
   * @throws Misbehaviour when one does not come, or is none
   */
  replies(): Buffer[] {
    this.#flush()
    const payloads: Buffer[] = []
    const deadline = performance.now() + PATIENCE_MS
    let bytes = Buffer.alloc(0)
    while (payloads.length < this.#requests.length && !this.ended) {
      const ready = native.pollIn(this.#fd, 1000)
      const length =
        ready === 1 ? native.recvMessage(this.#fd, this.#chunk, 0, this.#chunk.length, this.#control) : EAGAIN
      if (length === EAGAIN) {
        if (performance.now() < deadline) continue
        throw new Misbehaviour(
          `no answer to request ${this.#requests[payloads.length]} (${payloads.length} of ${this.#requests.length}) in ${PATIENCE_MS} ms`
        )
      }
      for (let i = 0; i < (this.#control[0] ?? 0); i++) native.close(this.#control[2 + i] ?? -1)
      if (length <= 0) {
        this.ended = true
        break
      }
      bytes = Buffer.concat([bytes, this.#chunk.subarray(0, length)])
      while (bytes.length >= HEADER_SIZE && bytes.length >= HEADER_SIZE + bytes.readUInt32LE(8)) {
        const end = HEADER_SIZE + bytes.readUInt32LE(8)
        const expected = this.#requests[payloads.length]
        if (bytes.readUInt32LE(0) !== expected || bytes.readUInt32LE(4) !== 5)
          throw new Misbehaviour(`an answer to ${bytes.readUInt32LE(0)} in place of ${expected}`)
        payloads.push(bytes.subarray(HEADER_SIZE, end))
        bytes = bytes.subarray(end)
      }
    }
    this.#requests = []
    return payloads
  }

  #flush(): void {
    if (this.#waiting.length === 0) return
    const bytes = Buffer.concat(this.#waiting)
    this.#waiting = []
    this.#write(bytes, NO_FDS, 0)
  }

  #write(bytes: Uint8Array, fds: Int32Array, count: number): void {
    for (let done = 0; done < bytes.length && !this.ended; ) {
      const sent = native.sendMessage(this.#fd, bytes, done, bytes.length - done, fds, done === 0 ? count : 0, true)
      if (sent === EPIPE || sent === ECONNRESET) this.ended = true
      else if (sent <= 0) throw new Error(`sendmsg: ${sent}`)
      else done += sent
    }
  }
}

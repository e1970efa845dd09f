/**
 * The back-end's own requests to the front-end (vhost-user.rst "Back-end communication"): a second socket that it
 * handed to us. Nobody waits for it: what can't be sent now is sent when there is room, and of each kind and ring there
 * is at most one in waiting, so that a front-end that doesn't read costs nothing. Without a channel requests wait for
 * one.
 */
import { native } from '../native.ts'
import { ProtocolError } from './errors.ts'
import { Readiness } from './readiness.ts'
import {
  HEADER_SIZE,
  IOTLB_MESSAGE_PADDED_SIZE,
  VHOST_IOTLB_MISS,
  VHOST_USER_BACKEND_CONFIG_CHANGE_MSG,
  VHOST_USER_BACKEND_IOTLB_MSG,
  VHOST_USER_BACKEND_VRING_CALL,
  VHOST_USER_BACKEND_VRING_ERR,
  VHOST_USER_NEED_REPLY_MASK,
  VHOST_USER_REPLY_MASK,
  VHOST_USER_VERSION,
  VHOST_USER_VERSION_MASK,
  vringState,
  writeIotlb,
} from './wire.ts'

const EAGAIN = -11
const NO_FDS = new Int32Array(1)
/** A reply: a header and a u64. */
const REPLY_SIZE = HEADER_SIZE + 8
/** Until the next try when the socket has no room. In milliseconds. */
const RETRY_MS = 20

/** A request, and which one of its kind. */
interface Waiting {
  readonly request: number
  readonly index: number
  readonly payload: Uint8Array
  readonly needReply: boolean
}

/** For a handover: what was begun. Bytes are hexadecimal. */
export interface SavedChannel {
  readonly waiting: readonly { request: number; index: number; payload: string; needReply: boolean }[]
  /** Keys of requests whose reply is due, in this order. */
  readonly awaited: readonly string[]
  readonly unsent: string
  readonly received: string
}

export class BackendChannel implements Disposable {
  /** Of the socket, -1 = none. Borrowed by a handover. */
  fd = -1
  #readiness: Readiness | undefined
  readonly #waiting = new Map<string, Waiting>()
  #awaited: string[] = []
  /** The rest of a request of which the socket took a part. */
  #unsent: Uint8Array = new Uint8Array(0)
  readonly #reply = new Uint8Array(REPLY_SIZE)
  #received = 0
  readonly #control = new Int32Array(2 + 8)
  #retry: NodeJS.Timeout | undefined
  #held = false
  readonly #onRefused: (error: ProtocolError) => void

  /** @param onRefused told of replies that are bad or say no */
  constructor(onRefused: (error: ProtocolError) => void) {
    this.#onRefused = onRefused
  }

  get open(): boolean {
    return this.fd >= 0
  }

  /** Takes over `fd`, also when it throws. @throws ProtocolError when it is no connected unix socket */
  attach(fd: number): void {
    if (native.socketKind(fd) !== 0) {
      native.close(fd)
      throw new ProtocolError('ERR_PROTOCOL_FDS', 'the fd is no connected unix socket')
    }
    this.#detach()
    this.#listen(fd)
    this.#flush()
  }

  /** Neither sends nor reads until `resume`: another process may go on with the socket, where it is now. */
  hold(): void {
    this.#held = true
    clearTimeout(this.#retry)
    this.#retry = undefined
    this.#readiness?.wake()
  }

  resume(): void {
    if (!this.#held) return
    this.#held = false
    if (this.#readiness !== undefined) void this.#read(this.#readiness)
    this.#flush()
  }

  /** CONFIG_CHANGE_MSG without NEED_REPLY: an answer would have nothing to say. */
  configChanged(): void {
    this.#send(VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, 0, new Uint8Array(0), false)
  }

  /** VRING_CALL. @param needReply the next one of this ring waits until the front-end is through with this one */
  call(index: number, needReply: boolean): void {
    this.#send(VHOST_USER_BACKEND_VRING_CALL, index, vringState(index, 0), needReply)
  }

  error(index: number, needReply: boolean): void {
    this.#send(VHOST_USER_BACKEND_VRING_ERR, index, vringState(index, 0), needReply)
  }

  /**
   * IOTLB_MSG for a miss of ring `index`. Without NEED_REPLY: the answer that matters is the update, on the other
   * socket, and QEMU may be waiting there for us.
   * @param access IOTLB_READ, IOTLB_WRITE or both
   */
  miss(index: number, address: number, access: number): void {
    const payload = new Uint8Array(IOTLB_MESSAGE_PADDED_SIZE)
    writeIotlb(new DataView(payload.buffer), 0, {
      iova: BigInt(address),
      size: 0n,
      userAddress: 0n,
      permissions: access,
      type: VHOST_IOTLB_MISS,
    })
    this.#send(VHOST_USER_BACKEND_IOTLB_MSG, index, payload, false)
  }

  /** What waits is of a session's past: RESET_DEVICE. */
  forget(): void {
    this.#waiting.clear()
  }

  save(): SavedChannel {
    return {
      waiting: [...this.#waiting.values()].map((one) => ({ ...one, payload: hex(one.payload) })),
      awaited: this.#awaited,
      unsent: hex(this.#unsent),
      received: hex(this.#reply.subarray(0, this.#received)),
    }
  }

  /** Goes on where another process stopped. Takes over `fd`, -1 = none. */
  restore(saved: SavedChannel, fd: number): void {
    for (const { payload, ...one } of saved.waiting) {
      this.#waiting.set(keyOf(one.request, one.index), { ...one, payload: Buffer.from(payload, 'hex') })
    }
    if (fd < 0) return
    this.#awaited = [...saved.awaited]
    this.#unsent = Buffer.from(saved.unsent, 'hex')
    const received = Buffer.from(saved.received, 'hex').subarray(0, REPLY_SIZE - 1)
    this.#reply.set(received)
    this.#received = received.length
    this.#listen(fd)
    this.#flush()
  }

  [Symbol.dispose](): void {
    this.#waiting.clear()
    this.#detach()
  }

  #send(request: number, index: number, payload: Uint8Array, needReply: boolean): void {
    // A newer one says what an older one would have said: a miss that was answered meanwhile is no miss any more.
    this.#waiting.set(keyOf(request, index), { request, index, payload, needReply })
    this.#flush()
  }

  #flush(): void {
    if (!this.open || this.#held || !this.#sendRest()) return
    for (const [key, waiting] of this.#waiting) {
      if (this.#awaited.includes(key)) continue
      this.#waiting.delete(key)
      if (waiting.needReply) this.#awaited.push(key)
      this.#unsent = encode(waiting)
      if (!this.#sendRest()) return
    }
  }

  /** Returns whether the socket took all of it. */
  #sendRest(): boolean {
    if (this.#unsent.length === 0) return true
    const sent = native.sendMessage(this.fd, this.#unsent, 0, this.#unsent.length, NO_FDS, 0, false)
    if (sent < 0 && sent !== EAGAIN) {
      this.#detach()
      return false
    }
    this.#unsent = this.#unsent.subarray(Math.max(sent, 0))
    if (this.#unsent.length === 0) return true
    this.#retry ??= setTimeout(() => {
      this.#retry = undefined
      this.#flush()
    }, RETRY_MS)
    return false
  }

  #listen(fd: number): void {
    this.fd = fd
    this.#readiness = new Readiness(fd)
    void this.#read(this.#readiness)
  }

  async #read(readiness: Readiness): Promise<void> {
    while (this.#readiness === readiness && !this.#held) {
      const room = REPLY_SIZE - this.#received
      const result = native.recvMessage(this.fd, this.#reply, this.#received, room, this.#control)
      if (result === EAGAIN) {
        await readiness.wait()
        continue
      }
      const fds = this.#control.subarray(2, 2 + (result < 0 ? 0 : this.#control[0]!))
      for (const fd of fds) native.close(fd)
      if (result <= 0) return this.#detach()
      this.#received += result
      if (this.#received === REPLY_SIZE) this.#take()
    }
  }

  /** A whole reply is there. */
  #take(): void {
    this.#received = 0
    const view = new DataView(this.#reply.buffer)
    const request = view.getUint32(0, true)
    const flags = view.getUint32(4, true)
    const key = this.#awaited[0]
    const isReply = (flags & VHOST_USER_VERSION_MASK) === VHOST_USER_VERSION && (flags & VHOST_USER_REPLY_MASK) !== 0
    if (!isReply || view.getUint32(8, true) !== 8 || key === undefined || !key.startsWith(`${request} `)) {
      this.#onRefused(
        new ProtocolError('ERR_PROTOCOL_HEADER', 'a message on the back-end channel that is no reply of ours')
      )
      // Where the next one begins is not known any more.
      return this.#detach()
    }
    this.#awaited.shift()
    if (view.getBigUint64(HEADER_SIZE, true) !== 0n)
      this.#onRefused(new ProtocolError('ERR_PROTOCOL_PEER', `the front-end refused the back-end's request ${key}`))
    this.#flush()
  }

  #detach(): void {
    clearTimeout(this.#retry)
    this.#retry = undefined
    this.#awaited = []
    this.#unsent = new Uint8Array(0)
    this.#received = 0
    if (this.fd < 0) return
    const readiness = this.#readiness
    this.#readiness = undefined
    readiness?.dispose()
    native.close(this.fd)
    this.fd = -1
  }
}

function keyOf(request: number, index: number): string {
  return `${request} ${index}`
}

function encode({ request, payload, needReply }: Waiting): Uint8Array {
  const bytes = new Uint8Array(HEADER_SIZE + payload.length)
  const view = new DataView(bytes.buffer)
  view.setUint32(0, request, true)
  view.setUint32(4, VHOST_USER_VERSION | (needReply ? VHOST_USER_NEED_REPLY_MASK : 0), true)
  view.setUint32(8, payload.length, true)
  bytes.set(payload, HEADER_SIZE)
  return bytes
}

function hex(bytes: Uint8Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString('hex')
}

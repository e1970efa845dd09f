/**
 * One connection: a unix socket of the host on one side, packets on the other. It owns the bytes under way and the credit of both
 * directions (virtio 1.3 §5.10.6.3); when it may speak, and what becomes of it, is the multiplexer's affair.
 *
 * Towards the guest at most one chunk of the socket is held beside what Node buffers (64 KiB). Towards the host there is
 * one write at a time, and what comes meanwhile is put together behind it: a guest that sends single bytes costs no
 * more memory than the buffer size that it was told.
 */
import type { Socket } from 'node:net'
import type { ChainReader } from '../../src/device/index.ts'
import {
  type Header,
  VIRTIO_VSOCK_OP_CREDIT_REQUEST,
  VIRTIO_VSOCK_OP_CREDIT_UPDATE,
  VIRTIO_VSOCK_OP_REQUEST,
  VIRTIO_VSOCK_OP_RESPONSE,
  VIRTIO_VSOCK_OP_RW,
  VIRTIO_VSOCK_OP_SHUTDOWN,
  VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE,
  VIRTIO_VSOCK_SHUTDOWN_F_SEND,
} from './packet.ts'

/** What a connection tells of itself. */
export interface ConnectionOwner {
  /** It has something to say to the guest. */
  ready(connection: Connection): void
  /** Its host program is gone before everything was said: the guest has to be told. */
  broken(connection: Connection): void
  /** Nothing of it is left. */
  closed(connection: Connection): void
}

/**
 * `dialing`: the guest asked for it, the host program has not been reached yet. `requested`: a host program asked for
 * it, the guest has not answered yet. `finished`: over for the guest; the rest of its bytes may still be on their way.
 */
export type ConnectionState = 'dialing' | 'requested' | 'open' | 'finished'

/** What is owed to the guest, as bits. */
const REQUEST = 1
const RESPONSE = 2
const CREDIT_REQUEST = 4
const CREDIT_UPDATE = 8

const NOTHING = new Uint8Array(0)

/** Counters of bytes wrap as those of the packets do. */
const u32 = (value: number): number => value >>> 0

export class Connection {
  readonly hostPort: number
  readonly guestPort: number
  state: ConnectionState
  /** It waits in the multiplexer's list of those that have something to say. */
  queued = false
  readonly #owner: ConnectionOwner
  #socket: Socket | undefined
  #owes = 0

  // From the guest to the host.
  readonly #bufferSize: number
  #received = 0
  #forwarded = 0
  /** `#forwarded` as the guest knows it. */
  #told = 0
  /** Bytes of the write that is under way, 0 = none. */
  #writing = 0
  #staging: Uint8Array = NOTHING
  #staged = 0
  #guestSends = true

  // From the host to the guest.
  #chunk: Uint8Array | undefined
  #at = 0
  #sent = 0
  #guestBuffer = 0
  #guestForwarded = 0
  #creditAsked = false
  #guestReceives = true
  #hostSends = true
  #shutdownSaid = false

  constructor(
    hostPort: number,
    guestPort: number,
    state: 'dialing' | 'requested',
    bufferSize: number,
    owner: ConnectionOwner
  ) {
    this.hostPort = hostPort
    this.guestPort = guestPort
    this.state = state
    this.#bufferSize = bufferSize
    this.#owner = owner
    if (state === 'requested') this.#owes = REQUEST
  }

  /** Both sides have said all that they had to: nothing but RST is left to say. */
  get over(): boolean {
    return !this.#guestSends && (!this.#guestReceives || this.#shutdownSaid)
  }

  // ---- the host's side

  /** The host program is there. @param early what it sent already */
  attach(socket: Socket, early?: Uint8Array): void {
    this.#socket = socket
    if (early !== undefined && early.length > 0) this.#chunk = early
    socket.on('readable', () => this.#refill())
    socket.on('end', () => {
      this.#hostSends = false
      this.#owner.ready(this)
    })
    // 'close' follows.
    socket.on('error', () => {})
    socket.on('close', (failed) => this.#socketClosed(failed))
    if (this.state === 'finished') socket.destroy()
    else if (this.state === 'dialing') {
      this.state = 'open'
      this.#owes |= RESPONSE
    }
    this.#refill()
    this.#owner.ready(this)
  }

  /** There is no host program where the guest looks for one. */
  unreachable(): void {
    if (this.state === 'dialing') this.#owner.broken(this)
    this.#owner.closed(this)
  }

  #refill(): void {
    while (this.#chunk === undefined) {
      const chunk = this.#socket!.read() as Uint8Array | null
      if (chunk === null) return
      // Of what the guest won't receive any more nothing is kept.
      if (!this.#guestReceives || this.state === 'finished') continue
      this.#chunk = chunk
      this.#at = 0
      this.#owner.ready(this)
    }
  }

  #socketClosed(failed: boolean): void {
    if (this.state === 'finished') return this.#owner.closed(this)
    this.#socket = undefined
    // Or else both ends were closed in good order, and what the host program said last is still on its way.
    if (!failed && !this.#hostSends && !this.#guestSends) return
    this.#owner.broken(this)
    this.#owner.closed(this)
  }

  // ---- packets of the guest

  /** What every packet says. */
  credit(bufAlloc: number, fwdCnt: number): void {
    this.#guestBuffer = bufAlloc
    this.#guestForwarded = fwdCnt
    if (this.#free() === 0) return
    this.#creditAsked = false
    if (this.#chunk !== undefined) this.#owner.ready(this)
  }

  /** RESPONSE. Returns false when it answers nothing. */
  accepted(): boolean {
    if (this.state !== 'requested' || this.#owes !== 0) return false
    this.state = 'open'
    this.#socket?.write(`OK ${this.hostPort}\n`)
    this.#owner.ready(this)
    return true
  }

  /** RW. Returns false when the guest may not send (that much). */
  deliver(reader: ChainReader, length: number): boolean {
    if (this.state !== 'open' || !this.#guestSends) return false
    if (this.#held() + length > this.#bufferSize) return false
    this.#received = u32(this.#received + length)
    if (length === 0) return true
    if (this.#writing === 0) this.#write(reader.bytes(length))
    else this.#stage(reader, length)
    return true
  }

  /** SHUTDOWN. */
  shutdown(flags: number): void {
    if ((flags & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE) !== 0) {
      this.#guestReceives = false
      this.#chunk = undefined
      if (this.#socket !== undefined) this.#refill()
    }
    if ((flags & VIRTIO_VSOCK_SHUTDOWN_F_SEND) !== 0) {
      this.#guestSends = false
      if (this.#held() === 0) this.#socket?.end()
    }
  }

  /** CREDIT_REQUEST. */
  tellCredit(): void {
    this.#owes |= CREDIT_UPDATE
    this.#owner.ready(this)
  }

  /** The guest is not to know it any longer. What it sent before still reaches the host program. */
  finish(): void {
    const { state } = this
    this.state = 'finished'
    this.#chunk = undefined
    if (state === 'dialing') return
    if (this.#socket === undefined) this.#owner.closed(this)
    else if (this.#held() === 0) this.#socket.destroy()
    else this.#refill()
  }

  /** At once, whatever is under way. */
  destroy(): void {
    this.state = 'finished'
    this.#socket?.destroy()
  }

  /**
   * The rings were stopped for a while, and the guest may be another one by now: one that doesn't know the connection will
   * say so. Returns false when there is no way to find out.
   */
  probe(): boolean {
    if (this.state === 'requested') return this.#owes !== 0
    if (this.state !== 'open' || (this.#owes & RESPONSE) !== 0) return true
    this.#owes |= CREDIT_REQUEST
    this.#owner.ready(this)
    return true
  }

  /** Bytes of the guest that the host program has not got. */
  #held(): number {
    return u32(this.#received - this.#forwarded)
  }

  #stage(reader: ChainReader, length: number): void {
    const end = this.#staged + length
    if (end > this.#staging.length) {
      const larger = new Uint8Array(Math.min(this.#bufferSize, Math.max(end, 2 * this.#staging.length, 4096)))
      larger.set(this.#staging.subarray(0, this.#staged))
      this.#staging = larger
    }
    reader.into(this.#staging.subarray(this.#staged, end))
    this.#staged = end
  }

  #write(bytes: Uint8Array): void {
    this.#writing = bytes.length
    this.#socket!.write(bytes, this.#written)
  }

  readonly #written = (error?: Error | null): void => {
    // 'close' is on its way.
    if (error) return
    this.#forwarded = u32(this.#forwarded + this.#writing)
    this.#writing = 0
    if (this.#staged > 0) {
      const bytes = this.#staging.subarray(0, this.#staged)
      this.#staging = NOTHING
      this.#staged = 0
      this.#write(bytes)
    } else if (this.state === 'finished') this.#socket?.destroy()
    else if (!this.#guestSends) this.#socket?.end()
    // Seldom enough, and long before the guest believes that there is no room.
    if (this.state === 'open' && u32(this.#forwarded - this.#told) >= this.#bufferSize / 4) this.tellCredit()
  }

  // ---- packets to the guest

  /** The operation of the packet that comes next, 0 = none. */
  get says(): number {
    if (this.state !== 'open') return this.state === 'requested' && this.#owes !== 0 ? VIRTIO_VSOCK_OP_REQUEST : 0
    if ((this.#owes & RESPONSE) !== 0) return VIRTIO_VSOCK_OP_RESPONSE
    if ((this.#owes & CREDIT_REQUEST) !== 0) return VIRTIO_VSOCK_OP_CREDIT_REQUEST
    if (this.#chunk !== undefined) {
      if (this.#free() > 0) return VIRTIO_VSOCK_OP_RW
      if (!this.#creditAsked) return VIRTIO_VSOCK_OP_CREDIT_REQUEST
    } else if (!this.#hostSends && this.#guestReceives && !this.#shutdownSaid) return VIRTIO_VSOCK_OP_SHUTDOWN
    return (this.#owes & CREDIT_UPDATE) !== 0 ? VIRTIO_VSOCK_OP_CREDIT_UPDATE : 0
  }

  /** Takes that packet. @param room for its payload, in bytes. Returns the payload. */
  say(header: Header, room: number): Uint8Array {
    const op = this.says
    let payload: Uint8Array = NOTHING
    header.flags = 0
    if (op === VIRTIO_VSOCK_OP_REQUEST || op === VIRTIO_VSOCK_OP_RESPONSE) this.#owes = 0
    else if (op === VIRTIO_VSOCK_OP_RW) payload = this.#takeChunk(Math.min(room, this.#free()))
    else if (op === VIRTIO_VSOCK_OP_CREDIT_REQUEST) {
      this.#creditAsked = true
      this.#owes &= ~CREDIT_REQUEST
    } else if (op === VIRTIO_VSOCK_OP_SHUTDOWN) {
      this.#shutdownSaid = true
      header.flags = VIRTIO_VSOCK_SHUTDOWN_F_SEND
    }
    // All packets say this.
    this.#owes &= ~CREDIT_UPDATE
    this.#told = this.#forwarded
    header.op = op
    header.length = payload.length
    header.bufAlloc = this.#bufferSize
    header.fwdCnt = this.#forwarded
    return payload
  }

  /** Bytes that the guest has room for. It may tell nonsense, and less than before. */
  #free(): number {
    return Math.max(0, this.#guestBuffer - u32(this.#sent - this.#guestForwarded))
  }

  #takeChunk(most: number): Uint8Array {
    const chunk = this.#chunk!
    const start = this.#at
    const end = Math.min(chunk.length, start + most)
    this.#sent = u32(this.#sent + end - start)
    this.#at = end
    if (end === chunk.length) {
      this.#chunk = undefined
      if (this.#socket !== undefined) this.#refill()
    }
    return chunk.subarray(start, end)
  }
}

/**
 * A back-end that answers everything and does nothing: `node recording-backend.ts SOCKET JOURNAL OPTIONS`. It writes
 * down what it is told, a line of JSON each, so that tests see what the front-end sends and in what order. Sessions
 * come one after the other.
 */
import { appendFileSync } from 'node:fs'
import { native } from '../../src/native.ts'
import * as wire from '../../src/vhost-user/wire.ts'

export interface Ask {
  readonly request: number
  /** Hexadecimal. */
  readonly payload: string
  /** It waits for an IOTLB_MSG before it answers what it was asked itself. */
  readonly update?: boolean
}

export interface RecordingOptions {
  /** Offered; hexadecimal. */
  readonly features?: string
  readonly protocolFeatures?: string
  /**
   * Requests before whose answer it asks for something on the back-end channel, as a back-end does that needs a
   * translation to answer, once there is one.
   */
  readonly ask?: Readonly<Record<number, Ask>>
  /** Requests that are refused (NACK). */
  readonly refuse?: readonly number[]
  /** The status that GET_STATUS answers; default what was set. */
  readonly status?: number
}

/** A line of the journal. */
export interface Recorded {
  readonly session: number
  /** `main` or `backend`: an answer on the back-end channel. */
  readonly channel: string
  readonly request: number
  readonly flags: number
  readonly payload: string
  readonly fds: number
}

interface Message {
  readonly request: number
  readonly flags: number
  readonly payload: Buffer
  readonly fds: readonly number[]
}

async function run(socketPath: string, journal: string, options: RecordingOptions): Promise<void> {
  process.on('SIGTERM', () => process.exit(0))
  const listener = native.listenUnix(socketPath, 0o600)
  if (listener < 0) throw new Error(`listen: ${listener}`)
  for (let session = 0; ; ) {
    await new Promise((resolve) => setTimeout(resolve, 1))
    const fd = native.accept(listener)
    if (fd < 0) continue
    new Session(fd, session++, journal, options).serve()
    native.close(fd)
  }
}

function u64(value: bigint | number): Buffer {
  const bytes = Buffer.alloc(8)
  bytes.writeBigUInt64LE(BigInt(value))
  return bytes
}

class Session {
  readonly #fd: number
  readonly #session: number
  readonly #journal: string
  readonly #options: RecordingOptions
  readonly #bases = new Map<number, number>()
  #backend = -1
  #status = 0
  #loading = -1

  constructor(fd: number, session: number, journal: string, options: RecordingOptions) {
    this.#fd = fd
    this.#session = session
    this.#journal = journal
    this.#options = options
  }

  serve(): void {
    for (let message = this.#read(this.#fd); message !== undefined; message = this.#read(this.#fd)) {
      this.#note('main', message)
      this.#handle(message)
    }
    if (this.#backend >= 0) native.close(this.#backend)
  }

  #handle(message: Message): void {
    const asked = this.#options.ask?.[message.request]
    const between: Message[] = []
    if (asked !== undefined && this.#backend >= 0) {
      this.#send(this.#backend, asked.request, wire.VHOST_USER_NEED_REPLY_MASK, Buffer.from(asked.payload, 'hex'))
      if (asked.update === true) {
        const update = this.#read(this.#fd)
        if (update === undefined) return
        this.#note('main', update)
        between.push(update)
      }
      const answer = this.#read(this.#backend)
      if (answer !== undefined) this.#note('backend', answer)
    }
    for (const one of [message, ...between]) {
      const answer = this.#answer(one)
      if (answer !== undefined) this.#send(this.#fd, one.request, wire.VHOST_USER_REPLY_MASK, answer.payload, answer.fd)
      for (const fd of one.fds) if (fd !== this.#backend && fd !== this.#loading) native.close(fd)
    }
  }

  #answer({ request, flags, payload, fds }: Message): { payload: Buffer; fd?: number } | undefined {
    const { features = '1f5001046', protocolFeatures = '1ffff', refuse = [], status } = this.#options
    switch (request) {
      case wire.VHOST_USER_GET_FEATURES:
        return { payload: u64(BigInt(`0x${features}`)) }
      case wire.VHOST_USER_GET_PROTOCOL_FEATURES:
        return { payload: u64(BigInt(`0x${protocolFeatures}`)) }
      case wire.VHOST_USER_GET_QUEUE_NUM:
        return { payload: u64(4) }
      case wire.VHOST_USER_GET_MAX_MEM_SLOTS:
        return { payload: u64(32) }
      case wire.VHOST_USER_GET_CONFIG:
        return { payload }
      case wire.VHOST_USER_GET_STATUS:
        return { payload: u64(status ?? this.#status) }
      case wire.VHOST_USER_SET_LOG_BASE:
        return { payload: u64(0) }
      case wire.VHOST_USER_IOTLB_MSG:
      case wire.VHOST_USER_CHECK_DEVICE_STATE:
        return { payload: u64(refuse.includes(request) ? 1 : 0) }
      case wire.VHOST_USER_GET_VRING_BASE: {
        const answer = Buffer.from(payload)
        answer.writeUInt32LE(this.#bases.get(payload.readUInt32LE(0)) ?? 0, 4)
        return { payload: answer }
      }
      case wire.VHOST_USER_GET_INFLIGHT_FD: {
        const answer = Buffer.from(payload)
        // An offset, so that somebody who ignores it is found out.
        answer.writeBigUInt64LE(65536n, 0)
        answer.writeBigUInt64LE(4096n, 8)
        return { payload: answer, fd: native.memfd('recording', 4096 + 65536, 0) }
      }
      case wire.VHOST_USER_SET_DEVICE_STATE_FD:
        if (refuse.includes(request)) return { payload: u64(wire.VHOST_USER_DEVICE_STATE_NOFD_MASK | 1) }
        if (payload.readUInt32LE(0) === wire.VHOST_TRANSFER_STATE_DIRECTION_SAVE) this.#save(fds[0] ?? -1)
        else this.#loading = fds[0] ?? -1
        return { payload: u64(wire.VHOST_USER_DEVICE_STATE_NOFD_MASK) }
      default:
        if (request === wire.VHOST_USER_SET_STATUS) this.#status = Number(payload.readBigUInt64LE(0))
        if (request === wire.VHOST_USER_SET_VRING_BASE)
          this.#bases.set(payload.readUInt32LE(0), payload.readUInt32LE(4))
        if (request === wire.VHOST_USER_SET_BACKEND_REQ_FD) this.#backend = fds[0] ?? -1
        if ((flags & wire.VHOST_USER_NEED_REPLY_MASK) === 0) return undefined
        return { payload: u64(refuse.includes(request) ? 1 : 0) }
    }
  }

  /** The state is as long as it takes to show that the reader waits for its end. */
  #save(fd: number): void {
    const state = Buffer.alloc(100_000, 'state')
    for (let done = 0; done < state.length; ) {
      done += native.sendMessage(fd, state, done, Math.min(4096, state.length - done), new Int32Array(1), 0, true)
    }
  }

  #note(channel: string, { request, flags, payload, fds }: Message): void {
    let text = payload.toString('hex')
    if (channel === 'main' && request === wire.VHOST_USER_CHECK_DEVICE_STATE && this.#loading >= 0) {
      text = this.#loaded().toString('hex')
    }
    const line: Recorded = { session: this.#session, channel, request, flags, payload: text, fds: fds.length }
    appendFileSync(this.#journal, `${JSON.stringify(line)}\n`)
  }

  /** What came for LOAD: it stands in the journal as the payload of CHECK_DEVICE_STATE. */
  #loaded(): Buffer {
    const parts: Buffer[] = []
    const bytes = new Uint8Array(65536)
    for (;;) {
      native.pollIn(this.#loading, 2000)
      const count = native.recvMessage(this.#loading, bytes, 0, bytes.length, new Int32Array(2))
      if (count <= 0) break
      parts.push(Buffer.from(bytes.subarray(0, count)))
    }
    native.close(this.#loading)
    this.#loading = -1
    return Buffer.concat(parts)
  }

  #send(fd: number, request: number, flags: number, payload: Buffer, attached?: number): void {
    const message = Buffer.alloc(12 + payload.length)
    message.writeUInt32LE(request, 0)
    message.writeUInt32LE(wire.VHOST_USER_VERSION | flags, 4)
    message.writeUInt32LE(payload.length, 8)
    payload.copy(message, 12)
    const fds = Int32Array.of(attached ?? -1)
    native.sendMessage(fd, message, 0, message.length, fds, attached === undefined ? 0 : 1, true)
    if (attached !== undefined) native.close(attached)
  }

  /** @returns undefined when the peer hung up */
  #read(fd: number): Message | undefined {
    const fds: number[] = []
    const header = this.#fill(fd, 12, fds)
    if (header === undefined) return undefined
    const payload = this.#fill(fd, header.readUInt32LE(8), fds)
    if (payload === undefined) return undefined
    return { request: header.readUInt32LE(0), flags: header.readUInt32LE(4), payload, fds }
  }

  #fill(fd: number, length: number, fds: number[]): Buffer | undefined {
    const bytes = Buffer.alloc(length)
    const received = new Int32Array(18)
    for (let done = 0; done < length; ) {
      native.pollIn(fd, 1000)
      const count = native.recvMessage(fd, bytes, done, length - done, received)
      if (count === -11) continue
      if (count <= 0) return undefined
      for (let i = 0; i < (received[0] ?? 0); i++) fds.push(received[2 + i] ?? -1)
      done += count
    }
    return bytes
  }
}

if (process.argv[1] === import.meta.filename) {
  const [, , socketPath = '', journal = '', given = '{}'] = process.argv
  await run(socketPath, journal, JSON.parse(given) as RecordingOptions)
}

/** Messages that no honest front-end sends, and what a back-end may do with them: answer, refuse (NACK), or hang up. */
import { Connection } from '../../src/frontend/connection.ts'
import { FrontendError } from '../../src/frontend/errors.ts'
import { native } from '../../src/native.ts'
import {
  HEADER_SIZE,
  VHOST_USER_NEED_REPLY_MASK,
  VHOST_USER_PROTOCOL_F_BACKEND_REQ,
  VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS,
  VHOST_USER_PROTOCOL_F_REPLY_ACK,
  VHOST_USER_REPLY_MASK,
  VHOST_USER_VERSION,
} from '../../src/vhost-user/wire.ts'
import {
  VHOST_F_LOG_ALL,
  VIRTIO_F_ACCESS_PLATFORM,
  VIRTIO_F_IN_ORDER,
  VIRTIO_F_RING_PACKED,
} from '../../src/virtio/constants.ts'
import { featureSet } from '../../src/virtio/features.ts'
import { eventually } from './backend.ts'

export const NOTHING = new Uint8Array(0)

export interface NegotiateOptions {
  readonly withoutProtocolFeatures?: readonly number[]
  /** Leave SET_FEATURES away. */
  readonly withoutFeatures?: boolean
  readonly timeoutMs?: number
}

/** What makes rings other than those that the rows here speak of: split, and in the front-end's own addresses. */
const OTHER_RINGS = featureSet(VHOST_F_LOG_ALL, VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED, VIRTIO_F_IN_ORDER)
const NEEDED_BY_INBAND = [VHOST_USER_PROTOCOL_F_BACKEND_REQ, VHOST_USER_PROTOCOL_F_REPLY_ACK]

/** A connection with everything negotiated that is offered, but for other kinds of rings; without memory and rings. */
export function negotiated(socket: string, options: NegotiateOptions = {}): Connection & Disposable {
  const connection = Connection.connect(socket, { timeoutMs: options.timeoutMs ?? 3000 })
  const features = connection.getFeatures() & ~OTHER_RINGS
  const without = options.withoutProtocolFeatures ?? []
  const inband = NEEDED_BY_INBAND.some((bit) => without.includes(bit))
    ? [VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS]
    : []
  connection.setProtocolFeatures(connection.getProtocolFeatures() & ~featureSet(...without, ...inband))
  connection.setOwner()
  if (options.withoutFeatures !== true) connection.setFeatures(features)
  return Object.assign(connection, { [Symbol.dispose]: () => connection.close() })
}

/** A header with any fields, and what follows it. */
export function message(
  request: number,
  payload: Uint8Array = NOTHING,
  { flags = VHOST_USER_VERSION, size = payload.length }: { flags?: number; size?: number } = {}
): Uint8Array {
  const bytes = new Uint8Array(HEADER_SIZE + payload.length)
  const view = new DataView(bytes.buffer)
  view.setUint32(0, request, true)
  view.setUint32(4, flags, true)
  view.setUint32(8, size, true)
  bytes.set(payload, HEADER_SIZE)
  return bytes
}

/**
 * `ok`: done (acknowledged with 0 when it was asked for). `nack`: refused, the session goes on. `closed`: it
 * hung up.
 */
export type Outcome = 'ok' | 'nack' | 'closed'

/** Sends one message that has no reply of its own, and says what came of it. */
export function outcome(
  connection: Connection,
  request: number,
  payload: Uint8Array,
  fds: readonly number[] = [],
  needReply = true
): Outcome {
  return outcomeOf(() => {
    const flags = VHOST_USER_VERSION | (needReply ? VHOST_USER_NEED_REPLY_MASK : 0)
    connection.send(message(request, payload, { flags }), fds)
    if (!needReply) {
      connection.barrier()
      return 'ok'
    }
    const reply = connection.channel.receive(`request ${request}`)
    if (reply.request !== request || (reply.flags & VHOST_USER_REPLY_MASK) === 0 || reply.payload.length !== 8) {
      throw new Error(`request ${request} got the answer ${reply.request} with ${reply.payload.length} bytes`)
    }
    const value = new DataView(reply.payload.buffer, reply.payload.byteOffset).getBigUint64(0, true)
    // A NACK leaves the session as it was.
    connection.barrier()
    return value === 0n ? 'ok' : 'nack'
  })
}

/** What a request did: `nack` and `closed` are told from the errors that they are. */
export function outcomeOf(send: () => unknown): Outcome {
  try {
    const result = send()
    return result === 'nack' || result === 'closed' ? result : 'ok'
  } catch (error) {
    if (!(error instanceof FrontendError)) throw error
    if (error.failure === 'nack' || error.failure === 'closed') return error.failure
    throw error
  }
}

/** Whether the back-end hangs up within two seconds. */
export function hangsUp(connection: Connection): boolean {
  return eventually(() => connection.channel.hungUp())
}

/** Sends `request` as a bad message, both ways: with NEED_REPLY on one connection, without on another. */
export function bothWays(
  socket: string,
  request: number,
  payload: Uint8Array,
  fds: readonly number[] = [],
  prepare: (connection: Connection) => void = () => {}
): Outcome[] {
  return [true, false].map((needReply) => {
    using connection = negotiated(socket)
    prepare(connection)
    return outcome(connection, request, payload, fds, needReply)
  })
}

/** Runs `use` with a new memfd of `size` bytes. */
export function withMemfd<T>(size: number, use: (fd: number) => T): T {
  const fd = native.memfd('virtiod-test', size, 0)
  if (fd < 0) throw new Error(`memfd_create: ${fd}`)
  try {
    return use(fd)
  } finally {
    native.close(fd)
  }
}

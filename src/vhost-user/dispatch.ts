/**
 * One message to a session: whether it may be served, by its row in requests.ts, and what is answered. Every way a
 * request can be refused is here.
 */
import { native } from '../native.ts'
import type { Message } from './connection.ts'
import { ProtocolError } from './errors.ts'
import type { Negotiated } from './negotiated.ts'
import { REQUESTS, type RequestRow } from './requests.ts'
import type { Session } from './session.ts'
import { requestName, u64, VHOST_USER_PROTOCOL_F_REPLY_ACK } from './wire.ts'

/** @throws ProtocolError when it is refused and nothing can say so but the end of the connection */
export async function dispatch(session: Session, message: Message): Promise<void> {
  const { connection, negotiated } = session
  const { request } = message
  // Not after the request: SET_PROTOCOL_FEATURES itself may bring REPLY_ACK.
  const acknowledge = message.needReply && negotiated.hasProtocol(VHOST_USER_PROTOCOL_F_REPLY_ACK)
  const nack = acknowledge && REQUESTS[request]?.replies !== true ? u64(1n) : undefined
  let refusal = nack
  try {
    const row = checked(REQUESTS[request], message, negotiated)
    // A message of the wrong form gets no reply of its request.
    refusal = row.refusal ?? nack
    const reply = await row.serve(session, message.payload, message)
    if (reply instanceof Uint8Array) connection.reply(request, reply)
    else if (reply !== undefined) replyWithFds(session, request, reply.payload, reply.fds)
    else if (acknowledge) connection.reply(request, u64(0n))
  } catch (error) {
    if (!(error instanceof ProtocolError)) throw error
    const named = new ProtocolError(error.code, `${requestName(request)}: ${error.message}`, { cause: error })
    if (refusal === undefined || error.closes) throw named
    connection.reply(request, refusal)
    session.onRefused?.(named)
  }
}

function replyWithFds(session: Session, request: number, payload: Uint8Array, fds: readonly number[]): void {
  try {
    session.connection.reply(request, payload, fds)
  } finally {
    for (const fd of fds) native.close(fd)
  }
}

/** The row of a message that may be served. @throws ProtocolError */
function checked(row: RequestRow | undefined, message: Message, negotiated: Negotiated): RequestRow {
  if (row === undefined) throw new ProtocolError('ERR_PROTOCOL_REQUEST', 'an unknown or unsupported request')
  if (row.feature !== undefined && !negotiated.hasProtocol(row.feature)) {
    throw new ProtocolError('ERR_PROTOCOL_REQUEST', 'its protocol feature was not negotiated')
  }
  const size = message.payload.byteLength
  const [smallest, largest] = typeof row.payload === 'number' ? [row.payload, row.payload] : row.payload
  if (size < smallest || size > largest) throw new ProtocolError('ERR_PROTOCOL_SIZE', `a payload of ${size} bytes`)
  const [fewest, most] = row.fds ?? [0, 0]
  if (message.fdCount < fewest || message.fdCount > most) {
    throw new ProtocolError('ERR_PROTOCOL_FDS', `${message.fdCount} file descriptors`)
  }
  return row
}

/**
 * Messages by hand: headers that say anything, payloads of any size. For the cases about framing. It must not know
 * sessions.
 */
import {
  HEADER_SIZE,
  requestName,
  VHOST_USER_NEED_REPLY_MASK,
  VHOST_USER_REPLY_MASK,
  VHOST_USER_VERSION,
  VHOST_USER_VERSION_MASK,
} from '../../vhost-user/wire.ts'
import type { Message } from '../channel.ts'
import type { Connection } from '../connection.ts'
import { expect, expectEqual } from './case.ts'

export interface RawMessage {
  readonly request: number
  /** Default: version 1. */
  readonly flags?: number
  readonly payload?: Uint8Array
  /** What the header says of the payload's size; default: the truth. */
  readonly size?: number
}

export const NEED_REPLY = VHOST_USER_VERSION | VHOST_USER_NEED_REPLY_MASK

export function bytesOf({
  request,
  flags = VHOST_USER_VERSION,
  payload = new Uint8Array(0),
  size,
}: RawMessage): Uint8Array {
  const bytes = new Uint8Array(HEADER_SIZE + payload.length)
  const view = new DataView(bytes.buffer)
  view.setUint32(0, request, true)
  view.setUint32(4, flags, true)
  view.setUint32(8, size ?? payload.length, true)
  bytes.set(payload, HEADER_SIZE)
  return bytes
}

export function joined(...messages: readonly RawMessage[]): Uint8Array {
  return new Uint8Array(Buffer.concat(messages.map(bytesOf)))
}

/** The next message is a reply to `request`, as the specification forms one. @throws Violation, FrontendError */
export function receiveReply(connection: Connection, request: number, payloadSize?: number): Message {
  const name = requestName(request)
  const reply = connection.channel.receive(name)
  expectEqual(`the reply to ${name} names request`, reply.request, request)
  expectEqual(`the reply to ${name} has version`, reply.flags & VHOST_USER_VERSION_MASK, VHOST_USER_VERSION)
  expect((reply.flags & VHOST_USER_REPLY_MASK) !== 0, `the reply to ${name} has the reply flag`, `flags ${reply.flags}`)
  if (payloadSize !== undefined) expectEqual(`bytes of the reply to ${name}`, reply.payload.length, payloadSize)
  return reply
}

export function u64Of(reply: Message): bigint {
  return new DataView(reply.payload.buffer, reply.payload.byteOffset, 8).getBigUint64(0, true)
}

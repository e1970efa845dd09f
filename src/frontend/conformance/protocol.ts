/** Cases about messages: how they are cut, what is answered to what, and that the stream stays in step. */
import { native } from '../../native.ts'
import * as wire from '../../vhost-user/wire.ts'
import { VHOST_USER_F_PROTOCOL_FEATURES, VIRTIO_F_VERSION_1 } from '../../virtio/constants.ts'
import { featureSet } from '../../virtio/features.ts'
import { type Connection, payload64, vringState } from '../connection.ts'
import { FrontendError } from '../errors.ts'
import { InflightArea } from '../inflight.ts'
import { layouts } from '../memory.ts'
import { wireRegion } from '../session.ts'
import { type ConformanceCase, expect, expectEqual } from './case.ts'
import type { Answer, Context } from './context.ts'
import type { Guest, Ring } from './guest.ts'
import { bytesOf, joined, NEED_REPLY, type RawMessage, receiveReply, u64Of } from './messages.ts'

const NOTHING = new Uint8Array(0)
const { VHOST_USER_GET_FEATURES, VHOST_USER_PROTOCOL_F_REPLY_ACK } = wire

/** No request of any version has this number. */
const UNKNOWN = 0x1234

/** A connection on which REPLY_ACK is negotiated, and nothing else. */
export function acknowledging(context: Context): Connection {
  const connection = context.connect()
  connection.getFeatures()
  connection.getProtocolFeatures()
  connection.setProtocolFeatures(featureSet(VHOST_USER_PROTOCOL_F_REPLY_ACK))
  connection.setOwner()
  return connection
}

/** A later GET_FEATURES is answered as before: the stream is in step. @throws Violation, FrontendError */
function expectInStep(context: Context, connection: Connection, after: string): void {
  connection.send(bytesOf({ request: VHOST_USER_GET_FEATURES }))
  const reply = receiveReply(connection, VHOST_USER_GET_FEATURES, 8)
  expectEqual(`GET_FEATURES after ${after}`, u64Of(reply), context.facts.features)
}

/**
 * Sends a malformed message with NEED_REPLY where that is meaningful: a reply other than 0 or the end of the connection
 * is a refusal; silence shows that the back-end waits for more or ignored it.
 */
function answerTo(connection: Connection, message: RawMessage, waitMs = 300): Answer | 'no answer' {
  try {
    connection.send(bytesOf(message))
    if (!connection.channel.readable(waitMs)) return 'no answer'
    const reply = connection.channel.receive('a malformed message')
    if (reply.payload.length === 0) return 'refused'
    return reply.payload.length === 8 && u64Of(reply) === 0n ? 'acknowledged' : 'refused'
  } catch (error) {
    if (error instanceof FrontendError && error.failure === 'closed') return 'closed'
    throw error
  }
}

function malformed(
  one: Pick<ConformanceCase, 'id' | 'rule' | 'cites'> & Partial<ConformanceCase>,
  message: RawMessage,
  allowed: readonly (Answer | 'no answer')[] = ['refused', 'closed']
): ConformanceCase {
  return {
    group: 'protocol',
    level: 'SHOULD',
    needs: { protocol: [VHOST_USER_PROTOCOL_F_REPLY_ACK] },
    ...one,
    run: (context) => {
      const answer = answerTo(acknowledging(context), message)
      expect(allowed.includes(answer), allowed.join(' or '), answer)
      return answer
    },
  }
}

const framingCases: readonly ConformanceCase[] = [
  {
    id: 'msg-reply-header',
    group: 'protocol',
    level: 'MUST',
    rule: 'puts the request’s number, version 1, the reply flag and the payload’s size into the header of a reply',
    cites: 'vhost-user.rst "Header"',
    run: (context) => {
      const connection = context.connect()
      connection.send(bytesOf({ request: VHOST_USER_GET_FEATURES }))
      const reply = receiveReply(connection, VHOST_USER_GET_FEATURES, 8)
      return `flags 0x${reply.flags.toString(16)}, ${reply.payload.length} bytes`
    },
  },
  {
    id: 'msg-single-bytes',
    group: 'protocol',
    level: 'MUST',
    rule: 'understands a message that comes in single bytes',
    cites: 'vhost-user.rst "Header" (a stream has no message boundaries: unix(7) SOCK_STREAM)',
    run: (context) => {
      const connection = context.connect()
      connection.setOwner()
      for (const message of [
        { request: wire.VHOST_USER_SET_FEATURES, payload: payload64(featureSet(VIRTIO_F_VERSION_1)) },
        { request: VHOST_USER_GET_FEATURES },
      ]) {
        for (const byte of bytesOf(message)) connection.send(Uint8Array.of(byte))
      }
      expectEqual('features', u64Of(receiveReply(connection, VHOST_USER_GET_FEATURES, 8)), context.facts.features)
      return 'answered'
    },
  },
  {
    id: 'msg-coalesced',
    group: 'protocol',
    level: 'MUST',
    rule: 'understands several messages that come in one piece, and answers them in their order',
    cites: 'vhost-user.rst "Header", "Communication"',
    run: (context) => {
      const connection = context.connect()
      const get = { request: VHOST_USER_GET_FEATURES }
      connection.send(joined({ request: wire.VHOST_USER_SET_OWNER }, get, get, get))
      for (let i = 0; i < 3; i++)
        expectEqual('features', u64Of(receiveReply(connection, VHOST_USER_GET_FEATURES, 8)), context.facts.features)
      expectInStep(context, connection, 'four messages in one piece')
      return '3 replies'
    },
  },
  {
    id: 'msg-coalesced-odd',
    group: 'protocol',
    level: 'MUST',
    rule: 'understands messages whose boundaries lie anywhere in the pieces of the stream',
    cites: 'vhost-user.rst "Header"',
    run: (context) => {
      const connection = context.connect()
      const get = { request: VHOST_USER_GET_FEATURES }
      const bytes = joined({ request: wire.VHOST_USER_SET_OWNER }, get, get, get, get)
      for (let at = 0, cut = 7; at < bytes.length; at += cut, cut = (cut * 3) % 17 || 5)
        connection.send(bytes.subarray(at, at + cut))
      for (let i = 0; i < 4; i++) receiveReply(connection, VHOST_USER_GET_FEATURES, 8)
      return '4 replies'
    },
  },
  {
    id: 'msg-no-reply-unasked',
    group: 'protocol',
    level: 'MUST',
    rule: 'sends no reply to requests that have none, although REPLY_ACK is negotiated, unless NEED_REPLY asks for one',
    cites: 'vhost-user.rst "Communication", "VHOST_USER_PROTOCOL_F_REPLY_ACK"',
    needs: { protocol: [VHOST_USER_PROTOCOL_F_REPLY_ACK] },
    run: (context) => {
      const connection = acknowledging(context)
      connection.ackMode = 'none'
      connection.setOwner()
      connection.setFeatures(context.facts.features & featureSet(VIRTIO_F_VERSION_1, 30))
      connection.setVringNum(0, 64)
      connection.setVringBase(0, 0)
      context.expectQuiet(connection, 'requests without NEED_REPLY')
      expectInStep(context, connection, 'them')
      return 'silence, and the next reply is the one asked for'
    },
  },
  {
    id: 'msg-need-reply-unnegotiated',
    group: 'protocol',
    level: 'SHOULD',
    rule: 'ignores NEED_REPLY as long as REPLY_ACK is not negotiated',
    cites: 'vhost-user.rst "VHOST_USER_PROTOCOL_F_REPLY_ACK" ("With this protocol extension negotiated, …")',
    run: (context) => {
      const connection = context.connect()
      connection.command(wire.VHOST_USER_SET_OWNER, NOTHING, [], 'none')
      connection.send(bytesOf({ request: wire.VHOST_USER_SET_OWNER, flags: NEED_REPLY }))
      context.expectQuiet(connection, 'SET_OWNER with NEED_REPLY')
      return 'silence'
    },
  },
  {
    id: 'msg-need-reply-of-replies',
    group: 'protocol',
    level: 'MUST',
    rule: 'answers requests that have a reply of their own with that one and no other when NEED_REPLY is set',
    cites: 'vhost-user.rst "VHOST_USER_PROTOCOL_F_REPLY_ACK" ("brings no behavioural change")',
    needs: { protocol: [VHOST_USER_PROTOCOL_F_REPLY_ACK] },
    run: (context) => {
      const connection = acknowledging(context)
      const own: [number, Uint8Array][] = [
        [VHOST_USER_GET_FEATURES, NOTHING],
        [wire.VHOST_USER_GET_PROTOCOL_FEATURES, NOTHING],
      ]
      for (const [request, payload] of own) {
        connection.send(bytesOf({ request, payload, flags: NEED_REPLY }))
        receiveReply(connection, request, 8)
        context.expectQuiet(connection, `${wire.requestName(request)} beside its reply`, 30)
      }
      const guest = context.guest()
      const ring = guest.prepare(0)
      ring.start()
      guest.connection.send(
        bytesOf({ request: wire.VHOST_USER_GET_VRING_BASE, payload: vringState(0, 0), flags: NEED_REPLY })
      )
      receiveReply(guest.connection, wire.VHOST_USER_GET_VRING_BASE, 8)
      ring.started = false
      context.expectQuiet(guest.connection, 'GET_VRING_BASE beside its reply', 30)
      return `one reply each: ${own.map(([request]) => wire.requestName(request)).join(', ')}, GET_VRING_BASE`
    },
  },
  malformed(
    {
      id: 'msg-unknown-request',
      level: 'MUST',
      rule: 'does not acknowledge a request that it does not know as done',
      cites: 'vhost-user.rst "VHOST_USER_PROTOCOL_F_REPLY_ACK" (non-zero on failure)',
    },
    { request: UNKNOWN, flags: NEED_REPLY }
  ),
  {
    id: 'msg-unknown-request-quiet',
    group: 'protocol',
    level: 'MUST',
    rule: 'stays in step after a request that it does not know, without a reply that was not asked for, or closes',
    cites: 'vhost-user.rst "Communication" ("it may also close the connection")',
    run: (context) => {
      const connection = context.connect()
      connection.setOwner()
      try {
        connection.send(bytesOf({ request: UNKNOWN, payload: new Uint8Array(24) }))
        expectInStep(context, connection, 'an unknown request with 24 bytes')
      } catch (error) {
        if (error instanceof FrontendError && error.failure === 'closed') return 'closed'
        throw error
      }
      return 'the next request is answered'
    },
  },
  malformed(
    {
      id: 'msg-version-0',
      rule: 'refuses a message of version 0',
      cites: 'vhost-user.rst "Header" ("Lower 2 bits are the version (currently 0x01)")',
    },
    { request: wire.VHOST_USER_SET_OWNER, flags: 8 }
  ),
  malformed(
    {
      id: 'msg-version-2',
      rule: 'refuses a message of version 2',
      cites: 'vhost-user.rst "Header"',
    },
    { request: wire.VHOST_USER_SET_OWNER, flags: 2 | 8 }
  ),
  malformed(
    {
      id: 'msg-reply-flag',
      rule: 'refuses a request that has the reply flag',
      cites: 'vhost-user.rst "Header" ("needs to be sent on each reply from the back-end")',
    },
    { request: wire.VHOST_USER_SET_OWNER, flags: NEED_REPLY | 4 },
    ['refused', 'closed', 'no answer']
  ),
  malformed(
    {
      id: 'msg-short-payload',
      rule: 'refuses a payload that is shorter than its type',
      cites: 'vhost-user.rst "Payload" (a vring state description: 8 bytes)',
    },
    { request: wire.VHOST_USER_SET_VRING_NUM, flags: NEED_REPLY, payload: Uint8Array.of(0, 0, 0, 0) }
  ),
  malformed(
    {
      id: 'msg-no-payload',
      rule: 'refuses a request without the payload that it has',
      cites: 'vhost-user.rst "VHOST_USER_SET_FEATURES" (request payload: u64)',
    },
    { request: wire.VHOST_USER_SET_FEATURES, flags: NEED_REPLY }
  ),
  {
    id: 'msg-long-payload',
    group: 'protocol',
    level: 'MUST',
    rule: 'stays in step, or closes the connection, when a payload is longer than its type',
    cites: 'vhost-user.rst "Header" (size: 32-bit size of the payload)',
    run: (context) => {
      const connection = context.connect()
      connection.setOwner()
      const payload = new Uint8Array(200).fill(1)
      payload.set(payload64(featureSet(VIRTIO_F_VERSION_1)))
      try {
        connection.send(bytesOf({ request: wire.VHOST_USER_SET_FEATURES, payload }))
        expectInStep(context, connection, 'SET_FEATURES with 200 bytes')
      } catch (error) {
        if (error instanceof FrontendError && error.failure === 'closed') return 'closed'
        throw error
      }
      return 'in step'
    },
  },
  {
    id: 'msg-oversized',
    group: 'protocol',
    level: 'SHOULD',
    rule: 'refuses a header that announces 64 KiB, 1 GiB or 4 GiB of payload instead of waiting for it',
    cites: 'vhost-user.rst "Header"; no payload is that long',
    run: (context) => {
      const answers: string[] = []
      for (const size of [0x1_0000, 0x4000_0000, 0xffff_ffff]) {
        const connection = context.connect()
        const answer = answerTo(connection, {
          request: wire.VHOST_USER_SET_FEATURES,
          size,
          payload: new Uint8Array(64),
        })
        expect(answer === 'closed' || answer === 'refused', 'refused or closed', `${size} bytes: ${answer}`)
        answers.push(answer)
      }
      return [...new Set(answers)].join(', ')
    },
  },
  {
    id: 'msg-nothing-said',
    group: 'protocol',
    level: 'MUST',
    rule: 'serves the next front-end when one has come and gone without a word',
    cites: 'vhost-user.rst "Communication"',
    run: (context) => {
      for (let i = 0; i < 20; i++) context.connect()
      context.expectServing('the next session')
      return 'after 20 of them'
    },
  },
  {
    id: 'msg-end-inside',
    group: 'protocol',
    level: 'MUST',
    rule: 'serves the next front-end when one has gone in the middle of a header or a payload',
    cites: 'vhost-user.rst "Communication" ("If front-end is unable to send the full message … it will close")',
    run: (context) => {
      const bytes = bytesOf({ request: wire.VHOST_USER_SET_FEATURES, payload: payload64(0n) })
      for (const length of [1, 4, 11, 12, 15, 19]) {
        const connection = context.connect()
        connection.setOwner()
        connection.send(bytes.subarray(0, length))
      }
      context.expectServing('the next session')
      return 'after 1, 4, 11, 12, 15 and 19 of 20 bytes'
    },
  },
]

/** Every request of a usual session, each in a case of its own: it alone is sent with NEED_REPLY. */
function acknowledgmentCases(): ConformanceCase[] {
  return Object.entries(STEPS).map(([name, { gate, take }]) => ({
    id: `ack-${name.toLowerCase().replaceAll('_', '-')}`,
    group: 'protocol',
    level: 'MUST',
    rule: `answers ${name} with 0 when NEED_REPLY asks for it, and the request was right`,
    cites: `vhost-user.rst "VHOST_USER_PROTOCOL_F_REPLY_ACK", "VHOST_USER_${name}"`,
    needs: { protocol: [VHOST_USER_PROTOCOL_F_REPLY_ACK, ...(gate === undefined ? [] : [gate])] },
    run: (context) => {
      let asked: Connection | undefined
      take(context, (connection, send) => {
        connection.ackMode = 'auto'
        context.expectTaken(connection, name, send)
        connection.ackMode = 'none'
        context.expectQuiet(connection, `${name} beside its acknowledgment`, 20)
        asked = connection
      })
      if (asked === undefined) throw new Error(`the suite did not send ${name}`)
      return 'the reply 0, once'
    },
  }))
}

/** Sends something with NEED_REPLY and looks at what comes. */
type Ask = (connection: Connection, send: () => void) => void

interface Step {
  /** The protocol feature that it belongs to. */
  readonly gate?: number
  readonly take: (context: Context, ask: Ask) => void
}

/** A guest that asks for no acknowledgments. */
function silentGuest(context: Context, withoutProtocolFeatures: readonly number[] = []): Guest {
  const connection = context.connect()
  connection.ackMode = 'none'
  return context.guestOver(connection, { withoutProtocolFeatures, memory: layouts.single(32 * 2 ** 20) })
}

/** A ring is set up step by step, and works at the end. */
function ringStep(chosen: (ring: Ring) => void): Step {
  return {
    take: (context, ask) => {
      const guest = silentGuest(context)
      context.startCompanions(guest)
      const ring = guest.prepare(context.ringIndex)
      for (const step of RING_STEPS) {
        if (step === chosen) ask(guest.connection, () => step(ring))
        else step(ring)
      }
      ring.run(1, {}, 'a request on that ring')
    },
  }
}

const num = (ring: Ring): void => ring.num()
const base = (ring: Ring): void => ring.base()
const address = (ring: Ring): void => ring.address()
const kick = (ring: Ring): void => ring.kick()
const call = (ring: Ring): void => ring.call()
const err = (ring: Ring): void => ring.err()
const enable = (ring: Ring): void => ring.enable()
const RING_STEPS = [num, base, address, kick, call, err, enable]

/** A request that stands for itself: its protocol feature is negotiated, and the features are set. */
function plainStep(gate: number, send: (connection: Connection) => void): Step {
  return {
    gate,
    take: (context, ask) => {
      const connection = context.connect()
      connection.setProtocolFeatures(featureSet(VHOST_USER_PROTOCOL_F_REPLY_ACK, gate))
      connection.ackMode = 'none'
      connection.setOwner()
      connection.setFeatures(context.facts.features & featureSet(VIRTIO_F_VERSION_1, VHOST_USER_F_PROTOCOL_FEATURES))
      ask(connection, () => send(connection))
    },
  }
}

/** A second region comes, and goes again. */
function regionStep(chosen: 'add' | 'remove'): Step {
  return {
    gate: wire.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    take: (context, ask) => {
      const { connection, memory } = silentGuest(context)
      const region = wireRegion(memory.addRegion({ gpa: 2 ** 33, uva: 0x7f50_0000_0000, size: 2 ** 20 }))
      const add = (): void => connection.addMemRegion(region)
      const remove = (): void => connection.removeMemRegion(region)
      if (chosen === 'add') ask(connection, add)
      else {
        add()
        ask(connection, remove)
      }
    },
  }
}

const STEPS: Readonly<Record<string, Step>> = {
  SET_OWNER: {
    take: (context, ask) => {
      const connection = context.connect()
      connection.setProtocolFeatures(featureSet(VHOST_USER_PROTOCOL_F_REPLY_ACK))
      ask(connection, () => connection.setOwner())
    },
  },
  SET_FEATURES: {
    take: (context, ask) => {
      const { connection, session } = silentGuest(context)
      ask(connection, () => connection.setFeatures(session.features))
    },
  },
  SET_BACKEND_REQ_FD: plainStep(wire.VHOST_USER_PROTOCOL_F_BACKEND_REQ, (connection) =>
    connection.setBackendRequestFd()
  ),
  SET_STATUS: plainStep(wire.VHOST_USER_PROTOCOL_F_STATUS, (connection) => connection.setStatus(1)),
  RESET_DEVICE: plainStep(wire.VHOST_USER_PROTOCOL_F_RESET_DEVICE, (connection) => connection.resetDevice()),
  SET_LOG_FD: plainStep(wire.VHOST_USER_PROTOCOL_F_LOG_SHMFD, (connection) => {
    const fd = native.eventfd(0)
    try {
      connection.setLogFd(fd)
    } finally {
      native.close(fd)
    }
  }),
  SET_INFLIGHT_FD: plainStep(wire.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD, (connection) => {
    const area = InflightArea.create(1, 64, false)
    try {
      area.share(connection)
    } finally {
      area.close()
    }
  }),
  SET_MEM_TABLE: {
    take: (context, ask) => {
      const { connection, memory } = silentGuest(context, [wire.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS])
      ask(connection, () => connection.setMemTable(memory.regions.map(wireRegion)))
    },
  },
  ADD_MEM_REG: regionStep('add'),
  REM_MEM_REG: regionStep('remove'),
  SET_VRING_NUM: ringStep(num),
  SET_VRING_BASE: ringStep(base),
  SET_VRING_ADDR: ringStep(address),
  SET_VRING_KICK: ringStep(kick),
  SET_VRING_CALL: ringStep(call),
  SET_VRING_ERR: ringStep(err),
  SET_VRING_ENABLE: ringStep(enable),
}

export const messageCases: readonly ConformanceCase[] = [...framingCases, ...acknowledgmentCases()]

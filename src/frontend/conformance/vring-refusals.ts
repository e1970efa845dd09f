/** Cases about messages on rings that no front-end may send. */
import {
  VHOST_USER_PROTOCOL_F_REPLY_ACK,
  VHOST_USER_SET_VRING_ADDR,
  VHOST_USER_SET_VRING_KICK,
} from '../../vhost-user/wire.ts'
import { VIRTQ_MAX_SIZE } from '../../virtio/constants.ts'
import { type Connection, payload64 } from '../connection.ts'
import { applicable, type ConformanceCase } from './case.ts'
import type { Ring } from './guest.ts'

const ACK = VHOST_USER_PROTOCOL_F_REPLY_ACK

/** A message about a ring that the back-end ought to refuse. */
function refused(
  one: Pick<ConformanceCase, 'id' | 'rule' | 'cites'> & Partial<ConformanceCase>,
  send: (connection: Connection, ring: Ring) => void
): ConformanceCase {
  return {
    group: 'vrings',
    level: 'SHOULD',
    needs: { protocol: [ACK] },
    ...one,
    run: (context) => {
      const guest = context.guest()
      const ring = guest.prepare(context.ringIndex)
      return context.expectRefusal(guest.connection, 'it', () => send(guest.connection, ring))
    },
  }
}

/** The index of a queue that no device has (the field has 32 bits; that of eventfds 8). */
const NO_QUEUE = 250

function indexCases(): ConformanceCase[] {
  const sends: Readonly<Record<string, (connection: Connection) => void>> = {
    SET_VRING_NUM: (connection) => connection.setVringNum(NO_QUEUE, 64),
    SET_VRING_BASE: (connection) => connection.setVringBase(NO_QUEUE, 0),
    SET_VRING_ADDR: (connection) =>
      connection.setVringAddr({ index: NO_QUEUE, flags: 0, log: 0n, descriptor: 0n, used: 0n, available: 0n }),
    SET_VRING_ENABLE: (connection) => connection.setVringEnable(NO_QUEUE, true),
    SET_VRING_KICK: (connection) => connection.setVringKick(NO_QUEUE, undefined),
    SET_VRING_CALL: (connection) => connection.setVringCall(NO_QUEUE, undefined),
    SET_VRING_ERR: (connection) => connection.setVringErr(NO_QUEUE, undefined),
  }
  return Object.entries(sends).map(([name, send]) => ({
    id: `vring-index-${name.slice(10).toLowerCase()}`,
    // Behind the others: a back-end that does not look may write behind its rings and die.
    group: 'robustness',
    level: 'MUST',
    rule: `does not acknowledge ${name} of a queue that it does not have`,
    cites: `vhost-user.rst "VHOST_USER_${name}"; "VHOST_USER_PROTOCOL_F_REPLY_ACK" (non-zero on failure)`,
    needs: { protocol: [ACK] },
    run: (context) => {
      // What GET_QUEUE_NUM counts may be pairs.
      const most = Math.max(
        context.facts.rings,
        (context.facts.queueNum ?? 0) * (context.facts.device === 'net' ? 2 : 1)
      )
      applicable(most <= NO_QUEUE, `it may have ${most} rings`)
      const { connection } = context.guest()
      return context.expectRefusal(connection, `queue ${NO_QUEUE}`, () => send(connection))
    },
  }))
}

export const vringRefusalCases: readonly ConformanceCase[] = [
  refused(
    {
      id: 'vring-num-0',
      rule: 'refuses a ring of no entries',
      cites: 'vhost-user.rst "VHOST_USER_SET_VRING_NUM"; virtio 1.3 §2.7',
    },
    (connection, ring) => connection.setVringNum(ring.index, 0)
  ),
  {
    id: 'vring-num-odd',
    group: 'vrings',
    level: 'SHOULD',
    rule: 'refuses a split ring whose size is no power of two, at the latest when it is started',
    cites: 'virtio 1.3 §2.7 ("Queue Size value is always a power of 2")',
    needs: { protocol: [ACK] },
    run: (context) => {
      const guest = context.guest()
      const ring = guest.prepare(context.ringIndex)
      return context.expectRefusal(guest.connection, 'a ring of 100 entries', () => {
        guest.connection.setVringNum(ring.index, 100)
        ring.base()
        ring.address()
        ring.kick()
      })
    },
  },
  refused(
    {
      id: 'vring-num-65536',
      rule: `refuses a ring of more than ${VIRTQ_MAX_SIZE} entries`,
      cites: 'virtio 1.3 §2.7 ("maximum Queue Size value is 32768")',
    },
    (connection, ring) => connection.setVringNum(ring.index, 65536)
  ),
  refused(
    {
      id: 'vring-num-huge',
      rule: 'refuses a ring of 2^31 entries',
      cites: 'virtio 1.3 §2.7',
    },
    (connection, ring) => connection.setVringNum(ring.index, 0x8000_0000)
  ),
  refused(
    {
      id: 'vring-kick-fd-missing',
      rule: 'refuses SET_VRING_KICK that has neither a file descriptor nor the flag that there is none',
      cites: 'vhost-user.rst "VHOST_USER_SET_VRING_KICK" (bit 8)',
    },
    (connection, ring) => connection.command(VHOST_USER_SET_VRING_KICK, payload64(BigInt(ring.index)))
  ),
  refused(
    {
      id: 'vring-address-short',
      rule: 'refuses SET_VRING_ADDR of half a payload',
      cites: 'vhost-user.rst "A vring address description" (40 bytes)',
    },
    (connection) => connection.command(VHOST_USER_SET_VRING_ADDR, new Uint8Array(20))
  ),
  {
    id: 'vring-num-running',
    group: 'vrings',
    level: 'SHOULD',
    rule: 'goes on with a ring of its old size when SET_VRING_NUM comes while it runs, or ends the session',
    cites: 'vhost-user.rst "VHOST_USER_SET_VRING_NUM"',
    run: (context) => {
      const { guest, ring } = context.running({}, { size: 64 })
      const answer = context.answer(guest.connection, () => guest.connection.setVringNum(ring.index, 16))
      if (answer === 'closed') return 'closed'
      ring.run(100, {}, 'a request after SET_VRING_NUM')
      return answer
    },
  },
  ...indexCases(),
  {
    id: 'vring-index-65535',
    group: 'robustness',
    level: 'MUST',
    rule: 'does not acknowledge SET_VRING_NUM of queue 65535',
    cites: 'vhost-user.rst "A vring state description" (a 32-bit index); "VHOST_USER_PROTOCOL_F_REPLY_ACK"',
    needs: { protocol: [ACK] },
    run: (context) => {
      const { connection } = context.guest()
      return context.expectRefusal(connection, 'queue 65535', () => connection.setVringNum(65535, 64))
    },
  },
]

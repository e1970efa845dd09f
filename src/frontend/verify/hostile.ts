/**
 * Cases that break a ring the way a hostile guest can (field.md §10's traps). After each: the back-end lives, the broken ring does
 * not answer, the other queue goes on, the ring works again after a restart, and so does a new session.
 */
import { ftruncateSync } from 'node:fs'
import { native } from '../../native.ts'
import { VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS } from '../../vhost-user/wire.ts'
import { VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN } from '../../virtio/blk.ts'
import { VIRTIO_F_INDIRECT_DESC } from '../../virtio/constants.ts'
import { writeHeader } from '../blk.ts'
import { FrontendError } from '../errors.ts'
import { layouts } from '../memory.ts'
import type { Session } from '../session.ts'
import { wireRegion } from '../session.ts'
import { sleepMs } from '../virtqueue.ts'
import type { Attack } from './attacks.ts'
import { ATTACKS, makeVictim, RING_SIZE } from './attacks.ts'
import type { VerifyCase, VerifyContext } from './case.ts'
import { must, need } from './case.ts'

const MIB = 2 ** 20

function attackCase(attack: Attack): VerifyCase {
  return {
    name: `hostile/${attack.name}`,
    title: attack.title,
    spec: 'virtio 1.3 §2.7.5, §2.7.6; a guest must not harm its host',
    run: (context) => {
      need(!context.packed && context.format.inOrder !== true, 'it is about plain split rings')
      need(attack.indirect !== true || context.has(VIRTIO_F_INDIRECT_DESC), 'INDIRECT_DESC is not offered')
      const { session, blk } = context.open({
        queues: Math.min(2, context.facts.maxQueues),
        queueSize: RING_SIZE,
        arena: 2 * MIB,
      })
      blk.read(context.sector(), context.facts.blockSize)
      const victim = makeVictim(session, requestHeader(context))
      const before = victim.ring.usedIndex
      attack.run(victim)
      sleepMs(60)
      const answered = (victim.ring.usedIndex - before) & 0xffff
      const status = victim.status.bytes[0]
      aftermath(context, session, attack, answered, status)
      return answered === 0 ? undefined : `answered, status ${status}`
    },
  }
}

/** What must hold after an attack on queue 0. */
function aftermath(
  context: VerifyContext,
  session: Session,
  attack: Attack,
  answered: number,
  status: number | undefined
): void {
  let ended: unknown
  try {
    session.connection.barrier()
  } catch (error) {
    if (!(error instanceof FrontendError)) throw error
    ended = error
  }
  // Whatever else is wrong: first of all it must live.
  let alive: unknown
  if (ended === undefined) {
    if (session.queues.length > 1) context.mustWork(context.driver(session, 1, MIB), 'the other queue')
    if (answered === 0 || attack.mayServe !== true) restart(context, session)
  }
  try {
    context.mustWork(context.open().blk, 'a new session')
  } catch (error) {
    alive = error
  }
  if (alive !== undefined) throw alive
  must(ended === undefined || attack.mayServe === true, 'the back-end ended the whole session instead of the ring')
  must(
    answered === 0 || attack.mayAnswer === true || attack.mayServe === true,
    `the broken ring answered (${answered} used elements)`
  )
  must(attack.mayServe === true || answered === 0 || status !== VIRTIO_BLK_S_OK, 'the request was answered OK')
}

/** Stops the broken ring and starts a fresh one in its place. */
function restart(context: VerifyContext, session: Session): void {
  session.queue(0).stop()
  session.queues
    .splice(
      session.queues.findIndex((queue) => queue.index === 0),
      1
    )[0]
    ?.close()
  session.startQueue(0, { size: RING_SIZE })
  context.mustWork(context.driver(session, 0, MIB), 'the ring, stopped and started afresh')
}

/** Memory that goes away under a running ring. */
const memoryCases: readonly VerifyCase[] = [
  {
    name: 'hostile/ring-address-outside',
    title: 'SET_VRING_ADDR outside the memory table',
    spec: 'vhost-user.rst "VHOST_USER_SET_VRING_ADDR"',
    run: (context) => {
      const { session } = context.open()
      let answer = 'accepted'
      try {
        session.connection.setVringAddr({
          index: 0,
          flags: 0,
          descriptor: 0x1000n,
          used: 0x2000n,
          available: 0x3000n,
          log: 0n,
        })
        session.queue(0).driver.kickRaw()
        sleepMs(5)
        session.connection.barrier()
      } catch (error) {
        must(error instanceof FrontendError, (error as Error).message)
        answer = error.failure === 'nack' ? 'refused' : 'the session was ended'
      }
      session.close(true)
      context.mustWork(context.open().blk, 'a new session')
      return answer
    },
  },
  {
    name: 'hostile/ring-region-removed',
    title: 'the region of a running ring is removed',
    spec: 'vhost-user.rst "VHOST_USER_REM_MEM_REG"',
    run: (context) => {
      need(context.hasProtocol(VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS), 'CONFIGURE_MEM_SLOTS is not offered')
      const { session, blk } = context.open({ memory: layouts.many(4 * MIB, 2), ringRegions: [1, 1, 1], arena: MIB })
      blk.read(context.sector(), context.facts.blockSize)
      try {
        session.connection.removeMemRegion(wireRegion(session.memory.region(1)))
      } catch (error) {
        must(error instanceof FrontendError, (error as Error).message)
      }
      for (let i = 0; i < 20; i++) {
        session.queue(0).driver.kickRaw()
        sleepMs(1)
      }
      context.mustWork(context.open().blk, 'a new session')
    },
  },
  {
    name: 'hostile/memory-truncated',
    title: 'the memory file shrinks under a running ring (SIGBUS)',
    spec: 'a front-end must not be able to kill the back-end',
    run: (context) => {
      const memory = context.memory(layouts.single(8 * MIB))
      const { session, blk } = context.open({ memory, arena: MIB })
      blk.read(context.sector(), context.facts.blockSize)
      const region = memory.region(0)
      ftruncateSync(region.fd, 0)
      for (let i = 0; i < 20; i++) {
        native.eventfdWrite(session.queue(0).kickFd, 1)
        sleepMs(1)
      }
      session.close(true)
      context.mustWork(context.open().blk, 'a new session')
    },
  },
]

export const hostileCases: readonly VerifyCase[] = [...ATTACKS.map(attackCase), ...memoryCases]

/** A read of the first sector that may be read. */
function requestHeader(context: VerifyContext): Uint8Array {
  const header = new Uint8Array(16)
  writeHeader(header, VIRTIO_BLK_T_IN, context.sector())
  return header
}

/**
 * Cases that break a ring the way a hostile guest can (field.md §10's traps). After each: the back-end lives, the broken ring does
 * not answer, the other queue goes on, the ring works again after a restart, and so does a new session.
 */
import { ftruncateSync } from 'node:fs'
import { native } from '../../native.ts'
import { VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS } from '../../vhost-user/wire.ts'
import { VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN } from '../../virtio/blk.ts'
import {
  VIRTIO_F_INDIRECT_DESC,
  VIRTQ_DESC_F_INDIRECT,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
} from '../../virtio/constants.ts'
import { writeHeader } from '../blk.ts'
import { FrontendError } from '../errors.ts'
import type { GuestBuffer } from '../memory.ts'
import { layouts } from '../memory.ts'
import type { Session } from '../session.ts'
import { wireRegion } from '../session.ts'
import type { SplitDriver } from '../split-driver.ts'
import { sleepMs } from '../virtqueue.ts'
import type { VerifyCase, VerifyContext } from './case.ts'
import { must, need } from './case.ts'

const NEXT = VIRTQ_DESC_F_NEXT
const WRITE = VIRTQ_DESC_F_WRITE
const INDIRECT = VIRTQ_DESC_F_INDIRECT
const MIB = 2 ** 20
const RING_SIZE = 16

/** What a hostile case works with: the victim's ring and valid pieces to build from. */
interface Victim {
  readonly session: Session
  readonly ring: SplitDriver
  /** A valid header (read), 4096 bytes of data, a status byte, 64 KiB for indirect tables. */
  readonly header: GuestBuffer
  readonly data: GuestBuffer
  readonly status: GuestBuffer
  readonly table: GuestBuffer
  /** Makes head 0 available and kicks. */
  go(head?: number): void
  /** Writes a descriptor into the table. */
  entry(index: number, address: number | bigint, length: number, flags: number, next: number): void
}

interface Attack {
  readonly name: string
  readonly title: string
  /** The device may also answer the chain with an error. */
  readonly mayAnswer?: boolean
  /** It may answer it in any way. */
  readonly mayServe?: boolean
  readonly indirect?: boolean
  readonly run: (victim: Victim, context: VerifyContext) => void
}

/** The three valid descriptors of a read from `first` on. */
function validChain({ ring, header, data, status }: Victim, first = 0): void {
  ring.writeDescriptor(first, header.gpa, 16, NEXT, first + 1)
  ring.writeDescriptor(first + 1, data.gpa, 512, NEXT | WRITE, first + 2)
  ring.writeDescriptor(first + 2, status.gpa, 1, WRITE, 0)
}

/** Descriptor 0 points to the table. */
function viaTable(victim: Victim, bytes: number, flags = INDIRECT): void {
  victim.ring.writeDescriptor(0, victim.table.gpa, bytes, flags, 1)
  victim.go()
}

function validTable(victim: Victim): void {
  victim.entry(0, victim.header.gpa, 16, NEXT, 1)
  victim.entry(1, victim.data.gpa, 512, NEXT | WRITE, 2)
  victim.entry(2, victim.status.gpa, 1, WRITE, 0)
}

const ATTACKS: readonly Attack[] = [
  {
    name: 'loop',
    title: 'descriptors that form a loop',
    run: (victim) => {
      validChain(victim)
      victim.ring.writeDescriptor(2, victim.data.gpa, 512, NEXT | WRITE, 1)
      victim.go()
    },
  },
  {
    name: 'self-loop',
    title: 'a descriptor that is its own successor',
    run: (victim) => {
      victim.ring.writeDescriptor(0, victim.header.gpa, 16, NEXT, 0)
      victim.go()
    },
  },
  { name: 'head-out-of-range', title: 'a head beyond the ring', run: (victim) => victim.go(RING_SIZE) },
  { name: 'head-65535', title: 'head 65535', run: (victim) => victim.go(65535) },
  {
    name: 'next-out-of-range',
    title: 'a successor beyond the ring',
    run: (victim) => {
      validChain(victim)
      victim.ring.writeDescriptor(1, victim.data.gpa, 512, NEXT | WRITE, 65535)
      victim.go()
    },
  },
  {
    name: 'avail-jump',
    title: 'an available index more than a ring ahead',
    run: (victim) => {
      validChain(victim)
      victim.ring.publishRaw(victim.ring.availableIndex + RING_SIZE + 1)
    },
  },
  {
    name: 'avail-backwards',
    title: 'an available index that goes backwards',
    run: (victim) => victim.ring.publishRaw(victim.ring.availableIndex - 1),
  },
  {
    name: 'address-outside',
    title: 'a data buffer outside guest memory',
    mayAnswer: true,
    run: (victim) => {
      validChain(victim)
      victim.ring.writeDescriptor(1, 2 ** 45, 512, NEXT | WRITE, 2)
      victim.go()
    },
  },
  {
    name: 'address-straddles-end',
    title: 'a data buffer that runs out of its region',
    mayAnswer: true,
    run: (victim) => {
      const region = victim.session.memory.region(0)
      validChain(victim)
      victim.ring.writeDescriptor(1, region.gpa + region.size - 256, 512, NEXT | WRITE, 2)
      victim.go()
    },
  },
  {
    name: 'address-overflow',
    title: 'a data buffer whose address plus length passes 2^64',
    mayAnswer: true,
    run: (victim) => {
      validChain(victim)
      victim.ring.writeDescriptor(1, 2n ** 64n - 256n, 512, NEXT | WRITE, 2)
      victim.go()
    },
  },
  {
    name: 'address-wraps-into-memory',
    title: 'a data buffer that begins near 2^64 and would wrap around into memory',
    mayAnswer: true,
    run: (victim) => {
      validChain(victim)
      victim.ring.writeDescriptor(1, 2n ** 64n - 4096n, 0xffff_ffff, NEXT | WRITE, 2)
      victim.go()
    },
  },
  {
    name: 'length-4g',
    title: 'a data buffer of 2^32 − 1 bytes',
    mayAnswer: true,
    run: (victim) => {
      validChain(victim)
      victim.ring.writeDescriptor(1, victim.data.gpa, 0xffff_ffff, NEXT | WRITE, 2)
      victim.go()
    },
  },
  {
    name: 'header-outside',
    title: 'a header outside guest memory',
    mayAnswer: true,
    run: (victim) => {
      validChain(victim)
      victim.ring.writeDescriptor(0, 2 ** 45, 16, NEXT, 1)
      victim.go()
    },
  },
  {
    name: 'status-outside',
    title: 'a status byte outside guest memory',
    mayAnswer: true,
    run: (victim) => {
      validChain(victim)
      victim.ring.writeDescriptor(2, 2 ** 45, 1, WRITE, 0)
      victim.go()
    },
  },
  {
    name: 'readable-after-writable',
    title: 'a device-readable descriptor after a device-writable one',
    mayAnswer: true,
    run: (victim) => {
      victim.ring.writeDescriptor(0, victim.status.gpa, 1, NEXT | WRITE, 1)
      victim.ring.writeDescriptor(1, victim.header.gpa, 16, 0, 0)
      victim.go()
    },
  },
  {
    name: 'zero-length',
    title: 'a descriptor of length 0',
    mayServe: true,
    run: (victim) => {
      victim.ring.writeDescriptor(0, victim.header.gpa, 16, NEXT, 1)
      victim.ring.writeDescriptor(1, victim.data.gpa, 0, NEXT | WRITE, 2)
      victim.ring.writeDescriptor(2, victim.status.gpa, 1, WRITE, 0)
      victim.go()
    },
  },
  {
    name: 'unknown-flags',
    title: 'a descriptor with unknown flags',
    mayServe: true,
    run: (victim) => {
      validChain(victim)
      victim.ring.writeDescriptor(1, victim.data.gpa, 512, NEXT | WRITE | 0xfff8, 2)
      victim.go()
    },
  },
  {
    name: 'indirect-in-indirect',
    title: 'an indirect descriptor in an indirect table',
    indirect: true,
    run: (victim) => {
      validTable(victim)
      victim.entry(1, victim.table.gpa + 1024, 48, INDIRECT | NEXT, 2)
      viaTable(victim, 48)
    },
  },
  {
    name: 'indirect-and-next',
    title: 'a descriptor that is indirect and has a successor',
    indirect: true,
    mayServe: true,
    run: (victim) => {
      validTable(victim)
      victim.ring.writeDescriptor(1, victim.data.gpa, 512, WRITE, 0)
      viaTable(victim, 48, INDIRECT | NEXT)
    },
  },
  {
    name: 'indirect-odd-length',
    title: 'an indirect table whose length is no multiple of 16',
    indirect: true,
    run: (victim) => {
      validTable(victim)
      viaTable(victim, 47)
    },
  },
  { name: 'indirect-empty', title: 'an empty indirect table', indirect: true, run: (victim) => viaTable(victim, 0) },
  {
    name: 'indirect-loop',
    title: 'a loop in an indirect table',
    indirect: true,
    run: (victim) => {
      validTable(victim)
      victim.entry(2, victim.data.gpa, 512, NEXT | WRITE, 1)
      viaTable(victim, 48)
    },
  },
  {
    name: 'indirect-next-out-of-range',
    title: 'a successor beyond the indirect table',
    indirect: true,
    run: (victim) => {
      validTable(victim)
      victim.entry(1, victim.data.gpa, 512, NEXT | WRITE, 3)
      viaTable(victim, 48)
    },
  },
  {
    name: 'indirect-outside',
    title: 'an indirect table outside guest memory',
    indirect: true,
    run: (victim) => {
      victim.ring.writeDescriptor(0, 2 ** 45, 48, INDIRECT, 0)
      victim.go()
    },
  },
  {
    name: 'indirect-huge',
    title: 'an indirect table of almost 4 GiB',
    indirect: true,
    run: (victim) => viaTable(victim, 0xffff_fff0),
  },
  {
    name: 'indirect-long',
    title: 'a chain of 4096 one-byte descriptors in an indirect table, longer than the ring and than seg_max',
    indirect: true,
    mayServe: true,
    run: (victim) => {
      victim.entry(0, victim.header.gpa, 16, NEXT, 1)
      for (let i = 1; i < 4095; i++) victim.entry(i, victim.data.gpa + (i % 4096), 1, NEXT | WRITE, i + 1)
      victim.entry(4095, victim.status.gpa, 1, WRITE, 0)
      viaTable(victim, 65536)
    },
  },
]

function attackCase(attack: Attack): VerifyCase {
  return {
    name: `hostile/${attack.name}`,
    title: attack.title,
    spec: 'virtio 1.3 §2.7.5, §2.7.6; a guest must not harm its host',
    run: (context) => {
      need(attack.indirect !== true || context.has(VIRTIO_F_INDIRECT_DESC), 'INDIRECT_DESC is not offered')
      const { session, blk } = context.open({
        queues: Math.min(2, context.facts.maxQueues),
        queueSize: RING_SIZE,
        arena: 2 * MIB,
      })
      blk.read(context.sector(), context.facts.blockSize)
      const victim = makeVictim(context, session)
      const before = victim.ring.usedIndex
      attack.run(victim, context)
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

function makeVictim(context: VerifyContext, session: Session): Victim {
  const { memory } = session
  const header = memory.allocate(16, 16)
  writeHeader(header.bytes, VIRTIO_BLK_T_IN, context.sector())
  const status = memory.allocate(16, 16)
  status.bytes[0] = 0xa5
  const table = memory.allocate(65536, 16)
  const ring = session.queue(0).driver
  return {
    session,
    ring,
    header,
    status,
    table,
    data: memory.allocate(8192, 4096),
    go: (head = 0) => {
      ring.issueRaw(head)
      ring.publishRaw(ring.availableIndex)
    },
    entry: (index, address, length, flags, next) => {
      const view = new DataView(table.bytes.buffer, table.bytes.byteOffset + index * 16, 16)
      view.setBigUint64(0, BigInt(address), true)
      view.setUint32(8, length, true)
      view.setUint16(12, flags, true)
      view.setUint16(14, next, true)
    },
  }
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

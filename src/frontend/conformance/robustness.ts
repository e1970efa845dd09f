/**
 * Cases about what no honest front-end or guest does: the back-end lives, breaks no more than it has to, and nothing
 * stays behind. The specifications forbid these things to the driver and say little of what the device then does, so
 * they are SHOULDs; that the back-end dies is always an error.
 */
import { ftruncateSync } from 'node:fs'
import { native } from '../../native.ts'
import {
  VHOST_USER_GET_FEATURES,
  VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
  VHOST_USER_SET_FEATURES,
} from '../../vhost-user/wire.ts'
import { VIRTIO_F_INDIRECT_DESC, VIRTIO_F_RING_PACKED } from '../../virtio/constants.ts'
import { payload64 } from '../connection.ts'
import { FrontendError } from '../errors.ts'
import { layouts } from '../memory.ts'
import { wireRegion } from '../session.ts'
import { ATTACKS, type Attack, makeVictim, RING_SIZE } from '../verify/attacks.ts'
import { sleepMs } from '../virtqueue.ts'
import { type ConformanceCase, expect, expectEqual, NotApplicable, Violation } from './case.ts'
import type { Context } from './context.ts'
import type { Guest, Ring } from './guest.ts'
import { bytesOf, NEED_REPLY } from './messages.ts'
import { PACKED_ATTACKS, type PackedAttack, type PackedVictim } from './packed-attacks.ts'

const MIB = 2 ** 20

/** A guest with a victim, and a second ring that must not notice where there is one. */
function scene(context: Context, packed: boolean): { guest: Guest; ring: Ring; other: Ring | undefined } {
  const guest = context.guest({ packed })
  context.startCompanions(guest)
  const ring = guest.start(context.ringIndex, { size: RING_SIZE }, MIB)
  let other: Ring | undefined
  try {
    const index = context.otherRingIndex
    if (context.facts.device === 'net') guest.start(index - 1, {}, 0)
    other = guest.start(index, { size: RING_SIZE }, MIB)
  } catch (error) {
    if (!(error instanceof NotApplicable)) throw error
  }
  ring.run()
  other?.run()
  return { guest, ring, other }
}

/** What must hold after something was done to a ring. @returns what was seen */
function aftermath(
  context: Context,
  { guest, ring, other }: ReturnType<typeof scene>,
  answered: number,
  what: Pick<Attack, 'mayAnswer' | 'mayServe'>,
  statusOk: boolean
): string {
  try {
    guest.connection.barrier()
  } catch (error) {
    if (!(error instanceof FrontendError)) throw error
    if (what.mayServe === true) return 'the session is ended'
    throw new Violation('the ring alone is broken', 'the whole session is ended')
  }
  other?.run(2, {}, 'a request on the other ring')
  // Dropping a packet is no answer that could be wrong.
  const lenient = what.mayServe === true || context.facts.device === 'net'
  expect(answered === 0 || what.mayAnswer === true || lenient, 'no answer from that ring', `${answered} used elements`)
  expect(answered === 0 || !statusOk || lenient, 'no success', 'the request was answered OK')
  const reported = ring.queue.broken()
  ring.stop()
  guest.start(context.ringIndex, { size: RING_SIZE }, MIB).run(2, {}, 'a request after the ring was started afresh')
  if (answered > 0) return 'answered'
  return reported ? 'the ring is broken and its err eventfd signalled' : 'the ring is broken'
}

function attackCase(attack: Attack): ConformanceCase {
  return {
    id: `ring-${attack.name}`,
    group: 'robustness',
    level: 'SHOULD',
    rule: `breaks no more than the ring at ${attack.title}`,
    cites: 'virtio 1.3 §2.7.5.2, §2.7.5.3.1, §2.7.6.1 (the driver MUST NOT); vhost-user.rst "VHOST_USER_SET_VRING_ERR"',
    needs: { features: attack.indirect === true ? [VIRTIO_F_INDIRECT_DESC] : [] },
    run: (context) => {
      const all = scene(context, false)
      const victim = makeVictim(all.guest.session, context.operation().readable, all.ring.split)
      const before = all.ring.split.usedIndex
      attack.run(victim)
      sleepMs(60)
      const answered = (all.ring.split.usedIndex - before) & 0xffff
      return aftermath(context, all, answered, attack, victim.status.bytes[0] === 0)
    },
  }
}

function packedAttackCase(attack: PackedAttack): ConformanceCase {
  return {
    id: `packed-ring-${attack.name}`,
    group: 'robustness',
    level: 'SHOULD',
    rule: `breaks no more than the packed ring at ${attack.title}`,
    cites: 'virtio 1.3 §2.8.16, §2.8.17, §2.8.19 (the driver MUST NOT); vhost-user.rst "VHOST_USER_SET_VRING_ERR"',
    needs: {
      features: attack.indirect === true ? [VIRTIO_F_RING_PACKED, VIRTIO_F_INDIRECT_DESC] : [VIRTIO_F_RING_PACKED],
    },
    run: (context) => {
      const all = scene(context, true)
      const victim = packedVictim(context, all.guest, all.ring)
      attack.run(victim)
      sleepMs(60)
      const answered = all.ring.queue.driver.hasUsed() ? 1 : 0
      return aftermath(context, all, answered, attack, victim.status.bytes[0] === 0)
    },
  }
}

function packedVictim(context: Context, guest: Guest, { packed: ring }: Ring): PackedVictim {
  const { memory } = guest
  const { readable } = context.operation()
  const header = memory.allocate(readable.length, 16)
  header.bytes.set(readable)
  const status = memory.allocate(16, 16)
  status.bytes[0] = 0xa5
  return { memory, ring, header, status, table: memory.allocate(65536, 16), data: memory.allocate(8192, 4096) }
}

const ringCases: readonly ConformanceCase[] = [
  ...ATTACKS.map(attackCase),
  ...PACKED_ATTACKS.map(packedAttackCase),
  {
    id: 'ring-changes-under-way',
    group: 'robustness',
    level: 'SHOULD',
    rule: 'lives with descriptors that change while it reads them, and writes to nothing that none of them named',
    cites: 'virtio 1.3 §2.7.5 (the table is the driver’s memory)',
    run: (context) => {
      const guest = context.guest({ memory: layouts.many(8 * MIB, 2) })
      context.startCompanions(guest)
      const ring = guest.start(context.ringIndex, { size: 64 }, MIB)
      ring.run()
      const canary = guest.memory.region(1)
      canary.bytes.fill(0x5c)
      const victim = makeVictim(guest.session, context.operation().readable, ring.split)
      const flags = [1, 3, 2, 0, 4, 0xffff]
      const lengths = [16, 512, 0, 1, 0xffff_ffff, 4096]
      let seed = 99
      const random = (limit: number): number => {
        seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0
        return (seed >>> 8) % limit
      }
      const until = performance.now() + 400
      for (let round = 0; performance.now() < until; round++) {
        for (let i = 0; i < 6; i++) {
          const at = [victim.header.gpa, victim.data.gpa, victim.status.gpa][random(3)] ?? 0
          ring.split.writeDescriptor(i, at, lengths[random(6)] ?? 0, flags[random(6)] ?? 0, random(8))
        }
        if (round % 50 === 0) {
          if (guest.connection.channel.hungUp()) break
          ring.split.issueRaw(0)
          ring.split.publishRaw(ring.split.availableIndex)
        }
      }
      sleepMs(20)
      const touched = canary.bytes.findIndex((byte) => byte !== 0x5c)
      // 0xffffffff bytes from a buffer on do name all of the first region, and never the second one.
      expect(touched < 0, 'the other region as it was', `byte ${touched} changed`)
      return guest.connection.channel.hungUp() ? 'the session is ended' : 'the ring is broken, or goes on'
    },
  },
  {
    id: 'ring-err-signalled',
    group: 'robustness',
    level: 'SHOULD',
    rule: 'signals the err eventfd when a ring is broken',
    cites: 'vhost-user.rst "VHOST_USER_SET_VRING_ERR" ("to signal when error occurs")',
    run: (context) => {
      const { guest, ring } = context.running({}, { size: RING_SIZE })
      ring.run()
      makeVictim(guest.session, context.operation().readable, ring.split).go(RING_SIZE)
      for (const deadline = performance.now() + 500; performance.now() < deadline; sleepMs(5)) {
        if (ring.queue.broken()) return 'signalled'
        if (guest.connection.channel.hungUp()) throw new Violation('a signal', 'the whole session is ended')
      }
      throw new Violation('a signal', 'none in 500 ms')
    },
  },
]

const memoryCases: readonly ConformanceCase[] = [
  {
    id: 'mem-ring-region-removed',
    group: 'robustness',
    level: 'SHOULD',
    rule: 'lives when the region in which a running ring lies is removed',
    cites: 'vhost-user.rst "VHOST_USER_REM_MEM_REG" ("must unmap")',
    needs: { protocol: [VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS] },
    run: (context) => {
      const { guest, ring } = context.running(
        { memory: layouts.many(8 * MIB, 2), companions: false },
        { ringRegions: [1, 1, 1] }
      )
      ring.run()
      const answer = context.answer(guest.connection, () =>
        guest.connection.removeMemRegion(wireRegion(guest.memory.region(1)))
      )
      for (let i = 0; i < 20; i++) {
        native.eventfdWrite(ring.queue.kickFd, 1)
        sleepMs(1)
      }
      return answer
    },
  },
  {
    id: 'mem-truncated',
    group: 'robustness',
    level: 'SHOULD',
    rule: 'lives when the memory file shrinks under a running ring',
    cites: 'vhost-user.rst "Memory access"; mmap(2) (an access beyond the end is a SIGBUS)',
    run: (context) => {
      const memory = context.memory(layouts.single(8 * MIB))
      const { guest, ring } = context.running({ memory })
      ring.run()
      ftruncateSync(memory.region(0).fd, 0)
      for (let i = 0; i < 20; i++) {
        native.eventfdWrite(ring.queue.kickFd, 1)
        sleepMs(1)
      }
      const ended = guest.connection.channel.hungUp()
      context.release(true)
      return ended ? 'the session is ended' : 'the session goes on'
    },
  },
]

/** Memfds to send where none belong. */
function withFds<T>(count: number, use: (fds: number[]) => T): T {
  const fds = Array.from({ length: count }, () => native.memfd('virtiod-conformance', 4096, 0))
  try {
    return use(fds)
  } finally {
    for (const fd of fds) native.close(fd)
  }
}

/** Something that brings fds along that have no business there, again and again. */
function leakCase(
  id: string,
  rule: string,
  cites: string,
  action: (context: Context, round: number) => void
): ConformanceCase {
  return {
    id,
    group: 'robustness',
    level: 'SHOULD',
    rule,
    cites,
    needs: { fds: true },
    run: (context) => context.expectNoFdLeak(16, (round) => action(context, round)),
  }
}

const fdCases: readonly ConformanceCase[] = [
  leakCase(
    'fd-leak-sessions',
    'closes everything of a session when it ends',
    'vhost-user.rst "Communication"',
    (context) => {
      context.running({ memory: layouts.many(4 * MIB, 2) }).ring.run()
    }
  ),
  leakCase(
    'fd-leak-abrupt',
    'closes everything of a session that just ends with requests under way',
    'vhost-user.rst "Communication"',
    (context) => {
      context.running({ memory: layouts.single(8 * MIB) }).ring.batch(20)
      context.release(true)
    }
  ),
  leakCase(
    'fd-leak-exchanged',
    'closes the eventfds that newer ones take the place of',
    'vhost-user.rst "VHOST_USER_SET_VRING_CALL", "VHOST_USER_SET_VRING_KICK", "VHOST_USER_SET_VRING_ERR"',
    (context, round) => {
      // All in one session: a new one at the beginning and at the end only.
      if (round === 0 || context.held === undefined) context.held = context.running()
      const { ring } = context.held
      ring.call()
      ring.kick()
      ring.err()
      ring.run()
    }
  ),
  leakCase(
    'fd-leak-memory',
    'closes the files of regions that were removed or exchanged',
    'vhost-user.rst "VHOST_USER_SET_MEM_TABLE"',
    (context, round) => {
      if (round === 0 || context.held === undefined) {
        const without = [VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS]
        context.held = context.running({ memory: layouts.many(8 * MIB, 3), withoutProtocolFeatures: without })
      }
      const { guest, ring } = context.held
      guest.connection.setMemTable(guest.memory.regions.map(wireRegion))
      ring.run()
    }
  ),
  leakCase(
    'fd-leak-unasked',
    'closes fds that come with a request that has none',
    'vhost-user.rst "Communication" (the messages that have file descriptors)',
    (context) =>
      withFds(3, (fds) => {
        const connection = context.connect()
        connection.send(bytesOf({ request: VHOST_USER_GET_FEATURES }), fds)
        // A reply or the end of the connection: either is fine here.
        connection.channel.readable(1000)
      })
  ),
  leakCase(
    'fd-leak-unknown-request',
    'closes fds that come with a request that it does not know',
    'vhost-user.rst "Communication"',
    (context) =>
      withFds(3, (fds) => {
        const connection = context.connect()
        connection.send(bytesOf({ request: 0x1234, flags: NEED_REPLY, payload: new Uint8Array(8) }), fds)
        connection.channel.readable(200)
      })
  ),
  leakCase(
    'fd-leak-end-inside',
    'closes fds that came with a message of which the rest never came',
    'vhost-user.rst "Communication"',
    (context) =>
      withFds(4, (fds) => {
        const connection = context.connect()
        const message = bytesOf({ request: VHOST_USER_SET_FEATURES, payload: payload64(0n) })
        connection.send(message.subarray(0, 14), fds)
        sleepMs(2)
        connection.close()
      })
  ),
  {
    id: 'fd-many',
    group: 'robustness',
    level: 'SHOULD',
    rule: 'lives when a message brings 64 fds, and none of them stays',
    cites: 'vhost-user.rst "Communication"; "Multiple Memory regions description" (8 regions)',
    needs: { fds: true },
    run: (context) =>
      withFds(64, (fds) =>
        context.expectNoFdLeak(8, () => {
          const connection = context.connect()
          connection.send(bytesOf({ request: VHOST_USER_GET_FEATURES }), fds)
          connection.channel.readable(1000)
        })
      ),
  },
]

const loadCases: readonly ConformanceCase[] = [
  {
    id: 'flood-of-messages',
    group: 'robustness',
    level: 'SHOULD',
    rule: 'answers thousands of messages that are sent without waiting, in their order',
    cites: 'vhost-user.rst "Communication"',
    run: (context) => {
      const connection = context.connect()
      const burst = new Uint8Array(Buffer.concat(new Array(100).fill(bytesOf({ request: VHOST_USER_GET_FEATURES }))))
      for (let i = 0; i < 30; i++) {
        connection.send(burst)
        for (let j = 0; j < 100; j++) {
          const reply = connection.channel.receive('GET_FEATURES')
          expectEqual('the size of a reply', reply.payload.length, 8)
        }
      }
      return '3000 messages, 100 at a time'
    },
  },
  {
    id: 'reconnects-200',
    group: 'robustness',
    level: 'SHOULD',
    rule: 'serves its two hundredth session like its first one',
    cites: 'vhost-user.rst "Communication" (reconnection)',
    run: (context) => {
      const from = performance.now()
      let sessions = 0
      for (; sessions < 200 && performance.now() - from < 20_000; sessions++) {
        context.running({ memory: layouts.single(4 * MIB) }, { size: 64 }).ring.run(1, {}, `session ${sessions + 1}`)
      }
      return `${sessions} sessions`
    },
  },
]

export const robustnessCases: readonly ConformanceCase[] = [...fdCases, ...loadCases, ...ringCases, ...memoryCases]

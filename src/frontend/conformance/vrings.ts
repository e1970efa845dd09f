/** Cases about rings as the control plane sees them: set-up orders, states, starting, stopping, changing what runs. */
import { native } from '../../native.ts'
import {
  VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
  VHOST_USER_PROTOCOL_F_REPLY_ACK,
  VHOST_USER_SET_VRING_ADDR,
  VHOST_USER_SET_VRING_KICK,
} from '../../vhost-user/wire.ts'
import { VIRTIO_BLK_F_FLUSH } from '../../virtio/blk.ts'
import { VHOST_USER_F_PROTOCOL_FEATURES, VIRTIO_F_RING_PACKED, VIRTQ_MAX_SIZE } from '../../virtio/constants.ts'
import { type Connection, payload64 } from '../connection.ts'
import { layouts } from '../memory.ts'
import { SplitDriver } from '../split-driver.ts'
import { sleepMs } from '../virtqueue.ts'
import { applicable, type ConformanceCase, expect, expectEqual } from './case.ts'
import type { Context } from './context.ts'
import type { Guest, Ring } from './guest.ts'
import type { Operation } from './operation.ts'
import { chainLength } from './shapes.ts'

const ACK = VHOST_USER_PROTOCOL_F_REPLY_ACK

/** A ring set up in an order of one's own, and three requests on it. */
function order(
  one: Pick<ConformanceCase, 'id' | 'rule' | 'cites' | 'level'>,
  setUp: (ring: Ring, guest: Guest, context: Context) => void
): ConformanceCase {
  return {
    group: 'vrings',
    ...one,
    run: (context) => {
      const guest = context.guest()
      context.startCompanions(guest)
      const ring = guest.prepare(context.ringIndex)
      setUp(ring, guest, context)
      ring.run(3)
      return 'requests work'
    },
  }
}

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

/** How many of the chains that are available the back-end had not taken at a base. All have the same length. */
function notTaken({ queue }: Ring, base: number, [operation]: readonly Operation[]): number {
  const { driver } = queue
  if (driver instanceof SplitDriver) return (driver.availableIndex - base) & 0xffff
  const slots = operation === undefined ? 1 : chainLength(operation)
  return ((queue.packed.availableSlot - (base & 0x7fff) + queue.size) % queue.size) / slots
}

/** A ring without a call eventfd, on which the driver asks for calls all the same. */
function withoutCalls(context: Context, say: boolean): string {
  const guest = context.guest()
  context.startCompanions(guest)
  const ring = guest.prepare(context.ringIndex)
  ring.num()
  ring.base()
  ring.address()
  if (say) guest.connection.setVringCall(ring.index, undefined)
  ring.kick()
  ring.enable()
  ring.queue.driver.enableCalls()
  ring.run(5)
  return '5 requests'
}

/** With requests at any point of their way when GET_VRING_BASE comes. */
export function drainCases(prefix: string, packed: boolean): ConformanceCase[] {
  const common = {
    group: packed ? 'packed' : 'vrings',
    level: 'MUST',
    cites: 'vhost-user.rst "VHOST_USER_GET_VRING_BASE" ("must complete all inflight I/O requests")',
  } as const
  const features = packed ? [VIRTIO_F_RING_PACKED] : []
  const run = (context: Context, operations: readonly Operation[], rounds: number): string => {
    const guest = context.guest({ packed })
    context.startCompanions(guest)
    const ring = guest.start(context.ringIndex, {}, 24 * 2 ** 20)
    let left = 0
    for (let round = 0; round < rounds; round++) {
      const pending = ring.batchOf(operations)
      // The answer has to hold at any moment: before the first completion, between them, after the last.
      const until = performance.now() + round * 0.1
      while (performance.now() < until);
      const base = ring.stop()
      // The base says what was taken; what is done is in the ring.
      ring.requests.poll()
      const taken = Math.max(0, ring.requests.outstanding - notTaken(ring, base, operations))
      left += taken
      // What comes late is waited for, so that the next round starts clean.
      if (taken > 0) sleepMs(30)
      ring.start(base)
      ring.queue.driver.kickRaw()
      ring.finishAll(pending)
    }
    expect(left === 0, 'no request under way at the answer', `${left} were, in ${rounds} rounds`)
    return `${rounds} rounds with up to ${operations.length} requests`
  }
  return [
    {
      ...common,
      id: `${prefix}-stop-drains`,
      rule: 'completes all requests under way before it answers GET_VRING_BASE',
      needs: { features },
      run: (context) => run(context, context.longOperations(48), 24),
    },
    {
      ...common,
      id: `${prefix}-stop-drains-writes`,
      rule: 'completes all writes and flushes under way before it answers GET_VRING_BASE',
      needs: { device: 'blk', features: [...features, VIRTIO_BLK_F_FLUSH] },
      destructive: true,
      run: (context) => run(context, context.writingOperations(48), 12),
    },
  ]
}

export const vringCases: readonly ConformanceCase[] = [
  order(
    {
      id: 'vring-order-qemu',
      level: 'MUST',
      rule: 'starts a ring in the order of QEMU: CALL early, then NUM, BASE, ADDR, KICK, CALL again, and ENABLE',
      cites: 'vhost-user.rst "Ring states"',
    },
    (ring, guest) => {
      ring.call()
      guest.connection.setFeatures(guest.session.features)
      ring.num()
      ring.base()
      ring.address()
      ring.kick()
      ring.call()
      ring.enable()
    }
  ),
  order(
    {
      id: 'vring-order-dpdk',
      level: 'MUST',
      rule: 'starts a ring in the order of DPDK: ENABLE last of all, CALL before everything',
      cites: 'vhost-user.rst "Ring states"',
    },
    (ring, guest) => {
      ring.call()
      guest.connection.barrier()
      ring.num()
      ring.address()
      ring.base()
      ring.kick()
      guest.connection.barrier()
      sleepMs(5)
      ring.enable()
    }
  ),
  order(
    {
      id: 'vring-order-enable-first',
      level: 'MUST',
      rule: 'takes SET_VRING_ENABLE before the ring is started: the two states are independent',
      cites: 'vhost-user.rst "Ring states"',
    },
    (ring) => {
      ring.enable()
      ring.num()
      ring.base()
      ring.address()
      ring.kick()
      ring.call()
    }
  ),
  {
    id: 'vring-enable-before-features',
    group: 'vrings',
    level: 'MUST',
    rule: 'takes SET_VRING_ENABLE before SET_FEATURES, as QEMU sends it to network cards',
    cites: 'vhost-user.rst "Ring states" ("Rings have two independent states")',
    run: (context) => {
      context.needProtocolFeatures()
      const connection = context.connect()
      connection.getFeatures()
      connection.setProtocolFeatures(connection.getProtocolFeatures() & (1n << BigInt(ACK)))
      context.expectTaken(connection, 'SET_VRING_ENABLE', () => connection.setVringEnable(context.ringIndex, true))
      const guest = context.guestOver(connection)
      context.startCompanions(guest)
      const ring = guest.prepare(context.ringIndex)
      ring.start(undefined, false)
      ring.run(3, {}, 'a request on the ring that was enabled at the very start')
      return 'the ring is enabled when it starts'
    },
  },
  {
    id: 'vring-order-any',
    group: 'vrings',
    level: 'SHOULD',
    rule: 'takes NUM, BASE, ADDR and CALL in any order before KICK',
    cites: 'vhost-user.rst "Ring states" (SET_VRING_KICK is what starts a ring)',
    run: (context) => {
      const steps = [
        (ring: Ring) => ring.num(),
        (ring: Ring) => ring.base(),
        (ring: Ring) => ring.address(),
        (ring: Ring) => ring.call(),
      ]
      for (let first = 0; first < 4; first++) {
        for (const direction of [1, 3]) {
          const guest = context.guest({ memory: layouts.single(16 * 2 ** 20) })
          context.startCompanions(guest)
          const ring = guest.prepare(context.ringIndex)
          for (let i = 0; i < 4; i++) steps[(first + direction * i) % 4]?.(ring)
          ring.kick()
          ring.enable()
          ring.run(1, {}, `a request after order ${first}${direction === 1 ? '' : ' backwards'}`)
        }
      }
      return '8 orders'
    },
  },
  {
    id: 'vring-kick-starts',
    group: 'vrings',
    level: 'SHOULD',
    rule: 'starts a ring at SET_VRING_KICK and does not rely on a kick: what is available then is processed',
    cites: 'vhost-user.rst "Ring states" ("Back-ends SHOULD NOT rely on receiving a kick")',
    run: (context) => {
      const guest = context.guest()
      context.startCompanions(guest)
      const ring = guest.prepare(context.ringIndex)
      const pending = ring.batch(3)
      // Takes back the kick of `batch`.
      native.eventfdRead(ring.queue.kickFd)
      ring.start()
      ring.finishAll(pending, 'a request that was available before SET_VRING_KICK')
      return 'processed without a kick'
    },
  },
  {
    id: 'vring-stopped-at-first',
    group: 'vrings',
    level: 'MUST',
    rule: 'does not process a ring before SET_VRING_KICK',
    cites: 'vhost-user.rst "Ring states" ("must not process the ring at all")',
    run: (context) => {
      const guest = context.guest()
      context.startCompanions(guest)
      const ring = guest.prepare(context.ringIndex)
      ring.num()
      ring.base()
      ring.address()
      ring.call()
      ring.enable()
      guest.connection.barrier()
      const pending = ring.submit()
      ring.expectIdle('the ring is not started')
      ring.kick()
      ring.queue.driver.kickRaw()
      ring.finish(pending, 'the request, after SET_VRING_KICK')
      return 'idle until then'
    },
  },
  {
    id: 'vring-disabled-then-enabled',
    group: 'vrings',
    level: 'MUST',
    rule: 'completes what is made available on a started and disabled ring once, then or when the ring is enabled',
    cites: 'vhost-user.rst "Ring states" (started and disabled)',
    run: (context) => {
      context.needProtocolFeatures()
      const guest = context.guest()
      context.startCompanions(guest)
      const ring = guest.prepare(context.ringIndex)
      ring.start(undefined, false)
      const pending = ring.batch(3)
      sleepMs(60)
      const early = ring.split.usedIndex
      ring.enable()
      ring.queue.driver.kickRaw()
      // Those of a network card may have been discarded; their buffers come back all the same.
      ring.finishAll(pending)
      sleepMs(5)
      expectEqual('the used index', ring.split.usedIndex, 3)
      return early === 0 ? 'left alone while disabled' : `${early} of 3 completed while disabled`
    },
  },
  {
    id: 'vring-disable-enable',
    group: 'vrings',
    level: 'MUST',
    rule: 'goes on with a ring that was disabled and enabled again',
    cites: 'vhost-user.rst "Ring states"',
    run: (context) => {
      context.needProtocolFeatures()
      const { ring } = context.running()
      for (let i = 0; i < 10; i++) {
        ring.enable(false)
        ring.enable()
        ring.run(2, {}, `a request in round ${i + 1}`)
      }
      return '10 rounds'
    },
  },
  {
    id: 'vring-enable-unconfigured',
    group: 'vrings',
    level: 'MUST',
    rule: 'takes SET_VRING_ENABLE for rings that were never set up, as QEMU sends it',
    cites: 'vhost-user.rst "Ring states" ("The enabled/disabled state should still be tracked")',
    run: (context) => {
      context.needProtocolFeatures()
      const { guest, ring } = context.running()
      const others = Math.min(context.facts.rings, 16)
      for (let index = 0; index < others; index++) guest.connection.setVringEnable(index, true)
      ring.run(2, {}, 'a request after it')
      return `${others} rings`
    },
  },
  {
    id: 'vring-all',
    group: 'vrings',
    level: 'MUST',
    rule: 'serves all its rings at once (up to 16 are tried)',
    cites: 'vhost-user.rst "Multiple queue support"',
    run: (context) => {
      const guest = context.guest({ memory: layouts.single(96 * 2 ** 20) })
      const rings: Ring[] = []
      const count = Math.min(context.facts.rings, 16)
      for (let index = 0; index < count; index++) {
        const sends = context.facts.device === 'blk' || index % 2 === 1
        const ring = guest.start(index, {}, sends ? 2 ** 20 : 0)
        if (sends) rings.push(ring)
      }
      for (let i = 0; i < 5; i++) {
        const pending = rings.map((ring) => ({ ring, requests: ring.batch(8) }))
        for (const { ring, requests } of pending) ring.finishAll(requests, `a request on ring ${ring.index}`)
      }
      return `${count} rings`
    },
  },
  {
    id: 'vring-stop',
    group: 'vrings',
    level: 'MUST',
    rule: 'leaves a ring alone from the answer to GET_VRING_BASE on: nothing is used, written or called',
    cites: 'vhost-user.rst "VHOST_USER_GET_VRING_BASE", "Suspended device state"',
    run: (context) => {
      const { ring } = context.running()
      ring.run(3)
      const base = ring.stop()
      ring.queue.takeCalls()
      const used = ring.queue.ring[2].bytes.slice()
      const pending = ring.submit()
      ring.queue.driver.kickRaw()
      ring.expectIdle('the ring is stopped')
      expectEqual('calls from a stopped ring', ring.queue.takeCalls(), 0)
      expect(Buffer.compare(used, ring.queue.ring[2].bytes) === 0, 'the used ring untouched', 'it was written to')
      ring.start(base)
      ring.queue.driver.kickRaw()
      ring.finish(pending, 'the request, after the ring was started again')
      return 'idle until it was started again'
    },
  },
  {
    id: 'vring-stop-value',
    group: 'vrings',
    level: 'MUST',
    rule: 'answers GET_VRING_BASE with the queue’s index and the next available index that it would process',
    cites: 'vhost-user.rst "VHOST_USER_GET_VRING_BASE", "A vring descriptor index for split virtqueues"',
    run: (context) => {
      const { ring } = context.running()
      for (const [before, count] of [
        [0, 5],
        [5, 0],
        [5, 7],
      ] as const) {
        if (before > 0) ring.start(before)
        ring.run(count)
        expectEqual('the base', ring.stop(), before + count)
      }
      return '5, 5 and 12 after as many requests'
    },
  },
  ...drainCases('vring', false),
  {
    id: 'vring-stop-restart',
    group: 'vrings',
    level: 'MUST',
    rule: 'goes on from the index of SET_VRING_BASE after a stop: each request completes once',
    cites: 'vhost-user.rst "VHOST_USER_SET_VRING_BASE"',
    run: (context) => {
      const { ring } = context.running()
      let count = 0
      for (let round = 0; round < 30; round++) {
        const pending = ring.batch(1 + round)
        count += pending.length
        if (round % 3 === 1) sleepMs(0.2)
        const base = ring.stop()
        sleepMs(round % 4 === 0 ? 5 : 0)
        ring.start(base)
        ring.queue.driver.kickRaw()
        ring.finishAll(pending, `a request of round ${round + 1}`)
      }
      sleepMs(5)
      expectEqual('the used index', ring.split.usedIndex, count & 0xffff)
      return `${count} requests in 30 rounds`
    },
  },
  {
    id: 'vring-start-afresh',
    group: 'vrings',
    level: 'MUST',
    rule: 'takes a new ring of another size in place of a stopped one, from index 0',
    cites: 'vhost-user.rst "Ring states" ("A stopped ring enters the started state again")',
    run: (context) => {
      const guest = context.guest()
      context.startCompanions(guest)
      for (const size of [256, 16, 128]) {
        const ring = guest.start(context.ringIndex, { size }, 2 ** 20)
        ring.run(size + 3, {}, `a request on a ring of ${size}`)
        ring.stop()
      }
      return 'sizes 256, 16, 128'
    },
  },
  {
    id: 'vring-base-near-wrap',
    group: 'vrings',
    level: 'MUST',
    rule: 'starts at any index: from 65530 on, over the end of the 16 bits',
    cites: 'vhost-user.rst "A vring descriptor index for split virtqueues" ("a free-running index")',
    run: (context) => {
      const { ring } = context.running({}, { base: 65530, size: 16 })
      ring.run(40)
      expectEqual('the base', ring.stop(), (65530 + 40) & 0xffff)
      return '40 requests from index 65530'
    },
  },
  {
    id: 'vring-address-again',
    group: 'vrings',
    level: 'MUST',
    rule: 'takes SET_VRING_ADDR with the same addresses while the ring runs, as front-ends send it to switch logging',
    cites: 'vhost-user.rst "Migration", "Ring states" (changing some configuration aspects on the fly)',
    run: (context) => {
      const { guest, ring } = context.running()
      for (let i = 0; i < 20; i++) {
        const pending = ring.batch(40)
        ring.address()
        guest.connection.barrier()
        ring.finishAll(pending)
      }
      return '20 times'
    },
  },
  {
    id: 'vring-call-exchanged',
    group: 'vrings',
    level: 'MUST',
    rule: 'takes SET_VRING_CALL while the ring runs (QEMU masks interrupts by it): calls come to the new eventfd',
    cites: 'vhost-user.rst "VHOST_USER_SET_VRING_CALL", "Ring states" (on the fly)',
    run: (context) => {
      const { guest, ring } = context.running({}, { mode: 'irq' })
      const fd = native.eventfd(0)
      try {
        for (let i = 0; i < 10; i++) {
          ring.call(fd)
          guest.connection.barrier()
          native.eventfdRead(fd)
          ring.queue.driver.enableCalls()
          const pending = ring.submit()
          expect(native.pollIn(fd, context.timeoutMs) === 1, 'a call on the new eventfd', 'none')
          ring.finish(pending)
          ring.call()
          guest.connection.barrier()
          ring.run(2)
        }
      } finally {
        native.close(fd)
      }
      return '10 times there and back'
    },
  },
  {
    id: 'vring-kick-exchanged',
    group: 'vrings',
    level: 'MUST',
    rule: 'takes SET_VRING_KICK while the ring runs: kicks on the new eventfd are heard',
    cites: 'vhost-user.rst "VHOST_USER_SET_VRING_KICK", "Ring states" (on the fly)',
    run: (context) => {
      const fd = native.eventfd(0)
      try {
        for (let i = 0; i < 5; i++) {
          const guest = context.guest({ memory: layouts.single(16 * 2 ** 20) })
          context.startCompanions(guest)
          const ring = guest.prepare(context.ringIndex)
          ring.num()
          ring.base()
          ring.address()
          // Nobody kicks on this one.
          ring.kick(fd)
          ring.call()
          ring.enable()
          guest.connection.barrier()
          sleepMs(10)
          ring.kick()
          guest.connection.barrier()
          sleepMs(i)
          ring.run(2, {}, 'a request kicked on the new eventfd')
        }
      } finally {
        native.close(fd)
      }
      return '5 times'
    },
  },
  {
    id: 'vring-no-call-fd',
    group: 'vrings',
    level: 'MUST',
    rule: 'serves a ring whose driver polls: SET_VRING_CALL without an fd',
    cites: 'vhost-user.rst "VHOST_USER_SET_VRING_CALL" ("polling will be used")',
    run: (context) => withoutCalls(context, true),
  },
  {
    id: 'vring-call-never-sent',
    group: 'vrings',
    level: 'SHOULD',
    rule: 'serves a ring for which SET_VRING_CALL was never sent',
    cites: 'vhost-user.rst "Ring states" (SET_VRING_KICK is what starts a ring)',
    run: (context) => withoutCalls(context, false),
  },
  {
    id: 'vring-no-kick-fd',
    group: 'vrings',
    level: 'SHOULD',
    rule: 'polls a ring whose SET_VRING_KICK has no fd',
    cites: 'vhost-user.rst "VHOST_USER_SET_VRING_KICK" ("polling should be used")',
    run: (context) => {
      const guest = context.guest()
      context.startCompanions(guest)
      const ring = guest.prepare(context.ringIndex)
      ring.num()
      ring.base()
      ring.address()
      ring.call()
      guest.connection.setVringKick(ring.index, undefined)
      ring.started = true
      ring.enable()
      ring.run(5, {}, 'a request without a kick fd')
      return '5 requests without a kick'
    },
  },
  {
    id: 'vring-session-order',
    group: 'vrings',
    level: 'MUST',
    rule: 'serves the next session after one that was stopped in order, and after one that just ended',
    cites: 'vhost-user.rst "Communication"',
    run: (context) => {
      for (let i = 0; i < 10; i++) {
        const { ring } = context.running({ memory: layouts.single(16 * 2 ** 20) })
        ring.batch(30)
        context.release(i % 2 === 0)
      }
      context.expectServing('the next session')
      return '10 sessions that ended with requests under way'
    },
  },
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
  {
    id: 'vring-table-first',
    group: 'vrings',
    level: 'SHOULD',
    rule: 'takes SET_VRING_NUM and SET_VRING_BASE before it has any memory',
    cites: 'vhost-user.rst "VHOST_USER_SET_VRING_ADDR" (the message that needs memory)',
    run: (context) => {
      const guest = context.guest({ memory: [], withoutProtocolFeatures: [VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS] })
      guest.connection.setVringNum(context.ringIndex, 256)
      guest.connection.setVringBase(context.ringIndex, 0)
      guest.memory.addRegion({ gpa: 2 ** 21, uva: 2 ** 44, size: 32 * 2 ** 20, offset: 65536 })
      guest.session.shareMemory()
      context.startCompanions(guest)
      const ring = guest.prepare(context.ringIndex)
      ring.address()
      ring.kick()
      ring.call()
      if (guest.session.has(VHOST_USER_F_PROTOCOL_FEATURES)) ring.enable()
      ring.run(2)
      return 'requests work'
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

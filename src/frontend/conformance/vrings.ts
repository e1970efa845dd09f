/** Cases about setting up rings: the orders in which it is done, and the states of a ring. */
import { native } from '../../native.ts'
import { VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS, VHOST_USER_PROTOCOL_F_REPLY_ACK } from '../../vhost-user/wire.ts'
import { VHOST_USER_F_PROTOCOL_FEATURES } from '../../virtio/constants.ts'
import { layouts } from '../memory.ts'
import { sleepMs } from '../virtqueue.ts'
import { type ConformanceCase, expectEqual } from './case.ts'
import type { Context } from './context.ts'
import type { Guest, Ring } from './guest.ts'

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
]

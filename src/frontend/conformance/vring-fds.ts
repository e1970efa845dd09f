/** Cases about what may be exchanged while a ring runs, and about rings without eventfds. */
import { native } from '../../native.ts'
import { layouts } from '../memory.ts'
import { sleepMs } from '../virtqueue.ts'
import { type ConformanceCase, expect } from './case.ts'
import type { Context } from './context.ts'

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

export const vringFdCases: readonly ConformanceCase[] = [
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
]

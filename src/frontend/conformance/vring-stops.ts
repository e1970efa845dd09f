import { VIRTIO_BLK_F_FLUSH } from '../../virtio/blk.ts'
import { VIRTIO_F_RING_PACKED } from '../../virtio/constants.ts'
import { layouts } from '../memory.ts'
import { SplitDriver } from '../split-driver.ts'
import { sleepMs } from '../virtqueue.ts'
import { type ConformanceCase, expect, expectEqual } from './case.ts'
import type { Context } from './context.ts'
import type { Ring } from './guest.ts'
import type { Operation } from './operation.ts'
import { chainLength } from './shapes.ts'

/** How many of the chains that are available the back-end had not taken at a base. All have the same length. */
function notTaken({ queue }: Ring, base: number, [operation]: readonly Operation[]): number {
  const { driver } = queue
  if (driver instanceof SplitDriver) return (driver.availableIndex - base) & 0xffff
  const slots = operation === undefined ? 1 : chainLength(operation)
  return ((queue.packed.availableSlot - (base & 0x7fff) + queue.size) % queue.size) / slots
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

export const vringStopCases: readonly ConformanceCase[] = [
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
]

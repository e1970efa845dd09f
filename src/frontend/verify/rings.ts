/** Cases about rings: sizes, index wraps, notifications in both directions and both styles. */

import { native } from '../../native.ts'
import { VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN } from '../../virtio/blk.ts'
import { RING_EVENT_FLAGS_DESC, VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC } from '../../virtio/constants.ts'
import type { BlkDriver } from '../blk.ts'
import { FrontendError } from '../errors.ts'
import { Histogram } from '../histogram.ts'
import { BlockLoad } from '../load.ts'
import { PackedDriver } from '../packed-driver.ts'
import type { Session } from '../session.ts'
import { sleepMs, type Virtqueue } from '../virtqueue.ts'
import type { VerifyCase, VerifyContext } from './case.ts'
import { eventually, Failure, must, mustEqual, mustStatus, need } from './case.ts'

const NOTHING = new Uint8Array(0)

/** Reads on one ring until `total` requests have completed, `depth` at a time, with chains that are built once. */
function manyReads(context: VerifyContext, session: Session, total: number, depth: number): void {
  const queue = session.queue(0)
  const load = new BlockLoad(queue.driver, session.memory, new Histogram(), {
    pattern: 'randread',
    blockSize: context.facts.blockSize,
    depth,
    firstBlock: (context.facts.area.sector * 512) / context.facts.blockSize,
    blocks: Math.floor(Math.min(context.facts.area.bytes, 2 ** 20) / context.facts.blockSize),
    seed: context.seed,
    indirect: false,
  })
  const clock = (): number => performance.now()
  load.start(clock())
  let last = clock()
  while (load.completed < total || queue.driver.inFlight > 0) {
    if (load.step(clock, load.completed < total) > 0) last = clock()
    else if (clock() - last > 2) {
      queue.wait(50)
      if (clock() - last > context.timeoutMs)
        throw new Failure(`no completion for ${context.timeoutMs} ms after ${load.completed} requests`)
    }
  }
  must(load.errors === 0, `${load.errors} of ${load.completed} reads failed`)
}

function ringSizeCase(size: number): VerifyCase {
  return {
    name: `ring/size-${size}`,
    title:
      size === 32768 ? 'the largest ring, or the largest one that the back-end takes' : `a ring of ${size} entries`,
    spec: 'virtio 1.3 §2.7: a power of two up to 32768',
    run: (context) => {
      need(size > 2 || context.has(VIRTIO_F_INDIRECT_DESC), 'needs INDIRECT_DESC')
      const expected = context.open().blk.read(context.sector(), context.facts.blockSize)
      let accepted = size
      for (;;) {
        try {
          const { blk, session } = context.open({ queueSize: accepted })
          const requests = Math.min(accepted, 600)
          for (let i = 0; i < Math.max(3, Math.ceil((2 * accepted) / requests)) && i < 120; i++) {
            const batch = Array.from({ length: size <= 2 ? accepted : Math.max(1, Math.floor(requests / 3)) }, () =>
              blk.submit(
                VIRTIO_BLK_T_IN,
                context.sector(),
                NOTHING,
                context.facts.blockSize,
                { indirect: size <= 2 },
                false
              )
            )
            blk.publish()
            blk.wait()
            for (const request of batch) {
              mustStatus(request, [VIRTIO_BLK_S_OK], `read on a ring of ${accepted}`)
              mustEqual(request.data, expected, `read on a ring of ${accepted}`)
            }
          }
          if (accepted >= 1024)
            manyReads(
              context,
              session,
              accepted,
              Math.min(8192, Math.floor(session.queue(0).driver.freeDescriptors / 3))
            )
          return accepted === size ? undefined : `${accepted} is the largest`
        } catch (error) {
          const refused =
            error instanceof FrontendError &&
            (error.failure === 'nack' || error.failure === 'closed') &&
            error.request.startsWith('SET_VRING')
          if (!refused || accepted <= 256) throw error
          accepted /= 2
        }
      }
    },
  }
}

/** One request after the other; each must be followed by a call although the driver only sleeps. */
function pingPong(context: VerifyContext, blk: BlkDriver, rounds: number, pause: (round: number) => number): number {
  const { queue } = blk
  queue.takeCalls()
  let spurious = 0
  for (let round = 0; round < rounds; round++) {
    must(!queue.driver.enableCalls(), 'internal: a completion nobody waits for')
    const request = blk.submit(VIRTIO_BLK_T_IN, context.sector(), NOTHING, context.facts.blockSize)
    for (;;) {
      if (queue.waitForCall(Math.min(3000, context.timeoutMs)) === 0) {
        must(!queue.driver.hasUsed(), `request ${round + 1} completed without a call`)
        throw new Failure(`request ${round + 1} did not complete: its kick was lost`)
      }
      if (blk.poll() > 0) break
      spurious++
      must(spurious < rounds, 'calls without completions')
    }
    mustStatus(request, [VIRTIO_BLK_S_OK], `request ${round + 1}`)
    const ms = pause(round)
    if (ms > 0) sleepMs(ms)
  }
  return spurious
}

/** Place 14 of 16 in a round with wrap counter 0, of both indices. */
const LATE_PACKED_BASE = 0x000e_000e

/** Asks for a call once 7 reads, of three descriptors each, are behind the one that comes next. */
function callAfter(queue: Virtqueue, reads: number): void {
  const { driver, size } = queue
  if (!(driver instanceof PackedDriver)) {
    queue.split.setUsedEvent(driver.base + reads)
    return
  }
  const place = driver.usedSlot + 3 * reads
  driver.setEvent(place % size, driver.usedWrap ^ (place >= size ? 1 : 0), RING_EVENT_FLAGS_DESC)
}

function notificationCases(eventIdx: boolean): VerifyCase[] {
  const style = eventIdx ? 'event-idx' : 'flags'
  const spec = eventIdx ? 'virtio 1.3 §2.7.10' : 'virtio 1.3 §2.7.7'
  const without = eventIdx ? [] : [VIRTIO_F_EVENT_IDX]
  const check = (context: VerifyContext): void =>
    need(!eventIdx || context.has(VIRTIO_F_EVENT_IDX), 'EVENT_IDX is not offered')
  return [
    {
      name: `notify/${style}-every-completion`,
      title: 'a driver that sleeps is called for every completion',
      spec,
      run: (context) => {
        check(context)
        const { blk } = context.open({ mode: 'irq', withoutFeatures: without })
        pingPong(context, blk, 500, () => 0)
      },
    },
    {
      name: `notify/${style}-after-sleep`,
      title: 'no kick and no call is lost when the queue was idle for a while',
      spec,
      run: (context) => {
        check(context)
        const { blk } = context.open({ mode: 'irq', withoutFeatures: without })
        // Longer and shorter than any adaptive poll of the back-end.
        const pauses = [0, 0.02, 0.05, 0.1, 0.5, 1, 3, 10, 30, 60]
        pingPong(context, blk, 100, (round) => pauses[round % pauses.length] ?? 0)
      },
    },
    {
      name: `notify/${style}-kick-race`,
      title: 'a kick that the device did not want is not needed: requests at the edge of its poll window complete',
      spec,
      run: (context) => {
        check(context)
        const { blk, session } = context.open({ withoutFeatures: without })
        const random = context.random(200)
        for (let i = 0; i < 3000; i++) {
          const request = blk.submit(VIRTIO_BLK_T_IN, context.sector(), NOTHING, context.facts.blockSize)
          try {
            blk.wait(request, Math.min(3000, context.timeoutMs))
          } catch (error) {
            throw new Failure(`request ${i + 1}: ${(error as Error).message}`)
          }
          const until = performance.now() + random.below(60) / 1000
          while (performance.now() < until);
        }
        const { kicks, suppressedKicks } = session.queue(0).driver.counters
        return `${kicks} kicks, ${suppressedKicks} suppressed`
      },
    },
    {
      name: `notify/${style}-no-calls`,
      title: 'a polling driver is (nearly) never called',
      spec: `${spec}: SHOULD NOT`,
      run: (context) => {
        check(context)
        const { blk, session } = context.open({ withoutFeatures: without })
        sleepMs(5)
        session.queue(0).takeCalls()
        for (let i = 0; i < 500; i++) blk.read(context.sector(), context.facts.blockSize)
        const calls = session.queue(0).takeCalls()
        must(calls <= 50, `${calls} calls for 500 requests that asked for none`)
        return calls === 0 ? undefined : `${calls} calls for 500 requests`
      },
    },
  ]
}

export const ringCases: readonly VerifyCase[] = [
  ...[1, 2, 4, 8, 256, 1024, 32768].map(ringSizeCase),
  {
    name: 'ring/index-wrap',
    title: 'more than 65536 requests on one ring',
    spec: 'virtio 1.3 §2.7.6: idx wraps at 65536',
    run: (context) => {
      const { session } = context.open()
      manyReads(context, session, 140_000, 64)
    },
  },
  {
    name: 'ring/base-near-wrap',
    title: 'a ring that starts at index 65530 (SET_VRING_BASE)',
    spec: 'vhost-user.rst "VHOST_USER_SET_VRING_BASE"',
    run: (context) => {
      for (const mode of ['poll', 'irq'] as const) {
        const { blk } = context.open({ base: context.packed ? LATE_PACKED_BASE : 65530, mode, queueSize: 16 })
        for (let i = 0; i < 40; i++) blk.read(context.sector(), context.facts.blockSize)
      }
    },
  },
  ...notificationCases(true),
  ...notificationCases(false),
  {
    name: 'notify/used-event-ahead',
    title: 'with used_event ahead there is no call before it and one when it is passed',
    spec: 'virtio 1.3 §2.7.10',
    run: (context) => {
      need(context.has(VIRTIO_F_EVENT_IDX), 'EVENT_IDX is not offered')
      const { blk, session } = context.open()
      const queue = session.queue(0)
      const remarks: string[] = []
      for (const start of [0, 1, 2]) {
        sleepMs(5)
        queue.takeCalls()
        callAfter(queue, 7)
        let early = 0
        for (let i = 0; i < 8; i++) {
          if (i === 7) {
            sleepMs(2)
            early = queue.takeCalls()
          }
          blk.read(context.sector(), context.facts.blockSize)
        }
        must(queue.waitForCall(1000) > 0, `round ${start + 1}: no call when used_event was passed`)
        if (early > 0) remarks.push(`${early} early calls`)
      }
      return remarks.join(', ') || undefined
    },
  },
  {
    name: 'notify/call-fd-replaced',
    title: 'SET_VRING_CALL while the ring runs: calls go to the new eventfd (QEMU does it when it masks a vector)',
    spec: 'vhost-user.rst "VHOST_USER_SET_VRING_CALL"',
    run: (context) => {
      const { blk, session } = context.open({ mode: 'irq' })
      const fd = native.eventfd(0)
      try {
        for (let i = 0; i < 10; i++) {
          session.connection.setVringCall(0, fd)
          session.connection.barrier()
          native.eventfdRead(fd)
          must(!blk.queue.driver.enableCalls(), 'internal: a completion nobody waits for')
          const request = blk.submit(VIRTIO_BLK_T_IN, context.sector(), NOTHING, context.facts.blockSize)
          must(native.pollIn(fd, Math.min(3000, context.timeoutMs)) === 1, 'no call on the new eventfd')
          must(
            eventually(
              () => request.done,
              1000,
              () => void blk.poll()
            ),
            'called, but the request is not done'
          )
          session.connection.setVringCall(0, blk.queue.callFd)
          session.connection.barrier()
          blk.queue.takeCalls()
          pingPong(context, blk, 5, () => 0)
        }
      } finally {
        native.close(fd)
      }
    },
  },
  {
    name: 'notify/call-fd-full',
    title: 'a call eventfd whose counter is full does not stop the queue',
    spec: 'eventfd(2): a write blocks at the limit',
    run: (context) => {
      const { blk } = context.open()
      native.eventfdWrite(blk.queue.callFd, 2 ** 53 - 1)
      for (let i = 0; i < 2047; i++) native.eventfdWrite(blk.queue.callFd, 2 ** 53 - 1)
      native.eventfdWrite(blk.queue.callFd, 2 ** 53 - 1)
      for (let i = 0; i < 20; i++) {
        blk.queue.driver.enableCalls()
        blk.read(context.sector(), context.facts.blockSize)
      }
      blk.queue.takeCalls()
    },
  },
]

/** Cases about kicks and calls, in each way that a ring has to suppress them, and as messages. */
import { native } from '../../native.ts'
import {
  VHOST_USER_BACKEND_VRING_CALL,
  VHOST_USER_PROTOCOL_F_BACKEND_REQ,
  VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS,
  VHOST_USER_PROTOCOL_F_REPLY_ACK,
} from '../../vhost-user/wire.ts'
import {
  RING_EVENT_FLAGS_DESC,
  RING_EVENT_FLAGS_DISABLE,
  RING_EVENT_FLAGS_ENABLE,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_RING_PACKED,
  VIRTQ_AVAIL_F_NO_INTERRUPT,
} from '../../virtio/constants.ts'
import { sleepMs, type WaitMode } from '../virtqueue.ts'
import { type ConformanceCase, expect, expectEqual, Violation } from './case.ts'
import type { Context } from './context.ts'
import type { Guest, Ring } from './guest.ts'
import { chainLength } from './shapes.ts'

/** A way to suppress notifications. */
interface Style {
  readonly name: string
  readonly packed: boolean
  readonly eventIdx: boolean
  readonly cites: string
  readonly kickCites: string
}

// biome-ignore format: one style per line
const STYLES: readonly Style[] = [
  { name: 'flags', packed: false, eventIdx: false, cites: 'virtio 1.3 §2.7.7.2', kickCites: 'virtio 1.3 §2.7.10' },
  { name: 'event-idx', packed: false, eventIdx: true, cites: 'virtio 1.3 §2.7.7.2', kickCites: 'virtio 1.3 §2.7.10' },
  { name: 'packed-flags', packed: true, eventIdx: false, cites: 'virtio 1.3 §2.8.10', kickCites: 'virtio 1.3 §2.8.10' },
  { name: 'packed-desc', packed: true, eventIdx: true, cites: 'virtio 1.3 §2.8.10', kickCites: 'virtio 1.3 §2.8.10' },
]

function needsOf(style: Style): readonly number[] {
  return [...(style.packed ? [VIRTIO_F_RING_PACKED] : []), ...(style.eventIdx ? [VIRTIO_F_EVENT_IDX] : [])]
}

function running(context: Context, style: Style, mode: WaitMode): { guest: Guest; ring: Ring } {
  return context.running(
    { packed: style.packed, withoutFeatures: style.eventIdx ? [] : [VIRTIO_F_EVENT_IDX] },
    { mode }
  )
}

/** One request after the other by a driver that only sleeps. @throws Violation when a call or a kick is lost */
function pingPong(context: Context, ring: Ring, rounds: number, pause: (round: number) => number): string {
  ring.queue.takeCalls()
  let spurious = 0
  for (let round = 1; round <= rounds; round++) {
    ring.queue.driver.enableCalls()
    const pending = ring.submit()
    for (;;) {
      if (ring.queue.waitForCall(context.timeoutMs) === 0) {
        const completed = ring.queue.driver.hasUsed()
        throw new Violation(
          'a call for every request',
          completed ? `request ${round} completed without a call` : `request ${round} did not complete: a lost kick`
        )
      }
      if (ring.requests.poll() > 0) break
      // "The driver MUST handle spurious notifications": they are allowed, and without end they are a fault.
      expect(++spurious <= rounds, 'calls for completions', `${spurious} calls without one`)
    }
    ring.finish(pending)
    sleepMs(pause(round))
  }
  return `${rounds} requests${spurious === 0 ? '' : `, ${spurious} spurious calls`}`
}

/** Shorter and longer than any adaptive poll of a back-end, in milliseconds. */
const PAUSES = [0, 0.02, 0.05, 0.1, 0.5, 1, 3, 10, 30, 60]

function styleCases(style: Style): ConformanceCase[] {
  const needs = { features: needsOf(style) }
  const common = { group: 'notifications' as const, needs }
  return [
    {
      ...common,
      id: `call-wanted-${style.name}`,
      level: 'MUST',
      rule: `calls for every used buffer when the driver wants it (${style.name})`,
      cites: style.cites,
      run: (context) => pingPong(context, running(context, style, 'irq').ring, 300, () => 0),
    },
    {
      ...common,
      id: `call-after-idle-${style.name}`,
      level: 'MUST',
      rule: `loses neither kick nor call after idle times of 0.02 to 60 ms (${style.name})`,
      cites: `${style.cites}; ${style.kickCites}`,
      run: (context) =>
        pingPong(context, running(context, style, 'irq').ring, 60, (round) => PAUSES[round % PAUSES.length] ?? 0),
    },
    {
      ...common,
      id: `call-unwanted-${style.name}`,
      level: 'SHOULD',
      rule: `does not call when the driver wants no calls (${style.name}); few may slip through`,
      cites: style.cites,
      run: (context) => {
        const { ring } = running(context, style, 'poll')
        ring.run(1)
        sleepMs(5)
        ring.queue.takeCalls()
        ring.run(300)
        sleepMs(5)
        const calls = ring.queue.takeCalls()
        expect(calls <= 30, 'none, or nearly none', `${calls} calls for 300 requests`)
        return `${calls} calls for 300 requests`
      },
    },
    {
      ...common,
      id: `kick-unwanted-${style.name}`,
      level: 'MUST',
      rule: `finds what was made available without the kicks that it did not want (${style.name})`,
      cites: style.kickCites,
      run: (context) => {
        const { ring } = running(context, style, 'poll')
        let seed = 12345
        for (let i = 1; i <= 2000; i++) {
          ring.run(1, {}, `request ${i}`)
          // Any place in the window between "no more kicks" and "kicks again".
          seed = (seed * 1103515245 + 12345) & 0x7fffffff
          const until = performance.now() + (seed % 60) / 1000
          while (performance.now() < until);
        }
        const { kicks, suppressedKicks } = ring.queue.driver.counters
        return `2000 requests, ${kicks} kicks, ${suppressedKicks} unwanted`
      },
    },
    {
      ...common,
      id: `kick-spurious-${style.name}`,
      level: 'MUST',
      rule: `handles kicks when nothing was made available (${style.name})`,
      cites: style.packed ? 'virtio 1.3 §2.8.16' : 'virtio 1.3 §2.7.10.2',
      run: (context) => {
        const { ring } = running(context, style, 'poll')
        for (let i = 0; i < 200; i++) ring.queue.driver.kickRaw()
        ring.run(3)
        for (let i = 0; i < 50; i++) {
          const pending = ring.submit()
          ring.queue.driver.kickRaw()
          ring.queue.driver.kickRaw()
          ring.finish(pending)
        }
        return '300 of them'
      },
    },
  ]
}

export const notificationCases: readonly ConformanceCase[] = [
  ...STYLES.flatMap(styleCases),
  {
    id: 'call-used-event',
    group: 'notifications',
    level: 'MUST',
    rule: 'calls when the used index passes used_event, wherever the driver put it',
    cites: 'virtio 1.3 §2.7.7.2',
    needs: { features: [VIRTIO_F_EVENT_IDX] },
    run: (context) => {
      const { ring } = context.running()
      let early = 0
      for (let round = 0; round < 20; round++) {
        const ahead = round % 8
        sleepMs(3)
        ring.queue.takeCalls()
        ring.split.setUsedEvent(ring.split.base + ahead)
        ring.run(ahead)
        sleepMs(2)
        early += ring.queue.takeCalls()
        const pending = ring.submit()
        expect(
          ring.queue.waitForCall(1000) > 0,
          `a call for the buffer at used_event (${ahead} ahead)`,
          'none in a second'
        )
        ring.finish(pending)
      }
      return `20 calls${early === 0 ? '' : `, ${early} spurious`}`
    },
  },
  {
    id: 'call-used-event-not-before',
    group: 'notifications',
    level: 'SHOULD',
    rule: 'does not call before the used index passes used_event',
    cites: 'virtio 1.3 §2.7.7.2 ("Otherwise the device SHOULD NOT send a notification")',
    needs: { features: [VIRTIO_F_EVENT_IDX] },
    run: (context) => {
      const { ring } = context.running()
      ring.run(3)
      ring.split.setUsedEvent(ring.split.base + 100)
      sleepMs(5)
      ring.queue.takeCalls()
      ring.run(99)
      sleepMs(5)
      const early = ring.queue.takeCalls()
      expect(early <= 3, 'none, or nearly none', `${early} calls for 99 buffers before used_event`)
      return `${early} calls`
    },
  },
  {
    id: 'call-batch-over-used-event',
    group: 'notifications',
    level: 'MUST',
    rule: 'calls also when it uses several buffers at once and one of them is at used_event',
    cites: 'virtio 1.3 §2.7.7.2',
    needs: { features: [VIRTIO_F_EVENT_IDX] },
    run: (context) => {
      const { ring } = context.running()
      for (let round = 0; round < 30; round++) {
        sleepMs(1)
        ring.queue.takeCalls()
        ring.split.setUsedEvent(ring.split.base + (round % 30))
        const pending = ring.batch(30)
        expect(ring.queue.waitForCall(1000) > 0, `a call (used_event ${round % 30} of 30 ahead)`, 'none in a second')
        ring.finishAll(pending)
      }
      return '30 batches of 30'
    },
  },
  {
    id: 'call-flag-ignored',
    group: 'notifications',
    level: 'MUST',
    rule: 'ignores the NO_INTERRUPT flag of the available ring when EVENT_IDX is negotiated',
    cites: 'virtio 1.3 §2.7.7.2 ("MUST ignore the lower bit of flags")',
    needs: { features: [VIRTIO_F_EVENT_IDX] },
    run: (context) => {
      const { ring } = context.running()
      ring.queue.ring[1].bytes[0] = VIRTQ_AVAIL_F_NO_INTERRUPT
      return pingPong(context, ring, 20, () => 0)
    },
  },
  {
    id: 'call-event-ignored',
    group: 'notifications',
    level: 'MUST',
    rule: 'ignores used_event when EVENT_IDX is not negotiated',
    cites: 'virtio 1.3 §2.7.7.2 ("MUST ignore the used_event value")',
    run: (context) => {
      const { ring } = context.running({ withoutFeatures: [VIRTIO_F_EVENT_IDX] })
      const available = ring.queue.ring[1].bytes
      // Far away from every index that comes.
      new DataView(available.buffer, available.byteOffset).setUint16(4 + 2 * ring.queue.size, 0x8000, true)
      return pingPong(context, ring, 20, () => 0)
    },
  },
  {
    id: 'call-packed-driver-event',
    group: 'notifications',
    level: 'MUST',
    rule: 'calls when it uses the descriptor that the driver’s event suppression structure names',
    cites: 'virtio 1.3 §2.8.10',
    needs: { features: [VIRTIO_F_RING_PACKED, VIRTIO_F_EVENT_IDX] },
    run: (context) => {
      const size = 64
      const slots = chainLength(context.operation())
      const { ring } = context.running({ packed: true }, { size })
      for (let round = 0; round < 60; round++) {
        sleepMs(1)
        ring.queue.takeCalls()
        // Anywhere in what the next ten requests use, which may be used one by one or all at once.
        const ahead = (round % 10) * slots
        const slot = (ring.packed.usedSlot + ahead) % size
        const wrap = ring.packed.usedSlot + ahead < size ? ring.packed.usedWrap : 1 - ring.packed.usedWrap
        ring.packed.setEvent(slot, wrap, RING_EVENT_FLAGS_DESC)
        const pending = ring.batch(10)
        const what = `a call for the descriptor ${ahead} ahead (round ${round + 1})`
        expect(ring.queue.waitForCall(1000) > 0, what, 'none in a second')
        ring.finishAll(pending)
      }
      return '60 times on a ring of 64'
    },
  },
  {
    id: 'call-packed-enable-with-event-idx',
    group: 'notifications',
    level: 'MUST',
    rule: 'honours ENABLE and DISABLE in the driver’s event suppression structure when EVENT_IDX is negotiated, too',
    cites: 'virtio 1.3 §2.8.10 (Event Flags)',
    needs: { features: [VIRTIO_F_RING_PACKED, VIRTIO_F_EVENT_IDX] },
    run: (context) => {
      const { ring } = context.running({ packed: true })
      ring.packed.setEvent(0, 0, RING_EVENT_FLAGS_ENABLE)
      for (let i = 0; i < 10; i++) {
        ring.queue.takeCalls()
        const pending = ring.submit()
        expect(ring.queue.waitForCall(1000) > 0, 'a call with ENABLE', 'none in a second')
        ring.finish(pending)
      }
      ring.packed.setEvent(0, 0, RING_EVENT_FLAGS_DISABLE)
      sleepMs(5)
      ring.queue.takeCalls()
      ring.run(50)
      const calls = ring.queue.takeCalls()
      expect(calls <= 5, 'none, or nearly none, with DISABLE', `${calls} calls for 50 requests`)
      return '10 calls for 10 requests, then none'
    },
  },
  {
    id: 'call-fd-full',
    group: 'notifications',
    level: 'SHOULD',
    rule: 'is not held up by a call eventfd whose counter is full',
    cites: 'vhost-user.rst "VHOST_USER_SET_VRING_CALL"; eventfd(2) (a write blocks at the limit)',
    run: (context) => {
      const { ring } = context.running()
      for (let i = 0; i < 2049; i++) native.eventfdWrite(ring.queue.callFd, 2 ** 53 - 1)
      for (let i = 0; i < 20; i++) {
        ring.queue.driver.enableCalls()
        ring.run(1, {}, 'a request whose call cannot be counted')
      }
      ring.queue.takeCalls()
      return '20 requests'
    },
  },
  {
    id: 'inband-kick-call',
    group: 'notifications',
    level: 'MUST',
    rule: 'starts rings by VRING_KICK, hears kicks by message, and calls by VRING_CALL when no eventfds are set',
    cites: 'vhost-user.rst "In-band notifications", "VHOST_USER_VRING_KICK", "VHOST_USER_BACKEND_VRING_CALL"',
    needs: {
      protocol: [
        VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS,
        VHOST_USER_PROTOCOL_F_BACKEND_REQ,
        VHOST_USER_PROTOCOL_F_REPLY_ACK,
      ],
    },
    run: (context) => {
      const { ring } = context.running({ inband: true }, { mode: 'irq' })
      return pingPong(context, ring, 50, () => 0)
    },
  },
  {
    id: 'inband-err',
    group: 'notifications',
    level: 'SHOULD',
    rule: 'tells by VRING_ERR of a broken ring that has no err eventfd',
    cites: 'vhost-user.rst "VHOST_USER_BACKEND_VRING_ERR"',
    needs: {
      protocol: [
        VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS,
        VHOST_USER_PROTOCOL_F_BACKEND_REQ,
        VHOST_USER_PROTOCOL_F_REPLY_ACK,
      ],
    },
    run: (context) => {
      const { guest, ring } = context.running({ inband: true })
      ring.run()
      // A head beyond the ring.
      ring.split.issueRaw(ring.queue.size)
      ring.split.publishRaw(ring.split.availableIndex)
      for (const deadline = performance.now() + 500; performance.now() < deadline; sleepMs(5)) {
        if (ring.queue.broken()) return 'told'
        if (guest.connection.channel.hungUp()) throw new Violation('VRING_ERR', 'the whole session is ended')
      }
      throw new Violation('VRING_ERR', 'none in 500 ms')
    },
  },
  {
    id: 'inband-eventfd-preferred',
    group: 'notifications',
    level: 'MUST',
    rule: 'prefers eventfds to messages when both are there',
    cites: 'vhost-user.rst "VHOST_USER_SET_VRING_KICK" ("which will be preferred over the message")',
    needs: {
      protocol: [
        VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS,
        VHOST_USER_PROTOCOL_F_BACKEND_REQ,
        VHOST_USER_PROTOCOL_F_REPLY_ACK,
      ],
    },
    run: (context) => {
      const guest = context.guest({ inband: true })
      let messages = 0
      const before = guest.connection.onBackendRequest
      guest.connection.onBackendRequest = (message) => {
        if (message.request === VHOST_USER_BACKEND_VRING_CALL) messages++
        return before?.(message) ?? 0n
      }
      context.startCompanions(guest)
      const ring = guest.prepare(context.ringIndex, { mode: 'irq', inband: false })
      ring.start()
      const seen = pingPong(context, ring, 20, () => 0)
      guest.connection.pump(20)
      expectEqual('calls by message', messages, 0)
      return `${seen} by eventfd`
    },
  },
]

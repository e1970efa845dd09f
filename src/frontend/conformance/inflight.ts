/**
 * Cases about in-flight I/O tracking: what a back-end leaves in the area, and what it does with what another one left there.
 * States after a crash are written by hand, so that each is met exactly; nobody has to die for it.
 */
import { fstatSync } from 'node:fs'
import { native } from '../../native.ts'
import {
  VHOST_USER_GET_INFLIGHT_FD,
  VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
  VHOST_USER_PROTOCOL_F_REPLY_ACK,
} from '../../vhost-user/wire.ts'
import { VIRTIO_F_RING_PACKED } from '../../virtio/constants.ts'
import { InflightArea, type InflightState } from '../inflight.ts'
import { PACKED_BASE } from '../packed-driver.ts'
import { sleepMs } from '../virtqueue.ts'
import { type ConformanceCase, expect, expectEqual } from './case.ts'
import type { Context } from './context.ts'
import type { Guest, Pending, Ring } from './guest.ts'
import { bytesOf, receiveReply } from './messages.ts'

const SIZE = 64
const TRACKING = 'vhost-user.rst "Inflight I/O tracking"'
const protocol = [VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD]
const split = { device: 'blk', protocol } as const
const packed = { device: 'blk', protocol, features: [VIRTIO_F_RING_PACKED] } as const

/** An area of one queue, a guest that shares it, and a ring in memory that is not started. */
interface Crash {
  readonly area: InflightArea
  readonly view: DataView
  readonly ring: Ring
  readonly guest: Guest
}

function crash(context: Context, format: 'split' | 'packed', use: (crash: Crash) => string, arena?: number): string {
  const area = InflightArea.create(1, SIZE, format === 'packed')
  try {
    const guest = context.guest({ inflight: area, packed: format === 'packed' })
    const ring = guest.prepare(0, { size: SIZE }, arena)
    const bytes = area.queue(0)
    return use({ area, view: new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength), ring, guest })
  } finally {
    context.release(false)
    area.close()
  }
}

/** The marks are cleared after the used ring was published: a moment is given for it. A stop may clear all of the region. */
function settled(area: InflightArea, isThere: (state: InflightState) => boolean): InflightState {
  for (const deadline = performance.now() + 500; ; sleepMs(1)) {
    const state = area.read(0)
    if ((isThere(state) && state.inflight.length === 0) || performance.now() > deadline) return state
  }
}

// ---- split: u64 features, u16 version, desc_num, last_batch_head, used_idx; 16 bytes per descriptor

function splitHeader(view: DataView, usedIdx: number, lastBatchHead = 0): void {
  view.setUint16(8, 1, true)
  view.setUint16(10, SIZE, true)
  view.setUint16(12, lastBatchHead, true)
  view.setUint16(14, usedIdx, true)
}

function markSplit(view: DataView, head: number, counter: number, next = 0): void {
  const at = 16 + 16 * head
  view.setUint8(at, 1)
  view.setUint16(at + 6, next, true)
  view.setBigUint64(at + 8, BigInt(counter), true)
}

/** The heads of the chains that were made available, in their order. */
function availableHeads({ queue }: Ring, count: number): number[] {
  const bytes = queue.ring[1].bytes
  const view = new DataView(bytes.buffer, bytes.byteOffset)
  return Array.from({ length: count }, (_, i) => view.getUint16(4 + 2 * i, true))
}

/** Writes used elements as the back-end before did; the driver takes them in. */
function useByHand({ queue, requests }: Ring, heads: readonly number[]): void {
  const { bytes } = queue.ring[2]
  const view = new DataView(bytes.buffer, bytes.byteOffset)
  for (const [i, head] of heads.entries()) view.setUint32(4 + 8 * i, head, true)
  view.setUint16(2, heads.length, true)
  requests.poll()
}

/** Starts the ring as QEMU does after a reconnection, from the used index, with a kick for those that were lost. */
function resume(ring: Ring, base: number): void {
  ring.start(base)
  ring.queue.driver.kickRaw()
}

/** All of `pending` complete, each once, and then new requests do. */
function expectRecovered(ring: Ring, pending: readonly Pending[], total: number): void {
  ring.finishAll(pending, 'a request that was in flight')
  sleepMs(20)
  expectEqual('the used index', ring.split.usedIndex, total)
  expectEqual('requests under way', ring.requests.outstanding, 0)
  ring.run(SIZE, {}, 'a request after the recovery')
}

const splitCases: readonly ConformanceCase[] = [
  {
    id: 'inflight-marks-busy-split',
    group: 'inflight',
    level: 'MUST',
    rule: 'marks the descriptors of requests as in flight while they are',
    cites: `${TRACKING} ("Set desc[i].inflight to 1")`,
    needs: split,
    run: (context) => marksWhileBusy(context, 'split'),
  },
  {
    id: 'inflight-marks-split',
    group: 'inflight',
    level: 'MUST',
    rule: 'keeps version, desc_num, used_idx and the entries of a split ring’s region as they should be',
    cites: `${TRACKING} (QueueRegionSplit, DescStateSplit)`,
    needs: split,
    run: (context) =>
      crash(context, 'split', ({ area, ring }) => {
        ring.start()
        ring.run(10)
        const pending = ring.batch(8)
        const heads = availableHeads(ring, 18).slice(10)
        ring.finishAll(pending)
        const state = settled(area, (one) => one.usedIdx === 18)
        expectEqual('features', state.features, 0n)
        expectEqual('version', state.version, 1)
        expectEqual('desc_num', state.descNum, SIZE)
        expectEqual('used_idx', state.usedIdx, 18)
        expectEqual('entries that are marked after all completed', state.inflight.length, 0)
        const counters = heads.map((head) => state.entries[head]?.counter ?? -1n)
        const rising = counters.every((counter, i) => i === 0 || counter > (counters[i - 1] ?? 0n))
        expect(rising, 'counters in the order of the available ring', counters.join(', '))
        return `version 1, used_idx ${state.usedIdx}, counters ${counters.join(', ')}`
      }),
  },
  {
    id: 'inflight-resubmit-split',
    group: 'inflight',
    level: 'MUST',
    rule: 'resubmits the descriptors that are marked as in flight, whatever was used before them, and goes on behind them',
    cites: `${TRACKING} ("When reconnecting")`,
    needs: split,
    run: (context) =>
      crash(context, 'split', ({ view, ring }) => {
        // Five were fetched, the second and the fourth were used; the others are lost unless somebody knows of them.
        const pending = ring.batch(5)
        const heads = availableHeads(ring, 5)
        useByHand(ring, [heads[1] as number, heads[3] as number])
        splitHeader(view, 2)
        for (const i of [0, 2, 4]) markSplit(view, heads[i] as number, i)
        resume(ring, 2)
        expectRecovered(ring, [pending[0], pending[2], pending[4]] as Pending[], 5)
        return '3 of 5 were in flight, and completed once'
      }),
  },
  {
    id: 'inflight-batch-split',
    group: 'inflight',
    level: 'MUST',
    rule: 'does not resubmit the last batch when used_idx shows that the crash came after the used ring was published',
    cites: `${TRACKING} ("If the value of used_idx does not match the idx value of used ring")`,
    needs: split,
    run: (context) =>
      crash(context, 'split', ({ area, view, ring }) => {
        const pending = ring.batch(4)
        const heads = availableHeads(ring, 4)
        const [first, second] = [heads[0] as number, heads[1] as number]
        useByHand(ring, [first, second])
        // The batch is second → first, its marks not yet cleared, used_idx still the old one.
        splitHeader(view, 0, second)
        markSplit(view, first, 0)
        markSplit(view, second, 1, first)
        markSplit(view, heads[2] as number, 2)
        markSplit(view, heads[3] as number, 3)
        resume(ring, 2)
        expectRecovered(ring, pending.slice(2), 4)
        expectEqual('entries that are marked', area.read(0).inflight.length, 0)
        return 'the two of the batch were left, the other two completed'
      }),
  },
  {
    id: 'inflight-idle-split',
    group: 'inflight',
    level: 'MUST',
    rule: 'goes on from the used index when nothing was in flight',
    cites: TRACKING,
    needs: split,
    run: (context) =>
      crash(context, 'split', ({ view, ring }) => {
        ring.batch(3)
        useByHand(ring, availableHeads(ring, 3))
        splitHeader(view, 3)
        resume(ring, 3)
        ring.run(SIZE, {}, 'a request after the recovery')
        expectEqual('the used index', ring.split.usedIndex, 3 + SIZE)
        return 'nothing was resubmitted'
      }),
  },
]

// ---- packed: u64 features, u16 version, desc_num, free_head, old_free_head, used_idx, old_used_idx, u8 wraps; 32 per entry

interface PackedHeader {
  readonly freeHead: number
  readonly oldFreeHead: number
  readonly usedIdx: number
  readonly oldUsedIdx: number
}

/** The free list as it is at first, and the header; wrap counters 1. */
function packedHeader(view: DataView, { freeHead, oldFreeHead, usedIdx, oldUsedIdx }: PackedHeader): void {
  view.setUint16(8, 1, true)
  view.setUint16(10, SIZE, true)
  view.setUint16(12, freeHead, true)
  view.setUint16(14, oldFreeHead, true)
  view.setUint16(16, usedIdx, true)
  view.setUint16(18, oldUsedIdx, true)
  view.setUint8(20, 1)
  view.setUint8(21, 1)
  for (let i = 0; i < SIZE; i++) view.setUint16(32 + 32 * i + 2, i + 1, true)
}

/** Records `slots` descriptors of the ring from `first` on as one chain in the entries of the same numbers. */
function markPacked(view: DataView, { packed: driver }: Ring, first: number, slots: number, counter: number): void {
  for (let i = 0; i < slots; i++) {
    const { address, length, id, flags } = driver.readDescriptor(first + i)
    const at = 32 + 32 * (first + i)
    view.setUint16(at + 16, id, true)
    view.setUint16(at + 18, flags, true)
    view.setUint32(at + 20, length, true)
    view.setBigUint64(at + 24, address, true)
  }
  const head = 32 + 32 * first
  view.setUint8(head, 1)
  view.setUint16(head + 4, first + slots - 1, true)
  view.setUint16(head + 6, slots, true)
  view.setBigUint64(head + 8, BigInt(counter), true)
}

/** Descriptors of one read. */
const CHAIN = 3

function expectPackedRecovered(ring: Ring, pending: readonly Pending[]): void {
  ring.finishAll(pending, 'a request that was in flight')
  sleepMs(20)
  expectEqual('used descriptors that nobody waits for', ring.packed.pending(), 0)
  expectEqual('requests under way', ring.requests.outstanding, 0)
  ring.run(SIZE, {}, 'a request after the recovery')
}

const packedCases: readonly ConformanceCase[] = [
  {
    id: 'inflight-marks-busy-packed',
    group: 'inflight',
    level: 'MUST',
    rule: 'marks the descriptors of requests on a packed ring as in flight while they are',
    cites: `${TRACKING} ("Set desc[old_free_head].inflight to 1")`,
    needs: packed,
    run: (context) => marksWhileBusy(context, 'packed'),
  },
  {
    id: 'inflight-marks-packed',
    group: 'inflight',
    level: 'MUST',
    rule: 'keeps version, desc_num, indices, wrap counters and the entries of a packed ring’s region as they should be',
    cites: `${TRACKING} (QueueRegionPacked, DescStatePacked)`,
    needs: packed,
    run: (context) =>
      crash(context, 'packed', ({ area, ring }) => {
        ring.start()
        ring.run(30)
        ring.finishAll(ring.batch(8))
        const state = settled(area, (one) => one.usedIdx === one.oldUsedIdx)
        expectEqual('features', state.features, 0n)
        expectEqual('version', state.version, 1)
        expectEqual('desc_num', state.descNum, SIZE)
        const slots = (38 * CHAIN) % SIZE
        const wrap = Math.floor((38 * CHAIN) / SIZE) % 2 === 0 ? 1 : 0
        expectEqual('used_idx', state.usedIdx, slots)
        expectEqual('old_used_idx', state.oldUsedIdx, slots)
        expectEqual('used_wrap_counter', state.usedWrapCounter, wrap)
        expectEqual('old_used_wrap_counter', state.oldUsedWrapCounter, wrap)
        expectEqual('free_head and old_free_head differ by', state.freeHead - state.oldFreeHead, 0)
        expectEqual('entries that are marked after all completed', state.inflight.length, 0)
        const free = new Set<number>()
        for (let at = state.freeHead; at < SIZE && !free.has(at); at = state.entries[at]?.next ?? SIZE) free.add(at)
        expectEqual('entries of the free list', free.size, SIZE)
        return `used_idx ${slots}, ${SIZE} entries free`
      }),
  },
  {
    id: 'inflight-resubmit-packed',
    group: 'inflight',
    level: 'MUST',
    rule: 'resubmits the chains that a packed ring’s region has as in flight, from what is recorded there',
    cites: `${TRACKING} (packed, "When reconnecting")`,
    needs: packed,
    run: (context) =>
      crash(context, 'packed', ({ view, ring }) => {
        const pending = ring.batch(2)
        packedHeader(view, { freeHead: 2 * CHAIN, oldFreeHead: 2 * CHAIN, usedIdx: 0, oldUsedIdx: 0 })
        markPacked(view, ring, 0, CHAIN, 0)
        markPacked(view, ring, CHAIN, CHAIN, 1)
        resume(ring, PACKED_BASE)
        expectPackedRecovered(ring, pending)
        return '2 were in flight, and completed once'
      }),
  },
  {
    id: 'inflight-commit-packed',
    group: 'inflight',
    level: 'MUST',
    rule: 'commits an update that the descriptor ring shows as published, and does not resubmit that chain',
    cites: `${TRACKING} (packed: "it has to commit the in-progress update")`,
    needs: packed,
    run: (context) =>
      crash(context, 'packed', ({ view, ring }) => {
        const pending = ring.batch(2)
        packedHeader(view, { freeHead: 0, oldFreeHead: 2 * CHAIN, usedIdx: CHAIN, oldUsedIdx: 0 })
        markPacked(view, ring, 0, CHAIN, 0)
        markPacked(view, ring, CHAIN, CHAIN, 1)
        // The first chain is back in the free list, and used in the ring; its mark was not cleared any more.
        view.setUint16(32 + 32 * (CHAIN - 1) + 2, 2 * CHAIN, true)
        const used = ring.packed.readDescriptor(CHAIN - 1)
        ring.packed.writeDescriptor(0, 0, 1, used.id, 0x8080 | 2)
        ring.requests.poll()
        resume(ring, PACKED_BASE)
        expectPackedRecovered(ring, pending.slice(1))
        return 'the published one was left, the other one completed'
      }),
  },
  {
    id: 'inflight-rollback-packed',
    group: 'inflight',
    level: 'MUST',
    rule: 'rolls an update back that the descriptor ring does not show, and resubmits that chain, too',
    cites: `${TRACKING} (packed: "roll back any in-progress update")`,
    needs: packed,
    run: (context) =>
      crash(context, 'packed', ({ view, ring }) => {
        const pending = ring.batch(2)
        packedHeader(view, { freeHead: 0, oldFreeHead: 2 * CHAIN, usedIdx: CHAIN, oldUsedIdx: 0 })
        markPacked(view, ring, 0, CHAIN, 0)
        markPacked(view, ring, CHAIN, CHAIN, 1)
        view.setUint16(32 + 32 * (CHAIN - 1) + 2, 2 * CHAIN, true)
        resume(ring, PACKED_BASE)
        expectPackedRecovered(ring, pending)
        return 'both completed once'
      }),
  },
]

/** Looks into the area while requests are under way, which a back-end has to have marked before it begins with them. */
function marksWhileBusy(context: Context, format: 'split' | 'packed'): string {
  return crash(
    context,
    format,
    ({ view, ring }) => {
      ring.start()
      const [first, step] = format === 'split' ? [16, 16] : [32, 32]
      let most = 0
      for (let round = 0; round < 40; round++) {
        const pending = ring.batchOf(context.longOperations(20))
        // Often, and nothing else meanwhile: requests that a page cache answers are under way for microseconds.
        for (const until = performance.now() + 200; !ring.queue.driver.hasUsed() && performance.now() < until; ) {
          let marked = 0
          for (let i = 0; i < SIZE; i++) if (view.getUint8(first + step * i) === 1) marked++
          if (marked > most) most = marked
        }
        ring.finishAll(pending)
      }
      expect(most > 0, 'entries that are marked while requests are under way', 'none, in 40 rounds of 20 requests')
      return `up to ${most} marked`
    },
    24 * 2 ** 20
  )
}

const sharedCases: readonly ConformanceCase[] = [
  {
    id: 'inflight-get',
    group: 'inflight',
    level: 'MUST',
    rule: 'answers GET_INFLIGHT_FD with a file in which the region of every queue has room, all of it fresh',
    cites: 'vhost-user.rst "VHOST_USER_GET_INFLIGHT_FD", "Inflight description"',
    needs: { protocol },
    run: (context) => {
      const queues = Math.min(context.facts.rings, 4)
      const guest = context.guest({ inflight: { numQueues: queues, queueSize: 256 } })
      const { inflight } = guest.session
      if (inflight === undefined) throw new Error('no in-flight area')
      const { mmapSize, mmapOffset, numQueues, queueSize } = inflight.description
      expectEqual('num queues', numQueues, queues)
      expectEqual('queue size', queueSize, 256)
      const least = queues * (16 + 16 * 256)
      expect(mmapSize >= BigInt(least), `an mmap size of at least ${least}`, `${mmapSize}`)
      const { size } = fstatSync(inflight.fd)
      expect(BigInt(size) >= mmapOffset + mmapSize, `a file of ${mmapOffset + mmapSize} bytes`, `${size}`)
      for (let queue = 0; queue < queues; queue++) {
        const state = inflight.read(queue)
        expect(state.version <= 1, 'version 0 or 1', `${state.version}`)
        expectEqual('entries in flight in a fresh area', state.inflight.length, 0)
      }
      return `${mmapSize} bytes for ${queues} queues`
    },
  },
  {
    id: 'inflight-get-padded',
    group: 'inflight',
    level: 'SHOULD',
    rule: 'takes GET_INFLIGHT_FD of 24 bytes, as QEMU sends its C structure',
    cites: 'vhost-user.rst "C structure" (VhostUserInflight ends in 4 bytes of padding)',
    needs: { protocol },
    run: (context) => {
      const { connection } = context.guest({ inflight: { numQueues: 1, queueSize: 64 } })
      const payload = new Uint8Array(24)
      const view = new DataView(payload.buffer)
      view.setUint16(16, 1, true)
      view.setUint16(18, 64, true)
      connection.send(bytesOf({ request: VHOST_USER_GET_INFLIGHT_FD, payload }))
      const reply = receiveReply(connection, VHOST_USER_GET_INFLIGHT_FD)
      for (const fd of reply.fds) native.close(fd)
      expect(reply.payload.length >= 20, 'a description', `${reply.payload.length} bytes`)
      expectEqual('files that come with it', reply.fds.length, 1)
      return `${reply.payload.length} bytes`
    },
  },
  {
    id: 'inflight-rings-work',
    group: 'inflight',
    level: 'MUST',
    rule: 'serves rings with tracking like rings without',
    cites: TRACKING,
    needs: { protocol },
    run: (context) => {
      const { ring } = context.running({ inflight: { numQueues: context.facts.rings, queueSize: 256 } })
      for (let i = 0; i < 20; i++) ring.finishAll(ring.batch(60))
      const base = ring.stop()
      ring.start(base)
      ring.run(3, {}, 'a request after a stop')
      return '1203 requests'
    },
  },
  {
    id: 'inflight-set-too-small',
    group: 'inflight',
    level: 'SHOULD',
    rule: 'refuses an in-flight area that is too small for its queues, or a ring that is larger than it says',
    cites: 'vhost-user.rst "Inflight description"',
    needs: { protocol: [...protocol, VHOST_USER_PROTOCOL_F_REPLY_ACK] },
    run: (context) => {
      const area = InflightArea.create(1, 64, false)
      try {
        const seen: string[] = []
        for (const wrong of [{ mmapSize: 64n }, { queueSize: 16 }, { mmapOffset: 2n ** 40n }]) {
          const guest = context.guest({ inflight: area })
          const ring = guest.prepare(0, { size: 64 })
          const description = { ...area.description, ...wrong }
          seen.push(
            context.expectRefusal(
              guest.connection,
              JSON.stringify(wrong, (_, value) => String(value)),
              () => {
                guest.connection.setInflightFd(description, area.fd)
                ring.num()
                ring.base()
                ring.address()
                ring.kick()
              }
            )
          )
          ring.started = false
        }
        return seen.join(', ')
      } finally {
        context.release(false)
        area.close()
      }
    },
  },
  {
    id: 'inflight-garbage',
    group: 'inflight',
    level: 'SHOULD',
    rule: 'lives with an in-flight area full of random bytes',
    cites: TRACKING,
    needs: split,
    run: (context) => {
      let seed = 7
      for (let round = 0; round < 20; round++) {
        crash(context, 'split', ({ view, ring, guest }) => {
          for (let i = 0; i < view.byteLength; i++) {
            seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0
            view.setUint8(i, seed >>> 24)
          }
          if (round % 2 === 0) {
            view.setUint16(8, 1, true)
            view.setUint16(10, SIZE, true)
          }
          ring.batch(3)
          context.answer(guest.connection, () => resume(ring, 0))
          sleepMs(5)
          ring.started = false
          return ''
        })
      }
      context.expectServing('a session after it')
      return '20 areas'
    },
  },
]

export const inflightCases: readonly ConformanceCase[] = [...sharedCases, ...splitCases, ...packedCases]

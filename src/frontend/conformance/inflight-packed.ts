/** Cases about in-flight tracking of packed rings: the marks, and what is done with those of a back-end that died. */
import { PACKED_BASE } from '../packed-driver.ts'
import { sleepMs } from '../virtqueue.ts'
import { type ConformanceCase, expectEqual } from './case.ts'
import { crash, marksWhileBusy, packed, resume, SIZE, settled, TRACKING } from './crash.ts'
import type { Pending, Ring } from './guest.ts'

// u64 features, u16 version, desc_num, free_head, old_free_head, used_idx, old_used_idx, u8 wraps; 32 bytes per entry

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

export const inflightPackedCases: readonly ConformanceCase[] = [
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

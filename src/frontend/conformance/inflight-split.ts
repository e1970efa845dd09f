/** Cases about in-flight tracking of split rings: the marks, and what is done with those of a back-end that died. */
import { sleepMs } from '../virtqueue.ts'
import { type ConformanceCase, expect, expectEqual } from './case.ts'
import { crash, marksWhileBusy, resume, SIZE, settled, split, TRACKING } from './crash.ts'
import type { Pending, Ring } from './guest.ts'

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

/** All of `pending` complete, each once, and then new requests do. */
function expectRecovered(ring: Ring, pending: readonly Pending[], total: number): void {
  ring.finishAll(pending, 'a request that was in flight')
  sleepMs(20)
  expectEqual('the used index', ring.split.usedIndex, total)
  expectEqual('requests under way', ring.requests.outstanding, 0)
  ring.run(SIZE, {}, 'a request after the recovery')
}

export const inflightSplitCases: readonly ConformanceCase[] = [
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
    rule: 'resubmits the descriptors that are marked as in flight, whatever was used before, and goes on',
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

/** Cases about the split virtqueue: framing, indirect tables, sizes, wraps, what the device may write. */
import {
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_IN_ORDER,
  VIRTIO_F_INDIRECT_DESC,
  VIRTQ_DESC_F_INDIRECT,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
  VIRTQ_DESC_SIZE,
} from '../../virtio/constants.ts'
import type { Segment } from '../driver.ts'
import { FrontendError } from '../errors.ts'
import { layouts } from '../memory.ts'
import { writeTable } from '../split-driver.ts'
import { applicable, type ConformanceCase, expect, expectBytes, expectEqual, NotApplicable } from './case.ts'
import type { Context } from './context.ts'
import type { Ring } from './guest.ts'
import { chainLength, framings, type GuestRequest, placed } from './shapes.ts'

const NEXT = VIRTQ_DESC_F_NEXT
const WRITE = VIRTQ_DESC_F_WRITE

/** Puts segments into descriptors from `first` on, one after the other. */
function writeChain(ring: Ring, segments: readonly Segment[], first = 0): void {
  for (const [i, { address, length, writable }] of segments.entries()) {
    const last = i + 1 === segments.length
    const flags = (writable ? WRITE : 0) | (last ? 0 : NEXT)
    ring.split.writeDescriptor(first + i, address, length, flags, last ? 0 : first + i + 1)
  }
}

/** Makes head 0 available by hand and waits for it. @throws Violation */
function runByHand(ring: Ring, request: GuestRequest, what: string): void {
  ring.split.issueRaw(0)
  ring.split.publishRaw(ring.split.availableIndex)
  request.expectDone(ring, what)
}

/** A ring that only this case writes to, with one request laid out in guest memory. */
function byHand(context: Context, size = 64): { ring: Ring; request: GuestRequest } {
  const { guest, ring } = context.running({}, { size })
  return { ring, request: placed(context, guest) }
}

function sizeCase(size: number): ConformanceCase {
  return {
    id: `split-size-${size}`,
    group: 'split',
    // A device may have limits of its own; these sizes every front-end uses.
    level: size >= 64 && size <= 256 ? 'MUST' : 'SHOULD',
    rule: `serves a split ring of ${size} ${size === 1 ? 'entry' : 'entries'}`,
    cites: 'virtio 1.3 §2.7 (a power of 2, up to 32768)',
    run: (context) => {
      const needed = chainLength(context.operation())
      const indirect = needed > size
      applicable(
        !indirect || context.has(VIRTIO_F_INDIRECT_DESC),
        'a request has more descriptors: needs INDIRECT_DESC'
      )
      try {
        const { ring } = context.running({ memory: layouts.single(96 * 2 ** 20) }, { size })
        const depth = indirect ? size : Math.max(1, Math.floor(size / needed))
        for (let i = 0; i < Math.max(3, Math.ceil((3 * size) / depth)); i++)
          ring.finishAll(ring.batch(Math.min(depth, 1000), { indirect }))
      } catch (error) {
        if (size > 1024 && error instanceof FrontendError && error.request.startsWith('SET_VRING'))
          throw new NotApplicable(`the back-end has a limit below ${size}: ${error.message}`)
        throw error
      }
      return indirect ? 'with indirect tables' : 'full several times'
    },
  }
}

export const splitCases: readonly ConformanceCase[] = [
  {
    id: 'split-framing',
    group: 'split',
    level: 'MUST',
    rule: 'makes no assumptions about how a request is cut into descriptors',
    cites: 'virtio 1.3 §2.7.4.1, §5.2.6 (no legacy framing)',
    run: (context) => {
      const { ring } = context.running({}, { size: 1024 })
      const shapes = framings(context)
      for (const [name, framing] of shapes) ring.run(2, framing, `a request with ${name}`)
      return `${shapes.length} framings`
    },
  },
  {
    id: 'split-used-length',
    group: 'split',
    level: 'SHOULD',
    rule: 'puts the number of bytes that it wrote into the used element; less is for errors only',
    cites: 'virtio 1.3 §2.7.8, §2.7.8.2',
    run: (context) => {
      const { ring } = context.running()
      const pending = ring.submit()
      ring.finish(pending)
      expectEqual('the used length', pending.request.written, pending.operation.writable)
      return `${pending.request.written} bytes`
    },
  },
  {
    id: 'split-readable-untouched',
    group: 'split',
    level: 'MUST',
    rule: 'writes neither to device-readable buffers nor to descriptors',
    cites: 'virtio 1.3 §2.7.5.1',
    run: (context) => {
      const { ring, request } = byHand(context)
      writeChain(ring, request.segments)
      const descriptors = ring.queue.ring[0].bytes.slice()
      const available = ring.queue.ring[1].bytes.slice(4, 4 + 2 * ring.queue.size)
      runByHand(ring, request, 'a request')
      expectBytes('the descriptor table', ring.queue.ring[0].bytes, descriptors)
      // The entry that runByHand wrote is head 0, which was there before.
      expectBytes('the available ring', ring.queue.ring[1].bytes.slice(4, 4 + 2 * ring.queue.size), available)
      request.expectReadableUntouched()
      return 'all as before'
    },
  },
  {
    id: 'split-writes-in-bounds',
    group: 'split',
    level: 'MUST',
    rule: 'writes to nothing beside the device-writable buffers and the used ring',
    cites: 'virtio 1.3 §2.7.5, §2.7.8',
    run: (context) => {
      const { ring, request } = byHand(context)
      writeChain(ring, request.segments)
      runByHand(ring, request, 'a request')
      request.expectSurroundingsUntouched()
      const { size } = ring.queue
      const used = ring.queue.ring[2].bytes
      const others = used.subarray(4 + 8, 4 + 8 * size)
      expect(
        others.every((byte) => byte === 0),
        'used elements that are still free stay 0',
        'one was written'
      )
      return 'the bytes around are as before'
    },
  },
  {
    id: 'split-indirect',
    group: 'split',
    level: 'MUST',
    rule: 'serves requests in indirect tables, in every framing',
    cites: 'virtio 1.3 §2.7.5.3',
    needs: { features: [VIRTIO_F_INDIRECT_DESC] },
    run: (context) => {
      const { ring } = context.running()
      for (const [name, framing] of framings(context))
        ring.run(2, { ...framing, indirect: true }, `an indirect request with ${name}`)
      ring.finishAll(ring.batch(100, { indirect: true }))
      return 'singly, and 100 at once'
    },
  },
  {
    id: 'split-indirect-after-direct',
    group: 'split',
    level: 'MUST',
    rule: 'handles normal chained descriptors followed by one that refers to an indirect table',
    cites: 'virtio 1.3 §2.7.5.3.2',
    needs: { features: [VIRTIO_F_INDIRECT_DESC] },
    run: (context) => {
      const { ring, request } = byHand(context)
      const pieces = request.pieces()
      for (let direct = 1; direct < pieces.length; direct++) {
        const rest = pieces.slice(direct)
        for (const [i, { address, length, writable }] of pieces.slice(0, direct).entries())
          ring.split.writeDescriptor(i, address, length, NEXT | (writable ? WRITE : 0), i + 1)
        writeTable(request.table, rest)
        const bytes = rest.length * VIRTQ_DESC_SIZE
        ring.split.writeDescriptor(direct, request.table.gpa, bytes, VIRTQ_DESC_F_INDIRECT, 0)
        request.reset()
        runByHand(ring, request, `a request with ${direct} of ${pieces.length} descriptors before the table`)
      }
      return `1 … ${pieces.length - 1} descriptors before the table`
    },
  },
  {
    id: 'split-indirect-write-flag',
    group: 'split',
    level: 'MUST',
    rule: 'ignores the WRITE flag of the descriptor that refers to an indirect table',
    cites: 'virtio 1.3 §2.7.5.3.2',
    needs: { features: [VIRTIO_F_INDIRECT_DESC] },
    run: (context) => {
      const { ring, request } = byHand(context)
      const segments = request.pieces()
      writeTable(request.table, segments)
      const bytes = segments.length * VIRTQ_DESC_SIZE
      ring.split.writeDescriptor(0, request.table.gpa, bytes, VIRTQ_DESC_F_INDIRECT | WRITE, 0)
      runByHand(ring, request, 'a request whose table has the WRITE flag')
      return 'served'
    },
  },
  {
    id: 'split-indirect-next-anywhere',
    group: 'split',
    level: 'MUST',
    rule: 'follows the "next" fields of an indirect table, which need not be in order',
    cites: 'virtio 1.3 §2.7.5.3 ("additional indirect descriptors are chained by next")',
    needs: { features: [VIRTIO_F_INDIRECT_DESC] },
    run: (context) => {
      const { ring, request } = byHand(context)
      const segments = request.pieces()
      const view = new DataView(request.table.bytes.buffer, request.table.bytes.byteOffset)
      // Entry 0 is the first; the others stand in the table backwards.
      const place = (i: number): number => (i === 0 ? 0 : segments.length - i)
      for (const [i, { address, length, writable }] of segments.entries()) {
        const at = place(i) * VIRTQ_DESC_SIZE
        const last = i + 1 === segments.length
        view.setBigUint64(at, BigInt(address), true)
        view.setUint32(at + 8, length, true)
        view.setUint16(at + 12, (writable ? WRITE : 0) | (last ? 0 : NEXT), true)
        view.setUint16(at + 14, last ? 0 : place(i + 1), true)
      }
      const bytes = segments.length * VIRTQ_DESC_SIZE
      ring.split.writeDescriptor(0, request.table.gpa, bytes, VIRTQ_DESC_F_INDIRECT, 0)
      runByHand(ring, request, 'a request whose table is chained backwards')
      return 'served'
    },
  },
  {
    id: 'split-next-anywhere',
    group: 'split',
    level: 'MUST',
    rule: 'follows "next" through the descriptor table in any order, from any head',
    cites: 'virtio 1.3 §2.7.5',
    run: (context) => {
      const { ring, request } = byHand(context, 64)
      const segments = request.pieces()
      for (const [round, stride] of [5, 23, 63].entries()) {
        const place = (i: number): number => (7 + round * 20 + i * stride) % 64
        for (const [i, { address, length, writable }] of segments.entries()) {
          const last = i + 1 === segments.length
          const flags = (writable ? WRITE : 0) | (last ? 0 : NEXT)
          ring.split.writeDescriptor(place(i), address, length, flags, last ? 0 : place(i + 1))
        }
        request.reset()
        ring.split.issueRaw(place(0))
        ring.split.publishRaw(ring.split.availableIndex)
        request.expectDone(ring, `a chain with steps of ${stride}`)
      }
      return 'three orders'
    },
  },
  {
    id: 'split-index-wrap',
    group: 'split',
    level: 'MUST',
    rule: 'goes on when the indices of the rings wrap at 65536',
    cites: 'virtio 1.3 §2.7.6, §2.7.8',
    run: (context) => {
      const { ring } = context.running({ memory: layouts.single(32 * 2 ** 20) })
      const depth = 80
      let total = 0
      for (; total < 66_000; total += depth) ring.finishAll(ring.batch(depth))
      expectEqual('the used index', ring.split.usedIndex, total & 0xffff)
      return `${total} requests`
    },
  },
  {
    id: 'split-used-flags',
    group: 'split',
    level: 'MUST',
    rule: 'sets the flags of the used ring to 0 or 1; with EVENT_IDX to 0',
    cites: 'virtio 1.3 §2.7.10.2',
    run: (context) => {
      const seen: string[] = []
      for (const eventIdx of [false, true]) {
        if (eventIdx && !context.has(VIRTIO_F_EVENT_IDX)) continue
        const { ring } = context.running({ withoutFeatures: eventIdx ? [] : [VIRTIO_F_EVENT_IDX] })
        const values = new Set<number>()
        for (let i = 0; i < 200; i++) {
          const pending = ring.batch(4)
          values.add(ring.split.usedFlags)
          ring.finishAll(pending)
          values.add(ring.split.usedFlags)
        }
        const most = eventIdx ? 0 : 1
        for (const value of values) expect(value <= most, `at most ${most}`, `${value}`)
        seen.push(`${[...values].sort().join(' and ')} ${eventIdx ? 'with' : 'without'} EVENT_IDX`)
      }
      return seen.join(', ')
    },
  },
  {
    id: 'split-in-order',
    group: 'split',
    level: 'MUST',
    rule: 'uses buffers in the order in which they were made available when IN_ORDER is negotiated',
    cites: 'virtio 1.3 §2.7.9',
    needs: { features: [VIRTIO_F_IN_ORDER] },
    run: (context) => {
      // The driver checks the order of all that comes back.
      const { ring } = context.running({ inOrder: true })
      for (let i = 0; i < 200; i++) {
        ring.finishAll(
          ring.batch(1 + (i % 60), i % 2 === 1 && context.has(VIRTIO_F_INDIRECT_DESC) ? { indirect: true } : {})
        )
      }
      return 'about 6000 requests'
    },
  },
  ...[1, 2, 4, 8, 64, 128, 256, 1024, 32768].map(sizeCase),
]

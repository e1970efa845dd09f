/** Cases about the packed virtqueue: wraps, ids, chains, indirect tables, sizes, stopping and starting. */
import { VHOST_USER_PROTOCOL_F_REPLY_ACK } from '../../vhost-user/wire.ts'
import {
  VIRTIO_F_IN_ORDER,
  VIRTIO_F_INDIRECT_DESC,
  VIRTIO_F_RING_PACKED,
  VIRTQ_DESC_F_INDIRECT,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
  VIRTQ_DESC_SIZE,
} from '../../virtio/constants.ts'
import { layouts } from '../memory.ts'
import type { VirtqueueOptions } from '../virtqueue.ts'
import { sleepMs } from '../virtqueue.ts'
import { type ConformanceCase, expect, expectEqual } from './case.ts'
import type { Context, GuestOptions } from './context.ts'
import type { Guest, Ring } from './guest.ts'
import { chainLength, framings, placed } from './shapes.ts'
import { drainCases } from './vring-stops.ts'

const needs = { features: [VIRTIO_F_RING_PACKED] }
const indirectNeeds = { features: [VIRTIO_F_RING_PACKED, VIRTIO_F_INDIRECT_DESC] }

function running(
  context: Context,
  ring: VirtqueueOptions = {},
  options: GuestOptions = {}
): { guest: Guest; ring: Ring } {
  return context.running({ packed: true, ...options }, ring)
}

export const packedCases: readonly ConformanceCase[] = [
  {
    id: 'packed-requests',
    group: 'packed',
    level: 'MUST',
    rule: 'serves a packed ring, singly and full',
    cites: 'virtio 1.3 §2.8',
    needs,
    run: (context) => {
      const { ring } = running(context)
      ring.run(10)
      for (let i = 0; i < 20; i++) ring.finishAll(ring.batch(Math.floor(256 / chainLength(context.operation()))))
      return 'several times around'
    },
  },
  {
    id: 'packed-wrap',
    group: 'packed',
    level: 'MUST',
    rule: 'flips its wrap counter at the end of the ring, wherever in a chain that is',
    cites: 'virtio 1.3 §2.8.1, §2.8.6',
    needs,
    run: (context) => {
      const sizes = [4, 5, 6, 7, 8, 9]
      for (const size of sizes) {
        const { ring } = running(context, { size }, { memory: layouts.single(16 * 2 ** 20) })
        ring.run(size * 6, {}, `a request on a ring of ${size}`)
      }
      return `six times around rings of ${sizes.join(', ')}`
    },
  },
  {
    id: 'packed-size-any',
    group: 'packed',
    level: 'MUST',
    rule: 'serves rings whose size is no power of two',
    cites: 'virtio 1.3 §2.8.10.1 ("The Queue Size value does not have to be a power of 2")',
    needs,
    run: (context) => {
      const sizes = [100, 255, 257, 1000]
      for (const size of sizes) {
        const { ring } = running(context, { size })
        for (let i = 0; i < 6; i++) ring.finishAll(ring.batch(Math.floor(size / chainLength(context.operation()))))
      }
      return sizes.join(', ')
    },
  },
  {
    id: 'packed-framing',
    group: 'packed',
    level: 'MUST',
    rule: 'makes no assumptions about how a request is cut into descriptors of a packed ring',
    cites: 'virtio 1.3 §2.7.4.1, §2.8.5',
    needs,
    run: (context) => {
      const { ring } = running(context, { size: 200 })
      const shapes = framings(context)
      for (let round = 0; round < 8; round++)
        for (const [name, framing] of shapes) ring.run(1, framing, `a request with ${name}`)
      return `${shapes.length} framings`
    },
  },
  {
    id: 'packed-id-of-last',
    group: 'packed',
    level: 'MUST',
    rule: 'takes the buffer id from the last descriptor of a chain',
    cites: 'virtio 1.3 §2.8.6 ("Buffer ID is included in the last descriptor in the list")',
    needs,
    run: (context) => {
      const { guest, ring } = running(context)
      const request = placed(context, guest)
      for (let id = 20; id < 30; id++) {
        const pieces = request.pieces()
        request.reset()
        ring.packed.issueRaw(
          pieces.map(({ address, length, writable }, i) => ({
            address,
            length,
            // What stands in the others means nothing.
            id: i + 1 === pieces.length ? id : 0xffff,
            flags: (writable ? VIRTQ_DESC_F_WRITE : 0) | (i + 1 === pieces.length ? 0 : VIRTQ_DESC_F_NEXT),
          }))
        )
        const slot = ring.packed.usedSlot
        ring.packed.publishRaw()
        request.expectDone(ring, `a chain with id ${id}`)
        expectEqual('the id of the used descriptor', ring.packed.readDescriptor(slot).id, id)
      }
      return 'ids 20 … 29'
    },
  },
  {
    id: 'packed-used-write-flag',
    group: 'packed',
    level: 'SHOULD',
    rule: 'sets WRITE in a used descriptor when it says how much it wrote, so that a driver looks at the length',
    cites: 'virtio 1.3 §2.8.3, §2.8.4',
    needs: { ...needs, device: 'blk' },
    run: (context) => {
      const { ring } = running(context)
      const slot = ring.packed.usedSlot
      const pending = ring.submit()
      ring.finish(pending)
      const used = ring.packed.readDescriptor(slot)
      expect((used.flags & VIRTQ_DESC_F_WRITE) !== 0, 'the WRITE flag', `flags 0x${used.flags.toString(16)}`)
      expectEqual('the used length', used.length, pending.operation.writable)
      return `flags 0x${used.flags.toString(16)}, ${used.length} bytes`
    },
  },
  {
    id: 'packed-indirect',
    group: 'packed',
    level: 'MUST',
    rule: 'serves requests in indirect tables of a packed ring, in every framing',
    cites: 'virtio 1.3 §2.8.7',
    needs: indirectNeeds,
    run: (context) => {
      const { ring } = running(context)
      for (const [name, framing] of framings(context))
        ring.run(3, { ...framing, indirect: true }, `an indirect request with ${name}`)
      for (let i = 0; i < 5; i++) ring.finishAll(ring.batch(256, { indirect: true }))
      return 'singly, and as many as the ring has entries'
    },
  },
  {
    id: 'packed-indirect-mixed',
    group: 'packed',
    level: 'MUST',
    rule: 'serves indirect and direct requests mixed on one ring',
    cites: 'virtio 1.3 §2.8.5 ("mixing indirect and non-indirect descriptors in a ring is valid")',
    needs: indirectNeeds,
    run: (context) => {
      const { ring } = running(context, { size: 37 })
      for (let i = 0; i < 60; i++) {
        const pending = [ring.submit({}, false), ring.submit({ indirect: true }, false), ring.submit({}, false)]
        ring.requests.publish()
        ring.finishAll(pending)
      }
      return '180 requests'
    },
  },
  {
    id: 'packed-indirect-reserved',
    group: 'packed',
    level: 'MUST',
    rule: 'ignores ids and all flags but WRITE in an indirect table, and WRITE in the descriptor that refers to it',
    cites: 'virtio 1.3 §2.8.7 ("Others are reserved and are ignored by the device")',
    needs: indirectNeeds,
    run: (context) => {
      const { guest, ring } = running(context)
      const request = placed(context, guest)
      const pieces = request.pieces()
      const { bytes, gpa } = request.table
      const view = new DataView(bytes.buffer, bytes.byteOffset)
      for (const [i, { address, length, writable }] of pieces.entries()) {
        view.setBigUint64(16 * i, BigInt(address), true)
        view.setUint32(16 * i + 8, length, true)
        view.setUint16(16 * i + 12, 0x7777, true)
        // AVAIL, USED and NEXT mean nothing here.
        view.setUint16(16 * i + 14, 0x8081 | (writable ? VIRTQ_DESC_F_WRITE : 0), true)
      }
      const length = pieces.length * VIRTQ_DESC_SIZE
      ring.packed.issueRaw([{ address: gpa, length, id: 3, flags: VIRTQ_DESC_F_INDIRECT | VIRTQ_DESC_F_WRITE }])
      ring.packed.publishRaw()
      request.expectDone(ring, 'an indirect request with reserved bits set')
      return 'served'
    },
  },
  {
    id: 'packed-in-order',
    group: 'packed',
    level: 'MUST',
    rule: 'uses buffers of a packed ring in the order in which they were made available when IN_ORDER is negotiated',
    cites: 'virtio 1.3 §2.8.8',
    needs: { features: [VIRTIO_F_RING_PACKED, VIRTIO_F_IN_ORDER] },
    run: (context) => {
      const { ring } = running(context, { size: 150 }, { inOrder: true })
      for (let i = 0; i < 200; i++)
        ring.finishAll(ring.batch(1 + (i % Math.floor(150 / chainLength(context.operation())))))
      return 'about 5000 requests'
    },
  },
  {
    id: 'packed-stop-value',
    group: 'packed',
    level: 'MUST',
    rule: 'answers GET_VRING_BASE of a packed ring with both indices and both wrap counters',
    cites: 'vhost-user.rst "Vring descriptor indices for packed virtqueues", "VHOST_USER_GET_VRING_BASE"',
    needs,
    run: (context) => {
      const seen: string[] = []
      for (const count of [0, 1, 3, 7]) {
        const { ring } = running(context, { size: 8 })
        ring.run(count)
        const slots = count * chainLength(context.operation())
        const expected = (slots % 8) | (Math.floor(slots / 8) % 2 === 0 ? 0x8000 : 0)
        const base = ring.stop()
        expectEqual(`after ${count} requests: bits 0–15 of the base`, base & 0xffff, expected)
        expectEqual(`after ${count} requests: bits 16–31 of the base`, base >>> 16, expected)
        seen.push(`0x${base.toString(16)}`)
      }
      return seen.join(', ')
    },
  },
  {
    id: 'packed-stop-restart',
    group: 'packed',
    level: 'MUST',
    rule: 'goes on from SET_VRING_BASE with indices and wrap counters after a stop: each request completes once',
    cites: 'vhost-user.rst "VHOST_USER_SET_VRING_BASE" ("both indices are supplied")',
    needs,
    run: (context) => {
      const { ring } = running(context, { size: 50 })
      let count = 0
      for (let round = 0; round < 40; round++) {
        const pending = ring.batch(1 + (round % 15))
        count += pending.length
        if (round % 3 === 1) sleepMs(0.2)
        const base = ring.stop()
        sleepMs(round % 4 === 0 ? 5 : 0)
        ring.start(base)
        ring.queue.driver.kickRaw()
        ring.finishAll(pending, `a request of round ${round + 1}`)
      }
      return `${count} requests in 40 rounds`
    },
  },
  ...drainCases('packed', true),
  {
    id: 'packed-base-wrapped',
    group: 'packed',
    level: 'MUST',
    rule: 'starts at any index with any wrap counters',
    cites: 'vhost-user.rst "Vring descriptor indices for packed virtqueues"',
    needs,
    run: (context) => {
      const bases = [0x0000_0000, 0x8005_8005, 0x0007_0007, 0x800f_800f]
      for (const base of bases) {
        const { ring } = running(context, { size: 16, base })
        ring.run(40, {}, `a request from base 0x${base.toString(16)}`)
      }
      return bases.map((base) => `0x${base.toString(16)}`).join(', ')
    },
  },
  {
    id: 'packed-num-huge',
    group: 'packed',
    level: 'SHOULD',
    rule: 'refuses a packed ring of more than 32768 entries',
    cites: 'virtio 1.3 §2.8',
    needs: { ...needs, protocol: [VHOST_USER_PROTOCOL_F_REPLY_ACK] },
    run: (context) => {
      const { connection } = context.guest({ packed: true })
      return context.expectRefusal(connection, 'SET_VRING_NUM 65535', () =>
        connection.setVringNum(context.ringIndex, 65535)
      )
    },
  },
]

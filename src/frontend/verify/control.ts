/** Cases about the control plane while requests are under way: stopping, resuming, memory changes, disconnects. */

import { VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS, VHOST_USER_PROTOCOL_F_RESET_DEVICE } from '../../vhost-user/wire.ts'
import {
  VIRTIO_BLK_F_FLUSH,
  VIRTIO_BLK_S_OK,
  VIRTIO_BLK_T_FLUSH,
  VIRTIO_BLK_T_IN,
  VIRTIO_BLK_T_OUT,
} from '../../virtio/blk.ts'
import type { BlkDriver, BlkRequest } from '../blk.ts'
import { layouts } from '../memory.ts'
import { wireRegion } from '../session.ts'
import { SplitDriver } from '../split-driver.ts'
import { sleepMs, type Virtqueue } from '../virtqueue.ts'
import type { VerifyCase, VerifyContext } from './case.ts'
import { eventually, must, mustEqual, mustStatus, need } from './case.ts'

const NOTHING = new Uint8Array(0)
const MIB = 2 ** 20

/** Puts `count` reads of up to 64 KiB into the ring. */
function submitReads(context: VerifyContext, blk: BlkDriver, count: number): BlkRequest[] {
  const bytes = Math.min(65536, context.facts.area.bytes)
  const requests = Array.from({ length: count }, () =>
    blk.submit(VIRTIO_BLK_T_IN, context.sector(), NOTHING, bytes, {}, false)
  )
  blk.publish()
  return requests
}

/**
 * What the device had taken and not given back when it stopped at `base`: chains, or descriptors of a packed ring. Only
 * on a split ring it shrinks when completions come late.
 */
function leftAt(queue: Virtqueue, base: number): number {
  if (queue.driver instanceof SplitDriver) return (base - queue.driver.usedIndex) & 0xffff
  return distance(queue, base >>> 16, base & 0xffff)
}

/** What it had not taken: chains of a split ring, descriptors of a packed one. */
function untakenAt(queue: Virtqueue, base: number): number {
  if (queue.driver instanceof SplitDriver) return (queue.driver.availableIndex - base) & 0xffff
  const { availableSlot, availableWrap } = queue.packed
  return distance(queue, base & 0xffff, availableSlot | (availableWrap << 15))
}

/** From one place of a packed ring to the next; bit 15 is the wrap counter. */
function distance({ size }: Virtqueue, from: number, to: number): number {
  return (to & 0x7fff) - (from & 0x7fff) + ((from ^ to) >> 15 === 0 ? 0 : size)
}

export const controlCases: readonly VerifyCase[] = [
  {
    name: 'stop/drains',
    title: 'when GET_VRING_BASE is answered, every request that was taken has been completed',
    spec: 'vhost-user.rst "VHOST_USER_GET_VRING_BASE", "Ring states"',
    run: (context) => {
      const { blk, session } = context.open({ queueSize: 256, arena: 20 * MIB })
      const queue = session.queue(0)
      let left = 0
      const bytes = Math.min(4 * 65536, context.facts.area.bytes)
      for (let round = 0; round < 24; round++) {
        const requests = Array.from({ length: 64 }, () =>
          blk.submit(VIRTIO_BLK_T_IN, context.sector(), NOTHING, bytes, {}, false)
        )
        blk.publish()
        // The answer must hold at any moment: before the first completion, between them, after the last.
        const until = performance.now() + round * 0.1
        while (performance.now() < until);
        const base = queue.stop()
        left += leftAt(queue, base)
        must(untakenAt(queue, base) <= 3 * 64, `the base ${base} is not where requests are`)
        // Completions that come late are waited for, so that the next round starts clean.
        sleepMs(left > 0 ? 20 : 0)
        queue.start(base)
        queue.driver.kickRaw()
        blk.wait()
        for (const request of requests) mustStatus(request, [VIRTIO_BLK_S_OK], 'read')
      }
      must(left === 0, `${left} requests of 24 rounds were still in flight at the answer`)
    },
  },
  {
    name: 'stop/drains-writes',
    title: 'the same for writes and flushes, which take longer',
    spec: 'vhost-user.rst "VHOST_USER_GET_VRING_BASE", "Ring states"',
    writes: true,
    run: (context) => {
      need(context.has(VIRTIO_BLK_F_FLUSH), 'FLUSH is not offered')
      const { blk, session } = context.open({ queueSize: 256, arena: 8 * MIB })
      const queue = session.queue(0)
      const data = context.random(300).bytes(Math.min(65536, context.facts.area.bytes))
      let left = 0
      for (let round = 0; round < 12; round++) {
        const requests: BlkRequest[] = []
        for (let i = 0; i < 24; i++) {
          const offset = (i % Math.max(1, context.facts.area.bytes / data.length)) * data.length
          requests.push(blk.submit(VIRTIO_BLK_T_OUT, context.sector(offset), data, 0, {}, false))
          requests.push(blk.submit(VIRTIO_BLK_T_FLUSH, 0, NOTHING, 0, {}, false))
        }
        blk.publish()
        const until = performance.now() + round * 0.2
        while (performance.now() < until);
        const base = queue.stop()
        left += leftAt(queue, base)
        eventually(() => leftAt(queue, base) === 0, 1000)
        queue.start(base)
        queue.driver.kickRaw()
        blk.wait()
        for (const request of requests) mustStatus(request, [VIRTIO_BLK_S_OK], 'write or flush')
      }
      must(left === 0, `${left} requests of 12 rounds were still in flight at the answer`)
    },
  },
  {
    name: 'stop/silent',
    title: 'a stopped ring is left alone: nothing is written to it and no call comes',
    spec: 'vhost-user.rst "Ring states"',
    run: (context) => {
      const { blk, session } = context.open()
      const queue = session.queue(0)
      blk.read(context.sector(), context.facts.blockSize)
      const base = queue.stop()
      const request = blk.submit(VIRTIO_BLK_T_IN, context.sector(), NOTHING, context.facts.blockSize)
      queue.driver.kickRaw()
      queue.takeCalls()
      sleepMs(50)
      must(!queue.driver.hasUsed(), 'a request was processed on a stopped ring')
      must(queue.takeCalls() === 0, 'a call came from a stopped ring')
      queue.start(base)
      queue.driver.kickRaw()
      blk.wait(request)
      mustStatus(request, [VIRTIO_BLK_S_OK], 'the request, after the ring was started again')
    },
  },
  {
    name: 'stop/resume',
    title: 'stopped and resumed from the base again and again, with requests waiting: each completes once',
    spec: 'vhost-user.rst "VHOST_USER_SET_VRING_BASE"',
    run: (context) => {
      const { blk, session } = context.open({ mode: 'irq' })
      const queue = session.queue(0)
      for (let round = 0; round < 40; round++) {
        const requests = submitReads(context, blk, 1 + (round % 40))
        if (round % 3 === 1) sleepMs(0.2)
        const base = queue.stop()
        sleepMs(round % 4 === 0 ? 5 : 0)
        eventually(() => leftAt(queue, base) === 0, 200)
        queue.start(base)
        queue.driver.kickRaw()
        blk.wait()
        for (const request of requests) mustStatus(request, [VIRTIO_BLK_S_OK], `read in round ${round + 1}`)
        must(!queue.driver.hasUsed(), 'more completions than requests')
      }
    },
  },
  {
    name: 'memory/set-mem-table-again',
    title: 'SET_MEM_TABLE with the same memory while requests are in flight',
    spec: 'vhost-user.rst "VHOST_USER_SET_MEM_TABLE"',
    run: (context) => {
      const { blk, session } = context.open({ withoutProtocolFeatures: [VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS] })
      const expected = blk.read(context.sector(), 4096)
      for (let round = 0; round < 20; round++) {
        const requests = submitReads(context, blk, 16)
        session.shareMemory()
        session.connection.barrier()
        blk.wait()
        for (const request of requests) mustStatus(request, [VIRTIO_BLK_S_OK], `read in round ${round + 1}`)
        mustEqual(requests[0]?.data.subarray(0, 4096) ?? NOTHING, expected, `read in round ${round + 1}`)
      }
    },
  },
  {
    name: 'memory/add-remove',
    title: 'ADD_MEM_REG and REM_MEM_REG while requests are in flight elsewhere',
    spec: 'vhost-user.rst "VHOST_USER_ADD_MEM_REG", "VHOST_USER_REM_MEM_REG"',
    run: (context) => {
      need(context.hasProtocol(VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS), 'CONFIGURE_MEM_SLOTS is not offered')
      const { blk, session } = context.open()
      const expected = blk.read(context.sector(), 4096)
      const extra = context.memory(
        layouts.many(MIB, 8).map((region) => ({ ...region, gpa: region.gpa + 2 ** 40, uva: region.uva + 2 ** 38 }))
      )
      for (let round = 0; round < 24; round++) {
        const region = extra.region(round % 8)
        session.connection.addMemRegion(wireRegion(region))
        const requests = submitReads(context, blk, 16)
        // One request into the new region, through a view of this case: the driver knows only its own memory.
        region.bytes.fill(0, 0, 4096)
        const probe = readInto(context, blk, region.gpa)
        blk.wait()
        for (const request of [...requests, probe]) mustStatus(request, [VIRTIO_BLK_S_OK], `read in round ${round + 1}`)
        mustEqual(region.bytes.subarray(0, 4096), expected, 'data read into the new region')
        submitReads(context, blk, 16)
        session.connection.removeMemRegion(wireRegion(region))
        session.connection.barrier()
        blk.wait()
      }
    },
  },
  {
    name: 'session/reconnect',
    title: 'a front-end that leaves is followed by the next one, 30 times',
    spec: 'vhost-user.rst "Reconnection"',
    run: (context) => {
      for (let i = 0; i < 30; i++) {
        const { blk, session } = context.open({ queues: 1 + (i % Math.min(2, context.facts.maxQueues)) })
        blk.read(context.sector(), context.facts.blockSize)
        session.close(i % 2 === 1)
      }
    },
  },
  {
    name: 'session/disconnect-in-flight',
    title: 'a front-end that hangs up with requests in flight does no harm to the next one',
    spec: 'vhost-user.rst "Reconnection"',
    run: (context) => {
      for (let i = 0; i < 15; i++) {
        const { blk, session } = context.open()
        submitReads(context, blk, 40)
        if (i % 3 === 0) sleepMs(0.1)
        session.close(true)
      }
      context.mustWork(context.open().blk, 'the next session')
    },
  },
  {
    name: 'session/disconnect-mid-message',
    title: 'a front-end that hangs up in the middle of a message does no harm to the next one',
    spec: 'vhost-user.rst "Header"',
    run: (context) => {
      for (const length of [1, 4, 11, 12, 15]) {
        const { session } = context.open()
        const bytes = new Uint8Array(20)
        new DataView(bytes.buffer).setUint32(0, 2, true)
        new DataView(bytes.buffer).setUint32(4, 1, true)
        new DataView(bytes.buffer).setUint32(8, 8, true)
        session.connection.send(bytes.subarray(0, length))
        session.close(true)
      }
      context.mustWork(context.open().blk, 'the next session')
    },
  },
  {
    name: 'session/reset-device',
    title: 'after RESET_DEVICE the rings can be set up again in the same session',
    spec: 'vhost-user.rst "VHOST_USER_RESET_DEVICE"',
    run: (context) => {
      need(context.hasProtocol(VHOST_USER_PROTOCOL_F_RESET_DEVICE), 'RESET_DEVICE is not offered')
      const { blk, session } = context.open()
      context.mustWork(blk, 'before')
      const queue = session.queue(0)
      for (let round = 0; round < 3; round++) {
        session.connection.resetDevice()
        session.connection.setFeatures(session.features)
        queue.start(queue.driver.base)
        context.mustWork(blk, `after reset ${round + 1}`)
      }
    },
  },
]

/** A read of 4096 bytes into guest-physical memory that the driver's memory object doesn't cover. */
function readInto(context: VerifyContext, blk: BlkDriver, gpa: number): BlkRequest {
  return blk.submitForeign(VIRTIO_BLK_T_IN, context.sector(), [{ address: gpa, length: 4096, writable: true }])
}

/** Sessions that end badly, and devices that share a process with one that is treated badly. */
import { ftruncateSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { FrontendError } from '../../src/frontend/errors.ts'
import { layouts } from '../../src/frontend/memory.ts'
import { sleepMs } from '../../src/frontend/virtqueue.ts'
import { native } from '../../src/native.ts'
import * as wire from '../../src/vhost-user/wire.ts'
import { VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT } from '../../src/virtio/blk.ts'
import {
  backendForFile,
  driverOf,
  eventually,
  MIB,
  mustServe,
  type Opened,
  open,
  pattern,
  wellBehaved,
} from './backend.ts'
import { hangsUp, message, NOTHING, negotiated, outcomeOf } from './messages.ts'
import { OddFds } from './odd-fds.ts'
import { REQUEST_ROWS } from './request-rows.ts'

describe('one device', () => {
  const current = backendForFile()

  test('RESET_DEVICE with requests in flight: nothing is written after its answer, and it can be started again', () => {
    using opened = open(current().socket, { memory: layouts.single(24 * MIB), queues: 2 })
    const { session } = opened
    const { connection } = session
    for (let round = 0; round < 10; round++) {
      const drivers = session.queues.map(({ index }) => driverOf(session, index, 8 * MIB))
      for (const blk of drivers) {
        for (let i = 0; i < 40; i++) blk.submit(VIRTIO_BLK_T_IN, 0, NOTHING, 128 * 1024, {}, false)
        blk.publish()
      }
      connection.resetDevice()
      const used = session.queues.map(({ split }) => split.usedIndex)
      for (const { memory } of [session]) memory.region(0).bytes.fill(0x77, 4 * MIB, 12 * MIB)
      for (const queue of session.queues) queue.driver.kickRaw()
      sleepMs(5)
      expect(session.queues.map(({ split }) => split.usedIndex)).toEqual(used)
      expect(
        session.memory
          .region(0)
          .bytes.subarray(4 * MIB, 12 * MIB)
          .every((byte) => byte === 0x77)
      ).toBe(true)
      connection.setFeatures(session.features)
      for (const queue of session.queues.splice(0)) queue.close()
      session.memory.reset([0])
      for (const index of [0, 1]) session.startQueue(index)
      for (const index of [0, 1]) mustServe(driverOf(session, index), 64 * index)
      session.memory.reset([2 * MIB])
    }
  })

  test('GET_VRING_BASE drains: nothing comes after its answer', () => {
    using opened = open(current().socket, { memory: layouts.single(24 * MIB) })
    const blk = driverOf(opened.session, 0, 16 * MIB)
    const queue = opened.session.queue(0)
    for (let round = 0; round < 15; round++) {
      const requests = Array.from({ length: 64 }, () => blk.submit(VIRTIO_BLK_T_IN, 0, NOTHING, 128 * 1024, {}, false))
      blk.publish()
      const base = queue.stop()
      expect(queue.split.usedIndex).toBe(base)
      queue.start(base)
      queue.driver.kickRaw()
      blk.wait()
      expect(requests.every(({ status }) => status === 0)).toBe(true)
    }
  })

  test('fifty front-ends that die while they write and flush; the next one finds a disk that works', () => {
    for (let i = 0; i < 50; i++) {
      const opened = open(current().socket, {
        queues: 2,
        mode: i % 3 === 0 ? 'irq' : 'poll',
        memory: layouts.single(6 * MIB),
      })
      for (const blk of opened.drivers) {
        for (let k = 0; k < 8; k++) {
          blk.submit(VIRTIO_BLK_T_OUT, 64 * k, pattern(32768), 0, {}, false)
          blk.submit(VIRTIO_BLK_T_FLUSH, 0, NOTHING, 0, {}, false)
        }
        blk.publish()
      }
      if (i % 5 === 0) sleepMs(1)
      opened.session.close(true)
    }
    wellBehaved(current().socket)
  })

  test('a front-end that hangs up the moment after each request', () => {
    using fds = new OddFds()
    for (const row of REQUEST_ROWS) {
      const opened = open(current().socket, { memory: layouts.single(4 * MIB) })
      opened.blk.submit(VIRTIO_BLK_T_IN, 0, NOTHING, 65536)
      const given = Array.from({ length: row.fds[0] }, () =>
        fds.get(row.request === wire.VHOST_USER_ADD_MEM_REG ? 'memfd' : 'eventfd')
      )
      opened.session.connection.send(message(row.request, row.payload), given)
      opened.session.close(true)
    }
  })

  test('many wait in the backlog, some of them leave before their turn', () => {
    const first = negotiated(current().socket)
    const sockets = Array.from({ length: 20 }, () => native.connectUnix(current().socket))
    for (const [i, fd] of sockets.entries()) if (i % 2 === 0) native.close(fd)
    first.close()
    for (const [i, fd] of sockets.entries()) if (i % 2 === 1) native.close(fd)
    wellBehaved(current().socket)
  })
})

describe('four devices of one process', () => {
  const current = backendForFile({ devices: 4, extra: ['iothreads: 2'] })
  const socket = (index: number): string => current().sockets[index]!

  /** Runs `misbehave` while the three other devices serve; each of them must serve before, between and after. */
  function besides(misbehave: (round: number) => void, rounds: number): void {
    const others: Opened[] = [1, 2, 3].map((i) => open(socket(i), { queues: 2, mode: i === 3 ? 'poll' : 'irq' }))
    try {
      for (let round = 0; round < rounds; round++) {
        const requests = others.map(({ blk }) => blk.submit(VIRTIO_BLK_T_IN, 0, NOTHING, 65536))
        misbehave(round)
        for (const [i, { blk, drivers }] of others.entries()) {
          blk.wait()
          expect(requests[i]!.status).toBe(0)
          for (const [queue, driver] of drivers.entries()) mustServe(driver, 64 * queue)
        }
      }
    } finally {
      for (const { session } of others) session.close()
    }
  }

  test('memory truncated under running rings ends that session only', () => {
    besides((round) => {
      const opened = open(socket(0), { queues: 2 })
      const { session } = opened
      mustServe(opened.blk)
      const requests = 4 * (round % 3)
      for (let i = 0; i < requests; i++) opened.blk.submit(VIRTIO_BLK_T_IN, 0, NOTHING, 65536, {}, false)
      opened.blk.publish()
      ftruncateSync(session.memory.region(0).fd, round % 2 === 0 ? 0 : 4096)
      for (const queue of session.queues) native.eventfdWrite(queue.kickFd, 1)
      expect(hangsUp(session.connection)).toBe(true)
      session.close(true)
    }, 6)
  })

  test('data memory truncated under requests: the session may end, the rest goes on', () => {
    besides(() => {
      const opened = open(socket(0), { memory: layouts.many(2 * MIB, 2) })
      const { session, blk } = opened
      ftruncateSync(session.memory.region(1).fd, 0)
      try {
        for (let i = 0; i < 4; i++)
          blk.submit(VIRTIO_BLK_T_IN, 0, NOTHING, 4096, {
            place: (_, writable, n) => (writable && n === 0 ? session.memory.region(1).gpa : undefined),
          })
        eventually(() => blk.outstanding === 0 || session.connection.channel.hungUp() || blk.poll() < 0, 200)
      } catch (error) {
        expect(error).toBeInstanceOf(FrontendError)
      }
      session.close(true)
    }, 3)
  })

  test('bad messages of every kind', () => {
    using fds = new OddFds()
    const fd = fds.get('memfd')
    besides((round) => {
      for (const row of REQUEST_ROWS) {
        using connection = negotiated(socket(0))
        const payload = new Uint8Array(row.payload.length + (round % 3)).fill(round % 2 === 0 ? 0xff : 0)
        const given = new Array<number>(round % 4).fill(fd)
        connection.send(
          message(row.request, payload, { flags: wire.VHOST_USER_VERSION | (round % 2 === 0 ? 8 : 0) }),
          given
        )
        // Whatever it answers, if it answers: it is done with the message then, or after a while.
        connection.channel.readable(10)
      }
    }, 6)
  })

  test('broken rings', () => {
    besides((round) => {
      const opened = open(socket(0), { queues: 2 })
      const { session } = opened
      for (const queue of session.queues) {
        queue.split.issueRaw(round * 10_000)
        queue.split.publishRaw(queue.split.availableIndex + 3000 * round)
      }
      // In round 0 it is a valid head with an empty descriptor: used or broken, as the device likes.
      for (const queue of session.queues) if (round > 0) expect(eventually(() => queue.broken())).toBe(true)
      session.connection.barrier()
      session.close()
    }, 5)
  })

  test('a front-end that does not read', () => {
    besides(() => {
      using connection = negotiated(socket(0))
      const many = Buffer.concat(Array.from({ length: 300 }, () => message(wire.VHOST_USER_GET_FEATURES)))
      const result = outcomeOf(() => {
        for (let i = 0; i < 200; i++) connection.send(many)
      })
      expect(result).toBe('closed')
    }, 2)
  })
})

/**
 * Kick, call and err eventfds that a front-end uses in ways of its own: the iothread and the other rings on it
 * go on.
 */
import { writeSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { layouts } from '../../src/frontend/memory.ts'
import type { Session } from '../../src/frontend/session.ts'
import { sleepMs, Virtqueue } from '../../src/frontend/virtqueue.ts'
import { native } from '../../src/native.ts'
import { VIRTIO_F_EVENT_IDX } from '../../src/virtio/constants.ts'
import { backendForFile, driverOf, eventually, type Kind, MIB, mustServe, open, wellBehaved } from './backend.ts'
import { outcomeOf } from './messages.ts'

const FULL = Buffer.from('feffffffffffffff', 'hex')

describe.each(['virtiod', 'emulated'] as Kind[])('%s', (kind) => {
  const current = backendForFile({ kind })

  /** A session on two rings that asks for a call after every request of ring 0, and does not take them. */
  function deafSession(blocking: boolean): ReturnType<typeof open> {
    const opened = open(current().socket, { queues: 2, mode: 'irq', withoutFeatures: [VIRTIO_F_EVENT_IDX] })
    const [queue] = opened.session.queues
    queue!.mode = 'poll'
    queue!.driver.enableCalls()
    queue!.takeCalls()
    writeSync(queue!.callFd, FULL)
    if (blocking) native.setNonblock(queue!.callFd, false)
    return opened
  }

  describe.each([
    ['a full call counter', false],
    ['a full call counter that blocks again', true],
  ])('%s', (_, blocking) => {
    test('both rings go on', () => {
      const { session, drivers } = deafSession(blocking)
      try {
        for (let i = 0; i < 20; i++) {
          mustServe(drivers[0]!)
          mustServe(drivers[1]!, 64)
        }
      } finally {
        native.setNonblock(session.queue(0).callFd, true)
        session.queue(0).takeCalls()
        session.close()
      }
    })

    test('the ring can be stopped, and the daemon serves the next front-end', () => {
      const { session, drivers } = deafSession(blocking)
      mustServe(drivers[0]!)
      const { connection } = session
      connection.channel.timeoutMs = 1000
      const stopped = outcomeOf(() => {
        try {
          session.queue(0).stop()
        } catch (error) {
          if ((error as { failure?: string }).failure !== 'timeout') throw error
          return 'closed'
        }
        return 'ok'
      })
      session.close(true)
      expect(stopped).toBe('ok')
    })

    test('a new call fd can be set', () => {
      const { session, drivers } = deafSession(blocking)
      mustServe(drivers[0]!)
      session.connection.channel.timeoutMs = 1000
      const fd = native.eventfd(0)
      try {
        session.connection.setVringCall(0, fd)
        mustServe(drivers[0]!)
        expect(native.pollIn(fd, 1000)).toBe(1)
      } finally {
        native.close(fd)
        session.close(true)
      }
    })

    test('a front-end that leaves like this does not keep the next one out', () => {
      const { session, drivers } = deafSession(blocking)
      mustServe(drivers[0]!)
      session.close(true)
      wellBehaved(current().socket)
    })
  })

  test('a full err counter, and a ring that breaks', () => {
    using opened = open(current().socket, { queues: 2 })
    const { session, drivers } = opened
    const queue = session.queue(0)
    writeSync(queue.errFd, FULL)
    native.setNonblock(queue.errFd, false)
    mustServe(drivers[0]!)
    queue.split.issueRaw(40_000)
    queue.split.publishRaw(queue.split.availableIndex)
    sleepMs(20)
    mustServe(drivers[1]!, 64)
    session.connection.barrier()
    native.setNonblock(queue.errFd, true)
  })

  test('no kick fd: the ring is polled', () => {
    using opened = open(current().socket, { queues: 0 })
    const { session } = opened
    const queue = startWithout(session, { kick: true })
    const blk = driverOf(session)
    for (let i = 0; i < 10; i++) {
      mustServe(blk)
      sleepMs(1)
    }
    // Given one after all, it is listened to; taken away, it is polled again.
    session.connection.setVringKick(0, queue.kickFd)
    mustServe(blk)
    session.connection.setVringKick(0, undefined)
    mustServe(blk)
    session.connection.setVringEnable(0, false)
    session.connection.barrier()
    session.connection.setVringEnable(0, true)
    mustServe(blk)
  })

  test('no call fd: the driver polls', () => {
    using opened = open(current().socket, { queues: 0 })
    startWithout(opened.session, { call: true })
    const blk = driverOf(opened.session)
    mustServe(blk)
    opened.session.queue(0).driver.enableCalls()
    mustServe(blk)
    opened.session.connection.setVringCall(0, opened.session.queue(0).callFd)
    mustServe(blk)
    opened.session.connection.setVringCall(0, undefined)
    mustServe(blk)
  })

  test('a kick counter that is full before the ring starts', () => {
    using opened = open(current().socket, { queues: 0 })
    const { session } = opened
    const queue = new Virtqueue(session.connection, session.memory, 0, true, { mode: 'irq' })
    session.queues.push(queue)
    writeSync(queue.kickFd, FULL)
    queue.start(0)
    const blk = driverOf(session)
    const requests = Array.from({ length: 4 }, () => blk.submit(0, 0, new Uint8Array(0), 512, {}, false))
    native.eventfdRead(queue.kickFd)
    blk.publish()
    blk.wait()
    expect(requests.map(({ status }) => status)).toEqual([0, 0, 0, 0])
  })

  test('one call fd for two rings', () => {
    using opened = open(current().socket, { queues: 1, mode: 'irq' })
    const { session } = opened
    session.startQueue(1, { mode: 'irq', callFd: session.queue(0).callFd })
    mustServe(opened.blk)
    mustServe(driverOf(session, 1), 64)
    expect(session.queue(0).calls + session.queue(1).calls).toBeGreaterThan(0)
  })

  test('one eventfd as kick, call and err at once', () => {
    const opened = open(current().socket, { queues: 0 })
    const { session } = opened
    const fd = native.eventfd(0)
    const queue = new Virtqueue(session.connection, session.memory, 0, true, { mode: 'poll' })
    session.queues.push(queue)
    queue.start(0)
    session.connection.setVringKick(0, fd)
    session.connection.setVringCall(0, fd)
    session.connection.setVringErr(0, fd)
    queue.driver.enableCalls()
    const blk = driverOf(session)
    blk.submit(0, 0, new Uint8Array(0), 512)
    native.eventfdWrite(fd, 1)
    expect(eventually(() => blk.poll() === 1)).toBe(true)
    session.close()
    native.close(fd)
  })

  test('kicks without end and without a request', () => {
    using opened = open(current().socket, { queues: 2, memory: layouts.single(8 * MIB) })
    for (let i = 0; i < 20_000; i++) opened.session.queue(0).driver.kickRaw()
    for (const blk of opened.drivers) mustServe(blk)
  })
})

/** Starts ring 0 with the "no fd" flag for kick or call. */
function startWithout(session: Session, without: { kick?: true; call?: true }): Virtqueue {
  const { connection, memory } = session
  const queue = new Virtqueue(connection, memory, 0, session.has(VIRTIO_F_EVENT_IDX), { mode: 'poll' })
  session.queues.push(queue)
  const [descriptor, available, used] = queue.ring.map(({ gpa }) => memory.uva(gpa))
  connection.setVringNum(0, queue.size)
  connection.setVringBase(0, 0)
  connection.setVringAddr({ index: 0, flags: 0, log: 0n, descriptor: descriptor!, available: available!, used: used! })
  connection.setVringErr(0, undefined)
  connection.setVringCall(0, without.call === true ? undefined : queue.callFd)
  connection.setVringKick(0, without.kick === true ? undefined : queue.kickFd)
  connection.setVringEnable(0, true)
  return queue
}

/** SET_VRING_*, features and ring states: what is refused, and that the ring and the session do not suffer from it. */
import { describe, expect, test } from 'vitest'
import { type Connection, payload64, vringState } from '../../src/frontend/connection.ts'
import { layouts } from '../../src/frontend/memory.ts'
import type { Session } from '../../src/frontend/session.ts'
import { Virtqueue } from '../../src/frontend/virtqueue.ts'
import * as wire from '../../src/vhost-user/wire.ts'
import { VIRTIO_F_EVENT_IDX } from '../../src/virtio/constants.ts'
import { backendForFile, driverOf, eventually, MIB, mustServe, open } from './backend.ts'
import { bothWays, NOTHING, negotiated, outcome, outcomeOf, withMemfd } from './messages.ts'
import { type OddFd, OddFds } from './odd-fds.ts'
import { address, REGION, REQUEST_ROWS, single } from './request-rows.ts'

const current = backendForFile()
const REFUSED = ['nack', 'closed']

/** Region 0 of every guest here begins there; rings are put into it by hand. */
const UVA = REGION.userAddress

/** A connection with one region of 1 MiB at {@link UVA}. */
function withMemory(use: (connection: Connection) => void): void {
  withMemfd(MIB, (fd) => {
    using connection = negotiated(current().socket)
    connection.addMemRegion({ ...REGION, fd })
    use(connection)
  })
}

describe('features', () => {
  test('bits that were not offered', () => {
    const offered = open(current().socket, { queues: 0 })
    const { offeredFeatures, offeredProtocolFeatures } = offered.session
    offered.session.close()
    for (let bit = 0n; bit < 64n; bit++) {
      if ((offeredFeatures & (1n << bit)) === 0n) {
        const payload = payload64(offeredFeatures | (1n << bit))
        expect(bothWays(current().socket, wire.VHOST_USER_SET_FEATURES, payload), `feature ${bit}`).toEqual(REFUSED)
      }
      if ((offeredProtocolFeatures & (1n << bit)) === 0n) {
        const payload = payload64(offeredProtocolFeatures | (1n << bit))
        const result = bothWays(current().socket, wire.VHOST_USER_SET_PROTOCOL_FEATURES, payload)
        expect(result, `protocol feature ${bit}`).toEqual(REFUSED)
      }
    }
  })

  test.each(
    REQUEST_ROWS.flatMap((row) => (row.feature === undefined ? [] : [[wire.requestName(row.request), row] as const]))
  )('%s without its protocol feature', (_, row) => {
    using fds = new OddFds()
    const given = Array.from({ length: row.fds[0] }, () => fds.get('memfd'))
    for (const needReply of [true, false]) {
      using connection = negotiated(current().socket, { withoutProtocolFeatures: [row.feature!] })
      const refused = needReply && row.replies !== true ? 'nack' : 'closed'
      expect(outcome(connection, row.request, row.payload, given, needReply)).toBe(refused)
    }
  })

  test('other features while a ring is started are refused, the same ones again change nothing', () => {
    using opened = open(current().socket, { mode: 'irq' })
    const { connection, features } = opened.session
    for (let i = 0; i < 5; i++) {
      mustServe(opened.blk)
      connection.setFeatures(features)
      const other = features & ~(1n << BigInt(VIRTIO_F_EVENT_IDX))
      expect(outcomeOf(() => connection.setFeatures(other))).toBe('nack')
      mustServe(opened.blk)
    }
  })
})

describe('queue index', () => {
  const requests = [
    ['SET_VRING_NUM', wire.VHOST_USER_SET_VRING_NUM, (index: number) => vringState(index, 256)],
    ['SET_VRING_BASE', wire.VHOST_USER_SET_VRING_BASE, (index: number) => vringState(index, 0)],
    ['SET_VRING_ADDR', wire.VHOST_USER_SET_VRING_ADDR, (index: number) => address({ index })],
    ['SET_VRING_ENABLE', wire.VHOST_USER_SET_VRING_ENABLE, (index: number) => vringState(index, 1)],
    ['GET_VRING_BASE', wire.VHOST_USER_GET_VRING_BASE, (index: number) => vringState(index, 0)],
  ] as const
  test.each(requests)('%s', (name, request, payload) => {
    for (const index of [2, 3, 255, 256, 0x8000_0000, 0xffff_ffff]) {
      const refused = name === 'GET_VRING_BASE' ? ['closed', 'closed'] : REFUSED
      expect(bothWays(current().socket, request, payload(index)), `index ${index}`).toEqual(refused)
    }
  })

  const eventfds = { SET_VRING_KICK: 12, SET_VRING_CALL: 13, SET_VRING_ERR: 14 }
  test.each(Object.entries(eventfds))('%s', (_, request) => {
    using fds = new OddFds()
    const fd = fds.get('eventfd')
    for (const value of [2n, 255n, 0x200n, 0x1_0000n, 0x8000_0000n, 1n << 32n, (1n << 64n) - 1n]) {
      expect(bothWays(current().socket, request, payload64(value), [fd]), `payload ${value}`).toEqual(REFUSED)
    }
    for (const value of [0x102n, 0x1ffn, 0x300n]) {
      expect(bothWays(current().socket, request, payload64(value)), `payload ${value}`).toEqual(REFUSED)
    }
  })
})

describe('fds of the wrong kind', () => {
  const kinds: OddFd[] = [
    'pipe',
    'socket',
    'listening socket',
    'O_PATH',
    '/dev/null',
    'regular file',
    'directory',
    'memfd',
  ]
  test.each(kinds)('%s as kick, call and err', (kind) => {
    using fds = new OddFds()
    const fd = fds.get(kind)
    for (const request of [12, 13, 14]) {
      expect(bothWays(current().socket, request, payload64(0n), [fd]), wire.requestName(request)).toEqual(REFUSED)
    }
  })

  test.each([
    'pipe',
    'O_PATH',
    '/dev/null',
    'regular file',
    'directory',
    'memfd',
    'eventfd',
    'listening socket',
  ] as OddFd[])('%s as the back-end channel', (kind) => {
    using fds = new OddFds()
    const result = bothWays(current().socket, wire.VHOST_USER_SET_BACKEND_REQ_FD, NOTHING, [fds.get(kind)])
    expect(result).toEqual(REFUSED)
  })

  test('replaced again and again, each fd is closed', () => {
    using fds = new OddFds()
    using connection = negotiated(current().socket)
    connection.setVringKick(0, fds.get('eventfd'))
    connection.setVringCall(0, fds.get('eventfd'))
    connection.setVringErr(0, fds.get('eventfd'))
    connection.setBackendRequestFd()
    const before = current().fds.length
    for (let i = 0; i < 30; i++) {
      connection.setVringKick(0, fds.get('eventfd'))
      connection.setVringCall(0, fds.get('eventfd'))
      connection.setVringErr(0, fds.get('eventfd'))
      connection.setBackendRequestFd()
      expect(outcomeOf(() => connection.setVringCall(0, fds.get('memfd')))).toBe('nack')
    }
    // A message and its fds go right after its answer.
    expect(eventually(() => current().fds.length === before)).toBe(true)
  })
})

describe('ring size', () => {
  test.each([0, 3, 5, 100, 32767, 32769, 65535, 65536, 0x8000_0000, 0xffff_ffff])('%i is refused', (size) => {
    expect(bothWays(current().socket, wire.VHOST_USER_SET_VRING_NUM, vringState(0, size))).toEqual(REFUSED)
  })

  test.each([1, 2, 4, 1024, 32768])('%i serves', (queueSize) => {
    using opened = open(current().socket, { queueSize, mode: 'irq' })
    const indirect = queueSize < 4
    for (let i = 0; i < 3; i++) {
      opened.blk.write(16, new Uint8Array(512).fill(i), { indirect })
      expect(opened.blk.read(16, 512, { indirect })).toEqual(new Uint8Array(512).fill(i))
    }
  })
})

describe('ring addresses', () => {
  const good = { descriptor: UVA, available: UVA + 0x2000n, used: UVA + 0x4000n }
  const end = UVA + BigInt(MIB)
  const rows: Record<string, Partial<wire.VringAddress>> = {
    'descriptor table not aligned to 16': { descriptor: UVA + 8n },
    'avail ring not aligned to 2': { available: UVA + 0x2001n },
    'used ring not aligned to 4': { used: UVA + 0x4002n },
    'descriptor table outside': { descriptor: 0x1000n },
    'avail ring outside': { available: end },
    'used ring below the region': { used: UVA - 4096n },
    'descriptor table reaches beyond the end': { descriptor: end - 4080n },
    'avail ring reaches beyond the end': { available: end - 16n },
    'used ring reaches beyond the end': { used: end - 2048n },
    'user address 2^53': { descriptor: 2n ** 53n },
    'user address near 2^64': { used: 2n ** 64n - 16n },
    'user address 2^63': { available: 2n ** 63n },
    'a guest address instead of a user address': { descriptor: REGION.guestAddress },
    'all zero': { descriptor: 0n, available: 0n, used: 0n },
    'a log address beyond 2^53': { flags: 1, log: 2n ** 53n + 1n },
    'flags that nobody defined, low': { flags: 2 },
    'flags that nobody defined': { flags: 0x8000_0000 },
  }
  test.each(Object.entries(rows))('%s', (_, change) => {
    const payload = address({ ...good, ...change })
    for (const needReply of [true, false]) {
      withMemory((connection) => {
        connection.setVringNum(0, 256)
        expect(outcome(connection, wire.VHOST_USER_SET_VRING_ADDR, payload, [], needReply)).toBe(
          needReply ? 'nack' : 'closed'
        )
      })
    }
  })

  test.each(Object.entries(rows))('%s, told before the size: no kick starts it, no kick fd is lost', (_, change) => {
    using fds = new OddFds()
    withMemory((connection) => {
      outcomeOf(() => connection.setVringAddr({ index: 0, log: 0n, flags: 0, ...good, ...change }))
      connection.setVringKick(0, fds.get('eventfd'))
      outcomeOf(() => connection.setVringNum(0, 256))
      for (let i = 0; i < 3; i++) outcomeOf(() => connection.setVringKick(0, fds.get('eventfd')))
      connection.barrier()
    })
  })

  test('straddling two regions that touch in every space', () => {
    withMemfd(2 * MIB, (fd) => {
      using connection = negotiated(current().socket)
      connection.addMemRegion({ ...REGION, fd })
      const next = { guestAddress: REGION.guestAddress + REGION.size, userAddress: UVA + REGION.size }
      connection.addMemRegion({ ...REGION, ...next, mmapOffset: REGION.size, fd })
      connection.setVringNum(0, 256)
      for (const part of ['descriptor', 'available', 'used']) {
        const payload = address({ ...good, [part]: end - 256n })
        expect(outcome(connection, wire.VHOST_USER_SET_VRING_ADDR, payload)).toBe('nack')
      }
    })
  })

  test('before any memory', () => {
    using connection = negotiated(current().socket)
    connection.setVringNum(0, 256)
    expect(outcome(connection, wire.VHOST_USER_SET_VRING_ADDR, address(good))).toBe('nack')
  })

  test('a bad address for a ring that runs: it runs on where it was', () => {
    using opened = open(current().socket)
    for (const change of Object.values(rows)) {
      const payload = address({ ...good, ...change })
      expect(outcome(opened.session.connection, wire.VHOST_USER_SET_VRING_ADDR, payload)).toBe('nack')
    }
    mustServe(opened.blk)
  })

  test('no region with enough room for a ring of 32768', () => {
    withMemory((connection) => {
      connection.setVringNum(0, 32768)
      const payload = address({ ...good, descriptor: end - 4096n })
      expect(outcome(connection, wire.VHOST_USER_SET_VRING_ADDR, payload)).toBe('nack')
    })
  })
})

describe('ring states', () => {
  test('SET_VRING_ENABLE with another value than 0 and 1', () => {
    for (const value of [2, 0xff, 0x100, 0xffff_ffff]) {
      expect(bothWays(current().socket, wire.VHOST_USER_SET_VRING_ENABLE, vringState(0, value))).toEqual(REFUSED)
    }
  })

  test('size and base of a started ring cannot change', () => {
    using opened = open(current().socket)
    const { connection } = opened.session
    mustServe(opened.blk)
    expect(outcomeOf(() => connection.setVringNum(0, 128))).toBe('nack')
    expect(outcomeOf(() => connection.setVringBase(0, 7))).toBe('nack')
    mustServe(opened.blk)
  })

  test('a base beyond the index', () => {
    expect(bothWays(current().socket, wire.VHOST_USER_SET_VRING_BASE, vringState(0, 65536))).toEqual(REFUSED)
    expect(bothWays(current().socket, wire.VHOST_USER_SET_VRING_BASE, vringState(0, 0xffff_ffff))).toEqual(REFUSED)
  })

  test('every order of NUM, ADDR, KICK, CALL and ENABLE starts the ring', () => {
    using opened = open(current().socket, { queues: 0, memory: layouts.single(24 * MIB) })
    const { session } = opened
    let stopped = 0
    for (const order of permutations(['num', 'addr', 'kick', 'call', 'enable'] as const)) {
      const queue = new Virtqueue(session.connection, session.memory, 0, true, { size: 16, mode: 'irq' })
      session.queues[0] = queue
      session.connection.setVringBase(0, 0)
      for (const step of order) take(session, queue, step)
      driverOf(session, 0, 16384).write(0, new Uint8Array(512))
      expect(queue.stop(), order.join(' ')).toBe(1)
      queue.close()
      // Its size and addresses stay known: the next order shall not rest on them.
      session.connection.resetDevice()
      session.connection.setFeatures(session.features)
      stopped++
    }
    session.queues.length = 0
    expect(stopped).toBe(120)
  })

  test('GET_VRING_BASE, again and again, and of a ring that was kicked but never complete', () => {
    using fds = new OddFds()
    using connection = negotiated(current().socket)
    connection.setVringBase(1, 4711)
    connection.setVringKick(1, fds.get('eventfd'))
    for (let i = 0; i < 3; i++) expect(connection.getVringBase(1)).toBe(4711)
  })

  test('RESET_DEVICE forgets what was said about rings and gives their fds back', () => {
    using opened = open(current().socket, { queues: 2 })
    const { connection } = opened.session
    for (const blk of opened.drivers) mustServe(blk)
    const before = current().fds.length
    connection.resetDevice()
    expect(eventually(() => before - current().fds.length === 6)).toBe(true)
    expect(connection.getVringBase(0)).toBe(0)
    connection.resetDevice()
    // Without features nothing starts.
    opened.session.queue(0).start(0)
    opened.session.queue(0).driver.kickRaw()
    connection.setFeatures(opened.session.features)
    connection.resetDevice()
  })

  test('memory is given while a ring waits for it', () => {
    withMemfd(MIB, (fd) => {
      using connection = negotiated(current().socket)
      connection.setVringNum(0, 256)
      expect(outcome(connection, wire.VHOST_USER_ADD_MEM_REG, single(REGION), [fd])).toBe('ok')
      connection.setVringAddr({
        index: 0,
        flags: 0,
        log: 0n,
        descriptor: UVA,
        available: UVA + 0x2000n,
        used: UVA + 0x4000n,
      })
    })
  })
})

function take(session: Session, queue: Virtqueue, step: 'num' | 'addr' | 'kick' | 'call' | 'enable'): void {
  const { connection, memory } = session
  const { index } = queue
  const [descriptor, available, used] = queue.ring.map(({ gpa }) => memory.uva(gpa))
  if (step === 'num') connection.setVringNum(index, queue.size)
  if (step === 'addr') {
    connection.setVringAddr({ index, flags: 0, log: 0n, descriptor: descriptor!, available: available!, used: used! })
  }
  if (step === 'kick') connection.setVringKick(index, queue.kickFd)
  if (step === 'call') connection.setVringCall(index, queue.callFd)
  if (step === 'enable') connection.setVringEnable(index, true)
}

function permutations<T>(items: readonly T[]): T[][] {
  if (items.length === 0) return [[]]
  return items.flatMap((item, i) => permutations(items.toSpliced(i, 1)).map((rest) => [item, ...rest]))
}

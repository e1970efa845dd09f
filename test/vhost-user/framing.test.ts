/** Frames that are broken: headers, sizes, fd counts, ends in the middle. Each leaves the daemon as it was. */
import { describe, expect, test } from 'vitest'
import { Connection } from '../../src/frontend/connection.ts'
import { sleepMs } from '../../src/frontend/virtqueue.ts'
import { REQUESTS } from '../../src/vhost-user/requests.ts'
import * as wire from '../../src/vhost-user/wire.ts'
import { backendForFile, eventually, mustServe, open } from './backend.ts'
import { bothWays, hangsUp, message, NOTHING, negotiated, type Outcome, outcome, outcomeOf } from './messages.ts'
import { OddFds } from './odd-fds.ts'
import { REQUEST_ROWS, type RequestRow } from './request-rows.ts'

const { VHOST_USER_GET_FEATURES, VHOST_USER_NEED_REPLY_MASK, VHOST_USER_SET_FEATURES, VHOST_USER_VERSION } = wire
const current = backendForFile()

const name = ({ request }: RequestRow): string => wire.requestName(request)
/** What a refusal is: a NACK when a reply was asked for and the request has none of its own, else the end. */
const refusals = (row: RequestRow): Outcome[] => (row.replies === true ? ['closed', 'closed'] : ['nack', 'closed'])

test('the rows of these tests are the requests that it serves', () => {
  const served = Object.keys(REQUESTS).map(Number)
  expect(REQUEST_ROWS.map(({ request }) => request).sort((a, b) => a - b)).toEqual(served.sort((a, b) => a - b))
})

describe('headers', () => {
  test.each([0, 2, 3])('protocol version %i', (version) => {
    using connection = negotiated(current().socket)
    connection.send(message(VHOST_USER_GET_FEATURES, NOTHING, { flags: version | VHOST_USER_NEED_REPLY_MASK }))
    expect(hangsUp(connection)).toBe(true)
  })

  test('a request with the reply flag', () => {
    using connection = negotiated(current().socket)
    connection.send(message(VHOST_USER_GET_FEATURES, NOTHING, { flags: VHOST_USER_VERSION | 4 }))
    expect(hangsUp(connection)).toBe(true)
  })

  test.each([4097, 65536, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff])('a payload of %i bytes', (size) => {
    using connection = negotiated(current().socket)
    connection.send(message(VHOST_USER_SET_FEATURES, new Uint8Array(8), { size }))
    expect(hangsUp(connection)).toBe(true)
    expect(eventually(() => current().extraFds <= 0)).toBe(true)
  })

  test('flags that nobody defined are ignored', () => {
    using connection = negotiated(current().socket)
    connection.send(message(VHOST_USER_GET_FEATURES, NOTHING, { flags: VHOST_USER_VERSION | 0xffff_fff0 }))
    expect(connection.channel.receive('GET_FEATURES').payload.length).toBe(8)
    connection.barrier()
  })

  test('NEED_REPLY on a request with a reply of its own brings one reply', () => {
    using connection = negotiated(current().socket)
    const flags = VHOST_USER_VERSION | VHOST_USER_NEED_REPLY_MASK
    connection.send(message(VHOST_USER_GET_FEATURES, NOTHING, { flags }))
    expect(connection.channel.receive('GET_FEATURES').payload.length).toBe(8)
    expect(connection.channel.readable(50)).toBe(false)
  })

  test('NEED_REPLY is ignored while REPLY_ACK is not negotiated', () => {
    using connection = negotiated(current().socket, {
      withoutProtocolFeatures: [wire.VHOST_USER_PROTOCOL_F_REPLY_ACK],
    })
    const flags = VHOST_USER_VERSION | VHOST_USER_NEED_REPLY_MASK
    connection.send(message(wire.VHOST_USER_SET_OWNER, NOTHING, { flags }))
    expect(connection.channel.readable(50)).toBe(false)
    connection.barrier()
  })
})

describe('ends', () => {
  const whole = message(VHOST_USER_SET_FEATURES, new Uint8Array(8))
  test.each([1, 4, 11, 12, 13, 19])('after %i of 20 bytes', (count) => {
    for (const connect of [() => Connection.connect(current().socket), () => negotiated(current().socket)]) {
      const connection = connect()
      connection.send(whole.subarray(0, count))
      connection.close()
    }
  })

  test('after a header with fds', () => {
    using fds = new OddFds()
    for (const count of [12, 14]) {
      using connection = negotiated(current().socket)
      connection.send(message(wire.VHOST_USER_ADD_MEM_REG, new Uint8Array(40)).subarray(0, count), [fds.get('memfd')])
      sleepMs(5)
    }
  })

  test('without a byte', () => {
    for (let i = 0; i < 20; i++) Connection.connect(current().socket).close()
  })

  test('a request whose reply nobody waits for', () => {
    for (let i = 0; i < 20; i++) {
      const connection = Connection.connect(current().socket)
      connection.send(message(VHOST_USER_GET_FEATURES))
      connection.close()
    }
  })

  test('a front-end that asks and asks and reads no answer', () => {
    using connection = negotiated(current().socket)
    const many = Buffer.concat(Array.from({ length: 300 }, () => message(VHOST_USER_GET_FEATURES)))
    const result = outcomeOf(() => {
      for (let i = 0; i < 200; i++) connection.send(many)
    })
    expect(result).toBe('closed')
  })
})

describe('framing', () => {
  test('a session whose every message arrives byte by byte', () => {
    const bytewise = Connection.connect(current().socket, { timeoutMs: 3000 })
    const whole = bytewise.channel.sendBytes.bind(bytewise.channel)
    bytewise.channel.sendBytes = (bytes, fds = [], what = '') => {
      for (let i = 0; i < bytes.length; i++) whole(bytes.subarray(i, i + 1), i === 0 ? fds : [], what)
    }
    using opened = open(bytewise)
    mustServe(opened.blk)
  })

  test('bytes with a pause in between', () => {
    using connection = negotiated(current().socket)
    const bytes = message(VHOST_USER_GET_FEATURES)
    for (const cut of [
      [0, 5],
      [5, 11],
      [11, 12],
    ] as const) {
      connection.send(bytes.subarray(...cut))
      sleepMs(5)
    }
    expect(connection.channel.receive('GET_FEATURES').payload.length).toBe(8)
  })

  test('many messages in one piece are answered in order', () => {
    using connection = negotiated(current().socket)
    const requests = [VHOST_USER_GET_FEATURES, wire.VHOST_USER_GET_QUEUE_NUM, wire.VHOST_USER_GET_PROTOCOL_FEATURES]
    const many = Array.from({ length: 30 }, (_, i) => requests[i % 3]!)
    connection.send(Buffer.concat(many.map((request) => message(request))))
    expect(many.map(() => connection.channel.receive('one of many').request)).toEqual(many)
  })

  test('fds that come with the payload are taken or refused, not lost', () => {
    using fds = new OddFds()
    using connection = negotiated(current().socket)
    const flags = VHOST_USER_VERSION | VHOST_USER_NEED_REPLY_MASK
    const bytes = message(wire.VHOST_USER_SET_VRING_KICK, new Uint8Array(8), { flags })
    const result = outcomeOf(() => {
      connection.send(bytes.subarray(0, 12))
      connection.send(bytes.subarray(12), [fds.get('eventfd')])
      connection.channel.receive('SET_VRING_KICK')
      connection.barrier()
    })
    expect(['ok', 'nack', 'closed']).toContain(result)
  })

  test('fds with the payload of a request that takes none', () => {
    using fds = new OddFds()
    for (const count of [1, 8, 65, 253]) {
      using connection = negotiated(current().socket)
      const bytes = message(VHOST_USER_SET_FEATURES, new Uint8Array(8))
      const given = Array.from({ length: count }, () => fds.get('eventfd'))
      const result = outcomeOf(() => {
        connection.send(bytes.subarray(0, 12))
        connection.send(bytes.subarray(12), given)
        connection.barrier()
      })
      expect(result).toBe('closed')
    }
  })

  test('fds with every byte: a message does not gather more than it may carry', () => {
    using fds = new OddFds()
    using connection = negotiated(current().socket)
    const fd = fds.get('eventfd')
    const before = current().fds.length
    let most = 0
    const result = outcomeOf(() => {
      const bytes = message(wire.VHOST_USER_SET_FEATURES, new Uint8Array(4096))
      for (let i = 0; i < 60; i++) {
        connection.send(bytes.subarray(i, i + 1), new Array<number>(60).fill(fd))
        if (i % 10 !== 9) continue
        sleepMs(5)
        most = Math.max(most, current().fds.length - before)
      }
      connection.send(bytes.subarray(60))
      connection.barrier()
    })
    expect(result).toBe('closed')
    // One recvmsg may bring 253; beyond that a front-end must not fill up the table of the process, which others need.
    expect(most).toBeLessThanOrEqual(256)
  })
})

describe('unknown requests', () => {
  const known = new Set(REQUEST_ROWS.map(({ request }) => request))
  const unknown = Array.from({ length: 46 }, (_, request) => request).filter((request) => !known.has(request))
  test.each([...unknown, 255, 0x7fff_ffff, 0xffff_ffff])('request %i', (request) => {
    expect(bothWays(current().socket, request, NOTHING)).toEqual(['nack', 'closed'])
    expect(bothWays(current().socket, request, new Uint8Array(8))).toEqual(['nack', 'closed'])
  })

  test('with fds', () => {
    using fds = new OddFds()
    const given = Array.from({ length: 8 }, () => fds.get('memfd'))
    expect(bothWays(current().socket, 1000, new Uint8Array(40), given)).toEqual(['nack', 'closed'])
  })
})

describe('payload size', () => {
  test.each(REQUEST_ROWS.map((row) => [name(row), row] as const))('%s', (_, row) => {
    using fds = new OddFds()
    const [least, most] = row.size
    const given = Array.from({ length: row.fds[0] }, () => fds.get('eventfd'))
    const sizes = [...(least > 0 ? [0, least - 1] : []), most + 1, most + 8, 4096]
    for (const size of sizes) {
      const payload = new Uint8Array(size)
      payload.set(row.payload.subarray(0, size))
      expect(bothWays(current().socket, row.request, payload, given), `${size} bytes`).toEqual(refusals(row))
    }
  })
})

describe('file descriptors', () => {
  test.each(REQUEST_ROWS.map((row) => [name(row), row] as const))('%s with too many', (_, row) => {
    using fds = new OddFds()
    const fd = fds.get('eventfd')
    const [, most] = row.fds
    for (const count of [most + 1, most + 2, 8, 9, 32, 64]) {
      const given = new Array<number>(count).fill(fd)
      expect(bothWays(current().socket, row.request, row.payload, given), `${count} fds`).toEqual(refusals(row))
    }
    for (const count of [65, 253]) {
      const given = new Array<number>(count).fill(fd)
      const results = bothWays(current().socket, row.request, row.payload, given)
      // So many that the end of the connection is as good an answer as a NACK.
      expect(['nack', 'closed']).toContain(results[0])
      expect(results[1]).toBe('closed')
    }
  })

  test.each(REQUEST_ROWS.filter((row) => row.fds[0] > 0).map((row) => [name(row), row] as const))(
    '%s without its own',
    (_, row) => {
      expect(bothWays(current().socket, row.request, row.payload)).toEqual(refusals(row))
    }
  )

  test('more than 253, in several control messages', () => {
    using fds = new OddFds()
    const fd = fds.get('memfd')
    for (const count of [254, 300, 506]) {
      using connection = negotiated(current().socket)
      const bytes = message(wire.VHOST_USER_ADD_MEM_REG, new Uint8Array(40))
      const result = outcomeOf(() => {
        connection.send(bytes.subarray(0, 1), new Array<number>(253).fill(fd))
        connection.send(bytes.subarray(1), new Array<number>(Math.min(253, count - 253)).fill(fd))
        connection.barrier()
      })
      expect(result).toBe('closed')
    }
  })

  test.each([wire.VHOST_USER_SET_VRING_KICK, wire.VHOST_USER_SET_VRING_CALL, wire.VHOST_USER_SET_VRING_ERR])(
    'request %i with an fd although it says that there is none',
    (request) => {
      using fds = new OddFds()
      const payload = new Uint8Array([0, 1, 0, 0, 0, 0, 0, 0])
      expect(bothWays(current().socket, request, payload, [fds.get('eventfd')])).toEqual(['nack', 'closed'])
    }
  )
})

test('a hundred bad front-ends, one after the other', () => {
  using fds = new OddFds()
  const fd = fds.get('memfd')
  for (let i = 0; i < 100; i++) {
    using connection = negotiated(current().socket)
    outcome(connection, 1 + (i % 45), new Uint8Array((i * 37) % 300), new Array<number>(i % 9).fill(fd), i % 2 === 0)
  }
})

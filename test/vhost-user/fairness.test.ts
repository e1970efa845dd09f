/** A front-end that floods, freezes or sends half of what it says: others go on, and it costs next to nothing. */
import { setTimeout } from 'node:timers/promises'
import { beforeAll, expect, test } from 'vitest'
import { native } from '../../src/native.ts'
import * as wire from '../../src/vhost-user/wire.ts'
import { Bench, encode, openFds, warmUp } from './harness.ts'

const NOTHING = new Uint8Array(0)

beforeAll(warmUp)

test('messages without end on one session: the other one is served between them, and so are timers', async () => {
  await using flooding = await Bench.open()
  await using calm = await Bench.open()
  const flood = Buffer.concat(Array.from({ length: 4000 }, () => encode(wire.VHOST_USER_SET_OWNER, NOTHING)))
  // As much as the socket takes: it is there before anybody looks.
  let queued = 0
  for (let sent = 1; sent > 0; queued += Math.max(sent, 0)) {
    sent = native.sendMessage(flooding.peer.fd, flood, 0, flood.length, new Int32Array(0), 0, false)
  }
  expect(queued / wire.HEADER_SIZE).toBeGreaterThan(1000)
  await flooding.peer.send(wire.VHOST_USER_GET_QUEUE_NUM, NOTHING).catch(() => {})
  let floodEnded = false
  const last = flooding.peer.receive().then(() => {
    floodEnded = true
  })
  await calm.peer.send(wire.VHOST_USER_GET_QUEUE_NUM, NOTHING)
  expect((await calm.peer.receive())?.request).toBe(wire.VHOST_USER_GET_QUEUE_NUM)
  expect(floodEnded).toBe(false)
  await last
})

test('a front-end that asks and reads no answer is hung up on', async () => {
  await using bench = await Bench.open()
  const many = Buffer.concat(Array.from({ length: 500 }, () => encode(wire.VHOST_USER_GET_FEATURES, NOTHING)))
  await expect(
    (async () => {
      for (;;) await bench.peer.write(many)
    })()
  ).rejects.toThrow('sendmsg')
  expect(await bench.ended).toMatchObject({ code: 'ERR_PROTOCOL_PEER' })
})

test('half a message for ever holds its fds and nothing else, and goes when the session is ended', async () => {
  const start = openFds()
  {
    await using bench = await Bench.open()
    const fd = bench.memfd(4096)
    await bench.peer.write(encode(wire.VHOST_USER_ADD_MEM_REG, new Uint8Array(40)).subarray(0, 30), [fd])
    await setTimeout(10)
    bench.session.connection.abort()
    expect(await bench.ended).toBeUndefined()
  }
  expect(openFds()).toBe(start)
})

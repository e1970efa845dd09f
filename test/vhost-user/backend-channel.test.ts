/** INBAND_NOTIFICATIONS and the back-end channel: what is said on it, when, and to front-ends that misbehave there. */
import { setTimeout } from 'node:timers/promises'
import { beforeAll, describe, expect, test } from 'vitest'
import * as wire from '../../src/vhost-user/wire.ts'
import { featureSet } from '../../src/virtio/features.ts'
import { Bench, encode, openFds, type Peer, until, warmUp } from './harness.ts'

const {
  VHOST_USER_BACKEND_CONFIG_CHANGE_MSG: CONFIG_CHANGE,
  VHOST_USER_BACKEND_VRING_CALL: CALL,
  VHOST_USER_BACKEND_VRING_ERR: ERR,
} = wire
const NO_FD = BigInt(wire.VHOST_USER_VRING_NOFD_MASK)
const SET_KICK = wire.VHOST_USER_SET_VRING_KICK
const SET_CALL = wire.VHOST_USER_SET_VRING_CALL

const vringKick = (bench: Bench, index = 0, num = 0) =>
  bench.command(wire.VHOST_USER_VRING_KICK, wire.vringState(index, num))

function answer(channel: Peer, request: number, value = 0n): Promise<void> {
  return channel.write(encode(request, wire.u64(value), wire.VHOST_USER_REPLY_MASK))
}

async function withRing(withoutProtocol: readonly number[] = []): Promise<{ bench: Bench; channel: Peer }> {
  const bench = await Bench.open({ withoutProtocol })
  const channel = await bench.openChannel()
  await bench.addMemory()
  await bench.prepareRing()
  return { bench, channel }
}

beforeAll(warmUp)

describe('INBAND_NOTIFICATIONS', () => {
  test.each([
    ['BACKEND_REQ', wire.VHOST_USER_PROTOCOL_F_BACKEND_REQ],
    ['REPLY_ACK', wire.VHOST_USER_PROTOCOL_F_REPLY_ACK],
  ])('without %s closes the connection, NEED_REPLY or not', async (_, bit) => {
    for (const negotiatedBefore of [false, true]) {
      await using bench = await Bench.open({ bare: true })
      const offered = bench.session.offeredProtocolFeatures
      if (negotiatedBefore) await bench.negotiateProtocol(offered)
      const payload = wire.u64(offered & ~featureSet(bit))
      expect(await bench.command(wire.VHOST_USER_SET_PROTOCOL_FEATURES, payload)).toBe('closed')
      expect(await bench.ended).toMatchObject({ code: 'ERR_PROTOCOL_FEATURES' })
    }
  })

  test('VRING_KICK starts a ring, which polls nothing, and then kicks it', async () => {
    const { bench } = await withRing()
    await using _ = bench
    bench.host.taken()
    expect(await vringKick(bench)).toBe('ok')
    expect(bench.host.started.get(0)).toMatchObject({ kickFd: -1, callFd: -1, inband: true })
    expect(await vringKick(bench)).toBe('ok')
    expect(bench.host.taken()).toEqual(['start 0', 'kick 0'])
    await bench.getBase()
    expect(await vringKick(bench)).toBe('ok')
    expect(bench.host.taken()).toEqual(['stop 0', 'start 0'])
  })

  test('VRING_KICK of a queue that is not there, and with a num', async () => {
    const { bench } = await withRing()
    await using _ = bench
    expect(await vringKick(bench, 2)).toBe('nack')
    expect(await vringKick(bench, 0, 1)).toBe('nack')
    expect(bench.host.started.size).toBe(0)
  })

  test('polling is had when it is asked for', async () => {
    const { bench } = await withRing()
    await using _ = bench
    expect(await bench.command(SET_CALL, wire.u64(NO_FD))).toBe('ok')
    expect(await bench.command(SET_KICK, wire.u64(NO_FD))).toBe('ok')
    expect(bench.host.started.get(0)).toMatchObject({ kickFd: -1, inband: false })
    // A kick fd is listened to, and in its place messages again.
    bench.host.taken()
    expect(await bench.kick()).toBe('ok')
    expect(bench.host.taken()).toEqual(['stop 0', 'start 0'])
    expect(bench.host.started.get(0)?.inband).toBe(true)
  })

  test('a call without a call fd is a message; the next one follows when it was answered', async () => {
    const { bench, channel } = await withRing()
    await using _ = bench
    await vringKick(bench)
    for (let i = 0; i < 10; i++) bench.session.ringCalls(0)
    const call = (await channel.receive())!
    expect([call.request, call.flags]).toEqual([CALL, wire.VHOST_USER_VERSION | wire.VHOST_USER_NEED_REPLY_MASK])
    expect(call.payload).toEqual(wire.vringState(0, 0))
    expect(await channel.silent()).toBe(true)
    await answer(channel, CALL)
    expect((await channel.receive())?.request).toBe(CALL)
    await answer(channel, CALL)
    expect(await channel.silent()).toBe(true)
    expect(bench.refused).toEqual([])
  })

  test('rings do not wait for each other', async () => {
    const { bench, channel } = await withRing()
    await using _ = bench
    await bench.prepareRing(1)
    await vringKick(bench, 0)
    await vringKick(bench, 1)
    bench.session.ringCalls(0)
    bench.session.ringCalls(0)
    bench.session.ringCalls(1)
    expect((await channel.receive())?.payload).toEqual(wire.vringState(0, 0))
    expect((await channel.receive())?.payload).toEqual(wire.vringState(1, 0))
  })

  test('nothing is said of a ring that is stopped, or that wants no calls', async () => {
    const { bench, channel } = await withRing()
    await using _ = bench
    bench.session.ringCalls(0)
    bench.session.ringBroke(0)
    await bench.kick()
    await bench.command(SET_CALL, wire.u64(NO_FD))
    bench.session.ringCalls(0)
    await bench.getBase()
    bench.session.ringCalls(0)
    bench.session.ringCalls(7)
    bench.session.ringBroke(7)
    expect(await channel.silent()).toBe(true)
  })

  test('an error is a message unless there is an err fd, or none is wanted', async () => {
    const { bench, channel } = await withRing()
    await using _ = bench
    await vringKick(bench)
    bench.session.ringBroke(0)
    const error = (await channel.receive())!
    expect([error.request, error.payload]).toEqual([ERR, wire.vringState(0, 0)])
    await answer(channel, ERR)
    const SET_ERR = wire.VHOST_USER_SET_VRING_ERR
    expect(await bench.command(SET_ERR, wire.u64(0n), [bench.eventfd()])).toBe('ok')
    bench.session.ringBroke(0)
    expect(await bench.command(SET_ERR, wire.u64(NO_FD))).toBe('ok')
    bench.session.ringBroke(0)
    expect(await channel.silent()).toBe(true)
  })

  test('without the bit nothing of it happens', async () => {
    const { bench, channel } = await withRing([wire.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS])
    await using _ = bench
    await bench.kick()
    expect(bench.host.started.get(0)?.inband).toBe(false)
    bench.session.ringCalls(0)
    bench.session.ringBroke(0)
    expect(await channel.silent()).toBe(true)
    expect(await vringKick(bench)).toBe('nack')
  })
})

describe('a change of the config space', () => {
  test('is told when a ring runs, and while none does, when one starts', async () => {
    const { bench, channel } = await withRing()
    await using _ = bench
    expect(bench.session.configChanged()).toBe(true)
    expect(bench.session.configChanged()).toBe(true)
    expect(await channel.silent()).toBe(true)
    await bench.kick()
    const message = (await channel.receive())!
    expect([message.request, message.flags, message.payload.length]).toEqual([CONFIG_CHANGE, 1, 0])
    bench.session.configChanged()
    expect((await channel.receive())?.request).toBe(CONFIG_CHANGE)
    expect(await channel.silent()).toBe(true)
  })

  test('cannot be told without a channel, or without CONFIG', async () => {
    await using none = await Bench.open()
    expect(none.session.configChanged()).toBe(false)
    const { bench, channel } = await withRing([wire.VHOST_USER_PROTOCOL_F_CONFIG])
    await using _ = bench
    await bench.kick()
    expect(bench.session.configChanged()).toBe(false)
    expect(await channel.silent()).toBe(true)
  })
})

describe('SET_CONFIG', () => {
  function config(offset: number, size: number, flags: number): Uint8Array {
    const payload = new Uint8Array(12 + size)
    const view = new DataView(payload.buffer)
    view.setUint32(0, offset, true)
    view.setUint32(4, size, true)
    view.setUint32(8, flags, true)
    return payload
  }
  test.each([
    ['the guest', 4, 0, 'ok', 'writeConfig 4 2 false'],
    ['the guest in what it cannot write', 0, 0, 'nack', 'writeConfig 0 2 false'],
    ['a migration', 0, 1, 'ok', 'writeConfig 0 2 true'],
    ['nobody knows whom', 4, 2, 'nack', undefined],
    ['both', 4, 3, 'nack', undefined],
  ] as const)('by %s', async (_, offset, flags, result, told) => {
    await using bench = await Bench.open()
    expect(await bench.command(wire.VHOST_USER_SET_CONFIG, config(offset, 2, flags))).toBe(result)
    expect(bench.host.taken()).toEqual(told === undefined ? [] : [told])
  })
})

describe('a front-end that misbehaves on the channel', () => {
  test('does not read: nothing is kept but the last of each kind, and all is well when it reads again', async () => {
    const { bench, channel } = await withRing()
    await using _ = bench
    await bench.kick()
    for (let i = 0; i < 5000; i++) {
      bench.session.iotlbMiss(0, i * 4096, 1)
      bench.session.configChanged()
    }
    const saved = bench.session.channel.save()
    expect(saved.waiting.length).toBeLessThanOrEqual(2)
    expect(await bench.command(wire.VHOST_USER_SET_OWNER)).toBe('ok')
    let last = 0n
    for (let seen = 0; last !== 4999n * 4096n; seen++) {
      const message = (await channel.receive())!
      if (message.request === wire.VHOST_USER_BACKEND_IOTLB_MSG)
        last = wire.readIotlb(new DataView(message.payload.buffer), 0).iova
      expect(seen).toBeLessThan(9000)
    }
  })

  test.each([
    ['a reply that nobody asked for', encode(CALL, wire.u64(0n), wire.VHOST_USER_REPLY_MASK)],
    ['a request', encode(wire.VHOST_USER_GET_FEATURES, new Uint8Array(8))],
    ['a reply of another size', encode(ERR, new Uint8Array(12), wire.VHOST_USER_REPLY_MASK)],
  ])('%s: the channel is closed, the session goes on', async (_, bytes) => {
    const { bench, channel } = await withRing()
    await using _b = bench
    await vringKick(bench)
    bench.session.ringBroke(0)
    await channel.receive()
    await channel.write(bytes)
    expect(await channel.receive()).toBeUndefined()
    expect(bench.refused.map(({ code }) => code)).toEqual(['ERR_PROTOCOL_HEADER'])
    expect(bench.session.configChanged()).toBe(false)
    expect(await bench.command(wire.VHOST_USER_SET_OWNER)).toBe('ok')
    const next = await bench.openChannel()
    bench.session.configChanged()
    expect((await next.receive())?.request).toBe(CONFIG_CHANGE)
    channel.close()
  })

  test('refuses: that is written down', async () => {
    const { bench, channel } = await withRing()
    await using _ = bench
    await vringKick(bench)
    bench.session.ringCalls(0)
    await channel.receive()
    await answer(channel, CALL, 1n)
    await until(() => bench.refused.length > 0)
    expect(bench.refused[0]?.code).toBe('ERR_PROTOCOL_PEER')
    bench.session.ringCalls(0)
    expect((await channel.receive())?.request).toBe(CALL)
  })

  test('sends fds with replies, and replies byte by byte: the fds are closed', async () => {
    const { bench, channel } = await withRing()
    await using _ = bench
    await vringKick(bench)
    const fd = bench.eventfd()
    const before = openFds()
    bench.session.ringCalls(0)
    await channel.receive()
    for (const byte of encode(CALL, wire.u64(0n), wire.VHOST_USER_REPLY_MASK)) {
      await channel.write(Uint8Array.of(byte), [fd, fd, fd])
      await setTimeout(1)
    }
    bench.session.ringCalls(0)
    expect((await channel.receive())?.request).toBe(CALL)
    await until(() => openFds() === before)
    expect(bench.refused).toEqual([])
  })

  test('closes its end: what there is to say waits for another channel', async () => {
    const { bench, channel } = await withRing()
    await using _ = bench
    await vringKick(bench)
    const before = openFds()
    channel.close()
    await until(() => openFds() === before - 2)
    bench.session.ringCalls(0)
    const next = await bench.openChannel()
    expect((await next.receive())?.request).toBe(CALL)
  })

  test('gives channel after channel: each is closed when the next comes', async () => {
    await using bench = await Bench.open()
    const before = openFds()
    for (let i = 0; i < 20; i++) (await bench.openChannel()).close()
    await until(() => openFds() === before)
  })
})

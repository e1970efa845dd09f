/** A session whose rings come to be served by others while its front-end stays: `Session.rehost`. */
import { setTimeout } from 'node:timers/promises'
import { beforeAll, describe, expect, test } from 'vitest'
import { native } from '../../src/native.ts'
import * as wire from '../../src/vhost-user/wire.ts'
import { VHOST_F_LOG_ALL, VIRTIO_F_ACCESS_PLATFORM } from '../../src/virtio/constants.ts'
import { featureSet } from '../../src/virtio/features.ts'
import { Bench, FakeHost, PLAIN, UVA, until, warmUp } from './harness.ts'
import { update } from './iotlb-messages.ts'
import { inflight, log } from './request-rows.ts'

/** In milliseconds: more than any of these needs. */
const LIMIT_MS = 5000

/** Rings that can be told not to come to rest. */
class BusyHost extends FakeHost {
  drained: Promise<void> = Promise.resolve()

  override async pause(): Promise<void> {
    await super.pause()
    await this.drained
  }
}

/** A session with ring 0 started. */
async function serving(features = PLAIN) {
  const host = new BusyHost()
  const bench = await Bench.open({ host, features })
  await bench.addMemory()
  await bench.startRing()
  host.taken()
  return { bench, host }
}

/** What the host is asked while it is exchanged; `swap` among it. */
async function rehost(bench: Bench, swap = async () => {}, limitMs = LIMIT_MS): Promise<boolean> {
  return bench.session.rehost(async () => {
    bench.host.calls.push('swap')
    await swap()
  }, limitMs)
}

beforeAll(warmUp)

test('the others are told all, in an order in which they can use it, and the rings go on where they stood', async () => {
  const features = PLAIN | featureSet(VHOST_F_LOG_ALL, VIRTIO_F_ACCESS_PLATFORM)
  const host = new BusyHost()
  await using bench = await Bench.open({ host, features })
  await bench.addMemory()
  await bench.ask(wire.VHOST_USER_SET_LOG_BASE, log(4096n, 0n), [bench.memfd(4096)])
  await bench.command(wire.VHOST_USER_SET_LOG_FD, undefined, [bench.eventfd()])
  const description = { mmapSize: 65536n, mmapOffset: 0n, queueSize: 128 }
  expect(await bench.command(wire.VHOST_USER_SET_INFLIGHT_FD, inflight(description), [bench.memfd(65536)])).toBe('ok')
  await bench.ask(wire.VHOST_USER_IOTLB_MSG, update(0x5000n, 0x2000n, UVA + 0x1000n, 3))
  const [kick, call] = [bench.eventfd(), bench.eventfd()]
  await bench.prepareRing(0, 64, { flags: 1, descriptor: 0x5000n, available: 0x5800n, used: 0x6000n })
  await bench.command(wire.VHOST_USER_SET_VRING_CALL, wire.u64(0n), [call])
  await bench.command(wire.VHOST_USER_SET_VRING_KICK, wire.u64(0n), [kick])
  await bench.command(wire.VHOST_USER_SET_VRING_ENABLE, wire.vringState(0, 1))
  const before = host.started.get(0)!
  host.base = 17
  host.taken()
  const { memory } = host
  expect(await rehost(bench)).toBe(true)
  expect(host.taken()).toEqual([
    'pause',
    'stop 0',
    'swap',
    'resume',
    `negotiated ${(features & ~featureSet(VHOST_F_LOG_ALL)).toString(16)}`,
    'setMemory 1 translated',
    'setLog 4096 fd',
    'start 0',
  ])
  expect(host.memory).toEqual(memory)
  const after = host.started.get(0)!
  expect(after).toEqual({ ...before, enabled: true, vring: { ...before.vring, base: 17 }, resumed: true })
  expect(before.resumed).toBeUndefined()
  native.eventfdWrite(kick, 5)
  expect(native.eventfdRead(after.kickFd)).toBe(5)
  // Again, and the ring that is started anew after that is no resumed one.
  expect(await rehost(bench)).toBe(true)
  await bench.getBase()
  await bench.kick()
  expect(host.started.get(0)?.resumed).toBeUndefined()
})

test('messages that come meanwhile wait; a change of the config space is told when rings run again', async () => {
  const { bench, host } = await serving()
  await using _ = bench
  const channel = await bench.openChannel()
  const swapped = Promise.withResolvers<void>()
  const rehosted = rehost(bench, async () => {
    bench.session.configChanged()
    await swapped.promise
  })
  await until(() => host.calls.includes('swap'))
  await bench.peer.send(wire.VHOST_USER_SET_VRING_ENABLE, wire.vringState(0, 1), [], true)
  expect(await bench.peer.silent()).toBe(true)
  expect(await channel.silent()).toBe(true)
  expect(host.calls).not.toContain('enable 0 true')
  swapped.resolve()
  expect(await rehosted).toBe(true)
  expect((await bench.peer.receive())?.request).toBe(wire.VHOST_USER_SET_VRING_ENABLE)
  expect((await channel.receive())?.request).toBe(wire.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG)
  expect(host.calls.indexOf('start 0')).toBeLessThan(host.calls.indexOf('enable 0 true'))
})

describe('what never comes to rest', () => {
  test('is let go on', async () => {
    const { bench, host } = await serving()
    await using _ = bench
    const drained = Promise.withResolvers<void>()
    host.drained = drained.promise
    await expect(rehost(bench, undefined, 20)).rejects.toThrow('requests are still in flight after 20 ms')
    expect(host.taken()).toEqual(['pause', 'resume'])
    expect(await bench.command(wire.VHOST_USER_SET_OWNER)).toBe('ok')
    // When it does at last, nothing comes of it.
    drained.resolve()
    await setTimeout(10)
    expect(host.taken()).toEqual([])
    expect(await rehost(bench)).toBe(true)
  })

  test('nor does a message that waits for it', async () => {
    const { bench, host } = await serving()
    await using _ = bench
    const drained = Promise.withResolvers<void>()
    host.busy = drained.promise
    await bench.peer.send(wire.VHOST_USER_GET_VRING_BASE, wire.vringState(0, 0))
    await until(() => host.calls.includes('stop 0'))
    await expect(rehost(bench, undefined, 20)).rejects.toThrow('still in flight')
    drained.resolve()
    expect((await bench.peer.receive())?.request).toBe(wire.VHOST_USER_GET_VRING_BASE)
    expect(host.calls).not.toContain('swap')
    expect(await rehost(bench)).toBe(true)
  })
})

describe('a session that ends', () => {
  test('before it', async () => {
    const { bench } = await serving()
    await using _ = bench
    bench.peer.close()
    await bench.ended
    expect(await rehost(bench)).toBe(false)
    expect(bench.host.calls).not.toContain('swap')
  })

  test('while it is drained: the end does not wait for the limit', async () => {
    const { bench, host } = await serving()
    await using _ = bench
    host.drained = new Promise(() => {})
    const rehosted = rehost(bench, undefined, 60_000)
    await until(() => host.calls.includes('pause'))
    bench.session.connection.abort()
    expect(await rehosted).toBe(false)
    expect(await bench.ended).toBeUndefined()
    expect(host.taken()).toEqual(['pause', 'resume', 'stop 0', 'setLog none', 'setMemory 0', 'reset'])
  })

  test('while others are put in place: not before they are', async () => {
    const { bench, host } = await serving()
    await using _ = bench
    const swapped = Promise.withResolvers<void>()
    const rehosted = rehost(bench, () => swapped.promise)
    await until(() => host.calls.includes('swap'))
    bench.session.connection.abort()
    await setTimeout(10)
    expect(host.calls).not.toContain('reset')
    swapped.resolve()
    expect(await rehosted).toBe(true)
    expect(await bench.ended).toBeUndefined()
    const calls = host.taken()
    expect(calls.slice(0, 3)).toEqual(['pause', 'stop 0', 'swap'])
    expect(calls.at(-1)).toBe('reset')
    expect(host.started.size).toBe(0)
  })
})

test('when the others are not put in place, the old ones go on', async () => {
  const { bench, host } = await serving()
  await using _ = bench
  const failing = rehost(bench, async () => {
    throw new Error('no such luck')
  })
  await expect(failing).rejects.toThrow('no such luck')
  expect(host.taken()).toEqual(['pause', 'stop 0', 'swap', 'resume', 'start 0'])
  expect(await bench.getBase()).toBe(0)
})

test('rings that cannot go on end the session', async () => {
  const { bench, host } = await serving()
  await using _ = bench
  const rehosted = rehost(bench, async () => {
    host.startError = new Error('the thread is gone')
  })
  expect(await rehosted).toBe(true)
  expect(await bench.ended).toMatchObject({ message: 'the thread is gone' })
})

test('not while the state of the device is on its way', async () => {
  await using bench = await Bench.open()
  bench.host.busy = new Promise(() => {})
  await bench.ask(wire.VHOST_USER_SET_DEVICE_STATE_FD, wire.vringState(0, 0), [bench.memfd(0)])
  await expect(rehost(bench)).rejects.toThrow('transferred')
})

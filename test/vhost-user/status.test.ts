/** STATUS and RESET_DEVICE. */
import { describe, expect, test } from 'vitest'
import { native } from '../../src/native.ts'
import * as wire from '../../src/vhost-user/wire.ts'
import * as virtio from '../../src/virtio/constants.ts'
import { Bench, LOGGED, PLAIN, TRANSLATED, u64of } from './harness.ts'

const { VIRTIO_CONFIG_S_DRIVER_OK: DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK: FEATURES_OK } = virtio
const NEEDS_RESET = virtio.VIRTIO_CONFIG_S_NEEDS_RESET
const BEGUN = virtio.VIRTIO_CONFIG_S_ACKNOWLEDGE | virtio.VIRTIO_CONFIG_S_DRIVER

const set = (bench: Bench, status: bigint | number) =>
  bench.command(wire.VHOST_USER_SET_STATUS, wire.u64(BigInt(status)))
const get = async (bench: Bench) => Number(u64of((await bench.ask(wire.VHOST_USER_GET_STATUS))!))
const setFeatures = (bench: Bench, features: bigint) => bench.command(wire.VHOST_USER_SET_FEATURES, wire.u64(features))

describe('the status', () => {
  test('is what the front-end said', async () => {
    await using bench = await Bench.open()
    expect(await get(bench)).toBe(0)
    for (const status of [1, 3, 0xb, 0xf, 0x8f]) {
      expect(await set(bench, status)).toBe('ok')
      expect(await get(bench)).toBe(status)
    }
  })

  test('has 8 bits', async () => {
    await using bench = await Bench.open()
    expect(await set(bench, 3)).toBe('ok')
    for (const status of [0x100n, 0x103n, 1n << 63n]) expect(await set(bench, status)).toBe('nack')
    expect(bench.refused[0]?.code).toBe('ERR_PROTOCOL_STATUS')
    expect(await get(bench)).toBe(3)
  })

  test('shows FEATURES_OK only when features were agreed on', async () => {
    await using bench = await Bench.open({ bare: true })
    await bench.negotiateProtocol(bench.session.offeredProtocolFeatures)
    await set(bench, BEGUN | FEATURES_OK)
    expect(await get(bench)).toBe(BEGUN)
    expect(await setFeatures(bench, PLAIN | (1n << 60n))).toBe('nack')
    expect(await get(bench)).toBe(BEGUN)
    expect(await setFeatures(bench, PLAIN)).toBe('ok')
    await set(bench, BEGUN | FEATURES_OK)
    expect(await get(bench)).toBe(BEGUN | FEATURES_OK)
    expect(await setFeatures(bench, PLAIN | (1n << 60n))).toBe('nack')
    expect(await get(bench)).toBe(BEGUN)
  })

  test('0 resets nothing but itself: QEMU stops a device with it, and asks for the bases after it', async () => {
    await using bench = await Bench.open()
    await bench.addMemory()
    await bench.startRing()
    await set(bench, 0xf)
    bench.host.taken()
    bench.host.base = 4711
    expect(await set(bench, 0)).toBe('ok')
    expect(await get(bench)).toBe(0)
    expect(bench.host.taken()).toEqual([])
    expect(await bench.command(wire.VHOST_USER_SET_VRING_ENABLE, wire.vringState(0, 0))).toBe('ok')
    expect(await bench.getBase()).toBe(4711)
    expect(bench.host.taken()).toEqual(['enable 0 false', 'stop 0'])
  })
})

describe('a ring that breaks', () => {
  test('needs a reset, and a driver that runs is told by its configuration', async () => {
    await using bench = await Bench.open()
    const channel = await bench.openChannel()
    await bench.addMemory()
    const err = bench.eventfd()
    expect(await bench.command(wire.VHOST_USER_SET_VRING_ERR, wire.u64(0n), [err])).toBe('ok')
    await bench.startRing()
    await set(bench, BEGUN)
    bench.session.ringBroke(0)
    expect(native.eventfdRead(err)).toBe(1)
    expect(await get(bench)).toBe(BEGUN | NEEDS_RESET)
    expect(await channel.silent()).toBe(true)
    await set(bench, 0)
    expect(await get(bench)).toBe(0)
    await set(bench, 0xf)
    bench.session.ringBroke(0)
    expect((await channel.receive())?.request).toBe(wire.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG)
    // Drivers write back what they read, with a bit more.
    await set(bench, 0xf | 0x80)
    expect(await get(bench)).toBe(0xf | 0x80 | NEEDS_RESET)
  })

  test('the driver cannot make the device need a reset', async () => {
    await using bench = await Bench.open()
    await set(bench, 0xf | NEEDS_RESET)
    expect(await get(bench)).toBe(0xf)
  })

  test('without STATUS nobody is told', async () => {
    await using bench = await Bench.open({ withoutProtocol: [wire.VHOST_USER_PROTOCOL_F_STATUS] })
    const channel = await bench.openChannel()
    await bench.addMemory()
    await bench.startRing()
    expect(await bench.command(wire.VHOST_USER_SET_VRING_ERR, wire.u64(0n), [bench.eventfd()])).toBe('ok')
    bench.session.ringBroke(0)
    expect(await channel.silent()).toBe(true)
  })
})

describe('RESET_DEVICE', () => {
  test('forgets features, status, log and translations, and what was said of rings', async () => {
    await using bench = await Bench.open({ features: LOGGED | TRANSLATED })
    await bench.addMemory()
    await bench.startRing()
    await set(bench, DRIVER_OK)
    bench.session.ringBroke(0)
    bench.host.taken()
    expect(await bench.command(wire.VHOST_USER_RESET_DEVICE)).toBe('ok')
    expect(bench.host.taken()).toEqual(['stop 0', 'setLog none', 'setMemory 1', 'reset'])
    expect(await get(bench)).toBe(0)
    expect(await bench.getBase()).toBe(0)
    expect(bench.session.negotiated.features).toBeUndefined()
    // Memory and protocol features are of the connection.
    expect(await setFeatures(bench, PLAIN)).toBe('ok')
    expect((await bench.startRing()).enabled).toBe(false)
  })
})

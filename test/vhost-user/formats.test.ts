/** Split and packed rings as a session configures them: sizes, bases, alignments, and features that come late. */
import { describe, expect, test } from 'vitest'
import * as wire from '../../src/vhost-user/wire.ts'
import { VIRTIO_F_EVENT_IDX, VIRTIO_F_IN_ORDER } from '../../src/virtio/constants.ts'
import { featureSet } from '../../src/virtio/features.ts'
import { Bench, PACKED, PLAIN, RING, UVA } from './harness.ts'
import { address } from './request-rows.ts'

const NUM = wire.VHOST_USER_SET_VRING_NUM
const BASE = wire.VHOST_USER_SET_VRING_BASE
const ADDR = wire.VHOST_USER_SET_VRING_ADDR

describe('a packed ring', () => {
  test('is described by its three areas, in guest addresses', async () => {
    await using bench = await Bench.open({ features: PACKED | featureSet(VIRTIO_F_EVENT_IDX, VIRTIO_F_IN_ORDER) })
    await bench.addMemory()
    const { vring, features } = await bench.startRing(0, 100)
    expect(vring).toEqual({
      size: 100,
      descriptor: 0x10_0000,
      driver: 0x10_2000,
      device: 0x10_4000,
      base: 0x8000_8000,
      eventIdx: true,
      indirect: false,
      packed: true,
      inOrder: true,
    })
    expect(features).toBe(PACKED | featureSet(VIRTIO_F_EVENT_IDX, VIRTIO_F_IN_ORDER))
  })

  test.each([1, 3, 100, 32767, 32768])('may have %i entries', async (size) => {
    await using bench = await Bench.open({ features: PACKED })
    await bench.addMemory()
    expect((await bench.startRing(0, size, { available: UVA + 0x80000n, used: UVA + 0x80004n })).vring.size).toBe(size)
  })

  test.each([0, 32769])('not %i', async (size) => {
    await using bench = await Bench.open({ features: PACKED })
    expect(await bench.command(NUM, wire.vringState(0, size))).toBe('nack')
  })

  test.each([
    ['both wrap counters set', 0x8000_8000, 0x8000_8000],
    ['both clear', 0x0003_0003, 0x0003_0003],
    ['used behind avail', 0x8005_8009, 0x8005_8009],
    ['the avail half alone, as DPDK says it', 0x8000, 0x8000_8000],
    ['the avail half alone, further on', 0x8007, 0x8007_8007],
    ['the last entry', 0x80ff_80ff, 0x80ff_80ff],
  ])('takes a base with %s', async (_, base, configured) => {
    await using bench = await Bench.open({ features: PACKED })
    await bench.addMemory()
    expect(await bench.command(BASE, wire.vringState(0, base))).toBe('ok')
    expect((await bench.startRing()).vring.base).toBe(configured)
  })

  test.each([
    ['avail', 0x8000_8100],
    ['used', 0x8100_8000],
  ])('refuses a base whose %s index it does not have', async (_, base) => {
    await using bench = await Bench.open({ features: PACKED })
    await bench.addMemory()
    expect(await bench.command(NUM, wire.vringState(0, 256))).toBe('ok')
    expect(await bench.command(BASE, wire.vringState(0, base))).toBe('nack')
    // The size may come after the base: then the start is what fails.
    expect(await bench.command(BASE, wire.vringState(1, base))).toBe('ok')
    expect(await bench.command(NUM, wire.vringState(1, 256))).toBe('ok')
    expect(await bench.command(ADDR, address({ index: 1, ...RING }))).toBe('nack')
    expect(bench.host.started.size).toBe(0)
  })

  test('answers its whole base', async () => {
    await using bench = await Bench.open({ features: PACKED })
    await bench.addMemory()
    expect(await bench.getBase()).toBe(0x8000_8000)
    await bench.startRing()
    bench.host.base = 0x8012_0034
    expect(await bench.getBase()).toBe(0x8012_0034)
    expect(await bench.getBase()).toBe(0x8012_0034)
  })

  test.each([
    ['a descriptor ring that is not aligned to 16', { descriptor: UVA + 8n }],
    ['a driver area that is not aligned to 4', { available: UVA + 0x2002n }],
    ['a device area that is not aligned to 4', { used: UVA + 0x4002n }],
    ['a descriptor ring that ends outside', { descriptor: UVA + 0xf_f010n }],
    ['a device area that ends outside', { used: UVA + 0x10_0000n }],
  ])('refuses %s', async (_, fields) => {
    await using bench = await Bench.open({ features: PACKED })
    await bench.addMemory()
    expect(await bench.command(NUM, wire.vringState(0, 256))).toBe('ok')
    expect(await bench.command(ADDR, address({ index: 0, ...RING, ...fields }))).toBe('nack')
  })
})

describe('a split ring', () => {
  test('begins at 0, and its areas have their own sizes and alignments', async () => {
    await using bench = await Bench.open()
    await bench.addMemory()
    const { vring } = await bench.startRing(0, 256, { available: UVA + 0x2002n })
    expect(vring).toMatchObject({ base: 0, packed: false, inOrder: false, driver: 0x10_2002 })
  })

  test.each([3, 100, 32767])('of %i entries is refused', async (size) => {
    await using bench = await Bench.open()
    expect(await bench.command(NUM, wire.vringState(0, size))).toBe('nack')
  })

  test('has a base of 16 bits', async () => {
    await using bench = await Bench.open()
    expect(await bench.command(BASE, wire.vringState(0, 0x1_0000))).toBe('nack')
    expect(await bench.command(BASE, wire.vringState(0, 0xffff))).toBe('ok')
    expect(await bench.getBase()).toBe(0xffff)
  })
})

describe('features that come after the ring', () => {
  test('make it packed', async () => {
    await using bench = await Bench.open({ bare: true })
    await bench.negotiateProtocol(bench.session.offeredProtocolFeatures)
    await bench.addMemory()
    expect(await bench.command(BASE, wire.vringState(0, 0x8003_8003))).toBe('ok')
    await bench.prepareRing(0, 100)
    expect(await bench.kick()).toBe('ok')
    expect(bench.host.started.size).toBe(0)
    expect(await bench.command(wire.VHOST_USER_SET_FEATURES, wire.u64(PACKED))).toBe('ok')
    expect(bench.host.started.get(0)?.vring).toMatchObject({ packed: true, size: 100, base: 0x8003_8003 })
  })

  test('make it impossible: a size or a base that only packed rings have', async () => {
    await using bench = await Bench.open({ bare: true })
    await bench.negotiateProtocol(bench.session.offeredProtocolFeatures)
    await bench.addMemory()
    await bench.prepareRing(0, 100)
    expect(await bench.kick()).toBe('ok')
    expect(await bench.command(wire.VHOST_USER_SET_FEATURES, wire.u64(PLAIN))).toBe('nack')
    expect(await bench.command(NUM, wire.vringState(0, 128))).toBe('ok')
    expect(bench.host.started.get(0)?.vring).toMatchObject({ packed: false, size: 128 })
  })
})

/** LOG_SHMFD and LOG_ALL: when rings mark, in which log, and where their own writes are marked. */
import { ftruncateSync } from 'node:fs'
import { beforeAll, describe, expect, test } from 'vitest'
import * as wire from '../../src/vhost-user/wire.ts'
import { VHOST_F_LOG_ALL, VIRTIO_F_ACCESS_PLATFORM } from '../../src/virtio/constants.ts'
import { featureSet } from '../../src/virtio/features.ts'
import { Bench, LOGGED, openFds, PACKED, PLAIN, REGION, RING, UVA, u64of, until, warmUp } from './harness.ts'
import { update } from './iotlb-messages.ts'
import { address, log } from './request-rows.ts'

const BASE = wire.VHOST_USER_SET_LOG_BASE
const FD = wire.VHOST_USER_SET_LOG_FD
const ADDR = wire.VHOST_USER_SET_VRING_ADDR
const FEATURES = wire.VHOST_USER_SET_FEATURES
/** 64 KiB of log are 2 GiB of memory. */
const BYTES = 65536

async function setLog(bench: Bench, bytes = BYTES, fd = bench.memfd(bytes)): Promise<number> {
  expect(u64of((await bench.ask(BASE, log(BigInt(bytes), 0n), [fd]))!)).toBe(0n)
  return fd
}

const setFeatures = (bench: Bench, features: bigint) => bench.command(FEATURES, wire.u64(features))
const setAddress = (bench: Bench, fields: Partial<wire.VringAddress>) =>
  bench.command(ADDR, address({ index: 0, ...RING, ...fields }))

beforeAll(warmUp)

describe('the log', () => {
  test('in the order of QEMU when a migration begins and ends: nothing is drained', async () => {
    await using bench = await Bench.open()
    await bench.addMemory()
    await bench.startRing(0, 256, { log: 0x10_4000n })
    bench.host.taken()
    await setLog(bench)
    expect(bench.host.taken()).toEqual(['setLog none'])
    expect(await setFeatures(bench, LOGGED)).toBe('ok')
    expect(bench.host.taken()).toEqual([`setLog ${BYTES}`])
    expect(await setAddress(bench, { flags: 1, log: 0x10_4000n })).toBe('ok')
    expect(bench.host.taken()).toEqual(['setRingLog 0 104000'])
    expect(await setAddress(bench, { flags: 1, log: 0x10_4000n })).toBe('ok')
    expect(await setFeatures(bench, LOGGED)).toBe('ok')
    expect(bench.host.taken()).toEqual([])
    expect(await setFeatures(bench, PLAIN)).toBe('ok')
    expect(await setAddress(bench, { flags: 0, log: 0x10_4000n })).toBe('ok')
    expect(bench.host.taken()).toEqual(['setLog none', 'setRingLog 0 -1'])
  })

  test('rings that start while it is on', async () => {
    await using bench = await Bench.open({ features: LOGGED })
    await bench.addMemory()
    await setLog(bench)
    const started = await bench.startRing(0, 256, { flags: 1, log: 0x10_4000n })
    expect(started.logAddress).toBe(0x10_4000)
    // What is logged is no business of the device.
    expect(started.features & featureSet(VHOST_F_LOG_ALL)).toBe(0n)
    expect((await bench.startRing(1, 256, { log: 0x10_4000n })).logAddress).toBe(-1)
  })

  test('features other than LOG_ALL cannot change under a ring, and the device does not hear of LOG_ALL', async () => {
    await using bench = await Bench.open()
    await bench.addMemory()
    await bench.startRing()
    bench.host.taken()
    expect(await setFeatures(bench, PACKED | featureSet(VHOST_F_LOG_ALL))).toBe('nack')
    expect(await setFeatures(bench, LOGGED)).toBe('ok')
    expect(bench.host.taken()).toEqual(['setLog none'])
    await bench.getBase()
    expect(await setFeatures(bench, LOGGED)).toBe('ok')
    expect(bench.host.taken()).toEqual(['stop 0', `negotiated ${PLAIN.toString(16)}`])
  })

  test('another one replaces it, and the first goes once nobody can use it', async () => {
    await using bench = await Bench.open({ features: LOGGED })
    const first = await setLog(bench)
    const before = openFds()
    const { log: area } = bench.host
    const second = await setLog(bench, 2 * BYTES)
    expect(bench.host.log?.size).toBe(2 * BYTES)
    await until(() => openFds() === before + 1)
    // What is left of the first mapping is memory of nobody.
    new Uint8Array(area!.buffer)[0] = 1
    ftruncateSync(first, 0)
    expect(bench.session.memoryFaulted).toBe(false)
    ftruncateSync(second, 0)
    new Uint8Array(bench.host.log!.buffer)[0] = 1
    expect(bench.session.memoryFaulted).toBe(true)
  })

  test('a log that does not begin with its file', async () => {
    await using bench = await Bench.open({ features: LOGGED })
    const fd = bench.memfd(16384)
    expect(await bench.ask(BASE, log(4000n, 5001n), [fd])).toBeDefined()
    expect(bench.host.log).toMatchObject({ offset: 0, size: 4000 })
  })

  test.each([
    ['of 0 bytes', log(0n, 0n)],
    ['longer than its file', log(4097n, 0n)],
    ['that begins behind its file', log(16n, 4096n)],
    ['with an offset near 2^64', log(16n, 2n ** 64n - 8n)],
    ['with a size of 2^63', log(2n ** 63n, 0n)],
  ])(
    'one %s ends the session: its reply cannot say no, and a migration without a log loses pages',
    async (_, payload) => {
      await using bench = await Bench.open()
      expect(await bench.ask(BASE, payload, [bench.memfd(4096)])).toBeUndefined()
      expect(await bench.ended).toMatchObject({ code: 'ERR_PROTOCOL_LOG' })
    }
  )

  test('goes with RESET_DEVICE and with the session', async () => {
    const start = openFds()
    {
      await using bench = await Bench.open({ features: LOGGED })
      const before = openFds()
      await setLog(bench)
      expect(await bench.command(FD, undefined, [bench.eventfd()])).toBe('ok')
      bench.host.taken()
      expect(await bench.command(wire.VHOST_USER_RESET_DEVICE)).toBe('ok')
      expect(bench.host.taken()).toContain('setLog none')
      await until(() => openFds() === before + 2)
      expect(await setFeatures(bench, LOGGED)).toBe('ok')
      await setLog(bench)
    }
    expect(openFds()).toBe(start)
  })
})

describe('SET_LOG_FD', () => {
  test('tells of marks while rings mark, and is replaced', async () => {
    await using bench = await Bench.open({ features: LOGGED })
    await setLog(bench)
    const before = openFds()
    for (let i = 0; i < 5; i++) expect(await bench.command(FD, undefined, [bench.eventfd()])).toBe('ok')
    expect(bench.host.logFd).toBeGreaterThan(0)
    await until(() => openFds() === before + 5 + 1)
    expect(await setFeatures(bench, PLAIN)).toBe('ok')
    expect(bench.host.logFd).toBe(-1)
    expect(await setFeatures(bench, LOGGED)).toBe('ok')
    expect(bench.host.logFd).toBeGreaterThan(0)
  })

  test('is an eventfd or nothing', async () => {
    await using bench = await Bench.open({ features: LOGGED })
    const before = openFds()
    expect(await bench.command(FD, undefined, [bench.memfd(4096)])).toBe('nack')
    await until(() => openFds() === before + 1)
  })
})

describe('where the ring itself is logged', () => {
  test.each([
    ['the last byte of the used ring is the last of the log', 0n, 'ok'],
    ['it ends one byte behind it', 1n, 'nack'],
  ] as const)('%s', async (_, more, result) => {
    await using bench = await Bench.open({ features: LOGGED })
    await bench.addMemory()
    // 16 bytes of log: 128 pages. A used ring of 256 entries has 2054 bytes, or without EVENT_IDX 2052.
    await setLog(bench, 16)
    expect(await bench.command(wire.VHOST_USER_SET_VRING_NUM, wire.vringState(0, 256))).toBe('ok')
    expect(await setAddress(bench, { flags: 1, log: 128n * 4096n - 2052n + more })).toBe(result)
    expect(await setAddress(bench, { flags: 0, log: 128n * 4096n - 2052n + more })).toBe('ok')
  })

  test('QEMU gives the log after the rings when a device starts during a migration: it must reach to their ends', async () => {
    await using bench = await Bench.open({ features: LOGGED })
    await bench.addMemory()
    expect((await bench.startRing(0, 256, { flags: 1, log: 0x10_4000n })).logAddress).toBe(0x10_4000)
    expect(await bench.ask(BASE, log(16n, 0n), [bench.memfd(16)])).toBeUndefined()
    expect(await bench.ended).toMatchObject({ code: 'ERR_PROTOCOL_LOG' })
  })

  test('a packed ring is logged at its descriptor ring, wherever the front-end says', async () => {
    await using bench = await Bench.open({ features: PACKED | featureSet(VHOST_F_LOG_ALL) })
    await bench.addMemory()
    await setLog(bench)
    expect((await bench.startRing(0, 256, { flags: 1, log: 0x10_4000n })).logAddress).toBe(0x10_0000)
  })

  test('behind a vIOMMU it is found by the translation, before the ring can write', async () => {
    await using bench = await Bench.open({ features: LOGGED | featureSet(VIRTIO_F_ACCESS_PLATFORM) })
    await bench.addMemory()
    await setLog(bench)
    const iova = { descriptor: 0x8000n, available: 0x9000n, used: 0xa800n, log: 0xa800n, flags: 1 }
    expect((await bench.startRing(0, 256, iova)).logAddress).toBe(-1)
    bench.host.taken()
    const ask = (...fields: Parameters<typeof update>) => bench.ask(wire.VHOST_USER_IOTLB_MSG, update(...fields))
    // A used ring of 2052 bytes at 0xa800 ends in the next page.
    expect(u64of((await ask(0xa000n, 0x1000n, UVA + 0x3_0000n))!)).toBe(0n)
    expect(bench.host.taken()).toEqual(['updateIotlb a000+1000'])
    expect(u64of((await ask(0xb000n, 0x1000n, UVA + 0x3_1000n))!)).toBe(0n)
    const gpa = Number(REGION.guestAddress) + 0x3_0800
    expect(bench.host.taken()).toEqual([`setRingLog 0 ${gpa.toString(16)}`, 'updateIotlb b000+1000'])
  })
})

/** ACCESS_PLATFORM: IOTLB_MSG both ways, rings at IOVAs, and what becomes of translations when memory changes. */
import { describe, expect, test } from 'vitest'
import * as wire from '../../src/vhost-user/wire.ts'
import { IOTLB_READ, IOTLB_WRITE } from '../../src/virtio/memory.ts'
import { Bench, PLAIN, REGION, TRANSLATED, UVA, u64of } from './harness.ts'
import { invalidate, iotlb, update } from './iotlb-messages.ts'
import { address, single } from './request-rows.ts'

const MSG = wire.VHOST_USER_IOTLB_MSG
const GPA = Number(REGION.guestAddress)
/** Behind the first one in the front-end's addresses, far away in the guest's. */
const SECOND = { ...REGION, guestAddress: 0x1000_0000n, userAddress: UVA + REGION.size }

async function ask(bench: Bench, payload: Uint8Array): Promise<bigint | undefined> {
  const reply = await bench.ask(MSG, payload)
  return reply === undefined ? undefined : u64of(reply)
}

async function translated(): Promise<Bench> {
  const bench = await Bench.open({ features: TRANSLATED })
  await bench.addMemory()
  bench.host.taken()
  return bench
}

describe('an update', () => {
  test('reaches the rings in their addresses, before it is answered', async () => {
    await using bench = await translated()
    expect(await ask(bench, update(0x5000n, 0x2000n, UVA + 0x8000n, IOTLB_READ))).toBe(0n)
    expect(bench.host.taken()).toEqual(['updateIotlb 5000+2000'])
    const { hva, buffer } = bench.session.memory.regions[0]!
    expect(bench.host.memory).toEqual([
      {
        gpa: 0x5000,
        size: 0x2000,
        hva: hva + 0x8000,
        buffer,
        offset: 0x8000,
        physical: GPA + 0x8000,
        access: IOTLB_READ,
      },
    ])
  })

  test('that spans two regions becomes an entry of each', async () => {
    await using bench = await translated()
    await bench.addMemory(bench.memfd(0x10_0000), SECOND)
    expect(await ask(bench, update(0x5000n, 0x3000n, UVA + REGION.size - 0x1000n))).toBe(0n)
    expect(bench.host.memory.map(({ gpa, size, physical }) => [gpa, size, physical])).toEqual([
      [0x5000, 0x1000, GPA + 0xf_f000],
      [0x6000, 0x2000, Number(SECOND.guestAddress)],
    ])
  })

  test.each([26, 28, 32])('of %i bytes is understood', async (bytes) => {
    await using bench = await translated()
    expect(await ask(bench, iotlb({ iova: 0n, size: 4096n, userAddress: UVA }, bytes))).toBe(0n)
  })

  test.each([
    ['of 0 bytes', update(0x5000n, 0n, UVA)],
    ['that is no whole pages', update(0x5000n, 0x800n, UVA)],
    ['at half a page', update(0x5800n, 0x1000n, UVA)],
    ['of half a page', update(0x5000n, 0x1000n, UVA + 0x800n)],
    ['before the memory', update(0x5000n, 0x1000n, UVA - 0x1000n)],
    ['that ends behind the memory', update(0x5000n, 0x2000n, UVA + REGION.size - 0x1000n)],
    ['beyond 2^53', update(2n ** 53n, 0x1000n, UVA)],
    ['that wraps', update(2n ** 64n - 0x1000n, 0x2000n, UVA)],
    ['whose memory wraps', update(0x5000n, 0x2000n, 2n ** 64n - 0x1000n)],
    ['of all there is', update(0n, 2n ** 64n - 0x1000n, UVA)],
    ['with permissions that nobody defined', update(0x5000n, 0x1000n, UVA, 4)],
    ['that is a miss', iotlb({ iova: 0x5000n, size: 0x1000n, userAddress: UVA, type: wire.VHOST_IOTLB_MISS })],
    ['that is an access failure', iotlb({ size: 0x1000n, type: wire.VHOST_IOTLB_ACCESS_FAIL })],
    ['of no type', iotlb({ size: 0x1000n, userAddress: UVA, type: 0 })],
  ])('%s is answered with 1, and the session goes on', async (_, payload) => {
    await using bench = await translated()
    expect(await ask(bench, payload)).toBe(1n)
    expect(bench.refused[0]?.code).toBe('ERR_PROTOCOL_IOTLB')
    expect(bench.host.taken()).toEqual([])
    expect(await ask(bench, update(0x5000n, 0x1000n, UVA))).toBe(0n)
  })

  test('over many regions counts as many entries', async () => {
    await using bench = await translated()
    const second = { ...SECOND, size: 0x1000n }
    const third = { ...second, guestAddress: 0x2000_0000n, userAddress: SECOND.userAddress + 0x1000n }
    for (const region of [second, third]) await bench.addMemory(undefined, region)
    bench.host.taken()
    expect(await ask(bench, update(0x5000n, 0x3000n, UVA + REGION.size - 0x1000n))).toBe(0n)
    expect(bench.host.taken()).toEqual(['updateIotlb 5000+1000 6000+1000 7000+1000'])
    const base = Number(UVA + REGION.size)
    expect(bench.session.exchange.translations.entries).toEqual([
      { iova: 0x5000, size: 0x1000, uva: base - 0x1000, access: 3 },
      { iova: 0x6000, size: 0x1000, uva: base, access: 3 },
      { iova: 0x7000, size: 0x1000, uva: base + 0x1000, access: 3 },
    ])
    expect(await bench.command(wire.VHOST_USER_REM_MEM_REG, single(second))).toBe('ok')
    expect(bench.session.exchange.translations.entries.map(({ iova }) => iova)).toEqual([0x5000, 0x7000])
  })

  test('without access is none', async () => {
    await using bench = await translated()
    expect(await ask(bench, update(0x5000n, 0x3000n, UVA))).toBe(0n)
    expect(await ask(bench, update(0x6000n, 0x1000n, UVA, 0))).toBe(0n)
    expect(bench.host.taken()).toEqual(['updateIotlb 5000+3000', 'invalidateIotlb 6000+1000'])
    expect(bench.session.exchange.translations.entries.map(({ iova }) => iova)).toEqual([0x5000, 0x7000])
  })

  test('before ACCESS_PLATFORM is refused', async () => {
    await using bench = await Bench.open()
    await bench.addMemory()
    expect(await ask(bench, update(0x5000n, 0x1000n, UVA))).toBe(1n)
  })
})

describe('an invalidation', () => {
  test.each([
    ['pages', invalidate(0x5000n, 0x2000n), '5000+2000'],
    ['everything, whose size does not fit its field', invalidate(0n, 0n), '0+20000000000000'],
    ['everything but the last byte', invalidate(0n, 2n ** 64n - 1n), '0+20000000000000'],
    ['what reaches beyond 2^53', invalidate(2n ** 52n, 2n ** 60n), '10000000000000+10000000000000'],
    ['less than a page', invalidate(0x5800n, 0x10n), '5000+1000'],
  ])('of %s', async (_, payload, told) => {
    await using bench = await translated()
    expect(await ask(bench, payload)).toBe(0n)
    expect(bench.host.taken()).toEqual([`invalidateIotlb ${told}`])
  })

  test('of what can have no entries', async () => {
    await using bench = await translated()
    expect(await ask(bench, invalidate(2n ** 60n, 0x1000n))).toBe(0n)
    expect(bench.host.taken()).toEqual([])
  })

  test.each([
    ['nothing', invalidate(0x5000n, 0n)],
    ['what wraps', invalidate(2n ** 64n - 0x1000n, 0x2000n)],
  ])('of %s is answered with 1', async (_, payload) => {
    await using bench = await translated()
    expect(await ask(bench, payload)).toBe(1n)
  })
})

describe('rings behind a vIOMMU', () => {
  const IOVA = { descriptor: 0xfff0_0000n, available: 0xfff0_1000n, used: 0xfff0_2000n }

  test('are at IOVAs, whether these are translated or not', async () => {
    await using bench = await translated()
    const { vring } = await bench.startRing(0, 256, IOVA)
    expect(vring).toMatchObject({ descriptor: 0xfff0_0000, driver: 0xfff0_1000, device: 0xfff0_2000 })
  })

  test.each([
    ['not aligned', { descriptor: 0x1008n }],
    ['beyond 2^53', { used: 2n ** 53n - 16n }],
    ['that wraps', { available: 2n ** 64n - 2n }],
  ])('an address %s is refused', async (_, fields) => {
    await using bench = await translated()
    expect(await bench.command(wire.VHOST_USER_SET_VRING_NUM, wire.vringState(0, 256))).toBe('ok')
    const payload = address({ index: 0, ...IOVA, ...fields })
    expect(await bench.command(wire.VHOST_USER_SET_VRING_ADDR, payload)).toBe('nack')
  })

  test('ACCESS_PLATFORM without BACKEND_REQ is refused, for nobody could ask', async () => {
    await using bench = await Bench.open({ withoutProtocol: [wire.VHOST_USER_PROTOCOL_F_BACKEND_REQ, 14] })
    expect(await bench.command(wire.VHOST_USER_SET_FEATURES, wire.u64(TRANSLATED))).toBe('nack')
    expect(await bench.command(wire.VHOST_USER_SET_FEATURES, wire.u64(PLAIN))).toBe('ok')
  })
})

describe('memory behind a vIOMMU', () => {
  test('is shown to rings as translations only, also when ACCESS_PLATFORM comes after it', async () => {
    await using bench = await Bench.open()
    await bench.addMemory()
    bench.host.taken()
    expect(await bench.command(wire.VHOST_USER_SET_FEATURES, wire.u64(TRANSLATED))).toBe('ok')
    expect(bench.host.taken()).toContain('setMemory 0 translated')
    await bench.addMemory(bench.memfd(0x10_0000), SECOND)
    expect(bench.host.taken()).toEqual([])
    expect(await ask(bench, update(0x5000n, 0x1000n, SECOND.userAddress))).toBe(0n)
    expect(await bench.command(wire.VHOST_USER_SET_FEATURES, wire.u64(PLAIN))).toBe('ok')
    expect(bench.host.taken()).toContain('setMemory 2')
    expect(bench.host.memory[1]?.gpa).toBe(Number(SECOND.guestAddress))
  })

  test('that is removed takes its translations along', async () => {
    await using bench = await translated()
    await bench.addMemory(bench.memfd(0x10_0000), SECOND)
    await ask(bench, update(0x5000n, 0x1000n, UVA))
    await ask(bench, update(0x6000n, 0x1000n, SECOND.userAddress))
    await ask(bench, update(0x9000n, 0x2000n, SECOND.userAddress - 0x1000n))
    bench.host.taken()
    expect(await bench.command(wire.VHOST_USER_REM_MEM_REG, single(SECOND))).toBe('ok')
    expect(bench.host.taken()).toEqual(['pause', 'setMemory 2 translated', 'resume'])
    // What reached into both has what is left.
    expect(bench.host.memory.map(({ gpa, size }) => [gpa, size])).toEqual([
      [0x5000, 0x1000],
      [0x9000, 0x1000],
    ])
  })

  test('translations end with RESET_DEVICE', async () => {
    await using bench = await translated()
    await ask(bench, update(0x5000n, 0x1000n, UVA))
    expect(await bench.command(wire.VHOST_USER_RESET_DEVICE)).toBe('ok')
    expect(bench.host).toMatchObject({ translated: false, memory: [{ gpa: GPA }] })
    expect(await bench.command(wire.VHOST_USER_SET_FEATURES, wire.u64(TRANSLATED))).toBe('ok')
    expect(bench.host).toMatchObject({ translated: true, memory: [] })
  })
})

describe('a miss', () => {
  test('goes to the front-end, without asking for a reply', async () => {
    await using bench = await translated()
    const channel = await bench.openChannel()
    await bench.startRing()
    bench.session.iotlbMiss(0, 0x1234_5000, IOTLB_WRITE)
    const message = (await channel.receive())!
    expect([message.request, message.flags, message.payload.length]).toEqual([1, wire.VHOST_USER_VERSION, 32])
    expect(wire.readIotlb(new DataView(message.payload.buffer), 0)).toEqual({
      iova: 0x1234_5000n,
      size: 0n,
      userAddress: 0n,
      permissions: 2,
      type: wire.VHOST_IOTLB_MISS,
    })
  })

  test('waits for the channel, which may come last; the log says so once', async () => {
    await using bench = await translated()
    await bench.startRing(0)
    await bench.startRing(1)
    for (const iova of [0x1000, 0x2000, 0x3000]) bench.session.iotlbMiss(0, iova, IOTLB_READ)
    bench.session.iotlbMiss(1, 0x7000, IOTLB_READ)
    expect(bench.refused.map(({ code }) => code)).toEqual(['ERR_PROTOCOL_IOTLB'])
    const channel = await bench.openChannel()
    const seen = [(await channel.receive())!, (await channel.receive())!]
    // One per ring: its last.
    expect(seen.map(({ payload }) => wire.readIotlb(new DataView(payload.buffer), 0).iova)).toEqual([0x3000n, 0x7000n])
    expect(await channel.silent()).toBe(true)
  })

  test('that is heard before the ring is said to run is not lost, and after it stopped nothing is said', async () => {
    await using bench = await translated()
    const channel = await bench.openChannel()
    const { startRing } = bench.host
    bench.host.startRing = async (index, start) => {
      bench.session.iotlbMiss(index, 0x8000, IOTLB_READ)
      await startRing.call(bench.host, index, start)
    }
    await bench.startRing()
    expect((await channel.receive())?.request).toBe(1)
    await bench.getBase()
    bench.session.iotlbMiss(0, 0x8000, IOTLB_READ)
    expect(await channel.silent()).toBe(true)
  })

  test('the answer comes behind a request that waits for what is in flight: both are served', async () => {
    await using bench = await translated()
    const channel = await bench.openChannel()
    await bench.startRing()
    const drained = Promise.withResolvers<void>()
    bench.host.busy = drained.promise
    await bench.peer.send(wire.VHOST_USER_GET_VRING_BASE, wire.vringState(0, 0))
    bench.session.iotlbMiss(0, 0x8000, IOTLB_READ)
    expect((await channel.receive())?.request).toBe(1)
    await bench.peer.send(MSG, update(0x8000n, 0x1000n, UVA))
    // A ring with a miss took nothing of that chain, so its end does not depend on the update.
    drained.resolve()
    expect((await bench.peer.receive())?.request).toBe(wire.VHOST_USER_GET_VRING_BASE)
    expect((await bench.peer.receive())?.request).toBe(MSG)
  })
})

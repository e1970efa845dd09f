/** GET_INFLIGHT_FD, SET_INFLIGHT_FD and GET_VRING_BASE with num = 1: which buffer a ring gets, and what is refused. */
import { fstatSync, ftruncateSync, writeSync } from 'node:fs'
import { beforeAll, describe, expect, test } from 'vitest'
import { native } from '../../src/native.ts'
import * as wire from '../../src/vhost-user/wire.ts'
import { RingError } from '../../src/virtio/errors.ts'
import { inflightSize } from '../../src/virtio/inflight.ts'
import { Bench, openFds, PACKED, PLAIN, until, warmUp } from './harness.ts'
import { inflight } from './request-rows.ts'

const GET = wire.VHOST_USER_GET_INFLIGHT_FD
const SET = wire.VHOST_USER_SET_INFLIGHT_FD
const KEEP = wire.VRING_BASE_KEEP_INFLIGHT

/** GET_INFLIGHT_FD as QEMU asks. The fd goes with the bench. */
async function getInflight(bench: Bench, numQueues = 2, queueSize = 256, bytes = 24) {
  const reply = await bench.exchange(GET, inflight({ numQueues, queueSize }, bytes))
  if (reply === undefined) return undefined
  const description = wire.readInflight(new DataView(reply.payload.buffer), 0)
  return { description, fd: bench.own(reply.fds[0]!), bytes: reply.payload.length, fds: reply.fds.length }
}

/** Gets a buffer and gives it back, as QEMU does before it starts rings. */
async function track(bench: Bench, numQueues = 2, queueSize = 256): Promise<number> {
  const { description, fd } = (await getInflight(bench, numQueues, queueSize))!
  expect(await bench.command(SET, inflight(description, 24), [fd])).toBe('ok')
  return fd
}

function header(bench: Bench, index = 0): Uint16Array {
  const { buffer, offset } = bench.host.started.get(index)!.inflight!
  return new Uint16Array(buffer, offset, 8)
}

beforeAll(warmUp)

describe('GET_INFLIGHT_FD', () => {
  test.each([
    ['split', PLAIN],
    ['packed', PACKED],
  ])('makes a file of zeroes for %s rings, whose size nobody can change', async (format, features) => {
    await using bench = await Bench.open({ features })
    const { description, fd, bytes, fds } = (await getInflight(bench, 2, 100, 20))!
    const size = 2 * inflightSize(100, format === 'packed')
    expect(description).toEqual({ mmapSize: BigInt(size), mmapOffset: 0n, numQueues: 2, queueSize: 100 })
    expect([bytes, fds, fstatSync(fd).size]).toEqual([20, 1, size])
    expect(() => ftruncateSync(fd, 0)).toThrow('EPERM')
    expect(() => ftruncateSync(fd, 2 * size)).toThrow('EPERM')
  })

  test('answers as many bytes as it was asked with: QEMU compares them with its structure', async () => {
    await using bench = await Bench.open()
    for (const bytes of [20, 22, 24]) expect((await getInflight(bench, 1, 8, bytes))?.bytes).toBe(bytes)
  })

  test.each([
    ['no queues', 0, 256],
    ['more queues than there are', 3, 256],
    ['queues without entries', 2, 0],
    ['queues of more entries than rings may have', 2, 32769],
  ])('%s: hangs up, for its reply can say no more than where the buffer is', async (_, numQueues, queueSize) => {
    await using bench = await Bench.open()
    expect(await getInflight(bench, numQueues, queueSize)).toBeUndefined()
    expect(await bench.ended).toMatchObject({ code: 'ERR_PROTOCOL_INFLIGHT' })
  })

  test('keeps no fd and no mapping of what it made', async () => {
    await using bench = await Bench.open()
    const before = openFds()
    for (let i = 0; i < 20; i++) native.close((await bench.exchange(GET, inflight({}, 24)))!.fds[0]!)
    expect(openFds()).toBe(before)
  })
})

describe('SET_INFLIGHT_FD', () => {
  test('each ring gets its region of the buffer', async () => {
    await using bench = await Bench.open()
    await bench.addMemory()
    const fd = await track(bench, 2, 300)
    const region = inflightSize(300, false)
    for (const index of [0, 1]) {
      const { inflight: area } = await bench.startRing(index)
      expect(area).toMatchObject({ offset: index * region, size: region })
      // The very file that the front-end has.
      new Uint8Array(area!.buffer, area!.offset)[0] = 77 + index
    }
    const seen = native.mapFile(fd, 0, 65536, 0, 2 * region, true)
    if (typeof seen === 'number') throw new Error(`mmap: ${seen}`)
    const bytes = new Uint8Array(seen.buffer)
    expect([bytes[0], bytes[region]]).toEqual([77, 78])
    native.release(seen.address)
  })

  test('a buffer that does not begin with its file', async () => {
    await using bench = await Bench.open()
    await bench.addMemory()
    const fd = bench.memfd(65536)
    const description = { mmapSize: 32768n, mmapOffset: 4160n, numQueues: 2, queueSize: 256 }
    expect(await bench.command(SET, inflight(description), [fd])).toBe('ok')
    const { inflight: area } = await bench.startRing()
    new Uint8Array(area!.buffer, area!.offset)[5] = 99
    const seen = native.mapFile(fd, 0, 65536, 0, 65536, true)
    if (typeof seen === 'number') throw new Error(`mmap: ${seen}`)
    expect(new Uint8Array(seen.buffer)[4165]).toBe(99)
    native.release(seen.address)
  })

  test.each([
    ['too small', { mmapSize: 8191n }],
    ['that ends behind its file', { mmapOffset: 65536n }],
    ['of 0 bytes', { mmapSize: 0n }],
    ['that reaches beyond 2^53', { mmapSize: 2n ** 53n }],
    ['at 2^64 - 8', { mmapOffset: 2n ** 64n - 8n }],
    ['whose words are not aligned', { mmapOffset: 4n }],
    ['for more queues than there are', { numQueues: 3 }],
    ['for no queue', { numQueues: 0 }],
    ['for no entries', { queueSize: 0 }],
  ])('refuses a buffer %s, and keeps the one before', async (_, change) => {
    await using bench = await Bench.open()
    await bench.addMemory()
    await track(bench)
    const before = openFds()
    const description = { mmapSize: 65536n, mmapOffset: 0n, numQueues: 2, queueSize: 256, ...change }
    const fd = native.memfd('small', 65536, 0)
    expect(await bench.command(SET, inflight(description), [fd])).toBe('nack')
    native.close(fd)
    expect(openFds()).toBe(before)
    expect((await bench.startRing()).inflight?.size).toBe(inflightSize(256, false))
  })

  test('refuses what is no file', async () => {
    await using bench = await Bench.open()
    expect(await bench.command(SET, inflight({ mmapSize: 65536n }), [bench.eventfd()])).toBe('nack')
    expect(bench.refused[0]?.code).toBe('ERR_PROTOCOL_INFLIGHT')
  })

  test('while a ring is started is refused', async () => {
    await using bench = await Bench.open()
    await bench.addMemory()
    await track(bench)
    await bench.startRing()
    expect(await bench.command(SET, inflight({ mmapSize: 65536n }), [bench.memfd(65536)])).toBe('nack')
    await bench.getBase()
    expect(await bench.command(SET, inflight({ mmapSize: 65536n }), [bench.memfd(65536)])).toBe('ok')
  })

  test('a ring that is larger than its region, or has none, does not start', async () => {
    await using bench = await Bench.open()
    await bench.addMemory()
    await track(bench, 1, 128)
    await bench.prepareRing(0, 256)
    expect(await bench.kick(0)).toBe('nack')
    await bench.prepareRing(1, 128)
    expect(await bench.kick(1)).toBe('nack')
    expect(bench.host.started.size).toBe(0)
    expect(await bench.command(wire.VHOST_USER_SET_VRING_NUM, wire.vringState(0, 128))).toBe('ok')
    expect(bench.host.started.size).toBe(1)
  })

  test('RING_PACKED that comes after a buffer for split rings: no ring runs out of it', async () => {
    await using bench = await Bench.open({ bare: true })
    await bench.negotiateProtocol(bench.session.offeredProtocolFeatures)
    await bench.addMemory()
    await track(bench, 2, 256)
    expect(await bench.command(wire.VHOST_USER_SET_FEATURES, wire.u64(PACKED))).toBe('ok')
    await bench.prepareRing(1)
    expect(await bench.kick(1)).toBe('nack')
  })

  test.each([
    ['an unknown version', 4, 2],
    ['features that nobody knows', 0, 1],
  ])('a region of %s: the ring does not start', async (_, word, value) => {
    await using bench = await Bench.open()
    await bench.addMemory()
    await track(bench)
    await bench.startRing()
    const words = header(bench)
    words[4] = 1
    words[5] = 256
    words[word] = value
    bench.session.rings.all[0]!.started = false
    bench.host.started.clear()
    bench.host.taken()
    expect(await bench.kick()).toBe('nack')
    expect(bench.refused[0]?.code).toBe('ERR_PROTOCOL_INFLIGHT')
    expect(bench.host.taken()).toEqual([])
  })

  test('the file truncated by the front-end is a fault of its memory', async () => {
    await using bench = await Bench.open()
    await bench.addMemory()
    const fd = bench.memfd(65536)
    expect(await bench.command(SET, inflight({ mmapSize: 65536n }), [fd])).toBe('ok')
    const { inflight: area } = await bench.startRing()
    expect(bench.session.memoryFaulted).toBe(false)
    ftruncateSync(fd, 0)
    new Uint8Array(area!.buffer)[0] = 1
    expect(bench.session.memoryFaulted).toBe(true)
  })

  test('the buffer goes with RESET_DEVICE, and with the session', async () => {
    const start = openFds()
    {
      await using bench = await Bench.open()
      await bench.addMemory()
      const before = openFds()
      await track(bench)
      expect(openFds()).toBe(before + 2)
      expect(await bench.command(wire.VHOST_USER_RESET_DEVICE)).toBe('ok')
      await until(() => openFds() === before + 1)
      expect(await bench.command(wire.VHOST_USER_SET_FEATURES, wire.u64(PLAIN))).toBe('ok')
      expect((await bench.startRing()).inflight).toBeUndefined()
      await bench.getBase()
      await track(bench)
    }
    expect(openFds()).toBe(start)
  })
})

describe('GET_VRING_BASE', () => {
  async function tracked(withoutProtocol: number[] = []): Promise<Bench> {
    const bench = await Bench.open({ withoutProtocol })
    await bench.addMemory()
    await track(bench)
    await bench.startRing()
    header(bench)[4] = 1
    bench.host.taken()
    return bench
  }

  test('drains, and what the front-end says at the next start counts again', async () => {
    await using bench = await tracked()
    const words = header(bench)
    await bench.getBase()
    expect(bench.host.taken()).toEqual(['stop 0'])
    // The front-end may not have the answer: until it says how to go on, the region is what a successor has.
    expect(words[4]).toBe(1)
    await bench.kick(0)
    expect(bench.host.taken()).toEqual(['start 0'])
    expect(words[4]).toBe(0)
  })

  test('what it could not drain stays in the buffer: its translation was missing, or the device failed', async () => {
    await using bench = await tracked()
    const words = header(bench)
    const { buffer, offset } = bench.host.started.get(0)!.inflight!
    const bytes = new Uint8Array(buffer, offset)
    // desc_num, and the mark of head 3.
    words[5] = 256
    bytes[16 + 3 * 16] = 1
    await bench.getBase()
    await bench.kick(0)
    expect([words[4], bytes[16 + 3 * 16]]).toEqual([1, 1])
    // What it drained then is over.
    bytes[16 + 3 * 16] = 0
    await bench.getBase()
    await bench.kick(0)
    expect(words[4]).toBe(0)
  })

  test.each([
    ['another one is taken as it is', false, 1],
    ['the same one begins anew', true, 0],
  ])('of buffers that come after the drain: %s', async (_, same, version) => {
    await using bench = await Bench.open()
    await bench.addMemory()
    const first = (await getInflight(bench))!
    expect(await bench.command(SET, inflight(first.description, 24), [first.fd])).toBe('ok')
    await bench.startRing()
    header(bench)[4] = 1
    await bench.getBase()
    const next = same ? first : (await getInflight(bench))!
    if (!same) writeSync(next.fd, Uint8Array.of(1, 0, 0, 1), 0, 4, 8)
    expect(await bench.command(SET, inflight(next.description, 24), [next.fd])).toBe('ok')
    await bench.kick(0)
    expect(header(bench)[4]).toBe(version)
  })

  test('RESET_DEVICE drains as well: the same buffer begins anew', async () => {
    await using bench = await Bench.open()
    await bench.addMemory()
    const { description, fd } = (await getInflight(bench))!
    expect(await bench.command(SET, inflight(description, 24), [fd])).toBe('ok')
    await bench.startRing()
    const words = header(bench)
    words[4] = 1
    // Also with something in flight: desc_num, and the mark of head 0.
    words[5] = 256
    words[8] = 1
    expect(await bench.command(wire.VHOST_USER_RESET_DEVICE)).toBe('ok')
    expect(await bench.command(wire.VHOST_USER_SET_FEATURES, wire.u64(PLAIN))).toBe('ok')
    expect(await bench.command(SET, inflight(description, 24), [fd])).toBe('ok')
    await bench.startRing()
    expect(header(bench)[4]).toBe(0)
  })

  test('a buffer that contradicts itself is a NACK of what starts the ring', async () => {
    await using bench = await Bench.open()
    await bench.addMemory()
    await track(bench)
    await bench.prepareRing(0, 256)
    bench.host.startError = new RingError('ERR_RING_INFLIGHT', 'the in-flight buffer contradicts itself')
    expect(await bench.kick(0)).toBe('nack')
    bench.host.startError = undefined
    expect(await bench.kick(0)).toBe('ok')
  })

  test('with num = 1 leaves what is in flight in the buffer', async () => {
    await using bench = await tracked()
    const words = header(bench)
    bench.host.base = 7
    expect(await bench.getBase(0, KEEP)).toBe(7)
    expect(bench.host.taken()).toEqual(['stop 0 keep'])
    expect(words[4]).toBe(1)
  })

  test('with num = 1 and no buffer drains', async () => {
    await using bench = await Bench.open()
    await bench.addMemory()
    await bench.startRing()
    bench.host.taken()
    await bench.getBase(0, KEEP)
    expect(bench.host.taken()).toEqual(['stop 0'])
  })

  test('with another num is refused once num means something', async () => {
    await using bench = await tracked()
    expect(await bench.getBase(0, 2)).toBeUndefined()
  })

  test('without the bit num means nothing: DPDK leaves in it what was there', async () => {
    await using bench = await tracked([wire.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT])
    await bench.getBase(0, 0xdead_beef)
    expect(bench.host.taken()).toEqual(['stop 0'])
  })
})

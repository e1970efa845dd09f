/** What the front-end sends, and in what order, against a back-end that writes it down. */
import { describe, expect, onTestFinished, test } from 'vitest'
import { BlkDriver } from '../../src/frontend/blk.ts'
import { loadDeviceState, saveDeviceState } from '../../src/frontend/device-state.ts'
import { DirtyLogArea } from '../../src/frontend/dirty-log.ts'
import { InflightArea, inflightRegionBytes, readInflight } from '../../src/frontend/inflight.ts'
import { PACKED_BASE } from '../../src/frontend/packed-driver.ts'
import { Session, type SessionOptions } from '../../src/frontend/session.ts'
import { requestName } from '../../src/vhost-user/wire.ts'
import type { Recorded, RecordingOptions } from './recording-backend.ts'
import { hasQemu, serveFake, serveRecording, serveWithQemu } from './support.ts'

const ALL = {
  // With LOG_ALL, ACCESS_PLATFORM, RING_PACKED, IN_ORDER; protocol features 0 … 20.
  features: (0x1_7500_0246n | (1n << 26n) | (7n << 33n)).toString(16),
  protocolFeatures: 0x1f_ffffn.toString(16),
}

async function session(
  options: SessionOptions,
  recording: RecordingOptions = {}
): Promise<{ session: Session; sent: (since?: number) => string[]; journal: () => Recorded[]; socket: string }> {
  const { socket, journal } = await serveRecording({ ...ALL, ...recording })
  const one = Session.open(socket, { timeoutMs: 3000, ...options })
  onTestFinished(() => one.close(true))
  const sent = (since = 0): string[] =>
    journal()
      .slice(since)
      .filter(({ channel }) => channel === 'main')
      .map(({ request }) => requestName(request))
  return { session: one, sent, journal, socket }
}

const payloads = (journal: readonly Recorded[], name: string): Buffer[] =>
  journal.filter(({ request }) => requestName(request) === name).map(({ payload }) => Buffer.from(payload, 'hex'))

describe('negotiation', () => {
  test('nothing is acknowledged that was not asked for', async () => {
    const { session: one, journal } = await session({})
    const acked = payloads(journal(), 'SET_FEATURES')[0]?.readBigUInt64LE() ?? 0n
    for (const bit of [26n, 33n, 34n, 35n]) expect(acked & (1n << bit)).toBe(0n)
    for (const bit of [12n, 14n, 16n, 20n]) expect(one.connection.protocolFeatures & (1n << bit)).toBe(0n)
    expect(one.queue().driver).toBe(one.queue().split)
    expect(() => one.queue().packed).toThrow(RangeError)
  })

  test.each<[string, SessionOptions, RecordingOptions, string]>([
    ['packed rings', { packed: true }, { features: '175000246' }, 'SET_FEATURES: the back-end does not offer bit 34'],
    ['IN_ORDER', { inOrder: true }, { features: '175000246' }, 'SET_FEATURES: the back-end does not offer bit 35'],
    ['a vIOMMU', { iommu: true }, { features: '175000246' }, 'SET_FEATURES: the back-end does not offer bit 33'],
    [
      'in-flight tracking',
      { inflight: true },
      { protocolFeatures: 'f' },
      'SET_PROTOCOL_FEATURES: the back-end does not offer bit 12',
    ],
    ['in-band notifications', { inband: true }, { protocolFeatures: '29' }, 'does not offer bit 14'],
    ['STATUS', { status: true }, { features: '100000000' }, 'does not offer bit 16'],
  ])('%s are not there', async (_name, options, recording, message) => {
    await expect(session(options, recording)).rejects.toThrow(message)
  })

  test('packed rings have their parts, sizes and bases', async () => {
    const { session: one, journal } = await session({ packed: true, queueSize: 100, queues: 2 })
    const bases = payloads(journal(), 'SET_VRING_BASE').map((bytes) => [bytes.readUInt32LE(0), bytes.readUInt32LE(4)])
    expect(bases).toEqual([
      [0, PACKED_BASE],
      [1, PACKED_BASE],
    ])
    const [ring, driver, device] = one.queue(1).ring
    expect([ring.length, driver.length, device.length, ring.gpa % 16]).toEqual([1600, 4, 4, 0])
    // index, flags, descriptor, used, available, log
    const address = payloads(journal(), 'SET_VRING_ADDR')[1] as Buffer
    const uva = ({ gpa }: { gpa: number }): bigint => one.memory.uva(gpa)
    expect([8, 16, 24].map((at) => address.readBigUInt64LE(at))).toEqual([uva(ring), uva(device), uva(driver)])
  })

  test('the status goes the way of QEMU', async () => {
    const { session: one, journal } = await session({ status: true })
    one.close()
    expect(payloads(journal(), 'SET_STATUS').map((bytes) => bytes.readUInt32LE())).toEqual([3, 11, 15, 0])
  })

  test('a back-end that refuses the features', async () => {
    await expect(session({ status: true }, { status: 3 })).rejects.toThrow('refused the features')
  })
})

describe('in-flight tracking', () => {
  test('the area is asked for, mapped at its offset and handed back before the rings start', async () => {
    const { session: one, sent, journal } = await session({ inflight: true, queues: 2, queueSize: 64 })
    const names = sent()
    expect(names.indexOf('SET_INFLIGHT_FD')).toBe(names.indexOf('GET_INFLIGHT_FD') + 1)
    expect(names.indexOf('SET_INFLIGHT_FD')).toBeLessThan(names.indexOf('SET_VRING_NUM'))
    expect(one.inflight?.description).toEqual({ mmapSize: 65536n, mmapOffset: 4096n, numQueues: 2, queueSize: 64 })
    expect(one.inflight?.bytes.length).toBe(65536)
    const [handed] = payloads(journal(), 'SET_INFLIGHT_FD') as [Buffer]
    expect([handed.readBigUInt64LE(0), handed.readBigUInt64LE(8)]).toEqual([65536n, 4096n])
    expect(journal().find(({ request }) => requestName(request) === 'SET_INFLIGHT_FD')?.fds).toBe(1)
    expect(one.inflight?.queue(1).byteOffset).toBe(inflightRegionBytes(64, false))
    expect(() => one.inflight?.queue(2)).toThrow(RangeError)
  })

  test.each([
    [false, 256, 4160],
    [true, 256, 8256],
    [false, 1, 64],
    [true, 1, 64],
    [true, 2, 128],
  ])('bytes of a queue (packed %s, %i entries)', (packed, size, bytes) => {
    expect(inflightRegionBytes(size, packed)).toBe(bytes)
  })

  test('reads a split region', () => {
    const bytes = new Uint8Array(inflightRegionBytes(4, false))
    const view = new DataView(bytes.buffer)
    for (const [at, value] of [
      [8, 1],
      [10, 4],
      [12, 3],
      [14, 77],
    ] as const)
      view.setUint16(at, value, true)
    for (const [index, counter] of [
      [1, 9n],
      [3, 5n],
    ] as const) {
      view.setUint8(16 + 16 * index, 1)
      view.setUint16(16 + 16 * index + 6, 2, true)
      view.setBigUint64(16 + 16 * index + 8, counter, true)
    }
    const state = readInflight(bytes, false)
    expect(state).toMatchObject({ version: 1, descNum: 4, lastBatchHead: 3, usedIdx: 77 })
    expect(state.inflight).toMatchObject([
      { index: 3, next: 2, counter: 5n },
      { index: 1, counter: 9n },
    ])
  })

  test('reads a packed region', () => {
    const bytes = new Uint8Array(inflightRegionBytes(2, true))
    const view = new DataView(bytes.buffer)
    for (const [i, value] of [1, 2, 3, 4, 5, 6].entries()) view.setUint16(8 + 2 * i, value, true)
    bytes.set([1, 0], 20)
    const at = 32 + 32
    view.setUint8(at, 1)
    for (const [i, value] of [7, 8, 9].entries()) view.setUint16(at + 2 + 2 * i, value, true)
    view.setBigUint64(at + 8, 10n, true)
    view.setUint16(at + 16, 11, true)
    view.setUint16(at + 18, 12, true)
    view.setUint32(at + 20, 13, true)
    view.setBigUint64(at + 24, 14n, true)
    expect(readInflight(bytes, true)).toMatchObject({
      version: 1,
      descNum: 2,
      freeHead: 3,
      oldFreeHead: 4,
      usedIdx: 5,
      oldUsedIdx: 6,
      usedWrapCounter: 1,
      oldUsedWrapCounter: 0,
      inflight: [{ index: 1, next: 7, last: 8, num: 9, counter: 10n, id: 11, flags: 12, length: 13, address: 14n }],
    })
  })

  test('an area of its own is shared and stays the caller’s', async () => {
    const area = InflightArea.create(1, 256, false)
    onTestFinished(() => area.close())
    const { session: one, sent } = await session({ inflight: area })
    expect(sent()).toContain('SET_INFLIGHT_FD')
    expect(sent()).not.toContain('GET_INFLIGHT_FD')
    one.close()
    area.bytes[0] = 1
    expect(area.read(0).features).toBe(1n)
  })
})

describe('resume', () => {
  test.each([false, true])('hands over the same rings with the base that QEMU gives (packed: %s)', async (packed) => {
    const { session: one, journal, socket, sent } = await session({ inflight: true, packed, queues: 2, queueSize: 64 })
    const blk = new BlkDriver(one.queue(0), one.memory)
    blk.submit(0, 0, new Uint8Array(0), 512)
    // As if the device had used three before it died.
    if (!packed) new Uint16Array(one.queue(1).ring[2].region.buffer, one.queue(1).ring[2].offset)[1] = 3
    one.connection.close()
    const before = journal().length
    const two = Session.resume(socket, one)
    onTestFinished(() => two.close(true))
    expect(two.queues).toEqual(one.queues)
    expect([two.memory, two.inflight, two.features]).toEqual([one.memory, one.inflight, one.features])
    const again = journal().slice(before)
    expect(sent(before)).not.toContain('GET_INFLIGHT_FD')
    expect(sent(before).filter((name) => name.includes('VRING') || name.includes('INFLIGHT'))).toEqual([
      'SET_INFLIGHT_FD',
      ...Array.from({ length: 2 }, () =>
        ['NUM', 'BASE', 'ADDR', 'ERR', 'CALL', 'KICK', 'ENABLE'].map((part) => `SET_VRING_${part}`)
      ).flat(),
    ])
    const bases = payloads(again, 'SET_VRING_BASE').map((bytes) => bytes.readUInt32LE(4))
    expect(bases).toEqual(packed ? [PACKED_BASE, PACKED_BASE] : [0, 3])
    expect(payloads(again, 'SET_VRING_ADDR')).toEqual(payloads(journal().slice(0, before), 'SET_VRING_ADDR'))
    // The old one has nothing more to close.
    one.close()
    two.memory.region(0).bytes[0] = 1
    expect(blk.outstanding).toBe(1)
    expect(two.queue(0).driver.counters.kicks).toBe(2)
  })

  test('can be tried again when it fails', async () => {
    const { session: one, socket } = await session({ inflight: true })
    expect(() => Session.resume('/nonexistent', one)).toThrow(/cannot connect/)
    const refusing = await serveRecording({ ...ALL, refuse: [10] })
    expect(() => Session.resume(refusing.socket, one)).toThrow(/SET_VRING_BASE/)
    const less = await serveRecording({ ...ALL, features: '175000000' })
    expect(() => Session.resume(less.socket, one)).toThrow(/does not offer bit/)
    const two = Session.resume(socket, one)
    onTestFinished(() => two.close())
    expect(() => Session.resume(socket, one)).toThrow(/resumed already/)
  })

  test('is refused without an in-flight area', async () => {
    const socket = await serveFake('none')
    using one = Session.open(socket)
    expect(() => Session.resume(socket, one)).toThrow(
      expect.objectContaining({ request: 'resume', failure: 'unsupported' })
    )
  })

  test.skipIf(!hasQemu)('qemu-storage-daemon has no in-flight tracking', async () => {
    const { socket } = await serveWithQemu()
    expect(() => Session.open(socket, { inflight: true })).toThrow(/does not offer bit 12/)
  })
})

describe('migration', () => {
  test('logging is turned on and off while rings run', async () => {
    const { session: one, journal, sent } = await session({ queues: 2 })
    const log = new DirtyLogArea(one.memory, 8192)
    onTestFinished(() => log.close())
    const before = journal().length
    one.startLog(log, true)
    expect(sent(before)).toEqual(['SET_LOG_BASE', 'SET_LOG_FD', 'SET_FEATURES', 'SET_VRING_ADDR', 'SET_VRING_ADDR'])
    const on = journal().slice(before)
    const [base] = payloads(on, 'SET_LOG_BASE') as [Buffer]
    expect([base.readBigUInt64LE(0), base.readBigUInt64LE(8)]).toEqual([BigInt(log.size), 8192n])
    // 2 MiB + 64 MiB of address space.
    expect(log.size * 8 * 4096).toBeGreaterThanOrEqual(66 * 2 ** 20)
    expect(payloads(on, 'SET_FEATURES')[0]?.readBigUInt64LE()).toBe(one.features | (1n << 26n))
    const address = payloads(on, 'SET_VRING_ADDR')[1] as Buffer
    expect([address.readUInt32LE(0), address.readUInt32LE(4), address.readBigUInt64LE(32)]).toEqual([
      1,
      1,
      BigInt(one.queue(1).ring[2].gpa),
    ])
    one.stopLog()
    expect(sent(before).slice(5)).toEqual(['SET_FEATURES', 'SET_VRING_ADDR', 'SET_VRING_ADDR'])
    expect(payloads(journal(), 'SET_FEATURES').at(-1)?.readBigUInt64LE()).toBe(one.features)
    expect(payloads(journal(), 'SET_VRING_ADDR').at(-1)?.readUInt32LE(4)).toBe(0)
  })

  test('the log is taken out page by page', () => {
    const log = new DirtyLogArea(2 ** 30)
    onTestFinished(() => log.close())
    expect(log.size).toBe(2 ** 30 / 4096 / 8)
    const pages = [0, 1, 31, 32, 8191, 262143]
    for (const page of pages) log.bytes[page >> 3] = (log.bytes[page >> 3] as number) | (1 << (page & 7))
    expect([log.has(4096), log.has(2 * 4096), log.has(31 * 4096 + 5)]).toEqual([true, false, true])
    expect(log.take()).toEqual(pages)
    expect(log.take()).toEqual([])
  })

  test('the device state is read to its end, and written', async () => {
    const { session: one, journal } = await session({ queues: 0 })
    expect(Buffer.from(saveDeviceState(one.connection)).toString()).toBe(Buffer.alloc(100_000, 'state').toString())
    loadDeviceState(one.connection, Buffer.from('a state from elsewhere'))
    expect(payloads(journal(), 'SET_DEVICE_STATE_FD').map((bytes) => bytes.toString('hex'))).toEqual([
      '0000000000000000',
      '0100000000000000',
    ])
    expect(payloads(journal(), 'CHECK_DEVICE_STATE').map(String)).toEqual(['', 'a state from elsewhere'])
  })

  test.each([42, 43])('a back-end that refuses request %i', async (request) => {
    const { session: one } = await session({ queues: 0 }, { refuse: [request] })
    expect(() => saveDeviceState(one.connection)).toThrow(expect.objectContaining({ failure: 'nack' }))
  })

  test('a ring is stopped with what is in flight kept', async () => {
    const { session: one, journal } = await session({ inflight: true })
    expect(one.connection.protocolFeatures & (1n << 20n)).not.toBe(0n)
    one.stop(true)
    one.stop()
    expect(payloads(journal(), 'GET_VRING_BASE').map((bytes) => bytes.readUInt32LE(4))).toEqual([1, 0])
  })
})

/** struct vhost_iotlb_msg. */
function iotlb(iova: number, permissions: number, type: number): string {
  const bytes = Buffer.alloc(32)
  bytes.writeBigUInt64LE(BigInt(iova), 0)
  bytes.writeUInt8(permissions, 24)
  bytes.writeUInt8(type, 25)
  return bytes.toString('hex')
}

describe('the vIOMMU', () => {
  test('rings and buffers are told by addresses that are neither guest-physical nor user addresses', async () => {
    const { session: one, journal } = await session({ iommu: true })
    const { iommu } = one
    const [ring] = one.queue().ring
    const iova = payloads(journal(), 'SET_VRING_ADDR')[0]?.readBigUInt64LE(8)
    expect(iova).toBe(BigInt(iommu.translate(ring.gpa)))
    expect([BigInt(ring.gpa), one.memory.uva(ring.gpa)]).not.toContain(iova)
    const blk = new BlkDriver(one.queue(), one.memory)
    blk.submit(0, 0, new Uint8Array(0), 512)
    const descriptor = new DataView(ring.region.buffer, ring.offset)
    expect(Number(descriptor.getBigUint64(0, true))).toBeGreaterThan(0x10_0000_0000)
  })

  test('a miss is answered while another request is waited for', async () => {
    const iova = 0x10_0000_5678
    const { session: one, journal } = await session(
      { iommu: { granule: 4096 } },
      { ask: { 11: { request: 1, payload: iotlb(iova, 3, 1), update: true } } }
    )
    expect(one.queue().stop()).toBe(0)
    // The answer to the update, which came behind that of GET_VRING_BASE, is not taken for another one's.
    expect(one.connection.getQueueNum()).toBe(4)
    expect(one.iommu).toMatchObject({ misses: 1, updates: 1, faults: 0 })
    const [update] = payloads(journal(), 'IOTLB_MSG') as [Buffer]
    const gpa = one.memory.region(0).gpa + 0x5000
    expect([0, 8, 16].map((at) => update.readBigUInt64LE(at))).toEqual([0x10_0000_5000n, 4096n, one.memory.uva(gpa)])
    expect([update[24], update[25], update.length]).toEqual([3, 2, 32])
    const answers = journal().filter(({ channel }) => channel === 'backend')
    expect(answers.map(({ payload, flags }) => [payload, flags & 4])).toEqual([['0000000000000000', 4]])
  })

  test('a refused update is found out, however late its answer comes', async () => {
    const { session: one } = await session(
      { iommu: true },
      { ask: { 11: { request: 1, payload: iotlb(0x10_0000_0000, 1, 1), update: true } }, refuse: [22] }
    )
    one.queue().stop()
    expect(() => one.connection.getQueueNum()).toThrow(
      expect.objectContaining({ request: 'IOTLB_MSG', failure: 'nack' })
    )
  })

  test.each([
    ['mapped nowhere', 64, 1],
    ['not mapped for that', 0x10_0000_0000, 2],
  ])('what is %s is a fault', async (_name, iova, permissions) => {
    const { session: one, journal } = await session(
      { iommu: true },
      { ask: { 11: { request: 1, payload: iotlb(iova, permissions, 1) } } }
    )
    const [mapping] = one.iommu.mappings.splice(0)
    if (mapping !== undefined) one.iommu.map({ ...mapping, permissions: 1 })
    one.queue().stop()
    expect(one.iommu).toMatchObject({ misses: 1, faults: 1, updates: 0 })
    const answers = journal().filter(({ channel }) => channel === 'backend')
    expect(answers.map(({ payload }) => payload)).toEqual(['0100000000000000'])
  })

  test('misses can be left for later', async () => {
    const { session: one, journal } = await session(
      { iommu: true },
      { ask: { 11: { request: 1, payload: iotlb(0x10_0000_0000, 3, 1) } } }
    )
    one.iommu.answering = false
    one.queue().stop()
    expect(payloads(journal(), 'IOTLB_MSG')).toEqual([])
    one.iommu.answerLate(one.connection)
    expect([payloads(journal(), 'IOTLB_MSG').length, one.iommu.answering, one.iommu.updates]).toEqual([1, true, 1])
  })

  test('invalidation', async () => {
    const { session: one, journal } = await session({ iommu: true })
    one.iommu.unmap(one.connection, 0x10_0000_0000, 2 ** 30)
    const [message] = payloads(journal(), 'IOTLB_MSG') as [Buffer]
    expect([message.readBigUInt64LE(0), message.readBigUInt64LE(8), message[25]]).toEqual([
      0x10_0000_0000n,
      2n ** 30n,
      3,
    ])
    expect(() => one.iommu.translate(one.memory.region(0).gpa)).toThrow(RangeError)
  })
})

describe('in-band notifications', () => {
  test('kicks are messages, and so are calls', async () => {
    const call = Buffer.from(new Uint8Array(Uint32Array.of(1, 0).buffer)).toString('hex')
    const {
      session: one,
      sent,
      journal,
    } = await session({ inband: true, queues: 2, mode: 'irq' }, { ask: { 17: { request: 4, payload: call } } })
    expect(sent()).not.toContain('SET_VRING_KICK')
    expect(sent()).not.toContain('SET_VRING_CALL')
    expect(payloads(journal(), 'VRING_KICK').map((bytes) => bytes.readUInt32LE(0))).toEqual([0, 1])
    one.queue(1).driver.kickRaw()
    expect(payloads(journal(), 'VRING_KICK').length).toBe(3)
    one.connection.getQueueNum()
    expect([one.queue(0).takeCalls(), one.queue(1).waitForCall(1000), one.queue(1).takeCalls()]).toEqual([0, 1, 0])
  })

  test('an error of a ring', async () => {
    const err = Buffer.from(new Uint8Array(Uint32Array.of(0, 0).buffer)).toString('hex')
    const { session: one } = await session({ inband: true, queues: 1 }, { ask: { 36: { request: 5, payload: err } } })
    expect(one.queue().broken()).toBe(false)
    one.connection.getMaxMemSlots()
    expect(one.queue().broken()).toBe(true)
  })
})

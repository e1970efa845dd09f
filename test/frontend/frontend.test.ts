/** Histogram, memory, wire and the commands probe and bench. */
import { describe, expect, onTestFinished, test } from 'vitest'
import { bench, formatBench } from '../../src/frontend/bench.ts'
import { BlkDriver } from '../../src/frontend/blk.ts'
import { CASES, type CompareCase, formatComparison, median, OWN_CASES } from '../../src/frontend/compare.ts'
import { Connection, payload64 } from '../../src/frontend/connection.ts'
import { FrontendError } from '../../src/frontend/errors.ts'
import { guessDevice, nameFeatures } from '../../src/frontend/feature-names.ts'
import { Histogram } from '../../src/frontend/histogram.ts'
import { GuestMemory, layouts } from '../../src/frontend/memory.ts'
import { formatProbe, probe, probeJson } from '../../src/frontend/probe.ts'
import { Session } from '../../src/frontend/session.ts'
import { native } from '../../src/native.ts'
import { decodeBlkConfig } from '../../src/virtio/blk.ts'
import { hasQemu, serveFake, serveWithQemu } from './support.ts'

describe('Histogram', () => {
  test('percentiles are exact below 128 and within 1.6 % above', () => {
    const histogram = new Histogram()
    for (let i = 1; i <= 100; i++) histogram.record(i)
    expect([0.01, 0.5, 0.9, 0.99, 1].map((f) => histogram.percentile(f))).toEqual([1, 50, 90, 99, 100])
    expect(histogram.mean).toBe(50.5)
  })

  test.each([1000, 123_456, 2 ** 30 - 1, 2 ** 30, 5e9, 2 ** 39 + 12345])('one value of %d', (value) => {
    const histogram = new Histogram()
    histogram.record(value)
    histogram.record(value * 1.5)
    expect(histogram.percentile(0.5) / value).toBeGreaterThanOrEqual(0.999)
    expect(histogram.percentile(0.5) / value).toBeLessThan(1.017)
    expect(histogram.percentile(1)).toBe(value * 1.5)
  })

  test('is monotonic over the whole range, and takes what is beyond', () => {
    let last = 0
    for (let value = 1; value < 2 ** 42; value = Math.ceil(value * 1.01)) {
      const histogram = new Histogram()
      histogram.record(value)
      histogram.record(2 ** 50)
      const p50 = histogram.percentile(0.5)
      expect(p50).toBeGreaterThanOrEqual(last)
      last = p50
    }
  })

  test('is empty after reset', () => {
    const histogram = new Histogram()
    histogram.record(5)
    histogram.reset()
    expect([histogram.count, histogram.percentile(0.5), histogram.max, histogram.mean]).toEqual([0, 0, 0, 0])
  })
})

describe('GuestMemory', () => {
  test('a buffer over two adjacent regions is written and read in parts', () => {
    const memory = new GuestMemory(layouts.adjacent(65536))
    onTestFinished(() => memory.close())
    const border = memory.region(1).gpa
    const data = Uint8Array.from({ length: 100 }, (_, i) => i)
    memory.write(border - 40, data)
    expect(memory.read(border - 40, 100)).toEqual(data)
    expect(memory.region(0).bytes.subarray(65536 - 40)).toEqual(data.subarray(0, 40))
    expect(() => memory.at(border - 40, 100)).toThrow(RangeError)
    expect(memory.uva(border)).toBe(BigInt(memory.region(1).uva))
  })

  test('allocation keeps alignment and skew, and ends with the region', () => {
    const memory = new GuestMemory(layouts.single(65536))
    onTestFinished(() => memory.close())
    expect(memory.allocate(10, 4096).offset % 4096).toBe(0)
    expect(memory.allocate(10, 512, 0, 3).offset % 512).toBe(3)
    expect(() => memory.allocate(65536)).toThrow(/no room/)
  })
})

describe('Connection', () => {
  /** A connection and its other end, where a test plays the back-end by writing the replies beforehand. */
  function pair(): { connection: Connection; peer: number } {
    const fds = new Int32Array(2)
    native.socketpair(fds)
    const connection = Connection.fromFd(fds[0] ?? -1, { timeoutMs: 100 })
    const peer = fds[1] ?? -1
    onTestFinished(() => {
      connection.close()
      native.close(peer)
    })
    return { connection, peer }
  }
  const message = (request: number, flags: number, payload: Uint8Array): Uint8Array =>
    Buffer.concat([new Uint8Array(Uint32Array.of(request, flags, payload.length).buffer), payload])
  const write = (peer: number, bytes: Uint8Array): unknown =>
    native.sendMessage(peer, bytes, 0, bytes.length, new Int32Array(1), 0, true)
  const sent = (peer: number): { bytes: Uint8Array; fds: number } => {
    const [bytes, fds] = [new Uint8Array(4096), new Int32Array(18)]
    const count = native.recvMessage(peer, bytes, 0, bytes.length, fds)
    for (let i = 0; i < (fds[0] ?? 0); i++) native.close(fds[2 + i] ?? -1)
    return { bytes: bytes.subarray(0, Math.max(0, count)), fds: fds[0] ?? 0 }
  }

  test('a request and its reply', () => {
    const { connection, peer } = pair()
    write(peer, message(1, 5, payload64(0x1234_5678_9abc_def0n)))
    expect(connection.getFeatures()).toBe(0x1234_5678_9abc_def0n)
    expect(Buffer.from(sent(peer).bytes).toString('hex')).toBe('010000000100000000000000')
  })

  test('a reply in pieces', () => {
    const { connection, peer } = pair()
    for (const byte of message(17, 5, payload64(4n))) write(peer, Uint8Array.of(byte))
    expect(connection.getQueueNum()).toBe(4)
  })

  test('NEED_REPLY is set once REPLY_ACK is negotiated, and a refusal names the request', () => {
    const { connection, peer } = pair()
    connection.setVringNum(1, 256)
    expect(new DataView(sent(peer).bytes.buffer).getUint32(4, true)).toBe(1)
    connection.setProtocolFeatures(1n << 3n)
    sent(peer)
    write(peer, message(8, 5, payload64(7n)))
    expect(() => connection.setVringNum(1, 256)).toThrow(
      expect.objectContaining({ request: 'SET_VRING_NUM', failure: 'nack', value: 7n })
    )
    expect(new DataView(sent(peer).bytes.buffer).getUint32(4, true)).toBe(9)
  })

  test('memory regions travel with their files', () => {
    const { connection, peer } = pair()
    const memory = new GuestMemory(layouts.adjacent(65536))
    onTestFinished(() => memory.close())
    connection.setMemTable(
      memory.regions.map((region) => ({
        guestAddress: BigInt(region.gpa),
        size: BigInt(region.size),
        userAddress: BigInt(region.uva),
        mmapOffset: BigInt(region.offset),
        fd: region.fd,
      }))
    )
    const { bytes, fds } = sent(peer)
    expect([bytes.length, fds]).toEqual([12 + 8 + 64, 2])
    const view = new DataView(bytes.buffer, 12)
    expect([view.getUint32(0, true), view.getBigUint64(8, true), view.getBigUint64(40, true)]).toEqual([
      2,
      2n ** 30n,
      2n ** 30n + 65536n,
    ])
  })

  test.each([
    ['no answer', undefined, 'timeout'],
    ['an answer to something else', message(2, 5, payload64(0n)), 'reply'],
    ['an answer without the reply flag', message(1, 1, payload64(0n)), 'reply'],
    ['an answer of 4 bytes', message(1, 5, new Uint8Array(4)), 'reply'],
    ['an answer of a gigabyte', new Uint8Array(Uint32Array.of(1, 5, 2 ** 30).buffer), 'reply'],
  ])('%s', (_name, bytes, failure) => {
    const { connection, peer } = pair()
    if (bytes) write(peer, bytes)
    expect(() => connection.getFeatures()).toThrow(expect.objectContaining({ request: 'GET_FEATURES', failure }))
  })

  test('a back-end that hangs up', () => {
    const { connection, peer } = pair()
    native.shutdown(peer)
    expect(() => connection.getFeatures()).toThrow(expect.objectContaining({ failure: 'closed' }))
  })

  test('an empty config reply is a refusal', () => {
    const { connection, peer } = pair()
    write(peer, message(24, 5, new Uint8Array(0)))
    expect(connection.getConfig(0, 60)).toBeUndefined()
  })
})

describe('names', () => {
  test('unknown bits keep their numbers', () => {
    expect(nameFeatures((1n << 2n) | (1n << 45n), 'blk').map((one) => one.name)).toEqual([
      'VIRTIO_BLK_F_SEG_MAX',
      'bit 45',
    ])
  })
  test('devices are guessed', () => {
    expect(guessDevice(0x1_7500_7e46n, true)).toBe('blk')
    expect(guessDevice(0x1_0001_8003n, false)).toBe('net')
    expect(guessDevice(1n << 32n, false)).toBe('unknown')
  })
  test('config fields without their feature are left out', () => {
    const bytes = new Uint8Array(60).fill(1)
    expect(decodeBlkConfig(bytes, 0n)).toEqual({ capacity: 0x0101_0101_0101_0101n })
    expect(decodeBlkConfig(bytes, 1n << 6n).blkSize).toBe(0x0101_0101)
    expect(() => decodeBlkConfig(new Uint8Array(7))).toThrow(RangeError)
  })
})

describe('bench', () => {
  test('counts what it did, and its figures hang together', async () => {
    const result = bench(await serveFake('none'), { rw: 'randrw', qd: 4, seconds: 0.3, warmup: 0.05, driver: 'irq' })
    expect(result.requests).toBeGreaterThan(10)
    expect(result.errors).toBe(0)
    expect(result.iops).toBeCloseTo(result.requests / result.seconds, 3)
    expect(result.latency.p50).toBeLessThanOrEqual(result.latency.p99)
    expect(result.latency.max).toBeGreaterThanOrEqual(result.latency.p999)
    // Little's law: requests in flight = throughput × latency.
    expect((result.iops * result.latency.mean) / 1e6).toBeGreaterThan(3)
    expect((result.iops * result.latency.mean) / 1e6).toBeLessThan(5)
    expect(result.cpuPerRequest).toBeGreaterThan(0)
    expect(formatBench(result)).toContain('IOPS')
  })

  test('options that do not fit the disk are refused', async () => {
    const socket = await serveFake('none')
    expect(() => bench(socket, { bs: 1000 })).toThrow(/^bs: /)
    expect(() => bench(socket, { qd: 0 })).toThrow(/^qd: /)
    expect(() => bench(socket, { queues: 2 })).toThrow(/^queues: /)
    expect(() => bench(socket, { bs: 2 ** 23 })).toThrow(/^size: /)
    expect(() => bench('/nonexistent')).toThrow(FrontendError)
  })
})

describe.skipIf(!hasQemu)('qemu-storage-daemon', () => {
  test('probe', async () => {
    const { socket } = await serveWithQemu(3)
    const result = probe(socket)
    expect(result).toMatchObject({ device: 'blk', guessed: true, queues: 3, peer: { program: 'qemu-storage-daemon' } })
    expect(result.blk).toMatchObject({ capacity: 16384n, blkSize: 512, numQueues: 3 })
    expect(formatProbe(result)).toContain('VIRTIO_F_EVENT_IDX')
    expect(JSON.parse(probeJson(result))).toMatchObject({ blk: { capacity: '16384' } })
  })

  test.each(['poll', 'irq'] as const)('bench, %s driver, two queues', async (driver) => {
    const { socket } = await serveWithQemu(2)
    const result = bench(socket, { driver, queues: 2, qd: 8, seconds: 0.5, warmup: 0.1, indirect: true })
    expect(result).toMatchObject({ errors: 0, backend: 'qemu-storage-daemon', indirect: true })
    expect(result.iops).toBeGreaterThan(1000)
    if (driver === 'poll') expect(result.callsPerRequest).toBeLessThan(0.01)
    else expect(result.callsPerRequest).toBeGreaterThan(0)
  })

  test('a writing bench refuses a read-only disk', async () => {
    const { socket } = await serveWithQemu(1, false)
    expect(() => bench(socket, { rw: 'randwrite' })).toThrow(/read-only/)
  })

  test.each(['poll', 'irq'] as const)('requests, %s', async (mode) => {
    const { socket, image } = await serveWithQemu()
    using session = Session.open(socket, { mode, queues: 2 })
    const blk = new BlkDriver(session.queue(1), session.memory)
    expect(Buffer.compare(blk.read(8, 8192), image.subarray(4096, 4096 + 8192))).toBe(0)
    const data = new Uint8Array(1024).fill(7)
    blk.write(100, data)
    blk.flush()
    expect(blk.read(100, 1024)).toEqual(data)
    expect(blk.getId()).toBe('vhost_user_blk')
    expect(() => blk.read(2 ** 40, 512)).toThrow(/IOERR/)
  })
})

describe('the comparison', () => {
  test.each([
    [[3, 1, 2], 2],
    [[4, 1, 2, 3], 2.5],
    [[7], 7],
  ])('median of %j', (values, expected) => {
    expect(median(values)).toBe(expected)
  })

  test('virtiod beside itself has a table of its own', () => {
    const one = (iops: number, cpuPerRequest: number): never =>
      ({ iops, cpuPerRequest, latency: { p50: 1, p99: 2 } }) as never
    const inflight = OWN_CASES.find(({ name }) => name === 'inflight-randread-4k-qd32-poll') as CompareCase
    expect(inflight.options).toEqual({ ...inflight.against, inflight: true })
    expect(new Set([...CASES, ...OWN_CASES].map(({ name }) => name)).size).toBe(CASES.length + OWN_CASES.length)
    const page = formatComparison(
      {
        names: ['a', 'b'],
        cases: [
          { case: inflight, rounds: [[one(96_000, 1.06), one(100_000, 1)]] },
          { case: { name: 'log', options: {}, against: {} }, rounds: [[one(1, 1), one(2, 1)]] },
        ],
        fio: [],
        start: [],
        load: 0,
      },
      { rounds: 1, seconds: 1, size: 2 ** 30, cpu: { backend: 1, frontend: 0 }, built: false, indirect: false }
    )
    expect(page).toContain('# a with a feature and without')
    expect(page).not.toContain('on the same file')
    expect(page).toContain('**0.96** (0.96–0.96) | ≥ 0.95 ✓')
    expect(page).toContain('**1.06** (1.06–1.06) ≤ 1.05 ✗')
    expect(page).toMatch(/\| log \|.*\*\*0.50\*\* \(0.50–0.50\) \| {2}\|/)
  })

  test('ratios are taken within a round', () => {
    const one = (iops: number, cpuPerRequest: number): never =>
      ({ iops, cpuPerRequest, latency: { p50: 1, p99: 2 } }) as never
    const page = formatComparison(
      {
        names: ['a', 'b'],
        cases: [
          {
            case: { name: 'randread-4k-qd32-poll', options: {}, goal: 2, cpuGoal: 0.5 },
            rounds: [
              [one(300_000, 1), one(100_000, 4)],
              [one(900_000, 2), one(450_000, 4)],
              [one(500_000, 3), one(200_000, 4)],
            ],
          },
        ],
        fio: [
          { iops: 300_000, cpuPerRequest: 1 },
          { iops: 900_000, cpuPerRequest: 1 },
          { iops: 1_000_000, cpuPerRequest: 1 },
        ],
        start: [],
        load: 0,
      },
      { rounds: 3, seconds: 1, size: 2 ** 30, cpu: { backend: 1, frontend: 0 }, built: false, indirect: false }
    )
    expect(page).toContain('**2.50** (2.00–3.00) | ≥ 2 ✓')
    expect(page).toContain('**0.50** (0.25–0.75) ≤ 0.5 ✓')
    expect(page).toContain('**1.00** (0.50–1.00), goal ≥ 0.9 ✓')
  })
})

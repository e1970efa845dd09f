/**
 * The net front-end against other implementations: every byte that goes through a back-end comes out again. testpmd keeps
 * the front-end honest; the table of wires runs over virtiod's switch as well.
 */
import { afterAll, describe, expect, onTestFinished, test } from 'vitest'
import { NetDriver, type NetDriverOptions } from '../../src/frontend/net.ts'
import { formatNetBench, type NetBenchOptions, type NetBenchResult, netBench } from '../../src/frontend/net-bench.ts'
import { withDependents } from '../../src/frontend/net-features.ts'
import { announcement, tcpFrame, tcpGsoHeader, udpFrame } from '../../src/frontend/net-frames.ts'
import { deviceAt, probe } from '../../src/frontend/probe.ts'
import { Session, type SessionOptions } from '../../src/frontend/session.ts'
import * as net from '../../src/virtio/net.ts'
import { type BackendTestpmdOptions, Testpmd } from '../dpdk.ts'
import { dpdkMissing, endSharedTestpmd, sharedTestpmd, type Wire, wires } from './net-peers.ts'

const A = Uint8Array.of(2, 0, 0, 0, 0, 1)
const B = Uint8Array.of(2, 0, 0, 0, 0, 2)
/** The machine may be busy with other tests' guests. */
const PATIENCE = { timeoutMs: 20_000 }

/**
 * Runs a bench until packets came through: on a machine that is busy with other tests the back-end may not get a processor
 * in the time that is measured.
 */
function benchUntilSome(sockets: Parameters<typeof netBench>[0], options: NetBenchOptions): NetBenchResult {
  const deadline = performance.now() + 20_000
  for (;;) {
    const result = netBench(sockets, { seconds: 0.3, warmup: 0.1, ...PATIENCE, ...options })
    if ((result.sent !== 0 && result.received !== 0) || performance.now() > deadline) return result
  }
}

function open(
  socket: string,
  without: readonly number[],
  options: NetDriverOptions,
  rings: Pick<SessionOptions, 'packed' | 'inOrder'> = {}
): NetDriver {
  const session = Session.open(socket, {
    queues: 0,
    withoutFeatures: withDependents(...without),
    ...rings,
    ...PATIENCE,
  })
  onTestFinished(() => session.close())
  // As with QEMU the control queue is the front-end's own (DPDK offers it and never looks at it).
  return new NetDriver(session, { control: false, ...PATIENCE, ...options })
}

interface Variant {
  readonly name: string
  readonly without: readonly number[]
  readonly options?: NetDriverOptions
  readonly rings?: Pick<SessionOptions, 'packed' | 'inOrder'>
}

const VARIANTS: readonly Variant[] = [
  { name: 'merged buffers', without: [] },
  { name: 'merged buffers of 128 bytes', without: [], options: { rxBufferSize: 128, rxBuffers: 200 } },
  { name: 'no merged buffers', without: [net.VIRTIO_NET_F_MRG_RXBUF] },
  { name: 'a header of 10 bytes', without: [net.VIRTIO_NET_F_MRG_RXBUF, 32] },
  { name: 'flags instead of EVENT_IDX, called', without: [29], options: { mode: 'irq' } },
  { name: 'EVENT_IDX, called', without: [], options: { mode: 'irq' } },
  { name: 'a small ring', without: [], options: { queueSize: 8, rxBuffers: 8 } },
  { name: 'two pairs', without: [], options: { pairs: 2 } },
  { name: 'packed rings', without: [], rings: { packed: true } },
  { name: 'packed rings, EVENT_IDX, called', without: [], options: { mode: 'irq' }, rings: { packed: true } },
  { name: 'packed rings, flags, called', without: [29], options: { mode: 'irq' }, rings: { packed: true } },
  { name: 'small packed rings', without: [], options: { queueSize: 8, rxBuffers: 8 }, rings: { packed: true } },
  { name: 'in order', without: [], options: { queueSize: 16, rxBuffers: 16 }, rings: { inOrder: true } },
  {
    name: 'packed and in order',
    without: [],
    options: { queueSize: 16, rxBuffers: 16 },
    rings: { packed: true, inOrder: true },
  },
]

const udp = (size: number, seed: number): Uint8Array =>
  udpFrame({ size, source: A, destination: B, seed, sourcePort: 1024 + (seed % 7) })

afterAll(endSharedTestpmd)

const SIZES = [60, 61, 64, 115, 116, 117, 128, 500, 1513, 1514]

test.runIf(wires.length === 0)('no network back-end to test with', () => {
  expect(dpdkMissing).toBeTypeOf('string')
})

describe.each(wires)('between two sockets of $name', (wire: Wire) => {
  /** Both ends, each known to the other. */
  async function connect(variant: Variant, tso = false): Promise<{ a: NetDriver; b: NetDriver }> {
    const sockets = await wire.start({ pairs: variant.options?.pairs ?? 1, tso })
    const options = { laxNumBuffers: wire.laxNumBuffers, ...variant.options }
    const [a, b] = sockets.map((socket) => open(socket, variant.without, options, variant.rings)) as [
      NetDriver,
      NetDriver,
    ]
    b.send(announcement(B, 2))
    expect(a.receive().frame).toEqual(announcement(B, 2))
    return { a, b }
  }

  test.each(VARIANTS)('$name', async (variant) => {
    const { a, b } = await connect(variant)
    for (const [i, size] of [...SIZES, ...SIZES].entries()) {
      const frame = udp(size, i)
      a.send(frame, { queue: i % a.pairs })
      const got = b.receive()
      expect(got.frame).toEqual(frame)
      expect(got.header).toMatchObject({ flags: 0, gsoType: 0 })
      const buffers = Math.ceil((b.headerSize + size) / b.rxBufferSize)
      expect([size, got.buffers]).toEqual([size, buffers])
    }
    a.sent()
    expect(b.tryReceive(20)).toBeUndefined()
  })

  test('packets cut in any way', async () => {
    const { a, b } = await connect({ name: '', without: [], options: { queueSize: 128 } })
    const cuts: readonly (readonly number[])[] = [
      [12, 100],
      [5, 7, 100],
      [13, 99],
      [26, 86],
      [112],
      [12, 14, 20, 8, 58],
      [12, ...new Array<number>(100).fill(1)],
    ]
    for (const indirect of [false, true]) {
      for (const [i, cut] of cuts.entries()) {
        a.send(udp(100, i), { cuts: cut, indirect })
        expect(b.receive().frame).toEqual(udp(100, i))
      }
    }
  })

  test('a full ring of packets at once, in order', async () => {
    const { a, b } = await connect({ name: '', without: [], options: { queueSize: 64, rxBuffers: 64 } })
    for (let round = 0; round < 4; round++) {
      for (let i = 0; i < 32; i++) a.send(udp(200, i), { publish: false })
      a.publish()
      for (let i = 0; i < 32; i++) expect(b.receive().frame).toEqual(udp(200, i))
      a.sent()
    }
  })

  test.each([
    ['poll, one way', {}],
    ['poll, both ways', { both: true }],
    ['called, flags', { driver: 'irq', noEventIdx: true }],
    ['called, EVENT_IDX', { driver: 'irq' }],
    ['frames of 1514 bytes, not merged', { frameSize: 1514, noMergeable: true }],
    ['headers apart', { splitHeader: true, frameSize: 200 }],
    ['8 flows on two pairs', { queues: 2, flows: 8 }],
    ['packed rings', { packed: true }],
    ['packed rings, called, EVENT_IDX', { packed: true, driver: 'irq', both: true }],
    ['packed rings, called, flags', { packed: true, driver: 'irq', noEventIdx: true }],
    ['packed rings, headers apart', { packed: true, splitHeader: true }],
  ] as const)('bench: %s', async (_name, options) => {
    const sockets = await wire.start({ pairs: 'queues' in options ? options.queues : 1 })
    const result = benchUntilSome(sockets, options)
    const { sent = 0, received = 0, lost = 1 } = result
    expect(result.traffic).toBe('both' in options ? 'both' : 'forward')
    expect(sent).toBeGreaterThan(0)
    expect(received).toBeGreaterThan(0)
    expect(lost).toBeLessThan(1)
    expect(result.packetsPerSecond).toBeCloseTo(received / result.seconds, 3)
    expect(result.gbitPerSecond * 1e9).toBeCloseTo(result.packetsPerSecond * result.frameSize * 8, -2)
    expect(result.mergeable).toBe(!('noMergeable' in options))
    expect(result.packed).toBe('packed' in options)
    expect(formatNetBench(result)).toMatch(/packets\/s .* Gbit\/s\n +packets +sent .* received .* lost/)
    expect(formatNetBench({ ...result, received: 0 })).toMatch(/nothing came through/)
    if (options !== undefined && 'driver' in options) expect(result.eventIdx).toBe(!('noEventIdx' in options))
  })

  test.each([1514, 1515, 4000, 30_000, 65_549])('a TCP frame of %i bytes, unsegmented', async (size) => {
    const { a, b } = await connect({ name: '', without: [] }, true)
    const frame = tcpFrame({ size, source: A, destination: B })
    const header = tcpGsoHeader(size)
    a.send(frame, { header })
    const got = b.receive()
    expect(got.header).toMatchObject({ flags: 1, csumStart: 34, csumOffset: 16, gsoType: header.gsoType ?? 0 })
    if (header.gsoType !== undefined) expect(got.header.gsoSize).toBe(1448)
    if (wire.rewritesGsoChecksum && header.gsoType !== undefined) frame.set(got.frame.subarray(50, 52), 50)
    expect(Buffer.compare(got.frame, frame)).toBe(0)
    expect(got.buffers).toBe(Math.ceil((12 + size) / 2048))
  })

  test('bench: frames to be segmented arrive whole', async () => {
    const sockets = await wire.start({ tso: true })
    const result = benchUntilSome(sockets, { frameSize: 65_549, queueSize: 1024 })
    expect(result).toMatchObject({ gso: true, frameSize: 65_549 })
    expect(result.received).toBeGreaterThan(0)
    expect(result.gbitPerSecond * 1e9).toBeCloseTo(result.packetsPerSecond * 65_549 * 8, -2)
  })
})

describe.skipIf(dpdkMissing !== undefined)('testpmd with one port', () => {
  const serve = async (options: BackendTestpmdOptions): Promise<string> =>
    (await sharedTestpmd(options)).sockets[0] as string

  /** One of its own, whose statistics count this test alone. */
  async function own(options: BackendTestpmdOptions): Promise<Testpmd & { socket: string }> {
    await endSharedTestpmd()
    const child = await Testpmd.backend(options)
    onTestFinished(() => child[Symbol.asyncDispose]())
    return Object.assign(child, { socket: child.sockets[0] as string })
  }

  test('bench: echo', async () => {
    const socket = await serve({ mode: 'macswap', queues: 1 })
    const result = benchUntilSome([socket], { traffic: 'echo' })
    expect(result.received).toBeGreaterThan(0)
    expect(result.lost).toBeLessThan(1)
  })

  test.each(VARIANTS)('macswap: $name', async (variant) => {
    const socket = await serve({ mode: 'macswap', queues: variant.options?.pairs ?? 1 })
    const driver = open(socket, variant.without, { laxNumBuffers: true, ...variant.options }, variant.rings)
    for (const [i, size] of [...SIZES, ...SIZES].entries()) {
      driver.send(udp(size, i), { queue: i % driver.pairs })
      const { frame, queue } = driver.receive()
      // Destination and source have changed places; testpmd answers on the pair that it was asked on.
      const swapped = Uint8Array.from([...frame.subarray(6, 12), ...frame.subarray(0, 6), ...frame.subarray(12)])
      expect(swapped).toEqual(udp(size, i))
      expect(queue).toBe(i % driver.pairs)
    }
  })

  test('rxonly gets as many as were sent', async () => {
    const child = await own({ mode: 'rxonly' })
    const driver = open(child.socket, [], {})
    for (let i = 0; i < 1000; i++) {
      driver.send(udp(60 + i, i), { header: new Uint8Array(12) })
      driver.sent()
    }
    await child.stop()
    expect(child.totals().received).toBe(1000)
  })

  test('bench into rxonly', async () => {
    const child = await own({ mode: 'rxonly' })
    const result = benchUntilSome([child.socket], {})
    expect(result).toMatchObject({ traffic: 'tx', backend: 'dpdk-testpmd' })
    expect(result.received).toBeUndefined()
    expect(result.lost).toBeUndefined()
    expect(result.cpuPerPacket).toBeGreaterThan(0)
    // A device that polls wants no kicks, and a driver that polls no calls.
    expect(result.kicksPerPacket).toBeLessThan(0.1)
    expect(result.callsPerPacket).toBeLessThan(0.1)
    await child.stop()
    expect(child.totals().received).toBeGreaterThanOrEqual(result.sent ?? Number.NaN)
  })

  test.each([
    [[64], {}],
    [[64, 512, 900], {}],
    [[64, 512, 900], { noMergeable: true }],
    [[2000, 2000], {}],
  ])('bench out of txonly, segments of %j, %j', async (txSegments, options) => {
    const socket = await serve({ mode: 'txonly', txSegments })
    const result = benchUntilSome([socket], { traffic: 'rx', ...options })
    const bytes = txSegments.reduce((sum, length) => sum + length, 0)
    expect(result.received).toBeGreaterThan(0)
    expect((result.gbitPerSecond * 1e9) / 8 / result.packetsPerSecond).toBeCloseTo(bytes, 3)
    expect(result.sent).toBeUndefined()
  })

  test('bench: what does not fit is refused', async () => {
    const socket = await serve({ mode: 'rxonly' })
    const run = (options: object) => () => netBench([socket], { ...PATIENCE, ...options })
    expect(run({ frameSize: 1519 })).toThrow(/^frame-size: .*HOST_TSO4/)
    expect(run({ frameSize: 63 })).toThrow(/^frame-size: /)
    expect(run({ frameSize: 65_550 })).toThrow(/^frame-size: /)
    expect(run({ queueSize: 100 })).toThrow(/^queue-size: /)
    expect(run({ flows: 257 })).toThrow(/^flows: /)
    expect(run({ queues: 1000 })).toThrow(/^queues: /)
    expect(run({ macs: ['02:00:00:00:00:01', '01:00:5e:00:00:01'] })).toThrow(/^peer-mac: /)
    expect(() => netBench(['/nonexistent'])).toThrow(/cannot connect/)
  })

  test('probe', async () => {
    const socket = await serve({ mode: 'rxonly' })
    expect(deviceAt(socket)).toBe('net')
    const result = probe(socket)
    expect(result).toMatchObject({ device: 'net', peer: { program: 'dpdk-testpmd' } })
    expect(result.featureNames.map(({ name }) => name)).toContain('VIRTIO_NET_F_GUEST_ANNOUNCE')
  })
})

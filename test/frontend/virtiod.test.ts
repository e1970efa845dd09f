/**
 * The front-end against virtiod: every format and option with real requests, and a session that goes on after a crash.
 */
import { describe, expect, onTestFinished, test } from 'vitest'
import { bench, formatBench } from '../../src/frontend/bench.ts'
import { BlkDriver, type BlkRequest } from '../../src/frontend/blk.ts'
import { loadDeviceState, saveDeviceState } from '../../src/frontend/device-state.ts'
import { DirtyLogArea, LOG_PAGE } from '../../src/frontend/dirty-log.ts'
import type { FrontendError } from '../../src/frontend/errors.ts'
import { Session, type SessionOptions } from '../../src/frontend/session.ts'
import { eventually } from '../../src/frontend/verify/case.ts'
import { verify } from '../../src/frontend/verify/index.ts'
import { VIRTIO_BLK_S_OK, VIRTIO_BLK_T_OUT } from '../../src/virtio/blk.ts'
import { serveFake, Virtiod } from './support.ts'

/** The machine may be busy with other tests' guests. */
const PATIENCE = { timeoutMs: 20_000 }

const FORMATS: readonly (readonly [string, SessionOptions])[] = [
  ['split', {}],
  ['packed', { packed: true }],
  ['in order', { inOrder: true }],
  ['packed and in order', { packed: true, inOrder: true }],
]

function open(socket: string, options: SessionOptions): { session: Session; blk: BlkDriver } {
  const session = Session.open(socket, { ...PATIENCE, ...options })
  onTestFinished(() => session.close())
  return { session, blk: driver(session) }
}

function driver(session: Session): BlkDriver {
  const blk = new BlkDriver(session.queue(), session.memory)
  blk.timeoutMs = PATIENCE.timeoutMs
  return blk
}

const OPTIONS: readonly (readonly [string, SessionOptions])[] = [
  ...FORMATS,
  ['packed, flags', { packed: true, withoutFeatures: [29] }],
  ['a packed ring of 100', { packed: true, queueSize: 100 }],
  ['in-flight tracking', { inflight: true }],
  ['in-flight tracking, packed', { inflight: true, packed: true }],
  ['a vIOMMU', { iommu: true }],
  ['a vIOMMU of large pages, packed', { iommu: { granule: 2 ** 21 }, packed: true }],
  ['in-band notifications', { inband: true }],
  ['the status', { status: true }],
  ['everything', { packed: true, inOrder: true, inflight: true, iommu: true, inband: true, status: true }],
]

test.each(OPTIONS)('requests: %s', async (_name, options) => {
  const virtiod = new Virtiod()
  const socket = await virtiod.start()
  for (const mode of ['poll', 'irq'] as const) {
    const { session, blk } = open(socket, { ...options, mode })
    expect(Buffer.compare(blk.read(1600, 65536), virtiod.image.subarray(819_200, 819_200 + 65536))).toBe(0)
    for (let round = 0; round < 20; round++) {
      const writes = Array.from({ length: 20 }, (_, i) =>
        blk.submit(VIRTIO_BLK_T_OUT, 8 * i, new Uint8Array(4096).fill(round + i), 0, { indirect: i % 3 === 0 }, false)
      )
      blk.publish()
      blk.wait()
      expect(writes.map(({ status, written }) => [status, written])).toEqual(writes.map(() => [VIRTIO_BLK_S_OK, 1]))
    }
    for (let i = 0; i < 20; i++) expect(blk.read(8 * i, 4096).every((byte) => byte === 19 + i)).toBe(true)
    // Stopped and started again at the base that came back.
    const base = session.queue().stop()
    expect(base).toBe(session.queue().driver.base)
    session.queue().start(base)
    session.queue().driver.kickRaw()
    expect(blk.read(0, 512)[0]).toBe(19)
    if (options.iommu !== undefined) {
      const { misses, faults } = session.iommu
      expect([misses > 0, faults]).toEqual([true, 0])
      session.iommu.invalidate(session.connection, 0, 2 ** 40)
      expect(blk.read(0, 512)[0]).toBe(19)
      expect(session.iommu.misses).toBeGreaterThan(misses)
    }
    session.close()
  }
})

describe.each(FORMATS)('a crash, %s', (_name, format) => {
  test('every request completes once, and what was acknowledged is there', async () => {
    const virtiod = new Virtiod()
    let session = Session.open(await virtiod.start(), { ...PATIENCE, ...format, inflight: true })
    onTestFinished(() => session.close())
    const blk = driver(session)
    for (let crash = 1; crash <= 3; crash++) {
      const requests: BlkRequest[] = []
      const fill = (from: number): void => {
        for (let i = from; i < from + 16; i++) {
          requests.push(blk.submit(VIRTIO_BLK_T_OUT, 8 * i, new Uint8Array(4096).fill(16 * crash + i), 0, {}, false))
        }
        blk.publish()
      }
      // Some that it has taken, and some that nobody looks at any more.
      fill(0)
      if (crash === 2) blk.queue.wait(PATIENCE.timeoutMs)
      await virtiod.kill()
      fill(16)
      const socket = await virtiod.start()
      session = Session.resume(socket, session)
      blk.wait()
      expect(requests.map(({ done, status }) => [done, status])).toEqual(requests.map(() => [true, VIRTIO_BLK_S_OK]))
      for (let i = 0; i < 32; i++) expect(new Set(blk.read(8 * i, 4096))).toEqual(new Set([(16 * crash + i) & 0xff]))
      expect(session.inflight?.read(0)).toMatchObject({ version: 1, descNum: 256, inflight: [] })
    }
  })
})

describe('migration', () => {
  test.each(FORMATS)('pages that are written to are in the log, %s', async (_name, format) => {
    const virtiod = new Virtiod()
    const { session, blk } = open(await virtiod.start(), format)
    using log = new DirtyLogArea(session.memory, 4096)
    blk.read(0, 65536)
    expect(log.take()).toEqual([])
    session.startLog(log, true)
    const target = session.memory.allocate(65536, LOG_PAGE)
    const request = blk.submitForeign(0, 0, [{ address: target.gpa, length: 65536, writable: true }])
    blk.wait(request)
    const pages = new Set(log.take())
    for (let at = 0; at < 65536; at += LOG_PAGE) expect(pages).toContain((target.gpa + at) / LOG_PAGE)
    // The ring's own page is marked after the write that this thread has just seen.
    const ring = session.queue().ring[format.packed === true ? 0 : 2]
    const marked = (): boolean =>
      log
        .take()
        .concat([...pages])
        .includes(Math.floor(ring.gpa / LOG_PAGE))
    expect(eventually(marked, PATIENCE.timeoutMs)).toBe(true)
    expect(eventually(() => log.takeSignals() > 0, PATIENCE.timeoutMs)).toBe(true)
    session.stopLog()
    session.connection.barrier()
    log.take()
    blk.read(0, 4096)
    expect(log.take()).toEqual([])
  })

  test('the state of a disk', async () => {
    const virtiod = new Virtiod()
    const { session, blk } = open(await virtiod.start(), {})
    expect(() => saveDeviceState(session.connection)).toThrow(
      expect.objectContaining<Partial<FrontendError>>({ request: 'SET_DEVICE_STATE_FD', failure: 'nack' })
    )
    const base = session.queue().stop()
    const state = saveDeviceState(session.connection)
    loadDeviceState(session.connection, state)
    session.queue().start(base)
    session.queue().driver.kickRaw()
    expect(blk.read(8, 512)).toEqual(new Uint8Array(virtiod.image.subarray(4096, 4608)))
  })
})

describe('the commands', () => {
  test.each([
    [{ packed: true }, 'packed'],
    [{ inOrder: true }, 'in order'],
    [{ inflight: true, packed: true }, 'in-flight tracking'],
    [{ log: true, rw: 'randread' }, 'dirty logging'],
  ] as const)('bench %j', async (options, said) => {
    const virtiod = new Virtiod()
    const result = bench(await virtiod.start(), {
      qd: 8,
      seconds: 0.3,
      warmup: 0.05,
      rw: 'randrw',
      ...PATIENCE,
      ...options,
    })
    expect(result.errors).toBe(0)
    expect(result.requests).toBeGreaterThan(0)
    for (const feature of ['packed', 'inOrder', 'inflight', 'log'] as const)
      expect(result[feature]).toBe(feature in options)
    expect(formatBench(result)).toContain(said)
  })

  test.each([
    [{ packed: true }, /bit 34/],
    [{ inOrder: true }, /bit 35/],
  ])('verify %j', async (options, missing) => {
    const virtiod = new Virtiod()
    const filter = ['stop/', 'notify/', 'ring/base', 'ring-state/', 'data/random']
    const result = await verify(await virtiod.start(), { ...options, filter, ...PATIENCE })
    expect(result.cases.filter(({ outcome }) => outcome !== 'PASS')).toEqual([])
    expect(result.passed).toBeGreaterThan(15)
    await expect(verify(await serveFake('none'), options)).rejects.toThrow(missing)
  })
})

/** Queues that move to other iothreads and another device, while front-ends put verifying load on them. */

import { fileURLToPath } from 'node:url'
import { describe, expect, test, vi } from 'vitest'
import { DirtyLogArea } from '../../src/frontend/dirty-log.ts'
import { layouts } from '../../src/frontend/memory.ts'
import type { SessionOptions } from '../../src/frontend/session-options.ts'
import { VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC } from '../../src/virtio/constants.ts'
import { driverOf, eventually, MIB, memfdMappings, open, wellBehaved } from '../vhost-user/backend.ts'
import { directory, image, Load, Serving } from './serving.ts'

vi.setConfig({ testTimeout: 60_000 })

/** One disk each. */
const NEGOTIATED: Readonly<Record<string, SessionOptions>> = {
  split: {},
  packed: { packed: true },
  'packed-in-order': { packed: true, inOrder: true },
  'in-order': { inOrder: true },
  inflight: { inflight: true },
  'inflight-packed': { packed: true, inflight: true },
  iommu: { iommu: true },
  'iommu-packed': { iommu: true, packed: true },
  inband: { inband: true },
  interrupts: { mode: 'irq' },
  'interrupts-packed': { mode: 'irq', packed: true },
  plain: { withoutFeatures: [VIRTIO_F_INDIRECT_DESC, VIRTIO_F_EVENT_IDX] },
}

function serve(names: readonly string[], emulated: boolean): Serving {
  const dir = directory()
  for (const name of names) image(dir, `${name}.img`)
  const launcher = fileURLToPath(new URL('./exchanging-virtiod.ts', import.meta.url))
  return new Serving(dir, { args: names, launcher, emulated })
}

function load(socket: string, options: SessionOptions) {
  const memory = layouts.single(16 * MIB)
  const { session } = open(socket, { queues: 2, queueSize: 64, memory, timeoutMs: 10_000, ...options })
  const log = new DirtyLogArea(session.memory)
  const loads = session.queues.map(({ index }) => {
    const driver = driverOf(session, index, 4 * MIB)
    driver.timeoutMs = 10_000
    return new Load(driver, index * 1024)
  })
  return { session, log, loads }
}

describe.each([
  ['io_uring', false],
  ['plain system calls', true],
])('exchanges on %s', (_, emulated) => {
  test('under load: nothing is lost, whatever was negotiated', () => {
    const names = Object.keys(NEGOTIATED)
    using daemon = serve(names, emulated)
    const guests = Object.entries(NEGOTIATED).map(([name, options]) => ({
      name,
      ...load(daemon.path(`${name}.sock`), options),
    }))
    /** While every disk is exchanged a few times. */
    const work = () => {
      const before = daemon.said('exchanged').length
      while (daemon.said('exchanged').length < before + 2) {
        for (const { name, loads } of guests) {
          try {
            for (const one of loads) one.step()
          } catch (cause) {
            throw new Error(
              `${name}: ${(cause as Error).message}\n${JSON.stringify(daemon.lines.filter(({ level }) => level !== 'info').slice(0, 5), undefined, 1)}`,
              { cause }
            )
          }
        }
      }
    }
    work()
    // A migration: whatever is written from now on is marked, on every thread that a queue comes to.
    for (const { session, log } of guests) session.startLog(log, true)
    work()
    for (const { name, log, session } of guests) {
      expect(log.take().length, name).toBeGreaterThan(0)
      expect(log.takeSignals(), name).toBeGreaterThan(0)
      session.stopLog()
    }
    for (const { loads } of guests) for (const one of loads) one.verify()
    for (const { session, log } of guests) {
      session.close()
      log.close()
    }
    for (const name of names) wellBehaved(daemon.path(`${name}.sock`))
    expect(eventually(() => memfdMappings(daemon.pid) === 0)).toBe(true)
    expect(daemon.lines.filter(({ level }) => level !== 'info')).toEqual([])
  })
})

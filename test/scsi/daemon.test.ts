/** The SCSI device as part of the daemon: configuration files, handover, other rings, probe and bench. */
import { rmSync, truncateSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { bench } from '../../src/frontend/bench.ts'
import { guessDevice, looksLikeScsi } from '../../src/frontend/feature-names.ts'
import { deviceAt, formatProbe, probe } from '../../src/frontend/probe.ts'
import { unitAddress } from '../../src/frontend/scsi.ts'
import { cdb } from '../../src/frontend/scsi-cdb.ts'
import { featureSet } from '../../src/virtio/features.ts'
import * as scsi from '../../src/virtio/scsi.ts'
import { configure, directory, image, Serving } from '../daemon-socket/serving.ts'
import { eventually, pattern } from '../vhost-user/backend.ts'
import { MIB, openScsi, scsiForFile } from './backend.ts'

const backend = scsiForFile({ units: [{}, { options: ',read-only' }], extra: ['--num-queues', '2'] })

test('probe sees what it is', () => {
  const { socket } = backend()
  expect(deviceAt(socket)).toBe('scsi')
  const result = probe(socket)
  expect(result).toMatchObject({ device: 'scsi', queues: 4, scsi: { numQueues: 2, cdbSize: 32, senseSize: 96 } })
  expect(formatProbe(result)).toMatch(/virtio-scsi \(guessed.*VIRTIO_SCSI_F_HOTPLUG.*request queues {5}2/s)
})

test('nothing else looks like it', () => {
  const config = new Uint8Array(36)
  const view = new DataView(config.buffer)
  view.setUint32(16, 16, true)
  view.setUint32(20, 96, true)
  view.setUint32(24, 32, true)
  const both = featureSet(1, 2, 32)
  expect([looksLikeScsi(both, config), looksLikeScsi(featureSet(1, 32), config)]).toEqual([true, true])
  expect([looksLikeScsi(featureSet(2, 32), config), looksLikeScsi(featureSet(1, 2, 9, 32), config)]).toEqual([
    false,
    false,
  ])
  expect(looksLikeScsi(both, config.subarray(0, 24))).toBe(false)
  view.setUint32(16, 512, true)
  expect(looksLikeScsi(both, config)).toBe(false)
  expect(guessDevice(both, true)).toBe('unknown')
})

test.each([
  ['randread', {}],
  ['read', { queues: 2, driver: 'irq', bs: 65_536, qd: 8 }],
  ['randwrite', { packed: true }],
  ['write', { inflight: true, indirect: true, bs: 512, qd: 128 }],
] as const)('bench: %s', (rw, options) => {
  const result = bench(backend().socket, { device: 'scsi', rw, seconds: 0.2, warmup: 0, ...options })
  expect(result).toMatchObject({ device: 'scsi', errors: 0, rw })
  expect(result.requests).toBeGreaterThan(10)
})

test('bench refuses what cannot be', () => {
  const { socket } = backend()
  const run = (options: object) => () => bench(socket, { device: 'scsi', seconds: 0.1, ...options })
  expect(run({ lun: 1, rw: 'randwrite' })).toThrow('the disk is read-only')
  expect(run({ queues: 3 })).toThrow('queues: the back-end has 2')
  expect(run({ rw: 'randrw' })).toThrow('rw: ')
  expect(run({ lun: 9 })).toThrow('5/2500')
  expect(bench(socket, { device: 'scsi', lun: 1, seconds: 0.1, warmup: 0 }).errors).toBe(0)
})

test('packed rings, in order, and a vIOMMU', () => {
  const data = pattern(4096)
  for (const options of [{ packed: true }, { packed: true, inOrder: true }, { iommu: true }]) {
    using opened = openScsi(backend().socket, options)
    opened.driver.tell(cdb.write10(16, 8), data)
    expect(opened.driver.ask(cdb.read16(16, 8), 4096)).toEqual(data)
    expect(opened.control.manage(scsi.VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET, 0)).toBe(0)
    expect(opened.driver.clearAttentions()).toEqual([0x2903])
  }
})

test('a handover to a new process: files, state and events go on', () => {
  const dir = directory()
  const disks = ['a.img', 'b.img'].map((name) => image(dir, name, 4 * MIB))
  configure(dir, [
    { name: 'disks', type: 'scsi', 'socket-path': 's.sock', lun: ['a.img', 'b.img,hotplug'], 'num-queues': 2 },
  ])
  using serving = new Serving(dir)
  const opened = openScsi(join(dir, 's.sock'), { clear: 2, requestQueues: 2 })
  try {
    opened.events.supply(8)
    const list = opened.driver.ask(cdb.modeSense6(8, 255, 8), 255)
    list.set([0, 0, 0], 0)
    list[6] = 0
    opened.driver.tell(cdb.modeSelect6(list.length), list)
    const written: { lba: number; data: Uint8Array }[] = []
    let round = 0
    serving.handOverDuring(() => {
      round++
      const block = { lba: (round * 8) % 4096, data: pattern(4096) }
      const driver = opened.drivers[round % 2]!
      driver.tell(cdb.write10(block.lba, 8), block.data, { lun: round % 3 === 0 ? 1 : 0 })
      if (round % 3 !== 0) written[block.lba / 8] = block
      if (round % 10 === 0) expect(opened.control.manage(scsi.VIRTIO_SCSI_T_TMF_QUERY_TASK_SET, 0)).toBe(0)
    })
    for (const { lba, data } of written.filter((block) => block !== undefined))
      expect(Buffer.compare(opened.driver.ask(cdb.read10(lba, 8), 4096), data)).toBe(0)
    // Nothing to attend to, and the write cache as it was switched.
    expect([opened.driver.clearAttentions(0), opened.driver.clearAttentions(1)]).toEqual([[], []])
    expect(opened.driver.ask(cdb.modeSense6(8, 255, 8), 255)[6]! & 4).toBe(0)
    expect(serving.fds.filter((name) => name.includes('.img'))).toHaveLength(2)
    truncateSync(disks[0]!, 6 * MIB)
    rmSync(disks[1]!)
    process.kill(serving.pid, 'SIGHUP')
    expect(opened.events.next()).toMatchObject({ event: scsi.VIRTIO_SCSI_T_PARAM_CHANGE, lun: unitAddress(0) })
    expect(opened.events.next()).toMatchObject({ event: scsi.VIRTIO_SCSI_T_TRANSPORT_RESET, lun: unitAddress(1) })
    expect(eventually(() => serving.fds.filter((name) => name.includes('.img')).length === 1)).toBe(true)
    expect(opened.driver.clearAttentions(0)).toEqual([0x2a09, 0x3f0e])
  } finally {
    opened[Symbol.dispose]()
  }
  serving.stop()
})

/** Units that are resized, come and go while the device is served: events, unit attentions, files. */
import { renameSync, rmSync, truncateSync } from 'node:fs'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { decodeSense, unitAddress } from '../../src/frontend/scsi.ts'
import { cdb } from '../../src/frontend/scsi-cdb.ts'
import * as scsi from '../../src/virtio/scsi.ts'
import { eventually, pattern } from '../vhost-user/backend.ts'
import { MIB, makeImage, type OpenedScsi, openScsi, ScsiBackend } from './backend.ts'

const POWER_ON = 0x2900
const CAPACITY_CHANGED = 0x2a09
const LUNS_CHANGED = 0x3f0e
const SEVERAL_THREADS = ['--iothreads', '3', '--num-queues', '4', '--log-level', 'debug']

let backend: ScsiBackend
let opened: OpenedScsi
beforeEach(() => {
  backend = new ScsiBackend({ units: [{}, { options: ',hotplug' }], extra: SEVERAL_THREADS })
  opened = openScsi(backend.socket, { clear: 2, requestQueues: 4 })
})
afterEach(async () => {
  opened[Symbol.dispose]()
  await backend.stop()
})

const luns = () => {
  const bytes = opened.driver.ask(cdb.reportLuns(), 4096)
  return Array.from({ length: bytes.length / 8 - 1 }, (_, i) => bytes[9 + i * 8])
}
const inquiryType = (lun: number) => opened.driver.ask(cdb.inquiry(), 255, { lun })[0]
const resetEvent = (lun: number, reason: number, missed = false) => ({
  event: scsi.VIRTIO_SCSI_T_TRANSPORT_RESET,
  missed,
  lun: unitAddress(lun),
  reason,
})
const REMOVED = scsi.VIRTIO_SCSI_EVT_RESET_REMOVED
const RESCAN = scsi.VIRTIO_SCSI_EVT_RESET_RESCAN

describe('a resized image', () => {
  test('an event, a unit attention, the new capacity', () => {
    opened.events.supply(2)
    truncateSync(backend.images[0]!, 6 * MIB + 100)
    backend.refresh()
    expect(opened.events.next()).toEqual({
      event: scsi.VIRTIO_SCSI_T_PARAM_CHANGE,
      missed: false,
      lun: unitAddress(0),
      reason: 0x2a | (0x09 << 8),
    })
    expect(opened.driver.clearAttentions(0)).toEqual([CAPACITY_CHANGED])
    expect(opened.driver.clearAttentions(1)).toEqual([])
    expect(opened.driver.capacity().blocks).toBe((6 * MIB) / 512)
  })

  test('a file that was cut below what the driver asks for: MEDIUM ERROR at the block', () => {
    truncateSync(backend.images[0]!, 1 * MIB)
    const request = opened.driver.run(cdb.read10(2040, 16), new Uint8Array(0), 8192)
    expect(decodeSense(request.sense)).toMatchObject({ key: 3, code: 0x1100, information: 2048 })
    expect([request.residual, request.data.length]).toEqual([8 * 512, 8 * 512])
  })
})

describe('a unit that goes and comes', () => {
  test('is pulled out when its file is removed, with requests in flight on all queues, and closed', () => {
    opened.events.supply(4)
    expect([luns(), backend.openImages]).toEqual([[0, 1], 2])
    rmSync(backend.images[1]!)
    let answered = 0
    let gone = 0
    backend.refresh()
    for (let round = 0; round < 60; round++) {
      for (const driver of opened.drivers)
        for (let i = 0; i < 16; i++) driver.submit(cdb.write10(i * 8, 8), pattern(4096), 0, { lun: 1 }, false)
      for (const driver of opened.drivers) driver.publish()
      for (const driver of opened.drivers) {
        driver.wait()
        const request = driver.run(cdb.testUnitReady(), new Uint8Array(0), 0, { lun: 1 })
        const { code } = decodeSense(request.sense)
        if (code === 0x2500) gone++
        else answered++
      }
      if (gone > 0) break
    }
    expect([gone > 0, answered + gone > 0]).toEqual([true, true])
    expect(opened.events.next()).toEqual(resetEvent(1, REMOVED))
    expect(eventually(() => backend.openImages === 1)).toBe(true)
    // The list itself clears the condition.
    expect(opened.driver.clearAttentions(0)).toEqual([LUNS_CHANGED])
    expect([luns(), inquiryType(1)]).toEqual([[0], 0x7f])

    makeImage(backend.images[1]!, 2 * MIB)
    backend.refresh()
    expect(opened.events.next()).toEqual(resetEvent(1, RESCAN))
    expect(luns()).toEqual([0, 1])
    expect(opened.driver.clearAttentions(0)).toEqual([])
    expect(opened.driver.clearAttentions(1)).toEqual([POWER_ON])
    expect(opened.driver.capacity(1).blocks).toBe((2 * MIB) / 512)
    const data = pattern(4096)
    for (const driver of opened.drivers) {
      driver.tell(cdb.write10(8, 8), data, { lun: 1 })
      expect(driver.ask(cdb.read10(8, 8), 4096, { lun: 1 })).toEqual(data)
    }
    expect(backend.openImages).toBe(2)
  })

  test('a file in the place of another: out by the first SIGHUP, in by the second', () => {
    opened.events.supply(4)
    makeImage(`${backend.images[1]}.new.img`, 8 * MIB)
    renameSync(`${backend.images[1]}.new.img`, backend.images[1]!)
    backend.refresh()
    expect(opened.events.next()).toEqual(resetEvent(1, REMOVED))
    expect(eventually(() => backend.log.includes('the next SIGHUP plugs that in'))).toBe(true)
    backend.refresh()
    expect(opened.events.next()).toEqual(resetEvent(1, RESCAN))
    expect(opened.driver.clearAttentions(1)).toEqual([POWER_ON])
    expect(opened.driver.capacity(1).blocks).toBe((8 * MIB) / 512)
  })

  test('one without hotplug stays', () => {
    rmSync(backend.images[0]!)
    truncateSync(backend.images[1]!, 5 * MIB)
    opened.events.supply(1)
    backend.refresh()
    expect(opened.events.next()).toMatchObject({ event: scsi.VIRTIO_SCSI_T_PARAM_CHANGE, lun: unitAddress(1) })
    expect(luns()).toEqual([0, 1])
  })

  test('a file that cannot be used yet is said, and tried again', () => {
    opened.events.supply(4)
    rmSync(backend.images[1]!)
    backend.refresh()
    expect(opened.events.next()).toEqual(resetEvent(1, REMOVED))
    makeImage(backend.images[1]!, 0)
    expect(eventually(() => backend.log.includes('the unit was pulled out'))).toBe(true)
    backend.refresh()
    expect(eventually(() => backend.log.includes(`${backend.images[1]} is empty`))).toBe(true)
    makeImage(backend.images[1]!, MIB)
    backend.refresh()
    expect(opened.events.next()).toEqual(resetEvent(1, RESCAN))
  })
})

describe('events that find no buffer', () => {
  test('the next buffer says that some were missed', () => {
    truncateSync(backend.images[0]!, 6 * MIB)
    backend.refresh()
    expect(eventually(() => backend.log.includes('an event found no buffer'))).toBe(true)
    opened.events.supply(1)
    expect(opened.events.next()).toEqual({ event: 0, missed: true, lun: new Uint8Array(8), reason: 0 })
    opened.events.supply(2)
    rmSync(backend.images[1]!)
    backend.refresh()
    expect(opened.events.next()).toEqual(resetEvent(1, REMOVED))
  })

  test('also when there was no event queue', () => {
    opened[Symbol.dispose]()
    opened = openScsi(backend.socket, {
      clear: 0,
      before: (session) => {
        truncateSync(backend.images[0]!, 6 * MIB)
        backend.refresh()
        expect(eventually(() => backend.log.includes('the image was resized'))).toBe(true)
        expect(session.queues).toHaveLength(0)
      },
    })
    opened.events.supply(1)
    expect(opened.events.next()).toMatchObject({ event: 0, missed: true })
    expect(opened.driver.clearAttentions()).toEqual([POWER_ON, CAPACITY_CHANGED])
  })

  test('who has not negotiated them gets none', () => {
    opened[Symbol.dispose]()
    opened = openScsi(backend.socket, {
      clear: 2,
      withoutFeatures: [scsi.VIRTIO_SCSI_F_HOTPLUG, scsi.VIRTIO_SCSI_F_CHANGE],
    })
    opened.events.supply(4)
    truncateSync(backend.images[0]!, 6 * MIB)
    rmSync(backend.images[1]!)
    backend.refresh()
    expect(eventually(() => backend.log.includes('the unit was pulled out'))).toBe(true)
    expect(() => opened.events.next(100)).toThrow('nothing completed')
    expect(opened.driver.clearAttentions()).toEqual([CAPACITY_CHANGED, LUNS_CHANGED])
  })
})

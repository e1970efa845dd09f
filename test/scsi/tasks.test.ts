/** Task management with requests in flight on several queues and iothreads. */
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import type { ScsiRequest } from '../../src/frontend/scsi.ts'
import { cdb } from '../../src/frontend/scsi-cdb.ts'
import * as scsi from '../../src/virtio/scsi.ts'
import { MIB, type OpenedScsi, openScsi, scsiForFile } from './backend.ts'

const NOTHING: Uint8Array = new Uint8Array(0)
/** The largest VERIFY: it reads 64 MiB, which takes its time. */
const LONG = (64 * MIB) / 512

const backend = scsiForFile({
  units: [{ bytes: 512 * MIB }, {}],
  extra: ['--iothreads', '3', '--num-queues', '3'],
})
let opened: OpenedScsi
beforeAll(() => {
  opened = openScsi(backend().socket, { clear: 2, requestQueues: 3 })
})
afterAll(() => opened?.[Symbol.dispose]())
beforeEach(() => {
  for (const driver of opened.drivers) driver.wait()
  for (const lun of [0, 1]) opened.driver.clearAttentions(lun)
})

let tag = 1000n

/** Requests that go on for some time, round the queues. */
function occupy(count: number, lun = 0): { request: ScsiRequest; queue: number }[] {
  const requests = Array.from({ length: count }, (_, i) => {
    const queue = i % opened.drivers.length
    const command = cdb.verify16(lun === 0 ? (i % 8) * LONG : 0, lun === 0 ? LONG : 8192)
    return { queue, request: opened.drivers[queue]!.submit(command, NOTHING, 0, { lun, tag: tag++ }, false) }
  })
  for (const driver of opened.drivers) driver.publish()
  return requests
}

function collect(): void {
  for (const driver of opened.drivers) driver.poll()
}

const { VIRTIO_SCSI_S_ABORTED: ABORTED, VIRTIO_SCSI_S_RESET: RESET } = scsi
const COMPLETE = scsi.VIRTIO_SCSI_S_FUNCTION_COMPLETE
const SUCCEEDED = scsi.VIRTIO_SCSI_S_FUNCTION_SUCCEEDED

test('ABORT TASK: the task is over when it is answered, the others go on', () => {
  const requests = occupy(30)
  const victims = [29, 13, 2].map((i) => requests[i]!.request)
  for (const victim of victims) {
    expect(opened.control.manage(scsi.VIRTIO_SCSI_T_TMF_ABORT_TASK, 0, victim.tag)).toBe(COMPLETE)
    collect()
    expect(victim.done).toBe(true)
    expect([scsi.VIRTIO_SCSI_S_OK, ABORTED]).toContain(victim.response)
  }
  // The last one had hardly begun.
  expect(victims[0]!.response).toBe(ABORTED)
  for (const driver of opened.drivers) driver.wait()
  for (const { request } of requests)
    if (!victims.includes(request)) expect([request.response, request.status]).toEqual([0, 0])
})

test('ABORT TASK of a task that is unknown, over, or of another unit', () => {
  expect(opened.control.manage(scsi.VIRTIO_SCSI_T_TMF_ABORT_TASK, 0, 77n)).toBe(COMPLETE)
  const [first] = occupy(9)
  expect(opened.control.manage(scsi.VIRTIO_SCSI_T_TMF_ABORT_TASK, 1, first!.request.tag)).toBe(COMPLETE)
  for (const driver of opened.drivers) driver.wait()
  expect(first!.request.response).toBe(scsi.VIRTIO_SCSI_S_OK)
})

test('QUERY TASK and QUERY TASK SET', () => {
  const { VIRTIO_SCSI_T_TMF_QUERY_TASK: QUERY, VIRTIO_SCSI_T_TMF_QUERY_TASK_SET: QUERY_SET } = scsi
  expect(opened.control.manage(QUERY_SET, 0)).toBe(COMPLETE)
  const requests = occupy(30)
  const { request } = requests.at(-1)!
  expect(opened.control.manage(QUERY, 0, request.tag)).toBe(SUCCEEDED)
  expect(opened.control.manage(QUERY_SET, 0)).toBe(SUCCEEDED)
  expect(opened.control.manage(QUERY, 1, request.tag)).toBe(COMPLETE)
  expect(opened.control.manage(QUERY_SET, 1)).toBe(COMPLETE)
  expect(opened.control.manage(QUERY, 0, 5n)).toBe(COMPLETE)
})

test.each([
  ['ABORT TASK SET', scsi.VIRTIO_SCSI_T_TMF_ABORT_TASK_SET, ABORTED, []],
  ['CLEAR TASK SET', scsi.VIRTIO_SCSI_T_TMF_CLEAR_TASK_SET, ABORTED, []],
  ['LOGICAL UNIT RESET', scsi.VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET, RESET, [0x2903]],
])('%s ends all tasks of its unit, and no others', (_, subtype, response, attentions) => {
  const requests = occupy(30)
  const others = occupy(3, 1)
  expect(opened.control.manage(subtype, 0)).toBe(COMPLETE)
  collect()
  expect(requests.every(({ request }) => request.done)).toBe(true)
  expect(requests.filter(({ request }) => request.response === response).length).toBeGreaterThan(10)
  expect(requests.every(({ request }) => request.response === response || request.response === 0)).toBe(true)
  for (const driver of opened.drivers) driver.wait()
  expect(others.map(({ request }) => request.response)).toEqual([0, 0, 0])
  expect(opened.driver.clearAttentions(0)).toEqual(attentions)
  expect(opened.driver.clearAttentions(1)).toEqual([])
})

test('LOGICAL UNIT RESET puts mode pages and a stopped unit back', () => {
  const list = opened.driver.ask(cdb.modeSense6(8, 255, 8), 255)
  list.set([0, 0, 0], 0)
  list[6] = 0
  opened.driver.tell(cdb.modeSelect6(list.length), list)
  opened.driver.tell(cdb.startStop(0))
  expect(opened.control.manage(scsi.VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET, 0)).toBe(COMPLETE)
  expect(opened.driver.clearAttentions(0)).toEqual([0x2903])
  expect(opened.driver.ask(cdb.modeSense6(8, 255, 8), 255)[6]! & 4).toBe(4)
  opened.driver.tell(cdb.testUnitReady())
})

test('I_T NEXUS RESET is for all units', () => {
  const requests = [...occupy(20), ...occupy(10, 1)]
  expect(opened.control.manage(scsi.VIRTIO_SCSI_T_TMF_I_T_NEXUS_RESET, 0)).toBe(COMPLETE)
  collect()
  expect(requests.every(({ request }) => request.done)).toBe(true)
  for (const lun of [0, 1]) expect(opened.driver.clearAttentions(lun)).toEqual([0x2907])
})

describe('what is refused', () => {
  test.each([
    ['CLEAR ACA', scsi.VIRTIO_SCSI_T_TMF_CLEAR_ACA, 0, scsi.VIRTIO_SCSI_S_FUNCTION_REJECTED],
    ['an unknown function', 99, 0, scsi.VIRTIO_SCSI_S_FUNCTION_REJECTED],
    ['of a missing unit', scsi.VIRTIO_SCSI_T_TMF_ABORT_TASK, 9, scsi.VIRTIO_SCSI_S_INCORRECT_LUN],
    ['reset of a missing unit', scsi.VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET, 300, scsi.VIRTIO_SCSI_S_INCORRECT_LUN],
    ['of a missing target', scsi.VIRTIO_SCSI_T_TMF_ABORT_TASK, Uint8Array.of(1, 4, 0, 0, 0, 0, 0, 0), 3],
  ])('%s', (_, subtype, lun, response) => {
    expect(opened.control.manage(subtype, lun)).toBe(response)
  })

  test('the well-known unit has no tasks', () => {
    const wellKnown = Uint8Array.of(0xc1, 1, 0, 0, 0, 0, 0, 0)
    expect(opened.control.manage(scsi.VIRTIO_SCSI_T_TMF_ABORT_TASK_SET, wellKnown)).toBe(COMPLETE)
  })
})

test.each([
  ['query', scsi.VIRTIO_SCSI_T_AN_QUERY],
  ['subscription', scsi.VIRTIO_SCSI_T_AN_SUBSCRIBE],
])('asynchronous notification: a %s gets nothing, with success', (_, type) => {
  const ask = (lun: number, target = 0) => {
    const bytes = new Uint8Array(scsi.VIRTIO_SCSI_AN_SIZE)
    const view = new DataView(bytes.buffer)
    view.setUint32(0, type, true)
    bytes.set([1, target, 0, lun], scsi.VIRTIO_SCSI_AN_LUN)
    view.setUint32(scsi.VIRTIO_SCSI_AN_EVENT_REQUESTED, 0x7e, true)
    return [...opened.control.run(bytes, 5)]
  }
  expect(ask(0)).toEqual([0, 0, 0, 0, 0])
  expect(ask(9)).toEqual([0, 0, 0, 0, scsi.VIRTIO_SCSI_S_INCORRECT_LUN])
  expect(ask(0, 1)).toEqual([0, 0, 0, 0, scsi.VIRTIO_SCSI_S_BAD_TARGET])
})

test('rings stop in any order while a function waits', () => {
  occupy(30)
  const bytes = new Uint8Array(scsi.VIRTIO_SCSI_TMF_SIZE)
  new DataView(bytes.buffer).setUint32(4, scsi.VIRTIO_SCSI_T_TMF_ABORT_TASK_SET, true)
  bytes[8] = 1
  const control = opened.session.queue(scsi.VIRTIO_SCSI_CONTROL_QUEUE)
  const memory = opened.session.memory.allocate(64, 16)
  memory.bytes.set(bytes)
  memory.bytes[32] = 0xa5
  const head = control.driver.build([
    { address: memory.gpa, length: bytes.length, writable: false },
    { address: memory.gpa + 32, length: 1, writable: true },
  ])
  control.driver.issue(head)
  control.driver.publish()
  for (const queue of [3, 0, 4, 2, 1]) opened.session.queue(queue).stop()
  expect([control.driver.pop(), memory.bytes[32]]).toEqual([head, COMPLETE])
  opened.session.close(true)
  opened = openScsi(backend().socket, { clear: 2, requestQueues: 3 })
})

/** Requests that no driver makes: every one is answered or given back, and the device serves on. */
import { truncateSync } from 'node:fs'
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest'
import { cdb } from '../../src/frontend/scsi-cdb.ts'
import * as scsi from '../../src/virtio/scsi.ts'
import { MIB, type OpenedScsi, openScsi, scsiForFile } from './backend.ts'

const NOTHING: Uint8Array = new Uint8Array(0)
const HEADER = 51
const RESPONSE = 108

describe.each([
  ['io_uring', false],
  ['plain system calls', true],
])('on %s', (_, emulated) => {
  const backend = scsiForFile({ emulated })
  let opened: OpenedScsi
  beforeAll(() => {
    opened = openScsi(backend().socket)
  })
  afterAll(() => opened?.[Symbol.dispose]())
  afterEach(() => {
    const data = new Uint8Array(512).fill(Math.floor(Math.random() * 256))
    opened.driver.tell(cdb.write10(1, 1), data)
    expect(opened.driver.ask(cdb.read16(1, 1), 512)).toEqual(data)
  })

  test.each([
    ['nothing at all', 0],
    ['half an address', 4],
    ['no CDB', 19],
    ['a CDB that is cut', 50],
  ])('a header with %s', (_, length) => {
    const readable = new Uint8Array(length).fill(1)
    const request = opened.driver.run(NOTHING, NOTHING, 0, { readable, readableCuts: length === 0 ? [] : [length] })
    expect([request.response, request.written]).toEqual([scsi.VIRTIO_SCSI_S_FAILURE, RESPONSE])
  })

  test.each([
    ['no room for a response', []],
    ['one byte', [1]],
    ['a response without sense data', [12]],
    ['one byte too few', [107]],
  ])('%s', (_, writableCuts) => {
    const request = opened.driver.run(cdb.read10(0, 1), NOTHING, 0, { writableCuts })
    expect(request.written).toBe(0)
    expect(request.writable.every((byte) => byte === 0xa5)).toBe(true)
  })

  test('data both ways', () => {
    const request = opened.driver.run(cdb.read10(0, 1), new Uint8Array(512), 512)
    expect([request.response, request.residual]).toEqual([scsi.VIRTIO_SCSI_S_FAILURE, 1024])
  })

  test.each([
    ['READ (16)', cdb.read16(0, 0xffff_ffff)],
    ['WRITE (16)', cdb.write16(0, 0xffff_ffff)],
    ['VERIFY (16)', cdb.verify16(0, 0xffff_ffff)],
    ['WRITE SAME (16)', cdb.writeSame16(0, 0xffff_ffff)],
    ['UNMAP', cdb.unmap(0xffff)],
    ['MODE SELECT (10)', cdb.modeSelect10(0xffff)],
  ])('%s of a huge length with a small buffer', (_, command) => {
    const request = opened.driver.run(command, new Uint8Array(512))
    expect([request.response, request.status].every((value) => value === 0)).toBe(false)
  })

  test.each([
    ['REPORT LUNS', cdb.reportLuns(0, 0xffff_ffff)],
    ['REPORT SUPPORTED OPERATION CODES', cdb.reportOpcodes(0, 0, 0, 0xffff_ffff)],
    ['READ CAPACITY (16)', cdb.readCapacity16(0xffff_ffff)],
  ])('%s of a huge allocation length', (_, command) => {
    expect(opened.driver.ask(command, 4096).length).toBeLessThan(400)
    expect(opened.driver.run(command, NOTHING, 1).response).toBe(scsi.VIRTIO_SCSI_S_OVERRUN)
  })

  test('random headers and CDBs', () => {
    let seed = 12_345
    const random = (below: number): number => {
      seed = (Math.imul(seed, 1_103_515_245) + 12_345) >>> 0
      return (seed >>> 8) % below
    }
    const opcodes = [0, 3, 8, 0x0a, 0x12, 0x15, 0x1a, 0x1b, 0x28, 0x2a, 0x2e, 0x2f, 0x35, 0x41, 0x42, 0x5a, 0x88, 0x93]
    const image = new Uint8Array(HEADER)
    for (let round = 0; round < 600; round++) {
      for (let i = 0; i < HEADER; i++) image[i] = random(3) === 0 ? random(256) : 0
      if (random(8) > 0) image.set([1, 0, 0, 0, 0, 0, 0, 0])
      image[19] = random(4) === 0 ? random(256) : opcodes[random(opcodes.length)]!
      const out = random(2) === 0
      const length = random(4) * random(700)
      const readable = new Uint8Array(HEADER + (out ? length : 0))
      readable.set(image)
      for (let i = HEADER; i < readable.length; i++) readable[i] = random(4) === 0 ? random(256) : 0
      const request = opened.driver.submit(NOTHING, NOTHING, out ? 0 : length, { readable })
      if (opened.driver.outstanding > 16) opened.driver.wait()
      expect(request).toBeDefined()
    }
    opened.driver.wait()
    opened.driver.tell(cdb.startStop(1))
    opened.driver.clearAttentions()
  })

  test.each([
    ['nothing', 0, 1],
    ['no type', 3, 1],
    ['an unknown type', 24, 1],
    ['a function that is cut', 23, 1],
    ['a function without response', 24, 0],
    ['a notification that is cut', 15, 5],
    ['a notification with half a response', 16, 4],
  ])('on the control queue: %s', (what, length, writable) => {
    const readable = new Uint8Array(length)
    if (length >= 4) {
      const type = what.includes('unknown') ? 9 : what.includes('notification') ? scsi.VIRTIO_SCSI_T_AN_QUERY : 0
      new DataView(readable.buffer).setUint32(0, type, true)
    }
    if (length === 0 && writable === 0) return
    const answer = opened.control.run(readable, writable)
    if (writable > 0) expect(answer).toContain(scsi.VIRTIO_SCSI_S_FAILURE)
  })

  test('event buffers that are too small come back empty', () => {
    opened.events.supply(2, 15)
    opened.events.supply(1)
    const { driver } = opened.session.queue(scsi.VIRTIO_SCSI_EVENT_QUEUE)
    truncateSync(backend().images[0]!, 4 * MIB + 4096)
    backend().refresh()
    const used: number[] = []
    const deadline = performance.now() + 5000
    while (used.length < 3 && performance.now() < deadline) if (driver.pop() >= 0) used.push(driver.written)
    expect(used).toEqual([0, 0, 16])
    expect(opened.driver.clearAttentions()).toEqual([0x2a09])
  })
})

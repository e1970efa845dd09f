/** Commands over a socket, after the ideas of libiscsi's test suite: edges, lengths, residuals, what has to be refused. */
import { readFileSync, statSync } from 'node:fs'
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { decodeSense, type ScsiOptions, type ScsiRequest } from '../../src/frontend/scsi.ts'
import { cdb, unmapList } from '../../src/frontend/scsi-cdb.ts'
import { pattern } from '../vhost-user/backend.ts'
import { MIB, type OpenedScsi, openScsi, scsiForFile } from './backend.ts'

const NOTHING: Uint8Array = new Uint8Array(0)
const BLOCKS = 8192

/** Units: a disk; one that is read-only; one with blocks of 4096 bytes and without write cache; one that is missing. */
const backend = scsiForFile({
  units: [
    { options: ',serial=first-disk' },
    { bytes: MIB, options: ',read-only' },
    { bytes: MIB, options: ',block-size=4096' },
    { bytes: 0, options: ',hotplug' },
  ],
  extra: ['--num-queues', '2'],
})

let opened: OpenedScsi
beforeAll(() => {
  opened = openScsi(backend().socket, { clear: 3, arena: 2 * MIB })
})
afterAll(() => opened?.[Symbol.dispose]())
beforeEach(() => {
  // No test leaves something pending, or the unit stopped, for the next.
  opened.driver.tell(cdb.startStop(1))
})

const run = (command: Uint8Array, out = NOTHING, inLength = 0, options: ScsiOptions = {}) =>
  opened.driver.run(command, out, inLength, options)
const ask = (command: Uint8Array, inLength: number, lun = 0) => opened.driver.ask(command, inLength, { lun })
const tell = (command: Uint8Array, out = NOTHING, lun = 0) => opened.driver.tell(command, out, { lun })

/** Response, status, and key and code of the sense data. */
function outcome(request: ScsiRequest): { response: number; status: number; key: number; code: number } {
  const { key, code } = decodeSense(request.sense)
  return { response: request.response, status: request.status, key, code }
}

const good = { response: 0, status: 0, key: -1, code: -1 }
const check = (key: number, code: number) => ({ response: 0, status: 2, key, code })
const invalidField = check(5, 0x2400)
const invalidOpcode = check(5, 0x2000)
const outOfRange = check(5, 0x2100)
const overrun = { response: 1, status: 0, key: -1, code: -1 }

describe('reads and writes', () => {
  const writes = [
    ['WRITE (6)', (lba: number, blocks: number) => cdb.write6(lba, blocks)],
    ['WRITE (10)', (lba: number, blocks: number) => cdb.write10(lba, blocks)],
    ['WRITE (10) with FUA', (lba: number, blocks: number) => cdb.write10(lba, blocks, 0x08)],
    ['WRITE (12) with DPO', (lba: number, blocks: number) => cdb.write12(lba, blocks, 0x10)],
    ['WRITE (16)', (lba: number, blocks: number) => cdb.write16(lba, blocks)],
    ['WRITE AND VERIFY (10)', (lba: number, blocks: number) => cdb.writeVerify10(lba, blocks, 0x02)],
    ['WRITE AND VERIFY (16)', (lba: number, blocks: number) => cdb.writeVerify16(lba, blocks)],
  ] as const
  const reads = [
    ['READ (6)', (lba: number, blocks: number) => cdb.read6(lba, blocks)],
    ['READ (10)', (lba: number, blocks: number) => cdb.read10(lba, blocks)],
    ['READ (10) with FUA', (lba: number, blocks: number) => cdb.read10(lba, blocks, 0x08)],
    ['READ (12)', (lba: number, blocks: number) => cdb.read12(lba, blocks)],
    ['READ (16) with DPO and FUA', (lba: number, blocks: number) => cdb.read16(lba, blocks, 0x18)],
  ] as const

  test.each(writes)('%s, at both ends and in between', (_, write) => {
    for (const lba of [0, 100, BLOCKS - 3]) {
      const data = pattern(3 * 512)
      tell(write(lba, 3), data)
      expect(ask(cdb.read10(lba, 3), data.length)).toEqual(data)
      expect(readFileSync(backend().images[0]!).subarray(lba * 512, (lba + 3) * 512)).toEqual(Buffer.from(data))
    }
  })

  test.each(reads)('%s', (_, read) => {
    const data = pattern(4 * 512)
    tell(cdb.write16(40, 4), data)
    expect(ask(read(40, 4), data.length)).toEqual(data)
  })

  test.each([...writes, ...reads])('%s: the last block, and one too many', (_, command) => {
    const out = /WRITE/.test(_)
    const go = (lba: number, blocks: number) =>
      outcome(run(command(lba, blocks), out ? new Uint8Array(blocks * 512) : NOTHING, out ? 0 : blocks * 512))
    expect(go(BLOCKS - 1, 1)).toEqual(good)
    expect(go(BLOCKS - 1, 2)).toEqual(outOfRange)
    expect(go(BLOCKS, 1)).toEqual(outOfRange)
  })

  test('0 blocks: 256 for 6 bytes, nothing for the others', () => {
    const data = pattern(256 * 512)
    tell(cdb.write6(16, 0), data)
    expect(ask(cdb.read6(16, 0), data.length)).toEqual(data)
    for (const command of [cdb.read10(0, 0), cdb.read12(5, 0), cdb.read16(BLOCKS, 0), cdb.write10(BLOCKS, 0)])
      expect(outcome(run(command))).toEqual(good)
    for (const command of [cdb.read10(BLOCKS + 1, 0), cdb.read16(2n ** 63n, 0), cdb.write16(2n ** 64n - 1n, 0)])
      expect(outcome(run(command))).toEqual(outOfRange)
  })

  test.each([
    ['2^31', 2n ** 31n, 2],
    ['2^53', 2n ** 53n, 1],
    ['2^63', 2n ** 63n, 4],
    ['-1', 2n ** 64n - 1n, 2],
    ['-1 by one block', 2n ** 64n - 1n, 1],
  ])('an address of %s does not wrap around', (_, lba, blocks) => {
    expect(outcome(run(cdb.read16(lba, blocks), NOTHING, blocks * 512))).toEqual(outOfRange)
    expect(outcome(run(cdb.write16(lba, blocks), new Uint8Array(blocks * 512)))).toEqual(outOfRange)
  })

  test.each([
    ['READ (10)', cdb.read10(0, 2, 0x20), 1, 5],
    ['READ (16)', cdb.read16(0, 2, 0xe0), 1, 7],
    ['WRITE (10)', cdb.write10(0, 2, 0x40), 1, 6],
    ['VERIFY (10)', cdb.verify10(0, 2, 0x20), 1, 5],
    ['READ (10) with RELADR', cdb.read10(0, 2, 0x01), 1, 0],
  ])('%s with protection information or reserved bits', (_, command, field, bit) => {
    const write = command[0] === 0x2a
    const request = run(command, write ? new Uint8Array(1024) : NOTHING, write ? 0 : 1024)
    expect(outcome(request)).toEqual(invalidField)
    expect(decodeSense(request.sense)).toMatchObject({ field, bit, inCdb: true })
    expect([request.residual, request.data.length]).toEqual([1024, 0])
  })

  test('NACA, since there is no ACA', () => {
    const command = cdb.read10(0, 1)
    command[9] = 4
    expect(decodeSense(run(command, NOTHING, 512).sense)).toMatchObject({ code: 0x2400, field: 9, bit: 2 })
  })

  test('residuals: the buffer is larger than the transfer', () => {
    const data = pattern(2 * 512)
    const written = run(cdb.write10(8, 2), new Uint8Array([...data, ...new Uint8Array(512 + 100).fill(9)]))
    expect([written.response, written.residual, written.written]).toEqual([0, 612, 108])
    const read = run(cdb.read10(8, 3), NOTHING, 3 * 512 + 10)
    expect([read.response, read.residual, read.written]).toEqual([0, 10, 108 + 3 * 512])
    expect(read.data.subarray(0, 1024)).toEqual(data)
    expect(read.data.subarray(1024)).not.toContain(9)
  })

  test('a transfer that is larger than the buffer is an overrun, and nothing is done', () => {
    const before = ask(cdb.read10(64, 4), 2048)
    const read = run(cdb.read10(64, 4), NOTHING, 2047)
    expect([outcome(read), read.residual]).toEqual([overrun, 2047])
    expect(outcome(run(cdb.write10(64, 4), new Uint8Array(2047)))).toEqual(overrun)
    expect(outcome(run(cdb.write10(64, 1)))).toEqual(overrun)
    // Data the wrong way.
    expect(outcome(run(cdb.read10(64, 1), new Uint8Array(512)))).toEqual(overrun)
    expect(outcome(run(cdb.write10(64, 1), NOTHING, 512))).toEqual(overrun)
    expect(ask(cdb.read10(64, 4), 2048)).toEqual(before)
  })

  test('any framing, at odd addresses', () => {
    const data = pattern(8 * 512)
    const readableCuts = [1, 18, 30, 2, 700, data.length - 700]
    expect(outcome(run(cdb.write16(24, 8), data, 0, { readableCuts, writableCuts: [7, 101], skew: 3 }))).toEqual(good)
    const writableCuts = [10, 97, 2, data.length - 1]
    const read = run(cdb.read16(24, 8), NOTHING, data.length, { readableCuts: [5, 46], writableCuts, skew: 5 })
    expect(outcome(read)).toEqual(good)
    expect(read.data).toEqual(data)
  })

  test('a transfer of several steps, and more blocks than the block limits page allows', () => {
    const data = pattern(MIB + 512)
    tell(cdb.write10(8, data.length / 512), data)
    expect(Buffer.compare(ask(cdb.read10(8, data.length / 512), data.length), data)).toBe(0)
    const request = run(cdb.verify16(0, 0, 0))
    expect(outcome(request)).toEqual(good)
  })

  test('blocks of 4096 bytes', () => {
    expect(opened.driver.capacity(2)).toEqual({ blocks: 256, blockSize: 4096 })
    const data = pattern(8192)
    tell(cdb.write10(254, 2), data, 2)
    expect(ask(cdb.read16(254, 2), 8192, 2)).toEqual(data)
    expect(readFileSync(backend().images[2]!).subarray(254 * 4096)).toEqual(Buffer.from(data))
    expect(outcome(run(cdb.read10(255, 2), NOTHING, 8192, { lun: 2 }))).toEqual(outOfRange)
  })

  test('many at once, on two queues', () => {
    using both = openTwo()
    const requests = Array.from({ length: 40 }, (_, i) => {
      const driver = both.drivers[i % 2]!
      return { data: pattern(2048), lba: 1000 + i * 4, driver }
    })
    for (const { data, lba, driver } of requests) driver.submit(cdb.write10(lba, 4), data, 0, {}, false)
    for (const driver of both.drivers) {
      driver.publish()
      driver.wait()
    }
    for (const { data, lba, driver } of requests) expect(driver.ask(cdb.read10(lba, 4), 2048)).toEqual(data)
  })
})

/** Another session: the one of this file's tests has to go first. */
function openTwo(): OpenedScsi {
  opened[Symbol.dispose]()
  const two = openScsi(backend().socket, { requestQueues: 2, clear: 3 })
  return {
    ...two,
    [Symbol.dispose]: () => {
      two[Symbol.dispose]()
      opened = openScsi(backend().socket, { clear: 3, arena: 2 * MIB })
    },
  }
}

describe('verification', () => {
  test.each([
    ['VERIFY (10)', cdb.verify10],
    ['VERIFY (16)', cdb.verify16],
  ])('%s: of the medium, of data, of one block', (_, verify) => {
    const data = pattern(4 * 512)
    tell(cdb.write10(200, 4), data)
    expect(outcome(run(verify(200, 4)))).toEqual(good)
    expect(outcome(run(verify(200, 4, 2), data))).toEqual(good)
    const other = data.slice()
    other[1030] = ~other[1030]! & 0xff
    const request = run(verify(200, 4, 2), other)
    expect(outcome(request)).toEqual(check(0xe, 0x1d00))
    expect(decodeSense(request.sense).information).toBe(1030)
    const block = pattern(512)
    tell(cdb.writeSame10(200, 4), block)
    expect(outcome(run(verify(200, 4, 6), block))).toEqual(good)
    tell(cdb.write10(203, 1), pattern(512))
    const wrong = run(verify(200, 4, 6), block)
    expect(outcome(wrong)).toEqual(check(0xe, 0x1d00))
    expect(decodeSense(wrong.sense).information).toBeGreaterThanOrEqual(3 * 512)
  })

  test('BYTCHK 2, missing data, nothing, and too much', () => {
    expect(outcome(run(cdb.verify10(0, 1, 4), new Uint8Array(512)))).toEqual(invalidField)
    expect(outcome(run(cdb.writeVerify10(0, 1, 6), new Uint8Array(512)))).toEqual(invalidField)
    expect(outcome(run(cdb.verify10(0, 2, 2), new Uint8Array(512)))).toEqual(overrun)
    expect(outcome(run(cdb.verify10(0, 0, 2)))).toEqual(good)
    expect(outcome(run(cdb.verify10(BLOCKS - 1, 2)))).toEqual(outOfRange)
  })
})

describe('UNMAP and WRITE SAME', () => {
  /** Fills blocks 0 to 255. */
  const fill = () => {
    const data = pattern(256 * 512)
    tell(cdb.write10(0, 256), data)
    return data
  }
  const zeroes = (blocks: number) => new Uint8Array(blocks * 512)

  test('UNMAP frees the ranges of its list, and nothing beside them', () => {
    const data = fill()
    tell(cdb.synchronize10())
    const before = statSync(backend().images[0]!).blocks
    const list = unmapList([
      { lba: 8, blocks: 64 },
      { lba: 100, blocks: 0 },
      { lba: 128, blocks: 128 },
    ])
    const request = run(cdb.unmap(list.length), list)
    expect([outcome(request), request.residual]).toEqual([good, 0])
    const expected = data.slice()
    expected.fill(0, 8 * 512, 72 * 512).fill(0, 128 * 512)
    expect(ask(cdb.read10(0, 256), data.length)).toEqual(expected)
    expect(before - statSync(backend().images[0]!).blocks).toBe(192)
  })

  test('UNMAP with a bad list changes nothing', () => {
    const data = fill()
    const good1 = { lba: 0, blocks: 8 }
    const cases: [Uint8Array, object][] = [
      [unmapList([good1]).subarray(0, 7), check(5, 0x1a00)],
      [unmapList([good1]).subarray(0, 20), check(5, 0x1a00)],
      [unmapList([good1, { lba: BLOCKS, blocks: 1 }]), outOfRange],
      [unmapList([good1, { lba: 2n ** 64n - 1n, blocks: 2 }]), outOfRange],
      [unmapList(new Array<typeof good1>(65).fill(good1)), check(5, 0x2600)],
    ]
    for (const [list, expected] of cases) expect(outcome(run(cdb.unmap(list.length), list))).toEqual(expected)
    expect(outcome(run(cdb.unmap(24), unmapList([good1]).subarray(0, 23)))).toEqual(overrun)
    expect(outcome(run(cdb.unmap(24, 1), unmapList([good1])))).toEqual(invalidField)
    expect(outcome(run(cdb.unmap(0)))).toEqual(good)
    expect(ask(cdb.read10(0, 256), data.length)).toEqual(data)
  })

  test.each([
    ['(10), zeroes', cdb.writeSame10, 0, zeroes(1)],
    ['(16), zeroes', cdb.writeSame16, 0, zeroes(1)],
    ['(10), zeroes that may be unmapped', cdb.writeSame10, 8, zeroes(1)],
    ['(16), zeroes that may be unmapped', cdb.writeSame16, 8, zeroes(1)],
    ['(16) without data', cdb.writeSame16, 1, NOTHING],
    ['(16) without data, may be unmapped', cdb.writeSame16, 9, NOTHING],
    ['(10), a pattern', cdb.writeSame10, 0, pattern(512)],
    ['(16), a pattern that cannot be unmapped', cdb.writeSame16, 8, pattern(512)],
  ])('WRITE SAME %s', (_, writeSame, flags, block) => {
    const data = fill()
    const request = run(writeSame(3, 200, flags), block)
    expect([outcome(request), request.residual]).toEqual([good, 0])
    const expected = data.slice()
    for (let i = 3; i < 203; i++) expected.set(block.length === 0 ? zeroes(1) : block, i * 512)
    expect(ask(cdb.read10(0, 256), data.length)).toEqual(expected)
  })

  test('WRITE SAME over more than a buffer, with blocks of 4096 bytes', () => {
    const block = pattern(4096)
    tell(cdb.writeSame10(1, 255), block, 2)
    const image = readFileSync(backend().images[2]!)
    for (let i = 1; i < 256; i++) expect(Buffer.compare(image.subarray(i * 4096, (i + 1) * 4096), block)).toBe(0)
  })

  test('WRITE SAME refuses 0 blocks, ANCHOR, LBDATA, PBDATA, and what is out of range', () => {
    const block = zeroes(1)
    const zero = run(cdb.writeSame10(0, 0), block)
    expect(outcome(zero)).toEqual(invalidField)
    expect(decodeSense(zero.sense).field).toBe(7)
    for (const flags of [0x10, 0x02, 0x04, 0x20])
      expect(outcome(run(cdb.writeSame16(0, 1, flags), block))).toEqual(invalidField)
    expect(outcome(run(cdb.writeSame10(0, 1, 1), block))).toEqual(invalidField)
    expect(outcome(run(cdb.writeSame16(BLOCKS - 1, 2), block))).toEqual(outOfRange)
    expect(outcome(run(cdb.writeSame16(2n ** 64n - 1n, 2), block))).toEqual(outOfRange)
    expect(outcome(run(cdb.writeSame10(0, 1), block.subarray(1)))).toEqual(overrun)
  })

  test('GET LBA STATUS', () => {
    const bytes = ask(cdb.getLbaStatus(BLOCKS - 5), 24)
    const view = new DataView(bytes.slice().buffer)
    expect([view.getUint32(0), view.getBigUint64(8), view.getUint32(16), view.getUint8(20)]).toEqual([
      20,
      BigInt(BLOCKS - 5),
      5,
      0,
    ])
    expect(outcome(run(cdb.getLbaStatus(BLOCKS), NOTHING, 24))).toEqual(outOfRange)
  })
})

describe('a read-only unit', () => {
  test('says so, reads, and refuses whatever writes', () => {
    expect(ask(cdb.modeSense6(8), 255, 1)[2]! & 0x80).toBe(0x80)
    expect(ask(cdb.read10(0, 8), 4096, 1)).toEqual(new Uint8Array(4096))
    const block = pattern(512)
    const list = unmapList([{ lba: 0, blocks: 1 }])
    const commands: [Uint8Array, Uint8Array][] = [
      [cdb.write6(0, 1), block],
      [cdb.write10(0, 1), block],
      [cdb.write16(0, 1), block],
      [cdb.writeVerify10(0, 1), block],
      [cdb.writeSame10(0, 1), block],
      [cdb.writeSame16(0, 1), block],
      [cdb.unmap(list.length), list],
    ]
    for (const [command, out] of commands) expect(outcome(run(command, out, 0, { lun: 1 }))).toEqual(check(7, 0x2700))
    expect(outcome(run(cdb.synchronize10(), NOTHING, 0, { lun: 1 }))).toEqual(good)
    expect(readFileSync(backend().images[1]!).every((byte) => byte === 0)).toBe(true)
  })
})

describe('what a unit says of itself', () => {
  test('INQUIRY and its pages, each cut to the allocation length', () => {
    expect(ask(cdb.inquiry(), 255)).toHaveLength(74)
    const short = run(cdb.inquiry(5), NOTHING, 96)
    expect([short.data.length, short.residual]).toEqual([5, 91])
    expect(outcome(run(cdb.inquiry(0)))).toEqual(good)
    expect(outcome(run(cdb.inquiry(255), NOTHING, 73))).toEqual(overrun)
    expect(Buffer.from(ask(cdb.vpd(0x80), 255)).toString('latin1', 4)).toBe('first-disk')
    expect([...ask(cdb.vpd(0), 255).subarray(4)]).toEqual([0, 0x80, 0x83, 0xb0, 0xb1, 0xb2])
    const serials = [0, 1, 2].map((lun) => Buffer.from(ask(cdb.vpd(0x80), 255, lun)).toString('latin1', 4))
    expect(new Set(serials).size).toBe(3)
    const missing = run(cdb.vpd(0xb9), NOTHING, 255)
    expect([outcome(missing), decodeSense(missing.sense).field]).toEqual([invalidField, 2])
    const page = cdb.inquiry()
    page[2] = 0x80
    expect(outcome(run(page, NOTHING, 255))).toEqual(invalidField)
  })

  test('capacity', () => {
    expect([...ask(cdb.readCapacity10(), 8)]).toEqual([0, 0, 0x1f, 0xff, 0, 0, 2, 0])
    expect(opened.driver.capacity()).toEqual({ blocks: BLOCKS, blockSize: 512 })
    const misplaced = cdb.readCapacity10()
    misplaced[5] = 1
    expect(outcome(run(misplaced, NOTHING, 8))).toEqual(invalidField)
    misplaced[8] = 1
    expect(outcome(run(misplaced, NOTHING, 8))).toEqual(good)
    expect(ask(cdb.readCapacity16(12), 12)).toHaveLength(12)
  })

  test('REPORT LUNS, of any unit', () => {
    const expected = `00000018${'00'.repeat(4)}${'00'.repeat(8)}0001${'00'.repeat(6)}0002${'00'.repeat(6)}`
    for (const lun of [0, 2, 77]) expect(Buffer.from(ask(cdb.reportLuns(), 4096, lun)).toString('hex')).toBe(expected)
    const address = Uint8Array.of(0xc1, 1, 0, 0, 0, 0, 0, 0)
    expect(run(cdb.reportLuns(), NOTHING, 4096, { address }).data).toHaveLength(32)
    expect(outcome(run(cdb.reportLuns(3), NOTHING, 64))).toEqual(invalidField)
  })

  test('the REPORT LUNS well-known unit knows no disk commands', () => {
    const address = Uint8Array.of(0xc1, 1, 0, 0, 0, 0, 0, 0)
    expect(run(cdb.inquiry(), NOTHING, 255, { address }).data[0]).toBe(0x1e)
    expect(outcome(run(cdb.testUnitReady(), NOTHING, 0, { address }))).toEqual(good)
    expect(decodeSense(run(cdb.requestSense(), NOTHING, 18, { address }).data)).toMatchObject({ key: 0, code: 0 })
    expect(outcome(run(cdb.read10(0, 1), NOTHING, 512, { address }))).toEqual(invalidOpcode)
    expect(outcome(run(cdb.vpd(0), NOTHING, 255, { address }))).toEqual(invalidField)
  })

  test.each([3, 4, 200, 16_000])('there is no unit %i', (lun) => {
    const nothing = check(5, 0x2500)
    expect(outcome(run(cdb.testUnitReady(), NOTHING, 0, { lun }))).toEqual(nothing)
    expect(outcome(run(cdb.read10(0, 1), NOTHING, 512, { lun }))).toEqual(nothing)
    expect(outcome(run(Uint8Array.of(0xff, 0, 0, 0, 0, 0), NOTHING, 0, { lun }))).toEqual(nothing)
    expect(run(cdb.inquiry(), NOTHING, 255, { lun }).data[0]).toBe(0x7f)
    expect(outcome(run(cdb.vpd(0), NOTHING, 255, { lun }))).toEqual(nothing)
    const sense = run(cdb.requestSense(), NOTHING, 18, { lun })
    expect([outcome(sense), decodeSense(sense.data)]).toMatchObject([good, { key: 5, code: 0x2500 }])
  })

  test.each([
    ['another target', [1, 1, 0, 0, 0, 0, 0, 0]],
    ['an address of another kind', [0, 0, 0, 0, 0, 0, 0, 0]],
  ])('there is no %s', (_, bytes) => {
    const request = run(cdb.inquiry(), NOTHING, 96, { address: Uint8Array.from(bytes) })
    expect([request.response, request.residual, request.written]).toEqual([3, 96, 108])
  })

  test('flat space addressing', () => {
    const address = Uint8Array.of(1, 0, 0x40, 0, 0, 0, 0, 0)
    expect(outcome(run(cdb.testUnitReady(), NOTHING, 0, { address }))).toEqual(good)
  })

  test('mode pages, and the write cache that can be switched off', () => {
    const caching = () => ask(cdb.modeSense6(8, 255, 8), 255)
    expect(caching()[6]! & 4).toBe(4)
    const list = caching()
    list[0] = 0
    list[2] = 0
    list[6] = 0
    const request = run(cdb.modeSelect6(list.length), list)
    expect([outcome(request), request.residual]).toEqual([good, 0])
    expect(caching()[6]! & 4).toBe(0)
    const data = pattern(1024)
    tell(cdb.write10(0, 2), data)
    tell(cdb.writeSame10(4, 4), data.subarray(0, 512))
    expect(ask(cdb.read10(0, 2), 1024)).toEqual(data)
    list[6] = 4
    tell(cdb.modeSelect6(list.length), list)
    expect(caching()[6]! & 4).toBe(4)
    expect(outcome(run(cdb.modeSelect6(24, 0x11), list))).toEqual(invalidField)
    expect(outcome(run(cdb.modeSense6(0xc8), NOTHING, 255))).toEqual(check(5, 0x3900))
    list[4] = 0x0c
    const wrong = run(cdb.modeSelect6(list.length), list)
    expect(outcome(wrong)).toEqual(check(5, 0x2600))
    expect(decodeSense(wrong.sense)).toMatchObject({ field: 4, inCdb: false })
  })

  test('START STOP UNIT', () => {
    tell(cdb.startStop(0))
    const notReady = check(2, 0x0402)
    expect(outcome(run(cdb.testUnitReady()))).toEqual(notReady)
    expect(outcome(run(cdb.read10(0, 1), NOTHING, 512))).toEqual(notReady)
    expect(decodeSense(ask(cdb.requestSense(), 18))).toMatchObject({ key: 2, code: 0x0402 })
    expect(outcome(run(cdb.inquiry(), NOTHING, 255))).toEqual(good)
    expect(outcome(run(cdb.testUnitReady(), NOTHING, 0, { lun: 2 }))).toEqual(good)
    tell(cdb.startStop(1))
    expect(outcome(run(cdb.testUnitReady()))).toEqual(good)
    // LOEJ, a power condition.
    expect(outcome(run(cdb.startStop(2)))).toEqual(invalidField)
    expect(outcome(run(cdb.startStop(0x30)))).toEqual(invalidField)
  })

  test('the rest', () => {
    expect(decodeSense(ask(cdb.requestSense(), 18))).toMatchObject({ key: 0, code: 0 })
    expect(outcome(run(cdb.requestSense(18, 1), NOTHING, 18))).toEqual(invalidField)
    tell(cdb.preventAllow(1))
    tell(cdb.preventAllow(0))
    for (const command of [cdb.synchronize10(), cdb.synchronize16(100, 8), cdb.synchronize10(BLOCKS - 1, 1, 2)])
      expect(outcome(run(command))).toEqual(good)
    expect(outcome(run(cdb.synchronize10(BLOCKS - 1, 2)))).toEqual(outOfRange)
    expect(ask(cdb.reportTmfs(), 16)).toHaveLength(4)
    expect(ask(cdb.reportOpcodes(1, 0x42), 4096)[1]).toBe(3)
    expect(ask(cdb.reportOpcodes(1, 0x42), 4096, 1)[1]).toBe(1)
  })

  test.each([
    ['RESERVE (6)', [0x16, 0, 0, 0, 0, 0]],
    ['RELEASE (10)', [0x57, 0, 0, 0, 0, 0, 0, 0, 0, 0]],
    ['PERSISTENT RESERVE IN', [0x5e, 0, 0, 0, 0, 0, 0, 0, 8, 0]],
    ['PERSISTENT RESERVE OUT', [0x5f, 0, 0, 0, 0, 0, 0, 0, 24, 0]],
    ['FORMAT UNIT', [0x04, 0, 0, 0, 0, 0]],
    ['a CDB of 32 bytes', [0x7f, 0, 0, 0, 0, 0, 0, 0x18, 0, 9]],
  ])('%s is no command here', (_, bytes) => {
    const request = run(Uint8Array.from(bytes), NOTHING, 512)
    expect(outcome(request)).toEqual(invalidOpcode)
    expect(decodeSense(request.sense)).toMatchObject({ field: 0, inCdb: true })
    expect(request.residual).toBe(512)
  })

  test('an unknown service action is an invalid field', () => {
    const request = run(Uint8Array.of(0x9e, 0x1f, ...new Array<number>(14).fill(0)), NOTHING, 32)
    expect(decodeSense(request.sense)).toMatchObject({ code: 0x2400, field: 1, bit: 4 })
  })
})

describe('config space', () => {
  test('sizes of sense data and CDB are the driver’s choice', () => {
    const config = () => opened.session.connection.getConfig(0, 36)!
    const words = (bytes: Uint8Array) => Array.from({ length: 7 }, (_, i) => Buffer.from(bytes).readUInt32LE(i * 4))
    expect(words(config())).toEqual([2, 126, 0xffff, 128, 16, 96, 32])
    opened[Symbol.dispose]()
    const word = (value: number) => new Uint8Array(Uint32Array.of(value).buffer)
    opened = openScsi(backend().socket, {
      clear: 0,
      before: ({ connection }) => {
        connection.setConfig(20, word(18))
        connection.setConfig(24, word(16))
        expect(words(connection.getConfig(0, 36)!).slice(5)).toEqual([18, 16])
        for (const [offset, value] of [
          [0, 1],
          [20, 253],
          [24, 15],
          [24, 261],
        ] as const)
          expect(() => connection.setConfig(offset, word(value))).toThrow()
        expect(words(connection.getConfig(0, 36)!).slice(5)).toEqual([18, 16])
      },
    })
    opened.driver.senseSize = 18
    opened.driver.cdbSize = 16
    expect(opened.driver.clearAttentions()).toEqual([0x2900])
    const data = pattern(1024)
    tell(cdb.write16(7, 2), data)
    expect(ask(cdb.read10(7, 2), 1024)).toEqual(data)
    opened[Symbol.dispose]()
    opened = openScsi(backend().socket, { clear: 3, arena: 2 * MIB })
    expect(words(config()).slice(5)).toEqual([96, 32])
  })
})

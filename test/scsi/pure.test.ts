/** The parts of the SCSI device that are bytes in, bytes out. */
import { describe, expect, test } from 'vitest'
import { unmapRanges } from '../../devices/scsi/command-set.ts'
import { commandOf, reportOpcodes, reportTmfs, withServiceAction, wrongBit } from '../../devices/scsi/commands.ts'
import * as inquiry from '../../devices/scsi/inquiry.ts'
import { decodeLun, encodeLun, NO_SUCH_TARGET, NO_SUCH_UNIT, WELL_KNOWN } from '../../devices/scsi/luns.ts'
import { modeSelect, modeSense } from '../../devices/scsi/mode.ts'
import { parseUnit } from '../../devices/scsi/options.ts'
import { loadState, saveState } from '../../devices/scsi/saved.ts'
import * as sense from '../../devices/scsi/sense.ts'
import { ATTENTIONS, attention, ScsiState, type UnitFile } from '../../devices/scsi/shared.ts'
import { decodeSense, unitAddress } from '../../src/frontend/scsi.ts'
import { cdb, unmapList } from '../../src/frontend/scsi-cdb.ts'

/** What a pure function refuses a command with. */
function refusal(result: unknown): { key: number; code: number; field: number; bit: number; inCdb: boolean } {
  if (!(result instanceof sense.Refusal)) throw new Error(`not refused: ${String(result)}`)
  const bytes = new Uint8Array(18)
  sense.writeSense(bytes, result.key, result.code, result.field)
  const { information: _, ...rest } = decodeSense(bytes)
  return rest
}

const invalidInCdb = (field: number, bit = -1) => ({ key: 5, code: 0x2400, field, bit, inCdb: true })
const invalidInList = (field: number, bit = -1) => ({ key: 5, code: 0x2600, field, bit, inCdb: false })
const listTooShort = { key: 5, code: 0x1a00, field: -1, bit: -1, inCdb: false }

function bytesOf(result: Uint8Array | sense.Refusal): Uint8Array {
  if (result instanceof sense.Refusal) throw new Error(`refused: ${result.code.toString(16)}`)
  return result
}

describe('addresses', () => {
  const decode = (...bytes: number[]) => {
    const view = new DataView(Uint8Array.from([...bytes, ...new Array<number>(8 - bytes.length).fill(0)]).buffer)
    return decodeLun(view.getUint32(0, true), view.getUint32(4, true))
  }

  test.each([
    [[1, 0, 0, 5], 5],
    [[1, 0, 0x40, 5], 5],
    [[1, 0, 0x41, 2], 258],
    [[1, 0, 0x7f, 0xff], 0x3fff],
    [[0xc1, 1], WELL_KNOWN],
    [[1, 0, 0xc1, 1], WELL_KNOWN],
    // Bus 1, logical unit addressing, extended addressing, a second level.
    [[1, 0, 1, 5], NO_SUCH_UNIT],
    [[1, 0, 0x80, 5], NO_SUCH_UNIT],
    [[1, 0, 0xc1, 2], NO_SUCH_UNIT],
    [[1, 0, 0, 5, 0, 0, 0, 1], NO_SUCH_UNIT],
    [[1, 1, 0, 0], NO_SUCH_TARGET],
    [[0, 0, 0, 0], NO_SUCH_TARGET],
    [[0xc1, 2], NO_SUCH_TARGET],
    [[0xc1, 1, 0, 1], NO_SUCH_TARGET],
  ])('%j is %i', (bytes, lun) => {
    expect(decode(...bytes)).toBe(lun)
  })

  test('what is encoded is what the driver uses', () => {
    const bytes = new Uint8Array(10).fill(9)
    encodeLun(bytes, 1, 200)
    expect([...bytes]).toEqual([9, ...unitAddress(200), 9])
  })
})

describe('sense data', () => {
  test('fixed format, with information and a field of the CDB', () => {
    const bytes = new Uint8Array(20).fill(0xee)
    sense.writeSense(bytes, 5, 0x2400, sense.cdbField(2, 5), 0x1234_5678)
    expect(Buffer.from(bytes).toString('hex')).toBe(`f00005123456780a0000000024000 0cd0002eeee`.replaceAll(' ', ''))
    expect(decodeSense(bytes)).toEqual({
      key: 5,
      code: 0x2400,
      information: 0x1234_5678,
      field: 2,
      bit: 5,
      inCdb: true,
    })
  })

  test('a byte beyond 255 of the parameters', () => {
    const bytes = new Uint8Array(18)
    sense.writeSense(bytes, 5, 0x2600, sense.parameterField(1032))
    expect(decodeSense(bytes)).toMatchObject({ field: 1032, bit: -1, inCdb: false, information: -1 })
  })

  test('information that has no room is left out', () => {
    const bytes = new Uint8Array(18)
    sense.writeSense(bytes, 3, 0x1100, sense.NO_FIELD, 2 ** 32)
    expect(decodeSense(bytes)).toMatchObject({ information: -1, field: -1 })
    sense.writeSense(bytes, 3, 0x1100, sense.NO_FIELD, 2 ** 32 - 1)
    expect(decodeSense(bytes).information).toBe(2 ** 32 - 1)
  })
})

describe('commands', () => {
  const all = () => true

  test('all supported ones in one list, each with its length', () => {
    const bytes = bytesOf(reportOpcodes(cdb.reportOpcodes(0), all))
    const view = new DataView(bytes.buffer)
    expect(view.getUint32(0)).toBe(bytes.length - 4)
    const list = Array.from({ length: (bytes.length - 4) / 8 }, (_, i) => ({
      opcode: bytes[4 + i * 8]!,
      action: (bytes[9 + i * 8]! & 1) === 0 ? -1 : view.getUint16(6 + i * 8),
      length: view.getUint16(10 + i * 8),
    }))
    expect(list).toContainEqual({ opcode: 0x28, action: -1, length: 10 })
    expect(list).toContainEqual({ opcode: 0x9e, action: 0x10, length: 16 })
    expect(list).toContainEqual({ opcode: 0x9e, action: 0x12, length: 16 })
    expect(list).toContainEqual({ opcode: 0xa3, action: 0x0c, length: 12 })
    for (const { opcode, length } of list) expect([6, 10, 10, 0, 16, 12][opcode >> 5]).toBe(length)
    expect(new Set(list.map(({ opcode, action }) => `${opcode}/${action}`)).size).toBe(list.length)
  })

  test('one that the unit does not offer is left out', () => {
    const without = (command: { opcode: number }) => command.opcode !== 0x42
    const shorter = bytesOf(reportOpcodes(cdb.reportOpcodes(0), without))
    expect(bytesOf(reportOpcodes(cdb.reportOpcodes(0), all)).length - shorter.length).toBe(8)
    expect(bytesOf(reportOpcodes(cdb.reportOpcodes(1, 0x42), without))[1]).toBe(1)
  })

  test('time-outs are asked for in both forms', () => {
    const list = bytesOf(reportOpcodes(cdb.reportOpcodes(0x80), all))
    expect([list[9]! & 2, (list.length - 4) % 20]).toEqual([2, 0])
    const one = bytesOf(reportOpcodes(cdb.reportOpcodes(0x81, 0x28), all))
    expect([one[1], one.length, one[15]]).toEqual([0x83, 4 + 10 + 12, 10])
  })

  test.each([
    ['by opcode', 1, 0x28, 0, 3],
    ['by opcode, whatever the service action', 1, 0x28, 7, 3],
    ['by service action', 2, 0x9e, 0x10, 3],
    ['either way, without', 3, 0x28, 0, 3],
    ['either way, without one but asked for', 3, 0x28, 1, 1],
    ['either way, with', 3, 0x9e, 0x12, 3],
    ['unknown', 1, 0x5f, 0, 1],
    ['unknown service action', 2, 0x9e, 0x1f, 1],
  ])('one %s', (_, options, opcode, action, support) => {
    expect(bytesOf(reportOpcodes(cdb.reportOpcodes(options, opcode, action), all))[1]).toBe(support)
  })

  test.each([
    [1, 0x9e],
    [2, 0x28],
    [4, 0x28],
  ])('reporting option %i is refused for %i', (options, opcode) => {
    expect(refusal(reportOpcodes(cdb.reportOpcodes(options, opcode), all))).toEqual(invalidInCdb(2, 2))
  })

  test('usage data of READ (10): no protection information, DPO and FUA', () => {
    const bytes = bytesOf(reportOpcodes(cdb.reportOpcodes(1, 0x28), all))
    expect([...bytes.subarray(4)]).toEqual([0x28, 0x1a, 255, 255, 255, 255, 0x1f, 255, 255, 0])
  })

  test('the wrong bit is the highest of the first byte that has one', () => {
    const command = commandOf(0x28)!
    expect(wrongBit(Uint8Array.of(0x28, 0x60, 0, 0, 0, 0, 0, 0, 0, 4), command)).toBe(sense.cdbField(1, 6))
    expect(wrongBit(Uint8Array.of(0x28, 0, 0, 0, 0, 0, 0x20, 0, 0, 4), command)).toBe(sense.cdbField(6, 5))
    const capacity = withServiceAction(0x9e, 0x10)!
    expect(wrongBit(Uint8Array.of(0x9e, 0x90, ...new Array<number>(14).fill(0)), capacity)).toBe(sense.cdbField(1, 7))
  })

  test('task management functions', () => {
    expect([...reportTmfs(cdb.reportTmfs())]).toEqual([0xdc, 3, 0, 0])
    const extended = reportTmfs(cdb.reportTmfs(0x80))
    expect([extended.length, extended[0], extended[3]]).toEqual([16, 0xdc, 12])
  })
})

describe('INQUIRY', () => {
  const unit = { blockSize: 512, blocks: 8192, discard: true, serial: 'disk-of-mine' }
  const page = (code: number, about = unit) => bytesOf(inquiry.vitalProductData(code, about))

  test('standard data', () => {
    const bytes = inquiry.standardInquiry('disk')
    expect([bytes[0], bytes[2], bytes[3], bytes[4], bytes[7]]).toEqual([0, 6, 0x12, bytes.length - 5, 2])
    expect(Buffer.from(bytes.subarray(8, 36)).toString()).toBe('VIRTIOD virtiod disk    1.0 ')
    expect(inquiry.standardInquiry('none')[0]).toBe(0x7f)
    expect(inquiry.standardInquiry('well-known')[0]).toBe(0x1e)
  })

  test('every page says its code and length, and page 0 lists it', () => {
    const codes = [...page(0).subarray(4)]
    expect(codes).toEqual([0, 0x80, 0x83, 0xb0, 0xb1, 0xb2])
    for (const code of codes) {
      const bytes = page(code)
      expect([bytes[1], new DataView(bytes.buffer).getUint16(2)]).toEqual([code, bytes.length - 4])
    }
    expect(refusal(inquiry.vitalProductData(0x84, unit))).toEqual(invalidInCdb(2))
  })

  test('the serial number, and designators made of it', () => {
    expect(Buffer.from(page(0x80).subarray(4)).toString()).toBe('disk-of-mine')
    const bytes = page(0x83)
    expect([...bytes.subarray(4, 8)]).toEqual([2, 1, 0, 20])
    expect(Buffer.from(bytes.subarray(8, 28)).toString()).toBe('VIRTIOD disk-of-mine')
    expect([...bytes.subarray(28, 32)]).toEqual([1, 3, 0, 8])
    expect(bytes[32]! >> 4).toBe(3)
    const other = page(0x83, { ...unit, serial: 'disk-of-yrs!' })
    expect(other.subarray(32)).not.toEqual(bytes.subarray(32))
  })

  test('block limits and provisioning', () => {
    const view = new DataView(page(0xb0).buffer)
    expect(view.getUint8(4)).toBe(1)
    expect([view.getUint16(6), view.getUint32(8)]).toEqual([8, 131_072])
    expect([20, 24, 28, 32].map((at) => view.getUint32(at))).toEqual([8_388_608, 64, 8, 0x8000_0000])
    expect(view.getBigUint64(36)).toBe(8_388_608n)
    expect([...page(0xb2)]).toEqual([0, 0xb2, 0, 4, 0, 0xe4, 2, 0])
    expect(page(0xb1)[5]).toBe(1)
  })

  test('without discard there is no UNMAP', () => {
    const full = { ...unit, discard: false }
    const view = new DataView(page(0xb0, full).buffer)
    expect([20, 24, 28, 32].map((at) => view.getUint32(at))).toEqual([0, 0, 0, 0])
    expect([...page(0xb2, full).subarray(4)]).toEqual([0, 0, 0, 0])
    expect(inquiry.readCapacity16(full)[14]).toBe(0)
  })

  test('capacities beyond 32 bits', () => {
    const huge = { ...unit, blocks: 2 ** 33 + 1 }
    expect(new DataView(inquiry.readCapacity10(huge).buffer).getUint32(0)).toBe(0xffff_ffff)
    const long = new DataView(inquiry.readCapacity16(huge).buffer)
    expect(long.getBigUint64(0)).toBe(2n ** 33n)
    // 2^3 logical blocks in a physical one; LBPME, LBPRZ.
    expect([long.getUint8(13), long.getUint8(14)]).toEqual([3, 0xc0])
    expect(new DataView(inquiry.lbaStatus(huge, 7).buffer).getUint32(16)).toBe(0xffff_ffff)
  })

  test('REPORT LUNS', () => {
    const list = (select: number) => Buffer.from(bytesOf(inquiry.reportLuns(select, [0, 2, 255]))).toString('hex')
    expect(list(0)).toBe(`00000018${'00'.repeat(4)}${'00'.repeat(8)}0002${'00'.repeat(6)}00ff${'00'.repeat(6)}`)
    expect(list(1)).toBe(`00000008${'00'.repeat(4)}c101${'00'.repeat(6)}`)
    expect(list(2)).toHaveLength(2 * (8 + 4 * 8))
    expect(refusal(inquiry.reportLuns(3, []))).toEqual(invalidInCdb(2))
  })
})

describe('mode pages', () => {
  const settings = { readOnly: false, blocks: 8192, blockSize: 512, writeback: true, writebackDefault: true }
  const senseOf = (command: Uint8Array, about = settings) => bytesOf(modeSense(command, about))

  test('all pages, short and long', () => {
    const short = senseOf(cdb.modeSense6(0x3f))
    expect([...short.subarray(0, 4)]).toEqual([short.length - 1, 0, 0x10, 8])
    expect([...short.subarray(4, 12)]).toEqual([0, 0, 0x20, 0, 0, 0, 2, 0])
    expect([short[12], short[14]! & 4, short[32]]).toEqual([8, 4, 10])
    const long = senseOf(cdb.modeSense10(0x3f))
    expect(new DataView(long.buffer).getUint16(0)).toBe(long.length - 2)
    expect(long.subarray(8)).toEqual(short.subarray(4))
  })

  test('without block descriptor, with a long one', () => {
    expect(senseOf(cdb.modeSense6(8, 255, 8))).toHaveLength(4 + 20)
    const long = senseOf(cdb.modeSense10(8, 255, 0x10), { ...settings, blocks: 2 ** 33 })
    expect([long[4], long[7], new DataView(long.buffer).getBigUint64(8)]).toEqual([1, 16, 2n ** 33n])
  })

  test.each([
    ['current', 0, 0],
    ['changeable', 1, 4],
    ['default', 2, 4],
  ])('WCE: %s values', (_, control, wce) => {
    const bytes = senseOf(cdb.modeSense6((control << 6) | 8, 255, 8), { ...settings, writeback: false })
    expect(bytes[6]! & 4).toBe(wce)
  })

  test('a read-only unit is write-protected', () => {
    expect(senseOf(cdb.modeSense6(8), { ...settings, readOnly: true })[2]).toBe(0x90)
  })

  test('what is refused', () => {
    expect(refusal(modeSense(cdb.modeSense6(0xc8), settings)).code).toBe(0x3900)
    expect(refusal(modeSense(cdb.modeSense6(0x1c), settings))).toEqual(invalidInCdb(2, 5))
    const subpage = cdb.modeSense6(8)
    subpage[3] = 1
    expect(refusal(modeSense(subpage, settings))).toEqual(invalidInCdb(3))
    subpage[3] = 0xff
    expect(modeSense(subpage, settings)).toBeInstanceOf(Uint8Array)
  })

  const caching = (wce: number) => [8, 18, wce, ...new Array<number>(17).fill(0)]
  const select = (...list: number[]) => modeSelect(cdb.modeSelect6(list.length), Uint8Array.from(list), settings)

  test('MODE SELECT switches WCE', () => {
    expect(select(0, 0, 0, 0, ...caching(0))).toBe(false)
    expect(select(0, 0, 0, 0, ...caching(4))).toBe(true)
    expect(select()).toBe(true)
    const long = Uint8Array.from([0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 2, 0, ...caching(0)])
    expect(modeSelect(cdb.modeSelect10(long.length), long, settings)).toBe(false)
  })

  test('what was read can be written back', () => {
    for (const command of [cdb.modeSense6(0x3f), cdb.modeSense10(0x3f), cdb.modeSense10(0x3f, 255, 0x10)]) {
      const list = senseOf(command)
      const back = command[0] === 0x1a ? cdb.modeSelect6(list.length) : cdb.modeSelect10(list.length)
      expect(modeSelect(back, list, settings)).toBe(true)
    }
  })

  test('MODE SELECT refuses what cannot be changed, and lists that are cut', () => {
    expect(refusal(modeSelect(cdb.modeSelect6(4, 0), new Uint8Array(4), settings))).toEqual(invalidInCdb(1, 4))
    expect(refusal(select(0, 0, 0))).toEqual(listTooShort)
    expect(refusal(select(0, 0, 0, 8, 0, 0))).toEqual(listTooShort)
    expect(refusal(select(0, 0, 0, 0, ...caching(4).slice(0, 10)))).toEqual(listTooShort)
    expect(refusal(select(0, 0, 0, 0, 8))).toEqual(listTooShort)
    expect(refusal(select(0, 1, 0, 0))).toEqual(invalidInList(1))
    expect(refusal(select(0, 0, 0, 7))).toEqual(invalidInList(3))
    expect(refusal(select(0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 2, 0))).toEqual(invalidInList(4))
    expect(refusal(select(0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 16, 0))).toEqual(invalidInList(8))
    expect(refusal(select(0, 0, 0, 0, ...caching(5)))).toEqual(invalidInList(6, 0))
    expect(refusal(select(0, 0, 0, 0, 0x1c, 10))).toEqual(invalidInList(4, 5))
    expect(refusal(select(0, 0, 0, 0, 0x48, 18))).toEqual(invalidInList(4, 6))
    expect(refusal(select(0, 0, 0, 0, 8, 17))).toEqual(invalidInList(5))
  })
})

describe('UNMAP lists', () => {
  const read = (list: Uint8Array, blockSize = 512) => {
    const ranges = new Float64Array(128)
    const count = unmapRanges(list, 2 ** 34, blockSize, ranges)
    return typeof count === 'number' ? [...ranges.subarray(0, count * 2)] : refusal(count)
  }
  const patched = (at: number, value: number) => {
    const list = unmapList([{ lba: 1, blocks: 2 }])
    new DataView(list.buffer).setUint16(at, value)
    return list
  }

  test('ranges in bytes', () => {
    expect(read(unmapList([]))).toEqual([])
    const list = unmapList([
      { lba: 2n ** 33n, blocks: 8 },
      { lba: 5, blocks: 0 },
    ])
    expect(read(list, 4096)).toEqual([2 ** 45, 32_768, 20_480, 0])
    expect(read(unmapList([{ lba: 2 ** 34, blocks: 0 }]))).toEqual([2 ** 43, 0])
  })

  test.each([
    ['no header', new Uint8Array(7)],
    ['data length beyond the list', patched(0, 23)],
    ['descriptors beyond the list', patched(2, 32)],
    ['half a descriptor', patched(2, 8)],
  ])('%s is a length error', (_, list) => {
    expect(read(list)).toEqual(listTooShort)
  })

  test.each([
    ['behind the end', 2n ** 34n, 1],
    ['across the end', 2n ** 34n - 1n, 2],
    ['around 2^64', 2n ** 64n - 1n, 2],
  ])('%s is out of range', (_, lba, blocks) => {
    expect(read(unmapList([{ lba, blocks }]))).toMatchObject({ code: 0x2100 })
  })

  test('more descriptors or blocks than the limits', () => {
    const many = Array.from({ length: 65 }, (_, lba) => ({ lba, blocks: 1 }))
    expect(read(unmapList(many.slice(1)))).toHaveLength(128)
    expect(read(unmapList(many))).toEqual(invalidInList(2))
    const large = { lba: 0, blocks: 8_388_608 }
    expect(read(unmapList([large]))).toEqual([0, 2 ** 32])
    expect(read(unmapList([large, { lba: 0, blocks: 1 }]))).toEqual(invalidInList(32))
  })
})

describe('--lun', () => {
  test.each([
    ['a.img', { path: 'a.img', readOnly: false, hotplug: false, serial: undefined, blockSize: undefined }],
    ['a,,b.img,read-only', { path: 'a,b.img', readOnly: true }],
    ['a,,,hotplug', { path: 'a,', hotplug: true }],
    ['a,,,,b', { path: 'a,,b' }],
    ['a,serial=x y=,block-size=4096', { serial: 'x y=', blockSize: 4096 }],
  ])('%s', (text, expected) => {
    expect(parseUnit(text)).toMatchObject(expected)
  })

  test.each([
    [',read-only', 'begins with no path'],
    ['a,', '"" is no option'],
    ['a,readonly', '"readonly" is no option of a unit. There are read-only'],
    ['a,read-only=1', '"read-only=1" is no option'],
    ['a,serial', '"serial" is no option'],
    ['a,serial=', 'Give 1 to 36 ASCII characters'],
    ['a,serial=ä', 'Give 1 to 36 ASCII characters'],
    ['a,block-size=513', 'Give one of 512, 1024'],
    ['a,hotplug,hotplug', 'given twice'],
  ])('%s is refused', (text, message) => {
    expect(() => parseUnit(text)).toThrow(
      expect.objectContaining({ code: 'ERR_SCSI_LUN', option: '--lun', message: expect.stringContaining(message) })
    )
  })
})

describe('state', () => {
  const file: UnitFile = {
    fd: 7,
    size: 2 ** 20 + 100,
    blockSize: 4096,
    memoryAlign: 1,
    lengthAlign: 1,
    readOnly: false,
    discard: true,
    writeback: true,
    serial: 's'.repeat(36),
  }

  test('both halves see the same unit', () => {
    const state = new ScsiState(2)
    const other = new ScsiState(2, state.buffer).units[1]!
    expect([other.generation, other.current]).toEqual([0, 0])
    state.units[1]!.plugIn(file, 3)
    expect(other).toMatchObject({ generation: 3, fd: 7, blocks: 256, blockSize: 4096, discard: true, readOnly: false })
    expect(other).toMatchObject({ serial: 's'.repeat(36), writeback: true, stopped: false })
    expect(state.units[0]!.generation).toBe(0)
    state.units[1]!.pullOut()
    expect(other.generation).toBe(0)
  })

  test('attentions come once each, in their order', () => {
    const unit = new ScsiState(1).units[0]!
    unit.plugIn(file, 1)
    for (const code of [...ATTENTIONS].reverse()) unit.raise(code)
    expect(ATTENTIONS.map(() => unit.takeAttention())).toEqual(ATTENTIONS)
    expect(unit.takeAttention()).toBe(0)
    unit.raise(sense.CAPACITY_DATA_HAS_CHANGED)
    unit.reset(sense.BUS_DEVICE_RESET_FUNCTION)
    expect(unit.attentions).toBe(attention(sense.BUS_DEVICE_RESET_FUNCTION))
  })

  test('is carried over', () => {
    const state = new ScsiState(2)
    state.units[1]!.plugIn(file, 1)
    state.senseSize = 32
    state.units[1]!.writeback = false
    state.units[1]!.attentions = 0
    const there = new ScsiState(2)
    for (const unit of there.units) unit.plugIn(file, 9)
    state.missed = true
    loadState(there, saveState(state))
    expect([there.senseSize, there.cdbSize, there.missed]).toEqual([32, 32, true])
    expect(there.units[1]).toMatchObject({ writeback: false, attentions: 0 })
    // What the guest doesn't know yet is new to it.
    expect(there.units[0]!.attentions).not.toBe(0)
  })

  test.each([
    ['{}', 'no state of a SCSI device'],
    ['null', 'no state of a SCSI device'],
    ['{"senseSize":96,"cdbSize":300,"missed":false,"units":[]}', 'no state of a SCSI device'],
    ['{"senseSize":96,"cdbSize":32,"missed":false,"units":[{"lun":0}]}', 'this device has not'],
    ['{"senseSize":96,"cdbSize":32,"missed":false,"units":[null]}', 'this device has not'],
    ['{"senseSize":96,"cdbSize":32,"missed":false,"units":[{"lun":1}]}', 'no state of a logical unit'],
    ['x', 'JSON'],
  ])('%s is refused', (text, message) => {
    const state = new ScsiState(2)
    state.units[1]!.plugIn(file, 1)
    expect(() => loadState(state, new TextEncoder().encode(text))).toThrow(message)
  })
})

/**
 * The commands that a logical unit knows (SPC-4, SBC-3): their CDBs, of which every bit that means nothing here has to be
 * zero, and REPORT SUPPORTED OPERATION CODES, which tells the driver the same. Pure.
 */
import { cdbField, ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB, Refusal } from './sense.ts'

// What a command does, for the request queue's switch: dense, so that it is one jump.
export const TEST_UNIT_READY = 0
export const REQUEST_SENSE = 1
export const INQUIRY = 2
export const MODE_SELECT = 3
export const MODE_SENSE = 4
export const START_STOP_UNIT = 5
export const PREVENT_ALLOW = 6
export const READ_CAPACITY_10 = 7
export const READ_CAPACITY_16 = 8
export const REPORT_LUNS = 9
export const REPORT_OPCODES = 10
export const REPORT_TMFS = 11
export const GET_LBA_STATUS = 12
export const READ = 13
export const WRITE = 14
export const VERIFY = 15
export const WRITE_AND_VERIFY = 16
export const SYNCHRONIZE_CACHE = 17
export const UNMAP = 18
export const WRITE_SAME = 19

/** A CDB is read up to here; none that is known is longer. */
export const CDB_LENGTH = 16

/** One row of {@link KNOWN}. */
export interface Command {
  readonly action: number
  readonly opcode: number
  /** -1 = the operation code has none. */
  readonly serviceAction: number
  /** Bytes of the CDB. */
  readonly length: number
  /** It needs the medium: a unit that was stopped refuses it. */
  readonly medium: boolean
  /** SPC-4 §6.35.3 "CDB USAGE DATA": the bits that are looked at. */
  readonly usage: Uint8Array
  /** Bits that have to be zero, as the words of a CDB that is read four bytes at a time. */
  readonly reserved: Uint32Array
}

/** @param usage in hexadecimal; `ff*4` = four times */
function command(action: number, usage: string, medium = false, serviceAction = -1): Command {
  const bytes = usage.split(' ').flatMap((word) => {
    const [byte = '', times = '1'] = word.split('*')
    return new Array<number>(Number(times)).fill(Number.parseInt(byte, 16))
  })
  const reserved = new Uint8Array(CDB_LENGTH)
  for (const [i, byte] of bytes.entries()) reserved[i] = ~byte
  // Operation code and service action found the row.
  reserved[0] = 0
  if (serviceAction >= 0) reserved[1] = ~0x1f
  return {
    action,
    opcode: bytes[0]!,
    serviceAction,
    length: bytes.length,
    medium,
    usage: Uint8Array.from(bytes),
    reserved: new Uint32Array(reserved.buffer),
  }
}

/**
 * In byte 1 of reads and writes DPO, FUA and FUA_NV are known, of which the last is obsolete and means nothing; protection
 * information is not. Group numbers are taken and mean nothing.
 */
const KNOWN: readonly Command[] = [
  command(TEST_UNIT_READY, '00 00*5'),
  command(REQUEST_SENSE, '03 00 00 00 ff 00'),
  command(READ, '08 1f ff ff ff 00', true),
  command(WRITE, '0a 1f ff ff ff 00', true),
  command(INQUIRY, '12 01 ff ff ff 00'),
  command(MODE_SELECT, '15 10 00 00 ff 00'),
  command(MODE_SENSE, '1a 08 ff ff ff 00'),
  command(START_STOP_UNIT, '1b 01 00 00 05 00'),
  command(PREVENT_ALLOW, '1e 00 00 00 03 00'),
  command(READ_CAPACITY_10, '25 00 ff*4 00 00 01 00', true),
  command(READ, '28 1a ff*4 1f ff ff 00', true),
  command(WRITE, '2a 1a ff*4 1f ff ff 00', true),
  command(WRITE_AND_VERIFY, '2e 16 ff*4 1f ff ff 00', true),
  command(VERIFY, '2f 16 ff*4 1f ff ff 00', true),
  command(SYNCHRONIZE_CACHE, '35 06 ff*4 1f ff ff 00', true),
  command(WRITE_SAME, '41 08 ff*4 1f ff ff 00', true),
  command(UNMAP, '42 00 00*4 1f ff ff 00', true),
  command(MODE_SELECT, '55 10 00*5 ff ff 00'),
  command(MODE_SENSE, '5a 18 ff ff 00*3 ff ff 00'),
  command(READ, '88 1a ff*12 1f 00', true),
  command(WRITE, '8a 1a ff*12 1f 00', true),
  command(WRITE_AND_VERIFY, '8e 16 ff*12 1f 00', true),
  command(VERIFY, '8f 16 ff*12 1f 00', true),
  command(SYNCHRONIZE_CACHE, '91 06 ff*12 1f 00', true),
  command(WRITE_SAME, '93 09 ff*12 1f 00', true),
  command(READ_CAPACITY_16, '9e 10 ff*12 01 00', true, 0x10),
  command(GET_LBA_STATUS, '9e 12 ff*12 00 00', true, 0x12),
  command(REPORT_LUNS, 'a0 00 ff 00*3 ff*4 00 00'),
  command(REPORT_OPCODES, 'a3 0c 87 ff*3 ff*4 00 00', false, 0x0c),
  command(REPORT_TMFS, 'a3 0d 80 00*3 ff*4 00 00', false, 0x0d),
  command(READ, 'a8 1a ff*8 1f 00', true),
  command(WRITE, 'aa 1a ff*8 1f 00', true),
  command(WRITE_AND_VERIFY, 'ae 16 ff*8 1f 00', true),
  command(VERIFY, 'af 16 ff*8 1f 00', true),
]

/** By operation code; of those with service actions the first row. */
const BY_OPCODE: (Command | undefined)[] = new Array<Command | undefined>(256).fill(undefined)
for (const one of KNOWN) BY_OPCODE[one.opcode] ??= one

/** The command of an operation code; one with service actions has to be looked up by {@link withServiceAction}. */
export function commandOf(opcode: number): Command | undefined {
  return BY_OPCODE[opcode]
}

export function withServiceAction(opcode: number, serviceAction: number): Command | undefined {
  return KNOWN.find((one) => one.opcode === opcode && one.serviceAction === serviceAction)
}

/** The first bit that has to be zero and isn't, as a field. */
export function wrongBit(cdb: Uint8Array, { usage, serviceAction }: Command): number {
  for (let byte = 1; byte < usage.length; byte++) {
    const mask = byte === 1 && serviceAction >= 0 ? 0x1f : usage[byte]!
    const wrong = cdb[byte]! & ~mask
    if (wrong !== 0) return cdbField(byte, 31 - Math.clz32(wrong))
  }
  return cdbField(0)
}

// ---- REPORT SUPPORTED OPERATION CODES (SPC-4 §6.35)

const TIMEOUTS_LENGTH = 12
const SUPPORTED = 3
const NOT_SUPPORTED = 1

/** @param offers whether the unit knows the command: UNMAP depends on its file */
export function reportOpcodes(cdb: Uint8Array, offers: (command: Command) => boolean): Uint8Array | Refusal {
  const timeouts = (cdb[2]! & 0x80) !== 0
  const options = cdb[2]! & 7
  const opcode = cdb[3]!
  const serviceAction = (cdb[4]! << 8) | cdb[5]!
  if (options === 0) return allOpcodes(timeouts, offers)
  const any = commandOf(opcode)
  const hasActions = any !== undefined && any.serviceAction >= 0
  // One without service actions, one with, or either: what is asked for must be of the kind it is asked as.
  if (options > 3) return new Refusal(ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB, cdbField(2, 2))
  if (any !== undefined && ((options === 1 && hasActions) || (options === 2 && !hasActions)))
    return new Refusal(ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB, cdbField(2, 2))
  const found = hasActions
    ? withServiceAction(opcode, serviceAction)
    : serviceAction === 0 || options < 3
      ? any
      : undefined
  return oneOpcode(found !== undefined && offers(found) ? found : undefined, timeouts)
}

function allOpcodes(timeouts: boolean, offers: (command: Command) => boolean): Uint8Array {
  const commands = KNOWN.filter(offers)
  const each = 8 + (timeouts ? TIMEOUTS_LENGTH : 0)
  const bytes = new Uint8Array(4 + commands.length * each)
  const view = new DataView(bytes.buffer)
  view.setUint32(0, bytes.length - 4)
  for (const [i, { opcode, serviceAction, length }] of commands.entries()) {
    const at = 4 + i * each
    bytes[at] = opcode
    view.setUint16(at + 2, Math.max(0, serviceAction))
    bytes[at + 5] = (timeouts ? 2 : 0) | (serviceAction >= 0 ? 1 : 0)
    view.setUint16(at + 6, length)
    if (timeouts) view.setUint16(at + 8, TIMEOUTS_LENGTH - 2)
  }
  return bytes
}

function oneOpcode(found: Command | undefined, timeouts: boolean): Uint8Array {
  if (found === undefined) return Uint8Array.of(0, NOT_SUPPORTED, 0, 0)
  const bytes = new Uint8Array(4 + found.length + (timeouts ? TIMEOUTS_LENGTH : 0))
  const view = new DataView(bytes.buffer)
  bytes[1] = (timeouts ? 0x80 : 0) | SUPPORTED
  view.setUint16(2, found.length)
  bytes.set(found.usage, 4)
  if (timeouts) view.setUint16(4 + found.length, TIMEOUTS_LENGTH - 2)
  return bytes
}

/** REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS (SPC-4 §6.36): those of control-queue.ts. */
export function reportTmfs(cdb: Uint8Array): Uint8Array {
  // ABORT TASK, ABORT TASK SET, CLEAR TASK SET, LOGICAL UNIT RESET, QUERY TASK; QUERY TASK SET, I_T NEXUS RESET
  const functions = [0b1101_1100, 0b0000_0011]
  if ((cdb[2]! & 0x80) === 0) return Uint8Array.of(...functions, 0, 0)
  // REPD: with time-outs, of which there are none.
  const bytes = new Uint8Array(16)
  bytes.set(functions)
  bytes[3] = bytes.length - 4
  return bytes
}

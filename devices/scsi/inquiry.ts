/**
 * What a unit says of itself: INQUIRY and the vital product data pages (SPC-4 §6.6 and §7.8, SBC-3 §6.6), capacity, LBA
 * status (SBC-3 §5) and the list of units (SPC-4 §6.33). Pure: a unit's description in, bytes out.
 */
import { PHYSICAL_BLOCK } from '../disk/image.ts'
import { cdbField, ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB, Refusal } from './sense.ts'
import { MAX_RANGE_BYTES, MAX_RANGES, MAX_TRANSFER_BYTES } from './shared.ts'

/** What these pages are about. */
export interface UnitDescription {
  readonly blockSize: number
  readonly blocks: number
  readonly discard: boolean
  readonly serial: string
}

/** T10 vendor identification: 8 characters. */
const VENDOR = 'VIRTIOD '
const PRODUCT = 'virtiod disk    '
const REVISION = '1.0 '

const STANDARD_LENGTH = 74
const DIRECT_ACCESS = 0x00
const WELL_KNOWN_UNIT = 0x1e
/** Peripheral qualifier 011b: no device can be there; type 1Fh: unknown. */
const NOTHING_THERE = 0x7f

/** SAM-5, SPC-4, SBC-3 (SPC-4 §6.6.2 "VERSION DESCRIPTOR"), without claims to a revision. */
const VERSION_DESCRIPTORS = [0x00a0, 0x0460, 0x04c0]

/** The standard data. @param unit whether there is one, or it is the well-known one */
export function standardInquiry(unit: 'disk' | 'well-known' | 'none'): Uint8Array {
  const bytes = new Uint8Array(STANDARD_LENGTH)
  bytes[0] = unit === 'disk' ? DIRECT_ACCESS : unit === 'well-known' ? WELL_KNOWN_UNIT : NOTHING_THERE
  // SPC-4; HISUP and response data format 2; CMDQUE.
  bytes[2] = 6
  bytes[3] = 0x12
  bytes[4] = STANDARD_LENGTH - 5
  bytes[7] = 0x02
  ascii(bytes, 8, VENDOR + PRODUCT + REVISION)
  const view = new DataView(bytes.buffer)
  for (const [i, version] of VERSION_DESCRIPTORS.entries()) view.setUint16(58 + 2 * i, version)
  return bytes
}

const PAGES: Readonly<Record<number, (unit: UnitDescription) => Uint8Array>> = {
  0: supportedPages,
  128: unitSerialNumber,
  131: deviceIdentification,
  176: blockLimits,
  177: blockDeviceCharacteristics,
  178: logicalBlockProvisioning,
}

/** INQUIRY with EVPD. */
export function vitalProductData(page: number, unit: UnitDescription): Uint8Array | Refusal {
  const make = PAGES[page]
  return make === undefined ? new Refusal(ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB, cdbField(2)) : make(unit)
}

function page(code: number, length: number): Uint8Array {
  const bytes = new Uint8Array(4 + length)
  bytes[1] = code
  new DataView(bytes.buffer).setUint16(2, length)
  return bytes
}

function supportedPages(): Uint8Array {
  const codes = Object.keys(PAGES).map(Number)
  const bytes = page(0, codes.length)
  bytes.set(codes, 4)
  return bytes
}

function unitSerialNumber({ serial }: UnitDescription): Uint8Array {
  const bytes = page(0x80, serial.length)
  ascii(bytes, 4, serial)
  return bytes
}

/** The serial number under our vendor name, and as a locally assigned NAA, from which hosts make names. */
function deviceIdentification({ serial }: UnitDescription): Uint8Array {
  const name = VENDOR + serial
  const bytes = page(0x83, 4 + name.length + 12)
  // Code set ASCII, T10 vendor ID.
  bytes.set([2, 1, 0, name.length], 4)
  ascii(bytes, 8, name)
  const at = 8 + name.length
  // Code set binary, NAA, of type 3.
  bytes.set([1, 3, 0, 8], at)
  new DataView(bytes.buffer).setBigUint64(at + 4, (3n << 60n) | (fnv1a(serial) >> 4n))
  return bytes
}

/** FNV-1a of 64 bits: any hash that stays the same would do. */
function fnv1a(text: string): bigint {
  let hash = 0xcbf2_9ce4_8422_2325n
  for (const byte of new TextEncoder().encode(text)) hash = BigInt.asUintN(64, (hash ^ BigInt(byte)) * 0x100_0000_01b3n)
  return hash
}

function blockLimits({ blockSize, discard }: UnitDescription): Uint8Array {
  const bytes = page(0xb0, 0x3c)
  const view = new DataView(bytes.buffer)
  const granularity = Math.max(1, PHYSICAL_BLOCK / blockSize)
  const range = MAX_RANGE_BYTES / blockSize
  // WSNZ: a WRITE SAME of "all the rest" is none.
  bytes[4] = 1
  view.setUint16(6, granularity)
  view.setUint32(8, MAX_TRANSFER_BYTES / blockSize)
  if (discard) {
    view.setUint32(20, range)
    view.setUint32(24, MAX_RANGES)
    view.setUint32(28, granularity)
    // UGAVALID, alignment 0
    view.setUint32(32, 0x8000_0000)
  }
  view.setBigUint64(36, BigInt(range))
  return bytes
}

function blockDeviceCharacteristics(): Uint8Array {
  const bytes = page(0xb1, 0x3c)
  // Non-rotating.
  bytes[5] = 1
  return bytes
}

function logicalBlockProvisioning({ discard }: UnitDescription): Uint8Array {
  const bytes = page(0xb2, 4)
  if (!discard) return bytes
  // LBPU, LBPWS, LBPWS10; LBPRZ: what is unmapped reads as zeroes. Thin provisioned.
  bytes[5] = 0xe4
  bytes[6] = 2
  return bytes
}

// ---- capacity

/** READ CAPACITY (10): a capacity beyond 32 bits is FFFFFFFFh. */
export function readCapacity10({ blocks, blockSize }: UnitDescription): Uint8Array {
  const bytes = new Uint8Array(8)
  const view = new DataView(bytes.buffer)
  view.setUint32(0, Math.min(blocks - 1, 0xffff_ffff))
  view.setUint32(4, blockSize)
  return bytes
}

/** READ CAPACITY (16). */
export function readCapacity16({ blocks, blockSize, discard }: UnitDescription): Uint8Array {
  const bytes = new Uint8Array(32)
  const view = new DataView(bytes.buffer)
  view.setBigUint64(0, BigInt(blocks - 1))
  view.setUint32(8, blockSize)
  bytes[13] = Math.log2(Math.max(1, PHYSICAL_BLOCK / blockSize))
  // LBPME, LBPRZ
  if (discard) bytes[14] = 0xc0
  return bytes
}

/** GET LBA STATUS: one descriptor from `lba` to the end, "mapped or unknown": which parts are holes is not looked up. */
export function lbaStatus({ blocks }: UnitDescription, lba: number): Uint8Array {
  const bytes = new Uint8Array(24)
  const view = new DataView(bytes.buffer)
  view.setUint32(0, bytes.length - 4)
  view.setBigUint64(8, BigInt(lba))
  view.setUint32(16, Math.min(blocks - lba, 0xffff_ffff))
  return bytes
}

/** REPORT LUNS. @param luns of the units that are there, ascending */
export function reportLuns(select: number, luns: readonly number[]): Uint8Array | Refusal {
  if (select > 2) return new Refusal(ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB, cdbField(2))
  const units = select === 1 ? [] : luns
  const wellKnown = select === 0 ? 0 : 1
  const bytes = new Uint8Array(8 + (units.length + wellKnown) * 8)
  new DataView(bytes.buffer).setUint32(0, bytes.length - 8)
  for (const [i, lun] of units.entries()) bytes[8 + i * 8 + 1] = lun
  if (wellKnown > 0) bytes.set([0xc1, 0x01], bytes.length - 8)
  return bytes
}

function ascii(bytes: Uint8Array, at: number, text: string): void {
  bytes.set(new TextEncoder().encode(text), at)
}

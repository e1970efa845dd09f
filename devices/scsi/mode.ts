/**
 * Mode pages (SPC-4 §6.11 to §6.14 and §7.5): caching, whose WCE is the write-cache switch, and control. Pure: what is, in;
 * bytes or the switch out.
 */
import {
  cdbField,
  ILLEGAL_REQUEST,
  INVALID_FIELD_IN_CDB,
  INVALID_FIELD_IN_PARAMETER_LIST,
  PARAMETER_LIST_LENGTH_ERROR,
  parameterField,
  Refusal,
  SAVING_PARAMETERS_NOT_SUPPORTED,
} from './sense.ts'

const MODE_SELECT_6 = 0x15
const MODE_SENSE_6 = 0x1a

const CACHING = 0x08
const CONTROL = 0x0a
const ALL_PAGES = 0x3f
const ALL_SUBPAGES = 0xff
const WCE = 0x04

/** What the pages say. */
export interface ModeSettings {
  readonly readOnly: boolean
  readonly blocks: number
  readonly blockSize: number
  readonly writeback: boolean
  /** WCE after power on. */
  readonly writebackDefault: boolean
}

// Values of PC.
const CURRENT = 0
const CHANGEABLE = 1
const DEFAULT = 2

function cachingPage(control: number, settings: ModeSettings): Uint8Array {
  const bytes = new Uint8Array(20)
  bytes[0] = CACHING
  bytes[1] = bytes.length - 2
  const on = control === CURRENT ? settings.writeback : settings.writebackDefault
  if (control === CHANGEABLE || on) bytes[2] = WCE
  return bytes
}

function controlPage(control: number): Uint8Array {
  const bytes = new Uint8Array(12)
  bytes[0] = CONTROL
  bytes[1] = bytes.length - 2
  if (control === CHANGEABLE) return bytes
  // GLTSD; commands may be reordered.
  bytes[2] = 0x02
  bytes[3] = 0x10
  return bytes
}

function pagesOf(code: number, control: number, settings: ModeSettings): Uint8Array[] {
  return [
    ...(code === CACHING || code === ALL_PAGES ? [cachingPage(control, settings)] : []),
    ...(code === CONTROL || code === ALL_PAGES ? [controlPage(control)] : []),
  ]
}

/** MODE SENSE (6) and (10): the answer, not yet cut to the allocation length. */
export function modeSense(cdb: Uint8Array, settings: ModeSettings): Uint8Array | Refusal {
  const short = cdb[0] === MODE_SENSE_6
  const control = cdb[2]! >>> 6
  const code = cdb[2]! & 0x3f
  const subpage = cdb[3]!
  if (control > DEFAULT) return new Refusal(ILLEGAL_REQUEST, SAVING_PARAMETERS_NOT_SUPPORTED)
  const pages = pagesOf(code, control, settings)
  if (pages.length === 0) return new Refusal(ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB, cdbField(2, 5))
  if (subpage !== 0 && subpage !== ALL_SUBPAGES) return new Refusal(ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB, cdbField(3))
  const withoutDescriptor = (cdb[1]! & 0x08) !== 0
  const long = !short && (cdb[1]! & 0x10) !== 0
  const descriptor = withoutDescriptor ? new Uint8Array(0) : blockDescriptor(settings, long)
  const header = new Uint8Array(short ? 4 : 8)
  const length = header.length + descriptor.length + pages.reduce((sum, one) => sum + one.length, 0)
  // WP; DPOFUA: the two bits of reads and writes are known.
  const specific = (settings.readOnly ? 0x80 : 0) | 0x10
  if (short) header.set([length - 1, 0, specific, descriptor.length])
  else {
    const view = new DataView(header.buffer)
    view.setUint16(0, length - 2)
    header[3] = specific
    if (long && !withoutDescriptor) header[4] = 1
    view.setUint16(6, descriptor.length)
  }
  return concat([header, descriptor, ...pages])
}

function blockDescriptor({ blocks, blockSize }: ModeSettings, long: boolean): Uint8Array {
  const bytes = new Uint8Array(long ? 16 : 8)
  const view = new DataView(bytes.buffer)
  if (long) view.setBigUint64(0, BigInt(blocks))
  else view.setUint32(0, Math.min(blocks, 0xffff_ffff))
  view.setUint32(bytes.length - 4, blockSize)
  return bytes
}

function concat(parts: readonly Uint8Array[]): Uint8Array {
  const all = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0))
  let at = 0
  for (const part of parts) {
    all.set(part, at)
    at += part.length
  }
  return all
}

/** MODE SELECT: WCE as the list wants it. @param list the whole parameter list */
export function modeSelect(cdb: Uint8Array, list: Uint8Array, settings: ModeSettings): boolean | Refusal {
  // PF: the pages are those of the standard.
  if ((cdb[1]! & 0x10) === 0) return new Refusal(ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB, cdbField(1, 4))
  if (list.length === 0) return settings.writeback
  const short = cdb[0] === MODE_SELECT_6
  const headerLength = short ? 4 : 8
  if (list.length < headerLength) return tooShort()
  const view = new DataView(list.buffer, list.byteOffset, list.byteLength)
  const mediumType = short ? 1 : 2
  if (list[mediumType] !== 0) return wrong(mediumType)
  const long = !short && (list[4]! & 1) !== 0
  const descriptorLength = short ? list[3]! : view.getUint16(6)
  if (descriptorLength !== 0 && descriptorLength !== (long ? 16 : 8)) return wrong(short ? 3 : 6)
  if (headerLength + descriptorLength > list.length) return tooShort()
  const problem = descriptorLength === 0 ? undefined : checkDescriptor(view, headerLength, long, settings)
  return problem ?? selectPages(list, headerLength + descriptorLength, settings)
}

/** The blocks can't be changed; "all of them" is 0 or the greatest number. */
function checkDescriptor(view: DataView, at: number, long: boolean, settings: ModeSettings): Refusal | undefined {
  const blocks = long ? Number(view.getBigUint64(at)) : view.getUint32(at)
  const all = long ? 2 ** 64 : 0xffff_ffff
  const now = long ? settings.blocks : Math.min(settings.blocks, 0xffff_ffff)
  if (blocks !== 0 && blocks !== all && blocks !== now) return wrong(at)
  const lengthAt = at + (long ? 12 : 4)
  return view.getUint32(lengthAt) === settings.blockSize ? undefined : wrong(lengthAt)
}

function selectPages(list: Uint8Array, start: number, settings: ModeSettings): boolean | Refusal {
  let { writeback } = settings
  for (let at = start; at < list.length; ) {
    const code = list[at]! & 0x3f
    // SPF: a page with a subpage, of which there are none.
    if ((list[at]! & 0x40) !== 0) return wrong(at, 6)
    const [current] = code === ALL_PAGES ? [] : pagesOf(code, CURRENT, settings)
    if (current === undefined) return wrong(at, 5)
    if (at + 2 > list.length) return tooShort()
    if (list[at + 1] !== current[1]) return wrong(at + 1)
    if (at + current.length > list.length) return tooShort()
    const [changeable] = pagesOf(code, CHANGEABLE, settings)
    for (let i = 2; i < current.length; i++) {
      const change = (list[at + i]! ^ current[i]!) & ~changeable![i]!
      if (change !== 0) return wrong(at + i, 31 - Math.clz32(change))
    }
    if (code === CACHING) writeback = (list[at + 2]! & WCE) !== 0
    at += current.length
  }
  return writeback
}

function tooShort(): Refusal {
  return new Refusal(ILLEGAL_REQUEST, PARAMETER_LIST_LENGTH_ERROR)
}

function wrong(byte: number, bit = -1): Refusal {
  return new Refusal(ILLEGAL_REQUEST, INVALID_FIELD_IN_PARAMETER_LIST, parameterField(byte, bit))
}

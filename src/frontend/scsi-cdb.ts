/** Command descriptor blocks (SPC-4, SBC-3) for the SCSI driver of the front-end. Pure. */

/** What READ, WRITE and their kin have besides an address; bits of byte 1 are or-ed in as they are. */
type Flags = number

function bytes(length: number, opcode: number, fill: (view: DataView) => void): Uint8Array {
  const view = new DataView(new ArrayBuffer(length))
  view.setUint8(0, opcode)
  fill(view)
  return new Uint8Array(view.buffer)
}

function six(opcode: number, lba: number, blocks: number): Uint8Array {
  return bytes(6, opcode, (view) => {
    view.setUint32(0, (opcode * 2 ** 24 + lba) >>> 0)
    view.setUint8(4, blocks)
  })
}

function ten(opcode: number, lba: number, blocks: number, flags: Flags): Uint8Array {
  return bytes(10, opcode, (view) => {
    view.setUint8(1, flags)
    view.setUint32(2, lba)
    view.setUint16(7, blocks)
  })
}

function twelve(opcode: number, lba: number, blocks: number, flags: Flags): Uint8Array {
  return bytes(12, opcode, (view) => {
    view.setUint8(1, flags)
    view.setUint32(2, lba)
    view.setUint32(6, blocks)
  })
}

function sixteen(opcode: number, lba: number | bigint, blocks: number, flags: Flags): Uint8Array {
  return bytes(16, opcode, (view) => {
    view.setUint8(1, flags)
    view.setBigUint64(2, BigInt(lba))
    view.setUint32(10, blocks)
  })
}

/** The commands, by their names. `flags` is byte 1. */
export const cdb = {
  testUnitReady: (): Uint8Array => new Uint8Array(6),
  requestSense: (allocation = 18, flags: Flags = 0): Uint8Array => Uint8Array.of(0x03, flags, 0, 0, allocation, 0),
  inquiry: (allocation = 255): Uint8Array => Uint8Array.of(0x12, 0, 0, allocation >> 8, allocation & 0xff, 0),
  vpd: (page: number, allocation = 255): Uint8Array =>
    Uint8Array.of(0x12, 1, page, allocation >> 8, allocation & 0xff, 0),
  reportLuns: (select = 0, allocation = 4096): Uint8Array =>
    bytes(12, 0xa0, (view) => {
      view.setUint8(2, select)
      view.setUint32(6, allocation)
    }),
  readCapacity10: (): Uint8Array => new Uint8Array([0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
  readCapacity16: (allocation = 32): Uint8Array => sixteen(0x9e, 0, allocation, 0x10),
  getLbaStatus: (lba: number | bigint, allocation = 24): Uint8Array => sixteen(0x9e, lba, allocation, 0x12),
  modeSense6: (page: number, allocation = 255, flags: Flags = 0): Uint8Array =>
    Uint8Array.of(0x1a, flags, page, 0, allocation, 0),
  modeSense10: (page: number, allocation = 255, flags: Flags = 0): Uint8Array =>
    Uint8Array.of(0x5a, flags, page, 0, 0, 0, 0, allocation >> 8, allocation & 0xff, 0),
  modeSelect6: (length: number, flags: Flags = 0x10): Uint8Array => Uint8Array.of(0x15, flags, 0, 0, length, 0),
  modeSelect10: (length: number, flags: Flags = 0x10): Uint8Array =>
    Uint8Array.of(0x55, flags, 0, 0, 0, 0, 0, length >> 8, length & 0xff, 0),
  startStop: (bits: number): Uint8Array => Uint8Array.of(0x1b, 0, 0, 0, bits, 0),
  preventAllow: (prevent: number): Uint8Array => Uint8Array.of(0x1e, 0, 0, 0, prevent, 0),
  read6: (lba: number, blocks: number): Uint8Array => six(0x08, lba, blocks),
  write6: (lba: number, blocks: number): Uint8Array => six(0x0a, lba, blocks),
  read10: (lba: number, blocks: number, flags: Flags = 0): Uint8Array => ten(0x28, lba, blocks, flags),
  write10: (lba: number, blocks: number, flags: Flags = 0): Uint8Array => ten(0x2a, lba, blocks, flags),
  read12: (lba: number, blocks: number, flags: Flags = 0): Uint8Array => twelve(0xa8, lba, blocks, flags),
  write12: (lba: number, blocks: number, flags: Flags = 0): Uint8Array => twelve(0xaa, lba, blocks, flags),
  read16: (lba: number | bigint, blocks: number, flags: Flags = 0): Uint8Array => sixteen(0x88, lba, blocks, flags),
  write16: (lba: number | bigint, blocks: number, flags: Flags = 0): Uint8Array => sixteen(0x8a, lba, blocks, flags),
  /** BYTCHK is 2 × its value in `flags`. */
  verify10: (lba: number, blocks: number, flags: Flags = 0): Uint8Array => ten(0x2f, lba, blocks, flags),
  verify16: (lba: number | bigint, blocks: number, flags: Flags = 0): Uint8Array => sixteen(0x8f, lba, blocks, flags),
  writeVerify10: (lba: number, blocks: number, flags: Flags = 0): Uint8Array => ten(0x2e, lba, blocks, flags),
  writeVerify16: (lba: number | bigint, blocks: number, flags: Flags = 0): Uint8Array =>
    sixteen(0x8e, lba, blocks, flags),
  synchronize10: (lba = 0, blocks = 0, flags: Flags = 0): Uint8Array => ten(0x35, lba, blocks, flags),
  synchronize16: (lba: number | bigint = 0, blocks = 0, flags: Flags = 0): Uint8Array =>
    sixteen(0x91, lba, blocks, flags),
  writeSame10: (lba: number, blocks: number, flags: Flags = 0): Uint8Array => ten(0x41, lba, blocks, flags),
  writeSame16: (lba: number | bigint, blocks: number, flags: Flags = 0): Uint8Array =>
    sixteen(0x93, lba, blocks, flags),
  unmap: (length: number, flags: Flags = 0): Uint8Array => ten(0x42, 0, length, flags),
  reportOpcodes: (options: number, opcode = 0, serviceAction = 0, allocation = 4096): Uint8Array =>
    bytes(12, 0xa3, (view) => {
      view.setUint8(1, 0x0c)
      view.setUint8(2, options)
      view.setUint8(3, opcode)
      view.setUint16(4, serviceAction)
      view.setUint32(6, allocation)
    }),
  reportTmfs: (flags: Flags = 0): Uint8Array => Uint8Array.of(0xa3, 0x0d, flags, 0, 0, 0, 0, 0, 0, 16, 0, 0),
} as const

/** The parameter list of UNMAP. */
export function unmapList(ranges: readonly { lba: number | bigint; blocks: number }[]): Uint8Array {
  return bytes(8 + ranges.length * 16, 0, (view) => {
    view.setUint16(0, 6 + ranges.length * 16)
    view.setUint16(2, ranges.length * 16)
    for (const [i, { lba, blocks }] of ranges.entries()) {
      view.setBigUint64(8 + i * 16, BigInt(lba))
      view.setUint32(16 + i * 16, blocks)
    }
  })
}

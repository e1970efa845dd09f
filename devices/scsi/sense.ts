/**
 * Status and sense data (SAM-5 §5.3, SPC-4 §4.5): what is wrong with a command, in the fixed format. Names are those of the
 * standard. Pure.
 */

// SAM-5 §5.3: status codes
export const GOOD = 0x00
export const CHECK_CONDITION = 0x02

// SPC-4 §4.5.6: sense keys
export const NO_SENSE = 0x0
export const NOT_READY = 0x2
export const MEDIUM_ERROR = 0x3
export const ILLEGAL_REQUEST = 0x5
export const UNIT_ATTENTION = 0x6
export const DATA_PROTECT = 0x7
export const MISCOMPARE = 0xe

// SPC-4 annex F: additional sense code and, in the lower byte, its qualifier
export const NO_ADDITIONAL_SENSE = 0x0000
export const INITIALIZING_COMMAND_REQUIRED = 0x0402
export const WRITE_ERROR = 0x0c00
export const UNRECOVERED_READ_ERROR = 0x1100
export const PARAMETER_LIST_LENGTH_ERROR = 0x1a00
export const MISCOMPARE_DURING_VERIFY = 0x1d00
export const INVALID_COMMAND_OPERATION_CODE = 0x2000
export const LBA_OUT_OF_RANGE = 0x2100
export const INVALID_FIELD_IN_CDB = 0x2400
export const LOGICAL_UNIT_NOT_SUPPORTED = 0x2500
export const INVALID_FIELD_IN_PARAMETER_LIST = 0x2600
export const WRITE_PROTECTED = 0x2700
export const SPACE_ALLOCATION_FAILED_WRITE_PROTECT = 0x2707
export const POWER_ON_OR_RESET = 0x2900
export const BUS_DEVICE_RESET_FUNCTION = 0x2903
export const I_T_NEXUS_LOSS = 0x2907
export const CAPACITY_DATA_HAS_CHANGED = 0x2a09
export const SAVING_PARAMETERS_NOT_SUPPORTED = 0x3900
export const REPORTED_LUNS_DATA_HAS_CHANGED = 0x3f0e

/** Bytes of sense data in the fixed format without anything vendor-specific. */
export const SENSE_LENGTH = 18

/** Which field is wrong (SPC-4 §4.5.2.4.2): a byte, perhaps the bit in it that begins the field; -1 = not told. */
export const NO_FIELD = -1
const BIT_POINTER_VALID = 0x08
const IN_CDB = 0x40
const FIELD_SHIFT = 8

/** @param bit the highest one of the field; -1 = the byte */
export function cdbField(byte: number, bit = -1): number {
  return (byte << FIELD_SHIFT) | IN_CDB | (bit < 0 ? 0 : BIT_POINTER_VALID | bit)
}

export function parameterField(byte: number, bit = -1): number {
  return (byte << FIELD_SHIFT) | (bit < 0 ? 0 : BIT_POINTER_VALID | bit)
}

/** Why a command is refused, from code that has no command to answer. */
export class Refusal {
  readonly key: number
  readonly code: number
  readonly field: number

  constructor(key: number, code: number, field = NO_FIELD) {
    this.key = key
    this.code = code
    this.field = field
  }
}

/**
 * Writes {@link SENSE_LENGTH} bytes (SPC-4 §4.5.3).
 * @param code additional sense code × 256 + qualifier
 * @param field {@link cdbField} or {@link parameterField}
 * @param information the command's idea of it, mostly an LBA; -1 = none. One beyond 32 bits has no room and is left out.
 */
export function writeSense(bytes: Uint8Array, key: number, code: number, field = NO_FIELD, information = -1): void {
  bytes.fill(0, 0, SENSE_LENGTH)
  const valid = information >= 0 && information <= 0xffff_ffff
  // Current errors.
  bytes[0] = 0x70 | (valid ? 0x80 : 0)
  bytes[2] = key
  if (valid) for (let i = 0; i < 4; i++) bytes[3 + i] = Math.floor(information / 2 ** (8 * (3 - i))) & 0xff
  bytes[7] = SENSE_LENGTH - 8
  bytes[12] = code >>> 8
  bytes[13] = code & 0xff
  if (field === NO_FIELD) return
  // SKSV
  bytes[15] = 0x80 | (field & 0xff)
  bytes[16] = (field >>> (FIELD_SHIFT + 8)) & 0xff
  bytes[17] = (field >>> FIELD_SHIFT) & 0xff
}

/** How a request says which unit it is for (virtio 1.3 §5.6.6.1, SAM-5 §4.7). Pure. */

/** The REPORT LUNS well-known logical unit. */
export const WELL_KNOWN = -1
/** The target exists, a unit of that number can't. */
export const NO_SUCH_UNIT = -2
export const NO_SUCH_TARGET = -3

/** @param low bytes 0 to 3 of `lun` as a little-endian word @param high bytes 4 to 7 */
export function decodeLun(low: number, high: number): number {
  const first = low & 0xff
  const second = (low >>> 8) & 0xff
  const third = (low >>> 16) & 0xff
  const fourth = low >>> 24
  if (first === 0xc1) return low === 0x0000_01c1 && high === 0 ? WELL_KNOWN : NO_SUCH_TARGET
  // There is one target, number 0.
  if (first !== 1 || second !== 0) return NO_SUCH_TARGET
  if (high !== 0) return NO_SUCH_UNIT
  // Peripheral device addressing on bus 0, then flat space addressing.
  if (third === 0) return fourth
  if ((third & 0xc0) === 0x40) return ((third & 0x3f) << 8) | fourth
  // Linux addresses the well-known unit inside of the target.
  return third === 0xc1 && fourth === 1 ? WELL_KNOWN : NO_SUCH_UNIT
}

/** The `lun` field of a unit: 8 bytes at `at`. Numbers are below 256, where drivers want the same form as in REPORT LUNS. */
export function encodeLun(bytes: Uint8Array, at: number, lun: number): void {
  bytes.fill(0, at, at + 8)
  bytes[at] = 1
  bytes[at + 3] = lun
}

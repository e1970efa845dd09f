/** A frame that tells its number, with a pattern that tells where a byte belongs. */
export function frame(number: number, length: number): Uint8Array {
  const bytes = new Uint8Array(length)
  for (let i = 0; i < length; i++) bytes[i] = number * 31 + i
  // Ethernet type of local experiments.
  if (length >= 14) bytes.set([0x88, 0xb5], 12)
  return bytes
}

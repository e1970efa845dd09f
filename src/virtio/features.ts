/**
 * Feature sets. The control plane keeps a set as a bigint, as it travels on the wire; the data plane asks for single
 * bits once, when a ring starts.
 */

/** The set of the given bit numbers (0 … 63). */
export function featureSet(...bits: number[]): bigint {
  let set = 0n
  for (const bit of bits) set |= 1n << BigInt(bit)
  return set
}

export function hasFeature(set: bigint, bit: number): boolean {
  return ((set >> BigInt(bit)) & 1n) === 1n
}

/** The bit numbers in a set, ascending. */
export function featureBits(set: bigint): number[] {
  const bits: number[] = []
  for (let bit = 0; bit < 64; bit++) if (hasFeature(set, bit)) bits.push(bit)
  return bits
}

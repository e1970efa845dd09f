/** Arithmetic on config spaces. */

/**
 * The part [start, end) of `bytes` outside of which a write of them at `offset` changes nothing; start = end when it
 * changes nothing at all. What lies behind `config` reads as zero.
 */
export function changedSpan(config: Uint8Array, offset: number, bytes: Uint8Array): { start: number; end: number } {
  const same = (i: number) => bytes[i] === (config[offset + i] ?? 0)
  let start = 0
  while (start < bytes.length && same(start)) start++
  let end = bytes.length
  while (end > start && same(end - 1)) end--
  return { start, end }
}

/**
 * The internet checksum (RFC 1071) over bytes in private memory, and its completion for a receiver that can't do it
 * itself. Pure arithmetic. A DataView, because its 32-bit reads are three times as fast as an array's bytes and need no
 * alignment; whoever owns a buffer makes one for all packets in it.
 */

/** Folds a sum of less than 2^32 to 16 bits, with end-around carry. */
export function fold(sum: number): number {
  const once = (sum & 0xffff) + (sum >>> 16)
  return (once & 0xffff) + (once >>> 16)
}

/**
 * The ones' complement sum, not yet inverted, of bytes [start, end): 0 … 0xffff, as a big-endian number. An odd last byte
 * counts as if a zero followed. At most 96 KiB.
 */
export function sum(bytes: DataView, start: number, end: number): number {
  // Little-endian words, upper and lower halves added apart: a sum of swapped bytes is the swapped sum. Neither half gets
  // past 2^31 in 96 KiB, so both stay small integers.
  let low = 0
  let high = 0
  let at = start
  for (; at + 16 <= end; at += 16) {
    const a = bytes.getInt32(at, true)
    const b = bytes.getInt32(at + 4, true)
    const c = bytes.getInt32(at + 8, true)
    const d = bytes.getInt32(at + 12, true)
    low = (low + (a & 0xffff) + (b & 0xffff) + (c & 0xffff) + (d & 0xffff)) | 0
    high = (high + (a >>> 16) + (b >>> 16) + (c >>> 16) + (d >>> 16)) | 0
  }
  for (; at + 2 <= end; at += 2) low = (low + bytes.getUint16(at, true)) | 0
  if (at < end) low = (low + bytes.getUint8(at)) | 0
  const folded = fold(fold(low) + fold(high))
  return ((folded & 0xff) << 8) | (folded >>> 8)
}

/**
 * Does what NEEDS_CSUM asks for (virtio 1.3 §5.1.6.2): the checksum over the frame from `csumStart` on, over the pseudo
 * header's sum that stands at `csumStart + csumOffset`, and put there. 0 becomes 0xffff, the same number: a 0 would
 * mean "none" in UDP (RFC 768).
 * @param at where the frame starts in `bytes`; csumStart counts from there
 * @param length bytes of the frame. The header has passed `PacketHeader.check` with it.
 */
export function completeChecksum(
  bytes: DataView,
  at: number,
  length: number,
  csumStart: number,
  csumOffset: number
): void {
  const checksum = ~sum(bytes, at + csumStart, at + length) & 0xffff
  bytes.setUint16(at + csumStart + csumOffset, checksum === 0 ? 0xffff : checksum)
}

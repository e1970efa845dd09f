/**
 * What the two formats of an in-flight region share (vhost-user.rst "Inflight I/O tracking"): the header that says
 * whose region it is, and the error for one that can't be used. One region belongs to one queue; the buffer with all of
 * them is the front-end's, which may have put anything into it.
 *
 * Both formats count on one thing: what a killed process leaves in shared memory are its first n stores in program
 * order, for some n. The kernel stops a thread between two instructions, and V8 doesn't exchange plain stores to typed
 * arrays. The front-end and the next back-end read them only when this process is gone, so none of them is atomic.
 */

/** The region doesn't fit its ring, or comes from a version that we don't know: the ring must not start. */
export class InflightError extends Error {
  override readonly name = 'InflightError'
}

/** Bytes of the region of one queue: the buffer has one after the other, each at a multiple of 64. */
export function inflightSize(size: number, packed: boolean): number {
  const bytes = packed ? PACKED_HEADER + PACKED_ENTRY * size : SPLIT_HEADER + SPLIT_ENTRY * size
  return Math.ceil(bytes / 64) * 64
}

// QueueRegionSplit and DescStateSplit, QueueRegionPacked and DescStatePacked, in bytes.
export const SPLIT_HEADER = 16
export const SPLIT_ENTRY = 16
export const PACKED_HEADER = 32
export const PACKED_ENTRY = 32

// u64 features; u16 version at 8, desc_num at 10: as u16.
const VERSION_AT = 4
const DESC_NUM_AT = 5
const VERSION = 1

/** @throws InflightError when the bytes can't be the region of a ring of this size */
export function checkRegion(bytes: Uint8Array, size: number, packed: boolean): void {
  // The counters and the used positions of a packed ring are 8 bytes each.
  if (bytes.byteOffset % 8 !== 0) throw new InflightError(`the region is at ${bytes.byteOffset}, no multiple of 8`)
  const needed = inflightSize(size, packed)
  if (bytes.length < needed) {
    throw new InflightError(`the region has ${bytes.length} bytes, a ring of ${size} needs ${needed}`)
  }
}

/**
 * Reads the header. Returns false when the region must be initialised: nobody did yet, or it is of a ring of another
 * size with nothing in flight, as firmware leaves it that used less of the queue than the driver after it.
 * @throws InflightError when the region can't be used
 */
export function isInitialised(bytes: Uint8Array, size: number, packed: boolean): boolean {
  const halves = new Uint16Array(bytes.buffer, bytes.byteOffset, 8)
  const version = halves[VERSION_AT]!
  const entries = halves[DESC_NUM_AT]!
  if (version === 0) return false
  if (version !== VERSION || (halves[0]! | halves[1]! | halves[2]! | halves[3]!) !== 0) {
    throw new InflightError(`the region has version ${version} or features that are unknown`)
  }
  if (entries === size) return true
  if (anyInFlight(bytes, entries, packed)) {
    throw new InflightError(`chains are in flight in the region of a ring of ${entries}, this ring has ${size}`)
  }
  return false
}

/** Begins the initialisation: all zero, and not initialised until `endInitialisation`. */
export function beginInitialisation(bytes: Uint8Array): void {
  // First, since a region of another size may be valid until here.
  new Uint16Array(bytes.buffer, bytes.byteOffset, 8)[VERSION_AT] = 0
  bytes.fill(0)
}

/** Makes the region valid: the last store. */
export function endInitialisation(bytes: Uint8Array, size: number): void {
  const halves = new Uint16Array(bytes.buffer, bytes.byteOffset, 8)
  halves[DESC_NUM_AT] = size
  halves[VERSION_AT] = VERSION
}

/**
 * Makes the region one that nobody initialised. For a ring that was drained and whose base the front-end has asked for:
 * at its next start that base counts again, where a driver that was reset begins anew.
 */
export function forgetInflight(bytes: Uint8Array): void {
  new Uint16Array(bytes.buffer, bytes.byteOffset, 8)[VERSION_AT] = 0
}

/** Whether the region is one in which chains are in flight. */
export function hasInflight(bytes: Uint8Array, packed: boolean): boolean {
  const halves = new Uint16Array(bytes.buffer, bytes.byteOffset, 8)
  return halves[VERSION_AT] === VERSION && anyInFlight(bytes, halves[DESC_NUM_AT]!, packed)
}

function anyInFlight(bytes: Uint8Array, entries: number, packed: boolean): boolean {
  const entry = packed ? PACKED_ENTRY : SPLIT_ENTRY
  const start = packed ? PACKED_HEADER : SPLIT_HEADER
  const end = Math.min(bytes.length, start + entries * entry)
  for (let at = start; at < end; at += entry) if (bytes[at] === 1) return true
  return false
}

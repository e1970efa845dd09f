/** A driver broke the rules of its ring: that ring stops, nothing else. */
export class RingError extends Error {
  override readonly name = 'RingError'
  /** API: listed in the README. */
  readonly code: RingErrorCode

  constructor(code: RingErrorCode, message: string) {
    super(message)
    this.code = code
  }
}

/** What can be wrong with a ring, and what it means. */
export const RING_ERRORS = {
  ERR_RING_INDEX: 'the driver made more chains available than the ring has entries',
  ERR_RING_HEAD: 'an avail entry names a descriptor beyond the ring, or a buffer id is as large as the ring',
  ERR_RING_HEAD_BUSY: 'a head or buffer id was made available again before it was used',
  ERR_RING_NEXT: 'a descriptor links beyond its table',
  ERR_RING_LOOP: 'a chain has more descriptors than its table',
  ERR_RING_ORDER: 'a device-readable descriptor follows a device-writable one',
  ERR_RING_ADDRESS: 'a descriptor points outside guest memory',
  ERR_RING_LENGTH: 'a chain has more than 2^32 - 1 bytes',
  ERR_RING_INDIRECT: 'an indirect descriptor is malformed, nested, too long, or was not negotiated',
  ERR_RING_MEMORY: 'the memory that the ring lives in was removed or truncated',
  ERR_RING_SCATTERED: 'behind a vIOMMU, a part of the ring is not contiguous in guest-physical memory',
  ERR_RING_BASE: 'the base of a packed ring is no state that a ring can be in',
  ERR_RING_INFLIGHT: 'the in-flight buffer contradicts itself or the ring',
  ERR_RING_REQUEST: 'a request is too short for what the device reads of it, or otherwise not one of its kind',
} as const

export type RingErrorCode = keyof typeof RING_ERRORS

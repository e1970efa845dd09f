/**
 * The arithmetic of packed rings (virtio 1.3 §2.8): sizes, whose a descriptor is, positions in the 32 bits of
 * SET_VRING_BASE, and when a used descriptor wants a call. Pure functions of numbers.
 */
import {
  RING_EVENT_FLAGS_DESC,
  RING_EVENT_FLAGS_DISABLE,
  VIRTQ_DESC_F_AVAIL,
  VIRTQ_DESC_F_USED,
  VIRTQ_DESC_SIZE,
  VIRTQ_EVENT_SUPPRESS_SIZE,
} from './constants.ts'

/** Bytes of the three parts (virtio 1.3 §2.8.10.1): descriptor ring, driver and device event suppression. */
export function packedRingSizes(size: number): { descriptor: number; driver: number; device: number } {
  return {
    descriptor: VIRTQ_DESC_SIZE * size,
    driver: VIRTQ_EVENT_SUPPRESS_SIZE,
    device: VIRTQ_EVENT_SUPPRESS_SIZE,
  }
}

/** The bits of the flags that say whose a descriptor is (virtio 1.3 §2.8.1). */
export const OWNER = VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED

/** OWNER in a descriptor that the driver made available in a lap with this wrap counter. */
export function available(wrap: number): number {
  return wrap === 1 ? VIRTQ_DESC_F_AVAIL : VIRTQ_DESC_F_USED
}

/** OWNER in a descriptor that the device used in a lap with this wrap counter. */
export function used(wrap: number): number {
  return wrap === 1 ? OWNER : 0
}

/** Where a ring is: indices below its size, and wrap counters. */
export interface PackedBase {
  /** The next descriptor to pop. */
  readonly avail: number
  readonly availWrap: number
  /** Where the next used descriptor goes. */
  readonly used: number
  readonly usedWrap: number
}

/**
 * vhost-user.rst "Vring descriptor indices for packed virtqueues": bits 0–14 avail index, 15 its wrap counter, 16–30
 * used index, 31 its wrap counter. QEMU gives both, 0x80008000 for a new ring. DPDK's virtio-user gives the lower half
 * only, 0x8000 for a new ring, and its vhost library reads no other: an upper half of 0 therefore means that the used
 * position is the avail one. For a ring that was drained that is true also where the 0 is meant (used index 0 in an odd
 * lap), since both are the same then. A base of 0 altogether is taken as what it says, index 0 in an odd lap: a ring
 * stops there as often as anywhere else, and a front-end that begins a new ring with 0 has not read the specification.
 * Indices are not bounded here.
 */
export function parsePackedBase(base: number): PackedBase {
  const avail = base & 0x7fff
  const availWrap = (base >>> 15) & 1
  if (base >>> 16 === 0) return { avail, availWrap, used: avail, usedWrap: availWrap }
  return { avail, availWrap, used: (base >>> 16) & 0x7fff, usedWrap: base >>> 31 }
}

/** The other way round, as an unsigned number. */
export function formatPackedBase({ avail, availWrap, used, usedWrap }: PackedBase): number {
  return (avail | (availWrap << 15) | (used << 16) | (usedWrap << 31)) >>> 0
}

/**
 * Descriptors that the device owns: from the used position up to the avail one. Not in 0…size when there is no such
 * ring.
 */
export function packedDistance({ avail, availWrap, used, usedWrap }: PackedBase, size: number): number {
  if (avail >= size || used >= size) return -1
  return avail - used + (availWrap === usedWrap ? 0 : size)
}

/**
 * Whether the driver wants a call (virtio 1.3 §2.8.10) for used descriptors that were published from a position on and
 * stand for `slots` descriptors. @param event the driver's structure: bits 0–14 offset, 15 wrap counter, 16–17 flags,
 * others reserved @param stale the offset may be that of a former ring: it suppresses nothing
 */
export function wantsCall(
  event: number,
  eventIdx: boolean,
  stale: boolean,
  size: number,
  index: number,
  wrap: number,
  slots: number
): boolean {
  const mode = (event >>> 16) & 3
  if (mode === RING_EVENT_FLAGS_DISABLE) return false
  if (mode !== RING_EVENT_FLAGS_DESC || !eventIdx || stale) return true
  // vring_need_event: when the descriptor of the offset is used in the lap of its wrap counter. Counted over two laps,
  // or a batch as long as the ring would be one of nothing.
  const wanted = (event & 0x7fff) + ((event & 0x8000) !== 0 ? 0 : size)
  const before = index + (wrap === 1 ? 0 : size)
  return (wanted - before + 2 * size) % (2 * size) < slots
}

/**
 * What the engine asks of a virtqueue, whatever its format: {@link SplitRing} and {@link PackedRing} implement it.
 * Pure; one object per started ring, used by one iothread.
 */
import type { Chain } from './chain.ts'
import type { DirtyLog } from './dirty-log.ts'
import type { RingError } from './errors.ts'
import type { GuestMemory } from './memory.ts'

/** Where a ring is and how it was left; all addresses are those of descriptors: GPAs, or IOVAs behind a vIOMMU. */
export interface VringConfig {
  readonly size: number
  /** Packed: the descriptor ring. */
  readonly descriptor: number
  /** Split: the avail ring. Packed: the driver event suppression structure. */
  readonly driver: number
  /** Split: the used ring. Packed: the device event suppression structure. */
  readonly device: number
  /**
   * What SET_VRING_BASE said. Split: the next avail index (u16). Packed (u32): bits 0–14 avail index, 15 its wrap
   * counter, 16–30 used index, 31 its wrap counter.
   */
  readonly base: number
  /** VIRTIO_F_EVENT_IDX, INDIRECT_DESC, RING_PACKED and IN_ORDER as negotiated. */
  readonly eventIdx: boolean
  readonly indirect: boolean
  readonly packed: boolean
  readonly inOrder: boolean
}

export interface Vring {
  readonly size: number
  /** Set when the driver broke a rule: the ring pops nothing any more. */
  readonly error: RingError | undefined
  /** What GET_VRING_BASE answers, as in {@link VringConfig.base}. Chains in flight count as taken. */
  readonly base: number
  /** Chains of the in-flight buffer wait that `pop` has not returned: a ring that is to be drained must pop them. */
  readonly recovering: boolean
  /**
   * Behind a vIOMMU: the address for which `pop`, `setMemory` or `publish` found no translation, -1 = none, and the access that is
   * missing (IOTLB_READ, IOTLB_WRITE or both). It is no error: the ring goes on after the `setMemory` that has it. Until then
   * `pop` returns undefined, `hasAvail` false, and `push` and `publish` remember what they can't write.
   */
  readonly missAddress: number
  readonly missAccess: number
  /**
   * The memory under the ring and its chains was exchanged. The ring breaks when it is not in the new one (behind a
   * vIOMMU it waits: `missAddress`).
   */
  setMemory(memory: GuestMemory): void
  /**
   * Where pages are marked that `push` gives back written, undefined = nowhere. @param ring the address in the log of the used ring
   * (packed: of the descriptor ring), -1 = writes to the ring itself are not marked
   */
  setLog(log: DirtyLog | undefined, ring: number): void
  /** The next available chain, read once and checked; undefined when there is none or the ring is broken. */
  pop(): Chain | undefined
  /** Takes back the last `pop`, whose chain was not used: it is the next one again. In reverse order for several. */
  unpop(chain: Chain): void
  /** The chain in flight under this head (packed: this buffer id). */
  chain(head: number): Chain
  /**
   * Gives a chain back with `written` bytes; the driver sees it after `publish`, and with IN_ORDER after those that came before it.
   * @param touched how many bytes from the start of the device-writable part may have changed, for the dirty log: at least `written`
   */
  push(chain: Chain, written: number, touched: number): void
  /** Makes pushed chains visible. Returns true when the driver wants a call. */
  publish(): boolean
  /** Whether chains are waiting; one atomic load, for polling. */
  hasAvail(): boolean
  /** Asks the driver not to kick. */
  suppress(): void
  /** Asks the driver to kick again. Returns true when chains arrived meanwhile: pop again, no kick will tell. */
  rearm(): boolean
}

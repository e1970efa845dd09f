/**
 * What the engine asks of a virtqueue, whatever its format: the split ring implements it, the packed ring will. Pure;
 * one object per started ring, used by one iothread.
 */
import type { Chain } from './chain.ts'
import type { RingError } from './errors.ts'
import type { GuestMemory } from './memory.ts'

/** Where a ring is and how it was left; all addresses are GPAs. */
export interface VringConfig {
  readonly size: number
  readonly descriptor: number
  /** Split: the avail ring. */
  readonly driver: number
  /** Split: the used ring. */
  readonly device: number
  /** What SET_VRING_BASE said: for a split ring the next avail index. */
  readonly base: number
  /** VIRTIO_F_EVENT_IDX and VIRTIO_F_INDIRECT_DESC as negotiated. */
  readonly eventIdx: boolean
  readonly indirect: boolean
}

export interface Vring {
  readonly size: number
  /** Set when the driver broke a rule: the ring pops nothing any more. */
  readonly error: RingError | undefined
  /** What GET_VRING_BASE answers, once nothing is in flight. */
  readonly base: number
  /** The memory under the ring and its chains was exchanged. The ring breaks when it is not in the new one. */
  setMemory(memory: GuestMemory): void
  /** The next available chain, read once and checked; undefined when there is none or the ring is broken. */
  pop(): Chain | undefined
  /** Takes back the last `pop`, whose chain was not used: it is the next one again. In reverse order for several. */
  unpop(chain: Chain): void
  /** The chain in flight under this head. */
  chain(head: number): Chain
  /** Gives a chain back with `written` bytes; the driver sees it after `publish`. */
  push(chain: Chain, written: number): void
  /** Makes pushed chains visible. Returns true when the driver wants a call. */
  publish(): boolean
  /** Whether chains are waiting; one atomic load, for polling. */
  hasAvail(): boolean
  /** Asks the driver not to kick. */
  suppress(): void
  /** Asks the driver to kick again. Returns true when chains arrived meanwhile: pop again, no kick will tell. */
  rearm(): boolean
}

/**
 * What a virtqueue looks like to code that drives a device: {@link SplitDriver} and {@link PackedDriver} implement it.
 * It knows chains and notifications; it must not know requests, sockets or eventfds.
 *
 * Life of a chain: `build` describes it and takes descriptors · `issue` puts the chain into the next free place of the
 * ring · `publish` shows all issued chains to the device and kicks it if it wants that · `pop` returns a chain that
 * the device has used · `issue` again, or `release`. Nothing here allocates except `build`.
 */

/** A part of a ring in memory. `offset` is into `buffer`. */
export interface RingArea {
  readonly buffer: ArrayBufferLike
  readonly offset: number
}

/** Behind a vIOMMU: the address that the device is told instead of a guest-physical one. */
export type Translate = (gpa: number) => number

/** One buffer of a chain. */
export interface Segment {
  /** Guest-physical address. */
  readonly address: number
  readonly length: number
  /** Device-writable. The specification wants readable segments first; a test may do otherwise. */
  readonly writable: boolean
  /** Behind a vIOMMU: `address` is what the device is told as it is, an IOVA. */
  readonly untranslated?: boolean
}

/** Memory for an indirect table: 16 bytes per segment. */
export interface TableMemory {
  readonly gpa: number
  readonly bytes: Uint8Array
}

export interface DriverCounters {
  /** Chains published. */
  issued: number
  /** Chains that came back. */
  completed: number
  /** Times the device was kicked, and times it had asked not to be. */
  kicks: number
  suppressedKicks: number
}

export interface VirtqueueDriver {
  /** Entries of the ring. */
  readonly size: number
  /** Chains published or issued, and not yet popped. */
  readonly inFlight: number
  readonly freeDescriptors: number
  readonly counters: DriverCounters
  /** Bytes that the device says it wrote, of the chain that `pop` returned last. */
  readonly written: number

  /**
   * Writes a chain's descriptors.
   * @param table puts the segments there and spends one descriptor of the ring (INDIRECT_DESC)
   * @returns the chain's handle, or -1 when descriptors are short
   */
  build(segments: readonly Segment[], table?: TableMemory): number
  /** Changes the direction of one segment of a built chain. */
  setWritable(chain: number, segment: number, writable: boolean): void
  /** Puts a built chain into the ring, to be published. */
  issue(chain: number): void
  /** Shows what was issued to the device; kicks it unless it asked not to be. Returns whether it kicked. */
  publish(): boolean
  /**
   * The next chain that the device has used, or -1.
   * @throws Error when the device returns a chain that it doesn't have
   */
  pop(): number
  /** Frees the descriptors of a chain that isn't in flight. */
  release(chain: number): void
  /** Whether `pop` would return a chain: one look at shared memory. */
  hasUsed(): boolean
  /** How many chains the device has used that `pop` has not returned. It walks; for tests. */
  pending(): number
  /** Asks for a call at the next used chain. Returns true when one is there already (then no call may come for it). */
  enableCalls(): boolean
  /** Asks for no calls. It is a hint: one may still come. */
  disableCalls(): void
  /**
   * How far the driver has read what the device used, as SET_VRING_BASE of a resumed ring wants it when nothing is in
   * flight. Split: a u16. Packed: a u32 with both indices and wrap counters.
   */
  readonly base: number
  /** Kicks, whatever the device wants. */
  kickRaw(): void
  /**
   * Forgets every chain and lays the ring out anew, as after a reset of the device; the ring must be stopped.
   * @param base where it starts, as SET_VRING_BASE says it; default as the driver was made
   */
  reset(base?: number): void
}

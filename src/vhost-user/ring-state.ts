/** What the front-end said about one ring. The ring itself lives on an iothread. */
import { VIRTIO_F_EVENT_IDX, VIRTIO_F_IN_ORDER, VIRTIO_F_INDIRECT_DESC } from '../virtio/constants.ts'
import { packedRingSizes } from '../virtio/packed-ring.ts'
import { splitRingSizes } from '../virtio/split-ring.ts'
import type { VringConfig } from '../virtio/vring.ts'
import { ProtocolError } from './errors.ts'
import { ADDRESS_LIMIT } from './mapping.ts'
import type { MemoryTable } from './memory-table.ts'
import type { Negotiated } from './negotiated.ts'
import type { VringAddress } from './wire.ts'

export const NO_FD = -1

export class RingState {
  readonly index: number
  /** Entries; 0 = SET_VRING_NUM did not come. */
  size = 0
  /** As VringConfig.base; undefined = SET_VRING_BASE did not come. */
  base: number | undefined
  address: VringAddress | undefined
  /** SET_VRING_KICK came, with or without an fd, or VRING_KICK. */
  kicked = false
  kickFd = NO_FD
  callFd = NO_FD
  errFd = NO_FD
  /** SET_VRING_KICK, CALL or ERR came and said that there is no fd: no messages in place of it either. */
  kickPolled = false
  callPolled = false
  errIgnored = false
  /** What SET_VRING_ENABLE said. */
  enabled = false
  /** It is served by an iothread, with `config`; `inband` and `logAddress` are what the iothread was told last. */
  started = false
  config: VringConfig | undefined
  inband = false
  logAddress = -1
  /** Its part of the in-flight buffer is over: the next start in this session takes its base from the front-end. */
  drained = false
  /** It was started, and shall be again, when the session was suspended. */
  suspended = false

  constructor(index: number) {
    this.index = index
  }

  /** As if the front-end had said nothing. The fds are closed, the ring is stopped. */
  reset(): void {
    this.size = 0
    this.base = undefined
    this.address = undefined
    this.kicked = false
    this.kickFd = NO_FD
    this.callFd = NO_FD
    this.errFd = NO_FD
    this.kickPolled = false
    this.callPolled = false
    this.errIgnored = false
    this.enabled = false
  }

  /**
   * What an iothread needs to serve the ring. @param inflight it has a region of the in-flight buffer
   * @throws ProtocolError for a size or base that the format doesn't have, or an address that is misaligned or outside
   * of the memory
   */
  configure(memory: MemoryTable, negotiated: Negotiated, inflight: boolean): VringConfig {
    const address = this.address!
    const { size } = this
    const { packed, translated } = negotiated
    const eventIdx = negotiated.has(VIRTIO_F_EVENT_IDX)
    checkSize(size, packed)
    const bytes = packed ? packedRingSizes(size) : splitRingSizes(size, eventIdx)
    const place = (part: string, at: bigint, length: number, align: number): number =>
      locate(translated ? undefined : memory, part, at, length, align)
    // Alignments: virtio 1.3 §2.7 and §2.8.
    return {
      size,
      descriptor: place(packed ? 'descriptor ring' : 'descriptor table', address.descriptor, bytes.descriptor, 16),
      driver: place(packed ? 'driver area' : 'avail ring', address.available, bytes.driver, packed ? 4 : 2),
      device: place(packed ? 'device area' : 'used ring', address.used, bytes.device, 4),
      base: checkBase(this.base ?? firstBase(packed), size, packed, inflight),
      eventIdx,
      indirect: negotiated.has(VIRTIO_F_INDIRECT_DESC),
      packed,
      inOrder: negotiated.has(VIRTIO_F_IN_ORDER),
    }
  }

  /** Whether the started ring is where `config` says. */
  isAt(config: VringConfig): boolean {
    const now = this.config
    return now?.descriptor === config.descriptor && now.driver === config.driver && now.device === config.device
  }

  /** The part that the device writes and the front-end wants logged: where it is in descriptors, and its bytes. */
  loggedPart(config: VringConfig): { start: number; bytes: number } {
    return config.packed
      ? { start: config.descriptor, bytes: packedRingSizes(config.size).descriptor }
      : { start: config.device, bytes: splitRingSizes(config.size, config.eventIdx).device }
  }
}

/** A packed ring may have any size, a split one is a power of two (virtio 1.3 §2.8.10.1, §2.7). @throws ProtocolError */
export function checkSize(size: number, packed: boolean): void {
  if (!packed && (size & (size - 1)) !== 0) {
    throw new ProtocolError('ERR_PROTOCOL_VRING', `a split ring of ${size} entries, which is no power of two`)
  }
}

/** Where a ring begins: packed rings with both wrap counters at 1 (virtio 1.3 §2.8.1). */
export function firstBase(packed: boolean): number {
  return packed ? 0x8000_8000 : 0
}

/**
 * The base in the form of the ring's format.
 *
 * DPDK's virtio-user starts a packed ring with the avail half alone (0x8000). A ring without in-flight tracking was
 * drained when it stopped, so the used half is the same then; with it the used half may be behind, and what the region
 * says counts anyway.
 * @throws ProtocolError for an index that the ring doesn't have
 */
export function checkBase(base: number, size: number, packed: boolean, inflight: boolean): number {
  if (!packed) {
    if (base <= 0xffff) return base
    throw new ProtocolError('ERR_PROTOCOL_VRING', `avail index ${base}`)
  }
  const whole = base >>> 16 === 0 && !inflight ? ((base << 16) | base) >>> 0 : base
  for (const [half, what] of [
    [whole & 0xffff, 'avail'],
    [whole >>> 16, 'used'],
  ] as const) {
    if ((half & 0x7fff) >= size) {
      throw new ProtocolError('ERR_PROTOCOL_VRING', `${what} index ${half & 0x7fff} of a ring of ${size}`)
    }
  }
  return whole
}

/** @param memory undefined: the address is an IOVA, and is looked up when it is used */
function locate(memory: MemoryTable | undefined, part: string, at: bigint, length: number, align: number): number {
  if (at % BigInt(align) !== 0n)
    throw new ProtocolError('ERR_PROTOCOL_VRING', `the ${part} is not aligned to ${align} bytes`)
  if (memory === undefined) {
    if (at + BigInt(length) <= ADDRESS_LIMIT) return Number(at)
    throw new ProtocolError('ERR_PROTOCOL_VRING', `the ${part} reaches beyond 2^53`)
  }
  const gpa = memory.translate(at, length)
  if (gpa === undefined)
    throw new ProtocolError(
      'ERR_PROTOCOL_VRING',
      `the ${part} is not inside one memory region (is the guest's memory shared? In QEMU: share=on)`
    )
  return gpa
}

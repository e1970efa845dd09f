/** What the front-end said about one ring. The ring itself lives on an iothread. */
import { VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC } from '../virtio/constants.ts'
import { hasFeature } from '../virtio/features.ts'
import { splitRingSizes } from '../virtio/split-ring.ts'
import type { VringConfig } from '../virtio/vring.ts'
import { ProtocolError } from './errors.ts'
import type { MemoryTable } from './memory-table.ts'
import type { VringAddress } from './wire.ts'

export const NO_FD = -1

export class RingState {
  readonly index: number
  /** Entries; 0 = SET_VRING_NUM did not come. */
  size = 0
  base = 0
  address: VringAddress | undefined
  /** SET_VRING_KICK came, with or without an fd. */
  kicked = false
  kickFd = NO_FD
  callFd = NO_FD
  errFd = NO_FD
  /** What SET_VRING_ENABLE said. */
  enabled = false
  /** It is served by an iothread, with `config`. */
  started = false
  config: VringConfig | undefined

  constructor(index: number) {
    this.index = index
  }

  /** As if the front-end had said nothing. The fds are closed, the ring is stopped. */
  reset(): void {
    this.size = 0
    this.base = 0
    this.address = undefined
    this.kicked = false
    this.kickFd = NO_FD
    this.callFd = NO_FD
    this.errFd = NO_FD
    this.enabled = false
  }

  /**
   * What an iothread needs to serve the ring. @throws ProtocolError for an address that is misaligned or outside the
   * memory
   */
  configure(memory: MemoryTable, features: bigint): VringConfig {
    const address = this.address!
    const eventIdx = hasFeature(features, VIRTIO_F_EVENT_IDX)
    const bytes = splitRingSizes(this.size, eventIdx)
    return {
      size: this.size,
      descriptor: translate(memory, 'descriptor table', address.descriptor, bytes.descriptor, 16),
      driver: translate(memory, 'avail ring', address.available, bytes.driver, 2),
      device: translate(memory, 'used ring', address.used, bytes.device, 4),
      base: this.base,
      eventIdx,
      indirect: hasFeature(features, VIRTIO_F_INDIRECT_DESC),
    }
  }

  /** Whether the started ring is where `address` says now. @throws ProtocolError as `configure` */
  isAt(memory: MemoryTable, features: bigint): boolean {
    const now = this.configure(memory, features)
    const config = this.config
    return now.descriptor === config?.descriptor && now.driver === config.driver && now.device === config.device
  }
}

/** Alignments: virtio 1.3 §2.7. */
function translate(memory: MemoryTable, part: string, uva: bigint, length: number, align: number): number {
  if (uva % BigInt(align) !== 0n)
    throw new ProtocolError('ERR_PROTOCOL_VRING', `the ${part} is not aligned to ${align} bytes`)
  const gpa = memory.translate(uva, length)
  if (gpa === undefined)
    throw new ProtocolError(
      'ERR_PROTOCOL_VRING',
      `the ${part} is not inside one memory region (is the guest's memory shared? In QEMU: share=on)`
    )
  return gpa
}

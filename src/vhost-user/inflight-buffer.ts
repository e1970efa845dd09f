/**
 * The in-flight buffer (vhost-user.rst "Inflight I/O tracking"): we make its file, the front-end keeps it and gives it
 * back, to us or to who comes after us. One region per queue; what a region says is virtio/inflight.ts's business.
 */
import { native, systemError } from '../native.ts'
import { VIRTQ_MAX_SIZE } from '../virtio/constants.ts'
import { forgetInflight, hasInflight, InflightError, inflightSize } from '../virtio/inflight.ts'
import { isInitialised } from '../virtio/inflight-region.ts'
import { ProtocolError } from './errors.ts'
import { MappedArea } from './mapping.ts'
import type { SharedArea } from './ring-host.ts'
import type { InflightDescription } from './wire.ts'

// fcntl(2)
const F_SEAL_SEAL = 1
const F_SEAL_SHRINK = 2
const F_SEAL_GROW = 4

/**
 * GET_INFLIGHT_FD: a file of zeroes, which nobody can make shorter. The caller owns its fd.
 * @throws ProtocolError for queues that the device doesn't have, or a system error
 */
export function createInflight(
  asked: InflightDescription,
  packed: boolean,
  numQueues: number
): { description: InflightDescription; fd: number } {
  checkQueues(asked, numQueues)
  const mmapSize = asked.numQueues * inflightSize(asked.queueSize, packed)
  const fd = native.memfd('virtiod-inflight', mmapSize, 0)
  if (fd < 0) throw systemError(fd, 'memfd_create', 'cannot make an in-flight buffer')
  const sealed = native.sealFile(fd, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL)
  if (sealed < 0) {
    native.close(fd)
    throw systemError(sealed, 'fcntl', 'cannot seal an in-flight buffer')
  }
  return { description: { ...asked, mmapSize: BigInt(mmapSize), mmapOffset: 0n }, fd }
}

export class InflightBuffer {
  readonly area: MappedArea
  readonly numQueues: number
  readonly queueSize: number

  /**
   * SET_INFLIGHT_FD. @param fd stays the caller's @param numQueues that the device has
   * @throws ProtocolError
   */
  constructor(description: InflightDescription, fd: number, packed: boolean, numQueues: number) {
    checkQueues(description, numQueues)
    this.numQueues = description.numQueues
    this.queueSize = description.queueSize
    const needed = this.numQueues * inflightSize(this.queueSize, packed)
    if (description.mmapSize < BigInt(needed)) {
      throw inflightError(`a buffer of ${description.mmapSize} bytes for queues that need ${needed}`)
    }
    // The regions are words of 8 bytes.
    if (description.mmapOffset % 8n !== 0n) throw inflightError(`a buffer at ${description.mmapOffset}`)
    const { mmapOffset, mmapSize } = description
    this.area = MappedArea.map(fd, mmapOffset, mmapSize, 'the in-flight buffer', 'ERR_PROTOCOL_INFLIGHT')
  }

  /**
   * The region of a ring that is about to start.
   *
   * A ring without a region is refused, not left untracked: the front-end would resume it after a crash, and lose what
   * was in flight.
   * @throws ProtocolError when there is none, or it is of another ring
   */
  region(index: number, size: number, packed: boolean): SharedArea {
    if (index >= this.numQueues) throw inflightError(`the buffer has no region for queue ${index}`)
    if (size > this.queueSize) throw inflightError(`a ring of ${size} entries, its region has ${this.queueSize}`)
    const length = inflightSize(this.queueSize, packed)
    // RING_PACKED may have been negotiated since.
    if ((index + 1) * length > this.area.size)
      throw inflightError(`the buffer ends inside the region of queue ${index}`)
    const area = { buffer: this.area.buffer, offset: index * length, size: length }
    try {
      isInitialised(bytesOf(area), size, packed)
    } catch (cause) {
      if (cause instanceof InflightError) throw inflightError(`queue ${index}: ${cause.message}`, cause)
      throw cause
    }
    return area
  }

  /**
   * The ring was drained and the front-end asked where it stood: what it says at the next start counts again. A driver
   * that was reset begins anew. Where it left something nevertheless (a translation was missing, or the device failed)
   * the region counts, or that would be lost. @param reset forget that as well
   */
  forget(index: number, packed: boolean, reset: boolean): void {
    const length = inflightSize(this.queueSize, packed)
    const bytes = bytesOf({ buffer: this.area.buffer, offset: index * length, size: length })
    if (reset || !hasInflight(bytes, packed)) forgetInflight(bytes)
  }
}

function checkQueues(asked: InflightDescription, numQueues: number): void {
  if (asked.numQueues === 0 || asked.numQueues > numQueues) {
    throw inflightError(`${asked.numQueues} queues, the device has ${numQueues}`)
  }
  if (asked.queueSize === 0 || asked.queueSize > VIRTQ_MAX_SIZE) {
    throw inflightError(`queues of ${asked.queueSize} entries`)
  }
}

function bytesOf({ buffer, offset, size }: SharedArea): Uint8Array {
  return new Uint8Array(buffer, offset, size)
}

function inflightError(message: string, cause?: unknown): ProtocolError {
  return new ProtocolError('ERR_PROTOCOL_INFLIGHT', message, { cause })
}

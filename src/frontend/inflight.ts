/**
 * The in-flight area as a front-end has it: the memory that a back-end keeps its marks in and that outlives it
 * (vhost-user.rst "Inflight I/O tracking"). It owns the file and the mapping, and reads what is in it, for tests. It is
 * written from the specification alone: the back-end's half is in `src/virtio/`, and one bug must not hide in both.
 */
import { native, systemError } from '../native.ts'
import type { InflightDescription } from '../vhost-user/wire.ts'
import type { Connection } from './connection.ts'
import { FrontendError } from './errors.ts'

const PAGE = 4096
const HEADER_BYTES = { split: 16, packed: 32 }
const ENTRY_BYTES = { split: 16, packed: 32 }

export class InflightArea {
  readonly description: InflightDescription
  readonly packed: boolean
  /** Owned by this object. */
  readonly fd: number
  /** The whole area. */
  readonly bytes: Uint8Array
  readonly #address: number
  #closed = false

  /** @param fd owned from here on @throws FrontendError system when it can't be mapped */
  constructor(description: InflightDescription, fd: number, packed: boolean) {
    this.description = description
    this.packed = packed
    this.fd = fd
    const offset = Number(description.mmapOffset)
    const size = Number(description.mmapSize)
    const start = Math.floor(offset / PAGE) * PAGE
    const mapping = native.mapFile(
      fd,
      start,
      Math.ceil((offset - start + size) / PAGE) * PAGE,
      offset - start,
      size,
      true
    )
    if (typeof mapping === 'number') {
      native.close(fd)
      throw new FrontendError('in-flight area', 'system', `${size} bytes at ${offset} can't be mapped`, mapping)
    }
    this.bytes = new Uint8Array(mapping.buffer)
    this.#address = mapping.address
  }

  /** One that the back-end makes (GET_INFLIGHT_FD). */
  static get(connection: Connection, numQueues: number, queueSize: number, packed: boolean): InflightArea {
    const { description, fd } = connection.getInflightFd(numQueues, queueSize)
    return new InflightArea(description, fd, packed)
  }

  /** One made here, of zeroes. */
  static create(numQueues: number, queueSize: number, packed: boolean): InflightArea {
    const size = numQueues * inflightRegionBytes(queueSize, packed)
    const fd = native.memfd('virtiod-inflight', Math.ceil(size / PAGE) * PAGE, 0)
    if (fd < 0) throw systemError(fd, 'memfd_create', 'an in-flight area')
    return new InflightArea({ mmapSize: BigInt(size), mmapOffset: 0n, numQueues, queueSize }, fd, packed)
  }

  /** The part of one queue. @throws RangeError */
  queue(index: number): Uint8Array {
    const { numQueues, queueSize } = this.description
    const size = inflightRegionBytes(queueSize, this.packed)
    if (index >= numQueues || (index + 1) * size > this.bytes.length) {
      throw new RangeError(`the in-flight area of ${this.bytes.length} bytes has no queue ${index} of ${numQueues}`)
    }
    return this.bytes.subarray(index * size, (index + 1) * size)
  }

  /** What is in one queue's part. */
  read(index: number): InflightState {
    return readInflight(this.queue(index), this.packed)
  }

  /** Hands it to the back-end (SET_INFLIGHT_FD). */
  share(connection: Connection): void {
    connection.setInflightFd(this.description, this.fd)
  }

  /** Idempotent. */
  close(): void {
    if (this.#closed) return
    this.#closed = true
    native.close(this.fd)
    native.release(this.#address)
  }
}

/** Bytes of one queue's part, rounded up to 64 as libvhost-user, DPDK and SPDK do; the specification does not say. */
export function inflightRegionBytes(queueSize: number, packed: boolean): number {
  const format = packed ? 'packed' : 'split'
  return Math.ceil((HEADER_BYTES[format] + ENTRY_BYTES[format] * queueSize) / 64) * 64
}

/** DescStateSplit and DescStatePacked; the fields from `last` on are packed only. */
export interface InflightEntry {
  readonly index: number
  readonly inflight: boolean
  readonly next: number
  readonly counter: bigint
  readonly last: number
  readonly num: number
  readonly id: number
  readonly flags: number
  readonly length: number
  readonly address: bigint
}

/** QueueRegionSplit and QueueRegionPacked. What the other format has is 0. */
export interface InflightState {
  readonly features: bigint
  readonly version: number
  readonly descNum: number
  /** Split. */
  readonly lastBatchHead: number
  readonly usedIdx: number
  /** Packed. */
  readonly freeHead: number
  readonly oldFreeHead: number
  readonly oldUsedIdx: number
  readonly usedWrapCounter: number
  readonly oldUsedWrapCounter: number
  readonly entries: readonly InflightEntry[]
  /** Entries that are marked, in the order of their counters. */
  readonly inflight: readonly InflightEntry[]
}

/** Reads one queue's part. The number of entries is what the part says, no more than fit. */
export function readInflight(bytes: Uint8Array, packed: boolean): InflightState {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  const format = packed ? 'packed' : 'split'
  const u16 = (at: number): number => view.getUint16(at, true)
  const descNum = u16(10)
  const fit = Math.floor((bytes.length - HEADER_BYTES[format]) / ENTRY_BYTES[format])
  const entries: InflightEntry[] = []
  for (let index = 0; index < Math.min(descNum, fit); index++) {
    const at = HEADER_BYTES[format] + index * ENTRY_BYTES[format]
    const common = { index, inflight: bytes[at] !== 0, counter: view.getBigUint64(at + 8, true) }
    entries.push(
      packed
        ? {
            ...common,
            next: u16(at + 2),
            last: u16(at + 4),
            num: u16(at + 6),
            id: u16(at + 16),
            flags: u16(at + 18),
            length: view.getUint32(at + 20, true),
            address: view.getBigUint64(at + 24, true),
          }
        : { ...common, next: u16(at + 6), last: 0, num: 0, id: 0, flags: 0, length: 0, address: 0n }
    )
  }
  const inflight = entries.filter((entry) => entry.inflight).sort((a, b) => (a.counter < b.counter ? -1 : 1))
  const header = { features: view.getBigUint64(0, true), version: u16(8), descNum, entries, inflight }
  return packed
    ? {
        ...header,
        lastBatchHead: 0,
        freeHead: u16(12),
        oldFreeHead: u16(14),
        usedIdx: u16(16),
        oldUsedIdx: u16(18),
        usedWrapCounter: view.getUint8(20),
        oldUsedWrapCounter: view.getUint8(21),
      }
    : {
        ...header,
        lastBatchHead: u16(12),
        usedIdx: u16(14),
        freeHead: 0,
        oldFreeHead: 0,
        oldUsedIdx: 0,
        usedWrapCounter: 0,
        oldUsedWrapCounter: 0,
      }
}

/**
 * What the two halves of the block device share: plain data that crosses to the iothreads, and the lists behind the
 * counters.
 */

/** `DeviceDefinition.operations` of this device, and their indices. */
export const OPERATIONS = ['read', 'write', 'flush', 'discard', 'write_zeroes', 'get_id', 'other'] as const
export const READ = 0
export const WRITE = 1
export const FLUSH = 2
export const DISCARD = 3
export const WRITE_ZEROES = 4
export const GET_ID = 5
export const OTHER = 6

/** `DeviceDefinition.errors`, and their indices. */
export const ERRORS = ['io', 'no_space', 'end_of_file', 'range', 'read_only', 'unsupported', 'malformed'] as const
export const IO = 0
export const NO_SPACE = 1
export const END_OF_FILE = 2
export const RANGE = 3
export const READ_ONLY = 4
export const UNSUPPORTED = 5
export const MALFORMED = 6

/** Segments that one DISCARD or WRITE_ZEROES may have, and sectors that each may cover (4 GiB). */
export const MAX_RANGES = 64
export const MAX_RANGE_SECTORS = 0x80_0000

/** Handed to the handler of each queue. */
export interface BlkQueueData {
  readonly fd: number
  readonly readOnly: boolean
  /** Flushes and write-through mean nothing (`--cache unsafe`). */
  readonly unsafe: boolean
  /** Logical block size in bytes. */
  readonly blockSize: number
  /** What O_DIRECT demands of addresses and lengths; 1 = nothing. */
  readonly memoryAlign: number
  readonly lengthAlign: number
  /** DISCARD is offered; holes can be punched. */
  readonly discard: boolean
  /** The serial number, VIRTIO_BLK_ID_BYTES long. */
  readonly serial: Uint8Array
  /** {@link BlkState}. */
  readonly state: SharedArrayBuffer
}

/** What changes at run time: written by the control thread, read by iothreads per request. */
export class BlkState {
  readonly buffer: SharedArrayBuffer
  readonly #values: Float64Array

  constructor(buffer: SharedArrayBuffer = new SharedArrayBuffer(16)) {
    this.buffer = buffer
    this.#values = new Float64Array(buffer)
  }

  /** In 512-byte sectors. */
  get capacity(): number {
    return this.#values[0]!
  }

  set capacity(sectors: number) {
    this.#values[0] = sectors
  }

  /** The driver's write-cache switch: false = each write is durable when it completes. */
  get writeback(): boolean {
    return this.#values[1] !== 0
  }

  set writeback(on: boolean) {
    this.#values[1] = on ? 1 : 0
  }
}

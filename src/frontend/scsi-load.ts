/**
 * The load generator's hot path for one request queue of a SCSI device: as load.ts, with READ (10) and WRITE (10), or of 16
 * bytes where the unit is too large for these. Nothing is allocated per request. It must not know sockets or printing.
 */
import { VIRTQ_DESC_SIZE } from '../virtio/constants.ts'
import {
  VIRTIO_SCSI_CDB_DEFAULT_SIZE,
  VIRTIO_SCSI_REQ_CDB,
  VIRTIO_SCSI_REQ_HEADER_SIZE,
  VIRTIO_SCSI_REQ_ID,
  VIRTIO_SCSI_RESP_HEADER_SIZE,
  VIRTIO_SCSI_RESP_RESPONSE,
  VIRTIO_SCSI_RESP_STATUS,
  VIRTIO_SCSI_S_OK,
  VIRTIO_SCSI_SENSE_DEFAULT_SIZE,
} from '../virtio/scsi.ts'
import type { VirtqueueDriver } from './driver.ts'
import type { Histogram } from './histogram.ts'
import type { Load, LoadOptions } from './load.ts'
import type { GuestBuffer, GuestMemory } from './memory.ts'
import { unitAddress } from './scsi.ts'

const HEADER = VIRTIO_SCSI_REQ_HEADER_SIZE + VIRTIO_SCSI_CDB_DEFAULT_SIZE
const RESPONSE = VIRTIO_SCSI_RESP_HEADER_SIZE + VIRTIO_SCSI_SENSE_DEFAULT_SIZE
/** Cache lines of their own for each request's header and response. */
const HEADER_STRIDE = 64
const RESPONSE_STRIDE = 128

const READ_10 = 0x28
const WRITE_10 = 0x2a
const READ_16 = 0x88
const WRITE_16 = 0x8a

export interface ScsiLoadOptions extends LoadOptions {
  readonly lun: number
  /** Bytes of a logical block of the unit. */
  readonly unitBlockSize: number
}

export class ScsiLoad implements Load {
  completed = 0
  errors = 0
  readonly #driver: VirtqueueDriver
  readonly #histogram: Histogram
  readonly #options: ScsiLoadOptions
  readonly #bytes: Uint8Array
  readonly #headers: GuestBuffer
  readonly #responses: GuestBuffer
  readonly #slotOf: Int32Array
  readonly #chains: Int32Array
  readonly #started: Float64Array
  readonly #random: boolean
  readonly #write: boolean
  readonly #long: boolean
  readonly #unitBlocks: number
  #cursor: number
  #seed: number

  /** @throws RangeError when the ring or the memory is too small for `depth`, or the pattern mixes reads and writes */
  constructor(driver: VirtqueueDriver, memory: GuestMemory, histogram: Histogram, options: ScsiLoadOptions) {
    const { depth, blockSize, pattern, unitBlockSize } = options
    // The two have their segments in another order, so a chain can't be one and then the other.
    if (pattern === 'randrw') throw new RangeError('rw: randrw is for block devices')
    this.#driver = driver
    this.#histogram = histogram
    this.#options = options
    this.#random = pattern.startsWith('rand')
    this.#write = pattern.endsWith('write')
    this.#unitBlocks = blockSize / unitBlockSize
    this.#long = (options.firstBlock + options.blocks) * this.#unitBlocks > 2 ** 32 || this.#unitBlocks > 0xffff
    this.#cursor = 0
    this.#seed = options.seed | 0 || 1
    this.#headers = memory.allocate(depth * HEADER_STRIDE, 64)
    this.#responses = memory.allocate(depth * RESPONSE_STRIDE, 64)
    this.#bytes = this.#headers.region.bytes
    this.#slotOf = new Int32Array(driver.size).fill(-1)
    this.#chains = new Int32Array(depth)
    this.#started = new Float64Array(depth)
    for (let slot = 0; slot < depth; slot++) {
      const data = memory.allocate(blockSize, 4096)
      this.#fillRandom(data)
      this.#fillHeader(slot)
      const table = options.indirect ? memory.allocate(3 * VIRTQ_DESC_SIZE, 16) : undefined
      const header = { address: this.#headers.gpa + slot * HEADER_STRIDE, length: HEADER, writable: false }
      const response = { address: this.#responses.gpa + slot * RESPONSE_STRIDE, length: RESPONSE, writable: true }
      const payload = { address: data.gpa, length: blockSize, writable: !this.#write }
      const chain = driver.build(this.#write ? [header, payload, response] : [header, response, payload], table)
      if (chain < 0)
        throw new RangeError(`a ring of ${driver.size} entries is too small for ${depth} requests in flight`)
      this.#chains[slot] = chain
      this.#slotOf[chain] = slot
    }
  }

  /** Puts all requests in flight. @param now milliseconds */
  start(now: number): void {
    for (let slot = 0; slot < this.#options.depth; slot++) this.#next(slot, now)
    this.#driver.publish()
  }

  /** As BlockLoad.step. */
  step(clock: () => number, more: boolean): number {
    const driver = this.#driver
    let chain = driver.pop()
    if (chain < 0) return 0
    const now = clock()
    const histogram = this.#histogram
    const bytes = this.#bytes
    let count = 0
    do {
      const slot = this.#slotOf[chain] as number
      const at = this.#responses.offset + slot * RESPONSE_STRIDE
      if (bytes[at + VIRTIO_SCSI_RESP_RESPONSE] !== VIRTIO_SCSI_S_OK || bytes[at + VIRTIO_SCSI_RESP_STATUS] !== 0)
        this.errors++
      histogram.record((now - (this.#started[slot] as number)) * 1e6)
      if (more) this.#next(slot, now)
      count++
      chain = driver.pop()
    } while (chain >= 0)
    if (more) driver.publish()
    this.completed += count
    return count
  }

  #next(slot: number, now: number): void {
    const { blocks, firstBlock } = this.#options
    let block: number
    if (this.#random) block = this.#draw() % blocks
    else {
      block = this.#cursor
      this.#cursor = block + 1 === blocks ? 0 : block + 1
    }
    const lba = (firstBlock + block) * this.#unitBlocks
    const bytes = this.#bytes
    // The last of four bytes, big-endian, or of eight.
    const at = this.#headers.offset + slot * HEADER_STRIDE + VIRTIO_SCSI_REQ_CDB + (this.#long ? 6 : 2)
    if (this.#long) this.#address(at - 4, Math.floor(lba / 2 ** 32))
    this.#address(at, lba % 2 ** 32)
    bytes[this.#responses.offset + slot * RESPONSE_STRIDE + VIRTIO_SCSI_RESP_RESPONSE] = 0xff
    this.#started[slot] = now
    this.#driver.issue(this.#chains[slot] as number)
  }

  #address(at: number, word: number): void {
    const bytes = this.#bytes
    bytes[at] = word >>> 24
    bytes[at + 1] = word >>> 16
    bytes[at + 2] = word >>> 8
    bytes[at + 3] = word
  }

  #fillHeader(slot: number): void {
    const start = this.#headers.offset + slot * HEADER_STRIDE
    const header = this.#bytes.subarray(start, start + HEADER)
    const view = new DataView(header.buffer, header.byteOffset, HEADER)
    header.fill(0)
    header.set(unitAddress(this.#options.lun))
    view.setUint32(VIRTIO_SCSI_REQ_ID, slot + 1, true)
    if (this.#long) {
      view.setUint8(VIRTIO_SCSI_REQ_CDB, this.#write ? WRITE_16 : READ_16)
      view.setUint32(VIRTIO_SCSI_REQ_CDB + 10, this.#unitBlocks)
    } else {
      view.setUint8(VIRTIO_SCSI_REQ_CDB, this.#write ? WRITE_10 : READ_10)
      view.setUint16(VIRTIO_SCSI_REQ_CDB + 7, this.#unitBlocks)
    }
  }

  /** xorshift32. */
  #draw(): number {
    let x = this.#seed
    x ^= x << 13
    x ^= x >>> 17
    x ^= x << 5
    this.#seed = x
    return x >>> 0
  }

  #fillRandom(data: GuestBuffer): void {
    const words = new Uint32Array(data.region.buffer, data.offset, data.length / 4)
    for (let i = 0; i < words.length; i++) words[i] = this.#draw()
  }
}

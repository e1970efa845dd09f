/**
 * The load generator's hot path for one virtqueue: `depth` block requests always in flight, their chains built once.
 * Nothing is allocated per request. It must not know sockets or printing.
 *
 * Per round: take everything the device has used, note the latency, give each chain its next sector, publish the
 * batch with one store. One clock reading serves the whole batch.
 */
import { VIRTIO_BLK_HEADER_SIZE, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT } from '../virtio/blk.ts'
import { VIRTQ_DESC_SIZE } from '../virtio/constants.ts'
import type { VirtqueueDriver } from './driver.ts'
import type { Histogram } from './histogram.ts'
import type { GuestBuffer, GuestMemory } from './memory.ts'

/** What the requests do. The names are fio's. */
export type Pattern = 'read' | 'write' | 'randread' | 'randwrite' | 'randrw'
export const PATTERNS: readonly Pattern[] = ['read', 'write', 'randread', 'randwrite', 'randrw']

export interface LoadOptions {
  readonly pattern: Pattern
  /** Bytes per request, a multiple of 512. */
  readonly blockSize: number
  readonly depth: number
  /** The area to work on: first block and number of blocks, in units of `blockSize`. */
  readonly firstBlock: number
  readonly blocks: number
  readonly seed: number
  readonly indirect: boolean
}

/** A load on one virtqueue. */
export interface Load {
  readonly completed: number
  readonly errors: number
  /** Puts all requests in flight. @param now milliseconds */
  start(now: number): void
  /**
   * Takes what has completed and issues as many again.
   * @param clock a monotonic clock in milliseconds, read once when there is something @param more false: issue nothing
   * @returns the number of completions
   */
  step(clock: () => number, more: boolean): number
}

export class BlockLoad implements Load {
  completed = 0
  errors = 0
  readonly #driver: VirtqueueDriver
  readonly #histogram: Histogram
  readonly #options: LoadOptions
  readonly #words: Uint32Array
  readonly #bytes: Uint8Array
  readonly #headers: GuestBuffer
  readonly #statuses: GuestBuffer
  readonly #slotOf: Int32Array
  readonly #chains: Int32Array
  readonly #writing: Uint8Array
  readonly #started: Float64Array
  readonly #random: boolean
  readonly #mixed: boolean
  readonly #sectorsPerBlock: number
  #cursor: number
  #seed: number

  /** @throws RangeError when the ring or the memory is too small for `depth` */
  constructor(driver: VirtqueueDriver, memory: GuestMemory, histogram: Histogram, options: LoadOptions) {
    const { depth, blockSize, pattern } = options
    this.#driver = driver
    this.#histogram = histogram
    this.#options = options
    this.#random = pattern.startsWith('rand')
    this.#mixed = pattern === 'randrw'
    this.#sectorsPerBlock = blockSize / 512
    this.#cursor = 0
    this.#seed = options.seed | 0 || 1
    this.#headers = memory.allocate(depth * VIRTIO_BLK_HEADER_SIZE, 64)
    // A cache line per status byte: the device writes them, this thread reads them.
    this.#statuses = memory.allocate(depth * 64, 64)
    this.#words = new Uint32Array(this.#headers.region.buffer)
    this.#bytes = this.#headers.region.bytes
    this.#slotOf = new Int32Array(driver.size).fill(-1)
    this.#chains = new Int32Array(depth)
    this.#writing = new Uint8Array(depth).fill(pattern === 'write' || pattern === 'randwrite' ? 1 : 0)
    this.#started = new Float64Array(depth)
    for (let slot = 0; slot < depth; slot++) {
      const data = memory.allocate(blockSize, 4096)
      this.#fillRandom(data)
      const table = options.indirect ? memory.allocate(3 * VIRTQ_DESC_SIZE, 16) : undefined
      const chain = driver.build(
        [
          {
            address: this.#headers.gpa + slot * VIRTIO_BLK_HEADER_SIZE,
            length: VIRTIO_BLK_HEADER_SIZE,
            writable: false,
          },
          { address: data.gpa, length: blockSize, writable: this.#writing[slot] === 0 },
          { address: this.#statuses.gpa + slot * 64, length: 1, writable: true },
        ],
        table
      )
      if (chain < 0)
        throw new RangeError(`a ring of ${driver.size} entries is too small for ${depth} requests in flight`)
      this.#chains[slot] = chain
      this.#slotOf[chain] = slot
      const header = (this.#headers.offset + slot * VIRTIO_BLK_HEADER_SIZE) / 4
      this.#words[header] = this.#writing[slot] === 1 ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN
      this.#words[header + 1] = 0
    }
  }

  /** Puts all requests in flight. @param now milliseconds */
  start(now: number): void {
    for (let slot = 0; slot < this.#options.depth; slot++) this.#next(slot, now)
    this.#driver.publish()
  }

  /**
   * Takes what has completed and issues as many again.
   * @param clock a monotonic clock in milliseconds, read once when there is something @param more false: issue nothing
   * @returns the number of completions
   */
  step(clock: () => number, more: boolean): number {
    const driver = this.#driver
    let chain = driver.pop()
    if (chain < 0) return 0
    const now = clock()
    const histogram = this.#histogram
    let count = 0
    do {
      const slot = this.#slotOf[chain] as number
      if (this.#bytes[this.#statuses.offset + slot * 64] !== VIRTIO_BLK_S_OK) this.errors++
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
    if (this.#random) {
      block = this.#draw() % blocks
    } else {
      block = this.#cursor
      this.#cursor = block + 1 === blocks ? 0 : block + 1
    }
    const sector = (firstBlock + block) * this.#sectorsPerBlock
    const header = (this.#headers.offset + slot * VIRTIO_BLK_HEADER_SIZE) / 4
    this.#words[header + 2] = sector % 0x1_0000_0000
    this.#words[header + 3] = Math.floor(sector / 0x1_0000_0000)
    if (this.#mixed) this.#direct(slot, header)
    this.#bytes[this.#statuses.offset + slot * 64] = 0xff
    this.#started[slot] = now
    this.#driver.issue(this.#chains[slot] as number)
  }

  #direct(slot: number, header: number): void {
    const write = (this.#draw() >>> 7) & 1
    if (write === this.#writing[slot]) return
    this.#writing[slot] = write
    this.#words[header] = write === 1 ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN
    this.#driver.setWritable(this.#chains[slot] as number, 1, write === 0)
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

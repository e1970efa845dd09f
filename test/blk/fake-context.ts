/** What the engine is to a queue handler, for tests: it records operations, and the test decides how they end. */
import type { BlkQueueData } from '../../devices/blk/shared.ts'
import { BlkState } from '../../devices/blk/shared.ts'
import type { DeviceIo, IoBuffer, IoFile, QueueContext, QueueHandler } from '../../src/device/index.ts'
import { VIRTIO_BLK_F_FLUSH } from '../../src/virtio/blk.ts'
import { Chain } from '../../src/virtio/chain.ts'
import { GuestMemory } from '../../src/virtio/memory.ts'

export interface Operation {
  readonly kind: 'read' | 'write' | 'readBuffer' | 'writeBuffer' | 'fdatasync' | 'fallocate'
  readonly chain: Chain
  readonly offset: number
  readonly start: number
  readonly length: number
  readonly dsync: boolean
  readonly mode: number
  readonly buffer: IoBuffer | undefined
  /** What was to be written, at the time of the call. */
  readonly bytes: Uint8Array | undefined
}

export interface Completion {
  readonly head: number
  readonly written: number
  readonly operation: number
  readonly bytes: number
}

/** What a disk has no use for. */
function unused(): never {
  throw new Error('not for disks')
}

class FakeIo implements DeviceIo {
  readonly operations: Operation[] = []
  readonly open: number[] = []
  allocated = 0

  openFile(fd: number): IoFile {
    this.open.push(fd)
    return { fd, slot: -1, buffered: true }
  }

  closeFile(file: IoFile): void {
    this.open.splice(this.open.indexOf(file.fd), 1)
  }

  allocate(length: number): IoBuffer {
    this.allocated++
    return { bytes: new Uint8Array(length), address: 4096 }
  }

  watch = unused
  unwatch = unused
  packetSender = unused
  packetReceiver = unused
  copyBatch = unused

  read(chain: Chain, _file: IoFile, offset: number, start: number, length: number): void {
    if (start + length > chain.writable || length <= 0) throw new RangeError('read outside the chain')
    this.#add({ kind: 'read', chain, offset, start, length })
  }

  write(chain: Chain, _file: IoFile, offset: number, start: number, length: number, dsync: boolean): void {
    if (start + length > chain.readable || length <= 0) throw new RangeError('write outside the chain')
    const bytes = new Uint8Array(length)
    chain.copyFrom(start, bytes, 0, length)
    this.#add({ kind: 'write', chain, offset, start, length, dsync, bytes })
  }

  readBuffer(chain: Chain, _file: IoFile, offset: number, buffer: IoBuffer, start: number, length: number): void {
    this.#add({ kind: 'readBuffer', chain, offset, buffer, start, length })
  }

  writeBuffer(
    chain: Chain,
    _file: IoFile,
    offset: number,
    buffer: IoBuffer,
    start: number,
    length: number,
    dsync: boolean
  ): void {
    const bytes = buffer.bytes.slice(start, start + length)
    this.#add({ kind: 'writeBuffer', chain, offset, buffer, start, length, dsync, bytes })
  }

  fdatasync(chain: Chain): void {
    this.#add({ kind: 'fdatasync', chain })
  }

  fallocate(chain: Chain, _file: IoFile, mode: number, offset: number, length: number): void {
    this.#add({ kind: 'fallocate', chain, mode, offset, length })
  }

  #add(operation: Pick<Operation, 'kind' | 'chain'> & Partial<Operation>): void {
    if (!operation.chain.inFlight) throw new Error('an operation for a chain that is not in flight')
    if (this.operations.some(({ chain }) => chain === operation.chain)) throw new Error('two operations for one chain')
    this.operations.push({
      offset: 0,
      start: 0,
      length: 0,
      dsync: false,
      mode: 0,
      buffer: undefined,
      bytes: undefined,
      ...operation,
    })
  }
}

export class FakeContext implements QueueContext {
  readonly queueIndex: number = 0
  readonly queueSize = 256
  readonly features: bigint
  readonly io = new FakeIo()
  readonly completions: Completion[] = []
  readonly errors: number[] = []

  readonly active = true
  take = unused
  untake = unused
  give = unused
  report: (message: unknown) => void = unused
  fail = unused

  constructor(features: bigint) {
    this.features = features
  }

  complete(chain: Chain, written: number, operation: number, bytes: number): void {
    if (!chain.inFlight) throw new Error(`chain ${chain.head} was completed twice`)
    if (this.io.operations.some((pending) => pending.chain === chain))
      throw new Error('completed with an operation under way')
    chain.inFlight = false
    this.completions.push({ head: chain.head, written, operation, bytes })
  }

  countError(kind: number): void {
    this.errors.push(kind)
  }
}

/** Guest memory of one region with an address that is page-aligned, and everything that a request is made of. */
export class Bench {
  readonly context: FakeContext
  readonly state: BlkState
  readonly data: BlkQueueData
  readonly handler: QueueHandler
  readonly memory: GuestMemory
  readonly bytes: Uint8Array
  #free = 0
  #head = 0

  /** @param capacity in sectors */
  constructor(
    create: (context: QueueContext, data: BlkQueueData) => QueueHandler,
    {
      features = 1n << BigInt(VIRTIO_BLK_F_FLUSH),
      capacity = 2048,
      ...data
    }: Partial<BlkQueueData> & { features?: bigint; capacity?: number } = {}
  ) {
    this.context = new FakeContext(features)
    this.state = new BlkState()
    this.state.capacity = capacity
    this.state.writeback = true
    this.data = {
      fd: 42,
      readOnly: false,
      unsafe: false,
      blockSize: 512,
      memoryAlign: 1,
      lengthAlign: 1,
      discard: true,
      serial: new TextEncoder().encode('serial-of-20-bytes!!'),
      state: this.state.buffer,
      ...data,
    }
    this.handler = create(this.context, this.data)
    const buffer = new ArrayBuffer(8 << 20)
    this.bytes = new Uint8Array(buffer)
    this.memory = new GuestMemory([{ gpa: 0, size: buffer.byteLength, hva: 1 << 30, buffer }])
  }

  get operations(): Operation[] {
    return this.context.io.operations
  }

  /** Room for `length` bytes at an address with `misalign` added to a page's. */
  place(length: number, misalign = 0): number {
    const gpa = this.#free + misalign
    this.#free = Math.ceil((gpa + length) / 4096) * 4096
    return gpa
  }

  /** A chain in flight from readable bytes and writable lengths, each a buffer of its own. */
  chain(readable: readonly Uint8Array[], writable: readonly number[], misalign = 0): Chain {
    const chain = new Chain(this.#head++)
    chain.begin(this.memory)
    for (const bytes of readable) {
      const gpa = this.place(bytes.length, misalign)
      this.bytes.set(bytes, gpa)
      chain.append(this.memory, gpa, bytes.length, false)
    }
    for (const length of writable) chain.append(this.memory, this.place(length, misalign), length, true)
    chain.inFlight = true
    this.bytes.fill(
      0xee,
      chain.offset[chain.readableCount] ?? 0,
      (chain.offset[chain.readableCount] ?? 0) + (writable[0] ?? 0)
    )
    return chain
  }

  handle(chain: Chain): Chain {
    this.handler.handle!(chain)
    return chain
  }

  /** Ends the oldest operation. @param result all of it when left out */
  end(result?: number): Operation {
    const operation = this.operations.shift()
    if (operation === undefined) throw new Error('no operation is under way')
    this.handler.completed!(operation.chain, result ?? operation.length)
    return operation
  }

  /** The status byte of a chain: its last writable one. */
  status(chain: Chain): number {
    const last = chain.count - 1
    return this.bytes[chain.offset[last]! + chain.length[last]! - 1]!
  }

  /** The writable part of a chain without the status. */
  writable(chain: Chain): Uint8Array {
    const all = new Uint8Array(chain.writable)
    let at = 0
    for (let i = chain.readableCount; i < chain.count; i++) {
      all.set(this.bytes.subarray(chain.offset[i]!, chain.offset[i]! + chain.length[i]!), at)
      at += chain.length[i]!
    }
    return all.subarray(0, -1)
  }
}

/** struct virtio_blk_req without data. */
export function header(type: number, sector: bigint | number = 0n): Uint8Array {
  const bytes = new Uint8Array(16)
  const view = new DataView(bytes.buffer)
  view.setUint32(0, type, true)
  view.setUint32(4, 0xdead_beef, true)
  view.setBigUint64(8, BigInt(sector), true)
  return bytes
}

/** struct virtio_blk_discard_write_zeroes. */
export function range(sector: bigint | number, sectors: number, flags = 0): Uint8Array {
  const bytes = new Uint8Array(16)
  const view = new DataView(bytes.buffer)
  view.setBigUint64(0, BigInt(sector), true)
  view.setUint32(8, sectors, true)
  view.setUint32(12, flags, true)
  return bytes
}

/**
 * The chains of one virtqueue as the driver keeps them for itself: their descriptors, which are free, which are with
 * the device, and in what order they went there. Nothing is ever read back from shared memory. Both drivers use it; it
 * must not know the format of a ring.
 */
import { VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE, VIRTQ_DESC_SIZE } from '../virtio/constants.ts'
import type { Segment, TableMemory, Translate } from './driver.ts'

/** What an indirect table looks like in a format. */
export interface TableFormat {
  write(table: TableMemory, segments: readonly Segment[]): void
  /** Bytes from the start of an entry to its u16 flags. */
  readonly flagsOffset: number
}

export class ChainStore {
  readonly size: number
  free: number
  // One entry per descriptor. A chain is named by its first one: its handle, and the buffer id of a packed ring.
  readonly low: Uint32Array
  readonly high: Uint32Array
  readonly length: Uint32Array
  /** NEXT, WRITE and INDIRECT. */
  readonly flags: Uint16Array
  readonly next: Uint16Array
  /** Descriptors of the chain that starts here; 0 = no chain. */
  readonly count: Uint16Array
  /** Bytes of the chain that starts here that the device may write. */
  readonly writable: Float64Array
  /** 1: the chain that starts here is with the device. */
  readonly flying: Uint8Array
  readonly #tables: (TableMemory | undefined)[]
  readonly #format: TableFormat
  readonly #translate: Translate | undefined
  #freeHead = 0

  constructor(size: number, format: TableFormat, translate: Translate | undefined) {
    this.size = size
    this.free = size
    this.#format = format
    this.#translate = translate
    this.low = new Uint32Array(size)
    this.high = new Uint32Array(size)
    this.length = new Uint32Array(size)
    this.flags = new Uint16Array(size)
    this.next = new Uint16Array(size)
    this.count = new Uint16Array(size)
    this.writable = new Float64Array(size)
    this.flying = new Uint8Array(size)
    this.#tables = new Array<TableMemory | undefined>(size).fill(undefined)
    this.reset()
  }

  /** Forgets every chain. */
  reset(): void {
    for (let i = 0; i < this.size; i++) this.next[i] = (i + 1) & 0xffff
    this.count.fill(0)
    this.flying.fill(0)
    this.#tables.fill(undefined)
    this.#freeHead = 0
    this.free = this.size
  }

  /** @returns the handle, or -1 when descriptors are short */
  build(given: readonly Segment[], table?: TableMemory): number {
    const need = table === undefined ? given.length : 1
    if (need === 0 || need > this.free) return -1
    const segments = this.#translate === undefined ? given : given.map((one) => this.#translated(one))
    const head = this.#freeHead
    if (table !== undefined) {
      this.#format.write(table, segments)
      const address = this.#translate?.(table.gpa) ?? table.gpa
      this.#describe(head, { address, length: segments.length * VIRTQ_DESC_SIZE }, VIRTQ_DESC_F_INDIRECT)
    }
    let last = head
    let index = table === undefined ? head : (this.next[head] as number)
    let writable = 0
    for (let i = 0; i < segments.length; i++) {
      const segment = segments[i] as Segment
      if (segment.writable) writable += segment.length
      if (table !== undefined) continue
      const more = i + 1 < segments.length ? VIRTQ_DESC_F_NEXT : 0
      this.#describe(index, segment, more | (segment.writable ? VIRTQ_DESC_F_WRITE : 0))
      last = index
      index = this.next[index] as number
    }
    this.#freeHead = index
    this.next[last] = 0
    this.free -= need
    this.count[head] = need
    this.writable[head] = writable
    this.#tables[head] = table
    return head
  }

  /** @returns the descriptor that was changed, or -1 when it was an entry of an indirect table */
  setWritable(chain: number, segment: number, writable: boolean): number {
    const set = (flags: number): number =>
      writable ? flags | VIRTQ_DESC_F_WRITE : flags & ~VIRTQ_DESC_F_WRITE & 0xffff
    const table = this.#tables[chain]
    let index = -1
    let before: number
    let length: number
    if (table !== undefined) {
      const view = new DataView(table.bytes.buffer, table.bytes.byteOffset, table.bytes.byteLength)
      const at = segment * VIRTQ_DESC_SIZE
      before = view.getUint16(at + this.#format.flagsOffset, true)
      length = view.getUint32(at + 8, true)
      view.setUint16(at + this.#format.flagsOffset, set(before), true)
    } else {
      index = chain
      for (let i = 0; i < segment; i++) index = this.next[index] as number
      before = this.flags[index] as number
      length = this.length[index] as number
      this.flags[index] = set(before)
    }
    const change = (writable ? 1 : 0) - ((before & VIRTQ_DESC_F_WRITE) !== 0 ? 1 : 0)
    this.writable[chain] = (this.writable[chain] as number) + change * length
    return index
  }

  /** Frees the descriptors of a chain that isn't with the device. */
  release(chain: number): void {
    const count = this.count[chain] as number
    if (count === 0) return
    let last = chain
    for (let i = 1; i < count; i++) last = this.next[last] as number
    this.next[last] = this.#freeHead
    this.#freeHead = chain
    this.free += count
    this.count[chain] = 0
    this.#tables[chain] = undefined
  }

  #describe(index: number, { address, length }: { address: number; length: number }, flags: number): void {
    this.low[index] = address % 0x1_0000_0000
    this.high[index] = Math.floor(address / 0x1_0000_0000)
    this.length[index] = length
    this.flags[index] = flags
  }

  #translated(segment: Segment): Segment {
    if (segment.untranslated === true || this.#translate === undefined) return segment
    return { ...segment, address: this.#translate(segment.address) }
  }
}

/** Chains in the order in which they were made available: what VIRTIO_F_IN_ORDER goes by. */
export class IssueOrder {
  readonly #chains: Uint16Array
  #first = 0
  count = 0

  constructor(size: number) {
    this.#chains = new Uint16Array(size)
  }

  clear(): void {
    this.#first = this.count = 0
  }

  push(chain: number): void {
    this.#chains[(this.#first + this.count) % this.#chains.length] = chain
    this.count++
  }

  /** The oldest one, taken out. */
  shift(): number {
    const chain = this.#chains[this.#first] as number
    this.#first = (this.#first + 1) % this.#chains.length
    this.count--
    return chain
  }

  /** The one with `index` others before it. */
  at(index: number): number {
    return this.#chains[(this.#first + index) % this.#chains.length] as number
  }

  /** How many were made available before `chain` and not used yet, -1: it isn't there. */
  before(chain: number): number {
    for (let i = 0; i < this.count; i++) if (this.at(i) === chain) return i
    return -1
  }
}

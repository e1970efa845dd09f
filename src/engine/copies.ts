/**
 * Copies between chains and buffers as pieces of addresses, run in one native call per batch. Here positions in a
 * guest's buffers become addresses.
 */
import type { Chain, CopyBatch, IoBuffer } from '../device/index.ts'
import { native, systemError } from '../native.ts'

/** Doubles per piece: destination, source, bytes. */
const PIECE = 3

export class PieceBatch implements CopyBatch {
  readonly #pieces: Float64Array
  readonly #run: () => void
  readonly #end: number
  #at = 1

  /** @param capacity pieces: one per pair of segments that overlap */
  constructor(capacity: number) {
    const copier = native.createCopier(capacity)
    if (typeof copier === 'number') throw systemError(copier, 'mmap', 'cannot allocate a list of copies')
    this.#pieces = new Float64Array(copier.pieces)
    this.#run = copier.run
    this.#end = 1 + capacity * PIECE
  }

  chainToChain(from: Chain, fromStart: number, to: Chain, toStart: number, length: number): void {
    // One piece, as small packets are.
    if (
      to.readableCount === 0 &&
      to.count > 0 &&
      from.readableCount > 0 &&
      fromStart + length <= from.length[0]! &&
      toStart + length <= to.length[0]!
    ) {
      // SAFETY: as in `address`.
      this.#add(to.first.hva + to.offset[0]! + toStart, from.first.hva + from.offset[0]! + fromStart, length)
      return
    }
    let source = 0
    let skip = fromStart
    while (source < from.readableCount && skip >= from.length[source]!) skip -= from.length[source++]!
    let target = to.readableCount
    let offset = toStart
    while (target < to.count && offset >= to.length[target]!) offset -= to.length[target++]!
    let left = length
    while (left > 0) {
      if (source >= from.readableCount || target >= to.count) throw outside(length)
      const sourceLength = from.length[source]!
      const targetLength = to.length[target]!
      const size = Math.min(left, sourceLength - skip, targetLength - offset)
      this.#add(address(to, target) + offset, address(from, source) + skip, size)
      left -= size
      skip += size
      offset += size
      if (skip === sourceLength) {
        source++
        skip = 0
      }
      if (offset === targetLength) {
        target++
        offset = 0
      }
    }
  }

  chainToBuffer(from: Chain, fromStart: number, to: IoBuffer, at: number, length: number): void {
    if (at + length > to.bytes.length) throw outside(length)
    let skip = fromStart
    let done = 0
    for (let segment = 0; segment < from.readableCount && done < length; segment++) {
      const room = from.length[segment]! - skip
      if (room <= 0) {
        skip = -room
        continue
      }
      const size = Math.min(room, length - done)
      this.#add(to.address + at + done, address(from, segment) + skip, size)
      done += size
      skip = 0
    }
    if (done < length) throw outside(length)
  }

  bufferToChain(from: IoBuffer, at: number, to: Chain, toStart: number, length: number): void {
    if (at + length > from.bytes.length) throw outside(length)
    let skip = toStart
    let done = 0
    for (let segment = to.readableCount; segment < to.count && done < length; segment++) {
      const room = to.length[segment]! - skip
      if (room <= 0) {
        skip = -room
        continue
      }
      const size = Math.min(room, length - done)
      this.#add(address(to, segment) + skip, from.address + at + done, size)
      done += size
      skip = 0
    }
    if (done < length) throw outside(length)
  }

  run(): void {
    if (this.#at === 1) return
    this.#pieces[0] = (this.#at - 1) / PIECE
    this.#at = 1
    this.#run()
  }

  #add(to: number, from: number, length: number): void {
    if (this.#at === this.#end) this.run()
    const at = this.#at
    const pieces = this.#pieces
    pieces[at] = to
    pieces[at + 1] = from
    pieces[at + 2] = length
    this.#at = at + PIECE
  }
}

/**
 * SAFETY: a segment lies inside a region that stays mapped while its chain is in flight, and the batch runs before that
 * ends.
 */
function address(chain: Chain, segment: number): number {
  return chain.regions[chain.region[segment]!]!.hva + chain.offset[segment]!
}

function outside(length: number): RangeError {
  return new RangeError(`a copy of ${length} bytes reaches beyond its chain or buffer`)
}

/**
 * Puts the buffers of one request into guest memory made for it alone, in as simple or as awkward a framing as a test
 * wants. A device must not care (virtio 1.3 §2.7.4.1), and those that do work for years with one driver.
 */
import type { Chain } from '../virtio/chain.ts'
import { GuestMemory } from '../virtio/memory.ts'
import { UNTOUCHED } from './reply.ts'

const PAGE = 4096

/** Where buffers begin when nothing awkward is wanted. */
const ALIGNMENT = 16

/**
 * Lengths of the pieces that an awkward driver cuts buffers into; the last one repeats. All odd: no field fits by luck.
 */
const ODD_LENGTHS = [1, 3, 5, 7, 13, 29, 61, 127, 255, 511, 1023, 2047, 4095]

interface Buffer {
  readonly length: number
  /** What the device reads; undefined: it may write here. */
  readonly bytes?: Uint8Array
}

interface PlacedBuffer extends Buffer {
  readonly gpa: number
}

/**
 * Makes `chain` one of these buffers.
 * @param split every buffer is cut into pieces of odd lengths at odd addresses in two regions, and one lies across both
 */
export function frame(chain: Chain, readable: readonly Uint8Array[], writableLength: number, split: boolean): void {
  const whole: Buffer[] = [
    ...readable.map((bytes) => ({ length: bytes.length, bytes })),
    ...(writableLength > 0 ? [{ length: writableLength }] : []),
  ]
  const buffers = split ? whole.flatMap(cut) : whole
  const { placed, memory } = split ? scatter(buffers) : line(buffers)
  chain.begin(memory)
  for (const { gpa, length, bytes } of placed) {
    write(memory, gpa, bytes ?? new Uint8Array(length).fill(UNTOUCHED))
    chain.append(memory, gpa, length, bytes === undefined)
  }
}

/** A copy of the device-writable part. */
export function writableBytes(chain: Chain): Uint8Array {
  const all = new Uint8Array(chain.writable)
  let at = 0
  for (let segment = chain.readableCount; segment < chain.count; segment++) {
    const start = chain.offset[segment]!
    const length = chain.length[segment]!
    all.set(chain.regions[chain.region[segment]!]!.bytes.subarray(start, start + length), at)
    at += length
  }
  return all
}

function cut(buffer: Buffer): Buffer[] {
  const pieces: Buffer[] = []
  for (let at = 0; at < buffer.length; ) {
    const odd = ODD_LENGTHS[Math.min(pieces.length, ODD_LENGTHS.length - 1)]!
    const length = Math.min(odd, buffer.length - at)
    pieces.push({ length, ...(buffer.bytes && { bytes: buffer.bytes.subarray(at, at + length) }) })
    at += length
  }
  return pieces
}

/** One behind the other, in one region. */
function line(buffers: readonly Buffer[]): { placed: PlacedBuffer[]; memory: GuestMemory } {
  let end = 0
  const placed = buffers.map((buffer) => {
    const gpa = end
    end += Math.ceil(buffer.length / ALIGNMENT) * ALIGNMENT
    return { ...buffer, gpa }
  })
  return { placed, memory: new GuestMemory([region(0, end)]) }
}

/** In turn into two regions that lie side by side, with one byte between any two; the longest one lies across both. */
function scatter(buffers: readonly Buffer[]): { placed: PlacedBuffer[]; memory: GuestMemory } {
  const longest = buffers.reduce((best, { length }, i) => (length > buffers[best]!.length ? i : best), 0)
  const total = buffers.reduce((sum, { length }) => sum + length + 1, 0)
  const border = pages(total + 2)
  const first = Math.ceil((buffers[longest]?.length ?? 0) / 2)
  let low = 1
  let high = border + (buffers[longest]?.length ?? 0) - first + 1
  const placed = buffers.map((buffer, i) => {
    if (i === longest) return { ...buffer, gpa: border - first }
    if (i % 2 === 0) {
      low += buffer.length + 1
      return { ...buffer, gpa: low - buffer.length - 1 }
    }
    high += buffer.length + 1
    return { ...buffer, gpa: high - buffer.length - 1 }
  })
  return { placed, memory: new GuestMemory([region(0, border), region(border, high - border)]) }
}

function region(gpa: number, length: number): { gpa: number; size: number; hva: number; buffer: SharedArrayBuffer } {
  const size = pages(length)
  // Nothing goes to the kernel by address here.
  return { gpa, size, hva: gpa, buffer: new SharedArrayBuffer(size) }
}

function pages(length: number): number {
  return Math.max(1, Math.ceil(length / PAGE)) * PAGE
}

function write(memory: GuestMemory, gpa: number, bytes: Uint8Array): void {
  for (let at = 0; at < bytes.length; ) {
    const place = memory.regions[memory.find(gpa + at)]!
    const take = Math.min(bytes.length - at, place.end - gpa - at)
    place.bytes.set(bytes.subarray(at, at + take), gpa + at - place.gpa)
    at += take
  }
}

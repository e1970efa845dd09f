/**
 * What a hostile driver puts into a ring and its buffers: requests and packets as they should be, and then with anything wrong
 * that can be. It writes bytes at offsets; it must not know sessions.
 */
import { udpFrame } from '../../src/frontend/net-frames.ts'
import type { Random } from './random.ts'
import { fillScsi, fillStatus, fillVsock } from './ring-requests.ts'

/** Bytes of guest memory that a ring has for itself, and where its parts are in them. */
export const RING_STRIDE = 32_768
const DRIVER = 4096
const DEVICE = 8192
/** Indirect tables: the last one begins before 16 × 200, and has 16 entries. */
export const TABLES = 12_288
export const TABLES_END = TABLES + 4096
const BUFFERS = 16_384
const BUFFER_BYTES = RING_STRIDE - BUFFERS
export const MAX_ENTRIES = 256
/** The memory: that of all rings at address 0, and a second region that touches it. */
export const RINGS = 16
export const FIRST_BYTES = RINGS * RING_STRIDE
export const SECOND_BYTES = 65_536

const NEXT = 1
const WRITE = 2
const INDIRECT = 4
const AVAIL = 0x80
const USED = 0x8000

/**
 * `command` and `task` are those of SCSI, `packet` is one of a vsock, `event` a small buffer for what comes in, `status`
 * what a guest says to its keyboard.
 */
export type Purpose = 'disk' | 'receive' | 'transmit' | 'control' | 'command' | 'task' | 'packet' | 'event' | 'status'

/** A ring that is about to be started. */
export interface RingPlan {
  readonly index: number
  readonly purpose: Purpose
  readonly size: number
  /** Guest-physical addresses of its parts; the memory begins at 0. */
  readonly descriptor: number
  readonly driver: number
  readonly device: number
  /** Where it starts, as SET_VRING_BASE says it. */
  readonly base: number
  /** Where the driver puts its next chain. Split: avail.idx. Packed: index and wrap counter (bit 15). */
  next: number
  /** Nothing was put into it yet. */
  fresh: boolean
}

export interface Format {
  readonly packed: boolean
  readonly eventIdx: boolean
}

const BORDERS = [0, FIRST_BYTES - 8, FIRST_BYTES + SECOND_BYTES - 8, 2 ** 32 - 4, 2 ** 40, 2 ** 63, 2 ** 53 - 512]

interface Piece {
  address: number
  length: number
  flags: number
}

/** Where ring `index` is, how large, and at which base it starts. */
export function planRing(random: Random, index: number, purpose: Purpose, { packed }: Format): RingPlan {
  const at = index * RING_STRIDE
  const size = packed && random.one(2) ? 1 + random.below(64) : 1 << random.below(random.one(8) ? 9 : 7)
  const position = (random.below(size) | (random.below(2) << 15)) >>> 0
  const base = packed ? ((position << 16) | position) >>> 0 : oddBase(random)
  const parts = { descriptor: at, driver: at + DRIVER, device: at + DEVICE }
  return { index, purpose, size, ...parts, base, next: base & 0xffff, fresh: true }
}

/** Often so that the index runs over. */
function oddBase(random: Random): number {
  return random.one(2) ? 65_535 - random.below(20) : random.below(65_536)
}

/** Offers chains: buffers, tables, descriptors, and what the driver says about them; also while the ring runs. */
export function fillRing(random: Random, view: DataView, plan: RingPlan, format: Format): void {
  // The last ones will do as well, with whatever was written into them.
  if (random.one(4)) fillBuffers(random, view, plan)
  if (format.packed) fillPacked(random, view, plan)
  else fillSplit(random, view, plan)
  plan.fresh = false
}

/** While it runs: one thing changes. */
export function disturb(random: Random, view: DataView, plan: RingPlan, format: Format): void {
  const at = plan.index * RING_STRIDE
  switch (random.below(5)) {
    case 0:
      // Any word of descriptors, tables or headers.
      view.setUint32(at + 4 * random.below(RING_STRIDE / 4), random.odd32() & 0xffff, true)
      break
    case 1:
      if (format.packed) view.setUint16(plan.descriptor + 16 * random.below(plan.size) + 14, random.next(), true)
      else view.setUint16(plan.driver + 2, view.getUint16(plan.driver + 2, true) + random.below(plan.size + 2), true)
      break
    case 2:
      view.setUint32(plan.driver + 4 * random.below(2), random.next(), true)
      break
    case 3:
      // The device's own: what it reads there once, at the start, is already read.
      view.setUint32(plan.device + 4 * random.below(3), random.next(), true)
      break
    default:
      fillBuffers(random, view, plan)
  }
}

// ---- rings

function fillSplit(random: Random, view: DataView, plan: RingPlan): void {
  const { size, descriptor, driver, device, index, purpose } = plan
  const heads: number[] = []
  let next = 0
  const chains = 1 + random.below(6)
  const victim = random.below(2 * chains)
  for (let chain = 0; chain < chains && next < size; chain++) {
    const pieces = makeChain(random, view, index, purpose, false, chain === victim).slice(0, size - next)
    heads.push(next)
    for (const [i, piece] of pieces.entries()) {
      const more = i + 1 < pieces.length && (piece.flags & INDIRECT) === 0
      writeDescriptor(view, descriptor + 16 * next, piece, (piece.flags & ~NEXT) | (more ? NEXT : 0), next + 1)
      next++
    }
  }
  if (random.one(12)) hurtDescriptor(random, view, descriptor + 16 * random.below(size), size)
  view.setUint16(driver, random.one(4) ? random.next() : 0, true)
  for (const [i, head] of heads.entries()) {
    const slot = driver + 4 + 2 * ((plan.next + i) & (size - 1))
    view.setUint16(slot, random.one(200) ? random.odd32() : random.one(100) ? random.below(size) : head, true)
  }
  // used_event, avail_event, and what the used ring had.
  view.setUint16(driver + 4 + 2 * size, random.one(2) ? random.next() : plan.next, true)
  view.setUint16(device + 4 + 8 * size, random.next(), true)
  view.setUint16(device, random.below(2), true)
  if (plan.fresh) view.setUint16(device + 2, random.one(8) ? random.next() : plan.next, true)
  const ahead = random.one(100) ? random.next() : random.one(50) ? random.below(size + 2) : heads.length
  plan.next = (plan.next + ahead) & 0xffff
  view.setUint16(driver + 2, plan.next, true)
}

function fillPacked(random: Random, view: DataView, plan: RingPlan): void {
  const { size, descriptor, driver, device, index, purpose } = plan
  let position = plan.next & 0x7fff
  let wrap = (plan.next >>> 15) & 1
  // As the last lap left it.
  for (let i = 0; i < size && plan.fresh; i++) {
    const lap = i >= position ? wrap ^ 1 : wrap
    view.setUint16(descriptor + 16 * i + 14, lap === 1 ? AVAIL | USED : 0, true)
  }
  let left = size
  const chains = 1 + random.below(6)
  const victim = random.below(2 * chains)
  for (let chain = 0; chain < chains && left > 0; chain++) {
    const id = random.one(200) ? random.odd32() & 0xffff : random.one(100) ? 0 : position
    const pieces = makeChain(random, view, index, purpose, true, chain === victim).slice(0, left)
    for (const [i, piece] of pieces.entries()) {
      const more = i + 1 < pieces.length && (piece.flags & INDIRECT) === 0
      const owner = random.one(300) ? random.next() & (AVAIL | USED) : wrap === 1 ? AVAIL : USED
      writeDescriptor(view, descriptor + 16 * position, piece, id, (piece.flags & ~NEXT) | (more ? NEXT : 0) | owner)
      left--
      if (++position === size) {
        position = 0
        wrap ^= 1
      }
    }
  }
  plan.next = position | (wrap << 15)
  if (random.one(12)) {
    const at = descriptor + 16 * random.below(size)
    if (random.one(2)) view.setUint16(at + 14, random.next(), true)
    else view.setUint32(at + 4 * random.below(3), random.odd32() & 0xfffff, true)
  }
  view.setUint32(driver, random.one(2) ? random.next() & 0x3ffff : 0, true)
  view.setUint32(device, random.next(), true)
}

/** The last two u16: flags and next in split rings and tables, id and flags in packed ones. */
function writeDescriptor(view: DataView, at: number, { address, length }: Piece, third: number, fourth: number): void {
  view.setUint32(at, address % 2 ** 32, true)
  view.setUint32(at + 4, Math.floor(address / 2 ** 32), true)
  view.setUint32(at + 8, length, true)
  view.setUint16(at + 12, third, true)
  view.setUint16(at + 14, fourth, true)
}

function hurtDescriptor(random: Random, view: DataView, at: number, size: number): void {
  switch (random.below(5)) {
    case 0:
      view.setUint32(at, random.odd32(), true)
      break
    case 1:
      // Never the page that nobody may write to: its high word is 7.
      view.setUint32(at + 4, random.pick([0, 0, 1, 6, 8, 0xffff_ffff]), true)
      break
    case 2:
      view.setUint32(at + 8, random.one(2) ? random.odd32() : random.below(9000), true)
      break
    case 3:
      view.setUint16(at + 12, random.one(4) ? random.next() : random.below(8), true)
      break
    default:
      view.setUint16(at + 14, random.one(4) ? random.odd32() : random.below(size + 1), true)
  }
}

// ---- chains

/** @param hurt something about it shall be wrong */
function makeChain(
  random: Random,
  view: DataView,
  index: number,
  purpose: Purpose,
  packed: boolean,
  hurt: boolean
): Piece[] {
  const pieces = purposeful(random, index, purpose)
  if (hurt) for (let i = 1 + random.below(2); i > 0; i--) hurtPiece(random, random.pick(pieces))
  if (!random.one(3)) return pieces
  // In a table, behind some descriptors of the ring itself in split rings.
  const slot = random.below(200)
  const table = index * RING_STRIDE + TABLES + 16 * slot
  // To the end of what tables are in: what is behind it is a device's to write.
  const rest = TABLES_END - TABLES - 16 * slot
  const direct = packed || random.one(2) ? 0 : random.below(pieces.length)
  const inside = pieces.slice(direct).slice(0, 16)
  for (const [i, piece] of inside.entries()) {
    const flags = (piece.flags & ~NEXT) | (i + 1 < inside.length ? NEXT : 0)
    if (packed) writeDescriptor(view, table + 16 * i, piece, 0, flags)
    else writeDescriptor(view, table + 16 * i, piece, flags, hurt && random.one(4) ? random.odd32() : i + 1)
  }
  const entry: Piece = { address: table, length: 16 * inside.length, flags: INDIRECT }
  if (hurt && random.one(4)) entry.address += random.pick([4, 8, 1, 2 ** 31, -16])
  if (hurt && random.one(4)) entry.length = random.pick([0, 8, 16, 24, 32, rest, 0xffff_fff0, 16 * 32_769])
  if (hurt && random.one(4)) entry.flags |= random.pick([WRITE, NEXT, WRITE | NEXT])
  if (entry.address < 0) entry.address = table
  return [...pieces.slice(0, direct), entry]
}

function purposeful(random: Random, index: number, purpose: Purpose): Piece[] {
  const start = index * RING_STRIDE + BUFFERS
  const header = start + 64 * random.below(16)
  const place = (length: number): number => start + 2048 + random.below(Math.max(1, BUFFER_BYTES - 2048 - length))
  const piece = (length: number, flags: number, address = place(length)): Piece => ({ address, length, flags })
  switch (purpose) {
    case 'disk': {
      const data = Array.from({ length: random.below(4) }, () =>
        piece(512 * (1 + random.below(6)), random.one(2) ? WRITE : 0)
      )
      data.sort((a, b) => a.flags - b.flags)
      return [piece(16, 0, header), ...data, piece(1, WRITE)]
    }
    case 'receive':
      return Array.from({ length: 1 + random.below(3) }, () => piece(random.pick([12, 60, 1526, 2048, 4096]), WRITE))
    case 'transmit':
      return random.one(2)
        ? [piece(12 + random.below(1600), 0, header)]
        : [
            piece(random.pick([10, 12, 5]), 0, header),
            piece(random.below(1600), 0, header + 12),
            piece(random.below(9000), 0),
          ]
    case 'control':
      return [piece(2, 0, header), piece(random.below(80), 0, header + 2), piece(1, WRITE)]
    case 'command': {
      const data = random.below(3) * random.pick([36, 252, 512, 4096])
      const write = random.one(3)
      return [
        piece(51, 0, header),
        ...(write && data > 0 ? [piece(data, 0)] : []),
        piece(108, WRITE),
        ...(!write && data > 0 ? [piece(data, WRITE)] : []),
      ]
    }
    case 'task':
      return [piece(random.one(3) ? 20 : 24, 0, header), piece(random.pick([1, 5, 5, 12]), WRITE)]
    case 'packet':
      // Behind a header is the place's own text, see fillVsock.
      return random.one(3) ? [piece(44, 0, header), piece(20, 0, header + 44)] : [piece(64, 0, header)]
    case 'event':
      return [piece(random.one(8) ? random.below(12) : 8, WRITE)]
    case 'status':
      return [piece(8, 0, header)]
  }
}

function hurtPiece(random: Random, piece: Piece): void {
  switch (random.below(6)) {
    case 0:
      piece.flags ^= WRITE
      break
    case 1:
      piece.length = random.one(2) ? random.odd32() : random.below(70_000)
      break
    case 2:
      // Into another ring, over the end of a region, into nothing, beyond 2^53.
      piece.address = random.pick(BORDERS)
      break
    case 3:
      piece.address = RING_STRIDE * random.below(16) + random.below(RING_STRIDE)
      break
    case 4:
      piece.length = 0
      break
    default:
      piece.flags = random.below(8)
  }
}

// ---- buffers

const FRAMES = [0, 1, 2].map((seed) =>
  udpFrame({
    source: Uint8Array.of(0x52, 0x54, 0, 0x66, 0, 1),
    destination: seed === 0 ? new Uint8Array(6).fill(255) : Uint8Array.of(0x52, 0x54, 0, 0x66, 0, 2),
    size: 60 + 500 * seed,
  })
)

/** Headers of requests, packets and commands at each of 16 places. */
function fillBuffers(random: Random, view: DataView, { index, purpose }: RingPlan): void {
  const start = index * RING_STRIDE + BUFFERS
  for (let i = 0; i < 16; i++) {
    const at = start + 64 * i
    if (purpose === 'command' || purpose === 'task') fillScsi(random, view, at, purpose)
    else if (purpose === 'packet') fillVsock(random, view, at)
    else if (purpose === 'status') fillStatus(random, view, at)
    else if (purpose === 'disk') {
      view.setUint32(at, random.one(12) ? random.next() : random.pick([0, 0, 1, 1, 4, 8, 11, 13]), true)
      view.setUint32(at + 4, 0, true)
      view.setUint32(at + 8, random.one(8) ? random.odd32() : random.below(8192), true)
      view.setUint32(at + 12, random.one(12) ? random.odd32() : 0, true)
      // A range of DISCARD or WRITE_ZEROES.
      view.setBigUint64(at + 16, BigInt(random.one(6) ? random.odd32() : random.below(8192)), true)
      view.setUint32(at + 24, random.one(6) ? random.odd32() : random.below(64), true)
      view.setUint32(at + 28, random.below(4), true)
    } else if (purpose === 'control') {
      view.setUint16(at, random.one(4) ? random.next() : random.below(6) | (random.below(4) << 8), true)
      for (let word = 2; word < 40; word += 4) view.setUint32(at + word, random.odd32(), true)
    } else fillPacket(random, view, at)
  }
}

function fillPacket(random: Random, view: DataView, at: number): void {
  view.setUint8(at, random.below(4))
  view.setUint8(at + 1, random.one(2) ? 0 : random.one(12) ? random.next() : random.pick([1, 3, 4, 5, 0x81, 0x84]))
  for (const [field, usual] of [
    [2, 54],
    [4, 100],
    [6, 34],
    [8, 6],
    [10, 1],
  ] as const) {
    view.setUint16(at + field, random.one(3) ? random.odd32() : usual, true)
  }
  // Only the first 52 bytes of it: the next place begins there, and its bytes go on as the frame's.
  const frame = random.pick(FRAMES)
  for (let i = 0; i < Math.min(52, frame.length); i++) view.setUint8(at + 12 + i, frame[i] ?? 0)
  if (random.one(2)) view.setUint8(at + 12 + random.below(52), random.next())
  // TCP in place of UDP; IPv6 in place of IPv4.
  if (random.one(3)) view.setUint8(at + 12 + 23, random.pick([6, 17, 1, 0]))
  if (random.one(6)) view.setUint16(at + 12 + 12, random.pick([0xdd86, 0x0008, 0x0081, 0xa888]), true)
}

/**
 * A request laid out in guest memory by hand, with untouched bytes around it, and the ways in which a request may be
 * cut into descriptors. For cases that write descriptors themselves. It must not know the ring's format.
 */
import type { BlkRequest, Framing } from '../blk.ts'
import { STATUS_UNTOUCHED } from '../blk.ts'
import type { Segment } from '../driver.ts'
import type { GuestBuffer } from '../memory.ts'
import { sleepMs } from '../virtqueue.ts'
import { expect, Violation } from './case.ts'
import type { Context } from './context.ts'
import type { Guest, Ring } from './guest.ts'
import type { Operation } from './operation.ts'

/** Descriptors of a request that is not cut further: one to read from, one for data, one for the status. */
export function chainLength({ readable, writable }: Operation): number {
  return (readable.length > 0 ? 1 : 0) + (writable > 1 ? 2 : writable)
}

/** How many descriptors a device is expected to take per request at least; SEG_MAX of most disks is 126. */
const MANY = 32

/** Ways to cut a request, with names. Sums are kept: readable and writable bytes stay what they are. */
export function framings(context: Context): (readonly [string, Framing])[] {
  const { readable, writable } = context.operation()
  const all: [string, Framing][] = [
    ['one descriptor per direction', cuts([readable.length], writable > 0 ? [writable] : [])],
  ]
  all.push(['a descriptor per byte at the start', cuts(bytesFirst(readable.length, 10), lastByte(writable))])
  all.push(['the header cut in half', cuts(halves(readable.length), lastByte(writable))])
  if (writable > 0) {
    all.push(['the status behind its data in one descriptor', cuts([readable.length], [writable])])
    all.push(['data cut anywhere', cuts([readable.length], [1, 2, 500 % writable, writable - 3 - (500 % writable)])])
    const pieces = Math.floor((writable - 1) / MANY)
    const even = [...new Array<number>(MANY - 1).fill(pieces), writable - 1 - pieces * (MANY - 1), 1]
    all.push([`data in ${MANY} descriptors`, cuts([readable.length], even)])
  } else {
    const pieces = Math.max(1, Math.floor(readable.length / 16))
    const even = [...new Array<number>(15).fill(pieces), readable.length - pieces * 15]
    all.push(['16 descriptors', cuts(even, [])])
  }
  return all
}

function cuts(readable: readonly number[], writable: readonly number[]): Framing {
  return { readable: readable.filter((length) => length > 0), writable: writable.filter((length) => length > 0) }
}

function bytesFirst(length: number, count: number): number[] {
  return [...new Array<number>(count).fill(1), length - count]
}

function halves(length: number): number[] {
  return [Math.floor(length / 2), length - Math.floor(length / 2)]
}

function lastByte(writable: number): number[] {
  return writable > 1 ? [writable - 1, 1] : []
}

/** Bytes around each buffer that nobody may touch. */
const MARGIN = 64
const CANARY = 0x5c

export interface GuestRequest {
  /** Readable and writable, as few as possible. */
  readonly segments: readonly Segment[]
  /** Memory for an indirect table. */
  readonly table: GuestBuffer
  readonly operation: Operation
  readonly readable: GuestBuffer
  readonly writable: GuestBuffer | undefined
  /** The same in several pieces: header in two, data in two, status. */
  pieces(): Segment[]
  /** Before it is used again. */
  reset(): void
  /** Waits for the next used buffer and checks the result. @throws Violation */
  expectDone(ring: Ring, what: string): void
  expectReadableUntouched(): void
  expectSurroundingsUntouched(): void
}

/** Lays the operation of the context out in guest memory. */
export function placed(context: Context, guest: Guest): GuestRequest {
  const { memory, session } = guest
  const operation = context.operation(session.features)
  const space = (length: number): { inner: GuestBuffer; outer: GuestBuffer } => {
    const outer = memory.allocate(length + 2 * MARGIN, 64)
    outer.bytes.fill(CANARY)
    const inner = {
      gpa: outer.gpa + MARGIN,
      length,
      region: outer.region,
      offset: outer.offset + MARGIN,
      bytes: outer.bytes.subarray(MARGIN, MARGIN + length),
    }
    return { inner, outer }
  }
  const read = space(operation.readable.length)
  const write = operation.writable > 0 ? space(operation.writable) : undefined
  const reset = (): void => {
    read.inner.bytes.set(operation.readable)
    write?.inner.bytes.fill(STATUS_UNTOUCHED)
  }
  reset()
  const part = (buffer: GuestBuffer, from: number, to: number, writable: boolean): Segment => ({
    address: buffer.gpa + from,
    length: to - from,
    writable,
  })
  const whole = (buffer: GuestBuffer | undefined, writable: boolean): Segment[] =>
    buffer === undefined ? [] : [part(buffer, 0, buffer.length, writable)]
  return {
    operation,
    readable: read.inner,
    writable: write?.inner,
    table: memory.allocate(65536, 16),
    segments: [...whole(read.inner, false), ...whole(write?.inner, true)],
    pieces: () => {
      const { length } = read.inner
      const out = [part(read.inner, 0, 5, false), part(read.inner, 5, length, false)]
      if (write === undefined) return out
      const end = write.inner.length
      return [
        ...out,
        part(write.inner, 0, 100, true),
        part(write.inner, 100, end - 1, true),
        part(write.inner, end - 1, end, true),
      ]
    },
    reset,
    expectDone: (ring, what) => {
      const { driver } = ring.queue
      const deadline = performance.now() + context.timeoutMs
      while (!driver.hasUsed()) {
        if (performance.now() > deadline) throw new Violation(`${what} completes`, `nothing in ${context.timeoutMs} ms`)
        if (guest.connection.channel.hungUp()) throw new Violation(`${what} completes`, 'the connection ended')
        sleepMs(0.2)
      }
      driver.pop()
      const { written } = driver
      const bytes = write?.inner.bytes.slice() ?? new Uint8Array(0)
      const done: BlkRequest = {
        type: 0,
        done: true,
        written,
        status: bytes.at(-1) ?? STATUS_UNTOUCHED,
        data: bytes.subarray(0, Math.max(0, bytes.length - 1)),
      }
      operation.check(done, what)
    },
    expectReadableUntouched: () => {
      expect(
        Buffer.compare(read.inner.bytes, operation.readable) === 0,
        'device-readable bytes as they were',
        'they changed'
      )
    },
    expectSurroundingsUntouched: () => {
      for (const [name, buffers] of [
        ['readable', read],
        ['writable', write],
      ] as const) {
        if (buffers === undefined) continue
        const { outer } = buffers
        const around = [...outer.bytes.subarray(0, MARGIN), ...outer.bytes.subarray(outer.length - MARGIN)]
        const ok = around.every((byte) => byte === CANARY)
        expect(ok, `${MARGIN} bytes before and behind the ${name} buffer as they were`, 'they changed')
      }
    },
  }
}

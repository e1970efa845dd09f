/** IoRing and Io on the kernel's io_uring and on its emulation: the same tests for both. */
import { closeSync, ftruncateSync, mkdtempSync, openSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, afterEach, beforeEach, describe, expect, test } from 'vitest'
import { Io } from '../../src/engine/io.ts'
import {
  type CompletionSink,
  IORING_CQE_F_MORE,
  IoRing,
  MAX_VECTORS,
  WRITE_BUFFERED,
  WRITE_DSYNC,
  WRITE_PLAIN,
} from '../../src/engine/ring.ts'
import { native } from '../../src/native.ts'
import { Chain } from '../../src/virtio/chain.ts'
import { GuestMemory } from '../../src/virtio/memory.ts'
import { allocate, check, hasUring } from './harness.ts'

const dir = mkdtempSync(join(tmpdir(), 'virtiod-ring-'))
afterAll(() => rmSync(dir, { recursive: true, force: true }))

interface Completion {
  readonly low: number
  readonly high: number
  readonly result: number
  readonly flags: number
}

class Sink implements CompletionSink {
  readonly seen: Completion[] = []
  completion(low: number, high: number, result: number, flags: number): void {
    this.seen.push({ low, high, result, flags })
  }
}

describe.each([
  ['io_uring', false],
  ['the emulation', true],
])('%s', (_, emulate) => {
  const it = test.skipIf(!emulate && !hasUring)
  let ring: IoRing
  let sink: Sink
  let fds: number[]
  beforeEach(() => {
    if (!emulate && !hasUring) return
    ring = new IoRing(emulate)
    sink = new Sink()
    fds = []
  })
  afterEach(() => {
    if (!emulate && !hasUring) return
    ring.close()
    for (const fd of fds) closeSync(fd)
  })
  const own = (fd: number): number => {
    fds.push(check(fd, 'fd'))
    return fd
  }

  it('a copy that faults is known before anything of its batch is reported', () => {
    // What completes first may go on at once, and must not be copied into a mapping that reads as zeroes by then.
    const path = join(dir, 'cut')
    writeFileSync(path, Buffer.alloc(8192, 1))
    const fd = own(openSync(path, 'r+'))
    const mapping = native.mapFile(fd, 0, 8192, 0, 8192, true)
    if (typeof mapping === 'number') throw new Error(`mapFile: ${mapping}`)
    const memory = allocate(8192)
    ftruncateSync(fd, 4096)
    const faults: number[] = []
    const results: number[] = []
    ring.write(fd, -1, 0, memory.address, 100, WRITE_BUFFERED, 1, 1)
    ring.copy(false, mapping.address, memory.address, 100, 2, 1)
    ring.copy(true, mapping.address + 4096, memory.address, 100, 3, 1)
    ring.copy(true, mapping.address, memory.address, 100, 4, 1)
    ring.submit(0, -1)
    ring.reap({
      completion: (_low, _high, result) => {
        results.push(result)
        faults.push(ring.copyFaults)
      },
    })
    expect(results).toEqual([100, 100, -11, -11])
    expect(faults).toEqual([1, 1, 1, 1])
    native.release(mapping.address)
  })
  const file = (name: string, content: Uint8Array | string = ''): { path: string; fd: number } => {
    const path = join(dir, `${name}-${emulate}`)
    writeFileSync(path, content)
    return { path, fd: own(openSync(path, 'r+')) }
  }
  /** Submits and reaps until nothing but `left` operations is in flight. */
  const finish = (left = 0): void => {
    while (ring.inFlight > left) {
      ring.submit(1, 10_000_000)
      ring.reap(sink)
    }
  }

  it('starts with nothing in flight', () => {
    expect([ring.emulated, ring.inFlight, ring.pending]).toEqual([emulate, 0, 0])
    expect(ring.hasCompletions()).toBe(false)
    expect(ring.reap(sink)).toBe(0)
    ring.submit(0, -1)
    expect(sink.seen).toEqual([])
  })

  it('a read, a write and their user data come back', () => {
    const { fd, path } = file('rw', 'hello, ring')
    const { address, buffer } = allocate(4096)
    ring.read(fd, -1, 7, address, 100, 0xffff_ffff, 0x8000_0001)
    expect([ring.inFlight, ring.pending]).toEqual([1, 1])
    finish()
    expect(ring.pending).toBe(0)
    expect(sink.seen).toEqual([{ low: 0xffff_ffff, high: 0x8000_0001, result: 4, flags: 0 }])
    expect(Buffer.from(buffer).toString('utf8', 0, 4)).toBe('ring')
    ring.write(fd, -1, 2, address, 4, WRITE_DSYNC, 1, 2)
    finish()
    expect(sink.seen[1]).toEqual({ low: 1, high: 2, result: 4, flags: 0 })
    expect(readFileSync(path, 'utf8')).toBe('hering ring')
  })

  it('an offset beyond 4 GiB', () => {
    const { fd, path } = file('far')
    const { address, buffer } = allocate(4096)
    new Uint8Array(buffer).fill(7, 0, 8)
    const offset = 5 * 2 ** 32 + 3
    ring.write(fd, -1, offset, address, 8, WRITE_PLAIN, 0, 0)
    finish()
    expect(statSync(path).size).toBe(offset + 8)
    ring.read(fd, -1, offset, address + 8, 8, 0, 0)
    finish()
    expect([...new Uint8Array(buffer, 8, 8)]).toEqual([7, 7, 7, 7, 7, 7, 7, 7])
  })

  it('offset -1 is the position of the file, as for a call fd', () => {
    const { fd, path } = file('position')
    const { address } = allocate(4096)
    ring.write(fd, -1, -1, address, 8, WRITE_PLAIN, 0, 0)
    finish()
    expect(sink.seen[0]!.result).toBe(8)
    expect(statSync(path).size).toBe(8)
  })

  it.each([
    ['plain', WRITE_PLAIN],
    ['durable', WRITE_DSYNC],
    ['buffered', WRITE_BUFFERED],
  ])('writes that are %s, more in one batch than go directly, with single buffers and vectors', (_, kind) => {
    const { fd, path } = file('kinds')
    const { address, buffer } = allocate(4096)
    const bytes = new Uint8Array(buffer)
    for (let i = 0; i < 4096; i++) bytes[i] = (i * 5 + 1) & 0xff
    const expected = Buffer.alloc(3000 * 3)
    for (let i = 0; i < 3000; i++) {
      if (i % 2 === 0) ring.write(fd, -1, i * 3, address + i, 3, kind, i, 6)
      else {
        ring.beginVectors(2)
        ring.vector(address + i, 1)
        ring.vector(address + i + 1, 2)
        ring.writeVector(fd, -1, i * 3, 2, kind, i, 6)
      }
      expected.set(bytes.subarray(i, i + 3), i * 3)
    }
    expect(ring.inFlight).toBe(3000)
    finish()
    expect([ring.inFlight, ring.pending]).toEqual([0, 0])
    expect(new Set(sink.seen.map(({ low }) => low)).size).toBe(3000)
    expect(sink.seen.every(({ result, high }) => result === 3 && high === 6)).toBe(true)
    expect(Buffer.compare(readFileSync(path), expected)).toBe(0)
  })

  it('buffered writes that each end in another one', () => {
    const { fd, path } = file('writes-again')
    const { address, buffer } = allocate(4096)
    new Uint8Array(buffer).fill(0x41)
    let ended = 0
    const again: CompletionSink = {
      completion(low, high, result): void {
        expect(result).toBe(1)
        if (high < 5) ring.write(fd, -1, low * 6 + high + 1, address, 1, WRITE_BUFFERED, low, high + 1)
        else ended++
      },
    }
    for (let i = 0; i < 1000; i++) ring.write(fd, -1, i * 6, address, 1, WRITE_BUFFERED, i, 0)
    while (ring.inFlight > 0) {
      ring.submit(1, 10_000_000)
      ring.reap(again)
    }
    expect(ended).toBe(1000)
    expect(readFileSync(path, 'latin1')).toBe('A'.repeat(6000))
  })

  it('a buffered write that fails, or is short, says so', () => {
    const { address } = allocate(4096)
    const readOnly = own(openSync('/dev/null', 'r'))
    ring.write(readOnly, -1, 0, address, 8, WRITE_BUFFERED, 1, 0xffff_ffff)
    ring.write(9999, -1, 0, address, 8, WRITE_BUFFERED, 2, 0)
    ring.write(readOnly, -1, 0, 4096, 8, WRITE_BUFFERED, 0xffff_ffff, 3)
    finish()
    expect(sink.seen).toEqual([
      { low: 1, high: 0xffff_ffff, result: -9, flags: 0 },
      { low: 2, high: 0, result: -9, flags: 0 },
      { low: 0xffff_ffff, high: 3, result: -9, flags: 0 },
    ])
  })

  it('a wait with buffered writes in it comes back with their results', () => {
    const { fd } = file('wait')
    const { address } = allocate(4096)
    ring.pollAdd(own(native.eventfd(0)), 1, 1)
    ring.write(fd, -1, 0, address, 8, WRITE_BUFFERED, 2, 2)
    // Without end: nothing else would ever complete.
    ring.submit(1, -1)
    expect(ring.reap(sink)).toBe(1)
    expect(sink.seen).toEqual([{ low: 2, high: 2, result: 8, flags: 0 }])
  })

  it('a wait does not sleep over buffered writes that a full submission ring ran before', () => {
    const { fd } = file('ran-before')
    const { address } = allocate(4096)
    const quiet = own(native.eventfd(0))
    ring.write(fd, -1, 0, address, 8, WRITE_BUFFERED, 2, 2)
    // One more than the submission ring holds, and none of them ever completes.
    for (let i = 0; i < 1025; i++) ring.pollAdd(quiet, 1, 1)
    expect(ring.hasCompletions()).toBe(true)
    const start = performance.now()
    ring.submit(1, 3_000_000)
    // Not a measurement: it either comes back or sleeps the three seconds.
    expect(performance.now() - start).toBeLessThan(2000)
    expect(ring.reap(sink)).toBe(1)
    expect(sink.seen).toEqual([{ low: 2, high: 2, result: 8, flags: 0 }])
  })

  it('errors are -errno', () => {
    const { address } = allocate(4096)
    const readOnly = own(openSync('/dev/null', 'r'))
    ring.read(9999, -1, 0, address, 8, 1, 0)
    ring.write(readOnly, -1, 0, address, 8, WRITE_PLAIN, 2, 0)
    ring.fallocate(own(check(native.eventfd(0), 'eventfd')), -1, 0, 0, 4096, 3, 0)
    finish()
    expect(sink.seen.map(({ low, result }) => [low, result]).sort()).toEqual([
      [1, -9],
      [2, -9],
      [3, expect.any(Number)],
    ])
    expect(sink.seen.every(({ result }) => result < 0)).toBe(true)
  })

  it('fdatasync and fallocate', () => {
    const { fd, path } = file('allocate', 'x'.repeat(8192))
    ring.fdatasync(fd, -1, 1, 0)
    ring.fallocate(fd, -1, 1 | 2, 4096, 4096, 2, 0)
    ring.fallocate(fd, -1, 0, 2 ** 32 - 4096, 8192, 3, 0)
    finish()
    expect(sink.seen.map(({ result }) => result)).toEqual([0, 0, 0])
    expect(statSync(path).size).toBe(2 ** 32 + 4096)
    ftruncateSync(fd, 8192)
    expect(readFileSync(path).indexOf(0)).toBe(4096)
  })

  it('more entries than the submission ring holds, in one batch', () => {
    const { fd } = file(
      'batch',
      Uint8Array.from({ length: 4096 }, (_, i) => i & 0xff)
    )
    const { address, buffer } = allocate(8192)
    const count = 5000
    for (let i = 0; i < count; i++) ring.read(fd, -1, i & 4095, address + i, 1, i, 5)
    finish()
    expect(sink.seen.length).toBe(count)
    expect(new Set(sink.seen.map(({ low }) => low)).size).toBe(count)
    expect(sink.seen.every(({ result, high }) => result === 1 && high === 5)).toBe(true)
    expect(new Uint8Array(buffer).subarray(0, count).every((byte, i) => byte === (i & 4095 & 0xff))).toBe(true)
  })

  it('all that may be in flight at once, several times over', () => {
    const { fd } = file('capacity', 'x')
    const { address } = allocate(4096)
    for (let round = 0; round < 3; round++) {
      for (let i = 0; i < ring.capacity; i++) ring.read(fd, -1, 0, address, 1, i, round)
      expect(ring.inFlight).toBe(ring.capacity)
      finish()
    }
    expect(sink.seen.length).toBe(3 * ring.capacity)
    expect(ring.inFlight).toBe(0)
  })

  it('completions that submit again, with all in flight that may be', () => {
    const { fd } = file('again', 'x')
    const { address } = allocate(4096)
    let ended = 0
    const again: CompletionSink = {
      completion(low, high, result): void {
        expect(result).toBe(1)
        if (high === 0) ring.read(fd, -1, 0, address, 1, low, 1)
        else ended++
      },
    }
    for (let i = 0; i < ring.capacity; i++) ring.read(fd, -1, 0, address, 1, i, 0)
    while (ring.inFlight > 0) {
      ring.submit(1, 10_000_000)
      ring.reap(again)
    }
    expect(ended).toBe(ring.capacity)
  })

  it('vectors, also when they wrap their space many times in one batch', () => {
    const { fd } = file(
      'vectors',
      Uint8Array.from({ length: 2048 }, (_, i) => (i * 7) & 0xff)
    )
    const { address, buffer } = allocate(65536)
    const bytes = new Uint8Array(buffer)
    // 100 × 700 vectors are four times the space.
    for (let i = 0; i < 100; i++) {
      ring.beginVectors(700)
      for (let v = 0; v < 700; v++) ring.vector(address + ((v * 83 + i) % 60000), 1)
      ring.readVector(fd, -1, i, 700, i, 0)
    }
    finish()
    expect(sink.seen.every(({ result }) => result === 700)).toBe(true)
    // The last of them decides nothing about the first: repeat one alone and compare.
    bytes.fill(0)
    ring.beginVectors(3)
    for (const [offset, length] of [
      [100, 5],
      [50, 1],
      [200, 10],
    ] as const) {
      ring.vector(address + offset, length)
    }
    ring.readVector(fd, -1, 4, 3, 0, 0)
    finish()
    const expected = new Uint8Array(65536)
    const content = Uint8Array.from({ length: 16 }, (_, i) => ((i + 4) * 7) & 0xff)
    expected.set(content.subarray(0, 5), 100)
    expected.set(content.subarray(5, 6), 50)
    expected.set(content.subarray(6, 16), 200)
    expect(Buffer.compare(bytes, expected)).toBe(0)
    ring.beginVectors(2)
    ring.vector(address + 100, 2)
    ring.vector(address + 200, 3)
    ring.writeVector(fd, -1, 2000, 2, WRITE_DSYNC, 9, 9)
    finish()
    expect(sink.seen.at(-1)).toEqual({ low: 9, high: 9, result: 5, flags: 0 })
    const back = allocate(4096)
    ring.read(fd, -1, 2000, back.address, 5, 0, 0)
    finish()
    expect([...new Uint8Array(back.buffer, 0, 5)]).toEqual([...content.subarray(0, 2), ...content.subarray(6, 9)])
  })

  it('vectors stay with their entry when the submission ring is full between them', () => {
    const { fd } = file('full', 'abcd')
    const { address, buffer } = allocate(4096)
    for (let filled = 1020; filled <= 1026; filled++) {
      new Uint8Array(buffer).fill(0)
      for (let i = 0; i < filled; i++) ring.fdatasync(fd, -1, 0, 0)
      ring.beginVectors(2)
      ring.vector(address, 1)
      ring.vector(address + 10, 3)
      ring.readVector(fd, -1, 0, 2, 77, filled)
      // Another one at once: it must not take the first one's place.
      ring.beginVectors(2)
      ring.vector(address + 100, 2)
      ring.vector(address + 200, 2)
      ring.readVector(fd, -1, 0, 2, 78, filled)
      finish()
      const text = Buffer.from(buffer).toString('latin1')
      expect([text[0], text.slice(10, 13), text.slice(100, 102), text.slice(200, 202)]).toEqual([
        'a',
        'bcd',
        'ab',
        'cd',
      ])
    }
  })

  it('a poll reports each write to an eventfd until it is removed', () => {
    const fd = own(native.eventfd(0))
    ring.pollAdd(fd, 11, 22)
    ring.submit(0, -1)
    for (let i = 0; i < 3; i++) {
      native.eventfdWrite(fd, 1)
      ring.submit(1, 10_000_000)
      expect(ring.reap(sink)).toBe(1)
    }
    expect(sink.seen.map(({ low, high, result }) => [low, high, result & 1])).toEqual([
      [11, 22, 1],
      [11, 22, 1],
      [11, 22, 1],
    ])
    expect(sink.seen.every(({ flags }) => (flags & IORING_CQE_F_MORE) !== 0)).toBe(true)
    expect(ring.inFlight).toBe(1)
    ring.cancel(11, 22, 33, 44)
    finish()
    expect(ring.inFlight).toBe(0)
    expect(sink.seen.slice(3).map(({ low, result }) => [low, result])).toEqual(
      expect.arrayContaining([
        [33, 0],
        [11, -125],
      ])
    )
    native.eventfdWrite(fd, 1)
    ring.submit(1, 1000)
    expect(ring.reap(sink)).toBe(0)
  })

  it('removing a poll that is not there is an error of the removal', () => {
    ring.cancel(1, 2, 3, 4)
    finish()
    expect(sink.seen).toEqual([{ low: 3, high: 4, result: -2, flags: 0 }])
  })

  it('polling a closed fd ends with an error', () => {
    ring.pollAdd(9999, 1, 1)
    finish()
    expect(sink.seen).toEqual([{ low: 1, high: 1, result: -9, flags: 0 }])
  })

  it('a wait ends with its timeout, and entries were taken nevertheless', () => {
    const fd = own(native.eventfd(0))
    ring.pollAdd(fd, 1, 1)
    ring.submit(1, 1000)
    expect([ring.pending, ring.inFlight]).toEqual([0, 1])
    expect(ring.reap(sink)).toBe(0)
    native.eventfdWrite(fd, 1)
    ring.submit(1, 10_000_000)
    expect(ring.reap(sink)).toBe(1)
  })

  it('files have slots on io_uring, counted, and none in the emulation', () => {
    const { fd } = file('slots', 'abc')
    const { address, buffer } = allocate(4096)
    const slot = ring.openFile(fd)
    expect(ring.openFile(fd)).toBe(slot)
    if (emulate) expect(slot).toBe(-1)
    else expect(slot).toBeGreaterThanOrEqual(0)
    ring.read(fd, slot, 1, address, 2, 0, 0)
    finish()
    expect(Buffer.from(buffer).toString('utf8', 0, 2)).toBe('bc')
    ring.closeFile(fd)
    ring.read(fd, slot, 0, address, 3, 0, 0)
    finish()
    expect(sink.seen[1]!.result).toBe(3)
    ring.closeFile(fd)
    ring.closeFile(fd)
    ring.closeFile(12345)
    if (!emulate) {
      ring.read(fd, slot, 0, address, 3, 0, 0)
      finish()
      expect(sink.seen[2]!.result).toBe(-9)
      expect(ring.openFile(fd)).toBe(slot)
    }
  })

  it('more files than slots: the rest goes by fd', () => {
    const { address } = allocate(4096)
    const { path } = file('many', 'z')
    const opened = Array.from({ length: 70 }, () => own(openSync(path, 'r')))
    const slots = opened.map((fd) => ring.openFile(fd))
    const used = slots.filter((slot) => slot >= 0)
    expect(used.length).toBe(emulate ? 0 : 64)
    expect(new Set(used).size).toBe(used.length)
    opened.forEach((fd, i) => {
      ring.read(fd, slots[i]!, 0, address, 1, i, 0)
    })
    finish()
    expect(sink.seen.every(({ result }) => result === 1)).toBe(true)
    // A freed slot goes to the next file.
    ring.closeFile(opened[10]!)
    const again = ring.openFile(opened[69]!)
    expect(again).toBe(slots[10])
  })

  describe('Io', () => {
    const setup = (readable: readonly number[], writable: readonly number[], length = 1 << 20) => {
      const { address, buffer } = allocate(length)
      const memory = new GuestMemory([{ gpa: 2 ** 33, size: length, hva: address, buffer }])
      const chain = new Chain(7)
      chain.begin(memory)
      // Each buffer in 512 bytes of its own, so that none is next to another.
      let gpa = 2 ** 33
      const place = (bytes: number, write: boolean) => {
        chain.append(memory, gpa, bytes, write)
        gpa += Math.max(512, bytes)
      }
      for (const bytes of readable) place(bytes, false)
      for (const bytes of writable) place(bytes, true)
      const io = new Io({ ring, serving: true, stir: () => {} }, 4095, 0, { watch: () => {}, unwatch: () => {} })
      return { chain, io, bytes: new Uint8Array(buffer), memory }
    }
    const content = Uint8Array.from({ length: 4096 }, (_, i) => (i * 11 + 3) & 0xff)

    it.each([
      ['one segment', [100], 0, 100],
      ['a part of one segment', [100], 20, 30],
      ['several segments', [10, 20, 30], 0, 60],
      ['from within the second into the third', [10, 20, 30], 15, 40],
      ['exactly the second', [10, 20, 30], 10, 20],
      ['the last byte', [10, 20, 30], 59, 1],
    ])('reads into %s of the writable part', (_, cut, start, length) => {
      const { fd } = file('io-read', content)
      const { chain, io, bytes } = setup([16], cut)
      const opened = io.openFile(fd)
      io.read(chain, opened, 100, start, length)
      expect(io.outstanding).toBe(1)
      finish()
      expect(sink.seen).toEqual([{ low: ((4095 << 16) | 7) >>> 0, high: 0, result: length, flags: 0 }])
      const expected = new Uint8Array(bytes.length)
      let position = 0
      for (const [i, size] of cut.entries()) {
        for (let at = 0; at < size; at++, position++) {
          if (position >= start && position < start + length)
            expected[512 * (i + 1) + at] = content[100 + position - start]!
        }
      }
      expect(Buffer.compare(bytes, expected)).toBe(0)
      io.closeFile(opened)
    })

    it.each([
      ['one segment', [16, 100], 16, 100],
      ['the header’s segment', [200], 16, 100],
      ['several segments', [16, 5, 6, 7], 16, 18],
      ['from within one into another', [16, 5, 6, 7], 18, 10],
    ])('writes %s of the readable part', (_, cut, start, length) => {
      const { fd, path } = file('io-write')
      const { chain, io, bytes } = setup(cut, [10])
      let value = 1
      const parts: number[] = []
      for (const [i, size] of cut.entries()) {
        for (let at = 0; at < size; at++) {
          bytes[512 * i + at] = value
          parts.push(value)
          value = (value * 5 + 1) & 0xff
        }
      }
      io.write(chain, io.openFile(fd), 3, start, length, true)
      finish()
      expect(sink.seen[0]!.result).toBe(length)
      expect([...readFileSync(path)]).toEqual([0, 0, 0, ...parts.slice(start, start + length)])
    })

    it('moves IOV_MAX segments at once, and the rest when it is asked again', () => {
      const count = MAX_VECTORS + 100
      const big = Uint8Array.from({ length: 2 * count }, (_, i) => (i * 13) & 0xff)
      const { fd, path } = file('iov-max', big)
      const { chain, io, bytes } = setup(
        [],
        Array.from({ length: count }, () => 2)
      )
      const opened = io.openFile(fd)
      io.read(chain, opened, 0, 0, 2 * count)
      finish()
      expect(sink.seen[0]!.result).toBe(2 * MAX_VECTORS)
      io.read(chain, opened, 2 * MAX_VECTORS, 2 * MAX_VECTORS, 200)
      finish()
      expect(sink.seen[1]!.result).toBe(200)
      for (let i = 0; i < count; i++) expect([bytes[512 * i], bytes[512 * i + 1]]).toEqual([big[2 * i], big[2 * i + 1]])
      const writing = setup(
        Array.from({ length: count }, () => 2),
        []
      )
      writing.bytes.set(bytes)
      ftruncateSync(fd, 0)
      writing.io.write(writing.chain, opened, 0, 0, 2 * count, false)
      finish()
      expect(sink.seen[2]!.result).toBe(2 * MAX_VECTORS)
      writing.io.write(writing.chain, opened, 2 * MAX_VECTORS, 2 * MAX_VECTORS, 200, false)
      finish()
      expect(Buffer.compare(readFileSync(path), big)).toBe(0)
    })

    it.each([
      ['read', 0, 61],
      ['read', 60, 1],
      ['read', 61, 1],
      ['write', 0, 17],
      ['write', 16, 1],
    ] as const)('a %s of [%d, +%d) beyond the chain throws and submits nothing', (kind, start, length) => {
      const { chain, io } = setup([16], [10, 20, 30])
      const { fd } = file('beyond', content)
      const opened = io.openFile(fd)
      expect(() =>
        kind === 'read' ? io.read(chain, opened, 0, start, length) : io.write(chain, opened, 0, start, length, false)
      ).toThrow(RangeError)
      expect([ring.pending, ring.inFlight, io.outstanding]).toEqual([0, 0, 0])
    })

    it('buffers of its own, and none of their outside', () => {
      const { fd, path } = file('buffers', content)
      const { chain, io } = setup([16], [10])
      const opened = io.openFile(fd)
      const buffer = io.allocate(8192)
      expect(buffer.address % 4096).toBe(0)
      expect(buffer.bytes.every((byte) => byte === 0)).toBe(true)
      io.readBuffer(chain, opened, 5, buffer, 8092, 100)
      finish()
      expect(buffer.bytes.subarray(8092)).toEqual(content.subarray(5, 105))
      io.writeBuffer(chain, opened, 0, buffer, 8092, 100, false)
      finish()
      expect(readFileSync(path).subarray(0, 100)).toEqual(Buffer.from(content.subarray(5, 105)))
      for (const [start, length] of [
        [8093, 100],
        [-1, 1],
        [0, 8193],
        [0, -1],
        [8193, 0],
      ] as const) {
        expect(() => io.readBuffer(chain, opened, 0, buffer, start, length)).toThrow(RangeError)
        expect(() => io.writeBuffer(chain, opened, 0, buffer, start, length, false)).toThrow(RangeError)
      }
      expect(ring.inFlight).toBe(0)
    })
  })
})

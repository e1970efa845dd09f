import {
  closeSync,
  fstatSync,
  ftruncateSync,
  mkdtempSync,
  openSync,
  readFileSync,
  readSync,
  rmSync,
  writeSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, afterEach, beforeEach, describe, expect, it } from 'vitest'
import { native } from '../../src/native.ts'
import {
  allocated,
  EAGAIN,
  EBADF,
  ECANCELED,
  EINVAL,
  ENOENT,
  EOPNOTSUPP,
  ETIME,
  F_MORE,
  fdOf,
  haveUring,
  OP,
  openFds,
  POLLIN,
  runChild,
  SQE_FIXED_FILE,
  SQE_LINK,
  SQE_SKIP_SUCCESS,
  TestRing,
  until,
} from './support.ts'

// Made at first use and kept: the fds of a test are counted.
native.faultEventFd()

const EFAULT = 14

const directory = mkdtempSync(join(tmpdir(), 'virtiod-ring-'))
afterAll(() => rmSync(directory, { recursive: true, force: true }))

describe.each([
  { kind: 'io_uring', emulate: false },
  { kind: 'emulation', emulate: true },
])('$kind', ({ emulate }) => {
  describe.skipIf(!emulate && !haveUring)('ring', () => {
    let ring: TestRing
    let fd: number
    let before: string[]
    const memory = allocated(65_536)
    const bytes = new Uint8Array(memory.buffer)
    const words = new DataView(memory.buffer)
    const DATASYNC = 1
    const MULTI = 1

    /** Two iovecs at 32 KiB of the buffer: `a` bytes from 0 and `b` bytes from 4096. */
    function vectors(a: number, b: number): { address: number; length: number } {
      words.setBigUint64(32_768, BigInt(memory.address), true)
      words.setBigUint64(32_776, BigInt(a), true)
      words.setBigUint64(32_784, BigInt(memory.address + 4096), true)
      words.setBigUint64(32_792, BigInt(b), true)
      return { address: memory.address + 32_768, length: 2 }
    }
    const poll = (on: number, data: number, multishot: boolean) =>
      ({ op: OP.POLL_ADD, data, fd: on, length: multishot ? MULTI : 0, extra: POLLIN }) as const

    beforeEach(() => {
      before = openFds()
      bytes.fill(0)
      fd = openSync(join(directory, 'disk'), 'w+')
      ring = new TestRing(emulate)
    })
    afterEach(() => {
      ring.close()
      closeSync(fd)
      expect(openFds()).toEqual(before)
    })

    it('runs direct writes in the same call, in their range only, and leaves each its result', () => {
      bytes.set([1, 2, 3, 4], 0)
      bytes.set([5, 6], 4096)
      const entries = new DataView(ring.native.direct)
      const put = (i: number, op: number, on: number, offset: number, address: number, length: number): void => {
        entries.setUint32(i * 64, op, true)
        entries.setInt32(i * 64 + 4, on, true)
        entries.setBigUint64(i * 64 + 8, BigInt(offset), true)
        entries.setBigUint64(i * 64 + 16, BigInt(address), true)
        entries.setUint32(i * 64 + 24, length, true)
      }
      const { address, length } = vectors(4, 2)
      put(0, OP.WRITE, fd, 0, memory.address, 4)
      put(1, OP.WRITE, fd, 8, memory.address, 4)
      put(2, OP.WRITEV, fd, 100, address, length)
      put(3, OP.WRITE, 9999, 0, memory.address, 4)
      const control = new Int32Array(ring.native.control)
      control.set([0, 1, 1, -1, 1, 3])
      // It has completions to show, so it does not wait for the one that min_complete asks for.
      expect(ring.native.enter()).toBe(0)
      expect([1, 2, 3].map((i) => entries.getInt32(i * 64 + 60, true))).toEqual([4, 6, -EBADF])
      const file = readFileSync(join(directory, 'disk'))
      expect(file.length).toBe(106)
      expect([...file.subarray(0, 12)]).toEqual([0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4])
      expect([...file.subarray(100)]).toEqual([1, 2, 3, 4, 5, 6])
      control.set([0, 0, 1, -1, 256, 9])
      expect(ring.native.enter()).toBe(0)
    })

    it('copies out of a mapping, and tells when the guard had to step in', () => {
      const file = native.memfd('image', 16_384, 0)
      const mapping = native.mapFile(file, 0, 16_384, 0, 16_384, true)
      if (typeof mapping === 'number') throw new Error(`mapFile: ${mapping}`)
      new Uint8Array(mapping.buffer).set([7, 8, 9, 10], 4096)
      const entries = new DataView(ring.native.direct)
      const put = (i: number, op: number, source: number, address: number, length: number): void => {
        entries.setUint32(i * 64, op, true)
        entries.setBigUint64(i * 64 + 8, BigInt(source), true)
        entries.setBigUint64(i * 64 + 16, BigInt(address), true)
        entries.setUint32(i * 64 + 24, length, true)
      }
      const results = (count: number) => Array.from({ length: count }, (_, i) => entries.getInt32(i * 64 + 60, true))
      const { address, length } = vectors(2, 2)
      put(0, OP.READ, mapping.address + 4096, memory.address + 100, 4)
      put(1, OP.READV, mapping.address + 4096, address, length)
      const control = new Int32Array(ring.native.control)
      control.set([0, 0, 0, -1, 0, 2])
      expect(ring.native.enter()).toBe(0)
      expect(results(2)).toEqual([4, 4])
      expect([...bytes.subarray(100, 104)]).toEqual([7, 8, 9, 10])
      expect([...bytes.subarray(0, 2), ...bytes.subarray(4096, 4098)]).toEqual([7, 8, 9, 10])
      // And into it: a write without an fd.
      bytes.set([1, 2, 3], 200)
      put(0, OP.WRITE, mapping.address + 8190, memory.address + 200, 3)
      entries.setInt32(4, -1, true)
      control.set([0, 0, 0, -1, 0, 1])
      expect(ring.native.enter()).toBe(0)
      expect(results(1)).toEqual([3])
      const back = Buffer.alloc(4)
      readSync(file, back, 0, 4, 8189)
      expect([...back]).toEqual([0, 1, 2, 3])
      // The first copy is from what is left; what the guard put under the second must not pass for the file's contents.
      ftruncateSync(file, 4096)
      put(0, OP.READ, mapping.address, memory.address, 4)
      put(1, OP.READ, mapping.address + 8192, memory.address, 4)
      put(2, OP.READ, mapping.address, memory.address, 4)
      control.set([0, 0, 0, -1, 0, 3])
      expect(ring.native.enter()).toBe(0)
      expect(results(3)).toEqual([4, -EFAULT, -EAGAIN])
      expect(native.faults(mapping.address)).toBe(1)
      native.release(mapping.address)
      native.eventfdRead(native.faultEventFd())
      native.close(file)
    })

    it('describes itself', () => {
      const it = ring.native
      expect(it.fd).toBeGreaterThan(2)
      expect(it.sqEntries).toBe(8)
      expect(it.cqEntries).toBe(16)
      expect(it.sqes.byteLength).toBe(8 * 64)
      expect(it.control.byteLength).toBe(28)
      expect([...new Int32Array(it.control)]).toEqual([0, 0, 0, -1, 0, 0, 0])
      expect(it.rings.byteLength).toBeGreaterThanOrEqual(it.cqes + 16 * 16)
      for (const offset of [it.sqHead, it.sqTail, it.sqFlags, it.cqHead, it.cqTail, it.cqOverflow]) {
        expect(offset % 4).toBe(0)
        expect(new Int32Array(it.rings)[offset / 4]).toBe(0)
      }
      expect(it.setupFlags === 0).toBe(emulate)
    })

    it('rounds sizes up and lifts a completion queue that is too small', () => {
      const other = new TestRing(emulate, 9, 3)
      expect(other.native.sqEntries).toBe(16)
      expect(other.native.cqEntries).toBe(16)
      other.close()
      expect(native.ringSetup(65_536, 65_536, emulate)).toBe(-EINVAL)
    })

    it('does nothing', () => {
      expect(ring.one({ op: OP.NOP, data: 0x1f_ffff_ffff_ffff })).toEqual({
        data: 0x1f_ffff_ffff_ffff,
        result: 0,
        flags: 0,
      })
      expect(ring.enter(0, 0)).toBe(0)
      expect(ring.enter(0, 0, -1, 0)).toBe(0)
    })

    it('writes and reads', () => {
      bytes.set([1, 2, 3, 4])
      expect(ring.one({ op: OP.WRITE, data: 1, fd, offset: 100, address: memory.address, length: 4 }).result).toBe(4)
      const read = { op: OP.READ, data: 2, fd, offset: 102, address: memory.address + 8, length: 4 }
      expect(ring.one(read)).toEqual({ data: 2, result: 2, flags: 0 })
      expect([...bytes.subarray(8, 12)]).toEqual([3, 4, 0, 0])
      expect(ring.one({ ...read, offset: 5000 }).result).toBe(0)
    })

    it('writes and reads vectors', () => {
      bytes.fill(1, 0, 10)
      bytes.fill(2, 4096, 4116)
      expect(ring.one({ op: OP.WRITEV, data: 1, fd, offset: 0, ...vectors(10, 20) }).result).toBe(30)
      expect(fstatSync(fd).size).toBe(30)
      bytes.fill(0)
      expect(ring.one({ op: OP.READV, data: 1, fd, offset: 5, ...vectors(10, 20) }).result).toBe(25)
      expect([...bytes.subarray(0, 10)]).toEqual([1, 1, 1, 1, 1, 2, 2, 2, 2, 2])
      expect(bytes[4096 + 14]).toBe(2)
      expect(bytes[4096 + 15]).toBe(0)
    })

    it('uses and moves the current position for offset -1', () => {
      writeSync(fd, 'abcdef', 0)
      const at = { fd, offset: -1, address: memory.address, length: 2 }
      bytes.set([65, 66])
      expect(ring.one({ op: OP.WRITE, data: 1, ...at }).result).toBe(2)
      expect(ring.one({ op: OP.READ, data: 1, ...at }).result).toBe(2)
      expect(String.fromCharCode(...bytes.subarray(0, 2))).toBe('cd')
    })

    it('honours RWF_DSYNC and refuses flags that do not exist', () => {
      const write = { op: OP.WRITE, data: 1, fd, address: memory.address, length: 512 }
      expect(ring.one({ ...write, extra: 2 }).result).toBe(512)
      expect([-EOPNOTSUPP, -EINVAL]).toContain(ring.one({ ...write, extra: 0x4000_0000 }).result)
    })

    it('syncs', () => {
      expect(ring.one({ op: OP.FSYNC, data: 1, fd }).result).toBe(0)
      expect(ring.one({ op: OP.FSYNC, data: 1, fd, extra: DATASYNC }).result).toBe(0)
      expect(ring.one({ op: OP.FSYNC, data: 1, fd, extra: 8 }).result).toBe(-EINVAL)
      expect(ring.one({ op: OP.FSYNC, data: 1, fd: 99_999 }).result).toBe(-EBADF)
    })

    it('allocates: offset, length in the address, mode in the length', () => {
      expect(ring.one({ op: OP.FALLOCATE, data: 1, fd, offset: 4096, address: 8192, length: 0 }).result).toBe(0)
      expect(fstatSync(fd).size).toBe(12_288)
      expect(ring.one({ op: OP.FALLOCATE, data: 1, fd, offset: 0, address: 0, length: 0 }).result).toBe(-EINVAL)
    })

    it('reports errors as completions', () => {
      const read = { op: OP.READ, data: 1, fd, address: memory.address, length: 4 }
      writeSync(fd, 'abcdef', 0)
      expect(ring.one({ ...read, fd: 99_999 }).result).toBe(-EBADF)
      expect(ring.one({ ...read, address: 4096 }).result).toBe(-14)
      expect(ring.one({ ...read, op: 255 as never }).result).toBe(-EINVAL)
      expect(ring.one({ op: OP.READV, data: 1, fd, address: 4096, length: 1 }).result).toBe(-14)
    })

    it('reads and writes eventfds, whatever the offset', () => {
      const event = fdOf(native.eventfd(0), 'eventfd')
      words.setBigUint64(0, 5n, true)
      for (const offset of [-1, 0]) {
        expect(ring.one({ op: OP.WRITE, data: 1, fd: event, offset, address: memory.address, length: 8 }).result).toBe(
          8
        )
        expect(
          ring.one({ op: OP.READ, data: 1, fd: event, offset, address: memory.address + 8, length: 8 }).result
        ).toBe(8)
        expect(words.getBigUint64(8, true)).toBe(5n)
        // The kernel's ring waits for the next write instead, also with O_NONBLOCK; the emulation cannot.
        const empty = { op: OP.READ, data: 1, fd: event, offset, address: memory.address, length: 8 }
        if (emulate) expect(ring.one(empty).result).toBe(-EAGAIN)
      }
      native.close(event)
    })

    it('completes a batch in order and carries the user data', () => {
      const found = ring.run(...Array.from({ length: 8 }, (_, i) => ({ op: OP.NOP, data: i + 1 })))
      expect(found.map((c) => c.data)).toEqual([1, 2, 3, 4, 5, 6, 7, 8])
      expect(ring.queued).toBe(0)
    })

    it('wraps around', () => {
      for (let i = 0; i < 100; i++) {
        expect(
          ring
            .run({ op: OP.NOP, data: i }, { op: OP.NOP, data: i + 1000 }, { op: OP.NOP, data: i + 2000 })
            .map((c) => c.data)
        ).toEqual([i, i + 1000, i + 2000])
      }
    })

    it('consumes no more than it is told to and no more than there is', () => {
      for (let i = 0; i < 4; i++) ring.push({ op: OP.NOP, data: i })
      expect(ring.enter(3, 3)).toBe(3)
      expect(ring.enter(100, 0)).toBe(1)
      expect(ring.reap()).toHaveLength(4)
    })

    it('skips the completion of a success, not of an error or a short read', () => {
      writeSync(fd, 'abcdef', 0)
      const read = { op: OP.READ, flags: SQE_SKIP_SUCCESS, fd, address: memory.address }
      ring.push({ ...read, data: 1, length: 4 })
      ring.push({ ...read, data: 2, length: 4, fd: 99_999 })
      ring.push({ ...read, data: 3, length: 10 })
      ring.push({ op: OP.NOP, data: 4 })
      expect(ring.enter(4, 3)).toBe(4)
      expect(ring.reap().map((c) => [c.data, c.result])).toEqual([
        [2, -EBADF],
        [3, 6],
        [4, 0],
      ])
    })

    it('cancels the rest of a chain behind a failure', () => {
      const found = ring.run(
        { op: OP.NOP, data: 1, flags: SQE_LINK },
        { op: OP.FSYNC, data: 2, fd: 99_999, flags: SQE_LINK },
        { op: OP.NOP, data: 3, flags: SQE_LINK },
        { op: OP.NOP, data: 4 },
        { op: OP.NOP, data: 5 }
      )
      expect(found.map((c) => [c.data, c.result]).sort()).toEqual([
        [1, 0],
        [2, -EBADF],
        [3, -ECANCELED],
        [4, -ECANCELED],
        [5, 0],
      ])
    })

    it('waits for the timeout and no longer', () => {
      const start = performance.now()
      expect(ring.enter(0, 1, 30_000)).toBe(-ETIME)
      const took = performance.now() - start
      expect(took).toBeGreaterThanOrEqual(29)
      expect(took).toBeLessThan(2000)
      expect(ring.enter(0, 1, 0)).toBe(0)
      ring.push({ op: OP.NOP, data: 1 })
      expect(ring.enter(1, 2, 1000)).toBe(1)
      expect(ring.enter(0, 1, -1)).toBe(0)
      const again = performance.now()
      expect(ring.enter(0, 2, 20_000)).toBe(0) // one is there: that hides the timeout
      expect(performance.now() - again).toBeGreaterThanOrEqual(19)
      expect(ring.reap()).toHaveLength(1)
      expect(ring.enter(0, 2, 1000)).toBe(-ETIME)
    })

    it('polls an eventfd again and again', () => {
      const event = fdOf(native.eventfd(0), 'eventfd')
      ring.push(poll(event, 7, true))
      expect(ring.enter(1, 1, 0)).toBe(1)
      expect(ring.reap()).toEqual([])
      for (let i = 0; i < 20; i++) {
        native.eventfdWrite(event, 1)
        expect(ring.enter(0, 1)).toBe(0)
        expect(ring.reap()).toEqual([{ data: 7, result: POLLIN, flags: F_MORE }])
        if (i % 2 === 0) native.eventfdRead(event)
        expect(ring.enter(0, 0)).toBe(0)
        expect(ring.reap()).toEqual([])
      }
      native.close(event)
    })

    it('reports at once what was ready before the poll', () => {
      const event = fdOf(native.eventfd(1), 'eventfd')
      ring.push(poll(event, 7, true))
      expect(ring.enter(1, 1)).toBe(1)
      expect(ring.reap()).toEqual([{ data: 7, result: POLLIN, flags: F_MORE }])
      native.close(event)
    })

    it('polls once', () => {
      const event = fdOf(native.eventfd(0), 'eventfd')
      ring.push(poll(event, 7, false))
      expect(ring.enter(1, 0)).toBe(1)
      native.eventfdWrite(event, 1)
      expect(ring.enter(0, 1)).toBe(0)
      expect(ring.reap()).toEqual([{ data: 7, result: POLLIN, flags: 0 }])
      native.eventfdWrite(event, 1)
      expect(ring.enter(0, 1, 5000)).toBe(-ETIME)
      native.close(event)
    })

    it('takes several polls of one fd', () => {
      const event = fdOf(native.eventfd(0), 'eventfd')
      ring.push(poll(event, 1, true))
      ring.push(poll(event, 2, true))
      ring.push(poll(event, 3, false))
      expect(ring.enter(3, 0)).toBe(3)
      native.eventfdWrite(event, 1)
      expect(ring.enter(0, 3)).toBe(0)
      expect(
        ring
          .reap()
          .map((c) => c.data)
          .sort()
      ).toEqual([1, 2, 3])
      native.eventfdWrite(event, 1)
      expect(ring.enter(0, 2)).toBe(0)
      expect(
        ring
          .reap()
          .map((c) => c.data)
          .sort()
      ).toEqual([1, 2])
      native.close(event)
    })

    it('removes a poll: the poll completes with -ECANCELED, the removal with 0', () => {
      const event = fdOf(native.eventfd(0), 'eventfd')
      ring.push(poll(event, 7, true))
      ring.push(poll(event, 8, true))
      expect(ring.enter(2, 0)).toBe(2)
      ring.push({ op: OP.POLL_REMOVE, data: 9, fd: -1, address: 7 })
      expect(ring.enter(1, 2)).toBe(1)
      expect(
        ring
          .reap()
          .map((c) => [c.data, c.result, c.flags])
          .sort()
      ).toEqual([
        [7, -ECANCELED, 0],
        [9, 0, 0],
      ])
      native.eventfdWrite(event, 1)
      expect(ring.enter(0, 1)).toBe(0)
      expect(ring.reap()).toEqual([{ data: 8, result: POLLIN, flags: F_MORE }])
      expect(ring.one({ op: OP.POLL_REMOVE, data: 9, fd: -1, address: 7 }).result).toBe(-ENOENT)
      native.close(event)
    })

    it('cancels by user data and all at once', () => {
      const event = fdOf(native.eventfd(0), 'eventfd')
      for (const data of [1, 2, 3]) ring.push(poll(event, data, true))
      expect(ring.enter(3, 0)).toBe(3)
      ring.push({ op: OP.ASYNC_CANCEL, data: 9, address: 2 })
      expect(ring.enter(1, 2)).toBe(1)
      expect(
        ring
          .reap()
          .map((c) => [c.data, c.result])
          .sort()
      ).toEqual([
        [2, -ECANCELED],
        [9, 0],
      ])
      ring.push({ op: OP.ASYNC_CANCEL, data: 9, extra: 4 })
      expect(ring.enter(1, 3)).toBe(1)
      expect(
        ring
          .reap()
          .map((c) => [c.data, c.result])
          .sort()
      ).toEqual([
        [1, -ECANCELED],
        [3, -ECANCELED],
        [9, 2],
      ])
      expect(ring.one({ op: OP.ASYNC_CANCEL, data: 9, address: 2 }).result).toBe(-ENOENT)
      native.close(event)
    })

    it('keeps a poll when its fd is closed, as the file itself', () => {
      const event = fdOf(native.eventfd(0), 'eventfd')
      const copy = fdOf(native.dup(event), 'dup')
      ring.push(poll(event, 7, true))
      expect(ring.enter(1, 0)).toBe(1)
      native.close(event)
      native.eventfdWrite(copy, 1)
      expect(ring.enter(0, 1)).toBe(0)
      expect(ring.reap()).toHaveLength(1)
      native.close(copy)
    })

    it('completes the poll of a regular file and refuses that of no file', () => {
      expect(ring.one(poll(fd, 7, false))).toEqual({ data: 7, result: POLLIN, flags: 0 })
      expect(ring.one(poll(99_999, 7, true)).result).toBe(-EBADF)
    })

    it('has an fd that becomes readable with a completion', () => {
      const event = fdOf(native.eventfd(0), 'eventfd')
      ring.push(poll(event, 7, true))
      expect(ring.enter(1, 0)).toBe(1)
      expect(native.pollIn(ring.native.fd, 0)).toBe(0)
      native.eventfdWrite(event, 1)
      expect(native.pollIn(ring.native.fd, 1000)).toBe(1)
      expect(ring.enter(0, 0)).toBe(0)
      expect(ring.reap()).toHaveLength(1)
      native.close(event)
    })

    it('loses no completion when the queue is full', () => {
      const seen: number[] = []
      let pushed = 0
      for (let round = 0; round < 12; round++) {
        while (ring.queued < 8) ring.push({ op: OP.NOP, data: pushed++ })
        ring.enter(8, 0, -1)
        // Without reaping until the queue must have overflowed.
        if (round % 4 === 3) seen.push(...ring.reap().map((c) => c.data))
      }
      for (let round = 0; round < 10; round++) {
        ring.enter(ring.queued, 0, -1)
        seen.push(...ring.reap().map((c) => c.data))
      }
      expect(seen).toEqual(Array.from({ length: pushed }, (_, i) => i))
    })

    it('loses no event when the queue is full', () => {
      const event = fdOf(native.eventfd(0), 'eventfd')
      ring.push(poll(event, 99, false))
      expect(ring.enter(1, 0)).toBe(1)
      for (let round = 0; round < 2; round++) {
        for (let i = 0; i < 8; i++) ring.push({ op: OP.NOP, data: i })
        expect(ring.enter(8, 0)).toBe(8)
      }
      native.eventfdWrite(event, 1)
      ring.enter(0, 16)
      expect(ring.reap()).toHaveLength(16)
      expect(ring.enter(0, 1)).toBe(0)
      expect(ring.reap()).toEqual([{ data: 99, result: POLLIN, flags: 0 }])
      native.close(event)
    })

    it('registers files', () => {
      if (emulate) {
        expect(ring.native.registerFile(0, fd)).toBe(-EOPNOTSUPP)
        expect(ring.one({ op: OP.FSYNC, data: 1, fd: 0, flags: SQE_FIXED_FILE }).result).toBe(-EBADF)
        return
      }
      expect(ring.native.registerFile(63, fd)).toBe(0)
      expect(ring.native.registerFile(64, fd)).toBe(-EINVAL)
      expect(ring.native.registerFile(0, 99_999)).toBe(-EBADF)
      const fixed = { op: OP.WRITE, data: 1, fd: 63, flags: SQE_FIXED_FILE, address: memory.address, length: 4 }
      expect(ring.one(fixed).result).toBe(4)
      expect(ring.native.registerFile(63, -1)).toBe(0)
      expect(ring.one(fixed).result).toBe(-EBADF)
    })

    it('stays harmless after close', () => {
      const { rings, sqes, control, enter } = ring.native
      const event = fdOf(native.eventfd(0), 'eventfd')
      ring.push(poll(event, 7, true))
      expect(ring.enter(1, 0)).toBe(1)
      ring.close()
      ring.close()
      for (const buffer of [rings, sqes, control]) {
        const view = new Uint8Array(buffer)
        expect(view.every((byte) => byte === 0)).toBe(true)
        view.fill(255)
      }
      expect(enter()).toBe(-EBADF)
      expect(ring.native.registerFile(0, fd)).toBe(-EBADF)
      native.close(event)
    })

    it('tells who polls its fd of each completion, if it is pollable', async () => {
      const pollable = new TestRing(emulate, 8, 16, true)
      let reports = 0
      const watcher = native.createWatcher(() => {
        reports++
      })
      const event = fdOf(native.eventfd(0), 'eventfd')
      pollable.push(poll(event, 7, true))
      expect(pollable.enter(1, 0)).toBe(1)
      expect(watcher.add(pollable.native.fd, 1)).toBe(0)
      for (let i = 1; i <= 5; i++) {
        native.eventfdWrite(event, 1)
        await until(`report ${i}`, () => reports === i)
        pollable.enter(0, 0)
        expect(pollable.reap()).toEqual([{ data: 7, result: POLLIN, flags: F_MORE }])
        native.eventfdRead(event)
        expect(watcher.arm(pollable.native.fd, 1)).toBe(0)
      }
      watcher.close()
      pollable.close()
      native.close(event)
    })

    it('survives the file’s truncation while it reads', () => {
      writeSync(fd, 'abcdef', 0)
      ftruncateSync(fd, 0)
      expect(ring.one({ op: OP.READ, data: 1, fd, address: memory.address, length: 4 }).result).toBe(0)
    })

    it('is collected without close, with its fds', () => {
      const run = runChild(
        `
        import { readdirSync } from 'node:fs'
        native.ringSetup(8, 8, ${emulate}).close()
        const before = readdirSync('/proc/self/fd').length
        const event = native.eventfd(1)
        let enters = []
        ;(() => {
          for (let i = 0; i < 20; i++) {
            const ring = new support.TestRing(${emulate})
            ring.push({ op: support.OP.POLL_ADD, data: 1, fd: event, length: 1, extra: 1 })
            ring.enter(1, 1)
            enters.push(ring.native.enter) // a lone method keeps the ring
          }
        })()
        native.close(event)
        gc(); gc()
        await new Promise(resolve => setTimeout(resolve, 20))
        const results = new Set(enters.map(enter => enter()))
        enters = []
        await support.until('collection', () => { gc(); return readdirSync('/proc/self/fd').length === before })
        console.log([...results])
      `,
        ['--expose-gc']
      )
      expect(run).toMatchObject({ status: 0, stdout: '[ 0 ]' })
    })
  })
})

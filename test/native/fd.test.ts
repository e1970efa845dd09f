import { spawnSync } from 'node:child_process'
import { closeSync, constants, ftruncateSync, mkdtempSync, openSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, it } from 'vitest'
import { native } from '../../src/native.ts'
import { EAGAIN, EBADF, EINVAL, EPERM, EPIPE, fdOf, openFds } from './support.ts'

const directory = mkdtempSync(join(tmpdir(), 'virtiod-fd-'))
afterAll(() => rmSync(directory, { recursive: true, force: true }))

/** FD_CLOEXEC as /proc shows it (octal 02000000). */
function closesOnExec(fd: number): boolean {
  const flags = /flags:\s*(\d+)/.exec(readFileSync(`/proc/self/fdinfo/${fd}`, 'utf8'))?.[1] ?? '0'
  return (Number.parseInt(flags, 8) & 0o2000000) !== 0
}

describe('close and dup', () => {
  it('duplicates with FD_CLOEXEC and closes', () => {
    const before = openFds()
    const fd = fdOf(native.eventfd(0), 'eventfd')
    const copy = fdOf(native.dup(fd), 'dup')
    expect(copy).not.toBe(fd)
    expect(closesOnExec(fd)).toBe(true)
    expect(closesOnExec(copy)).toBe(true)
    expect(native.close(fd)).toBe(0)
    expect(native.close(copy)).toBe(0)
    expect(openFds()).toEqual(before)
  })

  it('answers -EBADF for what is not open', () => {
    expect(native.close(-1)).toBe(-EBADF)
    expect(native.close(99_999)).toBe(-EBADF)
    expect(native.dup(99_999)).toBe(-EBADF)
    expect(native.setNonblock(99_999, true)).toBe(-EBADF)
    expect(native.fdInfo(99_999, new Float64Array(8))).toBe(-EBADF)
  })

  it('throws a TypeError for an argument of the wrong type', () => {
    const loose = native as unknown as Record<string, (...args: unknown[]) => unknown>
    for (const [name, args] of [
      ['close', ['1']],
      ['close', [1.5]],
      ['close', [2 ** 31]],
      ['close', [Number.NaN]],
      ['close', []],
      ['dup', [null]],
      ['setNonblock', [1, 1]],
      ['fdInfo', [1, new Float64Array(7)]],
      ['fdInfo', [1, new Float32Array(8)]],
      ['eventfdWrite', [1, 0]],
      ['eventfdWrite', [1, 2 ** 53]],
      ['memfd', [1, 1, 1]],
      ['socketpair', [new Int32Array(1)]],
      ['createWatcher', [1]],
      ['ringSetup', [0, 1, true]],
    ] as const) {
      expect(() => loose[name]?.(...args), `${name}(${String(args)})`).toThrow(TypeError)
    }
  })
})

describe('setNonblock', () => {
  it('sets and clears O_NONBLOCK', () => {
    const fd = fdOf(native.eventfd(0), 'eventfd')
    const out = new Float64Array(8)
    const nonblocking = () => {
      native.fdInfo(fd, out)
      return ((out[6] ?? 0) & constants.O_NONBLOCK) !== 0
    }
    expect(nonblocking()).toBe(true)
    expect(native.setNonblock(fd, false)).toBe(0)
    expect(nonblocking()).toBe(false)
    expect(native.setNonblock(fd, true)).toBe(0)
    expect(nonblocking()).toBe(true)
    native.close(fd)
  })
})

describe('fdInfo', () => {
  it('describes a file', () => {
    const path = join(directory, 'disk')
    const fd = openSync(path, 'w+')
    expect(native.fallocate(fd, 0, 0, 12_345)).toBe(0)
    const out = new Float64Array(8).fill(-1)
    expect(native.fdInfo(fd, out)).toBe(0)
    expect((out[0] ?? 0) & constants.S_IFMT).toBe(constants.S_IFREG)
    expect(out[1]).toBe(12_345)
    expect(out[2]).toBeGreaterThanOrEqual(512)
    expect(out[3]).toBe(512)
    expect(out[4]).toBeGreaterThanOrEqual(0)
    expect(out[5]).toBeGreaterThanOrEqual(0)
    expect((out[6] ?? 0) & constants.O_RDWR).toBe(constants.O_RDWR)
    expect(out[7]).toBe(0)
    closeSync(fd)
  })

  it('describes what is no file', () => {
    const fd = openSync('/dev/null', 'r')
    const out = new Float64Array(8)
    expect(native.fdInfo(fd, out)).toBe(0)
    expect((out[0] ?? 0) & constants.S_IFMT).toBe(constants.S_IFCHR)
    closeSync(fd)
  })
})

describe('eventfd', () => {
  it('counts', () => {
    const fd = fdOf(native.eventfd(3), 'eventfd')
    expect(native.eventfdRead(fd)).toBe(3)
    expect(native.eventfdRead(fd)).toBe(-EAGAIN)
    expect(native.eventfdWrite(fd, 2 ** 53 - 1)).toBe(0)
    expect(native.eventfdWrite(fd, 0 + 1)).toBe(0)
    expect(native.eventfdRead(fd)).toBe(2 ** 53)
    native.close(fd)
  })

  it('never sleeps, not even in an eventfd without O_NONBLOCK', () => {
    const fd = fdOf(native.eventfd(0), 'eventfd')
    native.setNonblock(fd, false)
    expect(native.eventfdRead(fd)).toBe(-EAGAIN)
    for (let i = 0; i < 2048; i++) native.eventfdWrite(fd, 2 ** 53 - 1)
    // 2^64 - 2 - 2048 * (2^53 - 1) = 2046 are left
    expect(native.eventfdWrite(fd, 2046)).toBe(0)
    expect(native.eventfdWrite(fd, 1)).toBe(-EAGAIN)
    native.close(fd)
  })

  it('is refused when it is something else', () => {
    const fd = fdOf(native.memfd('x', 4, 0), 'memfd')
    expect(native.eventfdRead(fd)).toBe(-EINVAL)
    expect(native.eventfdWrite(99_999, 1)).toBe(-EBADF)
    expect(native.eventfdRead(99_999)).toBe(-EBADF)
    native.close(fd)
  })
})

describe('pollIn', () => {
  it('tells readable, timed out and not open', () => {
    const fd = fdOf(native.eventfd(0), 'eventfd')
    expect(native.pollIn(fd, 0)).toBe(0)
    const start = performance.now()
    expect(native.pollIn(fd, 20)).toBe(0)
    expect(performance.now() - start).toBeGreaterThan(15)
    native.eventfdWrite(fd, 1)
    expect(native.pollIn(fd, -1)).toBe(1)
    native.close(fd)
    expect(native.pollIn(99_999, 0)).toBe(-EBADF)
  })
})

describe('memfd', () => {
  it('has the size asked for and FD_CLOEXEC', () => {
    const fd = fdOf(native.memfd('guest', 3 * 4096, 0), 'memfd')
    const out = new Float64Array(8)
    native.fdInfo(fd, out)
    expect(out[1]).toBe(3 * 4096)
    expect(closesOnExec(fd)).toBe(true)
    native.close(fd)
  })

  it('refuses a huge page size that is no power of two, and leaks nothing when it fails', () => {
    const before = openFds()
    expect(native.memfd('guest', 4096, 3)).toBe(-EINVAL)
    expect(native.memfd('x'.repeat(300), 4096, 0)).toBe(-EINVAL)
    expect(native.memfd('guest', 4096, 8192)).toBeLessThan(0)
    // ftruncate fails after memfd_create: not a multiple of the huge page
    expect(native.memfd('guest', 4096, 2 ** 21)).toBeLessThan(0)
    expect(openFds()).toEqual(before)
  })

  it('keeps its size once it is sealed, and takes no further seal then', () => {
    const fd = fdOf(native.memfd('sealed', 4096, 0), 'memfd')
    const [seal, shrink, grow, write] = [1, 2, 4, 8]
    expect(native.sealFile(fd, shrink | grow | seal)).toBe(0)
    expect(() => ftruncateSync(fd, 0)).toThrow('EPERM')
    expect(() => ftruncateSync(fd, 8192)).toThrow('EPERM')
    expect(native.sealFile(fd, write)).toBe(-EPERM)
    native.close(fd)
    expect(native.sealFile(99_999, shrink)).toBe(-EBADF)
    const file = openSync(join(directory, 'unsealable'), 'w+')
    expect(native.sealFile(file, shrink)).toBe(-EINVAL)
    closeSync(file)
  })

  it('makes huge pages', ({ skip }) => {
    const fd = native.memfd('guest', 2 ** 22, 2 ** 21)
    if (fd < 0) skip('this kernel has no hugetlbfs')
    const out = new Float64Array(8)
    expect(native.fdInfo(fd, out)).toBe(0)
    expect(out[2]).toBe(2 ** 21)
    expect(native.mapFile(fd, 0, 2 ** 20, 0, 2 ** 20, true)).toBe(-EINVAL)
    native.close(fd)
  })
})

describe('readPipe and writePipe', () => {
  function pipe(): [reader: number, writer: number] {
    const path = join(directory, 'pipe')
    rmSync(path, { force: true })
    spawnSync('mkfifo', [path])
    const reader = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK)
    const writer = openSync(path, constants.O_WRONLY)
    native.setNonblock(reader, false)
    return [reader, writer]
  }

  it('never wait, although the pipe is blocking', () => {
    const before = openFds()
    const [reader, writer] = pipe()
    const buffer = new Uint8Array(65536)
    expect(native.readPipe(reader, buffer)).toBe(-EAGAIN)
    const bytes = Uint8Array.from({ length: 100_000 }, (_, i) => i * 7)
    let sent = 0
    for (let count = 1; count > 0; ) {
      count = native.writePipe(writer, bytes.subarray(sent))
      if (count > 0) sent += count
      else expect(count).toBe(-EAGAIN)
    }
    expect(sent).toBeGreaterThan(4096)
    const seen: number[] = []
    for (;;) {
      const count = native.readPipe(reader, buffer)
      if (count === -EAGAIN) break
      expect(count).toBeGreaterThan(0)
      seen.push(...buffer.subarray(0, count))
    }
    expect(Buffer.from(seen).equals(Buffer.from(bytes.subarray(0, sent)))).toBe(true)
    closeSync(writer)
    expect(native.readPipe(reader, buffer)).toBe(0)
    closeSync(reader)
    expect(openFds()).toEqual(before)
  })

  it('say that nobody reads, and what is no pipe', () => {
    const [reader, writer] = pipe()
    closeSync(reader)
    expect(native.writePipe(writer, new Uint8Array(5))).toBe(-EPIPE)
    closeSync(writer)
    expect(native.readPipe(99_999, new Uint8Array(5))).toBe(-EBADF)
    expect(native.writePipe(99_999, new Uint8Array(5))).toBe(-EBADF)
    const eventfd = fdOf(native.eventfd(0), 'eventfd')
    expect(native.readPipe(eventfd, new Uint8Array(5))).toBe(-EINVAL)
    native.close(eventfd)
  })
})

describe('lockFile', () => {
  it('excludes other open file descriptions', () => {
    const path = join(directory, 'locked')
    const [a, b] = [openSync(path, 'w+'), openSync(path, 'r+')]
    expect(native.lockFile(a, true)).toBe(0)
    expect(native.lockFile(a, true)).toBe(0)
    expect(native.lockFile(b, true)).toBe(-EAGAIN)
    expect(native.lockFile(b, false)).toBe(-EAGAIN)
    closeSync(a)
    expect(native.lockFile(b, false)).toBe(0)
    const c = openSync(path, 'r')
    expect(native.lockFile(c, false)).toBe(0)
    expect(native.lockFile(c, true)).toBe(-EBADF)
    closeSync(b)
    closeSync(c)
  })
})

describe('fallocate', () => {
  it('punches holes', () => {
    const fd = openSync(join(directory, 'holes'), 'w+')
    expect(native.fallocate(fd, 0, 0, 65_536)).toBe(0)
    expect(native.fallocate(fd, 3, 0, 65_536)).toBe(0) // PUNCH_HOLE | KEEP_SIZE
    const out = new Float64Array(8)
    native.fdInfo(fd, out)
    expect(out[1]).toBe(65_536)
    expect(native.fallocate(fd, 0, 0, 0)).toBe(-EINVAL)
    closeSync(fd)
    expect(native.fallocate(99_999, 0, 0, 1)).toBe(-EBADF)
  })
})

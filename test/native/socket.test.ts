import { mkdtempSync, rmSync, statSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, it } from 'vitest'
import { native } from '../../src/native.ts'
import { NotifySocket } from '../daemon/notify-socket.ts'
import {
  EADDRINUSE,
  EAGAIN,
  EBADF,
  ECONNREFUSED,
  EINVAL,
  ENAMETOOLONG,
  ENOENT,
  ENOTCONN,
  ENOTSOCK,
  EPIPE,
  fdOf,
  openFds,
} from './support.ts'

const directory = mkdtempSync(join(tmpdir(), 'virtiod-socket-'))
afterAll(() => rmSync(directory, { recursive: true, force: true }))
const MSG_CTRUNC = 8

function pair(): [number, number] {
  const out = new Int32Array(2)
  expect(native.socketpair(out)).toBe(0)
  return [out[0] ?? -1, out[1] ?? -1]
}

describe('listening and connecting', () => {
  it('accepts a connection and knows the peer', () => {
    const before = openFds()
    const path = join(directory, 'a.sock')
    const listener = fdOf(native.listenUnix(path, 0o660), 'listenUnix')
    expect(statSync(path).mode & 0o777).toBe(0o660)
    expect(native.accept(listener)).toBe(-EAGAIN)
    const client = fdOf(native.connectUnix(path), 'connectUnix')
    const server = fdOf(native.accept(listener), 'accept')
    expect(native.socketKind(listener)).toBe(1)
    expect(native.socketKind(client)).toBe(0)
    expect(native.socketKind(server)).toBe(0)
    const cred = new Int32Array(3)
    expect(native.peerCred(server, cred)).toBe(0)
    expect([...cred]).toEqual([process.pid, process.getuid?.(), process.getgid?.()])
    expect(native.listenUnix(path, 0o660)).toBe(-EADDRINUSE)
    for (const fd of [listener, client, server]) native.close(fd)
    expect(native.connectUnix(path)).toBe(-ECONNREFUSED)
    expect(openFds()).toEqual(before)
  })

  it('gives exactly the mode asked for and keeps the umask', () => {
    const umask = process.umask()
    for (const mode of [0o600, 0o660, 0o777, 0]) {
      const path = join(directory, `mode-${mode}`)
      native.close(fdOf(native.listenUnix(path, mode), 'listenUnix'))
      expect(statSync(path).mode & 0o777).toBe(mode)
    }
    expect(process.umask()).toBe(umask)
  })

  it('reports errors and leaks nothing', () => {
    const before = openFds()
    expect(native.connectUnix(join(directory, 'none'))).toBe(-ENOENT)
    expect(native.connectUnix('')).toBe(-EINVAL)
    expect(native.connectUnix('a\0b')).toBe(-EINVAL)
    expect(native.listenUnix('/'.padEnd(108, 'x'), 0o600)).toBe(-ENAMETOOLONG)
    expect(native.listenUnix(join(directory, 'no/such/dir'), 0o600)).toBe(-ENOENT)
    expect(native.accept(99_999)).toBe(-EBADF)
    expect(native.socketKind(99_999)).toBe(-EBADF)
    expect(native.peerCred(99_999, new Int32Array(3))).toBe(-EBADF)
    expect(native.shutdown(99_999)).toBe(-EBADF)
    const event = fdOf(native.eventfd(0), 'eventfd')
    expect(native.socketKind(event)).toBe(-ENOTSOCK)
    expect(native.shutdown(event)).toBe(-ENOTSOCK)
    native.close(event)
    expect(openFds()).toEqual(before)
  })

  it('tells an unconnected socket from a connected one after shutdown', () => {
    const [a, b] = pair()
    expect(native.shutdown(a)).toBe(0)
    expect(native.recvMessage(b, new Uint8Array(4), 0, 4, new Int32Array(2))).toBe(0)
    native.close(b)
    expect([0, -ENOTCONN]).toContain(native.socketKind(a))
    native.close(a)
  })
})

describe('messages', () => {
  it('carries bytes at an offset', () => {
    const [a, b] = pair()
    const bytes = Uint8Array.from([1, 2, 3, 4, 5, 6])
    expect(native.sendMessage(a, bytes, 2, 3, new Int32Array(0), 0, true)).toBe(3)
    const got = new Uint8Array(8)
    const fds = new Int32Array(4).fill(-9)
    expect(native.recvMessage(b, got, 4, 4, fds)).toBe(3)
    expect([...got]).toEqual([0, 0, 0, 0, 3, 4, 5, 0])
    expect([...fds]).toEqual([0, 0, -9, -9])
    expect(native.recvMessage(b, got, 0, 8, fds)).toBe(-EAGAIN)
    native.close(a)
    expect(native.recvMessage(b, got, 0, 8, fds)).toBe(0)
    expect(native.sendMessage(b, bytes, 0, 1, new Int32Array(0), 0, false)).toBe(-EPIPE)
    native.close(b)
    expect(native.recvMessage(b, got, 0, 8, fds)).toBe(-EBADF)
  })

  it('refuses a range outside the buffer', () => {
    const none = new Int32Array(2)
    const bytes = new Uint8Array(4)
    expect(() => native.recvMessage(0, bytes, 0, 5, none)).toThrow(TypeError)
    expect(() => native.recvMessage(0, bytes, 5, 0, none)).toThrow(TypeError)
    expect(() => native.recvMessage(0, bytes, -1, 1, none)).toThrow(TypeError)
    expect(() => native.recvMessage(0, bytes, 0, 4, new Int32Array(1))).toThrow(TypeError)
    expect(() => native.sendMessage(0, bytes, 4, 1, none, 0, true)).toThrow(TypeError)
    expect(() => native.sendMessage(0, bytes, 0, 4, none, 3, true)).toThrow(TypeError)
  })

  it('works on shared memory and on Buffers', () => {
    const [a, b] = pair()
    const shared = new Uint8Array(new SharedArrayBuffer(8))
    shared.set([7, 8, 9])
    expect(native.sendMessage(a, shared, 0, 3, new Int32Array(0), 0, true)).toBe(3)
    const got = Buffer.from('........')
    expect(native.recvMessage(b, got, 1, 7, new Int32Array(2))).toBe(3)
    expect([...got.subarray(1, 4)]).toEqual([7, 8, 9])
    native.close(a)
    native.close(b)
  })

  it('does not wait when it is told not to', () => {
    const [a, b] = pair()
    const bytes = new Uint8Array(65_536)
    let sent = 0
    do sent = native.sendMessage(a, bytes, 0, bytes.length, new Int32Array(0), 0, false)
    while (sent > 0)
    expect(sent).toBe(-EAGAIN)
    native.close(a)
    native.close(b)
  })
})

describe('passing file descriptors', () => {
  it('passes them both ways with exact accounting', () => {
    const before = openFds()
    const [a, b] = pair()
    const event = fdOf(native.eventfd(0), 'eventfd')
    for (const [from, to] of [
      [a, b],
      [b, a],
    ] as const) {
      expect(native.sendMessage(from, Uint8Array.of(1), 0, 1, Int32Array.of(event, event, -1), 2, true)).toBe(1)
      const fds = new Int32Array(10).fill(-1)
      expect(native.recvMessage(to, new Uint8Array(1), 0, 1, fds)).toBe(1)
      expect(fds[0]).toBe(2)
      expect(fds[1]).toBe(0)
      expect(fds[4]).toBe(-1)
      native.eventfdWrite(fds[2] ?? -1, 5)
      expect(native.eventfdRead(fds[3] ?? -1)).toBe(5)
      native.close(fds[2] ?? -1)
      native.close(fds[3] ?? -1)
    }
    for (const fd of [a, b, event]) native.close(fd)
    expect(openFds()).toEqual(before)
  })

  it('closes what does not fit and says MSG_CTRUNC', () => {
    const before = openFds()
    const [a, b] = pair()
    const event = fdOf(native.eventfd(0), 'eventfd')
    native.sendMessage(a, Uint8Array.of(1), 0, 1, new Int32Array(253).fill(event), 253, true)
    const fds = new Int32Array(2 + 8)
    expect(native.recvMessage(b, new Uint8Array(1), 0, 1, fds)).toBe(1)
    expect(fds[0]).toBe(8)
    expect((fds[1] ?? 0) & MSG_CTRUNC).toBe(MSG_CTRUNC)
    for (const fd of fds.subarray(2)) expect(native.close(fd)).toBe(0)
    native.sendMessage(a, Uint8Array.of(1), 0, 1, Int32Array.of(event), 1, true)
    const none = new Int32Array(2)
    expect(native.recvMessage(b, new Uint8Array(1), 0, 1, none)).toBe(1)
    expect([...none]).toEqual([0, MSG_CTRUNC])
    for (const fd of [a, b, event]) native.close(fd)
    expect(openFds()).toEqual(before)
  })

  it('refuses bad ones', () => {
    const [a, b] = pair()
    expect(native.sendMessage(a, Uint8Array.of(1), 0, 1, Int32Array.of(-1), 1, true)).toBe(-EBADF)
    expect(native.sendMessage(a, Uint8Array.of(1), 0, 1, new Int32Array(254).fill(a), 254, true)).toBe(-EINVAL)
    native.close(a)
    native.close(b)
  })
})

describe('datagrams', () => {
  it.each([join(directory, 'dgram.sock'), `@virtiod-test-${process.pid}`])('arrive at %s', async (address) => {
    const before = openFds()
    expect(native.sendDatagram(address, Buffer.from('x'))).toBe(address.startsWith('@') ? -ECONNREFUSED : -ENOENT)
    expect(openFds()).toEqual(before)
    using socket = await NotifySocket.open(address)
    expect(native.sendDatagram(address, Buffer.from('READY=1'))).toBe(7)
    expect(await socket.received('')).toBe('READY=1')
  })

  it('has the limits of a path', () => {
    expect(native.sendDatagram('x'.repeat(108), new Uint8Array(1))).toBe(-ENAMETOOLONG)
    expect(native.sendDatagram('', new Uint8Array(1))).toBe(-EINVAL)
    expect(() => native.sendDatagram(1 as never, new Uint8Array(1))).toThrow(TypeError)
  })
})

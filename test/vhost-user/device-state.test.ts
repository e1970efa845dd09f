/** DEVICE_STATE: the device's own state through pipes, sockets and files, with other ends that are slow or bad. */
import { spawnSync } from 'node:child_process'
import { closeSync, constants, mkdtempSync, openSync, readSync, rmSync, writeSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { beforeAll, describe, expect, test } from 'vitest'
import { native } from '../../src/native.ts'
import { MAX_STATE_BYTES } from '../../src/vhost-user/state-transfer.ts'
import * as wire from '../../src/vhost-user/wire.ts'
import { Bench, openFds, socketpair, u64of, until, warmUp } from './harness.ts'

const [SAVE, LOAD] = [wire.VHOST_TRANSFER_STATE_DIRECTION_SAVE, wire.VHOST_TRANSFER_STATE_DIRECTION_LOAD]
const NOFD = BigInt(wire.VHOST_USER_DEVICE_STATE_NOFD_MASK)

function pipe(): { reader: number; writer: number } {
  const directory = mkdtempSync(join(tmpdir(), 'virtiod-pipe-'))
  const path = join(directory, 'pipe')
  spawnSync('mkfifo', [path])
  const both = openSync(path, constants.O_RDWR)
  const reader = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK)
  const writer = openSync(path, constants.O_WRONLY | constants.O_NONBLOCK)
  closeSync(both)
  rmSync(directory, { recursive: true })
  return { reader, writer }
}

/** With O_PATH, which node:fs doesn't name. */
function unopenedFifo(): number {
  const directory = mkdtempSync(join(tmpdir(), 'virtiod-pipe-'))
  spawnSync('mkfifo', [join(directory, 'pipe')])
  const fd = openSync(join(directory, 'pipe'), 0o10000000)
  rmSync(directory, { recursive: true })
  return fd
}

/** SET_DEVICE_STATE_FD; the fd is ours no longer. */
async function transfer(bench: Bench, direction: number, fd: number, phase = 0): Promise<bigint | undefined> {
  const reply = await bench.exchange(wire.VHOST_USER_SET_DEVICE_STATE_FD, wire.vringState(direction, phase), [fd])
  native.close(fd)
  expect(reply?.fds ?? []).toEqual([])
  return reply === undefined ? undefined : u64of(reply.payload)
}

async function check(bench: Bench): Promise<bigint> {
  return u64of((await bench.ask(wire.VHOST_USER_CHECK_DEVICE_STATE))!)
}

/** Reads to the end of file. */
async function readAll(fd: number): Promise<Buffer> {
  const chunks: Buffer[] = []
  for (;;) {
    const chunk = Buffer.alloc(65536)
    try {
      const count = readSync(fd, chunk)
      if (count === 0) return Buffer.concat(chunks)
      chunks.push(chunk.subarray(0, count))
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EAGAIN') throw error
      await setTimeout(1)
    }
  }
}

const bytes = (length: number): Buffer => Buffer.from(Uint8Array.from({ length }, (_, i) => i * 31))

beforeAll(warmUp)

describe('saving', () => {
  test.each([0, 5, 1_000_000])('%i bytes through a pipe, to an end that is slow', async (length) => {
    await using bench = await Bench.open()
    bench.host.state = bytes(length)
    const before = openFds()
    const { reader, writer } = pipe()
    expect(await transfer(bench, SAVE, writer)).toBe(NOFD)
    // Meanwhile it serves.
    expect(await bench.command(wire.VHOST_USER_SET_OWNER)).toBe('ok')
    expect((await readAll(reader)).equals(bytes(length))).toBe(true)
    closeSync(reader)
    expect(await check(bench)).toBe(0n)
    expect(openFds()).toBe(before)
  })

  test('through a socket, and into a file where it stands', async () => {
    await using bench = await Bench.open()
    bench.host.state = bytes(100_000)
    const [ours, theirs] = socketpair()
    native.setNonblock(ours, true)
    expect(await transfer(bench, SAVE, theirs)).toBe(NOFD)
    expect((await readAll(ours)).equals(bytes(100_000))).toBe(true)
    closeSync(ours)
    expect(await check(bench)).toBe(0n)

    const file = bench.memfd(0)
    writeSync(file, 'head')
    expect(await transfer(bench, SAVE, native.dup(file))).toBe(NOFD)
    expect(await check(bench)).toBe(0n)
    const seen = Buffer.alloc(100_010)
    expect(readSync(file, seen, 0, seen.length, 0)).toBe(100_004)
    expect(seen.subarray(4, 100_004).equals(bytes(100_000))).toBe(true)
  })

  test('CHECK_DEVICE_STATE waits for the end; an other end that goes away is an error', async () => {
    await using bench = await Bench.open()
    bench.host.state = bytes(1_000_000)
    const { reader, writer } = pipe()
    await transfer(bench, SAVE, writer)
    const checked = check(bench)
    await setTimeout(20)
    closeSync(reader)
    expect(await checked).toBe(1n)
    expect(bench.refused[0]?.code).toBe('ERR_PROTOCOL_STATE')
    expect(await bench.command(wire.VHOST_USER_SET_OWNER)).toBe('ok')
  })

  test('nobody reads, and the session ends: nothing is left', async () => {
    const start = openFds()
    const { reader, writer } = pipe()
    {
      await using bench = await Bench.open()
      bench.host.state = bytes(1_000_000)
      await transfer(bench, SAVE, writer)
      await setTimeout(5)
    }
    await until(() => openFds() === start + 1)
    closeSync(reader)
  })

  test('a device that never says its state, and the session ends', async () => {
    const start = openFds()
    {
      await using bench = await Bench.open()
      bench.host.busy = new Promise(() => {})
      const { reader, writer } = pipe()
      await transfer(bench, SAVE, writer)
      await bench.peer.send(wire.VHOST_USER_CHECK_DEVICE_STATE, new Uint8Array(0))
      await setTimeout(5)
      bench.session.connection.abort()
      expect(await readAll(reader)).toHaveLength(0)
      closeSync(reader)
    }
    expect(openFds()).toBe(start)
  })

  test('nobody reads, and CHECK_DEVICE_STATE waits, when the daemon ends the session', async () => {
    await using bench = await Bench.open()
    bench.host.state = bytes(1_000_000)
    const { reader, writer } = pipe()
    await transfer(bench, SAVE, writer)
    await bench.peer.send(wire.VHOST_USER_CHECK_DEVICE_STATE, new Uint8Array(0))
    await setTimeout(10)
    bench.session.connection.abort()
    expect(await bench.ended).toBeUndefined()
    expect(u64of((await bench.peer.receive())!.payload)).toBe(1n)
    closeSync(reader)
  })
})

test('the front-end leaves while CHECK_DEVICE_STATE waits, and a third process holds the pipe', async () => {
  const bench = await Bench.open()
  const { reader, writer } = pipe()
  await transfer(bench, LOAD, reader)
  await bench.peer.send(wire.VHOST_USER_CHECK_DEVICE_STATE, new Uint8Array(0))
  await setTimeout(10)
  bench.peer.close()
  await bench.ended
  expect(bench.host.taken().at(-1)).toBe('reset')
  closeSync(writer)
})

describe('loading', () => {
  test.each([0, 5, 1_000_000])('%i bytes through a pipe', async (length) => {
    await using bench = await Bench.open()
    const before = openFds()
    const { reader, writer } = pipe()
    expect(await transfer(bench, LOAD, reader)).toBe(NOFD)
    const state = bytes(length)
    for (let sent = 0; sent < length; ) {
      try {
        sent += writeSync(writer, state, sent, Math.min(30_000, length - sent))
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== 'EAGAIN') throw error
      }
      await setTimeout(0)
    }
    const checked = check(bench)
    closeSync(writer)
    expect(await checked).toBe(0n)
    expect(Buffer.from(bench.host.state).equals(state)).toBe(true)
    expect(openFds()).toBe(before)
  })

  test('what the device refuses is an error of CHECK_DEVICE_STATE', async () => {
    await using bench = await Bench.open()
    const file = bench.memfd(13)
    await transfer(bench, LOAD, native.dup(file))
    expect(await check(bench)).toBe(1n)
    expect(bench.refused[0]?.message).toContain('13 bytes bring bad luck')
    // It was asked for once.
    expect(await check(bench)).toBe(1n)
  })

  test('more than any device has is an error, and is not kept', async () => {
    await using bench = await Bench.open()
    await transfer(bench, LOAD, native.dup(bench.memfd(MAX_STATE_BYTES + 1)))
    expect(await check(bench)).toBe(1n)
    expect(bench.host.taken()).toEqual([])
    await transfer(bench, LOAD, native.dup(bench.memfd(MAX_STATE_BYTES)))
    expect(await check(bench)).toBe(0n)
  })
})

describe('what is refused, by a reply that says so', () => {
  const rows: [string, number, number, (bench: Bench) => number][] = [
    ['another phase', SAVE, 1, () => pipe().writer],
    ['another direction', 2, 0, () => pipe().writer],
    ['saving into the reading end', SAVE, 0, () => pipe().reader],
    ['loading from the writing end', LOAD, 0, () => pipe().writer],
    ['an eventfd', SAVE, 0, () => native.eventfd(0)],
    ['/dev/zero', LOAD, 0, () => openSync('/dev/zero', 'r')],
    ['a directory', LOAD, 0, () => openSync('/tmp', 'r')],
    ['a FIFO that is not open', LOAD, 0, () => unopenedFifo()],
  ]
  test.each(rows)('%s', async (_, direction, phase, make) => {
    await using bench = await Bench.open()
    expect(await transfer(bench, direction, make(bench), phase)).toBe(NOFD | 1n)
    expect(bench.refused).toHaveLength(1)
    expect(await bench.command(wire.VHOST_USER_SET_OWNER)).toBe('ok')
  })

  test('while a ring is started', async () => {
    await using bench = await Bench.open()
    await bench.addMemory()
    await bench.startRing(1)
    expect(await transfer(bench, SAVE, pipe().writer)).toBe(NOFD | 1n)
    await bench.getBase(1)
    const { reader, writer } = pipe()
    expect(await transfer(bench, SAVE, writer)).toBe(NOFD)
    expect(await readAll(reader)).toHaveLength(0)
    closeSync(reader)
  })

  test('while another one is under way; RESET_DEVICE ends that', async () => {
    await using bench = await Bench.open()
    const one = pipe()
    expect(await transfer(bench, LOAD, one.reader)).toBe(NOFD)
    const two = pipe()
    expect(await transfer(bench, LOAD, two.reader)).toBe(NOFD | 1n)
    expect(await bench.command(wire.VHOST_USER_RESET_DEVICE)).toBe('ok')
    expect(await check(bench)).toBe(1n)
    expect(await transfer(bench, LOAD, native.dup(bench.memfd(1)))).toBe(NOFD)
    expect(await check(bench)).toBe(0n)
    closeSync(one.writer)
    closeSync(two.writer)
  })

  test('CHECK_DEVICE_STATE without a transfer', async () => {
    await using bench = await Bench.open()
    expect(await check(bench)).toBe(1n)
  })
})

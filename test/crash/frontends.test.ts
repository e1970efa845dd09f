/**
 * Front-ends that freeze, flood, or take their memory back, beside one that works on another device of the same
 * process: that one must not notice, and what virtiod holds stays bounded.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { ftruncateSync, mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest'
import { BlkDriver } from '../../src/frontend/blk.ts'
import { DirtyLogArea } from '../../src/frontend/dirty-log.ts'
import { InflightArea } from '../../src/frontend/inflight.ts'
import { layouts } from '../../src/frontend/memory.ts'
import { Session } from '../../src/frontend/session.ts'
import { sleepMs } from '../../src/frontend/virtqueue.ts'
import * as wire from '../../src/vhost-user/wire.ts'
import { VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT } from '../../src/virtio/blk.ts'
import { Daemon } from './daemon.ts'
import { describeFootprint, footprint, settledFootprint } from './reconnects.ts'

const MIB = 2 ** 20
const NOTHING = new Uint8Array(0)
const child = fileURLToPath(new URL('./frontend-child.ts', import.meta.url))

let directory: string
let daemon: Daemon
const sockets = (): [string, string] => [join(directory, 's0'), join(directory, 's1')]
const images = (): [string, string] => [join(directory, 'disk0'), join(directory, 'disk1')]
const children: ChildProcess[] = []

beforeAll(async () => {
  directory = mkdtempSync('/var/tmp/virtiod-frontends-')
  const devices = sockets().map((socket, i) => {
    writeFileSync(images()[i] ?? '', '')
    truncateSync(images()[i] ?? '', 4 * MIB)
    return `  - {type: blk, socket-path: ${socket}, blk-file: ${images()[i]}, num-queues: 2}\n`
  })
  const config = join(directory, 'virtiod.yaml')
  writeFileSync(config, `log-level: warn\ndevices:\n${devices.join('')}`)
  daemon = new Daemon(sockets()[1], ['run', config], join(directory, 'log'), { socketOption: false })
  if (!(await daemon.listening())) throw new Error(daemon.log)
})
afterEach(() => {
  for (const process of children.splice(0)) process.kill('SIGKILL')
  expect(daemon.hasEnded, daemon.log).toBe(false)
})
afterAll(async () => {
  const { code } = await daemon.stop()
  expect(code, daemon.log).toBe(0)
  rmSync(directory, { recursive: true, force: true })
})

interface Child {
  readonly process: ChildProcess
  output(): string
  readonly exited: Promise<unknown>
}

async function frontEnd(socket: string, ...words: readonly string[]): Promise<Child> {
  const process_ = spawn(process.execPath, [child, socket, ...words], { stdio: ['pipe', 'pipe', 'pipe'] })
  children.push(process_)
  let text = ''
  for (const stream of [process_.stdout, process_.stderr])
    stream.setEncoding('utf8').on('data', (data: string) => (text += data))
  const exited = once(process_, 'close')
  while (!text.includes('ready\n')) {
    if (process_.exitCode !== null) throw new Error(text)
    await new Promise((resolve) => setTimeout(resolve, 5))
  }
  return { process: process_, output: () => text, exited }
}

/** A whole session on the other device: connect, write, read, leave. */
function mustServe(socket = sockets()[1]): void {
  const session = Session.open(socket, { memory: layouts.single(4 * MIB), timeoutMs: 5000 })
  const blk = new BlkDriver(session.queue(0), session.memory, MIB)
  blk.timeoutMs = 5000
  blk.write(8, new Uint8Array(4096).fill(3))
  expect(blk.read(8, 4096).every((byte) => byte === 3)).toBe(true)
  session.close()
}

describe('a front-end that freezes', () => {
  test.each(['split', 'packed'])('and thaws, in the middle of its load: %s', { timeout: 60_000 }, async (format) => {
    const fresh = images()[0]
    truncateSync(fresh, 0)
    truncateSync(fresh, 4 * MIB)
    const frozen = await frontEnd(sockets()[0], '8192', format)
    for (let i = 0; i < 10; i++) {
      await new Promise((resolve) => setTimeout(resolve, 20 + 7 * i))
      frozen.process.kill('SIGSTOP')
      mustServe()
      await new Promise((resolve) => setTimeout(resolve, 20))
      frozen.process.kill('SIGCONT')
    }
    frozen.process.stdin?.end()
    await frozen.exited
    expect(frozen.output()).toMatch(/^\d+ requests, all right$/m)
  })

  test('and does not hear of two thousand changes of its disk', async () => {
    const frozen = await frontEnd(sockets()[0])
    frozen.process.kill('SIGSTOP')
    const before = await settledFootprint(daemon.pid)
    for (let i = 0; i < 2000; i++) {
      truncateSync(images()[0], (i % 2 === 0 ? 8 : 4) * MIB)
      process.kill(daemon.pid, 'SIGHUP')
      if (i % 200 === 0) mustServe()
    }
    mustServe()
    const after = await settledFootprint(daemon.pid)
    const told = `${describeFootprint(before)} became ${describeFootprint(after)}`
    expect(after.fds, told).toBeLessThanOrEqual(before.fds)
    expect(after.resident, told).toBeLessThan(before.resident + 48 * MIB)
    frozen.process.kill('SIGKILL')
    await frozen.exited
    mustServe(sockets()[0])
  })
})

describe('a front-end that floods', () => {
  test('with requests that it reads the answers of: the other device is served', () => {
    const flood = Session.open(sockets()[0], { queues: 0, timeoutMs: 5000 })
    const before = footprint(daemon.pid)
    const one = flood.connection
    for (let round = 0; round < 40; round++) {
      // As much as the socket takes, so that more waits whenever virtiod looks.
      const many = 120
      for (let i = 0; i < many; i++) one.channel.send(wire.VHOST_USER_GET_FEATURES, wire.VHOST_USER_VERSION, NOTHING)
      mustServe()
      for (let i = 0; i < many; i++) expect(one.channel.receive('GET_FEATURES').payload.length).toBe(8)
    }
    const after = footprint(daemon.pid)
    expect(after.resident, describeFootprint(after)).toBeLessThan(before.resident + 48 * MIB)
    flood.close(true)
  })
})

describe('a front-end that takes its memory back', () => {
  /** Load on both devices; the first one's front-end misbehaves; the other's requests must all end well. */
  function besides(misbehave: (round: number) => void, rounds: number): void {
    const other = Session.open(sockets()[1], { memory: layouts.single(8 * MIB), timeoutMs: 5000 })
    const blk = new BlkDriver(other.queue(0), other.memory, 4 * MIB)
    blk.timeoutMs = 5000
    for (let round = 0; round < rounds; round++) {
      const requests = Array.from({ length: 8 }, (_, i) =>
        blk.submit(VIRTIO_BLK_T_OUT, i * 128, new Uint8Array(65536).fill(round), 0, {}, false)
      )
      blk.publish()
      misbehave(round)
      blk.wait()
      expect(requests.every(({ status }) => status === 0)).toBe(true)
    }
    other.close()
    mustServe(sockets()[0])
  }

  function untilHangup(session: Session, poke: () => void): void {
    const deadline = performance.now() + 5000
    while (!session.connection.channel.hungUp()) {
      if (performance.now() > deadline) throw new Error('the session goes on')
      poke()
      sleepMs(1)
    }
  }

  /** Keeps reads in flight until the session has ended. */
  function loadUntilHangup(session: Session): void {
    const blk = new BlkDriver(session.queue(0), session.memory, 4 * MIB)
    untilHangup(session, () => {
      try {
        while (blk.outstanding < 16) blk.submit(VIRTIO_BLK_T_IN, blk.outstanding * 128, NOTHING, 65536)
        blk.poll()
      } catch (error) {
        // Its own mapping of the truncated file is gone, too.
        if (!(error instanceof Error)) throw error
      }
    })
  }

  test.each([false, true])('the in-flight buffer, packed=%s', { timeout: 60_000 }, (packed) => {
    besides((round) => {
      const area = InflightArea.create(1, 256, packed)
      const session = Session.open(sockets()[0], { memory: layouts.single(16 * MIB), packed, inflight: area })
      const blk = new BlkDriver(session.queue(0), session.memory, 4 * MIB)
      for (let i = 0; i < 8 * (round % 3); i++) blk.submit(VIRTIO_BLK_T_IN, i * 128, NOTHING, 65536, {}, false)
      blk.publish()
      ftruncateSync(area.fd, round % 2 === 0 ? 0 : 4096)
      if (round % 2 === 0) {
        session.queue(0).driver.kickRaw()
        loadUntilHangup(session)
      }
      session.close(true)
      area.close()
    }, 8)
  })

  test('the dirty log', { timeout: 60_000 }, () => {
    besides((round) => {
      const session = Session.open(sockets()[0], { memory: layouts.single(16 * MIB), packed: round % 4 >= 2 })
      const log = new DirtyLogArea(session.memory)
      session.startLog(log, true)
      const blk = new BlkDriver(session.queue(0), session.memory, 4 * MIB)
      for (let i = 0; i < 8 * (round % 3); i++) blk.submit(VIRTIO_BLK_T_IN, i * 128, NOTHING, 65536, {}, false)
      blk.publish()
      ftruncateSync(log.fd, 0)
      if (round % 2 === 0) loadUntilHangup(session)
      session.close(true)
      log.close()
    }, 8)
  })

  test('the in-flight buffer that virtiod made: it is sealed', () => {
    const session = Session.open(sockets()[0], { memory: layouts.single(8 * MIB), inflight: true })
    const fd = session.inflight?.fd ?? -1
    expect(() => ftruncateSync(fd, 0)).toThrow(/EPERM/)
    expect(() => ftruncateSync(fd, 16 * MIB)).toThrow(/EPERM/)
    session.close()
  })
})

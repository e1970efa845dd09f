/** The front-end of virtiod/testing with a device of one's own: rings that break, sessions that end, buffers, state. */
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { connect, type FrontEnd, FrontendError, runVirtiod, startVirtiod, type VirtiodProcess } from 'virtiod/testing'
import { afterAll, beforeAll, expect, test } from 'vitest'

const dir = mkdtempSync(join(tmpdir(), 'virtiod-testing-'))
const socketPath = join(dir, 's')
const module = fileURLToPath(new URL('fixtures/echo.ts', import.meta.url))
let daemon: VirtiodProcess

beforeAll(async () => {
  daemon = await startVirtiod(['device', module, '--socket-path', socketPath])
})
afterAll(async () => {
  await daemon?.stop('SIGKILL')
  rmSync(dir, { recursive: true, force: true })
})

function failureOf(work: () => unknown): unknown {
  try {
    work()
  } catch (error) {
    return error
  }
  return undefined
}

function echo(front: FrontEnd, text: string, room = 16): string {
  const { bytes, written } = front.request(0, Buffer.from(text), room)
  return Buffer.from(bytes.subarray(0, written)).toString()
}

test('what is written, and how much', () => {
  using front = connect(socketPath, { split: true })
  expect(echo(front, ' hello')).toBe('hello')
  expect(echo(front, ' hello', 3)).toBe('hel')
})

test('a request that is too short breaks its ring, and is not waited for', () => {
  using front = connect(socketPath, { queues: 2 })
  expect(failureOf(() => front.request(0, [], 8))).toMatchObject({ name: 'FrontendError', failure: 'broken' })
  expect(front.isBroken(0)).toBe(true)
  expect(front.waitUntilBroken(0)).toBe(true)
  expect(front.isBroken(1)).toBe(false)
})

test('a handler that throws ends the session, and the next one is served', async () => {
  {
    using front = connect(socketPath)
    expect(failureOf(() => front.request(0, Buffer.from('x'), 8))).toMatchObject({ failure: 'closed' })
  }
  await daemon.printed('as it was asked to')
  using front = connect(socketPath)
  expect(echo(front, ' again')).toBe('again')
})

test('an answer that does not come is told after the time limit', () => {
  using front = connect(socketPath, { queues: 2, timeoutMs: 2000 })
  const pending = front.submit(1, [], 16)
  const failure = failureOf(() => front.wait(pending, 50))
  expect(failure).toBeInstanceOf(FrontendError)
  expect(failure).toMatchObject({ failure: 'timeout', message: 'virtqueue 1: no reply within 50 ms' })
  expect(front.inFlight).toBe(1)
  expect(echo(front, 'bcopy')).toBe('copy')
  front.wait(pending)
  expect(Buffer.from(pending.reply!.bytes.subarray(0, pending.reply!.written)).toString()).toBe('copy')
  expect(front.inFlight).toBe(0)
})

test('the config space and its changes', () => {
  using front = connect(socketPath)
  expect(front.configChanges).toBe(0)
  echo(front, 'c')
  expect(front.waitForConfigChange()).toBe(true)
  expect(Buffer.from(front.config(0, 4)).readUInt32LE()).toBeGreaterThan(0)
  expect(failureOf(() => front.writeConfig(0, Uint8Array.of(1)))).toMatchObject({ failure: 'nack' })
})

test('the state goes from one device to another', () => {
  using front = connect(socketPath)
  front.stop()
  front.loadState(Buffer.from('{"count":41}'))
  expect(JSON.parse(Buffer.from(front.saveState()).toString())).toEqual({ count: 41 })
  expect(failureOf(() => front.loadState(Buffer.from('{}')))).toMatchObject({ failure: 'nack' })
})

test('runVirtiod tells how a command ended', () => {
  expect(runVirtiod(['device', module, '--socket-path', socketPath, '--option', 'size=1', '--check-config'])).toEqual({
    code: 2,
    signal: null,
    stdout: '',
    stderr: expect.stringContaining('size'),
  })
  expect(runVirtiod(['--version']).stdout).toMatch(/^virtiod \d/)
})

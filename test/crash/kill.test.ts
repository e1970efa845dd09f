/**
 * virtiod is killed some dozens of times under a verifying load; `npm run crash -- --kills 1000` is the same without
 * bounds. A process of its own: the load blocks its thread.
 */
import { execFile } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { BlkDriver } from '../../src/frontend/blk.ts'
import { layouts } from '../../src/frontend/memory.ts'
import { Session } from '../../src/frontend/session.ts'
import { Daemon } from './daemon.ts'

const main = fileURLToPath(new URL('./main.ts', import.meta.url))

function run(args: readonly string[]): Promise<string> {
  return new Promise((resolve, reject) => {
    execFile(process.execPath, [main, ...args], { timeout: 150_000 }, (error, stdout, stderr) => {
      if (error === null) resolve(stdout)
      else reject(new Error(`${stdout}\n${stderr}`))
    })
  })
}

// Another seed each time finds more; the output of a failure names it.
const seed = String(Date.now() % 2 ** 31)

test.each([
  ['split', 20, []],
  ['packed', 20, ['--packed']],
  ['split, in order', 8, ['--in-order', '--queues', '1']],
  ['packed, in order', 8, ['--packed', '--in-order', '--queues', '1']],
  // With one request in flight nothing makes up for a call that was lost with its process.
  ['one request at a time', 16, ['--depth', '1', '--queues', '8', '--cache', 'writeback', '--rest-every', '2']],
] as const)('nothing is lost, torn, repeated or stuck: %s', { timeout: 180_000 }, async (_name, kills, words) => {
  const output = await run(['--kills', String(kills), '--rest-every', '10', '--seed', seed, ...words])
  expect(output).toMatch(new RegExp(`^${kills} kills in `, 'm'))
  // A run in which no request was ever in flight at a kill has shown nothing.
  expect(Number(/; (\d+) of them were in flight at a kill/.exec(output)?.[1])).toBeGreaterThan(kills)
})

describe('a ring that goes on', () => {
  let directory: string
  let daemon: Daemon | undefined
  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'virtiod-call-'))
    writeFileSync(join(directory, 'disk'), new Uint8Array(65536))
  })
  afterEach(async () => {
    await daemon?.stop('SIGKILL')
    rmSync(directory, { recursive: true })
  })

  async function start(): Promise<string> {
    daemon = new Daemon(join(directory, 's'), ['blk', '--blk-file', join(directory, 'disk')], join(directory, 'log'))
    if (!(await daemon.listening())) throw new Error(daemon.log)
    return daemon.socket
  }

  test.each([false, true])('calls its driver, in case the last call was lost, packed=%s', async (packed) => {
    const memory = layouts.single(4 * 2 ** 20)
    const before = Session.open(await start(), { memory, mode: 'irq', inflight: true, packed })
    new BlkDriver(before.queue(0), before.memory, 2 ** 20).read(0, 4096)
    await daemon?.stop('SIGKILL')
    before.queue(0).takeCalls()
    const after = Session.resume(await start(), before)
    expect(after.queue(0).waitForCall(5000)).toBeGreaterThan(0)
    after.close()
  })
})

test('a wrong command line is refused', async () => {
  await expect(run(['--kills', 'many'])).rejects.toThrow('--kills: many is no number that it can be')
  await expect(run(['nonsense'])).rejects.toThrow('nonsense: no such thing')
})

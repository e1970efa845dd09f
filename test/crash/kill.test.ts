/**
 * virtiod is killed some dozens of times under a verifying load; `npm run crash -- --kills 1000` is the same without
 * bounds. A process of its own: the load blocks its thread.
 */
import { execFile } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'
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

test.each([false, true])(
  'a ring that goes on calls its driver, in case the last call was lost, packed=%s',
  async (packed) => {
    const directory = mkdtempSync(join(tmpdir(), 'virtiod-call-'))
    const image = join(directory, 'disk')
    writeFileSync(image, new Uint8Array(65536))
    const start = async (): Promise<Daemon> => {
      const daemon = new Daemon(join(directory, 's'), ['blk', '--blk-file', image], join(directory, 'log'))
      if (!(await daemon.listening())) throw new Error(daemon.log)
      return daemon
    }
    const first = await start()
    const before = Session.open(first.socket, {
      memory: layouts.single(4 * 2 ** 20),
      mode: 'irq',
      inflight: true,
      packed,
    })
    new BlkDriver(before.queue(0), before.memory, 2 ** 20).read(0, 4096)
    await first.stop('SIGKILL')
    const second = await start()
    before.queue(0).takeCalls()
    const after = Session.resume(second.socket, before)
    expect(after.queue(0).waitForCall(5000)).toBeGreaterThan(0)
    after.close()
    await second.stop()
    rmSync(directory, { recursive: true })
  }
)

test('a wrong command line is refused', async () => {
  await expect(run(['--kills', 'many'])).rejects.toThrow('--kills: many is no number that it can be')
  await expect(run(['nonsense'])).rejects.toThrow('nonsense: no such thing')
})

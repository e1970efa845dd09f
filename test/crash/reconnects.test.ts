/** Hundreds of front-ends one after the other; `npm run crash -- reconnects` is the same by the thousand. */
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { Daemon } from './daemon.ts'
import { describeFootprint, reconnect, sessionVariants, settledFootprint } from './reconnects.ts'

const MIB = 2 ** 20
let directory: string
let daemon: Daemon

beforeAll(async () => {
  directory = mkdtempSync(join(tmpdir(), 'virtiod-reconnects-'))
  const image = join(directory, 'disk.img')
  writeFileSync(image, '')
  truncateSync(image, 4 * MIB)
  const args = ['blk', '--blk-file', image, '--num-queues', '2', '--log-level', 'fatal']
  daemon = new Daemon(join(directory, 's'), args, join(directory, 'log'))
  await daemon.listening()
})
afterAll(async () => {
  await daemon?.stop('SIGKILL')
  rmSync(directory, { recursive: true, force: true })
})

test('500 front-ends leave nothing behind', { timeout: 60_000 }, async () => {
  // The first ones bring code and heap to their working size.
  await reconnect(daemon.socket, 200, 1, sessionVariants, () => undefined)
  const before = await settledFootprint(daemon.pid)
  await reconnect(daemon.socket, 500, 2, sessionVariants, () => undefined)
  const after = await settledFootprint(daemon.pid)
  const told = `${describeFootprint(before)} became ${describeFootprint(after)}`
  expect(daemon.hasEnded, daemon.log).toBe(false)
  expect(after.fds, told).toBeLessThanOrEqual(before.fds)
  expect(after.threads, told).toBeLessThanOrEqual(before.threads)
  // Their memory was 3 GiB. What is still mapped waits, empty, for the garbage collector.
  expect(after.resident - before.resident, told).toBeLessThan(24 * MIB)
  expect(after.mappings, told).toBeLessThan(before.mappings + 200)
  expect((await daemon.stop()).code).toBe(0)
})

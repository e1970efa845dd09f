/** A disk whose module is reloaded under load; `npm run crash -- reloads --count 100` is the same without bounds. */

import { execFile } from 'node:child_process'
import { tmpdir } from 'node:os'
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'

const main = fileURLToPath(new URL('./main.ts', import.meta.url))
// Another one each time finds more; the output of a failure names it.
const seed = String(Date.now() % 2 ** 31)

function run(args: readonly string[]): Promise<string> {
  return new Promise((resolve, reject) => {
    execFile(process.execPath, [main, ...args], { timeout: 100_000 }, (error, stdout, stderr) => {
      if (error === null) resolve(stdout)
      else reject(new Error(`${stdout}\n${stderr}`))
    })
  })
}

test.each([
  ['split', []],
  ['packed, with an in-flight buffer, on plain system calls', ['--packed', '--inflight', '--engine', 'emulated']],
] as const)('ten reloads, nothing is lost, torn, repeated or stuck: %s', { timeout: 120_000 }, async (_, words) => {
  const output = await run([
    'reloads',
    '--count',
    '10',
    '--size',
    '4',
    '--seed',
    seed,
    '--directory',
    tmpdir(),
    ...words,
  ])
  expect(output).toMatch(/^10 reloads in /m)
})

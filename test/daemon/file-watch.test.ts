/** What is a change of a watched file, in all the ways in which files come to be. */
import { mkdirSync, mkdtempSync, renameSync, rmSync, symlinkSync, utimesSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { FileWatch } from '../../src/daemon/file-watch.ts'

/** For what must not come, in milliseconds: several times what a change takes to settle. */
const QUIET_MS = 200

let directory: string
let changes: number
let failures: string[]
let files: FileWatch
let next: PromiseWithResolvers<void>

const path = (name: string) => join(directory, name)
const write = (name: string, text: string) => writeFileSync(path(name), text)

function replace(): void {
  write('~', '2')
  renameSync(path('~'), path('a.ts'))
}

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'virtiod-watch-'))
  changes = 0
  failures = []
  next = Promise.withResolvers()
  files = new FileWatch({
    changed: () => {
      changes++
      next.resolve()
      next = Promise.withResolvers()
    },
    failed: (where) => failures.push(where),
  })
  write('a.ts', '1')
  write('b.ts', '1')
  files.watch([path('a.ts'), path('b.ts')])
})
afterEach(() => {
  files[Symbol.dispose]()
  rmSync(directory, { recursive: true, force: true })
})

test.each<[string, () => void]>([
  ['written in place', () => write('a.ts', '2')],
  ['replaced by another', replace],
  ['removed', () => rmSync(path('a.ts'))],
  ['moved away', () => renameSync(path('b.ts'), path('c.ts'))],
])('%s: told once', async (_, change) => {
  const told = next.promise
  change()
  await told
  await sleep(QUIET_MS)
  expect(changes).toBe(1)
  expect(failures).toEqual([])
})

test('several changes at once are one', async () => {
  const told = next.promise
  for (let i = 2; i < 10; i++) for (const name of ['a.ts', 'b.ts']) write(name, `${i}`)
  await told
  await sleep(QUIET_MS)
  expect(changes).toBe(1)
})

test('what leaves the content as it was is none, nor is another file', async () => {
  utimesSync(path('a.ts'), new Date(0), new Date(0))
  write('a.ts', '2')
  write('a.ts', '1')
  write('other.ts', '')
  await sleep(QUIET_MS)
  expect(changes).toBe(0)
})

test('another file counts as well, if it can be imported, when nobody knows what is missing', async () => {
  files.watchAll()
  write('notes.txt', '')
  await sleep(QUIET_MS)
  expect(changes).toBe(0)
  const told = next.promise
  write('missing.ts', '')
  await told
  files.watch([path('a.ts')])
  write('missing.ts', '1')
  await sleep(QUIET_MS)
  expect(changes).toBe(1)
})

test('a change before it is watched anew is not lost, one of a file that is dropped is', async () => {
  const told = next.promise
  write('a.ts', '2')
  write('b.ts', '2')
  files.watch([path('a.ts')])
  await told
  expect(changes).toBe(1)
  write('b.ts', '3')
  await sleep(QUIET_MS)
  expect(changes).toBe(1)
})

test('what a link leads to, and the link itself', async () => {
  for (const version of ['v1', 'v2']) {
    mkdirSync(path(version))
    write(`${version}/m.ts`, version)
  }
  symlinkSync('v1/m.ts', path('m.ts'))
  files.watch([path('m.ts')])
  let told = next.promise
  write('v1/m.ts', 'new')
  await told
  told = next.promise
  symlinkSync('v2/m.ts', path('~'))
  renameSync(path('~'), path('m.ts'))
  await told
  expect(changes).toBe(2)
})

test('a directory that is replaced', async () => {
  mkdirSync(path('lib'))
  write('lib/x.ts', '1')
  files.watch([path('a.ts'), path('lib/x.ts')])
  renameSync(path('lib'), path('old'))
  mkdirSync(path('lib'))
  write('lib/x.ts', '2')
  // It tells of itself, or the next look finds it.
  const told = next.promise
  write('a.ts', '2')
  await told
  const again = next.promise
  write('lib/x.ts', '3')
  await again
  expect(changes).toBe(2)
})

test('a directory that is not there is told of; after the end nothing is', async () => {
  files.watch([path('nowhere/x.ts')])
  expect(failures).toEqual([path('nowhere')])
  files.watch([path('a.ts')])
  write('a.ts', '5')
  files[Symbol.dispose]()
  await sleep(QUIET_MS)
  expect(changes).toBe(0)
})

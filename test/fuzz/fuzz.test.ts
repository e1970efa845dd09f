/**
 * Each fuzzer for some seconds; `npm run fuzz` is the same without bounds. Processes of their own: their front-ends block the
 * thread. Another seed each time finds more; the output of a failure names it.
 */
import { execFile } from 'node:child_process'
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { play } from './corpus.ts'
import { Random } from './random.ts'
import { Misbehaviour, Target } from './target.ts'

const main = fileURLToPath(new URL('./main.ts', import.meta.url))
const corpus = fileURLToPath(new URL('./corpus', import.meta.url))
const seed = String(Date.now() % 2 ** 31)

let directory: string
beforeAll(() => {
  directory = mkdtempSync(join(tmpdir(), 'virtiod-fuzz-test-'))
})
afterAll(() => rmSync(directory, { recursive: true, force: true }))

function run(...args: readonly string[]): Promise<string> {
  const words = [...args, '--corpus', join(directory, 'corpus'), '--finds', join(directory, 'finds')]
  return new Promise((resolve, reject) => {
    execFile(process.execPath, [main, ...words], { timeout: 150_000 }, (error, stdout, stderr) => {
      if (error === null) resolve(stdout)
      else reject(new Error(`${stdout}\n${stderr}`))
    })
  })
}

describe('for some seconds', { timeout: 180_000 }, () => {
  test('hostile messages', async () => {
    const output = await run('protocol', '--seed', seed, '--count', '12000')
    expect(Number(/(\d+) messages, .*\n$/.exec(output)?.[1])).toBeGreaterThanOrEqual(12_000)
  })

  test('hostile rings', async () => {
    const output = await run('ring', '--seed', seed, '--count', '12000')
    const [, rings, broken] = /(\d+) rings \((\d+) broke, .*\n$/.exec(output) ?? []
    expect(Number(rings)).toBeGreaterThanOrEqual(12_000)
    // Some break and most don't: both are reached.
    expect(Number(broken)).toBeGreaterThan(100)
    expect(Number(broken)).toBeLessThan(Number(rings) / 2)
  })

  test('programs for the pure code', async () => {
    const output = await run('pure', '--seed', seed, '--count', '3500')
    const [, blocks, known] = /(\d+) of (\d+) blocks\n$/.exec(output) ?? []
    // The programs are worth something only if they reach most of it.
    expect(Number(blocks) / Number(known)).toBeGreaterThan(0.5)
  })
})

test.each(readdirSync(corpus).filter((name) => /^(protocol|ring|pure)-/.test(name)))(
  'what was found once stays away: %s',
  { timeout: 60_000 },
  async (name) => {
    expect(await play(name, readFileSync(join(corpus, name), 'utf8'))).toBeUndefined()
  }
)

describe('a fuzzer that finds nothing would have found it', () => {
  test('a virtiod that died', { timeout: 60_000 }, async () => {
    const target = new Target()
    try {
      await target.start()
      target.check(new Random(1))
      process.kill(target.pid, 'SIGKILL')
      await target.daemon.ended
      expect(() => target.alive()).toThrow(Misbehaviour)
    } finally {
      target.dispose()
    }
  })

  test('what it finds is played again, and the exit code says so', async () => {
    const path = join(directory, 'pure-nothing.hex')
    writeFileSync(path, '00\n')
    await expect(run('replay', path)).resolves.toContain('nothing goes wrong')
    await expect(run('replay', join(directory, 'other.hex'))).rejects.toThrow('ENOENT')
    await expect(run('nonsense')).rejects.toThrow('nonsense: no such thing')
    await expect(run('pure', '--count', 'many')).rejects.toThrow('--count: many')
  })
})

/** `npm run virtiod` and `npm start` hand signals on: a daemon that outlives its npm keeps the image locked. */
import { spawn } from 'node:child_process'
import { closeSync, existsSync, mkdtempSync, openSync, rmSync, truncateSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect, it } from 'vitest'

const root = fileURLToPath(new URL('../..', import.meta.url))

it('ends with the npm that started it', async () => {
  const directory = mkdtempSync(join(tmpdir(), 'virtiod-npm-'))
  const socket = join(directory, 's')
  const image = join(directory, 'i')
  closeSync(openSync(image, 'w'))
  truncateSync(image, 1 << 20)
  const npm = spawn('npm', ['run', '-s', 'virtiod', '--', 'blk', '--socket-path', socket, '--blk-file', image], {
    cwd: root,
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  const ended = new Promise<number | null>((resolve) => npm.once('exit', resolve))
  let log = ''
  npm.stdout.on('data', (chunk) => {
    log += chunk
  })
  while (!log.includes('"msg":"ready"')) await new Promise((resolve) => setTimeout(resolve, 20))
  npm.kill('SIGTERM')
  await ended
  // The pipe ends when nobody is left to write to it.
  await new Promise((resolve) => (npm.stdout.closed ? resolve(undefined) : npm.stdout.once('close', resolve)))
  expect(log).toContain('"msg":"stopping"')
  expect(existsSync(socket)).toBe(false)
  rmSync(directory, { recursive: true, force: true })
})

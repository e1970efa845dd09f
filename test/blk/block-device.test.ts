/** Block devices, as loop devices: the whole of `virtiod verify` against one with 512-byte and one with 4 KiB blocks. */
import { execFileSync, spawn, spawnSync } from 'node:child_process'
import { closeSync, existsSync, mkdtempSync, openSync, rmSync, truncateSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, describe, expect, it } from 'vitest'

const main = fileURLToPath(new URL('../../src/cli/main.ts', import.meta.url))
const directory = mkdtempSync('/var/tmp/virtiod-loop-')
const loops: string[] = []
afterAll(() => {
  for (const loop of loops) spawnSync('losetup', ['-d', loop])
  rmSync(directory, { recursive: true, force: true })
})

function attach(blockSize: number): string {
  const image = join(directory, `${blockSize}.img`)
  closeSync(openSync(image, 'w'))
  truncateSync(image, 64 * 2 ** 20)
  const loop = execFileSync('losetup', ['-f', '--show', '-b', String(blockSize), image], { encoding: 'utf8' }).trim()
  loops.push(loop)
  return loop
}

const permitted = process.getuid?.() === 0 && spawnSync('losetup', ['-f']).status === 0
if (!permitted) console.warn('no loop devices here (not root, or no loop module): block devices are not tested')

// In CI they have to be there: a skip would look like a pass.
describe.skipIf(!permitted && process.env['CI'] === undefined)('a block device', () => {
  it.each([
    { blockSize: 512, cache: 'writeback' },
    { blockSize: 4096, cache: 'none' },
  ])('of $blockSize-byte blocks passes verify with --cache $cache', async ({ blockSize, cache }) => {
    const loop = attach(blockSize)
    const socket = join(directory, `${blockSize}.sock`)
    const options = ['--blk-file', loop, '--cache', cache, '--num-queues', '2', '--log-level', 'fatal']
    const daemon = spawn(process.execPath, [main, 'blk', '--socket-path', socket, ...options], { stdio: 'inherit' })
    const ended = new Promise((resolve) => daemon.once('exit', resolve))
    try {
      while (!existsSync(socket)) await new Promise((resolve) => setTimeout(resolve, 20))
      const verify = spawnSync(process.execPath, [main, 'verify', socket], { encoding: 'utf8' })
      expect(verify.stdout).not.toContain('FAIL')
      expect(verify.stdout).toContain('PASS  discard/one-range')
      expect(verify.status).toBe(0)
    } finally {
      daemon.kill('SIGTERM')
    }
    expect(await ended).toBe(0)
  })

  it('refuses blocks that it cannot be accessed in', () => {
    const args = ['blk', '--socket-path', join(directory, 's'), '--blk-file', attach(4096), '--block-size', '512']
    const check = spawnSync(process.execPath, [main, ...args, '--check-config'], { encoding: 'utf8' })
    expect(check.stderr).toContain('Give --block-size 4096')
    expect(check.status).toBe(2)
  })
})

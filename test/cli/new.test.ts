/** `virtiod new`: what it writes compiles, passes its own tests and is served. */
import { execFile } from 'node:child_process'
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { root } from '../setup/prerequisites.ts'
import { virtiod } from './spawn.ts'

const run = promisify(execFile)
const dir = mkdtempSync(join(tmpdir(), 'virtiod-new-'))
const project = join(dir, 'fair-dice')
afterAll(() => rmSync(dir, { recursive: true, force: true }))

/**
 * An installation of the checkout without building it: what package.json exports, as the TypeScript that it is made from. Its
 * real path lies outside of node_modules, so Node takes the types away.
 */
function installCheckout(modules: string): void {
  const home = join(modules, 'virtiod')
  mkdirSync(home, { recursive: true })
  for (const name of ['src', 'devices', 'bin']) symlinkSync(join(root, name), join(home, name))
  const { exports, ...rest } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as {
    exports: Record<string, string | { default: string }>
  }
  const sources = Object.entries(exports).map(([name, target]) => [
    name,
    typeof target === 'string' ? target : target.default.replace('./dist/', './').replace(/\.js$/, '.ts'),
  ])
  writeFileSync(join(home, 'package.json'), JSON.stringify({ ...rest, exports: Object.fromEntries(sources) }))
  for (const name of ['valibot', '@types']) symlinkSync(join(root, 'node_modules', name), join(modules, name))
}

describe('a new device', () => {
  let written = ''

  beforeAll(async () => {
    const { code, stdout, stderr } = await virtiod(['new', 'fair-dice'], { cwd: dir })
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' })
    written = stdout
    installCheckout(join(project, 'node_modules'))
  })

  test('has its files, and the next steps are told', () => {
    const files = ['.gitignore', 'README.md', 'device.test.ts', 'device.ts', 'package.json', 'tsconfig.json']
    expect(readdirSync(project).filter((name) => name !== 'node_modules')).toEqual(files)
    expect(written).toContain(
      '  cd fair-dice\n  npm install && npm test\n  npx virtiod device ./device.ts --socket-path'
    )
    const { name, dependencies } = JSON.parse(readFileSync(join(project, 'package.json'), 'utf8')) as {
      name: string
      dependencies: Record<string, string>
    }
    expect(name).toBe('fair-dice')
    // From a checkout, the checkout.
    expect(existsSync(join(project, dependencies['virtiod']!.replace('file:', ''), 'bin', 'virtiod.js'))).toBe(true)
  })

  test('compiles', async () => {
    await run(join(root, 'node_modules', '.bin', 'tsc'), ['-p', project]).catch((error: { stdout: string }) => {
      throw new Error(error.stdout)
    })
  })

  test('passes its tests: alone, behind a socket, in a guest where there can be one', {
    timeout: 120_000,
  }, async () => {
    const { NODE_OPTIONS: _, NODE_TEST_CONTEXT: __, ...env } = process.env
    const tests = run(process.execPath, ['--test', '--test-reporter=tap'], { cwd: project, env })
    const { stdout } = await tests.catch((error: { stdout: string }) => {
      throw new Error(error.stdout)
    })
    expect(stdout).toMatch(/^# pass [34]$/m)
    expect(stdout).toMatch(/^# fail 0$/m)
  })

  test('is checked by the command that serves it', async () => {
    const args = ['device', './device.ts', '--socket-path', 's', '--option', 'sides=1', '--check-config']
    const refused = await virtiod(args, { cwd: project })
    expect(refused).toMatchObject({ code: 2, stderr: expect.stringContaining('sides') })
    const accepted = await virtiod(args.with(-2, 'sides=20'), { cwd: project })
    expect(accepted).toMatchObject({ code: 0, stderr: '' })
  })
})

describe('is refused', () => {
  test.each(['Dice', 'two--dice', './dice', 'x'.repeat(65), ''])('the name "%s"', async (name) => {
    const { code, stderr } = await virtiod(['new', '--', name], { cwd: dir })
    expect(code).toBe(2)
    expect(stderr).toContain(`virtiod: NAME: "${name}" can't be the name of a device. Give lower-case letters`)
  })

  test('a directory that has something, and nothing in it changes', async () => {
    const target = join(dir, 'full')
    mkdirSync(target)
    writeFileSync(join(target, 'device.ts'), 'mine')
    const { code, stderr } = await virtiod(['new', 'dice', target])
    expect({ code, stderr }).toEqual({
      code: 2,
      stderr: `virtiod: ${target}: the directory is not empty. Give another name or directory.\n`,
    })
    expect(readdirSync(target)).toEqual(['device.ts'])
    expect(readFileSync(join(target, 'device.ts'), 'utf8')).toBe('mine')
  })

  test('a file in its place', async () => {
    writeFileSync(join(dir, 'file'), '')
    const { code, stderr } = await virtiod(['new', 'dice', join(dir, 'file')])
    expect(code).toBe(2)
    expect(stderr).toContain('cannot be written (EEXIST)')
  })

  test('a place where no directory can be made', async () => {
    const { code, stderr } = await virtiod(['new', 'dice', '/proc/dice/below'])
    expect(code).toBe(2)
    expect(stderr).toContain('cannot be written (ENOENT)')
  })

  test('no name', async () => {
    const { code, stderr } = await virtiod(['new'], { cwd: dir })
    expect(code).toBe(2)
    expect(stderr).toContain('NAME')
  })
})

test('an empty directory is taken, and nothing is said of changing into it', async () => {
  const target = join(dir, 'empty')
  mkdirSync(target)
  const { code, stdout } = await virtiod(['new', 'dice', '.'], { cwd: target })
  expect(code).toBe(0)
  expect(stdout).toMatch(/^Here has package\.json/)
  expect(stdout).not.toContain('  cd ')
  expect(existsSync(join(target, 'device.ts'))).toBe(true)
})

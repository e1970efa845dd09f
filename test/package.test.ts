/**
 * The published package: `npm pack` here, `npm install` of the tarball elsewhere; it runs, it has types, it starts within
 * its budget. Compiles the addon once more, like every installation.
 */
import { execFile } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { Running } from './cli/spawn.ts'

const run = promisify(execFile)
const root = fileURLToPath(new URL('..', import.meta.url))
const dir = mkdtempSync(join(tmpdir(), 'virtiod-package-'))
const home = join(dir, 'consumer')
const installed = join(home, 'node_modules', 'virtiod')
afterAll(() => rmSync(dir, { recursive: true, force: true }))

/** From start to a bound socket, in milliseconds; and resident memory of an idle daemon with one device, in bytes. */
const START_BUDGET_MS = 150
const IDLE_BUDGET_BYTES = 100e6
/** What `node -e 0` takes on the machine that the budget is meant for. */
const BARE_NODE_MS = 30

async function bareStart(): Promise<number> {
  const before = performance.now()
  await run(process.execPath, ['-e', '0'])
  return performance.now() - before
}

let packed: string[] = []

beforeAll(async () => {
  const { stdout } = await run('npm', ['pack', '--json', '--pack-destination', dir], { cwd: root })
  // prepack prints before the JSON does.
  const [report] = JSON.parse(stdout.slice(stdout.indexOf('[\n'))) as { filename: string; files: { path: string }[] }[]
  packed = report!.files.map(({ path }) => path)
  mkdirSync(home)
  writeFileSync(join(home, 'package.json'), '{ "private": true, "type": "module" }')
  const tarball = join(dir, report!.filename)
  await run('npm', ['install', '--prefer-offline', '--no-audit', '--no-fund', tarball], { cwd: home })
}, 180_000)

test('has what it needs and nothing else', () => {
  expect(packed).toEqual(
    expect.arrayContaining([
      'LICENSE',
      'package.json',
      'CMakeLists.txt',
      'bin/virtiod.js',
      'native/addon.cc',
      'dist/src/cli/main.js',
      'dist/src/index.d.ts',
      'dist/src/device/index.d.ts',
      'dist/devices/blk/queue.js',
    ])
  )
  const inside = packed.filter((path) => /^(src|test|devices|build|node_modules|\.)/.test(path))
  expect(inside).toEqual(['devices/README.md'])
  const sources = packed.filter((path) => path.endsWith('.ts') && !path.endsWith('.d.ts'))
  // The device modules among the examples are there to be copied.
  expect(sources.filter((path) => !path.startsWith('examples/devices/'))).toEqual([])
  expect(sources).toContain('examples/devices/faulty-disk.ts')
})

test('its command runs', async () => {
  const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as { version: string }
  const { stdout } = await run(join(home, 'node_modules', '.bin', 'virtiod'), ['--version'], { cwd: home })
  expect(stdout).toMatch(new RegExp(`^virtiod ${version}, Node `))
})

test('a program that uses it type-checks and runs', async () => {
  writeFileSync(
    join(home, 'consumer.ts'),
    `import { ConfigError, createLogger, Daemon, type DaemonConfig, parseConfig } from 'virtiod'
import { API_VERSION, type DeviceDefinition, featureSet } from 'virtiod/device'
import { VIRTIO_BLK_F_FLUSH } from 'virtiod/device/virtio-blk'

export const version: DeviceDefinition['apiVersion'] = API_VERSION
const config: DaemonConfig = await parseConfig('devices: [{type: blk, socket-path: s, blk-file: /no/such}]', 'a.yaml')
const problem = await Daemon.check(config, createLogger('silent')).catch((error: unknown) => error)
console.log(problem instanceof ConfigError && problem.option, featureSet(VIRTIO_BLK_F_FLUSH))
// @ts-expect-error: types are not any
export const wrong: number = config.devices[0]!.name
`
  )
  const compilerOptions = {
    target: 'es2024',
    lib: ['esnext'],
    module: 'nodenext',
    strict: true,
    exactOptionalPropertyTypes: true,
    types: ['node'],
    typeRoots: [join(root, 'node_modules', '@types')],
  }
  writeFileSync(join(home, 'tsconfig.json'), JSON.stringify({ compilerOptions, files: ['consumer.ts'] }))
  await run(join(root, 'node_modules', '.bin', 'tsc'), ['-p', home]).catch((error: { stdout: string }) => {
    throw new Error(error.stdout)
  })
  const { stdout } = await run(process.execPath, ['consumer.js'], { cwd: home })
  expect(stdout).toBe('--blk-file 512n\n')
})

describe('starts within its budget', () => {
  test('of time and of memory', async () => {
    const image = join(dir, 'disk.img')
    writeFileSync(image, Buffer.alloc(1 << 20))
    const times: number[] = []
    const bare: number[] = []
    const memory: number[] = []
    // The best of some, and in proportion to what Node itself takes: the machine may be slow or have other work.
    for (let round = 0; round < 7; round++) {
      const socket = join(dir, `${round}.sock`)
      bare.push(await bareStart())
      const before = performance.now()
      await using daemon = new Running(['blk', '--socket-path', socket, '--blk-file', image], {
        launcher: join(installed, 'bin', 'virtiod.js'),
      })
      while (!existsSync(socket)) await new Promise((resolve) => setTimeout(resolve, 1))
      times.push(performance.now() - before)
      await new Promise((resolve) => setTimeout(resolve, 200))
      const status = readFileSync(`/proc/${daemon.process.pid}/status`, 'utf8')
      memory.push(Number(/^VmRSS:\s+(\d+) kB/m.exec(status)![1]) * 1024)
      expect((await daemon.stop()).code).toBe(0)
    }
    const slowness = Math.max(1, Math.min(...bare) / BARE_NODE_MS)
    expect(Math.min(...times)).toBeLessThan(START_BUDGET_MS * slowness)
    expect(Math.min(...memory)).toBeLessThan(IDLE_BUDGET_BYTES)
  })
})

test('the addon is the one that was built there', () => {
  expect(readdirSync(join(installed, 'build', 'Release'))).toContain('virtiod_native.node')
})

/**
 * The import arrows of the design: which folder may import which. A file that turns an arrow round fails here.
 */
import { readdirSync, readFileSync } from 'node:fs'
import { dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import { describe, expect, test } from 'vitest'

const root = join(dirname(fileURLToPath(import.meta.url)), '..')

/** Folder → what it may import besides itself: folders, or single files. `''` stands for the files directly in src/. */
const ALLOWED: Readonly<Record<string, readonly string[]>> = {
  'src/virtio': [],
  'src/device': ['src/virtio'],
  'src/ops': ['src/device'],
  'src/vhost-user': ['src/virtio', 'src/device', 'src/native.ts'],
  'src/engine': ['src/virtio', 'src/device', 'src/native.ts', 'src/ops/snapshot.ts'],
  'src/frontend': ['src/virtio', 'src/vhost-user/wire.ts', 'src/native.ts'],
  'src/daemon': ['src/ops', 'src/vhost-user', 'src/engine', 'src/virtio', 'src/device', 'devices'],
  // For tests of devices; nothing of virtiod's own imports it.
  'src/testing': ['src/frontend', 'src/daemon', 'src/device', 'src/virtio'],
  'src/cli': ['src/daemon', 'src/ops', 'src/device', 'src/frontend'],
  src: ['src/daemon', 'src/ops', 'src/device', 'src/native.ts'],
  // What package.json exports to strangers below ./device.
  devices: [
    'src/device/index.ts',
    'src/device/virtio-blk.ts',
    'src/device/virtio-net.ts',
    'src/device/virtio-scsi.ts',
    'src/device/virtio-input.ts',
  ],
}

/** What blk and scsi have in common. */
const DISK = 'disk'

/** What may come from npm, so that the layers below stay free of it. Folders that are not listed may use anything. */
const PACKAGES: Readonly<Record<string, readonly string[]>> = {
  'src/virtio': [],
  'src/device': ['valibot'],
  'src/engine': ['eventemitter3'],
  'src/frontend': [],
  // No test runner.
  'src/testing': [],
}

interface Import {
  /** Path of the importing file, from the root. */
  readonly from: string
  /** Path of the imported file from the root, or a bare specifier. */
  readonly to: string
}

function importsOf(file: string, text: string): Import[] {
  const code = text.replace(/\/\*[\s\S]*?\*\//g, '').replace(/^\s*\/\/.*$/gm, '')
  const specifiers = [
    ...code.matchAll(/\b(?:from|import)\s*\(?\s*'([^']+)'/g),
    ...code.matchAll(/new URL\(\s*'(\.[^']+)'\s*,\s*import\.meta\.url/g),
  ].map((match) => match[1]!)
  return specifiers.map((to) => ({ from: file, to: to.startsWith('.') ? join(dirname(file), to) : to }))
}

/** What is wrong with an import, or undefined. */
function violation({ from, to }: Import): string | undefined {
  const folder = folderOf(from)
  if (to.startsWith('node:')) return undefined
  if (!/^(src|devices)\//.test(to)) {
    if (to.startsWith('..') || /^[a-z-]+\/.*\.[a-z]+$/.test(to) || to === 'package.json') return undefined
    const packages = PACKAGES[folder]
    if (packages === undefined || packages.includes(to)) return undefined
    return `${from} imports the package ${to}`
  }
  if (folderOf(to) === folder && (folder !== 'devices' || deviceOf(from) === deviceOf(to) || deviceOf(to) === DISK))
    return undefined
  if (
    (ALLOWED[folder] ?? []).some((allowed) => to === allowed || (to.startsWith(`${allowed}/`) && allowed !== 'src'))
  ) {
    return undefined
  }
  return `${from} imports ${to}`
}

function folderOf(file: string): string {
  if (file.startsWith('devices/')) return 'devices'
  const [, folder, ...rest] = file.split('/')
  return rest.length === 0 ? 'src' : `src/${folder}`
}

function deviceOf(file: string): string | undefined {
  return file.split('/')[1]
}

function sources(folder: string): string[] {
  return readdirSync(join(root, folder), { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile() && entry.name.endsWith('.ts') && !entry.name.endsWith('.d.ts'))
    .map((entry) => relative(root, join(entry.parentPath, entry.name)))
}

describe('imports go one way', () => {
  const files = [...sources('src'), ...sources('devices')]

  test('in every source file', () => {
    const imports = files.flatMap((file) => importsOf(file, readFileSync(join(root, file), 'utf8')))
    expect(imports.length).toBeGreaterThan(100)
    expect(imports.map(violation).filter((found) => found !== undefined)).toEqual([])
  })

  test('every folder of src/ has its row', () => {
    expect([...new Set(files.map(folderOf))].filter((folder) => !(folder in ALLOWED))).toEqual([])
  })

  test('devices import what strangers can import too', () => {
    const { exports } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as { exports: object }
    const exported = Object.values(exports).map((target: string | { default: string }) =>
      typeof target === 'string' ? target : target.default.replace('./dist/', '').replace(/\.js$/, '.ts')
    )
    expect(exported).toEqual(expect.arrayContaining([...ALLOWED['devices']!]))
  })

  test.each([
    ['src/virtio/x.ts', `import { native } from '../native.ts'`],
    ['src/virtio/x.ts', `import * as v from 'valibot'`],
    ['src/engine/x.ts', `import { x } from '../daemon/daemon.ts'`],
    ['src/engine/x.ts', `export * from '../vhost-user/session.ts'`],
    ['src/cli/commands/x.ts', `const { native } = await import('../../native.ts')`],
    ['src/cli/x.ts', `import '../vhost-user/wire.ts'`],
    ['src/frontend/x.ts', `import { x } from '../vhost-user/session.ts'`],
    ['src/ops/x.ts', `import type { X } from '../daemon/config.ts'`],
    ['src/daemon/x.ts', `import { connect } from '../testing/front-end.ts'`],
    ['src/testing/x.ts', `import { test } from 'vitest'`],
    ['devices/blk/x.ts', `import { x } from '../../src/virtio/chain.ts'`],
    ['devices/blk/x.ts', `import { x } from '../net/index.ts'`],
    ['devices/disk/x.ts', `import { x } from '../blk/index.ts'`],
    ['src/device/index.ts', `import { x } from '../engine/ring.ts'`],
    ['src/vhost-user/x.ts', `new Worker(new URL('../engine/main.ts', import.meta.url))`],
  ])('a forbidden import is found: %s %s', (file, text) => {
    expect(importsOf(file, text).map(violation)).toEqual([expect.stringContaining(`${file} imports `)])
  })

  test.each([
    ['src/cli/x.ts', `import { x } from '../daemon/config.ts'`],
    ['devices/blk/x.ts', `import { x } from './options.ts'`],
    ['devices/blk/x.ts', `import { x } from '../disk/image.ts'`],
    ['devices/blk/x.ts', `import { x } from '../../src/device/index.ts'`],
    ['src/frontend/x.ts', `import { x } from '../vhost-user/wire.ts'`],
    ['src/engine/x.ts', `import { native } from '../native.ts'`],
    ['src/virtio/x.ts', `// import { native } from '../native.ts'`],
  ])('an allowed one passes: %s %s', (file, text) => {
    expect(
      importsOf(file, text)
        .map(violation)
        .filter((found) => found !== undefined)
    ).toEqual([])
  })
})

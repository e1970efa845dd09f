/** What is wrong with a device module, told before anything is served: its file, the line, and what was expected. */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import * as v from 'valibot'
import { afterAll, describe, expect, test } from 'vitest'
import { configuredModule, moduleAddress } from '../../src/daemon/module-config.ts'
import { checkModuleOptions } from '../../src/daemon/module-options.ts'
import { ConfigError } from '../../src/device/errors.ts'
import type { DeviceDefinition } from '../../src/device/index.ts'

const dir = mkdtempSync(join(tmpdir(), 'virtiod-module-'))
afterAll(() => rmSync(dir, { recursive: true, force: true }))

let files = 0

/** A module with this text; its path. */
function moduleFile(text: string, extension = 'ts'): string {
  const path = join(dir, `device${files++}.${extension}`)
  writeFileSync(path, text)
  return path
}

async function configure(module: string, values: Record<string, unknown> = {}, text = false) {
  const given = { values, text, label: '--option ', where: '"virtiod device x --help" lists the options' }
  return await configuredModule({ module, directory: dir, given, watch: false })
}

/** The message and the code of the ConfigError, with `$` for the directory. */
async function refusal(module: string, values: Record<string, unknown> = {}, text = false): Promise<string[]> {
  const error = await configure(module, values, text).then(
    () => undefined,
    (thrown: unknown) => thrown
  )
  if (!(error instanceof ConfigError)) throw error ?? new Error('it was accepted')
  return [error.code, error.message.replaceAll(dir, '$')]
}

/** A module in the short style. @param change lines of the description that come last @param before lines before it */
function short(change = '', before = ''): string {
  return `import { defineDevice } from 'virtiod/device'
import * as v from 'valibot'
${before}
export default defineDevice({
  apiVersion: 1,
  name: 'counter',
  virtioId: 4,
  options: v.strictObject({
    size: v.pipe(v.number(), v.integer(), v.minValue(1), v.maxValue(1048576), v.metadata({ size: true })),
    rate: v.optional(v.number(), 0.5),
    loud: v.optional(v.boolean(), false),
    tag: v.optional(v.array(v.pipe(v.number(), v.integer())), []),
    mode: v.optional(v.picklist(['fast', 'slow']), 'fast'),
    file: v.exactOptional(v.pipe(v.string(), v.metadata({ path: true }))),
  }),
  queues: [{ name: 'requests' }],
  create: () => ({ handle: () => {} }),
  ${change}
})
`
}

/** One that is a definition as the fast style has it. */
function fast(change: string): string {
  return `import * as v from 'valibot'
export default {
  apiVersion: 1, name: 'fast', virtioId: 4, options: v.strictObject({}), operations: ['request'], errors: [],
  open: () => ({}), createQueueHandler: () => ({}),
  ${change}
}
`
}

describe('a module that is all right', () => {
  test('tells its name, its options and its shape; text is converted as the table says', async () => {
    const words = { size: '4K', rate: '-0.25', loud: 'true', tag: ['1', '2'], mode: 'slow', file: 'a/b' }
    const { definition, options, module } = await configure(moduleFile(short()), words, true)
    expect(definition.name).toBe('counter')
    expect(definition.virtioId).toBe(4)
    expect(definition.timeoutMs).toBe(30_000)
    expect(definition.operations).toEqual(['request'])
    const values = { size: 4096, rate: -0.25, loud: true, tag: [1, 2], mode: 'slow', file: 'a/b' }
    expect(options).toEqual(values)
    expect(module.given).toMatchObject({ values, text: false })
  })

  test('may be JavaScript, may be CommonJS-like in its absence of a package.json, and may export more', async () => {
    const { definition } = await configure(moduleFile(`${short()}\nexport const more = 1`, 'mjs'), { size: 1 })
    expect(definition.name).toBe('counter')
    expect((await configure(moduleFile(short(), 'js'), { size: 1 })).definition.name).toBe('counter')
  })

  test('may be an npm package, which has its own valibot or none', async () => {
    const packageDir = join(dir, 'node_modules', 'some-device')
    mkdirSync(packageDir, { recursive: true })
    writeFileSync(join(packageDir, 'package.json'), '{"name":"some-device","type":"module","exports":"./index.js"}')
    writeFileSync(join(packageDir, 'index.js'), short())
    const { definition, module } = await configure('some-device', { size: 1 })
    expect(definition.name).toBe('counter')
    expect(module.address).toMatchObject({ specifier: 'some-device', shown: 'some-device' })
  })

  test('may be CommonJS, with a valibot of its own or none, and has the classes of this virtiod', async () => {
    const text = `const { defineDevice, ConfigError } = require('virtiod/device')
const { blkDevice } = require('virtiod/device/virtio-blk')
const v = require('valibot')
module.exports = defineDevice({
  apiVersion: 1, name: 'counter', ...blkDevice,
  options: v.strictObject({ size: v.pipe(v.number(), v.metadata({ size: true })) }),
  qemu: () => { throw new ConfigError('ERR_X', 'x', 'no', 'Fix.') },
  create: () => ({ handle: () => {} }),
})
`
    const missing = await refusal(moduleFile(text, 'cjs'))
    expect(missing).toEqual(['ERR_OPTION_REQUIRED', '--option size: missing. It is required.'])
    // Of the same class as ours.
    expect(await refusal(moduleFile(text, 'cjs'), { size: 1 })).toEqual(['ERR_X', 'x: no. Fix.'])
    const helper = moduleFile(`module.exports = require('valibot').number()\n`, 'cjs')
    const module = moduleFile(
      short().replace('v.number()', 'number').replace('import * as v', `import number from '${helper}'\nimport * as v`)
    )
    expect((await configure(module, { size: 1 })).definition.name).toBe('counter')
  })

  test('a path of a configuration file is relative to that', async () => {
    const given = { values: { size: 1, file: 'x' }, text: false, file: join(dir, 'sub/v.yaml'), label: '', where: '' }
    const module = moduleFile(short())
    const { options } = await configuredModule({ module, directory: dir, given, watch: true })
    expect(options).toMatchObject({ file: join(dir, 'sub/x') })
  })
})

test('what is a path and what the name of a package', () => {
  for (const path of ['./x.ts', 'x.js', 'x.mjs', '../x', '/x', 'a/b.ts', 'file:///x.ts'])
    expect(moduleAddress(path, '/d').specifier, path).toMatch(/^file:/)
  for (const name of ['some-device', '@scope/device', 'device/sub'])
    expect(moduleAddress(name, '/d'), name).toEqual({ specifier: name, base: 'file:///d/', shown: name })
})

describe('a module that cannot be loaded', () => {
  test.each<[what: string, text: string, extension: string, code: string, message: string]>([
    [
      'a syntax error, TypeScript',
      `const a: number = 1\nexport default {\n  name: 'x'\n  size: 3,\n}\n`,
      'ts',
      'ERR_DEVICE_MODULE',
      `$/FILE:4:3: SyntaxError: Expected ',', got 'ident'. Correct it. The line is: size: 3,`,
    ],
    [
      'a syntax error, JavaScript',
      `export default {\n  name: 'x'\n  size: 3,\n}\n`,
      'mjs',
      'ERR_DEVICE_MODULE',
      `$/FILE:3:3: SyntaxError: Unexpected identifier 'size'. Correct it. The line is: size: 3,`,
    ],
    [
      'an enum',
      `enum Kind { A }\nexport default Kind\n`,
      'ts',
      'ERR_DEVICE_MODULE',
      '$/FILE:1:1: TypeScript enum is not supported in strip-only mode. Node removes types and compiles nothing: ' +
        'write it without. The line is: enum Kind { A }',
    ],
    [
      'an import that is not there',
      `import x from './nothing.ts'\nexport default x\n`,
      'ts',
      'ERR_DEVICE_MODULE',
      '$/FILE: it imports $/nothing.ts, which is not there. Write its name with the extension.',
    ],
    [
      'a package that is not there',
      `import x from 'no-such-package'\nexport default x\n`,
      'ts',
      'ERR_DEVICE_MODULE',
      '$/FILE: it imports no-such-package, which is not there. Install it: npm install no-such-package.',
    ],
    [
      'a name that an import does not have',
      `import { defineDevise } from 'virtiod/device'\nexport default defineDevise\n`,
      'ts',
      'ERR_DEVICE_MODULE',
      `$/FILE:1:10: SyntaxError: The requested module 'virtiod/device' does not provide an export named ` +
        `'defineDevise'. Correct it. The line is: import { defineDevise } from 'virtiod/device'`,
    ],
    [
      'an exception',
      `const x: any = undefined\nx.size()\nexport default x\n`,
      'ts',
      'ERR_DEVICE_MODULE',
      `$/FILE:2: it failed while it was loaded: TypeError: Cannot read properties of undefined (reading 'size'). ` +
        'Correct the module.',
    ],
    [
      'an end of the thread',
      `process.exit(7)\n`,
      'ts',
      'ERR_DEVICE_MODULE',
      '$/FILE: it ended its thread while it was loaded (exit code 7). Correct the module.',
    ],
    [
      'no default export',
      `export const device = 1\nexport const other = 2\n`,
      'ts',
      'ERR_DEVICE_DEFINITION',
      '$/FILE: it has no default export, only device, other. Write "export default defineDevice({ … })", with ' +
        'defineDevice of virtiod/device.',
    ],
    [
      'a default export that is nothing of the kind',
      `export default 'device'\n`,
      'ts',
      'ERR_DEVICE_DEFINITION',
      `$/FILE: its default export is no device: expected an object, found 'device'. Write "export default ` +
        'defineDevice({ … })", with defineDevice of virtiod/device.',
    ],
    [
      'another version, fast style',
      fast('apiVersion: 2,'),
      'ts',
      'ERR_DEVICE_API_VERSION',
      '$/FILE: it is written for version 2 of the device contract, and this virtiod has version 1. Adapt the module, ' +
        'or install the virtiod that it was written for.',
    ],
    [
      'wrong fields, fast style: all of them',
      fast(`name: 'My Disk', virtioId: '2', operations: [], timeoutMs: -1, open: 3, createQueueHandler: undefined,`),
      'ts',
      'ERR_DEVICE_DEFINITION',
      `$/FILE: its default export is no device: name: expected lower-case letters and digits, a letter first, found ` +
        `'My Disk'; virtioId: expected a device id, 1 to 65535, found '2'; operations: expected 1 to 8 names, found []; ` +
        'timeoutMs: expected milliseconds, 0 = never, found -1; open: expected a function, found 3; ' +
        'createQueueHandler: expected a function, or queueModule beside it, found nothing. Write "export default ' +
        'defineDevice({ … })", with defineDevice of virtiod/device.',
    ],
  ])('%s', async (_, text, extension, code, message) => {
    const path = moduleFile(text, extension)
    const file = path.slice(dir.length + 1)
    expect(await refusal(path)).toEqual([code, message.replaceAll('FILE', file)])
  })

  test.each([
    ['ts', 'commonjs', 'a.ts', 'Write "type": "module" into its package.json, or give it the ending .mts.'],
    ['js', 'commonjs', 'a.js', 'Write "type": "module" into its package.json, or give it the ending .mjs.'],
    ['cts', 'module', 'b.cts', 'Give it the ending .mts.'],
  ])('ESM syntax in a file that Node takes for CommonJS: %s in a package of type %s', async (_, type, name, fix) => {
    const packageDir = mkdtempSync(join(dir, 'package'))
    const path = join(packageDir, name)
    const shown = path.replace(dir, '$')
    writeFileSync(join(packageDir, 'package.json'), JSON.stringify({ type }))
    const problem = 'it is written as an ES module (import, export), and Node takes it for CommonJS'
    for (const [text, place] of [
      [`import { defineDevice } from 'virtiod/device'\nexport default defineDevice\n`, '1:1'],
      ['const a = 1\nexport default a\n', '2:1'],
      ['const a = await 1\nmodule.exports = a\n', '1:11'],
    ] as const) {
      writeFileSync(path, text)
      const line = text.split('\n')[Number(place[0]) - 1]
      const message = `${shown}:${place}: ${problem}. ${fix} The line is: ${line}`
      expect(await refusal(path)).toEqual(['ERR_DEVICE_MODULE', message])
    }
  })

  test('a syntax error in a file that it imports', async () => {
    const helper = moduleFile('export const a = (\n', 'js')
    const file = helper.slice(dir.length + 1)
    const [code, message] = await refusal(moduleFile(`import { a } from './${file}'\nexport default a\n`))
    expect(code).toBe('ERR_DEVICE_MODULE')
    expect(message).toMatch(new RegExp(`^\\$/${file}:\\d+(:\\d+)?: SyntaxError: Unexpected end of input. Correct it.`))
  })

  test('another version, and a wrong field, in the short style', async () => {
    const [version, versionMessage] = await refusal(moduleFile(short('apiVersion: 2 as any,')))
    expect(version).toBe('ERR_DEVICE_API_VERSION')
    expect(versionMessage).toMatch(/^\$\/device\d+\.ts:4: .*version 2.*version 1/)
    const [field, fieldMessage] = await refusal(moduleFile(short('virtioId: 0,')))
    expect(field).toBe('ERR_DEVICE_MODULE')
    expect(fieldMessage).toMatch(/^\$\/device\d+\.ts:4: .*virtioId/)
  })

  test('it is not there: a file, a package', async () => {
    expect(await refusal(join(dir, 'nothing.ts'))).toEqual([
      'ERR_DEVICE_MODULE',
      '$/nothing.ts: there is no such file. Give the path of a device module, or the name of an installed package.',
    ])
    expect(await refusal('no-such-device')).toEqual([
      'ERR_DEVICE_MODULE',
      'no-such-device: no package of that name is installed in $/. Install it (npm install no-such-device), or give a ' +
        'path: ./no-such-device.',
    ])
  })

  test('a package in TypeScript', async () => {
    const packageDir = join(dir, 'node_modules', 'typed-device')
    mkdirSync(packageDir, { recursive: true })
    writeFileSync(join(packageDir, 'package.json'), '{"name":"typed-device","type":"module","exports":"./index.ts"}')
    writeFileSync(join(packageDir, 'index.ts'), short())
    expect(await refusal('typed-device')).toEqual([
      'ERR_DEVICE_MODULE',
      '$/node_modules/typed-device/index.ts: it is TypeScript inside node_modules, which Node does not run. Build the ' +
        'package to JavaScript, or give the path of a copy outside.',
    ])
  })
})

describe('options', () => {
  const definition = {
    name: 'counter',
    options: v.strictObject({
      size: v.pipe(v.number(), v.integer(), v.minValue(1), v.maxValue(1048576), v.metadata({ size: true })),
      rate: v.optional(v.number(), 0.5),
      loud: v.optional(v.boolean(), false),
      mode: v.optional(v.picklist(['fast', 'slow']), 'fast'),
    }),
  } as unknown as DeviceDefinition

  function check(values: Record<string, string | string[]>): string[] {
    try {
      checkModuleOptions(definition, { values, text: true, label: '--option ', where: '"--help" lists the options' })
    } catch (error) {
      return [(error as ConfigError).code, (error as ConfigError).message]
    }
    return []
  }

  test.each<[what: string, words: Record<string, string | string[]>, code: string, message: string]>([
    ['missing', {}, 'ERR_OPTION_REQUIRED', '--option size: missing. It is required.'],
    [
      'unknown',
      { size: '1', sise: '2' },
      'ERR_OPTION_UNKNOWN',
      '--option sise: unknown option. Did you mean --option size?',
    ],
    [
      'unknown, and like no other',
      { size: '1', zzz: '2' },
      'ERR_OPTION_UNKNOWN',
      '--option zzz: unknown option. "--help" lists the options.',
    ],
    [
      'out of range',
      { size: '2M' },
      'ERR_OPTION_VALUE',
      '--option size: 2097152 is out of range. Give bytes (K, M and G suffixes are understood) from 1 to 1048576.',
    ],
    ['no number', { size: '1', rate: 'x' }, 'ERR_OPTION_VALUE', '--option rate: "x" is not a number. Give a number.'],
    [
      'no switch',
      { size: '1', loud: 'yes' },
      'ERR_OPTION_VALUE',
      '--option loud: "yes" is not allowed. Give true or false.',
    ],
    [
      'no choice',
      { size: '1', mode: 'fats' },
      'ERR_OPTION_VALUE',
      '--option mode: "fats" is not allowed. Give fast or slow. Did you mean fast?',
    ],
    ['twice', { size: ['1', '2'] }, 'ERR_OPTION_DUPLICATE', '--option size: given twice. Give it once.'],
  ])('%s', (_, words, code, message) => {
    expect(check(words)).toEqual([code, message])
  })

  test('are refused by the thread of the module in the same way', async () => {
    const words = { size: '1', sise: '2' }
    expect(await refusal(moduleFile(short()), words, true)).toEqual(check(words))
  })
})

describe('a queue module', () => {
  const withQueue = (name: string) =>
    moduleFile(fast(`createQueueHandler: undefined, queueModule: new URL('./${name}', import.meta.url),`))

  test('is loaded with the module', async () => {
    writeFileSync(join(dir, 'queue.ts'), 'export const createQueueHandler = () => ({})\n')
    expect((await configure(withQueue('queue.ts'))).definition.queueModule?.href).toMatch(/\/queue\.ts$/)
  })

  test.each([
    [
      'is not there',
      'wrong0.ts',
      undefined,
      'ERR_DEVICE_DEFINITION',
      /^\$\/wrong0\.ts: there is no such queueModule\./,
    ],
    [
      'has no handler to make',
      'wrong1.ts',
      'export const x = 1',
      'ERR_DEVICE_DEFINITION',
      /^\$\/wrong1\.ts: it does not export the function createQueueHandler\./,
    ],
    ['is no TypeScript', 'wrong2.ts', 'let = ;\n', 'ERR_DEVICE_MODULE', /^\$\/wrong2\.ts:1(:\d+)?: SyntaxError: /],
    ['throws', 'wrong3.ts', `throw new RangeError('no')`, 'ERR_DEVICE_MODULE', /^\$\/wrong3\.ts:1.*RangeError: no/],
  ])('that %s', async (_, name, text, code, message) => {
    if (text !== undefined) writeFileSync(join(dir, name), text)
    const [found, said] = await refusal(withQueue(name))
    expect(said).toMatch(message)
    expect(found).toBe(code)
  })
})

/** `serve`, several times in one process, and with arguments that are wrong. */
import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, describe, expect, test } from 'vitest'
import { type ServeOptions, serve } from '../../src/daemon/serve.ts'

const module = fileURLToPath(new URL('../fixtures/modules/faulty.ts', import.meta.url))
const dir = mkdtempSync(join(tmpdir(), 'virtiod-serve-'))
afterAll(() => rmSync(dir, { recursive: true, force: true }))

test('twice in one process, one ends, and once more', async () => {
  const start = (name: string) => serve({ module, socketPath: join(dir, name), logLevel: 'warn', name })
  await using first = await start('first')
  await using second = await start('second')
  await first.close()
  expect(existsSync(join(dir, 'first'))).toBe(false)
  expect(existsSync(join(dir, 'second'))).toBe(true)
  await using again = await start('first')
  expect(existsSync(join(dir, 'first'))).toBe(true)
  expect([first, second, again].map(({ name }) => name)).toEqual(['first', 'second', 'first'])
}, 30_000)

describe('arguments', () => {
  const socketPath = join(dir, 'wrong')
  test.each<[what: string, options: unknown, code: string, message: string]>([
    ['none', undefined, 'ERR_OPTION_REQUIRED', 'serve(): no options. Give an object with module and socketPath.'],
    [
      'no module',
      { socketPath },
      'ERR_OPTION_REQUIRED',
      'module: missing. It is required: the device module: a path (./my-device.ts), or the name of an npm package.',
    ],
    ['no socket', { module }, 'ERR_OPTION_REQUIRED', 'socketPath: missing. It is required.'],
    ['a typo', { module, socketPath, option: {} }, 'ERR_OPTION_UNKNOWN', 'option: unknown key. Did you mean options?'],
    [
      'a key like no other',
      { module, socketPath, iothreads: 2 },
      'ERR_OPTION_UNKNOWN',
      'iothreads: unknown key. The keys are module, socketPath, options, watch, logLevel, name.',
    ],
    [
      'a wrong level',
      { module, socketPath, logLevel: 'wran' },
      'ERR_OPTION_VALUE',
      'logLevel: "wran" is not allowed. Give one of fatal, error, warn, info, debug, trace, silent. Did you mean warn?',
    ],
    [
      'a wrong name',
      { module, socketPath, name: 'a b' },
      'ERR_OPTION_VALUE',
      'name: "a b" is not allowed. Give 1 to 64 letters, digits, dots, underscores and hyphens; the first is a letter or a digit.',
    ],
    ['no switch', { module, socketPath, watch: 1 }, 'ERR_OPTION_VALUE', 'watch: 1 is not allowed. Give true or false.'],
    [
      'a module elsewhere',
      { module: new URL('https://example.com/x.js'), socketPath },
      'ERR_OPTION_VALUE',
      'module: https://example.com/x.js is no file. Give a path, a file URL, or the name of a package.',
    ],
  ])('%s', async (_, options, code, message) => {
    await expect(serve(options as ServeOptions)).rejects.toMatchObject({ name: 'ConfigError', code, message })
    expect(existsSync(socketPath)).toBe(false)
  })

  test('may be undefined where they may be missing', async () => {
    const none = { options: undefined, watch: undefined, logLevel: undefined, name: undefined }
    await expect(
      serve({ module: './nothing.ts', socketPath, ...none } as unknown as ServeOptions)
    ).rejects.toMatchObject({ code: 'ERR_DEVICE_MODULE' })
  })
})

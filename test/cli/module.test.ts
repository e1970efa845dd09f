/** `virtiod device`, and what the other commands and the library know of device modules. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, describe, expect, test } from 'vitest'
import { parseArguments } from '../../src/cli/arguments.ts'
import { moduleCommand } from '../../src/cli/commands/module.ts'
import { parseConfig } from '../../src/daemon/config.ts'
import { ConfigError } from '../../src/device/errors.ts'
import { serve } from '../../src/index.ts'
import { eventually, wellBehaved } from '../vhost-user/backend.ts'
import { virtiod } from './spawn.ts'

const path = (name: string): string => fileURLToPath(new URL(name, import.meta.url))
const faulty = path('../fixtures/modules/faulty.ts')
const blk = path('../../devices/blk/index.ts')

const dir = mkdtempSync(join(tmpdir(), 'virtiod-device-'))
afterAll(() => rmSync(dir, { recursive: true, force: true }))
writeFileSync(join(dir, 'disk.img'), new Uint8Array(65536))

const run = (...args: string[]) => virtiod(args, { cwd: dir })

describe('help', () => {
  test('of the command, and of a module', async () => {
    const [command, module] = await Promise.all([run('device', '--help'), run('device', '--name', 'x', blk, '--help')])
    expect(command).toMatchObject({ code: 0, stderr: '' })
    expect(command.stdout).toMatch(/^Usage: virtiod device MODULE --socket-path PATH \[options\]\n/)
    expect(command.stdout).toContain('--option KEY=VALUE')
    expect(command.stdout).not.toContain('Options of')
    expect(module).toMatchObject({ code: 0, stderr: '' })
    expect(module.stdout).toContain(`\nOptions of ${blk}:\n  --option blk-file=PATH\n`)
    expect(module.stdout).toContain('--option read-only=true|false')
  })

  test('of a module that cannot be loaded says why', async () => {
    const { code, stderr } = await run('device', './nothing.ts', '--help')
    expect([code, stderr]).toEqual([
      2,
      `virtiod: ${join(dir, 'nothing.ts').replace(`${dir}/`, '')}: there is no such file. Give the path of a device ` +
        'module, or the name of an installed package.\n',
    ])
  })
})

describe('refused', () => {
  /** The message of the ConfigError, which the command line ends with 2 for. */
  async function refusal(words: readonly string[]): Promise<string> {
    const command = await moduleCommand(words)
    const input = parseArguments(words, command.scopes, command.positionals, command.name)
    return await messageOf(command.run(input))
  }

  async function messageOf(work: Promise<unknown>): Promise<string> {
    const error: unknown = await work.then(
      () => undefined,
      (thrown: unknown) => thrown
    )
    if (!(error instanceof ConfigError)) throw error ?? new Error('it was accepted')
    return error.message
  }

  const socket = ['--socket-path', join(dir, 's.sock')]
  test.each<[what: string, args: string[], message: string]>([
    ['no socket', [faulty], '--socket-path: missing. Give the unix socket to listen on, or "fd" for an inherited one.'],
    [
      'an option without =',
      [faulty, ...socket, '--option', 'fault'],
      '--option: "fault" has no "=". Give it as --option KEY=VALUE.',
    ],
    [
      'an unknown option',
      [faulty, ...socket, '--option', 'falt=1'],
      '--option falt: unknown option. Did you mean --option fault?',
    ],
    [
      'a value that does not fit',
      [blk, ...socket, '--option', 'blk-file=x', '--option', 'num-queues=0'],
      '--option num-queues: 0 is out of range. Give an integer from 1 to 256.',
    ],
    [
      'what open of the module refuses',
      [blk, ...socket, '--option', `blk-file=${dir}/none.img`, '--check-config'],
      `--blk-file: ${dir}/none.img does not exist.`,
    ],
    ['a package that is not there', ['some-device', ...socket], 'some-device: no package of that name is installed in'],
  ])('%s', async (_, args, message) => {
    const refused = await refusal(args)
    expect(refused.startsWith(message), refused).toBe(true)
  })

  test.each([
    ['', 'v.yaml: devices[0].module: missing.'],
    ['  module: ./none.ts\n', `${dir}/none.ts: there is no such file.`],
    [
      `  module: ${faulty}\n  options: {falt: x}\n`,
      `${dir}/v.yaml: devices[0].options.falt: unknown option. Did you mean ${dir}/v.yaml: devices[0].options.fault?`,
    ],
    [`  module: ${faulty}\n  option: {fault: x}\n`, `v.yaml: devices[0].option: unknown key. Did you mean options?`],
  ])('a configuration file: the key is named, %j', async (lines, message) => {
    const text = `devices:\n- type: device\n  socket-path: s.sock\n${lines}`
    expect(await messageOf(parseConfig(text, join(dir, 'v.yaml')))).toContain(message)
  })
})

test('--check-config opens the device and closes it again', async () => {
  const args = ['--socket-path', 's.sock', '--option', 'blk-file=disk.img', '--check-config']
  expect(await run('device', blk, ...args)).toEqual({
    code: 0,
    stdout: 'configuration is valid: 1 device\n',
    stderr: '',
  })
})

test('qemu-args: of a module, and of a file with one', async () => {
  writeFileSync(
    join(dir, 'q.yaml'),
    `devices:\n- {type: device, module: ${faulty}, socket-path: a.sock}\n` +
      `- {type: device, module: ${blk}, socket-path: b.sock, options: {blk-file: disk.img, num-queues: 2}}\n`
  )
  const [one, file] = await Promise.all([
    run('qemu-args', 'device', faulty, '--socket-path', 'a.sock', '--memory', '2G'),
    run('qemu-args', 'q.yaml'),
  ])
  expect(one).toMatchObject({ code: 0, stderr: '' })
  expect(one.stdout).toContain('-m 2G')
  expect(one.stdout).toContain(`path=${dir}/a.sock,reconnect=1`)
  expect(one.stdout).toContain('-device vhost-user-blk-pci,chardev=virtiod-faulty0,num-queues=1')
  expect(file).toMatchObject({ code: 0, stderr: '' })
  expect(file.stdout).toContain('-device vhost-user-blk-pci,chardev=virtiod-blk0,num-queues=2')
})

test('config-schema knows devices of a module', async () => {
  const { stdout } = await run('config-schema')
  const schema = JSON.parse(stdout) as { properties: { devices: { items: { oneOf: object[] } } } }
  const module = schema.properties.devices.items.oneOf.at(-1) as { properties: object; required: string[] }
  expect(module).toMatchObject({ properties: { type: { const: 'device' }, watch: { type: 'boolean' } } })
  expect(Object.keys(module.properties)).toEqual(['type', 'name', 'socket-path', 'fd', 'module', 'options', 'watch'])
  expect(module.required).toEqual(['type', 'module'])
})

describe('serve() in another program', () => {
  test('serves until it is closed', async () => {
    const socket = join(dir, 'program.sock')
    const program = spawn(process.execPath, [path('../fixtures/serving-program.ts'), socket, faulty], {
      stdio: ['pipe', 'pipe', 'inherit'],
    })
    const ended = once(program, 'exit')
    let text = ''
    program.stdout.setEncoding('utf8').on('data', (part: string) => {
      text += part
    })
    try {
      while (!text.includes('serving mine\n')) await Promise.race([once(program.stdout, 'data'), ended])
      wellBehaved(socket)
      program.stdin.end()
      expect(await ended).toEqual([0, null])
      expect(text).toBe('serving mine\nended\n')
      expect(eventually(() => !existsSync(socket))).toBe(true)
    } finally {
      program.kill('SIGKILL')
    }
  })

  test('refuses what the command refuses', async () => {
    const options = { socketPath: join(dir, 'x.sock'), logLevel: 'silent' } as const
    await expect(serve({ ...options, module: './nothing.ts' })).rejects.toMatchObject({ code: 'ERR_DEVICE_MODULE' })
    await expect(serve({ ...options, module: faulty, options: { fault: 1 } })).rejects.toMatchObject({
      name: 'ConfigError',
      code: 'ERR_OPTION_VALUE',
      message: 'options.fault: 1 is not allowed. Give text: write it in quotes, "1".',
    })
    expect(existsSync(options.socketPath)).toBe(false)
  })
})

/** Configuration files and flags → DaemonConfig, and the exact words for what is wrong. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import type { BlkOptions } from '../../devices/blk/options.ts'
import { configFromFlags, type DaemonConfig, loadConfig, parseConfig } from '../../src/daemon/config.ts'
import { deviceNames, devices } from '../../src/daemon/devices.ts'
import { ConfigError } from '../../src/device/errors.ts'

const FILE = '/etc/virtiod/disks.yaml'
const blk = await devices['blk']!.load()
const net = await devices['net']!.load()

async function problem(run: () => unknown): Promise<{ code: string; message: string }> {
  try {
    await run()
  } catch (error) {
    if (error instanceof ConfigError) return { code: error.code, message: error.message }
    throw error
  }
  throw new Error('it was accepted')
}

function only(config: DaemonConfig): { name: string; options: BlkOptions; socket: unknown } {
  expect(config.devices).toHaveLength(1)
  const { name, options, socket } = config.devices[0]!
  return { name, options: options as BlkOptions, socket }
}

describe('flags', () => {
  test('the least', () => {
    const config = configFromFlags(blk, { 'socket-path': 's', 'blk-file': 'f' })
    expect(config).toMatchObject({ logLevel: 'info', iothreads: 1, pollMaxUs: 64 })
    expect(config.metrics).toBeUndefined()
    expect(config.iothreadCpus).toBeUndefined()
    expect(only(config)).toEqual({
      name: 'blk0',
      socket: { path: 's' },
      options: { 'blk-file': 'f', 'read-only': false, cache: 'writeback', 'num-queues': 16, lock: 'on' },
    })
  })

  test('everything', () => {
    const config = configFromFlags(blk, {
      fd: 3,
      'blk-file': 'f',
      'read-only': true,
      cache: 'none',
      'num-queues': 256,
      'queue-size': 32768,
      serial: 'disk 1',
      'block-size': 4096,
      discard: 'off',
      iothreads: 2,
      'iothread-cpus': '0,1',
      'poll-max-us': 0,
      metrics: ':9400',
      'log-level': 'debug',
    })
    expect(config).toMatchObject({
      logLevel: 'debug',
      iothreads: 2,
      iothreadCpus: [[0], [1]],
      pollMaxUs: 0,
      metrics: { host: '127.0.0.1', port: 9400 },
    })
    expect(only(config).socket).toEqual({ fd: 3 })
    expect(only(config).options).toMatchObject({
      'queue-size': 32768,
      serial: 'disk 1',
      'block-size': 4096,
      discard: 'off',
    })
  })

  test.each([
    [
      { 'socket-path': 's' },
      'ERR_OPTION_REQUIRED',
      '--blk-file: missing. It is required: the raw image file or block device to serve.',
    ],
    [
      { 'blk-file': 'f' },
      'ERR_OPTION_REQUIRED',
      '--socket-path: missing. Give the unix socket to listen on, or "fd" for an inherited one.',
    ],
    [
      { 'blk-file': 'f', 'socket-path': 's', fd: 3 },
      'ERR_OPTION_CONFLICT',
      '--fd: it excludes --socket-path. Give one of the two.',
    ],
    [
      { 'blk-file': 'f', fd: 3, 'num-queues': 257 },
      'ERR_OPTION_VALUE',
      '--num-queues: 257 is out of range. Give an integer from 1 to 256.',
    ],
    [
      { 'blk-file': 'f', fd: 3, serial: 'x'.repeat(21) },
      'ERR_OPTION_VALUE',
      `--serial: "${'x'.repeat(21)}" is not allowed. Give 1 to 20 ASCII characters.`,
    ],
    [
      { 'blk-file': 'f', fd: 3, 'block-size': 1000 },
      'ERR_OPTION_VALUE',
      '--block-size: 1000 is not allowed. Give one of 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536.',
    ],
    [
      { 'blk-file': 'f', 'socket-path': 'x'.repeat(108) },
      'ERR_SOCKET_PATH_LENGTH',
      "--socket-path: the path has 108 bytes and a unix socket's has at most 107. Give a shorter one, for example below /run.",
    ],
  ])('%j is refused', async (values, code, message) => {
    expect(await problem(() => configFromFlags(blk, values))).toEqual({ code, message })
  })
})

describe('several sockets', () => {
  const sockets = { 'socket-path': ['a', 'b'], fd: 5, switch: 'lan' }

  test('are a device each, on a switch', () => {
    const config = configFromFlags(net, { ...sockets, 'queue-pairs': 2, iothreads: 2 })
    expect(config.iothreads).toBe(2)
    expect(config.devices.map(({ name, socket }) => [name, socket])).toEqual([
      ['net0', { path: 'a' }],
      ['net1', { path: 'b' }],
      ['net2', { fd: 5 }],
    ])
    for (const { options } of config.devices) expect(options).toMatchObject({ switch: 'lan', 'queue-pairs': 2 })
  })

  test('one is one, with what is its own', () => {
    const config = configFromFlags(net, { 'socket-path': 'a', switch: 'lan', mac: '52:54:00:12:34:56' })
    expect(config.devices).toHaveLength(1)
    expect(config.devices[0]!.options).toMatchObject({ mac: '52:54:00:12:34:56' })
  })

  test.each([
    [
      { 'socket-path': ['a', 'b'], tap: 't' },
      'ERR_OPTION_DUPLICATE',
      '--socket-path: given twice. Give it once; several sockets need --switch.',
    ],
    [
      { fd: [3, 4], tap: 't' },
      'ERR_OPTION_DUPLICATE',
      '--fd: given twice. Give it once; several sockets need --switch.',
    ],
    [
      { 'socket-path': 'a', fd: 3, tap: 't' },
      'ERR_OPTION_CONFLICT',
      '--fd: it excludes --socket-path. Give one of the two.',
    ],
    [
      { ...sockets, mac: '52:54:00:12:34:56' },
      'ERR_OPTION_CONFLICT',
      `--mac: it is one device's, and there are 3 sockets. Give each device its own in a file, for "virtiod run".`,
    ],
    [
      { ...sockets, pcap: 'f' },
      'ERR_OPTION_CONFLICT',
      `--pcap: it is one device's, and there are 3 sockets. Give each device its own in a file, for "virtiod run".`,
    ],
    [
      { 'socket-path': ['a', './a'], switch: 'lan' },
      'ERR_OPTION_DUPLICATE',
      '--socket-path: ./a is given twice. Give each device its own.',
    ],
    [
      { 'socket-path': 'a', switch: 'lan', tap: 't' },
      'ERR_OPTION_CONFLICT',
      '--switch: it excludes tap. Give one of tap, tap-fd and switch.',
    ],
    [
      { 'socket-path': 'a' },
      'ERR_OPTION_REQUIRED',
      '--tap: missing. Give tap for a tap of the host, tap-fd for an open one, or switch, which needs no root.',
    ],
    [
      { 'socket-path': 'a', tap: 'x'.repeat(16) },
      'ERR_OPTION_VALUE',
      `--tap: "${'x'.repeat(16)}" is not allowed. Give 1 to 15 ASCII characters without space, slash, colon and percent sign.`,
    ],
  ])('%j is refused', async (values, code, message) => {
    expect(await problem(() => configFromFlags(net, values))).toEqual({ code, message })
  })
})

describe('files', () => {
  test('cards of a switch, each with its own', async () => {
    const config = await parseConfig(
      `devices:
  - { type: net, socket-path: a, switch: lan, mac: 52:54:00:00:00:01, pcap: a.pcap, pcap-size: 1048576 }
  - { type: net, socket-path: b, switch: lan, mac: 52:54:00:00:00:02, uplink: tap0 }
  - { type: net, socket-path: c, tap-fd: "3", queue-pairs: 1 }
`,
      FILE
    )
    expect(config.devices.map(({ name }) => name)).toEqual(['net0', 'net1', 'net2'])
    expect(config.devices.map(({ options }) => options)).toMatchObject([
      { mac: '52:54:00:00:00:01', pcap: '/etc/virtiod/a.pcap', 'pcap-size': 1048576, 'pcap-files': 4 },
      { mac: '52:54:00:00:00:02', uplink: 'tap0' },
      { 'tap-fd': '3' },
    ])
  })

  test.each([
    ['tap: a, switch: b', 'ERR_OPTION_CONFLICT', 'switch: it excludes tap. Give one of tap, tap-fd and switch.'],
    ['tap-fd: 3', 'ERR_OPTION_VALUE', 'tap-fd: 3 is not allowed. Give text: write it in quotes, "3".'],
    ['tap: a, mtu: 67', 'ERR_OPTION_VALUE', 'mtu: 67 is out of range. Give an integer from 68 to 65535.'],
  ])('a card with %s is refused', async (options, code, message) => {
    const text = `devices:\n - {type: net, socket-path: s, ${options}}`
    expect(await problem(() => parseConfig(text, FILE))).toEqual({ code, message: `${FILE}: devices[0].${message}` })
  })

  test('YAML: paths are relative to the file, names are counted', async () => {
    const config = await parseConfig(
      `# two disks
log-level: warn
metrics: 127.0.0.1:9400
iothreads: 2
devices:
  - type: blk
    socket-path: a.sock
    blk-file: images/a.img
  - type: blk
    name: data
    socket-path: /run/b.sock
    blk-file: ../b.img
    read-only: true
    discard: off
  - { type: blk, fd: 5, blk-file: /c.img }
`,
      FILE
    )
    expect(config).toMatchObject({ logLevel: 'warn', iothreads: 2, metrics: { host: '127.0.0.1', port: 9400 } })
    expect(config.devices.map(({ name, socket }) => [name, socket])).toEqual([
      ['blk0', { path: '/etc/virtiod/a.sock' }],
      ['data', { path: '/run/b.sock' }],
      ['blk2', { fd: 5 }],
    ])
    expect(config.devices.map(({ options }) => (options as BlkOptions)['blk-file'])).toEqual([
      '/etc/virtiod/images/a.img',
      '/etc/b.img',
      '/c.img',
    ])
    expect(config.devices[1]!.options).toMatchObject({ 'read-only': true, discard: 'off' })
  })

  test('JSON, by its content or by its name', async () => {
    const text = '{"devices": [{"type": "blk", "socket-path": "a", "blk-file": "b"}]}'
    for (const file of ['/x/c.json', '/x/c.conf']) {
      expect(only(await parseConfig(text, file))).toMatchObject({ name: 'blk0', socket: { path: '/x/a' } })
    }
  })

  const device = 'type: blk, socket-path: s, blk-file: f'
  test.each([
    ['', 'ERR_OPTION_VALUE', ': it holds no keys and values. Start with the key "devices".'],
    ['- a', 'ERR_OPTION_VALUE', ': it holds no keys and values. Start with the key "devices".'],
    ['iothreads: 1', 'ERR_OPTION_REQUIRED', ': devices: missing. Give a list of at least one device.'],
    ['devices: []', 'ERR_OPTION_VALUE', ': devices: no list of devices. Give a list of at least one device.'],
    ['devices: [blk]', 'ERR_OPTION_VALUE', ': devices[0]: it is no device. Give keys and values, "type" among them.'],
    ['devices:\n - {}', 'ERR_OPTION_REQUIRED', ': devices[0].type: missing. It is required: what to serve.'],
    ['devices:\n - {tpye: blk}', 'ERR_OPTION_UNKNOWN', ': devices[0].tpye: unknown key. Did you mean type?'],
    [
      'devices:\n - {type: bkl}',
      'ERR_OPTION_VALUE',
      `: devices[0].type: "bkl" is not allowed. Give one of ${[...deviceNames, 'device'].join(', ')}. Did you mean blk?`,
    ],
    [
      `devices:\n - {${device}}\n - {type: blk, blk-fil: x}`,
      'ERR_OPTION_UNKNOWN',
      ': devices[1].blk-fil: unknown key. Did you mean blk-file?',
    ],
    [`devices:\n - {${device}}\niothread: 2`, 'ERR_OPTION_UNKNOWN', ': iothread: unknown key. Did you mean iothreads?'],
    [
      `devices:\n - {${device}, zzzzzz: 1}`,
      'ERR_OPTION_UNKNOWN',
      ': devices[0].zzzzzz: unknown key. "virtiod config-schema" prints the keys.',
    ],
    [
      `devices:\n - {${device}, serial: 12}`,
      'ERR_OPTION_VALUE',
      ': devices[0].serial: 12 is not allowed. Give text: write it in quotes, "12".',
    ],
    [
      `devices:\n - {${device}, num-queues: "4"}`,
      'ERR_OPTION_VALUE',
      ': devices[0].num-queues: "4" is not an integer. Give an integer from 1 to 256.',
    ],
    [
      `devices:\n - {${device}, read-only: 1}`,
      'ERR_OPTION_VALUE',
      ': devices[0].read-only: 1 is not allowed. Give true or false.',
    ],
    [
      `devices:\n - {${device}, name: "a b"}`,
      'ERR_OPTION_VALUE',
      ': devices[0].name: "a b" is not allowed. Give 1 to 64 letters, digits, dots, underscores and hyphens; the first is a letter or a digit.',
    ],
    [
      `devices:\n - {${device}}\n - {${device}}`,
      'ERR_OPTION_DUPLICATE',
      ': devices[1].socket-path: devices[0] has /etc/virtiod/s already. Give another one.',
    ],
    [
      `devices:\n - {${device}, name: blk1}\n - {type: blk, fd: 3, blk-file: g}`,
      'ERR_OPTION_DUPLICATE',
      ': devices[1].name: devices[0] has blk1 already. Give another one.',
    ],
    ['a: 1\na: 2', 'ERR_CONFIG_SYNTAX', ': Map keys must be unique at line 2, column 1. It has to be YAML, or JSON.'],
    [
      'devices:\n  - {',
      'ERR_CONFIG_SYNTAX',
      ': Flow map in block collection must be sufficiently indented and end with a } at line 2, column 6. It has to be YAML, or JSON.',
    ],
    [
      'a: *b',
      'ERR_CONFIG_SYNTAX',
      ': Unresolved alias (the anchor must be set before the alias): b. It has to be YAML, or JSON.',
    ],
  ])('%j is refused', async (text, code, message) => {
    expect(await problem(() => parseConfig(text, FILE))).toEqual({ code, message: FILE + message })
  })

  test('bad JSON says where', async () => {
    const { code, message } = await problem(() => parseConfig('{"devices": [}', '/x/c.json'))
    expect(code).toBe('ERR_CONFIG_SYNTAX')
    expect(message).toMatch(/^\/x\/c\.json: Unexpected token .* It has to be YAML, or JSON\.$/)
  })

  describe('on disk', () => {
    let dir = ''
    beforeAll(() => {
      dir = mkdtempSync(join(tmpdir(), 'virtiod-config-'))
    })
    afterAll(() => rmSync(dir, { recursive: true, force: true }))

    test('is read', async () => {
      const file = join(dir, 'c.yaml')
      writeFileSync(file, 'devices:\n  - type: blk\n    socket-path: s\n    blk-file: f\n')
      expect(only(await loadConfig(file)).socket).toEqual({ path: join(dir, 's') })
    })

    test('is missing, or a directory', async () => {
      const fix = 'Give a YAML or JSON file that you may read.'
      expect(await problem(() => loadConfig(join(dir, 'no')))).toEqual({
        code: 'ERR_CONFIG_READ',
        message: `${join(dir, 'no')}: there is no such file. ${fix}`,
      })
      expect((await problem(() => loadConfig(dir))).message).toBe(`${dir}: cannot read it (EISDIR). ${fix}`)
    })
  })
})

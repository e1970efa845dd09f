/** The command line as a user meets it: a process, its output and its exit code. */
import { execFileSync, spawn } from 'node:child_process'
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import { commands } from '../../src/cli/commands.ts'
import { HELP_COLUMNS, optionUsage } from '../../src/cli/help.ts'
import { optionsOf } from '../../src/daemon/option-table.ts'
import { checkoutLauncher, virtiod } from './spawn.ts'

const dir = mkdtempSync(join(tmpdir(), 'virtiod-cli-'))
afterAll(() => rmSync(dir, { recursive: true, force: true }))
const version = (
  JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')) as { version: string }
).version
const image = join(dir, 'disk.img')
writeFileSync(image, Buffer.alloc(1 << 20))

async function usageError(args: readonly string[]): Promise<string> {
  const { code, stdout, stderr } = await virtiod(args)
  expect([code, stdout]).toEqual([2, ''])
  expect(stderr.trimEnd().split('\n').length).toBeLessThanOrEqual(2)
  return stderr
}

describe('help', () => {
  test('the program lists every command', async () => {
    const { code, stdout, stderr } = await virtiod(['--help'])
    expect([code, stderr]).toEqual([0, ''])
    for (const name of Object.keys(commands)) expect(stdout).toMatch(new RegExp(`^ {2}${name} `, 'm'))
    expect((await virtiod(['help'])).stdout).toBe(stdout)
    expect((await virtiod(['-h'])).stdout).toBe(stdout)
  })

  test.each(Object.keys(commands))('%s documents every option, in lines that fit', async (name) => {
    const { code, stdout, stderr } = await virtiod([name, '--help'])
    expect([code, stderr]).toEqual([0, ''])
    expect(stdout).toMatch(new RegExp(`^Usage: virtiod ${name}`))
    const command = await commands[name]!.load([])
    for (const info of command.scopes.flatMap(({ table }) => optionsOf(table))) {
      expect(stdout).toContain(`  ${optionUsage(info)}`)
      expect(info.description, info.name).toMatch(/^[A-Z]\S* .*[^.]$/)
    }
    for (const line of stdout.split('\n')) expect(line.length, line).toBeLessThanOrEqual(HELP_COLUMNS)
  })

  test('wins over errors in the rest of the line', async () => {
    expect((await virtiod(['blk', '--frobnicate', '--help'])).code).toBe(0)
    expect((await virtiod(['help', 'blk'])).stdout).toMatch(/^Usage: virtiod blk/)
  })
})

test('--version, with or without a command', async () => {
  const expected = `virtiod ${version}, Node ${process.versions.node}, Node-API ${process.versions['napi']}\n`
  expect(await virtiod(['--version'])).toEqual({ code: 0, stdout: expected, stderr: '' })
  expect((await virtiod(['blk', '--version'])).stdout).toBe(expected)
})

test('--print-capabilities ignores everything else (vhost-user.rst "Backend program conventions")', async () => {
  const { code, stdout, stderr } = await virtiod(['blk', '--fd=77', '--frobnicate', '--print-capabilities', 'x'])
  expect([code, stderr]).toEqual([0, ''])
  expect(JSON.parse(stdout)).toEqual({ type: 'block', features: ['read-only', 'blk-file'] })
})

test('--print-capabilities of a network card', async () => {
  expect(JSON.parse((await virtiod(['net', '--print-capabilities'])).stdout)).toEqual({ type: 'net' })
})

describe('mistakes', () => {
  const flags = ['--socket-path', join(dir, 's'), '--blk-file', image]

  test.each([
    [[], 'virtiod: COMMAND: missing. "virtiod --help" lists the commands.\n'],
    [['bkl'], 'virtiod: bkl: unknown command. Did you mean blk?\n'],
    [['frobnicate'], 'virtiod: frobnicate: unknown command. "virtiod --help" lists the commands.\n'],
    [['--blk-file', 'x'], 'virtiod: --blk-file: the command comes first. "virtiod --help" lists the commands.\n'],
    [['constructor'], 'virtiod: constructor: unknown command. "virtiod --help" lists the commands.\n'],
    [['blk', '--blk-fil', 'x'], 'virtiod: --blk-fil: unknown option. Did you mean --blk-file?\n'],
    [
      ['blk', ...flags, '--cache', 'writback'],
      'virtiod: --cache: "writback" is not allowed. Give one of none, writethrough, writeback, unsafe. Did you mean writeback?\n',
    ],
    [
      ['blk', ...flags, '--num-queues', '0'],
      'virtiod: --num-queues: 0 is out of range. Give an integer from 1 to 256.\n',
    ],
    [
      ['blk', ...flags, '--iothreads', '2', '--iothread-cpus', '0,0,0'],
      'virtiod: --iothread-cpus: 3 items for 2 iothreads. Give one item per iothread, or a single one for all; 0-3 or 0+2 is one item of several processors.\n',
    ],
    [
      ['blk', ...flags, '--metrics', '9400'],
      'virtiod: --metrics: "9400" is no address. Give HOST:PORT such as 127.0.0.1:9400 or [::1]:9400, :PORT for loopback only, or unix:PATH.\n',
    ],
    [['run'], 'virtiod: CONFIG: missing. Give a YAML or JSON file; "virtiod run --help" tells more.\n'],
    [
      ['run', '/no/such.yaml'],
      'virtiod: /no/such.yaml: there is no such file. Give a YAML or JSON file that you may read.\n',
    ],
    [
      ['qemu-args', 'blk', '--fd', '3', '--blk-file', image],
      "virtiod: --socket-path: missing: QEMU can't connect to an fd. Give the path of the socket that the fd belongs to.\n",
    ],
  ])('%j', async (args, message) => {
    expect(await usageError(args)).toBe(message)
  })

  test('a configuration file is refused with the path of the key', async () => {
    const file = join(dir, 'bad.yaml')
    writeFileSync(file, 'devices:\n  - type: blk\n    socket-path: s\n    blk-fil: x\n')
    const message = `virtiod: ${file}: devices[0].blk-fil: unknown key. Did you mean blk-file?\n`
    expect(await usageError(['run', file])).toBe(message)
    expect(await usageError(['run', file, '--check-config'])).toBe(message)
    expect(await usageError(['qemu-args', file])).toBe(message)
  })
})

describe('--check-config', () => {
  test('is content, and binds nothing', async () => {
    const socket = join(dir, 'check.sock')
    const flags = ['--socket-path', socket, '--blk-file', image, '--check-config']
    const expected = { code: 0, stdout: 'configuration is valid: 1 device\n', stderr: '' }
    expect(await virtiod(['blk', ...flags])).toEqual(expected)
    const file = join(dir, 'good.yaml')
    writeFileSync(file, 'devices:\n  - type: blk\n    socket-path: check.sock\n    blk-file: disk.img\n')
    expect(await virtiod(['run', file, '--check-config'])).toEqual(expected)
    expect(existsSync(socket)).toBe(false)
  })

  test('opens the files', async () => {
    const message = await usageError(['blk', '--socket-path', 's', '--blk-file', join(dir, 'no'), '--check-config'])
    expect(message).toMatch(/^virtiod: --blk-file: /)
  })
})

test('config-schema is JSON', async () => {
  const { code, stdout } = await virtiod(['config-schema'])
  expect(code).toBe(0)
  expect(JSON.parse(stdout)).toMatchObject({ title: 'virtiod configuration', required: ['devices'] })
})

test('qemu-args, from flags and from a file', async () => {
  const flags = ['--socket-path', '/run/v.sock', '--blk-file', image]
  const { code, stdout, stderr } = await virtiod(['qemu-args', 'blk', ...flags, '--num-queues', '4', '--memory', '2G'])
  expect([code, stderr]).toEqual([0, ''])
  expect(stdout).toMatch(/^ {2}-m 2G \\\n {2}-object memory-backend-memfd,.*size=2G,share=on \\\n/)
  expect(stdout).toContain('-chardev socket,id=virtiod-blk0,path=/run/v.sock,reconnect=1 \\\n')
  expect(stdout).toMatch(/ {2}-device vhost-user-blk-pci,chardev=virtiod-blk0,.*num-queues=4.*\n$/)
  const withoutType = await virtiod(['qemu-args', ...flags, '--num-queues', '4', '--memory', '2G'])
  expect(withoutType).toEqual({ code: 0, stdout, stderr: '' })
  const file = join(dir, 'qemu.yaml')
  writeFileSync(file, 'devices:\n  - {type: blk, name: root, socket-path: a.sock, blk-file: disk.img}\n')
  expect((await virtiod(['qemu-args', file])).stdout).toContain(
    `id=virtiod-root,path=${join(dir, 'a.sock')},reconnect=1`
  )
})

describe('qemu-args of network cards', () => {
  const cards = (stdout: string): string[] => stdout.match(/-device virtio-net-pci.*?(?= \\$|$)/gm) ?? []

  test('give each its own MAC, which stays', async () => {
    const sockets = ['/run/a.sock', '/run/b.sock'].flatMap((path) => ['--socket-path', path])
    const { code, stdout, stderr } = await virtiod(['qemu-args', 'net', ...sockets, '--switch', 'lan'])
    expect([code, stderr]).toEqual([0, ''])
    expect(stdout).toContain('-netdev vhost-user,id=virtiod-net1,chardev=virtiod-net1,queues=1 \\\n')
    const macs = cards(stdout).map((line) => /,mac=(52:54:00(:[0-9a-f]{2}){3}),/.exec(line)?.[1])
    expect(new Set(macs).size).toBe(2)
    expect(macs).not.toContain(undefined)
    const second = await virtiod(['qemu-args', 'net', '--socket-path', '/run/b.sock', '--switch', 'lan'])
    expect(cards(second.stdout)).toEqual([cards(stdout)[1]!.replace('net1', 'net0')])
  })

  test('touch no tap, no fd, no capture', async () => {
    const pcap = join(dir, 'live.pcap')
    writeFileSync(pcap, 'precious')
    const flags = ['--tap', 'virtiodnone0', '--bridge', 'virtiodnone1', '--mtu', '9000', '--mac', '52:54:00:12:34:56']
    const run = await virtiod(['qemu-args', 'net', '--socket-path', 's', ...flags, '--pcap', pcap])
    expect([run.code, run.stderr]).toEqual([0, ''])
    expect(cards(run.stdout)[0]).toMatch(/,mac=52:54:00:12:34:56,.*,host_mtu=9000/)
    expect(readFileSync(pcap, 'latin1')).toBe('precious')
    const fds = await virtiod(['qemu-args', 'net', '--socket-path', 's', '--tap-fd', '0,1,2', '--uplink', 'x'])
    expect(fds.stderr).toBe(
      "virtiod: --uplink: it is a switch's, and here is tap-fd. Give switch, or leave uplink away.\n"
    )
    const inherited = await virtiod(['qemu-args', 'net', '--socket-path', 's', '--tap-fd', '0,1,2'])
    expect(inherited).toMatchObject({ code: 0, stderr: '' })
    expect(inherited.stdout).toContain('queues=3')
  })
})

test('a reader that goes away is no failure', async () => {
  const shell = spawn('sh', ['-c', `"${process.execPath}" "${checkoutLauncher}" config-schema; echo "code $?" >&2`], {
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  shell.stdout.destroy()
  let stderr = ''
  for await (const chunk of shell.stderr.setEncoding('utf8')) stderr += chunk
  expect(stderr).toBe('code 0\n')
})

const oldNode = ['/usr/bin/node', '/usr/local/bin/node'].find(
  (path) =>
    existsSync(path) && Number.parseInt(execFileSync(path, ['--version'], { encoding: 'utf8' }).slice(1), 10) < 24
)

test.skipIf(oldNode === undefined)('a Node that is too old is told so in one sentence', async () => {
  const { code, stdout, stderr } = await virtiod(['--version'], { node: oldNode! })
  expect([code, stdout]).toEqual([2, ''])
  expect(stderr).toMatch(/^virtiod: it needs Node 24\.16 or newer, and this is v\d+\.\S+\. Install one from .*\n$/)
})

test('the launcher asks for the Node that package.json asks for', () => {
  const { engines } = JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')) as {
    engines: { node: string }
  }
  expect(readFileSync(checkoutLauncher, 'utf8')).toContain(`it needs Node ${engines.node.replace('>=', '')} or newer`)
})

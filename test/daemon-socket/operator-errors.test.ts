/**
 * What an operator can get wrong: exit code 2, one message that names the option and says what to do, and nothing
 * left behind, whether it is a socket file or a lock.
 */
import { spawn } from 'node:child_process'
import {
  closeSync,
  existsSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { Connection } from '../../src/frontend/connection.ts'
import { Session } from '../../src/frontend/session.ts'
import { native } from '../../src/native.ts'
import { VIRTIO_BLK_S_IOERR, VIRTIO_BLK_T_OUT } from '../../src/virtio/blk.ts'
import { type Result, Running, virtiod } from '../cli/spawn.ts'
import { driverOf, mustServe, open, wellBehaved } from '../vhost-user/backend.ts'

let dir: string
let image: string
let socket: string
beforeEach(() => {
  dir = mkdtempSync(join(tmpdir(), 'virtiod-op-'))
  image = join(dir, 'disk.img')
  socket = join(dir, 'disk.sock')
  writeFileSync(image, Buffer.alloc(1 << 20))
})
afterEach(() => rmSync(dir, { recursive: true, force: true }))

const main = fileURLToPath(new URL('../../src/cli/main.ts', import.meta.url))

/** Exit code 2, nothing on stdout but log lines below error, one line that begins with the option, and a fix. */
function expectRefused({ code, stdout, stderr }: Result, option: string): void {
  // Device options come with the device's name in front, which matters where a file configures several.
  expect(stderr).toMatch(new RegExp(`^virtiod: (blk0: )?${option}: [^\\n]+\\. [A-Z][^\\n]+\\n$`))
  expect(stderr).not.toMatch(/\n\s+at /)
  expect(stdout).not.toMatch(/"level":"(error|fatal)"/)
  expect(code).toBe(2)
}

/** It holds no lock and no socket: the image can be served, on that path, at once. */
async function expectNothingLeft(path = socket): Promise<void> {
  await using daemon = new Running(['blk', '--socket-path', path, '--blk-file', image])
  await daemon.printed('"ready"')
  expect((await daemon.stop()).code).toBe(0)
  expect(existsSync(path)).toBe(false)
}

const flags = (): string[] => ['--socket-path', socket, '--blk-file', image]

/** Runs `virtiod blk` with fd 3 as given. */
function withFd3(fd: number, args: readonly string[]): Promise<Result> & { pid: number; kill(): void } {
  const child = spawn(process.execPath, [main, 'blk', ...args], { stdio: ['ignore', 'pipe', 'pipe', fd] })
  let stdout = ''
  let stderr = ''
  child.stdout!.on('data', (data) => (stdout += data))
  child.stderr!.on('data', (data) => (stderr += data))
  const ended = new Promise<Result>((resolve) => child.once('close', (code) => resolve({ code, stdout, stderr })))
  return Object.assign(ended, { pid: child.pid!, kill: () => void child.kill('SIGTERM') })
}

describe('--blk-file', () => {
  test('missing', async () => {
    expectRefused(await virtiod(['blk', '--socket-path', socket, '--blk-file', join(dir, 'none')]), '--blk-file')
    expect(existsSync(socket)).toBe(false)
    expect(existsSync(join(dir, 'none'))).toBe(false)
  })

  test('not given', async () => {
    expectRefused(await virtiod(['blk', '--socket-path', socket]), '--blk-file')
  })

  test.each([
    ['', []],
    [' read-only', ['--read-only']],
  ] as const)('a directory%s', async (_, more) => {
    expectRefused(await virtiod(['blk', '--socket-path', socket, '--blk-file', dir, ...more]), '--blk-file')
    expect(existsSync(socket)).toBe(false)
  })

  test('a character device', async () => {
    expectRefused(await virtiod(['blk', '--socket-path', socket, '--blk-file', '/dev/null']), '--blk-file')
  })

  test('empty', async () => {
    truncateSync(image, 0)
    expectRefused(await virtiod(['blk', ...flags()]), '--blk-file')
    truncateSync(image, 512)
    await expectNothingLeft()
  })

  test.each([
    [1, 512],
    [513, 512],
    [4095, 512],
    [4608, 4096],
  ])('of %i bytes with blocks of %i', async (bytes, block) => {
    truncateSync(image, bytes)
    expectRefused(await virtiod(['blk', ...flags(), '--block-size', String(block)]), '--blk-file')
    truncateSync(image, 8192)
    await expectNothingLeft()
  })

  test('locked by another virtiod', async () => {
    await using first = new Running(['blk', ...flags()])
    await first.printed('"ready"')
    const second = join(dir, 'second.sock')
    for (const more of [[], ['--read-only']]) {
      expectRefused(await virtiod(['blk', '--socket-path', second, '--blk-file', image, ...more]), '--blk-file')
      expect(existsSync(second)).toBe(false)
    }
    wellBehaved(socket)
    expect((await first.stop()).code).toBe(0)
    await expectNothingLeft(second)
  })

  test('read-only shares with read-only, not with a writer', async () => {
    const sockets = [1, 2, 3].map((i) => join(dir, `${i}.sock`))
    const readOnly = (path: string): string[] => ['blk', '--socket-path', path, '--blk-file', image, '--read-only']
    await using first = new Running(readOnly(sockets[0]!))
    await using second = new Running(readOnly(sockets[1]!))
    await Promise.all([first.printed('"ready"'), second.printed('"ready"')])
    expectRefused(await virtiod(['blk', '--socket-path', sockets[2]!, '--blk-file', image]), '--blk-file')
    const both = sockets.slice(0, 2).map((path) => open(path))
    for (const { blk, session } of both) {
      expect(blk.read(0, 4096)).toEqual(new Uint8Array(4096))
      expect(blk.run(VIRTIO_BLK_T_OUT, 0, new Uint8Array(512), 0).status).toBe(VIRTIO_BLK_S_IOERR)
      session.close()
    }
    for (const daemon of [first, second]) expect((await daemon.stop()).code).toBe(0)
    await expectNothingLeft()
  })

  test('twice in one configuration', async () => {
    const config = join(dir, 'twice.yaml')
    const device = (i: number): string => `  - {type: blk, socket-path: ${dir}/${i}.sock, blk-file: ${image}}\n`
    writeFileSync(config, `devices:\n${device(1)}${device(2)}`)
    const { code, stderr } = await virtiod(['run', config])
    expect([code, stderr.split('\n').length]).toEqual([2, 2])
    expect(stderr).toContain(image)
    expect(readdirSync(dir).sort()).toEqual(['disk.img', 'twice.yaml'])
  })
})

describe('--socket-path', () => {
  test.each([108, 109, 300])('of %i bytes', async (length) => {
    const long = join(dir, 'x'.repeat(length - dir.length - 1))
    expectRefused(await virtiod(['blk', '--socket-path', long, '--blk-file', image]), '--socket-path')
    expect(readdirSync(dir)).toEqual(['disk.img'])
  })

  test('of 107 bytes is the longest', async () => {
    await expectNothingLeft(join(dir, 'x'.repeat(107 - dir.length - 1)))
  })

  test('in use by a live virtiod: that one goes on', async () => {
    await using first = new Running(['blk', ...flags()])
    await first.printed('"ready"')
    const other = join(dir, 'other.img')
    writeFileSync(other, Buffer.alloc(4096))
    expectRefused(await virtiod(['blk', '--socket-path', socket, '--blk-file', other]), '--socket-path')
    wellBehaved(socket)
    expect((await first.stop()).code).toBe(0)
    expect(existsSync(socket)).toBe(false)
  })

  test('in use by another program', async () => {
    const server = createServer().listen(socket)
    await new Promise((resolve) => server.once('listening', resolve))
    expectRefused(await virtiod(['blk', ...flags()]), '--socket-path')
    expect(lstatSync(socket).isSocket()).toBe(true)
    await new Promise((resolve) => server.close(resolve))
    await expectNothingLeft()
  })

  test('a stale socket is replaced', async () => {
    await using first = new Running(['blk', ...flags()])
    await first.printed('"ready"')
    await first.stop('SIGKILL')
    expect(lstatSync(socket).isSocket()).toBe(true)
    await using second = new Running(['blk', ...flags()])
    await second.printed('"ready"')
    wellBehaved(socket)
    expect((await second.stop()).code).toBe(0)
    expect(existsSync(socket)).toBe(false)
  })

  test('in a missing directory', async () => {
    const missing = join(dir, 'no', 'disk.sock')
    expectRefused(await virtiod(['blk', '--socket-path', missing, '--blk-file', image]), '--socket-path')
    expect(existsSync(join(dir, 'no'))).toBe(false)
    await expectNothingLeft()
  })

  test('a regular file: it is not deleted', async () => {
    writeFileSync(socket, 'precious')
    expectRefused(await virtiod(['blk', ...flags()]), '--socket-path')
    expect(readFileSync(socket, 'utf8')).toBe('precious')
  })

  test('the image itself: it is not deleted', async () => {
    expectRefused(await virtiod(['blk', '--socket-path', image, '--blk-file', image]), '--socket-path')
    expect(lstatSync(image).size).toBe(1 << 20)
  })

  test('a symbolic link to a regular file: neither is deleted', async () => {
    const precious = join(dir, 'precious')
    writeFileSync(precious, 'precious')
    symlinkSync(precious, socket)
    expectRefused(await virtiod(['blk', ...flags()]), '--socket-path')
    expect(readFileSync(socket, 'utf8')).toBe('precious')
    expect(lstatSync(socket).isSymbolicLink()).toBe(true)
  })

  test('a directory: it is not deleted', async () => {
    mkdirSync(socket)
    expectRefused(await virtiod(['blk', ...flags()]), '--socket-path')
    expect(lstatSync(socket).isDirectory()).toBe(true)
  })

  test('one bad path among several devices: no socket stays', async () => {
    const config = join(dir, 'three.yaml')
    const images = [1, 2, 3].map((i) => join(dir, `${i}.img`))
    for (const path of images) writeFileSync(path, Buffer.alloc(4096))
    const paths = [join(dir, '1.sock'), join(dir, '2.sock'), join(dir, 'no', '3.sock')]
    const devices = images.map((path, i) => `  - {type: blk, socket-path: ${paths[i]}, blk-file: ${path}}\n`)
    writeFileSync(config, `devices:\n${devices.join('')}`)
    const { code, stderr } = await virtiod(['run', config])
    expect([code, stderr.split('\n').length]).toEqual([2, 2])
    expect(stderr).toContain(paths[2])
    expect(paths.map((path) => existsSync(path))).toEqual([false, false, false])
  })
})

describe('--metrics', () => {
  test('a taken port', async () => {
    const taken = createServer().listen(0, '127.0.0.1')
    await new Promise((resolve) => taken.once('listening', resolve))
    const { port } = taken.address() as { port: number }
    expectRefused(await virtiod(['blk', ...flags(), '--metrics', `127.0.0.1:${port}`]), '--metrics')
    expect(existsSync(socket)).toBe(false)
    taken.close()
    await expectNothingLeft()
  })

  test.each(['nonsense', '127.0.0.1', '127.0.0.1:99999', '192.0.2.1:9400'])('%s', async (address) => {
    expectRefused(await virtiod(['blk', ...flags(), '--metrics', address]), '--metrics')
    expect(existsSync(socket)).toBe(false)
  })
})

describe('--iothread-cpus', () => {
  test.each([
    ['9999', '1'],
    ['0,9999', '2'],
    ['0,0,0', '2'],
    ['1-0', '1'],
    ['x', '1'],
    ['0-', '1'],
  ])('%s for %s', async (list, count) => {
    const result = await virtiod(['blk', ...flags(), '--iothread-cpus', list, '--iothreads', count])
    expectRefused(result, '--iothread-cpus')
    expect(existsSync(socket)).toBe(false)
  })
})

describe('--fd', () => {
  test('a listening socket is served, and the file at its path stays its owner’s', async () => {
    const fd = native.listenUnix(socket, 0o600)
    const daemon = withFd3(fd, ['--fd', '3', '--blk-file', image])
    native.close(fd)
    // The socket listens already: a front-end may come before the daemon is up.
    wellBehaved(socket)
    wellBehaved(socket)
    daemon.kill()
    const { code, stderr } = await daemon
    expect([code, stderr]).toEqual([0, ''])
    expect(lstatSync(socket).isSocket()).toBe(true)
  })

  test('a connected socket is served, and the process ends with 0 when its front-end leaves', async () => {
    const pair = new Int32Array(2)
    native.socketpair(pair)
    const daemon = withFd3(pair[1]!, ['--fd', '3', '--blk-file', image])
    native.close(pair[1]!)
    const session = Session.over(Connection.fromFd(pair[0]!, { timeoutMs: 5000 }))
    mustServe(driverOf(session))
    session.close()
    const { code, stderr } = await daemon
    expect([code, stderr]).toEqual([0, ''])
    await expectNothingLeft()
  })

  test('a connected socket whose front-end breaks the protocol: it ends as well', async () => {
    const pair = new Int32Array(2)
    native.socketpair(pair)
    const daemon = withFd3(pair[1]!, ['--fd', '3', '--blk-file', image])
    native.close(pair[1]!)
    native.sendMessage(pair[0]!, new Uint8Array(12).fill(255), 0, 12, new Int32Array(1), 0, true)
    const { code } = await daemon
    expect(code).toBe(0)
    native.close(pair[0]!)
  })

  test('a connected socket whose front-end has gone already', async () => {
    const pair = new Int32Array(2)
    native.socketpair(pair)
    native.close(pair[0]!)
    const daemon = withFd3(pair[1]!, ['--fd', '3', '--blk-file', image])
    native.close(pair[1]!)
    const { code } = await daemon
    // getpeername may still know the peer or not: served and ended, or refused.
    expect([0, 2]).toContain(code)
  })

  test('a file', async () => {
    const fd = openSync(image, 'r')
    expectRefused(await withFd3(fd, ['--fd', '3', '--blk-file', image]), '--fd')
    closeSync(fd)
    await expectNothingLeft()
  })

  test('a TCP socket', async () => {
    const server = createServer().listen(0, '127.0.0.1')
    await new Promise((resolve) => server.once('listening', resolve))
    const { fd } = (server as unknown as { _handle: { fd: number } })._handle
    expectRefused(await withFd3(fd, ['--fd', '3', '--blk-file', image]), '--fd')
    server.close()
  })

  test('an eventfd', async () => {
    const fd = native.eventfd(0)
    expectRefused(await withFd3(fd, ['--fd', '3', '--blk-file', image]), '--fd')
    native.close(fd)
  })

  test.each([['999'], ['1000000']])('%s, which is not open', async (fd) => {
    expectRefused(await virtiod(['blk', '--fd', fd, '--blk-file', image]), '--fd')
  })

  test.each(['-1', 'x', '3.5', ''])('%s', async (fd) => {
    expectRefused(await virtiod(['blk', `--fd=${fd}`, '--blk-file', image]), '--fd')
  })

  test('beside --socket-path', async () => {
    expectRefused(await virtiod(['blk', '--fd', '3', ...flags()]), '--fd')
    expect(existsSync(socket)).toBe(false)
  })
})

describe('a variable that only daemons set for their successors, set by hand', () => {
  // 3 and 7 are fds that Node itself has open.
  test.each(['0', '3', '7', '99', '999999'])('VIRTIOD_HANDOVER_FD=%s', async (fd) => {
    const { code, stderr } = await virtiod(['blk', '--socket-path', socket, '--blk-file', image], {
      env: { VIRTIOD_HANDOVER_FD: fd },
    })
    expect(stderr).toMatch(/^virtiod: no process hands over at VIRTIOD_HANDOVER_FD: .* Unset that variable[^\n]*\n$/)
    expect(code).toBe(1)
    await expectNothingLeft()
  })

  test('a socket of somebody else, who says nothing', async () => {
    const ends = new Int32Array(2)
    native.socketpair(ends)
    const child = spawn(process.execPath, [main, 'blk', '--socket-path', socket, '--blk-file', image], {
      env: { ...process.env, VIRTIOD_HANDOVER_FD: '3' },
      stdio: ['ignore', 'ignore', 'pipe', ends[1]],
    })
    let stderr = ''
    child.stderr!.setEncoding('utf8').on('data', (text: string) => {
      stderr += text
    })
    const code = await new Promise((resolve) => child.once('exit', resolve))
    for (const end of ends) native.close(end)
    expect(stderr).toContain('Unset that variable')
    expect(code).toBe(1)
  })

  test('and another mistake: nothing is written to what is no socket', async () => {
    const result = join(dir, 'result')
    const file = openSync(result, 'w')
    const child = spawn(process.execPath, [main, 'blk', '--no-such-option'], {
      env: { ...process.env, VIRTIOD_HANDOVER_FD: '3' },
      stdio: ['ignore', 'ignore', 'ignore', file],
    })
    closeSync(file)
    expect(await new Promise((resolve) => child.once('exit', resolve))).toBe(2)
    expect(readFileSync(result, 'utf8')).toBe('')
  })
})

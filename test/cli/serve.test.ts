/** The daemon as a process: ready, signals, metrics, and starts that are refused. */
import { existsSync, mkdtempSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import { Running, virtiod } from './spawn.ts'

const dir = mkdtempSync(join(tmpdir(), 'virtiod-serve-'))
afterAll(() => rmSync(dir, { recursive: true, force: true }))
let count = 0

/** Flags of a disk of its own. */
function disk(): { image: string; socket: string; flags: string[] } {
  const image = join(dir, `disk${++count}.img`)
  const socket = join(dir, `disk${count}.sock`)
  writeFileSync(image, Buffer.alloc(1 << 20))
  return { image, socket, flags: ['--socket-path', socket, '--blk-file', image] }
}

function logLines(stdout: string): Record<string, unknown>[] {
  return stdout
    .trimEnd()
    .split('\n')
    .map((line) => JSON.parse(line) as Record<string, unknown>)
}

function metricsUrl(stdout: string): string {
  return logLines(stdout).find(({ msg }) => msg === 'ready')!['metrics'] as string
}

describe('signals', () => {
  test.each(['SIGTERM', 'SIGINT'] as const)('%s ends it with 0 and without a socket', async (signal) => {
    const { socket, flags } = disk()
    await using daemon = new Running(['blk', ...flags])
    await daemon.printed('"ready"')
    expect(statSync(socket).isSocket()).toBe(true)
    const before = performance.now()
    const { code, stdout, stderr } = await daemon.stop(signal)
    expect([code, stderr]).toEqual([0, ''])
    expect(performance.now() - before).toBeLessThan(1000)
    expect(existsSync(socket)).toBe(false)
    expect(logLines(stdout).at(-1)).toMatchObject({ level: 'info', msg: 'stopping', signal })
  })

  test('one wish that is delivered twice is one', async () => {
    await using daemon = new Running(['blk', ...disk().flags])
    await daemon.printed('"ready"')
    daemon.process.kill('SIGINT')
    expect((await daemon.stop('SIGINT')).code).toBe(0)
  })

  test('SIGHUP looks at the files again, it does not end the daemon', async () => {
    await using daemon = new Running(['blk', ...disk().flags])
    await daemon.printed('"ready"')
    daemon.process.kill('SIGHUP')
    await new Promise((resolve) => setTimeout(resolve, 200))
    expect(daemon.process.exitCode).toBeNull()
    expect((await daemon.stop()).code).toBe(0)
  })
})

describe('operations server', () => {
  test('/metrics and /healthz', async () => {
    await using daemon = new Running(['blk', ...disk().flags, '--metrics', '127.0.0.1:0'])
    await daemon.printed('"ready"')
    const url = metricsUrl(daemon.stdout)
    const metrics = await (await fetch(`${url}/metrics`)).text()
    expect(metrics).toContain('virtiod_session_up{device="blk0"} 0\n')
    expect(metrics).toMatch(/^process_resident_memory_bytes \d/m)
    const health = await fetch(`${url}/healthz`)
    expect([health.status, await health.text()]).toEqual([200, 'ok\n'])
    expect((await daemon.stop()).code).toBe(0)
  })

  test('a taken port is told before any socket is bound', async () => {
    const { socket, flags } = disk()
    const taken = createServer().listen(0, '127.0.0.1')
    await new Promise((resolve) => taken.once('listening', resolve))
    const { port } = taken.address() as { port: number }
    const { code, stderr } = await virtiod(['blk', ...flags, '--metrics', `127.0.0.1:${port}`])
    taken.close()
    expect(code).toBe(2)
    expect(stderr).toBe(
      `virtiod: --metrics: 127.0.0.1:${port} is in use by another process. Give another port, or port 0 for any free one.\n`
    )
    expect(existsSync(socket)).toBe(false)
  })
})

describe('run', () => {
  test('serves every device of the file', async () => {
    const a = disk()
    const b = disk()
    const file = join(dir, 'two.yaml')
    writeFileSync(
      file,
      `iothreads: 2\nmetrics: 127.0.0.1:0\ndevices:\n` +
        [a, b].map(({ socket, image }) => `  - {type: blk, socket-path: ${socket}, blk-file: ${image}}\n`).join('')
    )
    await using daemon = new Running(['run', file])
    await daemon.printed('"ready"')
    expect([a, b].map(({ socket }) => existsSync(socket))).toEqual([true, true])
    const metrics = await (await fetch(`${metricsUrl(daemon.stdout)}/metrics`)).text()
    expect(metrics.match(/^virtiod_session_up\{.*/gm)).toEqual([
      'virtiod_session_up{device="blk0"} 0',
      'virtiod_session_up{device="blk1"} 0',
    ])
    expect((await daemon.stop()).code).toBe(0)
    expect([a, b].map(({ socket }) => existsSync(socket))).toEqual([false, false])
  })

  test('one bad device, and none is served', async () => {
    const a = disk()
    const file = join(dir, 'half.yaml')
    writeFileSync(
      file,
      `devices:\n  - {type: blk, socket-path: ${a.socket}, blk-file: ${a.image}}\n  - {type: blk, socket-path: x, blk-file: /no/such}\n`
    )
    const { code, stderr } = await virtiod(['run', file])
    expect(code).toBe(2)
    expect(stderr).toMatch(/^virtiod: .*\/no\/such/)
    expect(existsSync(a.socket)).toBe(false)
  })
})

test('a switch: a socket per card, without privileges of the network', async () => {
  const sockets = ['a', 'b'].map((name) => join(dir, `net-${name}.sock`))
  const flags = sockets.flatMap((socket) => ['--socket-path', socket])
  await using daemon = new Running(['net', ...flags, '--switch', 'lan', '--metrics', '127.0.0.1:0'])
  await daemon.printed('"ready"')
  expect(sockets.map((socket) => statSync(socket).isSocket())).toEqual([true, true])
  const metrics = await (await fetch(`${metricsUrl(daemon.stdout)}/metrics`)).text()
  expect(metrics).toContain('virtiod_session_up{device="net1"} 0\n')
  expect(metrics).toContain('virtiod_net_switch_table_entries{device="net0",switch="lan"} 0\n')
  expect((await daemon.stop()).code).toBe(0)
  expect(sockets.map((socket) => existsSync(socket))).toEqual([false, false])
})

test('qemu-args works beside the daemon that holds the lock', async () => {
  const { flags } = disk()
  await using daemon = new Running(['blk', ...flags])
  await daemon.printed('"ready"')
  expect((await virtiod(['qemu-args', 'blk', ...flags])).code).toBe(0)
  expect((await daemon.stop()).code).toBe(0)
})

describe('start', () => {
  test('makes the image, serves it, and prints what to copy', async () => {
    const home = mkdtempSync(join(dir, 'demo-'))
    await using daemon = new Running(['start', '--metrics', '127.0.0.1:0', '--size', '64M'], { cwd: home })
    await daemon.printed('Stop it with ^C.')
    const image = statSync(join(home, 'virtiod-demo.img'))
    expect([image.size, image.blocks]).toEqual([64 << 20, 0])
    expect(daemon.stdout).toContain(`path=${join(home, 'virtiod-demo.sock')},reconnect=1 \\\n`)
    expect(daemon.stdout).toMatch(/-device vhost-user-blk-pci,chardev=virtiod-blk0/)
    const [, command = ''] = /^ {2}curl -s (\S+)\/metrics \| grep virtiod_$/m.exec(daemon.stdout) ?? []
    expect(await (await fetch(`${command}/metrics`)).text()).toContain('virtiod_session_up{device="blk0"} 0\n')
    expect((await daemon.stop('SIGINT')).code).toBe(0)
    expect(existsSync(join(home, 'virtiod-demo.sock'))).toBe(false)
    await using again = new Running(['start', '--metrics', '127.0.0.1:0'], { cwd: home })
    await again.printed('Stop it with ^C.')
    expect(statSync(join(home, 'virtiod-demo.img')).size).toBe(64 << 20)
    expect(again.stdout).not.toContain('created')
  })

  test('where nothing can be created', async () => {
    const { code, stderr } = await virtiod(['start', '--blk-file', '/proc/no/disk.img'])
    expect(code).toBe(2)
    expect(stderr).toBe(
      'virtiod: --blk-file: cannot create /proc/no/disk.img (ENOENT). Give a path in a directory that exists and that you may write to.\n'
    )
  })
})

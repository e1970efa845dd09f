/** What the service manager hears from the daemon (sd_notify), in its life and over a handover. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, expect, test } from 'vitest'
import { NotifySocket } from '../daemon/notify-socket.ts'
import { Running } from './spawn.ts'

const dir = mkdtempSync(join(tmpdir(), 'virtiod-notify-'))
afterAll(() => rmSync(dir, { recursive: true, force: true }))
let count = 0

function flags(): string[] {
  const image = join(dir, `disk${++count}.img`)
  writeFileSync(image, Buffer.alloc(1 << 20))
  return ['blk', '--socket-path', join(dir, `disk${count}.sock`), '--blk-file', image]
}

test.each([join(dir, 'notify'), `@virtiod-notify-${process.pid}`])(
  'from its start to its end, at %s',
  async (address) => {
    using manager = await NotifySocket.open(address)
    await using daemon = new Running(flags(), { env: { NOTIFY_SOCKET: address } })
    await manager.received('READY=1')
    await daemon.printed('"ready"')
    daemon.process.kill('SIGHUP')
    await manager.received('RELOADING=1')
    expect((await daemon.stop()).code).toBe(0)
    await manager.received('STOPPING=1')
    expect(manager.messages).toEqual([
      'READY=1 | STATUS=serving 1 device',
      expect.stringMatching(/^RELOADING=1 \| MONOTONIC_USEC=[1-9]\d+ \| STATUS=/),
      'READY=1 | STATUS=serving 1 device',
      'STOPPING=1 | STATUS=stopping',
    ])
    const [, microseconds] = /USEC=(\d+)/.exec(manager.messages[1]!)!
    const now = Number(process.hrtime.bigint() / 1000n)
    expect(Number(microseconds)).toBeGreaterThan(now - 60e6)
    expect(Number(microseconds)).toBeLessThan(now)
  }
)

test('the main process tells of its successor, which then speaks', async () => {
  using manager = await NotifySocket.open(join(dir, 'main'))
  await using daemon = new Running(flags(), { env: { NOTIFY_SOCKET: manager.address } })
  await daemon.printed('"ready"')
  daemon.process.kill('SIGUSR2')
  const pid = Number(/MAINPID=(\d+)/.exec(await manager.received('MAINPID='))![1])
  try {
    expect(pid).not.toBe(daemon.process.pid)
    await manager.received('STATUS=handing over')
    while (manager.messages.filter((message) => message.startsWith('READY=1')).length < 2)
      await new Promise((resolve) => setTimeout(resolve, 10))
  } finally {
    process.kill(pid, 'SIGTERM')
  }
  await manager.received('STOPPING=1')
  expect(await daemon.ended).toMatchObject({ code: 0 })
})

test('a handover that failed shows in the status', async () => {
  using manager = await NotifySocket.open(join(dir, 'failing'))
  const file = join(dir, 'disks.json')
  const [, , socket, , image] = flags()
  const config = (name: string) =>
    JSON.stringify({ devices: [{ name, type: 'blk', 'socket-path': socket, 'blk-file': image }] })
  writeFileSync(file, config('a'))
  await using daemon = new Running(['run', file], { env: { NOTIFY_SOCKET: manager.address } })
  await daemon.printed('"ready"')
  writeFileSync(file, config('b'))
  daemon.process.kill('SIGUSR2')
  expect(await manager.received('failed')).toMatch(
    /^STATUS=serving 1 device; the last handover failed: the device a is not/
  )
  expect((await daemon.stop()).code).toBe(0)
})

test('a manager that is not there, or not one, is no matter', async () => {
  for (const address of [join(dir, 'nobody'), '/dev/null', '@', 'x'.repeat(200), '']) {
    await using daemon = new Running(flags(), { env: { NOTIFY_SOCKET: address } })
    await daemon.printed('"ready"')
    expect((await daemon.stop()).code).toBe(0)
  }
})

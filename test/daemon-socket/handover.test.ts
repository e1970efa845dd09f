/** Handovers of a running daemon, under verifying load and with everything that can go wrong, over real sockets. */
import { spawnSync } from 'node:child_process'
import { existsSync, readFileSync, rmSync, statSync, truncateSync, writeFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { describe, expect, test, vi } from 'vitest'
import { Connection } from '../../src/frontend/connection.ts'
import { layouts } from '../../src/frontend/memory.ts'
import type { SessionOptions } from '../../src/frontend/session-options.ts'
import { native } from '../../src/native.ts'
import { VIRTIO_BLK_CONFIG_WCE } from '../../src/virtio/blk.ts'
import { VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC } from '../../src/virtio/constants.ts'
import { checkoutLauncher } from '../cli/spawn.ts'
import {
  driverOf,
  eventually,
  isAlive,
  MIB,
  memfdMappings,
  mustServe,
  open,
  wellBehaved,
} from '../vhost-user/backend.ts'
import { negotiated } from '../vhost-user/messages.ts'
import { configure, directory, image, Load, pause, Serving, type ServingOptions } from './serving.ts'

// Processes start in most of them, several times: a limit for what hangs.
vi.setConfig({ testTimeout: 120_000 })

/** Disks a, b, … in a directory of their own, served. */
function serve(names: readonly string[], options: ServingOptions = {}, top: object = {}): Serving {
  const dir = directory()
  for (const name of names) image(dir, `${name}.img`)
  configure(
    dir,
    names.map((name) => ({ name })),
    top
  )
  return new Serving(dir, options)
}

/** A front-end on a socket, with verifying load on each of its queues. */
function load(socket: string, options: SessionOptions = {}) {
  const memory = layouts.single(16 * MIB)
  const opened = open(socket, { queues: 2, queueSize: 64, memory, timeoutMs: 10_000, ...options })
  const loads = opened.session.queues.map(({ index }) => {
    const driver = driverOf(opened.session, index, 4 * MIB)
    driver.timeoutMs = 10_000
    return new Load(driver, index * 1024)
  })
  return {
    session: opened.session,
    step: () => {
      for (const one of loads) one.step()
    },
    verify: () => {
      for (const one of loads) one.verify()
    },
    get requests() {
      return loads.reduce((sum, one) => sum + one.requests, 0)
    },
  }
}

/** Runs the command as an operator would. */
function command(...args: string[]) {
  const { status, stdout, stderr } = spawnSync(process.execPath, [checkoutLauncher, 'handover', ...args], {
    encoding: 'utf8',
    timeout: 60_000,
  })
  return { code: status, stdout, stderr }
}

describe.each([
  ['io_uring', false],
  ['plain system calls', true],
])('a handover on %s', (_, emulated) => {
  test('under load: nothing is lost, nothing leaks, again and again', () => {
    using daemon = serve(['a', 'b'], { emulated }, { iothreads: 2 })
    const guests = ['a', 'b'].map((name) => load(daemon.path(`${name}.sock`)))
    const step = () => {
      for (const guest of guests) guest.step()
    }
    const pids = new Set([daemon.pid])
    const inodes = ['a', 'b'].map((name) => statSync(daemon.path(`${name}.sock`)).ino)
    step()
    const fds: number[] = []
    for (let i = 0; i < 4; i++) {
      const before = guests.map(({ requests }) => requests)
      daemon.handOverDuring(step)
      pids.add(daemon.pid)
      for (let more = 0; more < 20; more++) step()
      for (const [g, { requests }] of guests.entries()) expect(requests).toBeGreaterThan(before[g]! + 20 * 32)
      fds.push(daemon.fds.length)
    }
    expect(pids.size).toBe(5)
    expect(new Set(fds).size, `${fds}`).toBe(1)
    expect(memfdMappings(daemon.pid)).toBe(2)
    for (const guest of guests) guest.verify()
    expect(['a', 'b'].map((name) => statSync(daemon.path(`${name}.sock`)).ino)).toEqual(inodes)
    // The next front-end, after the one that was handed over has gone.
    for (const guest of guests) guest.session.close()
    for (const name of ['a', 'b']) wellBehaved(daemon.path(`${name}.sock`))
    expect(eventually(() => memfdMappings(daemon.pid) === 0)).toBe(true)
    daemon.stop()
    expect(['a', 'b'].map((name) => existsSync(daemon.path(`${name}.sock`)))).toEqual([false, false])
    expect(daemon.lines.filter(({ level }) => level !== 'info')).toEqual([])
  })
})

/** One disk each. */
const NEGOTIATED: Readonly<Record<string, SessionOptions>> = {
  packed: { packed: true },
  'packed-in-order': { packed: true, inOrder: true },
  'in-order': { inOrder: true },
  inflight: { inflight: true },
  'inflight-packed': { packed: true, inflight: true },
  iommu: { iommu: true },
  'iommu-packed': { iommu: true, packed: true },
  inband: { inband: true },
  status: { status: true },
  interrupts: { mode: 'irq' },
  plain: { withoutFeatures: [VIRTIO_F_INDIRECT_DESC, VIRTIO_F_EVENT_IDX] },
}

test('whatever was negotiated goes along, many disks at once', () => {
  const names = Object.keys(NEGOTIATED)
  using daemon = serve(names, {}, { iothreads: 2 })
  const guests = Object.entries(NEGOTIATED).map(([name, options]) => ({
    name,
    guest: load(daemon.path(`${name}.sock`), options),
  }))
  const each = (action: (guest: ReturnType<typeof load>) => void) => {
    for (const { name, guest } of guests) {
      try {
        action(guest)
      } catch (cause) {
        throw new Error(`${name}: ${(cause as Error).message}`, { cause })
      }
    }
  }
  const step = () => each((guest) => guest.step())
  step()
  for (let i = 0; i < 3; i++) {
    daemon.handOverDuring(step)
    for (let more = 0; more < 5; more++) step()
  }
  each((guest) => guest.verify())
  // They stop as they should, in the process that they did not begin in.
  each((guest) => guest.session.close())
  for (const name of names) wellBehaved(daemon.path(`${name}.sock`))
  expect(daemon.lines.filter(({ level }) => level !== 'info')).toEqual([])
})

test('what the driver switched stays: the write cache', () => {
  using daemon = serve(['a'])
  const opened = open(daemon.path('a.sock'))
  const wce = () => opened.session.connection.getConfig(VIRTIO_BLK_CONFIG_WCE, 1)?.[0]
  expect(wce()).toBe(1)
  opened.session.connection.setConfig(VIRTIO_BLK_CONFIG_WCE, Uint8Array.of(0))
  expect(wce()).toBe(0)
  daemon.handOverDuring(() => mustServe(opened.blk))
  expect(wce()).toBe(0)
  opened.session.connection.setConfig(VIRTIO_BLK_CONFIG_WCE, Uint8Array.of(1))
  expect(wce()).toBe(1)
  opened.session.close()
})

test('the lock of an image is held all the time', () => {
  using daemon = serve(['a'])
  const dir = daemon.directory
  const second = () =>
    spawnSync(
      process.execPath,
      [checkoutLauncher, 'blk', '--check-config', '--socket-path', 'x', '--blk-file', 'a.img'],
      {
        cwd: dir,
        encoding: 'utf8',
      }
    )
  expect(second().stderr).toContain('is locked')
  const over = daemon.handOver()
  do expect(second().stderr).toContain('is locked')
  while (!over())
  expect(second().stderr).toContain('is locked')
  daemon.stop()
  expect(second().status).toBe(0)
})

test('front-ends that wait, that are silent, and that are in the middle of a message', () => {
  using daemon = serve(['a', 'b', 'c'])
  const served = open(daemon.path('a.sock'))
  const waiting = native.connectUnix(daemon.path('a.sock'))
  const silent = native.connectUnix(daemon.path('b.sock'))
  const halfway = negotiated(daemon.path('c.sock'))
  halfway.send(new Uint8Array([1, 0, 0, 0]))
  daemon.handOverDuring(() => mustServe(served.blk))
  // The rest of GET_FEATURES.
  halfway.send(new Uint8Array([1, 0, 0, 0, 0, 0, 0, 0]))
  const reply = new Uint8Array(20)
  const fds = new Int32Array(4)
  expect(native.pollIn(halfway.channel.fd, 3000)).toBe(1)
  expect(native.recvMessage(halfway.channel.fd, reply, 0, 20, fds)).toBe(20)
  expect(new DataView(reply.buffer).getUint32(0, true)).toBe(1)
  halfway.close()
  served.session.close()
  native.close(waiting)
  native.close(silent)
  for (const name of ['a', 'b', 'c']) wellBehaved(daemon.path(`${name}.sock`))
})

test('an image that grew meanwhile is as large as it is for the new process', () => {
  using daemon = serve(['a'])
  const opened = open(daemon.path('a.sock'))
  const capacity = () => Buffer.from(opened.session.connection.getConfig(0, 8)!).readUInt32LE(0)
  expect(capacity()).toBe((16 * MIB) / 512)
  truncateSync(daemon.path('a.img'), 32 * MIB)
  daemon.handOverDuring(() => mustServe(opened.blk))
  expect(capacity()).toBe((32 * MIB) / 512)
  expect(daemon.has('the config space changed, the front-end was told')).toBe(true)
  opened.session.close()
})

describe('sockets that were handed down', () => {
  test('one that listens', () => {
    const dir = directory()
    image(dir, 'a.img')
    const listener = native.listenUnix(`${dir}/outer.sock`, 0o660)
    using daemon = new Serving(dir, { args: ['blk', '--fd', '3', '--blk-file', 'a.img'], fds: [listener] })
    native.close(listener)
    const opened = open(`${dir}/outer.sock`)
    daemon.handOverDuring(() => mustServe(opened.blk))
    opened.session.close()
    wellBehaved(`${dir}/outer.sock`)
    daemon.handOverDuring(() => {})
    wellBehaved(`${dir}/outer.sock`)
    daemon.stop()
    expect(existsSync(`${dir}/outer.sock`)).toBe(true)
  })

  test('one that is connected: the daemon ends with its session', () => {
    const dir = directory()
    image(dir, 'a.img')
    const ends = new Int32Array(2)
    native.socketpair(ends)
    // A number that Node does not mark as its own.
    const fds = [...new Array<'ignore'>(27).fill('ignore'), ends[1]!]
    using daemon = new Serving(dir, { args: ['blk', '--fd', '30', '--blk-file', 'a.img'], fds })
    native.close(ends[1]!)
    const opened = open(Connection.fromFd(ends[0]!, { timeoutMs: 3000 }))
    daemon.handOverDuring(() => mustServe(opened.blk))
    mustServe(opened.blk)
    opened.session.close()
    expect(eventually(() => !isAlive(daemon.pid), 5000)).toBe(true)
  })
})

describe('the configuration of the new process', () => {
  /** A refused handover; the reason. The guest must not notice. */
  function refused(daemon: Serving, guest: ReturnType<typeof load>): string {
    const { pid } = daemon
    const over = daemon.handOver()
    while (!over()) guest.step()
    expect(daemon.pid).toBe(pid)
    expect(eventually(() => daemon.children.length === 0)).toBe(true)
    for (let i = 0; i < 5; i++) guest.step()
    guest.verify()
    return String(daemon.said('the handover failed').at(-1)!['reason'])
  }

  test('must have the devices that are served, as they are, and be sound', () => {
    using daemon = serve(['a', 'b'])
    const dir = daemon.directory
    const guest = load(daemon.path('a.sock'))
    const fds = daemon.fds.length
    configure(dir, [{ name: 'a' }])
    expect(refused(daemon, guest)).toContain('the device b is not there any more')
    configure(dir, [{ name: 'a', 'socket-path': 'other.sock' }, { name: 'b' }])
    expect(refused(daemon, guest)).toMatch(
      /the device a has the socket .*other.sock now, and had a.sock|the device a has the socket/
    )
    configure(dir, [{ name: 'a' }, { name: 'b', type: 'net', switch: 's', 'socket-path': 'b.sock' }])
    expect(refused(daemon, guest)).toContain('the device b is a net now, and was a blk')
    configure(dir, [
      { name: 'a', 'blk-file': 'b.img' },
      { name: 'b', 'blk-file': 'a.img' },
    ])
    expect(refused(daemon, guest)).toContain('the device a has another blk-file')
    configure(dir, [{ name: 'a' }, { name: 'b' }, { name: 'c' }])
    expect(refused(daemon, guest)).toContain('c.img does not exist')
    configure(dir, [{ name: 'a' }, { name: 'b' }], { iothreads: 0 })
    expect(refused(daemon, guest)).toContain('iothreads')
    writeFileSync(`${dir}/virtiod.json`, '{')
    expect(refused(daemon, guest)).toContain('virtiod.json')
    expect(eventually(() => daemon.fds.length === fds)).toBe(true)
    expect(daemon.has('handover: this process serves again')).toBe(false)
    // And when all is well again.
    configure(dir, [{ name: 'b' }, { name: 'a' }], { iothreads: 2 })
    daemon.handOverDuring(guest.step)
    guest.verify()
    guest.session.close()
  })

  test('may have new devices, which are served from then on', () => {
    using daemon = serve(['a'])
    const guest = load(daemon.path('a.sock'))
    image(daemon.directory, 'new.img')
    configure(daemon.directory, [{ name: 'new' }, { name: 'a' }])
    daemon.handOverDuring(guest.step)
    wellBehaved(daemon.path('new.sock'))
    guest.verify()
    daemon.stop()
    expect(existsSync(daemon.path('new.sock'))).toBe(false)
    guest.session.close(true)
  })
})

describe('kill -9', () => {
  test('of the new process at any moment: the guest does not notice', () => {
    using daemon = serve(['a', 'b'], {}, { iothreads: 2 })
    const guests = ['a', 'b'].map((name) => load(daemon.path(`${name}.sock`)))
    const step = () => {
      for (const guest of guests) guest.step()
    }
    const isReady = (child: number) =>
      daemon.said('handover: the new process is ready').some(({ successor }) => successor === child)
    const { pid } = daemon
    let tookOver = false
    for (let i = 0; i < 8 && !tookOver; i++) {
      const over = daemon.handOver()
      while (daemon.children.length === 0) step()
      const [child] = daemon.children as [number]
      // At once, while it starts, and around the moment when it is ready, which is when the guests are suspended.
      if (i < 4) for (const until = performance.now() + i * 60; performance.now() < until; ) step()
      else while (!isReady(child)) pause(0)
      // Stopped, it does nothing any more, and then it shows whether it was too late.
      process.kill(child, 'SIGSTOP')
      pause(50)
      tookOver = daemon.said('handover: the new process serves').length > 0
      process.kill(child, tookOver ? 'SIGCONT' : 'SIGKILL')
      while (!over()) step()
      for (let more = 0; more < 5; more++) step()
    }
    if (!tookOver) {
      expect(daemon.pid).toBe(pid)
      daemon.handOverDuring(step)
    }
    for (const guest of guests) guest.verify()
    expect(daemon.said('the handover failed').length).toBeGreaterThanOrEqual(4)
    for (const guest of guests) guest.session.close()
  })

  test('of the old process: a new one that has everything goes on, another one ends', () => {
    const ends = { went: 0, ended: 0 }
    for (let i = 0; i < 6; i++) {
      using daemon = serve(['a'])
      const guest = load(daemon.path('a.sock'))
      const old = daemon.pid
      daemon.handOver()
      while (!daemon.has('handover: the new process is ready')) guest.step()
      const successor = daemon.said('handover: the new process is ready')[0]!['successor'] as number
      pause(i)
      process.kill(old, 'SIGKILL')
      const decided = (): boolean => !isAlive(successor) || daemon.said('ready', successor).length > 0
      expect(eventually(decided, 5000)).toBe(true)
      if (isAlive(successor)) {
        ends.went++
        daemon.pid = successor
        for (let more = 0; more < 5; more++) guest.step()
        guest.verify()
        guest.session.close()
        wellBehaved(daemon.path('a.sock'))
      } else {
        ends.ended++
        guest.session.close(true)
      }
    }
    process.stderr.write(`killed old processes: ${JSON.stringify(ends)}\n`)
    expect(ends.went + ends.ended).toBe(6)
  })
})

describe('a new process that fails', () => {
  const launcher = fileURLToPath(new URL('./misbehaving.ts', import.meta.url))

  test.each([
    ['die before ready', 'killed by SIGKILL', false],
    ['die with a device', 'killed by SIGKILL', true],
    ['die with everything', 'killed by SIGKILL', true],
    ['die prepared', 'killed by SIGKILL', true],
    ['die told to commit', 'killed by SIGKILL', true],
    ['hang with everything', 'did not say "prepared" in time', true],
    ['hang told to commit', 'did not say "committed" in time', true],
  ])('%s: the old one goes on, and can hand over later', (mode, reason, suspended) => {
    using daemon = serve(['a', 'b'], { launcher }, { iothreads: 2 })
    const guests = ['a', 'b'].map((name) => load(daemon.path(`${name}.sock`)))
    const step = () => {
      for (const guest of guests) guest.step()
    }
    const { pid } = daemon
    const fds = daemon.fds.length
    writeFileSync(daemon.path('mode'), mode)
    // One that hangs takes five seconds.
    const times = mode.startsWith('hang') ? 1 : 2
    for (let i = 0; i < times; i++) {
      const over = daemon.handOver()
      while (!over()) step()
      for (let more = 0; more < 10; more++) step()
    }
    expect(daemon.pid).toBe(pid)
    const failed = daemon.said('the handover failed')
    expect(failed.length).toBe(times)
    for (const { reason: text } of failed) expect(text).toContain(reason)
    expect(daemon.said('handover: this process serves again').length).toBe(suspended ? times : 0)
    expect(eventually(() => daemon.fds.length === fds && daemon.children.length === 0)).toBe(true)
    rmSync(daemon.path('mode'))
    daemon.handOverDuring(step)
    for (const guest of guests) guest.verify()
    for (const guest of guests) guest.session.close()
  })
})

describe('signals', () => {
  test('SIGTERM while a new process starts: both end', () => {
    using daemon = serve(['a'])
    const opened = open(daemon.path('a.sock'))
    mustServe(opened.blk)
    daemon.handOver()
    expect(eventually(() => daemon.children.length === 1, 5000)).toBe(true)
    const [child] = daemon.children as [number]
    pause(100)
    daemon.stop()
    expect(eventually(() => !isAlive(child))).toBe(true)
    expect(existsSync(daemon.path('a.sock'))).toBe(false)
    expect(daemon.said('the handover failed')[0]).toMatchObject({ reason: 'the daemon is stopping' })
    opened.session.close(true)
  })

  test('SIGTERM at any moment of it: nobody is left', () => {
    for (let delay = 0; delay < 8; delay += 2) {
      using daemon = serve(['a'])
      const opened = open(daemon.path('a.sock'))
      mustServe(opened.blk)
      const old = daemon.pid
      daemon.handOver()
      expect(eventually(() => daemon.has('handover: the new process is ready'), 10_000)).toBe(true)
      const successor = daemon.said('handover: the new process is ready')[0]!['successor'] as number
      pause(delay)
      let gone = false
      try {
        process.kill(old, 'SIGTERM')
      } catch {
        gone = true
      }
      if (gone || (!eventually(() => !isAlive(old) && !isAlive(successor), 3000) && isAlive(successor))) {
        // It was too late for the old one to hear it.
        expect(daemon.said('stopping', old)).toEqual([])
        process.kill(successor, 'SIGTERM')
      }
      expect(
        eventually(() => !isAlive(old) && !isAlive(successor), 5000),
        daemon.text
      ).toBe(true)
      expect(existsSync(daemon.path('a.sock'))).toBe(false)
      opened.session.close(true)
    }
  })

  test('a second SIGUSR2 is one too many', () => {
    using daemon = serve(['a'])
    const guest = load(daemon.path('a.sock'))
    const { pid } = daemon
    process.kill(pid, 'SIGUSR2')
    expect(eventually(() => daemon.children.length === 1)).toBe(true)
    daemon.handOverDuring(guest.step)
    expect(daemon.said('a handover is under way already').length).toBe(1)
    expect(daemon.said('handover: a new process is starting').length).toBe(1)
    guest.verify()
    guest.session.close()
  })
})

describe('metrics', () => {
  test.each(['127.0.0.1:0', 'unix:metrics'])('at %s stay where they are', (address) => {
    using daemon = serve(['a'], {}, { metrics: address })
    const scrape = () => {
      const url = String(daemon.said('ready').at(-1)!['metrics'])
      const where = url.startsWith('unix:')
        ? { socketPath: url.slice(5) }
        : { host: '127.0.0.1', port: new URL(url).port }
      const script = `require('node:http').get(${JSON.stringify({ ...where, path: '/metrics' })}, (r) => r.pipe(process.stdout))`
      // This thread is blocked, so another process asks.
      const { stdout } = spawnSync(process.execPath, ['-e', script], { encoding: 'utf8', cwd: daemon.directory })
      return { url, text: stdout }
    }
    const opened = open(daemon.path('a.sock'))
    const before = scrape()
    expect(before.text).toContain('virtiod_session_up{device="a"} 1\n')
    daemon.handOverDuring(() => mustServe(opened.blk))
    const after = scrape()
    expect(after.url).toBe(before.url)
    expect(after.text).toContain('virtiod_session_up{device="a"} 1\n')
    expect(after.text).toMatch(/^virtiod_blk_requests_total\{device="a",queue="0",op="read"\} [1-9]/m)
    daemon.handOverDuring(() => mustServe(opened.blk))
    expect(scrape().text).toContain('virtiod_session_up{device="a"} 1\n')
    opened.session.close()
    daemon.stop()
    expect(existsSync(daemon.path('metrics'))).toBe(false)
  })
})

describe('virtiod handover', () => {
  test('prints the new pid', () => {
    using daemon = serve(['a'])
    const old = daemon.pid
    const { code, stdout, stderr } = command(String(old))
    expect([code, stderr]).toEqual([0, ''])
    daemon.pid = Number(stdout)
    expect(daemon.pid).not.toBe(old)
    expect(eventually(() => !isAlive(old))).toBe(true)
    wellBehaved(daemon.path('a.sock'))
  })

  test('prints why not', () => {
    using daemon = serve(['a'])
    configure(daemon.directory, [{ name: 'b' }])
    const { code, stdout, stderr } = command(String(daemon.pid))
    expect([code, stdout]).toEqual([1, ''])
    expect(stderr).toMatch(
      /^virtiod: no handover: the device a is not there any more\..* The process goes on as before\.\n$/
    )
    wellBehaved(daemon.path('a.sock'))
  })

  test.each([
    ['0', 'it is no process id'],
    ['disk', 'it is no process id'],
    ['999999999', 'there is no process 999999999'],
    [String(process.pid), 'is no virtiod that serves devices'],
  ])('refuses %s', (pid, problem) => {
    const { code, stdout, stderr } = command(pid)
    expect([code, stdout]).toEqual([2, ''])
    expect(stderr).toContain(problem)
  })

  test('where systemd would end the new process too', () => {
    // The process that systemd starts knows its own pid from there: so does this shell, which becomes virtiod.
    const dir = directory()
    image(dir, 'a.img')
    configure(dir, [{ name: 'a' }])
    const prefix = ['sh', '-c', 'export SYSTEMD_EXEC_PID=$$; exec "$@"', 'sh']
    using daemon = new Serving(dir, { prefix, env: { NOTIFY_SOCKET: undefined } })
    const { code, stderr } = command(String(daemon.pid))
    expect(code).toBe(1)
    expect(stderr).toContain('the unit needs Type=notify')
    expect(readFileSync(daemon.path('log'), 'utf8')).not.toContain('a new process is starting')
    wellBehaved(daemon.path('a.sock'))
  })
})

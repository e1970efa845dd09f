/**
 * Handovers of network cards: on a switch with a capture, and on taps, whose packets have to wait for the new process.
 */
import { execFileSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest'
import { withDependents } from '../../src/frontend/net-features.ts'
import * as net from '../../src/virtio/net.ts'
import { NetworkNamespace } from '../guest/netns.ts'
import { whyNoNamespace } from '../native/network.ts'
import { frame, Guest, mac, passes } from '../net/support.ts'
import { inward, Wire } from '../net/wire.ts'
import { findCommand } from '../setup/prerequisites.ts'
import { eventually } from '../vhost-user/backend.ts'
import { directory, Serving } from './serving.ts'

// Processes start in most of them, several times: a limit for what hangs.
vi.setConfig({ testTimeout: 120_000 })

const PAIRS = 3
const guestOptions = { pairs: PAIRS, rxBuffers: 64 }

describe('on a switch', () => {
  test('guests exchange packets through it, again and again', () => {
    const dir = directory()
    const sockets = ['a', 'b'].flatMap((name) => ['--socket-path', `${name}.sock`])
    using daemon = new Serving(dir, { args: ['net', ...sockets, '--switch', 's', '--queue-pairs', String(PAIRS)] })
    using a = new Guest(daemon.path('a.sock'), 1, guestOptions)
    using b = new Guest(daemon.path('b.sock'), 2, guestOptions)
    // What a driver commanded by the control queue holds in the new process.
    expect(a.net.usePairs(2)).toBe(net.VIRTIO_NET_OK)
    const exchange = () => {
      passes(a, b)
      passes(b, a, 1500)
    }
    a.announce([b])
    b.announce([a])
    const fds: number[] = []
    for (let i = 0; i < 3; i++) {
      daemon.handOverDuring(exchange)
      for (let more = 0; more < 20; more++) exchange()
      fds.push(daemon.fds.length)
      expect(a.net.usePairs(1 + (i % PAIRS))).toBe(net.VIRTIO_NET_OK)
    }
    expect(new Set(fds).size, `${fds}`).toBe(1)
    expect(daemon.said('the device failed, its session ends')).toEqual([])
  })

  test.skipIf(findCommand('tshark') === undefined)('a capture is continued in the same file', () => {
    const dir = directory()
    const flags = ['--socket-path', 'a.sock', '--switch', 's', '--pcap', 'a.pcapng']
    using daemon = new Serving(dir, { args: ['net', ...flags] })
    const sent: string[] = []
    {
      using a = new Guest(daemon.path('a.sock'), 1)
      const send = () => {
        const bytes = frame({ from: 1, to: 2, size: 100 })
        a.send(bytes)
        sent.push(Buffer.from(bytes).toString('hex'))
      }
      send()
      daemon.handOverDuring(send)
      send()
      daemon.handOverDuring(send)
      send()
    }
    daemon.stop()
    const text = execFileSync('tshark', ['-r', daemon.path('a.pcapng'), '-T', 'json', '-x'], {
      encoding: 'utf8',
      stdio: ['ignore', 'pipe', 'ignore'],
      maxBuffer: 1 << 28,
    })
    expect([...text.matchAll(/"frame_raw": \[\s*"([0-9a-f]+)"/g)].map(([, bytes]) => bytes)).toEqual(sent)
    // Section header blocks: one of each process.
    const file = readFileSync(daemon.path('a.pcapng'))
    let sections = 0
    for (let at = 0; at < file.length; at += file.readUInt32LE(at + 4))
      if (file.readUInt32LE(at) === 0x0a0d0d0a) sections++
    expect(sections).toBe(3)
  })
})

describe.skipIf(whyNoNamespace() !== undefined)('on a tap', () => {
  let namespace: NetworkNamespace
  beforeAll(async () => {
    namespace = await NetworkNamespace.create()
    await namespace.sh('file=/proc/sys/net/ipv6/conf/default/disable_ipv6; [ ! -e $file ] || echo 1 >$file')
  })
  afterAll(() => namespace[Symbol.asyncDispose]())

  test.each([
    ['one queue', 'tap0', [], 1],
    ['several queues', 'tap1', ['--queue-pairs', String(PAIRS)], PAIRS],
  ])('%s: no packet is lost, and the tap stays', async (_, name, flags, pairs) => {
    const dir = directory()
    const args = ['net', '--socket-path', 'a.sock', '--tap', name, ...flags]
    using daemon = new Serving(dir, { args, prefix: namespace.prefix })
    using wire = new Wire(namespace, name)
    using a = new Guest(daemon.path('a.sock'), 1, { pairs, rxBuffers: 64 })
    const index = await namespace.sh(`cat /proc/net/dev | grep -c ${name}; ip -o link show ${name} | cut -d: -f1`)
    const both = () => {
      const out = frame({ from: 1, to: mac(100), size: 200 })
      a.send(out)
      wire.gets(out)
      for (let i = 0; i < 8; i++) {
        const bytes = inward(100 + i)
        bytes.set([2, i * 3, i], 6)
        wire.send(bytes)
        a.gets(bytes)
      }
    }
    if (pairs > 1) expect(a.net.usePairs(pairs)).toBe(net.VIRTIO_NET_OK)
    for (let i = 0; i < 2; i++) {
      daemon.handOverDuring(both)
      for (let more = 0; more < 10; more++) both()
    }
    expect(await namespace.sh(`cat /proc/net/dev | grep -c ${name}; ip -o link show ${name} | cut -d: -f1`)).toBe(index)
    a.close()
    // The next guest, another driver: headers of ten bytes.
    using b = new Guest(daemon.path('a.sock'), 1, { without: withDependents(net.VIRTIO_NET_F_MRG_RXBUF) })
    const bytes = inward(300)
    wire.send(bytes)
    b.gets(bytes)
    b.close()
    daemon.stop()
    expect(eventually(() => daemon.said('the kernel refused a setting of the tap').length === 0)).toBe(true)
    await expect(namespace.sh(`ip link show ${name}`)).rejects.toThrow('does not exist')
  })

  test('a failed handover leaves the tap as it is', () => {
    const dir = directory()
    const args = ['net', '--socket-path', 'a.sock', '--tap', 'tap2', '--metrics', 'unix:m']
    using daemon = new Serving(dir, { args, prefix: namespace.prefix })
    using wire = new Wire(namespace, 'tap2')
    using a = new Guest(daemon.path('a.sock'), 1)
    const both = () => {
      const bytes = inward(150)
      wire.send(bytes)
      a.gets(bytes)
      const out = frame({ from: 1, to: mac(100), size: 200 })
      a.send(out)
      wire.gets(out)
    }
    const { pid } = daemon
    const over = daemon.handOver()
    // As it has opened the tap.
    while (!daemon.lines.some((line) => line.pid !== pid && line.msg.startsWith('tap taken over'))) both()
    const [child] = daemon.children as [number]
    process.kill(child, 'SIGKILL')
    while (!over()) both()
    expect(daemon.pid).toBe(pid)
    for (let i = 0; i < 20; i++) both()
  })
})

/**
 * The other side of a tap: a packet socket inside the daemon's network namespace, in this process. A child inside makes
 * it and hands it out, since a socket stays in the namespace where it was made.
 */
import { spawnSync } from 'node:child_process'
import { closeSync, readSync, writeSync } from 'node:fs'
import { afterAll, afterEach, beforeAll, onTestFinished } from 'vitest'
import { sleepMs } from '../../src/frontend/virtqueue.ts'
import { native } from '../../src/native.ts'
import { NetworkNamespace } from '../guest/netns.ts'
import { frame, NetBackend, type NetBackendOptions } from './support.ts'

const HEADER = 10
/** Ports on the other side have numbers from here. */
export const OUTSIDE = 100

export interface WirePacket {
  /** Ten bytes: the virtio-net header without num_buffers. */
  readonly header: Uint8Array
  readonly frame: Uint8Array
}

export class Wire implements Disposable {
  readonly #fd: number
  readonly #buffer = new Uint8Array(70_000)

  /** @param link a link of the namespace that is up */
  constructor(namespace: NetworkNamespace, link: string) {
    const pair = new Int32Array(2)
    if (native.socketpair(pair) < 0) throw new Error('socketpair')
    const source = `
      import { native } from ${JSON.stringify(new URL('../../src/native.ts', import.meta.url).href)}
      const fd = native.packetSocket(${JSON.stringify(link)}, true)
      if (fd < 0) throw new Error('packetSocket: ' + fd)
      if (native.sendMessage(3, Uint8Array.of(1), 0, 1, Int32Array.of(fd), 1, true) !== 1) throw new Error('sendMessage')`
    const [command = '', ...words] = [
      ...namespace.prefix,
      process.execPath,
      '--input-type=module-typescript',
      '--eval',
      source,
    ]
    const child = spawnSync(command, words, {
      stdio: ['ignore', 'pipe', 'pipe', pair[1]!],
      env: { ...process.env, NODE_OPTIONS: '' },
    })
    native.close(pair[1]!)
    const fds = new Int32Array(4)
    const count = native.recvMessage(pair[0]!, new Uint8Array(1), 0, 1, fds)
    native.close(pair[0]!)
    if (count !== 1 || fds[0] !== 1) throw new Error(`no packet socket on ${link}: ${child.stderr}`)
    this.#fd = fds[2]!
  }

  /** To the tap's reader. @param header ten bytes; default a plain one */
  send(frame: Uint8Array, header: Uint8Array = new Uint8Array(HEADER)): void {
    writeSync(this.#fd, Buffer.concat([header.subarray(0, HEADER), frame]))
  }

  /** What came out of the tap, or undefined when nothing comes in time. */
  receive(timeoutMs = 5000): WirePacket | undefined {
    const deadline = performance.now() + timeoutMs
    for (;;) {
      try {
        const size = readSync(this.#fd, this.#buffer)
        return { header: this.#buffer.slice(0, HEADER), frame: this.#buffer.slice(HEADER, size) }
      } catch (error) {
        const { code } = error as NodeJS.ErrnoException
        // It says once that the link was down.
        if (code === 'ENETDOWN') continue
        if (code !== 'EAGAIN') throw error
        if (performance.now() >= deadline) return undefined
        sleepMs(0.2)
      }
    }
  }

  /** The next packet is this one. */
  gets(bytes: Uint8Array): WirePacket {
    const packet = this.receive()
    if (packet === undefined) throw new Error(`${bytes.length} bytes did not come out of the tap`)
    if (Buffer.compare(packet.frame, bytes) !== 0) {
      const start = (all: Uint8Array): string => Buffer.from(all.subarray(0, 48)).toString('hex')
      throw new Error(
        `the wire has ${packet.frame.length} bytes ${start(packet.frame)}, not ${bytes.length} ${start(bytes)}`
      )
    }
    return packet
  }

  [Symbol.dispose](): void {
    closeSync(this.#fd)
  }
}

export interface Setup {
  readonly backend: () => NetBackend
  readonly wire: () => Wire
  /**
   * A socket behind a bridge with tap0, until the test's end: what it sends the kernel segments when tap0 takes no such
   * packets, which a socket on tap0 itself skips.
   */
  bridged(): Promise<Wire>
  sh(script: string): Promise<string>
}

/** A daemon in a namespace of its own, and a packet socket on tap0. */
export function onTap(options: NetBackendOptions): Setup {
  let namespace: NetworkNamespace | undefined
  let backend: NetBackend | undefined
  let socket: Wire | undefined
  beforeAll(async () => {
    namespace = await NetworkNamespace.create()
    // Its packets nobody asked for.
    await namespace.sh('file=/proc/sys/net/ipv6/conf/default/disable_ipv6; [ ! -e $file ] || echo 1 >$file')
    backend = new NetBackend({ ...options, prefix: namespace.prefix })
    socket = new Wire(namespace, 'tap0')
  })
  afterEach(() => {
    backend!.mustBeUnharmed()
    while (socket!.receive(0) !== undefined);
  })
  afterAll(async () => {
    socket?.[Symbol.dispose]()
    await backend?.[Symbol.asyncDispose]()
    await namespace?.[Symbol.asyncDispose]()
  })
  const bridged = async (): Promise<Wire> => {
    const space = namespace!
    onTestFinished(async () => void (await space.sh('ip link del v0; ip link del br0')))
    // A bridge that snoops joins a group and says so.
    await space.sh('ip link add v0 type veth peer name v1; ip link add br0 type bridge mcast_snooping 0')
    await space.sh(
      'for link in tap0 v0; do ip link set $link master br0; done; for link in v0 v1 br0; do ip link set $link up; done'
    )
    const forwards = ['tap0', 'v0'].map((link) => `bridge link show dev ${link} | grep -q forwarding`).join(' && ')
    await space.sh(`until ip link show v1 | grep -q 'state UP' && ${forwards}; do sleep 0.01; done`)
    return new Wire(space, 'v1')
  }
  return { bridged, backend: () => backend!, wire: () => socket!, sh: (script) => namespace!.sh(script) }
}

/** A frame from outside to the guest. */
export function inward(size: number, to = 1): Uint8Array {
  return frame({ from: OUTSIDE, to, size })
}

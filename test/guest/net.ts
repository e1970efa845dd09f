/**
 * What the network tests share: a network in a namespace (a tap, or a switch with an uplink) that guests are put on,
 * traffic through it, and what the kernels at both ends think of the packets. Owns the addresses, the daemon's command
 * line and QEMU's.
 *
 * VIRTIOD_TEST_NETWORK=qemu runs a test file on QEMU's own tap device and the kernel's bridge, which shows whether a
 * test or virtiod is at fault (the default is virtiod).
 */
import type { ChildProcess } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { root } from '../setup/prerequisites.ts'
import { type Guest, startGuest } from './guest.ts'
import { NetworkNamespace } from './netns.ts'

export type NetworkKind = 'virtiod' | 'qemu'

/** What this test run is on. */
export const networkKind: NetworkKind = (() => {
  const kind = process.env['VIRTIOD_TEST_NETWORK'] ?? 'virtiod'
  if (kind !== 'virtiod' && kind !== 'qemu')
    throw new Error(`VIRTIOD_TEST_NETWORK: ${kind} is neither virtiod nor qemu`)
  return kind
})()

/** The namespace's own addresses; the guest on port N has 10.9.0.(10 + N) and fd09::(10 + N). */
export const hostAddress = { v4: '10.9.0.1', v6: 'fd09::1' }
export const guestAddress = (port: number) => ({ v4: `10.9.0.${10 + port}`, v6: `fd09::${10 + port}` })
export const guestMac = (port: number): string => `52:54:00:09:00:${(10 + port).toString(16).padStart(2, '0')}`

export interface NetworkOptions {
  /** The namespace's own end: the tap, or the uplink of the switch. */
  readonly tap: string
  /** With it there is a switch, and this many guests find a port on it; without it one guest has the tap for itself. */
  readonly switchPorts?: number
  readonly queuePairs?: number
  /** Bytes of IP, of the tap. */
  readonly mtu?: number
  /** A bridge that the tap is put on; the namespace has its addresses there. */
  readonly bridge?: string
  /** The tap outlives the daemon (`ip tuntap add`); otherwise the daemon makes it. */
  readonly persistent?: boolean
}

export interface CardOptions {
  /** More properties of QEMU's virtio-net-pci: ",host_mtu=9000". */
  readonly device?: string
  readonly cpus?: number
  /** More words for QEMU, before the card's. */
  readonly machine?: readonly string[]
  readonly kernelArgs?: string
}

/** A network, its namespace and its guests; they end with it. */
export class TestNetwork implements AsyncDisposable {
  readonly namespace: NetworkNamespace
  readonly #options: NetworkOptions
  readonly #directory: string
  #daemon: ChildProcess | undefined
  #log = ''
  #servers: ChildProcess[] = []
  /** Those that are still booting too: they would outlive a test that failed meanwhile. */
  #guests: Promise<Guest>[] = []

  private constructor(namespace: NetworkNamespace, options: NetworkOptions) {
    this.namespace = namespace
    this.#options = options
    this.#directory = mkdtempSync(join(tmpdir(), 'virtiod-net-'))
  }

  static async start(options: NetworkOptions): Promise<TestNetwork> {
    const network = new TestNetwork(await NetworkNamespace.create(), options)
    try {
      await network.#build()
      return network
    } catch (error) {
      await network[Symbol.asyncDispose]()
      throw error
    }
  }

  /** What virtiod has printed. */
  get log(): string {
    return this.#log
  }

  /** Boots a guest with its card on a port of the switch (or on the tap), its addresses set and its link up. */
  async guest(port = 0, card: CardOptions = {}): Promise<Guest> {
    const guest = this.#boot(port, card)
    this.#guests.push(guest)
    return await guest
  }

  async #boot(port: number, card: CardOptions): Promise<Guest> {
    const queuePairs = this.#options.queuePairs ?? 1
    const isVirtiod = networkKind === 'virtiod'
    const vectors = isVirtiod ? vhostUserVectors : 2 * queuePairs + 2
    const guest = await startGuest({
      kind: 'network',
      cpus: card.cpus ?? 1,
      timeoutMs: 200_000,
      ...(card.kernelArgs !== undefined && { kernelArgs: card.kernelArgs }),
      prefix: isVirtiod ? [] : this.namespace.prefix,
      qemuArgs: [
        ...(card.machine ?? []),
        ...(isVirtiod
          ? vhostUserArgs(this.#socket(port), queuePairs)
          : [
              '-netdev',
              `tap,id=n0,ifname=${this.#qemuTap(port)},script=no,downscript=no,vhost=off,queues=${queuePairs}`,
            ]),
        '-device',
        `virtio-net-pci,netdev=n0,mac=${guestMac(port)},mq=${queuePairs > 1 ? 'on' : 'off'},vectors=${vectors}${card.device ?? ''}`,
      ],
    })
    const own = guestAddress(port)
    try {
      await guest.sh(`ip addr add ${own.v4}/24 dev eth0
      ip addr add ${own.v6}/64 dev eth0 nodad
      ip link set lo up
      ip link set eth0 up
      iperf3 -s -D`)
      return guest
    } catch (error) {
      await guest.kill()
      throw error
    }
  }

  /** iperf3 servers in the namespace, on ports 5201 and up. */
  async serve(count = 1): Promise<void> {
    for (let i = this.#servers.length; i < count; i++)
      this.#servers.push(this.namespace.spawn('iperf3', ['-s', '-p', String(5201 + i)], { stdio: 'ignore' }))
    await this.namespace.sh(`until [ $(ss -Htln 'sport >= 5201' | wc -l) -ge ${count} ]; do sleep 0.05; done`)
  }

  /** Starts virtiod and waits until it listens on every socket; nothing for the other kind of network. */
  async startDaemon(): Promise<void> {
    if (networkKind !== 'virtiod') return
    const { tap, switchPorts, queuePairs, mtu, bridge } = this.#options
    const sockets = Array.from({ length: switchPorts ?? 1 }, (_, port) => this.#socket(port))
    const args = ['net', ...sockets.flatMap((socket) => ['--socket-path', socket])]
    args.push(...(switchPorts === undefined ? ['--tap', tap] : ['--switch', 'sw0', '--uplink', tap]))
    if (queuePairs !== undefined) args.push('--queue-pairs', String(queuePairs))
    if (mtu !== undefined) args.push('--mtu', String(mtu))
    if (bridge !== undefined) args.push('--bridge', bridge)
    const child = this.namespace.spawn(process.execPath, [join(root, 'bin', 'virtiod.js'), ...args], {
      cwd: root,
      stdio: ['ignore', 'pipe', 'pipe'],
    })
    this.#daemon = child
    for (const stream of [child.stdout, child.stderr]) {
      stream?.setEncoding('utf8').on('data', (text: string) => {
        this.#log += text
      })
    }
    await listening(child, sockets, () => this.#log)
  }

  /** Sends virtiod a signal and returns its exit code, null when the signal ended it. */
  async stopDaemon(signal: NodeJS.Signals = 'SIGTERM'): Promise<number | null> {
    const child = this.#daemon
    this.#daemon = undefined
    return child === undefined ? null : await ended(child, signal)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const guest of await Promise.allSettled(this.#guests)) {
      if (guest.status === 'fulfilled') await guest.value.kill()
    }
    await this.stopDaemon()
    for (const server of this.#servers) await ended(server, 'SIGTERM')
    await this.namespace[Symbol.asyncDispose]()
    rmSync(this.#directory, { recursive: true, force: true })
  }

  #socket(port: number): string {
    return join(this.#directory, `port${port}`)
  }

  #qemuTap(port: number): string {
    return this.#options.switchPorts === undefined ? this.#options.tap : `port${port}`
  }

  async #build(): Promise<void> {
    const { tap, switchPorts, queuePairs, mtu, bridge, persistent } = this.#options
    const multiQueue = (queuePairs ?? 1) > 1 ? 'multi_queue' : ''
    const lines: string[] = []
    if (bridge !== undefined) lines.push(`ip link add ${bridge} type bridge`)
    if (networkKind === 'virtiod') {
      if (persistent === true) lines.push(`ip tuntap add mode tap ${multiQueue} name ${tap}`)
    } else if (switchPorts === undefined) {
      lines.push(`ip tuntap add mode tap ${multiQueue} name ${tap}`)
      if (mtu !== undefined) lines.push(`ip link set ${tap} mtu ${mtu}`)
      if (bridge !== undefined) lines.push(`ip link set ${tap} master ${bridge}`)
    } else {
      lines.push(`ip link add ${tap} type bridge`)
      for (let port = 0; port < switchPorts; port++)
        lines.push(`ip tuntap add mode tap name port${port}`, `ip link set port${port} master ${tap} up`)
    }
    await this.namespace.sh(lines.join('\n'))
    await this.startDaemon()
    const end = bridge ?? tap
    await this.namespace.sh(`ip link set ${tap} up
    ip link set ${end} up
    ip addr add ${hostAddress.v4}/24 dev ${end}
    ip addr add ${hostAddress.v6}/64 dev ${end} nodad`)
  }
}

/** The words that give QEMU virtiod's socket as the network back-end n0; QEMU connects again when virtiod restarts. */
export function vhostUserArgs(socket: string, queuePairs = 1): string[] {
  return [
    '-chardev',
    `socket,id=c0,path=${socket},reconnect=1`,
    '-netdev',
    `vhost-user,id=n0,chardev=c0,queues=${queuePairs}`,
  ]
}

/**
 * A vhost-user card has no MSI-X here: QEMU 7.2 without KVM ends with SIGSEGV when the driver starts such a card
 * (virtio_pci_set_guest_notifiers sets the vector notifiers of a device that can mask its notifiers, and they use a
 * KVM irqfd that isn't there). With the interrupt line it takes another way.
 */
export const vhostUserVectors = 0

export interface TransferOptions {
  readonly bytes?: number
  /** UDP, in packets of this many bytes. */
  readonly udp?: number
}

export type Direction = 'send' | 'receive'

/** iperf3 from a guest to a server, and then from the server to the guest. */
export async function transfer(client: Guest, server: string, options: TransferOptions = {}): Promise<void> {
  for (const direction of ['send', 'receive'] as const) await oneWay(client, server, direction, options)
}

/**
 * One run of iperf3, over one connection. Fails when less than half of the bytes is reported to have arrived: the
 * receiver counts what it has read when the sender ends, not what is still on its way.
 */
export async function oneWay(
  client: Guest,
  server: string,
  direction: Direction,
  { bytes = 48 << 20, udp }: TransferOptions = {}
): Promise<void> {
  // Without -b iperf3 sends UDP at 1 Mbit/s; much more than this would be lost at the receiver's socket.
  const words = `${udp === undefined ? '' : `-u -b 60M -l ${udp}`} ${direction === 'send' ? '' : '-R'}`
  const text = await client.sh(`iperf3 -J -c ${server} -n ${bytes} ${words}`)
  const arrived = received(text).bytes
  if (arrived < bytes / 2)
    throw new Error(`of ${bytes} bytes ${arrived} arrived (iperf3 -c ${server} ${words}):\n${text}`)
}

/** The bytes that reached the receiver, and their rate, from iperf3's JSON (before which it may print a warning). */
export function received(text: string): { bytes: number; bitsPerSecond: number } {
  interface Sum {
    readonly bytes: number
    readonly bits_per_second: number
    readonly packets?: number
    readonly lost_packets?: number
  }
  const json = text.slice(Math.max(text.indexOf('{'), 0))
  const { end, error } = JSON.parse(json) as { error?: string; end: { sum_received?: Sum; sum?: Sum } }
  if (error !== undefined) throw new Error(`iperf3: ${error}`)
  // UDP has one sum, of what was sent.
  const sum = end.sum_received ?? end.sum
  if (sum === undefined) throw new Error(`iperf3 tells no sum:\n${text}`)
  const { packets = 1, lost_packets: lost = 0 } = sum
  const share = (packets - lost) / packets
  return { bytes: sum.bytes * share, bitsPerSecond: sum.bits_per_second * share }
}

/** Feature bits (virtio 1.3 §5.1.3) that the guest's driver and the device have agreed on. */
export async function negotiated(guest: Guest): Promise<Set<number>> {
  const text = await guest.sh('cat /sys/class/net/eth0/device/features')
  return new Set([...text].flatMap((digit, bit) => (digit === '1' ? [bit] : [])))
}

/** Packets per queue since the guest's start, by queue number. */
export async function queuePackets(guest: Guest): Promise<{ rx: number[]; tx: number[] }> {
  const text = await guest.sh('ethtool -S eth0')
  const all = (direction: string): number[] =>
    [...text.matchAll(new RegExp(`${direction}_queue_\\d+_packets: (\\d+)`, 'g'))].map((match) => Number(match[1]))
  return { rx: all('rx'), tx: all('tx') }
}

/** What the kernel prints about packets whose header doesn't fit them, about lost interrupts and about itself. */
const kernelComplaints =
  /bad gso|gso_type|csum fail|bad checksum|hw csum|bad_offload|timed out|too short|unexpected|allocation fail|WARNING:|BUG:|Call Trace/

/** Lines of the guest's kernel, and counters of it that should be 0; empty when it is content. */
export async function complaints(guest: Guest): Promise<string[]> {
  const messages = (await guest.sh('dmesg')).split('\n').filter((line) => kernelComplaints.test(line))
  return [...messages, ...counterComplaints(await guest.sh(counters))]
}

/** The same of the namespace's side of the network. */
export async function hostComplaints(network: TestNetwork): Promise<string[]> {
  return counterComplaints(await network.namespace.sh(counters))
}

const counters = 'ip -s -s -j link; cat /proc/net/snmp; grep -E "CsumErrors|InHdrErrors" /proc/net/snmp6'

function counterComplaints(text: string): string[] {
  const [json = '[]', ...rest] = text.split('\n')
  const found: string[] = []
  interface Link {
    readonly ifname: string
    readonly stats64: Readonly<Record<string, Readonly<Record<string, number>>>>
  }
  for (const link of JSON.parse(json) as Link[]) {
    for (const direction of ['rx', 'tx']) {
      for (const [name, count] of Object.entries(link.stats64[direction] ?? {}))
        if (/error/.test(name) && count > 0) found.push(`${link.ifname}: ${count} ${direction} ${name}`)
    }
  }
  // /proc/net/snmp: a line of names, then one of values, for each protocol; snmp6: a name and a value.
  for (let i = 0; i < rest.length; i++) {
    const words = (rest[i] ?? '').split(/\s+/)
    const names = words[0]?.endsWith(':') === true ? words : [words[0] ?? '']
    const values = names === words ? (rest[++i] ?? '').split(/\s+/) : [words[1] ?? '']
    names.forEach((name, at) => {
      if (/CsumErrors|InHdrErrors/.test(name) && Number(values[at]) > 0)
        found.push(`${names.length > 1 ? words[0] : ''} ${name} ${values[at]}`.trim())
    })
  }
  return found
}

/** Waits until a process listens on all of these. The kernel is asked: a test connection would be a session. */
export async function listening(child: ChildProcess, sockets: readonly string[], log: () => string): Promise<void> {
  const SO_ACCEPTCON = 0x10000
  const deadline = performance.now() + 10_000
  for (;;) {
    if (child.exitCode !== null || child.signalCode !== null)
      throw new Error(`virtiod ended with ${child.exitCode ?? child.signalCode} before it listened:\n${log()}`)
    // The list is that of the process's own network namespace.
    const paths = readFileSync(`/proc/${child.pid}/net/unix`, 'utf8')
      .split('\n')
      .flatMap((line) => {
        const fields = line.trim().split(/\s+/)
        return (Number.parseInt(fields[3] ?? '0', 16) & SO_ACCEPTCON) === 0 ? [] : [fields[7]]
      })
    if (sockets.every((socket) => paths.includes(socket))) return
    if (performance.now() > deadline) {
      await ended(child, 'SIGKILL')
      throw new Error(`virtiod did not listen on ${sockets.join(', ')} within 10 s:\n${log()}`)
    }
    await sleep(10)
  }
}

/** Ends a process; SIGKILL follows after ten seconds. Returns its exit code. */
export async function ended(child: ChildProcess, signal: NodeJS.Signals): Promise<number | null> {
  if (child.exitCode !== null || child.signalCode !== null) return child.exitCode
  const exit = new Promise<number | null>((resolve) => child.once('exit', (code) => resolve(code)))
  child.kill(signal)
  const timer = setTimeout(() => child.kill('SIGKILL'), 10_000)
  try {
    return await exit
  } finally {
    clearTimeout(timer)
  }
}

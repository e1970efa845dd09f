/**
 * How fast two QEMU guests talk to each other: over virtiod's switch, and over QEMU's own `-netdev socket` (TCP) and
 * `-netdev stream` (unix socket). A script, no test:
 *
 *   node test/guest/net-speed.ts [--rounds 5] [--seconds 3]
 *
 * The same two guests each time (one processor each under TCG, iperf3 over TCP), the networks by turns so that a
 * noisy machine is noisy for all of them. Prints the medians, lowest and highest, and virtiod's ratio to each of the
 * others. virtiod's guests use the interrupt line (see vhostUserVectors); so do those of the rows without "MSI-X".
 */
import { mkdtempSync, rmSync } from 'node:fs'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { root } from '../setup/prerequisites.ts'
import { type Guest, spawnTied, startGuest } from './guest.ts'
import { ended, guestAddress, guestMac, listening, received, vhostUserArgs, vhostUserVectors } from './net.ts'

interface Network {
  readonly name: string
  readonly vectors: number
  /** QEMU's words for the guests' ends, the first guest's and the second's, and what ends the network. */
  start(directory: string): Promise<{ args: [string[], string[]]; stop(): Promise<unknown> }>
}

const idle = async (): Promise<void> => undefined

async function socketNetwork(): ReturnType<Network['start']> {
  const port = await freePort()
  return {
    args: [
      ['-netdev', `socket,id=n0,listen=127.0.0.1:${port}`],
      ['-netdev', `socket,id=n0,connect=127.0.0.1:${port}`],
    ],
    stop: idle,
  }
}

async function streamNetwork(directory: string): ReturnType<Network['start']> {
  const address = `addr.type=unix,addr.path=${join(directory, 'stream')}`
  return {
    args: [
      ['-netdev', `stream,id=n0,server=on,${address}`],
      ['-netdev', `stream,id=n0,server=off,${address}`],
    ],
    stop: idle,
  }
}

/** No tap and no root: the switch is all inside virtiod. */
async function virtiodNetwork(directory: string): ReturnType<Network['start']> {
  const sockets = [join(directory, 'a'), join(directory, 'b')] as const
  const words = sockets.flatMap((socket) => ['--socket-path', socket])
  const child = spawnTied(process.execPath, [join(root, 'bin', 'virtiod.js'), 'net', ...words, '--switch', 'sw0'], {
    cwd: root,
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  let log = ''
  for (const stream of [child.stdout, child.stderr]) {
    stream?.setEncoding('utf8').on('data', (text: string) => {
      log += text
    })
  }
  await listening(child, sockets, () => log)
  return { args: [vhostUserArgs(sockets[0]), vhostUserArgs(sockets[1])], stop: () => ended(child, 'SIGTERM') }
}

const networks: readonly Network[] = [
  { name: 'virtiod switch', vectors: vhostUserVectors, start: virtiodNetwork },
  { name: 'QEMU socket', vectors: vhostUserVectors, start: socketNetwork },
  { name: 'QEMU stream', vectors: vhostUserVectors, start: streamNetwork },
  { name: 'QEMU stream, MSI-X', vectors: 4, start: streamNetwork },
]

const directions = ['', '-R'] as const

async function boot(port: number, args: readonly string[], vectors: number): Promise<Guest> {
  const device = `virtio-net-pci,netdev=n0,mq=off,mac=${guestMac(port)},vectors=${vectors}`
  const guest = await startGuest({ kind: 'network', qemuArgs: [...args, '-device', device] })
  await guest.sh(`ip addr add ${guestAddress(port).v4}/24 dev eth0; ip link set lo up; ip link set eth0 up`)
  return guest
}

/** Mbit/s from the first guest to the second, and back. */
async function measure(network: Network, seconds: number): Promise<number[]> {
  const directory = mkdtempSync(join(tmpdir(), 'virtiod-speed-'))
  const { args, stop } = await network.start(directory)
  try {
    await using b = await boot(1, args[0], network.vectors)
    await using a = await boot(0, args[1], network.vectors)
    await b.sh('iperf3 -s -D')
    await a.sh(`ping -c 2 -i 0.2 ${guestAddress(1).v4}`)
    const speeds: number[] = []
    for (const direction of directions) {
      const text = await a.sh(`iperf3 -J -O 1 -t ${seconds} -c ${guestAddress(1).v4} ${direction}`)
      speeds.push(received(text).bitsPerSecond / 1e6)
    }
    return speeds
  } finally {
    await stop()
    rmSync(directory, { recursive: true, force: true })
  }
}

async function freePort(): Promise<number> {
  const server = createServer()
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const address = server.address()
  await new Promise((resolve) => server.close(resolve))
  if (address === null || typeof address === 'string') throw new Error('no TCP port')
  return address.port
}

const { values } = parseArgs({
  options: { rounds: { type: 'string', default: '5' }, seconds: { type: 'string', default: '3' } },
})
const rounds = Number(values.rounds)
const seconds = Number(values.seconds)
if (!(Number.isInteger(rounds) && rounds > 0 && Number.isInteger(seconds) && seconds > 0))
  throw new Error('--rounds and --seconds are whole numbers above 0')

const results = networks.map(() => directions.map((): number[] => []))
for (let round = 1; round <= rounds; round++) {
  for (const [at, network] of networks.entries()) {
    const speeds = await measure(network, seconds)
    speeds.forEach((speed, direction) => {
      results[at]?.[direction]?.push(speed)
    })
    process.stderr.write(
      `round ${round}: ${network.name}: ${speeds.map((speed) => speed.toFixed(0)).join(', ')} Mbit/s\n`
    )
  }
}

const median = (numbers: readonly number[]): number => {
  const sorted = numbers.toSorted((x, y) => x - y)
  const middle = sorted.length >> 1
  return sorted.length % 2 === 1 ? (sorted[middle] ?? 0) : ((sorted[middle - 1] ?? 0) + (sorted[middle] ?? 0)) / 2
}
console.log(`| network | one way, Mbit/s | virtiod is | back, Mbit/s | virtiod is |\n|---|---|---|---|---|`)
for (const [at, network] of networks.entries()) {
  const cells = directions.map((_, direction) => {
    const own = results[at]?.[direction] ?? []
    const ratio = median(results[0]?.[direction] ?? []) / median(own)
    const spread = `${Math.min(...own).toFixed(0)} … ${Math.max(...own).toFixed(0)}`
    return `${median(own).toFixed(0)} (${spread}) | ${at === 0 ? '' : `${ratio.toFixed(1)}×`}`
  })
  console.log(`| ${network.name} | ${cells.join(' | ')} |`)
}

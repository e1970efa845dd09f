/**
 * The network back-ends that a comparison starts: virtiod and dpdk-testpmd, as a switch between two sockets or as a tap
 * behind one. It owns their processes. It must not know what is measured.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { virtiodCommand } from './rivals.ts'

/** What a back-end is to do. */
export interface NetSetup {
  /** For its sockets and files; exists. */
  readonly directory: string
  /** A tap of this name behind one socket; without, packets go between two sockets. */
  readonly tap?: string
  /** Packets that want to be segmented will come. */
  readonly tso: boolean
  /** Words before the command, to enter the tap's namespace. */
  readonly prefix: readonly string[]
  /** The processor that it is pinned to. */
  readonly cpu: number
}

export interface NetRival {
  readonly name: string
  /** It has written this when it forwards packets. */
  readonly ready: string
  /** Its tap takes no packets that want to be segmented. */
  readonly segments: boolean
  /** Its pinned command line. */
  command(setup: NetSetup, sockets: readonly string[]): readonly string[]
}

/** @param built run the compiled package instead of the TypeScript */
export function virtiodNetRival(built: boolean): NetRival {
  return {
    name: 'virtiod',
    ready: '"msg":"ready"',
    segments: false,
    // biome-ignore format: option and value on one line
    command: ({ tap, cpu }, sockets) => [
      'taskset', '-c', String(cpu), ...virtiodCommand(built), 'net',
      ...sockets.flatMap((socket) => ['--socket-path', socket]),
      ...(tap === undefined ? ['--switch', 'bench'] : ['--tap', tap]),
      '--iothreads', '1'
    ],
  }
}

/**
 * dpdk-testpmd, `io` between two of its ports, without huge pages, which the comparison would have to set
 * up. `legacy-ol-flags`: the packets' headers go on from port to port, so that TSO stays TSO. Its main thread, which sleeps
 * but for the signals that its tap has sent for each packet, is on the back-end's processor too.
 */
export function testpmdRival(): NetRival {
  return {
    name: 'DPDK',
    ready: 'packet forwarding - ports=2',
    segments: true,
    command: ({ directory, tap, tso, cpu }, sockets) => {
      const commands = join(directory, 'testpmd.commands')
      writeFileSync(commands, TAP_TSO)
      const vdevs = sockets.map((socket, i) => `net_vhost${i},iface=${socket},queues=1,tso=1,legacy-ol-flags=1`)
      if (tap !== undefined) vdevs.push(`net_tap0,iface=${tap}`)
      // biome-ignore format: option and value on one line
      return [
        // Its standard output is a pipe, which would get "ready" with the last of the first 4096 bytes.
        'stdbuf', '-oL', 'dpdk-testpmd', '--lcores', `0@${cpu},1@${cpu}`,
        '--no-huge', '-m', '512', '--no-pci', '--no-telemetry', '--file-prefix', `virtiod-bench-${process.pid}`,
        ...vdevs.flatMap((vdev) => ['--vdev', vdev]),
        '--', '--total-num-mbufs=32768', '--rxq=1', '--txq=1', '--forward-mode=io', '--disable-link-check',
        ...(tap !== undefined && tso ? ['-i', `--cmdline-file=${commands}`] : ['--stats-period', '3600'])
      ]
    },
  }
}

/**
 * Its tap has no segmentation offload of the kernel's; it segments by itself and fills in checksums when it is told so.
 * `--tx-offloads` would tell the vhost port too, which refuses.
 */
const TAP_TSO = `port stop 1
${['multi_segs', 'ipv4_cksum', 'tcp_cksum', 'tcp_tso'].map((name) => `port config 1 tx_offload ${name} on`).join('\n')}
port start 1
start
`

/** One that polls must not stay behind, whatever ends this process. */
const TIED = ['setpriv', '--pdeathsig', 'KILL', '--'] as const

/** A back-end that forwards packets. */
export class RunningNet implements AsyncDisposable {
  readonly sockets: readonly string[]
  readonly #child: ChildProcess
  readonly #exited: Promise<void>

  private constructor(child: ChildProcess, exited: Promise<void>, sockets: readonly string[]) {
    this.#child = child
    this.#exited = exited
    this.sockets = sockets
  }

  /** @throws Error with what it wrote when it ends first, or is not ready within 20 s */
  static async start(rival: NetRival, setup: NetSetup): Promise<RunningNet> {
    const sockets = (setup.tap === undefined ? ['a', 'b'] : ['a']).map((name) => join(setup.directory, `${name}.sock`))
    for (const socket of sockets) rmSync(socket, { force: true })
    const argv = [...setup.prefix, ...TIED, ...rival.command(setup, sockets)]
    // testpmd ends at the end of its standard input: a pipe has none.
    const child = spawn(argv[0] ?? '', argv.slice(1), { stdio: ['pipe', 'pipe', 'pipe'] })
    let ended = false
    let output = ''
    const { promise: exited, resolve } = Promise.withResolvers<void>()
    const end = (error?: unknown): void => {
      if (error instanceof Error) output += error.message
      ended = true
      resolve()
    }
    child.once('error', end)
    child.once('close', () => end())
    const backend = new RunningNet(child, exited, sockets)
    const deadline = performance.now() + 20_000
    for (const stream of [child.stdout, child.stderr]) {
      stream.setEncoding('utf8').on('data', (text: string) => {
        if (output.length < 65_536) output += text
      })
    }
    while (!output.includes(rival.ready)) {
      const late = performance.now() > deadline
      if (late) await backend[Symbol.asyncDispose]()
      if (late || ended) {
        throw new Error(`${rival.name} does not start: ${output.slice(-2000).trim()}\n(${argv.join(' ')})`)
      }
      await new Promise((again) => setTimeout(again, 5))
    }
    return backend
  }

  /** SIGINT, which both take for the wish to end, and SIGKILL after 5 s. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#child.kill('SIGINT')
    const timer = setTimeout(() => this.#child.kill('SIGKILL'), 5000)
    await this.#exited
    clearTimeout(timer)
  }
}

/**
 * dpdk-testpmd (Debian package dpdk-dev) as a peer for tests and benches: as a vhost-user-net back-end (its `net_vhost` ports)
 * or as an independent front-end (its virtio-user port). It owns the process and its sockets' directory; output goes to a
 * file, since a pipe that nobody empties would block it. Knows nothing of virtiod.
 *
 * testpmd polls: while it runs, the processor of its forwarding core is busy.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { closeSync, mkdtempSync, openSync, readFileSync, rmSync } from 'node:fs'
import { availableParallelism, tmpdir } from 'node:os'
import { join } from 'node:path'
import { findCommand } from './setup/prerequisites.ts'

/** What testpmd does with packets; its own names. */
export type ForwardMode = 'io' | 'mac' | 'macswap' | 'rxonly' | 'txonly' | 'icmpecho' | 'csum'

export interface TestpmdOptions {
  /** Default io: what comes in at a port goes out at the other one (or at the same, when there is one). */
  readonly mode?: ForwardMode
  /** Queue pairs per port; default 1. */
  readonly queues?: number
  /** Processors of its main thread and of its forwarding thread; default 0 and the last one. */
  readonly cpus?: readonly [number, number]
  /** Megabytes of memory; default 256. */
  readonly memory?: number
  /** Packet buffers; default 8192. */
  readonly buffers?: number
  /** Lengths of the segments of each packet of `txonly`; default 64 bytes in one. */
  readonly txSegments?: readonly number[]
  /** More arguments of testpmd's own, behind `--`. */
  readonly extra?: readonly string[]
}

export interface BackendTestpmdOptions extends TestpmdOptions {
  /** vhost ports, each with a socket; default 1. */
  readonly ports?: number
  /**
   * Offer HOST_TSO4, HOST_TSO6 and so on (`tso` of net_vhost), and pass packet headers on from port to port
   * (`legacy-ol-flags`; without, checksums are completed and gso_type is lost). Default false.
   */
  readonly tso?: boolean
  /** More devices beside the vhost ports, e.g. `net_tap0,iface=x`. */
  readonly vdevs?: readonly string[]
}

export interface FrontendTestpmdOptions extends TestpmdOptions {
  /** Arguments of net_virtio_user, e.g. `mrg_rxbuf=0`, `packed_vq=1`, `in_order=1`, `mac=…`. */
  readonly device?: readonly string[]
  readonly vdevs?: readonly string[]
}

/**
 * Why testpmd cannot run, or undefined. Said aloud: a test that did not run must not look like one that passed.
 */
export function whyNoTestpmd(): string | undefined {
  if (findCommand('dpdk-testpmd') !== undefined) return undefined
  const reason = 'dpdk-testpmd is not installed (Debian: apt-get install dpdk)'
  process.stderr.write(`\nSKIPPED: the tests with DPDK: ${reason}\n\n`)
  return reason
}

// A test that fails halfway must not leave a process behind that keeps a processor busy.
const running = new Set<ChildProcess>()
process.once('exit', () => {
  for (const child of running) child.kill('SIGKILL')
})
let count = 0

export class Testpmd implements AsyncDisposable {
  readonly directory: string
  /** Of a back-end: one per port. Of a front-end: the one it connected to. */
  readonly sockets: readonly string[]
  readonly process: ChildProcess
  readonly ended: Promise<{ code: number | null; signal: string | null }>

  private constructor(directory: string, sockets: readonly string[], args: readonly string[]) {
    this.directory = directory
    this.sockets = sockets
    const log = openSync(join(directory, 'log'), 'w')
    this.process = spawn('dpdk-testpmd', args, { stdio: ['ignore', log, log] })
    closeSync(log)
    running.add(this.process)
    this.process.once('exit', () => running.delete(this.process))
    this.ended = new Promise((resolve) => this.process.once('exit', (code, signal) => resolve({ code, signal })))
  }

  /** Starts it with vhost ports and waits until their sockets are there. @throws Error with its output when it fails */
  static async backend(options: BackendTestpmdOptions = {}): Promise<Testpmd> {
    const directory = mkdtempSync(join(tmpdir(), 'virtiod-dpdk-'))
    const sockets = Array.from({ length: options.ports ?? 1 }, (_, i) => join(directory, `vhost${i}.sock`))
    const vdevs = sockets.map(
      (socket, i) =>
        `net_vhost${i},iface=${socket},queues=${options.queues ?? 1}${options.tso === true ? ',tso=1,legacy-ol-flags=1' : ''}`
    )
    const child = new Testpmd(directory, sockets, commandLine([...vdevs, ...(options.vdevs ?? [])], options))
    await child.#until(() => sockets.every(isListening))
    return child
  }

  /** Starts it with a virtio-user port on a back-end's socket, which must be there. */
  static async frontend(socket: string, options: FrontendTestpmdOptions = {}): Promise<Testpmd> {
    const directory = mkdtempSync(join(tmpdir(), 'virtiod-dpdk-'))
    const device = ['net_virtio_user0', `path=${socket}`, `queues=${options.queues ?? 1}`, ...(options.device ?? [])]
    const vdevs = [device.join(','), ...(options.vdevs ?? [])]
    const child = new Testpmd(directory, [socket], commandLine(vdevs, options))
    await child.#until(() => child.output.includes('testpmd>') || child.output.includes('Port 0:'))
    return child
  }

  get pid(): number {
    return this.process.pid as number
  }

  get alive(): boolean {
    return this.process.exitCode === null && this.process.signalCode === null
  }

  /** What it has written so far; it writes blocks, and the rest when it ends. */
  get output(): string {
    return readFileSync(join(this.directory, 'log'), 'utf8')
  }

  /** Packets of the final statistics over all ports; only after `stop`. */
  totals(): { received: number; transmitted: number; dropped: number } {
    const text = this.output.slice(this.output.lastIndexOf('Accumulated forward statistics'))
    const of = (name: string): number => Number(new RegExp(`${name}-packets: (\\d+)`).exec(text)?.[1] ?? Number.NaN)
    return { received: of('RX'), transmitted: of('TX'), dropped: of('TX-dropped') || 0 }
  }

  /** SIGINT, as an operator ends it; then its statistics are in `output`. @returns all of its output */
  async stop(): Promise<string> {
    this.process.kill('SIGINT')
    const timer = setTimeout(() => this.process.kill('SIGKILL'), 10_000)
    await this.ended
    clearTimeout(timer)
    return this.output
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop()
    rmSync(this.directory, { recursive: true, force: true })
  }

  async #until(condition: () => boolean): Promise<void> {
    const deadline = performance.now() + 20_000
    while (!condition()) {
      if (!this.alive || performance.now() > deadline) {
        const text = this.output.slice(-3000)
        this.process.kill('SIGKILL')
        rmSync(this.directory, { recursive: true, force: true })
        throw new Error(`dpdk-testpmd does not start:\n${text}`)
      }
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
  }
}

/** Between bind and listen a socket is there and refuses. Connecting to find out would open a session. */
function isListening(socket: string): boolean {
  const line = readFileSync('/proc/net/unix', 'utf8')
    .split('\n')
    .find((one) => one.endsWith(` ${socket}`))
  // Num: RefCount Protocol Flags …; __SO_ACCEPTCON is 0x10000.
  return line !== undefined && (Number.parseInt(line.split(/\s+/)[3] ?? '0', 16) & 0x1_0000) !== 0
}

function commandLine(vdevs: readonly string[], options: TestpmdOptions): string[] {
  const [main, worker] = options.cpus ?? [0, availableParallelism() - 1]
  const queues = options.queues ?? 1
  // biome-ignore format: option and value on one line
  return [
    '--lcores', `0@${main},1@${worker}`, '--no-huge', '-m', String(options.memory ?? 256), '--no-pci', '--no-telemetry',
    '--file-prefix', `virtiod-${process.pid}-${count++}`,
    ...vdevs.flatMap((vdev) => ['--vdev', vdev]),
    '--',
    `--total-num-mbufs=${options.buffers ?? 8192}`, `--rxq=${queues}`, `--txq=${queues}`,
    `--forward-mode=${options.mode ?? 'io'}`, '--disable-link-check',
    // Without this the end of its standard input ends it.
    '--stats-period', '3600',
    ...(options.txSegments === undefined ? [] : [`--txpkts=${options.txSegments.join(',')}`]),
    ...(options.txSegments !== undefined && options.txSegments.length > 1 ? ['--tx-offloads=0x8000'] : []),
    ...(options.extra ?? [])
  ]
}

/**
 * A virtiod process for tests: this installation's own command line, with the Node that runs the test. Owns the process
 * and its log; knows nothing of what it serves.
 *
 *   await using daemon = await startVirtiod(['device', './my-device.ts', '--socket-path', socketPath])
 *   using front = connect(socketPath)
 */
import { type ChildProcess, spawnSync } from 'node:child_process'
import { closeSync, mkdtempSync, openSync, readdirSync, readFileSync, readlinkSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { spawnTied } from './tied.ts'

/** bin/virtiod.js lies above src/testing/ in a checkout and above dist/src/testing/ in a package. */
const launcher = fileURLToPath(
  new URL(import.meta.url.endsWith('.ts') ? '../../bin/virtiod.js' : '../../../bin/virtiod.js', import.meta.url)
)

export interface VirtiodOptions {
  /** Beside the variables of this process. */
  readonly env?: NodeJS.ProcessEnv
  /** The working directory: what relative paths of `args` start from. Default: this process's. */
  readonly cwd?: string
  /** How long it may take to listen, in milliseconds; default 20 000. */
  readonly timeoutMs?: number
}

/** How a process ended. */
export interface VirtiodEnd {
  /** The exit code: 0 after SIGTERM, 2 for a mistake of the operator. null when a signal ended it. */
  readonly code: number | null
  readonly signal: NodeJS.Signals | null
}

/** What a run to the end has printed, and how it ended. */
export interface VirtiodResult extends VirtiodEnd {
  readonly stdout: string
  readonly stderr: string
}

/** virtiod did not start: its message is what virtiod printed. */
export class VirtiodError extends Error {
  override readonly name = 'VirtiodError'
  /** The exit code; null when it was killed for it did not listen in time. */
  readonly exitCode: number | null
  /** All that it printed. */
  readonly log: string

  constructor(message: string, exitCode: number | null, log: string) {
    super(`${message}:\n${log.trimEnd()}`)
    this.exitCode = exitCode
    this.log = log
  }
}

/** Every one that runs, so that none outlives this process. */
const running = new Set<ChildProcess>()
process.once('exit', () => {
  for (const child of running) child.kill('SIGKILL')
})

/**
 * Starts `virtiod ARGS` and returns when it serves: each `--socket-path` of `args` takes connections; without one (`run
 * FILE`) its log says "ready".
 * @throws VirtiodError with what it printed, when it ends before that, or doesn't get so far in time
 */
export async function startVirtiod(args: readonly string[], options: VirtiodOptions = {}): Promise<VirtiodProcess> {
  const daemon = new VirtiodProcess(args, options)
  const { timeoutMs = 20_000 } = options
  const deadline = performance.now() + timeoutMs
  while (!daemon.serves) {
    const late = performance.now() > deadline
    if (!daemon.hasEnded && !late) {
      await sleep(5)
      continue
    }
    const { log } = daemon
    const { code } = await daemon.stop(late ? 'SIGKILL' : 'SIGTERM')
    throw new VirtiodError(late ? `virtiod does not listen after ${timeoutMs} ms` : 'virtiod ended', code, log)
  }
  return daemon
}

/**
 * Runs `virtiod ARGS` to its end: for commands that end by themselves (`--check-config`, `qemu-args`, mistakes). It blocks.
 */
export function runVirtiod(args: readonly string[], options: VirtiodOptions = {}): VirtiodResult {
  const { env, cwd, timeoutMs = 20_000 } = options
  const { status, signal, stdout, stderr, error } = spawnSync(process.execPath, [launcher, ...args], {
    cwd,
    env: { ...process.env, ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
    encoding: 'utf8',
    timeout: timeoutMs,
    maxBuffer: 64 << 20,
  })
  if (error !== undefined) throw error
  return { code: status, signal, stdout, stderr }
}

/** A running virtiod; see {@link startVirtiod}. `await using` ends it with the test. */
export class VirtiodProcess implements AsyncDisposable {
  readonly pid: number
  /** The sockets that its command line names, as absolute paths. */
  readonly socketPaths: readonly string[]
  /** Resolves when it has ended, however. */
  readonly ended: Promise<VirtiodEnd>
  readonly #child: ChildProcess
  readonly #directory: string
  readonly #given: readonly string[]
  #hasEnded = false
  #lastLog = ''

  /** @internal Use startVirtiod. */
  constructor(args: readonly string[], { env, cwd = process.cwd() }: VirtiodOptions) {
    this.#given = args.flatMap((arg, i) => {
      if (arg === '--socket-path') return args[i + 1] ?? []
      return arg.startsWith('--socket-path=') ? arg.slice('--socket-path='.length) : []
    })
    this.socketPaths = this.#given.map((path) => resolve(cwd, path))
    this.#directory = mkdtempSync(join(tmpdir(), 'virtiod-test-'))
    // A file: nobody empties a pipe while the front-end blocks this thread.
    const log = openSync(this.#logPath, 'w')
    this.#child = spawnTied(process.execPath, [launcher, ...args], {
      cwd,
      env: { ...process.env, ...env },
      stdio: ['ignore', log, log],
    })
    closeSync(log)
    running.add(this.#child)
    this.pid = this.#child.pid ?? -1
    const { promise, resolve: end, reject } = Promise.withResolvers<VirtiodEnd>()
    this.ended = promise
    promise.catch(() => undefined)
    const forget = (): void => {
      this.#lastLog = this.log
      this.#hasEnded = true
      running.delete(this.#child)
      rmSync(this.#directory, { recursive: true, force: true })
    }
    this.#child.once('error', (error) => {
      forget()
      reject(error)
    })
    this.#child.once('exit', (code, signal) => {
      forget()
      end({ code, signal })
    })
  }

  get hasEnded(): boolean {
    return this.#hasEnded
  }

  /** All that it has printed so far, standard output and error: its log, a JSON object per line. */
  get log(): string {
    return this.#hasEnded ? this.#lastLog : readFileSync(this.#logPath, 'utf8')
  }

  /** Its log's lines, as objects; what is no JSON is left out. */
  get lines(): readonly Readonly<Record<string, unknown>>[] {
    const complete = this.log.split('\n').slice(0, -1)
    return complete
      .filter((line) => line.startsWith('{'))
      .map((line) => JSON.parse(line) as Readonly<Record<string, unknown>>)
  }

  /** Whether it serves: see {@link startVirtiod}. */
  get serves(): boolean {
    if (this.#hasEnded) return false
    if (this.#given.length === 0) return this.lines.some((line) => line['msg'] === 'ready')
    // The kernel is asked: a connection would be a session, and the file may be one that a dead process left.
    const SO_ACCEPTCON = 0x10000
    const listening = new Set<string>()
    const own = socketsOf(this.pid)
    for (const line of readFileSync('/proc/net/unix', 'utf8').split('\n')) {
      const [, , , flags = '0', , , inode = '', ...path] = line.trim().split(/ +/)
      if ((Number.parseInt(flags, 16) & SO_ACCEPTCON) === 0) continue
      // Of a relative path: another process may have one of that name in its own directory.
      if (own.has(inode)) listening.add(path.join(' '))
    }
    return this.#given.every((path, i) => listening.has(path) || listening.has(this.socketPaths[i] ?? ''))
  }

  /**
   * Waits until the log has this text, or matches this pattern.
   * @throws an Error with the log when it ends without, or doesn't within `timeoutMs` (default 20 000)
   */
  async printed(what: string | RegExp, timeoutMs = 20_000): Promise<void> {
    const deadline = performance.now() + timeoutMs
    const has = (log: string): boolean => (typeof what === 'string' ? log.includes(what) : what.test(log))
    for (;;) {
      const { hasEnded } = this
      if (has(this.log)) return
      if (hasEnded) throw new Error(`virtiod ended without printing ${what}:\n${this.log}`)
      if (performance.now() > deadline) throw new Error(`virtiod has not printed ${what} yet:\n${this.log}`)
      await sleep(5)
    }
  }

  /** Sends a signal: SIGHUP looks at backing files again, SIGUSR2 hands over to a new process. */
  kill(signal: NodeJS.Signals): void {
    if (!this.#hasEnded) this.#child.kill(signal)
  }

  /** Ends it and tells how it ended; SIGKILL follows after ten seconds. */
  async stop(signal: NodeJS.Signals = 'SIGTERM'): Promise<VirtiodEnd> {
    this.kill(signal)
    const timer = setTimeout(() => this.kill('SIGKILL'), 10_000)
    try {
      return await this.ended
    } finally {
      clearTimeout(timer)
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop('SIGKILL')
  }

  get #logPath(): string {
    return join(this.#directory, 'log')
  }
}

/** The inodes of a process's sockets; empty when it has just ended. */
function socketsOf(pid: number): Set<string> {
  const inodes = new Set<string>()
  try {
    for (const fd of readdirSync(`/proc/${pid}/fd`)) {
      const [, inode] = /^socket:\[(\d+)\]$/.exec(linkOf(`/proc/${pid}/fd/${fd}`)) ?? []
      if (inode !== undefined) inodes.add(inode)
    }
  } catch {
    // It ended.
  }
  return inodes
}

function linkOf(path: string): string {
  try {
    return readlinkSync(path)
  } catch {
    // Closed since it was listed.
    return ''
  }
}

/**
 * A virtiod process that is started to be killed: its start, whether it listens, its end and its log. It knows nothing
 * of what it serves.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { closeSync, openSync, readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'

const launcher = fileURLToPath(new URL('../../bin/virtiod.js', import.meta.url))

export interface DaemonEnd {
  readonly code: number | null
  readonly signal: NodeJS.Signals | null
}

export interface DaemonOptions {
  readonly env?: NodeJS.ProcessEnv
  /** Words before virtiod's: a program that prepares something and replaces itself by it. */
  readonly prefix?: readonly string[]
  /** false: `args` say where it listens; `socket` is one of those places. */
  readonly socketOption?: boolean
}

/** Every one that runs, so that none outlives this process. */
const running = new Set<ChildProcess>()
process.once('exit', () => {
  for (const child of running) child.kill('SIGKILL')
})

export class Daemon {
  readonly pid: number
  readonly ended: Promise<DaemonEnd>
  readonly socket: string
  readonly #child: ChildProcess
  readonly #logPath: string
  #hasEnded = false

  /** @param args virtiod's words without `--socket-path` @param logPath is written anew */
  constructor(socket: string, args: readonly string[], logPath: string, options: DaemonOptions = {}) {
    const { env, prefix = [], socketOption = true } = options
    this.socket = socket
    this.#logPath = logPath
    // A file: nobody empties a pipe while the front-end blocks this thread.
    const log = openSync(logPath, 'w')
    const words = [...prefix, process.execPath, launcher, ...args, ...(socketOption ? ['--socket-path', socket] : [])]
    this.#child = spawn(words[0] ?? '', words.slice(1), {
      stdio: ['ignore', log, log],
      env: { ...process.env, ...env },
    })
    closeSync(log)
    running.add(this.#child)
    this.pid = this.#child.pid ?? -1
    this.ended = new Promise((resolve) =>
      this.#child.once('exit', (code, signal) => {
        this.#hasEnded = true
        running.delete(this.#child)
        resolve({ code, signal })
      })
    )
  }

  get hasEnded(): boolean {
    return this.#hasEnded
  }

  get log(): string {
    return readFileSync(this.#logPath, 'utf8')
  }

  /** Whether its socket takes connections. The kernel is asked: the file may be one that a dead process left. */
  get listens(): boolean {
    const SO_ACCEPTCON = 0x10000
    return readFileSync('/proc/net/unix', 'utf8')
      .split('\n')
      .some((line) => {
        if (!line.endsWith(this.socket)) return false
        return (Number.parseInt(line.trim().split(/\s+/)[3] ?? '0', 16) & SO_ACCEPTCON) !== 0
      })
  }

  /** Polls until it listens. False when it ends first. @throws Error when it does neither */
  async listening(timeoutMs = 20_000): Promise<boolean> {
    const deadline = performance.now() + timeoutMs
    while (!this.listens) {
      if (this.#hasEnded) return false
      if (performance.now() > deadline) throw new Error(`virtiod does not listen after ${timeoutMs} ms:\n${this.log}`)
      await new Promise((resolve) => setTimeout(resolve, 2))
    }
    return true
  }

  async stop(signal: NodeJS.Signals = 'SIGTERM'): Promise<DaemonEnd> {
    if (!this.#hasEnded) this.#child.kill(signal)
    const timer = setTimeout(() => this.#child.kill('SIGKILL'), 10_000)
    try {
      return await this.ended
    } finally {
      clearTimeout(timer)
    }
  }
}

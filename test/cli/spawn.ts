/** Runs the real command line as a process. */
import { type ChildProcess, spawn } from 'node:child_process'
import { fileURLToPath } from 'node:url'

/** The launcher of this checkout. */
export const checkoutLauncher = fileURLToPath(new URL('../../bin/virtiod.js', import.meta.url))

export interface RunOptions {
  readonly cwd?: string
  /** Beside the variables of this process. */
  readonly env?: NodeJS.ProcessEnv
  /** Another Node. */
  readonly node?: string
  /** Another installation's bin/virtiod.js. */
  readonly launcher?: string
}

export interface Result {
  /** The exit code; null when a signal ended it. */
  readonly code: number | null
  readonly stdout: string
  readonly stderr: string
}

/** Runs virtiod to its end. */
export async function virtiod(args: readonly string[], options: RunOptions = {}): Promise<Result> {
  return new Running(args, options).ended
}

/** A virtiod that runs until it is told to end. Whatever is left at the end of a test: `await using`. */
export class Running implements AsyncDisposable {
  readonly process: ChildProcess
  readonly ended: Promise<Result>
  stdout = ''
  stderr = ''
  #waiting: (() => void)[] = []

  constructor(
    args: readonly string[],
    { cwd, env, node = process.execPath, launcher = checkoutLauncher }: RunOptions = {}
  ) {
    this.process = spawn(node, [launcher, ...args], {
      cwd,
      env: { ...process.env, ...env },
      stdio: ['ignore', 'pipe', 'pipe'],
    })
    for (const name of ['stdout', 'stderr'] as const) {
      this.process[name]!.setEncoding('utf8').on('data', (text: string) => {
        this[name] += text
        this.#wake()
      })
    }
    this.ended = new Promise((resolve) => {
      this.process.once('close', (code) => {
        resolve({ code, stdout: this.stdout, stderr: this.stderr })
        this.#wake()
      })
    })
  }

  /** Resolves when `text` has been printed, on either stream. @throws Error when the process ends without */
  async printed(text: string): Promise<void> {
    while (!this.stdout.includes(text) && !this.stderr.includes(text)) {
      if (this.process.exitCode !== null || this.process.signalCode !== null) {
        throw new Error(`virtiod ended without printing "${text}":\n${this.stdout}${this.stderr}`)
      }
      await new Promise<void>((resolve) => this.#waiting.push(resolve))
    }
  }

  async stop(signal: NodeJS.Signals = 'SIGTERM'): Promise<Result> {
    this.process.kill(signal)
    return this.ended
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.process.kill('SIGKILL')
    await this.ended
  }

  #wake(): void {
    for (const resolve of this.#waiting.splice(0)) resolve()
  }
}

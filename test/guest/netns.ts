/**
 * A network namespace for one test: taps, bridges and addresses that nothing else on the machine sees. Owns the
 * namespace's life and the way into it; knows nothing of guests and virtiod.
 *
 * The namespace belongs to a process rather than to a name under /run/netns: it ends with this one, however this one
 * ends, and without root it is made inside a user namespace, in which the kernel lets anybody make taps.
 */
import { type ChildProcess, execFile, type SpawnOptions, spawn } from 'node:child_process'
import { once } from 'node:events'
import { findCommand, guestTools, isCi, networkTools, whyNoGuest } from '../setup/prerequisites.ts'

export class NetworkNamespace implements AsyncDisposable {
  #holder: ChildProcess

  private constructor(holder: ChildProcess) {
    this.#holder = holder
  }

  /** Makes one whose loopback device is up. */
  static async create(): Promise<NetworkNamespace> {
    const user = process.getuid?.() === 0 ? [] : ['--user', '--map-root-user']
    // Its end is that of its standard input; the line says that the namespace is there.
    const words = ['--net', ...user, 'sh', '-ec', 'ip link set lo up; echo ready; exec cat']
    const holder = spawn(findCommand('unshare') ?? 'unshare', words, {
      stdio: ['pipe', 'pipe', 'pipe'],
      env: environment(),
    })
    let text = ''
    for (const stream of [holder.stdout, holder.stderr])
      stream.setEncoding('utf8').on('data', (data: string) => (text += data))
    await Promise.race([once(holder.stdout, 'data'), once(holder, 'close')])
    if (!text.startsWith('ready')) throw new Error(`no network namespace: ${text.trim()}`)
    return new NetworkNamespace(holder)
  }

  /** Words that go before a command line; nsenter replaces itself, so the pid stays. */
  get prefix(): string[] {
    const user = process.getuid?.() === 0 ? [] : ['--user', '--preserve-credentials']
    const enter = [findCommand('nsenter') ?? 'nsenter', `--target=${this.#holder.pid}`, '--net', ...user, '--']
    // After entering: a change of credentials clears the signal that setpriv asks for.
    const setpriv = findCommand('setpriv')
    return setpriv === undefined ? enter : [...enter, setpriv, '--pdeathsig', 'KILL', '--']
  }

  /** Starts a program inside; the kernel ends it when this process dies. */
  spawn(command: string, args: readonly string[], options: SpawnOptions): ChildProcess {
    const [first = command, ...words] = [...this.prefix, command, ...args]
    return spawn(first, words, { env: environment(), ...options })
  }

  /** Runs a shell script inside, with `set -e`, and returns what it prints. @throws with its standard error */
  async sh(script: string, timeoutMs = 30_000): Promise<string> {
    const [command = '', ...words] = [...this.prefix, 'sh', '-ec', script]
    return await new Promise((resolve, reject) => {
      execFile(
        command,
        words,
        { env: environment(), timeout: timeoutMs, maxBuffer: 16 << 20 },
        (error, stdout, stderr) => {
          if (error === null) resolve(stdout.trimEnd())
          else reject(new Error(`in the namespace: ${script}\n${stdout}${stderr}`, { cause: error }))
        }
      )
    })
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#holder.exitCode !== null || this.#holder.signalCode !== null) return
    const closed = once(this.#holder, 'close')
    this.#holder.stdin?.end()
    await closed
  }
}

/**
 * Why tests with guests and taps cannot run here, or undefined when they can. In CI that is an error instead, as in
 * whyNoGuest.
 */
export async function whyNoNetwork(): Promise<string | undefined> {
  const noGuest = whyNoGuest([...guestTools, ...networkTools])
  if (noGuest !== undefined) return noGuest
  try {
    await using namespace = await NetworkNamespace.create()
    await namespace.sh('ip tuntap add mode tap name tap0')
    return undefined
  } catch (error) {
    const reason = `network namespaces with taps: ${error instanceof Error ? error.message : String(error)}`
    if (isCi()) throw new Error(`the network tests cannot run: ${reason}`, { cause: error })
    process.stderr.write(`\nSKIPPED: the network tests: ${reason}\n\n`)
    return reason
  }
}

/** A user's PATH leaves out where ip and bridge are. */
function environment(): NodeJS.ProcessEnv {
  return { ...process.env, PATH: `${process.env['PATH'] ?? ''}:/usr/local/sbin:/usr/sbin:/sbin`, LC_ALL: 'C' }
}

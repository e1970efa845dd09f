/**
 * A network namespace for one comparison, so that its taps disturb nobody and nobody's packets disturb it. It owns the
 * process that holds it: it ends with this one. It must not know what runs inside.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { accessSync, constants } from 'node:fs'

/** Why there can be no namespace with taps, in a few words; undefined when there can. */
export function whyNoNamespace(): string | undefined {
  if (process.getuid?.() !== 0) return 'a tap in a network namespace needs root'
  try {
    accessSync('/dev/net/tun', constants.R_OK | constants.W_OK)
    return undefined
  } catch {
    return 'there is no /dev/net/tun'
  }
}

export class Namespace implements AsyncDisposable {
  readonly #holder: ChildProcess

  private constructor(holder: ChildProcess) {
    this.#holder = holder
  }

  /** Makes one. IPv6 is off in it: its neighbour discovery would be counted. @throws Error with what unshare says */
  static async create(): Promise<Namespace> {
    const quiet = 'file=/proc/sys/net/ipv6/conf/default/disable_ipv6; [ ! -e $file ] || echo 1 >$file'
    const holder = spawn('unshare', ['--net', 'sh', '-ec', `${quiet}; echo ready; exec cat`], {
      stdio: ['pipe', 'pipe', 'pipe'],
    })
    let text = ''
    for (const stream of [holder.stdout, holder.stderr]) {
      stream.setEncoding('utf8').on('data', (data: string) => {
        text += data
      })
    }
    await Promise.race([once(holder.stdout, 'data'), once(holder, 'close')])
    if (!text.startsWith('ready')) throw new Error(`no network namespace: ${text.trim()}`)
    return new Namespace(holder)
  }

  /** Words before a command that runs inside; the pid stays. */
  get prefix(): readonly string[] {
    return ['nsenter', `--target=${this.#holder.pid}`, '--net', '--']
  }

  /** The namespace goes with the last process in it. */
  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#holder.exitCode !== null || this.#holder.signalCode !== null) return
    const closed = once(this.#holder, 'close')
    this.#holder.stdin?.end()
    await closed
  }
}

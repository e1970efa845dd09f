/**
 * What the tests of taps, links and packets share: children in a network namespace of their own (without root in a user
 * namespace too), and memory with packets and the vectors that name them.
 */
import { spawnSync } from 'node:child_process'
import { findCommand, isCi } from '../setup/prerequisites.ts'
import { allocated } from './support.ts'

/** Ethernet frames of this type are nobody's: the kernel makes none and answers none. */
const LOCAL_EXPERIMENTAL = 0x88b5

/**
 * Runs TypeScript source in a child that is alone in a new network namespace without IPv6, whose packets nobody asked
 * for, and has `native`, `support`, `network` and `ip` (iproute2's) in scope. `setup` is a shell script that runs
 * before it, in a mount namespace of its own; `exec "$@"` at its end may stand behind a command that takes privileges away.
 */
export function runInNamespace(source: string, setup = 'exec "$@"') {
  const url = (path: string) => JSON.stringify(new URL(path, import.meta.url).href)
  const module = `
    import { execFileSync } from 'node:child_process'
    import { native } from ${url('../../src/native.ts')}
    import * as support from ${url('./support.ts')}
    import * as network from ${url('./network.ts')}
    const ip = (words) => execFileSync('ip', words.split(' ')).toString()
    ${source}`
  const user = process.getuid?.() === 0 ? [] : ['--map-root-user']
  const script = `file=/proc/sys/net/ipv6/conf/default/disable_ipv6; [ ! -e $file ] || echo 1 >$file\n${setup}`
  const words = ['--net', '--mount', ...user, 'sh', '-ec', script, 'sh']
  const node = [process.execPath, '--input-type=module-typescript', '--eval', module]
  const child = spawnSync(findCommand('unshare') ?? 'unshare', [...words, ...node], {
    encoding: 'utf8',
    timeout: 30_000,
    env: { ...process.env, NODE_OPTIONS: '', PATH: `${process.env['PATH'] ?? ''}:/usr/sbin:/sbin`, LC_ALL: 'C' },
  })
  return { status: child.status, signal: child.signal, stdout: child.stdout.trim(), stderr: child.stderr }
}

/** What such a child printed as JSON. @throws with its standard error when it failed */
export function answerInNamespace(source: string, setup?: string): unknown {
  const run = runInNamespace(source, setup)
  if (run.status !== 0) throw new Error(`${run.status ?? run.signal}: ${run.stdout}\n${run.stderr}`)
  return JSON.parse(run.stdout)
}

/** Why there are no such children here, or undefined; in CI an error, since a test that did not run has not passed. */
export function whyNoNamespace(): string | undefined {
  const missing = ['unshare', 'setpriv', 'ip', 'mount'].filter((command) => findCommand(command) === undefined)
  const run = missing.length > 0 ? undefined : runInNamespace(`process.exit(native.tapOpen('', false) < 0 ? 1 : 0)`)
  if (run?.status === 0) return undefined
  const reason = run === undefined ? `missing: ${missing.join(', ')}` : `no tap in a network namespace: ${run.stderr}`
  if (isCi()) throw new Error(`the tap tests cannot run: ${reason}`)
  process.stderr.write(`\nSKIPPED: the tap tests: ${reason}\n\n`)
  return reason
}

/** A broadcast Ethernet frame of `length` bytes (14 or more), told from others by `seed`, behind `header` zeroes. */
export function frame(header: number, length: number, seed: number): Uint8Array {
  const bytes = new Uint8Array(header + length)
  for (let i = 0; i < length; i++) bytes[header + i] = seed * 31 + i * 7 + (i >> 8)
  bytes.fill(0xff, header, header + 6)
  bytes.set([2, 0, 0, 0, 0, 1, LOCAL_EXPERIMENTAL >> 8, LOCAL_EXPERIMENTAL & 255], header + 6)
  return bytes
}

/** Memory with an array of struct iovec and what it points to, filled one behind the other. */
export class Vectors {
  readonly #memory = allocated(4 << 20)
  readonly #words = new DataView(this.#memory.buffer)
  #vectors = 0
  #data = 1 << 20

  get address(): number {
    return this.#memory.address
  }

  clear(): void {
    this.#vectors = 0
    this.#data = 1 << 20
  }

  /** Adds one vector; returns the bytes that it names. */
  add(length: number): Uint8Array {
    const bytes = new Uint8Array(this.#memory.buffer, this.#data, length)
    this.addForeign(this.#memory.address + this.#data, length)
    // A gap: what runs over shows, and no two vectors are one range by chance.
    this.#data += length + 16
    return bytes.fill(0)
  }

  addForeign(address: number, length: number): void {
    this.#words.setBigUint64(this.#vectors * 16, BigInt(address), true)
    this.#words.setBigUint64(this.#vectors * 16 + 8, BigInt(length), true)
    this.#vectors++
  }

  /** Adds the packet, cut into pieces of these lengths and the rest; returns how many vectors that made. */
  addPacket(packet: Uint8Array, ...lengths: number[]): number {
    let at = 0
    for (const length of [...lengths, packet.length - lengths.reduce((sum, length) => sum + length, 0)]) {
      this.add(length).set(packet.subarray(at, at + length))
      at += length
    }
    return lengths.length + 1
  }
}

/** The packet of `length` bytes that these pieces begin with, as hexadecimal digits. */
export function hex(pieces: Uint8Array | Uint8Array[], length?: number): string {
  const bytes = Buffer.concat(Array.isArray(pieces) ? pieces : [pieces])
  return bytes.subarray(0, length).toString('hex')
}

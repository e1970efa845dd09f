/** What the tests of the native addon share: fd accounting, a small typed-array view of a ring, children and workers. */
import { spawnSync } from 'node:child_process'
import { readdirSync, readlinkSync } from 'node:fs'
import { constants } from 'node:os'
import { setTimeout as sleep } from 'node:timers/promises'
import { type NativeMapping, type NativeRing, native } from '../../src/native.ts'

export const {
  EAGAIN,
  EBADF,
  EINVAL,
  ENOENT,
  ECANCELED,
  ETIME,
  ENOMEM,
  ECONNREFUSED,
  ENAMETOOLONG,
  EPIPE,
  ENOTCONN,
  EADDRINUSE,
  ENOTSOCK,
  EEXIST,
  EPERM,
} = constants.errno
export const EOPNOTSUPP = 95
export const EAFNOSUPPORT = 97

/** The fds of this process and what they are; comparing two of these proves that nothing leaked and nothing was closed twice. */
export function openFds(): string[] {
  const found: string[] = []
  for (const name of readdirSync('/proc/self/fd')) {
    try {
      const target = readlinkSync(`/proc/self/fd/${name}`)
      // readdir's own fd is gone by the time it is read; libuv's may come and go.
      found.push(`${name} ${target}`)
    } catch {}
  }
  return found.sort()
}

export function must<T>(result: T | number, what: string): T {
  if (typeof result === 'number') throw new Error(`${what}: ${result}`)
  return result
}

export function fdOf(result: number, what: string): number {
  if (result < 0) throw new Error(`${what}: ${result}`)
  return result
}

export function mapped(fd: number, offset: number, length: number): NativeMapping {
  return must(native.mapFile(fd, offset, length, 0, length, true), 'mapFile')
}

export function allocated(length: number): NativeMapping {
  return must(native.allocate(length), 'allocate')
}

export async function until(what: string, condition: () => boolean, milliseconds = 10_000): Promise<void> {
  const end = Date.now() + milliseconds
  while (!condition()) {
    if (Date.now() > end) throw new Error(`timed out: ${what}`)
    await sleep(5)
  }
}

export const GETEVENTS = 1
export const F_MORE = 2
export const POLLIN = 1

export const OP = {
  NOP: 0,
  READV: 1,
  WRITEV: 2,
  FSYNC: 3,
  POLL_ADD: 6,
  POLL_REMOVE: 7,
  ASYNC_CANCEL: 14,
  FALLOCATE: 17,
  READ: 22,
  WRITE: 23,
} as const

export const SQE_FIXED_FILE = 1
export const SQE_LINK = 4
export const SQE_SKIP_SUCCESS = 64

export interface Entry {
  op: number
  data: number
  fd?: number
  flags?: number
  /** A file offset; -1 = the current position. */
  offset?: number
  address?: number
  length?: number
  /** rw_flags, fsync_flags, poll events, cancel flags: the word at byte 28. */
  extra?: number
}

export interface Completion {
  data: number
  result: number
  flags: number
}

/** A ring through plain typed arrays, for tests: correct rather than fast. */
export class TestRing {
  readonly native: NativeRing
  readonly #words: Int32Array
  readonly #rings: DataView
  readonly #sqes: DataView
  readonly #control: Int32Array

  constructor(emulate: boolean, entries = 8, cqEntries = 16, pollable = false) {
    this.native = must(native.ringSetup(entries, cqEntries, emulate, pollable), 'ringSetup')
    this.#words = new Int32Array(this.native.rings)
    this.#rings = new DataView(this.native.rings)
    this.#sqes = new DataView(this.native.sqes)
    this.#control = new Int32Array(this.native.control)
  }

  push(entry: Entry): void {
    const tail = Atomics.load(this.#words, this.native.sqTail / 4)
    const at = (tail & (this.native.sqEntries - 1)) * 64
    new Uint8Array(this.native.sqes, at, 64).fill(0)
    this.#sqes.setUint8(at, entry.op)
    this.#sqes.setUint8(at + 1, entry.flags ?? 0)
    this.#sqes.setInt32(at + 4, entry.fd ?? -1, true)
    this.#sqes.setBigInt64(at + 8, BigInt(entry.offset ?? 0), true)
    this.#sqes.setBigUint64(at + 16, BigInt(entry.address ?? 0), true)
    this.#sqes.setUint32(at + 24, entry.length ?? 0, true)
    this.#sqes.setUint32(at + 28, entry.extra ?? 0, true)
    this.#sqes.setBigUint64(at + 32, BigInt(entry.data), true)
    Atomics.store(this.#words, this.native.sqTail / 4, (tail + 1) | 0)
  }

  enter(toSubmit: number, minComplete: number, timeoutMicroseconds = 2_000_000, flags = GETEVENTS): number {
    this.#control.set([toSubmit, minComplete, flags, timeoutMicroseconds])
    return this.native.enter()
  }

  reap(): Completion[] {
    const found: Completion[] = []
    let head = Atomics.load(this.#words, this.native.cqHead / 4)
    const tail = Atomics.load(this.#words, this.native.cqTail / 4)
    for (; head !== tail; head = (head + 1) | 0) {
      const at = this.native.cqes + (head & (this.native.cqEntries - 1)) * 16
      found.push({
        data: Number(this.#rings.getBigUint64(at, true)),
        result: this.#rings.getInt32(at + 8, true),
        flags: this.#rings.getUint32(at + 12, true),
      })
    }
    Atomics.store(this.#words, this.native.cqHead / 4, head)
    return found
  }

  get queued(): number {
    return Atomics.load(this.#words, this.native.sqTail / 4) - Atomics.load(this.#words, this.native.sqHead / 4)
  }

  /** Submits the entries and waits for as many completions. */
  run(...entries: Entry[]): Completion[] {
    for (const entry of entries) this.push(entry)
    const submitted = this.enter(entries.length, entries.length)
    if (submitted !== entries.length) throw new Error(`enter: ${submitted}`)
    return this.reap()
  }

  one(entry: Entry): Completion {
    const found = this.run(entry)
    if (found.length !== 1 || found[0] === undefined) throw new Error(`${found.length} completions`)
    return found[0]
  }

  close(): void {
    this.native.close()
  }
}

export const haveUring = (() => {
  const ring = native.ringSetup(1, 1, false)
  if (typeof ring === 'number') return false
  ring.close()
  return true
})()

/** Runs TypeScript source in a child that has `native` and `support` in scope; the test compares what it prints. */
export function runChild(
  source: string,
  nodeOptions: string[] = []
): { status: number | null; signal: string | null; stdout: string; stderr: string } {
  const here = new URL('.', import.meta.url).href
  const module =
    `import { native } from ${JSON.stringify(new URL('../../src/native.ts', import.meta.url).href)}\n` +
    `import * as support from ${JSON.stringify(`${here}support.ts`)}\n${source}`
  const child = spawnSync(process.execPath, [...nodeOptions, '--input-type=module-typescript', '--eval', module], {
    encoding: 'utf8',
    timeout: 30_000,
    env: { ...process.env, NODE_OPTIONS: '' },
  })
  return { status: child.status, signal: child.signal, stdout: child.stdout.trim(), stderr: child.stderr }
}

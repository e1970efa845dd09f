/**
 * A back-end under test as a child process: it is started on a temporary socket and image, watched from outside by
 * /proc, and stopped by SIGTERM. The front-end of the tests blocks its thread, so nothing here needs the event
 * loop but `stop`; the child logs to a file, since a pipe that nobody empties would block it.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import {
  closeSync,
  existsSync,
  ftruncateSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, afterEach, beforeAll } from 'vitest'
import { BlkDriver } from '../../src/frontend/blk.ts'
import type { Connection } from '../../src/frontend/connection.ts'
import { layouts } from '../../src/frontend/memory.ts'
import { Session, type SessionOptions } from '../../src/frontend/session.ts'
import { sleepMs } from '../../src/frontend/virtqueue.ts'
import { findCommand } from '../setup/prerequisites.ts'

export const MIB = 2 ** 20
const checkout = fileURLToPath(new URL('../..', import.meta.url))
/** How long a back-end has to put things back, in milliseconds. */
const SETTLE_MS = 2000

/**
 * `virtiod`: on io_uring. `emulated`: virtiod on plain system calls. `qsd`: qemu-storage-daemon, a check of the
 * tests.
 */
export type Kind = 'virtiod' | 'emulated' | 'qsd'

export interface BackendOptions {
  readonly kind?: Kind
  /** Devices; more than one makes it a `virtiod run`. */
  readonly devices?: number
  readonly imageBytes?: number
  readonly queues?: number
  /** More flags of `virtiod blk`, or top-level lines of the configuration of `virtiod run`. */
  readonly extra?: readonly string[]
}

/** Polls until `condition` holds. Returns whether it did, within `ms`. */
export function eventually(condition: () => boolean, ms = SETTLE_MS): boolean {
  const deadline = performance.now() + ms
  while (!condition()) {
    if (performance.now() > deadline) return false
    sleepMs(2)
  }
  return true
}

/**
 * Why qemu-storage-daemon cannot be compared with, or undefined. Said aloud: a test that did not run must not
 * look like one that passed.
 */
export function whyNoQsd(): string | undefined {
  if (findCommand('qemu-storage-daemon') !== undefined) return undefined
  const reason = 'qemu-storage-daemon is not installed (Debian: apt-get install qemu-system-common)'
  process.stderr.write(`\nSKIPPED: the same rows against qemu-storage-daemon: ${reason}\n\n`)
  return reason
}

/** The open fds of a process, as what they are, sorted. */
export function openFds(pid: number): string[] {
  const found: string[] = []
  for (const name of readdirSync(`/proc/${pid}/fd`)) {
    try {
      found.push(readlinkSync(`/proc/${pid}/fd/${name}`).replace(/\d+/g, 'N'))
    } catch {
      // It was closed between readdir and readlink.
    }
  }
  return found.sort()
}

/** How many memfds of a front-end the process has mapped. */
export function memfdMappings(pid: number): number {
  return readFileSync(`/proc/${pid}/maps`, 'utf8')
    .split('\n')
    .filter((line) => line.includes('/memfd:')).length
}

/** Whether a process runs (a zombie does not). */
export function isAlive(pid: number): boolean {
  try {
    return !/\) [ZX] /.test(readFileSync(`/proc/${pid}/stat`, 'utf8'))
  } catch {
    return false
  }
}

// A test that fails halfway must not leave a daemon behind.
const running = new Set<ChildProcess>()
process.once('exit', () => {
  for (const child of running) child.kill('SIGKILL')
})

export class Backend implements AsyncDisposable {
  readonly directory = mkdtempSync(join(tmpdir(), 'virtiod-vu-'))
  readonly kind: Kind
  readonly sockets: readonly string[]
  readonly images: readonly string[]
  readonly process: ChildProcess
  readonly ended: Promise<{ code: number | null; signal: string | null }>
  readonly #logPath: string
  /** Fds after a session that came and went. */
  #baseline: readonly string[] = []

  private constructor(options: BackendOptions) {
    const { kind = 'virtiod', devices = 1, imageBytes = 4 * MIB, queues = 2, extra = [] } = options
    this.kind = kind
    const index = Array.from({ length: devices }, (_, i) => i)
    this.sockets = index.map((i) => join(this.directory, `disk${i}.sock`))
    this.images = index.map((i) => join(this.directory, `disk${i}.img`))
    for (const image of this.images) {
      const fd = openSync(image, 'w')
      ftruncateSync(fd, imageBytes)
      closeSync(fd)
    }
    this.#logPath = join(this.directory, 'log')
    const [command, args] = this.#commandLine(queues, extra)
    const log = openSync(this.#logPath, 'w')
    this.process = spawn(command, args, {
      cwd: this.directory,
      stdio: ['ignore', log, log],
      env: { ...process.env, VIRTIOD_IO_URING: kind === 'emulated' ? 'off' : 'on' },
    })
    closeSync(log)
    running.add(this.process)
    this.process.once('exit', () => running.delete(this.process))
    this.ended = new Promise((resolve) => this.process.once('exit', (code, signal) => resolve({ code, signal })))
  }

  /**
   * Starts it, waits until it serves, and lets one session come and go: what is open then is what must be open
   * after every test.
   */
  static start(options: BackendOptions = {}): Backend {
    const backend = new Backend(options)
    try {
      backend.#waitUntilServing()
    } catch (error) {
      backend.discard()
      throw error
    }
    return backend
  }

  get pid(): number {
    return this.process.pid!
  }

  get socket(): string {
    return this.sockets[0]!
  }

  get image(): string {
    return this.images[0]!
  }

  get log(): string {
    return readFileSync(this.#logPath, 'utf8')
  }

  get alive(): boolean {
    return isAlive(this.pid)
  }

  get fds(): string[] {
    return openFds(this.pid)
  }

  get mappings(): number {
    return memfdMappings(this.pid)
  }

  /** Fds beyond those after a session: what sessions hold now, or what was lost. */
  get extraFds(): number {
    return this.fds.length - this.#baseline.length
  }

  /**
   * What must hold after every test: it lives, a well-behaved front-end is served on every socket, and nothing
   * that a session had is left: neither an fd nor a mapping.
   */
  mustBeUnharmed(): void {
    if (!this.alive) throw new Error(`${this.kind} died:\n${this.log.slice(-3000)}`)
    for (const socket of this.sockets) wellBehaved(socket)
    if (eventually(() => this.extraFds === 0 && this.mappings === 0)) return
    const left = [...this.fds]
    for (const fd of this.#baseline) if (left.includes(fd)) left.splice(left.indexOf(fd), 1)
    // What is lost once would fail every test that comes after.
    this.#baseline = this.fds
    throw new Error(
      `left open: ${left.join(', ') || 'fewer fds than before'}; ${this.mappings} mappings of guest memory`
    )
  }

  /** SIGTERM: it must end with 0 and take its sockets along. */
  async stop(): Promise<void> {
    if (!this.alive) throw new Error(`${this.kind} died before it was stopped:\n${this.log.slice(-3000)}`)
    this.process.kill('SIGTERM')
    const timer = setTimeout(() => this.process.kill('SIGKILL'), 5000)
    const { code, signal } = await this.ended
    clearTimeout(timer)
    if (code !== 0) throw new Error(`SIGTERM ended it with ${code ?? signal}:\n${this.log.slice(-3000)}`)
    const left = this.sockets.filter((socket) => existsSync(socket))
    if (left.length > 0) throw new Error(`it left ${left.join(', ')}`)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    try {
      await this.stop()
    } finally {
      this.process.kill('SIGKILL')
      rmSync(this.directory, { recursive: true, force: true })
    }
  }

  /** Kills it. */
  discard(): void {
    this.process.kill('SIGKILL')
    rmSync(this.directory, { recursive: true, force: true })
  }

  #waitUntilServing(): void {
    const ready = (): boolean =>
      this.kind === 'qsd' ? existsSync(this.socket) : this.log.includes('"msg":"ready"') || !this.alive
    if (!eventually(ready, 10_000) || !this.alive) throw new Error(`${this.kind} does not start:\n${this.log}`)
    for (const socket of this.sockets) {
      wellBehaved(socket)
      wellBehaved(socket)
    }
    eventually(() => memfdMappings(this.pid) === 0)
    sleepMs(20)
    this.#baseline = openFds(this.pid)
  }

  #commandLine(queues: number, extra: readonly string[]): [string, string[]] {
    if (this.kind === 'qsd') {
      return [
        'qemu-storage-daemon',
        [
          '--object',
          'iothread,id=t0',
          '--blockdev',
          `driver=file,node-name=disk,filename=${this.image},locking=off`,
          '--export',
          `type=vhost-user-blk,id=e0,node-name=disk,addr.type=unix,addr.path=${this.socket},writable=on,` +
            `num-queues=${queues},iothread=t0`,
        ],
      ]
    }
    const main = join(checkout, 'src/cli/main.ts')
    if (this.sockets.length === 1) {
      const flags = ['--socket-path', this.socket, '--blk-file', this.image, '--num-queues', String(queues)]
      return [process.execPath, [main, 'blk', ...flags, ...extra]]
    }
    const config = join(this.directory, 'virtiod.yaml')
    const devices = this.sockets.map(
      (socket, i) => `  - {type: blk, socket-path: ${socket}, blk-file: ${this.images[i]}, num-queues: ${queues}}\n`
    )
    writeFileSync(config, `${extra.map((line) => `${line}\n`).join('')}devices:\n${devices.join('')}`)
    return [process.execPath, [main, 'run', config]]
  }
}

/**
 * One back-end for the tests of a file. After each test it must be unharmed; one that is not is replaced, so that
 * its failure does not fail the tests after it, and at the end it must stop as it should.
 */
export function backendForFile(options: BackendOptions = {}): () => Backend {
  let backend: Backend | undefined
  beforeAll(() => {
    backend = Backend.start(options)
  })
  afterEach(() => {
    try {
      backend?.mustBeUnharmed()
    } catch (error) {
      backend?.discard()
      backend = Backend.start(options)
      throw error
    }
  })
  afterAll(() => backend?.[Symbol.asyncDispose]())
  return () => backend!
}

/** A session with a request driver on each of its queues. */
export interface Opened extends Disposable {
  readonly session: Session
  readonly blk: BlkDriver
  readonly drivers: readonly BlkDriver[]
}

/** Opens a session as QEMU does. The guest has 8 MiB unless `memory` says otherwise. */
export function open(socket: string | Connection, options: SessionOptions = {}): Opened {
  const all = { memory: layouts.single(8 * MIB), timeoutMs: 3000, ...options }
  const session = typeof socket === 'string' ? Session.open(socket, all) : Session.over(socket, all)
  const drivers = session.queues.map((queue) => driverOf(session, queue.index))
  return { session, drivers, blk: drivers[0]!, [Symbol.dispose]: () => session.close() }
}

/** A driver with a small arena, and the patience of a test. */
export function driverOf(session: Session, queue = 0, arena = MIB): BlkDriver {
  const blk = new BlkDriver(session.queue(queue), session.memory, arena)
  blk.timeoutMs = 3000
  return blk
}

let writes = 0

/** Bytes that are different at every call. */
export function pattern(length: number): Uint8Array {
  writes++
  return Uint8Array.from({ length }, (_, i) => (i * 7 + writes * 13 + (i >> 8)) & 0xff)
}

/** Writes at `sector`, flushes, reads back. @throws when anything is wrong */
export function mustServe(blk: BlkDriver, sector = 8): void {
  const data = pattern(4096)
  blk.write(sector, data)
  blk.flush()
  if (Buffer.compare(blk.read(sector, data.length), data) !== 0)
    throw new Error(`sector ${sector} reads other than it was written`)
}

/** A whole session as it should be, from connect to disconnect. */
export function wellBehaved(socket: string): void {
  const opened = open(socket, { queueSize: 64, memory: layouts.single(2 * MIB) })
  try {
    mustServe(opened.blk)
  } finally {
    opened.session.close()
  }
}

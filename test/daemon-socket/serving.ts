/**
 * A daemon that may be another process from one moment to the next, watched from outside: by its log, by /proc, by its
 * sockets. Nothing here needs the event loop, which the front-end of the tests blocks.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import {
  closeSync,
  existsSync,
  mkdtempSync,
  openSync,
  readFileSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { get } from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { BlkDriver } from '../../src/frontend/blk.ts'
import { sleepMs } from '../../src/frontend/virtqueue.ts'
import { VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT } from '../../src/virtio/blk.ts'
import { checkoutLauncher } from '../cli/spawn.ts'
import { eventually, isAlive, MIB, openFds } from '../vhost-user/backend.ts'

export interface ServingOptions {
  /** The command line, in the test's directory; default `run virtiod.json`. */
  readonly args?: readonly string[]
  /** Words before the command line. */
  readonly prefix?: readonly string[]
  /** Its fds from 3 on. */
  readonly fds?: readonly (number | 'ignore')[]
  readonly env?: NodeJS.ProcessEnv
  readonly emulated?: boolean
  /** Another script than virtiod's launcher. */
  readonly launcher?: string
}

interface LogLine {
  readonly pid: number
  readonly msg: string
  readonly [key: string]: unknown
}

// A test that fails halfway must not leave a daemon behind.
const unfinished = new Set<Serving>()
process.once('exit', () => {
  for (const serving of unfinished) serving.kill()
})

export class Serving implements Disposable {
  readonly directory: string
  /** The process that serves. */
  pid: number
  readonly first: ChildProcess

  /** @param directory of the test: made by {@link directory} */
  constructor(directory: string, options: ServingOptions = {}) {
    const {
      args = ['run', 'virtiod.json'],
      prefix = [],
      fds = [],
      env = {},
      emulated = false,
      launcher = checkoutLauncher,
    } = options
    this.directory = directory
    const log = openSync(join(directory, 'log'), 'a')
    const [command, ...words] = [...prefix, process.execPath, launcher, ...args]
    this.first = spawn(command!, words, {
      cwd: directory,
      stdio: ['ignore', log, log, ...fds],
      env: { ...process.env, VIRTIOD_IO_URING: emulated ? 'off' : 'on', ...env },
    })
    closeSync(log)
    this.pid = this.first.pid!
    unfinished.add(this)
    const ready = (): boolean => this.has('ready') || !isAlive(this.pid)
    if (!eventually(ready, 20_000) || !isAlive(this.pid)) {
      const { text } = this
      this.kill()
      throw new Error(`it does not start:\n${text}`)
    }
  }

  path(name: string): string {
    return join(this.directory, name)
  }

  get text(): string {
    return readFileSync(this.path('log'), 'utf8')
  }

  get lines(): LogLine[] {
    return (
      this.text
        .split('\n')
        // The last one is being written.
        .slice(0, -1)
        .filter((line) => line.startsWith('{'))
        .map((line) => JSON.parse(line) as LogLine)
    )
  }

  /** Lines with this message, by a process or by any. */
  said(message: string, pid?: number): LogLine[] {
    return this.lines.filter(({ msg, pid: by }) => msg === message && (pid === undefined || pid === by))
  }

  has(message: string): boolean {
    return this.said(message).length > 0
  }

  get fds(): string[] {
    return openFds(this.pid)
  }

  /** Asks for a handover. Returns what to call until it is over: true then. */
  handOver(): () => boolean {
    const before = this.said('handover: the new process serves').length
    const failures = this.said('the handover failed').length
    process.kill(this.pid, 'SIGUSR2')
    const deadline = performance.now() + 20_000
    return () => {
      const done = this.said('handover: the new process serves')
      if (done.length > before) {
        this.pid = done.at(-1)!['successor'] as number
        return true
      }
      if (this.said('the handover failed').length > failures) return true
      if (performance.now() > deadline) throw new Error(`no end of the handover:\n${this.text}`)
      return false
    }
  }

  /**
   * Hands over while `work` is repeated; returns when the new process has said that it is ready, and the old one is
   * gone.
   */
  handOverDuring(work: () => void): void {
    const old = this.pid
    const over = this.handOver()
    while (!over()) work()
    if (this.pid === old) throw new Error(`no handover:\n${this.text.slice(-3000)}`)
    const settled = (): boolean => {
      work()
      return !isAlive(old) && this.said('ready', this.pid).length > 0
    }
    if (!eventually(settled, 5000)) throw new Error(`process ${old} lives on:\n${this.text.slice(-3000)}`)
  }

  /** The processes that it has started and that have not ended. */
  get children(): number[] {
    return readFileSync(`/proc/${this.pid}/task/${this.pid}/children`, 'utf8')
      .split(' ')
      .filter((pid) => pid !== '')
      .map(Number)
  }

  /** SIGTERM: it has to end. */
  stop(): void {
    process.kill(this.pid, 'SIGTERM')
    if (!eventually(() => !isAlive(this.pid), 5000)) throw new Error(`it does not stop:\n${this.text.slice(-3000)}`)
  }

  kill(): void {
    const pids = new Set([this.pid, ...(existsSync(this.path('log')) ? this.lines.map(({ pid }) => pid) : [])])
    for (const pid of pids) {
      // A pid of long ago may be somebody else's: ours work in our directory's files.
      if (!isAlive(pid) || !readFileSync(`/proc/${pid}/cmdline`, 'utf8').includes('virtiod')) continue
      process.kill(pid, 'SIGKILL')
    }
    unfinished.delete(this)
  }

  [Symbol.dispose](): void {
    this.kill()
    rmSync(this.directory, { recursive: true, force: true })
  }
}

export function directory(): string {
  return mkdtempSync(join(tmpdir(), 'virtiod-handover-'))
}

/** An image in the directory; its path. */
export function image(dir: string, name: string, bytes = 16 * MIB): string {
  const path = join(dir, name)
  writeFileSync(path, '')
  truncateSync(path, bytes)
  return path
}

export interface DiskConfig {
  readonly name: string
  readonly [option: string]: unknown
}

/** Writes virtiod.json: disks with an image and a socket of their name, and other devices as they are. */
export function configure(dir: string, devices: readonly DiskConfig[], top: object = {}): void {
  const disks = devices.map(({ name, ...options }) => {
    const disk = { name, type: 'blk', 'socket-path': `${name}.sock`, 'blk-file': `${name}.img`, 'num-queues': 2 }
    return options['type'] === undefined ? { ...disk, ...options } : { name, ...options }
  })
  writeFileSync(join(dir, 'virtiod.json'), JSON.stringify({ ...top, devices: disks }))
}

const BLOCK = 4096

/** Writes and reads at a part of a disk, many at once, and knows what has to be there. */
export class Load {
  readonly #driver: BlkDriver
  readonly #first: number
  readonly #generations: number[]
  #round = 0
  requests = 0

  /** @param first block of 4 KiB that is its own @param blocks that are */
  constructor(driver: BlkDriver, first: number, blocks = 256) {
    this.#driver = driver
    this.#first = first
    this.#generations = new Array<number>(blocks).fill(0)
  }

  /** 16 writes, then reads of 16 others. @throws when one fails or reads what nobody wrote */
  step(): void {
    this.#round++
    const { length } = this.#generations
    const writes = Array.from({ length: 16 }, (_, i) => (this.#round * 16 + i) % length)
    const submitted = writes.map((block) => {
      this.#generations[block] = this.#round
      return this.#submit(VIRTIO_BLK_T_OUT, block)
    })
    this.#driver.publish()
    this.#driver.wait()
    const reads = Array.from({ length: 16 }, (_, i) => (this.#round * 7 + i * 13) % length)
    const read = reads.map((block) => this.#submit(VIRTIO_BLK_T_IN, block))
    this.#driver.publish()
    this.#driver.wait()
    for (const request of [...submitted, ...read])
      if (!request.done || request.status !== 0) throw new Error(`a request ended with ${request.status}`)
    for (const [i, block] of reads.entries()) this.#check(block, read[i]!.data)
    this.requests += 32
  }

  /** Reads everything. */
  verify(): void {
    for (const [block] of this.#generations.entries()) {
      const request = this.#submit(VIRTIO_BLK_T_IN, block)
      this.#driver.publish()
      this.#driver.wait()
      this.#check(block, request.data)
    }
  }

  #submit(type: number, block: number) {
    const sector = (this.#first + block) * (BLOCK / 512)
    return type === VIRTIO_BLK_T_OUT
      ? this.#driver.submit(type, sector, this.#pattern(block), 0, {}, false)
      : this.#driver.submit(type, sector, new Uint8Array(0), BLOCK, {}, false)
  }

  #check(block: number, data: Uint8Array): void {
    if (Buffer.compare(data, this.#pattern(block)) !== 0)
      throw new Error(`block ${block} holds what was not written last`)
  }

  #pattern(block: number): Uint8Array {
    const generation = this.#generations[block]!
    const bytes = new Uint8Array(BLOCK)
    if (generation === 0) return bytes
    const view = new DataView(bytes.buffer)
    for (let at = 0; at < BLOCK; at += 8) {
      view.setUint32(at, generation)
      view.setUint32(at + 4, this.#first + block + at)
    }
    return bytes
  }
}

/** The lines of /metrics on a unix socket. */
export function scrape(socketPath: string): Promise<string[]> {
  return new Promise((resolve, reject) => {
    // No pool: the front-end blocks this thread, and an idle connection would be cut meanwhile.
    get({ socketPath, path: '/metrics', agent: false }, (response) => {
      let text = ''
      response.setEncoding('utf8').on('data', (part: string) => {
        text += part
      })
      response.on('end', () => resolve(text.split('\n')))
    }).on('error', reject)
  })
}

/** Waits, in the middle of a test that blocks anyway. */
export function pause(ms: number): void {
  sleepMs(ms)
}

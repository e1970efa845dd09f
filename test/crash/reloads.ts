/**
 * Changes the module of a disk again and again under a verifying load, while virtiod and the guest go on. It owns the
 * schedule of changes and what must hold: every request ends once and as it must, what is acknowledged stays, each
 * change comes to be served, and what the module keeps in memory comes along.
 */
import { copyFileSync, mkdtempSync, readFileSync, renameSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { BlkDriver } from '../../src/frontend/blk.ts'
import { GuestMemory, layouts } from '../../src/frontend/memory.ts'
import { Session } from '../../src/frontend/session.ts'
import { Random } from '../../src/frontend/verify/case.ts'
import { sleepMs } from '../../src/frontend/virtqueue.ts'
import { VIRTIO_BLK_T_GET_ID } from '../../src/virtio/blk.ts'
import { VIRTIO_F_INDIRECT_DESC } from '../../src/virtio/constants.ts'
import { Daemon } from './daemon.ts'
import { CrashLoad } from './load.ts'
import { DiskModel, SECTOR } from './model.ts'

const MIB = 2 ** 20
const modules = fileURLToPath(new URL('../fixtures/modules/', import.meta.url))
/** How long one reload, or all that is in flight, may take. In milliseconds. */
const PATIENCE_MS = 30_000

export interface ReloadOptions {
  readonly count: number
  readonly seed: number
  readonly packed: boolean
  readonly inOrder: boolean
  /** With an in-flight buffer. */
  readonly inflight: boolean
  /** 1 … 4. */
  readonly queues: number
  /** Requests in flight per queue. */
  readonly depth: number
  /** Bytes of the disk, a multiple of 64 KiB. */
  readonly bytes: number
  /** Milliseconds between a reload and the next change at most. */
  readonly maxServeMs: number
  readonly engine: 'io_uring' | 'emulated'
  readonly directory: string
  readonly say: (text: string) => void
}

export interface ReloadResult {
  readonly requests: number
  readonly sectorsRead: number
  readonly milliseconds: number
  /** How long the guest waited, as virtiod says: at a reload in the middle of all, and at the longest. */
  readonly medianPauseMs: number
  readonly longestPauseMs: number
}

/** @throws Error naming what was violated, with the log of virtiod */
export async function reloadRepeatedly(options: ReloadOptions): Promise<ReloadResult> {
  const directory = mkdtempSync(join(options.directory, 'virtiod-reloads-'))
  const image = join(directory, 'disk.img')
  writeFileSync(image, '')
  truncateSync(image, options.bytes)
  for (const name of ['reload-disk.ts', 'reload-version.ts']) copyFileSync(join(modules, name), join(directory, name))
  const args = ['device', join(directory, 'reload-disk.ts'), '--watch']
  args.push('--option', `file=${image}`, '--option', `size=${options.bytes}`)
  const env = { VIRTIOD_IO_URING: options.engine === 'emulated' ? 'off' : 'on' }
  const daemon = new Daemon(join(directory, 's'), args, join(directory, 'log'), { env })
  try {
    if (!(await daemon.listening())) throw new Error('it does not start')
    const result = new ReloadRun(options, directory, daemon).go()
    const { code, signal } = await daemon.stop()
    if (code !== 0) throw new Error(`it ended with ${code ?? signal}`)
    return result
  } catch (cause) {
    throw new Error(`${(cause as Error).message}\n${daemon.log.slice(-4000)}`, { cause })
  } finally {
    await daemon.stop('SIGKILL')
    rmSync(directory, { recursive: true, force: true })
  }
}

class ReloadRun {
  readonly #options: ReloadOptions
  readonly #directory: string
  readonly #daemon: Daemon
  readonly #random: Random
  readonly #memory: GuestMemory
  readonly #model: DiskModel
  readonly #session: Session
  readonly #load: CrashLoad

  constructor(options: ReloadOptions, directory: string, daemon: Daemon) {
    const { queues, depth, packed, inOrder, inflight, seed, bytes } = options
    this.#options = options
    this.#directory = directory
    this.#daemon = daemon
    this.#random = new Random(seed ^ 0x72656c6f)
    this.#memory = new GuestMemory(layouts.single(Math.ceil((queues * depth * 80_000) / MIB + 8) * MIB))
    this.#model = new DiskModel(seed, bytes / SECTOR)
    const queueSize = 2 ** Math.ceil(Math.log2(depth * 7))
    this.#session = Session.open(daemon.socket, { memory: this.#memory, queues, queueSize, packed, inOrder, inflight })
    const loaded = this.#session.queues.map((queue) => ({
      driver: queue.driver,
      interrupted: () => queue.index % 2 === 0 || queue.takeCalls() > 0,
    }))
    const indirect = this.#session.has(VIRTIO_F_INDIRECT_DESC)
    this.#load = new CrashLoad(this.#memory, loaded, this.#model, { depth, seed, indirect, zeroes: false })
  }

  go(): ReloadResult {
    const { count, maxServeMs, say } = this.#options
    const from = performance.now()
    try {
      for (let reload = 1; reload <= count; reload++) {
        this.#serveFor((this.#random.below(65536) / 65536) * maxServeMs)
        this.#change(reload + 1)
        const before = this.#load.counts.completed
        const reloaded = () => this.#reloads.length >= reload
        this.#serve(reloaded, `reload ${reload}`)
        this.#serve(() => this.#load.counts.completed > before, `a request after reload ${reload}`)
        if (reload % 20 === 0 || reload === count)
          say(`${reload} reloads, ${this.#load.counts.completed} requests, all right so far`)
      }
      const sectorsRead = this.#readAll()
      this.#checkSerial(`v${count + 1} r${count}`)
      const pauses = this.#reloads.toSorted((a, b) => a - b)
      if (pauses.length !== count) throw new Error(`${pauses.length} reloads of ${count} changes`)
      return {
        requests: this.#load.counts.completed,
        sectorsRead,
        milliseconds: performance.now() - from,
        medianPauseMs: pauses[pauses.length >> 1] ?? 0,
        longestPauseMs: pauses.at(-1) ?? 0,
      }
    } catch (cause) {
      throw new Error(`${(cause as Error).message}\n${this.#load.describe()}`, { cause })
    } finally {
      this.#session.close()
      this.#memory.close()
    }
  }

  /** As editors do: in place, or by renaming another file. */
  #change(version: number): void {
    const path = join(this.#directory, 'reload-version.ts')
    const text = `export const VERSION = ${version}\n`
    if (this.#random.below(2) === 0) return writeFileSync(path, text)
    writeFileSync(`${path}~`, text)
    renameSync(`${path}~`, path)
  }

  /** The pauses of all reloads so far, in milliseconds. */
  get #reloads(): number[] {
    const lines = this.#daemon.log
      .split('\n')
      .slice(0, -1)
      .map((line) => JSON.parse(line) as { level: string; msg: string; pauseMs: number })
    // The one thing that it may warn of: the disk, or the machine, took more than a second for one write.
    const stalled = /it has blocked its thread for|its thread goes on, after/
    const wrong = lines.find(({ level, msg }) => level !== 'info' && !(level === 'warn' && stalled.test(msg)))
    if (wrong !== undefined) throw new Error(`virtiod says: ${wrong.msg}`)
    return lines.filter(({ msg }) => msg === 'the module was reloaded').map(({ pauseMs }) => pauseMs)
  }

  #serveFor(ms: number): void {
    const end = performance.now() + ms
    this.#serve(() => performance.now() >= end, 'time')
  }

  #serve(until: () => boolean, what: string, issue = true): void {
    const deadline = performance.now() + PATIENCE_MS
    // The log is a file: looking at it after every request would be most of the work.
    for (let i = 0; i % 64 !== 0 || !until(); i++) {
      if (this.#load.step(issue) === 0) sleepMs(0.02)
      if (performance.now() > deadline) throw new Error(`waiting in vain for ${what}`)
    }
  }

  #readAll(): number {
    const empty = () => this.#load.inFlight === 0
    this.#serve(empty, 'what is in flight', false)
    const { sectors } = this.#model
    for (let first = 0; first < sectors; ) {
      if (this.#load.issueRead(first, 128)) first += 128
      else this.#load.step(false)
    }
    this.#serve(empty, 'what is read', false)
    const image = readFileSync(join(this.#directory, 'disk.img'))
    this.#model.check(
      new Uint32Array(image.buffer, image.byteOffset, image.length / 4),
      0,
      sectors,
      'in the image file'
    )
    return sectors
  }

  #checkSerial(wanted: string): void {
    const blk = new BlkDriver(this.#session.queue(0), this.#memory, 65536)
    const request = blk.submit(VIRTIO_BLK_T_GET_ID, 0, new Uint8Array(0), 20, {}, false)
    blk.publish()
    blk.wait()
    const serial = Buffer.from(request.data).toString('latin1').replace(/\0+$/, '')
    if (serial !== wanted) throw new Error(`the disk is ${serial}, not ${wanted}`)
  }
}

/**
 * Kills virtiod again and again under a verifying write load, and lets the guest go on with the next process each
 * time: same memory, same rings, same in-flight buffer. It owns the schedule of kills and what must hold between them:
 *
 * - every request ends once, with OK and the right length, whatever number of processes it takes;
 * - what is acknowledged stays: reads find it, and at the end the whole disk and the image file do;
 * - at rest nothing is marked in the in-flight buffer.
 *
 * A seed gives the same requests and the same schedule; where exactly in virtiod a kill falls depends on the machine.
 */
import { closeSync, ftruncateSync, mkdtempSync, openSync, readFileSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { FrontendError } from '../../src/frontend/errors.ts'
import { GuestMemory, layouts } from '../../src/frontend/memory.ts'
import { Session, type SessionOptions } from '../../src/frontend/session.ts'
import { Random } from '../../src/frontend/verify/case.ts'
import { sleepMs } from '../../src/frontend/virtqueue.ts'
import { VIRTIO_BLK_F_WRITE_ZEROES } from '../../src/virtio/blk.ts'
import { VIRTIO_F_INDIRECT_DESC } from '../../src/virtio/constants.ts'
import { Daemon } from './daemon.ts'
import { Killer } from './killer.ts'
import { CrashLoad, type LoadQueue } from './load.ts'
import { DiskModel, SECTOR } from './model.ts'

const MIB = 2 ** 20
/** How long everything in flight may take when nobody is killed. */
const DRAIN_MS = 30_000

export interface KillOptions {
  readonly kills: number
  readonly seed: number
  readonly packed: boolean
  readonly inOrder: boolean
  readonly queues: number
  /** Requests in flight per queue. */
  readonly depth: number
  /** Bytes of the disk, a multiple of 64 KiB. */
  readonly bytes: number
  /** Milliseconds that a process serves at most before it is killed. */
  readonly maxServeMs: number
  /** `mix`: each process takes another one. */
  readonly cache: 'none' | 'writethrough' | 'writeback' | 'mix'
  /** Whether virtiod runs on io_uring, on plain system calls, or in turn. */
  readonly engine: 'io_uring' | 'emulated' | 'mix'
  /** Kills between two times that the load comes to rest and is checked. */
  readonly restEvery: number
  /** Where image, socket and log lie: on a file system that has O_DIRECT. */
  readonly directory: string
  readonly say: (text: string) => void
}

export interface KillResult {
  /** Kills by what the process was doing: starting up, resuming the session, serving. */
  readonly starting: number
  readonly resuming: number
  readonly serving: number
  readonly requests: number
  readonly survivors: number
  readonly longestSurvivor: number
  readonly sectorsRead: number
  readonly milliseconds: number
  /** From spawn to listening, on average. */
  readonly startMs: number
}

type Phase = 'starting' | 'resuming' | 'serving'

/** @throws Error naming what was violated, with the state of what is in flight */
export async function killRepeatedly(options: KillOptions): Promise<KillResult> {
  const run = new KillRun(options)
  try {
    return await run.go()
  } finally {
    await run.close()
  }
}

class KillRun {
  readonly #options: KillOptions
  readonly #directory: string
  readonly #image: string
  readonly #socket: string
  readonly #random: Random
  readonly #killer = new Killer()
  readonly #memory: GuestMemory
  readonly #model: DiskModel
  readonly #kills: Record<Phase, number> = { starting: 0, resuming: 0, serving: 0 }
  #daemon: Daemon | undefined
  #session: Session | undefined
  #load: CrashLoad | undefined
  #starts = 0
  #startMs = 0
  #sectorsRead = 0

  constructor(options: KillOptions) {
    this.#options = options
    this.#directory = mkdtempSync(join(options.directory, 'virtiod-kill-'))
    this.#image = join(this.#directory, 'disk.img')
    this.#socket = join(this.#directory, 's')
    const fd = openSync(this.#image, 'w')
    ftruncateSync(fd, options.bytes)
    closeSync(fd)
    this.#random = new Random(options.seed ^ 0x6b696c6c)
    this.#memory = new GuestMemory(layouts.single(Math.ceil((options.queues * options.depth * 80_000) / MIB + 4) * MIB))
    this.#model = new DiskModel(options.seed, options.bytes / SECTOR)
  }

  get #total(): number {
    return this.#kills.starting + this.#kills.resuming + this.#kills.serving
  }

  async go(): Promise<KillResult> {
    const { kills, restEvery, say } = this.#options
    const from = performance.now()
    let rested = 0
    while (this.#total < kills) {
      await this.#oneLife()
      if (this.#total - rested < restEvery && this.#total < kills) continue
      rested = this.#total
      await this.#rest(this.#total >= kills)
      say(`${rested} kills, ${this.#load?.counts.completed} requests, all right so far`)
    }
    const counts = this.#load?.counts
    return {
      ...this.#kills,
      requests: counts?.completed ?? 0,
      survivors: counts?.survivors ?? 0,
      longestSurvivor: counts?.longestSurvivor ?? 0,
      sectorsRead: this.#sectorsRead,
      milliseconds: performance.now() - from,
      startMs: this.#startMs / Math.max(1, this.#starts),
    }
  }

  async close(): Promise<void> {
    this.#session?.close(true)
    await this.#daemon?.stop('SIGKILL')
    await this.#killer.close()
    this.#memory.close()
    rmSync(this.#directory, { recursive: true, force: true })
  }

  /** Starts a process, goes on with it, and kills it. */
  async #oneLife(): Promise<void> {
    const dice = this.#random.below(16)
    // There has to be a session before one can be resumed.
    const phase: Phase = dice === 0 ? 'starting' : dice <= 2 && this.#session !== undefined ? 'resuming' : 'serving'
    const fraction = this.#random.below(65536) / 65536
    const daemon = this.#spawn()
    if (phase === 'starting') {
      // Once more than it usually takes, so that all of it is hit.
      this.#killer.kill(daemon.pid, fraction * 1.2 * (this.#starts > 0 ? this.#startMs / this.#starts : 300))
      await this.#killed(daemon, phase)
      return
    }
    await this.#listening(daemon)
    if (phase === 'resuming') this.#killer.kill(daemon.pid, fraction * 6)
    try {
      this.#connect()
    } catch (error) {
      if (phase !== 'resuming' || !isGone(error)) throw this.#explained(error)
      await this.#killed(daemon, phase)
      return
    }
    // One in eight dies with its first requests.
    if (phase === 'serving') {
      const delay = this.#random.below(8) === 0 ? 0 : fraction * this.#options.maxServeMs
      this.#killer.kill(daemon.pid, delay)
    }
    this.#serve(() => this.#killer.done)
    await this.#killed(daemon, phase)
  }

  /** Lets everything in flight end, and checks a part of the disk, or all of it. */
  async #rest(isLast: boolean): Promise<void> {
    const daemon = this.#spawn()
    await this.#listening(daemon)
    try {
      this.#connect()
      const load = this.#load as CrashLoad
      this.#untilEmpty()
      this.#checkInflight()
      const pieces = Math.floor(this.#model.sectors / 128)
      const some = isLast ? pieces : Math.min(pieces, 64)
      for (let i = 0; i < some; ) {
        const piece = isLast ? i : this.#random.below(pieces)
        while (i < some && load.issueRead(piece * 128, 128)) {
          i++
          this.#sectorsRead += 128
          break
        }
        load.step(false)
      }
      this.#untilEmpty()
      this.#checkInflight()
    } catch (error) {
      throw this.#explained(error)
    }
    if (isLast) this.#session?.close()
    const { code, signal } = await daemon.stop(isLast ? 'SIGTERM' : 'SIGKILL')
    if (isLast && code !== 0) throw new Error(`virtiod ended with ${code ?? signal}:\n${daemon.log}`)
    if (isLast) this.#checkImage()
  }

  #spawn(): Daemon {
    const { cache, engine, queues } = this.#options
    const modes = ['writeback', 'none', 'writethrough']
    const mode = cache === 'mix' ? (modes[this.#random.below(3)] ?? '') : cache
    const emulated = engine === 'mix' ? this.#random.below(4) === 0 : engine === 'emulated'
    const args = ['blk', '--blk-file', this.#image, '--num-queues', String(queues), '--cache', mode]
    if (this.#random.below(2) === 0) args.push('--iothreads', '2')
    this.#daemon = new Daemon(this.#socket, args, join(this.#directory, 'log'), {
      env: { VIRTIOD_IO_URING: emulated ? 'off' : 'on' },
    })
    return this.#daemon
  }

  async #listening(daemon: Daemon): Promise<void> {
    const from = performance.now()
    if (!(await daemon.listening())) throw new Error(`virtiod does not start:\n${daemon.log}`)
    this.#starts++
    this.#startMs += performance.now() - from
  }

  /** The first session, or the one after the last. */
  #connect(): void {
    const { queues, depth, packed, inOrder, seed } = this.#options
    const previous = this.#session
    if (previous !== undefined) {
      this.#session = Session.resume(this.#socket, previous)
      this.#load?.resumed()
      return
    }
    const options: SessionOptions = {
      memory: this.#memory,
      queues,
      queueSize: 2 ** Math.ceil(Math.log2(depth * 7)),
      packed,
      inOrder,
      inflight: true,
    }
    const session = Session.open(this.#socket, options)
    this.#session = session
    this.#load = new CrashLoad(this.#memory, this.#queues(session), this.#model, {
      depth,
      seed,
      indirect: session.has(VIRTIO_F_INDIRECT_DESC),
      zeroes: session.has(VIRTIO_BLK_F_WRITE_ZEROES),
    })
  }

  /** The drivers and call eventfds stay over all sessions. */
  #queues(session: Session): LoadQueue[] {
    return session.queues.map((queue) => ({
      driver: queue.driver,
      interrupted: () => queue.index % 2 === 0 || queue.takeCalls() > 0,
    }))
  }

  #serve(ended: () => boolean): void {
    const load = this.#load as CrashLoad
    try {
      while (!ended()) if (load.step(true) === 0) sleepMs(0.02)
      // What it completed with its last breath, and what the guest asks for while nobody is there.
      load.step(true)
    } catch (error) {
      throw this.#explained(error)
    }
  }

  #untilEmpty(): void {
    const load = this.#load as CrashLoad
    const deadline = performance.now() + DRAIN_MS
    while (load.inFlight > 0) {
      if (load.step(false) > 0) continue
      if (performance.now() > deadline) throw new Error(`${load.inFlight} requests are stuck`)
      sleepMs(0.05)
    }
  }

  async #killed(daemon: Daemon, phase: Phase): Promise<void> {
    this.#killer.join()
    const { code, signal } = await daemon.ended
    if (signal !== 'SIGKILL') throw new Error(`virtiod ended with ${code ?? signal}, not by a kill:\n${daemon.log}`)
    this.#kills[phase]++
  }

  /**
   * At rest nothing is marked: a mark that stays would be served again after the next kill. And all entries of a packed
   * ring's part are free: one that is lost, or in the list twice, does harm only much later.
   */
  #checkInflight(): void {
    const area = this.#session?.inflight
    if (area === undefined) throw new Error('the session has no in-flight area')
    for (let queue = 0; queue < this.#options.queues; queue++) {
      const state = area.read(queue)
      const told = (what: string): Error =>
        new Error(`queue ${queue} is at rest, and ${what}: ${JSON.stringify(state, bigints)}`)
      if (state.version !== 1) throw told('its in-flight area has another version')
      if (state.inflight.length > 0) throw told('chains are marked in flight')
      if (!this.#options.packed) continue
      const free = new Set<number>()
      for (let entry = state.freeHead; entry < state.descNum && !free.has(entry); ) {
        free.add(entry)
        entry = state.entries[entry]?.next ?? state.descNum
      }
      if (free.size !== state.descNum) throw told(`only ${free.size} entries are free`)
    }
  }

  #checkImage(): void {
    const image = readFileSync(this.#image)
    const words = new Uint32Array(image.buffer, image.byteOffset, image.length / 4)
    this.#model.check(words, 0, this.#model.sectors, 'in the image file')
  }

  #describeRings(): string {
    const session = this.#session
    return (session?.queues ?? [])
      .map((queue) => {
        const { entries, ...header } = session?.inflight?.read(queue.index) ?? { entries: [] }
        const { driver } = queue
        return (
          `queue ${queue.index}: driver at ${driver.base}, ${driver.inFlight} in flight, ` +
          `in-flight area ${JSON.stringify(header, bigints)} of ${entries.length} entries`
        )
      })
      .join('\n')
  }

  /** An error with what is needed to understand it. */
  #explained(error: unknown): Error {
    const { seed, packed } = this.#options
    const load = this.#load
    const lines = [
      error instanceof Error ? error.message : String(error),
      `seed ${seed}, ${packed ? 'packed' : 'split'}, after ${this.#total} kills`,
      load === undefined ? '' : `in flight:\n${load.describe()}\n${this.#describeRings()}`,
      `virtiod's log:\n${this.#daemon?.log.slice(-3000)}`,
    ]
    return new Error(lines.join('\n'), { cause: error })
  }
}

function bigints(_key: string, value: unknown): unknown {
  return typeof value === 'bigint' ? Number(value) : value
}

/** The back-end died under the front-end's hands. */
function isGone(error: unknown): boolean {
  return error instanceof FrontendError && (error.failure === 'closed' || error.failure === 'connect')
}

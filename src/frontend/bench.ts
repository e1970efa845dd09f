/**
 * `virtiod bench`: load on any vhost-user-blk or vhost-user-scsi socket and what came of it: throughput, latency, notifications, the
 * back-end's CPU time. It owns the measuring loop. It must not know the command line: the caller parses options and
 * prints the text.
 */
import { decodeBlkConfig, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO } from '../virtio/blk.ts'
import {
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_IN_ORDER,
  VIRTIO_F_INDIRECT_DESC,
  VIRTIO_F_RING_PACKED,
} from '../virtio/constants.ts'
import { VIRTIO_SCSI_REQUEST_QUEUE } from '../virtio/scsi.ts'
import { DirtyLogArea } from './dirty-log.ts'
import { FrontendError } from './errors.ts'
import { Histogram } from './histogram.ts'
import type { Load, LoadOptions, Pattern } from './load.ts'
import { BlockLoad } from './load.ts'
import { layouts } from './memory.ts'
import { cpuBetween, cpuTime, describePeer } from './peer.ts'
import { ScsiDriver } from './scsi.ts'
import { cdb } from './scsi-cdb.ts'
import { ScsiLoad } from './scsi-load.ts'
import { Session } from './session.ts'
import type { Virtqueue, WaitMode } from './virtqueue.ts'

export interface BenchOptions {
  /** What is behind the socket; default blk. */
  readonly device?: 'blk' | 'scsi'
  /** The logical unit of a SCSI device; default 0. */
  readonly lun?: number
  readonly rw?: Pattern
  /** Bytes per request; default 4096. */
  readonly bs?: number
  /** Requests in flight per queue; default 32. */
  readonly qd?: number
  /** Virtqueues, all driven from this one thread; default 1. */
  readonly queues?: number
  /** `poll` (default) watches the used rings; `irq` sleeps until it is called, as a guest does. */
  readonly driver?: WaitMode
  /** Seconds of measurement; default 5. */
  readonly seconds?: number
  /** Seconds before it that don't count; default 0.5. */
  readonly warmup?: number
  /** Bytes from the start of the disk to work on; default all of it. */
  readonly size?: number
  /** Use indirect descriptors when they are offered; default false. */
  readonly indirect?: boolean
  /** Don't acknowledge EVENT_IDX. */
  readonly noEventIdx?: boolean
  /** Packed rings, IN_ORDER, in-flight tracking: a FrontendError when the back-end does not offer it; default false. */
  readonly packed?: boolean
  readonly inOrder?: boolean
  readonly inflight?: boolean
  /** Log dirty pages meanwhile, and take them out ten times a second, as a migration does; default false. */
  readonly log?: boolean
  /** Ring entries; default the power of two that holds 3 × qd, at least 128. */
  readonly queueSize?: number
  readonly seed?: number
  /** Called once a second while measuring. */
  readonly progress?: (line: string) => void
  readonly timeoutMs?: number
}

/** What a bench measured. Latencies in microseconds. */
export interface BenchResult {
  readonly socket: string
  readonly device: 'blk' | 'scsi'
  readonly backend: string
  readonly rw: Pattern
  readonly bs: number
  readonly qd: number
  readonly queues: number
  readonly driver: WaitMode
  readonly eventIdx: boolean
  readonly indirect: boolean
  readonly packed: boolean
  readonly inOrder: boolean
  readonly inflight: boolean
  readonly log: boolean
  readonly seconds: number
  readonly requests: number
  readonly errors: number
  readonly iops: number
  /** Megabytes (10^6) per second. */
  readonly mbPerSecond: number
  readonly latency: {
    readonly mean: number
    readonly p50: number
    readonly p90: number
    readonly p99: number
    readonly p999: number
    readonly max: number
  }
  readonly kicksPerRequest: number
  readonly callsPerRequest: number
  /** CPU time of the back-end process per request, microseconds; undefined when /proc doesn't show it. */
  readonly cpuPerRequest?: number
}

const clock = (): number => performance.now()

/** The one line to print before a bench that destroys data, or undefined. */
export function writeWarning(socketPath: string, options: BenchOptions): string | undefined {
  if (!isWriting(options.rw ?? 'randread')) return undefined
  return `This writes random data to the disk behind ${socketPath}${options.size === undefined ? '' : ` (its first ${options.size} bytes)`}.`
}

/**
 * Runs the load. It blocks this thread until the end.
 * @throws FrontendError when the back-end can't be reached, is read-only for a writing pattern, or stops answering
 * @throws RangeError for options that don't fit the disk
 */
export function bench(socketPath: string, options: BenchOptions = {}): BenchResult {
  const device = options.device ?? 'blk'
  // Queues that carry no requests.
  const first = device === 'scsi' ? VIRTIO_SCSI_REQUEST_QUEUE : 0
  const rw = options.rw ?? 'randread'
  const bs = options.bs ?? 4096
  const qd = options.qd ?? 32
  const queues = options.queues ?? 1
  const driver = options.driver ?? 'poll'
  if (!(bs >= 512 && bs % 512 === 0)) throw new RangeError(`bs: ${bs} is not a multiple of 512 bytes`)
  if (!(qd >= 1 && qd <= 8192)) throw new RangeError(`qd: ${qd} is not in 1 … 8192`)
  const queueSize = options.queueSize ?? Math.max(128, 2 ** Math.ceil(Math.log2(3 * qd)))
  const perQueue = qd * (Math.ceil(bs / 4096) * 4096 + 512) + queueSize * 26 + 65536
  const memory = Math.ceil((queues * perQueue + 2 ** 20) / 2 ** 21) * 2 ** 21
  using session = Session.open(socketPath, {
    mode: driver,
    queues: 0,
    memory: layouts.single(memory),
    withoutFeatures: options.noEventIdx === true ? [VIRTIO_F_EVENT_IDX] : [],
    packed: options.packed === true,
    inOrder: options.inOrder === true,
    inflight: options.inflight === true && { numQueues: first + queues, queueSize },
    ...(options.timeoutMs !== undefined && { timeoutMs: options.timeoutMs }),
  })
  const indirect = options.indirect === true && session.has(VIRTIO_F_INDIRECT_DESC)
  const histogram = new Histogram()
  const rings: Virtqueue[] = []
  const loads: Load[] = []
  checkQueues(session, queues, first)
  for (let i = 0; i < queues; i++) {
    const shared = rings[0] === undefined ? {} : { callFd: rings[0].callFd }
    rings.push(session.startQueue(first + i, { size: queueSize, mode: driver, ...shared }))
  }
  const lun = options.lun ?? 0
  const unit = device === 'scsi' ? examineUnit(session, rings[0]!, lun, rw) : examineDisk(session, rw)
  const area = workingSet(unit, bs, queues, options.size)
  for (const [i, ring] of rings.entries()) {
    const load: LoadOptions = {
      pattern: rw,
      blockSize: bs,
      depth: qd,
      // Random requests of all queues share the area; sequential queues have a stretch each.
      firstBlock: rw.startsWith('rand') ? 0 : i * Math.floor(area / queues),
      blocks: rw.startsWith('rand') ? area : Math.floor(area / queues),
      seed: (options.seed ?? 0x5eed) + i * 7919,
      indirect,
    }
    loads.push(
      device === 'scsi'
        ? new ScsiLoad(ring.driver, session.memory, histogram, { ...load, lun, unitBlockSize: unit.blockSize })
        : new BlockLoad(ring.driver, session.memory, histogram, load)
    )
  }
  const pid = session.connection.peerPid
  using log = options.log === true ? new DirtyLogArea(session.memory) : undefined
  if (log !== undefined) session.startLog(log)
  const run = new Run(session, rings, loads, histogram, driver, options.progress, log)
  const measured = run.measure((options.warmup ?? 0.5) * 1000, (options.seconds ?? 5) * 1000, pid)
  return {
    socket: socketPath,
    device,
    backend: (pid !== undefined && describePeer(pid)?.program) || 'unknown',
    rw,
    bs,
    qd,
    queues,
    driver,
    indirect,
    packed: session.has(VIRTIO_F_RING_PACKED),
    inOrder: session.has(VIRTIO_F_IN_ORDER),
    inflight: session.inflight !== undefined,
    log: log !== undefined,
    eventIdx: session.has(VIRTIO_F_EVENT_IDX),
    seconds: measured.ms / 1000,
    requests: measured.requests,
    errors: measured.errors,
    iops: (measured.requests * 1000) / measured.ms,
    mbPerSecond: (measured.requests * bs) / measured.ms / 1000,
    latency: {
      mean: histogram.mean / 1000,
      p50: histogram.percentile(0.5) / 1000,
      p90: histogram.percentile(0.9) / 1000,
      p99: histogram.percentile(0.99) / 1000,
      p999: histogram.percentile(0.999) / 1000,
      max: histogram.max / 1000,
    },
    kicksPerRequest: measured.kicks / Math.max(1, measured.requests),
    callsPerRequest: measured.calls / Math.max(1, measured.requests),
    ...(measured.cpuNs !== undefined && { cpuPerRequest: measured.cpuNs / 1000 / Math.max(1, measured.requests) }),
  }
}

/** The result as a few lines for people. */
export function formatBench(result: BenchResult): string {
  const us = (value: number): string =>
    value >= 10_000 ? `${(value / 1000).toFixed(1)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} µs`
  const { latency } = result
  const lines = [
    `${result.rw} ${result.bs} bytes, qd ${result.qd} × ${result.queues} queue${result.queues === 1 ? '' : 's'}, ` +
      `${result.driver} driver, ${result.packed ? 'packed, ' : ''}${result.eventIdx ? 'EVENT_IDX' : 'flags'}, ` +
      `${result.indirect ? 'indirect, ' : ''}${result.inOrder ? 'in order, ' : ''}` +
      `${result.inflight ? 'in-flight tracking, ' : ''}${result.log ? 'dirty logging, ' : ''}` +
      `${result.seconds.toFixed(1)} s, back-end ${result.backend}`,
    `  IOPS     ${Math.round(result.iops).toLocaleString('en-US')}   ${result.mbPerSecond.toFixed(1)} MB/s`,
    `  latency  mean ${us(latency.mean)}  p50 ${us(latency.p50)}  p90 ${us(latency.p90)}  p99 ${us(latency.p99)}  p99.9 ${us(latency.p999)}  max ${us(latency.max)}`,
    `  per request  ${result.kicksPerRequest.toFixed(3)} kicks  ${result.callsPerRequest.toFixed(3)} calls` +
      (result.cpuPerRequest === undefined ? '' : `  ${result.cpuPerRequest.toFixed(3)} µs back-end CPU`),
    `  errors   ${result.errors}`,
  ]
  return lines.join('\n')
}

interface Measured {
  readonly ms: number
  readonly requests: number
  readonly errors: number
  readonly kicks: number
  readonly calls: number
  readonly cpuNs: number | undefined
}

/** The loop over all queues, in three phases: warm-up, measurement, drain. */
class Run {
  readonly #session: Session
  readonly #rings: readonly Virtqueue[]
  readonly #loads: readonly Load[]
  readonly #histogram: Histogram
  readonly #mode: WaitMode
  readonly #progress: ((line: string) => void) | undefined
  readonly #log: DirtyLogArea | undefined

  constructor(
    session: Session,
    rings: readonly Virtqueue[],
    loads: readonly Load[],
    histogram: Histogram,
    mode: WaitMode,
    progress: ((line: string) => void) | undefined,
    log: DirtyLogArea | undefined
  ) {
    this.#session = session
    this.#rings = rings
    this.#loads = loads
    this.#histogram = histogram
    this.#mode = mode
    this.#progress = progress
    this.#log = log
  }

  measure(warmupMs: number, ms: number, pid: number | undefined): Measured {
    const start = clock()
    for (const load of this.#loads) load.start(start)
    this.#loop(start + warmupMs, false)
    this.#histogram.reset()
    const before = this.#totals()
    const cpuBefore = pid === undefined ? undefined : cpuTime(pid)
    const from = clock()
    this.#loop(from + ms, this.#progress !== undefined)
    const to = clock()
    const cpuAfter = pid === undefined ? undefined : cpuTime(pid)
    const after = this.#totals()
    this.#drain()
    return {
      ms: to - from,
      requests: after.requests - before.requests,
      errors: after.errors - before.errors,
      kicks: after.kicks - before.kicks,
      calls: after.calls - before.calls,
      cpuNs: cpuBefore !== undefined && cpuAfter !== undefined ? cpuBetween(cpuBefore, cpuAfter) : undefined,
    }
  }

  #loop(end: number, progress: boolean): void {
    let idle = 0
    let lastCompletion = clock()
    let lastTaken = lastCompletion
    let nextLine = progress ? lastCompletion + 1000 : Number.POSITIVE_INFINITY
    let lineRequests = this.#totals().requests
    for (;;) {
      let count = 0
      for (const load of this.#loads) count += load.step(clock, true)
      if (count > 0) {
        // The clock is read in step; here only every so often.
        idle = 0
        this.#sinceCheck += count
        if (this.#mode === 'poll' && this.#sinceCheck < 64) continue
      } else if (this.#mode === 'irq') {
        this.#sleep()
      } else if (++idle < 256) {
        continue
      }
      this.#sinceCheck = 0
      const now = clock()
      if (count > 0) lastCompletion = now
      else if (now - lastCompletion > 1000) this.#stalled(now - lastCompletion)
      if (this.#log !== undefined && now - lastTaken > 100) {
        this.#log.take()
        lastTaken = now
      }
      if (now >= end) return
      if (now >= nextLine) {
        const { requests } = this.#totals()
        this.#progress?.(
          `${Math.round((requests - lineRequests) / ((now - nextLine + 1000) / 1000)).toLocaleString('en-US')} IOPS`
        )
        lineRequests = requests
        nextLine = now + 1000
      }
      idle = 0
    }
  }

  #sinceCheck = 0

  /**
   * As a guest's interrupt handling: ask for calls, look again, sleep, then ask for none while working. All rings
   * share one call eventfd.
   */
  #sleep(): void {
    for (const ring of this.#rings) if (ring.driver.enableCalls()) return
    this.#rings[0]?.waitForCall(100)
    for (const ring of this.#rings) ring.driver.disableCalls()
  }

  #drain(): void {
    const deadline = clock() + 10_000
    while (this.#rings.some((ring) => ring.driver.inFlight > 0)) {
      for (const load of this.#loads) load.step(clock, false)
      const now = clock()
      if (now > deadline) throw new FrontendError('bench', 'timeout', 'requests in flight did not complete at the end')
    }
  }

  #stalled(ms: number): void {
    if (this.#session.connection.channel.hungUp()) {
      throw new FrontendError('bench', 'closed', 'the back-end closed the connection')
    }
    if (ms > 10_000) throw new FrontendError('bench', 'timeout', 'no request completed for 10 s')
  }

  #totals(): { requests: number; errors: number; kicks: number; calls: number } {
    let requests = 0
    let errors = 0
    let kicks = 0
    let calls = 0
    for (const load of this.#loads) {
      requests += load.completed
      errors += load.errors
    }
    this.#rings[0]?.takeCalls()
    for (const ring of this.#rings) {
      kicks += ring.driver.counters.kicks
      calls += ring.calls
    }
    return { requests, errors, kicks, calls }
  }
}

function isWriting(rw: Pattern): boolean {
  return rw !== 'read' && rw !== 'randread'
}

/** What is to be loaded. */
interface Unit {
  readonly blocks: number
  readonly blockSize: number
}

/** @param first queues that carry no requests */
function checkQueues(session: Session, queues: number, first: number): void {
  const most = session.maxQueues - first
  if (queues <= most) return
  throw new RangeError(
    `queues: the back-end has ${most}${first === 0 && !session.has(VIRTIO_BLK_F_MQ) ? ' (MQ is not offered)' : ''}`
  )
}

function examineDisk(session: Session, rw: Pattern): Unit {
  if (isWriting(rw) && session.has(VIRTIO_BLK_F_RO)) throw readOnly(rw)
  const bytes = session.connection.getConfig(0, 57)
  if (bytes === undefined)
    throw new FrontendError('GET_CONFIG', 'reply', 'the back-end refused to show its config space')
  const config = decodeBlkConfig(bytes, session.features)
  const blockSize = session.has(VIRTIO_BLK_F_BLK_SIZE) ? (config.blkSize ?? 512) : 512
  return { blockSize, blocks: Math.floor((Number(config.capacity) * 512) / blockSize) }
}

function examineUnit(session: Session, ring: Virtqueue, lun: number, rw: Pattern): Unit {
  const driver = new ScsiDriver(ring, session.memory, 4096)
  driver.clearAttentions(lun)
  const mode = driver.ask(cdb.modeSense6(0x3f), 255, { lun })
  if (isWriting(rw) && (mode[2]! & 0x80) !== 0) throw readOnly(rw)
  return driver.capacity(lun)
}

function readOnly(rw: Pattern): FrontendError {
  return new FrontendError('bench', 'unsupported', `the disk is read-only: ${rw} is not possible`)
}

/** How many blocks of `bs` bytes the load may use. */
function workingSet({ blocks, blockSize }: Unit, bs: number, queues: number, size: number | undefined): number {
  if (bs % blockSize !== 0) throw new RangeError(`bs: ${bs} is not a multiple of the disk's block size ${blockSize}`)
  const capacity = blocks * blockSize
  const count = Math.floor(Math.min(size ?? capacity, capacity) / bs)
  if (count < queues) throw new RangeError(`size: the disk of ${capacity} bytes is too small`)
  return Math.min(count, 0xffff_ffff)
}

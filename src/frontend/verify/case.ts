/**
 * What a verification case is and what it gets: the facts about the disk, sessions that are closed behind it, seeded random
 * numbers, and ways to say pass, fail or skip. It must not know which cases exist.
 */

import type { BlkConfig } from '../../virtio/blk.ts'
import { VIRTIO_BLK_S_OK, VIRTIO_BLK_T_FLUSH } from '../../virtio/blk.ts'
import { hasFeature } from '../../virtio/features.ts'
import type { BlkRequest } from '../blk.ts'
import { BlkDriver, statusName } from '../blk.ts'
import { GuestMemory } from '../memory.ts'
import type { SessionOptions } from '../session.ts'
import { Session } from '../session.ts'

/** One row of the table. */
export interface VerifyCase {
  /** Stable, lower case: `framing/header-bytes`. */
  readonly name: string
  /** What must hold, for people. */
  readonly title: string
  /** Where it is written: `virtio 1.3 §2.7.10`, `vhost-user.rst "Ring states"`. */
  readonly spec: string
  /** It writes to the disk or to the config space: not run with --read-only or on a read-only disk. */
  readonly writes?: boolean
  /** Passes by returning (a string is a remark for the line), fails by throwing, skips by throwing {@link Skip}. */
  // biome-ignore lint/suspicious/noConfusingVoidType: a case that has no remark just ends
  run(context: VerifyContext): string | undefined | void
}

/** Thrown by a case that doesn't apply to this back-end. */
export class Skip extends Error {}

/** Thrown by a case that found the back-end at fault. */
export class Failure extends Error {}

/** @throws Failure unless `condition` holds */
export function must(condition: boolean, message: string): asserts condition {
  if (!condition) throw new Failure(message)
}

/** @throws Skip unless `condition` holds */
export function need(condition: boolean, message: string): asserts condition {
  if (!condition) throw new Skip(message)
}

/** @throws Failure when the request has another status than one of `allowed` */
export function mustStatus(request: BlkRequest, allowed: readonly number[], what: string): void {
  must(
    allowed.includes(request.status),
    `${what}: status ${statusName(request.status)} instead of ${allowed.map(statusName).join(' or ')}`
  )
}

/** @throws Failure naming the first byte that differs */
export function mustEqual(actual: Uint8Array, expected: Uint8Array, what: string): void {
  if (Buffer.compare(actual, expected) === 0) return
  if (actual.length !== expected.length)
    throw new Failure(`${what}: ${actual.length} bytes instead of ${expected.length}`)
  const at = actual.findIndex((byte, i) => byte !== expected[i])
  throw new Failure(
    `${what}: wrong data from byte ${at} of ${actual.length} on (0x${actual[at]?.toString(16)} instead of 0x${expected[at]?.toString(16)})`
  )
}

/** xorshift32: the same numbers for the same seed, on every machine. */
export class Random {
  #state: number

  constructor(seed: number) {
    this.#state = seed | 0 || 1
  }

  next(): number {
    let x = this.#state
    x ^= x << 13
    x ^= x >>> 17
    x ^= x << 5
    this.#state = x
    return x >>> 0
  }

  /** 0 … limit − 1. */
  below(limit: number): number {
    return this.next() % limit
  }

  /** Random bytes; any length. */
  bytes(length: number): Uint8Array {
    const words = new Uint32Array(Math.ceil(length / 4))
    for (let i = 0; i < words.length; i++) words[i] = this.next()
    return new Uint8Array(words.buffer, 0, length)
  }

  /** `count` positive numbers that add up to `total` (count ≤ total). */
  cuts(total: number, count: number): number[] {
    const points = new Set<number>()
    while (points.size < count - 1) points.add(1 + this.below(total - 1))
    const sorted = [0, ...[...points].sort((a, b) => a - b), total]
    return sorted.slice(1).map((point, i) => point - (sorted[i] ?? 0))
  }
}

/** What the first session found out about the disk. */
export interface DiskFacts {
  readonly features: bigint
  readonly protocolFeatures: bigint
  readonly maxQueues: number
  readonly memorySlots: number
  readonly config: BlkConfig
  /** In sectors. */
  readonly capacity: number
  /** Bytes; 512 without BLK_SIZE. */
  readonly blockSize: number
  /** Data segments per request; 1 … without SEG_MAX 1. */
  readonly segMax: number
  /** The disk is read-only, or is to be treated so. */
  readonly readOnly: boolean
  /** Where cases may write: the first sector, and bytes. */
  readonly area: { readonly sector: number; readonly bytes: number }
}

/** A session with a request driver per queue. */
export interface Opened {
  readonly session: Session
  /** Queue 0's. */
  readonly blk: BlkDriver
  readonly drivers: readonly BlkDriver[]
}

export interface OpenOptions extends SessionOptions {
  /** Bytes per queue and region for requests in flight; default 8 MiB. */
  readonly arena?: number
}

/** Which rings the cases use. */
export type RingFormat = Pick<SessionOptions, 'packed' | 'inOrder'>

export class VerifyContext {
  readonly socketPath: string
  readonly facts: DiskFacts
  readonly timeoutMs: number
  readonly seed: number
  /** What every session is opened with unless the case says otherwise. */
  readonly format: RingFormat
  readonly #sessions: Session[] = []
  readonly #memories: GuestMemory[] = []

  constructor(socketPath: string, facts: DiskFacts, timeoutMs: number, seed: number, format: RingFormat = {}) {
    this.socketPath = socketPath
    this.facts = facts
    this.timeoutMs = timeoutMs
    this.seed = seed
    this.format = format
  }

  get packed(): boolean {
    return this.format.packed === true
  }

  has(bit: number): boolean {
    return hasFeature(this.facts.features, bit)
  }

  hasProtocol(bit: number): boolean {
    return hasFeature(this.facts.protocolFeatures, bit)
  }

  /** Opens a session; the one before it is closed first (a back-end need not serve two), it is closed after the case. */
  open(options: OpenOptions = {}): Opened {
    for (const session of this.#sessions.splice(0)) session.close()
    const session = Session.open(this.socketPath, { timeoutMs: this.timeoutMs, ...this.format, ...options })
    this.#sessions.push(session)
    const queueCount = Math.max(1, session.queues.length)
    const arena = options.arena ?? Math.floor((8 * 2 ** 20) / queueCount)
    const drivers = session.queues.map((queue) => this.driver(session, queue.index, arena))
    return { session, drivers, blk: drivers[0] as BlkDriver }
  }

  /** A request driver with this case's time limit. */
  driver(session: Session, queue = 0, arena = 4 * 2 ** 20): BlkDriver {
    const blk = new BlkDriver(session.queue(queue), session.memory, arena)
    blk.timeoutMs = this.timeoutMs
    return blk
  }

  /** Guest memory that outlives a session; it is released after the case. */
  memory(...layout: ConstructorParameters<typeof GuestMemory>): GuestMemory {
    const memory = new GuestMemory(...layout)
    this.#memories.push(memory)
    return memory
  }

  random(salt = 0): Random {
    return new Random(this.seed ^ (salt * 0x9e37_79b1))
  }

  /** The first sector of the writable area, plus an offset in bytes. */
  sector(offset = 0): number {
    return this.facts.area.sector + offset / 512
  }

  /** @throws Failure unless queue requests still work in this session */
  mustWork(blk: BlkDriver, what: string): void {
    try {
      if (this.has(9))
        mustStatus(blk.run(VIRTIO_BLK_T_FLUSH, 0, new Uint8Array(0), 0), [VIRTIO_BLK_S_OK], `${what}: flush`)
      blk.read(this.sector(), this.facts.blockSize)
    } catch (error) {
      throw new Failure(`${what}: the queue no longer works (${(error as Error).message})`)
    }
  }

  /** Ends what the case left open. @param abrupt a failed case: don't wait for rings to stop */
  cleanup(abrupt: boolean): void {
    for (const session of this.#sessions.splice(0)) session.close(abrupt)
    for (const memory of this.#memories.splice(0)) memory.close()
  }
}

/** Polls until `condition` holds, at most `ms`. */
export function eventually(condition: () => boolean, ms: number, step: () => void = () => {}): boolean {
  const deadline = performance.now() + ms
  for (;;) {
    step()
    if (condition()) return true
    if (performance.now() > deadline) return false
  }
}

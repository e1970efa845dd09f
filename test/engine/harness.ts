/** A pool of real iothreads under the test device, with drivers that live in the test. */
import { closeSync, readdirSync, readFileSync } from 'node:fs'
import { QueueCounters } from '../../src/engine/counters.ts'
import type { Report } from '../../src/engine/messages.ts'
import { type Blocked, type DeviceFailure, type IothreadHandle, IothreadPool } from '../../src/engine/pool.ts'
import { type NativeMapping, native } from '../../src/native.ts'
import { inflightSize } from '../../src/virtio/inflight.ts'
import type { RegionDescription } from '../../src/virtio/memory.ts'
import { INDIRECT, MockDriver, NEXT, type RingLayout, ringLayout, WRITE } from '../virtio/mock-driver.ts'
import type { AsyncData, AsyncMessage } from './fixtures/async-device.ts'
import { GATE, MAX_SAMPLES, type TestData, type TestMessage } from './fixtures/device.ts'
import type { OwnData } from './fixtures/own-entry.ts'
import { PackedDriver } from './packed-driver.ts'

export const DEVICE = new URL('./fixtures/device.ts', import.meta.url).href
export const ASYNC_DEVICE = new URL('./fixtures/async-device.ts', import.meta.url).href
/** The entry of threads of a device's own. */
export const OWN_ENTRY = new URL('./fixtures/own-entry.ts', import.meta.url)

type Event = Extract<Report, { kind: 'ringBroken' }> | DeviceFailure
type Miss = Extract<Report, { kind: 'iotlbMiss' }>

/** Whether this machine has io_uring: else only the emulation can be tested. */
export const hasUring = (() => {
  const ring = native.ringSetup(8, 8, false)
  if (typeof ring === 'number') return false
  ring.close()
  return true
})()

/** Waits for a condition that another thread brings about. The limit is only for what never comes. */
export async function until(what: string, condition: () => boolean, seconds = 10): Promise<void> {
  const end = performance.now() + seconds * 1000
  while (!condition()) {
    if (performance.now() > end) throw new Error(`never came: ${what}`)
    await new Promise((resolve) => setImmediate(resolve))
  }
}

export function check(result: number, what: string): number {
  if (result < 0) throw new Error(`${what}: ${result}`)
  return result
}

/** Waits until all iothreads of this process sleep, and stay so for a while: one that polls is always runnable. */
export async function asleep(): Promise<void> {
  let sleeping = 0
  await until('all iothreads sleep', () => {
    sleeping = iothreadStates().every((state) => state === 'S') ? sleeping + 1 : 0
    return sleeping === 50
  })
}

/** The letters of /proc/PID/stat. */
function iothreadStates(): string[] {
  return readdirSync('/proc/self/task').flatMap((task) => {
    try {
      const [, name, state] = /\((.*)\) (.)/.exec(readFileSync(`/proc/self/task/${task}/stat`, 'utf8'))!
      return name!.startsWith('iothread') ? [state!] : []
    } catch {
      // It ended meanwhile.
      return []
    }
  })
}

const kept: NativeMapping[] = []

/**
 * Memory that stays until the process ends: an address must not outlive its buffer, which the garbage collector unmaps.
 */
export function allocate(length: number): NativeMapping {
  const mapping = native.allocate(length)
  if (typeof mapping === 'number') throw new Error(`allocate: ${mapping}`)
  kept.push(mapping)
  return mapping
}

/** Resolves to whether `promise` ended well before it was given up. */
function inTime(promise: Promise<unknown>, seconds = 3): Promise<boolean> {
  const late = Promise.withResolvers<boolean>()
  const timer = setTimeout(() => late.resolve(false), seconds * 1000)
  const ended = promise.then(
    () => true,
    () => false
  )
  return Promise.race([ended, late.promise]).finally(() => clearTimeout(timer))
}

export interface EngineOptions {
  /** How many iothreads (1). */
  readonly count?: number
  readonly pollMaxUs?: number
  /** They wait in the event loop: threads of a device's own. */
  readonly eventLoop?: boolean
}

/** A thread of a device's own, and what it told. */
export interface OwnThreadLog {
  readonly thread: IothreadHandle
  readonly messages: unknown[]
  readonly deaths: unknown[]
  readonly blocked: Blocked[]
  readonly unblocked: { readonly ms: number; readonly newMs: number }[]
}

const idle = new Map<string, Engine>()

/** Ends the iothreads that wait for the next test. */
export async function closeEngines(): Promise<void> {
  const engines = [...idle.values()]
  idle.clear()
  await Promise.all(engines.map((engine) => engine.pool.close()))
}

/**
 * Iothreads, and all that they report. Everything that a test opens through it is closed with it; the threads
 * themselves serve the next test if they are well, since starting them is most of the time that a test takes.
 */
export class Engine implements AsyncDisposable {
  readonly pool: IothreadPool
  readonly threads: readonly IothreadHandle[]
  readonly events: Event[] = []
  readonly deaths: unknown[] = []
  readonly misses: Miss[] = []
  /** Sessions of `call` reports. */
  readonly calls: number[] = []
  /** Rings to stop at the end. */
  readonly started = new Set<TestRing>()
  readonly #key: string
  readonly #fds: number[] = []
  readonly #own: IothreadHandle[] = []
  #abandoned = false

  private constructor(key: string, emulate: boolean, { count = 1, pollMaxUs = 0, eventLoop = false }: EngineOptions) {
    this.#key = key
    this.pool = new IothreadPool({ count: eventLoop ? 0 : count, emulate, pollMaxUs })
    this.pool.on('ringBroken', (event) => this.events.push(event))
    this.pool.on('deviceFailed', (event) => this.events.push(event))
    this.pool.on('iotlbMiss', (event) => this.misses.push(event))
    this.pool.on('call', ({ session }) => this.calls.push(session))
    this.pool.on('death', (error) => this.deaths.push(error))
    this.threads = eventLoop ? Array.from({ length: count }, () => this.#spawn()) : this.pool.threads
  }

  static async start(emulate: boolean, options: EngineOptions = {}): Promise<Engine> {
    const key = `${emulate} ${JSON.stringify(options)}`
    const waiting = idle.get(key)
    if (waiting !== undefined) {
      idle.delete(key)
      return waiting
    }
    const engine = new Engine(key, emulate, options)
    await Promise.all(engine.threads.map((thread) => thread.ready()))
    return engine
  }

  #spawn(): IothreadHandle {
    return this.spawn({}, this.deaths).thread
  }

  /** Starts a thread of a device's own, which ends with the test. */
  async spawnOwn(data: Partial<OwnData> = {}): Promise<OwnThreadLog> {
    const own = this.spawn(data)
    this.#own.push(own.thread)
    await own.thread.ready()
    return own
  }

  /** As `spawnOwn`, but nobody ends it. */
  spawn(data: Partial<OwnData> = {}, deaths: unknown[] = []): OwnThreadLog {
    const log = {
      messages: [] as unknown[],
      deaths,
      blocked: [] as Blocked[],
      unblocked: [] as OwnThreadLog['unblocked'],
    }
    const thread = this.pool.spawn({
      entry: OWN_ENTRY,
      data: { eventLoop: true, ...data } satisfies OwnData,
      events: {
        message: (message) => log.messages.push(message),
        death: (error) => log.deaths.push(error),
        blocked: (blocked) => log.blocked.push(blocked),
        unblocked: (ms, newMs) => log.unblocked.push({ ms, newMs }),
      },
    })
    return { thread, ...log }
  }

  /** The iothread of the next queue. */
  assign(): IothreadHandle {
    return this.threads[this.#next++ % this.threads.length]!
  }
  #next = 0

  eventfd(): number {
    return this.own(check(native.eventfd(0), 'eventfd'))
  }

  memfd(length: number): number {
    return this.own(check(native.memfd('test', length, 0), 'memfd'))
  }

  own(fd: number): number {
    this.#fds.push(fd)
    return fd
  }

  /** Ends the threads now, whatever is in flight. */
  async abandon(): Promise<void> {
    this.#abandoned = true
    await this.pool.abandon()
  }

  /** Ends the threads now, in order. */
  async close(): Promise<void> {
    this.#abandoned = true
    await this.pool.close()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (!this.#abandoned) {
      const stops = [...this.started].map((ring) => {
        ring.release()
        return ring.stop().catch(() => {})
      })
      const well =
        this.deaths.length === 0 && (await inTime(Promise.all([...stops, this.pool.broadcast({ kind: 'ping' })])))
      // Not closed, as that would wait for what doesn't answer: the test runner ends the process.
      if (!well) return
    }
    await Promise.all(this.#own.splice(0).map((thread) => thread.close(1000)))
    for (const fd of this.#fds.splice(0)) closeSync(fd)
    this.events.length = 0
    this.misses.length = 0
    this.calls.length = 0
    this.started.clear()
    if (!this.#abandoned) idle.set(this.#key, this)
  }
}

export interface SessionOptions {
  readonly rings?: number
  readonly size?: number
  readonly eventIdx?: boolean
  /** Spread over the iothreads as the daemon does, or all on the first. */
  readonly spread?: boolean
  readonly kick?: boolean
  readonly call?: boolean
  readonly enabled?: boolean
  readonly module?: string
  readonly data?: Partial<TestData & AsyncData>
  /** Default: 0 of a split ring, the first lap of a packed one. */
  readonly base?: number
  readonly packed?: boolean
  readonly inOrder?: boolean
  /** With an in-flight region per ring. */
  readonly inflight?: boolean
  readonly inband?: boolean
  /** StartQueue.logAddress of all rings. */
  readonly logAddress?: number
  /** The file of READ and WRITE, instead of one of 1 MiB. */
  readonly fd?: number
  /** What the descriptors and the ring's addresses have on top of the offsets in memory: IOVAs. */
  readonly iova?: number
  /** The iothread of all rings. */
  readonly thread?: IothreadHandle
  /** StartQueue.timeoutMs */
  readonly timeoutMs?: number
}

/** Both indices 0, both wrap counters 1. */
export const PACKED_BASE = 0x8000_8000

/** Bytes that each request slot has behind the ring: the request, and its writable buffer. */
const SLOT = 128
let sessions = 1000

/** One ring of a session, driver and all. */
export class TestRing {
  readonly index: number
  readonly thread: IothreadHandle
  readonly driver: MockDriver & PackedDriver
  readonly layout: RingLayout
  readonly counters = new QueueCounters()
  /** Its in-flight region, as bytes. */
  readonly inflight: Uint8Array<SharedArrayBuffer> | undefined
  id: number
  #stopped = false
  kickFd: number
  callFd: number
  readonly #engine: Engine
  readonly #session: TestSession
  readonly #slots: number

  constructor(
    engine: Engine,
    session: TestSession,
    index: number,
    thread: IothreadHandle,
    offset: number,
    kickFd: number,
    callFd: number
  ) {
    const { size = 64, packed = false, inflight = false } = session.options
    const layout = ringLayout(size)
    this.#engine = engine
    this.#session = session
    this.index = index
    this.thread = thread
    this.id = thread.takeRing()
    this.kickFd = kickFd
    this.callFd = callFd
    this.layout = {
      size,
      descriptor: offset,
      driver: offset + layout.driver,
      device: offset + layout.device,
    }
    this.#slots = offset + layout.end
    if (inflight) this.inflight = new Uint8Array(new SharedArrayBuffer(inflightSize(size, packed)))
    // A test that uses what only one of them has must not ask for the other.
    const driver = packed
      ? new PackedDriver(session.mapping.buffer, this.layout, this.#base)
      : new MockDriver(session.mapping.buffer, this.layout, this.#base)
    this.driver = driver as MockDriver & PackedDriver
  }

  get #base(): number {
    const { base, packed = false } = this.#session.options
    return base ?? (packed ? PACKED_BASE : 0)
  }

  /** Whether the region has the chain in flight; packed: any chain when no head is given. */
  inFlight(head: number): boolean {
    const { packed = false } = this.#session.options
    return this.inflight![(packed ? 32 : 16) + head * (packed ? 32 : 16)] === 1
  }

  /** How many chains the region has in flight. */
  get marks(): number {
    return Array.from({ length: this.layout.size }, (_, entry) => this.inFlight(entry)).filter(Boolean).length
  }

  async start(): Promise<void> {
    // The last id is free for others since it stopped.
    if (this.#stopped) this.id = this.thread.takeRing()
    this.#stopped = false
    const { eventIdx = false, enabled = true, module = DEVICE, data = {} } = this.#session.options
    const { packed = false, inOrder = false, inband = false, logAddress = -1, iova = 0 } = this.#session.options
    const { timeoutMs = 0 } = this.#session.options
    const { size, descriptor, driver, device } = this.layout
    const at = { size, descriptor: descriptor + iova, driver: driver + iova, device: device + iova }
    await this.thread.request({
      kind: 'startQueue',
      paused: false,
      queue: this.id,
      session: this.#session.id,
      index: this.index,
      vring: { ...at, base: this.#base, eventIdx, indirect: true, packed, inOrder },
      features: 0n,
      kickFd: this.kickFd,
      callFd: this.callFd,
      inband,
      ...(this.inflight === undefined ? {} : { inflight: { buffer: this.inflight.buffer, offset: 0 } }),
      logAddress,
      enabled,
      module,
      data: {
        control: this.#session.control.buffer,
        heap: this.#session.heap.buffer,
        fd: this.#session.fd,
        avail: { buffer: this.#session.mapping.buffer, offset: this.layout.driver },
        ...data,
      },
      counters: this.counters.buffer,
      timeoutMs,
    })
    this.#engine.started.add(this)
  }

  /** Lets go what the device holds. */
  release(): void {
    Atomics.store(this.#session.control, GATE, 1)
  }

  /** Drains it; resolves to its base. */
  async stop(keep = false): Promise<number> {
    const base = await this.thread.request({ kind: 'stopQueue', queue: this.id, keep })
    this.thread.freeRing(this.id)
    this.#stopped = true
    this.#engine.started.delete(this)
    return base
  }

  /** Where the request of a slot is in memory. */
  request(slot: number): number {
    return this.#slots + slot * SLOT
  }

  /** GPA of the writable buffer of a slot. */
  buffer(slot: number): number {
    return this.#slots + slot * SLOT + 64
  }

  /** Writes a request of two descriptors into a slot (descriptors 2 × slot and the next one). Returns the head. */
  prepare(slot: number, operation: number, argument = 0, writable = 64): number {
    const at = this.#slots + slot * SLOT
    const { iova = 0 } = this.#session.options
    this.driver.view.setUint32(at, operation, true)
    this.driver.view.setUint32(at + 4, argument, true)
    const head = slot * 2
    this.driver.descriptor(head, { gpa: at + iova, length: 8, flags: NEXT, next: head + 1 })
    this.driver.descriptor(head + 1, { gpa: this.buffer(slot) + iova, length: writable, flags: WRITE })
    return head
  }

  /** Writes a request whose descriptors are a table at a GPA of the caller's. */
  prepareIndirect(slot: number, table: number, bytes: number): number {
    this.driver.descriptor(slot * 2, { gpa: table, length: bytes, flags: INDIRECT })
    return slot * 2
  }

  /** For the handler. */
  async send(message: TestMessage | AsyncMessage): Promise<void> {
    await this.thread.request({ kind: 'message', queue: this.id, message })
  }

  /** Resolves when a whole round has passed, publishing included: unlike a ping it is answered at a round's end. */
  async round(): Promise<void> {
    await this.thread.request({ kind: 'pause', session: 0 })
  }

  kick(): void {
    check(native.eventfdWrite(this.kickFd, 1), 'kick')
  }

  /** Makes heads available and kicks. */
  offer(...heads: number[]): void {
    this.driver.offer(...heads)
    if (this.kickFd >= 0) this.kick()
  }

  /** Waits until `count` more chains are used; returns them. */
  async used(count: number): Promise<{ id: number; length: number }[]> {
    const all = this.driver.takeUsed()
    await until(`used element ${all.length + 1} of ${count} of ring ${this.index}`, () => {
      all.push(...this.driver.takeUsed())
      return all.length >= count
    })
    return all
  }

  /** Waits for a call on the present call fd and takes it. */
  async called(): Promise<void> {
    await until(`a call of ring ${this.index}`, () => native.eventfdRead(this.callFd) > 0)
  }
}

/** A front-end: memory, a file, and rings on the engine's iothreads. */
export class TestSession {
  readonly id = sessions++
  readonly options: SessionOptions
  readonly control = new Int32Array(new SharedArrayBuffer(64))
  readonly heap = new Float64Array(new SharedArrayBuffer(MAX_SAMPLES * 8))
  readonly mapping: NativeMapping
  readonly fd: number
  readonly rings: TestRing[]
  /** First byte behind the rings. */
  readonly free: number
  readonly #engine: Engine

  private constructor(engine: Engine, options: SessionOptions) {
    const { rings = 1, size = 64, spread = false, kick = true, call = true } = options
    this.options = options
    this.#engine = engine
    const each = ringLayout(size).end + Math.ceil((size * SLOT) / 4096) * 4096
    this.free = each * rings
    this.mapping = allocate(this.free + (1 << 20))
    this.fd = options.fd ?? engine.memfd(1 << 20)
    this.rings = Array.from({ length: rings }, (_, index) => {
      const thread = options.thread ?? (spread ? engine.assign() : engine.threads[0]!)
      return new TestRing(
        engine,
        this,
        index,
        thread,
        index * each,
        kick ? engine.eventfd() : -1,
        call ? engine.eventfd() : -1
      )
    })
  }

  static async start(engine: Engine, options: SessionOptions = {}): Promise<TestSession> {
    const session = new TestSession(engine, options)
    await session.begin()
    for (const ring of session.rings) await ring.start()
    return session
  }

  /** A session whose rings are not started yet. */
  static async prepare(engine: Engine, options: SessionOptions = {}): Promise<TestSession> {
    const session = new TestSession(engine, options)
    await session.begin()
    return session
  }

  /** Its memory, or an empty IOTLB. */
  async begin(): Promise<void> {
    if (this.options.iova === undefined) await this.setMemory([this.region])
    else await this.setMemory([], true)
  }

  get ring(): TestRing {
    return this.rings[0]!
  }

  get region(): RegionDescription {
    return { gpa: 0, size: this.mapping.buffer.byteLength, hva: this.mapping.address, buffer: this.mapping.buffer }
  }

  async setMemory(regions: readonly RegionDescription[], translated = false): Promise<void> {
    await this.#engine.pool.broadcast({ kind: 'setMemory', session: this.id, regions, translated })
  }

  /** IOTLB entries for [start, start + size) of memory, at the IOVAs of `options.iova`. */
  entry(start: number, size: number, access = 3): RegionDescription {
    const { buffer, address } = this.mapping
    const gpa = start + (this.options.iova ?? 0)
    return { gpa, size, hva: address + start, buffer, offset: start, physical: start, access }
  }

  async update(...regions: RegionDescription[]): Promise<void> {
    await this.#engine.pool.broadcast({ kind: 'iotlbUpdate', session: this.id, regions })
  }

  async invalidate(start: number, size: number): Promise<void> {
    const address = start + (this.options.iova ?? 0)
    await this.#engine.pool.broadcast({ kind: 'iotlbInvalidate', session: this.id, address, size })
  }

  async setLog(log: { buffer: SharedArrayBuffer; offset: number; size: number } | undefined, fd = -1): Promise<void> {
    await this.#engine.pool.broadcast({ kind: 'setLog', session: this.id, log, fd })
  }

  async pause(): Promise<void> {
    await this.#engine.pool.broadcast({ kind: 'pause', session: this.id })
  }

  async resume(): Promise<void> {
    await this.#engine.pool.broadcast({ kind: 'resume', session: this.id })
  }
}

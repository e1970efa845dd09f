/**
 * A verifying disk load on the rings of a guest whose back-end keeps dying: reads, writes, zeroes and flushes, as many
 * in flight as asked, each checked when it completes. It owns the requests and their memory, which stay as they are
 * while a request is in flight, whatever happens to the back-end. It must not know sockets, processes or sessions.
 *
 * Even queues are polled; odd ones are looked at only after an interrupt, as a guest does, so a call that is lost with
 * its back-end shows as a request that never ends.
 */

import { writeHeader } from '../../src/frontend/blk.ts'
import type { Segment, VirtqueueDriver } from '../../src/frontend/driver.ts'
import type { GuestBuffer, GuestMemory } from '../../src/frontend/memory.ts'
import { Random } from '../../src/frontend/verify/case.ts'
import {
  VIRTIO_BLK_HEADER_SIZE,
  VIRTIO_BLK_S_OK,
  VIRTIO_BLK_T_FLUSH,
  VIRTIO_BLK_T_IN,
  VIRTIO_BLK_T_OUT,
  VIRTIO_BLK_T_WRITE_ZEROES,
} from '../../src/virtio/blk.ts'
import { type DiskModel, SECTOR } from './model.ts'

/** Largest request, in sectors: 64 KiB. */
const MAX_SECTORS = 128
const STATUS_UNTOUCHED = 0xa5
/** Segments of data at most. */
const MAX_PIECES = 5

/** One queue as the load needs it. */
export interface LoadQueue {
  readonly driver: VirtqueueDriver
  /** Whether an interrupt has come since the last time; always true for a polled queue. */
  interrupted(): boolean
}

interface Slot {
  readonly queue: number
  readonly header: GuestBuffer
  readonly data: GuestBuffer
  readonly words: Uint32Array
  readonly status: GuestBuffer
  readonly table: GuestBuffer
  type: number
  first: number
  count: number
  chain: number
  /** Number of the request, in the order of issue; 0 = free. */
  request: number
  /** Sessions begun since it was issued. */
  sessions: number
}

export interface LoadCounts {
  issued: number
  completed: number
  reads: number
  writes: number
  zeroes: number
  flushes: number
  /** Requests that at least one kill hit in flight, and the most sessions that one of them needed. */
  survivors: number
  longestSurvivor: number
}

export interface LoadOptions {
  readonly depth: number
  readonly indirect: boolean
  readonly zeroes: boolean
  readonly seed: number
}

export class CrashLoad {
  readonly counts: LoadCounts = {
    issued: 0,
    completed: 0,
    reads: 0,
    writes: 0,
    zeroes: 0,
    flushes: 0,
    survivors: 0,
    longestSurvivor: 0,
  }
  readonly #queues: readonly LoadQueue[]
  readonly #model: DiskModel
  readonly #options: LoadOptions
  readonly #random: Random
  readonly #slots: Slot[] = []
  readonly #free: Slot[][]
  /** Per queue, the slot of each chain. */
  readonly #flying: (Slot | undefined)[][]

  constructor(memory: GuestMemory, queues: readonly LoadQueue[], model: DiskModel, options: LoadOptions) {
    this.#queues = queues
    this.#model = model
    this.#options = options
    this.#random = new Random(options.seed)
    this.#free = queues.map(() => [])
    this.#flying = queues.map(() => [])
    for (let i = 0; i < queues.length * options.depth; i++) {
      const queue = i % queues.length
      const data = memory.allocate(MAX_SECTORS * SECTOR, 4096)
      const slot: Slot = {
        queue,
        data,
        words: new Uint32Array(data.region.buffer, data.offset, data.length / 4),
        header: memory.allocate(64, 64),
        status: memory.allocate(1, 1),
        table: memory.allocate(16 * (MAX_PIECES + 2), 16),
        type: 0,
        first: 0,
        count: 0,
        chain: -1,
        request: 0,
        sessions: 0,
      }
      this.#slots.push(slot)
      this.#free[queue]?.push(slot)
    }
    for (const [index, queue] of queues.entries()) {
      if (index % 2 === 0) queue.driver.disableCalls()
      else queue.driver.enableCalls()
    }
  }

  get inFlight(): number {
    return this.counts.issued - this.counts.completed
  }

  /** A new session begins: what is in flight now was in flight when the last one died. */
  resumed(): void {
    for (const slot of this.#slots) {
      if (slot.request === 0) continue
      if (slot.sessions++ === 0) this.counts.survivors++
      this.counts.longestSurvivor = Math.max(this.counts.longestSurvivor, slot.sessions)
    }
  }

  /**
   * Takes what is completed and, with `issue`, fills the queues up again. Returns how many completed.
   * @throws Error when a request ended in another way than it must
   */
  step(issue: boolean): number {
    let completed = 0
    for (let queue = 0; queue < this.#queues.length; queue++) {
      completed += this.#collect(queue)
      if (issue) this.#fill(queue)
    }
    return completed
  }

  /** Reads `count` ≤ 128 sectors from `first` on queue 0 and checks them; everything else has come back. */
  issueRead(first: number, count: number): boolean {
    const slot = this.#free[0]?.pop()
    if (slot === undefined) return false
    if (!this.#model.claim(first, count, false)) throw new Error('a read of everything needs a disk at rest')
    slot.type = VIRTIO_BLK_T_IN
    slot.first = first
    slot.count = count
    this.#launch(slot)
    this.#queues[0]?.driver.publish()
    return true
  }

  /** What is in flight, for a report of requests that never end. */
  describe(): string {
    const flying = this.#slots.filter((slot) => slot.request !== 0)
    const lines = flying
      .slice(0, 24)
      .map(
        (slot) =>
          `queue ${slot.queue} chain ${slot.chain}: request ${slot.request} of ${this.counts.issued}, ` +
          `type ${slot.type}, sectors ${slot.first} + ${slot.count}, in flight over ${slot.sessions} sessions, ` +
          `status 0x${(slot.status.bytes[0] ?? 0).toString(16)}`
      )
    if (flying.length > lines.length) lines.push(`and ${flying.length - lines.length} more`)
    return lines.join('\n')
  }

  #collect(index: number): number {
    const queue = this.#queues[index] as LoadQueue
    const { driver } = queue
    if (!queue.interrupted()) return 0
    let completed = 0
    for (;;) {
      for (let chain = driver.pop(); chain >= 0; chain = driver.pop()) {
        this.#finish(index, chain, driver.written)
        driver.release(chain)
        completed++
      }
      // A polled queue is looked at again anyway; the other asks for the next interrupt, and looks once more.
      if (index % 2 === 0 || !driver.enableCalls()) return completed
      driver.disableCalls()
    }
  }

  #fill(index: number): void {
    const free = this.#free[index] as Slot[]
    const before = free.length
    for (let tries = before; tries > 0 && free.length > 0; tries--) {
      const slot = free[free.length - 1] as Slot
      if (!this.#choose(slot)) continue
      free.pop()
      this.#launch(slot)
    }
    if (free.length < before) this.#queues[index]?.driver.publish()
  }

  /** Picks what a slot does next. False when the sectors are taken. */
  #choose(slot: Slot): boolean {
    const random = this.#random
    const dice = random.below(64)
    slot.type =
      dice < 2
        ? VIRTIO_BLK_T_FLUSH
        : dice < 4 && this.#options.zeroes
          ? VIRTIO_BLK_T_WRITE_ZEROES
          : dice < 20
            ? VIRTIO_BLK_T_IN
            : VIRTIO_BLK_T_OUT
    if (slot.type === VIRTIO_BLK_T_FLUSH) {
      slot.first = slot.count = 0
      return true
    }
    // 512 bytes to 64 KiB, small ones more often; an eighth of the disk gets half of the requests.
    const limit = 1 << random.below(8)
    slot.count = 1 + random.below(limit)
    const range = random.below(2) === 0 ? this.#model.sectors : this.#model.sectors / 8
    slot.first = random.below(range - slot.count)
    return this.#model.claim(slot.first, slot.count, slot.type !== VIRTIO_BLK_T_IN)
  }

  #launch(slot: Slot): void {
    const { driver } = this.#queues[slot.queue] as LoadQueue
    const { counts } = this
    slot.request = ++counts.issued
    slot.sessions = 0
    slot.status.bytes[0] = STATUS_UNTOUCHED
    const bytes = slot.count * SECTOR
    writeHeader(slot.header.bytes, slot.type, slot.type === VIRTIO_BLK_T_WRITE_ZEROES ? 0 : slot.first)
    const segments: Segment[] = [{ address: slot.header.gpa, length: VIRTIO_BLK_HEADER_SIZE, writable: false }]
    if (slot.type === VIRTIO_BLK_T_OUT) {
      this.#model.fill(slot.words, slot.first, slot.count)
      this.#cut(segments, slot.data.gpa, bytes, false)
    } else if (slot.type === VIRTIO_BLK_T_IN) {
      slot.words.fill(0xdeadbeef, 0, bytes / 4)
      this.#cut(segments, slot.data.gpa, bytes, true)
    } else if (slot.type === VIRTIO_BLK_T_WRITE_ZEROES) {
      const view = new DataView(slot.data.region.buffer, slot.data.offset, 16)
      view.setBigUint64(0, BigInt(slot.first), true)
      view.setUint32(8, slot.count, true)
      view.setUint32(12, this.#random.below(2), true)
      segments.push({ address: slot.data.gpa, length: 16, writable: false })
    }
    segments.push({ address: slot.status.gpa, length: 1, writable: true })
    const table = this.#options.indirect && this.#random.below(2) === 0 ? slot.table : undefined
    slot.chain = driver.build(segments, table)
    if (slot.chain < 0) throw new Error(`queue ${slot.queue} is too small for the depth: no descriptors left`)
    ;(this.#flying[slot.queue] as (Slot | undefined)[])[slot.chain] = slot
    driver.issue(slot.chain)
  }

  #cut(segments: Segment[], gpa: number, bytes: number, writable: boolean): void {
    const most = Math.min(MAX_PIECES, bytes / SECTOR)
    const pieces = this.#random.below(3) === 0 ? 1 + this.#random.below(most) : 1
    let done = 0
    for (const length of this.#random.cuts(bytes / 16, pieces)) {
      segments.push({ address: gpa + done, length: length * 16, writable })
      done += length * 16
    }
  }

  #finish(queue: number, chain: number, length: number): void {
    const slot = this.#flying[queue]?.[chain]
    if (slot === undefined) throw new Error(`queue ${queue}: chain ${chain} came back and was not in flight`)
    const sectors = `${slot.first} + ${slot.count}`
    const what = `request ${slot.request} (queue ${queue}, type ${slot.type}, at ${sectors}, ${slot.sessions} kills)`
    const status = slot.status.bytes[0] ?? STATUS_UNTOUCHED
    if (status === STATUS_UNTOUCHED) throw new Error(`${what} came back before it was done`)
    if (status !== VIRTIO_BLK_S_OK) throw new Error(`${what} ended with status ${status}`)
    const wanted = slot.type === VIRTIO_BLK_T_IN ? slot.count * SECTOR + 1 : 1
    if (length !== wanted) throw new Error(`${what} came back with length ${length} instead of ${wanted}`)
    const { counts } = this
    counts.completed++
    if (slot.type === VIRTIO_BLK_T_OUT || slot.type === VIRTIO_BLK_T_WRITE_ZEROES) {
      const zeroes = slot.type === VIRTIO_BLK_T_WRITE_ZEROES
      this.#model.written(slot.first, slot.count, zeroes)
      if (zeroes) counts.zeroes++
      else counts.writes++
    } else if (slot.type === VIRTIO_BLK_T_FLUSH) counts.flushes++
    else {
      this.#model.check(slot.words, slot.first, slot.count, what)
      this.#model.read(slot.first, slot.count)
      counts.reads++
    }
    ;(this.#flying[queue] as (Slot | undefined)[])[chain] = undefined
    slot.request = 0
    slot.chain = -1
    this.#free[queue]?.push(slot)
  }
}

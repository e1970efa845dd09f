/**
 * One started virtqueue of a session: the ring's memory, its three eventfds, and waiting for completions (by polling,
 * or by sleeping until the back-end calls). It owns the eventfds. It must not know what the chains mean.
 */
import { native, systemError } from '../native.ts'
import type { Connection } from './connection.ts'
import { FrontendError } from './errors.ts'
import type { GuestBuffer, GuestMemory } from './memory.ts'
import { SplitDriver, splitRingBytes } from './split-driver.ts'

/** `poll`: watches the used ring and asks for no calls. `irq`: sleeps until the call eventfd fires, as a guest does. */
export type WaitMode = 'poll' | 'irq'

export interface VirtqueueOptions {
  /** Entries, a power of two; default 256. */
  readonly size?: number
  readonly mode?: WaitMode
  /** Regions for descriptor table, available ring and used ring; default all in region 0. */
  readonly ringRegions?: readonly [number, number, number]
  /** First index of both rings; default 0. */
  readonly base?: number
  /**
   * A call eventfd to share with another ring (as interrupt vectors can be shared); it stays the other's. Default:
   * one of its own.
   */
  readonly callFd?: number
}

const pause = new Int32Array(new SharedArrayBuffer(4))

/** Sleeps this thread. Fractions of a millisecond work. */
export function sleepMs(ms: number): void {
  Atomics.wait(pause, 0, 0, ms)
}

export class Virtqueue {
  readonly index: number
  readonly size: number
  readonly driver: SplitDriver
  mode: WaitMode
  /** Values read from the call eventfd, added up: how often the back-end called. */
  calls = 0
  readonly kickFd: number
  readonly callFd: number
  readonly errFd: number
  readonly #connection: Connection
  readonly #addresses: { descriptor: bigint; available: bigint; used: bigint }
  readonly #ring: readonly [GuestBuffer, GuestBuffer, GuestBuffer]
  readonly #ownsCallFd: boolean
  #closed = false

  constructor(
    connection: Connection,
    memory: GuestMemory,
    index: number,
    eventIdx: boolean,
    options: VirtqueueOptions = {}
  ) {
    this.index = index
    this.size = options.size ?? 256
    this.mode = options.mode ?? 'poll'
    this.#connection = connection
    const bytes = splitRingBytes(this.size)
    const [a, b, c] = options.ringRegions ?? [0, 0, 0]
    // A cache line of its own for each part: driver and device write to different ones.
    const descriptors = memory.allocate(bytes.descriptors, 64, a)
    const available = memory.allocate(bytes.available, 64, b)
    const used = memory.allocate(bytes.used, 64, c)
    for (const part of [descriptors, available, used]) part.bytes.fill(0)
    this.#ring = [descriptors, available, used]
    this.#addresses = {
      descriptor: memory.uva(descriptors.gpa),
      available: memory.uva(available.gpa),
      used: memory.uva(used.gpa),
    }
    const area = (part: GuestBuffer): { buffer: SharedArrayBuffer; offset: number } => ({
      buffer: part.region.buffer,
      offset: part.offset,
    })
    this.kickFd = newEventfd()
    this.callFd = options.callFd ?? newEventfd()
    this.#ownsCallFd = options.callFd === undefined
    this.errFd = newEventfd()
    this.driver = new SplitDriver({
      size: this.size,
      areas: { descriptors: area(descriptors), available: area(available), used: area(used) },
      eventIdx,
      kick: () => void native.eventfdWrite(this.kickFd, 1),
      base: options.base ?? 0,
    })
    if (this.mode === 'poll') this.driver.disableCalls()
  }

  /** Where the parts lie, for tests that place or damage them: descriptor table, available ring, used ring. */
  get ring(): readonly [GuestBuffer, GuestBuffer, GuestBuffer] {
    return this.#ring
  }

  /**
   * Hands the ring to the back-end and enables it: NUM, BASE, ADDR, KICK, CALL, ERR, ENABLE.
   * @param base first index; after a stop, what `stop` returned
   */
  start(base = this.driver.base, enable = true): void {
    const connection = this.#connection
    connection.setVringNum(this.index, this.size)
    connection.setVringBase(this.index, base)
    connection.setVringAddr({ index: this.index, flags: 0, log: 0n, ...this.#addresses })
    connection.setVringErr(this.index, this.errFd)
    connection.setVringCall(this.index, this.callFd)
    connection.setVringKick(this.index, this.kickFd)
    if (enable) connection.setVringEnable(this.index, true)
  }

  /** Stops the ring (GET_VRING_BASE) and returns the next available index that the back-end would have read. */
  stop(): number {
    return this.#connection.getVringBase(this.index)
  }

  /** Whether the back-end reported the ring as broken (the err eventfd). */
  broken(): boolean {
    return native.eventfdRead(this.errFd) > 0
  }

  /** Reads and resets the call eventfd: the number of calls since the last time. */
  takeCalls(): number {
    const count = native.eventfdRead(this.callFd)
    if (count <= 0) return 0
    this.calls += count
    return count
  }

  /** Waits for a call. Returns how many there were, 0 when none came in time. */
  waitForCall(timeoutMs: number): number {
    return native.pollIn(this.callFd, timeoutMs) === 1 ? this.takeCalls() : 0
  }

  /**
   * Waits until the back-end has used at least one chain that `pop` has not returned. False when none came in time.
   * @throws FrontendError closed when the back-end hung up meanwhile
   */
  wait(timeoutMs: number): boolean {
    return this.mode === 'poll' ? this.#waitPolling(timeoutMs) : this.#waitForCall(timeoutMs)
  }

  /** Idempotent. The back-end keeps its own copies of the fds. */
  close(): void {
    if (this.#closed) return
    this.#closed = true
    native.close(this.kickFd)
    if (this.#ownsCallFd) native.close(this.callFd)
    native.close(this.errFd)
  }

  #waitPolling(timeoutMs: number): boolean {
    const { driver } = this
    const last = driver.base
    const start = performance.now()
    for (let spins = 0; ; spins++) {
      if (driver.usedIndex !== last) return true
      if ((spins & 255) !== 255) continue
      const waited = performance.now() - start
      if (waited > timeoutMs) return false
      // A millisecond of spinning, then leave the processor to the back-end.
      if (waited > 1) sleepMs(0.05)
      if (waited > 20 && (spins & 4095) === 4095) this.#checkAlive()
    }
  }

  #waitForCall(timeoutMs: number): boolean {
    const deadline = performance.now() + timeoutMs
    this.takeCalls()
    for (;;) {
      if (this.driver.enableCalls()) {
        this.driver.disableCalls()
        return true
      }
      const left = deadline - performance.now()
      if (left <= 0) return false
      if (native.pollIn(this.callFd, Math.min(100, Math.ceil(left))) !== 1) this.#checkAlive()
      this.takeCalls()
    }
  }

  #checkAlive(): void {
    if (this.#connection.channel.hungUp()) {
      throw new FrontendError(`virtqueue ${this.index}`, 'closed', 'the back-end closed the connection')
    }
  }
}

function newEventfd(): number {
  const fd = native.eventfd(0)
  if (fd < 0) throw systemError(fd, 'eventfd', 'a virtqueue')
  return fd
}

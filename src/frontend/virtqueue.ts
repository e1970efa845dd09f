/**
 * One started virtqueue of a session: the ring's memory, its three eventfds, and waiting for completions (by polling,
 * or by sleeping until the back-end calls). It owns the eventfds. It must not know what the chains mean.
 */
import { native, systemError } from '../native.ts'
import { VHOST_VRING_F_LOG } from '../vhost-user/wire.ts'
import type { Connection } from './connection.ts'
import type { RingArea, Translate, VirtqueueDriver } from './driver.ts'
import { FrontendError } from './errors.ts'
import type { GuestBuffer, GuestMemory } from './memory.ts'
import { PACKED_BASE, PackedDriver, packedRingBytes } from './packed-driver.ts'
import { SplitDriver, splitRingBytes } from './split-driver.ts'

/** `poll`: watches the used ring and asks for no calls. `irq`: sleeps until the call eventfd fires, as a guest does. */
export type WaitMode = 'poll' | 'irq'

export interface VirtqueueOptions {
  /** Entries, a power of two (packed: any number); default 256. */
  readonly size?: number
  readonly mode?: WaitMode
  /**
   * Regions for descriptor table, available ring and used ring (packed: descriptor ring, driver's and device's event
   * suppression); default all in region 0.
   */
  readonly ringRegions?: readonly [number, number, number]
  /** Where the ring starts, as SET_VRING_BASE says it; default 0, packed {@link PACKED_BASE}. */
  readonly base?: number
  /**
   * A call eventfd to share with another ring (as interrupt vectors can be shared); it stays the other's. Default:
   * one of its own.
   */
  readonly callFd?: number
  /** RING_PACKED, IN_ORDER were negotiated; default false. */
  readonly packed?: boolean
  readonly inOrder?: boolean
  /** Kicks are messages, and so are calls and errors (INBAND_NOTIFICATIONS); default false. */
  readonly inband?: boolean
  /** Behind a vIOMMU: the address that the device is told for a guest-physical one. */
  readonly translate?: Translate
}

const pause = new Int32Array(new SharedArrayBuffer(4))

/** Sleeps this thread. Fractions of a millisecond work. */
export function sleepMs(ms: number): void {
  Atomics.wait(pause, 0, 0, ms)
}

export class Virtqueue {
  readonly index: number
  readonly size: number
  readonly driver: VirtqueueDriver
  readonly inband: boolean
  mode: WaitMode
  /** How often the back-end called: values read from the call eventfd, added up, and VRING_CALL messages. */
  calls = 0
  readonly kickFd: number
  readonly callFd: number
  readonly errFd: number
  #connection: Connection
  readonly #translate: Translate | undefined
  readonly #memory: GuestMemory
  readonly #ring: readonly [GuestBuffer, GuestBuffer, GuestBuffer]
  readonly #ownsCallFd: boolean
  #closed = false
  /** What SET_VRING_BASE said last. */
  #startBase: number
  #enabled = false
  #logged = false
  #inbandCalls = 0
  #inbandBroken = false

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
    this.inband = options.inband === true
    this.#connection = connection
    this.#translate = options.translate
    this.#memory = memory
    const packed = options.packed === true
    const bytes = packed ? Object.values(packedRingBytes(this.size)) : Object.values(splitRingBytes(this.size))
    // A cache line of its own for each part: driver and device write to different ones.
    this.#ring = (options.ringRegions ?? [0, 0, 0]).map((region, i) =>
      memory.allocate(bytes[i] as number, 64, region)
    ) as [GuestBuffer, GuestBuffer, GuestBuffer]
    for (const part of this.#ring) part.bytes.fill(0)
    this.kickFd = newEventfd()
    this.callFd = options.callFd ?? newEventfd()
    this.#ownsCallFd = options.callFd === undefined
    this.errFd = newEventfd()
    const [one, two, three] = this.#ring.map((part) => ({ buffer: part.region.buffer, offset: part.offset })) as [
      RingArea,
      RingArea,
      RingArea,
    ]
    const shared = {
      size: this.size,
      eventIdx,
      inOrder: options.inOrder === true,
      kick: () => this.#kick(),
      ...(options.base !== undefined && { base: options.base }),
      ...(options.translate !== undefined && { translate: options.translate }),
    }
    this.driver = packed
      ? new PackedDriver({ ...shared, areas: { descriptors: one, driverEvent: two, deviceEvent: three } })
      : new SplitDriver({ ...shared, areas: { descriptors: one, available: two, used: three } })
    this.#startBase = options.base ?? (packed ? PACKED_BASE : 0)
    if (this.mode === 'poll') this.driver.disableCalls()
  }

  /**
   * Where the parts lie, for tests that place or damage them: descriptor table, available ring, used ring; packed:
   * descriptor ring, driver's and device's event suppression.
   */
  get ring(): readonly [GuestBuffer, GuestBuffer, GuestBuffer] {
    return this.#ring
  }

  /** The driver with what only a split ring has. @throws RangeError when the ring is packed */
  get split(): SplitDriver {
    if (this.driver instanceof SplitDriver) return this.driver
    throw new RangeError(`virtqueue ${this.index} is packed`)
  }

  /** The driver with what only a packed ring has. @throws RangeError when the ring is split */
  get packed(): PackedDriver {
    if (this.driver instanceof PackedDriver) return this.driver
    throw new RangeError(`virtqueue ${this.index} is not packed`)
  }

  /**
   * Hands the ring to the back-end and enables it: NUM, BASE, ADDR, KICK, CALL, ERR, ENABLE.
   * @param base where it goes on; after a stop, what `stop` returned
   */
  start(base = this.driver.base, enable = true): void {
    const connection = this.#connection
    this.#startBase = base
    connection.setVringNum(this.index, this.size)
    connection.setVringBase(this.index, base)
    this.#setAddress()
    if (!this.inband) {
      connection.setVringErr(this.index, this.errFd)
      connection.setVringCall(this.index, this.callFd)
      connection.setVringKick(this.index, this.kickFd)
    } else connection.vringKick(this.index)
    if (enable) this.enable(true)
  }

  enable(enabled: boolean): void {
    this.#connection.setVringEnable(this.index, enabled)
    this.#enabled = enabled
  }

  /**
   * Stops the ring (GET_VRING_BASE) and returns the next available index that the back-end would have read; packed:
   * both indices and wrap counters.
   * @param keep what is in flight is to stay so, marked in the in-flight area (GET_VRING_BASE_INFLIGHT)
   */
  stop(keep = false): number {
    return this.#connection.getVringBase(this.index, keep)
  }

  /**
   * Hands the ring to a back-end that knows nothing of it and is to go by the in-flight area, as QEMU does when one
   * comes back: split rings go on from the used index that is in memory, packed ones get the base of their last start.
   * Kicks once, for the kicks that the one before it took with it are lost.
   */
  resume(connection: Connection): void {
    this.#connection = connection
    this.start(this.driver instanceof SplitDriver ? this.driver.usedIndex : this.#startBase, this.#enabled)
    this.driver.kickRaw()
  }

  /** Turns logging of the ring's own pages on or off, by SET_VRING_ADDR to the running ring. */
  setLogged(on: boolean): void {
    this.#logged = on
    this.#setAddress()
  }

  /** Whether the ring was enabled last. */
  get enabled(): boolean {
    return this.#enabled
  }

  /** The back-end called or reported an error by a message. */
  noteInband(what: 'call' | 'err'): void {
    if (what === 'call') this.#inbandCalls++
    else this.#inbandBroken = true
  }

  /** Whether the back-end reported the ring as broken (the err eventfd, or VRING_ERR). */
  broken(): boolean {
    if (this.inband) this.#connection.pump()
    return native.eventfdRead(this.errFd) > 0 || this.#inbandBroken
  }

  /** Reads and resets the call eventfd: the number of calls since the last time. */
  takeCalls(): number {
    if (this.inband) this.#connection.pump()
    const count = Math.max(0, native.eventfdRead(this.callFd)) + this.#inbandCalls
    this.#inbandCalls = 0
    this.calls += count
    return count
  }

  /** Waits for a call. Returns how many there were, 0 when none came in time. */
  waitForCall(timeoutMs: number): number {
    const connection = this.#connection
    if (!connection.pumping) return native.pollIn(this.callFd, timeoutMs) === 1 ? this.takeCalls() : 0
    const deadline = performance.now() + timeoutMs
    for (;;) {
      const count = this.takeCalls()
      const left = deadline - performance.now()
      if (count > 0 || left <= 0) return count
      // Two things to sleep on and one at a time: what the back-end asks for is looked at every millisecond.
      if (this.inband) connection.pump(Math.min(100, left))
      else if (native.pollIn(this.callFd, 1) !== 1) connection.pump()
    }
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
    const connection = this.#connection
    const start = performance.now()
    for (let spins = 0; ; spins++) {
      if (driver.hasUsed()) return true
      if ((spins & 255) !== 255) continue
      if (connection.pumping) connection.pump()
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
      if (this.waitForCall(Math.min(100, Math.ceil(left))) === 0) this.#checkAlive()
    }
  }

  #kick(): void {
    if (this.inband) this.#connection.vringKick(this.index)
    else native.eventfdWrite(this.kickFd, 1)
  }

  #setAddress(): void {
    const [descriptor, available, used] = this.#ring.map((part) =>
      this.#translate === undefined ? this.#memory.uva(part.gpa) : BigInt(this.#translate(part.gpa))
    ) as [bigint, bigint, bigint]
    // The log goes by guest-physical addresses; of packed rings QEMU gives that of the device's event structure, too.
    const log = this.#logged ? BigInt(this.#ring[2].gpa) : 0n
    const flags = this.#logged ? 1 << VHOST_VRING_F_LOG : 0
    this.#connection.setVringAddr({ index: this.index, flags, descriptor, available, used, log })
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

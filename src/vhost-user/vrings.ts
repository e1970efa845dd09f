/**
 * The rings of a session: what the front-end says about them, and when they are started, stopped and moved
 * (vhost-user.rst "Ring states"): started or stopped, and independently enabled or disabled.
 *
 * It owns the rings' fds. It must not know iothreads: rings are served by a {@link RingHost}.
 */
import { readlinkSync } from 'node:fs'
import { native } from '../native.ts'
import { VHOST_USER_F_PROTOCOL_FEATURES } from '../virtio/constants.ts'
import { RingError } from '../virtio/errors.ts'
import type { VringConfig } from '../virtio/vring.ts'
import type { DirtyLogArea } from './dirty-log-area.ts'
import { ProtocolError } from './errors.ts'
import type { InflightBuffer } from './inflight-buffer.ts'
import { ADDRESS_LIMIT } from './mapping.ts'
import type { MemoryExchange, MovableRings } from './memory-exchange.ts'
import { LOGGING, type Negotiated } from './negotiated.ts'
import type { RingHost } from './ring-host.ts'
import { checkBase, checkSize, firstBase, NO_FD, RingState } from './ring-state.ts'
import { whenSettled } from './when-settled.ts'
import {
  VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS,
  VHOST_USER_VRING_IDX_MASK,
  VHOST_USER_VRING_NOFD_MASK,
  VHOST_VRING_F_LOG,
  type VringAddress,
} from './wire.ts'

const LOG_FLAG = 1 << VHOST_VRING_F_LOG

/** What rings need of the session. */
export interface RingNeeds {
  readonly host: RingHost
  readonly negotiated: Negotiated
  readonly exchange: MemoryExchange
  readonly log: DirtyLogArea
  readonly inflight: InflightBuffer | undefined
}

export class Vrings implements MovableRings {
  readonly all: readonly RingState[]
  readonly #session: RingNeeds
  readonly #host: RingHost

  constructor(session: RingNeeds) {
    this.#session = session
    this.#host = session.host
    this.all = Array.from({ length: session.host.numQueues }, (_, index) => new RingState(index))
  }

  /** The ring of a queue index from the wire. @throws ProtocolError */
  at(index: number): RingState {
    const ring = this.all[index]
    if (ring !== undefined) return ring
    const hint = this.#host.network === undefined ? '' : '; the front-end wants more queue pairs than --queue-pairs'
    throw new ProtocolError('ERR_PROTOCOL_VRING', `queue ${index} of ${this.all.length}${hint}`)
  }

  /** Not suspended (vhost-user.rst "Suspended device state"). */
  get anyStarted(): boolean {
    return this.all.some((ring) => ring.started)
  }

  // ---- what SET_VRING_* say

  async setSize(index: number, size: number): Promise<void> {
    const ring = this.#stopped(index, 'its size')
    const { maxQueueSize } = this.#host
    if (size === 0 || size > maxQueueSize) {
      throw new ProtocolError('ERR_PROTOCOL_VRING', `a ring of ${size} entries, 1 to ${maxQueueSize} are possible`)
    }
    // Which format it is may come later; it is checked again at the start.
    if (this.#negotiated.features !== undefined) checkSize(size, this.#negotiated.packed)
    ring.size = size
    await this.#startIfReady(ring)
  }

  setBase(index: number, base: number): void {
    const ring = this.#stopped(index, 'its base')
    const { features, packed } = this.#negotiated
    if (features !== undefined && (!packed || ring.size > 0)) checkBase(base, ring.size, packed, true)
    ring.base = base
  }

  async setAddress(address: VringAddress): Promise<void> {
    const ring = this.at(address.index)
    if ((address.flags & ~LOG_FLAG) !== 0) {
      throw new ProtocolError('ERR_PROTOCOL_VRING', `flags 0x${address.flags.toString(16)}`)
    }
    if ((address.flags & LOG_FLAG) !== 0 && address.log > ADDRESS_LIMIT)
      throw new ProtocolError('ERR_PROTOCOL_VRING', 'a log address beyond 2^53')
    const before = ring.address
    ring.address = address
    let config: VringConfig | undefined
    try {
      if (ring.size > 0 && this.#negotiated.features !== undefined) {
        config = this.#configure(ring)
        this.#checkLog(ring, config)
      }
    } catch (error) {
      ring.address = before
      throw error
    }
    if (!ring.started) await this.#startIfReady(ring)
    // A ring that runs elsewhere now is drained first; QEMU sends the address again to switch logging, which needs no
    // stop.
    else if (config !== undefined && !ring.isAt(config)) await this.#restart(ring)
    else await this.#relocateLog(ring)
  }

  /** SET_VRING_KICK starts the ring. Takes the fds. */
  async setKick(payload: bigint, fds: number[]): Promise<void> {
    const { ring, fd } = this.#vringFd(payload, fds)
    const old = ring.kickFd
    ring.kickFd = fd
    ring.kickPolled = fd < 0
    ring.kicked = true
    try {
      if (!ring.started) await this.#startIfReady(ring)
      else if (ring.inband !== this.#inband(ring)) await this.#restart(ring)
      else await this.#host.setKick(ring.index, fd)
    } finally {
      closeFd(old)
    }
  }

  async setCall(payload: bigint, fds: number[]): Promise<void> {
    const { ring, fd } = this.#vringFd(payload, fds)
    const old = ring.callFd
    ring.callFd = fd
    ring.callPolled = fd < 0
    try {
      if (ring.started && ring.inband !== this.#inband(ring)) await this.#restart(ring)
      else if (ring.started) await this.#host.setCall(ring.index, fd)
    } finally {
      closeFd(old)
    }
  }

  setErr(payload: bigint, fds: number[]): void {
    const { ring, fd } = this.#vringFd(payload, fds)
    closeFd(ring.errFd)
    ring.errFd = fd
    ring.errIgnored = fd < 0
  }

  async setEnable(index: number, enable: number): Promise<void> {
    const ring = this.at(index)
    if (enable > 1) throw new ProtocolError('ERR_PROTOCOL_VRING', `enable ${enable}`)
    ring.enabled = enable === 1
    if (ring.started) await this.#host.enableRing(index, this.#effectivelyEnabled(ring))
  }

  /** VRING_KICK starts a stopped ring, as SET_VRING_KICK does. */
  async kick(index: number, num: number): Promise<void> {
    const ring = this.at(index)
    if (num !== 0) throw new ProtocolError('ERR_PROTOCOL_VRING', `num ${num}`)
    if (ring.started) return this.#host.kick(index)
    ring.kicked = true
    await this.#startIfReady(ring)
  }

  /**
   * GET_VRING_BASE stops the ring once all that is in flight is done. @param keep leave it in the in-flight buffer
   * instead, if the ring has one
   */
  async getBase(index: number, keep: boolean): Promise<number> {
    const ring = this.at(index)
    const { inflight } = this.#session
    const kept = keep && inflight !== undefined
    const { packed } = this.#negotiated
    if (ring.started) {
      await this.#stop(ring, kept)
      // Forgotten at the next start and not here: the front-end of a back-end that dies before its answer has no other
      // base.
      ring.drained = !kept
    }
    ring.kicked = false
    closeFd(ring.kickFd)
    ring.kickFd = NO_FD
    ring.kickPolled = false
    return ring.base ?? firstBase(packed)
  }

  // ---- what changes for all of them

  /** Starts what waited for features, memory or an in-flight buffer. */
  async startReady(): Promise<void> {
    for (const ring of this.all) await this.#startIfReady(ring)
  }

  async moved(): Promise<void> {
    for (const ring of this.all) {
      if (!ring.started) continue
      const config = this.#configureIfPossible(ring)
      if (config !== undefined && !ring.isAt(config)) await this.#restart(ring)
      else await this.#relocateLog(ring)
    }
  }

  async relocateLogs(): Promise<void> {
    for (const ring of this.all) if (ring.started) await this.#relocateLog(ring)
  }

  /** Another log was given. @throws ProtocolError when it doesn't reach to the end of a ring that is logged */
  checkLogs(): void {
    for (const ring of this.all) if (ring.started) this.#checkLog(ring, ring.config!)
  }

  /** RESET_DEVICE: stopped, disabled, forgotten. */
  async reset(): Promise<void> {
    for (const ring of this.all) {
      if (ring.started) {
        await this.#stop(ring, false)
        ring.drained = true
      }
      this.#forgetIfDrained(ring, true)
      this.#closeFds(ring)
      ring.reset()
    }
  }

  /** @throws when one can't be stopped, since who served it has died; then none of the others runs any more either */
  async stopAll(): Promise<void> {
    await whenSettled(this.all.map((ring) => this.#stop(ring, false)))
  }

  closeFds(): void {
    for (const ring of this.all) this.#closeFds(ring)
  }

  /** Stops all rings, and remembers which. */
  async suspend(): Promise<void> {
    for (const ring of this.all) {
      if (!ring.started) continue
      await this.#stop(ring, false)
      ring.suspended = true
    }
  }

  /** Starts those that were stopped by `suspend`. */
  async resume(): Promise<void> {
    for (const ring of this.all) {
      if (!ring.suspended) continue
      ring.suspended = false
      await this.#startIfReady(ring, true)
    }
  }

  /** Before another in-flight buffer, or the same again, takes the place of the present one. */
  forgetDrained(): void {
    for (const ring of this.all) this.#forgetIfDrained(ring)
  }

  // ---- internals

  #forgetIfDrained(ring: RingState, reset = false): void {
    if (ring.drained) this.#session.inflight?.forget(ring.index, ring.config?.packed ?? this.#negotiated.packed, reset)
    ring.drained = false
  }

  get #negotiated(): Negotiated {
    return this.#session.negotiated
  }

  #effectivelyEnabled(ring: RingState): boolean {
    // Without VHOST_USER_F_PROTOCOL_FEATURES a ring is enabled from the start (vhost-user.rst "Ring states").
    return ring.enabled || !this.#negotiated.has(VHOST_USER_F_PROTOCOL_FEATURES)
  }

  /**
   * Whether messages take the place of a kick fd and of a call fd that were not given. A front-end that asks for
   * polling in place of kicks gets it, unless its calls go by messages: one that polls neither way needs both.
   */
  #inband(ring: RingState): boolean {
    if (!this.#negotiated.hasProtocol(VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS)) return false
    return !ring.kickPolled || (ring.callFd < 0 && !ring.callPolled)
  }

  #stopped(index: number, what: string): RingState {
    const ring = this.at(index)
    if (ring.started) throw new ProtocolError('ERR_PROTOCOL_VRING', `queue ${index} is started, ${what} cannot change`)
    return ring
  }

  /** The ring and the fd of SET_VRING_KICK, CALL or ERR; -1 when bit 8 says that there is none. Takes the fd. */
  #vringFd(payload: bigint, fds: number[]): { ring: RingState; fd: number } {
    try {
      if (payload > BigInt(VHOST_USER_VRING_IDX_MASK | VHOST_USER_VRING_NOFD_MASK)) {
        throw new ProtocolError('ERR_PROTOCOL_VRING', `payload 0x${payload.toString(16)}`)
      }
      const ring = this.at(Number(payload) & VHOST_USER_VRING_IDX_MASK)
      const none = (Number(payload) & VHOST_USER_VRING_NOFD_MASK) !== 0
      if (fds.length !== (none ? 0 : 1)) throw new ProtocolError('ERR_PROTOCOL_FDS', `${fds.length} file descriptors`)
      const fd = fds[0] ?? NO_FD
      if (fd >= 0) checkEventfd(fd)
      return { ring, fd }
    } catch (error) {
      for (const fd of fds) native.close(fd)
      throw error
    }
  }

  #configure(ring: RingState): VringConfig {
    const { exchange, negotiated, inflight } = this.#session
    return ring.configure(exchange.table, negotiated, inflight !== undefined)
  }

  /** Undefined when the ring's memory is gone: it breaks on its iothread, and the front-end is told there. */
  #configureIfPossible(ring: RingState): VringConfig | undefined {
    try {
      return this.#configure(ring)
    } catch (error) {
      if (error instanceof ProtocolError) return undefined
      throw error
    }
  }

  /** @param resumed as RingStart has it */
  async #startIfReady(ring: RingState, resumed = false): Promise<void> {
    const { negotiated, inflight } = this.#session
    const { features, packed } = negotiated
    if (ring.started || !ring.kicked || ring.address === undefined || ring.size === 0 || features === undefined) return
    const vring = this.#configure(ring)
    this.#checkLog(ring, vring)
    this.#forgetIfDrained(ring)
    const region = inflight?.region(ring.index, ring.size, packed)
    ring.config = vring
    ring.inband = this.#inband(ring)
    ring.logAddress = this.#logAddress(ring, vring)
    // Before it is so: its iothread may say something about it before it says that it runs.
    ring.started = true
    try {
      await this.#host.startRing(ring.index, {
        vring,
        features: features & ~LOGGING,
        kickFd: ring.kickFd,
        callFd: ring.callFd,
        enabled: this.#effectivelyEnabled(ring),
        inband: ring.inband,
        ...(region === undefined ? {} : { inflight: region }),
        logAddress: ring.logAddress,
        ...(resumed ? { resumed } : {}),
      })
    } catch (error) {
      ring.started = false
      if (!(error instanceof RingError)) throw error
      const code = error.code === 'ERR_RING_INFLIGHT' ? 'ERR_PROTOCOL_INFLIGHT' : 'ERR_PROTOCOL_VRING'
      throw new ProtocolError(code, `queue ${ring.index} cannot start: ${error.message}`, { cause: error })
    }
  }

  async #stop(ring: RingState, keep: boolean): Promise<void> {
    if (!ring.started) return
    ring.base = await this.#host.stopRing(ring.index, keep)
    ring.started = false
  }

  async #restart(ring: RingState): Promise<void> {
    await this.#stop(ring, false)
    await this.#startIfReady(ring)
  }

  // ---- the log of a ring's own memory

  /**
   * Where writes to the ring are marked. For a split ring that is what SET_VRING_ADDR says, which need not be inside of
   * the memory. For a packed ring QEMU says there the address of the device area, while what the device writes is the
   * descriptor ring; and behind a vIOMMU an IOVA. Both are looked up: before they are there, the ring writes nothing.
   */
  #logAddress(ring: RingState, config: VringConfig): number {
    const address = ring.address!
    if ((address.flags & LOG_FLAG) === 0) return -1
    const { exchange, negotiated } = this.#session
    const { start, bytes } = ring.loggedPart(config)
    if (negotiated.translated) return exchange.translations.physical(start, bytes, exchange.table) ?? -1
    return config.packed ? start : Number(address.log)
  }

  async #relocateLog(ring: RingState): Promise<void> {
    const address = this.#logAddress(ring, ring.config!)
    if (address === ring.logAddress) return
    ring.logAddress = address
    await this.#host.setRingLog(ring.index, address)
  }

  #checkLog(ring: RingState, config: VringConfig): void {
    const { end } = this.#session.log
    const address = this.#logAddress(ring, config)
    const { bytes } = ring.loggedPart(config)
    // QEMU starts rings with their log address before it gives the log: SET_LOG_BASE checks them then.
    if (end !== undefined && address >= 0 && address + bytes > end) {
      const message = `queue ${ring.index} is logged at ${address} to ${address + bytes}, the log ends at ${end}`
      throw new ProtocolError('ERR_PROTOCOL_LOG', message)
    }
  }

  #closeFds(ring: RingState): void {
    closeFd(ring.kickFd)
    closeFd(ring.callFd)
    closeFd(ring.errFd)
    ring.kickFd = NO_FD
    ring.callFd = NO_FD
    ring.errFd = NO_FD
  }
}

/**
 * Non-blocking, so that a counter which the front-end filled up cannot hold a write to it; anything but an eventfd is
 * refused. @throws ProtocolError
 */
export function checkEventfd(fd: number): void {
  if (readlinkSync(`/proc/self/fd/${fd}`) !== 'anon_inode:[eventfd]' || native.setNonblock(fd, true) < 0)
    throw new ProtocolError('ERR_PROTOCOL_FDS', 'the fd is no eventfd')
}

function closeFd(fd: number): void {
  if (fd >= 0) native.close(fd)
}

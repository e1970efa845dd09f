/**
 * One front-end on one connection: the vhost-user state machine. requests.ts has one row per request, which says what
 * it may carry and what it does; what it does happens here and in the parts: rings, memory, log, in-flight buffer,
 * state transfer, back-end channel.
 *
 * It owns the fds and the memory of the front-end. It must not know iothreads: rings are served by a {@link RingHost}.
 */
import { native } from '../native.ts'
import { VIRTIO_F_ACCESS_PLATFORM } from '../virtio/constants.ts'
import { featureSet, hasFeature } from '../virtio/features.ts'
import { BackendChannel } from './backend-channel.ts'
import type { Connection, Message } from './connection.ts'
import { DirtyLogArea } from './dirty-log-area.ts'
import { dispatch } from './dispatch.ts'
import { ProtocolError } from './errors.ts'
import { createInflight, InflightBuffer } from './inflight-buffer.ts'
import { MemoryExchange } from './memory-exchange.ts'
import type { MemoryTable } from './memory-table.ts'
import { LOGGING, Negotiated } from './negotiated.ts'
import { NETWORK_PROTOCOL_FEATURES, PROTOCOL_FEATURES } from './protocol-table.ts'
import { Rehosting } from './rehosting.ts'
import type { RingHost } from './ring-host.ts'
import { NO_FD } from './ring-state.ts'
import { restoreSession, type SavedSession, saveSession } from './saved-session.ts'
import { StateTransfer } from './state-transfer.ts'
import { Suspension } from './suspension.ts'
import { checkEventfd, Vrings } from './vrings.ts'
import * as wire from './wire.ts'

export { NETWORK_PROTOCOL_FEATURES, PROTOCOL_FEATURES } from './protocol-table.ts'
export type { RingHost, RingStart } from './ring-host.ts'

/** How often a session that waits for somebody else looks whether its front-end is still there. In milliseconds. */
const HANG_UP_MS = 200

export class Session {
  readonly connection: Connection
  readonly host: RingHost
  readonly negotiated = new Negotiated()
  readonly exchange: MemoryExchange
  readonly log: DirtyLogArea
  readonly rings: Vrings
  readonly channel = new BackendChannel((error) => this.onRefused?.(error))
  readonly transfer = new StateTransfer()
  inflight: InflightBuffer | undefined
  /** Told of every NACK. */
  onRefused: ((error: ProtocolError) => void) | undefined
  /** A change of the config space, to be told when the device is not suspended any more. */
  configPending = false
  #saidMiss = false
  #running = false
  readonly #suspension = new Suspension()
  /** What ended it, when that was no message. */
  #failure: { readonly error: unknown } | undefined

  constructor(connection: Connection, host: RingHost) {
    this.connection = connection
    this.host = host
    this.log = new DirtyLogArea(host)
    // The two know each other: rings are in memory, and move with it.
    this.exchange = new MemoryExchange(host, {
      moved: () => this.rings.moved(),
      relocateLogs: () => this.rings.relocateLogs(),
    })
    this.rings = new Vrings(this)
  }

  /**
   * Goes on with a session that `suspend` stopped in another process; `run` or `abandon` comes next.
   * @param fds as `suspend` had them, the connection's among them: it takes them over, also when it throws
   * @throws SavedSessionError when the state is not one of a session of this device, or what `host` throws
   */
  static restore(host: RingHost, state: unknown, fds: readonly number[]): Promise<Session> {
    return restoreSession(state, fds, (connection) => new Session(connection, host))
  }

  /**
   * Serves the front-end until it leaves, or until `abandon`. All rings are stopped and all its memory and fds released
   * when it returns or throws.
   * @throws ProtocolError when the front-end broke the protocol, a system error, or what keeps rings from going on after `rehost`
   */
  async run(): Promise<void> {
    this.#running = true
    // Who ends the session from here doesn't wait for the other end of a pipe.
    void this.connection.aborted.then(() => this.transfer.abort())
    this.#tellConfig()
    try {
      for (;;) {
        using message = await this.#next()
        if (message === undefined) {
          if (this.#failure !== undefined) throw this.#failure.error
          return
        }
        await dispatch(this, message)
        this.#tellConfig()
      }
    } finally {
      this.#suspension.end()
      if (this.#suspension.abandoned) this.#release()
      else await this.#end()
    }
  }

  // ---- what others say about it

  /**
   * The config space changed: tells the driver, if its front-end can hear it, now or (vhost-user.rst "Suspended device
   * state") when a ring is started again. Returns whether it can.
   */
  configChanged(): boolean {
    if (!this.channel.open || !this.negotiated.hasProtocol(wire.VHOST_USER_PROTOCOL_F_CONFIG)) return false
    this.configPending = true
    this.#tellConfig()
    return true
  }

  /** A ring broke on its iothread: its err eventfd tells the front-end (vhost-user.rst "SET_VRING_ERR"). */
  ringBroke(index: number): void {
    const ring = this.rings.all[index]
    if (ring === undefined) return
    if (ring.errFd >= 0) native.eventfdWrite(ring.errFd, 1)
    else if (!ring.errIgnored && ring.started && this.#inband) this.channel.error(index, this.#replyAck)
    if (this.negotiated.fail()) this.configChanged()
  }

  /** A ring without a call fd has something for its driver. */
  ringCalls(index: number): void {
    const ring = this.rings.all[index]
    if (ring?.started === true && !ring.callPolled && this.#inband) this.channel.call(index, this.#replyAck)
  }

  /**
   * A ring needs a translation. Nobody waits for it: the ring took nothing that it could not translate, so a request
   * that waits for what is in flight (GET_VRING_BASE, SET_MEM_TABLE) doesn't wait for the answer, which comes behind it.
   * @param access IOTLB_READ, IOTLB_WRITE or both
   */
  iotlbMiss(index: number, address: number, access: number): void {
    if (this.rings.all[index]?.started !== true) return
    if (!this.channel.open && !this.#saidMiss) {
      this.#saidMiss = true
      const message = `queue ${index} needs a translation, and there is no SET_BACKEND_REQ_FD to ask for it`
      this.onRefused?.(new ProtocolError('ERR_PROTOCOL_IOTLB', message))
    }
    this.channel.miss(index, address, access)
  }

  get memory(): MemoryTable {
    return this.exchange.table
  }

  /** Whether the front-end truncated memory that we have mapped. */
  get memoryFaulted(): boolean {
    return this.exchange.faulted || this.log.faulted || this.inflight?.area.faulted === true
  }

  // ---- handover

  /**
   * Stops between two messages, with all rings drained and stopped, and says all that another process needs to go on.
   * The fds stay this session's; `resume` or `abandon` comes next. Undefined: it ended before, or `resume` came first.
   * @throws an Error while the state of the device is being transferred
   */
  async suspend(): Promise<SavedSession | undefined> {
    if (this.transfer.running) throw new Error('the state of the device is being transferred')
    return await this.#suspension.run(this.connection, async () => {
      this.channel.hold()
      await this.rings.suspend()
      // What ended it may be a chain that its device gave up: nobody could complete that.
      return this.connection.isAborted ? undefined : saveSession(this)
    })
  }

  /** The handover failed: goes on as if there had been no `suspend`, also while that is still under way. */
  async resume(): Promise<void> {
    await this.#suspension.resume(this.connection, () => this.#goOn())
  }

  /**
   * Another process goes on with the session: lets go of everything, without a word to the front-end or the device.
   * `run` returns.
   */
  abandon(): void {
    this.#suspension.abandon()
    if (this.#running) this.connection.interrupt()
    else this.#release()
  }

  // ---- other threads, or another device, behind the same host

  /**
   * Has the rings served by others, while the front-end stays connected and sees nothing but a pause: stops between two
   * messages with all rings drained. After `swap`, which puts the others in place behind the {@link RingHost}, they are
   * told what the front-end has said so far, and the rings go on; when they can't, `run` throws why. Resolves to false
   * when the session ends before that: `swap` was not called, and `run` is still to return.
   * @param limitMs how long what is in flight may take
   * @throws StillInFlight when it takes longer, or an Error while the state of the device is being transferred: all goes
   * on as before, and `swap` was not called; what `swap` throws, which has left the old ones in place then
   */
  async rehost(swap: () => Promise<void>, limitMs: number): Promise<boolean> {
    if (this.transfer.running) throw new Error('the state of the device is being transferred')
    const rehosting = new Rehosting(this, this.#suspension)
    try {
      await rehosting.run(swap, limitMs)
      return rehosting.moved
    } finally {
      try {
        await rehosting.end(() => this.#goOn())
      } catch (error) {
        this.#failure = { error }
        this.connection.abort()
      }
    }
  }

  // ---- features

  get offeredProtocolFeatures(): bigint {
    return featureSet(...PROTOCOL_FEATURES, ...(this.host.network === undefined ? [] : NETWORK_PROTOCOL_FEATURES))
  }

  setProtocolFeatures(features: bigint): void {
    const extra = features & ~this.offeredProtocolFeatures
    if (extra !== 0n) throw new ProtocolError('ERR_PROTOCOL_FEATURES', `bits 0x${extra.toString(16)} were not offered`)
    const has = (bit: number): boolean => hasFeature(features, bit)
    if (
      has(wire.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS) &&
      !(has(wire.VHOST_USER_PROTOCOL_F_BACKEND_REQ) && has(wire.VHOST_USER_PROTOCOL_F_REPLY_ACK))
    ) {
      // vhost-user.rst "In-band notifications": to be answered by closing the connection, whatever NEED_REPLY says.
      throw new ProtocolError('ERR_PROTOCOL_FEATURES', 'INBAND_NOTIFICATIONS without BACKEND_REQ and REPLY_ACK', {
        closes: true,
      })
    }
    this.negotiated.protocolFeatures = features
  }

  async setFeatures(features: bigint): Promise<void> {
    const { negotiated } = this
    const before = negotiated.features
    if (this.rings.anyStarted && ((before ?? 0n) ^ features) & ~LOGGING) {
      throw new ProtocolError('ERR_PROTOCOL_FEATURES', 'features changed while rings are started')
    }
    negotiated.refused = true
    const extra = features & ~this.host.features
    if (extra !== 0n) throw new ProtocolError('ERR_PROTOCOL_FEATURES', `bits 0x${extra.toString(16)} were not offered`)
    const translated = hasFeature(features, VIRTIO_F_ACCESS_PLATFORM)
    // The channel itself may come later: misses wait for it.
    if (translated && !negotiated.hasProtocol(wire.VHOST_USER_PROTOCOL_F_BACKEND_REQ)) {
      throw new ProtocolError('ERR_PROTOCOL_FEATURES', 'ACCESS_PLATFORM without BACKEND_REQ to ask for translations')
    }
    negotiated.refused = false
    negotiated.features = features
    // QEMU says the same again, or switches the log, while rings run: nothing that the device has to hear.
    if (!this.rings.anyStarted) this.host.negotiated(features & ~LOGGING)
    await this.exchange.setTranslated(translated)
    await this.log.enable((features & LOGGING) !== 0n)
    await this.rings.startReady()
  }

  setStatus(status: bigint): void {
    if (status > 0xffn) throw new ProtocolError('ERR_PROTOCOL_STATUS', `status 0x${status.toString(16)}`)
    this.negotiated.status = Number(status)
  }

  /**
   * RESET_DEVICE: all rings stopped and disabled, the device as after open; log, in-flight buffer and translations are
   * gone. Memory, protocol features and the channel stay.
   */
  async resetDevice(): Promise<void> {
    this.transfer.abort()
    await this.rings.reset()
    this.channel.forget()
    this.configPending = false
    this.negotiated.reset()
    await this.log.reset()
    await this.exchange.setTranslated(false)
    this.#releaseInflight()
    this.host.reset()
  }

  // ---- rings

  /** @param num with GET_VRING_BASE_INFLIGHT what to do with what is in flight; before that bit, anything */
  async getVringBase(index: number, num: number): Promise<number> {
    const may = this.negotiated.hasProtocol(wire.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT)
    // First 1 was to ask for it; as merged `num` is 0 and the back-end may choose; the newest has a message of its own.
    // So 0 drains, which all of them allow. Without the bit DPDK leaves `num` uninitialised.
    if (may && num > wire.VRING_BASE_KEEP_INFLIGHT) throw new ProtocolError('ERR_PROTOCOL_VRING', `num ${num}`)
    return await this.rings.getBase(index, may && num === wire.VRING_BASE_KEEP_INFLIGHT)
  }

  getInflight(asked: wire.InflightDescription): ReturnType<typeof createInflight> {
    return createInflight(asked, this.negotiated.packed, this.host.numQueues)
  }

  /** SET_INFLIGHT_FD: for rings that start from now on; QEMU sends it before any. @param fd stays the caller's */
  setInflight(description: wire.InflightDescription, fd: number): void {
    if (this.rings.anyStarted) throw new ProtocolError('ERR_PROTOCOL_INFLIGHT', 'rings are started')
    const buffer = new InflightBuffer(description, fd, this.negotiated.packed, this.host.numQueues)
    this.rings.forgetDrained()
    this.#releaseInflight()
    this.inflight = buffer
  }

  /** Takes over `fd`. */
  async setLogFd(fd: number): Promise<void> {
    try {
      checkEventfd(fd)
    } catch (error) {
      native.close(fd)
      throw error
    }
    await this.log.setFd(fd)
  }

  // ---- the device

  /** SET_DEVICE_STATE_FD. Takes over `fd`. */
  transferState(direction: number, phase: number, fd: number): void {
    try {
      if (this.rings.anyStarted) throw new ProtocolError('ERR_PROTOCOL_STATE', 'rings are started')
      if (phase !== wire.VHOST_TRANSFER_STATE_PHASE_STOPPED || direction > wire.VHOST_TRANSFER_STATE_DIRECTION_LOAD)
        throw new ProtocolError('ERR_PROTOCOL_STATE', `direction ${direction}, phase ${phase}`)
    } catch (error) {
      native.close(fd)
      throw error
    }
    if (direction === wire.VHOST_TRANSFER_STATE_DIRECTION_SAVE) this.transfer.save(fd, () => this.host.saveState())
    else this.transfer.load(fd, (state) => this.host.loadState(state))
  }

  /** CHECK_DEVICE_STATE: waits for the transfer. @throws ProtocolError when it failed */
  async checkState(): Promise<void> {
    // Nothing is read meanwhile, and the other end of the pipe may be a third process, which doesn't end with the
    // front-end: the device would be lost to all that come.
    const watch = setInterval(() => {
      if (this.connection.hungUp) this.transfer.abort()
    }, HANG_UP_MS)
    try {
      await this.transfer.check()
    } finally {
      clearInterval(watch)
    }
  }

  getConfig(offset: number, size: number): Uint8Array | undefined {
    if (offset + size > wire.VHOST_USER_MAX_CONFIG_SIZE) return undefined
    // What lies behind the device's own fields reads as zero: front-ends ask for the size of their own struct.
    const space = new Uint8Array(wire.VHOST_USER_MAX_CONFIG_SIZE)
    space.set(this.host.config())
    return space.subarray(offset, offset + size)
  }

  /** @param flags VHOST_SET_CONFIG_TYPE_* */
  async setConfig(offset: number, bytes: Uint8Array, flags: number): Promise<void> {
    const migration = flags === wire.VHOST_SET_CONFIG_TYPE_MIGRATION
    if (!migration && flags !== wire.VHOST_SET_CONFIG_TYPE_FRONTEND)
      throw new ProtocolError('ERR_PROTOCOL_CONFIG', `flags 0x${flags.toString(16)}`)
    const fits = offset + bytes.length <= wire.VHOST_USER_MAX_CONFIG_SIZE
    if (!fits || !(await this.host.writeConfig(offset, bytes, migration))) {
      throw new ProtocolError('ERR_PROTOCOL_CONFIG', `${bytes.length} bytes at ${offset} cannot be written`)
    }
  }

  /** SEND_RARP. @param mac the low six bytes of the payload */
  announce(mac: Uint8Array): void {
    this.host.network?.announce(mac)
  }

  async setMtu(mtu: bigint): Promise<void> {
    if (mtu > 65535n || (await this.host.network?.setMtu(Number(mtu))) !== true) {
      throw new ProtocolError('ERR_PROTOCOL_MTU', `an MTU of ${mtu} bytes cannot be had`)
    }
  }

  // ---- internals

  get #inband(): boolean {
    return this.negotiated.hasProtocol(wire.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS)
  }

  get #replyAck(): boolean {
    return this.negotiated.hasProtocol(wire.VHOST_USER_PROTOCOL_F_REPLY_ACK)
  }

  async #next(): Promise<Message | undefined> {
    for (;;) {
      const message = await this.connection.read()
      if (message !== 'interrupted') return message
      if (await this.#suspension.park(this.connection)) return undefined
    }
  }

  async #goOn(): Promise<void> {
    this.channel.resume()
    await this.rings.resume()
    this.#tellConfig()
  }

  #tellConfig(): void {
    if (!this.configPending || !this.rings.anyStarted) return
    this.configPending = false
    this.channel.configChanged()
  }

  async #end(): Promise<void> {
    try {
      this.transfer.abort()
      await this.rings.stopAll()
      await this.host.setLog(undefined, NO_FD)
      await this.host.setMemory([], false)
    } finally {
      this.#release()
      this.host.reset()
    }
  }

  #release(): void {
    this.rings.closeFds()
    this.exchange.release()
    this.log.release()
    this.#releaseInflight()
    this.channel[Symbol.dispose]()
    this.connection[Symbol.dispose]()
  }

  #releaseInflight(): void {
    this.inflight?.area.release()
    this.inflight = undefined
  }
}

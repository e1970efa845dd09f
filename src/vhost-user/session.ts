/**
 * One front-end on one connection: the vhost-user state machine. One row per request says what it may carry and what
 * it does; ring states are those of vhost-user.rst "Ring states": started or stopped, and independently enabled or
 * disabled.
 *
 * It owns the fds and the memory of the front-end. It must not know iothreads: rings are served by a {@link RingHost}.
 */
import { readlinkSync } from 'node:fs'
import type { NetworkRequests } from '../device/index.ts'
import { native } from '../native.ts'
import { VHOST_USER_F_PROTOCOL_FEATURES } from '../virtio/constants.ts'
import { featureSet, hasFeature } from '../virtio/features.ts'
import type { RegionDescription } from '../virtio/memory.ts'
import type { VringConfig } from '../virtio/vring.ts'
import { BackendChannel } from './backend-channel.ts'
import type { Connection, Message } from './connection.ts'
import { ProtocolError } from './errors.ts'
import { type MappedRegion, MemoryTable } from './memory-table.ts'
import { REQUESTS } from './requests.ts'
import { NO_FD, RingState } from './ring-state.ts'
import {
  MAX_MEM_SLOTS,
  requestName,
  u64,
  VHOST_USER_MAX_CONFIG_SIZE,
  VHOST_USER_PROTOCOL_F_BACKEND_REQ,
  VHOST_USER_PROTOCOL_F_CONFIG,
  VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
  VHOST_USER_PROTOCOL_F_MQ,
  VHOST_USER_PROTOCOL_F_MTU,
  VHOST_USER_PROTOCOL_F_RARP,
  VHOST_USER_PROTOCOL_F_REPLY_ACK,
  VHOST_USER_PROTOCOL_F_RESET_DEVICE,
  VHOST_USER_VRING_IDX_MASK,
  VHOST_USER_VRING_NOFD_MASK,
  type VringAddress,
} from './wire.ts'

/**
 * What every device speaks. A bit stands here only when it is implemented; QEMU acknowledges all that it knows,
 * blindly.
 */
export const PROTOCOL_FEATURES = [
  VHOST_USER_PROTOCOL_F_MQ,
  VHOST_USER_PROTOCOL_F_REPLY_ACK,
  VHOST_USER_PROTOCOL_F_BACKEND_REQ,
  VHOST_USER_PROTOCOL_F_CONFIG,
  VHOST_USER_PROTOCOL_F_RESET_DEVICE,
  VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
]
/** What network cards speak beside that. */
export const NETWORK_PROTOCOL_FEATURES = [VHOST_USER_PROTOCOL_F_RARP, VHOST_USER_PROTOCOL_F_MTU]

/** How a ring is started. */
export interface RingStart {
  readonly vring: VringConfig
  readonly features: bigint
  /** -1 = none. Borrowed until `stopRing` or `setKick`/`setCall` came back. */
  readonly kickFd: number
  readonly callFd: number
  readonly enabled: boolean
}

/** Who serves the rings of this session: the daemon, with iothreads. */
export interface RingHost {
  /** Feature bits to offer, transport and ring features included. */
  readonly features: bigint
  readonly numQueues: number
  readonly maxQueueSize: number
  /** Requests that only network cards serve. */
  readonly network: NetworkRequests | undefined
  config(): Uint8Array
  writeConfig(offset: number, bytes: Uint8Array): boolean
  negotiated(features: bigint): void
  reset(): void
  startRing(index: number, start: RingStart): Promise<void>
  /** Drains the ring. Resolves to its base. */
  stopRing(index: number): Promise<number>
  enableRing(index: number, enabled: boolean): Promise<void>
  setKick(index: number, fd: number): Promise<void>
  setCall(index: number, fd: number): Promise<void>
  /** Stops popping in all rings and waits until nothing is in flight. */
  pause(): Promise<void>
  resume(): Promise<void>
  setMemory(regions: readonly RegionDescription[]): Promise<void>
}

export class Session {
  readonly connection: Connection
  readonly host: RingHost
  readonly memory = new MemoryTable()
  readonly rings: readonly RingState[]
  #features: bigint | undefined
  #protocolFeatures = 0n
  #backend: BackendChannel | undefined

  constructor(connection: Connection, host: RingHost) {
    this.connection = connection
    this.host = host
    this.rings = Array.from({ length: host.numQueues }, (_, index) => new RingState(index))
  }

  /**
   * Serves the front-end until it leaves. All rings are stopped and all its memory and fds released when it returns
   * or throws.
   * @throws ProtocolError when the front-end broke the protocol, or a system error
   */
  async run(): Promise<void> {
    try {
      for (;;) {
        using message = await this.connection.read()
        if (message === undefined) return
        await this.#serve(message)
      }
    } finally {
      await this.#end()
    }
  }

  /** The config space changed: tells the driver, if its front-end can hear it. Returns whether it was told. */
  configChanged(): boolean {
    return this.#backend?.configChanged() ?? false
  }

  /** A ring broke on its iothread: its err eventfd tells the front-end (vhost-user.rst "SET_VRING_ERR"). */
  ringBroke(index: number): void {
    const fd = this.rings[index]?.errFd ?? NO_FD
    if (fd >= 0) native.eventfdWrite(fd, 1)
  }

  protocolFeature(bit: number): boolean {
    return hasFeature(this.#protocolFeatures, bit)
  }

  async #serve(message: Message): Promise<void> {
    const acknowledge = message.needReply && this.protocolFeature(VHOST_USER_PROTOCOL_F_REPLY_ACK)
    const row = REQUESTS[message.request]
    try {
      if (row === undefined) throw new ProtocolError('ERR_PROTOCOL_REQUEST', 'an unknown or unsupported request')
      const { payload } = message
      if (row.feature !== undefined && !this.protocolFeature(row.feature)) {
        throw new ProtocolError('ERR_PROTOCOL_REQUEST', 'its protocol feature was not negotiated')
      }
      const size = payload.byteLength
      if (Array.isArray(row.payload) ? size < row.payload[0] || size > row.payload[1] : size !== row.payload) {
        throw new ProtocolError('ERR_PROTOCOL_SIZE', `a payload of ${size} bytes`)
      }
      const [fewest, most] = row.fds ?? [0, 0]
      if (message.fdCount < fewest || message.fdCount > most) {
        throw new ProtocolError('ERR_PROTOCOL_FDS', `${message.fdCount} file descriptors`)
      }
      const reply = await row.serve(this, payload, message)
      if (reply !== undefined) this.connection.reply(message.request, reply)
      else if (acknowledge) this.connection.reply(message.request, u64(0n))
    } catch (error) {
      if (!(error instanceof ProtocolError)) throw error
      const named = new ProtocolError(error.code, `${requestName(message.request)}: ${error.message}`, { cause: error })
      // A reply of its own can't carry a refusal, except for GET_CONFIG, whose row answers it.
      if (!acknowledge || row?.replies === true) throw named
      this.connection.reply(message.request, u64(1n))
      this.onRefused?.(named)
    }
  }

  /** Told of every NACK. */
  onRefused: ((error: ProtocolError) => void) | undefined

  // ---- features

  async setFeatures(features: bigint): Promise<void> {
    const extra = features & ~this.host.features
    if (extra !== 0n) throw new ProtocolError('ERR_PROTOCOL_FEATURES', `bits 0x${extra.toString(16)} were not offered`)
    if (features !== this.#features && this.rings.some((ring) => ring.started)) {
      throw new ProtocolError('ERR_PROTOCOL_FEATURES', 'features changed while rings are started')
    }
    this.#features = features
    this.host.negotiated(features)
    for (const ring of this.rings) await this.#startIfReady(ring)
  }

  get offeredProtocolFeatures(): bigint {
    return featureSet(...PROTOCOL_FEATURES, ...(this.host.network === undefined ? [] : NETWORK_PROTOCOL_FEATURES))
  }

  setProtocolFeatures(features: bigint): void {
    const extra = features & ~this.offeredProtocolFeatures
    if (extra !== 0n) throw new ProtocolError('ERR_PROTOCOL_FEATURES', `bits 0x${extra.toString(16)} were not offered`)
    this.#protocolFeatures = features
  }

  // ---- memory

  /** SET_MEM_TABLE: replaces all regions. Rings that run are paused for it and go on in the new memory. */
  async setMemoryTable(descriptions: Parameters<typeof MemoryTable.map>[0][], fds: readonly number[]): Promise<void> {
    const mapped: MappedRegion[] = []
    try {
      for (const [i, description] of descriptions.entries()) mapped.push(MemoryTable.map(description, fds[i]!, mapped))
    } catch (error) {
      for (const region of mapped) region.release()
      throw error
    }
    await this.#exchangeMemory(mapped)
  }

  async addMemoryRegion(description: Parameters<typeof MemoryTable.map>[0], fd: number): Promise<void> {
    if (this.host.network !== undefined && this.memory.hasAlready(description, fd)) return
    const region = MemoryTable.map(description, fd, this.memory.regions)
    this.memory.regions = [...this.memory.regions, region]
    // Nothing goes away, so nothing has to stop.
    await this.host.setMemory(this.memory.describe())
  }

  async removeMemoryRegion(gpa: bigint, uva: bigint, size: bigint): Promise<void> {
    const region = this.memory.find(gpa, uva, size)
    if (region === undefined) {
      if (this.memory.excuses(gpa, uva, size)) return
      throw new ProtocolError('ERR_PROTOCOL_MEMORY', 'no such region')
    }
    await this.#exchangeMemory(this.memory.regions.filter((candidate) => candidate !== region))
  }

  /** Puts `regions` in place of the present ones and releases those that are gone, once nothing is in flight. */
  async #exchangeMemory(regions: MappedRegion[]): Promise<void> {
    const gone = this.memory.regions.filter((region) => !regions.includes(region))
    await this.host.pause()
    this.memory.regions = regions
    await this.host.setMemory(this.memory.describe())
    for (const region of gone) region.release()
    // A ring's addresses are the front-end's own: where they are in guest memory may have changed with the table.
    for (const ring of this.rings) if (ring.started && !this.#sameAddresses(ring)) await this.#restart(ring)
    await this.host.resume()
  }

  // ---- rings

  /** The ring of a queue index from the wire. @throws ProtocolError */
  ring(index: number): RingState {
    const ring = this.rings[index]
    if (ring !== undefined) return ring
    const hint = this.host.network === undefined ? '' : '; the front-end wants more queue pairs than --queue-pairs'
    throw new ProtocolError('ERR_PROTOCOL_VRING', `queue ${index} of ${this.rings.length}${hint}`)
  }

  async setVringNum(index: number, size: number): Promise<void> {
    const ring = this.#stopped(index, 'its size')
    if (size === 0 || (size & (size - 1)) !== 0 || size > this.host.maxQueueSize) {
      throw new ProtocolError(
        'ERR_PROTOCOL_VRING',
        `a ring of ${size} entries; a power of two up to ${this.host.maxQueueSize} is possible`
      )
    }
    ring.size = size
    await this.#startIfReady(ring)
  }

  setVringBase(index: number, base: number): void {
    if (base > 0xffff) throw new ProtocolError('ERR_PROTOCOL_VRING', `avail index ${base}`)
    this.#stopped(index, 'its base').base = base
  }

  async setVringAddress(address: VringAddress): Promise<void> {
    const ring = this.ring(address.index)
    if (address.flags !== 0) throw new ProtocolError('ERR_PROTOCOL_VRING', 'logging was not negotiated')
    const before = ring.address
    ring.address = address
    try {
      if (ring.size > 0 && this.#features !== undefined) ring.configure(this.memory, this.#features)
    } catch (error) {
      ring.address = before
      throw error
    }
    // QEMU sends the address again to switch logging; a ring that runs elsewhere now is drained first.
    if (ring.started && !this.#sameAddresses(ring)) await this.#restart(ring)
    else await this.#startIfReady(ring)
  }

  /** SET_VRING_KICK starts the ring (vhost-user.rst "Ring states"). */
  async setVringKick(payload: bigint, fds: number[]): Promise<void> {
    const { ring, fd } = this.#vringFd(payload, fds)
    const old = ring.kickFd
    ring.kickFd = fd
    ring.kicked = true
    try {
      if (ring.started) await this.host.setKick(ring.index, fd)
      else await this.#startIfReady(ring)
    } finally {
      closeFd(old)
    }
  }

  async setVringCall(payload: bigint, fds: number[]): Promise<void> {
    const { ring, fd } = this.#vringFd(payload, fds)
    const old = ring.callFd
    ring.callFd = fd
    try {
      if (ring.started) await this.host.setCall(ring.index, fd)
    } finally {
      closeFd(old)
    }
  }

  setVringErr(payload: bigint, fds: number[]): void {
    const { ring, fd } = this.#vringFd(payload, fds)
    closeFd(ring.errFd)
    ring.errFd = fd
  }

  async setVringEnable(index: number, enable: number): Promise<void> {
    const ring = this.ring(index)
    if (enable > 1) throw new ProtocolError('ERR_PROTOCOL_VRING', `enable ${enable}`)
    ring.enabled = enable === 1
    if (ring.started) await this.host.enableRing(index, this.#effectivelyEnabled(ring))
  }

  /** GET_VRING_BASE stops the ring once all that is in flight is done. */
  async getVringBase(index: number): Promise<number> {
    const ring = this.ring(index)
    await this.#stop(ring)
    ring.kicked = false
    closeFd(ring.kickFd)
    ring.kickFd = NO_FD
    return ring.base
  }

  /** RESET_DEVICE: all rings stopped and disabled, the device as after open. Memory and protocol features stay. */
  async resetDevice(): Promise<void> {
    for (const ring of this.rings) {
      await this.#stop(ring)
      this.#closeFds(ring)
      ring.reset()
    }
    this.#features = undefined
    this.host.reset()
  }

  // ---- the rest

  getConfig(offset: number, size: number): Uint8Array | undefined {
    if (offset + size > VHOST_USER_MAX_CONFIG_SIZE) return undefined
    // What lies behind the device's own fields reads as zero: front-ends ask for the size of their own struct.
    const space = new Uint8Array(VHOST_USER_MAX_CONFIG_SIZE)
    space.set(this.host.config())
    return space.subarray(offset, offset + size)
  }

  setConfig(offset: number, bytes: Uint8Array): void {
    if (offset + bytes.length > VHOST_USER_MAX_CONFIG_SIZE || !this.host.writeConfig(offset, bytes)) {
      throw new ProtocolError('ERR_PROTOCOL_CONFIG', `${bytes.length} bytes at ${offset} cannot be written`)
    }
  }

  setBackendChannel(fd: number): void {
    const channel = new BackendChannel(fd)
    this.#backend?.[Symbol.dispose]()
    this.#backend = channel
  }

  /** SEND_RARP. @param mac the low six bytes of the payload */
  announce(mac: Uint8Array): void {
    this.host.network?.announce(mac)
  }

  setMtu(mtu: bigint): void {
    if (mtu > 65535n || this.host.network?.setMtu(Number(mtu)) !== true) {
      throw new ProtocolError('ERR_PROTOCOL_MTU', `an MTU of ${mtu} bytes cannot be had`)
    }
  }

  get maxMemorySlots(): number {
    return MAX_MEM_SLOTS
  }

  /** Whether the front-end truncated memory that we have mapped. */
  get memoryFaulted(): boolean {
    return this.memory.regions.some((region) => region.faulted)
  }

  // ---- internals

  #effectivelyEnabled(ring: RingState): boolean {
    // Without VHOST_USER_F_PROTOCOL_FEATURES a ring is enabled from the start (vhost-user.rst "Ring states").
    return ring.enabled || !hasFeature(this.#features ?? 0n, VHOST_USER_F_PROTOCOL_FEATURES)
  }

  #stopped(index: number, what: string): RingState {
    const ring = this.ring(index)
    if (ring.started) throw new ProtocolError('ERR_PROTOCOL_VRING', `queue ${index} is started, ${what} cannot change`)
    return ring
  }

  /** The ring and the fd of SET_VRING_KICK, CALL or ERR; -1 when bit 8 says that there is none. Takes the fd. */
  #vringFd(payload: bigint, fds: number[]): { ring: RingState; fd: number } {
    try {
      if (payload > BigInt(VHOST_USER_VRING_IDX_MASK | VHOST_USER_VRING_NOFD_MASK)) {
        throw new ProtocolError('ERR_PROTOCOL_VRING', `payload 0x${payload.toString(16)}`)
      }
      const ring = this.ring(Number(payload) & VHOST_USER_VRING_IDX_MASK)
      const none = (Number(payload) & VHOST_USER_VRING_NOFD_MASK) !== 0
      if (fds.length !== (none ? 0 : 1)) throw new ProtocolError('ERR_PROTOCOL_FDS', `${fds.length} file descriptors`)
      const fd = fds[0] ?? NO_FD
      // Non-blocking, so that a counter which the front-end filled up cannot hold a write to it; anything but an
      // eventfd is refused.
      if (fd >= 0 && (!isEventfd(fd) || native.setNonblock(fd, true) < 0))
        throw new ProtocolError('ERR_PROTOCOL_FDS', 'the fd is no eventfd')
      return { ring, fd }
    } catch (error) {
      for (const fd of fds) native.close(fd)
      throw error
    }
  }

  async #startIfReady(ring: RingState): Promise<void> {
    if (ring.started || !ring.kicked || ring.address === undefined || ring.size === 0 || this.#features === undefined)
      return
    const vring = ring.configure(this.memory, this.#features)
    await this.host.startRing(ring.index, {
      vring,
      features: this.#features,
      kickFd: ring.kickFd,
      callFd: ring.callFd,
      enabled: this.#effectivelyEnabled(ring),
    })
    ring.started = true
    ring.config = vring
  }

  async #stop(ring: RingState): Promise<void> {
    if (!ring.started) return
    ring.base = await this.host.stopRing(ring.index)
    ring.started = false
  }

  async #restart(ring: RingState): Promise<void> {
    await this.#stop(ring)
    await this.#startIfReady(ring)
  }

  /** Whether a started ring is where its address says, in the present memory. */
  #sameAddresses(ring: RingState): boolean {
    try {
      return ring.isAt(this.memory, this.#features ?? 0n)
    } catch (error) {
      // Its memory is gone: it breaks on its iothread, and the front-end is told there.
      if (error instanceof ProtocolError) return true
      throw error
    }
  }

  #closeFds(ring: RingState): void {
    closeFd(ring.kickFd)
    closeFd(ring.callFd)
    closeFd(ring.errFd)
  }

  async #end(): Promise<void> {
    try {
      for (const ring of this.rings) await this.#stop(ring)
      await this.host.setMemory([])
    } finally {
      for (const ring of this.rings) this.#closeFds(ring)
      for (const region of this.memory.regions) region.release()
      this.memory.regions = []
      this.#backend?.[Symbol.dispose]()
      this.connection[Symbol.dispose]()
      this.host.reset()
    }
  }
}

function closeFd(fd: number): void {
  if (fd >= 0) native.close(fd)
}

function isEventfd(fd: number): boolean {
  return readlinkSync(`/proc/self/fd/${fd}`) === 'anon_inode:[eventfd]'
}

/**
 * A vhost-user front-end's connection: every request of the specification as a method. It owns the negotiated protocol
 * features (they decide about NEED_REPLY) and the back-end channel. It must not know rings or devices; `session.ts`
 * puts the requests in order.
 *
 * Everything blocks, with a time limit: this is for tools and tests, where one thread plays one guest. What the
 * back-end asks for meanwhile is answered by `pump`, which every wait calls when `pumping` is set: a back-end may need
 * a translation to answer the very request that is waited for.
 */
import { native, systemError } from '../native.ts'
import type { InflightDescription, IotlbMessage, MemoryRegionDescription, VringAddress } from '../vhost-user/wire.ts'
import * as wire from '../vhost-user/wire.ts'
import { hasFeature } from '../virtio/features.ts'
import { type BackendHandler, BackendRequests } from './backend-requests.ts'
import type { Message } from './channel.ts'
import { Channel } from './channel.ts'
import { FrontendError } from './errors.ts'
import { configPayload, dataView, inflight, payload64, singleRegion, u64, vringState } from './payloads.ts'

export type { BackendHandler } from './backend-requests.ts'
export { payload64, vringState } from './payloads.ts'

/** How long a request may take before it counts as failed, in milliseconds. */
export const DEFAULT_TIMEOUT_MS = 10_000

export interface ConnectOptions {
  /** Milliseconds per request; default 10 000. */
  readonly timeoutMs?: number
}

/** How a request that has no reply of its own is acknowledged. */
export type AckMode = 'auto' | 'none' | 'always'

/** A region for the wire together with its file. */
export interface RegionWithFd extends MemoryRegionDescription {
  readonly fd: number
}

const EMPTY = new Uint8Array(0)

export class Connection {
  readonly channel: Channel
  /** What SET_PROTOCOL_FEATURES negotiated last. */
  protocolFeatures = 0n
  /**
   * `auto`: NEED_REPLY on every request without a reply when REPLY_ACK is negotiated. `none`: never. `always`: even
   * unnegotiated.
   */
  ackMode: AckMode = 'auto'
  /** Who answers the back-end's requests; without one everything is acknowledged. */
  onBackendRequest: BackendHandler | undefined
  /** Waits look after the back-end's requests all the time, not only when asked to (vIOMMU, in-band notifications). */
  pumping = false
  #backend: BackendRequests | undefined
  /** Requests whose reply is being waited for, and IOTLB messages sent meanwhile, whose replies come behind it. */
  #waiting = 0
  #lateReplies = 0

  private constructor(channel: Channel) {
    this.channel = channel
  }

  /**
   * Connects to a listening back-end.
   * @throws FrontendError connect when nobody listens there
   */
  static connect(socketPath: string, options: ConnectOptions = {}): Connection {
    const fd = native.connectUnix(socketPath)
    if (fd < 0) {
      const cause = systemError(fd, 'connect', socketPath)
      throw new FrontendError('connect', 'connect', `cannot connect to ${socketPath}: ${cause.code}`, fd, cause)
    }
    return Connection.fromFd(fd, options)
  }

  /** Takes over a connected stream socket. */
  static fromFd(fd: number, options: ConnectOptions = {}): Connection {
    return new Connection(new Channel(fd, options.timeoutMs ?? DEFAULT_TIMEOUT_MS))
  }

  /** pid of the process that listens at the other end (SO_PEERCRED), or undefined. */
  get peerPid(): number | undefined {
    const out = new Int32Array(3)
    return native.peerCred(this.channel.fd, out) === 0 && (out[0] ?? 0) > 0 ? out[0] : undefined
  }

  get replyAck(): boolean {
    return hasFeature(this.protocolFeatures, wire.VHOST_USER_PROTOCOL_F_REPLY_ACK)
  }

  /** Closes both channels. Idempotent. */
  close(): void {
    this.#backend?.close()
    this.channel.close()
  }

  // ---- the two shapes of a request

  /** A request that has a reply of its own. @throws FrontendError */
  call(request: number, payload: Uint8Array = EMPTY, fds: readonly number[] = []): Message {
    this.channel.send(request, wire.VHOST_USER_VERSION, payload, fds)
    return this.reply(request)
  }

  /**
   * A request without a reply, acknowledged as `ackMode` says. @throws FrontendError nack when the back-end refused
   * it
   */
  command(
    request: number,
    payload: Uint8Array = EMPTY,
    fds: readonly number[] = [],
    ack: AckMode = this.ackMode
  ): void {
    const needReply = ack === 'always' || (ack === 'auto' && this.replyAck)
    this.channel.send(
      request,
      wire.VHOST_USER_VERSION | (needReply ? wire.VHOST_USER_NEED_REPLY_MASK : 0),
      payload,
      fds
    )
    if (!needReply) return
    accepted(this.reply(request))
  }

  /** Sends bytes as they are: malformed messages. */
  send(bytes: Uint8Array, fds: readonly number[] = []): void {
    this.channel.sendBytes(bytes, fds)
  }

  // ---- negotiation

  getFeatures(): bigint {
    return u64(this.call(wire.VHOST_USER_GET_FEATURES))
  }

  setFeatures(features: bigint): void {
    this.command(wire.VHOST_USER_SET_FEATURES, payload64(features))
  }

  getProtocolFeatures(): bigint {
    return u64(this.call(wire.VHOST_USER_GET_PROTOCOL_FEATURES))
  }

  /** Takes effect from the next request on. It is sent without NEED_REPLY, as REPLY_ACK is only being negotiated. */
  setProtocolFeatures(features: bigint): void {
    this.command(wire.VHOST_USER_SET_PROTOCOL_FEATURES, payload64(features), [], 'none')
    this.protocolFeatures = features
  }

  setOwner(): void {
    this.command(wire.VHOST_USER_SET_OWNER)
  }

  resetOwner(): void {
    this.command(wire.VHOST_USER_RESET_OWNER)
  }

  resetDevice(): void {
    this.command(wire.VHOST_USER_RESET_DEVICE)
  }

  getQueueNum(): number {
    return Number(u64(this.call(wire.VHOST_USER_GET_QUEUE_NUM)))
  }

  getMaxMemSlots(): number {
    return Number(u64(this.call(wire.VHOST_USER_GET_MAX_MEM_SLOTS)))
  }

  getStatus(): number {
    return Number(u64(this.call(wire.VHOST_USER_GET_STATUS)))
  }

  setStatus(status: number): void {
    this.command(wire.VHOST_USER_SET_STATUS, payload64(BigInt(status)))
  }

  // ---- memory

  setMemTable(regions: readonly RegionWithFd[]): void {
    const payload = new Uint8Array(8 + regions.length * wire.MEMORY_REGION_SIZE)
    const view = new DataView(payload.buffer)
    view.setUint32(0, regions.length, true)
    for (const [i, region] of regions.entries()) wire.writeMemoryRegion(view, 8 + i * wire.MEMORY_REGION_SIZE, region)
    this.command(
      wire.VHOST_USER_SET_MEM_TABLE,
      payload,
      regions.map((region) => region.fd)
    )
  }

  addMemRegion(region: RegionWithFd): void {
    this.command(wire.VHOST_USER_ADD_MEM_REG, singleRegion(region), [region.fd])
  }

  /** @param fds front-ends SHOULD NOT send one here; older ones do */
  removeMemRegion(region: MemoryRegionDescription, fds: readonly number[] = []): void {
    this.command(wire.VHOST_USER_REM_MEM_REG, singleRegion(region), fds)
  }

  setLogBase(size: bigint, offset: bigint, fd: number): void {
    const payload = new Uint8Array(wire.LOG_DESCRIPTION_SIZE)
    wire.writeLog(new DataView(payload.buffer), 0, { size, offset })
    // With LOG_SHMFD the request has a reply of its own (vhost-user.rst "VHOST_USER_SET_LOG_BASE").
    if (hasFeature(this.protocolFeatures, wire.VHOST_USER_PROTOCOL_F_LOG_SHMFD)) {
      for (const received of this.call(wire.VHOST_USER_SET_LOG_BASE, payload, [fd]).fds) native.close(received)
    } else {
      this.command(wire.VHOST_USER_SET_LOG_BASE, payload, [fd])
    }
  }

  setLogFd(fd: number): void {
    this.command(wire.VHOST_USER_SET_LOG_FD, EMPTY, [fd])
  }

  /** @returns the description and the back-end's memory file, which the caller owns */
  getInflightFd(numQueues: number, queueSize: number): { description: InflightDescription; fd: number } {
    const reply = this.call(
      wire.VHOST_USER_GET_INFLIGHT_FD,
      inflight({ mmapSize: 0n, mmapOffset: 0n, numQueues, queueSize })
    )
    const fd = reply.fds[0]
    if (reply.payload.length < wire.INFLIGHT_DESCRIPTION_SIZE || fd === undefined) {
      for (const received of reply.fds) native.close(received)
      throw new FrontendError('GET_INFLIGHT_FD', 'reply', 'the reply has no file or is too short')
    }
    for (const extra of reply.fds.slice(1)) native.close(extra)
    return { description: wire.readInflight(dataView(reply.payload), 0), fd }
  }

  setInflightFd(description: InflightDescription, fd: number): void {
    this.command(wire.VHOST_USER_SET_INFLIGHT_FD, inflight(description), [fd])
  }

  // ---- rings

  setVringNum(index: number, size: number): void {
    this.command(wire.VHOST_USER_SET_VRING_NUM, vringState(index, size))
  }

  setVringAddr(address: VringAddress): void {
    const payload = new Uint8Array(wire.VRING_ADDRESS_SIZE)
    wire.writeVringAddress(new DataView(payload.buffer), 0, address)
    this.command(wire.VHOST_USER_SET_VRING_ADDR, payload)
  }

  setVringBase(index: number, base: number): void {
    this.command(wire.VHOST_USER_SET_VRING_BASE, vringState(index, base))
  }

  /**
   * Stops the ring and returns where it stood.
   * @param keep leave what is in flight in the in-flight area instead of completing it (GET_VRING_BASE_INFLIGHT)
   */
  getVringBase(index: number, keep = false): number {
    const num = keep ? wire.VRING_BASE_KEEP_INFLIGHT : 0
    const reply = this.call(wire.VHOST_USER_GET_VRING_BASE, vringState(index, num))
    if (reply.payload.length < 8) throw new FrontendError('GET_VRING_BASE', 'reply', `${reply.payload.length} bytes`)
    return dataView(reply.payload).getUint32(4, true)
  }

  /** Starts the ring. @param fd undefined: the "no fd" flag, the back-end polls */
  setVringKick(index: number, fd: number | undefined): void {
    this.#vringFd(wire.VHOST_USER_SET_VRING_KICK, index, fd)
  }

  setVringCall(index: number, fd: number | undefined): void {
    this.#vringFd(wire.VHOST_USER_SET_VRING_CALL, index, fd)
  }

  setVringErr(index: number, fd: number | undefined): void {
    this.#vringFd(wire.VHOST_USER_SET_VRING_ERR, index, fd)
  }

  setVringEnable(index: number, enabled: boolean): void {
    this.command(wire.VHOST_USER_SET_VRING_ENABLE, vringState(index, enabled ? 1 : 0))
  }

  /** Kicks by message, and starts the ring when it is stopped (INBAND_NOTIFICATIONS). */
  vringKick(index: number): void {
    this.command(wire.VHOST_USER_VRING_KICK, vringState(index, 0))
  }

  // ---- vIOMMU

  /** A translation for the back-end. @param permissions IOTLB_READ, IOTLB_WRITE or both @throws FrontendError nack */
  iotlbUpdate(iova: bigint, size: bigint, userAddress: bigint, permissions: number): void {
    this.iotlb({ iova, size, userAddress, permissions, type: wire.VHOST_IOTLB_UPDATE })
  }

  /** Returns when the back-end uses the range no more. @throws FrontendError nack */
  iotlbInvalidate(iova: bigint, size: bigint): void {
    this.iotlb({ iova, size, userAddress: 0n, permissions: 0, type: wire.VHOST_IOTLB_INVALIDATE })
  }

  /**
   * Any IOTLB message; it is always answered. Sent while another request is waited for, the answer is looked at when
   * that one's has come.
   */
  iotlb(message: IotlbMessage): void {
    const payload = new Uint8Array(wire.IOTLB_MESSAGE_PADDED_SIZE)
    wire.writeIotlb(new DataView(payload.buffer), 0, message)
    const flags = wire.VHOST_USER_VERSION | (this.replyAck ? wire.VHOST_USER_NEED_REPLY_MASK : 0)
    this.channel.send(wire.VHOST_USER_IOTLB_MSG, flags, payload)
    if (this.#waiting > 0) this.#lateReplies++
    else accepted(this.reply(wire.VHOST_USER_IOTLB_MSG))
  }

  // ---- migration

  /**
   * Hands over one end of a channel for the device's state.
   * @param direction VHOST_TRANSFER_STATE_DIRECTION_* @param fd stays the caller's
   * @returns the end of another channel, which the back-end chose instead; the caller owns it
   * @throws FrontendError nack
   */
  setDeviceStateFd(
    direction: number,
    fd: number,
    phase: number = wire.VHOST_TRANSFER_STATE_PHASE_STOPPED
  ): number | undefined {
    const reply = this.call(wire.VHOST_USER_SET_DEVICE_STATE_FD, vringState(direction, phase), [fd])
    const value = u64(reply)
    if ((value & 0xffn) !== 0n) {
      for (const received of reply.fds) native.close(received)
      throw new FrontendError('SET_DEVICE_STATE_FD', 'nack', `the back-end refused it (reply ${value})`, value)
    }
    if ((value & BigInt(wire.VHOST_USER_DEVICE_STATE_NOFD_MASK)) !== 0n) {
      for (const received of reply.fds) native.close(received)
      return undefined
    }
    if (reply.fds[0] === undefined)
      throw new FrontendError('SET_DEVICE_STATE_FD', 'reply', 'it announces a file and has none')
    return reply.fds[0]
  }

  /** @throws FrontendError nack when the back-end could not write or read the whole state */
  checkDeviceState(): void {
    accepted(this.call(wire.VHOST_USER_CHECK_DEVICE_STATE))
  }

  /** Announces the guest in its network. @param mac 6 bytes */
  sendRarp(mac: Uint8Array): void {
    const payload = new Uint8Array(8)
    payload.set(mac.subarray(0, 6))
    this.command(wire.VHOST_USER_SEND_RARP, payload)
  }

  setMtu(mtu: number): void {
    this.command(wire.VHOST_USER_NET_SET_MTU, payload64(BigInt(mtu)))
  }

  // ---- config space

  /**
   * Reads the config space.
   * @returns the bytes, or undefined when the back-end refused (a reply with an empty payload)
   */
  getConfig(offset: number, size: number): Uint8Array | undefined {
    const reply = this.call(wire.VHOST_USER_GET_CONFIG, configPayload(offset, size, 0, new Uint8Array(size)))
    if (reply.payload.length === 0) return undefined
    if (reply.payload.length < 12) throw new FrontendError('GET_CONFIG', 'reply', `${reply.payload.length} bytes`)
    return reply.payload.subarray(12)
  }

  /** @param flags 0 = the guest wrote it, 1 = live migration (vhost-user.rst "Virtio device config space") */
  setConfig(offset: number, bytes: Uint8Array, flags = 0): void {
    this.command(wire.VHOST_USER_SET_CONFIG, configPayload(offset, bytes.length, flags, bytes))
  }

  // ---- the back-end's own requests

  /** Makes the back-end channel and hands its other end over. */
  setBackendRequestFd(): void {
    const pair = new Int32Array(2)
    const result = native.socketpair(pair)
    if (result < 0) throw systemError(result, 'socketpair', 'the back-end channel')
    this.#backend?.close()
    this.#backend = new BackendRequests(new Channel(pair[0] ?? -1, this.channel.timeoutMs))
    try {
      this.command(wire.VHOST_USER_SET_BACKEND_REQ_FD, EMPTY, [pair[1] ?? -1])
    } finally {
      native.close(pair[1] ?? -1)
    }
  }

  /** Our end of the back-end channel, for messages that no honest front-end sends. */
  get backend(): Channel | undefined {
    return this.#backend?.channel
  }

  /**
   * Waits for a request of the back-end (config change, …), lets the handler answer it, and acknowledges it when it
   * asks for that.
   * @returns undefined when none came in time
   */
  backendRequest(timeoutMs: number): Message | undefined {
    return this.#backend?.next(timeoutMs, this.onBackendRequest)
  }

  /**
   * Handles the back-end's requests that are there. Calls of it from within do nothing.
   * @param timeoutMs how long to wait for the first one
   * @returns how many there were
   */
  pump(timeoutMs = 0): number {
    return this.#backend?.pump(timeoutMs, this.onBackendRequest) ?? 0
  }

  /** Returns when the back-end has handled everything sent before (a GET_FEATURES round trip). */
  barrier(): void {
    this.getFeatures()
  }

  #vringFd(request: number, index: number, fd: number | undefined): void {
    const value = BigInt(fd === undefined ? index | wire.VHOST_USER_VRING_NOFD_MASK : index)
    this.command(request, payload64(value), fd === undefined ? [] : [fd])
  }

  /** The reply to `request`, which was sent just before. @throws FrontendError */
  reply(request: number): Message {
    const name = wire.requestName(request)
    this.#waiting++
    try {
      let reply = this.#receive(name)
      for (; this.#lateReplies > 0 && reply.request === wire.VHOST_USER_IOTLB_MSG; reply = this.#receive(name)) {
        this.#lateReplies--
        accepted(checked(reply))
      }
      if (reply.request !== request) {
        throw new FrontendError(name, 'reply', `the back-end answered ${wire.requestName(reply.request)} instead`)
      }
      return checked(reply)
    } finally {
      this.#waiting--
    }
  }

  #receive(name: string): Message {
    const { channel } = this
    if (!this.pumping) return channel.receive(name)
    const deadline = performance.now() + channel.timeoutMs
    // One poll can't watch both channels, so it is a millisecond each.
    while (!channel.readable(1)) {
      this.pump()
      if (performance.now() > deadline) return channel.receive(name, 0)
    }
    return channel.receive(name)
  }
}

/** @throws FrontendError reply when the flags are none of a reply */
function checked(reply: Message): Message {
  const flags = reply.flags & (wire.VHOST_USER_VERSION_MASK | wire.VHOST_USER_REPLY_MASK)
  if (flags === (wire.VHOST_USER_VERSION | wire.VHOST_USER_REPLY_MASK)) return reply
  const name = wire.requestName(reply.request)
  throw new FrontendError(name, 'reply', `the reply's flags are 0x${reply.flags.toString(16)}`)
}

/** @throws FrontendError nack when the reply is another u64 than 0 */
function accepted(reply: Message): void {
  for (const fd of reply.fds) native.close(fd)
  const value = u64(reply)
  if (value === 0n) return
  throw new FrontendError(wire.requestName(reply.request), 'nack', `the back-end refused it (reply ${value})`, value)
}

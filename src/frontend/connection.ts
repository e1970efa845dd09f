/**
 * A vhost-user front-end's connection: every request of the specification as a method. It owns the negotiated protocol
 * features (they decide about NEED_REPLY) and the back-end channel. It must not know rings or devices; `session.ts`
 * puts the requests in order.
 *
 * Everything blocks, with a time limit: this is for tools and tests, where one thread plays one guest.
 */
import { native, systemError } from '../native.ts'
import type { MemoryRegionDescription, VringAddress } from '../vhost-user/wire.ts'
import * as wire from '../vhost-user/wire.ts'
import { hasFeature } from '../virtio/features.ts'
import type { Message } from './channel.ts'
import { Channel } from './channel.ts'
import { FrontendError } from './errors.ts'

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

/** VHOST_USER_GET_INFLIGHT_FD and SET_INFLIGHT_FD (vhost-user.rst "Inflight description"). */
export interface InflightDescription {
  readonly mmapSize: bigint
  readonly mmapOffset: bigint
  readonly numQueues: number
  readonly queueSize: number
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
  #backend: Channel | undefined

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
    return this.#reply(request)
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
    const reply = this.#reply(request)
    for (const fd of reply.fds) native.close(fd)
    const value = u64(reply)
    if (value !== 0n) {
      throw new FrontendError(wire.requestName(request), 'nack', `the back-end refused it (reply ${value})`, value)
    }
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
    const payload = new Uint8Array(16)
    const view = new DataView(payload.buffer)
    view.setBigUint64(0, size, true)
    view.setBigUint64(8, offset, true)
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
    if (reply.payload.length < 20 || fd === undefined) {
      throw new FrontendError('GET_INFLIGHT_FD', 'reply', 'the reply has no file or is too short')
    }
    const view = dataView(reply.payload)
    return {
      description: {
        mmapSize: view.getBigUint64(0, true),
        mmapOffset: view.getBigUint64(8, true),
        numQueues: view.getUint16(16, true),
        queueSize: view.getUint16(18, true),
      },
      fd,
    }
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

  /** Stops the ring and returns where it stood. */
  getVringBase(index: number): number {
    const reply = this.call(wire.VHOST_USER_GET_VRING_BASE, vringState(index, 0))
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
    this.#backend = new Channel(pair[0] ?? -1, this.channel.timeoutMs)
    try {
      this.command(wire.VHOST_USER_SET_BACKEND_REQ_FD, EMPTY, [pair[1] ?? -1])
    } finally {
      native.close(pair[1] ?? -1)
    }
  }

  /**
   * Waits for a request of the back-end (config change, …) and acknowledges it when it asks for that.
   * @returns undefined when none came in time
   */
  backendRequest(timeoutMs: number): Message | undefined {
    const channel = this.#backend
    if (channel === undefined || !channel.readable(timeoutMs)) return undefined
    const message = channel.receive('back-end request')
    if ((message.flags & wire.VHOST_USER_NEED_REPLY_MASK) !== 0) {
      channel.send(message.request, wire.VHOST_USER_VERSION | wire.VHOST_USER_REPLY_MASK, payload64(0n))
    }
    return message
  }

  /** Returns when the back-end has handled everything sent before (a GET_FEATURES round trip). */
  barrier(): void {
    this.getFeatures()
  }

  #vringFd(request: number, index: number, fd: number | undefined): void {
    const value = BigInt(fd === undefined ? index | wire.VHOST_USER_VRING_NOFD_MASK : index)
    this.command(request, payload64(value), fd === undefined ? [] : [fd])
  }

  #reply(request: number): Message {
    const name = wire.requestName(request)
    const reply = this.channel.receive(name)
    if (reply.request !== request) {
      throw new FrontendError(name, 'reply', `the back-end answered ${wire.requestName(reply.request)} instead`)
    }
    const flags = reply.flags & (wire.VHOST_USER_VERSION_MASK | wire.VHOST_USER_REPLY_MASK)
    if (flags !== (wire.VHOST_USER_VERSION | wire.VHOST_USER_REPLY_MASK)) {
      throw new FrontendError(name, 'reply', `the reply's flags are 0x${reply.flags.toString(16)}`)
    }
    return reply
  }
}

// ---- payloads

function dataView(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
}

function u64(reply: Message): bigint {
  if (reply.payload.length !== 8) {
    throw new FrontendError(wire.requestName(reply.request), 'reply', `${reply.payload.length} bytes instead of a u64`)
  }
  return dataView(reply.payload).getBigUint64(0, true)
}

/** A u64 payload. */
export function payload64(value: bigint): Uint8Array {
  const bytes = new Uint8Array(8)
  new DataView(bytes.buffer).setBigUint64(0, value, true)
  return bytes
}

/** vhost-user.rst "A vring state description": u32 index, u32 num. */
export function vringState(index: number, num: number): Uint8Array {
  const bytes = new Uint8Array(8)
  const view = new DataView(bytes.buffer)
  view.setUint32(0, index, true)
  view.setUint32(4, num, true)
  return bytes
}

/** vhost-user.rst "Single memory region description": u64 padding, then the region. */
function singleRegion(region: MemoryRegionDescription): Uint8Array {
  const bytes = new Uint8Array(8 + wire.MEMORY_REGION_SIZE)
  wire.writeMemoryRegion(new DataView(bytes.buffer), 8, region)
  return bytes
}

/** vhost-user.rst "Virtio device config space": u32 offset, u32 size, u32 flags, then the bytes. */
function configPayload(offset: number, size: number, flags: number, bytes: Uint8Array): Uint8Array {
  const payload = new Uint8Array(12 + bytes.length)
  const view = new DataView(payload.buffer)
  view.setUint32(0, offset, true)
  view.setUint32(4, size, true)
  view.setUint32(8, flags, true)
  payload.set(bytes, 12)
  return payload
}

function inflight(description: InflightDescription): Uint8Array {
  const bytes = new Uint8Array(20)
  const view = new DataView(bytes.buffer)
  view.setBigUint64(0, description.mmapSize, true)
  view.setBigUint64(8, description.mmapOffset, true)
  view.setUint16(16, description.numQueues, true)
  view.setUint16(18, description.queueSize, true)
  return bytes
}

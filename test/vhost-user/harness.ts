/**
 * A session in this process, between a front-end of the tests that waits by promises, and rings that only write down
 * what they are asked for. For what a real back-end does in one thread and the blocking front-end could not answer.
 */
import { readdirSync } from 'node:fs'
import { setImmediate, setTimeout } from 'node:timers/promises'
import { expect } from 'vitest'
import type { NetworkRequests } from '../../src/device/index.ts'
import { native } from '../../src/native.ts'
import { Connection } from '../../src/vhost-user/connection.ts'
import type { ProtocolError } from '../../src/vhost-user/errors.ts'
import type { RingHost, RingStart, SharedArea } from '../../src/vhost-user/ring-host.ts'
import { Session } from '../../src/vhost-user/session.ts'
import * as wire from '../../src/vhost-user/wire.ts'
import * as virtio from '../../src/virtio/constants.ts'
import { featureSet } from '../../src/virtio/features.ts'
import type { RegionDescription } from '../../src/virtio/memory.ts'
import { NOTHING } from './messages.ts'
import { address, single } from './request-rows.ts'

/** How long anything may take before a test has failed, in milliseconds. */
const PATIENCE_MS = 5000

export const ALL_FEATURES = featureSet(
  virtio.VHOST_F_LOG_ALL,
  virtio.VHOST_USER_F_PROTOCOL_FEATURES,
  virtio.VIRTIO_F_INDIRECT_DESC,
  virtio.VIRTIO_F_EVENT_IDX,
  virtio.VIRTIO_F_VERSION_1,
  virtio.VIRTIO_F_ACCESS_PLATFORM,
  virtio.VIRTIO_F_RING_PACKED,
  virtio.VIRTIO_F_IN_ORDER
)
/** Split rings in the front-end's own addresses, nothing logged. */
export const PLAIN = featureSet(virtio.VHOST_USER_F_PROTOCOL_FEATURES, virtio.VIRTIO_F_VERSION_1)
export const PACKED = PLAIN | featureSet(virtio.VIRTIO_F_RING_PACKED)
export const TRANSLATED = PLAIN | featureSet(virtio.VIRTIO_F_ACCESS_PLATFORM)
export const LOGGED = PLAIN | featureSet(virtio.VHOST_F_LOG_ALL)

export function openFds(): number {
  return readdirSync('/proc/self/fd').length
}

/** Polls until `condition` holds. */
export async function until(condition: () => boolean, what = 'what is waited for'): Promise<void> {
  const deadline = performance.now() + PATIENCE_MS
  while (!condition()) {
    if (performance.now() > deadline) throw new Error(`${what} does not come`)
    await setTimeout(1)
  }
}

/** Rings that do nothing but remember. */
export class FakeHost implements RingHost {
  features = ALL_FEATURES
  numQueues = 2
  maxQueueSize = 32768
  network: NetworkRequests | undefined
  /** Everything it was asked, in order. */
  readonly calls: string[] = []
  readonly started = new Map<number, RingStart>()
  /** What stopRing answers. */
  base = 0
  memory: readonly RegionDescription[] = []
  translated = false
  log: SharedArea | undefined
  logFd = -1
  state: Uint8Array = new Uint8Array(0)
  /** Awaited by stopRing and saveState. */
  busy: Promise<void> = Promise.resolve()
  /** Thrown by the next startRing. */
  startError: Error | undefined

  config(): Uint8Array {
    return Uint8Array.from({ length: 8 }, (_, i) => i)
  }

  writeConfig(offset: number, bytes: Uint8Array, migration: boolean): boolean {
    this.calls.push(`writeConfig ${offset} ${bytes.length} ${migration}`)
    return migration || offset === 4
  }

  negotiated(features: bigint): void {
    this.calls.push(`negotiated ${features.toString(16)}`)
  }

  reset(): void {
    this.calls.push('reset')
  }

  async startRing(index: number, start: RingStart): Promise<void> {
    this.calls.push(`start ${index}`)
    await setImmediate()
    if (this.startError !== undefined) throw this.startError
    if (this.started.has(index)) throw new Error(`ring ${index} is started twice`)
    this.started.set(index, start)
  }

  async stopRing(index: number, keep: boolean): Promise<number> {
    this.calls.push(`stop ${index}${keep ? ' keep' : ''}`)
    if (!this.started.has(index)) throw new Error(`ring ${index} is not started`)
    await this.busy
    this.started.delete(index)
    return this.base
  }

  async enableRing(index: number, enabled: boolean): Promise<void> {
    this.calls.push(`enable ${index} ${enabled}`)
  }

  async setKick(index: number, fd: number): Promise<void> {
    this.calls.push(`setKick ${index}${fd < 0 ? ' none' : ''}`)
  }

  async setCall(index: number, fd: number): Promise<void> {
    this.calls.push(`setCall ${index}${fd < 0 ? ' none' : ''}`)
  }

  async kick(index: number): Promise<void> {
    this.calls.push(`kick ${index}`)
  }

  async pause(): Promise<void> {
    this.calls.push('pause')
  }

  async resume(): Promise<void> {
    this.calls.push('resume')
  }

  async setMemory(regions: readonly RegionDescription[], translated: boolean): Promise<void> {
    this.calls.push(`setMemory ${regions.length}${translated ? ' translated' : ''}`)
    this.memory = regions
    this.translated = translated
  }

  async updateIotlb(regions: readonly RegionDescription[]): Promise<void> {
    this.calls.push(`updateIotlb ${regions.map((one) => `${one.gpa.toString(16)}+${one.size.toString(16)}`).join(' ')}`)
    this.memory = [...this.memory, ...regions]
  }

  async invalidateIotlb(start: number, size: number): Promise<void> {
    this.calls.push(`invalidateIotlb ${start.toString(16)}+${size.toString(16)}`)
  }

  async setLog(log: SharedArea | undefined, fd: number): Promise<void> {
    this.calls.push(`setLog ${log?.size ?? 'none'}${fd < 0 ? '' : ' fd'}`)
    this.log = log
    this.logFd = fd
  }

  async setRingLog(index: number, at: number): Promise<void> {
    this.calls.push(`setRingLog ${index} ${at.toString(16)}`)
  }

  async saveState(): Promise<Uint8Array> {
    this.calls.push('saveState')
    await this.busy
    return this.state
  }

  async loadState(state: Uint8Array): Promise<void> {
    this.calls.push(`loadState ${state.length}`)
    if (state.length === 13) throw new Error('13 bytes bring bad luck')
    this.state = state
  }

  /** What it was asked since the last time. */
  taken(): string[] {
    return this.calls.splice(0)
  }
}

export interface Received {
  readonly request: number
  readonly flags: number
  readonly payload: Uint8Array
  readonly fds: number[]
}

/** One end of a socket, by promises. */
export class Peer implements Disposable {
  readonly fd: number
  readonly #fds = new Int32Array(2 + 64)
  #closed = false

  constructor(fd: number) {
    this.fd = fd
  }

  /** Bytes as they are. Waits for room. */
  async write(bytes: Uint8Array, fds: readonly number[] = []): Promise<void> {
    let passed = Int32Array.from(fds)
    for (let sent = 0; sent < bytes.length; ) {
      const result = native.sendMessage(this.fd, bytes, sent, bytes.length - sent, passed, passed.length, false)
      if (result === -11) await setTimeout(1)
      else if (result < 0) throw new Error(`sendmsg: ${result}`)
      else {
        sent += result
        passed = new Int32Array(0)
      }
    }
  }

  send(request: number, payload: Uint8Array, fds: readonly number[] = [], needReply = false): Promise<void> {
    return this.write(encode(request, payload, needReply ? wire.VHOST_USER_NEED_REPLY_MASK : 0), fds)
  }

  /** The next message; undefined when the other end hung up. */
  async receive(): Promise<Received | undefined> {
    const fds: number[] = []
    const header = new Uint8Array(wire.HEADER_SIZE)
    if (!(await this.#fill(header, fds))) return undefined
    const view = new DataView(header.buffer)
    const payload = new Uint8Array(view.getUint32(8, true))
    if (payload.length > 0 && !(await this.#fill(payload, fds))) throw new Error('half a message')
    return { request: view.getUint32(0, true), flags: view.getUint32(4, true), payload, fds }
  }

  /** Whether nothing comes for a while. */
  async silent(): Promise<boolean> {
    await setTimeout(30)
    return native.pollIn(this.fd, 0) === 0
  }

  close(): void {
    if (this.#closed) return
    this.#closed = true
    native.close(this.fd)
  }

  [Symbol.dispose](): void {
    this.close()
  }

  async #fill(target: Uint8Array, fds: number[]): Promise<boolean> {
    const deadline = performance.now() + PATIENCE_MS
    for (let filled = 0; filled < target.length; ) {
      const result = native.recvMessage(this.fd, target, filled, target.length - filled, this.#fds)
      if (result === -11) {
        if (performance.now() > deadline) throw new Error('no message comes')
        await setTimeout(1)
        continue
      }
      if (result <= 0) return false
      for (let i = 0; i < this.#fds[0]!; i++) fds.push(this.#fds[2 + i]!)
      filled += result
    }
    return true
  }
}

export function encode(request: number, payload: Uint8Array, flags = 0): Uint8Array {
  const bytes = new Uint8Array(wire.HEADER_SIZE + payload.length)
  const view = new DataView(bytes.buffer)
  view.setUint32(0, request, true)
  view.setUint32(4, wire.VHOST_USER_VERSION | flags, true)
  view.setUint32(8, payload.length, true)
  bytes.set(payload, wire.HEADER_SIZE)
  return bytes
}

export function u64of(payload: Uint8Array): bigint {
  return new DataView(payload.buffer, payload.byteOffset).getBigUint64(0, true)
}

export function socketpair(): [number, number] {
  const ends = new Int32Array(2)
  if (native.socketpair(ends) < 0) throw new Error('socketpair')
  return [ends[0]!, ends[1]!]
}

/** Region 0: 1 MiB at GPA 1 MiB. */
export const REGION = { guestAddress: 0x10_0000n, size: 0x10_0000n, userAddress: 0x7f00_0000_0000n, mmapOffset: 0n }
export const UVA = REGION.userAddress
/** Where the parts of ring 0 are, in front-end addresses. */
export const RING = { descriptor: UVA, available: UVA + 0x2000n, used: UVA + 0x4000n }

export interface BenchOptions {
  readonly host?: FakeHost
  readonly features?: bigint
  /** Not to acknowledge. */
  readonly withoutProtocol?: readonly number[]
  /** Negotiate nothing. */
  readonly bare?: boolean
}

/** Makes what all sessions of a process share, so that fds can be counted: it is there for the rest of its life. */
export async function warmUp(): Promise<void> {
  await using bench = await Bench.open()
  await bench.addMemory()
}

/** A front-end and the session that serves it. */
export class Bench implements AsyncDisposable {
  readonly host: FakeHost
  readonly peer: Peer
  readonly session: Session
  readonly refused: ProtocolError[] = []
  /** Resolves to what ended the session: an error, or undefined. */
  readonly ended: Promise<unknown>
  /** The front-end's end of the back-end channel. */
  channel: Peer | undefined
  readonly #fds: number[] = []

  private constructor(host: FakeHost, peer: Peer, session: Session) {
    this.host = host
    this.peer = peer
    this.session = session
    session.onRefused = (error) => this.refused.push(error)
    this.ended = session.run().then(
      () => undefined,
      (error: unknown) => error
    )
  }

  /** As QEMU begins, up to SET_FEATURES; with everything negotiated that is offered. */
  static async open(options: BenchOptions = {}): Promise<Bench> {
    const host = options.host ?? new FakeHost()
    const [ours, theirs] = socketpair()
    const bench = new Bench(host, new Peer(ours), new Session(new Connection(theirs), host))
    if (options.bare === true) return bench
    const offered = u64of((await bench.ask(wire.VHOST_USER_GET_PROTOCOL_FEATURES))!)
    await bench.negotiateProtocol(offered & ~featureSet(...(options.withoutProtocol ?? [])))
    expect(await bench.command(wire.VHOST_USER_SET_FEATURES, wire.u64(options.features ?? PLAIN))).toBe('ok')
    host.taken()
    return bench
  }

  /** The front-end's side of a session that another process took over. */
  static over(host: FakeHost, peer: Peer, session: Session): Bench {
    return new Bench(host, peer, session)
  }

  async negotiateProtocol(features: bigint): Promise<void> {
    await this.peer.send(wire.VHOST_USER_SET_PROTOCOL_FEATURES, wire.u64(features))
  }

  /** A request with a reply of its own; undefined when the session hung up. */
  async ask(
    request: number,
    payload: Uint8Array = NOTHING,
    fds: readonly number[] = []
  ): Promise<Uint8Array | undefined> {
    const reply = await this.exchange(request, payload, fds)
    for (const fd of reply?.fds ?? []) native.close(fd)
    return reply?.payload
  }

  async exchange(request: number, payload: Uint8Array, fds: readonly number[] = []): Promise<Received | undefined> {
    await this.peer.send(request, payload, fds)
    const reply = await this.peer.receive()
    if (reply !== undefined) {
      expect(reply.request).toBe(request)
      expect(reply.flags & wire.VHOST_USER_REPLY_MASK).not.toBe(0)
    }
    return reply
  }

  /** A request without a reply of its own. */
  async command(
    request: number,
    payload: Uint8Array = NOTHING,
    fds: readonly number[] = []
  ): Promise<'ok' | 'nack' | 'closed'> {
    await this.peer.send(request, payload, fds, true)
    const reply = await this.peer.receive()
    if (reply === undefined) return 'closed'
    expect(reply.request).toBe(request)
    return u64of(reply.payload) === 0n ? 'ok' : 'nack'
  }

  /** A new fd that is closed with the bench. */
  own(fd: number): number {
    if (fd < 0) throw new Error(`no fd: ${fd}`)
    this.#fds.push(fd)
    return fd
  }

  memfd(bytes: number): number {
    return this.own(native.memfd('virtiod-test', bytes, 0))
  }

  eventfd(): number {
    return this.own(native.eventfd(0))
  }

  async addMemory(fd = this.memfd(0x10_0000), region = REGION): Promise<number> {
    expect(await this.command(wire.VHOST_USER_ADD_MEM_REG, single(region), [fd])).toBe('ok')
    return fd
  }

  async openChannel(): Promise<Peer> {
    const [ours, theirs] = socketpair()
    expect(await this.command(wire.VHOST_USER_SET_BACKEND_REQ_FD, undefined, [theirs])).toBe('ok')
    native.close(theirs)
    this.channel = new Peer(ours)
    return this.channel
  }

  /** Everything that a ring needs but what starts it. */
  async prepareRing(index = 0, size = 256, fields: Partial<wire.VringAddress> = {}): Promise<void> {
    expect(await this.command(wire.VHOST_USER_SET_VRING_NUM, wire.vringState(index, size))).toBe('ok')
    expect(await this.command(wire.VHOST_USER_SET_VRING_ADDR, address({ index, ...RING, ...fields }))).toBe('ok')
  }

  kick(index = 0): Promise<'ok' | 'nack' | 'closed'> {
    return this.command(wire.VHOST_USER_SET_VRING_KICK, wire.u64(BigInt(index)), [this.eventfd()])
  }

  async startRing(index = 0, size = 256, fields: Partial<wire.VringAddress> = {}): Promise<RingStart> {
    await this.prepareRing(index, size, fields)
    expect(await this.kick(index)).toBe('ok')
    return this.host.started.get(index)!
  }

  async getBase(index = 0, num = 0): Promise<number | undefined> {
    const reply = await this.ask(wire.VHOST_USER_GET_VRING_BASE, wire.vringState(index, num))
    return reply === undefined ? undefined : new DataView(reply.buffer).getUint32(4, true)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.peer.close()
    this.channel?.close()
    await this.ended
    for (const fd of this.#fds) native.close(fd)
  }
}

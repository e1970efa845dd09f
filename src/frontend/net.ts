/**
 * A virtio-net driver over a session (virtio 1.3 §5.1): packets out, packets in, control commands, one at a time, every rule
 * about lengths and headers checked. For tests and tools, so odd things are possible too: headers that lie, packets cut
 * anywhere, buffers that are too small or not writable. It owns the buffers in guest memory. It must not know the connection;
 * for speed there is `net-load.ts`.
 */
import { native } from '../native.ts'
import { VHOST_USER_PROTOCOL_F_CONFIG } from '../vhost-user/wire.ts'
import { VIRTQ_DESC_SIZE } from '../virtio/constants.ts'
import * as net from '../virtio/net.ts'
import type { Segment, TableMemory } from './driver.ts'
import { FrontendError } from './errors.ts'
import type { GuestBuffer } from './memory.ts'
import { decodeNetConfig, headerSizeOf, receiveBufferSize } from './net-features.ts'
import { encodeNetHeader, type NetHeader } from './net-frames.ts'
import { broken, type Filled, type Packet, takePacket } from './net-rules.ts'
import type { Session } from './session.ts'
import { sleepMs, type Virtqueue, type WaitMode } from './virtqueue.ts'

/** Value of a byte that the device was to write and has not. */
export const UNTOUCHED = 0xa5

export interface NetDriverOptions {
  /** Queue pairs to start; default 1. */
  readonly pairs?: number
  /** Entries per ring; default 256. */
  readonly queueSize?: number
  readonly mode?: WaitMode
  /** Bytes of a receive buffer, header included; default 2048 merged, else 1526, or 65562 with GUEST_TSO and the like. */
  readonly rxBufferSize?: number
  /** Buffers to post on each receive queue; they are posted again when their packet was received. Default 64. */
  readonly rxBuffers?: number
  /** Start the control queue; default: when CTRL_VQ is negotiated. */
  readonly control?: boolean
  /** Enable the rings (SET_VRING_ENABLE); default true. */
  readonly enable?: boolean
  /** Bytes of guest memory for packets on their way out, per pair; default 512 KiB. */
  readonly arenaBytes?: number
  /** Milliseconds that anything may take; default 5000. */
  readonly timeoutMs?: number
  /** First index of every ring; default 0. */
  readonly base?: number
  /** Accept any num_buffers without MRG_RXBUF, as from DPDK; default false. */
  readonly laxNumBuffers?: boolean
}

export interface SendOptions {
  /** Its fields, or its bytes, however many; default a plain one. */
  readonly header?: Partial<NetHeader> | Uint8Array
  /** Pair whose transmit queue is used; default 0. */
  readonly queue?: number
  /** Lengths of the descriptors over header and frame; default one descriptor for all. */
  readonly cuts?: readonly number[]
  /** Use an indirect table. */
  readonly indirect?: boolean
  /** false: leave it to a later `publish`. */
  readonly publish?: boolean
}

/** A packet on its way out. */
export interface SentPacket {
  /** The device has used it. */
  done: boolean
}

export interface ReceivedPacket extends Packet {
  /** The pair. */
  readonly queue: number
}

/** What a control command came to. */
export interface ControlResult {
  /** The device-writable bytes, {@link UNTOUCHED} where it wrote nothing. */
  readonly data: Uint8Array
  /** The used element's length. */
  readonly written: number
}

interface Posted {
  readonly segments: readonly Segment[]
  readonly capacity: number
  /** To be posted again when it comes back. */
  readonly recycled: boolean
}

interface Pair {
  readonly rx: Virtqueue
  readonly tx: Virtqueue
  readonly posted: (Posted | undefined)[]
  readonly sending: (SentPacket | undefined)[]
  /** Used receive buffers whose packet was not yet asked for. */
  readonly filled: Filled[]
  readonly arena: GuestBuffer
  arenaNext: number
}

export class NetDriver {
  /** After `Session.resume` the one that it returned. */
  session: Session
  readonly headerSize: 12 | 10
  readonly rxBufferSize: number
  readonly mergeable: boolean
  /** The control queue, when it was started. */
  readonly controlQueue: Virtqueue | undefined
  timeoutMs: number
  readonly #lax: boolean
  readonly #pairs: Pair[] = []
  readonly #controlArena: GuestBuffer | undefined

  /**
   * Starts receive (even) and transmit (odd) rings, posts buffers, and starts the control queue behind the last possible pair
   * (virtio 1.3 §5.1.2): index 2 × max_virtqueue_pairs with MQ, else 2.
   */
  constructor(session: Session, options: NetDriverOptions = {}) {
    this.session = session
    this.timeoutMs = options.timeoutMs ?? 5000
    this.#lax = options.laxNumBuffers ?? false
    this.headerSize = headerSizeOf(session.features)
    this.mergeable = session.has(net.VIRTIO_NET_F_MRG_RXBUF)
    this.rxBufferSize = options.rxBufferSize ?? receiveBufferSize(session.features)
    const { memory } = session
    const enable = options.enable ?? true
    const ring = {
      size: options.queueSize ?? 256,
      mode: options.mode ?? 'poll',
      ...(options.base !== undefined && { base: options.base }),
    }
    for (let i = 0; i < (options.pairs ?? 1); i++) {
      const callFd = this.#pairs[0]?.rx.callFd
      // Receive queues share their call eventfd, so that one can sleep on all of them.
      const rx = session.startQueue(2 * i, { ...ring, ...(callFd !== undefined && { callFd }) }, enable)
      const tx = session.startQueue(2 * i + 1, ring, enable)
      const arena = memory.allocate(options.arenaBytes ?? 2 ** 19, 4096)
      this.#pairs.push({
        rx,
        tx,
        posted: new Array<Posted | undefined>(ring.size).fill(undefined),
        sending: new Array<SentPacket | undefined>(ring.size).fill(undefined),
        filled: [],
        arena,
        arenaNext: 0,
      })
      for (let n = Math.min(options.rxBuffers ?? 64, ring.size); n > 0; n--) {
        const { gpa } = memory.allocate(this.rxBufferSize, 64)
        this.#post(i, [{ address: gpa, length: this.rxBufferSize, writable: true }], true)
      }
      rx.driver.publish()
    }
    if (options.control ?? session.has(net.VIRTIO_NET_F_CTRL_VQ)) {
      this.#controlArena = memory.allocate(8192, 64)
      this.controlQueue = session.startQueue(controlIndex(session), { ...ring, size: Math.min(64, ring.size) }, enable)
    }
  }

  get pairs(): number {
    return this.#pairs.length
  }

  rx(pair = 0): Virtqueue {
    return this.#pair(pair).rx
  }

  tx(pair = 0): Virtqueue {
    return this.#pair(pair).tx
  }

  // ---- out

  /**
   * Puts a packet into a transmit queue.
   * @throws RangeError when descriptors or memory are short
   */
  send(frame: Uint8Array, options: SendOptions = {}): SentPacket {
    const pair = this.#pair(options.queue ?? 0)
    this.#reap(pair)
    const { header = {} } = options
    const head = header instanceof Uint8Array ? header : encodeNetHeader(header, this.headerSize)
    const bytes = new Uint8Array(head.length + frame.length)
    bytes.set(head)
    bytes.set(frame, head.length)
    const at = this.#place(pair, bytes.length)
    pair.arena.bytes.set(bytes, at)
    const segments: Segment[] = []
    let done = 0
    for (const length of options.cuts ?? [bytes.length]) {
      segments.push({ address: pair.arena.gpa + at + done, length, writable: false })
      done += length
    }
    if (done !== bytes.length) throw new RangeError(`cuts: ${done} bytes of ${bytes.length}`)
    const table = options.indirect === true ? this.#table(pair, segments.length) : undefined
    return this.#launch(pair, segments, table, options.publish ?? true)
  }

  /** The same from descriptors as they are, wherever they point. */
  sendRaw(segments: readonly Segment[], queue = 0, publish = true): SentPacket {
    const pair = this.#pair(queue)
    this.#reap(pair)
    return this.#launch(pair, segments, undefined, publish)
  }

  /** Publishes what was sent with `publish` false. */
  publish(queue = 0): void {
    this.#pair(queue).tx.driver.publish()
  }

  /** Waits until a packet (or, left out, every one) was used. @throws FrontendError timeout, closed, reply */
  sent(packet?: SentPacket, timeoutMs = this.timeoutMs): void {
    const deadline = performance.now() + timeoutMs
    const open = (): Pair[] => this.#pairs.filter((pair) => pair.tx.driver.inFlight > 0)
    while (packet === undefined ? open().length > 0 : !packet.done) {
      for (const pair of this.#pairs) this.#reap(pair)
      if (packet === undefined ? open().length === 0 : packet.done) return
      const waiting = open()[0]
      if (performance.now() > deadline || waiting === undefined) {
        throw new FrontendError(
          `virtqueue ${waiting?.tx.index ?? 1}`,
          'timeout',
          `a packet was not used in ${timeoutMs} ms`
        )
      }
      waiting.tx.wait(5)
    }
  }

  // ---- in

  /**
   * Posts a buffer of any shape on a receive queue: small, in pieces, not writable. It is not posted again.
   * @throws RangeError when descriptors are short
   */
  post(segments: readonly Segment[], queue = 0, publish = true): void {
    this.#post(queue, segments, false)
    if (publish) this.#pair(queue).rx.driver.publish()
  }

  /**
   * The next packet.
   * @param queue the pair; default any
   * @throws FrontendError timeout when none comes, reply when the device breaks a rule
   */
  receive(timeoutMs = this.timeoutMs, queue?: number): ReceivedPacket {
    const packet = this.tryReceive(timeoutMs, queue)
    if (packet !== undefined) return packet
    throw new FrontendError('receive queue', 'timeout', `no packet came in ${timeoutMs} ms`)
  }

  /** The next packet, or undefined when none comes in time. @throws FrontendError reply when the device breaks a rule */
  tryReceive(timeoutMs = 0, queue?: number): ReceivedPacket | undefined {
    const deadline = performance.now() + timeoutMs
    for (;;) {
      for (const [i, pair] of this.#pairs.entries()) {
        if (queue !== undefined && i !== queue) continue
        this.#collect(pair)
        if (pair.filled.length > 0) return { ...takePacket(pair.filled, this.session.features, this.#lax), queue: i }
      }
      const left = deadline - performance.now()
      if (left <= 0) return undefined
      this.#waitForPackets(left)
    }
  }

  // ---- control

  /**
   * A control command (virtio 1.3 §5.1.6.5).
   * @returns the acknowledgment: VIRTIO_NET_OK or VIRTIO_NET_ERR
   * @throws FrontendError reply when the device writes none, timeout
   */
  control(classId: number, command: number, data: Uint8Array = new Uint8Array(0)): number {
    const { data: ack, written } = this.controlRaw(
      [Uint8Array.of(classId, command), data].filter((p) => p.length > 0),
      [1]
    )
    if (written !== 1) broken(`a control command's used length is ${written}, its acknowledgment has 1 byte`)
    return ack[0] as number
  }

  /** A command of any shape: device-readable pieces, and lengths of the device-writable ones behind them. */
  controlRaw(readable: readonly Uint8Array[], writable: readonly number[], timeoutMs = this.timeoutMs): ControlResult {
    const queue = this.controlQueue
    const arena = this.#controlArena
    if (queue === undefined || arena === undefined) throw new RangeError('the control queue was not started')
    const segments: Segment[] = []
    let next = 0
    for (const piece of readable) {
      arena.bytes.set(piece, next)
      segments.push({ address: arena.gpa + next, length: piece.length, writable: false })
      next += piece.length
    }
    const answer = next
    for (const length of writable) {
      arena.bytes.fill(UNTOUCHED, next, next + length)
      segments.push({ address: arena.gpa + next, length, writable: true })
      next += length
    }
    const chain = queue.driver.build(segments)
    if (chain < 0) throw new RangeError('the control queue is too small')
    queue.driver.issue(chain)
    queue.driver.publish()
    const deadline = performance.now() + timeoutMs
    while (queue.driver.pop() < 0) {
      const left = deadline - performance.now()
      if (left <= 0 || !queue.wait(left)) {
        throw new FrontendError('control queue', 'timeout', `a command was not answered in ${timeoutMs} ms`)
      }
    }
    queue.driver.release(chain)
    return { data: arena.bytes.slice(answer, next), written: queue.driver.written }
  }

  /** MQ_VQ_PAIRS_SET. @returns the acknowledgment */
  usePairs(pairs: number): number {
    const data = Uint8Array.of(pairs & 0xff, pairs >> 8)
    return this.control(net.VIRTIO_NET_CTRL_MQ, net.VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, data)
  }

  // ---- inside

  #pair(index: number): Pair {
    const pair = this.#pairs[index]
    if (pair === undefined) throw new RangeError(`queue pair ${index} was not started`)
    return pair
  }

  #launch(pair: Pair, segments: readonly Segment[], table: TableMemory | undefined, publish: boolean): SentPacket {
    const chain = pair.tx.driver.build(segments, table)
    if (chain < 0) throw new RangeError(`no ${segments.length} descriptors are free`)
    const packet: SentPacket = { done: false }
    pair.sending[chain] = packet
    pair.tx.driver.issue(chain)
    if (publish) pair.tx.driver.publish()
    return packet
  }

  #reap(pair: Pair): void {
    const { driver } = pair.tx
    for (let chain = driver.pop(); chain >= 0; chain = driver.pop()) {
      const packet = pair.sending[chain]
      if (packet !== undefined) packet.done = true
      pair.sending[chain] = undefined
      driver.release(chain)
      // The used length is what the device wrote, and here is nothing to write to (virtio 1.3 §2.7.8).
      if (driver.written !== 0) broken(`the used length of a sent packet is ${driver.written}`)
    }
    if (driver.inFlight === 0) pair.arenaNext = 0
  }

  #place(pair: Pair, length: number): number {
    const at = pair.arenaNext
    if (at + length > pair.arena.length) throw new RangeError(`no room for ${length} bytes more on their way out`)
    pair.arenaNext = Math.ceil((at + length) / 64) * 64
    return at
  }

  #table(pair: Pair, entries: number): TableMemory {
    const length = entries * VIRTQ_DESC_SIZE
    const at = this.#place(pair, length)
    return { gpa: pair.arena.gpa + at, bytes: pair.arena.bytes.subarray(at, at + length) }
  }

  #post(index: number, segments: readonly Segment[], recycled: boolean): void {
    const pair = this.#pair(index)
    const chain = pair.rx.driver.build(segments)
    if (chain < 0) throw new RangeError(`no ${segments.length} descriptors are free`)
    let capacity = 0
    for (const { address, length, writable } of segments) {
      if (!writable) continue
      capacity += length
      this.session.memory.write(address, new Uint8Array(length).fill(UNTOUCHED))
    }
    pair.posted[chain] = { segments, capacity, recycled }
    pair.rx.driver.issue(chain)
  }

  /** Copies what has come out of the buffers, and posts those again. */
  #collect(pair: Pair): void {
    const { driver } = pair.rx
    let again = false
    for (let chain = driver.pop(); chain >= 0; chain = driver.pop()) {
      const posted = pair.posted[chain] as Posted
      pair.posted[chain] = undefined
      driver.release(chain)
      if (driver.written > posted.capacity) {
        broken(`the used length of a receive buffer is ${driver.written}, it has ${posted.capacity} bytes`)
      }
      const bytes = new Uint8Array(driver.written)
      let done = 0
      for (const { address, length, writable } of posted.segments) {
        if (!writable || done >= bytes.length) continue
        const part = this.session.memory.read(address, Math.min(length, bytes.length - done))
        bytes.set(part, done)
        done += part.length
      }
      pair.filled.push({ bytes, capacity: posted.capacity })
      if (!posted.recycled) continue
      this.#post(this.#pairs.indexOf(pair), posted.segments, true)
      again = true
    }
    if (again) driver.publish()
  }

  #waitForPackets(timeoutMs: number): void {
    const first = this.#pair(0).rx
    const { connection } = this.session
    const deadline = performance.now() + timeoutMs
    const there = (): boolean => this.#pairs.some(({ rx }) => rx.driver.hasUsed())
    if (first.mode === 'poll') {
      for (let spins = 0; !there(); spins++) {
        const now = performance.now()
        if (now > deadline) return
        if (connection.pumping) connection.pump()
        if (spins > 1000) sleepMs(0.05)
        if ((spins & 1023) === 1023) this.#checkAlive()
      }
      return
    }
    first.takeCalls()
    let ready = false
    for (const { rx } of this.#pairs) if (rx.driver.enableCalls()) ready = true
    if (!ready && connection.pumping) {
      // Calls come to any of the queues, and only while somebody looks.
      const until = Math.min(deadline, performance.now() + 100)
      while (!this.#pairs.some(({ rx }) => rx.takeCalls() > 0) && performance.now() < until) first.waitForCall(1)
    } else if (!ready && native.pollIn(first.callFd, Math.ceil(Math.min(100, timeoutMs))) !== 1) this.#checkAlive()
    first.takeCalls()
    for (const { rx } of this.#pairs) rx.driver.disableCalls()
  }

  #checkAlive(): void {
    if (this.session.connection.channel.hungUp()) {
      throw new FrontendError('receive queue', 'closed', 'the back-end closed the connection')
    }
  }
}

/** Where the control queue is. */
function controlIndex(session: Session): number {
  return session.has(net.VIRTIO_NET_F_MQ) ? 2 * maxPairs(session) : 2
}

/** Queue pairs of the device: the config space says it; without one GET_QUEUE_NUM, which then counts pairs (DPDK). 1 without MQ. */
export function maxPairs(session: Session): number {
  if (!session.has(net.VIRTIO_NET_F_MQ)) return 1
  const bytes = session.hasProtocol(VHOST_USER_PROTOCOL_F_CONFIG)
    ? session.connection.getConfig(0, net.VIRTIO_NET_CONFIG_SIZE)
    : undefined
  const pairs = bytes === undefined ? undefined : decodeNetConfig(bytes, session.features).maxVirtqueuePairs
  return pairs ?? session.maxQueues
}

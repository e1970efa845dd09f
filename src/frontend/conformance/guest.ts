/**
 * The pretended guest of a case: one session and its rings, in steps small enough to take them in any order. It owns
 * the session and the rings' memory. It must not know what a case expects.
 */
import {
  VHOST_USER_BACKEND_VRING_CALL,
  VHOST_USER_BACKEND_VRING_ERR,
  VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS,
} from '../../vhost-user/wire.ts'
import {
  VHOST_USER_F_PROTOCOL_FEATURES,
  VIRTIO_F_ACCESS_PLATFORM,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_IN_ORDER,
  VIRTIO_F_RING_PACKED,
} from '../../virtio/constants.ts'
import { BlkDriver, type BlkRequest, type Framing } from '../blk.ts'
import type { Message } from '../channel.ts'
import type { Connection } from '../connection.ts'
import type { Translate } from '../driver.ts'
import type { GuestMemory } from '../memory.ts'
import type { PackedDriver } from '../packed-driver.ts'
import type { Session } from '../session.ts'
import type { SplitDriver } from '../split-driver.ts'
import { sleepMs, Virtqueue, type VirtqueueOptions } from '../virtqueue.ts'
import { expectEqual, Violation } from './case.ts'
import type { Operation } from './operation.ts'

/** Bytes of guest memory per ring for requests in flight. */
const ARENA = 4 * 2 ** 20

export class Guest {
  readonly session: Session
  readonly timeoutMs: number
  readonly #operation: Operation
  readonly #rings: Ring[] = []

  constructor(session: Session, operation: Operation, timeoutMs: number) {
    this.session = session
    this.timeoutMs = timeoutMs
    this.#operation = operation
    // The session knows the rings that it started itself.
    const next = session.connection.onBackendRequest
    session.connection.onBackendRequest = (message) => this.#inband(message) ?? next?.(message) ?? 1n
  }

  get connection(): Connection {
    return this.session.connection
  }

  get memory(): GuestMemory {
    return this.session.memory
  }

  /** A ring in guest memory of which the back-end has not been told. @param arena bytes for requests in flight */
  prepare(index: number, options: VirtqueueOptions = {}, arena = ARENA): Ring {
    const { connection, memory, session } = this
    const queue = new Virtqueue(connection, memory, index, session.has(VIRTIO_F_EVENT_IDX), {
      packed: session.has(VIRTIO_F_RING_PACKED),
      inOrder: session.has(VIRTIO_F_IN_ORDER),
      inband: session.hasProtocol(VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS),
      ...(session.has(VIRTIO_F_ACCESS_PLATFORM) && { translate: session.iommu.translate }),
      ...options,
    })
    const requests = new BlkDriver(queue, memory, arena)
    requests.timeoutMs = this.timeoutMs
    const ring = new Ring(this.session, queue, requests, this.#operation)
    this.#rings.push(ring)
    return ring
  }

  /** The same, started and enabled. */
  start(index: number, options: VirtqueueOptions = {}, arena = ARENA): Ring {
    const ring = this.prepare(index, options, arena)
    ring.start(undefined, this.session.has(VHOST_USER_F_PROTOCOL_FEATURES))
    return ring
  }

  /** VRING_CALL and VRING_ERR of one of these rings. */
  #inband({ request, payload }: Message): bigint | undefined {
    if (request !== VHOST_USER_BACKEND_VRING_CALL && request !== VHOST_USER_BACKEND_VRING_ERR) return undefined
    if (payload.length < 8) return undefined
    const index = new DataView(payload.buffer, payload.byteOffset, payload.byteLength).getUint32(0, true)
    const ring = this.#rings.findLast((one) => one.index === index)
    ring?.queue.noteInband(request === VHOST_USER_BACKEND_VRING_CALL ? 'call' : 'err')
    return ring === undefined ? undefined : 0n
  }

  /** Stops what was started and disconnects. Never throws. @param abrupt just hang up */
  close(abrupt: boolean): void {
    for (const ring of this.#rings) {
      if (abrupt || !ring.started) continue
      try {
        ring.stop()
      } catch {
        break // it hung up or hangs
      }
    }
    this.session.close(abrupt)
    for (const ring of this.#rings) ring.queue.close()
  }

  /** The ring of this index that was prepared last. */
  ring(index: number): Ring {
    const ring = this.#rings.findLast((one) => one.queue.index === index)
    if (ring === undefined) throw new RangeError(`ring ${index} was not prepared`)
    return ring
  }
}

/** A request under way, with what it was to do. */
export interface Pending {
  readonly operation: Operation
  readonly request: BlkRequest
}

export class Ring {
  readonly queue: Virtqueue
  /** Any request in any framing: for a network card too, whose transmissions are requests with nothing to write. */
  readonly requests: BlkDriver
  /** SET_VRING_KICK was sent, and GET_VRING_BASE not yet. */
  started = false
  readonly #connection: Connection
  readonly #memory: GuestMemory
  readonly #translate: Translate | undefined
  readonly #operation: Operation

  constructor(session: Session, queue: Virtqueue, requests: BlkDriver, operation: Operation) {
    this.#connection = session.connection
    this.#memory = session.memory
    this.#translate = session.has(VIRTIO_F_ACCESS_PLATFORM) ? session.iommu.translate : undefined
    this.queue = queue
    this.requests = requests
    this.#operation = operation
  }

  get index(): number {
    return this.queue.index
  }

  /** The driver with its raw access. @throws RangeError on a packed ring */
  get split(): SplitDriver {
    return this.queue.split
  }

  /** The same of a packed ring. @throws RangeError on a split ring */
  get packed(): PackedDriver {
    return this.queue.packed
  }

  // ---- set-up, step by step

  num(size = this.queue.size): void {
    this.#connection.setVringNum(this.index, size)
  }

  base(index = this.queue.driver.base): void {
    this.#connection.setVringBase(this.index, index)
  }

  /** @param flags VHOST_VRING_F_LOG is bit 0; @param log guest-physical address under which the used ring is logged */
  address(flags = 0, log = 0n): void {
    const [descriptors, available, used] = this.queue.ring
    const at = (gpa: number): bigint => (this.#translate ? BigInt(this.#translate(gpa)) : this.#memory.uva(gpa))
    this.#connection.setVringAddr({
      index: this.index,
      flags,
      log,
      descriptor: at(descriptors.gpa),
      available: at(available.gpa),
      used: at(used.gpa),
    })
  }

  kick(fd: number | undefined = this.queue.kickFd): void {
    this.#connection.setVringKick(this.index, fd)
    this.started = true
  }

  call(fd: number | undefined = this.queue.callFd): void {
    this.#connection.setVringCall(this.index, fd)
  }

  err(fd: number | undefined = this.queue.errFd): void {
    this.#connection.setVringErr(this.index, fd)
  }

  enable(on = true): void {
    this.#connection.setVringEnable(this.index, on)
  }

  /** All of it in the order of QEMU. */
  start(base = this.queue.driver.base, enable = true): void {
    this.num()
    this.base(base)
    this.address()
    if (this.queue.inband) {
      this.#connection.vringKick(this.index)
      this.started = true
    } else {
      this.kick()
      this.call()
      this.err()
    }
    if (enable) this.enable()
  }

  /** GET_VRING_BASE. */
  stop(): number {
    this.started = false
    return this.#connection.getVringBase(this.index)
  }

  // ---- requests

  submit(framing: Framing = {}, publish = true, operation = this.#operation): Pending {
    const { readable, writable } = operation
    const read = framing.readable ?? [readable.length]
    const write = framing.writable ?? (writable > 1 ? [writable - 1, 1] : writable === 1 ? [1] : [])
    return { operation, request: this.requests.submitRaw(0, readable, read, write, framing, publish) }
  }

  /** Submits without publishing `count` of them, and publishes. */
  batch(count: number, framing: Framing = {}): Pending[] {
    return this.batchOf(new Array<Operation>(count).fill(this.#operation), framing)
  }

  /** The same of several kinds. */
  batchOf(operations: readonly Operation[], framing: Framing = {}): Pending[] {
    const pending = operations.map((operation) => this.submit(framing, false, operation))
    this.requests.publish()
    return pending
  }

  /** Waits for one. @throws Violation when it does not complete, or not as it should */
  finish(pending: Pending, what = 'a request', timeoutMs = this.requests.timeoutMs): void {
    this.requests.wait(pending.request, timeoutMs)
    pending.operation.check(pending.request, what)
  }

  finishAll(pending: readonly Pending[], what = 'a request'): void {
    for (const one of pending) this.finish(one, what)
  }

  /** One request after the other. */
  run(count = 1, framing: Framing = {}, what = 'a request'): void {
    for (let i = 0; i < count; i++) this.finish(this.submit(framing), count === 1 ? what : `${what} (${i + 1})`)
  }

  /** Nothing completes for a while. @throws Violation */
  expectIdle(why: string, ms = 60): void {
    const before = this.requests.outstanding
    const deadline = performance.now() + ms
    while (performance.now() < deadline) {
      if (this.requests.poll() > 0) throw new Violation(`no request completes (${why})`, 'one completed')
      sleepMs(2)
    }
    expectEqual('requests under way', this.requests.outstanding, before)
  }
}

/**
 * A session whose driver is hostile: its rings are filled, started, disturbed while they run, stopped and looked at, over and
 * over. It knows which bytes a device may have written, and finds all others that changed. It owns session and memory.
 */
import { type GuestMemory, GuestMemory as Memory } from '../../src/frontend/memory.ts'
import { Session } from '../../src/frontend/session.ts'
import { sleepMs } from '../../src/frontend/virtqueue.ts'
import { native } from '../../src/native.ts'
import * as wire from '../../src/vhost-user/wire.ts'
import { VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC } from '../../src/virtio/constants.ts'
import { Pipeline } from './pipeline.ts'
import type { Random } from './random.ts'
import {
  disturb,
  FIRST_BYTES,
  type Format,
  fillRing,
  MAX_ENTRIES,
  type Purpose,
  planRing,
  RING_STRIDE,
  type RingPlan,
  SECOND_BYTES,
  TABLES,
  TABLES_END,
} from './ring-content.ts'
import { Misbehaviour, SECRET } from './target.ts'
import { VICTIMS, type Victim } from './victims.ts'

const PAGE = 4096
/** File bytes before the first region, which are not shared. */
const PREFIX = 65_536
/** A region that no descriptor names. Its high word is one that no descriptor has. */
const CANARY = { gpa: 0x7_7777_7000, uva: 0x7700_0000_0000, size: 16 * PAGE }
const CANARY_BYTE = 0xc5
const WRITE = 2
const INDIRECT = 4

/** What a queue is for, by device. */
const PURPOSES: Readonly<Record<Victim, (index: number, queues: number) => Purpose>> = {
  blk: () => 'disk',
  net: (index, queues) => (index === queues - 1 ? 'control' : index % 2 === 0 ? 'receive' : 'transmit'),
  scsi: (index) => (['task', 'receive'] as const)[index] ?? 'command',
  rng: () => 'receive',
  vsock: (index) => (index === 1 ? 'packet' : 'receive'),
  input: (index) => (index === 0 ? 'event' : 'status'),
  module: (index, queues) => (index === queues - 1 ? 'receive' : 'disk'),
}

/** What a session negotiates. */
export interface RingSessionOptions {
  readonly device: Victim
  readonly socket: string
  readonly packed: boolean
  readonly inOrder: boolean
  readonly inflight: boolean
  readonly iommu: boolean
  readonly eventIdx: boolean
  readonly indirect: boolean
}

export function chooseOptions(random: Random, device: Victim, socket: string): RingSessionOptions {
  return {
    device,
    socket,
    packed: random.one(2),
    inOrder: random.one(4),
    inflight: random.one(3),
    iommu: random.one(4),
    eventIdx: random.one(2),
    indirect: !random.one(4),
  }
}

export class RingSession {
  readonly options: RingSessionOptions
  /** All that a thread may flip bits in: the memory of the rings. */
  readonly shared: SharedArrayBuffer
  /** How often a ring was filled that runs or is about to; how many broke; how many virtiod refused to start. */
  filled = 0
  broken = 0
  /** Rounds after which every byte that changed was accounted for. */
  exactRounds = 0
  refused = 0
  readonly #session: Session
  readonly #memory: GuestMemory
  readonly #pipeline: Pipeline
  readonly #format: Format
  readonly #view: DataView
  readonly #first: Buffer
  readonly #second: Buffer
  readonly #before = Buffer.alloc(FIRST_BYTES + SECOND_BYTES)
  readonly #allowed = Buffer.alloc(FIRST_BYTES + SECOND_BYTES)
  readonly #prefix: Uint8Array
  readonly #prefixAddress: number
  readonly #kick: number
  readonly #event: number
  readonly #rings: readonly Purpose[]
  #plans: RingPlan[] = []
  /** By ring: tells that it broke. */
  readonly #errors: number[] = []
  readonly #broken = new Set<number>()

  /** @throws FrontendError */
  constructor(options: RingSessionOptions) {
    this.options = options
    const { packed, inOrder, inflight, iommu, eventIdx, indirect } = options
    this.#memory = new Memory([
      { gpa: 0, uva: 0x7f00_0000_0000, size: FIRST_BYTES, offset: PREFIX },
      { gpa: FIRST_BYTES, uva: 0x7e00_0000_0000, size: SECOND_BYTES, offset: PAGE },
      { ...CANARY, offset: 0 },
    ])
    const [first, second, canary] = this.#memory.regions
    this.shared = first!.buffer
    this.#view = new DataView(first!.buffer)
    this.#first = Buffer.from(first!.buffer)
    this.#second = Buffer.from(second!.buffer)
    canary!.bytes.fill(CANARY_BYTE)
    const mapping = native.mapFile(first!.fd, 0, PREFIX, 0, PREFIX, true)
    if (typeof mapping === 'number') throw new Error(`mmap: ${mapping}`)
    this.#prefix = new Uint8Array(mapping.buffer).fill(CANARY_BYTE)
    this.#prefixAddress = mapping.address
    this.#kick = native.eventfd(1)
    this.#event = native.eventfd(0)
    const queues = VICTIMS[options.device]
    this.#session = Session.open(options.socket, {
      queues: 0,
      memory: this.#memory,
      packed,
      inOrder,
      iommu,
      inflight: inflight && { numQueues: queues, queueSize: MAX_ENTRIES },
      withoutFeatures: [...(eventIdx ? [] : [VIRTIO_F_EVENT_IDX]), ...(indirect ? [] : [VIRTIO_F_INDIRECT_DESC])],
      timeoutMs: 20_000,
    })
    this.#format = { packed, eventIdx: this.#session.has(VIRTIO_F_EVENT_IDX) }
    this.#pipeline = new Pipeline(this.#session.connection.channel.fd)
    this.#rings = Array.from({ length: queues }, (_, index) => PURPOSES[options.device](index, queues))
    if (this.#session.has(VIRTIO_F_ACCESS_PLATFORM)) this.#translate()
    for (const index of this.#rings.keys()) {
      this.#pipeline.add(wire.VHOST_USER_SET_VRING_CALL, wire.vringState(index, 0), this.#event)
      const error = native.eventfd(0)
      this.#errors.push(error)
      this.#pipeline.add(wire.VHOST_USER_SET_VRING_ERR, wire.vringState(index, 0), error)
      this.#pipeline.add(wire.VHOST_USER_SET_VRING_ENABLE, wire.vringState(index, 1))
    }
    this.#pipeline.replies()
  }

  get ended(): boolean {
    return this.#pipeline.ended
  }

  /** The in-flight area, for the thread that flips bits. */
  get inflight(): SharedArrayBuffer | undefined {
    return this.#session.inflight?.bytes.buffer as SharedArrayBuffer | undefined
  }

  /** Fills all rings and asks for their start. @param exact nothing changes while they run: what they write is checked */
  start(random: Random, exact: boolean): void {
    const pipeline = this.#pipeline
    const { inflight } = this.#session
    this.#plans = [...this.#rings.entries()].map(([index, purpose]) => planRing(random, index, purpose, this.#format))
    for (const plan of this.#plans) {
      fillRing(random, this.#view, plan, this.#format)
      if (inflight !== undefined) fillInflight(random, inflight.queue(plan.index), plan, this.#format.packed)
    }
    if (exact) {
      this.#noteAllowed()
      this.#first.copy(this.#before)
      this.#second.copy(this.#before, FIRST_BYTES)
    }
    native.eventfdWrite(this.#kick, 1)
    for (const plan of this.#plans) {
      pipeline.add(wire.VHOST_USER_SET_VRING_NUM, wire.vringState(plan.index, plan.size))
      pipeline.add(wire.VHOST_USER_SET_VRING_BASE, wire.vringState(plan.index, plan.base))
      pipeline.add(wire.VHOST_USER_SET_VRING_ADDR, this.#address(plan))
      pipeline.add(wire.VHOST_USER_SET_VRING_KICK, wire.vringState(plan.index, 0), this.#kick)
    }
    pipeline.send()
  }

  /** More chains for the rings that are not broken. */
  refill(random: Random): void {
    for (const plan of this.#plans) {
      if (native.eventfdRead(this.#errors[plan.index] ?? -1) > 0) this.#broken.add(plan.index)
      if (this.#broken.has(plan.index)) continue
      fillRing(random, this.#view, plan, this.#format)
      this.filled++
    }
    native.eventfdWrite(this.#kick, 1)
  }

  /** While they run. */
  disturb(random: Random): void {
    for (const plan of this.#plans) if (random.one(8)) disturb(random, this.#view, plan, this.#format)
    if (this.options.iommu) this.#disturbTranslations(random)
    native.eventfdWrite(this.#kick, 1)
  }

  /** Stops all rings, and looks at what they did. @throws Misbehaviour */
  stop(exact: boolean): void {
    const pipeline = this.#pipeline
    const starts = pipeline.replies()
    this.filled += this.#plans.length
    // The replies of SET_VRING_KICK, and those of translations, which come after all of them.
    for (let i = 3; i < 4 * this.#plans.length; i += 4) if (starts[i]?.[0] !== 0) this.refused++
    for (const { index } of this.#plans) pipeline.add(wire.VHOST_USER_GET_VRING_BASE, wire.vringState(index, 0))
    for (const [i, reply] of pipeline.replies().entries()) {
      if (reply.length !== 8 || reply.readUInt32LE(0) !== this.#plans[i]?.index)
        throw new Misbehaviour(`GET_VRING_BASE of queue ${this.#plans[i]?.index} answers ${reply.toString('hex')}`)
      this.#checkBase(this.#plans[i]!, reply.readUInt32LE(4))
    }
    native.eventfdRead(this.#event)
    for (const [index, error] of this.#errors.entries()) if (native.eventfdRead(error) > 0) this.#broken.add(index)
    this.broken += this.#broken.size
    this.#broken.clear()
    if (exact && !this.ended) {
      this.exactRounds++
      this.#checkWrites()
    }
  }

  /** Pages that nobody may have written to, and others' data, which may not be here. @throws Misbehaviour */
  check(): void {
    if (this.#prefix.some((byte) => byte !== CANARY_BYTE))
      throw new Misbehaviour('bytes outside of all regions were written')
    if (this.#memory.regions[2]!.bytes.some((byte) => byte !== CANARY_BYTE))
      throw new Misbehaviour('a region was written that no descriptor names')
    for (const bytes of [this.#first, this.#second]) {
      if (bytes.includes(SECRET)) throw new Misbehaviour("another guest's data is in this one's memory")
    }
  }

  close(): void {
    this.#session.close(true)
    this.#session.inflight?.close()
    this.#memory.close()
    native.release(this.#prefixAddress)
    native.close(this.#kick)
    for (const error of [this.#event, ...this.#errors]) native.close(error)
  }

  // ---- the parts of it

  #address({ index, descriptor, driver, device }: RingPlan): Uint8Array {
    const payload = new Uint8Array(wire.VRING_ADDRESS_SIZE)
    const place = (gpa: number): bigint => (this.options.iommu ? BigInt(gpa) : this.#memory.uva(gpa))
    wire.writeVringAddress(new DataView(payload.buffer), 0, {
      index,
      flags: 0,
      descriptor: place(descriptor),
      available: place(driver),
      used: place(device),
      log: 0n,
    })
    return payload
  }

  #checkBase({ size }: RingPlan, base: number): void {
    const fits = this.#format.packed ? (base & 0x7fff) < size && ((base >>> 16) & 0x7fff) < size : base <= 0xffff
    // A ring that was refused has the base that it was given.
    if (!fits) throw new Misbehaviour(`GET_VRING_BASE says 0x${base.toString(16)} of a ring of ${size}`)
  }

  // ---- the vIOMMU: addresses are the guest-physical ones, page by page, and not always

  #translate(): void {
    this.#update(0, FIRST_BYTES, 3)
    this.#update(FIRST_BYTES, SECOND_BYTES, 3)
    this.#pipeline.replies()
  }

  #update(gpa: number, size: number, permissions: number, type = wire.VHOST_IOTLB_UPDATE): void {
    const payload = new Uint8Array(wire.IOTLB_MESSAGE_PADDED_SIZE)
    wire.writeIotlb(new DataView(payload.buffer), 0, {
      iova: BigInt(gpa),
      size: BigInt(size),
      userAddress: this.#memory.uva(gpa),
      permissions,
      type,
    })
    this.#pipeline.add(wire.VHOST_USER_IOTLB_MSG, payload)
  }

  #disturbTranslations(random: Random): void {
    for (let i = random.below(4); i > 0; i--) {
      const page = random.below(FIRST_BYTES / PAGE)
      const pages = Math.min(random.pick([1, 1, 2, 8]), FIRST_BYTES / PAGE - page)
      if (random.one(2)) this.#update(page * PAGE, pages * PAGE, 0, wire.VHOST_IOTLB_INVALIDATE)
      else this.#update(page * PAGE, pages * PAGE, random.one(2) ? 3 : random.below(4))
    }
    // As it should be, or in-flight chains of the next rings find nothing ever.
    if (random.one(2)) this.#update(0, FIRST_BYTES, 3)
    this.#pipeline.send()
  }

  // ---- what may be written

  /**
   * All that a descriptor lets a device write, wherever descriptors may be: a superset. Those that would let it write to
   * descriptors, which then may say anything, are made readable, and tables are where this looks for them.
   */
  #noteAllowed(): void {
    for (let changed = true; changed; ) {
      this.#allowed.fill(0)
      changed = false
      for (const { index, size } of this.#plans) {
        const start = index * RING_STRIDE
        for (let at = start; at < start + 16 * size; at += 16) changed = this.#noteDescriptor(at) || changed
        // Tables may be anywhere where the content puts one, 4 bytes off as well.
        for (let at = start + TABLES - 16; at + 16 <= start + TABLES_END; at += 4)
          changed = this.#noteDescriptor(at) || changed
      }
    }
    for (const plan of this.#plans) {
      this.#allow(plan.device, this.#format.packed ? 4 : 4 + 8 * plan.size + 2)
      if (this.#format.packed) this.#allow(plan.descriptor, 16 * plan.size)
    }
  }

  /** Returns whether it had to be changed. */
  #noteDescriptor(at: number): boolean {
    const view = this.#view
    const flagsAt = at + (this.#format.packed ? 14 : 12)
    const flags = view.getUint16(flagsAt, true)
    if (view.getUint32(at + 4, true) !== 0) return false
    const start = view.getUint32(at, true)
    const length = view.getUint32(at + 8, true)
    // What is taken for a table elsewhere may be data, which the device writes.
    if ((flags & INDIRECT) !== 0 && !isTable(start, length)) {
      view.setUint16(flagsAt, flags & ~INDIRECT, true)
      return true
    }
    if ((flags & WRITE) === 0) return false
    if (reachesDescriptors(start, length)) {
      view.setUint16(flagsAt, flags & ~WRITE, true)
      return true
    }
    this.#allow(start, length)
    return false
  }

  #allow(start: number, length: number): void {
    const { length: end } = this.#allowed
    if (start < end && length > 0) this.#allowed.fill(1, start, Math.min(end, start + length))
  }

  #checkWrites(): void {
    const now = Buffer.concat([this.#first, this.#second])
    if (now.compare(this.#before) === 0) return
    const allowed = this.#allowed
    for (let at = 0; at < now.length; at++) {
      if (now[at] === this.#before[at] || allowed[at] === 1) continue
      throw new Misbehaviour(`byte ${at} of guest memory was written, which no descriptor allows`)
    }
  }
}

function isTable(start: number, length: number): boolean {
  const from = start % RING_STRIDE
  return start < FIRST_BYTES && from >= TABLES - 16 && from + length <= TABLES_END
}

function reachesDescriptors(start: number, length: number): boolean {
  if (start >= FIRST_BYTES || length === 0) return false
  const from = start % RING_STRIDE
  const to = from + length
  const hits = (low: number, high: number): boolean => from < high && to > low
  return hits(0, 16 * MAX_ENTRIES) || hits(TABLES - 16, TABLES_END) || hits(RING_STRIDE, RING_STRIDE + 16 * MAX_ENTRIES)
}

/** A region of the in-flight area: fresh, as it was left, hardly believable, or nonsense. */
function fillInflight(random: Random, bytes: Uint8Array, plan: RingPlan, packed: boolean): void {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  switch (random.below(5)) {
    case 0:
    case 1:
      bytes.fill(0)
      return
    case 2:
      return
    case 3: {
      view.setUint16(8, 1, true)
      view.setUint16(10, random.one(8) ? random.odd32() : plan.size, true)
      const header = packed ? 32 : 16
      const entry = packed ? 32 : 16
      for (let at = 12; at < header; at += 2)
        view.setUint16(at, random.one(3) ? random.odd32() : random.below(plan.size), true)
      for (let i = 0; i < plan.size; i++) {
        const at = header + entry * i
        bytes[at] = random.one(3) ? 1 : 0
        for (let half = 2; half < entry; half += 2)
          if (random.one(4)) view.setUint16(at + half, random.below(plan.size + 1), true)
      }
      return
    }
    default:
      for (let i = random.below(40); i > 0; i--) bytes[random.below(bytes.length)] = random.next()
  }
}

/** Rings take a moment: what is not through by then is stopped in the middle, which is as good. */
export function letRun(random: Random): void {
  if (!random.one(4)) sleepMs((1 + random.below(5)) / 5)
}

/**
 * A tiny vhost-user-blk back-end with faults on order: `node fake-backend.ts SOCKET FAULT`. It exists so that tests can see the
 * verification's cases fail when they should. One queue, split ring, EVENT_IDX, a disk of 4 MiB in memory, no mercy on bad input.
 */

import type { NativeMapping } from '../../src/native.ts'
import { native } from '../../src/native.ts'
import * as wire from '../../src/vhost-user/wire.ts'

const [, , socketPath = '', fault = 'none'] = process.argv
const DISK = new Uint8Array(4 * 2 ** 20)
const SECTORS = DISK.length / 512
// SEG_MAX, BLK_SIZE, FLUSH; INDIRECT_DESC, EVENT_IDX, PROTOCOL_FEATURES, VERSION_1
const FEATURES = (1n << 2n) | (1n << 6n) | (1n << 9n) | (1n << 28n) | (1n << 29n) | (1n << 30n) | (1n << 32n)
const PROTOCOL = (1n << 3n) | (1n << 9n)
const EVENT_IDX = 1n << 29n

interface Region extends wire.MemoryRegionDescription {
  readonly mapping: NativeMapping
}

const CONFIG = new Uint8Array(60)
const configView = new DataView(CONFIG.buffer)
configView.setBigUint64(0, BigInt(SECTORS), true)
configView.setUint32(12, 126, true)
configView.setUint32(20, 512, true)

let requests = 0
let calls = 0
let kicks = 0

class Session {
  readonly fd: number
  readonly #fds = new Int32Array(18)
  readonly #buffer = new Uint8Array(8192)
  #regions: Region[] = []
  #features = 0n
  #size = 0
  #last = 0
  #used = 0
  #kick = -1
  #call = -1
  #address: wire.VringAddress | undefined
  #started = false

  constructor(fd: number) {
    this.fd = fd
  }

  /** Handles messages and the ring until the peer leaves. */
  serve(): void {
    for (;;) {
      const ready = native.pollIn(this.fd, this.#started ? 0 : 10)
      if (ready === 1 && !this.#message()) break
      if (this.#started && (native.pollIn(this.#kick, 1) !== 1 || native.eventfdRead(this.#kick) <= 0)) {
        if (fault !== 'loses-kicks') this.#ring()
        continue
      }
      if (this.#started && !(fault === 'loses-kicks' && ++kicks % 40 === 0)) this.#ring()
    }
    for (const region of this.#regions) native.release(region.mapping.address)
    for (const fd of [this.fd, this.#kick, this.#call]) if (fd >= 0) native.close(fd)
  }

  #receive(length: number, at: number): boolean {
    for (let done = 0; done < length; ) {
      native.pollIn(this.fd, 1000)
      const count = native.recvMessage(this.fd, this.#buffer, at + done, length - done, this.#fds)
      if (count === -11) continue
      if (count <= 0) return false
      for (let i = 0; i < (this.#fds[0] ?? 0); i++) this.#received.push(this.#fds[2 + i] ?? -1)
      done += count
    }
    return true
  }

  #received: number[] = []

  #message(): boolean {
    this.#received = []
    if (!this.#receive(12, 0)) return false
    const view = new DataView(this.#buffer.buffer)
    const [request, flags, size] = [view.getUint32(0, true), view.getUint32(4, true), view.getUint32(8, true)]
    if (!this.#receive(size, 12)) return false
    const reply = this.#handle(request, new DataView(this.#buffer.buffer, 12, size))
    if (reply !== undefined) this.#reply(request, reply)
    else if ((flags & 8) !== 0) this.#reply(request, new Uint8Array(8))
    return true
  }

  #reply(request: number, payload: Uint8Array): void {
    const bytes = new Uint8Array(12 + payload.length)
    const view = new DataView(bytes.buffer)
    view.setUint32(0, request, true)
    view.setUint32(4, 5, true)
    view.setUint32(8, payload.length, true)
    bytes.set(payload, 12)
    native.sendMessage(this.fd, bytes, 0, bytes.length, this.#fds, 0, true)
  }

  #handle(request: number, view: DataView): Uint8Array | undefined {
    const u64 = (value: bigint): Uint8Array => new Uint8Array(BigUint64Array.of(value).buffer)
    switch (request) {
      case wire.VHOST_USER_GET_FEATURES:
        return u64(FEATURES)
      case wire.VHOST_USER_GET_PROTOCOL_FEATURES:
        return u64(PROTOCOL)
      case wire.VHOST_USER_SET_FEATURES:
        this.#features = view.getBigUint64(0, true)
        return undefined
      case wire.VHOST_USER_SET_MEM_TABLE:
        this.#map(view)
        return undefined
      case wire.VHOST_USER_SET_VRING_NUM:
        this.#size = view.getUint32(4, true)
        return undefined
      case wire.VHOST_USER_SET_VRING_BASE:
        this.#last = this.#used = view.getUint32(4, true)
        return undefined
      case wire.VHOST_USER_SET_VRING_ADDR:
        this.#address = wire.readVringAddress(view, 0)
        return undefined
      case wire.VHOST_USER_SET_VRING_CALL:
        this.#call = this.#received[0] ?? -1
        return undefined
      case wire.VHOST_USER_SET_VRING_KICK:
        this.#kick = this.#received[0] ?? -1
        this.#started = true
        return undefined
      case wire.VHOST_USER_GET_VRING_BASE: {
        const base = new Uint8Array(8)
        new DataView(base.buffer).setUint32(4, this.#last, true)
        this.#started = false
        return base
      }
      case wire.VHOST_USER_GET_CONFIG: {
        const [offset, size] = [view.getUint32(0, true), view.getUint32(4, true)]
        if (offset + size > CONFIG.length) return new Uint8Array(0)
        const out = new Uint8Array(12 + size)
        out.set(this.#buffer.subarray(12, 24))
        out.set(CONFIG.subarray(offset, offset + size), 12)
        return out
      }
      default:
        return undefined
    }
  }

  #map(view: DataView): void {
    for (const region of this.#regions) native.release(region.mapping.address)
    this.#regions = this.#received.map((fd, i) => {
      const region = wire.readMemoryRegion(view, 8 + 32 * i)
      const offset = Number(region.mmapOffset)
      const mapping = native.mapFile(fd, 0, offset + Number(region.size), offset, Number(region.size), true)
      native.close(fd)
      if (typeof mapping === 'number') throw new Error(`mmap: ${mapping}`)
      return { ...region, mapping }
    })
  }

  #uva(address: bigint, length: number): DataView {
    const region = this.#regions.find((one) => address >= one.userAddress && address < one.userAddress + one.size)
    if (region === undefined) throw new Error('no region')
    return new DataView(region.mapping.buffer, Number(address - region.userAddress), length)
  }

  /** Byte positions of a guest range; it may straddle regions. */
  #each(gpa: bigint, length: number, visit: (bytes: Uint8Array) => void): void {
    let [at, left] = [gpa, length]
    while (left > 0) {
      const region = this.#regions.find((one) => at >= one.guestAddress && at < one.guestAddress + one.size)
      if (region === undefined) return
      const count = Math.min(left, Number(region.guestAddress + region.size - at))
      visit(new Uint8Array(region.mapping.buffer, Number(at - region.guestAddress), count))
      at += BigInt(count)
      left -= count
    }
  }

  #ring(): void {
    const address = this.#address
    if (address === undefined) return
    const avail = this.#uva(address.available, 6 + 2 * this.#size)
    const used = this.#uva(address.used, 6 + 8 * this.#size)
    const desc = this.#uva(address.descriptor, 16 * this.#size)
    const mask = this.#size - 1
    const before = this.#used
    while (this.#last !== avail.getUint16(2, true)) {
      if (fault === 'stops-at-wrap' && this.#last === 0xffff) return
      const head = avail.getUint16(4 + 2 * (this.#last & mask), true)
      this.#last = (this.#last + 1) & 0xffff
      const written = this.#request(desc, head)
      const at = 4 + 8 * (this.#used & mask)
      used.setUint32(at, head, true)
      used.setUint32(at + 4, fault === 'wrong-used-length' ? 0 : written, true)
      this.#used = (this.#used + 1) & 0xffff
      used.setUint16(2, this.#used, true)
    }
    used.setUint16(4 + 8 * this.#size, this.#last, true)
    if (this.#used === before) return
    const wanted =
      (this.#features & EVENT_IDX) === 0n
        ? avail.getUint16(0, true) === 0
        : ((this.#used - avail.getUint16(4 + 2 * this.#size, true) - 1) & 0xffff) < ((this.#used - before) & 0xffff)
    if (fault === 'loses-calls' && ++calls % 50 === 0) return
    if (wanted || fault === 'always-calls') native.eventfdWrite(this.#call, 1)
  }

  #request(ring: DataView, head: number): number {
    const readable: Uint8Array[] = []
    const writable: Uint8Array[] = []
    const walk = (table: DataView, first: number): void => {
      for (let index = first; ; index = table.getUint16(16 * index + 14, true)) {
        const gpa = table.getBigUint64(16 * index, true)
        const length = table.getUint32(16 * index + 8, true)
        const flags = table.getUint16(16 * index + 12, true)
        if ((flags & 4) !== 0) {
          this.#each(gpa, length, (bytes) => walk(new DataView(bytes.buffer, bytes.byteOffset, length), 0))
          return
        }
        this.#each(gpa, length, (bytes) => void ((flags & 2) !== 0 ? writable : readable).push(bytes))
        if ((flags & 1) === 0) return
      }
    }
    walk(ring, head)
    const out = Buffer.concat(readable)
    if (fault === 'fixed-framing' && readable[0]?.length !== 16) return 0
    const room = writable.reduce((sum, bytes) => sum + bytes.length, 0)
    const result = new Uint8Array(room)
    result[room - 1] = this.#execute(out, result.subarray(0, room - 1))
    let done = 0
    for (const bytes of writable) {
      bytes.set(result.subarray(done, done + bytes.length))
      done += bytes.length
    }
    return room
  }

  #execute(out: Buffer, data: Uint8Array): number {
    if (out.length < 16) return 1
    const type = out.readUInt32LE(0)
    let sector = out.readBigUInt64LE(8)
    if (fault === 'wraps-sectors') sector &= (1n << 54n) - 1n
    const length = type === 1 ? out.length - 16 : data.length
    const start = fault === 'wraps-sectors' ? Number((sector * 512n) & 0x3f_ffffn) : Number(sector) * 512
    if (type <= 1 && (length % 512 !== 0 || start + length > DISK.length)) return 1
    requests++
    if (type === 0) {
      data.set(DISK.subarray(start, start + length))
      if (fault === 'corrupts-reads' && requests % 100 === 0 && length > 0)
        data[length - 1] = (data[length - 1] ?? 0) ^ 1
      return 0
    }
    if (type === 1) {
      if (!(fault === 'drops-writes' && requests % 100 === 0)) DISK.set(out.subarray(16), start)
      return 0
    }
    return type === 4 ? 0 : 2
  }
}

const listener = native.listenUnix(socketPath, 0o600)
if (listener < 0) throw new Error(`listen: ${listener}`)
process.on('SIGTERM', () => process.exit(0))
for (;;) {
  await new Promise((resolve) => setTimeout(resolve, 1))
  const fd = native.accept(listener)
  if (fd >= 0) new Session(fd).serve()
}

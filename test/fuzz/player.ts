/**
 * Plays scenarios against a virtiod: sends, reads all replies, and says when one is none that a back-end may give. It owns
 * the fds and the memory that hostile front-ends show; the memory has rings with requests, so that rings run while the
 * protocol around them goes mad.
 */
import { ftruncateSync } from 'node:fs'
import { native } from '../../src/native.ts'
import { VHOST_USER_CHECK_DEVICE_STATE, VHOST_USER_GET_FEATURES } from '../../src/vhost-user/wire.ts'
import { VIRTIO_BLK_T_IN } from '../../src/virtio/blk.ts'
import { type OddFd, OddFds } from '../vhost-user/odd-fds.ts'
import type { FdKind, FuzzMessage, Scenario } from './scenario.ts'
import { Misbehaviour, type Target } from './target.ts'

export const MEMORY_BYTES = 2 ** 20
/** Where the second region begins in the file. */
export const SECOND_REGION = MEMORY_BYTES / 2
export const RING_STRIDE = 16_384
export const RINGS = 16
export const RING_ENTRIES = 64
const AVAIL = 4096
const USED = 8192
const DATA = 12_288
/** How long an answer may take. The machine may be busy; a hang is much longer. */
const PATIENCE_MS = 20_000
const EAGAIN = -11

const NO_FDS = new Int32Array(1)

/** One connection while it is open. */
export class Play {
  readonly #player: Player
  readonly #scenario: Scenario
  readonly #fd: number
  #batch = 0
  /** Requests sent and not passed by a reply yet. */
  #sent: number[] = []
  #bytes = Buffer.alloc(0)
  /** Messages that are known to have been served: those up to the last one that was answered. */
  served = 0
  /** The connection was closed by virtiod. */
  ended = false
  #synchronous = false

  constructor(player: Player, scenario: Scenario) {
    this.#player = player
    this.#scenario = scenario
    const { target } = player
    const socket = target.socketOf(scenario.device)
    this.#fd = native.connectUnix(socket)
    if (this.#fd < 0) {
      target.alive()
      throw new Misbehaviour(`${socket} takes no connection: ${this.#fd}`)
    }
  }

  /** Sends the next batch. Returns false when there is none, or virtiod closed the connection. */
  send(): boolean {
    const messages = this.#scenario.batches[this.#batch++]
    if (messages === undefined || this.ended) return false
    const last = this.#batch === this.#scenario.batches.length
    let left = last ? (this.#scenario.bytesOfLast ?? Number.POSITIVE_INFINITY) : Number.POSITIVE_INFINITY
    this.#synchronous = left === Number.POSITIVE_INFINITY
    const passing: number[] = []
    let pending: Uint8Array[] = []
    const flush = (fds: readonly number[] = []): void => {
      if (pending.length === 0) return
      const bytes = Buffer.concat(pending)
      pending = []
      if (left < bytes.length) this.#write(bytes.subarray(0, left), fds)
      else this.#write(bytes, fds)
      left = Math.max(0, left - bytes.length)
    }
    for (const message of messages) {
      const bytes = encode(message)
      this.#sent.push(message.request)
      if (message.size !== undefined) this.#synchronous = false
      const fds = (message.fds ?? []).map((kind) => this.#player.fd(kind, passing))
      if (fds.length === 0 && message.cuts === undefined) {
        pending.push(bytes)
        continue
      }
      flush()
      if (message.cuts === undefined) {
        pending.push(bytes)
        flush(fds)
        continue
      }
      let from = 0
      for (const [i, cut] of [...message.cuts, bytes.length].entries()) {
        pending.push(bytes.subarray(from, cut))
        const final = i === message.cuts.length
        flush(final ? fds.slice(i) : fds.slice(i, i + 1))
        from = cut
      }
    }
    flush()
    if (this.#synchronous) {
      this.#sent.push(VHOST_USER_GET_FEATURES)
      this.#write(encode({ request: VHOST_USER_GET_FEATURES, flags: 1, payload: '' }), [])
    }
    // Whoever still holds the other ends of pipes and channels waits for them; and files shrink when they were mapped.
    for (const fd of this.#player.shrinking.splice(0)) ftruncateSync(fd, 0)
    for (const fd of passing) native.close(fd)
    return true
  }

  /** Reads until the batch is answered, or virtiod closes the connection. @throws Misbehaviour */
  answered(): void {
    // The stream is out of step: who knows what it waits for.
    if (!this.#synchronous) return this.#read()
    const deadline = performance.now() + PATIENCE_MS
    const batch = this.#scenario.batches[this.#batch - 1] ?? []
    const may = batch.some((one) => one.request === VHOST_USER_CHECK_DEVICE_STATE)
    while (this.#sent.length > 0 && !this.ended) {
      if (native.pollIn(this.#fd, may ? 300 : 2000) === 1) {
        this.#read()
        continue
      }
      // It waits for the end of a state that never ends.
      if (may && this.#player.stateMayHang) {
        this.ended = true
        return
      }
      this.#player.target.alive()
      if (performance.now() > deadline)
        throw new Misbehaviour(`no answer to request ${this.#sent.join(', ')} in ${PATIENCE_MS} ms`)
    }
  }

  close(): void {
    native.close(this.#fd)
  }

  #write(bytes: Uint8Array, fds: readonly number[]): void {
    if (bytes.length === 0 || this.ended) return
    for (let done = 0; done < bytes.length; ) {
      const list = done === 0 && fds.length > 0 ? Int32Array.from(fds) : NO_FDS
      const sent = native.sendMessage(
        this.#fd,
        bytes,
        done,
        bytes.length - done,
        list,
        done === 0 ? fds.length : 0,
        true
      )
      if (sent <= 0) {
        // EPIPE, ECONNRESET: it hung up, which is its right. Others are ours: too many fds, say.
        if (sent !== -32 && sent !== -104) throw new Error(`sendmsg: ${sent}`)
        this.ended = true
        return
      }
      done += sent
    }
  }

  #read(): void {
    const { chunk, control } = this.#player
    for (;;) {
      const length = native.recvMessage(this.#fd, chunk, 0, chunk.length, control)
      for (let i = 0; i < (control[0] ?? 0); i++) native.close(control[2 + i] ?? -1)
      if (length === EAGAIN) return
      if (length <= 0) {
        this.ended = true
        return
      }
      this.#bytes = Buffer.concat([this.#bytes, chunk.subarray(0, length)])
      this.#parse()
    }
  }

  #parse(): void {
    let at = 0
    while (this.#bytes.length - at >= 12) {
      const request = this.#bytes.readUInt32LE(at)
      const flags = this.#bytes.readUInt32LE(at + 4)
      const size = this.#bytes.readUInt32LE(at + 8)
      if (flags !== 5 || size > 4096) throw new Misbehaviour(`a reply with flags ${flags} and ${size} bytes`)
      if (this.#bytes.length - at < 12 + size) break
      // Requests without a reply are passed over; a reply to nothing is none.
      const index = this.#sent.indexOf(request)
      if (index < 0 && this.#synchronous) throw new Misbehaviour(`a reply to ${request}, which nobody asked`)
      this.#sent.splice(0, index + 1)
      this.served += index + 1
      at += 12 + size
    }
    this.#bytes = this.#bytes.subarray(at)
  }
}

export class Player implements Disposable {
  readonly target: Target
  readonly chunk = new Uint8Array(65_536)
  readonly control = new Int32Array(2 + 64)
  /** A fd went out that may stand for a state that never ends. */
  stateMayHang = false
  /** Files that lose their pages once they were sent. */
  readonly shrinking: number[] = []
  readonly #odd = new OddFds()
  readonly #oddFds = new Map<OddFd, number>()
  readonly #files = new Map<FdKind, number>()
  readonly #memory: Buffer
  readonly #address: number

  constructor(target: Target) {
    this.target = target
    for (const [kind, bytes] of [
      ['memory', MEMORY_BYTES],
      ['other memory', MEMORY_BYTES],
      ['log area', 65_536],
      ['in-flight area', 262_144],
    ] as const) {
      this.#files.set(kind, native.memfd('virtiod-fuzz', bytes, 0))
    }
    this.#files.set('event', native.eventfd(1))
    const mapping = native.mapFile(this.#files.get('memory')!, 0, MEMORY_BYTES, 0, MEMORY_BYTES, true)
    if (typeof mapping === 'number') throw new Error(`mmap: ${mapping}`)
    this.#memory = Buffer.from(mapping.buffer)
    this.#address = mapping.address
  }

  /** Opens a connection for a scenario; the rings in memory are as it wants them. */
  begin(scenario: Scenario): Play {
    this.stateMayHang = false
    this.#layOut(scenario.packed)
    return new Play(this, scenario)
  }

  /** Plays one alone. @throws Misbehaviour */
  play(scenario: Scenario): void {
    const play = this.begin(scenario)
    try {
      while (play.send()) play.answered()
    } finally {
      play.close()
    }
  }

  /** An fd of that kind. @param passing is given those that are closed once they were sent */
  fd(kind: FdKind, passing: number[]): number {
    const file = this.#files.get(kind)
    if (file !== undefined) return file
    switch (kind) {
      case 'channel': {
        const pair = pairOf((out) => native.socketpair(out))
        passing.push(...pair)
        return pair[1]!
      }
      case 'state pipe read':
      case 'state pipe write': {
        const pair = pairOf((out) => native.socketpair(out))
        passing.push(...pair)
        native.sendMessage(pair[0]!, Buffer.from('{"writeback":true}'), 0, 18, NO_FDS, 0, false)
        return pair[kind === 'state pipe read' ? 1 : 0]!
      }
      case 'shrinking memory': {
        const fd = native.memfd('virtiod-fuzz', MEMORY_BYTES, 0)
        this.shrinking.push(fd)
        passing.push(fd)
        return fd
      }
      default: {
        if (kind === 'pipe' || kind === 'socket') this.stateMayHang = true
        const odd = kind as OddFd
        let known = this.#oddFds.get(odd)
        known ??= this.#odd.get(odd)
        this.#oddFds.set(odd, known)
        return known
      }
    }
  }

  [Symbol.dispose](): void {
    for (const fd of this.#files.values()) native.close(fd)
    native.release(this.#address)
    this.#odd[Symbol.dispose]()
  }

  /** Reads of the disk in every ring, or packets, as a card takes them. */
  #layOut(packed: boolean): void {
    const memory = this.#memory
    memory.fill(0)
    for (let ring = 0; ring < RINGS; ring++) {
      const at = ring * RING_STRIDE
      memory.writeUInt32LE(VIRTIO_BLK_T_IN, at + DATA)
      memory.writeUInt32LE(ring * 8, at + DATA + 8)
      memory.writeUInt16LE(4, at + AVAIL + 2)
      for (let i = 0; i < 4; i++) {
        memory.writeUInt16LE(3 * i, at + AVAIL + 4 + 2 * i)
        describe(memory, at + 48 * i, at + DATA, 16, 1, 3 * i + 1, packed, i)
        describe(memory, at + 48 * i + 16, at + DATA + 64, 512, 3, 3 * i + 2, packed, i)
        describe(memory, at + 48 * i + 32, at + DATA + 1024, 1, 2, 0, packed, i)
      }
    }
  }
}

/** Where the parts of ring `index` are, from the start of the memory file. */
export function ringParts(index: number): { descriptor: number; driver: number; device: number } {
  const at = (index % RINGS) * RING_STRIDE
  return { descriptor: at, driver: at + AVAIL, device: at + USED }
}

function describe(
  memory: Buffer,
  at: number,
  address: number,
  length: number,
  flags: number,
  next: number,
  packed: boolean,
  id: number
): void {
  memory.writeUInt32LE(address, at)
  memory.writeUInt32LE(length, at + 8)
  memory.writeUInt16LE(packed ? id : flags, at + 12)
  memory.writeUInt16LE(packed ? flags | 0x80 : next, at + 14)
}

function encode(message: FuzzMessage): Buffer {
  const payload = Buffer.from(message.payload, 'hex')
  const bytes = Buffer.alloc(12 + payload.length)
  bytes.writeUInt32LE(message.request, 0)
  bytes.writeUInt32LE(message.flags, 4)
  bytes.writeUInt32LE(message.size ?? payload.length, 8)
  payload.copy(bytes, 12)
  return bytes
}

function pairOf(make: (out: Int32Array) => number): readonly number[] {
  const pair = new Int32Array(2)
  const result = make(pair)
  if (result < 0) throw new Error(`socketpair: ${result}`)
  return [pair[0] ?? -1, pair[1] ?? -1]
}

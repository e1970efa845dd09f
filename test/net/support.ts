/**
 * A daemon with network cards as a child process, guests at its sockets, and what it counts. The front-end blocks this
 * thread, so nothing here waits for events: metrics are read over a plain socket.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { closeSync, mkdtempSync, openSync, readFileSync, readSync, rmSync, writeSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, afterEach, beforeAll, expect } from 'vitest'
import { type GuestMemory, layouts, type RegionLayout } from '../../src/frontend/memory.ts'
import { NetDriver, type NetDriverOptions, type ReceivedPacket, type SendOptions } from '../../src/frontend/net.ts'
import { Session } from '../../src/frontend/session.ts'
import { sleepMs } from '../../src/frontend/virtqueue.ts'
import { native } from '../../src/native.ts'
import { eventually, isAlive, memfdMappings, openFds } from '../vhost-user/backend.ts'

const main = fileURLToPath(new URL('../../src/cli/main.ts', import.meta.url))
const MIB = 2 ** 20
/** Nobody's protocol (IEEE 802 local experimental). */
const LOCAL_EXPERIMENTAL = 0x88b5

/** How the daemon moves packets: on io_uring, on plain system calls, or with a second iothread. */
export type Kind = 'io_uring' | 'emulated' | 'two iothreads'
export const KINDS: readonly Kind[] = ['io_uring', 'emulated', 'two iothreads']

export interface NetBackendOptions {
  readonly kind?: Kind
  /** Cards; default 3. */
  readonly cards?: number
  /** What they hang on; default one switch. */
  readonly link?: readonly string[]
  readonly extra?: readonly string[]
  /** Words before the command line. */
  readonly prefix?: readonly string[]
}

// A test that fails halfway must not leave a daemon behind.
const running = new Set<ChildProcess>()
process.once('exit', () => {
  for (const child of running) child.kill('SIGKILL')
})

export class NetBackend implements AsyncDisposable {
  readonly directory = mkdtempSync(join(tmpdir(), 'virtiod-net-'))
  readonly sockets: readonly string[]
  readonly process: ChildProcess
  readonly #ended: Promise<number | null>
  readonly #exchange: boolean
  #fds = 0

  constructor(options: NetBackendOptions = {}) {
    const { kind = 'io_uring', cards = 3, link = ['--switch', 's'], extra = [], prefix = [] } = options
    this.#exchange = cards > 1
    this.sockets = Array.from({ length: cards }, (_, i) => join(this.directory, `${i}.sock`))
    const sockets = this.sockets.flatMap((path) => ['--socket-path', path])
    const threads = kind === 'two iothreads' ? ['--iothreads', '2'] : []
    const flags = [...sockets, ...link, '--metrics', `unix:${join(this.directory, 'metrics')}`, ...threads, ...extra]
    const log = openSync(join(this.directory, 'log'), 'w')
    const [command, ...words] = [...prefix, process.execPath, main, 'net', ...flags]
    this.process = spawn(command!, words, {
      stdio: ['ignore', log, log],
      env: { ...process.env, VIRTIOD_IO_URING: kind === 'emulated' ? 'off' : 'on' },
    })
    closeSync(log)
    running.add(this.process)
    this.process.once('exit', () => running.delete(this.process))
    this.#ended = new Promise((resolve) => this.process.once('exit', resolve))
    try {
      const ready = (): boolean => this.log.includes('"msg":"ready"') || !this.alive
      if (!eventually(ready, 20_000) || !this.alive) throw new Error(`it does not start:\n${this.log}`)
      this.wellBehaved()
      this.wellBehaved()
      eventually(() => memfdMappings(this.pid) === 0)
      sleepMs(20)
      this.#fds = openFds(this.pid).length
    } catch (error) {
      this.discard()
      throw error
    }
  }

  get pid(): number {
    return this.process.pid!
  }

  get log(): string {
    return readFileSync(join(this.directory, 'log'), 'utf8')
  }

  get alive(): boolean {
    return isAlive(this.pid)
  }

  /** Whether a handler threw: what a guest does must never get that far. */
  get failures(): string[] {
    return this.log.split('\n').filter((line) => line.includes('the device failed'))
  }

  /** Opens a guest on each card, which all exchange a packet. */
  wellBehaved(): void {
    const guests = this.sockets.map((socket, i) => new Guest(socket, 200 + i))
    try {
      if (!this.#exchange) return
      for (const from of guests) {
        const bytes = frame({ from: from.number, size: 100 })
        from.send(bytes)
        for (const to of guests) if (to !== from) to.gets(bytes)
      }
    } finally {
      for (const guest of guests) guest.close()
    }
  }

  /** What must hold after every test: it lives, cards work, and nothing that a session had is left. */
  mustBeUnharmed(): void {
    if (!this.alive) throw new Error(`it died:\n${this.log.slice(-3000)}`)
    const { failures } = this
    if (failures.length > 0) throw new Error(`a handler threw:\n${failures.join('\n').slice(0, 3000)}`)
    this.wellBehaved()
    const settled = (): boolean => openFds(this.pid).length === this.#fds && memfdMappings(this.pid) === 0
    if (eventually(settled)) return
    throw new Error(`${openFds(this.pid).length} fds, not ${this.#fds}; ${memfdMappings(this.pid)} mappings`)
  }

  /** A sample of /metrics by its name and labels as they stand there: `net_packets_total{device="net0",…}`. */
  metrics(): Map<string, number> {
    const fd = native.connectUnix(join(this.directory, 'metrics'))
    if (fd < 0) throw new Error(`metrics: ${fd}`)
    try {
      writeSync(fd, 'GET /metrics HTTP/1.0\r\n\r\n')
      const text = readAll(fd)
      const lines = text.split('\n').filter((line) => line.startsWith('virtiod_'))
      return new Map(
        lines.map((line) => {
          const space = line.lastIndexOf(' ')
          return [line.slice('virtiod_'.length, space), Number(line.slice(space + 1))] as const
        })
      )
    } finally {
      closeSync(fd)
    }
  }

  /** Packets dropped at a queue of a card (even = to the guest), by reason; those that are 0 left out. */
  drops(card: number, queue: number): Record<string, number> {
    const start = `net_drops_total{device="${this.name(card)}",queue="${queue}",`
    const found: Record<string, number> = {}
    for (const [name, value] of this.metrics()) {
      const reason = /reason="(\w+)"/.exec(name)?.[1]
      if (name.startsWith(start) && reason !== undefined && value > 0) found[reason] = value
    }
    return found
  }

  /** Drops while `action` runs. */
  dropsDuring(card: number, queue: number, action: () => void): Record<string, number> {
    const before = this.drops(card, queue)
    action()
    const after = this.drops(card, queue)
    const grown = Object.entries(after).map(([reason, count]) => [reason, count - (before[reason] ?? 0)] as const)
    return Object.fromEntries(grown.filter(([, count]) => count > 0))
  }

  /** A counter of one queue. */
  counter(metric: string, card: number, queue: number, more = ''): number {
    const direction = queue % 2 === 0 ? 'rx' : 'tx'
    return (
      this.metrics().get(
        `net_${metric}{device="${this.name(card)}",queue="${queue}",direction="${direction}"${more}}`
      ) ?? 0
    )
  }

  /** A sample of the switch. */
  ofSwitch(metric: string, more = ''): number {
    for (const [name, value] of this.metrics())
      if (name.startsWith(`net_switch_${metric}{`) && name.includes(more)) return value
    throw new Error(`no ${metric} ${more}`)
  }

  name(card: number): string {
    return `net${card}`
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.process.kill('SIGTERM')
    const timer = setTimeout(() => this.process.kill('SIGKILL'), 5000)
    const code = await this.#ended
    clearTimeout(timer)
    const { log } = this
    rmSync(this.directory, { recursive: true, force: true })
    if (code !== 0) throw new Error(`SIGTERM ended it with ${code}:\n${log.slice(-3000)}`)
  }

  discard(): void {
    this.process.kill('SIGKILL')
    rmSync(this.directory, { recursive: true, force: true })
  }
}

/** One back-end for the tests of a block, unharmed after each of them; one that is not is replaced. */
export function netBackend(options: NetBackendOptions = {}): () => NetBackend {
  let backend: NetBackend | undefined
  beforeAll(() => {
    backend = new NetBackend(options)
  })
  afterEach(() => {
    try {
      backend!.mustBeUnharmed()
    } catch (error) {
      backend!.discard()
      backend = new NetBackend(options)
      throw error
    }
  })
  afterAll(() => backend?.[Symbol.asyncDispose]())
  return () => backend!
}

export interface GuestOptions extends NetDriverOptions {
  readonly without?: readonly number[]
  readonly withoutProtocol?: readonly number[]
  readonly memory?: readonly RegionLayout[] | GuestMemory
}

/** A guest at a card: its driver, and a MAC address made of its number. */
export class Guest implements Disposable {
  readonly session: Session
  readonly net: NetDriver
  readonly number: number
  #closed = false

  constructor(socket: string, number: number, options: GuestOptions = {}) {
    const { without = [], withoutProtocol = [], memory = layouts.single(16 * MIB), ...driver } = options
    this.number = number
    this.session = Session.open(socket, {
      queues: 0,
      timeoutMs: 5000,
      memory,
      withoutFeatures: without,
      withoutProtocolFeatures: withoutProtocol,
    })
    try {
      this.net = new NetDriver(this.session, driver)
    } catch (error) {
      this.session.close(true)
      throw error
    }
  }

  get mac(): Uint8Array {
    return mac(this.number)
  }

  /** Sends a frame; it has been used when this returns. */
  send(bytes: Uint8Array, options: SendOptions = {}): void {
    this.net.sent(this.net.send(bytes, options))
  }

  /** The next packet is this one: nothing else came before it. */
  gets(bytes: Uint8Array, queue?: number): ReceivedPacket {
    const packet = this.net.receive(undefined, queue)
    if (Buffer.compare(packet.frame, bytes) !== 0) {
      const start = (all: Uint8Array): string => Buffer.from(all.subarray(0, 48)).toString('hex')
      throw new Error(
        `guest ${this.number} got ${packet.frame.length} bytes ${start(packet.frame)}, not ${bytes.length} ${start(bytes)}`
      )
    }
    return packet
  }

  /** Takes what comes, up to this one. Returns what came before it. */
  getsAtLast(bytes: Uint8Array): ReceivedPacket[] {
    const before: ReceivedPacket[] = []
    for (;;) {
      const packet = this.net.receive()
      if (Buffer.compare(packet.frame, bytes) === 0) return before
      before.push(packet)
    }
  }

  /** Broadcasts, so that the switch learns where it is, and the others take it out of the way. */
  announce(others: readonly Guest[]): void {
    const bytes = frame({ from: this.number, size: 60 })
    this.send(bytes)
    for (const other of others) other.gets(bytes)
  }

  /** Idempotent. */
  close(abrupt = false): void {
    if (!this.#closed) this.session.close(abrupt)
    this.#closed = true
  }

  [Symbol.dispose](): void {
    this.close()
  }
}

/** Guests on the first cards of a back-end, known to the switch; number i + 1 on card i. */
export function guestsOn<const T extends readonly GuestOptions[]>(
  backend: NetBackend,
  ...options: T
): { readonly [K in keyof T]: Guest } & Disposable {
  const guests: Guest[] = []
  const close = (): void => {
    for (const guest of guests) guest.close()
  }
  try {
    for (const [i, own] of options.entries()) guests.push(new Guest(backend.sockets[i]!, i + 1, own))
    const tuple = guests as unknown as { readonly [K in keyof T]: Guest }
    return Object.assign(tuple, { [Symbol.dispose]: close })
  } catch (error) {
    close()
    throw error
  }
}

/** Each tells the others where it is. */
export function introduce(guests: readonly Guest[]): void {
  for (const guest of guests) guest.announce(guests.filter((other) => other !== guest))
}

/** 02:00:00:00:hi:lo */
export function mac(number: number): Uint8Array {
  return Uint8Array.of(2, 0, 0, number >> 16, (number >> 8) & 255, number & 255)
}

let frames = 0

/** A frame of a protocol that nobody knows, different at every call; to all without `to`. */
export function frame(options: { from: number; to?: number | Uint8Array; size: number }): Uint8Array {
  const { from, to, size } = options
  const seed = ++frames
  const bytes = new Uint8Array(size)
  for (let i = 18; i < size; i++) bytes[i] = (i * 7 + seed * 13 + (i >> 8)) & 255
  bytes.set(to === undefined ? new Uint8Array(6).fill(0xff) : typeof to === 'number' ? mac(to) : to)
  bytes.set(mac(from), 6)
  const view = new DataView(bytes.buffer)
  view.setUint16(12, LOCAL_EXPERIMENTAL)
  if (size >= 18) view.setUint32(14, seed)
  return bytes
}

/** `a` sends to `b`, and that is the next thing that `b` gets. */
export function passes(a: Guest, b: Guest, size = 100, options: SendOptions = {}): ReceivedPacket {
  const bytes = frame({ from: a.number, to: b.number, size })
  a.send(bytes, options)
  return b.gets(bytes)
}

/** The same, whatever `b` got before. */
export function passesAtLast(a: Guest, b: Guest): void {
  const bytes = frame({ from: a.number, to: b.number, size: 100 })
  a.send(bytes)
  b.getsAtLast(bytes)
}

/** What a packet was told about itself is nothing. */
export function plain(packet: ReceivedPacket): void {
  const { numBuffers: _, ...rest } = packet.header
  expect(rest).toEqual({ flags: 0, gsoType: 0, ecn: false, hdrLen: 0, gsoSize: 0, csumStart: 0, csumOffset: 0 })
}

function readAll(fd: number): string {
  const piece = Buffer.alloc(65536)
  const pieces: Buffer[] = []
  const deadline = performance.now() + 5000
  for (;;) {
    let length = 0
    try {
      length = readSync(fd, piece)
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EAGAIN' || performance.now() > deadline) throw error
      sleepMs(1)
      continue
    }
    if (length === 0) return Buffer.concat(pieces).toString()
    pieces.push(Buffer.from(piece.subarray(0, length)))
  }
}

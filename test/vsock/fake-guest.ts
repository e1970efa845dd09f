/**
 * The vsock driver of a guest, as far as tests need one: it gives buffers, sends packets as it is told (also bad ones) and hands out
 * what came. It does nothing by itself, so each test sees every packet. Host programs are Node sockets.
 */
import { mkdtempSync, rmSync } from 'node:fs'
import { createConnection, createServer, type Server, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import vsock from '../../devices/vsock/index.ts'
import * as packet from '../../devices/vsock/packet.ts'
import { type Reply, type TestDevice, type TestDeviceOptions, testDevice } from '../../src/testing/index.ts'

export const GUEST_CID = 3n
export const HOST_CID = 2n
const RX = 0
const TX = 1
const PATIENCE_MS = 10_000

export interface Packet {
  readonly srcCid: bigint
  readonly dstCid: bigint
  readonly srcPort: number
  readonly dstPort: number
  readonly type: number
  readonly op: number
  readonly flags: number
  readonly bufAlloc: number
  readonly fwdCnt: number
  /** As the header says it. */
  readonly length: number
  readonly payload: Buffer
}

export const names: Readonly<Record<number, string>> = Object.fromEntries(
  Object.entries(packet)
    .filter(([name]) => name.startsWith('VIRTIO_VSOCK_OP_'))
    .map(([name, value]) => [value, name.slice('VIRTIO_VSOCK_OP_'.length)])
)

export interface FakeGuestOptions {
  /** Buffers that are with the device at any time; 0: only what `give` gives. */
  readonly buffers?: number
  readonly bufferSize?: number
  /** Of the device. */
  readonly options?: Readonly<Record<string, unknown>>
  readonly settings?: TestDeviceOptions
}

export class FakeGuest implements AsyncDisposable {
  readonly device: TestDevice
  readonly directory: string
  /** The device's --uds-path. */
  readonly path: string
  readonly #settings: Required<Pick<FakeGuestOptions, 'buffers' | 'bufferSize'>>
  readonly #packets: Packet[] = []
  readonly #waiters: ((packet: Packet) => void)[] = []
  readonly #servers: Server[] = []
  readonly #sockets: Socket[] = []
  #ended = false

  private constructor(device: TestDevice, directory: string, path: string, options: FakeGuestOptions) {
    this.device = device
    this.directory = directory
    this.path = path
    this.#settings = { buffers: options.buffers ?? 16, bufferSize: options.bufferSize ?? 4096 + packet.HEADER_SIZE }
  }

  static async start(options: FakeGuestOptions = {}): Promise<FakeGuest> {
    const directory = mkdtempSync(join(tmpdir(), 'virtiod-vsock-'))
    const path = join(directory, 'vm.vsock')
    const device = await testDevice(vsock, {
      ...options.settings,
      options: { 'guest-cid': Number(GUEST_CID), 'uds-path': path, ...options.options },
    })
    const guest = new FakeGuest(device, directory, path, options)
    for (let i = 0; i < guest.#settings.buffers; i++) guest.give()
    return guest
  }

  // ---- the guest

  /** Gives a buffer; as many as `FakeGuestOptions.buffers` are given again by themselves. */
  give(length = this.#settings.bufferSize): void {
    this.device.give(RX, length).then(
      (bytes) => {
        if (this.#settings.buffers > 0 && !this.#ended) this.give(length)
        if (bytes.length > 0) this.#took(parse(bytes))
      },
      () => {}
    )
  }

  /** Sends a packet of a stream; what is not said is as it should be. */
  send(fields: Partial<Packet> & { readonly op: number }, payload: Uint8Array = Buffer.alloc(0)): Promise<Reply> {
    return this.raw(build({ length: payload.length, ...fields }), payload)
  }

  raw(...parts: Uint8Array[]): Promise<Reply> {
    return this.device.request(TX, parts)
  }

  /** The next packet of the device. */
  async next(): Promise<Packet> {
    const ready = this.#packets.shift()
    if (ready !== undefined) return ready
    return await new Promise((resolve, reject) => {
      const timer = setTimeout(() => reject(new Error('no packet came')), PATIENCE_MS)
      this.#waiters.push((next) => {
        clearTimeout(timer)
        resolve(next)
      })
    })
  }

  /** The next packet has to be this one. */
  async expect(op: number): Promise<Packet> {
    const next = await this.next()
    if (next.op !== op) throw new Error(`${names[next.op]} instead of ${names[op]}`)
    return next
  }

  /** A new driver: it knows of nothing, and gives the buffers that its predecessor lost. */
  forget(): void {
    this.#packets.length = 0
    for (let i = 0; i < this.#settings.buffers; i++) this.give()
  }

  /** The packets that are there. */
  takePending(): Packet[] {
    return this.#packets.splice(0)
  }

  /** Packets that came and were not asked for. */
  get pending(): readonly Packet[] {
    return this.#packets
  }

  /** A connection that the guest opens. @param fields of its packets, beside the ports */
  async connect(guestPort: number, hostPort: number, fields: Partial<Packet> = {}): Promise<GuestSocket> {
    const socket = new GuestSocket(this, guestPort, hostPort, fields)
    await socket.send(packet.VIRTIO_VSOCK_OP_REQUEST)
    await this.expect(packet.VIRTIO_VSOCK_OP_RESPONSE)
    return socket
  }

  /** Takes the REQUEST that comes next. */
  async accept(fields: Partial<Packet> = {}): Promise<GuestSocket> {
    const { srcPort, dstPort } = await this.expect(packet.VIRTIO_VSOCK_OP_REQUEST)
    const socket = new GuestSocket(this, dstPort, srcPort, fields)
    await socket.send(packet.VIRTIO_VSOCK_OP_RESPONSE)
    return socket
  }

  // ---- the host

  /** A host program that listens on a port. @returns its next connection */
  async listen(port: number): Promise<() => Promise<Socket>> {
    const sockets: Socket[] = []
    const waiters: ((socket: Socket) => void)[] = []
    const server = createServer({ allowHalfOpen: true, pauseOnConnect: true }, (socket) => {
      this.#sockets.push(socket.on('error', () => {}))
      const waiter = waiters.shift()
      if (waiter === undefined) sockets.push(socket)
      else waiter(socket)
    })
    this.#servers.push(server)
    await new Promise<void>((resolve) => server.listen(`${this.path}_${port}`, resolve))
    return () => {
      const ready = sockets.shift()
      return ready === undefined ? new Promise((resolve) => waiters.push(resolve)) : Promise.resolve(ready)
    }
  }

  /** A host program that connects and says `line`. */
  async dial(line: string | Uint8Array): Promise<Socket> {
    const socket = createConnection({ path: this.path, allowHalfOpen: true })
    this.#sockets.push(socket.on('error', () => {}))
    await new Promise((resolve) => socket.once('connect', resolve))
    socket.write(line)
    return socket
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#ended) return
    this.#ended = true
    await this.device.close()
    for (const socket of this.#sockets) socket.destroy()
    await Promise.all(this.#servers.map((server) => new Promise((resolve) => server.close(resolve))))
    rmSync(this.directory, { recursive: true })
  }

  #took(next: Packet): void {
    const waiter = this.#waiters.shift()
    if (waiter === undefined) this.#packets.push(next)
    else waiter(next)
  }
}

/** One end of a connection. */
export class GuestSocket {
  readonly guestPort: number
  readonly hostPort: number
  readonly #guest: FakeGuest
  readonly #fields: Partial<Packet>

  constructor(guest: FakeGuest, guestPort: number, hostPort: number, fields: Partial<Packet>) {
    this.#guest = guest
    this.guestPort = guestPort
    this.hostPort = hostPort
    this.#fields = fields
  }

  send(op: number, fields: Partial<Packet> = {}, payload?: Uint8Array): Promise<Reply> {
    const { guestPort, hostPort } = this
    return this.#guest.send({ srcPort: guestPort, dstPort: hostPort, ...this.#fields, ...fields, op }, payload)
  }

  write(payload: Uint8Array | string, fields: Partial<Packet> = {}): Promise<Reply> {
    return this.send(packet.VIRTIO_VSOCK_OP_RW, fields, Buffer.from(payload as Uint8Array))
  }
}

export function build(fields: Partial<Packet> & { readonly op: number }): Buffer {
  const bytes = Buffer.alloc(packet.HEADER_SIZE)
  bytes.writeBigUInt64LE(fields.srcCid ?? GUEST_CID, 0)
  bytes.writeBigUInt64LE(fields.dstCid ?? HOST_CID, 8)
  bytes.writeUInt32LE(fields.srcPort ?? 0, 16)
  bytes.writeUInt32LE(fields.dstPort ?? 0, 20)
  bytes.writeUInt32LE(fields.length ?? 0, 24)
  bytes.writeUInt16LE(fields.type ?? packet.VIRTIO_VSOCK_TYPE_STREAM, 28)
  bytes.writeUInt16LE(fields.op, 30)
  bytes.writeUInt32LE(fields.flags ?? 0, 32)
  bytes.writeUInt32LE(fields.bufAlloc ?? 65536, 36)
  bytes.writeUInt32LE(fields.fwdCnt ?? 0, 40)
  return bytes
}

function parse(given: Uint8Array): Packet {
  const bytes = Buffer.from(given)
  const length = bytes.readUInt32LE(24)
  if (bytes.length !== packet.HEADER_SIZE + length)
    throw new Error(`a packet of ${bytes.length} bytes that says it has ${length} behind its header`)
  return {
    srcCid: bytes.readBigUInt64LE(0),
    dstCid: bytes.readBigUInt64LE(8),
    srcPort: bytes.readUInt32LE(16),
    dstPort: bytes.readUInt32LE(20),
    length,
    type: bytes.readUInt16LE(28),
    op: bytes.readUInt16LE(30),
    flags: bytes.readUInt32LE(32),
    bufAlloc: bytes.readUInt32LE(36),
    fwdCnt: bytes.readUInt32LE(40),
    payload: bytes.subarray(packet.HEADER_SIZE),
  }
}

/** What a socket says until `length` bytes are there, or until its end. */
export async function read(socket: Socket, length = Number.POSITIVE_INFINITY): Promise<Buffer> {
  const parts: Buffer[] = []
  let got = 0
  while (got < length) {
    const part = socket.read() as Buffer | null
    if (part !== null) {
      parts.push(part)
      got += part.length
      continue
    }
    if (socket.readableEnded || socket.destroyed) break
    await new Promise<void>((resolve) => {
      const go = (): void => {
        socket.off('readable', go).off('end', go).off('close', go)
        resolve()
      }
      socket.on('readable', go).on('end', go).on('close', go)
    })
  }
  return Buffer.concat(parts)
}

/** Waits until something is so. */
export async function until(what: () => boolean): Promise<void> {
  for (const end = performance.now() + PATIENCE_MS; !what(); await sleep(2)) {
    if (performance.now() > end) throw new Error(`it never came to this: ${what}`)
  }
}

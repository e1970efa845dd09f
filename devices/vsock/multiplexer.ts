/**
 * All connections of a guest over its two queues: finds the connection of a packet, refuses what belongs to none, and lets the
 * connections speak in turn.
 *
 * Neither queue waits for the other, so they can't wait for each other: a transmitted packet is always taken at once,
 * because what it can cause to be said is bounded without that: a few bits per connection, and for the rest RST, of
 * which at most {@link MAX_REFUSALS} wait. (Linux's vhost-vsock has replies in a list of any length, and stops to take
 * packets while that is long.) Data of the host stays in its sockets until the guest gives room and credit.
 */
import type { Socket } from 'node:net'
import type { DeviceChain, DeviceQueue, Metric } from '../../src/device/index.ts'
import { Connection, type ConnectionOwner } from './connection.ts'
import * as packet from './packet.ts'

/** A guest that has not read so many refusals has no use for more. */
const MAX_REFUSALS = 1024

/** Ports that host programs get begin here, as Firecracker's do. */
const FIRST_HOST_PORT = 2 ** 30

/** An RST that belongs to no connection. */
interface Refusal {
  readonly type: number
  readonly srcCid: bigint
  readonly dstCid: bigint
  readonly srcPort: number
  readonly dstPort: number
}

export interface MultiplexerOptions {
  readonly guestCid: bigint
  readonly bufferSize: number
  readonly maxConnections: number
  /** The host program that is to answer on a port; undefined = there is none. Never rejects. */
  readonly dial: (port: number) => Promise<Socket | undefined>
  readonly metrics: {
    readonly connections: Metric
    readonly fromGuest: Metric
    readonly fromHost: Metric
    readonly bytesToHost: Metric
    readonly bytesToGuest: Metric
    readonly resets: Metric
  }
}

export class Multiplexer implements ConnectionOwner {
  readonly #rx: DeviceQueue
  readonly #options: MultiplexerOptions
  readonly #header = new packet.Header()
  /** Those that the guest knows, by their ports. */
  readonly #connections = new Map<string, Connection>()
  /** All that use resources. */
  readonly #alive = new Set<Connection>()
  /** Those that may have something to say, each once. */
  readonly #ready: Connection[] = []
  #refusals: Refusal[] = []
  #nextHostPort = FIRST_HOST_PORT
  /** Ends the wait for a buffer of the guest. */
  #waiting: AbortController | undefined
  #pumping = false

  constructor(rx: DeviceQueue, options: MultiplexerOptions) {
    this.#rx = rx
    this.#options = options
  }

  /** How many connections use resources: those that are over for the guest, but not yet for the host, as well. */
  get size(): number {
    return this.#alive.size
  }

  /** A packet of the guest. */
  receive(chain: DeviceChain): void {
    const { reader } = chain
    const header = this.#header
    if (reader.length < packet.HEADER_SIZE) return chain.error('malformed')
    header.read(reader)
    const { srcCid, dstCid, srcPort, dstPort, length, type, op } = header
    if (srcCid !== this.#options.guestCid || dstCid !== packet.VMADDR_CID_HOST) return this.#refuse(header, chain)
    if (type !== packet.VIRTIO_VSOCK_TYPE_STREAM) return this.#refuse(header, chain)
    const connection = this.#connections.get(key(dstPort, srcPort))
    if (op === packet.VIRTIO_VSOCK_OP_REQUEST) return this.#request(header, connection, chain)
    if (connection === undefined) return this.#refuse(header, chain)
    connection.credit(header.bufAlloc, header.fwdCnt)
    switch (op) {
      case packet.VIRTIO_VSOCK_OP_RESPONSE:
        if (!connection.accepted()) this.#violated(connection, chain)
        return
      case packet.VIRTIO_VSOCK_OP_RST:
        return this.#forget(connection)
      case packet.VIRTIO_VSOCK_OP_SHUTDOWN:
        connection.shutdown(header.flags)
        return this.#endIfOver(connection)
      case packet.VIRTIO_VSOCK_OP_RW:
        // A length that is not there: bytes of the stream would be missing.
        if (length > reader.remaining || !connection.deliver(reader, length)) return this.#violated(connection, chain)
        chain.operation('transmit', length)
        this.#options.metrics.bytesToHost.add(length)
        return
      case packet.VIRTIO_VSOCK_OP_CREDIT_UPDATE:
        return
      case packet.VIRTIO_VSOCK_OP_CREDIT_REQUEST:
        return connection.tellCredit()
      default:
        this.#violated(connection, chain)
    }
  }

  /** A host program asks for a port of the guest. @param early what it has sent behind its line */
  connect(socket: Socket, guestPort: number, early: Uint8Array): void {
    if (!this.#rx.active || this.#alive.size >= this.#options.maxConnections) {
      socket.destroy()
      return
    }
    const connection = this.#add(this.#hostPort(guestPort), guestPort, 'requested')
    this.#options.metrics.fromHost.add()
    connection.attach(socket, early)
  }

  /** The receive queue runs again. */
  restarted(): void {
    for (const connection of this.#connections.values()) if (!connection.probe()) this.#reset(connection)
  }

  /** The driver is gone. What it sent still reaches the host programs. */
  reset(): void {
    for (const connection of this.#connections.values()) this.#forget(connection)
    this.#refusals = []
    this.#ready.length = 0
    this.#waiting?.abort()
    this.#waiting = undefined
  }

  /** Ends everything. */
  close(): void {
    this.reset()
    for (const connection of this.#alive) connection.destroy()
  }

  /** The connections that the guest has to hear the end of, when another process goes on without them: [host port, guest port]. */
  save(): [number, number][] {
    const refused = this.#refusals.filter(({ dstCid }) => dstCid === this.#options.guestCid)
    return [
      ...refused.map(({ srcPort, dstPort }): [number, number] => [srcPort, dstPort]),
      ...[...this.#connections.values()].map(({ hostPort, guestPort }): [number, number] => [hostPort, guestPort]),
    ]
  }

  /** Tells the guest that these are over. */
  end(connections: Iterable<readonly [hostPort: number, guestPort: number]>): void {
    for (const [hostPort, guestPort] of connections) this.#sendReset(hostPort, guestPort)
    this.#pump()
  }

  // ---- ConnectionOwner

  ready(connection: Connection): void {
    if (!connection.queued && connection.says !== 0) {
      connection.queued = true
      this.#ready.push(connection)
    }
    this.#pump()
  }

  broken(connection: Connection): void {
    this.#reset(connection)
  }

  closed(connection: Connection): void {
    if (this.#alive.delete(connection)) this.#count()
  }

  // ---- what packets do

  #request(header: packet.Header, known: Connection | undefined, chain: DeviceChain): void {
    // A guest that was started anew uses the ports again.
    if (known !== undefined) this.#forget(known)
    if (this.#alive.size >= this.#options.maxConnections) return this.#refuse(header, chain)
    const { srcPort, dstPort } = header
    const connection = this.#add(dstPort, srcPort, 'dialing')
    connection.credit(header.bufAlloc, header.fwdCnt)
    this.#options.metrics.fromGuest.add()
    void this.#options.dial(dstPort).then((socket) => {
      if (socket === undefined) connection.unreachable()
      else connection.attach(socket)
    })
  }

  #add(hostPort: number, guestPort: number, state: 'dialing' | 'requested'): Connection {
    const connection = new Connection(hostPort, guestPort, state, this.#options.bufferSize, this)
    this.#connections.set(key(hostPort, guestPort), connection)
    this.#alive.add(connection)
    this.#count()
    return connection
  }

  #hostPort(guestPort: number): number {
    // There are far more ports than connections.
    for (;;) {
      const port = this.#nextHostPort
      this.#nextHostPort = port + 1 === 2 * FIRST_HOST_PORT ? FIRST_HOST_PORT : port + 1
      if (!this.#connections.has(key(port, guestPort))) return port
    }
  }

  #endIfOver(connection: Connection): void {
    if (connection.over) this.#reset(connection)
  }

  #violated(connection: Connection, chain: DeviceChain): void {
    chain.error('violation')
    this.#reset(connection)
  }

  #reset(connection: Connection): void {
    this.#forget(connection)
    this.#sendReset(connection.hostPort, connection.guestPort)
    this.#pump()
  }

  #forget(connection: Connection): void {
    const name = key(connection.hostPort, connection.guestPort)
    if (this.#connections.get(name) === connection) this.#connections.delete(name)
    connection.finish()
  }

  #count(): void {
    this.#options.metrics.connections.set(this.#alive.size)
  }

  /** Answers a packet by RST; an RST is never answered (virtio 1.3 §5.10.6.4). */
  #refuse({ op, type, srcCid, dstCid, srcPort, dstPort }: packet.Header, chain: DeviceChain): void {
    if (op === packet.VIRTIO_VSOCK_OP_RST) return
    chain.error('refused')
    this.#queueRefusal({ type, srcCid: dstCid, dstCid: srcCid, srcPort: dstPort, dstPort: srcPort })
    this.#pump()
  }

  #sendReset(srcPort: number, dstPort: number): void {
    const { guestCid } = this.#options
    const type = packet.VIRTIO_VSOCK_TYPE_STREAM
    this.#queueRefusal({ type, srcCid: packet.VMADDR_CID_HOST, dstCid: guestCid, srcPort, dstPort })
  }

  #queueRefusal(refusal: Refusal): void {
    if (this.#refusals.length < MAX_REFUSALS) this.#refusals.push(refusal)
  }

  // ---- the receive queue

  /** Says what there is to say, as far as the guest has buffers for it. @param given one that was waited for */
  #pump(given?: DeviceChain): void {
    // What a packet leads to (the next chunk, the end of a connection) is said in the loop that is running.
    if (this.#waiting !== undefined || this.#pumping) return
    this.#pumping = true
    try {
      this.#sayAll(given)
    } finally {
      this.#pumping = false
    }
  }

  #sayAll(given: DeviceChain | undefined): void {
    let chain = given
    while (this.#hasPacket()) {
      chain ??= this.#rx.take()
      if (chain === undefined) return this.#wait()
      // One without room for a byte of data is none that a driver of ours would give.
      if (chain.writer.length > packet.HEADER_SIZE) this.#put(chain)
      else {
        chain.error('malformed')
        chain.complete(0)
        return this.#later()
      }
      chain = undefined
    }
    // The guest reset the connection while it was waited for.
    chain?.complete(0)
  }

  #wait(): void {
    const waiting = new AbortController()
    this.#waiting = waiting
    const ended = (): boolean => {
      if (this.#waiting !== waiting) return true
      this.#waiting = undefined
      return false
    }
    // It rejects when nobody waits any more, or the device is about to be closed.
    this.#rx.next(waiting.signal).then((chain) => {
      if (ended()) chain.complete(0)
      else this.#pump(chain)
    }, ended)
  }

  /** Not at once: a driver that gives such buffers for ever would keep us here. */
  #later(): void {
    const waiting = new AbortController()
    this.#waiting = waiting
    setImmediate(() => {
      if (this.#waiting !== waiting) return
      this.#waiting = undefined
      this.#pump()
    })
  }

  #hasPacket(): boolean {
    if (this.#refusals.length > 0) return true
    const ready = this.#ready
    while (ready.length > 0) {
      const first = ready[0]!
      if (first.says !== 0) return true
      first.queued = false
      ready.shift()
    }
    return false
  }

  #put(chain: DeviceChain): void {
    const header = this.#header
    const refusal = this.#refusals.shift()
    if (refusal !== undefined) {
      Object.assign(header, refusal, RST)
      header.write(chain.writer)
      this.#options.metrics.resets.add()
      chain.operation('receive')
      return chain.complete()
    }
    const connection = this.#ready.shift()!
    const { writer } = chain
    const payload = connection.say(header, writer.length - packet.HEADER_SIZE)
    header.type = packet.VIRTIO_VSOCK_TYPE_STREAM
    header.srcCid = packet.VMADDR_CID_HOST
    header.dstCid = this.#options.guestCid
    header.srcPort = connection.hostPort
    header.dstPort = connection.guestPort
    header.write(writer)
    if (payload.length > 0) writer.bytes(payload)
    chain.operation('receive', payload.length)
    chain.complete()
    this.#options.metrics.bytesToGuest.add(payload.length)
    // Whoever has more to say comes after all others.
    if (connection.says === 0) connection.queued = false
    else this.#ready.push(connection)
    this.#endIfOver(connection)
  }
}

const RST = { op: packet.VIRTIO_VSOCK_OP_RST, length: 0, flags: 0, bufAlloc: 0, fwdCnt: 0 }

function key(hostPort: number, guestPort: number): string {
  return `${hostPort}:${guestPort}`
}

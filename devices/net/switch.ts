/**
 * A learning switch between the network cards of one daemon, and perhaps a tap. All their queues are served by one iothread,
 * so nothing is locked: a packet is looked up when it is taken from the sender's ring, copied once, from guest to guest, and
 * waits for nobody; a receiver that has no room loses it (`SwitchReceive`). It must not know rings.
 */
import type { Chain, CopyBatch, IoBuffer, QueueContext } from '../../src/device/index.ts'
import { Converter } from './converter.ts'
import type { PacketHeader } from './header.ts'
import { MacTable } from './mac-table.ts'
import { FLOODS, MAX_PORTS, type NetMessage, PORT_DROPS, type SwitchPlace, TABLE_ENTRIES } from './shared.ts'
import type { SwitchReceive } from './switch-receive.ts'
import type { Link } from './transmit.ts'
import { Uplink } from './uplink.ts'

/** Pieces of copies per native call: sixteen packets of 64 KiB in buffers of 2 KiB. */
const COPY_PIECES = 1024
/** The uplink's number in the address table. */
const UPLINK_PORT = MAX_PORTS
const MAC_BYTES = 6
/** Between two looks at the whole address table (10 µs). */
const EXPIRY_SECONDS = 30

/** One network card's side of the switch. */
export class SwitchPort {
  readonly index: number
  /** By queue pair; those whose rings are started. */
  readonly receivers: (SwitchReceive | undefined)[] = []
  /** Pairs that the driver receives on. */
  pairs: number
  /** Queue handlers that use it. */
  users = 0
  /** The source address that was learnt last, and when. */
  lastHigh = -1
  lastLow = 0
  lastSeen = 0

  constructor(index: number, pairs: number) {
    this.index = index
    this.pairs = pairs
  }

  /** The receive ring for what comes from the sender's pair: a flow stays on one ring. Undefined when none is active. */
  receiver(pair: number): SwitchReceive | undefined {
    const preferred = this.receivers[pair < this.pairs ? pair : pair % this.pairs]
    if (preferred?.active === true) return preferred
    for (let i = 0; i < this.receivers.length && i < this.pairs; i++)
      if (this.receivers[i]?.active === true) return this.receivers[i]
    return undefined
  }
}

/** The switches of this iothread. */
const switches = new Map<string, Switch>()

export class Switch {
  readonly name: string
  readonly copies: CopyBatch
  readonly converter: Converter
  readonly #counters: Float64Array
  readonly #table = new MacTable()
  readonly #ports: SwitchPort[] = []
  /** Receivers with packets that the copies are for. */
  readonly #dirty: SwitchReceive[] = []
  #uplink: Uplink | undefined
  /** Seconds, at the last batch. */
  #now = performance.now() / 1000
  #expireAt = 0
  // The destination that was looked up last: most packets of a batch go to one.
  #foundHigh = -1
  #foundLow = 0
  #foundPort = -1
  // The addresses of the frame at hand.
  #toHigh = 0
  #toLow = 0
  #fromHigh = 0
  #fromLow = 0

  private constructor(context: QueueContext, place: SwitchPlace) {
    this.name = place.name
    this.copies = context.io.copyBatch(COPY_PIECES)
    this.converter = new Converter(context, this.copies)
    this.#counters = new Float64Array(place.counters)
  }

  /** The port of a device, for one more of its queue handlers; the switch is made when there is none. */
  static join(context: QueueContext, place: SwitchPlace, pairs: number): { hub: Switch; port: SwitchPort } {
    let hub = switches.get(place.name)
    if (hub === undefined) {
      hub = new Switch(context, place)
      switches.set(place.name, hub)
    }
    if (place.uplinkFd >= 0) hub.#uplink ??= new Uplink(hub, context, place.uplinkFd)
    let port = hub.#ports.find(({ index }) => index === place.port)
    if (port === undefined) {
      port = new SwitchPort(place.port, pairs)
      hub.#ports.push(port)
    }
    port.users++
    return { hub, port }
  }

  leave(port: SwitchPort): void {
    if (--port.users > 0) return
    this.#ports.splice(this.#ports.indexOf(port), 1)
    this.#table.forget(port.index)
    this.#foundHigh = -1
    this.#counters[TABLE_ENTRIES] = this.#table.size
    if (this.#ports.length > 0) return
    switches.delete(this.name)
    this.#counters[TABLE_ENTRIES] = 0
  }

  get uplink(): Uplink | undefined {
    return this.#uplink
  }

  /** Sends the frame at `start` of a chain to where it belongs. The chain stays as it is until `flush`. */
  forwardChain(
    from: SwitchPort,
    pair: number,
    header: PacketHeader,
    chain: Chain,
    start: number,
    length: number
  ): void {
    this.#readAddresses(chain, start)
    this.#learn(from)
    const to = this.#destination()
    if (to === UPLINK_PORT) this.#uplink?.sendChain(header, chain, start, length)
    else if (to >= 0) {
      if (to !== from.index) this.#toPort(this.#port(to), pair, header, chain, start, length)
    } else {
      this.#counters[FLOODS] = this.#counters[FLOODS]! + 1
      this.#uplink?.sendChain(header, chain, start, length)
      for (let i = 0; i < this.#ports.length; i++)
        if (this.#ports[i] !== from) this.#toPort(this.#ports[i], pair, header, chain, start, length)
    }
  }

  /** The same for a frame in a buffer, from a port or (undefined) from the uplink. */
  forwardBuffer(
    from: SwitchPort | undefined,
    pair: number,
    header: PacketHeader,
    buffer: IoBuffer,
    start: number,
    length: number
  ): void {
    const { bytes } = buffer
    this.#toHigh = high(bytes, start)
    this.#toLow = low(bytes, start + 2)
    this.#fromHigh = high(bytes, start + MAC_BYTES)
    this.#fromLow = low(bytes, start + MAC_BYTES + 2)
    if (from !== undefined) this.#learn(from)
    else if (this.#table.learn(this.#fromHigh, this.#fromLow, UPLINK_PORT, this.#now)) this.#learnt()
    const to = this.#destination()
    if (to >= 0 && to !== UPLINK_PORT) {
      if (to !== from?.index) this.#bufferToPort(this.#port(to), pair, header, buffer, start, length)
      return
    }
    if (from === undefined && to === UPLINK_PORT) return
    if (from !== undefined) this.#uplink?.sendBuffer(header, buffer, start, length)
    if (to === UPLINK_PORT) return
    this.#counters[FLOODS] = this.#counters[FLOODS]! + 1
    for (const port of this.#ports) if (port !== from) this.#bufferToPort(port, pair, header, buffer, start, length)
  }

  /** A receiver got something that waits for the copies. */
  dirty(receiver: SwitchReceive): void {
    this.#dirty.push(receiver)
  }

  /** Runs the copies, and gives the receivers and the uplink what is theirs. */
  flush(): void {
    this.copies.run()
    this.#uplink?.flush()
    const dirty = this.#dirty
    for (let i = 0; i < dirty.length; i++) dirty[i]!.flush()
    dirty.length = 0
    const now = performance.now() / 1000
    this.#now = now
    if (now >= this.#expireAt) this.#expire(now)
  }

  /** The uplink could not take a packet. */
  uplinkDropped(): void {
    this.#dropped(UPLINK_PORT)
  }

  #toPort(
    port: SwitchPort | undefined,
    pair: number,
    header: PacketHeader,
    chain: Chain,
    start: number,
    length: number
  ): void {
    const receiver = port?.receiver(pair)
    if (receiver === undefined || !receiver.sendChain(header, chain, start, length)) this.#dropped(port?.index)
  }

  #bufferToPort(
    port: SwitchPort | undefined,
    pair: number,
    header: PacketHeader,
    buffer: IoBuffer,
    start: number,
    length: number
  ): void {
    const receiver = port?.receiver(pair)
    if (receiver === undefined || !receiver.sendBuffer(header, buffer, start, length)) this.#dropped(port?.index)
  }

  #dropped(port: number | undefined): void {
    if (port === undefined) return
    const counter = PORT_DROPS + port
    this.#counters[counter] = this.#counters[counter]! + 1
  }

  #port(index: number): SwitchPort | undefined {
    const ports = this.#ports
    for (let i = 0; i < ports.length; i++) if (ports[i]!.index === index) return ports[i]
    return undefined
  }

  /** The port of the destination address, -1 = all. */
  #destination(): number {
    const toHigh = this.#toHigh
    // A group address: the lowest bit of the first byte (IEEE 802 §8.2).
    if ((toHigh & 0x100) !== 0) return -1
    if (toHigh === this.#foundHigh && this.#toLow === this.#foundLow) return this.#foundPort
    const port = this.#table.find(toHigh, this.#toLow, this.#now)
    if (port >= 0) {
      this.#foundHigh = toHigh
      this.#foundLow = this.#toLow
      this.#foundPort = port
    }
    return port
  }

  #learn(port: SwitchPort): void {
    // Once per second and address is often enough.
    if (port.lastHigh === this.#fromHigh && port.lastLow === this.#fromLow && this.#now - port.lastSeen < 1) return
    if (!this.#table.learn(this.#fromHigh, this.#fromLow, port.index, this.#now)) return
    port.lastHigh = this.#fromHigh
    port.lastLow = this.#fromLow
    port.lastSeen = this.#now
    this.#learnt()
    // One that moved here is to be learnt again, at once, when it moves back.
    for (let i = 0; i < this.#ports.length; i++) if (this.#ports[i] !== port) this.#unlearn(this.#ports[i]!)
  }

  #unlearn(port: SwitchPort): void {
    if (port.lastHigh === this.#fromHigh && port.lastLow === this.#fromLow) port.lastHigh = -1
  }

  /** What aged is forgotten when it is looked for; this is for the metric, and for addresses that nobody looks for. */
  #expire(now: number): void {
    this.#expireAt = now + EXPIRY_SECONDS
    this.#table.expire(now)
    this.#learnt()
  }

  #learnt(): void {
    // The address may have moved, and with it what was found.
    this.#foundHigh = -1
    this.#counters[TABLE_ENTRIES] = this.#table.size
  }

  /** Reads both addresses once; `header.check` saw that they are there. */
  #readAddresses(chain: Chain, start: number): void {
    let segment = 0
    let at = start
    while (at >= chain.length[segment]!) at -= chain.length[segment++]!
    if (at + 2 * MAC_BYTES <= chain.length[segment]!) {
      const { bytes } = chain.regions[chain.region[segment]!]!
      const offset = chain.offset[segment]! + at
      this.#toHigh = high(bytes, offset)
      this.#toLow = low(bytes, offset + 2)
      this.#fromHigh = high(bytes, offset + MAC_BYTES)
      this.#fromLow = low(bytes, offset + MAC_BYTES + 2)
      return
    }
    this.#toHigh = (chain.readU8(start) << 8) | chain.readU8(start + 1)
    this.#toLow = swap(chain.readU32(start + 2))
    this.#fromHigh = (chain.readU8(start + MAC_BYTES) << 8) | chain.readU8(start + MAC_BYTES + 1)
    this.#fromLow = swap(chain.readU32(start + MAC_BYTES + 2))
  }
}

/** The switch as the link of a transmit queue. */
export class SwitchLink implements Link {
  readonly #hub: Switch
  readonly #port: SwitchPort
  readonly #pair: number
  readonly #announcement: IoBuffer
  readonly #plain: PacketHeader

  /** @param plain a header that asks for nothing */
  constructor(context: QueueContext, place: SwitchPlace, pairs: number, pair: number, plain: PacketHeader) {
    const { hub, port } = Switch.join(context, place, pairs)
    this.#hub = hub
    this.#port = port
    this.#pair = pair
    this.#announcement = context.io.allocate(64)
    this.#plain = plain
  }

  send(header: PacketHeader, chain: Chain, start: number, length: number): void {
    this.#hub.forwardChain(this.#port, this.#pair, header, chain, start, length)
  }

  flush(): void {
    this.#hub.flush()
  }

  message(message: NetMessage): void {
    const { frame } = message
    this.#announcement.bytes.set(frame)
    this.#hub.forwardBuffer(this.#port, this.#pair, this.#plain, this.#announcement, 0, frame.length)
    this.#hub.flush()
  }

  close(): void {
    this.#hub.leave(this.#port)
  }
}

function high(bytes: Uint8Array, at: number): number {
  return (bytes[at]! << 8) | bytes[at + 1]!
}

/** Signed, as the address table keeps it. */
function low(bytes: Uint8Array, at: number): number {
  return (bytes[at]! << 24) | (bytes[at + 1]! << 16) | (bytes[at + 2]! << 8) | bytes[at + 3]!
}

/** The bytes of a little-endian word as `low` reads them. */
function swap(word: number): number {
  return (word << 24) | ((word & 0xff00) << 8) | ((word >>> 8) & 0xff00) | (word >>> 24)
}

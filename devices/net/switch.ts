/**
 * A learning switch between the network cards of one daemon, and perhaps a tap. All their queues are served by one iothread,
 * so nothing is locked: a packet is looked up when it is taken from the sender's ring, copied once, from guest to guest, and
 * waits for nobody; a receiver that has no room loses it (`SwitchReceive`). It must not know rings.
 */
import type { Chain, CopyBatch, IoBuffer, QueueContext } from '../../src/device/index.ts'
import { Converter } from './converter.ts'
import { PacketHeader } from './header.ts'
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
/** A destination: every port. */
const ALL = -1
/** The global is a getter, which costs as much as the clock itself. */
const clock = performance
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
  // The addresses of its last frame as three words, and where it went: most frames go where the one before them went.
  word0 = 0
  word1 = 0
  word2 = 0
  to = ALL
  /** The table's state when that was looked up. */
  epoch = -1

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
  /** The same by number. */
  readonly #byIndex: (SwitchPort | undefined)[] = new Array<SwitchPort | undefined>(MAX_PORTS).fill(undefined)
  /** Receivers with packets that the copies are for. */
  readonly #dirty: SwitchReceive[] = []
  #uplink: Uplink | undefined
  /** As if the uplink were one of the cards. */
  readonly #uplinkPort = new SwitchPort(UPLINK_PORT, 1)
  /** Seconds, at the last batch. */
  #now = clock.now() / 1000
  #expireAt = 0
  /** Changes with the table, and each second, so that addresses in use don't age. */
  #epoch = 0
  #epochEnds = 0
  // The addresses of the frame at hand, as in SwitchPort.
  #word0 = 0
  #word1 = 0
  #word2 = 0

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
    if (place.uplinkFd >= 0) hub.#uplink ??= new Uplink(hub, context, place.uplinkFd, place.uplinkUso)
    let port = hub.#byIndex[place.port]
    if (port === undefined) {
      port = new SwitchPort(place.port, pairs)
      hub.#byIndex[place.port] = port
      hub.#ports.push(port)
    }
    port.users++
    return { hub, port }
  }

  leave(port: SwitchPort): void {
    if (--port.users > 0) return
    this.#ports.splice(this.#ports.indexOf(port), 1)
    this.#byIndex[port.index] = undefined
    this.#table.forget(port.index)
    this.#tableChanged()
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
    this.#readChain(chain, start)
    const to = this.#destination(from)
    if (to >= 0) {
      if (to === UPLINK_PORT) this.#uplink?.sendChain(header, chain, start, length)
      else if (to !== from.index) this.#toPort(this.#byIndex[to], pair, header, chain, start, length)
      return
    }
    this.#counters[FLOODS] = this.#counters[FLOODS]! + 1
    this.#uplink?.sendChain(header, chain, start, length)
    for (let i = 0; i < this.#ports.length; i++)
      if (this.#ports[i] !== from) this.#toPort(this.#ports[i], pair, header, chain, start, length)
  }

  /** The same for a frame in a buffer, from a port or (undefined) from the uplink. */
  forwardBuffer(
    port: SwitchPort | undefined,
    pair: number,
    header: PacketHeader,
    buffer: IoBuffer,
    start: number,
    length: number
  ): void {
    const from = port ?? this.#uplinkPort
    this.#readBytes(buffer.bytes, start)
    const to = this.#destination(from)
    if (to === from.index) return
    if (to >= 0) {
      if (to === UPLINK_PORT) this.#uplink?.sendBuffer(header, buffer, start, length)
      else this.#bufferToPort(this.#byIndex[to], pair, header, buffer, start, length)
      return
    }
    this.#counters[FLOODS] = this.#counters[FLOODS]! + 1
    if (port !== undefined) this.#uplink?.sendBuffer(header, buffer, start, length)
    for (const other of this.#ports) if (other !== port) this.#bufferToPort(other, pair, header, buffer, start, length)
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
    const now = clock.now() / 1000
    this.#now = now
    if (now >= this.#epochEnds) {
      this.#epochEnds = now + 1
      this.#epoch++
    }
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

  /** Where the frame at hand, from this port, goes: a port's number, or ALL. */
  #destination(from: SwitchPort): number {
    if (
      from.epoch !== this.#epoch ||
      from.word0 !== this.#word0 ||
      from.word1 !== this.#word1 ||
      from.word2 !== this.#word2
    )
      this.#lookUp(from)
    return from.to
  }

  #lookUp(from: SwitchPort): void {
    const word0 = this.#word0
    const word1 = this.#word1
    const word2 = this.#word2
    const fromHigh = ((word1 >>> 8) & 0xff00) | (word1 >>> 24)
    const known = this.#table.find(fromHigh, swap(word2), this.#now)
    const learnt = this.#table.learn(fromHigh, swap(word2), from.index, this.#now)
    if (learnt && known !== from.index) this.#tableChanged()
    const toHigh = ((word0 & 0xff) << 8) | ((word0 >>> 8) & 0xff)
    const toLow =
      (((word0 >>> 16) & 0xff) << 24) | ((word0 >>> 24) << 16) | ((word1 & 0xff) << 8) | ((word1 >>> 8) & 0xff)
    // A group address: the lowest bit of the first byte (IEEE 802 §8.2).
    from.to = (word0 & 1) !== 0 ? ALL : this.#table.find(toHigh, toLow, this.#now)
    from.word0 = word0
    from.word1 = word1
    from.word2 = word2
    from.epoch = this.#epoch
  }

  /** What aged is forgotten when it is looked for; this is for the metric, and for addresses that nobody looks for. */
  #expire(now: number): void {
    this.#expireAt = now + EXPIRY_SECONDS
    this.#table.expire(now)
    this.#tableChanged()
  }

  #tableChanged(): void {
    this.#epoch++
    this.#counters[TABLE_ENTRIES] = this.#table.size
  }

  /** Reads both addresses once; `header.check` saw that they are there. */
  #readChain(chain: Chain, start: number): void {
    if (start + 2 * MAC_BYTES > chain.length[0]!) {
      // The header may be in a descriptor of its own.
      this.#word0 = chain.readU32(start) | 0
      this.#word1 = chain.readU32(start + 4) | 0
      this.#word2 = chain.readU32(start + 8) | 0
      return
    }
    const region = chain.first
    const offset = chain.offset[0]! + start
    if ((offset & 3) !== 0) {
      this.#readBytes(region.bytes, offset)
      return
    }
    const { words } = region
    const word = offset / 4
    this.#word0 = words[word]! | 0
    this.#word1 = words[word + 1]! | 0
    this.#word2 = words[word + 2]! | 0
  }

  #readBytes(bytes: Uint8Array, at: number): void {
    this.#word0 = word(bytes, at)
    this.#word1 = word(bytes, at + 4)
    this.#word2 = word(bytes, at + 8)
  }
}

/** The switch as the link of a transmit queue. */
export class SwitchLink implements Link {
  readonly #hub: Switch
  readonly #port: SwitchPort
  readonly #pair: number
  readonly #announcement: IoBuffer
  /** A header that asks for nothing. */
  readonly #plain = new PacketHeader(0n)

  constructor(context: QueueContext, place: SwitchPlace, pairs: number, pair: number) {
    const { hub, port } = Switch.join(context, place, pairs)
    this.#hub = hub
    this.#port = port
    this.#pair = pair
    this.#announcement = context.io.allocate(64)
  }

  send(header: PacketHeader, chain: Chain, start: number, length: number): void {
    this.#hub.forwardChain(this.#port, this.#pair, header, chain, start, length)
  }

  flush(): void {
    this.#hub.flush()
  }

  message(message: NetMessage): void {
    if (message.kind !== 'announce') return
    const { frame } = message
    this.#announcement.bytes.set(frame)
    this.#hub.forwardBuffer(this.#port, this.#pair, this.#plain, this.#announcement, 0, frame.length)
    this.#hub.flush()
  }

  close(): void {
    this.#hub.leave(this.#port)
  }
}

/** Four bytes as a little-endian word, signed. */
function word(bytes: Uint8Array, at: number): number {
  return bytes[at]! | (bytes[at + 1]! << 8) | (bytes[at + 2]! << 16) | (bytes[at + 3]! << 24)
}

/** Bytes in reverse: a little-endian word as the address table wants it. */
function swap(little: number): number {
  return (little << 24) | ((little & 0xff00) << 8) | ((little >>> 8) & 0xff00) | (little >>> 24)
}

/**
 * A network card on a bad cable: it drops, duplicates, corrupts, delays and reorders packets, each with a probability
 * of its own. At the other end of the cable is a UDP socket, a datagram per Ethernet frame: another card of this kind,
 * QEMU's `-netdev dgram`, or a program of yours.
 *
 *   virtiod device ./mangling-nic.ts --socket-path a.sock --option local=127.0.0.1:7001 --option peer=127.0.0.1:7002 \
 *     --option drop=10 --option duplicate=5
 *   virtiod device ./mangling-nic.ts --socket-path b.sock --option local=127.0.0.1:7002 --option peer=127.0.0.1:7001
 *
 * Probabilities are in percent, and independent of each other. What chance decides follows from `seed`, for each
 * direction on its own. Metrics count the packets by direction and fate.
 */
import { createSocket } from 'node:dgram'
import * as v from 'valibot'
import { ConfigError, defineDevice, hasFeature, VIRTIO_F_VERSION_1 } from 'virtiod/device'
import {
  ETH_HEADER_SIZE,
  MAX_FRAME_SIZE,
  VIRTIO_NET_HDR_NUM_BUFFERS,
  VIRTIO_NET_HDR_SIZE,
  VIRTIO_NET_HDR_SIZE_LEGACY,
} from 'virtiod/device/virtio-net'

const percent = (description: string) =>
  v.optional(v.pipe(v.number(), v.minValue(0), v.maxValue(100), v.description(description)), 0)
const address = (description: string) =>
  v.pipe(
    v.string(),
    v.regex(/^[^:]+:\d{1,5}$/, 'Give HOST:PORT'),
    v.description(description),
    v.metadata({ placeholder: 'HOST:PORT' })
  )

const options = v.strictObject({
  local: address('The UDP socket that frames to the guest come to, and those from it come from'),
  peer: address('Where frames from the guest go to'),
  direction: v.optional(
    v.pipe(v.picklist(['both', 'in', 'out']), v.description('Which packets suffer: in = those to the guest')),
    'both'
  ),
  drop: percent('Percent of packets that are lost'),
  duplicate: percent('Percent of packets that come twice'),
  corrupt: percent('Percent of packets of which one bit is wrong, behind the Ethernet header'),
  delay: percent('Percent of packets that come late'),
  reorder: percent('Percent of packets that come behind the next one'),
  'delay-ms': v.optional(
    v.pipe(v.number(), v.integer(), v.minValue(1), v.maxValue(60_000), v.description('How late, in milliseconds')),
    100
  ),
  seed: v.optional(
    v.pipe(v.number(), v.integer(), v.minValue(0), v.description('What chance decides follows from it')),
    1
  ),
})

type Options = v.InferOutput<typeof options>
/** Packets that a direction keeps back at most; more are dropped. */
const MOST_WAITING = 1000

type Fate = 'drop' | 'duplicate' | 'corrupt' | 'delay' | 'reorder'

/** One direction of the cable. */
class Cable {
  readonly #options: Options
  readonly #deliver: (frame: Uint8Array) => void
  readonly #count: (fate: Fate) => void
  #random: number
  /** Frames that wait for the next one to pass. */
  #held: Uint8Array[] = []
  #waiting = 0

  constructor(options: Options, deliver: (frame: Uint8Array) => void, count: (fate: Fate) => void) {
    this.#options = options
    this.#deliver = deliver
    this.#count = count
    this.#random = options.seed
  }

  /** @param frame is this cable's to keep and to change */
  send(frame: Uint8Array): void {
    if (this.#strikes('drop')) return
    if (this.#strikes('corrupt') && frame.length > ETH_HEADER_SIZE) {
      const bit = Math.floor(this.#chance() * (frame.length - ETH_HEADER_SIZE) * 8)
      const at = ETH_HEADER_SIZE + (bit >> 3)
      frame[at] = (frame[at] ?? 0) ^ (1 << (bit & 7))
    }
    if (this.#strikes('duplicate')) this.#deliver(frame)
    const late = this.#strikes('delay')
    const behind = this.#strikes('reorder')
    if (late) this.#later(() => this.#deliver(frame))
    // There may be no next one.
    else if (behind && this.#later(() => this.#release())) this.#held.push(frame)
    else if (!behind) {
      this.#deliver(frame)
      this.#release()
    }
  }

  /** Returns false when too many wait: the packet is lost. */
  #later(action: () => void): boolean {
    if (this.#waiting === MOST_WAITING) {
      this.#count('drop')
      return false
    }
    this.#waiting++
    const act = (): void => {
      this.#waiting--
      action()
    }
    setTimeout(act, this.#options['delay-ms']).unref()
    return true
  }

  #release(): void {
    for (const frame of this.#held.splice(0)) this.#deliver(frame)
  }

  #strikes(fate: Fate): boolean {
    if (this.#chance() * 100 >= this.#options[fate]) return false
    this.#count(fate)
    return true
  }

  /** 0 ≤ x < 1; a linear congruential generator. */
  #chance(): number {
    this.#random = (Math.imul(this.#random, 1_664_525) + 1_013_904_223) >>> 0
    return this.#random / 2 ** 32
  }
}

export default defineDevice({
  apiVersion: 1,
  name: 'manglingnic',
  virtioId: 1,
  options,
  queues: [{ name: 'receive', kind: 'buffers' }, { name: 'transmit' }],
  errors: ['malformed'],
  metrics: [
    { name: 'packets_total', type: 'counter', labels: ['direction'], help: 'Packets that came to the cable' },
    { name: 'mangled_total', type: 'counter', labels: ['direction', 'fate'], help: 'Packets that suffered' },
    { name: 'missed_total', type: 'counter', labels: [], help: 'Packets that the guest had no buffer for' },
  ],
  qemu: { driver: 'virtio-net-pci', properties: {}, netdev: {} },

  async create(context) {
    const { options, signal } = context
    const [receive] = context.queues
    const [localHost, localPort] = options.local.split(':')
    const [peerHost, peerPort] = options.peer.split(':')
    // The successor of a handover listens before its predecessor is gone.
    const socket = createSocket({ type: 'udp4', reuseAddr: true })

    /** A card without MRG_RXBUF and offloads: the header says nothing, but has to be there (virtio 1.3 §5.1.6.1). */
    const headerSize = (): number =>
      hasFeature(context.features, VIRTIO_F_VERSION_1) ? VIRTIO_NET_HDR_SIZE : VIRTIO_NET_HDR_SIZE_LEGACY

    const toGuest = (frame: Uint8Array): void => {
      const chain = receive?.take()
      if (chain === undefined) return context.metric('missed_total').add()
      const header = headerSize()
      if (chain.writer.length < header + frame.length) {
        context.metric('missed_total').add()
        return chain.complete(0)
      }
      chain.writer.fill(header).bytes(frame)
      if (header === VIRTIO_NET_HDR_SIZE) chain.writer.seek(VIRTIO_NET_HDR_NUM_BUFFERS).u16(1)
      chain.complete()
    }
    const toPeer = (frame: Uint8Array): void => {
      // Nobody there, too large: a cable does not tell.
      if (!signal.aborted) socket.send(frame, Number(peerPort), peerHost, () => undefined)
    }
    const cable = (direction: 'in' | 'out', deliver: (frame: Uint8Array) => void): Cable => {
      const spared = { ...options, drop: 0, duplicate: 0, corrupt: 0, delay: 0, reorder: 0 }
      const suffers = options.direction === 'both' || options.direction === direction
      return new Cable(suffers ? options : spared, deliver, (fate) =>
        context.metric('mangled_total', { direction, fate }).add()
      )
    }
    const [inbound, outbound] = [cable('in', toGuest), cable('out', toPeer)]

    socket.on('message', (frame) => {
      context.metric('packets_total', { direction: 'in' }).add()
      inbound.send(frame)
    })
    await new Promise<void>((resolve, reject) => {
      socket.on('error', reject).bind(Number(localPort), localHost, resolve)
    }).catch((cause: Error) => {
      const fix = 'Give an address of this host and a free port.'
      throw new ConfigError('ERR_NIC_LOCAL', '--option local', cause.message, fix, { cause })
    })

    return {
      handle(chain) {
        const { reader } = chain
        const header = headerSize()
        const length = reader.length - header
        if (length <= 0 || length > MAX_FRAME_SIZE) return chain.error('malformed')
        context.metric('packets_total', { direction: 'out' }).add()
        outbound.send(reader.skip(header).bytes())
      },
      // While the link is down the guest's packets go nowhere, instead of waiting (vhost-user.rst "Ring states").
      discard() {},
      close: () => void socket.close(),
    }
  },
})

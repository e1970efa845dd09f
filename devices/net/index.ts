/**
 * virtio-net on a tap of the host or a switch inside the daemon: the control half. It joins the card to its link, keeps
 * the config space (virtio 1.3 §5.1.4), and tells the kernel what the driver takes. Packets are the queue half's.
 */
import {
  API_VERSION,
  ConfigError,
  type Device,
  type DeviceDefinition,
  type DeviceHost,
  type DeviceSample,
  featureSet,
  hasFeature,
  type NetworkRequests,
  type QemuDevice,
  VIRTIO_F_VERSION_1,
} from '../../src/device/index.ts'
import * as net from '../../src/device/virtio-net.ts'
import { rarpFrame } from './announce.ts'
import { CaptureTask } from './capture-task.ts'
import { headerSize } from './header.ts'
import { METRICS, queueSamples, switchSamples } from './metrics.ts'
import { macBytes, type NetOptions, netOptions, tapFds } from './options.ts'
import { allocateCounters, type NetMessage, type NetQueueData, type NetReport } from './shared.ts'
import { decodeState, encodeState } from './state.ts'
import { joinSwitch, type SwitchPort } from './switches.ts'
import { adoptTap, openTap, type Tap } from './tap.ts'

const VIRTIO_ID_NET = 1

const MIN_MTU = 68
const MAX_MTU = 65535
const MAC_SIZE = 6
/** QEMU's smallest and largest ring of a network card; more buffers take longer bursts. */
const QEMU_MIN_QUEUE_SIZE = 256
const QEMU_MAX_QUEUE_SIZE = 1024

/** What every card offers, whatever its link. */
const FEATURES = featureSet(
  net.VIRTIO_NET_F_CSUM,
  net.VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
  net.VIRTIO_NET_F_HOST_TSO4,
  net.VIRTIO_NET_F_HOST_TSO6,
  net.VIRTIO_NET_F_HOST_ECN,
  net.VIRTIO_NET_F_HOST_UFO,
  net.VIRTIO_NET_F_MRG_RXBUF,
  net.VIRTIO_NET_F_STATUS,
  net.VIRTIO_NET_F_CTRL_VQ,
  net.VIRTIO_NET_F_CTRL_RX,
  net.VIRTIO_NET_F_CTRL_MAC_ADDR,
  net.VIRTIO_NET_F_GUEST_ANNOUNCE
)

const GUEST_USO = featureSet(net.VIRTIO_NET_F_GUEST_USO4, net.VIRTIO_NET_F_GUEST_USO6)

/** What a link may leave to the driver; a switch leaves all of it. */
const GUEST_OFFLOADS =
  GUEST_USO |
  featureSet(
    net.VIRTIO_NET_F_GUEST_CSUM,
    net.VIRTIO_NET_F_GUEST_TSO4,
    net.VIRTIO_NET_F_GUEST_TSO6,
    net.VIRTIO_NET_F_GUEST_ECN,
    net.VIRTIO_NET_F_GUEST_UFO
  )

/** What decides about the packets of a tap. */
const TAP_FEATURES = GUEST_OFFLOADS | featureSet(net.VIRTIO_NET_F_MRG_RXBUF, VIRTIO_F_VERSION_1)

/** A driver with these is told by its config space to announce itself (virtio 1.3 §5.1.6.5.4). */
const SELF_ANNOUNCING = [net.VIRTIO_NET_F_GUEST_ANNOUNCE, net.VIRTIO_NET_F_STATUS, net.VIRTIO_NET_F_CTRL_VQ]

/** The card's other end: one of the two. */
type NetLink =
  | { readonly tap: Tap; readonly port?: undefined }
  | { readonly tap?: undefined; readonly port: SwitchPort }

class NetDevice implements Device<NetQueueData> {
  readonly features: bigint
  readonly numQueues: number
  readonly maxQueueSize?: number
  readonly iothreadGroup?: string
  readonly network: NetworkRequests
  readonly #options: NetOptions
  readonly #host: DeviceHost
  readonly #link: NetLink
  readonly #capture: CaptureTask | undefined
  readonly #pairs: number
  readonly #counters: SharedArrayBuffer
  /** By virtqueue: its ring is started and enabled. */
  readonly #active: boolean[]
  readonly #mac = new Uint8Array(MAC_SIZE)
  #features = 0n
  #announcing = false
  /** The pairs that a driver uses whose control queue is ours. */
  #pairsInUse = 1
  /** The GUEST features in force, when such a driver has switched them. */
  #offloads: bigint | undefined

  constructor(options: NetOptions, host: DeviceHost, link: NetLink, pairs: number, capture: CaptureTask | undefined) {
    this.#options = options
    this.#host = host
    this.#link = link
    this.#pairs = pairs
    this.#capture = capture
    this.numQueues = pairs * 2 + 1
    this.#active = new Array<boolean>(this.numQueues).fill(false)
    this.#counters = allocateCounters(this.numQueues)
    if (options['queue-size'] !== undefined) this.maxQueueSize = options['queue-size']
    if (options.switch !== undefined) this.iothreadGroup = `net:${options.switch}`
    const guest = link.tap?.features ?? GUEST_OFFLOADS
    this.features =
      FEATURES |
      guest |
      featureSet(
        ...((guest & GUEST_USO) === GUEST_USO ? [net.VIRTIO_NET_F_HOST_USO] : []),
        ...(options.mtu === undefined ? [] : [net.VIRTIO_NET_F_MTU]),
        ...(options.mac === undefined ? [] : [net.VIRTIO_NET_F_MAC]),
        ...(pairs > 1 ? [net.VIRTIO_NET_F_MQ] : [])
      )
    this.network = { setMtu: (mtu) => this.#setMtu(mtu), announce: (mac) => this.#announce(mac) }
    this.reset()
  }

  get queueData(): NetQueueData {
    const { tap, port } = this.#link
    return {
      pairs: this.#pairs,
      tapFds: tap?.fds ?? [],
      place: port?.place,
      pairsInUse: this.#pairsInUse,
      offloads: this.#offloads,
      mtu: tap?.mtu ?? this.#options.mtu ?? MAX_MTU,
      counters: this.#counters,
      captures: this.#capture?.buffers ?? [],
    }
  }

  config(): Uint8Array {
    const bytes = new Uint8Array(net.VIRTIO_NET_CONFIG_SIZE)
    const view = new DataView(bytes.buffer)
    const status = net.VIRTIO_NET_S_LINK_UP | (this.#announcing ? net.VIRTIO_NET_S_ANNOUNCE : 0)
    bytes.set(this.#mac, net.VIRTIO_NET_CONFIG_MAC)
    view.setUint16(net.VIRTIO_NET_CONFIG_STATUS, status, true)
    view.setUint16(net.VIRTIO_NET_CONFIG_MAX_VIRTQUEUE_PAIRS, this.#pairs, true)
    view.setUint16(net.VIRTIO_NET_CONFIG_MTU, this.#options.mtu ?? 0, true)
    return bytes
  }

  /** Only the MAC may be written, and only by legacy drivers (virtio 1.3 §5.1.4.3), which do it byte by byte. */
  writeConfig(offset: number, bytes: Uint8Array): boolean {
    const legacy = !hasFeature(this.#features, VIRTIO_F_VERSION_1)
    if (!legacy || bytes.length === 0 || offset + bytes.length > MAC_SIZE) return false
    this.#mac.set(bytes, offset)
    return true
  }

  negotiated(features: bigint): void {
    const changed = features ^ this.#features
    this.#features = features
    // Front-ends repeat SET_FEATURES, e.g. to log writes, and the driver may have switched offloads meanwhile.
    if ((changed & TAP_FEATURES) !== 0n) {
      this.#offloads = undefined
      this.#link.tap?.setFeatures(features)
    }
    this.#attachQueues()
  }

  reset(): void {
    this.#features = 0n
    this.#announcing = false
    this.#pairsInUse = 1
    this.#offloads = undefined
    this.#active.fill(false)
    this.#mac.set(macBytes(this.#options) ?? new Uint8Array(MAC_SIZE))
    this.#link.tap?.setFeatures(0n)
    this.#attachQueues()
  }

  /** What the driver commanded, beside its features, which decide about the tap. */
  saveState(): Uint8Array {
    return encodeState({
      features: this.#features,
      mac: this.#mac,
      announcing: this.#announcing,
      pairsInUse: this.#pairsInUse,
      offloads: this.#offloads,
      capturing: this.#capture?.started === true,
    })
  }

  /** @throws Error when it is no state of such a card */
  loadState(bytes: Uint8Array): void {
    const state = decodeState(bytes, this.#pairs)
    this.#features = state.features
    this.#mac.set(state.mac)
    this.#announcing = state.announcing
    this.#pairsInUse = state.pairsInUse
    this.#offloads = state.offloads
    // SET_FEATURES may come before or after it: with the same features it changes nothing any more.
    this.#link.tap?.setFeatures(state.features)
    if (state.offloads !== undefined) this.#link.tap?.setOffloads(state.offloads)
    this.#attachQueues()
    if (state.capturing) this.#capture?.continue()
  }

  letGo(): void {
    this.#capture?.letGo()
  }

  takeBack(): void {
    this.#capture?.takeOver()
  }

  takeOver(): void {
    this.#link.tap?.takeOver()
    this.#link.port?.takeOver()
    this.#capture?.takeOver()
  }

  ringActive(queueIndex: number, active: boolean): void {
    this.#active[queueIndex] = active
    if (active) this.#capture?.start()
    this.#attachQueues()
  }

  /** By the control queue, which has checked it. */
  reported(queueIndex: number, message: unknown): void {
    const report = message as NetReport
    switch (report.kind) {
      case 'pairs':
        this.#pairsInUse = report.pairs
        this.#attachQueues()
        break
      case 'offloads':
        this.#offloads = report.features
        this.#link.tap?.setOffloads(report.features)
        break
      case 'mac':
        this.#mac.set(report.mac)
        break
      case 'announced':
        this.#announcing = false
        break
      case 'linkFailed':
        this.#host.log.warn(
          { tap: this.#link.tap?.name, errno: -report.result },
          'the tap gives no packets: it is down or gone'
        )
        return
    }
    this.#host.send(queueIndex, { kind: 'done' } satisfies NetMessage)
  }

  *samples(): Iterable<DeviceSample> {
    const active = (queue: number): boolean => this.#active[queue]! && queue !== this.#controlQueue
    yield* queueSamples({ counters: this.#counters, pairs: this.#pairs, active })
    const { port } = this.#link
    if (port !== undefined) yield* switchSamples(port.place, port.first, this.#host.name)
  }

  qemu(): QemuDevice {
    const pairs = this.#pairs
    const size = this.maxQueueSize ?? QEMU_MAX_QUEUE_SIZE
    if (size < QEMU_MIN_QUEUE_SIZE) {
      const problem = `QEMU's network card has rings of ${QEMU_MIN_QUEUE_SIZE} or more`
      throw new ConfigError('ERR_OPTION_CONFLICT', '--queue-size', problem, 'Leave it away for QEMU.')
    }
    const { mac, mtu } = this.#options
    return {
      driver: 'virtio-net-pci',
      properties: {
        ...(mac === undefined ? {} : { mac }),
        // A vector per queue, one for the control queue, one for the config space.
        ...(pairs === 1 ? {} : { mq: 'on', vectors: pairs * 2 + 2 }),
        rx_queue_size: Math.min(size, QEMU_MAX_QUEUE_SIZE),
        tx_queue_size: Math.min(size, QEMU_MAX_QUEUE_SIZE),
        ...(mtu === undefined ? {} : { host_mtu: mtu }),
      },
      netdev: { queues: pairs },
    }
  }

  close(): void {
    this.#capture?.close()
    this.#link.tap?.close()
    this.#link.port?.leave()
  }

  /** Without MQ a driver has one pair, and the control queue behind it (virtio 1.3 §5.1.2). */
  get #controlQueue(): number {
    return hasFeature(this.#features, net.VIRTIO_NET_F_MQ) ? this.#pairs * 2 : 2
  }

  /**
   * The kernel spreads packets over the queues that take part: those whose receive ring is active. A front-end that keeps
   * the control queue (QEMU) enables the rings that the driver uses; else the driver says how many pairs these are.
   */
  #attachQueues(): void {
    const { tap } = this.#link
    if (tap === undefined) return
    const mq = hasFeature(this.#features, net.VIRTIO_NET_F_MQ)
    const limit = !mq ? 1 : this.#active[this.#controlQueue] ? this.#pairsInUse : this.#pairs
    for (let pair = 0; pair < this.#pairs; pair++) tap.setAttached(pair, pair < limit && this.#active[pair * 2]!)
  }

  /** With `--mtu` the operator has decided; else the tap follows. */
  #setMtu(mtu: number): boolean {
    if (mtu < MIN_MTU || mtu > MAX_MTU) return false
    if (this.#options.mtu !== undefined) return mtu <= this.#options.mtu
    return this.#link.tap === undefined || this.#link.tap.tryMtu(mtu)
  }

  #announce(mac: Uint8Array): void {
    if (SELF_ANNOUNCING.every((bit) => hasFeature(this.#features, bit))) {
      this.#announcing = true
      this.#host.configChanged()
      return
    }
    const frame = rarpFrame(mac)
    const { tap } = this.#link
    if (tap === undefined) {
      const message: NetMessage = { kind: 'announce', frame }
      this.#host.send(1, message)
      return
    }
    const result = tap.write(frame, headerSize(this.#features))
    if (result < 0) this.#host.log.debug({ tap: tap.name, result }, 'the announcement of the guest did not get out')
  }
}

/** Opens the tap, or joins the switch. @throws ConfigError */
function open(options: NetOptions, host: DeviceHost): NetDevice {
  const fds = tapFds(options)
  const pairs = options['queue-pairs'] ?? Math.max(1, fds.length)
  const link = openLink(options, host, fds, pairs)
  try {
    const { pcap } = options
    const capture = pcap === undefined ? undefined : new CaptureTask({ ...options, pcap }, pairs * 2, host)
    return new NetDevice(options, host, link, pairs, capture)
  } catch (error) {
    link.tap?.close()
    link.port?.leave()
    throw error
  }
}

function openLink(options: NetOptions, host: DeviceHost, fds: readonly number[], pairs: number): NetLink {
  const { tap, switch: name, uplink, bridge, mtu } = options
  if (name !== undefined) {
    const port = joinSwitch(host, { name, uplink, bridge, mtu })
    host.log.info({ switch: name, port: port.number, queues: pairs }, 'joined the switch')
    return { port }
  }
  if (tap !== undefined) return { tap: openTap(host, '--tap', tap, pairs, { bridge, mtu }) }
  return { tap: adoptTap(host, fds, { bridge, mtu }) }
}

const definition: DeviceDefinition<NetOptions, NetQueueData> = {
  apiVersion: API_VERSION,
  name: 'net',
  virtioId: VIRTIO_ID_NET,
  options: netOptions,
  operations: [],
  errors: [],
  metrics: METRICS,
  queueModule: new URL('./queue.ts', import.meta.url),
  open,
}

export default definition

/**
 * A tap's queues on the control thread: opening them or taking them over, what is told to the kernel about the reader
 * of the packets (header size, offloads, which queues take part), and leaving the tap as it was found. Packets move on
 * the iothreads. It must not know rings, switches or the config space.
 */
import { closeSync, readFileSync } from 'node:fs'
import {
  ConfigError,
  type DeviceHost,
  featureSet,
  hasFeature,
  type LinkInfo,
  type TapInfo,
} from '../../src/device/index.ts'
import * as net from '../../src/device/virtio-net.ts'
import { headerSize } from './header.ts'
import { errorName, openRefusal, type Refusal } from './tap-errors.ts'

/** Of virtio 1.3 §5.1.4.1. The kernel's taps have 65521 at most. */
const MAX_MTU = 65535

// TUN_F_* of <linux/if_tun.h>: what the reader of a tap copes with.
const TUN_F_CSUM = 0x01
const TUN_F_TSO4 = 0x02
const TUN_F_TSO6 = 0x04
const TUN_F_TSO_ECN = 0x08
const TUN_F_UFO = 0x10
/** Linux 6.2 and newer, and only both together. */
const TUN_F_USO = 0x20 | 0x40

const EBUSY = -16
const ENODEV = -19
const EINVAL = -22

/** Where a tap came from: it decides what is done to it at the end. */
type Origin = 'created' | 'existing' | 'inherited'

export class Tap {
  readonly name: string
  /** One per queue pair, non-blocking. */
  readonly fds: readonly number[]
  readonly origin: Origin
  /** Its queues can be attached and detached. */
  readonly multiQueue: boolean
  /** What the kernel can leave to the reader of the tap: feature bits VIRTIO_NET_F_GUEST_*. */
  readonly features: bigint
  readonly #host: DeviceHost
  /** Under which a successor gets it. */
  readonly #key: string
  readonly #headerSizeBefore: number
  // What the kernel is told, or will be by `takeOver`.
  readonly #attached: boolean[]
  #headerSize: number
  #offloads = 0
  /** A predecessor still reads the tap: it stays as it is until `takeOver`. */
  #held: boolean
  readonly #ownsFds: boolean

  /**
   * Everything about the tap itself has been checked.
   * @param key as DeviceHost.handover takes it
   * @param before what the predecessor knew of it, whose fds these are
   */
  constructor(
    host: DeviceHost,
    key: string,
    fds: readonly number[],
    info: TapInfo,
    origin: Origin,
    before?: InheritedTap
  ) {
    this.#host = host
    this.#key = key
    this.name = info.name
    this.fds = fds
    this.origin = origin
    this.multiQueue = info.multiQueue
    this.#headerSizeBefore = before?.headerSizeBefore ?? info.headerSize
    this.#headerSize = info.headerSize
    this.#attached = fds.map(() => true)
    this.#held = before !== undefined
    this.#ownsFds = origin !== 'inherited' || before !== undefined
    this.features = before?.features ?? this.#probe()
    this.setFeatures(0n)
    const facts = { origin, headerSizeBefore: this.#headerSizeBefore, features: this.features.toString(16) }
    host.handover.keep(key, fds, facts)
  }

  /**
   * The predecessor has let go: what was asked for until now takes effect. Packets that wait stay, if they are in the
   * same format.
   */
  takeOver(): void {
    if (!this.#held) return
    this.#held = false
    const { network } = this.#host
    const infos = this.fds.map((fd) => network.tapInfo(fd))
    const reformatted = infos.some((info) => typeof info !== 'number' && info.headerSize !== this.#headerSize)
    this.#tell('header size', network.setTapHeaderSize(this.fds[0]!, this.#headerSize))
    this.#tell('offloads', network.setTapOffloads(this.fds[0]!, this.#offloads))
    if (reformatted) this.#discard()
    for (const [queue, info] of infos.entries()) {
      const wanted = this.#attached[queue]!
      if (!this.multiQueue || typeof info === 'number' || info.attached === wanted) continue
      this.#tell('queue', network.setTapQueue(this.fds[queue]!, wanted))
    }
  }

  /**
   * A driver takes the tap's packets with these features.
   * @param features VIRTIO_NET_F_GUEST_* say what is left to it, VERSION_1 and MRG_RXBUF how long headers are
   */
  setFeatures(features: bigint): void {
    this.setHeaderSize(headerSize(features))
    this.setOffloads(features)
    // What waits is as the driver before it wanted it: with longer headers, or unfinished.
    if (!this.#held) this.#discard()
  }

  /** @param size of the virtio-net header: 10 or 12 bytes */
  setHeaderSize(size: number): void {
    this.#headerSize = size
    if (!this.#held) this.#tell('header size', this.#host.network.setTapHeaderSize(this.fds[0]!, size))
  }

  /** @param features VIRTIO_NET_F_GUEST_*: what is left to the reader, as far as the kernel can */
  setOffloads(features: bigint): void {
    this.#offloads = offloads(features & this.features)
    if (!this.#held) this.#tell('offloads', this.#host.network.setTapOffloads(this.fds[0]!, this.#offloads))
  }

  /** A queue that doesn't take part gets no packets from the kernel. A tap with a single queue has it always. */
  setAttached(queue: number, attached: boolean): void {
    if (!this.multiQueue || this.#attached[queue] === attached) return
    this.#attached[queue] = attached
    if (!this.#held) this.#tell('queue', this.#host.network.setTapQueue(this.fds[queue]!, attached))
  }

  /** Of the link now, in bytes; the largest there can be when it is in another network namespace. */
  get mtu(): number {
    const link = this.#host.network.link(this.name)
    return typeof link === 'number' ? MAX_MTU : link.mtu
  }

  /**
   * Sets the link's MTU. Returns whether packets of that size pass: it has this MTU or a larger one, or nobody can
   * tell.
   */
  tryMtu(mtu: number): boolean {
    const { network } = this.#host
    // The link of an inherited fd may be in another network namespace, and another one of that name in ours.
    if (this.origin !== 'inherited' && network.setLinkMtu(this.name, mtu) === 0) return true
    return this.mtu >= mtu
  }

  /** Returns what writing the frame gave: bytes with the header, or -errno. */
  write(frame: Uint8Array, headerBytes: number): number {
    const packet = new Uint8Array(headerBytes + frame.length)
    packet.set(frame, headerBytes)
    return this.#host.network.writePacket(this.fds[0]!, packet)
  }

  /**
   * Lets go of it. A tap that was made here is gone with its last fd; of another one what lies between us and the
   * kernel is as it was (MTU, bridge and being up were asked for, and stay). Inherited fds are not closed: they are of
   * who opened them, unless a predecessor passed them on.
   */
  close(): void {
    this.#host.handover.forget(this.#key)
    if (this.origin !== 'created' && !this.#held) {
      for (const queue of this.fds.keys()) this.setAttached(queue, true)
      this.setHeaderSize(this.#headerSizeBefore)
      this.setOffloads(0n)
    }
    if (this.#ownsFds) for (const fd of this.fds) closeSync(fd)
  }

  #discard(): void {
    for (const fd of this.fds) this.#host.network.discardPackets(fd)
  }

  /** Which offloads the kernel knows: it refuses what it does not. */
  #probe(): bigint {
    const known = OFFLOADS.filter(({ flags }) => this.#host.network.setTapOffloads(this.fds[0]!, flags) === 0)
    return featureSet(...known.flatMap(({ bits }) => bits))
  }

  /** None of this fails on a tap that is there; a tap that was removed (`ip link delete`) takes no packets either. */
  #tell(what: string, result: number): void {
    if (result >= 0) return
    const details = { tap: this.name, what, error: errorName(result) }
    this.#host.log.debug(details, 'the kernel refused a setting of the tap')
  }
}

/** Feature bits and the flags that it takes to probe for them: all need CSUM, ECN needs a TSO. */
const OFFLOADS: readonly { readonly bits: readonly number[]; readonly flags: number }[] = [
  { bits: [net.VIRTIO_NET_F_GUEST_CSUM], flags: TUN_F_CSUM },
  { bits: [net.VIRTIO_NET_F_GUEST_TSO4], flags: TUN_F_CSUM | TUN_F_TSO4 },
  { bits: [net.VIRTIO_NET_F_GUEST_TSO6], flags: TUN_F_CSUM | TUN_F_TSO6 },
  { bits: [net.VIRTIO_NET_F_GUEST_ECN], flags: TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO_ECN },
  { bits: [net.VIRTIO_NET_F_GUEST_UFO], flags: TUN_F_CSUM | TUN_F_UFO },
  { bits: [net.VIRTIO_NET_F_GUEST_USO4, net.VIRTIO_NET_F_GUEST_USO6], flags: TUN_F_CSUM | TUN_F_USO },
]

/** TUN_F_* for what a driver negotiated; without GUEST_CSUM the others are not valid (virtio 1.3 §5.1.3.1). */
export function offloads(features: bigint): number {
  const has = (bit: number): boolean => hasFeature(features, bit)
  if (!has(net.VIRTIO_NET_F_GUEST_CSUM)) return 0
  let flags = TUN_F_CSUM
  if (has(net.VIRTIO_NET_F_GUEST_TSO4)) flags |= TUN_F_TSO4
  if (has(net.VIRTIO_NET_F_GUEST_TSO6)) flags |= TUN_F_TSO6
  // The kernel refuses ECN without a TSO.
  if (has(net.VIRTIO_NET_F_GUEST_ECN) && (flags & (TUN_F_TSO4 | TUN_F_TSO6)) !== 0) flags |= TUN_F_TSO_ECN
  if (has(net.VIRTIO_NET_F_GUEST_UFO)) flags |= TUN_F_UFO
  if (has(net.VIRTIO_NET_F_GUEST_USO4) && has(net.VIRTIO_NET_F_GUEST_USO6)) flags |= TUN_F_USO
  return flags
}

/** How a link is to be. */
export interface LinkSettings {
  readonly bridge?: string | undefined
  readonly mtu?: number | undefined
}

/**
 * Opens `pairs` queues of a tap, which is created when there is none of that name, and sets it up.
 * @param option that named it, for errors
 * @throws ConfigError
 */
export function openTap(host: DeviceHost, option: string, name: string, pairs: number, settings: LinkSettings): Tap {
  const key = `tap:${name}`
  const passedOn = inheritTap(host, option, key, pairs)
  if (passedOn !== undefined) return passedOn
  const { network } = host
  const link = network.link(name)
  const exists = typeof link !== 'number'
  const refuse = (result: number): ConfigError => configError(option, openRefusal(name, exists, pairs, result))
  // The kernel refuses a second reader of a single queue, but lets any number share a multi-queue tap.
  if (exists && hasReader(name, link)) throw refuse(EBUSY)
  const fds: number[] = []
  try {
    fds.push(openFirst(host, option, name, exists, pairs))
    while (fds.length < pairs) {
      const fd = network.openTap(name, true)
      if (fd < 0) throw refuse(fd)
      fds.push(fd)
    }
    const info = network.tapInfo(fds[0]!)
    if (typeof info === 'number') throw refuse(info)
    const kind = kindProblem(info)
    if (kind !== undefined) throw configError(option, kind)
    setUp(host, option, name, settings)
    const tap = new Tap(host, key, fds, info, exists ? 'existing' : 'created')
    host.log.info({ tap: name, queues: pairs, created: !exists }, 'tap opened')
    return tap
  } catch (error) {
    for (const fd of fds) closeSync(fd)
    throw error
  }
}

/** An existing tap has been made for one queue or for several: the kernel wants to be asked for what it is. */
function openFirst(host: DeviceHost, option: string, name: string, exists: boolean, pairs: number): number {
  const { network } = host
  const fd = network.openTap(name, pairs > 1)
  if (fd >= 0) return fd
  const refuse = (result: number): ConfigError => configError(option, openRefusal(name, exists, pairs, result))
  if (fd !== EINVAL || !exists) throw refuse(fd)
  const other = network.openTap(name, pairs === 1)
  if (other < 0) throw refuse(other)
  if (pairs === 1) return other
  closeSync(other)
  throw configError(option, [
    'ERR_NET_TAP_QUEUES',
    `${name} has a single queue, and --queue-pairs asks for ${pairs}`,
    `Leave --queue-pairs away, or make the tap anew: ip link delete ${name} && ip tuntap add ${name} mode tap vnet_hdr multi_queue user USER`,
  ])
}

/**
 * Takes over fds of one tap that somebody else opened; they stay his.
 * @throws ConfigError
 */
export function adoptTap(host: DeviceHost, fds: readonly number[], settings: LinkSettings): Tap {
  const { network } = host
  const option = '--tap-fd'
  const key = `tap-fd:${fds.join()}`
  const passedOn = inheritTap(host, option, key, fds.length)
  if (passedOn !== undefined) return passedOn
  const fail = (problem: string, fix: string): ConfigError => configError(option, ['ERR_NET_TAP_FD', problem, fix])
  let first: TapInfo | undefined
  for (const [index, fd] of fds.entries()) {
    const info = network.tapInfo(fd)
    if (typeof info === 'number') {
      const code = errorName(info)
      const problem = code === 'EBADF' ? `fd ${fd} is not open` : `fd ${fd} is no open tap (${code})`
      throw fail(problem, 'Give the number of an fd of /dev/net/tun that TUNSETIFF has attached to a tap.')
    }
    const kind = kindProblem(info)
    if (kind !== undefined) throw configError(option, kind)
    first ??= info
    if (info.name !== first.name) {
      throw fail(`fd ${fds[0]} is of the tap ${first.name}, fd ${fd} of ${info.name}`, 'Give fds of one tap.')
    }
    const twin = fds.indexOf(fd)
    if (twin !== index) throw fail(`fd ${fd} is given twice`, 'Give one fd per queue pair.')
    const result = network.setNonblocking(fd)
    if (result < 0) throw fail(`fd ${fd} can't be made non-blocking (${errorName(result)})`, 'Open it anew.')
  }
  if (fds.length > 1) refuseTwins(host, fds, fail)
  setUpInherited(host, option, first!.name, settings)
  const tap = new Tap(host, key, fds, first!, 'inherited')
  host.log.info({ tap: first!.name, queues: fds.length, fds }, 'tap taken over')
  return tap
}

/** What a tap's predecessor knew of it. */
interface InheritedTap {
  readonly headerSizeBefore: number
  readonly features: bigint
}

/**
 * The tap that a predecessor passed on under `key`, which has set it up and still serves with it; undefined when it
 * passed none on.
 * @throws ConfigError when it is not what is asked for
 */
function inheritTap(host: DeviceHost, option: string, key: string, pairs: number): Tap | undefined {
  const inherited = host.handover.take(key)
  if (inherited === undefined) return undefined
  const { fds } = inherited
  try {
    const { origin, headerSizeBefore, features } = (inherited.facts ?? {}) as Record<string, unknown>
    const info = fds.length === pairs ? host.network.tapInfo(fds[0]!) : EINVAL
    if (
      typeof info === 'number' ||
      (origin !== 'created' && origin !== 'existing' && origin !== 'inherited') ||
      typeof headerSizeBefore !== 'number' ||
      typeof features !== 'string' ||
      !/^[0-9a-f]{1,16}$/.test(features)
    ) {
      const problem = `the tap that the process before this one passed on (${key}) is not the one that is asked for`
      throw configError(option, ['ERR_NET_TAP_OPEN', problem, 'Stop virtiod and start it again.'])
    }
    const tap = new Tap(host, key, fds, info, origin, { headerSizeBefore, features: BigInt(`0x${features}`) })
    host.log.info({ tap: info.name, queues: pairs }, 'tap taken over from the process before this one')
    return tap
  } catch (error) {
    for (const fd of fds) closeSync(fd)
    throw error
  }
}

/** Two fds of one open file are one queue: its second detaching fails. Leaves all attached. */
function refuseTwins(
  { network }: DeviceHost,
  fds: readonly number[],
  fail: (problem: string, fix: string) => ConfigError
): void {
  // Some may have been handed over detached.
  for (const fd of fds) network.setTapQueue(fd, true)
  const twin = fds.find((fd) => network.setTapQueue(fd, false) === EINVAL)
  for (const fd of fds) network.setTapQueue(fd, true)
  if (twin !== undefined) throw fail(`fd ${twin} is the same queue as one before it`, 'Open the tap once per queue.')
}

/** Taps whose packets have another format. */
function kindProblem(info: TapInfo): Refusal | undefined {
  if (info.tun) return ['ERR_NET_TAP_KIND', `${info.name} is a tun, which has no Ethernet`, 'Give a tap.']
  if (info.packetInfo || !info.vnetHeader) {
    const problem = info.packetInfo ? 'has packet-information headers' : 'has no virtio-net headers'
    const fix = 'Open it with IFF_NO_PI and IFF_VNET_HDR; all who share a multi-queue tap have to.'
    return ['ERR_NET_TAP_HEADER', `${info.name} ${problem}`, fix]
  }
  return undefined
}

/** @throws ConfigError when the link can't be had as it is asked for */
function setUp(host: DeviceHost, option: string, name: string, { bridge, mtu }: LinkSettings): void {
  const { network } = host
  const link = network.link(name)
  if (typeof link === 'number') throw configError(option, openRefusal(name, true, 1, link))
  if (mtu !== undefined && link.mtu !== mtu) {
    const result = network.setLinkMtu(name, mtu)
    if (result < 0) throw configError('--mtu', mtuError(name, mtu, result))
  }
  if (bridge !== undefined) putOnBridge(host, bridge, name, link.master)
  if (link.up) return
  const result = network.setLinkUp(name, true)
  if (result < 0) {
    const problem = `${name} is down, and this user can't set it up (${errorName(result)})`
    throw configError(option, ['ERR_NET_TAP_LINK', problem, `Do it as root: ip link set ${name} up`])
  }
}

/**
 * Who opened it has set it up, perhaps in another network namespace, where its name is not ours to use: only what was
 * asked for is done.
 */
function setUpInherited(host: DeviceHost, option: string, name: string, settings: LinkSettings): void {
  const link = host.network.link(name)
  if (settings.bridge === undefined && settings.mtu === undefined) {
    if (typeof link !== 'number' && !link.up) host.log.warn({ tap: name }, 'the tap is down: no packet will pass')
    return
  }
  if (link === ENODEV) {
    const asked = settings.mtu === undefined ? '--bridge' : '--mtu'
    const problem = `${name}, the tap of ${option}, is not in this network namespace`
    const fix = `Leave ${asked} away, and let who opens the tap set it up.`
    throw configError(asked, ['ERR_NET_TAP_LINK', problem, fix])
  }
  setUp(host, option, name, settings)
}

function mtuError(name: string, mtu: number, result: number): Refusal {
  const code = errorName(result)
  const problem = `${name} can't be given an MTU of ${mtu} (${code})`
  if (code === 'EPERM') return ['ERR_NET_MTU', problem, `Do it as root: ip link set ${name} mtu ${mtu}`]
  return ['ERR_NET_MTU', problem, 'Give 68 to 65521.']
}

function putOnBridge(host: DeviceHost, bridge: string, name: string, master: number): void {
  const { network } = host
  const fail = (problem: string, fix: string): ConfigError => configError('--bridge', ['ERR_NET_BRIDGE', problem, fix])
  const link = network.link(bridge)
  if (typeof link === 'number') {
    throw fail(`there is no ${bridge} (${errorName(link)})`, `Create it: ip link add ${bridge} type bridge`)
  }
  if (!link.bridge) throw fail(`${bridge} is no bridge`, 'Give the name of a bridge.')
  if (link.index === master) return
  const result = network.addToBridge(bridge, name)
  if (result === 0) return
  if (result === EBUSY) throw fail(`${name} is on another bridge`, `Take it off: ip link set ${name} nomaster`)
  const problem = `${name} can't be put on ${bridge} (${errorName(result)})`
  throw fail(problem, `Do it as root: ip link set ${name} master ${bridge}`)
}

/**
 * Whether somebody has the tap open: it has a carrier then. sysfs may show another network namespace's links, so it has
 * to be the same one; where it tells nothing (the tap is down, no sysfs), it is taken as free.
 */
function hasReader(name: string, { index, mac }: LinkInfo): boolean {
  const read = (file: string): string => readFileSync(`/sys/class/net/${name}/${file}`, 'latin1').trim()
  try {
    const same =
      Number(read('ifindex')) === index && read('address').replaceAll(':', '') === Buffer.from(mac).toString('hex')
    return same && read('tun_flags') !== '' && read('carrier') === '1'
  } catch {
    return false
  }
}

function configError(option: string, [code, problem, fix]: Refusal): ConfigError {
  return new ConfigError(code, option, problem, fix)
}

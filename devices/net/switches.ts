/**
 * Who is on which switch: the control half of the switches of a daemon. Each device has a port; the uplink is opened by
 * the first device that names it and goes with the last one. Forwarding is the queue half's, on the one iothread of the
 * switch. It must not know config spaces or rings.
 */
import { ConfigError, type DeviceHost, hasFeature } from '../../src/device/index.ts'
import { VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_HDR_SIZE } from '../../src/device/virtio-net.ts'
import { allocateSwitchCounters, MAX_PORTS, PORT_DROPS, type SwitchPlace } from './shared.ts'
import { openTap, type Tap } from './tap.ts'

/** What a device says of the switch it wants to be on; what it leaves away another one may say. */
export interface SwitchRequest {
  readonly name: string
  readonly uplink: string | undefined
  readonly bridge: string | undefined
  /** Of the uplink. */
  readonly mtu?: number | undefined
}

class Switch {
  readonly name: string
  readonly counters = allocateSwitchCounters()
  /** By number; undefined = free. */
  readonly ports: (SwitchPort | undefined)[] = []
  uplink: Tap | undefined
  bridge: string | undefined

  constructor(name: string) {
    this.name = name
  }
}

/** A device's place on a switch, until `leave`. */
export class SwitchPort {
  readonly number: number
  readonly #switch: Switch
  readonly #left: () => void

  /** By {@link joinSwitch}. */
  constructor(on: Switch, number: number, left: () => void) {
    this.#switch = on
    this.number = number
    this.#left = left
  }

  /** As it is now: another device may have brought the uplink. */
  get place(): SwitchPlace {
    const { name, counters, uplink } = this.#switch
    const uplinkUso = hasFeature(uplink?.features ?? 0n, VIRTIO_NET_F_GUEST_USO4)
    return { name, port: this.number, uplinkFd: uplink?.fds[0] ?? -1, uplinkUso, counters }
  }

  /** What is the whole switch's is shown by one device: that on its lowest port. */
  get first(): boolean {
    return this.#switch.ports.find((port) => port !== undefined) === this
  }

  /** The predecessor has let go of the uplink. */
  takeOver(): void {
    this.#switch.uplink?.takeOver()
  }

  /** Its queues have been stopped. */
  leave(): void {
    this.#switch.ports[this.number] = undefined
    this.#left()
  }
}

const switches = new WeakMap<object, Map<string, Switch>>()

/**
 * Puts a device on a switch, which is made when it is the first one.
 * @throws ConfigError when the switch is full, the devices disagree about the uplink, or it can't be opened
 */
export function joinSwitch(host: DeviceHost, request: SwitchRequest): SwitchPort {
  const ofDaemon = switches.get(host.daemon) ?? new Map<string, Switch>()
  switches.set(host.daemon, ofDaemon)
  const { name } = request
  const found = ofDaemon.get(name) ?? new Switch(name)
  const free = Array.from({ length: MAX_PORTS }, (_, port) => port).find((port) => found.ports[port] === undefined)
  if (free === undefined) {
    const problem = `the switch ${name} has ${MAX_PORTS} ports, and all are taken`
    throw new ConfigError('ERR_NET_SWITCH_PORTS', '--switch', problem, 'Use a second switch, or taps on a bridge.')
  }
  connect(host, found, request)
  const port = new SwitchPort(found, free, () => {
    if (found.ports.some((other) => other !== undefined)) return
    found.uplink?.close()
    ofDaemon.delete(name)
  })
  found.ports[free] = port
  // A device that had the port before took its count along.
  new Float64Array(found.counters)[PORT_DROPS + free] = 0
  ofDaemon.set(name, found)
  return port
}

/** @throws ConfigError */
function connect(host: DeviceHost, on: Switch, { uplink, bridge, mtu }: SwitchRequest): void {
  if (uplink === undefined) return
  if (on.uplink === undefined) {
    on.uplink = openTap(host, '--uplink', uplink, 1, { bridge, mtu })
    on.bridge = bridge
    // The switch takes every kind of packet; what a guest can't take it finishes itself.
    on.uplink.setHeaderSize(VIRTIO_NET_HDR_SIZE)
    on.uplink.setOffloads(on.uplink.features)
    return
  }
  if (uplink === on.uplink.name && (bridge ?? on.bridge) === on.bridge) return
  const [option, theirs, mine] =
    uplink === on.uplink.name
      ? ['--bridge', `puts its uplink on ${on.bridge ?? 'no bridge'}`, bridge]
      : ['--uplink', `has the uplink ${on.uplink.name}`, uplink]
  const problem = `the switch ${on.name} ${theirs}, by another device, and not ${mine}`
  throw new ConfigError('ERR_NET_SWITCH_UPLINK', option!, problem, 'Give it the same, or only once.')
}

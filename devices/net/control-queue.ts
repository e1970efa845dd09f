/**
 * The control queue of a driver whose front-end leaves it to the back-end (virtio 1.3 §5.1.6.5): commands in, an
 * acknowledgement out. QEMU keeps this queue for itself.
 */
import type { Chain, QueueContext, QueueHandler } from '../../src/device/index.ts'
import { featureSet, hasFeature } from '../../src/device/index.ts'
import * as net from '../../src/device/virtio-net.ts'
import type { NetMessage, NetReport } from './shared.ts'

/** Bytes before a command's own: class and command. */
const COMMAND_HEADER = 2
const MAC_SIZE = 6
/** More than any table that a driver has a reason for. */
const MAX_TABLE_ENTRIES = 4096

/** The offloads that a driver may switch (virtio 1.3 §5.1.6.5.6.1). */
const SWITCHABLE = featureSet(
  net.VIRTIO_NET_F_GUEST_CSUM,
  net.VIRTIO_NET_F_GUEST_TSO4,
  net.VIRTIO_NET_F_GUEST_TSO6,
  net.VIRTIO_NET_F_GUEST_ECN,
  net.VIRTIO_NET_F_GUEST_UFO,
  net.VIRTIO_NET_F_GUEST_USO4,
  net.VIRTIO_NET_F_GUEST_USO6
)

export class ControlQueue implements QueueHandler {
  protected readonly context: QueueContext
  readonly #pairs: number
  /** Commands in order; the first one waits for the control half. */
  readonly #waiting: Chain[] = []
  /** What the command at hand asks for. */
  #report: NetReport | undefined

  /** @param pairs that the device has */
  constructor(context: QueueContext, pairs: number) {
    this.context = context
    this.#pairs = pairs
  }

  handle(chain: Chain): void {
    this.#waiting.push(chain)
    if (this.#waiting.length === 1) this.#serve()
  }

  /** The control half has done what was reported: the command is acknowledged only now (virtio 1.3 §5.1.6.5.5). */
  message(message: unknown): void {
    if ((message as NetMessage).kind !== 'done' || this.#waiting.length === 0) return
    this.#acknowledge(this.#waiting.shift()!, true)
    this.#serve()
  }

  /** Does what a command asks for. Returns whether that is in effect; if not, a message will tell. */
  protected apply(report: NetReport): boolean {
    this.context.report(report)
    return false
  }

  #serve(): void {
    for (let chain = this.#waiting[0]; chain !== undefined; chain = this.#waiting[0]) {
      this.#report = undefined
      const understood = this.#execute(chain)
      if (understood && this.#report !== undefined && !this.apply(this.#report)) return
      this.#waiting.shift()
      this.#acknowledge(chain, understood)
    }
  }

  #acknowledge(chain: Chain, ok: boolean): void {
    if (chain.writable > 0) chain.writeU8(0, ok ? net.VIRTIO_NET_OK : net.VIRTIO_NET_ERR)
    this.context.give(chain, Math.min(1, chain.writable))
  }

  /** Whether the command is one; `#report` says what it asks for, if anything. */
  #execute(chain: Chain): boolean {
    if (chain.writable === 0 || chain.readable < COMMAND_HEADER) return false
    const size = chain.readable - COMMAND_HEADER
    const command = chain.readU8(1)
    const { features } = this.context
    switch (chain.readU8(0)) {
      case net.VIRTIO_NET_CTRL_RX:
        // A device may pass more than was asked for (virtio 1.3 §5.1.6.5.1.2), and this one passes all.
        if (!hasFeature(features, net.VIRTIO_NET_F_CTRL_RX)) return false
        return size === 1 && command <= net.VIRTIO_NET_CTRL_RX_ALLMULTI && chain.readU8(COMMAND_HEADER) <= 1
      case net.VIRTIO_NET_CTRL_MAC:
        if (command === net.VIRTIO_NET_CTRL_MAC_TABLE_SET)
          return hasFeature(features, net.VIRTIO_NET_F_CTRL_RX) && wellFormedTable(chain)
        return command === net.VIRTIO_NET_CTRL_MAC_ADDR_SET && this.#setMac(chain, size)
      case net.VIRTIO_NET_CTRL_ANNOUNCE:
        if (!hasFeature(features, net.VIRTIO_NET_F_GUEST_ANNOUNCE)) return false
        if (command !== net.VIRTIO_NET_CTRL_ANNOUNCE_ACK) return false
        this.#report = { kind: 'announced' }
        return true
      case net.VIRTIO_NET_CTRL_MQ:
        return command === net.VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET && this.#setPairs(chain, size)
      case net.VIRTIO_NET_CTRL_GUEST_OFFLOADS:
        return command === net.VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET && this.#setOffloads(chain, size)
      default:
        return false
    }
  }

  #setMac(chain: Chain, size: number): boolean {
    if (!hasFeature(this.context.features, net.VIRTIO_NET_F_CTRL_MAC_ADDR) || size !== MAC_SIZE) return false
    const mac = new Uint8Array(MAC_SIZE)
    chain.copyFrom(COMMAND_HEADER, mac, 0, MAC_SIZE)
    if ((mac[0]! & 1) !== 0 || mac.every((byte) => byte === 0)) return false
    this.#report = { kind: 'mac', mac }
    return true
  }

  #setPairs(chain: Chain, size: number): boolean {
    if (!hasFeature(this.context.features, net.VIRTIO_NET_F_MQ) || size !== 2) return false
    const pairs = chain.readU16(COMMAND_HEADER)
    if (pairs < 1 || pairs > this.#pairs) return false
    this.#report = { kind: 'pairs', pairs }
    return true
  }

  #setOffloads(chain: Chain, size: number): boolean {
    const { features } = this.context
    if (!hasFeature(features, net.VIRTIO_NET_F_CTRL_GUEST_OFFLOADS) || size !== 8) return false
    const low = BigInt(chain.readU32(COMMAND_HEADER))
    const offloads = low | (BigInt(chain.readU32(COMMAND_HEADER + 4)) << 32n)
    if ((offloads & ~(features & SWITCHABLE)) !== 0n) return false
    this.#report = { kind: 'offloads', features: offloads }
    return true
  }
}

/** Two tables, unicast and multicast: le32 entries, then six bytes each (virtio 1.3 §5.1.6.5.2). */
function wellFormedTable(chain: Chain): boolean {
  let at = COMMAND_HEADER
  for (let table = 0; table < 2; table++) {
    if (at + 4 > chain.readable) return false
    const entries = chain.readU32(at)
    if (entries > MAX_TABLE_ENTRIES) return false
    at += 4 + entries * MAC_SIZE
  }
  return at === chain.readable
}

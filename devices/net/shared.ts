/**
 * What the two halves of the network card share: plain data that crosses to the iothreads, and the counters that the queue half
 * writes and the control half shows.
 */
import { DROP_REASONS as HEADER_REASONS } from './header.ts'

/** Why a packet was dropped: the `reason` of metrics. Those of header.ts first, in its order. */
export const DROP_REASONS = [
  ...HEADER_REASONS.slice(1),
  'disabled',
  'link_down',
  'link_full',
  'no_buffers',
  'too_big',
  'bad_buffer',
  'no_offload',
] as const
/** Sent while the ring was disabled. */
export const DROP_DISABLED = HEADER_REASONS.length - 1
/** The tap is down or gone. */
export const DROP_LINK_DOWN = DROP_DISABLED + 1
/** The tap's queue is full. */
export const DROP_LINK_FULL = DROP_DISABLED + 2
/** The guest had no chains for it, and the queue before it was full. */
export const DROP_NO_BUFFERS = DROP_DISABLED + 3
/** Larger than the guest's chains. */
export const DROP_TOO_BIG = DROP_DISABLED + 4
/** A receive chain that is too small for the header, or not writable: given back unused. */
export const DROP_BAD_BUFFER = DROP_DISABLED + 5
/** A frame that has to be segmented for the receiver, and can't be. */
export const DROP_NO_OFFLOAD = DROP_DISABLED + 6

/** Those that a receive queue can have, and a transmit queue. */
export const RX_DROPS: readonly number[] = [
  DROP_DISABLED,
  DROP_NO_BUFFERS,
  DROP_TOO_BIG,
  DROP_BAD_BUFFER,
  DROP_NO_OFFLOAD,
]
export const TX_DROPS: readonly number[] = [
  ...Array.from({ length: DROP_DISABLED }, (_, reason) => reason),
  DROP_DISABLED,
  DROP_LINK_DOWN,
  DROP_LINK_FULL,
  DROP_TOO_BIG,
]

// Doubles per queue.
export const PACKETS = 0
export const BYTES = 1
/** Packets whose checksum was left to the receiver. */
export const PARTIAL_CHECKSUMS = 2
/** Packets that are to be segmented (TSO, USO, UFO). */
export const SEGMENTED = 3
/** How often a packet waited for the guest to offer chains. */
export const STARVED = 4
export const DROPS = 5
const QUEUE_COUNTERS = DROPS + DROP_REASONS.length

/** The counters of one virtqueue; an iothread writes them, the control thread reads them. */
export class NetCounters {
  readonly values: Float64Array

  /** @param buffer of {@link allocateCounters} */
  constructor(buffer: SharedArrayBuffer, queue: number) {
    this.values = new Float64Array(buffer, queue * QUEUE_COUNTERS * 8, QUEUE_COUNTERS)
  }

  /** `count` packets passed, with so many bytes together. */
  packets(count: number, bytes: number): void {
    const { values } = this
    values[PACKETS] = values[PACKETS]! + count
    values[BYTES] = values[BYTES]! + bytes
  }

  /** @param reason an index into {@link DROP_REASONS} */
  drop(reason: number): void {
    this.add(DROPS + reason, 1)
  }

  add(counter: number, count: number): void {
    this.values[counter] = this.values[counter]! + count
  }
}

export function allocateCounters(queues: number): SharedArrayBuffer {
  return new SharedArrayBuffer(queues * QUEUE_COUNTERS * 8)
}

/** A device's place on a switch, for its queue handlers. */
export interface SwitchPlace {
  readonly name: string
  /** The device's port on it: 0 … MAX_PORTS − 1. */
  readonly port: number
  /** A tap with virtio-net headers of 12 bytes, -1 = none. */
  readonly uplinkFd: number
  /** The uplink takes UDP segmentation. */
  readonly uplinkUso: boolean
  /** {@link SwitchCounters}, the same for all ports. */
  readonly counters: SharedArrayBuffer
}

/** Ports of a switch, the uplink is one more. */
export const MAX_PORTS = 256

// Doubles of a switch.
/** MAC addresses known now. */
export const TABLE_ENTRIES = 0
/** Packets that went to all ports: group addresses, and addresses unknown. */
export const FLOODS = 1
/** Packets that a port could not take, from here on one per port; the last is the uplink. */
export const PORT_DROPS = 2

export function allocateSwitchCounters(): SharedArrayBuffer {
  return new SharedArrayBuffer((PORT_DROPS + MAX_PORTS + 1) * 8)
}

/** Handed to the handler of each queue. Queue 2i receives (to the guest), 2i + 1 transmits, the last is the control queue. */
export interface NetQueueData {
  readonly pairs: number
  /** One fd per pair, with the link `tap`; empty with a switch. */
  readonly tapFds: readonly number[]
  readonly place: SwitchPlace | undefined
  /** What the driver commanded by the control queue: the pairs that it receives on, and the features of offloads that it takes. */
  readonly pairsInUse: number
  readonly offloads: bigint | undefined
  /** Bytes behind the Ethernet header that packets from the tap have at most, when the driver takes no larger ones. */
  readonly mtu: number
  readonly counters: SharedArrayBuffer
  /** Ring of captured packets per queue, with `--pcap`. */
  readonly captures: readonly SharedArrayBuffer[]
}

/** What the queue half tells the control half (`QueueContext.report`): commands of the control queue, and trouble. */
export type NetReport =
  | { readonly kind: 'pairs'; readonly pairs: number }
  /** The driver takes only these offloads from now on: feature bits of GUEST_*. */
  | { readonly kind: 'offloads'; readonly features: bigint }
  | { readonly kind: 'mac'; readonly mac: Uint8Array }
  | { readonly kind: 'announced' }
  /** Reading the tap failed, and had not failed before: -errno. Not a command, so it is not answered. */
  | { readonly kind: 'linkFailed'; readonly result: number }

/** What the control half tells the handlers (`DeviceHost.send`). */
export type NetMessage =
  /** A transmit queue's: learn the MAC of a guest that moved here, and tell the others by this frame. */
  | { readonly kind: 'announce'; readonly frame: Uint8Array }
  /** The control queue's: what it reported last is in effect. */
  | { readonly kind: 'done' }

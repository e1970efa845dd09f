/** The network card's metrics: which there are, and how they come out of the counters that the queue half writes. */
import type { DeviceMetric, DeviceSample } from '../../src/device/index.ts'
import {
  BYTES,
  DROP_REASONS,
  DROPS,
  FLOODS,
  MAX_PORTS,
  NetCounters,
  PACKETS,
  PARTIAL_CHECKSUMS,
  PORT_DROPS,
  RX_DROPS,
  SEGMENTED,
  STARVED,
  type SwitchPlace,
  TABLE_ENTRIES,
  TX_DROPS,
} from './shared.ts'

/** Directions are the guest's: rx = to the guest. `queue` is the virtqueue's index: even = rx, odd = tx. */
export const METRICS: readonly DeviceMetric[] = [
  {
    name: 'packets_total',
    type: 'counter',
    labels: ['queue', 'direction'],
    help: 'Packets that the guest received (rx) or sent (tx)',
  },
  {
    name: 'bytes_total',
    type: 'counter',
    labels: ['queue', 'direction'],
    help: 'Bytes of these packets, Ethernet header included',
  },
  {
    name: 'drops_total',
    type: 'counter',
    labels: ['queue', 'direction', 'reason'],
    help: 'Packets to (rx) or from (tx) the guest that were dropped',
  },
  {
    name: 'offloaded_packets_total',
    type: 'counter',
    labels: ['queue', 'direction', 'offload'],
    help: 'Packets that passed with the checksum (checksum) or the segmentation (segmentation) left to the next one',
  },
  {
    name: 'rx_starved_total',
    type: 'counter',
    labels: ['queue'],
    help: 'Times that a packet had to wait because the guest offered no receive buffers',
  },
  {
    name: 'switch_table_entries',
    type: 'gauge',
    labels: ['switch'],
    help: "MAC addresses that the switch knows, shown by the switch's first device",
  },
  {
    name: 'switch_floods_total',
    type: 'counter',
    labels: ['switch'],
    help: 'Packets that went to all ports: to groups and to unknown addresses',
  },
  {
    name: 'switch_port_drops_total',
    type: 'counter',
    labels: ['switch', 'port'],
    help: "Packets that a port of the switch could not take: the device's own by its name, and uplink",
  },
]

/** A card's virtqueues. */
export interface CardCounters {
  readonly counters: SharedArrayBuffer
  readonly pairs: number
  /** Whether the virtqueue runs as one for packets. */
  active(queue: number): boolean
}

/** Of the queues that run or have done something. */
export function* queueSamples(card: CardCounters): Iterable<DeviceSample> {
  for (let queue = 0; queue < card.pairs * 2; queue++) {
    const { values } = new NetCounters(card.counters, queue)
    if (!card.active(queue) && values.every((value) => value === 0)) continue
    const direction = queue % 2 === 0 ? 'rx' : 'tx'
    const labels = { queue, direction }
    yield { metric: 'packets_total', labels, value: values[PACKETS]! }
    yield { metric: 'bytes_total', labels, value: values[BYTES]! }
    // Those that are zero too: who watches a rate has to see the first one.
    for (const reason of direction === 'rx' ? RX_DROPS : TX_DROPS) {
      const named = { ...labels, reason: DROP_REASONS[reason]! }
      yield { metric: 'drops_total', labels: named, value: values[DROPS + reason]! }
    }
    const offloaded = { checksum: values[PARTIAL_CHECKSUMS]!, segmentation: values[SEGMENTED]! }
    for (const [offload, value] of Object.entries(offloaded)) {
      yield { metric: 'offloaded_packets_total', labels: { ...labels, offload }, value }
    }
    if (direction === 'rx') yield { metric: 'rx_starved_total', labels: { queue }, value: values[STARVED]! }
  }
}

/** @param first the device is the one that shows what is the whole switch's @param device its name */
export function* switchSamples(place: SwitchPlace, first: boolean, device: string): Iterable<DeviceSample> {
  const values = new Float64Array(place.counters)
  const { name, port } = place
  const drops = (label: string, index: number): DeviceSample => ({
    metric: 'switch_port_drops_total',
    labels: { switch: name, port: label },
    value: values[PORT_DROPS + index]!,
  })
  yield drops(device, port)
  if (!first) return
  yield { metric: 'switch_table_entries', labels: { switch: name }, value: values[TABLE_ENTRIES]! }
  yield { metric: 'switch_floods_total', labels: { switch: name }, value: values[FLOODS]! }
  if (place.uplinkFd >= 0) yield drops('uplink', MAX_PORTS)
}

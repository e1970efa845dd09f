/**
 * /metrics: a {@link DaemonSnapshot} as Prometheus text: virtiod's metrics ({@link METRICS}), those that devices
 * declare, and prom-client's of the process. README lists the first two. A metric that has no sample is left out: a
 * device without operations shows no requests. Counting happens elsewhere, in plain shared memory; nothing here runs
 * until somebody asks. It loads prom-client (40 ms): import it at the first scrape, not at the start.
 */
import { collectDefaultMetrics, type Metric, Registry } from 'prom-client'
import type { DeviceMetric } from '../device/index.ts'
import { type DaemonSnapshot, type DeviceSnapshot, LATENCY_BUCKETS, type QueueSnapshot } from './snapshot.ts'

interface Sample {
  readonly labels: Readonly<Record<string, string | number>>
  readonly value: number
  /** The parts of a histogram have names of their own. */
  readonly metricName?: string
}

export interface MetricRow {
  /** `<type>` stands for the device's type, as in `virtiod_blk_requests_total`. */
  readonly name: string
  readonly type: 'counter' | 'gauge' | 'histogram'
  readonly labels: readonly string[]
  readonly help: string
  /** @param name the metric's name with the type filled in; @param devices those of that type, or all */
  collect(devices: readonly DeviceSnapshot[], snapshot: DaemonSnapshot, name: string): Iterable<Sample>
}

/** Every metric of virtiod itself. */
export const METRICS: readonly MetricRow[] = [
  {
    name: 'virtiod_<type>_requests_total',
    type: 'counter',
    labels: ['device', 'queue', 'op'],
    help: 'Completed requests, failed ones included',
    collect: (devices) => perOperation(devices, (operation) => operation.requests),
  },
  {
    name: 'virtiod_<type>_bytes_total',
    type: 'counter',
    labels: ['device', 'queue', 'op'],
    help: 'Payload bytes of completed requests',
    collect: (devices) => perOperation(devices, (operation) => operation.bytes),
  },
  {
    name: 'virtiod_<type>_errors_total',
    type: 'counter',
    labels: ['device', 'queue', 'kind'],
    help: 'Failed requests by kind',
    *collect(devices) {
      for (const [labels, queue] of queuesOf(devices)) {
        for (const { kind, count } of queue.errors) yield { labels: { ...labels, kind }, value: count }
      }
    },
  },
  {
    name: 'virtiod_<type>_request_duration_seconds',
    type: 'histogram',
    labels: ['device', 'queue', 'op', 'le'],
    help: 'Time from taking a request from the ring to giving it back; operations that never ran are left out',
    collect: (devices, _, name) => latencies(devices, name),
  },
  {
    name: 'virtiod_session_up',
    type: 'gauge',
    labels: ['device'],
    help: '1 while a front-end is connected',
    collect: (devices) => perDevice(devices, (device) => Number(device.sessionUp)),
  },
  {
    name: 'virtiod_sessions_total',
    type: 'counter',
    labels: ['device'],
    help: 'Front-ends that connected',
    collect: (devices) => perDevice(devices, (device) => device.sessionsTotal),
  },
  {
    name: 'virtiod_session_protocol_errors_total',
    type: 'counter',
    labels: ['device'],
    help: 'Sessions that ended because the front-end broke the protocol',
    collect: (devices) => perDevice(devices, (device) => device.protocolErrorsTotal),
  },
  {
    name: 'virtiod_session_memory_bytes',
    type: 'gauge',
    labels: ['device'],
    help: 'Guest memory that is mapped',
    collect: (devices) => perDevice(devices, (device) => device.memoryBytes),
  },
  {
    name: 'virtiod_session_memory_regions',
    type: 'gauge',
    labels: ['device'],
    help: 'Guest memory regions that are mapped',
    collect: (devices) => perDevice(devices, (device) => device.memoryRegions),
  },
  {
    name: 'virtiod_device_blocked_seconds_total',
    type: 'counter',
    labels: ['device'],
    help: 'Time in which the thread of a device of its own did not answer, from one second on; other devices have none',
    *collect(devices) {
      for (const { name, blockedSeconds } of devices)
        if (blockedSeconds !== undefined) yield { labels: { device: name }, value: blockedSeconds }
    },
  },
  {
    name: 'virtiod_device_reloads_total',
    type: 'counter',
    labels: ['device', 'result'],
    help: 'Reloads of a module that is watched, by result: ok, or failed while the version before served on; other devices have none',
    *collect(devices) {
      for (const { name, reloads } of devices) {
        if (reloads === undefined) continue
        for (const result of ['ok', 'failed'] as const)
          yield { labels: { device: name, result }, value: reloads[result] }
      }
    },
  },
  {
    name: 'virtiod_vring_started',
    type: 'gauge',
    labels: ['device', 'queue', 'iothread'],
    help: '1 while the ring is started and enabled, with the iothread that serves it; rings never used are left out, here and below',
    *collect(devices) {
      for (const [labels, queue] of queuesOf(devices)) {
        yield { labels: { ...labels, iothread: queue.iothread }, value: Number(queue.started) }
      }
    },
  },
  {
    name: 'virtiod_vring_broken',
    type: 'gauge',
    labels: ['device', 'queue'],
    help: '1 while the ring is stopped because the driver malformed it',
    collect: (devices) => perQueue(devices, (queue) => Number(queue.broken)),
  },
  {
    name: 'virtiod_vring_breaks_total',
    type: 'counter',
    labels: ['device', 'queue'],
    help: 'How often the driver malformed the ring',
    collect: (devices) => perQueue(devices, (queue) => queue.brokenTotal),
  },
  {
    name: 'virtiod_vring_inflight',
    type: 'gauge',
    labels: ['device', 'queue'],
    help: 'Requests taken from the ring and not yet given back',
    collect: (devices) => perQueue(devices, (queue) => queue.inFlight),
  },
  {
    name: 'virtiod_vring_chains_total',
    type: 'counter',
    labels: ['device', 'queue'],
    help: 'Descriptor chains taken from the ring',
    collect: (devices) => perQueue(devices, (queue) => queue.chains),
  },
  {
    name: 'virtiod_vring_kicks_total',
    type: 'counter',
    labels: ['device', 'queue'],
    help: 'Notifications from the driver',
    collect: (devices) => perQueue(devices, (queue) => queue.kicks),
  },
  {
    name: 'virtiod_vring_calls_total',
    type: 'counter',
    labels: ['device', 'queue'],
    help: 'Notifications to the driver (interrupts)',
    collect: (devices) => perQueue(devices, (queue) => queue.calls),
  },
  {
    name: 'virtiod_vring_calls_suppressed_total',
    type: 'counter',
    labels: ['device', 'queue'],
    help: 'Batches given back for which the driver wanted no notification',
    collect: (devices) => perQueue(devices, (queue) => queue.callsSuppressed),
  },
  {
    name: 'virtiod_iothread_polls_total',
    type: 'counter',
    labels: ['iothread', 'result'],
    help: 'Polling phases: hit = work arrived, miss = the thread went to sleep',
    *collect(_, { iothreads }) {
      for (const { index, pollHits, pollMisses } of iothreads) {
        yield { labels: { iothread: index, result: 'hit' }, value: pollHits }
        yield { labels: { iothread: index, result: 'miss' }, value: pollMisses }
      }
    },
  },
  {
    name: 'virtiod_iothread_info',
    type: 'gauge',
    labels: ['iothread', 'backend'],
    help: '1, with what the iothread does I/O with: io_uring, or emulated where the kernel or the container has none',
    *collect(_, { iothreads }) {
      for (const { index, backend } of iothreads) yield { labels: { iothread: index, backend }, value: 1 }
    },
  },
]

let processRegistry: Registry | undefined

/** The whole text of /metrics. */
export async function renderMetrics(snapshot: DaemonSnapshot): Promise<string> {
  if (processRegistry === undefined) {
    processRegistry = new Registry()
    // The event loop's lag is sampled by a timer: ten times a second disturbs nobody, a hundred times would.
    collectDefaultMetrics({ register: processRegistry, eventLoopMonitoringPrecision: 100 })
  }
  const registry = new Registry()
  for (const row of METRICS) {
    const { name } = row
    if (!name.includes('<type>')) register(registry, row, name, row.collect(snapshot.devices, snapshot, name))
  }
  const types = [...new Set(snapshot.devices.map(({ type }) => type))]
  for (const type of types) {
    const devices = snapshot.devices.filter((device) => device.type === type)
    for (const row of METRICS) {
      const name = row.name.replace('<type>', type)
      if (name !== row.name) register(registry, row, name, row.collect(devices, snapshot, name))
    }
    // Devices of a type have one definition, and with it the same metrics; two modules may have the same name.
    const own = new Map(devices.flatMap(({ metrics }) => metrics).map((metric) => [metric.name, metric]))
    for (const metric of own.values()) {
      register(registry, metric, deviceMetricName(type, metric), ownSamples(devices, metric))
    }
  }
  return `${await registry.metrics()}\n${await processRegistry.metrics()}`
}

/** The full name of a device's own metric. @param type `DeviceDefinition.name` */
export function deviceMetricName(type: string, metric: DeviceMetric): string {
  return `virtiod_${type}_${metric.name}`
}

function register(
  registry: Registry,
  { type, help }: Pick<MetricRow, 'type' | 'help'>,
  name: string,
  samples: Iterable<Sample>
): void {
  const values = [...samples]
  if (values.length === 0) return
  const metric = { name, get: async () => ({ name, help, type, aggregator: 'sum', values }) }
  // The registry asks a metric for its name and its values; its typings list prom-client's own classes only.
  registry.registerMetric(metric as unknown as Metric)
}

/** Labels in the order of the declaration, whatever order the device gives them in: `device` is the first. */
function* ownSamples(devices: readonly DeviceSnapshot[], { name, labels: names }: DeviceMetric): Iterable<Sample> {
  for (const device of devices) {
    for (const { metric, labels: given, value } of device.samples) {
      if (metric !== name) continue
      const labels: Record<string, string | number> = { device: device.name }
      // An empty label is to Prometheus the same as none.
      for (const label of names) labels[label] = given[label] ?? ''
      yield { labels, value }
    }
  }
}

function* perDevice(devices: readonly DeviceSnapshot[], value: (device: DeviceSnapshot) => number): Iterable<Sample> {
  for (const device of devices) yield { labels: { device: device.name }, value: value(device) }
}

function* perQueue(devices: readonly DeviceSnapshot[], value: (queue: QueueSnapshot) => number): Iterable<Sample> {
  for (const [labels, queue] of queuesOf(devices)) yield { labels, value: value(queue) }
}

function* perOperation(
  devices: readonly DeviceSnapshot[],
  value: (operation: QueueSnapshot['operations'][number]) => number
): Iterable<Sample> {
  for (const [labels, queue] of queuesOf(devices)) {
    for (const operation of queue.operations) {
      yield { labels: { ...labels, op: operation.name }, value: value(operation) }
    }
  }
}

/** A front-end may use any number of up to 256 queues: those that no driver ever started would only be noise. */
function* queuesOf(devices: readonly DeviceSnapshot[]): Iterable<[Record<string, string | number>, QueueSnapshot]> {
  for (const device of devices) {
    for (const queue of device.queues) {
      if (queue.started || queue.broken || queue.chains > 0 || queue.brokenTotal > 0) {
        yield [{ device: device.name, queue: queue.index }, queue]
      }
    }
  }
}

function* latencies(devices: readonly DeviceSnapshot[], name: string): Iterable<Sample> {
  for (const [labels, queue] of queuesOf(devices)) {
    for (const operation of queue.operations) {
      if (operation.requests === 0) continue
      const own = { ...labels, op: operation.name }
      let count = 0
      for (let bucket = 0; bucket < LATENCY_BUCKETS; bucket++) {
        count += operation.latencyBuckets[bucket] ?? 0
        yield { metricName: `${name}_bucket`, labels: { le: 2 ** bucket / 1e6, ...own }, value: count }
      }
      count += operation.latencyBuckets[LATENCY_BUCKETS] ?? 0
      yield { metricName: `${name}_bucket`, labels: { le: '+Inf', ...own }, value: count }
      yield { metricName: `${name}_sum`, labels: own, value: operation.latencySeconds }
      yield { metricName: `${name}_count`, labels: own, value: count }
    }
  }
}

/** /metrics from a made-up snapshot: every metric of the table, by name, label and value. */
import { expect, test } from 'vitest'
import { METRICS, renderMetrics } from '../../src/ops/metrics.ts'
import {
  type DaemonSnapshot,
  type DeviceSnapshot,
  LATENCY_BUCKETS,
  type QueueSnapshot,
} from '../../src/ops/snapshot.ts'

const latencyBuckets = new Float64Array(LATENCY_BUCKETS + 1)
latencyBuckets[0] = 1
latencyBuckets[5] = 2
latencyBuckets[LATENCY_BUCKETS] = 3
const noLatency = new Float64Array(LATENCY_BUCKETS + 1)

const queue: QueueSnapshot = {
  index: 0,
  started: true,
  broken: false,
  iothread: 1,
  kicks: 10,
  calls: 11,
  callsSuppressed: 12,
  chains: 13,
  inFlight: 14,
  brokenTotal: 15,
  operations: [
    { name: 'read', requests: 6, bytes: 24576, latencyBuckets, latencySeconds: 30.5 },
    { name: 'write', requests: 0, bytes: 0, latencyBuckets: noLatency, latencySeconds: 0 },
  ],
  errors: [{ kind: 'io', count: 16 }],
}
const unused: QueueSnapshot = { ...queue, index: 1, started: false, chains: 0, brokenTotal: 0 }
const device: DeviceSnapshot = {
  name: 'blk0',
  type: 'blk',
  sessionUp: true,
  memoryBytes: 2 ** 30,
  memoryRegions: 2,
  sessionsTotal: 3,
  protocolErrorsTotal: 4,
  blockedSeconds: 25.5,
  reloads: { ok: 26, failed: 27 },
  queues: [queue, unused],
  metrics: [],
  samples: [],
}
/** Its chains are no requests; it counts in its own way. */
const card: DeviceSnapshot = {
  ...device,
  name: 'net0',
  type: 'net',
  sessionUp: false,
  queues: [{ ...queue, broken: true, operations: [], errors: [] }],
  metrics: [
    { name: 'packets_total', type: 'counter', labels: ['queue', 'direction'], help: 'Packets' },
    { name: 'switch_table_entries', type: 'gauge', labels: ['switch'], help: 'Addresses' },
    { name: 'resets_total', type: 'counter', labels: [], help: 'Resets' },
    { name: 'idle_total', type: 'counter', labels: ['queue'], help: 'Nothing has it' },
  ],
  samples: [
    { metric: 'packets_total', labels: { direction: 'rx', queue: 0 }, value: 21 },
    { metric: 'packets_total', labels: { direction: 'tx', queue: 3 }, value: 22 },
    { metric: 'switch_table_entries', labels: { switch: 'lan "a"' }, value: 23 },
    { metric: 'resets_total', labels: {}, value: 0 },
  ],
}
const secondCard: DeviceSnapshot = {
  ...card,
  name: 'net1',
  samples: [{ metric: 'packets_total', labels: { queue: 0, direction: 'rx' }, value: 24 }],
}
const snapshot: DaemonSnapshot = {
  devices: [device, card, { ...device, name: 'blk1' }, secondCard],
  iothreads: [
    { index: 0, backend: 'io_uring', pollHits: 5, pollMisses: 6 },
    { index: 1, backend: 'emulated', pollHits: 0, pollMisses: 0 },
  ],
}

async function lines(of: DaemonSnapshot = snapshot): Promise<Set<string>> {
  return new Set((await renderMetrics(of)).split('\n'))
}

test.each([
  'virtiod_blk_requests_total{device="blk0",queue="0",op="read"} 6',
  'virtiod_blk_requests_total{device="blk0",queue="0",op="write"} 0',
  'virtiod_blk_requests_total{device="blk1",queue="0",op="read"} 6',
  'virtiod_blk_bytes_total{device="blk0",queue="0",op="read"} 24576',
  'virtiod_blk_errors_total{device="blk0",queue="0",kind="io"} 16',
  'virtiod_session_up{device="blk0"} 1',
  'virtiod_session_up{device="net0"} 0',
  'virtiod_sessions_total{device="blk0"} 3',
  'virtiod_session_protocol_errors_total{device="blk0"} 4',
  'virtiod_session_memory_bytes{device="blk0"} 1073741824',
  'virtiod_session_memory_regions{device="blk0"} 2',
  'virtiod_device_blocked_seconds_total{device="blk0"} 25.5',
  'virtiod_device_reloads_total{device="blk0",result="ok"} 26',
  'virtiod_device_reloads_total{device="blk1",result="failed"} 27',
  'virtiod_vring_started{device="blk0",queue="0",iothread="1"} 1',
  'virtiod_vring_broken{device="blk0",queue="0"} 0',
  'virtiod_vring_broken{device="net0",queue="0"} 1',
  'virtiod_vring_breaks_total{device="blk0",queue="0"} 15',
  'virtiod_vring_inflight{device="blk0",queue="0"} 14',
  'virtiod_vring_chains_total{device="blk0",queue="0"} 13',
  'virtiod_vring_kicks_total{device="blk0",queue="0"} 10',
  'virtiod_vring_calls_total{device="blk0",queue="0"} 11',
  'virtiod_vring_calls_suppressed_total{device="blk0",queue="0"} 12',
  'virtiod_iothread_polls_total{iothread="0",result="hit"} 5',
  'virtiod_iothread_polls_total{iothread="0",result="miss"} 6',
  'virtiod_iothread_info{iothread="1",backend="emulated"} 1',
  '# TYPE virtiod_blk_requests_total counter',
  '# TYPE virtiod_vring_inflight gauge',
  'virtiod_net_packets_total{device="net0",queue="0",direction="rx"} 21',
  'virtiod_net_packets_total{device="net0",queue="3",direction="tx"} 22',
  'virtiod_net_packets_total{device="net1",queue="0",direction="rx"} 24',
  'virtiod_net_switch_table_entries{device="net0",switch="lan \\"a\\""} 23',
  'virtiod_net_resets_total{device="net0"} 0',
  '# TYPE virtiod_net_packets_total counter',
  '# TYPE virtiod_net_switch_table_entries gauge',
  '# HELP virtiod_net_switch_table_entries Addresses',
  '# TYPE virtiod_blk_request_duration_seconds histogram',
])('%s', async (line) => {
  expect(await lines()).toContain(line)
})

test('latencies are cumulative buckets in seconds, and operations that never ran have none', async () => {
  const duration = [...(await lines({ ...snapshot, devices: [device] }))].filter((line) =>
    line.startsWith('virtiod_blk_request_duration_seconds')
  )
  const labels = 'device="blk0",queue="0",op="read"'
  expect(duration).toHaveLength(LATENCY_BUCKETS + 3)
  expect(duration[0]).toBe(`virtiod_blk_request_duration_seconds_bucket{le="0.000001",${labels}} 1`)
  expect(duration[4]).toBe(`virtiod_blk_request_duration_seconds_bucket{le="0.000016",${labels}} 1`)
  expect(duration[5]).toBe(`virtiod_blk_request_duration_seconds_bucket{le="0.000032",${labels}} 3`)
  expect(duration.slice(-4)).toEqual([
    `virtiod_blk_request_duration_seconds_bucket{le="8.388608",${labels}} 3`,
    `virtiod_blk_request_duration_seconds_bucket{le="+Inf",${labels}} 6`,
    `virtiod_blk_request_duration_seconds_sum{${labels}} 30.5`,
    `virtiod_blk_request_duration_seconds_count{${labels}} 6`,
  ])
})

test('queues that nobody ever used are left out', async () => {
  expect([...(await lines())].filter((line) => line.startsWith('virtiod_') && line.includes('queue="1"'))).toEqual([])
})

test('every metric of the table is there, with the labels it names, and no other', async () => {
  const text = await renderMetrics(snapshot)
  for (const { name, type, labels } of METRICS) {
    const full = name.replace('<type>', 'blk')
    expect(text).toContain(`# TYPE ${full} ${type}\n`)
    const suffix = type === 'histogram' ? '_bucket' : ''
    const [, found = ''] = new RegExp(`^${full}${suffix}\\{([^}]*)\\}`, 'm').exec(text) ?? []
    expect(found.match(/\w+(?==")/g)?.toSorted(), name).toEqual([...labels].sort())
  }
  const own = card.metrics.filter(({ name }) => name !== 'idle_total').map(({ name }) => `virtiod_net_${name}`)
  const names = [...text.matchAll(/^# TYPE (virtiod_\w+)/gm)].map((match) => match[1]!)
  // A name that came twice would be in here twice.
  expect(names.sort()).toEqual([...METRICS.map(({ name }) => name.replace('<type>', 'blk')), ...own].sort())
})

test('a metric without samples is not there: not one that nobody gives, not requests of a device that has none', async () => {
  const text = await renderMetrics({ devices: [card, { ...device, queues: [] }], iothreads: [] })
  expect(text).toContain('virtiod_net_packets_total')
  expect(text).toContain('virtiod_vring_kicks_total{device="net0",queue="0"} 10')
  expect(text).not.toMatch(/virtiod_(iothread|(net|blk)_(idle|requests|bytes|errors|request_duration))/)
})

test("a device's metric that has the name of another one is an error, not a double", async () => {
  const clash: DeviceSnapshot = {
    ...device,
    metrics: [{ name: 'requests_total', type: 'counter', labels: [], help: '' }],
    samples: [{ metric: 'requests_total', labels: {}, value: 1 }],
  }
  await expect(renderMetrics({ devices: [clash], iothreads: [] })).rejects.toThrow('virtiod_blk_requests_total')
})

test('the process is described too, and a daemon without devices is valid', async () => {
  const text = await renderMetrics({ devices: [], iothreads: [] })
  expect(text).toMatch(/^process_cpu_user_seconds_total \d/m)
  expect(text).toMatch(/^process_open_fds \d/m)
  expect(text).toMatch(/^nodejs_eventloop_lag_seconds \d/m)
})

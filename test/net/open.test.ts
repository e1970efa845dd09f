/** The control half of the network card on taps that are not there: features, config space, what the kernel is told. */
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import * as v from 'valibot'
import { afterAll, afterEach, describe, expect, test } from 'vitest'
import definition from '../../devices/net/index.ts'
import { macBytes, type NetOptions, netOptions, tapFds } from '../../devices/net/options.ts'
import {
  BYTES,
  DROP_DISABLED,
  DROP_REASONS,
  FLOODS,
  NetCounters,
  type NetQueueData,
  PACKETS,
  PORT_DROPS,
  RX_DROPS,
  SEGMENTED,
  STARVED,
  TX_DROPS,
} from '../../devices/net/shared.ts'
import { offloads } from '../../devices/net/tap.ts'
import { ConfigError, type Device } from '../../src/device/index.ts'
import { featureBits, featureSet, hasFeature } from '../../src/virtio/features.ts'
import * as net from '../../src/virtio/net.ts'
import { FakeHost, TAP } from './fake-network.ts'

const VERSION_1 = 1n << 32n
const CSUM = 1
const TSO4 = 2
const TSO6 = 4
const ECN = 8
const UFO = 16
const USO = 0x60

const dir = mkdtempSync(join(tmpdir(), 'virtiod-net-'))
afterAll(() => rmSync(dir, { recursive: true, force: true }))

const opened: Device<NetQueueData>[] = []
afterEach(() => {
  for (const device of opened.splice(0)) device.close()
})

async function open(options: Partial<NetOptions>, host = new FakeHost()): Promise<Device<NetQueueData>> {
  const device = await definition.open(v.parse(netOptions, options), host)
  opened.push(device)
  return device
}

async function refusal(options: Partial<NetOptions>, host = new FakeHost()): Promise<ConfigError> {
  const before = readdirSync('/proc/self/fd').length
  const error: unknown = await open(options, host).catch((thrown: unknown) => thrown)
  if (!(error instanceof ConfigError)) throw new Error('no ConfigError', { cause: error })
  expect(readdirSync('/proc/self/fd').length).toBe(before)
  return error
}

const tap = { tap: 'fake0' } as const
const onSwitch = { switch: 'lan' } as const
const view = (device: Device): DataView => new DataView(device.config().buffer)
const samples = (device: Device, metric: string) => [...device.samples!()].filter((sample) => sample.metric === metric)

describe('options', () => {
  const refused = (options: object): string => {
    const result = v.safeParse(netOptions, options)
    expect(result.success).toBe(false)
    return result.issues![0].message
  }

  test.each([
    [{}, 'missing. Give tap'],
    [{ tap: 'a', switch: 'b' }, 'it excludes tap. '],
    [{ tap: 'a', 'tap-fd': '3' }, 'it excludes tap. '],
    [{ tap: 'a', uplink: 'b' }, "it is a switch's, and here is tap. "],
    [{ switch: 'a', bridge: 'b' }, 'the switch has no tap to put on it. '],
    [{ 'tap-fd': '3,4', 'queue-pairs': 3 }, 'tap-fd has 2. '],
    [{ 'tap-fd': '3,4', 'queue-pairs': 1 }, 'tap-fd has 2. '],
  ])('%j do not fit together', (options, message) => {
    expect(refused(options)).toContain(message)
  })

  test.each(['', 'a'.repeat(16), 'a b', 'a/b', 'a:1', '.', '..', 'tap%d', 'täp', 'a\n'])('%j is no link', (name) => {
    expect(refused({ tap: name })).toContain('Give 1 to 15 ASCII characters')
    expect(refused({ switch: 's', uplink: name })).toContain('Give 1 to 15 ASCII characters')
    expect(refused({ tap: 't', bridge: name })).toContain('Give 1 to 15 ASCII characters')
  })

  test.each(['a', 'a'.repeat(15), '...', 'tap-0.5', 'x@y', '-'])('%j is one', (name) => {
    expect(v.is(netOptions, { tap: name })).toBe(true)
  })

  test.each([
    '00:00:00:00:00:00',
    '01:00:00:00:00:00',
    'ff:ff:ff:ff:ff:ff',
    '52:54:00:12:34',
    '52:54:00:12:34:5',
    '52-54-00-12-34-56',
    '52:54:00:12:34:56:78',
    'g2:54:00:12:34:56',
  ])('%s is no MAC', (mac) => {
    expect(refused({ tap: 'a', mac })).toContain('Give six bytes')
  })

  test('a MAC and a list of fds', () => {
    expect(macBytes({ mac: '52:54:00:aB:34:f0' })).toEqual(Uint8Array.of(0x52, 0x54, 0, 0xab, 0x34, 0xf0))
    expect(v.is(netOptions, { tap: 'a', mac: '00:00:00:00:00:01' })).toBe(true)
    expect(tapFds({ 'tap-fd': '3,14' })).toEqual([3, 14])
    for (const list of ['', ',', '3,', '3 4', '-1', 'a', '1e9', '9'.repeat(10)]) {
      expect(refused({ 'tap-fd': list }), list).toContain('Give the numbers of open fds')
    }
  })

  test.each([
    [{ mtu: 67 }, { mtu: 65536 }, { mtu: 68 }, { mtu: 65535 }],
    [{ 'queue-pairs': 0 }, { 'queue-pairs': 128 }, { 'queue-pairs': 1 }, { 'queue-pairs': 127 }],
  ])('limits %j … %j', (below, above, least, most) => {
    for (const options of [below, above]) expect(v.is(netOptions, { ...tap, ...options })).toBe(false)
    for (const options of [least, most]) expect(v.is(netOptions, { ...tap, ...options })).toBe(true)
  })
})

describe('features and config space', () => {
  const ALWAYS = [0, 2, 11, 12, 13, 14, 15, 16, 17, 18, 21, 23]

  test('a switch leaves all that there is to the driver', async () => {
    const device = await open(onSwitch)
    expect(featureBits(device.features)).toEqual([...ALWAYS, 1, 7, 8, 9, 10, 54, 55, 56].sort((a, b) => a - b))
    expect(device.numQueues).toBe(3)
    expect(device.iothreadGroup).toBe('net:lan')
    expect(device.maxQueueSize).toBeUndefined()
    expect(device.config()).toHaveLength(12)
    expect([...device.config()]).toEqual([0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0])
  })

  test('with everything', async () => {
    const device = await open({ ...tap, mac: '52:54:00:12:34:56', mtu: 9000, 'queue-pairs': 4, 'queue-size': 512 })
    for (const bit of [net.VIRTIO_NET_F_MAC, net.VIRTIO_NET_F_MTU, net.VIRTIO_NET_F_MQ]) {
      expect(hasFeature(device.features, bit), String(bit)).toBe(true)
    }
    expect(device.numQueues).toBe(9)
    expect(device.maxQueueSize).toBe(512)
    expect(device.iothreadGroup).toBeUndefined()
    expect(Buffer.from(device.config()).toString('hex')).toBe(`525400123456${'0100'}${'0400'}${'2823'}`)
  })

  test('a kernel without USO: it is not offered in either direction', async () => {
    const host = new FakeHost()
    host.results.setTapOffloads = ((_: number, flags: number) => ((flags & USO) === 0 ? 0 : -22)) as never
    const { features } = await open(tap, host)
    expect(featureBits(features)).toEqual([...ALWAYS, 1, 7, 8, 9, 10].sort((a, b) => a - b))
  })

  test('a kernel without offloads: a driver has to get finished packets', async () => {
    const host = new FakeHost()
    host.results.setTapOffloads = ((_: number, flags: number) => (flags === 0 ? 0 : -22)) as never
    expect(featureBits((await open(tap, host)).features)).toEqual(ALWAYS)
  })

  test('only a legacy driver writes the MAC, and only that', async () => {
    const device = await open({ ...onSwitch, mac: '52:54:00:12:34:56' })
    device.negotiated!(0n)
    for (const [offset, length] of [
      [6, 1],
      [5, 2],
      [0, 7],
      [0, 0],
      [12, 1],
    ]) {
      expect(device.writeConfig(offset!, new Uint8Array(length!)), `${offset} ${length}`).toBe(false)
    }
    expect(device.writeConfig(0, Uint8Array.of(2, 2))).toBe(true)
    expect(device.writeConfig(5, Uint8Array.of(7))).toBe(true)
    expect(device.config().subarray(0, 6)).toEqual(Uint8Array.of(2, 2, 0, 0x12, 0x34, 7))
    device.negotiated!(VERSION_1)
    expect(device.writeConfig(0, Uint8Array.of(4))).toBe(false)
    device.reset!()
    expect(device.config().subarray(0, 6)).toEqual(Uint8Array.of(0x52, 0x54, 0, 0x12, 0x34, 0x56))
  })
})

describe('what the kernel is told', () => {
  test.each([
    [[], 0],
    [[net.VIRTIO_NET_F_GUEST_TSO4, net.VIRTIO_NET_F_GUEST_UFO], 0],
    [[net.VIRTIO_NET_F_GUEST_CSUM], CSUM],
    [[1, net.VIRTIO_NET_F_GUEST_TSO4], CSUM | TSO4],
    [[1, net.VIRTIO_NET_F_GUEST_TSO6, net.VIRTIO_NET_F_GUEST_ECN], CSUM | TSO6 | ECN],
    [[1, net.VIRTIO_NET_F_GUEST_ECN], CSUM],
    [[1, net.VIRTIO_NET_F_GUEST_UFO], CSUM | UFO],
    [[1, net.VIRTIO_NET_F_GUEST_USO4], CSUM],
    [[1, net.VIRTIO_NET_F_GUEST_USO4, net.VIRTIO_NET_F_GUEST_USO6], CSUM | USO],
  ])('features %j → TUN_F %i', (bits, flags) => {
    expect(offloads(featureSet(...bits))).toBe(flags)
  })

  test('header size and offloads follow the driver, and go back with it', async () => {
    const host = new FakeHost()
    const device = await open(tap, host)
    host.take()
    device.negotiated!(VERSION_1 | featureSet(1, 7, 8))
    expect(host.take()).toEqual(['header 12', `offloads ${CSUM | TSO4 | TSO6}`])
    device.negotiated!(featureSet(1))
    expect(host.take()).toEqual(['header 10', `offloads ${CSUM}`])
    device.negotiated!(featureSet(1, net.VIRTIO_NET_F_MRG_RXBUF))
    expect(host.take()).toEqual(['header 12', `offloads ${CSUM}`])
    device.reset!()
    expect(host.take()).toEqual(['header 10', 'offloads 0'])
  })

  test('offloads that the driver switched stay over a repeated SET_FEATURES', async () => {
    const host = new FakeHost()
    const device = await open(tap, host)
    device.negotiated!(VERSION_1 | featureSet(1, 7))
    host.take()
    device.reported!(2, { kind: 'offloads', features: featureSet(1) })
    expect(host.take()).toEqual([`offloads ${CSUM}`])
    const VHOST_F_LOG_ALL = 26
    device.negotiated!(VERSION_1 | featureSet(1, 7, VHOST_F_LOG_ALL))
    expect(host.take()).toEqual([])
  })

  test('an offload that the kernel does not know is never asked for', async () => {
    const host = new FakeHost()
    host.results.setTapOffloads = ((_: number, flags: number) => ((flags & UFO) === 0 ? 0 : -22)) as never
    const device = await open(tap, host)
    host.take()
    device.negotiated!(VERSION_1 | featureSet(1, net.VIRTIO_NET_F_GUEST_UFO))
    expect(host.take()).toEqual(['header 12', `offloads ${CSUM}`])
  })
})

describe('queues of a tap take part', () => {
  const MQ = VERSION_1 | featureSet(net.VIRTIO_NET_F_MQ, net.VIRTIO_NET_F_CTRL_VQ)

  async function fourPairs(features: bigint): Promise<{ device: Device<NetQueueData>; host: FakeHost }> {
    const host = new FakeHost()
    const device = await open({ ...tap, 'queue-pairs': 4 }, host)
    expect(host.take().filter((call) => call.startsWith('queue'))).toEqual([0, 1, 2, 3].map((i) => `queue ${i} off`))
    device.negotiated!(features)
    host.take()
    return { device, host }
  }

  test('as QEMU enables their rings', async () => {
    const { device, host } = await fourPairs(MQ)
    for (const queue of [0, 1, 2, 3]) device.ringActive!(queue, true)
    expect(host.take()).toEqual(['queue 0 on', 'queue 1 on'])
    device.ringActive!(2, false)
    device.ringActive!(3, false)
    expect(host.take()).toEqual(['queue 1 off'])
    device.reset!()
    expect(host.take()).toEqual(['header 10', 'offloads 0', 'queue 0 off'])
  })

  test('as the driver says whose control queue is ours', async () => {
    const { device, host } = await fourPairs(MQ)
    device.ringActive!(8, true)
    for (let queue = 0; queue < 8; queue++) device.ringActive!(queue, true)
    expect(host.take()).toEqual(['queue 0 on'])
    device.reported!(8, { kind: 'pairs', pairs: 3 })
    expect(host.take()).toEqual(['queue 1 on', 'queue 2 on'])
    device.reported!(8, { kind: 'pairs', pairs: 1 })
    expect(host.take()).toEqual(['queue 1 off', 'queue 2 off'])
  })

  test('only the first, without MQ: behind it is the control queue', async () => {
    const { device, host } = await fourPairs(VERSION_1)
    for (const queue of [0, 1, 2]) device.ringActive!(queue, true)
    expect(host.take()).toEqual(['queue 0 on'])
    expect(new Set(samples(device, 'packets_total').map(({ labels }) => labels['queue']))).toEqual(new Set([0, 1]))
  })

  test('a single queue can’t be detached', async () => {
    const host = new FakeHost()
    const device = await open(tap, host)
    device.ringActive!(0, true)
    expect(host.calls.filter((call) => call.startsWith('queue'))).toEqual([])
  })
})

describe('vhost-user’s own requests', () => {
  test('SET_MTU: with --mtu up to that', async () => {
    const host = new FakeHost()
    const { network } = await open({ ...tap, mtu: 9000 }, host)
    host.take()
    expect([67, 68, 9000, 9001].map((mtu) => network!.setMtu(mtu))).toEqual([false, true, true, false])
    expect(host.take()).toEqual([])
  })

  test('SET_MTU: else the tap follows if it can', async () => {
    const host = new FakeHost()
    const { network } = await open(tap, host)
    host.take()
    expect(network!.setMtu(9000)).toBe(true)
    expect(host.take()).toEqual(['mtu 9000'])
    host.results.setLinkMtu = () => -1
    expect([1400, 1500, 1501].map((mtu) => network!.setMtu(mtu))).toEqual([true, true, false])
    const { network: switched } = await open(onSwitch)
    expect([67, 68, 65535, 65536].map((mtu) => switched!.setMtu(mtu))).toEqual([false, true, true, false])
  })

  const mac = Uint8Array.of(0x52, 0x54, 0, 1, 2, 3)
  const rarp = `${'ff'.repeat(6)}525400010203803500010800060400${'03'}525400010203${'00'.repeat(4)}525400010203`

  test('SEND_RARP on a tap, with the header of the driver', async () => {
    const host = new FakeHost()
    const device = await open(tap, host)
    device.network!.announce(mac)
    device.negotiated!(VERSION_1)
    device.network!.announce(mac)
    const expected = rarp.padEnd(120, '0')
    expect(host.packets.map((packet) => Buffer.from(packet).toString('hex'))).toEqual([
      '00'.repeat(10) + expected,
      '00'.repeat(12) + expected,
    ])
  })

  test('SEND_RARP on a switch goes by the first transmit queue', async () => {
    const host = new FakeHost()
    const { network } = await open(onSwitch, host)
    network!.announce(mac)
    const [{ queue, message } = { queue: -1, message: undefined }] = host.sent
    expect(queue).toBe(1)
    expect(message).toMatchObject({ kind: 'announce' })
    expect(Buffer.from((message as { frame: Uint8Array }).frame).toString('hex')).toBe(rarp.padEnd(120, '0'))
  })

  test('a driver that can announces itself', async () => {
    const host = new FakeHost()
    const device = await open(onSwitch, host)
    device.negotiated!(featureSet(net.VIRTIO_NET_F_GUEST_ANNOUNCE, net.VIRTIO_NET_F_STATUS, net.VIRTIO_NET_F_CTRL_VQ))
    device.network!.announce(mac)
    expect([host.configChanges, host.sent.length]).toEqual([1, 0])
    expect(view(device).getUint16(6, true)).toBe(3)
    device.reported!(2, { kind: 'announced' })
    expect(view(device).getUint16(6, true)).toBe(1)
  })

  test('the MAC that the driver sets is in the config space', async () => {
    const device = await open(onSwitch)
    device.reported!(2, { kind: 'mac', mac })
    expect(device.config().subarray(0, 6)).toEqual(mac)
  })
})

describe('taps that are refused', () => {
  test.each([
    [{ tun: true }, 'ERR_NET_TAP_KIND', 'fake0 is a tun'],
    [{ vnetHeader: false }, 'ERR_NET_TAP_HEADER', 'fake0 has no virtio-net headers'],
    [{ packetInfo: true }, 'ERR_NET_TAP_HEADER', 'fake0 has packet-information headers'],
  ])('%j', async (change, code, problem) => {
    for (const options of [tap, { 'tap-fd': '3' }]) {
      const host = new FakeHost()
      host.tap = { ...TAP, ...change }
      const error = await refusal(options, host)
      expect(error.code).toBe(code)
      expect(error.message).toContain(problem)
    }
  })

  test.each([
    [-7, 'ERR_NET_TAP_QUEUES'],
    [-24, 'ERR_NET_TAP_OPEN'],
    [-16, 'ERR_NET_TAP_BUSY'],
  ])('a further queue that fails with %i leaves none open', async (result, code) => {
    const host = new FakeHost()
    let queues = 0
    host.results.openTap = () => (++queues > 2 ? result : 0)
    expect((await refusal({ ...tap, 'queue-pairs': 4 }, host)).code).toBe(code)
  })

  test('an fd whose link is elsewhere can be served, but not set up', async () => {
    const device = await open({ 'tap-fd': '3' })
    expect(device.queueData).toMatchObject({ tapFds: [3], mtu: 65535, pairs: 1 })
    expect(device.network!.setMtu(9000)).toBe(true)
    for (const [options, option] of [
      [{ mtu: 9000 }, '--mtu'],
      [{ bridge: 'br0' }, '--bridge'],
    ] as const) {
      expect(await refusal({ 'tap-fd': '3', ...options })).toMatchObject({ code: 'ERR_NET_TAP_LINK', option })
    }
  })
})

describe('metrics', () => {
  test('of queues in use only, with every reason', async () => {
    const device = await open({ ...tap, 'queue-pairs': 2 })
    expect([...device.samples!()]).toEqual([])
    const rx = new NetCounters(device.queueData.counters, 0)
    rx.packets(1, 100)
    rx.packets(1, 60)
    rx.add(SEGMENTED, 1)
    rx.add(STARVED, 5)
    new NetCounters(device.queueData.counters, 3).drop(DROP_DISABLED)
    const labels = { queue: 0, direction: 'rx' }
    expect(samples(device, 'packets_total')).toEqual([
      { metric: 'packets_total', labels, value: 2 },
      { metric: 'packets_total', labels: { queue: 3, direction: 'tx' }, value: 0 },
    ])
    expect(samples(device, 'bytes_total')[0]!.value).toBe(160)
    expect(samples(device, 'rx_starved_total')).toEqual([
      { metric: 'rx_starved_total', labels: { queue: 0 }, value: 5 },
    ])
    const segmented = { ...labels, offload: 'segmentation' }
    expect(samples(device, 'offloaded_packets_total')).toContainEqual({
      metric: 'offloaded_packets_total',
      labels: segmented,
      value: 1,
    })
    const drops = samples(device, 'drops_total').filter((sample) => sample.labels['queue'] === 3)
    expect(drops.filter(({ value }) => value > 0).map((sample) => sample.labels['reason'])).toEqual(['disabled'])
    expect(drops).toHaveLength(TX_DROPS.length)
    expect(samples(device, 'drops_total')).toHaveLength(TX_DROPS.length + RX_DROPS.length)
    expect(new Set([...TX_DROPS, ...RX_DROPS]).size).toBe(DROP_REASONS.length)
    device.ringActive!(1, true)
    expect(samples(device, 'packets_total').map((sample) => sample.labels['queue'])).toEqual([0, 1, 3])
  })

  test('every sample has a metric, with its labels', async () => {
    const device = await open({ ...onSwitch, uplink: 'fake1' })
    new NetCounters(device.queueData.counters, 0).values.set([1, 1], PACKETS)
    expect(BYTES).toBe(PACKETS + 1)
    const seen = [...device.samples!()]
    for (const { metric, labels } of seen) {
      const row = definition.metrics!.find(({ name }) => name === metric)
      expect(Object.keys(labels), metric).toEqual(row?.labels)
    }
    expect(new Set(seen.map(({ metric }) => metric))).toEqual(new Set(definition.metrics!.map(({ name }) => name)))
  })

  test('of a switch from one device, of a port from its own', async () => {
    const host = new FakeHost()
    const other = Object.assign(new FakeHost(), { name: 'net1', daemon: host.daemon })
    const devices = [await open(onSwitch, host), await open(onSwitch, other)]
    const counters = new Float64Array(devices[0]!.queueData.place!.counters)
    counters[FLOODS] = 7
    counters[PORT_DROPS + 1] = 3
    expect(devices.map((device) => samples(device, 'switch_floods_total').map(({ value }) => value))).toEqual([[7], []])
    expect(devices.map((device) => samples(device, 'switch_port_drops_total'))).toEqual([
      [{ metric: 'switch_port_drops_total', labels: { switch: 'lan', port: 'net0' }, value: 0 }],
      [{ metric: 'switch_port_drops_total', labels: { switch: 'lan', port: 'net1' }, value: 3 }],
    ])
    devices[0]!.close()
    opened.splice(opened.indexOf(devices[0]!), 1)
    expect(samples(devices[1]!, 'switch_floods_total')).toHaveLength(1)
  })
})

describe('--pcap', () => {
  test('looking at it leaves a file alone, the first ring replaces it', async () => {
    const file = join(dir, 'a.pcap')
    writeFileSync(file, 'precious')
    const device = await open({ ...onSwitch, pcap: file, 'queue-pairs': 2 })
    expect(device.queueData.captures).toHaveLength(4)
    expect(readFileSync(file, 'latin1')).toBe('precious')
    device.ringActive!(0, true)
    // The section header block of pcapng.
    expect(readFileSync(file).readUInt32LE(0)).toBe(0x0a0d0d0a)
    device.ringActive!(0, false)
    device.ringActive!(0, true)
  })

  test('without it there is none', async () => {
    expect((await open(onSwitch)).queueData.captures).toEqual([])
  })

  test('refused: a directory that is none, something else than a file, another device’s', async () => {
    const missing = join(dir, 'no', 'x.pcap')
    expect(await refusal({ ...onSwitch, pcap: missing })).toMatchObject({ code: 'ERR_NET_PCAP', option: '--pcap' })
    expect((await refusal({ ...tap, pcap: '/dev/null' })).message).toContain('no regular file')
    const host = new FakeHost()
    await open({ ...onSwitch, pcap: join(dir, 'b.pcap') }, host)
    expect((await refusal({ ...onSwitch, pcap: join(dir, 'x', '..', 'b.pcap') }, host)).code).toBe('ERR_NET_PCAP')
    opened.pop()!.close()
    await open({ ...onSwitch, pcap: join(dir, 'b.pcap') }, host)
  })

  test('a capture that can’t start is told, and the card runs', async () => {
    const host = new FakeHost()
    const file = join(dir, 'gone', 'c.pcap')
    mkdirSync(join(dir, 'gone'))
    const device = await open({ ...onSwitch, pcap: file }, host)
    rmSync(join(dir, 'gone'), { recursive: true })
    device.ringActive!(0, true)
    device.ringActive!(1, true)
    expect(host.lines.filter(({ level }) => level === 'error').map(({ message }) => message)).toEqual([
      'the capture cannot be started',
    ])
  })
})

describe('QEMU', () => {
  test.each([
    [{}, { rx_queue_size: 1024, tx_queue_size: 1024 }, 1],
    [
      { 'queue-pairs': 4, mac: '52:54:00:12:34:56', mtu: 9000, 'queue-size': 256 },
      { mac: '52:54:00:12:34:56', mq: 'on', vectors: 10, rx_queue_size: 256, tx_queue_size: 256, host_mtu: 9000 },
      4,
    ],
  ])('%j', async (options, properties, queues) => {
    const device = await open({ ...onSwitch, ...(options as Partial<NetOptions>) })
    expect(device.qemu!()).toEqual({ driver: 'virtio-net-pci', properties, netdev: { queues } })
  })

  test('rings that QEMU does not have', async () => {
    const device = await open({ ...onSwitch, 'queue-size': 128 })
    expect(() => device.qemu!()).toThrow("--queue-size: QEMU's network card has rings of 256 or more.")
  })
})

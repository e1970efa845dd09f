/** What a network card hands over, to another host or to a successor: its state, its tap, its capture. */
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import * as v from 'valibot'
import { afterAll, afterEach, describe, expect, test } from 'vitest'
import definition from '../../devices/net/index.ts'
import { type NetOptions, netOptions } from '../../devices/net/options.ts'
import type { NetQueueData } from '../../devices/net/shared.ts'
import { ConfigError, type Device } from '../../src/device/index.ts'
import { native } from '../../src/native.ts'
import { featureSet } from '../../src/virtio/features.ts'
import * as net from '../../src/virtio/net.ts'
import { FakeHost, TAP } from './fake-network.ts'

const MQ = (1n << 32n) | featureSet(1, 7, net.VIRTIO_NET_F_MQ, net.VIRTIO_NET_F_CTRL_VQ)
const CSUM = 1
const TSO4 = 2

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

/** A host whose predecessor's is `before`: it has duplicates of the fds. */
function successorOf(before: FakeHost): FakeHost {
  const host = new FakeHost()
  host.tap = before.tap
  for (const [key, { fds, facts }] of before.handover.kept) {
    const copy = JSON.parse(JSON.stringify(facts)) as unknown
    host.handover.inherited.set(key, { fds: fds.map((fd) => native.dup(fd)), facts: copy })
  }
  return host
}

describe('state', () => {
  const driven = async (host = new FakeHost()) => {
    const device = await open({ tap: 'fake0', 'queue-pairs': 4 }, host)
    device.negotiated!(MQ)
    device.ringActive!(8, true)
    device.reported!(8, { kind: 'mac', mac: Uint8Array.of(2, 1, 2, 3, 4, 5) })
    device.reported!(8, { kind: 'pairs', pairs: 3 })
    device.reported!(8, { kind: 'offloads', features: featureSet(1) })
    return device
  }

  test.each(['before', 'after'])('goes along, with SET_FEATURES %s it', async (order) => {
    const state = await (await driven()).saveState!()
    const host = new FakeHost()
    const device = await open({ tap: 'fake0', 'queue-pairs': 4 }, host)
    if (order === 'before') device.negotiated!(MQ)
    await device.loadState!(state)
    if (order === 'after') device.negotiated!(MQ)
    expect([...device.config().subarray(0, 6)]).toEqual([2, 1, 2, 3, 4, 5])
    expect(device.queueData).toMatchObject({ pairsInUse: 3, offloads: featureSet(1) })
    expect(host.take().findLast((call) => call.startsWith('offloads'))).toBe(`offloads ${CSUM}`)
    device.ringActive!(8, true)
    for (let queue = 0; queue < 8; queue++) device.ringActive!(queue, true)
    expect(host.take()).toEqual(['queue 0 on', 'queue 1 on', 'queue 2 on'])
  })

  test('of a driver that did nothing is that of a new card', async () => {
    const device = await open({ switch: 's' })
    const fresh = await open({ switch: 's' })
    await fresh.loadState!(await device.saveState!())
    expect(fresh.config()).toEqual(device.config())
    expect(fresh.queueData).toMatchObject({ pairsInUse: 1, offloads: undefined })
  })

  const good = {
    features: '0',
    mac: '020102030405',
    announcing: false,
    pairsInUse: 1,
    offloads: null,
    capturing: false,
  }
  test.each([
    ['nothing', ''],
    ['no object', '7'],
    ['no features', JSON.stringify({ ...good, features: undefined })],
    ['features that are none', JSON.stringify({ ...good, features: '-1' })],
    ['more pairs than there are', JSON.stringify({ ...good, pairsInUse: 2 })],
    ['no pairs', JSON.stringify({ ...good, pairsInUse: 0 })],
    ['half a MAC', JSON.stringify({ ...good, mac: '0201' })],
    ['offloads that are none', JSON.stringify({ ...good, offloads: 'all' })],
  ])('with %s is refused', async (_, text) => {
    const device = await open({ switch: 's' })
    const before = device.config()
    await expect(async () => device.loadState!(new TextEncoder().encode(text))).rejects.toThrow()
    expect(device.config()).toEqual(before)
  })

  test('with more than this version knows is taken', async () => {
    const device = await open({ switch: 's' })
    await device.loadState!(new TextEncoder().encode(JSON.stringify({ ...good, later: true })))
    expect(device.config()[0]).toBe(2)
  })
})

describe('a tap', () => {
  test('is left alone until the predecessor lets go, and told only what is different then', async () => {
    const before = new FakeHost()
    const old = await open({ tap: 'fake0', 'queue-pairs': 2 }, before)
    old.negotiated!(MQ)
    // As QEMU does it, one pair.
    for (const queue of [0, 1]) old.ringActive!(queue, true)
    before.tap = { ...before.tap, headerSize: 12 }
    const host = successorOf(before)
    const device = await open({ tap: 'fake0', 'queue-pairs': 2 }, host)
    expect(device.features).toBe(old.features)
    await device.loadState!(await old.saveState!())
    device.negotiated!(MQ)
    for (const queue of [0, 1]) device.ringActive!(queue, true)
    expect(host.take()).toEqual([])
    let discarded = 0
    Object.assign(host.network, { discardPackets: () => discarded++ })
    device.takeOver!()
    // The fake kernel says that both queues take part.
    expect(host.take()).toEqual(['header 12', `offloads ${CSUM | TSO4}`, 'queue -1 off'])
    expect(discarded).toBe(0)
    device.ringActive!(2, true)
    expect(host.take()).toEqual(['queue -1 on'])
    device.takeOver!()
    expect(host.take()).toEqual([])
  })

  test('that the new process gives up is as it was', async () => {
    const before = new FakeHost()
    before.links.set('fake0', { index: 7, up: true, mtu: 1500, mac: new Uint8Array(6), bridge: false, master: 0 })
    await open({ tap: 'fake0' }, before)
    const host = successorOf(before)
    const device = await open({ tap: 'fake0' }, host)
    opened.pop()
    device.close()
    expect(host.take()).toEqual([])
    expect(host.handover.kept.size).toBe(0)
  })

  test('that existed gets back what it had before the first process, by the last one', async () => {
    const before = new FakeHost()
    before.links.set('fake0', { index: 7, up: true, mtu: 1500, mac: new Uint8Array(6), bridge: false, master: 0 })
    before.tap = { ...TAP, headerSize: 11 }
    await open({ tap: 'fake0' }, before)
    before.tap = { ...before.tap, headerSize: 12 }
    const host = successorOf(before)
    const device = await open({ tap: 'fake0' }, host)
    device.takeOver!()
    host.take()
    opened.pop()
    device.close()
    expect(host.take()).toEqual(['header 11', 'offloads 0'])
  })

  test.each([
    ['of another size', { tap: 'fake0', 'queue-pairs': 2 } as const],
    ['of facts that are none', { tap: 'fake0' } as const],
  ])('%s is refused', async (_, options) => {
    const before = new FakeHost()
    await open({ tap: 'fake0' }, before)
    const host = successorOf(before)
    if (options['queue-pairs' as never] === undefined) {
      const { fds } = host.handover.inherited.get('tap:fake0')!
      host.handover.inherited.set('tap:fake0', { fds, facts: { origin: 'heaven' } })
    }
    await expect(open(options, host)).rejects.toThrow(ConfigError)
  })

  test('the uplink of a switch goes along with it, by whichever device comes first', async () => {
    const before = new FakeHost()
    await open({ switch: 's', uplink: 'fake0' }, before)
    await open({ switch: 's', uplink: 'fake0' }, before)
    expect([...before.handover.kept.keys()]).toEqual(['tap:fake0'])
    const host = successorOf(before)
    const first = await open({ switch: 's', uplink: 'fake0' }, host)
    const second = await open({ switch: 's' }, host)
    expect(host.take()).toEqual([])
    second.takeOver!()
    first.takeOver!()
    expect(host.take()).toEqual(['header 12', 'offloads 127'])
  })
})

describe('a capture', () => {
  const sections = (file: string): number => {
    const bytes = readFileSync(file)
    let count = 0
    for (let at = 0; at < bytes.length; at += bytes.readUInt32LE(at + 4)) {
      if (bytes.readUInt32LE(at) === 0x0a0d0d0a) count++
    }
    return count
  }

  test('is continued by a successor, once the predecessor has finished its part', async () => {
    const pcap = join(dir, 'a.pcapng')
    const before = new FakeHost()
    const old = await open({ switch: 's', pcap }, before)
    old.ringActive!(0, true)
    const host = successorOf(before)
    const device = await open({ switch: 's', pcap }, host)
    await device.loadState!(await old.saveState!())
    device.ringActive!(0, true)
    const size = readFileSync(pcap).length
    old.letGo!()
    expect(readFileSync(pcap).length).toBeGreaterThan(size)
    expect(sections(pcap)).toBe(1)
    device.takeOver!()
    expect(sections(pcap)).toBe(2)
    opened.splice(0, 1)
    opened.pop()!.close()
    expect(sections(pcap)).toBe(2)
  })

  test('goes on where it was when the handover fails', async () => {
    const pcap = join(dir, 'b.pcapng')
    const device = await open({ switch: 's', pcap })
    device.ringActive!(0, true)
    for (let i = 2; i < 5; i++) {
      device.letGo!()
      device.takeBack!()
      expect(sections(pcap)).toBe(i)
    }
  })

  test('that has not begun yet is begun anew', async () => {
    const pcap = join(dir, 'c.pcapng')
    const before = new FakeHost()
    const old = await open({ switch: 's', pcap }, before)
    writeFileSync(pcap, 'of another day')
    const host = successorOf(before)
    const device = await open({ switch: 's', pcap }, host)
    await device.loadState!(await old.saveState!())
    old.letGo!()
    device.takeOver!()
    expect(readFileSync(pcap, 'latin1')).toBe('of another day')
    device.ringActive!(0, true)
    expect(sections(pcap)).toBe(1)
  })

  test('begins the next file when the one at hand is full', async () => {
    const pcap = join(dir, 'd.pcapng')
    const options = { switch: 's', pcap, 'pcap-size': 1 << 20, 'pcap-files': 3 }
    const device = await open(options)
    device.ringActive!(0, true)
    device.letGo!()
    // Somebody's packets, all of them in a block that nobody knows.
    const filler = Buffer.alloc(1_048_276)
    filler.writeUInt32LE(0x0bad, 0)
    filler.writeUInt32LE(filler.length, 4)
    filler.writeUInt32LE(filler.length, filler.length - 4)
    writeFileSync(pcap, filler, { flag: 'a' })
    device.takeBack!()
    expect(sections(`${pcap}.1`)).toBe(1)
    expect(sections(pcap)).toBe(1)
    expect(existsSync(`${pcap}.2`)).toBe(false)
  })
})

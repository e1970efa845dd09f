/** examples/devices/mangling-nic.ts: what comes out of the cable at either end; and two cards of a guest with it. */
import { createSocket, type Socket } from 'node:dgram'
import { missingPrerequisites, type TestDevice, testDevice } from 'virtiod/testing'
import { describe, expect, test } from 'vitest'
import definition from '../../../examples/devices/mangling-nic.ts'
import { Stage, transcript } from './transcript.ts'

const RECEIVE = 0
const TRANSMIT = 1
const HEADER = 12

/** A frame that is known by its number. */
function frame(number: number, length = 60): Buffer {
  const bytes = Buffer.alloc(length, number)
  bytes.writeUInt16BE(0x88b5, 12)
  return bytes
}

const packet = (number: number): Buffer => Buffer.concat([Buffer.alloc(HEADER), frame(number)])

/** The other end of the cable. */
class Peer {
  readonly socket: Socket
  readonly frames: Buffer[] = []
  #arrived: () => void = () => undefined

  private constructor(socket: Socket) {
    this.socket = socket
    socket.on('message', (bytes) => {
      this.frames.push(bytes)
      this.#arrived()
    })
  }

  static async bind(): Promise<Peer> {
    const socket = createSocket('udp4')
    await new Promise<void>((resolve) => socket.bind(0, '127.0.0.1', resolve))
    return new Peer(socket)
  }

  get port(): number {
    return this.socket.address().port
  }

  /** Resolves when so many frames have come. */
  async got(count: number): Promise<number[]> {
    while (this.frames.length < count) {
      await new Promise<void>((resolve) => {
        this.#arrived = resolve
      })
    }
    return this.numbers
  }

  get numbers(): number[] {
    return this.frames.map((bytes) => bytes.at(-1)!)
  }
}

/** A card and its peer. */
class Bench implements AsyncDisposable {
  readonly device: TestDevice
  readonly peer: Peer
  readonly port: number

  private constructor(device: TestDevice, peer: Peer, port: number) {
    this.device = device
    this.peer = peer
    this.port = port
  }

  static async make(rules: Record<string, unknown> = {}, split = false): Promise<Bench> {
    const peer = await Peer.bind()
    // A port that was free a moment ago.
    const probe = await Peer.bind()
    const { port } = probe
    await new Promise<void>((resolve) => probe.socket.close(resolve))
    const options = { local: `127.0.0.1:${port}`, peer: `127.0.0.1:${peer.port}`, ...rules }
    return new Bench(await testDevice(definition, { options, split }), peer, port)
  }

  async transmit(...numbers: number[]): Promise<void> {
    for (const number of numbers) await this.device.request(TRANSMIT, packet(number))
  }

  /** From the peer's side. */
  async send(bytes: Uint8Array): Promise<void> {
    await new Promise((resolve) => this.peer.socket.send(bytes, this.port, '127.0.0.1', resolve))
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.device.close()
    await new Promise<void>((resolve) => this.peer.socket.close(resolve))
  }
}

const soon = { timeout: 20_000, interval: 2 }

const range = (count: number): number[] => Array.from({ length: count }, (_, i) => i)

describe.each([false, true])('a good cable, awkward framing: %s', (split) => {
  test('carries frames to the peer without their headers', async () => {
    await using bench = await Bench.make({}, split)
    await bench.transmit(1, 2, 3)
    expect(await bench.peer.got(3)).toEqual([1, 2, 3])
    expect(bench.peer.frames[0]).toEqual(frame(1))
    expect(bench.device.metrics()).toMatchObject({ 'packets_total{direction="out"}': 3 })
  })

  test('carries frames to the guest, with a header of one buffer', async () => {
    await using bench = await Bench.make({}, split)
    const buffers = [bench.device.give(RECEIVE, 1526), bench.device.give(RECEIVE, 1526)]
    await bench.send(frame(4, 1514))
    await bench.send(frame(5))
    const [first, second] = await Promise.all(buffers)
    const header = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    expect(Buffer.from(first!)).toEqual(Buffer.concat([Buffer.from(header), frame(4, 1514)]))
    expect(Buffer.from(second!)).toEqual(Buffer.concat([Buffer.from(header), frame(5)]))
  })
})

describe('faults', () => {
  test('drop', async () => {
    await using bench = await Bench.make({ drop: 100 })
    await bench.transmit(1, 2)
    expect(bench.device.metrics()).toMatchObject({ 'mangled_total{direction="out",fate="drop"}': 2 })
    // What had been sent would come before this.
    await bench.send(frame(9))
    await expect.poll(() => bench.device.metrics()['packets_total{direction="in"}'], soon).toBe(1)
    expect(bench.peer.frames).toEqual([])
  })

  test('duplicate', async () => {
    await using bench = await Bench.make({ duplicate: 100 })
    await bench.transmit(1, 2)
    expect(await bench.peer.got(4)).toEqual([1, 1, 2, 2])
  })

  test('corrupt: one bit, not of the Ethernet header', async () => {
    await using bench = await Bench.make({ corrupt: 100 })
    await bench.transmit(...range(32))
    await bench.peer.got(32)
    const wrong = new Set<number>()
    for (const [number, bytes] of bench.peer.frames.entries()) {
      const good = frame(number)
      const bits = [...bytes].flatMap((byte, at) =>
        range(8)
          .filter((bit) => ((byte ^ good[at]!) >> bit) & 1)
          .map((bit) => at * 8 + bit)
      )
      expect(bits).toHaveLength(1)
      expect(bits[0]).toBeGreaterThanOrEqual(14 * 8)
      wrong.add(bits[0]!)
    }
    expect(wrong.size).toBeGreaterThan(20)
    // A frame that is nothing but a header has nothing to corrupt.
    await bench.device.request(TRANSMIT, packet(1).subarray(0, HEADER + 14))
    await bench.peer.got(33)
    expect(bench.peer.frames[32]).toEqual(frame(1).subarray(0, 14))
  })

  test('delay', async () => {
    await using bench = await Bench.make({ delay: 50, 'delay-ms': 30 })
    await bench.transmit(...range(16))
    const order = await bench.peer.got(16)
    expect(order.toSorted((a, b) => a - b)).toEqual(range(16))
    expect(order).not.toEqual(range(16))
    const late = bench.device.metrics()['mangled_total{direction="out",fate="delay"}']!
    expect(order.slice(0, 16 - late)).toEqual(order.slice(0, 16 - late).toSorted((a, b) => a - b))
  })

  test('reorder: behind the next one, and never for ever', async () => {
    await using bench = await Bench.make({ reorder: 30, 'delay-ms': 30 })
    await bench.transmit(...range(32))
    const order = await bench.peer.got(32)
    expect(order.toSorted((a, b) => a - b)).toEqual(range(32))
    expect(order).not.toEqual(range(32))
    await using last = await Bench.make({ reorder: 100, 'delay-ms': 1 })
    await last.transmit(1)
    expect(await last.peer.got(1)).toEqual([1])
  })

  test('follow from the seed, for each direction', async () => {
    const survivors = async (seed: number, direction: 'in' | 'out'): Promise<number[]> => {
      await using bench = await Bench.make({ drop: 50, seed, direction })
      if (direction === 'out') {
        await bench.transmit(...range(64))
        const lost = bench.device.metrics()['mangled_total{direction="out",fate="drop"}'] ?? 0
        expect(lost).toBeGreaterThan(16)
        expect(lost).toBeLessThan(48)
        return await bench.peer.got(64 - lost)
      }
      const buffers = range(64).map(() => bench.device.give(RECEIVE, 1526))
      for (const number of range(64)) await bench.send(frame(number))
      await expect.poll(() => bench.device.metrics()['packets_total{direction="in"}'], soon).toBe(64)
      const lost = bench.device.metrics()['mangled_total{direction="in",fate="drop"}'] ?? 0
      const received = await Promise.all(buffers.slice(0, 64 - lost))
      for (const buffer of buffers.slice(64 - lost)) buffer.catch(() => undefined)
      return received.map((bytes) => bytes.at(-1)!)
    }
    const first = await survivors(1, 'out')
    expect(await survivors(1, 'out')).toEqual(first)
    expect(await survivors(1, 'in')).toEqual(first)
    expect(await survivors(2, 'out')).not.toEqual(first)
  })

  test('a thousand packets are kept back, and no more', async () => {
    await using bench = await Bench.make({ delay: 50, reorder: 50, 'delay-ms': 60_000 })
    await bench.transmit(...range(4000).map((number) => number & 0xff))
    const metrics = bench.device.metrics()
    const [late = 0, behind = 0, dropped = 0] = ['delay', 'reorder', 'drop'].map(
      (fate) => metrics[`mangled_total{direction="out",fate="${fate}"}`]
    )
    expect(dropped).toBeGreaterThan(1000)
    expect(late + behind - dropped).toBeGreaterThanOrEqual(1000)
  })

  test('only where they are wanted', async () => {
    await using bench = await Bench.make({ drop: 100, direction: 'in' })
    await bench.transmit(1)
    expect(await bench.peer.got(1)).toEqual([1])
    await bench.send(frame(2))
    await expect.poll(() => bench.device.metrics()['mangled_total{direction="in",fate="drop"}'], soon).toBe(1)
  })
})

describe('a guest that does not take part', () => {
  test('frames without a buffer are missed', async () => {
    await using bench = await Bench.make()
    await bench.send(frame(1))
    await expect.poll(() => bench.device.metrics()['missed_total'], soon).toBe(1)
    const small = bench.device.give(RECEIVE, HEADER + 59)
    await bench.send(frame(2))
    expect(await small).toEqual(new Uint8Array(0))
    expect(bench.device.metrics()['missed_total']).toBe(2)
  })

  test('what is no packet is counted', async () => {
    await using bench = await Bench.make()
    await bench.device.request(TRANSMIT, Buffer.alloc(HEADER))
    await bench.device.request(TRANSMIT, Buffer.alloc(3))
    await bench.device.request(TRANSMIT, Buffer.alloc(HEADER + 65_536 + 22))
    expect(bench.device.errors).toEqual({ malformed: 3 })
    await bench.transmit(1)
    expect(await bench.peer.got(1)).toEqual([1])
  })

  test('with its link down its packets go nowhere', async () => {
    await using bench = await Bench.make()
    bench.device.enableQueue(TRANSMIT, false)
    await bench.transmit(1)
    bench.device.enableQueue(TRANSMIT, true)
    await bench.transmit(2)
    expect(await bench.peer.got(1)).toEqual([2])
  })
})

describe('an operator who is mistaken', () => {
  test.each([
    ['an address that is none', { local: 'nowhere' }, 'local'],
    ['more than all', { drop: 101 }, 'drop'],
    ['an address of another host', { local: '192.0.2.1:7001' }, 'local'],
  ])('%s', async (_, wrong, option) => {
    const options = { local: '127.0.0.1:0', peer: '127.0.0.1:9', ...wrong }
    await expect(testDevice(definition, { options })).rejects.toMatchObject({
      name: 'ConfigError',
      option: expect.stringContaining(option),
    })
  })
})

test.skipIf(missingPrerequisites().length > 0)(
  'a guest pings itself over the cable',
  async () => {
    await using stage = new Stage('mangling-nic.ts', { kind: 'network' })
    await stage.play(transcript('mangling-nic.ts'))
    const { guest } = stage
    const other = 'nsenter -n -t $(cat /tmp/other)'
    // Whole packets of any length, in both directions. (More than one at a time ping does not wait for at its end.)
    for (const size of [0, 56, 1400, 1472]) {
      await guest.sh(`ping -c 1 -W 20 -s ${size} 10.0.0.2`)
      await guest.sh(`${other} ping -c 1 -W 20 -s ${size} 10.0.0.1`)
    }
    for (const daemon of stage.daemons) expect((await daemon.stop()).code).toBe(0)
  },
  90_000
)

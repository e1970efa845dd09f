/**
 * An independent front-end: dpdk-testpmd's virtio-user port on a switch of virtiod. What it reads from a capture file goes
 * through its ring to our own front-end, comes back, and is written to another file: every byte is compared.
 */
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { NetDriver } from '../../src/frontend/net.ts'
import { Session } from '../../src/frontend/session.ts'
import { Testpmd, whyNoTestpmd } from '../dpdk.ts'
import { isCi } from '../setup/prerequisites.ts'
import { eventually } from '../vhost-user/backend.ts'
import { NetBackend } from './support.ts'

const reason = whyNoTestpmd()
if (reason !== undefined && isCi()) throw new Error(reason)

const PACKETS = 120
/** Of a record and of the file (pcap, microseconds, Ethernet). */
const RECORD_HEADER = 16
const FILE_HEADER = Uint32Array.of(0xa1b2c3d4, 0x0004_0002, 0, 0, 262_144, 1)

function writePcap(path: string, frames: readonly Uint8Array[]): void {
  const records = frames.flatMap((frame) => [
    new Uint8Array(Uint32Array.of(0, 0, frame.length, frame.length).buffer),
    frame,
  ])
  writeFileSync(path, Buffer.concat([new Uint8Array(FILE_HEADER.buffer), ...records]))
}

function readPcap(path: string): Uint8Array[] {
  const file = readFileSync(path)
  const frames: Uint8Array[] = []
  for (let at = FILE_HEADER.byteLength; at + RECORD_HEADER <= file.length; ) {
    const length = file.readUInt32LE(at + 8)
    frames.push(file.subarray(at + RECORD_HEADER, at + RECORD_HEADER + length))
    at += RECORD_HEADER + length
  }
  return frames
}

/** Frames of all lengths, of nobody's protocol, from one guest to another. */
function frames(seed: number): Uint8Array[] {
  return Array.from({ length: PACKETS }, (_, i) => {
    const frame = new Uint8Array(60 + ((i * 37 + seed * 11) % 1455))
    frame.set([2, 0, 0, 0, 0, 0xbb, 2, 0, 0, 0, 0, 0xaa, 0x88, 0xb5])
    for (let at = 14; at < frame.length; at++) frame[at] = (at * 7 + i * 13 + seed) & 0xff
    return frame
  })
}

/** With source and destination exchanged. */
function answer(frame: Uint8Array): Uint8Array {
  const back = frame.slice()
  back.set(frame.subarray(6, 12), 0)
  back.set(frame.subarray(0, 6), 6)
  return back
}

const text = (all: readonly Uint8Array[]): string[] => all.map((frame) => Buffer.from(frame).toString('hex')).sort()

describe.skipIf(reason !== undefined)('a DPDK guest', () => {
  let backend: NetBackend
  beforeAll(() => {
    backend = new NetBackend({ cards: 2, extra: ['--queue-pairs', '2'] })
  })
  afterAll(() => backend[Symbol.asyncDispose]())

  test.each([
    ['mergeable buffers, one pair', 1, 1, 0, 0],
    ['mergeable buffers, two pairs', 1, 2, 0, 0],
    ['no mergeable buffers, one pair', 0, 1, 0, 0],
    ['no mergeable buffers, two pairs', 0, 2, 0, 0],
    ['in order, mergeable buffers', 1, 1, 0, 1],
    ['in order, no mergeable buffers', 0, 1, 0, 1],
    ['packed rings, mergeable buffers, two pairs', 1, 2, 1, 0],
    ['packed rings, no mergeable buffers', 0, 1, 1, 0],
    ['packed rings in order, mergeable buffers', 1, 1, 1, 1],
    ['packed rings in order, no mergeable buffers, two pairs', 0, 2, 1, 1],
  ])('exchanges every byte: %s', async (_, mergeable, queues, packed, inOrder) => {
    using session = Session.open(backend.sockets[1]!, { queues: 0 })
    const driver = new NetDriver(session, { pairs: queues, control: false, rxBuffers: 256 })
    const inputs = Array.from({ length: queues }, (__, queue) => join(backend.directory, `in${queue}.pcap`))
    const outputs = inputs.map((path) => path.replace('in', 'out'))
    const sent = inputs.flatMap((path, queue) => {
      const all = frames(queue + 1)
      writePcap(path, all)
      return all
    })
    const before = backend.drops(0, 3)['disabled'] ?? 0
    const files = [...inputs.map((path) => `rx_pcap=${path}`), ...outputs.map((path) => `tx_pcap=${path}`)]
    await using testpmd = await Testpmd.frontend(backend.sockets[0]!, {
      queues,
      device: [`mrg_rxbuf=${mergeable}`, `packed_vq=${packed}`, `in_order=${inOrder}`],
      vdevs: [`net_pcap0,${files.join(',')}`],
      // Or it throws away what is in the file before it begins to forward.
      extra: ['--no-flush-rx'],
    })
    // It sends on its second pair before it has enabled it, and what is sent on a disabled ring is discarded.
    const discarded = () => (queues === 1 ? 0 : (backend.drops(0, 3)['disabled'] ?? 0) - before)
    const received: Uint8Array[] = []
    while (received.length + discarded() < sent.length) {
      const { frame, queue } = driver.receive(10_000)
      received.push(frame)
      driver.send(answer(frame), { queue })
      driver.sent()
    }
    expect(received.length).toBeGreaterThanOrEqual(PACKETS)
    const wanted = new Set(text(sent))
    expect(text(received).filter((frame) => !wanted.delete(frame))).toEqual([])
    if (queues === 1) expect([...wanted]).toEqual([])
    // testpmd writes the file when it ends: the last answers are on their way to it.
    eventually(() => false, 300)
    await testpmd.stop()
    expect(text(outputs.flatMap(readPcap))).toEqual(text(received.map(answer)))
  })

  test.each([
    ['mergeable buffers, one pair, packets in three segments', 1, 1, [64, 512, 900], 0, 0],
    ['no mergeable buffers, two pairs', 0, 2, [64], 0, 0],
    // Not in three segments: DPDK 22.11 puts those into an indirect table whose first entry, the header, it marks as
    // device-writable, which is no chain (virtio 1.3 §2.8.7) to QEMU or to us.
    ['packed rings', 1, 1, [900], 1, 0],
    ['packed rings in order, two pairs', 0, 2, [64], 1, 1],
    ['in order, packets in three segments', 1, 1, [64, 512, 900], 0, 1],
  ])('sends to another one: %s', async (_, mergeable, queues, txSegments, packed, inOrder) => {
    const device = [`mrg_rxbuf=${mergeable}`, `packed_vq=${packed}`, `in_order=${inOrder}`]
    await using sink = await Testpmd.frontend(backend.sockets[1]!, { mode: 'rxonly', queues, device })
    await using source = await Testpmd.frontend(backend.sockets[0]!, { mode: 'txonly', queues, device, txSegments })
    const passed = () => backend.counter('packets_total', 1, 0)
    const before = passed()
    expect(eventually(() => passed() > before + 1000, 10_000)).toBe(true)
    await source.stop()
    await sink.stop()
    const { received } = sink.totals()
    expect(received).toBeGreaterThan(1000)
    expect(received).toBeLessThanOrEqual(source.totals().transmitted)
    expect(backend.log.split('\n').filter((line) => line.includes('"level":"error"'))).toEqual([])
  })
})

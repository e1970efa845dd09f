/** The way of captured packets from the iothreads: one ring, with a writer and a reader. */
import { Worker } from 'node:worker_threads'
import { describe, expect, test } from 'vitest'
import { allocateCapture, CaptureReader, CaptureWriter } from '../../devices/net/capture.ts'
import { Chain } from '../../src/virtio/chain.ts'
import { GuestMemory } from '../../src/virtio/memory.ts'
import { frame } from './capture-frame.ts'

const SNAPLEN = 262144

/** What is in a ring, all of it. */
function read(reader: CaptureReader): { bytes: Uint8Array; originalLength: number; outbound: boolean }[] {
  const found = []
  reader.refresh()
  for (; reader.peek(); reader.next()) {
    const { at, length, originalLength, outbound } = reader
    found.push({ bytes: reader.bytes.slice(at, at + length), originalLength, outbound })
  }
  return found
}

function ring(
  bytes: number,
  snaplen = SNAPLEN
): { writer: CaptureWriter; reader: CaptureReader; buffer: SharedArrayBuffer } {
  const buffer = allocateCapture(bytes)
  const reader = new CaptureReader(buffer)
  reader.enable(snaplen)
  return { writer: new CaptureWriter(buffer), reader, buffer }
}

describe('the ring', () => {
  test('a packet in the pieces of chains, and its direction', () => {
    const PAGE = 4096
    const memory = new GuestMemory([
      { gpa: 0, size: PAGE, hva: 0x10_0000, buffer: new SharedArrayBuffer(PAGE) },
      { gpa: PAGE, size: PAGE, hva: 0x70_0000, buffer: new ArrayBuffer(PAGE) },
    ])
    const content = frame(1, 2 * PAGE)
    for (const [i, region] of memory.regions.entries()) region.bytes.set(content.subarray(i * PAGE, (i + 1) * PAGE))
    // Readable: [100, 110) and, across the regions, [4000, 4200); writable: [5000, 5012), [6000, 6100), [7000, 7100).
    const chain = new Chain(0)
    chain.begin(memory)
    for (const [at, length, writable] of [
      [100, 10, false],
      [4000, 200, false],
      [5000, 12, true],
      [6000, 100, true],
      [7000, 100, true],
    ] as const) {
      chain.append(memory, at, length, writable)
    }
    const { writer, reader } = ring(4096)
    writer.fromReadable(chain, 12, 198, true)
    expect(writer.begin(150, 150, false, performance.now())).toBeGreaterThanOrEqual(0)
    writer.addWritable(chain, 12, 150)
    writer.commit()
    writer.fromBytes(content, 3, 5, false)
    expect(writer.begin(130, 130, false, 0)).toBeGreaterThanOrEqual(0)
    writer.addWritable(chain, 20, 100)
    writer.addBytes(content, 0, 10)
    writer.addReadable(chain, 0, 20)
    writer.commit()
    const range = (from: number, to: number): number[] => [...content.subarray(from, to)]
    expect(read(reader).map(({ bytes, ...rest }) => ({ ...rest, bytes: [...bytes] }))).toEqual([
      { bytes: range(4002, 4200), originalLength: 198, outbound: true },
      { bytes: [...range(6000, 6100), ...range(7000, 7050)], originalLength: 150, outbound: false },
      { bytes: range(3, 8), originalLength: 5, outbound: false },
      {
        bytes: [...range(6008, 6100), ...range(7000, 7008), ...range(0, 10), ...range(100, 110), ...range(4000, 4010)],
        originalLength: 130,
        outbound: false,
      },
    ])
  })

  test('what exceeds the snap length is left out, in whatever piece it is', () => {
    const { writer, reader } = ring(4096, 10)
    expect(writer.snaplen).toBe(10)
    const bytes = frame(2, 30)
    expect(writer.begin(30, 31, true, 0)).toBeGreaterThanOrEqual(0)
    writer.addBytes(bytes, 0, 6)
    writer.addBytes(bytes, 6, 20)
    writer.addBytes(bytes, 26, 4)
    writer.commit()
    writer.fromBytes(bytes, 0, 4, true)
    const [first, second] = read(reader)
    expect(first).toEqual({ bytes: bytes.slice(0, 10), originalLength: 31, outbound: true })
    expect(second).toEqual({ bytes: bytes.slice(0, 4), originalLength: 4, outbound: true })
  })

  test('a packet that was begun and not committed is none', () => {
    const { writer, reader } = ring(4096)
    writer.begin(100, 100, true, 0)
    writer.addBytes(frame(0, 100), 0, 100)
    expect(read(reader)).toEqual([])
    writer.fromBytes(frame(1, 50), 0, 50, false)
    expect(read(reader).map(({ bytes }) => bytes)).toEqual([frame(1, 50)])
  })

  test('a full ring loses packets and counts them, and goes on when there is room', () => {
    const { writer, reader } = ring(4096)
    // A record is 16 + 1000, a multiple of 8: four fit.
    for (let i = 0; i < 7; i++) writer.fromBytes(frame(i, 1000), 0, 1000, true)
    expect(reader.lost).toBe(3)
    expect(read(reader).map(({ bytes }) => bytes)).toEqual([0, 1, 2, 3].map((i) => frame(i, 1000)))
    writer.fromBytes(frame(9, 1000), 0, 1000, true)
    expect(read(reader).map(({ bytes }) => bytes)).toEqual([frame(9, 1000)])
    expect(reader.lost).toBe(3)
  })

  test('packets of all lengths come out as they went in, over many turns of the ring, and of its positions', () => {
    const { reader, buffer } = ring(8192)
    // Positions count modulo 2^32 and are equal in an empty ring: begin close to the end of them, and of the signed ones.
    for (const start of [-40_000, 0x7fff_8000]) {
      const control = new Int32Array(buffer)
      control[0] = start
      control[16] = start
      const late = new CaptureReader(buffer)
      const writer = new CaptureWriter(buffer)
      const expected: Uint8Array[] = []
      let seed = 1
      for (let i = 0; i < 2000; i++) {
        seed = (seed * 48271) % 0x7fff_ffff
        const bytes = frame(i, seed % 1500)
        const lost = reader.lost
        writer.fromBytes(bytes, 0, bytes.length, i % 2 === 0)
        if (reader.lost === lost) expected.push(bytes)
        if (seed % 3 === 0) expect(read(late).map((packet) => packet.bytes)).toEqual(expected.splice(0))
      }
      expect(read(late).map((packet) => packet.bytes)).toEqual(expected)
      expect(late.used).toBe(0)
    }
  })

  test('the largest packet that a ring takes fits it wherever it stands', () => {
    const { writer, reader } = ring(4096)
    expect(writer.snaplen).toBe(2032)
    for (let i = 0; i < 50; i++) {
      writer.fromBytes(frame(i, i * 8), 0, i * 8, true)
      read(reader)
      writer.fromBytes(frame(i, 9000), 0, 9000, true)
      expect(read(reader)).toEqual([{ bytes: frame(i, 2032), originalLength: 9000, outbound: true }])
    }
    expect(reader.lost).toBe(0)
  })

  test('a writer made anew goes on where the last one was', () => {
    const { writer, reader, buffer } = ring(4096)
    writer.fromBytes(frame(1, 60), 0, 60, true)
    new CaptureWriter(buffer).fromBytes(frame(2, 60), 0, 60, true)
    expect(read(reader).map(({ bytes }) => bytes)).toEqual([frame(1, 60), frame(2, 60)])
  })

  test('when nobody captures nothing is written and nothing counted', () => {
    const buffer = allocateCapture(4096)
    const reader = new CaptureReader(buffer)
    const writer = new CaptureWriter(buffer)
    writer.fromBytes(frame(1, 60), 0, 60, true)
    expect([read(reader), reader.lost]).toEqual([[], 0])
    reader.enable(100)
    writer.fromBytes(frame(2, 60), 0, 60, true)
    reader.enable(0)
    writer.fromBytes(frame(3, 60), 0, 60, true)
    expect([read(reader).map(({ bytes }) => bytes), reader.lost]).toEqual([[frame(2, 60)], 0])
  })

  test.each([0, 2048, 5000])('a ring of %i bytes is refused', (bytes) => {
    expect(() => new CaptureReader(allocateCapture(bytes))).toThrow(RangeError)
  })

  test('between threads each packet arrives whole or is counted as lost', async () => {
    const { reader, buffer } = ring(16384)
    const PACKETS = 300_000
    const worker = new Worker(
      `const { workerData } = require('node:worker_threads')
       import(workerData.module).then(({ CaptureWriter }) => {
         const writer = new CaptureWriter(workerData.buffer)
         const bytes = new Uint8Array(400)
         for (let i = 0; i < ${PACKETS}; i++) {
           const length = 4 + (i * 7919) % 380
           bytes.fill(i, 4, length)
           new DataView(bytes.buffer).setUint32(0, i)
           writer.fromBytes(bytes, 0, length, true)
         }
       })`,
      { eval: true, workerData: { buffer, module: new URL('../../devices/net/capture.ts', import.meta.url).href } }
    )
    let ended = false
    const end = new Promise<void>((resolve, reject) => {
      worker.once('error', reject)
      worker.once('exit', () => {
        ended = true
        resolve()
      })
    })
    let packets = 0
    let last = -1
    let wrong = 0
    const drain = (): void => {
      reader.refresh()
      for (; reader.peek(); reader.next()) {
        const { at, length } = reader
        const number = new DataView(reader.bytes.buffer, reader.bytes.byteOffset + at).getUint32(0)
        packets++
        if (number <= last || length !== 4 + ((number * 7919) % 380)) wrong++
        for (let i = 4; i < length; i++) if (reader.bytes[at + i] !== (number & 0xff)) wrong++
        last = number
      }
    }
    while (!ended) {
      drain()
      await new Promise((resolve) => setImmediate(resolve))
    }
    await end
    drain()
    expect(wrong).toBe(0)
    expect(packets + reader.lost).toBe(PACKETS)
    expect(packets).toBeGreaterThan(1000)
  })
})

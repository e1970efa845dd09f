/** Software segmentation, beside what the kernel makes of the same frames; and without one: put together again. */
import { beforeAll, describe, expect, test } from 'vitest'
import { completeChecksum } from '../../devices/net/checksum.ts'
import { GsoFrame } from '../../devices/net/frame.ts'
import { PacketHeader } from '../../devices/net/header.ts'
import { MAX_SEGMENT_HEADERS, Segmenter } from '../../devices/net/segment.ts'
import { whyNoNamespace } from '../native/network.ts'
import {
  build,
  type Finished,
  type FrameOptions,
  finishedByKernel,
  slowSum,
  TCPV4,
  UFO4,
  UFO6,
  USO4,
} from './frames.ts'
import { caseFrames, cases, mutatedFrames, type PassedFrame, pass } from './segment-cases.ts'

const EVERYTHING = 2n ** 64n - 1n
const GUARD = 0xee
/** Where the frame lies in its buffer, and a segment in its own: neither at 0 nor aligned. */
const FROM = 3
const TO = 5

/** Has a frame finished by us, each packet in hexadecimal, and looks that nothing beside it was written. */
function finish(frame: PassedFrame, segmenter = new Segmenter(0x1000)): string[] {
  const header = new PacketHeader(EVERYTHING)
  const words = new DataView(frame.header.buffer)
  header.load(words.getUint32(0, true), words.getUint32(4, true), words.getUint32(8, true))
  const { length } = frame.bytes
  const buffer = new Uint8Array(FROM + length + 4).fill(GUARD)
  buffer.set(frame.bytes, FROM)
  const view = new DataView(buffer.buffer)
  if (header.gsoType === 0) {
    if (header.flags !== 0) completeChecksum(view, FROM, length, header.csumStart, header.csumOffset)
    expect([...buffer.subarray(0, FROM), ...buffer.subarray(FROM + length)]).toEqual(Array(FROM + 4).fill(GUARD))
    return [Buffer.from(buffer.subarray(FROM, FROM + length)).toString('hex')]
  }
  const gso = new GsoFrame()
  expect(gso.parse(view, FROM, length, header)).toBeGreaterThan(0)
  segmenter.begin(view, FROM, length, header, gso)
  const packets: string[] = []
  const out = new Uint8Array(TO + MAX_SEGMENT_HEADERS).fill(GUARD)
  for (;;) {
    const bytes = segmenter.next(new DataView(out.buffer), TO)
    if (bytes === 0) break
    const { payloadStart, payloadLength } = segmenter
    const payload = buffer.subarray(payloadStart, payloadStart + payloadLength)
    packets.push(Buffer.concat([out.subarray(TO, TO + bytes), payload]).toString('hex'))
    expect(out.subarray(0, TO).every((byte) => byte === GUARD)).toBe(true)
    expect(out.subarray(TO + bytes).every((byte) => byte === GUARD)).toBe(true)
    out.fill(GUARD)
  }
  expect(segmenter.next(new DataView(out.buffer), TO)).toBe(0)
  // The copy is for several receivers.
  expect(Buffer.from(buffer.subarray(FROM, FROM + length)).equals(frame.bytes)).toBe(true)
  return packets
}

const frameOf = (options: FrameOptions): PassedFrame => {
  const frame = pass('', build(options))
  if (frame === undefined) throw new Error('refused')
  return frame
}
const bytesOf = (packets: readonly string[]) => packets.map((packet) => Buffer.from(packet, 'hex'))

const noKernel = whyNoNamespace()

describe.skipIf(noKernel !== undefined)('the same as the kernel', () => {
  const module = new URL('./segment-cases.ts', import.meta.url).href
  const frames = caseFrames()
  let kernel: Finished[] = []
  beforeAll(() => {
    kernel = finishedByKernel(module, 'caseFrames')
  })

  /** Without the virtio-net header, whose flags may say that the kernel has already looked at the checksum. */
  const packetsOf = ({ packets }: Finished, ipv6Fragment: number) =>
    packets.map((packet) => {
      expect(packet.slice(2, 24)).toMatch(/^0*$/)
      const frame = packet.slice(24)
      // The identification of IPv6 fragments is the kernel's own.
      const at = ipv6Fragment * 2 + 8
      return ipv6Fragment === 0 ? frame : `${frame.slice(0, at)}????????${frame.slice(at + 8)}`
    })

  test.each(cases.map(({ name }, index) => ({ name, index })))('$name', ({ name, index }) => {
    const frame = frames[index]!
    const ufo6 = name.startsWith('UFO6')
    const theirs = kernel[index]!
    // Linux counts the options into the offsets: see the test of fragments below instead.
    if (name === 'UFO6 with hop-by-hop options') return expect(theirs.packets).toHaveLength(finish(frame).length)
    expect(theirs.refused).toBeUndefined()
    const fragment = ufo6 ? frame.l4 : 0
    const ours = packetsOf({ packets: finish(frame).map((packet) => '0'.repeat(24) + packet) }, fragment)
    expect(ours).toEqual(packetsOf(theirs, fragment))
  })

  test('whatever passes is taken by the kernel, and is finished the same', () => {
    const mutated = mutatedFrames()
    const theirs = finishedByKernel(module, 'mutatedFrames')
    let compared = 0
    mutated.forEach((frame, i) => {
      const finished = theirs[i]!
      expect(finished.refused, `${i}: ${frame.name}`).toBeUndefined()
      // In fragments, the kernel doesn't start from the sum that the guest left, and chooses the identification.
      if (frame.header[1] === UFO4.gsoType) return
      expect(packetsOf(finished, 0), `${i}: ${frame.name}`).toEqual(finish(frame))
      compared++
    })
    expect(compared).toBeGreaterThan(500)
  })
})

describe('without a kernel', () => {
  test.each(cases.filter(({ gsoType, payload, gsoSize }) => gsoType !== 0 && payload > gsoSize! + 8))(
    '$name: lengths, checksums and all of the payload',
    (options) => {
      const frame = frameOf(options)
      const packets = bytesOf(finish(frame))
      const { ipv6 = false, udp = false, gsoType } = options
      const fragments = gsoType === UFO4.gsoType
      const parts: Buffer[] = []
      packets.forEach((packet, i) => {
        const { l3 } = frame
        if (ipv6) expect(packet.readUInt16BE(l3 + 4)).toBe(packet.length - l3 - 40)
        else expect(packet.readUInt16BE(l3 + 2)).toBe(packet.length - l3)
        if (!ipv6) expect(slowSum(packet, l3, frame.l4)).toBe(0xffff)
        const at = fragments ? frame.l4 + (ipv6 ? 8 : 0) : frame.headerLength
        const part = packet.subarray(at)
        if (fragments) {
          const field = ipv6 ? packet.readUInt16BE(frame.l4 + 2) : packet.readUInt16BE(l3 + 6)
          const offset = ipv6 ? field & ~7 : (field & 0x1fff) * 8
          expect(offset).toBe(parts.reduce((sum, { length }) => sum + length, 0))
          expect(field & (ipv6 ? 1 : 0xe000)).toBe(i === packets.length - 1 ? 0 : ipv6 ? 1 : 0x2000)
        } else {
          expect(transportSum(packet, frame, udp, ipv6)).toBe(0xffff)
          if (udp) expect(packet.readUInt16BE(frame.l4 + 4)).toBe(packet.length - frame.l4)
        }
        parts.push(part)
      })
      const whole = Buffer.concat(parts)
      const from = fragments ? frame.l4 : frame.headerLength
      if (!fragments) return expect(whole.equals(frame.bytes.subarray(from))).toBe(true)
      expect(whole.subarray(8).equals(frame.bytes.subarray(frame.l4 + 8))).toBe(true)
      // Put together, the datagram is right.
      const datagram = Buffer.concat([frame.bytes.subarray(0, frame.l4), whole])
      expect(transportSum(datagram, frame, true, ipv6)).toBe(0xffff)
    }
  )

  test('a frame that is small enough is not one to segment', () => {
    for (const payload of [1448, 9, 0]) {
      expect([...frameOf({ ...TCPV4, gsoSize: 1448, payload }).header.subarray(0, 6)]).toEqual([1, 0, 0, 0, 0, 0])
    }
    expect(frameOf({ ...UFO4, gsoSize: 1480, payload: 1472 }).header[1]).toBe(0)
    expect(frameOf({ ...UFO4, gsoSize: 1480, payload: 1473 }).header[1]).toBe(3)
    expect(frameOf({ ...USO4, gsoSize: 100, payload: 101 }).header[1]).toBe(5)
  })

  test.each([
    { ...TCPV4, gsoSize: 1448, payload: 1448 },
    { ...TCPV4, gsoSize: 1448, payload: 0 },
    { ...UFO6, gsoSize: 1448, payload: 101 },
  ])('and is one segment for somebody who has it segmented all the same: %o', (options) => {
    // That is how a frame looks which its sender changes after the header was checked.
    const { bytes, header: raw, l4, headerLength } = build(options)
    const header = new PacketHeader(EVERYTHING)
    const words = new DataView(raw.buffer)
    header.load(words.getUint32(0, true), words.getUint32(4, true), words.getUint32(8, true))
    const gso = new GsoFrame()
    const view = new DataView(bytes.buffer)
    gso.parse(view, 0, bytes.length, header)
    const segmenter = new Segmenter(0)
    segmenter.begin(view, 0, bytes.length, header, gso)
    const out = new Uint8Array(MAX_SEGMENT_HEADERS)
    expect(segmenter.next(new DataView(out.buffer), 0)).toBe(headerLength)
    expect([segmenter.payloadStart, segmenter.payloadLength]).toEqual([headerLength, options.payload])
    expect(segmenter.next(new DataView(out.buffer), 0)).toBe(0)
    completeChecksum(view, 0, bytes.length, l4, header.csumOffset)
    expect(Buffer.from(out.subarray(0, headerLength)).equals(bytes.subarray(0, headerLength))).toBe(true)
  })

  test('fragments have a multiple of eight bytes', () => {
    const packets = bytesOf(finish(frameOf({ ...UFO4, gsoSize: 1003, payload: 3000 })))
    expect(packets.map(({ length }) => length - 34)).toEqual([1000, 1000, 1000, 8])
  })

  test('each datagram over IPv6 has its own identification', () => {
    const segmenter = new Segmenter(0xffff_ffff)
    const identifications = (frame: PassedFrame) =>
      new Set(bytesOf(finish(frame, segmenter)).map((packet) => packet.readUInt32BE(frame.l4 + 4)))
    const frame = frameOf({ ...UFO6, gsoSize: 1000, payload: 5000 })
    expect(identifications(frame)).toEqual(new Set([0]))
    expect(identifications(frame)).toEqual(new Set([1]))
  })

  test('a checksum of 0 is 0xffff in UDP', () => {
    // One of 65,536 payloads each: found by changing two bytes of the payload.
    for (const type of [USO4, UFO4]) {
      const frame = frameOf({ ...type, gsoSize: 1000, payload: 3000, fragment: 0 })
      const first = bytesOf(finish(frame))[0]!
      const at = frame.headerLength
      const checksum = first.readUInt16BE(frame.l4 + 6)
      const word = frame.bytes[at]! * 256 + frame.bytes[at + 1]!
      const changed = (word + checksum) % 0xffff
      frame.bytes.set([changed >> 8, changed & 255], at)
      expect(bytesOf(finish(frame))[0]!.readUInt16BE(frame.l4 + 6)).toBe(0xffff)
    }
  })
})

/** Over the pseudo header, transport header and payload: 0xffff when the checksum is right. */
function transportSum(packet: Buffer, frame: { l3: number; l4: number }, udp: boolean, ipv6: boolean): number {
  const addresses = packet.subarray(frame.l3 + (ipv6 ? 8 : 12), frame.l3 + (ipv6 ? 40 : 20))
  const length = packet.length - frame.l4
  const pseudo = [...addresses, length >> 8, length & 255, 0, udp ? 17 : 6]
  return slowSum([...pseudo, ...packet.subarray(frame.l4)])
}

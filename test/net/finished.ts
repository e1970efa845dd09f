/**
 * Whether packets are what has to become of a frame that its sender left unfinished: checksums complete, segments of the
 * right sizes with the right numbers, and all of the payload. Written from the RFCs, not from the segmenter.
 */
import { expect } from 'vitest'
import * as net from '../../src/virtio/net.ts'
import { type BuiltFrame, type FrameOptions, slowSum } from './frames.ts'

const FIN_PSH = 0x09
const CWR = 0x80

/** @param packets frames without virtio-net headers, in order */
export function expectFinished(packets: readonly Uint8Array[], built: BuiltFrame, options: FrameOptions): void {
  const { gsoType, gsoSize = 0, ipv6 = false, udp = false } = options
  const payload = built.bytes.subarray(built.headerLength)
  const whole = gsoType === net.VIRTIO_NET_HDR_GSO_NONE || payload.length <= gsoSize
  if (gsoType === net.VIRTIO_NET_HDR_GSO_UDP && built.bytes.length - built.l4 > gsoSize) {
    return expectFragments(packets, built, gsoSize & ~7, ipv6)
  }
  expect(packets).toHaveLength(whole ? 1 : Math.ceil(payload.length / gsoSize))
  let position = 0
  for (const [i, packet] of packets.entries()) {
    const view = dataView(packet)
    const size = packet.length - built.headerLength
    const last = i === packets.length - 1
    expect(size).toBe(last ? payload.length - position : gsoSize)
    expect(packet.subarray(0, built.l3)).toEqual(built.bytes.subarray(0, built.l3))
    expectIp(packet, built, ipv6, i)
    expect(transportSum(packet.subarray(built.l4), packet, built, ipv6, udp)).toBe(0xffff)
    if (udp) {
      expect(view.getUint16(built.l4 + 4)).toBe(8 + size)
      expect(view.getUint16(built.l4 + 6)).not.toBe(0)
    } else {
      const sequence = options.sequence ?? 0x1000_0000
      expect(view.getUint32(built.l4 + 4)).toBe((sequence + position) >>> 0)
      const flags = options.tcpFlags ?? 0x18
      expect(packet[built.l4 + 13]).toBe(flags & ~(last ? 0 : FIN_PSH) & ~(i === 0 ? 0 : CWR))
    }
    expect(Buffer.compare(packet.subarray(built.headerLength), payload.subarray(position, position + size))).toBe(0)
    position += size
  }
  expect(position).toBe(payload.length)
}

/** Fragments of a datagram: put together they are the datagram, with its checksum complete. */
function expectFragments(packets: readonly Uint8Array[], built: BuiltFrame, size: number, ipv6: boolean): void {
  const datagram = built.bytes.slice(built.l4)
  const header = built.l4 + (ipv6 ? 8 : 0)
  expect(packets).toHaveLength(Math.ceil(datagram.length / size))
  const joined = new Uint8Array(datagram.length)
  for (const [i, packet] of packets.entries()) {
    const view = dataView(packet)
    const last = i === packets.length - 1
    const at = ipv6 ? view.getUint16(built.l4 + 2) & ~7 : (view.getUint16(built.l3 + 6) & 0x1fff) * 8
    const more = ipv6 ? view.getUint16(built.l4 + 2) & 1 : (view.getUint16(built.l3 + 6) >> 13) & 1
    expect([at, more]).toEqual([i * size, last ? 0 : 1])
    if (ipv6) {
      // The fragment header names UDP, and stands where UDP did.
      expect(packet[built.l4]).toBe(17)
      expect(view.getUint32(built.l4 + 4)).toBe(dataView(packets[0]!).getUint32(built.l4 + 4))
      expect(view.getUint16(built.l3 + 4)).toBe(packet.length - built.l3 - 40)
    } else expectIp(packet, built, false, 0)
    joined.set(packet.subarray(header), at)
  }
  expect(transportSum(joined, built.bytes, built, ipv6, true)).toBe(0xffff)
  joined.set(datagram.subarray(6, 8), 6)
  expect(Buffer.compare(joined, datagram)).toBe(0)
}

function expectIp(packet: Uint8Array, { bytes, l3, l4 }: BuiltFrame, ipv6: boolean, index: number): void {
  const view = dataView(packet)
  if (ipv6) {
    expect(view.getUint16(l3 + 4)).toBe(packet.length - l3 - 40)
    return
  }
  expect(view.getUint16(l3 + 2)).toBe(packet.length - l3)
  expect(view.getUint16(l3 + 4)).toBe((dataView(bytes).getUint16(l3 + 4) + index) & 0xffff)
  expect(slowSum(packet, l3, l4)).toBe(0xffff)
}

/** The sum over pseudo header and transport part, which is all ones when the checksum is right. */
function transportSum(part: Uint8Array, packet: Uint8Array, { l3 }: BuiltFrame, ipv6: boolean, udp: boolean): number {
  const addresses = packet.subarray(l3 + (ipv6 ? 8 : 12), l3 + (ipv6 ? 40 : 20))
  const { length } = part
  const pseudo = [...addresses, length >> 24, (length >> 16) & 255, (length >> 8) & 255, length & 255, 0, udp ? 17 : 6]
  return slowSum([...pseudo, ...part])
}

function dataView(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
}

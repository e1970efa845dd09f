/** pcapng files: byte by byte, and as Wireshark reads them. */
import { execFileSync } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import * as pcapng from '../../devices/net/pcapng.ts'
import { findCommand, isCi } from '../setup/prerequisites.ts'

const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex')
const time = (seconds: number, nanoseconds: number) => {
  const stamp = new pcapng.Timestamp()
  stamp.set(seconds, nanoseconds)
  return stamp
}
const NOW = 1_763_829_000

test.each([
  [0, 0],
  [0, 999_999_999],
  [4, 294_967_295],
  [4, 294_967_296],
  [NOW, 123_456_789],
  [65_535, 999_999_999],
  [65_536, 0],
  [2 ** 32, 1],
  [2 ** 34 - 1, 999_999_999],
])('a time of %i s and %i ns', (seconds, nanoseconds) => {
  const expected = BigInt(seconds) * 1_000_000_000n + BigInt(nanoseconds)
  const { high, low } = time(seconds, nanoseconds)
  expect([BigInt(high), BigInt(low)]).toEqual([expected >> 32n, expected & 0xffff_ffffn])
})

describe('blocks', () => {
  test('section header', () => {
    expect(hex(pcapng.sectionHeader('virtiod'))).toBe(
      '0a0d0d0a' +
        '2c000000' +
        '4d3c2b1a' +
        '01000000' +
        'ffffffffffffffff' +
        '04000700' +
        '76697274696f6400' +
        '00000000' +
        '2c000000'
    )
  })

  test('interface', () => {
    expect(hex(pcapng.interfaceDescription('tap0', 0x1234))).toBe(
      '01000000' +
        '28000000' +
        '01000000' +
        '34120000' +
        '02000400' +
        '74617030' +
        '09000100' +
        '09000000' +
        '00000000' +
        '28000000'
    )
  })

  test('statistics', () => {
    expect(hex(pcapng.interfaceStatistics(1, time(4, 294_967_297), 2 ** 33 + 5, 7))).toBe(
      '05000000' +
        '34000000' +
        '01000000' +
        '01000000' +
        '01000000' +
        '04000800' +
        '0500000002000000' +
        '05000800' +
        '0700000000000000' +
        '00000000' +
        '34000000'
    )
  })

  test('packet, around bytes that are there already', () => {
    const bytes = new Uint8Array(64).fill(0xee)
    bytes.set([1, 2, 3, 4, 5], 4 + pcapng.PACKET_HEADER_SIZE)
    const length = pcapng.enhancedPacket(
      new DataView(bytes.buffer),
      4,
      2,
      time(4, 294_967_297),
      5,
      1500,
      pcapng.OUTBOUND
    )
    expect(length).toBe(52)
    expect(hex(bytes)).toBe(
      'eeeeeeee' +
        '06000000' +
        '34000000' +
        '02000000' +
        '01000000' +
        '01000000' +
        '05000000' +
        'dc050000' +
        '0102030405' +
        '000000' +
        '02000400' +
        '02000000' +
        '00000000' +
        '34000000' +
        'eeeeeeeeeeeeeeee'
    )
  })

  test('a packet that needs no padding, and one without bytes', () => {
    for (const captured of [0, 4, 64]) {
      const bytes = new Uint8Array(200).fill(0xee)
      const view = new DataView(bytes.buffer)
      const length = pcapng.enhancedPacket(view, 0, 0, time(0, 0), captured, captured, pcapng.INBOUND)
      expect(length).toBe(28 + captured + 16)
      expect(length).toBe(pcapng.packetLength(captured))
      expect(bytes.subarray(28, 28 + captured).every((byte) => byte === 0xee)).toBe(true)
      expect(view.getUint32(length - 4, true)).toBe(length)
      expect(view.getUint32(length - 12, true)).toBe(pcapng.INBOUND)
      expect(bytes[length]).toBe(0xee)
    }
  })

  test('a name that is too long for an option', () => {
    expect(() => pcapng.interfaceDescription('x'.repeat(65_536), 0)).toThrow(RangeError)
  })
})

const tshark = findCommand('tshark')
if (tshark === undefined && isCi()) throw new Error('tshark is missing (Debian package tshark)')

describe.skipIf(tshark === undefined)('tshark', () => {
  const directory = mkdtempSync(join(tmpdir(), 'virtiod-pcapng-'))
  afterAll(() => rmSync(directory, { recursive: true }))

  const packets = [
    { seconds: NOW, nanoseconds: 1, captured: 60, original: 60, direction: pcapng.INBOUND, interface: 0 },
    { seconds: NOW, nanoseconds: 999_999_999, captured: 61, original: 9014, direction: pcapng.OUTBOUND, interface: 1 },
    { seconds: NOW + 1, nanoseconds: 0, captured: 65_557, original: 65_557, direction: pcapng.OUTBOUND, interface: 0 },
  ]
  const file = join(directory, 'capture.pcapng')
  const blocks: Uint8Array[] = [
    pcapng.sectionHeader('virtiod 0.1 (Gerät)'),
    pcapng.interfaceDescription('vm0', 0),
    pcapng.interfaceDescription('vm1', 61),
  ]
  for (const { seconds, nanoseconds, captured, original, direction, interface: id } of packets) {
    const block = new Uint8Array(pcapng.packetLength(captured))
    const stamp = time(seconds, nanoseconds)
    pcapng.enhancedPacket(new DataView(block.buffer), 0, id, stamp, captured, original, direction)
    const data = block.subarray(pcapng.PACKET_HEADER_SIZE, pcapng.PACKET_HEADER_SIZE + captured)
    data.set([2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x88, 0xb5])
    for (let i = 14; i < captured; i++) data[i] = (i * 7) & 0xff
    blocks.push(block)
  }
  blocks.push(
    pcapng.interfaceStatistics(0, time(NOW + 2, 5), 2, 3),
    pcapng.interfaceStatistics(1, time(NOW + 2, 5), 1, 0)
  )
  writeFileSync(file, Buffer.concat(blocks))

  test('reads every field of every packet', () => {
    const fields = ['frame.time_epoch', 'frame.cap_len', 'frame.len', 'frame.packet_flags_direction']
    const more = ['frame.interface_name', 'eth.src', 'eth.dst', 'eth.type']
    const words = ['-n', '-r', file, '-T', 'fields', ...[...fields, ...more].flatMap((field) => ['-e', field])]
    const lines = execFileSync(tshark!, words, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] })
      .trim()
      .split('\n')
    expect(lines.map((line) => line.split('\t'))).toEqual(
      packets.map(({ seconds, nanoseconds, captured, original, direction, interface: id }) => [
        `${seconds}.${String(nanoseconds).padStart(9, '0')}`,
        String(captured),
        String(original),
        expect.stringMatching(new RegExp(`^(0x0*)?${direction}$`)),
        `vm${id}`,
        '02:00:00:00:00:01',
        '02:00:00:00:00:02',
        '0x88b5',
      ])
    )
  })

  test('and the bytes', () => {
    const words = ['-n', '-r', file, '-T', 'fields', '-e', 'data.data', '-Y', 'frame.number == 2']
    const data = execFileSync(tshark!, words, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] }).trim()
    expect(data.replaceAll(':', '')).toBe(hex(Uint8Array.from({ length: 47 }, (_, i) => ((i + 14) * 7) & 0xff)))
  })
})

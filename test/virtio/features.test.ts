import { describe, expect, test } from 'vitest'
import { decodeBlkConfig } from '../../src/virtio/blk.ts'
import { featureBits, featureSet, hasFeature } from '../../src/virtio/features.ts'

describe('feature sets', () => {
  test('hold any of the 64 bits', () => {
    for (let bit = 0; bit < 64; bit++) {
      const set = featureSet(bit)
      expect(set).toBe(1n << BigInt(bit))
      for (let other = 0; other < 64; other++) expect(hasFeature(set, other)).toBe(other === bit)
    }
    expect(featureBits(featureSet(63, 0, 32, 31, 0))).toEqual([0, 31, 32, 63])
    expect(featureSet()).toBe(0n)
    expect(featureBits(0n)).toEqual([])
  })
})

describe('decodeBlkConfig', () => {
  /** Every byte of a field differs from its neighbours', so a wrong offset or byte order shows. */
  const bytes = Uint8Array.from({ length: 96 }, (_, i) => i + 1)
  const u16 = (at: number) => (at + 1) | ((at + 2) << 8)
  const u32 = (at: number) => (u16(at) | (u16(at + 2) << 16)) >>> 0

  test('decodes every field at its offset of the spec', () => {
    expect(decodeBlkConfig(bytes)).toEqual({
      capacity: 0x0807_0605_0403_0201n,
      sizeMax: u32(8),
      segMax: u32(12),
      geometry: { cylinders: u16(16), heads: 19, sectors: 20 },
      blkSize: u32(20),
      topology: { physicalBlockExp: 25, alignmentOffset: 26, minIoSize: u16(26), optIoSize: u32(28) },
      wce: 33,
      numQueues: u16(34),
      discard: { maxSectors: u32(36), maxSegments: u32(40), sectorAlignment: u32(44) },
      writeZeroes: { maxSectors: u32(48), maxSegments: u32(52), mayUnmap: true },
      secureErase: { maxSectors: u32(60), maxSegments: u32(64), sectorAlignment: u32(68) },
    })
  })

  test('leaves out what is not offered and what is behind the end', () => {
    expect(decodeBlkConfig(bytes, 0n)).toEqual({ capacity: 0x0807_0605_0403_0201n })
    expect(Object.keys(decodeBlkConfig(bytes.subarray(0, 8)))).toEqual(['capacity'])
    expect(decodeBlkConfig(bytes.subarray(0, 57)).writeZeroes).toBeDefined()
    expect(decodeBlkConfig(bytes.subarray(0, 56)).writeZeroes).toBeUndefined()
    expect(decodeBlkConfig(bytes.subarray(5, 13)).capacity).toBe(0x0d0c_0b0a_0908_0706n)
  })

  test('refuses less than the capacity', () => {
    expect(() => decodeBlkConfig(bytes.subarray(0, 7))).toThrow(RangeError)
  })
})

/** The packed ring of the packet loads against the back-end's, on plain buffers. */
import { describe, expect, test } from 'vitest'
import { PackedPacketRing } from '../../src/frontend/net-packed-ring.ts'
import { PACKED_BASE } from '../../src/frontend/packed-driver.ts'
import type { Chain } from '../../src/virtio/chain.ts'
import { GuestMemory } from '../../src/virtio/memory.ts'
import { PackedRing } from '../../src/virtio/packed-ring.ts'

const GPA = 0x10_0000
const SIZE = 65_536

function make(size: number, eventIdx: boolean) {
  const buffer = new SharedArrayBuffer(SIZE)
  let kicks = 0
  const ring = new PackedPacketRing({
    size,
    areas: {
      descriptors: { buffer, offset: 0 },
      driverEvent: { buffer, offset: 16 * size },
      deviceEvent: { buffer, offset: 16 * size + 4 },
    },
    eventIdx,
    kick: () => kicks++,
    name: 'virtqueue 0',
  })
  const device = new PackedRing(new GuestMemory([{ gpa: GPA, buffer, size: SIZE, hva: 0 }]), {
    size,
    descriptor: GPA,
    driver: GPA + 16 * size,
    device: GPA + 16 * size + 4,
    base: PACKED_BASE,
    eventIdx,
    indirect: false,
    packed: true,
    inOrder: false,
  })
  const pop = (): Chain[] => {
    const chains: Chain[] = []
    for (let chain = device.pop(); chain !== undefined; chain = device.pop()) chains.push(chain)
    expect(device.error).toBeUndefined()
    return chains
  }
  return { ring, device, pop, kicks: () => kicks, view: new DataView(buffer) }
}

/** Chains of one or two descriptors, as many as the ring holds. */
function describeAll(ring: PackedPacketRing, length: 1 | 2): number[] {
  const heads: number[] = []
  for (let head = 0; head + length <= ring.size; head += length) {
    if (length === 2) ring.describe(head, GPA + 32_768, 12, true, head + 1)
    ring.describe(head + length - 1, GPA + 40_960 + head, 100, true, -1)
    heads.push(head)
  }
  return heads
}

describe.each([
  [4, 1],
  [5, 1],
  [8, 2],
  [7, 2],
] as const)('a ring of %i, chains of %i', (size, length) => {
  test.each([false, true])('chains go round and round, in any order (EVENT_IDX %s)', (eventIdx) => {
    const { ring, device, pop } = make(size, eventIdx)
    const heads = describeAll(ring, length)
    for (const head of heads) ring.issue(head)
    ring.publish()
    const held: Chain[] = []
    let seed = 3
    for (let round = 0; round < 500; round++) {
      held.push(...pop())
      expect(held).toHaveLength(heads.length)
      seed = (seed * 1103515245 + 12345) & 0x7fff_ffff
      const use = 1 + ((seed >>> 8) % held.length)
      const used: number[][] = []
      for (let i = 0; i < use; i++) {
        const [chain] = held.splice((seed >>> 4) % held.length, 1) as [Chain]
        used.push([chain.head, round])
        device.push(chain, round % 50, round % 50)
      }
      const least = 1 + (round % heads.length)
      expect(ring.take(use + 1)).toBe(0)
      device.publish()
      expect(ring.take(use + 1)).toBe(0)
      expect(ring.enableCalls(least)).toBe(least <= use)
      expect(ring.take(use)).toBe(use)
      expect(Array.from({ length: use }, (_, i) => [ring.heads[i], ring.lengths[i]])).toEqual(
        used.map(([head]) => [head, round % 50])
      )
      expect(ring.inFlight).toBe(heads.length - use)
      ring.giveBack(use)
    }
    expect(ring.counters.issued - ring.counters.completed).toBe(heads.length)
  })

  test('a call comes when as many were used as were asked for', () => {
    const { ring, device, pop } = make(size, true)
    const heads = describeAll(ring, length)
    for (const head of heads) ring.issue(head)
    ring.publish()
    ring.disableCalls()
    const all = pop()
    // The first call after a start is never left out.
    device.push(all.shift() as Chain, 1, 1)
    device.publish()
    ring.take(1)
    ring.giveBack(1)
    for (let lap = 0; lap < 5; lap++) {
      const wanted = Math.min(2, all.length)
      expect(ring.enableCalls(wanted)).toBe(false)
      const called: boolean[] = []
      for (let i = 0; i < wanted; i++) {
        device.push(all.shift() as Chain, 1, 1)
        called.push(device.publish())
      }
      expect(called).toEqual(wanted === 1 ? [true] : [false, true])
      expect(ring.take(wanted)).toBe(wanted)
      ring.giveBack(wanted)
      all.push(...pop())
    }
  })
})

describe('a device that lies', () => {
  test.each([
    ['a buffer that is none', 9],
    ['one that it does not have', 3],
  ])('%s', (_name, id) => {
    const { ring, view } = make(4, false)
    describeAll(ring, 1)
    ring.issue(0)
    ring.publish()
    view.setUint16(12, id, true)
    view.setUint16(14, 0x8080, true)
    expect(() => ring.take(1)).toThrow(
      expect.objectContaining({ request: 'virtqueue 0', message: expect.stringContaining(`buffer ${id}`) })
    )
  })

  test('chains of other shapes are none of this ring', () => {
    const { ring } = make(8, false)
    expect(() => ring.describe(0, GPA, 1, true, 2)).toThrow(RangeError)
    expect(() => ring.describe(1, GPA, 1, true, 2)).toThrow(RangeError)
  })
})

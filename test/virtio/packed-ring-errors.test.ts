/** Every way to break a packed ring that the specification forbids, by the code that it is reported as. */
import { describe, expect, test } from 'vitest'
import type { RingErrorCode } from '../../src/virtio/errors.ts'
import { GuestMemory } from '../../src/virtio/memory.ts'
import { PackedRing } from '../../src/virtio/packed-ring.ts'
import { AVAIL, available, INDIRECT, NEXT, type PackedSetup, packed, random, WRITE } from './packed-driver.ts'

type Setup = ReturnType<typeof packed>

interface Offence {
  readonly name: string
  readonly code: RingErrorCode
  readonly options?: PackedSetup
  /** Plays the driver. */
  commit(ring: Setup): void
}

const TOP = 2n ** 64n

const one = ({ data }: Setup) => ({ gpa: data, length: 1 })

/** An indirect table at `data`, offered as id 0. */
const withTable = (
  ring: Setup,
  entries: Parameters<Setup['driver']['table']>[1],
  more: { length?: number; gpa?: number; flags?: number } = {}
) => {
  const length = ring.driver.table(ring.data, entries)
  ring.driver.offer(0, { gpa: ring.data, length, flags: INDIRECT, ...more })
}

/** Offers a chain of one, which is popped and stays in flight. */
const inFlight = (ring: Setup, id: number, count = 1) => {
  ring.driver.offer(id, ...Array.from({ length: count }, () => one(ring)))
  expect(ring.ring.pop()!.head).toBe(id)
}

const offences: readonly Offence[] = [
  { name: 'an id as large as the ring', code: 'ERR_RING_HEAD', commit: (ring) => ring.driver.offer(8, one(ring)) },
  { name: 'id 65535', code: 'ERR_RING_HEAD', commit: (ring) => ring.driver.offer(65535, one(ring)) },
  {
    name: 'id 32768 of the largest ring',
    code: 'ERR_RING_HEAD',
    options: { size: 32768 },
    commit: (ring) => ring.driver.offer(32768, one(ring)),
  },
  {
    name: 'the same at the end of a chain',
    code: 'ERR_RING_HEAD',
    commit: (ring) => ring.driver.offer(8, one(ring), one(ring)),
  },
  {
    name: 'an id that is in flight',
    code: 'ERR_RING_HEAD_BUSY',
    commit: (ring) => {
      inFlight(ring, 3)
      ring.driver.offer(3, one(ring))
    },
  },
  {
    name: 'an id that is in flight, at the end of a chain',
    code: 'ERR_RING_HEAD_BUSY',
    commit: (ring) => {
      inFlight(ring, 3)
      ring.driver.offer(3, one(ring), one(ring))
    },
  },
  {
    name: 'an id whose completion is held back',
    code: 'ERR_RING_HEAD_BUSY',
    options: { inOrder: true },
    commit: (ring) => {
      inFlight(ring, 3)
      inFlight(ring, 4)
      ring.ring.push(ring.ring.chain(4), 0, 0)
      ring.driver.offer(4, one(ring))
    },
  },
  {
    name: 'a ring that is available a second time',
    code: 'ERR_RING_INDEX',
    commit: (ring) => {
      for (let id = 0; id < 8; id++) inFlight(ring, id)
      ring.driver.setFlags(0, available(0))
    },
  },
  {
    name: 'a chain into descriptors that are in flight',
    code: 'ERR_RING_INDEX',
    commit: (ring) => {
      inFlight(ring, 0, 5)
      ring.driver.offer(1, one(ring), one(ring), one(ring), one(ring))
    },
  },
  {
    name: 'a chain into descriptors whose use is not published',
    code: 'ERR_RING_INDEX',
    commit: (ring) => {
      inFlight(ring, 0, 5)
      ring.ring.push(ring.ring.chain(0), 0, 0)
      ring.driver.offer(1, one(ring), one(ring), one(ring), one(ring))
    },
  },
  {
    name: 'a chain without an end',
    code: 'ERR_RING_LOOP',
    commit: ({ driver, data }) => {
      for (let i = 0; i < 8; i++) driver.descriptor(i, { gpa: data, length: 1, flags: NEXT | available(1) })
    },
  },
  {
    name: 'a chain without an end in a ring of one',
    code: 'ERR_RING_LOOP',
    options: { size: 1 },
    commit: ({ driver, data }) => driver.descriptor(0, { gpa: data, length: 1, flags: NEXT | available(1) }),
  },
  {
    name: 'a chain without an end in the largest ring',
    code: 'ERR_RING_LOOP',
    options: { size: 32768 },
    commit: ({ driver, data }) => {
      for (let i = 0; i < 32768; i++) driver.descriptor(i, { gpa: data, length: 1, flags: NEXT | available(1) })
    },
  },
  {
    name: 'a readable descriptor behind a writable one',
    code: 'ERR_RING_ORDER',
    commit: (ring) => ring.driver.offer(0, { ...one(ring), flags: WRITE }, one(ring)),
  },
  {
    name: 'the same in a table',
    code: 'ERR_RING_ORDER',
    commit: (ring) => withTable(ring, [{ ...one(ring), flags: WRITE }, one(ring)]),
  },
  { name: 'GPA 2^64 - 1', code: 'ERR_RING_ADDRESS', commit: (r) => r.driver.offer(0, { gpa: TOP - 1n, length: 1 }) },
  {
    name: 'a buffer with its last byte behind the region',
    code: 'ERR_RING_ADDRESS',
    commit: ({ driver, buffer }) => driver.offer(0, { gpa: buffer.byteLength - 4, length: 5 }),
  },
  {
    name: 'a buffer of 2^32 - 1 bytes',
    code: 'ERR_RING_ADDRESS',
    commit: ({ driver, data }) => driver.offer(0, { gpa: data, length: 0xffff_ffff }),
  },
  {
    name: 'a bad address at the end of a chain',
    code: 'ERR_RING_ADDRESS',
    commit: (ring) => ring.driver.offer(0, one(ring), one(ring), { gpa: 2 ** 40, length: 1, flags: WRITE }),
  },
  {
    name: 'more than 2^32 - 1 bytes',
    code: 'ERR_RING_LENGTH',
    options: { size: 4096, data: 1 << 20 },
    commit: ({ driver, data }) =>
      driver.offer(0, ...Array.from({ length: 4096 }, () => ({ gpa: data, length: 1 << 20 }))),
  },
  {
    name: 'a table that was not negotiated',
    code: 'ERR_RING_INDIRECT',
    options: { indirect: false },
    commit: (ring) => withTable(ring, [one(ring)]),
  },
  {
    name: 'a table with NEXT',
    code: 'ERR_RING_INDIRECT',
    commit: (ring) => ring.driver.offer(0, { gpa: ring.data, length: 16, flags: INDIRECT }, one(ring)),
  },
  {
    name: 'a table at the end of a chain',
    code: 'ERR_RING_INDIRECT',
    commit: (ring) => ring.driver.offer(0, one(ring), { gpa: ring.data, length: 16, flags: INDIRECT }),
  },
  ...[0, 1, 15, 17, 0xffff_ffff, 16 * 32769].map(
    (length): Offence => ({
      name: `a table of ${length} bytes`,
      code: 'ERR_RING_INDIRECT',
      options: { data: 16 * 32770 },
      commit: (ring) => withTable(ring, [one(ring)], { length }),
    })
  ),
  {
    name: 'a table that ends behind the region',
    code: 'ERR_RING_INDIRECT',
    commit: (ring) => {
      ring.driver.table(ring.buffer.byteLength - 16, [one(ring)])
      ring.driver.offer(0, { gpa: ring.buffer.byteLength - 16, length: 32, flags: INDIRECT })
    },
  },
  {
    name: 'a table outside memory',
    code: 'ERR_RING_INDIRECT',
    commit: (ring) => withTable(ring, [one(ring)], { gpa: 2 ** 50 }),
  },
  {
    name: 'a table at an odd address',
    code: 'ERR_RING_INDIRECT',
    commit: (ring) => withTable(ring, [one(ring)], { gpa: ring.data + 2 }),
  },
  {
    name: 'a table whose second entry is bad',
    code: 'ERR_RING_ADDRESS',
    commit: (ring) => withTable(ring, [one(ring), { gpa: TOP - 1n, length: 1 }]),
  },
]

describe('a broken rule of a packed ring', () => {
  test.each(offences)('$name: $code', ({ code, options, commit }) => {
    const ring = packed(options)
    commit(ring)
    const before = ring.bytes.slice()
    expect(ring.ring.pop()).toBeUndefined()
    expect(ring.ring.error).toMatchObject({ name: 'RingError', code })
    // It stays broken, and nothing was written.
    expect([ring.ring.hasAvail(), ring.ring.pop(), ring.ring.rearm()]).toEqual([false, undefined, false])
    ring.ring.suppress()
    expect(Buffer.compare(ring.bytes, before)).toBe(0)
  })

  test('what was in flight before is still given back', () => {
    const ring = packed()
    inFlight(ring, 2)
    inFlight(ring, 5)
    ring.driver.offer(9, one(ring))
    expect(ring.ring.pop()).toBeUndefined()
    ring.ring.push(ring.ring.chain(5), 3, 3)
    ring.ring.push(ring.ring.chain(2), 4, 4)
    expect(ring.ring.publish()).toBe(true)
    expect(ring.driver.takeUsed().map(({ id, length }) => [id, length])).toEqual([
      [5, 3],
      [2, 4],
    ])
  })

  test('a chain before the bad one is still popped', () => {
    const ring = packed()
    ring.driver.offer(2, one(ring))
    ring.driver.offer(9, one(ring))
    expect(ring.ring.pop()!.head).toBe(2)
    expect(ring.ring.pop()).toBeUndefined()
    expect(ring.ring.error?.code).toBe('ERR_RING_HEAD')
  })

  test.each(['descriptor', 'driver', 'device'] as const)('the memory of the %s area is gone', (part) => {
    const ring = packed()
    ring.driver.offer(0, one(ring))
    const chain = ring.ring.pop()!
    const config = { ...ring.config, [part]: ring.buffer.byteLength }
    const never = new PackedRing(ring.memory, config)
    expect([never.error?.code, never.pop(), never.hasAvail(), never.publish(), never.rearm()]).toEqual([
      'ERR_RING_MEMORY',
      undefined,
      false,
      false,
      false,
    ])
    // One that has it loses it: only its first bytes are left.
    const size = ring.layout[part]
    ring.ring.setMemory(new GuestMemory([{ gpa: 0, size, hva: 0, buffer: new SharedArrayBuffer(size) }]))
    expect(ring.ring.error?.code).toBe('ERR_RING_MEMORY')
    ring.ring.push(chain, 0, 0)
    expect([ring.ring.publish(), ring.ring.pop()]).toEqual([true, undefined])
  })

  test('flags that say available at every place at once', () => {
    const ring = packed({ size: 5 })
    for (let i = 0; i < 5; i++) ring.driver.descriptor(i, { gpa: ring.data, length: 1, flags: AVAIL, id: i })
    for (let i = 0; i < 5; i++) expect(ring.ring.pop()!.head).toBe(i)
    expect([ring.ring.pop(), ring.ring.error]).toEqual([undefined, undefined])
  })
})

describe('garbage', () => {
  test.each([1, 2, 3])(
    'random words in the ring: no exception, bounded, nothing written but used descriptors, seed %d',
    (seed) => {
      const rnd = random(seed)
      for (let round = 0; round < 3000; round++) {
        const size = 1 + rnd(12)
        const ring = packed({ size, data: 4096, inOrder: rnd(2) === 0, eventIdx: rnd(2) === 0 })
        const { bytes, data, driver } = ring
        const words = new Uint32Array(ring.buffer)
        // Addresses and lengths that are good now and then, flags of all kinds, and tables of the same.
        for (let at = 0; at < 4 * size; at++) words[at] = rnd(2 ** 32)
        for (let at = data / 4; at < words.length; at++) words[at] = rnd(3) === 0 ? rnd(2 ** 32) : rnd(data)
        for (let i = 0; i < size; i++) {
          if (rnd(4) > 0) driver.view.setBigUint64(i * 16, BigInt(rnd(bytes.length)), true)
          if (rnd(4) > 0) driver.view.setUint32(i * 16 + 8, 16 * rnd(16), true)
          if (rnd(4) > 0) driver.view.setUint16(i * 16 + 12, rnd(size), true)
          if (rnd(4) > 0)
            driver.setFlags(i, available(1) | (rnd(2) * NEXT) | (rnd(2) * WRITE) | (rnd(5) === 0 ? INDIRECT : 0))
        }
        const popped = []
        for (let chain = ring.ring.pop(); chain !== undefined; chain = ring.ring.pop()) {
          popped.push(chain)
          expect(popped.length).toBeLessThanOrEqual(size)
          for (let i = 0; i < chain.count; i++)
            expect(chain.offset[i]! + chain.length[i]!).toBeLessThanOrEqual(bytes.length)
        }
        const before = bytes.slice(16 * size)
        while (popped.length > 0) ring.ring.push(popped.splice(rnd(popped.length), 1)[0]!, rnd(2 ** 32), 0)
        ring.ring.publish()
        expect(Buffer.compare(bytes.subarray(16 * size), before)).toBe(0)
      }
    }
  )
})

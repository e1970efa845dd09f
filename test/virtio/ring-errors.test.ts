/** Every way to break a ring that the specification forbids, by the code that it is reported as. */
import { describe, expect, test } from 'vitest'
import { RING_ERRORS, type RingErrorCode } from '../../src/virtio/errors.ts'
import { GuestMemory } from '../../src/virtio/memory.ts'
import { SplitRing } from '../../src/virtio/split-ring.ts'
import { INDIRECT, NEXT, type RingSetup, setup, WRITE } from './mock-driver.ts'

type Setup = ReturnType<typeof setup>

interface Offence {
  readonly name: string
  readonly code: RingErrorCode
  readonly options?: RingSetup
  /** Plays the driver. */
  commit(ring: Setup): void
}

const PAGE = 4096
const TOP = 2n ** 64n

/** An indirect table at `data` that is made available as head 0. */
const withTable = (
  ring: Setup,
  entries: Parameters<Setup['driver']['table']>[1],
  more: { length?: number; gpa?: number } = {}
) => {
  const length = ring.driver.table(ring.data, entries)
  ring.driver.descriptor(0, { gpa: ring.data, length, flags: INDIRECT, ...more })
  ring.driver.offer(0)
}

const offences: readonly Offence[] = [
  {
    name: 'avail.idx ahead by one more than the ring has',
    code: 'ERR_RING_INDEX',
    commit: ({ driver }) => {
      driver.availIdx = 9
    },
  },
  {
    name: 'avail.idx behind by one',
    code: 'ERR_RING_INDEX',
    options: { base: 5 },
    commit: ({ driver }) => {
      driver.availIdx = 4
    },
  },
  {
    name: 'avail.idx behind by one at 0',
    code: 'ERR_RING_INDEX',
    commit: ({ driver }) => {
      driver.availIdx = 65535
    },
  },
  {
    name: 'avail.idx ahead by 32768 + 1 in the largest ring',
    code: 'ERR_RING_INDEX',
    options: { size: 32768, base: 60000 },
    commit: ({ driver }) => {
      driver.availIdx = (60000 + 32769) & 0xffff
    },
  },
  { name: 'a head as large as the ring', code: 'ERR_RING_HEAD', commit: ({ driver }) => driver.offer(8) },
  { name: 'head 65535', code: 'ERR_RING_HEAD', commit: ({ driver }) => driver.offer(65535) },
  {
    name: 'head 32768 in the largest ring',
    code: 'ERR_RING_HEAD',
    options: { size: 32768 },
    commit: ({ driver }) => driver.offer(32768),
  },
  {
    name: 'a head that is in flight',
    code: 'ERR_RING_HEAD_BUSY',
    commit: ({ driver, ring, data }) => {
      driver.chain([{ gpa: data, length: 1 }], [3])
      driver.offer(3)
      expect(ring.pop()!.head).toBe(3)
      driver.offer(3)
    },
  },
  {
    name: 'a link to the entry behind the table',
    code: 'ERR_RING_NEXT',
    commit: ({ driver, data }) => {
      driver.descriptor(0, { gpa: data, length: 1, flags: NEXT, next: 8 })
      driver.offer(0)
    },
  },
  {
    name: 'a link to 65535',
    code: 'ERR_RING_NEXT',
    commit: ({ driver, data }) => {
      driver.descriptor(0, { gpa: data, length: 1, flags: NEXT, next: 65535 })
      driver.offer(0)
    },
  },
  {
    name: 'a link to the entry behind an indirect table',
    code: 'ERR_RING_NEXT',
    commit: (ring) => {
      withTable(ring, [{ gpa: ring.data, length: 1, flags: NEXT, next: 0 }])
      ring.driver.writeDescriptor(ring.data, { gpa: ring.data, length: 1, flags: NEXT, next: 1 })
    },
  },
  {
    name: 'a link from an indirect table to an entry of the main table only',
    code: 'ERR_RING_NEXT',
    commit: (ring) => {
      withTable(ring, [
        { gpa: ring.data, length: 1 },
        { gpa: ring.data, length: 1 },
      ])
      ring.driver.writeDescriptor(ring.data, { gpa: ring.data, length: 1, flags: NEXT, next: 7 })
    },
  },
  {
    name: 'a descriptor that links to itself',
    code: 'ERR_RING_LOOP',
    commit: ({ driver, data }) => {
      driver.descriptor(2, { gpa: data, length: 1, flags: NEXT, next: 2 })
      driver.offer(2)
    },
  },
  {
    name: 'a loop of all descriptors',
    code: 'ERR_RING_LOOP',
    commit: ({ driver, data }) => {
      for (let i = 0; i < 8; i++) driver.descriptor(i, { gpa: data, length: 1, flags: NEXT, next: (i + 1) % 8 })
      driver.offer(4)
    },
  },
  {
    name: 'a loop of empty descriptors',
    code: 'ERR_RING_LOOP',
    commit: ({ driver, data }) => {
      driver.descriptor(0, { gpa: data, length: 0, flags: NEXT, next: 1 })
      driver.descriptor(1, { gpa: data, length: 0, flags: NEXT, next: 0 })
      driver.offer(0)
    },
  },
  {
    name: 'a loop in an indirect table',
    code: 'ERR_RING_LOOP',
    commit: (ring) => {
      withTable(ring, [
        { gpa: ring.data, length: 1 },
        { gpa: ring.data, length: 1, flags: NEXT },
      ])
      ring.driver.writeDescriptor(ring.data + 16, { gpa: ring.data, length: 1, flags: NEXT, next: 0 })
    },
  },
  {
    name: 'an indirect table whose only entry links to itself',
    code: 'ERR_RING_LOOP',
    commit: (ring) => {
      withTable(ring, [{ gpa: ring.data, length: 1 }])
      ring.driver.writeDescriptor(ring.data, { gpa: ring.data, length: 0, flags: NEXT, next: 0 })
    },
  },
  {
    name: 'readable after writable',
    code: 'ERR_RING_ORDER',
    commit: ({ driver, data }) => {
      driver.chain([
        { gpa: data, length: 1 },
        { gpa: data, length: 1, flags: WRITE },
        { gpa: data, length: 1 },
      ])
      driver.offer(0)
    },
  },
  {
    name: 'readable after writable in an indirect table',
    code: 'ERR_RING_ORDER',
    commit: (ring) =>
      withTable(ring, [
        { gpa: ring.data, length: 1, flags: WRITE },
        { gpa: ring.data, length: 1 },
      ]),
  },
  {
    name: 'a readable table entry after a writable plain descriptor',
    code: 'ERR_RING_ORDER',
    commit: ({ driver, data }) => {
      const length = driver.table(data, [{ gpa: data, length: 1 }])
      driver.chain([
        { gpa: data, length: 1, flags: WRITE },
        { gpa: data, length, flags: INDIRECT },
      ])
      driver.offer(0)
    },
  },
  ...(
    [
      ['in a hole', 2 ** 40, 1],
      ['across the end of memory', 2 ** 34 + PAGE - 1, 2],
      ['behind memory', 2 ** 34 + PAGE, 1],
      ['at 2^53', 2 ** 53, 1],
      ['at 2^63', 2n ** 63n, 1],
      ['at 2^64 - 1', TOP - 1n, 1],
      ['that goes round 2^64 back to address 0', TOP - 16n, 4096],
      ['of 4 GiB - 1', 2 ** 34, 0xffff_ffff],
    ] as const
  ).map(
    ([what, gpa, length]): Offence => ({
      name: `a buffer ${what}`,
      code: 'ERR_RING_ADDRESS',
      options: { regions: [{ gpa: 2 ** 34, size: PAGE, hva: 0, buffer: new ArrayBuffer(PAGE) }] },
      commit: ({ driver }) => {
        driver.descriptor(0, { gpa, length, flags: WRITE })
        driver.offer(0)
      },
    })
  ),
  {
    name: 'the second buffer of a chain outside memory',
    code: 'ERR_RING_ADDRESS',
    commit: ({ driver, data }) => {
      driver.chain([
        { gpa: data, length: 1 },
        { gpa: TOP - 4096n, length: 4095, flags: WRITE },
      ])
      driver.offer(0)
    },
  },
  {
    name: 'a buffer of an indirect table outside memory',
    code: 'ERR_RING_ADDRESS',
    commit: (ring) =>
      withTable(ring, [
        { gpa: ring.data, length: 1 },
        { gpa: TOP - 1n, length: 2 },
      ]),
  },
  {
    name: 'a chain of 2^32 bytes',
    code: 'ERR_RING_LENGTH',
    options: { size: 4096, data: 1 << 20 },
    commit: ({ driver, data }) => {
      driver.chain(
        Array.from({ length: 4096 }, (_, i) => ({ gpa: data, length: 1 << 20, flags: i < 2000 ? 0 : WRITE }))
      )
      driver.offer(0)
    },
  },
  {
    name: 'a chain of 2^32 bytes in an indirect table',
    code: 'ERR_RING_LENGTH',
    options: { data: 1 << 22 },
    commit: (ring) =>
      withTable(
        ring,
        Array.from({ length: 1024 }, () => ({ gpa: ring.data, length: 1 << 22 }))
      ),
  },
  {
    name: 'a chain that needs the sum of both directions for 2^32 bytes',
    code: 'ERR_RING_LENGTH',
    commit: ({ driver, data }) => {
      driver.chain([
        { gpa: data, length: 1 },
        { gpa: data, length: 0xffff_ffff, flags: WRITE },
      ])
      driver.offer(0)
    },
  },
  {
    name: 'INDIRECT without the feature',
    code: 'ERR_RING_INDIRECT',
    options: { indirect: false },
    commit: (ring) => withTable(ring, [{ gpa: ring.data, length: 1 }]),
  },
  {
    name: 'INDIRECT with NEXT',
    code: 'ERR_RING_INDIRECT',
    commit: (ring) => {
      withTable(ring, [{ gpa: ring.data, length: 1 }])
      ring.driver.descriptor(0, { gpa: ring.data, length: 16, flags: INDIRECT | NEXT, next: 1 })
    },
  },
  {
    name: 'INDIRECT in an indirect table',
    code: 'ERR_RING_INDIRECT',
    commit: (ring) =>
      withTable(ring, [
        { gpa: ring.data, length: 1 },
        { gpa: ring.data, length: 16, flags: INDIRECT },
      ]),
  },
  ...[0, 1, 15, 17, 24, 0xffff_ffff, 32769 * 16, 65536 * 16, 0xffff_fff0].map(
    (length): Offence => ({
      name: `an indirect table of ${length} bytes`,
      code: 'ERR_RING_INDIRECT',
      options: { data: 65537 * 16 },
      commit: (ring) => withTable(ring, [{ gpa: ring.data, length: 1 }], { length }),
    })
  ),
  ...([1, 2, 3] as const).map(
    (offset): Offence => ({
      name: `an indirect table at an address ≡ ${offset} modulo 4`,
      code: 'ERR_RING_INDIRECT',
      commit: (ring) => {
        ring.driver.table(ring.data + offset, [{ gpa: ring.data, length: 1 }])
        ring.driver.descriptor(0, { gpa: ring.data + offset, length: 16, flags: INDIRECT })
        ring.driver.offer(0)
      },
    })
  ),
  {
    name: 'an indirect table in a hole',
    code: 'ERR_RING_INDIRECT',
    commit: ({ driver }) => {
      driver.descriptor(0, { gpa: 2 ** 40, length: 16, flags: INDIRECT })
      driver.offer(0)
    },
  },
  {
    name: 'an indirect table at the end of the address space',
    code: 'ERR_RING_INDIRECT',
    commit: ({ driver }) => {
      driver.descriptor(0, { gpa: TOP - 16n, length: 32, flags: INDIRECT })
      driver.offer(0)
    },
  },
  {
    name: 'an indirect table that ends behind memory',
    code: 'ERR_RING_INDIRECT',
    commit: ({ driver, data, buffer }) => {
      const last = buffer.byteLength - 16
      driver.writeDescriptor(last, { gpa: data, length: 1, flags: NEXT, next: 1 })
      driver.descriptor(0, { gpa: last, length: 32, flags: INDIRECT })
      driver.offer(0)
    },
  },
  {
    name: 'an entry of an indirect table that straddles the end of memory',
    code: 'ERR_RING_INDIRECT',
    commit: ({ driver, buffer }) => {
      driver.descriptor(0, { gpa: buffer.byteLength - 8, length: 16, flags: INDIRECT })
      driver.offer(0)
    },
  },
  {
    name: 'an entry of an indirect table that straddles adjacent regions',
    code: 'ERR_RING_INDIRECT',
    options: {
      regions: [2 ** 33, 2 ** 33 + PAGE].map((gpa) => ({ gpa, size: PAGE, hva: 0, buffer: new ArrayBuffer(PAGE) })),
    },
    commit: ({ driver }) => {
      driver.descriptor(0, { gpa: 2 ** 33 + PAGE - 8, length: 16, flags: INDIRECT })
      driver.offer(0)
    },
  },
]

describe('a broken rule', () => {
  test.each(offences.map((offence) => [offence.code, offence.name, offence] as const))('%s: %s', (code, _, offence) => {
    for (const eventIdx of [false, true]) {
      const made = setup({ eventIdx, ...offence.options })
      const { ring, bytes } = made
      offence.commit(made)
      const before = bytes.slice()
      const base = ring.base
      expect(ring.hasAvail()).toBe(true)
      expect(ring.pop()).toBeUndefined()
      expect(ring.error?.code).toBe(code)
      expect(ring.error?.name).toBe('RingError')
      expect(ring.error?.message).toBe(RING_ERRORS[code])
      // It stays broken, and the chain that broke it was not taken.
      expect(ring.base).toBe(base)
      expect(ring.hasAvail()).toBe(false)
      expect(ring.rearm()).toBe(false)
      expect(ring.pop()).toBeUndefined()
      ring.suppress()
      expect(ring.publish()).toBe(false)
      expect(Buffer.compare(bytes, before)).toBe(0)
    }
  })

  test('every code is among them, but for those of memory, packed rings, in-flight buffers and handlers', () => {
    const reached = new Set<string>(offences.map(({ code }) => code))
    expect(Object.keys(RING_ERRORS).filter((code) => !reached.has(code))).toEqual([
      'ERR_RING_MEMORY',
      'ERR_RING_SCATTERED',
      'ERR_RING_BASE',
      'ERR_RING_INFLIGHT',
      'ERR_RING_REQUEST',
    ])
  })

  test('chains before it are served, those in flight are used', () => {
    const { ring, driver, data } = setup()
    driver.chain([{ gpa: data, length: 1 }], [0])
    driver.chain([{ gpa: data, length: 1 }], [1])
    driver.offer(0, 1, 100)
    const chains = [ring.pop()!, ring.pop()!]
    expect(ring.pop()).toBeUndefined()
    expect(ring.error?.code).toBe('ERR_RING_HEAD')
    for (const chain of chains) ring.push(chain, 4, 4)
    expect(ring.publish()).toBe(true)
    expect(driver.takeUsed()).toEqual([
      { id: 0, length: 4 },
      { id: 1, length: 4 },
    ])
    expect(ring.base).toBe(2)
  })

  test('the first error is the one that stays', () => {
    const { ring, driver } = setup()
    driver.offer(100)
    ring.pop()
    const { error } = ring
    driver.availIdx = 50
    ring.pop()
    expect(ring.error).toBe(error)
  })
})

describe('ERR_RING_MEMORY', () => {
  const { config, buffer, layout } = setup({ eventIdx: true })
  const memory = (...regions: [gpa: number, size: number][]) =>
    new GuestMemory(regions.map(([gpa, size]) => ({ gpa, size, hva: 0, buffer: new SharedArrayBuffer(size) })))
  const all = memory([0, buffer.byteLength])

  test.each([
    ['no memory', memory(), {}],
    ['the descriptor table behind memory', all, { descriptor: buffer.byteLength }],
    ['the last descriptor behind memory', all, { descriptor: buffer.byteLength - 127 }],
    ['the avail ring in a hole', all, { driver: 2 ** 40 }],
    ['used_event behind memory', all, { driver: buffer.byteLength - 20 }],
    ['the used ring in a hole', all, { device: 2 ** 40 }],
    ['avail_event behind memory', all, { device: buffer.byteLength - 68 }],
    ['a part across adjacent regions', memory([0, PAGE], [PAGE, buffer.byteLength - PAGE]), { descriptor: PAGE - 16 }],
    ['an address at 2^64', all, { device: 2 ** 64 }],
  ])('%s', (_, given, change) => {
    const ring = new SplitRing(given, { ...config, ...change })
    expect(ring.error?.code).toBe('ERR_RING_MEMORY')
    expect(ring.pop()).toBeUndefined()
    expect(ring.hasAvail()).toBe(false)
    expect(ring.rearm()).toBe(false)
    ring.suppress()
    expect(ring.publish()).toBe(false)
  })

  test('the event words need no memory without EVENT_IDX', () => {
    const at = { driver: buffer.byteLength - 20, device: buffer.byteLength - 128 - 68, descriptor: 0 }
    expect(new SplitRing(all, { ...config, ...at, eventIdx: false }).error).toBeUndefined()
  })

  test('a part may end with the last byte of memory', () => {
    for (const at of [
      { descriptor: buffer.byteLength - 128 },
      { driver: buffer.byteLength - 22 },
      { device: buffer.byteLength - 72 },
    ]) {
      expect(new SplitRing(all, { ...config, ...at }).error).toBeUndefined()
    }
  })

  test.each([
    ['all of it', memory()],
    ['the descriptor table', memory([layout.driver, PAGE], [layout.device, PAGE])],
    ['the avail ring', memory([0, PAGE], [layout.device, PAGE])],
    ['the used ring', memory([0, layout.device])],
  ])('setMemory without %s breaks the ring; a chain in flight may still be pushed', (_, next) => {
    const { ring, driver, data } = setup({ eventIdx: true })
    driver.chain([{ gpa: data, length: 1 }])
    driver.offer(0)
    const chain = ring.pop()!
    ring.setMemory(next)
    expect(ring.error?.code).toBe('ERR_RING_MEMORY')
    driver.offer(1)
    expect(ring.pop()).toBeUndefined()
    expect(() => {
      ring.push(chain, 0, 0)
      ring.publish()
    }).not.toThrow()
  })
})

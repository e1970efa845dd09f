import { describe, expect, test } from 'vitest'
import { GuestMemory } from '../../src/virtio/memory.ts'
import { formatPackedBase, parsePackedBase, wantsCall } from '../../src/virtio/packed-format.ts'
import { PackedRing, packedRingSizes } from '../../src/virtio/packed-ring.ts'
import { segments } from './mock-driver.ts'
import { available, baseAt, INDIRECT, NEXT, packed, random, used, WRITE } from './packed-driver.ts'

/** Offers chains of one descriptor, pops and pushes them and publishes once; returns whether a call is wanted. */
function serve({ ring, driver, data }: ReturnType<typeof packed>, count: number): boolean {
  for (let id = 0; id < count; id++) driver.offer(id, { gpa: data, length: 1, flags: WRITE })
  for (let id = 0; id < count; id++) ring.push(ring.pop()!, 1, 1)
  const call = ring.publish()
  expect(driver.takeUsed()).toHaveLength(count)
  return call
}

describe('packedRingSizes', () => {
  test('are those of the table in virtio 1.3 §2.8.10.1', () => {
    expect(packedRingSizes(8)).toEqual({ descriptor: 128, driver: 4, device: 4 })
    expect(packedRingSizes(32768)).toEqual({ descriptor: 524288, driver: 4, device: 4 })
  })
})

describe('pop', () => {
  test('nothing from a new ring, which is all zero', () => {
    const { ring } = packed()
    expect([ring.hasAvail(), ring.pop(), ring.error]).toEqual([false, undefined, undefined])
  })

  test('a chain of one descriptor', () => {
    const { ring, driver, data } = packed()
    driver.offer(5, { gpa: data + 7, length: 100, flags: WRITE })
    expect(ring.hasAvail()).toBe(true)
    const chain = ring.pop()!
    expect([chain.head, chain.inFlight, chain.readable, chain.writable]).toEqual([5, true, 0, 100])
    expect(segments(chain)).toEqual([[data + 7, 100]])
    expect(ring.chain(5)).toBe(chain)
    expect([ring.hasAvail(), ring.pop()]).toEqual([false, undefined])
  })

  test('a chain of several, whose id is that of the last descriptor', () => {
    const { ring, driver, data } = packed()
    driver.offer(
      3,
      { gpa: data, length: 16, id: 1 },
      { gpa: data + 100, length: 200, id: 0xffff },
      { gpa: data + 1000, length: 300, flags: WRITE, id: 8 },
      { gpa: data + 2000, length: 1, flags: WRITE }
    )
    const chain = ring.pop()!
    expect(chain.head).toBe(3)
    expect(segments(chain)).toEqual([
      [data, 16],
      [data + 100, 200],
      [data + 1000, 300],
      [data + 2000, 1],
    ])
    expect([chain.readableCount, chain.readable, chain.writable]).toEqual([2, 216, 301])
  })

  test('chains in the order of the ring, whatever their ids', () => {
    const { ring, driver, data } = packed()
    const one = { gpa: data, length: 1 }
    driver.offer(3, one)
    driver.offer(1, one, one)
    driver.offer(7, one)
    driver.offer(0, one, one, one)
    expect([ring.pop(), ring.pop(), ring.pop(), ring.pop()].map((chain) => chain!.head)).toEqual([3, 1, 7, 0])
    expect(ring.pop()).toBeUndefined()
  })

  test('not a chain whose other descriptors are written, but not yet the flags of its first', () => {
    const { ring, driver, data } = packed()
    const one = { gpa: data, length: 1 }
    driver.offer(0, one)
    const show = driver.prepare(1, one, one, one)
    expect(ring.pop()!.head).toBe(0)
    expect([ring.hasAvail(), ring.pop()]).toEqual([false, undefined])
    show()
    expect(ring.hasAvail()).toBe(true)
    expect(ring.pop()!.count).toBe(3)
  })

  test('what came after its last look', () => {
    const { ring, driver, data } = packed()
    const one = { gpa: data, length: 1 }
    driver.offer(0, one)
    driver.offer(1, one, one)
    expect(ring.pop()!.head).toBe(0)
    driver.offer(2, one)
    expect([ring.pop()!.head, ring.pop()!.head]).toEqual([1, 2])
    expect(ring.pop()).toBeUndefined()
  })

  test('descriptors are read once: later changes don’t reach the chain', () => {
    const { ring, driver, data } = packed()
    driver.offer(2, { gpa: data, length: 16 }, { gpa: data + 64, length: 32, flags: WRITE })
    const chain = ring.pop()!
    for (let i = 0; i < 8; i++) driver.descriptor(i, { gpa: 2n ** 64n - 1n, length: 0xffff_ffff, id: 0xffff })
    expect(segments(chain)).toEqual([
      [data, 16],
      [data + 64, 32],
    ])
    ring.push(chain, 32, 32)
    expect(ring.error).toBeUndefined()
  })

  test('unknown flags and those of a split ring’s next are ignored', () => {
    const { ring, driver, data } = packed()
    driver.offer(0, { gpa: data, length: 4, flags: 0x7f78 | WRITE })
    expect(ring.pop()!.writable).toBe(4)
  })

  test('zero-length descriptors have no segment and no direction', () => {
    const { ring, driver, data } = packed()
    driver.offer(
      0,
      { gpa: 2n ** 64n - 1n, length: 0 },
      { gpa: data, length: 8 },
      { gpa: 0xdead_0000_0000, length: 0 },
      { gpa: data + 8, length: 8, flags: WRITE },
      { gpa: 0xdead_0000_0000, length: 0, flags: WRITE }
    )
    driver.offer(1, { gpa: 0xdead_0000_0000, length: 0 })
    expect(segments(ring.pop()!)).toEqual([
      [data, 8],
      [data + 8, 8],
    ])
    expect(ring.pop()!.count).toBe(0)
  })

  test('a buffer across adjacent regions, above 4 GiB', () => {
    const high = 2 ** 36
    const region = (gpa: number) => ({ gpa, size: 4096, hva: 0, buffer: new SharedArrayBuffer(4096) })
    const { ring, driver } = packed({ regions: [region(high), region(high + 4096)] })
    driver.offer(0, { gpa: high + 4096 - 8, length: 16 })
    driver.offer(1, { gpa: high + 4096 - 8, length: 8 }, { gpa: high, length: 8192, flags: WRITE })
    expect(segments(ring.pop()!)).toEqual([
      [high + 4096 - 8, 8],
      [high + 4096, 8],
    ])
    expect(segments(ring.pop()!)).toHaveLength(3)
  })

  test('a chain of 32768 descriptors', () => {
    const size = 32768
    const { ring, driver, data } = packed({ size })
    driver.offer(32767, ...Array.from({ length: size }, (_, i) => ({ gpa: data + i, length: 1 + (i % 3) })))
    const chain = ring.pop()!
    expect([chain.count, chain.readableCount, chain.head]).toEqual([size, size, 32767])
    expect(chain.offset[size - 1]).toBe(data + size - 1)
    ring.push(chain, 0, 0)
    expect(ring.publish()).toBe(true)
    expect(driver.takeUsed()).toEqual([{ id: 32767, length: 0, flags: 0 }])
    expect(ring.base).toBe(0)
  })
})

describe('indirect descriptors', () => {
  test('a table of sequential entries, of whose flags WRITE alone counts', () => {
    const { ring, driver, data } = packed()
    const length = driver.table(data, [
      { gpa: data + 1000, length: 16, flags: 0xffff & ~(NEXT | WRITE), id: 0xffff },
      { gpa: data + 2000, length: 512, flags: WRITE | INDIRECT },
      { gpa: data + 3000, length: 1, flags: WRITE | NEXT },
    ])
    // WRITE on the descriptor of the table means nothing.
    driver.offer(6, { gpa: data, length, flags: INDIRECT | WRITE })
    const chain = ring.pop()!
    expect(chain.head).toBe(6)
    expect(segments(chain)).toEqual([
      [data + 1000, 16],
      [data + 2000, 512],
      [data + 3000, 1],
    ])
    expect([chain.readable, chain.writable]).toEqual([16, 513])
    expect(ring.base).toBe(0x8000_8001)
  })

  test('a table of more entries than the ring, and one of 1024', () => {
    const entries = 1024
    const { ring, driver, data } = packed({ size: 2, data: 16 * entries })
    driver.table(
      data,
      Array.from({ length: entries }, () => ({ gpa: data, length: 1 }))
    )
    driver.offer(0, { gpa: data, length: 48, flags: INDIRECT })
    driver.offer(1, { gpa: data, length: 16 * entries, flags: INDIRECT })
    expect([ring.pop()!.count, ring.pop()!.count]).toEqual([3, entries])
  })

  test('a table of more entries than that breaks the ring, unless the ring has as many', () => {
    for (const [size, code] of [
      [2, 'ERR_RING_INDIRECT'],
      [4097, undefined],
    ] as const) {
      const { ring, driver, data } = packed({ size, data: 16 * 4097 })
      driver.table(
        data,
        Array.from({ length: 4097 }, () => ({ gpa: data, length: 1 }))
      )
      driver.offer(0, { gpa: data, length: 16 * 4097, flags: INDIRECT })
      expect(ring.pop()?.count).toBe(code === undefined ? 4097 : undefined)
      expect(ring.error?.code).toBe(code)
    }
  })

  test('beside chains of plain descriptors', () => {
    const { ring, driver, data } = packed()
    const length = driver.table(data, [{ gpa: data + 2000, length: 7 }])
    driver.offer(0, { gpa: data, length: 1 }, { gpa: data, length: 2 })
    driver.offer(1, { gpa: data, length, flags: INDIRECT })
    driver.offer(2, { gpa: data, length: 3 })
    expect([ring.pop()!.readable, ring.pop()!.readable, ring.pop()!.readable]).toEqual([3, 7, 3])
  })

  test('a table across adjacent regions, cut between two entries', () => {
    const gpa = 2 ** 33
    const regions = [gpa, gpa + 4096].map((start) => ({
      gpa: start,
      size: 4096,
      hva: 0,
      buffer: new SharedArrayBuffer(4096),
    }))
    const { ring, driver, data } = packed({ regions })
    const write = (region: number, at: number, address: number, length: number) => {
      const view = new DataView(regions[region]!.buffer)
      view.setBigUint64(at, BigInt(address), true)
      view.setUint32(at + 8, length, true)
    }
    write(0, 4080, data, 5)
    write(1, 0, data + 5, 6)
    driver.offer(0, { gpa: gpa + 4080, length: 32, flags: INDIRECT })
    expect(segments(ring.pop()!)).toEqual([
      [data, 5],
      [data + 5, 6],
    ])
  })
})

describe('push and publish', () => {
  test('used descriptors are visible at publish, not before, at positions in the order of push', () => {
    const { ring, driver, data } = packed()
    driver.offer(4, { gpa: data, length: 9, flags: WRITE })
    driver.offer(0, { gpa: data, length: 9 }, { gpa: data, length: 9, flags: WRITE })
    driver.offer(1, { gpa: data, length: 9 })
    const chains = [ring.pop()!, ring.pop()!, ring.pop()!]
    ring.push(chains[1]!, 7, 7)
    ring.push(chains[2]!, 0, 0)
    expect(driver.takeUsed()).toEqual([])
    expect(chains.map((chain) => chain.inFlight)).toEqual([true, false, false])
    expect(ring.publish()).toBe(true)
    // WRITE says whether something was written.
    expect(driver.takeUsed()).toEqual([
      { id: 0, length: 7, flags: WRITE },
      { id: 1, length: 0, flags: 0 },
    ])
    expect([driver.flags(0) & 0x8080, driver.flags(1) & 0x8080, driver.flags(2) & 0x8080]).toEqual([
      0x8080, 0x80, 0x8080,
    ])
    ring.push(chains[0]!, 0xffff_ffff, 9)
    ring.publish()
    expect(driver.takeUsed()).toEqual([{ id: 4, length: 0xffff_ffff, flags: WRITE }])
  })

  test('publishing nothing changes nothing and wants no call', () => {
    const { ring, bytes } = packed({ eventIdx: true })
    const before = bytes.slice()
    expect(ring.publish()).toBe(false)
    expect(Buffer.compare(bytes, before)).toBe(0)
  })

  test('what is popped while a batch is open does not disturb it', () => {
    const { ring, driver, data } = packed({ size: 3 })
    driver.offer(0, { gpa: data, length: 1 })
    driver.offer(1, { gpa: data, length: 1 })
    ring.push(ring.pop()!, 0, 0)
    const second = ring.pop()!
    driver.offer(2, { gpa: data, length: 1 })
    const third = ring.pop()!
    ring.push(third, 0, 0)
    ring.publish()
    ring.push(second, 0, 0)
    ring.publish()
    expect(driver.takeUsed().map(({ id }) => id)).toEqual([0, 2, 1])
    expect(ring.base).toBe(0)
  })
})

describe('unpop', () => {
  test('gives chains back in reverse order, also across the end of the ring', () => {
    for (let start = 0; start < 8; start++) {
      const { ring, driver, data } = packed({ base: baseAt(start, 1) })
      driver.offer(1, { gpa: data, length: 1 }, { gpa: data, length: 2 })
      driver.offer(2, { gpa: data, length: 3 })
      driver.offer(3, { gpa: data, length: 4 }, { gpa: data, length: 5 }, { gpa: data, length: 6 })
      const base = ring.base
      const chains = [ring.pop()!, ring.pop()!, ring.pop()!]
      for (const chain of chains.toReversed()) ring.unpop(chain)
      expect([ring.base, ring.hasAvail(), chains[0]!.inFlight]).toEqual([base, true, false])
      expect([ring.pop()!.readable, ring.pop()!.readable, ring.pop()!.readable]).toEqual([3, 3, 15])
      expect([ring.pop(), ring.error]).toEqual([undefined, undefined])
    }
  })

  test('behind chains that were used', () => {
    const { ring, driver, data } = packed({ size: 4 })
    driver.offer(0, { gpa: data, length: 1 })
    driver.offer(1, { gpa: data, length: 1 }, { gpa: data, length: 1 })
    driver.offer(2, { gpa: data, length: 1 })
    const [first, second, third] = [ring.pop()!, ring.pop()!, ring.pop()!]
    ring.push(first, 0, 0)
    ring.unpop(third)
    ring.unpop(second)
    ring.publish()
    expect(driver.takeUsed()).toHaveLength(1)
    for (const id of [1, 2]) {
      const chain = ring.pop()!
      expect(chain.head).toBe(id)
      ring.push(chain, 0, 0)
    }
    ring.publish()
    expect(driver.takeUsed().map(({ id }) => id)).toEqual([1, 2])
  })
})

describe.each([1, 2, 3, 7, 8, 100, 256, 32768])('a ring of %d entries', (size) => {
  const starts = size <= 8 ? Array.from({ length: size }, (_, i) => i) : [0, 1, size - 2, size - 1]
  test.each(starts.flatMap((index) => [[index, 1] as const, [index, 0] as const]))(
    'goes round three times from index %d with wrap counter %d',
    (index, wrap) => {
      const { ring, driver, data } = packed({ size, base: baseAt(index, wrap) })
      for (let round = 0; round < 3; round++) {
        // All of them at once: the fullest that a ring gets.
        const ids = Array.from({ length: size }, (_, i) => (i + round) % size)
        for (const id of ids) driver.offer(id, { gpa: data + (id % 1000), length: 1, flags: WRITE })
        const popped: number[] = []
        for (let chain = ring.pop(); chain !== undefined; chain = ring.pop()) popped.push(chain.head)
        expect(ring.error).toBeUndefined()
        expect(popped).toEqual(ids)
        for (const id of ids.toReversed()) ring.push(ring.chain(id), id, id)
        expect(ring.publish()).toBe(true)
        expect(driver.takeUsed().map(({ id }) => id)).toEqual(ids.toReversed())
        expect(ring.base).toBe(baseAt(index, wrap ^ (round & 1) ^ 1))
      }
    }
  )

  test('whole chains of every length at every place', () => {
    const { ring, driver, data } = packed({ size })
    const lengths = size <= 8 ? Array.from({ length: size }, (_, i) => i + 1) : [1, 5, size - 1, size, 3]
    for (let round = 0; round < 2 * Math.min(size, 8); round++) {
      for (const length of lengths) {
        driver.offer(round % size, ...Array.from({ length }, (_, i) => ({ gpa: data + i, length: 1 })))
        const chain = ring.pop()!
        expect([chain.head, chain.count]).toEqual([round % size, length])
        expect(ring.pop()).toBeUndefined()
        ring.push(chain, 0, 0)
        ring.publish()
        expect(driver.takeUsed()).toHaveLength(1)
      }
    }
    expect(ring.error).toBeUndefined()
  })
})

describe('the base', () => {
  test('is avail and used position with their wrap counters', () => {
    const { ring, driver, data } = packed({ size: 4 })
    for (let id = 0; id < 4; id++) driver.offer(id, { gpa: data, length: 1 })
    const chains = [ring.pop()!, ring.pop()!, ring.pop()!, ring.pop()!]
    expect(ring.base).toBe(0x8000_0000)
    ring.push(chains[0]!, 0, 0)
    expect(ring.base).toBe(0x8001_0000)
    for (const chain of chains.slice(1)) ring.push(chain, 0, 0)
    expect(ring.base).toBe(0)
  })

  test('goes to a ring that goes on where another stopped', () => {
    const old = packed({ size: 5 })
    serve(old, 3)
    serve(old, 4)
    const next = new PackedRing(old.memory, { ...old.config, base: old.ring.base })
    expect(next.base).toBe(old.ring.base)
    expect(serve({ ...old, ring: next }, 5)).toBe(true)
  })

  test.each([
    [0x8000, 0x8000_8000, 'DPDK: a new ring'],
    [0x0000, 0x0000_0000, 'index 0 in an odd lap'],
    [0x8005, 0x8005_8005, 'DPDK: only the avail half'],
    [0x0003, 0x0003_0003, 'DPDK: in an odd lap'],
    [0x8003_8005, 0x8003_8005, 'two chains in flight that nobody knows'],
    [0x8006_0002, 0x8006_0002, 'the same across the end of the ring'],
    [0x8003_0003, 0x8003_0003, 'the whole ring'],
  ])('%s is %s: %s', (base, means) => {
    expect(packed({ base }).ring.base).toBe(means)
  })

  test.each([0x8008, 0x8008_8008, 0x8000_8008, 0x8008_8000, 0x8005_8003, 0x8003_0004, 0xffff_ffff, 0x0001_0000])(
    '%s breaks a ring of 8',
    (base) => {
      const { ring } = packed({ base })
      expect([ring.error?.code, ring.pop(), ring.hasAvail()]).toEqual(['ERR_RING_BASE', undefined, false])
    }
  )

  test('a ring that goes on with chains unknown gives only the others back', () => {
    const { ring, driver, data } = packed({ base: 0x8003_8005 })
    for (let id = 0; id < 6; id++) driver.offer(id, { gpa: data, length: 1 })
    const ids: number[] = []
    for (let chain = ring.pop(); chain !== undefined; chain = ring.pop()) ids.push(chain.head)
    expect([ids, ring.error]).toEqual([[0, 1, 2, 3, 4, 5], undefined])
  })

  test('parse and format are inverse where both halves are given', () => {
    for (const base of [0x8000_8000, 0xffff_ffff, 0x1234_9876, 0x8000_0000, 0]) {
      expect(formatPackedBase(parsePackedBase(base))).toBe(base)
    }
  })
})

describe('calls', () => {
  test('ENABLE, DISABLE and the reserved value, with and without EVENT_IDX', () => {
    for (const eventIdx of [false, true]) {
      const ring = packed({ eventIdx })
      for (const [flags, wanted] of [
        [0, true],
        [1, false],
        [3, true],
        // Reserved bits.
        [0xfffc, true],
        [0xfffd, false],
      ] as const) {
        ring.driver.wantCalls(flags, 7, 1)
        expect(serve(ring, 2), `flags ${flags}`).toBe(wanted)
      }
    }
  })

  test('DISABLE counts for the first one too, an offset does not', () => {
    const disabled = packed({ eventIdx: true })
    disabled.driver.wantCalls(1)
    expect(serve(disabled, 1)).toBe(false)
    for (let offset = 0; offset < 8; offset++) {
      const ring = packed({ eventIdx: true })
      ring.driver.wantCalls(2, offset, 0)
      expect(serve(ring, 1)).toBe(true)
      // As an offset in the other lap is never passed in this one.
      expect(serve(ring, 1)).toBe(false)
    }
  })

  test('DESC without EVENT_IDX is no reason to be silent', () => {
    const ring = packed()
    ring.driver.wantCalls(2, 7, 0)
    expect([serve(ring, 1), serve(ring, 1)]).toEqual([true, true])
  })

  test('when the descriptor is passed: every offset, batch and place, against counting one by one', () => {
    for (const size of [1, 2, 3, 8]) {
      for (let start = 0; start < 2 * size; start++) {
        for (let slots = 1; slots <= size; slots++) {
          for (let offset = 0; offset < 2 * size; offset++) {
            let wanted = false
            for (let i = 0; i < slots; i++) wanted ||= (start + i) % (2 * size) === offset
            const event = (offset % size) | ((offset < size ? 1 : 0) << 15) | (2 << 16)
            const wrap = start < size ? 1 : 0
            expect(wantsCall(event, true, false, size, start % size, wrap, slots)).toBe(wanted)
          }
        }
      }
    }
  })

  test('from the ring itself, with chains of several descriptors across the wrap', () => {
    const ring = packed({ eventIdx: true, size: 4 })
    expect(serve(ring, 3)).toBe(true)
    const { driver, data } = ring
    const chain = (wantOffset: number, wantWrap: number) => {
      driver.wantCalls(2, wantOffset, wantWrap)
      driver.offer(0, { gpa: data, length: 1 }, { gpa: data, length: 1 }, { gpa: data, length: 1 })
      ring.ring.push(ring.ring.pop()!, 0, 0)
      const call = ring.ring.publish()
      driver.takeUsed()
      return call
    }
    // 3, 0, 1 of the second lap
    expect(chain(1, 0)).toBe(true)
    // 2, 3 and 0
    expect(chain(1, 0)).toBe(false)
    // 1, 2, 3
    expect(chain(0, 1)).toBe(false)
    // 0, 1, 2
    expect(chain(2, 0)).toBe(true)
  })

  test('an offset beyond the ring is no crash', () => {
    const ring = packed({ eventIdx: true })
    serve(ring, 1)
    ring.driver.wantCalls(0xffff, 0x7fff, 1)
    expect([true, false]).toContain(serve(ring, 3))
  })
})

describe('kicks', () => {
  test('without EVENT_IDX: DISABLE and ENABLE', () => {
    const { ring, driver } = packed({ base: baseAt(5, 1) })
    ring.suppress()
    expect(driver.deviceEvent).toEqual({ offset: 0, wrap: 0, flags: 1 })
    expect(ring.rearm()).toBe(false)
    expect(driver.deviceEvent).toEqual({ offset: 0, wrap: 0, flags: 0 })
  })

  test('with EVENT_IDX: DISABLE, and the next avail position', () => {
    const ring = packed({ eventIdx: true, base: baseAt(5, 1) })
    ring.ring.suppress()
    expect(ring.driver.deviceEvent.flags).toBe(1)
    expect(ring.ring.rearm()).toBe(false)
    expect(ring.driver.deviceEvent).toEqual({ offset: 5, wrap: 1, flags: 2 })
    serve(ring, 3)
    expect(ring.ring.rearm()).toBe(false)
    expect(ring.driver.deviceEvent).toEqual({ offset: 0, wrap: 0, flags: 2 })
  })

  test('rearm() returns true when the driver was faster, as long as chains are there', () => {
    const { ring, driver, data } = packed({ eventIdx: true })
    driver.offer(0, { gpa: data, length: 1 })
    driver.offer(1, { gpa: data, length: 1 })
    expect(ring.rearm()).toBe(true)
    ring.pop()
    expect(ring.rearm()).toBe(true)
    expect(driver.deviceEvent).toEqual({ offset: 1, wrap: 1, flags: 2 })
    ring.pop()
    expect(ring.rearm()).toBe(false)
  })
})

describe('setMemory', () => {
  test('goes on in the new memory with the positions of the old', () => {
    const old = packed({ size: 4 })
    serve(old, 3)
    const copy = new SharedArrayBuffer(old.buffer.byteLength)
    new Uint8Array(copy).set(old.bytes)
    const memory = new GuestMemory([{ gpa: 0, size: copy.byteLength, hva: 0, buffer: copy }])
    old.ring.setMemory(memory)
    const view = new DataView(copy)
    view.setBigUint64(48, BigInt(old.data), true)
    view.setUint32(56, 77, true)
    view.setUint16(60, 2, true)
    view.setUint16(62, available(1), true)
    const chain = old.ring.pop()!
    expect([chain.head, chain.readable]).toEqual([2, 77])
    expect(chain.regions).toBe(memory.regions)
    const before = old.bytes.slice()
    old.ring.push(chain, 0, 0)
    old.ring.publish()
    expect(view.getUint16(62, true)).toBe(used(1))
    expect(Buffer.compare(old.bytes, before)).toBe(0)
  })

  test('parts of the ring may lie in different regions, which may begin anywhere in their buffers', () => {
    const region = (gpa: number, offset: number) => {
      const buffer = new SharedArrayBuffer(offset + 4096)
      return { gpa, size: 4096, hva: 0, offset, buffer, view: new DataView(buffer, offset) }
    }
    const [data, table, driver, device] = [region(0, 8), region(2 ** 40, 4096), region(2 ** 33, 64), region(4096, 12)]
    const memory = new GuestMemory([data, table, driver, device])
    const place = { descriptor: 2 ** 40 + 32, driver: 2 ** 33 + 16, device: 4096 + 128 }
    const format = { eventIdx: true, indirect: true, packed: true, inOrder: false }
    const ring = new PackedRing(memory, { size: 4, base: 0x8000, ...place, ...format })
    table.view.setBigUint64(32, 100n, true)
    table.view.setUint32(40, 10, true)
    table.view.setUint16(46, available(1), true)
    const chain = ring.pop()!
    expect(segments(chain)).toEqual([[100, 10]])
    ring.push(chain, 9, 9)
    expect(ring.publish()).toBe(true)
    expect([table.view.getUint32(40, true), table.view.getUint16(46, true)]).toEqual([9, used(1) | WRITE])
    ring.rearm()
    expect(device.view.getUint32(128, true)).toBe(0x2_8001)
    driver.view.setUint32(16, 0x1_0000, true)
    table.view.setUint16(62, available(1), true)
    ring.push(ring.pop()!, 0, 0)
    expect(ring.publish()).toBe(false)
  })
})

describe('a driver and a device that do as they like', () => {
  test.each([1, 2, 3, 4, 5, 6])('nothing is lost, doubled or confused, seed %d', (seed) => {
    const rnd = random(seed)
    for (let round = 0; round < 60; round++) {
      const size = 1 + rnd(round % 2 === 0 ? 6 : 40)
      const inOrder = rnd(2) === 0
      const wrap = rnd(2)
      const { ring, driver, data } = packed({ size, inOrder, eventIdx: rnd(2) === 0, base: baseAt(rnd(size), wrap) })
      const ids = Array.from({ length: size }, (_, i) => i)
      const lengths = new Map<number, number>()
      const offered: number[] = []
      const inFlight: number[] = []
      const done: { id: number; length: number }[] = []
      const popped: number[] = []
      // What can be unpopped: the last ones that were popped, as long as none of them was used.
      let last: number[] = []
      let free = size
      for (let step = 0; step < 400; step++) {
        const action = rnd(6)
        if (action <= 1 && free > 0) {
          const slots = 1 + rnd(Math.min(free, 5))
          const id = ids.splice(rnd(ids.length), 1)[0]!
          const writable = rnd(slots + 1)
          const parts = Array.from({ length: slots }, (_, i) => ({
            gpa: data + rnd(1000),
            length: 1 + rnd(100),
            flags: i >= writable ? WRITE : 0,
          }))
          lengths.set(
            id,
            parts.reduce((sum, part) => sum + part.length, 0)
          )
          free -= slots
          driver.offer(id, ...parts)
          offered.push(id)
        } else if (action === 2) {
          const chain = ring.pop()
          expect(chain?.head).toBe(offered.shift())
          if (chain === undefined) continue
          expect(chain.readable + chain.writable).toBe(lengths.get(chain.head))
          for (const list of [inFlight, popped, last]) list.push(chain.head)
        } else if (action === 3 && inFlight.length > 0) {
          const id = inFlight.splice(rnd(inFlight.length), 1)[0]!
          const length = rnd(2 ** 32)
          done.push({ id, length })
          last = last.slice(last.indexOf(id) + 1)
          ring.push(ring.chain(id), length, 0)
        } else if (action === 4) {
          ring.publish()
          const expected = inOrder ? popped.map((id) => done.find((one) => one.id === id)) : done.slice()
          const end = expected.indexOf(undefined)
          const visible = end < 0 ? expected : expected.slice(0, end)
          for (const slots of visible.map((one) => driver.slots.get(one!.id)!)) free += slots
          expect(driver.takeUsed().map(({ id, length }) => ({ id, length }))).toEqual(visible)
          for (const one of visible) {
            done.splice(done.indexOf(one!), 1)
            popped.splice(popped.indexOf(one!.id), 1)
            ids.push(one!.id)
          }
        } else if (action === 5 && last.length > 0) {
          const id = last.pop()!
          inFlight.splice(inFlight.indexOf(id), 1)
          popped.splice(popped.indexOf(id), 1)
          offered.unshift(id)
          ring.unpop(ring.chain(id))
        }
        expect(ring.error).toBeUndefined()
        expect(ring.hasAvail()).toBe(offered.length > 0)
      }
    }
  })
})

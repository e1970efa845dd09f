import { describe, expect, test } from 'vitest'
import { GuestMemory } from '../../src/virtio/memory.ts'
import { SplitRing, splitRingSizes } from '../../src/virtio/split-ring.ts'
import { INDIRECT, segments, setup, WRITE } from './mock-driver.ts'

describe('splitRingSizes', () => {
  test('are those of the table in virtio 1.3 §2.7, with and without event words', () => {
    expect(splitRingSizes(8, false)).toEqual({ descriptor: 128, driver: 20, device: 68 })
    expect(splitRingSizes(8, true)).toEqual({ descriptor: 128, driver: 22, device: 70 })
    expect(splitRingSizes(32768, true)).toEqual({ descriptor: 524288, driver: 65542, device: 262150 })
  })
})

describe('pop', () => {
  test('nothing from an empty ring', () => {
    const { ring } = setup()
    expect(ring.hasAvail()).toBe(false)
    expect(ring.pop()).toBeUndefined()
    expect(ring.error).toBeUndefined()
  })

  test('a chain of readable and writable descriptors in table order of their links', () => {
    const { ring, driver, data } = setup()
    const head = driver.chain(
      [
        { gpa: data, length: 16 },
        { gpa: data + 100, length: 200 },
        { gpa: data + 1000, length: 300, flags: WRITE },
        { gpa: data + 2000, length: 1, flags: WRITE },
      ],
      [5, 0, 7, 2]
    )
    driver.offer(head)
    expect(ring.hasAvail()).toBe(true)
    const chain = ring.pop()!
    expect(chain.head).toBe(5)
    expect(chain.inFlight).toBe(true)
    expect(segments(chain)).toEqual([
      [data, 16],
      [data + 100, 200],
      [data + 1000, 300],
      [data + 2000, 1],
    ])
    expect([chain.readableCount, chain.readable, chain.writable]).toEqual([2, 216, 301])
    expect(ring.chain(5)).toBe(chain)
    expect(ring.base).toBe(1)
    expect(ring.hasAvail()).toBe(false)
    expect(ring.pop()).toBeUndefined()
  })

  test('chains in the order of the avail ring, one per call', () => {
    const { ring, driver, data } = setup()
    for (let i = 0; i < 8; i++) driver.chain([{ gpa: data + i, length: 1 }], [i])
    driver.offer(3, 1, 7, 0)
    expect([ring.pop(), ring.pop(), ring.pop(), ring.pop()].map((chain) => chain!.head)).toEqual([3, 1, 7, 0])
    expect(ring.pop()).toBeUndefined()
  })

  test('does not see an entry before avail.idx names it', () => {
    const { ring, driver, data } = setup()
    driver.chain([{ gpa: data, length: 1 }], [1])
    driver.availEntry(0, 1)
    expect(ring.pop()).toBeUndefined()
    driver.availIdx = 1
    expect(ring.pop()!.head).toBe(1)
  })

  test('takes what came after its last look at avail.idx', () => {
    const { ring, driver, data } = setup()
    for (let i = 0; i < 3; i++) driver.chain([{ gpa: data, length: 1 }], [i])
    driver.offer(0, 1)
    expect(ring.pop()!.head).toBe(0)
    driver.offer(2)
    expect([ring.pop()!.head, ring.pop()!.head]).toEqual([1, 2])
  })

  test('a head again after it was used, in the same pooled chain', () => {
    const { ring, driver, data } = setup()
    driver.chain(
      [
        { gpa: data, length: 10 },
        { gpa: data, length: 5, flags: WRITE },
      ],
      [4, 6]
    )
    driver.offer(4)
    const first = ring.pop()!
    ring.push(first, 5, 5)
    driver.chain([{ gpa: data + 7, length: 3, flags: WRITE }], [4])
    driver.offer(4)
    const second = ring.pop()!
    expect(second).toBe(first)
    expect(segments(second)).toEqual([[data + 7, 3]])
    expect([second.readableCount, second.readable, second.writable]).toEqual([0, 0, 3])
  })

  test('a chain as long as the ring', () => {
    const { ring, driver, data } = setup({ size: 4 })
    driver.chain(
      Array.from({ length: 4 }, (_, i) => ({ gpa: data + i, length: 1 })),
      [3, 2, 1, 0]
    )
    driver.offer(3)
    expect(ring.pop()!.count).toBe(4)
  })

  test('a chain of 32768 descriptors', () => {
    const size = 32768
    const { ring, driver, data } = setup({ size })
    driver.chain(Array.from({ length: size }, (_, i) => ({ gpa: data + i, length: 1 + (i % 3) })))
    driver.offer(0)
    const chain = ring.pop()!
    expect([chain.count, chain.readableCount]).toEqual([size, size])
    expect(chain.offset[size - 1]).toBe(data + size - 1)
  })

  test('descriptors are read once: later changes don’t reach the chain', () => {
    const { ring, driver, data } = setup()
    driver.chain([
      { gpa: data, length: 16 },
      { gpa: data + 64, length: 32, flags: WRITE },
    ])
    driver.offer(0)
    const chain = ring.pop()!
    for (let i = 0; i < 8; i++)
      driver.descriptor(i, { gpa: 2n ** 64n - 1n, length: 0xffff_ffff, flags: 0xffff, next: 0xffff })
    expect(segments(chain)).toEqual([
      [data, 16],
      [data + 64, 32],
    ])
    ring.push(chain, 32, 32)
    expect(ring.error).toBeUndefined()
  })

  test('unknown descriptor flags are ignored', () => {
    const { ring, driver, data } = setup()
    driver.descriptor(0, { gpa: data, length: 4, flags: 0xfff8 | WRITE, next: 0xffff })
    driver.offer(0)
    expect(ring.pop()!.writable).toBe(4)
  })

  test('zero-length descriptors have no segment and no direction', () => {
    const { ring, driver, data } = setup()
    driver.chain([
      { gpa: 2n ** 64n - 1n, length: 0 },
      { gpa: data, length: 8 },
      { gpa: 0xdead_0000_0000, length: 0 },
      { gpa: data + 8, length: 8, flags: WRITE },
      { gpa: 0xdead_0000_0000, length: 0, flags: WRITE },
    ])
    driver.chain([{ gpa: 0xdead_0000_0000, length: 0 }], [7])
    driver.offer(0, 7)
    const chain = ring.pop()!
    expect(segments(chain)).toEqual([
      [data, 8],
      [data + 8, 8],
    ])
    const empty = ring.pop()!
    expect([empty.count, empty.readable, empty.writable]).toEqual([0, 0, 0])
  })

  test('a buffer across adjacent regions, above 4 GiB', () => {
    const high = 2 ** 36
    const page = 4096
    const { ring, driver } = setup({
      regions: [
        { gpa: high, size: page, hva: 0, buffer: new SharedArrayBuffer(page) },
        { gpa: high + page, size: page, hva: 0, buffer: new SharedArrayBuffer(page) },
      ],
    })
    driver.chain([
      { gpa: high + page - 8, length: 16 },
      { gpa: high, length: 2 * page, flags: WRITE },
    ])
    driver.offer(0)
    const chain = ring.pop()!
    expect(segments(chain)).toEqual([
      [high + page - 8, 8],
      [high + page, 8],
      [high, page],
      [high + page, page],
    ])
    expect(chain.readableCount).toBe(2)
  })

  test('a chain of exactly 2^32 - 1 bytes', () => {
    // 4095 descriptors of the same MiB and one byte less than that: the sum counts, not the memory.
    const mib = 1 << 20
    const { ring, driver, data } = setup({ size: 4096, data: mib })
    driver.chain(
      Array.from({ length: 4096 }, (_, i) => ({
        gpa: data,
        length: i === 4095 ? mib - 1 : mib,
        flags: i < 2000 ? 0 : WRITE,
      }))
    )
    driver.offer(0)
    const chain = ring.pop()!
    expect(chain.readable + chain.writable).toBe(2 ** 32 - 1)
  })
})

describe('indirect descriptors', () => {
  const table = (entries: number) => setup({ size: 4, data: 65536 + entries * 16 })

  test('a head that is a table', () => {
    const { ring, driver, data } = table(3)
    const length = driver.table(data, [
      { gpa: data + 1000, length: 16 },
      { gpa: data + 2000, length: 512, flags: WRITE },
      { gpa: data + 3000, length: 1, flags: WRITE },
    ])
    driver.chain([{ gpa: data, length, flags: INDIRECT }], [2])
    driver.offer(2)
    const chain = ring.pop()!
    expect(chain.head).toBe(2)
    expect(segments(chain)).toEqual([
      [data + 1000, 16],
      [data + 2000, 512],
      [data + 3000, 1],
    ])
    expect([chain.readable, chain.writable]).toEqual([16, 513])
  })

  test('plain descriptors and then a table', () => {
    const { ring, driver, data } = table(2)
    const length = driver.table(data, [
      { gpa: data + 2000, length: 7 },
      { gpa: data + 3000, length: 1, flags: WRITE },
    ])
    driver.chain(
      [
        { gpa: data + 500, length: 3 },
        { gpa: data + 600, length: 4 },
        { gpa: data, length, flags: INDIRECT },
      ],
      [1, 3, 0]
    )
    driver.offer(1)
    const chain = ring.pop()!
    expect(segments(chain)).toEqual([
      [data + 500, 3],
      [data + 600, 4],
      [data + 2000, 7],
      [data + 3000, 1],
    ])
    expect(chain.readableCount).toBe(3)
  })

  test('WRITE on the descriptor of the table is ignored (§2.7.5.3.2)', () => {
    const { ring, driver, data } = table(1)
    driver.chain([{ gpa: data, length: driver.table(data, [{ gpa: data + 64, length: 9 }]), flags: INDIRECT | WRITE }])
    driver.offer(0)
    const chain = ring.pop()!
    expect([chain.readable, chain.writable]).toEqual([9, 0])
  })

  test('the entries are linked by index, not by place', () => {
    const { ring, driver, data } = table(4)
    driver.writeDescriptor(data, { gpa: data + 1000, length: 1, flags: 1, next: 3 })
    driver.writeDescriptor(data + 48, { gpa: data + 1003, length: 3, flags: 1, next: 1 })
    driver.writeDescriptor(data + 16, { gpa: data + 1001, length: 2, flags: 0, next: 0xffff })
    driver.chain([{ gpa: data, length: 64, flags: INDIRECT }])
    driver.offer(0)
    expect(segments(ring.pop()!)).toEqual([
      [data + 1000, 1],
      [data + 1003, 3],
      [data + 1001, 2],
    ])
  })

  test('more buffers in a table than that break the ring, a longer table with fewer does not', () => {
    for (const used of [4096, 4097]) {
      const { ring, driver, data } = table(4097)
      const end = data + 4097 * 16
      driver.table(
        data,
        Array.from({ length: used }, () => ({ gpa: end, length: 1 }))
      )
      driver.chain([{ gpa: data, length: 4097 * 16, flags: INDIRECT }])
      driver.offer(0)
      expect(ring.pop()?.count).toBe(used === 4096 ? used : undefined)
      expect(ring.error?.code).toBe(used === 4096 ? undefined : 'ERR_RING_INDIRECT')
    }
  })

  test('a table of more entries than the ring has, and one of 1024', () => {
    const entries = 1024
    const { ring, driver, data } = table(entries)
    const end = data + entries * 16
    driver.chain([
      {
        gpa: data,
        length: driver.table(
          data,
          Array.from({ length: 5 }, () => ({ gpa: end, length: 1 }))
        ),
        flags: INDIRECT,
      },
    ])
    driver.offer(0)
    const small = ring.pop()!
    expect(small.count).toBe(5)
    ring.push(small, 0, 0)
    driver.table(
      data,
      Array.from({ length: entries }, () => ({ gpa: end, length: 2 }))
    )
    driver.chain([{ gpa: data, length: entries * 16, flags: INDIRECT }])
    driver.offer(0)
    expect(ring.pop()!.readable).toBe(2 * entries)
  })

  test('a table at an address that is a multiple of 4 only', () => {
    const { ring, driver, data } = table(2)
    const at = data + 4
    const length = driver.table(at, [
      { gpa: data + 100, length: 1 },
      { gpa: data + 200, length: 2 },
    ])
    driver.chain([{ gpa: at, length, flags: INDIRECT }])
    driver.offer(0)
    expect(ring.pop()!.readable).toBe(3)
  })

  test('a table across adjacent regions, cut between two entries', () => {
    const page = 4096
    const gpa = 2 ** 33
    const regions = [gpa, gpa + page].map((start) => ({
      gpa: start,
      size: page,
      hva: 0,
      buffer: new SharedArrayBuffer(page),
    }))
    const { ring, driver, data } = setup({ regions })
    const first = new DataView(regions[0]!.buffer)
    first.setBigUint64(page - 16, BigInt(data), true)
    first.setUint32(page - 8, 5, true)
    first.setUint16(page - 4, 1, true)
    first.setUint16(page - 2, 1, true)
    const second = new DataView(regions[1]!.buffer)
    second.setBigUint64(0, BigInt(data + 5), true)
    second.setUint32(8, 6, true)
    driver.chain([{ gpa: gpa + page - 16, length: 32, flags: INDIRECT }])
    driver.offer(0)
    expect(segments(ring.pop()!)).toEqual([
      [data, 5],
      [data + 5, 6],
    ])
  })
})

describe('push and publish', () => {
  test('used elements are visible at publish, not before', () => {
    const { ring, driver, data } = setup()
    for (let i = 0; i < 3; i++) driver.chain([{ gpa: data, length: 9, flags: WRITE }], [i])
    driver.offer(2, 0, 1)
    const chains = [ring.pop()!, ring.pop()!, ring.pop()!]
    ring.push(chains[1]!, 7, 7)
    ring.push(chains[0]!, 0xffff_ffff, 0xffff_ffff)
    expect(driver.takeUsed()).toEqual([])
    expect(chains.map((chain) => chain.inFlight)).toEqual([false, false, true])
    expect(ring.publish()).toBe(true)
    expect(driver.takeUsed()).toEqual([
      { id: 0, length: 7 },
      { id: 2, length: 0xffff_ffff },
    ])
  })

  test('publishing nothing changes nothing and wants no call', () => {
    const { ring, driver, bytes } = setup({ eventIdx: true })
    const before = bytes.slice()
    expect(ring.publish()).toBe(false)
    expect(Buffer.compare(bytes, before)).toBe(0)
    driver.usedEvent = 0xffff
    expect(ring.publish()).toBe(false)
  })

  test('goes on from the used.idx that is in memory', () => {
    const { ring, driver, data } = setup({ base: 10, usedBase: 7 })
    driver.chain([{ gpa: data, length: 1 }])
    driver.offer(0)
    ring.push(ring.pop()!, 3, 3)
    ring.publish()
    expect(driver.usedIdx).toBe(8)
    expect(driver.usedElement(7)).toEqual({ id: 0, length: 3 })
    expect(ring.base).toBe(11)
  })
})

describe.each([2, 4, 256, 32768])('a ring of %d entries', (size) => {
  test.each([
    ['0', 0],
    ['65535', 65535],
    ['65536 - size', 65536 - size],
    ['65536 - size + 1', 65536 - size + 1],
    ['32767', 32767],
  ])('goes round twice from index %s, avail and used, with every chain seen once', (_, base) => {
    const { ring, driver, data } = setup({ size, base, usedBase: (base + 12345) & 0xffff })
    for (let i = 0; i < size; i++) driver.chain([{ gpa: data + (i % 1000), length: 1, flags: WRITE }], [i])
    let index = base
    for (let round = 0; round < 3; round++) {
      // All of them at once: the fullest that a ring gets; heads in another order each round.
      const heads = Array.from({ length: size }, (_, i) => (i * 3 + round) & (size - 1))
      driver.offer(...heads)
      index = (index + size) & 0xffff
      expect(driver.availIdx).toBe(index)
      const popped: number[] = []
      for (;;) {
        const chain = ring.pop()
        if (chain === undefined) break
        popped.push(chain.head)
        ring.push(chain, chain.head, chain.head)
      }
      expect(ring.error).toBeUndefined()
      expect(popped).toEqual(heads)
      expect(ring.base).toBe(index)
      expect(ring.publish()).toBe(true)
      expect(driver.takeUsed()).toEqual(heads.map((head) => ({ id: head, length: head })))
    }
  })
})

describe('at the wrap of the free-running indices', () => {
  test('avail.idx 65535 → 0: the chain behind the wrap is popped', () => {
    const { ring, driver, data } = setup({ base: 65535 })
    for (let i = 0; i < 2; i++) driver.chain([{ gpa: data, length: 1 }], [i])
    driver.offer(0)
    expect(driver.availIdx).toBe(0)
    expect(ring.hasAvail()).toBe(true)
    expect(ring.pop()!.head).toBe(0)
    expect(ring.base).toBe(0)
    expect(ring.hasAvail()).toBe(false)
    driver.offer(1)
    expect(ring.pop()!.head).toBe(1)
    expect(ring.base).toBe(1)
  })

  test('used.idx 65535 → 0: the element lands in the last slot and the next in the first', () => {
    const { ring, driver, data } = setup({ size: 4, usedBase: 65535 })
    for (let i = 0; i < 2; i++) driver.chain([{ gpa: data, length: 1 }], [i])
    driver.offer(0, 1)
    ring.push(ring.pop()!, 11, 11)
    ring.push(ring.pop()!, 22, 22)
    ring.publish()
    expect(driver.usedIdx).toBe(1)
    expect(driver.usedElement(3)).toEqual({ id: 0, length: 11 })
    expect(driver.usedElement(0)).toEqual({ id: 1, length: 22 })
  })

  test('avail.idx that is ahead by the ring’s size across the wrap is fine, by one more is not', () => {
    const fine = setup({ size: 4, base: 65534 })
    fine.driver.availIdx = 2
    expect(fine.ring.pop()).toBeDefined()
    const broken = setup({ size: 4, base: 65534 })
    broken.driver.availIdx = 3
    expect(broken.ring.pop()).toBeUndefined()
    expect(broken.ring.error?.code).toBe('ERR_RING_INDEX')
  })

  test('the base is taken modulo 65536', () => {
    const { memory, config } = setup()
    expect(new SplitRing(memory, { ...config, base: 65536 + 5 }).base).toBe(5)
  })
})

/** Offers `count` chains, pops and pushes them and publishes once; returns whether a call is wanted. */
function serve({ ring, driver }: ReturnType<typeof setup>, count: number): boolean {
  const heads = Array.from({ length: count }, (_, i) => i)
  driver.offer(...heads)
  for (const _ of heads) ring.push(ring.pop()!, 0, 0)
  return ring.publish()
}

describe('calls with EVENT_IDX', () => {
  test('the first is never suppressed, whatever used_event says', () => {
    for (const event of [0, 1, 7, 0x8000, 65535]) {
      const ring = setup({ eventIdx: true })
      ring.driver.usedEvent = event
      expect(serve(ring, 1), `used_event ${event}`).toBe(true)
    }
  })

  test.each([
    // used.idx before, used_event, chains, wanted
    [10, 10, 1, true],
    [10, 11, 1, false],
    [10, 11, 2, true],
    [10, 9, 1, false],
    [10, 9, 8, false],
    [10, 17, 8, true],
    [10, 18, 8, false],
    [65535, 65535, 1, true],
    [65535, 0, 1, false],
    [65535, 0, 2, true],
    [65533, 1, 4, false],
    [65533, 1, 5, true],
    [65533, 65532, 5, false],
    [0, 65535, 1, false],
    [0, 0, 1, true],
    [40000, 7232, 8, false],
  ])('used.idx %d, used_event %d, %d chains: %s', (index, event, count, wanted) => {
    const ring = setup({ eventIdx: true, usedBase: index - 1 < 0 ? 65535 : index - 1 })
    expect(serve(ring, 1)).toBe(true)
    expect(ring.driver.usedIdx).toBe(index)
    ring.driver.usedEvent = event
    expect(serve(ring, count)).toBe(wanted)
    // NO_INTERRUPT has no meaning then, and a passed event is not passed again.
    ring.driver.availFlags = 1
    expect(serve(ring, 1)).toBe(((index + count) & 0xffff) === event)
  })

  test('once per 65536 for a driver that never moves used_event', () => {
    const ring = setup({ eventIdx: true, size: 256 })
    expect(serve(ring, 1)).toBe(true)
    ring.driver.usedEvent = 0
    const calls: number[] = []
    for (let i = 0; i < 2 * 256; i++) if (serve(ring, 256)) calls.push(i)
    expect(calls).toEqual([255, 511])
  })

  test('flags are not looked at', () => {
    const ring = setup({ eventIdx: true })
    ring.driver.availFlags = 1
    expect(serve(ring, 1)).toBe(true)
    ring.driver.usedEvent = 1
    expect(serve(ring, 1)).toBe(true)
  })
})

describe('calls without EVENT_IDX', () => {
  test('each publish wants one until NO_INTERRUPT is set, and again when it is cleared', () => {
    const ring = setup()
    expect(serve(ring, 1)).toBe(true)
    ring.driver.availFlags = 1
    expect(serve(ring, 3)).toBe(false)
    ring.driver.availFlags = 0
    expect(serve(ring, 1)).toBe(true)
  })

  test('only bit 0 of the flags counts, and used_event is not looked at', () => {
    const ring = setup()
    ring.driver.availFlags = 0xfffe
    ring.driver.usedEvent = 5
    expect(serve(ring, 1)).toBe(true)
    expect(serve(ring, 1)).toBe(true)
  })
})

describe('kicks with EVENT_IDX', () => {
  test('rearm() sets avail_event to the next avail index, suppress() leaves all as it is', () => {
    const ring = setup({ eventIdx: true, base: 100 })
    ring.driver.availEvent = 0x1234
    ring.ring.suppress()
    expect([ring.driver.availEvent, ring.driver.usedFlags]).toEqual([0x1234, 0])
    expect(ring.ring.rearm()).toBe(false)
    expect([ring.driver.availEvent, ring.driver.usedFlags]).toEqual([100, 0])
    serve(ring, 3)
    expect(ring.driver.availEvent).toBe(100)
    expect(ring.ring.rearm()).toBe(false)
    expect(ring.driver.availEvent).toBe(103)
  })

  test('rearm() at the wrap', () => {
    const ring = setup({ eventIdx: true, base: 65535 })
    serve(ring, 1)
    expect(ring.ring.rearm()).toBe(false)
    expect(ring.driver.availEvent).toBe(0)
  })

  test('rearm() returns true when the driver was faster', () => {
    const { ring, driver } = setup({ eventIdx: true })
    driver.offer(0, 1)
    expect(ring.rearm()).toBe(true)
    expect(driver.availEvent).toBe(0)
    ring.pop()
    // One is still there that was seen already.
    expect(ring.rearm()).toBe(true)
    ring.pop()
    expect(ring.rearm()).toBe(false)
  })
})

describe('kicks without EVENT_IDX', () => {
  test('suppress() sets NO_NOTIFY, rearm() clears the flags', () => {
    const { ring, driver } = setup()
    driver.availEvent = 0x1234
    ring.suppress()
    expect(driver.usedFlags).toBe(1)
    expect(ring.rearm()).toBe(false)
    expect(driver.usedFlags).toBe(0)
    expect(driver.availEvent).toBe(0x1234)
  })

  test('rearm() clears what a former back-end left', () => {
    const { ring, driver } = setup()
    driver.usedFlags = 1
    ring.rearm()
    expect(driver.usedFlags).toBe(0)
  })

  test('rearm() returns true when the driver was faster', () => {
    const { ring, driver } = setup()
    ring.suppress()
    driver.offer(0)
    expect(ring.rearm()).toBe(true)
    expect(driver.usedFlags).toBe(0)
  })
})

describe('setMemory', () => {
  test('goes on in the new memory with the indices of the old', () => {
    const old = setup({ size: 4 })
    serve(old, 3)
    const copy = new SharedArrayBuffer(old.buffer.byteLength)
    new Uint8Array(copy).set(old.bytes)
    const hva = 0
    const memory = new GuestMemory([{ gpa: 0, size: copy.byteLength, hva, buffer: copy }])
    old.ring.setMemory(memory)
    const moved = new DataView(copy)
    moved.setUint32(old.layout.descriptor + 16 + 8, 77, true)
    moved.setBigUint64(old.layout.descriptor + 16, BigInt(old.data), true)
    moved.setUint16(old.layout.driver + 4 + 3 * 2, 1, true)
    moved.setUint16(old.layout.driver + 2, 4, true)
    const chain = old.ring.pop()!
    expect([chain.head, chain.readable]).toEqual([1, 77])
    expect(chain.regions).toBe(memory.regions)
    const before = old.bytes.slice()
    old.ring.push(chain, 0, 0)
    old.ring.publish()
    expect(moved.getUint16(old.layout.device + 2, true)).toBe(4)
    expect(Buffer.compare(old.bytes, before)).toBe(0)
  })

  test('parts of the ring may lie in different regions', () => {
    const page = 4096
    const region = (gpa: number) => ({ gpa, size: page, hva: 0, buffer: new SharedArrayBuffer(page) })
    const regions = [region(0), region(2 ** 40), region(2 ** 33), region(page)]
    const memory = new GuestMemory(regions)
    const config = {
      size: 4,
      descriptor: 2 ** 40,
      driver: 2 ** 33 + 16,
      device: 128,
      base: 0,
      eventIdx: true,
      indirect: true,
      packed: false,
      inOrder: false,
    }
    const ring = new SplitRing(memory, config)
    const table = new DataView(regions[1]!.buffer)
    table.setBigUint64(0, BigInt(page), true)
    table.setUint32(8, 10, true)
    new DataView(regions[2]!.buffer).setUint16(18, 1, true)
    const chain = ring.pop()!
    expect(segments(chain)).toEqual([[page, 10]])
    ring.push(chain, 9, 9)
    expect(ring.publish()).toBe(true)
    const used = new DataView(regions[0]!.buffer)
    expect([used.getUint16(130, true), used.getUint32(132, true), used.getUint32(136, true)]).toEqual([1, 0, 9])
  })
})

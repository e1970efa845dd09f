/** The switch's table of addresses: beside a Map that does the same slowly, and against guests that mean ill. */
import { describe, expect, test } from 'vitest'
import { MacTable } from '../../devices/net/mac-table.ts'

/** A generator of its own, so that a failure comes again. */
function generator(seed: number) {
  let state = seed >>> 0
  return (below: number): number => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0
    return Math.floor((state / 2 ** 32) * below)
  }
}

describe('learn and find', () => {
  test('an address is found on its port, others are not', () => {
    const table = new MacTable()
    expect(table.learn(0x0200, 1, 3, 0)).toBe(true)
    expect(table.find(0x0200, 1, 0)).toBe(3)
    expect(table.find(0x0200, 2, 0)).toBe(-1)
    expect(table.find(0x0201, 1, 0)).toBe(-1)
    expect(table.size).toBe(1)
  })

  test('the lower half may be signed or not', () => {
    const table = new MacTable()
    table.learn(0x0200, 0xffff_fffe, 1, 0)
    expect(table.find(0x0200, -2, 0)).toBe(1)
    expect(table.learn(0x0200, -2, 2, 0)).toBe(true)
    expect(table.find(0x0200, 0xffff_fffe, 0)).toBe(2)
    expect(table.size).toBe(1)
  })

  test('group addresses and all zero are never learnt', () => {
    const table = new MacTable()
    for (const [high, low] of [
      [0xffff, 0xffff_ffff],
      [0x0100, 0x5e00_0001],
      [0x3333, 1],
      [0, 0],
    ] as const) {
      expect(table.learn(high, low, 1, 0)).toBe(false)
      expect(table.find(high, low, 0)).toBe(-1)
    }
    expect(table.size).toBe(0)
    expect(table.learn(0x00ff, 0, 1, 0)).toBe(true)
    expect(table.learn(0, 1, 1, 0)).toBe(true)
  })

  test('an address that moves is on its new port only', () => {
    const table = new MacTable({ share: 1 })
    table.learn(0x0200, 1, 1, 0)
    expect(table.learn(0x0200, 1, 2, 1)).toBe(true)
    expect(table.find(0x0200, 1, 1)).toBe(2)
    expect(table.size).toBe(1)
    // The share of the old port is free again, the new port's is not.
    expect(table.learn(0x0200, 2, 1, 1)).toBe(true)
    expect(table.learn(0x0200, 3, 2, 1)).toBe(false)
  })

  test('port numbers may be large', () => {
    const table = new MacTable()
    expect(table.learn(0x0200, 1, 1000, 0)).toBe(true)
    expect(table.learn(0x0200, 2, 16, 0)).toBe(true)
    expect(table.find(0x0200, 1, 0)).toBe(1000)
    table.forget(2000)
    table.forget(1000)
    expect([table.find(0x0200, 1, 0), table.find(0x0200, 2, 0)]).toEqual([-1, 16])
  })
})

describe('ageing', () => {
  test('300 seconds after the last packet, not before', () => {
    const table = new MacTable()
    table.learn(0x0200, 1, 1, 10)
    expect(table.find(0x0200, 1, 309)).toBe(1)
    table.learn(0x0200, 1, 1, 100)
    expect(table.find(0x0200, 1, 399)).toBe(1)
    expect(table.size).toBe(1)
    expect(table.find(0x0200, 1, 400)).toBe(-1)
    expect(table.size).toBe(0)
  })

  test('expire removes the old ones only', () => {
    const table = new MacTable({ ageing: 10 })
    for (let i = 0; i < 1000; i++) table.learn(0x0200, i, 1, i < 500 ? 0 : 5)
    table.expire(9)
    expect(table.size).toBe(1000)
    table.expire(10)
    expect(table.size).toBe(500)
    expect(table.find(0x0200, 499, 10)).toBe(-1)
    expect(table.find(0x0200, 500, 10)).toBe(1)
  })

  test('a full table makes room by what aged, without being asked to', () => {
    const table = new MacTable({ capacity: 4, ageing: 10 })
    for (let i = 0; i < 4; i++) table.learn(0x0200, i, 1, 0)
    expect(table.learn(0x0200, 9, 2, 9)).toBe(false)
    expect(table.learn(0x0200, 9, 2, 10)).toBe(true)
    expect(table.size).toBe(1)
  })

  test('a full table looks for what aged once per second, on a clock with fractions', () => {
    const table = new MacTable({ capacity: 1, ageing: 10 })
    table.learn(0x0200, 1, 1, 100)
    expect(table.learn(0x0200, 2, 2, 109.5)).toBe(false)
    expect(table.learn(0x0200, 2, 2, 110.4)).toBe(false)
    expect(table.learn(0x0200, 2, 2, 110.5)).toBe(true)
  })

  test('an aged address of the same port counts as new', () => {
    const table = new MacTable({ ageing: 10 })
    table.learn(0x0200, 1, 1, 0)
    expect(table.learn(0x0200, 1, 1, 50)).toBe(true)
    expect(table.find(0x0200, 1, 59)).toBe(1)
    expect(table.size).toBe(1)
  })
})

describe('guests that make up addresses', () => {
  test('a port gets its share and no more; nobody else loses an address', () => {
    const table = new MacTable()
    for (let i = 0; i < 100; i++) table.learn(0x0200, i, 1, 0)
    const random = generator(1)
    for (let i = 0; i < 50_000; i++) table.learn(0x0600 + random(256), random(2 ** 32), 2, 1)
    expect(table.size).toBe(1124)
    for (let i = 0; i < 100; i++) expect(table.find(0x0200, i, 1)).toBe(1)
    for (let i = 100; i < 200; i++) expect(table.learn(0x0200, i, 3, 1)).toBe(true)
  })

  test('a port whose share is full takes no address of another one', () => {
    const table = new MacTable({ share: 2 })
    table.learn(0x0200, 1, 1, 0)
    table.learn(0x0200, 2, 2, 0)
    table.learn(0x0200, 3, 2, 0)
    expect(table.learn(0x0200, 1, 2, 0)).toBe(false)
    expect(table.find(0x0200, 1, 0)).toBe(1)
  })

  test('the table is never larger than its capacity', () => {
    const table = new MacTable({ capacity: 100 })
    for (let i = 0; i < 200; i++) expect(table.learn(0x0200, i, i % 5, 0)).toBe(i < 100)
    expect(table.size).toBe(100)
    // A move needs no room.
    expect(table.learn(0x0200, 0, 4, 0)).toBe(true)
  })

  test('addresses that differ in few bits don’t pile up', () => {
    // All pairs that a hash which only adds the halves together would put into one slot.
    const table = new MacTable({ capacity: 60_000, share: 60_000, secrets: [12_345, 67_891] })
    for (let i = 0; i < 60_000; i++) expect(table.learn((i << 9) & 0xfeff, i ^ 0x55, 1, 0)).toBe(true)
    for (let i = 0; i < 60_000; i++) expect(table.find((i << 9) & 0xfeff, i ^ 0x55, 0)).toBe(1)
  })
})

test.each([
  { capacity: 0 },
  { capacity: 1.5 },
  { capacity: 2 ** 20 + 1 },
  { share: 0 },
  { ageing: 0 },
  { ageing: Number.NaN },
])('refuses %o', (options) => {
  expect(() => new MacTable(options)).toThrow(RangeError)
})

/** The same, said plainly. */
class Model {
  readonly entries = new Map<string, { port: number; seen: number }>()
  readonly capacity: number
  readonly share: number
  readonly ageing: number
  expiredAt = Number.NEGATIVE_INFINITY

  constructor(capacity: number, share: number, ageing: number) {
    this.capacity = capacity
    this.share = share
    this.ageing = ageing
  }

  owned(port: number): number {
    return [...this.entries.values()].filter((entry) => entry.port === port).length
  }

  learn(key: string, port: number, now: number): boolean {
    const entry = this.entries.get(key)
    if (entry?.port === port) {
      entry.seen = now
      return true
    }
    const room = () => this.owned(port) < this.share && (this.entries.has(key) || this.entries.size < this.capacity)
    if (!room() && now > this.expiredAt) this.expire(now)
    if (!room()) return false
    this.entries.set(key, { port, seen: now })
    return true
  }

  find(key: string, now: number): number {
    const entry = this.entries.get(key)
    if (entry === undefined) return -1
    if (now - entry.seen < this.ageing) return entry.port
    this.entries.delete(key)
    return -1
  }

  forget(port: number): void {
    for (const [key, entry] of this.entries) if (entry.port === port) this.entries.delete(key)
  }

  expire(now: number): void {
    this.expiredAt = now
    for (const [key, { seen }] of this.entries) if (now - seen >= this.ageing) this.entries.delete(key)
  }
}

// Small tables, so that probes run long, wrap around the end and are cut short.
test.each(Array.from({ length: 40 }, (_, seed) => seed))('random operations, seed %i', (seed) => {
  const random = generator(seed)
  const capacity = 1 + random(40)
  const share = 1 + random(capacity)
  const ageing = 1 + random(30)
  const table = new MacTable({ capacity, share, ageing, secrets: [random(2 ** 32), random(2 ** 32)] })
  const model = new Model(capacity, share, ageing)
  const addresses = capacity + random(20)
  let now = 0
  for (let i = 0; i < 3000; i++) {
    const id = random(addresses)
    const [high, low, key] = [0x0200 + (id & 1), (id * 0x0100_0193) >>> 0, String(id)]
    const operation = random(100)
    if (operation < 55) {
      const port = random(4)
      expect(table.learn(high, low, port, now)).toBe(model.learn(key, port, now))
    } else if (operation < 90) expect(table.find(high, low, now)).toBe(model.find(key, now))
    else if (operation < 97) now += random(4)
    else if (operation < 99) {
      const port = random(5)
      table.forget(port)
      model.forget(port)
    } else {
      table.expire(now)
      model.expire(now)
    }
    expect(table.size).toBe(model.entries.size)
  }
  for (let id = 0; id < addresses; id++) {
    expect(table.find(0x0200 + (id & 1), (id * 0x0100_0193) >>> 0, now)).toBe(model.find(String(id), now))
  }
})

/**
 * Seeded fuzzing of the split ring against a second reader of the same tables, written with bigints and without speed in mind:
 * whatever is in memory, the ring says the same as that reader, and writes nowhere but into its used ring.
 */
import { Worker } from 'node:worker_threads'
import { describe, expect, test } from 'vitest'
import type { Chain } from '../../src/virtio/chain.ts'
import { GuestMemory } from '../../src/virtio/memory.ts'
import { SplitRing, splitRingSizes } from '../../src/virtio/split-ring.ts'
import type { VringConfig } from '../../src/virtio/vring.ts'

const PAGE = 4096
const CANARY = 0xc5
/** Two adjacent regions, a hole, one at 4 GiB - 1 page, so that it ends where the high word begins to count. */
const REGIONS = [
  { gpa: 0, size: PAGE },
  { gpa: PAGE, size: PAGE },
  { gpa: 2 ** 32 - PAGE, size: PAGE },
  { gpa: 2 ** 32, size: PAGE },
] as const

/** mulberry32 */
function random(seed: number): (below: number) => number {
  let state = seed
  return (below) => {
    state = (state + 0x6d2b79f5) | 0
    let t = Math.imul(state ^ (state >>> 15), 1 | state)
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t
    return Math.floor((((t ^ (t >>> 14)) >>> 0) / 2 ** 32) * below)
  }
}

/** A page of guard bytes behind each region. */
function makeMemory() {
  const buffers = REGIONS.map(() => new SharedArrayBuffer(2 * PAGE))
  const views = buffers.map((buffer) => new DataView(buffer))
  const bytes = buffers.map((buffer) => Buffer.from(buffer))
  for (const b of bytes) b.fill(CANARY, PAGE)
  const memory = new GuestMemory(REGIONS.map((region, i) => ({ ...region, hva: i * 2 ** 32, buffer: buffers[i]! })))
  return { buffers, views, bytes, memory }
}

type Expected = { error: string } | { runs: [gpa: number, length: number, writable: boolean][] }

/** What the chain at `head` is by the specification. */
function oracle(views: readonly DataView[], config: VringConfig, head: number): Expected {
  const locate = (gpa: bigint, length: bigint): [DataView, number] | undefined => {
    const i = REGIONS.findIndex((r) => gpa >= BigInt(r.gpa) && gpa + length <= BigInt(r.gpa + r.size))
    return i < 0 ? undefined : [views[i]!, Number(gpa - BigInt(REGIONS[i]!.gpa))]
  }
  const inside = (gpa: bigint, length: bigint): boolean => {
    let at = gpa
    while (at < gpa + length) {
      const r = REGIONS.find((region) => at >= BigInt(region.gpa) && at < BigInt(region.gpa + region.size))
      if (r === undefined) return false
      at = BigInt(r.gpa + r.size)
    }
    return true
  }
  const runs: [number, number, boolean][] = []
  let total = 0n
  let table = BigInt(config.descriptor)
  let entries = config.size
  let indirect = false
  let index = head
  for (let walked = 0; ; walked++) {
    if (walked === entries) return { error: 'ERR_RING_LOOP' }
    const at = table + BigInt(index) * 16n
    const found = locate(at, 16n)
    if (found === undefined || at % 4n !== 0n) return { error: 'ERR_RING_INDIRECT' }
    const [view, offset] = found
    const gpa = view.getBigUint64(offset, true)
    const length = BigInt(view.getUint32(offset + 8, true))
    const flags = view.getUint16(offset + 12, true)
    const next = view.getUint16(offset + 14, true)
    if ((flags & 4) !== 0) {
      if (indirect || !config.indirect || (flags & 1) !== 0) return { error: 'ERR_RING_INDIRECT' }
      if (length === 0n || length % 16n !== 0n || length > 32768n * 16n) return { error: 'ERR_RING_INDIRECT' }
      indirect = true
      table = gpa
      entries = Number(length / 16n)
      index = 0
      walked = -1
      continue
    }
    const writable = (flags & 2) !== 0
    if (!writable && runs.some(([, bytes, w]) => w && bytes > 0)) return { error: 'ERR_RING_ORDER' }
    total += length
    if (total >= 2n ** 32n) return { error: 'ERR_RING_LENGTH' }
    if (!inside(gpa, length)) return { error: 'ERR_RING_ADDRESS' }
    if (length > 0n) runs.push([Number(gpa), Number(length), writable])
    if ((flags & 1) === 0) return { runs }
    if (next >= entries) return { error: 'ERR_RING_NEXT' }
    index = next
  }
}

/** Throws when the chain breaks one of the promises of chain.ts, or differs from `runs`. Plain code: expect() costs 1 µs each. */
function checkChain(
  chain: Chain,
  memory: GuestMemory,
  runs: readonly (readonly [number, number, boolean])[] | undefined
): void {
  let readable = 0
  let writable = 0
  const check = (holds: boolean, what: string): void => {
    if (!holds) throw new Error(`${what}: ${JSON.stringify({ chain, runs })}`)
  }
  check(chain.regions === memory.regions, 'other regions')
  check(chain.readableCount <= chain.count && chain.count <= chain.length.length, 'counts')
  let run = 0
  let inRun = 0
  for (let i = 0; i < chain.count; i++) {
    const region = memory.regions[chain.region[i]!]!
    const offset = chain.offset[i]!
    const length = chain.length[i]!
    check(
      length > 0 && Number.isInteger(offset) && offset >= 0 && offset + length <= region.size,
      'segment outside its region'
    )
    if (i < chain.readableCount) readable += length
    else writable += length
    if (runs === undefined) continue
    const [gpa, bytes, direction] = runs[run] ?? [-1, 0, false]
    check(
      region.gpa + offset === gpa + inRun && inRun + length <= bytes && direction === i >= chain.readableCount,
      `segment ${i}`
    )
    inRun += length
    if (inRun === bytes) {
      run++
      inRun = 0
    }
  }
  check(runs === undefined || run === runs.length, 'segments are missing')
  check(readable === chain.readable && writable === chain.writable, 'sums')
  check(readable + writable < 2 ** 32, 'length')
}

/** Addresses and lengths near every border that there is. */
const borders = REGIONS.flatMap(({ gpa, size }) => [gpa, gpa + size])

function fillDescriptor(view: DataView, at: number, size: number, rnd: (below: number) => number): void {
  const kind = rnd(16)
  const gpa =
    kind < 9
      ? BigInt(REGIONS[rnd(4)]!.gpa + rnd(PAGE))
      : kind < 14
        ? BigInt.asUintN(64, BigInt(borders[rnd(borders.length)]! + rnd(65) - 32))
        : (BigInt(rnd(2 ** 32)) << 32n) | BigInt(rnd(2 ** 32))
  const lengths = [rnd(64), rnd(64), 16 * rnd(8), 16 * rnd(8), rnd(3 * PAGE), 0, rnd(2 ** 32), 2 ** 32 - 1 - rnd(3)]
  view.setBigUint64(at, rnd(3) === 0 ? gpa & ~15n : gpa, true)
  view.setUint32(at + 8, lengths[rnd(rnd(4) === 0 ? 8 : 5)]!, true)
  const flags = rnd(64) === 0 ? rnd(65536) : (rnd(5) < 3 ? 1 : 0) | (rnd(5) < 2 ? 2 : 0) | (rnd(6) === 0 ? 4 : 0)
  view.setUint16(at + 12, (flags & 4) !== 0 && rnd(4) > 0 ? flags & ~1 : flags, true)
  view.setUint16(at + 14, rnd(32) === 0 ? rnd(65536) : rnd(size), true)
}

describe('fuzzing the split ring', () => {
  test.each([1, 2, 3, 4])('50 000 random rings, seed %d', (seed) => {
    const rnd = random(seed)
    const { views, bytes, memory } = makeMemory()
    const codes = new Map<string, number>()
    let chains = 0
    for (let round = 0; round < 50_000; round++) {
      const size = 1 << (1 + rnd(4))
      const eventIdx = rnd(2) === 0
      // The table anywhere in any region, the used ring in the next, so that tables in guest data can overlap both.
      const where = rnd(4)
      const used = (where + 1) % 4
      const parts = splitRingSizes(size, eventIdx)
      const base = rnd(3) === 0 ? 65536 - rnd(20) - 1 : rnd(65536)
      const usedOffset = 4 * rnd((PAGE - parts.device) / 4)
      const config: VringConfig = {
        size,
        descriptor: REGIONS[where]!.gpa + 16 * rnd(64),
        driver: REGIONS[where]!.gpa + 2048 + 2 * rnd(64),
        device: REGIONS[used]!.gpa + usedOffset,
        base,
        eventIdx,
        indirect: rnd(8) > 0,
        packed: false,
        inOrder: false,
      }
      const table = config.descriptor - REGIONS[where]!.gpa
      const avail = config.driver - REGIONS[where]!.gpa
      for (let i = 0; i < size; i++) fillDescriptor(views[where]!, table + i * 16, size, rnd)
      // Some descriptors in guest data, where indirect tables may point.
      for (let i = 0; i < 4; i++) fillDescriptor(views[rnd(4)]!, 4 * rnd((PAGE - 16) / 4), 8, rnd)
      for (let i = 0; i < size; i++)
        views[where]!.setUint16(avail + 4 + 2 * i, rnd(40) === 0 ? rnd(65536) : rnd(size), true)
      views[where]!.setUint16(avail, rnd(2), true)
      views[where]!.setUint16(avail + 2, base + (rnd(30) === 0 ? rnd(65536) : rnd(size + 1)), true)
      const usedBase = views[used]!.getUint16(usedOffset + 2, true)

      const ring = new SplitRing(memory, config)
      if (ring.error !== undefined) throw ring.error
      const inFlight = new Map<number, Chain>()
      const pushed: [head: number, written: number][] = []
      let published = 0
      for (let step = 0; step < 6; step++) {
        // What the specification says about the next chain, from the same bytes.
        const index = ring.base
        const seen = views[where]!.getUint16(avail + 2, true)
        const head = views[where]!.getUint16(avail + 4 + 2 * (index % size), true)
        const before = round % 16 === 0 ? bytes.map((b) => Buffer.from(b)) : undefined
        const expected: Expected =
          head >= size
            ? { error: 'ERR_RING_HEAD' }
            : inFlight.has(head)
              ? { error: 'ERR_RING_HEAD_BUSY' }
              : oracle(views, config, head)
        const chain = ring.pop()
        if (before?.some((b, i) => b.compare(bytes[i]!) !== 0)) throw new Error(`pop wrote to memory in round ${round}`)
        if (ring.error !== undefined) {
          const { code } = ring.error
          codes.set(code, (codes.get(code) ?? 0) + 1)
          if (code !== 'ERR_RING_INDEX' && (!('error' in expected) || expected.error !== code)) {
            throw new Error(`seed ${seed}, round ${round}: ${code}, not ${JSON.stringify(expected)}`)
          }
          if (code === 'ERR_RING_INDEX' && ((seen - index) & 0xffff) <= size) throw new Error(`round ${round}: index`)
          break
        }
        if (chain === undefined) {
          if (seen !== index) throw new Error(`round ${round}: a chain was not seen`)
          break
        }
        if ('error' in expected) throw new Error(`seed ${seed}, round ${round}: popped in spite of ${expected.error}`)
        if (chain.head !== head || !chain.inFlight) throw new Error(`round ${round}: wrong head`)
        checkChain(chain, memory, expected.runs)
        chains++
        inFlight.set(head, chain)
        if (rnd(2) === 0) {
          const [first, taken] = [...inFlight][rnd(inFlight.size)]!
          inFlight.delete(first)
          const written = rnd(2 ** 32)
          ring.push(taken, written, written)
          pushed.push([first, written])
        }
        if (rnd(3) === 0) ring.publish()
        // Descriptors change between pops; those of chains in flight, too.
        if (rnd(3) === 0) fillDescriptor(views[where]!, table + 16 * rnd(size), size, rnd)
        if (rnd(4) === 0) ring.suppress()
        if (rnd(4) === 0) ring.rearm()
      }
      ring.publish()
      published = (views[used]!.getUint16(usedOffset + 2, true) - usedBase) & 0xffff
      // The last `size` of them are in the ring, in order.
      if (published !== pushed.length)
        throw new Error(`round ${round}: ${published} published, ${pushed.length} pushed`)
      for (const [i, [head, written]] of pushed.entries()) {
        if (i < pushed.length - size) continue
        const at = usedOffset + 4 + 8 * ((usedBase + i) % size)
        if (views[used]!.getUint32(at, true) !== head || views[used]!.getUint32(at + 4, true) !== written) {
          throw new Error(`seed ${seed}, round ${round}: used element ${i}`)
        }
      }
    }
    for (const [i, b] of bytes.entries()) {
      expect(
        b.subarray(PAGE).every((byte) => byte === CANARY),
        `guard behind region ${i}`
      ).toBe(true)
    }
    // The input is worth something only if it reaches everything.
    expect(chains).toBeGreaterThan(10_000)
    expect([...codes.keys()].sort()).toEqual([
      'ERR_RING_ADDRESS',
      'ERR_RING_HEAD',
      'ERR_RING_HEAD_BUSY',
      'ERR_RING_INDEX',
      'ERR_RING_INDIRECT',
      'ERR_RING_LENGTH',
      'ERR_RING_LOOP',
      'ERR_RING_NEXT',
      'ERR_RING_ORDER',
    ])
  })

  test('a driver that rewrites descriptors while they are read', async () => {
    const { buffers, bytes, memory, views } = makeMemory()
    const size = 16
    const config: VringConfig = {
      size,
      descriptor: 0,
      driver: 2048,
      device: PAGE,
      base: 0,
      eventIdx: false,
      indirect: true,
      packed: false,
      inOrder: false,
    }
    // Flips single words of all descriptors, and of the table at 512 that some of them name, between good and hostile values.
    const hostile = `
      const { workerData: { buffer, stop } } = require('node:worker_threads')
      const words = new Uint32Array(buffer), flag = new Int32Array(stop)
      const values = [
        [0x100, 0xfffffff0, 512, 4096, 0x1ff0], [0, 0, 0, 1, 0xffffffff], [16, 64, 0, 0xffffffff, 8192],
        [0, 1, 2, 4, 0x50001, 0x10003, 0xffff0001, 0x60002]
      ]
      let state = 1
      Atomics.store(flag, 0, 1)
      while (Atomics.load(flag, 0) === 1) {
        for (let i = 0; i < 1000; i++) {
          state = (Math.imul(state, 1103515245) + 12345) >>> 0
          const word = (state >>> 8) % 192
          const list = values[word & 3]
          words[word] = list[(state >>> 20) % list.length]
        }
      }`
    const stop = new SharedArrayBuffer(4)
    const flag = new Int32Array(stop)
    await using worker = new Worker(hostile, { eval: true, workerData: { buffer: buffers[0], stop } })
    worker.once('error', (error) => {
      throw error
    })
    // Not awaited by an event: the worker sets it when it is about to start.
    while (Atomics.load(flag, 0) === 0) await new Promise((resolve) => setImmediate(resolve))
    let chains = 0
    let errors = 0
    let ring = new SplitRing(memory, config)
    for (let i = 0; i < 100_000; i++) {
      views[0]!.setUint16(2048 + 4 + 2 * (ring.base % size), i % size, true)
      views[0]!.setUint16(2048 + 2, ring.base + 1, true)
      const chain = ring.pop()
      if (chain === undefined) {
        errors++
        ring = new SplitRing(memory, { ...config, base: ring.base })
        continue
      }
      chains++
      checkChain(chain, memory, undefined)
      ring.push(chain, 0, 0)
      ring.publish()
    }
    Atomics.store(flag, 0, 2)
    expect(chains).toBeGreaterThan(1000)
    expect(errors).toBeGreaterThan(1000)
    for (const b of bytes) expect(b.subarray(PAGE).every((byte) => byte === CANARY)).toBe(true)
  })
})

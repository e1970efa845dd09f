/** The parts of the engine that are arithmetic. */
import { readFileSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { allowedCpus } from '../../src/engine/affinity.ts'
import { COMPLETED, IothreadCounters, KICKS, latencyBucket, QueueCounters } from '../../src/engine/counters.ts'
import { AdaptivePoll } from '../../src/engine/poll.ts'
import { LATENCY_BUCKETS } from '../../src/ops/snapshot.ts'

describe('AdaptivePoll', () => {
  test('starts at nothing and grows 4, 8, 16 … to its maximum', () => {
    const poll = new AdaptivePoll(50)
    const seen: number[] = [poll.current]
    for (let i = 0; i < 6; i++) {
      poll.adjust(Math.min(poll.current + 0.5, 50))
      seen.push(poll.current)
    }
    expect(seen).toEqual([0, 4, 8, 16, 32, 50, 50])
  })

  test('stays while the time is enough', () => {
    const poll = new AdaptivePoll(50)
    poll.adjust(3)
    poll.adjust(4)
    poll.adjust(0)
    expect(poll.current).toBe(4)
  })

  test('drops to nothing at a wait that polling could not have caught, and grows again', () => {
    const poll = new AdaptivePoll(50)
    poll.adjust(3)
    poll.adjust(50)
    expect(poll.current).toBe(8)
    poll.adjust(50.1)
    expect(poll.current).toBe(0)
    poll.adjust(50)
    expect(poll.current).toBe(4)
  })

  test('a maximum below the first step is kept, and 0 turns it off', () => {
    const poll = new AdaptivePoll(2)
    poll.adjust(1)
    expect(poll.current).toBe(2)
    const off = new AdaptivePoll(0)
    for (const waited of [0, 0.1, 1, 1e6]) off.adjust(waited)
    expect(off.current).toBe(0)
  })
})

describe('latencyBucket', () => {
  test('bucket i ends at 2^i µs, inclusive', () => {
    for (let i = 0; i < LATENCY_BUCKETS; i++) {
      expect(latencyBucket(2 ** i), `2^${i}`).toBe(i)
      expect(latencyBucket(2 ** i + 0.001), `2^${i} + a bit`).toBe(i + 1)
    }
  })

  test.each([
    [0, 0],
    [0.2, 0],
    [1, 0],
    [3, 2],
    [1e9, LATENCY_BUCKETS],
    [2 ** 32, LATENCY_BUCKETS],
    [Number.MAX_SAFE_INTEGER, LATENCY_BUCKETS],
    [-1, 0],
  ])('%d µs', (microseconds, bucket) => {
    expect(latencyBucket(microseconds)).toBe(bucket)
  })
})

describe('QueueCounters', () => {
  test('counts requests by operation, with bytes, time and buckets', () => {
    const counters = new QueueCounters()
    counters.request(0, 4096, 3)
    counters.request(0, 512, 1e9)
    counters.request(7, 0, 0)
    const names = ['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h']
    const snapshot = counters.operations(names)
    expect(snapshot.map(({ name }) => name)).toEqual(names)
    expect(snapshot[0]).toMatchObject({ requests: 2, bytes: 4608, latencySeconds: (1e9 + 3) / 1e6 })
    const buckets = (index: number) => Array.from(snapshot[index]!.latencyBuckets)
    expect(buckets(0).length).toBe(LATENCY_BUCKETS + 1)
    expect(buckets(0).flatMap((count, bucket) => (count > 0 ? [[bucket, count]] : []))).toEqual([
      [2, 1],
      [24, 1],
    ])
    expect(snapshot[7]).toMatchObject({ requests: 1, bytes: 0 })
    expect(buckets(7)[0]).toBe(1)
    expect(snapshot.slice(1, 7).every(({ requests }) => requests === 0)).toBe(true)
  })

  test('all counters are apart: 8 operations, 16 errors, the queue’s own', () => {
    const counters = new QueueCounters()
    for (let counter = 0; counter < 6; counter++) counters.add(counter, 1000 + counter)
    for (let kind = 0; kind < 16; kind++) for (let i = 0; i <= kind; i++) counters.error(kind)
    for (let operation = 0; operation < 8; operation++) counters.request(operation, 10 ** operation, 2 ** 23 + 1)
    expect(counters.errors(Array.from({ length: 16 }, (_, i) => `${i}`)).map(({ count }) => count)).toEqual(
      Array.from({ length: 16 }, (_, i) => i + 1)
    )
    expect(counters.operations(['', '', '', '', '', '', '', '']).map(({ bytes }) => bytes)).toEqual(
      Array.from({ length: 8 }, (_, i) => 10 ** i)
    )
    expect([KICKS, COMPLETED].map((counter) => counters.values[counter])).toEqual([1000, 1004])
  })

  test('two over one buffer see the same', () => {
    const writer = new QueueCounters()
    const reader = new QueueCounters(writer.buffer)
    writer.add(KICKS, 3)
    expect(reader.values[KICKS]).toBe(3)
  })
})

describe('IothreadCounters', () => {
  test('count what polling found', () => {
    const counters = new IothreadCounters()
    counters.pollHit()
    counters.pollHit()
    counters.pollMiss()
    const reader = new IothreadCounters(counters.buffer)
    expect(reader.snapshot(3, true)).toMatchObject({ index: 3, backend: 'emulated', pollHits: 2, pollMisses: 1 })
    expect(reader.snapshot(0, false)).toMatchObject({ backend: 'io_uring' })
  })
})

test('allowedCpus() are those of /proc/self/status', () => {
  const mask = /^Cpus_allowed:\s*(\S+)/m.exec(readFileSync('/proc/self/status', 'utf8'))![1]!
  const bits = BigInt(`0x${mask.replaceAll(',', '')}`)
  const expected = Array.from({ length: 4 * mask.length }, (_, i) => i).filter((i) => ((bits >> BigInt(i)) & 1n) === 1n)
  expect([...allowedCpus()].sort((a, b) => a - b)).toEqual(expected)
  expect(expected.length).toBeGreaterThan(0)
})

import { Worker } from 'node:worker_threads'
import { describe, expect, test, vi } from 'vitest'
import { Chain } from '../../src/virtio/chain.ts'
import { DirtyLog, VHOST_LOG_PAGE } from '../../src/virtio/dirty-log.ts'
import { GuestMemory } from '../../src/virtio/memory.ts'
import { random } from './store-trap.ts'

const PAGE = VHOST_LOG_PAGE

function pagesOf(bits: Uint8Array): number[] {
  const pages: number[] = []
  for (let page = 0; page < bits.length * 8; page++) if ((bits[page >> 3]! >> (page & 7)) & 1) pages.push(page)
  return pages
}

function marked(address: number, length: number, bytes = 4): number[] {
  const bits = new Uint8Array(bytes)
  const log = new DirtyLog(bits)
  log.mark(address, length)
  expect(log.marked).toBe(pagesOf(bits).length > 0)
  return pagesOf(bits)
}

/** The other thread has counted to `round`. It may need our processor for that. */
function waitFor(counter: Int32Array<SharedArrayBuffer>, round: number): void {
  for (let spins = 0; Atomics.load(counter, 0) !== round; spins++) {
    if (spins > 5000) Atomics.wait(counter, 0, round - 1)
  }
}

describe('DirtyLog', () => {
  test.each([
    ['the first byte of a page', PAGE, 1, [1]],
    ['its last byte', 2 * PAGE - 1, 1, [1]],
    ['two bytes across a border', 2 * PAGE - 1, 2, [1, 2]],
    ['a whole page', 3 * PAGE, PAGE, [3]],
    ['a page that is not aligned', 3 * PAGE + 1, PAGE, [3, 4]],
    ['page 0', 0, 1, [0]],
    ['the last page of a byte and the first of the next', 8 * PAGE - 1, 2, [7, 8]],
    ['a byte of the log', 8 * PAGE, 8 * PAGE, [8, 9, 10, 11, 12, 13, 14, 15]],
    ['more than two', 7 * PAGE, 10 * PAGE, [7, 8, 9, 10, 11, 12, 13, 14, 15, 16]],
    ['nothing', 5 * PAGE, 0, []],
    ['nothing at the end', 32 * PAGE, 0, []],
    ['the last page', 32 * PAGE - 1, 1, [31]],
    ['the last page and what is behind it', 31 * PAGE, 100 * PAGE, [31]],
    ['what is behind it', 32 * PAGE, 1, []],
    ['what is far behind it', 2 ** 52, 2 ** 32 - 1, []],
  ])('marks %s', (_, address, length, pages) => {
    expect(marked(address, length)).toEqual(pages)
  })

  test('marks pages up to 1 TiB in a log that has them', () => {
    const bits = Buffer.alloc(2 ** 25)
    new DirtyLog(bits).mark(2 ** 40 - PAGE, 2 * PAGE)
    expect(bits.at(-1)).toBe(0x80)
    expect(bits.subarray(0, -1).equals(Buffer.alloc(2 ** 25 - 1))).toBe(true)
  })

  test('a log without bytes marks nothing', () => {
    expect(marked(0, PAGE, 0)).toEqual([])
  })

  test('marks stay, and are set again after the front-end cleared them', () => {
    const bits = new Uint8Array(4)
    const log = new DirtyLog(bits)
    log.mark(PAGE, 1)
    log.mark(3 * PAGE, 1)
    log.mark(PAGE, 1)
    expect(pagesOf(bits)).toEqual([1, 3])
    Atomics.exchange(bits, 0, 0)
    log.marked = false
    log.mark(PAGE, 1)
    expect(pagesOf(bits)).toEqual([1])
    expect(log.marked).toBe(true)
  })

  test('bits are set by one exchange per byte of the log, and also when they are set already', () => {
    const or = vi.spyOn(Atomics, 'or')
    try {
      const log = new DirtyLog(new Uint8Array(4))
      log.mark(6 * PAGE, 4 * PAGE)
      log.mark(7 * PAGE, 1)
      expect(or.mock.calls.map(([, index, bits]) => [index, bits])).toEqual([
        [0, 0xc0],
        [1, 0x03],
        [0, 0x80],
      ])
    } finally {
      or.mockRestore()
    }
  })

  test('random ranges, page by page', () => {
    const pick = random(9)
    for (let round = 0; round < 2000; round++) {
      const bytes = pick(12)
      const address = pick(100 * PAGE)
      const length = pick(3) === 0 ? pick(3) : pick(60 * PAGE)
      const expected: number[] = []
      for (let page = 0; page < bytes * 8; page++) {
        if (page * PAGE < address + length && (page + 1) * PAGE > address && length > 0) expected.push(page)
      }
      expect(marked(address, length, bytes)).toEqual(expected)
    }
  })

  test('of a chain: its writable buffers, as far as they were touched, where they are in the guest', () => {
    const buffer = new SharedArrayBuffer(16 * PAGE)
    // IOVAs 0x100000 on are pages 20 on of the guest, those at 0x200000 pages 2 on.
    const memory = new GuestMemory(
      [
        { gpa: 0x10_0000, size: 4 * PAGE, hva: 0, buffer, physical: 20 * PAGE },
        { gpa: 0x20_0000, size: 4 * PAGE, hva: 0, buffer, offset: 8 * PAGE, physical: 2 * PAGE },
      ],
      true
    )
    const chain = new Chain(0)
    chain.begin(memory)
    chain.append(memory, 0x10_0000, 100, false)
    chain.append(memory, 0x10_1000 + 4000, 200, true)
    chain.append(memory, 0x20_0000 + 10, 2 * PAGE, true)
    const touched = (length: number) => {
      const bits = new Uint8Array(4)
      new DirtyLog(bits).markChain(chain, length)
      return pagesOf(bits)
    }
    expect(touched(0)).toEqual([])
    expect(touched(96)).toEqual([21])
    expect(touched(97)).toEqual([21, 22])
    expect(touched(200)).toEqual([21, 22])
    expect(touched(201)).toEqual([2, 21, 22])
    expect(touched(200 + PAGE - 10)).toEqual([2, 21, 22])
    expect(touched(200 + PAGE - 9)).toEqual([2, 3, 21, 22])
    expect(touched(2 ** 32)).toEqual([2, 3, 4, 21, 22])
  })

  test('a front-end that takes the bits at the same time has the newest write in the end', async () => {
    // The other thread is the front-end: it takes the bits and copies the pages, as a migration does, and at the end of a
    // round, when nothing is written any more, once again. Then its copies must be what was written last.
    const ROUNDS = 10_000
    const shared = new SharedArrayBuffer(64 + 8 * PAGE)
    const worker = new Worker(FRONT_END, { eval: true, workerData: { shared, page: PAGE, rounds: ROUNDS } })
    const result = new Promise<number>((resolve, reject) => {
      worker.once('message', resolve)
      worker.once('error', reject)
    })
    const log = new DirtyLog(new Uint8Array(shared, 0, 1))
    const [words, written, seen] = [new Uint32Array(shared), new Int32Array(shared, 4, 1), new Int32Array(shared, 8, 1)]
    const started = new Promise<void>((resolve) => worker.once('online', resolve))
    await started
    const pick = random(3)
    let value = 0
    for (let round = 1; round <= ROUNDS; round++) {
      for (let i = 0; i < 24; i++) {
        const page = pick(8)
        words[(64 + page * PAGE) / 4] = ++value
        log.mark(page * PAGE, 4)
      }
      Atomics.store(written, 0, round)
      waitFor(seen, round)
    }
    expect(await result).toBe(0)
  })

  test('iothreads that mark pages of one byte at the same time lose none', async () => {
    const ROUNDS = 2000
    const BYTES = 64
    const shared = new SharedArrayBuffer(8 + BYTES)
    const url = new URL('../../src/virtio/dirty-log.ts', import.meta.url).href
    const worker = new Worker(OTHER_IOTHREAD, { eval: true, workerData: { shared, url, page: PAGE, rounds: ROUNDS } })
    const failed = new Promise<never>((_, reject) => worker.once('error', reject))
    const [begun, done] = [new Int32Array(shared, 0, 1), new Int32Array(shared, 4, 1)]
    const bits = new Uint8Array(shared, 8)
    const ready = new Promise((resolve) => worker.once('message', resolve))
    await Promise.race([ready, failed])
    const log = new DirtyLog(bits)
    let lost = 0
    for (let round = 1; round <= ROUNDS; round++) {
      bits.fill(0)
      Atomics.store(begun, 0, round)
      for (let page = 1; page < BYTES * 8; page += 2) log.mark(page * PAGE, 1)
      waitFor(done, round)
      if (bits.some((byte) => byte !== 0xff)) lost++
    }
    expect(lost).toBe(0)
    await worker.terminate()
  })
})

const OTHER_IOTHREAD = `
const { workerData: { shared, url, page, rounds }, parentPort } = require('node:worker_threads')
const begun = new Int32Array(shared, 0, 1), done = new Int32Array(shared, 4, 1), bits = new Uint8Array(shared, 8)
import(url).then(({ DirtyLog }) => {
  const log = new DirtyLog(bits)
  parentPort.postMessage('ready')
  for (let round = 1; round <= rounds; round++) {
    while (Atomics.load(begun, 0) !== round);
    for (let i = 0; i < bits.length * 8; i += 2) log.mark(i * page, 1)
    Atomics.store(done, 0, round)
    Atomics.notify(done, 0)
  }
})
`

/** Posts in how many rounds a copy was older than the page. */
const FRONT_END = `
const { workerData: { shared, page, rounds }, parentPort } = require('node:worker_threads')
const bits = new Uint8Array(shared, 0, 1), words = new Uint32Array(shared)
const written = new Int32Array(shared, 4, 1), seen = new Int32Array(shared, 8, 1)
const copies = new Array(8).fill(0)
let lost = 0
for (let round = 1; round <= rounds; round++) {
  for (let last = false; !last; ) {
    last = Atomics.load(written, 0) === round
    const taken = Atomics.exchange(bits, 0, 0)
    for (let i = 0; i < 8; i++) if ((taken >> i) & 1) copies[i] = words[(64 + i * page) / 4]
  }
  if (copies.some((copy, i) => copy !== words[(64 + i * page) / 4])) lost++
  Atomics.store(seen, 0, round)
  Atomics.notify(seen, 0)
}
parentPort.postMessage(lost)
`

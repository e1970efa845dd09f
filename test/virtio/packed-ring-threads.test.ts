/**
 * A packed ring with its driver on another thread: what the device sees available is written whole, and nothing is
 * lost.
 */
import { Worker } from 'node:worker_threads'
import { expect, test } from 'vitest'
import { packed } from './packed-driver.ts'

const CHAINS = 20_000

/**
 * Makes chains of one to three descriptors available, whose lengths say which one they are, as fast as they are used.
 */
const DRIVER = `
const { workerData: { buffer, size, chains, gpa }, parentPort } = require('node:worker_threads')
const words = new Uint32Array(buffer, 0, size * 4)
const halves = new Uint16Array(buffer, 0, size * 8)
let next = 0, wrap = 1, used = 0, usedWrap = 1, free = size, sent = 0, seen = 0
const slots = new Map()
while (seen < chains) {
  const count = 1 + (sent % 3)
  if (sent < chains && free >= count) {
    const first = next
    let firstFlags = 0
    for (let i = 0; i < count; i++) {
      const flags = (wrap ? 0x80 : 0x8000) | (i < count - 1 ? 1 : 0)
      words[next * 4] = gpa
      words[next * 4 + 1] = 0
      words[next * 4 + 2] = 1 + ((sent * 7 + i) % 4000)
      halves[next * 8 + 6] = i === count - 1 ? sent % size : 0xffff
      if (i === 0) firstFlags = flags
      else halves[next * 8 + 7] = flags
      if (++next === size) { next = 0; wrap ^= 1 }
    }
    slots.set(sent % size, count)
    free -= count
    sent++
    Atomics.store(halves, first * 8 + 7, firstFlags)
  }
  const flags = Atomics.load(halves, used * 8 + 7)
  if ((flags & 0x8080) === (usedWrap ? 0x8080 : 0) && slots.size > 0) {
    const id = halves[used * 8 + 6]
    if (id !== seen % size || words[used * 4 + 2] !== seen) {
      parentPort.postMessage('used ' + id + ' with ' + words[used * 4 + 2] + ' in place of chain ' + seen)
      break
    }
    const count = slots.get(id)
    slots.delete(id)
    free += count
    seen++
    used += count
    if (used >= size) { used -= size; usedWrap ^= 1 }
  }
}
if (seen === chains) parentPort.postMessage('done')
`

test.each([7, 64, 256])(
  'ring of %d entries',
  async (size) => {
    const { ring, buffer, data } = packed({ size })
    const worker = new Worker(DRIVER, { eval: true, workerData: { buffer, size, chains: CHAINS, gpa: data } })
    let verdict: string | undefined
    worker.on('message', (message) => {
      verdict = message
    })
    worker.on('error', (error) => {
      verdict = String(error)
    })
    try {
      for (let chains = 0; verdict === undefined; ) {
        // As long as there is something, but the worker's word is heard as well.
        for (let idle = 0; idle < 1000; idle++) {
          const chain = ring.pop()
          if (chain === undefined) continue
          const count = 1 + (chains % 3)
          if (chain.head !== chains % size || chain.count !== count || chain.length[0] !== 1 + ((chains * 7) % 4000)) {
            expect.fail(`chain ${chains}: id ${chain.head}, ${chain.count} of ${chain.length[0]}`)
          }
          ring.push(chain, chains++, 0)
          if (chains % 5 === 0 || !ring.hasAvail()) ring.publish()
        }
        if (ring.error !== undefined) throw ring.error
        await new Promise((resolve) => setImmediate(resolve))
      }
      expect(verdict).toBe('done')
    } finally {
      await worker.terminate()
    }
  },
  120_000
)

/**
 * VIRTIO_F_IN_ORDER: chains are used in the order in which they were made available, whatever order they are done in.
 */
import { describe, expect, test } from 'vitest'
import { CompletionOrder } from '../../src/virtio/in-order.ts'
import { both, FORMATS } from './both-rings.ts'
import { random, WRITE } from './packed-driver.ts'

describe('CompletionOrder', () => {
  test('gives heads out in the order of enter, when they are complete', () => {
    const order = new CompletionOrder(4)
    for (const head of [2, 0, 3]) order.enter(head)
    order.complete(0, 10)
    expect([order.next(), order.has(0), order.has(1)]).toEqual([-1, true, false])
    order.complete(2, 20)
    expect([order.next(), order.written(2)]).toEqual([2, 20])
    order.shift()
    expect([order.has(2), order.next(), order.written(0)]).toEqual([false, 0, 10])
    order.shift()
    expect([order.next(), order.empty]).toEqual([-1, false])
    order.complete(3, 0)
    order.shift()
    expect([order.next(), order.empty]).toEqual([-1, true])
  })

  test('leave takes the last one back', () => {
    const order = new CompletionOrder(2)
    order.enter(1)
    order.enter(0)
    order.leave()
    expect([order.has(0), order.has(1)]).toEqual([false, true])
    order.complete(1, 5)
    order.shift()
    expect(order.empty).toBe(true)
  })

  test.each([1, 2, 3, 5, 32768])('holds as many as a ring of %d has, again and again', (size) => {
    const order = new CompletionOrder(size)
    for (let round = 0; round < 3; round++) {
      for (let i = 0; i < size; i++) order.enter((i + round) % size)
      for (let i = size - 1; i >= 0; i--) order.complete((i + round) % size, i)
      for (let i = 0; i < size; i++) {
        expect(order.next()).toBe((i + round) % size)
        expect(order.written(order.next())).toBe(i)
        order.shift()
      }
      // One more each round, so that the places move.
      order.enter(0)
      order.complete(0, 0)
      order.shift()
    }
  })
})

describe.each(FORMATS)('IN_ORDER on a %s ring', (format) => {
  test('a completion waits for those before it, each element has its own length', () => {
    const { ring, driver, data } = both(format, { inOrder: true })
    for (const head of [2, 0, 1]) driver.offer(head, { gpa: data, length: 100, flags: WRITE })
    const [first, second, third] = [ring.pop()!, ring.pop()!, ring.pop()!]
    ring.push(second, 22, 22)
    expect([second.inFlight, ring.publish(), driver.takeUsed()]).toEqual([false, false, []])
    ring.push(first, 11, 11)
    expect(ring.publish()).toBe(true)
    expect(driver.takeUsed()).toEqual([
      { id: 2, length: 11 },
      { id: 0, length: 22 },
    ])
    ring.push(third, 33, 33)
    ring.publish()
    expect(driver.takeUsed()).toEqual([{ id: 1, length: 33 }])
  })

  test('unpop of what was popped behind a held completion', () => {
    const { ring, driver, data } = both(format, { inOrder: true })
    for (const head of [0, 1, 2, 3]) driver.offer(head, { gpa: data, length: 1, flags: WRITE })
    const chains = [ring.pop()!, ring.pop()!, ring.pop()!, ring.pop()!]
    ring.push(chains[1]!, 1, 1)
    ring.unpop(chains[3]!)
    ring.unpop(chains[2]!)
    ring.push(chains[0]!, 1, 1)
    ring.publish()
    expect(driver.takeUsed().map(({ id }) => id)).toEqual([0, 1])
    expect([ring.pop()!.head, ring.pop()!.head, ring.pop()]).toEqual([2, 3, undefined])
    ring.push(ring.chain(3), 1, 1)
    ring.push(ring.chain(2), 1, 1)
    ring.publish()
    expect(driver.takeUsed().map(({ id }) => id)).toEqual([2, 3])
  })

  test('the last of a full ring first: nothing is seen until the first is done, then all', () => {
    const { ring, driver, data } = both(format, { inOrder: true, size: 8 })
    const heads = [3, 1, 4, 0, 5, 2, 6, 7]
    for (let round = 0; round < 3; round++) {
      for (const head of heads) driver.offer(head, { gpa: data, length: 100, flags: WRITE })
      for (const _ of heads) ring.pop()
      for (const head of heads.slice(1).reverse()) {
        ring.push(ring.chain(head), head, head)
        expect(ring.publish()).toBe(false)
        expect(driver.takeUsed()).toEqual([])
      }
      ring.push(ring.chain(heads[0]!), heads[0]!, heads[0]!)
      expect(ring.publish()).toBe(true)
      expect(driver.takeUsed()).toEqual(heads.map((id) => ({ id, length: id })))
    }
  })

  test.each([1, 2, 3])('random orders, seed %d', (seed) => {
    const rnd = random(seed)
    for (let round = 0; round < 40; round++) {
      const size = 1 << rnd(6)
      const { ring, driver, data } = both(format, { inOrder: true, size, eventIdx: rnd(2) === 0 })
      const free = Array.from({ length: size }, (_, i) => i)
      const offered: number[] = []
      const inFlight: number[] = []
      const popped: number[] = []
      const lengths = new Map<number, number>()
      for (let step = 0; step < 500; step++) {
        const action = rnd(4)
        if (action === 0 && free.length > 0) {
          const head = free.splice(rnd(free.length), 1)[0]!
          driver.offer(head, { gpa: data, length: 50, flags: WRITE })
          offered.push(head)
        } else if (action === 1 && offered.length > 0) {
          const chain = ring.pop()!
          expect(chain.head).toBe(offered.shift())
          inFlight.push(chain.head)
          popped.push(chain.head)
        } else if (action === 2 && inFlight.length > 0) {
          const head = inFlight.splice(rnd(inFlight.length), 1)[0]!
          lengths.set(head, rnd(50))
          ring.push(ring.chain(head), lengths.get(head)!, 0)
        } else if (action === 3) {
          ring.publish()
          const end = popped.findIndex((head) => !lengths.has(head))
          const visible = popped.splice(0, end < 0 ? popped.length : end)
          expect(driver.takeUsed()).toEqual(visible.map((id) => ({ id, length: lengths.get(id)! })))
          for (const head of visible) lengths.delete(head)
          free.push(...visible)
        }
      }
      expect(ring.error).toBeUndefined()
    }
  })
})

describe('a head that waits for its turn', () => {
  test('may not be offered again on a split ring either', () => {
    const { ring, driver, data } = both('split', { inOrder: true })
    driver.offer(0, { gpa: data, length: 1 })
    driver.offer(1, { gpa: data, length: 1 })
    ring.pop()
    ring.push(ring.pop()!, 0, 0)
    driver.offer(1, { gpa: data, length: 1 })
    expect(ring.pop()).toBeUndefined()
    expect(ring.error?.code).toBe('ERR_RING_HEAD_BUSY')
  })
})

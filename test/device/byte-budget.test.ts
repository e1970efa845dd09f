/** The limit for what requests of a disk copy at a time. */
import { setImmediate as turn } from 'node:timers/promises'
import { expect, test } from 'vitest'
import { ByteBudget } from '../../src/device/byte-budget.ts'

test('who fits needs no promise, the others come in their order when there is room', async () => {
  const budget = new ByteBudget(100)
  const admitted: string[] = []
  const take = (name: string, bytes: number): void => {
    const waiting = budget.take(bytes)
    if (waiting === undefined) admitted.push(name)
    else void waiting.then(() => admitted.push(name))
  }
  take('first', 60)
  take('second', 40)
  take('third', 60)
  // It would fit when the second is through, but the third was there before it.
  take('fourth', 10)
  expect(admitted).toEqual(['first', 'second'])
  budget.give(40)
  await turn()
  expect(admitted).toEqual(['first', 'second'])
  budget.give(60)
  await turn()
  expect(admitted).toEqual(['first', 'second', 'third', 'fourth'])
  take('fifth', 31)
  budget.give(70)
  await turn()
  expect(admitted.at(-1)).toBe('fifth')
})

test('all of it can be had at once', () => {
  expect(new ByteBudget(100).take(100)).toBeUndefined()
})

import { expect, test } from 'vitest'
import { LineLimit } from '../../src/daemon/line-limit.ts'

test('a burst goes through, then one line per five seconds, which tells how many were left out', () => {
  let now = 1000
  const limit = new LineLimit(() => now)
  for (let i = 0; i < 20; i++) expect(limit.take()).toEqual({})
  for (let i = 0; i < 7; i++) expect(limit.take()).toBeUndefined()
  now += 4999
  expect(limit.take()).toBeUndefined()
  now += 1
  expect(limit.take()).toEqual({ leftOut: 8 })
  expect(limit.take()).toBeUndefined()
  now += 3600_000
  expect(limit.take()).toEqual({ leftOut: 1 })
  for (let i = 0; i < 19; i++) expect(limit.take()).toEqual({})
  expect(limit.take()).toBeUndefined()
})

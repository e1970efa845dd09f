/** The conformance suite sees faults: each one of conformance-mutants.ts is found by the cases that are for it. */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { CASES, conformance, formatResult } from '../../src/frontend/conformance/index.ts'
import { MUTANTS, SET_DEVICES } from './conformance-mutants.ts'
import { serveVirtiod } from './conformance-serve.ts'

const root = join(import.meta.dirname, '../..')

test.each(MUTANTS.map(({ file, text }) => [file, text] as const))('%s has once: %s', (file, text) => {
  expect(readFileSync(join(root, file), 'utf8').split(text)).toHaveLength(2)
})

test('the cases that are to fail are there', () => {
  const ids = new Set(CASES.map(({ id }) => id))
  expect(MUTANTS.flatMap(({ cases }) => Object.keys(cases)).filter((id) => !ids.has(id))).toEqual([])
})

describe('a fault is seen', () => {
  test.each([...new Set(MUTANTS.map(({ set }) => set))])('%s', { timeout: 120_000 }, async (set) => {
    const device = SET_DEVICES[set] ?? 'blk'
    const { socket, peer } = await serveVirtiod(device, set)
    const expected = Object.assign({}, ...MUTANTS.filter((one) => one.set === set).map(({ cases }) => cases))
    const result = await conformance(socket, {
      ids: Object.keys(expected),
      destructive: true,
      timeoutMs: 1500,
      ...(device === 'net' && { peer }),
    })
    const seen = Object.fromEntries(result.results.map(({ id, outcome }) => [id, outcome]))
    expect(seen, result.results.map(formatResult).join('\n')).toEqual(expected)
  })
})

/** The table of what is done and what is refused, against what the session does. */
import { describe, expect, test } from 'vitest'
import * as table from '../../src/vhost-user/protocol-table.ts'
import { REQUESTS } from '../../src/vhost-user/requests.ts'
import * as wire from '../../src/vhost-user/wire.ts'

const upTo = (last: number, first: number): number[] => Array.from({ length: last - first + 1 }, (_, i) => first + i)
const numbers = (rows: readonly table.ProtocolRow[]): number[] => rows.map(({ number }) => number)

/** The constants of wire.ts whose names begin so, as [name without the prefix, value]. */
function constants(prefix: RegExp): [string, number][] {
  return Object.entries(wire).flatMap(([key, value]) => {
    const name = key.replace(prefix, '')
    return name === key || typeof value !== 'number' ? [] : [[name, value] as [string, number]]
  })
}

describe('every number of the specification is there once', () => {
  test.each([
    ['protocol features', table.PROTOCOL_FEATURE_ROWS, 0, 23],
    ['requests', table.REQUEST_ROWS, 1, 45],
    ['back-end requests', table.BACKEND_REQUEST_ROWS, 1, 10],
  ] as const)('%s', (_, rows, first, last) => {
    expect(numbers(rows)).toEqual(upTo(last, first))
    for (const row of rows) expect(row.done !== undefined || row.note !== undefined, row.name).toBe(true)
  })
})

test('names are those of wire.ts', () => {
  const features = constants(/^VHOST_USER_PROTOCOL_F_/)
  for (const { name, number } of table.PROTOCOL_FEATURE_ROWS) expect(features).toContainEqual([name, number])
  const backend = constants(/^VHOST_USER_BACKEND_/)
  for (const { name, number } of table.BACKEND_REQUEST_ROWS) expect(backend).toContainEqual([name, number])
  const requests = constants(/^VHOST_USER_/)
  for (const { name, number } of table.REQUEST_ROWS) expect(requests).toContainEqual([name, number])
})

test('what is done has a row, and what is refused has none', () => {
  const done = table.REQUEST_ROWS.filter((row) => row.done !== undefined)
  expect(numbers(done)).toEqual(Object.keys(REQUESTS).map(Number))
})

test('a request of a feature is offered with it', () => {
  const offered = [...table.PROTOCOL_FEATURES, ...table.NETWORK_PROTOCOL_FEATURES]
  for (const row of Object.values(REQUESTS)) if (row.feature !== undefined) expect(offered).toContain(row.feature)
})

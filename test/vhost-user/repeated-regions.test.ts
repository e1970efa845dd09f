/**
 * A network card's regions, added and removed once per queue pair, as QEMU 7.2 does it; and what does not pass for that.
 */
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import type { Connection } from '../../src/frontend/connection.ts'
import { Session } from '../../src/frontend/session.ts'
import { NetBackend } from '../net/support.ts'
import { memfdMappings } from './backend.ts'
import { withMemfd } from './messages.ts'
import { REGION } from './request-rows.ts'

const FILE = 8 << 20
let backend: NetBackend
beforeAll(() => {
  backend = new NetBackend({ cards: 1 })
})
afterAll(() => backend[Symbol.asyncDispose]())

/** A connection that negotiated, without memory. */
function connected(run: (connection: Connection) => void): void {
  using session = Session.open(backend.sockets[0]!, { queues: 0, memory: [] })
  run(session.connection)
}

describe('a region of a network card', () => {
  test('is added twice and removed twice', () => {
    withMemfd(FILE, (fd) =>
      connected((connection) => {
        for (let round = 0; round < 3; round++) {
          connection.addMemRegion({ ...REGION, fd })
          connection.addMemRegion({ ...REGION, fd })
          expect(memfdMappings(backend.pid)).toBe(1)
          connection.removeMemRegion(REGION)
          expect(memfdMappings(backend.pid)).toBe(0)
          connection.removeMemRegion(REGION)
        }
        expect(() => connection.removeMemRegion(REGION)).toThrow()
      })
    )
  })

  test('is removed by one pair before the next one adds it', () => {
    withMemfd(FILE, (fd) =>
      connected((connection) => {
        connection.addMemRegion({ ...REGION, fd })
        connection.addMemRegion({ ...REGION, fd })
        connection.removeMemRegion(REGION)
        connection.addMemRegion({ ...REGION, fd })
        expect(memfdMappings(backend.pid)).toBe(1)
        connection.removeMemRegion(REGION)
        connection.removeMemRegion(REGION)
        expect(memfdMappings(backend.pid)).toBe(0)
      })
    )
  })

  const page = 4096n
  test.each([
    ['another length', { size: REGION.size - page }, false],
    ['another guest address', { guestAddress: REGION.guestAddress + page }, false],
    ['another user address', { userAddress: REGION.userAddress + page }, false],
    ['another offset in the file', { mmapOffset: page }, false],
    ['another file', {}, true],
  ])('is not the same with %s', (_, change, otherFile) => {
    withMemfd(FILE, (fd) =>
      withMemfd(FILE, (other) =>
        connected((connection) => {
          connection.addMemRegion({ ...REGION, fd })
          const second = { ...REGION, ...change, fd: otherFile ? other : fd }
          expect(() => connection.addMemRegion(second)).toThrow()
          expect(memfdMappings(backend.pid)).toBe(1)
        })
      )
    )
  })
})

/**
 * Memory regions: bad arithmetic, overlaps, files of the wrong kind, too many; and what may not happen to rings
 * meanwhile.
 */
import { ftruncateSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import type { Connection, RegionWithFd } from '../../src/frontend/connection.ts'
import { layouts } from '../../src/frontend/memory.ts'
import { wireRegion } from '../../src/frontend/session.ts'
import { native } from '../../src/native.ts'
import type { MemoryRegionDescription } from '../../src/vhost-user/wire.ts'
import * as wire from '../../src/vhost-user/wire.ts'
import { backendForFile, driverOf, eventually, MIB, mustServe, open } from './backend.ts'
import { bothWays, negotiated, outcome, outcomeOf, withMemfd } from './messages.ts'
import { ODD_BYTES, type OddFd, OddFds } from './odd-fds.ts'
import { REGION, single, table } from './request-rows.ts'

const { VHOST_USER_ADD_MEM_REG, VHOST_USER_REM_MEM_REG, VHOST_USER_SET_MEM_TABLE } = wire
const current = backendForFile()
const FILE = 4 * MIB
const REFUSED = ['nack', 'closed']

/** Sends one bad region by both requests. */
function refuse(change: Partial<MemoryRegionDescription>, fd: number): void {
  const region = { ...REGION, ...change }
  expect(bothWays(current().socket, VHOST_USER_ADD_MEM_REG, single(region), [fd]), 'ADD_MEM_REG').toEqual(REFUSED)
  expect(bothWays(current().socket, VHOST_USER_SET_MEM_TABLE, table([region]), [fd]), 'SET_MEM_TABLE').toEqual(REFUSED)
}

describe('one region', () => {
  const rows: Record<string, Partial<MemoryRegionDescription>> = {
    'guest address not on a page': { guestAddress: 0x10_0001n },
    'guest address on a sector': { guestAddress: 0x10_0200n },
    'user address not on a page': { userAddress: 0x7f00_0000_0008n },
    'file offset not on a page': { mmapOffset: 1n },
    'file offset on a sector': { mmapOffset: 512n },
    'size not of whole pages': { size: 4097n },
    'size of one byte': { size: 1n },
    'size 0': { size: 0n },
    'a page beyond the end of the file': { size: BigInt(FILE) + 4096n },
    'an offset beyond the end of the file': { mmapOffset: BigInt(FILE) },
    'offset + size beyond the end of the file': { mmapOffset: BigInt(FILE) - 4096n, size: 8192n },
    'guest address at 2^53': { guestAddress: 2n ** 53n },
    'guest address + size beyond 2^53': { guestAddress: 2n ** 53n - 4096n, size: 8192n },
    'guest address + size = 2^64': { guestAddress: 2n ** 64n - 0x10_0000n },
    'guest address + size beyond 2^64': { guestAddress: 2n ** 64n - 4096n, size: 8192n },
    'user address + size beyond 2^53': { userAddress: 2n ** 53n - 4096n, size: 8192n },
    'user address + size beyond 2^64': { userAddress: 2n ** 64n - 4096n, size: 8192n },
    'file offset + size beyond 2^64': { mmapOffset: 2n ** 64n - 4096n, size: 8192n },
    'file offset 2^63': { mmapOffset: 2n ** 63n },
    'size 2^53': { size: 2n ** 53n },
    'size 2^63': { size: 2n ** 63n },
    'size 2^64 - 4096': { size: 2n ** 64n - 4096n },
    'everything at its largest': {
      guestAddress: 2n ** 64n - 1n,
      size: 2n ** 64n - 1n,
      userAddress: 2n ** 64n - 1n,
      mmapOffset: 2n ** 64n - 1n,
    },
  }
  test.each(Object.entries(rows))('%s', (_, change) => {
    withMemfd(FILE, (fd) => refuse(change, fd))
  })

  test('an empty file', () => withMemfd(0, (fd) => refuse({}, fd)))

  test('a region far larger than the machine', () => {
    // The file is sparse: it may be mapped or refused, but neither may hurt.
    withMemfd(2 ** 45, (fd) => {
      using connection = negotiated(current().socket)
      const result = outcome(connection, VHOST_USER_ADD_MEM_REG, single({ ...REGION, size: 2n ** 45n }), [fd])
      expect(['ok', 'nack', 'closed']).toContain(result)
    })
  })

  test('the highest addresses that are possible', () => {
    withMemfd(FILE, (fd) => {
      using connection = negotiated(current().socket)
      const top = 2n ** 53n - 0x10_0000n
      connection.addMemRegion({ ...REGION, guestAddress: top, userAddress: top, fd })
      expect(current().mappings).toBe(1)
    })
  })
})

describe('a file of the wrong kind', () => {
  const kinds: OddFd[] = [
    'eventfd',
    'pipe',
    'socket',
    'listening socket',
    'directory',
    '/dev/null',
    '/dev/zero',
    'O_PATH',
    'read-only memfd',
    'sealed memfd',
    'read-only file',
  ]
  test.each(kinds)('%s', (kind) => {
    using fds = new OddFds()
    refuse({ size: BigInt(ODD_BYTES) }, fds.get(kind))
  })

  test('a regular file is shared memory like any other', () => {
    using fds = new OddFds()
    using connection = negotiated(current().socket)
    connection.addMemRegion({ ...REGION, fd: fds.get('regular file') })
  })
})

describe('two regions', () => {
  const MIB1 = 0x10_0000n
  const far = { ...REGION, guestAddress: 0x1000_0000n, userAddress: 0x7f10_0000_0000n }
  const rows: Record<string, MemoryRegionDescription> = {
    'the same twice': REGION,
    'guest addresses overlap by a page': { ...far, guestAddress: REGION.guestAddress + MIB1 - 4096n },
    'guest addresses overlap from below': { ...far, guestAddress: REGION.guestAddress - MIB1 + 4096n },
    'one lies in the other': { ...far, guestAddress: REGION.guestAddress + 4096n, size: 4096n },
    'one holds the other': { ...far, guestAddress: REGION.guestAddress - 4096n, size: MIB1 + 8192n },
    'user addresses overlap by a page': { ...far, userAddress: REGION.userAddress + MIB1 - 4096n },
    'user addresses are the same': { ...far, userAddress: REGION.userAddress },
  }
  test.each(Object.entries(rows))('%s', (_, second) => {
    withMemfd(FILE, (fd) => {
      const prepare = (connection: Connection): void => connection.addMemRegion({ ...REGION, fd })
      expect(bothWays(current().socket, VHOST_USER_ADD_MEM_REG, single(second), [fd], prepare)).toEqual(REFUSED)
      expect(bothWays(current().socket, VHOST_USER_SET_MEM_TABLE, table([REGION, second]), [fd, fd])).toEqual(REFUSED)
    })
  })

  test('neighbours that touch, from one file', () => {
    withMemfd(FILE, (fd) => {
      using connection = negotiated(current().socket)
      connection.addMemRegion({ ...REGION, fd })
      const next = { guestAddress: REGION.guestAddress + MIB1, userAddress: REGION.userAddress + MIB1 }
      connection.addMemRegion({ ...REGION, ...next, mmapOffset: MIB1, fd })
      expect(current().mappings).toBe(2)
    })
  })
})

describe('SET_MEM_TABLE', () => {
  const regions = Array.from({ length: 9 }, (_, i) => ({
    ...REGION,
    guestAddress: BigInt(i) * 0x100_0000n,
    userAddress: 0x7f00_0000_0000n + BigInt(i) * 0x100_0000n,
  }))
  test.each([
    ['two regions and one fd', table(regions.slice(0, 2)), 1],
    ['one region and two fds', table(regions.slice(0, 1)), 2],
    ['one region and no fd', table(regions.slice(0, 1)), 0],
    ['no region and an fd', table([]), 1],
    ['nine regions', table(regions), 9],
    ['nine regions and eight fds', table(regions), 8],
    ['a count beyond its regions', table(regions.slice(0, 2), 3), 3],
    ['a count below its regions', table(regions.slice(0, 2), 1), 1],
    ['a count of 2^32 - 1', table(regions.slice(0, 2), 0xffff_ffff), 2],
    ['a count that wraps the size', table(regions.slice(0, 2), 0x0800_0002), 2],
  ] as const)('%s', (_, payload, fdCount) => {
    withMemfd(FILE, (fd) => {
      const given = new Array<number>(fdCount).fill(fd)
      expect(bothWays(current().socket, VHOST_USER_SET_MEM_TABLE, payload, given)).toEqual(REFUSED)
    })
  })

  test('eight regions, replaced by none', () => {
    withMemfd(FILE, (fd) => {
      using connection = negotiated(current().socket)
      connection.setMemTable(regions.slice(0, 8).map((region) => ({ ...region, fd })))
      expect(current().mappings).toBe(8)
      connection.setMemTable([])
      expect(current().mappings).toBe(0)
    })
  })

  test('a bad last region leaves nothing of the others, and the old table in force', () => {
    using opened = open(current().socket, { withoutProtocolFeatures: [wire.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS] })
    withMemfd(FILE, (fd) => {
      const bad = [...regions.slice(0, 5), { ...regions[6]!, size: 0n }].map((region) => ({ ...region, fd }))
      expect(outcomeOf(() => opened.session.connection.setMemTable(bad))).toBe('nack')
    })
    expect(current().mappings).toBe(1)
    mustServe(opened.blk)
  })
})

describe('memory slots', () => {
  test('509 are taken, with one fd each, the 510th is refused, and no fd is left of what is gone', () => {
    withMemfd(FILE, (fd) => {
      using connection = negotiated(current().socket)
      const slots = connection.getMaxMemSlots()
      expect(slots).toBe(509)
      const before = current().fds.length
      const region = (i: number): RegionWithFd => ({
        guestAddress: BigInt(i) * 0x2000n,
        size: 4096n,
        userAddress: 0x7f00_0000_0000n + BigInt(i) * 0x3000n,
        // Never the page behind the one before: the kernel would make one mapping of two that touch.
        mmapOffset: BigInt(i % 16) * 8192n,
        fd,
      })
      for (let i = 0; i < slots; i++) connection.addMemRegion(region(i))
      expect(current().mappings).toBe(509)
      // For a handover. A message and its fds go right after its answer.
      expect(eventually(() => current().fds.length === before + slots)).toBe(true)
      expect(outcomeOf(() => connection.addMemRegion(region(slots)))).toBe('nack')
      connection.removeMemRegion(region(7))
      connection.addMemRegion(region(slots))
      expect(current().mappings).toBe(509)
      expect(eventually(() => current().fds.length === before + slots)).toBe(true)
      for (let i = 0; i < slots; i++) if (i !== 7) connection.removeMemRegion(region(i))
      expect(eventually(() => current().fds.length === before + 1)).toBe(true)
    })
  })

  test('REM_MEM_REG of what is not there', () => {
    withMemfd(FILE, (fd) => {
      const prepare = (connection: Connection): void => connection.addMemRegion({ ...REGION, fd })
      for (const change of [
        { guestAddress: 0n },
        { userAddress: 0x7f00_0000_1000n },
        { size: 4096n },
        { guestAddress: 2n ** 64n - 1n },
        { size: 2n ** 64n - 1n },
      ]) {
        const payload = single({ ...REGION, ...change })
        expect(bothWays(current().socket, VHOST_USER_REM_MEM_REG, payload, [], prepare)).toEqual(REFUSED)
      }
      expect(bothWays(current().socket, VHOST_USER_REM_MEM_REG, single(REGION))).toEqual(REFUSED)
    })
  })

  test('REM_MEM_REG with an fd, as old front-ends send it; the memory goes at once', () => {
    withMemfd(FILE, (fd) => {
      using connection = negotiated(current().socket)
      const before = current().fds.length
      for (let i = 0; i < 20; i++) {
        connection.addMemRegion({ ...REGION, fd })
        expect(current().mappings).toBe(1)
        connection.removeMemRegion(REGION, [fd])
        expect(current().mappings).toBe(0)
      }
      // A message and its fds go right after its answer.
      expect(eventually(() => current().fds.length === before)).toBe(true)
    })
  })
})

describe('memory under rings', () => {
  test('the region of a ring is removed: that ring breaks, the session and its other ring go on', () => {
    const memory = layouts.many(4 * MIB, 2)
    using opened = open(current().socket, { memory, ringRegions: [1, 1, 1] })
    const { session, blk } = opened
    session.startQueue(1, { ringRegions: [0, 0, 0] })
    const other = driverOf(session, 1)
    mustServe(blk)
    mustServe(other, 64)
    session.connection.removeMemRegion(wireRegion(session.memory.region(1)))
    session.queue(0).driver.kickRaw()
    expect(eventually(() => session.queue(0).broken())).toBe(true)
    expect(session.queue(1).broken()).toBe(false)
    mustServe(other, 64)
    session.connection.barrier()
    expect(current().mappings).toBe(1)
    // Put back and started again, it serves.
    session.queue(0).stop()
    session.connection.addMemRegion(wireRegion(session.memory.region(1)))
    session.queues.shift()!.close()
    session.startQueue(0, { ringRegions: [1, 1, 1] })
    mustServe(driverOf(session, 0, MIB / 2))
  })

  test('the region of the data is removed: requests into it break the ring, nothing touches what was there', () => {
    const memory = layouts.many(4 * MIB, 2)
    using opened = open(current().socket, { memory })
    const { session, blk } = opened
    mustServe(blk)
    const gone = session.memory.region(1)
    session.connection.removeMemRegion(wireRegion(gone))
    gone.bytes.fill(0x5a)
    blk.submit(0, 8, new Uint8Array(0), 4096, { region: 1 })
    expect(eventually(() => session.queue(0).broken())).toBe(true)
    expect(gone.bytes.every((byte, i) => byte === 0x5a || i < 8192 || i > 2 * MIB)).toBe(true)
    session.connection.barrier()
  })

  test('SET_MEM_TABLE again while requests are in flight loses none', () => {
    using opened = open(current().socket, {
      withoutProtocolFeatures: [wire.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS],
      memory: layouts.single(24 * MIB),
      queues: 2,
    })
    const { session } = opened
    const drivers = [0, 1].map((queue) => driverOf(session, queue, 10 * MIB))
    for (let round = 0; round < 25; round++) {
      const requests = drivers.flatMap((blk) =>
        Array.from({ length: 32 }, () => blk.submit(0, 0, new Uint8Array(0), 128 * 1024, {}, false))
      )
      for (const blk of drivers) blk.publish()
      session.shareMemory()
      for (const blk of drivers) blk.wait()
      expect(requests.every(({ status }) => status === 0)).toBe(true)
    }
    mustServe(drivers[0]!)
    expect(current().mappings).toBe(1)
  })

  test('SET_MEM_TABLE that moves the guest addresses: the ring is found again by its user addresses', () => {
    using opened = open(current().socket, {
      withoutProtocolFeatures: [wire.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS],
    })
    const { session, blk } = opened
    mustServe(blk)
    const region = session.memory.region(0)
    const moved = { ...wireRegion(region), guestAddress: BigInt(region.gpa + 64 * MIB) }
    session.connection.setMemTable([moved])
    const [header, data, status] = [16, 4096, 1].map((length) => session.memory.allocate(length, 16))
    header!.bytes.set([0, 0, 0, 0])
    const shift = 64 * MIB
    const { driver } = session.queue(0)
    const head = driver.build([
      { address: header!.gpa + shift, length: 16, writable: false },
      { address: data!.gpa + shift, length: 4096, writable: true },
      { address: status!.gpa + shift, length: 1, writable: true },
    ])
    status!.bytes[0] = 0xa5
    driver.issue(head)
    driver.publish()
    driver.kickRaw()
    expect(eventually(() => driver.pop() === head)).toBe(true)
    expect(status!.bytes[0]).toBe(0)
  })

  test('a file truncated below a region that was mapped, then mapped again: refused', () => {
    withMemfd(FILE, (fd) => {
      using connection = negotiated(current().socket)
      connection.addMemRegion({ ...REGION, fd })
      connection.removeMemRegion(REGION)
      ftruncateSync(fd, 4096)
      expect(outcomeOf(() => connection.addMemRegion({ ...REGION, fd }))).toBe('nack')
      expect(native.fdInfo(fd, new Float64Array(8))).toBe(0)
    })
  })
})

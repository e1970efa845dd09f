/** Cases about memory regions: how they are described, translated, added, removed and exchanged. */

import { native } from '../../native.ts'
import {
  VHOST_USER_ADD_MEM_REG,
  VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
  VHOST_USER_PROTOCOL_F_REPLY_ACK,
  VHOST_USER_REM_MEM_REG,
  VHOST_USER_SET_MEM_TABLE,
} from '../../vhost-user/wire.ts'
import { VIRTIO_BLK_T_IN } from '../../virtio/blk.ts'
import type { RegionWithFd } from '../connection.ts'
import { FrontendError } from '../errors.ts'
import { type GuestMemory, layouts, type RegionLayout } from '../memory.ts'
import { wireRegion } from '../session.ts'
import { sleepMs } from '../virtqueue.ts'
import { type ConformanceCase, expect } from './case.ts'
import type { Context } from './context.ts'
import type { Guest } from './guest.ts'

const MIB = 2 ** 20
const SLOTS = VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS

/** Requests whose buffers lie in each of the regions. */
function useRegions(
  context: Context,
  layout: readonly RegionLayout[],
  rings?: readonly [number, number, number]
): void {
  const guest = context.guest({ memory: layout })
  context.startCompanions(guest)
  const ring = guest.start(context.ringIndex, rings === undefined ? {} : { ringRegions: rings }, MIB / 4)
  for (const region of layout.keys()) ring.run(2, { region }, `a request with buffers in region ${region}`)
}

/** A guest that shares its memory by SET_MEM_TABLE. */
function tableGuest(context: Context, layout: readonly RegionLayout[] = layouts.single(32 * MIB)): Guest {
  return context.guest({ memory: layout, withoutProtocolFeatures: [SLOTS] })
}

/** Regions that no front-end may send; none of them may be acknowledged. Each is tried on its own connection. */
function badTable(
  one: Pick<ConformanceCase, 'id' | 'rule' | 'cites'> & Partial<ConformanceCase>,
  make: (region: RegionWithFd, memory: GuestMemory) => readonly RegionWithFd[]
): ConformanceCase {
  return {
    group: 'memory',
    level: 'SHOULD',
    needs: { protocol: [VHOST_USER_PROTOCOL_F_REPLY_ACK] },
    ...one,
    run: (context) => {
      const memory = context.memory(layouts.single(4 * MIB))
      const { connection } = context.guest({ memory: [], withoutProtocolFeatures: [SLOTS] })
      const regions = make(wireRegion(memory.region(0)), memory)
      return context.expectRefusal(connection, 'SET_MEM_TABLE', () => connection.setMemTable(regions))
    },
  }
}

/** A request into memory that is (no longer) shared: it may be refused, break the ring, or end the session. */
function expectNotServed(guest: Guest, ringIndex: number, gpa: number): string {
  const { requests } = guest.ring(ringIndex)
  try {
    const request = requests.submitForeign(VIRTIO_BLK_T_IN, 0, [{ address: gpa, length: 512, writable: true }])
    requests.wait(request, 300)
    expect(request.status !== 0, 'no success', 'a read into memory that was removed is OK')
    return `status ${request.status}`
  } catch (error) {
    if (error instanceof FrontendError) return error.failure === 'timeout' ? 'not answered' : error.failure
    throw error
  }
}

export const memoryCases: readonly ConformanceCase[] = [
  {
    id: 'mem-table',
    group: 'memory',
    level: 'MUST',
    rule: 'takes its memory by SET_MEM_TABLE: guest and user address, file offset and size mean what they say',
    cites: 'vhost-user.rst "Memory region description", "VHOST_USER_SET_MEM_TABLE"',
    run: (context) => {
      const guest = tableGuest(context)
      context.startCompanions(guest)
      guest.start(context.ringIndex).run(3)
      return 'one region whose three addresses differ'
    },
  },
  {
    id: 'mem-table-8',
    group: 'memory',
    level: 'MUST',
    rule: 'takes eight regions in one SET_MEM_TABLE',
    cites: 'vhost-user.rst "Multiple Memory regions description"',
    run: (context) => {
      const layout = layouts.many(2 * MIB, 8)
      const guest = tableGuest(context, layout)
      context.startCompanions(guest)
      const ring = guest.start(context.ringIndex, {}, MIB / 4)
      for (const region of layout.keys()) ring.run(1, { region }, `a request with buffers in region ${region}`)
      return 'requests in each of 8'
    },
  },
  {
    id: 'mem-high',
    group: 'memory',
    level: 'MUST',
    rule: 'serves rings and buffers above 4 GiB, and rings whose parts lie in different regions',
    cites: 'vhost-user.rst "Memory access"',
    run: (context) => {
      useRegions(context, layouts.hole(16 * MIB), [1, 0, 1])
      return 'below and above the hole'
    },
  },
  {
    id: 'mem-user-addresses',
    group: 'memory',
    level: 'MUST',
    rule: 'takes the addresses of rings for user addresses and those in descriptors for guest addresses',
    cites: 'vhost-user.rst "Memory access", "A vring address description"',
    run: (context) => {
      // Whoever mixes them up finds memory all the same, and it is the wrong one.
      const [low, high, size] = [64 * MIB, 128 * MIB, 8 * MIB]
      useRegions(
        context,
        [
          { gpa: low, uva: high, size },
          { gpa: high, uva: low, size, offset: 65536 },
        ],
        [0, 1, 0]
      )
      return 'two regions with exchanged addresses'
    },
  },
  {
    id: 'mem-straddle',
    group: 'memory',
    level: 'MUST',
    rule: 'serves a buffer that runs from one region into the next one',
    cites: 'vhost-user.rst "Memory access" ("Guest addresses map to the … region containing that guest address")',
    run: (context) => {
      const size = 8 * MIB
      const guest = context.guest({ memory: layouts.adjacent(size) })
      context.startCompanions(guest)
      const ring = guest.start(context.ringIndex, {}, 2 * MIB)
      const border = guest.memory.region(1).gpa
      const { readable, writable } = context.operation()
      const long = writable > 0 ? writable - 1 : readable.length
      for (const before of [1, Math.floor(long / 2), long - 1]) {
        const place = (length: number): number | undefined => (length === long ? border - before : undefined)
        ring.run(1, { place }, `a buffer with ${before} of ${long} bytes before the border`)
      }
      return 'cut at three places'
    },
  },
  {
    id: 'mem-slots',
    group: 'memory',
    level: 'MUST',
    rule: 'takes as many regions by ADD_MEM_REG as GET_MAX_MEM_SLOTS says (up to 64 are tried)',
    cites: 'vhost-user.rst "VHOST_USER_GET_MAX_MEM_SLOTS", "VHOST_USER_ADD_MEM_REG"',
    needs: { protocol: [SLOTS] },
    run: (context) => {
      const { memorySlots } = context.facts
      expect(memorySlots >= 1, 'at least one slot', `${memorySlots}`)
      const count = Math.min(memorySlots, 64)
      useRegions(context, layouts.many(MIB, count))
      return `${count} of ${memorySlots} slots`
    },
  },
  {
    id: 'mem-add-running',
    group: 'memory',
    level: 'MUST',
    rule: 'takes a region while rings run, and serves buffers there at once',
    cites: 'vhost-user.rst "VHOST_USER_ADD_MEM_REG", "Ring states" (changing some configuration aspects on the fly)',
    needs: { protocol: [SLOTS] },
    run: (context) => {
      const { guest, ring } = context.running({ memory: layouts.single(32 * MIB) })
      ring.run()
      for (let i = 0; i < 3; i++) {
        const pending = ring.batch(16)
        const region = guest.memory.addRegion({ gpa: 2 ** 33 + i * 2 ** 30, uva: 2 ** 45 + i * 2 ** 30, size: MIB })
        guest.connection.addMemRegion(wireRegion(region))
        guest.connection.barrier()
        ring.finishAll(pending)
        const place = (length: number): number => region.gpa + (length > 4096 ? 65536 : length * 64)
        ring.run(1, { place }, `a request in added region ${i + 1}`)
      }
      return '3 regions while requests were under way'
    },
  },
  {
    id: 'mem-remove',
    group: 'memory',
    level: 'MUST',
    rule: 'no longer serves buffers in a region that REM_MEM_REG took away, and serves all others',
    cites: 'vhost-user.rst "VHOST_USER_REM_MEM_REG" ("must unmap")',
    needs: { protocol: [SLOTS], device: 'blk' },
    run: (context) => {
      const { guest, ring } = context.running({ memory: layouts.many(8 * MIB, 2) })
      ring.run(2, { region: 1 })
      const { gpa } = guest.memory.region(1)
      guest.connection.removeMemRegion(wireRegion(guest.memory.region(1)))
      guest.connection.barrier()
      ring.run(2, { region: 0 }, 'a request in the region that stayed')
      return `a request in the removed region: ${expectNotServed(guest, context.ringIndex, gpa + 4096)}`
    },
  },
  {
    id: 'mem-remove-busy',
    group: 'memory',
    level: 'MUST',
    rule: 'takes a region away while requests in another one are under way, and they complete',
    cites: 'vhost-user.rst "VHOST_USER_REM_MEM_REG", "Ring states"',
    needs: { protocol: [SLOTS] },
    run: (context) => {
      const { guest, ring } = context.running({ memory: layouts.many(8 * MIB, 2) })
      const region = wireRegion(guest.memory.region(1))
      for (let i = 0; i < 20; i++) {
        const pending = ring.batch(40)
        guest.connection.removeMemRegion(region)
        guest.connection.addMemRegion(region)
        ring.finishAll(pending)
      }
      ring.run(1, { region: 1 }, 'a request in the region that went and came')
      return '20 times'
    },
  },
  {
    id: 'mem-remove-ignores-offset',
    group: 'memory',
    level: 'MUST',
    rule: 'finds the region of REM_MEM_REG by guest address, user address and size: the mmap offset is ignored',
    cites: 'vhost-user.rst "VHOST_USER_REM_MEM_REG"',
    needs: { protocol: [SLOTS] },
    run: (context) => {
      const { guest } = context.running({ memory: layouts.many(8 * MIB, 2) })
      const region = wireRegion(guest.memory.region(1))
      context.expectTaken(guest.connection, 'REM_MEM_REG with another mmap offset', () =>
        guest.connection.removeMemRegion({ ...region, mmapOffset: 0x1234_5000n })
      )
      context.expectTaken(guest.connection, 'ADD_MEM_REG of the same region', () =>
        guest.connection.addMemRegion(region)
      )
      guest.ring(context.ringIndex).run(1, { region: 1 })
      return 'removed, and added again'
    },
  },
  {
    id: 'mem-remove-unknown',
    group: 'memory',
    level: 'MUST',
    rule: 'does not acknowledge REM_MEM_REG of a region that is not there',
    cites: 'vhost-user.rst "VHOST_USER_REM_MEM_REG"; "VHOST_USER_PROTOCOL_F_REPLY_ACK" (non-zero on failure)',
    needs: { protocol: [SLOTS, VHOST_USER_PROTOCOL_F_REPLY_ACK] },
    run: (context) => {
      const { guest } = context.running({ memory: layouts.single(32 * MIB) })
      const region = wireRegion(guest.memory.region(0))
      return context.expectRefusal(guest.connection, 'REM_MEM_REG of an unknown guest address', () =>
        guest.connection.removeMemRegion({ ...region, guestAddress: 2n ** 40n, userAddress: 2n ** 46n })
      )
    },
  },
  {
    id: 'mem-add-overlap',
    group: 'memory',
    level: 'SHOULD',
    rule: 'refuses ADD_MEM_REG of a region that overlaps another one in guest addresses or in user addresses',
    cites: 'vhost-user.rst "Memory region description" ("Violating any of these is a bug in the front-end")',
    needs: { protocol: [SLOTS, VHOST_USER_PROTOCOL_F_REPLY_ACK] },
    run: (context) => {
      const seen: string[] = []
      for (const [gpa, uva] of [
        [2n ** 40n, 0n],
        [0n, 2n ** 46n],
      ] as const) {
        const { guest } = context.running({ memory: layouts.single(32 * MIB) })
        const region = wireRegion(guest.memory.region(0))
        const other = { ...region, guestAddress: region.guestAddress + gpa, userAddress: region.userAddress + uva }
        const what = gpa === 0n ? 'the same guest addresses' : 'the same user addresses'
        seen.push(context.expectRefusal(guest.connection, what, () => guest.connection.addMemRegion(other)))
      }
      return seen.join(', ')
    },
  },
  {
    id: 'mem-table-exchange',
    group: 'memory',
    level: 'MUST',
    rule: 'takes another SET_MEM_TABLE while rings run and requests are under way',
    cites: 'vhost-user.rst "Ring states" (changing some configuration aspects on the fly), "VHOST_USER_SET_MEM_TABLE"',
    run: (context) => {
      const guest = tableGuest(context)
      context.startCompanions(guest)
      const ring = guest.start(context.ringIndex)
      const regions = guest.memory.regions.map(wireRegion)
      for (let i = 0; i < 20; i++) {
        const pending = ring.batch(40)
        guest.connection.setMemTable(regions)
        ring.finishAll(pending)
      }
      const more = guest.memory.addRegion({ gpa: 2 ** 33, uva: 2 ** 45, size: 8 * MIB })
      guest.connection.setMemTable([...regions, wireRegion(more)])
      guest.connection.barrier()
      ring.run(1, { place: (length) => more.gpa + length * 64 }, 'a request in the region that came with it')
      return '20 times the same one, then one with a region more'
    },
  },
  badTable(
    {
      id: 'mem-overlap-guest',
      rule: 'refuses regions that overlap in guest addresses',
      cites: 'vhost-user.rst "Memory region description" ("Violating any of these is a bug in the front-end")',
    },
    (region) => [region, { ...region, userAddress: region.userAddress + 2n ** 40n }]
  ),
  badTable(
    {
      id: 'mem-overlap-user',
      rule: 'refuses regions that overlap in user addresses',
      cites: 'vhost-user.rst "Memory region description"',
    },
    (region) => [region, { ...region, guestAddress: region.guestAddress + 2n ** 40n }]
  ),
  badTable(
    {
      id: 'mem-zero-size',
      rule: 'refuses a region of no bytes',
      cites: 'vhost-user.rst "Memory region description" (size)',
    },
    (region) => [{ ...region, size: 0n }]
  ),
  badTable(
    {
      id: 'mem-address-overflow',
      rule: 'refuses a region whose guest addresses run past 2^64',
      cites: 'vhost-user.rst "Memory region description" (64-bit guest address, 64-bit size)',
    },
    (region) => [{ ...region, guestAddress: 2n ** 64n - 4096n }]
  ),
  badTable(
    {
      id: 'mem-user-overflow',
      rule: 'refuses a region whose user addresses run past 2^64',
      cites: 'vhost-user.rst "Memory region description"',
    },
    (region) => [{ ...region, userAddress: 2n ** 64n - 4096n }]
  ),
  badTable(
    {
      id: 'mem-offset-overflow',
      rule: 'refuses a region whose file offset and size run past 2^64',
      cites: 'vhost-user.rst "Memory region description" (mmap offset)',
    },
    (region) => [{ ...region, mmapOffset: 2n ** 64n - 4096n }]
  ),
  badTable(
    {
      id: 'mem-beyond-file',
      rule: 'refuses a region that is larger than its file',
      cites: 'vhost-user.rst "Memory region description"; mmap(2) (an access beyond the end is a SIGBUS)',
    },
    (region) => [{ ...region, size: region.size * 4n }]
  ),
  {
    id: 'mem-count-9',
    group: 'memory',
    level: 'SHOULD',
    rule: 'refuses SET_MEM_TABLE of more than eight regions',
    cites: 'vhost-user.rst "Multiple Memory regions description" ("8 regions")',
    needs: { protocol: [VHOST_USER_PROTOCOL_F_REPLY_ACK] },
    run: (context) => {
      const memory = context.memory(layouts.many(MIB, 9))
      const { connection } = context.guest({ memory: [], withoutProtocolFeatures: [SLOTS] })
      return context.expectRefusal(connection, 'nine regions', () =>
        connection.setMemTable(memory.regions.map(wireRegion))
      )
    },
  },
  {
    id: 'mem-count-lies',
    group: 'memory',
    level: 'SHOULD',
    rule: 'refuses SET_MEM_TABLE that announces more regions than it has',
    cites: 'vhost-user.rst "VHOST_USER_SET_MEM_TABLE" ("The size and ordering of the fds matches the number …")',
    needs: { protocol: [VHOST_USER_PROTOCOL_F_REPLY_ACK] },
    run: (context) => {
      const memory = context.memory(layouts.single(4 * MIB))
      const seen = [2, 8, 0xffff_ffff].map((count) => {
        const { connection } = context.guest({ memory: [], withoutProtocolFeatures: [SLOTS] })
        const payload = tableOf([wireRegion(memory.region(0))], count)
        return context.expectRefusal(connection, `${count} regions announced`, () =>
          connection.command(VHOST_USER_SET_MEM_TABLE, payload, [memory.region(0).fd])
        )
      })
      return seen.join(', ')
    },
  },
  {
    id: 'mem-fd-wrong-kind',
    group: 'memory',
    level: 'MUST',
    rule: 'does not acknowledge a region whose fd cannot be mapped (an eventfd, a socket)',
    cites: 'vhost-user.rst "VHOST_USER_ADD_MEM_REG" ("file descriptor from which the memory is mapped")',
    needs: { protocol: [VHOST_USER_PROTOCOL_F_REPLY_ACK] },
    run: (context) => {
      const pair = new Int32Array(2)
      native.socketpair(pair)
      const fds = [native.eventfd(0), pair[0] ?? -1, pair[1] ?? -1]
      try {
        const memory = context.memory(layouts.single(4 * MIB))
        const seen = fds.slice(0, 2).map((fd) => {
          const { connection } = context.guest({ memory: [], withoutProtocolFeatures: [SLOTS] })
          const region = { ...wireRegion(memory.region(0)), fd }
          return context.expectRefusal(connection, 'SET_MEM_TABLE', () => connection.setMemTable([region]))
        })
        return seen.join(', ')
      } finally {
        for (const fd of fds) native.close(fd)
      }
    },
  },
  {
    id: 'mem-fd-too-many',
    group: 'memory',
    level: 'SHOULD',
    rule: 'refuses SET_MEM_TABLE with more file descriptors than regions',
    cites: 'vhost-user.rst "VHOST_USER_SET_MEM_TABLE" ("The size and ordering of the fds matches the number …")',
    needs: { protocol: [VHOST_USER_PROTOCOL_F_REPLY_ACK] },
    run: (context) => {
      const memory = context.memory(layouts.single(4 * MIB))
      const { connection } = context.guest({ memory: [], withoutProtocolFeatures: [SLOTS] })
      const { fd } = memory.region(0)
      const payload = tableOf([wireRegion(memory.region(0))], 1)
      return context.expectRefusal(connection, 'one region with three fds', () =>
        connection.command(VHOST_USER_SET_MEM_TABLE, payload, [fd, fd, fd])
      )
    },
  },
  {
    id: 'mem-fd-missing',
    group: 'memory',
    level: 'MUST',
    rule: 'does not acknowledge ADD_MEM_REG without a file descriptor',
    cites: 'vhost-user.rst "VHOST_USER_ADD_MEM_REG" ("Exactly one file descriptor")',
    needs: { protocol: [SLOTS, VHOST_USER_PROTOCOL_F_REPLY_ACK] },
    run: (context) => {
      const memory = context.memory(layouts.single(4 * MIB))
      const { connection } = context.guest({ memory: [] })
      return context.expectRefusal(connection, 'ADD_MEM_REG', () =>
        connection.command(VHOST_USER_ADD_MEM_REG, regionOf(wireRegion(memory.region(0))))
      )
    },
  },
  {
    id: 'mem-remove-fd',
    group: 'memory',
    level: 'MUST',
    rule: 'closes the file descriptor that a front-end sends with REM_MEM_REG without using it',
    cites: 'vhost-user.rst "VHOST_USER_REM_MEM_REG" ("the back-end MUST close it")',
    needs: { protocol: [SLOTS], fds: true },
    run: (context) => {
      const memory = context.memory(layouts.many(4 * MIB, 2))
      const region = wireRegion(memory.region(1))
      const seen = context.expectNoFdLeak(16, () => {
        const { connection } = context.guest({ memory })
        const payload = regionOf(region)
        context.answer(connection, () => connection.command(VHOST_USER_REM_MEM_REG, payload, [region.fd]))
      })
      // Whether it takes the message is its choice ("the back-end MAY accept"); nothing of it may stay either way.
      return seen
    },
  },
  {
    id: 'mem-ring-outside',
    group: 'memory',
    level: 'SHOULD',
    rule: 'lives when a ring lies outside all memory regions, and says so in one way or another',
    cites: 'vhost-user.rst "VHOST_USER_SET_VRING_ADDR", "Memory access", "VHOST_USER_SET_VRING_ERR"',
    needs: { protocol: [VHOST_USER_PROTOCOL_F_REPLY_ACK] },
    run: (context) => {
      const guest = context.guest()
      const ring = guest.prepare(context.ringIndex)
      ring.num()
      ring.base()
      ring.err()
      const wrong = { index: ring.index, flags: 0, log: 0n, descriptor: 0x1000n, used: 0x9000n, available: 0x5000n }
      const answer = context.answer(guest.connection, () => guest.connection.setVringAddr(wrong))
      if (answer !== 'acknowledged') return `the address: ${answer}`
      const started = context.answer(guest.connection, () => ring.kick())
      if (started !== 'acknowledged') return `the start: ${started}`
      ring.queue.driver.kickRaw()
      for (let i = 0; i < 10 && !ring.queue.broken(); i++) sleepMs(5)
      if (guest.connection.channel.hungUp()) return 'the connection is closed'
      expect(
        ring.queue.broken(),
        'a refusal, the err eventfd, or the end',
        'all was acknowledged, and no error signalled'
      )
      return 'the err eventfd is signalled'
    },
  },
]

function tableOf(regions: readonly RegionWithFd[], count: number): Uint8Array {
  const bytes = new Uint8Array(8 + 32 * regions.length)
  new DataView(bytes.buffer).setUint32(0, count, true)
  for (const [i, region] of regions.entries()) bytes.set(regionOf(region).subarray(8), 8 + 32 * i)
  return bytes
}

/** vhost-user.rst "Single memory region description". */
function regionOf(region: RegionWithFd): Uint8Array {
  const words = new BigUint64Array([0n, region.guestAddress, region.size, region.userAddress, region.mmapOffset])
  return new Uint8Array(words.buffer)
}

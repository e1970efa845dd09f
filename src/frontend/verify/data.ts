/** Cases about data: what was written is what is read, over block sizes, depths, queues, segments and memory layouts. */
import { VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT } from '../../virtio/blk.ts'
import { VIRTIO_F_INDIRECT_DESC } from '../../virtio/constants.ts'
import type { BlkDriver, BlkRequest, Framing } from '../blk.ts'
import { layouts } from '../memory.ts'
import type { Opened, Random, VerifyCase, VerifyContext } from './case.ts'
import { must, mustEqual, mustStatus, need } from './case.ts'

const NOTHING = new Uint8Array(0)
const MIB = 2 ** 20

/** Runs requests with up to `depth` in flight on each queue, in turn. */
function pump<T>(
  drivers: readonly BlkDriver[],
  depth: number,
  items: readonly T[],
  submit: (blk: BlkDriver, item: T) => BlkRequest,
  check: (item: T, request: BlkRequest) => void
): void {
  const flights: { item: T; request: BlkRequest }[][] = drivers.map(() => [])
  let next = 0
  for (;;) {
    let busy = false
    for (const [i, blk] of drivers.entries()) {
      const mine = flights[i] ?? []
      blk.poll()
      while (mine[0]?.request.done === true) {
        const { item, request } = mine.shift() as { item: T; request: BlkRequest }
        check(item, request)
      }
      // The arena of a driver starts anew when nothing is in flight, so a batch is let run out before the next.
      if (mine.length === 0) {
        while (mine.length < depth && next < items.length) {
          const item = items[next++] as T
          mine.push({ item, request: submit(blk, item) })
        }
      }
      if (mine.length > 0) {
        busy = true
        if (drivers.length === 1) blk.wait(mine[0]?.request)
      }
    }
    if (!busy) return
    if (drivers.length > 1) {
      const [blk, mine] = [drivers[0], flights[0]]
      if (blk !== undefined && mine?.[0] !== undefined) blk.wait(mine[0].request)
      else
        for (const [i, other] of drivers.entries()) if (flights[i]?.[0] !== undefined) other.wait(flights[i][0].request)
    }
  }
}

interface Piece {
  readonly offset: number
  readonly length: number
}

function pieces(bytes: number, length: number): Piece[] {
  return Array.from({ length: Math.floor(bytes / length) }, (_, i) => ({ offset: i * length, length }))
}

function shuffle<T>(items: T[], random: Random): T[] {
  for (let i = items.length - 1; i > 0; i--) {
    const j = random.below(i + 1)
    const [a, b] = [items[i], items[j]]
    items[i] = b as T
    items[j] = a as T
  }
  return items
}

/** Writes the model's bytes to the area in `writeSize` pieces and reads them back in `readSize` pieces. */
function roundTrip(
  context: VerifyContext,
  opened: Pick<Opened, 'drivers'>,
  bytes: number,
  writeSize: number,
  readSize: number,
  depth: number,
  salt: number,
  mixed: boolean,
  framing: Framing = {}
): void {
  const random = context.random(salt)
  const model = random.bytes(bytes)
  const order = (length: number): Piece[] => (mixed ? shuffle(pieces(bytes, length), random) : pieces(bytes, length))
  pump(
    opened.drivers,
    depth,
    order(writeSize),
    (blk, piece) =>
      blk.submit(
        VIRTIO_BLK_T_OUT,
        context.sector(piece.offset),
        model.subarray(piece.offset, piece.offset + piece.length),
        0,
        framing
      ),
    (piece, request) => mustStatus(request, [VIRTIO_BLK_S_OK], `write of ${piece.length} bytes at ${piece.offset}`)
  )
  pump(
    opened.drivers,
    depth,
    order(readSize),
    (blk, piece) => blk.submit(VIRTIO_BLK_T_IN, context.sector(piece.offset), NOTHING, piece.length, framing),
    (piece, request) => {
      mustStatus(request, [VIRTIO_BLK_S_OK], `read of ${piece.length} bytes at ${piece.offset}`)
      mustEqual(
        request.data,
        model.subarray(piece.offset, piece.offset + piece.length),
        `read of ${piece.length} bytes at ${piece.offset}`
      )
    }
  )
}

/** Reads or writes and reads one block with the data cut into `count` segments. */
function segmentTrip(
  context: VerifyContext,
  blk: BlkDriver,
  count: number,
  bytes: number,
  indirect: boolean,
  salt: number
): void {
  const random = context.random(salt)
  const cuts = random.cuts(bytes, count)
  const before = blk.read(context.sector(), bytes)
  const cut = blk.run(VIRTIO_BLK_T_IN, context.sector(), NOTHING, bytes, { writable: [...cuts, 1], indirect })
  mustStatus(cut, [VIRTIO_BLK_S_OK], `read with ${count} segments`)
  mustEqual(cut.data, before, `read with ${count} segments`)
  if (context.facts.readOnly) return
  const data = random.bytes(bytes)
  mustStatus(
    blk.run(VIRTIO_BLK_T_OUT, context.sector(), data, 0, { readable: [16, ...cuts], indirect }),
    [VIRTIO_BLK_S_OK],
    `write with ${count} segments`
  )
  mustEqual(blk.read(context.sector(), bytes), data, `data written with ${count} segments`)
}

/** Segment counts worth trying up to a limit. */
function counts(limit: number): number[] {
  return [...new Set([1, 2, 3, 7, 16, 31, 64, 100, limit - 1, limit])]
    .filter((count) => count >= 1 && count <= limit)
    .sort((a, b) => a - b)
}

export const dataCases: readonly VerifyCase[] = [
  {
    name: 'data/sequential',
    title: 'sequential writes read back the same, over block sizes and queue depths',
    spec: 'virtio 1.3 §5.2.6',
    writes: true,
    run: (context) => {
      const { area, blockSize } = context.facts
      const opened = context.open()
      let salt = 1
      for (const [writeSize, readSize, depth] of [
        [blockSize, 65536, 1],
        [4096, blockSize, 32],
        [65536, 4096, 8],
        [524288, 131072, 4],
      ] as const) {
        const bytes = Math.min(area.bytes, writeSize <= 512 ? MIB / 2 : 4 * MIB)
        const unit = Math.max(writeSize, readSize)
        if (bytes < unit || writeSize % blockSize !== 0 || readSize % blockSize !== 0) continue
        roundTrip(context, opened, Math.floor(bytes / unit) * unit, writeSize, readSize, depth, salt++, false)
      }
    },
  },
  {
    name: 'data/random',
    title: 'writes in random order, many in flight, read back the same',
    spec: 'virtio 1.3 §5.2.6',
    writes: true,
    run: (context) => {
      const { area, blockSize } = context.facts
      const opened = context.open({ mode: 'irq' })
      const bytes = Math.min(area.bytes, 2 * MIB)
      roundTrip(context, opened, bytes, Math.max(blockSize, 2048), blockSize, 64, 21, true)
      roundTrip(context, opened, bytes, blockSize, 16384, 16, 22, true)
    },
  },
  {
    name: 'data/read-stable',
    title: 'two reads of the same place with different sizes agree',
    spec: 'virtio 1.3 §5.2.6',
    run: (context) => {
      const { blk } = context.open()
      const bytes = Math.min(65536, context.facts.area.bytes)
      const whole = blk.read(context.sector(), bytes)
      const { blockSize } = context.facts
      for (let at = 0; at < bytes; at += blockSize) {
        mustEqual(blk.read(context.sector(at), blockSize), whole.subarray(at, at + blockSize), `block at ${at}`)
      }
    },
  },
  {
    name: 'data/queues',
    title: 'several queues at once: each request is answered on its own queue, nothing is mixed up',
    spec: 'virtio 1.3 §5.2.2',
    writes: true,
    run: (context) => {
      const queues = Math.min(4, context.facts.maxQueues)
      need(queues > 1, 'the back-end has one queue')
      const opened = context.open({ queues })
      roundTrip(context, opened, Math.min(context.facts.area.bytes, 4 * MIB), 4096, 16384, 16, 31, true)
      roundTrip(context, opened, Math.min(context.facts.area.bytes, 4 * MIB), 16384, 4096, 16, 32, false)
      return `${queues} queues`
    },
  },
  {
    name: 'data/segments',
    title: 'a request may have 1 to seg_max data segments of any lengths',
    spec: 'virtio 1.3 §5.2.4 seg_max, §2.7.4',
    run: (context) => {
      const { blk } = context.open({ queueSize: 1024 })
      const limit = Math.min(context.facts.segMax, 1022)
      for (const count of counts(limit))
        segmentTrip(context, blk, count, Math.min(65536, context.facts.area.bytes), false, 40 + count)
      return `1 … ${limit} segments`
    },
  },
  {
    name: 'data/indirect',
    title: 'the same through indirect tables',
    spec: 'virtio 1.3 §2.7.5.3',
    run: (context) => {
      need(context.has(VIRTIO_F_INDIRECT_DESC), 'INDIRECT_DESC is not offered')
      const { blk } = context.open({ queueSize: 128 })
      const limit = Math.min(context.facts.segMax, 126)
      for (const count of counts(limit))
        segmentTrip(context, blk, count, Math.min(65536, context.facts.area.bytes), true, 80 + count)
    },
  },
  {
    name: 'data/large',
    title: 'one request of several hundred KiB',
    spec: 'virtio 1.3 §5.2.6',
    run: (context) => {
      const { blk } = context.open()
      const bytes = Math.min(context.facts.area.bytes, MIB)
      const sizeMax = context.facts.config.sizeMax || bytes
      const count = Math.max(1, Math.ceil(bytes / sizeMax))
      need(count <= context.facts.segMax, 'size_max and seg_max are too small')
      segmentTrip(context, blk, count, bytes, false, 90)
    },
  },
  {
    name: 'data/unaligned-buffers',
    title: 'guest buffers at odd addresses (O_DIRECT back-ends must copy)',
    spec: 'virtio 1.3 §2.7.4: no assumption about layout',
    run: (context) => {
      const { blk } = context.open()
      const { blockSize } = context.facts
      const random = context.random(100)
      for (const skew of [1, 3, 8, 15, 256, 511]) {
        const before = blk.read(context.sector(), 4 * blockSize)
        mustEqual(
          blk.read(context.sector(), 4 * blockSize, { align: 4096, skew }),
          before,
          `read to a buffer at 4096 n + ${skew}`
        )
        if (context.facts.readOnly) continue
        const data = random.bytes(4 * blockSize)
        blk.write(context.sector(), data, { align: 4096, skew })
        mustEqual(blk.read(context.sector(), 4 * blockSize), data, `write from a buffer at 4096 n + ${skew}`)
      }
    },
  },
  {
    name: 'data/straddle-direct',
    title: 'a buffer that runs from one region into the adjacent one',
    spec: 'vhost-user.rst "Memory regions description"',
    run: (context) => straddle(context, false),
  },
  {
    name: 'data/straddle-indirect',
    title: 'the same in an indirect table',
    spec: 'vhost-user.rst "Memory regions description"; virtio 1.3 §2.7.5.3',
    run: (context) => {
      need(context.has(VIRTIO_F_INDIRECT_DESC), 'INDIRECT_DESC is not offered')
      straddle(context, true)
    },
  },
  {
    name: 'data/high-memory',
    title: 'rings and buffers above 4 GiB, the parts of the ring in different regions',
    spec: 'vhost-user.rst "Memory regions description"',
    run: (context) => {
      const { blk } = context.open({ memory: layouts.hole(16 * MIB), ringRegions: [1, 0, 1] })
      const bytes = 4 * context.facts.blockSize
      const low = blk.read(context.sector(), bytes, { region: 0 })
      mustEqual(blk.read(context.sector(), bytes, { region: 1 }), low, 'read to a buffer above 4 GiB')
      if (context.facts.readOnly) return
      const data = context.random(110).bytes(bytes)
      blk.write(context.sector(), data, { region: 1 })
      mustEqual(blk.read(context.sector(), bytes, { region: 0 }), data, 'write from a buffer above 4 GiB')
    },
  },
  {
    name: 'data/many-regions',
    title: 'buffers in each of many memory regions',
    spec: 'vhost-user.rst "VHOST_USER_GET_MAX_MEM_SLOTS"',
    run: (context) => {
      const regions = Math.min(context.facts.memorySlots, 24)
      const { blk } = context.open({ memory: layouts.many(MIB, regions), arena: MIB / 2 })
      const bytes = 2 * context.facts.blockSize
      const data = blk.read(context.sector(), bytes)
      for (let region = 1; region < regions; region++) {
        mustEqual(blk.read(context.sector(), bytes, { region }), data, `read to region ${region}`)
      }
      return `${regions} of ${context.facts.memorySlots} slots`
    },
  },
]

function straddle(context: VerifyContext, indirect: boolean): void {
  const size = 16 * MIB
  const { blk, session } = context.open({ memory: layouts.adjacent(size), arena: 4 * MIB })
  const second = session.memory.region(1)
  const bytes = 8 * context.facts.blockSize
  // The last bytes of region 0 and the first of region 1 are free: rings and arenas end before, the arena of region 1 is left alone.
  must(session.memory.region(0).next < size - bytes, 'internal: region 0 is full')
  const before = blk.read(context.sector(), bytes)
  for (const first of [bytes / 2, 1, bytes - 1, 100]) {
    const place = (length: number): number | undefined => (length === bytes ? second.gpa - first : undefined)
    mustEqual(
      blk.read(context.sector(), bytes, { indirect, place }),
      before,
      `read to a buffer with ${first} bytes before the border`
    )
    if (context.facts.readOnly) continue
    const data = context.random(120 + first).bytes(bytes)
    blk.write(context.sector(), data, { indirect, place })
    mustEqual(blk.read(context.sector(), bytes), data, `write from a buffer with ${first} bytes before the border`)
    blk.write(context.sector(), before)
  }
}

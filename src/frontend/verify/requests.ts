/** Cases about single requests: their results, used lengths, limits, and what must be refused. */
import {
  VIRTIO_BLK_F_DISCARD,
  VIRTIO_BLK_F_FLUSH,
  VIRTIO_BLK_F_LIFETIME,
  VIRTIO_BLK_F_RO,
  VIRTIO_BLK_F_SECURE_ERASE,
  VIRTIO_BLK_F_WRITE_ZEROES,
  VIRTIO_BLK_ID_BYTES,
  VIRTIO_BLK_S_IOERR,
  VIRTIO_BLK_S_OK,
  VIRTIO_BLK_S_UNSUPP,
  VIRTIO_BLK_T_DISCARD,
  VIRTIO_BLK_T_FLUSH,
  VIRTIO_BLK_T_GET_ID,
  VIRTIO_BLK_T_GET_LIFETIME,
  VIRTIO_BLK_T_IN,
  VIRTIO_BLK_T_OUT,
  VIRTIO_BLK_T_SECURE_ERASE,
  VIRTIO_BLK_T_WRITE_ZEROES,
} from '../../virtio/blk.ts'
import type { BlkDriver, BlkRange } from '../blk.ts'
import { rangeBytes } from '../blk.ts'
import type { VerifyCase, VerifyContext } from './case.ts'
import { must, mustEqual, mustStatus, need } from './case.ts'

const NOTHING = new Uint8Array(0)
const REFUSED = [VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP]

/** First sectors that are beyond any disk or make `sector * 512` or `sector + count` overflow in 32 or 64 bits. */
const WILD_SECTORS = [
  2n ** 64n - 1n,
  2n ** 64n - 8n,
  2n ** 63n,
  2n ** 63n - 1n,
  2n ** 56n,
  2n ** 55n,
  2n ** 55n - 1n,
  2n ** 54n,
  2n ** 53n + 1n,
  2n ** 48n,
]

/** Runs an operation of ranges and returns its status. */
function ranges(blk: BlkDriver, type: number, list: readonly BlkRange[]): ReturnType<BlkDriver['run']> {
  return blk.run(type, 0, rangeBytes(list), 0)
}

interface RangeKind {
  readonly word: string
  readonly type: number
  readonly feature: number
  readonly limits: (context: VerifyContext) => { maxSectors: number; maxSegments: number } | undefined
}

const KINDS: readonly RangeKind[] = [
  {
    word: 'discard',
    type: VIRTIO_BLK_T_DISCARD,
    feature: VIRTIO_BLK_F_DISCARD,
    limits: (context) => context.facts.config.discard,
  },
  {
    word: 'write-zeroes',
    type: VIRTIO_BLK_T_WRITE_ZEROES,
    feature: VIRTIO_BLK_F_WRITE_ZEROES,
    limits: (context) => context.facts.config.writeZeroes,
  },
]

/** Fills 64 KiB of the area, runs `ranges` over parts of it, and checks what lies around and (for zeroes) in them. */
function rangeTrip(
  context: VerifyContext,
  kind: RangeKind,
  blk: BlkDriver,
  spans: readonly { offset: number; length: number }[],
  flags: number
): void {
  const data = context.random(spans.length + flags).bytes(65536)
  blk.write(context.sector(), data)
  const list = spans.map(({ offset, length }) => ({ sector: context.sector(offset), sectors: length / 512, flags }))
  mustStatus(ranges(blk, kind.type, list), [VIRTIO_BLK_S_OK], `${kind.word} of ${spans.length} ranges`)
  const after = blk.read(context.sector(), data.length)
  const expected = data.slice()
  for (const { offset, length } of spans) {
    if (kind.type === VIRTIO_BLK_T_WRITE_ZEROES) expected.fill(0, offset, offset + length)
    // What a discarded range reads as is not defined; only its neighbours are.
    else expected.set(after.subarray(offset, offset + length), offset)
  }
  mustEqual(after, expected, `the disk after ${kind.word}`)
}

function rangeCases(kind: RangeKind): VerifyCase[] {
  const limitsOf = (context: VerifyContext): { maxSectors: number; maxSegments: number } => {
    const limits = kind.limits(context)
    need(
      context.has(kind.feature) && limits !== undefined,
      `${kind.word.toUpperCase().replace('-', '_')} is not offered`
    )
    return limits
  }
  const spec = 'virtio 1.3 §5.2.6'
  const sectors = (context: VerifyContext): number => context.facts.blockSize / 512
  return [
    {
      name: `${kind.word}/one-range`,
      title: `${kind.word} of one range touches that range only`,
      spec,
      writes: true,
      run: (context) => {
        limitsOf(context)
        const { blk } = context.open()
        rangeTrip(context, kind, blk, [{ offset: 8192, length: 4096 }], 0)
        rangeTrip(context, kind, blk, [{ offset: 4096, length: context.facts.blockSize }], 0)
        if (kind.type === VIRTIO_BLK_T_WRITE_ZEROES && context.facts.config.writeZeroes?.mayUnmap === true) {
          rangeTrip(context, kind, blk, [{ offset: 8192, length: 32768 }], 1)
          return 'with and without the unmap flag'
        }
        return undefined
      },
    },
    {
      name: `${kind.word}/several-ranges`,
      title: `${kind.word} of as many ranges as the limit allows`,
      spec,
      writes: true,
      run: (context) => {
        const { maxSegments } = limitsOf(context)
        need(maxSegments > 1, 'the limit is one range')
        const { blk } = context.open()
        const count = Math.min(maxSegments, Math.floor(32768 / context.facts.blockSize), 16)
        const length = context.facts.blockSize
        rangeTrip(
          context,
          kind,
          blk,
          Array.from({ length: count }, (_, i) => ({ offset: 2 * i * length, length })),
          0
        )
        // The data of the request cut in the middle of a range (virtio 1.3 §2.7.4).
        const list = rangeBytes([
          { sector: context.sector(), sectors: length / 512 },
          { sector: context.sector(2 * length), sectors: length / 512 },
        ])
        mustStatus(
          blk.run(kind.type, 0, list, 0, { readable: [16, 7, 20, 5] }),
          [VIRTIO_BLK_S_OK],
          'ranges cut into odd descriptors'
        )
        return `${count} of ${maxSegments} ranges`
      },
    },
    {
      name: `${kind.word}/too-many-ranges`,
      title: `${kind.word} of more ranges than the limit is refused`,
      spec: `${spec}: max_${kind.word.replace('-', '_')}_seg`,
      writes: true,
      run: (context) => {
        const { maxSegments } = limitsOf(context)
        need(maxSegments < 2048, 'the limit is too large to pass')
        const { blk } = context.open()
        const list = Array.from({ length: maxSegments + 1 }, (_, i) => ({
          sector: context.sector(i * context.facts.blockSize),
          sectors: sectors(context),
        }))
        mustStatus(ranges(blk, kind.type, list), REFUSED, `${maxSegments + 1} ranges`)
        context.mustWork(blk, 'after it')
      },
    },
    {
      name: `${kind.word}/flags`,
      title:
        kind.type === VIRTIO_BLK_T_DISCARD
          ? 'discard with the unmap flag or an unknown flag is UNSUPP'
          : 'write zeroes with an unknown flag is UNSUPP',
      spec: `${spec}.2: MUST set the status to VIRTIO_BLK_S_UNSUPP`,
      writes: true,
      run: (context) => {
        limitsOf(context)
        const { blk } = context.open()
        const data = context.random(7).bytes(4096)
        blk.write(context.sector(), data)
        for (const flags of kind.type === VIRTIO_BLK_T_DISCARD ? [1, 2, 0x8000_0000] : [2, 0x8000_0000, 0xffff_ffff]) {
          mustStatus(
            ranges(blk, kind.type, [{ sector: context.sector(), sectors: sectors(context), flags }]),
            [VIRTIO_BLK_S_UNSUPP],
            `flags 0x${flags.toString(16)}`
          )
        }
        mustEqual(blk.read(context.sector(), 4096), data, 'the disk after refused requests')
      },
    },
    {
      name: `${kind.word}/out-of-range`,
      title: `${kind.word} past the end, or where the arithmetic overflows, is refused`,
      spec,
      writes: true,
      run: (context) => {
        limitsOf(context)
        const { blk } = context.open()
        const end = context.facts.capacity
        const count = sectors(context)
        for (const [sector, length] of [
          [end, count],
          [end - count, 2 * count],
          ...WILD_SECTORS.map((wild) => [wild, count] as const),
          [0, 0xffff_ffff],
        ] as const) {
          if (Number(sector) + length <= end) continue
          mustStatus(ranges(blk, kind.type, [{ sector, sectors: length }]), REFUSED, `${length} sectors at ${sector}`)
        }
        context.mustWork(blk, 'after it')
      },
    },
    {
      name: `${kind.word}/bad-length`,
      title: `${kind.word} whose data is no whole number of ranges is refused`,
      spec,
      writes: true,
      run: (context) => {
        limitsOf(context)
        const { blk } = context.open()
        const range = rangeBytes([
          { sector: context.sector(), sectors: sectors(context) },
          { sector: context.sector(), sectors: sectors(context) },
        ])
        for (const length of [15, 17, 1, 31]) {
          const request = blk.submit(kind.type, 0, range.subarray(0, length), 0)
          blk.wait(request, Math.min(2000, context.timeoutMs))
          mustStatus(request, REFUSED, `${length} bytes of data`)
        }
        context.mustWork(blk, 'after it')
      },
    },
  ]
}

/** Reads and writes that don't lie on the disk. */
function outside(context: VerifyContext, type: number): void {
  const { blk } = context.open()
  const block = context.facts.blockSize
  const end = context.facts.capacity
  const data = type === VIRTIO_BLK_T_OUT ? context.random(3).bytes(2 * block) : NOTHING
  const run = (sector: number | bigint, length: number): ReturnType<BlkDriver['run']> =>
    blk.run(type, sector, data.subarray(0, length), type === VIRTIO_BLK_T_OUT ? 0 : length)
  mustStatus(run(end, block), [VIRTIO_BLK_S_IOERR], 'the first block past the end')
  mustStatus(run(end - block / 512, 2 * block), [VIRTIO_BLK_S_IOERR], 'two blocks, the second one past the end')
  for (const sector of WILD_SECTORS)
    if (sector > end) mustStatus(run(sector, block), [VIRTIO_BLK_S_IOERR], `sector ${sector}`)
  context.mustWork(blk, 'after it')
}

export const requestCases: readonly VerifyCase[] = [
  {
    name: 'request/flush',
    title: 'flush succeeds, with the used length 1',
    spec: 'virtio 1.3 §5.2.6.2',
    run: (context) => {
      need(context.has(VIRTIO_BLK_F_FLUSH), 'FLUSH is not offered')
      const { blk } = context.open()
      const request = blk.run(VIRTIO_BLK_T_FLUSH, 0, NOTHING, 0)
      mustStatus(request, [VIRTIO_BLK_S_OK], 'flush')
      must(request.written === 1, `the used length is ${request.written} instead of 1`)
    },
  },
  {
    name: 'request/get-id',
    title: 'GET_ID fills 20 bytes: a string, then zeroes',
    spec: 'virtio 1.3 §5.2.6',
    run: (context) => {
      const { blk } = context.open()
      const request = blk.run(VIRTIO_BLK_T_GET_ID, 0, NOTHING, VIRTIO_BLK_ID_BYTES)
      if (request.status === VIRTIO_BLK_S_UNSUPP) return 'UNSUPP'
      mustStatus(request, [VIRTIO_BLK_S_OK], 'GET_ID')
      const end = request.data.indexOf(0)
      must(
        end < 0 || request.data.subarray(end).every((byte) => byte === 0),
        `bytes after the string are not zero: ${Buffer.from(request.data).toString('hex')}`
      )
      return `"${Buffer.from(end < 0 ? request.data : request.data.subarray(0, end)).toString('latin1')}"`
    },
  },
  {
    name: 'request/get-id-short',
    title: 'GET_ID with a buffer of 8 bytes is answered',
    spec: 'virtio 1.3 §5.2.6',
    run: (context) => {
      const { blk } = context.open()
      const request = blk.submit(VIRTIO_BLK_T_GET_ID, 0, NOTHING, 8)
      blk.wait(request, Math.min(2000, context.timeoutMs))
      mustStatus(request, [VIRTIO_BLK_S_OK, ...REFUSED], 'GET_ID with 8 bytes')
      context.mustWork(blk, 'after it')
    },
  },
  {
    name: 'request/used-length',
    title: 'the used length counts the bytes written, with the status byte',
    spec: 'virtio 1.3 §2.7.8.2',
    run: (context) => {
      const { blk } = context.open()
      const block = context.facts.blockSize
      const wanted = (request: ReturnType<BlkDriver['run']>, length: number, what: string): void =>
        must(request.written === length, `${what}: the used length is ${request.written} instead of ${length}`)
      wanted(blk.run(VIRTIO_BLK_T_IN, context.sector(), NOTHING, block), block + 1, 'read of one block')
      wanted(blk.run(VIRTIO_BLK_T_IN, context.sector(), NOTHING, 8 * block), 8 * block + 1, 'read of 8 blocks')
      const id = blk.run(VIRTIO_BLK_T_GET_ID, 0, NOTHING, VIRTIO_BLK_ID_BYTES)
      if (id.status === VIRTIO_BLK_S_OK) wanted(id, VIRTIO_BLK_ID_BYTES + 1, 'GET_ID')
      wanted(blk.run(0x1234, 0, NOTHING, 0), 1, 'an unknown type')
      if (!context.facts.readOnly)
        wanted(blk.run(VIRTIO_BLK_T_OUT, context.sector(), blk.read(context.sector(), block), 0), 1, 'write')
    },
  },
  {
    name: 'request/read-outside',
    title: 'reads past the end, or where the arithmetic overflows, are IOERR',
    spec: 'virtio 1.3 §5.2.6.2',
    run: (context) => outside(context, VIRTIO_BLK_T_IN),
  },
  {
    name: 'request/write-outside',
    title: 'writes past the end, or where the arithmetic overflows, are IOERR and write nothing',
    spec: 'virtio 1.3 §5.2.6.2',
    writes: true,
    run: (context) => {
      const { blk } = context.open()
      const block = context.facts.blockSize
      const first = blk.read(0, 4 * block)
      const last = blk.read(context.facts.capacity - block / 512, block)
      outside(context, VIRTIO_BLK_T_OUT)
      mustEqual(context.open().blk.read(0, 4 * block), first, 'the first blocks of the disk')
      mustEqual(
        context.open().blk.read(context.facts.capacity - block / 512, block),
        last,
        'the last block of the disk'
      )
    },
  },
  {
    name: 'request/partial-sector',
    title: 'a read of 100 or 513 bytes is not answered OK',
    spec: 'virtio 1.3 §5.2.6.1: the length is a multiple of 512 bytes',
    run: (context) => {
      const { blk } = context.open()
      for (const length of [100, 513]) {
        const request = blk.submit(VIRTIO_BLK_T_IN, context.sector(), NOTHING, length)
        blk.wait(request, Math.min(2000, context.timeoutMs))
        mustStatus(request, REFUSED, `read of ${length} bytes`)
      }
      context.mustWork(blk, 'after it')
    },
  },
  {
    name: 'request/unknown-type',
    title: 'unknown request types are UNSUPP',
    spec: 'virtio 1.3 §5.2.6.2',
    run: (context) => {
      const { blk } = context.open()
      for (const type of [2, 5, 9, 0x1234, 0x8000_0000, 0xffff_ffff]) {
        mustStatus(blk.run(type, 0, NOTHING, 0), [VIRTIO_BLK_S_UNSUPP], `type 0x${type.toString(16)}`)
        mustStatus(blk.run(type, 0, NOTHING, 512), [VIRTIO_BLK_S_UNSUPP], `type 0x${type.toString(16)} with data`)
      }
    },
  },
  {
    name: 'request/not-offered',
    title: 'request types whose feature is not offered are UNSUPP',
    spec: 'virtio 1.3 §5.2.6.2',
    run: (context) => {
      const { blk } = context.open()
      const tried: string[] = []
      for (const [name, type, feature] of [
        ['DISCARD', VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_F_DISCARD],
        ['WRITE_ZEROES', VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_F_WRITE_ZEROES],
        ['SECURE_ERASE', VIRTIO_BLK_T_SECURE_ERASE, VIRTIO_BLK_F_SECURE_ERASE],
        ['GET_LIFETIME', VIRTIO_BLK_T_GET_LIFETIME, VIRTIO_BLK_F_LIFETIME],
      ] as const) {
        if (context.has(feature)) continue
        tried.push(name)
        const out =
          name === 'GET_LIFETIME'
            ? NOTHING
            : rangeBytes([{ sector: context.sector(), sectors: context.facts.blockSize / 512 }])
        mustStatus(blk.run(type, 0, out, name === 'GET_LIFETIME' ? 8 : 0), REFUSED, name)
      }
      return tried.join(', ')
    },
  },
  {
    name: 'request/read-only-disk',
    title: 'a read-only disk refuses every kind of write',
    spec: 'virtio 1.3 §5.2.6.2: MUST fail with VIRTIO_BLK_S_IOERR',
    run: (context) => {
      need(context.has(VIRTIO_BLK_F_RO), 'the disk is writable')
      const { blk } = context.open()
      const block = context.facts.blockSize
      const before = blk.read(context.sector(), block)
      mustStatus(
        blk.run(VIRTIO_BLK_T_OUT, context.sector(), context.random(4).bytes(block), 0),
        [VIRTIO_BLK_S_IOERR],
        'write'
      )
      for (const kind of KINDS)
        mustStatus(ranges(blk, kind.type, [{ sector: context.sector(), sectors: block / 512 }]), REFUSED, kind.word)
      mustEqual(blk.read(context.sector(), block), before, 'the disk after refused writes')
    },
  },
  ...KINDS.flatMap(rangeCases),
]

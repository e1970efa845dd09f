/** Cases about virtio-blk that write to the disk, all of them at its end. */
import {
  VIRTIO_BLK_F_DISCARD,
  VIRTIO_BLK_F_WRITE_ZEROES,
  VIRTIO_BLK_S_IOERR,
  VIRTIO_BLK_T_DISCARD,
  VIRTIO_BLK_T_OUT,
  VIRTIO_BLK_T_WRITE_ZEROES,
} from '../../virtio/blk.ts'
import { type BlkRequest, rangeBytes } from '../blk.ts'
import { blkCase, bytesOf, DEVICE, expectStatus, FAILED, OK, OPERATION, UNSUPP, WILD_SECTORS } from './blk-disk.ts'
import { applicable, type ConformanceCase, expectBytes } from './case.ts'

const writing = { destructive: true } as const

export const blkWriteCases: readonly ConformanceCase[] = [
  blkCase(
    {
      id: 'blk-write',
      ...writing,
      level: 'MUST',
      rule: 'reads back what was written, and nothing beside it',
      cites: OPERATION,
    },
    ({ requests, area, blockSize, readOnly }) => {
      applicable(!readOnly, 'the disk is read-only')
      const model = bytesOf(1, Math.min(area.bytes, 65536))
      requests.write(area.sector, model)
      for (const [at, blocks] of [
        [1, 1],
        [3, 4],
        [0, 2],
      ] as const) {
        const data = bytesOf(at + 10, Math.min(blocks * blockSize, model.length - at * blockSize))
        if (data.length <= 0) continue
        requests.write(area.sector + (at * blockSize) / 512, data)
        model.set(data, at * blockSize)
      }
      expectBytes('the area', requests.read(area.sector, model.length), model)
      return `${model.length} bytes`
    }
  ),
  blkCase(
    {
      id: 'blk-write-framing',
      ...writing,
      level: 'MUST',
      rule: 'writes the same however the data is cut into descriptors',
      cites: 'virtio 1.3 §2.7.4.1',
    },
    ({ requests, area, blockSize, readOnly }) => {
      applicable(!readOnly, 'the disk is read-only')
      for (const [round, cuts] of [
        [16 + blockSize],
        [7, 9 + blockSize],
        [16, 1, blockSize - 2, 1],
        [17, blockSize - 1],
      ].entries()) {
        const data = bytesOf(round + 30, blockSize)
        expectStatus(
          requests.run(VIRTIO_BLK_T_OUT, area.sector, data, 0, { readable: cuts }),
          OK,
          `a write cut ${cuts}`
        )
        expectBytes(`what was written cut ${cuts}`, requests.read(area.sector, blockSize), data)
      }
      return '4 framings'
    }
  ),
  blkCase(
    {
      id: 'blk-write-beyond-end',
      ...writing,
      level: 'MUST',
      rule: 'answers writes beyond its capacity with IOERR and writes nothing of them',
      cites: `${OPERATION}, §5.2.6.1`,
    },
    ({ requests, blockSize, capacity, firstBlock, readOnly }) => {
      applicable(!readOnly, 'the disk is read-only')
      const IOERR = [VIRTIO_BLK_S_IOERR]
      const last = requests.read(capacity - blockSize / 512, blockSize)
      const data = bytesOf(50, 2 * blockSize)
      const across = requests.run(VIRTIO_BLK_T_OUT, capacity - blockSize / 512, data, 0)
      expectStatus(across, IOERR, 'the last block and the one after it')
      for (const sector of [BigInt(capacity), ...WILD_SECTORS])
        expectStatus(requests.run(VIRTIO_BLK_T_OUT, sector, data, 0), IOERR, `sector ${sector}`)
      expectBytes('the first block', requests.read(0, blockSize), firstBlock)
      expectBytes('the last block', requests.read(capacity - blockSize / 512, blockSize), last)
      return 'refused, and nothing changed'
    }
  ),
  blkCase(
    {
      id: 'blk-write-zeroes',
      ...writing,
      level: 'MUST',
      rule: 'reads zeroes in the ranges of a completed WRITE_ZEROES, with and without unmap, and all else as before',
      cites: DEVICE,
      needs: { features: [VIRTIO_BLK_F_WRITE_ZEROES] },
    },
    ({ requests, area, blockSize, config }) => {
      const bytes = Math.min(area.bytes, 64 * blockSize)
      const perBlock = blockSize / 512
      for (const flags of config.writeZeroes?.mayUnmap === true ? [0, 1] : [0]) {
        const model = bytesOf(60 + flags, bytes)
        requests.write(area.sector, model)
        const range = { sector: area.sector + perBlock, sectors: 3 * perBlock, flags }
        const done = requests.run(VIRTIO_BLK_T_WRITE_ZEROES, 0, rangeBytes([range]), 0)
        expectStatus(done, OK, `WRITE_ZEROES with flags ${flags}`)
        model.fill(0, blockSize, 4 * blockSize)
        expectBytes('the area afterwards', requests.read(area.sector, bytes), model)
      }
      return 'zeroes'
    }
  ),
  blkCase(
    {
      id: 'blk-discard',
      ...writing,
      level: 'MUST',
      rule: 'leaves everything outside the range of a DISCARD as it was',
      cites: DEVICE,
      needs: { features: [VIRTIO_BLK_F_DISCARD] },
    },
    ({ requests, area, blockSize }) => {
      const bytes = Math.min(area.bytes, 64 * blockSize)
      const perBlock = blockSize / 512
      const model = bytesOf(70, bytes)
      requests.write(area.sector, model)
      const range = { sector: area.sector + 8 * perBlock, sectors: 8 * perBlock }
      expectStatus(requests.run(VIRTIO_BLK_T_DISCARD, 0, rangeBytes([range]), 0), OK, 'DISCARD')
      const after = requests.read(area.sector, bytes)
      model.set(after.subarray(8 * blockSize, 16 * blockSize), 8 * blockSize)
      expectBytes('the area around it', after, model)
      return `${8 * blockSize} bytes discarded`
    }
  ),
  ...(
    [
      ['discard', 'DISCARD', VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_F_DISCARD, [1, 2, 0x8000_0000], 'and of "unmap"'],
      [
        'write-zeroes',
        'WRITE_ZEROES',
        VIRTIO_BLK_T_WRITE_ZEROES,
        VIRTIO_BLK_F_WRITE_ZEROES,
        [2, 0x8000_0000],
        'other than "unmap"',
      ],
    ] as const
  ).map(([word, name, type, feature, flags, which]) =>
    blkCase(
      {
        id: `blk-${word}-flags`,
        ...writing,
        level: 'MUST',
        rule: `answers ${name} with UNSUPP when a flag is set that is unknown, ${which}`,
        cites: DEVICE,
        needs: { features: [feature] },
      },
      ({ requests, area, blockSize }) => {
        for (const value of flags) {
          const range = { sector: area.sector, sectors: blockSize / 512, flags: value }
          expectStatus(requests.run(type, 0, rangeBytes([range]), 0), UNSUPP, `flags 0x${value.toString(16)}`)
        }
        return `UNSUPP for flags ${flags.map((value) => `0x${value.toString(16)}`).join(', ')}`
      }
    )
  ),
  ...(
    [
      ['discard', 'DISCARD', VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_F_DISCARD],
      ['write-zeroes', 'WRITE_ZEROES', VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_F_WRITE_ZEROES],
    ] as const
  ).map(([word, name, type, feature]) =>
    blkCase(
      {
        id: `blk-${word}-limits`,
        ...writing,
        level: 'SHOULD',
        rule: `refuses ${name} beyond the disk, of more ranges than the limit, and of part of a range`,
        cites: 'virtio 1.3 §5.2.6.1 (the driver MUST NOT)',
        needs: { features: [feature] },
      },
      ({ requests, area, blockSize, capacity, config }) => {
        const limits = word === 'discard' ? config.discard : config.writeZeroes
        const sectors = blockSize / 512
        const run = (bytes: Uint8Array): BlkRequest => requests.run(type, 0, bytes, 0)
        for (const sector of [BigInt(capacity), 2n ** 63n, 2n ** 55n, 2n ** 64n - 1n])
          expectStatus(run(rangeBytes([{ sector, sectors }])), FAILED, `sector ${sector}`)
        const partial = rangeBytes([{ sector: area.sector, sectors }]).subarray(0, 12)
        expectStatus(run(partial), FAILED, '12 bytes of a range')
        const most = limits?.maxSegments ?? 0
        if (most > 0 && most < 1000) {
          const many = new Array(most + 1).fill({ sector: area.sector, sectors })
          expectStatus(run(rangeBytes(many)), FAILED, `${most + 1} ranges where ${most} are allowed`)
        }
        return 'refused'
      }
    )
  ),
]

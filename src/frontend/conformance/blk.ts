/**
 * Cases about virtio-blk that write nothing: what requests come to, what is refused and how, what the config space
 * says.
 */
import { VHOST_USER_PROTOCOL_F_CONFIG } from '../../vhost-user/wire.ts'
import {
  VIRTIO_BLK_F_BLK_SIZE,
  VIRTIO_BLK_F_DISCARD,
  VIRTIO_BLK_F_FLUSH,
  VIRTIO_BLK_F_LIFETIME,
  VIRTIO_BLK_F_MQ,
  VIRTIO_BLK_F_RO,
  VIRTIO_BLK_F_SECURE_ERASE,
  VIRTIO_BLK_F_SEG_MAX,
  VIRTIO_BLK_F_SIZE_MAX,
  VIRTIO_BLK_F_WRITE_ZEROES,
  VIRTIO_BLK_F_ZONED,
  VIRTIO_BLK_ID_BYTES,
  VIRTIO_BLK_S_IOERR,
  VIRTIO_BLK_S_OK,
  VIRTIO_BLK_T_DISCARD,
  VIRTIO_BLK_T_FLUSH,
  VIRTIO_BLK_T_GET_ID,
  VIRTIO_BLK_T_GET_LIFETIME,
  VIRTIO_BLK_T_IN,
  VIRTIO_BLK_T_OUT,
  VIRTIO_BLK_T_SECURE_ERASE,
  VIRTIO_BLK_T_WRITE_ZEROES,
} from '../../virtio/blk.ts'
import { rangeBytes, STATUS_UNTOUCHED, statusName, writeHeader } from '../blk.ts'
import {
  blkCase,
  DEVICE,
  type Disk,
  expectStatus,
  FAILED,
  NOTHING,
  OK,
  OPERATION,
  UNSUPP,
  WILD_SECTORS,
} from './blk-disk.ts'
import { applicable, type ConformanceCase, expect, expectBytes, expectEqual } from './case.ts'

/** A chain that is no request; the driver must not make it, and the device has nowhere to say so but the used ring. */
function expectReturned({ ring, requests }: Disk, readable: Uint8Array, cuts: number[], writable: number[]): string {
  const request = requests.submitRaw(VIRTIO_BLK_T_IN, readable, cuts, writable)
  requests.wait(request, 1000)
  if (writable.length > 0) expect(request.status !== VIRTIO_BLK_S_OK, 'no status OK', 'OK')
  ring.run(1, {}, 'a request after it')
  return writable.length > 0 ? `returned, status ${statusName(request.status)}` : 'returned'
}

function header(type: number, sector = 0): Uint8Array {
  const bytes = new Uint8Array(16)
  writeHeader(bytes, type, sector)
  return bytes
}

const configCases: readonly ConformanceCase[] = [
  blkCase(
    {
      id: 'blk-config-sane',
      level: 'SHOULD',
      rule: 'shows values that a driver can work with in the fields of the features that it offers',
      cites: 'virtio 1.3 §5.2.4',
    },
    ({ config }, context) => {
      const { capacity, blkSize, segMax, sizeMax, discard, writeZeroes } = config
      expect(capacity > 0n, 'a capacity', '0 sectors')
      if (context.has(VIRTIO_BLK_F_BLK_SIZE)) {
        const size = blkSize ?? 0
        expect(size >= 512 && (size & (size - 1)) === 0, 'a blk_size that is a power of two from 512 on', `${size}`)
      }
      if (context.has(VIRTIO_BLK_F_SEG_MAX)) expect((segMax ?? 0) > 0, 'a seg_max above 0', `${segMax}`)
      if (context.has(VIRTIO_BLK_F_SIZE_MAX)) expect((sizeMax ?? 0) > 0, 'a size_max above 0', `${sizeMax}`)
      for (const [name, limits] of [
        ['discard', discard],
        ['write_zeroes', writeZeroes],
      ] as const) {
        if (limits !== undefined)
          expect(limits.maxSectors > 0 && limits.maxSegments > 0, `limits of ${name} above 0`, JSON.stringify(limits))
      }
      return `${capacity} sectors, blocks of ${blkSize ?? 512} bytes`
    }
  ),
  blkCase(
    {
      id: 'blk-config-padding',
      level: 'MUST',
      rule: 'shows the padding bytes of its config space as 0',
      cites: 'virtio 1.3 §5.2.5.2 (unused0 and unused1)',
      needs: { protocol: [VHOST_USER_PROTOCOL_F_CONFIG] },
    },
    (_, context) => {
      const { connection } = context.guest()
      const bytes = connection.getConfig(0, 60) ?? connection.getConfig(0, 57)
      expect(bytes !== undefined, 'a config space', 'an empty payload')
      expectEqual('unused0', bytes[33] ?? 0, 0)
      for (const byte of bytes.subarray(57)) expectEqual('unused1', byte, 0)
      return 'all 0'
    }
  ),
  blkCase(
    {
      id: 'blk-config-queues',
      level: 'MUST',
      rule: 'says in num_queues how many queues it has, at least one',
      cites: 'virtio 1.3 §5.2.4, §5.2.5',
      needs: { features: [VIRTIO_BLK_F_MQ] },
    },
    ({ config }) => {
      expect((config.numQueues ?? 0) >= 1, 'at least 1', `${config.numQueues}`)
      return `${config.numQueues}`
    }
  ),
]

const requestCases: readonly ConformanceCase[] = [
  blkCase(
    { id: 'blk-read', level: 'MUST', rule: 'reads the same bytes whatever the size of the request', cites: OPERATION },
    ({ requests, blockSize, capacity }) => {
      const bytes = Math.floor(Math.min(65536, capacity * 512) / blockSize) * blockSize
      const whole = requests.read(0, bytes)
      for (let at = 0; at < bytes; at += blockSize)
        expectBytes(`the block at ${at}`, requests.read(at / 512, blockSize), whole.subarray(at, at + blockSize))
      return `${bytes} bytes at once and in ${bytes / blockSize} blocks`
    }
  ),
  blkCase(
    { id: 'blk-read-last', level: 'MUST', rule: 'reads the last block of the disk', cites: `${OPERATION}, §5.2.4` },
    ({ requests, blockSize, capacity }) => {
      requests.read(capacity - blockSize / 512, blockSize)
      return `sector ${capacity - blockSize / 512}`
    }
  ),
  blkCase(
    {
      id: 'blk-read-long',
      level: 'MUST',
      rule: 'reads a MiB in one request, or as much as seg_max and size_max allow',
      cites: `${OPERATION}, §5.2.4`,
    },
    ({ requests, config, blockSize, capacity }) => {
      const segments = Math.min(config.segMax ?? 1, 64)
      const most = Math.min(2 ** 20, capacity * 512, segments * (config.sizeMax || 2 ** 20))
      const bytes = Math.floor(most / blockSize) * blockSize
      const piece = config.sizeMax ? Math.min(config.sizeMax, bytes) : bytes
      const cuts: number[] = []
      for (let left = bytes; left > 0; left -= piece) cuts.push(Math.min(left, piece))
      const request = requests.run(VIRTIO_BLK_T_IN, 0, NOTHING, bytes, { writable: [...cuts, 1] })
      expectStatus(request, OK, `a read of ${bytes} bytes`)
      return `${bytes} bytes`
    }
  ),
  blkCase(
    {
      id: 'blk-seg-max',
      level: 'MUST',
      rule: 'takes requests of as many data segments as seg_max says',
      cites: 'virtio 1.3 §5.2.4 (seg_max)',
      needs: { features: [VIRTIO_BLK_F_SEG_MAX] },
    },
    ({ config, blockSize }, context) => {
      const segMax = Math.min(config.segMax ?? 1, 1000)
      const guest = context.guest()
      const { requests } = guest.start(0, { size: 1024 })
      const bytes = Math.ceil(segMax / blockSize) * blockSize
      const cuts = [...new Array<number>(segMax - 1).fill(1), bytes - segMax + 1]
      const request = requests.run(VIRTIO_BLK_T_IN, 0, NOTHING, bytes, { writable: [...cuts, 1] })
      expectStatus(request, OK, `a read into ${segMax} segments`)
      return `${segMax} segments`
    }
  ),
  blkCase(
    {
      id: 'blk-used-length',
      level: 'SHOULD',
      rule: 'says in the used length what it wrote: data and status of a read, the status alone of a flush',
      cites: 'virtio 1.3 §2.7.8, §5.2.6',
    },
    ({ requests, blockSize }, context) => {
      const read = requests.run(VIRTIO_BLK_T_IN, 0, NOTHING, 4 * blockSize)
      expectEqual('the used length of a read of 4 blocks', read.written, 4 * blockSize + 1)
      if (context.has(VIRTIO_BLK_F_FLUSH))
        expectEqual('the used length of a flush', requests.run(VIRTIO_BLK_T_FLUSH, 0, NOTHING, 0).written, 1)
      const id = requests.run(VIRTIO_BLK_T_GET_ID, 0, NOTHING, VIRTIO_BLK_ID_BYTES)
      if (id.status === VIRTIO_BLK_S_OK) expectEqual('the used length of GET_ID', id.written, VIRTIO_BLK_ID_BYTES + 1)
      return 'as written'
    }
  ),
  blkCase(
    {
      id: 'blk-flush',
      level: 'MUST',
      rule: 'answers a flush with OK when it offers FLUSH',
      cites: OPERATION,
      needs: { features: [VIRTIO_BLK_F_FLUSH] },
    },
    ({ requests }) => {
      expectStatus(requests.run(VIRTIO_BLK_T_FLUSH, 0, NOTHING, 0), OK, 'a flush')
      return 'OK'
    }
  ),
  blkCase(
    {
      id: 'blk-get-id',
      level: 'MUST',
      rule: 'answers GET_ID with 20 bytes: a string of ASCII, padded with NUL',
      cites: OPERATION,
    },
    ({ requests }) => {
      const request = requests.run(VIRTIO_BLK_T_GET_ID, 0, NOTHING, VIRTIO_BLK_ID_BYTES)
      expectStatus(request, OK, 'GET_ID')
      const end = request.data.indexOf(0)
      const text = Buffer.from(end < 0 ? request.data : request.data.subarray(0, end)).toString('latin1')
      expect(/^[\x20-\x7e]*$/.test(text), 'printable ASCII', JSON.stringify(text))
      const rest = end < 0 ? NOTHING : request.data.subarray(end)
      expect(
        rest.every((byte) => byte === 0),
        'NUL up to the 20th byte',
        `${rest.filter((byte) => byte !== 0).length} bytes that are not`
      )
      return JSON.stringify(text)
    }
  ),
  blkCase(
    {
      id: 'blk-unknown-type',
      level: 'MUST',
      rule: 'answers requests of an unknown type with UNSUPP',
      cites: `${OPERATION} ("VIRTIO_BLK_S_UNSUPP for a request unsupported by device")`,
    },
    ({ requests }) => {
      for (const type of [5, 9, 0x1234, 0x8000_0000, 0x8000_0004, 0xffff_ffff]) {
        const what = `type 0x${type.toString(16)}`
        expectStatus(requests.run(type, 0, NOTHING, 0), UNSUPP, what)
        expectStatus(requests.run(type, 0, NOTHING, 512), UNSUPP, `${what} with 512 bytes to write`)
      }
      return 'UNSUPP for 6 types'
    }
  ),
  blkCase(
    {
      id: 'blk-type-not-offered',
      level: 'MUST',
      rule: 'answers DISCARD, WRITE_ZEROES, SECURE_ERASE and GET_LIFETIME with UNSUPP where it does not offer them',
      cites: OPERATION,
    },
    ({ requests }, context) => {
      const tried: string[] = []
      for (const [name, type, feature] of [
        ['DISCARD', VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_F_DISCARD],
        ['WRITE_ZEROES', VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_F_WRITE_ZEROES],
        ['SECURE_ERASE', VIRTIO_BLK_T_SECURE_ERASE, VIRTIO_BLK_F_SECURE_ERASE],
        ['GET_LIFETIME', VIRTIO_BLK_T_GET_LIFETIME, VIRTIO_BLK_F_LIFETIME],
      ] as const) {
        if (context.has(feature)) continue
        // A range of no sectors: nothing is lost by whoever takes it after all.
        const out = name === 'GET_LIFETIME' ? NOTHING : rangeBytes([{ sector: 0, sectors: 0 }])
        expectStatus(requests.run(type, 0, out, name === 'GET_LIFETIME' ? 8 : 0), UNSUPP, name)
        tried.push(name)
      }
      applicable(tried.length > 0, 'it offers all of them')
      return tried.join(', ')
    }
  ),
  blkCase(
    {
      id: 'blk-zone-requests',
      level: 'MUST',
      rule: 'rejects zone requests with UNSUPP when ZONED is not negotiated',
      cites: DEVICE,
    },
    ({ requests }, context) => {
      applicable(!context.has(VIRTIO_BLK_F_ZONED), 'it offers ZONED, which this suite does not negotiate on its own')
      // APPEND, REPORT, OPEN, CLOSE, FINISH.
      for (const type of [15, 16, 18, 20, 22]) expectStatus(requests.run(type, 0, NOTHING, 64), UNSUPP, `type ${type}`)
      return 'UNSUPP for 5 types'
    }
  ),
  blkCase(
    {
      id: 'blk-beyond-end',
      level: 'MUST',
      rule: 'answers reads beyond its capacity with IOERR, also where sector and length overflow',
      cites: `${OPERATION} ("VIRTIO_BLK_S_IOERR for device or driver error"), §5.2.6.1`,
    },
    ({ requests, blockSize, capacity }) => {
      const IOERR = [VIRTIO_BLK_S_IOERR]
      const perBlock = blockSize / 512
      expectStatus(requests.run(VIRTIO_BLK_T_IN, capacity, NOTHING, blockSize), IOERR, 'the block after the last')
      const across = requests.run(VIRTIO_BLK_T_IN, capacity - perBlock, NOTHING, 2 * blockSize)
      expectStatus(across, IOERR, 'the last block and the one after it')
      for (const sector of WILD_SECTORS)
        expectStatus(requests.run(VIRTIO_BLK_T_IN, sector, NOTHING, blockSize), IOERR, `sector ${sector}`)
      return `IOERR for ${2 + WILD_SECTORS.length} places`
    }
  ),
  blkCase(
    {
      id: 'blk-error-used-length',
      level: 'MUST',
      rule: 'does not claim in the used length of a failed read to have written data that it did not write',
      cites: 'virtio 1.3 §2.7.8.2 ("MUST write at least len bytes … beginning at the first device-writable buffer")',
    },
    ({ requests, blockSize, capacity }) => {
      const request = requests.run(VIRTIO_BLK_T_IN, capacity, NOTHING, blockSize)
      expectStatus(request, FAILED, 'a read beyond the end')
      const claimed = Math.min(request.written, blockSize)
      const untouched = request.data.subarray(0, claimed).filter((byte) => byte === STATUS_UNTOUCHED).length
      // One byte may be the status alone, counted as what it is: no driver takes it for data.
      const honest = claimed <= 1 || untouched < claimed
      expect(honest, 'a length of what was written', `${request.written} bytes, of which ${untouched} are as they were`)
      return `used length ${request.written}`
    }
  ),
  blkCase(
    {
      id: 'blk-partial-sector',
      level: 'SHOULD',
      rule: 'does not answer a read of 100 or 513 bytes with OK',
      cites: 'virtio 1.3 §5.2.6.1 ("The length of data MUST be a multiple of 512 bytes")',
    },
    ({ ring, requests }) => {
      for (const length of [100, 513]) {
        const request = requests.submit(VIRTIO_BLK_T_IN, 0, NOTHING, length)
        requests.wait(request, 1000)
        expectStatus(request, FAILED, `a read of ${length} bytes`)
      }
      ring.run(1, {}, 'a request after it')
      return 'refused'
    }
  ),
  blkCase(
    {
      id: 'blk-no-data',
      level: 'SHOULD',
      rule: 'answers a read of no data',
      cites: OPERATION,
    },
    ({ requests }) => {
      const request = requests.run(VIRTIO_BLK_T_IN, 0, NOTHING, 0)
      expectStatus(request, [VIRTIO_BLK_S_OK, VIRTIO_BLK_S_IOERR], 'a read of no data')
      return statusName(request.status)
    }
  ),
  blkCase(
    {
      id: 'blk-reserved-field',
      level: 'SHOULD',
      rule: 'ignores the reserved field of a request’s header',
      cites: `${OPERATION} (le32 reserved)`,
    },
    ({ requests, blockSize, firstBlock }) => {
      const readable = header(VIRTIO_BLK_T_IN)
      readable.fill(0xff, 4, 8)
      const request = requests.submitRaw(VIRTIO_BLK_T_IN, readable, [16], [blockSize, 1])
      requests.wait(request)
      expectStatus(request, OK, 'a read with reserved = 0xffffffff')
      expectBytes('its data', request.data, firstBlock)
      return 'ignored'
    }
  ),
  blkCase(
    {
      id: 'blk-no-status',
      level: 'SHOULD',
      rule: 'returns a chain that has no room for the status, instead of keeping its descriptors for ever',
      cites: 'virtio 1.3 §5.2.6; §2.7.14 (the driver gets its descriptors back by the used ring alone)',
    },
    (one) => expectReturned(one, header(VIRTIO_BLK_T_IN), [16], [])
  ),
  blkCase(
    {
      id: 'blk-short-header',
      level: 'SHOULD',
      rule: 'returns a chain whose header is cut short, and does not take it for a request',
      cites: 'virtio 1.3 §5.2.6; §2.7.14',
    },
    (one) => expectReturned(one, header(VIRTIO_BLK_T_IN).subarray(0, 8), [8], [512, 1])
  ),
  blkCase(
    {
      id: 'blk-no-header',
      level: 'SHOULD',
      rule: 'returns a chain of device-writable descriptors alone, and does not take it for a request',
      cites: 'virtio 1.3 §5.2.6; §2.7.14',
    },
    (one) => expectReturned(one, NOTHING, [], [512, 1])
  ),
  blkCase(
    {
      id: 'blk-read-only-write',
      level: 'MUST',
      rule: 'answers writes with IOERR when it offers RO',
      cites: DEVICE,
      needs: { features: [VIRTIO_BLK_F_RO] },
    },
    ({ requests, firstBlock }) => {
      // The bytes that are there: nothing is lost by whoever writes after all.
      expectStatus(requests.run(VIRTIO_BLK_T_OUT, 0, firstBlock, 0), [VIRTIO_BLK_S_IOERR], 'a write')
      return 'IOERR'
    }
  ),
  blkCase(
    {
      id: 'blk-lifetime',
      level: 'MUST',
      rule: 'sends no reserved values in the answer to GET_LIFETIME',
      cites: DEVICE,
      needs: { features: [VIRTIO_BLK_F_LIFETIME] },
    },
    ({ requests }) => {
      const request = requests.run(VIRTIO_BLK_T_GET_LIFETIME, 0, NOTHING, 6)
      expectStatus(request, OK, 'GET_LIFETIME')
      const [end = 0, a = 0, b = 0] = new Uint16Array(request.data.slice(0, 6).buffer)
      expect(end <= 3 && a <= 11 && b <= 11, 'pre_eol_info ≤ 3, estimates ≤ 11', `${end}, ${a}, ${b}`)
      return `${end}, ${a}, ${b}`
    }
  ),
]

export const blkCases: readonly ConformanceCase[] = [...configCases, ...requestCases]

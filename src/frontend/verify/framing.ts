/**
 * Cases about message framing: a device must not assume where descriptors begin and end (virtio 1.3 §2.7.4). Each framing is a
 * case of its own, read and (where the disk allows it) written, direct and in an indirect table.
 */
import { VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT } from '../../virtio/blk.ts'
import { VIRTIO_F_INDIRECT_DESC } from '../../virtio/constants.ts'
import type { VerifyCase, VerifyContext } from './case.ts'
import { must, mustEqual, mustStatus } from './case.ts'

const NOTHING = new Uint8Array(0)

interface Shape {
  readonly name: string
  readonly title: string
  /** Cuts of the readable stream of a read (16 bytes) and of the writable stream (data + status). */
  readonly read?: (data: number) => { readonly readable?: number[]; readonly writable?: number[] }
  /** Cuts of the readable stream of a write (16 + data bytes) and of the writable stream (the status). */
  readonly write?: (data: number) => { readonly readable?: number[]; readonly writable?: number[] }
}

const SHAPES: readonly Shape[] = [
  {
    name: 'header-halves',
    title: 'the header in two descriptors',
    read: () => ({ readable: [8, 8] }),
    write: (data) => ({ readable: [8, 8, data] }),
  },
  {
    name: 'header-uneven',
    title: 'the header in descriptors of 1, 3 and 12 bytes',
    read: () => ({ readable: [1, 3, 12] }),
    write: (data) => ({ readable: [1, 3, 12, data] }),
  },
  {
    name: 'header-bytes',
    title: 'the header byte by byte',
    read: () => ({ readable: new Array<number>(16).fill(1) }),
    write: (data) => ({ readable: [...new Array<number>(16).fill(1), data] }),
  },
  {
    name: 'header-with-data',
    title: 'header and data in one descriptor',
    write: (data) => ({ readable: [16 + data] }),
  },
  {
    name: 'header-with-part-of-data',
    title: 'the header together with the first bytes of the data, the rest apart',
    write: (data) => ({ readable: [16 + 100, data - 100] }),
  },
  {
    name: 'header-part-with-data',
    title: 'the end of the header together with the data',
    write: (data) => ({ readable: [10, 6 + data] }),
  },
  {
    name: 'status-with-data',
    title: 'the status byte at the end of the data descriptor',
    read: (data) => ({ writable: [data + 1] }),
  },
  {
    name: 'status-with-tail',
    title: 'the status byte in a descriptor with the last bytes of the data',
    read: (data) => ({ writable: [data - 100, 101] }),
  },
  {
    name: 'data-odd',
    title: 'data in descriptors of odd lengths',
    read: (data) => ({ writable: [1, 510, 7, data - 518, 1] }),
    write: (data) => ({ readable: [16, 1, 510, 7, data - 518] }),
  },
  {
    name: 'everything-odd',
    title: 'header, data and status cut where it is least expected',
    read: (data) => ({ readable: [15, 1], writable: [3, data - 4, 2] }),
    write: (data) => ({ readable: [15, 2, data - 1] }),
  },
]

function shapeCase(shape: Shape): VerifyCase {
  return {
    name: `framing/${shape.name}`,
    title: shape.title,
    spec: 'virtio 1.3 §2.7.4',
    writes: shape.read === undefined,
    run: (context) => {
      const { blk } = context.open()
      const bytes = 4 * context.facts.blockSize
      const random = context.random(shape.name.length)
      for (const indirect of context.has(VIRTIO_F_INDIRECT_DESC) ? [false, true] : [false]) {
        const how = indirect ? ' (indirect)' : ''
        if (shape.read) {
          const expected = blk.read(context.sector(), bytes)
          const request = blk.run(VIRTIO_BLK_T_IN, context.sector(), NOTHING, bytes, { ...shape.read(bytes), indirect })
          mustStatus(request, [VIRTIO_BLK_S_OK], `read${how}`)
          mustEqual(request.data, expected, `read${how}`)
          must(
            request.written === bytes + 1,
            `read${how}: the used length is ${request.written} instead of ${bytes + 1}`
          )
        }
        if (shape.write && !context.facts.readOnly) {
          const data = random.bytes(bytes)
          const request = blk.run(VIRTIO_BLK_T_OUT, context.sector(), data, 0, { ...shape.write(bytes), indirect })
          mustStatus(request, [VIRTIO_BLK_S_OK], `write${how}`)
          mustEqual(blk.read(context.sector(), bytes), data, `data written${how}`)
        }
      }
    },
  }
}

/** A chain that is no request. The device may say IOERR or nothing, but it must give the head back. */
function brokenChain(
  context: VerifyContext,
  what: string,
  readable: Uint8Array,
  readableCuts: number[],
  writableCuts: number[]
): void {
  const { blk } = context.open()
  const request = blk.submitRaw(VIRTIO_BLK_T_IN, readable, readableCuts, writableCuts)
  blk.wait(request, Math.min(2000, context.timeoutMs))
  if (writableCuts.length > 0) must(request.status !== VIRTIO_BLK_S_OK, `${what}: answered OK`)
  context.mustWork(blk, `after ${what}`)
}

function header(type: number, sector: number): Uint8Array {
  const bytes = new Uint8Array(16)
  const view = new DataView(bytes.buffer)
  view.setUint32(0, type, true)
  view.setBigUint64(8, BigInt(sector), true)
  return bytes
}

export const framingCases: readonly VerifyCase[] = [
  ...SHAPES.map(shapeCase),
  {
    name: 'framing/no-data',
    title: 'a read of no data is answered',
    spec: 'virtio 1.3 §5.2.6',
    run: (context) => {
      const { blk } = context.open()
      const request = blk.run(VIRTIO_BLK_T_IN, context.sector(), NOTHING, 0)
      mustStatus(request, [VIRTIO_BLK_S_OK, VIRTIO_BLK_S_IOERR], 'read of no data')
      context.mustWork(blk, 'after it')
    },
  },
  {
    name: 'framing/no-status',
    title: 'a request without room for a status comes back',
    spec: 'virtio 1.3 §2.7.14: a device returns every buffer it was given',
    run: (context) =>
      brokenChain(context, 'a chain without a status byte', header(VIRTIO_BLK_T_IN, context.sector()), [16], []),
  },
  {
    name: 'framing/short-header',
    title: 'a request with a header of 8 bytes comes back',
    spec: 'virtio 1.3 §2.7.14; §5.2.6',
    run: (context) =>
      brokenChain(
        context,
        'a header of 8 bytes',
        header(VIRTIO_BLK_T_IN, context.sector()).subarray(0, 8),
        [8],
        [512, 1]
      ),
  },
  {
    name: 'framing/no-header',
    title: 'a request of device-writable descriptors only comes back',
    spec: 'virtio 1.3 §2.7.14; §5.2.6',
    run: (context) => brokenChain(context, 'a chain without a header', NOTHING, [], [512, 1]),
  },
  {
    name: 'framing/read-into-readable',
    title: 'a read whose data descriptor is device-readable changes nothing and comes back',
    spec: 'virtio 1.3 §5.2.6',
    run: (context) => {
      const { blk } = context.open()
      const readable = new Uint8Array(16 + 512).fill(0x77)
      readable.set(header(VIRTIO_BLK_T_IN, context.sector()))
      const request = blk.submitRaw(VIRTIO_BLK_T_IN, readable, [16, 512], [1])
      blk.wait(request, Math.min(2000, context.timeoutMs))
      context.mustWork(blk, 'after it')
    },
  },
]

/**
 * One thing that any device of a kind does when it is asked on a ring, so that the cases about rings need not know
 * disks from network cards: a disk reads its first block, a network card transmits a frame. Pure; it must not know
 * rings.
 */
import {
  VIRTIO_BLK_HEADER_SIZE,
  VIRTIO_BLK_S_OK,
  VIRTIO_BLK_T_FLUSH,
  VIRTIO_BLK_T_IN,
  VIRTIO_BLK_T_OUT,
} from '../../virtio/blk.ts'
import { type BlkRequest, statusName, writeHeader } from '../blk.ts'
import { headerSizeOf } from '../net-features.ts'
import { encodeNetHeader } from '../net-frames.ts'
import { expect, expectBytes, expectEqual } from './case.ts'

export interface Operation {
  /** What the device reads. */
  readonly readable: Uint8Array
  /** Bytes that it may write; the last one is a disk's status. */
  readonly writable: number
  /** @throws Violation when the device did not do what it had to */
  check(done: BlkRequest, what: string): void
}

/**
 * Reads from the start of the disk. @param length bytes, of whole blocks @param expected what is there, when it is
 * known
 */
export function diskRead(length: number, expected?: Uint8Array): Operation {
  const readable = new Uint8Array(VIRTIO_BLK_HEADER_SIZE)
  writeHeader(readable, VIRTIO_BLK_T_IN, 0)
  return {
    readable,
    writable: length + 1,
    check: (done, what) => {
      expectEqual(`${what}: status`, statusName(done.status), statusName(VIRTIO_BLK_S_OK))
      expectNotMore(what, done, length + 1)
      if (expected !== undefined) expectBytes(`${what}: data`, done.data, expected)
    },
  }
}

/** Writes. @param sector of 512 bytes @param data of whole blocks */
export function diskWrite(sector: number, data: Uint8Array): Operation {
  const readable = new Uint8Array(VIRTIO_BLK_HEADER_SIZE + data.length)
  writeHeader(readable, VIRTIO_BLK_T_OUT, sector)
  readable.set(data, VIRTIO_BLK_HEADER_SIZE)
  return {
    readable,
    writable: 1,
    check: (done, what) => {
      expectEqual(`${what}: status of the write`, statusName(done.status), statusName(VIRTIO_BLK_S_OK))
      expectNotMore(what, done, 1)
    },
  }
}

/** Flushes: what takes its time, after writes, where a page cache serves reads at once. */
export function diskFlush(): Operation {
  const readable = new Uint8Array(VIRTIO_BLK_HEADER_SIZE)
  writeHeader(readable, VIRTIO_BLK_T_FLUSH, 0)
  return {
    readable,
    writable: 1,
    check: (done, what) => {
      expectEqual(`${what}: status of the flush`, statusName(done.status), statusName(VIRTIO_BLK_S_OK))
      expectNotMore(what, done, 1)
    },
  }
}

/** EtherType "local experimental 1" (IEEE 802), to an address that nobody has: whoever gets it drops it. */
const FRAME_TYPE = 0x88b5
const FRAME_BYTES = 60

/**
 * A frame with a number in it. @param length at least 18 @param broadcast to everybody, so that nobody filters it out
 */
export function testFrame(number: number, length = FRAME_BYTES, broadcast = false): Uint8Array {
  const frame = new Uint8Array(length)
  frame.set([0x02, 0x00, 0x5e, 0x99, 0x00, 0x02, 0x02, 0x00, 0x5e, 0x99, 0x00, 0x01])
  if (broadcast) frame.fill(0xff, 0, 6)
  const view = new DataView(frame.buffer)
  view.setUint16(12, FRAME_TYPE)
  view.setUint32(14, number)
  for (let i = 18; i < length; i++) frame[i] = i * 7 + number
  return frame
}

/** Whether a frame is one of {@link testFrame}'s, and which. */
export function testFrameNumber(frame: Uint8Array): number | undefined {
  if (frame.length < 18) return undefined
  const view = new DataView(frame.buffer, frame.byteOffset, frame.byteLength)
  return view.getUint16(12) === FRAME_TYPE ? view.getUint32(14) : undefined
}

/** Transmits one frame. */
export function frameTransmission(features: bigint): Operation {
  const header = encodeNetHeader({}, headerSizeOf(features))
  const frame = testFrame(0)
  const readable = new Uint8Array(header.length + frame.length)
  readable.set(header)
  readable.set(frame, header.length)
  return {
    readable,
    writable: 0,
    check: (done, what) => expectNotMore(what, done, 0),
  }
}

/** virtio 1.3 §2.7.8.2: the device wrote at least as many bytes as it says; it may say less. */
function expectNotMore(what: string, { written }: BlkRequest, room: number): void {
  expect(written <= room, `${what}: a used length of at most ${room}`, `${written}`)
}

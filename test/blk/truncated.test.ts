/** The image under a running daemon is cut and grows again: reads come out of a mapping of it, which must not lie. */
import { readFileSync, truncateSync } from 'node:fs'
import { afterAll, beforeAll, expect, it } from 'vitest'
import { VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN } from '../../src/virtio/blk.ts'
import { Backend, MIB, open, pattern } from '../vhost-user/backend.ts'

let backend: Backend
beforeAll(() => {
  backend = Backend.start({ imageBytes: 4 * MIB })
})
afterAll(async () => {
  await backend[Symbol.asyncDispose]()
})

it('answers IOERR for what is gone, the data for what is not, and goes on when it is back', () => {
  using opened = open(backend.socket)
  const { blk } = opened
  const data = pattern(64 * 1024)
  const NONE = new Uint8Array(0)
  const read = (sector: number) => blk.run(VIRTIO_BLK_T_IN, BigInt(sector), NONE, data.length)
  const last = (4 * MIB - data.length) / 512
  blk.write(0, data)
  blk.write(last, data)
  blk.flush()
  // Both have been read through the mapping now.
  expect(Buffer.from(blk.read(0, data.length)).equals(data)).toBe(true)
  expect(Buffer.from(blk.read(last, data.length)).equals(data)).toBe(true)
  truncateSync(backend.images[0]!, 2 * MIB)
  for (let i = 0; i < 3; i++) {
    expect(read(last).status).toBe(VIRTIO_BLK_S_IOERR)
    expect(Buffer.from(blk.read(0, data.length)).equals(data)).toBe(true)
  }
  // A small write is a copy into the mapping, beyond the end of the file: not lost, but written the slow way, which
  // makes the file grow, as it does for every back-end.
  const block = data.subarray(0, 4096)
  blk.write(last, block)
  expect(Buffer.from(blk.read(last, 4096)).equals(block)).toBe(true)
  expect(
    readFileSync(backend.images[0]!)
      .subarray(last * 512)
      .equals(block)
  ).toBe(true)
  truncateSync(backend.images[0]!, 2 * MIB)
  truncateSync(backend.images[0]!, 4 * MIB)
  expect(read(last).status).toBe(VIRTIO_BLK_S_OK)
  expect(blk.read(last, data.length).every((byte) => byte === 0)).toBe(true)
  blk.write(last, data)
  expect(Buffer.from(blk.read(last, data.length)).equals(data)).toBe(true)
  expect(backend.alive).toBe(true)
})

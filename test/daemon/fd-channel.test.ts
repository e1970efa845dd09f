/** Messages with fds over a real socket pair, both ends in this process. */
import { closeSync, fstatSync, openSync, readdirSync, writeSync } from 'node:fs'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { native } from '../../src/native.ts'
import { closeFds, FdChannel } from '../../src/vhost-user/fd-channel.ts'
import { framesOf, MAX_FRAME_BYTES, MAX_FRAME_FDS } from '../../src/vhost-user/fd-frames.ts'

let near: FdChannel
let far: FdChannel
let farFd: number
let before: number
const open = (): number => readdirSync('/proc/self/fd').length

beforeEach(() => {
  // The watcher of fds stays open once it has been used.
  const first = FdChannel.pair()
  first.channel.close()
  closeFds([first.fd])
  before = open()
  const { channel, fd } = FdChannel.pair()
  near = channel
  farFd = fd
  far = new FdChannel(fd)
})

afterEach(() => {
  near.close()
  far.close()
  expect(open()).toBe(before)
})

describe('messages', () => {
  test('arrive one by one, in order', async () => {
    for (const body of [{ a: 1 }, 'text', [], null]) expect(await near.send(body)).toBe(true)
    for (const body of [{ a: 1 }, 'text', [], null]) expect(await far.receive()).toEqual({ body, fds: [] })
  })

  test('of many frames, while the other end reads', async () => {
    const body = { text: 'é'.repeat(3 * MAX_FRAME_BYTES) }
    const sent = near.send(body)
    expect((await far.receive())?.body).toEqual(body)
    expect(await sent).toBe(true)
  })

  test('bring the same files along, more than a frame can carry', async () => {
    const files = Array.from({ length: 150 }, (_, i) => openSync(i % 2 === 0 ? '/dev/null' : '/dev/zero', 'r'))
    const sent = near.send({ with: 'files' }, files)
    const received = await far.receive()
    expect(await sent).toBe(true)
    expect(received?.fds.map((fd) => fstatSync(fd).rdev)).toEqual(files.map((fd) => fstatSync(fd).rdev))
    closeFds(received!.fds)
    for (const fd of files) closeSync(fd)
  })

  test('frames are bounded', () => {
    const frames = framesOf(
      'x'.repeat(200_000),
      Array.from({ length: 200 }, (_, i) => i)
    )
    expect(Math.max(...frames.map(({ bytes }) => bytes.length))).toBeLessThanOrEqual(MAX_FRAME_BYTES + 12)
    expect(frames.map(({ fds }) => fds.length)).toEqual([MAX_FRAME_FDS, MAX_FRAME_FDS, MAX_FRAME_FDS, 8])
    expect(framesOf({}).length).toBe(1)
  })
})

describe('the end', () => {
  test('is seen by who waits, and who sends', async () => {
    const waiting = near.receive()
    far.close()
    expect(await waiting).toBeUndefined()
    expect(await near.send({})).toBe(false)
  })

  test('comes behind what was sent', async () => {
    await far.send({ last: true })
    far.close()
    expect((await near.receive())?.body).toEqual({ last: true })
    expect(await near.receive()).toBeUndefined()
  })

  test('in the middle of a message with files closes them', async () => {
    const file = openSync('/dev/null', 'r')
    const [frame] = framesOf('x'.repeat(2 * MAX_FRAME_BYTES), [file])
    const { bytes } = frame!
    const receiving = near.receive()
    expect(native.sendMessage(farFd, bytes, 0, bytes.length, Int32Array.of(file), 1, false)).toBe(bytes.length)
    await new Promise((resolve) => setTimeout(resolve, 20))
    far.close()
    expect(await receiving).toBeUndefined()
    closeSync(file)
  })

  test('a close of our own ends what waits', async () => {
    const waiting = near.receive()
    near.close()
    expect(await waiting).toBeUndefined()
    expect(await near.send({})).toBe(false)
  })
})

test.each([
  ['a frame that is too long', [0xff, 0xff, 0xff, 0x7f, 0, 0, 0, 0, 0, 0, 0, 0]],
  ['fds that are not there', [2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0x7b, 0x7d]],
  ['no JSON', [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x78]],
])('%s is an error', async (_, bytes) => {
  writeSync(farFd, Uint8Array.from(bytes))
  await expect(near.receive()).rejects.toThrow()
})

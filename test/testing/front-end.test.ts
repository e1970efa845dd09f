/** The front-end and the daemon of virtiod/testing, against the device that is there in any case: a disk. */
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { connect, FrontendError, startVirtiod, UNTOUCHED, VirtiodError, type VirtiodProcess } from 'virtiod/testing'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'

const dir = mkdtempSync(join(tmpdir(), 'virtiod-testing-'))
const socketPath = join(dir, 's')
const image = join(dir, 'disk.img')
let daemon: VirtiodProcess

const MIB = 2 ** 20
const IN = 0
const OUT = 1
const FLUSH = 4

/** struct virtio_blk_req's header. */
function header(type: number, sector = 0): Uint8Array {
  const view = new DataView(new ArrayBuffer(16))
  view.setUint32(0, type, true)
  view.setBigUint64(8, BigInt(sector), true)
  return new Uint8Array(view.buffer)
}

function pattern(length: number): Uint8Array {
  return Uint8Array.from({ length }, (_, i) => (i * 7 + (i >> 8)) & 0xff)
}

beforeAll(async () => {
  writeFileSync(image, '')
  truncateSync(image, 16 * MIB)
  daemon = await startVirtiod(['blk', '--socket-path', 's', '--blk-file', image, '--num-queues', '4'], { cwd: dir })
})

afterAll(async () => {
  await daemon?.stop('SIGKILL')
  rmSync(dir, { recursive: true, force: true })
})

describe.each([
  ['split rings', {}],
  ['packed rings', { packed: true }],
  ['indirect tables', { indirect: true }],
  ['odd pieces', { split: true }],
  ['odd pieces in indirect tables of packed rings', { split: true, indirect: true, packed: true }],
])('requests by %s', (_, options) => {
  test('are done one after the other', () => {
    using front = connect(socketPath, options)
    const data = pattern(5120)
    const write = front.request(0, [header(OUT, 9), data], 1)
    expect(write).toEqual({ written: 1, bytes: Uint8Array.of(0) })
    const read = front.request(0, header(IN, 9), 5121)
    expect(read.written).toBe(5121)
    expect(Buffer.compare(read.bytes.subarray(0, 5120), data)).toBe(0)
    expect(read.bytes[5120]).toBe(0)
    expect(front.inFlight).toBe(0)
  })

  test('many at once, on several queues', () => {
    using front = connect(socketPath, { ...options, queues: 4, queueSize: 64 })
    const requests = Array.from({ length: 4 }, (_, i) => front.submit(i, [header(OUT, i * 8), pattern(4096)], 1))
    front.wait()
    expect(requests.map(({ reply }) => reply?.bytes[0])).toEqual([0, 0, 0, 0])
    expect(front.inFlight).toBe(0)
  })
})

test('memory of requests that are done is used again', () => {
  using front = connect(socketPath, { memoryMb: 2 })
  for (let i = 0; i < 40; i++) {
    const size = 512 * (1 + (i % 3) * 100)
    expect(front.request(0, [header(OUT), new Uint8Array(size)], 1).bytes).toEqual(Uint8Array.of(0))
  }
  expect(() => front.submit(0, [header(OUT), new Uint8Array(4 * MIB)], 1)).toThrow(RangeError)
  expect(front.request(0, header(FLUSH), 1).bytes).toEqual(Uint8Array.of(0))
})

test('bytes that the device leaves out are seen', () => {
  using front = connect(socketPath)
  // A request of an unknown type: nothing but the status, UNSUPP.
  const { bytes } = front.request(0, header(99), 513)
  expect(bytes[512]).toBe(2)
  expect(bytes.subarray(0, 512).every((byte) => byte === UNTOUCHED)).toBe(true)
})

test('features and the config space', () => {
  const VIRTIO_BLK_F_FLUSH = 9
  {
    using front = connect(socketPath)
    expect(front.has(VIRTIO_BLK_F_FLUSH)).toBe(true)
    expect(front.maxQueues).toBe(4)
    expect(Buffer.from(front.config(0, 8)).readBigUInt64LE()).toBe(BigInt((16 * MIB) / 512))
    expect(front.config()).toHaveLength(256)
    // Byte 32 is the write cache, which a driver may switch; the capacity is not its to change.
    front.writeConfig(32, Uint8Array.of(0))
    expect(front.config(32, 1)).toEqual(Uint8Array.of(0))
    expect(() => front.writeConfig(0, new Uint8Array(8))).toThrow(FrontendError)
  }
  using front = connect(socketPath, { withoutFeatures: [VIRTIO_BLK_F_FLUSH] })
  expect(front.has(VIRTIO_BLK_F_FLUSH)).toBe(false)
})

test('a config change is waited for', () => {
  using front = connect(socketPath)
  expect(front.configChanges).toBe(0)
  expect(front.waitForConfigChange(1)).toBe(false)
  truncateSync(image, 32 * MIB)
  daemon.kill('SIGHUP')
  expect(front.waitForConfigChange()).toBe(true)
  expect(front.configChanges).toBe(1)
  expect(Buffer.from(front.config(0, 8)).readBigUInt64LE()).toBe(BigInt((32 * MIB) / 512))
})

test('empty requests, unknown queues and full rings are refused', () => {
  using front = connect(socketPath, { queueSize: 4 })
  expect(() => front.submit(0, [])).toThrow('a request has to have bytes')
  expect(() => front.submit(1, header(FLUSH), 1)).toThrow('virtqueue 1 was not started')
  expect(() =>
    front.submit(
      0,
      Array.from({ length: 5 }, () => header(FLUSH)),
      1
    )
  ).toThrow('no 6 free descriptors')
  expect(front.request(0, header(FLUSH), 1).written).toBe(1)
})

test('what is in flight is answered when the rings stop', () => {
  using front = connect(socketPath)
  const request = front.submit(0, header(FLUSH), 1)
  front.stop()
  expect(request.reply?.written).toBe(1)
})

test('connecting where nobody listens', () => {
  expect(() => connect(join(dir, 'nobody'))).toThrow(/cannot connect to .*nobody: ENOENT/)
})

describe('the daemon', () => {
  test('tells where it listens and what it has logged', async () => {
    expect(daemon.socketPaths).toEqual([socketPath])
    await daemon.printed('"msg":"ready"')
    expect(daemon.lines.some((line) => line['msg'] === 'ready' && line['pid'] === daemon.pid)).toBe(true)
  })

  test('that does not start is an error with what it printed', async () => {
    const failure = await startVirtiod([
      'blk',
      '--socket-path',
      join(dir, 'no'),
      '--blk-file',
      join(dir, 'no.img'),
    ]).catch((error: unknown) => error)
    expect(failure).toBeInstanceOf(VirtiodError)
    expect(failure).toMatchObject({ exitCode: 2, message: expect.stringContaining('--blk-file') })
  })

  test('of a configuration file is awaited by its log, and ends as it is told', async () => {
    const config = join(dir, 'virtiod.json')
    const devices = [{ type: 'blk', 'socket-path': join(dir, 'file.sock'), 'blk-file': image, lock: 'off' }]
    writeFileSync(config, JSON.stringify({ devices }))
    await using second = await startVirtiod(['run', config])
    using front = connect(join(dir, 'file.sock'))
    expect(front.request(0, header(FLUSH), 1).bytes).toEqual(Uint8Array.of(0))
    await expect(second.printed('no such line', 20)).rejects.toThrow('has not printed no such line yet')
    expect(await second.stop()).toEqual({ code: 0, signal: null })
    expect(second.log).toContain('"msg":"ready"')
    await expect(second.printed('no such line')).rejects.toThrow('ended without printing')
    expect(second.serves).toBe(false)
  })
})

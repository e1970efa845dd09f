/** The control half of the block device on real files: what it refuses, and the config space of what it takes. */
import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import {
  closeSync,
  ftruncateSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readlinkSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import * as v from 'valibot'
import { afterAll, afterEach, describe, expect, test } from 'vitest'
import definition from '../../devices/blk/index.ts'
import { blkOptions } from '../../devices/blk/options.ts'
import type { BlkQueueData } from '../../devices/blk/shared.ts'
import { BlkState } from '../../devices/blk/shared.ts'
import { ConfigError, type Device, type DeviceHost, type FileInfo } from '../../src/device/index.ts'
import { fileInfo, lockFile, probeFallocate } from '../../src/engine/files.ts'
import { networkHost } from '../../src/engine/network.ts'
import { native } from '../../src/native.ts'
import * as blk from '../../src/virtio/blk.ts'
import { featureSet, hasFeature } from '../../src/virtio/features.ts'
import { FakeHandover } from '../net/fake-network.ts'

const dir = mkdtempSync(join(tmpdir(), 'virtiod-blk-'))
afterAll(() => rmSync(dir, { recursive: true, force: true }))

const log: object[] = []
const note = (details: object) => void log.push(details)
const host = (change: Partial<DeviceHost> = {}): DeviceHost => ({
  log: { debug: note, info: note, warn: note, error: note },
  fileInfo,
  name: 'blk0',
  daemon: log,
  signal: new AbortController().signal,
  network: networkHost,
  send: () => {},
  lockFile,
  fallocate: probeFallocate,
  configChanged: () => {},
  handover: new FakeHandover(),
  ...change,
})
/** As fileInfo, with other answers. */
const like = (change: Partial<FileInfo>) => host({ fileInfo: (fd) => ({ ...fileInfo(fd), ...change }) })

let made = 0
function image(size = 1 << 20): string {
  const path = join(dir, `disk${made++}.img`)
  const fd = openSync(path, 'w')
  ftruncateSync(fd, size)
  closeSync(fd)
  return path
}

const devices: Device<BlkQueueData>[] = []
afterEach(() => {
  for (const device of devices.splice(0)) device.close()
  log.length = 0
})

async function open(options: Record<string, unknown>, withHost = host()): Promise<Device<BlkQueueData>> {
  const device = await definition.open(v.parse(blkOptions, options), withHost)
  devices.push(device)
  return device
}

/** What open() throws; it must leave no fd behind. */
async function refusal(options: Record<string, unknown>, withHost = host()): Promise<ConfigError> {
  const before = openFiles()
  const error = await open(options, withHost).then(
    () => undefined,
    (thrown: unknown) => thrown
  )
  expect(openFiles()).toEqual(before)
  if (!(error instanceof ConfigError)) throw new Error('no ConfigError', { cause: error })
  return error
}

const openFiles = () =>
  readdirSync('/proc/self/fd')
    .flatMap((fd) => {
      try {
        return readlinkSync(`/proc/self/fd/${fd}`)
      } catch {
        return []
      }
    })
    .filter((target) => target.startsWith(dir))

const config = (device: Device) => blk.decodeBlkConfig(device.config(), device.features)

describe('open refuses', () => {
  test('a file that does not exist', async () => {
    const path = join(dir, 'nothing.img')
    const error = await refusal({ 'blk-file': path })
    expect(error).toMatchObject({ code: 'ERR_BLK_FILE_OPEN', option: '--blk-file' })
    expect(error.message).toContain(`${path} does not exist`)
    expect(error.cause).toMatchObject({ code: 'ENOENT' })
  })

  test('a directory, writable and read-only', async () => {
    const path = join(dir, 'directory')
    mkdirSync(path)
    expect(await refusal({ 'blk-file': path })).toMatchObject({ code: 'ERR_BLK_FILE_OPEN', cause: { code: 'EISDIR' } })
    expect(await refusal({ 'blk-file': path, 'read-only': true })).toMatchObject({ code: 'ERR_BLK_FILE_KIND' })
  })

  test('a path through a file, with the system’s code', async () => {
    const error = await refusal({ 'blk-file': join(image(), 'x') })
    expect(error).toMatchObject({ code: 'ERR_BLK_FILE_OPEN', cause: { code: 'ENOTDIR' } })
    expect(error.message).toContain('ENOTDIR')
  })

  test.each(['/dev/null', '/dev/zero'])('%s', async (path) => {
    expect(await refusal({ 'blk-file': path })).toMatchObject({ code: 'ERR_BLK_FILE_KIND', option: '--blk-file' })
  })

  test('a socket', async () => {
    const path = join(dir, 'socket')
    const server = createServer().listen(path)
    await once(server, 'listening')
    expect(await refusal({ 'blk-file': path })).toMatchObject({ code: 'ERR_BLK_FILE_KIND' })
    server.close()
  })

  test('a FIFO', async () => {
    const path = join(dir, 'fifo')
    execFileSync('mkfifo', [path])
    expect(await refusal({ 'blk-file': path })).toMatchObject({ code: 'ERR_BLK_FILE_KIND' })
  })

  test('a FIFO with --read-only, without waiting for a writer', () => {
    const path = join(dir, 'fifo2')
    execFileSync('mkfifo', [path])
    // In a process of its own: opening it can block for ever.
    const program = `
      const { default: definition } = await import(${JSON.stringify(new URL('../../devices/blk/index.ts', import.meta.url).href)})
      const { fileInfo } = await import(${JSON.stringify(new URL('../../src/engine/files.ts', import.meta.url).href)})
      try {
        await definition.open({ 'blk-file': ${JSON.stringify(path)}, 'read-only': true, cache: 'writeback', 'num-queues': 1 }, { fileInfo, handover: { take() {} } })
      } catch (error) {
        process.stdout.write(error.code)
      }`
    const run = () =>
      execFileSync(process.execPath, ['--input-type=module', '-e', program], { encoding: 'utf8', timeout: 5000 })
    expect(run()).toBe('ERR_BLK_FILE_KIND')
  })

  test.each([
    [0, undefined, 'is empty', 'truncate -s 1G'],
    [511, undefined, 'no multiple of the block size 512', 'truncate -s %512'],
    [1000, undefined, 'no multiple of the block size 512', 'truncate -s %512'],
    [4096 + 512, 4096, 'no multiple of the block size 4096', 'truncate -s %4096'],
  ])('%d bytes with block size %s', async (size, blockSize, problem, fix) => {
    const error = await refusal({
      'blk-file': image(size),
      ...(blockSize === undefined ? {} : { 'block-size': blockSize }),
    })
    expect(error).toMatchObject({ code: 'ERR_BLK_FILE_SIZE', option: '--blk-file' })
    expect(error.message).toContain(problem)
    expect(error.message).toContain(fix)
  })

  test('a block size below the device’s', async () => {
    const error = await refusal({ 'blk-file': image(), 'block-size': 512 }, like({ blockSize: 4096 }))
    expect(error).toMatchObject({ code: 'ERR_BLK_BLOCK_SIZE', option: '--block-size' })
    expect(error.message).toContain('Give --block-size 4096')
  })

  test('a block size below what O_DIRECT demands, but only with it', async () => {
    const options = { 'blk-file': image(), 'block-size': 512 }
    const strict = like({ directOffsetAlign: 4096, directMemoryAlign: 512 })
    expect(await refusal({ ...options, cache: 'none' }, strict)).toMatchObject({ code: 'ERR_BLK_BLOCK_SIZE' })
    expect(config(await open(options, strict)).blkSize).toBe(512)
  })

  test('a file system without O_DIRECT', async () => {
    // procfs and sysfs have none; a file of the test's own would need such a mount.
    const error = await refusal({ 'blk-file': '/proc/self/status', 'read-only': true, cache: 'none' })
    expect(error).toMatchObject({ code: 'ERR_BLK_CACHE', option: '--cache', cause: { code: 'EINVAL' } })
  })

  test('discard on where holes cannot be punched; unset or off it just has none', async () => {
    const none = host({ fallocate: () => -95 })
    const path = image()
    expect(await refusal({ 'blk-file': path, discard: 'on' }, none)).toMatchObject({
      code: 'ERR_BLK_DISCARD',
      option: '--discard',
    })
    for (const options of [{}, { discard: 'off' }]) {
      const device = await open({ 'blk-file': path, ...options }, none)
      expect(hasFeature(device.features, blk.VIRTIO_BLK_F_DISCARD)).toBe(false)
      expect(config(device).writeZeroes?.mayUnmap).toBe(false)
      devices.pop()!.close()
    }
  })

  test('what the system cannot examine: its own error', async () => {
    const broken = host({
      fileInfo: () => {
        throw Object.assign(new Error('EIO'), { code: 'EIO' })
      },
    })
    const path = image()
    await expect(open({ 'blk-file': path }, broken)).rejects.toMatchObject({ code: 'EIO' })
    expect(openFiles()).toEqual([])
  })
})

describe('locks', () => {
  /** Another process with a lock on `path`, until it is disposed. */
  async function holder(path: string, exclusive: boolean): Promise<AsyncDisposable> {
    const program = `
      const { openSync } = await import('node:fs')
      const { native } = await import(${JSON.stringify(new URL('../../src/native.ts', import.meta.url).href)})
      const fd = openSync(${JSON.stringify(path)}, 'r+')
      process.stdout.write(String(native.lockFile(fd, ${exclusive})))
      process.stdin.resume()`
    const child = spawn(process.execPath, ['--input-type=module', '-e', program], {
      stdio: ['pipe', 'pipe', 'inherit'],
    })
    const [answer] = (await once(child.stdout, 'data')) as [Buffer]
    expect(answer.toString()).toBe('0')
    return {
      async [Symbol.asyncDispose]() {
        const exited = once(child, 'exit')
        child.stdin.end()
        await exited
      },
    }
  }

  test('a file that another process writes is refused, and is free when that ends', async () => {
    const path = image()
    {
      await using _ = await holder(path, true)
      for (const readOnly of [false, true]) {
        const error = await refusal({ 'blk-file': path, 'read-only': readOnly })
        expect(error).toMatchObject({ code: 'ERR_BLK_FILE_LOCKED', option: '--blk-file' })
      }
    }
    await open({ 'blk-file': path })
  })

  test('one whose other process is about to end is waited for', async () => {
    const path = image()
    const other = await holder(path, true)
    const opened = open({ 'blk-file': path })
    await new Promise((resolve) => setTimeout(resolve, 100))
    await other[Symbol.asyncDispose]()
    await opened
  })

  test('a file that another process reads can be read, not written', async () => {
    const path = image()
    await using _ = await holder(path, false)
    expect(await refusal({ 'blk-file': path })).toMatchObject({ code: 'ERR_BLK_FILE_LOCKED' })
    await open({ 'blk-file': path, 'read-only': true })
  })

  test('two devices of one process are two as well', async () => {
    const path = image()
    await open({ 'blk-file': path })
    await expect(open({ 'blk-file': path })).rejects.toMatchObject({ code: 'ERR_BLK_FILE_LOCKED' })
    devices.pop()!.close()
    await open({ 'blk-file': path, 'read-only': true })
    await open({ 'blk-file': path, 'read-only': true })
    await expect(open({ 'blk-file': path })).rejects.toMatchObject({ code: 'ERR_BLK_FILE_LOCKED' })
  })
})

describe('the config space', () => {
  test('of a plain image', async () => {
    const device = await open({ 'blk-file': image(3 << 20) })
    expect(device.config().length).toBe(60)
    expect(config(device)).toEqual({
      capacity: 6144n,
      sizeMax: 0x7fff_f000,
      segMax: 126,
      blkSize: 512,
      topology: { physicalBlockExp: 3, alignmentOffset: 0, minIoSize: 8, optIoSize: 0 },
      wce: 1,
      numQueues: 16,
      discard: { maxSectors: 0x80_0000, maxSegments: 64, sectorAlignment: 8 },
      writeZeroes: { maxSectors: 0x80_0000, maxSegments: 64, mayUnmap: true },
    })
    expect(device.features).toBe(
      featureSet(
        blk.VIRTIO_BLK_F_SIZE_MAX,
        blk.VIRTIO_BLK_F_SEG_MAX,
        blk.VIRTIO_BLK_F_BLK_SIZE,
        blk.VIRTIO_BLK_F_FLUSH,
        blk.VIRTIO_BLK_F_TOPOLOGY,
        blk.VIRTIO_BLK_F_CONFIG_WCE,
        blk.VIRTIO_BLK_F_MQ,
        blk.VIRTIO_BLK_F_DISCARD,
        blk.VIRTIO_BLK_F_WRITE_ZEROES
      )
    )
    expect(device.numQueues).toBe(16)
    expect(device.maxQueueSize).toBeUndefined()
  })

  test.each([
    [512, 3, 8, 8],
    [1024, 2, 4, 8],
    [4096, 0, 1, 8],
    [65536, 0, 1, 128],
  ])('block size %d', async (blockSize, physicalBlockExp, minIoSize, sectorAlignment) => {
    const device = await open({ 'blk-file': image(), 'block-size': blockSize })
    expect(config(device)).toMatchObject({
      capacity: 2048n,
      blkSize: blockSize,
      topology: { physicalBlockExp, minIoSize },
      discard: { sectorAlignment },
    })
    expect(device.queueData.blockSize).toBe(blockSize)
  })

  test('a capacity beyond 2^32 sectors', async () => {
    const path = image(2 ** 42 + 512)
    expect(config(await open({ 'blk-file': path })).capacity).toBe(2n ** 33n + 1n)
  })

  test('a read-only device says so, and offers no way to write', async () => {
    const device = await open({ 'blk-file': image(), 'read-only': true, discard: 'on' })
    const has = (bit: number) => hasFeature(device.features, bit)
    expect(has(blk.VIRTIO_BLK_F_RO)).toBe(true)
    expect(has(blk.VIRTIO_BLK_F_DISCARD) || has(blk.VIRTIO_BLK_F_WRITE_ZEROES)).toBe(false)
    expect(device.config().subarray(36)).toEqual(new Uint8Array(24))
    expect(device.queueData.readOnly).toBe(true)
  })

  test('one queue has no MQ; the sizes of rings are handed on', async () => {
    const device = await open({ 'blk-file': image(), 'num-queues': 1, 'queue-size': 64 })
    expect(hasFeature(device.features, blk.VIRTIO_BLK_F_MQ)).toBe(false)
    expect([device.numQueues, device.maxQueueSize]).toEqual([1, 64])
    expect(device.qemu!()).toEqual({ driver: 'vhost-user-blk-pci', properties: { 'num-queues': 1, 'queue-size': 64 } })
  })

  test.each([
    ['none', 1, false],
    ['writethrough', 0, false],
    ['writeback', 1, false],
    ['unsafe', 1, true],
  ])('cache %s', async (cache, wce, unsafe) => {
    const device = await open({ 'blk-file': image(), cache })
    expect(config(device).wce).toBe(wce)
    expect(device.queueData.unsafe).toBe(unsafe)
    expect(new BlkState(device.queueData.state).writeback).toBe(wce === 1)
    const { memoryAlign, lengthAlign } = device.queueData
    if (cache === 'none') expect(Math.min(memoryAlign, lengthAlign)).toBeGreaterThan(1)
    else expect([memoryAlign, lengthAlign]).toEqual([1, 1])
  })

  test('O_DIRECT where the kernel does not tell its demands: those of the block size', async () => {
    const untold = like({ directMemoryAlign: 0, directOffsetAlign: 0 })
    const { queueData } = await open({ 'blk-file': image(), cache: 'none', 'block-size': 4096 }, untold)
    expect([queueData.memoryAlign, queueData.lengthAlign]).toEqual([4096, 4096])
  })

  test('a block device discards without being asked', async () => {
    const asked: number[] = []
    const device = await open(
      { 'blk-file': image() },
      { ...like({ kind: 'block' }), fallocate: (fd) => -asked.push(fd) }
    )
    expect(hasFeature(device.features, blk.VIRTIO_BLK_F_DISCARD)).toBe(true)
    expect(asked).toEqual([])
  })

  test('asking whether holes can be punched changes nothing', async () => {
    const path = image(8192)
    writeFileSync(path, Buffer.alloc(8192, 7))
    const before = statSync(path)
    await open({ 'blk-file': path })
    const after = statSync(path)
    expect([after.size, after.blocks]).toEqual([before.size, before.blocks])
  })

  test('a copy each time: a caller cannot change the device through it', async () => {
    const device = await open({ 'blk-file': image() })
    device.config().fill(0xff)
    expect(config(device).capacity).toBe(2048n)
  })
})

describe('the serial number', () => {
  const serialOf = (device: Device<BlkQueueData>) =>
    Buffer.from(device.queueData.serial).toString('latin1').replace(/\0+$/, '')

  test('as given, in 20 bytes', async () => {
    const path = image()
    const short = await open({ 'blk-file': path, serial: 'abc', 'read-only': true })
    expect([serialOf(short), short.queueData.serial.length]).toEqual(['abc', 20])
    expect(serialOf(await open({ 'blk-file': path, serial: 'x'.repeat(20), 'read-only': true }))).toBe('x'.repeat(20))
  })

  test('else made from the file: the same each time, another one for another file', async () => {
    const path = image()
    const one = serialOf(await open({ 'blk-file': path, 'read-only': true }))
    expect(serialOf(await open({ 'blk-file': path, 'read-only': true }))).toBe(one)
    expect(serialOf(await open({ 'blk-file': image() }))).not.toBe(one)
    expect(one).toMatch(/^[0-9a-f]+-[0-9a-f]+$/)
  })
})

describe('writeConfig', () => {
  const WCE = blk.VIRTIO_BLK_CONFIG_WCE

  test('switches the write cache when that was negotiated, and queues see it', async () => {
    const device = await open({ 'blk-file': image() })
    const state = new BlkState(device.queueData.state)
    device.negotiated!(featureSet(blk.VIRTIO_BLK_F_CONFIG_WCE))
    expect(device.writeConfig(WCE, Uint8Array.of(0))).toBe(true)
    expect([state.writeback, config(device).wce]).toEqual([false, 0])
    expect(device.writeConfig(WCE, Uint8Array.of(1))).toBe(true)
    expect([state.writeback, config(device).wce]).toEqual([true, 1])
    expect(log.length).toBe(2)
  })

  test('refuses everything else and changes nothing', async () => {
    const device = await open({ 'blk-file': image() })
    device.negotiated!(device.features)
    const before = device.config()
    for (const [offset, bytes] of [
      [WCE, [2]],
      [WCE, [0xff]],
      [WCE, []],
      [WCE, [0, 0]],
      [WCE - 1, [0, 0]],
      [WCE - 1, [0]],
      [WCE + 1, [0]],
      [0, [0]],
      [0, [0, 0, 0, 0, 0, 0, 0, 0]],
      [blk.VIRTIO_BLK_CONFIG_NUM_QUEUES, [1, 0]],
      [2 ** 32 - 1, [0]],
      [0, Array.from(before)],
    ] as const) {
      expect(device.writeConfig(offset, Uint8Array.from(bytes)), `${bytes} at ${offset}`).toBe(false)
    }
    expect(device.config()).toEqual(before)
  })

  test('needs the feature, and reset() forgets it together with the switch', async () => {
    const device = await open({ 'blk-file': image(), cache: 'writethrough' })
    expect(device.writeConfig(WCE, Uint8Array.of(1))).toBe(false)
    device.negotiated!(featureSet(blk.VIRTIO_BLK_F_FLUSH))
    expect(device.writeConfig(WCE, Uint8Array.of(1))).toBe(false)
    device.negotiated!(device.features)
    expect(device.writeConfig(WCE, Uint8Array.of(1))).toBe(true)
    device.reset!()
    expect(config(device).wce).toBe(0)
    expect(device.writeConfig(WCE, Uint8Array.of(1))).toBe(false)
  })
})

describe('refresh', () => {
  test('takes a new size over, and says whether it is one', async () => {
    const path = image(1 << 20)
    const device = await open({ 'blk-file': path })
    const state = new BlkState(device.queueData.state)
    expect(device.refresh!()).toBe(false)
    execFileSync('truncate', ['-s', String(2 << 20), path])
    expect(device.refresh!()).toBe(true)
    expect([config(device).capacity, state.capacity]).toEqual([4096n, 4096])
    execFileSync('truncate', ['-s', '512', path])
    expect(device.refresh!()).toBe(true)
    expect(config(device).capacity).toBe(1n)
    expect(device.refresh!()).toBe(false)
    expect(log.length).toBe(2)
  })

  test('leaves out a part of a block at the end', async () => {
    const path = image(1 << 20)
    const device = await open({ 'blk-file': path, 'block-size': 4096 })
    execFileSync('truncate', ['-s', String(8192 + 4095), path])
    expect(device.refresh!()).toBe(true)
    expect(config(device).capacity).toBe(16n)
    execFileSync('truncate', ['-s', String(8192 + 1), path])
    expect(device.refresh!()).toBe(false)
    execFileSync('truncate', ['-s', '0', path])
    expect(device.refresh!()).toBe(true)
    expect(config(device).capacity).toBe(0n)
  })
})

test('close() lets the file go', async () => {
  const path = image()
  const device = await definition.open(v.parse(blkOptions, { 'blk-file': path }), host())
  expect(openFiles()).toEqual([path])
  device.close()
  expect(openFiles()).toEqual([])
})

describe('migration and handover', () => {
  const bytes = (text: string): Uint8Array => new TextEncoder().encode(text)

  test('the write cache that a driver switched goes along', async () => {
    const from = await open({ 'blk-file': image(), cache: 'writethrough' })
    from.negotiated!(from.features)
    expect(from.writeConfig(blk.VIRTIO_BLK_CONFIG_WCE, Uint8Array.of(1))).toBe(true)
    const to = await open({ 'blk-file': image(), cache: 'writethrough' })
    expect(config(to).wce).toBe(0)
    await to.loadState!(await from.saveState!())
    expect(config(to).wce).toBe(1)
    expect(new BlkState(to.queueData.state).writeback).toBe(true)
    // SET_FEATURES comes before or after it.
    to.negotiated!(to.features)
    expect(config(to).wce).toBe(1)
  })

  test.each(['', '{', '[]', 'null', '{}', '{"writeback":1}'])('a state that is none is refused: %j', async (text) => {
    const device = await open({ 'blk-file': image() })
    await expect(async () => device.loadState!(bytes(text))).rejects.toThrow()
    expect(config(device).wce).toBe(1)
  })

  test('a state of a later version, which knows more, is taken', async () => {
    const device = await open({ 'blk-file': image() })
    await device.loadState!(bytes('{"writeback":false,"color":"red"}'))
    expect(config(device).wce).toBe(0)
  })

  test('a successor goes on with the open file and its lock, wherever the path leads by now', async () => {
    const path = image()
    const before = new FakeHandover()
    const old = await open({ 'blk-file': path }, host({ handover: before }))
    const { fds } = before.kept.get('blk:blk0')!
    expect(fds).toEqual([old.queueData.fd])
    renameSync(path, `${path}.moved`)
    writeFileSync(path, Buffer.alloc(4096))
    const after = new FakeHandover()
    after.inherited.set('blk:blk0', { fds: [native.dup(fds[0]!)], facts: {} })
    const successor = await open({ 'blk-file': path }, host({ handover: after }))
    expect(config(successor).capacity).toBe(2048n)
    expect(after.kept.get('blk:blk0')!.fds).toEqual([successor.queueData.fd])
    devices.splice(0, 1)
    old.close()
    expect(before.kept.size).toBe(0)
    const third = openSync(`${path}.moved`, 'r+')
    expect(lockFile(third, true)).toBe(false)
    closeSync(third)
  })
})

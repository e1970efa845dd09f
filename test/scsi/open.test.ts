/** The control half of the SCSI device on real files: what it refuses, config space, what it leaves to a successor. */
import {
  closeSync,
  fstatSync,
  mkdtempSync,
  openSync,
  readdirSync,
  renameSync,
  rmSync,
  symlinkSync,
  truncateSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import * as v from 'valibot'
import { afterAll, afterEach, describe, expect, test } from 'vitest'
import definition from '../../devices/scsi/index.ts'
import { scsiOptions } from '../../devices/scsi/options.ts'
import { ScsiState } from '../../devices/scsi/shared.ts'
import { ConfigError, type Device, type DeviceHost, type FileInfo } from '../../src/device/index.ts'
import { fileInfo, lockFile, probeFallocate } from '../../src/engine/files.ts'
import { networkHost } from '../../src/engine/network.ts'
import { decodeScsiConfig } from '../../src/virtio/scsi.ts'
import { FakeHandover } from '../net/fake-network.ts'
import { makeImage } from './backend.ts'

type ScsiDevice = Device<{ readonly state: SharedArrayBuffer; readonly units: number; readonly unsafe: boolean }>

const dir = mkdtempSync(join(tmpdir(), 'virtiod-scsi-'))
afterAll(() => rmSync(dir, { recursive: true, force: true }))

const lines: string[] = []
const note = (_: object, message: string) => void lines.push(message)
const sent: { queue: number; message: unknown }[] = []
const host = (change: Partial<DeviceHost> = {}): DeviceHost => ({
  log: { debug: note, info: note, warn: note, error: note },
  fileInfo,
  name: 'scsi0',
  daemon: lines,
  signal: new AbortController().signal,
  network: networkHost,
  send: (queue, message) => void sent.push({ queue, message }),
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
  makeImage(path, size)
  return path
}

const devices: ScsiDevice[] = []
afterEach(async () => {
  for (const device of devices.splice(0)) await device.close()
  lines.length = 0
  sent.length = 0
})

async function open(options: Record<string, unknown>, withHost = host()): Promise<ScsiDevice> {
  const device = await definition.open(v.parse(scsiOptions, options), withHost)
  devices.push(device)
  return device
}

const openFiles = () => readdirSync('/proc/self/fd').length

/** What open() throws; it must leave no fd behind. */
async function refusal(options: Record<string, unknown>, withHost = host()): Promise<ConfigError> {
  const before = openFiles()
  const error = await open(options, withHost).then(
    () => undefined,
    (caught: unknown) => caught
  )
  expect(openFiles()).toBe(before)
  if (!(error instanceof ConfigError)) throw new Error('no ConfigError', { cause: error })
  return error
}

const unitsOf = ({ queueData }: ScsiDevice) => new ScsiState(queueData.units, queueData.state).units

describe('what is refused', () => {
  test('a missing file, without leaving the ones before it open', async () => {
    const error = await refusal({ lun: [image(), join(dir, 'none')] })
    expect(error).toMatchObject({ code: 'ERR_SCSI_FILE_OPEN', option: '--lun' })
    expect(error.message).toContain('none does not exist')
  })

  test('a file that may not be written, with the way to serve it', async () => {
    const path = join(dir, 'proc')
    symlinkSync('/proc/version', path)
    const error = await refusal({ lun: [path] })
    expect(['ERR_SCSI_FILE_OPEN', 'ERR_SCSI_FILE_SIZE']).toContain(error.code)
  })

  test('a directory, a size that is no multiple, an empty file', async () => {
    expect(await refusal({ lun: [dir] })).toMatchObject({ code: 'ERR_SCSI_FILE_OPEN', cause: { code: 'EISDIR' } })
    expect(await refusal({ lun: ['/dev/null'] })).toMatchObject({ code: 'ERR_SCSI_FILE_KIND' })
    expect(await refusal({ lun: [`${image(5000)},block-size=4096`] })).toMatchObject({ code: 'ERR_SCSI_FILE_SIZE' })
    expect(await refusal({ lun: [image(0)] })).toMatchObject({ code: 'ERR_SCSI_FILE_SIZE' })
  })

  test('the same file twice, unless both only read', async () => {
    const path = image()
    expect(await refusal({ lun: [path, path] })).toMatchObject({ code: 'ERR_SCSI_FILE_LOCKED', option: '--lun' })
    expect((await refusal({ lun: [path, path] })).message).toContain('all of them have ,read-only')
    await open({ lun: [`${path},read-only`, `${path},read-only`] })
  })

  test('the same serial number twice', async () => {
    const error = await refusal({ lun: [`${image()},serial=one`, `${image()},serial=one`] })
    expect(error).toMatchObject({ code: 'ERR_SCSI_LUN', option: '--lun' })
  })

  test('blocks that are too small for the file, and what its file system cannot', async () => {
    const strict = like({ blockSize: 4096 })
    const small = { lun: [image()], 'block-size': 512 }
    expect(await refusal(small, strict)).toMatchObject({ code: 'ERR_SCSI_BLOCK_SIZE' })
    const none = host({ fallocate: () => -95 })
    expect(await refusal({ lun: [image()], discard: 'on' }, none)).toMatchObject({ code: 'ERR_SCSI_DISCARD' })
    expect(unitsOf(await open({ lun: [image()] }, none))[0]!.discard).toBe(false)
  })

  test('no unit at all', () => {
    expect(v.safeParse(scsiOptions, { lun: [] }).success).toBe(false)
    expect(v.safeParse(scsiOptions, {}).success).toBe(false)
  })
})

test('config space, features, queues', async () => {
  const device = await open({ lun: [image(), `${image(1 << 21)},block-size=4096`], 'num-queues': 3, 'queue-size': 64 })
  expect(decodeScsiConfig(device.config())).toEqual({
    numQueues: 3,
    segMax: 126,
    maxSectors: 0xffff,
    cmdPerLun: 128,
    eventInfoSize: 16,
    senseSize: 96,
    cdbSize: 32,
    maxChannel: 0,
    maxTarget: 0,
    maxLun: 255,
  })
  expect([device.features, device.numQueues, device.maxQueueSize]).toEqual([0b110n, 5, 64])
  expect(unitsOf(device).map(({ blocks, blockSize }) => [blocks, blockSize])).toEqual([
    [2048, 512],
    [512, 4096],
  ])
  expect(device.qemu!()).toEqual({
    driver: 'vhost-user-scsi-pci',
    properties: { num_queues: 3, virtqueue_size: 64 },
  })
  const low = (value: number) => Uint8Array.of(value)
  // What a migration writes: the bytes that differ.
  expect([device.writeConfig(20, low(18)), device.writeConfig(24, low(16))]).toEqual([true, true])
  expect(decodeScsiConfig(device.config())).toMatchObject({ senseSize: 18, cdbSize: 16 })
  for (const [offset, bytes] of [
    [0, low(1)],
    [19, low(1)],
    [27, Uint8Array.of(0, 0)],
    [24, low(3)],
  ] as const)
    expect(device.writeConfig(offset, bytes)).toBe(false)
  expect([...device.samples!()]).toEqual([
    { metric: 'lun_bytes', labels: { lun: 0 }, value: 1 << 20 },
    { metric: 'lun_bytes', labels: { lun: 1 }, value: 1 << 21 },
    { metric: 'events_missed_total', labels: {}, value: 0 },
  ])
})

test('what the driver switched is carried over', async () => {
  const device = await open({ lun: [image()] })
  unitsOf(device)[0]!.writeback = false
  unitsOf(device)[0]!.attentions = 0
  const other = await open({ lun: [image()] })
  await other.loadState!(await device.saveState!())
  expect(unitsOf(other)[0]).toMatchObject({ writeback: false, attentions: 0 })
  other.reset!()
  expect(unitsOf(other)[0]).toMatchObject({ writeback: true, attentions: 1 })
})

test('a successor gets the open files, whatever the paths name by then', async () => {
  const paths = [image(), image()]
  const handover = new FakeHandover()
  const units = paths.map((path) => `${path},hotplug`)
  const old = await open({ lun: units }, host({ handover }))
  const kept = [...handover.kept.values()].flatMap(({ fds }) => fds)
  expect([...handover.kept.keys()]).toEqual(['scsi:scsi0:0', 'scsi:scsi0:1'])
  const inode = fstatSync(kept[0]!).ino
  // As in another process: fds of the same open files.
  const next = new FakeHandover()
  for (const [key, { fds }] of handover.kept) {
    const fd = openSync(`/proc/self/fd/${fds[0]}`, 'r+')
    next.inherited.set(key, { fds: [fd], facts: {} })
  }
  renameSync(paths[0]!, `${paths[0]}.gone`)
  const successor = await open({ lun: units }, host({ handover: next }))
  expect(unitsOf(successor).every(({ generation }) => generation > 0)).toBe(true)
  expect(fstatSync(unitsOf(successor)[0]!.fd).ino).toBe(inode)
  await old.close()
  devices.splice(devices.indexOf(old), 1)
  expect(handover.kept.size).toBe(0)
})

describe('SIGHUP', () => {
  test('a unit with hotplug that is missing at the start comes when there is a file', async () => {
    const path = image()
    rmSync(path)
    const device = await open({ lun: [image(), `${path},hotplug`] })
    expect(unitsOf(device).map(({ generation }) => generation > 0)).toEqual([true, false])
    await device.refresh!()
    expect(unitsOf(device)[1]!.generation).toBe(0)
    makeImage(path, 8192)
    expect(await device.refresh!()).toBe(false)
    expect(unitsOf(device)[1]).toMatchObject({ blocks: 16, attentions: 1 })
    expect(lines).toContain('the unit was plugged in')
    // No driver: nobody is told.
    expect(sent).toEqual([])
  })

  test('a unit goes when no queue is there to ask, and its file is closed', async () => {
    const path = image()
    const before = openFiles()
    const device = await open({ lun: [`${path},hotplug`] })
    expect(openFiles()).toBe(before + 1)
    rmSync(path)
    await device.refresh!()
    expect([unitsOf(device)[0]!.generation, openFiles()]).toEqual([0, before])
  })

  test('a queue that is there is asked again until it answers, or is gone', async () => {
    const path = image()
    const device = await open({ lun: [`${path},hotplug`] })
    device.ringActive!(2, true)
    device.reported!(2, { kind: 'alive' })
    device.ringActive!(3, true)
    device.reported!(3, { kind: 'alive' })
    rmSync(path)
    const before = openFiles()
    const refreshed = device.refresh!()
    const asked = () =>
      sent.flatMap(({ queue, message }) => (queue >= 2 ? [{ queue, ...(message as { id: number }) }] : []))
    await expect.poll(() => asked().filter(({ queue }) => queue === 2).length).toBeGreaterThanOrEqual(2)
    const latest = () => asked().findLast(({ queue }) => queue === 2)!.id
    let last = 0
    const answer = async (tasks: number, taken: number) => {
      await expect.poll(latest).not.toBe(last)
      last = latest()
      device.reported!(2, { kind: 'settled', id: last, tasks, taken })
    }
    // In flight; over, but others were taken meanwhile; over, and nothing new.
    await answer(1, 7)
    await answer(0, 9)
    await answer(0, 9)
    await new Promise((resolve) => setTimeout(resolve, 120))
    expect(asked().filter(({ queue, id }) => queue === 2 && id > last)).toEqual([])
    expect(openFiles()).toBe(before)
    // The other one stops without an answer.
    device.ringActive!(3, false)
    device.reported!(3, { kind: 'gone' })
    await refreshed
    expect(openFiles()).toBe(before - 1)
  })

  test('sizes that are no whole block are cut', async () => {
    const path = image()
    const device = await open({ lun: [`${path},block-size=4096`] })
    unitsOf(device)[0]!.attentions = 0
    await device.refresh!()
    expect(unitsOf(device)[0]!.attentions).toBe(0)
    truncateSync(path, (1 << 20) + 5000)
    await device.refresh!()
    expect(unitsOf(device)[0]).toMatchObject({ blocks: 257 })
    expect(unitsOf(device)[0]!.takeAttention()).toBe(0x2a09)
    // Not negotiated: no event, and none that would have been missed.
    expect([...device.samples!()].at(-1)!.value).toBe(0)
  })
})

test('closing twice is closing once', async () => {
  const device = await open({ lun: [image()] })
  await device.close()
  const fd = openSync('/dev/null', 'r')
  await device.close()
  expect(fstatSync(fd).isCharacterDevice()).toBe(true)
  closeSync(fd)
})

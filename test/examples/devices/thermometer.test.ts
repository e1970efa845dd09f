/** examples/devices/thermometer.ts: its files, its physics and its state; and a guest that heats. */
import { missingPrerequisites, runVirtiod, type TestDevice, testDevice } from 'virtiod/testing'
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest'
import definition from '../../../examples/devices/thermometer.ts'
import { Stage, transcript } from './transcript.ts'

const REQUESTS = 1
const [LOOKUP, FORGET, GETATTR, SETATTR, OPEN, READ, WRITE, INIT, OPENDIR, READDIR] = [
  1, 2, 3, 4, 14, 15, 16, 26, 27, 28,
]
const [ENOENT, EACCES, EINVAL, ENOSYS] = [2, 13, 22, 38]
const [ROOT, TEMPERATURE, HEATER] = [1, 2, 3]

/** A file system's driver in a few words. */
class Fuse {
  readonly device: TestDevice
  #unique = 0n

  constructor(device: TestDevice) {
    this.device = device
  }

  /** One request. Returns the answer's body. @throws an Error with the errno */
  async ask(opcode: number, node: number, body: Uint8Array = Buffer.alloc(0), room = 4096): Promise<Buffer> {
    const unique = ++this.#unique
    const reply = await this.device.request(REQUESTS, [header(opcode, unique, node, body.length), body], 16 + room)
    const bytes = Buffer.from(reply.bytes)
    expect([bytes.readUInt32LE(0), bytes.readBigUInt64LE(8)]).toEqual([reply.written, unique])
    const error = -bytes.readInt32LE(4)
    if (error !== 0) throw new Error(`errno ${error}`)
    return bytes.subarray(16, reply.written)
  }

  async read(node: number, offset = 0, size = 4096): Promise<string> {
    return (await this.ask(READ, node, fields([8, 0], [8, offset], [4, size], [4, 0], [8, 0], [8, 0]))).toString()
  }

  async write(node: number, text: string): Promise<number> {
    const start = fields([8, 0], [8, 0], [4, text.length], [4, 0], [8, 0], [8, 0])
    return (await this.ask(WRITE, node, Buffer.concat([start, Buffer.from(text)]))).readUInt32LE(0)
  }
}

function fields(...values: (readonly [size: 4 | 8, value: number])[]): Buffer {
  return Buffer.concat(
    values.map(([size, value]) => {
      const bytes = Buffer.alloc(size)
      bytes.writeUIntLE(value, 0, 4)
      return bytes
    })
  )
}

function header(opcode: number, unique: bigint, node: number, bodyLength: number): Buffer {
  return fields([4, 40 + bodyLength], [4, opcode], [8, Number(unique)], [8, node], [8, 0], [8, 0])
}

describe('the files', () => {
  test('are found by name, with their modes', async () => {
    await using device = await testDevice(definition, { split: true })
    const fuse = new Fuse(device)
    const init = await fuse.ask(INIT, 0, fields([4, 7], [4, 36], [8, 0]))
    expect([init.length, init.readUInt32LE(0), init.readUInt32LE(20)]).toEqual([64, 7, 4096])
    for (const [name, node, mode] of [
      ['temperature', TEMPERATURE, 0o100444],
      ['heater', HEATER, 0o100644],
    ] as const) {
      const entry = await fuse.ask(LOOKUP, ROOT, Buffer.from(`${name}\0`))
      expect([entry.length, entry.readUInt32LE(0), entry.readUInt32LE(40 + 60)]).toEqual([128, node, mode])
      const attributes = await fuse.ask(GETATTR, node)
      expect(attributes.subarray(16)).toEqual(entry.subarray(40))
      expect(await fuse.ask(SETATTR, node)).toEqual(attributes)
    }
    expect((await fuse.ask(GETATTR, ROOT)).readUInt32LE(16 + 60)).toBe(0o040755)
    await expect(fuse.ask(LOOKUP, ROOT, Buffer.from('nothing\0'))).rejects.toThrow(`errno ${ENOENT}`)
    await expect(fuse.ask(LOOKUP, HEATER, Buffer.from('heater\0'))).rejects.toThrow(`errno ${ENOENT}`)
    await expect(fuse.ask(GETATTR, 99)).rejects.toThrow(`errno ${ENOENT}`)
    await expect(fuse.ask(4000, ROOT)).rejects.toThrow(`errno ${ENOSYS}`)
  })

  test('are listed, as many as fit', async () => {
    await using device = await testDevice(definition)
    const fuse = new Fuse(device)
    await fuse.ask(OPENDIR, ROOT)
    const list = (offset: number, size: number) =>
      fuse.ask(READDIR, ROOT, fields([8, 0], [8, offset], [4, size], [4, 0], [8, 0], [8, 0]))
    const all = await list(0, 4096)
    expect(all.subarray(24, 24 + 11).toString()).toBe('temperature')
    const first = await list(0, all.length - 1)
    expect(first).toEqual(all.subarray(0, 40))
    expect(first.readUInt32LE(8)).toBe(1)
    const second = await list(1, 4096)
    expect(Buffer.concat([first, second])).toEqual(all)
    expect(second.subarray(24, 30).toString()).toBe('heater')
    expect(await list(2, 4096)).toHaveLength(0)
    expect(await list(0, 10)).toHaveLength(0)
  })

  test('are read and written', async () => {
    await using device = await testDevice(definition, { options: { ambient: 21.5 }, split: true })
    const fuse = new Fuse(device)
    expect(await fuse.read(TEMPERATURE)).toBe('21500\n')
    expect(await fuse.read(TEMPERATURE, 2)).toBe('500\n')
    expect(await fuse.read(TEMPERATURE, 2, 2)).toBe('50')
    expect(await fuse.read(TEMPERATURE, 100)).toBe('')
    expect(await fuse.write(HEATER, '1\n')).toBe(2)
    expect(await fuse.read(HEATER)).toBe('1\n')
    for (const text of ['2', '', 'hot', '10', '\n']) {
      await expect(fuse.write(HEATER, text)).rejects.toThrow(`errno ${EINVAL}`)
      expect(await fuse.read(HEATER)).toBe('1\n')
    }
    await expect(fuse.write(TEMPERATURE, '0')).rejects.toThrow(`errno ${EINVAL}`)
    await expect(fuse.ask(OPEN, TEMPERATURE, fields([4, 2], [4, 0]))).rejects.toThrow(`errno ${EACCES}`)
    await fuse.ask(OPEN, TEMPERATURE, fields([4, 0], [4, 0]))
    await fuse.ask(OPEN, HEATER, fields([4, 1], [4, 0]))
  })
})

describe('a guest that is mistaken', () => {
  test.each([
    ['a header that is cut off', header(READ, 1n, HEATER, 0).subarray(0, 39), 4096],
    ['a read that is cut off', header(READ, 1n, HEATER, 0), 4096],
    ['no room for the answer', Buffer.concat([header(GETATTR, 1n, HEATER, 0)]), 100],
  ])('%s breaks the ring', async (_, request, room) => {
    await using device = await testDevice(definition)
    await expect(device.request(REQUESTS, request, room)).rejects.toThrow()
    expect(device.failure).toBeUndefined()
  })

  test('a forgotten node needs no answer', async () => {
    await using device = await testDevice(definition)
    expect(await device.request(0, Buffer.concat([header(FORGET, 1n, HEATER, 8), fields([8, 1])]), 0)).toMatchObject({
      written: 0,
    })
  })
})

describe('the physics', () => {
  beforeEach(() => void vi.useFakeTimers({ toFake: ['setInterval', 'clearInterval'] }))
  afterEach(() => void vi.useRealTimers())

  const options = { ambient: 20, heater: 60, 'time-constant': 10 }
  const temperature = (device: TestDevice): number => device.metrics()['temperature_celsius'] ?? Number.NaN

  test('the heater warms it, to 63 % after the time constant, and it cools down again', async () => {
    await using device = await testDevice(definition, { options })
    const fuse = new Fuse(device)
    vi.advanceTimersByTime(1000)
    expect(await fuse.read(TEMPERATURE)).toBe('20000\n')
    await fuse.write(HEATER, '1')
    vi.advanceTimersByTime(10_000)
    expect(temperature(device)).toBeCloseTo(20 + 60 * 0.632, 0)
    expect(device.metrics()['heater_on']).toBe(1)
    vi.advanceTimersByTime(200_000)
    expect(await fuse.read(TEMPERATURE)).toBe('80000\n')
    await fuse.write(HEATER, '0')
    vi.advanceTimersByTime(200_000)
    expect(await fuse.read(TEMPERATURE)).toBe('20000\n')
  })

  test('a successor goes on; a new driver finds the heater off', async () => {
    await using old = await testDevice(definition, { options })
    await new Fuse(old).write(HEATER, '1')
    vi.advanceTimersByTime(7000)
    await using successor = await testDevice(definition, { options })
    await successor.loadState(await old.saveState())
    vi.advanceTimersByTime(100)
    expect(temperature(successor)).toBeGreaterThan(45)
    expect(temperature(successor)).toBeCloseTo(temperature(old), 6)
    expect(await new Fuse(successor).read(HEATER)).toBe('1\n')
    await successor.reset()
    expect(await new Fuse(successor).read(HEATER)).toBe('0\n')
    await expect(successor.loadState(Buffer.from('{"temperature":"hot","heater":true}'))).rejects.toThrow(
      'Expected number'
    )
  })
})

test.skipIf(missingPrerequisites().length > 0)(
  'a guest heats, while the physics change and the process does',
  async () => {
    await using stage = new Stage('thermometer.ts', { modules: ['virtiofs'] })
    await stage.play(transcript('thermometer.ts'))
    const { guest } = stage
    const [daemon] = stage.daemons
    expect(daemon!.log).toContain('reloaded')
    // And on in another process: its heater is on and cools, as the state and the file there say.
    const handover = runVirtiod(['handover', String(daemon!.pid)])
    expect(handover).toMatchObject({ code: 0, stderr: '' })
    try {
      await daemon!.ended
      expect(await guest.sh('cat /mnt/heater')).toBe('1')
      expect(Number(await guest.sh('cat /mnt/temperature'))).toBeLessThan(0)
      await guest.sh('echo 0 > /mnt/heater; until [ $(cat /mnt/temperature) -gt 0 ]; do sleep 0.1; done')
      await guest.kill()
    } finally {
      process.kill(Number(handover.stdout), 'SIGKILL')
    }
    expect(guest.console).not.toMatch(/fuse.*error|virtiofs.*error|I\/O error/i)
  },
  90_000
)

/**
 * testDevice itself: with devices/blk in the fast style, with definitions made for one property, and what it can't do.
 */
import { mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setImmediate as turn } from 'node:timers/promises'
import * as v from 'valibot'
import {
  API_VERSION,
  type Chain,
  type Device,
  type DeviceDefinition,
  type DeviceHost,
  defineDevice,
  type QueueContext,
  type QueueHandler,
  type ReceiveHandler,
} from 'virtiod/device'
import * as blk from 'virtiod/device/virtio-blk'
import { testDevice } from 'virtiod/testing'
import { afterAll, beforeEach, describe, expect, test } from 'vitest'
import disk from '../../devices/blk/index.ts'

const directory = mkdtempSync(join(tmpdir(), 'virtiod-testing-'))
const image = join(directory, 'disk.img')
afterAll(() => rmSync(directory, { recursive: true }))
beforeEach(() => writeFileSync(image, new Uint8Array(1 << 20)))

const bytes = (...values: number[]): Uint8Array => Uint8Array.from(values)
const counting = (length: number): Uint8Array => Uint8Array.from({ length }, (_, i) => i % 251)

function header(type: number, sector = 0): Uint8Array {
  const request = new Uint8Array(16)
  const view = new DataView(request.buffer)
  view.setUint32(0, type, true)
  view.setBigUint64(8, BigInt(sector), true)
  return request
}

describe.each([false, true])('devices/blk, split: %s', (split) => {
  const options = { 'blk-file': image, serial: 'unit' }

  test('writes, reads, flushes and discards', async () => {
    await using device = await testDevice(disk, { options, split })
    const data = counting(8192)
    const wrote = await device.request(0, [header(blk.VIRTIO_BLK_T_OUT, 4), data], 1)
    expect(wrote).toEqual({ written: 1, bytes: bytes(blk.VIRTIO_BLK_S_OK) })
    expect(new Uint8Array(readFileSync(image).subarray(2048, 2048 + 8192))).toEqual(data)
    expect((await device.request(0, header(blk.VIRTIO_BLK_T_FLUSH), 1)).bytes).toEqual(bytes(0))
    const read = await device.request(0, header(blk.VIRTIO_BLK_T_IN, 4), 8193)
    expect(read.written).toBe(8193)
    expect(read.bytes.subarray(0, 8192)).toEqual(data)
    const range = new Uint8Array(16)
    range.set([4, 0, 0, 0, 0, 0, 0, 0, 2])
    expect((await device.request(0, [header(blk.VIRTIO_BLK_T_DISCARD), range], 1)).bytes).toEqual(bytes(0))
    expect(
      readFileSync(image)
        .subarray(2048, 3072)
        .every((byte) => byte === 0)
    ).toBe(true)
    expect((await device.request(0, header(blk.VIRTIO_BLK_T_GET_ID), 21)).bytes.subarray(0, 5)).toEqual(
      Uint8Array.of(...new TextEncoder().encode('unit'), 0)
    )
    expect(device.operations).toMatchObject({ read: 1, write: 1, flush: 1, discard: 1 })
    expect(device.failure).toBeUndefined()
  })

  test('answers what is wrong', async () => {
    await using device = await testDevice(disk, { options, split })
    const beyond = await device.request(0, header(blk.VIRTIO_BLK_T_IN, 1 << 20), 513)
    expect(beyond.bytes.at(-1)).toBe(blk.VIRTIO_BLK_S_IOERR)
    expect(device.errors['range']).toBe(1)
  })

  test('many at once, over more requests than the ring has entries', async () => {
    await using device = await testDevice(disk, { options, split, queueSize: 8 })
    const writes = Array.from({ length: 64 }, (_, i) =>
      device.request(i % 4, [header(blk.VIRTIO_BLK_T_OUT, i), new Uint8Array(512).fill(i)], 1)
    )
    expect((await Promise.all(writes)).every((reply) => reply.bytes[0] === 0)).toBe(true)
    const content = readFileSync(image)
    for (let i = 0; i < 64; i++) expect(content[i * 512]).toBe(i)
  })

  test('an image that was truncated meanwhile is an error of its requests', async () => {
    await using device = await testDevice(disk, { options, split })
    truncateSync(image, 512)
    const reply = await device.request(0, header(blk.VIRTIO_BLK_T_IN, 8), 513)
    expect(reply.bytes.at(-1)).toBe(blk.VIRTIO_BLK_S_IOERR)
  })
})

describe('devices/blk', () => {
  test('config space, its writes, and its state', async () => {
    const options = { 'blk-file': image }
    await using device = await testDevice(disk, { options })
    expect(new DataView(device.config.buffer).getBigUint64(0, true)).toBe(2048n)
    expect(await device.writeConfig(blk.VIRTIO_BLK_CONFIG_WCE, bytes(0))).toBe(true)
    expect(device.config[blk.VIRTIO_BLK_CONFIG_WCE]).toBe(0)
    expect(await device.writeConfig(0, bytes(0))).toBe(false)
    await expect(device.writeConfig(60, bytes(0))).rejects.toThrow(
      new RangeError('writeConfig: [60, +1) in a config space of 60 bytes')
    )
    const state = await device.saveState()
    await using other = await testDevice(disk, { options })
    await other.loadState(state)
    expect(other.config[blk.VIRTIO_BLK_CONFIG_WCE]).toBe(0)
    truncateSync(image, 4096)
    await other.refresh()
    expect(other.configChanges).toBe(1)
    expect(other.log.map(({ level, message }) => `${level} ${message}`)).toEqual([
      'info the image was resized (512-byte sectors)',
    ])
  })

  test('what open refuses is a ConfigError', async () => {
    const opened = testDevice(disk, { options: { 'blk-file': join(directory, 'nothing') } })
    await expect(opened).rejects.toMatchObject({ name: 'ConfigError', code: 'ERR_BLK_FILE_OPEN' })
  })
})

describe('options', () => {
  const definition = defineDevice({
    apiVersion: 1,
    name: 'limited',
    virtioId: 4,
    options: v.strictObject({
      rate: v.pipe(v.number(), v.integer(), v.minValue(1), v.maxValue(100), v.description('Bytes per second')),
      mode: v.optional(v.picklist(['fast', 'slow']), 'fast'),
    }),
    queues: [{ name: 'requests' }],
    create: ({ options }) => ({ handle: (chain) => void chain.writer.bytes(new TextEncoder().encode(options.mode)) }),
  })

  test('get their defaults', async () => {
    await using device = await testDevice(definition, { options: { rate: 5 } })
    expect((await device.request(0, [], 4)).bytes).toEqual(new TextEncoder().encode('fast'))
  })

  test.each([
    [{}, 'ERR_OPTION_REQUIRED', '--rate: missing. It is required: bytes per second.'],
    [{ rate: 500 }, 'ERR_OPTION_VALUE', '--rate: 500 is out of range. Give an integer from 1 to 100.'],
    [{ rate: 5, mode: 'fats' }, 'ERR_OPTION_VALUE', 'Did you mean fast?'],
    [{ rate: 5, rat: 1 }, 'ERR_OPTION_UNKNOWN', '--rat: unknown option. Did you mean --rate?'],
  ])('%o is refused as by the daemon', async (options, code, message) => {
    const opened = testDevice(definition, { options })
    await expect(opened).rejects.toMatchObject({ name: 'ConfigError', code })
    await expect(opened).rejects.toThrow(message)
  })
})

/** A definition in the fast style, in one file. */
function fast(
  create: (context: QueueContext, data: unknown) => QueueHandler | ReceiveHandler,
  device: (host: DeviceHost) => Partial<Device> = () => ({}),
  fields: Partial<DeviceDefinition> = {}
): DeviceDefinition {
  return {
    apiVersion: API_VERSION,
    name: 'fast',
    virtioId: 4,
    options: v.strictObject({}),
    operations: ['request'],
    errors: ['error'],
    createQueueHandler: create,
    open: (_options, host) => ({
      features: 0n,
      numQueues: 1,
      queueData: undefined,
      config: () => new Uint8Array(0),
      writeConfig: () => false,
      close() {},
      ...device(host),
    }),
    ...fields,
  }
}

describe('the fast style', () => {
  test('handlers that take batches get as many as there are', async () => {
    const batches: number[] = []
    await using device = await testDevice(
      fast((context) => ({
        handleBatch(chains, count) {
          batches.push(count)
          for (let i = 0; i < count; i++) context.complete(chains[i]!, 0, 0, 0)
        },
      }))
    )
    await Promise.all(Array.from({ length: 40 }, () => device.request(0, bytes(1))))
    expect(batches).toEqual([16, 16, 8])
    expect(device.operations).toEqual({ request: 40 })
  })

  test('both halves talk by messages, which are copies', async () => {
    const heard: unknown[] = []
    const message = { text: 'hello' }
    await using device = await testDevice(
      fast(
        (context) => ({
          handle: (chain) => context.complete(chain, 0, 0, 0),
          message: (said) => context.report(said),
        }),
        (host) => ({
          ringActive: (queue, active) => {
            if (active) host.send(queue, message)
          },
          reported: (queue, said) => void heard.push(queue, said),
        })
      )
    )
    message.text = 'changed'
    await device.request(0, bytes(1))
    await turn()
    await turn()
    expect(heard).toEqual([0, { text: 'hello' }])
  })

  test('receivers hold chains, and give back what they did not use', async () => {
    await using device = await testDevice(
      fast(
        (context) => {
          const held: Chain[] = []
          let due = 0
          return {
            waiting: true,
            message: () => void due++,
            receive() {
              let count = 0
              for (let chain = context.take(); chain !== undefined; chain = context.take()) held.push(chain)
              for (; due > 0 && held.length > 0; due--, count++) {
                const chain = held.shift()!
                chain.writeU8(0, 7)
                context.give(chain, 1)
              }
              return count
            },
            release() {
              for (const chain of held.splice(0).reverse()) context.untake(chain)
            },
          }
        },
        (host) => ({ negotiated: () => setTimeout(() => host.send(0, 1), 1) })
      )
    )
    const given = [device.give(0, 4), device.give(0, 4)]
    expect(await given[0]).toEqual(bytes(7))
    // It holds the other one, and lets go of it.
    await device.saveState()
    device.reset().catch(() => {})
    await expect(given[1]).rejects.toThrow('the driver reset the device')
  })

  test('chains that were put back come again in their order', async () => {
    const lengths: number[] = []
    let holds = true
    await using device = await testDevice(
      fast((context) => {
        const held: Chain[] = []
        return {
          waiting: true,
          receive() {
            for (let chain = context.take(); chain !== undefined; chain = context.take()) held.push(chain)
            if (holds) return 0
            lengths.push(...held.map(({ writable }) => writable))
            for (const chain of held.splice(0)) context.give(chain, 0)
            return 1
          },
          release() {
            for (const chain of held.splice(0).reverse()) context.untake(chain)
          },
        }
      })
    )
    const given = [1, 2, 3].map((length) => device.give(0, length))
    await turn()
    await turn()
    holds = false
    device.enableQueue(0, false)
    device.enableQueue(0, true)
    await Promise.all(given)
    expect(lengths).toEqual([1, 2, 3])
  })

  test('what is completed twice, too far or as nothing known', async () => {
    const wrong: [(context: QueueContext, chain: Chain) => void, object][] = [
      [(context, chain) => context.complete(chain, 5, 0, 0), { code: 'ERR_DEVICE_OVERRUN' }],
      [(context, chain) => context.complete(chain, 0, 1, 0), { message: 'complete: the device has no operation 1' }],
      [(context) => context.countError(1), { message: 'countError: the device has no error 1' }],
      [
        (context, chain) => {
          context.give(chain, 0)
          context.give(chain, 0)
        },
        { code: 'ERR_DEVICE_COMPLETED_TWICE' },
      ],
    ]
    for (const [act, error] of wrong) {
      await using device = await testDevice(fast((context) => ({ handle: (chain) => act(context, chain) })))
      await Promise.allSettled([device.request(0, [], 4)])
      expect(device.failure).toMatchObject(error)
    }
  })

  test('what needs the kernel is refused in words', async () => {
    await using device = await testDevice(
      fast((context) => ({
        handle() {
          context.io.watch(5)
        },
      }))
    )
    await expect(device.request(0, bytes(1))).rejects.toThrow(
      'watch: fds are not there in testDevice. Test this with startVirtiod and connect, or with a guest'
    )
    const opened = testDevice(
      fast(
        () => ({ handle() {} }),
        (host) => ({ features: BigInt(host.network.openTap('tap0', false)) })
      )
    )
    await expect(opened).rejects.toThrow('network.openTap: taps and links are not there in testDevice')
  })

  test('an operation on a chain that is not in flight, or two at a time', async () => {
    await using device = await testDevice(
      fast((context) => {
        const file = context.io.openFile(0)
        return {
          handle(chain) {
            context.io.fdatasync(chain, file)
            context.io.fdatasync(chain, file)
          },
        }
      })
    )
    await expect(device.request(0, bytes(1))).rejects.toThrow('two I/O operations at a time on chain 0')
  })
})

describe('what a test did wrong', () => {
  const definition = fast((context) => ({ handle: (chain) => context.complete(chain, 0, 0, 0) }))

  test('no such queue, an empty chain, a device that is closed', async () => {
    const device = await testDevice(definition)
    expect(() => device.request(1, bytes(1))).toThrow(new RangeError('there is no queue 1: the device has 1'))
    expect(() => device.request(0, [])).toThrow(new RangeError('request: a chain has at least one byte'))
    await device.close()
    await device.close()
    expect(() => device.request(0, bytes(1))).toThrow('the device was closed')
  })

  test('features that are not offered', async () => {
    await expect(testDevice(definition, { features: 1n << 5n })).rejects.toThrow(
      new RangeError('testDevice: features: the device does not offer 0x20')
    )
  })

  test('a ring that is too large', async () => {
    const small = fast(
      () => ({ handle() {} }),
      () => ({ maxQueueSize: 64 })
    )
    await using device = await testDevice(small)
    expect(device.failure).toBeUndefined()
    await expect(testDevice(small, { queueSize: 128 })).rejects.toThrow(
      new RangeError('testDevice: queueSize: the device takes at most 64 entries, not 128')
    )
  })

  test('what was given away and never used need not be waited for', async () => {
    const device = await testDevice(fast(() => ({ handle() {} })))
    device.give(0, 4)
    const given = device.give(0, 4)
    await device.close()
    await expect(given).rejects.toThrow('the device was closed')
  })

  test('another version of the contract', async () => {
    const older = { ...definition, apiVersion: 0 } as unknown as DeviceDefinition
    await expect(testDevice(older)).rejects.toMatchObject({ code: 'ERR_DEVICE_API_VERSION' })
  })

  test('no queue half', async () => {
    const { createQueueHandler: _, ...without } = definition
    await expect(testDevice(without)).rejects.toThrow(
      new TypeError('the device fast has neither createQueueHandler nor a queueModule')
    )
    const queueModule = new URL('../../devices/blk/options.ts', import.meta.url)
    await expect(testDevice({ ...without, queueModule })).rejects.toThrow(
      `${queueModule.href} does not export the function createQueueHandler`
    )
  })
})

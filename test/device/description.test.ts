/** What defineDevice refuses, and what it fills in. */
import * as v from 'valibot'
import { type DeviceDescription, defineDevice } from 'virtiod/device'
import { describe, expect, test } from 'vitest'
import { testDevice } from '../../src/testing/plain.ts'

const least = {
  apiVersion: 1,
  name: 'least',
  virtioId: 4,
  queues: [{ name: 'requests' }],
  create: () => ({ handle() {} }),
} satisfies DeviceDescription

const define = (fields: object): ReturnType<typeof defineDevice> =>
  defineDevice({ ...least, ...fields } as unknown as DeviceDescription<Record<string, never>>)

describe('the definition', () => {
  test('has the defaults', async () => {
    const definition = defineDevice(least)
    expect(definition).toMatchObject({
      apiVersion: 1,
      name: 'least',
      virtioId: 4,
      operations: ['request'],
      errors: ['error'],
      metrics: [],
      timeoutMs: 30_000,
      eventLoop: true,
    })
    expect(definition.queueModule).toBeUndefined()
    expect(v.parse(definition.options, {})).toEqual({})
    expect(v.safeParse(definition.options, { rate: 1 }).success).toBe(false)
    await using device = await testDevice(definition)
    const { features, numQueues, maxQueueSize, qemu, saveState, loadState } = device.device
    expect({ features, numQueues, maxQueueSize, qemu, saveState, loadState }).toEqual({
      features: 0n,
      numQueues: 1,
      maxQueueSize: 32768,
    })
    expect(device.config).toEqual(new Uint8Array(0))
  })

  test('has what the description says', async () => {
    const options = v.strictObject({ queues: v.number() })
    const definition = defineDevice({
      ...least,
      options,
      operations: ['read', 'write'],
      errors: [],
      timeoutMs: 0,
      maxQueueSize: 64,
      features: (1n << 23n) | (1n << 63n),
      config: Uint8Array.of(1, 2, 3),
      qemu: { driver: 'vhost-user-rng-pci', properties: { 'queue-size': 64 } },
    })
    expect(definition).toMatchObject({ options, operations: ['read', 'write'], errors: [], timeoutMs: 0 })
    await using device = await testDevice(definition, { options: { queues: 3 } })
    expect(device.device.features).toBe((1n << 23n) | (1n << 63n))
    expect(device.device.maxQueueSize).toBe(64)
    expect(device.device.qemu?.()).toEqual({ driver: 'vhost-user-rng-pci', properties: { 'queue-size': 64 } })
    expect(device.config).toEqual(Uint8Array.of(1, 2, 3))
  })

  test('asks functions with the options, when the device is opened', async () => {
    const definition = defineDevice({
      ...least,
      options: v.strictObject({ count: v.number() }),
      queues: ({ count }) => Array.from({ length: count }, (_, i) => ({ name: `queue${i}` })),
      features: ({ count }) => BigInt(count),
      config: ({ count }) => new Uint8Array(count),
      qemu: ({ count }) => ({ driver: 'vhost-user-rng-pci', properties: { count } }),
    })
    await using device = await testDevice(definition, { options: { count: 5 } })
    expect(device.device.numQueues).toBe(5)
    expect(device.device.features).toBe(5n)
    expect(device.config).toHaveLength(5)
    expect(device.device.qemu?.()).toMatchObject({ properties: { count: 5 } })
  })
})

describe('a field that is wrong', () => {
  const metric = { name: 'bytes_total', type: 'counter', labels: [], help: 'Bytes.' }

  test.each([
    [{ apiVersion: undefined }, 'apiVersion: expected 1, found undefined'],
    [{ apiVersion: '1' }, "apiVersion: expected 1, found '1'"],
    [{ name: 'My Device' }, "name: expected lower-case letters and digits that begin with a letter, found 'My Device'"],
    [{ name: '9p' }, "name: expected lower-case letters and digits that begin with a letter, found '9p'"],
    [{ virtioId: 0 }, 'virtioId: expected a device id, 1 to 65535, found 0'],
    [{ virtioId: undefined }, 'virtioId: expected a device id, 1 to 65535, found undefined'],
    [{ options: { rate: 'number' } }, "options: expected a valibot strictObject, found { rate: 'number' }"],
    [
      { queues: [] },
      "queues: expected an array of 1 to 256 queues, each { name, kind?: 'requests' | 'buffers' }, found []",
    ],
    [
      { queues: [{ name: 'rx', kind: 'receive' }] },
      "queues: expected an array of 1 to 256 queues, each { name, kind?: 'requests' | 'buffers' }, found [ { name: 'rx', kind: 'receive' } ]",
    ],
    [{ queues: new Array(257).fill({ name: 'rx' }) }, 'queues: expected an array of 1 to 256 queues'],
    [{ queues: [{ kind: 'buffers' }] }, 'queues: expected an array of 1 to 256 queues'],
    [
      { features: 5 },
      'features: expected a bigint of device-specific feature bits (0 to 23 and 50 to 63), see featureSet, found 5',
    ],
    [{ features: 1n << 32n }, 'features: expected a bigint of device-specific feature bits'],
    [{ features: 1n << 64n }, 'features: expected a bigint of device-specific feature bits'],
    [{ features: -1n }, 'features: expected a bigint of device-specific feature bits'],
    [{ config: [1, 2] }, 'config: expected a Uint8Array of at most 256 bytes, found [ 1, 2 ]'],
    [{ config: new Uint8Array(257) }, 'config: expected a Uint8Array of at most 256 bytes'],
    [{ maxQueueSize: 100 }, 'maxQueueSize: expected a power of two, 2 to 32768, found 100'],
    [{ maxQueueSize: 1 }, 'maxQueueSize: expected a power of two, 2 to 32768, found 1'],
    [{ operations: [] }, 'operations: expected an array of 1 to 8 different names, found []'],
    [{ operations: ['a', 'a'] }, "operations: expected an array of 1 to 8 different names, found [ 'a', 'a' ]"],
    [{ operations: 'read' }, "operations: expected an array of 1 to 8 different names, found 'read'"],
    [{ errors: ['a', ''] }, "errors: expected an array of at most 16 different names, found [ 'a', '' ]"],
    [{ metrics: [{ ...metric, type: 'histogram' }] }, 'metrics: expected an array of different metrics, each { name'],
    [{ metrics: [{ ...metric, name: 'Bytes' }] }, 'metrics: expected an array of different metrics, each { name'],
    [{ metrics: [{ ...metric, labels: undefined }] }, 'metrics: expected an array of different metrics, each { name'],
    [{ metrics: [metric, metric] }, 'metrics: expected an array of different metrics, each { name'],
    [{ timeoutMs: -1 }, 'timeoutMs: expected milliseconds, 0 or more, found -1'],
    [{ timeoutMs: '5s' }, "timeoutMs: expected milliseconds, 0 or more, found '5s'"],
    [{ qemu: 'vhost-user-rng-pci' }, "qemu: expected { driver, properties }, found 'vhost-user-rng-pci'"],
    [{ create: undefined }, 'create: expected a function (context) => handlers, found undefined'],
    [{ timeout: 5 }, "there is no field 'timeout', the fields are apiVersion, name, virtioId, options, queues"],
  ])('%o', (fields, message) => {
    expect(() => define(fields)).toThrow(TypeError)
    expect(() => define(fields)).toThrow(`defineDevice: ${message}`)
  })

  test('no description at all', () => {
    expect(() => defineDevice(undefined as unknown as typeof least)).toThrow(
      new TypeError('defineDevice: expected a description, found undefined')
    )
  })

  test('another version of the contract comes before all else', () => {
    expect(() => define({ apiVersion: 2, virtioId: 'new kind' })).toThrow(
      expect.objectContaining({
        name: 'DeviceError',
        code: 'ERR_DEVICE_API_VERSION',
        message: 'the device least is written for version 2 of the contract, this is version 1',
      })
    )
  })

  test.each([
    [{ queues: () => [] }, 'queues(options): expected an array of 1 to 256 queues'],
    [{ queues: () => undefined }, 'queues(options): expected an array of 1 to 256 queues'],
    [{ features: () => 1n << 40n }, 'features(options): expected a bigint of device-specific feature bits'],
    [{ config: () => 'config' }, "config(options): expected a Uint8Array of at most 256 bytes, found 'config'"],
    [{ qemu: () => null }, 'qemu(options): expected { driver, properties }, found null'],
  ])('what a function of the options returns: %o', async (fields, message) => {
    const opened = testDevice(define(fields))
    await expect(opened).rejects.toThrow(TypeError)
    await expect(opened).rejects.toThrow(`least: ${message}`)
  })

  test.each([
    [undefined, 'create: expected an object of handlers, found undefined'],
    [{}, "create: handle: expected a function, since queue 'requests' has requests"],
    [{ handle: 5 }, 'create: handle: expected a function, found 5'],
    [{ handle() {}, reset: true }, 'create: reset: expected a function, found true'],
    [{ handle() {}, saveState() {} }, 'create: loadState: expected a function, since there is saveState'],
    [{ handle() {}, loadState() {} }, 'create: saveState: expected a function, since there is loadState'],
  ])('what create returns: %o', async (handlers, message) => {
    await expect(testDevice(define({ create: () => handlers }))).rejects.toThrow(new TypeError(`least: ${message}`))
  })

  test('a device of buffers alone needs no handle', async () => {
    await using device = await testDevice(define({ queues: [{ name: 'rx', kind: 'buffers' }], create: () => ({}) }))
    expect(device.device.numQueues).toBe(1)
  })
})

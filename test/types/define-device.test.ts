/** What TypeScript knows of a description: the type checker is the test (`npm run lint`); running it shows that it runs. */
import * as v from 'valibot'
import { type DeviceDefinition, type DeviceHandlers, defineDevice } from 'virtiod/device'
import { describe, expect, expectTypeOf, test } from 'vitest'

const handlers: DeviceHandlers = { handle() {} }

describe('defineDevice', () => {
  test('infers the options from the schema, in create and in every function of the options', () => {
    const definition = defineDevice({
      apiVersion: 1,
      name: 'typed',
      virtioId: 4,
      options: v.strictObject({
        path: v.string(),
        rate: v.exactOptional(v.pipe(v.number(), v.integer())),
        mode: v.optional(v.picklist(['fast', 'slow']), 'fast'),
      }),
      queues(options) {
        expectTypeOf(options.path).toEqualTypeOf<string>()
        return [{ name: 'requests' }]
      },
      features(options) {
        expectTypeOf(options.mode).toEqualTypeOf<'fast' | 'slow'>()
        return 0n
      },
      config(options) {
        expectTypeOf(options.rate).toEqualTypeOf<number | undefined>()
        return new Uint8Array(8)
      },
      qemu(options) {
        expectTypeOf(options.path).toEqualTypeOf<string>()
        return { driver: 'vhost-user-rng-pci', properties: {} }
      },
      create(context) {
        expectTypeOf(context.options.path).toEqualTypeOf<string>()
        expectTypeOf(context.options.rate).toEqualTypeOf<number | undefined>()
        expectTypeOf(context.options.mode).toEqualTypeOf<'fast' | 'slow'>()
        // @ts-expect-error the schema has no such option
        expectTypeOf(context.options.pth).toEqualTypeOf<unknown>()
        return handlers
      },
    })
    expectTypeOf(definition).toExtend<DeviceDefinition>()
    expect(definition.name).toBe('typed')
  })

  test('an async create infers them as well', () => {
    defineDevice({
      apiVersion: 1,
      name: 'typed',
      virtioId: 4,
      options: v.strictObject({ size: v.number() }),
      queues: [{ name: 'requests' }],
      async create({ options }) {
        expectTypeOf(options).toEqualTypeOf<{ size: number }>()
        return handlers
      },
    })
  })

  test('a device without a schema has no options', () => {
    defineDevice({
      apiVersion: 1,
      name: 'typed',
      virtioId: 4,
      queues: [{ name: 'requests' }],
      create({ options }) {
        expectTypeOf(options).toEqualTypeOf<Record<string, never>>()
        return handlers
      },
    })
  })

  test('handlers know their arguments without types', () => {
    defineDevice({
      apiVersion: 1,
      name: 'typed',
      virtioId: 4,
      queues: [{ name: 'requests' }, { name: 'events', kind: 'buffers' }],
      create: () => ({
        async handle(chain, queue) {
          expectTypeOf(chain.reader.u64()).toEqualTypeOf<bigint>()
          expectTypeOf(chain.reader.bytes()).toEqualTypeOf<Uint8Array<ArrayBuffer>>()
          expectTypeOf(queue.index).toEqualTypeOf<number>()
        },
        writeConfig: (offset, bytes) => offset === 0 && bytes.length === 1,
      }),
    })
  })

  test('a field that does not exist, or is of another type, is an error', () => {
    const define = (): DeviceDefinition =>
      defineDevice({
        apiVersion: 1,
        name: 'typed',
        virtioId: 4,
        queues: [{ name: 'requests' }],
        // @ts-expect-error it is called timeoutMs
        timeout: 5,
        create: () => handlers,
      })
    expect(define).toThrow(TypeError)
    const older = (): DeviceDefinition =>
      defineDevice({
        // @ts-expect-error this is version 1
        apiVersion: 0,
        name: 'typed',
        virtioId: 4,
        queues: [{ name: 'requests' }],
        create: () => handlers,
      })
    expect(older).toThrow('is written for version 0 of the contract')
  })
})

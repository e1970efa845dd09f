/** The JSON Schema says the same as the tables: the same keys, the same limits. */
import { expect, test } from 'vitest'
import { blkOptions } from '../../devices/blk/options.ts'
import { netOptions } from '../../devices/net/options.ts'
import { configSchema } from '../../src/daemon/config-schema.ts'
import { deviceNames } from '../../src/daemon/devices.ts'
import { daemonOptions, listenerOptions } from '../../src/daemon/options.ts'

interface Schema {
  type: string
  properties: Record<string, Schema & { description?: string; enum?: unknown[]; items?: Schema }>
  required: string[]
  additionalProperties: boolean
  oneOf: Schema[]
  allOf: Schema[]
}

/** Of the items of `devices`, by type. */
function deviceSchema(schema: Schema, type: string): Schema {
  const variants = schema.properties['devices']!.items!.oneOf
  return variants.find(({ properties }) => (properties['type'] as unknown as { const: string }).const === type)!
}

test('top level and device', async () => {
  const schema = (await configSchema()) as unknown as Schema
  expect(schema).toMatchObject({
    $schema: 'https://json-schema.org/draft/2020-12/schema',
    type: 'object',
    additionalProperties: false,
    required: ['devices'],
  })
  expect(Object.keys(schema.properties).sort()).toEqual([...Object.keys(daemonOptions.entries), 'devices'].sort())
  expect(schema.properties['devices']!.items!.oneOf).toHaveLength(deviceNames.length + 1)
  const device = deviceSchema(schema, 'blk')
  expect(device).toMatchObject({ type: 'object', additionalProperties: false, required: ['type', 'blk-file'] })
  expect(device.oneOf.map(({ required }) => required)).toEqual([['socket-path'], ['fd']])
  expect(Object.keys(device.properties).sort()).toEqual(
    ['type', 'name', ...Object.keys(listenerOptions.entries), ...Object.keys(blkOptions.entries)].sort()
  )
  expect(device.properties).toMatchObject({
    type: { const: 'blk' },
    'num-queues': { type: 'integer', minimum: 1, maximum: 256, default: 16 },
    cache: { enum: ['none', 'writethrough', 'writeback', 'unsafe'], default: 'writeback' },
    'read-only': { type: 'boolean', default: false },
    serial: { type: 'string', pattern: '^[ -~]{1,20}$' },
  })
})

test('a network card: one socket, and one of the links', async () => {
  const device = deviceSchema((await configSchema()) as unknown as Schema, 'net')
  expect(Object.keys(device.properties).sort()).toEqual(
    ['type', 'name', ...Object.keys(listenerOptions.entries), ...Object.keys(netOptions.entries)].sort()
  )
  expect(device).toMatchObject({ type: 'object', additionalProperties: false, required: ['type'] })
  expect(device.allOf.map(({ oneOf }) => oneOf.map(({ required }) => required))).toEqual([
    [['socket-path'], ['fd']],
    [['tap'], ['tap-fd'], ['switch']],
  ])
  const pattern = new RegExp((device.properties['tap'] as unknown as { pattern: string }).pattern)
  expect(['tap0', 'a/b', 'x'.repeat(16)].map((name) => pattern.test(name))).toEqual([true, false, false])
})

test('every key is described, for the editor to show', async () => {
  const schema = (await configSchema()) as unknown as Schema
  const devices = schema.properties['devices']!.items!.oneOf.flatMap(({ properties }) => Object.entries(properties))
  for (const [name, property] of [...Object.entries(schema.properties), ...devices]) {
    expect(property.description, name).toMatch(/^[A-Z]|^serve /)
  }
})

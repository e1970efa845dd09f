/** The JSON Schema says the same as the tables: the same keys, the same limits. */
import { expect, test } from 'vitest'
import { blkOptions } from '../../devices/blk/options.ts'
import { configSchema } from '../../src/daemon/config-schema.ts'
import { daemonOptions, listenerOptions } from '../../src/daemon/options.ts'

interface Schema {
  type: string
  properties: Record<string, Schema & { description?: string; enum?: unknown[]; items?: Schema }>
  required: string[]
  additionalProperties: boolean
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
  const device = schema.properties['devices']!.items as Schema
  expect(device).toMatchObject({ type: 'object', additionalProperties: false, required: ['type', 'blk-file'] })
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

test('every key is described, for the editor to show', async () => {
  const schema = (await configSchema()) as unknown as Schema
  const device = schema.properties['devices']!.items as Schema
  for (const [name, property] of [...Object.entries(schema.properties), ...Object.entries(device.properties)]) {
    expect(property.description, name).toMatch(/^[A-Z]|^serve /)
  }
})

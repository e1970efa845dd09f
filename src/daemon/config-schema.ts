/**
 * The JSON Schema of the configuration file, for editors, made from the option tables. Loading it costs a library: only
 * `virtiod config-schema` and tests do.
 */
import { toJsonSchema } from '@valibot/to-json-schema'
import * as v from 'valibot'
import { deviceKeys, moduleKeys } from './config.ts'
import { deviceNames, devices, MODULE_TYPE } from './devices.ts'
import { alternatives, asOptionTable, METADATA_KEYS } from './option-table.ts'
import { daemonOptions, listenerOptions } from './options.ts'

/** A JSON Schema (draft 2020-12) as a plain object. */
export async function configSchema(): Promise<Record<string, unknown>> {
  const variants = [...(await Promise.all(deviceNames.map(deviceSchema))), moduleSchema()]
  const top = jsonSchema(daemonOptions)
  return {
    $schema: 'https://json-schema.org/draft/2020-12/schema',
    title: 'virtiod configuration',
    ...top,
    properties: {
      ...(top['properties'] as object),
      devices: {
        description: 'The devices to serve, each on its own socket',
        type: 'array',
        minItems: 1,
        items: { oneOf: variants },
      },
    },
    required: ['devices'],
  }
}

async function deviceSchema(type: string): Promise<Record<string, unknown>> {
  const own = asOptionTable((await devices[type]!.load()).options, type)
  const schema = jsonSchema(
    v.strictObject({
      ...deviceKeys.entries,
      type: v.pipe(v.literal(type), v.description(devices[type]!.summary)),
      ...listenerOptions.entries,
      ...own.entries,
    } as v.ObjectEntries)
  )
  const choices = alternatives(own)
  const socket = exactlyOne(Object.keys(listenerOptions.entries))
  return choices.length === 0 ? { ...schema, ...socket } : { ...schema, allOf: [socket, exactlyOne(choices)] }
}

/** A device of the operator's own: its options are the module's to say. */
function moduleSchema(): Record<string, unknown> {
  const schema = jsonSchema(
    v.strictObject({
      ...deviceKeys.entries,
      type: v.pipe(v.literal(MODULE_TYPE), v.description('Serve a device of your own')),
      ...listenerOptions.entries,
      ...moduleKeys.entries,
    } as v.ObjectEntries)
  )
  return { ...schema, ...exactlyOne(Object.keys(listenerOptions.entries)) }
}

/** A strictObject can't say that. */
function exactlyOne(names: readonly string[]): object {
  return { oneOf: names.map((name) => ({ required: [name] })) }
}

/**
 * What a file holds is a schema's input; what JSON Schema can't say (checks in code) is left out, the daemon checks
 * it.
 */
function jsonSchema(schema: v.GenericSchema): Record<string, unknown> {
  const { $schema: _, ...top } = toJsonSchema(schema as Parameters<typeof toJsonSchema>[0], {
    target: 'draft-2020-12',
    typeMode: 'input',
    errorMode: 'ignore',
  })
  // The converter copies metadata; strict validators refuse keywords that they don't know.
  const properties = Object.entries(top.properties ?? {}).map(([name, property]) => [
    name,
    Object.fromEntries(Object.entries(property).filter(([keyword]) => !METADATA_KEYS.includes(keyword))),
  ])
  return { ...top, properties: Object.fromEntries(properties) }
}

/** `virtiod blk` and its like: serves one device that the flags describe. One command for every device of the registry. */
import * as v from 'valibot'
import { configFromFlags } from '../../daemon/config.ts'
import { type DeviceEntry, devices } from '../../daemon/devices.ts'
import { alternatives, asOptionTable, type OptionTable, optionsOf } from '../../daemon/option-table.ts'
import { daemonOptions, listenerOptions } from '../../daemon/options.ts'
import type { DeviceDefinition } from '../../device/index.ts'
import type { Command, OptionScope } from '../command.ts'
import { optionUsage } from '../help.ts'
import { checkOnly, checkOptions } from './check.ts'

const programOptions = v.strictObject({
  ...checkOptions.entries,
  'print-capabilities': v.optional(
    v.pipe(v.boolean(), v.description('Print what this back-end can do as JSON and exit (for libvirt)')),
    false
  ),
})

/** @param type a name of the device registry */
export async function deviceCommand(type: string): Promise<Command> {
  const { load, summary, capabilities, several } = devices[type]!
  const definition = await load()
  const own = deviceScope(type, definition)
  return {
    name: type,
    description: `${summary.charAt(0).toUpperCase()}${summary.slice(1)}. It runs in the foreground until SIGTERM or SIGINT; logs are JSON lines on stdout.`,
    usage: usageLines(own.table, several),
    positionals: [],
    repeatable: repeatable(several),
    scopes: [
      own,
      { title: 'Listener options', table: listenerOptions },
      { title: 'Daemon options', table: daemonOptions },
      { title: 'Program options', table: programOptions },
    ],
    capabilities,
    run: async ({ values }) => {
      const config = configFromFlags(definition, values)
      if (values['check-config'] === true) return checkOnly(config)
      // The daemon and the native addon load only now: help and bad flags need neither.
      const [{ serve }, { createLogger }] = await Promise.all([import('../serve.ts'), import('../../daemon/log.ts')])
      return serve(config, createLogger(config.logLevel))
    },
  }
}

/** A line for each kind of socket, or for each of the options that exclude one another. */
function usageLines(table: OptionTable, several: DeviceEntry['several']): string[] {
  const infos = optionsOf(table)
  const required = infos.filter((info) => info.required).map((info) => ` ${optionUsage(info)}`)
  const choices = alternatives(table)
  if (choices.length === 0)
    return ['--socket-path PATH', '--fd N'].map((socket) => `${socket}${required.join('')} [options]`)
  return infos
    .filter(({ name }) => choices.includes(name))
    .map((info) => {
      const more = info.name === several?.with ? ' [--socket-path PATH …]' : ''
      return `--socket-path PATH${more}${required.join('')} ${optionUsage(info)} [options]`
    })
}

/** What a device's command line may repeat. */
export function repeatable(several: DeviceEntry['several']): readonly string[] {
  return several === undefined ? [] : Object.keys(listenerOptions.entries)
}

export function deviceScope(type: string, definition: DeviceDefinition): OptionScope {
  return { title: 'Device options', table: asOptionTable(definition.options, type) }
}

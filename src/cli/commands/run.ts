/** `virtiod run CONFIG`: serves the devices of a configuration file. */
import { loadConfig } from '../../daemon/config.ts'
import type { Command } from '../command.ts'
import { checkOnly, checkOptions } from './check.ts'

export const runCommand: Command = {
  name: 'run',
  description:
    'Serve any number of devices in one process. The file has the daemon options at its top level and a list of devices; ' +
    'each has a type, a socket-path and the options of its type, named as on the command line. Relative paths are ' +
    'relative to the file. "virtiod config-schema" prints its JSON Schema.',
  usage: ['CONFIG [options]'],
  positionals: [{ name: 'CONFIG', description: 'a YAML or JSON file' }],
  scopes: [{ title: 'Options', table: checkOptions }],
  run: async ({ values, positionals }) => {
    const config = await loadConfig(positionals[0]!)
    if (values['check-config'] === true) return checkOnly(config)
    const [{ serve }, { createLogger }] = await Promise.all([import('../serve.ts'), import('../../daemon/log.ts')])
    return serve(config, createLogger(config.logLevel))
  },
}

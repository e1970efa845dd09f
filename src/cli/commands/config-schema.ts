/** `virtiod config-schema`: the JSON Schema of the configuration file. */
import type { Command } from '../command.ts'
import { EXIT_OK } from '../exit-codes.ts'

export const configSchemaCommand: Command = {
  name: 'config-schema',
  description:
    'Print the JSON Schema of the configuration file. Editors with the YAML language server use it after a first line ' +
    '"# yaml-language-server: $schema=FILE".',
  usage: [''],
  positionals: [],
  scopes: [],
  run: async () => {
    const { configSchema } = await import('../../daemon/config-schema.ts')
    process.stdout.write(`${JSON.stringify(await configSchema(), null, 2)}\n`)
    return EXIT_OK
  },
}

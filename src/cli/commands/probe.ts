/** `virtiod probe SOCKET`: the questions are in `src/frontend/probe.ts`. */
import * as v from 'valibot'
import { checkValues } from '../../daemon/option-table.ts'
import type { Command } from '../command.ts'
import { EXIT_OK } from '../exit-codes.ts'

const probeOptions = v.strictObject({
  json: v.optional(v.pipe(v.boolean(), v.description('Print the result as JSON')), false),
})

export const probeCommand: Command = {
  name: 'probe',
  description:
    'Show what a vhost-user back-end (virtiod, qemu-storage-daemon, SPDK or any other) offers on its socket: features by ' +
    'name, queues, memory slots, config space. No ring is started and nothing is written.',
  usage: ['SOCKET [options]'],
  positionals: [{ name: 'SOCKET', description: 'the unix socket of a vhost-user back-end' }],
  scopes: [{ title: 'Options', table: probeOptions }],
  run: async ({ values, positionals }) => {
    const options = checkValues(probeOptions, values, (name) => `--${name}`) as v.InferOutput<typeof probeOptions>
    const { formatProbe, probe, probeJson } = await import('../../frontend/probe.ts')
    const result = probe(positionals[0]!)
    const text = options.json ? probeJson(result) : formatProbe(result)
    process.stdout.write(`${text.trimEnd()}\n`)
    return EXIT_OK
  },
}

/** `virtiod verify SOCKET`: the cases are in `src/frontend/verify/`. */
import * as v from 'valibot'
import { checkValues } from '../../daemon/option-table.ts'
import { ConfigError } from '../../device/errors.ts'
import type { Command } from '../command.ts'
import { EXIT_FAILURE, EXIT_OK } from '../exit-codes.ts'

const verifyOptions = v.strictObject({
  'read-only': v.optional(v.pipe(v.boolean(), v.description('Run only the cases that write nothing')), false),
  hostile: v.optional(
    v.pipe(
      v.boolean(),
      v.description('Also break rings on purpose, after all else; that may end the back-end, and virtiod stays up')
    ),
    false
  ),
  packed: v.optional(
    v.pipe(v.boolean(), v.description('Use packed rings; cases about what only split rings have are skipped')),
    false
  ),
  'in-order': v.optional(v.pipe(v.boolean(), v.description('Have everything completed in order (IN_ORDER)')), false),
  filter: v.optional(
    v.pipe(
      v.array(v.string()),
      v.description('Run only the cases whose name contains this text; may be given several times'),
      v.metadata({ placeholder: 'TEXT' })
    ),
    []
  ),
  seed: v.optional(
    v.pipe(
      v.number(),
      v.integer(),
      v.minValue(1),
      v.maxValue(2 ** 31 - 1),
      v.description('Start of the random numbers; the same seed makes the same requests'),
      v.metadata({ placeholder: 'N' })
    ),
    1
  ),
  json: v.optional(v.pipe(v.boolean(), v.description('Print the result as JSON, at the end')), false),
})

export const verifyCommand: Command = {
  name: 'verify',
  description:
    'Check a vhost-user-blk back-end (virtiod, qemu-storage-daemon, SPDK or any other) through its socket: the protocol, ' +
    'data integrity, request framing, ring corner cases. One PASS, FAIL or SKIP line per case; exit code 1 when one fails ' +
    'that is no known fault of that program. The cases write to the last 32 MiB of the disk and restore them at the end, ' +
    'after ^C as well; a crash in between would leave them overwritten.',
  usage: ['SOCKET [options]'],
  positionals: [{ name: 'SOCKET', description: 'the unix socket of a vhost-user-blk back-end' }],
  scopes: [{ title: 'Options', table: verifyOptions }],
  run: async ({ values, positionals }) => {
    const options = checkValues(verifyOptions, values, (name) => `--${name}`) as v.InferOutput<typeof verifyOptions>
    const { CASES, formatSummary, HOSTILE_CASES, verify } = await import('../../frontend/verify/index.ts')
    const names = [...CASES, ...(options.hostile ? HOSTILE_CASES : [])].map(({ name }) => name)
    const useless = options.filter.find((text) => !names.some((name) => name.includes(text)))
    if (useless !== undefined) {
      const fix = `Give a part of one, such as ${names[0]}${options.hostile ? '' : '; those of hostile/ need --hostile'}.`
      throw new ConfigError('ERR_OPTION_VALUE', '--filter', `no case has "${useless}" in its name`, fix)
    }
    const socket = positionals[0]!
    const { deviceAt } = await import('../../frontend/probe.ts')
    const device = deviceAt(socket)
    if (device === 'net' || device === 'scsi') {
      const fix = 'Give the socket of a virtio-blk disk; "virtiod probe" and "virtiod bench" know the others.'
      const found = device === 'net' ? 'network card' : 'SCSI device'
      throw new ConfigError('ERR_ARGUMENT', socket, `a ${found} is there, and the cases are for disks`, fix)
    }
    const result = await verify(socket, {
      readOnly: options['read-only'],
      hostile: options.hostile,
      packed: options.packed,
      inOrder: options['in-order'],
      filter: options.filter,
      seed: options.seed,
      signal: interrupted(),
      ...(options.json ? {} : { progress: (line: string) => process.stdout.write(`${line}\n`) }),
    })
    process.stdout.write(`${options.json ? JSON.stringify(result) : formatSummary(result)}\n`)
    return result.failed === 0 && result.restored && !result.aborted ? EXIT_OK : EXIT_FAILURE
  },
}

/** Aborted by the first SIGINT or SIGTERM, so that the disk is restored; a second one has its usual effect. */
function interrupted(): AbortSignal {
  const controller = new AbortController()
  for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => controller.abort())
  return controller.signal
}

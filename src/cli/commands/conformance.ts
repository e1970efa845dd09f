/** `virtiod conformance SOCKET`: the cases are in `src/frontend/conformance/`. */
import * as v from 'valibot'
import { checkValues, suggest } from '../../daemon/option-table.ts'
import { ConfigError } from '../../device/errors.ts'
import type { Command } from '../command.ts'
import { EXIT_FAILURE, EXIT_OK } from '../exit-codes.ts'

const words = (description: string, placeholder: string) =>
  v.optional(v.pipe(v.array(v.string()), v.description(description), v.metadata({ placeholder })), [])

const flag = (description: string) => v.optional(v.pipe(v.boolean(), v.description(description)), false)

const conformanceOptions = v.strictObject({
  type: v.optional(
    v.pipe(
      v.picklist(['auto', 'blk', 'net']),
      v.description('What is behind the socket; auto goes by the features that it offers'),
      v.metadata({ placeholder: 'auto|blk|net' })
    ),
    'auto'
  ),
  case: words('Run only this case; may be given several times', 'ID'),
  group: words('Run only the cases of this group; may be given several times', 'NAME'),
  destructive: flag('Also run the cases that write to the disk or change the settings of the device'),
  peer: v.exactOptional(
    v.pipe(
      v.string(),
      v.description('A second socket of a network back-end: frames sent into it come out of the first'),
      v.metadata({ placeholder: 'SOCKET2' })
    )
  ),
  timeout: v.optional(
    v.pipe(
      v.number(),
      v.integer(),
      v.minValue(100),
      v.maxValue(60_000),
      v.description('Milliseconds that one request may take'),
      v.metadata({ placeholder: 'MS' })
    ),
    3000
  ),
  list: flag('Print all cases as Markdown tables and exit; no socket is needed'),
  json: flag('Print the result as JSON, at the end'),
})

export const conformanceCommand: Command = {
  name: 'conformance',
  description:
    'Check a vhost-user-blk or vhost-user-net back-end (virtiod, qemu-storage-daemon, SPDK, DPDK, rust-vmm or ' +
    'any other) against the specifications, through its socket: a line per case with what was seen, and where ' +
    'it is written what should have been. A MUST that does not hold is FAIL, a SHOULD is WARN, what is not ' +
    'offered is skipped. Some cases try to break the back-end; when it dies, that is an ERROR of the case, and ' +
    'the suite waits a moment for somebody to start it again. Exit code 0 when every MUST holds, 1 when one ' +
    'does not. No case writes to the disk without --destructive; with it the last MiB of the disk is ' +
    'overwritten.',
  usage: ['SOCKET [options]', '--list'],
  positionals: [{ name: 'SOCKET', description: 'the unix socket of a vhost-user back-end', optional: true }],
  scopes: [{ title: 'Options', table: conformanceOptions }],
  run: async ({ values, positionals }) => {
    const options = checkValues(conformanceOptions, values, (name) => `--${name}`) as v.InferOutput<
      typeof conformanceOptions
    >
    const { CASES, conformance, formatList, formatResult, formatSummary, GROUPS } = await import(
      '../../frontend/conformance/index.ts'
    )
    if (options.list) {
      process.stdout.write(formatList())
      return EXIT_OK
    }
    const socket = positionals[0]
    if (socket === undefined) {
      const fix = 'Give the unix socket of a vhost-user back-end, or --list.'
      throw new ConfigError('ERR_ARGUMENT', 'SOCKET', 'missing', fix)
    }
    const ids = CASES.map(({ id }) => id)
    for (const id of options.case) checkWord('--case', id, ids)
    const groups = Object.keys(GROUPS)
    for (const group of options.group) checkWord('--group', group, groups)
    const result = await conformance(socket, {
      type: options.type,
      ids: options.case,
      groups: options.group as (keyof typeof GROUPS)[],
      destructive: options.destructive,
      timeoutMs: options.timeout,
      signal: interrupted(),
      ...(options.peer !== undefined && { peer: options.peer }),
      ...(!options.json && { progress: (one) => process.stdout.write(`${formatResult(one)}\n`) }),
    })
    process.stdout.write(options.json ? `${JSON.stringify(result)}\n` : `\n${formatSummary(result)}\n`)
    return result.conforms && !result.aborted ? EXIT_OK : EXIT_FAILURE
  },
}

/** @throws ConfigError when `word` is none of `known` */
function checkWord(option: string, word: string, known: readonly string[]): void {
  if (known.includes(word)) return
  const close = suggest(word, known)
  const fix = close === undefined ? '"virtiod conformance --list" names them.' : `Did you mean ${close}?`
  throw new ConfigError('ERR_OPTION_VALUE', option, `there is no "${word}"`, fix)
}

/** Aborted by the first SIGINT or SIGTERM, after the case that runs; a second one has its usual effect. */
function interrupted(): AbortSignal {
  const controller = new AbortController()
  for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => controller.abort())
  return controller.signal
}

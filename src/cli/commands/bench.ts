/** `virtiod bench SOCKET`: options in, figures out; the measuring is in `src/frontend/bench.ts`. */
import * as v from 'valibot'
import { checkValues } from '../../daemon/option-table.ts'
import { ConfigError } from '../../device/errors.ts'
import type { BenchOptions, BenchResult } from '../../frontend/bench.ts'
import type { Command } from '../command.ts'
import { EXIT_FAILURE, EXIT_OK } from '../exit-codes.ts'

const integer = (min: number, max: number, description: string, metadata: Record<string, unknown> = {}) =>
  v.pipe(
    v.number(),
    v.integer(),
    v.minValue(min),
    v.maxValue(max),
    v.description(description),
    v.metadata({ placeholder: 'N', ...metadata })
  )

const benchOptions = v.strictObject({
  rw: v.optional(
    v.pipe(
      v.picklist(['read', 'write', 'randread', 'randwrite', 'randrw']),
      v.description('The pattern, as fio names it; those that write destroy what is on the disk'),
      v.metadata({ placeholder: 'PATTERN' })
    ),
    'randread'
  ),
  bs: v.optional(integer(512, 2 ** 25, 'Bytes per request', { size: true, placeholder: 'SIZE' }), 4096),
  qd: v.optional(integer(1, 8192, 'Requests in flight per queue'), 32),
  queues: v.optional(integer(1, 256, 'Virtqueues to use'), 1),
  driver: v.optional(
    v.pipe(
      v.picklist(['poll', 'irq']),
      v.description(
        'How the driver waits: poll = it watches the rings, irq = it sleeps until it is called, as a guest does'
      ),
      v.metadata({ placeholder: 'poll|irq' })
    ),
    'poll'
  ),
  seconds: v.optional(integer(1, 86_400, 'How long to measure'), 5),
  size: v.exactOptional(
    integer(512, Number.MAX_SAFE_INTEGER, 'How much of the disk to use, from its start', {
      size: true,
      unset: 'all of it',
      placeholder: 'SIZE',
    })
  ),
  indirect: v.optional(v.pipe(v.boolean(), v.description('Use indirect descriptors where they are offered')), false),
  'no-event-idx': v.optional(v.pipe(v.boolean(), v.description("Don't negotiate EVENT_IDX")), false),
  json: v.optional(v.pipe(v.boolean(), v.description('Print the result as JSON')), false),
})

export const benchCommand: Command = {
  name: 'bench',
  description:
    'Measure a vhost-user-blk back-end (virtiod, qemu-storage-daemon, SPDK or any other) through its socket: IOPS, MB/s, ' +
    'latency percentiles, kicks and calls per request, and the processor time of the back-end per request. Pin the two ' +
    'ends with taskset for figures that repeat.',
  usage: ['SOCKET [options]'],
  positionals: [{ name: 'SOCKET', description: 'the unix socket of a vhost-user-blk back-end' }],
  scopes: [{ title: 'Options', table: benchOptions }],
  run: async ({ values, positionals }) => {
    const options = checkValues(benchOptions, values, (name) => `--${name}`) as v.InferOutput<typeof benchOptions>
    const socket = positionals[0]!
    const { bench, formatBench, writeWarning } = await import('../../frontend/bench.ts')
    const progress = options.json || !process.stderr.isTTY ? undefined : showProgress
    const settings: BenchOptions = {
      rw: options.rw,
      bs: options.bs,
      qd: options.qd,
      queues: options.queues,
      driver: options.driver,
      seconds: options.seconds,
      indirect: options.indirect,
      noEventIdx: options['no-event-idx'],
      ...(options.size === undefined ? {} : { size: options.size }),
      ...(progress === undefined ? {} : { progress }),
    }
    const warning = writeWarning(socket, settings)
    if (warning !== undefined) process.stderr.write(`${warning}\n`)
    const result = runBench(() => bench(socket, settings))
    if (progress !== undefined) process.stderr.write('\r\x1b[K')
    process.stdout.write(options.json ? `${JSON.stringify(result)}\n` : `${formatBench(result)}\n`)
    return result.errors === 0 ? EXIT_OK : EXIT_FAILURE
  },
}

function showProgress(line: string): void {
  process.stderr.write(`\r\x1b[K${line}`)
}

/** Options that only the disk can refuse come back as `RangeError: qd: …`. */
function runBench(run: () => BenchResult): BenchResult {
  try {
    return run()
  } catch (error) {
    const [, option, problem] = (error instanceof RangeError && /^(\w+): (.*)$/.exec(error.message)) || []
    if (option === undefined || problem === undefined) throw error
    throw new ConfigError('ERR_OPTION_VALUE', `--${option}`, problem, 'Give a value that fits the disk.', {
      cause: error,
    })
  }
}

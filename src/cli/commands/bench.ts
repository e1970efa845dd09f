/** `virtiod bench SOCKET`: options in, figures out; the measuring is in `src/frontend/bench.ts` and `net-bench.ts`. */
import * as v from 'valibot'
import { checkValues, type OptionTable } from '../../daemon/option-table.ts'
import { ConfigError } from '../../device/errors.ts'
import type { BenchOptions } from '../../frontend/bench.ts'
import type { NetBenchOptions } from '../../frontend/net-bench.ts'
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

const flag = (description: string) => v.optional(v.pipe(v.boolean(), v.description(description)), false)

const text = (description: string, metadata: Record<string, unknown>) =>
  v.exactOptional(v.pipe(v.string(), v.description(description), v.metadata(metadata)))

const commonOptions = v.strictObject({
  device: v.optional(
    v.pipe(
      v.picklist(['auto', 'blk', 'scsi', 'net']),
      v.description('What is behind the socket; auto goes by the features that it offers'),
      v.metadata({ placeholder: 'auto|blk|scsi|net' })
    ),
    'auto'
  ),
  queues: v.optional(integer(1, 256, 'Virtqueues to use; for a network device pairs of them'), 1),
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
  'no-event-idx': flag("Don't negotiate EVENT_IDX"),
  packed: flag('Use packed rings; the back-end has to offer RING_PACKED'),
  inflight: flag('Have the back-end track what is in flight; it has to offer INFLIGHT_SHMFD'),
  json: flag('Print the result as JSON'),
})

const blkOptions = v.strictObject({
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
  size: v.exactOptional(
    integer(512, Number.MAX_SAFE_INTEGER, 'How much of the disk to use, from its start', {
      size: true,
      unset: 'all of it',
      placeholder: 'SIZE',
    })
  ),
  lun: v.optional(integer(0, 255, 'The logical unit of a SCSI device'), 0),
  indirect: flag('Use indirect descriptors where they are offered'),
  'in-order': flag('Have everything completed in order; the back-end has to offer IN_ORDER'),
  log: flag('Have the back-end log the pages that it writes to, as in a live migration'),
})

const netOptions = v.strictObject({
  traffic: v.optional(
    v.pipe(
      v.picklist(['tx', 'rx', 'echo']),
      v.description(
        'With one socket: tx = send, rx = count what somebody else sends, echo = send and count what comes back'
      ),
      v.metadata({ placeholder: 'tx|rx|echo' })
    ),
    'tx'
  ),
  both: flag('With two sockets: send both ways'),
  'frame-size': v.optional(
    integer(64, 65_549, 'Bytes of a frame; above 1518 it is TCP for segmentation offload', { placeholder: 'BYTES' }),
    64
  ),
  flows: v.optional(integer(1, 32_768, 'UDP or TCP flows to spread the packets over'), 1),
  'queue-size': v.optional(integer(4, 32_768, 'Entries of each ring, a power of two'), 256),
  mac: text('MAC address of the first side', { placeholder: 'MAC', unset: '02:00:5e:12:00:01' }),
  'peer-mac': text('MAC address of the other side, to which the first one sends', {
    placeholder: 'MAC',
    unset: '02:00:5e:12:00:02',
  }),
  'no-mrg-rxbuf': flag("Don't negotiate MRG_RXBUF: a packet comes in one buffer"),
})

type Common = v.InferOutput<typeof commonOptions>
type Values = Readonly<Record<string, unknown>>
type Progress = { progress?: (line: string) => void }

export const benchCommand: Command = {
  name: 'bench',
  description:
    'Measure a vhost-user-blk, vhost-user-scsi or vhost-user-net back-end (virtiod, qemu-storage-daemon, SPDK, DPDK or any other) through ' +
    'its socket. For a disk: IOPS, MB/s and latency percentiles. For a network device: packets/s and Gbit/s into it or ' +
    'out of it; with a second socket from the first to the second, through a switch for example. And for both kicks, ' +
    'calls and the processor time of the back-end per request. Pin the two ends with taskset for figures that repeat.',
  usage: ['SOCKET [SOCKET2] [options]'],
  positionals: [
    { name: 'SOCKET', description: 'the unix socket of a vhost-user back-end' },
    { name: 'SOCKET2', description: 'the one where packets come out that go in at the first', optional: true },
  ],
  scopes: [
    { title: 'Options', table: commonOptions },
    { title: 'Options for disks', table: blkOptions },
    { title: 'Options for network devices', table: netOptions },
  ],
  run: async ({ values, positionals }) => {
    const common = checked(commonOptions, values)
    const sockets = positionals as readonly [string] | readonly [string, string]
    const device = common.device === 'auto' ? await deviceBehind(sockets[0], values, sockets.length) : common.device
    const others = device === 'net' ? blkOptions : netOptions
    const stray = Object.keys(others.entries).find((name) => values[name] !== undefined)
    if (stray !== undefined) throw misplaced(`--${stray}`, device)
    if (device !== 'net' && sockets[1] !== undefined) throw misplaced(sockets[1], device)
    if (device === 'blk' && values['lun'] !== undefined) throw misplaced('--lun', device, 'a SCSI device')
    const progress: Progress = common.json || !process.stderr.isTTY ? {} : { progress: showProgress }
    const ok =
      device === 'net'
        ? await runNet(sockets, values, common, progress)
        : await runDisk(sockets[0], device, values, common, progress)
    return ok ? EXIT_OK : EXIT_FAILURE
  },
}

async function runDisk(
  socket: string,
  device: 'blk' | 'scsi',
  values: Values,
  common: Common,
  progress: Progress
): Promise<boolean> {
  const options = checked(blkOptions, values)
  const { bench, formatBench, writeWarning } = await import('../../frontend/bench.ts')
  const settings: BenchOptions = {
    device,
    lun: options.lun,
    rw: options.rw,
    bs: options.bs,
    qd: options.qd,
    queues: common.queues,
    driver: common.driver,
    seconds: common.seconds,
    indirect: options.indirect,
    inOrder: options['in-order'],
    log: options.log,
    ...ringOptions(common),
    ...(options.size === undefined ? {} : { size: options.size }),
    ...progress,
  }
  const warning = writeWarning(socket, settings)
  if (warning !== undefined) process.stderr.write(`${warning}\n`)
  const result = refusable('disk', () => bench(socket, settings))
  print(result, formatBench(result), common.json, progress)
  return result.errors === 0
}

async function runNet(
  sockets: readonly [string] | readonly [string, string],
  values: Values,
  common: Common,
  progress: Progress
): Promise<boolean> {
  const options = checked(netOptions, values)
  const two = sockets.length === 2
  const useless = two ? 'traffic' : 'both'
  if (values[useless] !== undefined) {
    const problem = two ? 'with two sockets packets go from the first to the second' : 'it takes two sockets'
    throw new ConfigError('ERR_OPTION_VALUE', `--${useless}`, problem, two ? 'Leave it out.' : 'Name a second socket.')
  }
  const { MACS, formatNetBench, netBench } = await import('../../frontend/net-bench.ts')
  const settings: NetBenchOptions = {
    ...(two ? { both: options.both } : { traffic: options.traffic }),
    frameSize: options['frame-size'],
    flows: options.flows,
    macs: [options.mac ?? MACS[0], options['peer-mac'] ?? MACS[1]],
    queues: common.queues,
    queueSize: options['queue-size'],
    driver: common.driver,
    seconds: common.seconds,
    ...ringOptions(common),
    noMergeable: options['no-mrg-rxbuf'],
    ...progress,
  }
  const result = refusable('network device', () => netBench(sockets, settings))
  print(result, formatNetBench(result), common.json, progress)
  return result.packetsPerSecond > 0
}

function ringOptions(common: Common): Pick<BenchOptions, 'noEventIdx' | 'packed' | 'inflight'> {
  return {
    noEventIdx: common['no-event-idx'],
    packed: common.packed,
    inflight: common.inflight,
  }
}

/** What a socket offers decides; options of one kind alone, or a second socket, decide where that is not enough. */
async function deviceBehind(socket: string, values: Values, sockets: number): Promise<'blk' | 'scsi' | 'net'> {
  const { deviceAt } = await import('../../frontend/probe.ts')
  const device = deviceAt(socket)
  if (device !== 'unknown') return device
  const given = (table: OptionTable): boolean => Object.keys(table.entries).some((name) => values[name] !== undefined)
  if (sockets > 1 || (given(netOptions) && !given(blkOptions))) return 'net'
  if (given(blkOptions) && !given(netOptions)) return 'blk'
  throw new ConfigError(
    'ERR_OPTION_REQUIRED',
    '--device',
    `the features of ${socket} don't show what it is`,
    'Give --device blk, --device scsi or --device net.'
  )
}

const NOUNS = { blk: 'a disk', scsi: 'a SCSI device', net: 'a network device' } as const

function misplaced(what: string, device: keyof typeof NOUNS, owner?: string): ConfigError {
  const not = owner ?? (device === 'net' ? NOUNS.blk : NOUNS.net)
  return new ConfigError(
    'ERR_OPTION_VALUE',
    what,
    `it is for ${not}, and behind the socket is ${NOUNS[device]}`,
    `Leave it out, or say what the device is by --device.`
  )
}

function checked<Table extends OptionTable>(table: Table, values: Values): v.InferOutput<Table> {
  return checkValues(table, values, (name) => `--${name}`) as v.InferOutput<Table>
}

function print(result: object, lines: string, json: boolean, progress: Progress): void {
  if (progress.progress !== undefined) process.stderr.write('\r\x1b[K')
  process.stdout.write(json ? `${JSON.stringify(result)}\n` : `${lines}\n`)
}

function showProgress(line: string): void {
  process.stderr.write(`\r\x1b[K${line}`)
}

/** Options that only the back-end can refuse come back as `RangeError: qd: …`. */
function refusable<Result>(noun: string, run: () => Result): Result {
  try {
    return run()
  } catch (error) {
    const [, option, problem] = (error instanceof RangeError && /^([\w-]+): (.*)$/.exec(error.message)) || []
    if (option === undefined || problem === undefined) throw error
    throw new ConfigError('ERR_OPTION_VALUE', `--${option}`, problem, `Give a value that fits the ${noun}.`, {
      cause: error,
    })
  }
}

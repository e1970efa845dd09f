/**
 * `npm run bench`: disks beside qemu-storage-daemon and beside virtiod itself (compare.ts), network devices beside DPDK
 * (compare-net.ts), one page. It owns the command line. It must not know how anything is measured.
 */
import { writeFileSync } from 'node:fs'
import { parseArgs } from 'node:util'
import { CASES, type CompareOptions, checkProcessors, chosen, compare, formatComparison, OWN_CASES } from './compare.ts'
import { compareNet, formatNetComparison, NET_CASES } from './compare-net.ts'

const NAMES = [...CASES, ...OWN_CASES, ...NET_CASES].map((one) => one.name)
const USAGE = `usage: npm run bench -- [--rounds N] [--seconds S] [--cases WORD,WORD] [--file PATH] [--size MIB] [--keep] [--built]
         [--cpus BACKEND,FRONTEND] [--no-fio] [--indirect] [--output PATH] [--json PATH]
cases: ${NAMES.join(' ')}
a WORD takes all that have it in their name: packed, inflight, net, switch, tap-rx, 1514. Without root there are no taps.
Two QEMU guests over the switch beside QEMU's own networks: npm run bench:guests
`

async function main(): Promise<number> {
  const { values } = parseArgs({
    allowNegative: true,
    options: {
      rounds: { type: 'string', default: '5' },
      seconds: { type: 'string', default: '1.5' },
      cases: { type: 'string', default: '' },
      file: { type: 'string', default: '/var/tmp/virtiod-bench.img' },
      size: { type: 'string', default: '1024' },
      keep: { type: 'boolean', default: false },
      built: { type: 'boolean', default: false },
      cpus: { type: 'string', default: '1,0' },
      fio: { type: 'boolean', default: true },
      indirect: { type: 'boolean', default: false },
      output: { type: 'string', default: 'bench-results.md' },
      json: { type: 'string' },
      help: { type: 'boolean', default: false },
    },
  })
  if (values.help) {
    process.stdout.write(USAGE)
    return 0
  }
  const [backend = 1, frontend = 0] = values.cpus.split(',').map(Number)
  const options: CompareOptions = {
    rounds: positive('rounds', values.rounds),
    seconds: positive('seconds', values.seconds),
    cases: values.cases.split(',').filter((word) => word !== ''),
    file: values.file,
    size: positive('size', values.size) * 2 ** 20,
    keep: values.keep,
    built: values.built,
    fio: values.fio,
    indirect: values.indirect,
    cpu: { backend, frontend },
    log: (line) => process.stderr.write(`${line}\n`),
  }
  const disks = chosen([...CASES, ...OWN_CASES], options.cases).length > 0
  const networks = chosen(NET_CASES, options.cases).length > 0
  if (!disks && !networks)
    throw new Error(`no case has ${options.cases.join(' or ')} in its name; there are ${NAMES.join(', ')}`)
  await checkProcessors(options.cpu)
  const disk = disks ? await compare(options) : undefined
  const network = networks ? await compareNet(options) : undefined
  const page = [
    ...(disk === undefined ? [] : [formatComparison(disk, options)]),
    ...(network === undefined ? [] : [formatNetComparison(network, options)]),
  ].join('\n')
  writeFileSync(values.output, page)
  if (values.json !== undefined) writeFileSync(values.json, JSON.stringify({ ...disk, network }))
  process.stdout.write(`${page}\nwritten to ${values.output}\n`)
  if (networks) process.stdout.write("two QEMU guests beside QEMU's own networks: npm run bench:guests\n")
  return 0
}

function positive(name: string, text: string): number {
  const value = Number(text)
  if (!(value > 0)) throw new Error(`--${name}: ${text} is not a positive number`)
  return value
}

try {
  process.exitCode = await main()
} catch (error) {
  // A number when it is the exit code of a child.
  const { code, message } = error as { code?: string | number; message: string }
  process.stderr.write(`bench: ${message}\n${String(code).startsWith('ERR_PARSE_ARGS') ? USAGE : ''}`)
  process.exitCode = 1
}

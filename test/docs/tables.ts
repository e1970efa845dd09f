/**
 * The tables of README.md that code knows best, made from the code. `node test/docs/tables.ts --write` (npm run docs)
 * fills them in between their markers, `<!-- options:blk -->` … `<!-- /options:blk -->`; test/docs.test.ts holds README
 * to them.
 */
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { safeParse } from 'valibot'
import * as virtioVsock from '../../devices/vsock/packet.ts'
import { moduleOptions } from '../../src/cli/commands/module.ts'
import { commands } from '../../src/cli/commands.ts'
import { optionDefault, optionUsage, optionValues } from '../../src/cli/help.ts'
import { deviceNames, devices } from '../../src/daemon/devices.ts'
import { ERROR_CODES } from '../../src/daemon/error-codes.ts'
import { observer } from '../../src/daemon/observer.ts'
import { asOptionTable, type OptionInfo, type OptionTable, optionsOf } from '../../src/daemon/option-table.ts'
import { daemonOptions, listenerOptions } from '../../src/daemon/options.ts'
import { RING_FEATURES } from '../../src/daemon/rings.ts'
import type { DeviceDefinition } from '../../src/device/index.ts'
import { formatList } from '../../src/frontend/conformance/index.ts'
import { deviceMetricName, METRICS } from '../../src/ops/metrics.ts'
import {
  BACKEND_REQUEST_ROWS,
  PROTOCOL_FEATURE_ROWS,
  type ProtocolRow,
  REQUEST_ROWS,
} from '../../src/vhost-user/protocol-table.ts'
import * as virtioBlk from '../../src/virtio/blk.ts'
import * as virtio from '../../src/virtio/constants.ts'
import { featureBits } from '../../src/virtio/features.ts'
import * as virtioNet from '../../src/virtio/net.ts'
import * as virtioScsi from '../../src/virtio/scsi.ts'
import { apiPage, apiPath } from './api.ts'

const docsPath = join(fileURLToPath(new URL('.', import.meta.url)), '../../docs')
export const conformancePath = join(docsPath, 'conformance.md')

/** docs/conformance.md: the suite's cases, as `virtiod conformance --list` prints them. */
export function conformancePage(): string {
  return `# The cases of \`virtiod conformance\`

Made from the code by \`npm run docs\`. How to run them, and what the outcomes mean: [README](../README.md#a-conformance-suite-for-vhost-user-back-ends).

${formatList().trim()}
`
}

export const readmePath = join(fileURLToPath(new URL('.', import.meta.url)), '../../README.md')

/** Section name → Markdown. */
export async function tables(): Promise<Record<string, string>> {
  const sections: Record<string, string> = {
    commands: table(
      ['Command', 'What it does'],
      Object.entries(commands).map(([name, { summary }]) => [code(`virtiod ${name}`), summary])
    ),
    'options:daemon': optionTable(daemonOptions),
    'options:listener': optionTable(listenerOptions),
  }
  const definitions = await Promise.all(deviceNames.map((type) => devices[type]!.load()))
  for (const { name, options } of definitions) sections[`options:${name}`] = optionTable(asOptionTable(options, name))
  sections['options:device'] = optionTable(moduleOptions)
  sections['metrics'] = metricTable(definitions)
  sections['features'] = table(
    ['Feature', 'Bit', 'Of'],
    [
      ...featureRows(featureBits(RING_FEATURES), virtio, /^(VIRTIO|VHOST|VHOST_USER)_F_/, 'every device'),
      ...featureRows(await blkFeatures(), virtioBlk, /^VIRTIO_BLK_F_/, 'blk'),
      ...featureRows(await netFeatures(), virtioNet, /^VIRTIO_NET_F_/, 'net'),
      ...featureRows(await scsiFeatures(), virtioScsi, /^VIRTIO_SCSI_F_/, 'scsi'),
      ...featureRows(await vsockFeatures(), virtioVsock, /^VIRTIO_VSOCK_F_/, 'vsock'),
    ]
  )
  sections['protocol-features'] = protocolTable('VHOST_USER_PROTOCOL_F_', 'Bit', PROTOCOL_FEATURE_ROWS)
  sections['requests'] = protocolTable('VHOST_USER_', 'Number', REQUEST_ROWS)
  sections['backend-requests'] = protocolTable('VHOST_USER_BACKEND_', 'Number', BACKEND_REQUEST_ROWS)
  sections['error-codes'] = table(
    ['Code', 'Meaning'],
    Object.entries(ERROR_CODES).map(([name, meaning]) => [code(name), meaning])
  )
  return sections
}

/** virtiod's metrics, then each device's own. */
export function metricTable(definitions: readonly Pick<DeviceDefinition, 'name' | 'metrics'>[]): string {
  const own = definitions.flatMap(({ name: device, metrics = [] }) =>
    metrics.map((metric) => ({
      ...metric,
      name: deviceMetricName(device, metric),
      labels: ['device', ...metric.labels],
    }))
  )
  return table(
    ['Metric', 'Type', 'Labels', 'Meaning'],
    [...METRICS, ...own].map(({ name, type, labels, help }) => [code(name), type, labels.map(code).join(', '), help])
  )
}

/** Every row of a table of the protocol: what is done, by whom, and why the rest is refused. */
function protocolTable(prefix: string, number: string, rows: readonly ProtocolRow[]): string {
  return table(
    ['Name', number, '', ''],
    rows.map((row) => [
      code(row.name.startsWith('VHOST_') ? row.name : `${prefix}${row.name}`),
      String(row.number),
      row.done === undefined ? 'refused' : row.done === 'net' ? 'done, by network cards' : 'done',
      row.note ?? '',
    ])
  )
}

/** Bits by their names in a module of constants. */
function featureRows(bits: readonly number[], constants: object, prefix: RegExp, of: string): string[][] {
  return bits.map((bit) => {
    const name = Object.entries(constants).find(([key, value]) => prefix.test(key) && value === bit)?.[0]
    if (name === undefined) throw new Error(`feature bit ${bit} of ${of} has no name`)
    return [code(name), String(bit), of]
  })
}

/** All that a block device offers, whatever its options. */
function blkFeatures(): Promise<number[]> {
  return withImage((file) =>
    offered(
      'blk',
      [false, true].map((readOnly) => ({ 'blk-file': file, 'read-only': readOnly }))
    )
  )
}

function scsiFeatures(): Promise<number[]> {
  return withImage((file) => offered('scsi', [{ lun: [file] }]))
}

function vsockFeatures(): Promise<number[]> {
  return withImage((file) => offered('vsock', [{ 'guest-cid': 3, 'uds-path': `${file}.sock` }]))
}

/** @param use gets the path of a disk image in a directory of its own, which is gone afterwards */
async function withImage<T>(use: (file: string) => Promise<T>): Promise<T> {
  const dir = mkdtempSync(join(tmpdir(), 'virtiod-docs-'))
  try {
    const file = join(dir, 'disk.img')
    writeFileSync(file, Buffer.alloc(1 << 20))
    return await use(file)
  } finally {
    rmSync(dir, { recursive: true, force: true })
  }
}

/** All that a network card offers: on a switch it has every offload, on a tap those that the kernel has. */
function netFeatures(): Promise<number[]> {
  return offered('net', [{ switch: 'docs', 'queue-pairs': 2, mtu: 1500, mac: '52:54:00:00:00:01' }])
}

/** The feature bits of devices that are opened with these options. */
async function offered(type: string, optionSets: readonly object[]): Promise<number[]> {
  const definition = await devices[type]!.load()
  let features = 0n
  for (const options of optionSets) {
    const parsed = safeParse(definition.options, options)
    if (!parsed.success) throw new Error(`${type}: ${parsed.issues[0].message}`)
    const device = await definition.open(parsed.output, observer)
    features |= device.features
    await device.close()
  }
  return featureBits(features)
}

function optionTable(options: OptionTable): string {
  return table(
    ['Option', 'Values', 'Default', 'Meaning'],
    optionsOf(options).map((info) => [code(optionUsage(info)), optionValues(info), defaultCell(info), info.description])
  )
}

function defaultCell(info: OptionInfo): string {
  if (info.required) return 'required'
  const value = optionDefault(info)
  return value === '' ? info.unset : code(value)
}

function table(head: readonly string[], rows: readonly (readonly string[])[]): string {
  const line = (cells: readonly string[]): string =>
    `| ${cells.map((cell) => cell.replaceAll('|', '\\|')).join(' | ')} |`
  return [line(head), line(head.map(() => '---')), ...rows.map(line)].join('\n')
}

function code(text: string): string {
  return `\`${text}\``
}

/** The text between a section's markers; undefined when README has no such section. */
export function readSection(readme: string, name: string): string | undefined {
  const match = new RegExp(`<!-- ${name} -->\\n([\\s\\S]*?)\\n?<!-- /${name} -->`).exec(readme)
  return match?.[1]?.trim()
}

function fill(readme: string, sections: Readonly<Record<string, string>>): string {
  let filled = readme
  for (const [name, text] of Object.entries(sections)) {
    const markers = new RegExp(`(<!-- ${name} -->\\n)[\\s\\S]*?(<!-- /${name} -->)`)
    if (!markers.test(filled)) process.stderr.write(`README.md has no section <!-- ${name} --> … <!-- /${name} -->\n`)
    filled = filled.replace(markers, (_, open: string, close: string) => `${open}\n${text}\n\n${close}`)
  }
  return filled
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const sections = await tables()
  if (process.argv.includes('--write')) {
    writeFileSync(readmePath, fill(readFileSync(readmePath, 'utf8'), sections))
    mkdirSync(docsPath, { recursive: true })
    writeFileSync(conformancePath, conformancePage())
    writeFileSync(apiPath, apiPage())
  } else
    for (const [name, text] of Object.entries(sections))
      process.stdout.write(`<!-- ${name} -->\n\n${text}\n\n<!-- /${name} -->\n\n`)
}

/**
 * From options to a {@link DaemonConfig}: the one form in which the daemon is told what to serve, whether it came
 * from the command line or from a configuration file. It checks everything that can be checked without opening a
 * device. It must not print, open devices or bind sockets.
 */
import { readFile } from 'node:fs/promises'
import { dirname, extname, resolve } from 'node:path'
import * as v from 'valibot'
import { ConfigError } from '../device/errors.ts'
import type { DeviceDefinition } from '../device/index.ts'
import { moduleUrl } from '../engine/module-url.ts'
import type { MetricsAddress } from '../ops/http.ts'
import { deviceNames, devices, MODULE_TYPE, type SeveralSockets } from './devices.ts'
import { configuredModule } from './module-config.ts'
import type { ModuleSource } from './module-device.ts'
import {
  asOptionTable,
  checkNames,
  checkValues,
  type OptionLabel,
  type OptionTable,
  optionsOf,
  suggest,
} from './option-table.ts'
import {
  checkSocketPath,
  type DaemonOptions,
  daemonOptions,
  type ListenerOptions,
  listenerOptions,
  parseIothreadCpus,
  parseMetricsAddress,
} from './options.ts'

export type LogLevel = DaemonOptions['log-level']

/** Where a device listens: a path to bind, or an inherited socket (listening or connected). */
export type SocketAddress = { readonly path: string } | { readonly fd: number }

export interface DeviceConfig {
  /** Unique in the daemon: the `device` label of metrics and log lines. */
  readonly name: string
  readonly definition: DeviceDefinition
  /** Checked by `definition.options`. */
  readonly options: unknown
  /** It lives on threads of its own. Of a custom one, `definition` is a description that can't be opened. */
  readonly module?: ModuleSource
  readonly socket: SocketAddress
}

export interface DaemonConfig {
  readonly logLevel: LogLevel
  /** Where to serve /metrics and /healthz; unset = nowhere. */
  readonly metrics?: MetricsAddress
  /** 1 … 64. */
  readonly iothreads: number
  /** The processors of each iothread, `iothreads` sorted sets; unset = no affinity. */
  readonly iothreadCpus?: readonly (readonly number[])[]
  /** The longest that an iothread polls before it sleeps, in microseconds; 0 = never polls. */
  readonly pollMaxUs: number
  readonly devices: readonly DeviceConfig[]
}

/** The keys of a configured device that are neither its listener's nor its own. */
export const deviceKeys = v.strictObject({
  type: v.pipe(
    v.picklist([...deviceNames, MODULE_TYPE]),
    v.description('What to serve'),
    v.metadata({ placeholder: 'TYPE' })
  ),
  name: v.exactOptional(
    v.pipe(
      v.string(),
      v.regex(
        /^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$/,
        'Give 1 to 64 letters, digits, dots, underscores and hyphens; the first is a letter or a digit'
      ),
      v.description("The device's name in metrics and logs, unique"),
      v.metadata({ placeholder: 'NAME', unset: 'its type and a number, as in blk0' })
    )
  ),
})

/** What a device of a module has beside {@link deviceKeys}. */
export const moduleKeys = v.strictObject({
  module: v.pipe(
    v.string(),
    v.minLength(1),
    v.description('The device module: a path (./my-device.ts), or the name of an npm package'),
    v.metadata({ placeholder: 'MODULE' })
  ),
  options: v.exactOptional(
    v.pipe(v.record(v.string(), v.unknown()), v.description('The options of the module'), v.metadata({ unset: 'none' }))
  ),
  watch: v.optional(
    v.pipe(v.boolean(), v.description('Reload the module when its files change, while the guest keeps running')),
    false
  ),
})

type Values = Readonly<Record<string, unknown>>

/**
 * The configuration that command line flags describe: one device, or one per socket where the kind of device has that.
 * @param values the flags by name, an array where one is repeated; names that belong to no table are the caller's affair
 * @throws ConfigError
 */
export function configFromFlags(definition: DeviceDefinition, values: Values): DaemonConfig {
  const label: OptionLabel = (name) => `--${name}`
  const several = devices[definition.name]?.several
  const each = several === undefined ? [values] : perSocket(values, several, label)
  return {
    ...daemonPart(values, label),
    devices: each.map((own, index) => deviceConfig(`${definition.name}${index}`, definition, own, label)),
  }
}

/** The options of each device when `socket-path` and `fd` may be repeated. @throws ConfigError when they may not */
function perSocket(values: Values, several: SeveralSockets, label: OptionLabel): Values[] {
  const sockets = ['socket-path', 'fd'].flatMap((key) =>
    [values[key] ?? []].flat().map((value: unknown) => ({ key, value }))
  )
  const repeated = ['socket-path', 'fd'].find((key) => Array.isArray(values[key]))
  if (values[several.with] === undefined) {
    if (repeated === undefined) return [values]
    const fix = `Give it once; several sockets need ${label(several.with)}.`
    throw new ConfigError('ERR_OPTION_DUPLICATE', label(repeated), 'given twice', fix)
  }
  if (sockets.length < 2) return [values]
  const single = several.without.find((name) => values[name] !== undefined)
  if (single !== undefined) {
    const problem = `it is one device's, and there are ${sockets.length} sockets`
    const fix = 'Give each device its own in a file, for "virtiod run".'
    throw new ConfigError('ERR_OPTION_CONFLICT', label(single), problem, fix)
  }
  const seen = new Set<unknown>()
  for (const { key, value } of sockets) {
    const socket = typeof value === 'string' ? resolve(value) : value
    if (seen.has(socket)) {
      throw new ConfigError('ERR_OPTION_DUPLICATE', label(key), `${value} is given twice`, 'Give each device its own.')
    }
    seen.add(socket)
  }
  const { 'socket-path': _, fd: __, ...common } = values
  return sockets.map(({ key, value }) => ({ ...common, [key]: value }))
}

/**
 * Reads and checks a configuration file, YAML or JSON. Relative paths in it are relative to the file's directory.
 * @throws ConfigError
 */
export async function loadConfig(file: string): Promise<DaemonConfig> {
  let text: string
  try {
    text = await readFile(file, 'utf8')
  } catch (cause) {
    const { code } = cause as NodeJS.ErrnoException
    const problem = code === 'ENOENT' ? 'there is no such file' : `cannot read it (${code})`
    throw new ConfigError('ERR_CONFIG_READ', file, problem, 'Give a YAML or JSON file that you may read.', { cause })
  }
  return parseConfig(text, file)
}

/**
 * Checks the text of a configuration file.
 * @param file its path: for messages, and for the relative paths in it
 * @throws ConfigError
 */
export async function parseConfig(text: string, file: string): Promise<DaemonConfig> {
  const top = await parseText(text, file)
  const inFile: OptionLabel = (name) => `${file}: ${name}`
  if (!isMap(top)) {
    throw new ConfigError('ERR_OPTION_VALUE', file, 'it holds no keys and values', 'Start with the key "devices".')
  }
  const where = '"virtiod config-schema" prints the keys'
  checkNames(Object.keys(top), [...Object.keys(daemonOptions.entries), 'devices'], inFile, 'key', where)
  const list = top['devices']
  if (!Array.isArray(list) || list.length === 0) {
    const [code, problem] =
      list === undefined
        ? (['ERR_OPTION_REQUIRED', 'missing'] as const)
        : (['ERR_OPTION_VALUE', 'no list of devices'] as const)
    throw new ConfigError(code, inFile('devices'), problem, 'Give a list of at least one device.')
  }
  const base = dirname(resolve(file))
  const counts = new Map<string, number>()
  const configs: DeviceConfig[] = []
  for (const [index, values] of list.entries()) {
    const label: OptionLabel = (name) => `${file}: devices[${index}]${name === '' ? '' : `.${name}`}`
    const isModule = isMap(values) && values['type'] === MODULE_TYPE
    configs.push(
      isModule
        ? await configuredModuleDevice(values, label, file, counts, where)
        : await configuredDevice(values, label, base, counts, where)
    )
  }
  refuseDuplicates(configs, file)
  return { ...daemonPart(top, inFile), devices: configs }
}

async function configuredDevice(
  values: unknown,
  label: OptionLabel,
  base: string,
  counts: Map<string, number>,
  where: string
): Promise<DeviceConfig> {
  if (!isMap(values)) {
    throw new ConfigError('ERR_OPTION_VALUE', label(''), 'it is no device', 'Give keys and values, "type" among them.')
  }
  if (values['type'] === undefined) refuseMisspelledType(values, label)
  const { type, name } = checkValues(deviceKeys, values, label) as v.InferOutput<typeof deviceKeys>
  const definition = await devices[type]!.load()
  const tables = [deviceKeys, listenerOptions, asOptionTable(definition.options, type)]
  checkNames(
    Object.keys(values),
    tables.flatMap((table) => Object.keys(table.entries)),
    label,
    'key',
    where
  )
  const index = counts.get(type) ?? 0
  counts.set(type, index + 1)
  return deviceConfig(name ?? `${type}${index}`, definition, resolvePaths(tables, values, base), label)
}

/** A device of type `device`. @param file the configuration file */
async function configuredModuleDevice(
  values: Values,
  label: OptionLabel,
  file: string,
  counts: Map<string, number>,
  where: string
): Promise<DeviceConfig> {
  const tables = [deviceKeys, listenerOptions, moduleKeys]
  const names = tables.flatMap((table) => Object.keys(table.entries))
  checkNames(Object.keys(values), names, label, 'key', where)
  const { name } = checkValues(deviceKeys, values, label) as v.InferOutput<typeof deviceKeys>
  const { module, options = {}, watch } = checkValues(moduleKeys, values, label) as v.InferOutput<typeof moduleKeys>
  const socket = listenerPart(resolvePaths([listenerOptions], values, dirname(resolve(file))), label)
  const configured = await configuredModule({
    module,
    directory: dirname(resolve(file)),
    given: { values: options, text: false, file, label: `${label('options')}.`, where: moduleHelp(module) },
    watch,
  })
  const type = configured.definition.name
  const index = counts.get(type) ?? 0
  counts.set(type, index + 1)
  return { ...configured, name: name ?? `${type}${index}`, socket }
}

/** The end of a sentence about options of a module. */
export function moduleHelp(module: string): string {
  return `"virtiod device ${module} --help" lists the options`
}

/** Without a type the other keys can't be checked: a misspelled `type` is told as that, not as a missing one. */
function refuseMisspelledType(values: Values, label: OptionLabel): void {
  const guess = Object.keys(values).find((key) => suggest(key, ['type']) !== undefined && key.length <= 6)
  if (guess !== undefined) {
    throw new ConfigError('ERR_OPTION_UNKNOWN', label(guess), 'unknown key', 'Did you mean type?')
  }
}

export function daemonPart(values: Values, label: OptionLabel): Omit<DaemonConfig, 'devices'> {
  const options = checkValues(daemonOptions, values, label) as DaemonOptions
  const cpus = options['iothread-cpus']
  return {
    logLevel: options['log-level'],
    ...(options.metrics === undefined ? {} : { metrics: parseMetricsAddress(options.metrics, label('metrics')) }),
    iothreads: options.iothreads,
    ...(cpus === undefined ? {} : { iothreadCpus: parseIothreadCpus(cpus, options.iothreads, label('iothread-cpus')) }),
    pollMaxUs: options['poll-max-us'],
  }
}

function deviceConfig(name: string, definition: DeviceDefinition, values: Values, label: OptionLabel): DeviceConfig {
  const socket = listenerPart(values, label)
  const table = asOptionTable(definition.options, definition.name)
  const options = checkValues(table, values, label)
  const url = devices[definition.name]?.module
  if (url === undefined) return { name, definition, options, socket }
  const own = Object.keys(table.entries).filter((key) => values[key] !== undefined)
  return {
    name,
    definition: { ...definition, queueModule: definition.queueModule ?? moduleUrl(url) },
    options,
    module: {
      address: { specifier: moduleUrl(url).href, base: url.href, shown: definition.name },
      given: {
        values: Object.fromEntries(own.map((key) => [key, values[key]])),
        text: false,
        label: label('?').slice(0, -1),
        where: `"virtiod ${definition.name} --help" lists the options`,
      },
      watch: false,
    },
    socket,
  }
}

/** @throws ConfigError */
export function listenerPart(values: Values, label: OptionLabel): SocketAddress {
  return socketAddress(checkValues(listenerOptions, values, label) as ListenerOptions, label)
}

function socketAddress(listener: ListenerOptions, label: OptionLabel): SocketAddress {
  const path = listener['socket-path']
  const { fd } = listener
  if (path !== undefined && fd !== undefined) {
    throw new ConfigError(
      'ERR_OPTION_CONFLICT',
      label('fd'),
      `it excludes ${label('socket-path')}`,
      'Give one of the two.'
    )
  }
  if (path !== undefined) return { path: checkSocketPath(path, label('socket-path')) }
  if (fd !== undefined) return { fd }
  const fix = 'Give the unix socket to listen on, or "fd" for an inherited one.'
  throw new ConfigError('ERR_OPTION_REQUIRED', label('socket-path'), 'missing', fix)
}

function resolvePaths(tables: readonly OptionTable[], values: Values, base: string): Values {
  const resolved: Record<string, unknown> = { ...values }
  for (const { name, path } of tables.flatMap(optionsOf)) {
    const value = values[name]
    if (path && typeof value === 'string' && value !== '') resolved[name] = resolve(base, value)
    if (path && Array.isArray(value))
      resolved[name] = value.map((one) => (typeof one === 'string' && one !== '' ? resolve(base, one) : one))
  }
  return resolved
}

function refuseDuplicates(configs: readonly DeviceConfig[], file: string): void {
  const names = new Map<string, number>()
  const sockets = new Map<string, number>()
  for (const [index, { name, socket }] of configs.entries()) {
    const address = 'path' in socket ? socket.path : `fd ${socket.fd}`
    const key = 'path' in socket ? 'socket-path' : 'fd'
    refuse(names.get(name), `${file}: devices[${index}].name`, name)
    refuse(sockets.get(address), `${file}: devices[${index}].${key}`, address)
    names.set(name, index)
    sockets.set(address, index)
  }
  function refuse(other: number | undefined, option: string, value: string): void {
    if (other === undefined) return
    throw new ConfigError('ERR_OPTION_DUPLICATE', option, `devices[${other}] has ${value} already`, 'Give another one.')
  }
}

/** JSON is parsed as such: that is quicker than loading a YAML parser, which also reads JSON but is slower to start. */
async function parseText(text: string, file: string): Promise<unknown> {
  const json = extname(file).toLowerCase() === '.json'
  if (json || /^\s*\{/.test(text)) {
    try {
      return JSON.parse(text)
    } catch (cause) {
      if (json) throw syntaxError(file, (cause as Error).message, cause)
      // `{ devices: […] }` is YAML as well
    }
  }
  const { parseDocument } = await import('yaml')
  const document = parseDocument(text)
  const [error] = document.errors
  if (error !== undefined) throw syntaxError(file, error.message.split('\n', 1)[0]!.replace(/:$/, ''), error)
  try {
    return document.toJS()
  } catch (cause) {
    throw syntaxError(file, (cause as Error).message, cause)
  }
}

function syntaxError(file: string, problem: string, cause: unknown): ConfigError {
  return new ConfigError('ERR_CONFIG_SYNTAX', file, problem, 'It has to be YAML, or JSON.', { cause })
}

function isMap(value: unknown): value is Values {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

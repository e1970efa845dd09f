/** The options of a device module, checked where its table is: on the module's own thread. */
import { dirname, resolve } from 'node:path'
import type { GenericSchema } from 'valibot'
import { ConfigError } from '../device/errors.ts'
import type { DeviceDefinition } from '../device/index.ts'
import {
  asOptionTable,
  checkNames,
  checkValues,
  fromText,
  type OptionInfo,
  type OptionTable,
  optionInfo,
  optionsOf,
} from './option-table.ts'

/** Option values as they were given. */
export interface GivenOptions {
  /** Structured-cloneable. */
  readonly values: Readonly<Record<string, unknown>>
  /** They are words of a command line (one per option, or a list), to be converted by what the table says. */
  readonly text: boolean
  /** The configuration file that they come from: paths are relative to it. */
  readonly file?: string
  /** What precedes an option's name in messages: `--option `, `disks.yaml: devices[0].options.`. */
  readonly label: string
  /** What lists the options, for messages: `"virtiod device ./x.ts --help" lists the options`. */
  readonly where: string
}

export interface CheckedOptions {
  /** Converted, with absolute paths, before the table saw them: the same for a later version of the module. */
  readonly values: Readonly<Record<string, unknown>>
  /** What the table made of them, for `open`. */
  readonly options: unknown
}

/** @throws ConfigError naming the option and the fix */
export function checkModuleOptions(definition: DeviceDefinition, given: GivenOptions): CheckedOptions {
  const table = asOptionTable(definition.options, definition.name)
  const label = (name: string): string => (name === '' ? given.label.replace(/[. ]*$/, '') : given.label + name)
  checkNames(Object.keys(given.values), Object.keys(table.entries), label, 'option', given.where)
  const values: Record<string, unknown> = {}
  for (const info of optionsOf(table)) {
    const value = given.values[info.name]
    if (value === undefined) continue
    const converted = given.text ? convert(table, info, value as string | readonly string[], label) : value
    const relative = info.path && typeof converted === 'string' && converted !== '' && given.file !== undefined
    values[info.name] = relative ? resolve(dirname(resolve(given.file)), converted) : converted
  }
  return { values, options: checkValues(table, values, label) }
}

function convert(
  table: OptionTable,
  info: OptionInfo,
  words: string | readonly string[],
  label: (name: string) => string
): unknown {
  if (info.kind === 'list') {
    const item = itemOf(table.entries[info.name]!)
    return [words].flat().map((word) => (item === undefined ? word : fromText(item, word)))
  }
  if (typeof words === 'string') return fromText(info, words)
  throw new ConfigError('ERR_OPTION_DUPLICATE', label(info.name), 'given twice', 'Give it once.')
}

/** What the items of a list are. */
function itemOf(schema: GenericSchema): OptionInfo | undefined {
  const { item, wrapped } = schema as { item?: GenericSchema; wrapped?: GenericSchema }
  if (wrapped !== undefined) return itemOf(wrapped)
  return item === undefined ? undefined : optionInfo('', item)
}

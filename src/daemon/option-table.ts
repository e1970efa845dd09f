/**
 * Option tables: what a valibot `strictObject` says about options, for the command line, configuration files, help,
 * README and JSON Schema alike. Its keys are the flag names; `v.description` is the help text; `v.metadata` may say
 * `placeholder` (the value's name in help), `unset` (what holds without the option), `path` (relative to the
 * configuration file) and `size` (K, M, G suffixes on the command line); `v.rawCheck` behind the table finds what does not
 * fit together. It must not know any particular option, nor
 * where values come from: callers name them in errors.
 */
import type { BaseIssue, GenericSchema } from 'valibot'
import { getDescription, getMetadata, safeParse } from 'valibot'
import { ConfigError } from '../device/errors.ts'

/** The keys of `v.metadata` that are ours. */
export const METADATA_KEYS: readonly string[] = ['placeholder', 'unset', 'path', 'size']

/** A schema with named entries: `v.strictObject({…})`, piped or not. */
export type OptionTable = GenericSchema & { readonly entries: Readonly<Record<string, GenericSchema>> }

/** `value`: anything else; it can only come from a configuration file, or as text that the table reads itself. */
export type OptionKind = 'flag' | 'integer' | 'number' | 'choice' | 'text' | 'list' | 'value'

/** What one entry of a table says. */
export interface OptionInfo {
  readonly name: string
  readonly kind: OptionKind
  readonly description: string
  readonly placeholder: string
  readonly required: boolean
  /** The value when it is not given; undefined = none. */
  readonly fallback: unknown
  /** In words, what holds when it is not given and has no `fallback`; empty = nothing to say. */
  readonly unset: string
  /** For kind `choice`. */
  readonly choices: readonly (string | number)[]
  /** For kinds `integer` and `number`; ±Infinity = no limit. */
  readonly min: number
  readonly max: number
  /** The value is a file name. */
  readonly path: boolean
  /** Numbers may have a K, M or G suffix on the command line. */
  readonly size: boolean
}

/** The parts of valibot's schema objects that are read here; which of them are set depends on `type`. */
interface SchemaShape {
  readonly type: string
  readonly wrapped?: GenericSchema
  readonly default?: unknown
  readonly options?: readonly unknown[]
  readonly pipe?: readonly { readonly type: string; readonly requirement?: unknown }[]
}

/** Options of which exactly one is given (`v.metadata({ exactlyOne })` of the table); the table itself checks that. */
export function alternatives(table: OptionTable): readonly string[] {
  const names = getMetadata(table as Parameters<typeof getMetadata>[0])['exactlyOne']
  return Array.isArray(names) ? names : []
}

const OPTIONAL_TYPES: readonly string[] = ['optional', 'exact_optional', 'nullish', 'undefinedable']

/** @throws TypeError when `schema` is no object schema: a mistake in a device's definition */
export function asOptionTable(schema: GenericSchema, owner: string): OptionTable {
  if (!('entries' in schema)) throw new TypeError(`the options of ${owner} are not a valibot strictObject`)
  return schema as OptionTable
}

/** The options of a table, in its order. */
export function optionsOf(table: OptionTable): OptionInfo[] {
  return Object.entries(table.entries).map(([name, schema]) => optionInfo(name, schema))
}

/** What one schema says. */
export function optionInfo(name: string, schema: GenericSchema): OptionInfo {
  // valibot's schemas are a union without a common shape; SchemaShape is the part that all of ours have.
  let inner = schema
  let required = true
  let fallback: unknown
  for (let shape = inner as unknown as SchemaShape; OPTIONAL_TYPES.includes(shape.type); ) {
    required = false
    fallback ??= shape.default
    inner = shape.wrapped as GenericSchema
    shape = inner as unknown as SchemaShape
  }
  const shape = inner as unknown as SchemaShape
  const metadata = getMetadata(inner as Parameters<typeof getMetadata>[0])
  const requirement = (type: string): unknown => shape.pipe?.find((item) => item.type === type)?.requirement
  const kind = kindOf(shape)
  return {
    name,
    kind,
    description: getDescription(inner as Parameters<typeof getDescription>[0]) ?? '',
    placeholder: typeof metadata['placeholder'] === 'string' ? metadata['placeholder'] : defaultPlaceholder(kind),
    required,
    fallback,
    unset: typeof metadata['unset'] === 'string' ? metadata['unset'] : '',
    choices: kind === 'choice' ? (shape.options as (string | number)[]) : [],
    min: Number(requirement('min_value') ?? -Infinity),
    max: Number(requirement('max_value') ?? Infinity),
    path: metadata['path'] === true,
    size: metadata['size'] === true,
  }
}

function kindOf({ type, pipe }: SchemaShape): OptionKind {
  if (type === 'boolean') return 'flag'
  if (type === 'number')
    return pipe?.some((item) => item.type === 'integer' || item.type === 'safe_integer') ? 'integer' : 'number'
  if (type === 'picklist') return 'choice'
  if (type === 'array') return 'list'
  return type === 'string' ? 'text' : 'value'
}

function defaultPlaceholder(kind: OptionKind): string {
  return kind === 'integer' || kind === 'number' ? 'N' : kind === 'choice' || kind === 'value' ? 'VALUE' : 'TEXT'
}

/** The allowed values in words, e.g. `an integer from 1 to 256`. */
export function allowedValues(info: OptionInfo): string {
  switch (info.kind) {
    case 'flag':
      return 'true or false'
    case 'choice':
      return info.choices.length === 2 ? info.choices.join(' or ') : `one of ${info.choices.join(', ')}`
    case 'list':
      return 'a list'
    case 'text':
      return info.path ? 'a path' : 'text'
    case 'value':
      return 'another value'
    case 'number':
    case 'integer': {
      const plain = info.kind === 'number' ? 'a number' : 'an integer'
      const noun = info.size ? 'bytes (K, M and G suffixes are understood)' : plain
      if (Number.isFinite(info.min) && Number.isFinite(info.max)) return `${noun} from ${info.min} to ${info.max}`
      if (Number.isFinite(info.min)) return `${noun}, at least ${info.min}`
      return Number.isFinite(info.max) ? `${noun}, at most ${info.max}` : noun
    }
  }
}

/** The value of an option from a word of a command line, as its kind has it; what can't be one stays text, for the table to refuse. */
export function fromText(info: OptionInfo, text: string): unknown {
  const { kind, size, choices } = info
  if (kind === 'flag') return text === 'true' ? true : text === 'false' ? false : text
  const integer = kind === 'integer' || (kind === 'choice' && typeof choices[0] === 'number')
  if (size && (integer || kind === 'number')) return parseSize(text) ?? text
  if (integer) return /^-?\d{1,15}$/.test(text) ? Number(text) : text
  if (kind === 'number') return /^-?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/i.test(text) ? Number(text) : text
  return text
}

/** Bytes from `4096`, `4K`, `64KiB`, `1M`, `2G`, `1T`, powers of 1024; undefined when it is none. */
export function parseSize(text: string): number | undefined {
  const match = /^(\d{1,12})(?:([kmgt])(?:i?b)?)?$/i.exec(text)
  if (match === null) return undefined
  const power = match[2] === undefined ? 0 : 'kmgt'.indexOf(match[2].toLowerCase()) + 1
  const bytes = Number(match[1]) * 1024 ** power
  return Number.isSafeInteger(bytes) ? bytes : undefined
}

/** How a caller names an option in errors: `--blk-file`, `devices[1].blk-file`. */
export type OptionLabel = (name: string) => string

/**
 * Refuses names that no table has.
 * @param where what lists the known names, as the end of a sentence, e.g. `"virtiod blk --help" lists the options`
 * @throws ConfigError ERR_OPTION_UNKNOWN with a suggestion
 */
export function checkNames(
  names: Iterable<string>,
  known: readonly string[],
  label: OptionLabel,
  noun: 'option' | 'key',
  where: string
): void {
  for (const name of names) {
    if (known.includes(name)) continue
    const guess = suggest(name, known)
    const shown = noun === 'option' && guess !== undefined ? label(guess) : guess
    const fix = shown === undefined ? `${where}.` : `Did you mean ${shown}?`
    throw new ConfigError('ERR_OPTION_UNKNOWN', label(name), `unknown ${noun}`, fix)
  }
}

/**
 * Checks the values that belong to `table` and fills in defaults. Names that it doesn't have are left to other tables:
 * see {@link checkNames}.
 * @throws ConfigError ERR_OPTION_REQUIRED, ERR_OPTION_VALUE
 */
export function checkValues(
  table: OptionTable,
  values: Readonly<Record<string, unknown>>,
  label: OptionLabel
): unknown {
  const own: Record<string, unknown> = {}
  for (const name of Object.keys(table.entries)) if (values[name] !== undefined) own[name] = values[name]
  const result = safeParse(table, own)
  if (result.success) return result.output
  throw valueError(table, own, result.issues[0], label)
}

function valueError(
  table: OptionTable,
  values: Readonly<Record<string, unknown>>,
  issue: BaseIssue<unknown>,
  label: OptionLabel
): ConfigError {
  const name = String(issue.path?.[0]?.key ?? '')
  const schema = table.entries[name]
  if (schema === undefined) {
    return new ConfigError(
      'ERR_OPTION_VALUE',
      label(name),
      'these options do not fit together',
      sentence(issue.message)
    )
  }
  const info = optionInfo(name, schema)
  const value = values[name]
  if (issue.type === 'raw_check') return misfitError(label(name), value !== undefined, issue.message)
  if (value === undefined) {
    const what =
      info.description === '' ? '' : `: ${info.description.charAt(0).toLowerCase()}${info.description.slice(1)}`
    return new ConfigError('ERR_OPTION_REQUIRED', label(name), 'missing', `It is required${what}.`)
  }
  return new ConfigError('ERR_OPTION_VALUE', label(name), problem(info, value), fix(info, value, issue))
}

/**
 * What a table finds by `v.rawCheck` about options that are fine one by one. @param message the problem and what to do,
 * two sentences without their final dots
 */
function misfitError(option: string, given: boolean, message: string): ConfigError {
  const end = message.indexOf('. ')
  const code = given ? 'ERR_OPTION_CONFLICT' : 'ERR_OPTION_REQUIRED'
  return new ConfigError(code, option, message.slice(0, end), sentence(message.slice(end + 2)))
}

function problem(info: OptionInfo, value: unknown): string {
  const shown = JSON.stringify(value) ?? String(value)
  if (info.kind === 'integer' && Number.isInteger(value)) return `${shown} is out of range`
  if (info.kind === 'integer') return `${shown} is not an integer`
  if (info.kind === 'number') return `${shown} is ${typeof value === 'number' ? 'out of range' : 'not a number'}`
  return `${shown} is not allowed`
}

function fix(info: OptionInfo, value: unknown, issue: BaseIssue<unknown>): string {
  if (info.kind === 'text' && typeof value !== 'string') {
    return typeof value === 'number' ? `Give text: write it in quotes, "${value}".` : `Give ${allowedValues(info)}.`
  }
  if (info.kind === 'value') return sentence(issue.message)
  // The schema's own words, where it has some.
  if (!issue.message.startsWith('Invalid ')) return sentence(issue.message)
  const guess = typeof value === 'string' ? suggest(value, info.choices.map(String)) : undefined
  return `Give ${allowedValues(info)}.${guess === undefined ? '' : ` Did you mean ${guess}?`}`
}

function sentence(text: string): string {
  return /[.?!]$/.test(text) ? text : `${text}.`
}

/**
 * The known name that `name` is most likely a misspelling of, if any is near: one edit in a short name, two or a
 * third of the letters in a longer one, or a known name that it begins.
 */
export function suggest(name: string, known: readonly string[]): string | undefined {
  let best: string | undefined
  let bestDistance = (name.length <= 3 ? 1 : Math.max(2, Math.floor(name.length / 3))) + 1
  for (const candidate of known) {
    const distance = editDistance(name, candidate)
    if (distance < bestDistance && distance < candidate.length) {
      best = candidate
      bestDistance = distance
    }
  }
  return best ?? (name.length >= 3 ? known.find((candidate) => candidate.startsWith(name)) : undefined)
}

/** Damerau-Levenshtein distance (a swap of neighbours counts as one edit), by the usual table of prefixes. */
function editDistance(a: string, b: string): number {
  let beforePrevious: number[] = []
  let previous = Array.from({ length: b.length + 1 }, (_, j) => j)
  for (let i = 1; i <= a.length; i++) {
    const row = [i]
    for (let j = 1; j <= b.length; j++) {
      const substituted = previous[j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1)
      let least = Math.min(previous[j]! + 1, row[j - 1]! + 1, substituted)
      if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) {
        least = Math.min(least, beforePrevious[j - 2]! + 1)
      }
      row.push(least)
    }
    beforePrevious = previous
    previous = row
  }
  return previous[b.length]!
}

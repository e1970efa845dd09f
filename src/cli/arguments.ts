/**
 * Arguments → values by option name. It finds what is wrong with the line itself (unknown, repeated, without a value,
 * too many words) and turns words into the type that the option's table wants; whether a value is allowed is the
 * table's to say.
 */
import { parseArgs } from 'node:util'
import { checkNames, fromText, type OptionInfo, optionsOf, suggest } from '../daemon/option-table.ts'
import { ConfigError } from '../device/errors.ts'
import type { OptionScope, Positional } from './command.ts'

export interface ParsedArguments {
  /** Values by option name, an array of what a repeatable one was given; flags are `true`. Not yet checked. */
  readonly values: Readonly<Record<string, unknown>>
  readonly positionals: readonly string[]
}

/**
 * @param command the command's name, for messages
 * @param repeatable options that may be given more than once although their table has one value
 * @throws ConfigError
 */
export function parseArguments(
  args: readonly string[],
  scopes: readonly OptionScope[],
  positionals: readonly Positional[],
  command: string,
  repeatable: readonly string[] = []
): ParsedArguments {
  const infos = new Map(scopes.flatMap(({ table }) => optionsOf(table)).map((info) => [info.name, info]))
  const where = `"virtiod ${command} --help" lists the options`
  const { tokens } = parseArgs({
    args: [...args],
    options: Object.fromEntries([...infos].map(([name, { kind }]) => [name, { type: parserType(kind) }] as const)),
    strict: false,
    allowPositionals: true,
    tokens: true,
  })
  const values: Record<string, unknown> = {}
  const words: string[] = []
  for (const token of tokens) {
    if (token.kind === 'positional') words.push(token.value)
    if (token.kind !== 'option') continue
    const { name, rawName, value, inlineValue } = token
    const info = infos.get(name)
    if (info === undefined || !rawName.startsWith('--')) {
      const known = rawName.startsWith('--') ? [...infos.keys()] : []
      checkNames([name], known, (shown) => (shown === name ? rawName : `--${shown}`), 'option', where)
    } else {
      const converted = convert(info, value, inlineValue === true)
      if (info.kind === 'list') values[name] = [...((values[name] as unknown[] | undefined) ?? []), converted]
      else if (!(name in values)) values[name] = converted
      else if (repeatable.includes(name)) values[name] = [values[name], converted].flat()
      else throw duplicate(rawName)
    }
  }
  checkPositionals(words, positionals, command, [...infos.keys()])
  return { values, positionals: words }
}

function parserType(kind: OptionInfo['kind']): 'boolean' | 'string' {
  return kind === 'flag' ? 'boolean' : 'string'
}

function duplicate(rawName: string): ConfigError {
  return new ConfigError('ERR_OPTION_DUPLICATE', rawName, 'given twice', 'Give it once.')
}

function convert(info: OptionInfo, value: string | undefined, inline: boolean): unknown {
  const option = `--${info.name}`
  if (info.kind === 'flag') {
    if (!inline) return true
    throw new ConfigError('ERR_OPTION_VALUE', option, 'it takes no value', `Give ${option} alone, or leave it out.`)
  }
  // "--blk-file --read-only" is a forgotten value, not a file of that name; "--blk-file=--read-only" is one.
  if (value === undefined || value === '' || (!inline && value.startsWith('-') && value !== '-')) {
    const fix = `Give it as ${option} ${info.placeholder}.`
    throw new ConfigError('ERR_OPTION_VALUE_MISSING', option, 'its value is missing', fix)
  }
  return fromText(info, value)
}

function checkPositionals(
  words: readonly string[],
  positionals: readonly Positional[],
  command: string,
  options: readonly string[]
): void {
  const missing = positionals[words.length]
  if (missing !== undefined && missing.optional !== true) {
    const fix = `Give ${missing.description}; "virtiod ${command} --help" tells more.`
    throw new ConfigError('ERR_ARGUMENT', missing.name, 'missing', fix)
  }
  const extra = words[positionals.length]
  if (extra === undefined) return
  const option = options.includes(extra) ? extra : suggest(extra, options)
  const fix = option === undefined ? `"virtiod ${command} --help" shows what it takes.` : `Did you mean --${option}?`
  throw new ConfigError('ERR_ARGUMENT', extra, 'unexpected argument', fix)
}

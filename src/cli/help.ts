/** Help texts, made from the commands' option tables. Lines have at most 100 columns. */
import { type OptionInfo, optionsOf } from '../daemon/option-table.ts'
import type { Command, CommandEntry } from './command.ts'

export const HELP_COLUMNS = 100
/** Where descriptions begin. */
const INDENT = 25

const COMMON_OPTIONS: readonly [string, string][] = [
  ['--help', 'Print this and exit'],
  ['--version', 'Print the versions of virtiod, Node and Node-API and exit'],
]

/** `virtiod --help`. */
export function programHelp(commands: Readonly<Record<string, CommandEntry>>): string {
  return [
    'Usage: virtiod COMMAND [options]',
    '',
    ...wrap(
      'virtiod serves virtio devices to QEMU and every other vhost-user front-end, over a unix socket per device.'
    ),
    '',
    'Commands:',
    ...Object.entries(commands).flatMap(([name, { summary }]) => row(name, capital(summary))),
    '',
    'Options:',
    ...COMMON_OPTIONS.flatMap(([option, text]) => row(option, text)),
    '',
    '"virtiod COMMAND --help" tells more about a command.',
    '',
  ].join('\n')
}

/** `virtiod COMMAND --help`. */
export function commandHelp(command: Command): string {
  const usage = command.usage.flatMap((line, index) =>
    // Lines break between [options], not inside them.
    wrapWords(`virtiod ${command.name} ${line}`.match(/\[[^\]]*\]|\S+/g) ?? [], HELP_COLUMNS - 9, 2).map(
      (part, row) => (index + row === 0 ? 'Usage: ' : '       ') + part
    )
  )
  const lines = [...usage, '', ...wrap(command.description)]
  if (command.positionals.length > 0) {
    lines.push('', 'Arguments:')
    for (const { name, description } of command.positionals) lines.push(...row(name, capital(description)))
  }
  if (command.moduleOptions !== undefined) {
    const { module, options } = command.moduleOptions
    lines.push('', `Options of ${module}:`, ...options.flatMap((info) => row(moduleOptionUsage(info), withFacts(info))))
    if (options.length === 0) lines.push('  none')
  }
  for (const { title, table } of command.scopes) {
    const options = optionsOf(table)
    if (options.length > 0) lines.push('', `${title}:`)
    for (const info of options) lines.push(...row(optionUsage(info), withFacts(info)))
  }
  lines.push('', 'Other options:', ...COMMON_OPTIONS.flatMap(([option, text]) => row(option, text)), '')
  return lines.join('\n')
}

/** `--blk-file PATH`, `--read-only`. */
export function optionUsage(info: OptionInfo): string {
  return info.kind === 'flag' ? `--${info.name}` : `--${info.name} ${info.placeholder}`
}

/** `--option size=SIZE`. */
function moduleOptionUsage({ name, kind, placeholder }: OptionInfo): string {
  return `--option ${name}=${kind === 'flag' ? 'true|false' : placeholder}`
}

/** What may be given, e.g. `1 to 256`, `none, writeback`; empty when the description says all. */
export function optionValues(info: OptionInfo): string {
  if (info.kind === 'choice') {
    const all = info.choices.join(', ')
    return all.length <= 60 ? all : `${info.choices.slice(0, 3).join(', ')}, … ${info.choices.at(-1)}`
  }
  if (info.kind === 'integer' && Number.isFinite(info.min) && (info.size || info.max < 2 ** 31 - 1)) {
    const show = info.size ? formatSize : String
    return info.max === Number.MAX_SAFE_INTEGER
      ? `at least ${show(info.min)}`
      : `${show(info.min)} to ${show(info.max)}`
  }
  return ''
}

/** The default as one would type it; empty when there is none. */
export function optionDefault(info: OptionInfo): string {
  if (info.fallback === undefined || info.kind === 'flag') return ''
  return info.size ? formatSize(Number(info.fallback)) : String(info.fallback)
}

function formatSize(bytes: number): string {
  const power = [4, 3, 2, 1].find((candidate) => bytes % 1024 ** candidate === 0) ?? 0
  return `${bytes / 1024 ** power}${['', 'K', 'M', 'G', 'T'][power]}`
}

function withFacts(info: OptionInfo): string {
  const values = optionValues(info)
  const facts: string[] = []
  if (info.required) facts.push('required')
  if (values !== '' && values.replaceAll(', ', '|') !== info.placeholder) facts.push(values)
  if (info.unset !== '' && info.fallback === undefined) facts.push(`unset: ${info.unset}`)
  else if (optionDefault(info) !== '') facts.push(`default ${optionDefault(info)}`)
  return facts.length === 0 ? info.description : `${info.description} (${facts.join('; ')})`
}

function row(term: string, text: string): string[] {
  const lines = wrap(text, HELP_COLUMNS - INDENT).map((line) => ' '.repeat(INDENT) + line)
  if (term.length + 4 > INDENT) return [`  ${term}`, ...lines]
  return [`  ${term}`.padEnd(INDENT) + lines[0]!.slice(INDENT), ...lines.slice(1)]
}

function wrap(text: string, columns = HELP_COLUMNS): string[] {
  return wrapWords(text.split(' '), columns, 0)
}

/** @param hanging spaces before the second and later lines */
function wrapWords(words: readonly string[], columns: number, hanging: number): string[] {
  const lines: string[] = []
  let line = ''
  for (const word of words) {
    if (line !== '' && line.length + 1 + word.length > columns) {
      lines.push(line)
      line = ' '.repeat(hanging) + word
    } else line = line === '' ? word : `${line} ${word}`
  }
  return [...lines, line]
}

function capital(text: string): string {
  return text.charAt(0).toUpperCase() + text.slice(1)
}

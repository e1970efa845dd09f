/** What a command of virtiod is. Its parts are all that parsing, checking and help are made from. */
import type { OptionInfo, OptionTable } from '../daemon/option-table.ts'
import type { ParsedArguments } from './arguments.ts'

/** A group of options under a headline in the help. */
export interface OptionScope {
  readonly title: string
  readonly table: OptionTable
}

export interface Positional {
  /** In capitals, as in the usage line: `SOCKET`. */
  readonly name: string
  readonly description: string
  /** It may be left out; none that is required comes after it. */
  readonly optional?: boolean
}

export interface Command {
  /** As typed, e.g. `blk` or `qemu-args blk`. */
  readonly name: string
  /** What it does: a paragraph for its help. */
  readonly description: string
  /** What follows `virtiod NAME` in the usage lines. */
  readonly usage: readonly string[]
  readonly positionals: readonly Positional[]
  readonly scopes: readonly OptionScope[]
  /** Options that may be given more than once, as an array of values then. */
  readonly repeatable?: readonly string[]
  /** For the help: what `--option` of this module takes. */
  readonly moduleOptions?: { readonly module: string; readonly options: readonly OptionInfo[] }
  /** `--print-capabilities`: printed as JSON, whatever else is given. */
  readonly capabilities?: object
  /** @returns the exit code; @throws ConfigError for bad input */
  run(input: ParsedArguments): Promise<number>
}

/** A row of the list of commands. Modules load on demand: help and start-up stay quick. */
export interface CommandEntry {
  readonly summary: string
  /** @param args what follows the command's name */
  load(args: readonly string[]): Promise<Command>
}

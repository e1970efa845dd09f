/**
 * The command line: finds the command, parses its arguments, runs it, and turns errors into messages and exit codes. It
 * must not know what commands do. `bin/virtiod.js` checks Node's version before it loads this.
 */
import { fstatSync, readFileSync, writeSync } from 'node:fs'
import { suggest } from '../daemon/option-table.ts'
import { ConfigError } from '../device/errors.ts'
import { parseArguments } from './arguments.ts'
import { commands } from './commands.ts'
import { EXIT_FAILURE, EXIT_OK, EXIT_USAGE } from './exit-codes.ts'

async function run(args: readonly string[]): Promise<number> {
  const [name = '', ...rest] = args
  if (name === '--version' || name === '-V') return print(versionText())
  if (name === '--help' || name === '-h' || name === 'help') {
    if (name === 'help' && rest[0] !== undefined) return run([rest[0], '--help'])
    return print((await import('./help.ts')).programHelp(commands))
  }
  const entry = Object.hasOwn(commands, name) ? commands[name] : undefined
  if (entry === undefined) throw unknownCommand(name)
  const command = await entry.load(rest)
  const flags = new Set(rest.slice(0, rest.includes('--') ? rest.indexOf('--') : rest.length))
  if (command.capabilities !== undefined && flags.has('--print-capabilities')) {
    return print(`${JSON.stringify(command.capabilities)}\n`)
  }
  if (flags.has('--help') || flags.has('-h')) return print((await import('./help.ts')).commandHelp(command))
  if (flags.has('--version')) return print(versionText())
  const words = command.name.split(' ').length - 1
  const { scopes, positionals, repeatable } = command
  return command.run(parseArguments(rest.slice(words), scopes, positionals, command.name, repeatable))
}

function unknownCommand(name: string): ConfigError {
  if (name === '') {
    return new ConfigError('ERR_COMMAND_UNKNOWN', 'COMMAND', 'missing', '"virtiod --help" lists the commands.')
  }
  const option = name.startsWith('-')
  const guess = option ? undefined : suggest(name, Object.keys(commands))
  const fix = guess === undefined ? '"virtiod --help" lists the commands.' : `Did you mean ${guess}?`
  return new ConfigError('ERR_COMMAND_UNKNOWN', name, option ? 'the command comes first' : 'unknown command', fix)
}

function print(text: string): number {
  process.stdout.write(text)
  return EXIT_OK
}

function versionText(): string {
  // The package's file lies above src/cli/ in a checkout and above dist/src/cli/ in a package.
  const depth = import.meta.url.endsWith('.ts') ? '../../' : '../../../'
  const { version } = JSON.parse(readFileSync(new URL(`${depth}package.json`, import.meta.url), 'utf8')) as {
    version: string
  }
  return `virtiod ${version}, Node ${process.versions.node}, Node-API ${process.versions['napi'] ?? 'unknown'}\n`
}

/** What the user reads when something went wrong, one or two lines without a stack, except for our own mistakes. */
function report(error: unknown): number {
  const { message, stack, code } = error as NodeJS.ErrnoException
  if (error instanceof ConfigError) {
    process.stderr.write(`virtiod: ${message}\n`)
    return EXIT_USAGE
  }
  // An error with a code is a situation (a system error, a protocol error); one without is a bug, and its stack helps.
  process.stderr.write(`virtiod: ${code === undefined ? (stack ?? String(error)) : message}${hint(error)}\n`)
  return EXIT_FAILURE
}

/**
 * A process that was to take over, and failed before it could speak to the one that runs: that one tells the reason.
 * What loads for it must not be what failed, hence no addon.
 */
async function tellPredecessor(error: unknown): Promise<void> {
  const fd = process.env['VIRTIOD_HANDOVER_FD']
  if (fd === undefined) return
  const { failedFrame } = await import('../daemon/handover-messages.ts')
  try {
    // A variable that somebody set by hand names any file.
    if (fstatSync(Number(fd)).isSocket()) writeSync(Number(fd), failedFrame((error as Error).message))
  } catch {
    // It is gone, or nobody is there.
  }
}

/** What is likely behind a front-end's failure, for who runs probe, verify or bench. */
function hint(error: unknown): string {
  const { code, failure, request } = error as { code?: string; failure?: string; request?: string }
  if (code !== 'ERR_FRONTEND') return ''
  if (failure === 'connect') return '. Is the back-end running?'
  const first = failure === 'timeout' && request === 'GET_FEATURES'
  return first ? '. A back-end serves one front-end at a time: is a guest connected? Stop it first.' : ''
}

// A reader that went away (virtiod --help | head) is no failure.
for (const stream of [process.stdout, process.stderr]) {
  stream.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code !== 'EPIPE') throw error
  })
}

const code = await run(process.argv.slice(2)).catch(async (error: unknown) => {
  await tellPredecessor(error)
  return report(error)
})
// Whatever a command leaves open must not keep the process.
process.exit(code)

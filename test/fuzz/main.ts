/**
 * `npm run fuzz -- protocol|ring|pure`: the fuzzers without bounds, or with those that are given. It owns the command line,
 * and writes what was found to a file, cut down as far as it goes.
 */
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { cacheDir } from '../setup/prerequisites.ts'
import { play } from './corpus.ts'
import { describe as describeMessages, fuzzProtocol, minimiseScenarios, type RunOptions } from './protocol.ts'
import { fuzzPure, minimise, nameOf } from './pure.ts'
import { describe as describeRings, fuzzRings, minimiseGames } from './rings.ts'

const USAGE = `Usage: npm run fuzz -- protocol|ring|pure [options]
       npm run fuzz -- replay FILE

  protocol           hostile vhost-user messages to a virtiod process
  ring               hostile rings in live sessions of a virtiod process
  pure               rings, chains, in-flight regions, IOTLB and wire format in this process, guided by coverage
  replay             plays a file that one of them wrote

  --seed N           of all decisions (default: the time)
  --count N          end after so many messages, rings or programs (default: never)
  --seconds N        end after so long (default: never)
  --emulated         virtiod's emulation in place of io_uring
  --corpus DIR       pure: where programs are kept that reached something new (default: in node_modules/.cache)
  --finds DIR        where a find is written (default: in node_modules/.cache)
`

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    seed: { type: 'string', default: String(Date.now() % 2 ** 31) },
    count: { type: 'string' },
    seconds: { type: 'string' },
    emulated: { type: 'boolean', default: false },
    corpus: { type: 'string', default: join(cacheDir, 'fuzz-corpus') },
    finds: { type: 'string', default: join(cacheDir, 'fuzz-finds') },
    help: { type: 'boolean', default: false },
  },
})

const started = performance.now()
const say = (text: string): void => {
  process.stdout.write(`${((performance.now() - started) / 1000).toFixed(0)} s: ${text}\n`)
}

function whole(name: 'seed' | 'count' | 'seconds'): number | undefined {
  const text = values[name]
  if (text === undefined) return undefined
  const value = Number(text)
  if (!Number.isInteger(value) || value < 0) throw new TypeError(`--${name}: ${text} is no number that it can be`)
  return value
}

/** Keeps what was found. Returns the exit code. */
function found(name: string, content: string | Uint8Array, error: Error): number {
  mkdirSync(values.finds, { recursive: true })
  const path = join(values.finds, name)
  writeFileSync(path, content)
  process.stderr.write(`${error.stack}\n\nFound; it is in ${path}. Again: npm run fuzz -- replay ${path}\n`)
  return 1
}

function bounds(): RunOptions {
  const count = whole('count')
  const seconds = whole('seconds')
  return {
    seed: whole('seed') ?? 0,
    ...(count !== undefined && { count }),
    ...(seconds !== undefined && { seconds }),
    emulated: values.emulated,
    say,
  }
}

async function protocol(): Promise<number> {
  const options = bounds()
  say(`protocol, seed ${options.seed}`)
  const result = await fuzzProtocol(options)
  say(`${describeMessages(result)}; ${result.figures}`)
  if (result.find === undefined) return 0
  say(`found: ${result.find.error.message}`)
  const scenarios = await minimiseScenarios(result.find.scenarios, say)
  return found(`protocol-${options.seed}.json`, JSON.stringify(scenarios, undefined, 1), result.find.error)
}

async function ring(): Promise<number> {
  const options = bounds()
  say(`ring, seed ${options.seed}`)
  const result = await fuzzRings(options)
  say(`${describeRings(result)}; ${result.flips} thousand words changed meanwhile; ${result.figures}`)
  if (result.find === undefined) return 0
  say(`found: ${result.find.error.message}`)
  const games = await minimiseGames(result.find.games, say)
  return found(`ring-${options.seed}.json`, JSON.stringify(games, undefined, 1), result.find.error)
}

async function pure(): Promise<number> {
  const options = { ...bounds(), corpus: values.corpus }
  say(`pure, seed ${options.seed}, corpus ${options.corpus}`)
  const result = fuzzPure(options)
  say(`${result.executed} programs, corpus ${result.corpus}, ${result.blocks} of ${result.knownBlocks} blocks`)
  if (result.find === undefined) return 0
  const { program, error } = result.find
  const least = minimise(program, error)
  return found(`pure-${nameOf(least)}.hex`, `${Buffer.from(least).toString('hex')}\n`, error)
}

async function replay(file: string | undefined): Promise<number> {
  if (file === undefined) throw new TypeError('replay: which file?')
  const error = await play(file, readFileSync(file, 'utf8'))
  say(error === undefined ? 'nothing goes wrong' : `${error.stack}`)
  return error === undefined ? 0 : 1
}

try {
  const [command = '', ...others] = positionals
  const commands = new Map<string, () => Promise<number>>([
    ['protocol', protocol],
    ['ring', ring],
    ['pure', pure],
    ['replay', () => replay(others.shift())],
  ])
  const run = commands.get(command)
  if (values.help) process.stdout.write(USAGE)
  else if (run === undefined || (others.length > 0 && command !== 'replay'))
    throw new TypeError(`${positionals.join(' ') || 'nothing'}: no such thing`)
  else process.exitCode = await run()
} catch (error) {
  process.stderr.write(`${error instanceof TypeError ? `${error.message}\n${USAGE}` : (error as Error).stack}\n`)
  process.exitCode = error instanceof TypeError ? 2 : 1
}

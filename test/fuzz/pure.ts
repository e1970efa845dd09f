/**
 * The coverage-guided fuzzer of the pure code: byte strings are programs (`runProgram`), V8's block coverage says which of
 * them reached something new, and those are the ones that are mutated further. It owns corpus and statistics.
 */
import { createHash } from 'node:crypto'
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { Coverage } from './coverage.ts'
import { Input } from './pure-input.ts'
import { iotlbProgram, logProgram, wireProgram } from './pure-parts.ts'
import { RingProgram } from './pure-ring.ts'
import { Random } from './random.ts'

/** Programs between two looks at the coverage, which takes some milliseconds. */
const BATCH = 256
const LONGEST = 600

export interface PureOptions {
  readonly seed: number
  /** Programs; undefined = without end. */
  readonly count?: number
  readonly seconds?: number
  /** Where programs are kept that reached something new; undefined = nowhere. */
  readonly corpus?: string
  readonly say: (text: string) => void
}

export interface PureResult {
  readonly executed: number
  readonly corpus: number
  readonly blocks: number
  readonly knownBlocks: number
  /** What was found, at most one: the run ends there. */
  readonly find?: { readonly program: Uint8Array; readonly error: Error }
}

/** Runs one program. @throws Violation or whatever the code under test throws */
export function runProgram(bytes: Uint8Array): void {
  const input = new Input(bytes)
  const kind = input.below(16)
  if (kind < 6) new RingProgram(input, false).run()
  else if (kind < 13) new RingProgram(input, true).run()
  else if (kind === 13) iotlbProgram(input)
  else if (kind === 14) logProgram(input)
  else wireProgram(input)
}

/** The shortest variant of a failing program that fails with the same words. */
export function minimise(program: Uint8Array, error: Error): Uint8Array {
  const first = error.message.replace(/\d+/g, '#')
  const fails = (bytes: Uint8Array): boolean => {
    try {
      runProgram(bytes)
      return false
    } catch (other) {
      return (other as Error).message.replace(/\d+/g, '#') === first
    }
  }
  let best = program
  for (let piece = best.length; piece >= 1; piece = Math.floor(piece / 2)) {
    for (let at = 0; at < best.length; ) {
      const without = Uint8Array.from([...best.subarray(0, at), ...best.subarray(at + piece)])
      if (fails(without)) best = without
      else at += piece
    }
  }
  for (let at = 0; at < best.length; at++) {
    const zeroed = best.slice()
    zeroed[at] = 0
    if (best[at] !== 0 && fails(zeroed)) best = zeroed
  }
  return best
}

export function fuzzPure(options: PureOptions): PureResult {
  const { seed, count = Number.POSITIVE_INFINITY, seconds = Number.POSITIVE_INFINITY, say } = options
  const random = new Random(seed)
  const corpus = loadCorpus(options.corpus)
  const deadline = performance.now() + seconds * 1000
  let executed = 0
  let said = performance.now()
  const summary = (): PureResult => ({
    executed,
    corpus: corpus.length,
    blocks: coverage.seen.size,
    knownBlocks: coverage.known.size,
  })
  using coverage = new Coverage((url) => url.includes('/src/virtio/') || url.endsWith('/src/vhost-user/wire.ts'))
  const attempt = (program: Uint8Array): Error | undefined => {
    executed++
    try {
      runProgram(program)
      return undefined
    } catch (error) {
      return error as Error
    }
  }
  /** Finds which of them reached something new, half by half. */
  const attribute = (programs: readonly Uint8Array[]): void => {
    coverage.take()
    for (const program of programs) attempt(program)
    if (!coverage.reachedNew()) return
    if (programs.length > 1) {
      attribute(programs.slice(0, programs.length / 2))
      attribute(programs.slice(programs.length / 2))
      return
    }
    const [program] = programs
    attempt(program!)
    coverage.takeNew()
    corpus.push(program!)
    if (options.corpus !== undefined) writeFileSync(join(options.corpus, nameOf(program!)), program!)
  }
  for (const program of corpus) {
    const error = attempt(program)
    if (error !== undefined) return { ...summary(), find: { program, error } }
  }
  coverage.takeNew()
  const batch: Uint8Array[] = []
  while (executed < count && performance.now() < deadline) {
    batch.length = 0
    for (let i = 0; i < BATCH; i++) {
      const program = mutate(random, corpus)
      batch.push(program)
      const error = attempt(program)
      if (error !== undefined) return { ...summary(), find: { program, error } }
    }
    if (coverage.reachedNew()) attribute(batch)
    if (performance.now() - said > 2000) {
      said = performance.now()
      say(`${executed} programs, corpus ${corpus.length}, ${coverage.seen.size} blocks`)
    }
  }
  return summary()
}

export function nameOf(program: Uint8Array): string {
  return createHash('sha1').update(program).digest('hex').slice(0, 16)
}

function loadCorpus(directory: string | undefined): Uint8Array[] {
  if (directory === undefined) return []
  mkdirSync(directory, { recursive: true })
  return readdirSync(directory).map((name) => new Uint8Array(readFileSync(join(directory, name))))
}

/** A program from the corpus, changed in some places, or a new one. */
function mutate(random: Random, corpus: readonly Uint8Array[]): Uint8Array {
  if (corpus.length === 0 || random.one(20)) return random.fill(new Uint8Array(8 + random.below(250)))
  // Newer ones reached what others did not.
  const index = random.one(2)
    ? random.below(corpus.length)
    : corpus.length - 1 - random.below(Math.min(16, corpus.length))
  let bytes = [...corpus[index]!]
  for (let changes = 1 + random.below(8); changes > 0; changes--) {
    const at = random.below(bytes.length + 1)
    switch (random.below(7)) {
      case 0:
        bytes[at] = (bytes[at] ?? 0) ^ (1 << random.below(8))
        break
      case 1:
        bytes[at] = random.below(256)
        break
      case 2:
        bytes.splice(at, 0, ...random.fill(new Uint8Array(1 + random.below(8))))
        break
      case 3:
        bytes.splice(at, 1 + random.below(8))
        break
      case 4: {
        const from = random.below(bytes.length + 1)
        bytes.splice(at, 0, ...bytes.slice(from, from + 1 + random.below(40)))
        break
      }
      case 5: {
        const other = corpus[random.below(corpus.length)]!
        const from = random.below(other.length + 1)
        bytes.splice(at, random.below(20), ...other.subarray(from, from + 1 + random.below(60)))
        break
      }
      default:
        bytes.push(...random.fill(new Uint8Array(1 + random.below(30))))
    }
    if (bytes.length > LONGEST) bytes = bytes.slice(0, LONGEST)
  }
  return Uint8Array.from(bytes, (byte) => byte ?? 0)
}

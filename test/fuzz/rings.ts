/**
 * The ring fuzzer: hostile drivers on two victims at the same time, session after session, thousands of rings in each, and a
 * look at virtiod in between. What led to a find is a session's seed and the rounds of it.
 */
import { Worker } from 'node:worker_threads'
import { FrontendError } from '../../src/frontend/errors.ts'
import type { Flipping } from './flipper-thread.ts'
import type { RunOptions } from './protocol.ts'
import { Random } from './random.ts'
import { chooseOptions, letRun, RingSession } from './ring-session.ts'
import { Misbehaviour, Target, type TargetOptions } from './target.ts'
import { VICTIM_NAMES } from './victims.ts'

/** Rounds of a session: each starts all rings of both of its victims. */
const ROUNDS = 60
/** How often rings are filled again on average before they are stopped. */
const REFILLS = 10
/** Sessions between two looks at what is held. */
const SESSIONS = 4

/** A session on each of two victims that can be played again. */
export interface RingGame {
  readonly seed: number
  readonly rounds: number
  /** Nothing changes while rings run, so every byte that they write can be accounted for. */
  readonly exact: boolean
}

export interface RingResult {
  /** How often one was filled. */
  readonly rings: number
  readonly broken: number
  /** Rounds after which every byte was accounted for, of either victim. */
  readonly exact: number
  readonly refused: number
  readonly sessions: number
  /** Sessions that virtiod ended. */
  readonly ended: number
  /** Thousands of words that the second thread changed. */
  readonly flips: number
  readonly figures: string
  readonly find?: { readonly games: readonly RingGame[]; readonly error: Error }
}

interface Counts {
  rings: number
  broken: number
  exact: number
  refused: number
  sessions: number
  ended: number
}

export async function fuzzRings(options: RunOptions): Promise<RingResult> {
  const { seed, count = Number.POSITIVE_INFINITY, seconds = Number.POSITIVE_INFINITY, say } = options
  const random = new Random(seed)
  const target = new Target(options)
  const flipper = new Flipper(random.fork())
  const counts: Counts = { rings: 0, broken: 0, exact: 0, refused: 0, sessions: 0, ended: 0 }
  const recent: RingGame[] = []
  let figures = ''
  try {
    await target.start()
    const deadline = performance.now() + seconds * 1000
    let said = performance.now()
    for (let look = 0; counts.rings < count && performance.now() < deadline; look++) {
      recent.length = 0
      for (let i = 0; i < SESSIONS && performance.now() < deadline; i++) {
        const game = { seed: random.fork(), rounds: ROUNDS, exact: i === 0 }
        recent.push(game)
        await playGame(target, flipper, game, counts)
      }
      target.check(random)
      if (look === 6) target.warm()
      figures = target.figures
      if (performance.now() - said > 2000) {
        said = performance.now()
        say(`${describe(counts)}; ${flipper.flips} thousand flips; ${figures}`)
      }
      await new Promise((resolve) => setImmediate(resolve))
    }
    await target.stop()
    return { ...counts, flips: flipper.flips, figures }
  } catch (error) {
    if (!(error instanceof Misbehaviour)) throw error
    return { ...counts, flips: flipper.flips, figures, find: { games: [...recent], error } }
  } finally {
    await flipper.close()
    target.dispose()
  }
}

export function describe({ rings, broken, exact, refused, sessions, ended }: Counts): string {
  return `${rings} rings (${broken} broke, ${refused} refused, ${exact} rounds checked byte by byte), ${sessions} sessions, ${ended} of them ended by virtiod`
}

/** Whether playing these makes a fresh virtiod misbehave. */
export async function replayGames(games: readonly RingGame[], options: TargetOptions = {}): Promise<Error | undefined> {
  const target = new Target(options)
  const flipper = new Flipper(1)
  try {
    await target.start()
    for (const game of games)
      await playGame(target, flipper, game, { rings: 0, broken: 0, exact: 0, refused: 0, sessions: 0, ended: 0 })
    target.check(new Random(1))
    await target.stop()
    return undefined
  } catch (error) {
    if (error instanceof Misbehaviour) return error
    throw error
  } finally {
    await flipper.close()
    target.dispose()
  }
}

/** The last games alone, and of them the fewest rounds, as far as that still does it. */
export async function minimiseGames(
  games: readonly RingGame[],
  say: (text: string) => void
): Promise<readonly RingGame[]> {
  const last = games.slice(-1)
  if ((await replayGames(last)) === undefined) {
    say('the last session alone does not do it (a second thread is never the same twice); all are kept')
    return games
  }
  const [{ seed, rounds: most, exact }] = last as [RingGame]
  let low = 1
  let high = most
  while (low < high) {
    const rounds = Math.floor((low + high) / 2)
    if ((await replayGames([{ seed, rounds, exact }])) === undefined) low = rounds + 1
    else high = rounds
  }
  say(`session ${seed}, ${high} rounds`)
  return [{ seed, rounds: high, exact }]
}

/** One session on each of two victims, at the same time. */
async function playGame(
  target: Target,
  flipper: Flipper,
  { seed, rounds, exact }: RingGame,
  counts: Counts
): Promise<void> {
  const random = new Random(seed)
  const sessions: RingSession[] = []
  try {
    for (const device of random.two(VICTIM_NAMES))
      sessions.push(new RingSession(chooseOptions(random, device, target.socketOf(device))))
    if (!exact) await flipper.take(sessions[random.below(2)]!)
    for (let round = 0; round < rounds && sessions.every((session) => !session.ended); round++) {
      for (const session of sessions) session.start(random, exact)
      letRun(random)
      flipper.flip(!exact && random.one(3))
      for (let times = exact ? 0 : random.below(2 * REFILLS); times > 0; times--) {
        for (const session of sessions) {
          session.refill(random)
          if (random.one(4)) session.disturb(random)
        }
        letRun(random)
      }
      for (const session of sessions) session.stop(exact)
      flipper.flip(false)
      if (round % 16 === 0) for (const session of sessions) session.check()
    }
    for (const session of sessions) session.check()
  } catch (error) {
    // It may end a session, not refuse to begin one or stop to answer.
    if (!(error instanceof FrontendError || error instanceof Misbehaviour)) throw error
    target.alive()
    throw new Misbehaviour(`a session with ${JSON.stringify(sessions.map(({ options }) => options))}: ${error.message}`)
  } finally {
    flipper.flip(false)
    for (const session of sessions) {
      counts.sessions++
      counts.rings += session.filled
      counts.exact += session.exactRounds
      counts.broken += session.broken
      counts.refused += session.refused
      if (session.ended) counts.ended++
      session.close()
    }
  }
}

/** The second thread of the guest. */
class Flipper {
  readonly #worker: Worker
  readonly #state = new Int32Array(new SharedArrayBuffer(16))

  constructor(seed: number) {
    this.#state[0] = 1
    const control = this.#state.buffer as SharedArrayBuffer
    const workerData: Flipping = { control, seed }
    this.#worker = new Worker(new URL('./flipper-thread.ts', import.meta.url), { workerData })
    this.#worker.on('error', (error) => {
      throw error
    })
  }

  get flips(): number {
    return Atomics.load(this.#state, 1)
  }

  /** From now on it flips in this session's memory, when it may. */
  async take({ shared, inflight }: RingSession): Promise<void> {
    Atomics.store(this.#state, 2, 0)
    this.#worker.postMessage({ memory: shared, inflight })
    const waiting = Atomics.waitAsync(this.#state, 2, 0, 10_000)
    await waiting.value
  }

  flip(on: boolean): void {
    Atomics.store(this.#state, 0, on ? 2 : 1)
    Atomics.notify(this.#state, 0)
  }

  async close(): Promise<void> {
    Atomics.store(this.#state, 0, 0)
    Atomics.notify(this.#state, 0)
    await this.#worker.terminate()
  }
}

/**
 * The protocol fuzzer: one hostile session after the other on the victims' sockets, on two at the same time, and a look at
 * virtiod in between. When it misbehaves, what led there is cut down to the messages that do it.
 */
import { Connection } from '../../src/frontend/connection.ts'
import { type Play, Player } from './player.ts'
import { makeScenario, type Offer } from './protocol-messages.ts'
import { Random } from './random.ts'
import type { FuzzMessage, Scenario } from './scenario.ts'
import { Misbehaviour, Target, type TargetOptions } from './target.ts'
import { VICTIM_NAMES, type Victim } from './victims.ts'

/** Sessions between two looks, and how many of them are kept for when something is wrong. */
const SESSIONS = 200

export interface RunOptions extends TargetOptions {
  readonly seed: number
  /** Messages, or rings; undefined = without end. */
  readonly count?: number
  readonly seconds?: number
  readonly say: (text: string) => void
}

export interface ProtocolResult {
  readonly messages: number
  readonly sessions: number
  /** Sessions that virtiod ended before their last message. */
  readonly ended: number
  readonly figures: string
  readonly find?: { readonly scenarios: readonly Scenario[]; readonly error: Error }
}

interface Counts {
  messages: number
  sessions: number
  ended: number
}

export async function fuzzProtocol(options: RunOptions): Promise<ProtocolResult> {
  const { seed, count = Number.POSITIVE_INFINITY, seconds = Number.POSITIVE_INFINITY, say } = options
  const random = new Random(seed)
  const target = new Target(options)
  const counts: Counts = { messages: 0, sessions: 0, ended: 0 }
  const recent: Scenario[] = []
  let figures = ''
  try {
    await target.start()
    using player = new Player(target)
    const offers = VICTIM_NAMES.map((victim) => offerOf(target.socketOf(victim), victim))
    const deadline = performance.now() + seconds * 1000
    let said = performance.now()
    for (let round = 0; counts.messages < count && performance.now() < deadline; round++) {
      recent.length = 0
      for (let i = 0; i < SESSIONS / 2 && performance.now() < deadline; i++) {
        const pair = random.two(offers).map((offer) => makeScenario(random, offer))
        recent.push(...pair)
        playTogether(player, pair, counts)
      }
      target.check(random)
      // The first rounds have it compile its code and fill its pools.
      if (round === 4) target.warm()
      figures = target.figures
      if (performance.now() - said > 2000) {
        said = performance.now()
        say(`${describe(counts)}; ${figures}`)
      }
      // A child's end is noticed in the event loop.
      await new Promise((resolve) => setImmediate(resolve))
    }
    await target.stop()
    return { ...counts, figures }
  } catch (error) {
    if (!(error instanceof Misbehaviour)) throw error
    return { ...counts, figures, find: { scenarios: [...recent], error } }
  } finally {
    target.dispose()
  }
}

export function describe({ messages, sessions, ended }: Counts): string {
  return `${messages} messages, ${sessions} sessions, ${ended} of them ended by virtiod`
}

/** Whether playing these makes a fresh virtiod misbehave. */
export async function replay(scenarios: readonly Scenario[], options: TargetOptions = {}): Promise<Error | undefined> {
  const target = new Target(options)
  try {
    await target.start()
    using player = new Player(target)
    for (const scenario of scenarios) player.play(scenario)
    target.check(new Random(1))
    await target.stop()
    return undefined
  } catch (error) {
    if (error instanceof Misbehaviour) return error
    throw error
  } finally {
    target.dispose()
  }
}

/** The fewest sessions, and of them the fewest messages, that still do it; what can't be repeated is returned whole. */
export async function minimiseScenarios(
  scenarios: readonly Scenario[],
  say: (text: string) => void
): Promise<Scenario[]> {
  const fails = async (some: readonly Scenario[]): Promise<boolean> => (await replay(some)) !== undefined
  if (!(await fails(scenarios))) {
    say('it cannot be repeated with a fresh virtiod; all that was played is kept')
    return [...scenarios]
  }
  const sessions = await fewest(scenarios, fails)
  say(`${sessions.length} sessions do it`)
  const least: Scenario[] = [...sessions]
  for (const [i, scenario] of sessions.entries()) {
    const withMessages = (messages: readonly FuzzMessage[]): Scenario => ({ ...scenario, batches: inBatches(messages) })
    const messages = await fewest(scenario.batches.flat(), (some) => fails(least.with(i, withMessages(some))))
    if (await fails(least.with(i, withMessages(messages)))) least[i] = withMessages(messages)
  }
  return least
}

function inBatches(messages: readonly FuzzMessage[]): FuzzMessage[][] {
  const batches: FuzzMessage[][] = []
  for (let at = 0; at < messages.length; at += 100) batches.push(messages.slice(at, at + 100))
  return batches
}

async function fewest<T>(all: readonly T[], fails: (some: readonly T[]) => Promise<boolean>): Promise<readonly T[]> {
  let best = all
  for (let piece = Math.ceil(best.length / 2); piece >= 1; piece = piece === 1 ? 0 : Math.ceil(piece / 2)) {
    for (let at = 0; at < best.length; ) {
      const without = [...best.slice(0, at), ...best.slice(at + piece)]
      if (await fails(without)) best = without
      else at += piece
    }
  }
  return best
}

/** Each device's session at the same time as the other's. */
function playTogether(player: Player, scenarios: readonly Scenario[], counts: Counts): void {
  const plays: Play[] = []
  try {
    for (const scenario of scenarios) plays.push(player.begin(scenario))
    let open: readonly Play[] = plays
    while (open.length > 0) {
      open = open.filter((play) => play.send())
      for (const play of open) play.answered()
    }
    for (const play of plays) {
      counts.sessions++
      counts.messages += play.served
      if (play.ended) counts.ended++
    }
  } finally {
    for (const play of plays) play.close()
  }
}

function offerOf(socket: string, device: Victim): Offer {
  const connection = Connection.connect(socket)
  try {
    return { device, features: connection.getFeatures(), protocolFeatures: connection.getProtocolFeatures() }
  } finally {
    connection.close()
  }
}

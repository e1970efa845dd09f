/**
 * Runs cases against a socket and decides what came of each. It owns the order, the outcomes and the look at the
 * back-end after every case: a death or a hang belongs to the case that was running. It must not know the command line.
 */
import { readFileSync } from 'node:fs'
import { setImmediate, setTimeout } from 'node:timers/promises'
import { hasFeature } from '../../virtio/features.ts'
import { FrontendError } from '../errors.ts'
import { nameFeatures, nameProtocolFeatures } from '../feature-names.ts'
import { layouts } from '../memory.ts'
import { sleepMs } from '../virtqueue.ts'
import type { CaseResult, ConformanceCase, Group, Needs, Outcome } from './case.ts'
import { GROUPS, NotApplicable, Violation } from './case.ts'
import { CASES } from './cases.ts'
import { Context } from './context.ts'
import { discover, type Facts } from './facts.ts'

export interface ConformanceOptions {
  /** Default `auto`: what the features say. */
  readonly type?: 'blk' | 'net' | 'auto'
  /** Only these cases, and those of `groups`. */
  readonly ids?: readonly string[]
  /** Only cases of these groups, and those of `ids`. */
  readonly groups?: readonly Group[]
  /** Also cases that change the disk or the device's settings. Default false. */
  readonly destructive?: boolean
  /** Milliseconds that one request may take; default 3000. */
  readonly timeoutMs?: number
  /** How long to wait for a back-end that died, in milliseconds: somebody may start it again. Default 5000. */
  readonly restartMs?: number
  /** A second socket whose frames come in at the first. */
  readonly peer?: string
  /** Called after each case. */
  readonly progress?: (result: CaseResult) => void
  /** Stops before the next case. */
  readonly signal?: AbortSignal
  /** For tests: other cases than the table's. */
  readonly cases?: readonly ConformanceCase[]
}

export interface ConformanceResult {
  readonly socket: string
  readonly backend: string
  readonly device: 'blk' | 'net'
  /** As 0x… texts. */
  readonly features: string
  readonly protocolFeatures: string
  readonly results: readonly CaseResult[]
  readonly counts: Readonly<Record<Outcome, number>>
  /** Every MUST that applies holds, and the back-end lived. */
  readonly conforms: boolean
  readonly aborted: boolean
}

/**
 * @throws FrontendError when nobody listens, or not even one session with one request works
 */
export async function conformance(socketPath: string, options: ConformanceOptions = {}): Promise<ConformanceResult> {
  const run = new Run(socketPath, options)
  // What is about other devices isn't skipped, it has no place here; unless it was asked for by name.
  const chosen = select(options).filter(
    ({ id, needs }) => needs?.device === undefined || needs.device === run.facts.device || options.ids?.includes(id)
  )
  const results: CaseResult[] = []
  for (const one of chosen) {
    if (options.signal?.aborted === true) break
    const result = await run.case(one)
    results.push(result)
    options.progress?.(result)
    // Lets signals and output through: everything else here blocks.
    await setImmediate()
  }
  const counts: Record<Outcome, number> = { pass: 0, fail: 0, warn: 0, skip: 0, error: 0 }
  for (const { outcome } of results) counts[outcome]++
  return {
    socket: socketPath,
    backend: run.facts.program,
    device: run.facts.device,
    features: `0x${run.facts.features.toString(16)}`,
    protocolFeatures: `0x${run.facts.protocolFeatures.toString(16)}`,
    results,
    counts,
    conforms: counts.fail === 0 && counts.error === 0,
    aborted: results.length < chosen.length,
  }
}

/** The cases that are asked for, by name or by group, in the order of the groups. */
export function select({ ids = [], groups = [], cases = CASES }: ConformanceOptions): ConformanceCase[] {
  const order = Object.keys(GROUPS)
  const all = ids.length === 0 && groups.length === 0
  return cases
    .filter((one) => all || ids.includes(one.id) || groups.includes(one.group))
    .toSorted((a, b) => order.indexOf(a.group) - order.indexOf(b.group))
}

class Run {
  facts: Facts
  readonly #socketPath: string
  readonly #options: ConformanceOptions
  readonly #timeoutMs: number
  #gone = false

  constructor(socketPath: string, options: ConformanceOptions) {
    this.#socketPath = socketPath
    this.#options = options
    this.#timeoutMs = options.timeoutMs ?? 3000
    this.facts = this.#discover()
  }

  async case(one: ConformanceCase): Promise<CaseResult> {
    const { id, group, level, rule, cites } = one
    const from = performance.now()
    const done = (outcome: Outcome, seen: string, expected?: string): CaseResult => ({
      id,
      group,
      level,
      rule,
      cites,
      outcome,
      seen,
      ...(expected !== undefined && { expected }),
      ms: Math.round(performance.now() - from),
    })
    if (this.#gone) return done('skip', 'the back-end is gone')
    const missing = this.#missing(one)
    if (missing !== undefined) return done('skip', missing)
    const verdict = this.#try(one)
    const trouble = verdict.outcome === 'skip' ? undefined : this.#trouble()
    if (trouble === undefined) return done(verdict.outcome, verdict.seen, verdict.expected)
    await this.#awaitReturn()
    return done('error', `${trouble}; before that: ${verdict.seen}`, 'the back-end goes on')
  }

  #discover(): Facts {
    const { type = 'auto', peer } = this.#options
    return discover(this.#socketPath, { type, timeoutMs: this.#timeoutMs, ...(peer !== undefined && { peer }) })
  }

  #context(): Context {
    return new Context(this.#socketPath, this.facts, this.#timeoutMs, this.#options.peer)
  }

  /** Why a case does not apply. */
  #missing({ needs = {}, destructive }: ConformanceCase): string | undefined {
    const { facts } = this
    const lacking = notOffered(needs, facts)
    if (lacking !== undefined) return lacking
    if (needs.fds && !facts.fds) return "the back-end's open fds cannot be counted (another user or pid namespace)"
    if (needs.wire && facts.net?.wire === undefined) return 'no frames come in: the device does not loop; give --peer'
    if (destructive && this.#options.destructive !== true) return 'it changes the device: give --destructive'
    return undefined
  }

  #try(one: ConformanceCase): { outcome: Outcome; seen: string; expected?: string } {
    const context = this.#context()
    let good = false
    try {
      const seen = one.run(context)
      good = true
      return { outcome: 'pass', seen }
    } catch (error) {
      if (error instanceof NotApplicable) return { outcome: 'skip', seen: error.message }
      const outcome = one.level === 'MUST' ? 'fail' : 'warn'
      if (error instanceof Violation) return { outcome, seen: error.seen, expected: error.expected }
      const { message } = error as Error
      // The drivers' own checks ("the device used chain 3, which it doesn't have") are plain errors.
      if (error instanceof FrontendError || message.startsWith('the device'))
        return { outcome, seen: message, expected: one.rule }
      return { outcome: 'error', seen: `the suite failed: ${(error as Error).stack}` }
    } finally {
      context.cleanup(!good)
    }
  }

  /** What is wrong with the back-end itself now, or undefined. */
  #trouble(): string | undefined {
    const deadline = performance.now() + 2 * this.#timeoutMs
    const context = this.#context()
    for (;;) {
      try {
        const { guest, ring } = context.running({ memory: layouts.single(8 * 2 ** 20) })
        ring.run()
        const pid = guest.connection.peerPid
        if (pid === this.facts.pid) return undefined
        const died = `the back-end died: its process was ${this.facts.pid} and is ${pid}`
        this.facts = { ...this.facts, pid }
        return died
      } catch (error) {
        if (!this.#alive()) return `the back-end died (process ${this.facts.pid})`
        if (performance.now() > deadline)
          return `the back-end lives and does not serve a new session: ${(error as Error).message}`
        sleepMs(20)
      } finally {
        context.cleanup(true)
      }
    }
  }

  #alive(): boolean {
    if (this.facts.pid === undefined) return true
    return processLives(this.facts.pid)
  }

  /** Somebody may start a back-end that died again: a supervisor, a shell loop. */
  async #awaitReturn(): Promise<void> {
    for (const deadline = performance.now() + (this.#options.restartMs ?? 5000); performance.now() < deadline; ) {
      try {
        this.facts = this.#discover()
        return
      } catch {
        await setTimeout(50)
      }
    }
    this.#gone = true
  }
}

function notOffered(needs: Needs, facts: Facts): string | undefined {
  if (needs.device !== undefined && needs.device !== facts.device) return `for ${needs.device} only`
  const feature = needs.features?.find((bit) => !hasFeature(facts.features, bit))
  if (feature !== undefined) return `not offered: ${featureName(feature, facts.device)}`
  const protocol = needs.protocol?.find((bit) => !hasFeature(facts.protocolFeatures, bit))
  if (protocol !== undefined) return `not offered: ${protocolName(protocol)}`
  if (needs.queues !== undefined && needs.queues > facts.rings) return `it has ${facts.rings} rings`
  return undefined
}

export function featureName(bit: number, device: 'blk' | 'net'): string {
  return nameFeatures(1n << BigInt(bit), device)[0]?.name ?? `feature bit ${bit}`
}

export function protocolName(bit: number): string {
  return nameProtocolFeatures(1n << BigInt(bit))[0]?.name ?? `protocol feature bit ${bit}`
}

/** A zombie is dead, too. Of processes that /proc doesn't show, signals tell. */
function processLives(pid: number): boolean {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8')
    return !/^\) [ZX]/.test(stat.slice(stat.lastIndexOf(')')))
  } catch {
    try {
      process.kill(pid, 0)
      return true
    } catch (error) {
      return (error as NodeJS.ErrnoException).code === 'EPERM'
    }
  }
}

/**
 * What code ran, from V8's block coverage of this process: the guide of the pure fuzzer. A block is known by its script
 * and its place in the source.
 */
import { type Profiler, Session } from 'node:inspector'

export class Coverage implements Disposable {
  readonly #session = new Session()
  readonly #wanted: (url: string) => boolean
  /** Blocks that ever ran, as `url:start-end`. */
  readonly seen = new Set<string>()
  /** Blocks and functions that V8 told of at all. */
  readonly known = new Set<string>()

  /** @param wanted scripts that count, by URL */
  constructor(wanted: (url: string) => boolean) {
    this.#wanted = wanted
    this.#session.connect()
    this.#post('Profiler.enable')
    this.#post('Profiler.startPreciseCoverage', { callCount: true, detailed: true })
  }

  /** Blocks that ran since the last call. */
  take(): string[] {
    const { result } = this.#post('Profiler.takePreciseCoverage') as Profiler.TakePreciseCoverageReturnType
    const ran: string[] = []
    for (const script of result) {
      if (!this.#wanted(script.url)) continue
      const name = script.url.slice(script.url.lastIndexOf('/') + 1)
      for (const { ranges } of script.functions) {
        for (const { startOffset, endOffset, count } of ranges) {
          const key = `${name}:${startOffset}-${endOffset}`
          this.known.add(key)
          if (count > 0) ran.push(key)
        }
      }
    }
    return ran
  }

  /** Whether a block ran since the last `take` that is not among the seen. */
  reachedNew(): boolean {
    return this.take().some((key) => !this.seen.has(key))
  }

  /** Those of `take` that never ran before; they count as seen from now on. */
  takeNew(): string[] {
    const fresh = this.take().filter((key) => !this.seen.has(key))
    for (const key of fresh) this.seen.add(key)
    return fresh
  }

  [Symbol.dispose](): void {
    this.#post('Profiler.stopPreciseCoverage')
    this.#session.disconnect()
  }

  /** A session on its own thread answers before `post` returns. */
  #post(method: string, parameters: object = {}): unknown {
    let answer: { error: Error | null; result: unknown } | undefined
    this.#session.post(
      method as 'Profiler.enable',
      parameters as never,
      ((error: Error | null, result: unknown) => {
        answer = { error, result }
      }) as never
    )
    if (answer === undefined) throw new Error(`${method} did not answer at once`)
    if (answer.error) throw answer.error
    return answer.result
  }
}

/**
 * How handovers of a daemon ended, for who asked for them by a signal: a file in memory that every process of the same
 * user finds in
 * /proc/PID/fd, whatever namespaces it is in, and of which nothing remains. It also tells a process that takes the
 * signal from one that it would kill.
 */
import { closeSync, openSync, readdirSync, readlinkSync, readSync, writeSync } from 'node:fs'
import { memoryFile } from '../engine/files.ts'

const NAME = 'virtiod-handover'
const SIZE = 4096

export interface HandoverOutcome {
  /** How many handovers were asked for so far; 0 = none, and nothing else is told. */
  readonly count: number
  /** Of the process that serves now, when the last one succeeded. */
  readonly pid?: number
  /** Why the last one failed. */
  readonly problem?: string
}

/** The daemon's side. */
export class OutcomeFile {
  readonly #fd = memoryFile(NAME, SIZE)
  #count = 0

  constructor() {
    this.#write({ count: 0 })
  }

  succeeded(pid: number): void {
    this.#write({ count: ++this.#count, pid })
  }

  failed(problem: string): void {
    this.#write({ count: ++this.#count, problem: problem.slice(0, 1000) })
  }

  #write(outcome: HandoverOutcome): void {
    // One write: who reads in between sees something that isn't JSON, and reads again.
    const bytes = Buffer.alloc(SIZE)
    bytes.write(JSON.stringify(outcome))
    writeSync(this.#fd, bytes, 0, SIZE, 0)
  }
}

/** The other side. The daemon may end: what it wrote last stays. */
export class OutcomeReader implements Disposable {
  readonly #fd: number

  private constructor(fd: number) {
    this.#fd = fd
  }

  /**
   * Undefined when `pid` is no daemon that can hand over.
   * @throws a system error: ENOENT no such process, EACCES another user's
   */
  static open(pid: number): OutcomeReader | undefined {
    const directory = `/proc/${pid}/fd`
    for (const name of readdirSync(directory)) {
      let target = ''
      try {
        target = readlinkSync(`${directory}/${name}`)
      } catch {
        // Closed meanwhile.
      }
      if (target.startsWith(`/memfd:${NAME} `)) return new OutcomeReader(openSync(`${directory}/${name}`, 'r'))
    }
    return undefined
  }

  read(): HandoverOutcome {
    const bytes = Buffer.alloc(SIZE)
    for (;;) {
      readSync(this.#fd, bytes, 0, SIZE, 0)
      try {
        return JSON.parse(bytes.toString('utf8', 0, bytes.indexOf(0))) as HandoverOutcome
      } catch {
        // It is being written.
      }
    }
  }

  [Symbol.dispose](): void {
    closeSync(this.#fd)
  }
}

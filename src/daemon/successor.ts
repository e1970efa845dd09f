/**
 * The new process of a handover as the old one sees it: what it said, whether it lives, and how to end it for certain.
 * It must not know devices.
 */
import { closeFds, FdChannel } from '../vhost-user/fd-channel.ts'
import { HandoverError, type HandoverMessage, parseMessage } from './handover-messages.ts'

/** A process that was started with one end of the channel. */
export interface LaunchedProcess {
  readonly pid: number
  /** Resolves when it has ended, with how: `exit code 2`. */
  readonly ended: Promise<string>
  /** SIGKILL: it does nothing more. */
  kill(): void
}

/**
 * @param fd its end of the channel: borrowed, for the time of the call @throws HandoverError when it can't be started
 */
export type Launch = (fd: number) => LaunchedProcess

/**
 * How long a killed process may take to end; one that hangs in the kernel will not run again either. In milliseconds.
 */
const DEATH_LIMIT_MS = 2000

export class Successor {
  readonly process: LaunchedProcess
  readonly #channel: FdChannel
  readonly #said = new Set<HandoverMessage['kind']>()
  #failure: HandoverError | undefined
  #cancelled: HandoverError | undefined
  #waiting: (() => void)[] = []
  readonly #gone: Promise<void>

  private constructor(channel: FdChannel, process: LaunchedProcess) {
    this.#channel = channel
    this.process = process
    this.#gone = this.#read()
  }

  /** @throws HandoverError */
  static launch(launch: Launch): Successor {
    const { channel, fd } = FdChannel.pair()
    try {
      return new Successor(channel, launch(fd))
    } catch (error) {
      channel.close()
      throw error
    } finally {
      closeFds([fd])
    }
  }

  /** It said that it serves the guests. */
  get committed(): boolean {
    return this.#said.has('committed')
  }

  /**
   * Sends a message. @param fds borrowed until it resolves @throws HandoverError when nobody takes it before
   * `deadline`
   */
  async send(message: HandoverMessage, deadline: number, fds: readonly number[] = []): Promise<void> {
    const sent = this.#channel.send(message, fds).then((arrived) => {
      if (!arrived) throw new HandoverError('the new process is gone')
    })
    await this.#within(sent, deadline, 'it does not read')
  }

  /**
   * Resolves when it has said `kind`.
   * @param deadline on the clock of performance.now()
   * @throws HandoverError when it fails, ends or is too late, or `cancel` was called
   */
  async said(kind: HandoverMessage['kind'], deadline: number): Promise<void> {
    const until = async (): Promise<void> => {
      while (!this.#said.has(kind)) {
        if (this.#failure !== undefined) throw this.#failure
        // It was told to commit: it will, or end.
        if (this.#cancelled !== undefined && kind !== 'committed') throw this.#cancelled
        await new Promise<void>((resolve) => this.#waiting.push(resolve))
      }
    }
    await this.#within(until(), deadline, `it did not say "${kind}" in time`)
  }

  /** Ends every wait, present and future, but for `committed`. */
  cancel(reason: string): void {
    this.#cancelled = new HandoverError(reason)
    this.#wake()
  }

  /** Ends it, if it hasn't ended. Whether it had `committed` is certain afterwards. */
  async kill(): Promise<void> {
    this.process.kill()
    await Promise.race([this.#gone, new Promise((resolve) => setTimeout(resolve, DEATH_LIMIT_MS))])
    this.#channel.close()
  }

  /** Leaves it alone. */
  release(): void {
    this.#channel.close()
  }

  async #within(work: Promise<void>, deadline: number, late: string): Promise<void> {
    let timer: NodeJS.Timeout | undefined
    const timeout = new Promise<void>((_, reject) => {
      timer = setTimeout(
        () => reject(new HandoverError(`the new process hangs: ${late}`)),
        deadline - performance.now()
      )
    })
    try {
      await Promise.race([work, timeout])
    } finally {
      clearTimeout(timer)
      work.catch(() => {})
    }
  }

  /** Takes down what it says until its end of the channel is closed. */
  async #read(): Promise<void> {
    try {
      for (;;) {
        const received = await this.#channel.receive()
        if (received === undefined) break
        closeFds(received.fds)
        const message = parseMessage(received.body)
        this.#said.add(message.kind)
        if (message.kind === 'failed') this.#failure ??= new HandoverError(message.message)
        this.#wake()
      }
      const how = await Promise.race([
        this.process.ended,
        new Promise<string>((resolve) => setTimeout(resolve, DEATH_LIMIT_MS, 'its end of the channel is closed')),
      ])
      this.#failure ??= new HandoverError(`the new process ended: ${how}`)
    } catch (error) {
      this.#failure ??= error instanceof HandoverError ? error : new HandoverError((error as Error).message)
    }
    this.#wake()
  }

  #wake(): void {
    for (const resolve of this.#waiting.splice(0)) resolve()
  }
}

/**
 * Handing a running daemon over to a new process, from the old one's side: the order of things, and what happens when
 * one of them fails (handover-messages.ts). It must not know how a process is started, nor what devices and sessions
 * hold.
 */
import type { DeviceConfig } from './config.ts'
import { deviceOptions, HANDOVER_VERSION, type HandedDevice, HandoverError, type Hello } from './handover-messages.ts'
import type { KeptFiles } from './kept-files.ts'
import type { Logger } from './log.ts'
import { type Launch, Successor } from './successor.ts'

/** What a device's server is asked for. */
export interface Handed {
  readonly device: HandedDevice
  /** Borrowed until the device goes on or is abandoned. */
  readonly fds: readonly number[]
}

/** A device in the old process. */
export interface HandingDevice {
  /** Stops serving at a point from which this process or another one can go on. */
  suspend(): Promise<Handed>
  /** Goes on here; also while `suspend` is still under way. */
  resume(): Promise<void>
  /** Forgets all that another process has now. */
  abandon(): void
}

export interface HandoverOptions {
  readonly launch: Launch
  /** Where /metrics is served, and the listening socket. */
  readonly metrics?: { readonly address: unknown; readonly fd: number } | undefined
  /** How long the new process may take to open its devices, while this one serves. In milliseconds; default 30,000. */
  readonly readyLimitMs?: number
  /**
   * How long guests may have to wait, and then how long the new process may take to begin. In milliseconds; default
   * 5,000.
   */
  readonly pauseLimitMs?: number
}

const READY_LIMIT_MS = 30_000
const PAUSE_LIMIT_MS = 5000

/** It came to pass that neither process serves: no more than after a crash. */
export class LostHandover extends Error {
  override readonly name = 'LostHandover'
  readonly code = 'ERR_HANDOVER_LOST'
}

export class Handover {
  readonly #devices: readonly HandingDevice[]
  readonly #log: Logger
  readonly #options: HandoverOptions
  readonly #pause: () => void
  #successor: Successor | undefined
  #cancelled: string | undefined

  /** @param pause stops all guests at one moment, before they are suspended one by one */
  constructor(devices: readonly HandingDevice[], log: Logger, pause: () => void, options: HandoverOptions) {
    this.#devices = devices
    this.#log = log
    this.#pause = pause
    this.#options = options
  }

  /**
   * Resolves to the pid of the process that serves now; the devices have been abandoned.
   * @throws HandoverError when all is as before, LostHandover when nobody serves any more
   */
  async run(configs: readonly DeviceConfig[], files: KeptFiles): Promise<number> {
    const { launch, readyLimitMs = READY_LIMIT_MS } = this.#options
    const started = performance.now()
    const successor = Successor.launch(launch)
    this.#successor = successor
    if (this.#cancelled !== undefined) successor.cancel(this.#cancelled)
    const { pid } = successor.process
    this.#log.info({ successor: pid }, 'handover: a new process is starting')
    try {
      const { message, fds } = this.#hello(configs, files)
      await successor.send(message, started + readyLimitMs, fds)
      await successor.said('ready', started + readyLimitMs)
    } catch (error) {
      await successor.kill()
      throw error
    }
    const ready = performance.now()
    this.#log.info({ successor: pid, ms: Math.round(ready - started) }, 'handover: the new process is ready')
    await this.#pass(successor)
    const ms = Math.round((performance.now() - ready) * 10) / 10
    this.#log.info({ successor: pid, pauseMs: ms }, 'handover: the new process serves')
    return pid
  }

  /** Makes `run` fail as soon as possible, unless it is too late for that. */
  cancel(reason: string): void {
    this.#cancelled = reason
    this.#successor?.cancel(reason)
  }

  #hello(configs: readonly DeviceConfig[], files: KeptFiles): { message: Hello; fds: number[] } {
    const { metrics } = this.#options
    const kept = [...files.kept]
    const fds = kept.flatMap(([, file]) => file.fds)
    if (metrics !== undefined) fds.push(metrics.fd)
    const message: Hello = {
      kind: 'hello',
      version: HANDOVER_VERSION,
      pid: process.pid,
      devices: configs.map((config) => ({
        name: config.name,
        type: config.definition.name,
        socket: config.socket,
        options: deviceOptions(config),
      })),
      files: kept.map(([key, file]) => ({ key, fds: file.fds.length, facts: file.facts })),
      ...(metrics === undefined ? {} : { metrics: metrics.address }),
    }
    return { message, fds }
  }

  /** From the first guest that is suspended until another process serves all of them, or this one again. */
  async #pass(successor: Successor): Promise<void> {
    const { pauseLimitMs = PAUSE_LIMIT_MS } = this.#options
    const from = performance.now()
    const deadline = from + pauseLimitMs
    this.#pause()
    const suspending = this.#devices.map((device) => device.suspend())
    try {
      const all = await before(Promise.all(suspending), deadline, 'requests of guests are still in flight')
      for (const { device, fds } of all) await successor.send(device, deadline, fds)
      await successor.send({ kind: 'end' }, deadline)
      await successor.said('prepared', deadline)
      // From here on the new process goes on even when this one dies; this one only when the new one is dead.
      await successor.send({ kind: 'commit' }, deadline)
      await successor.said('committed', performance.now() + pauseLimitMs)
    } catch (error) {
      if (!successor.committed) {
        await successor.kill()
        // It began to serve in the moment in which it was ended: its guests are as after a crash.
        if (successor.committed)
          throw new LostHandover('the new process was too slow, and ended when it served already')
        await this.#goOn()
        const ms = Math.round(performance.now() - from)
        this.#log.warn({ pauseMs: ms }, 'handover: this process serves again')
        throw error
      }
    }
    for (const device of this.#devices) device.abandon()
    successor.release()
  }

  /** Each device as soon as it can: one that hangs holds up no other. */
  async #goOn(): Promise<void> {
    const resumed = Promise.all(this.#devices.map((device) => device.resume()))
    // Those that can go on have done so by then; the others will.
    await Promise.race([resumed, new Promise((resolve) => setTimeout(resolve, RESUME_LIMIT_MS))])
  }
}

/** How long one waits for a device that hangs before the failure is told. In milliseconds. */
const RESUME_LIMIT_MS = 1000

async function before<T>(work: Promise<T>, deadline: number, late: string): Promise<T> {
  let timer: NodeJS.Timeout | undefined
  const timeout = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new HandoverError(late)), deadline - performance.now())
  })
  try {
    return await Promise.race([work, timeout])
  } finally {
    clearTimeout(timer)
    work.catch(() => {})
  }
}

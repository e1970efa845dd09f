/**
 * `virtiod scsi` as a child process on images of its own, and a driver's session with it. The front-end of the tests blocks
 * its thread, so nothing here needs the event loop but `stop`.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { closeSync, mkdtempSync, openSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll } from 'vitest'
import { layouts } from '../../src/frontend/memory.ts'
import { ScsiControl, ScsiDriver, ScsiEvents } from '../../src/frontend/scsi.ts'
import { Session, type SessionOptions } from '../../src/frontend/session.ts'
import * as scsi from '../../src/virtio/scsi.ts'
import { eventually, isAlive, openFds } from '../vhost-user/backend.ts'

const main = fileURLToPath(new URL('../../src/cli/main.ts', import.meta.url))

export const MIB = 2 ** 20

export interface ScsiBackendOptions {
  /** Sizes of the images, and the options of the units. Default: one of 4 MiB. */
  readonly units?: readonly { readonly bytes?: number; readonly options?: string }[]
  /** More flags. */
  readonly extra?: readonly string[]
  readonly emulated?: boolean
}

// A test that fails halfway must not leave a daemon behind.
const running = new Set<ChildProcess>()
process.once('exit', () => {
  for (const child of running) child.kill('SIGKILL')
})

export class ScsiBackend {
  readonly directory = mkdtempSync(join(tmpdir(), 'virtiod-scsi-'))
  readonly socket = join(this.directory, 'scsi.sock')
  readonly images: readonly string[]
  readonly process: ChildProcess
  readonly #ended: Promise<number | null>

  constructor({ units = [{}], extra = [], emulated = false }: ScsiBackendOptions = {}) {
    this.images = units.map((_, i) => join(this.directory, `disk${i}.img`))
    const luns = units.flatMap(({ bytes = 4 * MIB, options = '' }, i) => {
      if (bytes > 0) makeImage(this.images[i]!, bytes)
      return ['--lun', `${this.images[i]}${options}`]
    })
    const log = openSync(this.#logPath, 'w')
    const args = [main, 'scsi', '--socket-path', this.socket, ...luns, ...extra]
    this.process = spawn(process.execPath, args, {
      stdio: ['ignore', log, log],
      env: { ...process.env, VIRTIOD_IO_URING: emulated ? 'off' : 'on' },
    })
    closeSync(log)
    running.add(this.process)
    this.#ended = new Promise((resolve) => {
      this.process.once('exit', (code) => {
        running.delete(this.process)
        resolve(code)
      })
    })
    if (eventually(() => this.log.includes('"msg":"ready"') || !this.alive, 20_000) && this.alive) return
    const { log: text } = this
    this.discard()
    throw new Error(`it does not start:\n${text}`)
  }

  get #logPath(): string {
    return join(this.directory, 'log')
  }

  get log(): string {
    return readFileSync(this.#logPath, 'utf8')
  }

  get alive(): boolean {
    return isAlive(this.process.pid!)
  }

  /** Open fds of images. */
  get openImages(): number {
    return openFds(this.process.pid!).filter((name) => name.includes('.img')).length
  }

  /** SIGHUP. */
  refresh(): void {
    this.process.kill('SIGHUP')
  }

  /** SIGTERM: it has to end with 0. */
  async stop(): Promise<void> {
    if (!this.alive) throw new Error(`it died:\n${this.log.slice(-3000)}`)
    this.process.kill('SIGTERM')
    const timer = setTimeout(() => this.process.kill('SIGKILL'), 10_000)
    const code = await this.#ended
    clearTimeout(timer)
    const { log } = this
    rmSync(this.directory, { recursive: true, force: true })
    if (code !== 0) throw new Error(`SIGTERM ended it with ${code}:\n${log.slice(-3000)}`)
  }

  discard(): void {
    this.process.kill('SIGKILL')
    rmSync(this.directory, { recursive: true, force: true })
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop()
  }
}

/** A back-end for the tests of a file. */
export function scsiForFile(options: ScsiBackendOptions = {}): () => ScsiBackend {
  let backend: ScsiBackend | undefined
  beforeAll(() => {
    backend = new ScsiBackend(options)
  })
  afterAll(() => backend?.stop())
  return () => backend!
}

/** An image of that many zero bytes; one that is there already gets another size. */
export function makeImage(path: string, bytes: number): void {
  writeFileSync(path, '', { flag: 'a' })
  truncateSync(path, bytes)
}

/** A driver's session: control and event queue, and request queues. */
export interface OpenedScsi extends Disposable {
  readonly session: Session
  readonly control: ScsiControl
  readonly events: ScsiEvents
  readonly driver: ScsiDriver
  readonly drivers: readonly ScsiDriver[]
}

export interface OpenOptions extends SessionOptions {
  /** Request queues; default 1. */
  readonly requestQueues?: number
  /** Bytes of data in flight per request queue. */
  readonly arena?: number
  /** Pending unit attentions of units 0 … are taken; default 1 unit. */
  readonly clear?: number
  /** Called before rings are started. */
  readonly before?: (session: Session) => void
}

/** Opens a session as QEMU does: the rings in their order. */
export function openScsi(socket: string, options: OpenOptions = {}): OpenedScsi {
  const { requestQueues = 1, arena = MIB, clear = 1, before, ...rest } = options
  const bytes = Math.ceil((requestQueues * (arena + 65536) + 2 * MIB) / (2 * MIB)) * 2 * MIB
  const session = Session.open(socket, { memory: layouts.single(bytes), timeoutMs: 5000, ...rest, queues: 0 })
  try {
    before?.(session)
    const ring = { size: options.queueSize ?? 128, ...(options.mode === undefined ? {} : { mode: options.mode }) }
    for (let i = 0; i < scsi.VIRTIO_SCSI_REQUEST_QUEUE + requestQueues; i++) session.startQueue(i, ring)
    session.driverOk()
    const { memory } = session
    const drivers = Array.from({ length: requestQueues }, (_, i) => {
      const driver = new ScsiDriver(session.queue(scsi.VIRTIO_SCSI_REQUEST_QUEUE + i), memory, arena)
      driver.timeoutMs = 5000
      return driver
    })
    const driver = drivers[0]!
    for (let lun = 0; lun < clear; lun++) driver.clearAttentions(lun)
    return {
      session,
      driver,
      drivers,
      control: new ScsiControl(session.queue(scsi.VIRTIO_SCSI_CONTROL_QUEUE), memory),
      events: new ScsiEvents(session.queue(scsi.VIRTIO_SCSI_EVENT_QUEUE), memory),
      [Symbol.dispose]: () => session.close(),
    }
  } catch (error) {
    session.close(true)
    throw error
  }
}

/** Back-ends for the front-end's tests: qemu-storage-daemon and the fake with faults, each in a process of its own. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { onTestFinished } from 'vitest'
import { commandExists, qemuRival, RunningRival, virtiodRival } from '../../src/frontend/rivals.ts'
import type { Recorded, RecordingOptions } from './recording-backend.ts'

const here = dirname(fileURLToPath(import.meta.url))

export const hasQemu = await commandExists('qemu-storage-daemon')
if (!hasQemu)
  process.stderr.write('SKIPPED: the tests against qemu-storage-daemon (apt-get install qemu-system-common)\n')

function directory(): string {
  const path = mkdtempSync(join(tmpdir(), 'virtiod-frontend-'))
  onTestFinished(() => rmSync(path, { recursive: true, force: true }))
  return path
}

/** A file of 8 MiB whose every byte depends on its place. */
export function makeImage(path: string, bytes = 8 * 2 ** 20): Buffer {
  const image = Buffer.allocUnsafe(bytes)
  for (let at = 0; at < bytes; at += 4) image.writeUInt32LE((at * 2654435761) >>> 0, at)
  writeFileSync(path, image)
  return image
}

export interface Served {
  readonly socket: string
  readonly file: string
  readonly image: Buffer
}

/** qemu-storage-daemon on a fresh image, until the test ends. */
export async function serveWithQemu(queues = 2, writable = true): Promise<Served> {
  const dir = directory()
  const file = join(dir, 'disk.img')
  const image = makeImage(file)
  const backend = await RunningRival.start(qemuRival(queues, true, writable), file, join(dir, 'q.sock'))
  onTestFinished(() => backend.stop())
  return { socket: backend.socket, file, image }
}

/** The fake back-end with a fault, until the test ends. */
export async function serveFake(fault: string): Promise<string> {
  const dir = directory()
  const rival = {
    name: 'fake',
    command: (_file: string, socket: string) => [process.execPath, join(here, 'fake-backend.ts'), socket, fault],
  }
  const backend = await RunningRival.start(rival, '', join(dir, 'f.sock'))
  onTestFinished(() => backend.stop())
  return backend.socket
}

export interface Recording {
  readonly socket: string
  /** What it was told, in order. */
  readonly journal: () => Recorded[]
}

/** The back-end that writes everything down, until the test ends. */
export async function serveRecording(options: RecordingOptions = {}): Promise<Recording> {
  const dir = directory()
  const journal = join(dir, 'journal')
  const rival = {
    name: 'recording',
    command: (_file: string, socket: string) => [
      process.execPath,
      join(here, 'recording-backend.ts'),
      socket,
      journal,
      JSON.stringify(options),
    ],
  }
  const backend = await RunningRival.start(rival, '', join(dir, 'r.sock'))
  onTestFinished(() => backend.stop())
  return {
    socket: backend.socket,
    journal: () =>
      readFileSync(journal, 'utf8')
        .split('\n')
        .filter((line) => line !== '')
        .map((line) => JSON.parse(line) as Recorded),
  }
}

/** A virtiod on a fresh image: it can be killed and started again, on the same socket and file. */
export class Virtiod {
  readonly image: Buffer
  readonly file: string
  readonly #socket: string
  #running: RunningRival | undefined

  constructor() {
    const dir = directory()
    this.file = join(dir, 'disk.img')
    this.image = makeImage(this.file)
    this.#socket = join(dir, 'v.sock')
    onTestFinished(() => this.#running?.stop())
  }

  async start(): Promise<string> {
    this.#running = await RunningRival.start(virtiodRival(false), this.file, this.#socket)
    return this.#socket
  }

  /** SIGKILL, and gone. */
  async kill(): Promise<void> {
    if (this.#running === undefined) return
    process.kill(this.#running.pid, 'SIGKILL')
    await this.#running.stop()
  }
}

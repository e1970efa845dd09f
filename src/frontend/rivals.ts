/**
 * The back-ends that a comparison starts: virtiod, qemu-storage-daemon, and fio for the plain file. It owns their
 * processes. It must not know what is measured.
 */

import type { ChildProcess } from 'node:child_process'
import { execFile, spawn } from 'node:child_process'
import { existsSync, rmSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { native } from '../native.ts'
import { residentBytes } from './peer.ts'

const run = promisify(execFile)
const here = dirname(fileURLToPath(import.meta.url))

/** A command that serves `file` on `socket`. */
export interface Rival {
  readonly name: string
  command(file: string, socket: string): readonly string[]
}

/** The words that run virtiod. @param built the compiled package instead of the TypeScript */
export function virtiodCommand(built: boolean): readonly string[] {
  const root = here.endsWith(join('dist', 'src', 'frontend')) ? join(here, '..', '..', '..') : join(here, '..', '..')
  return [process.execPath, built ? join(root, 'dist', 'src', 'cli', 'main.js') : join(root, 'src', 'cli', 'main.ts')]
}

/** @param built run the compiled package instead of the TypeScript */
export function virtiodRival(built: boolean): Rival {
  return {
    name: 'virtiod',
    // biome-ignore format: option and value on one line
    command: (file, socket) => [
      ...virtiodCommand(built), 'blk', '--socket-path', socket, '--blk-file', file,
      '--num-queues', '1', '--iothreads', '1'
    ],
  }
}

/** virtiod with the file as LUN 0 of a SCSI device. @param built as of {@link virtiodRival} */
export function virtiodScsiRival(built: boolean): Rival {
  return {
    name: 'virtiod scsi',
    // biome-ignore format: option and value on one line
    command: (file, socket) => [
      ...virtiodCommand(built), 'scsi', '--socket-path', socket, '--lun', file.replaceAll(',', ',,'),
      '--num-queues', '1', '--iothreads', '1'
    ],
  }
}

/** @param discard `discard=unmap`, so that DISCARD and WRITE_ZEROES reach the file. @param queues default 1 */
export function qemuRival(queues = 1, discard = false, writable = true): Rival {
  return {
    name: 'qemu-storage-daemon',
    // biome-ignore format: option and value on one line
    command: (file, socket) => [
      'qemu-storage-daemon', '--object', 'iothread,id=t0',
      '--blockdev', `file,node-name=f,filename=${file},aio=io_uring${discard ? ',discard=unmap' : ''}${writable ? '' : ',read-only=on'}`,
      '--export', `type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path=${socket},writable=${writable ? 'on' : 'off'},iothread=t0,num-queues=${queues}`
    ],
  }
}

/** A running back-end. */
export class RunningRival {
  readonly socket: string
  readonly pid: number
  /** Milliseconds from spawn to the first successful connect. */
  readonly readyMs: number
  readonly #child: ChildProcess
  readonly #exited: Promise<void>

  private constructor(child: ChildProcess, exited: Promise<void>, socket: string, readyMs: number) {
    this.#child = child
    this.#exited = exited
    this.socket = socket
    this.pid = child.pid ?? 0
    this.readyMs = readyMs
  }

  /**
   * Starts a back-end and waits until its socket takes connections.
   * @param cpu pin it to this processor; undefined: don't
   * @throws Error with its standard error output when it ends first or takes longer than 10 s
   */
  static async start(rival: Rival, file: string, socket: string, cpu?: number): Promise<RunningRival> {
    rmSync(socket, { force: true })
    const command = rival.command(file, socket)
    const argv = cpu === undefined ? command : ['taskset', '-c', String(cpu), ...command]
    const from = performance.now()
    const child = spawn(argv[0] ?? '', argv.slice(1), { stdio: ['ignore', 'ignore', 'pipe'] })
    let output = ''
    let ended = false
    child.stderr?.on('data', (chunk: Buffer) => {
      if (output.length < 4000) output += chunk.toString()
    })
    const exited = new Promise<void>((resolve) => {
      const end = (error?: unknown): void => {
        ended = true
        if (error instanceof Error) output += error.message
        resolve()
      }
      child.once('error', end)
      child.once('exit', () => end())
    })
    for (;;) {
      if (ended) throw new Error(`${rival.name} ended at once: ${output.trim()}\n(${argv.join(' ')})`)
      if (existsSync(socket)) {
        const fd = native.connectUnix(socket)
        if (fd >= 0) {
          const ready = performance.now() - from
          native.close(fd)
          return new RunningRival(child, exited, socket, ready)
        }
      }
      if (performance.now() - from > 10_000) {
        child.kill('SIGKILL')
        throw new Error(`${rival.name} opened no socket within 10 s: ${output.trim()}`)
      }
      await delay(1)
    }
  }

  get residentBytes(): number {
    return residentBytes(this.pid)
  }

  /** SIGTERM, and SIGKILL after 5 s. */
  async stop(): Promise<void> {
    this.#child.kill('SIGTERM')
    const timer = setTimeout(() => this.#child.kill('SIGKILL'), 5000)
    await this.#exited
    clearTimeout(timer)
    rmSync(this.socket, { force: true })
  }
}

/** Whether a command can be run. */
export async function commandExists(command: string): Promise<boolean> {
  try {
    await run(command, ['--version'])
    return true
  } catch (error) {
    return (error as NodeJS.ErrnoException).code !== 'ENOENT'
  }
}

/** fio on the file itself: IOPS and CPU microseconds per request of its job. */
export async function runFio(
  file: string,
  cpu: number,
  seconds: number
): Promise<{ iops: number; cpuPerRequest: number }> {
  // biome-ignore format: one option per word
  const { stdout } = await run('taskset', [
    '-c', String(cpu), 'fio', '--name=file', `--filename=${file}`, '--ioengine=io_uring', '--direct=0', '--rw=randread',
    '--bs=4k', '--iodepth=32', '--time_based', `--runtime=${Math.round(seconds * 1000)}ms`, '--ramp_time=500ms', '--invalidate=0', '--norandommap',
    '--output-format=json'
  ], { maxBuffer: 2 ** 24 })
  const result = JSON.parse(stdout.slice(stdout.indexOf('{'))) as {
    jobs: { usr_cpu: number; sys_cpu: number; read: { iops: number } }[]
  }
  const job = result.jobs[0]
  if (job === undefined) throw new Error('fio reported no job')
  return { iops: job.read.iops, cpuPerRequest: ((job.usr_cpu + job.sys_cpu) / 100 / job.read.iops) * 1e6 }
}

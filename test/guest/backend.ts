/**
 * The back-end processes that the guest tests run against: virtiod, and qemu-storage-daemon as the reference that
 * shows whether a test or virtiod is at fault. Owns command lines, waiting for the socket and stopping; knows nothing
 * of guests.
 *
 * VIRTIOD_TEST_BACKEND=qsd runs a test file against qemu-storage-daemon (the default is virtiod).
 */
import type { ChildProcess } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { findCommand, root } from '../setup/prerequisites.ts'
import { spawnTied } from './guest.ts'

export type BackendKind = 'virtiod' | 'qsd'

export interface BackendOptions {
  readonly kind: BackendKind
  /** A raw image or block device. */
  readonly image: string
  readonly socket: string
  readonly numQueues?: number
  readonly readOnly?: boolean
  /** Default: on. */
  readonly discard?: boolean
  readonly serial?: string
  readonly cache?: 'none' | 'writethrough' | 'writeback' | 'unsafe'
  /** Whether the image is locked against a second writer (default: yes). */
  readonly lock?: boolean
  /** More words for the command line of this kind of back-end. */
  readonly extraArgs?: readonly string[]
}

export interface Backend extends AsyncDisposable {
  readonly kind: BackendKind
  readonly pid: number
  readonly socket: string
  /** What it has printed so far, standard output and error. */
  readonly log: string
  /** Resolves when the process has ended. */
  readonly exited: Promise<BackendExit>
  /** Sends a signal and waits for the end; SIGKILL follows after ten seconds. */
  stop(signal?: NodeJS.Signals): Promise<BackendExit>
}

export interface BackendExit {
  readonly code: number | null
  readonly signal: NodeJS.Signals | null
  /** From the signal that `stop` sent (or the start) to the end. */
  readonly milliseconds: number
}

/** What a test may expect of this kind of back-end; where qemu-storage-daemon differs, the reason stands here. */
export interface BackendTraits {
  /**
   * The serial that the guest sees. qemu-storage-daemon's vhost-user export has no option for it and says always the
   * same.
   */
  serial(wanted: string): string
  /** What the guest takes the write cache for. qemu-storage-daemon says "wce 0" at the start though it has a cache. */
  readonly cacheType: 'write back' | 'write through'
  /**
   * What ends it while a guest is writing. qemu-storage-daemon 7.2 sleeps on after SIGTERM while (and after) a
   * front-end is connected.
   */
  readonly stopSignal: 'SIGTERM' | 'SIGKILL'
}

export const traits: Readonly<Record<BackendKind, BackendTraits>> = {
  virtiod: { serial: (wanted) => wanted, cacheType: 'write back', stopSignal: 'SIGTERM' },
  qsd: { serial: () => 'vhost_user_blk', cacheType: 'write through', stopSignal: 'SIGKILL' },
}

/** The kinds that this test run covers: VIRTIOD_TEST_BACKEND, a comma-separated list. */
export function backendKinds(): BackendKind[] {
  const kinds = (process.env['VIRTIOD_TEST_BACKEND'] ?? 'virtiod').split(',')
  return kinds.map((kind) => {
    if (kind !== 'virtiod' && kind !== 'qsd')
      throw new Error(`VIRTIOD_TEST_BACKEND: ${kind} is neither virtiod nor qsd`)
    return kind
  })
}

/** The words that attach the disk to a QEMU. */
export function diskArgs(socket: string, numQueues = 1, options = ''): string[] {
  return [
    '-chardev',
    `socket,id=disk,path=${socket}`,
    '-device',
    `vhost-user-blk-pci,id=blk0,chardev=disk,num-queues=${numQueues}${options}`,
  ]
}

/** Starts a back-end and returns when it listens on its socket. */
export async function startBackend(options: BackendOptions): Promise<Backend> {
  const [command, args] = options.kind === 'virtiod' ? virtiodCommand(options) : qsdCommand(options)
  const child = spawnTied(command, args, { cwd: root, stdio: ['ignore', 'pipe', 'pipe'] })
  let log = ''
  for (const stream of [child.stdout, child.stderr]) {
    stream?.setEncoding('utf8').on('data', (text: string) => {
      log += text
    })
  }
  let since = performance.now()
  const exited = new Promise<BackendExit>((resolve, reject) => {
    child.once('error', reject)
    child.once('exit', (code, signal) => resolve({ code, signal, milliseconds: performance.now() - since }))
  })
  exited.catch(() => undefined)
  const hasEnded = (): boolean => child.exitCode !== null || child.signalCode !== null
  const stop = async (signal: NodeJS.Signals = 'SIGTERM'): Promise<BackendExit> => {
    if (!hasEnded()) {
      since = performance.now()
      child.kill(signal)
    }
    const timer = setTimeout(() => child.kill('SIGKILL'), 10_000)
    try {
      return await exited
    } finally {
      clearTimeout(timer)
    }
  }
  const deadline = performance.now() + 10_000
  while (!isListening(options.socket, child)) {
    if (hasEnded())
      throw new Error(`${options.kind} ended with ${child.exitCode ?? child.signalCode} before it listened:\n${log}`)
    if (performance.now() > deadline) {
      await stop('SIGKILL')
      throw new Error(`${options.kind} did not listen on ${options.socket} within 10 s:\n${log}`)
    }
    await sleep(10)
  }
  return {
    kind: options.kind,
    pid: child.pid ?? -1,
    socket: options.socket,
    get log() {
      return log
    },
    exited,
    stop,
    async [Symbol.asyncDispose]() {
      await stop('SIGKILL')
    },
  }
}

function virtiodCommand(options: BackendOptions): [string, string[]] {
  const args = [
    join(root, 'src', 'cli', 'main.ts'),
    'blk',
    '--socket-path',
    options.socket,
    '--blk-file',
    options.image,
    '--num-queues',
    String(options.numQueues ?? 1),
  ]
  if (options.readOnly === true) args.push('--read-only')
  if (options.discard !== undefined) args.push('--discard', options.discard ? 'on' : 'off')
  if (options.serial !== undefined) args.push('--serial', options.serial)
  if (options.cache !== undefined) args.push('--cache', options.cache)
  if (options.lock === false) args.push('--lock', 'off')
  return [process.execPath, [...args, ...(options.extraArgs ?? [])]]
}

function qsdCommand(options: BackendOptions): [string, string[]] {
  const command = findCommand('qemu-storage-daemon')
  if (command === undefined)
    throw new Error('qemu-storage-daemon is missing; on Debian run: apt-get install qemu-system-common')
  const onOff = (on: boolean): string => (on ? 'on' : 'off')
  const file = [
    'file',
    'node-name=f',
    `filename=${options.image}`,
    'aio=io_uring',
    `discard=${options.discard === false ? 'ignore' : 'unmap'}`,
    `read-only=${onOff(options.readOnly === true)}`,
  ]
  if (options.lock === false) file.push('locking=off')
  if (options.cache !== undefined) {
    file.push(`cache.direct=${onOff(options.cache === 'none')}`, `cache.no-flush=${onOff(options.cache === 'unsafe')}`)
  }
  const exported = [
    'type=vhost-user-blk',
    'id=e',
    'node-name=f',
    'addr.type=unix',
    `addr.path=${options.socket}`,
    `writable=${onOff(options.readOnly !== true)}`,
    'iothread=t0',
    `num-queues=${options.numQueues ?? 1}`,
  ]
  return [
    command,
    [
      '--object',
      'iothread,id=t0',
      '--blockdev',
      file.join(','),
      '--export',
      exported.join(','),
      ...(options.extraArgs ?? []),
    ],
  ]
}

/**
 * Whether this child's socket accepts connections. The kernel's list is asked rather than the socket: a test connection
 * would be a session, and the file alone may be one that a dead process left.
 */
function isListening(path: string, child: ChildProcess): boolean {
  if (child.exitCode !== null || child.signalCode !== null) return false
  const SO_ACCEPTCON = 0x10000
  return readFileSync('/proc/net/unix', 'utf8')
    .split('\n')
    .some((line) => {
      const fields = line.trim().split(/\s+/)
      return fields[7] === path && (Number.parseInt(fields[3] ?? '0', 16) & SO_ACCEPTCON) !== 0
    })
}

/** virtiod for the conformance tests: in a process of its own, whole or with a set of faults, until the test ends. */
import { type ChildProcess, spawn } from 'node:child_process'
import { closeSync, mkdtempSync, openSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { onTestFinished } from 'vitest'
import { makeImage } from './support.ts'

const root = fileURLToPath(new URL('../..', import.meta.url))

export interface ServedDevice {
  readonly socket: string
  /** A network card's second socket, on the same switch. */
  readonly peer: string
  readonly child: ChildProcess
  /** What it wrote. */
  output(): string
}

/** @param mutants a set of conformance-mutants.ts */
export async function serveVirtiod(device: 'blk' | 'net', mutants?: string): Promise<ServedDevice> {
  const directory = mkdtempSync(join(tmpdir(), 'virtiod-conformance-'))
  const [socket, peer] = [join(directory, 'a.sock'), join(directory, 'b.sock')]
  const disk = join(directory, 'disk.img')
  if (device === 'blk') makeImage(disk)
  // biome-ignore format: option and value on one line
  const options = device === 'blk'
    ? ['--socket-path', socket, '--blk-file', disk, '--num-queues', '4']
    : ['--socket-path', socket, '--socket-path', peer, '--switch', 's', '--queue-pairs', '2', '--mtu', '1500']
  const preload = mutants === undefined ? [] : ['--import', join(root, 'test/frontend/conformance-preload.ts')]
  const log = openSync(join(directory, 'log'), 'w')
  const child = spawn(process.execPath, [...preload, join(root, 'src/cli/main.ts'), device, ...options], {
    cwd: directory,
    stdio: ['ignore', log, log],
    env: { ...process.env, ...(mutants !== undefined && { MUTANTS: mutants }) },
  })
  closeSync(log)
  const ended = new Promise((resolve) => child.once('exit', resolve))
  onTestFinished(async () => {
    child.kill('SIGTERM')
    const timer = setTimeout(() => child.kill('SIGKILL'), 5000)
    await ended
    clearTimeout(timer)
    rmSync(directory, { recursive: true, force: true })
  })
  const output = (): string => readFileSync(join(directory, 'log'), 'utf8')
  for (const deadline = performance.now() + 30_000; !output().includes('"msg":"ready"'); ) {
    if (performance.now() > deadline || child.exitCode !== null) throw new Error(`virtiod does not start:\n${output()}`)
    await new Promise((resolve) => setTimeout(resolve, 10))
  }
  return { socket, peer, child, output }
}

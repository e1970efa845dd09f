/**
 * Network back-ends between whose two sockets a frame travels unchanged, so that the same tests can run over each: testpmd
 * forwarding between two vhost ports, and virtiod's switch. It owns their processes until the test ends.
 */
import { spawn } from 'node:child_process'
import { closeSync, existsSync, mkdtempSync, openSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { onTestFinished } from 'vitest'
import { type BackendTestpmdOptions, Testpmd, whyNoTestpmd } from '../dpdk.ts'
import { root } from '../setup/prerequisites.ts'

export interface WireOptions {
  /** Queue pairs; default 1. */
  readonly pairs?: number
  /** Segmentation offload is wanted. */
  readonly tso?: boolean
}

/** A kind of back-end with two sockets. */
export interface Wire {
  readonly name: string
  /** It leaves num_buffers as it was without MRG_RXBUF. */
  readonly laxNumBuffers: boolean
  /** It puts another pseudo-header sum into frames to be segmented (bytes 50 and 51 of TCP over IPv4). */
  readonly rewritesGsoChecksum: boolean
  /** It has to learn MAC addresses before it stops flooding. */
  readonly learns: boolean
  /** Runs it, at least until the test ends. */
  start(options?: WireOptions): Promise<readonly [string, string]>
}

export const dpdkMissing = whyNoTestpmd()

/** It takes two seconds to start and stop, and a processor while it runs: one at a time, for as many tests as want the same. */
let shared: { child: Testpmd; key: string } | undefined

/** A back-end that tests after this one may go on using. */
export async function sharedTestpmd(options: BackendTestpmdOptions): Promise<Testpmd> {
  const key = JSON.stringify(options)
  if (shared?.key === key && shared.child.alive) return shared.child
  await endSharedTestpmd()
  shared = { child: await Testpmd.backend(options), key }
  return shared.child
}

/** For `afterAll`, and for tests that want one of their own. */
export async function endSharedTestpmd(): Promise<void> {
  await shared?.child[Symbol.asyncDispose]()
  shared = undefined
}

const testpmd: Wire = {
  name: 'testpmd',
  laxNumBuffers: true,
  // DPDK wants the length left out of the sum, as hardware does.
  rewritesGsoChecksum: true,
  learns: false,
  async start({ pairs = 1, tso = false } = {}) {
    const size = tso ? { buffers: 32_768, memory: 512 } : {}
    const child = await sharedTestpmd({ mode: 'io', ports: 2, queues: pairs, tso, ...size })
    return child.sockets as readonly [string, string]
  },
}

const virtiod: Wire = {
  name: 'virtiod',
  laxNumBuffers: false,
  rewritesGsoChecksum: false,
  learns: true,
  async start({ pairs = 1 } = {}) {
    await endSharedTestpmd()
    const directory = mkdtempSync(join(tmpdir(), 'virtiod-net-'))
    const sockets = ['a', 'b'].map((name) => join(directory, `${name}.sock`)) as [string, string]
    const log = openSync(join(directory, 'log'), 'w')
    const flags = sockets.flatMap((socket) => ['--socket-path', socket])
    const args = [join(root, 'src/cli/main.ts'), 'net', ...flags, '--switch', 's', '--queue-pairs', String(pairs)]
    const child = spawn(process.execPath, args, { cwd: directory, stdio: ['ignore', log, log] })
    closeSync(log)
    const ended = new Promise((resolve) => child.once('exit', resolve))
    onTestFinished(async () => {
      child.kill('SIGTERM')
      const timer = setTimeout(() => child.kill('SIGKILL'), 5000)
      await ended
      clearTimeout(timer)
      rmSync(directory, { recursive: true, force: true })
    })
    const text = (): string => readFileSync(join(directory, 'log'), 'utf8')
    for (const deadline = performance.now() + 20_000; !text().includes('"msg":"ready"'); ) {
      if (performance.now() > deadline || child.exitCode !== null) throw new Error(`virtiod does not start:\n${text()}`)
      await new Promise((resolve) => setTimeout(resolve, 10))
    }
    return sockets
  },
}

/** Those that can run here. */
export const wires: readonly Wire[] = [
  ...(dpdkMissing === undefined ? [testpmd] : []),
  ...(existsSync(join(root, 'devices/net/index.ts')) ? [virtiod] : []),
]

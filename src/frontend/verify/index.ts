/**
 * `virtiod verify`: a table of cases against any vhost-user-blk socket. It owns the order, the disk area that the cases may
 * write (saved before, restored after) and the result. It must not know the command line.
 */
import { setImmediate } from 'node:timers/promises'
import { VHOST_USER_PROTOCOL_F_CONFIG } from '../../vhost-user/wire.ts'
import { decodeBlkConfig, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX } from '../../virtio/blk.ts'
import { BlkDriver } from '../blk.ts'
import { FrontendError } from '../errors.ts'
import { describePeer } from '../peer.ts'
import { Session } from '../session.ts'
import type { DiskFacts, RingFormat, VerifyCase } from './case.ts'
import { Skip, VerifyContext } from './case.ts'
import { controlCases } from './control.ts'
import { dataCases } from './data.ts'
import { knownFault } from './faults.ts'
import { framingCases } from './framing.ts'
import { hostileCases } from './hostile.ts'
import { negotiationCases } from './negotiation.ts'
import { requestCases } from './requests.ts'
import { ringCases } from './rings.ts'

/** Every case that doesn't break a ring, in the order in which they run. */
export const CASES: readonly VerifyCase[] = [
  ...negotiationCases,
  ...dataCases,
  ...framingCases,
  ...requestCases,
  ...ringCases,
  ...controlCases,
]

/** The cases that break a ring on purpose: `hostile`. */
export const HOSTILE_CASES: readonly VerifyCase[] = hostileCases

/** Bytes at the end of the disk that cases may write. */
const AREA_BYTES = 32 * 2 ** 20

export interface VerifyOptions {
  /** Only what doesn't write to the disk or its config space. */
  readonly readOnly?: boolean
  /** Also break rings. */
  readonly hostile?: boolean
  /** Use packed rings, IN_ORDER: the back-end has to offer it. Cases about what only split rings have are skipped. */
  readonly packed?: boolean
  readonly inOrder?: boolean
  /** Run only cases whose name contains one of these. */
  readonly filter?: readonly string[]
  /** Milliseconds that one request may take; default 5000. */
  readonly timeoutMs?: number
  /** Of all random numbers; default 1. */
  readonly seed?: number
  /** Called after each case, with the line to print. */
  readonly progress?: (line: string, result: CaseResult) => void
  /** Stops before the next case; the disk is restored. */
  readonly signal?: AbortSignal
  /** For tests: other cases than the table's. */
  readonly cases?: readonly VerifyCase[]
}

export type Outcome = 'PASS' | 'FAIL' | 'SKIP'

export interface CaseResult {
  readonly name: string
  readonly title: string
  readonly spec: string
  readonly outcome: Outcome
  /** Why it failed or was skipped; a remark on a pass. */
  readonly detail?: string
  /** Set when the failure is a known fault of this program. */
  readonly knownFault?: string
  readonly ms: number
}

export interface VerifyResult {
  readonly socket: string
  readonly backend: string
  readonly pid?: number
  readonly cases: readonly CaseResult[]
  readonly passed: number
  readonly skipped: number
  /** Failures that are not known faults: what an exit status should go by. */
  readonly failed: number
  readonly knownFaults: number
  /** The disk has its old contents again. False: saving or restoring failed, see `restoreError`. */
  readonly restored: boolean
  readonly restoreError?: string
  readonly aborted: boolean
}

/**
 * Runs the cases against a socket.
 * @throws FrontendError when not even a session can be opened, or when it is no vhost-user-blk back-end
 */
export async function verify(socketPath: string, options: VerifyOptions = {}): Promise<VerifyResult> {
  const timeoutMs = options.timeoutMs ?? 5000
  const format = { packed: options.packed === true, inOrder: options.inOrder === true }
  const { facts: found, pid } = discover(socketPath, timeoutMs, format)
  const facts = { ...found, readOnly: found.readOnly || options.readOnly === true }
  const program = (pid !== undefined && describePeer(pid)?.program) || 'unknown'
  const context = new VerifyContext(socketPath, facts, timeoutMs, options.seed ?? 1, format)
  let writable = !facts.readOnly
  const chosen = (options.cases ?? [...CASES, ...(options.hostile === true ? hostileCases : [])]).filter(
    (one) =>
      options.filter === undefined ||
      options.filter.length === 0 ||
      options.filter.some((word) => one.name.includes(word))
  )
  const results: CaseResult[] = []
  let saved: Uint8Array | undefined
  let restoreError: string | undefined
  let gone = false
  if (writable && chosen.some((one) => !one.name.startsWith('hostile/'))) {
    const saving = runCase(context, SAVE_CASE, true, program, () => {
      saved = readArea(context)
    })
    // Without a copy nothing may be written.
    if (saving.outcome === 'FAIL') {
      writable = false
      results.push(saving)
      options.progress?.(formatCase(saving), saving)
    }
  }
  try {
    for (const one of chosen) {
      if (options.signal?.aborted === true) break
      if (saved !== undefined && one.name.startsWith('hostile/')) {
        // These may end the back-end, and write nothing: the disk gets its contents back before.
        restoreError = restore(context, saved)
        saved = undefined
      }
      const result = gone ? unreachable(one, program) : runCase(context, one, writable, program)
      results.push(result)
      options.progress?.(formatCase(result), result)
      if (result.outcome === 'FAIL') gone = !listening(socketPath)
      // Lets signals and output through: everything else here blocks.
      await setImmediate()
    }
  } finally {
    if (saved !== undefined) restoreError = restore(context, saved)
  }
  const count = (outcome: Outcome): number => results.filter((one) => one.outcome === outcome).length
  const known = results.filter((one) => one.knownFault !== undefined).length
  return {
    socket: socketPath,
    backend: program,
    ...(pid !== undefined && { pid }),
    cases: results,
    passed: count('PASS'),
    skipped: count('SKIP'),
    failed: count('FAIL') - known,
    knownFaults: known,
    restored: restoreError === undefined,
    ...(restoreError !== undefined && { restoreError }),
    aborted: results.filter((one) => one.name !== SAVE_CASE.name).length < chosen.length,
  }
}

/** One line: outcome, name, detail. */
export function formatCase(result: CaseResult): string {
  if (result.knownFault !== undefined)
    return `FAIL  ${result.name}  (known fault of ${result.knownFault})  ${result.detail ?? ''}`
  const detail =
    result.outcome === 'FAIL'
      ? `  ${result.title}: ${result.detail} [${result.spec}]`
      : result.detail
        ? `  (${result.detail})`
        : ''
  return `${result.outcome}  ${result.name}${detail}`
}

/** The closing lines. */
export function formatSummary(result: VerifyResult): string {
  const lines: string[] = []
  const known = result.cases.filter((one) => one.knownFault !== undefined)
  const byFault = Map.groupBy(known, (one) => one.knownFault)
  for (const [fault, cases] of byFault)
    lines.push(`known fault of ${fault}: ${cases.map((one) => one.name).join(', ')}`)
  if (result.restoreError !== undefined) lines.push(`THE DISK WAS NOT RESTORED: ${result.restoreError}`)
  lines.push(
    `${result.passed} passed, ${result.failed} failed, ${result.knownFaults} known faults, ${result.skipped} skipped` +
      `${result.aborted ? ' (stopped early)' : ''}  (${result.backend}${result.pid === undefined ? '' : `, pid ${result.pid}`})`
  )
  return lines.join('\n')
}

/** @param run what to run instead of the case's own */
function runCase(
  context: VerifyContext,
  one: VerifyCase,
  writable: boolean,
  program: string,
  run: VerifyCase['run'] = one.run
): CaseResult {
  const from = performance.now()
  const base = { name: one.name, title: one.title, spec: one.spec }
  const ms = (): number => Math.round(performance.now() - from)
  if (one.writes === true && !writable)
    return { ...base, outcome: 'SKIP', detail: 'it writes, and the disk is read-only or to be left alone', ms: 0 }
  let abrupt = false
  try {
    const remark = run(context)
    return {
      ...base,
      outcome: 'PASS',
      ...(typeof remark === 'string' && remark !== '' && { detail: remark }),
      ms: ms(),
    }
  } catch (error) {
    const detail = (error as Error).message
    if (error instanceof Skip) return { ...base, outcome: 'SKIP', detail, ms: ms() }
    abrupt = true
    const known = knownFault(program, one.name)
    return { ...base, outcome: 'FAIL', detail, ...(known !== undefined && { knownFault: known }), ms: ms() }
  } finally {
    context.cleanup(abrupt)
  }
}

function unreachable(one: VerifyCase, program: string): CaseResult {
  const known = knownFault(program, one.name)
  const detail = 'not run: nobody listens on the socket any more'
  return {
    name: one.name,
    title: one.title,
    spec: one.spec,
    outcome: 'FAIL',
    detail,
    ms: 0,
    ...(known !== undefined && { knownFault: known }),
  }
}

/** Whether a connection can still be made. A back-end that restarts gets two seconds. */
function listening(socketPath: string): boolean {
  const deadline = performance.now() + 2000
  for (;;) {
    try {
      Session.open(socketPath, { queues: 0, timeoutMs: 2000 }).close(true)
      return true
    } catch (error) {
      if (!(error instanceof FrontendError) || performance.now() > deadline) return false
    }
  }
}

/** The facts from a first session. */
function discover(
  socketPath: string,
  timeoutMs: number,
  format: RingFormat
): { facts: DiskFacts; pid: number | undefined } {
  using session = Session.open(socketPath, { queues: 0, timeoutMs, ...format })
  if (!session.hasProtocol(VHOST_USER_PROTOCOL_F_CONFIG)) {
    throw new FrontendError(
      'verify',
      'unsupported',
      'the back-end does not offer VHOST_USER_PROTOCOL_F_CONFIG, so it is no vhost-user-blk back-end'
    )
  }
  const bytes = session.connection.getConfig(0, 60) ?? session.connection.getConfig(0, 57)
  if (bytes === undefined || bytes.length < 36)
    throw new FrontendError('GET_CONFIG', 'reply', 'the back-end shows no config space of virtio-blk')
  const config = decodeBlkConfig(bytes, session.offeredFeatures)
  const blockSize = session.has(VIRTIO_BLK_F_BLK_SIZE) && config.blkSize ? config.blkSize : 512
  const capacity = Number(config.capacity)
  const unit = Math.max(blockSize, 65536)
  const areaBytes = Math.floor(Math.min(AREA_BYTES, capacity * 512) / unit) * unit
  if (areaBytes === 0)
    throw new FrontendError(
      'verify',
      'unsupported',
      `the disk of ${capacity * 512} bytes is smaller than ${unit} bytes`
    )
  const start = Math.floor((capacity * 512 - areaBytes) / blockSize) * blockSize
  return {
    facts: {
      features: session.offeredFeatures,
      protocolFeatures: session.offeredProtocolFeatures,
      maxQueues: session.maxQueues,
      memorySlots: session.memorySlots,
      config,
      capacity,
      blockSize,
      segMax: session.has(VIRTIO_BLK_F_SEG_MAX) ? (config.segMax ?? 1) : 1,
      readOnly: session.has(VIRTIO_BLK_F_RO),
      area: { sector: start / 512, bytes: areaBytes },
    },
    pid: session.connection.peerPid,
  }
}

const CHUNK = 65536

const SAVE_CASE: VerifyCase = {
  name: 'data/save',
  title: 'the end of the disk can be read, so that it can be restored (otherwise nothing is written)',
  spec: 'virtio 1.3 §5.2.6',
  run: () => undefined,
}

function readArea(context: VerifyContext): Uint8Array {
  const { bytes } = context.facts.area
  const saved = new Uint8Array(bytes)
  transfer(context, bytes, (blk, at) => saved.set(blk.read(context.sector(at), CHUNK), at))
  return saved
}

/** Writes the area back. Returns what went wrong, if anything. */
function restore(context: VerifyContext, saved: Uint8Array): string | undefined {
  context.cleanup(true)
  try {
    transfer(context, saved.length, (blk, at) => {
      // Untouched blocks stay as they are, so that a sparse file stays sparse.
      if (Buffer.compare(blk.read(context.sector(at), CHUNK), saved.subarray(at, at + CHUNK)) !== 0) {
        blk.write(context.sector(at), saved.subarray(at, at + CHUNK))
      }
    })
    return undefined
  } catch (error) {
    return (error as Error).message
  }
}

function transfer(context: VerifyContext, bytes: number, each: (blk: BlkDriver, at: number) => void): void {
  using session = Session.open(context.socketPath, { timeoutMs: context.timeoutMs, ...context.format })
  const blk = new BlkDriver(session.queue(0), session.memory)
  blk.timeoutMs = context.timeoutMs
  for (let at = 0; at < bytes; at += CHUNK) each(blk, at)
  if (context.has(9)) blk.flush()
}

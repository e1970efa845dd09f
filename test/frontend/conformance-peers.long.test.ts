/**
 * The conformance suite against others' back-ends. What each of them is known to do otherwise stands here, case by
 * case: a case that passes where it failed, or fails where it passed, is news about that back-end or a fault of the
 * suite.
 */
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, onTestFinished, test } from 'vitest'
import {
  type ConformanceResult,
  conformance,
  formatResult,
  type Outcome,
} from '../../src/frontend/conformance/index.ts'
import { qemuRival, RunningRival } from '../../src/frontend/rivals.ts'
import { dpdkMissing, endSharedTestpmd, sharedTestpmd } from './net-peers.ts'
import { hasQemu, makeImage } from './support.ts'

type Known = Readonly<Record<string, Outcome | readonly Outcome[]>>

/** It writes behind its rings: what it hits there decides whether it lives. */
const CORRUPTS: readonly Outcome[] = ['fail', 'error']

/** qemu-storage-daemon 7.2, whose protocol is libvhost-user's. */
const KNOWN_QSD: Known = {
  // Requests are done without a look at what they say, and acknowledged whatever came of them.
  'features-unknown-refused': 'warn',
  'protocol-features-unknown-refused': 'warn',
  'msg-need-reply-unnegotiated': 'warn',
  'msg-unknown-request': 'fail',
  'msg-version-0': 'warn',
  'msg-version-2': 'warn',
  'msg-reply-flag': 'warn',
  'msg-short-payload': 'warn',
  'msg-no-payload': 'warn',
  'config-write-beyond': 'warn',
  'mem-remove-unknown': 'fail',
  'mem-add-overlap': 'warn',
  'mem-overlap-guest': 'warn',
  'mem-overlap-user': 'warn',
  'mem-zero-size': 'warn',
  'mem-address-overflow': 'warn',
  'mem-user-overflow': 'warn',
  'mem-offset-overflow': 'warn',
  'mem-beyond-file': 'warn',
  'mem-count-lies': 'warn',
  'mem-fd-wrong-kind': 'fail',
  'mem-fd-missing': 'fail',
  'mem-fd-too-many': 'warn',
  'vring-num-0': 'warn',
  'vring-num-odd': 'warn',
  'vring-num-65536': 'warn',
  'vring-num-huge': 'warn',
  'vring-kick-fd-missing': 'warn',
  'vring-address-short': 'warn',
  'vring-num-running': 'warn',
  // Queue indices are not checked: it writes to rings that it doesn't have.
  'vring-index-num': CORRUPTS,
  'vring-index-base': CORRUPTS,
  'vring-index-addr': CORRUPTS,
  'vring-index-65535': CORRUPTS,
  'vring-index-enable': 'fail',
  'vring-index-kick': 'fail',
  'vring-index-call': 'fail',
  'vring-index-err': 'fail',
  // The offset of GET_CONFIG is ignored, and a write to a read-only field acknowledged.
  'config-offset': 'fail',
  'config-beyond': 'fail',
  'config-read-only-field': 'fail',
  // A ring starts at its first kick, and none can be polled for.
  'vring-kick-starts': 'warn',
  'vring-no-kick-fd': 'warn',
  // It writes to fd -1 where there is no call eventfd, and ends the session.
  'vring-no-call-fd': 'fail',
  'vring-call-never-sent': 'warn',
  // GET_VRING_BASE is answered while requests are under way.
  'vring-stop-drains-writes': 'fail',
  'split-indirect-after-direct': 'fail',
  // size_max is 0.
  'blk-config-sane': 'warn',
  'blk-get-id': 'fail',
  // Bit 31 of a request's type is ignored.
  'blk-unknown-type': 'fail',
  // A failed read claims to have written all of the buffer.
  'blk-error-used-length': 'fail',
  // Malformed requests are never returned.
  'blk-no-status': 'warn',
  'blk-short-header': 'warn',
  'blk-no-header': 'warn',
  'log-precise': 'warn',
  // It logs behind the end of the log.
  'log-too-small': 'error',
  'fd-leak-unasked': 'warn',
  'fd-many': 'warn',
  // A malformed ring ends the whole session (vu_panic), or is followed wherever it leads.
  ...Object.fromEntries(
    // biome-ignore format: a list
    [
      'loop', 'self-loop', 'head-out-of-range', 'head-65535', 'next-out-of-range', 'avail-jump', 'avail-backwards',
      'address-outside', 'address-straddles-end', 'address-overflow', 'address-wraps-into-memory', 'length-4g',
      'header-outside', 'status-outside', 'readable-after-writable', 'indirect-in-indirect', 'indirect-odd-length',
      'indirect-empty', 'indirect-loop', 'indirect-next-out-of-range', 'indirect-outside', 'indirect-huge',
      'err-signalled'
    ].map((name) => [`ring-${name}`, 'warn' as const])
  ),
  // It dies of SIGSEGV and of SIGBUS.
  'mem-ring-region-removed': 'error',
  'mem-truncated': 'error',
}

/** It takes its time: what tells most. */
const TESTPMD_CASES = {
  groups: ['features', 'net'],
  ids: [
    'msg-coalesced',
    'mem-table',
    'packed-requests',
    'packed-wrap',
    'packed-stop-value',
    'packed-indirect-reserved',
  ],
} as const

/** dpdk-testpmd 22.11, a vhost port that gives back what it gets; of the cases that are run here. */
const KNOWN_TESTPMD: Known = {
  // HOST_ECN without HOST_TSO4 or HOST_TSO6.
  'features-dependencies': 'fail',
  // Bits 16–31 of the base are 0.
  'packed-stop-value': 'fail',
  // The WRITE flag of an indirect descriptor is copied into the used one, which then claims to have been written to.
  'packed-indirect-reserved': 'fail',
  // Packets on a disabled ring stay there.
  'net-transmit-disabled': 'fail',
  // num_buffers is left as it was without MRG_RXBUF.
  'net-receive-single': 'fail',
}

/** A child that ended is gone, since its parent is here. */
function lives(pid = 0): boolean {
  try {
    return pid > 0 && process.kill(pid, 0)
  } catch {
    return false
  }
}

/** @throws AssertionError naming each case that came out otherwise */
function expectAsKnown(result: ConformanceResult, known: Known): void {
  const surprises = result.results.filter(({ id, outcome }) => {
    const expected = known[id]
    if (expected === undefined) return outcome !== 'pass' && outcome !== 'skip'
    return typeof expected === 'string' ? outcome !== expected : !expected.includes(outcome)
  })
  expect(surprises.map(formatResult)).toEqual([])
  const ran = new Set(result.results.map(({ id }) => id))
  expect(Object.keys(known).filter((id) => !ran.has(id))).toEqual([])
}

describe.skipIf(!hasQemu)('qemu-storage-daemon', () => {
  test('does what it is known to do, and all else right', { timeout: 300_000 }, async () => {
    const directory = mkdtempSync(join(tmpdir(), 'virtiod-conformance-'))
    const [disk, socket] = [join(directory, 'disk.img'), join(directory, 'q.sock')]
    makeImage(disk)
    let running: RunningRival | undefined
    const start = async (): Promise<void> => {
      running = await RunningRival.start(qemuRival(2, true), disk, socket)
    }
    await start()
    let over = false
    onTestFinished(async () => {
      over = true
      await running?.stop()
      rmSync(directory, { recursive: true, force: true })
    })
    // Somebody has to start it again when it died; the suite waits for that.
    const watch = async (): Promise<void> => {
      while (!over) {
        await new Promise((resolve) => setTimeout(resolve, 50))
        if (!over && !lives(running?.pid)) await start()
      }
    }
    const watching = watch()
    const result = await conformance(socket, { destructive: true, timeoutMs: 3000, restartMs: 20_000 })
    over = true
    await watching
    expectAsKnown(result, KNOWN_QSD)
    expect(result).toMatchObject({ backend: 'qemu-storage-daemon', device: 'blk', conforms: false })
    expect(result.counts.pass).toBeGreaterThan(140)
  })
})

describe.skipIf(dpdkMissing !== undefined)('dpdk-testpmd', () => {
  afterAll(endSharedTestpmd)

  test('does what it is known to do, and all else right', { timeout: 240_000 }, async () => {
    const { sockets } = await sharedTestpmd({ mode: 'io', ports: 1 })
    const result = await conformance(sockets[0] as string, { ...TESTPMD_CASES, timeoutMs: 6000 })
    expectAsKnown(result, KNOWN_TESTPMD)
    expect(result).toMatchObject({ backend: 'dpdk-testpmd', device: 'net', conforms: false })
    expect(result.counts.pass).toBeGreaterThan(20)
  })
})

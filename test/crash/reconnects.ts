/**
 * Front-ends that come and go, thousands of them, in every manner: what virtiod holds for a session must go with it.
 * It owns the manners and what is measured; the process is the caller's.
 */
import { readdirSync, readFileSync } from 'node:fs'
import { BlkDriver } from '../../src/frontend/blk.ts'
import { layouts } from '../../src/frontend/memory.ts'
import { Session, type SessionOptions } from '../../src/frontend/session.ts'
import { Random } from '../../src/frontend/verify/case.ts'
import { VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT } from '../../src/virtio/blk.ts'

const MIB = 2 ** 20
const NOTHING = new Uint8Array(0)

export interface Footprint {
  /** Bytes. */
  readonly resident: number
  readonly virtual: number
  readonly fds: number
  readonly mappings: number
  /** Its own: the kernel's io_uring workers (iou-wrk-…) look like threads of it and come and go with the load. */
  readonly threads: number
}

/** What the kernel says that a process holds. */
export function footprint(pid: number): Footprint {
  const status = readFileSync(`/proc/${pid}/status`, 'utf8')
  const value = (name: string): number => Number(new RegExp(`^${name}:\\s+(\\d+)`, 'm').exec(status)?.[1])
  return {
    resident: value('VmRSS') * 1024,
    virtual: value('VmSize') * 1024,
    fds: readdirSync(`/proc/${pid}/fd`).length,
    mappings: readFileSync(`/proc/${pid}/maps`, 'utf8').split('\n').length,
    threads: threadNames(pid).filter((name) => !name.startsWith('iou-wrk-')).length,
  }
}

function threadNames(pid: number): string[] {
  return readdirSync(`/proc/${pid}/task`).map((thread) => {
    try {
      return readFileSync(`/proc/${pid}/task/${thread}/comm`, 'utf8').trim()
    } catch {
      // It ended since it was listed: only a worker of the kernel does.
      return 'iou-wrk-'
    }
  })
}

export function describeFootprint({ resident, virtual, fds, mappings, threads }: Footprint): string {
  const mib = (bytes: number): string => `${(bytes / MIB).toFixed(1)} MiB`
  return `RSS ${mib(resident)}, address space ${mib(virtual)}, ${fds} fds, ${mappings} mappings, ${threads} threads`
}

/** When the last session has been cleared away: the fds don't get fewer any more. */
export async function settledFootprint(pid: number): Promise<Footprint> {
  let before = footprint(pid)
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, 200))
    const now = footprint(pid)
    if (now.fds >= before.fds) return now
    before = now
  }
}

/** What front-ends negotiate. */
export const sessionVariants: readonly SessionOptions[] = [
  {},
  { mode: 'irq' },
  { packed: true },
  { packed: true, inOrder: true, inflight: true },
  { inflight: true },
]

/** How a session goes. */
type Manner = (socket: string, options: SessionOptions, random: Random) => void

function writing(session: Session, random: Random): BlkDriver[] {
  return session.queues.map((queue) => {
    const blk = new BlkDriver(queue, session.memory, MIB)
    for (let i = 0; i < 8; i++) {
      const sector = 8 * random.below(256)
      if (random.below(2) === 0) blk.submit(VIRTIO_BLK_T_OUT, sector, new Uint8Array(4096).fill(i), 0, {}, false)
      else blk.submit(VIRTIO_BLK_T_IN, sector, NOTHING, 4096, {}, false)
    }
    blk.submit(VIRTIO_BLK_T_FLUSH, 0, NOTHING, 0, {}, false)
    blk.publish()
    return blk
  })
}

const manners: readonly Manner[] = [
  // As it should be.
  (socket, options, random) => {
    const session = Session.open(socket, options)
    for (const blk of writing(session, random)) blk.wait()
    session.close()
  },
  // With everything in flight, without a word.
  (socket, options, random) => {
    const session = Session.open(socket, options)
    writing(session, random)
    session.close(true)
  },
  // Nothing but negotiation.
  (socket, options) => Session.open(socket, { ...options, queues: 0 }).close(true),
  // A ring that breaks: a buffer that is nowhere.
  (socket, options) => {
    const session = Session.open(socket, options)
    const { driver } = session.queue(0)
    driver.issue(driver.build([{ address: 2 ** 40, length: 512, writable: true }]))
    driver.publish()
    session.connection.barrier()
    session.close(true)
  },
  // A message that ends the session.
  (socket, options) => {
    const session = Session.open(socket, options)
    session.connection.send(new Uint8Array(12).fill(255))
    session.close(true)
  },
]

/**
 * Opens and ends `count` sessions.
 * @param each called after each, with the number of sessions so far
 */
export async function reconnect(
  socket: string,
  count: number,
  seed: number,
  variants: readonly SessionOptions[],
  each: (done: number) => void
): Promise<void> {
  const random = new Random(seed)
  for (let i = 0; i < count; i++) {
    const size = (2 + random.below(8)) * MIB
    const memory = random.below(4) === 0 ? layouts.many(2 * MIB, 1 + random.below(6)) : layouts.single(size + 4 * MIB)
    const variant = variants[random.below(variants.length)] ?? {}
    const manner = manners[random.below(manners.length)] as Manner
    manner(socket, { memory, queues: 1 + random.below(2), timeoutMs: 10_000, ...variant }, random)
    each(i + 1)
    // The child's exit would be noticed only in the event loop.
    if (i % 64 === 63) await new Promise((resolve) => setImmediate(resolve))
  }
}

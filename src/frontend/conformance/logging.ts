/** Cases about dirty page logging. */
import { writeSync } from 'node:fs'
import { native } from '../../native.ts'
import { VHOST_USER_PROTOCOL_F_LOG_SHMFD, VHOST_USER_PROTOCOL_F_REPLY_ACK } from '../../vhost-user/wire.ts'
import { VHOST_F_LOG_ALL, VIRTIO_F_RING_PACKED } from '../../virtio/constants.ts'
import { featureSet } from '../../virtio/features.ts'
import { DirtyLogArea, LOG_PAGE } from '../dirty-log.ts'
import { layouts } from '../memory.ts'
import { type ConformanceCase, expect, expectEqual } from './case.ts'
import type { Context, GuestOptions } from './context.ts'
import type { Guest, Ring } from './guest.ts'

const MIGRATION = 'vhost-user.rst "Migration"'
const needs = { device: 'blk', features: [VHOST_F_LOG_ALL], protocol: [VHOST_USER_PROTOCOL_F_LOG_SHMFD] } as const
/** VHOST_VRING_F_LOG. */
const LOGGED = 1

interface Logged {
  readonly guest: Guest
  readonly ring: Ring
  readonly log: DirtyLogArea
  /** Where a request's data goes: two pages of guest memory that nothing else uses, and its status in a third one. */
  readonly data: number
  readonly status: number
  /** SET_LOG_BASE and LOG_ALL. */
  on(): void
  off(): void
  /** One read into those pages. */
  read(what?: string): void
}

/** A running guest with a log that is not yet switched on. */
function logged(context: Context, use: (logged: Logged) => string, options: GuestOptions = {}, offset = 0): string {
  const { guest, ring } = context.running({ memory: layouts.hole(16 * 2 ** 20), ...options })
  const log = new DirtyLogArea(guest.memory, offset)
  try {
    const pages = guest.memory.allocate(4 * LOG_PAGE, LOG_PAGE)
    const { connection, session } = guest
    const { writable } = context.operation()
    return use({
      guest,
      ring,
      log,
      data: pages.gpa,
      status: pages.gpa + 2 * LOG_PAGE,
      on: () => {
        connection.setLogBase(BigInt(log.size), BigInt(log.offset), log.fd)
        connection.setFeatures(session.features | featureSet(VHOST_F_LOG_ALL))
      },
      off: () => connection.setFeatures(session.features),
      // The last byte of a read is its status; the data begins in the middle of a page and ends in the next one.
      read: (what = 'a read') => {
        const place = (length: number): number =>
          length === 1 ? pages.gpa + 2 * LOG_PAGE + 8 : pages.gpa + LOG_PAGE - Math.floor(length / 2)
        const writableCuts = {
          writable: [writable - 1, 1],
          place: (length: number, w: boolean) => (w ? place(length) : undefined),
        }
        ring.run(1, writableCuts, what)
      },
    })
  } finally {
    context.release(false)
    log.close()
  }
}

function page(gpa: number): number {
  return Math.floor(gpa / LOG_PAGE)
}

/** @throws Violation unless every one of the addresses is marked */
function expectMarked(log: DirtyLogArea, addresses: Readonly<Record<string, number>>): void {
  for (const [name, gpa] of Object.entries(addresses))
    expect(log.has(gpa), `the page of ${name} marked (bit ${page(gpa)})`, 'it is not')
}

function usedRing(ring: Ring): number {
  return ring.queue.ring[2].gpa
}

export const loggingCases: readonly ConformanceCase[] = [
  {
    id: 'log-base-reply',
    group: 'logging',
    level: 'MUST',
    rule: 'answers SET_LOG_BASE with a message of its own when LOG_SHMFD is negotiated',
    cites: 'vhost-user.rst "Communication" (requests that require replies)',
    needs,
    run: (context) =>
      logged(context, ({ guest, on }) => {
        on()
        context.expectQuiet(guest.connection, 'SET_LOG_BASE beside its reply', 20)
        guest.connection.barrier()
        return 'one reply'
      }),
  },
  {
    id: 'log-data',
    group: 'logging',
    level: 'MUST',
    rule: 'marks every page of guest memory that it writes to',
    cites: `${MIGRATION} ("All the modifications to memory pointed by vring "descriptor" should be marked")`,
    needs,
    run: (context) =>
      logged(context, ({ log, on, read, data, status }) => {
        on()
        read()
        expectMarked(log, { 'the data': data, 'the end of the data': data + LOG_PAGE, 'the status': status })
        return 'two pages of data, and the status'
      }),
  },
  {
    id: 'log-used-ring',
    group: 'logging',
    level: 'MUST',
    rule: 'marks the used ring when VHOST_VRING_F_LOG is set for it',
    cites: `${MIGRATION} ("Modifications to "used" vring should be marked if VHOST_VRING_F_LOG …")`,
    needs,
    run: (context) =>
      logged(context, ({ ring, log, on, read }) => {
        on()
        ring.address(LOGGED, BigInt(usedRing(ring)))
        read()
        expectMarked(log, { 'the used ring': usedRing(ring) })
        return `bit ${page(usedRing(ring))}`
      }),
  },
  {
    id: 'log-used-ring-address',
    group: 'logging',
    level: 'SHOULD',
    rule: 'marks the used ring at the "log" address of SET_VRING_ADDR, which may be another one than the ring’s',
    cites: `${MIGRATION} ("log_guest_addr should be used to calculate the log offset")`,
    needs,
    run: (context) =>
      logged(context, ({ ring, log, on, read, data }) => {
        on()
        const elsewhere = data + 3 * LOG_PAGE
        ring.address(LOGGED, BigInt(elsewhere))
        read()
        expectMarked(log, { 'the log address': elsewhere })
        return `bit ${page(elsewhere)}`
      }),
  },
  {
    id: 'log-precise',
    group: 'logging',
    level: 'SHOULD',
    rule: 'marks only what it writes to: not what it reads, and not the used ring without VHOST_VRING_F_LOG',
    cites: MIGRATION,
    needs,
    run: (context) =>
      logged(context, ({ log, on, read, data, status, ring }) => {
        on()
        read()
        const expected = [data, data + LOG_PAGE, status].map(page)
        const seen = log.take()
        const extra = seen.filter((one) => !expected.includes(one))
        expect(extra.length === 0, `pages ${expected.join(', ')}`, `also ${extra.join(', ')}`)
        expect(!seen.includes(page(usedRing(ring))), 'the used ring not marked', 'it is')
        return `pages ${seen.join(', ')}`
      }),
  },
  {
    id: 'log-off',
    group: 'logging',
    level: 'SHOULD',
    rule: 'marks nothing before VHOST_F_LOG_ALL is set, and nothing after it was taken away',
    cites: `${MIGRATION} ("To start/stop logging")`,
    needs,
    run: (context) =>
      logged(context, ({ guest, log, on, off, read }) => {
        guest.connection.setLogBase(BigInt(log.size), 0n, log.fd)
        read('a read before it')
        expectEqual('pages marked before it', log.take().length, 0)
        on()
        read('a read with LOG_ALL')
        expect(log.take().length > 0, 'pages marked with LOG_ALL', 'none')
        off()
        read('a read after it')
        expectEqual('pages marked after it', log.take().length, 0)
        return 'off, on, off'
      }),
  },
  {
    id: 'log-toggle-running',
    group: 'logging',
    level: 'MUST',
    rule: 'takes LOG_ALL and VHOST_VRING_F_LOG on and off while requests are under way, and loses none',
    cites: `${MIGRATION}; "Ring states" (changing some configuration aspects on the fly)`,
    needs,
    run: (context) =>
      logged(context, ({ ring, log, on, off }) => {
        for (let i = 0; i < 10; i++) {
          const pending = ring.batch(40)
          on()
          ring.address(LOGGED, BigInt(usedRing(ring)))
          ring.finishAll(pending)
          const more = ring.batch(40)
          off()
          ring.address()
          ring.finishAll(more)
        }
        log.take()
        return '10 times'
      }),
  },
  {
    id: 'log-after-clearing',
    group: 'logging',
    level: 'MUST',
    rule: 'marks a page again when it writes to it again after the front-end has cleared its bit',
    cites: MIGRATION,
    needs,
    run: (context) =>
      logged(context, ({ log, on, read, data, status }) => {
        on()
        for (let i = 0; i < 20; i++) {
          log.take()
          read()
          expectMarked(log, { 'the data': data, 'the status': status })
        }
        return '20 times'
      }),
  },
  {
    id: 'log-keeps-bits',
    group: 'logging',
    level: 'MUST',
    rule: 'leaves bits that are set alone',
    cites: `${MIGRATION} ("log[page / 8] |= 1 << page % 8")`,
    needs,
    run: (context) =>
      logged(context, ({ log, on, read, data }) => {
        on()
        // In three bytes of the log, the first of them that of the data's own page or beside it.
        const around = [page(data) + 3, page(data) + 11, page(data) + 40]
        for (const one of around) writeSync(log.fd, Uint8Array.of(1 << (one & 7)), 0, 1, one >>> 3)
        read()
        for (const one of around) expect(log.has(one * LOG_PAGE), `bit ${one} still set`, 'it is cleared')
        return 'the bits beside it are as before'
      }),
  },
  {
    id: 'log-offset',
    group: 'logging',
    level: 'MUST',
    rule: 'keeps the log at the offset in the file that SET_LOG_BASE says',
    cites: 'vhost-user.rst "Log description"',
    needs,
    run: (context) =>
      logged(
        context,
        ({ log, on, read, data }) => {
          on()
          read()
          expectMarked(log, { 'the data': data })
          return 'offset 8192'
        },
        {},
        8192
      ),
  },
  {
    id: 'log-stopped',
    group: 'logging',
    level: 'MUST',
    rule: 'has marked everything when GET_VRING_BASE is answered, and marks nothing more',
    cites: `${MIGRATION} ("No further update must be done before rings are restarted")`,
    needs,
    run: (context) =>
      logged(context, ({ ring, log, on, read, data }) => {
        on()
        for (let i = 0; i < 10; i++) {
          log.take()
          read()
          const base = ring.stop()
          expectMarked(log, { 'the data': data })
          log.take()
          ring.expectIdle('the ring is stopped', 10)
          expectEqual('pages marked while it is stopped', log.take().length, 0)
          ring.start(base)
        }
        return '10 times'
      }),
  },
  {
    id: 'log-fd',
    group: 'logging',
    level: 'MAY',
    rule: 'signals the eventfd of SET_LOG_FD when it has marked something',
    cites: 'vhost-user.rst "Migration" ("an optional message … it may be used to inform the front-end")',
    needs,
    run: (context) =>
      logged(context, ({ guest, log, on, read }) => {
        on()
        guest.connection.setLogFd(log.eventFd)
        read()
        return log.takeSignals() > 0 ? 'signalled' : 'not signalled'
      }),
  },
  {
    id: 'log-packed',
    group: 'logging',
    level: 'MUST',
    rule: 'marks what it writes to through a packed ring, and the descriptor ring when VHOST_VRING_F_LOG is set',
    cites: MIGRATION,
    needs: { ...needs, features: [VHOST_F_LOG_ALL, VIRTIO_F_RING_PACKED] },
    run: (context) =>
      logged(
        context,
        ({ ring, log, on, read, data, status }) => {
          on()
          // What to give as the log address of a packed ring no specification says; QEMU gives that of its "used" part.
          ring.address(LOGGED, BigInt(usedRing(ring)))
          read()
          expectMarked(log, { 'the data': data, 'the status': status, 'the descriptor ring': ring.queue.ring[0].gpa })
          return 'data, status, descriptor ring'
        },
        { packed: true }
      ),
  },
  {
    id: 'log-too-small',
    group: 'logging',
    level: 'SHOULD',
    rule: 'does not log beyond a log that is too small for the guest’s memory: it refuses it, or leaves pages out',
    cites: `${MIGRATION} ("The size of the log … should be large enough to cover all known guest addresses")`,
    needs: { ...needs, protocol: [VHOST_USER_PROTOCOL_F_LOG_SHMFD, VHOST_USER_PROTOCOL_F_REPLY_ACK] },
    run: (context) =>
      logged(context, ({ guest, ring }) => {
        const fd = native.memfd('virtiod-log', 4096, 0)
        try {
          const answer = context.answer(guest.connection, () => {
            guest.connection.setLogBase(8n, 0n, fd)
            guest.connection.setFeatures(guest.session.features | featureSet(VHOST_F_LOG_ALL))
          })
          if (answer === 'closed') return 'closed'
          // Region 1 of this guest lies above 4 GiB: 2^20 bits away.
          if (!guest.connection.channel.hungUp()) ring.run(2, { region: 1 }, 'a request with the small log')
          return answer
        } finally {
          native.close(fd)
        }
      }),
  },
]

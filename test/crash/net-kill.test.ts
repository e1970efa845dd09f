/**
 * Two guests on a switch whose virtiod is killed while packets fly. A packet may be lost and, when it was in flight,
 * sent twice; none may be damaged, every buffer comes back once, and afterwards packets flow again both ways.
 */
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { FrontendError } from '../../src/frontend/errors.ts'
import { layouts } from '../../src/frontend/memory.ts'
import { NetDriver } from '../../src/frontend/net.ts'
import { Session } from '../../src/frontend/session.ts'
import { Random } from '../../src/frontend/verify/case.ts'
import { sleepMs } from '../../src/frontend/virtqueue.ts'
import { VIRTIO_NET_F_CTRL_VQ } from '../../src/virtio/net.ts'
import { Daemon } from './daemon.ts'
import { Killer } from './killer.ts'

const KILLS = 8
/** Every byte of a frame follows from its number. */
const HEADER = 14

/** A frame whose bytes follow from its number, to `to` from `from`. */
function numbered(from: number, to: number, number: number): Uint8Array {
  const length = 60 + ((number * 389) % 1400)
  const bytes = Uint8Array.from({ length }, (_, i) => (i * 31 + number * 7 + (number >> 8)) & 0xff)
  bytes.set([0x52, 0x54, 0, 9, 9, to, 0x52, 0x54, 0, 9, 9, from, 0x88, 0xb5])
  new DataView(bytes.buffer).setUint32(HEADER, number)
  return bytes
}

let directory: string
let daemon: Daemon | undefined
let killer: Killer
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'virtiod-net-kill-'))
  killer = new Killer()
})
afterEach(async () => {
  await daemon?.stop('SIGKILL')
  await killer.close()
  rmSync(directory, { recursive: true, force: true })
})

interface Guest {
  readonly socket: string
  readonly number: number
  session: Session
  readonly net: NetDriver
  sent: number
  received: number
}

/** Whether every packet was taken, without waiting. */
function allSent({ net }: Guest): boolean {
  try {
    net.sent(undefined, 0)
    return true
  } catch (error) {
    if (error instanceof FrontendError && error.failure === 'timeout') return false
    throw error
  }
}

describe.each([
  ['split', false],
  ['packed', true],
])('packets on %s rings', (_, packed) => {
  test(`flow again after each of ${KILLS} kills`, { timeout: 60_000 }, async () => {
    const sockets = [0, 1].map((port) => join(directory, `port${port}`))
    const words = sockets.flatMap((socket) => ['--socket-path', socket])
    const start = async (): Promise<Daemon> => {
      const args = ['net', '--switch', 'sw0', '--log-level', 'warn', ...words]
      daemon = new Daemon(sockets[1] ?? '', args, join(directory, 'log'), { socketOption: false })
      if (!(await daemon.listening())) throw new Error(daemon.log)
      return daemon
    }
    let running = await start()
    const guests = sockets.map((socket, number): Guest => {
      const session = Session.open(socket, {
        queues: 0,
        memory: layouts.single(8 * 2 ** 20),
        withoutFeatures: [VIRTIO_NET_F_CTRL_VQ],
        packed,
        inflight: { numQueues: 2, queueSize: 256 },
      })
      return { socket, number, session, net: new NetDriver(session), sent: 0, received: 0 }
    })
    const random = new Random(1)
    const exchange = (): void => {
      for (const guest of guests) {
        if (allSent(guest)) {
          for (let i = random.below(24); i >= 0; i--) {
            guest.net.send(numbered(guest.number, 1 - guest.number, guest.sent++), { publish: false })
          }
          guest.net.publish()
        }
        for (let packet = guest.net.tryReceive(); packet !== undefined; packet = guest.net.tryReceive()) {
          const { frame } = packet
          const number = new DataView(frame.buffer, frame.byteOffset, frame.byteLength).getUint32(HEADER)
          const wanted = numbered(1 - guest.number, guest.number, number)
          expect(Buffer.compare(frame, wanted), `packet ${number}`).toBe(0)
          guest.received++
        }
      }
    }
    /** Both ways, with every buffer back. */
    const flows = (): void => {
      const before = guests.map(({ received }) => received)
      const deadline = performance.now() + 10_000
      while (guests.some(({ received }, i) => received < (before[i] ?? 0) + 50)) {
        if (performance.now() > deadline) {
          throw new Error(`packets don't flow: received ${before} and then ${guests.map(({ received }) => received)}`)
        }
        exchange()
        sleepMs(0.05)
      }
    }
    flows()
    for (let kill = 0; kill < KILLS; kill++) {
      killer.kill(running.pid, random.below(200) / 10)
      while (!killer.done) exchange()
      await running.ended
      running = await start()
      for (const guest of guests) guest.session = Session.resume(guest.socket, guest.session)
      flows()
    }
    for (const { net, session } of guests) {
      net.sent()
      expect(net.tx().driver.inFlight).toBe(0)
      expect(session.inflight?.read(1).inflight).toEqual([])
    }
    for (const { session } of guests) session.close()
    expect((await running.stop()).code, running.log).toBe(0)
  })
})

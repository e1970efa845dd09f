/**
 * virtiod is killed and replaced under a guest that writes, on split and on packed rings: QEMU connects again, hands
 * over the in-flight buffer, and the guest sees a pause: no error, every checksum right. Then virtiod is upgraded under
 * the same load: its connection isn't even closed.
 *
 * VIRTIOD_TEST_KILLS is the number of kills per format (default 4; QEMU connects once per second, so 25 take a minute).
 */
import { execFile } from 'node:child_process'
import { closeSync, mkdtempSync, openSync, rmSync, truncateSync } from 'node:fs'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest'
import { VIRTIO_F_RING_PACKED } from '../../src/virtio/constants.ts'
import { root, whyNoGuest } from '../setup/prerequisites.ts'
import { type Backend, diskArgs, startBackend } from './backend.ts'
import { type Guest, startGuest } from './guest.ts'
import { diskFeatures, reconnecting, WritingGuest } from './writing.ts'

const kills = Number(process.env['VIRTIOD_TEST_KILLS'] ?? 4)
const queues = 2

vi.setConfig({ testTimeout: 60_000 + kills * 10_000, hookTimeout: 60_000 })

describe.skipIf(whyNoGuest() !== undefined).each(['split', 'packed'] as const)(
  'a writing guest on a %s ring',
  (format) => {
    let directory: string
    let image: string
    let socket: string
    let disk: Backend
    let guest: Guest
    let writing: WritingGuest
    /** The process that a handover left in place of `disk`. */
    let successor: number | undefined

    const start = () => startBackend({ kind: 'virtiod', image, socket, numQueues: queues })

    beforeAll(async () => {
      // A real file system: /tmp may be a tmpfs, which makes io_uring take its slow path.
      directory = mkdtempSync('/var/tmp/virtiod-survive-')
      image = join(directory, 'disk.img')
      socket = join(directory, 's')
      closeSync(openSync(image, 'w'))
      truncateSync(image, 192 * 2 ** 20)
      disk = await start()
      guest = await startGuest({
        cpus: queues,
        qemuArgs: reconnecting(diskArgs(socket, queues, format === 'packed' ? ',packed=on' : '')),
        timeoutMs: 120_000 + kills * 10_000,
      })
      writing = await WritingGuest.start(guest, queues)
    })
    afterAll(async () => {
      await guest?.kill()
      await disk?.stop('SIGKILL')
      if (successor !== undefined) process.kill(successor, 'SIGKILL')
      rmSync(directory, { recursive: true, force: true })
    })

    test('has the ring format', async () => {
      expect((await diskFeatures(guest)).has(VIRTIO_F_RING_PACKED)).toBe(format === 'packed')
    })

    test(`goes on after ${kills} kills`, async () => {
      for (let kill = 0; kill < kills; kill++) {
        await writing.progress(1)
        // Any moment of a round.
        await new Promise((resolve) => setTimeout(resolve, (kill * 37) % 100))
        expect(await disk.stop('SIGKILL')).toMatchObject({ signal: 'SIGKILL' })
        disk = await start()
      }
      await writing.progress(2)
    })

    test('goes on over two handovers, and hears nothing of them', async () => {
      let pid = disk.pid
      for (let handover = 0; handover < 2; handover++) {
        await writing.progress(1)
        const launcher = join(root, 'bin', 'virtiod.js')
        const { stdout } = await promisify(execFile)(process.execPath, [launcher, 'handover', String(pid)])
        const next = Number(/\d+/.exec(stdout)?.[0])
        expect(next).toBeGreaterThan(1)
        expect(next).not.toBe(pid)
        successor = pid = next
        await writing.progress(2)
      }
      expect(await disk.exited).toMatchObject({ code: 0 })
    })

    test('has every file and every block right, and no complaint', async () => {
      await writing.finish()
    })
  }
)

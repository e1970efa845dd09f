/**
 * Live migration of a writing guest: from one QEMU on one virtiod to another QEMU on another virtiod, both on the same
 * image. QEMU finds the guest's changed memory by the log that virtiod keeps (LOG_SHMFD, LOG_ALL); the disk that
 * arrives with wrong memory or loses a write shows in the checksums.
 *
 * VIRTIOD_TEST_BACKEND=qsd runs it against qemu-storage-daemon.
 */
import { closeSync, mkdtempSync, openSync, rmSync, truncateSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, afterEach, beforeAll, describe, expect, test, vi } from 'vitest'
import { VIRTIO_F_RING_PACKED } from '../../src/virtio/constants.ts'
import { whyNoGuest } from '../setup/prerequisites.ts'
import { type Backend, type BackendKind, backendKinds, diskArgs, startBackend } from './backend.ts'
import { Guest, startGuest } from './guest.ts'
import { diskFeatures, WritingGuest } from './writing.ts'

vi.setConfig({ testTimeout: 120_000, hookTimeout: 60_000 })

interface MigrationStatus {
  readonly status: string
  readonly 'error-desc'?: string
  readonly ram?: { readonly 'dirty-sync-count': number }
}

const MiB = 1 << 20

/** Moves a guest into a QEMU that waits for it. @param meanwhile is done when all of its memory was copied once */
async function migrate(from: Guest, to: Guest, path: string, meanwhile: () => Promise<void>): Promise<void> {
  const status = async (): Promise<MigrationStatus> => {
    const now = (await from.qmp('query-migrate')) as MigrationStatus
    if (now.status === 'failed' || now.status === 'cancelled')
      throw new Error(`the migration ${now.status}: ${now['error-desc']}\n${to.console.slice(-2000)}`)
    return now
  }
  // No pause is that short. (With 0 QEMU 7.2 doesn't look for pages that have changed again, and soon is through.)
  await from.qmp('migrate-set-parameters', { 'downtime-limit': 1, 'max-bandwidth': 64 * MiB })
  await from.qmp('migrate', { uri: `unix:${path}` })
  while (((await status()).ram?.['dirty-sync-count'] ?? 0) < 2) await sleep(10)
  // Slower than any guest writes, so that it can't end meanwhile.
  await from.qmp('migrate-set-parameters', { 'max-bandwidth': 65536 })
  await meanwhile()
  await from.qmp('migrate-set-parameters', { 'downtime-limit': 2000, 'max-bandwidth': 4096 * MiB })
  while ((await status()).status !== 'completed') await sleep(20)
  await to.qmpEvent('RESUME')
}

/**
 * Memory that nobody but the back-end writes to: only its log tells that it has changed. `dd` reads 4 MiB twice, past
 * the page cache, into the same buffer, and what it writes goes into a pipe that is read as slowly as is needed here.
 * Before the migration it has read once; during it, the second time; and what is in the buffer is looked at on the
 * other side.
 */
async function readHalf(guest: Guest): Promise<void> {
  await guest.sh(`sleep 1000 <> /tmp/fifo > /dev/null 2>&1 &
  echo $! > /tmp/holder
  dd if=/mnt-vda/two of=/tmp/fifo bs=4M count=2 iflag=direct > /dev/null 2>&1 &
  dd if=/tmp/fifo of=/dev/null bs=4096 count=768 2> /dev/null`)
}

async function readOn(guest: Guest): Promise<void> {
  // The last of the first 4 MiB, and the first of the second, which are in the buffer then.
  await guest.sh(`dd if=/tmp/fifo of=/dev/null bs=4096 count=256 2> /dev/null
  dd if=/tmp/fifo of=/tmp/second bs=4096 count=1 2> /dev/null`)
}

async function checkBuffer(guest: Guest): Promise<void> {
  await guest.sh(`dd if=/tmp/fifo bs=4096 count=1023 >> /tmp/second 2> /dev/null
  kill $(cat /tmp/holder)
  tail -c 4194304 /mnt-vda/two | cmp - /tmp/second`)
}

/** qemu-storage-daemon has no packed rings. */
const cases = backendKinds().flatMap((kind): [BackendKind, 'split' | 'packed'][] =>
  kind === 'virtiod'
    ? [
        [kind, 'split'],
        [kind, 'packed'],
      ]
    : [[kind, 'split']]
)

describe.skipIf(whyNoGuest() !== undefined).each(cases)('live migration on %s, %s rings', (kind, format) => {
  let directory: string
  const backends: Backend[] = []
  const guests: Guest[] = []
  beforeAll(() => {
    directory = mkdtempSync('/var/tmp/virtiod-migration-')
  })
  afterEach(async () => {
    for (const guest of guests) await guest.kill()
    for (const backend of backends) await backend.stop('SIGKILL')
  })
  afterAll(() => rmSync(directory, { recursive: true, force: true }))

  test('a guest that writes goes there and back, with every byte right', async () => {
    const image = join(directory, 'disk.img')
    closeSync(openSync(image, 'w'))
    truncateSync(image, 192 * 2 ** 20)
    const device = format === 'packed' ? ',packed=on' : ''
    /** A back-end of its own for each QEMU; the machines must be the same to the last word. */
    const machine = async (name: string): Promise<string[]> => {
      const socket = join(directory, name)
      backends.push(await startBackend({ kind, image, socket, numQueues: 2, lock: false }))
      return diskArgs(socket, 2, device)
    }
    const first = await startGuest({ cpus: 2, qemuArgs: await machine('a') })
    guests.push(first)
    expect((await diskFeatures(first)).has(VIRTIO_F_RING_PACKED)).toBe(format === 'packed')
    const writing = await WritingGuest.start(first, 2)
    await writing.progress(2)
    await first.sh('cd /mnt-vda; head -c 8388608 /dev/urandom > two; sync; mkfifo /tmp/fifo')

    let here = first
    for (const name of ['b', 'c']) {
      const path = join(directory, `migration-${name}`)
      const there = await Guest.launch({
        cpus: 2,
        qemuArgs: [...(await machine(name)), '-incoming', `unix:${path}`],
      })
      guests.push(there)
      await writing.progress(1)
      const from = here
      await readHalf(from)
      await migrate(from, there, path, () => readOn(from))
      await from.kill()
      writing.guest = there
      here = there
      await checkBuffer(there)
      await writing.progress(2)
    }
    await writing.finish()
    if (kind === 'virtiod') for (const backend of backends) expect(await backend.stop()).toMatchObject({ code: 0 })
  })
})

/**
 * virtio-rng in a real guest: its kernel takes the device for a source of entropy, reads random bytes from it, and gets no more of
 * them than the rate allows. One boot with two devices.
 */
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type Guest, startGuest, startVirtiod, type VirtiodProcess, vhostUserArgs } from 'virtiod/testing'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { whyNoGuest } from '../setup/prerequisites.ts'

const hwrng = '/sys/devices/virtual/misc/hw_random'

describe.skipIf(whyNoGuest() !== undefined)('a guest with two sources of random bytes', { timeout: 60_000 }, () => {
  const directory = mkdtempSync(join(tmpdir(), 'virtiod-rng-guest-'))
  const daemons: VirtiodProcess[] = []
  let guest: Guest

  beforeAll(async () => {
    const serve = async (name: string, ...options: string[]): Promise<string[]> => {
      const socket = join(directory, name)
      daemons.push(await startVirtiod(['rng', '--socket-path', socket, ...options]))
      return vhostUserArgs(socket, 'vhost-user-rng-pci')
    }
    const fast = await serve('fast')
    const slow = await serve('slow', '--rate', '1K', '--period', '500')
    guest = await startGuest({ qemuArgs: [...fast, ...slow], modules: ['virtio-rng'] })
  }, 60_000)

  afterAll(async () => {
    await guest?.kill()
    for (const daemon of daemons) await daemon.stop('SIGKILL')
    rmSync(directory, { recursive: true })
  })

  test('knows them', async () => {
    expect(await guest.sh(`cat ${hwrng}/rng_available`)).toMatch(/^virtio_rng.0 virtio_rng.1/)
    expect(await guest.sh(`cat ${hwrng}/rng_current`)).toMatch(/^virtio_rng/)
  })

  test('reads from the first one, never the same', async () => {
    await guest.sh(`echo virtio_rng.0 > ${hwrng}/rng_current`)
    const read = 'dd if=/dev/hwrng bs=64k count=1 iflag=fullblock 2> /dev/null'
    const [one, two, packed] = (
      await guest.sh(`${read} | sha1sum; ${read} | sha1sum; ${read} | gzip -c | wc -c`)
    ).split('\n')
    expect(one).not.toBe(two)
    // Random bytes don't get smaller.
    expect(Number(packed)).toBeGreaterThan(65536)
  })

  test('reads from the second one as fast as it may', async () => {
    await guest.sh(`echo virtio_rng.1 > ${hwrng}/rng_current`)
    // 1 KiB in each half second, and what the kernel had read before: 4 KiB take more than a second.
    const before = performance.now()
    expect(await guest.sh('dd if=/dev/hwrng bs=1k count=4 iflag=fullblock 2> /dev/null | wc -c')).toBe('4096')
    expect(performance.now() - before).toBeGreaterThan(1000)
  })

  test('can be stopped while a request waits, and goes on', async () => {
    await guest.sh('dd if=/dev/hwrng of=/dev/null bs=1k count=2 iflag=fullblock 2> /dev/null &')
    await guest.qmp('stop')
    await guest.qmp('cont')
    expect(await guest.sh('dd if=/dev/hwrng bs=64 count=1 iflag=fullblock 2> /dev/null | wc -c')).toBe('64')
  })
})

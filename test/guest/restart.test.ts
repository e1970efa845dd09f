/**
 * virtiod is stopped and started again under a guest that uses its disk: QEMU reconnects, and the guest sees a pause. What was in
 * flight was completed before virtiod ended, so nothing has to be recovered.
 */
import { closeSync, mkdtempSync, openSync, rmSync, truncateSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import { backendKinds, diskArgs, startBackend } from './backend.ts'
import { startGuest } from './guest.ts'

const directory = mkdtempSync('/var/tmp/virtiod-restart-')
afterAll(() => rmSync(directory, { recursive: true, force: true }))

// qemu-storage-daemon doesn't end on SIGTERM while a front-end is connected.
describe.skipIf(!backendKinds().includes('virtiod'))(
  'a restart under a guest',
  () => {
    test('the guest goes on, with every checksum right', async () => {
      const image = join(directory, 'disk.img')
      const socket = join(directory, 's')
      closeSync(openSync(image, 'w'))
      truncateSync(image, 128 * 2 ** 20)
      let disk = await startBackend({ kind: 'virtiod', image, socket, numQueues: 2 })
      try {
        await using guest = await startGuest({
          cpus: 2,
          qemuArgs: diskArgs(socket, 2).map((arg) => (arg.startsWith('socket,') ? `${arg},reconnect=1` : arg)),
          timeoutMs: 90_000,
        })
        await guest.sh('mke2fs -q -t ext4 /dev/vda && mkdir -p /mnt && mount /dev/vda /mnt')
        const write = (round: number) =>
          guest.sh(`for i in 1 2 3 4; do
          head -c 2000000 /dev/urandom > /mnt/${round}-$i && sha256sum /mnt/${round}-$i >> /mnt/sums && sync
        done`)
        await write(0)
        for (let round = 1; round <= 3; round++) {
          const writing = write(round)
          await new Promise((resolve) => setTimeout(resolve, 300))
          expect(await disk.stop()).toMatchObject({ code: 0 })
          disk = await startBackend({ kind: 'virtiod', image, socket, numQueues: 2 })
          await writing
        }
        await guest.sh(
          'echo 3 > /proc/sys/vm/drop_caches; sha256sum -c /mnt/sums > /tmp/result && [ $(wc -l < /tmp/result) = 16 ]'
        )
        await guest.sh('umount /mnt && e2fsck -fn /dev/vda')
        await guest.sh('! dmesg | grep -iE "I/O error|blk_update_request|critical"')
      } finally {
        await disk.stop()
      }
    })
  },
  120_000
)

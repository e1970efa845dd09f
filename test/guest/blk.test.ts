/**
 * The main job, end to end: a Linux guest in QEMU uses the disk. One image goes through a chain of guests, as a disk
 * does: filled by the first, checked and trimmed by the second, which is cut off in the middle of writing, recovered
 * by the third, read by the fourth. Commands run in the guest (`guest.sh`); what the image looks like is checked on
 * the host.
 *
 * VIRTIOD_TEST_BACKEND=qsd runs it against qemu-storage-daemon.
 */
import {
  closeSync,
  mkdtempSync,
  openSync,
  readSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest'
import { whyNoGuest } from '../setup/prerequisites.ts'
import { type Backend, backendKinds, diskArgs, startBackend, traits } from './backend.ts'
import { bootedExitCode, bootSector, exitPort } from './boot-sector.ts'
import { type Guest, startFirmware, startGuest } from './guest.ts'

const MiB = 1 << 20
const imageSize = 512 * MiB
/** First bytes of the partitions that the first guest makes. */
const partition = { fs: 1 * MiB, raw: 321 * MiB }
const partitionTable = `label: gpt
start=2048, size=${(320 * MiB) / 512}, name=fs
start=${partition.raw / 512}, size=${(128 * MiB) / 512}, name=raw
`

/** Errors that the guest's kernel reports about the disk. */
const diskErrors = /I\/O error|EXT4-fs (error|warning)|blk_update_request|hung task|blocked for more than/

// Hooks start guests: seconds on an idle machine, more on a crowded one.
vi.setConfig({ testTimeout: 60_000, hookTimeout: 60_000 })

describe.skipIf(whyNoGuest() !== undefined).each(backendKinds())(
  'a guest with a disk on %s',
  { timeout: 60_000 },
  (kind) => {
    let directory: string
    let image: string
    let socket: string
    let backend: Backend
    let guest: Guest

    const start = async (options: Partial<Parameters<typeof startBackend>[0]>, queues: number): Promise<void> => {
      backend = await startBackend({ kind, image, socket, ...options })
      guest = await startGuest({ qemuArgs: diskArgs(socket, queues), cpus: queues })
    }
    const end = async (): Promise<void> => {
      await guest?.kill()
      await backend?.stop('SIGKILL')
    }

    /** The later guests need what the first one left; without it their failures would only hide the first one. */
    let isFilled = false
    const needsFiles = (): void => {
      if (!isFilled) throw new Error('the first guest did not fill the disk')
    }

    /** Bytes that the image occupies on the host. */
    const allocated = (): number => statSync(image).blocks * 512

    const imageBytes = (offset: number, length: number): Buffer => {
      const bytes = Buffer.alloc(length)
      const fd = openSync(image, 'r')
      readSync(fd, bytes, 0, length, offset)
      closeSync(fd)
      return bytes
    }

    beforeAll(() => {
      // A real file system: /tmp may be a tmpfs, which knows no O_DIRECT and makes io_uring take its slow path.
      directory = mkdtempSync('/var/tmp/virtiod-blk-')
      image = join(directory, 'disk.img')
      socket = join(directory, 'blk.sock')
      writeFileSync(image, '')
      truncateSync(image, imageSize)
    })

    afterAll(() => rmSync(directory, { recursive: true, force: true }))

    describe('the first guest, one queue', () => {
      beforeAll(async () => start({ numQueues: 4, serial: 'virtiod-0001' }, 1))
      // The back-end goes on to serve the second guest.
      afterAll(async () => guest?.kill())

      test('sees the size of the image', async () => {
        expect(Number(await guest.sh('blockdev --getsize64 /dev/vda'))).toBe(imageSize)
      })

      test('sees one queue', async () => {
        expect(await guest.sh('ls /sys/block/vda/mq')).toBe('0')
      })

      test('sees the serial', async () => {
        expect(await guest.sh('cat /sys/block/vda/serial')).toBe(traits[kind].serial('virtiod-0001'))
      })

      test('can write', async () => {
        expect(await guest.sh('cat /sys/block/vda/ro')).toBe('0')
      })

      test('has a write-back cache, and can switch it off and on', async () => {
        expect(await guest.sh('cat /sys/block/vda/cache_type')).toBe(traits[kind].cacheType)
        for (const type of ['write through', 'write back']) {
          const script = `echo ${type} > /sys/block/vda/cache_type
          dd if=/dev/zero of=/dev/vda bs=64k count=16 conv=fsync 2> /dev/null
          cat /sys/block/vda/cache_type`
          expect(await guest.sh(script)).toBe(type)
        }
      })

      test('makes a partition table and a file system', async () => {
        await guest.sh(`sfdisk -q /dev/vda << END\n${partitionTable}\nEND
        mke2fs -q -t ext4 -L virtiod /dev/vda1`)
        expect(await guest.sh('blkid -o value -s TYPE -s LABEL /dev/vda1')).toBe('virtiod\next4')
      })

      test('fills it with files of many sizes', async () => {
        await guest.sh(`mount /dev/vda1 /mnt
        cd /mnt
        dd if=/dev/urandom of=/tmp/seed bs=1M count=4 2> /dev/null
        mkdir -p deep/er/still
        for i in 1 2 3 4 5 6 7 8; do
          dd if=/tmp/seed of=deep/er/still/$i bs=$((i * 777)) count=$((i * 31)) skip=$i 2> /dev/null
        done
        cat /tmp/seed /tmp/seed /tmp/seed /tmp/seed > big
        : > empty
        dd if=/tmp/seed of=hole bs=4k count=3 seek=5000 2> /dev/null
        find . -type f -not -name sums -exec sha256sum {} + > sums
        sync`)
        expect(Number(await guest.sh('wc -l < /mnt/sums'))).toBe(11)
        isFilled = true
      })

      test('powers off without an error', async () => {
        const { console, qemuExitCode } = await guest.powerOff()
        expect(console).not.toMatch(diskErrors)
        expect(qemuExitCode).toBe(0)
      })
    })

    describe('the second guest, four queues, on the same back-end', () => {
      beforeAll(async () => {
        needsFiles()
        guest = await startGuest({ qemuArgs: diskArgs(socket, 4), cpus: 4 })
      })
      afterAll(end)

      test('has a queue for each processor', async () => {
        expect(await guest.sh('cd /sys/block/vda/mq && cat 0/cpu_list 1/cpu_list 2/cpu_list 3/cpu_list')).toBe(
          '0\n1\n2\n3'
        )
      })

      test('finds the files as the first one left them', async () => {
        await guest.sh('e2fsck -fn /dev/vda1; mount -o discard /dev/vda1 /mnt; cd /mnt; sha256sum -c -s sums')
      })

      test('writes and reads on all queues at once', async () => {
        await guest.sh(`dd if=/dev/urandom of=/tmp/noise bs=1M count=2 2> /dev/null
        for cpu in 0 1 2 3; do
          (exec 2> /dev/null
          mask=$((1 << cpu))
          for i in 0 1 2 3; do
            at=$(((cpu * 8 + i * 2) << 20))
            taskset $mask dd if=/tmp/noise of=/dev/vda2 bs=$((4096 << (2 * i))) seek=$at oflag=direct,seek_bytes
          done
          taskset $mask dd if=/dev/vda2 of=/tmp/back$cpu bs=64k skip=$((cpu * 128)) count=128 iflag=direct) &
        done
        wait
        cat /tmp/noise /tmp/noise /tmp/noise /tmp/noise > /tmp/expected
        for cpu in 0 1 2 3; do cmp /tmp/expected /tmp/back$cpu; done
        rm /tmp/back* /tmp/expected`)
        expect(imageBytes(partition.raw, MiB).equals(imageBytes(partition.raw + 30 * MiB, MiB))).toBe(true)
      })

      test('gives space back with blkdiscard', async () => {
        const before = allocated()
        await guest.sh('blkdiscard -o 8M -l 24M /dev/vda2')
        expect(before - allocated()).toBeGreaterThanOrEqual(23 * MiB)
        await guest.sh('dd if=/dev/vda2 bs=1M count=2 iflag=direct 2> /dev/null | cmp - /tmp/noise')
      })

      test('gives space back when it deletes files (mount -o discard)', async () => {
        const before = allocated()
        await guest.sh('for i in 1 2 3 4 5 6 7 8; do cat /tmp/noise /tmp/noise; done > /mnt/doomed; sync')
        const full = allocated()
        expect(full - before).toBeGreaterThanOrEqual(31 * MiB)
        await guest.sh('rm /mnt/doomed; sync')
        // The guest's ext4 discards in the background, soon after the commit.
        await expect.poll(() => full - allocated(), { timeout: 20_000 }).toBeGreaterThanOrEqual(31 * MiB)
      })

      test('writes zeroes', async () => {
        // Whole blocks and single sectors; what lies beside them stays.
        await guest.sh(`[ $(cat /sys/block/vda/queue/write_zeroes_max_bytes) -gt 0 ]
        blkdiscard -z -o 64k -l 1M /dev/vda2
        blkdiscard -z -o 512 -l 1024 /dev/vda2
        dd if=/dev/vda2 of=/tmp/zeroed bs=1M count=2 iflag=direct 2> /dev/null
        cp /tmp/noise /tmp/expected
        dd if=/dev/zero of=/tmp/expected bs=64k seek=1 count=16 conv=notrunc 2> /dev/null
        dd if=/dev/zero of=/tmp/expected bs=512 seek=1 count=2 conv=notrunc 2> /dev/null
        cmp /tmp/expected /tmp/zeroed`)
        expect(imageBytes(partition.raw + 65536, MiB).equals(Buffer.alloc(MiB))).toBe(true)
        expect(imageBytes(partition.raw + 512, 1024).equals(Buffer.alloc(1024))).toBe(true)
      })

      test('has had no error so far', () => {
        expect(guest.console).not.toMatch(diskErrors)
      })

      test('writes and syncs on all queues until a signal ends the back-end, at once and in order', async () => {
        await guest.run(`mkdir /mnt/w; sync
        for cpu in 0 1 2 3; do
          (i=0
          while dd if=/dev/urandom of=/mnt/w/$cpu-$i bs=16k count=4 conv=fsync 2> /dev/null; do
            echo "synced $(sha256sum /mnt/w/$cpu-$i)" > /dev/ttyS1
            i=$((i + 1))
          done) &
        done`)
        for (let i = 0; i < 24; i++) await guest.line(/^synced /)
        const { code, signal, milliseconds } = await backend.stop(traits[kind].stopSignal)
        // What the guest was told before the back-end went may still be on its way here.
        await sleep(300)
        await guest.kill()
        synced = [...guest.output.matchAll(/^synced ([0-9a-f]{64} {2}\S+)$/gm)].map((match) => match[1] ?? '')
        expect(synced.length).toBeGreaterThanOrEqual(24)
        if (traits[kind].stopSignal === 'SIGTERM')
          expect({ code, signal }, backend.log).toEqual({ code: 0, signal: null })
        expect(milliseconds).toBeLessThan(1000)
      })
    })

    /** `sha256sum -c` lines of the files whose fsync had returned before the second guest was cut off. */
    let synced: string[] = []

    describe('the third guest, on a new back-end with cache=none', () => {
      beforeAll(async () => {
        needsFiles()
        await start({ numQueues: 1, cache: 'none' }, 1)
      })
      afterAll(end)

      test('recovers the file system', async () => {
        const { exitCode, output } = await guest.run('e2fsck -fy /dev/vda1')
        // 1: it had something to correct (the journal, counts of free blocks).
        expect(exitCode, output).toBeLessThanOrEqual(1)
        await guest.sh('mount /dev/vda1 /mnt')
      })

      test('finds every file that was synced', async () => {
        expect(synced).not.toHaveLength(0)
        await guest.sh(`cat > /tmp/synced << END\n${synced.join('\n')}\nEND\nsha256sum -c -s /tmp/synced`)
      })

      test('finds the files of the first guest', async () => {
        await guest.sh('cd /mnt; sha256sum -c -s sums')
      })

      test('gives space back with fstrim', async () => {
        await guest.sh('rm -r /mnt/w; cat /mnt/big /mnt/big > /mnt/doomed; sync')
        const full = allocated()
        await guest.sh('rm /mnt/doomed; sync')
        expect(full - allocated()).toBeLessThan(MiB)
        await guest.sh('fstrim /mnt')
        expect(full - allocated()).toBeGreaterThanOrEqual(31 * MiB)
      })

      test('leaves a clean file system', async () => {
        await guest.sh('cp /mnt/big /mnt/copy; sync; umount /mnt; e2fsck -fn /dev/vda1')
        const { console } = await guest.powerOff()
        expect(console).not.toMatch(diskErrors)
        expect(await backend.stop()).toMatchObject({ code: 0, signal: null })
      })
    })

    describe('the fourth guest, read-only', () => {
      let untouched: number
      beforeAll(async () => {
        needsFiles()
        untouched = statSync(image).mtimeMs
        await start({ readOnly: true }, 1)
      })
      afterAll(end)

      test('knows that the disk is read-only', async () => {
        expect(await guest.sh('cat /sys/block/vda/ro')).toBe('1')
      })

      test('cannot write', async () => {
        expect(await guest.run('dd if=/dev/zero of=/dev/vda2 bs=4k count=1 conv=fsync')).not.toMatchObject({
          exitCode: 0,
        })
        expect(
          await guest.run('blockdev --setrw /dev/vda; dd if=/dev/zero of=/dev/vda bs=4k count=1')
        ).not.toMatchObject({ exitCode: 0 })
        expect(await guest.run('blkdiscard /dev/vda2')).not.toMatchObject({ exitCode: 0 })
        expect(await guest.run('mount -o rw /dev/vda1 /mnt && touch /mnt/x')).not.toMatchObject({ exitCode: 0 })
        expect(statSync(image).mtimeMs).toBe(untouched)
      })

      test('reads', async () => {
        await guest.sh(`umount /mnt 2> /dev/null || true
        mount -o ro /dev/vda1 /mnt
        cmp /mnt/big /mnt/copy
        cd /mnt
        sha256sum -c -s sums
        cd /
        umount /mnt
        e2fsck -fn /dev/vda1`)
        await guest.powerOff()
        expect(await backend.stop()).toMatchObject({ code: 0, signal: null })
      })
    })

    test('the firmware boots from the disk', async () => {
      const file = join(directory, 'boot.img')
      const lastLba = (64 * MiB) / 512 - 1
      const near = Array.from({ length: 120 }, (_, i) => `line ${i} of the text behind the boot sector\n`)
        .join('')
        .slice(0, 4000)
      const far = 'the last sector of the disk\n'
      const fd = openSync(file, 'w')
      writeSync(
        fd,
        bootSector('boot sector runs\n', [
          { lba: 1, sectors: 8, address: 0x8000 },
          { lba: lastLba, sectors: 1, address: 0xa000 },
        ]),
        0,
        512,
        0
      )
      writeSync(fd, near, 512)
      writeSync(fd, Buffer.from(far.padEnd(512, '\0')), 0, 512, lastLba * 512)
      closeSync(fd)

      await using disk = await startBackend({ kind, image: file, socket })
      await using machine = await startFirmware({
        qemuArgs: [...diskArgs(socket, 1, ',bootindex=0'), '-device', `isa-debug-exit,iobase=${exitPort},iosize=1`],
        timeoutMs: 20_000,
      })
      const { console, qemuExitCode } = await machine.finished()
      expect(console).toContain(`boot sector runs\n${near}${far}`)
      expect(qemuExitCode).toBe(bootedExitCode)
      expect(await disk.stop()).toMatchObject({ code: 0, signal: null })
    })
  }
)

/**
 * Guest memory as real machines have it: in hugepages, in several regions, and growing and shrinking while the disk is
 * in use. What counts is that I/O to and from each kind of memory arrives.
 *
 * VIRTIOD_TEST_BACKEND=qsd runs it against qemu-storage-daemon.
 */
import { randomBytes } from 'node:crypto'
import {
  closeSync,
  mkdtempSync,
  openSync,
  readFileSync,
  readSync,
  rmSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest'
import { whyNoGuest } from '../setup/prerequisites.ts'
import { type Backend, backendKinds, diskArgs, startBackend } from './backend.ts'
import { type Guest, startGuest } from './guest.ts'

const MiB = 1 << 20
const imageSize = 640 * MiB

// Hooks start guests: seconds on an idle machine, more on a crowded one.
vi.setConfig({ testTimeout: 60_000, hookTimeout: 60_000 })

describe.skipIf(whyNoGuest() !== undefined).each(backendKinds())('guest memory on %s', (kind) => {
  let directory: string
  let image: string
  let backend: Backend
  let socket: string

  beforeAll(async () => {
    // A real file system: /tmp may be a tmpfs, which knows no O_DIRECT and makes io_uring take its slow path.
    directory = mkdtempSync('/var/tmp/virtiod-memory-')
    image = join(directory, 'disk.img')
    socket = join(directory, 'blk.sock')
    writeFileSync(image, '')
    truncateSync(image, imageSize)
    backend = await startBackend({ kind, image, socket })
  })

  afterAll(async () => {
    await backend?.stop('SIGKILL')
    rmSync(directory, { recursive: true, force: true })
  })

  describe('in regions that come and go', () => {
    let guest: Guest
    beforeAll(async () => {
      guest = await startGuest({
        // The base memory is too small for what the tests do in the added memory.
        memoryMb: 160,
        memoryOptions: ',slots=4,maxmem=2G',
        // swiotlb would take 64 MiB of it for devices that cannot address the added memory; there are none.
        kernelArgs: 'memhp_default_state=online_movable swiotlb=noforce',
        qemuArgs: [
          '-object',
          'memory-backend-memfd,id=mem1,size=128M,share=on',
          '-device',
          'pc-dimm,id=dimm1,memdev=mem1',
          ...diskArgs(socket),
        ],
      })
    })
    afterAll(async () => guest?.kill())

    /** MiB of memory that the guest has. */
    const total = async (): Promise<number> =>
      Number(await guest.sh(`awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo`))

    test('I/O works with two regions from the start', async () => {
      expect(await total()).toBeGreaterThan(160)
      await copyThroughBuffer(guest, 16)
    })

    test('I/O works from memory that was added while the disk was in use', async () => {
      const before = await total()
      await guest.sh(
        `(exec 2> /dev/null; while :; do dd if=/dev/vda of=/dev/null bs=64k count=1024 iflag=direct; done) &
        echo $! > /tmp/reader`
      )
      await guest.qmp('object-add', { 'qom-type': 'memory-backend-memfd', id: 'mem2', size: 384 * MiB, share: true })
      await guest.qmp('device_add', { driver: 'pc-dimm', id: 'dimm2', memdev: 'mem2' })
      await guest.sh(`for i in $(seq 100); do
          [ $(awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo) -ge ${before + 384} ] && exit 0
          sleep 0.1
        done
        exit 1`)
      // As much as all the memory before: whatever the guest takes first, most of it lies in the new region.
      await copyThroughBuffer(guest, before)
      await guest.sh('kill $(cat /tmp/reader)')
    })

    test('I/O goes on when that memory is taken away', async () => {
      await guest.qmp('device_del', { id: 'dimm2' })
      await guest.qmpEvent('DEVICE_DELETED')
      await guest.qmp('object-del', { id: 'mem2' })
      await copyThroughBuffer(guest, 16)
    })

    test('has had no error', async () => {
      const { console } = await guest.powerOff()
      expect(console).not.toMatch(/I\/O error|blocked for more than/)
    })
  })

  test('I/O works in hugepages', async ({ skip }) => {
    using pages = reserveHugepages(128)
    if (pages === undefined) {
      process.stderr.write(
        '\nSKIPPED: guest memory in hugepages: the host has no 128 free ones and lets us reserve none\n\n'
      )
      skip('no hugepages')
    }
    await using guest = await startGuest({
      qemuArgs: diskArgs(socket),
      memoryMb: 256,
      memoryBackendOptions: ',hugetlb=on,hugetlbsize=2M',
    })
    await copyThroughBuffer(guest, 160)
    await guest.powerOff()
  })

  /**
   * The guest reads that much from the disk into one buffer, bypassing its page cache, and writes it from there to
   * another place: no byte is touched by its processor, so only the back-end can have got it right or wrong.
   */
  async function copyThroughBuffer(guest: Guest, sizeMiB: number): Promise<void> {
    const data = randomBytes(sizeMiB * MiB)
    const copy = Buffer.alloc(data.length)
    const fd = openSync(image, 'r+')
    try {
      writeSync(fd, data, 0, data.length, 0)
      await guest.sh(
        `dd if=/dev/vda of=/dev/vda bs=${sizeMiB}M count=1 seek=1 iflag=direct oflag=direct conv=fsync 2> /dev/null`
      )
      readSync(fd, copy, 0, copy.length, data.length)
    } finally {
      closeSync(fd)
    }
    expect(copy.equals(data)).toBe(true)
  }
})

/** Sees to it that so many 2 MiB pages are free, and puts the host's setting back at the end. */
function reserveHugepages(count: number): Disposable | undefined {
  const setting = '/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages'
  const free = (): number => Number(readFileSync(setting.replace('/nr_', '/free_'), 'utf8'))
  try {
    const before = Number(readFileSync(setting, 'utf8'))
    if (free() >= count) return { [Symbol.dispose]: () => undefined }
    writeFileSync(setting, String(before + count))
    const restore = (): void => writeFileSync(setting, String(before))
    if (free() >= count) return { [Symbol.dispose]: restore }
    restore()
  } catch {
    // no hugepages in this kernel, or we are not root
  }
  return undefined
}

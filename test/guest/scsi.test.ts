/**
 * Disks behind a SCSI controller, end to end: a Linux guest in QEMU finds the units, uses one as a disk, sends commands of
 * every kind with sg3-utils, and sees units that are resized, come and go. One boot, one back-end.
 */
import { closeSync, openSync, readSync, rmSync, statSync, truncateSync } from 'node:fs'
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest'
import { MIB, makeImage, ScsiBackend } from '../scsi/backend.ts'
import { guestTools, scsiTools, whyNoGuest } from '../setup/prerequisites.ts'
import { type Guest, startGuest } from './guest.ts'

// biome-ignore format: a list
const TOOLS = [
  'lsscsi', 'sg_inq', 'sg_vpd', 'sg_readcap', 'sg_luns', 'sg_modes', 'sg_opcodes', 'sg_unmap', 'sg_write_same', 'sg_sync',
  'sg_verify', 'sg_turs', 'sg_requests', 'sg_reset', 'sg_get_lba_status', 'sg_start', 'sg_prevent', 'sg_persist',
  'sg_wr_mode', 'sg_raw',
]

/** Errors that the guest's kernel reports about its disks. */
const diskErrors = /I\/O error|EXT4-fs (error|warning)|blk_update_request|hung task|blocked for more than|Sense Key/

vi.setConfig({ testTimeout: 60_000, hookTimeout: 60_000 })

describe.skipIf(whyNoGuest([...guestTools, ...scsiTools]) !== undefined)('a guest with a SCSI controller', () => {
  let backend: ScsiBackend
  let guest: Guest
  /** By LUN: the disks, which the kernel names in the order in which it gets through with them, and their sg nodes. */
  let disk: string[]
  let sg: string[]

  beforeAll(async () => {
    backend = new ScsiBackend({
      units: [
        { bytes: 256 * MIB, options: ',serial=first-of-them' },
        { bytes: 64 * MIB, options: ',hotplug,block-size=4096' },
        { bytes: 8 * MIB, options: ',read-only' },
      ],
      extra: ['--iothreads', '2'],
    })
    guest = await startGuest({
      tools: TOOLS,
      modules: ['virtio_scsi', 'sd_mod', 'sg'],
      cpus: 2,
      qemuArgs: [
        '-chardev',
        `socket,id=scsi,path=${backend.socket}`,
        '-device',
        'vhost-user-scsi-pci,id=scsi0,chardev=scsi,num_queues=2',
      ],
    })
    await guest.sh('for i in $(seq 100); do [ -e /dev/sdc ] && [ -e /dev/sg2 ] && exit 0; sleep 0.1; done; exit 1')
    const nodes = (path: string) =>
      guest.sh(`for lun in 0 1 2; do
        for node in ${path}; do case $(readlink $node/device) in *:0:0:$lun) echo /dev/\${node##*/};; esac; done
      done`)
    disk = (await nodes('/sys/block/sd*')).split('\n')
    sg = (await nodes('/sys/class/scsi_generic/*')).split('\n')
  })
  afterAll(async () => {
    await guest?.kill()
    await backend?.stop()
  })

  /** Bytes that an image occupies on the host. */
  const allocated = (image: number): number => statSync(backend.images[image]!).blocks * 512
  const imageBytes = (image: number, offset: number, length: number): Buffer => {
    const bytes = Buffer.alloc(length)
    const fd = openSync(backend.images[image]!, 'r')
    readSync(fd, bytes, 0, length, offset)
    closeSync(fd)
    return bytes
  }

  test('finds the units, with their sizes, blocks and queues', async () => {
    const list = await guest.sh('lsscsi')
    for (const [lun, name] of disk.entries())
      expect(list).toMatch(new RegExp(`:0:${lun}\\]\\s+disk\\s+VIRTIOD\\s+virtiod disk\\s+1\\.0\\s+${name}`))
    expect(
      await guest.sh(
        `cd /sys/block; for i in ${disk.map((path) => path.slice(5)).join(' ')}; do cat $i/size $i/queue/logical_block_size; done`
      )
    ).toBe(`${(256 * MIB) / 512}\n512\n${(64 * MIB) / 512}\n4096\n${(8 * MIB) / 512}\n512`)
    expect(
      await guest.sh(
        `cat /sys/block/${disk[0]!.slice(5)}/ro /sys/block/${disk[2]!.slice(5)}/ro; ls /sys/block/${disk[0]!.slice(5)}/mq`
      )
    ).toBe('0\n1\n0  1')
    expect(
      await guest.sh(
        `cat /sys/block/${disk[0]!.slice(5)}/queue/rotational /sys/block/${disk[0]!.slice(5)}/queue/physical_block_size`
      )
    ).toBe('0\n4096')
  })

  test('sg3-utils read what the units say of themselves', async () => {
    expect(await guest.sh(`sg_inq ${sg[0]}`)).toMatch(/version=0x06.*\[SPC-4\].*VIRTIOD.*first-of-them/s)
    expect(await guest.sh(`sg_vpd ${sg[0]}`)).toMatch(/Unit serial.*Device ident.*Block limits.*provisioning/is)
    expect(await guest.sh(`sg_vpd -p sn ${sg[0]}`)).toContain('Unit serial number: first-of-them')
    expect(await guest.sh(`sg_vpd -p di ${sg[0]}`)).toMatch(/VIRTIOD.*NAA.*0x3[0-9a-f]{15}/s)
    expect(await guest.sh(`sg_vpd -p bl ${sg[0]}`)).toMatch(/Maximum unmap LBA count: 8388608/)
    expect(await guest.sh(`sg_vpd -p bdc ${sg[0]}`)).toContain('Non-rotating')
    expect(await guest.sh(`sg_vpd -p lbpv ${sg[0]}`)).toMatch(/\(LBPU\): 1.*\(LBPWS\): 1.*\(LBPWS10\): 1/s)
    expect(await guest.sh(`sg_readcap --long ${sg[1]}`)).toMatch(/lbpme=1, lbprz=1.*Last LBA=16383.*block length=4096/s)
    expect(await guest.sh(`sg_luns ${sg[0]}`)).toMatch(/Lun list length = 24.*0001000000000000.*0002/s)
    expect(await guest.sh(`sg_modes -a ${sg[0]}`)).toMatch(/>> Caching.*>> Control/s)
    expect(await guest.sh(`sg_modes ${sg[2]} -p 8`)).toMatch(/WP=1/)
    const opcodes = await guest.sh(`sg_opcodes ${sg[0]}`)
    for (const name of ['Read(16)', 'Write same(16)', 'Unmap', 'Synchronize cache(10)', 'Get LBA status'])
      expect(opcodes.toLowerCase()).toContain(name.toLowerCase())
    expect(await guest.sh(`sg_opcodes --tmf ${sg[0]}`)).toMatch(/Abort task.*Logical unit reset/s)
    expect(await guest.sh(`sg_get_lba_status --lba=0x10 ${sg[0]}`)).toMatch(/blocks:\s+524272/)
    await guest.sh(`sg_turs ${sg[0]}; sg_requests ${sg[0]}; sg_sync ${sg[0]}; sg_prevent --allow ${sg[0]}`)
    expect(await guest.run(`sg_persist -k ${sg[0]}`)).not.toMatchObject({ exitCode: 0 })
  })

  test('makes a file system and keeps files, flushed and checked', async () => {
    await guest.sh(`mke2fs -q -t ext4 ${disk[0]}
    mount ${disk[0]} /mnt
    dd if=/dev/urandom of=/tmp/seed bs=1M count=2 2> /dev/null
    cd /mnt
    for i in 1 2 3 4 5 6; do dd if=/tmp/seed of=$i bs=$((i * 777)) count=$((i * 21)) skip=$i 2> /dev/null; done
    cat /tmp/seed /tmp/seed /tmp/seed /tmp/seed > big
    find . -type f -not -name sums -exec sha256sum {} + > sums
    cd /
    umount /mnt
    e2fsck -fn ${disk[0]}
    mount ${disk[0]} /mnt
    echo 3 > /proc/sys/vm/drop_caches
    cd /mnt
    sha256sum -c -s sums`)
  })

  test('gives space back with fstrim', async () => {
    await guest.sh('cat /mnt/big /mnt/big > /mnt/doomed; sync')
    const full = allocated(0)
    await guest.sh('rm /mnt/doomed; sync; fstrim /mnt')
    expect(full - allocated(0)).toBeGreaterThanOrEqual(15 * MIB)
    await guest.sh('cd /mnt; echo 3 > /proc/sys/vm/drop_caches; sha256sum -c -s sums')
  })

  test('writes go on over resets of the unit', async () => {
    await guest.sh(`cd /mnt
    (cat /tmp/seed /tmp/seed | dd of=reset bs=64k conv=fsync 2> /dev/null) & writer=$!
    for i in 1 2 3 4 5; do sg_reset -d ${disk[0]}; done
    wait $writer
    echo 3 > /proc/sys/vm/drop_caches
    cat /tmp/seed /tmp/seed | cmp - reset
    rm reset`)
  })

  test('UNMAP, WRITE SAME and VERIFY, beside what lies there', async () => {
    await guest.sh(`dd if=/tmp/seed of=${disk[1]} bs=1M oflag=direct 2> /dev/null`)
    await guest.sh(`sg_unmap --lba=16 --num=32 --force ${sg[1]} || sg_unmap --lba=16 --num=32 ${sg[1]}
    sg_write_same --10 --lba=100 --num=20 --in=/dev/zero --xferlen=4096 ${sg[1]}
    sg_write_same --16 --unmap --lba=200 --num=20 --xferlen=4096 --in=/dev/zero ${sg[1]}
    dd if=/tmp/seed of=/tmp/block bs=4096 count=1 2> /dev/null
    sg_write_same --16 --lba=300 --num=50 --in=/tmp/block --xferlen=4096 ${sg[1]}
    sg_verify --lba=0 --count=1000 ${sg[1]}
    sg_sync ${sg[1]}`)
    const before = imageBytes(1, 0, 2 * MIB)
    const zero = Buffer.alloc(4096 * 32)
    const block = (lba: number, count = 1) => before.subarray(lba * 4096, (lba + count) * 4096)
    expect(block(16, 32).equals(zero)).toBe(true)
    expect(block(100, 20).equals(zero.subarray(0, 20 * 4096))).toBe(true)
    expect(block(200, 20).equals(zero.subarray(0, 20 * 4096))).toBe(true)
    for (let lba = 300; lba < 350; lba++) expect(block(lba).equals(block(0))).toBe(true)
    expect([15, 48, 99, 120, 199, 220, 299, 350].every((lba) => !block(lba).equals(zero.subarray(0, 4096)))).toBe(true)
  })

  test('switches the write cache, and stops and starts a unit', async () => {
    const type = await guest.sh('echo /sys/class/scsi_disk/*:0:0:1/cache_type')
    expect(await guest.sh(`cat ${type}`)).toBe('write back')
    await guest.sh(`echo write through > ${type}
    dd if=/tmp/seed of=${disk[1]} bs=1M count=1 oflag=direct 2> /dev/null
    [ "$(cat ${type})" = 'write through' ]
    echo write back > ${type}`)
    await guest.sh(`sg_start --stop ${sg[1]}`)
    expect(await guest.run(`sg_turs ${sg[1]}`)).toMatchObject({ exitCode: 2 })
    await guest.sh(`sg_start --start ${sg[1]}; sg_turs ${sg[1]}`)
  })

  test('cannot write to a read-only unit', async () => {
    const untouched = statSync(backend.images[2]!).mtimeMs
    expect(await guest.run(`dd if=/dev/zero of=${disk[2]} bs=4k count=1 conv=fsync`)).not.toMatchObject({ exitCode: 0 })
    expect(await guest.run(`sg_raw -s 512 -i /dev/zero ${sg[2]} 2a 00 00 00 00 00 00 00 01 00`)).not.toMatchObject({
      exitCode: 0,
    })
    expect(statSync(backend.images[2]!).mtimeMs).toBe(untouched)
    await guest.sh(`cat ${disk[2]} > /dev/null`)
  })

  test('has had no error so far', () => {
    expect(guest.console).not.toMatch(diskErrors)
  })

  test('sees at once that an image was resized', async () => {
    truncateSync(backend.images[1]!, 96 * MIB)
    backend.refresh()
    await guest.sh(`for i in $(seq 100); do [ $(cat /sys/block/${disk[1]!.slice(5)}/size) = ${(96 * MIB) / 512} ] && exit 0; sleep 0.1; done
    cat /sys/block/${disk[1]!.slice(5)}/size; exit 1`)
    await guest.sh(`dd if=/tmp/seed of=${disk[1]} bs=1M seek=90 oflag=direct 2> /dev/null; sg_readcap ${sg[1]}`)
  })

  test('loses a unit whose file is removed, and gets one when there is a file again', async () => {
    rmSync(backend.images[1]!)
    backend.refresh()
    await guest.sh(
      `for i in $(seq 100); do [ ! -e /sys/block/${disk[1]!.slice(5)} ] && exit 0; sleep 0.1; done; exit 1`
    )
    expect(await guest.sh('lsscsi | wc -l')).toBe('2')
    makeImage(backend.images[1]!, 32 * MIB)
    backend.refresh()
    const found = await guest.sh(`for i in $(seq 100); do
      for disk in /sys/block/sd*; do
        case $(readlink -f $disk/device) in *:0:0:1) [ -b /dev/\${disk##*/} ] && echo \${disk##*/} && exit 0;; esac
      done
      sleep 0.1
    done
    exit 1`)
    await guest.sh(`[ $(cat /sys/block/${found}/size) = ${(32 * MIB) / 512} ]
    dd if=/tmp/seed of=/dev/${found} bs=1M oflag=direct 2> /dev/null
    dd if=/dev/${found} bs=1M count=2 iflag=direct 2> /dev/null | cmp - /tmp/seed`)
    expect(backend.openImages).toBe(3)
  })

  test('keeps its first disk through all of it, and powers off', async () => {
    await guest.sh(
      `cd /mnt; echo 3 > /proc/sys/vm/drop_caches; sha256sum -c -s sums; cd /; umount /mnt; e2fsck -fn ${disk[0]}`
    )
    const { qemuExitCode } = await guest.powerOff()
    expect(qemuExitCode).toBe(0)
  })
})

/**
 * A Linux guest on packed rings (virtio 1.3 §2.8): disks with one queue and with four in one guest, then cards with one
 * pair of queues and with four. What counts is that the guest's driver really uses the format and that every byte is
 * right.
 */
import { closeSync, mkdtempSync, openSync, rmSync, truncateSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest'
import { VIRTIO_F_RING_PACKED } from '../../src/virtio/constants.ts'
import { VIRTIO_NET_F_MRG_RXBUF } from '../../src/virtio/net.ts'
import { whyNoGuest } from '../setup/prerequisites.ts'
import { type Backend, startBackend } from './backend.ts'
import { type Guest, startGuest } from './guest.ts'
import { complaints, hostAddress, hostComplaints, negotiated, queuePackets, TestNetwork, transfer } from './net.ts'
import { whyNoNetwork } from './netns.ts'
import { diskFeatures, WritingGuest } from './writing.ts'

vi.setConfig({ testTimeout: 60_000, hookTimeout: 60_000 })

describe.skipIf(whyNoGuest() !== undefined)('disks on packed rings', () => {
  const queues = [1, 4] as const
  let directory: string
  const backends: Backend[] = []
  let guest: Guest

  beforeAll(async () => {
    directory = mkdtempSync('/var/tmp/virtiod-packed-')
    const qemuArgs: string[] = []
    for (const [i, numQueues] of queues.entries()) {
      const image = join(directory, `disk${i}.img`)
      closeSync(openSync(image, 'w'))
      truncateSync(image, 192 * 2 ** 20)
      const socket = join(directory, `s${i}`)
      backends.push(await startBackend({ kind: 'virtiod', image, socket, numQueues }))
      qemuArgs.push('-chardev', `socket,id=disk${i},path=${socket}`)
      qemuArgs.push('-device', `vhost-user-blk-pci,chardev=disk${i},num-queues=${numQueues},packed=on`)
    }
    guest = await startGuest({ cpus: 4, qemuArgs })
  })
  afterAll(async () => {
    await guest?.kill()
    for (const backend of backends) await backend.stop('SIGKILL')
    rmSync(directory, { recursive: true, force: true })
  })

  test.for(queues.map((count, i) => [count, `vd${'ab'[i]}`] as const))('%i of them: %s', async ([count, name]) => {
    expect((await diskFeatures(guest, name)).has(VIRTIO_F_RING_PACKED)).toBe(true)
    expect(await guest.sh(`ls /sys/block/${name}/mq | wc -l`)).toBe(String(count))
    const writing = await WritingGuest.start(guest, count, name)
    // Enough for every ring (of 128 descriptors) to have gone round many times.
    await writing.progress(10)
    await writing.finish()
    // What goes through the page cache comes in long chains.
    await guest.sh(`head -c 16777216 /dev/urandom > /tmp/big
    dd if=/tmp/big of=/dev/${name} bs=1M conv=fsync 2> /dev/null
    echo 3 > /proc/sys/vm/drop_caches
    head -c 16777216 /dev/${name} | cmp - /tmp/big
    blkdiscard -o 1M -l 4M /dev/${name}
    rm /tmp/big`)
  })

  test('has had no error, and virtiod ends in order', async () => {
    const { console } = await guest.powerOff()
    expect(console).not.toMatch(/I\/O error|id .* out of range|is not a head/)
    for (const backend of backends) expect(await backend.stop()).toMatchObject({ code: 0 })
  })
})

describe.skipIf((await whyNoNetwork()) !== undefined).each([
  [1, ''],
  [4, ''],
  [1, ',mrg_rxbuf=off'],
])('a card on %i pairs of packed rings%s', (queuePairs, device) => {
  let network: TestNetwork
  let guest: Guest

  beforeAll(async () => {
    network = await TestNetwork.start({ tap: 'tap0', queuePairs, persistent: true })
    guest = await network.guest(0, { device: `,packed=on${device}`, cpus: queuePairs })
    await network.serve()
  })
  afterAll(async () => network?.[Symbol.asyncDispose]())

  test('pings, and moves bytes both ways', async () => {
    const features = await negotiated(guest)
    expect(features.has(VIRTIO_F_RING_PACKED)).toBe(true)
    expect(features.has(VIRTIO_NET_F_MRG_RXBUF)).toBe(device === '')
    await guest.sh(`ping -c 3 -i 0.1 -W 5 ${hostAddress.v4}; ping -c 2 -i 0.1 -s 8000 ${hostAddress.v4}`)
    await transfer(guest, hostAddress.v4)
    if (queuePairs > 1) {
      await guest.sh(
        `for cpu in 0 1 2 3; do taskset $(printf %x $((1 << cpu))) ping -c 2 -i 0.1 ${hostAddress.v4}; done`
      )
      expect((await queuePackets(guest)).tx.every((count) => count > 0)).toBe(true)
    }
    expect(await complaints(guest)).toEqual([])
    expect(await hostComplaints(network)).toEqual([])
  })
})

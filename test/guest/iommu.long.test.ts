/**
 * A guest behind a virtual IOMMU (ACCESS_PLATFORM): the addresses in descriptors are the IOMMU's, mapped and unmapped
 * by the guest for each request (`iommu.strict=1`), and virtiod asks QEMU for every translation it lacks. Disks and
 * cards, on split and on packed rings; every byte is checked.
 */
import { closeSync, mkdtempSync, openSync, rmSync, truncateSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest'
import { VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED } from '../../src/virtio/constants.ts'
import { whyNoGuest } from '../setup/prerequisites.ts'
import { type Backend, startBackend } from './backend.ts'
import { type Guest, startGuest } from './guest.ts'
import { complaints, hostAddress, hostComplaints, negotiated, TestNetwork, transfer } from './net.ts'
import { whyNoNetwork } from './netns.ts'
import { diskFeatures, WritingGuest } from './writing.ts'

vi.setConfig({ testTimeout: 60_000, hookTimeout: 60_000 })

/**
 * Translations that were asked for and that the guest's mappings don't allow. Before its disks run there are two: of
 * what the firmware left to QEMU.
 */
const faults = async (guest: Guest): Promise<string[]> =>
  (await guest.sh('dmesg')).split('\n').filter((line) => line.includes('fault addr'))

/** The IOMMU comes before the devices behind it. */
const iommu = ['-device', 'intel-iommu,intremap=off,device-iotlb=on']
const behindIommu = ',iommu_platform=on,ats=on,disable-legacy=on'
const kernelArgs = 'intel_iommu=on iommu.strict=1'

describe.skipIf(whyNoGuest() !== undefined)('disks behind a vIOMMU', () => {
  let directory: string
  const backends: Backend[] = []
  let guest: Guest
  let before: string[]

  beforeAll(async () => {
    directory = mkdtempSync('/var/tmp/virtiod-iommu-')
    const qemuArgs = [...iommu]
    for (const [i, format] of ['off', 'on'].entries()) {
      const image = join(directory, `disk${i}.img`)
      closeSync(openSync(image, 'w'))
      truncateSync(image, 192 * 2 ** 20)
      const socket = join(directory, `s${i}`)
      backends.push(await startBackend({ kind: 'virtiod', image, socket, numQueues: 2 }))
      qemuArgs.push('-chardev', `socket,id=disk${i},path=${socket}`)
      qemuArgs.push('-device', `vhost-user-blk-pci,chardev=disk${i},num-queues=2,packed=${format}${behindIommu}`)
    }
    guest = await startGuest({ cpus: 2, kernelArgs, qemuArgs })
    before = await faults(guest)
  })
  afterAll(async () => {
    await guest?.kill()
    for (const backend of backends) await backend.stop('SIGKILL')
    rmSync(directory, { recursive: true, force: true })
  })

  test.for([
    ['vda', 'split'],
    ['vdb', 'packed'],
  ] as const)('%s, %s', async ([name, format]) => {
    const features = await diskFeatures(guest, name)
    expect(features.has(VIRTIO_F_ACCESS_PLATFORM)).toBe(true)
    expect(features.has(VIRTIO_F_RING_PACKED)).toBe(format === 'packed')
    const writing = await WritingGuest.start(guest, 2, name)
    await writing.progress(8)
    await writing.finish()
  })

  test('has had no error', async () => {
    expect(await faults(guest)).toEqual(before)
    const { console } = await guest.powerOff()
    expect(console).not.toMatch(/I\/O error/)
    for (const backend of backends) expect(await backend.stop()).toMatchObject({ code: 0 })
  })
})

describe.skipIf((await whyNoNetwork()) !== undefined).each(['off', 'on'])(
  'a card behind a vIOMMU, packed=%s',
  (packed) => {
    let network: TestNetwork
    let guest: Guest

    beforeAll(async () => {
      network = await TestNetwork.start({ tap: 'tap0' })
      guest = await network.guest(0, { device: `,packed=${packed}${behindIommu}`, machine: iommu, kernelArgs })
      await network.serve()
    })
    afterAll(async () => network?.[Symbol.asyncDispose]())

    test('pings and moves bytes both ways', async () => {
      const features = await negotiated(guest)
      expect(features.has(VIRTIO_F_ACCESS_PLATFORM)).toBe(true)
      expect(features.has(VIRTIO_F_RING_PACKED)).toBe(packed === 'on')
      const before = await faults(guest)
      await guest.sh(`ping -c 3 -i 0.1 -W 5 ${hostAddress.v4}; ping -c 2 -i 0.1 -s 8000 ${hostAddress.v4}`)
      await transfer(guest, hostAddress.v4, { bytes: 16 << 20 })
      expect(await faults(guest)).toEqual(before)
      expect(await complaints(guest)).toEqual([])
      expect(await hostComplaints(network)).toEqual([])
    })
  }
)

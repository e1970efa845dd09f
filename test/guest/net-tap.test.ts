/**
 * A guest's card on a tap: a Linux guest talks to a network namespace through virtiod, with every offload and without
 * any, with jumbo frames, with queues switched on and off, and while virtiod restarts. What is asserted is that all
 * bytes come through and that neither kernel finds fault with a packet.
 *
 * VIRTIOD_TEST_NETWORK=qemu runs it on QEMU's own tap device.
 */
import { afterAll, afterEach, beforeAll, describe, expect, test, vi } from 'vitest'
import {
  VIRTIO_NET_F_CSUM,
  VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
  VIRTIO_NET_F_CTRL_VQ,
  VIRTIO_NET_F_GUEST_ANNOUNCE,
  VIRTIO_NET_F_GUEST_CSUM,
  VIRTIO_NET_F_GUEST_ECN,
  VIRTIO_NET_F_GUEST_TSO4,
  VIRTIO_NET_F_GUEST_TSO6,
  VIRTIO_NET_F_HOST_ECN,
  VIRTIO_NET_F_HOST_TSO4,
  VIRTIO_NET_F_HOST_TSO6,
  VIRTIO_NET_F_MQ,
  VIRTIO_NET_F_MRG_RXBUF,
  VIRTIO_NET_F_MTU,
  VIRTIO_NET_F_STATUS,
} from '../../src/virtio/net.ts'
import type { Guest } from './guest.ts'
import {
  complaints,
  guestAddress,
  guestMac,
  hostAddress,
  hostComplaints,
  type NetworkOptions,
  negotiated,
  networkKind,
  oneWay,
  queuePackets,
  TestNetwork,
  transfer,
} from './net.ts'
import { whyNoNetwork } from './netns.ts'

vi.setConfig({ testTimeout: 60_000, hookTimeout: 60_000 })

const offloadsOff = 'tx off rx off tso off gso off gro off sg off'
const offloadsOn = 'tx on rx on tso on gso on gro on sg on'

describe.skipIf((await whyNoNetwork()) !== undefined)(`a guest on a tap of ${networkKind}`, () => {
  let network: TestNetwork
  let guest: Guest

  const begin =
    (options: NetworkOptions, device = '', cpus = 1) =>
    async (): Promise<void> => {
      network = await TestNetwork.start(options)
      guest = await network.guest(0, { device, cpus })
      await network.serve(options.queuePairs ?? 1)
    }
  const end = async (): Promise<void> => {
    await network?.[Symbol.asyncDispose]()
  }
  const content = async (): Promise<void> => {
    expect(await complaints(guest)).toEqual([])
    expect(await hostComplaints(network)).toEqual([])
  }
  /** Bytes that have gone through the tap, both ways. */
  const tapBytes = async (): Promise<number> => {
    const [link] = JSON.parse(await network.namespace.sh('ip -s -j link show tap0'))
    return link.stats64.rx.bytes + link.stats64.tx.bytes
  }
  const ping = (words = ''): Promise<string> => guest.sh(`ping -c 3 -i 0.2 -W 5 ${words} ${hostAddress.v4}`)

  describe('with four queue pairs', () => {
    beforeAll(begin({ tap: 'tap0', queuePairs: 4, persistent: true }, '', 4))
    afterAll(end)
    afterEach(content)

    test('has the features that a card should have', async () => {
      expect([...(await negotiated(guest))]).toEqual(
        expect.arrayContaining([
          VIRTIO_NET_F_CSUM,
          VIRTIO_NET_F_GUEST_CSUM,
          VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
          VIRTIO_NET_F_GUEST_TSO4,
          VIRTIO_NET_F_GUEST_TSO6,
          VIRTIO_NET_F_GUEST_ECN,
          VIRTIO_NET_F_HOST_TSO4,
          VIRTIO_NET_F_HOST_TSO6,
          VIRTIO_NET_F_HOST_ECN,
          VIRTIO_NET_F_MRG_RXBUF,
          VIRTIO_NET_F_STATUS,
          VIRTIO_NET_F_CTRL_VQ,
          VIRTIO_NET_F_GUEST_ANNOUNCE,
          VIRTIO_NET_F_MQ,
        ])
      )
      expect(await guest.sh('cat /sys/class/net/eth0/address /sys/class/net/eth0/carrier')).toBe(`${guestMac(0)}\n1`)
    })

    test('pings and is pinged, over IPv4 and IPv6, in one packet and in fragments', async () => {
      await ping()
      await ping('-s 8000')
      await guest.sh(`ping -6 -c 3 -i 0.2 ${hostAddress.v6}`)
      await network.namespace.sh(`ping -q -c 20 -i 0.01 ${guestAddress(0).v4}
      ping -q -c 5 -i 0.01 -s 8000 ${guestAddress(0).v6}`)
    })

    test('exchanges TCP and UDP with every offload', async () => {
      await transfer(guest, hostAddress.v4, { bytes: 128 << 20 })
      await transfer(guest, hostAddress.v6)
      await transfer(guest, hostAddress.v4, { udp: 1400, bytes: 2 << 20 })
      await transfer(guest, hostAddress.v4, { udp: 8000, bytes: 2 << 20 })
    })

    test('exchanges TCP without offloads of the guest, of the tap and of both', async () => {
      const host = (features: string) => network.namespace.sh(`ethtool -K tap0 ${features}`)
      await guest.sh(`ethtool -K eth0 ${offloadsOff}`)
      await transfer(guest, hostAddress.v4, { bytes: 16 << 20 })
      await host('tx off tso off gso off gro off')
      await transfer(guest, hostAddress.v4, { bytes: 16 << 20 })
      await guest.sh(`ethtool -K eth0 ${offloadsOn}`)
      await transfer(guest, hostAddress.v6, { bytes: 16 << 20 })
      await host('tx on tso on gso on gro on')
      await transfer(guest, hostAddress.v4, { bytes: 16 << 20 })
    })

    test.for([4, 2, 1, 4])('has traffic on every one of %i queue pairs, and on no other', async (pairs) => {
      // The driver answers the change before the back-end has heard of it; what is on its way arrives on the old queues.
      await guest.sh(
        `ethtool -L eth0 combined ${pairs} 2> /dev/null || [ $(ls -d /sys/class/net/eth0/queues/rx-* | wc -l) = ${pairs} ]`
      )
      await ping()
      const before = await queuePackets(guest)
      // Each processor sends to a queue (XPS), and the tap answers a flow on the queue that it came from.
      await guest.sh(`for cpu in 0 1 2 3; do
        for direction in "" -R; do
          taskset $(printf %x $((1 << cpu))) iperf3 -c ${hostAddress.v4} -p $((5201 + cpu)) -n 8M $direction > /tmp/$cpu || { cat /tmp/$cpu; exit 1; }
        done &
        jobs="$jobs $!"
      done
      for job in $jobs; do wait $job || exit 1; done`)
      const after = await queuePackets(guest)
      const used = (direction: 'rx' | 'tx') =>
        after[direction].flatMap((count, queue) => (count > (before[direction][queue] ?? 0) ? [queue] : []))
      const wanted = Array.from({ length: pairs }, (_, queue) => queue)
      expect({ rx: used('rx'), tx: used('tx') }).toEqual({ rx: wanted, tx: wanted })
    })

    // QEMU's own tap has no life apart from the guest.
    test.skipIf(networkKind !== 'virtiod').for(['SIGTERM', 'SIGKILL'] as const)(
      'goes on with an open connection when virtiod is ended by %s and started again',
      async (signal) => {
        for (const direction of ['send', 'receive'] as const) {
          const from = await tapBytes()
          const running = oneWay(guest, hostAddress.v4, direction, { bytes: 200 << 20 })
          running.catch(() => undefined)
          await vi.waitFor(async () => expect(await tapBytes()).toBeGreaterThan(from + (8 << 20)), { timeout: 20_000 })
          expect(await network.stopDaemon(signal)).toBe(signal === 'SIGTERM' ? 0 : null)
          await network.startDaemon()
          await running
        }
        await ping()
        expect(await guest.sh('cat /sys/class/net/eth0/carrier')).toBe('1')
      }
    )
  })

  describe('with jumbo frames, on a bridge', () => {
    beforeAll(begin({ tap: 'tap1', bridge: 'br0', mtu: 9000 }, ',host_mtu=9000'))
    afterAll(end)
    afterEach(content)

    test('has the MTU that the device names', async () => {
      expect(await negotiated(guest)).toContain(VIRTIO_NET_F_MTU)
      expect(await guest.sh('cat /sys/class/net/eth0/mtu')).toBe('9000')
      expect(await network.namespace.sh('ip -j link show tap1 | grep -o \'"mtu":[0-9]*\'')).toBe('"mtu":9000')
    })

    test('reaches the namespace through the bridge', async () => {
      expect(await network.namespace.sh('bridge link show dev tap1')).toMatch(/master br0 state forwarding/)
      await ping()
    })

    test('pings with 9000 bytes and no fragments', async () => {
      await ping('-s 8972')
      await network.namespace.sh(`ping -q -c 3 -i 0.01 -M do -s 8972 ${guestAddress(0).v4}
      ping -q -c 3 -i 0.01 -M do -s 8952 ${guestAddress(0).v6}
      ! ping -q -c 1 -W 1 -M do -s 8973 ${guestAddress(0).v4}`)
    })

    test('exchanges TCP, with offloads and with plain packets of 9000 bytes', async () => {
      await transfer(guest, hostAddress.v4)
      await guest.sh(`ethtool -K eth0 ${offloadsOff}`)
      await network.namespace.sh(
        'ethtool -K br0 tx off tso off gso off; ethtool -K tap1 tx off tso off gso off gro off'
      )
      await transfer(guest, hostAddress.v4)
    })
  })

  describe.each([
    ['without mergeable buffers', ',mrg_rxbuf=off'],
    [
      'without offloads and mergeable buffers',
      ',mrg_rxbuf=off,csum=off,gso=off,host_tso4=off,host_tso6=off,host_ecn=off,host_ufo=off' +
        ',guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off',
    ],
    ['of before virtio 1.0, without mergeable buffers', ',disable-modern=on,disable-legacy=off,mrg_rxbuf=off'],
  ])('with a device %s', (_what, device) => {
    beforeAll(begin({ tap: 'tap2' }, device))
    afterAll(end)

    test('pings and exchanges TCP', async () => {
      const features = await negotiated(guest)
      expect(features).not.toContain(VIRTIO_NET_F_MRG_RXBUF)
      expect(features.has(VIRTIO_NET_F_CSUM)).toBe(!device.includes(',csum=off'))
      expect(features.has(VIRTIO_NET_F_GUEST_TSO4)).toBe(!device.includes('guest_tso4=off'))
      await ping()
      await transfer(guest, hostAddress.v4, { bytes: 24 << 20 })
      await transfer(guest, hostAddress.v6, { bytes: 24 << 20 })
      await content()
    })
  })
})

/**
 * Guests on virtiod's switch: they reach each other and the namespace behind the uplink, whatever offloads each of them
 * has, a large file arrives as it was sent, and a guest that has stopped holds nobody up.
 *
 * VIRTIOD_TEST_NETWORK=qemu runs it on QEMU's tap devices and the kernel's bridge.
 */
import { createHash } from 'node:crypto'
import { afterAll, afterEach, beforeAll, describe, expect, test, vi } from 'vitest'
import { VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_MRG_RXBUF } from '../../src/virtio/net.ts'
import type { Guest } from './guest.ts'
import {
  complaints,
  guestAddress,
  guestMac,
  hostAddress,
  hostComplaints,
  negotiated,
  networkKind,
  TestNetwork,
  transfer,
} from './net.ts'
import { whyNoNetwork } from './netns.ts'

vi.setConfig({ testTimeout: 90_000, hookTimeout: 60_000 })

const [first, second, third] = [guestAddress(0), guestAddress(1), guestAddress(2)]

describe.skipIf((await whyNoNetwork()) !== undefined)(`guests on a switch of ${networkKind}`, () => {
  let network: TestNetwork
  let a: Guest
  let b: Guest
  /** Without offloads and mergeable buffers. */
  let plain: Guest

  beforeAll(async () => {
    network = await TestNetwork.start({ tap: 'up0', switchPorts: 3 })
    ;[a, b, plain] = await Promise.all([
      network.guest(0),
      network.guest(1),
      network.guest(2, {
        device: ',mrg_rxbuf=off,csum=off,guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off',
      }),
    ])
  })
  afterAll(async () => network?.[Symbol.asyncDispose]())
  afterEach(async () => {
    for (const guest of [a, b, plain]) expect(await complaints(guest)).toEqual([])
    expect(await hostComplaints(network)).toEqual([])
  })

  test('ping each other', async () => {
    for (const [guest, others] of [
      [a, [second, third]],
      [b, [first, third]],
      [plain, [first, second]],
    ] as const) {
      for (const other of others)
        await guest.sh(
          `ping -c 2 -i 0.1 ${other.v4}; ping -6 -c 2 -i 0.1 ${other.v6}; ping -c 2 -i 0.1 -s 8000 ${other.v4}`
        )
    }
  })

  test('exchange TCP and UDP', async () => {
    await transfer(a, second.v4, { bytes: 96 << 20 })
    await transfer(b, first.v6, { bytes: 48 << 20 })
    await transfer(a, second.v4, { udp: 1400, bytes: 2 << 20 })
  })

  test('exchange TCP with a guest that has no offloads and no mergeable buffers', async () => {
    expect((await negotiated(a)).has(VIRTIO_NET_F_GUEST_TSO4)).toBe(true)
    const features = await negotiated(plain)
    for (const bit of [VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_MRG_RXBUF])
      expect(features.has(bit)).toBe(false)
    await transfer(a, third.v4, { bytes: 32 << 20 })
    await transfer(plain, second.v6, { bytes: 32 << 20 })
  })

  test('reach the namespace behind the uplink', async () => {
    await network.serve()
    for (const guest of [a, plain]) {
      await guest.sh(`ping -c 2 -i 0.1 ${hostAddress.v4}; ping -6 -c 2 -i 0.1 ${hostAddress.v6}`)
      await transfer(guest, hostAddress.v4, { bytes: 32 << 20 })
    }
    await network.namespace.sh(`for i in ${first.v4} ${second.v4} ${third.v4}; do ping -q -c 2 -i 0.01 $i; done`)
  })

  test('hand over a file of 1 GiB', { timeout: 130_000 }, async () => {
    // Guests of 256 MiB can't keep it, so it has a rule: 8 MiB of numbers, 128 times, a different line before each.
    const rounds = 128
    const numbers = Buffer.from(Array.from({ length: 170_000 }, (_, i) => `${i + 1}\n`).join('')).subarray(0, 1 << 20)
    const seed = Buffer.concat(Array.from({ length: 8 }, () => numbers))
    const hash = createHash('md5')
    for (let round = 1; round <= rounds; round++) hash.update(`round ${round}\n`).update(seed)

    // nc itself moves 1 KiB at a time; with -e the program has the connection to itself.
    await b.sh(`cat > /tmp/receive << 'END'
#!/bin/sh
exec md5sum > /tmp/sum
END
    chmod 755 /tmp/receive`)
    await a.sh(`seq 170000 | head -c 1048576 > /tmp/numbers
    for i in 1 2 3 4 5 6 7 8; do cat /tmp/numbers; done > /tmp/seed
    cat > /tmp/send << 'END'
#!/bin/sh
for i in $(seq ${rounds}); do echo round $i; cat /tmp/seed; done
END
    chmod 755 /tmp/send`)
    const receiving = b.sh('nc -l -p 7000 -e /tmp/receive; cat /tmp/sum', 120_000)
    receiving.catch(() => undefined)
    await a.sh(`until nc ${second.v4} 7000 -e /tmp/send 2> /tmp/refused; do sleep 0.1; done`, 120_000)
    expect(await receiving).toBe(`${hash.digest('hex')}  -`)
  })

  test('are not disturbed by a third one that has stopped and is flooded', async () => {
    const sentDatagrams = async (): Promise<number> =>
      Number(await a.sh("awk '/^Udp: [0-9]/ { print $5 }' /proc/net/snmp"))
    // The sender must not lose its idea of where the third guest is.
    await a.sh(`ip neigh replace ${third.v4} lladdr ${guestMac(2)} dev eth0 nud permanent
    timeout 60 iperf3 -c ${third.v4} -u -b 60M -l 1400 -t 50 > /tmp/flood 2>&1 & echo $! > /tmp/pid`)
    const from = await sentDatagrams()
    await vi.waitFor(async () => expect(await sentDatagrams()).toBeGreaterThan(from + 1000), { timeout: 10_000 })
    await plain.qmp('stop')
    const stopped = await sentDatagrams()
    await transfer(a, second.v4)
    await transfer(b, first.v4)
    // All the time a was sending to it, many times what its ring takes.
    expect(await sentDatagrams()).toBeGreaterThan(stopped + 2000)
    await plain.qmp('cont')
    await a.sh('kill $(cat /tmp/pid)')
    await plain.sh(`ping -c 2 -i 0.1 ${first.v4}`)
  })

  test('go on without one that is killed, and with the one that takes its place', async () => {
    await plain.kill()
    await transfer(a, second.v4)
    plain = await network.guest(2)
    await transfer(plain, first.v4)
  })
})

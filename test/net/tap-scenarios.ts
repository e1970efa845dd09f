/**
 * The control half on the kernel's taps. Each scenario runs in a child that is alone in a network namespace (tap.test.ts),
 * so it may use any name; it throws when something is not as it should be.
 */
import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { closeSync, openSync, readdirSync, readlinkSync, readSync } from 'node:fs'
import * as v from 'valibot'
import definition from '../../devices/net/index.ts'
import { type NetOptions, netOptions } from '../../devices/net/options.ts'
import type { NetQueueData } from '../../devices/net/shared.ts'
import { ConfigError, type Device } from '../../src/device/index.ts'
import { networkHost } from '../../src/engine/network.ts'
import { native } from '../../src/native.ts'
import { featureSet } from '../../src/virtio/features.ts'
import * as net from '../../src/virtio/net.ts'
import { FakeHost } from './fake-network.ts'

/** What the child is to be. */
export interface Scenario {
  /** Shell commands that run before it, as root. */
  readonly setup?: string
  /** It has no privileges. */
  readonly nobody?: boolean
  run(): Promise<void> | void
}

const VERSION_1 = 1n << 32n
const MQ = VERSION_1 | featureSet(net.VIRTIO_NET_F_MQ)

class RealHost extends FakeHost {
  override readonly network = networkHost
}

function sh(command: string): string {
  return execFileSync('sh', ['-ec', command], { encoding: 'utf8' })
}

function open(options: Partial<NetOptions>, host = new RealHost()): Device<NetQueueData> {
  return definition.open(v.parse(netOptions, options), host) as Device<NetQueueData>
}

/** Fds of taps that are open. */
function tapFds(): number {
  return readdirSync('/proc/self/fd').filter((fd) => {
    try {
      return readlinkSync(`/proc/self/fd/${fd}`) === '/dev/net/tun'
    } catch {
      return false
    }
  }).length
}

/** Opening is refused with this code, and leaves nothing open. Returns the message. */
function refused(code: string, options: Partial<NetOptions>): string {
  const before = tapFds()
  let error: unknown
  try {
    open(options).close()
  } catch (thrown) {
    error = thrown
  }
  assert(error instanceof ConfigError, `${JSON.stringify(options)}: ${error ?? 'it was accepted'}`)
  assert.equal(error.code, code, error.message)
  assert.equal(tapFds(), before)
  return error.message
}

const about = (name: string): string => sh(`ip -d link show ${name}`)
const queues = (name: string): number[] =>
  /numqueues (\d+) numdisabled (\d+)/.exec(about(name))?.slice(1).map(Number) ?? []
const exists = (name: string): boolean => typeof networkHost.link(name) !== 'number'
/** Features that ethtool shows as on. */
const offloadsOf = (name: string): string[] =>
  sh(`ethtool -k ${name}`)
    .split('\n')
    .filter((line) =>
      /^\s*(tx-checksum-ip-generic|tx-tcp-segmentation|tx-tcp6-segmentation|tx-udp-segmentation): on/.test(line)
    )
    .map((line) => line.trim().split(':')[0]!)

export const scenarios: Readonly<Record<string, Scenario>> = {
  'a successor goes on with the queues of an inherited tap, and changes nothing before it may': {
    run() {
      const fds = [0, 1].map(() => native.tapOpen('tap0', true))
      const before = new RealHost()
      const old = open({ 'tap-fd': fds.join() }, before)
      old.negotiated!(MQ)
      old.ringActive!(0, true)
      assert.deepEqual(queues('tap0'), [1, 1])
      const kept = before.handover.kept.get(`tap-fd:${fds.join()}`)!
      const after = new RealHost()
      const copies = kept.fds.map((fd) => native.dup(fd))
      after.handover.inherited.set(`tap-fd:${fds.join()}`, { fds: copies, facts: kept.facts })
      const device = open({ 'tap-fd': fds.join() }, after)
      device.negotiated!(VERSION_1 | featureSet(1, net.VIRTIO_NET_F_MQ))
      for (const queue of [0, 2]) device.ringActive!(queue, true)
      assert.deepEqual(device.queueData.tapFds, copies)
      assert.deepEqual(queues('tap0'), [1, 1])
      assert.deepEqual(offloadsOf('tap0'), [])
      device.takeOver!()
      assert.deepEqual(queues('tap0'), [2, 0])
      assert.deepEqual(offloadsOf('tap0'), ['tx-checksum-ip-generic'])
      for (const fd of fds) closeSync(fd)
      device.close()
      // The fds were passed on: they are the successor's to close, and with the last one the tap is gone.
      assert.equal(tapFds(), 0)
      assert(!exists('tap0'))
    },
  },

  'a tap is created, set up, and gone when the card is': {
    run() {
      const device = open({ tap: 'tap0', mtu: 9000 })
      assert.match(about('tap0'), /[<,]UP[,>]/)
      assert.match(about('tap0'), / mtu 9000 /)
      assert.match(about('tap0'), /type tap pi off vnet_hdr on persist off/)
      assert.equal(device.queueData.mtu, 9000)
      assert.equal(device.queueData.tapFds.length, 1)
      const info = networkHost.tapInfo(device.queueData.tapFds[0]!)
      assert(typeof info !== 'number')
      assert.equal(info.headerSize, 10)
      device.negotiated!(VERSION_1)
      const later = networkHost.tapInfo(device.queueData.tapFds[0]!)
      assert(typeof later !== 'number' && later.headerSize === 12)
      // Non-blocking: nothing is there to be read.
      assert.throws(() => readSync(device.queueData.tapFds[0]!, new Uint8Array(2000)), { code: 'EAGAIN' })
      device.close()
      assert(!exists('tap0'))
      assert.equal(tapFds(), 0)
    },
  },

  'queues of a multi-queue tap take part while their receive rings are active': {
    run() {
      const device = open({ tap: 'tap0', 'queue-pairs': 4 })
      assert.match(about('tap0'), / multi_queue /)
      assert.deepEqual(queues('tap0'), [0, 4])
      device.negotiated!(MQ)
      for (const queue of [0, 1, 2, 3]) device.ringActive!(queue, true)
      assert.deepEqual(queues('tap0'), [2, 2])
      device.ringActive!(2, false)
      assert.deepEqual(queues('tap0'), [1, 3])
      device.reset!()
      assert.deepEqual(queues('tap0'), [0, 4])
      device.close()
      assert(!exists('tap0'))
    },
  },

  'offloads follow the driver': {
    run() {
      const device = open({ tap: 'tap0' })
      assert.deepEqual(offloadsOf('tap0'), [])
      device.negotiated!(VERSION_1 | featureSet(net.VIRTIO_NET_F_GUEST_CSUM, net.VIRTIO_NET_F_GUEST_TSO4))
      assert.deepEqual(offloadsOf('tap0'), ['tx-checksum-ip-generic', 'tx-tcp-segmentation'])
      device.negotiated!(VERSION_1 | device.features)
      const uso = (device.features & featureSet(net.VIRTIO_NET_F_HOST_USO)) === 0n ? [] : ['tx-udp-segmentation']
      const all = ['tx-checksum-ip-generic', 'tx-tcp-segmentation', 'tx-tcp6-segmentation', ...uso]
      assert.deepEqual(offloadsOf('tap0'), all)
      device.reported!(2, { kind: 'offloads', features: featureSet(net.VIRTIO_NET_F_GUEST_CSUM) })
      assert.deepEqual(offloadsOf('tap0'), ['tx-checksum-ip-generic'])
      device.reset!()
      assert.deepEqual(offloadsOf('tap0'), [])
      device.close()
    },
  },

  'an existing tap with one queue stays as it was': {
    setup: 'ip tuntap add tap0 mode tap',
    run() {
      const device = open({ tap: 'tap0' })
      device.negotiated!(VERSION_1 | device.features)
      refused('ERR_NET_TAP_BUSY', { tap: 'tap0' })
      assert.match(refused('ERR_NET_TAP_BUSY', { tap: 'tap0', 'queue-pairs': 2 }), /tap0 is in use/)
      device.close()
      assert.match(about('tap0'), /persist on/)
      assert.deepEqual(offloadsOf('tap0'), [])
      const fd = native.tapOpen('tap0', false)
      const info = networkHost.tapInfo(fd)
      assert(typeof info !== 'number' && info.headerSize === 10)
      closeSync(fd)
      assert.match(
        refused('ERR_NET_TAP_QUEUES', { tap: 'tap0', 'queue-pairs': 2 }),
        /a single queue, and --queue-pairs asks/
      )
      // And is free again.
      open({ tap: 'tap0' }).close()
    },
  },

  'an existing tap with several queues serves one pair or more': {
    setup: 'ip tuntap add tap0 mode tap multi_queue',
    run() {
      for (const pairs of [1, 3]) {
        const device = open({ tap: 'tap0', 'queue-pairs': pairs })
        assert.deepEqual(queues('tap0'), [0, pairs])
        // The kernel would let others share it.
        refused('ERR_NET_TAP_BUSY', { tap: 'tap0', 'queue-pairs': 2 })
        refused('ERR_NET_TAP_BUSY', { tap: 'tap0' })
        device.close()
        assert(exists('tap0'))
      }
    },
  },

  'a tap that is down and open by another is told by the kernel': {
    setup: 'ip tuntap add tap0 mode tap',
    run() {
      const fd = native.tapOpen('tap0', false)
      refused('ERR_NET_TAP_BUSY', { tap: 'tap0' })
      closeSync(fd)
      open({ tap: 'tap0' }).close()
    },
  },

  'other kinds of links': {
    setup: 'ip link add br0 type bridge; ip tuntap add tun0 mode tun; ip link set lo up; ip link set tun0 up',
    run() {
      for (const name of ['lo', 'br0', 'tun0']) {
        assert.match(refused('ERR_NET_TAP_KIND', { tap: name }), new RegExp(`--tap: ${name} is a link of another kind`))
        refused('ERR_NET_TAP_KIND', { tap: name, 'queue-pairs': 2 })
        assert.match(refused('ERR_NET_TAP_KIND', { switch: 's', uplink: name }), /^--uplink: /)
      }
    },
  },

  'a bridge': {
    setup:
      'ip link add br0 type bridge; ip link add br1 type bridge; ip tuntap add old0 mode tap; ip link set old0 master br1',
    run() {
      const device = open({ tap: 'tap0', bridge: 'br0' })
      assert.match(about('tap0'), / master br0 /)
      device.close()
      assert.match(refused('ERR_NET_BRIDGE', { tap: 'tap0', bridge: 'br9' }), /^--bridge: there is no br9/)
      assert.match(refused('ERR_NET_BRIDGE', { tap: 'tap0', bridge: 'lo' }), /^--bridge: lo is no bridge/)
      assert.match(refused('ERR_NET_BRIDGE', { tap: 'old0', bridge: 'br0' }), /old0 is on another bridge/)
      assert(!exists('tap0'))
      open({ tap: 'old0', bridge: 'br1' }).close()
      assert.match(about('old0'), / master br1 /)
      const uplinked = open({ switch: 's', uplink: 'up0', bridge: 'br0' })
      assert.match(about('up0'), / master br0 /)
      uplinked.close()
      assert(!exists('up0'))
    },
  },

  'an MTU that the tap does not take': {
    run() {
      assert.match(refused('ERR_NET_MTU', { tap: 'tap0', mtu: 65535 }), /^--mtu: tap0 can't be given an MTU of 65535/)
      assert(!exists('tap0'))
      const device = open({ tap: 'tap0' })
      assert.equal(device.network!.setMtu(65535), false)
      assert.equal(device.network!.setMtu(4000), true)
      assert.equal(device.queueData.mtu, 4000)
      device.close()
    },
  },

  'nobody may create a tap or take somebody’s': {
    nobody: true,
    setup: 'ip tuntap add theirs mode tap user 12345',
    run() {
      const message = refused('ERR_NET_TAP_PERMISSION', { tap: 'tap0', 'queue-pairs': 2 })
      assert.match(
        message,
        /this user may not create the tap tap0 \(EPERM\)\. .*ip tuntap add tap0 mode tap vnet_hdr multi_queue user \d+ && ip link set tap0 up; a --switch without --uplink needs none of this\.$/
      )
      assert.match(refused('ERR_NET_TAP_PERMISSION', { tap: 'theirs' }), /may not open the tap theirs/)
      assert.match(refused('ERR_NET_TAP_PERMISSION', { switch: 's', uplink: 'tap0' }), /^--uplink: /)
      // This is what needs no root.
      open({ switch: 's' }).close()
    },
  },

  'a tap that root made for nobody': {
    nobody: true,
    setup: [
      'ip link add br0 type bridge',
      'for tap in mine down; do ip tuntap add $tap mode tap user $NOBODY; done',
      'ip tuntap add many mode tap multi_queue user $NOBODY',
      'ip link set mine up; ip link set many up',
    ].join('; '),
    run() {
      const device = open({ tap: 'mine', mtu: 1500 })
      assert.equal(device.network!.setMtu(1500), true)
      device.close()
      open({ tap: 'many', 'queue-pairs': 3 }).close()
      assert.match(refused('ERR_NET_TAP_LINK', { tap: 'down' }), /down is down, .*ip link set down up/)
      assert.match(
        refused('ERR_NET_MTU', { tap: 'mine', mtu: 9000 }),
        /\(EPERM\)\. Do it as root: ip link set mine mtu 9000/
      )
      assert.match(
        refused('ERR_NET_BRIDGE', { tap: 'mine', bridge: 'br0' }),
        /\(EPERM\)\. Do it as root: ip link set mine master br0/
      )
      const free = open({ tap: 'mine' })
      assert.deepEqual([free.network!.setMtu(1500), free.network!.setMtu(1501)], [true, false])
      free.close()
    },
  },

  'there is no /dev/net/tun': {
    setup: 'mount -t tmpfs tmpfs /dev/net',
    run() {
      assert.match(refused('ERR_NET_TAP_DEVICE', { tap: 'tap0' }), /there is no \/dev\/net\/tun \(ENOENT\)/)
    },
  },

  'there is a /dev/net/tun for others': {
    nobody: true,
    setup: 'mount -t tmpfs -o mode=755 tmpfs /dev/net; mknod /dev/net/tun c 10 200; chmod 600 /dev/net/tun',
    run() {
      assert.match(refused('ERR_NET_TAP_PERMISSION', { tap: 'tap0' }), /may not open \/dev\/net\/tun \(EACCES\)/)
    },
  },

  'fds that are handed over': {
    run() {
      const fds = [native.tapOpen('tap0', true), native.tapOpen('tap0', true)]
      sh('ip link set tap0 up')
      native.setNonblock(fds[1]!, false)
      native.tapSetHeaderSize(fds[0]!, 14)
      const device = open({ 'tap-fd': fds.join() })
      assert.deepEqual(device.queueData.tapFds, fds)
      assert.equal(device.numQueues, 5)
      assert.deepEqual(queues('tap0'), [0, 2])
      assert.throws(() => readSync(fds[1]!, new Uint8Array(2000)), { code: 'EAGAIN' })
      device.close()
      // They are still open, and as they were.
      assert.deepEqual(queues('tap0'), [2, 0])
      const info = networkHost.tapInfo(fds[0]!)
      assert(typeof info !== 'number' && info.headerSize === 14)
      // Handed over detached.
      native.tapSetQueue(fds[0]!, false)
      open({ 'tap-fd': fds.join(), 'queue-pairs': 2 }).close()
      assert.deepEqual(queues('tap0'), [2, 0])
      // One of several: the other one is not ours.
      open({ 'tap-fd': `${fds[1]}` }).close()
      assert.deepEqual(queues('tap0'), [2, 0])
      open({ 'tap-fd': fds.join(), mtu: 2000 }).close()
      assert.match(about('tap0'), / mtu 2000 /)
    },
  },

  'fds that are no queues of one tap': {
    run() {
      const fail = (list: string): string => refused('ERR_NET_TAP_FD', { 'tap-fd': list })
      assert.match(fail('999'), /^--tap-fd: fd 999 is not open/)
      const file = openSync('/etc/passwd', 'r')
      const bare = openSync('/dev/net/tun', 'r+')
      for (const [fd, code] of [
        [file, 'ENOTTY'],
        [bare, 'EBADFD'],
      ] as const)
        assert.match(fail(`${fd}`), new RegExp(`fd ${fd} is no open tap \\(${code}\\)`))
      const a = native.tapOpen('tapa', true)
      const b = native.tapOpen('tapb', true)
      assert.match(fail(`${a},${b}`), /is of the tap tapa, fd \d+ of tapb/)
      assert.match(fail(`${a},${a}`), /is given twice/)
      const twin = native.dup(a)
      assert.match(fail(`${a},${twin}`), /is the same queue as one before it/)
      assert.deepEqual(queues('tapa'), [1, 0])
      open({ 'tap-fd': `${a}` }).close()
    },
  },

  'the announcement of a guest gets out': {
    run() {
      const device = open({ tap: 'tap0' })
      const listener = native.packetSocket('tap0', false)
      assert(listener >= 0)
      for (const features of [0n, VERSION_1]) {
        device.negotiated!(features)
        device.network!.announce(Uint8Array.of(0x52, 0x54, 0, 1, 2, 3))
        const packet = Buffer.alloc(2000)
        const length = readSync(listener, packet)
        assert.equal(length, 60)
        assert.equal(packet.toString('hex', 0, 14), 'ffffffffffff5254000102038035')
      }
      // A tap that is down takes nothing, and nothing else happens.
      sh('ip link set tap0 down')
      device.network!.announce(Uint8Array.of(0x52, 0x54, 0, 1, 2, 3))
      closeSync(listener)
      device.close()
    },
  },

  'a tap that is removed under the card': {
    setup: 'ip tuntap add tap0 mode tap multi_queue',
    run() {
      const device = open({ tap: 'tap0', 'queue-pairs': 2 })
      sh('ip link delete tap0')
      device.negotiated!(MQ)
      device.ringActive!(0, true)
      assert.equal(device.queueData.tapFds.length, 2)
      device.reset!()
      device.close()
      assert.equal(tapFds(), 0)
    },
  },
}

/** What a device's control half can do to taps and network links, over the addon. It decides nothing. */
import { readSync, writeSync } from 'node:fs'
import type { LinkInfo, NetworkHost, TapInfo } from '../device/index.ts'
import { native } from '../native.ts'

// <linux/if_tun.h>, <linux/if.h>
const IFF_TUN = 0x0001
const IFF_MULTI_QUEUE = 0x0100
const IFF_DETACH_QUEUE = 0x0400
const IFF_NO_PI = 0x1000
const IFF_VNET_HDR = 0x4000
const IFF_UP = 0x1

const EINVAL = -22
/** Twice a tap's default queue (txqueuelen). */
const MAX_DISCARDED = 2048

// What Native.tapInfo and Native.linkInfo fill in.
const TAP_FLAGS = 0
const TAP_HEADER_SIZE = 1
const TAP_WORDS = 3
const LINK_INDEX = 0
const LINK_FLAGS = 1
const LINK_MTU = 2
const LINK_MAC = 3
const LINK_BRIDGE = 9
const LINK_MASTER = 10
const LINK_WORDS = 11

export const networkHost: NetworkHost = {
  openTap: (name, multiQueue) => native.tapOpen(name, multiQueue),

  tapInfo: (fd): TapInfo | number => {
    const out = new Int32Array(TAP_WORDS)
    const name = native.tapInfo(fd, out)
    if (typeof name === 'number') return name
    const flags = out[TAP_FLAGS]!
    return {
      name,
      vnetHeader: (flags & IFF_VNET_HDR) !== 0,
      multiQueue: (flags & IFF_MULTI_QUEUE) !== 0,
      attached: (flags & IFF_DETACH_QUEUE) === 0,
      tun: (flags & IFF_TUN) !== 0,
      packetInfo: (flags & IFF_NO_PI) === 0,
      headerSize: out[TAP_HEADER_SIZE]!,
    }
  },

  setTapHeaderSize: (fd, size) => native.tapSetHeaderSize(fd, size),
  setTapOffloads: (fd, offloads) => native.tapSetOffload(fd, offloads),
  setTapQueue: (fd, attached) => native.tapSetQueue(fd, attached),
  setNonblocking: (fd) => native.setNonblock(fd, true),

  link: (name): LinkInfo | number => {
    const out = new Int32Array(LINK_WORDS)
    const result = native.linkInfo(name, out)
    if (result < 0) return result
    return {
      index: out[LINK_INDEX]!,
      up: (out[LINK_FLAGS]! & IFF_UP) !== 0,
      mtu: out[LINK_MTU]!,
      mac: Uint8Array.from(out.subarray(LINK_MAC, LINK_MAC + 6)),
      bridge: out[LINK_BRIDGE] === 1,
      master: out[LINK_MASTER]!,
    }
  },

  setLinkUp: (name, up) => native.linkSetUp(name, up),
  setLinkMtu: (name, mtu) => native.linkSetMtu(name, mtu),
  addToBridge: (bridge, name) => native.bridgeAdd(bridge, name),

  discardPackets: (fd) => {
    // A read takes a whole packet, however little of it is asked for.
    const start = new Uint8Array(16)
    let count = 0
    try {
      while (count < MAX_DISCARDED && readSync(fd, start) > 0) count++
    } catch {
      // Empty, down, detached or gone: nothing that waits there can come to a driver.
    }
    return count
  },

  writePacket: (fd, packet) => {
    try {
      return writeSync(fd, packet)
    } catch (error) {
      return (error as NodeJS.ErrnoException).errno ?? EINVAL
    }
  },
}

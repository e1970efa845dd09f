/** What a review of the card found: one guest's oddities that cost the others their turn, and a tap that is gone. */
import { describe, expect, test } from 'vitest'
import { PacketHeader } from '../../devices/net/header.ts'
import { NO_CHAINS, Receiver } from '../../devices/net/receiver.ts'
import { allocateCounters, NetCounters } from '../../devices/net/shared.ts'
import { TapReceive } from '../../devices/net/tap-receive.ts'
import type { CopyBatch, IoBuffer, QueueContext } from '../../src/device/index.ts'
import type { IoRing } from '../../src/engine/ring.ts'
import { Watches } from '../../src/engine/watches.ts'
import { withDependents } from '../../src/frontend/net-features.ts'
import { Chain } from '../../src/virtio/chain.ts'
import { featureSet } from '../../src/virtio/features.ts'
import { GuestMemory } from '../../src/virtio/memory.ts'
import * as net from '../../src/virtio/net.ts'
import { build, TCPV4 } from './frames.ts'
import { guestsOn, mac, netBackend, passesAtLast } from './support.ts'

const POLLIN = 1
const POLLERR = 8
const MORE = 2

describe('a watch', () => {
  function watching(): { watches: Watches; polls: number[] } {
    const polls: number[] = []
    const ring = { pollAdd: (fd: number) => void polls.push(fd), cancel: () => {} }
    const watches = new Watches(ring as unknown as IoRing, 0, 6, 7)
    watches.watch(5)
    return { watches, polls }
  }

  test('is started again when the kernel ended it for want of room', () => {
    const { watches, polls } = watching()
    expect(watches.event(0, POLLIN, MORE)).toBe(5)
    expect(polls).toEqual([5])
    expect(watches.event(0, POLLIN, 0)).toBe(5)
    expect(polls).toEqual([5, 5])
    expect(watches.armed).toBe(true)
  })

  // Else the iothread turns round for ever: each poll of a tap that was removed ends at once.
  test.each([
    ['a tap that was removed', POLLIN | POLLERR],
    ['an fd that cannot be polled', -9],
  ])('ends with %s: its handler is told once', (_, result) => {
    const { watches, polls } = watching()
    expect(watches.event(0, result, 0)).toBe(5)
    expect(polls).toEqual([5])
    expect(watches.armed).toBe(false)
    watches.unwatch(5)
    watches.watch(5)
    expect(polls).toEqual([5, 5])
  })
})

// Looking at one chain may take a millisecond: an indirect table of 32,768 descriptors of no bytes.
test('buffers that are none are given back a few at a time', () => {
  const bad = { writable: 0 } as Chain
  let taken = 0
  let given = 0
  const context = {
    features: 1n << 32n,
    queueSize: 1024,
    active: true,
    take: () => (taken++ < 1000 ? bad : undefined),
    give: () => given++,
  } as unknown as QueueContext
  const counters = new NetCounters(allocateCounters(1), 0)
  const receiver = new Receiver(context, counters, { run: () => {} } as CopyBatch, undefined)
  const buffer = { bytes: new Uint8Array(100), address: 0 } as IoBuffer
  for (let round = 1; round <= 3; round++) {
    const before = taken
    expect(receiver.deliverBuffer(new PacketHeader(0n), buffer, 0, 60)).toBe(NO_CHAINS)
    expect(receiver.dirty).toBe(true)
    receiver.flush()
    expect(taken - before).toBeGreaterThan(0)
    expect(taken - before).toBeLessThanOrEqual(32)
    expect(given).toBe(taken)
  }
})

/** A handler on a tap that has one packet, whose header has `flags`. Returns the flags that the driver sees. */
function flagsSeen(features: bigint, flags: number): number {
  const bytes = new Uint8Array(4096)
  const memory = new GuestMemory([{ gpa: 0, size: 4096, hva: 0, buffer: bytes.buffer }])
  const chain = new Chain(0)
  chain.single(memory, 64, 2048, true)
  const chains: Chain[] = [chain]
  let held = 0
  const packets = {
    room: 0,
    ended: -11,
    get held() {
      return held
    },
    add: () => ++held > 0,
    receive: () => {
      bytes[64] = flags
      return 1
    },
    length: () => 12 + 60,
    shift: () => chain,
    pop: () => undefined,
  }
  const given: number[] = []
  const context = {
    features,
    queueSize: 256,
    active: true,
    take: () => chains.pop(),
    give: (_: Chain, written: number) => given.push(written),
    io: {
      packetReceiver: () => packets,
      copyBatch: () => ({ run: () => {} }),
      allocate: (length: number) => ({ bytes: new Uint8Array(length), address: 0 }),
      watch: () => {},
    },
  } as unknown as QueueContext
  const handler = new TapReceive(context, 5, 1500, new NetCounters(allocateCounters(1), 0), undefined)
  expect(handler.receive()).toBe(1)
  expect(given).toEqual([72])
  return bytes[64]!
}

// A bridge passes on what the host's card has checked, and the kernel tells every reader of a tap.
test('a driver without GUEST_CSUM sees no flags', () => {
  const { VIRTIO_NET_HDR_F_DATA_VALID: VALID } = net
  expect(flagsSeen(1n << 32n, VALID)).toBe(0)
  expect(flagsSeen((1n << 32n) | featureSet(net.VIRTIO_NET_F_GUEST_CSUM), VALID)).toBe(VALID)
})

describe('a card on a switch', () => {
  const current = netBackend({ extra: ['--queue-pairs', '2'] })

  test('a packet is cut into no more segments than its receiver has room for', () => {
    const bare = { without: withDependents(net.VIRTIO_NET_F_GUEST_CSUM), rxBuffers: 0 }
    using guests = guestsOn(current(), {}, bare, {})
    const [a, b, c] = guests
    const built = build({ ...TCPV4, gsoSize: 8, payload: 16_000 })
    built.bytes.set(mac(2))
    // 2000 segments; 512 packets wait at most, and the first one that doesn't fit ends it.
    expect(current().dropsDuring(1, 0, () => a.send(built.bytes, { header: built.header }))).toEqual({ no_buffers: 1 })
    expect(current().dropsDuring(1, 0, () => a.send(built.bytes, { header: built.header }))).toEqual({ no_buffers: 1 })
    passesAtLast(a, c)
    expect(b.net.tryReceive()).toBeUndefined()
  })

  // QEMU compares it with the pairs that it was asked for, and connects again and again when a ring is refused later.
})

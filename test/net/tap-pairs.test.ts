/** Several queue pairs of a tap: which of them send and receive, as the driver says and as rings are enabled. */
import { describe, expect, test } from 'vitest'
import { withDependents } from '../../src/frontend/net-features.ts'
import * as net from '../../src/virtio/net.ts'
import { whyNoNamespace } from '../native/network.ts'
import { frame, type Guest, guestsOn, KINDS } from './support.ts'
import { inward, onTap, type Setup } from './wire.ts'

const PAIRS = 3
const options = { pairs: PAIRS, rxBuffers: 32 }
/** As with QEMU, which keeps the control queue. */
const KEPT = withDependents(net.VIRTIO_NET_F_CTRL_VQ).filter((bit) => bit !== net.VIRTIO_NET_F_MQ)

describe.skipIf(whyNoNamespace() !== undefined)('pairs of a tap', () => {
  for (const kind of KINDS) {
    describe(kind, () =>
      pairs(onTap({ kind, cards: 1, link: ['--tap', 'tap0'], extra: ['--queue-pairs', String(PAIRS)] }))
    )
  }
})

function pairs({ backend, wire: on }: Setup): void {
  /** Sends in many flows; returns the pairs that they came on. */
  const land = (guest: Guest): Set<number> => {
    const used = new Set<number>()
    for (let i = 0; i < 60; i++) {
      const bytes = inward(100)
      bytes.set([i, i * 3], 6)
      bytes[6] = bytes[6]! & 0xfe
      on().send(bytes)
      used.add(guest.gets(bytes).queue)
    }
    return used
  }
  const sends = (guest: Guest): void => {
    for (let queue = 0; queue < PAIRS; queue++) {
      for (let i = 0; i < 3; i++) {
        const bytes = frame({ from: 1, size: 100 })
        guest.send(bytes, { queue })
        on().gets(bytes)
      }
    }
  }

  test('a driver receives on as many as it says, and sends on all', () => {
    using guests = guestsOn(backend(), options)
    const [a] = guests
    sends(a)
    expect(land(a)).toEqual(new Set([0]))
    for (const count of [3, 2, 1, 3]) {
      expect(a.net.usePairs(count)).toBe(net.VIRTIO_NET_OK)
      sends(a)
    }
    for (const wrong of [0, 4, 0xffff]) expect(a.net.usePairs(wrong)).toBe(net.VIRTIO_NET_ERR)
    sends(a)
  })

  // virtio 1.3 §5.1.6.5.5.1: none on queues beyond the number once the command is acknowledged.
  test('a number of pairs holds from its acknowledgement on', () => {
    using guests = guestsOn(backend(), options)
    const [a] = guests
    for (let round = 0; round < 20; round++) {
      for (const count of [3, 1, 2]) {
        expect(a.net.usePairs(count)).toBe(net.VIRTIO_NET_OK)
        for (const queue of land(a)) expect(queue).toBeLessThan(count)
      }
    }
  })

  test('a front-end that keeps the control queue enables what is used', () => {
    using guests = guestsOn(backend(), { ...options, without: KEPT })
    const [a] = guests
    sends(a)
    land(a)
    for (const pair of [1, 2]) for (const ring of [0, 1]) a.session.connection.setVringEnable(2 * pair + ring, false)
    expect(land(a)).toEqual(new Set([0]))
    for (const pair of [1, 2]) for (const ring of [0, 1]) a.session.connection.setVringEnable(2 * pair + ring, true)
    sends(a)
    land(a)
    // Any of them may be the only one.
    for (const pair of [0, 1]) a.session.connection.setVringEnable(2 * pair, false)
    expect(land(a)).toEqual(new Set([2]))
  })

  test('a driver without MQ', () => {
    using guests = guestsOn(backend(), { without: [net.VIRTIO_NET_F_MQ] })
    const [a] = guests
    expect(land(a)).toEqual(new Set([0]))
    const bytes = frame({ from: 1, size: 100 })
    a.send(bytes)
    on().gets(bytes)
  })
}

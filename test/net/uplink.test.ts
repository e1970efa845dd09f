/** A switch whose uplink is a tap, between guests and a packet socket on the other side of it. */
import { describe, expect, test } from 'vitest'
import { withDependents } from '../../src/frontend/net-features.ts'
import { decodeNetHeader } from '../../src/frontend/net-frames.ts'
import * as net from '../../src/virtio/net.ts'
import { whyNoNamespace } from '../native/network.ts'
import { expectFinished } from './finished.ts'
import { build, TCPV4 } from './frames.ts'
import { frame, Guest, guestsOn, introduce, KINDS, mac, passes, plain } from './support.ts'
import { inward, OUTSIDE, onTap, type Setup } from './wire.ts'

const NOTHING = withDependents(net.VIRTIO_NET_F_GUEST_CSUM)
const TSO = { ...TCPV4, gsoSize: 1448, payload: 64_000 }

describe.skipIf(whyNoNamespace() !== undefined)('uplink', () => {
  for (const kind of KINDS) {
    describe(kind, () => uplink(onTap({ kind, link: ['--switch', 's', '--uplink', 'tap0'] })))
  }
})

function uplink({ backend, wire: on, sh }: Setup): void {
  test('guests and the outside reach one another, and nobody else', () => {
    using guests = guestsOn(backend(), {}, {})
    const [a, b] = guests
    introduce(guests)
    for (let i = 0; i < 2; i++) on().receive()
    const bytes = frame({ from: OUTSIDE, size: 100 })
    on().send(bytes)
    for (const guest of guests) plain(guest.gets(bytes))
    for (const [from, to] of [
      [a, b],
      [b, a],
    ] as const) {
      const out = frame({ from: from.number, to: OUTSIDE, size: 1514 })
      from.send(out)
      on().gets(out)
      passes(from, to)
      const back = inward(1514, from.number)
      on().send(back)
      from.gets(back)
    }
    // A packet of the outside to the outside is not ours.
    on().send(frame({ from: OUTSIDE, to: OUTSIDE, size: 60 }))
    passes(a, b)
  })

  test('segmented packets pass both ways, finished for a guest that takes none', () => {
    using guests = guestsOn(backend(), {}, { without: NOTHING, rxBuffers: 128 })
    const [a, b] = guests
    introduce(guests)
    for (let i = 0; i < 2; i++) on().receive()
    const built = build(TSO)
    built.bytes.set(mac(OUTSIDE), 6)
    on().send(built.bytes, built.header)
    const packets = Array.from({ length: Math.ceil(64_000 / 1448) }, () => b.net.receive().frame)
    expectFinished(packets, built, TSO)
    built.bytes.set(mac(1))
    on().send(built.bytes, built.header)
    expect(a.gets(built.bytes).header).toMatchObject({ flags: 1, gsoType: 1, gsoSize: 1448 })
    built.bytes.set(mac(OUTSIDE))
    built.bytes.set(mac(1), 6)
    a.send(built.bytes, { header: built.header })
    expect(decodeNetHeader(on().gets(built.bytes).header)).toMatchObject({ gsoType: 1, gsoSize: 1448 })
  })

  test('when the first guest leaves, or is disabled, the others hear the outside', () => {
    using guests = guestsOn(backend(), {}, {}, {})
    const [a, b, c] = guests
    const hear = (listeners: readonly Guest[]): void => {
      const bytes = frame({ from: OUTSIDE, size: 100 })
      on().send(bytes)
      for (const guest of listeners) guest.gets(bytes)
    }
    hear([a, b, c])
    a.session.connection.setVringEnable(0, false)
    hear([b, c])
    a.session.connection.setVringEnable(0, true)
    hear([a, b, c])
    a.close()
    hear([b, c])
    b.close(true)
    hear([c])
    using again = new Guest(backend().sockets[0]!, 1)
    hear([again, c])
  })

  test('while it is down what goes there is counted, and guests go on', async () => {
    using guests = guestsOn(backend(), {}, {})
    const [a, b] = guests
    await sh('ip link set tap0 down')
    const before = backend().ofSwitch('port_drops_total', 'port="uplink"')
    for (let i = 0; i < 5; i++) {
      const bytes = frame({ from: 1, size: 100 })
      a.send(bytes)
      b.gets(bytes)
    }
    expect(backend().ofSwitch('port_drops_total', 'port="uplink"') - before).toBe(5)
    await sh('ip link set tap0 up')
    const bytes = frame({ from: 1, size: 100 })
    a.send(bytes)
    on().gets(bytes)
    const back = inward(100)
    on().send(back)
    a.gets(back)
  })
}

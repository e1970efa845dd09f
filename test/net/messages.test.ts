/** Messages that only network cards have, and the config space: what is told, what is refused. */
import { describe, expect, test } from 'vitest'
import { Connection, payload64 } from '../../src/frontend/connection.ts'
import { decodeNetConfig } from '../../src/frontend/net-features.ts'
import * as wire from '../../src/vhost-user/wire.ts'
import { VIRTIO_F_VERSION_1 } from '../../src/virtio/constants.ts'
import { featureSet, hasFeature } from '../../src/virtio/features.ts'
import * as net from '../../src/virtio/net.ts'
import { Backend, eventually } from '../vhost-user/backend.ts'
import { message, type Outcome, outcome } from '../vhost-user/messages.ts'
import { config } from '../vhost-user/request-rows.ts'
import { frame, Guest, guestsOn, introduce, mac, type NetBackend, netBackend, passes } from './support.ts'

const { VHOST_USER_PROTOCOL_F_RARP: RARP, VHOST_USER_PROTOCOL_F_MTU: MTU } = wire
const SILENT = { without: [net.VIRTIO_NET_F_GUEST_ANNOUNCE] }

/** SEND_RARP and NET_SET_MTU may be sent from here on. */
function withNetworkRequests({ session: { connection } }: Guest): Connection {
  connection.setProtocolFeatures(connection.protocolFeatures | featureSet(RARP, MTU))
  return connection
}

function announce(guest: Guest, address: Uint8Array, needReply = true): Outcome {
  const payload = new Uint8Array(8)
  payload.set(address)
  return outcome(guest.session.connection, wire.VHOST_USER_SEND_RARP, payload, [], needReply)
}

function setMtu(connection: Connection, mtu: number | bigint, needReply = true): Outcome {
  return outcome(connection, wire.VHOST_USER_NET_SET_MTU, payload64(BigInt(mtu)), [], needReply)
}

function configOf({ session }: Guest): ReturnType<typeof decodeNetConfig> {
  return decodeNetConfig(session.connection.getConfig(0, net.VIRTIO_NET_CONFIG_SIZE)!, session.features)
}

describe('a plain card', () => {
  const current = netBackend()
  announcing(current)

  test('both are offered, and refused until they are negotiated', () => {
    using guests = guestsOn(current(), SILENT)
    const [a] = guests
    const offered = a.session.offeredProtocolFeatures
    expect([hasFeature(offered, RARP), hasFeature(offered, MTU)]).toEqual([true, true])
    expect(announce(a, mac(1))).toBe('nack')
    expect(setMtu(a.session.connection, 1500)).toBe('nack')
    withNetworkRequests(a)
    expect(announce(a, mac(1))).toBe('ok')
    expect(setMtu(a.session.connection, 1500)).toBe('ok')
  })

  test('payloads of other sizes are refused', () => {
    using guests = guestsOn(current(), SILENT)
    const connection = withNetworkRequests(guests[0])
    for (const request of [wire.VHOST_USER_SEND_RARP, wire.VHOST_USER_NET_SET_MTU]) {
      for (const size of [0, 6, 7, 9, 16]) expect(outcome(connection, request, new Uint8Array(size))).toBe('nack')
    }
  })

  test('any MTU that there is can be had when none was said', () => {
    using guests = guestsOn(current(), {})
    const connection = withNetworkRequests(guests[0])
    for (const mtu of [68, 1500, 9000, 65535]) expect(setMtu(connection, mtu), `${mtu}`).toBe('ok')
    for (const mtu of [0, 67, 65536, 0x1_0000_05dcn, 2n ** 64n - 1n])
      expect(setMtu(connection, mtu), `${mtu}`).toBe('nack')
    expect(setMtu(connection, 1500, false)).toBe('ok')
    expect(setMtu(connection, 67, false)).toBe('closed')
  })

  test('no MAC and no MTU, and the link is up', () => {
    using guests = guestsOn(current(), {})
    const [{ session }] = guests
    expect(
      session.has(net.VIRTIO_NET_F_MAC) || session.has(net.VIRTIO_NET_F_MTU) || session.has(net.VIRTIO_NET_F_MQ)
    ).toBe(false)
    expect(configOf(guests[0])).toEqual({ linkUp: true, announce: false })
    expect(session.connection.getConfig(0, 12)).toEqual(Uint8Array.of(0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0))
  })

  test('the config space is written by nobody but a legacy driver, and of that only the MAC', () => {
    const set = (guest: Guest, offset: number, bytes: number[]): Outcome =>
      outcome(guest.session.connection, wire.VHOST_USER_SET_CONFIG, config(offset, Uint8Array.from(bytes)))
    {
      using guests = guestsOn(current(), {})
      for (let offset = 0; offset < 14; offset++) expect(set(guests[0], offset, [1]), `${offset}`).toBe('nack')
      expect(set(guests[0], 0, [2, 0, 0, 0, 0, 7])).toBe('nack')
    }
    {
      using guests = guestsOn(current(), { without: [VIRTIO_F_VERSION_1] })
      const [a] = guests
      for (const [offset, byte] of [2, 0, 0, 0, 0, 7].entries()) expect(set(a, offset, [byte])).toBe('ok')
      expect(a.session.connection.getConfig(0, 6)).toEqual(mac(7))
      for (let offset = 6; offset < 14; offset++) expect(set(a, offset, [1]), `${offset}`).toBe('nack')
      expect(set(a, 5, [7, 1])).toBe('nack')
      expect(set(a, 0, [])).toBe('nack')
      expect(a.session.connection.getConfig(0, 8)).toEqual(Uint8Array.of(...mac(7), 1, 0))
    }
    using again = new Guest(current().sockets[0]!, 1)
    expect(again.session.connection.getConfig(0, 6)).toEqual(new Uint8Array(6))
  })
})

function announcing(current: () => NetBackend): void {
  test('SEND_RARP goes to the others, and teaches the switch', () => {
    using guests = guestsOn(current(), SILENT, {}, {})
    const [a, b, c] = guests
    introduce(guests)
    withNetworkRequests(a)
    for (const needReply of [true, false]) {
      expect(announce(a, mac(60), needReply)).toBe('ok')
      // RFC 903, padded to what Ethernet sends at least.
      const rarp = Buffer.from(
        `ffffffffffff${'02000000003c'}80350001080006040003${'02000000003c00000000'.repeat(2)}`,
        'hex'
      )
      for (const guest of [b, c]) guest.gets(Uint8Array.of(...rarp, ...new Uint8Array(60 - rarp.length)))
      // To its port, and to no other.
      const bytes = frame({ from: 2, to: 60, size: 60 })
      b.send(bytes)
      a.gets(bytes)
      passes(b, c)
    }
  })

  test('an address that moves from one card to another by SEND_RARP', () => {
    using guests = guestsOn(current(), SILENT, SILENT, {})
    const [a, b, c] = guests
    introduce(guests)
    for (const guest of [a, b]) withNetworkRequests(guest)
    for (const [holder, other] of [
      [a, b],
      [b, a],
      [a, b],
    ] as const) {
      expect(announce(holder, mac(60))).toBe('ok')
      const bytes = frame({ from: 3, to: 60, size: 60 })
      c.net.receive()
      other.net.receive()
      c.send(bytes)
      holder.gets(bytes)
    }
  })

  test('a driver that announces itself is told by the config space', () => {
    using guests = guestsOn(current(), {}, {})
    const [a, b] = guests
    introduce(guests)
    const connection = withNetworkRequests(a)
    expect(configOf(a).announce).toBe(false)
    expect(announce(a, mac(60))).toBe('ok')
    expect(connection.backendRequest(2000)?.request).toBe(wire.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG)
    expect(configOf(a)).toMatchObject({ announce: true, linkUp: true })
    expect(a.net.control(net.VIRTIO_NET_CTRL_ANNOUNCE, net.VIRTIO_NET_CTRL_ANNOUNCE_ACK)).toBe(net.VIRTIO_NET_OK)
    expect(eventually(() => configOf(a).announce === false)).toBe(true)
    // Nobody announced it in its place.
    passes(a, b)
  })

  test('SEND_RARP before any ring is started, and with rings disabled', () => {
    using guests = guestsOn(current(), {}, {})
    const [a, b] = guests
    introduce(guests)
    const c = new Guest(current().sockets[2]!, 3, { ...SILENT, enable: false, rxBuffers: 0 })
    try {
      withNetworkRequests(c)
      expect(announce(c, mac(60))).toBe('ok')
      // It may be about to run: the others are told.
      for (const guest of [a, b])
        expect(guest.net.receive().frame.slice(6, 14)).toEqual(Uint8Array.of(...mac(60), 0x80, 0x35))
    } finally {
      c.close()
    }
    const bare = Connection.connect(current().sockets[2]!, { timeoutMs: 3000 })
    bare.setProtocolFeatures(bare.getProtocolFeatures() & featureSet(3, RARP, MTU))
    bare.send(message(wire.VHOST_USER_SEND_RARP, new Uint8Array(8)))
    bare.barrier()
    bare.close()
    passes(a, b)
  })
}

describe('a card with a MAC, an MTU and four pairs', () => {
  const current = netBackend({ cards: 1, extra: ['--mac', '52:54:00:AB:cd:01', '--mtu', '9000', '--queue-pairs', '4'] })

  test('the config space says so', () => {
    using guests = guestsOn(current(), {})
    expect(configOf(guests[0])).toEqual({
      mac: '52:54:00:ab:cd:01',
      linkUp: true,
      announce: false,
      maxVirtqueuePairs: 4,
      mtu: 9000,
    })
  })

  test('reads of any part of it, and beyond', () => {
    using guests = guestsOn(current(), {})
    const { connection } = guests[0].session
    const whole = connection.getConfig(0, 12)!
    for (let offset = 0; offset < 12; offset++)
      expect(connection.getConfig(offset, 1)).toEqual(whole.slice(offset, offset + 1))
    // QEMU asks for its own idea of the size.
    for (const size of [12, 20, 24, 60, 256]) expect(connection.getConfig(0, size)?.slice(0, 12)).toEqual(whole)
    expect(
      connection
        .getConfig(0, 60)
        ?.slice(12)
        .every((byte) => byte === 0)
    ).toBe(true)
  })

  test('NET_SET_MTU takes no more than the operator allows', () => {
    using guests = guestsOn(current(), {})
    const connection = withNetworkRequests(guests[0])
    for (const mtu of [68, 1500, 9000]) expect(setMtu(connection, mtu), `${mtu}`).toBe('ok')
    for (const mtu of [9001, 65535, 67]) expect(setMtu(connection, mtu), `${mtu}`).toBe('nack')
    expect(configOf(guests[0]).mtu).toBe(9000)
  })
})

test('a disk offers neither, and refuses both', async () => {
  await using backend = Backend.start()
  const connection = Connection.connect(backend.socket, { timeoutMs: 3000 })
  const offered = connection.getProtocolFeatures()
  expect([hasFeature(offered, RARP), hasFeature(offered, MTU)]).toEqual([false, false])
  connection.setProtocolFeatures(offered & featureSet(wire.VHOST_USER_PROTOCOL_F_REPLY_ACK))
  expect(setMtu(connection, 1500)).toBe('nack')
  expect(outcome(connection, wire.VHOST_USER_SEND_RARP, new Uint8Array(8))).toBe('nack')
  connection.close()
})

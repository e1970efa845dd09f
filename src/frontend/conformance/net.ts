/** Cases about virtio-net: packets out and in, their headers, control commands, the config space. */
import {
  VHOST_USER_PROTOCOL_F_CONFIG,
  VHOST_USER_PROTOCOL_F_MTU,
  VHOST_USER_PROTOCOL_F_RARP,
  VHOST_USER_PROTOCOL_F_REPLY_ACK,
} from '../../vhost-user/wire.ts'
import { VIRTIO_F_RING_PACKED } from '../../virtio/constants.ts'
import * as net from '../../virtio/net.ts'
import { FrontendError } from '../errors.ts'
import { layouts } from '../memory.ts'
import { NetDriver, type NetDriverOptions, type ReceivedPacket } from '../net.ts'
import { withDependents } from '../net-features.ts'
import { encodeNetHeader, type NetHeader } from '../net-frames.ts'
import { Session, type SessionOptions } from '../session.ts'
import { sleepMs } from '../virtqueue.ts'
import { type ConformanceCase, expect, expectBytes, expectEqual, type Needs, Violation } from './case.ts'
import type { Context } from './context.ts'
import { testFrame, testFrameNumber } from './operation.ts'

const PACKETS_OUT = 'virtio 1.3 §5.1.6.2'
const PACKETS_IN = 'virtio 1.3 §5.1.6.4.1'

/** A network card under test, and where its frames come from. */
class Card {
  readonly driver: NetDriver
  readonly #peer: NetDriver | undefined
  readonly #timeoutMs: number
  #number = 100

  constructor(driver: NetDriver, peer: NetDriver | undefined, timeoutMs: number) {
    this.driver = driver
    this.#peer = peer
    this.#timeoutMs = timeoutMs
  }

  /** Has a frame come in. @returns its bytes */
  inject(length = 60): Uint8Array {
    const frame = testFrame(this.#number++, length, true)
    const source = this.#peer ?? this.driver
    source.sent(source.send(frame))
    return frame
  }

  /** The packet with this frame; what others send on a shared network is passed over. */
  receive(frame: Uint8Array, timeoutMs = this.#timeoutMs): ReceivedPacket | undefined {
    const number = testFrameNumber(frame)
    for (const deadline = performance.now() + timeoutMs; ; ) {
      const left = deadline - performance.now()
      const packet = left > 0 ? this.driver.tryReceive(left) : undefined
      if (packet === undefined || testFrameNumber(packet.frame) === number) return packet
    }
  }

  /** A frame comes in as it was sent. @throws Violation */
  expectFrame(length: number, what = `a frame of ${length} bytes`): ReceivedPacket {
    const frame = this.inject(length)
    const packet = this.receive(frame)
    if (packet === undefined) throw new Violation(`${what} comes in`, `none in ${this.#timeoutMs} ms`)
    // What is shorter than Ethernet's minimum may have been padded on the way.
    expectBytes(what, packet.frame.subarray(0, length), frame)
    expect(packet.frame.length <= Math.max(length, 60), `${length} bytes`, `${packet.frame.length}`)
    return packet
  }
}

function card(context: Context, options: SessionOptions = {}, driverOptions: NetDriverOptions = {}): Card {
  const guest = context.guest({ memory: layouts.single(64 * 2 ** 20), ...options })
  const driver = new NetDriver(guest.session, { control: false, timeoutMs: context.timeoutMs, ...driverOptions })
  return new Card(driver, peerOf(context), context.timeoutMs)
}

function peerOf(context: Context): NetDriver | undefined {
  if (context.facts.net?.wire !== 'peer' || context.peer === undefined) return undefined
  const session = context.adopt(Session.open(context.peer, { queues: 0, timeoutMs: context.timeoutMs }))
  return new NetDriver(session, { control: false, laxNumBuffers: true, timeoutMs: context.timeoutMs })
}

function netCase(
  one: Pick<ConformanceCase, 'id' | 'level' | 'rule' | 'cites'> & { needs?: Needs } & Partial<ConformanceCase>
): ConformanceCase {
  return { group: 'net', run: () => '', ...one, needs: { device: 'net', ...one.needs } }
}

const wire = { wire: true } as const

const outCases: readonly ConformanceCase[] = [
  netCase({
    id: 'net-transmit',
    level: 'MUST',
    rule: 'uses transmitted packets of every length, with a used length of 0',
    cites: `${PACKETS_OUT}; §2.7.8`,
    run: (context) => {
      const { driver } = card(context)
      const lengths = [18, 42, 59, 60, 64, 1000, 1514]
      for (const length of lengths) for (let i = 0; i < 20; i++) driver.sent(driver.send(testFrame(i, length)))
      return lengths.join(', ')
    },
  }),
  netCase({
    id: 'net-transmit-framing',
    level: 'MUST',
    rule: 'makes no assumptions about how header and packet are cut into descriptors',
    cites: 'virtio 1.3 §2.7.4.1, §5.1.6.2',
    run: (context) => {
      const { driver } = card(context)
      const total = driver.headerSize + 60
      for (const cuts of [
        [driver.headerSize, 60],
        [1, total - 1],
        [driver.headerSize - 1, 61],
        [5, 5, 5, total - 15],
        new Array<number>(total).fill(1),
      ])
        driver.sent(driver.send(testFrame(1), { cuts }))
      return '5 framings, the last one of single bytes'
    },
  }),
  netCase({
    id: 'net-transmit-flags',
    level: 'MUST',
    rule: 'ignores flags of the packet header that it does not recognise',
    cites: 'virtio 1.3 §5.1.6.2.2',
    run: (context) => {
      const { driver } = card(context)
      for (const flags of [0x08, 0x70, 0xf8]) driver.sent(driver.send(testFrame(1), { header: { flags } }))
      return 'flags 0x08, 0x70, 0xf8'
    },
  }),
  netCase({
    id: 'net-transmit-num-buffers',
    level: 'SHOULD',
    rule: 'ignores num_buffers of a packet that is transmitted',
    cites: 'virtio 1.3 §5.1.6.2.1 (the driver sets it to 0)',
    run: (context) => {
      const { driver } = card(context)
      for (const numBuffers of [1, 5, 0xffff]) driver.sent(driver.send(testFrame(1), { header: { numBuffers } }))
      return '1, 5, 65535'
    },
  }),
  netCase({
    id: 'net-transmit-malformed',
    level: 'SHOULD',
    rule: 'uses up packets that are cut short, empty, or whose header points outside of them, and goes on',
    cites: 'virtio 1.3 §5.1.6.2.2 ("Caution should be taken … a malicious driver")',
    run: (context) => {
      const { driver } = card(context)
      const NEEDS_CSUM = net.VIRTIO_NET_HDR_F_NEEDS_CSUM
      const headers: Partial<NetHeader>[] = [
        { flags: NEEDS_CSUM, csumStart: 0xffff, csumOffset: 0xffff },
        { flags: NEEDS_CSUM, csumStart: 60, csumOffset: 0 },
        { flags: NEEDS_CSUM, csumStart: 34, csumOffset: 60000 },
        { gsoType: net.VIRTIO_NET_HDR_GSO_TCPV4, gsoSize: 0 },
        { gsoType: net.VIRTIO_NET_HDR_GSO_TCPV4, gsoSize: 1, hdrLen: 0xffff, flags: NEEDS_CSUM, csumStart: 34 },
        { gsoType: 0x7f, gsoSize: 0xffff },
      ]
      for (const header of headers) driver.sent(driver.send(testFrame(1, 200), { header }))
      const short = encodeNetHeader({}, driver.headerSize)
      for (const bytes of [1, 5, driver.headerSize - 1, driver.headerSize])
        driver.sent(driver.send(new Uint8Array(0), { header: short.subarray(0, bytes) }))
      driver.sent(driver.send(testFrame(2)))
      return `${headers.length + 4} packets, and a good one behind them`
    },
  }),
  netCase({
    id: 'net-transmit-delivers',
    level: 'MUST',
    rule: 'delivers what was transmitted, byte for byte, whatever descriptors it came in',
    cites: PACKETS_OUT,
    needs: wire,
    run: (context) => {
      const one = card(context)
      for (const length of [60, 64, 100, 590, 1000, 1514]) one.expectFrame(length)
      return 'frames of 60 … 1514 bytes'
    },
  }),
  netCase({
    id: 'net-transmit-disabled',
    level: 'MUST',
    rule: 'processes and discards packets on a disabled transmit ring',
    cites: 'vhost-user.rst "Ring states" ("must process and discard any TX packets")',
    needs: { protocol: [VHOST_USER_PROTOCOL_F_REPLY_ACK] },
    run: (context) => {
      const { driver } = card(context)
      driver.sent(driver.send(testFrame(1)))
      driver.session.connection.setVringEnable(1, false)
      const frame = testFrame(90_000, 60, true)
      driver.sent(driver.send(frame))
      if (context.facts.net?.wire === 'loop') {
        const packet = driver.tryReceive(100)
        const came = packet !== undefined && testFrameNumber(packet.frame) === 90_000
        expect(!came, 'the packet discarded', 'it was delivered')
      }
      driver.session.connection.setVringEnable(1, true)
      driver.sent(driver.send(testFrame(2)))
      return 'used while disabled'
    },
  }),
  netCase({
    id: 'net-pairs',
    level: 'MUST',
    rule: 'serves the transmit rings of all its queue pairs (up to 8 are tried)',
    cites: 'virtio 1.3 §5.1.2, §5.1.6.5.5',
    needs: { features: [net.VIRTIO_NET_F_MQ], protocol: [VHOST_USER_PROTOCOL_F_CONFIG] },
    run: (context) => {
      const pairs = Math.min(context.facts.net?.pairs ?? 1, 8)
      const { driver } = card(context, {}, { pairs, rxBuffers: 16, control: context.has(net.VIRTIO_NET_F_CTRL_VQ) })
      if (driver.controlQueue !== undefined) expectEqual('the answer to VQ_PAIRS_SET', driver.usePairs(pairs), 0)
      for (let round = 0; round < 5; round++)
        for (let queue = 0; queue < pairs; queue++) driver.sent(driver.send(testFrame(queue), { queue }))
      return `${pairs} pairs`
    },
  }),
]

const inCases: readonly ConformanceCase[] = [
  netCase({
    id: 'net-receive',
    level: 'MUST',
    rule: 'writes header and packet into receive buffers, and no field that was not negotiated into the header',
    cites: `${PACKETS_IN}, §5.1.6.3.2`,
    needs: wire,
    run: (context) => {
      // The driver checks each packet: lengths, num_buffers, flags, gso_type.
      const one = card(context)
      for (let i = 0; i < 100; i++) one.expectFrame(60 + i * 14)
      return '100 frames of 60 … 1446 bytes'
    },
  }),
  netCase({
    id: 'net-receive-mergeable',
    level: 'MUST',
    rule: 'spreads a packet over num_buffers buffers, all but the last one full, and uses them together',
    cites: PACKETS_IN,
    needs: { ...wire, features: [net.VIRTIO_NET_F_MRG_RXBUF] },
    run: (context) => {
      const seen: string[] = []
      for (const rxBufferSize of [128, 256, 1000]) {
        const one = card(context, {}, { rxBufferSize, rxBuffers: 128 })
        for (const length of [60, 500, 1400]) {
          const { buffers } = one.expectFrame(length, `${length} bytes in buffers of ${rxBufferSize}`)
          const expected = Math.ceil((length + one.driver.headerSize) / rxBufferSize)
          expectEqual(`num_buffers for ${length} bytes in buffers of ${rxBufferSize}`, buffers, expected)
        }
        seen.push(`${rxBufferSize}`)
      }
      return `buffers of ${seen.join(', ')} bytes`
    },
  }),
  netCase({
    id: 'net-receive-single',
    level: 'MUST',
    rule: 'sets num_buffers to 1 when MRG_RXBUF was not negotiated',
    cites: PACKETS_IN,
    needs: wire,
    run: (context) => {
      const one = card(context, { withoutFeatures: withDependents(net.VIRTIO_NET_F_MRG_RXBUF) })
      for (const length of [60, 700, 1514]) one.expectFrame(length)
      return '1'
    },
  }),
  netCase({
    id: 'net-receive-flags',
    level: 'MUST',
    rule: 'sets the flags of the header to 0 when GUEST_CSUM was not negotiated',
    cites: PACKETS_IN,
    needs: wire,
    run: (context) => {
      const one = card(
        context,
        { withoutFeatures: withDependents(net.VIRTIO_NET_F_GUEST_CSUM) },
        { laxNumBuffers: true }
      )
      for (const length of [60, 700, 1514]) expectEqual('flags', one.expectFrame(length).header.flags, 0)
      return '0'
    },
  }),
  netCase({
    id: 'net-receive-too-small',
    level: 'MUST',
    rule: 'writes no more into receive buffers than they hold when a packet does not fit, and goes on',
    cites: `${PACKETS_IN}; §2.7.5`,
    needs: wire,
    run: (context) => {
      const without = withDependents(net.VIRTIO_NET_F_MRG_RXBUF)
      const one = card(context, { withoutFeatures: without }, { rxBufferSize: 200, rxBuffers: 32, laxNumBuffers: true })
      one.inject(1000)
      sleepMs(50)
      // The driver complains when a used length is more than the buffer, or a packet is cut short.
      const packet = one.driver.tryReceive(50)
      if (packet !== undefined) throw new Violation('the packet dropped', `${packet.frame.length} bytes of it came`)
      one.expectFrame(100, 'a frame that fits, after it')
      return 'dropped'
    },
  }),
  netCase({
    id: 'net-receive-disabled',
    level: 'MUST',
    rule: 'supplies no packets on a disabled receive ring',
    cites: 'vhost-user.rst "Ring states" ("in the disabled state the back-end must not supply any new RX packets")',
    needs: wire,
    run: (context) => {
      const one = card(context)
      one.expectFrame(60)
      one.driver.session.connection.setVringEnable(0, false)
      one.driver.session.connection.barrier()
      const frame = one.inject(100)
      const early = one.receive(frame, 100)
      expect(early === undefined, 'no packet', 'one came')
      one.driver.session.connection.setVringEnable(0, true)
      one.expectFrame(60, 'a frame after the ring was enabled again')
      return 'none while disabled'
    },
  }),
  netCase({
    id: 'net-receive-no-buffers',
    level: 'MUST',
    rule: 'goes on when receive buffers come late',
    cites: 'virtio 1.3 §5.1.6.3',
    needs: wire,
    run: (context) => {
      const one = card(context, {}, { rxBuffers: 0 })
      for (let i = 0; i < 20; i++) one.inject(60)
      sleepMs(20)
      const { session } = one.driver
      // More than the packets that may have been kept meanwhile.
      for (let i = 0; i < 100; i++) {
        const buffer = session.memory.allocate(2048, 64)
        one.driver.post([{ address: buffer.gpa, length: 2048, writable: true }])
      }
      // Some of what was sent before may come now, or none of it.
      for (let tries = 0; tries < 5; tries++) {
        const frame = one.inject(80)
        if (one.receive(frame, 500) !== undefined) return 'packets come once there are buffers'
      }
      throw new Violation('a packet', 'none, although there are buffers now')
    },
  }),
  netCase({
    id: 'net-receive-packed',
    level: 'MUST',
    rule: 'receives and transmits through packed rings, merged buffers included',
    cites: `${PACKETS_IN}; §2.8.9`,
    needs: { ...wire, features: [VIRTIO_F_RING_PACKED, net.VIRTIO_NET_F_MRG_RXBUF] },
    run: (context) => {
      const one = card(context, { packed: true }, { rxBufferSize: 300, rxBuffers: 100, queueSize: 200 })
      for (let i = 0; i < 150; i++) one.expectFrame(60 + (i % 100) * 14)
      return '150 frames'
    },
  }),
]

/**
 * QEMU keeps the control queue to itself, and network back-ends offer its features for QEMU's sake (DPDK does). Who has
 * a config space, too, is a whole device.
 */
const control = { protocol: [VHOST_USER_PROTOCOL_F_CONFIG] } as const

const settingCases: readonly ConformanceCase[] = [
  netCase({
    id: 'net-config-sane',
    level: 'MUST',
    rule: 'shows a unicast MAC address, max_virtqueue_pairs from 1 to 0x8000, an MTU from 68 on',
    cites: 'virtio 1.3 §5.1.4, §5.1.4.1',
    needs: { protocol: [VHOST_USER_PROTOCOL_F_CONFIG] },
    run: (context) => {
      const config = context.facts.net?.config
      expect(config !== undefined, 'a config space', 'an empty payload')
      const { mac, maxVirtqueuePairs: pairs, mtu } = config
      if (mac !== undefined) {
        const first = Number.parseInt(mac.slice(0, 2), 16)
        expect((first & 1) === 0 && mac !== '00:00:00:00:00:00', 'a unicast MAC address', mac)
      }
      if (pairs !== undefined) expect(pairs >= 1 && pairs <= 0x8000, '1 … 0x8000 pairs', `${pairs}`)
      if (mtu !== undefined) expect(mtu >= 68, 'an MTU of at least 68', `${mtu}`)
      return `${mac ?? 'no MAC'}, ${pairs ?? 1} pairs, ${mtu === undefined ? 'no MTU' : `MTU ${mtu}`}`
    },
  }),
  netCase({
    id: 'net-control-unknown',
    level: 'MUST',
    rule: 'answers control commands that it does not know with an error',
    cites: 'virtio 1.3 §5.1.6.5 ("the device sets the ack byte")',
    needs: { ...control, features: [net.VIRTIO_NET_F_CTRL_VQ] },
    run: (context) => {
      const { driver } = card(context, {}, { control: true })
      for (const [classId, command] of [
        [0x55, 0],
        [0, 0x77],
        [0xff, 0xff],
      ] as const) {
        const ack = driver.control(classId, command, Uint8Array.of(1))
        expectEqual(`the answer to class ${classId} command ${command}`, ack, net.VIRTIO_NET_ERR)
      }
      return 'errors'
    },
  }),
  netCase({
    id: 'net-control-framing',
    level: 'MUST',
    rule: 'takes control commands however they are cut into descriptors',
    cites: 'virtio 1.3 §2.7.4.1, §5.1.6.5',
    needs: { ...control, features: [net.VIRTIO_NET_F_CTRL_VQ, net.VIRTIO_NET_F_CTRL_RX] },
    run: (context) => {
      const { driver } = card(context, {}, { control: true })
      const [CLASS, PROMISC] = [net.VIRTIO_NET_CTRL_RX, net.VIRTIO_NET_CTRL_RX_PROMISC]
      for (const pieces of [
        [[CLASS, PROMISC, 1]],
        [[CLASS], [PROMISC], [0]],
        [[CLASS, PROMISC], [1]],
        [[CLASS], [PROMISC, 0]],
      ]) {
        const { data } = driver.controlRaw(
          pieces.map((piece) => Uint8Array.from(piece)),
          [1]
        )
        expectEqual(`the answer in ${pieces.length} pieces`, data[0] ?? -1, net.VIRTIO_NET_OK)
      }
      return '4 framings'
    },
  }),
  netCase({
    id: 'net-control-short',
    level: 'SHOULD',
    rule: 'answers control commands whose data is missing with an error, and returns chains without an ack byte',
    cites: 'virtio 1.3 §5.1.6.5',
    needs: { ...control, features: [net.VIRTIO_NET_F_CTRL_VQ, net.VIRTIO_NET_F_CTRL_RX] },
    run: (context) => {
      const { driver } = card(context, {}, { control: true })
      const { data } = driver.controlRaw([Uint8Array.of(net.VIRTIO_NET_CTRL_RX, 0)], [1])
      expectEqual('the answer to a command without its data', data[0] ?? -1, net.VIRTIO_NET_ERR)
      driver.controlRaw([Uint8Array.of(net.VIRTIO_NET_CTRL_RX, 0, 1)], [], 1000)
      const good = driver.control(net.VIRTIO_NET_CTRL_RX, net.VIRTIO_NET_CTRL_RX_PROMISC, Uint8Array.of(0))
      expectEqual('the answer to a command after it', good, net.VIRTIO_NET_OK)
      return 'an error, a returned chain'
    },
  }),
  netCase({
    id: 'net-control-pairs',
    level: 'SHOULD',
    rule: 'takes VQ_PAIRS_SET from 1 to max_virtqueue_pairs, and answers 0 and more than that with an error',
    cites: 'virtio 1.3 §5.1.6.5.6.1 (the driver MUST NOT)',
    needs: { ...control, features: [net.VIRTIO_NET_F_CTRL_VQ, net.VIRTIO_NET_F_MQ] },
    run: (context) => {
      const pairs = context.facts.net?.pairs ?? 1
      const { driver } = card(context, {}, { control: true, pairs: Math.min(pairs, 8), rxBuffers: 8 })
      for (const [count, expected] of [
        [1, net.VIRTIO_NET_OK],
        [Math.min(pairs, 8), net.VIRTIO_NET_OK],
        [0, net.VIRTIO_NET_ERR],
        [pairs + 1, net.VIRTIO_NET_ERR],
        [0xffff, net.VIRTIO_NET_ERR],
        [1, net.VIRTIO_NET_OK],
      ] as const)
        expectEqual(`the answer to ${count} pairs`, driver.usePairs(count), expected)
      return `up to ${pairs}`
    },
  }),
  netCase({
    id: 'net-mtu',
    level: 'MUST',
    rule: 'answers NET_SET_MTU with 0 for an MTU that it can have, and with another value for one that it can not',
    cites: 'vhost-user.rst "VHOST_USER_NET_SET_MTU"',
    needs: {
      features: [net.VIRTIO_NET_F_MTU],
      protocol: [VHOST_USER_PROTOCOL_F_MTU, VHOST_USER_PROTOCOL_F_REPLY_ACK],
    },
    run: (context) => {
      const { session } = extended(context, [VHOST_USER_PROTOCOL_F_MTU])
      const mtu = context.facts.net?.config?.mtu ?? 1500
      session.connection.setMtu(mtu)
      for (const wrong of [0, 67, 65_536, 2 ** 40]) {
        try {
          session.connection.setMtu(wrong)
        } catch (error) {
          if (error instanceof FrontendError && error.failure === 'nack') continue
          throw error
        }
        throw new Violation(`an MTU of ${wrong} refused`, 'the reply 0')
      }
      return `${mtu} is taken; 0, 67, 65536 and 2^40 are refused`
    },
  }),
  netCase({
    id: 'net-rarp',
    level: 'MUST',
    rule: 'takes SEND_RARP',
    cites: 'vhost-user.rst "VHOST_USER_SEND_RARP"',
    needs: { protocol: [VHOST_USER_PROTOCOL_F_RARP] },
    run: (context) => {
      const { session } = extended(context, [VHOST_USER_PROTOCOL_F_RARP])
      context.expectTaken(session.connection, 'SEND_RARP', () =>
        session.connection.sendRarp(Uint8Array.of(2, 0, 0x5e, 0x99, 0, 1))
      )
      return 'taken'
    },
  }),
]

/** A running card of whose session these protocol features are part, which sessions don't take on their own. */
function extended(context: Context, bits: readonly number[]): NetDriver {
  const guest = context.guest()
  const { connection } = guest.session
  let features = connection.protocolFeatures
  for (const bit of bits) features |= 1n << BigInt(bit)
  connection.setProtocolFeatures(features)
  return new NetDriver(guest.session, { control: false, timeoutMs: context.timeoutMs })
}

export const netCases: readonly ConformanceCase[] = [...outCases, ...inCases, ...settingCases]

/** Cases about negotiation: feature bits and protocol feature bits. */
import {
  VHOST_USER_PROTOCOL_F_BACKEND_REQ,
  VHOST_USER_PROTOCOL_F_CONFIG,
  VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS,
  VHOST_USER_PROTOCOL_F_MQ,
  VHOST_USER_PROTOCOL_F_REPLY_ACK,
} from '../../vhost-user/wire.ts'
import { VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ } from '../../virtio/blk.ts'
import {
  VHOST_F_LOG_ALL,
  VHOST_USER_F_PROTOCOL_FEATURES,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_INDIRECT_DESC,
  VIRTIO_F_VERSION_1,
} from '../../virtio/constants.ts'
import { featureBits, featureSet, hasFeature } from '../../virtio/features.ts'
import { nameFeatures } from '../feature-names.ts'
import { withDependents } from '../net-features.ts'
import { type ConformanceCase, expect, expectEqual, NotApplicable } from './case.ts'
import type { Context } from './context.ts'

const ALL = 2n ** 64n - 1n

const hex = (set: bigint): string => `0x${set.toString(16)}`

/** The lowest of these bits that is not offered. */
function unoffered(offered: bigint, from: number): bigint {
  for (let bit = from; bit < 64; bit++) if (!hasFeature(offered, bit)) return featureSet(bit)
  throw new NotApplicable(`it offers every bit from ${from} on`)
}

/** Bits that change no rule of the ring or of a request: all of them may be left out (virtio 1.3 §2.2.2). */
const PLAIN = featureSet(VIRTIO_F_VERSION_1, VHOST_USER_F_PROTOCOL_FEATURES)

function without(context: Context, ...keep: number[]): number[] {
  return featureBits(context.facts.features & ~PLAIN & ~featureSet(...keep))
}

export const featureCases: readonly ConformanceCase[] = [
  {
    id: 'features-version-1',
    group: 'features',
    level: 'MUST',
    rule: 'offers VIRTIO_F_VERSION_1',
    cites: 'virtio 1.3 §6.2',
    run: (context) => {
      expect(context.has(VIRTIO_F_VERSION_1), 'bit 32', hex(context.facts.features))
      return 'offered'
    },
  },
  {
    id: 'features-stable',
    group: 'features',
    level: 'MUST',
    rule: 'answers GET_FEATURES the same again, later in the session and in the next one',
    cites: 'vhost-user.rst "VHOST_USER_GET_FEATURES"; virtio 1.3 §2.2',
    run: (context) => {
      const { guest } = context.running()
      expectEqual('features of a running session', hex(guest.connection.getFeatures()), hex(context.facts.features))
      expectEqual('features of a new session', hex(context.connect().getFeatures()), hex(context.facts.features))
      return hex(context.facts.features)
    },
  },
  {
    id: 'features-dependencies',
    group: 'features',
    level: 'MUST',
    rule: 'offers no feature that requires another one which is not offered',
    cites: 'virtio 1.3 §2.2.2, §5.1.3.1',
    needs: { device: 'net' },
    run: (context) => {
      const { features } = context.facts
      const lone = withDependents(...featureBits(~features & ALL)).filter((bit) => hasFeature(features, bit))
      const names = lone.map((bit) => nameFeatures(featureSet(bit), 'net')[0]?.name)
      expect(lone.length === 0, 'every feature that another one requires', `${names.join(', ')} stand alone`)
      return 'none is missing'
    },
  },
  {
    id: 'features-subset',
    group: 'features',
    level: 'SHOULD',
    rule: 'accepts a driver that takes none of the optional features, only one of those of the ring, or all',
    cites: 'virtio 1.3 §2.2.2',
    run: (context) => {
      for (const keep of [[], [VIRTIO_F_INDIRECT_DESC], [VIRTIO_F_EVENT_IDX]]) {
        const { ring } = context.running({ withoutFeatures: without(context, ...keep) })
        ring.run(3, {}, `a request with ${keep.length === 0 ? 'no optional feature' : `feature ${keep[0]} alone`}`)
      }
      context.running().ring.run(3, {}, 'a request with every feature')
      return 'requests work with each'
    },
  },
  {
    id: 'features-unknown-refused',
    group: 'features',
    level: 'SHOULD',
    rule: 'refuses SET_FEATURES with a bit that it did not offer',
    cites: 'virtio 1.3 §2.2.1 (the driver MUST NOT); vhost-user.rst "Communication" (incompatible features)',
    run: (context) => {
      context.needProtocolFeatures()
      const connection = context.connect()
      connection.setProtocolFeatures(connection.getProtocolFeatures() & featureSet(VHOST_USER_PROTOCOL_F_REPLY_ACK))
      connection.setOwner()
      const wrong = unoffered(context.facts.features, 57)
      return context.expectRefusal(connection, `SET_FEATURES with ${hex(wrong)}`, () =>
        connection.setFeatures((context.facts.features & PLAIN) | wrong)
      )
    },
  },
  {
    id: 'features-repeated',
    group: 'features',
    level: 'MUST',
    rule: 'leaves running rings as they are when SET_FEATURES comes again with the same bits, as QEMU sends it',
    cites: 'vhost-user.rst "Ring states"',
    run: (context) => {
      const { guest, ring } = context.running()
      ring.run()
      guest.connection.setFeatures(guest.session.features)
      ring.run(3, {}, 'a request after SET_FEATURES')
      return 'the ring goes on'
    },
  },
  {
    id: 'features-without-protocol',
    group: 'features',
    level: 'MUST',
    rule: 'enables all rings at once when SET_FEATURES comes without VHOST_USER_F_PROTOCOL_FEATURES',
    cites: 'vhost-user.rst "Ring states"',
    run: (context) => {
      const guest = context.guest({ withoutFeatures: [VHOST_USER_F_PROTOCOL_FEATURES] })
      if (context.facts.device === 'net') guest.prepare(0, {}, 0).start(0, false)
      const ring = guest.prepare(context.ringIndex)
      ring.start(0, false)
      ring.run(3, {}, 'a request without SET_VRING_ENABLE')
      return 'the ring runs without SET_VRING_ENABLE'
    },
  },
  {
    id: 'features-log-all-alone',
    group: 'features',
    level: 'MUST',
    rule: 'serves a front-end that does not take VHOST_F_LOG_ALL',
    cites: 'vhost-user.rst "Migration"',
    needs: { features: [VHOST_F_LOG_ALL] },
    run: (context) => {
      context.running({ withoutFeatures: [VHOST_F_LOG_ALL] }).ring.run(3)
      return 'requests work'
    },
  },
  {
    id: 'protocol-features-early',
    group: 'features',
    level: 'MUST',
    rule: 'answers GET_PROTOCOL_FEATURES and takes SET_PROTOCOL_FEATURES before SET_FEATURES, and before SET_OWNER',
    cites: 'vhost-user.rst "VHOST_USER_GET_PROTOCOL_FEATURES"',
    run: (context) => {
      context.needProtocolFeatures()
      const connection = context.connect()
      const offered = connection.getProtocolFeatures()
      connection.setProtocolFeatures(offered & featureSet(VHOST_USER_PROTOCOL_F_REPLY_ACK))
      connection.barrier()
      expectEqual('protocol features', hex(connection.getProtocolFeatures()), hex(context.facts.protocolFeatures))
      return hex(offered)
    },
  },
  {
    id: 'protocol-features-unacknowledged',
    group: 'features',
    level: 'MUST',
    rule: 'needs no acknowledgment of VHOST_USER_F_PROTOCOL_FEATURES by SET_FEATURES for GET_PROTOCOL_FEATURES',
    cites: 'vhost-user.rst "VHOST_USER_GET_PROTOCOL_FEATURES"',
    run: (context) => {
      context.needProtocolFeatures()
      const connection = context.connect()
      connection.setOwner()
      connection.setFeatures(context.facts.features & featureSet(VIRTIO_F_VERSION_1))
      expectEqual('protocol features', hex(connection.getProtocolFeatures()), hex(context.facts.protocolFeatures))
      return 'answered'
    },
  },
  {
    id: 'protocol-features-unknown-refused',
    group: 'features',
    level: 'SHOULD',
    rule: 'does not acknowledge SET_PROTOCOL_FEATURES with a bit that it did not offer',
    cites: 'vhost-user.rst "Communication" (extensions are gated by protocol feature bits)',
    needs: { protocol: [VHOST_USER_PROTOCOL_F_REPLY_ACK] },
    run: (context) => {
      const connection = context.connect()
      const ack = featureSet(VHOST_USER_PROTOCOL_F_REPLY_ACK)
      connection.setProtocolFeatures(ack)
      const wrong = ack | unoffered(context.facts.protocolFeatures, 32)
      return context.expectRefusal(connection, `SET_PROTOCOL_FEATURES ${hex(wrong)}`, () =>
        connection.command(16, new Uint8Array(new BigUint64Array([wrong]).buffer))
      )
    },
  },
  {
    id: 'protocol-mq',
    group: 'features',
    level: 'SHOULD',
    rule: 'implements VHOST_USER_PROTOCOL_F_MQ, also with a fixed number of queues',
    cites: 'vhost-user.rst "Multiple queue support"',
    run: (context) => {
      expect(
        context.hasProtocol(VHOST_USER_PROTOCOL_F_MQ),
        'protocol feature bit 0',
        hex(context.facts.protocolFeatures)
      )
      return 'offered'
    },
  },
  {
    id: 'protocol-queue-num',
    group: 'features',
    level: 'MUST',
    rule: 'tells by GET_QUEUE_NUM how many queues it supports: at least one, and no fewer than its config space says',
    cites: 'vhost-user.rst "VHOST_USER_GET_QUEUE_NUM"; virtio 1.3 §5.2.4, §5.1.4',
    needs: { protocol: [VHOST_USER_PROTOCOL_F_MQ] },
    run: (context) => {
      const { queueNum = 0, blk, net } = context.facts
      // Of network cards some back-ends count pairs here (DPDK), some rings (crosvm's front-end wants those).
      const least = (blk !== undefined && context.has(VIRTIO_BLK_F_MQ) ? blk.config.numQueues : net?.pairs) ?? 1
      expect(queueNum >= Math.max(1, least), `at least ${least}`, `${queueNum}`)
      return `${queueNum} queues`
    },
  },
  {
    id: 'protocol-inband-alone',
    group: 'features',
    level: 'SHOULD',
    rule: 'closes the connection when INBAND_NOTIFICATIONS is negotiated without BACKEND_REQ or REPLY_ACK',
    cites: 'vhost-user.rst "In-band notifications"',
    needs: { protocol: [VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS] },
    run: (context) => {
      const inband = featureSet(VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS)
      for (const other of [0n, featureSet(VHOST_USER_PROTOCOL_F_BACKEND_REQ)]) {
        const connection = context.connect()
        connection.getProtocolFeatures()
        connection.setProtocolFeatures(inband | other)
        expectEqual(
          'the connection is',
          context.answer(connection, () => {}),
          'closed'
        )
      }
      return 'closed'
    },
  },
  {
    id: 'features-flush-with-wce',
    group: 'features',
    level: 'MUST',
    rule: 'offers VIRTIO_BLK_F_FLUSH when it offers VIRTIO_BLK_F_CONFIG_WCE',
    cites: 'virtio 1.3 §5.2.5.2',
    needs: { device: 'blk', features: [VIRTIO_BLK_F_CONFIG_WCE] },
    run: (context) => {
      expect(context.has(VIRTIO_BLK_F_FLUSH), 'bit 9', hex(context.facts.features))
      return 'both are offered'
    },
  },
  {
    id: 'protocol-config-of-disk',
    group: 'features',
    level: 'MUST',
    rule: 'offers VHOST_USER_PROTOCOL_F_CONFIG: without it a front-end cannot know a disk’s capacity',
    cites: 'vhost-user.rst "VHOST_USER_GET_CONFIG"; virtio 1.3 §5.2.4',
    needs: { device: 'blk' },
    run: (context) => {
      expect(
        context.hasProtocol(VHOST_USER_PROTOCOL_F_CONFIG),
        'protocol feature bit 9',
        hex(context.facts.protocolFeatures)
      )
      return 'offered'
    },
  },
]

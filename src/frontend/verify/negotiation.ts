/** Cases about negotiation, the config space and the states of a ring. */

import {
  VHOST_USER_PROTOCOL_F_CONFIG,
  VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
  VHOST_USER_PROTOCOL_F_REPLY_ACK,
} from '../../vhost-user/wire.ts'
import {
  decodeBlkConfig,
  VIRTIO_BLK_CONFIG_CAPACITY,
  VIRTIO_BLK_CONFIG_WCE,
  VIRTIO_BLK_F_CONFIG_WCE,
  VIRTIO_BLK_F_MQ,
  VIRTIO_BLK_F_SIZE_MAX,
} from '../../virtio/blk.ts'
import { VHOST_USER_F_PROTOCOL_FEATURES, VIRTIO_F_VERSION_1 } from '../../virtio/constants.ts'
import { FrontendError } from '../errors.ts'
import { sleepMs } from '../virtqueue.ts'
import type { VerifyCase, VerifyContext } from './case.ts'
import { Failure, must, mustEqual, need } from './case.ts'

export const negotiationCases: readonly VerifyCase[] = [
  {
    name: 'negotiation/features',
    title: 'VERSION_1 and protocol features are offered, and stay the same when asked again',
    spec: 'virtio 1.3 §6.1; vhost-user.rst "Protocol features"',
    run: (context) => {
      must(context.has(VIRTIO_F_VERSION_1), 'VIRTIO_F_VERSION_1 is not offered')
      must(context.has(VHOST_USER_F_PROTOCOL_FEATURES), 'VHOST_USER_F_PROTOCOL_FEATURES is not offered')
      const { session } = context.open()
      must(session.connection.getFeatures() === context.facts.features, 'GET_FEATURES changed its answer')
      must(
        session.connection.getProtocolFeatures() === context.facts.protocolFeatures,
        'GET_PROTOCOL_FEATURES changed its answer'
      )
    },
  },
  {
    name: 'negotiation/repeated-set-features',
    title: 'a repeated SET_FEATURES (QEMU sends one) leaves running rings alone',
    spec: 'vhost-user.rst "Ring states"',
    run: (context) => {
      const { session, blk } = context.open()
      context.mustWork(blk, 'before')
      session.connection.setFeatures(session.features)
      context.mustWork(blk, 'after a second SET_FEATURES')
    },
  },
  {
    name: 'negotiation/no-protocol-features',
    title: 'an old front-end without protocol features is served: its ring starts enabled',
    spec: 'vhost-user.rst "Ring states"',
    run: (context) => {
      const { blk } = context.open({ withoutFeatures: [VHOST_USER_F_PROTOCOL_FEATURES] })
      context.mustWork(blk, 'without protocol features')
    },
  },
  {
    name: 'negotiation/no-reply-ack',
    title: 'without REPLY_ACK nothing is acknowledged, and everything works',
    spec: 'vhost-user.rst "VHOST_USER_PROTOCOL_F_REPLY_ACK"',
    run: (context) => {
      const { session, blk } = context.open({ withoutProtocolFeatures: [VHOST_USER_PROTOCOL_F_REPLY_ACK] })
      must(!session.connection.channel.readable(20), 'the back-end sent a reply that nobody asked for')
      context.mustWork(blk, 'without REPLY_ACK')
    },
  },
  {
    name: 'negotiation/set-mem-table',
    title: 'memory comes by SET_MEM_TABLE when memory slots are not negotiated',
    spec: 'vhost-user.rst "VHOST_USER_SET_MEM_TABLE"',
    run: (context) => {
      const { blk } = context.open({ withoutProtocolFeatures: [VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS] })
      context.mustWork(blk, 'with SET_MEM_TABLE')
    },
  },
  {
    name: 'negotiation/queue-count',
    title: 'GET_QUEUE_NUM and the num_queues field agree',
    spec: 'virtio 1.3 §5.2.4; vhost-user.rst "Multiple queue support"',
    run: (context) => {
      const { maxQueues, config } = context.facts
      must(maxQueues >= 1, `GET_QUEUE_NUM says ${maxQueues}`)
      if (context.has(VIRTIO_BLK_F_MQ)) {
        must(
          config.numQueues !== undefined && config.numQueues >= 1 && config.numQueues <= maxQueues,
          `num_queues is ${config.numQueues}, GET_QUEUE_NUM says ${maxQueues}`
        )
      }
      return `${maxQueues} queues`
    },
  },
  {
    name: 'ring-state/enable-unconfigured',
    title: 'SET_VRING_ENABLE for rings that were never configured (QEMU does that) is accepted',
    spec: 'vhost-user.rst "Ring states"',
    run: (context) => {
      const { session, blk } = context.open()
      for (let i = 1; i < session.maxQueues; i++) session.connection.setVringEnable(i, true)
      session.connection.barrier()
      context.mustWork(blk, 'after SET_VRING_ENABLE of the other rings')
      return session.maxQueues === 1 ? 'only one queue' : undefined
    },
  },
  {
    name: 'ring-state/enable-late',
    title: 'requests made available before SET_VRING_ENABLE complete after it, once',
    spec: 'vhost-user.rst "Ring states"',
    run: (context) => {
      const { session } = context.open({ queues: 0 })
      const queue = session.startQueue(0, {}, false)
      const blk = context.driver(session)
      const request = blk.submit(0, context.sector(), new Uint8Array(0), context.facts.blockSize)
      queue.driver.kickRaw()
      sleepMs(50)
      const early = queue.driver.pending()
      session.connection.setVringEnable(0, true)
      if (early === 0) {
        queue.driver.kickRaw()
        blk.wait(request)
        must(request.status === 0, `status ${request.status}`)
      }
      sleepMs(5)
      const completions = queue.driver.pending() + (request.done ? 1 : 0)
      must(completions === 1, `${completions} completions of one request`)
      return early === 0 ? undefined : 'it was processed while the ring was disabled'
    },
  },
  {
    name: 'ring-state/disable-enable',
    title: 'a ring goes on after it was disabled and enabled again',
    spec: 'vhost-user.rst "Ring states"',
    run: (context) => {
      const { session, blk } = context.open()
      for (let i = 0; i < 5; i++) {
        session.connection.setVringEnable(0, false)
        session.connection.setVringEnable(0, true)
        context.mustWork(blk, `round ${i + 1}`)
      }
    },
  },
  {
    name: 'config/sane',
    title: 'the fields whose features are offered have values that make sense',
    spec: 'virtio 1.3 §5.2.4',
    run: (context) => {
      const { config } = context.facts
      must(config.capacity > 0n, 'the capacity is 0')
      const block = config.blkSize ?? 512
      must(block >= 512 && (block & (block - 1)) === 0, `blk_size is ${block}`)
      must((config.capacity * 512n) % BigInt(block) === 0n, `the capacity is not a multiple of blk_size ${block}`)
      must(config.segMax === undefined || config.segMax >= 1, 'SEG_MAX is offered and seg_max is 0')
      must(!context.has(VIRTIO_BLK_F_SIZE_MAX) || (config.sizeMax ?? 0) > 0, 'SIZE_MAX is offered and size_max is 0')
      if (config.discard)
        must(config.discard.maxSectors > 0 && config.discard.maxSegments > 0, 'DISCARD is offered with a limit of 0')
      if (config.writeZeroes) {
        must(
          config.writeZeroes.maxSectors > 0 && config.writeZeroes.maxSegments > 0,
          'WRITE_ZEROES is offered with a limit of 0'
        )
      }
    },
  },
  {
    name: 'config/sizes',
    title: 'a read of 8, 36, 57 or 60 bytes returns as many; 96 and 256 return as many or are refused',
    spec: 'vhost-user.rst "VHOST_USER_GET_CONFIG"',
    run: (context) => {
      const { session } = openForConfig(context)
      const whole = session.connection.getConfig(0, 60) ?? session.connection.getConfig(0, 57)
      must(whole !== undefined, 'reads of 60 and of 57 bytes are refused')
      const refused: number[] = []
      for (const size of [8, 36, 57, 60, 96, 256]) {
        const bytes = session.connection.getConfig(0, size)
        if (bytes === undefined) {
          must(size >= 60, `a read of ${size} bytes is refused`)
          refused.push(size)
          continue
        }
        must(bytes.length === size, `a read of ${size} bytes returned ${bytes.length}`)
        const common = Math.min(size, whole.length)
        mustEqual(bytes.subarray(0, common), whole.subarray(0, common), `a read of ${size} bytes`)
      }
      return refused.length === 0 ? undefined : `refused: ${refused.join(', ')}`
    },
  },
  {
    name: 'config/offsets',
    title: 'a read from an offset returns the bytes from that offset',
    spec: 'vhost-user.rst "Virtio device config space"',
    run: (context) => {
      const { session } = openForConfig(context)
      const whole = session.connection.getConfig(0, 57)
      must(whole !== undefined, 'a read of 57 bytes is refused')
      for (const [offset, size] of [
        [20, 4],
        [12, 4],
        [1, 7],
        [33, 3],
        [31, 2],
        [56, 1],
        [3, 1],
      ] as const) {
        const bytes = session.connection.getConfig(offset, size)
        must(bytes !== undefined, `a read of ${size} bytes at ${offset} is refused`)
        mustEqual(bytes, whole.subarray(offset, offset + size), `a read of ${size} bytes at ${offset}`)
      }
    },
  },
  {
    name: 'config/out-of-range',
    title: 'a read beyond the config space is refused (or ends the session), and the back-end goes on',
    spec: 'vhost-user.rst "VHOST_USER_GET_CONFIG"',
    run: (context) => {
      for (const [offset, size] of [
        [0xffff_ffff, 57],
        [0xffff_fff0, 32],
        [256, 1],
        [250, 100],
      ] as const) {
        const { session, blk } = openForConfig(context)
        try {
          session.connection.getConfig(offset, size)
        } catch (error) {
          must(error instanceof FrontendError && error.failure === 'closed', (error as Error).message)
          continue
        }
        context.mustWork(blk, `after a read of ${size} bytes at ${offset}`)
      }
      context.mustWork(context.open().blk, 'a new session')
    },
  },
  {
    name: 'config/wce',
    title: 'SET_CONFIG switches the write cache, and the config space shows it',
    spec: 'virtio 1.3 §5.2.5.2',
    writes: true,
    run: (context) => {
      need(context.has(VIRTIO_BLK_F_CONFIG_WCE), 'CONFIG_WCE is not offered')
      const { session, blk } = openForConfig(context)
      const read = (): number | undefined =>
        decodeBlkConfig(session.connection.getConfig(0, 57) ?? new Uint8Array(8), session.features).wce
      const before = read()
      must(before === 0 || before === 1, `wce is ${before}`)
      try {
        for (const value of [1 - before, before, 1 - before]) {
          session.connection.setConfig(VIRTIO_BLK_CONFIG_WCE, Uint8Array.of(value))
          session.connection.barrier()
          must(read() === value, `wce is ${read()} after it was set to ${value}`)
          context.mustWork(blk, `with wce ${value}`)
          blk.write(context.sector(), context.random(1).bytes(context.facts.blockSize))
        }
      } finally {
        session.connection.setConfig(VIRTIO_BLK_CONFIG_WCE, Uint8Array.of(before))
      }
    },
  },
  {
    name: 'config/read-only-field',
    title: 'a write to the capacity is refused or ignored',
    spec: 'virtio 1.3 §5.2.4: all fields but writeback are read-only for the driver',
    writes: true,
    run: (context) => {
      const { session } = openForConfig(context)
      const capacity = (): bigint =>
        decodeBlkConfig(context.open({ queues: 0 }).session.connection.getConfig(0, 57) ?? new Uint8Array(8)).capacity
      const bytes = new Uint8Array(8)
      new DataView(bytes.buffer).setBigUint64(0, context.facts.config.capacity / 2n, true)
      let answer = 'accepted and ignored'
      try {
        session.connection.setConfig(VIRTIO_BLK_CONFIG_CAPACITY, bytes)
        session.connection.barrier()
      } catch (error) {
        if (!(error instanceof FrontendError) || (error.failure !== 'nack' && error.failure !== 'closed')) throw error
        answer = error.failure === 'nack' ? 'refused' : 'the session was ended'
      }
      session.close(true)
      if (capacity() !== context.facts.config.capacity) throw new Failure('the guest could change the capacity')
      return answer
    },
  },
]

function openForConfig(context: VerifyContext): ReturnType<VerifyContext['open']> {
  need(context.hasProtocol(VHOST_USER_PROTOCOL_F_CONFIG), 'CONFIG is not offered')
  return context.open()
}

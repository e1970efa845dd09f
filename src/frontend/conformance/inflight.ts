/** Cases about the in-flight area itself, whatever the format of its rings. */
import { fstatSync } from 'node:fs'
import { native } from '../../native.ts'
import { VHOST_USER_GET_INFLIGHT_FD, VHOST_USER_PROTOCOL_F_REPLY_ACK } from '../../vhost-user/wire.ts'
import { InflightArea } from '../inflight.ts'
import { sleepMs } from '../virtqueue.ts'
import { type ConformanceCase, expect, expectEqual } from './case.ts'
import { crash, protocol, resume, SIZE, split, TRACKING } from './crash.ts'
import { bytesOf, receiveReply } from './messages.ts'

export const inflightCases: readonly ConformanceCase[] = [
  {
    id: 'inflight-get',
    group: 'inflight',
    level: 'MUST',
    rule: 'answers GET_INFLIGHT_FD with a file in which the region of every queue has room, all of it fresh',
    cites: 'vhost-user.rst "VHOST_USER_GET_INFLIGHT_FD", "Inflight description"',
    needs: { protocol },
    run: (context) => {
      const queues = Math.min(context.facts.rings, 4)
      const guest = context.guest({ inflight: { numQueues: queues, queueSize: 256 } })
      const { inflight } = guest.session
      if (inflight === undefined) throw new Error('no in-flight area')
      const { mmapSize, mmapOffset, numQueues, queueSize } = inflight.description
      expectEqual('num queues', numQueues, queues)
      expectEqual('queue size', queueSize, 256)
      const least = queues * (16 + 16 * 256)
      expect(mmapSize >= BigInt(least), `an mmap size of at least ${least}`, `${mmapSize}`)
      const { size } = fstatSync(inflight.fd)
      expect(BigInt(size) >= mmapOffset + mmapSize, `a file of ${mmapOffset + mmapSize} bytes`, `${size}`)
      for (let queue = 0; queue < queues; queue++) {
        const state = inflight.read(queue)
        expect(state.version <= 1, 'version 0 or 1', `${state.version}`)
        expectEqual('entries in flight in a fresh area', state.inflight.length, 0)
      }
      return `${mmapSize} bytes for ${queues} queues`
    },
  },
  {
    id: 'inflight-get-padded',
    group: 'inflight',
    level: 'SHOULD',
    rule: 'takes GET_INFLIGHT_FD of 24 bytes, as QEMU sends its C structure',
    cites: 'vhost-user.rst "C structure" (VhostUserInflight ends in 4 bytes of padding)',
    needs: { protocol },
    run: (context) => {
      const { connection } = context.guest({ inflight: { numQueues: 1, queueSize: 64 } })
      const payload = new Uint8Array(24)
      const view = new DataView(payload.buffer)
      view.setUint16(16, 1, true)
      view.setUint16(18, 64, true)
      connection.send(bytesOf({ request: VHOST_USER_GET_INFLIGHT_FD, payload }))
      const reply = receiveReply(connection, VHOST_USER_GET_INFLIGHT_FD)
      for (const fd of reply.fds) native.close(fd)
      expect(reply.payload.length >= 20, 'a description', `${reply.payload.length} bytes`)
      expectEqual('files that come with it', reply.fds.length, 1)
      return `${reply.payload.length} bytes`
    },
  },
  {
    id: 'inflight-rings-work',
    group: 'inflight',
    level: 'MUST',
    rule: 'serves rings with tracking like rings without',
    cites: TRACKING,
    needs: { protocol },
    run: (context) => {
      const { ring } = context.running({ inflight: { numQueues: context.facts.rings, queueSize: 256 } })
      for (let i = 0; i < 20; i++) ring.finishAll(ring.batch(60))
      const base = ring.stop()
      ring.start(base)
      ring.run(3, {}, 'a request after a stop')
      return '1203 requests'
    },
  },
  {
    id: 'inflight-set-too-small',
    group: 'inflight',
    level: 'SHOULD',
    rule: 'refuses an in-flight area that is too small for its queues, or a ring that is larger than it says',
    cites: 'vhost-user.rst "Inflight description"',
    needs: { protocol: [...protocol, VHOST_USER_PROTOCOL_F_REPLY_ACK] },
    run: (context) => {
      const area = InflightArea.create(1, 64, false)
      try {
        const seen: string[] = []
        for (const wrong of [{ mmapSize: 64n }, { queueSize: 16 }, { mmapOffset: 2n ** 40n }]) {
          const guest = context.guest({ inflight: area })
          const ring = guest.prepare(0, { size: 64 })
          const description = { ...area.description, ...wrong }
          seen.push(
            context.expectRefusal(
              guest.connection,
              JSON.stringify(wrong, (_, value) => String(value)),
              () => {
                guest.connection.setInflightFd(description, area.fd)
                ring.num()
                ring.base()
                ring.address()
                ring.kick()
              }
            )
          )
          ring.started = false
        }
        return seen.join(', ')
      } finally {
        context.release(false)
        area.close()
      }
    },
  },
  {
    id: 'inflight-garbage',
    group: 'inflight',
    level: 'SHOULD',
    rule: 'lives with an in-flight area full of random bytes',
    cites: TRACKING,
    needs: split,
    run: (context) => {
      let seed = 7
      for (let round = 0; round < 20; round++) {
        crash(context, 'split', ({ view, ring, guest }) => {
          for (let i = 0; i < view.byteLength; i++) {
            seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0
            view.setUint8(i, seed >>> 24)
          }
          if (round % 2 === 0) {
            view.setUint16(8, 1, true)
            view.setUint16(10, SIZE, true)
          }
          ring.batch(3)
          context.answer(guest.connection, () => resume(ring, 0))
          sleepMs(5)
          ring.started = false
          return ''
        })
      }
      context.expectServing('a session after it')
      return '20 areas'
    },
  },
]

/** Cases about the config space. */
import {
  VHOST_USER_GET_CONFIG,
  VHOST_USER_PROTOCOL_F_CONFIG,
  VHOST_USER_PROTOCOL_F_REPLY_ACK,
} from '../../vhost-user/wire.ts'
import { VIRTIO_BLK_CONFIG_SIZE_QEMU, VIRTIO_BLK_F_CONFIG_WCE } from '../../virtio/blk.ts'
import { VIRTIO_NET_CONFIG_SIZE } from '../../virtio/net.ts'
import type { Connection } from '../connection.ts'
import { FrontendError } from '../errors.ts'
import { type ConformanceCase, expect, expectBytes, expectEqual } from './case.ts'
import type { Context } from './context.ts'
import { bytesOf, receiveReply } from './messages.ts'

/** Bytes that every device of the kind has: what QEMU asks for. */
function commonSize(context: Context): number {
  return context.facts.device === 'blk' ? VIRTIO_BLK_CONFIG_SIZE_QEMU : VIRTIO_NET_CONFIG_SIZE
}

/** The config space as far as every device has one. @throws Violation */
function wholeConfig(context: Context, connection: Connection): Uint8Array {
  const size = commonSize(context)
  const bytes = connection.getConfig(0, size)
  expect(bytes !== undefined, `a reply with ${size} bytes of config space`, 'an empty payload')
  return bytes
}

/** @returns the reply's payload to a request made by hand */
function rawConfig(connection: Connection, offset: number, size: number, payload: number): Uint8Array {
  const bytes = new Uint8Array(12 + payload)
  const view = new DataView(bytes.buffer)
  view.setUint32(0, offset, true)
  view.setUint32(4, size, true)
  connection.send(bytesOf({ request: VHOST_USER_GET_CONFIG, payload: bytes }))
  return receiveReply(connection, VHOST_USER_GET_CONFIG).payload
}

/** A reply of no payload is an error; so is the end of the connection. */
function expectConfigError(connection: Connection, what: string, ask: () => Uint8Array | undefined): string {
  try {
    const payload = ask()
    expect(payload === undefined || payload.length === 0, `${what}: an empty payload`, `${payload?.length} bytes`)
    return 'an empty payload'
  } catch (error) {
    if (error instanceof FrontendError && error.failure === 'closed') return `closed (${what})`
    throw error
  } finally {
    connection.close()
  }
}

const needs = { protocol: [VHOST_USER_PROTOCOL_F_CONFIG] }

export const configCases: readonly ConformanceCase[] = [
  {
    id: 'config-size',
    group: 'protocol',
    level: 'MUST',
    rule: 'answers GET_CONFIG with a payload of the size of the request: 12 bytes and what was asked for',
    cites: 'vhost-user.rst "VHOST_USER_GET_CONFIG"',
    needs,
    run: (context) => {
      const { connection } = context.guest()
      const sizes = [1, 4, 6, 8, commonSize(context)]
      for (const size of sizes) {
        const payload = rawConfig(connection, 0, size, size)
        expectEqual(`bytes of the reply to a request for ${size}:`, payload.length, 12 + size)
        const view = new DataView(payload.buffer, payload.byteOffset)
        expectEqual('the offset in the reply', view.getUint32(0, true), 0)
        expectEqual('the size in the reply', view.getUint32(4, true), size)
      }
      return `sizes ${sizes.join(', ')}`
    },
  },
  {
    id: 'config-offset',
    group: 'protocol',
    level: 'MUST',
    rule: 'answers GET_CONFIG with the bytes at the offset that is asked for',
    cites: 'vhost-user.rst "Virtio device config space" (offset)',
    needs,
    run: (context) => {
      const { connection } = context.guest()
      const whole = wholeConfig(context, connection)
      for (let offset = 0; offset < whole.length; offset++) {
        for (const size of [1, 2, 4, 8]) {
          if (offset + size > whole.length) continue
          const part = connection.getConfig(offset, size)
          expect(part !== undefined, `${size} bytes at ${offset}`, 'an empty payload')
          expectBytes(`${size} bytes at ${offset}`, part, whole.subarray(offset, offset + size))
        }
      }
      return `every offset of ${whole.length} bytes`
    },
  },
  {
    id: 'config-same-in-each-session',
    group: 'protocol',
    level: 'MUST',
    rule: 'shows the same config space before and after SET_FEATURES',
    cites: 'virtio 1.3 §2.5.2 (reading before FEATURES_OK)',
    needs,
    run: (context) => {
      const connection = context.connect()
      connection.setProtocolFeatures(1n << BigInt(VHOST_USER_PROTOCOL_F_CONFIG))
      const early = wholeConfig(context, connection)
      const later = wholeConfig(context, context.running().guest.connection)
      expectBytes('the config space of a running device', later, early)
      return `${early.length} bytes`
    },
  },
  {
    id: 'config-beyond',
    group: 'protocol',
    level: 'MUST',
    rule: 'answers GET_CONFIG of what no config space has (offset and size overflow) with an empty payload',
    cites: 'vhost-user.rst "VHOST_USER_GET_CONFIG" ("uses zero length of payload to indicate an error")',
    needs,
    run: (context) => {
      const seen = [
        [0xffff_ffff, 4],
        [0xffff_fff0, 32],
        [0x8000_0000, 8],
        [4096, 4],
      ].map(([offset = 0, size = 0]) => {
        const { connection } = context.guest()
        return expectConfigError(connection, `offset 0x${offset.toString(16)}, size ${size}`, () =>
          connection.getConfig(offset, size)
        )
      })
      return [...new Set(seen)].join(', ')
    },
  },
  {
    id: 'config-size-lies',
    group: 'protocol',
    level: 'SHOULD',
    rule: 'answers GET_CONFIG whose size field is more than its payload with an empty payload',
    cites: 'vhost-user.rst "Virtio device config space" (payload: "Size bytes array")',
    needs,
    run: (context) => {
      const { connection } = context.guest()
      return expectConfigError(connection, 'size 200 with 8 bytes of payload', () => rawConfig(connection, 0, 200, 8))
    },
  },
  {
    id: 'config-read-only-field',
    group: 'protocol',
    level: 'MUST',
    rule: 'does not accept SET_CONFIG of a read-only field unless the live migration flag is set',
    cites: 'vhost-user.rst "VHOST_USER_SET_CONFIG"',
    needs: { protocol: [VHOST_USER_PROTOCOL_F_CONFIG] },
    destructive: true,
    run: (context) => {
      const { connection } = context.guest()
      const before = wholeConfig(context, connection)
      // A disk's capacity; a network card's status.
      const offset = context.facts.device === 'blk' ? 0 : 6
      const other = before.slice(offset, offset + 1).map((byte) => byte ^ 1)
      const answer = context.answer(connection, () => connection.setConfig(offset, other))
      const after = wholeConfig(context, context.guest().connection)
      expectBytes('the config space afterwards', after, before)
      expect(answer !== 'acknowledged', 'a refusal', 'the reply 0')
      return answer === 'taken' ? 'ignored' : answer
    },
  },
  {
    id: 'config-write-beyond',
    group: 'protocol',
    level: 'SHOULD',
    rule: 'refuses SET_CONFIG beyond the config space, also when offset and size overflow',
    cites: 'vhost-user.rst "Virtio device config space"',
    needs: { protocol: [VHOST_USER_PROTOCOL_F_CONFIG, VHOST_USER_PROTOCOL_F_REPLY_ACK] },
    run: (context) => {
      const seen = [0xffff_fffe, 4096, 255].map((offset) => {
        const { connection } = context.guest()
        return context.expectRefusal(connection, `4 bytes at ${offset}`, () =>
          connection.setConfig(offset, Uint8Array.of(0, 0, 0, 0))
        )
      })
      return [...new Set(seen)].join(', ')
    },
  },
  {
    id: 'config-writeback',
    group: 'protocol',
    level: 'MUST',
    rule: 'switches the write cache when the driver writes "writeback", and shows the mode there',
    cites: 'virtio 1.3 §5.2.4, §5.2.6.1; vhost-user.rst "VHOST_USER_SET_CONFIG"',
    needs: { device: 'blk', protocol: [VHOST_USER_PROTOCOL_F_CONFIG], features: [VIRTIO_BLK_F_CONFIG_WCE] },
    destructive: true,
    run: (context) => {
      const { guest, ring } = context.running()
      const read = (): number => wholeConfig(context, guest.connection)[32] ?? 0xff
      const before = read()
      expect(before <= 1, 'writeback 0 or 1', `${before}`)
      try {
        for (const mode of [1 - before, before, 1 - before]) {
          guest.connection.setConfig(32, Uint8Array.of(mode))
          expectEqual('writeback', read(), mode)
          ring.run(1, {}, `a request with writeback ${mode}`)
        }
      } finally {
        guest.connection.setConfig(32, Uint8Array.of(before))
      }
      return `was ${before}, switched three times and back`
    },
  },
]

/** Every request that virtiod serves: a valid message each, and what it may carry. For tests that bend them. */
import { payload64, vringState } from '../../src/frontend/connection.ts'
import * as wire from '../../src/vhost-user/wire.ts'
import { NOTHING } from './messages.ts'

export interface RequestRow {
  readonly request: number
  /** A payload of a size that the request may have. */
  readonly payload: Uint8Array
  /** Its smallest and its largest payload. */
  readonly size: readonly [number, number]
  /** How many fds it may carry. */
  readonly fds: readonly [number, number]
  /** It has a reply of its own, so that it cannot be refused but by hanging up. */
  readonly replies?: true
  /** The protocol feature that it needs. */
  readonly feature?: number
}

export const REGION = { guestAddress: 0x10_0000n, size: 0x10_0000n, userAddress: 0x7f00_0000_0000n, mmapOffset: 0n }

/** ADD_MEM_REG and REM_MEM_REG. */
export function single(region: wire.MemoryRegionDescription): Uint8Array {
  const bytes = new Uint8Array(40)
  wire.writeMemoryRegion(new DataView(bytes.buffer), 8, region)
  return bytes
}

/** SET_MEM_TABLE. @param count what it says about itself */
export function table(regions: readonly wire.MemoryRegionDescription[], count = regions.length): Uint8Array {
  const bytes = new Uint8Array(8 + 32 * regions.length)
  const view = new DataView(bytes.buffer)
  view.setUint32(0, count, true)
  for (const [i, region] of regions.entries()) wire.writeMemoryRegion(view, 8 + 32 * i, region)
  return bytes
}

/** GET_CONFIG and SET_CONFIG. @param size what it says about itself */
export function config(offset: number, bytes: Uint8Array, size = bytes.length): Uint8Array {
  const payload = new Uint8Array(12 + bytes.length)
  const view = new DataView(payload.buffer)
  view.setUint32(0, offset, true)
  view.setUint32(4, size, true)
  payload.set(bytes, 12)
  return payload
}

export function address(fields: Partial<wire.VringAddress>): Uint8Array {
  const bytes = new Uint8Array(wire.VRING_ADDRESS_SIZE)
  const zero = { index: 0, flags: 0, descriptor: 0n, used: 0n, available: 0n, log: 0n }
  wire.writeVringAddress(new DataView(bytes.buffer), 0, { ...zero, ...fields })
  return bytes
}

const none = [0, 0] as const
const empty = { payload: NOTHING, size: none, fds: none }
const word = { payload: payload64(0n), size: [8, 8] as const, fds: none }
const state = { payload: vringState(0, 256), size: [8, 8] as const, fds: none }

/** GET_INFLIGHT_FD and SET_INFLIGHT_FD. */
export function inflight(fields: Partial<wire.InflightDescription> = {}, bytes = 20): Uint8Array {
  const payload = new Uint8Array(bytes)
  const all = { mmapSize: 0n, mmapOffset: 0n, numQueues: 2, queueSize: 256, ...fields }
  wire.writeInflight(new DataView(payload.buffer), 0, all)
  return payload
}

export function log(size: bigint, offset: bigint): Uint8Array {
  const payload = new Uint8Array(wire.LOG_DESCRIPTION_SIZE)
  wire.writeLog(new DataView(payload.buffer), 0, { size, offset })
  return payload
}

export const REQUEST_ROWS: readonly RequestRow[] = [
  { request: wire.VHOST_USER_GET_FEATURES, ...empty, replies: true },
  { request: wire.VHOST_USER_SET_FEATURES, ...word },
  { request: wire.VHOST_USER_SET_OWNER, ...empty },
  { request: wire.VHOST_USER_RESET_OWNER, ...empty },
  { request: wire.VHOST_USER_SET_MEM_TABLE, payload: table([]), size: [8, 264], fds: none },
  { request: wire.VHOST_USER_SET_VRING_NUM, ...state },
  { request: wire.VHOST_USER_SET_VRING_ADDR, payload: address({}), size: [40, 40], fds: none },
  { request: wire.VHOST_USER_SET_VRING_BASE, ...state },
  { request: wire.VHOST_USER_GET_VRING_BASE, ...state, payload: vringState(0, 0), replies: true },
  // With the "no fd" flag none is due, without it exactly one.
  { request: wire.VHOST_USER_SET_VRING_KICK, ...word, fds: [1, 1] },
  { request: wire.VHOST_USER_SET_VRING_CALL, ...word, fds: [1, 1] },
  { request: wire.VHOST_USER_SET_VRING_ERR, ...word, fds: [1, 1] },
  { request: wire.VHOST_USER_GET_PROTOCOL_FEATURES, ...empty, replies: true },
  { request: wire.VHOST_USER_SET_PROTOCOL_FEATURES, ...word },
  { request: wire.VHOST_USER_GET_QUEUE_NUM, ...empty, replies: true, feature: wire.VHOST_USER_PROTOCOL_F_MQ },
  { request: wire.VHOST_USER_SET_VRING_ENABLE, ...state },
  {
    request: wire.VHOST_USER_SET_BACKEND_REQ_FD,
    ...empty,
    fds: [1, 1],
    feature: wire.VHOST_USER_PROTOCOL_F_BACKEND_REQ,
  },
  {
    request: wire.VHOST_USER_GET_CONFIG,
    payload: config(0, new Uint8Array(60)),
    size: [12, 268],
    fds: none,
    replies: true,
    feature: wire.VHOST_USER_PROTOCOL_F_CONFIG,
  },
  {
    request: wire.VHOST_USER_SET_CONFIG,
    payload: config(32, new Uint8Array(1)),
    size: [12, 268],
    fds: none,
    feature: wire.VHOST_USER_PROTOCOL_F_CONFIG,
  },
  // For network cards: with any other device their protocol features are never negotiated.
  { request: wire.VHOST_USER_SEND_RARP, ...word, feature: wire.VHOST_USER_PROTOCOL_F_RARP },
  { request: wire.VHOST_USER_NET_SET_MTU, ...word, feature: wire.VHOST_USER_PROTOCOL_F_MTU },
  {
    request: wire.VHOST_USER_SET_LOG_BASE,
    payload: log(4096n, 0n),
    size: [16, 16],
    fds: [1, 1],
    replies: true,
    feature: wire.VHOST_USER_PROTOCOL_F_LOG_SHMFD,
  },
  {
    request: wire.VHOST_USER_SET_LOG_FD,
    ...empty,
    size: [0, 8],
    fds: [1, 1],
    feature: wire.VHOST_USER_PROTOCOL_F_LOG_SHMFD,
  },
  {
    request: wire.VHOST_USER_IOTLB_MSG,
    payload: new Uint8Array(32),
    size: [26, 32],
    fds: none,
    replies: true,
  },
  {
    request: wire.VHOST_USER_GET_INFLIGHT_FD,
    payload: inflight(),
    size: [20, 24],
    fds: none,
    replies: true,
    feature: wire.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
  },
  {
    request: wire.VHOST_USER_SET_INFLIGHT_FD,
    payload: inflight({ mmapSize: 2n ** 20n }),
    size: [20, 24],
    fds: [1, 1],
    feature: wire.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
  },
  {
    request: wire.VHOST_USER_VRING_KICK,
    payload: vringState(0, 0),
    size: [8, 8],
    fds: none,
    feature: wire.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS,
  },
  { request: wire.VHOST_USER_SET_STATUS, ...word, feature: wire.VHOST_USER_PROTOCOL_F_STATUS },
  { request: wire.VHOST_USER_GET_STATUS, ...empty, replies: true, feature: wire.VHOST_USER_PROTOCOL_F_STATUS },
  {
    request: wire.VHOST_USER_SET_DEVICE_STATE_FD,
    payload: new Uint8Array(8),
    size: [8, 8],
    fds: [1, 1],
    replies: true,
    feature: wire.VHOST_USER_PROTOCOL_F_DEVICE_STATE,
  },
  {
    request: wire.VHOST_USER_CHECK_DEVICE_STATE,
    ...empty,
    replies: true,
    feature: wire.VHOST_USER_PROTOCOL_F_DEVICE_STATE,
  },
  { request: wire.VHOST_USER_RESET_DEVICE, ...empty, feature: wire.VHOST_USER_PROTOCOL_F_RESET_DEVICE },
  {
    request: wire.VHOST_USER_GET_MAX_MEM_SLOTS,
    ...empty,
    replies: true,
    feature: wire.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
  },
  {
    request: wire.VHOST_USER_ADD_MEM_REG,
    payload: single(REGION),
    size: [40, 40],
    fds: [1, 1],
    feature: wire.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
  },
  {
    request: wire.VHOST_USER_REM_MEM_REG,
    payload: single(REGION),
    size: [40, 40],
    fds: [0, 1],
    feature: wire.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
  },
]

/**
 * Every protocol feature and every message of vhost-user.rst: done, or refused and why. A bit is offered only when it
 * is done; QEMU acknowledges all that it knows, blindly. README's table is made of this one.
 */
import * as wire from './wire.ts'

/** Who speaks it: every device, or network cards only. */
export type Offer = 'every device' | 'net'

export interface ProtocolRow {
  readonly number: number
  /** Without its prefix. */
  readonly name: string
  /** Undefined: refused. */
  readonly done?: Offer
  /** Why it is refused, or what there is to say about it. */
  readonly note?: string
}

const NO_SUCH_DEVICE = 'no device here is of that kind'
const LEGACY = 'for legacy big-endian guests; virtiod speaks virtio 1'
const NO_SHARED_MEMORY = 'no device here has shared memory regions'
const NO_SHARED_OBJECTS = 'no device here exports dma-bufs'
const NO_DOORBELLS = 'for hardware with doorbell pages; rings here are served by software'
const POSTCOPY = 'excludes CONFIGURE_MEM_SLOTS (vhost-user.rst "Migration"), without which memory cannot be hot-plugged'
const SKIP_DRAIN = 'its number is not settled: 44 and 45 are in use; GET_VRING_BASE with num = 1 does the same'

/** VHOST_USER_PROTOCOL_F_*. */
export const PROTOCOL_FEATURE_ROWS: readonly ProtocolRow[] = [
  { number: wire.VHOST_USER_PROTOCOL_F_MQ, name: 'MQ', done: 'every device' },
  { number: wire.VHOST_USER_PROTOCOL_F_LOG_SHMFD, name: 'LOG_SHMFD', done: 'every device' },
  { number: wire.VHOST_USER_PROTOCOL_F_RARP, name: 'RARP', done: 'net' },
  { number: wire.VHOST_USER_PROTOCOL_F_REPLY_ACK, name: 'REPLY_ACK', done: 'every device' },
  { number: wire.VHOST_USER_PROTOCOL_F_MTU, name: 'MTU', done: 'net' },
  { number: wire.VHOST_USER_PROTOCOL_F_BACKEND_REQ, name: 'BACKEND_REQ', done: 'every device' },
  { number: wire.VHOST_USER_PROTOCOL_F_CROSS_ENDIAN, name: 'CROSS_ENDIAN', note: LEGACY },
  { number: wire.VHOST_USER_PROTOCOL_F_CRYPTO_SESSION, name: 'CRYPTO_SESSION', note: NO_SUCH_DEVICE },
  { number: wire.VHOST_USER_PROTOCOL_F_PAGEFAULT, name: 'PAGEFAULT', note: POSTCOPY },
  { number: wire.VHOST_USER_PROTOCOL_F_CONFIG, name: 'CONFIG', done: 'every device' },
  {
    number: wire.VHOST_USER_PROTOCOL_F_BACKEND_SEND_FD,
    name: 'BACKEND_SEND_FD',
    note: 'no request of ours carries a file descriptor',
  },
  { number: wire.VHOST_USER_PROTOCOL_F_HOST_NOTIFIER, name: 'HOST_NOTIFIER', note: NO_DOORBELLS },
  { number: wire.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD, name: 'INFLIGHT_SHMFD', done: 'every device' },
  { number: wire.VHOST_USER_PROTOCOL_F_RESET_DEVICE, name: 'RESET_DEVICE', done: 'every device' },
  { number: wire.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS, name: 'INBAND_NOTIFICATIONS', done: 'every device' },
  { number: wire.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS, name: 'CONFIGURE_MEM_SLOTS', done: 'every device' },
  { number: wire.VHOST_USER_PROTOCOL_F_STATUS, name: 'STATUS', done: 'every device' },
  { number: wire.VHOST_USER_PROTOCOL_F_XEN_MMAP, name: 'XEN_MMAP', note: 'for Xen guests, whose memory is no file' },
  { number: wire.VHOST_USER_PROTOCOL_F_SHARED_OBJECT, name: 'SHARED_OBJECT', note: NO_SHARED_OBJECTS },
  { number: wire.VHOST_USER_PROTOCOL_F_DEVICE_STATE, name: 'DEVICE_STATE', done: 'every device' },
  {
    number: wire.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT,
    name: 'GET_VRING_BASE_INFLIGHT',
    done: 'every device',
    note: 'GET_VRING_BASE drains, and with num = 1 leaves in flight what the in-flight buffer tracks',
  },
  {
    number: wire.VHOST_USER_PROTOCOL_F_GPA_ADDRESSES,
    name: 'GPA_ADDRESSES',
    note: 'front-ends with rust-vmm’s vhost before 0.17 take this bit for SHMEM and go on with user addresses',
  },
  { number: wire.VHOST_USER_PROTOCOL_F_SHMEM, name: 'SHMEM', note: NO_SHARED_MEMORY },
  {
    number: wire.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN,
    name: 'GET_VRING_BASE_SKIP_DRAIN',
    note: SKIP_DRAIN,
  },
]

/** Front-end → back-end. */
export const REQUEST_ROWS: readonly ProtocolRow[] = [
  ...done(
    wire.VHOST_USER_GET_FEATURES,
    wire.VHOST_USER_SET_FEATURES,
    wire.VHOST_USER_SET_OWNER,
    wire.VHOST_USER_RESET_OWNER,
    wire.VHOST_USER_SET_MEM_TABLE,
    wire.VHOST_USER_SET_LOG_BASE,
    wire.VHOST_USER_SET_LOG_FD,
    wire.VHOST_USER_SET_VRING_NUM,
    wire.VHOST_USER_SET_VRING_ADDR,
    wire.VHOST_USER_SET_VRING_BASE,
    wire.VHOST_USER_GET_VRING_BASE,
    wire.VHOST_USER_SET_VRING_KICK,
    wire.VHOST_USER_SET_VRING_CALL,
    wire.VHOST_USER_SET_VRING_ERR,
    wire.VHOST_USER_GET_PROTOCOL_FEATURES,
    wire.VHOST_USER_SET_PROTOCOL_FEATURES,
    wire.VHOST_USER_GET_QUEUE_NUM,
    wire.VHOST_USER_SET_VRING_ENABLE
  ),
  { ...request(wire.VHOST_USER_SEND_RARP), done: 'net' },
  { ...request(wire.VHOST_USER_NET_SET_MTU), done: 'net' },
  ...done(wire.VHOST_USER_SET_BACKEND_REQ_FD, wire.VHOST_USER_IOTLB_MSG),
  ...refused(LEGACY, wire.VHOST_USER_SET_VRING_ENDIAN),
  ...done(wire.VHOST_USER_GET_CONFIG, wire.VHOST_USER_SET_CONFIG),
  ...refused(NO_SUCH_DEVICE, wire.VHOST_USER_CREATE_CRYPTO_SESSION, wire.VHOST_USER_CLOSE_CRYPTO_SESSION),
  ...refused(POSTCOPY, wire.VHOST_USER_POSTCOPY_ADVISE, wire.VHOST_USER_POSTCOPY_LISTEN, wire.VHOST_USER_POSTCOPY_END),
  ...done(wire.VHOST_USER_GET_INFLIGHT_FD, wire.VHOST_USER_SET_INFLIGHT_FD),
  ...refused(NO_SUCH_DEVICE, wire.VHOST_USER_GPU_SET_SOCKET),
  ...done(
    wire.VHOST_USER_RESET_DEVICE,
    wire.VHOST_USER_VRING_KICK,
    wire.VHOST_USER_GET_MAX_MEM_SLOTS,
    wire.VHOST_USER_ADD_MEM_REG,
    wire.VHOST_USER_REM_MEM_REG,
    wire.VHOST_USER_SET_STATUS,
    wire.VHOST_USER_GET_STATUS
  ),
  ...refused(NO_SHARED_OBJECTS, wire.VHOST_USER_GET_SHARED_OBJECT),
  ...done(wire.VHOST_USER_SET_DEVICE_STATE_FD, wire.VHOST_USER_CHECK_DEVICE_STATE),
  ...refused(NO_SHARED_MEMORY, wire.VHOST_USER_GET_SHMEM_CONFIG),
  ...refused(SKIP_DRAIN, wire.VHOST_USER_GET_VRING_BASE_SKIP_DRAIN),
]

/** Back-end → front-end. */
export const BACKEND_REQUEST_ROWS: readonly ProtocolRow[] = [
  {
    number: wire.VHOST_USER_BACKEND_IOTLB_MSG,
    name: 'IOTLB_MSG',
    done: 'every device',
    note: 'misses; what the guest may not access waits for a translation that allows it',
  },
  { number: wire.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, name: 'CONFIG_CHANGE_MSG', done: 'every device' },
  {
    number: wire.VHOST_USER_BACKEND_VRING_HOST_NOTIFIER_MSG,
    name: 'VRING_HOST_NOTIFIER_MSG',
    note: NO_DOORBELLS,
  },
  { number: wire.VHOST_USER_BACKEND_VRING_CALL, name: 'VRING_CALL', done: 'every device' },
  { number: wire.VHOST_USER_BACKEND_VRING_ERR, name: 'VRING_ERR', done: 'every device' },
  { number: wire.VHOST_USER_BACKEND_SHARED_OBJECT_ADD, name: 'SHARED_OBJECT_ADD', note: NO_SHARED_OBJECTS },
  { number: wire.VHOST_USER_BACKEND_SHARED_OBJECT_REMOVE, name: 'SHARED_OBJECT_REMOVE', note: NO_SHARED_OBJECTS },
  { number: wire.VHOST_USER_BACKEND_SHARED_OBJECT_LOOKUP, name: 'SHARED_OBJECT_LOOKUP', note: NO_SHARED_OBJECTS },
  { number: wire.VHOST_USER_BACKEND_SHMEM_MAP, name: 'SHMEM_MAP', note: NO_SHARED_MEMORY },
  { number: wire.VHOST_USER_BACKEND_SHMEM_UNMAP, name: 'SHMEM_UNMAP', note: NO_SHARED_MEMORY },
]

/** What every device offers. */
export const PROTOCOL_FEATURES: readonly number[] = offered('every device')
/** What network cards offer beside that. */
export const NETWORK_PROTOCOL_FEATURES: readonly number[] = offered('net')

function offered(by: Offer): number[] {
  return PROTOCOL_FEATURE_ROWS.filter((row) => row.done === by).map((row) => row.number)
}

function request(number: number): ProtocolRow {
  return { number, name: wire.requestName(number) }
}

function done(...numbers: number[]): ProtocolRow[] {
  return numbers.map((number) => ({ ...request(number), done: 'every device' }))
}

function refused(note: string, ...numbers: number[]): ProtocolRow[] {
  return numbers.map((number) => ({ ...request(number), note }))
}

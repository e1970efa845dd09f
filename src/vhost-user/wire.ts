/**
 * The vhost-user wire format (vhost-user.rst): request numbers, flags, payload layouts. Pure: bytes in, values out.
 * Both ends use it: the back-end in `vhost-user/`, the front-end in `frontend/`. It must not know sockets, fds or
 * sessions.
 */

// ---- front-end → back-end requests (vhost-user.rst "Front-end message types")
export const VHOST_USER_GET_FEATURES = 1
export const VHOST_USER_SET_FEATURES = 2
export const VHOST_USER_SET_OWNER = 3
export const VHOST_USER_RESET_OWNER = 4
export const VHOST_USER_SET_MEM_TABLE = 5
export const VHOST_USER_SET_LOG_BASE = 6
export const VHOST_USER_SET_LOG_FD = 7
export const VHOST_USER_SET_VRING_NUM = 8
export const VHOST_USER_SET_VRING_ADDR = 9
export const VHOST_USER_SET_VRING_BASE = 10
export const VHOST_USER_GET_VRING_BASE = 11
export const VHOST_USER_SET_VRING_KICK = 12
export const VHOST_USER_SET_VRING_CALL = 13
export const VHOST_USER_SET_VRING_ERR = 14
export const VHOST_USER_GET_PROTOCOL_FEATURES = 15
export const VHOST_USER_SET_PROTOCOL_FEATURES = 16
export const VHOST_USER_GET_QUEUE_NUM = 17
export const VHOST_USER_SET_VRING_ENABLE = 18
export const VHOST_USER_SEND_RARP = 19
export const VHOST_USER_NET_SET_MTU = 20
export const VHOST_USER_SET_BACKEND_REQ_FD = 21
export const VHOST_USER_IOTLB_MSG = 22
export const VHOST_USER_SET_VRING_ENDIAN = 23
export const VHOST_USER_GET_CONFIG = 24
export const VHOST_USER_SET_CONFIG = 25
export const VHOST_USER_CREATE_CRYPTO_SESSION = 26
export const VHOST_USER_CLOSE_CRYPTO_SESSION = 27
export const VHOST_USER_POSTCOPY_ADVISE = 28
export const VHOST_USER_POSTCOPY_LISTEN = 29
export const VHOST_USER_POSTCOPY_END = 30
export const VHOST_USER_GET_INFLIGHT_FD = 31
export const VHOST_USER_SET_INFLIGHT_FD = 32
export const VHOST_USER_GPU_SET_SOCKET = 33
export const VHOST_USER_RESET_DEVICE = 34
export const VHOST_USER_VRING_KICK = 35
export const VHOST_USER_GET_MAX_MEM_SLOTS = 36
export const VHOST_USER_ADD_MEM_REG = 37
export const VHOST_USER_REM_MEM_REG = 38
export const VHOST_USER_SET_STATUS = 39
export const VHOST_USER_GET_STATUS = 40
export const VHOST_USER_GET_SHARED_OBJECT = 41
export const VHOST_USER_SET_DEVICE_STATE_FD = 42
export const VHOST_USER_CHECK_DEVICE_STATE = 43
export const VHOST_USER_GET_SHMEM_CONFIG = 44
export const VHOST_USER_GET_VRING_BASE_SKIP_DRAIN = 45

// ---- back-end → front-end requests (vhost-user.rst "Back-end message types")
export const VHOST_USER_BACKEND_IOTLB_MSG = 1
export const VHOST_USER_BACKEND_CONFIG_CHANGE_MSG = 2
export const VHOST_USER_BACKEND_VRING_HOST_NOTIFIER_MSG = 3
export const VHOST_USER_BACKEND_VRING_CALL = 4
export const VHOST_USER_BACKEND_VRING_ERR = 5
export const VHOST_USER_BACKEND_SHARED_OBJECT_ADD = 6
export const VHOST_USER_BACKEND_SHARED_OBJECT_REMOVE = 7
export const VHOST_USER_BACKEND_SHARED_OBJECT_LOOKUP = 8
export const VHOST_USER_BACKEND_SHMEM_MAP = 9
export const VHOST_USER_BACKEND_SHMEM_UNMAP = 10

// ---- protocol feature bits
export const VHOST_USER_PROTOCOL_F_MQ = 0
export const VHOST_USER_PROTOCOL_F_LOG_SHMFD = 1
export const VHOST_USER_PROTOCOL_F_RARP = 2
export const VHOST_USER_PROTOCOL_F_REPLY_ACK = 3
export const VHOST_USER_PROTOCOL_F_MTU = 4
export const VHOST_USER_PROTOCOL_F_BACKEND_REQ = 5
export const VHOST_USER_PROTOCOL_F_CROSS_ENDIAN = 6
export const VHOST_USER_PROTOCOL_F_CRYPTO_SESSION = 7
export const VHOST_USER_PROTOCOL_F_PAGEFAULT = 8
export const VHOST_USER_PROTOCOL_F_CONFIG = 9
export const VHOST_USER_PROTOCOL_F_BACKEND_SEND_FD = 10
export const VHOST_USER_PROTOCOL_F_HOST_NOTIFIER = 11
export const VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD = 12
export const VHOST_USER_PROTOCOL_F_RESET_DEVICE = 13
export const VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS = 14
export const VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS = 15
export const VHOST_USER_PROTOCOL_F_STATUS = 16
export const VHOST_USER_PROTOCOL_F_XEN_MMAP = 17
export const VHOST_USER_PROTOCOL_F_SHARED_OBJECT = 18
export const VHOST_USER_PROTOCOL_F_DEVICE_STATE = 19
export const VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT = 20
export const VHOST_USER_PROTOCOL_F_GPA_ADDRESSES = 21
export const VHOST_USER_PROTOCOL_F_SHMEM = 22
export const VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN = 23

// ---- header (vhost-user.rst "Header"): u32 request, u32 flags, u32 payload size
export const HEADER_SIZE = 12
/** Bits 0-1 of the flags: protocol version 1. */
export const VHOST_USER_VERSION = 1
export const VHOST_USER_VERSION_MASK = 3
export const VHOST_USER_REPLY_MASK = 4
export const VHOST_USER_NEED_REPLY_MASK = 8

/** fds that one message may carry (VHOST_MEMORY_BASELINE_NREGIONS). */
export const VHOST_USER_MAX_FDS = 8
/** Regions of SET_MEM_TABLE. */
export const VHOST_MEMORY_BASELINE_NREGIONS = 8
/** Memory slots with CONFIGURE_MEM_SLOTS: what libvhost-user, QEMU and KVM agree on. */
export const MAX_MEM_SLOTS = 509
/** Largest config space that GET_CONFIG can carry (VHOST_USER_MAX_CONFIG_SIZE). */
export const VHOST_USER_MAX_CONFIG_SIZE = 256
/** The largest payload of any message: GET_CONFIG is 12 + 256 bytes, SET_MEM_TABLE 8 + 8 × 32 (vhost-user.rst). */
export const MAX_PAYLOAD_SIZE = 4096

/** SET_VRING_KICK/CALL/ERR payload: bits 0-7 the queue index, bit 8 "no fd". */
export const VHOST_USER_VRING_IDX_MASK = 0xff
export const VHOST_USER_VRING_NOFD_MASK = 0x100

/** SET_VRING_ADDR flags bit 0: log writes to the used ring. */
export const VHOST_VRING_F_LOG = 0

/** SET_CONFIG flags: a write by the guest, or the front-end's, which restores a migrated config space. */
export const VHOST_SET_CONFIG_TYPE_FRONTEND = 0
export const VHOST_SET_CONFIG_TYPE_MIGRATION = 1

// SET_DEVICE_STATE_FD (vhost-user.rst "Device state transfer parameters"): two u32, 8 bytes
export const VHOST_TRANSFER_STATE_DIRECTION_SAVE = 0
export const VHOST_TRANSFER_STATE_DIRECTION_LOAD = 1
export const VHOST_TRANSFER_STATE_PHASE_STOPPED = 0
/** In the reply of SET_DEVICE_STATE_FD: no fd comes with it. */
export const VHOST_USER_DEVICE_STATE_NOFD_MASK = 0x100

/** GET_VRING_BASE with GET_VRING_BASE_INFLIGHT: `num` 1 leaves what is in flight in the in-flight buffer. */
export const VRING_BASE_KEEP_INFLIGHT = 1

// IOTLB message types (vhost-user.rst "An IOTLB message"); its permissions are IOTLB_READ and IOTLB_WRITE
export const VHOST_IOTLB_MISS = 1
export const VHOST_IOTLB_UPDATE = 2
export const VHOST_IOTLB_INVALIDATE = 3
export const VHOST_IOTLB_ACCESS_FAIL = 4

/**
 * vhost-user.rst "Memory region description": 32 bytes. Addresses are bigint: the protocol layer checks them before
 * they become numbers.
 */
export interface MemoryRegionDescription {
  readonly guestAddress: bigint
  readonly size: bigint
  readonly userAddress: bigint
  readonly mmapOffset: bigint
}
export const MEMORY_REGION_SIZE = 32

/** vhost-user.rst "A vring address description": 40 bytes. */
export interface VringAddress {
  readonly index: number
  readonly flags: number
  readonly descriptor: bigint
  readonly used: bigint
  readonly available: bigint
  readonly log: bigint
}
export const VRING_ADDRESS_SIZE = 40

/** vhost-user.rst "Log description": 16 bytes. */
export interface LogDescription {
  readonly size: bigint
  readonly offset: bigint
}
export const LOG_DESCRIPTION_SIZE = 16

/** vhost-user.rst "Inflight description": 20 bytes; QEMU's C structure ends in 4 bytes of padding. */
export interface InflightDescription {
  readonly mmapSize: bigint
  readonly mmapOffset: bigint
  readonly numQueues: number
  readonly queueSize: number
}
export const INFLIGHT_DESCRIPTION_SIZE = 20
export const INFLIGHT_DESCRIPTION_PADDED_SIZE = 24

/** vhost-user.rst "An IOTLB message": 26 bytes; the C structure `vhost_iotlb_msg` ends in 6 bytes of padding. */
export interface IotlbMessage {
  readonly iova: bigint
  readonly size: bigint
  readonly userAddress: bigint
  readonly permissions: number
  readonly type: number
}
export const IOTLB_MESSAGE_SIZE = 26
export const IOTLB_MESSAGE_PADDED_SIZE = 32

export function readMemoryRegion(view: DataView, at: number): MemoryRegionDescription {
  return {
    guestAddress: view.getBigUint64(at, true),
    size: view.getBigUint64(at + 8, true),
    userAddress: view.getBigUint64(at + 16, true),
    mmapOffset: view.getBigUint64(at + 24, true),
  }
}

export function writeMemoryRegion(view: DataView, at: number, region: MemoryRegionDescription): void {
  view.setBigUint64(at, region.guestAddress, true)
  view.setBigUint64(at + 8, region.size, true)
  view.setBigUint64(at + 16, region.userAddress, true)
  view.setBigUint64(at + 24, region.mmapOffset, true)
}

export function readVringAddress(view: DataView, at: number): VringAddress {
  return {
    index: view.getUint32(at, true),
    flags: view.getUint32(at + 4, true),
    descriptor: view.getBigUint64(at + 8, true),
    used: view.getBigUint64(at + 16, true),
    available: view.getBigUint64(at + 24, true),
    log: view.getBigUint64(at + 32, true),
  }
}

export function writeVringAddress(view: DataView, at: number, address: VringAddress): void {
  view.setUint32(at, address.index, true)
  view.setUint32(at + 4, address.flags, true)
  view.setBigUint64(at + 8, address.descriptor, true)
  view.setBigUint64(at + 16, address.used, true)
  view.setBigUint64(at + 24, address.available, true)
  view.setBigUint64(at + 32, address.log, true)
}

export function readLog(view: DataView, at: number): LogDescription {
  return { size: view.getBigUint64(at, true), offset: view.getBigUint64(at + 8, true) }
}

export function writeLog(view: DataView, at: number, log: LogDescription): void {
  view.setBigUint64(at, log.size, true)
  view.setBigUint64(at + 8, log.offset, true)
}

export function readInflight(view: DataView, at: number): InflightDescription {
  return {
    mmapSize: view.getBigUint64(at, true),
    mmapOffset: view.getBigUint64(at + 8, true),
    numQueues: view.getUint16(at + 16, true),
    queueSize: view.getUint16(at + 18, true),
  }
}

export function writeInflight(view: DataView, at: number, inflight: InflightDescription): void {
  view.setBigUint64(at, inflight.mmapSize, true)
  view.setBigUint64(at + 8, inflight.mmapOffset, true)
  view.setUint16(at + 16, inflight.numQueues, true)
  view.setUint16(at + 18, inflight.queueSize, true)
}

export function readIotlb(view: DataView, at: number): IotlbMessage {
  return {
    iova: view.getBigUint64(at, true),
    size: view.getBigUint64(at + 8, true),
    userAddress: view.getBigUint64(at + 16, true),
    permissions: view.getUint8(at + 24),
    type: view.getUint8(at + 25),
  }
}

export function writeIotlb(view: DataView, at: number, message: IotlbMessage): void {
  view.setBigUint64(at, message.iova, true)
  view.setBigUint64(at + 8, message.size, true)
  view.setBigUint64(at + 16, message.userAddress, true)
  view.setUint8(at + 24, message.permissions)
  view.setUint8(at + 25, message.type)
}

/** The names of the front-end requests, for errors and logs: `requestName(5)` is `SET_MEM_TABLE`. */
export function requestName(request: number): string {
  return REQUEST_NAMES[request] ?? `request ${request}`
}

// biome-ignore format: one row of the spec's table per line
const REQUEST_NAMES: readonly (string | undefined)[] = [
  undefined, 'GET_FEATURES', 'SET_FEATURES', 'SET_OWNER', 'RESET_OWNER', 'SET_MEM_TABLE', 'SET_LOG_BASE', 'SET_LOG_FD',
  'SET_VRING_NUM', 'SET_VRING_ADDR', 'SET_VRING_BASE', 'GET_VRING_BASE', 'SET_VRING_KICK', 'SET_VRING_CALL', 'SET_VRING_ERR',
  'GET_PROTOCOL_FEATURES', 'SET_PROTOCOL_FEATURES', 'GET_QUEUE_NUM', 'SET_VRING_ENABLE', 'SEND_RARP', 'NET_SET_MTU',
  'SET_BACKEND_REQ_FD', 'IOTLB_MSG', 'SET_VRING_ENDIAN', 'GET_CONFIG', 'SET_CONFIG', 'CREATE_CRYPTO_SESSION',
  'CLOSE_CRYPTO_SESSION', 'POSTCOPY_ADVISE', 'POSTCOPY_LISTEN', 'POSTCOPY_END', 'GET_INFLIGHT_FD', 'SET_INFLIGHT_FD',
  'GPU_SET_SOCKET', 'RESET_DEVICE', 'VRING_KICK', 'GET_MAX_MEM_SLOTS', 'ADD_MEM_REG', 'REM_MEM_REG', 'SET_STATUS',
  'GET_STATUS', 'GET_SHARED_OBJECT', 'SET_DEVICE_STATE_FD', 'CHECK_DEVICE_STATE', 'GET_SHMEM_CONFIG',
  'GET_VRING_BASE_SKIP_DRAIN'
]

/** vhost-user.rst "A vring state description": u32 index, u32 num. */
export function vringState(index: number, num: number): Uint8Array {
  const bytes = new Uint8Array(8)
  const view = new DataView(bytes.buffer)
  view.setUint32(0, index, true)
  view.setUint32(4, num, true)
  return bytes
}

/** The payload of a message that is one u64. */
export function u64(value: bigint): Uint8Array {
  const bytes = new Uint8Array(8)
  new DataView(bytes.buffer).setBigUint64(0, value, true)
  return bytes
}

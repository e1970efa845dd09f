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

// ---- back-end → front-end requests (vhost-user.rst "Back-end message types")
export const VHOST_USER_BACKEND_IOTLB_MSG = 1
export const VHOST_USER_BACKEND_CONFIG_CHANGE_MSG = 2

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

/** The names of the front-end requests, for errors and logs: `requestName(5)` is `SET_MEM_TABLE`. */
export function requestName(request: number): string {
  return REQUEST_NAMES[request] ?? `request ${request}`
}

// biome-ignore format: one row of the spec's table per line
const REQUEST_NAMES: readonly (string | undefined)[] = [
  undefined, 'GET_FEATURES', 'SET_FEATURES', 'SET_OWNER', 'RESET_OWNER', 'SET_MEM_TABLE', 'SET_LOG_BASE', 'SET_LOG_FD', 'SET_VRING_NUM',
  'SET_VRING_ADDR', 'SET_VRING_BASE', 'GET_VRING_BASE', 'SET_VRING_KICK', 'SET_VRING_CALL', 'SET_VRING_ERR',
  'GET_PROTOCOL_FEATURES', 'SET_PROTOCOL_FEATURES', 'GET_QUEUE_NUM', 'SET_VRING_ENABLE', 'SEND_RARP', 'NET_SET_MTU',
  'SET_BACKEND_REQ_FD', 'IOTLB_MSG', 'SET_VRING_ENDIAN', 'GET_CONFIG', 'SET_CONFIG', 'CREATE_CRYPTO_SESSION',
  'CLOSE_CRYPTO_SESSION', 'POSTCOPY_ADVISE', 'POSTCOPY_LISTEN', 'POSTCOPY_END', 'GET_INFLIGHT_FD', 'SET_INFLIGHT_FD',
  'GPU_SET_SOCKET', 'RESET_DEVICE', 'VRING_KICK', 'GET_MAX_MEM_SLOTS', 'ADD_MEM_REG', 'REM_MEM_REG', 'SET_STATUS',
  'GET_STATUS', 'GET_SHARED_OBJECT', 'SET_DEVICE_STATE_FD', 'CHECK_DEVICE_STATE', 'GET_SHMEM_CONFIG'
]

/** The payload of a message that is one u64. */
export function u64(value: bigint): Uint8Array {
  const bytes = new Uint8Array(8)
  new DataView(bytes.buffer).setBigUint64(0, value, true)
  return bytes
}

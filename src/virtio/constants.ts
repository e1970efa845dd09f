/**
 * Constants of the virtio specification that every device shares. Names and values are the spec's own (virtio 1.3).
 * A feature is named by its bit number; `features.ts` turns sets of bits into words.
 */

// virtio 1.3 §2.7.5 "The Virtqueue Descriptor Table"
export const VIRTQ_DESC_F_NEXT = 1
export const VIRTQ_DESC_F_WRITE = 2
export const VIRTQ_DESC_F_INDIRECT = 4

// virtio 1.3 §2.7.6 and §2.7.8, the avail and the used ring
export const VIRTQ_AVAIL_F_NO_INTERRUPT = 1
export const VIRTQ_USED_F_NO_NOTIFY = 1

/**
 * Bytes of one descriptor. Split: u64 addr, u32 len, u16 flags, u16 next. Packed: u64 addr, u32 len, u16 id, u16 flags.
 */
export const VIRTQ_DESC_SIZE = 16
/** The largest ring, split (virtio 1.3 §2.7) or packed (§2.8). */
export const VIRTQ_MAX_SIZE = 32768

// virtio 1.3 §2.8.1 "Driver and Device Ring Wrap Counters"
export const VIRTQ_DESC_F_AVAIL = 1 << 7
export const VIRTQ_DESC_F_USED = 1 << 15

// virtio 1.3 §2.8.10 "Driver and Device Event Suppression"
export const RING_EVENT_FLAGS_ENABLE = 0
export const RING_EVENT_FLAGS_DISABLE = 1
export const RING_EVENT_FLAGS_DESC = 2
/** Bytes of an event suppression structure (u16 offset and wrap counter, u16 flags). */
export const VIRTQ_EVENT_SUPPRESS_SIZE = 4

// virtio 1.3 §6 "Reserved Feature Bits"
export const VIRTIO_F_NOTIFY_ON_EMPTY = 24
export const VIRTIO_F_ANY_LAYOUT = 27
export const VIRTIO_F_INDIRECT_DESC = 28
export const VIRTIO_F_EVENT_IDX = 29
export const VIRTIO_F_VERSION_1 = 32
export const VIRTIO_F_ACCESS_PLATFORM = 33
export const VIRTIO_F_RING_PACKED = 34
export const VIRTIO_F_IN_ORDER = 35
export const VIRTIO_F_ORDER_PLATFORM = 36
export const VIRTIO_F_SR_IOV = 37
export const VIRTIO_F_NOTIFICATION_DATA = 38
export const VIRTIO_F_NOTIF_CONFIG_DATA = 39
export const VIRTIO_F_RING_RESET = 40

// virtio 1.3 §2.1 "Device Status Field"
export const VIRTIO_CONFIG_S_ACKNOWLEDGE = 1
export const VIRTIO_CONFIG_S_DRIVER = 2
export const VIRTIO_CONFIG_S_DRIVER_OK = 4
export const VIRTIO_CONFIG_S_FEATURES_OK = 8
export const VIRTIO_CONFIG_S_NEEDS_RESET = 64
export const VIRTIO_CONFIG_S_FAILED = 128

// virtio 1.3 §5 device ids
export const VIRTIO_ID_NET = 1
export const VIRTIO_ID_BLOCK = 2
export const VIRTIO_ID_CONSOLE = 3
export const VIRTIO_ID_RNG = 4
export const VIRTIO_ID_SCSI = 8

// vhost-user.rst "Feature bits" that share the 64-bit feature space with virtio
export const VHOST_F_LOG_ALL = 26
export const VHOST_USER_F_PROTOCOL_FEATURES = 30

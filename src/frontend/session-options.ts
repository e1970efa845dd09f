/**
 * What a session can be asked for, and the feature bits that go with it. It must not know connections.
 */
import {
  VHOST_USER_PROTOCOL_F_BACKEND_REQ,
  VHOST_USER_PROTOCOL_F_CONFIG,
  VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
  VHOST_USER_PROTOCOL_F_DEVICE_STATE,
  VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS,
  VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
  VHOST_USER_PROTOCOL_F_LOG_SHMFD,
  VHOST_USER_PROTOCOL_F_MQ,
  VHOST_USER_PROTOCOL_F_REPLY_ACK,
  VHOST_USER_PROTOCOL_F_RESET_DEVICE,
  VHOST_USER_PROTOCOL_F_STATUS,
} from '../vhost-user/wire.ts'
import {
  VHOST_USER_F_PROTOCOL_FEATURES,
  VIRTIO_F_ACCESS_PLATFORM,
  VIRTIO_F_ANY_LAYOUT,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_IN_ORDER,
  VIRTIO_F_INDIRECT_DESC,
  VIRTIO_F_RING_PACKED,
  VIRTIO_F_VERSION_1,
} from '../virtio/constants.ts'
import { featureBits, featureSet } from '../virtio/features.ts'
import {
  VIRTIO_NET_F_GUEST_USO4,
  VIRTIO_NET_F_GUEST_USO6,
  VIRTIO_NET_F_HOST_USO,
  VIRTIO_NET_F_SPEED_DUPLEX,
} from '../virtio/net.ts'
import { FrontendError } from './errors.ts'
import type { InflightArea } from './inflight.ts'
import type { IommuOptions } from './iommu.ts'
import type { GuestMemory, RegionLayout } from './memory.ts'
import type { WaitMode } from './virtqueue.ts'

/**
 * Feature bits that this front-end acknowledges wherever they are offered: the device's own (0 … 23, and of those from
 * 50 on the ones that change no structure), and those of the split ring. The others it drives when it is asked to.
 */
export const DRIVEN_FEATURES =
  0xff_ffffn |
  featureSet(
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_SPEED_DUPLEX,
    VIRTIO_F_ANY_LAYOUT,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_VERSION_1,
    VHOST_USER_F_PROTOCOL_FEATURES
  )

/** Protocol feature bits that this front-end acknowledges wherever they are offered. */
export const DRIVEN_PROTOCOL_FEATURES = featureSet(
  VHOST_USER_PROTOCOL_F_MQ,
  VHOST_USER_PROTOCOL_F_LOG_SHMFD,
  VHOST_USER_PROTOCOL_F_REPLY_ACK,
  VHOST_USER_PROTOCOL_F_BACKEND_REQ,
  VHOST_USER_PROTOCOL_F_CONFIG,
  VHOST_USER_PROTOCOL_F_RESET_DEVICE,
  VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
  VHOST_USER_PROTOCOL_F_DEVICE_STATE
)

export interface SessionOptions {
  /** Milliseconds per request; default 10 000. */
  readonly timeoutMs?: number
  /** Feature bits not to acknowledge although they are offered. */
  readonly withoutFeatures?: readonly number[]
  readonly withoutProtocolFeatures?: readonly number[]
  /**
   * Rings are packed (RING_PACKED); default false. What is asked for here and below and not offered is a FrontendError.
   */
  readonly packed?: boolean
  /** IN_ORDER; default false. */
  readonly inOrder?: boolean
  /**
   * In-flight tracking. `true` or numbers: in an area that the back-end makes, for as many queues as are started and as
   * many entries as they have unless it says otherwise. An area: in that one, which stays the caller's.
   */
  readonly inflight?: boolean | InflightArea | { readonly numQueues?: number; readonly queueSize?: number }
  /** Addresses go through a vIOMMU (ACCESS_PLATFORM). */
  readonly iommu?: boolean | IommuOptions
  /** Kicks and calls by message (INBAND_NOTIFICATIONS). */
  readonly inband?: boolean
  /** The device status is told (STATUS), as QEMU does; default false. */
  readonly status?: boolean
  /**
   * Guest memory; default one region of 64 MiB. Pass a GuestMemory to keep it over several sessions, and none at all
   * (`[]`) to add and share it when the features are known.
   */
  readonly memory?: readonly RegionLayout[] | GuestMemory
  /** Rings to start; default 1. 0 = only negotiate. */
  readonly queues?: number
  /** Entries per ring; default 256. */
  readonly queueSize?: number
  readonly mode?: WaitMode
  readonly ringRegions?: readonly [number, number, number]
  /** Where rings start, as SET_VRING_BASE says it; default 0, for packed rings both indices 0 and wrap counters 1. */
  readonly base?: number
}

export function tracks(options: SessionOptions): boolean {
  return options.inflight !== undefined && options.inflight !== false
}

export function askedFeatures(options: SessionOptions): bigint {
  return featureSet(
    ...(options.packed === true ? [VIRTIO_F_RING_PACKED] : []),
    ...(options.inOrder === true ? [VIRTIO_F_IN_ORDER] : []),
    ...(options.iommu !== undefined && options.iommu !== false ? [VIRTIO_F_ACCESS_PLATFORM] : [])
  )
}

export function askedProtocolFeatures(options: SessionOptions): bigint {
  const iommu = options.iommu !== undefined && options.iommu !== false
  return featureSet(
    ...(tracks(options) ? [VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD] : []),
    ...(iommu ? [VHOST_USER_PROTOCOL_F_BACKEND_REQ] : []),
    ...(options.inband === true
      ? [VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS, VHOST_USER_PROTOCOL_F_BACKEND_REQ, VHOST_USER_PROTOCOL_F_REPLY_ACK]
      : []),
    ...(options.status === true ? [VHOST_USER_PROTOCOL_F_STATUS] : [])
  )
}

/** @throws FrontendError unsupported when a bit of `wanted` is not offered */
export function offered(request: string, wanted: bigint, offer: bigint): void {
  const missing = featureBits(wanted & ~offer)
  if (missing.length === 0) return
  throw new FrontendError(request, 'unsupported', `the back-end does not offer bit ${missing.join(', ')}`)
}

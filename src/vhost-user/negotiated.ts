/** What front-end and back-end agreed on, and the device status that follows from it (virtio 1.3 §2.1). */
import {
  VHOST_F_LOG_ALL,
  VIRTIO_CONFIG_S_DRIVER_OK,
  VIRTIO_CONFIG_S_FEATURES_OK,
  VIRTIO_CONFIG_S_NEEDS_RESET,
  VIRTIO_F_ACCESS_PLATFORM,
  VIRTIO_F_RING_PACKED,
} from '../virtio/constants.ts'
import { featureSet, hasFeature } from '../virtio/features.ts'

/** Bits of SET_FEATURES that may change while rings are started, and that are no business of a device. */
export const LOGGING = featureSet(VHOST_F_LOG_ALL)

export class Negotiated {
  /** Undefined: SET_FEATURES did not come. */
  features: bigint | undefined
  /** The last SET_FEATURES asked for what there is not. */
  refused = false
  protocolFeatures = 0n
  #status = 0
  #needsReset = false

  has(bit: number): boolean {
    return hasFeature(this.features ?? 0n, bit)
  }

  hasProtocol(bit: number): boolean {
    return hasFeature(this.protocolFeatures, bit)
  }

  get packed(): boolean {
    return this.has(VIRTIO_F_RING_PACKED)
  }

  /** Addresses of rings and in descriptors are IOVAs. */
  get translated(): boolean {
    return this.has(VIRTIO_F_ACCESS_PLATFORM)
  }

  // ---- status

  get status(): number {
    // §2.2: the device refuses the features by not showing FEATURES_OK.
    const agreed = this.features !== undefined && !this.refused
    const status = agreed ? this.#status : this.#status & ~VIRTIO_CONFIG_S_FEATURES_OK
    return status | (this.#needsReset ? VIRTIO_CONFIG_S_NEEDS_RESET : 0)
  }

  /**
   * SET_STATUS. 0 is the driver's reset, and resets the byte alone: QEMU says it first of all when it stops a device,
   * also one whose guest is migrated, and asks for the ring bases after it. Rings end by GET_VRING_BASE, what the device
   * keeps beside them by RESET_DEVICE or with the session.
   */
  set status(status: number) {
    this.#status = status & ~VIRTIO_CONFIG_S_NEEDS_RESET
    if (status === 0) this.#needsReset = false
  }

  /**
   * A ring broke: only a reset helps (virtio 1.3 §2.1.2). Returns whether the driver has to be told, by a notification
   * about its configuration.
   */
  fail(): boolean {
    this.#needsReset = true
    return (this.#status & VIRTIO_CONFIG_S_DRIVER_OK) !== 0
  }

  get needsReset(): boolean {
    return this.#needsReset
  }

  /** RESET_DEVICE. Protocol features stay: they are of the connection. */
  reset(): void {
    this.features = undefined
    this.refused = false
    this.status = 0
  }
}

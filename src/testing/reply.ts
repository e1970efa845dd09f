/** What the drivers of `virtiod/testing` report of a request, the one on plain buffers and the one behind a socket. */

/** What a device made of a request. */
export interface Reply {
  /** Bytes that it says it wrote. */
  readonly written: number
  /**
   * The whole device-writable part. What the device did not write is 0xa5, so that a test sees a byte that was
   * left out.
   */
  readonly bytes: Uint8Array
}

/** A byte of the device-writable part that the device has not written. */
export const UNTOUCHED = 0xa5

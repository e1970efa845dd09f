/**
 * The front-end broke the protocol: the request is refused with a NACK when it asked for a reply, else its connection
 * is closed. Other sessions don't notice.
 */
export class ProtocolError extends Error {
  override readonly name = 'ProtocolError'
  /** API: listed in the README. */
  readonly code: ProtocolErrorCode
  /** The spec demands that the connection is closed: no NACK. */
  readonly closes: boolean

  constructor(code: ProtocolErrorCode, message: string, options: ErrorOptions & { closes?: boolean } = {}) {
    super(message, options)
    this.code = code
    this.closes = options.closes === true
  }
}

/** What can be wrong with a message, and what it means. */
export const PROTOCOL_ERRORS = {
  ERR_PROTOCOL_HEADER: 'a message header has a wrong version, the reply flag, or a size beyond 4096 bytes',
  ERR_PROTOCOL_REQUEST: 'a request is unknown, or belongs to a feature that was not negotiated',
  ERR_PROTOCOL_SIZE: 'a payload has the wrong size for its request',
  ERR_PROTOCOL_FDS: 'a message carries too many or too few file descriptors, or one of the wrong kind',
  ERR_PROTOCOL_FEATURES: 'a feature was acknowledged that was not offered, or features changed under running rings',
  ERR_PROTOCOL_MEMORY: 'a memory region is misaligned, overlaps, exceeds its file, cannot be mapped or is unknown',
  ERR_PROTOCOL_VRING: 'a ring has a wrong index, size, address or state for the request',
  ERR_PROTOCOL_IOTLB: 'a translation is misaligned, outside of the memory regions, or came without a vIOMMU',
  ERR_PROTOCOL_INFLIGHT: 'the in-flight buffer has the wrong size or contents for the rings, or came while they run',
  ERR_PROTOCOL_LOG: 'the dirty log is too small for the rings, or cannot be mapped',
  ERR_PROTOCOL_STATUS: 'the device status has more than 8 bits',
  ERR_PROTOCOL_STATE: 'the transfer of the device state was asked for while rings run, or failed',
  ERR_PROTOCOL_CONFIG: 'the config space was accessed out of bounds or a read-only field was written',
  ERR_PROTOCOL_MTU: 'the network card cannot have the MTU that the front-end wants',
  ERR_PROTOCOL_PEER: 'the front-end ended inside a message, does not read its replies, or refused a request of ours',
} as const

export type ProtocolErrorCode = keyof typeof PROTOCOL_ERRORS

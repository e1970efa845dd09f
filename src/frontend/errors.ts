/**
 * What goes wrong at the front-end's side: which request failed and how. It knows no sockets.
 */

/**
 * How a request failed. `closed`: the back-end hung up. `nack`: it answered a REPLY_ACK with a value other than 0.
 * `broken`: it gave a ring up.
 */
export type FrontendFailure = 'connect' | 'timeout' | 'closed' | 'nack' | 'reply' | 'broken' | 'unsupported' | 'system'

/** A vhost-user request, or a virtio request on a ring, that did not get the answer it should. */
export class FrontendError extends Error {
  override readonly name = 'FrontendError'
  readonly code = 'ERR_FRONTEND'
  /** The request at fault: `GET_CONFIG`, `virtqueue 0`. */
  readonly request: string
  readonly failure: FrontendFailure
  /** The value of a NACK, the errno of a system failure. */
  readonly value: bigint | number | undefined

  constructor(request: string, failure: FrontendFailure, detail: string, value?: bigint | number, cause?: unknown) {
    super(`${request}: ${detail}`, cause === undefined ? undefined : { cause })
    this.request = request
    this.failure = failure
    this.value = value
  }
}

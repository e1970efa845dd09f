/**
 * The back-end's own requests to the front-end (vhost-user.rst "Back-end communication"): a second socket that it
 * handed to us.
 */
import { native } from '../native.ts'
import { ProtocolError } from './errors.ts'
import { HEADER_SIZE, VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, VHOST_USER_VERSION } from './wire.ts'

const NO_FDS = new Int32Array(1)

export class BackendChannel implements Disposable {
  readonly #fd: number

  /** Takes over `fd`, also when it throws. @throws ProtocolError when it is no connected unix socket */
  constructor(fd: number) {
    if (native.socketKind(fd) !== 0) {
      native.close(fd)
      throw new ProtocolError('ERR_PROTOCOL_FDS', 'the fd is no connected unix socket')
    }
    this.#fd = fd
  }

  /**
   * CONFIG_CHANGE_MSG without NEED_REPLY: an answer would have nothing to say. Returns false when the front-end does
   * not read.
   */
  configChanged(): boolean {
    const bytes = new Uint8Array(HEADER_SIZE)
    const view = new DataView(bytes.buffer)
    view.setUint32(0, VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, true)
    view.setUint32(4, VHOST_USER_VERSION, true)
    return native.sendMessage(this.#fd, bytes, 0, bytes.length, NO_FDS, 0, false) === bytes.length
  }

  [Symbol.dispose](): void {
    native.close(this.#fd)
  }
}

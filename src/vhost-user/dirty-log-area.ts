/**
 * The dirty log that the front-end shares for a live migration (vhost-user.rst "Migration"), and whether the rings mark
 * in it. It owns the mapping and the eventfd.
 */
import { native } from '../native.ts'
import { VHOST_LOG_PAGE } from '../virtio/dirty-log.ts'
import { MappedArea } from './mapping.ts'
import type { RingHost } from './ring-host.ts'
import type { LogDescription } from './wire.ts'

export class DirtyLogArea {
  #area: MappedArea | undefined
  /** SET_LOG_FD, -1 = none. */
  #fd = -1
  /** VHOST_F_LOG_ALL. */
  #enabled = false
  readonly #host: RingHost

  constructor(host: RingHost) {
    this.#host = host
  }

  get area(): MappedArea | undefined {
    return this.#area
  }

  get fd(): number {
    return this.#fd
  }

  get faulted(): boolean {
    return this.#area?.faulted === true
  }

  /** The first address that the log knows nothing of, undefined when there is no log yet. */
  get end(): number | undefined {
    return this.#area === undefined ? undefined : this.#area.size * 8 * VHOST_LOG_PAGE
  }

  /**
   * SET_LOG_BASE: this log from now on. @param fd stays the caller's @param check throws when it doesn't fit
   * @throws ProtocolError
   */
  async setBase({ size, offset }: LogDescription, fd: number, check: () => void = () => {}): Promise<void> {
    const before = this.#area
    const area = MappedArea.map(fd, offset, size, 'the dirty log', 'ERR_PROTOCOL_LOG')
    this.#area = area
    try {
      check()
    } catch (error) {
      this.#area = before
      area.release()
      throw error
    }
    try {
      await this.share()
    } finally {
      // Not before: an iothread may have been marking in it.
      before?.release()
    }
  }

  /** SET_LOG_FD: takes over `fd`. */
  async setFd(fd: number): Promise<void> {
    const before = this.#fd
    this.#fd = fd
    try {
      await this.share()
    } finally {
      if (before >= 0) native.close(before)
    }
  }

  async enable(enabled: boolean): Promise<void> {
    if (enabled === this.#enabled) return
    this.#enabled = enabled
    await this.share()
  }

  /** RESET_DEVICE: no log any more. */
  async reset(): Promise<void> {
    this.#enabled = false
    await this.#host.setLog(undefined, -1)
    this.release()
  }

  /** Nothing may use the log any more. */
  release(): void {
    this.#area?.release()
    this.#area = undefined
    if (this.#fd >= 0) native.close(this.#fd)
    this.#fd = -1
  }

  /** Tells the host what there is. */
  async share(): Promise<void> {
    const area = this.#enabled ? this.#area : undefined
    await this.#host.setLog(
      area === undefined ? undefined : { buffer: area.buffer, offset: area.offset, size: area.size },
      area === undefined ? -1 : this.#fd
    )
  }
}

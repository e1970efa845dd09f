/**
 * The fds that a queue's handler watches: one multishot poll each. A watch that was ended is in the ring until its
 * last completion arrived.
 */
import type { FdWatcher } from './io.ts'
import { IORING_CQE_F_MORE, type IoRing } from './ring.ts'

const EALREADY = -114
const POLLERR = 8

interface Watch {
  fd: number
  /** The poll is in the ring. */
  armed: boolean
  /** Nobody wants it any more. */
  ended: boolean
}

export class Watches implements FdWatcher {
  readonly #ring: IoRing
  readonly #low: number
  readonly #tag: number
  readonly #cancelTag: number
  readonly #watches: Watch[] = []

  /** @param low the queue's part of user_data's low word; the low 16 bits are the watch's index */
  constructor(ring: IoRing, low: number, tag: number, cancelTag: number) {
    this.#ring = ring
    this.#low = low
    this.#tag = tag
    this.#cancelTag = cancelTag
  }

  /** One of them is in the ring. */
  get armed(): boolean {
    return this.#watches.some((watch) => watch.armed)
  }

  watch(fd: number): void {
    let index = this.#watches.findIndex((watch) => !watch.armed && watch.ended)
    if (index < 0) index = this.#watches.push({ fd, armed: false, ended: false }) - 1
    const watch = this.#watches[index]!
    watch.fd = fd
    watch.ended = false
    this.#arm(index)
  }

  unwatch(fd: number): void {
    for (const [index, watch] of this.#watches.entries()) if (watch.fd === fd && !watch.ended) this.#end(index)
  }

  /** Ends them all. */
  end(): void {
    for (const [index, watch] of this.#watches.entries()) if (!watch.ended) this.#end(index)
  }

  /** A completion of a poll. Returns the fd to tell of, or -1. */
  event(index: number, result: number, flags: number): number {
    const watch = this.#watches[index]!
    const more = (flags & IORING_CQE_F_MORE) !== 0
    if (!more) watch.armed = false
    if (watch.ended) return -1
    // The kernel ran out of room for a completion: start it again. An error is the fd's; reading it tells. A poll of a
    // tap that was removed ends at once with POLLERR: again and again, were it started again.
    if (!more && result >= 0 && (result & POLLERR) === 0) this.#arm(index)
    else if (!more) watch.ended = true
    return watch.fd
  }

  /** A completion of a cancellation: -ENOENT says that the poll ended by itself, -EALREADY that it was busy. */
  cancelled(index: number, result: number): void {
    if (result === EALREADY && this.#watches[index]!.armed) this.#cancel(index)
  }

  #arm(index: number): void {
    const watch = this.#watches[index]!
    watch.armed = true
    this.#ring.pollAdd(watch.fd, this.#low | index, this.#tag)
  }

  #end(index: number): void {
    const watch = this.#watches[index]!
    watch.ended = true
    if (watch.armed) this.#cancel(index)
  }

  #cancel(index: number): void {
    this.#ring.cancel(this.#low | index, this.#tag, this.#low | index, this.#cancelTag)
  }
}

/**
 * The two eventfds of a started ring, as entries of the iothread's ring: the driver kicks ({@link KickPoll}), and is
 * called ({@link CallWriter}). Whether a notification is wanted is the vring's to say; this knows only fds, and how
 * they are exchanged while the ring runs.
 */
import { IORING_CQE_F_MORE, type IoRing, WRITE_PLAIN } from './ring.ts'

const EAGAIN = -11
const EALREADY = -114
const ECANCELED = -125

/** What user_data says about an operation, and about its cancellation. */
export interface NotificationTags {
  readonly low: number
  readonly operation: number
  readonly cancellation: number
}

/** The multishot poll of the kick fd. */
export class KickPoll {
  /** It is in the ring. */
  armed = false
  #cancelled = false
  /** For good. */
  #stopped = false
  #fd: number
  readonly #ring: IoRing
  readonly #tags: NotificationTags

  /** @param fd -1 = the driver doesn't kick */
  constructor(ring: IoRing, fd: number, tags: NotificationTags) {
    this.#ring = ring
    this.#fd = fd
    this.#tags = tags
  }

  arm(): void {
    if (this.#fd < 0 || this.#stopped) return
    this.armed = true
    this.#cancelled = false
    this.#ring.pollAdd(this.#fd, this.#tags.low, this.#tags.operation)
  }

  /** Listens on another fd. */
  exchange(fd: number): void {
    this.#fd = fd
    // The old poll has to end before the new one starts; `completed` goes on from there.
    if (this.armed) this.#cancel()
    else this.arm()
  }

  stop(): void {
    this.#stopped = true
    this.#cancel()
  }

  /** A completion. Returns 1 for a kick, 0 for none, -errno when the fd cannot be polled. */
  completed(result: number, flags: number): number {
    if ((flags & IORING_CQE_F_MORE) !== 0) return 1
    this.armed = false
    if (this.#stopped) return 0
    // A multishot poll also ends when the kernel ran out of memory for a completion: start it again. An error is the
    // fd's.
    if (result < 0 && !this.#cancelled) return result
    this.arm()
    return 0
  }

  /**
   * A completion of the cancellation. -ENOENT: the poll ended by itself, its completion tells. -EALREADY: it was busy,
   * so again.
   */
  cancelled(result: number): void {
    if (result !== EALREADY || !this.armed) return
    this.#cancelled = false
    this.#cancel()
  }

  #cancel(): void {
    if (!this.armed || this.#cancelled) return
    this.#cancelled = true
    const { low, operation, cancellation } = this.#tags
    this.#ring.cancel(low, operation, low, cancellation)
  }
}

/** Writes to the call fd. */
export class CallWriter {
  /** A write is in the ring: until it ends another one would say nothing new, unless `#again`. */
  calling = false
  #again = false
  /** The fd is about to be exchanged: calls wait for the new one. */
  #held = false
  #stopped = false
  #fd: number
  readonly #ring: IoRing
  readonly #oneAddress: number
  readonly #tags: NotificationTags

  /**
   * @param fd -1 = the driver is not called
   * @param oneAddress SAFETY: address of eight bytes that hold 1 and live as long as the ring
   */
  constructor(ring: IoRing, fd: number, oneAddress: number, tags: NotificationTags) {
    this.#ring = ring
    this.#fd = fd
    this.#oneAddress = oneAddress
    this.#tags = tags
  }

  get hasFd(): boolean {
    return this.#fd >= 0
  }

  /**
   * Wakes the driver, in the next submission. Returns whether that is a call of its own: there may be one under way.
   */
  call(): boolean {
    if (this.#fd < 0) return false
    if (this.calling || this.#held) {
      this.#again = true
      return false
    }
    this.calling = true
    this.#ring.write(this.#fd, -1, -1, this.#oneAddress, 8, WRITE_PLAIN, this.#tags.low, this.#tags.operation)
    // Of a ring that is drained: nobody cancels it later.
    if (this.#stopped) this.#cancel()
    return true
  }

  /** Before `exchange`: no more writes to the present fd, so that it comes to rest. */
  hold(): void {
    this.#held = true
    this.#cancel()
  }

  /** Uses another fd; nothing is `calling`. */
  exchange(fd: number): void {
    this.#fd = fd
    this.#held = false
  }

  stop(): void {
    this.#stopped = true
    this.#cancel()
  }

  /** A completion. Returns 1 when another call is due, 0 when not, -errno when the fd cannot be written. */
  completed(result: number): number {
    this.calling = false
    // A full counter is as good as a call: the driver has one to take. Anything else means that nobody hears us.
    if (result < 0 && result !== EAGAIN && result !== ECANCELED) return result
    if (!this.#again || this.#held || this.#stopped) return 0
    this.#again = false
    return 1
  }

  /** A completion of the cancellation. */
  cancelled(result: number): void {
    if (result === EALREADY) this.#cancel()
  }

  /**
   * A front-end that made its call fd blocking and filled it up keeps a write waiting, and with it whoever waits for
   * the ring. The driver loses nothing: it has not read the calls that are there.
   */
  #cancel(): void {
    if (!this.calling) return
    const { low, operation, cancellation } = this.#tags
    this.#ring.cancel(low, operation, low, cancellation)
  }
}

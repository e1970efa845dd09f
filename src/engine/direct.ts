/**
 * I/O that needs no waiting, done in the batch's one native call beside io_uring: buffered writes by pwritev, and
 * copies out of and into a mapping of the file, of pages that are in the page cache already. All of it only while it
 * doesn't block, which is found out by trying: when something does, io_uring does that kind for a while. (What can't be
 * found out: a file system that is frozen for a snapshot stops the iothread until it is thawed.)
 *
 * Why: io_uring hands every buffered write on ext4 to a kernel worker (9–15 µs of CPU per 4 KiB against 2.5 by
 * pwritev), and a read of a cached page costs 1.4–1.7 µs in the kernel, of which the copy is 0.7 (4 KiB random, one 1
 * GiB file, in C as here).
 */
import type { NativeRing } from '../native.ts'

/** Entries that the addon has. */
const ENTRIES = 256
const ENTRY_WORDS = 16
/**
 * How long writes are left to the kernel's workers after one had to wait: dirty-page throttling goes on for a while.
 */
const WRITE_PAUSE_MS = 1000
/**
 * How long reads are left to io_uring after a copy waited for the disk: doubled each time that it happens at once
 * again.
 */
const COPY_PAUSE_MS = 1
const COPY_PAUSE_MAX_MS = 512
/** This many copies without a wait, and the next pause is a short one again. */
const COPIES_WITHOUT_WAIT = 4096

const EFAULT = -14
const EAGAIN = -11

/** Words of the ring's control block, see NativeRing.direct. */
const CONTROL_START = 4
const CONTROL_COUNT = 5
const CONTROL_WAITED = 6
const COPY_WAITED = 1
const WRITE_WAITED = 2
const COPY_FAULTED = 4

export class DirectEntries {
  // Entries [0, #reaped) are reported, up to #run executed, up to #tail prepared.
  #reaped = 0
  #run = 0
  #tail = 0
  /** Copies that are prepared, and those since one last waited. */
  #copies = 0
  #copied = 0
  /** Until when (performance.now()) io_uring does the writes, and the reads; 0 = it doesn't. */
  #writePause = 0
  #copyPause = 0
  #copyBackoff = COPY_PAUSE_MS
  /**
   * Counts the copies that the SIGBUS guard caught: whoever holds a mapping has to look at it when this has changed.
   */
  faults = 0
  readonly #entries: Uint32Array
  readonly #control: Int32Array

  constructor(ring: NativeRing) {
    this.#entries = new Uint32Array(ring.direct)
    this.#control = new Int32Array(ring.control)
  }

  /** Prepared and not executed. */
  get pending(): number {
    return this.#tail - this.#run
  }

  /** Executed and not reported. */
  get finished(): number {
    return this.#run - this.#reaped
  }

  /** Whether a buffered write may be prepared here. */
  takesWrites(): boolean {
    if (this.#tail === ENTRIES) return false
    if (this.#writePause === 0) return true
    if (performance.now() < this.#writePause) return false
    this.#writePause = 0
    return true
  }

  /** Whether a copy may be prepared here. */
  takesCopies(): boolean {
    if (this.#tail === ENTRIES) return false
    if (this.#copyPause === 0) return true
    if (performance.now() < this.#copyPause) return false
    this.#copyPause = 0
    return true
  }

  /** A write at `offset` of `fd`. @param length bytes at `address`, or vectors there */
  write(opcode: number, fd: number, offset: number, address: number, length: number, low: number, high: number): void {
    this.#prepare(opcode, fd, offset, address, length, low, high)
  }

  /**
   * A copy out of (READ, READV) or into (WRITE, WRITEV) `mapped`. @param length bytes at `address`, or vectors there
   */
  copy(opcode: number, mapped: number, address: number, length: number, low: number, high: number): void {
    this.#copies++
    this.#prepare(opcode, -1, mapped, address, length, low, high)
  }

  /** Makes `enter` execute what is prepared, and looks how that went. Returns what `enter` returned. */
  execute(enter: () => number): number {
    const control = this.#control
    control[CONTROL_START] = this.#run
    control[CONTROL_COUNT] = this.#tail - this.#run
    const result = enter()
    control[CONTROL_COUNT] = 0
    this.#run = this.#tail
    this.#copied += this.#copies
    this.#copies = 0
    const waited = control[CONTROL_WAITED]!
    // Before any entry of the batch is reported: what that submits next must not be copied into a mapping that is gone.
    if ((waited & COPY_FAULTED) !== 0) this.faults++
    if ((waited & WRITE_WAITED) !== 0) this.#writePause = performance.now() + WRITE_PAUSE_MS
    if ((waited & COPY_WAITED) !== 0) this.#pauseCopies()
    return result
  }

  /** Index of the next executed entry to report, -1 = none. Its user_data and result are `low`, `high`, `result`. */
  next(): number {
    if (this.#reaped < this.#run) return this.#reaped++
    // Completions may have prepared more behind; the space is used again when all are through.
    if (this.#run === this.#tail) this.#reaped = this.#run = this.#tail = 0
    return -1
  }

  low(entry: number): number {
    return this.#entries[entry * ENTRY_WORDS + 8]!
  }

  high(entry: number): number {
    return this.#entries[entry * ENTRY_WORDS + 9]!
  }

  result(entry: number): number {
    const result = this.#entries[entry * ENTRY_WORDS + 15]! | 0
    // The file was cut under its mapping, or the disk failed: io_uring tells which when the request is submitted again.
    return result === EFAULT ? EAGAIN : result
  }

  #pauseCopies(): void {
    if (this.#copied >= COPIES_WITHOUT_WAIT) this.#copyBackoff = COPY_PAUSE_MS
    else this.#copyBackoff = Math.min(this.#copyBackoff * 2, COPY_PAUSE_MAX_MS)
    this.#copied = 0
    this.#copyPause = performance.now() + this.#copyBackoff
  }

  #prepare(
    opcode: number,
    fd: number,
    offset: number,
    address: number,
    length: number,
    low: number,
    high: number
  ): void {
    const entries = this.#entries
    const at = this.#tail * ENTRY_WORDS
    entries[at] = opcode
    entries[at + 1] = fd
    entries[at + 2] = offset >>> 0
    entries[at + 3] = (offset / 0x1_0000_0000) >>> 0
    entries[at + 4] = address >>> 0
    entries[at + 5] = (address / 0x1_0000_0000) >>> 0
    entries[at + 6] = length
    entries[at + 8] = low
    entries[at + 9] = high
    this.#tail++
  }
}

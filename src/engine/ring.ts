/**
 * The submission and completion rings of one iothread as typed arrays: entries are filled in TypeScript and `submit`
 * makes the one native call of a batch. Whether an io_uring or its emulation by plain system calls is behind it shows
 * only in `emulated`. It knows entries and completions, not queues or devices.
 */
import { type NativeRing, native, systemError } from '../native.ts'
import { DirectEntries } from './direct.ts'
import type { RingFile } from './ring-file.ts'

// linux/io_uring.h
const IORING_OP_READV = 1
const IORING_OP_WRITEV = 2
const IORING_OP_FSYNC = 3
const IORING_OP_POLL_ADD = 6
const IORING_OP_ASYNC_CANCEL = 14
const IORING_OP_FALLOCATE = 17
const IORING_OP_READ = 22
const IORING_OP_WRITE = 23
const IOSQE_FIXED_FILE = 1
const IORING_FSYNC_DATASYNC = 1
const IORING_POLL_ADD_MULTI = 1
const IORING_ENTER_GETEVENTS = 1
const IORING_SQ_CQ_OVERFLOW = 2
const IORING_SQ_TASKRUN = 4
/** On a completion of a multishot poll: more will come. */
export const IORING_CQE_F_MORE = 2

const RWF_DSYNC = 2
const POLLIN = 1

const SQE_WORDS = 16
const IOVEC_SIZE = 16
/**
 * Vectors of all entries of one submission. The kernel copies them at submission (IORING_FEAT_SUBMIT_STABLE), so the
 * space is free after `submit`.
 */
const VECTORS = 16384
/** The most vectors that one readv or writev takes (IOV_MAX). */
export const MAX_VECTORS = 1024

const SUBMISSIONS = 1024
/** Operations in flight are kept below this, so the completion ring never overflows. */
const COMPLETIONS = 8192

const EINTR = -4
const EAGAIN = -11
const EBUSY = -16
const ETIME = -62

/**
 * What a write may do: be handed to io_uring, be durable when it completes, or be done directly while that doesn't
 * block.
 */
export const WRITE_PLAIN = 0
export const WRITE_DSYNC = 1
export const WRITE_BUFFERED = 2

/** Receives completions; a method call, not a closure, so that it stays monomorphic. */
export interface CompletionSink {
  /** @param low, high the two words of user_data */
  completion(low: number, high: number, result: number, flags: number): void
}

export class IoRing {
  readonly emulated: boolean
  /** An fd that becomes readable when completions can be reaped; -1 = there is none. */
  readonly pollFd: number
  /** How many operations may be in flight at once. */
  readonly capacity = COMPLETIONS - 256
  /** Operations submitted or prepared whose last completion hasn't been reaped. */
  inFlight = 0
  /** Entries prepared since the last submission, direct ones included. */
  get pending(): number {
    return this.#submissions + this.#direct.pending
  }
  #submissions = 0
  readonly #ring: NativeRing
  readonly #enter: () => number
  readonly #control: Int32Array
  readonly #sqes: Uint32Array
  readonly #rings: Int32Array
  readonly #cqes: Int32Array
  readonly #sqTail: number
  readonly #sqFlags: number
  readonly #cqHead: number
  readonly #cqTail: number
  readonly #sqMask: number
  readonly #cqMask: number
  #tail: number
  #head: number
  readonly #vectors: Uint32Array
  readonly #vectorsAddress: number
  #vector = 0
  readonly #direct: DirectEntries
  /** The files that are open on this ring, by fd. */
  readonly files = new Map<number, RingFile>()
  // Fixed-file slots by fd, with a count of users.
  readonly #slots = new Map<number, { slot: number; users: number }>()
  readonly #freeSlots: number[] = []
  /**
   * @param pollable the event loop is to watch it, which makes an io_uring somewhat slower
   * @throws a system error when neither can be set up; `-ENOSYS`/`-EPERM` of io_uring itself means: try `emulate`
   */
  constructor(emulate: boolean, pollable = false) {
    const ring = native.ringSetup(SUBMISSIONS, COMPLETIONS, emulate, pollable)
    if (typeof ring === 'number') throw systemError(ring, 'io_uring_setup', 'cannot set up io_uring')
    const vectors = native.allocate(VECTORS * IOVEC_SIZE)
    if (typeof vectors === 'number') throw systemError(vectors, 'mmap', 'cannot allocate I/O vectors')
    this.#ring = ring
    this.emulated = emulate
    this.pollFd = emulate || pollable ? ring.fd : -1
    this.#enter = ring.enter
    this.#control = new Int32Array(ring.control)
    this.#sqes = new Uint32Array(ring.sqes)
    this.#rings = new Int32Array(ring.rings, 0, Math.floor(ring.rings.byteLength / 4))
    this.#cqes = new Int32Array(ring.rings, ring.cqes, ring.cqEntries * 4)
    this.#sqTail = ring.sqTail / 4
    this.#sqFlags = ring.sqFlags / 4
    this.#cqHead = ring.cqHead / 4
    this.#cqTail = ring.cqTail / 4
    this.#sqMask = ring.sqEntries - 1
    this.#cqMask = ring.cqEntries - 1
    this.#tail = this.#rings[this.#sqTail]!
    this.#head = this.#rings[this.#cqHead]!
    this.#direct = new DirectEntries(ring)
    this.#vectors = new Uint32Array(vectors.buffer)
    this.#vectorsAddress = vectors.address
    if (!emulate) for (let slot = 63; slot >= 0; slot--) this.#freeSlots.push(slot)
  }

  /**
   * The slot of `fd` in the fixed-file table (saves the kernel a look-up per request), or -1. Balance with
   * `closeFile`.
   */
  openFile(fd: number): number {
    const known = this.#slots.get(fd)
    if (known !== undefined) {
      known.users++
      return known.slot
    }
    const slot = this.#freeSlots.pop()
    if (slot === undefined) return -1
    if (this.#ring.registerFile(slot, fd) < 0) {
      this.#freeSlots.length = 0
      return -1
    }
    this.#slots.set(fd, { slot, users: 1 })
    return slot
  }

  closeFile(fd: number): void {
    const known = this.#slots.get(fd)
    if (known === undefined || --known.users > 0) return
    this.#slots.delete(fd)
    this.#ring.registerFile(known.slot, -1)
    this.#freeSlots.push(known.slot)
  }

  /** Whether completions can be reaped, or the kernel wants to be entered to produce them. */
  hasCompletions(): boolean {
    return this.#cqReady() || this.#direct.finished > 0 || this.#kernelWaits()
  }

  /**
   * Whether the ring has to be entered although nothing is to be submitted. The emulation can't say, so every 16th time
   * it is: a busy iothread would hear no kick and no message otherwise.
   */
  wantsEnter(): boolean {
    return this.#kernelWaits() || (this.emulated && (++this.#asked & 15) === 0)
  }
  #asked = 0

  /** Deferred task work or overflowed completions: only io_uring_enter moves them on. */
  #kernelWaits(): boolean {
    return (Atomics.load(this.#rings, this.#sqFlags) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW)) !== 0
  }

  /**
   * Submits what was prepared and waits for `minComplete` completions, at most `timeoutUs` (-1 = without end).
   * @throws a system error when the ring itself fails
   */
  submit(minComplete: number, timeoutUs: number): void {
    const control = this.#control
    const direct = this.#direct
    for (;;) {
      const hurry = direct.pending > 0
      // Executed entries that wait to be reported are completions as well, which the kernel doesn't know of.
      const wait = hurry || direct.finished > 0 ? 0 : minComplete
      control[0] = this.#submissions
      control[1] = wait
      // Beside direct entries the kernel is entered only when there is a reason: that saves the system call.
      control[2] = !hurry || this.#submissions > 0 || this.wantsEnter() ? IORING_ENTER_GETEVENTS : 0
      control[3] = wait === 0 ? -1 : timeoutUs
      const result = hurry ? direct.execute(this.#enter) : this.#enter()
      if (result >= 0) {
        this.#submissions -= result
        if (this.#submissions === 0) {
          this.#vector = 0
          return
        }
        // Part was submitted: the kernel ran out of something. Completions free it.
        if (this.#cqReady()) return
        continue
      }
      // With a timeout or a signal the entries were taken nevertheless: only the wait ended.
      if (result === ETIME || result === EINTR) {
        this.#recountPending()
        return
      }
      if ((result === EAGAIN || result === EBUSY) && (this.#cqReady() || direct.finished > 0)) return
      if (result !== EAGAIN && result !== EBUSY) throw systemError(result, 'io_uring_enter', 'the ring failed')
    }
  }

  /** Hands every completion that is there to `sink`. Returns how many. */
  reap(sink: CompletionSink): number {
    const direct = this.#direct
    let count = 0
    for (let entry = direct.next(); entry >= 0; entry = direct.next()) {
      this.inFlight--
      count++
      sink.completion(direct.low(entry), direct.high(entry), direct.result(entry), 0)
    }
    // ORDER: acquire, pairs with the kernel's release of the CQ tail: the entries before it are written.
    const tail = Atomics.load(this.#rings, this.#cqTail)
    const head = this.#head
    const cqes = this.#cqes
    while (this.#head !== tail) {
      const at = (this.#head & this.#cqMask) * 4
      const flags = cqes[at + 3]!
      if ((flags & IORING_CQE_F_MORE) === 0) this.inFlight--
      const low = cqes[at]! >>> 0
      const high = cqes[at + 1]! >>> 0
      const result = cqes[at + 2]!
      // Before the sink: it may fill the submission ring, and its flush gives the entries back that are read.
      this.#head = (this.#head + 1) | 0
      sink.completion(low, high, result, flags)
      count++
    }
    if (this.#head !== head) this.#releaseCompletions()
    return count
  }

  // ---- preparing entries. SAFETY: `address` is inside memory that stays mapped until the completion was reaped.

  read(fd: number, slot: number, offset: number, address: number, length: number, low: number, high: number): void {
    this.#prepare(IORING_OP_READ, fd, slot, offset, address, length, 0, low, high)
  }

  /**
   * Whether reads and small writes of mapped files may be copies now. One that is refused later completes with -EAGAIN.
   */
  takesCopies(): boolean {
    return this.#direct.takesCopies()
  }

  /** Changes when a copy ran into missing pages of a mapping; see `RingFile.check`. */
  get copyFaults(): number {
    return this.#direct.faults
  }

  /** Copies `length` bytes between `mapped`, inside a mapping, and `address`. Only after `takesCopies`. */
  copy(write: boolean, mapped: number, address: number, length: number, low: number, high: number): void {
    this.inFlight++
    this.#direct.copy(write ? IORING_OP_WRITE : IORING_OP_READ, mapped, address, length, low, high)
  }

  /** Copies between `mapped` and the last `count` vectors. */
  copyVector(write: boolean, mapped: number, count: number, low: number, high: number): void {
    const vectors = this.#vectorsAddress + (this.#vector - count) * IOVEC_SIZE
    this.inFlight++
    this.#direct.copy(write ? IORING_OP_WRITEV : IORING_OP_READV, mapped, vectors, count, low, high)
  }

  /** @param kind WRITE_PLAIN, WRITE_DSYNC or WRITE_BUFFERED */
  write(
    fd: number,
    slot: number,
    offset: number,
    address: number,
    length: number,
    kind: number,
    low: number,
    high: number
  ): void {
    if (kind === WRITE_BUFFERED && this.#direct.takesWrites()) {
      this.inFlight++
      this.#direct.write(IORING_OP_WRITE, fd, offset, address, length, low, high)
    } else
      this.#prepare(IORING_OP_WRITE, fd, slot, offset, address, length, kind === WRITE_DSYNC ? RWF_DSYNC : 0, low, high)
  }

  /**
   * Makes room for `count` vectors (≤ MAX_VECTORS); `vector` then adds them, and `readVector` or `writeVector` uses
   * them.
   */
  beginVectors(count: number): void {
    // Also when the entry itself would not fit: a submission between the vectors and their entry would free them.
    if (this.#vector + count > VECTORS || this.#submissions > this.#sqMask) this.#flush()
  }

  vector(address: number, length: number): void {
    const word = this.#vector++ * 4
    this.#vectors[word] = address >>> 0
    this.#vectors[word + 1] = (address / 0x1_0000_0000) >>> 0
    this.#vectors[word + 2] = length
    this.#vectors[word + 3] = 0
  }

  /** readv into the last `count` vectors. */
  readVector(fd: number, slot: number, offset: number, count: number, low: number, high: number): void {
    const vectors = this.#vectorsAddress + (this.#vector - count) * IOVEC_SIZE
    this.#prepare(IORING_OP_READV, fd, slot, offset, vectors, count, 0, low, high)
  }

  writeVector(fd: number, slot: number, offset: number, count: number, kind: number, low: number, high: number): void {
    const vectors = this.#vectorsAddress + (this.#vector - count) * IOVEC_SIZE
    if (kind === WRITE_BUFFERED && this.#direct.takesWrites()) {
      this.inFlight++
      this.#direct.write(IORING_OP_WRITEV, fd, offset, vectors, count, low, high)
    } else
      this.#prepare(IORING_OP_WRITEV, fd, slot, offset, vectors, count, kind === WRITE_DSYNC ? RWF_DSYNC : 0, low, high)
  }

  fdatasync(fd: number, slot: number, low: number, high: number): void {
    this.#prepare(IORING_OP_FSYNC, fd, slot, 0, 0, 0, IORING_FSYNC_DATASYNC, low, high)
  }

  fallocate(fd: number, slot: number, mode: number, offset: number, length: number, low: number, high: number): void {
    // The kernel takes the length in `addr` and the mode in `len`.
    this.#prepare(IORING_OP_FALLOCATE, fd, slot, offset, length, mode, 0, low, high)
  }

  /** A multishot poll: one completion for each time the fd becomes readable. */
  pollAdd(fd: number, low: number, high: number): void {
    this.#prepare(IORING_OP_POLL_ADD, fd, -1, 0, 0, IORING_POLL_ADD_MULTI, POLLIN, low, high)
  }

  /**
   * Ends the operation whose user_data is (targetLow, targetHigh); it completes with -ECANCELED. Not by POLL_REMOVE,
   * which leaves a poll alone (-EALREADY) that has just been woken.
   */
  cancel(targetLow: number, targetHigh: number, low: number, high: number): void {
    this.#prepare(IORING_OP_ASYNC_CANCEL, -1, -1, 0, targetLow + targetHigh * 0x1_0000_0000, 0, 0, low, high)
  }

  close(): void {
    this.#ring.close()
  }

  #prepare(
    opcode: number,
    fd: number,
    slot: number,
    offset: number,
    address: number,
    length: number,
    opFlags: number,
    low: number,
    high: number
  ): void {
    if (this.#submissions > this.#sqMask) this.#flush()
    const sqes = this.#sqes
    const at = (this.#tail & this.#sqMask) * SQE_WORDS
    sqes[at] = slot < 0 ? opcode : opcode | (IOSQE_FIXED_FILE << 8)
    sqes[at + 1] = slot < 0 ? fd : slot
    sqes[at + 2] = offset >>> 0
    // Floor, not truncation: the high word of -1 (no position) is all ones.
    sqes[at + 3] = Math.floor(offset / 0x1_0000_0000) >>> 0
    sqes[at + 4] = address >>> 0
    sqes[at + 5] = (address / 0x1_0000_0000) >>> 0
    sqes[at + 6] = length
    sqes[at + 7] = opFlags
    sqes[at + 8] = low
    sqes[at + 9] = high
    // Words 10-15 (buf_index, personality, splice_fd, addr3) are never written: they stay zero.
    this.#tail = (this.#tail + 1) | 0
    this.#submissions++
    this.inFlight++
    // ORDER: release, pairs with the kernel's acquire of the SQ tail in io_uring_enter, which is the barrier here.
    this.#rings[this.#sqTail] = this.#tail
  }

  /** The submission ring or the vectors are full in the middle of a batch. */
  #flush(): void {
    this.#releaseCompletions()
    // Twice where the kernel takes a part for want of memory; completions that it waits for can't be reaped here.
    for (let tries = 0; tries < 1000; tries++) {
      this.submit(0, -1)
      if (this.#submissions === 0) return
    }
    throw new Error('io_uring takes no entries although the completion ring has room')
  }

  #releaseCompletions(): void {
    // ORDER: release, pairs with the kernel's acquire: the entries are read, it may overwrite them.
    Atomics.store(this.#rings, this.#cqHead, this.#head)
  }

  #cqReady(): boolean {
    // ORDER: acquire, pairs with the kernel's release of the CQ tail.
    return Atomics.load(this.#rings, this.#cqTail) !== this.#head
  }

  #recountPending(): void {
    const consumed = Atomics.load(this.#rings, this.#ring.sqHead / 4)
    this.#submissions = (this.#tail - consumed) | 0
    if (this.#submissions === 0) this.#vector = 0
  }
}

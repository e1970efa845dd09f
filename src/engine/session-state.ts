/**
 * What the rings of one session share on an iothread: the guest's memory, the IOTLB in front of it, the dirty log.
 * Every iothread has its own of each session; it must not know rings.
 */
import { DirtyLog } from '../virtio/dirty-log.ts'
import { Iotlb } from '../virtio/iotlb.ts'
import { GuestMemory, type RegionDescription } from '../virtio/memory.ts'
import type { LogArea } from './messages.ts'
import { CallWriter } from './notifications.ts'
import type { IoRing } from './ring.ts'
import { OP_CANCEL_LOG, OP_LOG } from './tags.ts'

export class SessionState {
  readonly session: number
  memory = new GuestMemory([])
  log: DirtyLog | undefined
  #iotlb: Iotlb | undefined
  /** SET_LOG_FD: written by the ring, since the front-end can make a write to its eventfd wait. */
  readonly #logCall: CallWriter
  /** The eventfd is about to be exchanged. */
  #logHeld = false
  /** Marks may have been told to an eventfd that nobody looks at any more. */
  #untold = false

  /** @param oneAddress as CallWriter has it */
  constructor(session: number, ring: IoRing, oneAddress: number) {
    this.session = session
    this.#logCall = new CallWriter(ring, -1, oneAddress, {
      low: session,
      operation: OP_LOG,
      cancellation: OP_CANCEL_LOG,
    })
  }

  /** All memory that there is; `translated`: entries of an IOTLB in place of the present one's. */
  setMemory(regions: readonly RegionDescription[], translated: boolean): void {
    if (!translated) {
      this.#iotlb = undefined
      this.memory = new GuestMemory(regions)
      return
    }
    this.#iotlb = new Iotlb()
    this.update(regions)
  }

  /** IOTLB entries in place of what there is in their ranges. */
  update(regions: readonly RegionDescription[]): void {
    const iotlb = this.#translated
    for (const region of regions) iotlb.update(region)
    this.memory = iotlb.memory()
  }

  invalidate(address: number, size: number): void {
    const iotlb = this.#translated
    iotlb.invalidate(address, size)
    this.memory = iotlb.memory()
  }

  get #translated(): Iotlb {
    if (this.#iotlb === undefined) throw new Error(`session ${this.session} has no IOTLB`)
    return this.#iotlb
  }

  // ---- the log

  /** Before `setLog`: the present log's eventfd comes to rest. */
  holdLog(): void {
    this.#logHeld = true
    if (this.signalling) this.#untold = true
    this.#logCall.hold()
  }

  /** The eventfd of the log is in use by the kernel. */
  get signalling(): boolean {
    return this.#logCall.calling
  }

  /** @param fd eventfd that tells of marks, -1 = none */
  setLog(area: LogArea | undefined, fd: number): void {
    // Also of marks from before there was an eventfd.
    const untold = this.#untold || this.log?.marked === true
    this.#untold = false
    this.#logHeld = false
    this.log = area && new DirtyLog(new Uint8Array(area.buffer, area.offset, area.size))
    if (this.log !== undefined) this.log.marked = untold
    this.#logCall.exchange(fd)
  }

  /** Tells the front-end, in the next submission, when something was marked since the last time. */
  tellMarks(): void {
    const { log } = this
    if (log === undefined || !log.marked || this.#logHeld || !this.#logCall.hasFd) return
    log.marked = false
    this.#logCall.call()
  }

  /** A completion of OP_LOG or OP_CANCEL_LOG. */
  completion(high: number, result: number): void {
    if (high === OP_CANCEL_LOG) this.#logCall.cancelled(result)
    // Nobody hears us when it can't be written: the marks are there nevertheless.
    else if (this.#logCall.completed(result) > 0) this.#logCall.call()
  }
}

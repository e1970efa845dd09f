/**
 * A pretended vIOMMU: which I/O virtual addresses lie where in guest memory. It answers what the back-end misses and
 * can take translations away. It owns the mappings. It must not know rings or requests.
 *
 * At first each region of guest memory has one mapping, at an address that is neither its guest-physical nor its user
 * address; tests add others, of single pages or without permission.
 */
import { readIotlb, VHOST_IOTLB_MISS } from '../vhost-user/wire.ts'
import { IOTLB_READ, IOTLB_WRITE } from '../virtio/memory.ts'
import type { Message } from './channel.ts'
import type { Connection } from './connection.ts'
import type { GuestMemory } from './memory.ts'

/** [iova, iova + size) is [gpa, gpa + size). All in bytes; multiples of 4096. */
export interface IommuMapping {
  readonly iova: number
  readonly gpa: number
  readonly size: number
  /** IOTLB_READ, IOTLB_WRITE or both. */
  readonly permissions: number
}

export interface IommuOptions {
  /** Bytes that one answer translates at most; default 4096, as an IOMMU's pages. A power of two. */
  readonly granule?: number
  /** Where the first region is mapped; the others follow in reverse order of their addresses. */
  readonly base?: number
}

export class Iommu {
  readonly mappings: IommuMapping[] = []
  /** Misses that came, those that found nothing, and updates that went out. */
  misses = 0
  faults = 0
  updates = 0
  /** false: misses are counted and not answered, until `answerLate`. */
  answering = true
  readonly #memory: GuestMemory
  readonly #granule: number
  readonly #unanswered: { iova: number; permissions: number }[] = []

  constructor(memory: GuestMemory, options: IommuOptions = {}) {
    this.#memory = memory
    this.#granule = options.granule ?? 4096
    let iova = options.base ?? 0x10_0000_0000
    for (const { gpa, size } of [...memory.regions].reverse()) {
      this.map({ iova, gpa, size, permissions: IOTLB_READ | IOTLB_WRITE })
      // A hole between them, so that one end running over is found out.
      iova += size + 2 ** 21
    }
  }

  /** Adds a mapping; the back-end hears of it when it misses it. Of two for one address the older one holds. */
  map(mapping: IommuMapping): void {
    this.mappings.push(mapping)
  }

  /** Takes mappings that begin in [iova, iova + size) away, and tells the back-end. */
  unmap(connection: Connection, iova: number, size: number): void {
    for (let i = this.mappings.length - 1; i >= 0; i--) {
      const one = this.mappings[i] as IommuMapping
      if (one.iova >= iova && one.iova < iova + size) this.mappings.splice(i, 1)
    }
    this.invalidate(connection, iova, size)
  }

  /** The back-end forgets what it knows of the range, and misses it again when it needs it. */
  invalidate(connection: Connection, iova: number, size: number): void {
    connection.iotlbInvalidate(BigInt(iova), BigInt(size))
  }

  /** What the device is told for a guest-physical address: the first mapping that has it. @throws RangeError */
  readonly translate = (gpa: number): number => {
    for (const one of this.mappings) if (gpa >= one.gpa && gpa < one.gpa + one.size) return one.iova + (gpa - one.gpa)
    throw new RangeError(`no I/O virtual address leads to 0x${gpa.toString(16)}`)
  }

  /**
   * Sends the translation of the granule that `iova` lies in.
   * @returns false when there is none with these permissions
   */
  update(connection: Connection, iova: number, permissions: number): boolean {
    const one = this.mappings.find(
      (mapping) =>
        iova >= mapping.iova &&
        iova < mapping.iova + mapping.size &&
        (mapping.permissions & permissions) === permissions
    )
    if (one === undefined) return false
    const start = Math.max(one.iova, Math.floor(iova / this.#granule) * this.#granule)
    const end = Math.min(one.iova + one.size, Math.floor(iova / this.#granule) * this.#granule + this.#granule)
    const user = this.#memory.uva(one.gpa + (start - one.iova))
    this.updates++
    connection.iotlbUpdate(BigInt(start), BigInt(end - start), user, one.permissions)
    return true
  }

  /** Everything at once, before it is asked for: one update per mapping. */
  updateAll(connection: Connection): void {
    for (const { iova, gpa, size, permissions } of this.mappings) {
      this.updates++
      connection.iotlbUpdate(BigInt(iova), BigInt(size), this.#memory.uva(gpa), permissions)
    }
  }

  /** Handles IOTLB_MSG of the back-end. @returns what to acknowledge it with */
  handle(connection: Connection, message: Message): bigint {
    const { payload } = message
    if (payload.length < 26) return 1n
    const miss = readIotlb(new DataView(payload.buffer, payload.byteOffset, payload.byteLength), 0)
    if (miss.type !== VHOST_IOTLB_MISS) return 1n
    this.misses++
    const iova = Number(miss.iova)
    if (!this.answering) {
      this.#unanswered.push({ iova, permissions: miss.permissions })
      return 0n
    }
    if (this.update(connection, iova, miss.permissions)) return 0n
    this.faults++
    return 1n
  }

  /** Answers what came while `answering` was false, and answers again from here on. */
  answerLate(connection: Connection): void {
    this.answering = true
    for (const { iova, permissions } of this.#unanswered.splice(0)) {
      if (!this.update(connection, iova, permissions)) this.faults++
    }
  }
}

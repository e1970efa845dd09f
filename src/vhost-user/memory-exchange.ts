/**
 * The front-end's memory and its vIOMMU as they change under running rings: the table of regions, the translations in
 * front of it, and the host that is told of both. What goes away is released when nothing can use it any more.
 */
import { IOTLB_READ, IOTLB_WRITE } from '../virtio/memory.ts'
import { ProtocolError } from './errors.ts'
import { ADDRESS_LIMIT } from './mapping.ts'
import { type MappedRegion, MemoryTable } from './memory-table.ts'
import type { RingHost } from './ring-host.ts'
import { describeTranslation, type Translation, Translations } from './translations.ts'
import { type IotlbMessage, type MemoryRegionDescription, VHOST_IOTLB_INVALIDATE, VHOST_IOTLB_UPDATE } from './wire.ts'

const PAGE = 4096n

/** The rings, as far as they depend on where things are. */
export interface MovableRings {
  /** The memory table changed: front-end addresses may mean other places. All rings are paused. */
  moved(): Promise<void>
  /** Guest-physical addresses that the log needs may have changed, and nothing was written there yet. */
  relocateLogs(): Promise<void>
}

export class MemoryExchange {
  readonly table = new MemoryTable()
  readonly translations = new Translations()
  /** VIRTIO_F_ACCESS_PLATFORM: the host sees translations in place of regions. */
  #translated = false
  readonly #host: RingHost
  readonly #rings: MovableRings

  constructor(host: RingHost, rings: MovableRings) {
    this.#host = host
    this.#rings = rings
  }

  get translated(): boolean {
    return this.#translated
  }

  /** The front-end truncated a file. */
  get faulted(): boolean {
    return this.table.regions.some((region) => region.faulted)
  }

  // ---- regions

  /** SET_MEM_TABLE: replaces all regions. Rings that run are paused for it and go on in the new memory. */
  async setTable(descriptions: readonly MemoryRegionDescription[], fds: readonly number[]): Promise<void> {
    const mapped: MappedRegion[] = []
    try {
      for (const [i, description] of descriptions.entries()) mapped.push(MemoryTable.map(description, fds[i]!, mapped))
    } catch (error) {
      for (const region of mapped) region.release()
      throw error
    }
    await this.#exchange(mapped)
  }

  async add(description: MemoryRegionDescription, fd: number): Promise<void> {
    if (this.#host.network !== undefined && this.table.hasAlready(description, fd)) return
    const region = MemoryTable.map(description, fd, this.table.regions)
    this.table.regions = [...this.table.regions, region]
    // Nothing goes away, so nothing has to stop; and a translation of the new region is still to come.
    if (!this.#translated) await this.share()
  }

  async remove({ guestAddress, userAddress, size }: MemoryRegionDescription): Promise<void> {
    const region = this.table.find(guestAddress, userAddress, size)
    if (region === undefined) {
      if (this.table.excuses(guestAddress, userAddress, size)) return
      throw new ProtocolError('ERR_PROTOCOL_MEMORY', 'no such region')
    }
    await this.#exchange(this.table.regions.filter((candidate) => candidate !== region))
  }

  /** Puts `regions` in place of the present ones and releases those that are gone, once nothing is in flight. */
  async #exchange(regions: MappedRegion[]): Promise<void> {
    const gone = this.table.regions.filter((region) => !regions.includes(region))
    try {
      await this.#host.pause()
      this.table.regions = regions
      this.translations.keep(this.table)
      await this.share()
    } catch (error) {
      // Who serves the rings has died in part: the end of the session, which follows, releases all of them.
      this.table.regions = [...regions, ...gone]
      throw error
    }
    try {
      for (const region of gone) region.release()
      // A ring's addresses are the front-end's own: where they are in guest memory may have changed with the table.
      await this.#rings.moved()
    } finally {
      await this.#host.resume()
    }
  }

  /** Tells the host what there is. */
  async share(): Promise<void> {
    const regions = this.#translated ? this.translations.describe(this.table) : this.table.describe()
    await this.#host.setMemory(regions, this.#translated)
  }

  // ---- translations

  async setTranslated(translated: boolean): Promise<void> {
    if (translated === this.#translated) return
    this.#translated = translated
    this.translations.clear()
    await this.share()
  }

  /** IOTLB_MSG. @throws ProtocolError for what can't be, which the reply says */
  async translate(message: IotlbMessage): Promise<void> {
    if (!this.#translated) throw iotlbError('ACCESS_PLATFORM was not negotiated')
    if (message.type === VHOST_IOTLB_UPDATE) return this.#update(message)
    if (message.type === VHOST_IOTLB_INVALIDATE) return this.#invalidate(message)
    throw iotlbError(`a message of type ${message.type}`)
  }

  async #update({ iova, size, userAddress, permissions }: IotlbMessage): Promise<void> {
    if (size === 0n) throw iotlbError('an entry of 0 bytes')
    if ([iova, size, userAddress].some((value) => value % PAGE !== 0n))
      throw iotlbError('an entry that does not consist of pages of 4096 bytes')
    if (iova + size > ADDRESS_LIMIT || userAddress + size > ADDRESS_LIMIT)
      throw iotlbError('an entry reaches beyond 2^53')
    if ((permissions & ~(IOTLB_READ | IOTLB_WRITE)) !== 0) throw iotlbError(`permissions ${permissions}`)
    // "No access" (vhost-user.rst "An IOTLB message") is what there is without an entry.
    if (permissions === 0) return this.#invalidate({ iova, size })
    const entry: Translation = {
      iova: Number(iova),
      size: Number(size),
      uva: Number(userAddress),
      access: permissions,
    }
    const regions = describeTranslation(entry, this.table)
    if (regions === undefined) throw iotlbError('an entry outside of the memory regions')
    // One for each piece: entries that lie in hundreds of regions would become that many times what the limit of
    // entries allows, at the next change of the memory table.
    const pieces = regions.map(({ gpa, size: length }) => ({
      ...entry,
      iova: gpa,
      size: length,
      uva: entry.uva + gpa - entry.iova,
    }))
    this.translations.update(...pieces)
    await this.#rings.relocateLogs()
    await this.#host.updateIotlb(regions)
  }

  async #invalidate({ iova, size }: { iova: bigint; size: bigint }): Promise<void> {
    // All 2^64 bytes are a size of 0: what QEMU makes of the invalidation of everything. Beyond 2^53 there are no
    // entries.
    const all = iova === 0n && size === 0n
    if (!all && (size === 0n || iova + size > 1n << 64n)) throw iotlbError(`${size} bytes at 0x${iova.toString(16)}`)
    if (iova >= ADDRESS_LIMIT) return
    // Whole pages, as the entries: cut elsewhere their words would not be aligned any more.
    const start = Number(iova - (iova % PAGE))
    const last = iova + size + PAGE - 1n
    const end = Number(all || last > ADDRESS_LIMIT ? ADDRESS_LIMIT : last - (last % PAGE))
    this.translations.invalidate(start, end - start)
    await this.#host.invalidateIotlb(start, end - start)
  }

  // ---- the end of a session, and of what was negotiated

  /** RESET_DEVICE: the regions stay, the translations go. */
  async reset(): Promise<void> {
    await this.setTranslated(false)
  }

  /** Nothing may use the memory any more. */
  release(): void {
    for (const region of this.table.regions) region.release()
    this.table.regions = []
    this.translations.clear()
  }
}

function iotlbError(message: string): ProtocolError {
  return new ProtocolError('ERR_PROTOCOL_IOTLB', message)
}

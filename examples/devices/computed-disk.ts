/**
 * A disk that is computed when it is read: a FAT16 volume whose files are functions. Nothing is stored anywhere.
 *
 *   virtiod device ./computed-disk.ts --socket-path disk.sock
 *   mount -t vfat -o ro /dev/vda /mnt                      in the guest
 *   cat /mnt/time.txt                                      the time of day, made by the read
 *   dd if=/mnt/factors.txt bs=32 skip=720719 count=1       line 720720 of a million: "720720 = 2^4*3^2*5*7*11*13"
 *
 * The guest's page cache keeps what was read; `echo 3 > /proc/sys/vm/drop_caches` makes it ask again. A file of your
 * own is one more entry of `files`.
 */
import * as v from 'valibot'
import { defineDevice } from 'virtiod/device'
import { blkConfig, blkDevice, blkFeatures, handleBlkRequest } from 'virtiod/device/virtio-blk'

/** A file: what it says from `offset` on, made on demand. */
interface ComputedFile {
  /** Eight characters and an extension of three, in lower case. */
  readonly name: string
  readonly size: number
  read(offset: number, length: number): Uint8Array
}

function files(count: number): ComputedFile[] {
  return [
    lines('time.txt', 1, 25, () => new Date().toISOString()),
    lines('factors.txt', count, 32, (i) => `${i + 1} = ${factors(i + 1)}`),
  ]
}

/** A file of lines of equal width, so that each can be computed without those before it. */
function lines(name: string, count: number, width: number, line: (index: number) => string): ComputedFile {
  return {
    name,
    size: count * width,
    read(offset, length) {
      const first = Math.floor(offset / width)
      const last = Math.ceil((offset + length) / width)
      let text = ''
      for (let i = first; i < last; i++) text += `${line(i).padEnd(width - 1)}\n`
      return Buffer.from(text, 'latin1').subarray(offset - first * width, offset - first * width + length)
    },
  }
}

/** `2^3*3` for 24. */
function factors(number: number): string {
  const found: string[] = []
  let rest = number
  for (let prime = 2; prime * prime <= rest; prime++) {
    let power = 0
    for (; rest % prime === 0; rest /= prime) power++
    if (power > 0) found.push(power === 1 ? `${prime}` : `${prime}^${power}`)
  }
  return [...found, ...(rest > 1 || number === 1 ? [rest] : [])].join('*')
}

// The volume, by Microsoft's "FAT: General Overview of On-Disk Format": boot sector, one table, root directory,
// clusters.

const SECTOR = 512
/** Between 4085 and 65524: the number of clusters is what makes it a FAT16. */
const CLUSTERS = 65_000
const TABLE_SECTORS = Math.ceil(((CLUSTERS + 2) * 2) / SECTOR)
const ROOT_ENTRIES = 512
const ROOT_SECTORS = (ROOT_ENTRIES * 32) / SECTOR
const ROOT_START = 1 + TABLE_SECTORS
const DATA_START = ROOT_START + ROOT_SECTORS
/** The value of the table that ends a file. */
const END = 0xffff

class Volume {
  readonly size: number
  readonly #clusterSize: number
  /** Each file with its clusters, first … last, one behind the other; numbers begin with 2. */
  readonly #files: { readonly file: ComputedFile; readonly first: number; readonly last: number }[] = []

  constructor(files: readonly ComputedFile[]) {
    const total = files.reduce((sum, file) => sum + file.size, 0)
    this.#clusterSize = Math.max(SECTOR, 2 ** Math.ceil(Math.log2(total / (CLUSTERS - files.length))))
    this.size = DATA_START * SECTOR + CLUSTERS * this.#clusterSize
    let next = 2
    for (const file of files) {
      const first = next
      next += Math.ceil(file.size / this.#clusterSize)
      this.#files.push({ file, first, last: next - 1 })
    }
  }

  read(offset: number, length: number): Uint8Array {
    const bytes = new Uint8Array(length)
    for (let at = 0; at < length; at += SECTOR) this.#sector((offset + at) / SECTOR, bytes.subarray(at, at + SECTOR))
    return bytes
  }

  #sector(index: number, target: Uint8Array): void {
    const view = new DataView(target.buffer, target.byteOffset, SECTOR)
    if (index === 0) this.#boot(view, target)
    else if (index < ROOT_START) this.#table(((index - 1) * SECTOR) / 2, view)
    else if (index < DATA_START) this.#directory(((index - ROOT_START) * SECTOR) / 32, view, target)
    else this.#data((index - DATA_START) * SECTOR, target)
  }

  #boot(view: DataView, target: Uint8Array): void {
    target.set(Buffer.from('\xeb\x3c\x90VIRTIOD ', 'latin1'))
    view.setUint16(11, SECTOR, true)
    view.setUint8(13, this.#clusterSize / SECTOR)
    view.setUint16(14, 1, true) // sectors before the table
    view.setUint8(16, 1) // tables
    view.setUint16(17, ROOT_ENTRIES, true)
    view.setUint8(21, 0xf8) // a fixed disk
    view.setUint16(22, TABLE_SECTORS, true)
    view.setUint32(32, this.size / SECTOR, true)
    target.set(Buffer.from('\x80\0\x29\x34\x12\0\0COMPUTED   FAT16   ', 'latin1'), 36)
    view.setUint16(510, 0xaa55, true)
  }

  #table(first: number, view: DataView): void {
    for (let i = 0; i < SECTOR / 2; i++) {
      const cluster = first + i
      const owner = this.#files.find((it) => it.first <= cluster && cluster <= it.last)
      const next = owner === undefined ? 0 : cluster === owner.last ? END : cluster + 1
      view.setUint16(i * 2, cluster === 0 ? 0xfff8 : cluster === 1 ? END : next, true)
    }
  }

  #directory(first: number, view: DataView, target: Uint8Array): void {
    const now = new Date()
    for (const [i, it] of this.#files.slice(first, first + SECTOR / 32).entries()) {
      const [name = '', extension = ''] = it.file.name.toUpperCase().split('.')
      // Read-only, and shown in lower case.
      target.set(Buffer.from(`${name.padEnd(8)}${extension.padEnd(3)}\x01\x18`, 'latin1'), i * 32)
      view.setUint16(i * 32 + 24, ((now.getFullYear() - 1980) << 9) | ((now.getMonth() + 1) << 5) | now.getDate(), true)
      view.setUint16(i * 32 + 26, it.first, true)
      view.setUint32(i * 32 + 28, it.file.size, true)
    }
  }

  #data(offset: number, target: Uint8Array): void {
    const cluster = 2 + Math.floor(offset / this.#clusterSize)
    const owner = this.#files.find((it) => it.first <= cluster && cluster <= it.last)
    if (owner === undefined) return
    const at = offset - (owner.first - 2) * this.#clusterSize
    const length = Math.min(SECTOR, owner.file.size - at)
    if (length > 0) target.set(owner.file.read(at, length))
  }
}

export default defineDevice({
  apiVersion: 1,
  name: 'computeddisk',
  ...blkDevice,
  options: v.strictObject({
    count: v.optional(
      v.pipe(v.number(), v.integer(), v.minValue(1), v.maxValue(2 ** 23), v.description('Lines of factors.txt')),
      1_000_000
    ),
  }),
  features: blkFeatures({ readOnly: true }),
  config: ({ count }) => blkConfig(new Volume(files(count)).size),

  create({ options }) {
    const volume = new Volume(files(options.count))
    return { handle: (chain) => handleBlkRequest(chain, volume) }
  },
})

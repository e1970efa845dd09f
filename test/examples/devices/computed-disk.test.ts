/** examples/devices/computed-disk.ts: the volume as its bytes say it is, and as a guest's kernel mounts it. */

import { missingPrerequisites, testDevice } from 'virtiod/testing'
import { describe, expect, test } from 'vitest'
import definition from '../../../examples/devices/computed-disk.ts'
import { TestDisk } from './disk.ts'
import { Stage, transcript } from './transcript.ts'

/** A reader of FAT16 that follows the table, as a driver does. */
class Fat {
  readonly #disk: TestDisk
  readonly #boot: Buffer

  constructor(disk: TestDisk, boot: Buffer) {
    this.#disk = disk
    this.#boot = boot
  }

  get clusterSize(): number {
    return this.#boot.readUInt16LE(11) * this.#boot.readUInt8(13)
  }

  get #tableStart(): number {
    return this.#boot.readUInt16LE(14) * 512
  }

  get #rootStart(): number {
    return this.#tableStart + this.#boot.readUInt8(16) * this.#boot.readUInt16LE(22) * 512
  }

  get #dataStart(): number {
    return this.#rootStart + this.#boot.readUInt16LE(17) * 32
  }

  get clusters(): number {
    return Math.floor((this.#boot.readUInt32LE(32) * 512 - this.#dataStart) / this.clusterSize)
  }

  async files(): Promise<Map<string, { first: number; size: number }>> {
    const root = await this.#disk.read(this.#rootStart, 512)
    const files = new Map<string, { first: number; size: number }>()
    for (let at = 0; root[at] !== 0; at += 32) {
      const first = root.readUInt16LE(at + 26)
      files.set(root.toString('latin1', at, at + 11), { first, size: root.readUInt32LE(at + 28) })
    }
    return files
  }

  /** The clusters of a file, by the table. */
  async chain(first: number): Promise<number[]> {
    const table = await this.#disk.read(this.#tableStart, this.#boot.readUInt16LE(22) * 512)
    const chain: number[] = []
    for (let cluster = first; cluster < 0xfff8; cluster = table.readUInt16LE(cluster * 2)) chain.push(cluster)
    return chain
  }

  async content(first: number, size: number): Promise<string> {
    const parts: Buffer[] = []
    for (const cluster of await this.chain(first))
      parts.push(await this.#disk.read(this.#dataStart + (cluster - 2) * this.clusterSize, this.clusterSize))
    const all = Buffer.concat(parts)
    expect(all.subarray(size).every((byte) => byte === 0)).toBe(true)
    return all.toString('latin1', 0, size)
  }
}

describe.each([1, 20, 5000])('the volume with %d factors', (count) => {
  test('is a FAT16 with both files, each in clusters of its own', async () => {
    await using device = await testDevice(definition, { options: { count }, split: true })
    const disk = new TestDisk(device)
    const fat = new Fat(disk, await disk.read(0, 512))
    expect(fat.clusters).toBeGreaterThan(4084)
    expect(fat.clusters).toBeLessThan(65_525)
    const files = await fat.files()
    expect([...files.keys()]).toEqual(['TIME    TXT', 'FACTORS TXT'])
    const [time, factors] = [...files.values()]
    expect(await fat.content(time!.first, time!.size)).toMatch(/^20\d\d-\d\d-\d\dT.*Z\n$/)
    const lines = (await fat.content(factors!.first, factors!.size)).split('\n').map((line) => line.trimEnd())
    expect(lines.pop()).toBe('')
    expect(lines).toHaveLength(count)
    for (const [i, line] of lines.entries()) {
      const [number, product = ''] = line.split(' = ')
      const powers = product.split('*').map((text) => text.split('^').map(Number))
      expect(Number(number)).toBe(i + 1)
      expect(powers.reduce((all, [prime = 0, power = 1]) => all * prime ** power, 1)).toBe(i + 1)
    }
    const clusters = [...(await fat.chain(time!.first)), ...(await fat.chain(factors!.first))]
    expect(new Set(clusters).size).toBe(clusters.length)
    // The end of the disk is there, and the time goes on.
    expect(await disk.read(disk.size - 512, 512)).toEqual(Buffer.alloc(512))
    await expect(disk.write(0, new Uint8Array(512))).rejects.toThrow('status 1')
  })
})

test('as many as there may be', async () => {
  await using device = await testDevice(definition, { options: { count: 2 ** 23 } })
  const disk = new TestDisk(device)
  const fat = new Fat(disk, await disk.read(0, 512))
  const factors = (await fat.files()).get('FACTORS TXT')
  expect(factors?.size).toBe(2 ** 28)
  const chain = await fat.chain(factors?.first ?? 0)
  expect(chain).toHaveLength(2 ** 28 / fat.clusterSize)
  await expect(testDevice(definition, { options: { count: 2 ** 23 + 1 } })).rejects.toThrow('count')
})

test.skipIf(missingPrerequisites().length > 0)(
  'a guest mounts it',
  async () => {
    await using stage = new Stage('computed-disk.ts', { modules: ['virtio_blk', 'vfat', 'nls_cp437', 'nls_ascii'] })
    await stage.play(transcript('computed-disk.ts'))
    const { guest } = stage
    const time = () => guest.sh('echo 3 > /proc/sys/vm/drop_caches; cat /mnt/time.txt')
    const first = await time()
    await expect.poll(time, { timeout: 20_000 }).not.toBe(first)
    // Lines of the beginning and of the end, against the guest's own arithmetic.
    const check = `awk '{ p = 1; n = split($3, powers, "*")
    for (i = 1; i <= n; i++) { split(powers[i] "^1", pair, "^"); for (e = pair[2]; e > 0; e--) p *= pair[1] }
    if (p != $1) print "wrong:", $0 } END { print NR, "lines" }'`
    for (const skip of [0, 999])
      expect(await guest.sh(`dd if=/mnt/factors.txt bs=32000 skip=${skip} count=1 2> /dev/null | ${check}`)).toBe(
        '1000 lines'
      )
    expect(await guest.sh('stat -c %s /mnt/factors.txt')).toBe('32000000')
    expect(await guest.sh('touch /mnt/x 2>&1 || true')).toContain('Read-only file system')
  },
  90_000
)

/** examples/devices/sqlite-disk.ts: blocks in rows, what is durable when; and under a guest whose virtiod is killed. */
import { existsSync, mkdtempSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import { VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES } from 'virtiod/device/virtio-blk'
import { missingPrerequisites, testDevice } from 'virtiod/testing'
import { afterAll, describe, expect, test } from 'vitest'
import definition from '../../../examples/devices/sqlite-disk.ts'
import { TestDisk } from './disk.ts'
import { Stage, transcript } from './transcript.ts'

const directory = mkdtempSync(join(tmpdir(), 'virtiod-sqlite-'))
afterAll(() => rmSync(directory, { recursive: true, force: true }))

const SIZE = 2 ** 20
let count = 0
const newDatabase = (): string => join(directory, `disk${++count}.db`)
const open = (database: string, split = false) => testDevice(definition, { options: { database, size: SIZE }, split })

/** The blocks that have rows. */
function rows(database: string): number[] {
  const db = new DatabaseSync(database, { readOnly: true })
  try {
    return db
      .prepare('SELECT number FROM block ORDER BY number')
      .all()
      .map((row) => Number(row['number']))
  } finally {
    db.close()
  }
}

describe('blocks', () => {
  test('are zeroes until they are written, and there again later', async () => {
    const database = newDatabase()
    {
      await using device = await open(database, true)
      const disk = new TestDisk(device)
      expect(disk.size).toBe(SIZE)
      expect(await disk.read(0, 8192)).toEqual(Buffer.alloc(8192))
      await disk.write(4096, Buffer.alloc(8192, 0xaa).fill(0xbb, 4096))
      await disk.write(SIZE - 4096, Buffer.alloc(4096, 0xcc))
      await disk.write(4096, Buffer.alloc(4096, 0xdd))
      expect(await disk.read(0, 16_384)).toEqual(Buffer.alloc(16_384).fill(0xdd, 4096, 8192).fill(0xbb, 8192, 12_288))
    }
    expect(rows(database)).toEqual([1, 2, 255])
    await using device = await open(database)
    const disk = new TestDisk(device)
    expect(await disk.read(SIZE - 8192, 8192)).toEqual(Buffer.alloc(8192).fill(0xcc, 4096))
  })

  test.each([
    ['discarded', VIRTIO_BLK_T_DISCARD],
    ['written with zeroes', VIRTIO_BLK_T_WRITE_ZEROES],
  ])('that are %s have no row', async (_, type) => {
    const database = newDatabase()
    {
      await using device = await open(database)
      const disk = new TestDisk(device)
      await disk.write(0, Buffer.alloc(16_384, 0xaa))
      await disk.zero(type, 4096, 8192)
      expect(await disk.read(0, 16_384)).toEqual(Buffer.alloc(16_384, 0xaa).fill(0, 4096, 12_288))
    }
    expect(rows(database)).toEqual([0, 3])
  })

  test('are the least that can be asked for', async () => {
    await using device = await open(newDatabase())
    const disk = new TestDisk(device)
    await expect(disk.read(0, 512)).rejects.toThrow('status 1')
    await expect(disk.write(512, Buffer.alloc(4096))).rejects.toThrow('status 1')
    await expect(disk.read(SIZE, 4096)).rejects.toThrow('status 1')
  })
})

describe('a flush', () => {
  test('empties the log into the database', async () => {
    const database = newDatabase()
    await using device = await open(database)
    const disk = new TestDisk(device)
    await disk.flush()
    const before = statSync(database).size
    await disk.write(0, Buffer.alloc(16 * 4096, 0xaa))
    expect(statSync(`${database}-wal`).size).toBeGreaterThan(16 * 4096)
    await disk.flush()
    expect(statSync(`${database}-wal`).size).toBe(0)
    expect(statSync(database).size).toBeGreaterThan(before + 15 * 4096)
  })
})

describe('a host that fails', () => {
  test('is an I/O error, and the disk goes on', async () => {
    const database = newDatabase()
    await using device = await open(database)
    const disk = new TestDisk(device)
    await disk.write(0, Buffer.alloc(4096, 0xaa))
    await disk.flush()
    // A full disk would do the same in the middle of a request, which a test can't wait for.
    await device.close()
    const db = new DatabaseSync(database)
    db.exec(`CREATE TRIGGER full BEFORE INSERT ON block WHEN new.number = 7 BEGIN SELECT RAISE(ABORT, 'full'); END`)
    db.close()
    await using again = await open(database)
    const failing = new TestDisk(again)
    await expect(failing.write(5 * 4096, Buffer.alloc(16_384, 0xbb))).rejects.toThrow('status 1')
    expect(await failing.read(0, 8 * 4096)).toEqual(Buffer.alloc(8 * 4096).fill(0xaa, 0, 4096))
    expect(again.errors).toMatchObject({ io: 1 })
    await failing.write(8 * 4096, Buffer.alloc(4096, 0xbb))
    await failing.flush()
  })
})

describe('what cannot be served', () => {
  const refusal = { name: 'ConfigError', code: 'ERR_SQLITE_DISK', option: '--option database' }

  test('a database that another has', async () => {
    const database = newDatabase()
    await using _other = await open(database)
    await expect(open(database)).rejects.toMatchObject(refusal)
  })

  test('what is no database', async () => {
    const database = newDatabase()
    writeFileSync(database, 'no database'.repeat(1000))
    await expect(open(database)).rejects.toMatchObject(refusal)
    await expect(open(join(directory, 'nowhere', 'x.db'))).rejects.toMatchObject(refusal)
  })

  test('a size that is no number of blocks', async () => {
    await expect(testDevice(definition, { options: { database: newDatabase(), size: 5000 } })).rejects.toThrow(
      'Give whole blocks of 4096 bytes.'
    )
  })
})

test.skipIf(missingPrerequisites().length > 0)(
  'a guest has a file system on it, whatever happens to virtiod',
  async () => {
    await using stage = new Stage('sqlite-disk.ts', { kind: 'disk' })
    await stage.play(transcript('sqlite-disk.ts'))
    const { guest } = stage
    expect(guest.console).not.toMatch(/I\/O error|EXT4-fs error/)
    // Space comes back, and what is left is in the file when virtiod has ended.
    await guest.sh('mount -o discard /dev/vda /mnt && rm /mnt/numbers && sync && fstrim /mnt && umount /mnt')
    expect((await stage.daemons.at(-1)!.stop()).code).toBe(0)
    const database = join(stage.directory, 'disk.db')
    expect(existsSync(`${database}-wal`)).toBe(false)
    const left = rows(database)
    // The file alone had 500 blocks.
    expect(left.length).toBeGreaterThan(10)
    expect(left.length).toBeLessThan(200)
  },
  90_000
)

/**
 * A disk that is kept in an SQLite database: a row per block of 4 KiB that was ever written.
 *
 *   virtiod device ./sqlite-disk.ts --socket-path disk.sock --option database=disk.db --option size=64M
 *   mke2fs -t ext4 /dev/vda && mount /dev/vda /mnt              in the guest
 *   sqlite3 disk.db 'select count(*) from block'           after virtiod has ended
 *
 * What is durable when? Each write is a transaction of its own, in the log that SQLite keeps beside the database (WAL),
 * but not forced to the host's disk: it outlives a killed virtiod, not a power failure. FLUSH forces the log to the
 * disk and copies it into the database, which is what the guest asks for by fsync.
 */
import { DatabaseSync } from 'node:sqlite'
import * as v from 'valibot'
import { ConfigError, defineDevice } from 'virtiod/device'
import { type BlkDisk, blkConfig, blkDevice, blkFeatures, DiskError, handleBlkRequest } from 'virtiod/device/virtio-blk'

const BLOCK = 4096

// node:sqlite blocks its thread. That is this device's own, so only its own requests wait.

export default defineDevice({
  apiVersion: 1,
  name: 'sqlitedisk',
  ...blkDevice,
  options: v.strictObject({
    database: v.pipe(v.string(), v.description('The database'), v.metadata({ placeholder: 'PATH', path: true })),
    size: v.pipe(
      v.number(),
      v.integer(),
      v.minValue(BLOCK),
      v.multipleOf(BLOCK, `Give whole blocks of ${BLOCK} bytes`),
      v.description('How large the disk is, in whole blocks of 4 KiB'),
      v.metadata({ size: true })
    ),
  }),
  features: blkFeatures({ flush: true, discard: true, writeZeroes: true }),
  config: ({ size }) => blkConfig(size, BLOCK),

  create({ options }) {
    const { database, size } = options
    const db = openDatabase(database)
    const select = db.prepare('SELECT number, bytes FROM block WHERE number >= ? AND number < ?')
    const replace = db.prepare('INSERT INTO block VALUES (?, ?) ON CONFLICT DO UPDATE SET bytes = excluded.bytes')
    const remove = db.prepare('DELETE FROM block WHERE number >= ? AND number < ?')
    const checkpoint = db.prepare('PRAGMA wal_checkpoint(TRUNCATE)')

    const zero = (offset: number, length: number): void => {
      attempt(() => remove.run(offset / BLOCK, (offset + length) / BLOCK))
    }
    const disk: BlkDisk = {
      size,
      blockSize: BLOCK,
      serial: 'sqlite',
      read(offset, length) {
        const bytes = new Uint8Array(length)
        const rows = attempt(() => select.all(offset / BLOCK, (offset + length) / BLOCK))
        for (const row of rows) bytes.set(row['bytes'] as Uint8Array, Number(row['number']) * BLOCK - offset)
        return bytes
      },
      write(offset, bytes) {
        attempt(() => {
          db.exec('BEGIN IMMEDIATE')
          try {
            for (let at = 0; at < bytes.length; at += BLOCK)
              replace.run((offset + at) / BLOCK, bytes.subarray(at, at + BLOCK))
            db.exec('COMMIT')
          } catch (error) {
            // A full disk has rolled it back already.
            if (db.isTransaction) db.exec('ROLLBACK')
            throw error
          }
        })
      },
      flush() {
        attempt(() => {
          if (checkpoint.get()?.['busy'] !== 0) throw new DiskError('the database is busy')
        })
      },
      discard: zero,
      writeZeroes: zero,
    }
    return {
      handle: (chain) => handleBlkRequest(chain, disk),
      close: () => db.close(),
    }
  },
})

/** @throws ConfigError */
function openDatabase(path: string): DatabaseSync {
  try {
    const db = new DatabaseSync(path)
    // EXCLUSIVE: a disk has one writer, so nobody else gets at it before virtiod ends.
    db.exec(`
      PRAGMA locking_mode = EXCLUSIVE;
      PRAGMA journal_mode = WAL;
      PRAGMA synchronous = NORMAL;
      CREATE TABLE IF NOT EXISTS block
        (number INTEGER PRIMARY KEY, bytes BLOB NOT NULL CHECK (length(bytes) = ${BLOCK}));
      BEGIN EXCLUSIVE; COMMIT`)
    return db
  } catch (cause) {
    const fix = 'Give a database that this virtiod may write and nobody else has open.'
    throw new ConfigError('ERR_SQLITE_DISK', '--option database', `${path}: ${(cause as Error).message}`, fix, {
      cause,
    })
  }
}

/** SQLite's errors (the host's disk is full, say) fail the request, not the device. */
function attempt<T>(action: () => T): T {
  try {
    return action()
  } catch (error) {
    if ((error as { code?: unknown }).code !== 'ERR_SQLITE_ERROR') throw error
    throw new DiskError((error as Error).message, 'io', { cause: error })
  }
}

/**
 * The disk behind the disk fails: it is full, it refuses, it loses what it had promised, it shrinks. Each time the
 * guest gets a status and the operator a counter, and when the cause is gone so is the trouble.
 */
import { execFileSync } from 'node:child_process'
import { closeSync, mkdtempSync, openSync, rmSync, truncateSync, unlinkSync, writeFileSync, writeSync } from 'node:fs'
import { get } from 'node:http'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { BlkDriver } from '../../src/frontend/blk.ts'
import { layouts } from '../../src/frontend/memory.ts'
import { Session } from '../../src/frontend/session.ts'
import { VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_OUT } from '../../src/virtio/blk.ts'
import { findCommand } from '../setup/prerequisites.ts'
import { Daemon } from './daemon.ts'

const MIB = 2 ** 20
const NOTHING = new Uint8Array(0)
const isRoot = process.getuid?.() === 0

let directory: string
let daemon: Daemon
let session: Session
let blk: BlkDriver

beforeEach(() => {
  // A real file system, unlike /tmp perhaps.
  directory = mkdtempSync('/var/tmp/virtiod-files-')
})
afterEach(async () => {
  session?.close(true)
  await daemon?.stop('SIGKILL')
  rmSync(directory, { recursive: true, force: true })
})

const metricsPath = (): string => join(directory, 'metrics')

async function serve(image: string, engine: string, args: readonly string[] = [], prefix: readonly string[] = []) {
  daemon = new Daemon(
    join(directory, 's'),
    ['blk', '--blk-file', image, '--num-queues', '1', '--metrics', `unix:${metricsPath()}`, ...args],
    join(directory, 'log'),
    { env: { VIRTIOD_IO_URING: engine === 'io_uring' ? 'on' : 'off' }, prefix }
  )
  if (!(await daemon.listening())) throw new Error(daemon.log)
  session = Session.open(daemon.socket, { memory: layouts.single(16 * MIB) })
  blk = new BlkDriver(session.queue(0), session.memory, 4 * MIB)
}

/** virtiod_blk_errors_total of a kind. */
async function errors(kind: string): Promise<number> {
  const text = await new Promise<string>((resolve, reject) => {
    get({ socketPath: metricsPath(), path: '/metrics', agent: false }, (response) => {
      let body = ''
      response.setEncoding('utf8').on('data', (part: string) => (body += part))
      response.on('end', () => resolve(body))
    }).on('error', reject)
  })
  return Number(new RegExp(`^virtiod_blk_errors_total\\{.*kind="${kind}".*\\} (\\d+)$`, 'm').exec(text)?.[1] ?? 0)
}

const block = (length: number, value: number): Uint8Array => new Uint8Array(length).fill(value)
const write = (sector: number, length: number, value = 7): number =>
  blk.run(VIRTIO_BLK_T_OUT, sector, block(length, value), 0).status
const flush = (): number => blk.run(VIRTIO_BLK_T_FLUSH, 0, NOTHING, 0).status
const reads = (sector: number, length: number, value: number): boolean =>
  Buffer.compare(blk.read(sector, length), block(length, value)) === 0

function sparse(path: string, bytes: number): string {
  writeFileSync(path, '')
  truncateSync(path, bytes)
  return path
}

describe.each(['io_uring', 'emulated'])('on %s', (engine) => {
  test('the file system is full, and later has room again', async () => {
    const mount = join(directory, 'small')
    // A mount that only the daemon sees, in a user namespace when we are not root; it goes with the process.
    const user = isRoot ? [] : ['--user', '--map-root-user']
    const script = `mkdir "$0" && mount -t tmpfs -o size=6m none "$0" && truncate -s 16M "$0/disk" && exec "$@"`
    const prefix = [findCommand('unshare') ?? 'unshare', '--mount', ...user, 'sh', '-ec', script, mount]
    await serve(join(mount, 'disk'), engine, [], prefix)
    const inside = `/proc/${daemon.pid}/root${mount}`
    expect(write(0, 65536, 1)).toBe(VIRTIO_BLK_S_OK)
    const ballast = openSync(join(inside, 'ballast'), 'w')
    const fill = (): void => {
      // Down to the last page.
      for (const size of [65536, 4096]) {
        try {
          for (;;) writeSync(ballast, block(size, 0))
        } catch (error) {
          expect((error as NodeJS.ErrnoException).code).toBe('ENOSPC')
        }
      }
    }
    fill()
    // Large and small ones, which may take different ways; on places that have no room yet.
    for (const [i, length] of [65536, 4096, 512, 1024 * 1024, 8192].entries()) {
      expect(write(4096 + i * 2048, length), `${length} bytes`).toBe(VIRTIO_BLK_S_IOERR)
    }
    expect(await errors('no_space')).toBe(5)
    // What has its room can be written and read.
    expect(reads(0, 65536, 1)).toBe(true)
    expect(write(0, 65536, 2)).toBe(VIRTIO_BLK_S_OK)
    expect(write(8, 4096, 3)).toBe(VIRTIO_BLK_S_OK)
    expect(flush()).toBe(VIRTIO_BLK_S_OK)
    closeSync(ballast)
    unlinkSync(join(inside, 'ballast'))
    for (const [i, length] of [65536, 4096, 512, 8192].entries()) {
      expect(write(4096 + i * 2048, length, 10 + i), `${length} bytes`).toBe(VIRTIO_BLK_S_OK)
      expect(reads(4096 + i * 2048, length, 10 + i)).toBe(true)
    }
    expect(flush()).toBe(VIRTIO_BLK_S_OK)
    session.close()
    expect((await daemon.stop()).code, daemon.log).toBe(0)
  })

  test('writes fail for another reason, and later do not (RLIMIT_FSIZE)', async () => {
    await serve(sparse(join(directory, 'disk'), 4 * MIB), engine, ['--cache', 'none'])
    const limit = (soft: string): void =>
      void execFileSync('prlimit', ['--pid', String(daemon.pid), `--fsize=${soft}:unlimited`])
    expect(write(4096, 65536, 1)).toBe(VIRTIO_BLK_S_OK)
    limit(String(MIB))
    // EFBIG, and a SIGXFSZ that must not end the process.
    for (const length of [65536, 4096]) expect(write(4096, length, 2)).toBe(VIRTIO_BLK_S_IOERR)
    expect(await errors('io')).toBe(2)
    expect(reads(4096, 65536, 1)).toBe(true)
    expect(write(0, 65536, 2)).toBe(VIRTIO_BLK_S_OK)
    limit('unlimited')
    expect(write(4096, 65536, 3)).toBe(VIRTIO_BLK_S_OK)
    expect(reads(4096, 65536, 3)).toBe(true)
    session.close()
    expect((await daemon.stop()).code, daemon.log).toBe(0)
  })

  test('the file shrinks under requests, and grows again', async () => {
    const image = sparse(join(directory, 'disk'), 8 * MIB)
    await serve(image, engine, ['--cache', 'none'])
    const far = (6 * MIB) / 512
    for (let round = 0; round < 5; round++) {
      for (let i = 0; i < 32; i++) blk.submit(VIRTIO_BLK_T_OUT, i * 128, block(65536, round), 0, {}, false)
      const reading = Array.from({ length: 16 }, (_, i) => blk.submit(0, far + i * 8, NOTHING, 4096, {}, false))
      blk.publish()
      truncateSync(image, 5 * MIB)
      blk.wait()
      for (const { status } of reading) expect([VIRTIO_BLK_S_OK, VIRTIO_BLK_S_IOERR]).toContain(status)
      expect(blk.run(0, far, NOTHING, 4096).status).toBe(VIRTIO_BLK_S_IOERR)
      expect(reads(0, 65536, round)).toBe(true)
      truncateSync(image, 8 * MIB)
      expect(reads(far, 4096, 0)).toBe(true)
    }
    expect(await errors('end_of_file')).toBeGreaterThanOrEqual(5)
    session.close()
    expect((await daemon.stop()).code, daemon.log).toBe(0)
  })

  test('a flush fails: what the page cache took cannot be written', async ({ skip }) => {
    const losetup = findCommand('losetup')
    const mount = join(directory, 'small')
    let device = ''
    try {
      if (losetup === undefined || !isRoot) throw new Error('it takes root and losetup')
      execFileSync('mkdir', [mount])
      execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=4m', 'none', mount])
      sparse(join(mount, 'backing'), 16 * MIB)
      device = execFileSync(losetup, ['--find', '--show', join(mount, 'backing')], { encoding: 'utf8' }).trim()
    } catch (error) {
      process.stderr.write(`\nSKIPPED: a flush that fails: no loop device: ${String(error)}\n\n`)
      execFileSync('sh', ['-c', `umount "${mount}" 2> /dev/null; true`])
      skip('no loop device')
    }
    try {
      await serve(device, engine)
      expect(write(0, 65536, 1)).toBe(VIRTIO_BLK_S_OK)
      expect(flush()).toBe(VIRTIO_BLK_S_OK)
      for (let i = 0; i < 8; i++) expect(write(2048 + i * 2048, 1024 * 1024, 2)).toBe(VIRTIO_BLK_S_OK)
      expect(flush()).toBe(VIRTIO_BLK_S_IOERR)
      expect((await errors('io')) + (await errors('no_space'))).toBe(1)
      expect(reads(0, 65536, 1)).toBe(true)
      execFileSync('mount', ['-o', 'remount,size=32m', mount])
      expect(write(2048, 65536, 3)).toBe(VIRTIO_BLK_S_OK)
      expect(flush()).toBe(VIRTIO_BLK_S_OK)
      expect(reads(2048, 65536, 3)).toBe(true)
      session.close()
      expect((await daemon.stop()).code, daemon.log).toBe(0)
    } finally {
      await daemon?.stop('SIGKILL')
      execFileSync('sh', ['-c', `${losetup} -d ${device}; umount "${mount}"`])
    }
  })
})

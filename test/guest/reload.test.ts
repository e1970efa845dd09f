/**
 * A disk of a device module, written to by a real kernel while the module is reloaded: ten times, or as often as
 * VIRTIOD_TEST_RELOADS says, which runs it on packed rings as well.
 */
import { copyFileSync, mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { afterAll, expect, test } from 'vitest'
import { Daemon } from '../crash/daemon.ts'
import { whyNoGuest } from '../setup/prerequisites.ts'
import { diskArgs } from './backend.ts'
import { startGuest } from './guest.ts'
import { WritingGuest } from './writing.ts'

const asked = process.env['VIRTIOD_TEST_RELOADS']
const count = Number(asked ?? 10)
const SIZE = 64 * 2 ** 20
const modules = fileURLToPath(new URL('../fixtures/modules/', import.meta.url))
const directory = mkdtempSync(join(tmpdir(), 'virtiod-reload-'))
afterAll(() => rmSync(directory, { recursive: true, force: true }))

test
  .skipIf(whyNoGuest() !== undefined)
  .each([['split', ''], ...(asked === undefined ? [] : [['packed', ',packed=on']])])(
  'the guest writes on, every checksum is right: %s rings',
  { timeout: 60_000 + count * 3000 },
  async (_, options) => {
    for (const name of ['reload-disk.ts', 'reload-version.ts']) copyFileSync(join(modules, name), join(directory, name))
    const image = join(directory, 'disk.img')
    writeFileSync(image, '')
    truncateSync(image, SIZE)
    const words = ['device', join(directory, 'reload-disk.ts'), '--watch']
    const daemon = new Daemon(
      join(directory, 's'),
      [...words, '--option', `file=${image}`, '--option', `size=${SIZE}`],
      join(directory, 'log')
    )
    const lines = () => daemon.log.split('\n').slice(0, -1)
    const reloads = () => lines().filter((line) => line.includes('the module was reloaded')).length
    try {
      await daemon.listening()
      await using guest = await startGuest({
        qemuArgs: diskArgs(daemon.socket, 1, options),
        timeoutMs: 60_000 + count * 3000,
      })
      expect(await guest.sh('cat /sys/block/vda/serial')).toBe('v1 r0')
      const writing = await WritingGuest.start(guest, 1)
      for (let reload = 1; reload <= count; reload++) {
        // At another point of what the guest does.
        await sleep((reload * 37) % 200)
        writeFileSync(join(directory, 'reload-version.ts'), `export const VERSION = ${reload + 1}\n`)
        for (let tries = 0; reloads() < reload; tries++) {
          if (tries > 1000) throw new Error(`no reload ${reload}:\n${daemon.log}`)
          await sleep(10)
        }
        if (reload % 10 === 0) await writing.progress(1)
      }
      expect(await guest.sh('cat /sys/block/vda/serial')).toBe(`v${count + 1} r${count}`)
      await writing.finish()
      expect(reloads()).toBe(count)
      expect(lines().filter((line) => !line.startsWith('{"level":"info"'))).toEqual([])
    } finally {
      await daemon.stop()
    }
  }
)

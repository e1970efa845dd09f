/** A module that dies again and again, and is corrected: when it starts again, without waiting for it. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test, vi } from 'vitest'
import { KeptFiles } from '../../src/daemon/kept-files.ts'
import { moduleAddress } from '../../src/daemon/module-config.ts'
import { ModuleDevice } from '../../src/daemon/module-device.ts'
import type { DeviceHost } from '../../src/device/index.ts'
import { IothreadPool } from '../../src/engine/pool.ts'

/** Pauses begin, and end when they are cut or a test says so. */
const pauses = vi.hoisted(() => [] as { readonly ms: number; end(): void }[])
vi.mock('node:timers/promises', async (importOriginal) => ({
  ...(await importOriginal<typeof import('node:timers/promises')>()),
  setTimeout: (ms: number, _: undefined, { signal }: { signal: AbortSignal }) =>
    new Promise<void>((resolve, reject) => {
      pauses.push({ ms, end: resolve })
      signal.addEventListener('abort', () => reject(signal.reason))
    }),
}))

/** @param create its body */
const text = (create: string) => `import { defineDevice } from 'virtiod/device'
export default defineDevice({
  apiVersion: 1, name: 'mortal', virtioId: 4, queues: [{ name: 'a' }],
  create() {
    ${create}
    return { handle: () => {} }
  },
})
`
const DIES = text('setTimeout(() => process.exit(3), 20)')
const LIVES = text('')

let directory: string
let file: string
let pool: IothreadPool
const closing = new AbortController()
/** What was logged, and told to who serves the device. */
const said: string[] = []

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'virtiod-mortal-'))
  file = join(directory, 'mortal.ts')
  pool = new IothreadPool({ count: 0, pollMaxUs: 0, emulate: true })
})
afterEach(async () => {
  await pool.close()
  rmSync(directory, { recursive: true })
})

async function openDevice(): Promise<ModuleDevice> {
  const say = (_: object, message: string): void => void said.push(message.replace(file, 'FILE'))
  const log = { debug: say, info: say, warn: say, error: say }
  const host = { log, name: 'mortal0', signal: closing.signal, configChanged: () => {}, send: () => {} }
  const given = { values: {}, text: false, label: '', where: '' }
  const source = { address: moduleAddress(file, directory), given, watch: true }
  const own = { source, pool, iothreads: 1, iothreadCpus: undefined, files: new KeptFiles(), observer: false }
  const device = await ModuleDevice.open(host as unknown as DeviceHost, own)
  device.attach({ failed: (message) => say({}, message), restarted: async () => {} })
  return device
}

const paused = (count: number) => vi.waitFor(() => expect(pauses.length).toBe(count), { timeout: 20_000, interval: 10 })

test('pauses grow; a change ends one, and the next begins anew', async () => {
  writeFileSync(file, DIES)
  const device = await openDevice()
  await paused(1)
  pauses[0]!.end()
  await paused(2)
  pauses[1]!.end()
  await paused(3)
  expect(pauses.map(({ ms }) => ms)).toEqual([100, 200, 400])
  expect(device.restarting).toBe(true)

  // Nobody ends the third.
  writeFileSync(file, 'export default 3\n')
  device.changed()
  await paused(4)
  expect(pauses[3]!.ms).toBe(100)
  expect(said.at(-1)).toMatch(/^it was not started again: FILE: its default export is no device/)

  writeFileSync(file, LIVES)
  device.changed()
  await device.ready
  expect(said.at(-1)).toBe('FILE was started again')
  // What serves is what was changed last.
  expect([device.stale, device.restarting, device.instance.ended]).toEqual([false, false, false])
  expect(pauses.length).toBe(4)
  const exit = 'FILE: the module ended its thread: process.exit(3)'
  const again = 'FILE was started again'
  expect(said.slice(0, -2)).toEqual([exit, again, exit, again, exit])
  await device.close()
}, 60_000)

/** Device modules at their worst while the daemon has something else to do. */
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'
import { eventually, open } from '../vhost-user/backend.ts'
import { configure, directory, Serving } from './serving.ts'

const once = fileURLToPath(new URL('../fixtures/modules/once.ts', import.meta.url))

test('one that died and is never open again does not keep the daemon from ending', { timeout: 60_000 }, () => {
  const dir = directory()
  configure(dir, [{ name: 'once', type: 'device', module: once, 'socket-path': 'o.sock' }])
  using daemon = new Serving(dir)
  using opened = open(daemon.path('o.sock'))
  const sector = new Uint8Array(512)
  new TextEncoder().encodeInto('exit', sector)
  opened.blk.write(99, sector)
  expect(() => opened.blk.write(100, new Uint8Array(512))).toThrow(/closed/)
  expect(eventually(() => daemon.has('it waits'), 10_000)).toBe(true)
  daemon.stop()
  expect(daemon.lines.filter(({ level }) => level === 'fatal')).toEqual([])
})

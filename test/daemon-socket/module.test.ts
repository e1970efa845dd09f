/** Device modules that do as they should, on threads of their own: both styles, beside a disk of virtiod's own. */
import { statSync, truncateSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { eventually, isAlive, MIB, mustServe, type Opened, open, openFds, wellBehaved } from '../vhost-user/backend.ts'
import { configure, directory, image, Load, Serving, scrape } from './serving.ts'

const file = (path: string): string => fileURLToPath(new URL(path, import.meta.url))
const faulty = file('../fixtures/modules/faulty.ts')
/** A device in the fast style with a queue module: one of virtiod's own, as if it were a stranger's. */
const blk = file('../../devices/blk/index.ts')

let dir: string
let daemon: Serving

beforeAll(() => {
  dir = directory()
  image(dir, 'own.img')
  image(dir, 'fast.img')
  configure(
    dir,
    [
      { name: 'own', 'socket-path': 'own.sock' },
      { name: 'short', type: 'device', module: faulty, 'socket-path': 'short.sock' },
      {
        name: 'fast',
        type: 'device',
        module: blk,
        'socket-path': 'fast.sock',
        // Relative to the file, as the option's table says.
        options: { 'blk-file': 'fast.img', 'num-queues': 3 },
      },
    ],
    { iothreads: 2, metrics: `unix:${dir}/metrics.sock` }
  )
  daemon = new Serving(dir)
})

afterAll(() => daemon?.[Symbol.dispose]())

/** A load on each queue of a device. @param first block that nobody has written */
function loads(opened: Opened, first = 0): Load[] {
  return opened.drivers.map((driver, index) => new Load(driver, first + index * 256))
}

const metrics = (): Promise<string[]> => scrape(daemon.path('metrics.sock'))

test('the fast style: its queues are spread over as many threads as there are iothreads', async () => {
  using opened = open(daemon.path('fast.sock'), { queues: 3 })
  for (const load of loads(opened)) for (let i = 0; i < 20; i++) load.step()
  const lines = await metrics()
  const threads = lines.filter((line) => line.startsWith('virtiod_vring_started{device="fast"'))
  const used = threads.map((line) => /iothread="(\d+)"/.exec(line)?.[1])
  // 0 and 1 are those that devices share.
  expect(used).toEqual(['3', '4', '3'])
})

test('metrics of a module, and of its thread', async () => {
  using opened = open(daemon.path('short.sock'))
  mustServe(opened.blk, 256)
  mustServe(opened.blk, 256)
  const lines = await metrics()
  expect(lines).toContain('virtiod_faulty_writes_total{device="short"} 2')
  expect(lines).toContain('virtiod_device_blocked_seconds_total{device="short"} 0')
  expect(lines).toContainEqual(expect.stringMatching(/^virtiod_faulty_requests_total\{.*op="write"\} 2$/))
  expect(lines.some((line) => line.startsWith('virtiod_device_blocked_seconds_total{device="own"'))).toBe(false)
})

test('SIGHUP: a module looks at its file again, and its new config space is told', () => {
  using opened = open(daemon.path('fast.sock'))
  const capacity = (): number =>
    new DataView(opened.session.connection.getConfig(0, 8)!.slice().buffer).getUint32(0, true)
  const before = capacity()
  truncateSync(daemon.path('fast.img'), 32 * MIB)
  process.kill(daemon.pid, 'SIGHUP')
  expect(eventually(() => capacity() !== before)).toBe(true)
  expect(capacity()).toBe(statSync(daemon.path('fast.img')).size / 512)
})

describe('a handover to a new process', () => {
  test('goes unnoticed by the drivers of modules, as often as one likes', () => {
    using own = open(daemon.path('own.sock'), { queues: 2 })
    using short = open(daemon.path('short.sock'))
    using fast = open(daemon.path('fast.sock'), { queues: 3 })
    // Its state is the first twelve blocks.
    const all = [...loads(own), new Load(short.blk, 0, 8), ...loads(fast, 1024)]
    const before = openFds(daemon.pid).length
    for (let round = 0; round < 2; round++) {
      daemon.handOverDuring(() => {
        for (const load of all) load.step()
      })
      for (const load of all) {
        load.step()
        load.verify()
      }
    }
    expect(daemon.lines.filter(({ level }) => level === 'error')).toEqual([])
    expect(isAlive(daemon.pid)).toBe(true)
    expect(openFds(daemon.pid).length).toBeLessThanOrEqual(before + 2)
  })

  test('fails when the module can not be opened in the new process; the old one serves on', () => {
    using short = open(daemon.path('short.sock'))
    const load = new Load(short.blk, 8, 4)
    const fault = new Uint8Array(512)
    new TextEncoder().encodeInto('saveState', fault)
    short.blk.write(99, fault)
    const { pid } = daemon
    const over = daemon.handOver()
    while (!over()) load.step()
    expect(daemon.pid).toBe(pid)
    const [line] = daemon.said('the handover failed', pid)
    expect(line!['reason']).toMatch(/faulty\.ts:\d+: saveState: fault: saveState$/)
    for (let i = 0; i < 10; i++) load.step()
    load.verify()
  })
})

test('the next front-end of each is served, and the end is in time', () => {
  for (const name of ['own', 'short', 'fast']) wellBehaved(daemon.path(`${name}.sock`))
  daemon.stop()
})

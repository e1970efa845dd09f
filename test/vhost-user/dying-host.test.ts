/** A session whose rings are served by several threads, one of which dies: the others may still be at work in its memory. */
import { beforeAll, expect, test } from 'vitest'
import * as wire from '../../src/vhost-user/wire.ts'
import { memfdMappings } from './backend.ts'
import { Bench, FakeHost, openFds, REGION, until, warmUp } from './harness.ts'
import { log, table } from './request-rows.ts'

const DEATH = new Error('the thread is dead')

/** The thread of ring 0 is dead from `dies` on; that of ring 1 takes as long as the test likes. */
class DyingHost extends FakeHost {
  dead = ''

  override async stopRing(index: number, keep: boolean): Promise<number> {
    if (index > 0 || this.dead === '') return super.stopRing(index, keep)
    throw DEATH
  }

  override async pause(): Promise<void> {
    await super.pause()
    if (this.dead === 'pause') throw DEATH
  }

  override async setMemory(...args: Parameters<FakeHost['setMemory']>): Promise<void> {
    await super.setMemory(...args)
    if (this.dead === 'setMemory') throw DEATH
  }

  override async setLog(...args: Parameters<FakeHost['setLog']>): Promise<void> {
    await super.setLog(...args)
    if (this.dead === 'setLog') throw DEATH
  }
}

async function serving() {
  const host = new DyingHost()
  const bench = await Bench.open({ host })
  await bench.addMemory()
  await bench.startRing(0)
  await bench.startRing(1)
  return { host, bench }
}

beforeAll(warmUp)

test('the end of the session waits for every ring, before memory and fds go', async () => {
  const fds = openFds()
  const { host, bench } = await serving()
  const drained = Promise.withResolvers<void>()
  host.busy = drained.promise
  host.dead = 'stop'
  host.taken()
  bench.session.connection.abort()
  await until(() => host.calls.includes('stop 1'), 'the stop of the other ring')
  await new Promise((resolve) => setTimeout(resolve, 20))
  expect(host.calls).toEqual(['stop 1'])
  expect(bench.session.memory.regions.length).toBe(1)
  drained.resolve()
  expect(await bench.ended).toBe(DEATH)
  expect(bench.session.memory.regions.length).toBe(0)
  await bench[Symbol.asyncDispose]()
  expect(openFds()).toBe(fds)
})

test.each(['pause', 'setMemory', 'setLog'])('%s fails: the end of the session releases old and new', async (dead) => {
  const before = memfdMappings(process.pid)
  const { host, bench } = await serving()
  await bench.ask(wire.VHOST_USER_SET_LOG_BASE, log(4096n, 0n), [bench.memfd(4096)])
  host.dead = dead
  if (dead === 'setLog') await bench.peer.send(wire.VHOST_USER_SET_LOG_BASE, log(4096n, 0n), [bench.memfd(4096)])
  else await bench.peer.send(wire.VHOST_USER_SET_MEM_TABLE, table([REGION]), [bench.memfd(0x10_0000)])
  expect(await bench.ended).toBe(DEATH)
  expect(memfdMappings(process.pid)).toBe(before)
  await bench[Symbol.asyncDispose]()
})

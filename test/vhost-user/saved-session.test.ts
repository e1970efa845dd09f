/** A session that goes on in another process: here in another object, with fds duplicated as SCM_RIGHTS does it. */
import { closeSync, ftruncateSync } from 'node:fs'
import { setTimeout } from 'node:timers/promises'
import { beforeAll, describe, expect, test } from 'vitest'
import { native } from '../../src/native.ts'
import { type SavedSession, SavedSessionError, type SessionState } from '../../src/vhost-user/saved-session.ts'
import { Session } from '../../src/vhost-user/session.ts'
import * as wire from '../../src/vhost-user/wire.ts'
import { VHOST_F_LOG_ALL, VIRTIO_F_ACCESS_PLATFORM } from '../../src/virtio/constants.ts'
import { featureSet } from '../../src/virtio/features.ts'
import {
  Bench,
  encode,
  FakeHost,
  LOGGED,
  openFds,
  PACKED,
  PLAIN,
  REGION,
  UVA,
  u64of,
  until,
  warmUp,
} from './harness.ts'
import { update } from './iotlb-messages.ts'
import { inflight, log, single } from './request-rows.ts'

/** As it arrives: JSON, and other numbers for the same files. */
function sent(saved: SavedSession): { state: unknown; fds: number[] } {
  return { state: JSON.parse(JSON.stringify(saved.state)), fds: saved.fds.map((fd) => native.dup(fd)) }
}

/** Suspends `bench` and goes on with it elsewhere, over the same front-end's end of the socket. */
async function handOver(bench: Bench, host = new FakeHost()): Promise<Bench> {
  const { state, fds } = sent((await bench.session.suspend())!)
  const session = await Session.restore(host, state, fds)
  bench.session.abandon()
  expect(await bench.ended).toBeUndefined()
  const next = Bench.over(host, bench.peer, session)
  next.channel = bench.channel
  return next
}

beforeAll(warmUp)

describe('in the new process', () => {
  test('rings go on where they stood, with the same fds, memory and features', async () => {
    const start = openFds()
    {
      await using bench = await Bench.open({ features: LOGGED | PACKED })
      await bench.addMemory()
      await bench.addMemory(bench.memfd(0x10_0000), { ...REGION, guestAddress: 0n, userAddress: UVA + 0x100_0000n })
      const [kick, call, err] = [bench.eventfd(), bench.eventfd(), bench.eventfd()]
      await bench.prepareRing(0, 100, { flags: 1 })
      await bench.command(wire.VHOST_USER_SET_VRING_CALL, wire.u64(0n), [call])
      await bench.command(wire.VHOST_USER_SET_VRING_ERR, wire.u64(0n), [err])
      await bench.command(wire.VHOST_USER_SET_VRING_KICK, wire.u64(0n), [kick])
      await bench.command(wire.VHOST_USER_SET_VRING_ENABLE, wire.vringState(0, 1))
      await bench.command(wire.VHOST_USER_SET_STATUS, wire.u64(0xfn))
      const before = bench.host.started.get(0)!
      bench.host.base = 0x8011_0011
      bench.host.taken()
      await using next = await handOver(bench)
      // No reset, and nobody was told to let go of anything.
      expect(bench.host.taken()).toEqual(['stop 0'])
      const after = next.host.started.get(0)!
      expect(after.vring).toEqual({ ...before.vring, base: 0x8011_0011 })
      expect(after).toMatchObject({ features: before.features, enabled: true, inband: true, logAddress: 0x10_0000 })
      native.eventfdWrite(kick, 5)
      expect(native.eventfdRead(after.kickFd)).toBe(5)
      native.eventfdWrite(after.callFd, 6)
      expect(native.eventfdRead(call)).toBe(6)
      next.session.ringBroke(0)
      expect(native.eventfdRead(err)).toBe(1)
      expect(next.host.memory.map(({ gpa, size }) => [gpa, size])).toEqual([
        [0x10_0000, 0x10_0000],
        [0, 0x10_0000],
      ])
      expect(u64of((await next.ask(wire.VHOST_USER_GET_STATUS))!)).toBe(0x4fn)
      expect(await next.getBase()).toBe(0)
    }
    expect(openFds()).toBe(start)
  })

  test('the memory is the same', async () => {
    await using bench = await Bench.open()
    const fd = await bench.addMemory()
    await using next = await handOver(bench)
    new Uint8Array(next.host.memory[0]!.buffer)[77] = 99
    const seen = native.mapFile(fd, 0, 4096, 0, 4096, true)
    if (typeof seen === 'number') throw new Error(`mmap: ${seen}`)
    expect(new Uint8Array(seen.buffer)[77]).toBe(99)
    native.release(seen.address)
  })

  test('a region that was added again may be removed as often', async () => {
    await using bench = await Bench.open()
    bench.host.network = { setMtu: () => true, announce: () => {} }
    const fd = await bench.addMemory()
    await bench.addMemory(fd)
    const host = new FakeHost()
    host.network = bench.host.network
    await using next = await handOver(bench, host)
    for (const result of ['ok', 'ok', 'nack'])
      expect(await next.command(wire.VHOST_USER_REM_MEM_REG, single(REGION))).toBe(result)
  })

  test('log, log fd, in-flight buffer and translations', async () => {
    await using bench = await Bench.open({ features: PLAIN | featureSet(VHOST_F_LOG_ALL, VIRTIO_F_ACCESS_PLATFORM) })
    await bench.addMemory()
    await bench.ask(wire.VHOST_USER_SET_LOG_BASE, log(4096n, 100n), [bench.memfd(8192)])
    await bench.command(wire.VHOST_USER_SET_LOG_FD, undefined, [bench.eventfd()])
    const description = { mmapSize: 65536n, mmapOffset: 4096n, queueSize: 128 }
    const buffer = bench.memfd(131072)
    expect(await bench.command(wire.VHOST_USER_SET_INFLIGHT_FD, inflight(description), [buffer])).toBe('ok')
    await bench.ask(wire.VHOST_USER_IOTLB_MSG, update(0x5000n, 0x2000n, UVA + 0x1000n, 1))
    await bench.startRing(1, 64, { flags: 1, descriptor: 0x5000n, available: 0x5800n, used: 0x6000n })
    const before = bench.host.started.get(1)!
    new Uint8Array(before.inflight!.buffer, before.inflight!.offset)[100] = 55
    new Uint8Array(bench.host.log!.buffer)[5] = 66
    await using next = await handOver(bench)
    const after = next.host.started.get(1)!
    expect(after).toMatchObject({ logAddress: before.logAddress, vring: before.vring })
    expect(after.inflight).toMatchObject({ offset: before.inflight!.offset, size: before.inflight!.size })
    expect(new Uint8Array(after.inflight!.buffer, after.inflight!.offset)[100]).toBe(55)
    expect(new Uint8Array(next.host.log!.buffer)[5]).toBe(66)
    expect(next.host).toMatchObject({ translated: true, log: { size: 4096 } })
    expect(next.host.logFd).toBeGreaterThan(0)
    expect(next.host.memory).toMatchObject([{ gpa: 0x5000, size: 0x2000, offset: 0x1000, access: 1 }])
    ftruncateSync(buffer, 0)
    new Uint8Array(after.inflight!.buffer)[0] = 1
    expect(next.session.memoryFaulted).toBe(true)
  })

  test('the back-end channel goes on: a reply that was due, a call that waited for it', async () => {
    await using bench = await Bench.open()
    const channel = await bench.openChannel()
    await bench.addMemory()
    await bench.prepareRing()
    await bench.command(wire.VHOST_USER_VRING_KICK, wire.vringState(0, 0))
    bench.session.ringCalls(0)
    bench.session.ringCalls(0)
    expect((await channel.receive())?.request).toBe(wire.VHOST_USER_BACKEND_VRING_CALL)
    const reply = encode(wire.VHOST_USER_BACKEND_VRING_CALL, wire.u64(0n), wire.VHOST_USER_REPLY_MASK)
    await channel.write(reply.subarray(0, 7))
    await until(() => bench.session.channel.save().received.length === 14)
    await using next = await handOver(bench)
    await channel.write(reply.subarray(7))
    expect((await channel.receive())?.request).toBe(wire.VHOST_USER_BACKEND_VRING_CALL)
    expect(next.refused).toEqual([])
    next.session.configChanged()
    expect((await channel.receive())?.request).toBe(wire.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG)
  })

  test('a change of the config space that nobody could be told is told', async () => {
    await using bench = await Bench.open()
    const channel = await bench.openChannel()
    await bench.addMemory()
    bench.session.configChanged()
    await using next = await handOver(bench)
    expect(await channel.silent()).toBe(true)
    await next.startRing()
    expect((await channel.receive())?.request).toBe(wire.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG)
  })

  test.each([0, 1, 11, 12, 13, 51])(
    'a message of which %i bytes were read is served there, with its fd',
    async (count) => {
      await using bench = await Bench.open()
      const bytes = encode(wire.VHOST_USER_ADD_MEM_REG, single(REGION), wire.VHOST_USER_NEED_REPLY_MASK)
      const fd = bench.memfd(0x10_0000)
      if (count > 0) await bench.peer.write(bytes.subarray(0, count), [fd])
      await until(() => bench.session.connection.partial.bytes.length === count)
      const before = openFds()
      await using next = await handOver(bench)
      expect(openFds()).toBe(before)
      await bench.peer.write(bytes.subarray(count), count > 0 ? [] : [fd])
      expect(u64of((await bench.peer.receive())!.payload)).toBe(0n)
      expect(next.host.memory).toHaveLength(1)
    }
  )

  test('a request that comes while nobody reads is served there', async () => {
    await using bench = await Bench.open()
    const { state, fds } = sent((await bench.session.suspend())!)
    await bench.peer.send(wire.VHOST_USER_GET_QUEUE_NUM, new Uint8Array(0))
    expect(await bench.peer.silent()).toBe(true)
    const host = new FakeHost()
    const session = await Session.restore(host, state, fds)
    bench.session.abandon()
    await using _ = Bench.over(host, bench.peer, session)
    expect((await bench.peer.receive())?.request).toBe(wire.VHOST_USER_GET_QUEUE_NUM)
  })

  test('ten times in a row', async () => {
    let bench = await Bench.open()
    await bench.addMemory()
    await bench.startRing()
    const first = bench
    const before = openFds()
    for (let i = 1; i <= 10; i++) {
      bench.host.base = i
      bench = await handOver(bench)
      expect(bench.host.started.get(0)?.vring.base).toBe(i)
      expect(openFds()).toBe(before)
    }
    await bench[Symbol.asyncDispose]()
    await first[Symbol.asyncDispose]()
  })
})

describe('in the old process', () => {
  test('the request that is being served is served to its end', async () => {
    await using bench = await Bench.open()
    await bench.addMemory()
    await bench.startRing()
    const drained = Promise.withResolvers<void>()
    bench.host.busy = drained.promise
    await bench.peer.send(wire.VHOST_USER_GET_VRING_BASE, wire.vringState(0, 0))
    await until(() => bench.host.calls.includes('stop 0'))
    let saved: SavedSession | undefined
    const suspended = bench.session.suspend().then((result) => {
      saved = result
    })
    await setTimeout(20)
    expect(saved).toBeUndefined()
    drained.resolve()
    await suspended
    expect((await bench.peer.receive())?.request).toBe(wire.VHOST_USER_GET_VRING_BASE)
    expect(saved?.state.rings[0]).toMatchObject({ started: false, kicked: false })
    await bench.session.resume()
  })

  test('resume: all goes on as it was', async () => {
    await using bench = await Bench.open()
    const channel = await bench.openChannel()
    await bench.addMemory()
    await bench.startRing()
    await bench.startRing(1)
    await bench.getBase(1)
    bench.host.base = 9
    bench.host.taken()
    const saved = await bench.session.suspend()
    bench.session.ringCalls(0)
    bench.session.configChanged()
    expect(await channel.silent()).toBe(true)
    for (const fd of sent(saved!).fds) native.close(fd)
    await bench.session.resume()
    expect(bench.host.taken()).toEqual(['stop 0', 'start 0'])
    expect(bench.host.started.get(0)?.vring.base).toBe(9)
    expect(await bench.getBase()).toBe(9)
    const next = await bench.session.suspend()
    expect(next?.state.rings[0]?.base).toBe(9)
    await bench.session.resume()
    expect(await bench.command(wire.VHOST_USER_SET_OWNER)).toBe('ok')
    expect((await channel.receive())?.request).toBeDefined()
  })

  test('resume before the session could stop', async () => {
    await using bench = await Bench.open()
    await bench.addMemory()
    await bench.startRing()
    const drained = Promise.withResolvers<void>()
    bench.host.busy = drained.promise
    await bench.peer.send(wire.VHOST_USER_GET_VRING_BASE, wire.vringState(0, 0))
    await until(() => bench.host.calls.includes('stop 0'))
    const suspended = bench.session.suspend()
    await bench.session.resume()
    expect(await suspended).toBeUndefined()
    drained.resolve()
    expect((await bench.peer.receive())?.request).toBe(wire.VHOST_USER_GET_VRING_BASE)
    expect(await bench.command(wire.VHOST_USER_SET_OWNER)).toBe('ok')
  })

  test('resume while rings are still being drained for it: they are started again', async () => {
    await using bench = await Bench.open()
    await bench.addMemory()
    await bench.startRing()
    const drained = Promise.withResolvers<void>()
    bench.host.busy = drained.promise
    bench.host.taken()
    const suspended = bench.session.suspend()
    await until(() => bench.host.calls.includes('stop 0'))
    const resumed = bench.session.resume()
    drained.resolve()
    await suspended
    await resumed
    expect(bench.host.taken()).toEqual(['stop 0', 'start 0'])
    expect(await bench.command(wire.VHOST_USER_SET_OWNER)).toBe('ok')
  })

  test('a session that is ended while it is suspended stops each ring once', async () => {
    const start = openFds()
    {
      await using bench = await Bench.open()
      await bench.addMemory()
      await bench.startRing()
      const drained = Promise.withResolvers<void>()
      bench.host.busy = drained.promise
      bench.host.taken()
      const suspended = bench.session.suspend()
      await until(() => bench.host.calls.includes('stop 0'))
      bench.session.connection.abort()
      await setTimeout(10)
      drained.resolve()
      // Its fds are about to be closed, and what ended it may be a request that nobody will complete.
      expect(await suspended).toBeUndefined()
      expect(await bench.ended).toBeUndefined()
      await bench.session.resume()
      expect(bench.host.taken()).toEqual(['stop 0', 'setLog none', 'setMemory 0', 'reset'])
      expect(await bench.session.suspend()).toBeUndefined()
    }
    expect(openFds()).toBe(start)
  })

  test('a front-end that leaves while it is suspended has left after resume', async () => {
    await using bench = await Bench.open()
    await bench.session.suspend()
    bench.peer.close()
    await setTimeout(10)
    await bench.session.resume()
    expect(await bench.ended).toBeUndefined()
    expect(bench.host.calls).toContain('reset')
  })

  test('a front-end that leaves before it is suspended', async () => {
    await using bench = await Bench.open()
    bench.peer.close()
    const suspended = bench.session.suspend()
    const saved = await suspended
    if (saved !== undefined) await bench.session.resume()
    expect(await bench.ended).toBeUndefined()
  })

  test('not while the state of the device is on its way', async () => {
    await using bench = await Bench.open()
    bench.host.busy = new Promise(() => {})
    const fd = bench.memfd(0)
    await bench.ask(wire.VHOST_USER_SET_DEVICE_STATE_FD, wire.vringState(0, 0), [fd])
    await expect(bench.session.suspend()).rejects.toThrow('transferred')
    expect(await bench.command(wire.VHOST_USER_SET_OWNER)).toBe('ok')
  })

  test('not twice', async () => {
    await using bench = await Bench.open()
    await bench.session.suspend()
    await expect(bench.session.suspend()).rejects.toThrow('already')
    await bench.session.resume()
  })

  test('abandon leaves the connection open, for who has it now', async () => {
    const bench = await Bench.open()
    const { fds } = sent((await bench.session.suspend())!)
    bench.host.taken()
    bench.session.abandon()
    expect(await bench.ended).toBeUndefined()
    expect(bench.host.taken()).toEqual([])
    expect(await bench.peer.silent()).toBe(true)
    for (const fd of fds) native.close(fd)
    expect(await bench.peer.receive()).toBeUndefined()
    await bench[Symbol.asyncDispose]()
  })
})

describe('a state that is none', () => {
  async function example(): Promise<{ bench: Bench; state: SessionState; fds: number[] }> {
    const bench = await Bench.open({ features: LOGGED })
    await bench.openChannel()
    await bench.addMemory()
    await bench.startRing()
    const { state, fds } = sent((await bench.session.suspend())!)
    return { bench, state: state as SessionState, fds }
  }

  type Change = (state: SessionState, host: FakeHost) => unknown
  const changed = (state: SessionState, host: FakeHost, change: Partial<FakeHost>): SessionState => {
    Object.assign(host, change)
    return state
  }
  const rows: [string, Change][] = [
    ['nothing', () => null],
    ['text', () => 'state'],
    ['of another version', (state) => ({ ...state, version: 2 })],
    ['without rings', ({ rings: _, ...state }) => state],
    ['with a number of an fd that is not there', (state) => ({ ...state, channel: { ...state.channel, fd: 99 } })],
    ['with one fd for two things', (state) => ({ ...state, logFd: state.connection.fd })],
    ['with a region of 3 bytes', (state) => ({ ...state, regions: [{ ...state.regions[0], size: 3 }] })],
    ['with a region twice', (state) => ({ ...state, regions: [state.regions[0], state.regions[0]] })],
    [
      'with a region larger than its file',
      (state) => ({ ...state, regions: [{ ...state.regions[0], size: 2 ** 30 }] }),
    ],
    ['with features that are not offered any more', (state, host) => changed(state, host, { features: PLAIN })],
    ['with protocol features that nobody offers', (state) => ({ ...state, protocolFeatures: '40' })],
    ['with a started ring that the device has no more', (state, host) => changed(state, host, { numQueues: 0 })],
    ['with a ring larger than the device takes', (state, host) => changed(state, host, { maxQueueSize: 128 })],
    ['with a ring outside of the memory', (state) => ({ ...state, regions: [] })],
    [
      'with a ring of 100 entries',
      (state) => ({ ...state, rings: [{ ...state.rings[0], size: 100 }, ...state.rings.slice(1)] }),
    ],
    [
      'with a ring that cannot start',
      (state) => ({ ...state, rings: [{ ...state.rings[0], kicked: false }, ...state.rings.slice(1)] }),
    ],
    [
      'with half a message that begins none',
      (state) => ({ ...state, connection: { ...state.connection, received: '00'.repeat(12) } }),
    ],
  ]
  test.each(rows)('%s', async (_, change) => {
    const { bench, state, fds } = await example()
    await using _b = bench
    const before = openFds() - fds.length
    const host = new FakeHost()
    await expect(Session.restore(host, change(state, host), fds)).rejects.toThrow(SavedSessionError)
    expect(openFds()).toBe(before)
    await bench.session.resume()
    expect(await bench.command(wire.VHOST_USER_SET_OWNER)).toBe('ok')
  })

  test('a host that fails: the fds are closed all the same', async () => {
    const { bench, state, fds } = await example()
    await using _ = bench
    const before = openFds() - fds.length
    const host = new FakeHost()
    host.startError = new Error('no iothread')
    await expect(Session.restore(host, state, fds)).rejects.toThrow('no iothread')
    expect(openFds()).toBe(before)
    await bench.session.resume()
  })

  test('one that was restored and is not needed is abandoned before it ran', async () => {
    const { bench, state, fds } = await example()
    await using _ = bench
    const before = openFds() - fds.length
    const session = await Session.restore(new FakeHost(), state, fds)
    session.abandon()
    expect(openFds()).toBe(before)
    await bench.session.resume()
    expect(await bench.command(wire.VHOST_USER_SET_OWNER)).toBe('ok')
  })

  test('fds that are gone', async () => {
    const { bench, state, fds } = await example()
    await using _ = bench
    for (const fd of fds.splice(2)) closeSync(fd)
    const before = openFds() - fds.length
    await expect(Session.restore(new FakeHost(), state, fds)).rejects.toThrow(SavedSessionError)
    expect(openFds()).toBe(before)
    await bench.session.resume()
  })
})

import { setTimeout as sleep } from 'node:timers/promises'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { type NativeWatcher, native } from '../../src/native.ts'
import { EBADF, EEXIST, ENOENT, fdOf, openFds, runChild, until } from './support.ts'

const EPOLLIN = 1
const EPOLLHUP = 16
const EPOLLRDHUP = 0x2000

describe('a watcher', () => {
  let watcher: NativeWatcher
  let reports: [number, number][]
  let before: string[]
  let event: number

  beforeEach(() => {
    before = openFds()
    reports = []
    event = fdOf(native.eventfd(0), 'eventfd')
    watcher = native.createWatcher((id, events) => {
      reports.push([id, events])
    })
  })
  afterEach(() => {
    watcher.close()
    native.close(event)
    expect(openFds()).toEqual(before)
  })

  it('reports once, and again after arm', async () => {
    expect(watcher.add(event, 2 ** 31 - 1)).toBe(0)
    native.eventfdWrite(event, 1)
    await until('report', () => reports.length > 0)
    native.eventfdWrite(event, 1)
    await sleep(20)
    expect(reports).toEqual([[2 ** 31 - 1, EPOLLIN]])
    expect(watcher.arm(event, 2 ** 31 - 1)).toBe(0)
    await until('second report', () => reports.length > 1)
    native.eventfdRead(event)
    expect(watcher.arm(event, 2 ** 31 - 1)).toBe(0)
    await sleep(20)
    expect(reports).toHaveLength(2)
  })

  it('reports the end of a stream', async () => {
    const ends = new Int32Array(2)
    native.socketpair(ends)
    const [a = -1, b = -1] = ends
    expect(watcher.add(a, 1)).toBe(0)
    native.close(b)
    await until('report', () => reports.length > 0)
    expect(reports).toEqual([[1, EPOLLIN | EPOLLRDHUP | EPOLLHUP]])
    expect(watcher.remove(a)).toBe(0)
    native.close(a)
  })

  it('drops a report that was queued before remove', async () => {
    for (let i = 0; i < 200; i++) {
      expect(watcher.add(event, 1)).toBe(0)
      native.eventfdWrite(event, 1)
      // The helper thread has queued its report by the time the eventfd was seen (or not yet: both must be right).
      if (i % 2 === 0) native.pollIn(event, 1)
      expect(watcher.remove(event)).toBe(0)
      if (i % 4 === 0) {
        // Added again under the same id, with nothing to report: the old report must not pass for a new one.
        native.eventfdRead(event)
        expect(watcher.add(event, 1)).toBe(0)
        await sleep(1)
        expect(watcher.remove(event)).toBe(0)
      }
      if (i % 10 === 0) await sleep(1)
    }
    await sleep(20)
    expect(reports).toEqual([])
  })

  it('reports errors', () => {
    expect(watcher.add(99_999, 1)).toBe(-EBADF)
    expect(watcher.remove(event)).toBe(-ENOENT)
    expect(watcher.arm(event, 1)).toBe(-ENOENT)
    expect(watcher.add(event, 1)).toBe(0)
    expect(watcher.add(event, 1)).toBe(-EEXIST)
    expect(watcher.remove(event)).toBe(0)
    expect(watcher.remove(event)).toBe(-ENOENT)
    expect(() => watcher.add(event, -1)).toThrow(TypeError)
  })

  it('forgets an fd that was closed without remove', async () => {
    const other = fdOf(native.eventfd(0), 'eventfd')
    expect(watcher.add(other, 1)).toBe(0)
    native.close(other)
    const again = fdOf(native.eventfd(1), 'eventfd')
    expect(again).toBe(other)
    expect(watcher.add(again, 2)).toBe(0)
    await until('report', () => reports.length > 0)
    expect(reports).toEqual([[2, EPOLLIN]])
    expect(watcher.remove(again)).toBe(0)
    native.close(again)
  })

  it('is silent after close', async () => {
    watcher.add(event, 1)
    native.eventfdWrite(event, 1)
    native.pollIn(event, 10)
    watcher.close()
    watcher.close()
    watcher.ref()
    watcher.unref()
    await sleep(20)
    expect(reports).toEqual([])
    expect(watcher.add(event, 1)).toBe(-EBADF)
    expect(watcher.arm(event, 1)).toBe(-EBADF)
    expect(watcher.remove(event)).toBe(-EBADF)
  })

  it('may close itself in its own report', async () => {
    let count = 0
    const own = native.createWatcher(() => {
      count++
      own.close()
    })
    const second = fdOf(native.eventfd(1), 'eventfd')
    own.add(event, 1)
    own.add(second, 2)
    native.eventfdWrite(event, 1)
    await until('report', () => count > 0)
    await sleep(20)
    expect(count).toBe(1)
    native.close(second)
  })

  it('serves many fds', async () => {
    const fds = Array.from({ length: 300 }, () => fdOf(native.eventfd(1), 'eventfd'))
    fds.forEach((fd, i) => {
      expect(watcher.add(fd, i)).toBe(0)
    })
    await until('reports', () => reports.length === 300)
    expect(new Set(reports.map(([id]) => id)).size).toBe(300)
    for (const fd of fds) native.close(fd)
  })
})

describe('a watcher and the end of the process', () => {
  it('keeps it alive, or not after unref', () => {
    const run = runChild(`
      const w = native.createWatcher(() => {})
      w.unref()
      const again = native.createWatcher(() => { console.log('woken'); again.close() })
      const fd = native.eventfd(0)
      again.add(fd, 1)
      setTimeout(() => native.eventfdWrite(fd, 1), 50).unref()
      again.unref()
      again.ref()
    `)
    expect(run).toMatchObject({ status: 0, signal: null, stdout: 'woken', stderr: '' })
  })

  it('does not disturb process.exit, a throw in the report or collection', () => {
    const exits = runChild(
      `for (let i = 0; i < 10; i++) native.createWatcher(() => {}).add(native.eventfd(1), 1); setTimeout(() => process.exit(3), 20)`
    )
    expect(exits).toMatchObject({ status: 3, signal: null, stderr: '' })
    const throws = runChild(`
      process.on('uncaughtException', error => { console.log(error.message); w.close() })
      const w = native.createWatcher(() => { throw new Error('mine') })
      w.add(native.eventfd(1), 1)`)
    expect(throws).toMatchObject({ status: 0, stdout: 'mine' })
    const collected = runChild(
      `
      let seen = 0
      const fd = native.eventfd(0)
      ;(() => { const w = native.createWatcher(() => { seen++ }); w.add(fd, 1); w.unref() })()
      gc(); gc()
      native.eventfdWrite(fd, 1)
      await support.until('report', () => seen === 1)
      console.log('seen')`,
      ['--expose-gc']
    )
    expect(collected).toMatchObject({ status: 0, stdout: 'seen' })
  })
})

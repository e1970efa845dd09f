import { Worker } from 'node:worker_threads'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { Backend, type Kind, mustServe, open } from './backend.ts'

/** A thread that kicks without a pause: eventfd writes, as fast as they go, until `stop[0]` is set. */
const KICKER = `
  import { workerData } from 'node:worker_threads'
  import { native } from ${JSON.stringify(new URL('../../src/native.ts', import.meta.url).href)}
  const stop = new Int32Array(workerData.stop)
  while (Atomics.load(stop, 0) === 0) native.eventfdWrite(workerData.fd, 1)
`

// io_uring's POLL_REMOVE leaves a poll alone that has just been woken, so a ring that was stopped by it never came to rest.
describe.each<Kind>(['virtiod', 'emulated'])('a ring that is stopped while it is kicked (%s)', (kind) => {
  let backend: Backend
  beforeAll(async () => {
    backend = await Backend.start({ kind })
  })
  afterAll(async () => {
    await backend[Symbol.asyncDispose]()
  })

  it('stops each of 300 times, and goes on', async () => {
    using opened = open(backend.socket)
    const queue = opened.session.queue(0)
    const stop = new Int32Array(new SharedArrayBuffer(4))
    const kicker = new Worker(new URL(`data:text/javascript,${encodeURIComponent(KICKER)}`), {
      workerData: { stop: stop.buffer, fd: queue.kickFd },
    })
    const ended = new Promise((resolve) => kicker.on('exit', resolve))
    await new Promise((resolve) => kicker.on('online', resolve))
    try {
      for (let i = 0; i < 300; i++) {
        const base = queue.stop()
        expect(base).toBe(queue.driver.base)
        queue.start(base)
      }
    } finally {
      Atomics.store(stop, 0, 1)
      await ended
    }
    mustServe(opened.blk)
  })
})

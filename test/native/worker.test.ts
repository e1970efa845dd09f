import { readdirSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { Worker } from 'node:worker_threads'
import { describe, expect, it } from 'vitest'
import { native } from '../../src/native.ts'
import { EINVAL, fdOf, haveUring, openFds, runChild, until } from './support.ts'

interface Start {
  emulate: boolean
  event: number
  after: 'return' | 'terminate' | 'loop' | 'churn'
}

function start(data: Start): { worker: Worker; messages: unknown[]; exited: Promise<number> } {
  const worker = new Worker(new URL('./worker-ring.ts', import.meta.url), { workerData: data, execArgv: [] })
  const messages: unknown[] = []
  worker.on('message', (message) => messages.push(message))
  worker.on('error', (error) => messages.push(error))
  const exited = new Promise<number>((resolve) => worker.once('exit', resolve))
  return { worker, messages, exited }
}

const threads = () => readdirSync('/proc/self/task').length

describe.each([
  { kind: 'io_uring', emulate: false },
  { kind: 'emulation', emulate: true },
])('a worker with $kind', ({ emulate }) => {
  describe.skipIf(!emulate && !haveUring)('', () => {
    it('sleeps in enter, is woken by an eventfd and ends', async () => {
      const event = fdOf(native.eventfd(0), 'eventfd')
      const { messages, exited } = start({ emulate, event, after: 'return' })
      await until('ready', () => messages.includes('ready'))
      await sleep(30)
      expect(messages).toEqual(['ready'])
      native.eventfdWrite(event, 1)
      expect(await exited).toBe(0)
      expect(messages).toEqual(['ready', { result: 1, completions: [{ data: 7, result: 1, flags: 2 }] }])
      native.close(event)
    })

    it('is terminated while it holds an open ring and a watcher', async () => {
      await start({ emulate, event: -1, after: 'terminate' }).worker.terminate()
      const before = openFds()
      const tasks = threads()
      for (let i = 0; i < 5; i++) {
        const event = fdOf(native.eventfd(1), 'eventfd')
        const { worker, messages, exited } = start({ emulate, event, after: 'terminate' })
        await until('message', () => messages.length > 1)
        await worker.terminate()
        await exited
        native.close(event)
      }
      // The io_uring of a thread is torn down by a kernel worker, a moment after its close.
      await until('fds and threads are gone', () => openFds().length <= before.length && threads() <= tasks)
    })

    it('is terminated in the middle of whatever it does with the addon', () => {
      // In a child: it leaks fds, and when it goes wrong it takes the process along.
      const run = runChild(`
        import { Worker } from 'node:worker_threads'
        const event = native.eventfd(1)
        for (let i = 0; i < 12; i++) {
          const workerData = { emulate: ${emulate}, event, after: 'churn' }
          const worker = new Worker(new URL(${JSON.stringify(new URL('./worker-ring.ts', import.meta.url).href)}), { workerData, execArgv: [] })
          await new Promise((resolve) => worker.once('message', resolve))
          await new Promise((resolve) => setTimeout(resolve, i))
          await worker.terminate()
        }
        console.log('alive')
      `)
      expect(run).toMatchObject({ status: 0, signal: null, stdout: 'alive' })
    })

    it('is terminated in the middle of enter calls', async () => {
      const event = fdOf(native.eventfd(0), 'eventfd')
      const { worker, messages } = start({ emulate, event, after: 'loop' })
      await until('ready', () => messages.includes('ready'))
      const ended = worker.terminate()
      native.eventfdWrite(event, 1)
      await ended
      native.close(event)
    })
  })
})

describe('the calling thread', () => {
  it('has an id, a name and an affinity', () => {
    expect(native.gettid()).toBe(process.pid)
    expect(native.setThreadName('a-name-longer-than-15')).toBe(0)
    const cpus = new Int32Array([0])
    expect(native.setAffinity(new Int32Array([-1]))).toBe(-EINVAL)
    expect(native.setAffinity(new Int32Array([1_000_000]))).toBe(-EINVAL)
    expect(native.setAffinity(new Int32Array(0))).toBe(-EINVAL)
    expect(native.setAffinity(new Int32Array([8000]))).toBe(-EINVAL)
    expect(native.setAffinity(cpus)).toBe(0)
    expect(native.setAffinity(Int32Array.from({ length: 1024 }, (_, i) => i))).toBe(0)
  })
})

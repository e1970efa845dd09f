import { closeSync, ftruncateSync, openSync, readFileSync } from 'node:fs'
import { describe, expect, it } from 'vitest'
import { native } from '../../src/native.ts'
import { allocated, EAGAIN, EBADF, EINVAL, fdOf, mapped, must, runChild } from './support.ts'

const PAGE = 4096

describe('mapFile', () => {
  it('maps at a non-zero offset and exposes a part', () => {
    const fd = fdOf(native.memfd('m', 4 * PAGE, 0), 'memfd')
    const whole = new Uint8Array(mapped(fd, 0, 4 * PAGE).buffer)
    const part = must(native.mapFile(fd, 2 * PAGE, PAGE, 16, 100, true), 'mapFile')
    expect(part.buffer).toBeInstanceOf(SharedArrayBuffer)
    expect(part.buffer.byteLength).toBe(100)
    expect(part.address % PAGE).toBe(16)
    native.close(fd)
    const view = new Uint8Array(part.buffer)
    view[3] = 42
    expect(whole[2 * PAGE + 19]).toBe(42)
    whole[2 * PAGE + 16 + 99] = 43
    expect(view[99]).toBe(43)
    expect(native.faults(part.address)).toBe(0)
  })

  it('is neither dumped nor forked', () => {
    const fd = fdOf(native.memfd('advice', 4 * PAGE, 0), 'memfd')
    const { address } = mapped(fd, 0, 4 * PAGE)
    native.close(fd)
    const entry = readFileSync('/proc/self/smaps', 'utf8').split(`${address.toString(16)}-`)[1] ?? ''
    const flags = /VmFlags: (.*)/.exec(entry)?.[1] ?? ''
    expect(flags).toMatch(/\bdd\b/)
    expect(flags).toMatch(/\bdc\b/)
  })

  it('reports errors', () => {
    const fd = fdOf(native.memfd('m', PAGE, 0), 'memfd')
    expect(native.mapFile(99_999, 0, PAGE, 0, PAGE, true)).toBe(-EBADF)
    expect(native.mapFile(fd, 1, PAGE, 0, PAGE, true)).toBe(-EINVAL)
    expect(native.mapFile(fd, 0, PAGE, 0, 0, true)).toBe(-EINVAL)
    expect(native.mapFile(fd, 0, PAGE, 1, PAGE, true)).toBe(-EINVAL)
    expect(native.mapFile(fd, 0, PAGE, 2 ** 53 - 1, 2, true)).toBe(-EINVAL)
    expect(native.mapFile(fd, 0, 2 ** 53 - 1, 0, 1, true)).toBeLessThan(0)
    expect(native.mapFile(fd, 0, 0, 0, 0, true)).toBe(-EINVAL)
    expect(native.mapFile(fd, 0, 2 ** 52, 0, 1, true)).toBeLessThan(0)
    native.close(fd)
    const pipe = fdOf(native.eventfd(0), 'eventfd')
    expect(native.mapFile(pipe, 0, PAGE, 0, PAGE, true)).toBeLessThan(0)
    native.close(pipe)
    const readOnly = openSync('/proc/self/exe', 'r')
    expect(native.mapFile(readOnly, 0, PAGE, 0, PAGE, true)).toBe(-13)
    closeSync(readOnly)
  })

  it('holds more than 4 GiB', () => {
    const size = 5 * 2 ** 30
    const fd = fdOf(native.memfd('big', size, 0), 'memfd')
    const { buffer, address } = mapped(fd, 0, size)
    native.close(fd)
    const bytes = new Uint8Array(buffer)
    bytes[size - 1] = 9
    expect(bytes[size - 1]).toBe(9)
    expect(native.release(address)).toBe(0)
    expect(bytes[size - 1]).toBe(0)
  })
})

describe('allocate and release', () => {
  it('gives zeroed memory at a page address', () => {
    const { buffer, address } = allocated(10_000)
    expect(buffer.byteLength).toBe(10_000)
    expect(address % PAGE).toBe(0)
    expect(new Uint8Array(buffer).every((byte) => byte === 0)).toBe(true)
    expect(native.allocate(0)).toBe(-EINVAL)
    expect(native.allocate(2 ** 52)).toBe(-12)
  })

  it('gives the memory back at once and leaves zeroes', () => {
    const fd = fdOf(native.memfd('m', 2 * PAGE, 0), 'memfd')
    const { buffer, address } = must(native.mapFile(fd, 0, 2 * PAGE, 8, PAGE, true), 'mapFile')
    const view = new Uint8Array(buffer).fill(1)
    expect(native.release(address)).toBe(0)
    expect(view[0]).toBe(0)
    view[0] = 5
    expect(native.release(address)).toBe(0)
    expect(view[0]).toBe(0)
    expect(native.release(address - 8)).toBe(-EINVAL)
    expect(native.release(0)).toBe(-EINVAL)
    expect(native.faults(12_288)).toBe(-EINVAL)
    const again = new Uint8Array(mapped(fd, 0, PAGE).buffer)
    expect(again[8]).toBe(1)
    native.close(fd)
  })
})

describe('the SIGBUS guard', () => {
  it('replaces the whole mapping when its file shrank, and tells', () => {
    const event = fdOf(native.faultEventFd(), 'faultEventFd')
    expect(native.faultEventFd()).toBe(event)
    native.eventfdRead(event)
    const fd = fdOf(native.memfd('shrinks', 4 * PAGE, 0), 'memfd')
    const { buffer, address } = mapped(fd, 0, 4 * PAGE)
    const other = mapped(fd, 0, PAGE)
    const view = new Uint8Array(buffer).fill(7)
    ftruncateSync(fd, PAGE)
    expect(native.faults(address)).toBe(0)
    expect(view[0]).toBe(7)
    expect(view[2 * PAGE]).toBe(0)
    expect(native.faults(address)).toBe(1)
    expect(native.eventfdRead(event)).toBe(1)
    expect(native.eventfdRead(event)).toBe(-EAGAIN)
    expect(view[0]).toBe(0)
    view[3 * PAGE] = 3
    expect(view[3 * PAGE]).toBe(3)
    expect(native.faults(other.address)).toBe(0)
    ftruncateSync(fd, 0)
    new Uint8Array(other.buffer)[5] = 1
    expect(native.faults(other.address)).toBe(1)
    expect(native.eventfdRead(event)).toBe(1)
    expect(native.release(address)).toBe(0)
    native.close(fd)
  })

  it('survives many faults and Atomics', () => {
    for (let i = 0; i < 200; i++) {
      const fd = fdOf(native.memfd('shrinks', PAGE, 0), 'memfd')
      const { buffer, address } = mapped(fd, 0, PAGE)
      ftruncateSync(fd, 0)
      expect(Atomics.add(new Int32Array(buffer), 5, 1)).toBe(0)
      expect(native.faults(address)).toBe(1)
      native.close(fd)
    }
    native.eventfdRead(native.faultEventFd())
  })

  it('covers worker threads that got the buffer by message', () => {
    const run = runChild(`
      import { Worker } from 'node:worker_threads'
      import { ftruncateSync } from 'node:fs'
      const fd = native.memfd('w', 8192, 0)
      const m = support.mapped(fd, 0, 8192)
      ftruncateSync(fd, 0)
      const worker = new Worker("import { workerData, parentPort } from 'node:worker_threads'; parentPort.postMessage(new Uint8Array(workerData)[4096])", { eval: true, workerData: m.buffer })
      worker.on('message', value => console.log(value, native.faults(m.address)))
    `)
    expect(run).toMatchObject({ status: 0, stdout: '0 1' })
  })

  it('leaves every other SIGBUS deadly', () => {
    const sent = runChild(
      `support.mapped(native.memfd('w', 8192, 0), 0, 8192); process.kill(process.pid, 'SIGBUS'); setTimeout(() => {}, 5000)`
    )
    expect(sent.signal).toBe('SIGBUS')
  })
})

describe('finalizers', () => {
  it('unmap what nobody sees any more', () => {
    const run = runChild(
      `
      import { readFileSync } from 'node:fs'
      const count = () => readFileSync('/proc/self/maps', 'utf8').split('\\n').filter(line => line.includes('memfd:collect')).length
      const fd = native.memfd('collect', 1 << 20, 0)
      let addresses = []
      ;(() => { for (let i = 0; i < 300; i++) { const m = support.mapped(fd, 0, 1 << 20); addresses.push(m.address) } })()
      const before = count()
      await support.until('collection', () => { gc(); return count() === 0 })
      console.log(before >= 1, count(), native.faults(addresses[0]), native.release(addresses[299]))
    `,
      ['--expose-gc']
    )
    expect(run).toMatchObject({ status: 0, stdout: `true 0 -${EINVAL} -${EINVAL}` })
  })

  it('run when a worker holds the last view, and the table is full at 4096 mappings only', () => {
    const run = runChild(
      `
      import { Worker } from 'node:worker_threads'
      const fd = native.memfd('collect', 4096, 0)
      let all = []
      let result
      while (typeof (result = native.mapFile(fd, 0, 4096, 0, 4096, true)) !== 'number') all.push(result)
      console.log(all.length, result)
      const worker = new Worker("import { workerData, parentPort } from 'node:worker_threads'; parentPort.on('message', () => process.exit()); parentPort.postMessage(workerData.length)", { eval: true, workerData: all.map(m => m.buffer) })
      await new Promise(resolve => worker.once('message', resolve))
      const { address } = all[0]
      all = []
      gc(); gc()
      const during = native.faults(address)
      const exited = new Promise(resolve => worker.once('exit', resolve))
      worker.postMessage(0)
      await exited
      await support.until('collection', () => { gc(); return native.faults(address) === -${EINVAL} })
      console.log(during, typeof native.mapFile(fd, 0, 4096, 0, 4096, true))
    `,
      ['--expose-gc']
    )
    expect(run.stderr).toBe('')
    expect(run).toMatchObject({ status: 0, stdout: '4096 -12\n0 object' })
  })

  it('outlive the worker that made the mapping', () => {
    const run = runChild(
      `
      import { Worker } from 'node:worker_threads'
      const worker = new Worker(${JSON.stringify(`
        import { parentPort, workerData } from 'node:worker_threads'
        const { native } = await import(workerData)
        const m = native.mapFile(native.memfd('w', 4096, 0), 0, 4096, 0, 4096, true)
        new Uint8Array(m.buffer)[0] = 77
        parentPort.postMessage(m)
      `)}, { eval: true, workerData: ${JSON.stringify(new URL('../../src/native.ts', import.meta.url).href)} })
      let m = await new Promise(resolve => worker.once('message', resolve))
      await worker.terminate()
      const { address } = m
      console.log(new Uint8Array(m.buffer)[0], native.faults(address))
      m = undefined
      await support.until('collection', () => { gc(); return native.faults(address) === -${EINVAL} })
    `,
      ['--expose-gc']
    )
    expect(run).toMatchObject({ status: 0, stdout: '77 0' })
  })

  it('run at exit as well', () => {
    const run = runChild(
      `globalThis.kept = [support.allocated(4096), support.mapped(native.memfd('x', 8192, 0), 0, 8192), native.ringSetup(8, 8, false), native.ringSetup(8, 8, true)]`
    )
    expect(run).toMatchObject({ status: 0, signal: null, stderr: '' })
  })
})

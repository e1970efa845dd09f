/** The daemon under signals while a front-end works, and what it says about that work. */
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { get } from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import type { BlkRequest } from '../../src/frontend/blk.ts'
import { FrontendError } from '../../src/frontend/errors.ts'
import { layouts } from '../../src/frontend/memory.ts'
import { sleepMs } from '../../src/frontend/virtqueue.ts'
import { native } from '../../src/native.ts'
import { VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT } from '../../src/virtio/blk.ts'
import { Running } from '../cli/spawn.ts'
import { Backend, driverOf, eventually, type Kind, MIB, mustServe, open, wellBehaved } from '../vhost-user/backend.ts'
import { negotiated } from '../vhost-user/messages.ts'

const NOTHING = new Uint8Array(0)
const kinds = ['virtiod', 'emulated'] as Kind[]

/** Waits for the end; the time since `from` in milliseconds. */
async function endOf(
  backend: Backend,
  from: number
): Promise<{ code: number | null; signal: string | null; ms: number }> {
  const { code, signal } = await backend.ended
  const ms = performance.now() - from
  return { code, signal, ms }
}

describe.each(kinds)('SIGTERM, %s', (kind) => {
  test('during heavy I/O: 0 within a second, and all that was flushed is in the file', async () => {
    const backend = Backend.start({ kind, imageBytes: 64 * MIB })
    const opened = open(backend.socket, { queues: 2, memory: layouts.single(40 * MIB) })
    const drivers = [0, 1].map((queue) => driverOf(opened.session, queue, 12 * MIB))
    /** By block of 64 KiB: the generation of the last write whose flush was acknowledged. */
    const durable = new Map<number, number>()
    let generation = 0
    let terminated = 0
    let signals = 0
    const writes: { block: number; generation: number; request: BlkRequest }[] = []
    const block = (value: number): Uint8Array => new Uint8Array(65536).fill(value)
    try {
      for (let round = 0; round < 2000; round++) {
        generation = 1 + (round % 250)
        const flushes: BlkRequest[] = []
        writes.length = 0
        for (const [queue, blk] of drivers.entries()) {
          for (let i = 0; i < 24; i++) {
            const at = queue * 400 + ((round * 24 + i) % 400)
            writes.push({
              block: at,
              generation,
              request: blk.submit(VIRTIO_BLK_T_OUT, at * 128, block(generation), 0, {}, false),
            })
            durable.delete(at)
          }
          blk.publish()
        }
        if (round === 6) {
          terminated = performance.now()
          backend.process.kill('SIGTERM')
          signals++
        }
        for (const blk of drivers) blk.wait()
        for (const blk of drivers) flushes.push(blk.submit(VIRTIO_BLK_T_FLUSH, 0, NOTHING, 0))
        for (const blk of drivers) blk.wait()
        expect(flushes.every(({ status }) => status === 0)).toBe(true)
        for (const write of writes) if (write.request.status === 0) durable.set(write.block, write.generation)
      }
    } catch (error) {
      expect(error).toBeInstanceOf(FrontendError)
    }
    expect(signals).toBe(1)
    const { code, signal, ms } = await endOf(backend, terminated)
    expect([code, signal]).toEqual([0, null])
    expect(ms).toBeLessThan(1000)
    expect(existsSync(backend.socket)).toBe(false)
    const image = readFileSync(backend.image)
    expect(durable.size).toBeGreaterThan(100)
    for (const [at, value] of durable) {
      const part = image.subarray(at * 65536, (at + 1) * 65536)
      if (!part.every((byte) => byte === value)) throw new Error(`block ${at} is not of generation ${value}`)
    }
    opened.session.close(true)
    rmSync(backend.directory, { recursive: true })
  })

  test('with front-ends connected, idle, in the middle of a message and in the backlog', async () => {
    const backend = Backend.start({ kind, devices: 3 })
    const idle = open(backend.sockets[0]!)
    mustServe(idle.blk)
    const halfway = negotiated(backend.sockets[1]!)
    halfway.send(new Uint8Array([5, 0, 0, 0, 1]))
    const served = open(backend.sockets[2]!)
    const waiting = native.connectUnix(backend.sockets[2]!)
    const from = performance.now()
    backend.process.kill('SIGTERM')
    const { code, ms } = await endOf(backend, from)
    expect(code).toBe(0)
    expect(ms).toBeLessThan(1000)
    expect(backend.sockets.map((path) => existsSync(path))).toEqual([false, false, false])
    for (const { session } of [idle, served]) session.close(true)
    native.close(waiting)
    halfway.close()
    backend.discard()
  })
})

describe('signals', () => {
  test('a second SIGTERM ends it at once', async () => {
    const backend = Backend.start({ imageBytes: 64 * MIB })
    const opened = open(backend.socket, { memory: layouts.single(40 * MIB) })
    const blk = driverOf(opened.session, 0, 32 * MIB)
    for (let i = 0; i < 80; i++) blk.submit(VIRTIO_BLK_T_OUT, i * 512, new Uint8Array(262144).fill(i), 0, {}, false)
    blk.publish()
    backend.process.kill('SIGTERM')
    // One wish may be delivered twice; a second wish comes later. By then it has most likely ended by the first.
    await new Promise((resolve) => setTimeout(resolve, 350))
    backend.process.kill('SIGTERM')
    const from = performance.now()
    const { code, ms } = await endOf(backend, from)
    expect([0, 1]).toContain(code)
    expect(ms).toBeLessThan(1000)
    opened.session.close(true)
    backend.discard()
  })

  test('SIGHUP is harmless, during I/O and in numbers', async () => {
    await using backend = Backend.start()
    const opened = open(backend.socket, { queues: 2 })
    for (let i = 0; i < 50; i++) {
      backend.process.kill('SIGHUP')
      for (const [queue, blk] of opened.drivers.entries()) mustServe(blk, 64 * queue)
    }
    opened.session.close()
    backend.mustBeUnharmed()
  })

  test('SIGTERM while it starts', async () => {
    const directory = mkdtempSync(join(tmpdir(), 'virtiod-start-'))
    const socket = join(directory, 'disk.sock')
    const image = join(directory, 'disk.img')
    writeFileSync(image, Buffer.alloc(4096))
    for (const after of [20, 60, 90, 120, 150, 180, 210]) {
      await using daemon = new Running(['blk', '--socket-path', socket, '--blk-file', image])
      await new Promise((resolve) => setTimeout(resolve, after))
      daemon.process.kill('SIGTERM')
      const { code, stderr } = await daemon.ended
      // Before its handler is there the signal ends it itself.
      expect([0, null], `after ${after} ms: ${stderr}`).toContain(code)
      expect(existsSync(socket)).toBe(false)
    }
    rmSync(directory, { recursive: true })
  })
})

describe.each(kinds)('/metrics, %s', (kind) => {
  test('what the front-end did is what it counts', async () => {
    await using backend = Backend.start({ kind, extra: ['--metrics', '127.0.0.1:0'] })
    const { metrics: url } = JSON.parse(backend.log.split('\n').find((line) => line.includes('"msg":"ready"'))!) as {
      metrics: string
    }
    const before = await scrape(url)
    const opened = open(backend.socket, { queues: 2, mode: 'irq' })
    const [first, second] = opened.drivers
    const counts = { read: 0, write: 0, flush: 0, get_id: 0, bytesRead: 0, bytesWritten: 0 }
    for (let i = 0; i < 40; i++) {
      first!.write(i * 8, new Uint8Array(4096))
      first!.read(i * 8, 4096)
      counts.bytesWritten += 4096
      counts.bytesRead += 4096
      counts.write++
      counts.read++
    }
    first!.flush()
    first!.getId()
    first!.discard([{ sector: 0, sectors: 8 }])
    expect(first!.run(VIRTIO_BLK_T_IN, 2 ** 40, NOTHING, 512).status).toBe(1)
    expect(first!.run(77, 0, NOTHING, 512).status).toBe(2)
    expect(first!.run(VIRTIO_BLK_T_DISCARD, 0, new Uint8Array(5), 0).status).not.toBe(0)
    second!.write(0, new Uint8Array(65536))
    sleepMs(20)
    const during = await scrape(url)
    const since = (name: string): number => (during.get(name) ?? 0) - (before.get(name) ?? 0)
    const queue = (name: string, index = 0, label = ''): number =>
      since(`virtiod_${name}{device="blk0",queue="${index}"${label}}`)

    expect(queue('blk_requests_total', 0, ',op="write"')).toBe(40)
    expect(queue('blk_bytes_total', 0, ',op="write"')).toBe(counts.bytesWritten)
    expect(queue('blk_requests_total', 0, ',op="read"')).toBe(41)
    expect(queue('blk_bytes_total', 0, ',op="read"')).toBe(counts.bytesRead)
    expect(queue('blk_requests_total', 0, ',op="flush"')).toBe(1)
    expect(queue('blk_requests_total', 0, ',op="get_id"')).toBe(1)
    expect(queue('blk_requests_total', 0, ',op="discard"')).toBe(2)
    expect(queue('blk_requests_total', 0, ',op="other"')).toBe(1)
    expect(queue('blk_requests_total', 1, ',op="write"')).toBe(1)
    expect(queue('blk_bytes_total', 1, ',op="write"')).toBe(65536)
    expect(queue('blk_errors_total', 0, ',kind="range"')).toBe(1)
    expect(queue('blk_errors_total', 0, ',kind="unsupported"')).toBe(1)
    expect(queue('blk_request_duration_seconds_count', 0, ',op="write"')).toBe(40)
    expect(queue('vring_chains_total')).toBe(86)
    expect(queue('vring_chains_total', 1)).toBe(1)
    expect(during.get('virtiod_vring_inflight{device="blk0",queue="0"}')).toBe(0)
    // Several kicks that come before the back-end looks are one; it cannot hear more than there were.
    const { driver } = opened.session.queue(0)
    expect(queue('vring_kicks_total')).toBeGreaterThan(0)
    expect(queue('vring_kicks_total')).toBeLessThanOrEqual(driver.counters.kicks)
    opened.session.queue(0).takeCalls()
    expect(queue('vring_calls_total')).toBe(opened.session.queue(0).calls)
    expect(during.get('virtiod_session_up{device="blk0"}')).toBe(1)
    expect(during.get('virtiod_session_memory_bytes{device="blk0"}')).toBe(8 * MIB)
    expect(during.get('virtiod_session_memory_regions{device="blk0"}')).toBe(1)
    expect(since('virtiod_sessions_total{device="blk0"}')).toBe(1)
    expect(
      during.get(`virtiod_iothread_info{iothread="0",backend="${kind === 'virtiod' ? 'io_uring' : 'emulated'}"}`)
    ).toBe(1)

    // A ring that breaks, and a front-end that breaks the protocol.
    opened.session.queue(1).split.issueRaw(50_000)
    opened.session.queue(1).split.publishRaw(opened.session.queue(1).split.availableIndex)
    expect(eventually(() => opened.session.queue(1).broken())).toBe(true)
    const broken = await scrape(url)
    expect(broken.get('virtiod_vring_broken{device="blk0",queue="1"}')).toBe(1)
    expect(broken.get('virtiod_vring_breaks_total{device="blk0",queue="1"}')).toBe(1)
    opened.session.close()
    const bad = negotiated(backend.socket)
    bad.send(new Uint8Array(12).fill(255))
    expect(eventually(() => bad.channel.hungUp())).toBe(true)
    bad.close()
    wellBehaved(backend.socket)
    sleepMs(20)
    const after = await scrape(url)
    expect(after.get('virtiod_session_protocol_errors_total{device="blk0"}')).toBe(1)
    expect(after.get('virtiod_session_up{device="blk0"}')).toBe(0)
    expect(after.get('virtiod_session_memory_bytes{device="blk0"}')).toBe(0)
    // Counters do not go back when a session ends.
    for (const [name, value] of during)
      if (/^virtiod_\w+_total/.test(name)) expect(after.get(name), name).toBeGreaterThanOrEqual(value)
    expect(await text(`${url}/healthz`)).toBe('ok\n')
  })
})

/** GET without a pool: the front-end blocks this thread, and an idle connection would be cut meanwhile. */
function text(url: string): Promise<string> {
  return new Promise((resolve, reject) => {
    get(url, { agent: false }, (response) => {
      let body = ''
      response.setEncoding('utf8').on('data', (part: string) => (body += part))
      response.on('end', () => resolve(body))
    }).on('error', reject)
  })
}

/** Every sample of /metrics by name and labels. */
async function scrape(url: string): Promise<Map<string, number>> {
  const samples = (await text(`${url}/metrics`)).split('\n').filter((line) => line !== '' && !line.startsWith('#'))
  return new Map(
    samples.map((line) => [line.slice(0, line.lastIndexOf(' ')), Number(line.slice(line.lastIndexOf(' ') + 1))])
  )
}

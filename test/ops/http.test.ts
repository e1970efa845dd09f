/** The operations server over real sockets. */
import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { type ClientRequest, get, request } from 'node:http'
import { connect, createServer, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, describe, expect, test } from 'vitest'
import { ConfigError } from '../../src/device/errors.ts'
import { native } from '../../src/native.ts'
import {
  HEALTH_TIMEOUT_MS,
  type MetricsAddress,
  type OperationsHandlers,
  type OperationsServer,
  startOperationsServer,
} from '../../src/ops/http.ts'

const LOOPBACK: MetricsAddress = { host: '127.0.0.1', port: 0 }
const dir = mkdtempSync(join(tmpdir(), 'virtiod-http-'))
const open: { close(): unknown }[] = []

afterEach(async () => {
  for (const server of open.splice(0)) await server.close()
})
process.on('exit', () => rmSync(dir, { recursive: true, force: true }))

async function start(handlers: Partial<OperationsHandlers> = {}, address = LOOPBACK): Promise<OperationsServer> {
  const server = await startOperationsServer(address, {
    metrics: async () => 'metric 1\n',
    health: async () => undefined,
    ...handlers,
  })
  open.push(server)
  return server
}

async function fetchText(url: string, init?: RequestInit): Promise<[number, string]> {
  const response = await fetch(url, init)
  return [response.status, await response.text()]
}

describe('answers', () => {
  test('/metrics, in the Prometheus text format', async () => {
    const { url } = await start()
    const response = await fetch(`${url}/metrics?x=1`)
    expect(response.status).toBe(200)
    expect(response.headers.get('content-type')).toBe('text/plain; version=0.0.4; charset=utf-8')
    expect(await response.text()).toBe('metric 1\n')
  })

  test('/healthz: ok, what is wrong, or that no answer came', async () => {
    expect(await fetchText(`${(await start()).url}/healthz`)).toEqual([200, 'ok\n'])
    const sick = await start({ health: async () => 'iothread 1 died' })
    expect(await fetchText(`${sick.url}/healthz`)).toEqual([503, 'iothread 1 died\n'])
    const hung = await start({ health: () => new Promise(() => {}) })
    const before = performance.now()
    expect(await fetchText(`${hung.url}/healthz`)).toEqual([503, 'no answer within 1000 ms\n'])
    expect(performance.now() - before).toBeLessThan(HEALTH_TIMEOUT_MS + 1000)
  })

  test('what is not there, and what is not allowed', async () => {
    const { url } = await start()
    expect(await fetchText(`${url}/`)).toEqual([404, 'not found: there are /metrics and /healthz\n'])
    expect((await fetchText(`${url}/metrics/x`))[0]).toBe(404)
    const response = await fetch(`${url}/metrics`, { method: 'POST', body: 'x' })
    expect([response.status, response.headers.get('allow')]).toEqual([405, 'GET, HEAD'])
    expect(await fetchText(`${url}/healthz`, { method: 'HEAD' })).toEqual([200, ''])
  })

  test('a failing handler is a 500, and the server lives on', async () => {
    const { url } = await start({ metrics: () => Promise.reject(new Error('no counters')) })
    expect(await fetchText(`${url}/metrics`)).toEqual([500, 'no counters\n'])
    expect((await fetchText(`${url}/healthz`))[0]).toBe(200)
  })

  test('garbage instead of HTTP does no harm', async () => {
    const { url } = await start()
    const socket = connect(Number(new URL(url).port), '127.0.0.1')
    socket.end('\0\0garbage\r\n\r\n')
    await new Promise((resolve) => socket.once('close', resolve).resume())
    expect((await fetchText(`${url}/healthz`))[0]).toBe(200)
  })
})

describe('addresses', () => {
  test('IPv6', async () => {
    const { url } = await start({}, { host: '::1', port: 0 })
    expect(url).toMatch(/^http:\/\/\[::1\]:\d+$/)
    expect((await fetchText(`${url}/healthz`))[0]).toBe(200)
  })

  test('a unix socket, removed at the end', async () => {
    const path = join(dir, 'm.sock')
    const server = await start({}, { path })
    expect(server.url).toBe(`unix:${path}`)
    expect(await getUnix(path)).toBe('metric 1\n')
    await server.close()
    expect(existsSync(path)).toBe(false)
  })

  test('a unix socket that a killed process left is replaced, a live one and a file are not', async () => {
    const path = join(dir, 'stale.sock')
    const listener = createServer().listen(path)
    await new Promise((resolve) => listener.once('listening', resolve))
    const refused = { code: 'ERR_METRICS_LISTEN', message: expect.stringContaining(`--metrics: ${path} is in use`) }
    await expect(start({}, { path })).rejects.toMatchObject(refused)
    // A hard link keeps the name alive when the listener removes its own.
    const { linkSync } = await import('node:fs')
    linkSync(path, `${path}.left`)
    listener.close()
    await start({}, { path: `${path}.left` })
    expect(await getUnix(`${path}.left`)).toBe('metric 1\n')
    const file = join(dir, 'file')
    writeFileSync(file, 'x')
    await expect(start({}, { path: file })).rejects.toMatchObject({ code: 'ERR_METRICS_LISTEN' })
    expect(existsSync(file)).toBe(true)
  })

  test("a taken port is the operator's to solve", async () => {
    const { url } = await start()
    const port = Number(new URL(url).port)
    const error = await startOperationsServer(
      { host: '127.0.0.1', port },
      { metrics: async () => '', health: async () => undefined }
    ).catch((e: unknown) => e)
    expect(error).toBeInstanceOf(ConfigError)
    expect((error as ConfigError).message).toBe(
      `--metrics: 127.0.0.1:${port} is in use by another process. Give another port, or port 0 for any free one.`
    )
    await expect(start({}, { host: '192.0.2.1', port: 1 })).rejects.toThrow(
      '--metrics: cannot listen on 192.0.2.1:1 (EADDRNOTAVAIL). Give an address of this machine'
    )
  })
})

describe('close', () => {
  test('ends connections that are idle, half-sent or waiting, and is idempotent', async () => {
    const server = await start({ metrics: () => new Promise(() => {}) })
    const port = Number(new URL(server.url).port)
    const idle = connect(port, '127.0.0.1')
    const half = connect(port, '127.0.0.1')
    half.write('GET /metrics HT')
    const waiting = request({ port, host: '127.0.0.1', path: '/metrics' }).end()
    const ended = Promise.all([closed(idle), closed(half), failed(waiting)])
    await new Promise((resolve) => setTimeout(resolve, 50))
    const before = performance.now()
    await Promise.all([server.close(), ended])
    await server.close()
    expect(performance.now() - before).toBeLessThan(1000)
  })
})

function closed(socket: Socket): Promise<unknown> {
  socket.on('error', () => {})
  return new Promise((resolve) => socket.once('close', resolve).resume())
}

function failed(pending: ClientRequest): Promise<unknown> {
  return new Promise((resolve) => pending.once('error', resolve))
}

function getUnix(socketPath: string): Promise<string> {
  return new Promise((resolve, reject) => {
    get({ socketPath, path: '/metrics' }, async (response) => {
      let text = ''
      for await (const chunk of response) text += chunk
      resolve(text)
    }).on('error', reject)
  })
}

describe('a server of another process', () => {
  const duplicate = (server: OperationsServer): number => native.dup(server.fd!)

  test.each([
    ['TCP', LOOPBACK],
    ['a unix socket', { path: join(dir, 'handed-over') }],
  ])('goes on with its listening socket: %s', async (_, address) => {
    const old = await start({ metrics: async () => 'old 1\n' }, address)
    const where = new URL(old.url.startsWith('http') ? old.url : 'http://localhost')
    const scrape = () =>
      new Promise<string>((resolve, reject) => {
        const options =
          'path' in address ? { socketPath: address.path, path: '/metrics' } : { port: where.port, path: '/metrics' }
        get({ host: '127.0.0.1', ...options, agent: false }, (response) => {
          let text = ''
          response.on('data', (data: Buffer) => (text += data)).on('end', () => resolve(text))
        }).on('error', reject)
      })
    expect(await scrape()).toBe('old 1\n')
    const handlers = { metrics: async () => 'new 1\n', health: async () => undefined }
    const inherited = duplicate(old)
    const successor = await startOperationsServer(address, handlers, '--metrics', inherited)
    expect(successor.url).toBe(old.url)
    old.abandon()
    // The old one's process ends now; here it still accepts on a unix socket.
    const answers = new Set(await Promise.all(Array.from({ length: 20 }, scrape)))
    expect(answers.has('new 1\n')).toBe(true)
    if (!('path' in address)) expect([...answers]).toEqual(['new 1\n'])
    await successor.close()
    if ('path' in address) expect(existsSync(address.path)).toBe(false)
  })
})

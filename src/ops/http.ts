/**
 * The operations server: GET /metrics and /healthz over HTTP, on loopback or a unix socket. It must not know the
 * daemon: what to answer comes from two callbacks.
 */
import { lstatSync, rmSync, unlinkSync } from 'node:fs'
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http'
import { type AddressInfo, connect } from 'node:net'
import { ConfigError } from '../device/errors.ts'

/** Where it listens. Port 0 = any free port. */
export type MetricsAddress = { readonly host: string; readonly port: number } | { readonly path: string }

export interface OperationsHandlers {
  /** The text of /metrics. */
  metrics(): Promise<string>
  /**
   * Resolves with undefined when all is well, else with what is wrong; the server waits at most {@link
   * HEALTH_TIMEOUT_MS} for it.
   */
  health(): Promise<string | undefined>
}

export interface OperationsServer {
  /** Where it listens in fact, for a human: `http://127.0.0.1:9400` or `unix:/run/virtiod.sock`. */
  readonly url: string
  /** The listening socket, for a process that takes over; undefined when there is none to pass. */
  readonly fd: number | undefined
  /** Stops listening and ends every connection, idle or not. Idempotent. */
  close(): Promise<void>
  /** Ends every connection, and leaves the listening socket to another process that has it. This one has to end after it. */
  abandon(): void
}

/** The content type of the Prometheus text format. */
const METRICS_TYPE = 'text/plain; version=0.0.4; charset=utf-8'
/** A daemon that doesn't answer within this time is unhealthy, in milliseconds. */
export const HEALTH_TIMEOUT_MS = 1000

/**
 * Starts to listen.
 * @param option how the operator named the address, for errors: `--metrics`
 * @param inherited a socket that listens on the address already: ours now
 * @throws ConfigError ERR_METRICS_LISTEN when the address can't be had
 */
export async function startOperationsServer(
  address: MetricsAddress,
  handlers: OperationsHandlers,
  option = '--metrics',
  inherited?: number
): Promise<OperationsServer> {
  const server = createServer((request, response) => {
    void answer(request, response, handlers)
  })
  // Scrapers come every few seconds at most: holding their connections longer than that has no use.
  server.keepAliveTimeout = 5000
  server.headersTimeout = 5000
  server.requestTimeout = 10_000
  server.maxConnections = 64
  try {
    if (inherited === undefined) await listenReplacingStale(server, address)
    else await listen(server, { fd: inherited })
  } catch (error) {
    throw listenError(error as NodeJS.ErrnoException, address, option)
  }
  // A connection that breaks is the client's affair; an unlistened 'error' event would end the daemon.
  server.on('error', () => {})
  return {
    url: urlOf(server, address),
    fd: handleOf(server),
    close: () =>
      new Promise((resolve) => {
        server.close(() => {
          // libuv removes the file only of a socket that it bound.
          if (inherited !== undefined && 'path' in address) rmSync(address.path, { force: true })
          resolve()
        })
        server.closeAllConnections()
      }),
    abandon: () => {
      server.closeAllConnections()
      // Closing a unix socket would remove its file.
      if (!('path' in address)) server.close()
    },
  }
}

/** Node tells the fd of a listening socket in no documented way. */
function handleOf(server: Server): number | undefined {
  const { fd = -1 } = (server as unknown as { _handle?: { fd?: number } })._handle ?? {}
  return fd >= 0 ? fd : undefined
}

function listen(server: Server, address: MetricsAddress | { readonly fd: number }): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once('error', reject)
    server.listen({ ...address }, () => {
      server.off('error', reject)
      resolve()
    })
  })
}

/**
 * A socket that nobody answers on was left by a process that was killed. Connecting to a plain file is refused as
 * well: look first.
 */
async function listenReplacingStale(server: Server, address: MetricsAddress): Promise<void> {
  try {
    await listen(server, address)
  } catch (error) {
    const inUse = (error as NodeJS.ErrnoException).code === 'EADDRINUSE'
    if (!inUse || !('path' in address) || !(await isStaleSocket(address.path))) throw error
    unlinkSync(address.path)
    await listen(server, address)
  }
}

function isStaleSocket(path: string): Promise<boolean> {
  if (!lstatSync(path).isSocket()) return Promise.resolve(false)
  return new Promise((resolve) => {
    const socket = connect({ path })
    const end = (refused: boolean): void => {
      socket.destroy()
      resolve(refused)
    }
    socket.once('connect', () => end(false))
    socket.once('error', (error: NodeJS.ErrnoException) => end(error.code === 'ECONNREFUSED'))
  })
}

function listenError(error: NodeJS.ErrnoException, address: MetricsAddress, option: string): ConfigError {
  const where = 'path' in address ? address.path : `${address.host}:${address.port}`
  const inUse = error.code === 'EADDRINUSE'
  const problem = inUse ? `${where} is in use by another process` : `cannot listen on ${where} (${error.code ?? error})`
  const fix =
    'path' in address
      ? inUse
        ? 'Give another path, or remove the socket if nobody serves it any more.'
        : 'Give a path in a directory that exists and that you may write to.'
      : inUse
        ? 'Give another port, or port 0 for any free one.'
        : 'Give an address of this machine and a port that you may bind.'
  return new ConfigError('ERR_METRICS_LISTEN', option, problem, fix, { cause: error })
}

function urlOf(server: Server, address: MetricsAddress): string {
  if ('path' in address) return `unix:${address.path}`
  const bound = server.address() as AddressInfo
  return `http://${bound.family === 'IPv6' ? `[${bound.address}]` : bound.address}:${bound.port}`
}

async function answer(request: IncomingMessage, response: ServerResponse, handlers: OperationsHandlers): Promise<void> {
  const path = (request.url ?? '/').split('?', 1)[0]
  if (path !== '/metrics' && path !== '/healthz') {
    return send(response, request, 404, 'not found: there are /metrics and /healthz\n')
  }
  if (request.method !== 'GET' && request.method !== 'HEAD') {
    response.setHeader('allow', 'GET, HEAD')
    return send(response, request, 405, 'method not allowed\n')
  }
  try {
    if (path === '/metrics') {
      const text = await handlers.metrics()
      response.setHeader('content-type', METRICS_TYPE)
      return send(response, request, 200, text)
    }
    const problem = await withTimeout(handlers.health(), HEALTH_TIMEOUT_MS)
    send(response, request, problem === undefined ? 200 : 503, `${problem ?? 'ok'}\n`)
  } catch (error) {
    send(response, request, 500, `${(error as Error).message}\n`)
  }
}

function send(response: ServerResponse, request: IncomingMessage, status: number, body: string): void {
  response.statusCode = status
  if (!response.hasHeader('content-type')) response.setHeader('content-type', 'text/plain; charset=utf-8')
  response.setHeader('content-length', Buffer.byteLength(body))
  response.end(request.method === 'HEAD' ? undefined : body)
}

async function withTimeout(health: Promise<string | undefined>, milliseconds: number): Promise<string | undefined> {
  let timer: NodeJS.Timeout | undefined
  const late = new Promise<string>((resolve) => {
    timer = setTimeout(() => resolve(`no answer within ${milliseconds} ms`), milliseconds)
  })
  try {
    return await Promise.race([health, late])
  } finally {
    clearTimeout(timer)
  }
}

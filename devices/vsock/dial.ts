/** Connects to a host program that listens on a unix socket. */
import { createConnection, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'

const RETRY_MS = 10
/** A driver gives up after 2 s (Linux: VSOCK_DEFAULT_CONNECT_TIMEOUT). */
const PATIENCE_MS = 2000

/** Undefined: nobody listens there, or not in time. Never rejects. */
export async function dial(path: string, signal: AbortSignal): Promise<Socket | undefined> {
  for (const end = performance.now() + PATIENCE_MS; !signal.aborted; ) {
    const result = await tryOnce(path)
    if (typeof result !== 'string') return result
    // The backlog of a program that accepts slowly is full: a connect(2) that may block would wait.
    if (result !== 'EAGAIN' || performance.now() > end) return undefined
    await sleep(RETRY_MS)
  }
  return undefined
}

/** The connection, or the code of the error. */
function tryOnce(path: string): Promise<Socket | string> {
  return new Promise((resolve) => {
    const socket = createConnection({ path, allowHalfOpen: true })
    const failed = (error: NodeJS.ErrnoException): void => resolve(error.code ?? 'EIO')
    socket.once('error', failed)
    socket.once('connect', () => {
      socket.off('error', failed)
      resolve(socket)
    })
  })
}

/**
 * The unix socket on which host programs reach the guest, in the words of Firecracker: the program says "CONNECT 1234\n" and gets
 * "OK 1073741824\n", the port that the guest sees it at, when something in the guest accepts on its port 1234. The
 * connection is closed when nothing does.
 */
import { randomBytes } from 'node:crypto'
import { lstatSync, renameSync, rmSync } from 'node:fs'
import { createConnection, createServer, type Server, type Socket } from 'node:net'
import { ConfigError } from '../../src/device/index.ts'

/** sun_path without its final NUL. */
const MAX_PATH = 107
/** "_4294967295" behind it, for host programs that the guest connects to; also room for a name while it is bound. */
const MAX_SUFFIX = 11

/** "CONNECT 4294967295\r\n", and some blanks. */
const MAX_LINE = 32
/** For somebody who types it. */
const LINE_PATIENCE_MS = 60_000

/** A host program asks for a port of the guest. @param early what it sent behind its line */
export type OnRequest = (socket: Socket, port: number, early: Uint8Array) => void

export class HostListener {
  readonly path: string
  readonly #server: Server
  readonly #pending = new Set<Socket>()
  readonly #onRequest: OnRequest
  readonly #mayWait: (pending: number) => boolean
  /** Of the file that was bound, -1 = the predecessor's. */
  #inode = -1

  /** @param mayWait whether one more may be listened to, beside those that have not said their line */
  constructor(path: string, onRequest: OnRequest, mayWait: (pending: number) => boolean) {
    this.path = path
    this.#onRequest = onRequest
    this.#mayWait = mayWait
    this.#server = createServer({ allowHalfOpen: true }, (socket) => this.#accept(socket))
    // Out of fds: who is in the backlog waits there.
    this.#server.on('error', () => {})
  }

  /** Binds the socket; one that nobody listens on any more is replaced. @throws ConfigError */
  async bind(): Promise<void> {
    const { path } = this
    if (Buffer.byteLength(path) > MAX_PATH - MAX_SUFFIX) {
      const problem = `${path} has ${Buffer.byteLength(path)} bytes`
      const fix = `Give a path of at most ${MAX_PATH - MAX_SUFFIX} bytes: the guest's ports are put behind it.`
      throw new ConfigError('ERR_VSOCK_UDS_PATH', '--uds-path', problem, fix)
    }
    const file = lstatSync(path, { throwIfNoEntry: false })
    if (file !== undefined && !file.isSocket()) {
      const fix = 'Give a path where there is nothing, or a socket that nobody listens on.'
      throw new ConfigError('ERR_VSOCK_UDS_PATH', '--uds-path', `${path} exists and is no socket`, fix)
    }
    if (file !== undefined && (await someoneListens(path))) {
      const fix = 'Stop that process, or give another path.'
      throw new ConfigError('ERR_VSOCK_UDS_IN_USE', '--uds-path', `another process listens on ${path}`, fix)
    }
    // Under another name first: it takes the place of a stale one in one step, and libuv, which removes the name that it bound when
    // it closes the socket, leaves this one alone. After a handover it is another process's.
    const name = `${path}.${randomBytes(3).toString('hex')}`
    try {
      await this.#listen({ path: name })
      renameSync(name, path)
    } catch (cause) {
      await this.close()
      // Without its code: libuv calls a directory that does not exist EACCES.
      const fix = 'Give a path in a directory that exists and that you may write to.'
      throw new ConfigError('ERR_VSOCK_UDS_PATH', '--uds-path', `cannot listen on ${path}`, fix, { cause })
    }
    this.#inode = lstatSync(path).ino
  }

  /** Listens on the predecessor's socket. @param fd ours now */
  async adopt(fd: number): Promise<void> {
    await this.#listen({ fd })
    this.#inode = lstatSync(this.path, { throwIfNoEntry: false })?.ino ?? -1
  }

  /** The listening socket, for a successor. Node has no public name for it. */
  get fd(): number {
    return (this.#server as unknown as { readonly _handle: { readonly fd: number } })._handle.fd
  }

  async close(): Promise<void> {
    for (const socket of this.#pending) socket.destroy()
    const closed = new Promise((resolve) => this.#server.close(resolve))
    // Unless somebody removed it before us, and perhaps listens there now.
    if (this.#inode >= 0 && lstatSync(this.path, { throwIfNoEntry: false })?.ino === this.#inode) rmSync(this.path)
    await closed
  }

  async #listen(where: { readonly path: string } | { readonly fd: number }): Promise<void> {
    await new Promise<void>((resolve, reject) => {
      this.#server.once('error', reject)
      this.#server.listen(where, () => {
        this.#server.off('error', reject)
        resolve()
      })
    })
  }

  #accept(socket: Socket): void {
    socket.on('error', () => {})
    if (!this.#mayWait(this.#pending.size)) {
      socket.destroy()
      return
    }
    this.#pending.add(socket)
    let text = Buffer.alloc(0)
    const end = (): void => {
      this.#pending.delete(socket)
      socket.setTimeout(0)
      socket.off('readable', readable).off('end', refuse).off('timeout', refuse).off('close', end)
    }
    const refuse = (): void => {
      end()
      socket.destroy()
    }
    const readable = (): void => {
      const chunk = socket.read() as Buffer | null
      if (chunk === null) return
      text = Buffer.concat([text, chunk])
      const length = text.subarray(0, MAX_LINE).indexOf('\n')
      if (length < 0) {
        if (text.length >= MAX_LINE) refuse()
        return
      }
      const port = portOf(text.toString('latin1', 0, length))
      if (port === undefined) return refuse()
      end()
      this.#onRequest(socket, port, text.subarray(length + 1))
    }
    socket.setTimeout(LINE_PATIENCE_MS)
    socket.on('readable', readable).on('end', refuse).on('timeout', refuse).on('close', end)
  }
}

/** The port of a CONNECT line. The last one stands for "any" (VMADDR_PORT_ANY). */
function portOf(line: string): number | undefined {
  const port = Number(/^connect +(\d{1,10})\s*$/i.exec(line)?.[1] ?? -1)
  return port >= 0 && port < 0xffff_ffff ? port : undefined
}

function someoneListens(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = createConnection({ path })
    socket.once('connect', () => {
      socket.destroy()
      resolve(true)
    })
    // A full backlog (EAGAIN) has somebody behind it, and so has one that this user may not use.
    socket.once('error', (error: NodeJS.ErrnoException) =>
      resolve(error.code !== 'ECONNREFUSED' && error.code !== 'ENOENT')
    )
  })
}

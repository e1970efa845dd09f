/** A listening socket: binds, takes over a stale path, hands out connections one at a time. */
import { lstatSync, unlinkSync } from 'node:fs'
import { setTimeout } from 'node:timers/promises'
import { native, systemError } from '../native.ts'
import { Connection } from './connection.ts'
import { Readiness } from './readiness.ts'

const EAGAIN = -11
const EADDRINUSE = -98
const ECONNREFUSED = -111
const ECONNABORTED = -103

/** ENOMEM, ENFILE, EMFILE, ENOBUFS. */
const OUT_OF_RESOURCES = new Set([-12, -23, -24, -105])
const RETRY_MS = 200

/** The owner and the group of the socket may connect. */
const SOCKET_MODE = 0o660

export class Listener implements Disposable {
  readonly #fd: number
  readonly #path: string | undefined
  /** The socket file that `bind` made. */
  readonly #inode: number | undefined
  readonly #readiness: Readiness
  #closed = false

  private constructor(fd: number, path: string | undefined) {
    this.#fd = fd
    this.#path = path
    this.#inode = path === undefined ? undefined : inode(path)
    this.#readiness = new Readiness(fd)
  }

  /**
   * Binds `path`. A socket that nobody listens on any more is replaced.
   * @throws a system error; EADDRINUSE when a live process listens there or the path is no socket
   */
  static bind(path: string): Listener {
    let fd = native.listenUnix(path, SOCKET_MODE)
    if (fd === EADDRINUSE && isStale(path)) {
      unlinkSync(path)
      fd = native.listenUnix(path, SOCKET_MODE)
    }
    if (fd < 0) throw systemError(fd, 'bind', `cannot listen on ${path}`)
    return new Listener(fd, path)
  }

  /** Takes over a listening socket that was handed down. */
  static adopt(fd: number): Listener {
    native.setNonblock(fd, true)
    return new Listener(fd, undefined)
  }

  /** The next connection; undefined when the listener was closed. Until it is asked, front-ends wait in the backlog. */
  async accept(): Promise<Connection | undefined> {
    while (!this.#closed) {
      const fd = native.accept(this.#fd)
      if (fd >= 0) return new Connection(fd)
      // Out of fds or memory: the front-end stays in the backlog until others have left.
      if (OUT_OF_RESOURCES.has(fd)) await setTimeout(RETRY_MS)
      else if (fd === EAGAIN || fd === ECONNABORTED) await this.#readiness.wait()
      else throw systemError(fd, 'accept', 'cannot accept a front-end')
    }
    return undefined
  }

  /** Stops listening and removes the socket file that `bind` made. */
  [Symbol.dispose](): void {
    if (this.#closed) return
    this.#closed = true
    this.#readiness.dispose()
    native.close(this.#fd)
    // Unless somebody removed it before us, and perhaps listens there now.
    if (this.#path !== undefined && inode(this.#path) === this.#inode) unlinkSync(this.#path)
  }
}

/**
 * A connection that was handed down as an fd, or undefined when the fd is a listening socket. @throws a system error
 * when it is no unix socket
 */
export function connectedSocket(fd: number): Connection | undefined {
  const kind = native.socketKind(fd)
  if (kind < 0) throw systemError(kind, 'getsockopt', `fd ${fd} is no unix stream socket`)
  return kind === 1 ? undefined : new Connection(fd)
}

function inode(path: string): number | undefined {
  return lstatSync(path, { throwIfNoEntry: false })?.ino
}

/** A socket that nobody listens on. Connecting to a regular file is refused as well, and that must never be removed. */
function isStale(path: string): boolean {
  if (!lstatSync(path, { throwIfNoEntry: false })?.isSocket()) return false
  const fd = native.connectUnix(path)
  if (fd >= 0) native.close(fd)
  return fd === ECONNREFUSED
}

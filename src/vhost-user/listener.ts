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

/** The socket file that `bind` made: who closes the listener removes it. */
export interface SocketFile {
  readonly path: string
  readonly inode: number
}

export class Listener implements Disposable {
  /** Borrowed by a handover. */
  readonly fd: number
  /** Undefined: the socket was handed down, and its file is not ours. */
  readonly file: SocketFile | undefined
  readonly #readiness: Readiness
  #closed = false
  #held: PromiseWithResolvers<void> | undefined

  private constructor(fd: number, file: SocketFile | undefined) {
    this.fd = fd
    this.file = file
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
    return new Listener(fd, { path, inode: inode(path) ?? -1 })
  }

  /**
   * Takes over a listening socket that was handed down. @param file that of a process before this one, ours to remove
   * now
   */
  static adopt(fd: number, file?: SocketFile): Listener {
    native.setNonblock(fd, true)
    return new Listener(ownFd(fd), file)
  }

  /** The next connection; undefined when the listener was closed. Until it is asked, front-ends wait in the backlog. */
  async accept(): Promise<Connection | undefined> {
    while (!this.#closed) {
      if (this.#held !== undefined) {
        await this.#held.promise
        continue
      }
      const fd = native.accept(this.fd)
      if (fd >= 0) return new Connection(fd)
      // Out of fds or memory: the front-end stays in the backlog until others have left.
      if (OUT_OF_RESOURCES.has(fd)) await setTimeout(RETRY_MS)
      else if (fd === EAGAIN || fd === ECONNABORTED) await this.#readiness.wait()
      else throw systemError(fd, 'accept', 'cannot accept a front-end')
    }
    return undefined
  }

  /** Front-ends wait in the backlog until `resume`. */
  hold(): void {
    this.#held ??= Promise.withResolvers()
  }

  resume(): void {
    this.#held?.resolve()
    this.#held = undefined
  }

  /** Lets go of the socket without removing its file: another process listens on it. */
  abandon(): void {
    if (this.#closed) return
    this.#closed = true
    this.#readiness.dispose()
    this.resume()
    native.close(this.fd)
  }

  /** Stops listening and removes the socket file. */
  [Symbol.dispose](): void {
    if (this.#closed) return
    this.abandon()
    // Unless somebody removed it before us, and perhaps listens there now.
    if (this.file !== undefined && inode(this.file.path) === this.file.inode) unlinkSync(this.file.path)
  }
}

/**
 * A connection that was handed down as an fd, or undefined when the fd is a listening socket. @throws a system error
 * when it is no unix socket
 */
export function connectedSocket(fd: number): Connection | undefined {
  const kind = native.socketKind(fd)
  if (kind < 0) throw systemError(kind, 'getsockopt', `fd ${fd} is no unix stream socket`)
  return kind === 1 ? undefined : new Connection(ownFd(fd))
}

/**
 * The same file under an fd that a program started by us doesn't inherit: a process that takes over must not hold a
 * connection which it knows nothing of. Node marks the fds it was started with so, but only those below 16.
 */
function ownFd(fd: number): number {
  const own = native.dup(fd)
  if (own < 0) throw systemError(own, 'fcntl', `cannot duplicate fd ${fd}`)
  native.close(fd)
  return own
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

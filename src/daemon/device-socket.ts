/** The socket of a device as its options name it: bound here, or inherited. */
import { ConfigError } from '../device/index.ts'
import type { Connection } from '../vhost-user/connection.ts'
import { connectedSocket, Listener } from '../vhost-user/listener.ts'
import type { SocketAddress } from './config.ts'

/** A connection: it was handed down, and nobody else can come. @throws ConfigError when the socket can't be had */
export function openSocket(address: SocketAddress): Connection | Listener {
  if ('path' in address) return bind(address.path)
  return adopt(address.fd) ?? Listener.adopt(address.fd)
}

function adopt(fd: number): Connection | undefined {
  try {
    return connectedSocket(fd)
  } catch (error) {
    const fix = 'Give the number of an inherited unix stream socket, listening or connected.'
    throw new ConfigError('ERR_SOCKET_FD', '--fd', (error as Error).message, fix, { cause: error })
  }
}

function bind(path: string): Listener {
  try {
    return Listener.bind(path)
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException
    const fix =
      code === 'EADDRINUSE'
        ? 'Another process listens there, or it is no socket: stop that process or give another path.'
        : 'Give a path in a directory that exists and that you may write to.'
    throw new ConfigError('ERR_SOCKET_BIND', '--socket-path', `cannot listen on ${path} (${code})`, fix, {
      cause: error,
    })
  }
}

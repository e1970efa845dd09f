/**
 * The control socket: lines in, answers out. Commands of all connections are carried out one after the other, in the order
 * in which they came. It knows no commands.
 */

import { randomBytes } from 'node:crypto'
import { lstatSync, renameSync, rmSync } from 'node:fs'
import { connect, createServer, type Server, type Socket } from 'node:net'
import { resolve } from 'node:path'
import { ConfigError, type DeviceLogger } from '../../src/device/index.ts'
import { CommandError } from './events.ts'

/** Longer than any command that makes sense; who sends a longer line is cut off. */
const MAX_LINE = 65536

/** Commands that a connection may have under way: who sends more is read again when there are fewer. */
const MAX_PENDING = 64

/** Bytes that a connection may leave unread before it is cut off. */
const MAX_UNREAD = 1 << 20

/** sockaddr_un.sun_path without its final NUL, less what it has behind it while it is bound. */
const MAX_SOCKET_PATH = 107 - 7

export class ControlSocket {
  readonly #path: string
  readonly #server: Server
  readonly #connections = new Set<Socket>()
  readonly #run: (line: string) => Promise<readonly string[]>
  readonly #log: DeviceLogger
  /** Of the socket's file while it is ours to remove. */
  #inode: number | undefined
  /** The end of the last command. */
  #last: Promise<void> = Promise.resolve()

  /** @param run carries out a line and returns what to answer before "ok"; a CommandError is answered */
  constructor(path: string, log: DeviceLogger, run: (line: string) => Promise<readonly string[]>) {
    this.#path = resolve(path)
    this.#log = log
    this.#run = run
    // Half-open: who sends its commands and then the end still gets the answers.
    this.#server = createServer({ allowHalfOpen: true }, (socket) => this.#serve(socket))
  }

  /** Binds the socket; one that nobody listens on any more is replaced. @throws ConfigError ERR_INPUT_CONTROL */
  async bind(): Promise<void> {
    const path = this.#path
    if (Buffer.byteLength(path) > MAX_SOCKET_PATH)
      throw refusal(`${path} is longer than ${MAX_SOCKET_PATH} bytes`, 'Give a shorter path.')
    const file = lstatSync(path, { throwIfNoEntry: false })
    if (file !== undefined && !file.isSocket()) {
      const fix = 'Give a path where there is nothing, or a socket that nobody listens on.'
      throw refusal(`${path} exists and is no socket`, fix)
    }
    if (file !== undefined && (await someoneListens(path)))
      throw refusal(`another process listens on ${path}`, 'Stop that process, or give another path.')
    // Under another name first: libuv removes the name that it has bound when it closes the socket, and after a handover the
    // socket is another process's.
    const name = `${path}.${randomBytes(3).toString('hex')}`
    try {
      await listen(this.#server, { path: name })
      renameSync(name, path)
    } catch (cause) {
      const { code } = cause as NodeJS.ErrnoException
      const fix = 'Give a path in a directory that exists and that you may write to.'
      throw refusal(`cannot listen on ${path} (${code})`, fix, cause)
    }
    this.#listening()
  }

  /** Listens on the socket of the process before this one. @param fd ours now */
  async adopt(fd: number): Promise<void> {
    await listen(this.#server, { fd })
    this.#listening()
  }

  /** The listening socket, for a successor. Node has no public name for it. */
  get fd(): number {
    return (this.#server as unknown as { readonly _handle: { readonly fd: number } })._handle.fd
  }

  /** Says a line to all connections. */
  tell(line: string): void {
    for (const socket of this.#connections) this.#send(socket, line)
  }

  /** Removes the socket; commands under way are not waited for. */
  async close(): Promise<void> {
    const closed = new Promise<void>((done) => this.#server.close(() => done()))
    for (const socket of this.#connections) socket.destroy()
    // Unless somebody removed it before us, and perhaps listens there now.
    if (this.#inode !== undefined && this.#inode === inodeOf(this.#path)) rmSync(this.#path)
    await closed
  }

  #listening(): void {
    this.#inode = inodeOf(this.#path)
    this.#server.on('error', (err) => this.#log.error({ err }, 'the control socket failed'))
  }

  #serve(socket: Socket): void {
    this.#connections.add(socket)
    let rest = ''
    let pending = 0
    const run = (line: string): void => {
      pending++
      this.#do(socket, line.replace(/\r$/, '')).then(() => {
        pending--
        if (socket.readableEnded && pending === 0) socket.end()
        else if (pending < MAX_PENDING) socket.resume()
      })
    }
    socket.setEncoding('utf8')
    socket.on('error', (err) => this.#log.debug({ err }, 'a control connection failed'))
    socket.once('close', () => this.#connections.delete(socket))
    socket.on('data', (text: string) => {
      const lines = (rest + text).split('\n')
      rest = lines.pop() as string
      for (const line of lines) run(line)
      if (rest.length > MAX_LINE) {
        this.#send(socket, `error a line is longer than ${MAX_LINE} characters`)
        socket.removeAllListeners('data').destroySoon()
      } else if (pending >= MAX_PENDING) socket.pause()
    })
    // The last line may lack its line feed; an empty one changes nothing.
    socket.once('end', () => run(rest))
  }

  #do(socket: Socket, line: string): Promise<void> {
    this.#last = this.#last.then(async () => {
      if (line === '') return
      for (const answer of await this.#answer(line)) this.#send(socket, answer)
    })
    return this.#last
  }

  async #answer(line: string): Promise<readonly string[]> {
    try {
      return [...(await this.#run(line)), 'ok']
    } catch (error) {
      if (error instanceof CommandError) return [`error ${error.message}`]
      if ((error as Error).name === 'AbortError') return ['error the device is being closed']
      this.#log.error({ err: error, line }, 'a command failed')
      return ['error virtiod failed, its log says why']
    }
  }

  #send(socket: Socket, line: string): void {
    if (!socket.writable) return
    socket.write(`${line}\n`)
    if (socket.writableLength > MAX_UNREAD) socket.destroy()
  }
}

function refusal(problem: string, fix: string, cause?: unknown): ConfigError {
  return new ConfigError('ERR_INPUT_CONTROL', '--control', problem, fix, cause === undefined ? {} : { cause })
}

function inodeOf(path: string): number | undefined {
  return lstatSync(path, { throwIfNoEntry: false })?.ino
}

function listen(server: Server, where: { readonly path: string } | { readonly fd: number }): Promise<void> {
  return new Promise((done, reject) => {
    server.once('error', reject)
    server.listen(where, () => {
      server.off('error', reject)
      done()
    })
  })
}

function someoneListens(path: string): Promise<boolean> {
  return new Promise((done) => {
    const socket = connect(path)
    socket.once('connect', () => {
      socket.destroy()
      done(true)
    })
    // A full backlog (EAGAIN) has somebody behind it, and so has one that this user may not use.
    socket.once('error', ({ code }: NodeJS.ErrnoException) => done(code !== 'ECONNREFUSED' && code !== 'ENOENT'))
  })
}

/**
 * QEMU's monitor (QMP): commands and events, one JSON object per line. It knows no guest.
 */
import type { Socket } from 'node:net'

/** The monitor: replies come in the order of the commands; events between them. */
export class Qmp {
  #socket: Socket
  #replies: { resolve(value: unknown): void; reject(error: Error): void }[] = []
  #events: { name: string; data: unknown }[] = []
  #eventWaiters: { name: string; resolve(value: unknown): void; reject(error: Error): void }[] = []

  private constructor(socket: Socket) {
    this.#socket = socket
    const lines = lineReader((line) => this.#onMessage(JSON.parse(line) as Record<string, unknown>))
    socket
      .on('error', () => undefined)
      .setEncoding('utf8')
      .on('data', lines)
    socket.once('close', () => {
      const error = new Error('QEMU closed the monitor')
      for (const waiter of [...this.#replies.splice(0), ...this.#eventWaiters.splice(0)]) waiter.reject(error)
    })
  }

  static async open(socket: Socket): Promise<Qmp> {
    const qmp = new Qmp(socket)
    await qmp.execute('qmp_capabilities', {})
    return qmp
  }

  execute(command: string, args: Record<string, unknown>): Promise<unknown> {
    if (this.#socket.destroyed) return Promise.reject(new Error('QEMU closed the monitor'))
    return new Promise((resolve, reject) => {
      this.#replies.push({ resolve, reject })
      this.#socket.write(JSON.stringify({ execute: command, arguments: args }))
    })
  }

  event(name: string): Promise<unknown> {
    const index = this.#events.findIndex((event) => event.name === name)
    if (index >= 0) return Promise.resolve(this.#events.splice(index, 1)[0]?.data)
    return new Promise((resolve, reject) => this.#eventWaiters.push({ name, resolve, reject }))
  }

  close(): void {
    this.#socket.destroy()
  }

  #onMessage(message: Record<string, unknown>): void {
    if ('return' in message) this.#replies.shift()?.resolve(message['return'])
    else if ('error' in message) {
      const { desc } = message['error'] as { desc: string }
      this.#replies.shift()?.reject(new Error(`QMP: ${desc}`))
    } else if (typeof message['event'] === 'string') {
      const name = message['event']
      const index = this.#eventWaiters.findIndex((waiter) => waiter.name === name)
      if (index < 0) this.#events.push({ name, data: message['data'] })
      else this.#eventWaiters.splice(index, 1)[0]?.resolve(message['data'])
    }
  }
}

/** Cuts a stream of text into lines. */
export function lineReader(onLine: (line: string) => void): (text: string) => void {
  let rest = ''
  return (text) => {
    const lines = (rest + text.replaceAll('\r', '')).split('\n')
    rest = lines.pop() ?? ''
    for (const line of lines) onLine(line)
  }
}

/** Somebody at the control socket of an input device. */
import { connect, type Socket } from 'node:net'

export class ControlClient implements Disposable {
  readonly #socket: Socket
  readonly #lines: string[] = []
  #rest = ''
  #waiting: (() => void)[] = []
  closed = false

  constructor(path: string) {
    this.#socket = connect(path)
    this.#socket.setEncoding('utf8').on('data', (text: string) => {
      const lines = (this.#rest + text).split('\n')
      this.#rest = lines.pop() as string
      this.#lines.push(...lines)
      this.#wake()
    })
    this.#socket.on('error', () => undefined)
    this.#socket.once('close', () => {
      this.closed = true
      this.#wake()
    })
  }

  write(text: string): void {
    this.#socket.write(text)
  }

  /** Sends the last words and the end. */
  end(text: string): void {
    this.#socket.end(text)
  }

  /** The next line. @throws Error when the connection ends without one */
  async line(): Promise<string> {
    while (this.#lines.length === 0) {
      if (this.closed) throw new Error('the control socket was closed')
      await new Promise<void>((resolve) => this.#waiting.push(resolve))
    }
    return this.#lines.shift() as string
  }

  /** Sends a command and returns its answer, and the lines before it. */
  async command(line: string): Promise<string[]> {
    this.write(`${line}\n`)
    const lines: string[] = []
    for (;;) {
      const answer = await this.line()
      lines.push(answer)
      if (answer === 'ok' || answer.startsWith('error ')) return lines
    }
  }

  [Symbol.dispose](): void {
    this.#socket.destroy()
  }

  #wake(): void {
    for (const resolve of this.#waiting.splice(0)) resolve()
  }
}

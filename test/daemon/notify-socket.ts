/**
 * A datagram socket as a service manager has it, in a process of its own, since Node has none of the kind. Perl is
 * there wherever git is.
 */
import { type ChildProcess, spawn } from 'node:child_process'

const script = `
use Socket; $| = 1;
my $name = $ARGV[0];
$name =~ s/^@/\\0/;
socket(my $socket, AF_UNIX, SOCK_DGRAM, 0) or die $!;
bind($socket, pack_sockaddr_un($name)) or die $!;
print "bound\\n";
while (defined recv($socket, my $message, 4096, 0)) { $message =~ s/\\n/ | /g; print "$message\\n" }
`

export class NotifySocket implements Disposable {
  readonly address: string
  /** The messages so far; ` | ` stands for a line break. */
  readonly messages: string[] = []
  readonly #process: ChildProcess
  #waiting: (() => void)[] = []

  private constructor(address: string) {
    this.address = address
    this.#process = spawn('perl', ['-e', script, address], { stdio: ['ignore', 'pipe', 'inherit'] })
    let text = ''
    this.#process.stdout!.setEncoding('utf8').on('data', (data: string) => {
      const lines = (text + data).split('\n')
      text = lines.pop()!
      this.messages.push(...lines)
      for (const resolve of this.#waiting.splice(0)) resolve()
    })
    this.#process.once('exit', () => {
      for (const resolve of this.#waiting.splice(0)) resolve()
    })
  }

  /** @param address a path, or `@name` for an abstract socket */
  static async open(address: string): Promise<NotifySocket> {
    const socket = new NotifySocket(address)
    await socket.received('bound')
    socket.messages.length = 0
    return socket
  }

  /** Resolves to the first message with this text, when it has come. */
  async received(text: string): Promise<string> {
    for (;;) {
      const found = this.messages.find((message) => message.includes(text))
      if (found !== undefined) return found
      if (this.#process.exitCode !== null) throw new Error(`no message "${text}": ${this.messages.join('\n')}`)
      await new Promise<void>((resolve) => this.#waiting.push(resolve))
    }
  }

  [Symbol.dispose](): void {
    this.#process.kill('SIGKILL')
  }
}

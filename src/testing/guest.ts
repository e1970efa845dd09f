/**
 * A Linux guest in QEMU for tests: boots the Debian kernel with our initramfs in a few seconds under TCG (no KVM
 * needed), runs what a test hands in and tells what came out. Owns the QEMU process, its two serial ports (the
 * kernel's console and the script's own), the QMP socket and a temporary directory. Knows nothing of back-ends: the
 * device is in `qemuArgs`.
 *
 *   const qemuArgs = vhostUserArgs('/tmp/rng.sock', 'vhost-user-rng-pci')
 *   const result = await runGuest({ qemuArgs, script: 'head -c 8 /dev/hwrng' })     one script, then power off
 *   await using guest = await startGuest({ qemuArgs })                               a machine to talk to
 *   await guest.sh('mount /dev/vda1 /mnt')                                           …many commands, one boot
 */
import type { ChildProcess } from 'node:child_process'
import { createHash } from 'node:crypto'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { createServer, type Server, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type CpioEntry, cpio } from './cpio.ts'
import { findCommand, findGuestFiles, missingPrerequisites } from './guest-files.ts'
import { type InitramfsOptions, initramfs, marker } from './initramfs.ts'
import { lineReader, Qmp } from './qmp.ts'
import { spawnTied } from './tied.ts'

export interface GuestOptions extends InitramfsOptions {
  /** What is added to the machine: chardevs, devices. The guest's RAM is the memory backend "mem", shared. */
  readonly qemuArgs: readonly string[]
  /** Files to have in the guest, by absolute path (not below /tmp); all are executable. A change of them costs no rebuild. */
  readonly files?: Readonly<Record<string, string | Uint8Array>>
  /** The QEMU to start. Default: the environment variable VIRTIOD_QEMU, or qemu-system-x86_64 in PATH. */
  readonly qemu?: string
  /** Words before QEMU's: a program that brings it into a network namespace and replaces itself by it. */
  readonly prefix?: readonly string[]
  /** A shell script that the guest runs before it powers off; without one the guest waits for `run` and `sh`. */
  readonly script?: string
  readonly cpus?: number
  readonly memoryMb?: number
  /** Behind `-m SIZE`: ",slots=4,maxmem=1G". */
  readonly memoryOptions?: string
  /** Behind the memory backend's own properties: ",hugetlb=on,hugetlbsize=2M". */
  readonly memoryBackendOptions?: string
  readonly kernelArgs?: string
  /**
   * For the whole life of the guest (default 120 s); then it is killed and whoever waits gets an error with the
   * console's tail.
   */
  readonly timeoutMs?: number
}

export interface GuestResult {
  /** The script's exit code, or undefined when the guest ended without telling one (killed, panic, no script). */
  readonly exitCode: number | undefined
  /** What the script printed, standard output and error. */
  readonly output: string
  /** Everything, as it came: firmware and kernel messages, the script's output, QEMU's own complaints. */
  readonly console: string
  /** QEMU's exit code; null when a signal ended it. */
  readonly qemuExitCode: number | null
  /** From start to end of QEMU. */
  readonly milliseconds: number
}

export interface CommandResult {
  readonly exitCode: number
  readonly output: string
}

/** What a QEMU process shows when something has gone wrong. */
export class GuestError extends Error {
  override name = 'GuestError'
  constructor(message: string, console: string) {
    super(`${message}\n--- the console's tail ---\n${console.split('\n').slice(-40).join('\n')}\n---`)
  }
}

/** Boots a guest, runs the script, waits until it has powered off. */
export async function runGuest(options: GuestOptions & { readonly script: string }): Promise<GuestResult> {
  await using guest = await startGuest(options)
  return await guest.finished()
}

/** Boots a guest and returns when its script begins (or when it takes commands). */
export async function startGuest(options: GuestOptions): Promise<Guest> {
  const guest = await Guest.launch(options)
  try {
    await guest.line(new RegExp(`^${marker.begin}$`))
    return guest
  } catch (error) {
    await guest.kill()
    throw error
  }
}

/** Starts QEMU without a kernel, so that the firmware looks for something to boot; COM1 is the console. */
export async function startFirmware(options: Omit<GuestOptions, 'script' | 'kernelArgs'>): Promise<Guest> {
  return await Guest.launch(options, false)
}

/**
 * The words that attach a vhost-user device to a guest: `vhostUserArgs(socketPath, 'vhost-user-rng-pci')`.
 * @param properties further ones of `-device`: `{ serial: 'x' }`
 */
export function vhostUserArgs(
  socketPath: string,
  driver: string,
  properties: Readonly<Record<string, string | number>> = {}
): string[] {
  // Two devices of a guest don't share a socket.
  const id = `vu${createHash('sha1').update(socketPath).digest('hex').slice(0, 12)}`
  const more = Object.entries(properties).map(([name, value]) => `,${name}=${value}`)
  return [
    '-chardev',
    `socket,id=${id},path=${socketPath.replaceAll(',', ',,')}`,
    '-device',
    `${driver},chardev=${id}${more.join('')}`,
  ]
}

interface Waiter {
  readonly pattern: RegExp
  resolve(match: RegExpExecArray): void
  reject(error: Error): void
}

export class Guest {
  #child: ChildProcess
  #scriptPort: Socket | undefined
  #qmp: Qmp | undefined
  /** Complete lines of both ports that `line` has not looked at yet. */
  #lines: string[] = []
  #waiters: Waiter[] = []
  #console = ''
  #output = ''
  #ended: Promise<number | null>
  #endedAlready = false
  #timedOut = false
  #exitCode: number | undefined
  #started = performance.now()
  #milliseconds = 0
  #busy: Promise<unknown> = Promise.resolve()
  #options: GuestOptions

  private constructor(child: ChildProcess, options: GuestOptions, directory: string, servers: readonly Server[]) {
    this.#child = child
    this.#options = options
    const timer = setTimeout(() => {
      this.#timedOut = true
      child.kill('SIGKILL')
    }, options.timeoutMs ?? 120_000)
    this.#ended = new Promise((resolve) => {
      const end = (code: number | null): void => {
        if (this.#endedAlready) return
        this.#endedAlready = true
        this.#milliseconds = performance.now() - this.#started
        clearTimeout(timer)
        for (const server of servers) server.close()
        this.#scriptPort?.destroy()
        this.#qmp?.close()
        rmSync(directory, { recursive: true, force: true })
        for (const waiter of this.#waiters.splice(0))
          waiter.reject(this.#error(`the guest ended before ${waiter.pattern}`))
        resolve(code)
      }
      child.once('error', (error) => {
        this.#console += `${String(error)}\n`
        end(null)
      })
      child.once('close', (code, signal) => {
        if (signal !== null && signal !== 'SIGKILL') this.#console += `\nQEMU was ended by ${signal}\n`
        end(code)
      })
    })
    // SeaBIOS and the kernel's console.
    const consoleLines = lineReader((line) => this.#onLine(line))
    child.stdout?.setEncoding('latin1').on('data', (text: string) => {
      this.#console += text.replaceAll('\r', '')
      consoleLines(text)
    })
    child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      this.#console += text
    })
  }

  /** @internal Use startGuest, runGuest or startFirmware. */
  static async launch(options: GuestOptions, linux = true): Promise<Guest> {
    const files = findGuestFiles()
    const qemu = options.qemu ?? process.env['VIRTIOD_QEMU'] ?? findCommand('qemu-system-x86_64')
    if (files === undefined || qemu === undefined)
      throw new Error(`a guest can't be started here, for want of ${missingPrerequisites().join(', ')}`)
    const directory = mkdtempSync(join(tmpdir(), 'virtiod-guest-'))
    // QEMU connects to us, so nothing has to be waited for or polled.
    const portPath = join(directory, 'port')
    const qmpPath = join(directory, 'qmp')
    const [portServer, port] = await listen(portPath)
    const [qmpServer, qmpSocket] = await listen(qmpPath)
    const memory = options.memoryMb ?? 256
    // Where there can be only one processor, QEMU before 8.1 leaves the guest's memory barriers out (c914d46d0a
    // "tcg: Do not elide memory barriers"); the notification protocol with a back-end in another process relies on them.
    const cpus = options.cpus ?? 1
    const args = [
      '-nodefaults',
      '-no-user-config',
      '-display',
      'none',
      '-no-reboot',
      '-accel',
      'tcg,thread=multi',
      '-cpu',
      'max',
      '-machine',
      'q35',
      '-smp',
      `${cpus},maxcpus=${Math.max(cpus, 2)}`,
      '-m',
      `${memory}M${options.memoryOptions ?? ''}`,
      '-object',
      `memory-backend-memfd,id=mem,size=${memory}M,share=on${options.memoryBackendOptions ?? ''}`,
      '-numa',
      'node,memdev=mem',
      '-chardev',
      'stdio,id=console,signal=off',
      '-serial',
      'chardev:console',
      '-chardev',
      `socket,id=port,path=${portPath}`,
      '-serial',
      'chardev:port',
      '-chardev',
      `socket,id=qmp,path=${qmpPath}`,
      '-mon',
      'chardev=qmp,mode=control',
    ]
    if (linux) {
      let initrd = initramfs(options, files)
      const own = ownEntries(options)
      if (own.length > 0) {
        const both = Buffer.concat([readFileSync(initrd), cpio(own)])
        initrd = join(directory, 'initrd')
        writeFileSync(initrd, both)
      }
      const words = [
        'console=ttyS0',
        'loglevel=5',
        'panic=-1',
        'random.trust_cpu=on',
        'mitigations=off',
        options.kernelArgs ?? '',
      ]
      args.push('-kernel', files.kernel, '-initrd', initrd, '-append', words.join(' ').trim())
    }
    const [command = qemu, ...words] = [...(options.prefix ?? []), qemu, ...args, ...options.qemuArgs]
    const child = spawnTied(command, words, { stdio: ['pipe', 'pipe', 'pipe'] })
    const guest = new Guest(child, options, directory, [portServer, qmpServer])
    port.then(
      (socket) => guest.#attachPort(socket),
      () => undefined
    )
    // A QEMU that refuses its arguments ends at once, with or without a connection of the monitor before.
    const connected = qmpSocket.then((socket) => Qmp.open(socket)).catch(() => undefined)
    guest.#qmp = await Promise.race([connected, guest.#ended.then(() => undefined)])
    if (guest.#qmp === undefined) {
      // What it complains about comes before its end.
      await guest.#ended
      throw guest.#error('QEMU did not start')
    }
    return guest
  }

  /** QEMU's process id. */
  get pid(): number | undefined {
    return this.#child.pid
  }

  /** Everything that came out so far. */
  get console(): string {
    return this.#console
  }

  /** Everything that came out of the script's port so far. */
  get output(): string {
    return this.#output
  }

  /**
   * Waits for a line of either port that no earlier call has passed; a guest that keeps it waiting too long is killed.
   */
  line(pattern: RegExp, timeoutMs = 40_000): Promise<RegExpExecArray> {
    for (let i = 0; i < this.#lines.length; i++) {
      const match = pattern.exec(this.#lines[i] ?? '')
      if (match === null) continue
      this.#lines.splice(0, i + 1)
      return Promise.resolve(match)
    }
    this.#lines = []
    if (this.#endedAlready) return Promise.reject(this.#error(`the guest ended before ${pattern}`))
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => {
        this.#timedOut = true
        this.#child.kill('SIGKILL')
      }, timeoutMs)
      this.#waiters.push({
        pattern,
        resolve(match) {
          clearTimeout(timer)
          resolve(match)
        },
        reject(error) {
          clearTimeout(timer)
          reject(error)
        },
      })
    })
  }

  /** Sends text to the script's standard input. */
  send(text: string): void {
    if (this.#scriptPort === undefined) throw new Error('the guest has not opened its port')
    this.#scriptPort.write(text)
  }

  /**
   * Runs a shell script in a guest that was started without one; one at a time, in the order of the calls. Background
   * jobs may go on printing to the port: redirect them to /dev/ttyS1. A guest that takes longer than `timeoutMs`
   * (default 40 s) is killed.
   */
  async run(script: string, timeoutMs?: number): Promise<CommandResult> {
    const before = this.#busy
    const mine = (async (): Promise<CommandResult> => {
      await before.catch(() => undefined)
      const from = this.#output.length
      this.send(`${script}\n${marker.run}\n`)
      const match = await this.line(new RegExp(`^${marker.end} (\\d+)$`), timeoutMs)
      const output = this.#output.slice(from, this.#output.lastIndexOf(`\n${match[0]}\n`))
      return { exitCode: Number(match[1]), output: output.trimEnd() }
    })()
    this.#busy = mine
    return await mine
  }

  /** Like `run`, with `set -e`; returns the output and throws when the script fails. */
  async sh(script: string, timeoutMs?: number): Promise<string> {
    const result = await this.run(`set -e\n${script}`, timeoutMs)
    if (result.exitCode !== 0) throw this.#error(`exit code ${result.exitCode} of:\n${script}\n${result.output}`)
    return result.output
  }

  /**
   * A QMP command; returns what QEMU returns. Not x-query-virtio-queue-status: for a vhost-user device QEMU 7.2
   * answers it with the help of GET_VRING_BASE, which stops the ring.
   */
  async qmp(command: string, args: Record<string, unknown> = {}): Promise<unknown> {
    if (this.#qmp === undefined) throw new Error('no QMP connection')
    return await this.#qmp.execute(command, args)
  }

  /** Waits for a QMP event (one that came since the start or since the last call for it). */
  async qmpEvent(name: string, timeoutMs = 20_000): Promise<unknown> {
    if (this.#qmp === undefined) throw new Error('no QMP connection')
    let timer: NodeJS.Timeout | undefined
    const timeout = new Promise((_resolve, reject) => {
      timer = setTimeout(() => reject(this.#error(`no event ${name} within ${timeoutMs} ms`)), timeoutMs)
    })
    return await Promise.race([this.#qmp.event(name), timeout]).finally(() => clearTimeout(timer))
  }

  /** Waits for the end of QEMU (the script's end, or `powerOff`, or `kill` in another place). */
  async finished(): Promise<GuestResult> {
    const qemuExitCode = await this.#ended
    if (this.#timedOut) throw this.#error(`the guest did not end within ${this.#options.timeoutMs ?? 120_000} ms`)
    const end = this.#output.lastIndexOf(`\n${marker.end}`)
    return {
      exitCode: this.#exitCode,
      output: (end < 0 ? this.#output : this.#output.slice(0, end)).replace(`${marker.begin}\n`, ''),
      console: this.#console,
      qemuExitCode,
      milliseconds: this.#milliseconds,
    }
  }

  /** Powers a guest without script off in an orderly way: file systems unmounted, caches written. */
  async powerOff(): Promise<GuestResult> {
    this.send(`umount -a -t ext4; sync; poweroff -f\n${marker.run}\n`)
    return await this.finished()
  }

  /** Ends QEMU at once, as a power failure would. Does nothing when it has ended already. */
  async kill(): Promise<void> {
    if (!this.#endedAlready) this.#child.kill('SIGKILL')
    await this.#ended
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.kill()
  }

  #attachPort(socket: Socket): void {
    this.#scriptPort = socket
    const lines = lineReader((line) => {
      const end = new RegExp(`^${marker.end} (\\d+)$`).exec(line)
      if (end !== null) this.#exitCode = Number(end[1])
      this.#onLine(line)
    })
    socket.on('error', () => undefined)
    socket.setEncoding('latin1').on('data', (text: string) => {
      const clean = text.replaceAll('\r', '')
      this.#output += clean
      this.#console += clean
      lines(clean)
    })
  }

  #onLine(line: string): void {
    const waiter = this.#waiters[0]
    if (waiter === undefined) {
      this.#lines.push(line)
      return
    }
    const match = waiter.pattern.exec(line)
    if (match === null) return
    this.#waiters.shift()
    waiter.resolve(match)
  }

  #error(message: string): GuestError {
    return new GuestError(this.#timedOut ? `${message} (timed out)` : message, this.#console)
  }
}

/** A listening unix socket and its first connection. */
async function listen(path: string): Promise<[Server, Promise<Socket>]> {
  const server = createServer()
  const connection = new Promise<Socket>((resolve) => server.once('connection', resolve))
  await new Promise<void>((resolve, reject) => server.once('error', reject).listen(path, resolve))
  return [server, connection]
}

/** What this boot has beside the base archive: the script and the files, with the directories above them. */
function ownEntries({ script, files = {} }: GuestOptions): CpioEntry[] {
  const entries: CpioEntry[] = script === undefined ? [] : [{ name: 'script', data: script }]
  const directories = new Set<string>()
  for (const [path, data] of Object.entries(files)) {
    const name = path.replace(/^\/+/, '')
    for (let i = name.indexOf('/'); i >= 0; i = name.indexOf('/', i + 1)) directories.add(name.slice(0, i))
    entries.push({ name, data, mode: 0o755 })
  }
  return [...[...directories].map((name): CpioEntry => ({ name, directory: true })), ...entries]
}

/**
 * The old process of a handover as the new one sees it (handover-messages.ts): what it hands over, and whether this
 * process may serve. It must not know how devices are opened and sessions restored.
 */
import type { InheritedFiles } from '../device/index.ts'
import { type ChannelMessage, closeFds, FdChannel } from '../vhost-user/fd-channel.ts'
import type { DaemonConfig, DeviceConfig } from './config.ts'
import {
  deviceOptions,
  HANDOVER_FD,
  HANDOVER_VERSION,
  type HandedDevice,
  HandoverError,
  type HandoverMessage,
  type Hello,
  parseMessage,
} from './handover-messages.ts'
import { KeptFiles } from './kept-files.ts'

/** Our own messages find room, or the other process is not there. In milliseconds. */
const SEND_LIMIT_MS = 5000
/** Its first message is there before this process is: else nobody hands over. In milliseconds. */
const HELLO_LIMIT_MS = 5000

export interface ReceivedDevice {
  readonly device: HandedDevice
  /** The receiver owns them. */
  readonly fds: number[]
}

export class Predecessor implements Disposable {
  readonly hello: Hello
  readonly files: KeptFiles
  readonly #channel: FdChannel
  #metricsFd: number | undefined

  private constructor(channel: FdChannel, hello: Hello, files: KeptFiles, metricsFd: number | undefined) {
    this.#channel = channel
    this.hello = hello
    this.files = files
    this.#metricsFd = metricsFd
  }

  /**
   * @param fd of the channel: ours now @throws HandoverError when nobody is there who could hand over to this version
   */
  static async connect(fd: number): Promise<Predecessor> {
    // Before it is ours: a variable that somebody set by hand names any fd, perhaps one that Node itself needs.
    const channel = FdChannel.over(fd)
    if (channel === undefined) throw strayVariable(`${fd} is no socket`)
    const limit = setTimeout(() => channel.close(), HELLO_LIMIT_MS)
    const { body, fds } = await next(channel)
      .catch((error: unknown) => {
        channel.close()
        throw strayVariable((error as Error).message, error)
      })
      .finally(() => clearTimeout(limit))
    try {
      const hello = parseMessage(body)
      if (hello.kind !== 'hello') throw new HandoverError(`"${hello.kind}" instead of a beginning`)
      if (hello.version > HANDOVER_VERSION) {
        const problem = `the running process hands over in version ${hello.version}`
        throw new HandoverError(`${problem}, this one knows ${HANDOVER_VERSION} at most: it is older`)
      }
      const left = fds.splice(0)
      const kept = new Map<string, InheritedFiles>()
      for (const file of hello.files) kept.set(file.key, { fds: left.splice(0, file.fds), facts: file.facts })
      const [metricsFd, ...more] = left
      closeFds(more)
      return new Predecessor(channel, hello, new KeptFiles(kept), metricsFd)
    } catch (error) {
      closeFds(fds)
      await channel
        .send({ kind: 'failed', message: (error as Error).message } satisfies HandoverMessage)
        .catch(() => false)
      channel.close()
      throw error
    }
  }

  /** The listening socket of its metrics server, once, if that has this address. */
  takeMetrics(address: DaemonConfig['metrics']): number | undefined {
    if (address === undefined || JSON.stringify(address) !== JSON.stringify(this.hello.metrics)) return undefined
    const fd = this.#metricsFd
    this.#metricsFd = undefined
    return fd
  }

  /** Whether this configuration serves all devices of the old one. @throws HandoverError naming what is in the way */
  check(devices: readonly DeviceConfig[]): void {
    for (const old of this.hello.devices) {
      const found = devices.find(({ name }) => name === old.name)
      const problem = found === undefined ? 'is not there any more' : difference(old, found)
      if (problem !== undefined) {
        const fix = 'Undo that, or stop virtiod and start it again, with which its guests lose the device for a moment.'
        throw new HandoverError(`the device ${old.name} ${problem}. ${fix}`)
      }
    }
  }

  /**
   * Says that everything has been opened, and waits for the devices. @throws HandoverError when there is no handover
   */
  async devices(): Promise<ReceivedDevice[]> {
    const received: ReceivedDevice[] = []
    try {
      await this.#send({ kind: 'ready' })
      for (;;) {
        const { body, fds } = await next(this.#channel)
        const device = parse(body, fds)
        if (device.kind === 'end') return received
        if (device.kind !== 'device') {
          closeFds(fds)
          throw new HandoverError(`"${device.kind}" instead of a device`)
        }
        received.push({ device, fds })
      }
    } catch (error) {
      for (const { fds } of received) closeFds(fds)
      throw error
    }
  }

  /**
   * Says that all is restored, and waits for the word to go on. That the old process ended is one: who wants this
   * process not to serve ends it.
   */
  async prepared(): Promise<void> {
    await this.#send({ kind: 'prepared' })
    const received = await this.#channel.receive().catch(() => undefined)
    if (received === undefined) return
    const message = parse(received.body, received.fds)
    if (message.kind !== 'commit') throw new HandoverError(`"${message.kind}" instead of "commit"`)
  }

  /** Before anything is served. */
  async committed(): Promise<void> {
    await this.#send({ kind: 'committed' })
    this.#channel.close()
  }

  /** Why there will be no handover; the process ends after it. */
  async failed(message: string): Promise<void> {
    await this.#send({ kind: 'failed', message: message.slice(0, 10_000) })
  }

  [Symbol.dispose](): void {
    this.files[Symbol.dispose]()
    if (this.#metricsFd !== undefined) closeFds([this.#metricsFd])
    this.#metricsFd = undefined
    this.#channel.close()
  }

  /** Whether it arrives tells the next answer. */
  async #send(message: HandoverMessage): Promise<void> {
    const limit = new Promise((resolve) => setTimeout(resolve, SEND_LIMIT_MS).unref())
    await Promise.race([this.#channel.send(message).catch(() => false), limit])
  }
}

function strayVariable(problem: string, cause?: unknown): HandoverError {
  const fix = 'Unset that variable: a daemon sets it for its successor.'
  return new HandoverError(`no process hands over at ${HANDOVER_FD}: ${problem}. ${fix}`, { cause })
}

async function next(channel: FdChannel): Promise<ChannelMessage> {
  const received = await channel.receive()
  if (received === undefined) throw new HandoverError('the process that runs gave it up, or ended')
  return received
}

function parse(body: unknown, fds: readonly number[]): HandoverMessage {
  try {
    return parseMessage(body)
  } catch (error) {
    closeFds(fds)
    throw error
  }
}

/** What a device must not have changed: a driver works with it. */
function difference(old: Hello['devices'][number], { definition, socket, options }: DeviceConfig): string | undefined {
  if (definition.name !== old.type) return `is a ${definition.name} now, and was a ${old.type}`
  const place = (value: Hello['devices'][number]['socket']): string => ('path' in value ? value.path : `fd ${value.fd}`)
  if (place(socket) !== place(old.socket)) return `has the socket ${place(socket)} now, and had ${place(old.socket)}`
  const now = deviceOptions({ definition, options })
  for (const [name, value] of Object.entries(old.options)) {
    // What only one of the versions knows is not compared.
    if (name in now && JSON.stringify(now[name]) !== JSON.stringify(value)) {
      return `has another ${name} (${show(now[name])}, and had ${show(value)})`
    }
  }
  return undefined
}

function show(value: unknown): string {
  return value === null || value === undefined ? 'unset' : JSON.stringify(value)
}

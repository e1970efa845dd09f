/**
 * One device's end of a handover in the old process (handover.ts): it stops serving in a state from which another process
 * or this one goes on. What the new process does is in device-server.ts.
 */
import type { SavedSession } from '../vhost-user/saved-session.ts'
import type { DeviceServer } from './device-server.ts'
import type { Handed } from './handover.ts'
import { type HandedDevice, HandoverError } from './handover-messages.ts'
import type { Logger } from './log.ts'

/** What it needs of the server. */
type Served = Pick<DeviceServer, 'name' | 'device' | 'rings' | 'listener' | 'session' | 'handedDownEnded'>

export class DeviceHandover {
  readonly #server: Served
  readonly #log: Logger
  readonly #over = Promise.withResolvers<void>()
  /** Never rejects. */
  #suspending: Promise<unknown> = Promise.resolve()
  /** What is done to the session is done by this. */
  #begun = false
  #resumed = false
  #lends = false
  /** `Device.letGo` has been called. */
  #letGo = false

  constructor(server: Served, log: Logger) {
    this.#server = server
    this.#log = log
  }

  /** Resolves when the device goes on in this process. */
  get over(): Promise<void> {
    return this.#over.promise
  }

  /** The session waits for its fate, and its fds are lent. */
  get lends(): boolean {
    return this.#lends
  }

  /** @param before something else that is being done to the session */
  suspend(before: Promise<void> | undefined): Promise<Handed> {
    const suspending = this.#suspend(before)
    this.#suspending = suspending.catch(() => {})
    return suspending
  }

  /** Also while `suspend` is still under way, which then ends soon. */
  async resume(): Promise<void> {
    this.#resumed = true
    await this.#takeBack()
    if (this.#begun) await this.#resumeSession()
    await this.#suspending
    await this.#takeBack()
    this.#server.rings.staysActive = false
    this.#server.listener?.resume()
    this.#over.resolve()
  }

  async #suspend(before: Promise<void> | undefined): Promise<Handed> {
    await before
    if (this.#resumed) throw new HandoverError('the handover has failed already')
    this.#begun = true
    const { name, device, rings, listener, handedDownEnded } = this.#server
    listener?.hold()
    rings.staysActive = true
    const saved = await this.#suspendSession()
    const state = await rings.saveState()
    await device.letGo?.()
    this.#letGo = true
    const handed: HandedDevice = {
      kind: 'device',
      name,
      ...(listener === undefined ? {} : { listener: listener.file === undefined ? {} : { file: listener.file } }),
      ended: handedDownEnded,
      ...(saved === undefined ? {} : { session: saved.state }),
      state: Buffer.from(state).toString('base64'),
      config: Buffer.from(device.config()).toString('base64'),
    }
    const listening = listener === undefined ? [] : [listener.fd]
    return { device: handed, fds: [...listening, ...(saved?.fds ?? [])] }
  }

  /** Undefined: there is none, or its front-end left just now. */
  async #suspendSession(): Promise<SavedSession | undefined> {
    const { session } = this.#server
    try {
      const saved = await session?.suspend()
      this.#lends = saved !== undefined
      return saved
    } catch (error) {
      if (this.#server.session === session) throw error
      return undefined
    }
  }

  async #resumeSession(): Promise<void> {
    const { session, rings } = this.#server
    try {
      // It ends a `suspend` that waits for what is in flight. Rings that never stopped are still paused.
      await session?.resume()
      await rings.resume()
    } catch (error) {
      this.#log.error({ err: error }, 'the session cannot go on after a handover that failed, its connection is closed')
      session?.connection.abort()
    }
  }

  async #takeBack(): Promise<void> {
    if (!this.#letGo) return
    this.#letGo = false
    try {
      await this.#server.device.takeBack?.()
    } catch (error) {
      // Nobody else has its guest: it is served as far as that goes.
      this.#log.error({ err: error }, 'the device was not taken back whole')
    }
  }
}

/**
 * What a case works with: the facts, fresh connections and guests that are closed behind it, and the questions that
 * many cases ask: how was this taken, does that ring still work, did an fd stay behind. It must not know which cases
 * exist.
 */
import { VHOST_USER_F_PROTOCOL_FEATURES } from '../../virtio/constants.ts'
import { hasFeature } from '../../virtio/features.ts'
import { Connection } from '../connection.ts'
import { FrontendError } from '../errors.ts'
import { GuestMemory, type RegionLayout } from '../memory.ts'
import { Session, type SessionOptions } from '../session.ts'
import { sleepMs, type VirtqueueOptions } from '../virtqueue.ts'
import { applicable, expect, NotApplicable, Violation } from './case.ts'
import { type Facts, openFds } from './facts.ts'
import { Guest, type Ring } from './guest.ts'
import { diskFlush, diskRead, diskWrite, frameTransmission, type Operation } from './operation.ts'

/** How a message was taken. `taken`: not refused, as far as one can see without an acknowledgment. */
export type Answer = 'acknowledged' | 'taken' | 'refused' | 'closed'

export interface GuestOptions extends SessionOptions {
  /** Ring 0 of a network card is started too unless false: a back-end may wait for both of a pair. */
  readonly companions?: boolean
}

export class Context {
  readonly socketPath: string
  readonly facts: Facts
  /** Milliseconds that a request may take. */
  readonly timeoutMs: number
  /** The other socket, when frames come from there. */
  readonly peer: string | undefined
  /** A guest that a case keeps over several rounds of a repetition. */
  held: { readonly guest: Guest; readonly ring: Ring } | undefined
  readonly #open: { close(abrupt: boolean): void }[] = []
  readonly #memories: GuestMemory[] = []

  constructor(socketPath: string, facts: Facts, timeoutMs: number, peer?: string) {
    this.socketPath = socketPath
    this.facts = facts
    this.timeoutMs = timeoutMs
    this.peer = peer
  }

  has(bit: number): boolean {
    return hasFeature(this.facts.features, bit)
  }

  hasProtocol(bit: number): boolean {
    return hasFeature(this.facts.protocolFeatures, bit)
  }

  /** The ring that cases about rings use: queue 0 of a disk, the first transmit queue of a network card. */
  get ringIndex(): number {
    return this.facts.device === 'blk' ? 0 : 1
  }

  /** Another ring of the same use. @throws NotApplicable when there is none */
  get otherRingIndex(): number {
    const index = this.facts.device === 'blk' ? 1 : 3
    applicable(index < this.facts.rings, 'the back-end has no second ring of this kind')
    return index
  }

  /** What the device is asked to do on a ring. */
  operation(features = this.facts.features): Operation {
    const { blk } = this.facts
    return blk === undefined ? frameTransmission(features) : diskRead(blk.blockSize, blk.firstBlock)
  }

  /** A batch that may be under way for a while: a disk reads as much as fits. */
  longOperations(count: number): Operation[] {
    const { blk } = this.facts
    if (blk === undefined) return new Array<Operation>(count).fill(this.operation())
    const bytes = Math.floor(Math.min(blk.capacity * 512, 2 ** 18) / blk.blockSize) * blk.blockSize
    return new Array<Operation>(count).fill(diskRead(bytes))
  }

  /** A batch that is under way for a while: writes to the last blocks of a disk, and flushes behind them. */
  writingOperations(count: number): Operation[] {
    const { blk } = this.facts
    applicable(blk !== undefined && !blk.readOnly, 'for disks that can be written')
    const bytes = Math.floor(Math.min((blk.capacity * 512) / 2, 65536) / blk.blockSize) * blk.blockSize
    const write = diskWrite(blk.capacity - bytes / 512, new Uint8Array(bytes).fill(0x5a))
    const flush = diskFlush()
    return Array.from({ length: count }, (_, i) => (i % 2 === 0 ? write : flush))
  }

  // ---- connections and guests: the one before is closed first, since a back-end need not serve two

  /** A connection on which nothing has been said. */
  connect(): Connection {
    this.release(false)
    const connection = Connection.connect(this.socketPath, { timeoutMs: this.timeoutMs })
    this.#open.push({ close: () => connection.close() })
    return connection
  }

  /** A guest that has negotiated and shared its memory; no ring is set up. */
  guest(options: SessionOptions = {}): Guest {
    this.release(false)
    const session = Session.open(this.socketPath, { timeoutMs: this.timeoutMs, ...options, queues: 0 })
    return this.#adopt(session)
  }

  /** The same over a connection that a case has begun to talk on. */
  guestOver(connection: Connection, options: SessionOptions = {}): Guest {
    return this.#adopt(Session.over(connection, { ...options, queues: 0 }))
  }

  /** A session beside the guest, closed with it. */
  adopt(session: Session): Session {
    this.#open.push(session)
    return session
  }

  /** A guest whose ring {@link ringIndex} runs. */
  running(options: GuestOptions = {}, ring: VirtqueueOptions = {}): { guest: Guest; ring: Ring } {
    const guest = this.guest(options)
    this.startCompanions(guest)
    return { guest, ring: guest.start(this.ringIndex, ring) }
  }

  /** Starts what a back-end may want to see before it serves a transmit queue: its receive queue. */
  startCompanions(guest: Guest): void {
    if (this.facts.device === 'net') guest.start(0, {}, 0)
  }

  /** Guest memory that outlives a session; it is released after the case. */
  memory(layout: readonly RegionLayout[]): GuestMemory {
    const memory = new GuestMemory(layout)
    this.#memories.push(memory)
    return memory
  }

  /** Ends what is open. @param abrupt don't wait for rings to stop */
  release(abrupt: boolean): void {
    this.held = undefined
    for (const one of this.#open.splice(0).reverse()) one.close(abrupt)
  }

  /** Ends everything of a case. */
  cleanup(abrupt: boolean): void {
    this.release(abrupt)
    for (const memory of this.#memories.splice(0)) memory.close()
  }

  // ---- questions

  /** Sends something and says how it was taken. Without REPLY_ACK only a closed connection shows a refusal. */
  answer(connection: Connection, send: () => void): Answer {
    try {
      send()
      if (connection.replyAck) return 'acknowledged'
      connection.barrier()
      return 'taken'
    } catch (error) {
      if (!(error instanceof FrontendError)) throw error
      if (error.failure === 'nack') return 'refused'
      if (error.failure === 'closed') return 'closed'
      throw error
    }
  }

  /** @throws Violation when something that is wrong was taken as right. @returns how it was refused */
  expectRefusal(connection: Connection, what: string, send: () => void): Answer {
    const answer = this.answer(connection, send)
    // What isn't acknowledged may have been ignored: nobody can see that.
    if (answer === 'acknowledged') {
      sleepMs(5)
      const after = connection.channel.hungUp() ? ', and then the end of the connection' : ''
      throw new Violation(`${what}: a reply other than 0, or the end`, `the reply 0${after}`)
    }
    return answer
  }

  /** @throws Violation when something that is right was refused */
  expectTaken(connection: Connection, what: string, send: () => void): void {
    const answer = this.answer(connection, send)
    expect(answer === 'acknowledged' || answer === 'taken', `${what} is accepted`, `it was ${answer}`)
  }

  /** No byte comes and the connection stays. @throws Violation */
  expectQuiet(connection: Connection, what: string, ms = 50): void {
    if (connection.channel.readable(ms)) {
      const ended = connection.channel.hungUp()
      throw new Violation(`no reply to ${what}`, ended ? 'the connection ended' : 'a message came')
    }
  }

  /** A new session works. @throws FrontendError or Violation */
  expectServing(what: string): void {
    const { ring } = this.running()
    ring.run(1, {}, what)
  }

  /** Without protocol features there is neither REPLY_ACK nor SET_VRING_ENABLE. */
  needProtocolFeatures(): void {
    applicable(this.has(VHOST_USER_F_PROTOCOL_FEATURES), 'VHOST_USER_F_PROTOCOL_FEATURES is not offered')
  }

  /**
   * Repeats something that may leave an fd behind in the back-end.
   * @throws Violation when the count of open fds grew with the repetitions
   */
  expectNoFdLeak(repeat: number, action: (round: number) => void): string {
    const { pid } = this.facts
    if (pid === undefined) throw new NotApplicable('the process of the back-end is not visible')
    // The first rounds may open what stays: log files, pools.
    for (let i = 0; i < 2; i++) action(i)
    // A guest that goes through all rounds holds the same fds before and after.
    if (this.held === undefined) this.release(false)
    const before = this.#settledFds(pid, Number.POSITIVE_INFINITY)
    for (let i = 0; i < repeat; i++) action(i + 2)
    if (this.held === undefined) this.release(false)
    const after = this.#settledFds(pid, before)
    expect(after - before < repeat / 2, `${before} open fds, as before ${repeat} repetitions`, `${after}`)
    return `${before} fds before, ${after} after ${repeat} repetitions`
  }

  /** Open fds once they have stopped falling, or are at most `enough`. */
  #settledFds(pid: number, enough: number): number {
    const deadline = performance.now() + 2000
    let lowest = openFds(pid) ?? 0
    for (let steady = 0; steady < 10 && performance.now() < deadline; steady++) {
      if (lowest <= enough && enough !== Number.POSITIVE_INFINITY) return lowest
      sleepMs(20)
      const now = openFds(pid) ?? 0
      if (now < lowest) [lowest, steady] = [now, 0]
    }
    return lowest
  }

  #adopt(session: Session): Guest {
    const guest = new Guest(session, this.operation(session.features), this.timeoutMs)
    this.#open.push(guest)
    return guest
  }
}

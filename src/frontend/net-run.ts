/**
 * The measuring loop of a packet bench over one or two ports: announce, warm up, measure, drain. It owns the loop and the
 * clock. It must not know options or what the figures are called.
 */
import { FrontendError } from './errors.ts'
import type { LinkCount, LinkSource } from './net-bench-link.ts'
import { announcement, encodeNetHeader } from './net-frames.ts'
import type { PacketSink, PacketSource } from './net-load.ts'
import type { Port } from './net-port.ts'
import { type CpuTime, cpuBetween, cpuTime } from './peer.ts'
import { sleepMs, type WaitMode } from './virtqueue.ts'

/** Chains that are worth a batch. DPDK's bursts have 32 packets. */
const BATCH = 32
/** A switch forgets a MAC address that is silent, most of them after 300 s. */
const ANNOUNCE_MS = 30_000
/** Packets that are still on their way arrive within this time, or are lost. */
const QUIET_MS = 50

/** Sums since the start. */
interface Totals {
  sent: number
  received: number
  receivedBytes: number
  kicks: number
  calls: number
}

/** What the measured time brought, and what the whole run lost. */
export interface Measured extends Totals {
  readonly ms: number
  /** From the first packet to the end of the drain. */
  readonly allSent: number
  readonly allReceived: number
  readonly allReceivedBytes: number
  /** CPU time of the back-end's processes; undefined when /proc doesn't show them. */
  readonly cpuNs: number | undefined
}

export interface RunOptions {
  /** Ports that send; the others' sources only announce. */
  readonly senders: readonly Port[]
  /** Ports whose packets count. */
  readonly receivers: readonly Port[]
  readonly ports: readonly Port[]
  /** Ports that tell a switch where they are, with the MAC address of each. */
  readonly announce: readonly (readonly [Port, Uint8Array])[]
  /** Sends to the receivers from behind the back-end, besides `senders`. It is the caller's, who closes it. */
  readonly outside?: LinkSource
  /** What counts instead of the receivers' packets: what has come out behind the back-end. */
  readonly outlet?: () => LinkCount
  readonly mode: WaitMode
  readonly pids: readonly number[]
  readonly progress?: (line: string) => void
}

const clock = (): number => performance.now()

export class NetRun {
  readonly #options: RunOptions
  readonly #sources: readonly PacketSource[]
  readonly #sinks: readonly PacketSink[]
  /** Sinks whose packets don't count; they are emptied now and then. */
  readonly #idle: readonly PacketSink[]
  #nextAnnouncement = Number.POSITIVE_INFINITY

  constructor(options: RunOptions) {
    this.#options = options
    this.#sources = options.senders.flatMap((port) => port.sources)
    this.#sinks = options.receivers.flatMap((port) => port.sinks)
    this.#idle = options.ports.filter((port) => !options.receivers.includes(port)).flatMap((port) => port.sinks)
  }

  /** @throws FrontendError when the back-end breaks a rule, hangs up or takes no packet for 10 s */
  measure(warmupMs: number, ms: number): Measured {
    this.#announce()
    const base = this.#totals()
    for (const source of this.#sources) source.start()
    this.#loop(clock() + warmupMs, false)
    const before = this.#totals()
    const cpuBefore = this.#cpu()
    const from = clock()
    this.#loop(from + ms, this.#options.progress !== undefined)
    const to = clock()
    const cpuAfter = this.#cpu()
    const after = this.#totals()
    this.#drain()
    const all = this.#totals()
    return {
      ms: to - from,
      sent: after.sent - before.sent,
      received: after.received - before.received,
      receivedBytes: after.receivedBytes - before.receivedBytes,
      kicks: after.kicks - before.kicks,
      calls: after.calls - before.calls,
      allSent: all.sent - base.sent,
      allReceived: all.received - base.received,
      allReceivedBytes: all.receivedBytes - base.receivedBytes,
      cpuNs: cpuSum(cpuBefore, cpuAfter),
    }
  }

  #loop(end: number, progress: boolean): void {
    const sources = this.#sources
    const sinks = this.#sinks
    const polling = this.#options.mode === 'poll'
    const outside = this.#options.outside
    let least = polling ? BATCH : 1
    let idle = 0
    let sinceCheck = 0
    let lastSent = clock()
    let sentThen = -1
    let nextLine = progress ? lastSent + 1000 : Number.POSITIVE_INFINITY
    let line = this.#totals()
    for (;;) {
      let count = 0
      for (let i = 0; i < sources.length; i++) count += (sources[i] as PacketSource).step(least, true)
      if (outside !== undefined) count += outside.step()
      for (let i = 0; i < sinks.length; i++) count += (sinks[i] as PacketSink).step(least)
      if (count > 0) {
        idle = 0
        if (polling) least = BATCH
        sinceCheck += count
        if (sinceCheck < 4096) continue
      } else if (!polling) {
        this.#sleep()
      } else if (++idle < 64) {
        // Little has come: take that little every so often.
        least = (idle & 15) === 15 ? 1 : BATCH
        continue
      }
      sinceCheck = 0
      idle = 0
      const now = clock()
      for (const sink of this.#idle) sink.step(1)
      if (now >= end) return
      if (count === 0) outside?.lookAfter(now)
      if (sources.length > 0) {
        let sent = 0
        for (let i = 0; i < sources.length; i++) sent += (sources[i] as PacketSource).sent
        if (sent !== sentThen) lastSent = now
        else if (now - lastSent > 1000) this.#stalled(now - lastSent)
        sentThen = sent
      } else if (count === 0) this.#checkAlive()
      if (now >= this.#nextAnnouncement) this.#announceAgain(now)
      if (now >= nextLine) {
        const totals = this.#totals()
        const seconds = (now - nextLine + 1000) / 1000
        const rate = (packets: number): string => `${(packets / seconds / 1e6).toFixed(3)} M`
        this.#options.progress?.(
          [
            sources.length > 0 ? `${rate(totals.sent - line.sent)} packets/s sent` : '',
            sinks.length > 0 ? `${rate(totals.received - line.received)} packets/s received` : '',
          ]
            .filter((part) => part !== '')
            .join(', ')
        )
        line = totals
        nextLine = now + 1000
      }
    }
  }

  /**
   * As a guest's interrupt handling: ask for calls, look again, sleep, then ask for none while working. Transmit queues
   * want a call when three quarters are done, as Linux does with its full ones. All rings share one call eventfd.
   */
  #sleep(): void {
    const { ports } = this.#options
    let ready = false
    for (const source of this.#sources) {
      if (source.ring.enableCalls(Math.max(1, (source.ring.inFlight * 3) >> 2))) ready = true
    }
    for (const sink of this.#sinks) if (sink.ring.enableCalls(1)) ready = true
    if (!ready) ports[0]?.queues[0]?.waitForCall(100)
    for (const source of this.#sources) source.ring.disableCalls()
    for (const sink of this.#sinks) sink.ring.disableCalls()
  }

  /** One frame from each port that has to be known, so that a learning switch floods nothing of what is measured. */
  #announce(): void {
    const { announce, ports } = this.#options
    for (const [port, mac] of announce) {
      const source = port.sources[0] as PacketSource
      source.announce(encodeNetHeader({}, port.headerSize), announcement(mac, ports.indexOf(port) + 1))
      const deadline = clock() + 10_000
      while (source.step(1, false) === 0) {
        if (clock() > deadline) throw new FrontendError('bench', 'timeout', 'the back-end takes no packet')
        sleepMs(0.1)
        this.#checkAlive()
      }
      source.announced()
    }
    if (announce.length === 0) return
    this.#settle()
    this.#nextAnnouncement = clock() + ANNOUNCE_MS
  }

  /** A port that sends is known by its packets; one that only receives says it again. */
  #announceAgain(now: number): void {
    for (const [port, mac] of this.#options.announce) {
      const source = port.sources[0] as PacketSource
      if (source.started) continue
      source.step(1, false)
      if (source.ring.inFlight > 0) continue
      source.announce(encodeNetHeader({}, port.headerSize), announcement(mac, this.#options.ports.indexOf(port) + 1))
    }
    this.#nextAnnouncement = now + ANNOUNCE_MS
  }

  /** Sends nothing more and waits for what is under way. */
  #drain(): void {
    const deadline = clock() + 10_000
    while (this.#sources.some((source) => source.ring.inFlight > 0)) {
      for (const source of this.#sources) source.step(1, false)
      for (const sink of this.#sinks) sink.step(1)
      if (clock() > deadline) throw new FrontendError('bench', 'timeout', 'packets in flight were not used at the end')
    }
    this.#settle()
  }

  /** Takes packets until none has come for {@link QUIET_MS}; when others make the traffic, for that long. */
  #settle(): void {
    let until = clock() + QUIET_MS
    const deadline = clock() + 2000
    for (let now = clock(); now < until && now < deadline; now = clock()) {
      let count = 0
      for (const sink of this.#sinks) count += sink.step(1)
      for (const sink of this.#idle) sink.step(1)
      if (count > 0 && (this.#sources.length > 0 || this.#options.outside !== undefined)) until = now + QUIET_MS
    }
  }

  #stalled(ms: number): void {
    this.#checkAlive()
    if (ms > 10_000) throw new FrontendError('bench', 'timeout', 'the back-end took no packet for 10 s')
  }

  #checkAlive(): void {
    for (const port of this.#options.ports) {
      if (port.session.connection.channel.hungUp()) {
        throw new FrontendError('bench', 'closed', 'the back-end closed the connection')
      }
    }
  }

  #totals(): Totals {
    const { ports, senders, receivers } = this.#options
    const totals: Totals = { sent: this.#options.outside?.sent ?? 0, received: 0, receivedBytes: 0, kicks: 0, calls: 0 }
    for (const port of senders) totals.sent += port.sent
    for (const port of receivers) {
      totals.received += port.received
      totals.receivedBytes += port.receivedBytes
    }
    const outlet = this.#options.outlet?.()
    if (outlet !== undefined) {
      totals.received = outlet.packets
      totals.receivedBytes = outlet.bytes
    }
    for (const port of ports) for (const ring of port.rings) totals.kicks += ring.counters.kicks
    const first = ports[0]?.queues[0]
    first?.takeCalls()
    totals.calls = first?.calls ?? 0
    return totals
  }

  #cpu(): (CpuTime | undefined)[] {
    return this.#options.pids.map((pid) => cpuTime(pid))
  }
}

function cpuSum(before: readonly (CpuTime | undefined)[], after: readonly (CpuTime | undefined)[]): number | undefined {
  if (before.length === 0) return undefined
  let sum = 0
  for (const [i, first] of before.entries()) {
    const second = after[i]
    if (first === undefined || second === undefined) return undefined
    sum += cpuBetween(first, second)
  }
  return sum
}

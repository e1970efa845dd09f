/** A host of taps that are not there, for the control half: what it was told, and what it answers. */
import { openSync } from 'node:fs'
import type {
  DeviceHost,
  HandoverFiles,
  InheritedFiles,
  LinkInfo,
  NetworkHost,
  TapInfo,
} from '../../src/device/index.ts'
import { fileInfo, lockFile, probeFallocate } from '../../src/engine/files.ts'

export const TAP: TapInfo = {
  name: 'fake0',
  vnetHeader: true,
  multiQueue: true,
  attached: true,
  tun: false,
  packetInfo: false,
  headerSize: 10,
}
const LINK: LinkInfo = { index: 7, up: true, mtu: 1500, mac: new Uint8Array(6), bridge: false, master: 0 }
const ENODEV = -19

/** What devices keep for a successor, and what a predecessor is said to have kept. */
export class FakeHandover implements HandoverFiles {
  readonly kept = new Map<string, InheritedFiles>()
  readonly inherited = new Map<string, InheritedFiles>()

  keep(key: string, fds: readonly number[], facts: unknown): void {
    this.kept.set(key, { fds, facts })
  }

  forget(key: string): void {
    this.kept.delete(key)
  }

  take(key: string): InheritedFiles | undefined {
    const found = this.inherited.get(key)
    this.inherited.delete(key)
    return found
  }
}

export class FakeHost implements DeviceHost {
  /** Calls of the network that change something, e.g. `offloads 7`. */
  readonly calls: string[] = []
  readonly sent: { queue: number; message: unknown }[] = []
  readonly packets: Uint8Array[] = []
  readonly name: string = 'net0'
  readonly daemon: object = {}
  readonly signal = new AbortController().signal
  configChanges = 0
  readonly lines: { level: string; details: object; message: string }[] = []
  /** Links that exist. */
  readonly links = new Map<string, LinkInfo>()
  /** Of every tap. */
  tap: TapInfo = TAP
  /** What a call of the network returns instead of 0. */
  readonly results: Partial<Record<keyof NetworkHost, (...args: never[]) => number>> = {}
  readonly network: NetworkHost
  readonly log: DeviceHost['log']
  readonly fileInfo = fileInfo
  readonly lockFile = lockFile
  readonly fallocate = probeFallocate
  readonly handover = new FakeHandover()

  constructor() {
    const note =
      (level: string) =>
      (details: object, message: string): void =>
        void this.lines.push({ level, details, message })
    this.log = { debug: note('debug'), info: note('info'), warn: note('warn'), error: note('error') }
    const told =
      (name: keyof NetworkHost, word: string) =>
      (...args: unknown[]): number => {
        const result = (this.results[name] as ((...args: unknown[]) => number) | undefined)?.(...args) ?? 0
        if (result === 0) this.calls.push([word, ...args.slice(1)].join(' '))
        return result
      }
    const fds: number[] = []
    this.network = {
      openTap: (name, multiQueue) => {
        const result = (this.results.openTap as NetworkHost['openTap'] | undefined)?.(name, multiQueue) ?? 0
        if (result < 0) return result
        this.links.set(name, this.links.get(name) ?? LINK)
        this.tap = { ...this.tap, name, multiQueue }
        const fd = openSync('/dev/null', 'r+')
        fds.push(fd)
        return fd
      },
      tapInfo: () => this.tap,
      setTapHeaderSize: told('setTapHeaderSize', 'header'),
      setTapOffloads: told('setTapOffloads', 'offloads'),
      setTapQueue: (fd, attached) => {
        this.calls.push(`queue ${fds.indexOf(fd)} ${attached ? 'on' : 'off'}`)
        return 0
      },
      setNonblocking: told('setNonblocking', 'nonblocking'),
      link: (name) => this.links.get(name) ?? ENODEV,
      setLinkUp: told('setLinkUp', 'up'),
      setLinkMtu: told('setLinkMtu', 'mtu'),
      discardPackets: () => 0,
      addToBridge: told('addToBridge', 'bridge'),
      writePacket: (_, packet) => {
        this.packets.push(packet)
        return packet.length
      },
    }
  }

  send(queue: number, message: unknown): void {
    this.sent.push({ queue, message })
  }

  configChanged(): void {
    this.configChanges++
  }

  /** The calls since the last time. */
  take(): string[] {
    return this.calls.splice(0)
  }
}

/** {@link DeviceHost} for a device that a test holds: it remembers what the device says. */
import { fstatSync } from 'node:fs'
import type { DeviceHost, DeviceLogger, FileInfo, HandoverFiles, NetworkHost } from '../device/index.ts'
import { fallocateSync, unavailable } from './plain-io.ts'

/** A line that the device logged. */
export interface LogLine {
  readonly level: 'debug' | 'info' | 'warn' | 'error'
  readonly message: string
  readonly details: object
}

export class PlainHost implements DeviceHost {
  readonly name: string
  readonly signal: AbortSignal
  readonly daemon = {}
  readonly lines: LogLine[] = []
  /** Configuration change notifications. */
  configChanges = 0
  readonly log: DeviceLogger
  readonly network: NetworkHost
  readonly handover: HandoverFiles
  readonly #send: (queue: number, message: unknown) => void

  constructor(name: string, signal: AbortSignal, send: (queue: number, message: unknown) => void) {
    this.name = name
    this.signal = signal
    this.#send = send
    const line = (level: LogLine['level']) => (details: object, message: string) => {
      this.lines.push({ level, message, details })
    }
    this.log = { debug: line('debug'), info: line('info'), warn: line('warn'), error: line('error') }
    this.network = new Proxy({} as NetworkHost, {
      get: (_, property) => () => {
        throw unavailable(`network.${String(property)}: taps and links`)
      },
    })
    // There is no predecessor, and will be no successor.
    this.handover = { keep() {}, forget() {}, take: () => undefined }
  }

  send(queueIndex: number, message: unknown): void {
    this.#send(queueIndex, structuredClone(message))
  }

  fileInfo(fd: number): FileInfo {
    const stat = fstatSync(fd)
    const kind = stat.isFile() ? 'file' : stat.isBlockDevice() ? 'block' : 'other'
    if (kind === 'block') throw unavailable('fileInfo: block devices')
    return { kind, size: stat.size, blockSize: 512, directMemoryAlign: 0, directOffsetAlign: 0 }
  }

  /** Nobody else is there. */
  lockFile(): boolean {
    return true
  }

  fallocate(fd: number, mode: number, offset: number, length: number): number {
    return fallocateSync(fd, mode, offset, length)
  }

  configChanged(): void {
    this.configChanges++
  }
}

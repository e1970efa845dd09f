/** The {@link DeviceHost} of a device on a thread of its own: what needs the control thread goes there by messages. */
import { inspect } from 'node:util'
import type { DeviceHost, DeviceLogger, InheritedFiles } from '../device/index.ts'
import { fileInfo, lockFile, probeFallocate } from '../engine/files.ts'
import { networkHost } from '../engine/network.ts'
import type { ModuleReport } from './module-messages.ts'
import { observer } from './observer.ts'

export interface ModuleHostOptions {
  readonly name: string
  readonly signal: AbortSignal
  /** It only looks. */
  readonly observer: boolean
  /** What a predecessor kept for this device, by key. */
  readonly inherited: readonly (readonly [key: string, files: InheritedFiles])[]
  say(report: ModuleReport): void
  configChanged(): void
}

export function moduleHost({
  name,
  signal,
  observer: looks,
  inherited,
  say,
  configChanged,
}: ModuleHostOptions): DeviceHost {
  const left = new Map(inherited)
  if (looks) return { ...observer, name, signal }
  return {
    log: logger(say),
    name,
    signal,
    // Nobody else is on this thread.
    daemon: {},
    network: networkHost,
    fileInfo,
    lockFile,
    fallocate: probeFallocate,
    send: (index, message) => say({ kind: 'send', index, message }),
    configChanged,
    handover: {
      keep: (key, fds, facts) => say({ kind: 'keep', key, fds: [...fds], facts }),
      forget: (key) => say({ kind: 'forget', key }),
      take: (key) => {
        const found = left.get(key)
        if (left.delete(key)) say({ kind: 'took', key })
        return found
      },
    },
  }
}

function logger(say: (report: ModuleReport) => void): DeviceLogger {
  const write = (level: keyof DeviceLogger) => (details: object, message: string) => {
    const text = String(message)
    try {
      say({ kind: 'log', level, details, message: text })
    } catch {
      // What a message can't carry is shown as text.
      say({ kind: 'log', level, details: { details: inspect(details, { depth: 3 }) }, message: text })
    }
  }
  return { debug: write('debug'), info: write('info'), warn: write('warn'), error: write('error') }
}

/**
 * When a device's capture runs: from the first ring that is started until the device is closed; a handover to a new
 * process continues the same file. Opening a device only looks whether the file can be had, so that `--check-config`
 * and `qemu-args` beside a running daemon leave its capture alone. It must not know packets.
 */
import { accessSync, constants, lstatSync } from 'node:fs'
import { dirname, resolve } from 'node:path'
import { ConfigError, type DeviceHost } from '../../src/device/index.ts'
import { allocateCapture } from './capture.ts'
import { type Capture, startCapture } from './capture-file.ts'
import type { NetOptions } from './options.ts'

/** The files of the devices of each daemon. */
const claimed = new WeakMap<object, Set<string>>()

export class CaptureTask {
  /** The ring of each queue. */
  readonly buffers: readonly SharedArrayBuffer[]
  readonly #options: NetOptions & { readonly pcap: string }
  readonly #host: DeviceHost
  readonly #file: string
  #started = false
  /** Files of a capture before this one are continued, not replaced. */
  #continues = false
  /** A predecessor still writes the file. */
  #held: boolean
  #capture: Capture | undefined

  /**
   * @throws ConfigError when the file can't be written, or is that of another device
   */
  constructor(options: NetOptions & { readonly pcap: string }, queues: number, host: DeviceHost) {
    this.#options = options
    this.#host = host
    this.#file = resolve(options.pcap)
    checkWritable(this.#file)
    const ofDaemon = claimed.get(host.daemon) ?? new Set<string>()
    claimed.set(host.daemon, ofDaemon)
    if (ofDaemon.has(this.#file)) {
      throw refusal(`${this.#file} is the capture of another device`, 'Give each device a file of its own.')
    }
    ofDaemon.add(this.#file)
    this.buffers = Array.from({ length: queues }, () => allocateCapture())
    const key = `pcap:${host.name}`
    this.#held = host.handover.take(key) !== undefined
    host.handover.keep(key, [], {})
  }

  /** It has been started, by a ring. */
  get started(): boolean {
    return this.#started
  }

  /** Once; a capture that can't be started is told in the log, and the device goes on without. */
  start(): void {
    if (this.#started) return
    this.#started = true
    if (!this.#held) this.#begin()
  }

  /** Finishes the file; what comes later, here or in a successor, is appended to it. */
  letGo(): void {
    this.#held = true
    this.#capture?.close()
    this.#capture = undefined
  }

  /** The file is ours again, or was passed on. */
  takeOver(): void {
    if (!this.#held) return
    this.#held = false
    if (this.#started) this.#begin()
  }

  /** A start, here or in the process before this one, has created the files: they are continued. */
  continue(): void {
    this.#continues = true
  }

  #begin(): void {
    const { 'pcap-size': maxBytes, 'pcap-files': files, 'pcap-snaplen': snaplen } = this.#options
    try {
      this.#capture = startCapture(
        { file: this.#file, maxBytes, files, snaplen, append: this.#continues },
        this.buffers,
        this.#host.name,
        this.#host.log
      )
      this.#continues = true
    } catch (error) {
      this.#host.log.error({ file: this.#file, error: (error as Error).message }, 'the capture cannot be started')
    }
  }

  close(): void {
    this.#host.handover.forget(`pcap:${this.#host.name}`)
    this.#capture?.close()
    claimed.get(this.#host.daemon)?.delete(this.#file)
  }
}

/** @throws ConfigError */
function checkWritable(file: string): void {
  const fix = 'Give the path of a file that virtiod may create or replace, beside which it may create others.'
  try {
    const info = lstatSync(file, { throwIfNoEntry: false })
    if (info !== undefined && !info.isFile()) throw refusal(`${file} exists and is no regular file`, fix)
    accessSync(dirname(file), constants.W_OK | constants.X_OK)
  } catch (cause) {
    if (cause instanceof ConfigError) throw cause
    const { code } = cause as NodeJS.ErrnoException
    throw refusal(`${file} can't be created (${code})`, fix, cause)
  }
}

function refusal(problem: string, fix: string, cause?: unknown): ConfigError {
  return new ConfigError('ERR_NET_PCAP', '--pcap', problem, fix, cause === undefined ? {} : { cause })
}

/**
 * A device's capture, on the control thread: it empties the rings of all its queues (capture.ts) into pcapng files
 * (pcapng.ts), and keeps these bounded. It must not know queues or chains.
 *
 * FILE is what is being written, always; when it is full it becomes FILE.1, what was FILE.1 becomes FILE.2 (as
 * logrotate does it), and the oldest goes. Each is a complete pcapng: one section, one interface with the device's
 * name, at its end the statistics of this file with the packets that were lost. A start replaces all of them, so that
 * no packets of an earlier capture are among them; only a process that takes over from another one appends a section of
 * its own to FILE. Only the owner may read them, since they hold what guests say to one another.
 *
 * Direction is the guest's: outbound is what it sends, as in a capture inside the guest or of QEMU's filter-dump.
 * Frames are as the guest sees them: with offloads their checksums are not there yet and they are larger than the MTU.
 * Times are those of the wall clock when the daemon started plus monotonic time: they never go back.
 *
 * Writing is synchronous: a disk that is slow holds up the control thread, never the iothreads, which count as lost
 * what does not fit their rings.
 */
import {
  closeSync,
  constants,
  fstatSync,
  ftruncateSync,
  lstatSync,
  openSync,
  renameSync,
  unlinkSync,
  writeSync,
} from 'node:fs'
import { resolve } from 'node:path'
import { ConfigError, type DeviceLogger } from '../../src/device/index.ts'
import { CaptureReader } from './capture.ts'
import {
  enhancedPacket,
  INBOUND,
  interfaceDescription,
  interfaceStatistics,
  OUTBOUND,
  PACKET_HEADER_SIZE,
  packetLength,
  sectionHeader,
  Timestamp,
} from './pcapng.ts'

export interface CaptureOptions {
  readonly file: string
  /** Bytes that each file may have, 64 KiB or more. */
  readonly maxBytes: number
  /** How many files are kept, FILE included: 1 or more. */
  readonly files: number
  /** Bytes that are kept of each packet, 1 or more. */
  readonly snaplen: number
  /** Continue FILE and its predecessors, if they are there, instead of replacing them. */
  readonly append?: boolean
}

/** All of them since the start. */
export interface CaptureStats {
  /** Packets in files, those in files that are gone included. */
  readonly packets: number
  /** Packets that found their queue's ring full. */
  readonly lost: number
  /** Files begun. */
  readonly files: number
  /** It ended because a file could not be written. */
  readonly failed: boolean
}

export interface Capture {
  readonly stats: CaptureStats
  /** Writes what is left in the rings. Idempotent. */
  close(): void
}

/** Between two looks at the rings, in milliseconds: as a rule, and while one fills quickly. */
const INTERVAL = 20
const BUSY_INTERVAL = 1
/**
 * Nanoseconds that a packet stays in its ring: those that another queue captured a little earlier, and committed a
 * little later, get in front of it.
 */
const SETTLE = 2e6
/** Blocks are collected up to this size for one write. It has room for the largest one. */
const OUTPUT_BYTES = 512 * 1024
/** Frames are not larger than 65,550 bytes or so; this bounds what a record may have. */
const MAX_SNAPLEN = 256 * 1024

/** Files of captures that run in this process. */
const namesInUse = new Set<string>()

/**
 * Creates FILE and begins to capture.
 * @param buffers of `allocateCapture`, one per queue: their writers may be made before and after
 * @param name the interface's in the file
 * @throws ConfigError ERR_NET_PCAP when the file can't be created, or is another capture's
 */
export function startCapture(
  options: CaptureOptions,
  buffers: readonly SharedArrayBuffer[],
  name: string,
  log: DeviceLogger
): Capture {
  return new RunningCapture(options, buffers, name, log)
}

class RunningCapture implements Capture {
  readonly #names: readonly string[]
  readonly #maxBytes: number
  readonly #preamble: Uint8Array
  /** Bytes of the block that ends each file. */
  readonly #statisticsBytes: number
  readonly #readers: CaptureReader[]
  readonly #log: DeviceLogger
  readonly #output = new Uint8Array(OUTPUT_BYTES)
  readonly #view = new DataView(this.#output.buffer)
  readonly #time = new Timestamp()
  /** -1 when closed. */
  #fd = -1
  /** Bytes in the file, all of whole blocks, and bytes waiting in `#output`. */
  #written = 0
  #waiting = 0
  #timer: NodeJS.Timeout | undefined
  #packets = 0
  #packetsWritten = 0
  #files = 0
  #failed = false
  #lost = 0
  /** `lost` of each reader, as last seen: it wraps. */
  readonly #lostSeen: number[]
  // At the start of this file.
  #packetsBefore = 0
  #lostBefore = 0

  constructor(options: CaptureOptions, buffers: readonly SharedArrayBuffer[], name: string, log: DeviceLogger) {
    const file = resolve(options.file)
    this.#names = Array.from({ length: options.files }, (_, age) => (age === 0 ? file : `${file}.${age}`))
    this.#maxBytes = options.maxBytes
    this.#log = log
    const section = sectionHeader('virtiod')
    this.#statisticsBytes = interfaceStatistics(0, this.#time, 0, 0).length
    // One packet fits a file, whatever the options say.
    const overhead = section.length + interfaceDescription(name, 0).length + this.#statisticsBytes + packetLength(3)
    const snaplen = Math.min(options.snaplen, MAX_SNAPLEN, options.maxBytes - overhead)
    this.#preamble = Buffer.concat([section, interfaceDescription(name, snaplen)])
    this.#readers = buffers.map((buffer) => new CaptureReader(buffer))
    this.#lostSeen = this.#readers.map((reader) => reader.lost)
    this.#begin(options.append === true)
    for (const reader of this.#readers) reader.enable(snaplen)
    this.#schedule(INTERVAL)
  }

  get stats(): CaptureStats {
    this.#countLost()
    return { packets: this.#packets, lost: this.#lost, files: this.#files, failed: this.#failed }
  }

  close(): void {
    if (this.#fd < 0) return
    clearTimeout(this.#timer)
    for (const reader of this.#readers) reader.enable(0)
    try {
      this.#drain(true)
      this.#finish()
    } catch (error) {
      this.#fail(error as NodeJS.ErrnoException)
    }
    this.#release()
    const { packets, lost } = this.stats
    if (lost > 0) this.#log.warn({ packets, lost, file: this.#names[0] }, 'packets are missing from the capture')
  }

  #begin(append: boolean): void {
    const [file] = this.#names
    const taken = this.#names.find((path) => namesInUse.has(path))
    if (taken !== undefined) {
      throw new ConfigError(
        'ERR_NET_PCAP',
        '--pcap',
        `${taken} belongs to the capture of another device`,
        'Give each device a file of its own.'
      )
    }
    try {
      // All of them are looked at before one is touched.
      const present = this.#names.filter(isRegular)
      if (append && present[0] === file) this.#continue(present.length)
      else {
        if (!append) for (const path of present) unlinkSync(path)
        this.#create()
      }
    } catch (error) {
      const { code, message } = error as NodeJS.ErrnoException
      throw new ConfigError(
        'ERR_NET_PCAP',
        '--pcap',
        code === undefined ? message : `cannot create ${file} (${code})`,
        'Give the path of a file that virtiod may create or replace, beside which it may create others.',
        { cause: error }
      )
    }
    for (const path of this.#names) namesInUse.add(path)
  }

  #schedule(delay: number): void {
    this.#timer = setTimeout(() => this.#tick(), delay)
    this.#timer.unref()
  }

  #tick(): void {
    try {
      const busy = this.#drain(false)
      this.#flush()
      this.#schedule(busy ? BUSY_INTERVAL : INTERVAL)
    } catch (error) {
      this.#fail(error as NodeJS.ErrnoException)
    }
  }

  /**
   * Writes the packets of all rings in the order of their times; those that are very new only if `all`. Returns whether
   * a ring was more than an eighth full.
   */
  #drain(all: boolean): boolean {
    const now = performance.now() / 1000 + performance.timeOrigin / 1000
    const second = Math.floor(now)
    this.#time.set(second, Math.floor((now - second) * 1e9))
    const { high, low } = this.#time
    let busy = false
    for (const reader of this.#readers) {
      reader.refresh()
      busy ||= reader.used > reader.bytes.length / 8
    }
    for (;;) {
      let oldest: CaptureReader | undefined
      for (const reader of this.#readers) {
        if (!reader.peek()) continue
        if (oldest === undefined || isOlder(reader, oldest)) oldest = reader
      }
      if (oldest === undefined) break
      // Of the other sign as well: a thread's clock may be ahead of ours by a little.
      const age = (high - oldest.timeHigh) * 0x1_0000_0000 + (low - oldest.timeLow)
      if (!all && Math.abs(age) < SETTLE) break
      this.#write(oldest)
      oldest.next()
    }
    return busy
  }

  #write(reader: CaptureReader): void {
    const length = packetLength(reader.length)
    if (this.#written + this.#waiting + length + this.#statisticsBytes > this.#maxBytes) {
      this.#finish()
      this.#rotate()
    }
    if (this.#waiting + length > OUTPUT_BYTES) this.#flush()
    this.#time.high = reader.timeHigh
    this.#time.low = reader.timeLow
    const direction = reader.outbound ? OUTBOUND : INBOUND
    enhancedPacket(this.#view, this.#waiting, 0, this.#time, reader.length, reader.originalLength, direction)
    const bytes = reader.bytes.subarray(reader.at, reader.at + reader.length)
    this.#output.set(bytes, this.#waiting + PACKET_HEADER_SIZE)
    this.#waiting += length
    this.#packets++
  }

  #flush(): void {
    writeAll(this.#fd, this.#output, this.#waiting)
    this.#written += this.#waiting
    this.#waiting = 0
    this.#packetsWritten = this.#packets
  }

  /** Ends the file with its statistics. `#time` is that of its last packet, or now. */
  #finish(): void {
    this.#countLost()
    const lost = this.#lost - this.#lostBefore
    // As libpcap counts: what was lost was received as well.
    const received = this.#packets - this.#packetsBefore + lost
    if (this.#waiting + this.#statisticsBytes > OUTPUT_BYTES) this.#flush()
    this.#output.set(interfaceStatistics(0, this.#time, received, lost), this.#waiting)
    this.#waiting += this.#statisticsBytes
    this.#flush()
    const fd = this.#fd
    this.#fd = -1
    closeSync(fd)
  }

  /** Makes FILE free. Somebody may have removed or renamed some of the files: that's their right. */
  #rotate(): void {
    const names = this.#names
    const last = Math.min(names.length - 1, this.#files)
    for (let age = last; age > 0; age--) ignoringMissing(() => renameSync(names[age - 1]!, names[age]!))
    if (last === 0) ignoringMissing(() => unlinkSync(names[0]!))
    this.#create()
  }

  /** Begins a section of our own behind what is in FILE, or in the next file when it is full. */
  #continue(files: number): void {
    this.#files = files
    const fd = openSync(this.#names[0]!, constants.O_WRONLY | constants.O_APPEND | constants.O_NOFOLLOW)
    try {
      const { size } = fstatSync(fd)
      if (size + this.#preamble.length + this.#statisticsBytes + packetLength(3) > this.#maxBytes) {
        this.#rotate()
        closeSync(fd)
        return
      }
      writeAll(fd, this.#preamble, this.#preamble.length)
      this.#fd = fd
      this.#written = size + this.#preamble.length
    } catch (error) {
      closeSync(fd)
      throw error
    }
  }

  #create(): void {
    const path = this.#names[0]!
    // O_EXCL: not through a link that somebody put there.
    const fd = openSync(path, constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL, 0o600)
    try {
      writeAll(fd, this.#preamble, this.#preamble.length)
    } catch (error) {
      closeSync(fd)
      unlinkSync(path)
      throw error
    }
    this.#fd = fd
    this.#written = this.#preamble.length
    this.#files++
    this.#packetsBefore = this.#packets
    this.#lostBefore = this.#lost
  }

  /** A disk is full, or the like: nobody's packets wait for it to get better. */
  #fail(error: NodeJS.ErrnoException): void {
    clearTimeout(this.#timer)
    for (const reader of this.#readers) reader.enable(0)
    this.#failed = true
    if (this.#fd >= 0) {
      const fd = this.#fd
      this.#fd = -1
      try {
        // Part of a block may have been written.
        ftruncateSync(fd, this.#written)
        closeSync(fd)
      } catch (again) {
        this.#log.debug({ error: (again as Error).message }, 'nor can the file of the capture be cut to whole packets')
      }
    }
    this.#packets = this.#packetsWritten
    this.#release()
    const details = { file: this.#names[0], code: error.code, error: error.message }
    this.#log.error(details, 'the capture has ended, its file cannot be written; the device goes on without')
  }

  #release(): void {
    for (const path of this.#names) namesInUse.delete(path)
  }

  #countLost(): void {
    for (const [index, reader] of this.#readers.entries()) {
      const { lost } = reader
      this.#lost += (lost - this.#lostSeen[index]!) >>> 0
      this.#lostSeen[index] = lost
    }
  }
}

function isOlder(a: CaptureReader, b: CaptureReader): boolean {
  return a.timeHigh < b.timeHigh || (a.timeHigh === b.timeHigh && a.timeLow < b.timeLow)
}

/** Whether there is a regular file. @throws Error when it is something else, which must not be replaced */
function isRegular(path: string): boolean {
  const info = lstatSync(path, { throwIfNoEntry: false })
  if (info !== undefined && !info.isFile()) throw new Error(`${path} exists and is no regular file`)
  return info !== undefined
}

function ignoringMissing(work: () => void): void {
  try {
    work()
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error
  }
}

/** @throws a system error; part of it may have been written then */
function writeAll(fd: number, bytes: Uint8Array, length: number): void {
  for (let at = 0; at < length; ) at += writeSync(fd, bytes, at, length - at)
}

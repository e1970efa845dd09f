/** Capture files: what tshark and capinfos read in them, rotation, and what goes wrong. */
import { execFileSync } from 'node:child_process'
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest'
import { allocateCapture, CaptureWriter } from '../../devices/net/capture.ts'
import { type Capture, type CaptureOptions, startCapture } from '../../devices/net/capture-file.ts'
import { ConfigError, type DeviceLogger } from '../../src/device/index.ts'
import { frame } from './capture-frame.ts'

const SNAPLEN = 262144

let directory: string
let running: Capture[] = []
let said: { level: string; details: object; message: string }[] = []

const say =
  (level: string) =>
  (details: object, message: string): void => {
    said.push({ level, details, message })
  }
const log: DeviceLogger = { debug: say('debug'), info: say('info'), warn: say('warn'), error: say('error') }

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'virtiod-capture-'))
  said = []
})

afterEach(() => {
  for (const capture of running) capture.close()
  running = []
  rmSync(directory, { recursive: true, force: true })
})

describe('files', () => {
  const file = (age = 0): string => join(directory, age === 0 ? 'net.pcapng' : `net.pcapng.${age}`)

  function start(
    options: Partial<CaptureOptions> = {},
    queues = 2,
    ringBytes = 1 << 20
  ): { capture: Capture; writers: CaptureWriter[] } {
    const buffers = Array.from({ length: queues }, () => allocateCapture(ringBytes))
    const given = { file: file(), maxBytes: 1 << 20, files: 4, snaplen: SNAPLEN, ...options }
    const capture = startCapture(given, buffers, 'net0', log)
    running.push(capture)
    return { capture, writers: buffers.map((buffer) => new CaptureWriter(buffer)) }
  }

  /** One line per packet, by tshark. */
  function tshark(path: string, ...fields: string[]): string[][] {
    const args = ['-r', path, '-T', 'fields', ...fields.flatMap((field) => ['-e', field])]
    const text = execFileSync('tshark', args, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] })
    return text
      .split('\n')
      .filter((line) => line !== '')
      .map((line) => line.split('\t'))
  }

  /** Types and contents of a file's blocks, which have to fill it. */
  function blocks(path: string): { type: number; body: DataView }[] {
    const bytes = readFileSync(path)
    const found = []
    for (let at = 0; at < bytes.length; ) {
      const length = bytes.readUInt32LE(at + 4)
      expect(bytes.readUInt32LE(at + length - 4)).toBe(length)
      found.push({
        type: bytes.readUInt32LE(at),
        body: new DataView(bytes.buffer, bytes.byteOffset + at + 8, length - 12),
      })
      at += length
    }
    return found
  }

  /** Packets received and dropped, from the statistics at the file's end. */
  function statistics(path: string): { received: number; dropped: number } {
    const { type, body } = blocks(path).at(-1)!
    expect(type).toBe(5)
    // Interface id and time, then the options 4 and 5, eight bytes each.
    expect([body.getUint16(12, true), body.getUint16(24, true)]).toEqual([4, 5])
    return { received: Number(body.getBigUint64(16, true)), dropped: Number(body.getBigUint64(28, true)) }
  }

  test('packets of all queues, in the order of their times, with length, direction and bytes', () => {
    const { capture, writers } = start({ snaplen: 100 })
    const [receive, transmit] = writers as [CaptureWriter, CaptureWriter]
    const before = Date.now() / 1000
    const now = performance.now()
    // Microseconds that are exact in ns, on either side of a second's end.
    const at = [5, 1, 1000.25, 3].map((offset) => now - 2000 + offset)
    const put = (writer: CaptureWriter, i: number, length: number, outbound: boolean): void => {
      const position = writer.begin(length, length, outbound, at[i]!)
      writer.bytes.set(frame(i, length).subarray(0, writer.snaplen), position)
      writer.commit()
    }
    put(transmit, 1, 60, true)
    put(transmit, 0, 61, true)
    put(receive, 3, 14, false)
    put(receive, 2, 1514, false)
    capture.close()
    const rows = tshark(
      file(),
      'frame.len',
      'frame.cap_len',
      'frame.packet_flags_direction',
      'frame.interface_name',
      'eth.type',
      'frame.time_epoch'
    )
    expect(rows.map((row) => row.slice(0, 5))).toEqual([
      ['60', '60', '0x00000002', 'net0', '0x88b5'],
      ['14', '14', '0x00000001', 'net0', '0x88b5'],
      ['61', '61', '0x00000002', 'net0', '0x88b5'],
      ['1514', '100', '0x00000001', 'net0', '0x88b5'],
    ])
    const times = rows.map((row) => row[5]!)
    expect(times.every((time) => /^\d+\.\d{9}$/.test(time))).toBe(true)
    const ns = times.map((time) => BigInt(time.replace('.', '')))
    expect(ns.map((time) => Number(time - ns[0]!) / 1e6)).toEqual([0, 2, 4, 999.25].map((ms) => expect.closeTo(ms, 5)))
    // Two seconds ago, by the wall clock; nobody sets it by a minute meanwhile.
    expect(Math.abs(Number(times[0]) - (before - 2))).toBeLessThan(60)
    expect(capture.stats).toEqual({ packets: 4, lost: 0, files: 1, failed: false })
    expect(statistics(file())).toEqual({ received: 4, dropped: 0 })
    const info = execFileSync('capinfos', [file()], { encoding: 'utf8' })
    expect(info).toMatch(/Strict time order:\s+True/)
    expect(info).toMatch(/Time precision = nanoseconds/)
    expect(
      blocks(file())
        .slice(2, -1)
        .map(({ body }) => new Uint8Array(body.buffer, body.byteOffset + 20, body.getUint32(12, true)))
    ).toEqual([1, 3, 0, 2].map((i) => frame(i, [61, 60, 1514, 14][i]!).slice(0, 100)))
    expect(said).toEqual([])
  })

  test('the order is right over seconds, and for more packets than one write takes', () => {
    const { capture, writers } = start()
    const now = performance.now()
    const PACKETS = 800
    // Every 50 ms one, in turn: 40 seconds, in which the lower half of the time wraps nine times.
    for (let i = 0; i < PACKETS; i++) {
      const writer = writers[i % 2]!
      writer.begin(1000, i, true, now - (PACKETS - i) * 50)
      writer.addBytes(frame(i, 1000), 0, 1000)
      writer.commit()
    }
    capture.close()
    expect(statSync(file()).size).toBeGreaterThan(PACKETS * 1000)
    const rows = tshark(file(), 'frame.len', 'eth.dst')
    expect(rows.map(([length]) => Number(length))).toEqual(Array.from({ length: PACKETS }, (_, i) => i))
    expect(rows.map(([, to]) => Number.parseInt(to!, 16))).toEqual(rows.map((_, i) => (i * 31) % 256))
  })

  test('packets get into the file by themselves, whole ones only', async () => {
    const { writers, capture } = start()
    writers[0]!.fromBytes(frame(1, 200), 0, 200, true)
    await vi.waitFor(() => expect(blocks(file()).map(({ type }) => type)).toEqual([0x0a0d0d0a, 1, 6]), 5000)
    expect(tshark(file(), 'frame.len')).toEqual([['200']])
    writers[1]!.fromBytes(frame(2, 300), 0, 300, true)
    await vi.waitFor(() => expect(tshark(file(), 'frame.len')).toEqual([['200'], ['300']]), 5000)
    expect(capture.stats).toMatchObject({ packets: 2, lost: 0 })
  })

  test('a packet waits a little for older ones that other queues commit later', () => {
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] })
    const origin = performance.now()
    let now = origin
    const clock = vi.spyOn(performance, 'now').mockImplementation(() => now)
    try {
      const { capture, writers } = start()
      const advance = (ms: number): void => {
        now += ms
        vi.advanceTimersByTime(ms)
      }
      advance(19)
      writers[0]!.fromBytes(frame(1, 100), 0, 100, true)
      advance(1)
      expect(capture.stats.packets).toBe(0)
      expect(writers[1]!.begin(200, 200, false, origin + 18)).toBeGreaterThanOrEqual(0)
      writers[1]!.commit()
      advance(20)
      expect(capture.stats.packets).toBe(2)
      expect(tshark(file(), 'frame.len')).toEqual([['200'], ['100']])
      // One from the future doesn't block its ring.
      writers[0]!.begin(300, 300, true, origin + 1e6)
      writers[0]!.commit()
      advance(20)
      expect(capture.stats.packets).toBe(3)
    } finally {
      clock.mockRestore()
      vi.useRealTimers()
    }
  })

  test('a ring that fills quickly is emptied more often', () => {
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] })
    try {
      const { capture, writers } = start({}, 1, 65536)
      const fill = (): void => {
        for (let i = 0; i < 50; i++) {
          writers[0]!.begin(1000, 1000, true, 0)
          writers[0]!.commit()
        }
      }
      fill()
      vi.advanceTimersByTime(20)
      expect(capture.stats.packets).toBe(50)
      fill()
      vi.advanceTimersByTime(1)
      expect(capture.stats).toMatchObject({ packets: 100, lost: 0 })
    } finally {
      vi.useRealTimers()
    }
  })

  test('rotation keeps the newest files, each complete and below the size', () => {
    const maxBytes = 64 * 1024
    const { capture, writers } = start({ maxBytes, files: 3 })
    // 500 times 1,044 bytes: nine files, of which three stay.
    for (let i = 0; i < 500; i++) writers[i % 2]!.fromBytes(frame(i, 1000), 0, 1000, i % 2 === 1)
    capture.close()
    expect(readdirSync(directory).sort()).toEqual(['net.pcapng', 'net.pcapng.1', 'net.pcapng.2'])
    expect(capture.stats).toEqual({ packets: 500, lost: 0, files: 9, failed: false })
    const numbers: number[] = []
    for (const age of [2, 1, 0]) {
      expect(statSync(file(age)).size).toBeLessThanOrEqual(maxBytes)
      // No further packet would have fitted a file that was left.
      if (age > 0) expect(statSync(file(age)).size).toBeGreaterThan(maxBytes - 1044)
      const rows = tshark(file(age), 'frame.packet_flags_direction', 'eth.dst')
      expect(statistics(file(age))).toEqual({ received: rows.length, dropped: 0 })
      numbers.push(...rows.map((row) => Number.parseInt(row[1]!, 16)))
      expect(execFileSync('capinfos', [file(age)], { encoding: 'utf8' })).toMatch(/Strict time order:\s+True/)
    }
    // The first byte of a frame is its number * 31, modulo 256: the last ones, without a gap.
    expect(numbers.length).toBeGreaterThan(62 * 2)
    expect(numbers).toEqual(numbers.map((_, i) => ((500 - numbers.length + i) * 31) % 256))
  })

  test.each([14, 15, 60, 100, 300])('no file is larger, with packets of %i bytes', (length) => {
    const maxBytes = 64 * 1024
    const { capture, writers } = start({ maxBytes, files: 10 })
    const bytes = frame(1, length)
    for (let left = 5 * maxBytes; left > 0; left -= length + 44) writers[0]!.fromBytes(bytes, 0, length, true)
    capture.close()
    const files = readdirSync(directory).map((name) => join(directory, name))
    expect(files.length).toBeGreaterThanOrEqual(5)
    for (const path of files) {
      expect(statSync(path).size).toBeLessThanOrEqual(maxBytes)
      expect(blocks(path).at(-1)!.type).toBe(5)
    }
  })

  test('a single file is begun anew when it is full', () => {
    const { capture, writers } = start({ maxBytes: 64 * 1024, files: 1 })
    for (let i = 0; i < 100; i++) writers[0]!.fromBytes(frame(i, 1000), 0, 1000, true)
    capture.close()
    expect(readdirSync(directory)).toEqual(['net.pcapng'])
    expect(capture.stats).toMatchObject({ packets: 100, files: 2 })
    expect(tshark(file(), 'frame.len').length).toBeLessThan(63)
  })

  test('files that somebody took away are not missed', () => {
    const { capture, writers } = start({ maxBytes: 64 * 1024, files: 3 })
    rmSync(file())
    for (let i = 0; i < 100; i++) writers[0]!.fromBytes(frame(i, 1000), 0, 1000, true)
    capture.close()
    expect(readdirSync(directory)).toEqual(['net.pcapng'])
    expect(capture.stats).toMatchObject({ packets: 100, files: 2, failed: false })
  })

  test('a packet fits the smallest file, cut', () => {
    const { capture, writers } = start({ maxBytes: 64 * 1024, files: 2 })
    for (let i = 0; i < 3; i++) writers[0]!.fromBytes(frame(i, 65550), 0, 65550, true)
    capture.close()
    expect(capture.stats).toEqual({ packets: 3, lost: 0, files: 3, failed: false })
    for (const age of [0, 1]) {
      expect(statSync(file(age)).size).toBeLessThanOrEqual(64 * 1024)
      const [[length, kept] = []] = tshark(file(age), 'frame.len', 'frame.cap_len')
      expect(length).toBe('65550')
      expect(Number(kept)).toBeGreaterThan(65000)
    }
  })

  test('lost packets are counted, in the file too, in that in which they are missing', () => {
    const { capture, writers } = start({}, 1, 4096)
    for (let i = 0; i < 10; i++) writers[0]!.fromBytes(frame(i, 1000), 0, 1000, true)
    capture.close()
    expect(capture.stats).toEqual({ packets: 4, lost: 6, files: 1, failed: false })
    expect(statistics(file())).toEqual({ received: 10, dropped: 6 })
    expect(said).toEqual([
      {
        level: 'warn',
        details: { packets: 4, lost: 6, file: file() },
        message: 'packets are missing from the capture',
      },
    ])
    expect(tshark(file(), 'frame.len')).toHaveLength(4)
  })

  test('the files after that are not told of them again', () => {
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] })
    try {
      const { capture, writers } = start({ maxBytes: 64 * 1024, files: 5 }, 1, 4096)
      for (let i = 0; i < 70; i++) {
        // The first time ten, of which six are lost, then four at a time.
        const count = i === 0 ? 10 : 4
        for (let k = 0; k < count; k++) {
          writers[0]!.begin(1000, 1000, true, 0)
          writers[0]!.commit()
        }
        vi.advanceTimersByTime(20)
      }
      capture.close()
      expect(capture.stats).toMatchObject({ packets: 280, lost: 6, files: 5 })
    } finally {
      vi.useRealTimers()
    }
    // 62 packets fill a file.
    expect([4, 3, 2, 1, 0].map((age) => statistics(file(age)))).toEqual([
      { received: 68, dropped: 6 },
      ...Array<object>(3).fill({ received: 62, dropped: 0 }),
      { received: 280 - 4 * 62, dropped: 0 },
    ])
  })

  test('what an earlier capture left is replaced, all of it; other files are let alone', () => {
    for (const age of [0, 1, 3, 4]) writeFileSync(file(age), 'old')
    start().capture.close()
    expect(readdirSync(directory).sort()).toEqual(['net.pcapng', 'net.pcapng.4'])
    expect(blocks(file()).map(({ type }) => type)).toEqual([0x0a0d0d0a, 1, 5])
    expect(statSync(file()).mode & 0o777).toBe(0o600)
  })

  test('nothing is captured after the end, and close ends but once', () => {
    const { capture, writers } = start()
    capture.close()
    writers[0]!.fromBytes(frame(0, 60), 0, 60, true)
    const size = statSync(file()).size
    capture.close()
    expect([statSync(file()).size, capture.stats.lost, said]).toEqual([size, 0, []])
  })

  describe("the operator's errors", () => {
    function refusal(options: Partial<CaptureOptions> = {}): string {
      try {
        start(options)
      } catch (error) {
        expect(error).toBeInstanceOf(ConfigError)
        const { code, option, message } = error as ConfigError
        expect([code, option]).toEqual(['ERR_NET_PCAP', '--pcap'])
        return message
      }
      throw new Error('it was not refused')
    }

    test('a directory that does not exist', () => {
      const path = join(directory, 'no', 'net.pcapng')
      expect(refusal({ file: path })).toBe(
        `--pcap: cannot create ${path} (ENOENT). Give the path of a file that virtiod may create or replace, beside which it may create others.`
      )
    })

    test('what is no file is not replaced, and nothing else is either', () => {
      writeFileSync(file(), 'old')
      mkdirSync(file(1))
      expect(refusal()).toContain(`${file(1)} exists and is no regular file`)
      expect(readFileSync(file(), 'utf8')).toBe('old')
      expect(refusal({ file: '/dev/null' })).toContain('/dev/null exists and is no regular file')
      symlinkSync(file(), join(directory, 'link'))
      expect(refusal({ file: join(directory, 'link') })).toContain('is no regular file')
      expect(refusal({ file: directory })).toContain('is no regular file')
      expect(existsSync('/dev/null')).toBe(true)
    })

    test('a file of another capture, its older ones included, until that ends', () => {
      const { capture } = start()
      expect(refusal()).toContain(`${file()} belongs to the capture of another device`)
      expect(refusal({ file: file(3) })).toContain('belongs to the capture of another device')
      const other = start({ file: file(4) })
      other.capture.close()
      capture.close()
      start().capture.close()
    })
  })

  test('when the next file cannot be made the capture ends, with one line', () => {
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] })
    try {
      const { capture, writers } = start({ maxBytes: 64 * 1024, files: 2 })
      mkdirSync(file(1))
      for (let i = 0; i < 100; i++) {
        writers[0]!.begin(1000, 1000, true, 0)
        writers[0]!.commit()
      }
      vi.advanceTimersByTime(100)
      expect(capture.stats).toEqual({ packets: 62, lost: 0, files: 1, failed: true })
      expect(writers[0]!.snaplen).toBe(0)
    } finally {
      vi.useRealTimers()
    }
    expect(said.map(({ level, message }) => [level, message])).toEqual([
      ['error', 'the capture has ended, its file cannot be written; the device goes on without'],
    ])
    expect(said[0]!.details).toMatchObject({ file: file(), code: 'EISDIR' })
    expect(statistics(file())).toEqual({ received: 62, dropped: 0 })
    // The path is free again.
    rmSync(file(1), { recursive: true })
    start().capture.close()
  })

  test('a full disk ends the capture, not the process, and leaves whole packets', () => {
    // The limit on a file's size (RLIMIT_FSIZE) is met in the middle of a packet, as a full disk is.
    const script = `
      const [{ startCapture }, { allocateCapture, CaptureWriter }] = await Promise.all(process.argv.slice(2).map((m) => import(m)))
      process.on('SIGXFSZ', () => {})
      const lines = []
      const log = { debug() {}, info() {}, warn() {}, error: (details, message) => lines.push([details.code, message]) }
      const buffer = allocateCapture(1 << 20)
      const capture = startCapture({ file: ${JSON.stringify(file())}, maxBytes: 1 << 20, files: 2, snaplen: 65536 }, [buffer], 'net0', log)
      const writer = new CaptureWriter(buffer)
      const bytes = new Uint8Array(1000)
      const until = async (done) => { while (!done()) await new Promise((resolve) => setTimeout(resolve, 5)) }
      for (let i = 0; i < 10; i++) writer.fromBytes(bytes, 0, 1000, true)
      await until(() => capture.stats.packets === 10)
      for (let i = 0; i < 20; i++) writer.fromBytes(bytes, 0, 1000, true)
      await until(() => capture.stats.failed)
      for (let i = 0; i < 5000; i++) writer.fromBytes(bytes, 0, 1000, true)
      capture.close()
      console.log(JSON.stringify({ lines, stats: capture.stats, snaplen: writer.snaplen }))`
    const modules = ['capture-file', 'capture'].map(
      (name) => new URL(`../../devices/net/${name}.ts`, import.meta.url).href
    )
    const child = join(directory, 'child.mjs')
    writeFileSync(child, script)
    const output = execFileSync('prlimit', ['--fsize=20000', process.execPath, child, ...modules], { encoding: 'utf8' })
    expect(JSON.parse(output)).toEqual({
      lines: [['EFBIG', 'the capture has ended, its file cannot be written; the device goes on without']],
      stats: { packets: 10, lost: 0, files: 1, failed: true },
      snaplen: 0,
    })
    expect(blocks(file()).map(({ type }) => type)).toEqual([0x0a0d0d0a, 1, ...Array<number>(10).fill(6)])
    expect(tshark(file(), 'frame.len')).toHaveLength(10)
  })
})

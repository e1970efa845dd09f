/**
 * The virtiod that is fuzzed: a child process with a device of each kind for the fuzzers and three that serve
 * well-behaved front-ends all the time. It says whether the process is well: alive, other sessions served and their data
 * untouched, nothing left of sessions that ended, and no word in its log of a failure of its own.
 */
import {
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  readSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { BlkDriver } from '../../src/frontend/blk.ts'
import { layouts } from '../../src/frontend/memory.ts'
import { NetDriver } from '../../src/frontend/net.ts'
import { Session } from '../../src/frontend/session.ts'
import { sleepMs } from '../../src/frontend/virtqueue.ts'
import { native } from '../../src/native.ts'
import { VHOST_TRANSFER_STATE_DIRECTION_SAVE } from '../../src/vhost-user/wire.ts'
import { Daemon } from '../crash/daemon.ts'
import { type Footprint, footprint } from '../crash/reconnects.ts'
import type { Random } from './random.ts'
import { BLK_QUEUES, GUEST_CID, NET_PAIRS, SCSI_QUEUES, VICTIM_NAMES, VICTIMS, type Victim } from './victims.ts'

const MIB = 2 ** 20
const DISK_BYTES = 4 * MIB
/** What a ring of the victims may have at most. */
export const QUEUE_SIZE = 256
const victimModule = fileURLToPath(new URL('./victim-module.ts', import.meta.url))
/** What fills the disk and the frames of the others: it must turn up nowhere else. */
export const SECRET = Buffer.from('the other guest, whose data nobody else may see')
/** What fills the disk of the victim. */
const DISK_BYTE = 0x5d
/**
 * What must not be in the log: messages of failures that are virtiod's own. A front-end or guest at fault is told of in
 * other words.
 */
const OWN_FAILURES = /the device failed|the session failed|cannot go on in this process|uncaught|TypeError|RangeError/
/** How much more it may hold at the end than when it was warm. */
const RSS_ROOM = 96 * MIB
const MAPPINGS_ROOM = 400

/** virtiod did something that no front-end and no guest may be able to make it do. */
export class Misbehaviour extends Error {
  override readonly name = 'Misbehaviour'
}

export interface TargetOptions {
  readonly emulated?: boolean
}

export class Target {
  readonly directory = mkdtempSync(join(tmpdir(), 'virtiod-fuzz-'))
  readonly daemon: Daemon
  #logFd = -1
  #logAt = 0
  #baseline: Footprint | undefined
  #warm: Footprint | undefined
  #files: readonly string[] = []
  #session!: Session
  #disk!: BlkDriver
  #cards: NetDriver[] = []
  /** What the disk of the others has, by 4 KiB. */
  readonly #written = new Map<number, number>()

  constructor(options: TargetOptions = {}) {
    const at = (name: string): string => join(this.directory, name)
    writeFileSync(at('victim.img'), Buffer.alloc(DISK_BYTES, DISK_BYTE))
    writeFileSync(at('well.img'), Buffer.alloc(DISK_BYTES, SECRET))
    const card = (name: string, net: string, last: number): object => ({
      type: 'net',
      name,
      'socket-path': `${name}.sock`,
      switch: net,
      mac: `52:54:00:66:00:0${last}`,
      'queue-pairs': NET_PAIRS,
    })
    writeFileSync(at('unit.img'), Buffer.alloc(DISK_BYTES, DISK_BYTE))
    // What this guest says to port 1 are commands for that one's keyboard.
    symlinkSync(at('control.sock'), at('host.sock_1'))
    const config = {
      'log-level': 'error',
      iothreads: 2,
      devices: [
        {
          type: 'blk',
          name: 'blk',
          'socket-path': 'blk.sock',
          'blk-file': 'victim.img',
          'num-queues': BLK_QUEUES,
        },
        card('net', 'hostile', 1),
        {
          type: 'scsi',
          name: 'scsi',
          'socket-path': 'scsi.sock',
          lun: ['unit.img'],
          'num-queues': SCSI_QUEUES,
          discard: 'on',
        },
        { type: 'rng', name: 'rng', 'socket-path': 'rng.sock' },
        { type: 'vsock', name: 'vsock', 'socket-path': 'vsock.sock', 'guest-cid': GUEST_CID, 'uds-path': 'host.sock' },
        { type: 'input', name: 'input', 'socket-path': 'input.sock', control: 'control.sock', 'key-delay': 0 },
        { type: 'device', name: 'module', 'socket-path': 'module.sock', module: victimModule },
        // It hears what the victim sends, and has no offloads: what is sent must be cut for it.
        card('neighbour', 'hostile', 2),
        { type: 'blk', name: 'well', 'socket-path': 'well.sock', 'blk-file': 'well.img', 'num-queues': 2 },
        card('left', 'quiet', 3),
        card('right', 'quiet', 4),
      ],
    }
    writeFileSync(at('virtiod.json'), JSON.stringify(config))
    // The last of its sockets: when that listens, all do.
    this.daemon = new Daemon(at('right.sock'), ['run', at('virtiod.json')], at('log'), {
      socketOption: false,
      env: {
        VIRTIOD_IO_URING: options.emulated === true ? 'off' : 'on',
        // V8 lets garbage pile up as long as there is memory; held to this, what grows on is a leak, and ends the process.
        NODE_OPTIONS: '--max-old-space-size=64',
      },
    })
  }

  socketOf(victim: Victim): string {
    return join(this.directory, `${victim}.sock`)
  }

  /** Until it listens, and the well-behaved sessions are there. */
  async start(): Promise<void> {
    if (!(await this.daemon.listening(60_000))) throw new Error(`virtiod does not start:\n${this.daemon.log}`)
    this.#logFd = openSync(join(this.directory, 'log'), 'r')
    this.#session = Session.open(join(this.directory, 'well.sock'), { memory: layouts.single(2 * MIB) })
    this.#disk = new BlkDriver(this.#session.queue(), this.#session.memory, MIB)
    for (const name of ['left', 'right', 'neighbour']) {
      const session = Session.open(join(this.directory, `${name}.sock`), {
        queues: 0,
        memory: layouts.single(4 * MIB),
        // None of the offloads: CSUM, GUEST_* and MRG_RXBUF.
        withoutFeatures: name === 'neighbour' ? [0, 1, 7, 8, 9, 10, 15, 54, 55] : [],
      })
      this.#cards.push(new NetDriver(session, { control: false, rxBuffers: 32, queueSize: 64 }))
    }
    // What is opened once, at the first session of a device, is not left of a session.
    for (const victim of VICTIM_NAMES) {
      const socket = this.socketOf(victim)
      Session.open(socket, { queues: Math.min(2, VICTIMS[victim]), memory: layouts.single(MIB) }).close()
      transferState(socket)
    }
    sleepMs(200)
    this.#baseline = footprint(this.pid)
    this.#files = openFiles(this.pid)
  }

  get pid(): number {
    return this.daemon.pid
  }

  /** A line for people. */
  get figures(): string {
    const { resident, virtual, fds, mappings } = footprint(this.pid)
    const mib = (bytes: number): string => `${(bytes / MIB).toFixed(0)} MiB`
    return `RSS ${mib(resident)}, ${mib(virtual)} mapped in ${mappings}, ${fds} fds`
  }

  /** What was held when the first sessions had been served. */
  warm(): void {
    this.#warm = footprint(this.pid)
  }

  /**
   * Looks whether virtiod is well. @param open sessions of a fuzzer are open
   * @throws Misbehaviour
   */
  check(random: Random, open = false): void {
    this.alive()
    this.#checkDisk(random)
    this.#checkCards(random)
    if (!open) this.#checkFootprint()
    this.#checkLog()
  }

  /** @throws Misbehaviour */
  alive(): void {
    let state: string | undefined
    try {
      state = /^State:\s+(\S)/m.exec(readFileSync(`/proc/${this.pid}/status`, 'utf8'))?.[1]
    } catch {
      // It is gone altogether.
    }
    if (state === undefined || state === 'Z')
      throw new Misbehaviour(`virtiod is dead:\n${this.daemon.log.slice(-6000)}`)
  }

  /** Ends it, as an operator does, and looks at what it leaves. @throws Misbehaviour */
  async stop(): Promise<void> {
    for (const card of this.#cards) card.session.close()
    this.#session.close()
    const { code, signal } = await this.daemon.stop()
    if (code !== 0) throw new Misbehaviour(`virtiod ended with ${code ?? signal}:\n${this.daemon.log.slice(-6000)}`)
    this.#checkLog()
    this.#checkImage()
    this.dispose()
  }

  /** Kills it if it still runs, and removes its files. */
  dispose(): void {
    if (!this.daemon.hasEnded) void this.daemon.stop('SIGKILL')
    rmSync(this.directory, { recursive: true, force: true })
  }

  #checkDisk(random: Random): void {
    const block = random.below(DISK_BYTES / 4096)
    const salt = random.below(256)
    try {
      this.#disk.write(block * 8, blockOf(salt))
      this.#written.set(block, salt)
      const other = random.pick([...this.#written.keys()])
      const found = this.#disk.read(other * 8, 4096)
      if (blockOf(this.#written.get(other)!).compare(found) !== 0) throw new Error(`block ${other} has other data`)
    } catch (error) {
      throw new Misbehaviour(`the other disk: ${(error as Error).message}\n${this.#tail}`)
    }
  }

  #checkCards(random: Random): void {
    const [left, right, neighbour] = this.#cards as [NetDriver, NetDriver, NetDriver]
    const frame = Buffer.alloc(600, SECRET)
    frame.set([0x52, 0x54, 0, 0x66, 0, 4, 0x52, 0x54, 0, 0x66, 0, 3, 0x88, 0xb5, random.below(256), random.below(256)])
    try {
      // What hostile cards broadcast must not reach this switch, so the first packet is ours.
      left.send(frame)
      const packet = right.receive(5000)
      if (frame.compare(packet.frame) !== 0) throw new Error('a frame arrived damaged')
      left.sent()
      for (let i = 0; i < 10_000 && neighbour.tryReceive(0) !== undefined; i++);
    } catch (error) {
      throw new Misbehaviour(`the other cards: ${(error as Error).message}\n${this.#tail}`)
    }
  }

  #checkFootprint(): void {
    const baseline = this.#baseline!
    let now = footprint(this.pid)
    // Sessions end a little after their connections; SharedArrayBuffers go when the collector comes by.
    for (let i = 0; i < 500 && now.fds > baseline.fds; i++) {
      sleepMs(10)
      now = footprint(this.pid)
    }
    if (now.fds > baseline.fds) {
      const left = openFiles(this.pid)
      for (const file of this.#files) if (left.includes(file)) left.splice(left.indexOf(file), 1)
      throw new Misbehaviour(`${now.fds - baseline.fds} fds are left of sessions that ended: ${summary(left)}`)
    }
    const warm = this.#warm
    if (warm === undefined) return
    if (now.resident > warm.resident + RSS_ROOM)
      throw new Misbehaviour(`${now.resident} bytes are resident, ${warm.resident} were when it was warm`)
    if (now.mappings > warm.mappings + MAPPINGS_ROOM)
      throw new Misbehaviour(`${now.mappings} mappings, ${warm.mappings} were when it was warm`)
  }

  #checkLog(): void {
    const chunk = Buffer.alloc(65_536)
    for (;;) {
      const length = readSync(this.#logFd, chunk, 0, chunk.length, this.#logAt)
      if (length === 0) return
      this.#logAt += length
      const text = chunk.toString('utf8', 0, length)
      const line = text.split('\n').find((one) => OWN_FAILURES.test(one))
      if (line !== undefined) throw new Misbehaviour(`virtiod says: ${line}`)
    }
  }

  /** The disk of the others, past its front-end. */
  #checkImage(): void {
    const image = readFileSync(join(this.directory, 'well.img'))
    const fresh = Buffer.alloc(DISK_BYTES, SECRET)
    for (let block = 0; block < DISK_BYTES / 4096; block++) {
      const salt = this.#written.get(block)
      const expected = salt === undefined ? fresh.subarray(block * 4096, (block + 1) * 4096) : blockOf(salt)
      if (expected.compare(image, block * 4096, (block + 1) * 4096) !== 0)
        throw new Misbehaviour(`block ${block} of the other disk was changed`)
    }
  }

  get #tail(): string {
    return this.daemon.log.slice(-3000)
  }
}

/** libuv opens /dev/null for the first stream that it has, and keeps it. */
function transferState(socket: string): void {
  using session = Session.open(socket, { queues: 0, memory: layouts.single(MIB) })
  const pair = new Int32Array(2)
  if (native.socketpair(pair) < 0) throw new Error('socketpair')
  session.connection.setDeviceStateFd(VHOST_TRANSFER_STATE_DIRECTION_SAVE, pair[1] ?? -1)
  session.connection.checkDeviceState()
  for (const fd of pair) native.close(fd)
}

/** Each kind once, and how many of it there are. */
function summary(files: readonly string[]): string {
  const kinds = [...new Set(files)]
  return kinds.map((kind) => `${files.filter((file) => file === kind).length} × ${kind}`).join(', ')
}

/** What the open fds of a process are, without numbers that differ from one to the next. */
function openFiles(pid: number): string[] {
  return readdirSync(`/proc/${pid}/fd`).map((fd) => {
    try {
      return readlinkSync(`/proc/${pid}/fd/${fd}`).replace(/\[\d+\]/, '')
    } catch {
      return 'one that was just closed'
    }
  })
}

function blockOf(salt: number): Buffer {
  const block = Buffer.alloc(4096, SECRET)
  block[block.length - 1] = salt
  return block
}

/**
 * What the two halves of the SCSI device share: the lists behind the counters, the state of the logical units in memory
 * that both see, and the messages between them.
 */
import { VIRTIO_SCSI_CDB_DEFAULT_SIZE, VIRTIO_SCSI_SENSE_DEFAULT_SIZE } from '../../src/device/virtio-scsi.ts'
import {
  BUS_DEVICE_RESET_FUNCTION,
  CAPACITY_DATA_HAS_CHANGED,
  I_T_NEXUS_LOSS,
  POWER_ON_OR_RESET,
  REPORTED_LUNS_DATA_HAS_CHANGED,
} from './sense.ts'

/** `DeviceDefinition.operations` of this device, and their indices. */
export const OPERATIONS = ['read', 'write', 'flush', 'unmap', 'write_same', 'verify', 'task', 'other'] as const
export const READ = 0
export const WRITE = 1
export const FLUSH = 2
export const UNMAP = 3
export const WRITE_SAME = 4
export const VERIFY = 5
export const TASK = 6
export const OTHER = 7

/** `DeviceDefinition.errors`, and their indices. */
export const ERRORS = [
  'io',
  'no_space',
  'end_of_file',
  'range',
  'read_only',
  'unsupported',
  'invalid_field',
  'malformed',
  'no_unit',
  'not_ready',
  'overrun',
  'miscompare',
  'aborted',
] as const
export const IO = 0
export const NO_SPACE = 1
export const END_OF_FILE = 2
export const RANGE = 3
export const READ_ONLY = 4
export const UNSUPPORTED = 5
export const INVALID_FIELD = 6
export const MALFORMED = 7
export const NO_UNIT = 8
export const STOPPED = 9
export const OVERRUN = 10
export const MISCOMPARED = 11
export const ABORTED = 12

/** The most logical units: as many as peripheral device addressing has (SAM-5 §4.7.7.2). */
export const MAX_UNITS = 256

/** Ranges that one UNMAP may have, and bytes that it or a WRITE SAME may cover. */
export const MAX_RANGES = 64
export const MAX_RANGE_BYTES = 2 ** 32
/** Bytes that one read, write or verification may move. */
export const MAX_TRANSFER_BYTES = 64 * 2 ** 20

/** Conditions that a unit tells the driver of once, by the next command; the first one goes first. */
export const ATTENTIONS: readonly number[] = [
  POWER_ON_OR_RESET,
  BUS_DEVICE_RESET_FUNCTION,
  I_T_NEXUS_LOSS,
  CAPACITY_DATA_HAS_CHANGED,
  REPORTED_LUNS_DATA_HAS_CHANGED,
]

/** The bit of a condition. */
export function attention(code: number): number {
  return 1 << ATTENTIONS.indexOf(code)
}

/** Handed to the handler of each queue. */
export interface ScsiQueueData {
  /** {@link ScsiState}. */
  readonly state: SharedArrayBuffer
  readonly units: number
  /** Flushes and write-through mean nothing (`--cache unsafe`). */
  readonly unsafe: boolean
}

/** Bytes of the serial number of a unit at most. */
export const SERIAL_LENGTH = 36

const UNIT_BYTES = 128
const HEADER_BYTES = 64
// Words of a unit.
const GENERATION = 0
const FD = 1
const BLOCK_SIZE = 2
const FLAGS = 3
const MEMORY_ALIGN = 4
const LENGTH_ALIGN = 5
const ATTENTION = 6
const WRITEBACK = 7
const STOP = 8
/** Doubles of a unit. */
const BLOCKS = 5
const SERIAL_AT = 64

const READ_ONLY_FLAG = 1
const DISCARD_FLAG = 2
const WRITEBACK_FLAG = 4

/** What a unit is when it is plugged in. */
export interface UnitFile {
  readonly fd: number
  readonly size: number
  /** Bytes of a logical block. */
  readonly blockSize: number
  readonly memoryAlign: number
  readonly lengthAlign: number
  readonly readOnly: boolean
  readonly discard: boolean
  /** It has a write cache when it is powered on. */
  readonly writeback: boolean
  /** 1 … {@link SERIAL_LENGTH} ASCII characters. */
  readonly serial: string
}

/**
 * One logical unit: plugged in and changed by the control half, looked at per command by the queues. What belongs to the
 * file is written before `generation`, and read after it.
 */
export class UnitState {
  readonly #words: Int32Array
  readonly #doubles: Float64Array
  readonly #serial: Uint8Array

  constructor(buffer: SharedArrayBuffer, lun: number) {
    const at = HEADER_BYTES + lun * UNIT_BYTES
    this.#words = new Int32Array(buffer, at, 16)
    this.#doubles = new Float64Array(buffer, at, 8)
    this.#serial = new Uint8Array(buffer, at + SERIAL_AT, UNIT_BYTES - SERIAL_AT)
  }

  /** 0 = there is no such unit; another number for each file that is plugged in. */
  get generation(): number {
    return this.#words[GENERATION]!
  }

  plugIn(file: UnitFile, generation: number): void {
    const words = this.#words
    words[FD] = file.fd
    words[BLOCK_SIZE] = file.blockSize
    words[FLAGS] =
      (file.readOnly ? READ_ONLY_FLAG : 0) | (file.discard ? DISCARD_FLAG : 0) | (file.writeback ? WRITEBACK_FLAG : 0)
    words[MEMORY_ALIGN] = file.memoryAlign
    words[LENGTH_ALIGN] = file.lengthAlign
    this.reset(POWER_ON_OR_RESET)
    this.#doubles[BLOCKS] = Math.floor(file.size / file.blockSize)
    this.#serial.fill(0)
    this.#serial.set(new TextEncoder().encode(file.serial))
    // ORDER: pairs with `current`.
    Atomics.store(words, GENERATION, generation)
  }

  /** As after power on. @param code the reason, the only one of {@link ATTENTIONS} that is pending then */
  reset(code: number): void {
    this.writeback = this.writebackDefault
    this.stopped = false
    this.attentions = attention(code)
  }

  /** ORDER: what belongs to the file is read after this; pairs with `plugIn`. */
  get current(): number {
    return Atomics.load(this.#words, GENERATION)
  }

  pullOut(): void {
    // ORDER: whoever is asked after this whether it is through finds the unit gone.
    Atomics.store(this.#words, GENERATION, 0)
  }

  get fd(): number {
    return this.#words[FD]!
  }

  get blockSize(): number {
    return this.#words[BLOCK_SIZE]!
  }

  get readOnly(): boolean {
    return (this.#words[FLAGS]! & READ_ONLY_FLAG) !== 0
  }

  get discard(): boolean {
    return (this.#words[FLAGS]! & DISCARD_FLAG) !== 0
  }

  /** WCE after power on. */
  get writebackDefault(): boolean {
    return (this.#words[FLAGS]! & WRITEBACK_FLAG) !== 0
  }

  get memoryAlign(): number {
    return this.#words[MEMORY_ALIGN]!
  }

  get lengthAlign(): number {
    return this.#words[LENGTH_ALIGN]!
  }

  get serial(): string {
    const end = this.#serial.indexOf(0)
    // A decoder takes no shared memory.
    return String.fromCharCode(...this.#serial.subarray(0, end < 0 ? this.#serial.length : end))
  }

  /** The capacity in logical blocks. */
  get blocks(): number {
    return this.#doubles[BLOCKS]!
  }

  set blocks(blocks: number) {
    this.#doubles[BLOCKS] = blocks
  }

  /** WCE of the caching mode page: false = each write is durable when it completes. */
  get writeback(): boolean {
    return this.#words[WRITEBACK] !== 0
  }

  set writeback(on: boolean) {
    this.#words[WRITEBACK] = on ? 1 : 0
  }

  /** START STOP UNIT stopped it. */
  get stopped(): boolean {
    return this.#words[STOP] !== 0
  }

  set stopped(on: boolean) {
    this.#words[STOP] = on ? 1 : 0
  }

  /** The bits of pending {@link ATTENTIONS}. */
  get attentions(): number {
    return this.#words[ATTENTION]!
  }

  set attentions(bits: number) {
    Atomics.store(this.#words, ATTENTION, bits)
  }

  /** @param code one of {@link ATTENTIONS} */
  raise(code: number): void {
    // ORDER: two threads may take and raise at once.
    Atomics.or(this.#words, ATTENTION, attention(code))
  }

  /** Takes the first pending condition, 0 when another thread was faster. */
  takeAttention(): number {
    for (;;) {
      const bits = Atomics.load(this.#words, ATTENTION)
      if (bits === 0) return 0
      const first = 31 - Math.clz32(bits & -bits)
      // ORDER: pairs with `raise`: a bit is taken once.
      if ((Atomics.and(this.#words, ATTENTION, ~(1 << first)) & (1 << first)) !== 0) return ATTENTIONS[first]!
    }
  }

  /** The driver knows it by other means. */
  clear(code: number): void {
    Atomics.and(this.#words, ATTENTION, ~attention(code))
  }
}

/** The whole device. */
export class ScsiState {
  readonly buffer: SharedArrayBuffer
  readonly units: readonly UnitState[]
  /** Size of sense data, size of CDBs, events missed. */
  readonly #words: Int32Array

  /** @param buffer of the other half */
  constructor(units: number, buffer?: SharedArrayBuffer) {
    this.buffer = buffer ?? new SharedArrayBuffer(HEADER_BYTES + units * UNIT_BYTES)
    this.#words = new Int32Array(this.buffer, 0, 3)
    this.units = Array.from({ length: units }, (_, lun) => new UnitState(this.buffer, lun))
    if (buffer === undefined) this.resetSizes()
  }

  resetSizes(): void {
    this.senseSize = VIRTIO_SCSI_SENSE_DEFAULT_SIZE
    this.cdbSize = VIRTIO_SCSI_CDB_DEFAULT_SIZE
  }

  /** Bytes that a response has for sense data. */
  get senseSize(): number {
    return this.#words[0]!
  }

  set senseSize(bytes: number) {
    this.#words[0] = bytes
  }

  /** Bytes that a request has for its CDB. */
  get cdbSize(): number {
    return this.#words[1]!
  }

  set cdbSize(bytes: number) {
    this.#words[1] = bytes
  }

  /** Events were lost, and the driver has not been told. */
  get missed(): boolean {
    return this.#words[2] !== 0
  }

  set missed(lost: boolean) {
    Atomics.store(this.#words, 2, lost ? 1 : 0)
  }

  /** ORDER: who takes it tells the driver; what is lost from then on sets it again. */
  takeMissed(): boolean {
    return Atomics.exchange(this.#words, 2, 0) !== 0
  }
}

// ---- messages

/** Identifies a task; two words, since it is any 64 bits. */
export interface TaskTag {
  readonly low: number
  readonly high: number
}

/** To a request queue: look for tasks, and see that they end. */
export interface Settle {
  readonly kind: 'settle'
  /** For the answer. */
  readonly id: number
  /** -1 = of all units. */
  readonly lun: number
  /** Undefined = all tasks. */
  readonly tag?: TaskTag
  /** The response that they shall end with as soon as they can; undefined = they go on. */
  readonly cancel?: number
  /** The unit was pulled out: its file is to be closed as soon as nothing uses it. */
  readonly detach?: boolean
}

/** To the control queue: the answer to a task management function. */
export interface TaskAnswer {
  readonly kind: 'answer'
  readonly id: number
  readonly response: number
}

/** To the event queue, which takes each once. */
export interface EventMessage {
  readonly kind: 'event'
  /** Ascending. */
  readonly id: number
  readonly event: number
  readonly lun: number
  readonly reason: number
}

/** Of every handler: it is there, and it is gone. */
export interface Presence {
  readonly kind: 'alive' | 'gone'
}

/** Of a request queue, to {@link Settle}. */
export interface Settled {
  readonly kind: 'settled'
  readonly id: number
  /** Tasks that match and are in work. */
  readonly tasks: number
  /** Requests that the queue has taken so far. */
  readonly taken: number
}

/** Of the control queue: a task management function to carry out. */
export interface TaskOrder {
  readonly kind: 'task'
  readonly id: number
  readonly subtype: number
  /** As `decodeLun` has it. */
  readonly lun: number
  readonly tag: TaskTag
}

/** Of the event queue: it has an event. */
export interface Received {
  readonly kind: 'received'
  readonly id: number
}

/** Of the event queue: an event found no buffer. */
export interface Missed {
  readonly kind: 'missed'
}

export type Report = Presence | Settled | TaskOrder | Received | Missed

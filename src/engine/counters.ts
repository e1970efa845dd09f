/**
 * Counters of queues and iothreads in shared memory: an iothread is the only writer and increments a plain double (1
 * ns; a labelled prom-client counter costs 172 ns), the control thread reads at scrape time. An aligned 8-byte store
 * does not tear on the processors that we run on.
 */
import { type IothreadSnapshot, LATENCY_BUCKETS, type OperationSnapshot } from '../ops/snapshot.ts'

// ---- per queue, in doubles
export const KICKS = 0
export const CALLS = 1
export const CALLS_SUPPRESSED = 2
export const CHAINS = 3
export const COMPLETED = 4
export const BROKEN = 5
/** Chains that were in flight when their ring stopped for good. */
export const ABANDONED = 6
/** No double but two words. */
const FLAGS = 7
/** Word: the control thread has been told of a call that is due and has not seen it yet. */
const CALL_RAISED = 0
const ERRORS = 8
const MAX_ERRORS = 16
const OPERATIONS = ERRORS + MAX_ERRORS
/** Per operation: requests, bytes, microseconds, then the latency buckets. */
const OPERATION_HEADER = 3
const OPERATION_SIZE = OPERATION_HEADER + LATENCY_BUCKETS + 1
const MAX_OPERATIONS = 8
const QUEUE_SIZE = OPERATIONS + MAX_OPERATIONS * OPERATION_SIZE

export class QueueCounters {
  readonly buffer: SharedArrayBuffer
  readonly values: Float64Array
  readonly #flags: Int32Array

  /** Over an existing buffer (on the iothread), or over a new one. */
  constructor(buffer: SharedArrayBuffer = new SharedArrayBuffer(QUEUE_SIZE * 8)) {
    this.buffer = buffer
    this.values = new Float64Array(buffer)
    this.#flags = new Int32Array(buffer, FLAGS * 8, 2)
  }

  /**
   * On the iothread: a call is to be made by a message. Returns false when the last one was not taken yet and says it
   * as well.
   */
  raiseCall(): boolean {
    // ORDER: seq_cst, after the used index: the control thread lowers the flag before it calls, so the driver that is
    // called sees what was published before the flag was found raised.
    return Atomics.exchange(this.#flags, CALL_RAISED, 1) === 0
  }

  /** On the control thread, before the driver is called, and when a ring starts. */
  takeCall(): void {
    // ORDER: seq_cst, before the message to the front-end; pairs with `raiseCall`.
    Atomics.store(this.#flags, CALL_RAISED, 0)
  }

  /** One request ended after `microseconds` (≥ 0). */
  request(operation: number, bytes: number, microseconds: number): void {
    const values = this.values
    const at = OPERATIONS + operation * OPERATION_SIZE
    values[at] = values[at]! + 1
    values[at + 1] = values[at + 1]! + bytes
    values[at + 2] = values[at + 2]! + microseconds
    const bucket = at + OPERATION_HEADER + latencyBucket(microseconds)
    values[bucket] = values[bucket]! + 1
  }

  error(kind: number): void {
    this.add(ERRORS + kind, 1)
  }

  add(counter: number, count: number): void {
    this.values[counter] = this.values[counter]! + count
  }

  operations(names: readonly string[]): OperationSnapshot[] {
    return names.map((name, index) => {
      const at = OPERATIONS + index * OPERATION_SIZE
      return {
        name,
        requests: this.values[at]!,
        bytes: this.values[at + 1]!,
        latencySeconds: this.values[at + 2]! / 1e6,
        latencyBuckets: this.values.slice(at + OPERATION_HEADER, at + OPERATION_SIZE),
      }
    })
  }

  errors(kinds: readonly string[]): { kind: string; count: number }[] {
    return kinds.map((kind, index) => ({ kind, count: this.values[ERRORS + index]! }))
  }
}

/** Bucket i holds (2^(i−1), 2^i] µs, the last one all that is longer. */
export function latencyBucket(microseconds: number): number {
  const whole = Math.ceil(microseconds)
  if (whole <= 1) return 0
  if (whole > 2 ** (LATENCY_BUCKETS - 1)) return LATENCY_BUCKETS
  return 32 - Math.clz32(whole - 1)
}

// ---- per iothread, in doubles
const POLL_HITS = 0
const POLL_MISSES = 1

export class IothreadCounters {
  readonly buffer: SharedArrayBuffer
  readonly #values: Float64Array

  constructor(buffer: SharedArrayBuffer = new SharedArrayBuffer(8 * 8)) {
    this.buffer = buffer
    this.#values = new Float64Array(buffer)
  }

  pollHit(): void {
    this.#values[POLL_HITS] = this.#values[POLL_HITS]! + 1
  }

  pollMiss(): void {
    this.#values[POLL_MISSES] = this.#values[POLL_MISSES]! + 1
  }

  snapshot(index: number, emulated: boolean): IothreadSnapshot {
    return {
      index,
      backend: emulated ? 'emulated' : 'io_uring',
      pollHits: this.#values[POLL_HITS]!,
      pollMisses: this.#values[POLL_MISSES]!,
    }
  }
}

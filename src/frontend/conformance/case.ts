/**
 * What a conformance case is: a rule of a specification, where it stands, how binding it is, what a back-end must offer
 * for it to apply, and a function that tries it. It owns the words for outcomes. It must not know which cases exist, or
 * how they run.
 */
import type { Context } from './context.ts'

/**
 * As the specification's own words are. `MUST` also stands for what it says as plain fact ("stops the vring and returns
 * …"). `MAY` marks what a back-end is free to do: such a case says what was seen and can only fail by breaking the
 * back-end.
 */
export type Level = 'MUST' | 'SHOULD' | 'MAY'

/** The groups, in the order in which they run: what may end a back-end comes last. */
export const GROUPS = {
  features: 'Feature and protocol feature negotiation',
  protocol: 'Messages, replies, file descriptors, config space',
  memory: 'Memory regions',
  vrings: 'Setting up, starting and stopping rings',
  split: 'Split virtqueues',
  packed: 'Packed virtqueues',
  notifications: 'Kicks and calls',
  blk: 'virtio-blk requests',
  net: 'virtio-net packets and commands',
  inflight: 'In-flight I/O tracking',
  logging: 'Dirty page logging',
  iommu: 'IOMMU support',
  migration: 'Device status, reset and device state',
  robustness: 'Malformed rings and messages; what is refused, and that nothing else suffers',
} as const

export type Group = keyof typeof GROUPS

/** What a back-end must have for a case to apply. Whatever is missing skips the case, with the reason. */
export interface Needs {
  readonly device?: 'blk' | 'net'
  /** Feature bits (VIRTIO_F_…, VHOST_F_…, the device's own). */
  readonly features?: readonly number[]
  /** Protocol feature bits. */
  readonly protocol?: readonly number[]
  /** Rings. */
  readonly queues?: number
  /** The back-end's /proc/PID/fd can be read. */
  readonly fds?: true
  /** Packets sent by the suite come in again: the device loops, or there is a second socket. */
  readonly wire?: true
}

/** One row of the table. */
export interface ConformanceCase {
  /** Stable, lower case: `ring-loop`. */
  readonly id: string
  readonly group: Group
  readonly level: Level
  /** What a correct back-end does: a sentence without its full stop. */
  readonly rule: string
  /** `vhost-user.rst "Ring states"`, `virtio 1.3 §2.7.5.3`. */
  readonly cites: string
  readonly needs?: Needs
  /** It changes the disk's contents or the device's settings: it runs with consent only. */
  readonly destructive?: true
  /**
   * Tries it.
   * @returns what was seen, for the report
   * @throws Violation when the rule does not hold; NotApplicable; FrontendError counts as a violation
   */
  run(context: Context): string
}

/**
 * pass; fail (MUST) or warn (SHOULD); skip with its reason; error: the back-end died or hung, or the suite itself
 * failed.
 */
export type Outcome = 'pass' | 'fail' | 'warn' | 'skip' | 'error'

export interface CaseResult {
  readonly id: string
  readonly group: Group
  readonly level: Level
  readonly rule: string
  readonly cites: string
  readonly outcome: Outcome
  /** What was seen; the reason of a skip. */
  readonly seen: string
  /** What should have been seen, of a fail or warn. */
  readonly expected?: string
  readonly ms: number
}

/** The back-end did something else than the rule says. */
export class Violation extends Error {
  readonly expected: string
  readonly seen: string

  constructor(expected: string, seen: string) {
    super(`expected ${expected}; seen: ${seen}`)
    this.expected = expected
    this.seen = seen
  }
}

/** The case can't say anything about this back-end. */
export class NotApplicable extends Error {}

/** @throws Violation unless `holds` */
export function expect(holds: boolean, expected: string, seen: string): asserts holds {
  if (!holds) throw new Violation(expected, seen)
}

/** @throws Violation unless both are the same; `what` names them: `the used index`. */
export function expectEqual(what: string, seen: number | bigint | string, expected: number | bigint | string): void {
  if (seen !== expected) throw new Violation(`${what} ${expected}`, String(seen))
}

/** @throws Violation naming the first byte that differs */
export function expectBytes(what: string, seen: Uint8Array, expected: Uint8Array): void {
  if (seen.length !== expected.length) throw new Violation(`${what}: ${expected.length} bytes`, `${seen.length} bytes`)
  const at = seen.findIndex((byte, i) => byte !== expected[i])
  if (at >= 0) throw new Violation(`${what}: byte ${at} 0x${hex(expected[at])}`, `0x${hex(seen[at])}`)
}

function hex(byte: number | undefined): string {
  return (byte ?? 0).toString(16).padStart(2, '0')
}

/** @throws NotApplicable unless `holds` */
export function applicable(holds: boolean, reason: string): asserts holds {
  if (!holds) throw new NotApplicable(reason)
}
